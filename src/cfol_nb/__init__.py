"""How robust is the class that is worst off? Class-wise robust accuracy, and training that lifts the worst class."""

import contextlib as _contextlib
import ctypes as _ctypes
import os as _os

__version__ = "0.2.0"
# What most people need, by the module that holds it: imported when it is first asked for.
_NAMES = {
    "ClassSampler": "samplers",
    "ExampleSampler": "samplers",
    "Outcomes": "outcomes",
    "RunConfig": "config",
    "class_table": "stats",
    "compute": "runs",
    "load": "data",
    "pgd": "attacks",
    "summary": "stats",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str):
    from importlib import import_module

    if name not in _NAMES:
        raise AttributeError(f"module 'cfol_nb' has no attribute {name!r}")
    return getattr(import_module(f"cfol_nb.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor, up to 1 GiB each; nothing where there is another allocator.

    By default it gives large blocks back to the system, and every step of a network asks for the same pages again: on
    the CPU that can take half of the time. Where the environment sets one of its variables (MALLOC_...), that holds.
    """
    if not any(name.startswith("MALLOC_") for name in _os.environ):
        with _contextlib.suppress(OSError, AttributeError):  # not Linux, or another C library
            mallopt, trim_threshold, mmap_threshold = _ctypes.CDLL(None).mallopt, -1, -3
            mallopt(trim_threshold, 2**31 - 1)
            mallopt(mmap_threshold, 2**30)


_keep_freed_memory()

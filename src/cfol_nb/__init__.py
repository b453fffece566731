"""How robust is the class that is worst off? Class-wise robust accuracy, and training that lifts the worst class."""

import contextlib as _contextlib
import ctypes as _ctypes
import os as _os

__version__ = "0.1.0"


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

"""Where things lie, and writing that is whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_HERE = Path(__file__).resolve().parents[2]
CHECKOUT = (_HERE / "pyproject.toml").exists()  # else the package was installed away from its repository
ROOT = _HERE if CHECKOUT else Path.cwd()


class Corrupt(RuntimeError):
    """A stored file is truncated, was changed, or is not what its name says."""


def data_dir() -> Path:
    """`data/`, or where CFOL_NB_DATA says."""
    return Path(os.environ.get("CFOL_NB_DATA") or ROOT / "data").expanduser()


def runs_dir() -> Path:
    """`runs/`, or where CFOL_NB_RUNS says."""
    return Path(os.environ.get("CFOL_NB_RUNS") or ROOT / "runs").expanduser()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well; else `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(
            error.errno, f"could not write {path}: {error.strerror}; what was stored before is intact"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Corrupt(f"{path} is not whole JSON ({error}); delete it to compute it anew") from error


@functools.cache
def code_hash() -> str:
    """Of the source that decides a run's numbers, 16 hexadecimal digits."""
    here = Path(__file__).parent
    names = (
        "attacks",
        "autoattack",
        "config",
        "data",
        "engine",
        "evaluate",
        "features",
        "models",
        "objectives",
        "samplers",
        "stats",
        "train",
    )
    files = [*(here / f"{n}.py" for n in names), *sorted((here / "methods").glob("*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    import torch

    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        h.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        h.update(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
    return h.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict | None = None) -> None:
    """One safetensors file: the tensors, `meta` as JSON, and a SHA-256 of the tensors; equal input, equal bytes."""
    from safetensors.torch import save

    seen: set[int] = set()  # safetensors refuses memory that is shared
    flat = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()  # also of tensors that overlap
        flat[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    # one key, because the order of several is not fixed
    header = {"cfol_nb": json.dumps({"meta": meta or {}, "sha256": _digest(flat)}, sort_keys=True)}
    with replacing(path) as part:
        part.write_bytes(save(flat, metadata=header))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and `meta` of a file from `write_tensors`. Raises `Corrupt` when a byte is missing or differs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as f:
            header = json.loads((f.metadata() or {})["cfol_nb"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        whole = _digest(tensors) == header["sha256"]
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise Corrupt(f"{path} is truncated or not a file of cfol-nb ({error}); delete it to make it anew") from error
    if not whole:
        raise Corrupt(f"{path} was changed or damaged (its checksum differs); delete it to make it anew")
    return tensors, header["meta"]


def bar(total: int, label: str):
    """A tqdm bar with time left. CFOL_NB_PROGRESS: 'off', or a terminal that it is drawn on (headless notebooks)."""
    from tqdm import tqdm
    from tqdm.auto import tqdm as auto

    where, notebook = os.environ.get("CFOL_NB_PROGRESS", ""), "ipykernel" in sys.modules
    show = {"total": total, "desc": label, "leave": False, "bar_format": "{l_bar}{bar}| {elapsed}<{remaining}"}
    if where.startswith("/dev/"):
        with contextlib.suppress(OSError):
            return tqdm(file=open(where, "w"), **show)
        where = "off"
    hidden = where == "off" or not (notebook or sys.stderr.isatty())
    return (auto if notebook else tqdm)(disable=hidden, **show)

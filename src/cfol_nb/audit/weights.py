"""Files of weights as people have them, into a module. Nothing is read that could run code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

INSIDE = ("state_dict", "model_state_dict", "model", "net", "ema")  # where a checkpoint keeps the weights
PREFIXES = ("module.", "model.", "_orig_mod.")  # of data parallel, Lightning, compiled modules
_OTHERS = {
    b"": "is empty: copy or download it again",
    b"version https://git-lfs": "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`",
    b"\x89PNG": "is a PNG image: give the file of weights",
    b"\xff\xd8\xff": "is a JPEG image: give the file of weights",
    b"<": "is a page of HTML or XML: download the file itself",
    b"\x89HDF": "is an HDF5 file, as Keras writes them: save the weights of a PyTorch module",
}


def kind(path: Path) -> str:
    """What a file is by its first bytes, whatever it is called: "safetensors", "torch" (`torch.save`), "script"
    (TorchScript), "exported" (`torch.export`) or "unknown". Raises FileNotFoundError, or ValueError for one that is
    something else and known."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the file of weights in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as f:
        head = f.read(32)
    for start, said in _OTHERS.items():
        if head.startswith(start) if start else not head:
            raise ValueError(f"{path} {said}")
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = {n.partition("/")[2] for n in archive.namelist()}
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{path} is truncated or damaged ({error}): copy or download it again") from error
        if "constants.pkl" in names:
            return "script"
        return "torch" if "data.pkl" in names else "exported" if "archive_format" in names else "unknown"
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    return "torch" if head.startswith(b"\x80") else "unknown"


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file by name, and in words where in it they were. safetensors, or what `torch.save` wrote, read
    without running code and mapped into memory; a state dict as it is, or under one of `INSIDE`.

    Raises ValueError, with the next step, for every file that holds something else.
    """
    what = kind(path := Path(path))
    if what in ("script", "exported"):
        raise ValueError(f"{path} is a whole program, not weights alone: give it as the model, without weights")
    if what == "unknown":
        raise ValueError(f"{path} holds no weights: a safetensors file, or one of torch.save, is needed")
    try:
        if what == "safetensors":
            return safetensors.torch.load_file(path), []
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            if "weights_only" not in str(error) and "Unsupported" not in str(error):
                raise
            raise ValueError(_asks_for_code(path, str(error))) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is truncated, or no file of weights ({reason}): copy or download it again") from error
    return _inside(path, held)


def _asks_for_code(path: Path, error: str) -> str:
    """What to do with a pickle that holds more than tensors: which classes and functions it names, and the two
    statements that let through these alone and write the weights as safetensors."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:  # the format before torch 1.6: the first that was refused
        names = re.findall(r"GLOBAL (\S+) was not", error)
    named = ", ".join(names) or "more than tensors"
    return (
        f"{path} is a pickle that asks for {named}, and was not read. Where you trust each, import them and run "
        f"`with torch.serialization.safe_globals([{', '.join(names)}]): held = torch.load({str(path)!r}); "
        "safetensors.torch.save_file({k: v.contiguous().clone() for k, v in held.state_dict().items()}, "
        "'w.safetensors')`, for a checkpoint with held['state_dict'] instead of held.state_dict()"
    )


def _inside(path: Path, held: object) -> tuple[dict[str, Tensor], list[str]]:
    def is_state(value: object) -> bool:
        return isinstance(value, Mapping) and bool(value) and all(map(torch.is_tensor, value.values()))

    if is_state(held):
        return dict(held), []
    keys = list(map(str, held)) if isinstance(held, Mapping) else []
    found = [k for k in INSIDE if k in keys and is_state(held[k])]
    if not found:
        what = f"a {type(held).__name__}" + (f" with {', '.join(keys[:8])}" if keys else "")
        raise ValueError(
            f"{path} holds {what}: a state dict is needed, as it is or under {', '.join(INSIDE)} "
            "(torch.save(model.state_dict(), path))"
        )
    beside = f", not from {', '.join(found[1:])}" if found[1:] else ""
    return dict(held[found[0]]), [f"taken from {found[0]!r} of the file{beside}"]


def _stripped(state: dict[str, Tensor], wanted: Mapping) -> tuple[dict[str, Tensor], list[str]]:
    """The state with the prefixes taken off that all names have, as far as more names are then the module's."""
    best, said, now, off = state, [], state, ""
    while True:
        if any(k.startswith("module.") for k in now) and "n_averaged" in now:  # of torch.optim.swa_utils
            now = {k: v for k, v in now.items() if k != "n_averaged"}
        if not (found := next((p for p in PREFIXES if now and all(k.startswith(p) for k in now)), None)):
            return best, said
        now, off = {k.removeprefix(found): v for k, v in now.items()}, off + found
        if len(now.keys() & wanted.keys()) > len(best.keys() & wanted.keys()):
            best, said = now, [f"{off!r} taken off the names"]


def load_weights(module: nn.Module, path: Path, *, may_lack: tuple[str, ...] = ()) -> list[str]:
    """Load a file of weights; in words what was done to make it fit. Raises ValueError that names the first tensors
    that do not fit.

    Of tensors that are one in the model (tied weights) the file may hold any or all, as `safetensors.torch.save_model`
    and `save_file` write them. Half precision is widened. may_lack: ends of names that the file may do without.
    """
    return put(module, *read_state(path), path, may_lack=may_lack)


def put(
    module: nn.Module, state: dict[str, Tensor], said: list[str], path: Path, *, may_lack: tuple[str, ...] = ()
) -> list[str]:
    """`load_weights` with what `read_state` gave."""
    wanted = module.state_dict()
    state, more = _stripped(state, wanted)
    for names in _tied(wanted):
        there = [k for k in names if k in state]
        for k in there[1:]:
            if not torch.equal(state[k], state[there[0]]):
                both = f"{there[0]} and {k}"
                raise ValueError(f"the weights do not fit: {both} are one tensor in the model, two in {path}")
        state = state | dict.fromkeys(names, state[there[0]]) if there else state
    state = {k: v for k, v in wanted.items() if k.rpartition(".")[2] in may_lack} | state
    lack, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    other = [k for k in sorted(set(state) & set(wanted)) if state[k].shape != wanted[k].shape]
    step = "are they of this model?"
    for what, names in (("lacks", lack), ("has, but the model has not,", extra)):
        if names:
            raise ValueError(
                f"the weights do not fit: {path} {what} {len(names)} tensors, for example {names[0]}: {step}"
            )
    if other:
        k = other[0]
        raise ValueError(
            f"the weights do not fit: {k} is {tuple(state[k].shape)} in {path}, {tuple(wanted[k].shape)} in the model: "
            f"{step}"
        )
    types = {str(v.dtype)[6:] for k, v in state.items() if v.is_floating_point() and v.dtype != wanted[k].dtype}
    module.load_state_dict(state)
    into = {str(v.dtype)[6:] for v in wanted.values() if v.is_floating_point()}
    return said + more + ([f"{', '.join(sorted(types))} read into {', '.join(sorted(into))}"] if types else [])


def _tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that stand for one and the same tensor."""
    same: dict[tuple, list[str]] = {}
    for name, t in state.items():
        if torch.is_tensor(t) and t.numel():
            same.setdefault((t.device, t.data_ptr(), t.shape, t.stride(), t.dtype), []).append(name)
    return [names for names in same.values() if len(names) > 1]

"""Where things lie, and writing that is whole or not at all."""

from __future__ import annotations

import ast
import contextlib
import dis
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import sys
import types
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

_HERE = Path(__file__).resolve().parents[2]
CHECKOUT = (_HERE / "pyproject.toml").exists()  # else the package was installed away from its repository
ROOT = _HERE if CHECKOUT else Path.cwd()


class Corrupt(RuntimeError):
    """A stored file is truncated, was changed, or is not what its name says."""


class Unsigned(Corrupt):
    """A stored file without a digest, as earlier versions wrote them."""


ANEW = "delete it to make it anew"


def data_dir() -> Path:
    """`data/`, or where CFOL_NB_DATA says."""
    return Path(os.environ.get("CFOL_NB_DATA") or ROOT / "data").expanduser()


def runs_dir() -> Path:
    """`runs/`, or where CFOL_NB_RUNS says."""
    return Path(os.environ.get("CFOL_NB_RUNS") or ROOT / "runs").expanduser()


def as_name(text: str) -> str:
    """A text as part of a file's name: letters, digits, "_", "-" and inner dots, at most 60 bytes of them."""
    return re.sub(r"[^\w.-]+", "-", text).encode("utf-8", "ignore")[:60].decode("utf-8", "ignore").strip(".-")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well; else `path` stays as it was.

    Its name cannot be guessed, and it is locked while it is written: what is not locked was left by a process that was
    killed, and is removed by the next one that writes into the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".*.{'?' * 32}.part"):
        with contextlib.suppress(OSError), open(left, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink(missing_ok=True)
    try:
        while True:
            part = path.with_name(f".{path.name}.{secrets.token_hex(16)}.part")
            lock = open(part, "xb")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX)
            if part.exists():  # else another process removed it before it was locked
                break
            lock.close()
        with lock:
            try:
                yield part
                os.fsync(lock.fileno())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:
        raise OSError(
            error.errno, f"could not write {path}: {error.strerror or error}; what was stored before is intact"
        ) from error


def sync(folder: Path) -> None:
    """What was renamed in a folder stays so after a power failure."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _json(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, value: dict) -> None:
    """One JSON file, with a SHA-256 of the rest under "sha256"."""
    text = _json({**value, "sha256": hashlib.sha256(_json(value).encode()).hexdigest()})
    with replacing(path) as part:
        part.write_text(text)


def read_json(path: Path) -> dict:
    """The value of a file from `write_json`. Raises `Corrupt` when a letter of it differs, as `Unsigned` if it has no
    digest."""
    try:
        text = path.read_bytes().decode()
        value = json.loads(text)
        if not isinstance(value, dict) or "sha256" not in value:
            raise Unsigned(f"{path} carries no digest of all that is in it: {ANEW}")
        whole = text == _json(value)  # no key twice, no NaN, nothing behind it
        given = value.pop("sha256")
        whole = whole and given == hashlib.sha256(_json(value).encode()).hexdigest()
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path} is not whole JSON ({error}); {ANEW}") from error
    if not whole:
        raise Corrupt(f"{path} was changed or damaged (its digest differs); {ANEW}")
    return value


# A file of tensors begins with eight bytes, then this, then the SHA-256 of all its other bytes.
_BEFORE = b'{"__metadata__":{"cfol_nb":"'
_DIGEST = 8 + len(_BEFORE)


def _tensors_digest(path: Path) -> str:
    h = hashlib.sha256()
    with open(path, "rb") as f:
        h.update(f.read(_DIGEST))
        f.read(64)
        return hashlib.file_digest(f, lambda: h).hexdigest()


def digest(path: Path) -> str:
    """The digest that a file from `write_tensors` carries, by which others say that they belong to it. The file is not
    checked."""
    with open(path, "rb") as f:
        start, given = f.read(_DIGEST), f.read(64)
    if start[8:] == _BEFORE and given.startswith(rb"{\"meta\": "):
        raise Unsigned(f"{path} carries no digest of all that is in it: {ANEW}")
    if start[8:] != _BEFORE or not re.fullmatch(rb"[0-9a-f]{64}", given):
        raise Corrupt(f"{path} is truncated or not a file of cfol-nb: {ANEW}")
    return given.decode()


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file straight from the tensors' memory: safetensors' `save` copies all of it first, and `save_file`
    leaves a file behind when it is killed, and none that others may read."""
    import torch

    names, header, end = sorted(tensors, key=lambda k: (-tensors[k].element_size(), k)), {"__metadata__": metadata}, 0
    for name in names:
        t = tensors[name]
        kind = re.sub("float|uint|int", lambda found: found[0][0], str(t.dtype).removeprefix("torch.")).upper()
        start, end = end, end + t.nbytes
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            f.write(memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict | None = None) -> None:
    """One safetensors file: the tensors, `meta` as JSON, and a SHA-256 of all of it; equal input, equal bytes."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key, because the order of several is not fixed
    header = {"cfol_nb": "0" * 64 + json.dumps(meta or {}, sort_keys=True, allow_nan=False)}
    with replacing(path) as part:
        _save(part, flat, header)
        with open(part, "r+b") as f:
            f.seek(_DIGEST)
            f.write(_tensors_digest(part).encode())


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and `meta` of a file from `write_tensors`. Raises `Corrupt` when a byte is missing or differs."""
    from safetensors import SafetensorError, safe_open

    try:
        if (given := digest(path)) != _tensors_digest(path):
            raise Corrupt(f"{path} was changed or damaged (its digest differs); {ANEW}")
        with safe_open(str(path), "pt") as f:
            header = f.metadata()["cfol_nb"]
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        if header[:64] != given:
            raise Corrupt(f"{path} was replaced while it was read")
        return tensors, json.loads(header[64:])
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise Corrupt(f"{path} cannot be read as a file of cfol-nb ({error}); {ANEW}") from error


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Only one process at a time is inside for a lock; the system frees it when a process dies. One that has to wait
    says for whom and since when."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            print(f"{what}: waiting for {f.read() or 'another process'}", file=sys.stderr, flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        since = f"process {os.getpid()} on {platform.node()}, which is at it since {datetime.now():%Y-%m-%d %H:%M:%S}"
        with contextlib.suppress(OSError):  # on a full disk it is not told
            f.truncate(0)
            os.write(f.fileno(), since.encode())
        try:
            yield
        finally:
            f.truncate(0)


# -- code --------------------------------------------------------------------------------------------------------------


def _library(name: str | None) -> bool:
    """Whether a module comes with Python or was installed."""
    root = (name or "").partition(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root in sys.stdlib_module_names or bool({"site-packages", "dist-packages"} & set(Path(file).parts))


_read: dict[str, tuple] = {}


def _module(name: str) -> tuple[str, frozenset[str]]:
    """A hash of one of this package's modules without comments, docstrings and layout, and what it imports of it; as it
    was when it was first asked for, or loaded anew."""
    loaded = getattr(sys.modules.get(name), "__spec__", None)
    if name not in _read or _read[name][0] is not loaded:
        _read[name] = loaded, _parsed(name)
    return _read[name][1]


def _parsed(name: str) -> tuple[str, frozenset[str]]:
    path = Path(__file__).parent.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.exists():  # a name inside a module
        return "", frozenset()
    tree, imported = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, False):
            del node.body[0]
    own = frozenset(i for i in imported if i and i.startswith("cfol_nb."))
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), own


_PLAIN = (str, bytes, int, float, complex, type(None), type(...))
_ASIDE = {"__doc__", "__module__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__"}


class _Described:
    """What a user's class or function does, as text, wherever it was defined: its instructions, defaults and constants,
    and those of what it uses, but for libraries. modules: what it uses of this package."""

    def __init__(self, maker: Callable):
        self.text: list[str] = []
        self.modules: set[str] = set()
        self.seen: dict[int, object] = {}
        self.home = (maker.__module__ or "").partition(".")[0]  # own code, even where it was installed
        self(maker)

    def __call__(self, value: object) -> None:
        if isinstance(value, _PLAIN):
            self.text.append(repr(value))
        elif id(value) in self.seen:
            self.text.append("again")
        else:
            if isinstance(value, list | dict | type | types.FunctionType):  # what may hold itself
                self.seen[id(value)] = value
            self.text.append(type(value).__qualname__)
            self._inside(value)

    def _inside(self, value) -> None:
        if isinstance(value, types.CodeType):
            for step in dis.get_instructions(value):
                self.text.append(step.opname)
                self(step.argval)
        elif isinstance(value, type | types.FunctionType):
            module = value.__module__ or ""
            self.text.append(f"{module}.{value.__qualname__}" if module != "__main__" else value.__qualname__)
            if module.startswith("cfol_nb."):
                self.modules.add(module)
            elif module.partition(".")[0] == self.home or not _library(module):
                self._class(value) if isinstance(value, type) else self._function(value)
        elif isinstance(value, staticmethod | classmethod | types.MethodType):
            self(value.__func__)
        elif isinstance(value, property):
            self([value.fget, value.fset, value.fdel])
        elif isinstance(value, functools.partial):
            self([value.func, value.args, value.keywords])
        elif isinstance(value, list | tuple):
            for v in value:
                self(v)
        elif isinstance(value, dict):
            for k, v in sorted(value.items(), key=lambda item: repr(item[0])):
                self.text.append(repr(k) if isinstance(k, _PLAIN) else "")
                self(v)
        elif isinstance(value, set | frozenset):
            self(sorted(map(repr, value)))
        elif type(value).__module__.partition(".")[0] in ("torch", "numpy") and hasattr(value, "tolist"):
            self.text.append(repr(value.tolist()))
        elif not _library(type(value).__module__):
            self(type(value))

    def _class(self, cls: type) -> None:
        for base in cls.__bases__:
            self(base)
        for name in sorted(vars(cls).keys() - _ASIDE):
            self.text.append(name)
            self(vars(cls)[name])

    def _function(self, f: types.FunctionType) -> None:
        for part in (f.__code__, f.__defaults__, f.__kwdefaults__):
            self(part)
        for cell in f.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                self(cell.cell_contents)
        names, used, codes = set(), set(), [f.__code__]
        for code in codes:
            names |= set(code.co_names)
            used |= {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        for name in sorted(used & f.__globals__.keys()):
            value = f.__globals__[name]
            self.text.append(name)
            if isinstance(value, types.ModuleType):
                module = value.__name__
                if module.startswith("cfol_nb."):
                    self.modules.add(module)
                elif not _library(module):
                    for inner in sorted(names & vars(value).keys()):
                        self(vars(value)[inner])
            else:
                self(value)


def code_hash(*makers: Callable) -> str:
    """Of the code that can move a run's numbers, 16 hexadecimal digits.

    makers: the classes and functions that a run is made of, whoever wrote them. Counted are what every run passes
    through and, of this package, the modules of the makers, all with what they import of the package; comments,
    docstrings and layout are not. Of a user's own code it is what the maker does and uses, not the rest of its file.
    Not seen: libraries, attributes of a user's objects, and what is looked up by a name made at run time.
    """
    todo, described, found = ["cfol_nb.train"], [], {}
    for maker in makers:
        if (maker.__module__ or "").startswith("cfol_nb."):
            todo.append(maker.__module__)
        else:
            own = _Described(maker)
            described.append(own.text)
            todo += own.modules
    while todo:
        if (name := todo.pop()) not in found and name != __name__:  # this file moves no numbers
            found[name], more = _module(name)
            todo += more
    return hashlib.sha256(json.dumps([described, sorted(found.items())]).encode()).hexdigest()[:16]


class _Lines:
    """Keeps as lines of a file what a bar would draw over itself."""

    def __init__(self, file):
        self.file = file

    def write(self, text: str) -> None:
        if text := text.strip():
            self.file.write(f"{text}\n")

    def flush(self) -> None:
        self.file.flush()


MINUTE = 60.0


def bar(total: int, label: str):
    """A tqdm bar with time left, or without a terminal a line of text every MINUTE seconds.

    CFOL_NB_PROGRESS: 'off', or a terminal that it is drawn on, or a file for the lines (headless notebooks).
    """
    from tqdm import tqdm
    from tqdm.auto import tqdm as auto

    where, notebook = os.environ.get("CFOL_NB_PROGRESS", ""), "ipykernel" in sys.modules
    show = {"total": total, "desc": label, "leave": False, "bar_format": "{l_bar}{bar}| {elapsed}<{remaining}"}
    if where.startswith("/dev/"):
        with contextlib.suppress(OSError):
            return tqdm(file=open(where, "w"), **show)
        where = "off"
    if os.path.isabs(where) or not (where or notebook or sys.stderr.isatty()):
        file = _Lines(open(where, "a") if where else sys.stderr)  # noqa: SIM115
        show["bar_format"] = "{desc}: {percentage:.0f} % done after {elapsed}, {remaining} left"
        return tqdm(file=file, miniters=0, mininterval=MINUTE, maxinterval=MINUTE, delay=MINUTE, **show)
    return (auto if notebook else tqdm)(disable=where == "off", **show)

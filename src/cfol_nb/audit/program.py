"""Programs of `torch.export` (.pt2), read so that the file can ask for nothing but torch's operations on tensors.

`torch.export.load` alone runs what a file says: sizes are evaluated as Python expressions, operators are looked up by
any dotted name, and some constants are pickles.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import zipfile
from pathlib import Path
from unittest import mock

import torch

_OPERATOR = re.compile(
    r"torch\.ops\.(aten\.(?!from_file)|prims\.)\w+(\.\w+)?|math\.trunc|"
    r"_operator\.(getitem|eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_)"
)
_PARTS = re.compile(
    r"[^/]+/(models/\w+\.json|data/((weights|constants)/\w+(\.json)?|sample_inputs/\w+\.pt)|archive_\w+|byteorder|\.data/\w+)"
)
_FUNCTIONS = re.compile(  # of sizes: sympy's, and torch.utils._sympy.functions
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Piecewise|floor|ceiling|FloorDiv|"
    "ModularIndexing|Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow|"
    "FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|ToFloat|Identity"
)
_NODES = (ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare)
_NODES += (ast.operator, ast.unaryop, ast.cmpop)
_TYPES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def _is_size(text: str) -> bool:
    """Whether it is an expression of numbers, symbols and `_FUNCTIONS` alone."""
    nodes = list(ast.walk(ast.parse(text, mode="eval")))
    called = {id(n.func) for n in nodes if isinstance(n, ast.Call)}

    def known(n: ast.AST) -> bool:
        if isinstance(n, ast.Name):
            return bool(_FUNCTIONS.fullmatch(n.id) if id(n) in called else re.fullmatch(r"[su]\d+", n.id))
        if isinstance(n, ast.Constant):
            return isinstance(n.value, int | float) or (isinstance(n.value, str) and n.value.isidentifier())
        return isinstance(n, _NODES) and (not isinstance(n, ast.Call) or isinstance(n.func, ast.Name))

    return all(map(known, nodes))


def _is_tree(of: object) -> bool:
    """Whether it says how tuples, lists and dicts are nested."""
    if isinstance(of, list):
        return all(map(_is_tree, of))
    if not isinstance(of, dict):
        return isinstance(of, int)
    return of["type"] in _TYPES and "__" not in str(of["context"]) and _is_tree(of["children_spec"])


def _checked(of: object, key: str = "") -> object:
    """A part of the file's JSON, without what is not needed. Raises ValueError for what could be run."""
    if isinstance(of, dict):
        if odd := [k for k in of if not re.fullmatch(r"[\w.]*", k)]:
            raise ValueError(f"a name {odd[0][:60]!r}")
        return {k: {} if k == "metadata" else [] if k == "guards_code" else _checked(v, k) for k, v in of.items()}
    if isinstance(of, list):
        return [_checked(v, key) for v in of]
    if key == "use_pickle" and of:
        raise ValueError("a pickle")
    if isinstance(of, str):
        if key in ("target", "as_operator"):
            fine = _OPERATOR.fullmatch(of)
        elif key == "expr_str":
            fine = _is_size(of)
        elif key in ("in_spec", "out_spec"):
            fine = _is_tree(json.loads(of))
        elif key == "path_name":
            fine = re.fullmatch(r"(weight|tensor)_\d+", of)
        else:
            fine = re.fullmatch(r"\w*" if key in ("name", "as_name") else r"[\w.,:>+ -]*", of)
        if not fine:
            raise ValueError(f"{key} {of[:60]!r}")
    return of


def load_exported(path: Path) -> torch.nn.Module:
    """The module of a .pt2 file. Raises ValueError for one that asks for more than operations on tensors, or that this
    torch cannot read."""
    kept = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(kept, "w") as new:
            for name in filter(_PARTS.fullmatch, old.namelist()):
                content = b"" if "/sample_inputs/" in name else old.read(name)
                if name.endswith(".json"):
                    content = json.dumps(_checked(json.loads(content))).encode()
                new.writestr(name, content)
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} asks for more than operations on tensors ({error}), and was not read: give the model as "
            "FILE.py:function, with the weights beside it"
        ) from error
    kept.seek(0)
    with mock.patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}):  # which else falls back to pickle
        return torch.export.load(kept).module()

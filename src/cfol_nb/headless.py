"""Run notebooks without a browser: parameters are checked first, the output takes its name only when every cell ran."""

from __future__ import annotations

import ast
import base64
import contextlib
import json
import logging
import os
import pathlib
import re
import site
import sys
import sysconfig
import tempfile
import threading
import typing
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from pydantic import ConfigDict, TypeAdapter
from traitlets.config import Config

from cfol_nb.config import as_json, choose
from cfol_nb.files import ROOT, read_json, replacing, runs_dir

# what the annotations of parameters are made of
TYPES = {
    **{t.__name__: t for t in (int, float, str, bool, list, dict, tuple, set, frozenset, object, Path)},
    **{name: getattr(typing, name) for name in typing.__all__},
    **{"typing": typing, "pathlib": pathlib, "None": None},
}


class NotebookFailed(RuntimeError):
    """A cell failed or the kernel died; the partial notebook holds what ran, with the traceback."""


def notebooks() -> list[Path]:
    """The project's notebooks, in order."""
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def pages() -> list[Path]:
    """The README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def find(name: str) -> Path:
    """A notebook by path, file name, or the number it starts with."""
    path = Path(name)
    if path.exists():
        return path
    known = {p.stem: p for p in notebooks()}
    match = [p for stem, p in known.items() if stem == path.stem or stem.startswith(f"{name}_")]
    return match[0] if match else known[choose("notebook", name, known)]


def parse(text: str) -> Any:
    """JSON, a Python literal, or arithmetic on numbers such as 8/255."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)

    def value(node) -> Any:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.Mult):
            a, b = value(node.left), value(node.right)
            if not (isinstance(a, int | float) and isinstance(b, int | float)):
                raise ValueError
            return a / b if isinstance(node.op, ast.Div) else a * b
        return ast.literal_eval(node)

    try:
        ast.parse(f"({text.strip()})", mode="eval")  # no comment at its end: 0.1#2 is no number
        return value(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return text


def from_file(path: Path) -> dict[str, Any]:
    """The parameters of a YAML file, as papermill's -f takes it. Raises ValueError if it is no mapping of names."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no parameters: lines of the form 'name: value' are needed")
    return values


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook. Raises ValueError, with the path, for a file that is none or cannot be read."""
    try:
        nb = nbformat.convert(nbformat.reader.reads(Path(path).read_text(encoding="utf-8")), 4)
        nbformat.validate(nb)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except Exception as error:  # of many kinds: what is not JSON, has no cells or is of an unknown version
        raise ValueError(f"{path} is not a notebook: {(str(error) or repr(error)).splitlines()[0]}") from error
    return nb


def _parameters(source: str) -> dict[str, tuple[str, str]]:
    """{name: (annotation or "", default)} of the assignments in a cell, as text; magics are left out.

    Raises ValueError for a cell that is no Python.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError:
        body = ast.parse(re.sub(r"(?m)^[ \t]*([\w., ]+=[ \t]*)?[%!?].*$|^.*\?[ \t]*$", "", source)).body
    out = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            out[ast.unparse(node.target)] = ast.unparse(node.annotation), ast.unparse(node.value)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                out[ast.unparse(target)] = "", ast.unparse(node.value)
    return out


def _type(annotation: str, default: str) -> Any:
    """The type of a parameter from its annotation, or else from its default; Any if neither tells."""
    with contextlib.suppress(Exception):  # an annotation may be any expression
        if annotation and isinstance(kind := eval(annotation, {"__builtins__": {}}, TYPES), str):
            kind = eval(kind, {"__builtins__": {}}, TYPES)  # in quotes
        if annotation:
            TypeAdapter(kind)
            return kind
    value = parse(default)
    return Any if value is None or value == default else type(value)  # what is not read is an expression


def typed(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in the types that the notebook's parameters cell states; text is read as a value of that type.

    Values are what papermill can write: a list stands for a tuple, text for a path.
    Raises ValueError for a notebook without such a cell, an unknown name, or a value of another type.
    """
    tagged = [c for c in read(path).cells if "parameters" in c.metadata.get("tags", [])]
    if not tagged:
        raise ValueError(f"{path.name} has no cell tagged 'parameters'")
    try:
        known = _parameters(tagged[0].source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the parameters cell of {path.name} is not Python: {error}") from error
    out = {}
    for name, raw in given.items():
        spec = known[choose(f"parameter of {path.name}", name, known)]
        kind = _type(*spec)
        adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
        for value in (parse(raw), raw) if isinstance(raw, str) and kind is not str else (raw,):
            with contextlib.suppress(ValueError, TypeError):  # as JSON: where a list is a tuple, and text a path
                text = json.dumps(as_json(value), allow_nan=False, default=os.fspath)
                out[name] = adapter.dump_python(adapter.validate_json(text, strict=True), mode="json")
                break
        else:
            wanted = getattr(kind, "__name__", str(kind)) if not spec[0] else spec[0]
            raise ValueError(f"parameter {name}={raw} of {path.name}: {wanted} is needed, as in {spec[1]}")
        if name == "seeds" and isinstance(out[name], int) and out[name] < 1:
            raise ValueError(f"parameter seeds={raw} of {path.name}: a number of runs is needed, 1 or more")
    return out


@contextlib.contextmanager
def _kernel_environment() -> Iterator[None]:
    """Kernels draw figures into the notebook, and bars on the terminal, never into the notebook; without a terminal
    their progress reaches standard error as lines."""
    before, ended = dict(os.environ), threading.Event()

    def copy(lines: typing.TextIO) -> None:
        while not ended.wait(0.5) or lines.tell() < os.fstat(lines.fileno()).st_size:
            sys.stderr.write(lines.read())
            sys.stderr.flush()

    with tempfile.NamedTemporaryFile("r") as lines:
        os.environ.pop("MPLBACKEND", None)
        os.environ.setdefault("CFOL_NB_PROGRESS", os.ttyname(2) if sys.stderr.isatty() else lines.name)
        copier = threading.Thread(target=copy, args=(lines,))
        copier.start()
        try:
            yield
        finally:
            ended.set()
            copier.join()
            os.environ.clear()
            os.environ.update(before)


def _placeless(text: str) -> str:
    """Text without the machine's paths: "/lib/x.py:3: UserWarning: y" is "x.py:3: UserWarning: y", and what lies under
    the checkout, the working directory, the home, the temporary folder or Python's folders is named from there on."""
    text = re.sub(r"^(?:/|[A-Z]:\\)(?:[^\n:]*[/\\])?([^\n:/\\]+:\d+: )", r"\1", text, flags=re.M)
    places = [ROOT, Path.cwd(), Path.home(), tempfile.gettempdir(), sys.prefix, sys.base_prefix]
    places += [*site.getsitepackages(), site.getusersitepackages(), *sysconfig.get_paths().values()]
    known = {str(p) for place in map(Path, places) for p in (place, place.resolve()) if p != p.parent}
    longest_first = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    return re.sub(rf"(?<![\w.~/\\-])(?:{longest_first})(?:[/\\]|(?![\w.-]))", "", text)


def _tidied(cell: nbformat.NotebookNode, **_) -> None:
    """Join the pieces of a cell's streams, stdout before stderr, and show them as a terminal does: what a carriage
    return goes back over is gone. nbclient's own way (`coalesce_streams`) takes the square of a line's length.
    """
    texts, outputs = {}, []
    for output in cell.outputs:
        name = output.get("name") if output.output_type == "stream" else None
        if name is None or name not in texts:
            outputs.append(output)
        if name is not None:
            texts.setdefault(name, []).append(output.text)
    for output in outputs:
        if output.output_type == "stream":
            text = re.sub(r"^.*\r(?=[^\n])", "", "".join(texts[output.name]), flags=re.M)
            output.text = _placeless(text) if output.name == "stderr" else text
    for i, (a, b) in enumerate(pairwise(outputs)):
        if (a.get("name"), b.get("name")) == ("stderr", "stdout"):
            outputs[i : i + 2] = b, a
    cell.outputs = outputs


def run(source: Path, target: Path | None = None, parameters: Mapping[str, Any] | None = None) -> Path:
    """Execute a notebook into `target` (by default runs/notebooks/) and return where it lies.

    Raises ValueError for bad parameters before a kernel starts, NotebookFailed when a cell fails or the kernel dies.
    """
    source = Path(source)
    parameters = typed(source, parameters or {})
    target = Path(target) if target else runs_dir() / "notebooks" / source.name
    if target.exists() and target.samefile(source):
        raise ValueError(f"{source} would overwrite itself: give another target")
    part = target.with_name(f"{target.stem}.partial.ipynb")
    part.parent.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.KernelManager.transport_encryption = "auto"
    config.NotebookClient.shutdown_kernel = "immediate"
    config.NotebookClient.extra_arguments = ["--log-level=CRITICAL"]  # a kernel that is stopped logs a ZMQError
    try:
        with _kernel_environment():
            nb = papermill.execute_notebook(
                str(source),
                str(part),
                parameters=parameters,
                kernel_name="python3",
                language="python",
                cwd=os.getcwd(),
                progress_bar=False,
                autosave_cell_every=30,
                on_cell_executed=_tidied,
                config=config,
            )
    except KeyboardInterrupt as stop:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # nbclient leaves a task whose exception nobody reads
        raise KeyboardInterrupt(f"{source.name} was {str(stop) or 'stopped'} (what ran: {part})") from stop
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1][:300]
        raise NotebookFailed(f"{source.name} stopped: {reason} (what ran, and the traceback: {part})") from error
    if skipped := [
        i for i, c in enumerate(nb.cells) if c.cell_type == "code" and c.source.strip() and c.execution_count is None
    ]:
        raise NotebookFailed(f"{source.name} stopped: cells {skipped} never ran (what ran: {part})")
    os.replace(part, target)
    return target


def expected(names: Iterable[str]) -> str:
    """How long notebooks take with their defaults and nothing stored, in words; empty where one was not measured."""
    path = ROOT / "results" / "notebooks" / "seconds.json"
    took = read_json(path) if path.exists() else {"seconds": {}}
    if not took["seconds"].keys() >= set(names):
        return ""
    total = sum(took["seconds"][name] for name in names)
    time = f"{total:.0f} s" if total < 120 else f"{total / 60:.0f} minutes"
    return f"about {time} on {took['threads']} free cores of {took['device']}, less where runs are stored"


def headlines(path: Path) -> list[str]:
    """Texts that the cells tagged 'headline' of an executed notebook printed or showed."""
    out = []
    for cell in nbformat.read(path, 4).cells:
        if "headline" in cell.metadata.get("tags", []):
            out += [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return [text for text in out if text]


def shared(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """What an executed notebook gives to README and docs/: texts that it prints between <!-- name --> and
    <!-- /name -->, by name, with these marks; and figures of cells that end with '# docs/NAME.png', by that path."""
    texts, pictures = {}, {}
    for cell in nbformat.read(path, 4).cells:
        for output in cell.get("outputs", ()):
            found = re.finditer(r"<!-- (\w+) -->.*?<!-- /\1 -->", output.get("text", ""), re.S)
            texts |= {m[1]: m[0] for m in found}
            if (named := re.search(r"# (docs/\w+\.png)$", cell.source)) and "image/png" in output.get("data", {}):
                pictures[named[1]] = base64.b64decode(output["data"]["image/png"])
    return texts, pictures


def store(source: Path) -> None:
    """Run a notebook with its defaults and keep the result, cleaned of times, as the stored run in `notebooks/`.

    What it gives to the README and the pages of docs/ is renewed there.
    """
    executed = nbformat.read(run(source), 4)
    for cell in executed.cells:
        for key in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(key, None)
    executed.metadata.pop("papermill", None)
    executed.metadata.pop("widgets", None)
    with replacing(source) as part:
        nbformat.write(executed, part)
    texts, pictures = shared(source)
    for page in pages():
        text = old = page.read_text()
        for name, block in texts.items():
            text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.S)
        if text != old:
            with replacing(page) as part:
                part.write_text(text)
    for name, picture in pictures.items():
        with replacing(ROOT / name) as part:
            part.write_bytes(picture)


# what a browser holds to, whatever the page says: no script, and nothing from elsewhere
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ddd; padding: 1rem 0 } h1, h2 { font-weight: 600 } h2 { margin: 0 }
img { max-width: 100%; max-height: 22rem } a { color: #c0392b; text-decoration: none }
</style>"""


def _write_page(path: Path, title: str, style: str, body: str, kind: str = "") -> None:
    """A page of HTML that is safe to open whatever `title` and `body` hold. kind: attributes of the body."""
    import nh3

    def kept(tag: str, name: str, value: str) -> str | None:
        """Pictures lie in the page, and nothing else is data."""
        if name == "src":
            safe = re.match(r"data:image/(png|jpeg);base64,[\w+/=\s]*$", value)
        elif name == "style":
            safe = not re.search(r"url|\\", value, re.I)
        else:
            safe = not re.sub(r"[\x00-\x20]", "", value).lower().startswith("data:")
        return value if safe else None

    body = nh3.clean(
        body,
        tags=nh3.ALLOWED_TAGS | {"main", "section"},
        attributes={**nh3.ALLOWED_ATTRIBUTES, "*": {"class", "id", "style", "data-mime-type"}},
        attribute_filter=kept,
        filter_style_properties={"color", "background-color", "text-align", "font-weight"},
        url_schemes={"http", "https", "mailto", "data"},
        link_rel=None,
    )
    with replacing(path) as part:
        part.write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f'<meta name="viewport" content="width=device-width">{style}</head><body{kind}>{body}</body></html>\n',
            encoding="utf-8",
        )


def report(out: Path) -> Path:
    """Write the executed notebooks as one small site that needs no network: a page each, and index.html, returned.

    A notebook is taken as it was last run (runs/notebooks/), else as it is stored. The pages hold no script and load
    nothing, whatever the notebooks hold: figures are PNG or JPEG, formulas stay TeX.
    """
    from nbconvert import HTMLExporter
    from nbconvert.filters import markdown2html

    shown = ["text/html", "text/markdown", "text/latex", "image/png", "image/jpeg", "text/plain"]
    exporter = HTMLExporter(config=Config(NbConvertBase={"display_data_priority": shown}))
    sections = []
    for source in notebooks():
        last = runs_dir() / "notebooks" / source.name
        nb = nbformat.read(last if last.exists() else source, 4)
        title, _, first = (nb.cells[0].source if nb.cells else source.stem).strip().partition("\n")
        title = title.lstrip("# ")
        head, _, body = exporter.from_notebook_node(nb)[0].partition("<body")
        style = "".join(re.findall(r"<style.*?</style>", head, re.S))
        # wide tables scroll; broken lines could not be read
        style += "<style>.jp-RenderedText pre { white-space: pre; overflow-x: auto }</style>"
        body = f'<p><a href="index.html">cfol-nb</a></p>{body.partition(">")[2]}'
        kind = ' class="jp-Notebook" data-jp-theme-light="true" data-jp-theme-name="JupyterLab Light"'
        _write_page(out / f"{source.stem}.html", title, style, body, kind)
        images = (
            o.data["image/png"] for c in nb.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})
        )
        picture = next((f'<img alt="" src="data:image/png;base64,{escape(i.strip())}">' for i in images), "")
        text = markdown2html(first.strip().partition("\n\n")[0])
        link = f'<a href="{source.stem}.html">{escape(title)}</a>'
        sections.append(f"<section><h2>{link}</h2>{text}{picture}</section>\n")
    head = "<h1>cfol-nb</h1><p>How robust is the worst class of a classifier, and can it be better?</p>"
    _write_page(out / "index.html", "cfol-nb", _STYLE, head + "".join(sections))
    return out / "index.html"

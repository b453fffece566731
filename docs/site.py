"""Pages of the site that are made from the project: the README, notebooks, methods, settings, API reference."""

import inspect
import pkgutil
import re
import sys

import nbformat
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

import cfol_nb
from cfol_nb import cli, headless
from cfol_nb.config import keywords
from cfol_nb.files import ROOT
from cfol_nb.methods import GIVEN, METHODS
from cfol_nb.stats import stated
from cfol_nb.suite import listing, published

ORDER = ("results", "running", "audit", "intervals", "protocol", "fast", "scaling", "speed")  # then what else there is
_made: dict[str, str | bytes] = {}


def _table(columns: list[str], rows: list[tuple[str, ...]]) -> str:
    cells = [[c if c[:1] == "`" else c.replace("|", "\\|") for c in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _linked(text: str) -> str:
    """A page of the repository as the site has it: links to its pages, and where it has none the name alone; a list
    begins after an empty line."""
    text = re.sub(r"^(?!- |  |\s*$).*\n(?=- )", r"\g<0>\n", text, flags=re.M)
    text = re.sub(r"\]\((?:\.\./)?notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", text)
    text = re.sub(r"\]\((?:\.\./)?(CONTRIBUTING|CHANGELOG)\.md", lambda m: f"]({m[1].lower()}.md", text)
    text = re.sub(r"\]\((?:\.\./)?README\.md", "](index.md", text)
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)?(?:CITATION\.cff|results/[^)]*|src/[^)]*|LICENSE)\)", r"`\1`", text)


def _notebook(path) -> str:
    """An executed notebook as a page; its figures are pages' files."""
    nb = nbformat.read(path, 4)
    text, found = MarkdownExporter().from_notebook_node(nb)
    for name, data in found["outputs"].items():
        _made[f"notebooks/{path.stem}/{name}"] = data
        text = text.replace(f"]({name})", f"]({path.stem}/{name})")
    text = re.sub(r"<style scoped>.*?</style>", "", text, flags=re.S)
    text = re.sub(r"^<div>\n(.*?)^</div>", r'<div class="output">\n\1</div>', text, flags=re.S | re.M)
    links = re.sub(r"\]\((?:\.\./)?docs/", "](../", text)
    return re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", links)


def _results() -> dict[str, list[tuple[str, ...]]]:
    """Rows of published runs by the methods in them."""
    table, rows = listing(published()), {}
    keys = ["dataset", "network", "objective", "method", "variant", "size"]
    for key, part in table.groupby(keys, sort=True):
        outcomes = part["outcomes"].tolist()
        attack = "pgd20" if "pgd20" in outcomes[0].predictions else "clean"
        row = *stated({"": outcomes}, ["mean", "worst"], attack).iloc[0], attack, str(len(outcomes)), *key
        for name in part["run"].iloc[0].config.method["name"].split("+"):
            rows.setdefault(name, []).append(row)
    return rows


def _method(name: str, rows: list[tuple[str, ...]]) -> str:
    cls = METHODS[name]
    rule, *rest = (inspect.getdoc(cls) or "").split("\n\n")
    family = (inspect.getdoc(sys.modules[cls.__module__]) or "").split("\n\n")[0]
    options = [
        (f"`{k}`", f"`{inspect.formatannotation(p.annotation).replace('collections.abc.', '')}`", f"`{p.default!r}`")
        for k, p in keywords(cls).items()
        if k not in GIVEN
    ]
    first = f" -s method.{options[0][0].strip('`')}={options[0][2].strip('`')}" if options else ""
    columns = ["mean", "worst class", "attack", "runs", "data", "network", "objective", "method", "other", "size"]
    return "\n".join(
        [
            f"# {name}\n",
            f"{family}\n",
            f"## Rule\n\n{rule}\n",
            *(f"{text}\n" for text in rest),
            "## Options\n",
            _table(["option", "type", "default"], options) if options else "None.\n",
            f"    cfol-nb train --method {name}{first}\n",
            f"In Python: [`{cls.__module__}.{cls.__name__}`][]\n",
            "## Published runs\n",
            "Per cent with 95 % intervals, last weights. Settings that are not named are the defaults.\n" * bool(rows),
            _table(columns, rows) if rows else "None yet.\n",
        ]
    )


def _make() -> None:
    for path in headless.notebooks():
        _made[f"notebooks/{path.stem}.md"] = _notebook(path)
    for name in ("README", "CONTRIBUTING", "CHANGELOG"):
        _made[f"{name.lower()}.md".replace("readme", "index")] = (ROOT / f"{name}.md").read_text()
    rows = _results()
    for name in METHODS:
        _made[f"methods/{name}.md"] = _method(name, rows.get(name, []))
    rules = {name: inspect.getdoc(cls).split("\n\n")[0].replace("\n", " ") for name, cls in METHODS.items()}
    said = [(f"[{name}]({name}.md)", rule) for name, rule in rules.items()]
    _made["methods/index.md"] = f"# Methods\n\n{_table(['method', 'rule'], said)}"
    settings = [(f"`{name}`", f"`{kind}`", f"`{usual}`", text) for name, kind, usual, text in cli.settings()]
    _made["settings.md"] = (
        "# Settings\n\nWhat `RunConfig(...)` takes, and `-s NAME=VALUE` of the command line. The same in the terminal: "
        f"`cfol-nb list settings`.\n\n{_table(['setting', 'type', 'default', 'what it is'], settings)}"
    )
    modules = [m.name for m in pkgutil.walk_packages(cfol_nb.__path__, "cfol_nb.") if not m.name.endswith("__main__")]
    for name in modules:
        _made[f"reference/{name.removeprefix('cfol_nb.')}.md"] = f"# {name}\n\n::: {name}\n"
    names = [(f"`cfol_nb.{n}`", f"[`cfol_nb.{m}.{n}`][]") for n, m in sorted(cfol_nb._NAMES.items())]
    _made["reference/index.md"] = (
        "# Reference\n\n`import cfol_nb` offers these names. They are imported when they are first asked for.\n\n"
        f"{_table(['name', 'is'], names)}\nEverything else is in the modules; what begins with `_` may change.\n"
    )


def on_config(config):
    _made.clear()
    _make()
    own = {path.stem for path in (ROOT / "docs").glob("*.md")}
    pages = [name for name in (*ORDER, *sorted(own - {*ORDER})) if name in own]

    def under(part: str) -> list[str]:
        return sorted((u for u in _made if re.fullmatch(rf"{part}/[^/]+\.md", u)), key=lambda u: ("index" not in u, u))

    config.nav = [
        {"Start": ["index.md", *(f"{name}.md" for name in pages), "contributing.md", "changelog.md"]},
        *({part.title(): under(part)} for part in ("notebooks", "methods", "reference")),
        {"Settings": "settings.md"},
    ]
    return config


def on_files(files, config):
    for uri, content in _made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown, page, **_):
    return _linked(markdown) if "/" not in page.file.src_uri else markdown

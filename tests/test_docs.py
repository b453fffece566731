"""The documentation: every public name is explained, commands are right, and the site opens without a network."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer

import cfol_nb
from cfol_nb import cli, headless
from cfol_nb.files import ROOT
from cfol_nb.methods import METHODS

MODULES = [m.name for m in pkgutil.walk_packages(cfol_nb.__path__, "cfol_nb.") if not m.name.endswith("__main__")]


def public(module):
    """name -> object: the functions and classes that a module defines, and the methods and properties of the latter."""
    for name, value in vars(module).items():
        if name[0] == "_" or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield name, vars(value)
            for inner, member in vars(value).items():
                if inner[0] != "_" and isinstance(member, classmethod | staticmethod | property | type(public)):
                    yield f"{name}.{inner}", getattr(value, inner)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    bare = [n for n, v in public(module) if not (v.get("__doc__") if hasattr(v, "get") else inspect.getdoc(v))]
    assert not bare


def commands():
    """Every `cfol-nb ...` that stands on a line of its own, or between backticks and has an option."""
    for page in [*headless.pages(), ROOT / "CONTRIBUTING.md"]:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(
            r"^    (?:\w+=\w+ )?(?:\.venv/bin/)?cfol-nb (.+)$|`cfol-nb ([a-z][^`]+ -[^`]+)`", text, re.M
        ):
            yield pytest.param("".join(line).split("   #")[0], id=f"{page.name}: {''.join(line)[:60]}")


@pytest.mark.parametrize("line", [*commands()])
def test_commands_of_the_pages_are_as_the_command_line_takes_them(line):
    name, *words = shlex.split(line)
    command = typer.main.get_command(cli.app).commands[name]
    if "--help" not in words:
        given = command.make_context(name, words).params
        for key in ("parameters", "file"):
            if name == "run" and given[key] and given["names"]:
                values = cli._pairs(given[key]) if key == "parameters" else headless.from_file(ROOT / given[key])
                assert headless.typed(headless.find(given["names"][0]), values)
        if "settings" in given:
            cli._settings(given["dataset"], given["settings"], given["preset"])


def test_a_site_without_its_extra_is_one_sentence(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / ".installed").touch()
    done = subprocess.run(["make", "-s", "docs", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    (line,) = done.stdout.splitlines()
    assert line.startswith("the site needs the extra docs: ")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, where its generator is installed."""
    if not all(map(importlib.util.find_spec, ("material", "mkdocstrings"))):
        pytest.skip("the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(folder)]  # strict: a dead link is an error
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_a_page_for_everything(site):
    for folder, names in (
        ("methods", METHODS),
        ("notebooks", [path.stem for path in headless.notebooks()]),
        ("reference", [name.removeprefix("cfol_nb.") for name in MODULES]),
    ):
        assert {path.stem for path in (site / folder).glob("*.html")} - {"index"} == {*names}
    for name in MODULES:
        page = (site / "reference" / f"{name.removeprefix('cfol_nb.')}.html").read_text()
        for inner, value in public(importlib.import_module(name)):
            inherits = "." in inner and not value.__doc__
            assert inherits or f'id="{name}.{inner}"' in page, inner
    settings = (site / "settings.html").read_text()
    assert all(f"<code>{name}</code>" in settings for name, *_ in cli.settings())
    cfol = (site / "methods/cfol.html").read_text()
    assert all(f"<code>{name}</code>" in cfol for name in ("gamma", "drift", "40.0", "float | None"))


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"<(?:script|img|iframe|link)[^>]*?(?:src|href)=[\"']?(?:https?:)?//", text), path.name
        assert not re.search(r"@import|url\((?:https?:)?//", text)
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no browser to search with")
    found = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *("--virtual-time-budget=8000", "--dump-dom", f"file://{site}/index.html?q=drift"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert re.search(r"\d+ matching documents", found)

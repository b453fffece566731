import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from cfol_nb import headless
from cfol_nb.config import RunConfig
from cfol_nb.files import ROOT, read_json
from cfol_nb.headless import NotebookFailed, notebooks, parse, run, typed
from cfol_nb.train import check

SHARED = os.environ.get("CFOL_NB_RUNS")  # `make test` gives the runs of a test session one store


def code(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_the_stored_run_is_whole_and_the_notebook_thin(path):
    cells = code(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    lines = [len(c.source.splitlines()) for c in cells]
    assert max(lines) <= 20
    assert statistics.median(lines) <= 4
    for c in cells:
        assert not re.search(r"^\s*(def|class|if|try|while) ", c.source, re.M), c.source
        assert set(c.metadata.get("tags", [])) <= {"parameters", "headline", "nbval-ignore-output"}
        for o in c.outputs:
            assert o.output_type != "error"
            assert o.get("name") != "stderr"
            assert "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
            text = json.dumps({k: v for k, v in o.get("data", {}).items() if k != "image/png"}) + o.get("text", "")
            assert not re.search(r"(?<![\w.])/(root|home|tmp|work|usr|opt)/", text), text
        drawn = any("image/png" in o.get("data", {}) for o in c.outputs)
        assert drawn or not re.search(r"^fig = plots\.", c.source, re.M), c.source
    assert sum(bool(c.outputs) for c in cells) >= 5  # something is compared


def nbval(path, store):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", str(path)],
        cwd=path.parent,
        env={**os.environ, "CFOL_NB_RUNS": store},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_nbval_passes_the_stored_run_and_turns_red_when_one_number_moves(tmp_path):
    store = SHARED or str(tmp_path / "runs")
    copy = tmp_path / "copy.ipynb"
    shutil.copy(ROOT / "notebooks/00_quickstart.ipynb", copy)
    right = nbval(copy, store)
    assert right.returncode == 0, right.stdout
    nb = nbformat.read(copy, 4)
    output = next(o for c in nb.cells if c.cell_type == "code" for o in c.outputs if "text/plain" in o.get("data", {}))
    text = output.data["text/plain"]
    number = re.search(r"0\.\d+", text)
    moved = f"{float(number[0]) + 0.001:.3f}"
    output.data["text/plain"] = text[: number.start()] + moved + text[number.end() :]
    nbformat.write(nb, copy)
    wrong = nbval(copy, store)
    assert wrong.returncode == 1, wrong.stdout
    assert "1 failed" in wrong.stdout


# -- the headless runner, on a notebook of its own ---------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path):
    def make(
        *cells,
        parameters="n: int = 3  # how many\neps: float = 8 / 255\nname: str = 'a'\nlarge: bool = False\n"
        "sizes: list[int] = [1]\nlimit: int | None = None\nsettings: dict = {}",
    ):
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "gone", "display_name": "gone"}})
        nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []
        nb.cells += [nbformat.v4.new_code_cell(c, metadata={"tags": ["headline"]}) for c in cells]
        nbformat.write(nb, tmp_path / "toy.ipynb")
        return tmp_path / "toy.ipynb"

    return make


def test_values_are_read_in_the_type_that_the_notebook_states(toy):
    given = {
        "n": "5",
        "eps": "4/255",
        "name": "5",
        "large": "true",
        "sizes": "[1, 2]",
        "limit": "7",
        "settings": '{"a": 1}',
    }
    assert typed(toy(), given) == {
        "n": 5,
        "eps": 4 / 255,
        "name": "5",
        "large": True,
        "sizes": [1, 2],
        "limit": 7,
        "settings": {"a": 1},
    }
    assert typed(toy(), {"limit": "null", "eps": "1"}) == {"limit": None, "eps": 1.0}
    assert [parse(t) for t in ("3e-3", "2*8/255", "'x'", "x y", "1/0", "__import__('os')")] == [
        0.003,
        16 / 255,
        "x",
        "x y",
        "1/0",
        "__import__('os')",
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"epsilon": "1"}, "unknown parameter of toy.ipynb 'epsilon'; did you mean 'eps'"),
        ({"n": "2.5"}, "int is needed, as in 3"),
        ({"n": "many"}, "int is needed"),
        ({"eps": "big"}, "float is needed"),
        ({"large": "3"}, "bool is needed"),
        ({"sizes": '["a"]'}, "list"),
        ({"settings": "[1]"}, "dict is needed"),
        ({"n": True}, "int is needed"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused_before_a_kernel_starts(toy, monkeypatch, given, says):
    monkeypatch.setattr(headless.papermill, "execute_notebook", lambda *a, **k: pytest.fail("a kernel was started"))
    with pytest.raises(ValueError, match=re.escape(says)):
        run(toy(), parameters=given)
    with pytest.raises(ValueError, match="no cell tagged"):
        run(toy(parameters=""), parameters=given)


@pytest.mark.slow
def test_a_finished_notebook_appears_whole_and_in_the_callers_folder(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    source = toy(f"import os\nprint(n, eps, os.getcwd() == {str(tmp_path)!r}, os.environ.get('MPLBACKEND') == 'agg')")
    before = source.read_bytes()
    out = run(source, parameters={"n": "5"})
    assert out == tmp_path / "runs/notebooks/toy.ipynb"
    assert headless.headlines(out) == [f"5 {8 / 255} True False\n"]
    assert source.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["toy.ipynb"]
    with pytest.raises(ValueError, match="overwrite itself"):
        run(source, source)


def test_how_long_notebooks_take_is_said_where_it_was_measured():
    kept = read_json(ROOT / "results/notebooks/seconds.json")["seconds"]
    said = headless.expected(["00_quickstart", "05_convergence"])
    assert said.startswith(f"about {kept['00_quickstart'] + kept['05_convergence']:.0f} s on ")
    assert headless.expected(kept).startswith(f"about {sum(kept.values()) / 60:.0f} minutes on ")
    assert headless.expected(["toy"]) == ""


@pytest.mark.slow
def test_without_a_terminal_a_kernels_progress_reaches_standard_error(toy, monkeypatch, capfd):
    monkeypatch.delenv("CFOL_NB_PROGRESS")
    source = toy(
        "import time\nfrom cfol_nb import files\nfiles.MINUTE = 0.1\nwith files.bar(4, 'runs') as progress:\n"
        "    for _ in range(4):\n        time.sleep(0.1)\n        progress.update(1)"
    )
    out = run(source)
    assert re.search(r"^runs: \d+ % done after 00:0\d, 00:0\d left$", capfd.readouterr().err, re.M)
    assert all(not cell.outputs for cell in nbformat.read(out, 4).cells)
    assert "CFOL_NB_PROGRESS" not in os.environ


@pytest.mark.slow
def test_storing_a_notebook_renews_what_the_readme_shows_of_it(toy, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "before <!-- sum --> old <!-- /sum --> after <!-- other --> kept <!-- /other -->"
    )
    (tmp_path / "docs/page.md").write_text("a <!-- sum -->x<!-- /sum --> b")
    monkeypatch.setattr(headless, "ROOT", tmp_path)
    source = toy(
        "print('<!-- sum -->', 1 + 2, '<!-- /sum --> and <!-- nowhere --> x <!-- /nowhere -->')",
        "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()  # docs/empty.png",
    )
    headless.store(source)
    text = "before <!-- sum --> 3 <!-- /sum --> after <!-- other --> kept <!-- /other -->"
    assert (tmp_path / "README.md").read_text() == text
    assert (tmp_path / "docs/page.md").read_text() == "a <!-- sum --> 3 <!-- /sum --> b"
    assert headless.shared(source)[1].keys() == {"docs/empty.png"}
    assert (tmp_path / "docs/empty.png").read_bytes().startswith(b"\x89PNG")


SETTING = "from cfol_nb.config import RunConfig; RunConfig(epoch=3)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "says"),
    [("1 / 0", "ZeroDivisionError"), ("import os; os._exit(3)", "died"), (SETTING, "epoch: there is no such setting")],
)
def test_failing_cells_and_dead_kernels_leave_the_partial_notebook(toy, tmp_path, cell, says):
    out = tmp_path / "out/toy.ipynb"
    out.parent.mkdir()
    out.write_text("an earlier result")
    with pytest.raises(NotebookFailed, match=says):
        run(toy("print('first')", cell, "print('never')"), out)
    assert out.read_text() == "an earlier result"
    partial = (tmp_path / "out/toy.partial.ipynb").read_text()
    assert "first" in partial
    assert "ZeroDivisionError" in partial or says != "ZeroDivisionError"


def cell_with(*pieces):
    """A cell whose streams came in these pieces, (name, text) each; one without a name is a table."""
    new = nbformat.v4.new_output
    tables = {"data": {"text/html": "t"}}
    outputs = [new("stream", name=n, text=t) if n else new("display_data", **tables) for n, t in pieces]
    return nbformat.v4.new_code_cell("", outputs=outputs)


def test_streams_are_joined_and_shown_as_a_terminal_does():
    pieces = [("stderr", "e"), ("stdout", "1 %\r2"), (None, ""), ("stdout", " %\r100 %\r\nnext\r"), ("stderr", "\nf")]
    cell = cell_with(*pieces)
    headless._tidied(cell)
    assert [o.get("text", "t") for o in cell.outputs] == ["100 %\r\nnext\r", "e\nf", "t"]


@pytest.mark.parametrize("piece", ["x", "\r", "/", "a\r", "/usr:1", "/ x.py:1:"])
def test_time_of_one_long_line_is_in_proportion_to_its_length(piece):
    def seconds(length):
        cell = cell_with(*[("stderr", piece * (length // len(piece) // 4))] * 4)
        start = time.process_time()
        headless._tidied(cell)
        return time.process_time() - start

    seconds(10)
    least = min(seconds(400_000) for _ in range(3))
    assert seconds(4_000_000) < 50 * least + 0.5  # ten times the length; its square would be 100 times


@pytest.mark.slow
def test_warnings_of_executed_notebooks_hold_no_path_of_the_machine(toy, tmp_path):
    (tmp_path / "my lib").mkdir()
    (tmp_path / "my lib" / "helper.py").write_text("import warnings\ndef f():\n    warnings.warn('beware, /b:3: c')\n")
    source = toy(
        f"import sys; sys.path.insert(0, {str(tmp_path / 'my lib')!r}); import helper, warnings; helper.f()\n"
        "warnings.warn('here')\nimport torch; warnings.warn(f'see {torch.__file__}')",
        "import logging, os, pathlib; logging.warning(f'{pathlib.Path.home()}/x {os.getcwd()}')\nprint('x' * 400_000)",
    )
    first, second = code(run(source))[-2:]
    (text,) = (o.text for o in first.outputs)
    assert "helper.py:3: UserWarning: beware, /b:3: c\n" in text
    assert re.search(r"^\w+\.py:2: UserWarning: here$", text, re.M)
    assert "see torch/__init__.py" in text
    long, logged = (o.text for o in second.outputs)
    assert long == "x" * 400_000 + "\n"
    assert logged.startswith("WARNING:root:x ")
    for place in (tmp_path, Path.home(), ROOT, sys.prefix, "/tmp", "site-packages"):
        assert str(place) not in text + logged


def test_notebooks_are_found_by_number_name_or_path(toy):
    assert headless.find("00").name == headless.find("00_quickstart").name == "00_quickstart.ipynb"
    assert headless.find("notebooks/04_cfol.ipynb").stem == "04_cfol"
    assert headless.find(str(toy())) == toy()
    with pytest.raises(ValueError, match="did you mean '04_cfol'"):
        headless.find("04_cfoll")


PARAMETERS = sorted((ROOT / "notebooks/parameters").glob("*.yaml"))


@pytest.mark.parametrize("path", PARAMETERS, ids=lambda p: p.stem)
def test_parameter_files_fit_their_notebooks_and_their_runs_can_be_made(path):
    """Every value is of the type that the notebook states, and every configuration in it is one."""
    values = typed(headless.find(path.stem.split("_")[0]), headless.from_file(path))
    common = {**values["settings"], "dataset": values["dataset"]}
    for how in ({}, *values.get("networks", {}).values(), *values.get("optimisers", {}).values()):
        check(RunConfig(**{**common, **how}))
    for how in (values.get("tuning", {}), values.get("second", {})):
        check(RunConfig(**{**common, **how}, parent=RunConfig(**common)))
    for eps in values.get("radii", []):
        RunConfig(**{**common, "eps": eps})
    for name in ("matching", "moving"):
        if name in values:
            kind = "matched" if name == "matching" else "d_rand"
            check(RunConfig(**common, parent=RunConfig(**common), remake={"name": kind, **values[name]}))


def test_bad_parameter_files_are_refused_in_a_sentence(tmp_path, toy):
    bad = tmp_path / "bad.yaml"
    for text, says in (("[1, 2]", "holds no parameters"), ("a: [1", "is not YAML"), ("", "holds no parameters")):
        bad.write_text(text)
        with pytest.raises(ValueError, match=says):
            headless.from_file(bad)
    bad.write_text("sed: 3")
    with pytest.raises(ValueError, match="did you mean 'seeds'"):
        typed(headless.find("01"), headless.from_file(bad))

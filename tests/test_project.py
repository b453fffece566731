"""The command line, the README and the set-up files, as a user meets them."""

import html
import html.parser
import importlib
import importlib.metadata
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib

import nbformat
import pandas as pd
import pytest
import torch
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import cfol_nb
from cfol_nb import cli, files, headless
from cfol_nb.files import ROOT, read_json
from cfol_nb.stats import counts, headline, stated, summary
from cfol_nb.suite import listing, published

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in headless.pages()}
README, RESULTS = PAGES["README.md"], PAGES["docs/results.md"]
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_list_names_everything(command):
    from cfol_nb.data import SOURCES
    from cfol_nb.methods import METHODS
    from cfol_nb.models import MODELS

    status, out, _ = command("list")
    assert status == 0
    for name in (*SOURCES, *METHODS, *MODELS, "trades", "drift=40.0", "linf", "stored runs: 0"):
        assert name in out
    assert max(map(len, out.splitlines())) <= 80


def test_list_explains_every_setting(command):
    from cfol_nb.config import RunConfig

    status, out, _ = command("list", "settings")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    rows = {name: rest for name, *rest in cli.settings()}
    assert rows.keys() >= RunConfig.model_fields.keys()
    assert all(kind and usual and text for kind, usual, text in rows.values())
    assert all(re.search(rf"^  {re.escape(name)} ", out, re.M) for name in rows)
    assert rows["eps"][:2] == ["float", "0.15 for digits, else 8/255"]
    assert rows["optimizer"][:2] == ["sgd | adam", "sgd"]
    assert rows["train_limit"][:2] == ["int | None", "None"]
    assert rows["schedule.cycles"][:2] == ["int", "3"]
    assert rows["remake"][0] == "name or options | None"


COMMANDS = sorted(typer.main.get_command(cli.app).commands)


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)])
def test_every_command_explains_itself(command, words):
    status, out, _ = command(*words, "--help")
    assert status == 0
    assert "Usage" in out
    assert not words or f"cfol-nb {words[0]} " in out.split("Example")[1]


def test_the_package_offers_what_most_people_need():
    code = "import sys, cfol_nb; assert not [m for m in sys.modules if 'torch' in m or m.startswith('cfol_nb.')]"
    subprocess.run([sys.executable, "-c", code], check=True)
    names = "load RunConfig compute ClassSampler ExampleSampler pgd Outcomes summary class_table"
    assert {*names.split()} == {*cfol_nb.__all__} <= {*dir(cfol_nb)}
    for name in names.split():
        assert getattr(cfol_nb, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cfol_nb.nothing  # noqa: B018
    assert importlib.import_module("cfol_nb.audit").audit
    assert PROJECT["version"] == cfol_nb.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == cfol_nb.__version__
    assert f"## {cfol_nb.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_wide_tables_are_wrapped_and_nothing_is_hidden():
    table = pd.DataFrame({f"column {i}": ["50.0 [40.0, 60.0]"] for i in range(9)}, ["a method"])
    lines = cli._narrow(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(lines).count("50.0 [40.0, 60.0]") == 9


def test_without_a_terminal_progress_is_a_line_each_minute(monkeypatch, capfd):
    monkeypatch.setenv("CFOL_NB_PROGRESS", "")
    monkeypatch.setattr(files, "MINUTE", 0.2)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with files.bar(10, "runs") as progress:
        for _ in range(10):
            time.sleep(0.05)
            progress.update(1)
    lines = capfd.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    for line in lines:
        done, after, left = re.fullmatch(r"runs: (\d+) % done after (\d\d:\d\d), (\d\d:\d\d) left", line).groups()
        assert 30 <= int(done) <= 100
        assert after <= "00:02"
        assert left <= "00:02"


def test_train_prints_the_class_table(command):
    words = ["train", "--seeds", "2", "--method", "cfol", "--objective", "trades"]
    for s in ("epochs=1", "train_limit=24", "test_limit=6", "steps=2", "method.drift=3", "model.width=4", "eps=1/10"):
        words += ["-s", s]
    status, out, err = command(*words)
    assert status == 0, err
    assert out.count("n  correct  accuracy") == 2
    assert len(re.findall(r"\d+ of \d+ checks are fine", out)) == 2
    assert "robust worst" in out
    assert "images per second" in out
    assert "MiB at most" in out
    assert "digits-trades-cfol-s1-" in out


def test_publish_writes_stored_runs_that_can_be_read_again(command, tiny, tmp_path):
    from cfol_nb.runs import compute
    from cfol_nb.suite import published

    runs = compute([tiny(seed=0), tiny(seed=1)])
    status, out, _ = command("publish", "digits-at-*", "--results", str(tmp_path / "r"))
    assert status == 0
    assert len(out.splitlines()) == 2
    assert [r.config for r in published(tmp_path / "r")] == [
        r.config for r in sorted(runs, key=lambda r: r.folder.name)
    ]
    status, _, err = command("publish", "digits-at-erm-s7", "--results", str(tmp_path / "r"))
    assert status == 2
    assert "unknown stored run" in err


def test_publish_judges_each_run_in_its_own_ball(command, tiny, tmp_path):
    from cfol_nb.runs import compute
    from cfol_nb.suite import published

    compute([tiny(seed=0), tiny(seed=1), tiny(eps=0.05)])
    status, out, _ = command("publish", "digits-*", "digits-at-*", "--autoattack", "fast", "--results", str(tmp_path))
    assert status == 0
    assert sum(line.endswith(".json") for line in out.splitlines()) == 3  # each once
    assert len(re.findall(r"  autoattack: \d+ of \d+ checks are fine", out)) == 3
    for run in published(tmp_path):
        attack = run.outcomes["last"].attacks["autoattack"]
        assert attack["eps"] == run.config.eps
        assert attack["version"] == "fast"
        assert list(run.outcomes["last"].predictions)[-1] == "pgd20"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "--dataset", "cifar9"), "did you mean 'cifar"),
        (("train", "--method", "cfl"), "did you mean 'cfol'"),
        (("train", "--objective", "x"), "unknown objective 'x' (known: ard, at"),
        (("train", "-s", "eps=8"), "8/255"),
        (("train", "-s", "epoch=3"), "no such setting"),
        (("train", "-s", "epochs"), "name=value"),
        (("train", "-s", "epochs=x"), "epochs"),
        (("train", "-s", "method.eta=-1"), "eta=-1"),
        (("train", "-s", "epochs.x=1"), "takes no options"),
        (("train", "--dataset", "imagefolder:nowhere"), "no folder nowhere"),
        (("train", "--dataset", "stl10"), "fetch stl10"),
        (("run", "99"), "unknown notebook"),
        (("train", "-s", "seed=abc"), "seed"),
        (("train", "-s", "method.reset=0.5"), "reset=0.5 of method 'cfol': Sequence[float]"),
        (("train", "-s", "method.prior=[1, 2]"), "prior=[1, 2] of method"),
        (("train", "-s", "method.gamma=7"), "gamma=7"),
        (("train", "-s", "batch_size=5000"), "batch_size=5000 is larger"),
        (("suite", "digits", "--methods", "erm,cfl"), "did you mean 'cfol'"),
        (("suite", "digits", "-s", "objective=trades"), "use --methods"),
        (("run", "00", "-p", "seed=3"), "did you mean 'seeds'"),
        (("run", "-p", "seeds=x"), "int is needed"),
        (("run", "00", "-p", "seeds=0"), "seeds=0 of 00_quickstart.ipynb: a number of runs is needed, 1 or more"),
        (("list", "methosd"), "did you mean 'methods'"),
        (("run", "--store", "-p", "seeds=1"), "leave out -p"),
        (("fetch", "digits"), "unknown data set"),
        (("audit", "--model", "run:nosuch", "--data", "digits"), "no stored run 'nosuch'"),
        (("audit", "--model", "run:nosuch", "--data", "digits", "--eps", "abc"), "eps=abc: a number is needed"),
    ],
)
def test_mistakes_are_refused_in_one_sentence_on_stderr(command, words, says):
    status, _, err = command(*words)
    assert status in (1, 2)
    assert says in err
    assert err.count("\n") <= 2
    assert "Traceback" not in err


def test_settings_mean_what_they_say():
    assert cli._settings("digits", ["dataset=cifar10", "model.width=16"])["model"] == {
        "name": "preactresnet18",
        "width": 16,
    }
    assert cli._settings("digits", ["model=resnet18", "model.width=8"])["model"] == {"name": "resnet18", "width": 8}
    assert cli._settings("digits", ["imbalance.factor=10"])["imbalance"] == {"factor": 10}
    assert cli._settings("digits", ["method.drift=3"], method="cfol")["method"] == {"name": "cfol", "drift": 3}
    assert cli._settings("digits", ["ensembling.weight=9"])["ensembling"] == {"weight": 9}
    assert cli._settings("digits", ["eps=8/255"])["eps"] == 8 / 255


def test_interrupting_is_not_an_error_message(command, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cfol_nb.runs.compute", stop)
    status, _, err = command("train")
    assert status == 130
    assert "the same command goes on from there" in err
    assert "Traceback" not in err


TARGETS = """
import os, signal, sys, threading, time
def go(say, code):
    say("doing", "loading net.py:make", float("inf"))
    print("noise"); os.write(1, b"raw noise")
    exec(code)
    say("print", "found")
"""


@pytest.fixture
def watched(tmp_path, monkeypatch):
    (tmp_path / "targets.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(tmp_path)
    import targets

    return lambda code, until=math.inf: cli._watched(targets.go, code, until=until)


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        ("sys.exit(0)", RuntimeError, "loading net.py:make failed: SystemExit: 0"),
        ("os._exit(0)", RuntimeError, "loading net.py:make ended the process with exit code 0, before it was done"),
        ("os._exit(3)", RuntimeError, "exit code 3"),
        ("os.kill(os.getpid(), 9)", RuntimeError, "SIGKILL .was memory short"),
        ("import ctypes; ctypes.string_at(0)", RuntimeError, "SIGSEGV"),
        ("os.fork() or time.sleep(60); os._exit(0)", RuntimeError, "exit code 0"),
        ("os.closerange(3, 100); os._exit(0)", RuntimeError, "exit code 0"),
        ("raise KeyboardInterrupt", RuntimeError, "failed: KeyboardInterrupt$"),
        ("raise type('Own', (BaseException,), {})('a\\nb')", RuntimeError, "failed: Own: a b$"),
        ("raise ValueError('eps=8')", ValueError, "^eps=8$"),
        ("say('doing', 'waiting', time.monotonic() + 0.2); time.sleep(60)", TimeoutError, "waiting did not end within"),
        ("signal.signal(2, signal.SIG_IGN); say('doing', 'x', 0); time.sleep(60)", TimeoutError, "x did not end"),
    ],
)
def test_a_child_that_does_not_come_to_its_end_is_an_error_and_leaves_nothing(watched, capfd, code, kind, says):
    start = time.monotonic()
    with pytest.raises(kind, match=says):
        watched(code)
    assert time.monotonic() - start < 40
    out, err = capfd.readouterr()
    assert out == ""
    assert "noise" in err
    assert "Traceback" not in err


def test_a_child_that_disturbs_its_process_disturbs_no_other(watched, capfd, tmp_path):
    folder, handler = os.getcwd(), signal.getsignal(signal.SIGINT)
    code = "os.chdir('/'); signal.signal(2, signal.SIG_IGN); threading.Thread(target=time.sleep, args=(60,)).start()"
    start = time.monotonic()
    watched(code)
    assert time.monotonic() - start < 40  # the thread is not waited for
    out, err = capfd.readouterr()
    assert (out, err.count("noise")) == ("found\n", 2)
    assert (os.getcwd(), signal.getsignal(signal.SIGINT)) == (folder, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(tmp_path, number):
    (tmp_path / "targets.py").write_text(TARGETS)
    code = "say('print', str(os.getpid())); time.sleep(300)"
    script = f"import math, targets; from cfol_nb import cli; cli._watched(targets.go, {code!r}, until=math.inf)"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
    ) as parent:
        child = int(parent.stdout.readline())
        parent.send_signal(number)
        assert parent.wait(90) != 0
        for _ in range(400):
            if not alive(child):
                return
            time.sleep(0.1)
    pytest.fail("the child lives on")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_an_audit_whose_model_ends_the_process_is_an_error(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("import os\nos._exit(0)\n")
    status, out, err = command("audit", "--model", "net.py:make", "--data", "digits", "--limit", "2")
    assert status == 1
    assert out.startswith("20 images of 10 classes")
    says = "error: loading net.py:make ended the process with exit code 0, before it was done"
    assert re.fullmatch(rf"{re.escape(says)} \(traceback: .*\)\n", err), err
    assert not (tmp_path / "runs" / "audits").exists()


def test_two_projects_share_no_default_folder(tmp_path, monkeypatch):
    places = []
    for name, code in (("a", "x = 1"), ("b", "x = 1"), ("b", "x = 2")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "net.py").write_text(code)
        monkeypatch.chdir(tmp_path / name)
        places.append(cli._place("net.py:make"))
    assert len(set(places)) == 3
    assert cli._place("../b/net.py:make") == cli._place(f"{tmp_path}/b/net.py:make") == places[2]
    assert cli._place("imagefolder:../a") == f"imagefolder:{tmp_path}/a"
    assert cli._place("torchvision:resnet18") == "torchvision:resnet18"


def test_the_lock_is_versions_only_and_what_is_installed():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?:|file:|--|@ ", text)
    assert all(len(r.specifier) == 1 and next(iter(r.specifier)).operator == "==" for r in LOCK)
    for r in LOCK:
        if r.marker is None or r.marker.evaluate():
            assert r.specifier.contains(importlib.metadata.version(r.name)), r


def test_the_lock_satisfies_the_project():
    pinned = {}
    for r in LOCK:
        pinned.setdefault(re.sub(r"[-_.]+", "-", r.name).lower(), []).append(next(iter(r.specifier)).version)
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    for r in map(Requirement, wanted):
        assert all(r.specifier.contains(v) for v in pinned[r.name]), r
    assert Requirement(next(d for d in wanted if d.startswith("torch>"))).specifier.contains("2.11.0")


def test_environment_yml_is_python_pip_and_the_lock():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(env) == {"name", "channels", "dependencies"}
    plain = [d for d in env["dependencies"] if isinstance(d, str)]
    (pip,) = (d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert "pip" in plain
    (python,) = (d for d in plain if d.startswith("python"))
    assert SpecifierSet(python.split()[1]) == SpecifierSet(PROJECT["requires-python"])
    assert pip == ["-r requirements.lock", "-e ."]


BLOCKS = [
    pytest.param(name, code, id=f"{name} {i}")
    for name, text in PAGES.items()
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.S))
]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_code_of_the_readme_and_of_docs_runs(page, code, world, tmp_path, monkeypatch):
    """As it is printed, with a tiny network and data set."""
    monkeypatch.chdir(tmp_path)
    exec(code, world)
    if "sampler" in world:
        assert len([line for line in code.splitlines() if line and not line.startswith(("from", "import"))]) <= 11
        assert world["sampler"].p.sum().item() == pytest.approx(1)
        assert world["sampler"].w.max() > 0
        correct = (world["model"](world["images"]).argmax(1) == world["labels"]).double().mean()
        assert correct > 0.9
    if "audit.html" in code:
        assert (tmp_path / "audit.html").exists()


@pytest.fixture
def world():
    """What the pages' code takes as given."""
    from cfol_nb.outcomes import Outcomes

    labels = torch.arange(160) % 4
    torch.manual_seed(0)
    images = 0.2 * torch.rand(160, 3, 8, 8)
    images[torch.arange(160), 0, 2 * labels] = 0.9  # one row of pixels tells the class
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    runs = {}
    for i, name in enumerate(("outcomes", "a", "b", "c", "better", "plain")):
        wrong = (torch.rand(160, generator=torch.Generator().manual_seed(i)) < 0.1).long()
        runs[name] = Outcomes(
            labels.numpy(), {"clean": labels.numpy(), "pgd20": ((labels + wrong) % 4).numpy()}, [*"abcd"]
        )
    return {
        "labels": labels,
        "images": images,
        "epochs": 8,
        "dataset": torch.utils.data.TensorDataset(images, labels),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "names": tuple("abcd"),
        **runs,
    }


def test_results_tables_are_those_of_the_published_runs():
    shown = re.search(r"<!-- cifar10 -->\n(.*?)<!-- /cifar10 -->", RESULTS, re.S)[1]
    usual = listing(published()).query("dataset == 'cifar10' and objective == 'at' and variant == ''")
    usual = usual[usual["network"].eq("preactresnet18 16")].groupby(["size", "method"])["outcomes"].agg(list)
    lines, rest = shown.splitlines()[2:], " ".join(shown.split("minus ERM-AT")[1].split())
    small = "train_limit 1000, test_limit 300, epochs 12, dtype bfloat16"
    for at, (n, size) in enumerate((("45,000", "epochs 12, dtype bfloat16"), ("9,000", small))):
        of = {"ERM": usual[size, "erm"], "CFOL": usual[size, "cfol"]}
        for line, (name, group) in zip(lines[2 * at :], of.items(), strict=False):
            label, *cells = [x.strip() for x in line.strip("|").split("|")]
            assert label == f"{name}-AT, {n} images"
            known = ["pgd20", *(["autoattack"] if "autoattack" in group[0].predictions else [])]
            strong = [*stated({"": group}, ["mean", "worst"], known[1]).iloc[0]] if known[1:] else ["-", "-"]
            assert cells == [*headline({"": group}, "pgd20").iloc[0], *strong]
        said = []
        for attack in known:
            gain = 100 * summary(of["CFOL"], attack, versus=of["ERM"])
            kind = {"pgd20": "PGD-20", "autoattack": "AutoAttack"}[attack]
            worst, mean = (
                f"{g.value:+.1f} [{g.low:+.1f}, {g.high:+.1f}]" for g in (gain.loc["worst"], gain.loc["mean"])
            )
            said.append(f"under {kind} worst class {worst} points, mean {mean}")
        assert f"with {n} training images {'; '.join(said)}" in rest


def test_the_readme_opens_with_the_published_runs():
    """Counted here from the predictions: mean and worst class of the averaged weights under PGD-20."""
    shown = re.search(r"<!-- front -->\n(.*?)<!-- /front -->", README, re.S)[1]
    rows = {line.split("|")[1].strip().split(":")[0]: line for line in shown.splitlines() if line.startswith("| ")}
    values = {}
    for method in ("erm", "cfol"):
        (run,) = (
            r
            for r in published(name=f"cifar10-at-{method}-s0-*")
            if "ema" in r.outcomes and r.config.train_limit is None and r.config.model["width"] == 16
        )
        kept = run.outcomes["ema"]
        right = kept.predictions["pgd20"] == kept.labels
        classes = [100 * right[kept.labels == k].mean() for k in range(10)]
        values[method] = 100 * right.mean(), min(classes)
        cells = rows[method.upper()].split("|")[2:4]
        assert [float(cell.split()[0]) for cell in cells] == pytest.approx(values[method], abs=0.0501)
        if method == "erm":
            weakest = kept.class_names[classes.index(min(classes))]
            assert (
                f"{values['erm'][0]:.0f} % of attacked images, but on {values['erm'][1]:.0f} % of the {weakest}s"
                in shown
            )
    cells = rows["CFOL minus ERM, same images"].split("|")[2:4]
    gains = [a - b for a, b in zip(values["cfol"], values["erm"], strict=True)]
    assert [float(cell.split()[0]) for cell in cells] == pytest.approx(gains, abs=0.0501)


def test_the_readme_is_short():
    assert len(README.encode()) <= 9000


def test_pages_show_what_the_stored_notebooks_print_and_draw():
    texts, pictures = {}, {}
    for path in headless.notebooks():
        more, drawn = headless.shared(path)
        assert not texts.keys() & more.keys()
        assert not pictures.keys() & drawn.keys()
        texts, pictures = texts | more, pictures | drawn
    every = "".join(PAGES.values())
    assert sorted(texts) == sorted(re.findall(r"<!-- (\w+) -->", every.replace("<!-- name -->", "")))
    assert all(block in every for block in texts.values())
    assert pictures.keys() == {f"docs/{name}" for name in re.findall(r"\]\((?:docs/)?(\w+\.png)\)", every)}
    assert all((ROOT / name).read_bytes() == picture for name, picture in pictures.items())


def test_published_runs_are_whole_and_say_where_they_come_from():
    runs = published()
    assert runs
    for run in runs:
        kept = read_json(run.folder)
        assert run.provenance["commit"]
        assert run.provenance["dirty"] is False
        assert len(run.history) == run.config.epochs
        for which, correct in kept["correct"].items():
            for attack, numbers in correct.items():
                right, n = counts(run.outcomes[which], attack)
                assert right.tolist() == numbers
                assert n.tolist() == kept["n"]


def _anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_pages_name_what_exists(page):
    made = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    text = (ROOT / page).read_text()
    assert set(re.findall(r"(?:`|^    )make ([a-z]+)", text, re.M)) <= made
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        target = (ROOT / page).parent / place if place else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target.read_text()), link
    for name in re.findall(r"^\| `([a-z]+/(?:[a-z_]+/)?)` \|", text, re.M):
        assert (ROOT / name).is_dir(), name


def test_every_notebook_has_a_row_in_the_readme():
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert re.search(rf"^\| \[`{path.stem}`\]\(notebooks/{path.name}\) \|.+\|$", README, re.M), path.name


def test_the_report_is_a_page_for_every_notebook_and_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("CFOL_NB_RUNS", str(tmp_path / "runs"))  # none was run: the stored ones
    index = headless.report(tmp_path / "site")
    pages = {p.name: p.read_text() for p in index.parent.glob("*.html")}
    for path in headless.notebooks():
        title = nbformat.read(path, 4).cells[0].source.splitlines()[0].lstrip("# ")
        assert f'<a href="{path.stem}.html">{html.escape(title)}</a>' in pages["index.html"]
        assert "data:image/png;base64," in pages[f"{path.stem}.html"]
    for text in pages.values():
        assert not re.search(r'<script|(src|href)="(?!data:|#|[0-9a-z_]+\.html)', text.split("<body")[1])
        assert "<script" not in text
        assert "<link" not in text


RUN = "document.title='run'"  # stands for any script
HOSTILE = (
    f"<script>{RUN}</script>",
    f"</title></style></textarea></body></html><script>{RUN}</script>",
    f'<img src="http://e.test/i.png" srcset="//e.test/j.png 1x" onerror="{RUN}">',
    f'<a href="javascript:{RUN}">a</a> <javascript:{RUN}>',
    f"<a href='\x01java\nscript:{RUN}'>b</a> [c](javascript:{RUN})",
    f'<a href=" da\tta:text/html,<script>{RUN}</script>" ping="//e.test/">a</a> ![d](//e.test/k.png)',
    f'<iframe src="//e.test/"></iframe><iframe srcdoc="<script>{RUN}</script>"></iframe>',
    f'<svg onload="{RUN}"><script>{RUN}</script><image href="//e.test/"/></svg><object data="//evil.test/"></object>',
    '<meta http-equiv="refresh" content="0;url=//e.test/"><base href="//e.test/">',
    '<link rel="stylesheet" href="//e.test/a.css"><style>@import "//e.test/b.css"; p { color: red }</style>',
    '<p style="background-color: url(//e.test/); background: u\\72l(//e.test/)">a</p>',
    '<table background="//e.test/"><tr><td background="//e.test/">a</td></tr></table>',
    f'<video autoplay src="//e.test/"></video><form action="//e.test/"><input autofocus onfocus="{RUN}"></form>',
    f'<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror={RUN}&gt;">',
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>"></noscript><details open ontoggle="{RUN}">d</details>',
)


class Parts(html.parser.HTMLParser):
    """(tag, {attribute: value}) of everything in a page, as a browser reads the text."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


@pytest.mark.filterwarnings("ignore:.*(No lexer|not able to be represented)")
def test_the_report_is_safe_to_open_whatever_a_notebook_holds(tmp_path, monkeypatch):
    new, cells = nbformat.v4, []
    for text in HOSTILE:
        shown = [
            {kind: text}
            for kind in ("html", "markdown", "latex", "plain", "javascript", "vnd.mermaid", "x; y")
            for kind in ([f"text/{kind}"] if kind != "javascript" else ["application/javascript"])
        ]
        shown += [{"image/svg+xml": text}, {"image/png": f'AA">{text}'}, {"image/jpeg": f'AA">{text}'}]
        shown += [{"application/vnd.jupyter.widget-view+json": {"model_id": text}}]
        sized = {"image/png": {"width": f"1 onload={RUN}", "height": f'1" onload="{RUN}'}}
        cell = new.new_code_cell(text, metadata={"tags": [text.replace(",", ""), f'x" onclick="{RUN}']})
        cell.outputs = [new.new_output("display_data", data=data) for data in shown]
        cell.outputs += [new.new_output("display_data", data={"image/png": "AAAA"}, metadata=sized)]
        named = {"filenames": {"image/png": "//e.test/"}}
        cell.outputs += [new.new_output("display_data", data={"image/png": "AAAA"}, metadata=named)]
        cell.outputs += [new.new_output("stream", name=n, text=f"\x1b[31m{text}\x1b[0m") for n in ("stdout", "stderr")]
        cell.outputs += [new.new_output("error", ename=text, evalue=text, traceback=[text])]
        cells += [new.new_markdown_cell(f"words {text}"), new.new_markdown_cell(text), cell]
        cells += [new.new_raw_cell(text, metadata={"raw_mimetype": "text/html"})]
    first = new.new_markdown_cell(f'# A {HOSTILE[1]} " onload="{RUN}\n\nwords {" ".join(HOSTILE)}')
    state = {"state": {"a": f"</script>{HOSTILE[0]}"}, "version_major": 2, "version_minor": 0}
    notebook = new.new_notebook(cells=[first, *cells])
    notebook.metadata = {
        "title": HOSTILE[1],
        "language_info": {"name": HOSTILE[0], "pygments_lexer": f'"{HOSTILE[0]}'},
        "widgets": {"application/vnd.jupyter.widget-state+json": state},
    }
    nbformat.write(notebook, tmp_path / "99_hostile.ipynb")
    nbformat.write(new.new_notebook(), tmp_path / "98_empty.ipynb")
    monkeypatch.setattr(headless, "notebooks", lambda: sorted(tmp_path.glob("*.ipynb")))
    index = headless.report(tmp_path / "site")
    assert {p.name for p in index.parent.iterdir()} == {"index.html", "98_empty.html", "99_hostile.html"}
    for page in (p.read_text() for p in index.parent.iterdir()):
        assert "default-src 'none'" in page
        assert not re.search(r"@import|url\((?!data:)", page.split("<body")[0])
        for tag, has in Parts(page).tags:
            assert tag not in {"script", "iframe", "link", "svg", "math", "object", "embed", "base", "form", "video"}
            assert not [name for name in has if name.startswith("on") or name in ("srcset", "srcdoc", "background")]
            assert (has.get("src") or "data:image/").startswith("data:image/")
            assert "url" not in has.get("style", "")
            assert re.match(r"https?:|//|#|[0-9a-z_]+\.html$|$", has.get("href") or ""), has
            assert tag != "meta" or has.get("http-equiv") in (None, "Content-Security-Policy")


def test_make_help_and_the_python_check():
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert all(word in out.stdout for word in ("run", "test", "lab", "setup", "bench"))
    refused = subprocess.run(["make", "setup", "VENV=.no", "PYTHON=false"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode != 0

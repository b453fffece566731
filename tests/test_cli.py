"""Whatever goes wrong in a command is one sentence with the name or the path in it, and an exit code."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest

from cfol_nb.config import RunConfig, of_type, options
from cfol_nb.headless import parse, typed
from cfol_nb.suite import published


def one_sentence(err):
    return err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err and len(err) > 15


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("epochs=true", "epochs: .*True"),
        ("lr=true", "lr: .*True"),
        ("flip=1", "flip: .*got 1"),
        ("epochs=7.0", "epochs: .*7.0"),
        ('epochs="7"', "epochs: .*'7'"),
        ("epochs.=7", r"'epochs\.=7' is not of the form"),
        ("nonsense.=1", r"'nonsense\.=1'"),
        (".epochs=1", r"'\.epochs=1'"),
        ("=1", "'=1'"),
        ("nonsense=1", "nonsense: there is no such setting"),
        ("lr=0.1#2", "lr: .*'0.1#2'"),
        ("lr=1e999", "lr: .*inf"),
        ("lr=", "lr: .*''"),
        ("imbalance={1:2}", "imbalance: .*1: there is no such setting"),
        ("imbalance={True:2}", "imbalance: True is no name"),
        ("parent=3", "parent: .*got 3"),
        ("parent=[1]", "parent: .*got"),
        ('parent={"seed": "x"}', "parent: seed: .*'x'"),
        ("seed=99999999999999999999", "seed: .*99999999999999999999"),
        ("split_seed=18446744073709551616", "split_seed: .*18446744073709551616"),
        ("image_size=100000", "image_size: .*100000"),
        ("image_size=16", "image_size=16"),
        ("crop=100000", "crop=100000.*0 to 7"),
        ("without=3", "without: .*got 3"),
        ("attacks=3", "attacks: .*got 3"),
        ("method.eta=nan", "eta='nan' of method 'cfol'"),
        ("method.eta=NaN", "method: eta=nan"),
        ("method.eta=x", "eta='x' of method 'cfol': float"),
        ("method.gamma=true", "gamma=True of method"),
        ("method.reset=x", "reset='x' of method"),
        ("model.width=0", "'width': 0.*without weights"),
        ("model.width=1.5", "width=1.5 of model 'smallcnn': int"),
        ("model.width=1000000", "'width': 1000000.* GiB"),
        ("model.num_classes=4", "no option 'num_classes'"),
        ("model.mean=[1]", "no option 'mean'"),
        ("dataset=imagefolder:/dev/null", "/dev/null"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(command, tmp_path, setting, says):
    status, _, err = command("train", "-s", setting)
    assert status == 2
    assert one_sentence(err), err
    assert re.search(says, err), err
    assert not (tmp_path / "runs").exists()  # nothing was begun, and a refusal needs no log


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "-s", "method=3", "-s", "method.eta=1"], "method=3 has no options"),
        (["train", "-s", "imbalance=3", "-s", "imbalance.factor=1"], "imbalance=3 has no options"),
        (["train", "-s", "model=wrn", "-s", "model.depth=4"], "depth=4"),
        (["train", "-s", "parent={}", "-s", "remake=matched", "-s", "remake.steps=0"], "steps=0 of remake"),
        (["train", "--seeds", 10**9], "--seeds"),
        *(([*c, "--minutes", m], "--minutes") for c in (["suite", "digits"],) for m in ("nan", "inf", "-1", "x")),
        *((["audit", "--model", "m", "--data", "digits", "--minutes", m], "--minutes") for m in ("nan", "inf", "-1")),
        (["audit", "--model", "m", "--data", "digits", "--image-size", 100000], "--image-size"),
        (["audit", "--data", "digits"], "--model"),
        (["nosuch"], "nosuch"),
        (["train", "--nosuch"], "--nosuch"),
        (["run", "00", "-f", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["run", "00", "-f", "/dev"], "/dev: Is a directory"),
        (["run", "/dev"], "/dev: Is a directory"),
        (["run", "00", "-p", "seeds.=3"], "'seeds.=3' is not"),
        (["suite", "digits", "--methods", ""], "unknown method of the suite ''"),
    ],
)
def test_a_command_that_cannot_be_is_refused_by_name(command, words, says):
    status, _, err = command(*words)
    assert status == 2
    assert one_sentence(err), err
    assert says in err


def test_what_cannot_be_written_is_named_and_its_traceback_lies_in_a_log(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for words in (["suite", "digits", "--results", tmp_path / "file/x"], ["report", "--out", tmp_path / "file/x"]):
        status, _, err = command(*words)
        assert status == 1
        assert one_sentence(err), err
        assert f"{tmp_path / 'file/x'}: Not a directory" in err
        log = Path(re.search(r"\(traceback: (.*)\)", err)[1])
        assert log.parent == tmp_path / "runs/logs"
        assert "Traceback" in log.read_text()
        assert "NotADirectoryError" in log.read_text()
    monkeypatch.setenv("CFOL_NB_RUNS", str(tmp_path / "file"))  # no store, and no folder for logs
    status, _, err = command("train", "-s", "epochs=1")
    assert status == 1
    assert one_sentence(err), err
    log = Path(re.search(r"\(traceback: (.*)\)", err)[1])
    assert tmp_path / "file" not in log.parents
    assert str(tmp_path / "file") in err
    log.unlink()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), r"MemoryError: no reason given, in `cfol-nb fetch 'a b'`"),
        (KeyError("x"), r"KeyError: 'x', in `cfol-nb fetch 'a b'`"),
        (RuntimeError("one\ntwo:\n  three"), "RuntimeError: one; two: three, in `cfol-nb fetch"),
        (RuntimeError("long " * 9999), r"long \.\.\. \(traceback"),
        (OSError(28, "No space left on device", "/some/where"), "/some/where: No space left on device"),
        (RecursionError("deep"), "RecursionError: deep"),
    ],
)
def test_every_other_error_is_one_sentence_too(command, monkeypatch, error, says):
    exec("def fail(*_, **__):\n    raise error", names := {"error": error})  # as a library would
    monkeypatch.setattr("cfol_nb.data.load", names["fail"])
    monkeypatch.setattr("cfol_nb.config.choose", lambda *_: None)
    status, _, err = command("fetch", "a b")
    assert status == 1
    assert one_sentence(err), err
    assert len(err) < 2300
    assert re.search(says, err), err


def test_a_full_disk_names_the_file(command):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # no file may grow beyond
    try:
        status, _, err = command(
            "train", *(w for s in ("epochs=1", "train_limit=24", "test_limit=2") for w in ("-s", s))
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert one_sentence(err), err
    assert re.search(r"could not write \S+\.safetensors: File too large", err)


def test_the_log_of_a_run_that_failed_holds_its_own_traceback(command):
    status, _, err = command("train", "-s", "lr=1e9", "-s", "epochs=3", "-s", "train_limit=24", "-s", "test_limit=2")
    assert status == 1
    assert one_sentence(err), err
    assert re.search("1 of 1 runs failed: digits-at-cfol-s0-.*training diverged", err)
    assert "in _train" in Path(re.search(r"\(traceback: (.*)\)", err)[1]).read_text()


def test_numbers_of_numpy_are_taken_as_pythons():
    given = {"epochs": np.int64(3), "lr": np.float32(0.5), "flip": np.bool_(True), "without": np.array(["3"])}
    config = RunConfig(**given, method={"name": "cfol", "eta": np.float64(0.25), "reset": (np.float64(0.5),)})
    same = {"epochs": 3, "lr": 0.5, "flip": True, "without": ("3",)}
    assert config == RunConfig(**same, method={"name": "cfol", "eta": 0.25, "reset": [0.5]})
    assert type(config.epochs) is int
    assert RunConfig.model_validate_json(config.model_dump_json()).hash() == config.hash()
    with pytest.raises(ValueError, match="epochs"):
        RunConfig(epochs=np.bool_(True))
    with pytest.raises(ValueError, match="epochs"):
        RunConfig(epochs=np.float64(3))
    assert RunConfig(seed=2**63 - 1).seed == 2**63 - 1


def test_published_configurations_are_read_as_they_were_written():
    """Their identity is a hash of the values that are not defaults; sets of runs rely on it."""
    runs = published()
    assert runs
    for run in runs:
        again = RunConfig.model_validate_json(run.config.model_dump_json())
        assert again == run.config
        assert again.key() == run.config.key()
    assert RunConfig().hash() == "32f56cc5757f4aea"  # as before types were strict
    assert RunConfig(method={"name": "fixed-weights", "weights": {3: 10}}).hash() == (
        RunConfig(method={"name": "fixed-weights", "weights": {"3": 10}}).hash()
    )


def test_options_are_checked_against_what_a_callable_says():
    def whole(a: int, b: "float | None" = None, c=1, d="x", e: "Unknown" = 3, f=None):  # noqa: F821
        pass

    table = {"f": whole}
    for taken in ({"a": 1}, {"b": 1}, {"b": None}, {"c": 0.5}, {"d": "y"}, {"e": "any"}, {"f": [1]}):
        assert options("kind", {"name": "f", **taken}, table) == taken
    for refused in ({"a": 1.0}, {"a": True}, {"a": "1"}, {"c": "1"}, {"c": True}, {"c": float("nan")}, {"d": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(refused))}=.* of kind 'f'"):
            options("kind", {"name": "f", **refused}, table)
    assert of_type(float, 1) == 1


CELL = """%matplotlib inline
from pathlib import Path
import typing
files = !ls
data: Path = Path("x")
limit: typing.Optional[int] = None
kind: Literal["a", "b"] = "a"
pair: tuple[int, float] = (1, 2.0)
many: "list[float]" = [1.0]
array: np.ndarray = np.zeros(3)
free = None
n = m = 3
data?
"""


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"data": "/a/b"}, "/a/b"),
        ({"data": "5"}, "5"),
        ({"data": Path("a")}, "a"),
        ({"limit": "3"}, 3),
        ({"limit": "null"}, None),
        ({"limit": np.int64(3)}, 3),
        ({"limit": "x"}, ...),
        ({"limit": "3.0"}, ...),
        ({"kind": "b"}, "b"),
        ({"kind": "c"}, ...),
        ({"pair": "(1, 2)"}, [1, 2.0]),
        ({"pair": "[1]"}, ...),
        ({"many": "[1]"}, [1.0]),
        ({"many": "[NaN]"}, ...),
        ({"array": "[1]"}, [1]),
        ({"free": "5"}, 5),
        ({"n": "4"}, 4),
        ({"m": "true"}, ...),
    ],
)
def test_any_annotation_of_a_parameter_is_understood(tmp_path, given, value):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]})])
    nbformat.write(nb, tmp_path / "nb.ipynb")
    if value is ...:
        with pytest.raises(ValueError, match=rf"parameter {next(iter(given))}=.* of nb.ipynb: .* is needed"):
            typed(tmp_path / "nb.ipynb", given)
    else:
        assert typed(tmp_path / "nb.ipynb", given) == dict.fromkeys(given, value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "\xff"]
    + [f'{{"nbformat": {n}, "nbformat_minor": 5, "metadata": {{}}, "cells": {c}}}' for n, c in ((99, "[]"), (4, 3))]
    + ['{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}'],
)
def test_a_file_that_is_no_notebook_is_named(command, tmp_path, text):
    (tmp_path / "bad.ipynb").write_bytes(text.encode("latin-1"))
    status, _, err = command("run", tmp_path / "bad.ipynb")
    assert status == 2
    assert one_sentence(err), err
    assert f"{tmp_path / 'bad.ipynb'} is not a notebook" in err


def test_a_parameters_cell_that_is_not_python_is_named(command, tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("n = (", metadata={"tags": ["parameters"]})])
    nbformat.write(nb, tmp_path / "nb.ipynb")
    status, _, err = command("run", tmp_path / "nb.ipynb")
    assert status == 2
    assert one_sentence(err), err
    assert "the parameters cell of nb.ipynb is not Python" in err


def test_what_is_no_value_stays_text():
    for text in ("0.1#2", "0.1 # x", "'a'*3", "[0]*9", "1)*(2", "[" * 9999, "1" * 6000, "9" * 400 + "/3", "\\", ""):
        assert parse(text) == text


# -- signals, in processes of their own --------------------------------------------------------------------------------


def processes(session: int) -> list[str]:
    """Those of a session that run."""
    out = subprocess.run(["ps", "-s", str(session), "-o", "stat="], capture_output=True, text=True).stdout
    return [state for state in out.split() if not state.startswith("Z")]


def listens(process: int) -> bool:
    """Whether it has a handler for SIGTERM."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


TRAIN = "train --seeds 4 -s epochs=200 -s device=cpu"
AUDIT = "audit --model torchvision:resnet18 --random-weights --data digits --image-size 64"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "number", "code", "members", "later"),
    [
        (TRAIN, "SIGINT", 130, 1, 0.3),
        (TRAIN, "SIGINT", 130, 3, 0.3),
        (TRAIN, "SIGTERM", 143, 5, 0.3),
        (AUDIT, "SIGINT", 130, 3, 0),
        (AUDIT, "SIGTERM", 143, 3, 0),
    ],
)
def test_a_stop_while_processes_start_is_one_sentence(words, number, code, members, later):
    """members: how many processes there are when the signal comes: the first alone, the server of workers (or the child
    of an audit), a worker."""
    words = ["-m", "cfol_nb", *words.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    until = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < until:
        if len(processes(process.pid)) >= members and listens(process.pid):
            break
        time.sleep(0.05)
    time.sleep(later)
    os.killpg(process.pid, getattr(signal, number))
    _, err = process.communicate(timeout=180)
    assert process.returncode == code
    assert err.strip().count("\n") == 0
    assert f"stopped by {number}" in err
    until = time.monotonic() + 60
    while processes(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not processes(process.pid)

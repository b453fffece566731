"""What is stored is what was computed: damaged, exchanged and outdated files are never taken for it."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cfol_nb import audit, cli, files, runs, suite
from cfol_nb.config import RunConfig
from cfol_nb.data import load
from cfol_nb.evaluate import Outcomes
from cfol_nb.files import Corrupt, Unsigned, code_hash, read_json, read_tensors, write_json, write_tensors
from cfol_nb.methods import METHODS
from cfol_nb.runs import Run, compute, folder_of, judge, verdicts

TINY = {"model": {"name": "mlp", "width": 4}, "epochs": 1, "train_limit": 24, "test_limit": 3, "steps": 1}
MARGIN = {"margin": {"eps": 0.1, "step": 0.05, "steps": 1, "loss": "margin"}}
pytestmark = pytest.mark.filterwarnings("ignore::cfol_nb.train.Diverging")


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A store with two runs that were judged."""
    store = tmp_path_factory.mktemp("computed")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CFOL_NB_RUNS", str(store))
        both = [run for s in (0, 1) for run in compute([RunConfig(**TINY, seed=s)])]  # no other processes
        for run in both:
            judge([run], MARGIN)
    return store


@pytest.fixture
def pair(computed, tmp_path):
    """These runs, in a store of the test's own."""
    shutil.copytree(computed, tmp_path / "runs")
    return [Run.load(folder_of(RunConfig(**TINY, seed=s))) for s in (0, 1)]


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """The configuration of a run on a single folder of 40 grey images, by a relative path."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for i in range(40):
        add(Path("pets") / ("cat", "owl")[i % 2] / f"{i:02}.png", i)
    return RunConfig(**{**TINY, "dataset": "imagefolder:pets", "batch_size": 8, "dtype": "float64", "device": "cpu"})


def add(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


# -- bytes -------------------------------------------------------------------------------------------------------------


def mutations(whole: bytes, header: int, rng: random.Random, n: int):
    """Copies in which a digit, a letter, a bit, two bytes or the length differ, mostly in the header."""
    for i in range(n):
        data, kind = bytearray(whole), i % 7
        at = rng.randrange(header if rng.random() < 0.7 else len(data))
        if kind < 2:  # in a digit's, or a letter's place another one
            kinds = b"0123456789" if kind else b"abcdefghijklmnopqrstuvwxyz"
            at = rng.choice([j for j in range(header) if data[j] in kinds])
            data[at] = rng.choice([c for c in kinds if c != data[at]])
        elif kind == 2:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            other = rng.randrange(header)
            data[at], data[other] = data[other], data[at]
        elif kind == 4:
            del data[rng.randrange(len(data)) :]
        elif kind == 5:
            data += bytes([rng.randrange(256)])
        else:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        if data != whole:
            yield bytes(data)


def test_no_changed_byte_is_ever_read(pair, tmp_path):
    a, rng, results = pair[0], random.Random(0), tmp_path / "results"
    suite.publish(a, results)
    (verdict,), (published,) = a.folder.glob("judged-*"), results.glob("*")
    loads = dict.fromkeys(map(a.folder.joinpath, runs.FILES), lambda: Run.load(a.folder).model("last"))
    loads |= {verdict: lambda: verdicts(a, "last"), published: lambda: suite.published(results)}
    tried = 0
    for path, read in loads.items():
        whole = path.read_bytes()
        header = len(whole) if path.suffix == ".json" else 8 + int.from_bytes(whole[:8], "little")
        for broken in mutations(whole, header, rng, 50):
            path.write_bytes(broken)
            with pytest.raises(Corrupt, match=path.name):
                read()
            tried += 1
        path.write_bytes(whole)
        read()
    assert tried > 250


@pytest.mark.parametrize("text", ["[]", "{}", '{"sha256": 1}', '{"a": NaN, "sha256": ""}', "[" * 100_000, "\udcff"])
def test_other_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Corrupt, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_json_is_what_was_written_and_nothing_twice(tmp_path):
    path, value = tmp_path / "a.json", {"eps": 0.1, "names": ["owl", "Ö"], "n": {"1": None}}
    write_json(path, value)
    assert read_json(path) == value
    path.write_text(path.read_text().replace('"eps": 0.1', '"eps": 0.2,\n "eps": 0.1'))
    with pytest.raises(Corrupt, match="digest"):
        read_json(path)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})


def test_tensors_are_a_safetensors_file_that_others_read(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {"x": torch.randn(3, 2), "i": torch.arange(4), "e": torch.empty(0, 2)}
    write_tensors(tmp_path / "a", tensors, {"names": ["owl"]})
    other = load_file(tmp_path / "a")
    assert all(torch.equal(other[k], v) for k, v in tensors.items())
    assert read_tensors(tmp_path / "a")[1] == {"names": ["owl"]}
    save_file(tensors, tmp_path / "b", {"cfol_nb": json.dumps({"meta": {}, "sha256": "0" * 64})})  # as it once was
    with pytest.raises(Unsigned, match="carries no digest"):
        read_tensors(tmp_path / "b")


# -- files that belong together ----------------------------------------------------------------------------------------


def test_a_file_of_another_run_is_refused(pair):
    a, b = pair
    margin = next(a.folder.glob("judged-*")).name
    for name in (*runs.FILES, margin):
        whole = (a.folder / name).read_bytes()
        shutil.copy(b.folder / name, a.folder / name)
        with pytest.raises(Corrupt, match=f"{a.folder.name}.*json|{name}"):
            verdicts(Run.load(a.folder), "last")
        (a.folder / name).write_bytes(whole)
    shutil.copy(b.folder / "weights.safetensors", a.folder)  # after the run was loaded
    with pytest.raises(Corrupt, match="weights"):
        a.model("last")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("config", "eps"), 0.2, "its configuration is that of digits-at-erm-s0-"),
        (("config", "weight_decay"), 0.1005, "its configuration is that of"),
        (("classes", 8), "nine", "its classes"),
        (("n", 0), 4, "its classes"),
        (("correct", "last", "pgd20", 3), 9, "its counts"),
    ],
)
def test_a_run_that_was_rewritten_with_a_digest_still_has_to_agree(pair, tmp_path, path, value, says):
    a = pair[0]
    (published,) = [suite.publish(a, tmp_path / "r")]
    for file, read in ((a.folder / "run.json", lambda: Run.load(a.folder)), (published, lambda: _published(tmp_path))):
        kept = inner = read_json(file)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        write_json(file, kept)
        with pytest.raises(Corrupt, match=says):
            read()


def _published(tmp_path):
    return suite.published(tmp_path / "r")


def test_verify_names_every_bad_file_and_counts_the_others(pair, pets, tmp_path, monkeypatch, capsys):
    (run,) = compute([pets])
    suite.publish(run, tmp_path / "r")
    cli.verify(tmp_path / "r")
    fine = len(list((tmp_path / "runs").rglob("*.safetensors"))) + 3 * 2 + 1 + 1  # JSONs of runs, cache, published
    assert capsys.readouterr().out == f"{fine} stored files are as they were written, 0 are not\n"
    (cache,) = (tmp_path / "data" / "cache").glob("*")
    (judged,) = pair[0].folder.glob("judged-*")
    shutil.copy(pair[1].folder / "weights.safetensors", pair[1].folder / "checkpoint.safetensors")  # fine in itself
    bad = [cache, run.folder / "outcomes.safetensors", next((tmp_path / "r").glob("*"))]
    for path in bad:
        path.write_bytes(path.read_bytes()[:-2])
    shutil.copy(next(pair[1].folder.glob("judged-*")), judged)
    with pytest.raises(cli.typer.Exit) as end:
        cli.verify(tmp_path / "r")
    assert end.value.exit_code == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"{fine + 1 - 4} stored files are as they were written, 4 are not"
    assert all(sum(path.name in line for line in lines) == 1 for path in (*bad, judged))


# -- folders of images -------------------------------------------------------------------------------------------------


def changed(what: str) -> None:
    if what == "added":
        add(Path("pets/cat/00b.png"), 99)
    elif what == "replaced":
        add(Path("pets/owl/39.png"), 77)
    elif what == "removed":
        Path("pets/cat/04.png").unlink()
    else:
        Path("../there").mkdir()
        os.chdir("../there")
        for i in range(50):
            add(Path("pets") / ("cat", "owl")[i % 2] / f"{i:02}.png", i)


@pytest.mark.parametrize("what", ["added", "replaced", "removed", "another folder of this name"])
def test_a_run_belongs_to_the_state_of_its_folder(pets, what):
    (run,) = compute([pets])
    source, asked = f"run:{run.folder.name}", {"weak": MARGIN["margin"]}
    (before,) = judge([run], asked)
    own = audit.unseen(source, pets.dataset)
    assert torch.equal(own.images, load(pets.dataset).test.images)
    changed(what)
    for reads in (
        lambda: audit.unseen(source, pets.dataset),
        lambda: audit.unseen(source, f"imagefolder:{Path('pets').resolve()}") if "another" not in what else run.data(),
        lambda: judge([run], MARGIN),
        run.data,
    ):
        with pytest.raises(ValueError, match=r"imagefolder:.*pets are not those of the run"):
            reads()
    (again,) = judge([run], asked)  # it is stored: nothing is read
    np.testing.assert_array_equal(again.predictions["weak"], before.predictions["weak"])
    (other,) = compute([pets])
    assert other.folder != run.folder


def test_the_same_folder_may_be_read_from_elsewhere(pets, tmp_path, monkeypatch):
    (run,) = compute([pets])
    own, before = audit.unseen(f"run:{run.folder.name}", pets.dataset), run.data()[2].test.images
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="no folder pets"):
        run.data()
    shutil.copytree("../here/pets", "pets")  # with its times
    assert torch.equal(run.data()[2].test.images, before)
    moved = audit.unseen(f"run:{run.folder.name}", f"imagefolder:{tmp_path / 'here' / 'pets'}")
    assert torch.equal(moved.images, own.images)


def test_a_folder_that_changes_while_it_waits_is_not_trained_on(pets):
    config = runs.resolve(pets)
    folder = folder_of(config)
    changed("added")
    with pytest.raises(ValueError, match="changed after the run was asked for"):
        runs._work(config.model_dump_json(), str(folder))


def test_verdicts_on_other_images_are_not_put_together():
    a = Outcomes([0, 1, 1], {"clean": [0, 1, 1], "pgd": [0, 0, 1]}, ("x", "y"))
    for labels in ([0, 1, 0], [0, 1]):
        b = Outcomes(labels, {"clean": labels, "aa": labels}, ("x", "y"))
        with pytest.raises(ValueError, match="other images"):
            a.update(b)


# -- several processes -------------------------------------------------------------------------------------------------


def test_the_same_name_with_other_options_is_another_verdict(pair, tmp_path):
    small = {"margin": {**MARGIN["margin"], "eps": 0.0}}
    a = pair[0]
    (weak,), (strong,) = judge([a], small), judge([a], MARGIN)
    for asked, o in ((small, weak), (MARGIN, strong)):
        assert o.attacks["margin"]["eps"] == asked["margin"]["eps"]
        np.testing.assert_array_equal(judge([a], asked)[0].predictions["margin"], o.predictions["margin"])
    np.testing.assert_array_equal(weak.predictions["margin"], weak.predictions["clean"])
    assert len(list(a.folder.glob("judged-*"))) == 2


def test_all_who_judge_the_same_at_once_get_what_they_asked_for(pair):
    def judged(eps):
        (o,) = judge(pair[:1], {"aa": {"eps": eps, "version": "fast"}})
        return o.attacks["aa"]["eps"], o.correct("aa").tolist()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(judged, [0.15, 0.02, 0.15, 0.15]))
    assert together == [judged(eps) for eps in (0.15, 0.02, 0.15, 0.15)]
    assert [eps for eps, _ in together] == [0.15, 0.02, 0.15, 0.15]
    assert not list(pair[0].folder.glob("*.state"))


def test_who_waits_says_for_whom_and_since_when(tmp_path, capsys):
    done = []

    def second():
        with files.alone(tmp_path / ".lock", "digits-1"):
            done.append(2)

    with files.alone(tmp_path / ".lock", "digits-1"):
        waits = threading.Thread(target=second)
        waits.start()
        waits.join(0.3)
        assert not done
    waits.join()
    said = capsys.readouterr().err
    assert f"digits-1: waiting for process {os.getpid()} on " in said
    assert "which is at it since 20" in said
    assert done == [2]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    body = f"""
    import os, pathlib
    from cfol_nb.files import replacing
    with replacing(pathlib.Path({str(tmp_path)!r}) / "a.json") as part:
        part.write_text("half")
        os._exit(9)
    """
    for _ in range(2):
        subprocess.run([sys.executable, "-c", textwrap.dedent(body)], check=False)
    (left,) = tmp_path.iterdir()  # the second removed that of the first
    with open(left, "rb") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)  # as if it were still being written
        write_json(tmp_path / "b.json", {})
        assert left.exists()
    write_json(tmp_path / "b.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


# -- code --------------------------------------------------------------------------------------------------------------

OWN = """
from cfol_nb.methods.cfol import CFOL
SIZE = 3  # of it
ASIDE = 1
LIST = [1, 2]

def helper(x):
    "What it does."
    return x * SIZE

def aside(x):
    return ASIDE

class Own(CFOL):
    '''A method.'''

    def reduce(self, losses, batch):
        # a comment
        return helper(losses).mean() * LIST[0]
"""


def built(text: str, name: str = "of_a_user"):
    scope = {"__name__": name}
    exec(text, scope)
    return scope["Own"]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A method.", "The method.", True),
        ("# a comment", "# a remark", True),
        ("What it does.", "What else it does.", True),
        ("ASIDE = 1", "ASIDE = 2", True),
        ("return ASIDE", "return 7", True),
        ("mean()", "sum()", False),
        ("SIZE = 3", "SIZE = 4", False),
        ("x * SIZE", "x + SIZE", False),
        ("LIST = [1", "LIST = [5", False),
        ("(CFOL)", "(CFOL, object)", False),
        ("import CFOL", "import FOL as CFOL", False),
    ],
)
def test_the_hash_is_of_the_code_that_can_move_numbers(old, new, same):
    assert old in OWN
    assert (code_hash(built(OWN)) == code_hash(built(OWN.replace(old, new)))) is same


def test_what_a_maker_closes_over_counts():
    def make(size):
        def own(num_classes, channels):
            return torch.nn.Linear(size, num_classes)

        return own

    assert code_hash(make(3)) == code_hash(make(3)) != code_hash(make(4))


def test_only_the_modules_that_a_run_uses_count(monkeypatch):
    asked, plain = set(), files._module
    monkeypatch.setattr(files, "_module", lambda name: asked.add(name) or plain(name))
    code_hash(METHODS["cfol"])
    used = {name for name in asked if plain(name)[0]}
    assert {"cfol_nb.train", "cfol_nb.attacks", "cfol_nb.samplers", "cfol_nb.methods.cfol"} <= used
    assert not used & {"cfol_nb.methods.frl", "cfol_nb.stats", "cfol_nb.plots", "cfol_nb.runs", "cfol_nb.files"}


def test_prose_in_this_package_moves_no_hash(tmp_path, monkeypatch):
    source = '"""A."""\ndef f(x):\n    """B."""\n    return x  # C\n'
    hashes = []
    (tmp_path / "files.py").touch()
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    for i, text in enumerate((source, "def f(x): return x", source.replace("return x", "return 2"))):
        (tmp_path / f"m{i}.py").write_text(text)
        hashes.append(files._module(f"cfol_nb.m{i}")[0])
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_method_that_was_edited_is_computed_anew_and_nothing_else(monkeypatch, tmp_path):
    done, plain, losses = [], runs._compute, []
    monkeypatch.setattr(runs, "_compute", lambda c, *rest: done.append(c.method["name"]) or plain(c, *rest))
    for text in (OWN, OWN + "\n# more\nprint()", OWN.replace("SIZE = 3", "SIZE = 5")):
        monkeypatch.setitem(METHODS, "own", built(text))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = [run for m in ("own", "erm") for run in compute([RunConfig(**TINY, method=m, lr=0.01)])]
        losses.append([run.history[-1]["loss"] for run in found])
        done.append(sum("1 stored runs were computed by other code" in str(w.message) for w in said))
    assert done == ["own", "erm", 0, 0, "own", 1]
    assert losses[0] == losses[1]
    assert losses[2][1] == losses[0][1]
    assert losses[2][0] != losses[0][0]
    assert len(list((tmp_path / "runs" / "store").iterdir())) == 2


def test_recomputing_leaves_the_old_run_until_the_new_one_is_whole(pair, monkeypatch):
    a = pair[0]

    def stops(path, *given):
        if path.name == "provenance.json":
            raise KeyboardInterrupt
        write_json(path, *given)

    with monkeypatch.context() as m:
        m.setattr(runs, "write_json", stops)
        with pytest.raises(KeyboardInterrupt):
            compute([a.config], recompute=True)
    assert Run.load(a.folder).provenance == a.provenance
    old = (a.folder / "provenance.json").stat().st_mtime_ns
    (new,) = compute([a.config], recompute=True)
    assert new.provenance["started"] >= a.provenance["started"]
    assert (a.folder / "provenance.json").stat().st_mtime_ns > old
    assert verdicts(new, "last").keys() == {"margin"}  # the weights are the same
    assert not (a.folder / ".new").exists()
    plain = os.replace
    with monkeypatch.context() as m:  # in the middle of taking the old one's places
        m.setattr(runs.os, "replace", lambda x, y: plain(x, y) if y != a.folder / "run.json" else 1 / 0)
        with pytest.raises(runs.RunsFailed, match="ZeroDivisionError"):
            compute([a.config], recompute=True)
    assert not runs.whole(a.folder)
    (last,) = compute([a.config])
    assert last.history == a.history


def test_a_verdict_of_other_code_is_made_anew(pair, monkeypatch):
    monkeypatch.setattr(runs, "_judging", lambda run: "other")
    with pytest.warns(UserWarning, match="1 stored verdicts were made by other code"):
        (found,) = judge(pair[:1], MARGIN)
    assert verdicts(pair[0], "last")["margin"][1]["code"] == "other"
    assert list(found.attacks) == ["pgd20", "margin"]


def test_a_run_of_an_earlier_version_is_computed_anew(pair):
    a = pair[0]
    for name in ("run.json", "provenance.json"):
        kept = read_json(a.folder / name)
        (a.folder / name).write_text(json.dumps(kept))
    with pytest.raises(Unsigned, match="carries no digest"):
        Run.load(a.folder)
    with pytest.warns(UserWarning, match="1 stored runs were computed by other code"):
        (new,) = compute([a.config])
    assert new.history == a.history


# -- outcomes made by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64, torch.int16, torch.uint8, list])
def test_integers_of_any_kind_are_taken(kind):
    def as_kind(values):
        if kind is list:
            return values
        return torch.tensor(values, dtype=kind) if isinstance(kind, torch.dtype) else np.array(values, kind)

    o = Outcomes(
        as_kind([0, 1, 100]), {"clean": as_kind([0, 2, 100]), "pgd": as_kind([1, 1, 99])}, tuple(map(str, range(101)))
    )
    for again in (o, Outcomes.unpacked(o.packed()), Outcomes.from_tensors(o.tensors(), o.meta())):
        assert [again.labels.tolist(), *(p.tolist() for p in again.predictions.values())] == [
            [0, 1, 100],
            [0, 2, 100],
            [1, 1, 99],
        ]
        assert again.labels.dtype == np.int64
        assert list(again.predictions) == ["clean", *again.attacks] == ["clean", "pgd"]


@pytest.mark.parametrize(
    ("labels", "predictions", "more", "says"),
    [
        ([0, 1], {"clean": [0, 2]}, {}, "2, which is not in 0..1"),
        ([0, 1], {"clean": [0, -1]}, {}, "-1, which is not in"),
        ([0, 5], {"clean": [0, 1]}, {}, "labels hold 5"),
        ([0, 1], {"clean": [0.0, 1.0]}, {}, "one integer per image"),
        ([0, 1], {"clean": torch.tensor([0.0, 1.0], dtype=torch.bfloat16)}, {}, "one integer per image"),
        ([0, 1], {"clean": [True, False]}, {}, "one integer per image"),
        ([0, 1], {"clean": [[0], [1]]}, {}, "one integer per image"),
        ([0, 1], {"clean": [0, 1], "pgd": [0]}, {}, "1 predictions 'pgd', but 2 labels"),
        ([0, 1], {"pgd": [0, 1]}, {}, "need predictions 'clean'"),
        ([0, 1], {"clean": [0, 1]}, {"attacks": {"pgd": {}}}, "settings of 'pgd', but no predictions"),
        ([0, 1], {"clean": [0, 1]}, {"checks": {"pgd": None}}, "checks of 'pgd', but no predictions"),
    ],
)
def test_outcomes_that_cannot_be_are_refused(labels, predictions, more, says):
    with pytest.raises(ValueError, match=says):
        Outcomes(labels, predictions, ("x", "y"), **more)


def test_anybodys_predictions_become_outcomes(tmp_path):
    """By names, by numbers, and as a CSV: what they say is counted by hand."""
    label, clean, attacked = list("bab"), list("bba"), list("aba")
    of_names = Outcomes.from_predictions(label, {"pgd": attacked, "clean": clean})
    of_numbers = Outcomes.from_predictions([1, 0, 1], {"clean": torch.tensor([1, 1, 0]), "pgd": [0, 1, 0]}, ["a", "b"])
    (tmp_path / "p.csv").write_text("pgd,image,label,clean\na,1.png,b,b\nb,2.png,a,b\na,3.png,b,a\n")
    (tmp_path / "n.csv").write_text("label,clean,pgd\n1,1,0\n0,1,1\n1,0,0\n")
    of_csv = Outcomes.load(tmp_path / "p.csv")
    for o in (of_names, of_numbers, of_csv, Outcomes.load(tmp_path / "n.csv", ["a", "b"])):
        assert o.class_names == ("a", "b")
        assert list(o.predictions) == ["clean", "pgd"]
        assert o.labels.tolist() == [1, 0, 1]
        assert o.predictions["clean"].tolist() == [1, 1, 0]
        assert o.predictions["pgd"].tolist() == [0, 1, 0]
    assert of_csv.images == ("1.png", "2.png", "3.png")
    assert Outcomes.load(tmp_path / "n.csv").class_names == ("0", "1")
    assert Outcomes.from_predictions([10, 9], {"clean": [9, 9]}).class_names == ("9", "10")  # those that there are


@pytest.mark.parametrize("suffix", [".csv", ".safetensors"])
@pytest.mark.parametrize("names", [("7", "3"), ("NA", "nan"), ("a, b", ' "c"'), ("007", "7")])
def test_outcomes_are_kept_as_one_file(tmp_path, suffix, names):
    checks = {"pgd": pd.DataFrame([("a", "ok", "b")], columns=["check", "verdict", "seen"])}
    o = Outcomes(
        [0, 1, 1], {"clean": [0, 1, 0], "pgd": [1, 1, 0]}, names, {"pgd": {"eps": 0.1}}, checks, ("x", "y", "z")
    )
    again = Outcomes.load(o.save(tmp_path / f"o{suffix}"), names)
    assert (again.class_names, again.images) == (o.class_names, o.images)
    for name, values in o.predictions.items():
        np.testing.assert_array_equal(again.predictions[name], values)
    if suffix == ".safetensors":
        assert again.attacks == o.attacks
        pd.testing.assert_frame_equal(again.checks["pgd"], checks["pgd"])
    else:
        assert set(Outcomes.load(tmp_path / "o.csv").class_names) == set(names)


@pytest.mark.parametrize(
    ("text", "names", "says"),
    [
        ("label,pgd\na,a\n", None, "no column 'clean'"),
        ("label,clean\na,a\nb,\n", None, "'clean' has empty cells"),
        ("label,clean,site\na,b,north\nb,b,x\n", None, "site: 'north' is none of the 2 classes found in the labels"),
        ("label,clean,pgd\n0,2,1\n", None, "pgd: '1' is none of the 2 classes found"),
        ("label,clean\na,b\n", ["a", "c"], "clean: 'b' is none of the 2 classes that were given"),
        ("label,clean\n0,2\n", ["a", "c"], "'clean' hold 2, which is not in 0..1"),
        ("label,clean\n0,0.5\n", ["a", "c"], "clean: '0.5' is none of"),
        ("label,clean\na,a\n", ["a", "a"], "same name"),
        ("image,label,clean\nx,a,a\nx,b,b\n", None, "1 images have the name of another one"),
        ("", None, "No columns"),
        ("label,clean\na,a,a,a\nb\n", None, "p.csv"),
    ],
)
def test_a_table_of_predictions_that_does_not_fit_is_refused(tmp_path, text, names, says):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        Outcomes.load(tmp_path / "p.csv", names)
    assert str(tmp_path / "p.csv") in str(error.value)


def test_other_files_are_no_outcomes(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Outcomes.load(tmp_path / "o.csv")
    (tmp_path / "o.json").write_text("{}")
    with pytest.raises(ValueError, match=r"as .safetensors or .csv"):
        Outcomes.load(tmp_path / "o.json")
    write_tensors(tmp_path / "o.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="holds no outcomes"):
        Outcomes.load(tmp_path / "o.safetensors")
    with pytest.raises(ValueError, match="clean are float64"):
        Outcomes.from_predictions([0, 1], {"clean": np.array([0.0, 1.0])})


def test_some_of_the_images_and_other_groups_of_them():
    o = Outcomes([0, 1, 1, 0], {"clean": [0, 1, 0, 1], "pgd": [1, 1, 0, 1]}, ("a", "b"), images="wxyz")
    some = o.take(np.array([2, 0]))
    assert some.labels.tolist() == [1, 0]
    assert some.predictions["pgd"].tolist() == [0, 1]
    assert some.images == ("y", "w")
    by_site = o.grouped(["s", "n", "s", "n"])
    assert by_site.class_names == ("n", "s")
    for attack in o.predictions:
        np.testing.assert_array_equal(by_site.correct(attack), o.correct(attack))
    assert by_site.counts("pgd")[0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="all images are 's'"):
        o.grouped(["s"] * 4)


def test_predictions_that_were_slipped_in_are_not_packed_away():
    o = Outcomes([0, 1], {"clean": [0, 1]}, ("x", "y"))
    with pytest.raises(ValueError, match="3, which is not"):
        o.add("pgd", np.array([0, 3]), {})
    o.predictions["pgd"] = np.array([0, 1])
    for pack in (o.packed, o.tensors):
        with pytest.raises(ValueError, match="'pgd' has predictions or settings alone"):
            pack()

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cfol_nb import audit, autoattack, cli, stats, suite
from cfol_nb.config import RunConfig, preset
from cfol_nb.data import prepare
from cfol_nb.evaluate import evaluate
from cfol_nb.files import code_hash
from cfol_nb.runs import Run, _work, compute, folder_of, judge, resolve, stored, verdicts
from cfol_nb.suite import METHODS, PAPER, configurations, estimate

TINY = {"epochs": 2, "train_limit": 24, "test_limit": 6, "steps": 2}


def test_every_method_comes_once_before_any_comes_twice():
    configs = configurations("digits", ["erm", "cfol-trades"], 2, epochs=3)
    seen = [(c.method["name"], c.objective["name"], c.seed) for c in configs]
    assert seen == [("erm", "at", 0), ("cfol", "trades", 0), ("erm", "at", 1), ("cfol", "trades", 1)]
    assert all(c.epochs == 3 for c in configs)


def test_settings_win_over_what_a_method_brings():
    first, second = configurations("digits", ["lcvar", "cfol"], 1, lr=0.3)
    assert first.lr == second.lr == 0.3
    assert configurations("digits", ["lcvar"], 1)[0].lr == 0.05


def test_the_papers_schedule_decays_at_100_and_150_of_200():
    (config,) = configurations("cifar10", ["cfol"], 1, **PAPER)
    assert config.epochs == 200
    factors = [config.schedule(e / 200) for e in (0, 99, 100, 149, 150, 199)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert config.eps * 255 == pytest.approx(8)


def test_all_methods_are_known():
    for config in configurations("digits", list(METHODS), 1):
        suite.check(config)


def test_publishes_integer_counts_and_goes_on_where_it_stopped(tmp_path):
    said = []
    configs = configurations("digits", ["erm", "cfol"], 1, ema=0.9, **TINY)
    (first,) = list(suite.suite(configs[:1], 5, tmp_path, said.append))
    both = list(suite.suite(configs, 5, tmp_path, said.append))
    assert both[0].history == first.history
    assert len(said) == 3
    for run in both:
        kept = json.loads((tmp_path / f"{run.folder.name}.json").read_text())
        stored = {"config", "classes", "n", "correct", "selected_epoch", "history"}
        assert set(kept) == stored | {"outcomes", "provenance", "seconds_per_epoch", "sha256"}
        assert set(kept["correct"]) == {"last", "selected", "ema"}
        assert kept["correct"]["ema"]["pgd20"] == [
            int((run.outcomes["ema"].correct("pgd20") & (run.outcomes["ema"].labels == c)).sum()) for c in range(10)
        ]
        assert kept["n"] == [6] * 10
    again = {r.folder.stem: r for r in suite.published(tmp_path)}
    assert len(again) == 2
    for run in both:
        twin = again[run.folder.name]
        assert (twin.config, twin.history, twin.provenance) == (run.config, run.history, run.provenance)
        for which, outcomes in run.outcomes.items():
            assert twin.outcomes[which].attacks == outcomes.attacks
            for attack, predictions in outcomes.predictions.items():
                np.testing.assert_array_equal(twin.outcomes[which].predictions[attack], predictions)
            np.testing.assert_array_equal(twin.outcomes[which].labels, outcomes.labels)


def test_publishes_what_was_judged(tmp_path):
    (run,) = compute(configurations("digits", ["erm"], 1, **TINY))
    cli.publish([run.folder.name], tmp_path, "fast")
    (twin,) = suite.published(tmp_path)
    (judged,) = judge([run], {"autoattack": {"eps": run.config.eps, "version": "fast"}})
    for name in ("autoattack:apgd-ce", "autoattack", "pgd20"):
        np.testing.assert_array_equal(twin.outcomes["last"].predictions[name], judged.predictions[name])
    assert stats.last_attack(twin.outcomes["last"]) == "pgd20"
    for name in ("autoattack", "pgd20"):
        pd.testing.assert_frame_equal(twin.outcomes["last"].checks[name], judged.checks[name])
    assert list(twin.outcomes["selected"].attacks) == ["pgd20"]
    origin = twin.provenance["judged"]["last, autoattack"]
    assert origin["asked"]["version"] == "fast"
    assert origin["seconds"] > 0
    assert origin["code"] == code_hash()


def test_no_run_is_started_that_the_time_left_cannot_hold(tmp_path, monkeypatch):
    now, started = [0.0], []
    monkeypatch.setattr(suite, "estimate", lambda config: 100.0)
    plain = suite.compute

    def slow(configs, **_):
        started.append(configs[0].method["name"])
        now[0] += 130
        return plain(configs)

    monkeypatch.setattr(suite, "compute", slow)
    said = []
    done = list(
        suite.suite(
            configurations("digits", ["erm", "cfol"], 2, **TINY), 300 / 60, tmp_path, said.append, lambda: now[0]
        )
    )
    # 300 s: erm to 130, cfol to 260; then erm is known to need 130 of the 40 that are left
    assert started == ["erm", "cfol"]
    assert len(done) == len(list(tmp_path.glob("*.json"))) == 2
    assert sum("needs about 130 s and 40 s are left" in s for s in said) == 2


def test_of_an_interrupted_run_only_the_rest_is_counted(tmp_path, monkeypatch):
    (config,) = configurations("digits", ["erm"], 1, **{**TINY, "lr": 0.11, "epochs": 4})
    config = resolve(config)
    folder = folder_of(config)

    class Stopped(BaseException):
        pass

    def stop(done, total):
        if 2 * done >= total:
            raise Stopped

    with pytest.raises(Stopped):
        _work(config.model_dump_json(), str(folder), 1, stop)
    asked, said = [], []
    monkeypatch.setattr(suite, "estimate", lambda config: asked.append(config) or 1000.0)
    assert not list(suite.suite([config], 60 / 60, tmp_path, said.append))
    needed = int(said[0].split("needs about ")[1].split()[0])
    assert 450 <= needed < 1000
    assert asked


def test_a_folder_that_cannot_be_written_is_noticed_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(suite, "compute", lambda configs: pytest.fail("was computed"))
    with pytest.raises(FileExistsError):
        list(suite.suite(configurations("digits", ["erm"], 1, **TINY), 5, tmp_path / "file", print))


def test_what_the_standard_version_found_is_kept(tmp_path, monkeypatch, capsys):
    (run,) = compute(configurations("digits", ["erm"], 1, **{**TINY, "test_limit": 1}))
    monkeypatch.setattr(autoattack, "QUERIES", 20)
    cli.publish([run.folder.name], tmp_path, "standard")
    cli.publish([run.folder.name], tmp_path, "fast")
    assert "judged by the standard version, which is kept" in capsys.readouterr().out
    (twin,) = suite.published(tmp_path)
    assert twin.provenance["judged"]["last, autoattack"]["asked"]["version"] == "standard"


def test_a_run_that_fails_does_not_stop_the_suite(tmp_path):
    said = []
    configs = configurations("digits", ["erm"], 1, **{**TINY, "lr": 1e9, "epochs": 3}) + configurations(
        "digits", ["cfol"], 1, **TINY
    )
    (run,) = suite.suite(configs, 5, tmp_path, said.append)
    assert run.config.method["name"] == "cfol"
    assert "training diverged" in said[0]


@pytest.fixture
def cpu_time(monkeypatch):
    """What else runs on the machine, and when, is no fault of an estimate: it and the run are timed in CPU seconds."""
    torch.set_num_threads(1)
    monkeypatch.setattr(time, "perf_counter", time.process_time)


def test_the_estimate_is_near_the_truth(cpu_time):
    config = configurations("digits", ["cfol"], 1, epochs=6, device="cpu")[0]
    guess = estimate(config)
    (run,) = compute([config])
    taken = run.provenance["seconds"]["training"] + run.provenance["seconds"]["evaluation"]
    assert 0.5 * taken < guess < 2.5 * taken
    assert stored() == [run.folder]


def test_the_estimate_counts_a_parent_that_is_not_stored(cpu_time):
    small = {**TINY, "test_limit": 1}  # so that its evaluation takes next to nothing
    parent = RunConfig(**{**small, "epochs": 120})
    child = RunConfig(**{**small, "epochs": 1}, parent=parent)
    before = estimate(child)
    compute([parent])
    assert before > 5 * estimate(child)


def test_the_estimate_counts_the_remaking_of_images(cpu_time):
    small = {**TINY, "test_limit": 1}
    parent = RunConfig(**small)
    child = RunConfig(**{**small, "epochs": 12}, parent=parent, objective="clean")  # enough steps for a median
    remade = child.model_copy(update={"remake": {"name": "matched", "steps": 200}})
    compute([parent])
    guess, without = estimate(remade), estimate(child)
    (run,) = compute([remade])
    taken = run.provenance["seconds"]
    assert without < 0.5 * taken["remaking"]
    assert 0.4 * taken["remaking"] < guess < 2.5 * sum(taken.values())


def test_everything_is_checked_before_the_first_run(tmp_path):
    configs = configurations("digits", ["erm"], 1, **TINY) + configurations(
        "digits", ["erm"], 1, model="nothing", **TINY
    )
    with pytest.raises(ValueError, match="unknown model"):
        list(suite.suite(configs, 5, tmp_path))
    assert not stored()


def test_a_listing_names_what_is_unusual_about_a_run():
    given = [
        {},
        {"optimizer": "adam", "lr": 0.003},
        {"schedule": "cyclic", "weight_decay": 1e-5},
        {"without": ["3", "8"]},
        {"eps": 0.2, "method": {"name": "cfol", "drift": 9}, "seed": 1},
        {"epochs": 9, "train_limit": 30, "dtype": "float32"},
        {"parent": {}, "remake": {"name": "matched", "steps": 3}, "objective": "clean"},
        {"model": {"name": "smallcnn", "width": 32}, "norm": "l2", "eps": 0.5},
        {"imbalance": {"factor": 10}},
        {"training_attack": "n-fgsm", "eps": 0.2, "label_smoothing": 0.1},
    ]
    runs = [Run(RunConfig(**g), Path("x"), [], 0, {"last": str(i)}, {}) for i, g in enumerate(given)]
    table = suite.listing(runs)
    assert table["variant"].tolist() == [
        "",
        "lr 0.003, optimizer adam",
        "weight_decay 1e-05, schedule cyclic",
        "without 3 8",
        "eps 0.2",
        "",
        f"parent {RunConfig().hash()}, remake matched 3",
        "norm l2, eps 0.5",
        "imbalance 10",
        "training_attack n-fgsm, eps 0.2, label_smoothing 0.1",
    ]
    assert table["size"].tolist() == ["", "", "", "", "", "train_limit 30, epochs 9, dtype float32", "", "", "", ""]
    assert table["network"].tolist() == ["smallcnn"] * 7 + ["smallcnn 32", "smallcnn", "smallcnn"]
    assert table["method"].tolist()[4] == "cfol 9"
    assert table["outcomes"].tolist() == list("0123456789")
    assert table.query("seed == 1")["variant"].tolist() == ["eps 0.2"]


def test_published_weights_are_the_network_in_half_precision(tmp_path, monkeypatch):
    """In a clone without a run store `audit` and `judge` go on with them."""
    (run,) = compute(configurations("digits", ["erm"], 1, **TINY))
    for module in (suite, audit.foreign):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    cli.publish([run.folder.name], tmp_path / "results", weights=True)
    (path,) = (tmp_path / "results/weights").iterdir()
    assert path.name == f"{run.folder.name}.safetensors"
    own, size = run.model("last").state_dict(), sum(v.numel() for v in run.model("last").state_dict().values())
    assert path.stat().st_size < 2.5 * size + 4000
    monkeypatch.setenv("CFOL_NB_RUNS", str(tmp_path / "empty"))
    model = audit.load_model(f"run:{run.folder.name}", None, 10, 1)
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, own[k].half().to(own[k]), rtol=0, atol=0)
    (twin,) = suite.published(tmp_path / "results")
    attack = {"eps": 0.15, "step": 0.05, "steps": 5}
    (judged,) = judge([twin], {"again": attack})
    test = prepare(run.config)[2].test
    expected = evaluate(model, test.images, test.labels, {"again": attack}, seed=run.config.seed, checks=0)
    np.testing.assert_array_equal(judged.predictions["again"], expected.predictions["again"])
    (again,) = judge([twin], {"again": attack})  # loaded
    np.testing.assert_array_equal(judged.predictions["again"], again.predictions["again"])
    with pytest.raises(ValueError, match="unknown published weights of this run 'ema'"):
        twin.model("ema")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="are not published"):
        twin.model()
    monkeypatch.setattr(suite, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"at most 1\.5 MB"):
        suite.publish_weights(run, tmp_path)
    assert not path.exists()


def test_survivors_of_the_fast_version_are_attacked_by_fab_and_square(tmp_path, monkeypatch, capsys):
    """Stubs in their place, which find nothing; APGD, which has failed on these images, is not run again."""
    (run,) = compute(configurations("digits", ["erm"], 1, **{**TINY, "eps": 0.02, "attacks": {}}))
    judge([run], {"autoattack": {"eps": 0.02, "version": "fast"}})
    outcomes, _ = verdicts(run, "last")["autoattack"]
    held = np.bincount(outcomes.labels[outcomes.correct("autoattack")], minlength=10)
    assert held.sum() > 6

    def never(*_):
        raise AssertionError("APGD ran again")

    monkeypatch.setattr(autoattack, "apgd", never)
    seen = []
    monkeypatch.setattr(autoattack, "fab", lambda batch: seen.append(len(batch.y)))
    monkeypatch.setattr(autoattack, "square", lambda batch: None)
    cli.publish([run.folder.name], tmp_path, survivors=6)
    assert "of 6 images that the fast version left, FAB-T broke 0 and then Square 0" in capsys.readouterr().out
    assert seen == [6] * 9
    (twin,) = suite.published(tmp_path)
    kept = twin.provenance["judged"]["last, survivors of autoattack"]
    assert sum(kept["attacked"]) == 6
    assert (np.array(kept["attacked"]) <= held).all()
    with pytest.raises(ValueError, match="not judged by AutoAttack's fast version"):
        suite.attack_survivors(run, which="selected")


def test_the_fast_preset_is_a_name_and_settings_win_over_it(monkeypatch):
    """`train` and `suite` as a user calls them; what would be computed is caught."""
    from typer.testing import CliRunner

    from cfol_nb import runs

    class Enough(Exception):
        pass

    asked = []

    def catch(configs, *_, **__):
        asked.extend(configs)
        raise Enough

    monkeypatch.setattr(runs, "compute", catch)
    monkeypatch.setattr(suite, "suite", catch)
    given = ["--preset", "fast", "-s", "epochs=12", "-s", "model.width=16", "-s", "schedule.cycles=2"]
    for command in (["train", "--dataset", "cifar10"], ["suite", "cifar10", "--methods", "cfol"]):
        assert isinstance(CliRunner().invoke(cli.app, [*command, *given]).exception, Enough)
    model = {"name": "preactresnet18", "width": 16}
    settings = preset("fast", "cifar10") | {"epochs": 12, "model": model, "schedule": {"name": "cyclic", "cycles": 2}}
    assert asked == [RunConfig(dataset="cifar10", method="cfol", **settings)] * 2
    for command, says in (
        (["train", "--preset", "fast"], "for image data sets"),
        (["train", "--dataset", "cifar10", "--preset", "slow"], "unknown preset 'slow'"),
        (["suite", "cifar10", "--preset", "fast", "--paper"], "two recipes"),
        (["suite", "cifar10", "--preset", "fast", "-s", "steps=7"], "leave out steps"),
    ):
        with pytest.raises(ValueError, match=says):
            CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert len(asked) == 2


def test_train_prints_every_kind_of_weights(capsys):
    settings = [f"{k}={v}" for k, v in {**TINY, "ema": 0.9, "steps": 1, "training_attack": "n-fgsm"}.items()]
    cli.train(dataset="digits", method="erm", objective="at", seeds=1, settings=settings)
    out = capsys.readouterr().out
    for which in ("last", "selected", "ema"):
        assert f"erm at {which}" in out
    (run,) = [Run.load(f) for f in stored()]
    entry = run.history[-1]
    shown = run.curve("trained").loc[2].to_numpy()
    np.testing.assert_allclose(shown * entry["drawn"], entry["trained"])

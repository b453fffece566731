import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cfol_nb import runs
from cfol_nb.autoattack import Evaluation
from cfol_nb.config import RunConfig
from cfol_nb.data import prepare
from cfol_nb.evaluate import evaluate
from cfol_nb.files import Corrupt, read_tensors, write_json, write_tensors
from cfol_nb.models import MODELS, register
from cfol_nb.runs import Run, RunsFailed, compute, folder_of, judge, stored, whole
from cfol_nb.train import Diverging

VALUES = ("run.json", "outcomes.safetensors", "weights.safetensors")


def digest(folder):
    return {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in VALUES}


def script(body: str, **env) -> subprocess.Popen:
    """Another Python process that runs `body` with the test's store; its script has no __main__ guard."""
    prelude = "from cfol_nb.config import RunConfig\nfrom cfol_nb.runs import compute, folder_of\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(body)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_run_is_computed_once_then_loaded(tiny, monkeypatch):
    (run,) = compute([tiny(method="cfol")])
    assert {f.name for f in run.folder.iterdir()} >= {*VALUES, "provenance.json"}
    assert not (run.folder / "checkpoint.safetensors").exists()
    monkeypatch.setattr(runs, "_compute", lambda *a: pytest.fail("computed again"))
    (again,) = compute([tiny(method="cfol")])
    assert again.history == run.history
    assert stored() == [run.folder]


def test_what_is_stored_is_what_the_model_does(tiny, digits):
    (run,) = compute([tiny(method="cfol", epochs=12, eps=0.05)])
    for which in ("last", "selected"):
        o = run.outcomes[which]
        model = run.model(which)
        again = evaluate(
            model,
            *(getattr(runs.prepare(run.config)[2].test, a) for a in ("images", "labels")),
            run.config.attacks,
            seed=run.config.seed,
        )
        assert all(np.array_equal(o.predictions[k], again.predictions[k]) for k in ("clean", "pgd20"))
        pd.testing.assert_frame_equal(o.checks["pgd20"], again.checks["pgd20"])
    kept = json.loads((run.folder / "run.json").read_text())
    assert kept["n"] == [6] * 10
    assert sum(kept["correct"]["last"]["clean"]) == run.outcomes["last"].correct("clean").sum()
    assert kept["correct"]["last"]["clean"] != kept["correct"]["last"]["pgd20"]
    assert run.curve("p").shape == (12, 10)
    assert run.curve("clean").iloc[-1].between(0, 1).all()
    with pytest.raises(KeyError, match="no 'q'"):
        run.curve("q")


def test_runs_are_judged_by_further_attacks_once(tiny, monkeypatch):
    both = compute([tiny(seed=s, eps=0.1, epochs=6) for s in (0, 1)])
    attacks = {
        "margin": {"eps": 0.1, "step": 0.02, "steps": 5, "loss": "margin"},
        "aa": {"eps": 0.1, "version": "fast"},
    }
    found = judge(both, attacks, "selected")
    test = runs.prepare(both[0].config)[2].test
    for run, o in zip(both, found, strict=True):
        alone = evaluate(run.model("selected"), test.images, test.labels, attacks, seed=run.config.seed)
        assert list(o.attacks) == ["pgd20", *alone.attacks]
        for name, predictions in alone.predictions.items():
            np.testing.assert_array_equal(o.predictions[name], predictions)
        np.testing.assert_array_equal(o.predictions["pgd20"], run.outcomes["selected"].predictions["pgd20"])
        assert list(Run.load(run.folder).outcomes["selected"].predictions) == ["clean", "pgd20"]
    whole_evaluation = runs.evaluate
    monkeypatch.setattr(runs, "evaluate", lambda *a, **k: pytest.fail("judged again"))
    for o, again in zip(found, judge(both, attacks, "selected"), strict=True):
        np.testing.assert_array_equal(again.predictions["aa"], o.predictions["aa"])
        assert list(again.checks) == ["pgd20", "margin", "aa"]
    asked = []
    monkeypatch.setattr(runs, "evaluate", lambda *a, **k: asked.append(a[3]) or whole_evaluation(*a, **k))
    other = {**attacks, "margin": {**attacks["margin"], "steps": 6}}
    judge(both[:1], other, "selected")
    judge(both[:1], {"aa": attacks["aa"]}, "last")
    assert [list(a) for a in asked] == [["margin"], ["aa"]]
    with pytest.raises(ValueError, match="letters"):
        judge(both, {"a/b": attacks["margin"]})
    with pytest.raises(ValueError, match="one of the run's own"):
        judge(both, {"pgd20": attacks["margin"]})
    with pytest.raises(ValueError, match="step"):
        judge(both, {"pgd": {"eps": 0.1, "step": -1.0, "steps": 5}})
    monkeypatch.setattr(runs, "evaluate", lambda *a, **k: 1 / 0)
    with pytest.raises(RunsFailed, match="under other: ZeroDivisionError"):
        judge(both[:1], {"other": attacks["margin"]})


def test_a_killed_verdict_of_autoattack_goes_on_where_it_was(tiny, monkeypatch):
    (run,), asked = compute([tiny(eps=0.1, epochs=6)]), {"aa": {"eps": 0.1, "version": "fast"}}
    attack, done = Evaluation._attack, []

    def stops(self, number, index):
        if len(done) == 3:
            raise RuntimeError("killed")
        attack(self, number, index)
        done.append((number, len(index)))

    monkeypatch.setattr(Evaluation, "_attack", stops)
    with pytest.raises(RunsFailed, match="killed"):
        judge([run], asked)
    before, done[:] = list(done), []
    monkeypatch.setattr(Evaluation, "_attack", lambda *a: done.append(a[1]) or attack(*a))
    (found,) = judge([run], asked)
    assert before
    assert min(done) > 0, "APGD-CE was attacked anew"
    assert not list(run.folder.glob("*.state"))
    test = runs.prepare(run.config)[2].test
    alone = evaluate(run.model("last"), test.images, test.labels, asked, seed=run.config.seed)
    np.testing.assert_array_equal(found.predictions["aa"], alone.predictions["aa"])


def test_provenance_says_where_numbers_come_from(tiny):
    (run,) = compute([tiny()])
    assert run.provenance["torch"] == torch.__version__
    assert run.provenance["threads"] == 1
    assert set(run.provenance) >= {
        "commit",
        "dirty",
        "device",
        "python",
        "started",
        "seconds",
        "code",
        "images_per_second",
    }


def test_many_runs_in_processes_equal_each_alone(tiny):
    configs = [tiny(seed=s, method=m) for m in ("erm", "cfol") for s in (0, 1)]
    together = {r.folder.name: digest(r.folder) for r in compute([*configs, configs[0]])}
    for r in stored():
        for f in r.iterdir():
            f.unlink()
    alone = {r.folder.name: digest(r.folder) for c in configs for r in compute([c])}
    assert together == alone
    assert len(alone) == 4


def test_any_executor_will_do(tiny, monkeypatch, tmp_path):
    before, configs = torch.get_num_threads(), [tiny(seed=s) for s in range(6)]
    with ThreadPoolExecutor(4) as pool:
        together = [digest(r.folder) for r in compute(configs, executor=pool)]
    assert torch.get_num_threads() == before
    monkeypatch.setenv("CFOL_NB_RUNS", str(tmp_path / "again"))
    assert [digest(r.folder) for c in configs for r in compute([c])] == together


def test_one_failing_run_does_not_stop_the_others(tiny):
    with pytest.raises(RunsFailed, match="training diverged") as failed:
        compute([tiny(seed=0), tiny(lr=1e9, epochs=3), tiny(seed=1)])
    assert "1 of 3 runs failed" in str(failed.value)
    assert [r.config.seed for r in failed.value.runs] == [0, 1]
    assert len(stored()) == 2


def test_everything_is_checked_before_work_starts(tiny):
    with pytest.raises(ValueError, match="did you mean 'cfol'"):
        compute([tiny(seed=0), tiny(method="cfool")])
    with pytest.raises(ValueError, match="batch_size=9999"):
        compute([tiny(seed=0), tiny(batch_size=9999)])
    with pytest.raises(ValueError, match="gamma=7"):
        compute([tiny(seed=0), tiny(method={"name": "cfol", "gamma": 7})])
    with pytest.raises(FileNotFoundError, match="cfol-nb fetch cifar10"):
        compute([tiny(seed=0), tiny(dataset="cifar10")])
    assert not stored()


def test_own_models_are_trained_here(tiny):
    @register("test-own")
    def make(num_classes, channels):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))

    try:
        assert len(compute([tiny(model="test-own", seed=s) for s in range(2)])) == 2
    finally:
        MODELS.pop("test-own")


BIG = "RunConfig(epochs=6, train_limit=70, test_limit=10, steps=7, method='cfol')"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of BIG, computed in one go."""
    store = tmp_path_factory.mktemp("undisturbed")
    process = script(f"compute([{BIG}]); print(folder_of({BIG}))", CFOL_NB_RUNS=str(store))
    folder = Path(process.communicate(timeout=120)[0].strip())
    assert process.returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_killed_in_the_middle_continues_to_the_same_bytes(own_store, undisturbed, number):
    killed = script(f"compute([{BIG}])")
    folder = own_store / "runs" / "store" / undisturbed.name
    until = time.monotonic() + 60
    while not (folder / "checkpoint.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.02)
    killed.send_signal(number)
    killed.wait(30)
    assert killed.returncode != 0
    assert (folder / "checkpoint.safetensors").exists()
    assert not (folder / "run.json").exists()
    assert not stored()
    again = script(f"compute([{BIG}])")
    assert again.wait(120) == 0
    assert digest(folder) == digest(undisturbed)


def alive(pid: str) -> bool:
    """Whether a process runs; one that ended but was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_workers_end_with_their_parent_and_leave_checkpoints(own_store):
    body = f"compute([c.model_copy(update={{'seed': s, 'epochs': 200}}) for c in [{BIG}] for s in range(2)])"
    parent = script(body)
    until = time.monotonic() + 60
    while len(list((own_store / "runs").glob("store/*/checkpoint.safetensors"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [c for c in children if alive(c)]


def test_ctrl_c_does_not_break_workers_that_are_still_importing():
    body = """
    import os, signal
    from multiprocessing import forkserver
    from cfol_nb.runs import _pool
    with _pool([RunConfig(dataset="digits", seed=s) for s in range(2)]) as pool:
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGINT)
        print(pool.submit(len, "abc").result(), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        print(pool.submit(signal.getsignal, signal.SIGINT).result().name)
        print(signal.pthread_sigmask(0, []), pool.submit(signal.pthread_sigmask, 0, []).result())
    """
    assert script(body).communicate(timeout=120) == ("3 True\nSIG_DFL\nset() set()\n", "")
    background = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + textwrap.dedent(body)
    assert script(background).communicate(timeout=120) == ("3 False\nSIG_IGN\nset() set()\n", "")


def test_as_many_runs_go_side_by_side_as_the_threads_of_torch_leave_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    configs = [RunConfig(dataset="digits", dtype="float32", seed=s) for s in range(3)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert runs._pool(configs) is None
        torch.set_num_threads(1)
        with runs._pool(configs) as pool:
            assert pool._max_workers == 2
            assert pool.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_two_processes_that_want_the_same_run_compute_it_once(own_store):
    body = f"""
    import cfol_nb.runs as r
    plain = r._compute
    def told(*a):
        print("computed", flush=True)
        plain(*a)
    r._compute = told
    run, = compute([{BIG}])
    print(run.history[-1]["loss"])
    """
    both = [script(body) for _ in range(2)]
    out = [p.communicate(timeout=120)[0].split() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sorted(len(o) for o in out) == [1, 2]
    assert out[0][-1] == out[1][-1]


def test_a_half_written_run_is_not_a_run(tiny, monkeypatch):
    def stop(path, value):  # killed after the tensors, before run.json
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(runs, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            compute([tiny()])
    assert not stored()
    (run,) = compute([tiny()])
    assert stored() == [run.folder]


def test_damaged_runs_are_refused_and_others_are_untouched(tiny):
    a, b = compute([tiny(seed=0), tiny(seed=1)])
    before = digest(b.folder)
    for name, broken in (("outcomes.safetensors", b"x" * 100), ("run.json", b'{"config": ')):
        whole = (a.folder / name).read_bytes()
        (a.folder / name).write_bytes(broken)
        with pytest.raises(Corrupt, match=name):
            compute([tiny(seed=0)])
        (a.folder / name).unlink()  # as the message says
        assert compute([tiny(seed=0)])[0].history == a.history
        assert (a.folder / name).read_bytes() == whole
    text = (a.folder / "run.json").read_text()
    other = json.loads(text)
    other["correct"]["last"]["clean"][0] += 1
    for broken in ("{}", "[]", text.replace('"optimizer"', '"optimizr"'), json.dumps(other)):
        assert broken != text
        (a.folder / "run.json").write_text(broken)
        with pytest.raises(Corrupt, match=r"run\.json (was changed|carries no digest)"):
            compute([tiny(seed=0)])
    (a.folder / "run.json").write_text(text)
    assert digest(b.folder) == before
    assert compute([tiny(seed=0)])[0].history == a.history


@pytest.mark.slow
def test_full_disk_while_writing_is_a_clear_error_and_what_was_stored_is_intact(own_store, tiny):
    (run,) = compute([tiny()])
    before = digest(run.folder)
    limited = script(f"""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))       # no file may grow larger, as on a full disk
    compute([{BIG}])
    """)
    _, errors = limited.communicate(timeout=120)
    assert limited.returncode != 0
    assert "could not write" in errors
    assert "what was stored before is intact" in errors
    assert digest(run.folder) == before
    assert stored() == [run.folder]
    assert not list((own_store / "runs").rglob("*.part"))


def test_writing_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.arange(3)}, {"n": 1})
    with pytest.raises(TypeError):
        write_tensors(path, {"x": torch.arange(4)}, {"n": object()})
    tensors, meta = read_tensors(path)
    assert tensors["x"].tolist() == [0, 1, 2]
    assert meta == {"n": 1}
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"a": object()})
    assert {f.name for f in tmp_path.iterdir() if f.is_file()} == {"a.safetensors"}


def test_equal_tensors_make_equal_bytes(tmp_path):
    for name in "ab":
        shared = torch.arange(5.0)
        write_tensors(tmp_path / name, {"x": shared, "y": shared, "e": torch.empty(0)}, {"k": [1, 2], "a": "b"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_runs_of_other_code_are_named_and_computed_anew(tiny, monkeypatch):
    (old,) = compute([tiny()])
    monkeypatch.setattr(runs, "code_of", lambda config: "other")
    with pytest.warns(UserWarning, match="1 stored runs were computed by other code"):
        (new,) = compute([tiny()])
    assert (old.provenance["code"], new.provenance["code"]) == (runs.code_hash(), "other")
    assert digest(new.folder) == digest(old.folder)


def test_a_folder_name_says_what_is_inside(tiny):
    assert folder_of(tiny(method="cfol", objective="trades", seed=3)).name.startswith("digits-trades-cfol-s3-")
    with pytest.raises(FileNotFoundError):
        Run.load(folder_of(tiny()))


# -- runs that come from other runs -----------------------------------------------------------------------------------


def test_a_run_starts_from_its_parents_weights(tiny):
    parent = tiny(method="cfol", seed=5)
    (still,) = compute([tiny(parent=parent, epochs=1, lr=1e-12)])
    assert whole(folder_of(parent))  # computed on the way
    (first,) = compute([parent])
    for a, b in zip(first.model("last").parameters(), still.model("last").parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    (moved,) = compute([tiny(parent=parent, epochs=1)])
    assert not torch.equal(moved.model("last")[1][0].weight, first.model("last")[1][0].weight)
    assert moved.config.parent.seed == 5
    assert folder_of(tiny(parent=parent)) != folder_of(tiny(parent=tiny(method="cfol", seed=6)))


def test_a_run_learns_from_images_remade_by_its_parent(tiny):
    """D_det shows every class the images of the one before it: judged on real ones, such a network is mostly wrong."""
    parent = tiny(objective="clean", epochs=20, train_limit=None)
    remade = {"name": "d_det", "eps": 0.6, "step": 0.1, "steps": 10}
    (wrong,) = compute([parent.model_copy(update={"parent": parent, "remake": remade})])
    (right,) = compute([parent])
    again, seen = wrong.config.model_copy(update={"seed": 3}), []
    runs._work(again.model_dump_json(), str(folder_of(again)), report=lambda *at: seen.append(at))
    done, totals = zip(*seen, strict=True)
    training = 20 * (len(prepare(again)[0]) // again.batch_size)
    remaking = totals[0] - training
    assert set(totals) == {training + remaking}
    assert remaking == pytest.approx(training / 20 * 10 * 2 / 3, rel=0.1)  # 10 steps of 2 passes, a step has 3
    assert list(done) == sorted(done)
    assert done[-training - 1] <= remaking < done[-training]
    assert done[-1] == totals[0]
    assert (right.outcomes["last"].correct("clean")).mean() > 0.85
    assert (wrong.outcomes["last"].correct("clean")).mean() < 0.5
    with pytest.raises(ValueError, match="no option 'radius'"):
        compute([tiny(parent=tiny(), remake={"name": "d_det", "radius": 1})])
    with pytest.raises(ValueError, match="did you mean 'matched'"):
        compute([tiny(parent=tiny(), remake="match")])


def test_a_parent_that_fails_stops_its_children_alone(tiny):
    bad = tiny(lr=1e30, dtype="float32", seed=7)  # it diverges
    with pytest.raises(RunsFailed, match="its parent failed") as failed:
        compute([tiny(parent=bad, epochs=1, dtype="float32"), tiny(seed=1)])
    assert [r.config.seed for r in failed.value.runs] == [1]


def test_what_a_child_cannot_do_is_refused_before_its_parent_is_trained(tiny):
    parent = tiny(seed=8)
    with pytest.raises(ValueError, match="batch_size=500"):
        compute([tiny(parent=parent, batch_size=500)])
    assert not whole(folder_of(parent))


def test_a_run_that_collapses_is_kept_and_warned_of(tiny):
    settings = {"method": {"name": "cfol", "drift": 1e5}, "epochs": 3}
    for _ in ("computed", "loaded"):
        with pytest.warns(Diverging, match="2 of these runs diverged") as caught:
            runs = compute([tiny(**settings), tiny(**settings, seed=1), tiny(epochs=12, eps=0.02)])
        (told,) = [str(w.message) for w in caught if "of these" in str(w.message)]  # beside those of single runs
        assert all(run.folder.name in told for run in runs[:2])
        assert [bool(run.warnings) for run in runs] == [True, True, False]
        assert "epoch 1: CFOL's distribution has collapsed" in runs[0].warnings[0]
        assert runs[0].curve("p").iloc[-1].max() > 0.5

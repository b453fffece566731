"""Beyond one process: runs on a cluster, and a run on several devices."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cfol_nb import distributed, executors, files
from cfol_nb.attacks import as_float, pgd
from cfol_nb.config import RunConfig
from cfol_nb.data import limit, load, split
from cfol_nb.methods import METHODS
from cfol_nb.runs import FILES, RunsFailed, compute, judge, stored
from cfol_nb.suite import configurations, suite
from cfol_nb.train import new_model, train

TINY = {"model": {"name": "mlp", "width": 4}, "epochs": 1, "train_limit": 24, "test_limit": 3, "steps": 1}
MARGIN = {"margin": {"eps": 0.1, "step": 0.05, "steps": 1, "loss": "margin"}}
pytestmark = pytest.mark.filterwarnings("ignore::cfol_nb.train.Diverging")


def values(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES if name != "provenance.json"]


def images(root: Path) -> None:
    for i in range(40):
        path = root / ("cat", "owl")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


# -- sweeps on a cluster -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray with two nodes of one processor, each with a run store of its own."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    root = tmp_path_factory.mktemp("cluster")
    # what a worker imports is this package, wherever the test was started
    path = os.pathsep.join([str(Path(files.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

    def node(name: str) -> dict:
        own = {"CFOL_NB_RUNS": str(root / name), "CFOL_NB_DATA": str(root / name / "data"), "PYTHONPATH": path}
        return {"num_cpus": 1, "env_vars": own, "include_dashboard": False, "object_store_memory": 10**8}

    made = Cluster()
    try:
        made.head = made.add_node(**node("a"))
        made.root, made.second = root, made.add_node(**node("b"))
    except Exception as error:  # Ray gives itself 30 s, after which its parts die one of another
        made.shutdown()
        pytest.skip(f"Ray did not start on this busy machine: {error}")
    yield made
    made.shutdown()


def where(cluster) -> dict[str, list[str]]:
    """Which runs each node has stored."""
    return {n: sorted(p.parent.name for p in (cluster.root / n / "store").glob("*/run.json")) for n in "ab"}


@pytest.mark.slow
def test_eight_runs_on_two_nodes_are_those_of_this_machine(cluster, tmp_path, monkeypatch):
    configs = [RunConfig(**TINY, seed=s, method=m) for s in range(4) for m in ("erm", "cfol")]
    configs[7] = RunConfig(**TINY, seed=7, parent=configs[0])
    text = f"ray:{cluster.address}"
    runs = compute(configs, text)
    judged = judge(runs[:2], MARGIN, executor=text)
    here = [values(r.folder) for r in runs]
    there = where(cluster)
    assert set(there["a"] + there["b"]) == {r.folder.name for r in runs}
    assert min(map(len, there.values())) >= 1
    assert {r.folder.parent for r in runs} == {tmp_path / "runs" / "store"}
    monkeypatch.setenv("CFOL_NB_RUNS", str(tmp_path / "alone"))
    alone = [run for c in configs for run in compute([c])]
    assert [values(r.folder) for r in alone] == here
    for a, b in zip(judged, judge(alone[:2], MARGIN), strict=True):
        np.testing.assert_array_equal(a.predictions["margin"], b.predictions["margin"])


@pytest.mark.slow
def test_what_a_worker_lacks_or_has_otherwise_is_said_in_a_sentence(cluster, tmp_path, monkeypatch):
    images(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    lacking = RunConfig(**{**TINY, "dataset": "imagefolder:pets", "batch_size": 8, "dtype": "float64", "device": "cpu"})
    text = f"ray:{cluster.address}"
    with pytest.raises(RunsFailed, match=r"on worker .*: FileNotFoundError: no folder pets \(looked in") as failed:
        compute([lacking, RunConfig(**TINY, seed=20)], text)
    assert [r.config.seed for r in failed.value.runs] == [20]
    monkeypatch.setattr("cfol_nb.runs.__version__", "0.0.9")
    with pytest.raises(RunsFailed, match=r"on worker .* cfol-nb is [\d.]+ .*, here 0\.0\.9 .*: install the same"):
        compute([RunConfig(**TINY, seed=21)], text)
    assert len(stored()) == 1


@pytest.mark.slow
def test_who_asked_may_die_and_ask_again(cluster, tmp_path):
    settings = repr({**TINY, "epochs": 60})
    body = f"""
        from cfol_nb.config import RunConfig
        from cfol_nb.runs import compute
        runs = compute([RunConfig(**{settings}, seed=s) for s in range(4)], "ray:{cluster.address}")
        print(len(runs))
    """

    def ask() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(body)], stdout=subprocess.PIPE, text=True)

    first = ask()
    while not stored():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert 1 <= len(stored()) < 4
    kept = {f: values(f) for f in stored()}
    again = ask()
    assert again.communicate(timeout=120)[0] == "4\n"
    assert len(stored()) == 4
    assert all(values(f) == v for f, v in kept.items())


@pytest.mark.slow
def test_a_node_that_dies_costs_no_run(cluster):
    """A run of the node that is killed is done again on the other. (The last test of the cluster.)"""
    configs = [RunConfig(**{**TINY, "epochs": 60}, seed=30 + s) for s in range(4)]

    def kill() -> None:
        while not list((cluster.root / "b").glob("store/*s3*/progress")):
            time.sleep(0.05)
        cluster.remove_node(cluster.second, allow_graceful=False)

    (thread := threading.Thread(target=kill)).start()
    runs = compute(configs, f"ray:{cluster.address}")
    thread.join()
    assert [r.config.seed for r in runs] == [30, 31, 32, 33]
    assert len(stored()) == 4
    assert list((cluster.root / "b").glob("store/*s3*/progress"))  # it was at work
    there = where(cluster)
    assert {r.folder.name for r in runs} - set(there["b"]) <= set(there["a"])


@pytest.mark.slow
def test_slurm_s_local_jobs(tmp_path):
    pytest.importorskip("submitit")
    configs = configurations("digits", ["erm", "cfol"], 1, **TINY)
    done = list(suite(configs, 10, tmp_path / "results", executor="slurm:local"))
    assert [r.config.method["name"] for r in done] == ["erm", "cfol"]
    assert len(list((tmp_path / "results").glob("*.json"))) == 2
    assert list((tmp_path / "runs" / "slurm").iterdir())
    with pytest.raises(RunsFailed, match="FloatingPointError: training diverged"):
        compute([RunConfig(**{**TINY, "lr": 1e30, "epochs": 3})], "slurm:local")


def test_executors_that_cannot_be_are_refused_in_a_sentence(monkeypatch):
    for text, said in {
        "rya": "did you mean 'ray'",
        "ray:127.0.0.1:1": "no Ray cluster at 127.0.0.1:1: Connection refused",
        "ray?cpus": "executor option",
        "ray?colour=red": r"has no option 'colour' \(it has cpus and gpus\)",
        "ray?cpus=many": "cpus=many is no number of them",
        "slurm:remote": "unknown cluster of slurm 'remote'",
        "slurm": "srun",
        "slurm:local?colour=red": "colour",
    }.items():
        with pytest.raises(ValueError, match=said):
            executors.connect(text)
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"ray is not installed: pip install 'cfol-nb\[ray\]'"):
        executors.connect("ray")
    with pytest.raises(ValueError, match=r"submitit is not installed: pip install 'cfol-nb\[slurm\]'"):
        executors.connect("slurm")


# -- one run on several devices ----------------------------------------------------------------------------------------


def kinds() -> dict[str, dict]:
    """Every method that needs no other run, and what else takes part in a step. Without a radius nothing is drawn but
    the batches."""
    made = {}
    for name, method in METHODS.items():
        if not method.needs_parent and "teacher" not in method.asks:
            made[name] = {"method": name, "objective": method.needs_objective or "at"}
    made |= {"trades": {"objective": "trades", "method": "cfol"}, "ensemble": {"ensembling": {}}, "awp": {"awp": 0.01}}
    some = {"model": {"name": "mlp", "width": 8}, "steps": 1, "eps": 0.0, "batch_size": 24, "epochs": 2, "ema": 0.9}
    made = {name: {**some, **own} for name, own in made.items()}
    made["robal"]["model"] = {**some["model"], "head": "cosine"}
    for name in ("erm", "cfol"):
        made[name]["epochs"] = 8  # 56 steps
    return made


NOISY = {"model": {"name": "mlp", "width": 8}, "steps": 3, "batch_size": 24, "epochs": 2}
RANKS = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from cfol_nb import distributed
from cfol_nb.config import RunConfig
from cfol_nb.data import limit, load, split
from cfol_nb.train import train
from tests.test_scale import NOISY, block, kinds, own_loop

torch.set_num_threads(1)
images, held = split(limit(load("digits").train, 24), 0.2)
found = {}
for name, settings in {**kinds(), "noisy": NOISY}.items():
    config = RunConfig(**settings, devices=int(sys.argv[2]))
    with distributed.group(config):
        done = train(config, images, held)
        found[name] = {"weights": done.weights["last"], "ema": done.weights.get("ema", {}), "history": done.history}
found["p"] = own_loop(block())
torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
"""


def block() -> str:
    """The loop of docs/scaling.md."""
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    return re.findall(r"```py\n(.*?)```", text, re.S)[0]


def own_loop(code: str) -> torch.Tensor:
    """(K,) p after the loop, with a linear network on made-up images."""
    torch.manual_seed(0)
    labels = torch.arange(200) % 4
    model = torch.nn.Linear(6, 4)
    names = {"labels": labels, "images": torch.randn(200, 6) + labels.unsqueeze(1) / 3, "steps": 40, "batch": 16}
    names |= {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "attack": lambda x, y: x}
    exec(code, names)
    return names["sampler"].p


@pytest.mark.slow
@pytest.mark.parametrize("n", [2])
def test_several_processes_are_one(n, tmp_path):
    """In float64: what every method says of the classes, and the weights, against a run in one process."""
    (tmp_path / "ranks.py").write_text(RANKS)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    subprocess.run([*words, tmp_path / "ranks.py", tmp_path, str(n)], env=env, check=True, timeout=500)
    ranks = [torch.load(tmp_path / f"{i}.pt") for i in range(n)]
    images, held = split(limit(load("digits").train, 24), 0.2)
    for name, settings in kinds().items():
        one, many = train(RunConfig(**settings), images, held), [r[name] for r in ranks]
        for said in zip(one.history, *(m["history"] for m in many), strict=True):
            for key, value in said[0].items():
                if key != "warnings":
                    for other in said[1:]:
                        np.testing.assert_allclose(other[key], value, 0, 1e-12, err_msg=f"{name} {key}")
        for kind, key in (("last", "weights"), ("ema", "ema")):
            for k, v in one.weights[kind].items():
                for m in many:
                    torch.testing.assert_close(m[key][k], v, rtol=0, atol=1e-9, msg=f"{name} {k}")
                assert torch.equal(many[0][key][k], many[-1][key][k])

    config = RunConfig(**NOISY)
    model, size = new_model(config, images), len(images)
    x, y = as_float(images.images, torch.float64, "cpu"), images.labels
    optimizer = torch.optim.SGD(model.parameters(), config.lr, 0.9, weight_decay=config.weight_decay)
    shuffle, each = torch.Generator().manual_seed(0), 24 // n
    noise = [torch.Generator().manual_seed(r << 32) for r in range(n)]
    steps = [order[i : i + 24] for _ in range(2) for order in [torch.randperm(size, generator=shuffle)]
             for i in range(0, size - 23, 24)]  # fmt: skip
    for t, index in enumerate(steps):
        optimizer.param_groups[0]["lr"] = config.lr * config.schedule(t / len(steps))
        parts = [
            pgd(model, x[i], y[i], config.eps, config.step, 3, generator=g)
            for i, g in zip(index.split(each), noise, strict=True)
        ]
        model.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.cat(parts)), y[index]).backward()
        optimizer.step()
    for k, v in model.state_dict().items():
        torch.testing.assert_close(ranks[0]["noisy"]["weights"][k], v, rtol=0, atol=1e-9)

    alone = block().replace("dist.get_rank(), dist.get_world_size()", "0, 1").replace("dist.all_reduce(wrong)", "")
    alone = alone.replace("torch.nn.parallel.DistributedDataParallel(model)", "model")
    p = own_loop(alone)
    assert p.max() - p.min() > 0.01
    assert all(torch.equal(r["p"], ranks[0]["p"]) for r in ranks)
    torch.testing.assert_close(ranks[0]["p"], p, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_run_on_two_devices_that_is_stopped_goes_on_to_the_same_result(tmp_path, monkeypatch):
    given = {"epochs": 40, "train_limit": 24, "test_limit": 3, "steps": 2, "batch_size": 24, "model.name": "mlp"}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cfol_nb", "train"]
    words += [w for k, v in given.items() for w in ("-s", f"{k}={v}")]
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    store = tmp_path / "runs" / "store"
    while not list(store.glob("*/checkpoint.safetensors")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert not stored()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.count("seconds") + done.stdout.count("s of training") == 1  # one rank speaks
    (folder,) = stored()
    there = values(folder)
    monkeypatch.setenv("CFOL_NB_RUNS", str(tmp_path / "again"))
    config = {k: v for k, v in given.items() if "." not in k}
    (run,) = compute([RunConfig(**config, model="mlp", method="cfol", devices=2)])  # which starts the processes itself
    assert run.folder.name == folder.name
    assert values(run.folder) == there


def test_a_run_on_another_number_of_processes_is_refused(monkeypatch, digits):
    with pytest.raises(ValueError, match="batch_size=64 cannot be divided by devices=3"):
        RunConfig(devices=3)
    config = RunConfig(**TINY, devices=2)
    assert RunConfig(**TINY, devices=1).hash() == RunConfig(**TINY).hash() != config.hash()
    with pytest.raises(ValueError, match=r"devices=2, but this run has 1 process\(es\)"):
        train(config, *split(digits.train, 0.2))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"devices=2, but 4 process\(es\) were started"):
        distributed.group(config).__enter__()

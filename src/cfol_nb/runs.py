"""The run store: a run is a value of its configuration; it is loaded if it is there, else computed, once.

A run's folder under runs/store/ holds `run.json` (configuration, history, integer counts), `outcomes.safetensors`,
`weights.safetensors` and `provenance.json`; the JSONs hold the digests of the tensors. `run.json` comes last: without
it the run is not there. A run that other code computed is computed anew; until that is whole, the old one stays.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from cfol_nb import __version__, distributed, executors
from cfol_nb.attacks import one_thread, repeating
from cfol_nb.config import RunConfig, as_attack, choose, method_parts
from cfol_nb.data import DataSet, ImageSet, Skipped, fingerprint, prepare
from cfol_nb.evaluate import evaluate
from cfol_nb.features import REMAKES, remake_steps
from cfol_nb.files import (
    ANEW,
    CHECKOUT,
    ROOT,
    Corrupt,
    Unsigned,
    alone,
    as_name,
    bar,
    code_hash,
    digest,
    read_json,
    read_tensors,
    replacing,
    runs_dir,
    sync,
    write_json,
    write_tensors,
)
from cfol_nb.launch import launch
from cfol_nb.methods import METHODS
from cfol_nb.models import MODELS
from cfol_nb.objectives import OBJECTIVES
from cfol_nb.outcomes import Outcomes
from cfol_nb.samplers import LargeStep
from cfol_nb.train import Diverging, _listening, check, code_of, make_model, new_model, step_passes, train


class RunsFailed(RuntimeError):
    """Some runs failed; the message names each with its reason. `runs`: those that did not, which are stored."""

    def __init__(self, reasons: Mapping[str, str | BaseException], runs: list[Run]):
        self.runs = runs
        self.__cause__ = next((r for r in reasons.values() if isinstance(r, BaseException)), None)  # its traceback
        super().__init__(
            f"{len(reasons)} of {len(reasons) + len(runs)} runs failed{', the others are stored' * bool(runs)}:\n"
            + "\n".join(f"  {name}: {r if isinstance(r, str) else _reason(r)}" for name, r in reasons.items())
        )


def correct(outcomes: Outcomes) -> dict[str, list[int]]:
    """attack name -> number of images of each class that are classified rightly."""
    return {a: outcomes.counts(a)[0].tolist() for a in outcomes.predictions}


def agree(stored: Mapping, outcomes: Mapping[str, Outcomes]) -> None:
    """Raises ValueError unless the classes and counts that were stored are those of the predictions."""
    for which, o in outcomes.items():
        if list(o.class_names) != stored["classes"] or o.counts("clean")[1].tolist() != stored["n"]:
            raise ValueError("its classes are not those of the predictions")
        if any(o.counts(attack)[0].tolist() != right for attack, right in stored["correct"][which].items()):
            raise ValueError("its counts are not those of the predictions")


@dataclass(frozen=True)
class Run:
    """A finished run. outcomes: on the test split, for the "last" and "selected" weights (and "ema", "averaged")."""

    config: RunConfig
    folder: Path
    history: list[dict]
    selected_epoch: int
    outcomes: dict[str, Outcomes]
    provenance: dict

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the run at its end, with the epoch in which it was first seen."""
        told = {text: e["epoch"] for e in reversed(self.history) for text in e.get("warnings", ())}
        return [f"epoch {told[text]}: {text}" for text in self.history[-1].get("warnings", ())]

    @classmethod
    def load(cls, folder: Path) -> Run:
        """A stored run. Raises FileNotFoundError if it is not whole, Corrupt for a file that was changed or is of
        another run."""
        stored, origin = read_json(folder / "run.json"), read_json(folder / "provenance.json")
        tensors, meta = read_tensors(folder / "outcomes.safetensors")
        digests, files = {name: digest(folder / name) for name in TENSORS}, stored.get("files", {})
        odd = [name for name in TENSORS if digests[name] != files.get(name)]
        if odd or origin.get("files") != files:
            raise Corrupt(f"{folder / (odd or ['provenance.json'])[0]} is not that of the run in run.json; {ANEW}")
        try:
            outcomes = {
                w: Outcomes.from_tensors(
                    {k.removeprefix(f"{w}."): v for k, v in tensors.items()},
                    {**meta, "checks": meta.get("checks", {}).get(w, {})},
                )
                for w in stored["correct"]
            }
            agree(stored, outcomes)
            config = RunConfig(**stored["config"])
            if (name := name_of(config, origin["data"])) != folder.resolve().name:
                raise ValueError(f"its configuration is that of {name}")
            return cls(config, folder, stored["history"], stored["selected_epoch"], outcomes, origin)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise Corrupt(
                f"{folder / 'run.json'} was changed ({reason}); delete the folder to compute it anew"
            ) from error

    def model(self, which: str = "selected") -> nn.Module:
        """The trained network in eval mode, on the run's device if it is here; which: see `Trained`."""
        path = self.folder / "weights.safetensors"
        tensors, meta = read_tensors(path)
        if digest(path) != self.provenance["files"][path.name]:
            raise Corrupt(f"{path} is not that of the run in run.json; {ANEW}")
        which = choose("weights of this run", which, {k.partition(".")[0] for k in tensors})
        state = {k.removeprefix(f"{which}."): v for k, v in tensors.items() if k.startswith(f"{which}.")}
        model = make_model(self.config, **meta["build"])
        model.load_state_dict(state)
        return model.to("cuda" if self.config.device == "cuda" and torch.cuda.is_available() else "cpu").eval()

    @property
    def weights_digest(self) -> str:
        """That of the file of the weights, by which verdicts say that they are on them."""
        return self.provenance["files"]["weights.safetensors"]

    @property
    def verdicts(self) -> Path:
        """The folder of what `judge` finds."""
        return self.folder

    def data(self) -> tuple[ImageSet, ImageSet, DataSet]:
        """`data.prepare` for the run. Raises ValueError if its folder of images is not as it was."""
        return _prepared(self.config, self.provenance.get("data", ""))

    def curve(self, name: str) -> pd.DataFrame:
        """A trace by epoch (rows) and class (columns): "p", or the held-out accuracies "clean" and "robust"; "trained":
        that of the training batches, where the training attack is a single step."""
        of = {"clean": "n", "robust": "n", "trained": "drawn"}.get(name)
        rows = {e["epoch"]: np.array(e[name]) / (np.maximum(e[of], 1) if of else 1) for e in self.history if name in e}
        if not rows:
            raise KeyError(f"the history of {self.folder.name} has no {name!r} (it has: {', '.join(self.history[-1])})")
        return pd.DataFrame.from_dict(rows, orient="index", columns=self.outcomes["last"].class_names).rename_axis(
            "epoch"
        )


def resolve(config: RunConfig, cuda: bool | None = None) -> RunConfig:
    """The configuration, and those of its parent and teacher, with the device decided. cuda: whether runs have a GPU,
    by default whether there is one here."""
    update: dict = {k: resolve(run, cuda) for k, run in config.sources().items()}
    if config.device == "auto":
        update["device"] = "cuda" if (torch.cuda.is_available() if cuda is None else cuda) else "cpu"
    return config.model_copy(update=update)


def name_of(config: RunConfig, data: str) -> str:
    """The name of a run whose device is decided; data: the state of its folder of images, from `data.fingerprint`."""
    state = data + "".join(name_of(run, data) for run in config.sources().values())
    key = hashlib.sha256((config.key() + state).encode()).hexdigest()[:16]
    images = Path(config.dataset.removeprefix("imagefolder:")).name
    words = (images, config.objective["name"], config.method["name"], f"s{config.seed}", key)
    return "-".join(filter(None, map(as_name, words)))


def folder_of(config: RunConfig) -> Path:
    """Where the run of a configuration lies: its hash, which for a folder of images includes the folder's state."""
    return runs_dir() / "store" / name_of(resolve(config), fingerprint(config.dataset))


def same_images(dataset: str, data: str) -> None:
    """Raises ValueError if a folder of images is in another state than `data`, or another folder of that name."""
    if fingerprint(dataset) != data:
        raise ValueError(
            f"the images of {dataset} are not those of the run: files were added, removed or changed since, or it is "
            "another folder that has this name from here; put them back as they were, or train anew"
        )


def _prepared(config: RunConfig, data: str) -> tuple[ImageSet, ImageSet, DataSet]:
    """`prepare`, of this state of the folder of images and no other."""
    same_images(config.dataset, data)
    found = prepare(config)
    same_images(config.dataset, data)
    return found


TENSORS = ("outcomes.safetensors", "weights.safetensors")
FILES = ("run.json", "provenance.json", *TENSORS)


def whole(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    return all((folder / name).exists() for name in FILES)


def current(folder: Path, config: RunConfig) -> bool:
    """Whether a folder holds a finished run of this configuration that the code as it is now computed."""
    try:
        return whole(folder) and read_json(folder / "provenance.json").get("code") == code_of(config)
    except Unsigned:  # of an earlier version
        return False


# -- provenance --------------------------------------------------------------------------------------------------------


def _git(*words: str) -> str | None:
    if not CHECKOUT:
        return None
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with those of its instructions that decide its speed here."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", cpu)
    has = [f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f in cpu]
    return f"{name[1] if name else platform.machine()} with {', '.join(has) or 'no wide vectors'}"


def provenance(device: str, code: str | None = None) -> dict:
    """What a reader needs to know where numbers come from. code: by default a hash of what every run passes through."""
    status = _git("status", "--porcelain", "--", ".", ":!results")  # what is published later changes no code
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "code": code or code_hash(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_memory(device: str) -> int:
    """MiB that this process has had at most: on the GPU for CUDA, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


# -- computing ---------------------------------------------------------------------------------------------------------


def _work(
    config_json: str,
    folder: str,
    checkpoint_every: int = 1,
    report: Callable[[int, int], None] | None = None,
    *,
    anew: bool = False,
) -> None:
    """Compute one run into its folder, unless another process did so in the meantime or, with `anew`, in any case."""
    config, path = RunConfig.model_validate_json(config_json), Path(folder)
    if config.devices > 1 and distributed.launched() == 1:
        launch(config, config_json, folder, str(checkpoint_every), str(int(anew)))
        return
    kept = _Progress(path / "progress")

    def both(done: int, total: int) -> None:
        if not distributed.rank():
            kept(done, total)
        if report:
            report(done, total)

    with threads(config), distributed.group(config):
        lead = not distributed.rank()  # which writes
        with alone(path / ".lock", path.name) if lead else contextlib.nullcontext():
            if distributed.first(lead and (anew or not current(path, config))):
                _compute(config, path, checkpoint_every, both)
            distributed.first(None)  # the others go on once all is written


def threads(config: RunConfig) -> contextlib.AbstractContextManager:
    """One thread while a float64 run on the CPU is computed."""
    return one_thread(config.dtype == "float64" and config.device != "cuda")


class _Progress:
    """Steps done and in all, in a file that the process which shows the bar reads."""

    def __init__(self, path: Path):
        self.path, self.next = path, 0.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self.next:
            self.path.write_text(f"{done} {total}")
            self.next = time.monotonic() + 0.5

    @staticmethod
    def read(path: Path) -> float:
        try:
            done, total = path.read_text().split()
            return int(done) / int(total)
        except (OSError, ValueError):
            return 0.0


def _compute(config: RunConfig, folder: Path, checkpoint_every: int, report: Callable[[int, int], None]) -> None:
    state = fingerprint(config.dataset)
    if name_of(config, state) != folder.name:
        raise ValueError(f"the images of {config.dataset} changed after the run was asked for: ask again")
    origin = {**provenance(config.device, code_of(config)), "data": state}
    train_images, held, data = _prepared(config, state)
    models = {k: Run.load(folder_of(r)).model("last").to(config.device) for k, r in config.sources().items()}
    parent = models.get("parent")
    total, remade = len(train_images) // config.batch_size * config.epochs, 0.0
    per_step = 2 / (step_passes(config) * config.batch_size)  # of an image, in steps of the training
    ahead = math.ceil(per_step * remake_steps(config.remake) * len(train_images))
    if config.remake:

        def show(done: int) -> None:
            nonlocal remade
            remade += per_step * done
            report(int(remade), ahead + total)

        own, start = {k: v for k, v in config.remake.items() if k != "name"}, time.perf_counter()
        with repeating():
            make = REMAKES[config.remake["name"]]
            train_images = make(parent, train_images, seed=config.seed, progress=show, **own)
        remaking = time.perf_counter() - start
    checkpoint = folder / "checkpoint.safetensors"
    trained = train(
        config,
        train_images,
        held,
        crop=data.crop,
        flip=data.flip,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=lambda done, total: report(ahead + done, ahead + total),
        initial=parent.state_dict() if parent is not None and not config.remake else None,
        teacher=models.get("teacher"),
    )
    start = time.perf_counter()
    model, found = new_model(config, train_images).to(config.device), {}
    same = trained.selected_epoch == config.epochs  # the same weights as the last ones
    kinds = [w for w in trained.weights if not (same and w == "selected")]
    for which in kinds[distributed.rank() :: config.devices]:
        model.load_state_dict(trained.weights[which])
        found[which] = evaluate(
            model, data.test.images, data.test.labels, config.attacks, class_names=data.class_names, seed=config.seed
        )
    found = {which: outcomes for part in distributed.every(found) for which, outcomes in part.items()}
    found = {which: found[which if which in kinds else "last"] for which in trained.weights}
    if distributed.rank():
        return
    new = folder / ".new"  # all of it, before anything that is stored gives way
    write_tensors(
        new / "outcomes.safetensors",
        {f"{w}.{k}": v for w, o in found.items() for k, v in o.tensors().items()},
        {**found["last"].meta(), "checks": {w: o.meta()["checks"] for w, o in found.items()}},
    )
    write_tensors(
        new / "weights.safetensors",
        {f"{w}.{k}": v for w, weights in trained.weights.items() for k, v in weights.items()},
        {"build": {"num_classes": len(data.class_names), "channels": data.test.images.shape[1]}},
    )
    write_json(
        new / "run.json",
        {
            "files": (files := {name: digest(new / name) for name in TENSORS}),
            "config": config.model_dump(mode="json"),
            "history": trained.history,
            "selected_epoch": trained.selected_epoch,
            "classes": list(data.class_names),
            "n": found["last"].counts("clean")[1].tolist(),
            "correct": {w: correct(o) for w, o in found.items()},
        },
    )
    write_json(
        new / "provenance.json",
        {
            **origin,
            "files": files,
            "seconds": {
                **({"remaking": round(remaking, 2)} if config.remake else {}),
                "training": round(trained.seconds, 2),
                "looking": round(trained.looking, 2),
                "evaluation": round(time.perf_counter() - start, 2),
            },
            "images_per_second": round(total * config.batch_size / (trained.seconds - trained.looking), 1),
            "peak_memory_mib": peak_memory(config.device),
        },
    )
    _replace(folder, new)


def _replace(folder: Path, new: Path) -> None:
    """The files of a whole run take the places of an old one's, whose verdicts go unless the weights are the same. Who
    dies in the middle leaves no run, never a mixture."""
    (folder / "run.json").unlink(missing_ok=True)
    for verdict in folder.glob("judged-*.safetensors"):
        try:
            kept = read_tensors(verdict)[1]["weights"] == digest(new / "weights.safetensors")
        except (Corrupt, KeyError):
            kept = False
        if not kept:
            verdict.unlink()
    for name in sorted(FILES, key="run.json".__eq__):  # which comes last
        os.replace(new / name, folder / name)
    sync(folder)
    shutil.rmtree(new)
    for leftover in ("checkpoint.safetensors", "progress"):
        (folder / leftover).unlink(missing_ok=True)


def _start_worker(devices, threads: int, environment: dict[str, str], interrupt: signal.Handlers) -> None:
    """In a local process: one device of its own, and an end when its parent has ended."""
    signal.signal(signal.SIGINT, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked in the server
    for told in (Diverging, Skipped):  # the caller of `compute` hears of it
        warnings.simplefilter("ignore", told)
    warnings.simplefilter("ignore", LargeStep)  # which is of no harm in itself
    os.environ.clear()  # that of the server, which may be older than a change
    os.environ.update(environment)
    torch.set_num_threads(threads)
    if devices is not None:
        torch.cuda.set_device(devices.get())

    def follow() -> None:
        multiprocessing.parent_process().join()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody waits for the result, and need not hear of that
        while True:  # the first stops a training run, which writes its checkpoint; the next ends the process
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _main_not_imported() -> Iterator[None]:
    """New processes do not import the user's script, so that it needs no `if __name__ == "__main__"`."""
    main = sys.modules["__main__"]
    saved = {k: main.__dict__.pop(k) for k in ("__file__", "__spec__") if k in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(saved)


def _threads(configs: Sequence[RunConfig]) -> int:
    """Of each run: one if all are in float64, else those that torch has here."""
    return 1 if all(c.dtype == "float64" for c in configs) else torch.get_num_threads()


def _pool(configs: Sequence[RunConfig]) -> ProcessPoolExecutor | None:
    """Local processes for these runs, or None if they are better computed here, one after another.

    On the CPU in float64 one process of one thread per core; otherwise a run on the CPU has the threads that torch has,
    by default one per core, so that its numbers do not depend on how many runs were asked for: with OMP_NUM_THREADS=1
    as many run side by side as there are cores. On CUDA one process per device.
    """
    makers = [MODELS[c.model["name"]] for c in configs] + [OBJECTIVES[c.objective["name"]] for c in configs]
    makers += [METHODS[part["name"]] for c in configs for part in method_parts(c.method)]
    if not all(m.__module__.startswith("cfol_nb.") for m in makers):
        return None  # registered by the user's own code, which a new process lacks
    if distributed.launched() > 1:
        return None  # all of them belong to one run
    cuda = any(c.device == "cuda" for c in configs)
    each = _threads(configs)
    limit = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0)) // each
    workers = min(limit // max(c.devices for c in configs), len(configs))
    if workers < 2:
        return None
    context = multiprocessing.get_context("forkserver")  # workers begin with the libraries, not with this package,
    context.set_forkserver_preload(["torch", "torchvision", "pydantic", "pandas", "scipy.stats"])  # which may change
    resource_tracker.ensure_running()  # or the server does this, which unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server inherits it: Ctrl-C would break its
    try:  # imports; here it is only late
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with _main_not_imported():
        first = context.Process(target=int)
        try:
            first.start()  # returns once the libraries are there
        except BaseException:  # stopped meanwhile: the server would serve a parent that is gone, and say so
            with contextlib.suppress(ProcessLookupError):
                os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
            raise
        first.join()
    devices = context.Queue() if cuda else None
    for i in range(workers if cuda else 0):
        devices.put(i)
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a shell's background
    interrupt = signal.SIG_IGN if ignored else signal.SIG_DFL
    return ProcessPoolExecutor(workers, context, _start_worker, (devices, each, dict(os.environ), interrupt))


def _made(folder: Path) -> int:
    """When a folder's run was written, in nanoseconds; 0 if there is none."""
    return (folder / "run.json").stat().st_mtime_ns if whole(folder) else 0


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def compute(
    configs: Sequence[RunConfig],
    executor: Executor | str | None = None,
    *,
    checkpoint_every: int = 1,
    recompute: bool = False,
) -> list[Run]:
    """The runs of these configurations, in order: stored ones are loaded, missing ones computed in parallel.

    Those that were computed by other code (see `files.code_hash`) are computed anew; recompute: all of them are, but
    not their parents. What was stored stays until the new run is whole.
    executor: any `concurrent.futures.Executor`, or one by name (see `executors.connect`), by default the one that
    CFOL_NB_EXECUTOR names, else local processes.
    Its workers need this package in the same version, and the data; the run store they need not share.
    checkpoint_every: epochs between two checkpoints (0: none), from which an interrupted run goes on.
    Everything is checked before work starts: ValueError or FileNotFoundError for what cannot run. A run that fails does
    not stop the others: RunsFailed at the end names the reasons, and holds the runs that are whole.
    """
    if isinstance(executor := executors.chosen(executor), str):
        with executors.connect(executor, _threads(configs)) as pool:
            return compute(configs, pool, checkpoint_every=checkpoint_every, recompute=recompute)
    cuda = getattr(executor, "cuda", None)
    configs = [resolve(c, cuda) for c in configs]
    for config in configs:
        check(config, cuda)
    folders = {c.key(): folder_of(c) for c in configs}
    missing = {c.key(): c for c in configs if recompute or not current(folders[c.key()], c)}
    before = {k: _made(folders[k]) for k in missing}
    if stale := [] if recompute else [folders[k].name for k, made in before.items() if made]:
        warnings.warn(
            f"{len(stale)} stored runs were computed by other code than this (for example {stale[0]}): "
            "they are computed anew",
            stacklevel=2,
        )
    data = ("dataset", "image_size", "split_seed", "holdout", "train_limit", "test_limit", "imbalance", "without")
    for config in {str([getattr(c, f) for f in (*data, "crop", "batch_size")]): c for c in missing.values()}.values():
        images, _, _ = prepare(config)  # refuse bad data now, and decode once, not in every process
        if config.batch_size > len(images):
            raise ValueError(
                f"batch_size={config.batch_size} is larger than the training split of {len(images)} images"
            )
    reasons: dict[str, str | BaseException] = {}
    if sources := [(k, role, run) for k, c in missing.items() for role, run in c.sources().items()]:
        try:
            compute([run for *_, run in sources], executor, checkpoint_every=checkpoint_every)
        except RunsFailed as failed:
            reasons = {
                k: f"its {role} failed: {failed}" for k, role, run in sources if not current(folder_of(run), run)
            }
            missing = {k: c for k, c in missing.items() if k not in reasons}
    if missing:
        with bar(len(missing), "runs") as progress:
            jobs = {k: (c.model_dump_json(), str(folders[k]), checkpoint_every) for k, c in missing.items()}

            def share(key: str) -> float:
                done = _made(folders[key]) not in (0, before[key])
                return 1.0 if done else _Progress.read(folders[key] / "progress")

            def sent(key: str) -> tuple:
                sources = [Run.load(folder_of(run)) for run in missing[key].sources().values()]
                files = {k: v for run in sources for k, v in _parcel(run)[1].items()}
                return files, _compute_there, jobs[key][0], folders[key].name, checkpoint_every, recompute

            def keep(key: str, files: dict[str, bytes]) -> None:
                _take(folders[key], files)

            work = functools.partial(_work, anew=recompute)
            reasons |= _do_all(work, jobs, list(missing.values()), share, executor, progress, sent, keep)
    runs = []
    for key in (c.key() for c in configs):
        if key not in reasons:
            runs.append(Run.load(folders[key]))
    if amiss := {r.folder.name: "; ".join(r.warnings) for r in runs if r.warnings}:
        text = "\n".join(f"  {name}: {said}" for name, said in amiss.items())
        warnings.warn(Diverging(f"{len(amiss)} of these runs diverged (see Run.warnings):\n{text}"), stacklevel=2)
    if reasons:
        raise RunsFailed({folders[k].name: v for k, v in reasons.items()}, runs)
    return runs


def _do_all(
    work: Callable,
    jobs: dict[str, tuple],
    configs: list[RunConfig],
    share: Callable[[str], float],
    executor: Executor | None,
    progress,
    sent: Callable[[str], tuple],
    keep: Callable[[str, dict[str, bytes]], None],
) -> dict[str, str | BaseException]:
    """Call `work` with the arguments of every job, in processes where that pays; the reasons of those that failed.

    configs: of the jobs. share: how much of a job is done, 1 once its result is stored. sent: what an executor is given
    for a job, see `_there`. keep: stores what comes back from it.
    """
    own = executor is None
    if own and (executor := _pool(configs)) is None:
        reasons = {}
        for i, (key, args) in enumerate(jobs.items()):

            def show(done: int, total: int, i=i) -> None:
                progress.update(i + done / total - progress.n)

            try:
                work(*args, show)
            except Exception as error:
                reasons[key] = error
            progress.update(i + 1 - progress.n)
        return reasons

    reasons, todo = {}, list(jobs)

    def submit(key: str) -> Future:
        if own:
            return executor.submit(work, *jobs[key])
        teller = executor.teller(key) if hasattr(executor, "teller") else None
        return executor.submit(_there, (__version__, code_hash()), teller, *sent(key))

    try:
        for attempt in (1, 2):
            signals: list[int] = []
            try:  # a process that is half begun when its parent is stopped would end with a traceback
                with _main_not_imported() if own else contextlib.nullcontext(), _listening() as signals:
                    futures: dict[Future, str] = {submit(key): key for key in todo}
            finally:
                for number in signals[:1]:
                    signal.raise_signal(number)
            todo, waiting = [], set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    error, key = future.exception(), futures[future]
                    if isinstance(error, BrokenProcessPool) and own and attempt == 1:
                        todo.append(key)  # a process died, perhaps another job's: once more, from its checkpoint
                    elif error is not None:
                        reasons[key] = error
                    elif isinstance(future.result(), str):
                        reasons[key] = future.result()
                    elif not own:
                        try:
                            keep(key, future.result())
                        except OSError as full:
                            reasons[key] = full
                told = executor.shares() if hasattr(executor, "shares") else {}
                progress.update(sum(max(share(key), told.get(key, 0.0)) for key in jobs) - progress.n)
            if not todo:
                break
            executor = _pool(configs)
    except BaseException:
        for process in list(getattr(executor, "_processes", None) or {}).copy() if own else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        raise
    finally:
        if own:
            executor.shutdown(wait=True, cancel_futures=True)
    return reasons


# -- at a worker that may share nothing with who asks ------------------------------------------------------------------


def _there(version: tuple[str, str], teller, files: dict[str, bytes], work: Callable, *args) -> dict[str, bytes] | str:
    """What `work` stores, as files; or why there is nothing, in a sentence. files: what it needs, by their paths below
    the folder of runs. version: of the package that asks."""
    own, where = (__version__, code_hash()), f"on worker {platform.node()}"
    if own != tuple(version):
        return f"{where} cfol-nb is {'{} ({})'.format(*own)}, here {'{} ({})'.format(*version)}: install the same"
    try:
        for folder in {Path(path).parent for path in files}:
            _take(runs_dir() / folder, {Path(k).name: v for k, v in files.items() if Path(k).parent == folder})
        return work(*args, teller)
    except Exception as error:
        if not isinstance(error, ValueError | FileNotFoundError):
            traceback.print_exc()  # into the worker's log
        return f"{where}: {_reason(error)}"


def _parcel(run: Run) -> tuple[str, dict[str, bytes]]:
    """A stored or published run for `_there`: the path that `_load` takes there, and its files."""
    root, names = run.folder, FILES
    if root.suffix == ".json":
        from cfol_nb.suite import _weights

        root, names = root.parent, (root.name, str(_weights(root).relative_to(root.parent)))
    at = "sent" if root != run.folder else f"store/{root.name}"
    path = f"{at}/{run.folder.name}" if at == "sent" else at
    return path, {f"{at}/{name}": (root / name).read_bytes() for name in names}


def _take(folder: Path, files: Mapping[str, bytes]) -> None:
    """Files from elsewhere enter a folder, those of a run together and as `_compute` would put them; not again if they
    are there."""
    with alone(folder / ".lock", folder.name):
        if any(not (folder / k).exists() or (folder / k).read_bytes() != v for k, v in files.items()):
            run = files.keys() >= set(FILES)
            for name, content in files.items():
                with replacing((folder / ".new" if run else folder) / name) as part:
                    part.write_bytes(content)
            if run:
                _replace(folder, folder / ".new")


def _compute_there(config_json: str, name: str, checkpoint_every: int, anew: bool, report=None) -> dict[str, bytes]:
    config, folder = RunConfig.model_validate_json(config_json), runs_dir() / "store" / name
    if name_of(config, fingerprint(config.dataset)) != name:
        raise ValueError(f"the images of {config.dataset} are not those of who asks: copy them with their times")
    _work(config_json, str(folder), checkpoint_every, report, anew=anew)
    return {name: (folder / name).read_bytes() for name in FILES}


def _judge_there(run: str, which: str, name: str, attack: dict, report=None) -> dict[str, bytes]:
    path = _verdict(_load(runs_dir() / run), which, name, attack)
    _judge(str(runs_dir() / run), which, name, attack, str(path))
    return {path.name: path.read_bytes()}


# -- further attacks on stored weights ---------------------------------------------------------------------------------


def _judge(folder: str, which: str, name: str, attack: dict, path: str, report=None) -> None:
    run, path = _load(Path(folder)), Path(path)
    with alone(path.with_name(f".{path.name}.lock"), f"{run.folder.name} under {name}"):
        if _known(run, which, path):
            return
        origin, start = provenance(run.config.device, _judging(run)), time.perf_counter()
        test, state = run.data()[2].test, path.with_suffix(".state")
        how = {"class_names": test.class_names, "seed": run.config.seed, "folder": state}
        outcomes = evaluate(run.model(which), test.images, test.labels, {name: attack}, **how)
        asked = {"name": name, "asked": attack, "weights": run.weights_digest}
        seconds = round(time.perf_counter() - start, 2)
        write_tensors(path, outcomes.tensors(), {**outcomes.meta(), **asked, **origin, "seconds": seconds})
        shutil.rmtree(state, ignore_errors=True)


def _load(path: Path) -> Run:
    """A stored run, or a published one from its JSON."""
    if path.suffix != ".json":
        return Run.load(path)
    from cfol_nb.suite import published

    return published(path.parent, path.stem)[0]


def _judging(run: Run) -> str:
    """A hash of the code that can move a verdict."""
    return code_hash(MODELS[run.config.model["name"]])


def _verdict(run: Run, which: str, name: str, attack: dict) -> Path:
    key = hashlib.sha256(json.dumps(attack, sort_keys=True).encode()).hexdigest()[:8]
    return run.verdicts / f"judged-{which}-{name}-{key}.safetensors"


def _known(run: Run, which: str, path: Path) -> bool:
    """Whether a verdict is stored, made by the code as it is now."""
    try:
        return path.exists() and _judged(run, which, path)[1]["code"] == _judging(run)
    except Unsigned:
        return False


def _judged(run: Run, which: str, path: Path) -> tuple[Outcomes, dict]:
    """A verdict, and where it comes from. Raises Corrupt if it is damaged or not on these weights of this run."""
    tensors, meta = read_tensors(path)
    try:
        outcomes = Outcomes.from_tensors(tensors, meta)
        right = path.name == _verdict(run, which, meta["name"], meta["asked"]).name
        right &= meta["weights"] == run.weights_digest
        right &= np.array_equal(outcomes.labels, run.outcomes[which].labels)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Corrupt(f"{path} is no verdict ({type(error).__name__}: {error}); {ANEW}") from error
    if not right:
        raise Corrupt(f"{path} is no verdict on these weights; {ANEW}")
    return outcomes, {k: v for k, v in meta.items() if k not in outcomes.meta()}


def verdicts(run: Run, which: str) -> dict[str, tuple[Outcomes, dict]]:
    """What `judge` has stored of these weights: name of the attack -> outcomes, and where they come from. Of several
    with the same name but other options it is the one that was begun last."""
    paths = run.verdicts.glob(f"judged-{which}-*.safetensors")
    found = sorted((_judged(run, which, p) for p in sorted(paths)), key=lambda verdict: verdict[1]["started"])
    return {origin["name"]: (outcomes, origin) for outcomes, origin in found}


def judge(
    runs: Sequence[Run], attacks: Mapping[str, Mapping], which: str = "last", executor: Executor | str | None = None
) -> list[Outcomes]:
    """Outcomes of stored weights under further attacks, in order: those of the run, then those asked for.

    attacks: name -> options, as for `evaluate`; a name is a word. Each verdict is stored with its run, and loaded if
    the same was asked before; `suite.publish` publishes it. Missing ones are computed in parallel; AutoAttack, if it
    was killed, goes on where it was. executor: as for `compute`.
    Raises ValueError for an attack that cannot be, or has the name of one of the run's own; RunsFailed with the reasons
    if some fail.
    """
    if isinstance(executor := executors.chosen(executor), str):
        with executors.connect(executor, _threads([run.config for run in runs])) as pool:
            return judge(runs, attacks, which, pool)
    asked = {}
    for name, options in attacks.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"attack {name!r}: a name of letters, digits, - and _ is needed")
        asked[name] = as_attack(options).model_dump()
    jobs, lacking = {}, []
    for run in runs:
        if own := asked.keys() & run.outcomes[which].predictions.keys():
            raise ValueError(f"attack {own.pop()!r} is one of the run's own: choose another name")
        for name, attack in asked.items():
            if not _known(run, which, path := _verdict(run, which, name, attack)):
                jobs[str(path)] = str(run.folder), which, name, attack, str(path)
                lacking.append(run)
    for dataset, data in {(run.config.dataset, run.provenance.get("data", "")) for run in lacking}:
        same_images(dataset, data)
    if stale := [Path(path) for path in jobs if Path(path).exists()]:
        warnings.warn(
            f"{len(stale)} stored verdicts were made by other code than this (for example {stale[0].name} of "
            f"{stale[0].parent.name}): they are made anew",
            stacklevel=2,
        )
    if jobs:
        configs = [run.config for run in lacking]
        with bar(len(jobs), "judged") as progress:

            def sent(key: str) -> tuple:
                path, files = _parcel(lacking[list(jobs).index(key)])
                return files, _judge_there, path, *jobs[key][1:4]

            def keep(key: str, files: dict[str, bytes]) -> None:
                _take(Path(key).parent, files)

            def share(key: str) -> float:
                return float(Path(key).exists())

            reasons = _do_all(_judge, jobs, configs, share, executor, progress, sent, keep)
        if reasons:
            failed = {str(Path(k).parent) for k in reasons}
            named = {f"{Path(k).parent.name} under {jobs[k][2]}": v for k, v in reasons.items()}
            raise RunsFailed(named, [run for run in runs if str(run.folder) not in failed])
    out = []
    for run in runs:
        own = run.outcomes[which]
        out.append(Outcomes(own.labels, {"clean": own.predictions["clean"]}, own.class_names))
        out[-1].update(own)
        for name, attack in asked.items():
            out[-1].update(_judged(run, which, _verdict(run, which, name, attack))[0])
    return out


def stored() -> list[Path]:
    """Folders of the runs that are whole."""
    return sorted(p for p in (runs_dir() / "store").glob("*") if whole(p))


__all__ = ["Corrupt", "Run", "RunsFailed", "compute", "folder_of", "judge", "stored"]

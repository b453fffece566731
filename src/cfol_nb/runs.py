"""The run store: a run is a value of its configuration; it is loaded if it is there, else computed, once.

A run's folder under runs/store/ holds `run.json` (configuration, history, integer counts), `outcomes.safetensors`,
`weights.safetensors` and `provenance.json`. `run.json` is written last: without it the run is not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from cfol_nb.attacks import one_thread, repeating
from cfol_nb.config import RunConfig, as_attack, choose
from cfol_nb.data import fingerprint, prepare
from cfol_nb.evaluate import Outcomes, evaluate
from cfol_nb.features import REMAKES, remake_steps
from cfol_nb.files import (
    CHECKOUT,
    ROOT,
    Corrupt,
    bar,
    code_hash,
    read_json,
    read_tensors,
    runs_dir,
    write_json,
    write_tensors,
)
from cfol_nb.methods import METHODS
from cfol_nb.models import MODELS
from cfol_nb.stats import counts
from cfol_nb.train import Diverging, check, make_model, new_model, step_passes, train


class RunsFailed(RuntimeError):
    """Some runs failed; the message names each with its reason. `runs`: those that did not, which are stored."""

    def __init__(self, reasons: dict[str, str], runs: list[Run]):
        self.runs = runs
        super().__init__(
            f"{len(reasons)} of {len(reasons) + len(runs)} runs failed{', the others are stored' * bool(runs)}:\n"
            + "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        )


def _correct(outcomes: Outcomes) -> dict[str, list[int]]:
    return {a: counts(outcomes, a)[0].tolist() for a in outcomes.predictions}


@dataclass(frozen=True)
class Run:
    """A finished run. outcomes: on the test split, for the "last" and "selected" weights (and "ema")."""

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
        """A stored run. Raises FileNotFoundError if it is not whole, Corrupt if a file was damaged."""
        stored = read_json(folder / "run.json")
        tensors, meta = read_tensors(folder / "outcomes.safetensors")
        try:
            outcomes = {
                w: Outcomes.from_tensors(
                    {k.removeprefix(f"{w}."): v for k, v in tensors.items()},
                    {**meta, "checks": meta.get("checks", {}).get(w, {})},
                )
                for w in stored["correct"]
            }
            if {w: _correct(o) for w, o in outcomes.items()} != stored["correct"]:
                raise ValueError("its counts are not those of the predictions")
            config, origin = RunConfig(**stored["config"]), read_json(folder / "provenance.json")
            return cls(config, folder, stored["history"], stored["selected_epoch"], outcomes, {"code": "", **origin})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise Corrupt(
                f"{folder / 'run.json'} was changed ({reason}); delete the folder to compute it anew"
            ) from error

    def model(self, which: str = "selected") -> nn.Module:
        """The trained network in eval mode, on the run's device if it is here; which: "last", "selected" or "ema"."""
        tensors, meta = read_tensors(self.folder / "weights.safetensors")
        which = choose("weights of this run", which, {k.partition(".")[0] for k in tensors})
        state = {k.removeprefix(f"{which}."): v for k, v in tensors.items() if k.startswith(f"{which}.")}
        model = make_model(self.config, **meta["build"])
        model.load_state_dict(state)
        return model.to("cuda" if self.config.device == "cuda" and torch.cuda.is_available() else "cpu").eval()

    def curve(self, name: str) -> pd.DataFrame:
        """A trace by epoch (rows) and class (columns): "p", or the held-out accuracies "clean" and "robust"; "trained":
        that of the training batches, where the training attack is a single step."""
        of = {"clean": "n", "robust": "n", "trained": "drawn"}.get(name)
        rows = {
            e["epoch"]: np.array(e[name]) / (np.maximum(e[of], 1) if of else 1)
            for e in self.history
            if name in e
        }
        if not rows:
            raise KeyError(f"the history of {self.folder.name} has no {name!r} (it has: {', '.join(self.history[-1])})")
        return pd.DataFrame.from_dict(rows, orient="index", columns=self.outcomes["last"].class_names).rename_axis(
            "epoch"
        )


def resolve(config: RunConfig) -> RunConfig:
    """The configuration, and that of its parent, with the device decided."""
    update: dict = {"parent": resolve(config.parent)} if config.parent else {}
    if config.device == "auto":
        update["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return config.model_copy(update=update)


def folder_of(config: RunConfig) -> Path:
    """Where the run of a configuration lies: its hash, which for a folder of images includes the folder's state."""
    config = resolve(config)
    state = fingerprint(config.dataset) + (folder_of(config.parent).name if config.parent else "")
    key = hashlib.sha256((config.key() + state).encode()).hexdigest()[:16]
    words = (Path(config.dataset).name, config.objective["name"], config.method["name"], f"s{config.seed}", key)
    return runs_dir() / "store" / "-".join(words)


FILES = ("run.json", "provenance.json", "outcomes.safetensors", "weights.safetensors")


def whole(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    return all((folder / name).exists() for name in FILES)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time is inside for a folder; the system frees the lock of a process that died."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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


def provenance(device: str) -> dict:
    """What a reader needs to know where numbers come from."""
    status = _git("status", "--porcelain", "--", ".", ":!results")  # what is published later changes no code
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "code": code_hash(),
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
    config_json: str, folder: str, checkpoint_every: int = 1, report: Callable[[int, int], None] | None = None
) -> None:
    """Compute one run into its folder, unless another process did so in the meantime."""
    config, path = RunConfig.model_validate_json(config_json), Path(folder)
    kept = _Progress(path / "progress")

    def both(done: int, total: int) -> None:
        kept(done, total)
        if report:
            report(done, total)

    with threads(config), _alone(path):
        if not whole(path):
            _compute(config, path, checkpoint_every, both)


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
    origin = provenance(config.device)
    train_images, held, data = prepare(config)
    parent = Run.load(folder_of(config.parent)).model("last").to(config.device) if config.parent else None
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
    )
    start = time.perf_counter()
    model, found = new_model(config, train_images).to(config.device), {}
    for which, weights in trained.weights.items():
        if which == "selected" and trained.selected_epoch == config.epochs:
            found[which] = found["last"]  # the same weights
            continue
        model.load_state_dict(weights)
        found[which] = evaluate(
            model, data.test.images, data.test.labels, config.attacks, class_names=data.class_names, seed=config.seed
        )
    write_tensors(
        folder / "outcomes.safetensors",
        {f"{w}.{k}": v for w, o in found.items() for k, v in o.tensors().items()},
        {**found["last"].meta(), "checks": {w: o.meta()["checks"] for w, o in found.items()}},
    )
    write_tensors(
        folder / "weights.safetensors",
        {f"{w}.{k}": v for w, weights in trained.weights.items() for k, v in weights.items()},
        {"build": {"num_classes": len(data.class_names), "channels": data.test.images.shape[1]}},
    )
    write_json(
        folder / "provenance.json",
        {
            **origin,
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
    write_json(
        folder / "run.json",
        {
            "config": config.model_dump(mode="json"),
            "history": trained.history,
            "selected_epoch": trained.selected_epoch,
            "classes": list(data.class_names),
            "n": counts(found["last"], "clean")[1].tolist(),
            "correct": {w: _correct(o) for w, o in found.items()},
        },
    )
    for leftover in (checkpoint, folder / "progress"):
        leftover.unlink(missing_ok=True)


def _start_worker(devices, threads: int, environment: dict[str, str]) -> None:
    """In a local process: one device of its own, and an end when its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.simplefilter("ignore", Diverging)  # the caller of `compute` hears of it
    os.environ.clear()  # that of the server, which may be older than a change
    os.environ.update(environment)
    torch.set_num_threads(threads)
    if devices is not None:
        torch.cuda.set_device(devices.get())

    def follow() -> None:
        multiprocessing.parent_process().join()
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


def _pool(configs: Sequence[RunConfig]) -> ProcessPoolExecutor | None:
    """Local processes for these runs, or None if they are better computed here, one after another.

    On the CPU in float64 one process of one thread per core; otherwise a run on the CPU has the threads that torch has,
    by default one per core, so that its numbers do not depend on how many runs were asked for: with OMP_NUM_THREADS=1
    as many run side by side as there are cores. On CUDA one process per device.
    """
    makers = [table[spec["name"]] for c in configs for table, spec in ((MODELS, c.model), (METHODS, c.method))]
    if not all(m.__module__.startswith("cfol_nb.") for m in makers):
        return None  # registered by the user's own code, which a new process lacks
    cuda = any(c.device == "cuda" for c in configs)
    each = 1 if all(c.dtype == "float64" for c in configs) else torch.get_num_threads()
    limit = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0)) // each
    workers = min(limit, len(configs))
    if workers < 2:
        return None
    context = multiprocessing.get_context("forkserver")  # workers begin with the libraries, not with this package,
    context.set_forkserver_preload(["torch", "torchvision", "pydantic", "pandas", "scipy.stats"])  # which may change
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server inherits it: Ctrl-C would break its imports
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
    devices = context.Queue() if cuda else None
    for i in range(workers if cuda else 0):
        devices.put(i)
    return ProcessPoolExecutor(workers, context, _start_worker, (devices, each, dict(os.environ)))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def compute(configs: Sequence[RunConfig], executor: Executor | None = None, *, checkpoint_every: int = 1) -> list[Run]:
    """The runs of these configurations, in order: stored ones are loaded, missing ones computed in parallel.

    executor: any `concurrent.futures.Executor` whose workers see the same run store; by default local processes.
    checkpoint_every: epochs between two checkpoints (0: none), from which an interrupted run goes on.
    Everything is checked before work starts: ValueError or FileNotFoundError for what cannot run. A run that fails does
    not stop the others: RunsFailed at the end names the reasons, and holds the runs that are whole.
    """
    configs = [resolve(c) for c in configs]
    for config in configs:
        check(config)
    folders = {c.key(): folder_of(c) for c in configs}
    missing = {k: c for c in configs if not whole(folders[k := c.key()])}
    data = ("dataset", "image_size", "split_seed", "holdout", "train_limit", "test_limit", "imbalance", "without")
    for config in {str([getattr(c, f) for f in (*data, "batch_size")]): c for c in missing.values()}.values():
        images, _, _ = prepare(config)  # refuse bad data now, and decode once, not in every process
        if config.batch_size > len(images):
            raise ValueError(
                f"batch_size={config.batch_size} is larger than the training split of {len(images)} images"
            )
    reasons: dict[str, str] = {}
    if parents := {c.key(): c.parent for c in missing.values() if c.parent}:
        try:
            compute(list(parents.values()), executor, checkpoint_every=checkpoint_every)
        except RunsFailed as failed:
            orphans = [k for k, parent in parents.items() if not whole(folder_of(parent))]
            reasons = dict.fromkeys(orphans, f"its parent failed: {failed}")
            missing = {k: c for k, c in missing.items() if k not in reasons}
    if missing:
        with bar(len(missing), "runs") as progress:
            jobs = {k: (c.model_dump_json(), str(folders[k]), checkpoint_every) for k, c in missing.items()}

            def share(key: str) -> float:
                return 1.0 if whole(folders[key]) else _Progress.read(folders[key] / "progress")

            reasons |= _do_all(_work, jobs, list(missing.values()), share, executor, progress)
    runs = []
    for key in (c.key() for c in configs):
        if key not in reasons:
            runs.append(Run.load(folders[key]))
    if amiss := {r.folder.name: "; ".join(r.warnings) for r in runs if r.warnings}:
        text = "\n".join(f"  {name}: {said}" for name, said in amiss.items())
        warnings.warn(Diverging(f"{len(amiss)} of these runs diverged (see Run.warnings):\n{text}"), stacklevel=2)
    stale = sorted({r.folder.name for r in runs if r.provenance["code"] != code_hash()})
    if stale:
        warnings.warn(
            f"{len(stale)} stored runs were computed by other code than this (for example {stale[0]}): "
            "delete their folders to compute them anew",
            stacklevel=2,
        )
    if reasons:
        raise RunsFailed({folders[k].name: v for k, v in reasons.items()}, runs)
    return runs


def _do_all(
    work: Callable, jobs: dict[str, tuple], configs: list[RunConfig], share: Callable[[str], float], executor, progress
) -> dict[str, str]:
    """Call `work` with the arguments of every job, in processes where that pays; the reasons of those that failed.

    configs: of the jobs. share: how much of a job is done, 1 once its result is stored.
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
                reasons[key] = _reason(error)
            progress.update(i + 1 - progress.n)
        return reasons

    reasons, todo = {}, list(jobs)
    try:
        for attempt in (1, 2):
            with _main_not_imported() if own else contextlib.nullcontext():
                futures: dict[Future, str] = {executor.submit(work, *jobs[key]): key for key in todo}
            todo, waiting = [], set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    error, key = future.exception(), futures[future]
                    if isinstance(error, BrokenProcessPool) and own and attempt == 1:
                        todo.append(key)  # a process died, perhaps another job's: once more, from its checkpoint
                    elif error is not None:
                        reasons[key] = _reason(error)
                progress.update(sum(map(share, jobs)) - progress.n)
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


# -- further attacks on stored weights ---------------------------------------------------------------------------------


def _judge(folder: str, which: str, name: str, attack: dict, path: str, report=None) -> None:
    run = _load(Path(folder))
    origin, start = provenance(run.config.device), time.perf_counter()
    test, state = prepare(run.config)[2].test, Path(path).with_suffix(".state")
    how = {"class_names": test.class_names, "seed": run.config.seed, "folder": state}
    outcomes = evaluate(run.model(which), test.images, test.labels, {name: attack}, **how)
    seconds = round(time.perf_counter() - start, 2)
    write_tensors(Path(path), outcomes.tensors(), {**outcomes.meta(), "asked": attack, **origin, "seconds": seconds})
    shutil.rmtree(state, ignore_errors=True)


def _load(path: Path) -> Run:
    """A stored run, or a published one from its JSON."""
    if path.suffix != ".json":
        return Run.load(path)
    from cfol_nb.suite import published

    return published(path.parent, path.stem)[0]


def _verdict(run: Run, which: str, name: str) -> Path:
    folder = run.folder if run.folder.suffix != ".json" else runs_dir() / "published" / run.folder.stem
    return folder / f"judged-{which}-{name}.safetensors"


def verdicts(run: Run, which: str) -> dict[str, tuple[Outcomes, dict]]:
    """What `judge` has stored of these weights: name of the attack -> outcomes, and where they come from."""
    found = {}
    where = _verdict(run, which, "*")
    for path in sorted(where.parent.glob(where.name)):
        tensors, meta = read_tensors(path)
        outcomes = Outcomes.from_tensors(tensors, meta)
        found[list(outcomes.attacks)[-1]] = outcomes, {k: v for k, v in meta.items() if k not in outcomes.meta()}
    return found


def judge(
    runs: Sequence[Run], attacks: Mapping[str, Mapping], which: str = "last", executor: Executor | None = None
) -> list[Outcomes]:
    """Outcomes of stored weights under further attacks, in order: those of the run, then those asked for.

    attacks: name -> options, as for `evaluate`; a name is a word. Each verdict is stored with its run, and loaded if
    the same was asked before; `suite.publish` publishes it. Missing ones are computed in parallel; AutoAttack, if it
    was killed, goes on where it was.
    Raises ValueError for an attack that cannot be, or has the name of one of the run's own; RunsFailed with the reasons
    if some fail.
    """
    asked = {}
    for name, options in attacks.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"attack {name!r}: a name of letters, digits, - and _ is needed")
        asked[name] = as_attack(options).model_dump()
    jobs, configs = {}, []
    for run in runs:
        known = verdicts(run, which)
        if own := asked.keys() & run.outcomes[which].predictions.keys():
            raise ValueError(f"attack {own.pop()!r} is one of the run's own: choose another name")
        for name, attack in asked.items():
            if name not in known or known[name][1]["asked"] != attack:
                path = _verdict(run, which, name)
                path.unlink(missing_ok=True)
                jobs[str(path)] = str(run.folder), which, name, attack, str(path)
                configs.append(run.config)
    if jobs:
        with bar(len(jobs), "judged") as progress:
            reasons = _do_all(_judge, jobs, configs, lambda path: float(Path(path).exists()), executor, progress)
        if reasons:
            failed = {str(Path(k).parent) for k in reasons}
            named = {f"{Path(k).parent.name} under {jobs[k][2]}": v for k, v in reasons.items()}
            raise RunsFailed(named, [run for run in runs if str(run.folder) not in failed])
    out = []
    for run in runs:
        own, found = run.outcomes[which], verdicts(run, which)
        out.append(Outcomes(own.labels, {"clean": own.predictions["clean"]}, own.class_names))
        out[-1].update(own)
        for name in asked:
            out[-1].update(found[name][0])
    return out


def stored() -> list[Path]:
    """Folders of the runs that are whole."""
    return sorted(p for p in (runs_dir() / "store").glob("*") if whole(p))


__all__ = ["Corrupt", "Run", "RunsFailed", "compute", "folder_of", "judge", "stored"]

"""Method after method inside a time limit: each run whole, each published as one small JSON."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

import pandas as pd
import torch
from pydantic import BaseModel
from torch import nn

from cfol_nb.autoattack import Evaluation, interleaved
from cfol_nb.checks import IMAGES, PASSES, said
from cfol_nb.config import AutoAttack, RunConfig, choose, keywords, method_parts
from cfol_nb.data import prepare
from cfol_nb.executors import chosen, connect
from cfol_nb.features import remake_steps
from cfol_nb.files import ROOT, Corrupt, data_dir, digest, read_json, read_tensors, runs_dir, write_json, write_tensors
from cfol_nb.methods import METHODS as METHOD_TYPES
from cfol_nb.outcomes import Outcomes
from cfol_nb.runs import (
    Run,
    RunsFailed,
    _Progress,
    _threads,
    agree,
    compute,
    correct,
    current,
    folder_of,
    name_of,
    resolve,
    stored,
    threads,
    verdicts,
)
from cfol_nb.stats import last_attack
from cfol_nb.train import check, look_steps, make_model, new_model, step_passes, train

PAPER = {"epochs": 200, "schedule": {"name": "step", "milestones": [0.5, 0.75]}}
METHODS = {
    "erm": {},
    "cfol": {"method": "cfol"},
    "cfol-trades": {"method": "cfol", "objective": "trades"},
    "trades": {"objective": "trades"},
    "fol": {"method": "fol"},
    "cvar": {"method": "cvar"},
    "lcvar": {"method": "lcvar", "lr": 0.05},
    "frl": {"method": "frl", "objective": {"name": "trades", "beta": 1.5}},
    "frl-remargin": {"method": {"name": "frl", "remargin": True}, "objective": {"name": "trades", "beta": 1.5}},
}


class _Enough(Exception):
    pass


def configurations(dataset: str, methods: Sequence[str], seeds: int, **settings) -> list[RunConfig]:
    """Every method with seed 0, then every method with seed 1, and so on: an early end leaves whole comparisons.

    settings: of RunConfig, for all of them; what a method needs otherwise (METHODS) yields to them.
    """
    return [
        RunConfig(**{"dataset": dataset, **METHODS[m], **settings, "seed": s})
        for s, m in itertools.product(range(seeds), methods)
    ]


def estimate(config: RunConfig, steps: int = 8) -> float:
    """Seconds that a run will take, from a few of its own training steps; looks and evaluation by their passes; with
    its parent and teacher, if they are not stored; `remake` as if the parent's network were its own."""
    images, held, data = prepare(config)
    times = []

    def watch(done: int, total: int) -> None:
        if config.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        if done == min(steps, total):
            raise _Enough

    with contextlib.suppress(_Enough), threads(config):
        teacher = new_model(config.teacher, images) if config.teacher else None
        train(config, images, held, crop=data.crop, flip=data.flip, progress=watch, teacher=teacher)
    step = statistics.median([b - a for a, b in itertools.pairwise(times)] or [0.0])
    per_pass = step / (config.batch_size * step_passes(config))  # one forward pass of one image
    looks = -(-config.epochs // config.validate_every) * len(held) * (2 * look_steps(config) + 2)
    slower = 6 if config.dtype == "bfloat16" else 1  # images are evaluated, and remade, in float32
    kinds = 3 if config.ema else 2
    passes = 1 + sum(a.passes for a in config.attacks.values())
    total = len(images) // config.batch_size * config.epochs
    judged = passes * len(data.test) + PASSES * min(IMAGES, len(data.test)) * bool(config.attacks)
    in_float32 = kinds * judged + 2 * remake_steps(config.remake) * len(images)
    own = 1.1 * (step * total + per_pass * (looks + slower * in_float32))
    sources = map(resolve, config.sources().values())
    return own + sum(estimate(run, steps) for run in sources if not current(folder_of(run), run))


def publish(run: Run, results: Path) -> Path:
    """`results/NAME.json`: configuration, provenance, seconds per epoch, history, integer counts per class, and the
    predictions on every test image, from which `published` makes every statistic and comparison anew.

    What `judge` has stored of the run goes with it. Its own attacks remain the last ones, those that are meant where
    none is named.
    """
    packed, judged = {}, {}
    for which, own in run.outcomes.items():
        found = verdicts(run, which)
        every = Outcomes(own.labels, {"clean": own.predictions["clean"]}, own.class_names)
        for outcomes in (*(outcomes for outcomes, _ in found.values()), own):
            every.update(outcomes)
        packed[which] = every.packed()
        judged |= {f"{which}, {name}": origin for name, (_, origin) in found.items()}
        if (more := run.folder / f"survivors-{which}.json").exists():
            judged |= {f"{which}, survivors of autoattack": read_json(more)}
    last = run.outcomes["last"]
    path = results / f"{run.folder.name}.json"
    seconds = run.provenance["seconds"]["training"]
    write_json(
        path,
        {
            "config": run.config.model_dump(mode="json"),
            "classes": list(last.class_names),
            "n": last.counts("clean")[1].tolist(),
            "correct": {w: correct(o) for w, o in run.outcomes.items()},
            "selected_epoch": run.selected_epoch,
            "history": run.history,
            "outcomes": packed,
            "provenance": run.provenance | ({"judged": judged} if judged else {}),
            "seconds_per_epoch": round(seconds / run.config.epochs, 3),
        },
    )
    return path


MOST_BYTES = 1_500_000  # of published weights: a PreActResNet-18 of width 16 has 700,000 in two bytes each


def _weights(path: Path) -> Path:
    """Where the weights of a published run lie, if they are."""
    return path.parent / "weights" / path.with_suffix(".safetensors").name


def publish_weights(run: Run, results: Path, which: str = "last") -> Path:
    """`results/weights/NAME.safetensors`: one kind of the run's weights in half precision, as `Published.model` reads
    them. Raises ValueError for a network of more than 1.5 MB."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in run.model(which).state_dict().items()}
    size = sum(v.nbytes for v in state.values())
    if size > MOST_BYTES:
        raise ValueError(f"the weights of {run.folder.name} are {size / 1e6:.1f} MB: at most 1.5 MB are published")
    own = {"build": read_tensors(run.folder / "weights.safetensors")[1]["build"], "run": run.folder.name}
    write_tensors(path := _weights(results / f"{run.folder.name}.json"), state, {**own, "which": which})
    return path


def attack_survivors(run: Run, n: int = 100, which: str = "last", attack: str = "autoattack") -> str:
    """FAB-T and Square on n of the images that AutoAttack's fast version did not break, all classes alike: what fell.

    Stored with the run, and published with it: images per class that were attacked, and that each of both broke. Raises
    ValueError for a run that was not judged by the fast version.
    """
    outcomes, origin = verdicts(run, which).get(attack, (None, {}))
    if origin.get("asked", {}).get("version") != "fast":
        raise ValueError(f"{run.folder.name} was not judged by AutoAttack's fast version: use --autoattack fast")
    path = run.folder / f"survivors-{which}.json"
    if not path.exists() or read_json(path)["asked"] != n:
        test, held = run.data()[2].test, torch.from_numpy(outcomes.correct(attack))
        order = interleaved(test.labels, run.config.seed)
        some = order[held[order]][:n]
        x, y, k = test.images[some], test.labels[some], len(test.class_names)
        kinds = {"fab-t": y[:0], "square": y[:0]}
        if n and len(some):
            spec = AutoAttack(**origin["asked"] | {"version": "standard"})
            e = Evaluation(run.model(which), x, y, spec, seed=run.config.seed)
            e.skip("apgd-ce", "apgd-t")
            e.run()
            kinds = {a: y[e.broken_by == 1 + e.attacks.index(a)] for a in kinds}
        counted = {"attacked": y, **kinds}
        write_json(path, {"asked": n, **{a: torch.bincount(v, minlength=k).tolist() for a, v in counted.items()}})
    found = read_json(path)
    total, fell = sum(found["attacked"]), {a: sum(found[a]) for a in ("fab-t", "square")}
    return f"of {total} images that the fast version left, FAB-T broke {fell['fab-t']} and then Square {fell['square']}"


class Published(Run):
    """A run as `publish` wrote it; folder: its JSON."""

    def model(self, which: str = "last") -> nn.Module:
        """The network in eval mode on the CPU. Its weights were rounded to half precision, so single predictions may
        differ from those of the run. Raises FileNotFoundError if they were not published."""
        if not (path := _weights(self.folder)).exists():
            raise FileNotFoundError(f"the weights of {self.folder.stem} are not published: train it, or choose another")
        tensors, meta = read_tensors(path)
        if meta["run"] != self.folder.stem:
            raise Corrupt(f"{path} holds the weights of {meta['run']}; publish them again")
        choose("published weights of this run", which, [meta["which"]])
        model = make_model(self.config, **meta["build"])
        model.load_state_dict(tensors)  # which casts
        return model.eval()

    @property
    def weights_digest(self) -> str:
        return digest(_weights(self.folder))

    @property
    def verdicts(self) -> Path:
        return runs_dir() / "published" / self.folder.stem


def published(results: Path | None = None, name: str = "*") -> list[Published]:
    """The published runs, as `compute` gives runs; results: a folder, by default results/; name: of some, * for any.
    Raises Corrupt, with its name, for a file that is not as it was published."""
    return [_published(path) for path in sorted((results or ROOT / "results").glob(f"{name}.json"))]


def _published(path: Path) -> Published:
    kept = read_json(path)
    try:
        outcomes = {which: Outcomes.unpacked(packed) for which, packed in kept["outcomes"].items()}
        agree(kept, outcomes)
        config, origin = RunConfig(**kept["config"]), kept["provenance"]
        if "data" in origin and (name := name_of(config, origin["data"])) != path.stem:
            raise ValueError(f"its configuration is that of {name}")
        return Published(config, path, kept["history"], kept["selected_epoch"], outcomes, origin)
    except (KeyError, TypeError, AttributeError, ValueError, zlib.error) as error:
        raise Corrupt(f"{path} is no published run ({type(error).__name__}: {error}); publish it again") from error


def verify(results: Path | None = None) -> tuple[int, list[str]]:
    """How many stored files are as they were written, and a sentence for each that is not: of the run store, audits,
    image caches, and results/ (by default the project's)."""
    results = results or ROOT / "results"
    runs = {folder / "run.json" for folder in stored()}
    files = [*runs_dir().rglob("*.safetensors"), *(runs_dir() / "store").glob("*/*.json")]
    files += [*(data_dir() / "cache").glob("*.safetensors"), *results.rglob("*.json")]
    bad: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: (path in runs, path)):  # first the files of a run, then the whole
        with contextlib.suppress(FileNotFoundError):  # it was finished, or deleted, in the meantime
            try:
                if path in runs:
                    run = Run.load(path.parent)
                    for which in run.outcomes:
                        verdicts(run, which)
                elif path.parent == results:
                    _published(path)
                else:
                    (read_json if path.suffix == ".json" else read_tensors)(path)
            except (Corrupt, OSError) as error:
                bad.setdefault(str(error), path)
    return len(files) - len(bad), list(bad)


_SIZES = ("image_size", "train_limit", "test_limit", "epochs", "batch_size", "dtype")
_OWN = ("dataset", "model", "objective", "method", "seed", "attacks", "device", "engine", *_SIZES)


def listing(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run, to choose from: dataset, network, objective, method, variant, size, seed, outcomes (of the last
    weights), run.

    method: its name and the options that are not its defaults. variant: all other settings that are not the data set's
    usual ones; empty if none. size: those of how much was computed, likewise.
    Rows that differ in the seed alone are runs of one configuration.
    """

    def said(value) -> str:
        if isinstance(value, RunConfig):
            return value.hash()
        if isinstance(value, float):
            return f"{value:g}"
        value = value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value
        if isinstance(value, dict):  # the name first
            value = [v for k, v in sorted(value.items(), key=lambda item: item[0] != "name")]
        return " ".join(map(said, value)) if isinstance(value, list | tuple) else str(value)

    rows = []
    for run in runs:
        c = run.config
        way = {"training_attack": c.training_attack} if c.norm == "linf" else {}
        usual = RunConfig(dataset=c.dataset, eps=c.eps, **way)  # step and steps follow from radius and attack
        plain = RunConfig(dataset=c.dataset)
        usual = usual.model_copy(update={k: getattr(plain, k) for k in ("eps", "training_attack")})
        names = [part["name"] for part in method_parts(c.method)]
        usual_of = {f"{n}." * (len(names) > 1) + k: p for n in names for k, p in keywords(METHOD_TYPES[n]).items()}
        given = {k: said(getattr(c, k)) for k in RunConfig.model_fields if getattr(c, k) != getattr(usual, k)}
        rows.append(
            {
                "dataset": Path(c.dataset.removeprefix("imagefolder:")).name,
                "network": said(c.model),
                "objective": said(c.objective),
                "method": said({k: v for k, v in c.method.items() if k == "name" or v != usual_of[k].default}),
                "variant": ", ".join(f"{k} {v}" for k, v in given.items() if k not in _OWN),
                "size": ", ".join(f"{k} {v}" for k, v in given.items() if k in _SIZES),
                "seed": c.seed,
                "outcomes": run.outcomes["last"],
                "run": run,
            }
        )
    return pd.DataFrame(rows)


def suite(
    configs: Sequence[RunConfig],
    minutes: float,
    results: Path | None = None,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
    recompute: bool = False,
    executor: Executor | str | None = None,
) -> Iterator[Run]:
    """Yields each run once it is whole and published. A run that the remaining time cannot hold is not started.

    What is stored is loaded, unless other code computed it or `recompute` is asked for; an interrupted run goes on from
    its checkpoint. Everything is checked before work starts. executor: as for `compute`; as many runs as it has places
    for are started together, the next ones once these are whole.
    """
    if isinstance(executor := chosen(executor), str):
        with connect(executor, _threads(configs)) as pool:
            yield from suite(configs, minutes, results, say, clock, recompute, pool)
        return
    end, results = clock() + 60 * minutes, results or ROOT / "results"
    results.mkdir(parents=True, exist_ok=True)
    cuda, places = getattr(executor, "cuda", None), getattr(executor, "places", 1)
    configs = [resolve(c, cuda) for c in configs]
    for config in configs:
        check(config, cuda)
    known: dict[str, float] = {}
    for i in range(0, len(configs), places):
        started, fresh = [], []
        for config in configs[i : i + places]:
            folder, kind = folder_of(config), config.model_copy(update={"seed": 0}).key()
            if recompute or not current(folder, config):
                left = end - clock()
                if left <= 0:
                    say(f"{folder.name}: not started, the time is up")
                    continue
                done = _Progress.read(folder / "progress")  # of an interrupted run
                try:
                    if kind not in known and (config.device == "cpu" or torch.cuda.is_available()):
                        known[kind] = estimate(config)
                except FloatingPointError as failed:
                    say(f"{folder.name}: {failed}")
                    continue
                needed, left = (1 - done) * known.get(kind, 0.0), end - clock()
                if needed > left:
                    say(f"{folder.name}: not started, it needs about {needed:.0f} s and {max(left, 0):.0f} s are left")
                    continue
                fresh += [kind] if not done else []
            started.append(config)
        start = clock()
        try:
            runs = compute(started, executor=executor, recompute=recompute) if started else []
        except RunsFailed as failed:
            say(f"{folder_of(started[0]).name}: {failed}" if len(started) == 1 else str(failed))
            runs = failed.runs
        else:
            known |= dict.fromkeys(fresh, clock() - start)
        for run in runs:
            path = publish(run, results)
            last, pace = run.outcomes["last"], run.provenance["seconds"]["training"] / run.config.epochs
            verdict = said(last.checks.get(last_attack(last)))
            say(f"{run.folder.name}: {pace:.2f} s per epoch, {path.name}. {verdict}".strip())
            yield run

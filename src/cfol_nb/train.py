"""One training loop for every method and objective; it can be stopped after any step and goes on to the same result."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cfol_nb import distributed
from cfol_nb.attacks import repeating
from cfol_nb.config import RunConfig, method_parts, of_its_kind, options
from cfol_nb.data import ImageSet
from cfol_nb.engine import choose_engine, make_step
from cfol_nb.evaluate import class_losses, evaluate
from cfol_nb.features import REMAKES
from cfol_nb.files import Corrupt, Unsigned, code_hash, read_tensors, write_tensors
from cfol_nb.methods import METHODS, Context, Method, build_method
from cfol_nb.models import MODELS, build, initialised_from, sharing
from cfol_nb.objectives import OBJECTIVES, TemporalEnsemble
from cfol_nb.outcomes import Outcomes


def _context(config: RunConfig, objective, per_epoch: int = 0) -> Context:
    beta = getattr(objective, "beta", None) or None
    return Context(config.epochs, per_epoch, beta, config.eps, config.step, config.steps, config.optimizer)


def check(config: RunConfig, cuda: bool | None = None) -> None:
    """Raises ValueError, before any work, for a model, objective or method that is unknown or refuses its options.
    cuda: whether there is a GPU where the run will be computed, by default here."""
    own = options("objective", config.objective, OBJECTIVES)
    with of_its_kind("objective", config.objective):
        objective = OBJECTIVES[config.objective["name"]](**own)
    # refuses values that it cannot take
    method = build_method(config.method, torch.arange(1000), 1000, 0, 1, _context(config, objective))
    if method.needs_parent and (config.parent is None or config.remake):
        raise ValueError(f"method {config.method['name']!r} goes on from a trained network: give the run a parent")
    if method.needs_objective not in (None, config.objective["name"]):
        raise ValueError(f"method {config.method['name']!r} needs the objective {method.needs_objective!r}")
    wanted = objective.needs_teacher or "teacher" in method.asks
    if wanted != (config.teacher is not None):
        who = f"objective {config.objective['name']!r} with method {config.method['name']!r}"
        raise ValueError(f"{who} needs a teacher: give the run one" if wanted else f"{who} has no use for a teacher")
    adjusts = getattr(method.adjust, "__func__", None) is not Method.adjust
    if objective.needs_teacher and (config.label_smoothing or adjusts):
        what = f"method {config.method['name']!r}" if not config.label_smoothing else "label_smoothing"
        raise ValueError(f"objective {config.objective['name']!r} has no cross-entropy that {what} could change")
    if objective.attack_loss is None and {"attack", "right"} & method.asks:
        about = f"method {config.method['name']!r} is about the training attack"
        raise ValueError(f"{about}: objective {config.objective['name']!r} has none")
    if objective.attack_loss == "kl" and config.training_attack.name == "n-fgsm" and not config.training_attack.k:
        raise ValueError(
            f"training_attack k=0: the KL divergence that {config.objective['name']!r} attacks has no gradient at the "
            "image itself, so k > 0 is needed"
        )
    if config.training_attack.name == "n-fgsm" and not objective.random_start:
        raise ValueError(f"objective {config.objective}: training_attack='n-fgsm' has a start of its own")
    if config.remake is not None:
        own = options("remake", config.remake, REMAKES, given=("model", "images", "seed", "progress"))
        if bad := [f"{k}={v}" for k, v in own.items() if not v > 0]:
            raise ValueError(f"{bad[0]} of remake {config.remake['name']!r}: a number > 0 is needed")
    own = {k: v for k, v in config.model.items() if k != "head"}
    options("model", own, MODELS, given=("num_classes", "channels"))
    # takes no memory and no time
    with of_its_kind("model", config.model), torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = build(num_classes=2, channels=3, **config.model)
        method.start(model)
    sizes, memory = [p.numel() for p in model.parameters()], os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not all(sizes):
        raise ValueError(f"model {config.model} has layers without weights: larger options are needed")
    if (needed := 16 * sum(sizes)) > memory:  # weights, gradients, momentum and a copy, of 4 bytes each or more
        raise ValueError(f"model {config.model} needs {needed >> 30} GiB: this machine has {memory >> 30} GiB")
    if config.device == "cuda" and not (torch.cuda.is_available() if cuda is None else cuda):
        raise ValueError("device='cuda', but torch sees no CUDA device: use device='cpu' or 'auto'")
    if config.device == "cuda" and cuda is None and config.devices > (here := torch.cuda.device_count()):
        raise ValueError(f"devices={config.devices}, but torch sees {here} CUDA device(s)")


def code_of(config: RunConfig) -> str:
    """A hash of the code that can move the run's numbers, its parent's included: see `files.code_hash`."""
    makers, todo = [], [config]
    for config in todo:
        makers += [MODELS[config.model["name"]], OBJECTIVES[config.objective["name"]]]
        makers += [METHODS[part["name"]] for part in method_parts(config.method)]
        makers += [REMAKES[config.remake["name"]]] if config.remake else []
        todo += config.sources().values()
    return code_hash(*makers)


def look_steps(config: RunConfig) -> int:
    """Attack steps of a look at the held-out split: as in training; one where training has no attack, so that the looks
    stay cheap beside it; ten where it has one of a single step, which would not see its own collapse."""
    if config.validate_steps or not OBJECTIVES[config.objective["name"]].attack_loss:
        return config.validate_steps or 1
    return 10 if single_step(config) else config.steps


def single_step(config: RunConfig) -> bool:
    """Whether the training attack is one step, and catastrophic overfitting must be looked for."""
    return config.steps == 1 and OBJECTIVES[config.objective["name"]].attack_loss is not None


def step_passes(config: RunConfig) -> int:
    """Passes, forward or back, that an image of a training step makes: those of the attack, and three of the step."""
    return 3 + 2 * config.steps * (OBJECTIVES[config.objective["name"]].attack_loss is not None)


def _generators(device: torch.device) -> list[torch.Generator]:
    """torch's global generators that a run on this device may use."""
    if device.type != "cuda":
        return [torch.default_generator]
    current = torch.cuda.current_device()  # which starts CUDA: before it there are no generators
    return [torch.default_generator, torch.cuda.default_generators[current]]


def _own_seed(seed: int) -> int:
    """A seed of this rank's own; the first has the given one."""
    return (seed + (distributed.rank() << 32)) % 2**63


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators start from the seed, and are afterwards as they were."""
    generators = _generators(device)
    with sharing:
        before = [g.get_state() for g in generators]
        for g in generators:
            g.manual_seed(seed)
    try:
        yield
    finally:
        with sharing:
            for g, state in zip(generators, before, strict=True):
                g.set_state(state)


def make_model(config: RunConfig, num_classes: int, channels: int, **statistics) -> nn.Module:
    """The network of a run in its floating type; below float64 in channels_last layout, which convolutions prefer."""
    model = build(num_classes=num_classes, channels=channels, **statistics, **config.model)
    return model.double() if config.dtype == "float64" else model.to(memory_format=torch.channels_last)


def new_model(config: RunConfig, data: ImageSet) -> nn.Module:
    """The untrained network of a run, with the data set's normalisation, from the run's seed."""
    mean, std = data.statistics()
    with initialised_from(config.seed):
        return make_model(config, len(data.class_names), data.images.shape[1], mean=mean, std=std)


@dataclass
class Trained:
    """weights: "last" (after the last step), "selected" (the best held-out epoch), "ema" if an average over the steps
    was kept, and "averaged" if the method kept one over the looks.

    history: one dict per epoch.

    An entry has epoch, loss (mean), lr, and, where the held-out split was looked at, n, clean and robust: images and
    correct predictions per class; where the training attack is a single step drawn and trained, images of the epoch and
    those that were right under that attack, per class; what the method traces, for CFOL p; and "warnings", if something
    is wrong then.
    """

    weights: dict[str, dict[str, Tensor]]
    selected_epoch: int
    seconds: float  # of training, the looks at the held-out split and earlier parts of an interrupted run included
    looking: float  # of these, the looks at the held-out split
    history: list[dict]


class Diverging(UserWarning):
    """A run has left the track. The history says so of every such epoch, `Run.warnings` of one that ended so."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; the checkpoint was written, and the same call goes on from there."""


@contextlib.contextmanager
def _listening() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them (only a main thread can)."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return
    old = {s: signal.signal(s, lambda number, _: got.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _flatten(tree, path: str, tensors: dict[str, Tensor]):
    """JSON with tensors moved to `tensors` and replaced by their names."""
    if torch.is_tensor(tree):
        tensors[path] = tree
        return {"tensor": path}
    if isinstance(tree, dict):
        return {"items": [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(tree)]}
    return {"value": tree}


def _unflatten(tree: dict, tensors: dict[str, Tensor]):
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "items":
        return {k: _unflatten(v, tensors) for k, v in value}
    if kind == "list":
        return [_unflatten(v, tensors) for v in value]
    return value


def _hash(tensors: Iterable[Tensor]) -> str:
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return h.hexdigest()


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone() for k, v in state.items()}


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, batch-norm statistics included; counters are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    old, new = zip(*((a, b) for a, b in pairs if a.is_floating_point()), strict=True)
    torch._foreach_lerp_(old, new, 1 - decay)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)


def train(
    config: RunConfig,
    images: ImageSet,
    held: ImageSet,
    *,
    crop: int = 0,
    flip: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1,
    progress: Callable[[int, int], None] | None = None,
    initial: dict[str, Tensor] | None = None,
    teacher: nn.Module | None = None,
) -> Trained:
    """Train on `images`, select on `held`.

    initial: weights to start from, instead of new ones from the run's seed. teacher: the network of the run's teacher.
    checkpoint: a file that is written every `checkpoint_every` epochs (0: never) and when the run is stopped, and from
    which it goes on if it is there. progress: called with (steps done, steps in all).
    Raises Stopped after Ctrl-C or SIGTERM, Corrupt for a damaged or foreign checkpoint, FloatingPointError if the loss
    is no longer finite, ValueError for a batch larger than the split.
    """
    if distributed.world() != config.devices:
        raise ValueError(f"devices={config.devices}, but this run has {distributed.world()} process(es)")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    # the global generators only serve layers that draw, such as dropout; cuDNN must repeat itself
    with _seeded(_own_seed(config.seed), device), repeating(torch.backends.cudnn.allow_tf32):
        return _train(
            config, device, images, held, crop, flip, checkpoint, checkpoint_every, progress, initial, teacher
        )


def _amiss(history: list[dict], kind: str, over: bool) -> list[str]:
    """What to say when the loss has exploded; when the accuracy on the held-out split has halved since its best, beyond
    the noise of its images, at three looks in a row or at the end; and when at the end it is that of guessing."""
    looks = [e for e in history if kind in e]
    seen, told = [(sum(e[kind]) / sum(e["n"]), sum(e["n"])) for e in looks], []
    cause = "lower lr, or the method's step size"
    if looks and history[-1]["loss"] > 2 * max(history[0]["loss"], math.log(len(looks[0]["n"]))):
        told.append(f"the loss is above twice that of the first epoch: {cause}")

    def noise(accuracy: float, n: int) -> float:
        return 3 * math.sqrt(accuracy * (1 - accuracy) / n)

    recent, best = seen[-1:] if over else seen[-3:], max((accuracy for accuracy, _ in seen), default=0)
    if len(recent) == (1 if over else 3) and all(a <= best / 2 and best - a > noise(best, n) for a, n in recent):
        told.append(f"the {kind} accuracy on held-out images is below half of its best: {cause}")
    elif over and seen and seen[-1][0] - (guess := 1 / len(looks[-1]["n"])) <= noise(guess, seen[-1][1]):
        told.append(f"the {kind} accuracy on held-out images is not above that of guessing: train longer, or {cause}")
    return told


def _collapse(history: list[dict], names: Sequence[str]) -> str:
    """What to say of catastrophic overfitting (Wong et al. 2020); empty if there is none.

    That is: the accuracy under PGD on held-out images is below half of its best (or of guessing) in the mean, or below
    a quarter in a class at two looks in a row; while that under the single step of training has risen since, and is
    nearer to the accuracy on clean images than to that under PGD. Falls and rises must be beyond the images' noise.
    """
    looks = [e for e in history if "robust" in e and "trained" in e]
    if not looks:
        return ""
    kinds = "clean", "robust", "n", "trained", "drawn"
    clean, pgd, n, own, drawn = (np.array([[sum(e[k]), *e[k]] for e in looks], float) for k in kinds)  # all, classes
    drawn, guess = drawn.clip(1), 1 / len(names)
    clean, pgd, own = clean / n, pgd / n, own / drawn
    best = np.array([pgd[: i + 1].argmax(0) for i in range(len(looks))])  # look by look, which was the best so far
    top, then, m = (np.take_along_axis(a, best, 0) for a in (pgd, own, drawn))
    top[:, 0], then = top[:, 0].clip(guess), then.clip(guess)
    falls = top - pgd > 3 * np.sqrt(top * (1 - top) / n)
    rises = (own - then > 3 * np.sqrt(then * (1 - then) / m)) & (own > (clean + pgd) / 2)
    rises &= own > guess + (1 - guess) / 5  # a network that has learnt little yet swings from class to class

    def since(share: float) -> np.ndarray:
        """How many looks in a row, up to now, accuracy has been below this share of its best."""
        return np.logical_and.accumulate((falls & rises & (pgd <= share * top))[::-1]).sum(0)

    half = since(0.5)
    if not half[0] and since(0.25)[1:].max() < 2:
        return ""
    began = len(looks) - np.where(half, half, half[0].clip(1))
    gap = (own - pgd)[began, range(len(half))]  # decides between classes that fell at once
    return (
        "catastrophic overfitting: on held-out images the accuracy under PGD falls while that under the training "
        f"attack rises, first in class {names[(half + gap / 2)[1:].argmax()]!r}: more noise (k), a smaller radius, or "
        "training_attack='pgd'"
    )


def _optimizer(config: RunConfig, parameters, rate, graphed: bool) -> torch.optim.Optimizer:
    decay, fused = config.weight_decay, graphed or None
    if config.optimizer == "adam":
        betas = (config.momentum, 0.999)
        return torch.optim.Adam(parameters, rate, betas, weight_decay=decay, fused=fused, capturable=graphed)
    return torch.optim.SGD(parameters, rate, config.momentum, weight_decay=decay, fused=fused)


def _train(
    config, device, images, held, crop, flip, checkpoint, checkpoint_every, progress, initial, teacher
) -> Trained:
    check(config)
    batch, n = config.batch_size, len(images)
    per_epoch = n // batch  # full batches only: shapes never change
    if not per_epoch:
        raise ValueError(f"batch_size={batch} is larger than the training split of {n} images")
    total, k = per_epoch * config.epochs, len(images.class_names)

    model = new_model(config, images).to(device)
    if initial is not None:
        model.load_state_dict(initial)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    objective = OBJECTIVES[config.objective["name"]](**options("objective", config.objective, OBJECTIVES))
    context = _context(config, objective, per_epoch)
    method = build_method(config.method, images.labels, k, config.seed, total * batch, context).to(device)
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(device, dtype).eval().requires_grad_(False)
    ensemble = TemporalEnsemble(n, k, **dict(config.ensembling)).to(device, dtype) if config.ensembling else None
    engine = choose_engine(config, device)
    graphed = engine == "graph"  # whose learning rate must lie on the device
    rate = torch.tensor(config.lr, device=device) if graphed else config.lr
    optimizer = _optimizer(config, model.parameters(), rate, graphed)
    generator = torch.Generator(device).manual_seed(_own_seed(config.seed))
    mine = distributed.share(batch)
    pixels, labels = images.images.to(device), images.labels.to(device)
    low_precision = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    start, looking, made_by = time.perf_counter(), 0.0, [code_of(config), torch.__version__]
    taught = teacher.state_dict() if teacher is not None else {}
    parts = (images.images, images.labels, held.images, held.labels, *(initial or {}).values(), *taught.values())
    data = _hash(parts) if checkpoint else ""  # what else than the configuration decides the run
    step, history, best = 0, [], (-1.0, 0)  # best: held-out score, epoch
    selected = _copy(model.state_dict())
    averaged, kept = copy.deepcopy(model).eval() if config.ema else None, None  # kept: by the method, over the looks
    sum_loss = torch.zeros((), dtype=dtype, device=device)
    watched = single_step(config)
    met = torch.zeros(2, k, dtype=torch.int64, device=device)  # drawn in this epoch, and right under its attack

    def save() -> None:
        states = [distributed.every(g.get_state()) for g in (generator, *_generators(device))]
        if distributed.rank():
            return
        tensors: dict[str, Tensor] = {}
        tree = _flatten(
            {
                "model": model.state_dict(),
                "selected": selected,
                "averaged": averaged.state_dict() if averaged is not None else {},
                "kept": kept.state_dict() if kept is not None else {},
                "method": method.state_dict(),
                "ensemble": ensemble.state_dict() if ensemble is not None else {},
                "optimizer": optimizer.state_dict(),
                "generator": torch.stack(states[0]) if config.devices > 1 else states[0][0],
                "step": step,
                "history": json.dumps(history),
                "best": best,
                "sum_loss": sum_loss,
                "met": met,
                "seconds": [time.perf_counter() - start, looking],
                "global": [torch.stack(s) if config.devices > 1 else s[0] for s in states[1:]],
            },
            "",
            tensors,
        )
        write_tensors(checkpoint, tensors, {"key": config.key(), "data": data, "made_by": made_by, "tree": tree})

    meta: dict = {}
    if checkpoint and checkpoint.exists():
        with contextlib.suppress(Unsigned):  # of an earlier version
            tensors, meta = read_tensors(checkpoint)
        if meta.get("key", config.key()) != config.key():
            raise Corrupt(f"{checkpoint} belongs to another run; delete it to start anew")
        if meta.get("made_by") != made_by:
            warnings.warn(f"{checkpoint} was written by other code or another torch: the run starts anew", stacklevel=2)
        elif meta["data"] != data:
            raise Corrupt(f"{checkpoint} belongs to a run on other images; delete it to start anew")
    if meta.get("made_by") == made_by:
        state = _unflatten(meta["tree"], tensors)
        model.load_state_dict(state["model"])
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
        if state["kept"]:
            kept = copy.deepcopy(model).eval()
            kept.load_state_dict(state["kept"])
        method.load_state_dict(state["method"])
        if ensemble is not None:
            ensemble.load_state_dict(state["ensemble"])
        optimizer.load_state_dict(state["optimizer"])
        for p, own in optimizer.state.items():  # fused kernels want the memory layout of the weights
            own |= {k: torch.empty_like(p).copy_(v) for k, v in own.items() if v is not None and v.shape == p.shape}
        for group in optimizer.param_groups if graphed else ():
            group["lr"] = rate
        (generator_state, *others) = (
            s[distributed.rank()].clone() if config.devices > 1 else s for s in (state["generator"], *state["global"])
        )
        generator.set_state(generator_state)
        selected, step, best = state["selected"], state["step"], tuple(state["best"])
        history, sum_loss = json.loads(state["history"]), state["sum_loss"].to(device)
        met.copy_(state["met"])
        start, looking = start - state["seconds"][0], state["seconds"][1]
        with sharing:
            for g, old in zip(_generators(device), others, strict=True):
                g.set_state(old)

    compute_step = make_step(
        config, engine, model, objective, method, optimizer, generator, crop, flip, ensemble, teacher
    )

    judged = "robust" if objective.attack_loss else "clean"

    def look(epoch: int) -> tuple[Outcomes, dict[str, Tensor]]:
        """The held-out split, clean and under the training attack, or under PGD where that is a single step; and what
        the method is told of it."""
        nonlocal looking
        before = time.perf_counter()
        steps, way = look_steps(config), 2.5 * config.eps or 1.0 if watched else config.step * config.steps
        against = {"eps": config.eps, "step": way / steps, "steps": steps, "norm": config.norm}
        try:
            with low_precision:  # it only selects; the test is evaluated in full precision
                part, seed = slice(distributed.rank(), None, config.devices), _own_seed(epoch)
                images, labels = held.images[part], held.labels[part]
                outcomes = evaluate(
                    model, images, labels, {"robust": against}, class_names=range(k), seed=seed, checks=0
                )
                outcomes = distributed.merged(outcomes, held.labels)
                report = {}
                if "losses" in method.asks:
                    against["loss"] = "kl" if objective.attack_loss in ("kl", "teacher") else "ce"
                    report = class_losses(model, images, labels, k, against, seed)
                    report = distributed.class_means(report, labels, held.labels)
        except FloatingPointError as error:
            raise FloatingPointError(f"{diverged} {epoch}: {error}") from error
        for a in ("clean", "robust"):
            right, size = outcomes.counts(a)
            pairs = np.bincount(outcomes.labels * k + outcomes.predictions[a], minlength=k * k).reshape(k, k)
            told = {a: right / size, f"{a} confusion": pairs.astype(float)}
            report |= {name: torch.from_numpy(v).to(device) for name, v in told.items()}
        looking += time.perf_counter() - before
        return outcomes, report

    diverged = f"training diverged (lower lr={config.lr:g}, or the step size of {config.method}) in epoch"
    with _listening() as signals:
        model.train()
        method.start(model)
        if not step and "start" in method.asks:
            method.after_epoch(0, look(0)[1])
        while step < total:
            lr = config.lr * config.schedule(step / total)
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].fill_(lr) if graphed else lr
            index = method.draw(batch)
            y = labels[index]
            if ensemble is not None:
                ensemble.at(step / total)
            loss, told = compute_step(pixels[index[mine]], y[mine], index[mine])
            method.after_step(told)  # the loss at the parameters before the step
            if averaged is not None:
                _average(averaged, model, min(config.ema, (1 + step) / (10 + step)))
            sum_loss += loss
            if watched:
                met.index_add_(1, y, torch.stack([torch.ones_like(y), (told.logits.argmax(1) == y).long()]))
            step += 1

            if step % per_epoch == 0:
                epoch = step // per_epoch
                entry = {"epoch": epoch, "loss": sum_loss.item() / per_epoch, "lr": lr}
                sum_loss.zero_()
                if watched:
                    entry |= dict(zip(("drawn", "trained"), met.tolist(), strict=True))
                    met.zero_()
                if not math.isfinite(entry["loss"]):
                    raise FloatingPointError(f"{diverged} {epoch}: the loss is {entry['loss']}")
                method.epoch_end(epoch)
                if epoch % config.validate_every == 0 or step == total:
                    outcomes, report = look(epoch)
                    right = {a: outcomes.counts(a)[0] for a in ("clean", "robust")}
                    size = outcomes.counts("clean")[1]
                    accuracy = torch.from_numpy(right[judged] / size)
                    score = float(accuracy.min() if config.select == "worst" else accuracy.mean())
                    if score > best[0]:
                        best, selected = (score, epoch), _copy(model.state_dict())
                    entry |= {"n": size.tolist(), **{a: c.tolist() for a, c in right.items()}}
                    method.after_epoch(epoch, report)
                    if (decay := method.average(report)) is not None:
                        kept = copy.deepcopy(model).eval() if kept is None else kept
                        _average(kept, model, float(decay))
                entry |= {name: value.tolist() for name, value in method.trace().items()}
                history.append(entry)
                collapse = _collapse(history, images.class_names)
                amiss = [collapse] if collapse else _amiss(history, judged, step == total)
                complaints = [method.complaint(history), *amiss]
                said = {text for e in history for text in e.get("warnings", ())}
                if amiss := [text for text in complaints if text]:
                    entry["warnings"] = amiss
                if new := [text for text in amiss if text not in said]:
                    warnings.warn(Diverging(f"epoch {epoch}: {'; '.join(new)}"), stacklevel=3)
                if checkpoint and checkpoint_every and epoch % checkpoint_every == 0:
                    save()
            if progress:
                progress(step, total)
            if number := distributed.largest(signals[0] if signals else 0):
                if checkpoint and checkpoint_every:
                    save()
                raise Stopped(f"stopped by {signal.Signals(number).name} after step {step} of {total}")
    weights = {"last": _copy(model.state_dict()), "selected": selected}
    if averaged is not None:
        weights["ema"] = _copy(averaged.state_dict())
    if kept is not None:
        weights["averaged"] = _copy(kept.state_dict())
    return Trained(weights, best[1], time.perf_counter() - start, looking, history)

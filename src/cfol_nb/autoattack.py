"""AutoAttack (Croce and Hein 2020a), class by class: APGD-CE, targeted APGD, targeted FAB and Square, in this order.

Only images that no attack has broken yet are attacked, and an image leaves its batch as soon as it is broken. A state
that fits in a small file says which attack broke which image and how far the others are, so an evaluation that was
killed goes on where it was. Written from the papers: APGD from 2020a, FAB from Croce and Hein (2020b, "Minimally
distorted adversarial examples with a fast adaptive boundary attack"), Square from Andriushchenko et al. (2020). One
difference: Square's windows reach the last row and column of an image, in the official code they end one short. On
small images that makes this one the stronger (digits: 16 of 120 images broken, official code 12 to 15).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy.stats import hypergeom
from torch import Tensor, nn

from cfol_nb.attacks import (
    LOSSES,
    _norm,
    admit,
    answers,
    as_float,
    as_labels,
    bounded,
    check_images,
    evaluating,
    gradient,
    margin,
    predict,
    project,
    repeating,
    weight_of,
)
from cfol_nb.config import AutoAttack, choose
from cfol_nb.files import Corrupt, code_hash, read_tensors, write_tensors

ITERATIONS, QUERIES = 100, 5000  # of APGD and FAB, and of Square: the standard version
# attack: its iterations, and what one costs in forward passes (a gradient counts as one)
COST = {"apgd-ce": (ITERATIONS + 1, 2), "apgd-t": (ITERATIONS + 1, 2), "fab-t": (ITERATIONS, 3), "square": (QUERIES, 1)}


PROGRESS = ("prediction", "broken_by", "passed")  # of an evaluation, one number per image


class TimeUp(Exception):
    """The time limit was reached; what was decided is kept."""


@dataclass
class Batch:
    """What an attack is given: images that are still classified correctly, and how to report."""

    model: nn.Module
    x: Tensor  # (n, C, H, W)
    y: Tensor  # (n,)
    target: Tensor | None  # (n,) classes to be reached
    eps: float
    norm: str
    generator: torch.Generator
    tick: Callable[..., None]  # called in every iteration, with a function that makes `kept`; may raise TimeUp
    kept: dict[str, Tensor] = field(default_factory=dict)  # where an attack was stopped that can go on from there

    def __post_init__(self):
        self.found = self.x.clone()  # misclassified points, from the moment they are met


class _Rows(SimpleNamespace):
    """Tensors with one row per image that is still attacked."""

    def __init__(self, batch: Batch, **more: Tensor):
        row = torch.arange(len(batch.x), device=batch.x.device)
        super().__init__(row=row, x=batch.x, y=batch.y, t=batch.target, done=torch.zeros_like(row, dtype=torch.bool))
        self.__dict__.update(more)

    def retire(self, hit: Tensor, points: Tensor, found: Tensor, each: int, i: int) -> bool:
        """Keep the points that hit in `found`; now and then drop their rows. True when no row is left.

        Shapes stay as they are until an eighth of the rows is done, and the host looks only every `each` iterations.
        """
        if each == 1 and not hit.any():
            return False
        first = hit & ~self.done
        self.done = self.done | hit
        found[self.row] = _pick(first, points, found[self.row])
        if i % each:
            return False
        left = len(self.row) - int(self.done.sum())
        if left <= 0.875 * len(self.row):
            rows = (~self.done).nonzero().squeeze(1)
            for name, value in vars(self).items():
                if value is not None:
                    setattr(self, name, value[rows])
        return not left


def _wide(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *[1] * (like.ndim - 1))


def _pick(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in these rows (n,) bool, else `old`: torch.where, for finite images only and six times faster on a CPU."""
    return torch.lerp(old, new, _wide(rows.to(old.dtype), old))


def _length(d: Tensor, norm: str) -> Tensor:
    """(n,) size of each image; without flattening, which would copy channels_last."""
    return d.abs().amax((1, 2, 3)) if norm == "linf" else _norm(d).view(-1)


def _every(x: Tensor) -> int:
    return 10 if x.is_cuda else 1


# -- APGD --------------------------------------------------------------------------------------------------------------


def dlr_targeted(z: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """(n,) targeted difference of logits ratio (2020a, eq. 6): (z_t - z_y) / (z_1 - (z_3 + z_4) / 2), z_i sorted.

    It needs four classes. With three the denominator is z_1 - z_3, that of the untargeted ratio (eq. 5). With two the
    plain difference is taken: there is no third logit, and scale does not matter to APGD, which normalises gradients
    and compares an image only with itself.
    """
    difference = (z.gather(1, t.unsqueeze(1)) - z.gather(1, y.unsqueeze(1))).squeeze(1)
    k = z.shape[1]
    if k == 2:
        return difference
    top = z.topk(min(k, 4), 1).values
    return difference / (top[:, 0] - top[:, 2:].mean(1) + 1e-12)


def _checkpoints(iterations: int) -> set[int]:
    """Iterations after which a step size may be halved (2020a, section 3.1: first 22 %, then ever closer)."""
    at, length, out = 0, max(int(0.22 * iterations), 1), set()
    while (at := at + length) <= iterations:
        out.add(at)
        length = max(length - max(int(0.03 * iterations), 1), max(int(0.06 * iterations), 1))
    return out


def apgd(batch: Batch, loss: Callable[[Tensor, Tensor, Tensor], Tensor], iterations: int = ITERATIONS) -> Tensor:
    """Auto-PGD (2020a, algorithm 1): momentum, and steps halved where the loss stopped rising.

    Returns (n, C, H, W): misclassified points where some were met, else the images themselves.
    """
    x, eps, norm, g = batch.x, batch.eps, batch.norm, batch.generator
    if norm == "linf":
        noise = torch.rand(x.shape, generator=g, dtype=x.dtype, device=x.device) * 2 - 1
        noise = noise / _wide(_length(noise, norm), x)
    else:
        noise = torch.randn(x.shape, generator=g, dtype=x.dtype, device=x.device)
        noise = noise / _norm(noise)
    a = (x + eps * noise).clamp(0, 1)
    found = batch.found
    r = _Rows(batch, a=a, before=a, step=torch.full((len(x),), 2 * eps, dtype=x.dtype, device=x.device))
    if norm == "linf":
        r.low, r.high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)

    def inside(p: Tensor) -> Tensor:
        return torch.clamp(p, r.low, r.high) if norm == "linf" else project(p, r.x, eps, norm)

    def look() -> tuple[Tensor, Tensor, Tensor]:
        batch.tick()
        a = r.a.detach().requires_grad_()
        with torch.enable_grad():
            z = batch.model(a)
            value = loss(z, r.y, r.t)
            grad = bounded(*torch.autograd.grad(value.sum(), a), norm)
        return value.detach(), grad, z.detach().argmax(1) != r.y

    r.value, r.grad, wrong = look()
    r.top, r.top_a, r.top_grad = r.value, r.a, r.grad
    r.top_then, r.halved = r.value, torch.ones_like(r.done)  # at the last checkpoint
    r.rises = torch.zeros_like(r.row)
    if r.retire(wrong, r.a, found, 1, 0):
        return found
    last, checkpoints = 0, _checkpoints(iterations)
    for i in range(1, iterations + 1):
        direction = r.grad.sign() if norm == "linf" else r.grad / _norm(r.grad).clamp_min(1e-12)
        z = inside(r.a + _wide(r.step, r.a) * direction)
        if i > 1:
            z = inside(r.a + 0.75 * (z - r.a) + 0.25 * (r.a - r.before))
        r.before, r.a, previous = r.a, z, r.value
        r.value, r.grad, wrong = look()
        r.rises = r.rises + (r.value > previous)
        better = r.value > r.top
        r.top = torch.where(better, r.value, r.top)
        r.top_a, r.top_grad = _pick(better, r.a, r.top_a), torch.where(_wide(better, x), r.grad, r.top_grad)
        point = r.a
        if i in checkpoints:  # "<=" as in the authors' code; the paper has "<"
            halve = (r.rises <= 0.75 * (i - last)) | (~r.halved & (r.top_then >= r.top))
            r.step = torch.where(halve, r.step / 2, r.step)
            r.a, r.grad = _pick(halve, r.top_a, r.a), torch.where(_wide(halve, x), r.top_grad, r.grad)
            r.halved, r.top_then, r.rises, last = halve, r.top, torch.zeros_like(r.rises), i
        if r.retire(wrong, point, found, _every(x), i):
            break
    return found


# -- FAB ---------------------------------------------------------------------------------------------------------------


def to_plane(p: Tensor, w: Tensor, residual: Tensor, norm: str) -> Tensor:
    """(n, C, H, W) smallest d, in the norm, with <w, d> = -residual and p + d in [0, 1]; if none, as far as can be.

    Moving every pixel by min(s, room), or min(s |w|, room) for L2, changes <w, p> by a concave, piecewise linear
    function of s. Newton's method on it, from the left, is exact after finitely many steps; no sorting (2020b sorts).
    """
    # as rows, in the order in which the pixels lie in memory
    last = p.is_contiguous(memory_format=torch.channels_last)
    w, p = (v.permute(0, 2, 3, 1) if last else v for v in (w, p))
    shape = p.shape
    w, p = w.reshape(len(w), -1), p.reshape(len(p), -1)
    want, size, way = residual.abs(), w.abs(), w.sign() * -residual.sign().unsqueeze(1)
    room = ((way > 0).to(p.dtype) - p).abs_()
    # what a pixel adds per s while it moves, and once it is stuck
    terms = torch.stack([size if norm == "linf" else size**2, size * room], 1)
    slope, most = terms.sum(2).unbind(1)
    s = (want / slope).nan_to_num_(0.0)  # as if all were free

    def moved() -> Tensor:
        return s.unsqueeze(1) if norm == "linf" else s.unsqueeze(1) * size

    for i in range(1, 33):
        free = (moved() < room).to(w.dtype)
        slope, more = torch.bmm(terms, free.unsqueeze(2)).squeeze(2).unbind(1)
        new = (want - most + more) / slope  # no pixel is free: infinite, or no number where nothing is wanted
        if not i % _every(p) and not (new > s).any():
            break
        s = torch.maximum(s, new.nan_to_num_(0.0))
    out = (torch.minimum(moved().nan_to_num(0.0), room) * way).view(shape)
    return out.permute(0, 3, 1, 2) if last else out


def fab(batch: Batch, iterations: int = ITERATIONS) -> Tensor:
    """Targeted FAB (2020b, algorithm 1): steps to the linearised boundary, drawn to the image; stops inside the radius.

    Returns (n, C, H, W): misclassified points within eps where some were met, else the images themselves.
    """
    found, norm = batch.found, batch.norm
    r = _Rows(batch, a=batch.x)

    for i in range(1, iterations + 1):
        batch.tick()
        a = r.a.detach().requires_grad_()
        with torch.enable_grad():
            z = batch.model(a)
            f = (z.gather(1, r.t.unsqueeze(1)) - z.gather(1, r.y.unsqueeze(1))).squeeze(1)
            w = bounded(*torch.autograd.grad(f.sum(), a), norm)
        a, f = a.detach(), f.detach()
        both = to_plane(
            torch.cat([a, r.x]), torch.cat([w, w]), torch.cat([f, f + (w * (r.x - a)).sum((1, 2, 3))]), norm
        )
        d, d0 = both.chunk(2)
        one, two = _length(both, norm).clamp_min(1e-8).chunk(2)
        alpha = _wide((one / (one + two)).clamp(max=0.1), a)
        a = ((a + 1.05 * d) * (1 - alpha) + (r.x + 1.05 * d0) * alpha).clamp(0, 1)
        wrong = batch.model(a).argmax(1) != r.y
        r.a = _pick(wrong, r.x + 0.9 * (a - r.x), a)
        if r.retire(wrong & (_length(a - r.x, norm) <= batch.eps), a, found, _every(a), i):
            break
    return found


# -- Square ------------------------------------------------------------------------------------------------------------


def _side(i: int, h: int, w: int, norm: str) -> int:
    """Side of the window of query i: p = 0.8 of the image, halved at 10, 50, 200, ... (Andriushchenko et al. 2020).

    For L2 at least 3 and odd, as in the authors' code, so that a bump has a middle.
    """
    halvings = sum(i > at for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    side = round((0.8 / 2**halvings * h * w) ** 0.5)
    return min(max(side, 1) if norm == "linf" else max(side, 3) | 1, h, w)


def _bump(h: int, w: int) -> Tensor:
    """(h, w) nested rectangles: sum of 1 / (j + 1)^2 over those that contain a pixel (eq. 2 there)."""
    top = max(h // 2, w // 2)
    ring = torch.maximum((torch.arange(h) - h // 2).abs().view(-1, 1), (torch.arange(w) - w // 2).abs().view(1, -1))
    return (1 / torch.arange(1.0, top + 2) ** 2).flip(0).cumsum(0).flip(0)[ring.clamp(max=top)]


def _eta(s: int, turned: bool) -> Tensor:
    """(s, s) one bump up and one down, side by side, of norm 1: the shape of an L2 update."""
    parts = [_bump(k, s) * sign for k, sign in ((s // 2, 1.0), (s - s // 2, -1.0)) if k]
    e = torch.cat([p / p.norm() for p in parts])
    return (e.T if turned else e) / e.norm()


def square(batch: Batch, queries: int = QUERIES) -> Tensor:
    """Square attack on the margin: random windows, kept where they help; no gradients. Windows are shared by a batch.

    Returns (n, C, H, W): misclassified points where some were met, else the images themselves.
    """
    x, eps, norm, g = batch.x, batch.eps, batch.norm, batch.generator
    n, c, h, w = x.shape
    found = batch.found

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=g, device=x.device).to(x.dtype) * 2 - 1

    r = _Rows(batch)
    if norm == "linf":
        r.low, r.high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
        r.a = torch.clamp(x + eps * signs(n, c, 1, w), r.low, r.high)
    else:
        tile = max(min(h, w) // 5, 1)
        start = torch.zeros_like(x)
        for top in range(h % tile // 2, h - tile + 1, tile):
            for left in range(w % tile // 2, w - tile + 1, tile):
                start[:, :, top : top + tile, left : left + tile] = _eta(tile, False).to(x) * signs(n, c, 1, 1)
        r.a = (x + eps * start / _norm(start)).clamp(0, 1)
    # the host draws the windows beforehand: nothing waits for the device
    places = torch.rand(queries, 5, generator=torch.Generator().manual_seed(g.initial_seed())).tolist()
    if batch.kept:
        g.set_state(batch.kept["generator"].cpu())
        rows = batch.kept["row"]
        for name, value in vars(r).items():
            if value is not None:
                setattr(r, name, batch.kept[name] if name in batch.kept else value[rows])
        r.value = batch.kept["value"]
        found.copy_(batch.kept["found"])
    else:
        r.value = margin(batch.model(r.a), r.y)
        if r.retire(r.value > 0, r.a, found, 1, 0):
            return found

    def state() -> dict[str, Tensor]:
        rows = {name: getattr(r, name) for name in ("row", "a", "value", "done")}
        return {**rows, "found": found, "generator": g.get_state(), "query": torch.tensor(i)}

    for i in range(int(batch.kept.get("query", 0)), queries):
        batch.tick(state)
        s = _side(i, h, w, norm)
        u = places[i]
        top, left = (int(u[j] * (size - s + 1)) for j, size in ((0, h), (1, w)))
        here = (slice(None), slice(None), slice(top, top + s), slice(left, left + s))
        if norm == "linf":
            old = r.a[here].clone()
            new = torch.clamp(old + 2 * eps * signs(len(r.a), c, 1, 1), r.low[here], r.high[here])
            r.a[here] = new
        else:
            old = r.a
            r.a = _l2_window(r, here, s, u, eps, signs(len(r.a), c, 1, 1))
        if (
            norm == "linf"
            and not x.is_cuda
            and len(rows := (new != old).flatten(1).any(1).nonzero().squeeze(1)) < len(old)
        ):
            value = r.value.clone()  # what did not move, being at its bounds already, needs no pass
            if len(rows):
                value[rows] = margin(batch.model(r.a[rows]), r.y[rows])
        else:
            value = margin(batch.model(r.a), r.y)
        better = value > r.value
        r.value = torch.maximum(value, r.value)
        if norm == "linf":
            r.a[here] = _pick(better, new, old)
        else:
            r.a = _pick(better, r.a, old)
        # a row that succeeded stays so: the host need not look at every query
        if not (i + 1) % _every(x) and r.retire(r.value > 0, r.a, found, 1, i):
            break
    return found


def _l2_window(r: _Rows, here: tuple, s: int, u: list[float], eps: float, sign: Tensor) -> Tensor:
    """The L2 proposal (algorithm 3 there): the budget of a second window and what is unused go to the first one."""
    d = r.a - r.x
    c, h, w = d.shape[1:]
    top, left = (int(u[j] * (size - s + 1)) for j, size in ((2, h), (3, w)))
    there = (slice(None), slice(None), slice(top, top + s), slice(left, left + s))
    both = torch.zeros(h, w, dtype=torch.bool, device=d.device)
    both[here[2:]] = both[there[2:]] = True
    unused = (eps**2 - _norm(d) ** 2).clamp_min(0)
    budget = ((d * both).flatten(2).norm(dim=2)[..., None, None] ** 2 + unused / c).sqrt()
    old = d[here]
    new = sign * _eta(s, u[4] > 0.5).to(d) + old / old.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12)
    new = new / new.flatten(2).norm(dim=2)[..., None, None].clamp_min(1e-12) * budget
    d = d.clone()
    d[there] = 0
    d[here] = new
    return project(r.x + d, r.x, eps, "l2")


# -- the evaluation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One attack towards one target (the rank-th most likely wrong class), on all images that are left."""

    attack: str
    rank: int = 0

    def __call__(self, batch: Batch) -> Tensor:
        if self.attack == "apgd-ce":
            return apgd(batch, LOSSES["ce"])
        if self.attack == "apgd-t":
            return apgd(batch, dlr_targeted)
        return fab(batch) if self.attack == "fab-t" else square(batch)


def rounds(version: str, num_classes: int) -> list[Round]:
    """The rounds of a version, with as many targets as there are wrong classes, at most 9 (standard) or 3 (fast)."""
    choose("version", version, ("standard", "fast"))
    targets = min(num_classes - 1, 9 if version == "standard" else 3)
    attacks = ("apgd-t", "fab-t") if version == "standard" else ("apgd-t",)
    out = [Round("apgd-ce"), *(Round(a, t) for a in attacks for t in range(1, targets + 1))]
    return [*out, Round("square")] if version == "standard" else out


def _layout(model: nn.Module, x: Tensor, logits: Tensor) -> torch.memory_format:
    """channels_last, in which convolutions are faster, if the model takes it and says the same."""
    try:
        other = model(x.contiguous(memory_format=torch.channels_last))
        same = torch.allclose(other, logits, rtol=1e-3, atol=1e-3) and bool((other.argmax(1) == logits.argmax(1)).all())
    except Exception:  # a view that needs contiguous memory, or whatever the model's code asks for
        same = False
    return torch.channels_last if same else torch.contiguous_format


def interleaved(labels: Tensor, seed: int) -> Tensor:
    """(N,) order in which classes take turns, so that a part of it holds as many images of each; random within them."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.zeros_like(labels)
    for c in labels.unique():
        of_class = order[labels[order] == c]
        rank[of_class] = torch.arange(len(of_class))
    return order[rank[order].argsort(stable=True)]


class Evaluation:
    """AutoAttack on a data set, round by round and batch by batch.

    prediction: (N,) int64, at the adversarial point of a broken image, else the clean one.
    broken_by: (N,) int8; 0: wrong without an attack, i: broken by the i-th of `attacks`, -1: not broken.
    passed: (N,) int64 rounds that an image took. kept: where a batch of Square stopped. seconds: spent so far.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        spec: AutoAttack,
        *,
        batch_size: int = 250,
        seed: int = 0,
        folder: Path | None = None,
        points: Tensor | None = None,
        compiled: bool = False,
        progress: Callable[[float], None] | None = None,
        deadline: float = float("inf"),
    ):
        """folder: where the state is kept after every batch, and from where the same evaluation goes on.

        points: (N, C, H, W), where adversarial images are put. progress: called with the share of the work done.
        compiled: attack a compiled copy of the model; takes half a minute, and pays in evaluations of minutes.
        deadline: of `time.monotonic()`; `run` raises TimeUp when it is reached, even inside a batch.
        """
        self.model, self.images, self.labels, self.spec = model, images, labels, spec
        self.batch_size, self.seed, self.points = batch_size, seed, points
        self.progress, self.deadline = progress, deadline
        self.tensor = weight_of(model)
        self.prediction, self.num_classes = predict(model, images, labels, batch_size=batch_size)
        self.broken_by = torch.full_like(labels, -1, dtype=torch.int8)
        self.broken_by[self.prediction != labels] = 0
        self.passed, self.seconds, self.kept = torch.zeros_like(labels), 0.0, {}
        self.layout = torch.contiguous_format
        with evaluating(model), repeating(), torch.no_grad():
            x = self._images(slice(0, batch_size))
            logits = model(x)
            if torch.finfo(logits.dtype).bits < 32:  # under torch.autocast
                raise ValueError(f"the logits are {logits.dtype}: attacks are judged in float32 or better")
            self.layout = _layout(model, x, logits)
        with evaluating(model), repeating(), torch.enable_grad():
            some = x[:20].clone().requires_grad_()
            slope = gradient(model(some).square(), some)
        self.computed = {"logits": logits.cpu(), "slope": slope.detach().cpu().contiguous()}
        self.written = -math.inf
        self.net = model
        if compiled:
            frozen = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=self.layout)
            self.net = torch.compile(frozen, dynamic=True)
        self.rounds = rounds(spec.version, self.num_classes)
        self.attacks = list(dict.fromkeys(r.attack for r in self.rounds))
        self.state = folder and Path(folder) / f"autoattack-{self.identity}.safetensors"
        if self.state and self.state.exists():
            tensors, meta = read_tensors(self.state)
            if meta.get("of") != self.identity:
                raise Corrupt(f"{self.state} is of another evaluation; delete it to make it anew")
            if self.says(tensors):
                for name in self.computed:
                    del tensors[name]
                self.prediction, self.broken_by, self.passed = (tensors.pop(k) for k in PROGRESS)
                self.kept, self.seconds = tensors, meta["seconds"]

    def says(self, kept: dict[str, Tensor]) -> bool:
        """Whether the model still computes what it did when this was kept, forwards and backwards; the weights alone do
        not tell."""
        return all(
            kept[k].shape == v.shape and torch.allclose(kept[k], v, 1e-3, 1e-3 * v.abs().max().item())
            for k, v in self.computed.items()
        )

    def _images(self, index) -> Tensor:
        x = as_float(self.images[index], self.tensor.dtype, self.tensor.device)
        return x.contiguous(memory_format=self.layout)

    @functools.cached_property
    def identity(self) -> str:
        """16 hexadecimal digits of the weights, the images, the labels and the settings."""
        h = hashlib.sha256(f"{self.spec.model_dump_json()} {self.batch_size} {self.seed} {code_hash()}".encode())
        for t in (*self.model.state_dict().values(), self.images, self.labels):
            tensor = torch.is_tensor(t)  # a module may keep something else there, too
            h.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if tensor else repr(t).encode())
        return h.hexdigest()[:16]

    @property
    def finished(self) -> Tensor:
        """(N,) bool: fully attacked."""
        return (self.broken_by >= 0) | (self.passed == len(self.rounds))

    def run(self, index: Tensor | None = None, upto: int | None = None) -> Evaluation:
        """Attack these images (all) with the rounds before `upto` (all). Raises TimeUp at the deadline."""
        index = interleaved(self.labels, self.seed) if index is None else index
        with evaluating(self.model), repeating(), torch.no_grad():
            for number, batch in self._pending(index, len(self.rounds) if upto is None else upto):
                start = time.perf_counter()
                try:
                    self._attack(number, batch)
                finally:
                    self.seconds += time.perf_counter() - start
                    self._write()
        return self

    def _write(self) -> None:
        if self.state:
            tensors = {k: getattr(self, k) for k in PROGRESS}
            meta = {"of": self.identity, "seconds": self.seconds}
            write_tensors(self.state, tensors | self.computed | self.kept, meta)
            self.written = time.monotonic()

    def _pending(self, index: Tensor, upto: int) -> Iterator[tuple[int, Tensor]]:
        for number in range(upto):
            if self.kept and self.rounds[number].attack == "square":
                yield number, self.kept["index"]
            while len(left := index[(self.broken_by[index] < 0) & (self.passed[index] == number)]):
                yield number, left[: self.batch_size]

    def _attack(self, number: int, index: Tensor) -> None:
        now, x, device = self.rounds[number], self._images(index), self.tensor.device
        y, target = self.labels[index].to(device), None
        if now.rank:
            z = self.model(x).scatter(1, y.unsqueeze(1), -torch.inf)
            target = z.topk(now.rank, 1).indices[:, -1]
        cost = [math.prod(COST[r.attack]) for r in self.rounds]
        share = (torch.tensor([0, *cost]).cumsum(0) / sum(cost))[self.passed]
        done = torch.where(self.broken_by >= 0, 1.0, share).mean().item()
        step = len(index) / len(self.labels) * COST[now.attack][1] / sum(cost)

        def tick(state: Callable[[], dict[str, Tensor]] | None = None) -> None:
            nonlocal done
            done += step
            if self.progress:
                self.progress(min(done, 1.0))
            late = (at := time.monotonic()) > self.deadline
            if state and (late or (self.state and at > self.written + 60)):
                self.kept = {k: v.cpu().contiguous() for k, v in state().items()} | {"index": index}
                self._write()
            if late:
                raise TimeUp

        word = f"{self.seed} {number} {int(index[0])}".encode()
        seed = int.from_bytes(hashlib.sha256(word).digest()[:7])
        generator = torch.Generator(device).manual_seed(seed)
        kept = {k: v.to(device) for k, v in self.kept.items()} if now.attack == "square" else {}
        kept |= {k: v.contiguous(memory_format=self.layout) for k, v in kept.items() if v.ndim == 4}
        batch = Batch(self.net, x, y, target, self.spec.eps, self.spec.norm, generator, tick, kept)
        stopped = None
        try:
            now(batch)
        except TimeUp as stop:
            stopped = stop
        points = batch.found
        size = _length(points - x, self.spec.norm)
        predicted = answers(self.model(points), y)
        broken = ((predicted != y) & (size <= self.spec.eps * (1 + 1e-5) + 1e-6)).cpu()
        self.prediction[index[broken]] = predicted.cpu()[broken]
        self.broken_by[index[broken]] = self.attacks.index(now.attack) + 1
        if self.points is not None:
            self.points[index[broken]] = points.cpu()[broken].to(self.points)
        if stopped:
            raise stopped
        self.passed[index] = number + 1
        if now.attack == "square":
            self.kept = {}

    def skip(self, *attacks: str) -> None:
        """Take the first rounds, those of these attacks, as done: they have failed on every image before."""
        first = next((i for i, r in enumerate(self.rounds) if r.attack not in attacks), len(self.rounds))
        self.passed.clamp_(min=first)

    def predictions(self) -> dict[str, np.ndarray]:
        """attack -> (N,) int64: what the model says after that attack and those before it."""
        return {
            a: torch.where((self.broken_by >= 0) & (self.broken_by <= i), self.prediction, self.labels).numpy()
            for i, a in enumerate(self.attacks, 1)
        }

    def described(self) -> dict:
        """What was done, for whoever reads the outcome."""
        ranks = max((r.rank for r in self.rounds), default=0)
        out = {
            **self.spec.model_dump(),
            "attacks": self.attacks,
            "targets": ranks,
            "iterations": ITERATIONS,
            "queries": QUERIES if "square" in self.attacks else 0,
            "unfinished": int((~self.finished).sum()),
        }
        if self.spec.version == "fast":
            targets = min(9, self.num_classes - 1)
            fewer = f", {ranks} targets instead of {targets}" * (ranks < targets)
            out["difference"] = f"without FAB-T and Square{fewer}"
        if self.num_classes < 4:
            out["dlr"] = "z_t - z_y" if self.num_classes == 2 else "(z_t - z_y) / (z_1 - z_3)"
        return out


@dataclass(frozen=True)
class Verdict:
    """Which class is the worst of these images, as far as was attacked."""

    decided: bool
    classes: list[int]  # those that can still be the worst
    attacked: Tensor  # (K,) images fully attacked, those wrong without an attack included
    low: Tensor  # (K,) bounds of the robust accuracy on all images of the class
    high: Tensor


def remaining(left: int, tried: int, held: int, level: float) -> tuple[int, int]:
    """Bounds of how many of `left` images would hold, when of `tried` random ones `held` did.

    Each bound is wrong with probability `level` at most (the hypergeometric distribution, inverted).
    """
    if not left:
        return 0, 0
    total = np.arange(held, left - (tried - held) + 1)
    possible = total[
        (hypergeom.sf(held - 1, left, total, tried) > level) & (hypergeom.cdf(held, left, total, tried) > level)
    ]
    return int(possible[0]), int(possible[-1])


def find_worst(
    evaluation: Evaluation, confidence: float = 0.95, shares: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1)
) -> Verdict:
    """Spend the attacks on the classes that can still be the worst, until one is left, at the stated confidence.

    All images meet APGD-CE. Of each class a random share of what it left meets the other attacks; a class whose
    robust accuracy is then surely above that of another one is dropped; the others go on with a larger share.
    "The worst": of these images, if all were attacked; the confidence is that of naming the same class. The levels are
    divided by the number of classes and of looks (Bonferroni). Classes may tie; then all their images are attacked.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: between 0 and 1, as 0.95")
    e, k = evaluation, evaluation.num_classes
    e.run(upto=1)
    n = torch.bincount(e.labels, minlength=k)
    order = torch.randperm(len(e.labels), generator=torch.Generator().manual_seed(e.seed))
    left = [order[(e.labels[order] == c) & (e.broken_by[order] != 0) & (e.broken_by[order] != 1)] for c in range(k)]
    # in double precision, where equal shares of different counts are equal
    low, high = torch.zeros(k, dtype=torch.float64), torch.tensor([len(i) for i in left]).double() / n
    rivals, level = [c for c in range(k) if n[c]], (1 - confidence) / (2 * k * len(shares))
    for share in shares:
        tried = {c: left[c][: -int(-share * len(left[c]) // 1)] for c in rivals}
        e.run(torch.cat([tried[c] for c in sorted(rivals, key=lambda c: high[c].item())]))
        for c in rivals:
            held = int((e.broken_by[tried[c]] < 0).sum())
            a, b = remaining(len(left[c]), len(tried[c]), held, level)
            low[c], high[c] = max(low[c].item(), a / n[c].item()), min(high[c].item(), b / n[c].item())
        rivals = [c for c in rivals if low[c] <= high[rivals].min()]
        if len(rivals) == 1:
            break
    return Verdict(len(rivals) == 1, rivals, torch.bincount(e.labels[e.finished], minlength=k), low, high)


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    norm: str = "linf",
    version: str = "standard",
    seed: int = 0,
    *,
    batch_size: int = 250,
    compiled: bool = False,
) -> Tensor:
    """Adversarial images by AutoAttack: APGD-CE, then on what is left APGD-T, FAB-T and Square.

    model: maps images to (n, K) logits, K >= 2; attacked in eval mode, in its own type (float32 or better), left as it
    was. x: (n, C, H, W) floating point in [0, 1]. y: (n,) int64. eps: in the unit of x. norm: "linf" or "l2".
    version: "standard" (9 targets, 100 iterations, 5000 queries: Croce and Hein 2020), or "fast" (APGD-CE and APGD-T
    with 3 targets, about 12 times cheaper, weaker). batch_size: images at a time; random draws depend on it. compiled:
    attack a compiled copy of the model; takes half a minute, and pays where the attack takes many.
    Returns (n, C, H, W), detached: misclassified points in the ball and in [0, 1], and the image itself where none was
    found. ValueError for bad input.
    """
    spec = AutoAttack(eps=eps, norm=norm, version=version)
    x = check_images(admit(model, x))
    if torch.finfo(x.dtype).bits < 32:
        raise ValueError(f"images of {x.dtype}: rounding would take the points out of the ball (images.float())")
    points = x.clone()
    more = {"batch_size": batch_size, "seed": seed, "points": points, "compiled": compiled}
    Evaluation(model, x, as_labels(y), spec, **more).run()
    return points

"""The audit of one model on one set of images."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cfol_nb.attacks import admit, answers, as_float, as_labels, evaluating, gradient, predict, weight_of
from cfol_nb.audit.result import Audit
from cfol_nb.autoattack import Evaluation, TimeUp, find_worst, interleaved
from cfol_nb.checks import PASSES, black_box_check, checklist, short_pgd
from cfol_nb.config import Attack, AutoAttack
from cfol_nb.evaluate import evaluate
from cfol_nb.files import Corrupt, bar, read_tensors, write_tensors
from cfol_nb.outcomes import COLUMNS, Outcomes

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the radius, in the sweep


def _takes_three(model: nn.Module, image: Tensor) -> bool:
    """Whether the model says that it takes three channels: by its first convolution, or by refusing this grey image."""
    weight = weight_of(model)

    def takes(x: Tensor) -> bool:
        try:
            with evaluating(model), torch.no_grad():
                model(as_float(x, weight.dtype, weight.device))
        except Exception:  # whatever the model's code does
            return False
        return True

    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    three = first.in_channels == 3 if first else not takes(image)  # a normalisation widens grey images unasked
    return three and takes(image.expand(-1, 3, -1, -1))


def _checked(
    model: nn.Module, images: Tensor, labels: Tensor, class_names: Sequence[str] | None, batch_size: int
) -> tuple[tuple[str, ...], Tensor]:
    """Class names and clean predictions, after everything that can be refused without an attack."""
    try:
        clean, k = predict(model, images, labels, class_names=class_names, batch_size=batch_size)
        with evaluating(model), torch.enable_grad():
            weight = weight_of(model)
            x = as_float(images[:1], weight.dtype, weight.device).clone().requires_grad_()
            gradient(model(x), x)
    except (ValueError, FloatingPointError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model does not take images of shape {tuple(images.shape[1:])}: {reason}") from error
    names = tuple(map(str, class_names if class_names is not None else range(k)))
    if len(set(names)) < k:
        raise ValueError(f"two classes have the same name: {', '.join(names)}")
    missing = [n for n, m in zip(names, torch.bincount(labels.cpu(), minlength=k).tolist(), strict=True) if not m]
    if len(missing) == k - 1:
        raise ValueError("the images are all of a single class: there is nothing to compare")
    if missing:
        raise ValueError(
            f"{len(missing)} of the model's {k} classes have no images (for example {missing[0]!r}): "
            "their robustness, and so the worst, cannot be known"
        )
    return names, clean


def _sweep(model: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: str) -> Tensor:
    """(n,) smallest radius of the sweep at which PGD-20 breaks an image, 0 if it is wrong as it is, inf if at none."""
    tensor = weight_of(model)
    x, y = as_float(images, tensor.dtype, tensor.device), labels.to(tensor.device)
    first, rows = torch.full((len(labels),), torch.inf), torch.arange(len(labels))
    with evaluating(model), torch.no_grad():
        for r in (0.0, *(f * eps for f in FACTORS)):
            points = x if r == 0 else short_pgd(model, x, y, r, norm, 20, retire=True)
            fell = answers(model(points), y) != y
            first[rows[fell.cpu()]] = r
            rows, x, y = rows[~fell.cpu()], x[~fell], y[~fell]
            if not len(rows):
                break
    return first


class _Timed(nn.Module):
    """The model, until the deadline; after it TimeUp."""

    def __init__(self, model: nn.Module, deadline: float):
        super().__init__()
        self.model, self.deadline = model, deadline

    def forward(self, x: Tensor) -> Tensor:
        if time.monotonic() > self.deadline:
            raise TimeUp
        return self.model(x)


def audit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str] | None = None,
    *,
    eps: float = 8 / 255,
    norm: str = "linf",
    version: str = "standard",
    name: str = "model",
    worst_only: bool = False,
    minutes: float | None = None,
    folder: Path | None = None,
    surrogate: nn.Module | None = None,
    compiled: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    show: int = 6,
) -> Audit:
    """How robust is each class of this model, how sure is that, and what attacks it?

    model: any module that maps images in [0, 1] to (n, K) logits, on any device, in float32 or better; it is judged in
    eval mode and left as it was. images: (N, C, H, W) uint8, or floating point in [0, 1]; grey ones are given to a
    model that takes three channels only as three equal ones, each attacked on its own. labels: (N,) integers in 0..K-1,
    every class present. eps: in the unit of images in [0, 1]. norm: "linf" or "l2".
    version: of AutoAttack, "standard" or "fast". worst_only: spend AutoAttack on the classes that can still be the
    worst, until one is left at 95 % confidence; the others are then attacked in part, and the outcome says so.
    minutes: a limit; images that no attack broke and AutoAttack did not come to an end with are reported as unfinished,
    the accuracy of their class being an upper bound.
    folder: where what was found is kept after every batch, from which the same audit goes on when it was stopped.
    surrogate: see `checks.checklist`. compiled: attack a compiled copy of the model (half a minute; for long audits).
    batch_size: images at a time; by default 250 of 3 x 32 x 32, fewer if they are larger (on a GPU beyond 16 times that
    size); random draws depend on it. show: images in the gallery.
    Everything that can be refused is refused before the first attack: ValueError, FloatingPointError.
    """
    start, labels, images = time.monotonic(), as_labels(labels), admit(model, images)
    if images.ndim != 4:
        raise ValueError(f"images of shape {tuple(images.shape)}: (images, channels, height, width) is needed")
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes={minutes}: a number of at least 0 is needed")
    if widened := images.shape[1] == 1 and len(images) > 0 and _takes_three(model, images[:1]):
        images = images.expand(-1, 3, -1, -1).contiguous()
    if batch_size is None:
        room = 250 * 3 * 32 * 32 * (16 if weight_of(model).is_cuda else 1)
        batch_size = min(max(room // max(images[:1].numel(), 1), 1), 250)
    spec = AutoAttack(eps=eps, norm=norm, version=version)
    eps = spec.eps
    names, clean = _checked(model, images, labels, class_names, batch_size)
    each_pass = (time.monotonic() - start) / len(labels)
    # what comes last, the gallery, takes some 60 passes of each image
    deadline = math.inf if minutes is None else start + 60 * minutes - min(60 * show * each_pass, 30 * minutes)
    pgd20 = Attack(eps=eps, step=max(eps / 8, 1e-12), steps=20, norm=norm)
    with bar(100, "audit") as progress:

        def upto(share: float) -> None:
            late = (time.monotonic() - start) / (60 * minutes) if minutes else 0.0
            progress.update(100 * min(max(share, late), 1) - progress.n)  # the time left is never beyond the limit

        e = Evaluation(
            model,
            images,
            labels,
            spec,
            batch_size=batch_size,
            seed=seed,
            folder=folder,
            compiled=compiled,
            progress=lambda share: upto(0.1 + 0.9 * share),
            deadline=deadline,
        )
        state = folder and Path(folder) / f"pgd-{e.identity}.safetensors"
        predicted, first, kept = torch.full_like(labels, -1), torch.empty(len(labels)), {}
        if state and state.exists() and e.says((before := read_tensors(state))[0]):
            if before[1].get("of") != e.identity:
                raise Corrupt(f"{state} is of another audit; delete it to make it anew")
            predicted, first, kept = before[0]["pgd20"], before[0]["first"], before[1]
        order, spent, note = interleaved(labels, seed), e.seconds, ""
        timed, checks = _Timed(model, deadline), pd.DataFrame(columns=COLUMNS)
        try:
            while len(left := order[predicted[order] < 0]):
                # some 300 passes of each image, so that a limit leaves more than the half of a batch
                room = batch_size if minutes is None else (deadline - time.monotonic()) / 4 / (300 * each_pass)
                rows = left[: max(min(batch_size, int(room)), 1)]
                x, y = images[rows], labels[rows]
                found = evaluate(timed, x, y, {"pgd20": pgd20}, batch_size=batch_size, seed=seed, checks=0)
                first[rows] = _sweep(timed, x, y, eps, norm)
                predicted[rows] = torch.from_numpy(found.predictions["pgd20"])
                if state:
                    write_tensors(state, {"pgd20": predicted, "first": first, **e.computed}, {"of": e.identity})
                upto(0.1 * (predicted >= 0).double().mean().item())
            # a fifth of the time that is left, if 20 images may take it
            many = min(200, max(20, batch_size), max(20.0, (deadline - time.monotonic()) / 5 / (PASSES * each_pass)))
            some = order[: int(many)]
            if surrogate or kept.get("checked", 0) < len(some):
                checks = checklist(timed, images[some], labels[some], eps, norm, surrogate=surrogate)
                if state and not surrogate:
                    meta = {"of": e.identity, "checked": len(some), "checks": checks.to_dict("list")}
                    write_tensors(state, {"pgd20": predicted, "first": first, **e.computed}, meta)
            else:
                checks = pd.DataFrame(kept["checks"], columns=checks.columns)
            if worst_only:
                verdict = find_worst(e)
                if verdict.decided:  # so that its accuracy is no bound
                    e.run((labels == verdict.classes[0]).nonzero().squeeze(1))
                left = ", ".join(names[c] for c in verdict.classes)
                if not e.finished.all():
                    note = (
                        f"Of these images {left} is the worst class, at 95 % confidence (others may name another)"
                        if verdict.decided
                        else f"Not decided between {left}, with all their images attacked"
                    ) + "; the other classes were attacked in part."
            else:
                e.run()
        except TimeUp:
            note = "The audit was stopped at its time limit"
            if checks.empty:
                note += ", before the checks of its numbers"
            note += "."
    fresh = (predicted < 0).numpy()
    if fresh.all():
        raise ValueError(
            "the time limit came before any image was attacked: give more minutes, fewer images or smaller ones"
        )
    if fresh.any():
        note += f" PGD-20 came to {(~fresh).sum()} of {len(fresh)} images; the others count as withstanding it."
    first, right = first.numpy(), (clean == labels).numpy()
    first[fresh] = np.where(right, np.inf, 0)[fresh]
    outcomes = Outcomes(labels.numpy(), {"clean": clean.numpy()}, names, {})
    outcomes.add("pgd20", np.where(fresh, clean.numpy(), predicted.numpy()), pgd20.model_dump())
    if fresh.any():
        skipped = np.bincount(outcomes.labels[fresh & right], minlength=len(names))
        outcomes.attacks["pgd20"]["unfinished"] = skipped.tolist()
    outcomes.add_autoattack("autoattack", e)
    if e.finished.all():
        checks = pd.concat([checks, black_box_check(outcomes, "autoattack")], ignore_index=True)
    outcomes.checks["autoattack"] = checks
    settings, final = outcomes.attacks["autoattack"], outcomes.predictions["autoattack"]
    fell = ~e.finished.numpy() & outcomes.correct("autoattack") & ~outcomes.correct("pgd20")
    if fell.any():  # known to be broken
        final[fell] = outcomes.predictions["pgd20"][fell]
        settings["broken by PGD-20 alone"] = int(fell.sum())
    unfinished = np.bincount(outcomes.labels[~e.finished.numpy() & ~fell], minlength=len(names))
    settings["unfinished"] = int(unfinished.sum())
    if unfinished.any():
        note += f" {unfinished.sum()} images are not fully attacked: the accuracies of their classes are upper bounds."
    if widened:
        note += " The images are grey: the model was given each as three equal channels, attacked on their own."
    levels = [0.0, *(f * eps for f in FACTORS)]
    k = len(names)
    n = np.bincount(outcomes.labels, minlength=k)
    falls = [np.bincount(outcomes.labels[first > r], minlength=k) / n for r in levels]
    return Audit(
        name,
        outcomes,
        pd.DataFrame(falls, index=pd.Index(levels, name="radius"), columns=names),
        _gallery(model, images, labels, first, eps, norm, show),
        first,
        unfinished,
        note.strip(),
        spent + time.monotonic() - start,
    )


def _gallery(
    model: nn.Module, images: Tensor, labels: Tensor, first: np.ndarray, eps: float, norm: str, show: int
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """The images that are right and fall at the smallest radius, no more than two of a class, with PGD-20 at eps."""
    tensor = weight_of(model)
    fell = np.flatnonzero((first > 0) & (first <= eps))
    fell, taken, index = fell[np.argsort(first[fell], kind="stable")], {}, []
    for i in fell:
        c = int(labels[i])
        if taken.get(c, 0) < 2 and len(index) < show:
            taken[c] = taken.get(c, 0) + 1
            index.append(i)
    index = np.array(index, dtype=int)
    x, y = as_float(images[index], tensor.dtype, tensor.device), labels[index].to(tensor.device)
    x_adv = short_pgd(model, x, y, eps, norm, 20, best=True) if len(index) else x
    with evaluating(model), torch.no_grad():
        predicted = model(x_adv).argmax(1).cpu().numpy() if len(index) else index
    return x.cpu(), x_adv.cpu(), index, predicted

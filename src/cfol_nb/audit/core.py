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
from cfol_nb.audit.radii import FACTORS, refine, sweep
from cfol_nb.audit.result import Audit
from cfol_nb.autoattack import COST, Evaluation, TimeUp, find_worst, interleaved
from cfol_nb.checks import PASSES, black_box_check, checklist, short_pgd
from cfol_nb.config import Attack, AutoAttack
from cfol_nb.corruptions import corrupt
from cfol_nb.evaluate import evaluate
from cfol_nb.files import Corrupt, bar, read_tensors, write_tensors
from cfol_nb.outcomes import COLUMNS, Outcomes

VALUES = 50  # of an attribute, at most


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
    model: nn.Module, images: Tensor, labels: Tensor, class_names: Sequence[str] | None, batch_size: int, only: bool
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the outputs and clean predictions, after everything that can be refused without an attack."""
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
    there = torch.bincount(labels.cpu(), minlength=k) > 0
    missing = [n for n, m in zip(names, there.tolist(), strict=True) if not m]
    if only and there[: k - len(missing)].all():
        missing = missing if len(missing) == k - 1 else []
    if len(missing) == k - 1:
        raise ValueError("the images are all of a single class: there is nothing to compare")
    if missing:
        raise ValueError(
            f"{len(missing)} of the model's {k} classes have no images (for example {missing[0]!r}): "
            "their robustness, and so the worst, cannot be known"
        )
    return names, clean


class _Timed(nn.Module):
    """The model, until the deadline; after it TimeUp. passes: of single images so far, a gradient counts as one."""

    def __init__(self, model: nn.Module, deadline: float):
        super().__init__()
        self.model, self.deadline, self.passes = model, deadline, 0

    def forward(self, x: Tensor) -> Tensor:
        if time.monotonic() > self.deadline:
            raise TimeUp
        self.passes += len(x) * (1 + (x.requires_grad and torch.is_grad_enabled()))
        return self.model(x)


class _Left:
    """How long the rest of an audit takes, all parts together: the passes that are left, by what one took so far.

    What AutoAttack has not come to is taken to be as PGD-20 says: an image that PGD-20 broke falls in a tenth of its
    first attack, another one withstands all its rounds.
    """

    def __init__(self, e: Evaluation, timed: _Timed, each_pass: float, more: float):
        """each_pass: seconds, as first measured; more: passes of the parts between PGD-20 and AutoAttack."""
        self.e, self.timed, self.each_pass, self.more = e, timed, each_pass, more
        self.start, self.attacked = time.monotonic(), (0.0, 0.0)
        cost = torch.tensor([0.0, *(math.prod(COST[r.attack]) for r in e.rounds)], dtype=torch.float64)
        self.cost = cost.sum() - cost.cumsum(0)  # that is left after so many rounds

    def rounds(self, predicted: Tensor, share: float | None) -> float:
        """Passes of AutoAttack. predicted: by PGD-20, -1 where it has not come to; share: of AutoAttack's work done, as
        it says itself, None before it began."""
        e, seen = self.e, (predicted >= 0) & (self.e.broken_by != 0)
        falls = torch.where(seen, predicted != e.labels, (predicted != e.labels)[seen].double().mean().nan_to_num())
        rest, quick = self.cost[e.passed], 0.1 * (self.cost[0] - self.cost[1])
        rest = torch.where(e.passed == 0, rest + falls * (quick - rest), rest)
        left = (rest * (e.broken_by < 0)).sum().item()
        if share is not None:  # inside a batch
            before = torch.where(e.broken_by < 0, 1 - self.cost[e.passed] / self.cost[0], 1.0).mean().item()
            left -= (share - before) * len(e.labels) * self.cost[0].item()
        return max(left, 0.0)

    def __call__(self, predicted: Tensor, share: float | None = None) -> float:
        """Seconds; the arguments are those of `rounds`."""
        now, passes, left = time.monotonic(), self.timed.passes, self.rounds(predicted, share)
        if share is None:
            n = max(int((predicted >= 0).sum()), 1)
            left += self.more + passes / n * (len(predicted) - n)
            self.attacked = now, left
        since, first = self.attacked
        if share is not None and first - left > 0.1 * first:  # enough to go by
            return left * (now - since) / (first - left)
        return left * ((since - self.start) / passes if passes else self.each_pass)


def _points(path: Path, shape: Sequence[int], begun: bool) -> Tensor:
    """(N, C, H, W) float32 in a file that NumPy reads, so that it takes no memory; an earlier call's as it was left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if begun and not path.exists():
        raise Corrupt(f"{path} is gone; delete the folder to make it anew")
    mode = "r+" if path.exists() else "w+"
    return torch.from_numpy(np.lib.format.open_memmap(path, mode, np.float32, tuple(shape)))


def _corrupted(
    model: nn.Module, images: Tensor, labels: Tensor, name: str, batch_size: int, seed: int
) -> dict[str, np.ndarray]:
    """ "name severity" -> (N,) predictions."""
    tensor, out = weight_of(model), {}
    for severity in range(1, 6):
        generator, predicted = torch.Generator().manual_seed(seed), []
        with evaluating(model), torch.no_grad():
            for i in range(0, len(labels), batch_size):
                x = as_float(images[i : i + batch_size], torch.float32, "cpu")
                x = corrupt(x, name, severity, generator).to(tensor.device, tensor.dtype)
                predicted.append(answers(model(x), labels[i : i + batch_size].to(tensor.device)).cpu())
        out[f"{name} {severity}"] = torch.cat(predicted).numpy()
    return out


def _admitted(attributes: pd.DataFrame, n: int) -> pd.DataFrame:
    """The attributes of n images as text. Raises ValueError where they are no groups of images."""
    if len(attributes) != n or not attributes.shape[1]:
        raise ValueError(f"{len(attributes)} rows of {attributes.shape[1]} attributes, but {n} images")
    attributes = attributes.fillna("(none)").astype(str)
    for name, values in attributes.items():
        if not 2 <= (found := values.nunique()) <= VALUES:
            what = f"{found} different values, for example {values.iloc[0]!r}"
            raise ValueError(f"attribute {name!r} has {what}: 2 to {VALUES} make groups of images to compare")
    return attributes


def read_attributes(path: Path, files: Sequence[str]) -> pd.DataFrame:
    """One row per image in this order, from a .csv or .parquet with a column `image`, the file of an image as in
    `files`, and one for each attribute. Rows of other images are left out. Raises ValueError, with the file, for what
    does not fit."""
    if not (path := Path(path)).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not files:
        raise ValueError(f"{path}: the images have no names here: attributes need a folder of them (imagefolder:PATH)")
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
        else:
            raise ValueError("a .csv or .parquet is needed")
    except ImportError as error:
        raise ValueError(f"{path}: Parquet needs pyarrow (pip install pyarrow); or save the table as .csv") from error
    except ValueError as error:  # of pandas and pyarrow, too
        raise ValueError(f"{path}: {error}") from error
    if "image" not in table:
        raise ValueError(f"{path} has no column 'image', with files such as {files[0]!r}")
    table = table.astype({"image": str}).set_index("image")
    if table.index.has_duplicates:
        raise ValueError(f"{path} has two rows for {table.index[table.index.duplicated()][0]!r}")
    if lost := [file for file in files if file not in table.index]:
        raise ValueError(f"{path} has no row for {len(lost)} of {len(files)} images, for example {lost[0]!r}")
    return table.loc[list(files)].reset_index(drop=True)


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
    files: Sequence[str] = (),
    attributes: pd.DataFrame | None = None,
    corruptions: Sequence[str] = (),
    keep_images: bool = False,
    only: bool = False,
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
    files: (N,) names of the images. attributes: one row per image, a column for each attribute (camera, site), by whose
    values, and by class and value, accuracies are stated, too. corruptions: names of `corruptions.CORRUPTIONS`, judged
    at severities 1 to 5 without an attack. keep_images: AutoAttack's images are kept in folder/images as
    adversarial-*.npy, (N, C, H, W) float32; the image itself where none was found.
    only: outputs after those of the classes, which no image is of, are allowed: they compete.
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
    if keep_images and folder is None:
        raise ValueError("keep_images=True: a folder is needed to keep them in")
    if attributes is not None:
        attributes = _admitted(attributes, len(labels))
    for each in corruptions:
        corrupt(as_float(images[:1], torch.float32, "cpu"), each, 1)
    outputs, clean = _checked(model, images, labels, class_names, batch_size, only)
    names = outputs[: int(labels.max()) + 1]
    each_pass = (time.monotonic() - start) / len(labels)
    # what comes last, the gallery, takes some 60 passes of each image
    deadline = math.inf if minutes is None else start + 60 * minutes - min(60 * show * each_pass, 30 * minutes)
    pgd20 = Attack(eps=eps, step=max(eps / 8, 1e-12), steps=20, norm=norm)
    with bar(100, "audit") as progress:

        def show_left(share: float | None = None) -> None:
            now = time.monotonic()
            rest = min(left_of(predicted, share), max(deadline - now, 0))  # never beyond the limit
            progress.update(100 * (now - start) / max(now - start + rest, 1e-9) - progress.n)

        progress.smoothing = 0  # its time left is by all that is done
        e = Evaluation(
            model,
            images,
            labels,
            spec,
            batch_size=batch_size,
            seed=seed,
            folder=Path(folder, "images") if keep_images else folder,  # their state, too, or some would be lacking
            compiled=compiled,
            progress=show_left,
            deadline=deadline,
        )
        if keep_images:
            e.points = _points(Path(folder, "images", f"adversarial-{e.identity}.npy"), images.shape, e.seconds > 0)
        state = folder and Path(folder) / f"pgd-{e.identity}.safetensors"
        predicted, first, kept = torch.full_like(labels, -1), torch.empty(len(labels)).double(), {}
        radii = [0.0, *(f * eps for f in FACTORS)]
        if state and state.exists() and e.says((before := read_tensors(state))[0]):
            if before[1].get("of") != e.identity:
                raise Corrupt(f"{state} is of another audit; delete it to make it anew")
            if "radii" in before[1]:  # else of an earlier version
                predicted, first, kept = before[0]["pgd20"], before[0]["first"], before[1]
                radii = kept["radii"]

        def keep(**more) -> None:
            kept.update(more)
            if state:
                meta = {**kept, "of": e.identity, "radii": radii}
                write_tensors(state, {"pgd20": predicted, "first": first, **e.computed}, meta)

        order, spent, note = interleaved(labels, seed), e.seconds, ""
        timed, checks = _Timed(model, deadline), pd.DataFrame(columns=COLUMNS)
        # after the first radii some 40 passes of an image for others
        corrupted, several = {}, 40 * len(labels) + 5 * len(corruptions) * len(labels)
        left_of = _Left(e, timed, each_pass, PASSES * min(200, max(20, batch_size), len(labels)) + several)
        try:
            while len(left := order[predicted[order] < 0]):
                # some 300 passes of each image, so that a limit leaves more than the half of a batch
                room = batch_size if minutes is None else (deadline - time.monotonic()) / 4 / (300 * each_pass)
                rows = left[: max(min(batch_size, int(room)), 1)]
                x, y = images[rows], labels[rows]
                found = evaluate(timed, x, y, {"pgd20": pgd20}, batch_size=batch_size, seed=seed, checks=0)
                first[rows] = sweep(timed, x, y, radii, norm)
                predicted[rows] = torch.from_numpy(found.predictions["pgd20"])
                keep()
                show_left()
            # a fifth of the time that is left, if 20 images may take it
            many = min(200, max(20, batch_size), max(20.0, (deadline - time.monotonic()) / 5 / (PASSES * each_pass)))
            some = order[: int(many)]
            if surrogate or kept.get("checked", 0) < len(some):
                checks = checklist(timed, images[some], labels[some], eps, norm, surrogate=surrogate)
                if not surrogate:
                    keep(checked=len(some), checks=checks.to_dict("list"))
            else:
                checks = pd.DataFrame(kept["checks"], columns=checks.columns)
            left_of.more = several
            show_left()
            for each in corruptions:
                corrupted |= _corrupted(timed, images, labels, each, batch_size, seed)
            refine(timed, images, labels, first, radii, eps, norm, batch_size, keep)
            left_of.more = 0
            show_left()
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
    first, right = first.numpy().astype(float), (clean == labels).numpy()
    first[fresh] = np.where(right, np.inf, 0)[fresh]
    others = outputs[len(names) :]
    outcomes = Outcomes(labels.numpy(), {"clean": clean.numpy()}, names, {}, images=files, others=others)
    for each, values in corrupted.items():
        corruption, severity = each.split(" ")
        outcomes.add(each, values, {"corruption": corruption, "severity": int(severity)})
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
    open_ = ~e.finished.numpy() & ~fell
    settings["unfinished"] = int(open_.sum())
    if open_.any():
        note += f" {open_.sum()} images are not fully attacked, and count as withstanding."
    if others:
        note += f" {len(others)} other outputs of the model, which no image is of, compete."
    if widened:
        note += " The images are grey: the model was given each as three equal channels, attacked on their own."
    shown = _gallery(model, images, labels, first, eps, norm, show)
    fell = ~(outcomes.correct("autoattack") & outcomes.correct("pgd20")) & (first > eps)  # what is broken at eps
    first[fell] = eps
    levels, n = np.sort(radii), np.bincount(outcomes.labels, minlength=len(names))
    left = [np.bincount(outcomes.labels[first > r], minlength=len(names)) / n for r in levels]
    mistaken = _few(order[(clean != labels)[order]].numpy(), outcomes.labels, show)
    if keep_images:
        for rows in (e.broken_by <= 0).nonzero().squeeze(1).split(batch_size):
            e.points[rows] = as_float(images[rows], torch.float32, "cpu")
    return Audit(
        name,
        outcomes,
        pd.DataFrame(left, index=pd.Index(levels, name="radius"), columns=names),
        shown,
        first,
        open_,
        note.strip(),
        spent + time.monotonic() - start,
        mistaken=(as_float(images[mistaken], torch.float32, "cpu"), mistaken),
        attributes=attributes,
    )


def _few(index: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """The first of these images, no more than two of a class."""
    taken: dict[int, int] = {}
    out = []
    for i in index:
        c = int(labels[i])
        if taken.get(c, 0) < 2 and len(out) < most:
            taken[c] = taken.get(c, 0) + 1
            out.append(i)
    return np.array(out, dtype=int)


def _gallery(
    model: nn.Module, images: Tensor, labels: Tensor, first: np.ndarray, eps: float, norm: str, show: int
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """The images that are right and fall at the smallest radius, no more than two of a class, with PGD-20 at eps."""
    tensor = weight_of(model)
    fell = np.flatnonzero((first > 0) & (first <= eps))
    index = _few(fell[np.argsort(first[fell], kind="stable")], labels.numpy(), show)
    x, y = as_float(images[index], tensor.dtype, tensor.device), labels[index].to(tensor.device)
    x_adv = short_pgd(model, x, y, eps, norm, 20, best=True) if len(index) else x
    with evaluating(model), torch.no_grad():
        predicted = model(x_adv).argmax(1).cpu().numpy() if len(index) else index
    return x.cpu(), x_adv.cpu(), index, predicted

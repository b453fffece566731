"""Before the attacks: which output is which class, and is the model right at all?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from cfol_nb.attacks import as_float, evaluating, predict, weight_of
from cfol_nb.audit.foreign import IMAGENET, Loaded, needed
from cfol_nb.autoattack import interleaved
from cfol_nb.stats import wilson

SHOWN, IMAGES = 20, 500  # names in a sentence; images that are looked at


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them, the first ones of many."""
    return ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)


def read_classes(path: Path) -> tuple[str, ...]:
    """The names of a model's outputs in their order, one on a line. Raises ValueError for none, or for one twice."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: one class name on a line is needed, in the model's order") from error
    names = [n for n in names if n]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(f"{path} names {twice[0]!r} twice: one class name on a line is needed, in the model's order")
    if len(names) < 2:
        raise ValueError(f"{path} has {len(names)} names: one class name on a line is needed, in the model's order")
    return tuple(names)


def outputs_of(model: nn.Module, images: Tensor) -> int:
    """How many outputs the model has, by its first image. Raises ValueError for one that does not take it."""
    return _predict(model, images[:1], torch.zeros(1, dtype=torch.int64))[1]


def _predict(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 50) -> tuple[Tensor, int]:
    try:
        return predict(model, images, labels, batch_size=batch_size)
    except (ValueError, FloatingPointError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model does not take images of shape {tuple(images.shape[1:])}: {reason}") from error


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _by_name(classes: Sequence[str], outputs: Sequence[str]) -> dict[str, int]:
    """Class -> output of that name: as it is, but for case and punctuation, else by its first name ("tench, Tinca
    tinca"). Raises ValueError for a name that several outputs have."""
    found: dict[str, list[int]] = {}
    for key in (_plain, lambda name: _plain(name.partition(",")[0])):
        known: dict[str, list[int]] = {}
        for i, name in enumerate(outputs):
            known.setdefault(key(name), []).append(i)
        for c in classes:
            if c not in found and (of := known.get(_plain(c))):
                found[c] = of
    for c, of in found.items():
        if len(of) > 1:
            raise ValueError(f"class {c!r} is the name of {len(of)} outputs of the model: give --classes FILE")
    return {c: of[0] for c, of in found.items()}


def match(
    classes: Sequence[str], outputs: Sequence[str], k: int, *, only: bool = False
) -> tuple[list[int], tuple[str, ...], str]:
    """Which of the model's k outputs is which class: an order of outputs, the classes' first; their names in it; how it
    is known, in words.

    outputs: the names of the model's outputs in their order, empty where they are not known. Classes called as
    ImageNet's folders (n01440764) are known where there are 1000 outputs; other numbers count the outputs where there
    are more of them. only: outputs without a class are allowed. Raises ValueError, with the next step.
    """
    if outputs and len(outputs) != k:
        raise ValueError(f"{len(outputs)} class names ({listed(outputs)}), but the model has {k} outputs")
    found, how = _by_name(classes, outputs) if outputs else {}, "by name"
    if not found and k == 1000 and all(re.fullmatch(r"n\d{8}", c) for c in classes):
        if len(classes) == k:
            found, how = {c: i for i, c in enumerate(sorted(classes))}, "ImageNet's order"
        else:
            wnids = needed("timm", "timm").data.ImageNetInfo().label_names()
            found, how = {c: wnids.index(c) for c in classes if c in wnids}, "ImageNet's folder names"
    elif not found and k > len(classes) and all(c.isascii() and c.isdecimal() and int(c) < k for c in classes):
        found, how = {c: int(c) for c in classes}, "the folders' numbers"
    elif not found and k == len(classes):
        unlike = f", though the model names them {listed(outputs)}" * bool(outputs)
        return list(range(k)), tuple(classes), f"taken to be the model's order{unlike}"
    if not found:
        raise ValueError(
            f"the model has {k} outputs, the images {len(classes)} classes ({listed(classes)}): give the names of the "
            "outputs in their order (--classes FILE, one on a line)"
        )
    if lost := [c for c in classes if c not in found]:
        raise ValueError(
            f"class {lost[0]!r} is none of the model's outputs ({listed(outputs or [str(i) for i in range(k)])}): give "
            "their names in their order (--classes FILE, one on a line)"
        )
    own = [found[c] for c in classes]
    if len(set(own)) < len(own):
        raise ValueError(f"two classes are the same output of the model: {listed(classes)}")
    rest = [i for i in range(k) if i not in set(own)]
    if rest and not only:
        raise ValueError(
            f"{len(rest)} of the model's {k} outputs have no images (for example {(outputs or range(k))[rest[0]]!r}): "
            "say --only to audit the classes that have, with the other outputs competing"
        )
    others = [outputs[i] if outputs else str(i) for i in rest]
    taken = set(classes)
    return [*own, *rest], (*classes, *(f"{n} (other)" if n in taken else n for n in others)), how


def clean_accuracy(predicted: Tensor, labels: Tensor) -> tuple[float, float, float, float]:
    """Accuracy, its 95 % Wilson interval, and chance: the agreement that such predictions would have with such labels
    if they had nothing to do with each other (Cohen 1960)."""
    n, right = len(labels), int((predicted == labels).sum())
    size = int(max(predicted.max(), labels.max())) + 1
    p, q = (torch.bincount(v, minlength=size).double() / n for v in (predicted, labels))
    return right / n, *wilson(right, n), float((p * q).sum())


def _variants(loaded: Loaded) -> Iterator[tuple[str, Loaded]]:
    """The model behind other preprocessing, and the options that make it so."""
    t = loaded.transform
    yield "--bgr" if not t.bgr else "RGB instead of BGR", replace(loaded, transform=replace(t, bgr=not t.bgr))
    plain = replace(t, mean=(), std=(), scale=1.0)
    for said, other in (
        ("--scale 255 (a model of images in 0..255)", replace(plain, scale=255.0)),
        ("images in [0, 1] without a normalisation (it is in the model already)", plain),
        ("--mean 0.5 --std 0.5", replace(plain, mean=(0.5,), std=(0.5,))),
        ("ImageNet's --mean and --std", replace(plain, mean=IMAGENET.mean, std=IMAGENET.std)),
    ):
        if other != t:
            yield said, replace(loaded, transform=other)


def _reordered(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[float, float, float, str]:
    """The best order of the outputs, fitted to one half of the images: accuracy on the other half, its lower end and
    chance there; the order in words."""
    half, k = torch.arange(len(labels)) % 2 == 0, len(names)
    counts = np.zeros((k, k))
    np.add.at(counts, (labels[half].numpy(), predicted[half].numpy()), 1)
    to = torch.from_numpy(linear_sum_assignment(-counts)[1])  # of a class: the output that is taken for it
    value, low, _, chance = clean_accuracy(predicted[~half], to[labels[~half]])
    outputs = [names[c] for c in np.argsort(to.numpy())]
    return value, low, chance, f"the outputs in the order {listed(outputs)} (--classes FILE, one name on a line)"


def explained(loaded: Loaded, order: Sequence[int], images: Tensor, labels: Tensor, names: Sequence[str]) -> str:
    """What would make the accuracy of such a model better than chance: other preprocessing or another order of classes;
    empty if nothing that is known."""
    tensor = weight_of(loaded.body)
    with evaluating(loaded.body), torch.no_grad():
        z = loaded.model(as_float(images[:50], tensor.dtype, tensor.device))
    if z.shape[1] == 2 and not z[:, 0].any() and bool(((z[:, 1] >= 0) & (z[:, 1] <= 1)).all()):
        return (
            "its single output lies between 0 and 1, as a probability does: let it return the logit before the sigmoid"
        )
    best, said = 0.0, ""
    for way, other in [("", loaded), *_variants(loaded)]:
        try:
            predicted = _predict(other.ordered(order), images, labels)[0]
        except (ValueError, FloatingPointError):
            continue
        value, low, _, chance = clean_accuracy(predicted, labels)
        if way and low > chance and value > best + 0.05:  # the simpler one unless another is clearly better
            best, said = value, f"with {way} it would be {100 * value:.1f} %"
        value, low, chance, how = _reordered(predicted, labels, names)
        if low > chance and value > best + 0.05:
            best, said = value, f"with {f'{way} and ' * bool(way)}{how} it would be {100 * value:.1f} %"
    return said


def first_look(
    loaded: Loaded, order: Sequence[int], images: Tensor, labels: Tensor, names: Sequence[str]
) -> tuple[str, str]:
    """The clean accuracy of `IMAGES` images of all classes in words, and, where it is no better than chance, what may
    be wrong. order, names: of the outputs, as from `match`.
    """
    some = interleaved(labels, 0)[:IMAGES]
    images, labels = images[some], labels[some]
    predicted = _predict(loaded.ordered(order), images, labels)[0]
    value, low, high, chance = clean_accuracy(predicted, labels)
    text = f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {len(labels)} images"
    if low > chance:
        other, at_least, _, how = _reordered(predicted, labels, names)
        better = f"; with {how} it would be {100 * other:.1f} %: is the class order right?" * bool(at_least > high)
        return text + better, ""
    why = explained(loaded, order, images, labels, names)
    return text, (
        f"clean accuracy is {text}, no more than chance ({100 * chance:.1f} %): is the class order right, and the "
        f"preprocessing? {why[:1].upper() + why[1:] if why else 'No other order or known preprocessing explains it'}"
    )

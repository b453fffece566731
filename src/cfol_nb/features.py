"""What a network sees: penultimate features, how alike classes are to it, and images remade from what it sees."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cfol_nb.attacks import as_float, evaluating, pgd
from cfol_nb.data import ImageSet
from cfol_nb.models import last_linear


def penultimate(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the last linear layer, (n, D), and the logits (n, K); both differentiable.

    Raises ValueError for a model without a linear layer.
    """
    seen: list[Tensor] = []
    hook = last_linear(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = model(x)
    finally:
        hook.remove()
    return seen[0], logits


def _batches(
    model: nn.Module, images: ImageSet, work: Callable[..., tuple[Tensor, ...]], *more: Tensor
) -> list[Tensor]:
    """`work(x, *rows of more)` over batches of 500 images in the model's type, in eval mode; results on the CPU."""
    tensor, out = next(model.parameters()), []
    with evaluating(model):
        for i in range(0, len(images), 500):
            x = as_float(images.images[i : i + 500], tensor.dtype, tensor.device)
            out.append([v.cpu() for v in work(x, *(m[i : i + 500].to(tensor.device) for m in more))])
    return [torch.cat(parts) for parts in zip(*out, strict=True)]


def _cosines(means: np.ndarray) -> np.ndarray:
    unit = means / np.linalg.norm(means, axis=1, keepdims=True).clip(1e-12)
    return unit @ unit.T


def class_similarity(model: nn.Module, images: ImageSet) -> dict[str, np.ndarray]:
    """(K, K) cosines between classes: "logits" of the mean logit vectors, "features" of the mean penultimate features.

    Features are taken minus their mean over classes: behind a ReLU all of them point into one direction. Cosines of
    mean logits were planned by Benz et al. 2021, but not reported.
    """
    with torch.no_grad():
        seen, logits = (v.double().numpy() for v in _batches(model, images, lambda x: penultimate(model, x)))
    y, k = images.labels.numpy(), len(images.class_names)
    of_seen, of_logits = (np.stack([v[y == c].mean(0) for c in range(k)]) for v in (seen, logits))
    return {"logits": _cosines(of_logits), "features": _cosines(of_seen - of_seen.mean(0))}


def difficulty(images: ImageSet, folds: int = 5) -> pd.DataFrame:
    """How well each class is told apart without a network: rows are classes, columns cross-validated accuracies.

    "neighbour": the class of the nearest image, in pixels, of the other folds.
    "linear": a ridge classifier on standardised pixels.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = images.images.flatten(1).numpy().astype(np.float64), images.labels.numpy()  # whole numbers: exact distances
    cut = StratifiedKFold(folds, shuffle=True, random_state=0)
    makers = {
        "neighbour": KNeighborsClassifier(1, algorithm="brute"),
        "linear": make_pipeline(StandardScaler(), RidgeClassifier()),
    }
    right = {k: cross_val_predict(m, x, y, cv=cut) == y for k, m in makers.items()}
    k = len(images.class_names)
    return pd.DataFrame(
        {name: np.bincount(y[r], minlength=k) / np.bincount(y, minlength=k) for name, r in right.items()},
        index=pd.Index(images.class_names, name="class"),
    )


# -- training images remade (Ilyas et al. 2019) ------------------------------------------------------------------------

Progress = Callable[[int], None] | None  # called with the images that went a step, or their sum over steps, at a time


def _as_images(x: Tensor, labels: Tensor, like: ImageSet) -> ImageSet:
    return ImageSet((x * 255).round().to(torch.uint8), labels, like.class_names)


def matched(
    model: nn.Module,
    images: ImageSet,
    seed: int = 0,
    steps: int = 1000,
    step: float = 0.1,
    *,
    progress: Progress = None,
) -> ImageSet:
    """Images that look to the model like those of `images`, with their labels, but are made from other images.

    Each starts from a random training image and goes `steps` normalised l2 steps of size `step` towards the penultimate
    features of the image that it replaces, inside [0, 1]. With a robust model these are the "robust features", with a
    standard one the "non-robust" (Ilyas et al. 2019, section 3.1). Rounded to 8 bits.
    """
    start = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))

    def approach(x: Tensor, other: Tensor) -> tuple[Tensor]:
        a = as_float(other, x.dtype, x.device)
        with torch.no_grad():
            goal, _ = penultimate(model, x)
        for _ in range(steps):
            a.requires_grad_()
            seen, _ = penultimate(model, a)
            (grad,) = torch.autograd.grad((seen - goal).square().sum(), a)
            size = torch.linalg.vector_norm(grad, dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
            a = (a.detach() - step * grad / size).clamp_(0, 1)
            if progress:
                progress(len(a))
        return (a,)

    (x,) = _batches(model, images, approach, images.images[start])
    return _as_images(x, images.labels, images)


def _towards(
    model, images: ImageSet, target: Tensor, eps: float, step: float, steps: int, progress: Progress
) -> ImageSet:
    def attack(x: Tensor, t: Tensor) -> tuple[Tensor]:
        a = pgd(model, x, t, eps, step, steps, "l2", random_start=False, targeted=True)
        if progress:
            progress(steps * len(a))
        return (a,)

    (x,) = _batches(model, images, attack, target)
    return _as_images(x, target, images)


def d_rand(
    model: nn.Module,
    images: ImageSet,
    seed: int = 0,
    eps: float = 0.5,
    step: float = 0.1,
    steps: int = 100,
    *,
    progress: Progress = None,
) -> ImageSet:
    """Each image moved, in an l2 ball, towards a random class, and labelled as that class: only what the model's
    non-robust features say agrees with the labels (Ilyas et al. 2019, section 3.2)."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(len(images.class_names), images.labels.shape, generator=g)
    return _towards(model, images, target, eps, step, steps, progress)


def d_det(
    model: nn.Module,
    images: ImageSet,
    seed: int = 0,
    eps: float = 0.5,
    step: float = 0.1,
    steps: int = 100,
    *,
    progress: Progress = None,
) -> ImageSet:
    """As `d_rand`, towards the next class: what robust features say speaks against the labels."""
    return _towards(model, images, (images.labels + 1) % len(images.class_names), eps, step, steps, progress)


REMAKES: dict[str, Callable[..., ImageSet]] = {"matched": matched, "d_rand": d_rand, "d_det": d_det}


def remake_steps(remake: Mapping | None) -> int:
    """Steps that an image goes when it is remade; 0 without `remake`."""
    if not remake:
        return 0
    return remake.get("steps", inspect.signature(REMAKES[remake["name"]]).parameters["steps"].default)

"""The smallest radius at which each image falls, at radii that find themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from scipy.stats import binom
from torch import Tensor, nn

from cfol_nb.attacks import answers, as_float, evaluating, weight_of
from cfol_nb.checks import short_pgd

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the radius that was asked for: the first radii
APART = 1.25  # neighbouring radii differ by at most this factor where half of a class falls
LEAST = 2.0**-8  # of the radius that was asked for: the smallest one that is looked at


def sweep(model: nn.Module, images: Tensor, labels: Tensor, radii: list[float], norm: str) -> Tensor:
    """(n,) float64 smallest of these rising radii at which PGD-20 breaks an image; inf if at none. At 0: as it is."""
    tensor = weight_of(model)
    x, y = as_float(images, tensor.dtype, tensor.device), labels.to(tensor.device)
    first, rows = torch.full((len(labels),), torch.inf, dtype=torch.float64), torch.arange(len(labels))
    with evaluating(model), torch.no_grad():
        for r in radii:
            points = x if r == 0 else short_pgd(model, x, y, r, norm, 20, retire=True)
            fell = answers(model(points), y) != y
            first[rows[fell.cpu()]] = r
            rows, x, y = rows[~fell.cpu()], x[~fell], y[~fell]
            if not len(rows):
                break
    return first


def ranks(n: int, confidence: float = 0.95) -> list[int]:
    """The ranks, in 0..n+1, of the median of n sorted values (the lower one), and of the two values between which the
    true median lies: those of rank l and n + 1 - l, l the largest for which fewer than l of n fair coins fall heads
    with probability (1 - confidence) / 2 at most (Thompson 1936, Annals of Mathematical Statistics 7; also where values
    may be equal: Scheffe and Tukey 1945, Annals 16). Rank 0 is what nothing is below, n + 1 what nothing is above."""
    low = int(binom.ppf((1 - confidence) / 2, n, 0.5))
    return [(n + 1) // 2, low, n + 1 - low]


def _ends(first: np.ndarray) -> np.ndarray:
    """The radii at the `ranks` of a class's images."""
    return np.concatenate([[0], np.sort(first), [np.inf]])[ranks(len(first))]


def halves(first: np.ndarray, labels: np.ndarray, radii: np.ndarray) -> pd.DataFrame:
    """One row per class: value, the smallest of the radii at which at least half of its images have fallen (inf: at
    none); low, high: the 95 % interval of the radius at which half of *all* images of this kind fall.

    first: (N,) the smallest of the radii, 0 among them, at which an image fell, or inf: in truth it falls beyond the
    radius before, up to this one. So `low` is the one before.
    """
    rows = []
    for c in range(labels.max() + 1):
        value, low, high = _ends(first[labels == c])
        rows.append((value, max((r for r in radii if r < low), default=0.0), high))
    return pd.DataFrame(rows, columns=["value", "low", "high"])


def next_radius(first: np.ndarray, labels: np.ndarray, radii: list[float], eps: float, most: float) -> float | None:
    """The next radius to look at; None where of each class what `halves` states lies between two radii that are at most
    the factor APART from each other. Looked at are radii from LEAST * eps to `most`."""
    for c in np.unique(labels):
        own = first[labels == c]
        for rank, end in zip(ranks(len(own)), _ends(own), strict=True):
            below = max((r for r in radii if r < end), default=0.0)
            if end == np.inf:
                if below < most and rank <= len(own):  # else more images would be needed
                    return min(2 * below, most)
            elif below == 0:
                if end > 2 * LEAST * eps:
                    return end / 2
            elif end > APART * below:
                return float(np.sqrt(below * end))
    return None


def refine(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    first: Tensor,
    radii: list[float],
    eps: float,
    norm: str,
    batch_size: int,
    keep: Callable[[], None],
) -> None:
    """More radii, until half of each class is found: they are added to `radii`, and `first` is changed, in place.
    keep: called after each radius."""
    most = 1.0 if norm == "linf" else float(images[0].numel() ** 0.5)
    while (r := next_radius(first.numpy(), labels.numpy(), radii, eps, most)) is not None:
        above = min((other for other in radii if other > r), default=torch.inf)
        found = first.clone()  # all of a radius, or nothing of it
        for rows in (first == above).nonzero().squeeze(1).split(batch_size):
            at = sweep(model, images[rows], labels[rows], [r], norm)
            found[rows] = torch.where(at == r, r, first[rows])
        first.copy_(found)
        radii.append(r)
        keep()

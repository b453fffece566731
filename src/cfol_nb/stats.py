"""From outcomes to class accuracies with intervals, the worst class, the tail, and comparisons. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from cfol_nb.evaluate import Outcomes


def last_attack(outcomes: Outcomes) -> str:
    """The name of the last attack, or "clean" if there was none."""
    return list(outcomes.predictions)[-1]


def counts(outcomes: Outcomes, attack: str) -> tuple[np.ndarray, np.ndarray]:
    """(correct, n) per class, both (K,) int64."""
    k = len(outcomes.class_names)
    return (
        np.bincount(outcomes.labels[outcomes.correct(attack)], minlength=k),
        np.bincount(outcomes.labels, minlength=k),
    )


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); (nan, nan) without images."""
    if n == 0:
        return np.nan, np.nan
    interval = binomtest(int(correct), int(n)).proportion_ci(confidence, method="wilson")
    return interval.low, interval.high


def class_table(outcomes: Outcomes, attack: str | None = None, *, confidence: float = 0.95) -> pd.DataFrame:
    """One row per class: class, n, correct, accuracy, low, high (Wilson). attack: by default the last one that was run.

    A class without images has accuracy NaN, never 0.
    """
    correct, n = counts(outcomes, attack or last_attack(outcomes))
    low, high = zip(*(wilson(c, m, confidence) for c, m in zip(correct, n, strict=True)), strict=True)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "class": outcomes.class_names,
                "n": n,
                "correct": correct,
                "accuracy": correct / n,
                "low": low,
                "high": high,
            }
        )


def accuracies(outcomes: Outcomes, attack: str | None = None) -> np.ndarray:
    """(K,) class accuracies."""
    return class_table(outcomes, attack)["accuracy"].to_numpy()


# -- one number from the class accuracies; all work on the last axis ---------------------------------------------------


def tail(accuracy: np.ndarray, share: float = 0.2) -> np.ndarray:
    """Mean accuracy of the worst share of classes, at least one class (the 20 % tail of the CFOL papers)."""
    k = max(1, round(share * np.shape(accuracy)[-1]))
    return np.sort(accuracy, -1)[..., :k].mean(-1)


STATISTICS = {
    "mean": lambda a: np.mean(a, -1),  # of class accuracies: every class counts alike
    "tail": tail,
    "worst": lambda a: np.min(a, -1),
    "gap": lambda a: np.max(a, -1) - np.min(a, -1),
    "std": lambda a: np.std(a, -1),  # between classes, population form
}


def deviation(accuracy: np.ndarray) -> np.ndarray:
    """Class accuracies minus their mean (Benz et al. 2021, section 3)."""
    return accuracy - np.mean(accuracy, -1, keepdims=True)


def deviation_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine between two deviation vectors: Pearson's correlation of the class accuracies (Benz et al. 2021)."""
    a, b = deviation(np.asarray(a, float)), deviation(np.asarray(b, float))
    size = np.linalg.norm(a), np.linalg.norm(b)
    return float(a @ b / np.prod(size)) if min(size) > 1e-12 else np.nan  # equal accuracies have no direction


def confusion(outcomes: Outcomes, attack: str | None = None) -> np.ndarray:
    """(K, K) counts: row = true class, column = prediction."""
    k = len(outcomes.class_names)
    predicted = outcomes.predictions[attack or last_attack(outcomes)]
    return np.bincount(outcomes.labels * k + predicted, minlength=k * k).reshape(k, k)


# -- several seeds -----------------------------------------------------------------------------------------------------


def _listed(outcomes: Outcomes | Sequence[Outcomes]) -> list[Outcomes]:
    return [outcomes] if isinstance(outcomes, Outcomes) else list(outcomes)


def _same_images(several: Sequence[Outcomes]) -> None:
    for o in several[1:]:
        if not np.array_equal(o.labels, several[0].labels) or o.class_names != several[0].class_names:
            raise ValueError("these outcomes are not of the same images: they cannot be compared image by image")


def _resampled(several: Sequence[Outcomes], attack: str, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, S, K) class accuracies with images reweighted within each class, alike in all S runs.

    The Bayesian bootstrap (Rubin 1981) with Jeffreys' prior: half an image that is right and half one that is wrong, so
    that a class without a single success is not taken for certain.
    """
    labels = several[0].labels
    for name, n in zip(several[0].class_names, counts(several[0], attack)[1], strict=True):
        if not n:
            raise ValueError(f"class {name!r} has no test images: its accuracy, and so the worst one, is unknown")
    right = np.stack([o.correct(attack) for o in several])
    out = np.empty((draws, len(several), len(several[0].class_names)))
    for c in range(out.shape[2]):
        of_class = right[:, labels == c]
        weight, prior = rng.standard_exponential((draws, of_class.shape[1])), rng.standard_gamma(0.5, (draws, 2))
        total = weight.sum(1, keepdims=True) + prior.sum(1, keepdims=True)
        out[:, :, c] = (weight @ of_class.T + prior[:, :1]) / total
    return out


def summary(
    several: Outcomes | Sequence[Outcomes],
    attack: str | None = None,
    *,
    versus: Outcomes | Sequence[Outcomes] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per statistic over one or more runs on the same test images: value, low, high, seeds.

    Rows: mean, tail (worst 20 % of classes), worst, gap, std, each computed per run and then averaged over runs, so
    that "worst" is *the mean of the per-seed minima*; and "worst_of_mean", *the minimum of the seed averages*.
    versus: other runs on the same images; the rows are then differences, run by run (as many runs are needed), and
    their intervals are the narrower ones of a paired comparison.

    low, high: bootstrap over images (within classes) and runs, from the smaller of the percentile and the basic lower
    end (2 value - quantile) to the larger of the two upper ends. The minimum of noisy accuracies lies below the true
    minimum; the percentile form doubles that bias, the basic one mirrors it but breaks at 0 and 1. In simulations with
    ten classes the stated 95 % interval of the worst class held in 81 to 86 % where all classes are truly equal, and in
    94 to 100 % where they are not.
    """
    several = _listed(several)
    others = [] if versus is None else _listed(versus)
    if others and len(others) != len(several):
        raise ValueError(f"{len(several)} runs versus {len(others)}: the same number is needed to compare run by run")
    attack = attack or last_attack(several[0])
    _same_images([*several, *others])
    rng, n = np.random.default_rng(seed), len(several)
    observed = np.stack([accuracies(o, attack) for o in (*several, *others)])
    sampled = _resampled([*several, *others], attack, draws, rng)
    runs = rng.integers(n, size=(draws, n, 1))
    per_run = {
        **{k: lambda a, f=f: f(a).mean(-1) for k, f in STATISTICS.items()},
        "worst_of_mean": lambda a: a.mean(-2).min(-1),
    }
    rows = []
    for name, f in per_run.items():
        value, many = f(observed[:n]), f(np.take_along_axis(sampled[:, :n], runs, 1))
        if others:
            value, many = value - f(observed[n:]), many - f(np.take_along_axis(sampled[:, n:], runs, 1))
        q = np.quantile(many, [(1 + confidence) / 2, (1 - confidence) / 2])
        ends = np.concatenate([q, (2 * value - q).clip(-1 if others else 0, 1)])
        low, high = ends.min(), ends.max()
        rows.append((name, float(value), low, high, n))
    return pd.DataFrame(rows, columns=["statistic", "value", "low", "high", "seeds"]).set_index("statistic")


def weakest(outcomes: Outcomes | Sequence[Outcomes], attack: str | None = None) -> str:
    """Name of the class with the lowest accuracy, averaged over runs."""
    several = _listed(outcomes)
    return several[0].class_names[int(np.nanargmin(np.mean([accuracies(o, attack) for o in several], 0)))]


def headline(groups: Mapping[str, Sequence[Outcomes]], attack: str | None = None) -> pd.DataFrame:
    """Text table: mean, 20 % tail and worst class of each group, clean and robust, as 'per cent [95 % interval]'."""

    def cell(row) -> str:
        return f"{100 * row.value:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"

    rows = {}
    for label, several in groups.items():
        several = _listed(several)
        robust = attack or last_attack(several[0])
        rows[label] = {
            f"{kind} {name}": cell(table.loc[name])
            for kind, table in (("clean", summary(several, "clean")), ("robust", summary(several, robust)))
            for name in ("mean", "tail", "worst")
        }
    return pd.DataFrame.from_dict(rows, orient="index")


# -- two runs ----------------------------------------------------------------------------------------------------------


def holm(p: np.ndarray) -> np.ndarray:
    """p-values adjusted for their number (Holm 1979)."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    out = np.empty(len(p))
    out[order] = stepped
    return out


def paired(a: Outcomes, b: Outcomes, attack: str | None = None) -> pd.DataFrame:
    """Two models on the same images, class by class: class, n, only_a, only_b, difference (a - b), p, p_holm.

    only_a, only_b: images that just one of them gets right. p: McNemar's exact test (1947). p_holm: adjusted for the
    number of classes.
    """
    _same_images([a, b])
    attack = attack or last_attack(a)
    right_a, right_b, k = a.correct(attack), b.correct(attack), len(a.class_names)
    only_a, only_b, n = (
        np.bincount(a.labels[m], minlength=k) for m in (right_a & ~right_b, right_b & ~right_a, np.ones_like(right_a))
    )
    p = np.array([binomtest(int(i), int(i + j)).pvalue if i + j else 1.0 for i, j in zip(only_a, only_b, strict=True)])
    return pd.DataFrame(
        {
            "class": a.class_names,
            "n": n,
            "only_a": only_a,
            "only_b": only_b,
            "difference": (only_a - only_b) / np.maximum(n, 1),
            "p": p,
            "p_holm": holm(p),
        }
    )

"""From outcomes to class accuracies with intervals, the worst class, the tail, and comparisons. No torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from cfol_nb.intervals import intervals
from cfol_nb.intervals import weakest as weakest_of
from cfol_nb.outcomes import Outcomes


def last_attack(outcomes: Outcomes) -> str:
    """The name of the last attack, or "clean" if there was none."""
    return list(outcomes.predictions)[-1]


def counts(outcomes: Outcomes, attack: str) -> tuple[np.ndarray, np.ndarray]:
    """(correct, n) per class, both (K,) int64."""
    return outcomes.counts(attack)


@functools.lru_cache(maxsize=10_000)
def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); (nan, nan) without images."""
    if n == 0:
        return np.nan, np.nan
    interval = binomtest(int(correct), int(n)).proportion_ci(confidence, method="wilson")
    return interval.low, interval.high


def class_table(outcomes: Outcomes, attack: str | None = None, *, confidence: float = 0.95) -> pd.DataFrame:
    """One row per class: class, n, correct, accuracy, low, high (Wilson), weakest (probability that it truly is), and
    may_be_weakest (the weakest is one of these, with 95 % confidence). attack: by default the last one that was run.

    A class without images has accuracy NaN, never 0.
    """
    correct, n = counts(outcomes, attack or last_attack(outcomes))
    low, high = zip(*(wilson(c, m, confidence) for c, m in zip(correct, n, strict=True)), strict=True)
    return pd.DataFrame(
        {
            "class": outcomes.class_names,
            "n": n,
            "correct": correct,
            "accuracy": accuracies(outcomes, attack),
            "low": low,
            "high": high,
            **{name: column.to_numpy() for name, column in _weakest(outcomes, attack).items()},
        }
    )


def accuracies(outcomes: Outcomes, attack: str | None = None) -> np.ndarray:
    """(K,) class accuracies; NaN for a class without images."""
    correct, n = counts(outcomes, attack or last_attack(outcomes))
    with np.errstate(invalid="ignore"):
        return correct / n


# -- one number from the class accuracies; all work on the last axis ---------------------------------------------------


def tail(accuracy: np.ndarray, share: float = 0.2) -> np.ndarray:
    """Mean accuracy of the worst share of classes, at least one class (the 20 % tail of the CFOL papers)."""
    k = in_tail(np.shape(accuracy)[-1], share)
    return np.partition(accuracy, k - 1, -1)[..., :k].mean(-1)


def in_tail(k: int, share: float = 0.2) -> int:
    """How many of k classes the tail is of."""
    return max(1, round(share * k))


STATISTICS = {
    "mean": lambda a: np.mean(a, -1),  # of class accuracies: every class counts alike
    "tail": tail,
    "worst": lambda a: np.min(a, -1),
    "gap": lambda a: np.max(a, -1) - np.min(a, -1),
    "std": lambda a: np.std(a, -1),  # between classes, population form
    "deviation": lambda a: np.min(a, -1) - np.mean(a, -1),  # Benz et al.'s worst negative deviation
}


def deviation(accuracy: np.ndarray) -> np.ndarray:
    """Class accuracies minus their mean (Benz et al. 2021, section 3)."""
    return accuracy - np.mean(accuracy, -1, keepdims=True)


def deviation_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine between two deviation vectors (last axis), which is Pearson's correlation of the class accuracies (Benz et
    al. 2021); NaN where one has equal accuracies, and so no direction."""
    a, b = deviation(np.asarray(a, float)), deviation(np.asarray(b, float))
    size = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    return np.where(np.minimum(*size) > 1e-12, (a * b).sum(-1) / np.multiply(*size).clip(1e-24), np.nan)[()]


def confusion(outcomes: Outcomes, attack: str | None = None) -> np.ndarray:
    """(K, K) counts: row = true class, column = prediction; (K, K + M) for a model with M other outputs."""
    k, m = len(outcomes.class_names), len(outcomes.outputs)
    predicted = outcomes.predictions[attack or last_attack(outcomes)]
    return np.bincount(outcomes.labels * m + predicted, minlength=k * m).reshape(k, m)


def mantel(a: np.ndarray, b: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> pd.Series:
    """r, p: correlation of the off-diagonal entries of two (K, K) matrices over classes, and the share of random
    relabellings of one of them that correlate as highly (Mantel 1967). mantel(c, c.T) is the symmetry of a matrix c."""
    k, rng = len(a), np.random.default_rng(seed)
    off = ~np.eye(k, dtype=bool)
    x = np.asarray(a, float)[off]
    orders = [np.arange(k), *(rng.permutation(k) for _ in range(draws))]
    if not x.std() * np.asarray(b, float)[off].std():
        return pd.Series({"r": np.nan, "p": np.nan})  # a constant correlates with nothing
    r = np.array([np.corrcoef(x, np.asarray(b, float)[np.ix_(o, o)][off])[0, 1] for o in orders])
    return pd.Series({"r": r[0], "p": np.mean(r >= r[0] - 1e-12)})  # the given order is among them: p is never 0


def within(counts: np.ndarray, group: Sequence) -> tuple[float, float]:
    """Share of the confusions (K, K) that stay inside a group of classes, and the share if errors fell on any other
    class alike, as often as each class is mistaken. group: (K,) the group of each class."""
    errors = np.array(counts, float)
    np.fill_diagonal(errors, 0)
    same = np.equal.outer(list(group), list(group)) & ~np.eye(len(errors), dtype=bool)
    by_chance = errors.sum(1) @ same.sum(1) / (len(errors) - 1)
    return float(errors[same].sum() / errors.sum()), float(by_chance / errors.sum())


# -- several seeds -----------------------------------------------------------------------------------------------------


def _listed(outcomes: Outcomes | Sequence[Outcomes]) -> list[Outcomes]:
    return [outcomes] if isinstance(outcomes, Outcomes) else list(outcomes)


def view(outcomes: Outcomes | Sequence[Outcomes], attack: str) -> list[Outcomes]:
    """The same outcomes with this attack as their last one, named "view": to compare one attack with another."""
    return [
        Outcomes(
            o.labels, {"clean": o.predictions["clean"], "view": o.predictions[attack]}, o.class_names, others=o.others
        )
        for o in _listed(outcomes)
    ]


def only(outcomes: Outcomes, names: Sequence[str]) -> Outcomes:
    """The images of these classes; predictions of others become the class after the own one, which is wrong, too."""
    number = {outcomes.class_names.index(name): i for i, name in enumerate(names)}
    to = np.array([number.get(c, -1) for c in range(len(outcomes.outputs))])
    rows = to[outcomes.labels] >= 0
    labels = to[outcomes.labels[rows]]
    predictions = {k: to[v[rows]] for k, v in outcomes.predictions.items()}
    predictions = {k: np.where(v < 0, (labels + 1) % len(names), v) for k, v in predictions.items()}
    return Outcomes(labels, predictions, tuple(names), outcomes.attacks)


def _same_images(several: Sequence[Outcomes]) -> None:
    for o in several[1:]:
        if not np.array_equal(o.labels, several[0].labels) or o.class_names != several[0].class_names:
            raise ValueError("these outcomes are not of the same images: they cannot be compared image by image")


def _require_images(several: Sequence[Outcomes], attack: str) -> None:
    if not several:
        raise ValueError("there are no outcomes to say something of")
    _same_images(several)
    for name, n in zip(several[0].class_names, counts(several[0], attack)[1], strict=True):
        if not n:
            raise ValueError(f"class {name!r} has no test images: its accuracy, and so the worst one, is unknown")


def summary(
    several: Outcomes | Sequence[Outcomes],
    attack: str | None = None,
    *,
    versus: Outcomes | Sequence[Outcomes] | None = None,
    confidence: float = 0.95,
    of: Literal["these runs", "any run"] | None = None,
) -> pd.DataFrame:
    """One row per statistic over one or more runs on the same test images: value, low, high, seeds, of.

    Rows: mean, tail (worst 20 % of classes), worst, gap, deviation (worst minus mean), std, each computed per run and
    then averaged over runs, so that "worst" is *the mean of the per-seed minima*; and "worst_of_mean", *the minimum of
    the seed averages*.
    versus: other runs on the same images; the rows are then differences, run by run (as many runs are needed), and
    their intervals are the narrower ones of a paired comparison. A run does not differ from itself.

    low, high: the furthest truths that a test does not refuse (`cfol_nb.intervals`, docs/intervals.md). of: what the
    interval covers: "these runs" on other images, or "any run" of this kind on other images, by default if there are at
    least three; "worst_of_mean" is always of these runs. Raises ValueError for classes without images, other images in
    versus, and "any run" of a single one.
    """
    several, others = _listed(several), [] if versus is None else _listed(versus)
    if not several:
        raise ValueError("there are no outcomes to say something of")
    attack = attack or last_attack(several[0])
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: between 0 and 1, as 0.95")
    if others and len(others) != len(several):
        raise ValueError(f"{len(several)} runs versus {len(others)}: the same number is needed to compare run by run")
    if of not in (None, "these runs", "any run") or (of == "any run" and len(several) == 1):
        raise ValueError(f"of={of!r}: 'these runs' or, of at least two, 'any run'")
    any_run = of == "any run" or (of is None and len(several) > 2)
    _require_images([*several, *others], attack)
    labels, m = several[0].labels, in_tail(len(several[0].class_names))
    right = [np.stack([o.correct(attack) for o in runs]) if runs else None for runs in (several, others)]
    how = {"tail": m, "confidence": confidence}
    rows = intervals(right[0], labels, right[1], any_run=any_run, **how)
    rows["worst_of_mean"] = rows["worst"]
    if len(several) > 1:
        mean = [r if r is None else r.mean(0, keepdims=True) for r in right]
        rows["worst_of_mean"] = intervals(mean[0], labels, mean[1], **how)["worst"]
    table = pd.DataFrame.from_dict(rows, "index", columns=["value", "low", "high"]).rename_axis("statistic")
    table["seeds"], table["of"] = len(several), "any run" if any_run else "these runs"
    table.loc["worst_of_mean", "of"] = "these runs"
    if others and all(a is b for a, b in zip(several, others, strict=True)):
        table[["value", "low", "high"]] = 0.0
    return table


def _resampled(several: Sequence[Outcomes], attack: str, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, S, K) class accuracies with images reweighted within each class, alike in all S runs: the Bayesian
    bootstrap (Rubin 1981) with half an image that is right and half one that is wrong (Jeffreys)."""
    _require_images(several, attack)
    labels, right = several[0].labels, np.stack([o.correct(attack) for o in several])
    out = np.empty((draws, len(several), labels.max() + 1))
    for c in range(out.shape[2]):
        weight, prior = rng.standard_exponential((draws, (labels == c).sum())), rng.standard_gamma(0.5, (draws, 2))
        total = weight.sum(1, keepdims=True) + prior.sum(1, keepdims=True)
        out[:, :, c] = (weight @ right[:, labels == c].T + prior[:, :1]) / total
    return out


def cosines(
    groups: Mapping[str, Outcomes | Sequence[Outcomes]],
    attack: str | None = None,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per pair of groups: a, b, cosine, corrected, low, high, chance, p.

    cosine: between the deviations from the mean of class accuracies, averaged over the runs of a group (Benz et al.
    2021, whose measure is Pearson's correlation over classes). The noise of finite test sets draws it towards 0, or,
    where it is shared, up; corrected: with the bootstrap's variances and covariances of that noise taken off, as in
    Spearman's correction for attenuation (1904), NaN where nothing but noise is left. low, high: bootstrap over images
    (alike in all groups) and runs, of the corrected value. chance: the cosine that one permutation of the classes in
    twenty exceeds; p: the share of permutations that come as high. All groups need the same test images.
    """
    groups = {k: _listed(v) for k, v in groups.items()}
    every = [o for several in groups.values() for o in several]
    _same_images(every)
    attack = attack or last_attack(every[0])
    rng = np.random.default_rng(seed)
    sampled, start, seen, drawn = _resampled(every, attack, draws, rng), 0, {}, {}
    for label, several in groups.items():
        runs = start + rng.integers(len(several), size=(draws, len(several), 1))
        seen[label] = deviation(np.mean([accuracies(o, attack) for o in several], 0))
        drawn[label] = deviation(np.take_along_axis(sampled, runs, 1).mean(1))
        start += len(several)
    noise = {k: v - v.mean(0) for k, v in drawn.items()}

    def corrected(x: Mapping[str, np.ndarray], a: str, b: str, times: int) -> np.ndarray:
        ab, aa, bb = (
            (x[i] * x[j]).sum(-1) - times * (noise[i] * noise[j]).sum(-1).mean() for i, j in ((a, b), (a, a), (b, b))
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((aa > 0) & (bb > 0), np.clip(ab / np.sqrt(aa * bb), -1, 1), np.nan)

    shuffled, rows = rng.permuted(np.tile(np.arange(sampled.shape[2]), (10_000, 1)), axis=1), []
    for a, b in itertools.combinations(groups, 2):
        value, by_chance = float(deviation_cosine(seen[a], seen[b])), deviation_cosine(seen[a], seen[b][shuffled])
        replicates = corrected(drawn, a, b, 2)  # they hold the noise of the images twice
        low = np.quantile(np.nan_to_num(replicates, nan=-1), (1 - confidence) / 2)
        high = np.quantile(np.nan_to_num(replicates, nan=1), (1 + confidence) / 2)
        p = (1 + np.sum(by_chance >= value - 1e-12)) / (1 + len(by_chance)) if np.isfinite(value) else np.nan
        chance = float(np.quantile(by_chance, confidence))
        rows.append((a, b, value, float(corrected(seen, a, b, 1)), low, high, chance, p))
    numbers = ["cosine", "corrected", "low", "high", "chance", "p"]
    return pd.DataFrame(rows, columns=["a", "b", *numbers]).astype(dict.fromkeys(numbers, float))


def discrepancy(
    standard: Outcomes | Sequence[Outcomes], adversarial: Outcomes | Sequence[Outcomes], attack: str | None = None
) -> dict[str, list[Outcomes]]:
    """The three conditions of Benz et al. 2021 as groups: standard training, adversarial training judged on clean
    images, and the same under attack."""
    return {
        "standard": view(standard, "clean"),
        "adversarial, clean": view(adversarial, "clean"),
        "adversarial, attacked": view(adversarial, attack or last_attack(_listed(adversarial)[0])),
    }


def chance_weakest(outcomes: Outcomes | Sequence[Outcomes], attack: str | None = None) -> pd.Series:
    """Per class the probability that it is truly the weakest, averaged over runs (they add up to 1; NaN for a class
    without images): see `intervals.weakest`. A class in doubt with others shares the probability with them."""
    return _weakest(outcomes, attack)["weakest"]


def _weakest(outcomes: Outcomes | Sequence[Outcomes], attack: str | None = None) -> pd.DataFrame:
    """weakest (probability) and may_be_weakest of each class."""
    several = _listed(outcomes)
    attack = attack or last_attack(several[0])
    _same_images(several)
    present, labels = np.unique(several[0].labels, return_inverse=True)
    share, may = weakest_of(np.mean([o.correct(attack) for o in several], 0), labels)
    names = [several[0].class_names[c] for c in present]
    found = pd.DataFrame({"weakest": share, "may_be_weakest": may}, names).reindex(list(several[0].class_names))
    return found.assign(may_be_weakest=found["may_be_weakest"].fillna(False).astype(bool))


def weakest(outcomes: Outcomes | Sequence[Outcomes], attack: str | None = None) -> str:
    """Name of the class with the lowest accuracy, averaged over runs."""
    several = _listed(outcomes)
    return several[0].class_names[int(np.nanargmin(np.mean([accuracies(o, attack) for o in several], 0)))]


def interval(row: pd.Series, sign: str = "") -> str:
    """'value [low, high]' in per cent, of a row of `summary` or `lift`; sign "+": differences show theirs."""
    value = row["value"] if "value" in row else row["difference"]
    return f"{100 * value:{sign}.1f} [{100 * row['low']:{sign}.1f}, {100 * row['high']:{sign}.1f}]"


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown shows it, the index first."""
    rows = [["", *table.columns], ["---"] * (1 + table.shape[1]), *table.reset_index().to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)).strip() + " |" for row in rows)


def stated(
    groups: Mapping[str, Outcomes | Sequence[Outcomes]],
    statistics: Sequence[str] = ("mean", "tail", "worst"),
    attack: str | None = None,
    versus: Outcomes | Sequence[Outcomes] | None = None,
) -> pd.DataFrame:
    """Text table: a row per group, the statistics of `summary` as 'per cent [95 % interval]'; versus: paired
    differences from these runs, with their sign."""
    sign = "" if versus is None else "+"
    tables = {label: summary(several, attack, versus=versus) for label, several in groups.items()}
    return pd.DataFrame.from_dict(
        {label: {name: interval(t.loc[name], sign) for name in statistics} for label, t in tables.items()},
        orient="index",
    )


def headline(groups: Mapping[str, Sequence[Outcomes]], attack: str | None = None) -> pd.DataFrame:
    """Text table: mean, 20 % tail and worst class of each group, clean and robust, as 'per cent [95 % interval]'."""
    kinds = {"clean": "clean", "robust": attack or last_attack(_listed(next(iter(groups.values())))[0])}
    parts = [stated(groups, attack=name).add_prefix(f"{kind} ") for kind, name in kinds.items()]
    return pd.concat(parts, axis=1)


# -- two runs ----------------------------------------------------------------------------------------------------------


def lift(after: Sequence[Outcomes], before: Sequence[Outcomes], name: str, attack: str | None = None) -> pd.Series:
    """What the class `name` gained from one list of runs to the other, whose other classes may differ: before, after,
    difference, low, high (95 %; of any run where both lists have as many, at least three, else of these runs)."""
    right = []
    for several in (after, before):
        which = attack or last_attack(several[0])
        right.append(np.stack([o.correct(which)[o.labels == o.class_names.index(name)] for o in several]))
    now, was = right
    if now.shape[1] != was.shape[1]:
        raise ValueError(f"class {name!r} has {was.shape[1]} images before and {now.shape[1]} after")
    any_run = len(now) == len(was) > 2
    if not any_run:
        now, was = (r.mean(0, keepdims=True) for r in (now, was))
    difference, low, high = intervals(now, np.zeros(now.shape[1], int), was, tail=1, any_run=any_run)["mean"]
    values = {"before": was.mean(), "after": now.mean(), "difference": difference, "low": low, "high": high}
    return pd.Series(values, name=name, dtype=float)


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

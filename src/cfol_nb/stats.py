"""From outcomes to class accuracies with intervals, the worst class, the tail, and comparisons. No torch."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import comb, logsumexp, ndtr, ndtri
from scipy.stats import binomtest

from cfol_nb.evaluate import Outcomes


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
    """One row per class: class, n, correct, accuracy, low, high (Wilson). attack: by default the last one that was run.

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


FEW = 10  # right answers of a class, below which its errors are far from normal
STATISTICS = {
    "mean": lambda a: np.mean(a, -1),  # of class accuracies: every class counts alike
    "tail": tail,
    "worst": lambda a: np.min(a, -1),
    "gap": lambda a: np.max(a, -1) - np.min(a, -1),
    "std": lambda a: np.std(a, -1),  # between classes, population form
    "deviation": lambda a: np.min(a, -1) - np.mean(a, -1),  # Benz et al.'s worst negative deviation
}
ALIKE = {"tail": 1, "worst": 1, "gap": -1, "deviation": 1}  # they rise or fall as classes become alike


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
    """(K, K) counts: row = true class, column = prediction."""
    k = len(outcomes.class_names)
    predicted = outcomes.predictions[attack or last_attack(outcomes)]
    return np.bincount(outcomes.labels * k + predicted, minlength=k * k).reshape(k, k)


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
        Outcomes(o.labels, {"clean": o.predictions["clean"], "view": o.predictions[attack]}, o.class_names)
        for o in _listed(outcomes)
    ]


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


@functools.lru_cache(maxsize=1)  # one table after another is of the same images; 16 kB an image at 2000 draws
def _weights(labels: bytes, draws: int, seed: int) -> tuple[list[tuple[np.ndarray, ...]], np.random.Generator]:
    """For each class the weights of its images (draws, n) and of a right and a wrong one (draws, 2); the generator."""
    rng, out = np.random.default_rng(seed), []
    for n in np.bincount(np.frombuffer(labels, np.int64)):
        out.append((rng.standard_exponential((draws, n)), rng.standard_gamma(0.5, (draws, 2))))
    return out, rng


def _resampled(
    several: Sequence[Outcomes], attack: str, draws: int, seed: int
) -> tuple[np.ndarray, np.random.Generator]:
    """(draws, S, K) class accuracies with images reweighted within each class, alike in all S runs; and a generator for
    what else is drawn.

    The Bayesian bootstrap (Rubin 1981) with Jeffreys' prior: half an image that is right and half one that is wrong, so
    that a class without a single success is not taken for certain.
    """
    labels = several[0].labels
    _require_images(several, attack)
    right = np.stack([o.correct(attack) for o in several])
    weights, rng = _weights(labels.astype(np.int64).tobytes(), draws, seed)
    out = np.empty((draws, len(several), len(weights)))
    for c, (weight, prior) in enumerate(weights):
        total = weight.sum(1, keepdims=True) + prior.sum(1, keepdims=True)
        out[:, :, c] = (weight @ right[:, labels == c].T + prior[:, :1]) / total
    return out, copy.deepcopy(rng)


def _angle(accuracy: np.ndarray) -> np.ndarray:
    """asin(sqrt(a)), on which an accuracy over n images has variance 1 / (4 n) wherever it lies."""
    return np.arcsin(np.sqrt(np.clip(accuracy, 0, 1)))


def _spreads(size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(G, 1) spreads that a population may have, and their prior: exactly equal classes count as much as two factors of
    e in the spread."""
    typical = np.sqrt(np.mean(size**2))
    steps = np.geomspace(0.2, 1.5 / typical, 100)
    return typical * np.r_[0, steps][:, None], np.r_[2, np.full(len(steps), np.log(steps[1] / steps[0]))]


def populations(angle: np.ndarray, size: np.ndarray) -> list[np.ndarray]:
    """Indices of the classes of each population, in the order of their angles (K,), measured with noise of this size
    (K,). One, unless a cut between neighbours makes two e^2 times likelier, and so on.

    Likelier: by the marginal likelihood, with the centre of a population anywhere, its spread as in `_spreads`, and all
    choices of as many classes as likely as each other.
    """
    order, k = np.argsort(angle), len(angle)
    if k == 1:
        return [order]
    y, (spread, prior) = angle[order], _spreads(size)
    weight = 1 / (size[order] ** 2 + spread**2)
    below = np.stack([np.log(weight), weight, weight * y, weight * y**2]).cumsum(-1)
    whole, below = below[..., -1:], below[..., :-1]

    def evidence(sums: np.ndarray) -> np.ndarray:
        logs, w, wy, wyy = sums
        return logsumexp((logs - np.log(w) - wyy + wy**2 / w) / 2, axis=0, b=prior[:, None] / prior.sum())

    chosen = np.log(8 / np.pi) / 2 - np.log((k - 1) * comb(k, np.arange(1, k)))  # a second centre, and which classes
    gain = evidence(below) + evidence(whole - below) - evidence(whole) + chosen
    if gain.max() <= 2:
        return [order]
    cut = gain.argmax() + 1
    return [part[i] for part in (order[:cut], order[cut:]) for i in populations(angle[part], size[part])]


def true_accuracies(angle: np.ndarray, size: np.ndarray, noise: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(D, K) draws of true class accuracies, given that the classes are a sample of a normal population, or of several
    where some stand clearly apart (`populations`).

    angle: (K,) measured; size: (K,) standard deviation of their noise; noise: (D, K) draws of it; chance: (D, 1 + K)
    standard normal, for the spread of a population (the quantile of its posterior) and for what stays unknown of each
    class.

    A measured accuracy moves towards the mean of its population, the further the noisier it is, so that the draws are
    spread as true accuracies are, not as measured ones. Beyond the noise the spread is uniform in its square a priori,
    which makes intervals that hold (Morris and Tang 2011), below it in its logarithm.
    """
    out = angle + noise
    for own in populations(angle, size):
        if len(own) > 1:
            out[:, own] = _drawn(angle[own], size[own], noise[:, own], chance[:, [0, *(own + 1)]])
    return np.sin(out) ** 2


def _drawn(angle: np.ndarray, size: np.ndarray, noise: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """`true_accuracies` as angles, of one population."""
    spread, prior = _spreads(size)
    weight = 1 / (size**2 + spread**2)
    total = weight.sum(1, keepdims=True)
    fit = (np.log(weight) - weight * (angle - weight @ angle[:, None] / total) ** 2).sum(1) - np.log(total[:, 0])
    beyond = np.maximum((spread[:, 0] / np.sqrt(np.mean(size**2))) ** 2, 1)
    posterior = np.cumsum(prior * beyond * np.exp((fit - fit.max()) / 2))
    i = np.searchsorted(posterior, ndtr(chance[:, 0]) * posterior[-1])
    weight, kept = (weight / total)[i], (spread**2 * weight)[i]

    def centre(x: np.ndarray) -> np.ndarray:
        return (weight * x).sum(1, keepdims=True)

    seen, unknown = angle + noise, size * chance[:, 1:]
    middle = centre(seen)
    return middle + kept * (seen - middle) + np.sqrt(kept * (1 - kept)) * (unknown - centre(unknown))


def _measured(accuracy: np.ndarray, drawn: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angles of (S, K) accuracies over n images (K,) and draws (D, S, K) of their noise."""
    noise = _angle(drawn)
    noise = (noise - noise.mean(0)) * np.sqrt((n + 2) / n)  # with the prior's image there are n + 1 for n
    return _angle((accuracy * n + 0.375) / (n + 0.75)), noise  # Anscombe 1948


def _alike(angle: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """(S, S) correlation of the true angles of runs, of which (S, K) were measured with noise (D, S, K).

    Covariances over the classes of a population, those of the noise taken off (Spearman 1904). Where the spread is not
    clearly beyond the noise nothing is known of it. What is missing there to three halves of the noise's variance
    counts as alike only in runs whose answers are: as the fourth power of the correlation of their noise. Little
    correlation is the cautious side, as it makes differences wider.
    """
    angle, noise = angle.copy(), noise.copy()
    for seen, drawn, size in zip(angle, noise.swapaxes(0, 1), noise.std(0), strict=True):
        for own in populations(seen, size):
            seen[own] -= seen[own].mean()
            drawn[:, own] -= drawn[:, own].mean(1, keepdims=True)
    random = np.einsum("dik, djk -> ij", noise, noise) / len(noise)
    true = angle @ angle.T - random
    size = np.maximum(np.maximum(np.diag(true), 1.5 * np.diag(random)), 1e-12)
    missing = np.sqrt(size - np.diag(true))
    shared = random / np.sqrt(np.multiply.outer(*2 * [np.diag(random).clip(1e-12)]))
    return (true + shared**4 * np.multiply.outer(missing, missing)) / np.sqrt(np.multiply.outer(size, size))


def _root(alike: np.ndarray) -> np.ndarray:
    """Lower triangle that makes independent samples as correlated as (S, S), as Cholesky's, and where that is
    impossible as nearly so, the first ones first."""
    root = np.eye(len(alike))
    for i in range(1, len(alike)):
        left = 1.0
        for j in range(i):
            wanted = (alike[i, j] - root[i, :j] @ root[j, :j]) / root[j, j]
            root[i, j] = np.clip(wanted, -np.sqrt(left), np.sqrt(left))
            left = max(left - root[i, j] ** 2, 1e-9)
        root[i, i] = np.sqrt(left)
    return root


def _chances(alike: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(D, S, 1 + K) for `true_accuracies`, so that the like errors of like runs cancel in a difference; shape: (D, K).

    What stays unknown of a class is correlated between two runs as their true accuracies are (`_alike`), and the
    spreads with its square, as those of two correlated normal samples are.
    """
    draws, k = shape
    chance = rng.standard_normal((len(alike), draws, 1 + k))
    chance[..., 0] = _root(alike**2) @ chance[..., 0]
    chance[..., 1:] = np.tensordot(_root(alike), chance[..., 1:], 1)
    return chance.swapaxes(0, 1)


def _limits(
    angle: np.ndarray, noise: np.ndarray, runs: np.ndarray, names: Iterable[str], confidence: float
) -> dict[str, np.ndarray]:
    """(2, 2) how low and how high each statistic may lie if the classes are more alike than measured, and if one stands
    apart; infinite, the other way round, where this says nothing.

    The classes of a normal population go on thinning out below the worst one. True ones may end at it, many close to
    each other, and the lowest of so many measured ones lies far below them all; or one that is alone may lie so close
    to the others that it is taken for one of them. Inference for a minimum asks which classes may be the lowest
    (Chernozhukov, Lee and Rosen 2013); here by two tests without a population. Truths in question: (1) classes as
    measured (S, K), moved outwards by half the standard error, but cut off at both ends alike, so that those beyond
    the cut are equal, and none of them surely below it (Bonferroni); (2) classes as measured but for one of each run,
    or for as many as the tail is of, which are lower: those whose accuracies' lower ends are the lowest. The further
    the cut, or the lower those classes, the fewer draws of the noise (D, S, K) lead as far out, or keep the statistic
    and those classes as far in, as what was measured; a truth is refused where at most 1 - confidence do.
    """
    size, ends = noise.std(0), (angle.min(-1, keepdims=True), angle.max(-1, keepdims=True))
    step = np.median(size, -1, keepdims=True)
    top = (angle + ndtri(1 - (1 - confidence) / angle.shape[-1]) * size).min(-1, keepdims=True)
    outward = angle + np.sign(angle - angle.mean(-1, keepdims=True)) * size / 2
    lowest = (angle - ndtri(confidence) * size).argsort(-1)

    def alike(far: float) -> np.ndarray:
        low = np.minimum(ends[0] + far * step, top)
        return np.clip(outward, low, np.maximum(ends[1] - far * step, low))

    def apart(far: float, least: np.ndarray) -> np.ndarray:
        true = angle.copy()
        lower = np.take_along_axis(angle - far * size / np.sqrt(least.shape[-1]), least, -1)
        np.put_along_axis(true, least, np.maximum(lower, 0), -1)
        return true

    out = {name: np.tile([np.inf, -np.inf], (2, 1)) for name in names}
    moved = {name: in_tail(angle.shape[-1]) if name == "tail" else 1 for name in out if name in ALIKE}
    for m in sorted({0, *moved.values()}):  # so many classes apart; 0: all alike
        i, sign, least = (1, -1, lowest[:, :m]) if m else (0, 1, None)
        signs = {name: sign * ALIKE[name] for name, own in moved.items() if m in (0, own)}
        seen = {name: s * STATISTICS[name](np.sin(angle) ** 2).mean() for name, s in signs.items()}
        truth, share = {name: [] for name in signs}, {name: [] for name in signs}
        for far in np.linspace(0, 6, 31):
            true, near = apart(far, least) if m else alike(far), True
            measured = np.take_along_axis(np.sin(true + noise) ** 2, runs, 1)
            if m:
                own = np.take_along_axis(np.take_along_axis(true + noise, least[None], -1), runs, 1)
                near = own.mean((1, 2)) >= np.take_along_axis(angle, least, -1).mean()
            for name, s in signs.items():
                truth[name].append(s * STATISTICS[name](np.sin(true) ** 2).mean())
                share[name].append(np.mean((s * STATISTICS[name](measured).mean(-1) <= seen[name]) & near))
            if all(v[-1] <= 1 - confidence for v in share.values()):
                break
        for name, s in signs.items():
            falling = np.minimum.accumulate(share[name])[::-1]
            out[name][i, int(s > 0)] = s * np.interp(1 - confidence, falling, truth[name][::-1]) + 0.0  # not -0.0
    return out


def _same_weakest(a: np.ndarray, b: np.ndarray, n: np.ndarray, m: int) -> float:
    """Share of the m weakest classes that two lists of runs (S, K) have in common, run by run; less, by the images (K,)
    of the rarest of them to the median, where one is rare: its noise alone can make it one of the weakest of both."""
    told = np.minimum(1, n / np.median(n))
    lowest = (x.argsort(-1, kind="stable")[:, :m] for x in (a, b))
    return float(np.mean([told[np.union1d(x, y)].min() * np.isin(x, y) for x, y in zip(*lowest, strict=True)]))


def _difference(
    own: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray], same: float, confidence: float
) -> tuple[float, float]:
    """low, high of the difference of two statistics, each given as its draws (D,) and its `_limits`; same: the
    share of classes that are the weakest in both (`_same_weakest`).

    Quantiles of the differences of the draws, and farther as an interval does that is made of two (MOVER; Zou and
    Donner 2008): the square of its arm is a^2 + b^2 - 2 r a b, where a and b are the arms of the two that lead there,
    and r is the correlation of their draws. What is beyond the draws makes a and b longer. What lies there on both
    sides because their classes are more alike than measured cancels; because one stands apart, a share of r. Of what
    remains of the latter the same share cancels where it is the same class in both: it is hardly apart in one alone.
    """
    tails = [(1 - confidence) / 2, 0.5, (1 + confidence) / 2]
    noise = np.stack([x - x.mean() for x, _ in (own, base)])
    (a, product), (_, b) = noise @ noise.T
    r = round(product / np.sqrt(max(a * b, 1e-300)), 9)  # 1 for the same draws
    ends = [np.quantile(drawn, tails) for drawn, _ in (own, base)]
    beyond = [np.maximum(0, (reach - at[[0, 2]]) * [-1, 1]) for at, (_, reach) in zip(ends, (own, base), strict=True)]
    shared = np.minimum(*beyond) * [[1], [max(r, 0)]]
    arms = [np.diff(at) for at in ends]
    longer = [
        arm + ((far - shared) * [[1], [1 - same * max(r, 0)]]).sum(0) for arm, far in zip(arms, beyond, strict=True)
    ]
    before, after = (a**2 + b[::-1] ** 2 - 2 * r * a * b[::-1] for a, b in (arms, longer))
    low, middle, high = np.quantile(own[0] - base[0], tails)
    arm = np.sqrt(np.array([middle - low, high - middle]) ** 2 + np.maximum(after - before, 0))
    return max(middle - arm[0], -1), min(middle + arm[1], 1)


def _statistics(
    observed: np.ndarray,
    sampled: np.ndarray,
    n: np.ndarray,
    runs: np.ndarray,
    chances: np.ndarray,
    confidence: float,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each statistic of (S, K) accuracies, draws of what it truly is, and its `_limits`."""

    def true(angle: np.ndarray, noise: np.ndarray, chance: np.ndarray) -> np.ndarray:
        return true_accuracies(angle, noise.std(0), noise, chance)

    angle, noise = _measured(observed, sampled, n)
    each = np.stack([true(a, noise[:, i], chances[:, i]) for i, a in enumerate(angle)], 1)
    each = np.take_along_axis(each, runs, 1)
    drawn = {name: f(each).mean(-1) for name, f in STATISTICS.items()}
    unmoved = observed + (sampled - sampled.mean(0)) * np.sqrt((n + 2) / n)  # nothing is chosen in a mean
    drawn["mean"] = np.take_along_axis(unmoved, runs, 1).mean((1, 2)).clip(0, 1)
    limits = _limits(angle, noise, runs, STATISTICS, confidence)
    out = {name: (f(observed).mean(-1), drawn[name], limits[name]) for name, f in STATISTICS.items()}
    if len(observed) == 1:
        return {**out, "worst_of_mean": out["worst"]}
    mean = observed.mean(0)
    angle, noise = _measured(mean, np.take_along_axis(sampled, runs, 1).mean(1), n)
    worst = STATISTICS["worst"](true(angle, noise, chances[:, 0]))
    limits = _limits(angle[None], noise[:, None], np.zeros_like(runs[:, :1]), ["worst"], confidence)
    return {**out, "worst_of_mean": (STATISTICS["worst"](mean), worst, limits["worst"])}


def summary(
    several: Outcomes | Sequence[Outcomes],
    attack: str | None = None,
    *,
    versus: Outcomes | Sequence[Outcomes] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per statistic over one or more runs on the same test images: value, low, high, bias, seeds.

    Rows: mean, tail (worst 20 % of classes), worst, gap, std, deviation (worst minus mean), each computed per run and
    then averaged over runs, so that "worst" is *the mean of the per-seed minima*; and "worst_of_mean", *the minimum of
    the seed averages*.
    versus: other runs on the same images; the rows are then differences, run by run (as many runs are needed), and
    their intervals are the narrower ones of a paired comparison.

    low, high: bootstrap over images (within classes) and runs, of what the statistic truly is. The minimum of noisy
    accuracies lies below the true minimum, the more the more classes are alike; the draws are therefore those of a
    hierarchical model (`true_accuracies`), but for the mean's, and the interval is widened to hold the value where it
    does not. Where classes may lie closer to the worst than the model takes them to, or the worst may be alone, the
    worst, tail, gap and deviation reach farther (`_limits`), and so do their differences (`_difference`); of the
    draws of the worst 94 % are then enough for 95 % (all in proportion to another confidence). With fewer than ten
    right answers in the worst class, its interval reaches at least as high as that of one class alone, and a
    difference farther on both sides, up to half an image where none is right (5/K of one, K > 10 classes). Simulated
    coverage of the stated 95 % is in benchmarks/coverage.py and tests/test_coverage.py.
    bias: the value minus the mean of those draws, an estimate of how far the noise of the test set takes it off.
    """
    return _summaries({"": several}, attack, versus, confidence, draws, seed)[""]


def _summaries(
    groups: Mapping[str, Outcomes | Sequence[Outcomes]],
    attack: str | None = None,
    versus: Outcomes | Sequence[Outcomes] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """`summary` of each group; the images, and so the costly draws, are the same for many groups."""
    groups = {label: _listed(several) for label, several in groups.items()}
    others, alike, tables = [] if versus is None else _listed(versus), {}, {}
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: between 0 and 1, as 0.95")
    for label, several in groups.items():
        if not several:
            raise ValueError("there are no outcomes to say something of")
        if others and len(others) != len(several):
            raise ValueError(
                f"{len(several)} runs versus {len(others)}: the same number is needed to compare run by run"
            )
        _same_images([*several, *others])
        key = attack or last_attack(several[0]), several[0].labels.tobytes(), several[0].class_names
        alike.setdefault(key, []).append(label)
    for (name, *_), labels in alike.items():
        every = [*others, *(o for label in labels for o in groups[label])]
        images = counts(every[0], name)[1]
        observed = np.stack([accuracies(o, name) for o in every])
        (sampled, rng), at = _resampled(every, name, draws, seed), len(others)

        def parts(own: slice, at=at, rng=rng, images=images, observed=observed, sampled=sampled) -> dict:
            n, beside = own.stop - own.start, min(at, own.start)  # the chances of the others do not depend on the own
            runs = copy.deepcopy(rng).integers(n, size=(draws, n, 1))
            both = [*range(beside), *range(own.start, own.stop)]
            alike = _alike(*_measured(observed[both], sampled[:, both], images))
            chances = _chances(alike, (draws, len(images)), copy.deepcopy(rng))[:, beside:]
            return _statistics(observed[own], sampled[:, own], images, runs, chances, confidence)

        base = parts(slice(0, at)) if others else {}
        for label in labels:
            own = slice(at, at := at + len(groups[label]))
            table = parts(own)
            differ = any(
                (a.correct(name) != b.correct(name)).any() for a, b in zip(groups[label], others, strict=False)
            )
            against = base if differ else table  # runs with the same answers differ by exactly 0
            compared, rows = observed[[*range(len(others)), *range(own.start, own.stop)]], {}
            n = images[compared.argmin(1)]  # of the worst class of each run
            least = int((compared.min(1) * n).argmin())
            few, n = max(0, FEW - compared[least].min() * n[least]) * (differ or not others), n[least]
            more = few and few / FEW * min(0.5, 5 / len(images)) / n
            for k, (value, drawn, limits) in table.items():
                worst = k.startswith("worst")
                scarce = few and worst  # what is drawn varies too little
                if others:
                    m = in_tail(len(images)) if k == "tail" else 1
                    pair = observed[own], observed[: len(others)]
                    if k == "worst_of_mean":
                        pair = [each.mean(0, keepdims=True) for each in pair]
                    same = _same_weakest(*pair, images, m)
                    low, high = _difference((drawn, limits), against[k][1:], same, confidence)
                    value, drawn = value - against[k][0], drawn - against[k][1]
                    low, high = (max(low - more, -1), min(high + more, 1)) if scarce else (low, high)
                else:
                    out = (1 - confidence) * (0.6 if worst else 0.5)  # its limits hold some of it
                    low, high = np.quantile(drawn, [out, 1 - out])
                    low, high = min(low, limits[:, 0].min()), max(high, limits[:, 1].max())
                    high = min(high, rows["mean"][2]) if k in ("tail", "worst", "worst_of_mean") else high
                    high = max(high, wilson(round(value * n), n, confidence)[1]) if scarce else high
                rows[k] = value, min(low, value), max(high, value), value - drawn.mean(), own.stop - own.start
            columns = ["value", "low", "high", "bias", "seeds"]
            tables[label] = pd.DataFrame.from_dict(rows, "index", columns=columns).rename_axis("statistic")
    return tables


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
    (sampled, rng), start, seen, drawn = _resampled(every, attack, draws, seed), 0, {}, {}
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


def chance_weakest(
    outcomes: Outcomes | Sequence[Outcomes], attack: str | None = None, *, draws: int = 10_000, seed: int = 0
) -> pd.Series:
    """Per class the probability that it is truly the weakest: its share of bootstrap draws in which it is (they add up
    to 1). Images are resampled, runs averaged; a class in doubt with others shares the probability with them."""
    several = _listed(outcomes)
    attack, rng, sampled = attack or last_attack(several[0]), np.random.default_rng(seed), []
    _require_images(several, attack)
    right = np.mean([o.correct(attack) for o in several], 0)
    for c in range(len(several[0].class_names)):  # images of as many right runs weigh as much as one gamma variable
        share, images = np.unique(right[several[0].labels == c], return_counts=True)
        weight = rng.standard_gamma(np.r_[images, 0.5, 0.5], (draws, len(images) + 2))
        sampled.append(weight @ np.r_[share, 1, 0] / weight.sum(1))
    share = np.bincount(np.argmin(sampled, 0), minlength=len(sampled)) / draws
    return pd.Series(share, several[0].class_names, name="weakest")


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
    tables = _summaries(groups, attack, versus)
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


def lift(
    after: Sequence[Outcomes], before: Sequence[Outcomes], name: str, attack: str | None = None, *, draws: int = 2000
) -> pd.Series:
    """What the class `name` gained from one list of runs to the other, whose other classes may differ: before, after,
    difference, low, high (95 % bootstrap over the images of the class and over the runs of each list; where no image
    changed, half an image that only one list gets right, for each, keeps it from certainty)."""
    right = []
    for several in (before, after):
        which = attack or last_attack(several[0])
        right.append(np.stack([o.correct(which)[o.labels == o.class_names.index(name)] for o in several]))
    if right[0].shape[1] != right[1].shape[1]:
        raise ValueError(f"class {name!r} has {right[0].shape[1]} images before and {right[1].shape[1]} after")
    rng, n = np.random.default_rng(0), right[0].shape[1]
    weight = rng.dirichlet([*np.ones(n), 0.5, 0.5], draws)
    known = [np.pad(r, ((0, 0), (0, 2)), constant_values=True) for r in right]
    known[0][:, n], known[1][:, n + 1] = False, False
    each = [np.take_along_axis(weight @ r.T, rng.integers(len(r), size=(draws, len(r))), 1).mean(1) for r in known]
    low, high = np.quantile(each[1] - each[0], [0.025, 0.975])
    was, now = (float(r.mean()) for r in right)
    return pd.Series({"before": was, "after": now, "difference": now - was, "low": low, "high": high}, name=name)


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

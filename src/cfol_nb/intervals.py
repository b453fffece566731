"""Intervals of mean, tail, worst class, gap, deviation, std and their differences, for every truth; no random draws.

An end of an interval is the furthest truth that a test at level alpha (half of what the interval may miss) does not
refuse. All statistics but std are sums of least means: worst = min p_k, tail = the least mean of m classes,
gap = 1 - min p_k - min (1 - p_k), deviation = worst - mean.

- A least mean that is *added*: may it be as high as t? Only if all classes are: the conditional chi-squared test of
  moment inequalities and its refinement (Cox and Shi 2023, Review of Economic Studies 90), with as many degrees of
  freedom as classes have to move.
- One that is *taken off*: may it be as low as t? If any class is: refused only if it is refused for each, which costs
  nothing (intersection-union test; Berger 1982, Technometrics 24).
- The noise of one class is Clopper and Pearson's (1934) arm in the direction of the end, so that a class that is
  clearly the weakest has exactly their interval. Arms add up in squares, with the correlation of runs, as in MOVER
  (Zou and Donner 2008, Statistics in Medicine 27).
- std is a length: may it be as high as t, in any direction? As low as t is asked of a ball (`spread`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaincc, betaincinv, chdtrc, chdtri, chndtr, ndtr, ndtri, stdtrit
from scipy.stats import beta

ALL, TAIL = "all", "tail"
ROWS = {  # sign, and the least means that are added and taken off: of accuracies (0) or errors (1), of how many classes
    "mean": (1, [(0, ALL)], []),
    "tail": (1, [(0, TAIL)], []),
    "worst": (1, [(0, 1)], []),
    "gap": (-1, [(0, 1), (1, 1)], []),
    "deviation": (1, [(0, 1)], [(0, ALL)]),
}


def clopper_pearson(x: np.ndarray, n: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limit of a proportion with x of n right (x need not be whole), each at level alpha."""
    low = np.where(x > 0, beta.ppf(alpha, np.maximum(x, 1e-9), n - x + 1), 0)
    return low, np.where(x < n, beta.isf(alpha, x + 1, np.maximum(n - x, 1e-9)), 1)


class Seen:
    """Class accuracies of R runs on the same images, and after them their shares of errors: accuracy (2R, K).

    right: (R, N) right answers, fractions where they are averaged over runs; labels: (N,). off[+1], off[-1]: (2R, K)
    arms up and down, in standard deviations. alike: (K, 2R, 2R) correlation of the answers within a class, with half an
    image more in each cell of two runs (Agresti and Min 2005, Statistics in Medicine 24), so that no two runs are taken
    to agree for certain.
    """

    def __init__(self, right: np.ndarray, labels: np.ndarray, alpha: float):
        right, n, runs = np.asarray(right, float), np.bincount(labels), range(len(right))
        x = np.stack([np.bincount(labels, r) for r in right])
        both = np.array([[np.bincount(labels, right[i] * right[j]) for j in runs] for i in runs]).transpose(2, 0, 1)
        more, one = n[:, None, None] + 2, x.T + 1
        cov = (both + (1 + np.eye(len(right))) / 2) / more - one[:, :, None] * one[:, None] / more**2
        size = np.sqrt(np.einsum("kii -> ki", cov))
        alike = cov / size[:, :, None] / size[:, None]
        self.alike = np.block([[alike, -alike], [-alike, alike]])
        low, high = clopper_pearson(x, n, alpha)
        share = one / more[:, 0]
        self.less = (size / np.sqrt(share * (1 - share))).T  # 1, less for answers averaged over runs
        down, up = (np.maximum(arm, 1e-6) * self.less / ndtri(1 - alpha) for arm in (x / n - low, high - x / n))
        self.accuracy, self.alpha = np.concatenate([x / n, 1 - x / n]), alpha
        self.off = {1: np.concatenate([up, down]), -1: np.concatenate([down, up])}

    def variance(self, noise: np.ndarray) -> np.ndarray:
        """(B,) of sums, given what each accuracy adds to their noise (B, 2R, K): weight times `off`."""
        return np.maximum((noise * np.einsum("krs, bsk -> brk", self.alike, noise)).sum((1, 2)), 0)

    def shared(self, noise: np.ndarray, run: int, sign: int) -> np.ndarray:
        """(B, K) covariances of the accuracies of a run with sums of this noise (B, 2R, K)."""
        return self.off[sign][run] * np.einsum("kr, brk -> bk", self.alike[:, run], noise)


def _risen(x: np.ndarray, w: np.ndarray, m: int) -> np.ndarray:
    """Weights (..., K) in [0, 1 / m] that add up to 1: at x + w * weight the lowest classes have risen to one level."""
    at, slope = np.concatenate([x, x + w / m], -1), np.concatenate([1 / w, -1 / w], -1)
    order = at.argsort(-1)
    at, slope = np.take_along_axis(at, order, -1), np.take_along_axis(slope, order, -1).cumsum(-1)
    total = np.concatenate([np.zeros_like(at[..., :1]), (slope[..., :-1] * np.diff(at)).cumsum(-1)], -1)
    last = np.maximum((total < 1 - 1e-12).sum(-1, keepdims=True) - 1, 0)
    total, at, slope = (np.take_along_axis(each, last, -1) for each in (total, at, slope))
    return np.clip((at + np.maximum(1 - total, 0) / np.maximum(slope, 1e-300) - x) / w, 0, 1 / m)


def _room(y: np.ndarray, rise: np.ndarray, v: np.ndarray, m: int, a: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """(J,) how far the next set of classes, with one exchanged, is from having to move, too, in standard deviations, by
    which Cox and Shi (2023) refine their test.

    y, rise, a: (J, K) accuracies that are not refused, how they move, weights 0 or 1 / m; variance: (J,).
    """
    inside = a > 0.5 / m
    own = np.where(inside, -y, np.inf).argsort(-1, kind="stable")[:, : min(m, 20), None]
    other = np.where(inside, np.inf, y).argsort(-1, kind="stable")[:, None, : min(a.shape[1] - m, 20)]
    row = np.arange(len(y))[:, None, None]
    more, var = (rise[row, other] - rise[row, own]) / m, variance[:, None, None]
    apart = np.sqrt(var * np.maximum(var + 2 * more + (v[other] + v[own]) / m**2, 0)) - var - more
    return (np.sqrt(var) * (y[row, other] - y[row, own]) / m / np.maximum(apart, 1e-12)).min((1, 2))


def as_high(terms: list, var: np.ndarray, alpha: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Weights a (B, K) of each term, and factors q (B,): least means plus something linear, whose variance is var (B,),
    are at most a @ p + linear + q * standard error.

    terms: (p, v, m, cov): accuracies and their variances (K,), of how many classes the mean is, covariances (B, K) with
    the linear part. For each `pull` the accuracies p + pull * (v * a + cov) are the nearest ones whose least means have
    such a sum. Their squared distance is the statistic of Cox and Shi's (2023) test; the furthest that is not refused
    is the end.
    """
    z, b = ndtri(1 - alpha), np.arange(len(var))
    refused = chdtri(sum(len(p) for p, *_ in terms), alpha)  # at this distance, whatever the degrees of freedom
    first = 0.99 * z / (sum(np.sqrt(v.max()) for _, v, *_ in terms) + np.sqrt(var))  # below z: not refused
    low, high = first, 1e4 * first
    for points in (40, 256, 16, 16):  # each finds the furthest more finely
        pull = np.geomspace(low, high, points, axis=1)
        a, degrees, variance = [], 1, var[:, None]
        for p, v, m, cov in terms:
            each = _risen(p + pull[..., None] * cov[:, None], pull[..., None] * v, m)
            variance = variance + each**2 @ v + 2 * np.einsum("bpk, bk -> bp", each, cov)
            moving = (each > 1e-9 / m) & (each < (1 - 1e-9) / m)
            degrees = degrees + (moving.sum(-1) - 1).clip(0)
            a.append(each)
        degrees = np.concatenate([degrees[:, 1:], degrees[:, -1:]], 1)  # no truth between two points is passed over
        distance = pull**2 * np.maximum(variance, 0)
        p_value = chdtrc(degrees, distance)
        at = (degrees == 1) & (p_value > alpha) & (p_value <= 2 * alpha)
        if at.any():  # one set of classes moves: one side of the normal, given that no other set has to
            free = np.inf
            for (p, v, m, cov), each in zip(terms, a, strict=True):
                rise = v * each[at] + cov[at.nonzero()[0]]
                free = np.minimum(free, _room(p + pull[at][:, None] * rise, rise, v, m, each[at], variance[at]))
            p_value[at] /= 2 * ndtr(np.maximum(free, 0))
        last = (points - 1 - (p_value > alpha)[:, ::-1].argmax(1)) * (p_value > alpha).any(1)
        if points == 40:
            high = pull[b, np.where(distance[:, -1] > refused, (distance > refused).argmax(1), points - 1)]
        else:
            low, high = pull[b, last], pull[b, np.minimum(last + 1, points - 1)]
    return [each[b, last] for each in a], pull[b, last] * np.sqrt(np.maximum(variance[b, last], 0))


def end(seen: Seen, plus: list, minus: list) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Upper end of the least means in `plus`, less those in `minus` (each: row of `seen`, of how many classes): their
    weights (2R, K), their noise (2R, K), how many of its standard deviations the end lies beyond the weighted
    accuracies, and what of the arm's square correlates with nothing: 0.

    Of the classes that may be a least mean in `minus` (intersection-union, Berger 1982) those that leave the end
    highest are looked for, by what each would do to it, and by exchanging one.
    """
    k, z = seen.accuracy.shape[1], ndtri(1 - seen.alpha)
    open_ = [(i, m) for i, m in plus if m < k]

    def attempts(chosen: Sequence) -> tuple:
        weights = np.zeros((len(chosen), *seen.accuracy.shape))
        noise = np.zeros_like(weights)

        def put(run: int, weight: np.ndarray, sign: int) -> None:
            weights[:, run] += sign * weight
            noise[:, run] += sign * weight * seen.off[sign][run]

        for g, (j, m) in enumerate(minus):
            weight = np.zeros((len(chosen), k))
            np.put_along_axis(weight, np.stack([own[g] for own in chosen]), 1 / m, 1)
            put(j, weight, -1)
        for i, m in plus:
            if m == k:  # a mean: nothing is chosen
                put(i, np.full((len(chosen), k), 1 / k), 1)
        q = np.full(len(chosen), z)
        if open_:
            terms = [(seen.accuracy[i], seen.off[1][i] ** 2, m, seen.shared(noise, i, 1)) for i, m in open_]
            a, q = as_high(terms, seen.variance(noise), seen.alpha)
            for (i, _), each in zip(open_, a, strict=True):
                put(i, each, 1)
        se = np.sqrt(seen.variance(noise))
        return (weights * seen.accuracy).sum((1, 2)) + q * se, weights, noise, q, se

    def lowest(scores: list) -> list:
        return [np.sort(np.argsort(-s, kind="stable")[:m]) for s, (_, m) in zip(scores, minus, strict=True)]

    scores = [z * seen.off[-1][j] / np.sqrt(m) - seen.accuracy[j] for j, m in minus]
    tried, chosen = [], lowest(scores)
    while not any(all(map(np.array_equal, chosen, other)) for other in tried):
        tried.append(chosen)
        if all(m == k for _, m in minus):  # nothing to choose
            break
        _, _, noise, q, se = attempts([chosen])
        scores = []
        for (j, m), own in zip(minus, chosen, strict=True):
            left, w = noise.copy(), seen.off[-1][j] ** 2
            left[0, j, own] += seen.off[-1][j, own] / m
            cov = seen.shared(left, j, -1)[0]
            one = np.sqrt(np.maximum(seen.variance(left) + w - 2 * cov, 0))
            scores.append(q * (one if m == 1 else (w / m / 2 - cov) / np.maximum(se, 1e-12)) - seen.accuracy[j])
        chosen = lowest(scores)
    for g, (_, m) in enumerate(minus):  # and sets with one class exchanged
        order = np.argsort(-scores[g], kind="stable")
        for out, new in itertools.product(order[max(0, m - 3) : m], order[m : m + 5]):
            other = np.sort(np.append(order[:m][order[:m] != out], new))
            tried.append([*chosen[:g], other, *chosen[g + 1 :]])
    ends, weights, noise, q, _ = attempts(tried)
    best = ends.argmax()
    return weights[best], noise[best], q[best], 0.0


def spread(seen: Seen, run: int, sign: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """As `end`, of sign * the standard deviation between classes of a run; and the part of the arm's square that
    correlates with nothing, as the direction of the deviations is not sure.

    It is the length of the centred accuracies, over sqrt(K). As high as t: in any direction, so that the largest
    in the ellipsoid of one normal's radius is the end (intersection-union). As low as t: the distance from the ball of
    such accuracies. At every point of its surface it contains a ball of its least radius of curvature (Blaschke's
    rolling theorem); the distance from that has a noncentral chi-squared distribution, exact where all classes have the
    same noise.
    """
    p, k = seen.accuracy[run], seen.accuracy.shape[1]
    weights, noise = np.zeros((2, *seen.accuracy.shape))
    away = p - p.mean()
    if k == 1:
        return weights, noise, 1.0, 0.0
    v = np.where(away > 0, seen.off[sign][run], seen.off[-sign][run]) ** 2
    centre = np.eye(k) - 1 / k
    size, axes = np.linalg.eigh(centre * v @ centre + 2 * v.max() / k)
    size, axes = size[:-1], axes[:, :-1]  # the last is of all classes together
    y = axes.T @ away
    y[-1] += 1e-9 * (1 if y[-1] >= 0 else -1)

    def moved(pull: float) -> np.ndarray:
        return y / (1 - sign * pull * size)

    def distance(pull: float) -> float:
        return pull * np.sqrt((size * moved(pull) ** 2).sum())

    if sign > 0:
        pull = brentq(lambda x: distance(x) - ndtri(1 - seen.alpha), 0, (1 - 1e-12) / size[-1])
    else:

        def refused(log: float) -> float:
            radius = np.linalg.norm(moved(np.exp(log))) * np.sqrt(size[0]) / size[-1]
            return 1 - chndtr((radius + distance(np.exp(log))) ** 2, k - 1, radius**2) - seen.alpha

        ends = np.log(1e-6 / size[-1]), np.log(1e9 / size[0])
        pull = np.exp(brentq(refused, *ends)) if refused(ends[1]) < 0 else np.inf
    to = axes @ moved(pull) if pull < np.inf else np.zeros(k)
    value, reached = (np.linalg.norm(each) / np.sqrt(k) for each in (away, to))
    middle = np.sqrt(max(value**2 - size.sum() / k, 0))  # without what noise adds
    arm, direction = abs(reached - middle), away / max(np.linalg.norm(away), 1e-9)
    weights[run] = sign * direction * middle / (max(value, 1e-9) * np.sqrt(k))
    noise[run] = sign * direction * np.sqrt(v)
    sure = np.sqrt(max(1 - (arm / middle) ** 2, 0)) if middle > 0 else 0  # cosine of how far off the direction may be
    noise *= sure * arm / np.sqrt(max(seen.variance(noise[None])[0], 1e-300))
    return weights, noise, 1.0, arm**2 * (1 - sure**2)


def intervals(
    own: np.ndarray,
    labels: np.ndarray,
    base: np.ndarray | None = None,
    *,
    tail: int,
    confidence: float = 0.95,
    any_run: bool = False,
) -> dict[str, tuple[float, float, float]]:
    """value, low, high of each statistic, averaged over runs, or how much higher it is than of other runs, run by run.

    own, base: (S, N) right answers; labels: (N,), no class without images; tail: of how many classes. The interval is
    of these runs on other images. any_run: of all runs of this kind (Student's interval over runs); what the images
    add alike in all runs is added in squares, what they add to each run is in the runs' spread already.
    """
    every = np.concatenate([own] if base is None else [own, base])
    seen, s, r = Seen(every, labels, (1 - confidence) / 2), len(own), len(every)
    k, z, paired = seen.accuracy.shape[1], ndtri((1 + confidence) / 2), base is not None
    pairs = [[i, s + i][: 1 + paired] for i in range(s)]
    parts = [Seen(every[pair], labels, seen.alpha) for pair in pairs]

    def arm(ends: list, value: np.ndarray) -> float:
        """How far the upper end of the mean over runs lies beyond its value; ends: of each run."""
        centre, noise, more = np.zeros(s), np.zeros((s, r, k)), np.zeros((2, s))
        for i, (weights, each, q, alone) in enumerate(ends):
            centre[i] = (weights * parts[i].accuracy).sum()
            # beyond one normal's quantile it makes up for what is alike in all runs, and does not average out
            more[:, i] = max(q - z, 0) * np.sqrt(parts[i].variance(each[None])[0]), np.sqrt(alone)
            noise[i, pairs[i]] = min(q, z) * (each[: 1 + paired] - each[1 + paired :])  # an error is no right answer
        var = np.einsum("irk, krs, jsk -> ij", noise, seen.alike[:, :r, :r], noise)
        out = centre.mean() - value.mean() + more[0].mean() + np.sqrt(max(var.mean(), 0) + more[1].mean() ** 2)
        if any_run:
            student = (stdtrit(s - 1, 1 - seen.alpha) * value.std(ddof=1)) ** 2 / s
            once = (var.trace() / s - (var.sum() - var.trace()) / (s * (s - 1))) / s
            out = np.sqrt(student + max(out**2 - max(once, 0), 0))
        return out

    def least_means(of: list, accuracy: np.ndarray) -> float:
        return sum(np.partition(accuracy[j], m - 1)[:m].mean() for j, m in of)

    rows = {}
    for name, (sign, plus, minus) in ROWS.items():
        up, down = (
            [((1 + paired) * wrong, {ALL: k, TAIL: tail}.get(m, m)) for wrong, m in side] for side in (plus, minus)
        )
        if paired:
            up, down = up + [(1 + j, m) for j, m in down], down + [(1 + j, m) for j, m in up]
        value = np.array([least_means(up, part.accuracy) - least_means(down, part.accuracy) for part in parts])
        more, less = (
            arm([end(part, *sides) for part in parts], d * value) for d, sides in ((1, (up, down)), (-1, (down, up)))
        )
        offset = float(sign < 0 and not paired)  # gap = 1 - least accuracy - least error
        rows[name] = offset + sign * value.mean(), (more, less)[::sign]
    value = np.array([part.accuracy[0].std() - (part.accuracy[1].std() if paired else 0) for part in parts])
    arms = []
    for sign in (1, -1):
        ends = [[spread(part, 0, sign), *([spread(part, 1, -sign)] * paired)] for part in parts]
        ends = [(sum(e[0] for e in each), sum(e[1] for e in each), 1.0, sum(e[3] for e in each)) for each in ends]
        arms.append(arm(ends, sign * value))
    rows["std"] = value.mean(), arms
    least = {name: -1 if paired or name == "deviation" else 0 for name in rows}
    return {
        name: (v, min(max(round(v - less, 9), least[name]), v) + 0.0, max(min(round(v + more, 9), 1), v))
        for name, (v, (more, less)) in rows.items()
    }


def weakest(right: np.ndarray, labels: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(K,) probability that a class is truly the weakest, and (K,) whether it may be: with this confidence the weakest
    is one of these.

    right: (N,) right answers in [0, 1], averaged over runs; labels: (N,). The probability is by quadrature over
    independent posteriors under Jeffreys' prior. May be: that no class is lower is not refused (conditional chi-squared
    test, Cox and Shi 2023), by Clopper and Pearson's arms.
    """
    seen = Seen(right[None], labels, (1 - confidence) / 2)
    p, k, n = seen.accuracy[0], seen.accuracy.shape[1], np.bincount(labels) / seen.less[0] ** 2
    posterior = p * n + 0.5, (1 - p) * n + 0.5
    ends = [betaincinv(*posterior, tail).min() for tail in (1e-9, 1 - 1e-9)]  # of the least
    grid = np.sin(np.linspace(*np.arcsin(np.sqrt(ends)), 401))[:, None] ** 2
    above = betaincc(*posterior, grid)
    logs = np.log(np.maximum(above, 1e-300))
    others = np.exp(logs.sum(1, keepdims=True) - logs)
    share = ((others[1:] + others[:-1]) / 2 * -np.diff(above, axis=0)).sum(0)
    # the nearest accuracies with class c (rows) lowest: it comes down, and the lowest others (columns) up, to one level
    order = np.argsort(p, kind="stable")
    up, down = seen.off[1][0][order] ** 2, seen.off[-1][0][:, None] ** 2
    other = order != np.arange(k)[:, None]
    w, wp, wpp = (
        np.concatenate([0 * down, (other / up * p[order] ** i).cumsum(1)], 1) + p[:, None] ** i / down for i in range(3)
    )
    level = wp / w
    moved = (level <= np.append(p[order], np.inf)).argmax(1)[:, None]
    distance = np.take_along_axis(np.maximum(wpp - wp**2 / w, 0), moved, 1)[:, 0]
    return share / share.sum(), (moved[:, 0] == 0) | (chdtrc(np.maximum(moved[:, 0], 1), distance) > 1 - confidence)

"""Intervals against closed forms, brute force and other libraries; how often they hold is in test_coverage."""

import itertools

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq, minimize
from scipy.stats import beta, binomtest, chi2, ncx2, norm, t, ttest_1samp

from cfol_nb import stats
from cfol_nb.intervals import ROWS, Seen, intervals, weakest

ALPHA = 0.025


def answers(*correct, n=60):
    """(1, K * n) answers with so many right of each class, and their labels."""
    return np.concatenate([np.arange(n) < c for c in correct])[None], np.repeat(np.arange(len(correct)), n)


def drawn(seed, accuracy, n, runs=1):
    rng, labels = np.random.default_rng(seed), np.repeat(np.arange(len(accuracy)), n)
    return rng.random((runs, len(labels))) < np.asarray(accuracy)[labels], labels


def nearest(points, v, m, level):
    """Squared distance of accuracies to the nearest ones whose least mean of m classes is `level`, by a solver."""
    sets = [list(s) for s in itertools.combinations(range(len(points)), m)]
    found = minimize(
        lambda p: ((p - points) ** 2 / v).sum(),
        np.maximum(points, level),
        jac=lambda p: 2 * (p - points) / v,
        constraints=[{"type": "ineq", "fun": lambda p, s=s: p[s].mean() - level} for s in sets],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    tight = [s for s in sets if found.x[s].mean() < level + 1e-7]
    rank = np.linalg.matrix_rank(np.array([np.isin(np.arange(len(points)), s) for s in tight], float)) if tight else 0
    return found.fun, rank


def test_a_class_that_is_clearly_the_weakest_has_clopper_and_pearson_s_interval():
    right, labels = answers(9, 50, 52, 55)
    value, low, high = intervals(right, labels, tail=1)["worst"]
    exact = binomtest(9, 60).proportion_ci(0.95, method="exact")
    assert value == pytest.approx(9 / 60)
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=2e-4)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("correct", [(20, 24, 27, 40, 50), (30, 30, 30, 30, 30), (12, 30, 31, 33, 55)])
def test_the_upper_end_of_least_means_is_the_furthest_that_the_conditional_test_does_not_refuse(m, correct):
    right, labels = answers(*correct)
    high = intervals(right, labels, tail=m)["tail"][2]
    p = np.array(correct) / 60
    v = ((beta.isf(ALPHA, np.array(correct) + 1, 60 - np.array(correct)) - p) / norm.isf(ALPHA)) ** 2
    distance, degrees = nearest(p, v, m, high - 1e-5)
    assert chi2.sf(distance, max(degrees, 1)) > ALPHA * 0.99  # not refused, at the latest with one side of the normal
    for level in np.linspace(high + 0.004, high + 0.2, 12):
        distance, degrees = nearest(p, v, m, level)
        assert chi2.sf(distance, degrees) < 2 * ALPHA if degrees == 1 else chi2.sf(distance, degrees) <= ALPHA


@pytest.mark.parametrize("correct", [(20, 24, 27, 40, 50), (30, 30, 30, 30, 30)])
def test_the_lower_end_of_the_worst_class_is_the_lowest_of_one_class_alone(correct):
    """One class is enough, and nothing is paid for the choice (intersection-union)."""
    right, labels = answers(*correct)
    low = intervals(right, labels, tail=2)["worst"][1]
    assert low == pytest.approx(min(binomtest(c, 60).proportion_ci(0.95).low for c in correct), abs=1e-6)


def test_the_mean_has_the_arms_of_its_classes_in_squares():
    right, labels = answers(20, 24, 27, 40)
    value, low, high = intervals(right, labels, tail=1)["mean"]
    ends = [binomtest(c, 60).proportion_ci(0.95) for c in (20, 24, 27, 40)]
    p = np.array([20, 24, 27, 40]) / 60
    assert high - value == pytest.approx(np.linalg.norm([e.high for e in ends] - p) / 4, abs=1e-8)
    assert value - low == pytest.approx(np.linalg.norm(p - [e.low for e in ends]) / 4, abs=1e-8)


def test_the_gap_of_errors_is_that_of_accuracies():
    right, labels = drawn(0, [0.3, 0.5, 0.55, 0.8], 50)
    got, mirrored = intervals(right, labels, tail=1), intervals(~right, labels, tail=1)
    assert got["gap"] == pytest.approx(mirrored["gap"], abs=1e-6)
    assert got["std"] == pytest.approx(mirrored["std"], abs=1e-6)


def test_the_gap_of_two_classes_is_their_difference():
    """MOVER of the two (Zou and Donner 2008), where it is clear which is lower."""
    right, labels = answers(15, 45)
    _, low, high = intervals(right, labels, tail=1)["gap"]
    first, second = (binomtest(c, 60).proportion_ci(0.95) for c in (15, 45))
    assert low == pytest.approx(0.5 - np.hypot(first.high - 0.25, 0.75 - second.low), abs=1e-3)
    assert high == pytest.approx(0.5 + np.hypot(0.25 - first.low, second.high - 0.75), abs=1e-6)


def test_the_spread_of_equally_noisy_classes_has_the_noncentral_chi_squared_end():
    """As many right as wrong in mirrored classes: all arms towards the middle are equal."""
    correct = np.array([20, 20, 20, 40, 40, 40])
    right, labels = answers(*correct)
    value, low, high = intervals(right, labels, tail=1)["std"]
    size = (binomtest(20, 60).proportion_ci(0.95).high - 1 / 3) / norm.isf(ALPHA)
    distance = 6 * value**2 / size**2
    root = brentq(lambda x: ncx2.sf(distance, 5, x) - ALPHA, 1e-6, distance)
    assert low == pytest.approx(size * np.sqrt(root / 6), rel=1e-4)
    away = (1 / 3 - binomtest(20, 60).proportion_ci(0.95).low) / np.sqrt(6)  # in the one direction that they spread
    assert high == pytest.approx(value + away, rel=1e-3)


def test_equal_classes_may_have_no_spread_and_no_gap():
    got = intervals(*answers(30, 31, 29, 30), tail=1)
    assert got["std"][1] == got["gap"][1] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_difference_is_the_other_way_round_with_its_sign(seed):
    a, labels = drawn(seed, [0.3, 0.4, 0.5, 0.8], 50)
    b, _ = drawn(seed + 10, [0.4, 0.35, 0.5, 0.8], 50)
    got, back = intervals(a, labels, b, tail=2), intervals(b, labels, a, tail=2)
    for name in got:
        value, low, high = got[name]
        assert back[name] == pytest.approx((-value, -high, -low), abs=1e-9)
        assert low <= value <= high


def test_a_difference_of_means_is_that_of_correlated_proportions():
    """One class: MOVER with the correlation of the paired table (Agresti and Min 2005), by hand."""
    table = np.array([[20, 12], [5, 23]])  # of a and b: both right, only a, only b, none
    a = np.repeat([1, 1, 0, 0], table.ravel()).astype(bool)[None]
    b = np.repeat([1, 0, 1, 0], table.ravel()).astype(bool)[None]
    _, low, high = intervals(a, np.zeros(60, int), b, tail=1)["mean"]
    more = (table + 0.5) / 62
    p, q = more[0].sum(), more[:, 0].sum()
    r = (more[0, 0] - p * q) / np.sqrt(p * (1 - p) * q * (1 - q))
    own, base = (binomtest(c, 60).proportion_ci(0.95) for c in (32, 25))
    up, down = own.high - 32 / 60, 25 / 60 - base.low
    assert high - 7 / 60 == pytest.approx(np.sqrt(up**2 + down**2 - 2 * r * up * down), abs=1e-8)
    up, down = base.high - 25 / 60, 32 / 60 - own.low
    assert 7 / 60 - low == pytest.approx(np.sqrt(up**2 + down**2 - 2 * r * up * down), abs=1e-8)


def test_the_difference_of_the_worst_is_the_highest_over_all_classes_that_may_be_the_base_s_worst():
    """Brute force over them: the end with each of them alone, given by a search of its own (three classes)."""
    a, labels = drawn(4, [0.3, 0.4, 0.5], 60)
    b, _ = drawn(5, [0.35, 0.3, 0.6], 60)
    high = intervals(a, labels, b, tail=1)["worst"][2]
    seen = Seen(np.concatenate([a, b]), labels, ALPHA)
    best = -1.0
    for j in range(3):  # p_k - q_j of every class k must be as high as the end
        cov = np.zeros((3, 3))
        up, down = seen.off[1][0], seen.off[-1][1, j]
        for k in range(3):
            for i in range(3):
                both = (k == j) * seen.alike[j, 0, 1] * up[k] * down + (i == j) * seen.alike[j, 0, 1] * up[i] * down
                cov[k, i] = (k == i) * up[k] ** 2 + down**2 - both
        d, inverse = seen.accuracy[0] - seen.accuracy[1, j], np.linalg.inv(cov)
        for level in np.arange(d.min() - 0.1, 1, 0.002):
            found = minimize(
                lambda x, d=d, inverse=inverse: (x - d) @ inverse @ (x - d),
                np.maximum(d, level),
                jac=lambda x, d=d, inverse=inverse: 2 * inverse @ (x - d),
                bounds=[(level, None)] * 3,
                method="L-BFGS-B",
                options={"ftol": 1e-14, "gtol": 1e-10},
            )
            moved = int((found.x < level + 1e-6).sum())
            if moved and chi2.sf(found.fun, moved) > (2 * ALPHA if moved == 1 else ALPHA):
                best = max(best, level)
    assert high == pytest.approx(best, abs=0.012)  # the search's step, and one side of the normal taken in full


def test_the_end_is_the_same_whatever_the_order_of_the_classes():
    right, labels = drawn(1, np.linspace(0.2, 0.8, 8), 40)
    base, _ = drawn(2, np.linspace(0.3, 0.7, 8), 40)
    order = np.random.default_rng(0).permutation(8)
    one, other = (intervals(right, x, base, tail=2) for x in (labels, order[labels]))
    for name in one:
        assert one[name] == pytest.approx(other[name], abs=1e-6)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_more_confidence_is_a_wider_interval(confidence):
    right, labels = drawn(3, [0.3, 0.35, 0.4, 0.7, 0.9], 80)
    narrow, wide = (intervals(right, labels, tail=1, confidence=c) for c in (confidence, (1 + confidence) / 2))
    for name in narrow:
        assert wide[name][1] <= narrow[name][1] <= narrow[name][0] <= narrow[name][2] <= wide[name][2]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_few_classes_and_extreme_counts_have_finite_intervals_within_range(k):
    for correct in itertools.product([0, 1, 30, 60] if k < 3 else [0, 59, 60], repeat=k):
        right, labels = answers(*correct)
        for base in (None, ~right, np.roll(right, 7, 1)):
            for name, (value, low, high) in intervals(right, labels, base, tail=1).items():
                least = -1 if base is not None or name == "deviation" else 0
                assert least <= low <= value + 1e-9, (correct, name)
                assert value - 1e-9 <= high <= 1, (correct, name)


# -- seeds ---------------------------------------------------------------------------------------------------------


def test_any_run_is_student_s_interval_over_runs_where_images_add_nothing():
    """Runs that differ much, on so many images that these hardly count."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 40_000)
    level = np.array([0.35, 0.55, 0.5, 0.4])
    right = rng.random((4, 80_000)) < (level[:, None] + 0.1 * labels)
    _, low, high = intervals(right, labels, tail=1, any_run=True)["mean"]
    want = ttest_1samp(right.mean(1), 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((want.low, want.high), abs=2e-4)
    _, low, high = intervals(right, labels, tail=1)["mean"]
    assert high - low < 0.01 < want.high - want.low


def test_runs_that_answer_alike_are_one_run():
    """Nothing is known of more images than there are, and nothing of the images is counted twice."""
    right, labels = drawn(0, [0.3, 0.5, 0.7], 400)
    one, three = intervals(right, labels, tail=1), np.repeat(right, 3, 0)
    for any_run in (False, True):
        for name, row in intervals(three, labels, tail=1, any_run=any_run).items():
            assert row == pytest.approx(one[name], abs=0.04 * (one[name][2] - one[name][1])), name


def test_what_images_add_to_each_run_alone_is_counted_once():
    """Runs that are as good as each other, and err independently: Student's interval alone."""
    right, labels = drawn(1, [0.3, 0.6], 500, runs=40)
    value, low, high = intervals(right, labels, tail=1, any_run=True)["mean"]
    means = np.array([[r[labels == c].mean() for c in (0, 1)] for r in right]).mean(1)
    half = t.isf(ALPHA, 39) * means.std(ddof=1) / np.sqrt(40)
    assert high - value == pytest.approx(half, rel=0.15)
    assert value - low == pytest.approx(half, rel=0.15)


# -- the weakest class -------------------------------------------------------------------------------------------------


def test_the_chance_to_be_the_weakest_is_that_of_two_beta_posteriors():
    """P(X < Y) of two Beta distributions by numerical integration; the third class is out of reach."""
    right, labels = answers(20, 24, 49, n=50)
    x, y = beta(20.5, 30.5), beta(24.5, 26.5)
    share, may = weakest(right[0].astype(float), labels)
    assert share[0] == pytest.approx(quad(lambda p: x.pdf(p) * y.sf(p), 0, 1)[0], abs=1e-4)
    assert share[2] < 1e-9
    assert share.sum() == pytest.approx(1)
    assert may.tolist() == [True, True, False]


def test_classes_that_may_be_the_weakest_are_those_whose_being_lowest_is_not_refused():
    for seed in range(20):
        right, labels = drawn(seed, [0.4, 0.45, 0.5, 0.5, 0.6, 0.6], 80)
        _, may = weakest(right[0].astype(float), labels)
        x = np.bincount(labels, right[0])
        p, z = x / 80, norm.isf(ALPHA)
        low, high = (p - beta.ppf(ALPHA, x, 81 - x)) / z, (beta.isf(ALPHA, x + 1, 80 - x) - p) / z
        for c in range(6):
            v = np.where(np.arange(6) == c, low, high) ** 2
            found = minimize(
                lambda q, p=p, v=v: ((q - p) ** 2 / v).sum(),
                p,
                constraints=[{"type": "ineq", "fun": lambda q, c=c: np.delete(q - q[c], c)}],
                method="SLSQP",
                options={"ftol": 1e-12},
            )
            moved = (np.delete(found.x - found.x[c], c) < 1e-6).sum()
            refused = moved > 0 and chi2.sf(found.fun, moved) <= 0.05
            if moved == 0 or abs(chi2.sf(found.fun, moved) - 0.05) > 1e-4:
                assert may[c] != refused, (seed, c)


def test_averaged_runs_that_err_independently_are_worth_more_images():
    right, labels = drawn(0, [0.5, 0.6], 200, runs=8)
    alone, averaged = (weakest(r, labels)[0][0] for r in (right[0].astype(float), right.mean(0)))
    assert averaged > max(alone, 0.99)


def test_every_statistic_has_an_interval():
    assert {*ROWS, "std"} == set(stats.STATISTICS)

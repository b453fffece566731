"""Do the stated 95 % intervals hold? Simulated outcomes with known class accuracies."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import comb
from scipy.stats import kstest, norm, pearsonr, spearmanr

from benchmarks.coverage import CASES, coverage, outcomes
from cfol_nb import stats


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "simulations"),
    [
        ("like CIFAR-10, 60 a class", 600),
        ("like digits, 60 a class", 600),
        ("like CIFAR-10, 1000 a class", 400),
        ("like CIFAR-100, 100 a class", 600),
        ("drawn from Beta(5, 4), 10 of 60", 600),
    ],
)
def test_intervals_hold_in_93_to_97_per_cent(case, simulations):
    noise = 2.5 * np.sqrt(0.95 * 0.05 / simulations)  # of the simulation itself
    for name, share in coverage(*CASES[case], simulations=simulations).items():
        assert 0.93 - noise <= share <= 0.97 + noise, (name, share)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accuracy", "n"),
    [(np.full(10, 0.7), 60), (np.r_[0.2, np.full(9, 0.8)], 60), (np.r_[0.02, np.full(9, 0.5)], 60)],
    ids=["equal", "outlier", "nearly 0"],
)
def test_single_intervals_hold_where_classes_are_equal_or_one_stands_alone(accuracy, n):
    held = coverage(accuracy, n, simulations=250)
    assert min(held["mean"], held["tail"], held["worst"]) >= 0.92, held


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "simulations", "names"),
    [
        ("5 at 40 and 5 at 70 %, 60 a class", 400, ["worst", "tail"]),
        ("100 evenly spaced, versus one weak", 150, ["worst", "paired worst"]),
    ],
)
def test_intervals_hold_where_many_classes_lie_close_to_the_worst(case, simulations, names):
    """Without what lies beyond the draws, 68 and 79 %, and 52 and 48 %."""
    held = coverage(*CASES[case], simulations=simulations)
    assert min(held[name] for name in names) >= 0.89, held


def test_what_lies_beyond_the_draws_is_the_furthest_truth_not_refused():
    """The worst class: the chance of a minimum as low, in closed form for normal noise. The gap is its mirror image."""
    rng, size = np.random.default_rng(0), 0.05
    angle = np.array([[0.6, 0.63, 0.64, 0.7, 0.9, 0.95]])
    noise, runs = size * rng.standard_normal((200_000, 1, 6)), np.zeros((200_000, 1, 1), int)
    outward = angle[0] + size / 2 * np.array([-1, -1, -1, -1, 1, 1])

    def refused(level: float, confidence: float) -> float:
        lower = norm.cdf((0.6 - np.maximum(outward, level)) / size)
        return 1 - np.prod(1 - lower) - (1 - confidence)

    for confidence in (0.8, 0.95):
        furthest = np.sin(brentq(refused, 0.6, 0.9, args=(confidence,))) ** 2
        at = {"worst": np.full(9, 0.3), "gap": np.full(9, 0.4), "mean": np.full(9, 0.5)}
        got = stats._beyond(angle, noise, runs, at, confidence)
        assert got["worst"] == pytest.approx(furthest - 0.3, abs=0.002)
        assert got["mean"] == 0
        assert stats._beyond(angle, noise, runs, {"worst": np.full(9, 0.9)}, confidence) == {"worst": 0}
    mirrored = {"gap": np.full(9, 0.4)}  # accuracies and errors swapped
    got, other = (stats._beyond(a, noise, runs, mirrored, 0.95)["gap"] for a in (angle, np.pi / 2 - angle))
    assert got < 0
    assert got == pytest.approx(other, abs=0.003)


def test_a_difference_reaches_as_much_farther_as_one_side_does_than_the_other(monkeypatch):
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(30), 100)
    weak = np.r_[0.15, np.linspace(0.3, 0.9, 29)]
    a, b = (outcomes(rng.random(3000) < p[labels], labels, 30) for p in (np.linspace(0.2, 0.9, 30), weak))
    cases = {"a": {}, "b": {}, "a - b": {"versus": b}, "b - a": {"versus": a}}
    after = {k: stats.summary(b if k[0] == "b" else a, **v) for k, v in cases.items()}
    monkeypatch.setattr(stats, "ALIKE", {})
    farther = {k: after[k] - stats.summary(b if k[0] == "b" else a, **v) for k, v in cases.items()}
    for name, near, far in (("worst", "low", "high"), ("deviation", "low", "high"), ("gap", "high", "low")):
        more = {k: f.loc[name] for k, f in farther.items()}
        apart = more["a"][far] - more["b"][far]
        assert abs(apart) > 0.01
        assert (more["a"][near], more["b"][near]) == (0, 0)
        assert (more["a - b"][near], more["b - a"][far]) == (0, 0)  # a difference has draws of its own
        assert (more["a - b"][far], -more["b - a"][near]) == pytest.approx((apart, apart), abs=0.003)


@pytest.mark.parametrize("right", [0, 3, 9, 10])
def test_the_worst_class_with_few_right_answers_is_not_surer_than_a_class_alone(monkeypatch, right):
    labels = np.repeat(np.arange(4), 100)
    correct = np.concatenate([np.arange(100) < c for c in (right, 12, 50, 90)])
    a, b = outcomes(correct, labels, 4), outcomes(np.roll(correct, 7), labels, 4)
    got, difference = stats.summary(a), stats.summary(b, versus=a)
    monkeypatch.setattr(stats, "FEW", 0)
    before, difference_before = stats.summary(a), stats.summary(b, versus=a)
    more, worst = 0.0005 * (10 - right), ["worst", "worst_of_mean"]
    ends = ["low", "high"]
    if right < 10:
        assert (got.loc[worst, "high"] >= stats.wilson(right, 100)[1]).all()
    wider = difference_before.loc[worst, ends] + np.array([-more, more])  # half an image where none is right
    np.testing.assert_allclose(difference.loc[worst, ends], wider)
    others = [k for k in got.index if k not in worst]
    np.testing.assert_array_equal(got.loc[others, ends], before.loc[others, ends])
    np.testing.assert_array_equal(difference.loc[others, ends], difference_before.loc[others, ends])


def test_the_interval_of_a_class_holds_with_its_level():
    """Wilson's interval, exactly: the sum of binomial probabilities of the counts whose interval holds p."""
    from scipy.stats import binom

    for n in (60, 100, 1000):
        ends = np.array([stats.wilson(c, n) for c in range(n + 1)])
        for p in np.linspace(0.1, 0.9, 17):
            held = binom.pmf(np.arange(n + 1)[(ends[:, 0] <= p) & (p <= ends[:, 1])], n, p).sum()
            assert 0.925 < held < 0.975
        shares = [
            binom.pmf(np.arange(n + 1)[(ends[:, 0] <= p) & (p <= ends[:, 1])], n, p).sum()
            for p in np.linspace(0.1, 0.9, 161)
        ]
        assert 0.94 < np.mean(shares) < 0.96


def test_draws_of_the_true_accuracies_are_those_of_the_hierarchical_model():
    """Mean and spread of each class by numerical integration over the population's mean and spread."""
    rng, k, size = np.random.default_rng(0), 6, 0.06
    angle = np.array([0.55, 0.6, 0.62, 0.75, 0.8, 0.9])
    drawn = np.arcsin(
        np.sqrt(
            stats.true_accuracies(
                angle, np.full(k, size), size * rng.standard_normal((200_000, k)), rng.standard_normal((200_000, 1 + k))
            )
        )
    )
    steps = np.geomspace(0.2, 1.5 / size, 2000)  # finer than there, and its own arithmetic
    prior = np.r_[2, np.log(steps[1] / steps[0]) * np.where(steps > 1, steps**2, 1)]
    spread, centre = size * np.r_[0, steps][:, None], np.linspace(-1, 2.5, 7001)
    like = np.ones((len(spread), len(centre)))
    for y in angle:
        v = size**2 + spread**2
        like *= np.exp(-((y - centre) ** 2) / (2 * v)) / np.sqrt(v)
    like *= prior[:, None]
    like /= like.sum()
    kept = spread**2 / (size**2 + spread**2)
    for c, y in enumerate(angle):
        mean = kept * y + (1 - kept) * centre
        first, second = (like * mean).sum(), (like * (mean**2 + kept * size**2)).sum()
        assert drawn[:, c].mean() == pytest.approx(first, abs=0.0008)
        assert drawn[:, c].std() == pytest.approx(np.sqrt(second - first**2), rel=0.02)


def test_classes_that_are_alike_are_drawn_together_and_others_stay_apart():
    rng = np.random.default_rng(0)
    noise, chance = rng.standard_normal((4000, 10)), rng.standard_normal((4000, 11))
    alike = rng.normal(1.0, 0.005, 10)
    drawn = stats.true_accuracies(alike, np.full(10, 0.02), 0.02 * noise, chance)
    assert np.median(np.ptp(drawn, axis=1)) == 0
    assert (drawn.std(0) < 0.6 * 0.02 * np.sin(2.0)).all()
    apart = np.linspace(0.2, 1.4, 10)
    drawn = stats.true_accuracies(apart, np.full(10, 0.01), 0.01 * noise, chance)
    np.testing.assert_allclose(drawn.mean(0), np.sin(apart) ** 2, atol=0.002)
    size = np.r_[0.001, np.full(9, 0.1)]  # what is measured well does not move, nor is it moved by the others
    drawn = stats.true_accuracies(np.r_[0.9, np.full(9, 0.8)], size, size * noise, chance)
    np.testing.assert_allclose(drawn[:, 0].mean(), np.sin(0.9) ** 2, atol=0.001)
    assert drawn[:, 1:].mean() > np.sin(0.8) ** 2 + 0.01


def test_classes_are_cut_into_populations_where_that_is_likelier():
    """Every cut by numerical integration over the centres and spreads of its two sides; e^2 times likelier."""
    size = 0.06
    steps = np.geomspace(0.2, 1.5 / size, 100)
    spread, share = size * np.r_[0, steps], np.r_[2, np.full(100, np.log(steps[1] / steps[0]))]
    centre, step = np.linspace(-6, 8, 3501, retstep=True)

    def likelihood(y: np.ndarray) -> float:
        each = norm.pdf(y[:, None, None], centre, np.sqrt(size**2 + spread**2)[:, None]).prod(0)
        return share @ each.sum(1) / share.sum() * step * 2 / np.pi

    rng, seen = np.random.default_rng(0), []
    for i in range(30):
        y = rng.normal(0.8, 0.05, 5) + (i % 3) * 0.25 * (np.arange(5) < 1 + i % 2)
        o = np.argsort(y)
        odds = [likelihood(y[o[:j]]) * likelihood(y[o[j:]]) / comb(5, j) / 4 for j in range(1, 5)]
        cut = int(np.argmax(odds)) + 1
        got = stats.populations(y, np.full(5, size))
        seen.append(max(odds) > np.exp(2) * likelihood(y))
        assert (len(got) > 1) == seen[-1]
        if seen[-1]:  # each side may be cut again
            assert any(sorted(np.concatenate(got[:n])) == sorted(o[:cut]) for n in range(1, len(got)))
    assert 5 < sum(seen) < 25


def test_one_class_far_from_equal_ones_leaves_them_together():
    rng = np.random.default_rng(0)
    angle, size = np.r_[0.4, rng.normal(1.1, 0.06, 9)], np.full(10, 0.06)
    first, rest = stats.populations(angle, size)
    assert list(first) == [0]
    assert sorted(rest) == [*range(1, 10)]
    drawn = stats.true_accuracies(angle, size, 0.06 * rng.standard_normal((4000, 10)), rng.standard_normal((4000, 11)))
    assert np.quantile(drawn[:, 1:].min(1), 0.5) > np.sort(np.sin(angle) ** 2)[1]
    np.testing.assert_allclose(np.median(drawn[:, 0]), np.sin(0.4) ** 2, atol=0.005)


def test_like_runs_err_alike():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 10))
    got = stats._chances(np.stack([a, a, b]), 20_000, np.random.default_rng(1))
    np.testing.assert_allclose(got[:, 0], got[:, 1], atol=1e-3)
    alike = spearmanr(a, b).statistic
    for i, expected in enumerate([alike**2, *[alike] * 10]):
        assert kstest(got[:, 2, i], "norm").pvalue > 1e-4
        assert pearsonr(got[:, 0, i], got[:, 2, i]).statistic == pytest.approx(expected, abs=0.02)
    assert np.abs(np.corrcoef(got[:, 2].T) - np.eye(11)).max() < 0.03
    alone = stats._chances(a[None], 20_000, np.random.default_rng(1))
    np.testing.assert_allclose(alone[:, 0], got[:, 0], atol=1e-6)  # whatever it is compared with


def test_a_difference_stays_what_a_difference_can_be():
    labels = np.repeat(np.arange(3), 40)
    every, none = outcomes(labels >= 0, labels, 3), outcomes(labels < 0, labels, 3)
    got = stats.summary(every, versus=none)
    assert (got.loc[["mean", "tail", "worst", "worst_of_mean"], "value"] == 1).all()
    assert got["high"].max() <= 1
    assert (stats.summary(every, versus=every)[["low", "high"]] == 0).all(axis=None)


def test_bootstrap_of_the_mean_agrees_with_scipy():
    from scipy.stats import bootstrap

    rng, labels = np.random.default_rng(1), np.repeat([0, 1], 200)
    right = rng.random(400) < np.array([0.4, 0.7])[labels]
    row = stats.summary(outcomes(right, labels, 2), draws=4000).loc["mean"]
    theirs = bootstrap(
        (right[:200], right[200:]),
        lambda a, b, axis: (a.mean(axis) + b.mean(axis)) / 2,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert row["low"] == pytest.approx(theirs.low, abs=0.006)
    assert row["high"] == pytest.approx(theirs.high, abs=0.006)


def test_chance_to_be_the_weakest_is_that_of_two_beta_posteriors():
    """P(X < Y) of two Beta distributions by numerical integration; the third class is out of reach."""
    from scipy.integrate import quad
    from scipy.stats import beta

    labels = np.repeat([0, 1, 2], 50)
    right = np.r_[np.arange(50) < 20, np.arange(50) < 24, np.arange(50) < 49]
    x, y = beta(20.5, 30.5), beta(24.5, 26.5)
    want = quad(lambda t: x.pdf(t) * y.sf(t), 0, 1)[0]
    chance = stats.chance_weakest(outcomes(right, labels, 3))
    assert chance["0"] == pytest.approx(want, abs=0.015)
    assert chance["2"] == 0
    assert chance.sum() == pytest.approx(1)

"""Do the stated 95 % intervals hold? Simulated outcomes with known class accuracies; more in benchmarks/coverage.py."""

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks.coverage import CASES, coverage
from cfol_nb import stats


def least(simulations):
    """What 95 % of so many simulations may come to, but once in two hundred times."""
    return binom.ppf(0.005, simulations, 0.95) / simulations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "simulations"),
    [
        ("all equal, 10 of 60", 400),
        ("one a little weaker, 10 of 60", 400),
        ("one clearly weaker, 10 of 60", 400),
        ("10 to 1000 images, the rarer the weaker", 400),
        ("near zero, 10 of 100", 300),
        ("2 equal classes of 200", 400),
    ],
)
def test_intervals_hold(case, simulations):
    accuracy, n, how = CASES[case]
    held, _ = coverage(accuracy, n, **how, simulations=simulations, paired=False)
    for name in [*stats.STATISTICS, "set"]:
        assert held[name] >= least(simulations), (name, held[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "simulations"),
    [
        ("like CIFAR-10, 10 of 1000", 60),
        ("one a little weaker, versus 10 equal", 60),
        ("all equal, 10 of 1000", 60),
        ("like CIFAR-10, 10 of 300, 3 runs", 30),
    ],
)
def test_intervals_of_differences_and_of_several_runs_hold(case, simulations):
    accuracy, n, how = CASES[case]
    held, _ = coverage(accuracy, n, **how, simulations=simulations)
    kinds = [f"{kind}{name}{of}" for kind in ("", "paired ") for name in stats.STATISTICS for of in ("", ", any run")]
    for name in (kind for kind in kinds if kind in held):
        assert held[name] >= least(simulations), (name, held[name])


def test_a_plain_bootstrap_does_not_hold_where_classes_are_equal_so_the_simulation_can_tell():
    accuracy, n, how = CASES["all equal, 10 of 60"]
    held, _ = coverage(accuracy, n, **how, simulations=60, paired=False)
    assert held["bootstrap worst"] < 0.2
    assert held["bootstrap mean"] > 0.85


def test_at_the_size_of_cifar10_the_intervals_say_something():
    """A class of 1000 images has 5.1 points alone. The limits are a tenth above what is stored for this case."""
    accuracy, n, how = CASES["like CIFAR-10, 10 of 1000"]
    _, width = coverage(accuracy, n, **how, simulations=8)
    assert 0.048 < width["worst"] < 0.058
    assert width["tail"] < 0.048
    assert width["paired worst"] < 0.06
    assert width["paired tail"] < 0.055


def test_the_interval_of_a_class_holds_with_its_level():
    """Wilson's interval, exactly: the sum of binomial probabilities of the counts whose interval holds p."""
    for n in (60, 100, 1000):
        ends = np.array([stats.wilson(c, n) for c in range(n + 1)])
        shares = [
            binom.pmf(np.arange(n + 1)[(ends[:, 0] <= p) & (p <= ends[:, 1])], n, p).sum()
            for p in np.linspace(0.1, 0.9, 161)
        ]
        assert min(shares) > 0.925
        assert 0.94 < np.mean(shares) < 0.96

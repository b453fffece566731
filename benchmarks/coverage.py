"""How often do the stated 95 % intervals hold? Simulated outcomes with known class accuracies; kept for `07_report`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from cfol_nb import stats
from cfol_nb.evaluate import Outcomes
from cfol_nb.files import ROOT, write_json
from cfol_nb.runs import provenance

CIFAR = np.array([0.55, 0.70, 0.35, 0.22, 0.33, 0.38, 0.55, 0.58, 0.65, 0.60])  # like a robust CIFAR-10 model
DIGITS = np.array([0.95, 0.75, 0.88, 0.78, 0.90, 0.85, 0.93, 0.85, 0.62, 0.75])
CIFAR100 = np.random.default_rng(5).beta(2, 5, 100)
CASES = {  # class accuracies, or how they are drawn in each simulation; images per class; another model's accuracies
    "like CIFAR-10, 60 a class": (CIFAR, 60),
    "like digits, 60 a class": (DIGITS, 60),
    "like CIFAR-10, 1000 a class": (CIFAR, 1000),
    "like CIFAR-100, 100 a class": (CIFAR100, 100),
    "one weak class, 60 a class": (np.r_[0.2, np.full(9, 0.8)], 60),
    "two weak classes, 60 a class": (np.r_[0.22, 0.24, 0.45, 0.5, 0.52, 0.55, 0.6, 0.65, 0.7, 0.75], 60),
    "one strong class, 60 a class": (np.r_[np.full(9, 0.4), 0.9], 60),
    "nearly 0, 100 a class": (np.r_[0.03, 0.03, 0.04, 0.06, np.full(6, 0.5)], 100),
    "10 equal classes, 60 a class": (np.full(10, 0.5), 60),
    "10 equal classes, 1000 a class": (np.full(10, 0.5), 1000),
    "100 equal classes, 100 a class": (np.full(100, 0.5), 100),
    "5 at 40 and 5 at 70 %, 60 a class": (np.r_[np.full(5, 0.4), np.full(5, 0.7)], 60),
    "100 evenly spaced, 100 a class": (np.linspace(0.2, 0.9, 100), 100),
    "100 evenly spaced, versus one weak": (np.linspace(0.2, 0.9, 100), 100, np.r_[0.1, np.linspace(0.3, 0.9, 99)]),
    "100 crowded at the worst": (0.2 + 0.6 * np.linspace(0, 1, 100) ** 2, 100),
    "one class a little weaker, 60 a class": (np.r_[0.4, np.full(9, 0.6)], 60),
    "one class a little weaker, 1000 a class": (np.r_[0.55, np.full(9, 0.6)], 1000),
    "one weaker and rare, 50 and 500 a class": (np.r_[0.45, np.full(9, 0.6)], np.r_[50, np.full(9, 500)]),
    "one a little weaker, versus 10 equal": (np.r_[0.4, np.full(9, 0.6)], 60, np.full(10, 0.6)),
    "one weaker and rare, versus 10 equal": (
        np.r_[0.45, np.full(9, 0.6)],
        np.r_[50, np.full(9, 500)],
        np.full(10, 0.6),
    ),
    "the rarer the weaker, 300 to 10 a class": (np.linspace(0.75, 0.4, 10), np.geomspace(300, 10, 10).astype(int)),
    "drawn from Beta(5, 4), 10 of 60": (lambda rng: rng.beta(5, 4, 10), 60),
    "drawn from Beta(5, 4), 100 of 100": (lambda rng: rng.beta(5, 4, 100), 100),
    "drawn from a uniform, 10 of 60": (lambda rng: rng.uniform(0.3, 0.95, 10), 60),
    "drawn from a triangular, 100 of 100": (lambda rng: rng.triangular(0.1, 0.3, 0.95, 100), 100),
}
# `stats.summary` was chosen on these cases, at other seeds
SEED, DRAWS = 19, 1000


def simulations(case: str) -> int:
    if not case.startswith("like"):
        return 1000
    return 8000 if case.endswith("60 a class") else 4000


def outcomes(right: np.ndarray, labels: np.ndarray, k: int) -> Outcomes:
    predictions = {"clean": labels, "pgd": np.where(right, labels, (labels + 1) % k)}
    return Outcomes(labels, predictions, tuple(map(str, range(k))), {"pgd": {}})


def coverage(
    accuracies: np.ndarray | Callable,
    n: int | np.ndarray,
    versus: np.ndarray | None = None,
    *,
    simulations: int,
    seed: int = 0,
    draws: int = 500,
) -> dict[str, float]:
    """Share of simulations in which each interval holds the truth, single and paired; "class" is of the intervals of
    all classes. n: images of each class, alike or (K,). versus: the class accuracies of the model to compare with, by
    default up to 5 points better or worse."""
    rng, held = np.random.default_rng(seed), {}
    for i in range(simulations):
        accuracy = accuracies(rng) if callable(accuracies) else accuracies
        k = len(accuracy)
        labels = np.repeat(np.arange(k), n)
        other = np.clip(accuracy + 0.05 * np.cos(np.arange(k)), 0.01, 0.99) if versus is None else versus
        u = rng.random(len(labels))
        v = np.where(rng.random(len(labels)) < 0.7, u, rng.random(len(labels)))  # the same images are hard for both
        a, b = outcomes(u < accuracy[labels], labels, k), outcomes(v < other[labels], labels, k)
        own = stats.class_table(a)
        held.setdefault("class", []).append(((own["low"] <= accuracy) & (accuracy <= own["high"])).mean())
        for kind, base in (("", None), ("paired ", b)):
            table = stats.summary(a, versus=base, draws=draws, seed=seed * simulations + i)
            for name in ("mean", "tail", "worst"):
                f = stats.STATISTICS[name]
                truth = f(accuracy) - (f(other) if base else 0)
                row = table.loc[name]
                held.setdefault(kind + name, []).append(row["low"] <= truth <= row["high"])
    return {name: float(np.mean(v)) for name, v in held.items()}


def case(name: str) -> dict[str, float]:
    return coverage(*CASES[name], simulations=simulations(name), seed=SEED, draws=DRAWS)


def main() -> None:
    with ProcessPoolExecutor() as pool:
        held = dict(zip(CASES, pool.map(case, CASES), strict=True))
    found = {
        "simulations": {name: simulations(name) for name in CASES},
        "seed": SEED,
        "draws": DRAWS,
        "held": held,
        **provenance("cpu"),
    }
    write_json(ROOT / "results/statistics/coverage.json", found)
    for name, shares in held.items():
        print(f"{name:32}", ", ".join(f"{k} {100 * share:.1f}" for k, share in shares.items()))


if __name__ == "__main__":
    main()

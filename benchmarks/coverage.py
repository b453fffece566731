"""How often do the stated 95 % intervals hold, and how wide are they? Simulated outcomes with known class accuracies,
kept for `07_report` and docs/intervals.md."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from cfol_nb import stats
from cfol_nb.evaluate import Outcomes
from cfol_nb.files import ROOT, write_json
from cfol_nb.runs import provenance

CIFAR = np.array([0.55, 0.70, 0.35, 0.22, 0.33, 0.38, 0.55, 0.58, 0.65, 0.60])  # like a robust CIFAR-10 model
CFOL = np.array([0.50, 0.66, 0.33, 0.31, 0.32, 0.36, 0.48, 0.50, 0.58, 0.55])
DIGITS = np.array([0.95, 0.75, 0.88, 0.78, 0.90, 0.85, 0.93, 0.85, 0.62, 0.75])
CIFAR100 = np.random.default_rng(5).beta(2, 5, 100)
RARE = np.geomspace(1000, 10, 10).astype(int)
CASES = {  # class accuracies, or how they are drawn in each simulation; images per class; what else `coverage` takes
    "like CIFAR-10, 10 of 1000": (CIFAR, 1000, {}),
    "like CFOL, 10 of 1000": (CFOL, 1000, {}),
    "like CIFAR-10, 10 of 60": (CIFAR, 60, {}),
    "like digits, 10 of 60": (DIGITS, 60, {}),
    "like CIFAR-100, 100 of 100": (CIFAR100, 100, {}),
    "all equal, 10 of 60": (np.full(10, 0.5), 60, {}),
    "all equal, 10 of 1000": (np.full(10, 0.5), 1000, {}),
    "all equal, 100 of 100": (np.full(100, 0.5), 100, {}),
    "one a little weaker, 10 of 60": (np.r_[0.4, np.full(9, 0.6)], 60, {}),
    "one a little weaker, 10 of 1000": (np.r_[0.55, np.full(9, 0.6)], 1000, {}),
    "one a little weaker, versus 10 equal": (np.r_[0.4, np.full(9, 0.6)], 60, {"versus": np.full(10, 0.6)}),
    "one clearly weaker, 10 of 60": (np.r_[0.2, np.full(9, 0.8)], 60, {}),
    "two tied, 10 of 100": (np.r_[0.3, 0.3, np.full(8, 0.6)], 100, {}),
    "one strong, 10 of 60": (np.r_[np.full(9, 0.4), 0.9], 60, {}),
    "near zero, 10 of 100": (np.r_[0.02, 0.03, 0.04, 0.04, np.full(6, 0.5)], 100, {}),
    "10 to 1000 images, the rarer the weaker": (np.linspace(0.7, 0.4, 10), RARE, {}),
    "10 to 1000 images, the rarer the stronger": (np.linspace(0.4, 0.7, 10), RARE, {}),
    "crowded at the worst, 100 of 100": (0.2 + 0.6 * np.linspace(0, 1, 100) ** 2, 100, {}),
    "2 equal classes of 200": (np.full(2, 0.5), 200, {}),
    "2 classes of 200": (np.array([0.5, 0.6]), 200, {}),
    "1000 classes of 50": (np.random.default_rng(6).beta(3, 3, 1000), 50, {}),
    "like CIFAR-10, 10 of 300, 2 runs": (CIFAR, 300, {"runs": 2, "between": 0.04}),
    "like CIFAR-10, 10 of 300, 3 runs": (CIFAR, 300, {"runs": 3, "between": 0.04}),
    "all equal, 10 of 300, 3 like runs": (np.full(10, 0.5), 300, {"runs": 3}),
    "like CIFAR-10, 10 of 300, 5 runs": (CIFAR, 300, {"runs": 5, "between": 0.02}),
}
FRESH = {  # not looked at while the intervals were made: tried once
    "drawn from Beta(5, 4), 10 of 60": (lambda rng: rng.beta(5, 4, 10), 60, {}),
    "drawn from Beta(1, 3), 10 of 200": (lambda rng: rng.beta(1, 3, 10), 200, {}),
    "drawn from a uniform, 43 of 30": (lambda rng: rng.uniform(0.3, 0.95, 43), 30, {}),
    "drawn from a triangular, 100 of 100": (lambda rng: rng.triangular(0.1, 0.3, 0.95, 100), 100, {}),
    "two groups, drawn, 8 of 500": (lambda rng: rng.choice(rng.uniform(0.2, 0.8, 2), 8), 500, {}),
    "drawn, 4 runs, 5 of 150": (lambda rng: rng.beta(5, 4, 5), 150, {"runs": 4, "between": 0.03}),
}
SEED = 19


def outcomes(right: np.ndarray, labels: np.ndarray, k: int) -> Outcomes:
    predictions = {"clean": labels, "pgd": np.where(right, labels, (labels + 1) % k)}
    return Outcomes(labels, predictions, tuple(map(str, range(k))), {"pgd": {}})


def bootstrapped(correct: np.ndarray, n: np.ndarray, rng: np.random.Generator, draws: int = 400) -> dict[str, tuple]:
    """The plain percentile bootstrap, for comparison: low, high of each statistic."""
    drawn = rng.binomial(n, correct / n, (draws, len(n))) / n
    return {name: tuple(np.quantile(f(drawn), [0.025, 0.975])) for name, f in stats.STATISTICS.items()}


def coverage(
    accuracies: np.ndarray | Callable,
    n: int | np.ndarray,
    *,
    versus: np.ndarray | None = None,
    runs: int = 1,
    between: float = 0.0,
    simulations: int,
    seed: int = 0,
    paired: bool = True,
) -> tuple[dict[str, float], dict[str, float]]:
    """Share of simulations in which each interval holds the truth, and mean width, single and paired.

    n: images of each class, alike or (K,). versus: the class accuracies of the model to compare with, by default up to
    5 points better or worse. runs: of each; between: standard deviation of class accuracies between runs. "class" is of
    the intervals of all classes, "set" of the set of classes that may be the weakest, "bootstrap ..." of the plain
    bootstrap.
    """
    rng, held, width = np.random.default_rng(seed), {}, {}

    def note(name: str, low: float, truth: float, high: float) -> None:
        held.setdefault(name, []).append(low <= truth + 1e-12 and truth - 1e-12 <= high)
        width.setdefault(name, []).append(high - low)

    def several(accuracy: np.ndarray, size: int) -> np.ndarray:
        return np.clip(accuracy + between * rng.standard_normal((size, len(accuracy))), 0.005, 0.995)

    for _ in range(simulations):
        accuracy = accuracies(rng) if callable(accuracies) else accuracies
        k = len(accuracy)
        labels = np.repeat(np.arange(k), n)
        other = np.clip(accuracy + 0.05 * np.cos(np.arange(k)), 0.01, 0.99) if versus is None else versus
        hard, true, found = rng.random(len(labels)), [], []
        for mean in (accuracy, other):  # the same images are hard for all
            true.append(several(mean, runs))
            shown = (np.where(rng.random(len(labels)) < 0.7, hard, rng.random(len(labels))) for _ in true[-1])
            found.append([outcomes(u < a[labels], labels, k) for u, a in zip(shown, true[-1], strict=True)])
        population = [several(mean, 4000 if between else 1) for mean in (accuracy, other)]
        for kind, base in (("", None), ("paired ", found[1]))[: 1 + paired]:
            for of, truth in (("these runs", true), ("any run", population))[: 1 + (runs > 1)]:
                table = stats.summary(found[0], versus=base, of=of)
                for name, f in stats.STATISTICS.items():
                    value = f(truth[0]).mean() - (f(truth[1]).mean() if base else 0)
                    label = f"{kind}{name}{', any run' * (of == 'any run')}"
                    note(label, table.loc[name, "low"], value, table.loc[name, "high"])
        if runs == 1:
            own = stats.class_table(found[0][0])
            held.setdefault("class", []).append(((own["low"] <= accuracy) & (accuracy <= own["high"])).mean())
            may = own["may_be_weakest"].to_numpy()
            held.setdefault("set", []).append(may[accuracy == accuracy.min()].any())
            width.setdefault("set", []).append(may.sum())
            for name, (low, high) in bootstrapped(own["correct"].to_numpy(), own["n"].to_numpy(), rng).items():
                note(f"bootstrap {name}", low, stats.STATISTICS[name](accuracy), high)
    return tuple({name: float(np.mean(v)) for name, v in each.items()} for each in (held, width))


def simulations(name: str) -> int:
    accuracy, _, how = (CASES | FRESH)[name]
    k = len(accuracy(np.random.default_rng(0)) if callable(accuracy) else accuracy)
    return (300 if how.get("runs") else 600) if k < 40 else 150 if k < 500 else 40


def case(name: str) -> tuple[dict[str, float], dict[str, float]]:
    accuracy, n, how = (CASES | FRESH)[name]
    return coverage(accuracy, n, **how, simulations=simulations(name), seed=SEED)


def main() -> None:
    every, found = list(CASES | FRESH), {}
    with ProcessPoolExecutor() as pool:
        for name, each in zip(every, pool.map(case, every), strict=True):
            found[name] = held, width = each
            shown = ", ".join(f"{k} {100 * s:.1f} ({100 * width.get(k, 0):.1f})" for k, s in held.items())
            print(f"{name:32}", shown, flush=True)
    kept = {
        "simulations": {name: simulations(name) for name in every},
        "fresh": list(FRESH),
        "seed": SEED,
        "held": {name: held for name, (held, _) in found.items()},
        "width": {name: width for name, (_, width) in found.items()},
        **provenance("cpu"),
    }
    write_json(ROOT / "results/statistics/coverage.json", kept)


if __name__ == "__main__":
    main()

"""CFOL's sampler and training step, as ratios measured in one run: alternating rounds, medians, and their spread."""

from __future__ import annotations

import random
import statistics
import time

import torch
from common import keep

from cfol_nb.config import RunConfig
from cfol_nb.data import limit, load
from cfol_nb.samplers import ClassSampler, ExampleSampler
from cfol_nb.train import train

BATCH = 128


class Loop:
    """The same Exp3, one example after another in plain Python on tensors: what a direct reading of the paper gives."""

    def __init__(self, labels: torch.Tensor, gamma: float = 0.5, eta: float = 5e-6):
        self.k, self.gamma, self.eta = int(labels.max()) + 1, gamma, eta
        self.w = torch.zeros(self.k, dtype=torch.float64)
        self.of_class = [(labels == c).nonzero().squeeze(1) for c in range(self.k)]

    @property
    def p(self) -> torch.Tensor:
        return self.gamma / self.k + (1 - self.gamma) * torch.softmax(self.w, 0)

    def draw(self, n: int) -> torch.Tensor:
        out = []
        for _ in range(n):
            members = self.of_class[torch.multinomial(self.p, 1).item()]
            out.append(members[random.randrange(len(members))].item())
        return torch.tensor(out)

    def update(self, labels: torch.Tensor, wrong: torch.Tensor) -> None:
        p = self.p
        for y, loss in zip(labels, wrong, strict=True):
            self.w[y] += self.eta * loss / p[y]


def seconds(work, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def rounds(variants: dict, repeats: dict, n: int = 15) -> dict[str, list[float]]:
    """CPU seconds of each variant, round by round in turn."""
    times = {k: [] for k in variants}
    for work in variants.values():
        work()
    for _ in range(n):
        for name, work in variants.items():
            times[name].append(seconds(work, repeats[name]))
    return times


def show(name: str, times: list[float], base: list[float] | None = None) -> float:
    """Print median and range; returns the ratio of medians base / times."""
    ratio = statistics.median(base) / statistics.median(times) if base else 1.0
    spread = f"{1e6 * statistics.median(times):10.1f} us  ({1e6 * min(times):.1f} to {1e6 * max(times):.1f})"
    print(f"  {name:44}{spread}" + (f"  {ratio:8.1f} x" if base else ""))
    return ratio


def step(sampler, arm: torch.Tensor):
    """Draw a batch and tell the sampler what it suffered; arm: what `update` wants to know of each image."""
    wrong = torch.arange(BATCH) % 3 == 0

    def work() -> None:
        sampler.update(arm[sampler.draw(BATCH)], wrong)

    return work


def samplers() -> None:
    print(f"draw {BATCH} and update, CPU time of one thread")
    work = {}
    for n in (10_000, 1_000_000):
        labels = torch.arange(n) % 10
        work[f"loop, {n:,} images"] = step(Loop(labels), labels)
        work[f"ClassSampler, {n:,} images"] = step(ClassSampler(labels), labels)
        work[f"ExampleSampler, {n:,} images"] = step(ExampleSampler(n), torch.arange(n))
    repeats = {name: 2 if name.startswith("loop") else 100 for name in work}
    times = rounds(work, repeats)
    keep(f"draw {BATCH} of 10 classes and update", times)
    base = times["loop, 10,000 images"]
    ratios = {name: show(name, t, base) for name, t in times.items()}
    few, many = (statistics.median(times[f"ClassSampler, {n} images"]) for n in ("10,000", "1,000,000"))
    print(f"  ClassSampler with 100 times as many images: {many / few:.2f} x the time")
    assert ratios["ClassSampler, 10,000 images"] >= 100, "the sampler must be 100 times faster than the loop"
    assert many < 1.5 * few, "its cost must not depend on the number of images"


def steps() -> None:
    """A whole training step, CFOL against ERM, at the same batch: the training loop itself, without validation."""
    digits = load("digits")
    held = limit(digits.test, 1)

    def epochs(method: str):
        config = RunConfig(method=method, epochs=2, batch_size=BATCH, validate_every=2)
        return lambda: train(config, digits.train, held)

    print("\ntwo epochs of the small CNN on digits, float64, one thread, CPU time")
    times = rounds({m: epochs(m) for m in ("erm", "cfol")}, {"erm": 1, "cfol": 1}, 60)
    keep("two epochs of the small CNN on digits", {"ERM-AT": times["erm"], "CFOL-AT": times["cfol"]})
    show("ERM-AT", times["erm"])
    pairs = [c / e for c, e in zip(times["cfol"], times["erm"], strict=True)]
    show("CFOL-AT", times["cfol"])
    ratio = statistics.median(pairs)
    print(f"  CFOL / ERM, median of {len(pairs)} rounds: {ratio:.4f} ({min(pairs):.3f} to {max(pairs):.3f})")
    assert ratio < 1.02, "CFOL must cost at most 2 % more than ERM"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}")
    samplers()
    steps()

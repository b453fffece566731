"""Where the assumptions of CFOL's theorem hold: adversarial training of a linear classifier by perceptron steps.

With logits W x the inner maximum over an L-inf ball is closed-form, and the number of mistakes is bounded for every
sequence of examples, whatever drew it (Pethick et al., the submission of 2021, section 3.1 and appendix A).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from cfol_nb.samplers import ClassSampler, ExampleSampler


def step_size(k: int, mistakes: float) -> float:
    """eta = sqrt(log k / (4 k C)) of Theorem 1, C = max(k log k, mistakes)."""
    return float(np.sqrt(np.log(k) / (4 * k * max(k * np.log(k), mistakes))))


def bound(steps: float, k: int, mistakes: float, delta: float = 0.05, n: float = np.inf) -> float:
    """Theorem 1: with probability at least 1 - delta the mean over n uniformly drawn iterates of the loss of any of k
    classes is at most this, after `steps` of CFOL with `step_size` and gamma = 1/2. n = inf: over all iterates.

    mistakes: C', what the losses of any sequence of examples add up to at most.
    """
    c, log = max(k * np.log(k), mistakes), np.log(2 * k / delta)
    of_steps = 6 * c / steps + np.sqrt(4 * k * log / steps) + (1 + 2 * k) * log / (3 * steps)
    return float(of_steps + np.sqrt(2 * log / n) + 2 * log / (3 * n))


@dataclass(frozen=True)
class Blobs:
    """Classes that a linear classifier tells apart inside L-inf balls of radius eps: x = e_y + noise, the noise of
    class c uniform in [-noise_c, noise_c] in each of k coordinates, the last class the noisiest.

    x: (N, k) float64. y: (N,) int64. sizes: examples of each class.
    """

    x: np.ndarray
    y: np.ndarray
    eps: float

    @classmethod
    def make(cls, sizes, eps: float = 0.05, noise: tuple[float, float] = (0.05, 0.3), seed: int = 0) -> Blobs:
        """sizes: examples of each class. noise: that of the first and of the last class."""
        k, rng = len(sizes), np.random.default_rng(seed)
        y = np.repeat(np.arange(k), sizes)
        width = np.linspace(*noise, k)[y, None]
        return cls(np.eye(k)[y] + width * rng.uniform(-1, 1, (len(y), k)), y, eps)

    @property
    def k(self) -> int:
        """Number of classes, and of coordinates."""
        return self.x.shape[1]

    def worst(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least margin in the ball around each example, (N,), and the class that is nearest there, (N,):
        min over c of (w_y - w_c) x - eps |w_y - w_c|_1."""
        logits = self.x @ weights.T
        apart = np.abs(weights[:, None] - weights[None]).sum(-1)
        margin = logits[np.arange(len(self.y)), self.y, None] - logits - self.eps * apart[self.y]
        margin[np.arange(len(self.y)), self.y] = np.inf
        return margin.min(1), margin.argmin(1)

    def mistakes(self) -> float:
        """C': 2 R^2 / m^2 bounds the mistakes of the adversarial perceptron (`learn`) on any sequence of examples.

        m: the least margin of the classifier I / sqrt(k), of norm 1, in any ball; R: the largest norm in any ball. Each
        mistake adds at least m to the inner product with that classifier, and at most 2 R^2 to the squared norm.
        """
        margin = self.worst(np.eye(self.k) / np.sqrt(self.k))[0].min()
        if margin <= 0:
            raise ValueError(
                f"the classes touch: the least margin is {margin:.3g}, so that no bound on mistakes is known"
            )
        return float(2 * ((np.abs(self.x) + self.eps) ** 2).sum(1).max() / margin**2)


@dataclass(frozen=True)
class Trajectory:
    """What `learn` went through.

    times: (E,) the steps, from 1, in which a mistake was made; between two of them nothing changes. losses: (E + 1, k)
    the 0-1 loss of each class, the share of it that some perturbation moves across or onto a boundary; row i holds in
    the steps times[i - 1] + 1 to times[i].
    """

    times: np.ndarray
    losses: np.ndarray

    def settled(self, level: float) -> float:
        """Steps after which no class has a loss above `level` any more; inf if that was not reached."""
        above = np.flatnonzero(self.losses.max(1) > level)
        if not len(above):
            return 0.0
        return float(self.times[above[-1]]) if above[-1] < len(self.times) else np.inf

    def stays(self, steps: int) -> np.ndarray:
        """(E + 1,) for how many of the first steps each row holds."""
        return np.diff(np.minimum([0, *self.times, steps], steps))

    def mean_losses(self, steps: int) -> np.ndarray:
        """(k,) class losses of the uniform ensemble of the first iterates."""
        return self.stays(steps) @ self.losses / steps

    def sampled_losses(self, steps: int, n: int, seed: int = 0) -> np.ndarray:
        """(k,) class losses of n iterates, drawn uniformly from the first `steps` with replacement."""
        drawn = np.random.default_rng(seed).multinomial(n, self.stays(steps) / steps)
        return drawn @ self.losses / n


def learn(data: Blobs, sampler: ClassSampler | ExampleSampler, steps: int, seed: int = 0) -> Trajectory:
    """Perceptron steps on worst-case images, each example drawn as the sampler would draw it, one at a time.

    A step without a mistake changes neither the classifier nor, its loss being 0, the sampler. So the steps until the
    next mistake are drawn at once, from their geometric distribution, then the example from those that are mistaken;
    the law is that of drawing one by one, and the cost is one of mistakes, not of steps. After a mistake W_y grows by
    the perturbed x, and the row of the nearest class falls by it. ExampleSampler(N, gamma=1, eta=0) draws as SGD does.
    """
    if sampler.n != len(data.y):
        raise ValueError(f"a sampler of {sampler.n} examples for {len(data.y)}")
    rng, weights = np.random.default_rng(seed), np.zeros((data.k, data.k))
    size, now = np.bincount(data.y, minlength=data.k), 0
    arms = data.y if isinstance(sampler, ClassSampler) else np.arange(len(data.y))
    times, losses = [], []
    while True:
        margin, rival = data.worst(weights)
        wrong = margin <= 0
        p = sampler.p.numpy()[arms]  # of what each example is drawn through: its class, or itself
        chance = p / size[data.y] if isinstance(sampler, ClassSampler) else p
        losses.append(np.bincount(data.y[wrong], minlength=data.k) / size)
        of_wrong = chance * wrong
        if wrong.any():
            now += int(rng.geometric(min(of_wrong.sum(), 1.0)))
        if not wrong.any() or now > steps:
            return Trajectory(np.array(times, dtype=np.int64), np.array(losses))
        times.append(now)
        i = rng.choice(len(data.y), p=of_wrong / of_wrong.sum())
        a, b = data.y[i], rival[i]
        x = data.x[i] - data.eps * np.sign(weights[a] - weights[b])
        weights[a] += x
        weights[b] -= x
        sampler.update(torch.tensor([arms[i]]), torch.ones(1), p=float(p[i]))


def play(sampler: ClassSampler, losses, steps: int, seed: int = 0) -> pd.DataFrame:
    """The sampler alone, against classes that err with known probabilities `losses` (k,): one draw, one update a step.

    By step (index, from 1): regret, what the best class in hindsight would have collected beyond the sampler, in
    expectation over its draws; estimated, the same for the importance-weighted estimates and q, which is p without its
    uniform part; lemma, what `estimated` cannot exceed by Lemma 1 if eta <= gamma / k and gamma < 1, log k / eta +
    eta k / ((1 - gamma) gamma) times the losses met; variance, of the estimate of the class for which it is largest,
    max over y of losses_y / p_y - losses_y^2.
    """
    losses, k = np.asarray(losses, float), sampler.num_classes
    eta, gamma = np.float64(sampler.eta), np.float64(sampler.gamma)
    wrong = np.random.default_rng(seed).random((steps, k)) < losses
    p, drawn = np.empty((steps, k)), np.empty(steps, dtype=np.int64)
    of_index = torch.empty(sampler.n, dtype=torch.int64)
    of_index[sampler.order] = torch.repeat_interleave(torch.arange(k), sampler.count.long())
    for t in range(steps):
        p[t] = sampler.p.numpy()
        label = of_index[sampler.draw(1)]
        drawn[t] = label.item()
        sampler.update(label, torch.tensor([float(wrong[t, drawn[t]])]))
    rows = np.arange(steps)
    met = wrong[rows, drawn]
    estimates = np.zeros((steps, k))
    estimates[rows, drawn] = met / p[rows, drawn]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = (p - gamma / k) / (1 - gamma)
        lemma = np.log(k) / eta + eta * k / ((1 - gamma) * gamma) * met.cumsum()
    return pd.DataFrame(
        {
            "regret": (losses.max() - p @ losses).cumsum(),
            "estimated": estimates.cumsum(0).max(1) - (q * estimates).sum(1).cumsum(),
            "lemma": lemma,
            "variance": (losses / p - losses**2).max(1),
        },
        pd.RangeIndex(1, steps + 1, name="step"),
    )

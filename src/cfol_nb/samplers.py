"""Exp3 over classes (CFOL) and over examples (FOL), batched and on the device; no model, no loss.

Both are `torch.utils.data.Sampler`s, so they work alone in any `DataLoader` loop, and `nn.Module`s, so that
`.to(device)` moves their state and `state_dict()` saves it, the random generator included.

Neither `draw` nor `update` loops over examples or waits for the device. The 0-1 losses given to `update` belong to the
oldest draws not yet accounted for: each is divided by the probability that held *when it was drawn*, also when a
`DataLoader` iterates ahead of the training loop.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler


class LargeStep(UserWarning):
    """A sampler's eta is so large that a single batch may turn its distribution around."""


def _count(name: str, n) -> int:
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1:
        raise ValueError(f"{name}={n!r} is not a whole number of at least 1")
    return int(n)


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class _Stateful(nn.Module, Sampler):
    """Indices 0..n-1 from a generator that `state_dict()` carries."""

    def __init__(self, n: int, seed: int, device):
        super().__init__()
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed={seed!r} is not a whole number of 64 bits")
        self.n, seed = n, int(seed)
        self.generator = torch.Generator(device or "cpu").manual_seed(seed)

    def __len__(self) -> int:
        return self.n

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def get_extra_state(self) -> dict:
        return {"generator": self.generator.get_state()}

    def set_extra_state(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device = next(self.buffers()).device
        if device != self.generator.device:  # a generator cannot move; start one there from the same seed
            self.generator = torch.Generator(device).manual_seed(self.generator.initial_seed())
        return self


class Shuffle(_Stateful):
    """Passes over 0..n-1 in random order, without replacement, in full batches (the rest of a pass is skipped)."""

    def __init__(self, n: int, seed: int = 0, device=None):
        super().__init__(n, seed, device)
        self.register_buffer("order", torch.arange(n, device=device))
        self.next = n

    def draw(self, n: int) -> Tensor:
        """(n,) int64: the next indices of the pass. Raises ValueError for more than there are."""
        if _count("n", n) > self.n:
            raise ValueError(f"a batch of {n} is larger than the {self.n} images there are")
        if self.next + n > self.n:
            self.order = torch.randperm(self.n, generator=self.generator, device=self.order.device)
            self.next = 0
        self.next += n
        return self.order[self.next - n : self.next]

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.n, generator=self.generator, device=self.order.device).tolist()

    def get_extra_state(self) -> dict:
        return {**super().get_extra_state(), "next": self.next}

    def set_extra_state(self, state: dict) -> None:
        super().set_extra_state(state)
        self.next = state["next"]


class _Exp3(_Stateful):
    """What the two samplers share: parameters, and the account of draws whose loss is still to come."""

    _finds = False  # whether `_recall` looks up each arm, which fails for one that there is not

    def __init__(self, n: int, arms: int, gamma: float, eta: float, seed: int, device, block: int):
        super().__init__(n, seed, device)
        if not _is_number(gamma) or not 0 <= gamma <= 1:
            raise ValueError(f"gamma={gamma!r} is not in [0, 1]: it is the share of uniform draws")
        if not _is_number(eta) or not 0 <= eta < float("inf"):
            raise ValueError(f"eta={eta!r} is not a finite number >= 0")
        self.gamma, self.eta, self.block = gamma, eta, _count("block", block)
        self.arms, self._warned = arms, False
        self._drawn: deque[list] = deque()  # [losses seen, draws, what recalls their probability] of each block

    def draw(self, n: int) -> Tensor:
        """(n,) int64 indices from the current distribution, with replacement.

        `update` for them comes before the next `draw`; to draw further ahead, iterate, or give `update` their p.
        """
        self._weigh(_count("n", n))
        self._drawn.clear()
        return self._draw(n)

    def __iter__(self) -> Iterator[int]:
        """As many indices as there are examples, drawn `block` at a time from the then current distribution."""
        self._weigh(min(self.block, self.n))
        self._drawn.clear()
        for start in range(0, self.n, self.block):
            yield from self._draw(min(self.block, self.n - start)).tolist()

    def largest_eta(self, n: int) -> float:
        """The largest eta with which a batch of n should move no log-weight by more than about 1.

        Summed over the batch, loss / p has a mean of at most n and a variance of at most n / p, averaged over q of at
        most n K / max(gamma, 1 - gamma), as p is at least gamma / K and at least (1 - gamma) q. So eta times the mean
        and two standard deviations, n + 2 sqrt(n K / max(gamma, 1 - gamma)), shall not be above 1. For ten classes and
        gamma = 1/2: 0.0074 with batches of 64, 0.0044 with 128. (Notebook 04 has batches of 64: 0.004 is borne there,
        0.008 costs the mean 10 points.)
        """
        return 1 / (n + 2 * math.sqrt(n * self.arms / max(self.gamma, 1 - self.gamma)))

    def _weigh(self, n: int) -> None:
        """Warn, once, if eta is too large for batches of n."""
        if not self._warned and self.gamma < 1 and self.eta > (most := self.largest_eta(n)):
            self._warned = True
            warnings.warn(
                LargeStep(
                    f"eta={self.eta:.2g} is above {most:.2g}: a batch of {n} may turn the distribution over "
                    f"{self.arms} around; take less (a drift of 40 needs a longer run)"
                ),
                stacklevel=3,
            )

    def _probability(self, arm: Tensor) -> Tensor:
        """(n,) float64: the probability with which the n oldest open draws fell on `arm`."""
        if self._drawn and self._drawn[0][:2] == [0, len(arm)]:  # a whole block, as usual
            found = self._recall(self._drawn[0][2], arm, 0)
            self._drawn.popleft()
            return found
        parts, start = [], 0
        while start < len(arm) and self._drawn:
            drawn = self._drawn[0]
            take = min(len(arm) - start, drawn[1] - drawn[0])
            part = arm if take == len(arm) else arm[start : start + take]
            parts.append(self._recall(drawn[2], part, drawn[0]))
            start += take
            drawn[0] += take
            if drawn[0] == drawn[1]:
                self._drawn.popleft()
        if start < len(arm):  # not drawn here: the current distribution
            parts.append(self._current(arm[start:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def update(self, arm: Tensor, wrong: Tensor, p: Tensor | float | None = None) -> None:
        """w[arm] += eta * wrong / p, summed over the batch (Algorithm 1, lines 4-5 of the CFOL submission).

        arm: (n,) int64, the label (`ClassSampler`) or index (`ExampleSampler`) of each example.
        wrong: (n,) in [0, 1], the 0-1 loss of the adversarial prediction, at the parameters before the step.
        p: (n,) or a number in (0, 1], the probability that the example was drawn with; by default that of the n oldest
        draws that are still open, so leave none out and keep their order, or give p.
        ValueError for what is out of range, before anything is changed. On a GPU that would be to wait for it: there
        its own assertion fails a moment later, as PyTorch's do for an index out of range; bools need no such look.
        """
        arm, wrong = (v if torch.is_tensor(v) else torch.as_tensor(v) for v in (arm, wrong))
        if arm.ndim != 1 or arm.shape != wrong.shape:
            shapes = f"examples of shape {tuple(arm.shape)} and losses of shape {tuple(wrong.shape)}"
            raise ValueError(f"{shapes}: one loss per example is needed")
        if arm.dtype != torch.int64:
            if arm.is_floating_point() or arm.is_complex():
                raise ValueError(f"examples of type {arm.dtype}: integers are needed")
            arm = arm.long()
        arm, wrong = arm.to(self.device), wrong.detach().to(self.device)
        if p is not None or not self._finds or not self._drawn or self._drawn[0][:2] != [0, len(arm)]:
            _inside(arm, 0, self.arms - 1, "labels or indices")
        if wrong.dtype != torch.bool:
            _inside(wrong, 0, 1, "losses")
        if p is None:
            try:
                p = self._probability(arm)
            except IndexError:
                _inside(arm, 0, self.arms - 1, "labels or indices")
                raise
            return self._add(arm, wrong / p)
        p = torch.as_tensor(p, device=self.device)
        if p.ndim and p.shape != arm.shape:
            raise ValueError(f"p of shape {tuple(p.shape)} for {len(arm)} examples: one number, or one per example")
        _inside(p.double(), 5e-324, 1, "probabilities")  # the smallest positive number
        self._weigh(len(arm))
        return self._add(arm, wrong.double() / p)


def _inside(values: Tensor, low: float, high: float, what: str) -> None:
    """ValueError unless all of them lie in [low, high]; on a GPU, for which nothing waits, its own assertion."""
    fine = (values.clamp(low, high) == values).all()  # no number stays none, and is then not equal to itself
    try:
        torch._assert_async(fine, f"{what} are out of range in the update of a sampler")
    except RuntimeError:  # on a CPU at once
        least, most = (v.item() for v in values.aminmax())
        said = f"{what} reach from {least:g} to {most:g}: they must lie in [{low:g}, {high:g}]"
        raise ValueError(said) from None


NAMES = ("uniform", "empirical")  # of distributions over classes


def _relative(name: str, given: str | Sequence[float], count: Tensor) -> Tensor:
    """(K,) float64 with mean 1, in proportion to a distribution over classes."""
    if isinstance(given, str):
        if given not in NAMES:
            raise ValueError(f"{name}={given!r} is not 'uniform', 'empirical', or one positive number per class")
        return torch.ones(len(count), dtype=torch.float64) if given == "uniform" else count / count.double().mean()
    try:
        share = torch.as_tensor(given, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        share = torch.empty(0)
    if share.shape != count.shape or not (share.isfinite() & (share > 0)).all():
        raise ValueError(f"{name}={given} is not one positive number for each of {len(count)} classes")
    return share / share.mean()


class ClassSampler(_Exp3):
    """CFOL: draw a class from p = gamma / K + (1 - gamma) softmax(w), then an example of it uniformly.

    labels: (N,) integers in 0..K-1, every class present. gamma: mixing in [0, 1]. eta: step size *per example*; what
    carries over between sizes is eta times the examples seen in the whole run (the drift). num_classes: K, by default
    the largest label + 1. block: how many indices iterating draws at a time (your batch size is best).
    base: what gamma mixes with, in place of 1 / K; prior: softmax(w) before the first update; each is "uniform",
    "empirical" (the shares of the classes in labels), or K positive numbers in proportion.
    Raises ValueError for a label out of range, an empty class, and any argument that is none of these. Warns once, at a
    draw, if eta is above `largest_eta`.

    Pethick, Chrysos, Cevher (TMLR 2023), Algorithm 1 of the submission; w has the sign plus, a class with loss gains.
    """

    _finds = True

    def __init__(
        self,
        labels,
        gamma: float = 0.5,
        eta: float = 5e-6,
        num_classes: int | None = None,
        seed: int = 0,
        device=None,
        block: int = 128,
        base: str | Sequence[float] = "uniform",
        prior: str | Sequence[float] = "uniform",
    ):
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"labels of shape {tuple(labels.shape)}: a non-empty vector is needed")
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels of type {labels.dtype}: integers are needed")
        labels = labels.to("cpu", torch.int64)
        k = int(labels.max()) + 1 if num_classes is None else _count("num_classes", num_classes)
        if int(labels.min()) < 0 or int(labels.max()) >= k:
            raise ValueError(f"label {int(labels.min() if labels.min() < 0 else labels.max())} is not in 0..{k - 1}")
        count = torch.bincount(labels, minlength=k)
        if not count.all():
            raise ValueError(f"class {int((count == 0).nonzero()[0])} has no examples: nothing could be drawn from it")
        super().__init__(len(labels), k, gamma, eta, seed, device, block)
        self.num_classes = k
        base, prior = (_relative(name, given, count).to(device) for name, given in (("base", base), ("prior", prior)))
        self.register_buffer("mix", gamma / k * base, persistent=False)
        self.register_buffer("prior", prior.log(), persistent=False)
        self.register_buffer("w", prior.log())
        self.register_buffer("count", count.to(device, torch.float64))
        self.register_buffer("start", (count.cumsum(0) - count).to(device))
        self.register_buffer("order", labels.argsort(stable=True).to(device))
        self.register_buffer("classes", torch.arange(k, device=device).unsqueeze(1), persistent=False)

    @property
    def p(self) -> Tensor:
        """(K,) float64: the distribution that the next draw uses."""
        return torch.add(self._buffers["mix"], self.q, alpha=1 - self.gamma)

    @property
    def q(self) -> Tensor:
        """(K,) float64: softmax(w), what the losses say."""
        return torch.softmax(self._buffers["w"], 0)

    def _current(self, arm: Tensor) -> Tensor:
        return self.p.index_select(0, arm)

    @staticmethod
    def _recall(p: Tensor, arm: Tensor, start: int) -> Tensor:
        return p.index_select(0, arm)

    def _draw(self, n: int) -> Tensor:
        p, state = self.p, self._buffers  # by attribute each would cost half a microsecond
        self._drawn.append([0, n, p])
        u = torch.rand(2, n, dtype=torch.float64, generator=self.generator, device=p.device)
        of_class, of_example = u.unbind()
        y = torch.searchsorted(p[:-1].cumsum(0), of_class, right=True)
        inside = of_example.mul_(state["count"].index_select(0, y)).long()  # u < 1, so this stays below the count
        return state["order"].index_select(0, inside.add_(state["start"].index_select(0, y)))

    def _add(self, arm: Tensor, gain: Tensor) -> None:
        w = self._buffers["w"]
        if w.is_cuda:  # where index_add_ adds in no fixed order
            w.add_((arm == self.classes).to(w) @ gain, alpha=self.eta)
        else:
            w.index_add_(0, arm, gain, alpha=self.eta)


class ExampleSampler(_Exp3):
    """FOL: Exp3 over the N examples, p_i = gamma / N + (1 - gamma) exp(w_i) / sum_j exp(w_j).

    size: N, or anything that has a length (the labels). The weights lie in a binary tree of log-sums, so that a batch
    of n costs O(n log N) to draw and to update, whatever N is. `update` takes the indices that were drawn. ValueError
    for any argument out of range; warns once, at a draw, if eta is above `largest_eta`.

    Shalev-Shwartz and Wexler (2016), in the form that the CFOL submission compares with.
    """

    def __init__(self, size, gamma: float = 0.5, eta: float = 5e-7, seed: int = 0, device=None, block: int = 128):
        n = len(size) if hasattr(size, "__len__") else size
        if not n:
            raise ValueError("no examples: nothing could be drawn")
        n = _count("size", n)
        super().__init__(n, n, gamma, eta, seed, device, block)
        self.depth = (n - 1).bit_length()
        leaves = torch.full((1 << self.depth,), -torch.inf, dtype=torch.float64)
        leaves[:n] = 0
        levels = [leaves]
        while len(levels[0]) > 1:
            levels.insert(0, torch.logaddexp(levels[0][0::2], levels[0][1::2]))
        # heap order: node i has the children 2i and 2i + 1, the root is 1, leaf j is 2^depth + j
        self.register_buffer("tree", torch.cat([torch.full((1,), -torch.inf, dtype=torch.float64), *levels]).to(device))

    @property
    def w(self) -> Tensor:
        """(N,) float64 log-weights."""
        return self.tree[1 << self.depth :][: self.n]

    @property
    def p(self) -> Tensor:
        """(N,) float64: the distribution that the next draw uses."""
        return self._current(slice(None))

    def _current(self, arm) -> Tensor:
        return self.gamma / self.n + (1 - self.gamma) * (self.w[arm] - self.tree[1]).exp()

    @staticmethod
    def _recall(p: Tensor, arm: Tensor, start: int) -> Tensor:
        return p[start : start + len(arm)]

    def _draw(self, n: int) -> Tensor:
        device = self.tree.device
        u = torch.rand(self.depth + 2, n, dtype=torch.float64, generator=self.generator, device=device)
        node = torch.ones(n, dtype=torch.int64, device=device)
        for level in range(self.depth):
            left = 2 * node
            node = left + (u[level] >= (self.tree[left] - self.tree[node]).exp())
        weighted = node - (1 << self.depth)
        index = torch.where(u[-1] < self.gamma, (u[-2] * self.n).long(), weighted)
        self._drawn.append([0, n, self._current(index)])
        return index

    def _add(self, arm: Tensor, gain: Tensor) -> None:
        node = arm + (1 << self.depth)
        if self.tree.is_cuda:  # where index_add_ adds in no fixed order
            self.tree.index_put_((node,), self.eta * gain, accumulate=True)
        else:
            self.tree.index_add_(0, node, gain, alpha=self.eta)
        for _ in range(self.depth):
            node = node >> 1  # twice in a batch: twice the same value
            self.tree[node] = torch.logaddexp(self.tree[2 * node], self.tree[2 * node + 1])

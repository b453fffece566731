"""Long-tail recognition, for classes that are rare or, on balanced data, hard (Benz et al. 2021, question c).

On balanced data a technique that only knows how many images a class has is plain training. So each takes `counts`:
"images", as in the literature, or "difficulty", a pseudo-count in whose sense the weak classes are the tail.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cfol_nb.config import choose
from cfol_nb.methods import Method, register
from cfol_nb.samplers import ClassSampler

FLOOR, SMOOTH = (
    0.05,
    0.8,
)  # of the pseudo-count: least accuracy that counts, and share that a look leaves of the old one


class LongTail(Method):
    """What the techniques share: n (K,), how many images a class has or, for "difficulty", seems to have.

    Pseudo-count: the N training images, shared out in proportion to the accuracies of the classes (at least FLOOR)
    under attack on the held-out part, as a moving average over the looks (SMOOTH); equal before the first look.
    judged: "robust", or "clean" for standard training.
    """

    def __init__(self, *run, counts: str = "difficulty", judged: str = "robust", **named):
        super().__init__(*run, **named)
        self.counts = choose("counts", counts, ("images", "difficulty"))
        self.judged = choose("accuracy", judged, ("robust", "clean"))
        images = torch.bincount(self.run[0], minlength=self.num_classes).double()
        self.register_buffer("n", images if counts == "images" else images.mean().expand_as(images).clone())

    def after_epoch(self, epoch: int, report: dict[str, Tensor]) -> None:
        if self.counts == "difficulty":
            accuracy = report[self.judged].to(self.n).clamp_min(FLOOR)
            self.n.lerp_(self.n.sum() * accuracy / accuracy.sum(), 1 - SMOOTH)

    def trace(self) -> dict[str, Tensor]:
        return {"n": self.n}


def _share(value: float, what: str) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{what}={value} is not in [0, 1]")
    return value


@register("class-balanced")
class ClassBalanced(LongTail):
    """Loss weighted by the inverse effective number, (1 - beta) / (1 - beta^n_c), mean 1 (Cui et al. 2019).

    start: share of the run before which the weights are 1; 0.8 is deferred re-weighting, DRW (Cao et al. 2019).
    """

    def __init__(self, *run, beta: float = 0.9999, start: float = 0.0, **named):
        super().__init__(*run, **named)
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} is not in [0, 1)")
        self.beta, self.first = beta, _share(start, "start") * self.run[3]
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def weights(self) -> Tensor:
        """(K,) of the next step."""
        inverse = (1 - self.beta) / (1 - self.beta**self.n)
        return torch.where(self.seen >= self.first, inverse / inverse.mean(), 1.0)

    def reduce(self, losses: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        return (self.weights()[y].to(losses) * losses).mean()

    def after_step(self, index: Tensor, y: Tensor, logits: Tensor) -> None:
        self.seen += len(y)


@register("ldam")
class LDAM(ClassBalanced):
    """CE(scale (z - m_y e_y), y), m_c ~ n_c^(-1/4), the largest is `margin` (Cao et al. 2019); LDAM-DRW: start=0.8."""

    def __init__(self, *run, margin: float = 0.5, scale: float = 1.0, start: float = 1.0, **named):
        super().__init__(*run, start=start, **named)
        self.margin, self.scale = margin, scale

    def adjust(self, logits: Tensor, y: Tensor) -> Tensor:
        m = self.n**-0.25
        m = (self.margin * m / m.max()).to(logits)
        return self.scale * (logits - m[y].unsqueeze(1) * F.one_hot(y, self.num_classes))


@register("balanced-softmax")
class BalancedSoftmax(LongTail):
    """CE(z + tau log n_c, y) (Ren et al. 2020; in AT, Yue et al. 2024), which is logit adjustment in the loss (Menon et
    al. 2021)."""

    def __init__(self, *run, tau: float = 1.0, **named):
        super().__init__(*run, **named)
        self.tau = tau

    def adjust(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits + self.tau * (self.n / self.n.sum()).log().to(logits)


@register("cdt")
class CDT(LongTail):
    """CE of z_c / a_c with temperatures a_c = (n_max / n_c)^tau (Ye et al. 2020)."""

    def __init__(self, *run, tau: float = 0.3, **named):
        super().__init__(*run, **named)
        self.tau = tau

    def adjust(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits * ((self.n / self.n.max()) ** self.tau).to(logits)


@register("resampling")
class Resampling(LongTail):
    """Draw a class with probability ~ N_c n_c^(power - 1), then an image of it: power 0 is class-aware, 0.5 square-root
    sampling (Kang et al. 2020)."""

    def __init__(self, *run, power: float = 0.0, **named):
        super().__init__(*run, **named)
        self.power = _share(power, "power")
        self.sampler = ClassSampler(self.run[0], 0.0, 0.0, self.num_classes, self.run[2])
        self._set()

    def _set(self) -> None:
        weight = self.sampler.count.double() * self.n ** (self.power - 1)
        self.sampler.w.copy_((weight / weight.sum()).log())

    def after_epoch(self, epoch: int, report: dict[str, Tensor]) -> None:
        super().after_epoch(epoch, report)
        self._set()


@register("focal")
class Focal(Method):
    """(1 - p_y)^gamma times the loss, p_y from the logits that are judged (Lin et al. 2017, softmax form)."""

    def __init__(self, *run, gamma: float = 1.0, **named):
        super().__init__(*run, **named)
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma={gamma} is not a finite number >= 0")
        self.gamma = gamma

    def reduce(self, losses: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        p = logits.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1).to(losses)
        return ((1 - p) ** self.gamma * losses).mean()


@register("fixed-weights")
class FixedWeights(Method):
    """Loss weighted by class, 1 if not given; weights: label -> number >= 0, {"3": 10} (Benz et al. 2021, Table 1)."""

    def __init__(self, *run, weights: Mapping[str, float] | None = None, **named):
        super().__init__(*run, **named)
        self.register_buffer("weights", torch.ones(self.num_classes, dtype=torch.float64))
        for label, weight in (weights or {}).items():
            if not str(label).isdigit() or not int(label) < self.num_classes or not 0 <= weight < float("inf"):
                raise ValueError(
                    f"weight {label}: {weight}: a label below {self.num_classes} and a number >= 0 are needed"
                )
            self.weights[int(label)] = weight

    def reduce(self, losses: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        return (self.weights[y].to(losses) * losses).mean()


@register("fair-weights")
class FairWeights(FixedWeights):
    """After each epoch the weight of a class grows by alpha if its accuracy is at most the overall one, else it falls
    by alpha, never below 0 (Benz et al. 2021, equation 1, which would go negative).

    judged: "robust" or "clean" accuracy; split: "held", or "train" for the accuracy that the epoch's own steps met,
    under the training attack. The paper leaves both open.
    """

    def __init__(self, *run, alpha: float = 0.05, judged: str = "robust", split: str = "held", **named):
        super().__init__(*run, **named)
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha={alpha} is not a finite number > 0")
        self.alpha = alpha
        self.judged = choose("accuracy", judged, ("robust", "clean"))
        self.split = choose("split", split, ("held", "train"))
        for name in ("right", "drawn"):
            self.register_buffer(name, torch.zeros(self.num_classes, dtype=torch.float64))

    def after_step(self, index: Tensor, y: Tensor, logits: Tensor) -> None:
        self.right.index_add_(0, y, (logits.argmax(1) == y).to(self.right))
        self.drawn.index_add_(0, y, torch.ones_like(y, dtype=self.drawn.dtype))

    def after_epoch(self, epoch: int, report: dict[str, Tensor]) -> None:
        accuracy = (
            self.right / self.drawn.clamp_min(1) if self.split == "train" else report[self.judged].to(self.weights)
        )
        overall = self.right.sum() / self.drawn.sum() if self.split == "train" else accuracy.mean()
        self.weights.add_(torch.where(accuracy <= overall, self.alpha, -self.alpha)).clamp_min_(0)
        self.right.zero_()
        self.drawn.zero_()

    def trace(self) -> dict[str, Tensor]:
        return {"weights": self.weights}

"""Long-tail recognition, for classes that are rare or, on balanced data, hard (Benz et al. 2021, question c).

On balanced data a technique that only knows how many images a class has is plain training. So each takes `counts`:
"images", as in the literature, or "difficulty", a pseudo-count in whose sense the weak classes are the tail.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cfol_nb.config import choose
from cfol_nb.methods import Batch, Method, not_negative, register
from cfol_nb.models import Cosine, last_linear
from cfol_nb.samplers import ClassSampler

# of the pseudo-count: the least accuracy that counts, and the share of the old one that a look leaves
FLOOR, SMOOTH = 0.05, 0.8


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
        return {"n_c": self.n}


def _share(value: float, what: str) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{what}={value} is not in [0, 1]")
    return value


def _less(logits: Tensor, y: Tensor, m: Tensor) -> Tensor:
    """The logits with that of the own class y lowered by m_y."""
    return logits.scatter_add(1, y.unsqueeze(1), -m.to(logits)[y].unsqueeze(1))


def _weighted(losses: Tensor, weight: Tensor) -> Tensor:
    """The mean of the losses (n,), divided by the weights (n,) as torch's `cross_entropy(weight=...)` divides: else the
    weights would change the size of the step, too."""
    weight = weight.to(losses)
    return (weight * losses).sum() / weight.sum().clamp_min(torch.finfo(losses.dtype).tiny)


@register("class-balanced")
class ClassBalanced(LongTail):
    """Loss weighted by the inverse effective number, (1 - beta) / (1 - beta^n_c) (Cui et al. 2019).

    start: share of the run before which the weights are equal; 0.8 is deferred re-weighting, DRW (Cao et al. 2019).
    """

    def __init__(self, *run, beta: float = 0.9999, start: float = 0.0, **named):
        super().__init__(*run, **named)
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} is not in [0, 1)")
        self.beta, self.first = beta, _share(start, "start") * self.run[3]
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def weights(self) -> Tensor:
        """(K,) of the next step."""
        return torch.where(self.seen >= self.first, (1 - self.beta) / (1 - self.beta**self.n), 1.0)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        return _weighted(losses, self.weights()[batch.y])

    def after_step(self, batch: Batch) -> None:
        self.seen += len(batch.y)


@register("ldam")
class LDAM(ClassBalanced):
    """CE(scale (z - m_y e_y), y), m_c ~ n_c^(-1/4), the largest is `margin` (Cao et al. 2019); LDAM-DRW: start=0.8.

    Two forms: that of Wu et al. (2021), scale 1 on a linear classifier, is the default; Cao et al.'s is scale=30 for a
    model with head="normalised", whose logits are cosines. The attack sees the logits without scale and margin.
    """

    def __init__(self, *run, margin: float = 0.5, scale: float = 1.0, start: float = 1.0, **named):
        super().__init__(*run, start=start, **named)
        self.margin, self.scale = margin, scale

    def adjust(self, logits: Tensor, y: Tensor) -> Tensor:
        m = self.n**-0.25
        m = self.margin * m / m.max()
        return self.scale * _less(logits, y, m)


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


@register("robal")
class RoBal(LongTail):
    """CE(s (cos - m_y e_y) + tau_b log pi, y), m_c = tau_m log(n_c / n_min) / s + m, pi_c = n_c / N (Wu et al. 2021).

    RoBal whole is this with the objective {"name": "at", "beta": 6.0} and a model with head="robal": the attack is on
    the cross-entropy of the cosines, the margins are on the adversarial images, and KL(clean || adversarial) is of the
    cosines, too. With head="cosine", whose logits are s cos, attack and KL see these. The authors' attack starts in the
    positive half of the ball. s is SCALE.
    """

    SCALE = 10.0

    def __init__(self, *run, tau_b: float = 1.5, tau_m: float = 0.3, margin: float = 0.1, **named):
        super().__init__(*run, **named)
        self.tau_b, self.tau_m, self.margin, self.factor = tau_b, tau_m, margin, 1.0

    def start(self, model: nn.Module) -> None:
        if not isinstance(head := last_linear(model), Cosine):
            raise ValueError("robal needs a cosine classifier: give the model head='robal' or head='cosine'")
        self.factor = self.SCALE / head.scale

    def adjust(self, logits: Tensor, y: Tensor) -> Tensor:
        m = self.tau_m * (self.n / self.n.min()).log() + self.SCALE * self.margin
        return _less(self.factor * logits, y, m) + self.tau_b * (self.n / self.n.sum()).log().to(logits)


class _SecondStage(Resampling):
    """Only the classifier learns, from class-aware draws; the features stay those of the run's parent.

    statistics: "frozen", the network stays in eval mode: batch norm, and so every feature, is as in the parent; or
    "moving", as in Kang et al.'s loop: batch norm uses the batch's own statistics and goes on averaging them.
    """

    needs_parent = True

    def __init__(self, *run, statistics: str = "frozen", **named):
        super().__init__(*run, **named)
        self.frozen = choose("statistics", statistics, ("frozen", "moving")) == "frozen"

    def start(self, model: nn.Module) -> None:
        model.train(not self.frozen)
        model.requires_grad_(False)
        for p in last_linear(model).parameters():
            p.requires_grad_(True)


@register("crt")
class CRT(_SecondStage):
    """Classifier re-training (Kang et al. 2020): the last layer of the run's `parent`, begun anew unless `keep`."""

    def __init__(self, *run, keep: bool = False, **named):
        super().__init__(*run, **named)
        self.keep = keep
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def start(self, model: nn.Module) -> None:
        super().start(model)
        if not self.keep and not self.begun:
            last_linear(model).reset_parameters()
        self.begun.fill_(True)


@register("lws")
class LWS(_SecondStage):
    """Learnable weight scaling (Kang et al. 2020): one factor per class on the logits of the parent, f_c (w_c x + b_c).

    Weights and bias of the last layer move along their values at the start alone, by the gradient of the factor: for
    SGD, with momentum and weight decay, this is the same as learning the factors.
    """

    first: list[Tensor] | None = None

    def __init__(self, *run, **named):
        super().__init__(*run, **named)
        if (optimizer := self.context.optimizer) not in ("", "sgd"):
            raise ValueError(f"'lws' learns its factors by the rule of SGD: optimizer={optimizer!r} is not allowed")

    def start(self, model: nn.Module) -> None:
        super().start(model)
        if isinstance(head := last_linear(model), Cosine):
            raise ValueError("a cosine classifier undoes what lws learns, the length of its weights: head='linear'")
        own = list(head.parameters())
        self.first = [f.to(p) for f, p in zip(self.first or [p.detach().clone() for p in own], own, strict=True)]

        def project(_: Tensor) -> None:
            if any(p.grad is None for p in own):
                return  # the other one's gradient is still to come
            each = [(p.grad * f).view(len(f), -1).sum(1) for p, f in zip(own, self.first, strict=True)]
            for p, f in zip(own, self.first, strict=True):
                p.grad.copy_(sum(each).view(-1, *[1] * (f.ndim - 1)) * f)

        for p in own:
            p.register_post_accumulate_grad_hook(project)

    def get_extra_state(self) -> dict:
        return {"first": self.first}

    def set_extra_state(self, state: dict) -> None:
        self.first = state["first"]


# -- after training ----------------------------------------------------------------------------------------------------


def tau_normalised(model: nn.Module, tau: float = 1.0, keep_bias: bool = False) -> nn.Module:
    """A copy whose class weights are w_c / |w_c|^tau, without bias (Kang et al. 2020); keep_bias with tau 1 is HWNwB
    (ICLR 2026 submission 14772). It changes the scale of the logits, so judge it by AutoAttack, not by PGD."""
    model = copy.deepcopy(model)
    head = last_linear(model)
    with torch.no_grad():
        head.weight /= head.weight.norm(dim=1, keepdim=True) ** tau
        if head.bias is not None and not keep_bias:
            head.bias.zero_()
    return model


class LogitAdjusted(nn.Module):
    """Predicts argmax z_c - tau log pi_c (post-hoc logit adjustment, Menon et al. 2021); n: (K,) counts, pi = n / N."""

    def __init__(self, model: nn.Module, n: Tensor, tau: float = 1.0):
        super().__init__()
        self.model = model
        self.register_buffer("shift", tau * (n / n.sum()).log())

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits - self.shift.to(logits)


# -- weights on the loss -----------------------------------------------------------------------------------------------


@register("focal")
class Focal(Method):
    """(1 - p_y)^gamma times the loss, p_y from the logits that are judged (Lin et al. 2017, softmax form)."""

    def __init__(self, *run, gamma: float = 1.0, **named):
        super().__init__(*run, **named)
        not_negative(gamma=gamma)
        self.gamma = gamma

    def weigh(self, batch: Batch) -> Tensor:
        p = batch.logits.softmax(1).gather(1, batch.y.unsqueeze(1)).squeeze(1)
        return (1 - p).clamp_min(torch.finfo(p.dtype).eps) ** self.gamma


@register("fixed-weights")
class FixedWeights(Method):
    """Loss weighted by class, 1 if not given; weights: label -> number >= 0, {"3": 10} (Benz et al. 2021, Table 1).

    A label is the position of a class among those that are trained.
    """

    def __init__(self, *run, weights: Mapping[str, float] | None = None, **named):
        super().__init__(*run, **named)
        self.register_buffer("weights", torch.ones(self.num_classes, dtype=torch.float64))
        for label, weight in (weights or {}).items():
            if not str(label).isdigit() or not int(label) < self.num_classes or not 0 <= weight < float("inf"):
                raise ValueError(
                    f"weight {label}: {weight}: a label below {self.num_classes} and a number >= 0 are needed"
                )
            self.weights[int(label)] = weight

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        return _weighted(losses, self.weights[batch.y])


@register("fair-weights")
class FairWeights(FixedWeights):
    """After each epoch the weight of a class grows by alpha if its accuracy is at most the overall one, else it falls
    by alpha, never below 0 (Benz et al. 2021, equation 1, which would go negative).

    judged: "robust" or "clean" accuracy on the held-out split, overall being the mean over classes; split: "held", or
    "train" for the accuracy that the epoch's own steps met, under the training attack. The paper leaves both open.
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

    def after_step(self, batch: Batch) -> None:
        y = batch.y
        self.right.index_add_(0, y, (batch.logits.argmax(1) == y).to(self.right))
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

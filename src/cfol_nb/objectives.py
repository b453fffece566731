"""What is minimised: one loss per example, and how the training attack makes its images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfol_nb.attacks import kl
from cfol_nb.config import choose


def as_is(logits: Tensor, y: Tensor) -> Tensor:
    """The logits, unchanged: what a method adjusts that adjusts none."""
    return logits


class Objective:
    """What the objectives share. A subclass with `needs_teacher` is called with one more argument, teacher: two logits
    (n, K) of the clean images, those for the adversarial image and those for the clean one.

    attack_loss: see `attacks.LOSSES`; "teacher": "kl" from the first of the teacher's logits; None: no attack.
    random_start: of the attack, see `attacks.pgd`. asks: what else it wants of the batch, as of a method.
    """

    attack_loss: str | None = None
    random_start = True
    needs_teacher = False
    asks: frozenset[str] = frozenset()

    def images(self, attack: Callable[..., Tensor], x: Tensor, y: Tensor):
        """What is called x_adv below. attack(watch=None) -> (n, C, H, W) runs the training attack; watch: see `pgd`."""
        return attack()


def _finite(beta: float) -> float:
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta={beta} is not a finite number >= 0")
    return beta


def _between(clean: Tensor, logits: Tensor, boundary: Tensor | None) -> Tensor:
    between = kl(clean, logits)
    return between if boundary is None else between * boundary.to(between)


class Clean(Objective):
    """Cross-entropy on clean images; no attack."""

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, adjust=as_is, boundary=None, smoothing=0.0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, x_adv: (n, C, H, W) in [0, 1]. adjust: what a method does to the logits (n, K) of the cross-entropy.
        boundary: (n,) factors on the second term, where there is one. smoothing: of the labels of the cross-entropy.

        Returns losses (n,), the logits (n, K), as they are, that judge the example, and those of x, if there are any.
        """
        logits = model(x)
        return F.cross_entropy(adjust(logits, y), y, reduction="none", label_smoothing=smoothing), logits, logits


class AT(Objective):
    """Cross-entropy on adversarial images (Madry et al. 2018), with beta > 0 + beta KL(clean || adversarial): the
    second term of TRADES on images that attack the cross-entropy (Wu et al. 2021, with 6)."""

    attack_loss = "ce"

    def __init__(self, beta: float = 0.0):
        self.beta = _finite(beta)

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, adjust=as_is, boundary=None, smoothing=0.0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        clean = model(x) if self.beta else None
        logits = model(x_adv)
        fit = F.cross_entropy(adjust(logits, y), y, reduction="none", label_smoothing=smoothing)
        return fit if clean is None else fit + self.beta * _between(clean, logits, boundary), logits, clean


class TRADES(Objective):
    """CE(clean) + beta KL(clean || adversarial), summed over classes; the attack is on the KL (Zhang et al. 2019).

    start: of the attack, "uniform" in the ball, or the authors' "gaussian": the image and 0.001 N(0, 1).
    """

    attack_loss = "kl"

    def __init__(self, beta: float = 6.0, start: str = "uniform"):
        self.beta = _finite(beta)
        self.random_start = choose("start", start, ("uniform", "gaussian")) == "uniform"

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, adjust=as_is, boundary=None, smoothing=0.0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        clean, logits = model(x), model(x_adv)
        fit = F.cross_entropy(adjust(clean, y), y, reduction="none", label_smoothing=smoothing)
        return fit + self.beta * _between(clean, logits, boundary), logits, clean


class MART(Objective):
    """CE(x') - log(1 - max over j != y of p_j(x')) + beta KL(p(x) || p(x')) (1 - p_y(x)); the attack is on the CE (Wang
    et al., ICLR 2020, equation 11, with 5 for beta; the authors' code, which adds small constants in the logarithms,
    has 6). What a method does to logits, it does to those of the first two terms; smoothing is of the first alone.
    """

    attack_loss = "ce"

    def __init__(self, beta: float = 6.0):
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta={beta} is not a finite number >= 0")
        self.beta = beta

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, adjust=as_is, boundary=None, smoothing=0.0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        clean, logits, own = model(x), model(x_adv), y.unsqueeze(1)
        fit = adjust(logits, y)
        other = fit.scatter(1, own, -torch.inf).argmax(1, keepdim=True)
        rest = fit.scatter(1, other, -torch.inf).logsumexp(1) - fit.logsumexp(1)  # log(1 - p_j), without cancellation
        between = kl(clean, logits) * (1 - clean.softmax(1).gather(1, own).squeeze(1))
        between = between if boundary is None else between * boundary.to(between)
        boosted = F.cross_entropy(fit, y, reduction="none", label_smoothing=smoothing) - rest
        return boosted + self.beta * between, logits, clean


class ARD(Objective):
    """T^2 KL(softmax(t(x) / T) || softmax(f(x') / T)), t(x) the teacher's logits; the attack is on the CE.

    temperature: T, 30. Adversarially robust distillation (Goldblum et al., AAAI 2020), without its share of CE(x),
    which is 0 in what is published of Fair-ARD. The KL is summed over classes, as in the paper; the code, whose
    KLDivLoss takes the mean over them, trains at 1/K of the size.
    """

    attack_loss = "ce"
    needs_teacher = True

    def __init__(self, temperature: float = 30.0):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature} is not a finite number > 0")
        self.temperature = temperature

    def __call__(
        self, model, x, x_adv, y, adjust=as_is, boundary=None, smoothing=0.0, teacher=None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logits, t = model(x_adv), self.temperature
        return t**2 * kl(teacher[0] / t, logits / t), logits, None


class RSLAD(Objective):
    """1/6 KL(p_t(x) || p(x)) + 5/6 KL(p_t(x) || p(x')), p_t the teacher's softmax; the attack is on the second KL (Zi
    et al., ICCV 2021). Summed over classes; the authors' code has 1/K of it, as for ARD."""

    attack_loss = "teacher"
    needs_teacher = True

    def __call__(
        self, model, x, x_adv, y, adjust=as_is, boundary=None, smoothing=0.0, teacher=None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        clean, logits = model(x), model(x_adv)
        between = kl(teacher[0], logits)
        between = between if boundary is None else between * boundary.to(between)
        return (kl(teacher[1], clean) + 5 * between) / 6, logits, clean


OBJECTIVES = {"clean": Clean, "at": AT, "trades": TRADES, "mart": MART, "ard": ARD, "rslad": RSLAD}


class TemporalEnsemble(nn.Module):
    """weight exp(-5 (1 - t)^2) ||softmax f(x + delta) - v||^2 beside the objective; no gradient flows into v.

    v is the average of what the network said of the same image, v <- momentum v + (1 - momentum) softmax f(x), made to
    add up to 1; t grows from 0 to 1 over the first `ramp` of the run. Laine and Aila 2017; Dong et al. 2021; the CFOL
    submission, appendix C, with weight 30, momentum 0.9 and half of the run. The attack does not see the term.
    """

    def __init__(self, n: int, num_classes: int, weight: float = 30.0, momentum: float = 0.9, ramp: float = 0.5):
        super().__init__()
        self.weight, self.momentum, self.ramp = weight, momentum, ramp
        self.register_buffer("average", torch.zeros(n, num_classes))
        self.register_buffer("omega", torch.zeros(()))

    def at(self, progress: float) -> None:
        """Set the weight for the part of the run that is done."""
        self.omega.fill_(self.weight * math.exp(-5 * (1 - min(progress / self.ramp, 1)) ** 2))

    def forward(self, index: Tensor, clean: Tensor, judged: Tensor) -> Tensor:
        """index: (n,) of the images; clean: (n, K) logits of x; judged: (n, K) logits of x + delta. Returns (n,)."""
        same = (index[:, None] == index[None]).to(clean)  # an image that was drawn twice enters with its mean
        said = (same / same.sum(1, keepdim=True)) @ clean.detach().softmax(1)
        self.average[index] = (self.momentum * self.average[index] + (1 - self.momentum) * said).to(self.average)
        target = F.normalize(self.average[index], p=1).to(judged)
        return self.omega.to(judged) * (judged.softmax(1) - target).square().sum(1)

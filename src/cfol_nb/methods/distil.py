"""What a robust teacher's lesson is worth, class by class, beside the objectives "ard" and "rslad"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cfol_nb.methods import Batch, Method, not_negative, register


@register("fair-ard")
class FairARD(Method):
    """Loss times w_y, w_c = (kappa_c + 1e-5)^-beta, brought to a mean of 1 and then cut to [5/6, 5/2]: Fair-ARD with
    objective "ard", Fair-RSLAD with "rslad" (Yue et al., NeurIPS 2023).

    kappa_c: how many iterates of the training attack, its start the first and its end not among them, are classified
    rightly, mean over the images of class c that the epoch before drew; w is 1 in the first epoch. beta: 2.
    Unlike the authors' code: attack in eval mode; means are over the images drawn, not over N / K; no more forward
    passes; Fair-RSLAD has the 1e-5, too.
    """

    asks = frozenset({"right"})

    def __init__(self, *run, beta: float = 2.0, **named):
        super().__init__(*run, **named)
        not_negative(beta=beta)
        self.beta = beta
        for name in ("survived", "drawn"):
            self.register_buffer(name, torch.zeros(self.num_classes, dtype=torch.float64))
        self.register_buffer("weights", torch.ones(self.num_classes, dtype=torch.float64))

    def weigh(self, batch: Batch) -> Tensor:
        return self.weights[batch.y]

    def after_step(self, batch: Batch) -> None:
        self.survived.index_add_(0, batch.y, batch.right.sum(1).to(self.survived))
        self.drawn.index_add_(0, batch.y, torch.ones_like(batch.y, dtype=self.drawn.dtype))

    def epoch_end(self, epoch: int) -> None:
        log = -self.beta * (self.survived / self.drawn.clamp_min(1) + 1e-5).log()
        self.weights.copy_((self.num_classes * log.softmax(0)).clamp(5 / 6, 5 / 2))
        self.survived.zero_()
        self.drawn.zero_()

    def trace(self) -> dict[str, Tensor]:
        return {"weights": self.weights}


@register("absld")
class ABSLD(Method):
    """RSLAD whose labels are softmax(t(x) / tau_y), colder and so sharper for hard classes: anti-bias soft label
    distillation (Zhao et al., NeurIPS 2024).

    One tau for the adversarial image, and its attack, another for the clean one. Both start at 1; after each epoch
    tau_c falls by eta (L_c - mean L) / max |L - mean L|, in [0.5, 5], L_c the mean of CE(x') or CE(x) that the epoch
    met in class c. eta: 0.1, a tenth of it from 215/300 of the run on, and again from 260/300 and 285/300, where the
    authors' learning rate falls. Unlike in their code the two labels are two, not one label divided by both tau, and
    L_c is a mean, not a sum.
    """

    needs_objective = "rslad"
    asks = frozenset({"teacher"})

    def __init__(self, *run, eta: float = 0.1, **named):
        super().__init__(*run, **named)
        not_negative(eta=eta)
        self.eta = eta
        self.register_buffer("tau", torch.ones(2, self.num_classes, dtype=torch.float64))  # adversarial, clean
        self.register_buffer("losses", torch.zeros(2, self.num_classes, dtype=torch.float64))
        self.register_buffer("drawn", torch.zeros(self.num_classes, dtype=torch.float64))

    def soften(self, teacher: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        adversarial, clean = teacher / self.tau[:, y].to(teacher).unsqueeze(2)
        return adversarial, clean

    def after_step(self, batch: Batch) -> None:
        losses = [F.cross_entropy(z.to(self.losses), batch.y, reduction="none") for z in (batch.logits, batch.clean)]
        self.losses.index_add_(1, batch.y, torch.stack(losses))
        self.drawn.index_add_(0, batch.y, torch.ones_like(batch.y, dtype=self.drawn.dtype))

    def epoch_end(self, epoch: int) -> None:
        """A class that was not drawn stays as it is, and out of the mean."""
        there = self.drawn > 0
        mean = self.losses / self.drawn.clamp_min(1)
        g = torch.where(there, mean - mean.sum(1, keepdim=True) / there.sum(), 0)
        g /= g.abs().amax(1, keepdim=True).clamp_min(1e-8)  # equal losses differ by rounding
        eta = self.eta * 0.1 ** sum(300 * epoch >= e * self.context.epochs > 0 for e in (215, 260, 285))
        self.tau.sub_(eta * g).clamp_(0.5, 5)
        self.losses.zero_()
        self.drawn.zero_()

    def trace(self) -> dict[str, Tensor]:
        return {"tau": self.tau[0], "tau clean": self.tau[1]}

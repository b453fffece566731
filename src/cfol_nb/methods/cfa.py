"""Class-wise calibrated fair adversarial training (Wei et al., CVPR 2023): each class the radius, the regulariser, and
all the averaging that they can bear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cfol_nb.methods import Batch, Method, not_negative, register


@register("fawa")
class FAWA(Method):
    """Fairness-aware weight average, kept as the weights "averaged": after a look at which the worst class has at least
    the accuracy delta under attack, average <- decay average + (1 - decay) weights, the first time the weights alone.

    decay: 0.85 a look, delta: 0.2, both in [0, 1), the paper's; its code has 0.88 and 0.24. Up to the first such look
    "averaged" are the weights of the last look, not the untrained ones, as there. The authors look after every epoch,
    by PGD-10 on 1,000 images: validate_every and validate_steps of the run.
    """

    def __init__(self, *run, decay: float = 0.85, delta: float = 0.2, **named):
        super().__init__(*run, **named)
        for what, value in (("decay", decay), ("delta", delta)):
            if not 0 <= value < 1:
                raise ValueError(f"{what}={value} of the weight average is not in [0, 1)")
        self.decay, self.delta = decay, delta
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def average(self, report: dict[str, Tensor]) -> Tensor | None:
        fair, begun = report["robust"].min() >= self.delta, self.begun.clone()
        self.begun |= fair
        return begun * (1 - (1 - self.decay) * fair.double())

    def complaint(self, history: Sequence[Mapping]) -> str:
        over = history and len(history) == self.context.epochs and not self.begun
        return f"FAWA averaged nothing: no look found the worst class at delta={self.delta:g}" if over else ""


@register("cfa")
class CFA(FAWA):
    """ccm: radius and step times lam1 + t_y, from epoch `begin` on. ccr: with beta_y = (lam2 + t_y) beta, the loss
    (CE + beta_y KL) / (1 + beta_y), beta_y = beta in the first epoch and without ccr. fawa: the average of `FAWA`.

    t_c: accuracy of class c under the training attack in the last epoch, in [0, 1]. lam1: by default 0.3 with TRADES,
    0.5 with AT, which has no KL and so no ccr; lam2: 0.5, as in the paper (whose equation 7 this is; its algorithm 1
    has eps in place of beta). begin: by default 1/20 of the run, the 10 of 200 epochs of the authors' code.

    As in the authors' code all of TRADES is divided by 1 + beta, 7 times smaller than elsewhere at the same learning
    rate: with ccm, ccr and fawa off this is the control. Unlike there, t divides by the images that were drawn, not by
    N / K; the attack runs in eval mode; no other pass moves batch statistics; and the step grows with the radius.
    """

    def __init__(
        self,
        *run,
        ccm: bool = True,
        ccr: bool = True,
        fawa: bool = True,
        lam1: float | None = None,
        lam2: float = 0.5,
        begin: int | None = None,
        **named,
    ):
        super().__init__(*run, **named)
        beta, epochs = self.context.beta, self.context.epochs
        lam1 = (0.5 if beta is None else 0.3) if lam1 is None else lam1
        not_negative(lam1=lam1, lam2=lam2)
        self.ccm, self.ccr, self.fawa = ccm, ccr and beta is not None, fawa
        self.lam1, self.lam2, self.beta = lam1, lam2, beta
        self.begin = max(1, round(epochs / 20)) if begin is None else begin
        if ccm and not 1 <= self.begin < (epochs or float("inf")):
            raise ValueError(f"begin={self.begin} of cfa: 1 or more epochs, and fewer than the {epochs} of the run")
        for name, value in (("right", 0.0), ("drawn", 0.0), ("margin", 1.0), ("regulariser", 1.0)):
            self.register_buffer(name, torch.full((self.num_classes,), value, dtype=torch.float64))

    def radius(self, y: Tensor) -> Tensor | None:
        return self.margin[y] if self.ccm else None

    def boundary(self, y: Tensor) -> Tensor | None:
        return None if self.beta is None else self.regulariser[y]

    def weigh(self, batch: Batch) -> Tensor | None:
        return None if self.beta is None else 1 / (1 + self.beta * self.regulariser[batch.y])

    def after_step(self, batch: Batch) -> None:
        self.right.index_add_(0, batch.y, (batch.logits.argmax(1) == batch.y).to(self.right))
        self.drawn.index_add_(0, batch.y, torch.ones_like(batch.y, dtype=self.drawn.dtype))

    def epoch_end(self, epoch: int) -> None:
        there, t = self.drawn > 0, self.right / self.drawn.clamp_min(1)
        if self.ccm and epoch >= self.begin:
            self.margin.copy_(torch.where(there, self.lam1 + t, self.margin))
        if self.ccr:
            self.regulariser.copy_(torch.where(there, self.lam2 + t, self.regulariser))
        self.right.zero_()
        self.drawn.zero_()

    def average(self, report: dict[str, Tensor]) -> Tensor | None:
        return super().average(report) if self.fawa else None

    def complaint(self, history: Sequence[Mapping]) -> str:
        return super().complaint(history) if self.fawa else ""

    def trace(self) -> dict[str, Tensor]:
        return {"radius factor": self.margin, "beta factor": self.regulariser}

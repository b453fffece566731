"""FAIR-TAT (Medi et al., WACV 2025): targeted attacks, towards the classes that errors go to."""

from __future__ import annotations

import torch
from torch import Tensor

from cfol_nb.methods import Batch, Method, not_negative, register


def other_than(y: Tensor, logits: Tensor, generator: torch.Generator) -> Tensor:
    """(n,) int64 classes from softmax(logits (K,)) given that they are not y: the argmax of logits and Gumbel noise."""
    u = torch.rand(len(y), len(logits), generator=generator, dtype=logits.dtype, device=logits.device)
    return (logits - (-(1 - u).log()).log()).scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)


@register("fair-tat")
class FairTAT(Method):
    """Every image is moved towards a class c != y, drawn ~ exp(sharpness fp_c), at a radius of (base + t_y) eps.

    Of the epoch before, under that attack in training: fp_c, the share of all errors that were predicted as c; t_c, the
    accuracy of class c. In the first epoch targets are uniform and radii eps. With sharpness 2, the published value,
    targets stay nearly uniform; t is large under a targeted attack, so most radii end above eps.
    The loss is CE(x') with objective "at", all that the authors' code runs, of which this differs so: attack in eval
    mode; the step grows with the radius (theirs stays); accuracies are over the images drawn, not over N / K.
    """

    asks = frozenset({"attack"})

    def __init__(self, *run, base: float = 0.5, sharpness: float = 2.0, **named):
        super().__init__(*run, **named)
        not_negative(base=base, sharpness=sharpness)
        self.base, self.sharpness = base, sharpness
        for name in ("right", "drawn", "wrong_as", "share"):  # the last: fp
            self.register_buffer(name, torch.zeros(self.num_classes, dtype=torch.float64))
        self.register_buffer("factors", torch.ones(self.num_classes, dtype=torch.float64))

    def aim(self, batch: Batch, generator: torch.Generator) -> Tensor:
        return other_than(batch.y, self.sharpness * self.share, generator)

    def radius(self, y: Tensor) -> Tensor:
        return self.factors[y]

    def after_step(self, batch: Batch) -> None:
        said = batch.logits.argmax(1)
        right = (said == batch.y).to(self.right)
        self.right.index_add_(0, batch.y, right)
        self.wrong_as.index_add_(0, said, 1 - right)
        self.drawn.index_add_(0, batch.y, torch.ones_like(right))

    def epoch_end(self, epoch: int) -> None:
        self.factors.copy_(self.base + self.right / self.drawn.clamp_min(1))
        self.share.copy_(self.wrong_as / self.wrong_as.sum().clamp_min(1))
        for count in (self.right, self.drawn, self.wrong_as):
            count.zero_()

    def trace(self) -> dict[str, Tensor]:
        return {"radii": self.factors, "errors as": self.share}

"""Distance-aware fair adversarial training (Lee et al., ICLR 2024): easy classes give to those that they are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cfol_nb.methods import Batch, Method, not_negative, register

LEAST, MOST = 0.1, 2.0  # of a weight, ours


def transfer(p: Tensor, lam: float) -> Tensor:
    """(K,) W_i = 1 + lam (sum over j with p_jj > p_ii of p_ij p_jj - sum over j with p_jj < p_ii of p_ji p_ii).

    p: (K, K), rows the mean softmax of the images of a class. What one class of a pair gains, the other gives: the sum
    is K. Equal classes move nothing (equation 4 of the paper, whose code lets both of them give).
    """
    right = p.diagonal()
    gain = torch.where(right[:, None] < right[None], p * right[None], 0)
    return 1 + lam * (gain.sum(1) - gain.sum(0))


@register("dafa")
class DAFA(Method):
    """Radius, step and cross-entropy times W_y, the KL of TRADES unweighted; W is `transfer` of what the network says
    of the training images under attack in epoch `warm_up`, and 1 up to then.

    lam: 1 for CIFAR-10, 1.5 for CIFAR-100 and STL-10. warm_up: by default 7/11 of the run, the authors' 70 of 110.
    Unlike the authors' code W is kept in [0.1, 2], nothing moves between equal classes, class accuracies are means over
    the images that were drawn, and objectives other than TRADES get the larger radius, too, which a second step clamps
    away there.
    """

    share = 7 / 11  # of the run, before weights move

    def __init__(self, *run, lam: float = 1.0, warm_up: int | None = None, **named):
        super().__init__(*run, **named)
        epochs = self.context.epochs
        not_negative(lam=lam)
        self.lam, self.warm_up = lam, max(1, round(epochs * self.share)) if warm_up is None else warm_up
        if not 1 <= self.warm_up < (epochs or float("inf")):
            given = f"warm_up={self.warm_up} of {type(self).__name__.lower()}"
            raise ValueError(f"{given}: 1 or more epochs, and fewer than the {epochs} of the run")
        for name, shape in (("said", (self.num_classes,) * 2), ("drawn", self.num_classes)):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("weights", torch.ones(self.num_classes, dtype=torch.float64))
        self.register_buffer("clamped", torch.zeros((), dtype=torch.bool))

    def radius(self, y: Tensor) -> Tensor:
        return self.weights[y]

    def boundary(self, y: Tensor) -> Tensor:
        return 1 / self.weights[y]

    def weigh(self, batch: Batch) -> Tensor:
        return self.weights[batch.y]

    def after_step(self, batch: Batch) -> None:
        self.said.index_add_(0, batch.y, batch.logits.to(self.said).softmax(1))
        self.drawn.index_add_(0, batch.y, torch.ones_like(batch.y, dtype=self.drawn.dtype))

    def epoch_end(self, epoch: int) -> None:
        if epoch == self.warm_up:
            weights = transfer(self.said / self.drawn.clamp_min(1).unsqueeze(1), self.lam)
            self.weights.copy_(weights.clamp(LEAST, MOST))
            self.clamped.copy_((weights != self.weights).any())
        self.said.zero_()
        self.drawn.zero_()

    def complaint(self, history: Sequence[Mapping]) -> str:
        return f"DAFA's weights were cut to [{LEAST:g}, {MOST:g}]: lower lam" if self.clamped else ""

    def trace(self) -> dict[str, Tensor]:
        return {"weights": self.weights}

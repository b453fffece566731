"""What is minimised: one loss per example, and how the training attack makes its images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cfol_nb.attacks import kl


def as_is(logits: Tensor, y: Tensor) -> Tensor:
    return logits


class Clean:
    """Cross-entropy on clean images; no attack."""

    attack_loss: str | None = None

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, adjust=as_is, boundary=None
    ) -> tuple[Tensor, Tensor]:
        """x, x_adv: (n, C, H, W) in [0, 1]. adjust: what a method does to the logits (n, K) of the cross-entropy.
        boundary: (n,) factors on the second term, where there is one.

        Returns losses (n,) and the logits (n, K), as they are, that judge the example.
        """
        logits = model(x)
        return F.cross_entropy(adjust(logits, y), y, reduction="none"), logits


class AT:
    """Cross-entropy on adversarial images (Madry et al. 2018)."""

    attack_loss = "ce"

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, adjust=as_is, boundary=None
    ) -> tuple[Tensor, Tensor]:
        logits = model(x_adv)
        return F.cross_entropy(adjust(logits, y), y, reduction="none"), logits


class TRADES:
    """CE(clean) + beta KL(clean || adversarial), summed over classes; the attack is on the KL (Zhang et al. 2019)."""

    attack_loss = "kl"

    def __init__(self, beta: float = 6.0):
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta={beta} is not a finite number >= 0")
        self.beta = beta

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, adjust=as_is, boundary=None
    ) -> tuple[Tensor, Tensor]:
        clean, logits = model(x), model(x_adv)
        between = kl(clean, logits)
        between = between if boundary is None else between * boundary.to(between)
        return F.cross_entropy(adjust(clean, y), y, reduction="none") + self.beta * between, logits


OBJECTIVES = {"clean": Clean, "at": AT, "trades": TRADES}

"""Confusional spectral regularisation, CSR (ICLR 2025): lower the spectral norm of the robust confusion matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cfol_nb.methods import Batch, Method, register


def spectral_weights(confusion: Tensor) -> Tensor:
    """(K, K) M = 2 (G - min G) / (max G - min G) + 0.01, G = u1 v1^T the gradient of the largest singular value of the
    errors, predicted classes in rows. confusion: (K, K) counts, true classes in rows. Without errors 0.01 everywhere.
    """
    errors = confusion.T - confusion.diagonal().diag()
    u, s, v = torch.linalg.svd(errors)
    g = (s[0] > 0) * torch.outer(u[:, 0], v[0]).abs()  # u1, v1 are non-negative, up to a common sign
    g = g - g.min()
    return 2 * g / g.max().clamp_min(torch.finfo(g.dtype).tiny) + 0.01


@register("csr")
class CSR(Method):
    """(1 - share) CE(x) + beta KL + share M[argmax f(x'), y] CE(x', y), M = `spectral_weights` of the held-out images
    under attack, which are looked at before the first step, too, and then every `validate_every` epochs.

    The published share is 0.3, for two epochs of fine-tuning with beta 6: give the run a parent, and awp for CSR-AWP.
    Unlike the authors' code, M comes from held-out images, not from the augmented training images with their own logit
    lowered to 0.9 of it. As there, images that are right are weighed too (M[y, y] > 0).
    """

    needs_objective = "trades"
    asks = frozenset({"start"})

    def __init__(self, *run, share: float = 0.3, **named):
        super().__init__(*run, **named)
        if not 0 <= share < 1:
            raise ValueError(f"share={share} is not in [0, 1)")
        self.share = share
        self.register_buffer("m", torch.full((self.num_classes,) * 2, 0.01, dtype=torch.float64))

    def boundary(self, y: Tensor) -> Tensor:
        return torch.full_like(y, 1 / (1 - self.share), dtype=self.m.dtype)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        ce = F.cross_entropy(batch.logits, batch.y, reduction="none").to(losses)
        weight = self.m[batch.logits.argmax(1), batch.y].to(losses)
        return ((1 - self.share) * losses + self.share * weight * ce).mean()

    def after_epoch(self, epoch: int, report: dict[str, Tensor]) -> None:
        self.m.copy_(spectral_weights(report["robust confusion"]))

    def trace(self) -> dict[str, Tensor]:
        return {"weights of errors": self.m.mean(0)}

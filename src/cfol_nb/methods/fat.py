"""Fairness-aware adversarial training (Xu et al., NeurIPS 2022): a penalty on how much the class losses differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cfol_nb.methods import Batch, Method, not_negative, register


@register("fat-ma")
class FATMa(Method):
    """Mean loss + alpha Var_c(mean CE(x') of class c), over the classes in the batch.

    Unlike the authors' code it is the variance over these classes, of population size, not over a hundred slots with
    zeros for those that are not there; and with TRADES the images are those of its own attack on the KL, not on the CE.
    """

    def __init__(self, *run, alpha: float = 0.1, **named):
        super().__init__(*run, **named)
        not_negative(alpha=alpha)
        self.alpha = alpha

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        ce = F.cross_entropy(batch.logits, batch.y, reduction="none").to(losses)
        member = (batch.y == torch.arange(self.num_classes, device=ce.device).unsqueeze(1)).to(ce)  # (K, n)
        there = member.amax(1)
        means = member @ ce / member.sum(1).clamp_min(1)
        middle = (there * means).sum() / there.sum()
        return losses.mean() + self.alpha * (there * (means - middle).square()).sum() / there.sum()

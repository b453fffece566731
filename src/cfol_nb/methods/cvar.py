"""Conditional value at risk: the mean of the worst share alpha of examples, or of classes (submission, appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor

from cfol_nb.methods import Batch, Method, register


def worst_case(losses: Tensor, bound: Tensor) -> Tensor:
    """(m,) weights q that maximise sum q * losses over the simplex with q <= bound (m,): fill the largest losses first.

    If the bounds add up to less than 1, all of them are used. No gradient.
    """
    with torch.no_grad():
        order = losses.argsort(descending=True, stable=True)
        cap = bound[order]
        before = cap.cumsum(0) - cap
        return torch.empty_like(cap).scatter_(0, order, torch.minimum(cap, (1 - before).clamp_min(0)))


def _share(alpha: float) -> float:
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} is not in (0, 1]: it is the share of the worst")
    return alpha


@register("cvar")
class CVaR(Method):
    """Mean of the worst share alpha of the batch: sup over q with q_i <= 1 / (alpha n)."""

    def __init__(self, *run, alpha: float = 0.5, **named):
        super().__init__(*run, **named)
        self.alpha = _share(alpha)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        bound = torch.full_like(losses, 1 / (self.alpha * len(losses)))
        return (worst_case(losses, bound) * losses).sum()


@register("lcvar")
class LCVaR(Method):
    """CVaR over the class losses of the batch (Xu et al. 2020): sup over q with q_c <= (share of class c) / alpha.

    The optimal q is used. The released CFOL code computes the mean times 1 / alpha instead, which is ERM.
    """

    def __init__(self, *run, alpha: float = 0.2, **named):
        super().__init__(*run, **named)
        self.alpha = _share(alpha)

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        y = batch.y
        member = (y == torch.arange(self.num_classes, device=y.device).unsqueeze(1)).to(losses)  # (K, n)
        count = member.sum(1)
        mean = member @ losses / count.clamp_min(1)
        return (worst_case(mean, count / (self.alpha * len(y))) * mean).sum()

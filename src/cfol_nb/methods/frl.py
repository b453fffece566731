"""Fair robust learning (Xu et al., ICML 2021): no class much worse than the mean, clean or at the boundary."""

from __future__ import annotations

import torch
from torch import Tensor

from cfol_nb.methods import Batch, Method, not_negative, register


@register("frl")
class FRL(Method):
    """TRADES whose two terms have class weights of their own: sum w0_y CE / sum w0 + beta sum w1_y KL / sum w1.

    After a look at the held-out part, the first of them before the first step, a class whose clean error is more than
    delta above the mean gains weight in the first term, and one whose boundary error (right on the clean image, broken
    by the attack) is, in the second, twice as fast; w_c = 1/K + l_c - mean(l), where l is never negative and adds up to
    `limit` at most. remargin: such a class is also trained at a larger radius, exp(2 m_c) times, within [LEAST, most];
    m_c moves by margin_rate and has no bounds of its own, so that a class pays back what it was ahead.

    delta: by default 0.1, with remargin 0.07. The authors fine-tune a robust network for 40 epochs at lr 0.001 with
    beta 1.5: give the run a parent and the objective {"name": "trades", "beta": 1.5, "start": "gaussian"}. Their steps
    are a quarter of the batch's largest radius, here of the image's own; they halve `rate` at epoch 40.
    """

    needs_objective = "trades"
    asks = frozenset({"start"})
    LEAST = 0.98  # the smallest factor on the radius, in the authors' code

    def __init__(
        self,
        *run,
        delta: float | None = None,
        rate: float = 0.05,
        limit: float = 0.5,
        remargin: bool = False,
        margin_rate: float = 0.2,
        most: float = 3.0,
        **named,
    ):
        super().__init__(*run, **named)
        not_negative(rate=rate, margin_rate=margin_rate, delta=delta or 0.0)
        if not 0 <= limit < 1:
            raise ValueError(f"limit={limit} is not in [0, 1): weights could become negative")
        if not most >= 1:
            raise ValueError(f"most={most} is not at least 1")
        self.delta = (0.07 if remargin else 0.1) if delta is None else delta
        self.rate, self.limit, self.remargin, self.margin_rate, self.most = rate, limit, remargin, margin_rate, most
        for name in ("clean", "boundary_error", "margin"):
            self.register_buffer(name, torch.zeros(self.num_classes, dtype=torch.float64))

    def _weights(self, gained: Tensor, y: Tensor) -> Tensor:
        """(n,) the weights of a term, adding up to 1 in the batch."""
        weight = (1 / self.num_classes + gained - gained.mean())[y]
        return weight / weight.sum()

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        return (self._weights(self.clean, batch.y).to(losses) * losses).sum()

    def boundary(self, y: Tensor) -> Tensor:
        return self._weights(self.boundary_error, y) / self._weights(self.clean, y)

    def radius(self, y: Tensor) -> Tensor | None:
        return (2 * self.margin).exp().clamp(self.LEAST, self.most)[y] if self.remargin else None

    def after_epoch(self, epoch: int, report: dict[str, Tensor]) -> None:
        clean, robust = (report[k].to(self.clean) for k in ("clean", "robust"))
        above, broken = (error - error.mean() - self.delta for error in (1 - clean, clean - robust))
        for multiplier, change in ((self.clean, self.rate * above), (self.boundary_error, 2 * self.rate * broken)):
            multiplier.add_(change).clamp_min_(0)
            multiplier.mul_((self.limit / multiplier.sum().clamp_min(1e-12)).clamp_max(1))
        self.margin.add_(self.margin_rate * broken)

    def trace(self) -> dict[str, Tensor]:
        return {"clean multiplier": self.clean, "boundary multiplier": self.boundary_error, "margin": self.margin}

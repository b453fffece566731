"""TRIX (arXiv 2507.07768): DAFA, and targeted attacks, which are weaker, on the images of easy classes."""

from __future__ import annotations

import torch
from torch import Tensor

from cfol_nb.methods import Batch, register
from cfol_nb.methods.dafa import DAFA, transfer


@register("trix")
class TRIX(DAFA):
    """DAFA's radius, step and weight W_y; and from the first epoch on the images of the classes that DAFA's rule would
    take from are moved towards a class, uniform over the others, instead of up the objective's loss.

    These are the classes with V_c < 1, V = `transfer(P, 1)`, P_c the mean softmax of the clean images of class c: a
    running mean over the steps, with the memory of an epoch. With objective "trades" the rest is W_y CE(x) + beta KL.
    lam: as of DAFA. warm_up: by default 7/15 of the run, the authors' 70 of 150.
    Unlike the authors' code, where P is that of the batch (with many classes, of an image or none in most rows) and an
    image is compared with its batch's mean of V, classes are split, by the mean over them, which is 1; P is one step
    old, and with "trades" in training mode; and all of what DAFA says here.
    """

    asks = frozenset({"clean", "attack"})
    share = 7 / 15

    def __init__(self, *run, lam: float = 1.0, warm_up: int | None = None, **named):
        super().__init__(*run, lam=lam, warm_up=warm_up, **named)
        for name in ("said_clean", "drawn_clean"):
            self.register_buffer(name, torch.zeros_like(getattr(self, name.removesuffix("_clean"))))

    def _v(self) -> Tensor:
        tiny = torch.finfo(self.drawn_clean.dtype).tiny
        return transfer(self.said_clean / self.drawn_clean.clamp_min(tiny).unsqueeze(1), 1.0)

    def aim(self, batch: Batch, generator: torch.Generator) -> Tensor:
        y = batch.y
        away = torch.randint(1, self.num_classes, y.shape, generator=generator, device=y.device)
        return torch.where((self._v() < 1)[y], (y + away) % self.num_classes, -1)

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        kept = 1 - 1 / max(self.context.per_epoch, 1)
        said = batch.clean.to(self.said).softmax(1)
        self.said_clean.mul_(kept).index_add_(0, batch.y, said)
        self.drawn_clean.mul_(kept).index_add_(0, batch.y, torch.ones_like(batch.y, dtype=self.drawn.dtype))

    def trace(self) -> dict[str, Tensor]:
        return {**super().trace(), "clean weights": self._v()}

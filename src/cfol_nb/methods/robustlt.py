"""RobustLT (Zhang et al., CVPR 2026): rare classes are trained at a larger radius than frequent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from cfol_nb.methods import register
from cfol_nb.methods.longtail import LongTail


@register("robustlt")
class RobustLT(LongTail):
    """Radius and step times (1 - a + tau q_y) min(epoch / (b E), 1), q_c = sqrt(log(n_max / n_c)), E epochs in all.

    epoch counts from 0: the first has no attack. tau makes the first factor 1 in the mean over the images; equal n make
    it 1 for all. a: how far it may move, 0.3; b: the part of the run in which radii grow, 0.8; both in [0, 1]. The
    authors' n_c are the numbers of images, counts="images", and the losses those of other methods, as balanced-softmax.
    """

    def __init__(self, *run, a: float = 0.3, b: float = 0.8, **named):
        super().__init__(*run, **named)
        for what, value in (("a", a), ("b", b)):
            if not 0 <= value <= 1:
                raise ValueError(f"{what}={value} of robustlt is not in [0, 1]")
        self.a, self.growing = a, b * self.context.epochs  # epochs
        images = torch.bincount(self.run[0], minlength=self.num_classes).double()
        self.register_buffer("share", images / images.sum(), persistent=False)
        self.register_buffer("grown", torch.tensor(float(not self.growing), dtype=torch.float64))

    def factors(self) -> Tensor:
        """(K,) of the fully grown radii."""
        q = (self.n.max() / self.n).log().clamp_min(0).sqrt()
        mean = (self.share * q).sum()
        return torch.where(mean > 0, 1 - self.a + self.a * q / mean.clamp_min(torch.finfo(q.dtype).tiny), 1.0)

    def radius(self, y: Tensor) -> Tensor:
        return (self.factors() * self.grown)[y]

    def epoch_end(self, epoch: int) -> None:
        if self.growing:
            self.grown.fill_(min(epoch / self.growing, 1))

    def trace(self) -> dict[str, Tensor]:
        return super().trace() | {"radius factor": self.factors() * self.grown}

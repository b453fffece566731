"""Hardness-aware adversarial training, HAM (IEEE TIFS 2025): only images that a few steps break are learnt from."""

from __future__ import annotations

import torch
from torch import Tensor

from cfol_nb.methods import Batch, Method, register


@register("ham")
class HAM(Method):
    """After `warm_up` epochs of plain training, the mean loss of those images of the batch that are wrong after so many
    steps of the attack (`after`), those that were wrong before it included; 0 if there are none.

    warm_up: by default 49/120 of the run, and after 3/10 of the attack's steps, the authors' 49 of 120 and 3 of 10 on
    CIFAR-10 (on SVHN 5). It multiplies with other methods' weights. Unlike in the authors' code, which drops the other
    images half-way, they go on through attack and batch statistics: shapes stay, nothing is saved, and a batch without
    hard images is no error.
    """

    asks = frozenset({"right"})

    def __init__(self, *run, warm_up: int | None = None, after: int | None = None, **named):
        super().__init__(*run, **named)
        epochs, steps = self.context.epochs, self.context.steps
        self.warm_up = round(epochs * 49 / 120) if warm_up is None else warm_up
        self.after = steps * 3 // 10 if after is None else after
        for what, most, of in (("warm_up", epochs, "epochs of the run"), ("after", steps, "steps of the attack")):
            if not 0 <= (value := getattr(self, what)) < (most or float("inf")):
                raise ValueError(f"{what}={value} of ham: 0 or more, and fewer than the {most} {of}")
        self.register_buffer("hard_only", torch.tensor(not self.warm_up))
        for name in ("hard", "drawn", "share"):
            self.register_buffer(name, torch.zeros(self.num_classes, dtype=torch.float64))

    def weigh(self, batch: Batch) -> Tensor:
        hard = (~(batch.right[:, self.after] & self.hard_only)).to(self.share)
        return hard * len(hard) / hard.sum().clamp_min(1)

    def after_step(self, batch: Batch) -> None:
        self.hard.index_add_(0, batch.y, (~batch.right[:, self.after]).to(self.hard))
        self.drawn.index_add_(0, batch.y, torch.ones_like(batch.y, dtype=self.drawn.dtype))

    def epoch_end(self, epoch: int) -> None:
        self.hard_only.fill_(epoch >= self.warm_up)
        self.share.copy_(self.hard / self.drawn.clamp_min(1))
        self.hard.zero_()
        self.drawn.zero_()

    def trace(self) -> dict[str, Tensor]:
        return {"hard": self.share}

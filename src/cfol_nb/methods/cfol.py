"""Class focused online learning (Pethick et al. 2023), and FOL, the same with examples for classes."""

from __future__ import annotations

import torch
from torch import Tensor

from cfol_nb.config import choose
from cfol_nb.methods import Method, register
from cfol_nb.samplers import ClassSampler, ExampleSampler


def step_size(eta: float | None, drift: float, examples: int) -> float:
    """eta, or the eta whose drift, eta * examples seen in the whole run, is the given one."""
    return drift / max(examples, 1) if eta is None else eta


def _wrong(y: Tensor, logits: Tensor) -> Tensor:
    return (logits.argmax(1) != y).double()


@register("cfol")
class CFOL(Method):
    """Exp3 over classes, fed with the 0-1 loss under attack.

    form: "sample" draws classes from p; "reweight" draws as ERM does and weighs the loss by p_y over the share of class
    y in the images, which is K p_y on balanced data (Table 10 of the submission). gamma: share of uniform draws.
    eta: step size per example; by default drift / examples seen in the run,
    where the released commands amount to a drift of 5e-6 * 40,000 * 200 = 40.
    """

    def __init__(
        self, *run, gamma: float = 0.5, eta: float | None = None, drift: float = 40.0, form: str = "sample", **named
    ):
        super().__init__(*run, **named)
        labels, num_classes, seed, examples = self.run
        self.form = choose("form of cfol", form, ("sample", "reweight"))
        classes = ClassSampler(labels, gamma, step_size(eta, drift, examples), num_classes, seed)
        if form == "sample":
            self.sampler = classes
        else:
            self.adversary = classes
            self.register_buffer("share", classes.count / len(labels))

    @property
    def classes(self) -> ClassSampler:
        return self.sampler if self.form == "sample" else self.adversary

    def reduce(self, losses: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        if self.form == "sample":
            return losses.mean()
        return (losses * (self.classes.p / self.share)[y].to(losses)).mean()

    def after_step(self, index: Tensor, y: Tensor, logits: Tensor) -> None:
        self.classes.update(y, _wrong(y, logits), None if self.form == "sample" else self.share[y])

    def trace(self) -> dict[str, Tensor]:
        return {"p": self.classes.p}


@register("fol")
class FOL(Method):
    """Exp3 over examples (Shalev-Shwartz and Wexler 2016). Default drift: 5e-7 * 40,000 * 200 = 4, as released."""

    def __init__(self, *run, gamma: float = 0.5, eta: float | None = None, drift: float = 4.0, **named):
        super().__init__(*run, **named)
        labels, _, seed, examples = self.run
        self.sampler = ExampleSampler(len(labels), gamma, step_size(eta, drift, examples), seed)
        self.register_buffer("labels", labels, persistent=False)

    def after_step(self, index: Tensor, y: Tensor, logits: Tensor) -> None:
        self.sampler.update(index, _wrong(y, logits))

    def trace(self) -> dict[str, Tensor]:
        p = self.sampler.p
        return {"p": torch.zeros(self.num_classes, dtype=p.dtype, device=p.device).index_add_(0, self.labels, p)}

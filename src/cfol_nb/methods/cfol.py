"""Class focused online learning (Pethick et al. 2023), and FOL, the same with examples for classes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cfol_nb.config import choose
from cfol_nb.methods import Batch, Method, register
from cfol_nb.samplers import NAMES, ClassSampler, ExampleSampler


def step_size(eta: float | None, drift: float, examples: int) -> float:
    """eta, or the eta whose drift, eta * examples seen in the whole run, is the given one."""
    return drift / max(examples, 1) if eta is None else eta


def _wrong(batch: Batch) -> Tensor:
    return batch.logits.argmax(1) != batch.y


@register("cfol")
class CFOL(Method):
    """Exp3 over classes, fed with the 0-1 loss under attack: p = gamma / K + (1 - gamma) softmax(w), and an example of
    class y that is wrong adds to w_y eta over the probability that the class was drawn with.

    form: "sample" draws classes from p; "reweight" draws as ERM does and weighs the loss by p_y over the share of class
    y in the images, which is K p_y on balanced data (Table 10 of the submission). gamma: share of uniform draws.
    eta: step size per example; by default drift / examples seen in the run,
    where the released commands amount to a drift of 5e-6 * 40,000 * 200 = 40. base, prior: "uniform" or "empirical",
    as `ClassSampler` has them. reset: the parts of the run after which w starts anew, e.g. those at which the learning
    rate falls. (The last three are options of the released code that no paper reports.)
    """

    def __init__(
        self,
        *run,
        gamma: float = 0.5,
        eta: float | None = None,
        drift: float = 40.0,
        form: str = "sample",
        base: str = "uniform",
        prior: str = "uniform",
        reset: Sequence[float] = (),
        **named,
    ):
        super().__init__(*run, **named)
        labels, num_classes, seed, examples = self.run
        self.form = choose("form of cfol", form, ("sample", "reweight"))
        eta = step_size(eta, drift, examples)
        base, prior = (choose(f"{what} of cfol", given, NAMES) for what, given in (("base", base), ("prior", prior)))
        classes = ClassSampler(labels, gamma, eta, num_classes, seed, base=base, prior=prior)
        if not isinstance(reset, list | tuple) or any(isinstance(r, str) or not 0 < r < 1 for r in reset):
            raise ValueError(f"reset={reset}: a list of parts of the run, between 0 and 1, is needed")
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer(
            "reset", torch.tensor([part * examples for part in reset], dtype=torch.float64), persistent=False
        )
        if form == "sample":
            self.sampler = classes
        else:
            self.adversary = classes
            self.register_buffer("share", classes.count / len(labels))

    @property
    def classes(self) -> ClassSampler:
        """The sampler over classes."""
        return self.sampler if self.form == "sample" else self.adversary

    def weigh(self, batch: Batch) -> Tensor | None:
        return None if self.form == "sample" else (self.classes.p / self.share)[batch.y]

    def after_step(self, batch: Batch) -> None:
        y = batch.y
        self.classes.update(y, _wrong(batch), None if self.form == "sample" else self.share[y])
        if len(self.reset):
            due = ((self.reset > self.seen) & (self.reset <= self.seen + len(y))).any()
            self.classes.w.copy_(torch.where(due, self.classes.prior, self.classes.w))
            self.seen += len(y)

    def complaint(self, history: Sequence[Mapping]) -> str:
        """Whether q lies on one class, or in two epochs in a row more than half of it went to other classes."""
        share, most, at_first = 1 - self.classes.gamma, self.classes.q.max(), self.classes.prior.softmax(0).max()
        moved = [np.abs(np.subtract(b["p"], a["p"])).sum() / 2 > share / 2 for a, b in itertools.pairwise(history)]
        if share and most > 0.99 and most > at_first:
            return "CFOL's distribution has collapsed onto one class: its step size (drift or eta) is too large"
        if share and any(first and then for first, then in itertools.pairwise(moved)):
            return "CFOL's distribution jumps from class to class: its step size (drift or eta) is too large"
        return ""

    def trace(self) -> dict[str, Tensor]:
        return {"p": self.classes.p}


@register("fol")
class FOL(Method):
    """Exp3 over examples (Shalev-Shwartz and Wexler 2016): CFOL's rule, with the N examples for the K classes.

    Default drift: 5e-7 * 40,000 * 200 = 4, as released.
    """

    def __init__(self, *run, gamma: float = 0.5, eta: float | None = None, drift: float = 4.0, **named):
        super().__init__(*run, **named)
        labels, _, seed, examples = self.run
        self.sampler = ExampleSampler(len(labels), gamma, step_size(eta, drift, examples), seed)
        self.register_buffer("labels", labels, persistent=False)

    def after_step(self, batch: Batch) -> None:
        self.sampler.update(batch.index, _wrong(batch))

    def trace(self) -> dict[str, Tensor]:
        p = self.sampler.p
        return {"p": torch.zeros(self.num_classes, dtype=p.dtype, device=p.device).index_add_(0, self.labels, p)}

"""Worst-class adversarial training (Li and Liu, AAAI 2023): no regret against the best class weights in hindsight."""

from __future__ import annotations

import torch
from torch import Tensor

from cfol_nb.methods import Batch, Method, not_negative, register


def hedge(costs: Tensor, eta: float) -> Tensor:
    """(K + 1,) K softmax(eta S) of summed costs S of K classes and of their average, the last expert."""
    return (len(costs) - 1) * (eta * costs).softmax(0)


@register("wat")
class WAT(Method):
    """Weights of the losses v_y ~ w_y + w_{K+1}, w = K softmax(eta S). After each look S grows by the class means of
    the objective's loss on the held-out split, CE + beta KL with TRADES, and by their average for expert K + 1.

    eta: 0.1 per nat and look; the authors look after each of 100 epochs (validate_every=1), at 300 images a class.
    Without a KL the loss is the CE under attack. v is divided by its mean over the classes: the authors' loss is
    2K / (K + 1) times as large as their baseline's, in the first epoch twice. Their sums are lost when a run is
    resumed; these are its state.
    """

    asks = frozenset({"losses"})

    def __init__(self, *run, eta: float = 0.1, **named):
        super().__init__(*run, **named)
        not_negative(eta=eta)
        self.eta = eta
        self.register_buffer("costs", torch.zeros(self.num_classes + 1, dtype=torch.float64))

    def weights(self) -> Tensor:
        """(K,) of the classes, 1 in the mean."""
        w = hedge(self.costs, self.eta)
        v = w[:-1] + w[-1]
        return v / v.mean()

    def weigh(self, batch: Batch) -> Tensor:
        return self.weights()[batch.y]

    def after_epoch(self, epoch: int, report: dict[str, Tensor]) -> None:
        beta = self.context.beta
        cost = report["robust ce"] if beta is None else report["ce"] + beta * report["kl"]
        self.costs += torch.cat([cost, cost.mean().unsqueeze(0)])

    def trace(self) -> dict[str, Tensor]:
        return {"weights": self.weights()}

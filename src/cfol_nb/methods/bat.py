"""Balance adversarial training (Sun et al., AAAI 2023): an objective on two images of the attack's way, just before the
boundary and just beyond it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfol_nb.attacks import kl
from cfol_nb.objectives import OBJECTIVES, TRADES, as_is


def _choose(take: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(take.view(-1, *[1] * (a.ndim - 1)), a, b)


class BAT(TRADES):
    """CE(last) + beta KL(x || first) + KL(last || U) + KL(first || U), U uniform over the classes; attack as of TRADES.

    last: the iterate before the first wrong one, the start if that is wrong, the end if none is. first: the iterate
    that is wrong for the time tau + 1, the end if there is none; it judges the example. beta 6 and tau 1 are those of
    the authors' code, whose two attacks from the same start are one here. It is meant for attacks of several steps.
    """

    def __init__(self, beta: float = 6.0, tau: int = 1):
        super().__init__(beta)
        if tau < 0:
            raise ValueError(f"tau={tau} of bat is not at least 0")
        self.tau = tau

    def images(self, attack: Callable[..., Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        last, first, times = None, x, torch.zeros_like(y)

        def watch(a: Tensor, z: Tensor) -> None:
            nonlocal last, first, times
            wrong = z.argmax(1) != y
            times = times + wrong
            last = a if last is None else _choose(times == 0, a, last)
            first = _choose(wrong & (times == self.tau + 1), a, first)

        end = attack(watch)
        return _choose(times == 0, end, last), _choose(times <= self.tau, end, first)

    def __call__(
        self, model: nn.Module, x: Tensor, x_adv, y: Tensor, adjust=as_is, boundary=None, smoothing=0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        last, logits, clean = model(x_adv[0]), model(x_adv[1]), model(x)
        between = kl(clean, logits)
        between = between if boundary is None else between * boundary.to(between)
        fit = F.cross_entropy(adjust(last, y), y, reduction="none", label_smoothing=smoothing)
        flat = kl(last, torch.zeros_like(last)) + kl(logits, torch.zeros_like(logits))
        return fit + self.beta * between + flat, logits, clean


OBJECTIVES["bat"] = BAT

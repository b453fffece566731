"""Fairness-aware adversarial learning (Zhang et al., CVPR 2024): fine-tuning on the worst mixture of classes near the
uniform one, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from cfol_nb.attacks import margin
from cfol_nb.methods import Batch, Method, not_negative, register


def worst_mixture(a: Tensor, r: float) -> Tensor:
    """(K,) the p that maximises sum p_c a_c over the simplex with KL(U || p) <= r nats, U uniform; U where all a are
    equal. a: (K,). No gradient.

    The conditions of Karush, Kuhn and Tucker make p_c ~ 1 / (nu - a_c), nu > max a, with the KL falling in nu. Here 60
    halvings find log (nu - max a), in units of max a - min a, to rounding, without waiting for the device.
    """
    with torch.no_grad():
        gap = a.max() - a.double()
        gap = gap / gap.max().clamp_min(torch.finfo(gap.dtype).tiny)
        low, high = (torch.full_like(gap[0], end) for end in (-60.0, 20.0))

        def mixture(at: Tensor) -> Tensor:
            q = 1 / (at.exp() + gap)
            return q / q.sum()

        for _ in range(60):
            middle = (low + high) / 2
            far = -(len(a) * mixture(middle)).log().mean() > r
            low, high = torch.where(far, middle, low), torch.where(far, high, middle)
        return mixture(high)


@register("faal")
class FAAL(Method):
    """Weights K p_y of the losses, p the `worst_mixture` of the sums, class by class over the batch, of the softmax
    margin max_{j != y} s_j - s_y of what is judged; a class that is not in the batch has 0.

    r: how far p may be from uniform, 0.5 nats. The authors fine-tune a robust network for 2 epochs at lr 0.01, then
    0.001: give the run a parent; FAAL-AWP is the run's setting awp=0.005. They solve by cvxpy, and in AT also pass the
    clean images through the network in training mode, which moves its batch statistics; these do neither.
    """

    needs_parent = True

    def __init__(self, *run, r: float = 0.5, **named):
        super().__init__(*run, **named)
        not_negative(r=r)
        self.r = r

    def weigh(self, batch: Batch) -> Tensor:
        m = margin(batch.logits.detach().double().softmax(1), batch.y)
        a = m.new_zeros(self.num_classes).index_add(0, batch.y, m)
        return self.num_classes * worst_mixture(a, self.r)[batch.y]

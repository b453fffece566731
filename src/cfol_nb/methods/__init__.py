"""Given what each class suffered, how shall the next step treat it? One file per family of methods."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cfol_nb.samplers import Shuffle

METHODS: dict[str, type[Method]] = {}


class Method(nn.Module):
    """Plain empirical risk minimisation; subclasses turn what they need. Buffers are the state.

    labels: (N,) int64 of the training images. num_classes: K. seed: of the draws. examples: how many the whole run
    will see, counting repeats. Subclasses pass these on as `*run, **named`; what else they take are their options.
    """

    needs_parent = False  # whether it makes sense only for a run that starts from another one's weights
    needs_objective: str | None = None  # the only objective that it makes sense for

    def __init__(self, labels: Tensor, num_classes: int, seed: int = 0, examples: int = 0):
        super().__init__()
        self.run = labels, num_classes, seed, examples
        self.num_classes = num_classes
        self.sampler: nn.Module = Shuffle(len(labels), seed)

    def start(self, model: nn.Module) -> None:
        """What happens to the model, in training mode, before the first step, and when an interrupted run goes on."""

    def draw(self, n: int) -> Tensor:
        """(n,) int64: the indices of the next batch."""
        return self.sampler.draw(n)

    def radius(self, y: Tensor) -> Tensor | None:
        """(n,) factors on the attack's radius and step; None for 1."""
        return None

    def boundary(self, y: Tensor) -> Tensor | None:
        """(n,) factors on the second term of an objective that has two, as TRADES has; None for 1."""
        return None

    def adjust(self, logits: Tensor, y: Tensor) -> Tensor:
        """The logits (n, K) for the objective's cross-entropy; attack and evaluation see them as they are."""
        return logits

    def reduce(self, losses: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        """Losses (n,) to the scalar that is minimised."""
        return losses.mean()

    def after_step(self, index: Tensor, y: Tensor, logits: Tensor) -> None:
        """What the batch suffered: its logits (n, K), before the step. Never waits for the device."""

    def after_epoch(self, epoch: int, report: dict[str, Tensor]) -> None:
        """Class accuracies (K,) on the held-out split under the keys "clean" and "robust"."""

    def complaint(self, history: Sequence[Mapping]) -> str:
        """What the user should know of this method's state; empty if nothing. Asked after each epoch; history: one dict
        per epoch so far, with what `trace` said."""
        return ""

    def trace(self) -> dict[str, Tensor]:
        """What is worth noting each epoch, indexed by class: name -> (K,)."""
        return {}


def register(name: str):
    """Make `method={"name": name, ...}` build the decorated `Method`."""

    def add(cls: type[Method]) -> type[Method]:
        METHODS[name] = cls
        return cls

    return add


register("erm")(Method)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

"""Given what each class suffered, how shall the next step treat it? One file per family of methods."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cfol_nb.config import method_parts, of_its_kind, options
from cfol_nb.samplers import Shuffle

METHODS: dict[str, type[Method]] = {}
GIVEN = frozenset({"labels", "num_classes", "seed", "examples", "context"})  # what no user gives


@dataclass(frozen=True)
class Context:
    """What a method may know of its run; 0 is what is not known yet."""

    epochs: int = 0
    per_epoch: int = 0  # steps of an epoch
    beta: float | None = None  # weight of the objective's second term, where there is one
    eps: float = 0.0  # radius of the training attack
    step: float = 0.0  # its step
    steps: int = 0  # how many
    optimizer: str = ""  # its name


def not_negative(**options: float) -> None:
    """Raises ValueError for an option that is not a finite number of at least 0."""
    for name, value in options.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} is not a finite number >= 0")


class Batch(NamedTuple):
    """What is known of a step's images. `aim` sees what is known before the attack: index, y, clean, teacher.

    clean: logits of the clean images, where there are any: the objective's own, else, for a method that asks, those of
    the network in eval mode before the step, which are also what `aim` sees. right: whether the attack's iterates,
    the start first and the end not among them, are classified rightly, for a method that asks; the iterates survived
    are its sum over dim 1.
    """

    index: Tensor  # (n,) int64
    y: Tensor  # (n,) int64
    logits: Tensor | None = None  # (n, K) that judge the example: with gradient in weigh and reduce, not in after_step
    clean: Tensor | None = None  # (n, K)
    right: Tensor | None = None  # (n, steps) bool
    teacher: Tensor | None = None  # (n, K) of the clean images


class Method(nn.Module):
    """Plain empirical risk minimisation; subclasses turn what they need. Buffers are the state.

    labels: (N,) int64 of the training images. num_classes: K. seed: of the draws. examples: how many the whole run
    will see, counting repeats. Subclasses pass these on as `*run, **named`; what else they take are their options.

    aim, radius, soften, boundary, adjust, weigh and reduce are part of the step, which a CUDA graph records once: no
    Python branch on what changes in the run, no shape that depends on values; what changes is a buffer, changed in
    place by after_step, epoch_end and after_epoch.
    """

    needs_parent = False  # whether it makes sense only for a run that starts from another one's weights
    needs_objective: str | None = None  # the only objective that it makes sense for
    # What it wants and costs something. Of the batch: "clean", "right", "teacher". Of the report: "losses"; "start",
    # a look before the first step. "attack", as "right": an objective that has one.
    asks: frozenset[str] = frozenset()

    def __init__(
        self, labels: Tensor, num_classes: int, seed: int = 0, examples: int = 0, context: Context | None = None
    ):
        super().__init__()
        self.run = labels, num_classes, seed, examples
        self.context = context or Context()
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

    def aim(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """(n,) int64 classes that the attack moves the images towards, by their cross-entropy; -1, and None for all: it
        attacks the objective's loss. generator: the one to draw from, if need be."""
        return None

    def soften(self, teacher: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """From the teacher's logits (n, K) those that teach the adversarial image, which the attack sees, too, and
        those that teach the clean one."""
        return teacher, teacher

    def boundary(self, y: Tensor) -> Tensor | None:
        """(n,) factors on the second term of an objective that has two, as TRADES has; None for 1."""
        return None

    def adjust(self, logits: Tensor, y: Tensor) -> Tensor:
        """The logits (n, K) for the objective's cross-entropy; attack and evaluation see them as they are."""
        return logits

    def weigh(self, batch: Batch) -> Tensor | None:
        """(n,) factors on the losses; None for 1."""
        return None

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """Losses (n,), already weighed, to the scalar that is minimised."""
        return losses.mean()

    def after_step(self, batch: Batch) -> None:
        """What the batch suffered, before the step. Never waits for the device."""

    def epoch_end(self, epoch: int) -> None:
        """After the last step of every epoch; epoch: 1, 2, ... Before `after_epoch`, where there is a look."""

    def after_epoch(self, epoch: int, report: dict[str, Tensor]) -> None:
        """After a look at the held-out split: at the end of an epoch, or before the first step (0) if asked for.

        report: "clean" and "robust", class accuracies (K,); "clean confusion" and "robust confusion", (K, K) numbers of
        images, true classes in rows; if asked for, class means (K,) of losses under the objective's attack: "ce" of
        the clean and "robust ce" of the adversarial images, "kl" between them. On the device, in float64.
        """

    def average(self, report: dict[str, Tensor]) -> float | Tensor | None:
        """After a look, the d of average <- d average + (1 - d) weights, of the weights that are kept as "averaged": 1
        leaves the average as it is, 0 starts it anew. None: there is none."""
        return None

    def complaint(self, history: Sequence[Mapping]) -> str:
        """What the user should know of this method's state; empty if nothing. Asked after each epoch; history: one dict
        per epoch so far, with what `trace` said."""
        return ""

    def trace(self) -> dict[str, Tensor]:
        """What is worth noting each epoch, indexed by class: name -> (K,)."""
        return {}


# Hooks that no two methods of a run may have, and what they are.
_ALONE = {
    "draw": "draws the images",
    "aim": "aims the attack",
    "soften": "softens the teacher",
    "adjust": "changes the logits of the loss",
    "reduce": "sums the losses up",
    "average": "averages the weights",
}


class Composed(Method):
    """Several methods in one run: radii, boundaries and weights multiply, all hear of everything.

    Each other knob (_ALONE) is turned by one of them at most. ValueError where that, or their objectives, do not fit.
    """

    def __init__(self, parts: Mapping[str, Method]):
        nn.Module.__init__(self)
        self.names, self.parts = list(parts), nn.ModuleList(parts.values())
        self.num_classes, self.context = self.parts[0].num_classes, self.parts[0].context
        self.needs_parent = any(m.needs_parent for m in self.parts)
        self.asks = frozenset().union(*(m.asks for m in self.parts))
        objectives = {m.needs_objective: name for name, m in parts.items() if m.needs_objective}
        if len(objectives) > 1:
            (a, one), (b, other), *_ = objectives.items()
            raise ValueError(f"{one!r} needs the objective {a!r}, {other!r} {b!r}: they do not go together")
        self.needs_objective = next(iter(objectives), None)
        for hook, does in _ALONE.items():
            having = [name for name, m in parts.items() if self._turns(m, hook)]
            if len(having) > 1:
                raise ValueError(f"{having[0]!r} and {having[1]!r} do not go together: each {does} in its own way")
            setattr(self, hook, getattr(parts[having[0] if having else self.names[0]], hook))

    @staticmethod
    def _turns(method: Method, hook: str) -> bool:
        own = getattr(type(method), hook) is not getattr(Method, hook)
        return own or (hook == "draw" and not isinstance(method.sampler, Shuffle))

    def _product(self, hook: str, *given) -> Tensor | None:
        factors = [f for m in self.parts if (f := getattr(m, hook)(*given)) is not None]
        return math.prod(factors[1:], start=factors[0]) if factors else None

    def _all(self, hook: str, *given) -> list:
        return [getattr(m, hook)(*given) for m in self.parts]

    def start(self, model: nn.Module) -> None:
        self._all("start", model)

    def radius(self, y: Tensor) -> Tensor | None:
        return self._product("radius", y)

    def boundary(self, y: Tensor) -> Tensor | None:
        return self._product("boundary", y)

    def weigh(self, batch: Batch) -> Tensor | None:
        return self._product("weigh", batch)

    def after_step(self, batch: Batch) -> None:
        self._all("after_step", batch)

    def epoch_end(self, epoch: int) -> None:
        self._all("epoch_end", epoch)

    def after_epoch(self, epoch: int, report: dict[str, Tensor]) -> None:
        for m in self.parts:
            if epoch or "start" in m.asks:
                m.after_epoch(epoch, report)

    def complaint(self, history: Sequence[Mapping]) -> str:
        return "; ".join(filter(None, self._all("complaint", history)))

    def trace(self) -> dict[str, Tensor]:
        """A name that two of them use has the method's before it from the second on."""
        found: dict[str, Tensor] = {}
        for name, traced in zip(self.names, self._all("trace"), strict=True):
            found |= {f"{name} {k}" if k in found else k: v for k, v in traced.items()}
        return found


def build_method(
    spec: Mapping, labels: Tensor, num_classes: int, seed: int = 0, examples: int = 0, context: Context | None = None
) -> Method:
    """The method of a run, or several composed. ValueError for what is unknown, refused, or does not go together."""
    made = {}
    for part in method_parts(spec):
        own, name = options("method", part, METHODS, given=GIVEN), part["name"]
        with of_its_kind("method", part):
            made[name] = METHODS[name](labels, num_classes, seed, examples, context=context, **own)
    return Composed(made) if len(made) > 1 else made[name]


def register(name: str):
    """Make `method={"name": name, ...}` build the decorated `Method`."""

    def add(cls: type[Method]) -> type[Method]:
        METHODS[name] = cls
        return cls

    return add


register("erm")(Method)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

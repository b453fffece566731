"""Outcomes: what a model predicts on every image, clean and under every attack. Statistics come later, in `stats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from cfol_nb.attacks import check_images, evaluating, pgd
from cfol_nb.config import Attack


@dataclass(frozen=True)
class Outcomes:
    """labels: (N,) int64. predictions: attack name -> (N,) int64, "clean" first. attacks: their settings."""

    labels: np.ndarray
    predictions: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    attacks: dict[str, dict] = field(default_factory=dict)

    def correct(self, attack: str) -> np.ndarray:
        """(N,) bool. Raises KeyError for an attack that was not run."""
        if attack not in self.predictions:
            raise KeyError(f"no attack {attack!r} in these outcomes (there are: {', '.join(self.predictions)})")
        return self.predictions[attack] == self.labels

    def tensors(self) -> dict[str, Tensor]:
        return {
            "labels": torch.from_numpy(self.labels),
            **{f"prediction.{k}": torch.from_numpy(v) for k, v in self.predictions.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: dict) -> Outcomes:
        return cls(
            tensors["labels"].numpy(),
            {k: tensors[f"prediction.{k}"].numpy() for k in ("clean", *meta["order"])},
            tuple(meta["class_names"]),
            {k: meta["attacks"][k] for k in meta["order"]},
        )

    def meta(self) -> dict:
        return {"class_names": list(self.class_names), "attacks": self.attacks, "order": list(self.attacks)}


def as_float(images: Tensor, dtype: torch.dtype, device) -> Tensor:
    """uint8 images divided by 255, floating ones as they are, on the device in the given type."""
    x = images.to(device)
    return x.to(dtype).div_(255) if x.dtype == torch.uint8 else x.to(dtype)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Mapping | Attack] | None = None,
    *,
    class_names=None,
    batch_size: int = 500,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Outcomes:
    """Predictions on clean images and under each attack.

    model: maps images in [0, 1] to logits; attacked and judged in eval mode, in its own floating type, unchanged after.
    images: (N, C, H, W) uint8, or floating point in [0, 1]. labels: (N,) int64.
    attacks: name -> options of `pgd` (eps, step, steps, norm, loss, restarts, random_start); by default PGD-20 with
    step 1/255 at L-inf 8/255. seed: of the random starts. progress: called with the number of images done at a time.
    Raises ValueError for images outside [0, 1] and labels that are no class of the model, FloatingPointError for logits
    that are not finite.
    """
    if attacks is None:
        attacks = {"pgd20": {"eps": 8 / 255, "step": 1 / 255, "steps": 20}}
    attacks = {k: Attack.model_validate(dict(v)) for k, v in attacks.items()}
    labels = torch.as_tensor(labels).cpu().long()
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"{len(images)} images and {len(labels)} labels: as many of each, and at least one, are needed"
        )
    if images.dtype != torch.uint8:
        check_images(images)
    tensor = next(model.parameters(), torch.empty(0))
    predictions = {k: [] for k in ("clean", *attacks)}
    generators = {k: torch.Generator(tensor.device).manual_seed(seed) for k in attacks}
    with evaluating(model):
        for i in range(0, len(labels), batch_size):
            x = as_float(images[i : i + batch_size], tensor.dtype, tensor.device)
            y = labels[i : i + batch_size].to(tensor.device)
            with torch.no_grad():
                logits = model(x)
            if i == 0 and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
                raise ValueError(
                    f"labels reach from {int(labels.min())} to {int(labels.max())}, "
                    f"but the model has {logits.shape[1]} outputs"
                )
            if class_names is not None and len(class_names) != logits.shape[1]:
                raise ValueError(f"{len(class_names)} class names, but the model has {logits.shape[1]} outputs")
            if not logits.isfinite().all():
                raise FloatingPointError("the model's logits are not finite: it diverged, or its weights are damaged")
            predictions["clean"].append(logits.argmax(1).cpu())
            for name, attack in attacks.items():
                x_adv = pgd(model, x, y, generator=generators[name], check=False, **dict(attack))
                with torch.no_grad():
                    predictions[name].append(model(x_adv).argmax(1).cpu())
            if progress:
                progress(len(y))
    k = logits.shape[1]
    return Outcomes(
        labels.numpy(),
        {n: torch.cat(p).numpy() for n, p in predictions.items()},
        tuple(map(str, class_names if class_names is not None else range(k))),
        {n: a.model_dump() for n, a in attacks.items()},
    )

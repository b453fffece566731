"""Predictions of a model on clean images and under attacks, as `Outcomes`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfol_nb.attacks import admit, answers, as_float, as_labels, evaluating, kl, pgd, predict, repeating, weight_of
from cfol_nb.autoattack import Evaluation, interleaved
from cfol_nb.checks import IMAGES, black_box_check, checklist
from cfol_nb.config import Attack, AutoAttack, as_attack
from cfol_nb.outcomes import Outcomes


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Mapping | Attack | AutoAttack] | None = None,
    *,
    class_names=None,
    batch_size: int = 500,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    folder: Path | None = None,
    checks: int = IMAGES,
) -> Outcomes:
    """Predictions on clean images and under each attack, and signs by which one sees that they cannot be trusted.

    model: maps images in [0, 1] to logits; attacked and judged in eval mode, in its own floating type, unchanged after.
    images: (N, C, H, W) uint8, or floating point in [0, 1]. labels: (N,) int64.
    attacks: name -> options of `pgd` (eps, step, steps, norm, loss, restarts, random_start, retire), by default PGD-20
    with step 1/255 at L-inf 8/255; or of AutoAttack (eps, norm, version="standard" | "fast"), which also gives the
    outcomes up to each of its attacks, as "name:apgd-ce" and so on. seed: of the random starts. progress: called with
    the number of images done at a time. folder: where AutoAttack keeps its state, to go on from it if it is killed.
    checks: on so many images (at most a batch, or 20), all classes alike, `checks.checklist` is gone through first, in
    the ball of the last attack; its verdicts are in the outcomes. Some 350 passes of each and a moment more; 0: none,
    as is needed for a model that takes batches of one size only.
    Raises ValueError for images outside [0, 1] and labels that are no class of the model, FloatingPointError for logits
    of clean images that are not finite. Where they are lost under an attack, the image counts as wrong.
    """
    if attacks is None:
        attacks = {"pgd20": {"eps": 8 / 255, "step": 1 / 255, "steps": 20}}
    if "clean" in attacks:
        raise ValueError("an attack cannot be called 'clean': that is what the model says without one")
    attacks = {k: as_attack(v) for k, v in attacks.items()}
    images, labels = admit(model, images), as_labels(labels)
    steps = {k: a for k, a in attacks.items() if isinstance(a, Attack)}
    clean, k = predict(model, images, labels, class_names=class_names, batch_size=batch_size)
    if attacks and checks:  # first: a model that cannot be checked is refused before the expensive part
        *_, last = attacks.values()
        some = interleaved(labels, seed)[: min(checks, max(20, batch_size))]
        found = checklist(model, images[some], labels[some], last.eps, last.norm)
    tensor = weight_of(model)
    predictions = {k: [] for k in steps}
    generators = {k: torch.Generator(tensor.device).manual_seed(seed) for k in steps}
    with evaluating(model), repeating():
        for i in range(0, len(labels), batch_size):
            x = as_float(images[i : i + batch_size], tensor.dtype, tensor.device)
            y = labels[i : i + batch_size].to(tensor.device)
            for name, attack in steps.items():
                x_adv = pgd(model, x, y, generator=generators[name], check=not i, **dict(attack))
                with torch.no_grad():
                    predictions[name].append(answers(model(x_adv), y).cpu())
            if progress:
                progress(len(y))
    out = Outcomes(
        labels.numpy(),
        {"clean": clean.numpy()},
        tuple(map(str, class_names if class_names is not None else range(k))),
        {},
    )
    for name, attack in attacks.items():
        if name in steps:
            out.add(name, torch.cat(predictions[name]).numpy(), attack.model_dump())
        else:
            e = Evaluation(model, images, labels, attack, batch_size=batch_size, seed=seed, folder=folder)
            out.add_autoattack(name, e.run())
    if attacks and checks:
        out.checks[name] = pd.concat([found, black_box_check(out, name)], ignore_index=True)
    return out


def class_losses(
    model: nn.Module, images: Tensor, labels: Tensor, num_classes: int, attack: Mapping, seed: int = 0
) -> dict[str, Tensor]:
    """Class means (K,), in float64, of losses: "ce" of the clean and "robust ce" of the adversarial images, and "kl",
    from the clean prediction to the adversarial one. attack: options of `pgd`; other arguments as of `evaluate`."""
    tensor, parts = weight_of(model), []
    generator = torch.Generator(tensor.device).manual_seed(seed)
    with evaluating(model), repeating():
        for i in range(0, len(labels), 500):
            x = as_float(images[i : i + 500], tensor.dtype, tensor.device)
            y = labels[i : i + 500].to(tensor.device)
            x_adv = pgd(model, x, y, generator=generator, check=False, **attack)
            with torch.no_grad():
                clean, robust = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (model(x), model(x_adv)))
                ce = [F.cross_entropy(z, y, reduction="none") for z in (clean, robust)]
                parts.append(torch.stack([*ce, kl(clean, robust)]).double())
    sums = torch.zeros(3, num_classes, dtype=torch.float64, device=tensor.device)
    sums.index_add_(1, labels.to(tensor.device), torch.cat(parts, 1))
    means = sums / torch.bincount(labels, minlength=num_classes).clamp_min(1).to(sums)
    return dict(zip(("ce", "robust ce", "kl"), means, strict=True))

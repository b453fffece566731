"""Models without gradients (quantised, a forest, another program): what attacks find that only ask for answers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cfol_nb import stats
from cfol_nb.attacks import admit, answers, as_float, as_labels, evaluating, predict, weight_of
from cfol_nb.audit import page
from cfol_nb.audit.foreign import needed
from cfol_nb.autoattack import QUERIES, Batch, square
from cfol_nb.config import AutoAttack
from cfol_nb.outcomes import Outcomes

STEPS = 20  # of HopSkipJump: of the library's 64, which take some 30,000 queries an image


def black_box(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    eps: float,
    norm: str = "linf",
    queries: int = QUERIES,
    batch_size: int = 250,
    seed: int = 0,
) -> Outcomes:
    """Predictions clean, under Square (queries of scores), and on what that left under HopSkipJump (Chen et al. 2020,
    by foolbox; decisions alone), which starts from the nearest image that the model takes for another class.

    What is left is an upper bound: an attack with gradients may break all of it. Arguments as for `audit`.
    """
    foolbox, spec = needed("foolbox", "blackbox"), AutoAttack(eps=eps, norm=norm, version="standard")
    labels, images = as_labels(labels), admit(model, images)
    clean, _ = predict(model, images, labels, class_names=class_names, batch_size=batch_size)
    tensor, after = weight_of(model), {k: clean.clone() for k in ("square", "hopskipjump")}
    torch.manual_seed(seed)  # foolbox draws from torch's own generator
    with evaluating(model), torch.no_grad():
        theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device=tensor.device)
        decide = foolbox.attacks.HopSkipJumpAttack(steps=STEPS, constraint=norm)
        generator = torch.Generator(tensor.device).manual_seed(seed)
        for rows in (clean == labels).nonzero().squeeze(1).split(batch_size):
            x, y = as_float(images[rows], tensor.dtype, tensor.device), labels[rows].to(tensor.device)
            points = square(Batch(model, x, y, None, spec.eps, norm, generator, lambda *_, **__: None), queries)
            after["square"][rows] = answers(model(points), y).cpu()
            left = (after["square"][rows] == labels[rows]).nonzero().squeeze(1)
            after["hopskipjump"][rows] = after["square"][rows]
            start = _others(images, clean, x[left], labels[rows[left]])
            if len(left) and start is not None:
                found, *_ = decide(theirs, x[left], y[left], epsilons=None, starting_points=start.to(x))
                d = (found - x[left]).flatten(1)
                size = d.abs().amax(1) if norm == "linf" else d.norm(dim=1)
                told = torch.where(size <= spec.eps, answers(model(found), y[left]), y[left])
                after["hopskipjump"][rows[left]] = told.cpu()
    k = int(labels.max()) + 1  # after them outputs that no image is of, which compete
    out = Outcomes(labels.numpy(), {"clean": clean.numpy()}, tuple(class_names[:k]), others=tuple(class_names[k:]))
    about = {"eps": spec.eps, "norm": norm, "seed": seed}
    out.add("square", after["square"].numpy(), {**about, "queries": queries})
    out.add("hopskipjump", after["hopskipjump"].numpy(), {**about, "after": "square", "steps": STEPS})
    return out


def _others(images: Tensor, predicted: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
    """For each image the nearest one that is taken for another class than its own; None if there is none."""
    starts = []
    for image, label in zip(x, y.tolist(), strict=True):
        rows = (predicted != label).nonzero().squeeze(1)
        if not len(rows):
            return None
        far = (as_float(images[rows], x.dtype, x.device) - image).flatten(1).norm(dim=1)
        starts.append(as_float(images[rows[far.argmin()]], x.dtype, x.device))
    return torch.stack(starts) if starts else None


def told(outcomes: Outcomes) -> str:
    """The verdict, which says what it is not."""
    t, settings = stats.class_table(outcomes), outcomes.attacks["hopskipjump"]
    least = t.loc[t["accuracy"].idxmin()]
    share, low, high = (f"{100 * least[k]:.1f}" for k in ("accuracy", "low", "high"))
    mean = f"{100 * t['accuracy'].mean():.1f}"
    return (
        "Black-box audit, without gradients: Square and HopSkipJump alone "
        f"({settings['norm']}, {settings['eps']:.4g}). The weakest class is {least['class']}: they leave {share} % "
        f"[{low}, {high}] of its {least['n']} images right, of all classes {mean} % on average. An attack that uses "
        "gradients of the model, or of one like it, may break much more: these are upper bounds."
    )


def table(outcomes: Outcomes):
    """One row per class, weakest first, as text: per cent, with Wilson's 95 % interval of the last."""
    t = stats.class_table(outcomes)
    out = t[["class", "n"]].copy()
    for name in ("clean", "square"):
        out[name] = [f"{100 * v:.1f}" for v in stats.accuracies(outcomes, name)]
    ends = zip(t["accuracy"], t["low"], t["high"], strict=True)
    out["hopskipjump"] = [f"{100 * v:.1f} [{100 * a:.1f}, {100 * b:.1f}]" for v, a, b in ends]
    return out.iloc[t["accuracy"].argsort(kind="stable")]


def write(outcomes: Outcomes, name: str, path: Path) -> Path:
    """One page that needs nothing else."""
    title = f"{name}: black-box robustness of each class"
    body = [f"<h1>{html.escape(title)}</h1><p class=v>{html.escape(told(outcomes))}</p>"]
    return page.write(path, name, [*body, page.table("Classes, weakest first: per cent [95 %]", table(outcomes))])

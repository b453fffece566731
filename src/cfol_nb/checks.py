"""Can the numbers of an evaluation be trusted? A checklist with verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn

from cfol_nb.attacks import LOSSES, answers, as_float, evaluating, margin, pgd, repeating, weight_of
from cfol_nb.models import build, initialised_from
from cfol_nb.outcomes import COLUMNS, Outcomes

IMAGES, PASSES = 100, 350  # in the checklist of an evaluation; of each, and a moment more


def short_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, steps: int, **more) -> Tensor:
    """PGD that reaches the ball's border in so many steps, the same at every call; more: as of `attacks.pgd`."""
    generator = torch.Generator(x.device).manual_seed(0)
    step = max(eps / 4 if steps < 10 else 2.5 * eps / steps, 1e-12)
    return pgd(model, x, y, eps, step, steps, norm, generator=generator, check=False, **more)


def _surrogate(model: nn.Module, x: Tensor) -> nn.Module:
    """A small CNN that was taught the model's own predictions on x for a moment: a source of transferred attacks."""
    with torch.no_grad():
        z = model(x)
    with initialised_from(0):
        student = build("smallcnn", num_classes=z.shape[1], channels=x.shape[1]).to(x)
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(100):
            i = torch.randint(len(x), (32,), generator=generator).to(x.device)
            optimizer.zero_grad()
            F.cross_entropy(student(x[i]), z[i].argmax(1)).backward()
            optimizer.step()
    return student.eval()


def rarer(after: Tensor, before: Tensor) -> bool:
    """Not clearly more right answers after than before, (N,) bool of the same images (McNemar's exact test, 1 %)."""
    more, fewer = int((after & ~before).sum()), int((before & ~after).sum())
    return more == 0 or binomtest(more, more + fewer, 0.5, "greater").pvalue >= 0.01


def checklist(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float = 8 / 255,
    norm: str = "linf",
    *,
    surrogate: nn.Module | None = None,
) -> pd.DataFrame:
    """Signs that an evaluation cannot be trusted (Carlini et al. 2019; Croce and Hein 2020): check, verdict, seen.

    images, labels: some, a hundred or two; attacked are those of them that are classified correctly.
    surrogate: another model, whose adversarial images are transferred; by default a small one that is taught the
    model's predictions here.
    verdict: "ok", "look" (a reason to look closer) or "fail" (do not quote the numbers).
    """
    tensor = weight_of(model)
    x, y = as_float(images, tensor.dtype, tensor.device), labels.to(tensor.device)
    rows: list[tuple[str, str, str]] = []

    def say(check: str, fine: bool, seen: str, otherwise: str = "fail") -> None:
        rows.append((check, "ok" if fine else otherwise, seen))

    def right(a: Tensor) -> Tensor:
        return answers(model(a), y) == y

    with evaluating(model), repeating(), torch.no_grad():
        z = model(x)
        k, scale = z.shape[1], z.std().clamp_min(1e-12)
        again = max(((model(x) - z).abs().max() / scale).item() for _ in range(3))
        say("the same images give the same logits", again < 1e-3, f"largest difference {again:.1e} of their spread")
        order = torch.arange(len(x) - 1, -1, -1, device=x.device)[: max(1, len(x) // 2)]
        alone = ((model(x[order]) - z[order]).abs().max() / scale).item()
        say("an image's logits do not depend on its batch", alone < 1e-3, f"largest difference {alone:.1e}")
        sums = bool((z >= 0).all()) and bool(((z.sum(1) - 1).abs() < 1e-3).all())
        say(
            "the outputs are logits, not probabilities", not sums, "sums of 1" if sums else f"spread {scale.item():.2g}"
        )
        keep = z.argmax(1) == y
        chance = binomtest(int(keep.sum()), len(x), 1 / k, "greater").pvalue
        share = f"{100 * keep.double().mean().item():.0f} % of {len(x)} images, {k} classes"
        lost = "fail" if keep.double().mean() <= 1 / k else "look"  # few images tell little
        say("clean accuracy is above chance", chance < 0.01, share, lost)
        if not keep.any():
            return pd.DataFrame(rows, columns=COLUMNS, dtype=str)
        x, y, z = x[keep], y[keep], z[keep]

        def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
            a = x.clone().requires_grad_()
            with torch.enable_grad():
                (g,) = torch.autograd.grad(loss(model(a)).sum(), a, allow_unused=True)
            return (torch.zeros_like(x) if g is None else g).flatten(1)

        def none(g: Tensor) -> float:
            return (g == 0).all(1).double().mean().item()

        of_margin, of_ce = gradient(lambda z: margin(z, y)), gradient(lambda z: LOSSES["ce"](z, y, None))
        zero, gone = none(of_margin), none(of_ce)
        odd = (~(of_margin.isfinite() & of_ce.isfinite())).any(1).double().mean().item()
        flat = gradient(lambda z: z[:, 0] - z.mean(1))
        say("gradients are finite", odd == 0, f"infinite or no number for {100 * odd:.0f} % of images")
        say("gradients of the margin are not zero", zero == 0, f"zero for {100 * zero:.0f} % of images")
        say(
            "gradients of the cross-entropy are not zero",
            gone < 0.05,
            f"zero for {100 * gone:.0f} % of images"
            + (" (saturated: trust the margin losses)" if gone >= 0.05 else ""),
            "look",
        )
        same = bool(len(x) > 1 and (flat - flat[0]).abs().max() <= 1e-6 * flat.abs().max())
        alike = "all alike: the model is linear" if flat.any() else "all zero"
        say("gradients differ between images", not same, alike if same else "they do", "look")

        losses, held, lost = [], [], 0
        for steps in (1, 5, 20, 100):
            z = model(short_pgd(model, x, y, eps, norm, steps, best=True))
            losses.append(F.cross_entropy(z, y).item())
            held.append(answers(z, y) == y)
            lost = max(lost, (~z.isfinite()).any(1).double().mean().item())
        say("logits stay finite under attack", lost == 0, f"infinite or no number for {100 * lost:.0f} % of images")
        text = ", ".join(f"{v:.3g}" for v in losses)
        say("the attack's loss rises with its steps", bool(np.all(np.diff(losses) >= -0.01 * max(losses))), text)
        shares = [100 * h.double().mean().item() for h in held]
        text = ", ".join(f"{v:.0f}" for v in shares) + " % right after 1, 5, 20, 100 steps"
        fine = all(rarer(b, a) for a, b in itertools.pairwise(held))
        say("more steps never help the defender", fine, text)
        far = 1.0 if norm == "linf" else float(x[0].numel() ** 0.5)
        left = right(short_pgd(model, x, y, far, norm, 20, loss="margin", retire=True)).double().mean().item()
        say("no image withstands an unbounded attack", left == 0, f"{100 * left:.0f} % right at radius {far:g}")
        other = _surrogate(model, x) if surrogate is None else surrogate
        moved = right(short_pgd(other, x, y, eps, norm, 20))
        say(
            "transferred attacks are weaker than direct ones",
            rarer(held[2], moved),
            f"{100 * moved.double().mean().item():.0f} % right after transfer, {shares[2]:.0f} % after a direct attack",
        )
    return pd.DataFrame(rows, columns=COLUMNS, dtype=str)


def black_box_check(outcomes: Outcomes, name: str) -> pd.DataFrame:
    """One more sign, from AutoAttack's outcomes: Square should find next to nothing that the others left."""
    rows = []
    if f"{name}:fab-t" in outcomes.predictions:
        more = 100 * (outcomes.correct(f"{name}:fab-t").mean() - outcomes.correct(name).mean())
        verdict, seen = "ok" if more <= 0.2 else "look", f"Square broke another {more:.1f} % of images"
        rows.append(("the black-box attack finds no more than the others", verdict, seen))
    return pd.DataFrame(rows, columns=COLUMNS, dtype=str)


def said(checks: pd.DataFrame | None) -> str:
    """A checklist as one sentence; "" if there is none or it is empty."""
    if checks is None or checks.empty:
        return ""
    bad = checks[checks["verdict"] != "ok"]
    text = f"{len(checks) - len(bad)} of {len(checks)} checks are fine"
    for verdict, advice in (("fail", "; failed, so do not quote these numbers: "), ("look", "; look at: ")):
        if len(names := bad["check"][bad["verdict"] == verdict]):
            text += advice + ", ".join(names)
    return f"{text}."

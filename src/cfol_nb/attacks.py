"""Projected gradient descent (Madry et al. 2018) and its relatives. Images and radii share the unit [0, 1]."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfol_nb.config import check_radius, choose


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every submodule is in the mode that it had."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_images(x: Tensor) -> None:
    """Raises ValueError unless x is floating point, finite and inside [0, 1]."""
    if not x.is_floating_point():
        raise ValueError(f"images of type {x.dtype}: floating point in [0, 1] is needed (divide uint8 by 255)")
    low, high = (v.item() for v in x.aminmax()) if x.numel() else (0, 0)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images reach from {low:g} to {high:g}: they must lie in [0, 1] (normalise inside the model)")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """(n,) largest other logit minus the logit of y: positive exactly when misclassified (Carlini and Wagner 2017)."""
    y = y.unsqueeze(1)
    return logits.scatter(1, y, -torch.inf).amax(1) - logits.gather(1, y).squeeze(1)


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """(n,) KL(softmax(reference) || softmax(logits)), summed over classes: the term of TRADES (Zhang et al. 2019)."""
    p, q = F.log_softmax(reference, 1), F.log_softmax(logits, 1)
    return (p.exp() * (p - q)).sum(1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "ce": lambda z, y, _: F.cross_entropy(z, y, reduction="none"),
    "margin": lambda z, y, _: margin(z, y),
    "kl": lambda z, _, clean: kl(clean, z),
}


def _like(value, x: Tensor) -> Tensor | float:
    """A number as it is; one per example as (n, 1, ..., 1)."""
    value = value if isinstance(value, int | float) else torch.as_tensor(value)
    if not torch.is_tensor(value) or value.ndim == 0:
        return value
    if value.shape != x.shape[:1]:
        raise ValueError(f"{tuple(value.shape)} radii or steps for {len(x)} images: one number, or one per image")
    return value.to(x).view(-1, *[1] * (x.ndim - 1))


def _norm(d: Tensor) -> Tensor:
    return d.flatten(1).norm(dim=1).view(-1, *[1] * (d.ndim - 1))


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps=8 / 255,
    step=2 / 255,
    steps: int = 7,
    norm: str = "linf",
    loss="ce",
    random_start: bool = True,
    best: bool = False,
    generator: torch.Generator | None = None,
    *,
    restarts: int = 1,
    targeted: bool = False,
    check: bool = True,
) -> Tensor:
    """Adversarial images by projected gradient ascent on the loss.

    model: maps images to (n, K) logits; attacked in eval mode, its modes and gradients are left as they were.
    x: (n, C, H, W) floating point in [0, 1]. y: (n,) int64: the labels, or the targets if `targeted`.
    eps, step: a number, or (n,), in the unit of x: 8/255, not 8. norm: "linf" or "l2".
    loss: "ce"; "margin" (CW); "kl" (from the clean prediction, TRADES); or a function (logits, y) -> (n,).
    random_start: uniform in the ball. best: per image the point of highest loss on the way, start and end included,
    instead of the last one. restarts: keep per image a misclassified end, else the one of highest loss.
    check: False skips the checks of values that would make the host wait for the device.
    Returns (n, C, H, W), detached, inside the ball and inside [0, 1].
    Each step moves, projects, and only then differentiates at the projected point. ValueError for bad input.
    """
    choose("norm", norm, ("linf", "l2"))
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps={steps}, restarts={restarts}: at least 1 of each is needed")
    if check and len(x):
        check_images(x)
        for value in torch.as_tensor(eps).aminmax():
            check_radius(float(value), norm)
        if not (torch.as_tensor(step) >= 0).all():
            raise ValueError(f"step={step} is not a number >= 0")
        if len(y) != len(x) or y.is_floating_point() or (not callable(loss) and loss != "kl" and int(y.min()) < 0):
            raise ValueError(f"{len(x)} images need as many labels, integers from 0")
    loss_of = loss if callable(loss) else None
    if loss_of is None:
        named, clean = LOSSES[choose("attack loss", loss, LOSSES)], None

        def loss_of(z, t):
            return named(z, t, clean)

    x, sign = x.detach(), -1 if targeted else 1
    eps, step = _like(eps, x), _like(step, x)
    low, high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)

    def start() -> Tensor:
        if not random_start:
            return x
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) * 2 - 1
        if norm == "linf":
            return (x + eps * noise).clamp(low, high)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        length = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device) ** (1 / x[0].numel())
        return (x + noise / _norm(noise).clamp_min(1e-12) * _like(length, x) * eps).clamp(0, 1)

    def move(a: Tensor, g: Tensor) -> Tensor:
        if norm == "linf":
            return torch.clamp(a + step * g.sign(), low, high)
        d = a + step * g / _norm(g).clamp_min(torch.finfo(g.dtype).tiny) - x
        # inside the ball, then inside the box: clamping only brings every pixel nearer to x, so it stays in the ball
        return (x + d * (eps / _norm(d).clamp_min(1e-12)).clamp(max=1)).clamp(0, 1)

    keep = None
    with evaluating(model), torch.enable_grad():
        if loss == "kl":
            with torch.no_grad():
                clean = model(x)
        for _ in range(restarts):
            a, top = start(), None
            for _ in range(steps):
                a = a.detach().requires_grad_()
                value = sign * loss_of(model(a), y)
                (grad,) = torch.autograd.grad(value.sum(), a)  # a sum: the sign must not depend on the batch size
                with torch.no_grad():
                    if best:
                        top = _better(top, a.detach(), value.detach())
                    a = move(a.detach(), grad)
            if best or restarts > 1:
                with torch.no_grad():
                    z = model(a)
                    value = sign * loss_of(z, y)
                    if best:
                        a, value = _better(top, a, value)
                    if restarts > 1:
                        z = model(a) if best else z
                        hit = (z.argmax(1) == y) if targeted else (z.argmax(1) != y)
                        keep = _better(keep, a, value, hit)
                        a = keep[0]
    return a.detach()


def _better(old, a: Tensor, value: Tensor, hit: Tensor | None = None):
    """Per image the better of two points: one that hits its aim before one that does not, then the higher loss."""
    new = (a, value) if hit is None else (a, value, hit)
    if old is None:
        return new
    take = value > old[1]
    if hit is not None:
        take = torch.where(hit == old[2], take, hit)
    return tuple(torch.where(take.view(-1, *[1] * (n.ndim - 1)), n, o) for n, o in zip(new, old, strict=True))


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, **kwargs) -> Tensor:
    """One step of size eps from the image itself (Goodfellow et al. 2015): `pgd` with steps=1, no random start."""
    return pgd(model, x, y, eps, eps, steps=1, random_start=False, **kwargs)

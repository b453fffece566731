"""Projected gradient descent (Madry et al. 2018) and its relatives. Images and radii share the unit [0, 1]."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfol_nb.config import check_radius, choose

_using_one: list[int] = []  # how many threads torch had, once for each block that is open and needs one
_counting = threading.Lock()


@contextlib.contextmanager
def one_thread(needed: bool = True) -> Iterator[None]:
    """One thread for torch's operations, if needed; several such blocks may overlap in threads.

    Small networks in float64 gain little from two, and lose most of their time to waiting as soon as another process
    wants a core.
    """
    if not needed:
        yield
        return
    with _counting:
        _using_one.append(_using_one[0] if _using_one else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _counting:
            before = _using_one.pop()
            if not _using_one:
                torch.set_num_threads(before)


def weight_of(model: nn.Module) -> Tensor:
    """A floating parameter or buffer, whose type and device images need; an empty one on the CPU if there is none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode (in float64 on the CPU, on one thread); after it every submodule in the mode it had."""
    modes = [(m, m.training) for m in model.modules()]
    weight = weight_of(model)
    model.eval()
    try:
        with one_thread(weight.dtype == torch.float64 and weight.device.type == "cpu"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def repeating(tf32: bool = False) -> contextlib.AbstractContextManager:
    """cuDNN with algorithms that repeat themselves, and by default in true float32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)


def check_images(x: Tensor) -> Tensor:
    """The images, clamped to [0, 1] where rounding took them at most 1e-6 out of it. Raises ValueError unless they are
    floating point, finite and inside."""
    if not x.is_floating_point():
        raise ValueError(f"images of type {x.dtype}: floating point in [0, 1] is needed (divide uint8 by 255)")
    low, high = (v.item() for v in x.aminmax()) if x.numel() else (0, 0)
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(f"images reach from {low:g} to {high:g}: they must lie in [0, 1] (normalise inside the model)")
    return x.clamp(0, 1) if low < 0 or high > 1 else x


def as_float(images: Tensor, dtype: torch.dtype, device) -> Tensor:
    """uint8 images divided by 255, floating ones clamped to [0, 1], on the device in the given type."""
    x = images.to(device)
    return x.to(dtype).div_(255) if x.dtype == torch.uint8 else x.to(dtype).clamp(0, 1)


def admit(model: nn.Module, images) -> Tensor:
    """The images as a tensor (of NumPy or a list, too) that an attack can work on: detached and contiguous.

    ValueError where no gradient can be had: inside torch.inference_mode, or of a model that was made there.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}: a torch.nn.Module is needed")
    if torch.is_inference_mode_enabled():
        raise ValueError("inside torch.inference_mode there are no gradients, which attacks need: leave it")
    if any(t.is_inference() for t in itertools.chain(model.parameters(), model.buffers())):
        raise ValueError("the model was made inside torch.inference_mode, so it has no gradients: make it outside")
    try:
        x = torch.as_tensor(images).detach().contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"images of type {type(images).__name__} are no tensor: {error}") from error
    return x.clone() if x.is_inference() else x


def as_labels(labels) -> Tensor:
    """(N,) int64 on the CPU. Raises ValueError for anything but integers."""
    try:
        labels = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels of type {type(labels).__name__} are no tensor: {error}") from error
    labels = labels.clone() if labels.is_inference() else labels
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.ndim != 1:
        given = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"labels are {given}: one integer per image is needed, as many labels as images")
    return labels.long()


def check_weights(model: nn.Module) -> Tensor:
    """`weight_of` the model. Raises ValueError for one in less than float32."""
    tensor = weight_of(model)
    if torch.finfo(tensor.dtype).bits < 32:
        raise ValueError(
            f"the model computes in {tensor.dtype}: attacks are judged in float32 or better (model.float())"
        )
    return tensor


def first_pass(model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """(n, K) logits of x, which the model sees as a copy. y: (n,) labels, where there are any.

    Raises ValueError for anything but logits, for labels that do not fit them, for logits below float32 (but under
    torch.autocast, which its caller wants), and for a model that changes its input in place: an attack would go on from
    a changed image.
    """
    seen = x.clone()
    before = seen._version
    z = model(seen)
    if not torch.is_tensor(z):
        raise ValueError(f"the model returns a {type(z).__name__}: a tensor of logits is needed")
    if z.ndim != 2 or len(z) != len(x):
        shape = tuple(z.shape)
        raise ValueError(f"the model maps {len(x)} images to {shape}: logits of shape (images, classes) are needed")
    if z.shape[1] < 2:
        raise ValueError(f"the model has {z.shape[1]} output: a classifier has at least 2")
    if seen._version != before or not seen.equal(x):
        raise ValueError("the model changes its input in place: let its forward begin with x = x.clone()")
    if z.is_floating_point() and torch.finfo(z.dtype).bits < 32 and not torch.is_autocast_enabled(z.device.type):
        raise ValueError(f"the logits are {z.dtype}: attacks are judged in float32 or better")
    if y is not None and not 0 <= int(y.min()) <= int(y.max()) < z.shape[1]:
        raise ValueError(f"labels reach from {int(y.min())} to {int(y.max())}, but the model has {z.shape[1]} outputs")
    return z


def gradient(value: Tensor, x: Tensor) -> Tensor:
    """Of the sum of (n,) values, so that it does not depend on the batch size. ValueError where there is none."""
    g = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
    if g is None:
        raise ValueError(
            "the logits have no gradient with respect to the images, on which most attacks rest: "
            "is there an argmax, a detach or a torch.no_grad in the model?"
        )
    return g


def predict(
    model: nn.Module, images: Tensor, labels: Tensor, *, class_names=None, batch_size=500
) -> tuple[Tensor, int]:
    """(N,) int64 clean predictions on the CPU, and the number of the model's outputs, after every check of the input.

    images: (N, C, H, W) uint8, or floating point in [0, 1]. labels: (N,) integers. Raises ValueError for images outside
    [0, 1], for labels or class names that do not fit the model's outputs, and for a model in less than float32;
    FloatingPointError for logits that are not finite.
    """
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"{len(images)} images and {len(labels)} labels: as many of each, and at least one, are needed"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1 is needed")
    if images.dtype != torch.uint8:
        check_images(images)
    labels = as_labels(labels)
    tensor, out = check_weights(model), []
    with evaluating(model), repeating(), torch.no_grad():
        for i in range(0, len(labels), batch_size):
            x = as_float(images[i : i + batch_size], tensor.dtype, tensor.device)
            logits = first_pass(model, x, None if i else labels)
            k = logits.shape[1]
            if class_names is not None and len(class_names) != k:
                raise ValueError(f"{len(class_names)} class names, but the model has {k} outputs")
            if not logits.isfinite().all():
                raise FloatingPointError("the model's logits are not finite: it diverged, or its weights are damaged")
            out.append(logits.argmax(1).cpu())
    return torch.cat(out), k


def answers(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) the classes of the largest logits. Where one is infinite or no number there is none: the class after y."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), (y + 1) % logits.shape[1])


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """(n,) largest other logit minus the logit of y: positive exactly when misclassified (Carlini and Wagner 2017)."""
    y = y.unsqueeze(1)
    return logits.scatter(1, y, -torch.inf).amax(1) - logits.gather(1, y).squeeze(1)


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """(n,) KL(softmax(reference) || softmax(logits)), summed over classes: the term of TRADES (Zhang et al. 2019)."""
    p, q = F.log_softmax(reference, 1), F.log_softmax(logits, 1)
    return (p.exp() * (p - q)).sum(1)


def normalised_margin(logits: Tensor, y: Tensor) -> Tensor:
    """(n,) the margin of logits that are centred and brought to length 1: no factor on the logits changes it."""
    z = logits - logits.mean(1, keepdim=True)
    return margin(z / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(1e-12), y)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "ce": lambda z, y, _: F.cross_entropy(z, y, reduction="none"),
    "margin": lambda z, y, _: margin(z, y),
    "normalised-margin": lambda z, y, _: normalised_margin(z, y),
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
    return torch.linalg.vector_norm(d, dim=tuple(range(1, d.ndim)), keepdim=True)


def bounded(gradient: Tensor, norm: str) -> Tensor:
    """Without what is no number, which would take every pixel along; infinite ones keep their sign for "linf" alone."""
    sign = float(norm == "linf")
    return torch.nan_to_num(gradient, 0.0, sign, -sign)


def project(a: Tensor, x: Tensor, eps, norm: str) -> Tensor:
    """`a` into the ball of radius eps around the images x, and into [0, 1]."""
    if norm == "linf":
        return torch.clamp(a, (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1))
    d = a - x
    # inside the ball, then inside the box: clamping only brings every pixel nearer to x, so it stays in the ball
    return (x + d * (eps / _norm(d).clamp_min(1e-12)).clamp(max=1)).clamp(0, 1)


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
    retire: bool = False,
    check: bool = True,
    reference: Tensor | None = None,
    aim: Tensor | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Adversarial images by projected gradient ascent on the loss.

    model: maps images to (n, K) logits; attacked in eval mode, its modes and gradients are left as they were.
    x: (n, C, H, W) floating point in [0, 1]. y: (n,) integers: the labels, or the targets if `targeted`.
    eps, step: a number, or (n,), in the unit of x: 8/255, not 8. norm: "linf" or "l2".
    loss: "ce"; "margin" (CW); "normalised-margin"; "kl" (from the clean prediction, TRADES); or a function
    (logits, y) -> (n,).
    random_start: uniform in the ball; without, the image itself, or for "kl", which has no gradient there, the image
    and noise of 0.001 N(0, 1) that is cut to the ball, as in TRADES. best: per image the point of highest loss on the
    way, start and end included, instead of the last one. restarts: keep per image a misclassified end, else the one of
    highest loss.
    retire: an image that is misclassified on the way keeps that point and costs nothing more; a stronger attack than
    without, which returns the last point, also where it is classified correctly again. For one restart, without best.
    reference: (n, K) logits that "kl" starts from instead of the clean prediction, a teacher's. aim: (n,) int64: where
    it is a class, not -1, the image descends the cross-entropy with it instead. watch: called before every move with
    the iterate (n, C, H, W) and its logits (n, K), both detached.
    check: False skips what looks at values, for which the host must wait for the device, or converts: images and labels
    then are tensors of the model's type and device. A model in less than float32 is for that path.
    Returns (n, C, H, W), detached, inside the ball and inside [0, 1].
    Each step moves, projects, and only then differentiates at the projected point. ValueError for bad input.
    """
    choose("norm", norm, ("linf", "l2"))
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps={steps}, restarts={restarts}: at least 1 of each is needed")
    if retire and (best or targeted or restarts > 1 or loss == "kl" or aim is not None or watch):
        raise ValueError("retire goes with one restart of an untargeted attack on the labels, without best")
    if check and len(x):
        x = check_images(admit(model, x))
        tensor, y = check_weights(model), as_labels(y)
        x = x.to(tensor, copy=True) if tensor.numel() else x.clone()  # a model that changes its input harms a copy
        for value in torch.as_tensor(eps).aminmax():
            check_radius(float(value), norm)
        if not (torch.as_tensor(step) >= 0).all():
            raise ValueError(f"step={step} is not a number >= 0")
        if len(y) != len(x):
            raise ValueError(f"{len(x)} images and {len(y)} labels: as many labels as images are needed")
        y = y.to(x.device)
    loss_of = loss if callable(loss) else None
    if loss_of is None:
        named, clean = LOSSES[choose("attack loss", loss, LOSSES)], None

        def loss_of(z, t):
            return named(z, t, clean)

    if aim is not None:
        plain = loss_of

        def loss_of(z, t):
            towards = -F.cross_entropy(z, aim.clamp_min(0), reduction="none")
            return torch.where(aim >= 0, towards, plain(z, t).to(towards))

    x, sign = x.detach(), -1 if targeted else 1
    eps, step = _like(eps, x), _like(step, x)
    low, high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)

    def start() -> Tensor:
        if not random_start:
            if loss != "kl":
                return x
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            return project(x + 0.001 * noise, x, eps, norm)
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) * 2 - 1
        if norm == "linf":
            return (x + eps * noise).clamp(low, high)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        length = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device) ** (1 / x[0].numel())
        return (x + noise / _norm(noise).clamp_min(1e-12) * _like(length, x) * eps).clamp(0, 1)

    def move(a: Tensor, g: Tensor) -> Tensor:
        if norm == "linf":
            return torch.clamp(a + step * g.sign(), low, high)
        return project(a + step * g / _norm(g).clamp_min(torch.finfo(g.dtype).tiny), x, eps, norm)

    keep, found, row, done = None, x.clone() if retire else None, torch.arange(len(x), device=x.device), None
    with evaluating(model), torch.enable_grad():
        if loss == "kl":
            with torch.no_grad():
                clean = model(x) if reference is None else reference
        for _ in range(restarts):
            a, top = start(), None
            for _ in range(steps):
                a = a.detach().requires_grad_()
                z = first_pass(model, a, None if callable(loss) or loss == "kl" else y) if check else model(a)
                if watch:
                    watch(a.detach(), z.detach())
                value, check = sign * loss_of(z, y), False
                grad = bounded(gradient(value, a), norm)
                if retire:
                    wrong = z.detach().argmax(1) != y
                    first = wrong if done is None else wrong & ~done
                    found[row[first]] = a.detach()[first]
                    done = wrong if done is None else wrong | done
                    if 8 * int(done.sum()) >= len(row):  # shapes stay until an eighth is done
                        left = ~done
                        row, x, y, low, high, a, grad = (v[left] for v in (row, x, y, low, high, a, grad))
                        eps, step = (v[left] if torch.is_tensor(v) and v.ndim else v for v in (eps, step))
                        done = None
                        if not len(row):
                            return found
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
    if retire:
        open_ = slice(None) if done is None else ~done
        found[row[open_]] = a.detach()[open_]
        return found
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


def n_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps=8 / 255,
    k: float = 2.0,
    loss="ce",
    generator: torch.Generator | None = None,
    *,
    check: bool = True,
    reference: Tensor | None = None,
    aim: Tensor | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """A step of size eps from a noisy image x + U(-k eps, k eps), for training (N-FGSM, de Jorge et al. 2022).

    Arguments as of `pgd`, L-inf. Noise and step are clamped to [0, 1] alone: the result may lie (k + 1) eps from x.
    """
    if not 0 <= k < float("inf"):
        raise ValueError(f"k={k} is not a finite number >= 0")
    x, eps = x.detach(), _like(eps, x)
    if loss == "kl":
        with evaluating(model), torch.no_grad():
            clean = model(x) if reference is None else reference
        loss = lambda z, _: kl(clean, z)  # noqa: E731
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) * 2 - 1
    noisy = (x + k * eps * noise).clamp(0, 1)
    eps = eps.flatten() if torch.is_tensor(eps) and eps.ndim else eps
    return pgd(model, noisy, y, eps, eps, 1, loss=loss, random_start=False, check=check, aim=aim, watch=watch)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps=8 / 255, **kwargs) -> Tensor:
    """One step of size eps from the image itself (Goodfellow et al. 2015): `pgd` with steps=1, no random start."""
    return pgd(model, x, y, eps, eps, steps=1, random_start=False, **kwargs)

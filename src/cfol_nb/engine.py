"""How a training step is computed: eagerly, compiled, or as one CUDA graph. What is computed is the same.

The attack runs on a frozen copy of the network where that is faster: no gradient of a weight is ever computed for it.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cfol_nb.attacks import as_float, evaluating, n_fgsm, pgd
from cfol_nb.config import RunConfig
from cfol_nb.data import augment, jitter
from cfol_nb.distributed import gather, mean_, parallel, running, world
from cfol_nb.methods import Batch
from cfol_nb.objectives import TemporalEnsemble

StepFunction = Callable[..., tuple[Tensor, Batch]]


def choose_engine(config: RunConfig, device: torch.device) -> str:
    """The engine of a run. "auto": eager on the CPU, where compiling takes longer than a short run; graph on CUDA.

    What cannot be had here is replaced, with a warning that says why.
    """
    wanted = "eager" if config.engine == "auto" and world() > 1 else config.engine  # a graph records no communication
    if wanted == "graph" and world() > 1:
        raise ValueError(f"engine='graph' is for one device: devices={world()} needs 'eager' or 'compile'")
    if wanted == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if wanted == "graph" and device.type != "cuda":
        warnings.warn("engine='graph' needs a CUDA device: this run is computed with engine='compile'", stacklevel=2)
        return "compile"
    return wanted


class Frozen:
    """A copy of a network without gradients, in eval mode, for the attack; convolutions in bfloat16 if `half`."""

    def __init__(self, model: nn.Module, half: bool):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if half:
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(torch.bfloat16)
        self.mine, self.theirs = ([*m.parameters(), *m.buffers()] for m in (self.model, model))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the present weights and statistics."""
        torch._foreach_copy_(self.mine, self.theirs)


class Graphed:
    """A function of tensors as a CUDA graph: a few plain calls to warm up, then one capture, then replays.

    Its outputs are overwritten by the next call. The generator draws anew in every replay.
    """

    def __init__(self, function: StepFunction, generator: torch.Generator, warm_up: int = 3):
        self.function, self.generator, self.left = function, generator, warm_up
        self.stream, self.graph = torch.cuda.Stream(), None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Batch]:
        if self.left:
            self.left -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.inputs = [i.clone() for i in inputs]
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.outputs


def make_step(
    config: RunConfig,
    engine: str,
    model: nn.Module,
    objective,
    method,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    crop: int,
    flip: bool,
    ensemble: TemporalEnsemble | None = None,
    teacher: nn.Module | None = None,
) -> StepFunction:
    """The step: (pixels (n, C, H, W) uint8, y (n,), index (n,)) -> (mean loss, `Batch`), and the weights have moved. Of
    several ranks each gives its share, and gets the loss and the batch of all.

    Crop, flip, jitter, attack, forward, backward, optimiser; drawing and telling the method are the caller's.
    """
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    half = config.dtype == "bfloat16"
    low_precision = torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=engine != "graph")
    attacked, trained, frozen = model, model, None
    if engine != "eager":
        frozen = Frozen(model, half)
        torch.compiler.reset()  # what earlier runs compiled counts towards a limit, beyond which nothing is
        attacked, trained = (torch.compile(net, dynamic=False) for net in (frozen.model, model))
    alone, trained, moving = trained, parallel(trained), running(model)

    asks = method.asks | objective.asks

    def attack(x: Tensor, known: Batch, taught: Tensor | None, right: list[Tensor], watch=None) -> Tensor:
        """right: gets one (n,) for each iterate."""
        if objective.attack_loss is None:
            return x

        def look(a: Tensor, z: Tensor) -> None:
            right.append(z.argmax(1) == y)
            if watch:
                watch(a, z)

        right.clear()
        y, factor, loss = known.y, method.radius(known.y), objective.attack_loss
        eps, step = (config.eps, config.step) if factor is None else (config.eps * factor, config.step * factor)
        options = {"generator": generator, "check": False, "aim": method.aim(known, generator)}
        options |= {"watch": look} if watch or "right" in asks else {}
        if loss == "teacher":
            loss, options["reference"] = "kl", taught
        if config.training_attack.name == "n-fgsm":
            return n_fgsm(attacked, x, y, eps, config.training_attack.k, loss, **options)
        return pgd(attacked, x, y, eps, step, config.steps, config.norm, loss, objective.random_start, **options)

    def wide(logits: Tensor) -> Tensor:  # bfloat16 is too coarse for margins, priors and differences of probabilities
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def adjust(logits: Tensor, y: Tensor) -> Tensor:
        return method.adjust(wide(logits), y)

    def step(pixels: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Batch]:
        x = as_float(augment(pixels, crop, flip, generator), dtype, device)
        if config.augment is not None:
            x = jitter(x, config.augment.colour, config.augment.degrees, generator)
        known, taught, right = Batch(index, y), (None, None), []
        with low_precision:
            if frozen is not None:
                frozen.refresh()
            with torch.no_grad():
                if ensemble is not None or "clean" in asks:
                    with evaluating(attacked):
                        known = known._replace(clean=wide(attacked(x)))
                if teacher is not None:
                    known = known._replace(teacher=wide(teacher(x)))
                    taught = method.soften(known.teacher, y)
            x_adv = objective.images(functools.partial(attack, x, known, taught[0], right), x, y)
            given = trained, x, x_adv, y, adjust, method.boundary(y), config.label_smoothing
            given += (taught,) if objective.needs_teacher else ()
            old = None if config.awp is None else perturb(lambda: objective(alone, *given[1:])[0].mean())
            losses, logits, clean = objective(*given)
        mean_(moving)
        losses = gather(losses)  # from here on it is the whole batch, on every rank
        if ensemble is not None:
            losses = losses + ensemble(gather(index), gather(known.clean), gather(wide(logits)))
        batch = known._replace(logits=wide(logits), right=torch.stack(right, 1) if right else None)
        batch = batch if clean is None else batch._replace(clean=wide(clean))
        batch = Batch(*map(gather, batch))
        weight = method.weigh(batch)
        loss = method.reduce(losses if weight is None else losses * weight.to(losses), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if old is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(old), list(old.values()))
        optimizer.step()
        detached = Batch(*(v.detach() if torch.is_tensor(v) else v for v in batch))
        return losses.detach().mean(), detached

    def perturb(loss: Callable[[], Tensor]) -> dict[Tensor, Tensor]:
        """Adversarial weight perturbation (Wu et al. 2020): each layer's weights go up the objective's mean loss by
        `awp` times their length, biases and normalisation stay. Returns parameters and what they were."""
        weights, statistics = [p for p in model.parameters() if p.requires_grad and p.ndim > 1], [*model.buffers()]
        before = [b.clone() for b in statistics]
        mean_(gradients := torch.autograd.grad(loss(), weights))
        with torch.no_grad():
            torch._foreach_copy_(statistics, before)
            old = {w: w.clone() for w in weights}
            for w, g in zip(weights, gradients, strict=True):
                w.add_(config.awp * w.norm() * g / g.norm().clamp_min(torch.finfo(g.dtype).tiny))
        return old

    if engine == "eager":
        return step
    eager = make_step(config, "eager", model, objective, method, optimizer, generator, crop, flip, ensemble, teacher)
    return _or_eager(Graphed(step, generator) if engine == "graph" else step, eager, generator)


def _or_eager(fast: StepFunction, eager: StepFunction, generator: torch.Generator) -> StepFunction:
    """`fast`, or `eager` from the first call that a compiler or a capture refuses, with a warning that says why."""
    use = fast

    def step(*inputs: Tensor) -> tuple[Tensor, Batch]:
        nonlocal use
        if use is eager:
            return eager(*inputs)
        before = generator.get_state()
        try:
            return fast(*inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, OSError) as error:  # what Inductor and CUDA graphs raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"the fast engine fails here, steps are computed eagerly: {reason}", stacklevel=2)
            generator.set_state(before)
            use = eager
            return eager(*inputs)

    return step

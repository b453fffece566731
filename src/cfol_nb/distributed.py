"""One run on several processes, a device each: who is who, and what they tell each other.

Every rank draws the same global batch from the same state and computes its own share of it. What a method hears of, and
the loss that it makes of the batch, is of the whole batch on every rank, so that its state is the same everywhere. With
one process, nothing here does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfol_nb.config import RunConfig
from cfol_nb.outcomes import Outcomes


def launched() -> int:
    """Processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is: 0, 1, ..."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def group(config: RunConfig) -> Iterator[None]:
    """The processes of a run find each other. ValueError if torchrun started another number of them."""
    if launched() != config.devices:
        raise ValueError(
            f"devices={config.devices}, but {launched()} process(es) were started: torchrun --nproc-per-node "
            f"{config.devices}, or devices={launched()}"
        )
    if config.devices == 1 or dist.is_initialized():
        yield
        return
    if cuda := config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    atexit.register(dist.destroy_process_group)  # runs that follow use it, too
    yield


def share(n: int) -> slice:
    """This rank's part of a batch of n."""
    each = n // world()
    return slice(rank() * each, (rank() + 1) * each)


class _Gather(torch.autograd.Function):
    """The parts of all ranks, one after another. Backward: the own part, times the number of ranks, by which
    DistributedDataParallel divides; every rank computes the same loss of the whole."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(world())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return world() * gradient[share(len(gradient))]


def gather(part: Tensor | None) -> Tensor | None:
    """(n / ranks, ...) on each rank to (n, ...) on all."""
    if part is None or world() == 1:
        return part
    return gather(part.to(torch.uint8)).bool() if part.dtype == torch.bool else _Gather.apply(part)


def parallel(model: nn.Module) -> nn.Module:
    """The network whose gradients are averaged over the ranks in backward; buffers stay those of the rank."""
    if world() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def mean_(tensors: list[Tensor]) -> None:
    """In place, over the ranks."""
    for t in tensors if world() > 1 else ():
        dist.all_reduce(t)
        t /= world()


def running(model: nn.Module) -> list[Tensor]:
    """The running statistics of batch norm."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]


def every(value):
    """The value of each rank, in order."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def first(value):
    """What the first rank says."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def largest(number: int) -> int:
    """The largest of the numbers that the ranks have."""
    if world() == 1:
        return number
    dist.all_reduce(t := torch.tensor(number), dist.ReduceOp.MAX)
    return int(t)


def class_means(report: dict[str, Tensor], part: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Class means (K,) over this rank's images, with labels `part`, to those over all."""
    if world() == 1:
        return report
    found = {}
    for name, means in report.items():
        here, there = (torch.bincount(y, minlength=len(means)).to(means) for y in (part, labels))
        dist.all_reduce(total := means * here)
        found[name] = total / there.clamp_min(1)
    return found


def merged(part: Outcomes, labels: Tensor) -> Outcomes:
    """Outcomes of images rank, rank + world, ... to those of all."""
    if world() == 1:
        return part
    found = {name: np.empty(len(labels), np.int64) for name in part.predictions}
    for i, predictions in enumerate(every(part.predictions)):
        for name, values in predictions.items():
            found[name][i :: world()] = values
    return Outcomes(labels.numpy(), found, part.class_names, part.attacks)

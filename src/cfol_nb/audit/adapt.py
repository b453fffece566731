"""What lies between images in [0, 1] and a model of others, and between its outputs and logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfol_nb.models import Normalize

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow has it


@dataclass(frozen=True)
class Transform:
    """Preprocessing as a part of the model, in this order: channels, side, BGR, scale, mean and std.

    mean, std: of each channel of the model (or one for all), in the unit of scaled images; empty: none. scale: factor
    on images in [0, 1], 255 for a model of bytes. side: pixels to which images are resized; None: as they are. resize:
    the shorter side to which image files are brought before the middle `side` is cut out; None: `side`. channels: 1
    (grey) or 3.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 1.0
    bgr: bool = False
    side: int | None = None
    resize: int | None = None
    interpolation: str = "bilinear"
    channels: int | None = None

    def __post_init__(self):
        if {len(self.mean), len(self.std)} - {1, 3} and (self.mean or self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: both or neither, with one number or three, are needed")
        if not all(0 < s < float("inf") for s in (*self.std, self.scale)):
            raise ValueError(f"std={self.std}, scale={self.scale}: numbers above 0 are needed")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={self.interpolation}: one of {', '.join(INTERPOLATIONS)} is needed")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels={self.channels}: 1 or 3 is needed")

    def __str__(self) -> str:
        parts = [f"{self.channels} channels"] if self.channels else []
        parts += [f"{self.side} x {self.side} pixels ({self.interpolation})"] if self.side else []
        parts += ["BGR"] if self.bgr else []
        parts += [f"times {self.scale:g}"] if self.scale != 1 else []
        if self.mean:
            mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
            parts.append(f"minus mean ({mean}), by std ({std})")
        return "; ".join(parts) or "none"

    def steps(self) -> list[nn.Module]:
        """The modules that do this, none where there is nothing to do."""
        steps = [Channels(self.channels)] if self.channels else []
        steps += [Resize(self.side, self.interpolation)] if self.side else []
        steps += [BGR()] if self.bgr else []
        if self.mean or self.scale != 1:  # (s x - mean) / std
            mean, std = self.mean or (0.0,), self.std or (1.0,)
            steps.append(Normalize([m / self.scale for m in mean], [s / self.scale for s in std]))
        return steps


class Channels(nn.Module):
    """(n, C, H, W) to 1 channel (grey) or 3 (equal ones)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if self.channels == 1 and x.shape[1] == 3:
            return (x * x.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
        return x.expand(-1, 3, -1, -1) if self.channels == 3 and x.shape[1] == 1 else x


class Resize(nn.Module):
    """(n, C, H, W) to (n, C, side, side), with antialiasing, as Pillow does."""

    def __init__(self, side: int, interpolation: str):
        super().__init__()
        self.side, self.interpolation = side, interpolation

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.side, self.side):
            return x
        smooth = {} if self.interpolation == "nearest" else {"align_corners": False, "antialias": True}
        x = F.interpolate(x, (self.side, self.side), mode=self.interpolation, **smooth)
        return x.clamp(0, 1) if self.interpolation == "bicubic" else x  # which overshoots


class BGR(nn.Module):
    """The channels in the other order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


class Logits(nn.Module):
    """(n, K) logits from what a model returns: a tensor, or a tuple, dict or ModelOutput in which "logits", or one
    tensor alone, can be them. A single output z becomes (0, z): its sigmoid is the probability of the second class.

    Raises ValueError where it is ambiguous.
    """

    def forward(self, out: object) -> Tensor:
        if isinstance(out, Mapping) and torch.is_tensor(out.get("logits")):
            out = out["logits"]
        if not torch.is_tensor(out):
            several = list(out.values()) if isinstance(out, Mapping) else out if isinstance(out, Sequence) else []
            found = [t for t in several if torch.is_tensor(t) and t.is_floating_point() and t.ndim == 2]
            if len(found) != 1:
                shapes = ", ".join(str(tuple(t.shape)) if torch.is_tensor(t) else type(t).__name__ for t in several)
                raise ValueError(
                    f"the model returns a {type(out).__name__} ({shapes}), in which {len(found)} tensors could be "
                    "logits: let it return the logits alone"
                )
            out = found[0]
        if out.ndim == 1 or out.shape[1:] == (1,):
            out = out.reshape(-1, 1)
            return torch.cat([torch.zeros_like(out), out], 1)
        return out


class Order(nn.Module):
    """The outputs in another order: column i is the model's output index[i]."""

    def __init__(self, index: Sequence[int]):
        super().__init__()
        self.register_buffer("index", torch.tensor(index))

    def forward(self, z: Tensor) -> Tensor:
        return z[:, self.index]


class Scores(nn.Module):
    """Any function of images, (n, C, H, W) float32 in [0, 1] as a NumPy array, to (n, K) scores."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(np.asarray(self.function(x.detach().cpu().numpy())), dtype=x.dtype, device=x.device)


class Program(nn.Module):
    """An exported program, whose mode was fixed when it was exported."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def train(self, mode: bool = True) -> Program:
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

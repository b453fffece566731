"""Networks that map images in [0, 1] to logits; normalisation is their first layer.

All take any image side from 8 to 224 pixels, 1 or 3 channels, and a width factor.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfol_nb.config import choose, options

MODELS: dict[str, Callable[..., nn.Module]] = {}
sharing = threading.Lock()  # of torch's global generators, from which layers are initialised and dropout draws


@contextlib.contextmanager
def initialised_from(seed: int) -> Iterator[None]:
    """Layers that are made on the CPU start from the seed, also beside other threads; the global generator is
    afterwards as it was."""
    with sharing, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def register(name: str):
    """Make `build(name, num_classes=..., channels=..., **options)` call the decorated function."""

    def add(make):
        if name in MODELS:
            raise ValueError(f"a model named {name!r} is registered already")
        MODELS[name] = make
        return make

    return add


class Normalize(nn.Module):
    """(x - mean) / std per channel, as buffers that are saved with the weights."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()).view(-1, 1, 1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.get_default_dtype()).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Cosine(nn.Linear):
    """Logits scale * cos(features, class weights), the length of the weights being taken as longer by `added`."""

    def __init__(self, features: int, num_classes: int, scale: float, added: float):
        super().__init__(features, num_classes, bias=False)
        self.scale, self.added = scale, added

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(self.weight, dim=1, keepdim=True) + self.added
        return self.scale * F.linear(F.normalize(x), self.weight / length.clamp_min(1e-12))


# scale and added of `Cosine`: the usual one; Cao et al.'s (2019); RoBal's (Wu et al. 2021), which at the start of
# training makes the logits smaller by 5 %
HEADS = {"linear": None, "cosine": (10.0, 0.0), "normalised": (1.0, 0.0), "robal": (1.0, 1 / 32)}


def last_linear(model: nn.Module) -> nn.Linear:
    """The classifier of a network. Raises ValueError for a model without a linear layer."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise ValueError("the model has no linear layer, so it is not known what its classifier is")
    return layers[-1]


def build(
    name: str,
    num_classes: int = 10,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    head: str = "linear",
    **spec,
) -> nn.Sequential:
    """A new network: `Normalize`, then the body. Initialised from torch's global generator.

    mean, std: per channel of images in [0, 1]; 0.5 and 0.25 if not given. spec: options of the network, e.g. width.
    head: "linear", or in place of the last linear layer a cosine classifier, see HEADS: "cosine" of scale 10,
    "normalised" of scale 1, or "robal" of scale 1 with 1/32 added to the length of the weights.
    Raises ValueError for an unknown name or option.
    """
    rest = options("model", {"name": name, **spec}, MODELS, given=("num_classes", "channels"))
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least 2")
    if channels < 1:
        raise ValueError(f"channels={channels}: images have at least 1")
    body = MODELS[name](num_classes=num_classes, channels=channels, **rest)
    if (cosine := HEADS[choose("head", head, HEADS)]) is not None:
        where, _, at = [k for k, m in body.named_modules() if isinstance(m, nn.Linear)][-1].rpartition(".")
        last = body.get_submodule(where)[int(at)]
        body.get_submodule(where)[int(at)] = Cosine(last.in_features, num_classes, *cosine)
    return nn.Sequential(
        Normalize([0.5] * channels if mean is None else mean, [0.25] * channels if std is None else std), body
    )


def _conv(cin: int, cout: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, size, stride, size // 2, bias=False)


class _Head(nn.Sequential):
    def __init__(self, width: int, num_classes: int):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class _MapTo(nn.Module):
    """Average (or repeat) to a map of the given side; a map of that side passes untouched."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-2:] == (self.side, self.side) else F.adaptive_avg_pool2d(x, self.side)


@register("smallcnn")
def smallcnn(num_classes: int, channels: int, width: int = 16) -> nn.Module:
    """Two convolutions and two linear layers: 44,000 parameters at width 16, quick in float64 on 8x8 digits.

    Larger images are averaged to an 8x8 map after the first convolution, smaller ones are repeated to it.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        _MapTo(8),
        nn.Conv2d(width, 2 * width, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, num_classes),
    )


@register("mlp")
def mlp(num_classes: int, channels: int, width: int = 128) -> nn.Module:
    """Two hidden linear layers, no convolution (26,000 parameters on digits); other sides become an 8x8 map first."""
    return nn.Sequential(
        _MapTo(8),
        nn.Flatten(),
        nn.Linear(64 * channels, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, num_classes),
    )


class _Basic(nn.Module):
    """Post-activation residual block (He et al. 2016a)."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(cin, cout, stride), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = _conv(cout, cout), nn.BatchNorm2d(cout)
        self.short = (
            nn.Sequential()
            if stride == 1 and cin == cout
            else nn.Sequential(_conv(cin, cout, stride, 1), nn.BatchNorm2d(cout))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


class _PreAct(nn.Module):
    """Pre-activation residual block (He et al. 2016b); a changed shape is projected from the activation."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), _conv(cin, cout, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(cout), _conv(cout, cout)
        self.short = None if stride == 1 and cin == cout else _conv(cin, cout, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        short = x if self.short is None else self.short(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + short


def _stages(block, widths: Sequence[int], depth: int, cin: int) -> list[nn.Module]:
    layers = []
    for i, width in enumerate(widths):
        for j in range(depth):
            layers.append(block(cin, width, 2 if i and not j else 1))
            cin = width
    return layers


@register("resnet18")
def resnet18(num_classes: int, channels: int, width: int = 64) -> nn.Module:
    """CIFAR ResNet-18: 3x3 stem of stride 1 and no max-pool (11.2 M parameters at width 64)."""
    return nn.Sequential(
        _conv(channels, width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *_stages(_Basic, [width << i for i in range(4)], 2, width),
        _Head(8 * width, num_classes),
    )


@register("preactresnet18")
def preactresnet18(num_classes: int, channels: int, width: int = 64) -> nn.Module:
    """Pre-activation ResNet-18, the usual network of adversarial training on CIFAR (11.2 M parameters at width 64)."""
    return nn.Sequential(
        _conv(channels, width),
        *_stages(_PreAct, [width << i for i in range(4)], 2, width),
        nn.BatchNorm2d(8 * width),
        nn.ReLU(),
        _Head(8 * width, num_classes),
    )


@register("wrn")
def wrn(num_classes: int, channels: int, depth: int = 34, widen: int = 10) -> nn.Module:
    """Wide ResNet (Zagoruyko and Komodakis 2016); depth = 6 n + 4. WRN-34-10 by default (46.2 M parameters)."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth={depth} is not 6 n + 4 with n of at least 1")
    return nn.Sequential(
        _conv(channels, 16),
        *_stages(_PreAct, [16 * widen, 32 * widen, 64 * widen], (depth - 4) // 6, 16),
        nn.BatchNorm2d(64 * widen),
        nn.ReLU(),
        _Head(64 * widen, num_classes),
    )


@register("vgg16bn")
def vgg16bn(num_classes: int, channels: int, width: int = 64) -> nn.Module:
    """VGG-16 with batch norm and one linear layer (14.7 M parameters at width 64); small maps are not pooled away."""
    layers, cin = [], channels
    for factor, repeat in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(repeat):
            layers += [
                nn.Conv2d(cin, factor * width, 3, padding=1, bias=False),
                nn.BatchNorm2d(factor * width),
                nn.ReLU(),
            ]
            cin = factor * width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, _Head(cin, num_classes))

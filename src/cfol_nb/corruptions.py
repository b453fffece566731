"""Seven common corruptions of CIFAR10-C (Hendrycks and Dietterich 2019), those of Benz et al. 2021, as batched tensors.

Constants and definitions are those of CIFAR10-C (32 pixels) at every image size. What differs from its files: results
are not rounded to 8 bits, neither in the end nor between the two passes of pixelate; the random draws are others; and
frost is a drawn texture in place of photographs (see `frost`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cfol_nb.attacks import check_images
from cfol_nb.config import choose


def _draw(sample: Callable, shape: tuple[int, ...], x: Tensor, generator: torch.Generator | None) -> Tensor:
    """torch.rand or torch.randn in the type of x, drawn on the generator's device and moved to that of x."""
    device = x.device if generator is None else generator.device
    return sample(shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def brightness(x: Tensor, severity: int, _=None) -> Tensor:
    """Adds to the value V of HSV, at most up to 1; hue and saturation stay. Grey images are their own V."""
    value = x.amax(1, keepdim=True)
    raised = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]).clamp(max=1)
    # every channel is V times something that depends on hue and saturation only; black has saturation 0: it turns grey
    return torch.where(value > 0, x / value, 1) * raised


def contrast(x: Tensor, severity: int, _=None) -> Tensor:
    """Each channel drawn towards its mean over the image."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Independent normal noise on every channel of every pixel."""
    return x + _draw(torch.randn, x.shape, x, generator) * (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]


def defocus(x: Tensor, severity: int, _=None) -> Tensor:
    """Convolution with a disk, itself blurred by a 3 x 3 Gaussian; mirrored at the border, the edge pixel not twice."""
    radius, blur = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    # radii below 2: a 3 x 3 disk, 5 x 5 when blurred. In float64 on the CPU, for the same kernel on every device.
    at = torch.arange(-2, 3, dtype=torch.float64)
    disk = (at.view(-1, 1) ** 2 + at**2 <= radius**2).double()
    line = torch.exp(-(at[1:4] ** 2) / (2 * blur**2))
    gauss = line.view(-1, 1) * line
    kernel = F.conv2d((disk / disk.sum())[None, None], (gauss / gauss.sum())[None, None], padding=1).to(x)
    padded = F.pad(x, (2,) * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(x.shape[1], 1, 5, 5), groups=x.shape[1])


def plasma(x: Tensor, decay: float, generator: torch.Generator | None = None) -> Tensor:
    """(n, 1, H, W) cloud in [0, 1] for each image of x by diamond-square on a torus, cut from the next power of two.

    The random offset shrinks by decay squared from level to level: CIFAR10-C multiplies the shrinking amplitude with a
    uniform draw whose range is that amplitude again. The first amplitude is of no matter, as the map is normalised.
    """
    n, _, h, w = x.shape
    cloud, amplitude = x.new_zeros(n, 1, 1), 1.0
    while (k := cloud.shape[1]) < max(h, w):
        offset = (_draw(torch.rand, (3, n, k, k), x, generator) * 2 - 1) * amplitude
        pairs = cloud + cloud.roll(-1, 1)
        centre = (pairs + pairs.roll(-1, 2)) / 4 + offset[0]
        right = (cloud + cloud.roll(-1, 2) + centre + centre.roll(1, 1)) / 4 + offset[1]
        below = (pairs + centre + centre.roll(1, 2)) / 4 + offset[2]
        # each old point becomes the 2 x 2 points (old, right; below, centre)
        rows = torch.stack((torch.stack((cloud, right), -1), torch.stack((below, centre), -1)), 2)
        cloud, amplitude = rows.reshape(n, 2 * k, 2 * k), amplitude / decay**2
    cloud = cloud - cloud.amin((1, 2), keepdim=True)
    return (cloud / cloud.amax((1, 2), keepdim=True))[:, None, :h, :w]


def fog(x: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Adds a cloud and scales down again, so that no pixel exceeds the image's maximum: black stays black."""
    weight, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    top = x.amax((1, 2, 3), keepdim=True)
    return (x + weight * plasma(x, decay, generator)) * top / (top + weight)


def frost(x: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Weighted sum of the image and a texture of bluish white ridges, drawn anew for every image.

    The weights are those of CIFAR10-C, the texture is not: there it is a random crop of one of five photographs of
    frost. Its brightness, 0.49 on average with a standard deviation of 0.29, is a choice and not measured on them:
    results under this corruption cannot be compared with published ones.
    """
    image, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    # a rough cloud crosses 1/2 along thin and branched lines; a higher power makes them darker away from the crest, so
    # three powers are white there and blue between
    ridges = torch.maximum(*(1 - (2 * plasma(x, 1.5, generator) - 1).abs() for _ in range(2)))
    powers = x.new_tensor((5, 4, 3) if x.shape[1] == 3 else (4,)).view(-1, 1, 1)
    return image * x + ice * ridges**powers


@lru_cache(maxsize=64)
def _box(side: int, small: int) -> Tensor:
    """(side, side) float64: what PIL's box filter does to a line of pixels, down to `small` of them and up again."""

    def resized(a: np.ndarray, height: int) -> np.ndarray:
        return np.asarray(Image.fromarray(a).resize((a.shape[1], height), Image.Resampling.BOX), dtype=np.float64)

    down, up = resized(np.eye(side, dtype=np.float32), small), resized(np.eye(small, dtype=np.float32), side)
    return torch.from_numpy(up @ down)


def pixelate(x: Tensor, severity: int, _=None) -> Tensor:
    """Shrunk by the box filter and enlarged by it again, as PIL does in floating point."""
    scale = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    rows, columns = (_box(side, int(side * scale)).to(x) for side in x.shape[2:])
    return rows @ x @ columns.T


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator | None], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "gaussian_noise": gaussian_noise,
    "defocus": defocus,
    "frost": frost,
    "fog": fog,
    "pixelate": pixelate,
}


def corrupt(x: Tensor, name: str, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """The images under the named corruption at severity 1 to 5: same shape, type and device, inside [0, 1].

    x: (n, C, H, W) floating point in [0, 1], C = 1 or 3, sides from 8 pixels. generator: for gaussian_noise, frost and
    fog; torch's default one if None. Raises ValueError for an unknown name, another severity or other images.
    """
    make = CORRUPTIONS[choose("corruption", name, CORRUPTIONS)]
    if severity not in range(1, 6):
        raise ValueError(f"severity {severity} of {name}: 1, 2, 3, 4 or 5 is needed")
    if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 8:
        raise ValueError(f"images of shape {tuple(x.shape)}: (n, 1 or 3, H, W) with sides from 8 pixels is needed")
    return make(check_images(x), int(severity), generator).clamp(0, 1)

import colorsys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_image

from cfol_nb.corruptions import CORRUPTIONS, corrupt, plasma

NAMES = ("brightness", "contrast", "gaussian_noise", "defocus", "frost", "fog", "pixelate")
RANDOM = ("gaussian_noise", "frost", "fog")
SEVERITIES = range(1, 6)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 12, generator=generator(1), dtype=torch.float64)


@pytest.fixture(scope="session")
def photographs():
    """(15, 3, 32, 32) tiles of a photograph at a quarter of its size."""
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((160, 106), Image.Resampling.BOX)
    tiles = torch.from_numpy(np.array(photo)[:96]).view(3, 32, 5, 32, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(15, 3, 32, 32).double() / 255


def loop_plasma(n, size, decay, seed):
    """The textbook's diamond-square on a torus, point by point, from the draws that `plasma` makes."""
    g, amplitude, step = generator(seed), 1.0, size
    out = np.zeros((n, size, size))
    while step > 1:
        k, half = size // step, step // 2
        draw = (torch.rand(3, n, k, k, generator=g, dtype=torch.float64).numpy() * 2 - 1) * amplitude
        places = [(i, j) for i in range(k) for j in range(k)]
        for dy, dx, offset in ((half, half, draw[0]), (0, half, draw[1]), (half, 0, draw[2])):
            reach = [(a, b) for a in (-half, 0, half) for b in (-half, 0, half)]
            near = [(a, b) for a, b in reach if (a and b if dy and dx else bool(a) != bool(b))]
            for i, j in places:
                y, x = i * step + dy, j * step + dx
                mean = sum(out[:, (y + a) % size, (x + b) % size] for a, b in near) / 4
                out[:, y, x] = mean + offset[:, i, j]
        step, amplitude = half, amplitude / decay**2
    low, high = (f(out, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    return (out - low) / (high - low)


def test_the_corruptions_are_those_of_benz_et_al():
    assert tuple(CORRUPTIONS) == NAMES


# -- one by one against another program --------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (9, 11)])
def test_pixelate_is_what_pil_does_to_floating_images(shape, severity):
    x = torch.rand(2, 3, *shape, generator=generator(severity))
    c = {1: 0.95, 2: 0.9, 3: 0.85, 4: 0.75, 5: 0.65}[severity]
    h, w = shape
    expected = [
        Image.fromarray(plane)
        .resize((int(w * c), int(h * c)), Image.Resampling.BOX)
        .resize((w, h), Image.Resampling.BOX)
        for plane in x.flatten(0, 1).numpy()
    ]
    found = corrupt(x, "pixelate", severity).flatten(0, 1).numpy()
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("severity", "c"), [(1, 0.05), (2, 0.1), (3, 0.15), (4, 0.2), (5, 0.3)])
def test_brightness_raises_the_value_of_hsv_also_of_black_and_white(images, severity, c):
    images[0, :, :4, 0], images[0, :, :4, 1] = 0, 1
    images[0, :, 0, 2] = torch.tensor([1.0, 0, 0])
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in images.movedim(1, -1).reshape(-1, 3).tolist()]
    expected = np.array([colorsys.hsv_to_rgb(hue, saturation, min(value + c, 1)) for hue, saturation, value in hsv])
    found = corrupt(images, "brightness", severity).movedim(1, -1).reshape(-1, 3).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    grey = images[:, :1]
    torch.testing.assert_close(corrupt(grey, "brightness", severity), (grey + c).clamp(max=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("severity", "c"), [(1, 0.75), (2, 0.5), (3, 0.4), (4, 0.3), (5, 0.15)])
def test_contrast_shrinks_the_distance_to_each_channels_own_mean(images, severity, c):
    images[:, 1] *= 0.2
    found = corrupt(images, "contrast", severity).numpy()
    for i, j in np.ndindex(3, 3):
        channel = images[i, j].numpy()
        np.testing.assert_allclose(found[i, j], (channel - channel.mean()) * c + channel.mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("severity", "c"), [(1, 0.04), (2, 0.06), (3, 0.08), (4, 0.09), (5, 0.10)])
def test_gaussian_noise_has_the_standard_deviation_of_its_severity_and_no_structure(severity, c):
    x = torch.full((100, 3, 32, 32), 0.5, dtype=torch.float64)  # 5 standard deviations from the edges of the box
    noise = corrupt(x, "gaussian_noise", severity, generator(severity)) - x
    # 307,200 draws: the relative standard error of the deviation is 0.13 %
    assert noise.std().item() == pytest.approx(c, rel=0.005)
    assert abs(noise.mean().item()) < 4 * c / 554
    z = noise / c
    assert (z**4).mean().item() == pytest.approx(3, abs=0.1)
    for pair in ((z[:, 0], z[:, 1]), (z[..., 1:], z[..., :-1]), (z[1:], z[:-1])):
        assert abs((pair[0] * pair[1]).mean().item()) < 0.02


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("severity", "radius", "blur"), [(1, 0.3, 0.4), (2, 0.4, 0.5), (3, 0.5, 0.6), (4, 1, 0.2), (5, 1.5, 0.1)]
)
def test_defocus_is_a_convolution_with_a_blurred_disk(images, severity, radius, blur, channels):
    disk = np.array([[float(i * i + j * j <= radius * radius) for j in range(-8, 9)] for i in range(-8, 9)])
    line = np.array([np.exp(-0.5 * (t / blur) ** 2) for t in (-1, 0, 1)])
    line /= line.sum()
    kernel = disk / disk.sum()
    for axis in (0, 1):
        kernel = ndimage.convolve1d(kernel, line, axis=axis)
    found = corrupt(images[:, :channels], "defocus", severity).numpy()
    for i, j in np.ndindex(3, channels):
        expected = ndimage.convolve(images[i, j].numpy(), kernel, mode="mirror")
        np.testing.assert_allclose(found[i, j], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [3, 1.75])
def test_plasma_is_diamond_square_in_0_1(decay):
    x = torch.zeros(3, 1, 12, 16, dtype=torch.float64)
    found, expected = plasma(x, decay, generator(5)), loop_plasma(3, 16, decay, 5)
    np.testing.assert_allclose(found[:, 0].numpy(), expected[:, :12], rtol=0, atol=1e-12)
    whole = plasma(torch.zeros(4, 1, 32, 32), decay, generator(6)).flatten(1)
    assert whole.amin(1).tolist() == [0] * 4
    assert whole.amax(1).tolist() == [1] * 4


def test_plasma_is_smoother_for_a_faster_decay():
    x = torch.zeros(64, 1, 32, 32, dtype=torch.float64)
    clouds = [plasma(x, decay, generator(7)) for decay in (1.75, 2, 2.5, 3)]
    rough = [(c.diff(dim=2).diff(dim=2) ** 2).mean().item() for c in clouds]
    assert rough == sorted(rough, reverse=True)
    assert rough[0] > 2 * rough[-1]


@pytest.mark.parametrize(
    ("severity", "weight", "decay"), [(1, 0.2, 3), (2, 0.5, 3), (3, 0.75, 2.5), (4, 1, 2), (5, 1.5, 1.75)]
)
def test_fog_adds_the_plasma_and_keeps_the_maximum_of_each_image(images, severity, weight, decay):
    images[1] *= 0.3
    images[2] = 0
    found = corrupt(images, "fog", severity, generator(8)).numpy()
    for image, cloud, foggy in zip(images.numpy(), loop_plasma(3, 16, decay, 8)[:, :, :12], found, strict=True):
        top = image.max()
        np.testing.assert_allclose(foggy, (image + weight * cloud) * top / (top + weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_lightens_dark_scenes_and_washes_out_contrast(severity):
    dark = torch.full((50, 1, 32, 32), 0.1, dtype=torch.float64)
    dark[:, :, :16, :16] = 0.3
    dark[:, :, 0, 0] = 1
    foggy = corrupt(dark, "fog", severity, generator(9))
    assert foggy.mean() > dark.mean() + 0.03
    # averaged over clouds, the two grey areas are nearer to each other
    inside = foggy[..., 2:14, 2:14].mean() - foggy[..., 18:30, 18:30].mean()
    assert 0 < inside < 0.2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("severity", "image", "ice"), [(1, 1, 0.2), (2, 1, 0.3), (3, 0.9, 0.4), (4, 0.85, 0.4), (5, 0.75, 0.45)]
)
def test_frost_is_a_weighted_sum_of_the_image_and_a_texture_of_its_own(severity, image, ice, channels):
    x = torch.rand(64, channels, 32, 32, generator=generator(10), dtype=torch.float64) / 2  # never clipped
    found = corrupt(x, "frost", severity, generator(11))
    texture = corrupt(torch.zeros_like(x), "frost", severity, generator(11)) / ice
    torch.testing.assert_close(found, image * x + ice * texture, rtol=0, atol=1e-12)
    assert 0 <= texture.min() < 0.01
    assert 0.99 < texture.max() <= 1
    assert texture.mean().item() == pytest.approx(0.49, abs=0.02)
    assert texture.std().item() == pytest.approx(0.29, abs=0.015)
    assert (texture[0] - texture[1]).abs().mean() > 0.1
    if channels == 3:
        red, green, blue = texture.mean((0, 2, 3)).tolist()
        assert red < green < blue


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if n != "frost"])
def test_severity_moves_photographs_further_away(photographs, name):
    # not frost: its severities 3 to 5 weaken the image as well as adding ice, which brings bright pixels back
    moved = [(corrupt(photographs, name, s, generator(3)) - photographs).flatten(1).norm(dim=1) for s in SEVERITIES]
    means = [m.mean().item() for m in moved]
    assert means[0] > 0.01
    assert all(a < 0.99 * b for a, b in pairwise(means)), means


@pytest.mark.parametrize("name", ["frost", "fog"])
def test_severity_leaves_less_of_the_image_in_weather(photographs, name):
    def likeness(a, b):
        a, b = (v.flatten(1) - v.flatten(1).mean(1, keepdim=True) for v in (a, b))
        return torch.cosine_similarity(a, b).mean().item()

    seen = [likeness(photographs, corrupt(photographs, name, s, generator(4))) for s in SEVERITIES]
    assert all(a > b for a, b in pairwise(seen)), seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_type_and_range_stay_and_the_input_is_not_changed(name, channels, dtype):
    x = torch.rand(4, channels, 8, 11, generator=generator(12)).round(decimals=1).to(dtype)  # with exact 0 and 1
    before = x.clone()
    for severity in SEVERITIES:
        y = corrupt(x, name, severity, generator())
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        assert y.isfinite().all()
        assert 0 <= y.min() <= y.max() <= 1
        assert not torch.equal(y, x)
    assert torch.equal(x, before)
    assert corrupt(x[:0], name, 1).shape == (0, channels, 8, 11)


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_computed_in_float64(name):
    x = torch.rand(4, 3, 16, 16, generator=generator(13), dtype=torch.float64)
    y = corrupt(x, name, 3, generator())
    assert (y != y.float().double()).any()


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_the_others(images, name):
    # in a batch of the same size, so that the draws are the same: what could leak is a mean or a maximum
    other = images.clone()
    other[1:] = 1 - other[1:] / 2
    a, b = (corrupt(v, name, 4, generator(14))[0] for v in (images, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_decides_and_without_one_the_default_does(images, name):
    def made(seed):
        return corrupt(images, name, 5, generator(seed))

    assert torch.equal(made(1), made(1))
    assert torch.equal(made(1), made(2)) == (name not in RANDOM)
    torch.manual_seed(1)
    first, second = corrupt(images, name, 5), corrupt(images, name, 5)
    assert torch.equal(first, made(1))
    assert torch.equal(first, second) == (name not in RANDOM)


def test_what_is_refused(images):
    with pytest.raises(ValueError, match="unknown corruption 'fogg'; did you mean 'fog'"):
        corrupt(images, "fogg", 1)
    for severity in (0, 6, -1, 2.5):
        with pytest.raises(ValueError, match=f"severity {severity} of fog"):
            corrupt(images, "fog", severity)
    for bad in (images * 255, images - 0.5, images * torch.nan, (images * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match=r"images (reach|of type)"):
            corrupt(bad, "contrast", 1)
    for shape in ((3, 16, 16), (2, 2, 16, 16), (2, 3, 7, 16)):
        with pytest.raises(ValueError, match="images of shape"):
            corrupt(torch.zeros(shape), "pixelate", 1)

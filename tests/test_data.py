import gzip
import io
import os
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

from cfol_nb import data
from cfol_nb.config import RunConfig
from cfol_nb.data import DataSet, ImageSet, Skipped, augment, jitter, leave_out, limit, load, long_tail, prepare, split
from cfol_nb.evaluate import as_float
from cfol_nb.files import Corrupt
from cfol_nb.runs import folder_of


def image_set(per_class=(40, 40, 40), side=4):
    labels = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    images = torch.randint(0, 256, (len(labels), 1, side, side), dtype=torch.uint8)
    return ImageSet(images, labels, tuple(f"c{i}" for i in range(len(per_class))))


def write_folder(root: Path, parts=("train", "test"), classes=("cat", "dog"), n=6, size=(12, 12), mode="RGB"):
    """An image folder of lossless pictures; returns {relative path: array}."""
    rng, out = np.random.default_rng(0), {}
    for part in parts:
        for c in classes:
            (root / part / c).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
                array = rng.integers(0, 256, shape, dtype=np.uint8)
                path = root / part / c / f"{i}.png"
                Image.fromarray(array, mode).save(path)
                out[f"{part}/{c}/{i}"] = array
    return out


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = load("digits")
    raw = load_digits()
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert not digits.flip
    both = torch.cat([digits.train.images, digits.test.images]).flatten(1).double() / 255 * 16
    assert np.abs(np.sort(both.sum(1)) - np.sort(raw.images.sum((1, 2)))).max() < 64 * 8 / 255 * 16 / 16
    assert torch.equal(digits.train.counts + digits.test.counts, torch.from_numpy(np.bincount(raw.target)))


def test_split_is_stratified_disjoint_whole_and_fixed():
    images = image_set((50, 20, 5))
    rest, part = split(images, 0.2, seed=3)
    assert part.counts.tolist() == [10, 4, 1]
    assert rest.counts.tolist() == [40, 16, 4]
    seen = torch.cat([rest.images, part.images]).flatten(1)
    assert len(torch.unique(seen, dim=0)) == len(torch.unique(images.images.flatten(1), dim=0))
    again, other = split(images, 0.2, seed=3), split(images, 0.2, seed=4)
    assert torch.equal(again[1].images, part.images)
    assert not torch.equal(other[1].images, part.images)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_a_split_in_place_is_the_split_without_a_second_copy(fraction):
    images = image_set((50, 20, 5))
    copies = split(images, fraction, seed=3)
    parts = split(images, fraction, seed=3, in_place=True)
    for a, b in zip(copies, parts, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert b.images.untyped_storage().data_ptr() == images.images.untyped_storage().data_ptr()


def test_every_class_stays_in_both_parts():
    rest, part = split(image_set((2, 30)), 0.01)
    assert part.counts.min() == rest.counts.min() == 1


def test_limit_and_per_class_index():
    images = limit(image_set((40, 3, 40)), 5)
    assert images.counts.tolist() == [5, 3, 5]
    assert images.labels[images.of_class(1)].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("kind", "want"), [("exp", [100, 31, 10]), ("step", [100, 100, 10])])
def test_long_tail_has_the_stated_counts(kind, want):
    assert long_tail(image_set((100, 100, 100)), kind, 10).counts.tolist() == want
    assert long_tail(image_set((100, 100, 100)), kind, 1).counts.tolist() == [100] * 3


def test_long_tail_of_even_classes_steps_in_the_middle():
    assert long_tail(image_set((60,) * 4), "step", 20).counts.tolist() == [60, 60, 3, 3]
    assert long_tail(image_set((60,) * 4), "exp", 1e9).counts.min() == 1


def test_statistics_are_numpys():
    images = image_set()
    mean, std = images.statistics()
    x = images.images.numpy() / 255
    assert mean == pytest.approx([x.mean()])
    assert std == pytest.approx([x.std()])


def test_augment_gives_shifted_and_mirrored_copies_evenly():
    n, side, crop = 9000, 5, 1
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, side, side)
    out = augment(image.expand(n, 1, side, side), crop, True, torch.Generator().manual_seed(0))
    assert out.dtype == torch.uint8
    copies = {}
    for mirrored in (False, True):
        base = np.pad((image.flip(3) if mirrored else image)[0, 0].numpy(), crop)
        for i in range(3):
            for j in range(3):
                copies[base[i : i + side, j : j + side].tobytes()] = 0
    for picture in out[:, 0].numpy():
        copies[np.ascontiguousarray(picture).tobytes()] += 1  # KeyError: not such a copy
    assert chisquare(list(copies.values())).pvalue > 0.001


def test_augment_can_do_one_or_nothing():
    x = torch.randint(0, 256, (50, 3, 6, 4), dtype=torch.uint8)
    assert torch.equal(augment(x, 0, False), x)
    out = augment(x, 0, True, torch.Generator().manual_seed(0))
    same, mirrored = (out == x).flatten(1).all(1), (out == x.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 10 < same.sum() < 40


@pytest.mark.parametrize(("channels", "h", "w", "degrees"), [(3, 32, 32, 2.0), (1, 8, 8, 40.0), (3, 24, 40, 30.0)])
def test_jitter_is_torchvisions_image_by_image_with_the_same_draws(channels, h, w, degrees):
    n, colour = 30, 0.25
    x = torch.rand(n, channels, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, g = jitter(x, colour, degrees, torch.Generator().manual_seed(2)), torch.Generator().manual_seed(2)
    order, factor = torch.rand(2, n, 3, dtype=x.dtype, generator=g)
    angle = degrees * (2 * torch.rand(n, dtype=x.dtype, generator=g) - 1)
    changes = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation
    for i, image in enumerate(x):
        for kind in order[i].argsort().tolist():
            image = changes[kind](image, 1 + colour * (2 * factor[i, kind].item() - 1))
        torch.testing.assert_close(got[i], TF.rotate(image, angle[i].item()), rtol=0, atol=1e-12)
    assert torch.equal(jitter(x, 0.0, 0.0), x)
    assert torch.equal(jitter(x, colour, degrees, torch.Generator().manual_seed(2)), got)


def test_jitter_draws_what_torchvisions_transforms_draw():
    """Brightness alone shows on a white pixel, contrast on none of an even image: orders and factors are uniform."""
    x = torch.full((6000, 3, 2, 2), 0.5, dtype=torch.float64)
    x[:, 1:] = 0.25
    out = jitter(x, 0.2, 0.0, torch.Generator().manual_seed(0))[:, :, 0, 0]
    # without clamping the three are linear: grey g -> b g, and the difference of two channels -> b c s of it
    grey = (out * torch.tensor([0.2989, 0.587, 0.114])).sum(1) / (0.5 * 0.2989 + 0.25 * 0.701)
    spread = (out[:, 0] - out[:, 1]) / 0.25
    assert kstest(grey / 0.9999, "uniform", (0.8, 0.4)).pvalue > 0.001
    b, c, s = np.random.default_rng(0).uniform(0.8, 1.2, (3, 6000))
    assert ks_2samp(spread, b * c * s).pvalue > 0.001


def test_as_float_divides_bytes_only():
    x = torch.tensor([[0, 255, 51]], dtype=torch.uint8)
    assert as_float(x, torch.float64, "cpu").tolist() == [[0, 1, 0.2]]
    assert as_float(torch.tensor([0.3]), torch.float32, "cpu").item() == pytest.approx(0.3)


def test_image_folder_is_read_exactly_and_cached(tmp_path, monkeypatch):
    arrays = write_folder(tmp_path / "pets")
    got = load(f"imagefolder:{tmp_path / 'pets'}")
    assert got.class_names == ("cat", "dog")
    assert len(got.train) == len(got.test) == 12
    np.testing.assert_array_equal(got.train.images[7].permute(1, 2, 0), arrays["train/dog/1"])
    monkeypatch.setattr(data, "_decode", lambda *a: pytest.fail("decoded again"))
    again = load(f"imagefolder:{tmp_path / 'pets'}")
    assert torch.equal(again.test.images, got.test.images)


@pytest.mark.parametrize("parts", [("train", "test"), (".",)])
def test_images_of_a_folder_keep_the_names_of_their_files(tmp_path, parts):
    arrays = write_folder(tmp_path / "pets", parts, ("cat", "dog", "hen"))
    arrays = {os.path.normpath(f"{k}.png"): a for k, a in arrays.items()}
    got = load(f"imagefolder:{tmp_path / 'pets'}", split_seed=1)
    some = split(limit(got.train, 4), 0.5, 0)
    for images in (got.train, got.test, *some, leave_out(got.train, ["cat"])):
        assert len(images.files) == len(images) > 0
        for file, image, label in zip(images.files, images.images, images.labels, strict=True):
            np.testing.assert_array_equal(arrays[file], image.permute(1, 2, 0))
            assert f"{images.class_names[label]}/" in file


def test_the_cache_key_and_the_runs_identity_change_with_the_folder(tmp_path):
    write_folder(tmp_path / "pets")
    name = f"imagefolder:{tmp_path / 'pets'}"
    config = RunConfig(dataset=name)
    before, first = folder_of(config), load(name).train.images.clone()
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(tmp_path / "pets/train/cat/0.png")
    assert folder_of(config) != before
    assert not torch.equal(load(name).train.images, first)
    os.utime(tmp_path / "pets/train/cat/1.png", (1, 1))
    assert len(list((tmp_path / "data/cache").iterdir())) == 2


def test_sizes_are_unified_only_when_asked(tmp_path):
    write_folder(tmp_path / "pets", parts=("train",), size=(20, 10))
    write_folder(tmp_path / "pets", parts=("test",), size=(16, 16))
    write_folder(tmp_path / "pets", parts=("train",), size=(9, 30), classes=("cow",))
    write_folder(tmp_path / "pets", parts=("test",), classes=("cow",))
    name = f"imagefolder:{tmp_path / 'pets'}"
    with pytest.raises(ValueError, match="state image_size"):
        load(name)
    got = load(name, image_size=8)
    assert got.train.images.shape == (18, 3, 8, 8)
    assert got.test.images.shape == (18, 3, 8, 8)


def test_one_folder_is_split_here_and_grey_stays_grey(tmp_path):
    write_folder(tmp_path / "x", parts=(".",), classes=("2", "10", "1"), n=10, mode="L")
    got = load(f"imagefolder:{tmp_path / 'x'}", split_seed=1)
    assert got.class_names == ("1", "10", "2")  # as torchvision's ImageFolder has them
    assert load(f"imagefolder:{tmp_path / 'x'}", split_seed=None).test.counts.tolist() == [10, 10, 10]
    assert got.train.images.shape == (24, 1, 12, 12)
    assert got.test.counts.tolist() == [2, 2, 2]


def test_training_and_test_images_are_of_one_size_and_as_many_channels(tmp_path):
    write_folder(tmp_path / "a", parts=("train",), mode="L")
    write_folder(tmp_path / "a", parts=("test",))
    got, grey = load(f"imagefolder:{tmp_path / 'a'}"), Image.open(tmp_path / "a/train/cat/0.png")
    assert got.train.images.shape[1:] == got.test.images.shape[1:] == (3, 12, 12)
    np.testing.assert_array_equal(got.train.images[0], 3 * [np.asarray(grey)])
    write_folder(tmp_path / "b", parts=("train",), size=(20, 10))
    write_folder(tmp_path / "b", parts=("test",), size=(16, 16))
    with pytest.raises(
        ValueError, match=r"train/cat/0.png has 20x10 pixels, .*test/cat/0.png 16x16\): state image_size"
    ):
        load(f"imagefolder:{tmp_path / 'b'}")


def test_16_bits_a_pixel_are_refused(tmp_path):
    write_folder(tmp_path / "x")
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(tmp_path / "x/train/cat/0.png")
    with pytest.raises(ValueError, match="8 bits a channel"):
        load(f"imagefolder:{tmp_path / 'x'}")


def test_truncated_cache_is_refused_and_a_new_one_can_be_made(tmp_path):
    write_folder(tmp_path / "pets")
    name = f"imagefolder:{tmp_path / 'pets'}"
    first = load(name).train.images
    (cache,) = (tmp_path / "data/cache").iterdir()
    whole = cache.read_bytes()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for broken in (whole[:-100], whole[:20], b"", bytes(flipped)):
        cache.write_bytes(broken)
        with pytest.raises(Corrupt, match="delete it"):
            load(name)
    cache.unlink()
    assert torch.equal(load(name).train.images, first)


def spoil(root, how):
    write_folder(root)
    if how == "classes":
        (root / "test/dog").rename(root / "test/wolf")
    elif how == "empty":
        for f in (root / "train/dog").iterdir():
            f.unlink()
    elif how == "unreadable":
        (root / "train/dog/2.png").write_bytes(b"no picture")
    elif how == "cut off":
        path = root / "train/dog/2.png"
        path.write_bytes(path.read_bytes()[:200])
    elif how == "no test":
        for f in (root / "test").rglob("*.png"):
            f.unlink()
        for c in ("cat", "dog"):
            (root / "test" / c).rmdir()
        (root / "test").rmdir()
    elif how == "single":
        for part in ("train", "test"):
            (root / part / "dog").rename(root / f"{part}-dog")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("classes", r"only in train: \['dog'\], only in test: \['wolf'\]"),
        ("empty", "dog has no images"),
        ("unreadable", "unreadable image .*2.png"),
        ("cut off", "unreadable image .*2.png"),
        ("no test", "both are needed"),
        ("single", "at least 2"),
    ],
)
def test_bad_folders_are_refused_in_a_sentence(tmp_path, how, says):
    spoil(tmp_path / "x", how)
    with pytest.raises(ValueError, match=says):
        load(f"imagefolder:{tmp_path / 'x'}")


# -- what lies in folders of others ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("TRAIN", "VAL"),
        ("training", "validation"),
        ("train_set", "test_set"),
        ("trainset", "Test-Set"),
        ("Training Data", "Testing Data"),
        ("trainImages", "testImages"),
        ("train", "dev"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("training", "Evaluation"),
    ],
)
def test_splits_are_known_by_their_usual_names(tmp_path, train, test):
    arrays = write_folder(tmp_path / "x", parts=(train, test))
    got = load(f"imagefolder:{tmp_path / 'x'}")
    assert got.class_names == ("cat", "dog")
    np.testing.assert_array_equal(got.train.images[0].permute(1, 2, 0), arrays[f"{train}/cat/0"])
    np.testing.assert_array_equal(got.test.images[11].permute(1, 2, 0), arrays[f"{test}/dog/5"])


def test_val_is_left_alone_beside_test_and_that_is_said_once(tmp_path):
    arrays = write_folder(tmp_path / "x", parts=("train", "val", "test", ".cache", "__MACOSX"))
    with pytest.warns(Skipped, match=r"left out of x: what is beside train and test \(val\)$"):
        got = load(f"imagefolder:{tmp_path / 'x'}")
    np.testing.assert_array_equal(got.test.images[0].permute(1, 2, 0), arrays["test/cat/0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(f"imagefolder:{tmp_path / 'x'}")


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (("train", "Train", "test"), "exactly one is needed for training and one for testing"),
        (("train", "training"), "look like splits, not classes: train, training; exactly one"),
        (("val", "test"), "look like splits, not classes: test, val; exactly one"),
        (("trainA", "trainB", "testA", "testB"), "look like splits"),
        (("train_cropped", "test"), "look like splits"),
        (("cat/train", "cat/test", "dog/train", "dog/test"), "cat has test, train inside: splits come first"),
        (("train", "cows"), "only one of train/ and test/, train: both are needed"),
    ],
)
def test_folders_that_look_like_splits_are_never_classes(tmp_path, parts, says):
    write_folder(tmp_path / "x", parts=parts, n=2)
    with pytest.raises(ValueError, match=says):
        load(f"imagefolder:{tmp_path / 'x'}")


def test_splits_without_classes_are_no_classes_either(tmp_path):
    write_folder(tmp_path, parts=("x",), classes=("Train", "Test"))
    with pytest.raises(ValueError, match=r"Train has 0 class folder"):
        load(f"imagefolder:{tmp_path / 'x'}")


@pytest.mark.parametrize(
    "classes",
    [("bus", "train"), ("cat", "test", "zebra"), ("bus", "test_tube", "train"), ("invalid", "trainer", "valley")],
)
def test_a_class_may_be_called_like_a_split(tmp_path, classes):
    write_folder(tmp_path, parts=("x",), classes=classes)
    assert load(f"imagefolder:{tmp_path / 'x'}").class_names == classes


def test_a_folder_is_read_as_image_folder_reads_it_and_leftovers_are_left_out(tmp_path):
    root = tmp_path / "x"
    write_folder(root, parts=(".",), classes=("cat.png", "dog", "dog/10", "dog/9"), n=3)
    write_folder(tmp_path / "elsewhere", parts=(".",), classes=("eel", "young"), n=2)
    (root / "eel").symlink_to(tmp_path / "elsewhere/eel")
    (root / "cat.png/young.bmp").symlink_to(tmp_path / "elsewhere/young")  # twice: ImageFolder counts it twice
    (root / "dog/young").symlink_to(tmp_path / "elsewhere/young")
    (root / "dog/again").symlink_to(tmp_path / "elsewhere/young")
    (root / "eel/1.png").rename(root / "eel/1.PNG")
    want = ImageFolder(str(root))  # before what it would count, or not come to an end with
    for name in (".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png", "__MACOSX/._0.png", ".DS_Store"):
        for base in (root, root / "dog", root / "dog/9"):
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_bytes(b"no picture")
    (root / "dog/up").symlink_to(root)
    (root / "dog/9/loop").symlink_to(root / "dog")
    for name in (
        "labels.csv",
        "x.zip",
        "dog/Thumbs.db",
        "dog/9/a.HEIC",
        "dog/b.heic",
        "dog/notes",
        "dog/paper.pdf",
        "eel/self",
    ):
        (root / name).symlink_to(root / name) if name == "eel/self" else (root / name).write_bytes(b"no picture")
    Image.new("RGB", (5, 5)).save(root / "cover.png")
    with pytest.warns(Skipped) as told:
        got = load(f"imagefolder:{root}", split_seed=None)
    (text,) = {str(w.message) for w in told}
    assert "left out of x: 6 files" in text
    assert "2 .heic" in text
    assert re.search(r"for example (cover.png|dog/b.heic)", text)
    assert list(got.class_names) == want.classes == ["cat.png", "dog", "eel"]
    # ImageFolder's order inside a class is that of os.walk, another one
    pixels = sorted((y, np.asarray(image).tobytes()) for image, y in want)
    found = zip(got.test.labels.tolist(), got.test.images.permute(0, 2, 3, 1).numpy(), strict=True)
    assert sorted((y, x.tobytes()) for y, x in found) == pixels


def broken(kind: str, tmp_path: Path) -> tuple[str, bytes]:
    """A name and the bytes of an image that is none."""
    suffix, _, how = kind.partition(" ")
    if how == "half":
        file, picture = io.BytesIO(), Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
        picture.save(file, Image.registered_extensions()[suffix])
        return f"x{suffix}", file.getvalue()[: len(file.getvalue()) // 2]
    made = {
        "nothing": b"",
        "a page": b"<html>not found</html>",
        "bomb": b"P6 15000 13000 255\n",
        "large": b"P6 10000 10000 255\n",
        "no pixels": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 0, 9, 24, 0),
        "odd numbers": b"P6 9 \xff 255\n",
        "line\nbreak": b"",
    }
    return (f"{how}{suffix}" if "\n" in how else f"x{suffix}"), made[how]


HALVES = [
    f"{s} half" for s in (".ppm", ".qoi", ".dds", ".avif", ".gif", ".tiff", ".webp", ".ico", ".jpg", ".bmp", ".tga")
]
OTHERS = [
    ".png nothing",
    ".jpg a page",
    ".ppm bomb",
    ".ppm large",
    ".tga no pixels",
    ".ppm odd numbers",
    ".png line\nbreak",
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", HALVES + OTHERS)
def test_damaged_and_hostile_images_are_refused_by_name(tmp_path, kind):
    write_folder(tmp_path / "x", parts=(".",), n=3)
    name, raw = broken(kind, tmp_path)
    (tmp_path / "x/cat" / name).write_bytes(raw)
    with pytest.raises(ValueError, match="unreadable image") as told:
        load(f"imagefolder:{tmp_path / 'x'}")
    assert repr(name)[1:-1] in str(told.value)
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (b"caf\xe9.png", r"caf\\udce9.png' is not UTF-8"),
        (b"link.png", "link.png: No such file"),
        (b"pipe.png", "no file"),
    ],
)
def test_names_that_are_no_text_and_what_is_no_file_are_refused(tmp_path, name, says):
    write_folder(tmp_path / "x", parts=(".",))
    path = os.fsencode(tmp_path / "x/cat") + b"/" + name
    if name == b"link.png":
        os.symlink(b"nowhere", path)
    elif name == b"pipe.png":
        os.mkfifo(path)
    else:
        with open(path, "wb") as f:
            f.write((tmp_path / "x/cat/0.png").read_bytes())
    with pytest.raises(ValueError, match=says) as told:
        load(f"imagefolder:{tmp_path / 'x'}")
    assert str(told.value).isprintable()


def test_odd_images_are_what_image_folder_makes_of_them(tmp_path):
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    frames = [rgb.quantize(16), rgb.rotate(90).quantize(16)]
    write_folder(tmp_path / "x", parts=(".",), classes=("a", "b"), n=1)
    rgb.convert("CMYK").save(tmp_path / "x/a/cmyk.tif")
    Image.fromarray(rng.integers(0, 256, (12, 12, 4), np.uint8)).save(tmp_path / "x/a/clear.png")
    rgb.quantize(16).save(tmp_path / "x/a/palette.png", transparency=bytes(range(16)))
    frames[0].save(tmp_path / "x/b/moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    rgb.convert("LA").save(tmp_path / "x/b/grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    rgb.save(tmp_path / "x/b/turned.png", exif=exif)
    got = load(f"imagefolder:{tmp_path / 'x'}", split_seed=None)
    for image, (want, _) in zip(got.test.images, ImageFolder(str(tmp_path / "x")), strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), want)


@pytest.mark.parametrize("size", [0, -3, 2.5, 100_000])
def test_a_side_that_cannot_be_is_refused_before_work(tmp_path, size):
    write_folder(tmp_path / "x")
    with pytest.raises(ValueError, match=rf"image_size={size}: a whole number from 1 to 9459"):
        load(f"imagefolder:{tmp_path / 'x'}", image_size=size)


def test_more_than_the_memory_is_refused_before_work(tmp_path, monkeypatch):
    write_folder(tmp_path / "x")
    monkeypatch.setattr(data, "_free", lambda: 2**30)
    with pytest.raises(
        ValueError, match=r"24 images of 5000x5000 pixels would need 1.7 GiB of memory, and 1.0 are free"
    ):
        load(f"imagefolder:{tmp_path / 'x'}", image_size=5000)
    Image.new("RGB", (9000, 1)).save(tmp_path / "x/train/cat/0.png")
    with pytest.raises(ValueError, match=r"0.png: 9000x1 pixels cannot be brought to a shorter side of 500"):
        load(f"imagefolder:{tmp_path / 'x'}", image_size=500)


def test_grey_images_can_have_three_channels_as_image_folder_has_them(tmp_path):
    write_folder(tmp_path / "x", parts=(".",), mode="L", n=10)
    name = f"imagefolder:{tmp_path / 'x'}"
    got = load(name, channels=3, split_seed=None)
    for image, (want, _) in zip(got.train.images, ImageFolder(str(tmp_path / "x")), strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), want)
    assert got.test is got.train
    assert load(name).train.images.shape[1] == 1
    assert load(name, channels=3).test.images.shape == (4, 3, 12, 12)
    digits = load("digits", channels=3)
    assert torch.equal(digits.test.images, load("digits").test.images.repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match="channels=2: 3, or None"):
        load(name, channels=2)


def test_one_coloured_image_colours_the_others_wherever_it_is(tmp_path):
    arrays = write_folder(tmp_path / "x", parts=(".",), mode="L", n=80)
    colour = np.random.default_rng(1).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "x/dog/99.png")
    got = load(f"imagefolder:{tmp_path / 'x'}", split_seed=None).train
    np.testing.assert_array_equal(got.images[-1].permute(1, 2, 0), colour)
    np.testing.assert_array_equal(got.images[0], 3 * [arrays["./cat/0"]])


@pytest.mark.parametrize(
    ("where", "says"),
    [("x", "x"), ("a:b", "a-b"), ('q"u<e>s?t*', "q-u-e-s-t"), ("l" * 250, "l" * 60), ("日本", "日本"), ("con.", "con")],
)
def test_the_name_of_a_run_is_one_that_file_systems_take(tmp_path, monkeypatch, where, says):
    write_folder(tmp_path / where)
    monkeypatch.chdir(tmp_path)
    config = RunConfig(dataset=f"imagefolder:{where}")
    near, far = folder_of(config).name, folder_of(RunConfig(dataset=f"imagefolder:{tmp_path / where}")).name
    assert re.fullmatch(re.escape(f"{says}-at-erm-s0-") + "[0-9a-f]{16}", near)
    assert far.startswith(f"{says}-at-erm-s0-")
    load(config.dataset)


def test_the_memory_for_a_folder_is_little_more_than_its_images(tmp_path):
    for root, n in (("small", 2), ("split/train", 100), ("split/test", 50), ("single", 150)):
        for c in ("cat", "dog"):
            (tmp_path / root / c).mkdir(parents=True)
            for i in range(n):
                (tmp_path / root / c / f"{i}.ppm").write_bytes(b"P6 400 400 255\n" + bytes([i]) * 480_000)
    code = f"""if True:
        import ctypes, re
        from pathlib import Path
        from cfol_nb.data import load
        load("imagefolder:{tmp_path / "small"}").train.statistics()  # imports, too

        def mib(what):
            return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

        for where, most in (("split", 1.5), ("split", 1.2), ("single", 1.5), ("single", 1.2)):  # building, loading
            got = None
            ctypes.CDLL(None).malloc_trim(0)  # what the package keeps for later
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = mib("VmRSS")
            got = load(f"imagefolder:{tmp_path}/{{where}}")
            got.train.statistics(), got.test.statistics()  # a stored file is read where it is looked at
            share = (mib("VmHWM") - before) / (300 * 3 * 400 * 400 / 2**20)
            print(where, share)
            assert len(got.train) + len(got.test) == 300
            assert 0.9 < share <= most
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tensors_are_written_in_safetensors_own_bytes(tmp_path):
    from safetensors.torch import load_file, save

    from cfol_nb.files import read_tensors, write_tensors

    types = ("float64", "int64", "float32", "int32", "bfloat16", "float16", "int16", "int8", "uint8", "bool")
    tensors = {t: torch.arange(6).view(2, 3).to(getattr(torch, t)) for t in types}
    tensors |= {"empty": torch.zeros(0, 2), "scalar": torch.tensor(2.5), "turned": torch.rand(3, 5).T}
    tensors["same"] = tensors["float64"]
    write_tensors(tmp_path / "x.safetensors", tensors, {"a": 1})
    for found in (load_file(tmp_path / "x.safetensors"), read_tensors(tmp_path / "x.safetensors")[0]):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    own = {k: tensors[k].contiguous() for k in ("float64", "scalar", "turned", "uint8")}  # all in one order
    write_tensors(tmp_path / "y.safetensors", own)
    raw = (tmp_path / "y.safetensors").read_bytes()
    header = {"cfol_nb": raw_header(raw)}
    assert raw == save(own, metadata=header)


def raw_header(raw: bytes) -> str:
    import json

    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["cfol_nb"]


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("cifar11", ValueError, "did you mean 'cifar10'"),
        ("imagefolder:nowhere", FileNotFoundError, "train/ and test/"),
        ("cifar10", FileNotFoundError, "cfol-nb fetch cifar10"),
        ("mnist", FileNotFoundError, "CFOL_NB_DATA"),
        ("svhn", FileNotFoundError, "fetch svhn"),
        ("gtsrb", FileNotFoundError, "fetch gtsrb"),
        ("imagenette", FileNotFoundError, "fetch imagenette"),
        ("stl10", FileNotFoundError, "fetch stl10"),
    ],
)
def test_missing_data_say_what_mends_it(name, error, says):
    with pytest.raises(error, match=says):
        load(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": torch.tensor([0, 1, 2, 5])}, "label 5 is not in 0..2"),
        ({"labels": torch.tensor([0, 0, 1, 1])}, "'c2' has no"),
        ({"labels": torch.tensor([0, 1])}, "4 images and labels"),
        ({"images": torch.rand(4, 1, 2, 2)}, "uint8"),
        ({"images": torch.zeros(4, 2, 2, 2, dtype=torch.uint8)}, "1 or 3"),
    ],
)
def test_bad_image_sets_are_refused_in_a_sentence(change, says):
    given = {"images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8), "labels": torch.tensor([0, 1, 2, 2]), **change}
    with pytest.raises(ValueError, match=says):
        ImageSet(**given, class_names=("c0", "c1", "c2"))


def test_prepare_holds_out_before_it_thins_and_keeps_the_test_split(digits):
    config = RunConfig(train_limit=60, test_limit=20, imbalance={"kind": "step", "factor": 10}, holdout=0.2)
    train, held, whole = prepare(config)
    assert isinstance(whole, DataSet)
    assert held.counts.tolist() == [12] * 10
    assert train.counts.tolist() == [48] * 5 + [4] * 5
    assert whole.test.counts.tolist() == [20] * 10
    assert prepare(RunConfig(crop=2, flip=True))[2].crop == 2


def test_leaving_a_class_out_keeps_the_images_of_the_others(digits):
    whole, part = prepare(RunConfig(train_limit=60)), prepare(RunConfig(train_limit=60, without=("1", "8")))
    for a, b in ((whole[0], part[0]), (whole[1], part[1]), (whole[2].test, part[2].test)):
        assert b.class_names == tuple("02345679")
        for new, name in enumerate(b.class_names):
            assert torch.equal(b.images[b.of_class(new)], a.images[a.of_class(int(name))])
        assert len(b) == len(a) - len(a.of_class(1)) - len(a.of_class(8))
    assert part[2].class_names == part[0].class_names
    with pytest.raises(ValueError, match="unknown class 'eight'"):
        prepare(RunConfig(without=("eight",)))
    with pytest.raises(ValueError, match="fewer than 2 classes"):
        leave_out(digits.train, tuple("012345678"))


# -- torchvision's readers, on files in their formats ------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())
    with gzip.open(f"{path}.gz", "wb") as f:
        f.write(head + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_format(tmp_path, name, folder):
    rng, pixels = np.random.default_rng(0), {}
    for part, n in (("train", 30), ("t10k", 20)):
        pixels[part] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"data/{folder}/raw/{part}-images-idx3-ubyte", pixels[part])
        write_idx(tmp_path / f"data/{folder}/raw/{part}-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))
    got = load(name)
    np.testing.assert_array_equal(got.train.images[:, 0], pixels["train"])
    assert got.test.labels.tolist() == [i % 10 for i in range(20)]
    assert len(got.class_names) == 10


def test_cifar_format(tmp_path, monkeypatch):
    import pickle

    import torchvision

    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.isfile(path))
    root, rng = tmp_path / "data/cifar-10-batches-py", np.random.default_rng(0)
    root.mkdir(parents=True)
    rows = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows[name] = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        (root / name).write_bytes(pickle.dumps({"data": rows[name], "labels": list(range(10))}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    got = load("cifar10")
    assert got.class_names == tuple("abcdefghij")
    assert got.train.images.shape == (50, 3, 32, 32)
    np.testing.assert_array_equal(got.test.images.flatten(1), rows["test_batch"])
    assert got.crop == 4
    assert got.flip


def test_imagenette_and_gtsrb_folders(tmp_path):
    from torchvision.datasets import Imagenette

    for part in ("train", "val"):
        for wnid in Imagenette._WNID_TO_CLASS:
            folder = tmp_path / "data/imagenette/imagenette2-160" / part / wnid
            folder.mkdir(parents=True)
            Image.new("RGB", (200, 160), (10, 200, 30)).save(folder / "a.JPEG")
    got = load("imagenette", image_size=64)
    assert got.train.images.shape == (10, 3, 64, 64)
    assert got.class_names[0] == "tench"

    for c in range(3):
        folder = tmp_path / f"data/gtsrb/GTSRB/Training/{c:05d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (30 + c, 40), (c, c, c)).save(folder / "00000.ppm")
    (tmp_path / "data/gtsrb/GTSRB/Final_Test/Images").mkdir(parents=True)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(3):
        Image.new("RGB", (50, 45)).save(tmp_path / f"data/gtsrb/GTSRB/Final_Test/Images/{i:05d}.ppm")
        rows.append(f"{i:05d}.ppm;50;45;0;0;50;45;{2 - i}")
    (tmp_path / "data/gtsrb/GT-final_test.csv").write_text("\n".join(rows))
    signs = load("gtsrb")
    assert signs.train.images.shape == (3, 3, 32, 32)
    assert signs.test.labels.tolist() == [2, 1, 0]
    assert not signs.flip


def test_svhn_and_stl10_formats(tmp_path, monkeypatch):
    import scipy.io
    import torchvision

    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda path, md5=None: os.path.isfile(path))
    monkeypatch.setattr(torchvision.datasets.stl10, "check_integrity", lambda path, md5=None: os.path.isfile(path))
    rng, root = np.random.default_rng(0), tmp_path / "data"
    (root / "stl10_binary").mkdir(parents=True)
    for part in ("train", "test"):
        x = rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        y = (np.arange(20) % 10 + 1).reshape(-1, 1)  # the files call the digit 0 class 10
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": x, "y": y})
        (root / f"stl10_binary/{part}_X.bin").write_bytes(
            rng.integers(0, 256, 10 * 3 * 96 * 96, dtype=np.uint8).tobytes()
        )
        (root / f"stl10_binary/{part}_y.bin").write_bytes(np.arange(1, 11, dtype=np.uint8).tobytes())
    for name in ("unlabeled_X.bin", "fold_indices.txt"):
        (root / "stl10_binary" / name).write_bytes(b"")
    (root / "stl10_binary/class_names.txt").write_text("\n".join("abcdefghij"))
    numbers = load("svhn")
    np.testing.assert_array_equal(numbers.test.images[3].permute(1, 2, 0), x[:, :, :, 3])
    assert numbers.test.labels.tolist() == [(i + 1) % 10 for i in range(10)] * 2
    assert numbers.class_names == tuple("0123456789")
    stl = load("stl10")
    assert stl.train.images.shape == (10, 3, 96, 96)
    assert stl.class_names == tuple("abcdefghij")

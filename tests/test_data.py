import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare

from cfol_nb import data
from cfol_nb.config import RunConfig
from cfol_nb.data import DataSet, ImageSet, augment, leave_out, limit, load, long_tail, prepare, split
from cfol_nb.evaluate import as_float
from cfol_nb.files import Corrupt


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


def test_the_cache_key_and_the_runs_identity_change_with_the_folder(tmp_path):
    from cfol_nb.runs import folder_of

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
    with pytest.raises(ValueError, match="training images are 20x10 pixels, test images 16x16: state image_size"):
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

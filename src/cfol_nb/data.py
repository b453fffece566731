"""Images as tensors: loading, decoding once, splitting, thinning to a long tail, augmenting on the device.

Indices are chosen with NumPy's generator, so a split does not depend on torch's version or on the device.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfol_nb.config import RunConfig, choose
from cfol_nb.files import ROOT, Corrupt, bar, data_dir, read_tensors, write_tensors


@dataclass(frozen=True)
class ImageSet:
    """images: (N, C, H, W) uint8. labels: (N,) int64 in 0..K-1. class_names: K strings.

    Raises ValueError for a label out of range, for lengths that differ, and for a class without images.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] not in (1, 3):
            raise ValueError(
                f"images are {self.images.dtype} {tuple(self.images.shape)}: uint8 (N, 1 or 3, H, W) is needed"
            )
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"{len(self.images)} images and labels of shape {tuple(self.labels.shape)}")
        k = len(self.class_names)
        if len(self.labels) and not (int(self.labels.min()) >= 0 and int(self.labels.max()) < k):
            bad = self.labels[(self.labels < 0) | (self.labels >= k)][0]
            raise ValueError(f"label {int(bad)} is not in 0..{k - 1} ({k} class names)")
        for name, n in zip(self.class_names, self.counts.tolist(), strict=True):
            if not n:
                raise ValueError(f"class {name!r} has no images")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> Tensor:
        """(K,) images per class."""
        return torch.bincount(self.labels, minlength=len(self.class_names))

    def of_class(self, c: int) -> Tensor:
        """Indices of the images of class c."""
        return (self.labels == c).nonzero().squeeze(1)

    def __getitem__(self, index) -> ImageSet:
        """The images at these indices, in this order."""
        index = torch.as_tensor(index)
        return ImageSet(self.images[index], self.labels[index], self.class_names)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of the images in [0, 1]."""
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.images.transpose(0, 1)]).double()
        value = torch.arange(256, dtype=torch.float64) / 255
        mean = counts @ value / counts.sum(1)
        std = (counts @ value**2 / counts.sum(1) - mean**2).clamp_min(0).sqrt()
        return mean.tolist(), std.clamp_min(1e-3).tolist()


@dataclass(frozen=True)
class DataSet:
    """A training split and a test split, and what augmentation suits them."""

    name: str
    train: ImageSet
    test: ImageSet
    crop: int  # pixels of padding before a random crop; 0: no crop
    flip: bool  # whether a mirrored image keeps its class

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names


# -- index choices -----------------------------------------------------------------------------------------------------


def _per_class(labels: Tensor, keep: Callable[[int, int], int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (kept, left): of class c with n images a random keep(c, n)."""
    y, rng = labels.cpu().numpy(), np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(y == c))[: keep(c, int((y == c).sum()))] for c in range(int(y.max()) + 1)]
    kept = np.sort(np.concatenate(kept))
    return kept, np.setdiff1d(np.arange(len(y)), kept)


def split(images: ImageSet, fraction: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Stratified (rest, part): `part` holds the fraction of every class, at least one image and not all of it."""
    small = images.counts.min()
    if small < 2:
        raise ValueError(
            f"class {images.class_names[int(images.counts.argmin())]!r} has {int(small)} image: it cannot be split"
        )
    part, rest = _per_class(images.labels, lambda c, n: min(max(round(fraction * n), 1), n - 1), seed)
    return images[rest], images[part]


def limit(images: ImageSet, per_class: int | None, seed: int = 0) -> ImageSet:
    """At most `per_class` random images of every class; None: all."""
    return images if per_class is None else images[_per_class(images.labels, lambda c, n: min(n, per_class), seed)[0]]


def long_tail(images: ImageSet, kind: str, factor: float, seed: int = 0) -> ImageSet:
    """Thin the classes so that the first keeps all of its images and the last 1 / factor of the largest count.

    kind: "exp", n_c = n_max * factor ** (-c / (K - 1)); "step", the second half of the classes keeps n_max / factor
    (Cao et al. 2019). Every class keeps at least one image; none gets more than it has.
    """
    k, top = len(images.class_names), int(images.counts.max())
    choose("imbalance", kind, ("exp", "step"))
    if not factor >= 1:
        raise ValueError(f"imbalance factor {factor}: 1 (balanced) or more is needed")

    def keep(c: int, n: int) -> int:
        share = factor ** (-c / max(k - 1, 1)) if kind == "exp" else (1 / factor if c >= k / 2 else 1)
        return min(n, max(1, int(top * share)))

    return images[_per_class(images.labels, keep, seed)[0]]


def leave_out(images: ImageSet, names: Sequence[str]) -> ImageSet:
    """The images of the other classes, which keep their order. Raises ValueError for an unknown class."""
    for name in names:
        choose("class", name, images.class_names)
    kept = [c for c, name in enumerate(images.class_names) if name not in names]
    if len(kept) < 2:
        raise ValueError(f"without {', '.join(names)} fewer than 2 classes are left")
    if len(kept) == len(images.class_names):
        return images
    label = torch.full((len(images.class_names),), -1)
    label[kept] = torch.arange(len(kept))
    y = label[images.labels]
    return ImageSet(images.images[y >= 0], y[y >= 0], tuple(images.class_names[c] for c in kept))


# -- sources -----------------------------------------------------------------------------------------------------------


def _torchvision(name: str, **fixed):
    def make(root: Path, train: bool, download: bool):
        import torchvision

        kwargs = dict(fixed)
        if "split" in kwargs:
            kwargs["split"] = kwargs["split"][0 if train else 1]
        else:
            kwargs["train"] = train
        where = root / name.lower() if name == "Imagenette" else root
        if name == "Imagenette":  # it refuses to download into a folder that is there
            download = download and not any(where.glob("*/train"))
        return getattr(torchvision.datasets, name)(str(where), download=download, **kwargs)

    return make


# name: (maker, padding of the random crop, may be flipped, side it is resized to unless asked otherwise)
SOURCES: dict[str, tuple[Callable, int, bool, int | None]] = {
    "cifar10": (_torchvision("CIFAR10"), 4, True, None),
    "cifar100": (_torchvision("CIFAR100"), 4, True, None),
    "stl10": (_torchvision("STL10", split=("train", "test")), 8, True, None),
    "svhn": (_torchvision("SVHN", split=("train", "test")), 4, False, None),
    "gtsrb": (_torchvision("GTSRB", split=("train", "test")), 4, False, 32),
    "imagenette": (_torchvision("Imagenette", split=("train", "val"), size="160px"), 16, True, 160),
    "mnist": (_torchvision("MNIST"), 2, False, None),
    "fashion_mnist": (_torchvision("FashionMNIST"), 2, True, None),
}
# the 20 super-classes of CIFAR-100 (Krizhevsky 2009)
SUPERCLASSES = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
SUPERCLASS = {name: group for group, names in SUPERCLASSES.items() for name in names.split()}
DATASETS = ("digits", *SOURCES, "imagefolder:PATH")
_DIGITS = tuple("0123456789")


def load(name: str, *, image_size: int | None = None, split_seed: int | None = 0, download: bool = False) -> DataSet:
    """A data set by name: "digits" (embedded), one of torchvision's, or "imagefolder:PATH".

    image_size: side in pixels to which every image is resized (shorter side, then the centre); None keeps the stored
    size, which must then be one for all. split_seed: of the test split, where the data come without one (a third of
    digits, a fifth of a single folder; None: a single folder is not split, both splits are all of it). download: fetch
    what is missing into data/ (torchvision's sets only).

    PATH has `train/` and `test/` (or `val/`) with one folder per class, or the class folders themselves; a relative one
    is looked for in the current folder, in the project and in data/. Decoded images are kept in data/cache/.
    Raises ValueError for an unknown name or unusable images, FileNotFoundError for data that are not there.
    """
    if name == "digits":
        return _digits(image_size, split_seed or 0)
    if name.startswith("imagefolder:"):
        return _imagefolder(name, image_size, split_seed)
    make, crop, flip, side = SOURCES[choose("data set", name, DATASETS)]
    return _from_torchvision(name, make, crop, flip, image_size or side, download)


def fingerprint(name: str) -> str:
    """What tells two states of a data set apart: empty for fixed ones, else a hash of the folder's listing."""
    return _listing(_find(name))[1] if name.startswith("imagefolder:") else ""


def _digits(image_size: int | None, split_seed: int) -> DataSet:
    from sklearn.datasets import load_digits

    if image_size not in (None, 8):
        raise ValueError(f"image_size={image_size}: digits are 8 x 8 pixels")
    raw = load_digits()
    images = torch.from_numpy(np.rint(raw.images * 255 / 16).astype(np.uint8)).unsqueeze(1)  # stored as 0..16
    train, test = split(ImageSet(images, torch.from_numpy(raw.target).long(), _DIGITS), 1 / 3, split_seed)
    return DataSet("digits", train, test, crop=0, flip=False)


def _resize(image, side: int | None):
    """A PIL image with its shorter side brought to `side`, then its centre cut out."""
    from PIL import Image

    if side is None or image.size == (side, side):
        return image
    w, h = image.size
    w, h = max(side, round(w * side / min(w, h))), max(side, round(h * side / min(w, h)))
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    left, top = (w - side) // 2, (h - side) // 2
    return image.crop((left, top, left + side, top + side))


def _decode(items: Iterable, open_image: Callable, side: int | None, label: str) -> Tensor:
    """(N, C, H, W) uint8 on all cores; one channel if every image is grey. PIL releases the lock while it decodes."""
    items = list(items)

    def one(item) -> tuple[np.ndarray, bool]:
        try:
            image = open_image(item)
            if image.mode[0] in "IF":
                raise ValueError(f"image {item} has {image.mode} pixels: 8 bits a channel are needed, convert it first")
            grey = image.mode in ("L", "1")
            return np.asarray(_resize(image.convert("RGB"), side)), grey
        except (OSError, SyntaxError) as error:
            raise ValueError(f"unreadable image {item}: {error}") from error

    first, _ = one(items[0])
    out, every_grey = np.empty((len(items), *first.shape), np.uint8), True
    progress = bar(len(items), label)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, progress:
        for i, (array, grey) in enumerate(pool.map(one, items)):
            if array.shape != first.shape:
                raise ValueError(
                    f"images differ in size ({first.shape[1]}x{first.shape[0]} and "
                    f"{array.shape[1]}x{array.shape[0]} pixels): state image_size, for example image_size=32"
                )
            out[i], every_grey = array, every_grey and grey
            progress.update()
    images = torch.from_numpy(out).permute(0, 3, 1, 2)
    return (images[:, :1] if every_grey else images).contiguous()


def _cached(
    stem: str, key: dict, make: Callable[[], tuple[dict[str, Tensor], list[str]]]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors and class names from data/cache/, made first if the file is missing or of another key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = data_dir() / "cache" / f"{stem}-{digest}.safetensors"
    if path.exists():
        tensors, meta = read_tensors(path)
        return tensors, meta["class_names"]
    tensors, names = make()
    write_tensors(path, tensors, {"class_names": names, "key": key})
    return tensors, names


def _dataset(name: str, tensors: dict[str, Tensor], names: list[str], crop: int, flip: bool) -> DataSet:
    train, test = (ImageSet(tensors[f"{s}.images"], tensors[f"{s}.labels"], tuple(names)) for s in ("train", "test"))
    return DataSet(name, train, test, crop, flip)


def _from_torchvision(name: str, make: Callable, crop: int, flip: bool, side: int | None, download: bool) -> DataSet:
    def read() -> tuple[dict[str, Tensor], list[str]]:
        tensors, names = {}, None
        for train in (True, False):
            try:
                source = make(data_dir(), train, download)
            except RuntimeError as error:
                if "not found" not in str(error).lower() and "download" not in str(error).lower():
                    raise
                raise FileNotFoundError(
                    f"{name} is not in {data_dir()}: fetch it with `cfol-nb fetch {name}` or load({name!r}, "
                    "download=True), set CFOL_NB_DATA to the folder that holds it, or use imagefolder:PATH"
                ) from error
            part = "train" if train else "test"
            tensors[f"{part}.images"], tensors[f"{part}.labels"] = _arrays(source, side, f"{name} {part}")
            found = getattr(source, "classes", None) or sorted(
                set(map(str, tensors[f"{part}.labels"].tolist())), key=int
            )
            names = names or [c if isinstance(c, str) else c[0] for c in found]
        return tensors, names

    tensors, names = _cached(name, {"source": name, "side": side}, read)
    return _dataset(name, tensors, names, crop, flip)


def _arrays(source, side: int | None, label: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a torchvision data set: its arrays where it has them, else decoded one by one."""
    labels = next((getattr(source, a) for a in ("targets", "labels", "_labels") if hasattr(source, a)), None)
    if labels is None:
        labels = [y for _, y in source._samples]
    labels = torch.as_tensor(np.asarray(labels)).long()
    if hasattr(source, "data") and side is None:
        images = torch.as_tensor(np.asarray(source.data))
        if images.ndim == 3:
            images = images.unsqueeze(1)
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        return images.contiguous(), labels
    return _decode(range(len(source)), lambda i: source[i][0], side, label), labels


def _find(name: str) -> Path:
    path = Path(name.removeprefix("imagefolder:")).expanduser()
    for base in (Path.cwd(), ROOT, data_dir(), data_dir().parent):
        if (base / path).is_dir():
            return (base / path).resolve()
    raise FileNotFoundError(
        f"no folder {path} (looked in the current folder, the project, and {data_dir()}): "
        "give imagefolder:PATH with train/ and test/ inside, one folder per class each"
    )


def _classes(folder: Path) -> list[str]:
    """Class folders in the order of torchvision's ImageFolder, in which models of others know them: 10 before 2."""
    return sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))


def _listing(root: Path) -> tuple[dict[str, list[tuple[str, list[Path]]]], str]:
    """{part: [(class, files)]} and a hash of every file's path, size and time."""
    from PIL import Image

    known = set(Image.registered_extensions())
    test = next((t for t in ("test", "val") if (root / t).is_dir()), None)
    if (root / "train").is_dir() != (test is not None):
        raise ValueError(f"{root} has only one of train/ and test/: both are needed, or the class folders themselves")
    parts = {"train": root / "train", "test": root / test} if test else {"train": root}
    h, out = hashlib.sha256(), {}
    for part, folder in parts.items():
        out[part] = []
        for c in _classes(folder):
            files = sorted(
                f for f in (folder / c).rglob("*") if f.suffix.lower() in known and not f.name.startswith(".")
            )
            if not files:
                raise ValueError(f"class folder {folder / c} has no images")
            out[part].append((c, files))
            for f in files:
                stat = f.stat()
                h.update(f"{part}/{f.relative_to(folder)}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    if test:
        a, b = ({c for c, _ in out[p]} for p in ("train", "test"))
        if a != b:
            raise ValueError(f"class folders differ: only in train: {sorted(a - b)}, only in {test}: {sorted(b - a)}")
    if len(out["train"]) < 2:
        raise ValueError(f"{root} has {len(out['train'])} class folder(s): at least 2 are needed")
    return out, h.hexdigest()


def _imagefolder(name: str, side: int | None, split_seed: int) -> DataSet:
    from PIL import Image

    root = _find(name)
    listing, key = _listing(root)

    def read() -> tuple[dict[str, Tensor], list[str]]:
        tensors = {}
        for part, classes in listing.items():
            files = [f for _, fs in classes for f in fs]
            tensors[f"{part}.images"] = _decode(files, Image.open, side, f"decoding {root.name}/{part}")
            tensors[f"{part}.labels"] = torch.cat([torch.full((len(fs),), c) for c, (_, fs) in enumerate(classes)])
        images = {k: v for k, v in tensors.items() if k.endswith("images")}
        (_, h, w), *others = (v.shape[1:] for v in images.values())
        for _, *size in others:
            if size != [h, w]:
                raise ValueError(
                    f"training images are {w}x{h} pixels, test images {size[1]}x{size[0]}: "
                    "state image_size, for example image_size=32"
                )
        channels = max(v.shape[1] for v in images.values())  # grey ones beside coloured ones are coloured, too
        tensors |= {k: v.expand(-1, channels, -1, -1).contiguous() for k, v in images.items()}
        return tensors, [c for c, _ in listing["train"]]

    tensors, names = _cached(root.name, {"listing": key, "side": side}, read)
    if "test.images" not in tensors:
        whole = ImageSet(tensors["train.images"], tensors["train.labels"], tuple(names))
        parts = (whole, whole) if split_seed is None else split(whole, 0.2, split_seed)
        return DataSet(name, *parts, crop=4, flip=True)
    return _dataset(name, tensors, names, crop=4, flip=True)


def prepare(config: RunConfig) -> tuple[ImageSet, ImageSet, DataSet]:
    """(training images, held-out images, the data set cut down to these and to the limited test split) of a run."""
    data = load(config.dataset, image_size=config.image_size, split_seed=config.split_seed)
    train, held = split(limit(data.train, config.train_limit, config.split_seed), config.holdout, config.split_seed)
    if config.imbalance:
        train = long_tail(train, config.imbalance.kind, config.imbalance.factor, config.split_seed)
    test = limit(data.test, config.test_limit, config.split_seed)
    # last, so that the other classes have the same images with and without a class
    train, held, test = (leave_out(part, config.without) for part in (train, held, test))
    crop = data.crop if config.crop is None else config.crop
    flip = data.flip if config.flip is None else config.flip
    if crop >= (side := min(test.images.shape[2:])):
        raise ValueError(f"crop={crop}: images of {side} pixels could be moved out of sight; 0 to {side - 1} is needed")
    return train, held, DataSet(data.name, train, test, crop, flip)


# -- on the device -----------------------------------------------------------------------------------------------------


def augment(images: Tensor, crop: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """Each image shifted by up to `crop` pixels either way over a black border and mirrored with probability 1/2.

    images: (n, C, H, W) of any type, on any device; no loop over images, no wait for the device.
    """
    n, _, h, w = images.shape
    device = images.device
    rows, cols = torch.arange(h, device=device).expand(n, h), torch.arange(w, device=device).expand(n, w)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
        cols = torch.where(mirrored, w - 1 - cols, cols)
    if crop:
        images = torch.nn.functional.pad(images, (crop,) * 4)
        shift = torch.randint(0, 2 * crop + 1, (2, n, 1), generator=generator, device=device)
        rows, cols = rows + shift[0], cols + shift[1]
    if not (crop or flip):
        return images
    each = torch.arange(n, device=device).view(n, 1, 1)
    return images.permute(0, 2, 3, 1)[each, rows.unsqueeze(2), cols.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


__all__ = [
    "DATASETS",
    "Corrupt",
    "DataSet",
    "ImageSet",
    "augment",
    "fingerprint",
    "leave_out",
    "limit",
    "load",
    "long_tail",
    "prepare",
    "split",
]

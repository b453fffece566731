"""Images as tensors: loading, decoding once, splitting, thinning to a long tail, augmenting on the device.

Indices are chosen with NumPy's generator, so a split does not depend on torch's version or on the device.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfol_nb.config import RunConfig, choose
from cfol_nb.files import ROOT, Corrupt, Unsigned, as_name, bar, data_dir, read_tensors, write_tensors


class Skipped(UserWarning):
    """Something in a folder of images was left out."""


@dataclass(frozen=True)
class ImageSet:
    """images: (N, C, H, W) uint8. labels: (N,) int64 in 0..K-1. class_names: K strings. files: where images are of a
    folder, the path of each below it.

    Raises ValueError for a label out of range, for lengths that differ, and for a class without images.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    files: tuple[str, ...] = field(default=(), repr=False)

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
        files = np.array(self.files, object)[index.cpu().numpy()] if self.files else ()
        return ImageSet(self.images[index], self.labels[index], self.class_names, tuple(files))

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of the images in [0, 1]."""
        counts = torch.zeros(self.images.shape[1], 256, dtype=torch.float64)
        size = max(1, 2**20 // math.prod(self.images.shape[1:]))
        for some in self.images.split(size):  # bincount copies what it counts
            counts += torch.stack([torch.bincount(c.flatten(), minlength=256) for c in some.transpose(0, 1)])
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
        """Names of the classes, in the order of the labels."""
        return self.train.class_names


# -- index choices -----------------------------------------------------------------------------------------------------


def _per_class(labels: Tensor, keep: Callable[[int, int], int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (kept, left): of class c with n images a random keep(c, n)."""
    y, rng = labels.cpu().numpy(), np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(y == c))[: keep(c, int((y == c).sum()))] for c in range(int(y.max()) + 1)]
    kept = np.sort(np.concatenate(kept))
    return kept, np.setdiff1d(np.arange(len(y)), kept)


def split(images: ImageSet, fraction: float, seed: int = 0, *, in_place: bool = False) -> tuple[ImageSet, ImageSet]:
    """Stratified (rest, part): `part` holds the fraction of every class, at least one image and not all of it.

    in_place: in the memory of `images`, which must not be used any more, instead of in a copy.
    """
    small = images.counts.min()
    if small < 2:
        raise ValueError(
            f"class {images.class_names[int(images.counts.argmin())]!r} has {int(small)} image: it cannot be split"
        )
    part, rest = _per_class(images.labels, lambda c, n: min(max(round(fraction * n), 1), n - 1), seed)
    if not in_place:
        return images[rest], images[part]
    order, n = np.concatenate([rest, part]), len(rest)
    labels, files = images.labels[order], tuple(images.files[i] for i in order if images.files)
    _arrange(images.images.numpy(), order.tolist())
    parts = slice(n), slice(n, None)
    return tuple(ImageSet(images.images[s], labels[s], images.class_names, files[s]) for s in parts)


def _arrange(rows: np.ndarray, order: list[int]) -> None:
    """rows become rows[order] in their own memory, one row at a time along the cycles of the permutation."""
    for start in range(len(order)):
        if order[start] != start:
            kept, i = rows[start].copy(), start
            while (source := order[i]) != start:
                rows[i] = rows[source]
                order[i], i = i, source
            rows[i], order[i] = kept, i


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
    y, names = label[images.labels], tuple(images.class_names[c] for c in kept)
    files = tuple(file for file, has in zip(images.files, (y >= 0).tolist(), strict=False) if has)
    return ImageSet(images.images[y >= 0], y[y >= 0], names, files)


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


def load(
    name: str,
    *,
    image_size: int | None = None,
    split_seed: int | None = 0,
    channels: int | None = None,
    download: bool = False,
) -> DataSet:
    """A data set by name: "digits" (embedded), one of torchvision's, or "imagefolder:PATH".

    image_size: side in pixels to which every image is resized (shorter side, then the centre); None keeps the stored
    size, which must then be one for all. split_seed: of the test split, where the data come without one (a third of
    digits, a fifth of a single folder; None: a single folder is not split, both splits are all of it). channels: 3
    gives grey images three equal channels, as torchvision's ImageFolder does; None: as they are. download: fetch what
    is missing into data/ (torchvision's sets only).

    PATH has `train/` and `test/` (or, without that, `val/`) with one folder per class, in any usual spelling (Training,
    test_set, validation), or the class folders themselves; a relative one is looked for in the current folder, in the
    project and in data/. One that is called like a split, alone among others, is a class if images lie directly in it.
    Images are those that Pillow reads, at any depth of a class folder, hidden ones left out, linked folders included;
    as in ImageFolder of an animation the first picture, of transparent ones the colours, and not turned as EXIF says.
    Grey ones beside coloured ones are coloured, too. What is left out is said once (`Skipped`). Decoded images are kept
    in data/cache/.
    Raises ValueError for an unknown name or unusable images, FileNotFoundError for data that are not there.
    """
    if channels not in (None, 3):
        raise ValueError(f"channels={channels}: 3, or None for images as they are, is needed")
    largest = math.isqrt(_most_pixels())
    if image_size is not None and not (isinstance(image_size, Integral) and 1 <= image_size <= largest):
        raise ValueError(f"image_size={image_size}: a whole number from 1 to {largest} is needed")
    image_size = image_size and int(image_size)
    if name == "digits":
        found = _digits(image_size, split_seed or 0)
    elif name.startswith("imagefolder:"):
        found = _imagefolder(name, image_size, split_seed)
    else:
        make, crop, flip, side = SOURCES[choose("data set", name, DATASETS)]
        found = _from_torchvision(name, make, crop, flip, image_size or side, download)
    if channels and found.train.images.shape[1] != channels:
        same, parts = found.test is found.train, (found.train, found.test)
        train, *test = (replace(s, images=s.images.expand(-1, 3, -1, -1).contiguous()) for s in parts[: 2 - same])
        found = replace(found, train=train, test=test[0] if test else train)
    return found


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


def _most_pixels() -> int:
    """Of one image, Pillow's limit against files that are small and decode to more than the memory."""
    from PIL import Image

    return Image.MAX_IMAGE_PIXELS or 2**31


def _resize(image, side: int | None):
    """A PIL image with its shorter side brought to `side`, then its centre cut out."""
    from PIL import Image

    if side is None or image.size == (side, side):
        return image
    w, h = image.size
    w, h = max(side, round(w * side / min(w, h))), max(side, round(h * side / min(w, h)))
    if w * h > _most_pixels():
        raise ValueError(f"{image.width}x{image.height} pixels cannot be brought to a shorter side of {side}")
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    left, top = (w - side) // 2, (h - side) // 2
    return image.crop((left, top, left + side, top + side))


def _shown(item) -> str:
    """A path, or the number of an image, on one line and without what cannot be printed."""
    return text if (text := str(item)).isprintable() else repr(text)


def _free() -> int:
    """Bytes of memory that can be had, as far as the system says."""
    known = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+)", known.read_text()) if known.exists() else None
    return int(found[1]) << 10 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _decode(items: Iterable, open_image: Callable, side: int | None, label: str) -> Tensor:
    """(N, C, H, W) uint8 on all cores; one channel if every image is grey. PIL releases the lock while it decodes.

    Peak memory is the tensor that is returned, and an image for each core.
    """
    items, most, cores = list(items), _most_pixels(), len(os.sched_getaffinity(0))

    def one(item) -> tuple[np.ndarray, bool]:
        """(H, W, 3) and whether it was grey."""
        try:
            with open_image(item) as image:
                if not 0 < math.prod(image.size) <= most:
                    raise ValueError(f"it has {image.width}x{image.height} pixels, 1 to {most} in all are allowed")
                if image.mode[0] in "IF":
                    raise ValueError(f"it has {image.mode} pixels: 8 bits a channel are needed, convert it first")
                grey = image.mode in ("L", "1")
                return np.asarray(_resize(image.convert("RGB"), side)), grey
        except Exception as error:  # Pillow's readers raise anything at damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"unreadable image {_shown(item)}: {reason}") from error

    first, first_grey = one(items[0])
    h, w, _ = first.shape

    def all_of(channels: int) -> Tensor | None:
        """The images, or None if one is coloured and there is but one channel."""
        need = len(items) * channels * h * w
        if need > (free := _free()):
            raise ValueError(
                f"{len(items)} images of {w}x{h} pixels would need {need / 2**30:.1f} GiB of memory, and "
                f"{free / 2**30:.1f} are free: state a smaller image_size, or use fewer images"
            )
        out = torch.empty((len(items), channels, h, w), dtype=torch.uint8)
        rows, some = out.numpy(), max(1, min(64, len(items) // (8 * cores)))

        def put(start: int) -> bool:
            for i in range(start, min(start + some, len(items))):
                array, grey = one(items[i])
                if array.shape != first.shape:
                    raise ValueError(
                        f"images differ in size ({_shown(items[0])} has {w}x{h} pixels, {_shown(items[i])} "
                        f"{array.shape[1]}x{array.shape[0]}): state image_size, for example image_size=32"
                    )
                if channels == 1 and not grey:
                    return False
                rows[i] = array.transpose(2, 0, 1)[:channels]
            return True

        pool, starts = ThreadPoolExecutor(cores), range(0, len(items), some)
        try:
            with bar(len(items), label) as progress:
                for start, fits in zip(starts, pool.map(put, starts), strict=True):
                    if not fits:
                        return None
                    progress.update(min(some, len(items) - start))
        finally:
            pool.shutdown(cancel_futures=True)
        return out

    grey = all_of(1) if first_grey else None
    return all_of(3) if grey is None else grey


def _cached(
    stem: str, key: dict, make: Callable[[], tuple[dict[str, Tensor], list[str]]]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors and class names from data/cache/, made first if the file is missing or of another key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = data_dir() / "cache" / f"{as_name(stem)}-{digest}.safetensors"
    with contextlib.suppress(FileNotFoundError, Unsigned):  # not there, or of an earlier version
        tensors, meta = read_tensors(path)
        if meta["key"] != key:
            raise Corrupt(f"{path} holds other images than its name says; delete it to make it anew")
        return tensors, meta["class_names"]
    tensors, names = make()
    write_tensors(path, tensors, {"class_names": names, "key": key})
    return tensors, names


def _dataset(name: str, tensors: dict[str, Tensor], names: list[str], crop: int, flip: bool) -> DataSet:
    train, test = (ImageSet(tensors[f"{s}.images"], tensors[f"{s}.labels"], tuple(names)) for s in ("train", "test"))
    return DataSet(name, train, test, crop, flip)


def _from_torchvision(name: str, make: Callable, crop: int, flip: bool, side: int | None, download: bool) -> DataSet:
    def part(train: bool) -> tuple[Tensor, Tensor, list | None]:
        try:
            source = make(data_dir(), train, download)
        except RuntimeError as error:
            if "not found" not in str(error).lower() and "download" not in str(error).lower():
                raise
            raise FileNotFoundError(
                f"{name} is not in {data_dir()}: fetch it with `cfol-nb fetch {name}` or load({name!r}, "
                "download=True), set CFOL_NB_DATA to the folder that holds it, or use imagefolder:PATH"
            ) from error
        return *_arrays(source, side, f"{name} {'train' if train else 'test'}"), getattr(source, "classes", None)

    def read() -> tuple[dict[str, Tensor], list[str]]:
        images, labels, found = part(True)
        test_images, test_labels, _ = part(False)
        found = found or sorted(set(map(str, labels.tolist())), key=int)
        tensors = {"train.images": images, "train.labels": labels}
        tensors |= {"test.images": test_images, "test.labels": test_labels}
        return tensors, [c if isinstance(c, str) else c[0] for c in found]

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
        if name != "imagefolder:" and (base / path).is_dir():
            return (base / path).resolve()
    raise FileNotFoundError(
        f"no folder {_shown(path)} (looked in the current folder, the project, and {data_dir()}): "
        "give imagefolder:PATH with train/ and test/ inside, one folder per class each"
    )


# what systems and programs leave beside images; names that begin with a dot are hidden anyway
_LEFTOVERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_LEFTOVERS |= {"thumbs.db", "desktop.ini"}
_SPLIT = re.compile(
    r"(?<![^\W\d_])(?:(train|training|train[ _-]?val)|(val|valid|validation|validate|dev|eval|evaluation)|"
    r"(tests?|testing))(?:[ _.-]*(?:sets?|data|splits?|images?|imgs?|folder|dir))*(?![^\W\d_])"
)


def _part(folder: Path) -> tuple[str, str]:
    """If a folder is called like a split: "train", "val" or "test", else ""; and the rest of its name."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder.name).lower()
    found = _SPLIT.search(name)
    part = ("train", "val", "test")[found.lastindex - 1] if found else ""
    return part, " ".join(re.findall(r"[^\W\d_]+", _SPLIT.sub(" ", name)))


def _is_image(path: Path) -> bool:
    """By its suffix, one of those that Pillow reads here; it knows more, which it writes or passes on."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind not in (None, "BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF")


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """(folders, files) that are not hidden, in the order of torchvision's ImageFolder, in which models of others know
    classes: 10 before 2. Linked ones are what they lead to."""
    folders, files = [], []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name[0] != "." and entry.name.lower() not in _LEFTOVERS:
            linked = entry.is_symlink() and os.path.isdir(entry.path)  # a link that leads in a circle is a file
            (folders if linked or entry.is_dir(follow_symlinks=False) else files).append(folder / entry.name)
    return folders, files


def _holds_images(folder: Path) -> bool:
    """Directly, not in folders inside."""
    return any(map(_is_image, _entries(folder)[1]))


def _below(folder: Path, *above: Path) -> Iterator[Path]:
    """Files at any depth; a link back to a folder that it lies in, or to one `above`, is not followed."""

    def mark(path: Path) -> tuple[int, int]:
        s = path.stat()
        return s.st_dev, s.st_ino

    todo = [(folder, frozenset(map(mark, above)))]
    while todo:
        here, passed = todo.pop()
        if (own := mark(here)) not in passed:
            folders, files = _entries(here)
            yield from files
            todo += [(f, passed | {own}) for f in folders]


def _splits(root: Path, folders: list[Path]) -> dict[str, Path]:
    """{"train": one of the folders, "test" or "val" or both: others} if they are called so, {} if they are not.

    Raises ValueError for folders that look like splits, of which no such choice can be made.
    """
    groups: dict[str, dict[str, list[Path]]] = {}  # rest of the name: part: folders
    for folder in folders:
        part, rest = _part(folder)
        if part and not (rest and _holds_images(folder)):  # test_tube is a class, unless classes lie in it
            groups.setdefault(rest, {}).setdefault(part, []).append(folder)
    found = [f.name for parts in groups.values() for same in parts.values() for f in same]
    if len({part for parts in groups.values() for part in parts}) < 2 > sum(map(len, groups.get("", {}).values())):
        return {}
    pairs = [parts for parts in groups.values() if "train" in parts and len(parts) > 1]
    if len(pairs) != 1 or any(len(same) > 1 for same in pairs[0].values()):
        raise ValueError(
            f"{_shown(root)} has folders that look like splits, not classes: {_shown(', '.join(found))}; "
            "exactly one is needed for training and one for testing, such as train and test, or train and val"
        )
    return {part: same[0] for part, same in pairs[0].items()}


def _listing(root: Path) -> tuple[dict[str, list[tuple[str, list[Path]]]], str, str]:
    """{part: [(class, files)]}, a hash of every file's path, size and time, and in words what is left out."""
    folders, loose = _entries(root)
    splits = _splits(root, folders)
    parts = {"train": splits["train"], "test": splits.get("test") or splits["val"]} if splits else {"train": root}
    for folder in folders if not splits else ():
        part, rest = _part(folder)
        if part and not rest and not _holds_images(folder):
            raise ValueError(
                f"{_shown(root)} has only one of train/ and test/, {_shown(folder.name)}: both are needed, or the "
                "class folders themselves (a class that is called so has images directly in it)"
            )
    h, out, other = hashlib.sha256(), {}, [f for f in loose if _is_image(f)]
    for part, folder in parts.items():
        out[part], (classes, loose) = [], _entries(folder)
        other += [f for f in loose if splits and _is_image(f)]
        for inside in (folder, *classes) if splits else classes:
            if nested := _splits(inside, _entries(inside)[0]):
                names = ", ".join(f.name for f in nested.values())
                raise ValueError(f"{_shown(inside)} has {names} inside: splits come first, and classes in them")
        for c in classes:
            every = sorted(_below(c, root, folder))
            files = [f for f in every if _is_image(f)]
            other += [f for f in every if not _is_image(f)]
            if not files:
                unknown = f" that Pillow reads here (but {_shown(every[0].name)})" if every else ""
                raise ValueError(f"class folder {_shown(c)} has no images{unknown}")
            out[part].append((c.name, files))
            for f in files:
                try:
                    s = f.stat()
                    if not stat.S_ISREG(s.st_mode):
                        raise ValueError(f"unreadable image {_shown(f)}: it is no file")
                    h.update(f"{part}/{f.relative_to(folder)}:{s.st_size}:{s.st_mtime_ns}\n".encode())
                except OSError as error:
                    raise ValueError(f"unreadable image {_shown(f)}: {error.strerror}") from error
                except UnicodeEncodeError:
                    raise ValueError(f"the name {_shown(f)} is not UTF-8: rename it") from None
        if len(classes) < 2:
            raise ValueError(f"{_shown(folder)} has {len(classes)} class folder(s): at least 2 are needed")
    left = []
    if splits:
        a, b = ({c for c, _ in out[p]} for p in ("train", "test"))
        if a != b:
            raise ValueError(
                f"class folders differ: only in {parts['train'].name}: {sorted(a - b)}, "
                f"only in {parts['test'].name}: {sorted(b - a)}"
            )
        if beside := [f.name for f in folders if f not in parts.values()]:
            left.append(f"what is beside {parts['train'].name} and {parts['test'].name} ({', '.join(beside)})")
    if other:
        kinds = Counter(f.suffix.lower() or "without a suffix" for f in other).most_common(5)
        left.append(
            f"{len(other)} files that Pillow does not read here or that lie in no class folder "
            f"({', '.join(f'{n} {kind}' for kind, n in kinds)}; for example {other[0].relative_to(root)})"
        )
    return out, h.hexdigest(), _shown(" and ".join(left)) if left else ""


@functools.cache
def _say(root: Path, left: str) -> None:
    """Once of each state of a folder."""
    warnings.warn(f"left out of {_shown(root.name)}: {left}", Skipped, stacklevel=4)


def _imagefolder(name: str, side: int | None, split_seed: int | None) -> DataSet:
    from PIL import Image

    root = _find(name)
    listing, key, left = _listing(root)
    if left:
        _say(root, left)

    def read() -> tuple[dict[str, Tensor], list[str]]:
        sizes = {part: [len(files) for _, files in classes] for part, classes in listing.items()}
        files = [f for classes in listing.values() for _, own in classes for f in own]
        images = _decode(files, Image.open, side, f"decoding {_shown(root.name)}").split([*map(sum, sizes.values())])
        tensors = {}
        for part, own in zip(sizes, images, strict=True):
            tensors[f"{part}.images"] = own
            tensors[f"{part}.labels"] = torch.arange(len(sizes[part])).repeat_interleave(torch.tensor(sizes[part]))
        return tensors, [c for c, _ in listing["train"]]

    tensors, names = _cached(root.name, {"listing": key, "side": side}, read)
    paths = {part: [str(f.relative_to(root)) for _, own in classes for f in own] for part, classes in listing.items()}
    if "test.images" not in tensors:
        whole = ImageSet(tensors["train.images"], tensors["train.labels"], tuple(names), tuple(paths["train"]))
        parts = (whole, whole) if split_seed is None else split(whole, 0.2, split_seed, in_place=True)
        return DataSet(name, *parts, crop=4, flip=True)
    found = _dataset(name, tensors, names, crop=4, flip=True)
    parts = {part: replace(getattr(found, part), files=tuple(own)) for part, own in paths.items()}
    return replace(found, **parts)


def prepare(config: RunConfig) -> tuple[ImageSet, ImageSet, DataSet]:
    """(training images, held-out images, the data set cut down to these and to the limited test split) of a run."""
    data = load(config.dataset, image_size=config.image_size, split_seed=config.split_seed)
    some = limit(data.train, config.train_limit, config.split_seed)
    train, held = split(some, config.holdout, config.split_seed, in_place=True)
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


def jitter(x: Tensor, colour: float, degrees: float, generator: torch.Generator | None = None) -> Tensor:
    """Each image with brightness, contrast and saturation changed, in an order of its own, then rotated.

    x: (n, C, H, W) floating point in [0, 1], on any device. colour: each factor is uniform in [1 - colour, 1 + colour];
    degrees: the angle in [-degrees, degrees], nearest pixels, black corners. As torchvision's ColorJitter and
    RandomRotation; no loop over images, no wait for the device.
    """
    n, c, h, w = x.shape
    order, factor = torch.rand(2, n, 3, generator=generator, dtype=x.dtype, device=x.device)
    order, factor = order.argsort(1), 1 + colour * (2 * factor - 1)
    for kind, by in zip(order.unbind(1), factor.gather(1, order).unbind(1), strict=True):
        kind, by = (v.view(n, 1, 1, 1) for v in (kind, by))
        grey = 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:] if c == 3 else x  # ITU-R 601-2
        other = torch.where(kind == 0, 0.0, torch.where(kind == 1, grey.mean((2, 3), keepdim=True), grey))
        x = (by * x + (1 - by) * other).clamp(0, 1)
    if not degrees:
        return x
    angle = degrees * (2 * torch.rand(n, generator=generator, dtype=x.dtype, device=x.device) - 1) * math.pi / 180
    sin, cos, zero = angle.sin(), angle.cos(), torch.zeros_like(angle)
    theta = torch.stack([cos, -sin * h / w, zero, sin * w / h, cos, zero], 1).view(n, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, x.shape, align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, "nearest", align_corners=False)


__all__ = [
    "DATASETS",
    "Corrupt",
    "DataSet",
    "ImageSet",
    "Skipped",
    "augment",
    "fingerprint",
    "jitter",
    "leave_out",
    "limit",
    "load",
    "long_tail",
    "prepare",
    "split",
]

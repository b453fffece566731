"""Models of others, and the images on which they may be judged."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import cudnn

from cfol_nb import data
from cfol_nb.audit.adapt import INTERPOLATIONS, Logits, Order, Program, Scores, Transform
from cfol_nb.audit.program import load_exported
from cfol_nb.audit.weights import kind, put, read_state
from cfol_nb.config import choose
from cfol_nb.data import ImageSet
from cfol_nb.files import ROOT, runs_dir
from cfol_nb.runs import Run, same_images
from cfol_nb.suite import published


def _stored(source: str) -> tuple[Run, str]:
    """The run of "run:NAME" or "run:NAME:selected", and which of its weights; a published one if none is stored."""
    _, folder, *which = source.split(":")
    known = runs_dir() / "store" / folder
    if not known.exists() and (ROOT / "results" / f"{folder}.json").is_file():
        return published(name=folder)[0], ":".join(which) or "last"
    if not (known.exists() or (Path(folder) / "run.json").exists()):
        raise FileNotFoundError(f"there is no stored run {folder!r} (`cfol-nb list` shows them)")
    return Run.load(known if known.exists() else Path(folder)), ":".join(which) or "last"


def unseen(source: str, dataset: str, image_size: int | None = None) -> ImageSet:
    """The images on which a model may be judged, `source` and `dataset` named as for `load_model` and `data.load`: the
    test split. A single folder has none: all of it. A stored run may have seen a part of that: it is judged on what its
    own split kept for testing, in its image size and without the classes it was trained without. Raises ValueError if
    the run's own folder of images is no longer as it was: what the run has seen is then not known.
    """
    if not source.startswith("run:"):
        return data.load(dataset, image_size=image_size, split_seed=None).test
    run = _stored(source)[0]
    own, kept = run.config, run.provenance["data"]
    same = dataset == own.dataset or (kept and data.fingerprint(dataset) == kept)
    if kept and dataset.startswith("imagefolder:"):
        with contextlib.suppress(FileNotFoundError):  # the run's own, by another path
            same = same or data._find(dataset) == data._find(own.dataset)
    if same:
        same_images(dataset, kept)
    test = data.load(dataset, image_size=image_size or own.image_size, split_seed=own.split_seed).test
    if same:
        same_images(dataset, kept)
    return data.leave_out(test, own.without if same else ())


def middle(images: ImageSet, side: int) -> ImageSet:
    """The middle of each image, side x side pixels of those that are larger."""
    top, left = (max(n - side, 0) // 2 for n in images.images.shape[-2:])
    return replace(images, images=images.images[..., top : top + side, left : left + side].contiguous())


_SETTINGS = (  # of the process, that code of others may change: how to read each, and to set it
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *((partial(getattr, cudnn, k), partial(setattr, cudnn, k)) for k in ("enabled", "benchmark", "deterministic")),
)
_STATES = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (torch.is_grad_enabled, torch.set_grad_enabled),
)


def settings() -> Callable[[], None]:
    """A function that makes the working directory and torch's settings what they are now."""
    folder, values = os.getcwd(), [get() for get, _ in _SETTINGS]

    def restore() -> None:
        os.chdir(folder)
        for (get, set_), value in zip(_SETTINGS, values, strict=True):
            if get() != value:
                set_(value)

    return restore


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Code of others runs inside; directory, torch's settings, seeds and handlers of signals are then as before."""
    restore, states = settings(), [get() for get, _ in _STATES]
    main = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        restore()
        for (_, set_), state in zip(_STATES, states, strict=True):
            set_(state)
        for number, handler in handlers.items():
            signal.signal(number, handler)


# -- models ------------------------------------------------------------------------------------------------------------

IMAGENET = Transform((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # of Pillow
FORMS = (
    "FILE.py:function, FILE.pt (TorchScript), FILE.pt2 (torch.export), FILE.onnx, torchvision:NAME, timm:NAME, hf:NAME "
    "or run:NAME"
)


@dataclass(frozen=True)
class Loaded:
    """A model of others in eval mode, what lies before it, the names of its outputs, where it knows them, and what was
    done to its weights, in words."""

    body: nn.Module
    transform: Transform
    names: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def model(self) -> nn.Module:
        """Images in [0, 1] to logits."""
        return nn.Sequential(*self.transform.steps(), self.body, Logits()).eval()

    def ordered(self, order: Sequence[int]) -> nn.Module:
        """The model with its outputs in this order."""
        return self.model if list(order) == list(range(len(order))) else self.model.append(Order(order))


def needed(name: str, extra: str):
    """An optional library. Raises ValueError that names the extra if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} is not installed, which such models need: pip install 'cfol-nb[{extra}]'") from error


def _reason(error: Exception) -> str:
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:500])))


def _of_code(source: str, black_box: bool = False) -> nn.Module:
    path, _, function = source.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    sys.path.insert(0, beside := str(Path(path).resolve().parent))  # as Python itself does with a script
    try:
        with _undisturbed():
            found = runpy.run_path(path)
            model = found[function]() if callable(found.get(function)) else None
    except (Exception, SystemExit) as error:  # whatever the user's code does
        raise ValueError(f"{source} cannot be called without arguments: {_reason(error)}") from error
    finally:
        sys.path.remove(beside)
    if not callable(found.get(function)):
        raise ValueError(f"{path} defines no function {function!r}")
    if black_box and callable(model) and not isinstance(model, nn.Module):
        return Scores(model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{source} returns a {type(model).__name__}: a torch.nn.Module is needed")
    return model


def _program(path: Path) -> nn.Module:
    """A TorchScript file, an exported program (.pt2) or an ONNX file."""
    if path.suffix == ".onnx":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        read = lambda: needed("onnx2torch", "onnx").convert(str(path))  # noqa: E731
    elif (what := kind(path)) == "script":
        read = lambda: torch.jit.load(path, map_location="cpu")  # noqa: E731
    elif what == "exported":
        read = lambda: Program(load_exported(path))  # noqa: E731
    else:
        raise ValueError(
            f"{path} is no TorchScript and no torch.export program: give weights alone (--weights) with the code that "
            "makes the model (--model FILE.py:function)"
        )
    try:
        return read()
    except ValueError:
        raise
    except Exception as error:  # the readers raise anything at damaged files
        raise ValueError(f"{path} cannot be read ({_reason(error)}): export it again, with this torch") from error


def _outputs(body: nn.Module, state: Mapping[str, Tensor], asked: int) -> int:
    """How many outputs the weights are of, where they differ from a network of `asked` in nothing but that."""
    own = body.state_dict()
    other = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    found = {len(state[k]) for k in other if own[k].shape[1:] == state[k].shape[1:] and len(own[k]) == asked}
    return found.pop() if len(found) == 1 else asked


def _of_zoo(
    source: str, weights: Path | None, num_classes: int, channels: int, random_weights: bool
) -> tuple[nn.Module, tuple[str, ...], list[str]]:
    """torchvision:NAME or timm:NAME: network, names of outputs, what was done to the weights."""
    zoo, _, name = source.partition(":")
    library = needed(zoo, zoo)
    models = library.models if zoo == "torchvision" else library
    name = choose(f"model of {zoo}", name, models.list_models(models) if zoo == "torchvision" else models.list_models())
    if channels not in (1, 3):  # `audit` gives grey images three
        raise ValueError(f"{source} takes images of 3 channels, these have {channels}")
    if not (weights or random_weights):
        raise ValueError(f"{source} has no weights: give their file (--weights), or say --random-weights")

    def make(k: int) -> nn.Module:
        if zoo == "timm":
            return library.create_model(name, num_classes=k)
        more = {"init_weights": False} if name in ("googlenet", "inception_v3") and weights else {}
        return library.models.get_model(name, weights=None, num_classes=k, **more)

    body, said, names = make(num_classes), [], ()
    if weights:
        state, where = read_state(weights)
        if (k := _outputs(body, state, num_classes)) != num_classes:
            body = make(k)
        said = put(body, state, where, weights)
        if k == 1000 and zoo == "torchvision":
            names = tuple(library.models.get_model_weights(name).DEFAULT.meta["categories"])
    return body, names, said


def _hub(name: str) -> tuple[Path, dict]:
    """The folder of a model, given or in the local cache, and its config.json."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        hub = needed("huggingface_hub", "hf")
        try:
            folder = Path(hub.snapshot_download(name, local_files_only=True))
        except Exception as error:  # of several kinds, one for each way in which it is not there
            raise FileNotFoundError(
                f"hf:{name} is neither a folder nor in the local cache: fetch it with `hf download {name}`"
            ) from error
    try:
        return folder, json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read ({error}): a model's folder is needed") from error


_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def own_transform(source: str) -> Transform:
    """What a model of timm or of the Hugging Face hub says of its images; empty for others."""
    form, _, name = source.partition(":")
    if form == "timm":
        timm = needed("timm", "timm")
        own = timm.get_pretrained_cfg(choose("model of timm", name, timm.list_models()))
        return _of_timm(own.to_dict() if own else {})
    if form != "hf":
        return IMAGENET if form == "torchvision" else Transform()
    folder, config = _hub(name)
    if "architecture" in config:
        return _of_timm(config.get("pretrained_cfg", {}))
    if not (folder / "preprocessor_config.json").is_file():
        return Transform()
    return _of_processor(needed("transformers", "hf").AutoImageProcessor.from_pretrained(folder, **_LOCAL).to_dict())


def _of_hub(name: str, weights: Path | None) -> tuple[nn.Module, tuple[str, ...], list[str]]:
    """As `_of_zoo`, of transformers or of timm."""
    folder, config = _hub(name)
    path = weights or folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} holds no model.safetensors: fetch it whole, or give a file of weights (--weights)")
    if "architecture" in config:
        timm, own = needed("timm", "timm"), config.get("pretrained_cfg", {})
        make = choose("model of timm", config["architecture"], timm.list_models())
        k = config.get("num_classes") or own.get("num_classes")
        body = timm.create_model(make, **{**config.get("model_args", {}), "num_classes": k})
        names = config.get("label_names") or own.get("label_names") or ()
        return body, tuple(names), put(body, *read_state(path), path)
    make, said = needed("transformers", "hf").AutoModelForImageClassification, []
    try:
        own = needed("transformers", "hf").AutoConfig.from_pretrained(folder, **_LOCAL)
        if weights:
            body = make.from_config(own, dtype=torch.float32)
        else:  # which knows the names that tensors had in earlier versions
            more = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
            body, info = make.from_pretrained(folder, config=own, **more, **_LOCAL)
    except Exception as error:  # whatever a config may be
        raise ValueError(f"{folder} is no image classifier of transformers: {_reason(error)}") from error
    if weights:
        said = put(body, *read_state(path), path)
    elif lost := [f"{len(v)} {k.replace('_', ' ')}, for example {min(map(str, v))}" for k, v in info.items() if v]:
        raise ValueError(f"the weights do not fit: {path} has {lost[0]}: are they of this model?")
    if not (folder / "preprocessor_config.json").is_file():
        said.append("no preprocessor_config.json: no normalisation unless --mean and --std are given")
    names = [own.id2label[i] for i in range(own.num_labels)]
    return body, () if names == [f"LABEL_{i}" for i in range(len(names))] else tuple(names), said


def _of_processor(own: Mapping) -> Transform:
    """Of an image processor of transformers. Raises ValueError for steps that are none of `Transform`'s."""
    own = {k: v for k, v in own.items() if v is not None}

    def side(of: object, which: str) -> int | None:
        of = of if isinstance(of, Mapping) else {"height": of, "width": of}
        if of.get("height") != of.get("width"):
            raise ValueError(f"preprocessor_config.json: {which}={dict(of)}: square images are needed")
        return of.get("height") or of.get("shortest_edge")

    resize = side(own.get("size"), "size") if own.get("do_resize", True) else None
    crop = side(own.get("crop_size"), "crop_size") if own.get("do_center_crop", False) else None
    factor = own.get("rescale_factor", 1 / 255) if own.get("do_rescale", True) else 1.0
    if own.get("rescale_offset") or own.get("offset"):
        raise ValueError("preprocessor_config.json shifts images after scaling them: state --mean and --std")
    if own.get("crop_pct") and not crop and resize and resize < 384:  # ConvNeXt's
        crop, resize = resize, int(resize / own["crop_pct"])
    if crop and resize and crop > resize:
        raise ValueError(f"preprocessor_config.json pads images of {resize} pixels to {crop}: state --image-size")
    normalised = own.get("do_normalize", False)
    return Transform(
        tuple(own["image_mean"]) if normalised else (),
        tuple(own["image_std"]) if normalised else (),
        round(255 * factor, 6),  # of images in [0, 1]
        bool(own.get("do_flip_channel_order", False)),
        crop or resize,
        resize,
        _MODES.get(own.get("resample", 2), "bilinear"),
        3,
    )


def _of_timm(own: Mapping) -> Transform:
    """Of a pretrained_cfg; its first weights' size, if an architecture has several."""
    how, (channels, side, _) = own.get("interpolation") or "bilinear", own.get("input_size") or (3, 224, 224)
    return Transform(
        tuple(own.get("mean") or IMAGENET.mean),
        tuple(own.get("std") or IMAGENET.std),
        side=side,
        resize=int(side / (own.get("crop_pct") or 1)),
        interpolation=how if how in INTERPOLATIONS else "bilinear",
        channels=channels,
    )


def load(
    source: str,
    weights: Path | None = None,
    num_classes: int = 10,
    channels: int = 3,
    *,
    random_weights: bool = False,
    preprocessing: Mapping[str, object] | None = None,
    black_box: bool = False,
) -> Loaded:
    """A model that maps images in [0, 1] to logits.

    source: "FILE.py:function", called without arguments; a TorchScript file, a `torch.export` program (.pt2) or an ONNX
    file; "torchvision:NAME" or "timm:NAME", with `num_classes` outputs or as many as the weights are of;
    "hf:FOLDER", or "hf:OWNER/NAME" of the local cache (transformers or timm); "run:NAME" (or "run:NAME:selected"), a
    stored or published run or its folder.
    weights: a file of the module's state (`weights.load_weights`). channels: of the images. preprocessing: fields of
    `Transform`, which win over the model's own; None in them is nothing. random_weights: torchvision's and timm's
    networks need no weights. black_box: the function may return any function of NumPy arrays (`adapt.Scores`).
    Raises ValueError or FileNotFoundError, with what does not fit, for anything that cannot be loaded.
    """
    form, _, rest = source.partition(":")
    names, said, file = (), [], Path(source)
    if form in ("torchvision", "timm"):
        body, names, said = _of_zoo(source, weights, num_classes, channels, random_weights)
    elif form == "hf":
        body, names, said = _of_hub(rest, weights)
    elif form == "run" or file.suffix in (".pt", ".pt2", ".pth", ".ts", ".torchscript", ".onnx"):
        if weights:
            raise ValueError(f"{source} has its own weights: leave out the weights file")
        body = _stored(source) if form == "run" else _program(file)
        if form == "run":
            body = body[0].model(body[1])
    elif source.rpartition(":")[0].endswith(".py"):
        body = _of_code(source, black_box)
        said = put(body, *read_state(weights), weights) if weights else []
    else:
        raise ValueError(f"model {source!r}: {FORMS} is needed")
    transform = replace(own_transform(source), **{k: v for k, v in (preprocessing or {}).items() if v is not None})
    return Loaded(body.eval(), transform, names, tuple(said))


def load_model(source: str, weights: Path | None, num_classes: int, channels: int) -> nn.Module:
    """The model of `load` alone; torchvision's and timm's may do without weights."""
    loaded = load(source, weights, num_classes, channels, random_weights=True)
    return loaded.model if loaded.transform.steps() else loaded.body

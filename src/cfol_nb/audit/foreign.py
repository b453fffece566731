"""Models of others, and the images on which they may be judged."""

from __future__ import annotations

import contextlib
import os
import random
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.backends import cudnn

from cfol_nb import data
from cfol_nb.audit.weights import load_weights
from cfol_nb.config import choose
from cfol_nb.data import ImageSet
from cfol_nb.files import ROOT, runs_dir
from cfol_nb.models import Normalize
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
        for (get, put), value in zip(_SETTINGS, values, strict=True):
            if get() != value:
                put(value)

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
        for (_, put), state in zip(_STATES, states, strict=True):
            put(state)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def load_model(source: str, weights: Path | None, num_classes: int, channels: int) -> nn.Module:
    """A model that maps images in [0, 1] to logits, in eval mode, in float32.

    source: "FILE.py:function", called without arguments; "torchvision:NAME", made with as many outputs as there are
    classes, with ImageNet's normalisation before it, as its published weights expect; or "run:NAME" (or
    "run:NAME:selected"), a stored run or its folder. weights: a file of the module's state, see `load_weights`.
    Raises ValueError or FileNotFoundError, with what does not fit, for anything that cannot be loaded.
    """
    kind, _, rest = source.partition(":")
    if kind == "torchvision":
        import torchvision

        rest = choose("model of torchvision", rest, torchvision.models.list_models(torchvision.models))
        if channels not in (1, 3):  # `audit` gives grey images three
            raise ValueError(f"{source} takes images of 3 channels, these have {channels}")
        body = torchvision.models.get_model(rest, weights=None, num_classes=num_classes)
        module, model = body, nn.Sequential(Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), body)
    elif kind == "run":
        if weights:
            raise ValueError("a run has its own weights: leave out the weights file")
        run, which = _stored(source)
        return run.model(which)
    elif source.rpartition(":")[0].endswith(".py"):
        path, _, function = source.rpartition(":")
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        sys.path.insert(0, beside := str(Path(path).resolve().parent))  # as Python itself does with a script
        try:
            with _undisturbed():
                found = runpy.run_path(path)
                module = model = found[function]() if callable(found.get(function)) else None
        except (Exception, SystemExit) as error:  # whatever the user's code does
            reason = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:500])))
            raise ValueError(f"{source} cannot be called without arguments: {reason}") from error
        finally:
            sys.path.remove(beside)
        if not callable(found.get(function)):
            raise ValueError(f"{path} defines no function {function!r}")
        if not isinstance(model, nn.Module):
            raise ValueError(f"{source} returns a {type(model).__name__}: a torch.nn.Module is needed")
    else:
        raise ValueError(f"model {source!r}: FILE.py:function, torchvision:NAME or run:NAME is needed")
    if weights:
        load_weights(module, weights)
    return model.eval()

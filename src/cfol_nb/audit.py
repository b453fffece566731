"""Audit: how robust is each class of any model, how sure is that, what attacks it, and can the numbers be trusted?"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
import os
import random
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.backends import cudnn

from cfol_nb import data, plots, stats
from cfol_nb.attacks import admit, answers, as_float, as_labels, evaluating, gradient, predict, weight_of
from cfol_nb.autoattack import Evaluation, TimeUp, find_worst, interleaved
from cfol_nb.checks import COLUMNS, PASSES, black_box_check, checklist, said, short_pgd
from cfol_nb.config import Attack, AutoAttack, choose
from cfol_nb.data import ImageSet
from cfol_nb.evaluate import Outcomes, evaluate
from cfol_nb.files import ROOT, Corrupt, bar, read_tensors, replacing, runs_dir, write_tensors
from cfol_nb.models import Normalize
from cfol_nb.runs import Run, same_images
from cfol_nb.suite import published

NORMS = {"linf": "L-inf", "l2": "L2"}
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # of the radius, in the sweep


# -- models of others --------------------------------------------------------------------------------------------------


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
    "run:NAME:selected"), a stored run or its folder. weights: a safetensors file of the module's state.
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


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file. Raises ValueError that names the first tensors that do not fit.

    Of tensors that are one in the model (tied weights) the file may hold any or all, as `safetensors.torch.save_model`
    and `save_file` write them.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file ({error}): save with safetensors.torch.save_file") from error
    wanted = module.state_dict()
    for names in _tied(wanted):
        there = [k for k in names if k in state]
        for k in there[1:]:
            if not torch.equal(state[k], state[there[0]]):
                both = f"{there[0]} and {k}"
                raise ValueError(f"the weights do not fit: {both} are one tensor in the model, two in {path}")
        state |= dict.fromkeys(names, state[there[0]]) if there else {}
    lack, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    other = [k for k in sorted(set(state) & set(wanted)) if state[k].shape != wanted[k].shape]
    for what, names in (("lacks", lack), ("has, but the model has not,", extra)):
        if names:
            raise ValueError(f"the weights do not fit: {path} {what} {len(names)} tensors, for example {names[0]}")
    if other:
        k = other[0]
        raise ValueError(
            f"the weights do not fit: {k} is {tuple(state[k].shape)} in {path}, {tuple(wanted[k].shape)} in the model"
        )
    module.load_state_dict(state)


def _tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that stand for one and the same tensor."""
    same: dict[tuple, list[str]] = {}
    for name, t in state.items():
        if torch.is_tensor(t) and t.numel():
            same.setdefault((t.device, t.data_ptr(), t.shape, t.stride(), t.dtype), []).append(name)
    return [names for names in same.values() if len(names) > 1]


# -- the audit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    name: str
    outcomes: Outcomes  # clean, "pgd20", and AutoAttack up to each of its attacks, "autoattack" last
    radii: pd.DataFrame  # rows: radius, columns: class; accuracy under PGD-20, an image once broken stays broken
    gallery: tuple[Tensor, Tensor, np.ndarray, np.ndarray]  # that fall first: clean, adversarial, index, prediction
    first: np.ndarray  # (N,) smallest radius of the sweep at which an image fell; inf if none
    unfinished: np.ndarray  # (K,) images per class that may still fall: its accuracy is an upper bound
    note: str
    seconds: float  # AutoAttack's in earlier calls, from which this one went on, included

    @property
    def checks(self) -> pd.DataFrame:
        """The verdicts of `checks.checklist`; empty if there was no time for them."""
        return self.outcomes.checks["autoattack"]

    def table(self) -> pd.DataFrame:
        """One row per class, weakest first: n, clean, pgd20, autoattack, low, high, chance to be the weakest and
        whether it may be (or, where AutoAttack did not come to an end, how many images of the class are unfinished;
        `low` is then what holds if all of them fall)."""
        t = stats.class_table(self.outcomes)
        sure = t["correct"] - self.unfinished
        out = pd.DataFrame({"class": t["class"], "n": t["n"]})
        for name in ("clean", "pgd20"):
            out[name] = stats.accuracies(self.outcomes, name)
        out["autoattack"] = t["accuracy"]
        out["low"] = [stats.wilson(c, n)[0] for c, n in zip(sure, t["n"], strict=True)]
        out["high"] = t["high"]
        if self.unfinished.any():
            out["unfinished"] = self.unfinished
        else:
            out[["weakest", "may_be_weakest"]] = t[["weakest", "may_be_weakest"]]
        return out.sort_values("autoattack", kind="stable").reset_index(drop=True)

    def stated(self) -> pd.DataFrame:
        """`table` as text: per cent [95 % Wilson interval] of clean, pgd20 and autoattack. Where images were not
        attacked, or not to the end, the lower end is what holds if all of them fall."""
        table = self.table()
        out, pgd20 = table[["class", "n"]].copy(), self.outcomes.attacks["pgd20"]
        for name, open_ in (("clean", 0), ("pgd20", pgd20.get("unfinished", 0)), ("autoattack", self.unfinished)):
            own = stats.class_table(self.outcomes, name).rename(columns={"accuracy": "value"})
            sure = own["correct"] - open_
            own["low"] = [stats.wilson(c, n)[0] for c, n in zip(sure, own["n"], strict=True)]
            out[name] = own.set_index("class").loc[table["class"]].apply(stats.interval, axis=1).to_numpy()
        if "weakest" in table:
            return out.assign(**{"weakest (probability)": table["weakest"].map("{:.2f}".format)})
        return out.assign(unfinished=table["unfinished"])

    def broken_by(self) -> pd.DataFrame:
        """Images per class that each attack was the first to break; "clean": wrong without one; "held": none broke."""
        names = ["clean", *(n for n in self.outcomes.predictions if n.startswith("autoattack"))]
        held = np.stack([stats.counts(self.outcomes, n)[0] for n in names])
        n = stats.counts(self.outcomes, "clean")[1]
        spec = self.outcomes.attacks["autoattack"]
        names[-1] = spec["attacks"][-1] + " or pgd20" * ("broken by PGD-20 alone" in spec)
        columns = [n.removeprefix("autoattack:") for n in names]
        lost = pd.DataFrame((-np.diff(np.vstack([n, held]), axis=0)).T, self.outcomes.class_names, columns)
        return lost.assign(held=held[-1])

    def confused(self, top: int = 5) -> pd.DataFrame:
        """The pairs that the attack uses most: class, taken for, images, share of the class."""
        c = stats.confusion(self.outcomes)
        share = c / np.maximum(c.sum(1, keepdims=True), 1)
        np.fill_diagonal(c, 0)
        rows, columns = np.unravel_index(np.argsort(-c, axis=None, kind="stable")[:top], c.shape)
        names = np.array(self.outcomes.class_names)
        found = pd.DataFrame(
            {
                "class": names[rows],
                "taken for": names[columns],
                "images": c[rows, columns],
                "share": share[rows, columns],
            }
        )
        return found[found["images"] > 0]

    def verdict(self) -> str:
        """The answer in a few sentences."""
        table, s = self.table(), stats.summary(self.outcomes)
        worst, alike = table.iloc[0], table["class"][table["autoattack"].eq(table["autoattack"][0])].tolist()
        spec, bound = self.outcomes.attacks["autoattack"], bool(worst.get("unfinished", 0))

        def cell(value: float, low: float, high: float, bound: bool) -> str:
            if bound:
                return f"at most {100 * value:.1f} %"
            return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

        mean, least = s.loc["mean"], s.loc["worst"]
        others = f", level with {', '.join(alike[1:])}" if alike[1:] else ""
        text = (
            f"The weakest class{' so far' * bound} is {worst['class']}{others}: "
            f"{cell(worst['autoattack'], worst['low'], worst['high'], bound)} of its {worst['n']} images withstand "
            f"AutoAttack ({spec['version']}, {NORMS[spec['norm']]} {spec['eps']:.4g}), against "
            f"{cell(mean['value'], mean['low'], mean['high'], self.unfinished.any())} on average over the classes."
        )
        if not self.unfinished.any():
            text += (
                f" It is truly the weakest with probability {worst['weakest']:.2f}; the accuracy of whichever class "
                f"truly is lies in [{100 * least['low']:.1f}, {100 * least['high']:.1f}] %."
            )
        under_pgd = stats.weakest(self.outcomes, "pgd20")
        if worst["pgd20"] > table["pgd20"].min():
            text += f" Under PGD-20 another class, {under_pgd}, looks weakest."
        return " ".join(filter(None, (text, said(self.checks), self.note)))

    def first_to_fall(self) -> plots.Figure:
        """The gallery as a figure."""
        (x, x_adv, index, predicted), names = self.gallery, self.outcomes.class_names
        labels = [names[i] for i in self.outcomes.labels[index]]
        return plots.gallery(x, x_adv, labels, [names[i] for i in predicted], self.first[index])

    def html(self, path: Path) -> Path:
        """One page that needs nothing else and can be sent to somebody."""
        percent = "{:.1f} %".format
        radii = (100 * self.radii.T).round(1).rename_axis("class").reset_index()
        radii.columns = ["class", *(f"{r:.3g}" for r in self.radii.index)]
        confused = self.confused()
        confused["share"] = [percent(100 * v) for v in confused["share"]]
        names, pictures, bound = self.outcomes.class_names, [], bool(self.unfinished.any())
        for title, figure in (
            (
                "Accuracy of each class" + ", an upper bound where images are unfinished" * bound,
                plots.class_accuracies({"all classes": self.outcomes}),
            ),
            ("How accuracy falls with the radius", plots.radii(self.radii, str(self.table()["class"][0]))),
            ("What the attack turns a class into", plots.confusion(stats.confusion(self.outcomes), names)),
            *([("The images that fall first", self.first_to_fall())] if len(self.gallery[2]) else []),
        ):
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=110)
            plots.plt.close(figure)
            code = base64.b64encode(picture.getvalue()).decode()
            pictures.append(f'<h2>{html.escape(title)}</h2><img alt="{title}" src="data:image/png;base64,{code}">')

        def part(title: str, frame: pd.DataFrame, index: bool = False) -> str:
            return f"<h2>{title}</h2>" + frame.to_html(index=index, border=0, classes="t")

        settings = pd.DataFrame([(k, v) for k, v in self.outcomes.attacks["autoattack"].items()])
        body = [
            f"<h1>{html.escape(self.name)}: robustness of each class</h1><p class=v>{html.escape(self.verdict())}</p>",
            pictures[0],
            part(
                "Classes, weakest first: per cent [95 % Wilson interval]"
                + ", lower ends as if all unfinished images fell" * bound,
                self.stated(),
            ),
            pictures[1],
            part("The same in per cent, by radius", radii),
            pictures[2],
            part("The pairs that the attack uses most", confused) if len(confused) else "",
            part("Which attack broke how many images", self.broken_by(), True),
            *pictures[3:],
            part("Can these numbers be trusted?", self.checks) if len(self.checks) else "",
            part("AutoAttack as it was run", settings).replace("<thead>", "<thead hidden>"),
            f"<p>{len(self.outcomes.labels)} images, {self.seconds:.0f} s. Made with cfol-nb.</p>",
        ]
        style = (
            "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
            "img{max-width:100%}.v{font-size:1.15rem;border-left:4px solid #c0392b;padding-left:1rem}"
            ".t{border-collapse:collapse;font-size:.9rem}.t td,.t th{padding:.25rem .8rem;text-align:right;"
            "border-bottom:1px solid #e4e4e4}.t td:first-child,.t th:first-child{text-align:left}"
        )
        page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.name)}</title>'
        with replacing(path := Path(path)) as part:
            part.write_text(f"{page}<style>{style}</style>" + "\n".join(body) + "</html>\n", encoding="utf-8")
        return path


def _takes_three(model: nn.Module, image: Tensor) -> bool:
    """Whether the model says that it takes three channels: by its first convolution, or by refusing this grey image."""
    weight = weight_of(model)

    def takes(x: Tensor) -> bool:
        try:
            with evaluating(model), torch.no_grad():
                model(as_float(x, weight.dtype, weight.device))
        except Exception:  # whatever the model's code does
            return False
        return True

    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    three = first.in_channels == 3 if first else not takes(image)  # a normalisation widens grey images unasked
    return three and takes(image.expand(-1, 3, -1, -1))


def _checked(
    model: nn.Module, images: Tensor, labels: Tensor, class_names: Sequence[str] | None, batch_size: int
) -> tuple[tuple[str, ...], Tensor]:
    """Class names and clean predictions, after everything that can be refused without an attack."""
    try:
        clean, k = predict(model, images, labels, class_names=class_names, batch_size=batch_size)
        with evaluating(model), torch.enable_grad():
            weight = weight_of(model)
            x = as_float(images[:1], weight.dtype, weight.device).clone().requires_grad_()
            gradient(model(x), x)
    except (ValueError, FloatingPointError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's code does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model does not take images of shape {tuple(images.shape[1:])}: {reason}") from error
    names = tuple(map(str, class_names if class_names is not None else range(k)))
    if len(set(names)) < k:
        raise ValueError(f"two classes have the same name: {', '.join(names)}")
    missing = [n for n, m in zip(names, torch.bincount(labels.cpu(), minlength=k).tolist(), strict=True) if not m]
    if len(missing) == k - 1:
        raise ValueError("the images are all of a single class: there is nothing to compare")
    if missing:
        raise ValueError(
            f"{len(missing)} of the model's {k} classes have no images (for example {missing[0]!r}): "
            "their robustness, and so the worst, cannot be known"
        )
    return names, clean


def _sweep(model: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: str) -> Tensor:
    """(n,) smallest radius of the sweep at which PGD-20 breaks an image, 0 if it is wrong as it is, inf if at none."""
    tensor = weight_of(model)
    x, y = as_float(images, tensor.dtype, tensor.device), labels.to(tensor.device)
    first, rows = torch.full((len(labels),), torch.inf), torch.arange(len(labels))
    with evaluating(model), torch.no_grad():
        for r in (0.0, *(f * eps for f in FACTORS)):
            points = x if r == 0 else short_pgd(model, x, y, r, norm, 20, retire=True)
            fell = answers(model(points), y) != y
            first[rows[fell.cpu()]] = r
            rows, x, y = rows[~fell.cpu()], x[~fell], y[~fell]
            if not len(rows):
                break
    return first


class _Timed(nn.Module):
    """The model, until the deadline; after it TimeUp."""

    def __init__(self, model: nn.Module, deadline: float):
        super().__init__()
        self.model, self.deadline = model, deadline

    def forward(self, x: Tensor) -> Tensor:
        if time.monotonic() > self.deadline:
            raise TimeUp
        return self.model(x)


def audit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str] | None = None,
    *,
    eps: float = 8 / 255,
    norm: str = "linf",
    version: str = "standard",
    name: str = "model",
    worst_only: bool = False,
    minutes: float | None = None,
    folder: Path | None = None,
    surrogate: nn.Module | None = None,
    compiled: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    show: int = 6,
) -> Audit:
    """How robust is each class of this model, how sure is that, and what attacks it?

    model: any module that maps images in [0, 1] to (n, K) logits, on any device, in float32 or better; it is judged in
    eval mode and left as it was. images: (N, C, H, W) uint8, or floating point in [0, 1]; grey ones are given to a
    model that takes three channels only as three equal ones, each attacked on its own. labels: (N,) integers in 0..K-1,
    every class present. eps: in the unit of images in [0, 1]. norm: "linf" or "l2".
    version: of AutoAttack, "standard" or "fast". worst_only: spend AutoAttack on the classes that can still be the
    worst, until one is left at 95 % confidence; the others are then attacked in part, and the outcome says so.
    minutes: a limit; images that no attack broke and AutoAttack did not come to an end with are reported as unfinished,
    the accuracy of their class being an upper bound.
    folder: where what was found is kept after every batch, from which the same audit goes on when it was stopped.
    surrogate: see `checks.checklist`. compiled: attack a compiled copy of the model (half a minute; for long audits).
    batch_size: images at a time; by default 250 of 3 x 32 x 32, fewer if they are larger (on a GPU beyond 16 times that
    size); random draws depend on it. show: images in the gallery.
    Everything that can be refused is refused before the first attack: ValueError, FloatingPointError.
    """
    start, labels, images = time.monotonic(), as_labels(labels), admit(model, images)
    if images.ndim != 4:
        raise ValueError(f"images of shape {tuple(images.shape)}: (images, channels, height, width) is needed")
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes={minutes}: a number of at least 0 is needed")
    if widened := images.shape[1] == 1 and len(images) > 0 and _takes_three(model, images[:1]):
        images = images.expand(-1, 3, -1, -1).contiguous()
    if batch_size is None:
        room = 250 * 3 * 32 * 32 * (16 if weight_of(model).is_cuda else 1)
        batch_size = min(max(room // max(images[:1].numel(), 1), 1), 250)
    spec = AutoAttack(eps=eps, norm=norm, version=version)
    eps = spec.eps
    names, clean = _checked(model, images, labels, class_names, batch_size)
    each_pass = (time.monotonic() - start) / len(labels)
    # what comes last, the gallery, takes some 60 passes of each image
    deadline = math.inf if minutes is None else start + 60 * minutes - min(60 * show * each_pass, 30 * minutes)
    pgd20 = Attack(eps=eps, step=max(eps / 8, 1e-12), steps=20, norm=norm)
    with bar(100, "audit") as progress:

        def upto(share: float) -> None:
            late = (time.monotonic() - start) / (60 * minutes) if minutes else 0.0
            progress.update(100 * min(max(share, late), 1) - progress.n)  # the time left is never beyond the limit

        e = Evaluation(
            model,
            images,
            labels,
            spec,
            batch_size=batch_size,
            seed=seed,
            folder=folder,
            compiled=compiled,
            progress=lambda share: upto(0.1 + 0.9 * share),
            deadline=deadline,
        )
        state = folder and Path(folder) / f"pgd-{e.identity}.safetensors"
        predicted, first, kept = torch.full_like(labels, -1), torch.empty(len(labels)), {}
        if state and state.exists() and e.says((before := read_tensors(state))[0]):
            if before[1].get("of") != e.identity:
                raise Corrupt(f"{state} is of another audit; delete it to make it anew")
            predicted, first, kept = before[0]["pgd20"], before[0]["first"], before[1]
        order, spent, note = interleaved(labels, seed), e.seconds, ""
        timed, checks = _Timed(model, deadline), pd.DataFrame(columns=COLUMNS)
        try:
            while len(left := order[predicted[order] < 0]):
                # some 300 passes of each image, so that a limit leaves more than the half of a batch
                room = batch_size if minutes is None else (deadline - time.monotonic()) / 4 / (300 * each_pass)
                rows = left[: max(min(batch_size, int(room)), 1)]
                x, y = images[rows], labels[rows]
                found = evaluate(timed, x, y, {"pgd20": pgd20}, batch_size=batch_size, seed=seed, checks=0)
                first[rows] = _sweep(timed, x, y, eps, norm)
                predicted[rows] = torch.from_numpy(found.predictions["pgd20"])
                if state:
                    write_tensors(state, {"pgd20": predicted, "first": first, **e.computed}, {"of": e.identity})
                upto(0.1 * (predicted >= 0).double().mean().item())
            # a fifth of the time that is left, if 20 images may take it
            many = min(200, max(20, batch_size), max(20.0, (deadline - time.monotonic()) / 5 / (PASSES * each_pass)))
            some = order[: int(many)]
            if surrogate or kept.get("checked", 0) < len(some):
                checks = checklist(timed, images[some], labels[some], eps, norm, surrogate=surrogate)
                if state and not surrogate:
                    meta = {"of": e.identity, "checked": len(some), "checks": checks.to_dict("list")}
                    write_tensors(state, {"pgd20": predicted, "first": first, **e.computed}, meta)
            else:
                checks = pd.DataFrame(kept["checks"], columns=checks.columns)
            if worst_only:
                verdict = find_worst(e)
                if verdict.decided:  # so that its accuracy is no bound
                    e.run((labels == verdict.classes[0]).nonzero().squeeze(1))
                left = ", ".join(names[c] for c in verdict.classes)
                if not e.finished.all():
                    note = (
                        f"Of these images {left} is the worst class, at 95 % confidence (others may name another)"
                        if verdict.decided
                        else f"Not decided between {left}, with all their images attacked"
                    ) + "; the other classes were attacked in part."
            else:
                e.run()
        except TimeUp:
            note = "The audit was stopped at its time limit"
            if checks.empty:
                note += ", before the checks of its numbers"
            note += "."
    fresh = (predicted < 0).numpy()
    if fresh.all():
        raise ValueError(
            "the time limit came before any image was attacked: give more minutes, fewer images or smaller ones"
        )
    if fresh.any():
        note += f" PGD-20 came to {(~fresh).sum()} of {len(fresh)} images; the others count as withstanding it."
    first, right = first.numpy(), (clean == labels).numpy()
    first[fresh] = np.where(right, np.inf, 0)[fresh]
    outcomes = Outcomes(labels.numpy(), {"clean": clean.numpy()}, names, {})
    outcomes.add("pgd20", np.where(fresh, clean.numpy(), predicted.numpy()), pgd20.model_dump())
    if fresh.any():
        skipped = np.bincount(outcomes.labels[fresh & right], minlength=len(names))
        outcomes.attacks["pgd20"]["unfinished"] = skipped.tolist()
    outcomes.add_autoattack("autoattack", e)
    if e.finished.all():
        checks = pd.concat([checks, black_box_check(outcomes, "autoattack")], ignore_index=True)
    outcomes.checks["autoattack"] = checks
    settings, final = outcomes.attacks["autoattack"], outcomes.predictions["autoattack"]
    fell = ~e.finished.numpy() & outcomes.correct("autoattack") & ~outcomes.correct("pgd20")
    if fell.any():  # known to be broken
        final[fell] = outcomes.predictions["pgd20"][fell]
        settings["broken by PGD-20 alone"] = int(fell.sum())
    unfinished = np.bincount(outcomes.labels[~e.finished.numpy() & ~fell], minlength=len(names))
    settings["unfinished"] = int(unfinished.sum())
    if unfinished.any():
        note += f" {unfinished.sum()} images are not fully attacked: the accuracies of their classes are upper bounds."
    if widened:
        note += " The images are grey: the model was given each as three equal channels, attacked on their own."
    levels = [0.0, *(f * eps for f in FACTORS)]
    k = len(names)
    n = np.bincount(outcomes.labels, minlength=k)
    falls = [np.bincount(outcomes.labels[first > r], minlength=k) / n for r in levels]
    return Audit(
        name,
        outcomes,
        pd.DataFrame(falls, index=pd.Index(levels, name="radius"), columns=names),
        _gallery(model, images, labels, first, eps, norm, show),
        first,
        unfinished,
        note.strip(),
        spent + time.monotonic() - start,
    )


def _gallery(
    model: nn.Module, images: Tensor, labels: Tensor, first: np.ndarray, eps: float, norm: str, show: int
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """The images that are right and fall at the smallest radius, no more than two of a class, with PGD-20 at eps."""
    tensor = weight_of(model)
    fell = np.flatnonzero((first > 0) & (first <= eps))
    fell, taken, index = fell[np.argsort(first[fell], kind="stable")], {}, []
    for i in fell:
        c = int(labels[i])
        if taken.get(c, 0) < 2 and len(index) < show:
            taken[c] = taken.get(c, 0) + 1
            index.append(i)
    index = np.array(index, dtype=int)
    x, y = as_float(images[index], tensor.dtype, tensor.device), labels[index].to(tensor.device)
    x_adv = short_pgd(model, x, y, eps, norm, 20, best=True) if len(index) else x
    with evaluating(model), torch.no_grad():
        predicted = model(x_adv).argmax(1).cpu().numpy() if len(index) else index
    return x.cpu(), x_adv.cpu(), index, predicted

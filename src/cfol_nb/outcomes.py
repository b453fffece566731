"""Outcomes: what a model predicts on every image, clean and under every attack. Statistics come later, in `stats`."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cfol_nb.autoattack import Evaluation
from cfol_nb.files import read_tensors, replacing, write_tensors

COLUMNS = ["check", "verdict", "seen"]  # of a checklist


@dataclass(frozen=True)
class Outcomes:
    """labels: (N,) int64. predictions: attack name -> (N,) int64, "clean" first. attacks: their settings. checks:
    attack name -> can its numbers be trusted (`checks.checklist`)? images: the name of each, where they are known.
    others: names of the model's other outputs, which no image is of; predictions of them come after the classes'.

    Integers of any type are taken, also as tensors or lists; an attack without settings has empty ones. Raises
    ValueError for classes out of range, for lengths that differ, for two images of one name, and for settings or checks
    without predictions.
    """

    labels: np.ndarray
    predictions: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    attacks: dict[str, dict] = field(default_factory=dict)
    checks: dict[str, pd.DataFrame] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __post_init__(self):
        names = tuple(self.class_names)
        if odd := [name for name in names if not isinstance(name, str)]:
            raise ValueError(f"class name {odd[0]!r}: a text is needed")
        if "clean" not in self.predictions or "clean" in self.attacks:
            raise ValueError("outcomes need predictions 'clean', which is no attack")
        for what, of in (("settings", self.attacks), ("checks", self.checks)):
            if lost := of.keys() - self.predictions.keys():
                raise ValueError(f"there are {what} of {sorted(lost)[0]!r}, but no predictions")
        given = {"clean": self.predictions["clean"], **self.predictions}
        for field_, value in (
            ("class_names", names),
            ("labels", _classes("labels", self.labels, len(names))),
            ("predictions", {}),
            ("attacks", {k: self.attacks.get(k, {}) for k in given if k != "clean"}),
            ("checks", dict(self.checks)),
            ("images", tuple(map(str, self.images))),
            ("others", tuple(map(str, self.others))),
        ):
            object.__setattr__(self, field_, value)
        if len(self.images) not in (0, len(self.labels)):
            raise ValueError(f"{len(self.images)} names of images, but {len(self.labels)} labels")
        if twice := len(self.images) - len(set(self.images)):
            raise ValueError(f"{twice} images have the name of another one")
        for name, values in given.items():
            self._keep(name, values)

    def _keep(self, name: str, values) -> None:
        values = _classes(f"predictions {name!r}", values, len(self.outputs))
        if len(values) != len(self.labels):
            raise ValueError(f"{len(values)} predictions {name!r}, but {len(self.labels)} labels")
        self.predictions[name] = values

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names that predictions number."""
        return (*self.class_names, *self.others)

    @classmethod
    def from_predictions(
        cls, labels: Sequence, predictions: Mapping[str, Sequence], class_names: Sequence[str] | None = None, **more
    ) -> Outcomes:
        """From anybody's labels and predictions (attack -> one per image, "clean" among them).

        They are names of classes, or whole numbers, which count the class names; as text, too, where they are no names
        themselves. class_names: by default what is found in the labels and in "clean", numbers by size, else by the
        alphabet. more: as for `Outcomes`. Raises ValueError, with the column and the value, for what is no class.
        """
        columns = {k: _plain(k, v) for k, v in {"labels": labels, **predictions}.items()}
        if unnamed := class_names is None:
            found = {str(x) for k in ("labels", "clean") for x in columns.get(k, [])}
            class_names = sorted(found, key=int if all(map(_whole_number, found)) else str)
            columns = {k: v.astype(str) for k, v in columns.items()}
        names = [str(name) for name in class_names]
        number = {name: i for i, name in enumerate(names)}
        if len(number) < len(names):
            raise ValueError(f"two classes have the same name: {', '.join(names)}")
        for what, values in columns.items():
            if values.dtype.kind in "iu":
                continue
            if not (odd := set(values.tolist()) - number.keys()):
                columns[what] = np.array([number[x] for x in values.tolist()], np.int64)
            elif not unnamed and all(map(_whole_number, values)):
                columns[what] = values.astype(np.int64)
            else:
                where = "found in the labels and in 'clean': give the class names" if unnamed else "that were given"
                raise ValueError(f"{what}: {min(odd)!r} is none of the {len(names)} classes {where}")
        return cls(columns.pop("labels"), columns, tuple(names), **more)

    @classmethod
    def from_table(cls, table: pd.DataFrame, class_names: Sequence[str] | None = None) -> Outcomes:
        """From a table of one row per image: label, clean, a column of predictions for each attack, and, if there is
        one, image: its name. Labels and predictions as for `from_predictions`."""
        if lost := [k for k in ("label", "clean") if k not in table]:
            raise ValueError(f"there is no column {lost[0]!r}: label, clean and one for each attack are needed")
        if (empty := table.isna().any()).any():
            raise ValueError(f"column {table.columns[empty][0]!r} has empty cells: one prediction per image is needed")
        predictions = {k: table[k].to_numpy() for k in ("clean", *table.columns) if k not in ("image", "label")}
        images = table.get("image", ())
        return cls.from_predictions(table["label"].to_numpy(), predictions, class_names, images=images)

    def table(self) -> pd.DataFrame:
        """What `from_table` takes, with names of classes: one row per image."""
        names = np.array(self.outputs, object)
        own = {"image": list(self.images)} if self.images else {}
        return pd.DataFrame(own | {"label": names[self.labels]} | {k: names[v] for k, v in self._whole().items()})

    def save(self, path: Path) -> Path:
        """One file: .safetensors with all of it, or .csv, which is `table` alone."""
        path = Path(path)
        if path.suffix == ".csv":
            with replacing(path) as part:
                self.table().to_csv(part, index=False)
        elif path.suffix == ".safetensors":
            write_tensors(path, self.tensors(), self.meta())
        else:
            raise ValueError(f"{path}: outcomes are kept as .safetensors or .csv")
        return path

    @classmethod
    def load(cls, path: Path, class_names: Sequence[str] | None = None) -> Outcomes:
        """What `save` wrote, or anybody's .csv of these columns; class_names: of a .csv, see `from_predictions`."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        if path.suffix == ".safetensors":
            tensors, meta = read_tensors(path)
            if "labels" not in tensors or "order" not in meta:
                raise ValueError(f"{path} holds no outcomes: it is another file of cfol-nb")
            return cls.from_tensors(tensors, meta)
        if path.suffix != ".csv":
            raise ValueError(f"{path}: outcomes are kept as .safetensors or .csv")
        try:  # a class may be called "NA", or "007"
            return cls.from_table(pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""]), class_names)
        except ValueError as error:  # of pandas, too
            raise ValueError(f"{path}: {error}") from error

    def take(self, index: np.ndarray) -> Outcomes:
        """These images alone, in this order."""
        predictions = {k: v[index] for k, v in self._whole().items()}
        images = [self.images[i] for i in index] if self.images else ()
        return replace(self, labels=self.labels[index], predictions=predictions, images=images)

    def grouped(self, groups: Sequence) -> Outcomes:
        """The same right and wrong answers by other groups of images than the classes: groups: (N,) the name of each
        image's. A wrong answer is the group after the own one. Raises ValueError if there is but one."""
        names, labels = np.unique(np.asarray(groups, str), return_inverse=True)
        if len(names) < 2:
            raise ValueError(f"all images are {str(names[0])!r}: there is nothing to compare")
        wrong = (labels + 1) % len(names)
        predictions = {k: np.where(self.correct(k), labels, wrong) for k in self._whole()}
        return Outcomes(labels, predictions, tuple(map(str, names)), self.attacks, {}, self.images)

    def counts(self, attack: str) -> tuple[np.ndarray, np.ndarray]:
        """(correct, n) per class, both (K,) int64."""
        k = len(self.class_names)
        right = np.bincount(self.labels[self.correct(attack)], minlength=k)
        return right, np.bincount(self.labels, minlength=k)

    def correct(self, attack: str) -> np.ndarray:
        """(N,) bool. Raises KeyError for an attack that was not run."""
        if attack not in self.predictions:
            raise KeyError(f"no attack {attack!r} in these outcomes (there are: {', '.join(self.predictions)})")
        return self.predictions[attack] == self.labels

    def add(self, name: str, predictions: np.ndarray, settings: dict) -> None:
        """One more attack, the last one now."""
        self._keep(name, predictions)
        self.attacks[name] = settings

    def update(self, others: Outcomes) -> None:
        """The attacks of other outcomes of the same model on the same images, after those that are here. Raises
        ValueError for other labels or classes."""
        if self.class_names != others.class_names or not np.array_equal(self.labels, others.labels):
            raise ValueError("these outcomes are of other images: they cannot be put together")
        for name, settings in others.attacks.items():
            self.add(name, others.predictions[name], settings)
        self.checks.update(others.checks)

    def add_autoattack(self, name: str, evaluation: Evaluation) -> None:
        """AutoAttack as `name`, after it up to each of its attacks as "name:apgd-ce" and so on."""
        *parts, last = evaluation.predictions().items()
        for attack, predictions in parts:
            self.add(f"{name}:{attack}", predictions, {"up_to": attack, "of": name})
        self.add(name, last[1], evaluation.described())

    def combine(self, *attacks: str, name: str = "all attacks") -> None:
        """One more attack: these (all that are here) at once. An image is right if it is so clean and under each."""
        together, predicted = list(attacks or self.attacks), self.predictions["clean"].copy()
        for attack in together:
            wrong = ~self.correct(attack)  # a KeyError that names what there is
            predicted = np.where((predicted == self.labels) & wrong, self.predictions[attack], predicted)
        self.add(name, predicted, {"all_of": together})

    def _whole(self) -> dict[str, np.ndarray]:
        """The predictions, all with an attack's settings."""
        if odd := self.predictions.keys() ^ {"clean", *self.attacks}:
            raise ValueError(f"{sorted(odd)[0]!r} has predictions or settings alone: use `add`")
        return self.predictions

    def tensors(self) -> dict[str, Tensor]:
        """What a file of outcomes holds; with `meta` it is all of them."""
        return {
            "labels": torch.from_numpy(self.labels),
            **{f"prediction.{k}": torch.from_numpy(v) for k, v in self._whole().items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: dict) -> Outcomes:
        """The outcomes that `tensors` and `meta` gave."""
        return cls(
            tensors["labels"].numpy(),
            {k: tensors[f"prediction.{k}"].numpy() for k in ("clean", *meta["order"])},
            tuple(meta["class_names"]),
            {k: meta["attacks"][k] for k in meta["order"]},
            _tables(meta),
            tuple(meta.get("images", ())),
            tuple(meta.get("others", ())),
        )

    def packed(self) -> dict:
        """All of it as JSON: labels and predictions are compressed bytes as text, small enough to publish."""
        if len(self.class_names) > 1 << 16:
            raise ValueError(f"{len(self.class_names)} classes: at most {1 << 16} can be packed")

        def text(values: np.ndarray) -> str:
            return base64.b64encode(zlib.compress(values.astype("<u2").tobytes(), 9)).decode()

        predictions = {k: text(v) for k, v in self._whole().items()}
        return {"labels": text(self.labels), "predictions": predictions, **self.meta()}

    @classmethod
    def unpacked(cls, packed: dict) -> Outcomes:
        """What `packed` made."""

        def values(text: str) -> np.ndarray:
            return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2").astype(np.int64)

        return cls(
            values(packed["labels"]),
            {k: values(packed["predictions"][k]) for k in ("clean", *packed["order"])},
            tuple(packed["class_names"]),
            {k: packed["attacks"][k] for k in packed["order"]},
            _tables(packed),
            tuple(packed.get("images", ())),
            tuple(packed.get("others", ())),
        )

    def meta(self) -> dict:
        """Names, settings and checks as JSON."""
        checks = {k: table.to_dict("list") for k, table in self.checks.items()}
        return {
            "class_names": list(self.class_names),
            "attacks": self.attacks,
            "order": list(self.attacks),
            "checks": checks,
            **{k: list(v) for k in ("images", "others") if (v := getattr(self, k))},
        }


def _classes(what: str, values, k: int) -> np.ndarray:
    """(N,) int64 in 0..k-1 from integers of any kind. Raises ValueError for anything else."""
    if torch.is_tensor(values):
        values = (values.double() if values.is_floating_point() else values).detach().cpu().numpy()
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{what} are {values.dtype} of shape {values.shape}: one integer per image is needed")
    if len(values) and not (values.min() >= 0 and values.max() < k):
        bad = values[(values < 0) | (values >= k)][0]
        raise ValueError(f"{what} hold {bad}, which is not in 0..{k - 1} ({k} class names)")
    return values.astype(np.int64, copy=False)


def _whole_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _plain(what: str, values) -> np.ndarray:
    """Integers as they are, else text. Raises ValueError for numbers that may have a fraction."""
    values = values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)
    if values.dtype.kind in "iu":
        return values
    if values.dtype.kind == "f":
        raise ValueError(f"{what} are {values.dtype}: names of classes or whole numbers are needed")
    return values.astype(str)


def _tables(meta: dict) -> dict[str, pd.DataFrame]:
    return {k: pd.DataFrame(v, columns=COLUMNS, dtype=str) for k, v in meta.get("checks", {}).items()}

"""Outcomes: what a model predicts on every image, clean and under every attack. Statistics come later, in `stats`."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cfol_nb.autoattack import Evaluation

COLUMNS = ["check", "verdict", "seen"]  # of a checklist


@dataclass(frozen=True)
class Outcomes:
    """labels: (N,) int64. predictions: attack name -> (N,) int64, "clean" first. attacks: their settings. checks:
    attack name -> can its numbers be trusted (`checks.checklist`)?

    Integers of any type are taken, also as tensors or lists; an attack without settings has empty ones. Raises
    ValueError for classes out of range, for lengths that differ, and for settings or checks without predictions.
    """

    labels: np.ndarray
    predictions: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    attacks: dict[str, dict] = field(default_factory=dict)
    checks: dict[str, pd.DataFrame] = field(default_factory=dict)

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
        ):
            object.__setattr__(self, field_, value)
        for name, values in given.items():
            self._keep(name, values)

    def _keep(self, name: str, values) -> None:
        values = _classes(f"predictions {name!r}", values, len(self.class_names))
        if len(values) != len(self.labels):
            raise ValueError(f"{len(values)} predictions {name!r}, but {len(self.labels)} labels")
        self.predictions[name] = values

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
        return {
            "labels": torch.from_numpy(self.labels),
            **{f"prediction.{k}": torch.from_numpy(v) for k, v in self._whole().items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: dict) -> Outcomes:
        return cls(
            tensors["labels"].numpy(),
            {k: tensors[f"prediction.{k}"].numpy() for k in ("clean", *meta["order"])},
            tuple(meta["class_names"]),
            {k: meta["attacks"][k] for k in meta["order"]},
            _tables(meta),
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
        )

    def meta(self) -> dict:
        checks = {k: table.to_dict("list") for k, table in self.checks.items()}
        return {
            "class_names": list(self.class_names),
            "attacks": self.attacks,
            "order": list(self.attacks),
            "checks": checks,
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


def _tables(meta: dict) -> dict[str, pd.DataFrame]:
    return {k: pd.DataFrame(v, columns=COLUMNS, dtype=str) for k, v in meta.get("checks", {}).items()}

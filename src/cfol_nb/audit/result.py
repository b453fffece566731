"""What an audit found: tables, the verdict in a few sentences, and one page."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cfol_nb import plots, stats
from cfol_nb.audit import answer, page, show
from cfol_nb.audit.radii import halves
from cfol_nb.outcomes import Outcomes

_ENDS = {"": "value", "_low": "low", "_high": "high"}
MOST = 2000  # groups of a slice: more take minutes, and have few images each


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    name: str
    outcomes: Outcomes  # clean, "pgd20", and AutoAttack up to each of its attacks, "autoattack" last
    radii: pd.DataFrame  # rows: radius, columns: class; accuracy under PGD-20, and AutoAttack from its radius on
    gallery: tuple[Tensor, Tensor, np.ndarray, np.ndarray]  # that fall first: clean, adversarial, index, prediction
    first: np.ndarray  # (N,) smallest radius of the sweep at which an image fell; inf if none
    open: np.ndarray  # (N,) bool: not fully attacked, and so may still fall
    note: str
    seconds: float  # AutoAttack's in earlier calls, from which this one went on, included
    mistaken: tuple[Tensor, np.ndarray] = (torch.empty(0), np.empty(0, int))  # some that are wrong as they are; index
    attributes: pd.DataFrame | None = None  # one row per image

    @property
    def spec(self) -> dict:
        """AutoAttack as it was run."""
        return self.outcomes.attacks["autoattack"]

    @property
    def unfinished(self) -> np.ndarray:
        """(K,) images per class that may still fall: its accuracy is one of all that these do not."""
        return np.bincount(self.outcomes.labels[self.open], minlength=len(self.outcomes.class_names))

    @property
    def checks(self) -> pd.DataFrame:
        """The verdicts of `checks.checklist`; empty if there was no time for them."""
        return self.outcomes.checks["autoattack"]

    def table(self) -> pd.DataFrame:
        """One row per class, weakest first (of equal ones that of which half falls at the smaller radius): n, clean,
        pgd20, autoattack, low, high, chance to be the weakest and whether it may be (or, where AutoAttack did not come
        to an end, how many images of the class are unfinished; `low` is then what holds if all of them fall)."""
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
        half = self.halves()
        tie = np.zeros(len(out)) if half is None else half["value"].to_numpy()
        return out.iloc[np.lexsort([tie, out["autoattack"]])].reset_index(drop=True)

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

    def _broken_by(self) -> tuple[list[str], np.ndarray]:
        """Names, and (N,) which of them was the first to break each image; the last one is of those that none broke."""
        names, spec = [n for n in self.outcomes.predictions if n.startswith("autoattack")], self.spec
        held = np.stack([*(self.outcomes.correct(n) for n in ("clean", *names)), np.zeros_like(self.open)])
        names[-1] = spec["attacks"][-1] + " or pgd20" * ("broken by PGD-20 alone" in spec)
        return ["clean", *(n.removeprefix("autoattack:") for n in names), "held"], held.argmin(0)

    def broken_by(self) -> pd.DataFrame:
        """Images per class that each attack was the first to break; "clean": wrong without one; "held": none broke."""
        names, which = self._broken_by()
        k, m = len(self.outcomes.class_names), len(names)
        counts = np.bincount(self.outcomes.labels * m + which, minlength=k * m)
        return pd.DataFrame(counts.reshape(k, m), self.outcomes.class_names, names)

    def confused(self, top: int = 5) -> pd.DataFrame:
        """The pairs that the attack uses most: class, taken for, images, share of the class."""
        c = stats.confusion(self.outcomes)
        share = c / np.maximum(c.sum(1, keepdims=True), 1)
        np.fill_diagonal(c, 0)
        rows, columns = np.unravel_index(np.argsort(-c, axis=None, kind="stable")[:top], c.shape)
        names = np.array(self.outcomes.outputs)
        found = pd.DataFrame(
            {
                "class": names[rows],
                "taken for": names[columns],
                "images": c[rows, columns],
                "share": share[rows, columns],
            }
        )
        return found[found["images"] > 0]

    def halves(self) -> pd.DataFrame | None:
        """Per class the radius at which half of its images fall under PGD-20: value, low, high (`radii.halves`); None
        where PGD-20 did not come to all images."""
        if "unfinished" in self.outcomes.attacks["pgd20"]:
            return None
        found = halves(self.first, self.outcomes.labels, self.radii.index.to_numpy())
        return found.set_axis(self.outcomes.class_names)

    def at(self, radius: float) -> Outcomes:
        """As "there": as if AutoAttack and PGD-20 had come up to this radius; wrong is the class after the own one."""
        labels, names = self.outcomes.labels, self.outcomes.class_names
        there = np.where(self.first > radius, labels, (labels + 1) % len(names))
        return Outcomes(labels, {"clean": self.outcomes.predictions["clean"], "there": there}, names)

    def slices(self, radius: float | None = None) -> pd.DataFrame:
        """By each attribute, and by class and attribute: by, group, n, clean, value (accuracy under AutoAttack, or `at`
        another radius), low, high, may_be_weakest (of the groups by the same); weakest first. Where images are
        unfinished, `low` is what holds if all of them fall. More than MOST groups are left out."""
        parts, names = [pd.DataFrame()], np.array(self.outcomes.class_names, object)
        whole = self.outcomes if radius is None else self.at(radius)
        for column in [] if self.attributes is None else self.attributes:
            values = self.attributes[column].to_numpy(str)
            both = [f"{c} / {v}" for c, v in zip(names[self.outcomes.labels], values, strict=True)]
            for by, groups in ((column, values), (f"class / {column}", both)):
                if len(set(groups)) > MOST:
                    continue
                o = whole.grouped(groups)
                t = stats.class_table(o).rename(columns={"class": "group", "accuracy": "value"})
                if radius is None:
                    sure = t["correct"] - np.bincount(o.labels[self.open], minlength=len(t))
                    t["low"] = [stats.wilson(c, n)[0] for c, n in zip(sure, t["n"], strict=True)]
                t = t.assign(by=by, clean=stats.accuracies(o, "clean")).sort_values("value", kind="stable")
                parts.append(t[["by", "group", "n", "clean", "value", "low", "high", "may_be_weakest"]])
        return pd.concat(parts, ignore_index=True)

    def corrupted(self) -> pd.DataFrame:
        """One row per corruption, of accuracies averaged over the severities 1 to 5: corruption, mean, mean_low,
        mean_high (of the classes), weakest (its name), worst, worst_low, worst_high."""
        out, o = [], self.outcomes
        for corruption in dict.fromkeys(how.get("corruption") for how in o.attacks.values()):
            if corruption:
                named = [k for k, how in o.attacks.items() if how.get("corruption") == corruption]
                several = [v for attack in named for v in stats.view(o, attack)]
                s = stats.summary(several, of="these runs").rename(index={"worst_of_mean": "worst", "worst": ""})
                ends = {f"{k}{end}": s.loc[k, v] for k in ("mean", "worst") for end, v in _ENDS.items()}
                out.append({"corruption": corruption, "weakest": stats.weakest(several), **ends})
        return pd.DataFrame(out)

    def images(self) -> pd.DataFrame:
        """One row per image: its name or number, label, predictions (names of classes), broken_by (as in the table of
        that name), and radius, the smallest one at which it fell (inf if at none)."""
        names, which = self._broken_by()
        table = self.outcomes.table().assign(broken_by=np.array(names, object)[which], radius=self.first)
        return table if "image" in table else table.rename_axis("image").reset_index()

    @functools.cached_property
    def answer(self) -> dict:
        """All of it as JSON takes it, under keys that stay: see docs/audit.md."""
        return answer.of(self)

    def verdict(self) -> str:
        """The answer in a few sentences."""
        return self.answer["verdict"]

    def first_to_fall(self) -> plots.Figure:
        """The gallery as a figure."""
        (x, x_adv, index, predicted), names = self.gallery, self.outcomes.outputs
        labels = [names[i] for i in self.outcomes.labels[index]]
        return plots.gallery(x, x_adv, labels, [names[i] for i in predicted], self.first[index])

    def wrong_as_they_are(self) -> plots.Figure:
        """Some images that are wrong without an attack, and what they are taken for."""
        (x, index), names = self.mistaken, self.outcomes.outputs
        labels, predicted = self.outcomes.labels[index], self.outcomes.predictions["clean"][index]
        return plots.images(x, [names[i] for i in labels], [names[i] for i in predicted])

    def html(self, path: Path, made: Mapping[str, str] | None = None) -> Path:
        """One page that needs nothing else and can be sent to somebody. Of more than `page.MANY` classes, all but the
        first table shows the weakest. made: how another person can repeat it (`show.made`)."""
        a, names, bound = self.answer, self.outcomes.class_names, bool(self.open.any())
        order = [row["class"] for row in a["classes"]][: page.MANY]
        few = self.outcomes if len(order) == len(names) else stats.only(self.outcomes, order)
        of_all = f", the weakest {len(order)} of {len(names)}" * (len(order) < len(names))
        confused = self.confused()
        confused["share"] = [f"{100 * v:.1f} %" for v in confused["share"]]
        head = f"<h1>{html.escape(self.name)}: robustness of each class</h1><p class=v>{html.escape(a['verdict'])}</p>"
        body = [head]

        def add(title: str, frame: pd.DataFrame, index: bool = False) -> None:
            if len(frame):
                body.append(page.table(title, frame, index))

        title = f"Accuracy of each class{of_all}{', as if no unfinished image fell' * bound}"
        body.append(page.picture(title, plots.class_accuracies({"all classes": few})))
        body.append(f"<h2>How to read this</h2><p>{HOW}</p>")
        title = "Classes, weakest first: per cent [95 % Wilson interval]"
        add(title + ", lower ends as if all unfinished images fell" * bound, self.stated())
        upto = self.radii[(self.radii > 0).any(axis=1).shift(fill_value=True)]  # the first at which nothing is left
        body.append(page.picture("How accuracy falls with the radius", plots.radii(upto, order[0])))
        add(show.radii_title(a) + of_all, show.by_radius(a).head(page.MANY))
        if len(self.mistaken[1]):
            body.append(page.picture("Images that are wrong without an attack", self.wrong_as_they_are()))
        if len(self.gallery[2]):
            body.append(page.picture("The images that fall first", self.first_to_fall()))
        for by in dict.fromkeys(row["by"] for row in a["slices"]):
            own = show.slices(a, by)
            title = f"By {by}, weakest first: per cent [95 % interval]"
            more = f", the first {page.MANY} of {len(own)}" * (len(own) > page.MANY)
            add(html.escape(title + more), own.head(page.MANY))
        add("Under corruptions, mean over severities 1 to 5: per cent [95 % interval]", show.corruptions(a))
        title = f"What the attack turns a class into{of_all}"
        body.append(
            page.picture(title, plots.confusion(stats.confusion(few)[:, : len(few.class_names)], few.class_names))
        )
        add("The pairs that the attack uses most", confused)
        add(f"Which attack broke how many images{of_all}", self.broken_by().loc[order], True)
        add("Can these numbers be trusted?", self.checks)
        for title, values in (("AutoAttack as it was run", self.spec), ("To repeat it", made or {})):
            if values:
                table = page.table(title, pd.DataFrame([(k, str(v)) for k, v in values.items()]))
                body.append(table.replace("<thead>", "<thead hidden>"))
        body.append(f"<p>{len(self.outcomes.labels)} images, {self.seconds:.0f} s. Made with cfol-nb.</p>")
        return page.write(path, self.name, body)


HOW = (
    "An image withstands an attack if nothing that the attack tried within the radius makes the model wrong. A class's "
    "accuracy is the share of its images that do, and the interval behind it says where, with 95 % confidence, that "
    "share lies for all images of this kind. The class in the first row is the weakest as measured; the verdict says "
    "from which others it cannot be told apart. Where nothing, or everything, withstands the radius that was asked "
    "for, compare the classes by the radius at which half of their images have fallen: the smaller, the weaker. Before "
    "you quote a number, read the checks: where one failed the attack was hindered, and the model may be far less "
    "robust."
)

"""What an audit found: tables, the verdict in a few sentences, and one page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from cfol_nb import plots, stats
from cfol_nb.audit import page
from cfol_nb.checks import said
from cfol_nb.outcomes import Outcomes

NORMS = {"linf": "L-inf", "l2": "L2"}


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
            pictures.append(page.picture(title, figure))

        settings = pd.DataFrame([(k, v) for k, v in self.outcomes.attacks["autoattack"].items()])
        body = [
            f"<h1>{html.escape(self.name)}: robustness of each class</h1><p class=v>{html.escape(self.verdict())}</p>",
            pictures[0],
            page.table(
                "Classes, weakest first: per cent [95 % Wilson interval]"
                + ", lower ends as if all unfinished images fell" * bound,
                self.stated(),
            ),
            pictures[1],
            page.table("The same in per cent, by radius", radii),
            pictures[2],
            page.table("The pairs that the attack uses most", confused) if len(confused) else "",
            page.table("Which attack broke how many images", self.broken_by(), True),
            *pictures[3:],
            page.table("Can these numbers be trusted?", self.checks) if len(self.checks) else "",
            page.table("AutoAttack as it was run", settings).replace("<thead>", "<thead hidden>"),
            f"<p>{len(self.outcomes.labels)} images, {self.seconds:.0f} s. Made with cfol-nb.</p>",
        ]
        return page.write(path, self.name, body)

"""Two or more models on the same images, class by class: audits, runs, published runs, or anybody's predictions."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from cfol_nb import plots, stats
from cfol_nb.audit import page, show
from cfol_nb.audit.answer import interval, listed
from cfol_nb.audit.foreign import _stored
from cfol_nb.outcomes import Outcomes
from cfol_nb.runs import verdicts


def outcomes_of(source: str, class_names: Sequence[str] | None = None) -> Outcomes:
    """Outcomes by name: the folder of an audit; a file of `Outcomes.save`, or a CSV of the same columns; or a stored or
    published run, "run:NAME", or "run:NAME:selected" for other weights than the last, with what `judge` found.
    class_names: of a CSV, see `Outcomes.load`."""
    path = Path(source)
    if (path / "outcomes.safetensors").is_file():
        return Outcomes.load(path / "outcomes.safetensors")
    if path.suffix in (".csv", ".safetensors"):
        return Outcomes.load(path, class_names)
    try:
        run, which = _stored(source if source.startswith("run:") else f"run:{source}")
    except FileNotFoundError as error:
        known = "an audit's folder, a .csv or .safetensors of outcomes, or a stored or published run (`cfol-nb list`)"
        raise FileNotFoundError(f"{source} is not {known}") from error
    if which not in run.outcomes:
        raise ValueError(f"{source}: there are the weights {', '.join(run.outcomes)}, not {which!r}")
    out = replace(
        run.outcomes[which], attacks={}, predictions={"clean": run.outcomes[which].predictions["clean"]}, checks={}
    )
    for one in (run.outcomes[which], *(judged for judged, _ in verdicts(run, which).values())):
        out.update(one)
    return out


def like(outcomes: Outcomes, first: Outcomes, name: str) -> Outcomes:
    """The outcomes with classes and images in the order of the first ones. Raises ValueError, with the name, if they
    are of other ones."""
    if odd := sorted(set(outcomes.class_names) ^ set(first.class_names)):
        raise ValueError(f"{name} has other classes than the first model: only one of them has {listed(odd)}")
    if first.others != outcomes.others:
        raise ValueError(f"{name} has other outputs without images than the first")
    to = np.array([*map(first.outputs.index, outcomes.outputs)])
    predictions = {k: to[v] for k, v in outcomes.predictions.items()}
    outcomes = replace(outcomes, labels=to[outcomes.labels], predictions=predictions, class_names=first.class_names)
    if outcomes.images and first.images:
        if odd := sorted(set(outcomes.images) ^ set(first.images)):
            raise ValueError(f"{name} has other images than the first model: only one of them has {listed(odd)}")
        where = {image: i for i, image in enumerate(outcomes.images)}
        outcomes = outcomes.take(np.array([where[image] for image in first.images]))
    if not np.array_equal(outcomes.labels, first.labels):
        raise ValueError(f"{name} has other labels than the first model: the same images in the same order are needed")
    return outcomes


@dataclass(frozen=True)
class Comparison:
    """What changed from the first model to each of the others, under one attack."""

    outcomes: dict[str, Outcomes]  # of the same images, in one order
    attack: str

    @functools.cached_property
    def answer(self) -> dict:
        """All of it as JSON takes it, under keys that stay: see docs/audit.md."""
        (first, a), *others = self.outcomes.items()
        rows, changes, of = [], [], {}
        for name, o in self.outcomes.items():
            t = stats.class_table(o, self.attack).rename(columns={"accuracy": "value"})
            of[name] = [interval(row) for _, row in t.iterrows()]
        for name, b in others:
            for i, row in stats.paired(b, a, self.attack).iterrows():
                lift = stats.lift([b], [a], row["class"], self.attack)
                change = interval({"value": lift["difference"], **lift})
                own = {"class": row["class"], "n": int(row["n"]), "from": first, "to": name}
                own |= {"before": of[first][i], "after": of[name][i], "change": change}
                rows.append(own | {"lost": int(row["only_b"]), "won": int(row["only_a"]), "p": float(row["p"])})
            s = stats.summary(b, self.attack, versus=a)
            kinds = {k: interval(s.loc[k]) for k in ("mean", "tail", "worst")}
            weakest = {f"weakest_{k}": stats.weakest(o, self.attack) for k, o in (("before", a), ("after", b))}
            changes.append({"from": first, "to": name, **kinds, **weakest})
        for row, p in zip(rows, stats.holm(np.array([row["p"] for row in rows])), strict=True):
            row["p_holm"] = float(p)
        rows.sort(key=lambda row: row["before"]["value"])
        out = {"attack": self.attack, "images": len(a.labels), "changes": changes, "classes": rows}
        return {"verdict": " ".join(map(functools.partial(_told, out), changes)), **out}

    def verdict(self) -> str:
        """The answer in a few sentences."""
        return self.answer["verdict"]

    def table(self, to: str) -> pd.DataFrame:
        """One row per class, the weakest before first, as text: before, after, change [95 % interval] in points, how
        many images were won and lost, and p (Holm)."""
        shown = [
            {
                "class": r["class"],
                "n": r["n"],
                "before": f"{100 * r['before']['value']:.1f}",
                "after": f"{100 * r['after']['value']:.1f}",
                "change": points(r["change"]),
                "images": f"+{r['won']} -{r['lost']}",
                "p (Holm)": f"{r['p_holm']:.2g}",
            }
            for r in self.answer["classes"]
            if r["to"] == to
        ]
        return pd.DataFrame(shown)

    def text(self) -> str:
        """For a terminal of 80 columns."""
        (first, _), *others = self.outcomes.items()
        title = f"per cent under {self.attack}, and points [95 % interval]; images won and lost"
        parts = [show.table(self.table(to), f"{first} -> {to}: {title}") for to, _ in others]
        return "\n\n".join([*parts, show.wrapped(self.verdict())])

    def html(self, path: Path) -> Path:
        """One page that needs nothing else."""
        first, *others = self.outcomes
        title = f"{', '.join(others)} beside {first}"
        body = [f"<h1>{html.escape(title)}</h1><p class=v>{html.escape(self.verdict())}</p>"]
        body.append(f"<h2>How to read this</h2><p>{HOW}</p>")
        for name, o in self.outcomes.items():
            if len(o.class_names) <= page.MANY:
                title = f"{name}: accuracy of each class under {self.attack}"
                body.append(page.picture(title, plots.class_accuracies({"all classes": o}, self.attack)))
        for to in others:
            rows = [r for r in self.answer["classes"] if r["to"] == to][: page.MANY]
            gained = [{"before": r["before"]["value"], "difference": r["change"]["value"], **r["change"]} for r in rows]
            title = f"From {first} to {to}"
            gained = pd.DataFrame(gained, [r["class"] for r in rows])
            body.append(page.picture(f"{title}, in points [95 % interval]", plots.gains(gained)))
            body.append(page.table(html.escape(f"{title}: per cent, points [95 % interval]"), self.table(to)))
        return page.write(path, f"{first} compared", body)


HOW = (
    "All models were judged on the same images, and compared image by image: won are those that the later model alone "
    "has right, lost those that the first alone has. Intervals say what these models would differ by on all images of "
    "this kind, with 95 % confidence. p is McNemar's exact test of a class, adjusted by Holm's method for all rows of "
    "all tables here: below 0.05 the class has changed. The worst class is whichever is lowest under each model, and "
    "may be another one after than before. Accuracies under attack are upper bounds."
)


def points(change: Mapping[str, float]) -> str:
    """A difference in points, with its sign and interval."""
    return f"{100 * change['value']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"


def _told(answer: dict, change: dict) -> str:
    """What changed to one of the models."""
    sure = [r for r in answer["classes"] if r["to"] == change["to"] and r["p_holm"] <= 0.05]
    sure.sort(key=lambda r: r["change"]["value"])
    up, down = ([r["class"] for r in sure if sign * r["change"]["value"] > 0] for sign in (1, -1))
    worst, before, after = change["worst"], change["weakest_before"], change["weakest_after"]
    kind = "higher" if worst["low"] > 0 else "lower" if worst["high"] < 0 else "not shown to differ"
    return (
        f"From {change['from']} to {change['to']}, under {answer['attack']}: the worst class is {kind}, by "
        f"{points(worst)} points ({before} before, {after} after), and the mean changes by {points(change['mean'])}. "
        + f"Better: {listed(up[::-1])}. " * bool(up)
        + f"Worse: {listed(down)}. " * bool(down)
        + "No class is shown to change. " * (not sure)
    ).strip()


def compare(models: Mapping[str, Outcomes], attack: str | None = None) -> Comparison:
    """What changed from the first of these models to each other one. models: name -> outcomes on the same images;
    where images have names, their order may differ. attack: by default the last one that all have. Classes without
    images are left out; being taken for one of them is wrong.

    Raises ValueError for fewer than two models, other images or classes, and an attack that is lacking.
    """
    if len(models) < 2:
        raise ValueError(f"{len(models)} model: at least two are needed to compare")
    (name, first), *others = models.items()
    aligned = {name: first} | {k: like(o, first, k) for k, o in others}
    common = [k for k in first.predictions if all(k in o.predictions for o in aligned.values())]
    if attack is not None and attack not in common:
        raise ValueError(f"attack {attack!r} is not in all of these outcomes (in all: {', '.join(common)})")
    there = [name for name, n in zip(first.class_names, first.counts("clean")[1], strict=True) if n]
    if len(there) < len(first.class_names):
        aligned = {k: stats.only(o, there) for k, o in aligned.items()}
    return Comparison(aligned, attack or common[-1])

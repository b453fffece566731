"""What an audit says: one answer as data, and the sentences that tell it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cfol_nb import stats
from cfol_nb.checks import said
from cfol_nb.outcomes import Outcomes

if TYPE_CHECKING:
    from cfol_nb.audit.result import Audit

NORMS = {"linf": "L-inf", "l2": "L2"}


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def of_255(eps: float) -> bool:
    """Whether people write this radius as 8/255: a whole number of 255ths, and no short decimal."""
    return abs(255 * eps - round(255 * eps)) < 1e-6 and round(eps, 4) != eps


def as_radius(r: float, eps: float) -> str:
    """A radius as people write eps."""
    return f"{255 * r:.3g}/255" if of_255(eps) else f"{r:.3g}"


def number(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return float(value) if np.isfinite(value) else None


def interval(row) -> dict:
    """value, low and high of a row, as numbers of JSON."""
    return {k: number(row[k]) for k in ("value", "low", "high")}


def accuracy(outcomes: Outcomes, attack: str) -> dict:
    """Of the classes under an attack: mean and worst (value, low, high), weakest (all of the lowest accuracy), lowest
    (that accuracy with Wilson's interval, and n, of the first of them), may_be_weakest (the weakest is one of these,
    with 95 % confidence), the lowest first."""
    t, s = stats.class_table(outcomes, attack), stats.summary(outcomes, attack)
    t = t.rename(columns={"accuracy": "value"}).sort_values("value", kind="stable")
    return {
        "mean": interval(s.loc["mean"]),
        "worst": interval(s.loc["worst"]),
        "weakest": t["class"][t["value"] == t["value"].min()].tolist(),
        "lowest": {**interval(t.iloc[0]), "n": int(t["n"].iloc[0])},
        "may_be_weakest": t["class"][t["may_be_weakest"]].tolist(),
    }


def telling(found: Audit, under: dict[str, dict]) -> dict | None:
    """Where the radius that was asked for does not tell classes apart (several have nothing left, or none lost any
    image): `accuracy` at the one of the radii that comes closest to breaking half of what is right."""
    attacked = under["autoattack"]
    several = attacked["lowest"]["value"] == 0 and len(attacked["weakest"]) > 1
    if found.halves() is None or not (several or attacked["mean"]["value"] == under["clean"]["mean"]["value"]):
        return None
    mean, radii = found.radii.mean(axis=1).to_numpy(), found.radii.index.to_numpy()
    r = float(radii[1:][np.abs(mean[1:] - mean[0] / 2).argmin()])
    return None if r == found.spec["eps"] else {"radius": r, **accuracy(found.at(r), "there")}


def of(found: Audit) -> dict:
    """See docs/audit.md for the keys."""
    o, spec, halves = found.outcomes, found.spec, found.halves()
    under = {name: accuracy(o, name) for name in ("clean", "pgd20", "autoattack")}
    per = {name: stats.class_table(o, name).set_index("class") for name in under}
    classes = []
    for _, t in found.table().iterrows():
        name = t["class"]
        row = {"class": name, "n": int(t["n"])}
        for attack, own in per.items():
            low = t["low"] if attack == "autoattack" else own["low"][name]
            row[attack] = {"value": float(own["accuracy"][name]), "low": float(low), "high": float(own["high"][name])}
        row["unfinished"] = int(t.get("unfinished", 0))
        if "weakest" in t:
            row |= {"weakest": float(t["weakest"]), "may_be_weakest": bool(t["may_be_weakest"])}
        if halves is not None:
            row["half_radius"] = interval(halves.loc[name])
        classes.append(row)
    there, order = telling(found, under), [row["class"] for row in classes]
    under["autoattack"]["weakest"].sort(key=order.index)
    out = {
        "name": found.name,
        "eps": spec["eps"],
        "norm": spec["norm"],
        "attack": spec,
        "images": len(o.labels),
        "accuracy": under,
        "telling_radius": there,
        "classes": classes,
        "radii": {"radius": found.radii.index.tolist(), "accuracy": found.radii.to_dict("list")},
        "slices": rows(found.slices(there and there["radius"])),
        "corruptions": rows(found.corrupted()),
        "checks": rows(found.checks),
        "note": found.note,
        "seconds": round(found.seconds, 1),
    }
    return {"verdict": verdict(out, said(found.checks)), **out}


def rows(table: pd.DataFrame) -> list[dict]:
    """As JSON takes them."""
    return [{k: number(v) if isinstance(v, float) else v for k, v in r.items()} for r in table.to_dict("records")]


def percent(cell: dict, bound: bool = False) -> str:
    """A share of the answer in per cent, with its interval; bound: it may still fall."""
    if bound:
        return f"at most {100 * cell['value']:.1f} %"
    return f"{100 * cell['value']:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def apart(names: Sequence[str], own: str, of: int) -> str:
    """What an accuracy's `may_be_weakest` says of the class that is lowest."""
    if not (others := [name for name in names if name != own]):
        return ""
    which = "any other" if len(others) == of - 1 > 1 else listed(others, 4)
    return f" With 95 % confidence it cannot be told apart from {which}."


def verdict(a: dict, checks: str) -> str:
    """The answer (of `of`) in a few sentences, with that of the checklist."""
    spec, under, clean, k = a["attack"], a["accuracy"]["autoattack"], a["accuracy"]["clean"], len(a["classes"])
    weakest = next(row for row in a["classes"] if row["class"] == under["weakest"][0])
    unfinished, out = any(row["unfinished"] for row in a["classes"]), []
    attack = f"AutoAttack ({spec['version']}, {NORMS[a['norm']]} {as_radius(a['eps'], a['eps'])})"

    def level(of: dict) -> str:
        first, *others = of["weakest"]
        return f"{first}, level with {listed(others, 4)}" if others else first

    if under["mean"]["value"] == 0:
        out.append(f"Nothing withstands {attack}.")
    elif not unfinished and under["mean"]["value"] == clean["mean"]["value"]:
        out.append(f"Whatever is right without an attack withstands {attack}.")
    else:
        bound = bool(weakest["unfinished"])
        out.append(
            f"The weakest class{' so far' * bound} is {level(under)}: {percent(weakest['autoattack'], bound)} of its "
            f"{weakest['n']} images withstand {attack}, against {percent(under['mean'], unfinished)} on average over "
            "the classes."
        )
        if not unfinished:
            out.append(
                f"It is truly the weakest with probability {weakest['weakest']:.2f}; the accuracy of whichever class "
                f"truly is lies in [{100 * under['worst']['low']:.1f}, {100 * under['worst']['high']:.1f}] %."
                + apart(under["may_be_weakest"], weakest["class"], k)
            )
        if weakest["class"] not in (pgd20 := a["accuracy"]["pgd20"]["weakest"]):
            out.append(f"Under PGD-20 another class, {pgd20[0]}, looks weakest.")
    if there := a["telling_radius"]:
        out.append(
            f"At {as_radius(there['radius'], a['eps'])}, under PGD-20, the weakest is {level(there)}: "
            f"{percent(there['lowest'])} of its {there['lowest']['n']} images withstand, against "
            f"{percent(there['mean'])} on average." + apart(there["may_be_weakest"], there["weakest"][0], k)
        )
    if "half_radius" in weakest:
        by = sorted(a["classes"], key=lambda row: np.inf if (v := row["half_radius"]["value"]) is None else v)
        ends = [f"of {row['class']} {fall(row['half_radius'], a)}" for row in (by[0], by[-1])]
        out.append(f"Half of the images {', '.join(ends)}.")
    if clean["mean"]["value"] < 1:
        out.append(f"Without an attack the weakest is {level(clean)}: {percent(clean['lowest'])}.")
    for by in dict.fromkeys(row["by"] for row in a["slices"]):
        own = [row for row in a["slices"] if row["by"] == by]
        may = apart([row["group"] for row in own if row["may_be_weakest"]], own[0]["group"], len(own))
        out.append(f"By {by} the weakest is {own[0]['group']}: {percent(own[0])} of its {own[0]['n']} images.{may}")
    if a["corruptions"]:
        row = min(a["corruptions"], key=lambda row: row["worst"])
        cell = percent({"value": row["worst"], "low": row["worst_low"], "high": row["worst_high"]})
        out.append(f"Of the corruptions {row['corruption']} leaves the lowest class: {row['weakest']}, {cell}.")
    out.append("Accuracies under attack are upper bounds: another attack may break more.")
    return " ".join(filter(None, (*out, checks, a["note"])))


def fall(half: dict, a: dict) -> str:
    """Where half of a class falls, after "half of the images of a class"."""
    low, value, high = (None if half[k] is None else as_radius(half[k], a["eps"]) for k in ("low", "value", "high"))
    if value is None:
        return f"withstand every radius that was tried (at least {low})"
    if half["value"] == 0:
        return "are wrong without an attack"
    return f"fall by {value} [{low}, {high}]" if high else f"fall by {value} (at least {low})"

"""An answer as tables of text, for 80 columns, and as JSON, CSV or LaTeX."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
import textwrap
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from cfol_nb.audit.answer import as_radius, of_255

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cfol_nb.audit.result import Audit

WIDTH, ROWS = 80, 20  # of a terminal


def wrapped(text: str) -> str:
    """Text in lines that fit the terminal."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def table(frame: pd.DataFrame, title: str) -> str:
    """The first rows under a title, as columns that fit: the first one is cut, then the last ones go."""
    rows, out = frame.head(ROWS).astype(str), [wrapped(title)]
    room = WIDTH - sum(max(map(len, [name, *rows[name]])) + 2 for name in rows.columns[1:])
    first = rows.columns[0]
    rows[first] = [v if len(v) <= max(room, 12) else v[: max(room, 12) - 1] + "…" for v in rows[first]]
    lines = rows.to_string(index=False).splitlines()
    out += [line[:WIDTH].rstrip() for line in lines]
    return "\n".join([*out, f"... and {len(frame) - ROWS} more"] if len(frame) > ROWS else out)


def cell(value: dict, scale: float = 100, digits: str = ".1f") -> str:
    """'value [low, high]'; an end that is beyond all is left open."""
    v, low, high = ("" if value[k] is None else f"{scale * value[k]:{digits}}" for k in ("value", "low", "high"))
    return f"{v or 'none'} [{low}, {high}]"


def classes(a: dict) -> pd.DataFrame:
    """One row per class, weakest first: per cent, and the radius at which half of the images have fallen."""
    rows = []
    for row in a["classes"]:
        out = {"class": row["class"], "n": row["n"], "clean": f"{100 * row['clean']['value']:.1f}"}
        out["AutoAttack"] = cell(row["autoattack"])
        out |= {"P(weakest)": f"{row['weakest']:.2f}"} if "weakest" in row else {"unfinished": row["unfinished"]}
        rows.append(out)
    return pd.DataFrame(rows)


def radii_title(a: dict) -> str:
    """What stands above the table `by_radius`."""
    unit = " (radii in 255ths)" * of_255(a["eps"])
    return f"Radius at which half has fallen [95 % interval], and per cent left at some radii{unit}"


def by_radius(a: dict, most: int = 6) -> pd.DataFrame:
    """One row per class in the same order: the radius at which half of it has fallen, and per cent that withstand some
    of the radii: 0, the one asked for, and those that leave about half, a quarter ... of what is right."""
    radii = pd.DataFrame(a["radii"]["accuracy"], index=a["radii"]["radius"])
    mean = radii.mean(axis=1).to_numpy()
    at = {0, int(np.abs(radii.index.to_numpy() - a["eps"]).argmin())}
    for share in (0.5, 0.25, 0.75, 0.1, 0.9):
        at |= {int(np.abs(mean - share * mean[0]).argmin())} if len(at) < most else set()
    some = 100 * radii.iloc[sorted(at)].T
    scale = 255 if of_255(a["eps"]) else 1
    some.columns = [f"{scale * r:.3g}" for r in some.columns]
    some = some.map("{:.1f}".format).loc[[row["class"] for row in a["classes"]]].rename_axis("class").reset_index()
    if all("half_radius" in row for row in a["classes"]):
        some.insert(1, "half by", [cell(row["half_radius"], scale, ".3g") for row in a["classes"]])
    return some


def slices(a: dict, by: str) -> pd.DataFrame:
    """One row per group of images, of those that were grouped by `by`."""
    rows = [r for r in a["slices"] if r["by"] == by]
    shown = [(r["group"], r["n"], f"{100 * r['clean']:.1f}", cell(r)) for r in rows]
    there = a["telling_radius"]
    attack = f"PGD-20 at {as_radius(there['radius'], a['eps'])}" if there else "AutoAttack"
    return pd.DataFrame(shown, columns=["group", "n", "clean", attack])


def corruptions(a: dict) -> pd.DataFrame:
    """One row per corruption: mean, worst class, and which it is."""

    def both(r: dict) -> list[str]:
        return [cell({"value": r[k], "low": r[f"{k}_low"], "high": r[f"{k}_high"]}) for k in ("mean", "worst")]

    shown = [(r["corruption"], *both(r), r["weakest"]) for r in a["corruptions"]]
    return pd.DataFrame(shown, columns=["corruption", "mean", "worst class", "which"])


def text(found: Audit) -> str:
    """An audit's answer for a terminal."""
    a = found.answer
    broken_by = found.broken_by().loc[[row["class"] for row in a["classes"]]]
    parts = [
        table(classes(a), "Per cent [95 % interval], weakest first"),
        table(by_radius(a), radii_title(a)),
        table(broken_by.rename_axis("class").reset_index(), "Images that each attack was the first to break"),
        *(table(slices(a, by), f"By {by}") for by in dict.fromkeys(row["by"] for row in a["slices"])),
    ]
    if a["corruptions"]:
        parts.append(table(corruptions(a), "Under corruptions, mean over severities 1 to 5"))
    if odd := [row for row in a["checks"] if row["verdict"] != "ok"]:
        parts.append("\n".join(wrapped(f"{row['verdict']}: {row['check']} ({row['seen']})") for row in odd))
    return "\n\n".join([*parts, wrapped(a["verdict"])])


def rendered(form: str, a: dict) -> str:
    """The whole answer as "json", or its classes as "csv" (numbers) or "latex" (per cent [95 % interval])."""
    if form == "json":
        return json.dumps(a, indent=1, allow_nan=False)
    if form == "csv":
        return pd.json_normalize(a["classes"], sep="_").to_csv(index=False).rstrip("\n")

    def shown(k: str, v) -> object:
        if isinstance(v, dict):
            return cell(v, 1, ".3g") if "radius" in k else cell(v)
        return f"{v:.2f}" if isinstance(v, float) else v

    frame = pd.DataFrame([{k.replace("_", " "): shown(k, v) for k, v in row.items()} for row in a["classes"]])
    return frame.to_latex(index=False, escape=True).rstrip("\n")


def status(a: dict, fail_below: float | None) -> tuple[int, str]:
    """The exit status for an audit's answer, and why: 4 if a check of its numbers failed; else 3 if the worst class may
    lie below this accuracy, by its 95 % interval, or if all unfinished images fall; else 0."""
    if failed := [row["check"] for row in a["checks"] if row["verdict"] == "fail"]:
        return 4, f"exit status 4: {', '.join(failed)}: these checks of the numbers failed"
    low = a["accuracy"]["autoattack"]["worst"]["low"]
    if any(row["unfinished"] for row in a["classes"]):
        low = min(low, *(row["autoattack"]["low"] for row in a["classes"]))
    if fail_below is not None and low < fail_below:
        return 3, f"exit status 3: the worst class may lie at {low:.4g}, below {fail_below:g}"
    return 0, ""


def made(model: nn.Module, *data: Tensor, **more: str) -> dict[str, str]:
    """When, by which command and of what an audit was made, so that another person can repeat it. The hashes are
    SHA-256, 16 hexadecimal digits, of the bytes of the model's state, and of the data, one after the other."""

    def digest(tensors) -> str:
        h = hashlib.sha256()
        for t in tensors:
            raw = isinstance(t, torch.Tensor)
            h.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if raw else repr(t).encode())
        return h.hexdigest()[:16]

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("cfol-nb", "torch", "numpy"))
    return {
        "command": shlex.join(["cfol-nb", *sys.argv[1:]]),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        **more,
        "versions": f"{versions}, Python {platform.python_version()}",
        "weights": digest(model.state_dict().values()),
        "images and labels": digest(data),
    }

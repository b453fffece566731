"""Sentences that tables support, under any parameters; labels of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from cfol_nb.config import RunConfig
from cfol_nb.runs import Run
from cfol_nb.stats import interval


def labels(configs: Sequence[RunConfig]) -> list[str]:
    """A name for each configuration, by its method, the options that it was given, and its objective: ERM-AT, CFOL-AT,
    CFOL-TRADES drift=80. Raises ValueError for fewer than two, or for two that would have one name."""
    names = []
    for c in configs:
        given = "".join(f" {k}={v}" for k, v in c.method.items() if k != "name")
        names.append(f"{c.method['name'].upper()}-{c.objective['name'].upper()}{given}")
    if len(names) < 2:
        raise ValueError(f"methods {names}: two or more are needed, the first to compare the others with")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"method {twice[0]} is there twice")
    return names


def differences(tables: Mapping[str, pd.DataFrame], against: str, statistics: Sequence[str] = ("mean", "worst")) -> str:
    """Which methods are shown to raise or lower a statistic: a line for each. tables: label -> `stats.summary(label's,
    versus=those of `against`)`. A difference is shown if its interval lies on one side of 0."""
    lines = []
    for name in statistics:
        said: dict[str, list[str]] = {"is raised by": [], "is lowered by": [], "no difference is shown for": []}
        for label, table in tables.items():
            row = table.loc[name]
            where = "is raised by" if row["low"] > 0 else "is lowered by" if row["high"] < 0 else [*said][-1]
            said[where].append(f"{label} {interval(row, '+')}")
        of = next(iter(tables.values())).loc[name, "of"]
        lines.append(f"- {name} ({of}): " + "; ".join(f"{k} {', '.join(v)}" for k, v in said.items() if v))
    return "\n".join([f"Against {against}, in points [95 % interval]:", *lines])


def classes(tests: Mapping[str, pd.DataFrame], against: str, level: float = 0.05) -> str:
    """Which classes gain and lose: a line for each method. tests: label -> `stats.paired(one of its runs, one of those
    of `against`)`. Shown is what has an adjusted p of at most `level`."""
    lines = []
    for label, table in tests.items():
        table = table[table["p_holm"] <= level].sort_values("difference")
        parts = []
        for verb, part in (
            ("gains on", table[table["difference"] > 0][::-1]),
            ("loses on", table[table["difference"] < 0]),
        ):
            if len(part):
                each = (f"{name} ({100 * d:+.0f})" for name, d in zip(part["class"], part["difference"], strict=True))
                parts.append(f"{verb} {', '.join(each)}")
        lines.append(f"- {label} {'; '.join(parts) or 'is not shown to change any class'}")
    return "\n".join(
        [f"One run each against {against}, class by class, in points (Holm's p at most {level:g}):", *lines]
    )


def p_values(table: pd.DataFrame) -> pd.DataFrame:
    """The same with p and p_holm as text of three digits, "< 0.001" for less."""

    def text(p: float) -> str:
        return "< 0.001" if p < 0.0005 else f"{p:.3f}"

    return table.assign(**{name: table[name].map(text) for name in ("p", "p_holm") if name in table})


def complaints(runs: Sequence[Run]) -> str:
    """What the trainer warned of, a line for each run; that there was nothing, if there was nothing."""
    told = [f"- {run.folder.name}: {'; '.join(run.warnings)}" for run in runs if run.warnings]
    if not told:
        return f"No warning about any of {len(runs)} runs."
    return "\n".join([f"Warnings about {len(told)} of {len(runs)} runs, whose numbers may mean little:", *told])

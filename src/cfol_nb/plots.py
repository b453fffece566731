"""Figures: functions take data and return the Figure; they know nothing of the run store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from cfol_nb.evaluate import Outcomes
from cfol_nb.stats import accuracies, class_table, last_attack, summary, wilson

sns.set_theme(
    style="whitegrid",
    context="notebook",
    rc={
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "grid.color": "#e8e8e8",
        "axes.edgecolor": "#888888",
    },
)
CLEAN, ROBUST = "#b8c4d0", "#c0392b"


def _several(outcomes: Outcomes | Sequence[Outcomes]) -> list[Outcomes]:
    return [outcomes] if isinstance(outcomes, Outcomes) else list(outcomes)


def class_accuracies(
    groups: Mapping[str, Outcomes | Sequence[Outcomes]], attack: str | None = None, order_by: str | None = None
) -> Figure:
    """One panel per group, classes sorted by the robust accuracy of the group `order_by` (the first): clean and robust.

    A point is the mean over runs. The bar is Wilson's 95 % interval for the test images of the class, at that mean: it
    says how far another test set could move the point.
    """
    groups = {k: _several(v) for k, v in groups.items()}
    first = groups[order_by or next(iter(groups))]
    attack = attack or last_attack(first[0])
    order = np.argsort(np.mean([accuracies(o, attack) for o in first], 0))
    names = [first[0].class_names[i] for i in order]
    tall = max(3.2, 0.32 * len(names))
    fig, axes = plt.subplots(
        1, len(groups), figsize=(1 + 4 * len(groups), tall), sharex=True, sharey=True, squeeze=False
    )
    rows = np.arange(len(order))
    for ax, (label, several) in zip(axes[0], groups.items(), strict=True):
        robust = np.mean([accuracies(o, attack) for o in several], 0)[order]
        clean = np.mean([accuracies(o, "clean") for o in several], 0)[order]
        table = class_table(several[0], attack).iloc[order]
        low, high = np.array([wilson(round(a * n), n) for a, n in zip(robust, table["n"], strict=True)]).T
        ax.hlines(rows, robust, clean, color=CLEAN, lw=1.2, zorder=1)
        ax.errorbar(
            robust,
            rows,
            xerr=np.abs([low - robust, high - robust]),
            fmt="o",
            color=ROBUST,
            ms=5,
            lw=2,
            zorder=3,
            label="under attack",
        )
        ax.plot(clean, rows, "o", color=CLEAN, ms=6, mec="white", zorder=2, label="clean")
        ax.axvline(robust.mean(), color=ROBUST, lw=1, ls=":", zorder=0)
        ax.axvline(clean.mean(), color="#8494a4", lw=1, ls=":", zorder=0)
        worst = int(robust.argmin())
        ax.annotate(
            f"{100 * robust[worst]:.0f} %",
            (low[worst], rows[worst]),
            xytext=(-6, 0),
            textcoords="offset points",
            va="center",
            ha="right",
            color=ROBUST,
            fontweight="bold",
        )
        ax.set_title(f"{label}: mean {100 * robust.mean():.0f} % under attack", fontsize=11, loc="left")
        ax.set(xlabel="accuracy", xlim=(0, 1.02))
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(rows, names)
    axes[0, 0].set_ylabel("class")
    axes[0, -1].legend(loc="lower left", frameon=True, fontsize=9)
    return fig


def life_of_p(p: pd.DataFrame, top: int = 3) -> Figure:
    """CFOL's distribution over training (rows: epoch, columns: class), the `top` most drawn classes in colour."""
    fig, ax = plt.subplots(figsize=(7, 3.6))
    order = p.iloc[-1].sort_values(ascending=False).index
    colours = dict(zip(order[:top], sns.color_palette("rocket", top + 1), strict=False))
    for name in order[::-1]:
        ax.plot(p.index, p[name], color=colours.get(name, "#c9ced6"), lw=2.4 if name in colours else 1.2)
    ends, gap = [], 0.045 * (p.to_numpy().max() - p.to_numpy().min() + 1e-9)
    for name in order[: max(top, 1)]:  # labels beside the lines, pushed apart where they would touch
        ends.append(min(p[name].iloc[-1], ends[-1] - 1.4 * gap) if ends else p[name].iloc[-1])
        ax.annotate(
            name,
            (p.index[-1], ends[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colours[name],
            fontweight="bold",
        )
    ax.axhline(1 / p.shape[1], color="#444444", lw=1, ls=":")
    ax.annotate(
        "uniform", (p.index[-1], 1 / p.shape[1]), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
    )
    ax.set(xlabel="epoch", ylabel="share of draws", xlim=(p.index[0], p.index[-1]))
    return fig


def trade(
    groups: Mapping[str, Outcomes | Sequence[Outcomes]], attack: str | None = None, statistic: str = "worst"
) -> Figure:
    """Mean against worst class under attack: a large point per group with its 95 % intervals, a small one per run."""
    fig, ax = plt.subplots(figsize=(7, 4.6))
    colours = sns.color_palette("deep", len(groups))
    centres = []
    for (label, several), colour in zip(groups.items(), colours, strict=True):
        several = _several(several)
        table = summary(several, attack)
        each = np.array([[a.mean(), a.min()] for a in (accuracies(o, attack) for o in several)])
        m, w = table.loc["mean"], table.loc[statistic]
        ax.plot(*each.T, "o", color=colour, alpha=0.35, ms=4)
        ax.errorbar(
            m.value,
            w.value,
            fmt="o",
            color=colour,
            ms=9,
            mec="white",
            xerr=[[m.value - m.low], [m.high - m.value]],
            yerr=[[w.value - w.low], [w.high - w.value]],
            elinewidth=0.8,
            alpha=0.95,
            ecolor=(*colour, 0.45),
        )
        centres.append((m.value, w.value, label, colour))
    for i, (x, y, label, colour) in enumerate(sorted(centres, key=lambda c: c[1])):
        side = 1 if i % 2 else -1  # neighbours in height are labelled on different sides
        ax.annotate(
            label,
            (x, y),
            xytext=(8 * side, 5),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            ha="left" if side > 0 else "right",
        )
    ax.set(xlabel="mean accuracy under attack", ylabel="worst class under attack")
    return fig

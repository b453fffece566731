"""Figures: functions take data and return the Figure; they know nothing of the run store.

The style is that of a figure alone: Matplotlib's settings stay the user's. Names are drawn as they are, whatever
characters they are of.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from scipy.stats import entropy

from cfol_nb.outcomes import Outcomes
from cfol_nb.stats import _listed, accuracies, class_table, last_attack, summary, wilson

CLEAN, ROBUST = "#b8c4d0", "#c0392b"
STYLE = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("notebook"),
    "axes.prop_cycle": mpl.cycler(color=sns.color_palette("deep")),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "grid.color": "#e8e8e8",
    "axes.edgecolor": "#888888",
    "text.usetex": False,
    "text.parse_math": True,  # of the numbers beside logarithmic axes
    "axes.formatter.use_mathtext": False,
}


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """What a font can draw; nothing for one that cannot be read, or that draws every character as a box."""
    try:
        return frozenset() if "lastresort" in path.lower() else frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _families(text: str, base: list[str]) -> list[str]:
    """The families of installed fonts, after those of `base`, that it takes to draw the text."""
    missing = {ord(c) for c in text if not c.isspace()}
    for family in base:
        missing -= _characters(font_manager.findfont(family))
    found = list(base)
    plain = (f for f in font_manager.fontManager.ttflist if f.style == "normal" and missing)
    for font in sorted(plain, key=lambda f: ("Sans" not in f.name, f.weight != 400, f.name)):
        if missing & _characters(font.fname):
            missing -= _characters(font.fname)
            found.append(font.name)
    return found


def _as_they_are(figure: Figure) -> None:
    """Names are no formulas, and take a font that has their characters."""
    numbers = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_scale() == "log":  # 10^3
                numbers |= {id(t) for t in axis.findobj(Text) if t is not axis.label}
    for text in figure.findobj(Text):
        if id(text) not in numbers:
            text.set_parse_math(False)
        if not text.get_text().isascii():
            text.set_fontfamily(_families(text.get_text(), text.get_fontfamily()))


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A function that draws a figure in `STYLE`, and leaves the settings as they were."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        installed = set(font_manager.get_font_names())
        fonts = [name for name in STYLE["font.sans-serif"] if name in installed] or ["DejaVu Sans"]
        own = STYLE | {"font.family": fonts}  # by name: "sans-serif" means what holds when it is drawn
        before = {name: mpl.rcParams[name] for name in own}
        try:  # not rc_context, which also takes back what a notebook's backend sets with its first figure
            mpl.rcParams.update(own)
            figure = draw(*args, **kwargs)
            _as_they_are(figure)
        finally:
            mpl.rcParams.update(before)
        return figure

    return drawn


def _heatmap(*args, names: Sequence[str], **kwargs) -> plt.Axes:
    """seaborn's, which draws the figure to see which of the names beside it there is room for."""
    fonts = _families("".join(names), mpl.rcParams["font.family"])
    for text in kwargs["ax"].findobj(Text):
        text.set(parse_math=False, fontfamily=fonts)
    with mpl.rc_context({"text.parse_math": False, "font.family": fonts}):
        return sns.heatmap(*args, **kwargs)


def _name(name: object, most: int = 40) -> str:
    """A name that can be drawn: not longer than there is room for, no control character, no half of a character."""
    name = re.sub(r"[\x00-\x09\x0b-\x1f\x7f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(name))
    return name if len(name) <= most else name[: most - 1] + "…"


def _legend(ax: plt.Axes, handles: Sequence[Artist], **more) -> None:
    """A legend of these, by their labels, also of those that begin with "_", which Matplotlib leaves out."""
    legend = ax.legend(handles, [str(i) for i in range(len(handles))], frameon=True, fontsize=9, **more)
    for text, handle in zip(legend.get_texts(), handles, strict=True):
        text.set_text(_name(handle.get_label(), 60))


def _rows(ax: plt.Axes, names: Sequence[str]) -> None:
    """Names of the rows 0, 1, ..., with room for each, also where there is nothing to draw."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(min(ax.get_ylim()[0], -0.5), max(ax.get_ylim()[1], len(names) - 0.5))


def _wilsons(accuracy: np.ndarray, n: np.ndarray) -> np.ndarray:
    """(2, K) Wilson's 95 % interval at these accuracies; NaN for a class without images."""
    return np.array([wilson(round(a * m), m) if m else (np.nan, np.nan) for a, m in zip(accuracy, n, strict=True)]).T


@_figure
def class_accuracies(
    groups: Mapping[str, Outcomes | Sequence[Outcomes]], attack: str | None = None, order_by: str | None = None
) -> Figure:
    """One panel per group, classes sorted by the robust accuracy of the group `order_by` (the first): clean and robust.

    A point is the mean over runs; the worst class in the title is that of `stats.summary`, the mean over runs of each
    one's worst. The bar is Wilson's 95 % interval for the test images of the class, at that mean: it
    says how far another test set could move the point. A class without images has a name and no point.
    """
    groups = {k: _listed(v) for k, v in groups.items()}
    first = groups[order_by or next(iter(groups))]
    attack = attack or last_attack(first[0])
    order = np.argsort(np.mean([accuracies(o, attack) for o in first], 0))
    names = [_name(first[0].class_names[i]) for i in order]
    tall = max(3.2, 0.32 * len(names))
    fig, axes = plt.subplots(
        1, len(groups), figsize=(1 + 4 * len(groups), tall), sharex=True, sharey=True, squeeze=False
    )
    rows = np.arange(len(order))
    for ax, (label, several) in zip(axes[0], groups.items(), strict=True):
        robust = np.mean([accuracies(o, attack) for o in several], 0)[order]
        clean = np.mean([accuracies(o, "clean") for o in several], 0)[order]
        table = class_table(several[0], attack).iloc[order]
        low, high = _wilsons(robust, table["n"])
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
        ax.axvline(np.nanmean(robust), color=ROBUST, lw=1, ls=":", zorder=0)
        ax.axvline(np.nanmean(clean), color="#8494a4", lw=1, ls=":", zorder=0)
        worst, mean = int(np.nanargmin(robust)), 100 * np.nanmean(robust)
        title = f"{_name(label)}: mean {mean:.0f} % under attack"
        if len(several) > 1:
            least = 100 * np.mean([np.nanmin(accuracies(o, attack)) for o in several])
            title = f"{_name(label)}\nmean {mean:.0f} %, worst class {least:.0f} % under attack"
        else:  # at its point
            room = low[worst] > 0.16  # beside the bar, or else beyond the clean point
            ax.annotate(
                f"{100 * robust[worst]:.0f} %",
                (low[worst] if room else max(high[worst], clean[worst]), rows[worst]),
                xytext=(-6 if room else 8, 0),
                textcoords="offset points",
                va="center",
                ha="right" if room else "left",
                color=ROBUST,
                fontweight="bold",
            )
        ax.set_title(title, fontsize=11, loc="left")
        ax.set(xlabel="accuracy", xlim=(0, 1.02))
        ax.grid(axis="y", visible=False)
    _rows(axes[0, 0], names)
    axes[0, 0].set_ylabel("class")
    axes[0, -1].legend(loc="best", frameon=True, fontsize=9)
    return fig


@_figure
def life_of_p(p: pd.DataFrame, top: int = 3) -> Figure:
    """CFOL's distribution over training (rows: epoch, columns: class), the `top` most drawn classes in colour; below it
    exp(entropy), the number of classes from which is drawn in effect."""
    p = p.dropna(axis=1, how="all")
    fig, (ax, below) = plt.subplots(2, sharex=True, figsize=(7, 4.8), height_ratios=(3, 1))
    order = p.iloc[-1].sort_values(ascending=False).index
    colours = dict(zip(order[:top], sns.color_palette("rocket", top + 1), strict=False))
    for name in order[::-1]:
        ax.plot(p.index, p[name], color=colours.get(name, "#c9ced6"), lw=2.4 if name in colours else 1.2)
    ends, gap = [], 0.045 * (p.to_numpy().max() - p.to_numpy().min() + 1e-9)
    for name in order[: max(top, 1)]:  # labels beside the lines, pushed apart where they would touch
        ends.append(min(p[name].iloc[-1], ends[-1] - 1.4 * gap) if ends else p[name].iloc[-1])
        ax.annotate(
            _name(name),
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
    ax.set(ylabel="share of draws", xlim=(p.index[0], p.index[-1]))
    below.plot(p.index, np.exp(entropy(p, axis=1)), color="#444444", lw=1.6)
    below.set(xlabel="epoch", ylabel="classes\nin effect")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


@_figure
def lines(table: pd.DataFrame, x: str, y: str, colour: str, panel: str, logarithmic: bool = False) -> Figure:
    """A panel for each value of the column `panel`: `y` over `x`, a line for each value of `colour`.

    A line is the mean over the other rows, its band reaches from the lowest of them to the highest.
    """
    values = list(dict.fromkeys(table[panel]))
    size = (1 + 4.2 * len(values), 3.6)
    fig, axes = plt.subplots(1, len(values), figsize=size, sharex=True, sharey=True, squeeze=False)
    levels = list(dict.fromkeys(table[colour]))
    palette = sns.color_palette("crest" if pd.api.types.is_numeric_dtype(table[colour]) else "deep", len(levels))
    for ax, value in zip(axes[0], values, strict=True):
        of_panel = {"data": table[table[panel] == value], "x": x, "y": y, "hue": colour}
        colours = {"hue_order": levels, "palette": dict(zip(levels, palette, strict=True))}
        sns.lineplot(**of_panel, **colours, errorbar=("pi", 100), marker="o", ms=5, legend=False, ax=ax)
        ax.set_title(_name(value), fontsize=11, loc="left")
    handles = [Line2D([], [], color=c, marker="o", ms=5, mec="w", label=str(v)) for v, c in colours["palette"].items()]
    _legend(axes[0, -1], handles, title=colour)
    if logarithmic:
        axes[0, 0].set_xscale("log")
    elif pd.api.types.is_integer_dtype(table[x]):
        axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


@_figure
def gains(table: pd.DataFrame) -> Figure:
    """What each class gained, in points: rows are classes, with columns before, difference, low and high in [0, 1], as
    of `stats.lift`; the class that was weakest before stands at the bottom."""
    table = table.sort_values("before")
    rows, value = np.arange(len(table)), 100 * table["difference"].to_numpy()
    ends = 100 * np.abs(table[["low", "high"]].sub(table["difference"], axis=0).to_numpy().T)
    fig, ax = plt.subplots(figsize=(7, max(2.6, 0.3 * len(table))))
    ax.barh(rows, value, color=np.where(value < 0, "#c9a227", "#3b7d8c"), height=0.65)
    ax.errorbar(value, rows, xerr=ends, fmt="none", ecolor="#333333", elinewidth=1)
    ax.axvline(0, color="#444444", lw=1)
    said = ["no images" if np.isnan(b) else f"{100 * b:.0f} %" for b in table["before"]]
    _rows(ax, [f"{_name(name)} ({b})" for name, b in zip(table.index, said, strict=True)])
    ax.set(xlabel="accuracy gained, in points", ylabel="class (before)")
    ax.grid(axis="y", visible=False)
    return fig


@_figure
def trade(groups: Mapping[str, Outcomes | Sequence[Outcomes]], *attacks: str, reference: Sequence[str] = ()) -> Figure:
    """Mean against worst class, a panel per attack (the last one if none is named; "clean" for none).

    A large point per group with its 95 % intervals, a small one per run; the line is the Pareto front of the large
    ones: no group is better than one on it in both. reference: groups to compare with, drawn as dark squares. Classes
    without images are left out, and the axes say so.
    """
    groups = {k: _listed(v) for k, v in groups.items()}
    whole = {k: [_with_images(o) for o in v] for k, v in groups.items()}
    some = " with images" * any(len(v[0].class_names) < len(groups[k][0].class_names) for k, v in whole.items())
    groups = whole
    attacks = attacks or (last_attack(next(iter(groups.values()))[0]),)
    size = (8 * len(attacks), max(4.8, 0.36 * len(groups)))
    fig, axes = plt.subplots(1, len(attacks), figsize=size, squeeze=False)
    for ax, attack in zip(axes[0], attacks, strict=True):
        _trade(ax, groups, attack, reference)
        under = "on clean images" if attack == "clean" else f"under {attack}"
        ax.set(xlabel=f"mean accuracy {f'of classes{some} ' * bool(some)}{under}", ylabel=f"worst class{some} {under}")
    return fig


def _with_images(outcomes: Outcomes) -> Outcomes:
    """The same without the classes that have none; predictions of these become other wrong ones."""
    there = np.bincount(outcomes.labels, minlength=len(outcomes.class_names)) > 0
    number = np.where(there, there.cumsum() - 1, -1)
    labels, names = number[outcomes.labels], [n for n, has in zip(outcomes.class_names, there, strict=True) if has]
    other = (labels + 1) % len(names)
    predictions = {k: np.where(there[v], number[v], other) for k, v in outcomes.predictions.items()}
    return Outcomes(labels, predictions, tuple(names))


def _trade(
    ax: plt.Axes, groups: Mapping[str, Outcomes | Sequence[Outcomes]], attack: str, reference: Sequence[str]
) -> None:
    shades = sns.color_palette("husl" if len(groups) > 10 else "deep", len(groups))
    colours = {k: (0.15, 0.15, 0.15) if k in reference else c for k, c in zip(groups, shades, strict=True)}
    ends = []
    for label, several in groups.items():
        table, colour = summary(several, attack), colours[label]
        each = np.array([[a.mean(), a.min()] for a in (accuracies(o, attack) for o in several)])
        m, w = table.loc["mean"], table.loc["worst"]
        ax.plot(*each.T, "o", color=colour, alpha=0.4, ms=4, zorder=2)
        ax.errorbar(
            m.value,
            w.value,
            xerr=[[max(m.value - m.low, 0)], [max(m.high - m.value, 0)]],
            yerr=[[max(w.value - w.low, 0)], [max(w.high - w.value, 0)]],
            fmt="s" if label in reference else "o",
            color=colour,
            ms=9,
            mec="white",
            elinewidth=0.9,
            ecolor=(*colour, 0.35),
            zorder=3,
        )
        ends.append((w.value, m.value, label))
    front = np.array([(x, y) for y, x, _ in sorted(ends) if not any(v > y and u > x for v, u, _ in ends)])
    ax.plot(*front.T, color="#444444", lw=1, ls="--", zorder=1)
    ax.margins(0.08)
    low, high = ax.get_ylim()
    ends = sorted(ends, reverse=True)
    gap = min(0.07, 1 / len(ends)) * (high - low)
    at = [y for y, _, _ in ends]  # labels in a column at the right: pushed apart downwards, then up from the floor
    for i in range(1, len(at)):
        at[i] = min(at[i], at[i - 1] - gap)
    at[-1] = max(at[-1], low + gap / 2)
    for i in reversed(range(len(at) - 1)):
        at[i] = max(at[i], at[i + 1] + gap)
    for (y, x, label), where in zip(ends, at, strict=True):
        ax.annotate(
            _name(label),
            (x, y),
            xytext=(ax.get_xlim()[1], where),
            textcoords="data",
            va="center",
            color=colours[label],
            fontweight="bold",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": (*colours[label], 0.5),
                "lw": 0.8,
                "shrinkB": 5,
                "relpos": (0, 0.5),
            },
        )
    ax.set_ylim(low, high)


@_figure
def radii(table: pd.DataFrame, weakest: str | None = None) -> Figure:
    """Accuracy of each class (columns) by radius (index); `weakest` in colour, the mean dashed."""
    fig, ax = plt.subplots(figsize=(7, 3.8))
    for name in table.columns:
        ax.plot(table.index, table[name], color="#c9ced6", lw=1.2, zorder=1)
    ax.plot(table.index, table.mean(axis=1), color="#444444", ls="--", lw=1.6, label="mean of classes", zorder=2)
    if weakest is not None:
        ax.plot(table.index, table[weakest], "o-", color=ROBUST, lw=2.4, ms=4, label=weakest, zorder=3)
    _legend(ax, ax.lines[table.shape[1] :])
    ax.set(xlabel="radius", ylabel="accuracy under PGD-20", ylim=(0, 1.02), xlim=(0, table.index[-1] or 1))
    return fig


@_figure
def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Row: true class, column: what it is taken for, in per cent of the row; the diagonal is left out."""
    names = [_name(name, 25) for name in names]
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(3.6, 0.42 * len(names)), 24)
    fig, ax = plt.subplots(figsize=(side + 1.4, side))
    _heatmap(
        pd.DataFrame(share, names, names),
        names=names,
        mask=np.eye(len(names), dtype=bool),
        cmap="rocket_r",
        vmin=0,
        annot=len(names) <= 12,
        fmt=".0f",
        cbar_kws={"label": "% of the class"},
        ax=ax,
    )
    ax.set(xlabel="prediction under attack", ylabel="class")
    return fig


@_figure
def gallery(x, x_adv, names: Sequence[str], predicted: Sequence[str], radius: np.ndarray) -> Figure:
    """Rows: clean image, perturbation (scaled to its largest), adversarial image; columns: images (NCHW in [0, 1])."""
    x, x_adv = np.asarray(x), np.asarray(x_adv)
    n = max(len(x), 1)
    fig, axes = plt.subplots(3, n, figsize=(1.5 * n + 1, 5.2), squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
    d = x_adv - x
    size = np.abs(d).max() if len(x) else 1.0
    for j in range(len(x)):
        for ax, image in zip(axes[:, j], (x[j], d[j] / (2 * max(size, 1e-12)) + 0.5, x_adv[j]), strict=True):
            shown = image if len(image) == 3 else image[:1]
            ax.imshow(
                np.squeeze(shown.transpose(1, 2, 0).clip(0, 1), 2 if len(shown) == 1 else ()),
                cmap="gray",
                vmin=0,
                vmax=1,
            )
        axes[0, j].set_title(_name(names[j], 20), fontsize=10)
        axes[2, j].set_xlabel(f"{_name(predicted[j], 20)}\nfell at {radius[j]:.3g}", fontsize=10, color=ROBUST)
    for ax, label in zip(axes[:, 0], ("clean", "perturbation", "adversarial"), strict=True):
        ax.set_ylabel(label, fontsize=10)
    return fig


@_figure
def images(x, names: Sequence[str], predicted: Sequence[str]) -> Figure:
    """Images (NCHW in [0, 1]) in a row, their class above and what they are taken for below."""
    x = np.asarray(x)
    fig, axes = plt.subplots(1, len(x), figsize=(1.5 * len(x) + 1, 2.2), squeeze=False)
    for ax, image, name, other in zip(axes[0], x, names, predicted, strict=True):
        shown = image if len(image) == 3 else image[:1]
        shown = shown.transpose(1, 2, 0)
        ax.imshow(shown if shown.shape[2] == 3 else shown[..., 0], cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.set_title(_name(name, 20), fontsize=10)
        ax.set_xlabel(_name(other, 20), fontsize=10, color=ROBUST)
    return fig


@_figure
def deviations(groups: Mapping[str, Outcomes | Sequence[Outcomes]], attack: str | None = None) -> Figure:
    """One panel per group: how far each class lies from the mean (Benz et al. 2021), averaged over runs.

    Classes stand in the order of the last group, its weakest at the bottom; the bar is Wilson's 95 % interval for the
    test images of the class. The weakest class of each panel is in colour, and the title gives the worst deviation and
    the gap between best and worst class, in points.
    """
    groups = {k: _listed(v) for k, v in groups.items()}
    seen = {k: np.mean([accuracies(o, attack) for o in v], 0) for k, v in groups.items()}
    order = np.argsort(list(seen.values())[-1])
    several = next(iter(groups.values()))
    names, n = [_name(several[0].class_names[i]) for i in order], class_table(several[0], attack)["n"].to_numpy()[order]
    fig, axes = plt.subplots(
        1,
        len(groups),
        figsize=(1 + 3.1 * len(groups), max(3.2, 0.3 * len(names))),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    rows = np.arange(len(order))
    for ax, (label, accuracy) in zip(axes[0], seen.items(), strict=True):
        accuracy = accuracy[order]
        mean, worst = np.nanmean(accuracy), np.nanargmin(accuracy)
        low, high = _wilsons(accuracy, n)
        colours = [ROBUST if i == worst else "#8494a4" for i in rows]
        ax.barh(rows, 100 * (accuracy - mean), color=colours, height=0.65)
        bars = 100 * np.abs([np.minimum(low - accuracy, 0), np.maximum(high - accuracy, 0)])
        ax.errorbar(100 * (accuracy - mean), rows, xerr=bars, fmt="none", ecolor="#333333", elinewidth=1)
        ax.axvline(0, color="#444444", lw=1)
        gap = 100 * (np.nanmax(accuracy) - np.nanmin(accuracy))
        ax.set_title(
            f"{_name(label)}, mean {100 * mean:.0f} %\n"
            f"worst {100 * (accuracy[worst] - mean):+.0f}, gap {gap:.0f} points",
            fontsize=10,
            loc="left",
        )
        ax.grid(axis="y", visible=False)
    _rows(axes[0, 0], names)
    axes[0, 0].set_ylabel("class")
    fig.supxlabel("accuracy of the class minus the mean, in points", fontsize=11)
    return fig


@_figure
def cosine_matrix(pairs: pd.DataFrame) -> Figure:
    """`stats.cosines` as a matrix; in brackets what a permutation of the classes exceeds more than once in twenty."""
    if pairs.empty:
        raise ValueError("a matrix of cosines needs at least two groups")
    names = list(dict.fromkeys([*pairs["a"], *pairs["b"]]))
    where = {name: i for i, name in enumerate(names)}
    value, text = np.full((len(names),) * 2, np.nan), np.full((len(names),) * 2, "", dtype=object)
    for p in pairs.itertuples():
        value[where[p.b], where[p.a]] = p.cosine
        shown = f"{p.cosine:.2f}" if p.p <= 0.05 else f"({p.cosine:.2f})"
        text[where[p.b], where[p.a]] = f"{shown}\n{p.low:.2f} … {p.high:.2f}"
    side = 1.4 * (len(names) - 1)
    fig, ax = plt.subplots(figsize=(side + 3, 0.65 * side + 1))
    _heatmap(
        value[1:, :-1],
        names=names,
        annot=text[1:, :-1],
        fmt="",
        vmin=-1,
        vmax=1,
        cmap="vlag",
        xticklabels=[textwrap.fill(_name(n), 14) for n in names[:-1]],
        yticklabels=[_name(n) for n in names[1:]],
        annot_kws={"fontsize": 9},
        cbar_kws={"label": "cosine of deviations"},
        ax=ax,
    )
    ax.tick_params(axis="y", rotation=0)
    ax.grid(False)
    return fig


@_figure
def curves(accuracy: pd.DataFrame) -> Figure:
    """Class accuracies (columns) by epoch (index): the class that is weakest at the end in colour, the mean dashed, and
    the worst class of each epoch as a line of points."""
    fig, ax = plt.subplots(figsize=(7, 3.8))
    last, worst = accuracy.iloc[-1].idxmin(), accuracy.min(axis=1)
    for name in accuracy.columns:
        ax.plot(accuracy.index, accuracy[name], color="#d3d8de", lw=1, zorder=1)
    ax.plot(accuracy.index, accuracy[last], color=ROBUST, lw=2, label=f"{_name(last)}, weakest at the end", zorder=3)
    ax.plot(accuracy.index, worst, ".", color="#262626", ms=5, label="worst class of the epoch", zorder=4)
    ax.plot(accuracy.index, accuracy.mean(axis=1), color="#444444", ls="--", lw=1.6, label="mean of classes", zorder=2)
    ax.set(xlabel="epoch", ylabel="accuracy, held out", ylim=(0, 1.02), xlim=(accuracy.index[0], accuracy.index[-1]))
    _legend(ax, ax.lines[accuracy.shape[1] :])
    return fig


@_figure
def rates(measured: pd.DataFrame, bound: pd.DataFrame | None = None) -> Figure:
    """Columns over the index, both logarithmic; measured as lines, bounds of the same columns dashed. The names of the
    axes are those of index and columns of `measured`: `rename_axis(index=..., columns=...)`."""
    (fig, ax), lines = plt.subplots(figsize=(7, 4)), []
    for colour, name in zip(sns.color_palette("deep", measured.shape[1]), measured, strict=True):
        lines += ax.plot(measured.index, measured[name].where(measured[name] > 0), "o-", color=colour, ms=4, label=name)
        if bound is not None:
            ax.plot(bound.index, bound[name], "--", color=colour, lw=1.2)
    if bound is not None:
        lines += ax.plot([], "--", color="0.4", lw=1.2, label="bounds")
    ax.set(xscale="log", yscale="log", xlabel=measured.index.name, ylabel=measured.columns.name)
    _legend(ax, lines)
    return fig


@_figure
def explanations(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Small multiples, three a row: in each, what may explain (first column) against what is to be explained (second).

    A point is a row of the table, named by the index if there are at most twelve; the title gives Spearman's rank
    correlation.
    """
    rows = -(-len(panels) // 3)
    fig, axes = plt.subplots(rows, min(3, len(panels)), figsize=(10.5, 3.3 * rows), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, (label, table) in zip(axes.flat, panels.items(), strict=False):
        x, y = table.columns[:2]
        table = table[table[x].notna() & table[y].notna()]
        ax.plot(table[x], table[y], "o", color="#8494a4", ms=5, alpha=0.8)
        if 0 < len(table) <= 12:
            column = (20 * (table[x] - table[x].min()) / np.ptp(table[x])).round().fillna(0)
            order = np.lexsort([table[y], column])
            for i, (name, row) in enumerate(table.iloc[order].iterrows()):  # neighbours on different sides
                where = {"xytext": (4, 3)} if i % 2 else {"xytext": (-4, -3), "ha": "right", "va": "top"}
                ax.annotate(_name(name), (row[x], row[y]), textcoords="offset points", fontsize=9, **where)
        ax.set(xlabel=x, ylabel=y)
        rank = table[x].corr(table[y], method="spearman")
        ax.set_title(f"{_name(label)}\nrank correlation {rank:+.2f}", fontsize=10, loc="left")
        ax.margins(0.12)
    return fig


@_figure
def coverage(held: pd.DataFrame, width: pd.DataFrame) -> Figure:
    """How often simulated 95 % intervals hold the truth, and how wide those of the worst class are; per cent, rows are
    cases, columns statistics: plain, "paired ..." and, of a plain bootstrap, "bootstrap ..."."""
    rows, kinds = np.arange(len(held)), {"bootstrap ": ROBUST, "paired ": "#8ab4d8", "": "#1f5f99"}
    label = {"bootstrap ": "plain bootstrap", "paired ": "these, of a difference", "": "these"}
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 1.2 + 0.26 * len(held)), sharey=True, width_ratios=[3, 2])
    for kind, colour in kinds.items():
        for name in ("mean", "tail", "worst", "gap", "deviation", "std"):
            shown = {"color": colour, "ms": 5, "label": label[kind] if name == "mean" else None}
            left.plot(held[f"{kind}{name}"], rows, "x" if kind == "bootstrap " else "o", **shown)
        right.plot(width[f"{kind}worst"], rows, "x" if kind == "bootstrap " else "o", color=colour, ms=5)
    left.axvline(95, color="0.4", ls="--", lw=1)
    left.set(xlabel="held, per cent (all statistics)", yticks=rows, yticklabels=held.index)
    right.set(xlabel="width, points (worst class)", xlim=(0, None))
    left.invert_yaxis()
    fig.legend(loc="outside upper center", ncols=3, frameon=False)
    return fig

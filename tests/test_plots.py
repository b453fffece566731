"""Every figure, with names of all kinds, with classes that have no images, and without a trace in the settings."""

import subprocess
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager
from matplotlib.font_manager import get_font
from matplotlib.text import Text

from cfol_nb import plots, stats
from cfol_nb.evaluate import Outcomes

mpl.use("Agg")
ODD = ("$x$", "_hidden", "a_b^c", r"\alpha $5", "100 % {braces}", "two\nlines")


def outcomes(names, seed, empty=False) -> Outcomes:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(names) - empty), 20)
    robust = np.where(rng.random(len(labels)) < 0.6, labels, (labels + 1) % len(names))
    return Outcomes(labels, {"clean": labels, "pgd": robust}, tuple(names))


def figures(names, empty=False) -> dict:
    """One call of every public function of `plots`; the names are of classes, and of groups where there are such."""
    rng, k = np.random.default_rng(0), len(names)
    groups = {n: [outcomes(names, 2 * i, empty), outcomes(names, 2 * i + 1, empty)] for i, n in enumerate(names[:2])}
    table = pd.DataFrame(rng.random((5, k)), pd.RangeIndex(1, 6), list(names))
    gained = pd.DataFrame({"before": rng.random(k), "difference": 0.1, "low": -0.1, "high": 0.2}, list(names))
    points = pd.DataFrame({"u": rng.random(k), "v": rng.random(k)}, list(names))
    if empty:
        table.iloc[:, -1], gained.iloc[-1], points.iloc[-1] = np.nan, np.nan, np.nan
    long = table.rename_axis("x").reset_index().melt("x", var_name="of", value_name="y").assign(panel=names[0])
    kinds = [f"{kind}{of}" for kind in ("", "paired ", "bootstrap ") for of in stats.STATISTICS]
    simulated = pd.DataFrame(rng.random((k, len(kinds))), list(names), kinds)
    x = rng.random((k, 3, 8, 8))
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    cosines = pd.DataFrame(pairs, columns=["a", "b"]).assign(cosine=0.5, low=0.1, high=0.9, p=0.01)
    return {
        "class_accuracies": lambda: plots.class_accuracies(groups),
        "life_of_p": lambda: plots.life_of_p(table),
        "lines": lambda: plots.lines(long, "x", "y", "of", "panel"),
        "gains": lambda: plots.gains(gained),
        "trade": lambda: plots.trade(groups, "clean", "pgd"),
        "radii": lambda: plots.radii(table, names[1]),
        "confusion": lambda: plots.confusion(np.ones((k, k)) * (1 - np.eye(k)[-1] * empty)[:, None], names),
        "gallery": lambda: plots.gallery(x, x, names, names, np.full(k, 0.1)),
        "images": lambda: plots.images(x, names, names),
        "deviations": lambda: plots.deviations(groups),
        "cosine_matrix": lambda: plots.cosine_matrix(cosines),
        "curves": lambda: plots.curves(table),
        "rates": lambda: plots.rates(table.rename_axis(index="n", columns="rate"), table),
        "explanations": lambda: plots.explanations({names[0]: points}),
        "coverage": lambda: plots.coverage(simulated, simulated),
    }


NAMES = list(figures(ODD))
SHOWS = {"life_of_p": 3, "curves": 1, "radii": 1, "trade": 2}  # so many of the names, at least; else all


def shown(figure) -> list[Text]:
    figure.canvas.draw()
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]


def test_every_public_function_is_here():
    assert {n for n, f in vars(plots).items() if hasattr(f, "__wrapped__") and f.__module__ == plots.__name__} - {
        "_characters"
    } == set(NAMES)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_drawn_as_they_are(name, empty, monkeypatch):
    """Texts that hold a name reach the renderer whole and not as mathtext; no warning, no trace in the settings."""
    drawn, plain = [], mpl.backends.backend_agg.RendererAgg.draw_text

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        drawn.append((s, ismath))
        return plain(self, gc, x, y, s, prop, angle, ismath=ismath, mtext=mtext)

    monkeypatch.setattr(mpl.backends.backend_agg.RendererAgg, "draw_text", draw_text)
    with mpl.rc_context({"lines.linewidth": 7.5, "text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = dict(mpl.rcParams)
        figure = figures(ODD, empty)[name]()
        assert dict(mpl.rcParams) == before
        figure.canvas.draw()
    plots.plt.close(figure)
    lines = [line for odd in ODD for line in odd.split("\n")]
    of_names = [(s, ismath) for s, ismath in drawn if any(line in s for line in lines)]
    assert not any(ismath for _, ismath in of_names)
    seen = {odd for odd in ODD if all(any(line in s for s, _ in of_names) for line in odd.split("\n"))}
    assert len(seen) >= (2 if name in ("trade",) else SHOWS.get(name, len(ODD) - (empty and name != "gallery")))
    if name in ("rates", "lines"):
        assert "_hidden" in {t.get_text() for t in figure.axes[-1].get_legend().get_texts()}
    if name == "rates":  # powers of ten are mathtext
        assert any("10^" in s and ismath for s, ismath in drawn)


def test_importing_leaves_the_settings_alone():
    code = (
        "import matplotlib as mpl, matplotlib.pyplot, seaborn; mpl.rcParams['lines.linewidth'] = 7.5;"
        "before, colours = dict(mpl.rcParams), mpl.colors.to_rgb('b'); import cfol_nb.plots;"
        "assert dict(mpl.rcParams) == before and mpl.colors.to_rgb('b') == colours"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_what_a_notebooks_backend_sets_with_its_first_figure_stays(monkeypatch):
    """Taken back, JupyterLab would show the first figure alone."""
    table, original = pd.DataFrame({"a": [0.1, 0.2], "b": [0.3, 0.4]}, [1, 2]), plots.plt.subplots

    def subplots(*args, **kwargs):
        mpl.rcParams["interactive"] = True
        return original(*args, **kwargs)

    monkeypatch.setattr(plots.plt, "subplots", subplots)
    with mpl.rc_context({"interactive": False}):
        plots.plt.close(plots.curves(table))
        assert mpl.is_interactive()


def test_a_name_takes_the_font_that_has_it():
    """Of what is installed: a character that the usual font lacks, and another font of Matplotlib's own has."""
    usual, other = (get_font(font_manager.findfont(f)).get_charmap() for f in ("DejaVu Sans", "STIXGeneral"))
    lacking = [chr(c) for c in sorted(set(other) - set(usual)) if chr(c).isalpha()]
    name = "cat " + lacking[0]
    figure = plots.confusion(np.ones((2, 2)), [name, "γάτα"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib warns of a glyph that is missing
        texts = {t.get_text(): t.get_fontfamily() for t in shown(figure)}
    assert ord(lacking[0]) in set().union(*(get_font(font_manager.findfont(f)).get_charmap() for f in texts[name]))
    plots.plt.close(figure)


@pytest.mark.parametrize("odd", ["", "x" * 500, "\udcff\x00 half", "🐈 кот كلب ねこ"])
@pytest.mark.filterwarnings("ignore:Glyph")  # where no font is
@pytest.mark.parametrize("name", ["class_accuracies", "confusion", "radii", "gallery"])
def test_no_name_stops_a_figure(name, odd):
    figure = figures((odd, odd + "b", "c"))[name]()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "constrained_layout not applied")
        shown(figure)
    plots.plt.close(figure)

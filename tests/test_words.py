"""Sentences say what their tables hold, and nothing else."""

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cfol_nb import headless, words
from cfol_nb.config import RunConfig


def table(**rows):
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"]).assign(of="any run")


def test_a_difference_is_said_if_its_interval_lies_on_one_side_of_0():
    tables = {
        "A": table(mean=(-0.03, -0.05, -0.01), worst=(0.2, 0.1, 0.3)),
        "B": table(mean=(0.0, -0.02, 0.02), worst=(0.1, 0.0, 0.2)),
        "C": table(mean=(-0.01, -0.02, -0.001), worst=(0.15, 0.01, 0.4)),
    }
    said = words.differences(tables, "ERM")
    assert said.splitlines() == [
        "Against ERM, in points [95 % interval]:",
        "- mean (any run): is lowered by A -3.0 [-5.0, -1.0], C -1.0 [-2.0, -0.1]; "
        "no difference is shown for B +0.0 [-2.0, +2.0]",
        "- worst (any run): is raised by A +20.0 [+10.0, +30.0], C +15.0 [+1.0, +40.0]; "
        "no difference is shown for B +10.0 [+0.0, +20.0]",
    ]


def test_classes_that_gain_and_lose_are_named_and_no_others():
    tests = {
        "A": pd.DataFrame({"class": list("xyz"), "difference": [0.2, -0.1, 0.5], "p_holm": [0.01, 0.05, 0.06]}),
        "B": pd.DataFrame({"class": list("xyz"), "difference": [0.2, -0.1, 0.5], "p_holm": [1.0, 1.0, 0.051]}),
    }
    assert words.classes(tests, "ERM").splitlines()[1:] == [
        "- A gains on x (+20); loses on y (-10)",
        "- B is not shown to change any class",
    ]


def test_small_p_values_are_no_zeros():
    shown = words.p_values(pd.DataFrame({"n": [1, 2, 3], "p": [0.0004999, 0.0005, 0.25]}))
    assert shown["p"].tolist() == ["< 0.001", "0.001", "0.250"]
    assert shown["n"].tolist() == [1, 2, 3]


def test_methods_have_names_of_their_own():
    of = [RunConfig(method=m, objective=o) for m, o in (("erm", "at"), ({"name": "cfol", "drift": 8.0}, "trades"))]
    assert words.labels(of) == ["ERM-AT", "CFOL-TRADES drift=8.0"]
    with pytest.raises(ValueError, match="ERM-AT is there twice"):
        words.labels([of[0], of[0]])
    with pytest.raises(ValueError, match="two or more"):
        words.labels(of[:1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_quickstart_says_what_its_tables_hold_with_other_methods_and_data(tmp_path, monkeypatch):
    """A data set of two classes that differ clearly, one epoch, three methods: every number of the sentences is in the
    tables, a sign in a sentence is that of its interval, and warnings are said."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 30), ("test", 12)):
        for k, name in enumerate(("dark", "light", "grey")):
            (folder := tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.clip(rng.normal((40, 210, 120)[k], 20, (8, 8, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    given = {
        "dataset": f"imagefolder:{tmp_path / 'photos'}",
        "methods": ["erm", "cfol", {"name": "fat-ma", "alpha": 0.2}],
        "seeds": 2,
        "settings": {"model": {"name": "mlp", "width": 8}, "epochs": 1, "batch_size": 16, "device": "cpu"},
    }
    out = headless.run(headless.find("00"), tmp_path / "out.ipynb", given)
    text = "\n".join(o.get("text", "") for c in nbformat.read(out, 4).cells for o in c.get("outputs", []))
    said = text[text.index("Against ERM-AT") :].splitlines()
    assert all(any(label in line for line in said) for label in ("CFOL-AT", "FAT-MA-AT alpha=0.2"))
    for line in said:
        for verb, ok in (
            ("is raised by", lambda low, high: low >= 0),
            ("is lowered by", lambda low, high: high <= 0),
            ("no difference is shown for", lambda low, high: low <= 0 <= high),
        ):
            part = line.partition(verb)[2].split(";")[0]
            ends = [tuple(map(float, x.split("]")[0].split(","))) for x in part.split("[")[1:]]
            assert all(ok(*each) for each in ends), line
    assert "Warnings about" in text  # one epoch does not learn
    assert "of 6 runs" in text

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binom, norm

from cfol_nb import plots, stats
from cfol_nb.evaluate import Outcomes, evaluate


def outcomes(labels, right, k=None, wrong_to=1):
    """Outcomes with one attack, right where `right`, else the next class."""
    labels, right = np.asarray(labels), np.asarray(right, bool)
    k = k or labels.max() + 1
    return Outcomes(
        labels,
        {"clean": labels, "pgd": np.where(right, labels, (labels + wrong_to) % k)},
        tuple(f"c{i}" for i in range(k)),
        {"pgd": {}},
    )


def random_outcomes(seed, accuracy=(0.2, 0.9, 0.5, 0.7), n=50):
    rng, labels = np.random.default_rng(seed), np.repeat(np.arange(len(accuracy)), n)
    return outcomes(labels, rng.random(len(labels)) < np.array(accuracy)[labels])


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (60, 60), (93, 100), (1, 1000)])
def test_wilson_is_its_formula(k, n):
    z, p = 1.959963984540054, k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    want = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert stats.wilson(k, n) == pytest.approx(want, abs=1e-12)


def test_class_table_counts_and_knows_absent_classes():
    table = stats.class_table(outcomes([0, 0, 0, 1, 1], [1, 0, 1, 1, 1], k=3))
    assert list(table.columns) == ["class", "n", "correct", "accuracy", "low", "high", "weakest", "may_be_weakest"]
    assert table["n"].tolist() == [3, 2, 0]
    assert table["correct"].tolist() == [2, 2, 0]
    assert table["accuracy"][0] == 2 / 3
    assert table.loc[2, ["accuracy", "low", "high"]].isna().all()
    assert (stats.class_table(outcomes([0, 1], [0, 0]), "clean")["accuracy"] == 1).all()


def test_agrees_with_torchmetrics_and_scikit_learn():
    torchmetrics = pytest.importorskip("torchmetrics.functional")
    from sklearn.metrics import confusion_matrix, recall_score

    o = random_outcomes(3)
    y, predicted = torch.from_numpy(o.labels), torch.from_numpy(o.predictions["pgd"])
    theirs = torchmetrics.classification.multiclass_accuracy(predicted, y, 4, average=None)
    np.testing.assert_allclose(stats.accuracies(o), theirs, rtol=1e-6)
    np.testing.assert_array_equal(stats.confusion(o), confusion_matrix(o.labels, o.predictions["pgd"]))
    np.testing.assert_allclose(stats.accuracies(o), recall_score(o.labels, o.predictions["pgd"], average=None))


def test_statistics_of_known_accuracies():
    a = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.6, 0.4, 1.0])
    assert stats.tail(a) == pytest.approx(0.15)
    assert stats.tail(a, 0.05) == pytest.approx(0.1)
    assert {k: float(f(a)) for k, f in stats.STATISTICS.items()} == pytest.approx(
        {"mean": 0.55, "tail": 0.15, "worst": 0.1, "gap": 0.9, "std": math.sqrt(0.0825), "deviation": -0.45}
    )
    assert stats.deviation(a).sum() == pytest.approx(0)
    b = np.random.default_rng(0).random(10)
    assert stats.deviation_cosine(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert math.isnan(stats.deviation_cosine(a, np.full(10, 0.3)))


def test_both_readings_of_worst():
    """Two runs with different weakest classes: the mean of the minima is below the minimum of the means."""
    labels = np.repeat([0, 1], 10)
    a = outcomes(labels, [1] * 2 + [0] * 8 + [1] * 10)
    b = outcomes(labels, [1] * 10 + [1] * 4 + [0] * 6)
    table = stats.summary([a, b])
    assert table.loc["worst", "value"] == pytest.approx((0.2 + 0.4) / 2)
    assert table.loc["worst_of_mean", "value"] == pytest.approx(min(0.6, 0.7))
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_no_success_at_all_is_not_certainty():
    row = stats.summary(outcomes(np.repeat([0, 1], 50), [0] * 50 + [1] * 50)).loc["worst"]
    assert row["value"] == row["low"] == 0
    assert row["high"] == pytest.approx(1 - 0.025 ** (1 / 50), abs=1e-4)  # Clopper and Pearson's


def test_an_interval_says_what_it_is_of():
    runs = [random_outcomes(s) for s in range(3)]
    assert (stats.summary(runs[0])["of"] == "these runs").all()
    assert (stats.summary(runs[:2])["of"] == "these runs").all()
    default, any_run, these = (
        stats.summary(runs),
        stats.summary(runs, of="any run"),
        stats.summary(runs, of="these runs"),
    )
    pd.testing.assert_frame_equal(default, any_run)
    assert default.loc["worst", "of"] == "any run"
    assert default.loc["worst_of_mean", "of"] == "these runs"
    width = {k: table["high"] - table["low"] for k, table in (("any", any_run), ("these", these))}
    assert width["any"]["mean"] > width["these"]["mean"]
    for of, given in (("any run", runs[:1]), ("all", runs)):
        with pytest.raises(ValueError, match=f"of='{of}'"):
            stats.summary(given, of=of)


def test_a_run_does_not_differ_from_itself_and_like_answers_are_no_certainty():
    run = random_outcomes(0)
    same = stats.summary(run, versus=run)
    assert (same[["value", "low", "high"]] == 0).all(axis=None)
    twin = outcomes(run.labels, run.correct("pgd"))
    got = stats.summary(twin, versus=run)
    assert (got["value"] == 0).all()
    assert (got["low"] < 0).all()
    assert (got["high"] > 0).all()


def test_paired_difference_is_narrower_than_the_two_sides():
    base = random_outcomes(1, (0.5, 0.6, 0.7), 200)
    better = outcomes(base.labels, base.correct("pgd") | (np.random.default_rng(9).random(600) < 0.1))
    table = stats.summary(better, versus=base)
    alone = stats.summary(better)
    assert table.loc["mean", "value"] == pytest.approx(
        alone.loc["mean", "value"] - stats.summary(base).loc["mean", "value"]
    )
    assert table.loc["mean", "low"] > 0
    width = table["high"] - table["low"]
    assert width["mean"] < 0.6 * (alone.loc["mean", "high"] - alone.loc["mean", "low"])


def test_mcnemar_and_holm_are_brute_force():
    a, b = random_outcomes(1), random_outcomes(2)
    table = stats.paired(a, b)
    for c, row in table.iterrows():
        here = a.labels == c
        i = int((a.correct("pgd") & ~b.correct("pgd") & here).sum())
        j = int((b.correct("pgd") & ~a.correct("pgd") & here).sum())
        assert (row["only_a"], row["only_b"], row["n"]) == (i, j, 50)
        p = sum(
            binom.pmf(m, i + j, 0.5)
            for m in range(i + j + 1)
            if binom.pmf(m, i + j, 0.5) <= binom.pmf(i, i + j, 0.5) * (1 + 1e-9)
        )
        assert row["p"] == pytest.approx(min(p, 1))
        assert row["difference"] == pytest.approx((i - j) / 50)
    p = table["p"].to_numpy()
    ranked = sorted(range(4), key=lambda i: p[i])
    holm, top = {}, 0.0
    for place, i in enumerate(ranked):
        top = max(top, min(1.0, p[i] * (4 - place)))
        holm[i] = top
    assert table["p_holm"].tolist() == pytest.approx([holm[i] for i in range(4)])


def test_permuting_class_labels_permutes_every_class_wise_number(linear):
    model, g = linear(16, 4), torch.Generator().manual_seed(0)
    x, y = torch.rand(80, 1, 4, 4, generator=g, dtype=torch.float64), torch.randint(0, 4, (80,), generator=g)
    order = torch.tensor([2, 0, 3, 1])  # class c is called order[c]
    other = linear(16, 4)
    with torch.no_grad():
        other.weight[order], other.bias[order] = model.weight.clone(), model.bias.clone()
    attack = {"pgd": {"eps": 0.1, "step": 0.03, "steps": 4}}
    a, b = evaluate(model, x, y, attack), evaluate(other, x, order[y], attack)
    first, second = stats.class_table(a), stats.class_table(b)
    assert 0 < first["correct"].sum() < 80
    for column in ("n", "correct", "accuracy", "low", "high"):
        np.testing.assert_array_equal(second[column].to_numpy()[order], first[column].to_numpy())
    np.testing.assert_array_equal(stats.confusion(b)[np.ix_(order, order)], stats.confusion(a))


def test_headline_and_weakest():
    groups = {"A": [random_outcomes(0), random_outcomes(1)], "B": random_outcomes(2)}
    table = stats.headline(groups)
    assert list(table.index) == ["A", "B"]
    assert list(table.columns) == [f"{a} {b}" for a in ("clean", "robust") for b in ("mean", "tail", "worst")]
    assert table.loc["A", "robust mean"].startswith(f"{100 * stats.summary(groups['A']).loc['mean', 'value']:.1f} [")
    assert stats.weakest(groups["A"]) == "c0"
    value, low, high = stats.summary(groups["A"][0], versus=groups["B"]).loc["worst", ["value", "low", "high"]] * 100
    gained = stats.stated({"A": groups["A"][0], "B": groups["B"]}, ["worst"], versus=groups["B"])["worst"]
    assert list(gained) == [f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", "+0.0 [+0.0, +0.0]"]


def test_runs_on_other_images_are_not_compared():
    a, b = random_outcomes(0), random_outcomes(0, n=40)
    for call in (lambda: stats.paired(a, b), lambda: stats.summary([a, b])):
        with pytest.raises(ValueError, match="not of the same images"):
            call()
    with pytest.raises(KeyError, match="no attack 'aa'"):
        stats.class_table(a, "aa")


def test_a_class_without_images_is_named_and_never_the_weakest():
    o = outcomes([0, 0, 0, 2, 2], [1, 0, 1, 1, 1], k=3)
    assert stats.weakest(o) == "c0"
    with pytest.raises(ValueError, match="'c1' has no test images"):
        stats.summary(o)


def test_the_last_attack_is_the_last_that_was_given_also_after_storing(linear, tmp_path):
    from cfol_nb.files import read_tensors, write_tensors

    x, y = torch.rand(20, 1, 4, 4, dtype=torch.float64), torch.arange(20) % 4
    given = {
        "weak": {"eps": 0.01, "step": 0.01, "steps": 1},
        "aa": {"eps": 0.3, "step": 0.1, "steps": 5},
        "b": {"eps": 0.1, "step": 0.1, "steps": 1},
    }
    o = evaluate(linear(16, 4), x, y, given)
    write_tensors(tmp_path / "o", o.tensors(), o.meta())
    again = Outcomes.from_tensors(*read_tensors(tmp_path / "o"))
    assert stats.last_attack(again) == stats.last_attack(o) == "b"
    assert list(again.attacks) == ["weak", "aa", "b"]
    with pytest.raises(ValueError, match="3 class names, but the model has 4 outputs"):
        evaluate(linear(16, 4), x, y, given, class_names=("a", "b", "c"))


def test_figures_show_the_numbers():
    groups = {"A": [random_outcomes(0), random_outcomes(1)], "B": [random_outcomes(2), random_outcomes(3)]}
    fig = plots.class_accuracies(groups)
    mean = np.mean([stats.accuracies(o) for o in groups["A"]], 0)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [f"c{i}" for i in np.argsort(mean)]
    shown = [line.get_xdata() for line in fig.axes[0].lines if len(line.get_xdata()) == 4]
    assert any(np.allclose(x, np.sort(mean)) for x in shown)
    worst = 100 * stats.summary(groups["A"]).loc["worst", "value"]
    assert f"worst class {worst:.0f} % under attack" in fig.axes[0].get_title("left")  # figure and table say the same
    p = pd.DataFrame([[0.25] * 4, [0.1, 0.2, 0.3, 0.4]], columns=list("abcd"), index=[1, 2])
    named = [t.get_text() for t in plots.life_of_p(p).axes[0].texts]
    assert named[:3] == ["d", "c", "b"]
    ax = plots.trade(groups).axes[0]
    assert sorted(t.get_text() for t in ax.texts) == ["A", "B"]


# -- relations between classes, and between class accuracies -----------------------------------------------------------


def test_mantel_is_the_correlation_and_its_p_counts_relabellings():
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 4)), rng.random((4, 4))
    off = ~np.eye(4, dtype=bool)
    got = stats.mantel(a, b, draws=4000)
    every = [np.corrcoef(a[off], b[np.ix_(o, o)][off])[0, 1] for o in map(list, itertools.permutations(range(4)))]
    assert got["r"] == pytest.approx(np.corrcoef(a[off], b[off])[0, 1])
    assert got["p"] == pytest.approx(np.mean(np.array(every) >= got["r"] - 1e-12), abs=0.03)
    symmetric = a + a.T
    assert stats.mantel(symmetric, symmetric.T)["r"] == pytest.approx(1)


def test_confusions_within_groups_against_chance():
    counts = np.array([[9, 3, 1, 0], [2, 9, 0, 0], [0, 1, 9, 5], [0, 0, 0, 9]])
    share, chance = stats.within(counts, ["a", "a", "b", "b"])
    assert share == pytest.approx(10 / 12)
    assert chance == pytest.approx(1 / 3)
    assert stats.within(counts, ["a", "a", "a", "b"])[1] == pytest.approx((4 * 2 + 2 * 2 + 6 * 2 + 0) / 3 / 12)


def test_views_compare_one_attack_with_another():
    o = random_outcomes(1)
    seen = stats.discrepancy(o, [o, o])
    np.testing.assert_array_equal(stats.accuracies(seen["standard"][0]), stats.accuracies(o, "clean"))
    np.testing.assert_array_equal(stats.accuracies(seen["adversarial, attacked"][1]), stats.accuracies(o, "pgd"))
    got = stats.summary(seen["adversarial, attacked"], versus=seen["adversarial, clean"])["value"]
    assert got["mean"] == pytest.approx(stats.accuracies(o, "pgd").mean() - 1)


def test_cosines_are_those_of_the_means_and_chance_is_permutation():
    groups = {
        "a": random_outcomes(1),
        "b": [random_outcomes(2), random_outcomes(3)],
        "c": random_outcomes(4, (0.9, 0.2, 0.5, 0.3)),
    }
    got = stats.cosines(groups).set_index(["a", "b"])
    mean = (stats.accuracies(groups["b"][0]) + stats.accuracies(groups["b"][1])) / 2
    one = stats.accuracies(groups["a"])
    assert got.loc[("a", "b"), "cosine"] == pytest.approx(np.corrcoef(one, mean)[0, 1])
    every = [np.corrcoef(one, mean[list(o)])[0, 1] for o in itertools.permutations(range(4))]
    assert got.loc[("a", "b"), "p"] == pytest.approx(
        np.mean(np.array(every) >= np.corrcoef(one, mean)[0, 1] - 1e-9), abs=0.02
    )
    assert got.loc[("a", "c"), "cosine"] < 0
    assert got.loc[("a", "c"), "p"] > 0.5
    assert list(got.index) == [("a", "b"), ("a", "c"), ("b", "c")]
    with pytest.raises(ValueError, match="same images"):
        stats.cosines({"a": random_outcomes(1), "b": random_outcomes(1, n=40)})


def test_what_has_no_direction_is_not_significant():
    same = random_outcomes(1, (0.0, 0.0, 0.0, 0.0))
    got = stats.cosines({"a": random_outcomes(2), "none right": same}).iloc[0]
    assert np.isnan([got["cosine"], got["p"]]).all()
    assert stats.mantel(np.ones((4, 4)), np.arange(16.0).reshape(4, 4)).isna().all()


def test_worst_deviation_has_an_interval_of_its_own_sign():
    """True deviation of the worst class from the mean: 0.2 - 0.575."""
    hits = [stats.summary(random_outcomes(s, n=400)).loc["deviation"] for s in range(60)]
    assert np.mean([h["low"] <= -0.375 <= h["high"] for h in hits]) >= 0.88
    assert max(h["high"] for h in hits) < -0.25


@pytest.mark.slow
def test_the_interval_of_a_cosine_holds_and_the_correction_takes_the_noise_off():
    """Simulated, with images that are hard for both models (shared noise pulls the cosine towards 1) and without."""
    a = np.array([0.956, 0.981, 0.932, 0.884, 0.961, 0.927, 0.971, 0.966, 0.961, 0.966])
    b = np.array([0.58, 0.74, 0.33, 0.23, 0.30, 0.40, 0.57, 0.62, 0.69, 0.65])
    opposed = 0.9 - 0.5 * b
    cases = [(a, b, 60, 0.0), (a, b, 1000, 0.0), (b, opposed, 200, 0.9), (b, opposed, 200, 0.0)]
    for first, second, n, shared in cases:
        rows, true = [], stats.deviation_cosine(first, second)
        for r in range(60):
            rng, labels = np.random.default_rng(r), np.repeat(np.arange(10), n)
            hard = rng.standard_normal(len(labels))
            own = [np.sqrt(shared) * hard + np.sqrt(1 - shared) * rng.standard_normal(len(labels)) for _ in range(2)]
            pair = [outcomes(labels, z < norm.ppf(p)[labels]) for z, p in zip(own, (first, second), strict=True)]
            rows.append(stats.cosines({"a": pair[0], "b": [pair[1], pair[1]]}, draws=300).iloc[0])
        table = pd.DataFrame(rows)
        assert ((table["low"] <= true) & (true <= table["high"])).mean() >= 0.88
        if n > 60:
            assert table["corrected"].mean() == pytest.approx(true, abs=0.03)
            assert (table["high"] - table["low"]).mean() < 0.5
        if shared:
            assert table["cosine"].mean() > true + 0.03


def test_lift_compares_one_class_between_runs_with_other_classes():
    before = [random_outcomes(s, (0.3, 0.9, 0.5), n=80) for s in range(3)]
    after = [random_outcomes(9 + s, (0.3, 0.9, 0.8), n=80) for s in range(3)]
    fewer = []
    for o in after:
        keep = o.labels != 1
        move = np.array([0, -1, 1])
        predicted = np.where(o.predictions["pgd"] == 1, 0, o.predictions["pgd"])
        clean = move[o.labels[keep]]
        fewer.append(Outcomes(clean, {"clean": clean, "pgd": move[predicted[keep]]}, ("c0", "c2"), {"pgd": {}}))
    got = stats.lift(fewer, before, "c2")
    assert got["difference"] == pytest.approx(
        np.mean([stats.accuracies(o)[1] for o in fewer]) - np.mean([stats.accuracies(o)[2] for o in before])
    )
    assert got["low"] < got["difference"] < got["high"]
    spread = np.sqrt(0.8 * 0.2 / 240 + 0.5 * 0.5 / 240)
    assert 2 * 1.0 * spread < got["high"] - got["low"] < 2 * 4 * spread
    with pytest.raises(ValueError, match="80 images before and 40 after"):
        stats.lift([random_outcomes(0, (0.3, 0.9, 0.5), n=40)], before, "c2")


def test_nothing_that_changed_is_no_certainty():
    never = [outcomes(np.repeat([0, 1], 60), np.repeat([0, 1], 60))]
    for name in ("c0", "c1"):
        got = stats.lift(never, never, name)
        assert got["difference"] == 0
        far = 1 - 0.025 ** (1 / 60)  # Clopper and Pearson's end of 0 in 60
        assert (got["low"], got["high"]) == pytest.approx((-far, far), abs=1e-4)


def test_figures_of_the_discrepancy_study_show_what_they_were_given():
    groups = {"a": random_outcomes(1), "b": [random_outcomes(2), random_outcomes(3)]}
    fig = plots.deviations(groups)
    bars = [p.get_width() for p in fig.axes[0].patches]
    np.testing.assert_allclose(sorted(bars), sorted(100 * stats.deviation(stats.accuracies(groups["a"]))))
    fig = plots.cosine_matrix(stats.cosines(groups))
    assert f"{stats.cosines(groups)['cosine'][0]:.2f}" in fig.axes[0].texts[0].get_text()
    curve = pd.DataFrame({"x": [0.1, 0.5, 0.6], "y": [0.3, 0.2, 0.9]}, index=pd.Index([1, 2, 3], name="epoch"))
    worst = next(line for line in plots.curves(curve).axes[0].lines if line.get_label() == "worst class of the epoch")
    np.testing.assert_array_equal(worst.get_ydata(), [0.1, 0.2, 0.6])
    fig = plots.explanations({"panel": pd.DataFrame({"u": [1.0, 2, 3], "v": [9.0, 8, 1]}, index=list("abc"))})
    assert "-1.00" in fig.axes[0].get_title(loc="left")
    assert [t.get_text() for t in fig.axes[0].texts] == list("abc")
    plots.plt.close("all")


def test_text_of_intervals_and_tables():
    row = pd.Series({"value": 0.1234, "low": -0.05, "high": 0.2})
    assert stats.interval(row) == "12.3 [-5.0, 20.0]"
    assert stats.interval(row.rename({"value": "difference"}), "+") == "+12.3 [-5.0, +20.0]"
    table = pd.DataFrame({"a b": [1, 2], "c": ["x", ""]}, index=["first", "second"])
    lines = [[x.strip() for x in line.split("|")] for line in stats.markdown(table).splitlines()]
    assert lines[0] == ["", "", "a b", "c", ""]
    assert set(lines[1][1:-1]) == {"---"}
    assert lines[2:] == [["", "first", "1", "x", ""], ["", "second", "2", "", ""]]


def test_figures_of_gains_and_lines_show_the_table():
    table = pd.DataFrame(
        {"before": [0.5, 0.2], "difference": [-0.1, 0.3], "low": [-0.2, 0.1], "high": [0.0, 0.4]}, ["dog", "cat"]
    )
    fig = plots.gains(table)
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat (20 %)", "dog (50 %)"]  # weakest at the bottom
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [30, -10])
    plots.plt.close(fig)

    rows = [(x, x + c + 10 * p, f"line {c}", f"panel {p}") for p in (0, 1) for c in (0, 1) for x in (1, 2)]
    tidy = pd.DataFrame([*rows[:2], *rows[4:]], columns=["x", "y", "of", "panel"])  # the first panel lacks a line
    tidy = pd.concat([tidy, tidy.assign(y=tidy["y"] + 2)])  # two runs
    fig = plots.lines(tidy, "x", "y", colour="of", panel="panel")
    first, second = fig.axes
    drawn = [[line for line in ax.lines if len(line.get_xdata()) == 2] for ax in (first, second)]
    assert [len(lines) for lines in drawn] == [1, 2]
    np.testing.assert_allclose([line.get_ydata() for line in drawn[1]], [[12, 13], [13, 14]])  # the means
    assert drawn[0][0].get_color() == drawn[1][0].get_color() != drawn[1][1].get_color()
    plots.plt.close(fig)


def test_all_attacks_at_once_leave_what_each_leaves():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    predictions = {a: np.where(rng.random(200) < 0.7, labels, rng.integers(0, 4, 200)) for a in ("clean", "a", "b")}
    o = Outcomes(labels, dict(predictions), tuple("wxyz"), {"a": {}, "b": {}})
    o.combine()
    assert stats.last_attack(o) == "all attacks"
    with pytest.raises(KeyError, match="no attack 'c'"):
        o.combine("c")
    for i, y in enumerate(labels):
        wrong = [p[i] for p in predictions.values() if p[i] != y]
        assert o.predictions["all attacks"][i] == (wrong[0] if wrong else y)

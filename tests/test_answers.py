"""What an audit answers beside its numbers: groups of images, corruptions, files, exit status; and comparisons."""

import hashlib
import html
import itertools
import json
import shlex
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import nn

from cfol_nb import audit as a
from cfol_nb import stats
from cfol_nb.audit import compare, core, outcomes_of, read_attributes, show
from cfol_nb.corruptions import corrupt
from cfol_nb.evaluate import Outcomes
from cfol_nb.files import ROOT

NAMES = ("cat", "dog", "hen")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    x = (torch.rand(60, 1, 8, 8) * 255).round() / 255
    y = net()(x).argmax(1)
    y[:6] = torch.arange(6) % 3  # all classes, and some that are wrong
    return x, y


@pytest.fixture(scope="module")
def found(images, tmp_path_factory):
    x, y = images
    sites = pd.DataFrame({"site": np.where(np.arange(60) % 3 == 0, "north", "south")})
    more = {"attributes": sites, "corruptions": ["fog", "contrast"], "keep_images": True}
    folder = tmp_path_factory.mktemp("audit")
    return a.audit(net(), x, y, NAMES, eps=0.02, version="fast", show=2, folder=folder, **more), folder


def test_groups_of_images_are_counted(found, images):
    out, y = found[0], images[1].numpy()
    site, right = np.where(np.arange(60) % 3 == 0, "north", "south"), out.outcomes.correct("autoattack")
    want = pd.DataFrame({"site": site, "class": np.array(NAMES)[y], "right": right})
    got = out.slices().set_index(["by", "group"])
    for by, keys in (("site", ["site"]), ("class / site", ["class", "site"])):
        groups = want.groupby(keys)["right"].agg(["mean", "sum", "count"])
        assert len(groups) == len(got.loc[by])
        for key, row in groups.iterrows():
            own = got.loc[(by, " / ".join(key if isinstance(key, tuple) else (key,)))]
            assert (own["value"], own["n"]) == (row["mean"], row["count"])
            assert (own["low"], own["high"]) == stats.wilson(row["sum"], row["count"])
        assert got.loc[by, "value"].is_monotonic_increasing
    assert f"By site the weakest is {got.loc['site'].index[0]}: " in out.verdict()
    at = out.slices(radius=float(out.radii.index[1]))
    by_site = at[at["by"] == "site"].set_index("group")["value"]
    for name in ("north", "south"):
        assert by_site[name] == (out.first[site == name] > out.radii.index[1]).mean()


def test_corruptions_are_judged_beside_attacks(found, images):
    (out, _), (x, y) = found, images
    for name in ("fog", "contrast"):
        right = []
        for severity in range(1, 6):
            with torch.no_grad():
                z = net()(corrupt(x, name, severity, torch.Generator().manual_seed(0)))
            np.testing.assert_array_equal(out.outcomes.predictions[f"{name} {severity}"], z.argmax(1))
            right.append(z.argmax(1) == y)
        per_class = [torch.stack(right)[:, y == c].double().mean().item() for c in range(3)]
        row = out.corrupted().set_index("corruption").loc[name]
        assert row["mean"] == pytest.approx(np.mean(per_class))
        assert row["worst"] == pytest.approx(min(per_class))
        assert row["weakest"] == NAMES[int(np.argmin(per_class))]
        assert row["worst_low"] <= row["worst"] <= row["worst_high"]
    assert list(out.outcomes.predictions)[-1] == "autoattack"


def test_adversarial_images_and_a_list_of_all_are_kept(found, images):
    (out, folder), (x, y) = found, images
    (path,) = folder.glob("images/adversarial-*.npy")
    points = torch.from_numpy(np.load(path))
    with torch.no_grad():
        predicted = net()(points).argmax(1)
    np.testing.assert_array_equal(predicted, out.outcomes.predictions["autoattack"])
    assert (points - x).abs().max() <= 0.02 + 1e-6
    table = out.images()
    held = out.outcomes.correct("autoattack")
    assert (table["broken_by"] == "held").to_numpy().tolist() == held.tolist()
    assert (table.loc[table["broken_by"] == "clean", "radius"] == 0).all()
    counts = table.groupby(["label", "broken_by"]).size()
    for (label, attack), n in counts.items():
        assert out.broken_by().loc[label, attack] == n
    again = a.audit(net(), x, y, NAMES, eps=0.02, version="fast", show=0, folder=folder, keep_images=True)
    np.testing.assert_array_equal(np.load(path), points)
    np.testing.assert_array_equal(again.first, out.first)
    path.unlink()
    with pytest.raises(RuntimeError, match="is gone"):
        a.audit(net(), x, y, NAMES, eps=0.02, version="fast", show=0, folder=folder, keep_images=True)


def test_what_cannot_be_kept_or_grouped_is_refused_before_work(images):
    x, y = images
    for more, says in (
        ({"keep_images": True}, "a folder is needed"),
        ({"corruptions": ["rain"]}, "unknown corruption 'rain'"),
        ({"attributes": pd.DataFrame({"site": ["a"] * 60})}, "'site' has 1 different values"),
        ({"attributes": pd.DataFrame({"site": map(str, range(60))})}, "'site' has 60 different values"),
        ({"attributes": pd.DataFrame({"site": ["a", "b"]})}, "2 rows of 1 attributes, but 60 images"),
    ):
        with pytest.raises(ValueError, match=says):
            a.audit(net(), x, y, NAMES, eps=0.02, **more)


def test_attributes_are_read_by_the_names_of_files(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("site,image\nn,cat/2.png\n,cat/1.png\ns,other.png\n")
    table = read_attributes(path, ["cat/1.png", "cat/2.png"])
    assert core._admitted(table, 2)["site"].tolist() == ["(none)", "n"]
    for text, files, says in (
        ("site\nn\n", ["x"], "no column 'image', with files such as 'x'"),
        ("image,site\nx,n\nx,s\n", ["x"], "two rows for 'x'"),
        ("image,site\nx,n\n", ["x", "y", "z"], "no row for 2 of 3 images, for example 'y'"),
        ("", ["x"], "No columns"),
        ("image,site\nx,n\n", [], "attributes need a folder"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says) as error:
            read_attributes(path, files)
        assert str(path) in str(error.value)
    for name in ("a.parquet", "a.txt"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=name):
            read_attributes(tmp_path / name, ["x"])
    with pytest.raises(FileNotFoundError, match="no file"):
        read_attributes(tmp_path / "b.csv", ["x"])


def test_forms_hold_the_same_numbers_and_fit(found, tmp_path):
    out = found[0]
    got = json.loads(show.rendered("json", out.answer))
    assert got == json.loads(json.dumps(out.answer))
    (tmp_path / "t.csv").write_text(show.rendered("csv", out.answer))
    table, own = pd.read_csv(tmp_path / "t.csv").set_index("class"), out.table().set_index("class")
    np.testing.assert_allclose(table["autoattack_value"], own["autoattack"])
    np.testing.assert_allclose(table["half_radius_low"], out.halves()["low"].loc[table.index])
    docs = (ROOT / "docs" / "audit.md").read_text()
    rows = [
        out.answer,
        out.answer["telling_radius"] or {},
        *(out.answer[k][0] for k in ("classes", "slices", "checks")),
    ]
    assert all(f"`{key}`" in docs for row in rows for key in row)
    latex = show.rendered("latex", out.answer)
    stated = out.stated().set_index("class")
    assert latex.startswith(r"\begin{tabular}")
    assert all(text in latex for text in stated["autoattack"])
    text = show.text(out)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("half by", "apgd-ce", "By site", "Under corruptions", out.answer["attack"]["version"]):
        assert part in text


def test_the_exit_status_says_what_a_pipeline_must_know(found):
    answer = json.loads(json.dumps(found[0].answer))
    answer["checks"] = [{"check": "c", "verdict": "look", "seen": ""}]
    answer["accuracy"]["autoattack"]["worst"] = {"value": 0.5, "low": 0.3, "high": 0.7}
    assert show.status(answer, None) == show.status(answer, 0.3) == (0, "")
    status, why = show.status(answer, 0.31)
    assert status == 3
    assert "0.3, below 0.31" in why
    answer["classes"][0] |= {"unfinished": 1, "autoattack": {"value": 0.6, "low": 0.1, "high": 0.7}}
    assert show.status(answer, 0.2)[0] == 3
    answer["checks"][0]["verdict"] = "fail"
    assert show.status(answer, None)[0] == show.status(answer, 0.9)[0] == 4


NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
"""


@pytest.mark.slow
def test_the_commands_answer_from_end_to_end(command, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    x, y = images
    rows = ["image,site"]
    for i, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
        path = tmp_path / "photos" / NAMES[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image[0]).round().byte().numpy(), "L").save(path)
        rows.append(f"{NAMES[label]}/{i}.png,{'ab'[i % 2]}")
    (tmp_path / "sites.csv").write_text("\n".join(rows))
    words = ["audit", "--model", "net.py:make", "--data", "imagefolder:photos", "--eps", "0.02", "--version", "fast"]
    words += ["--out", "one", "--attributes", "sites.csv", "--corruptions", "--images", "--json", "--fail-below", "1"]
    status, out, err = command(*words)
    answer = json.loads(out)
    assert status == show.status(answer, 1)[0] in (3, 4), err
    assert {row["by"] for row in answer["slices"]} == {"site", "class / site"}
    assert len(answer["corruptions"]) == 7
    page = (tmp_path / "one/audit.html").read_text()
    state = b"".join(v.numpy().tobytes() for v in net().state_dict().values())
    for part in (
        shlex.join(["cfol-nb", *words]),
        hashlib.sha256(state).hexdigest()[:16],
        "torch " + torch.__version__.split("+")[0],
    ):
        assert html.escape(part, quote=False) in page
    listed = pd.read_csv(tmp_path / "one/images/images.csv")
    assert set(listed["image"]) == {line.split(",")[0] for line in rows[1:]}
    mine = outcomes_of("one")
    worse = mine.table().sample(frac=1, random_state=0)
    worse["pgd20"] = "cat"
    worse[["image", "label", "clean", "pgd20"]].to_csv("worse.csv", index=False)
    status, out, err = command("compare", "one", "worse.csv", "--attack", "pgd20", "--out", "c.html")
    assert (status, err) == (0, "")
    assert out.startswith("one -> worse: per cent under pgd20")
    assert max(map(len, out.splitlines())) <= 80
    assert "data:image/png;base64," in (tmp_path / "c.html").read_text()
    status, out, _ = command("compare", "one", "worse.csv", "--csv", "--attack", "pgd20")
    assert status == 0
    assert len(out.splitlines()) == 4
    for wrong, says in (
        (("one",), "1 model: at least two are needed"),
        (("one", "nosuch"), "nosuch is not an audit's folder"),
        (("one", "one"), "named twice"),
        (("one", "worse.csv", "--json", "--csv"), "--json and --csv are two forms"),
        (("one", "worse.csv", "--attack", "x"), "attack 'x' is not in all of these"),
    ):
        status, _, err = command("compare", *wrong)
        assert status == 2
        assert says in err


# -- comparisons -------------------------------------------------------------------------------------------------------


def two(n=40, seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1, 2], n)
    right = rng.random((2, 3 * n)) < np.array([[0.8, 0.5, 0.5], [0.8, 0.95, 0.3]])[:, y]
    before, after = ({"clean": y, "pgd": np.where(r, y, (y + 1) % 3)} for r in right)
    names = tuple(f"{i}.png" for i in range(3 * n))
    return [Outcomes(y, p, NAMES, images=names) for p in (before, after)], right, y


def test_what_changed_is_counted_and_tested_class_by_class():
    (before, after), right, y = two()
    found = compare({"A": before, "B": after, "C": before})
    p = {}
    for name, other in (("B", right[1]), ("C", right[0])):
        for c in range(3):
            won, lost = (other & ~right[0])[y == c].sum(), (right[0] & ~other)[y == c].sum()
            p[name, NAMES[c]] = binomtest(int(won), int(won + lost)).pvalue if won + lost else 1.0
            row = next(r for r in found.answer["classes"] if (r["to"], r["class"]) == (name, NAMES[c]))
            assert (row["won"], row["lost"], row["n"]) == (won, lost, 40)
            assert row["p"] == pytest.approx(p[name, NAMES[c]])
            assert row["change"]["value"] == pytest.approx((won - lost) / 40)
            assert row["change"]["low"] <= row["change"]["value"] <= row["change"]["high"]
            assert row["before"]["value"] == right[0][y == c].mean()
    order, adjusted = sorted(p, key=p.get), 0  # Holm, step by step
    for i, key in enumerate(order):
        adjusted = min(1, max(adjusted, (len(p) - i) * p[key]))
        row = next(r for r in found.answer["classes"] if (r["to"], r["class"]) == key)
        assert row["p_holm"] == pytest.approx(adjusted)
    b, c = found.answer["changes"]
    assert b["worst"]["value"] == pytest.approx(min(right[1][y == k].mean() for k in range(3)) - 0.5, abs=0.2)
    assert b["worst"] == {k: stats.summary(after, "pgd", versus=before).loc["worst", k] for k in b["worst"]}
    assert (b["weakest_before"], b["weakest_after"]) == (stats.weakest(before), stats.weakest(after))
    assert c["mean"]["value"] == c["worst"]["value"] == 0
    assert "Better: dog." in found.verdict()
    assert found.verdict().count("No class is shown to change.") == 1


def test_images_and_classes_may_come_in_another_order():
    (before, after), _, _ = two()
    moved = after.take(np.random.default_rng(1).permutation(120))
    renamed = Outcomes.from_table(moved.table(), NAMES[::-1])
    want, got = (compare({"A": before, "B": o}).answer for o in (after, renamed))
    assert got == want


def test_classes_without_images_compete_but_are_not_judged():
    (before, after), _, y = two()
    for name in ("pgd", "clean"):
        before.predictions[name][y == 2], after.predictions[name][y == 2] = 0, 0
    few = [o.take(np.flatnonzero(y != 2)) for o in (before, after)]
    few[1].predictions["pgd"][:] = 2  # a class without images
    found = compare({"A": few[0], "B": few[1]})
    assert {r["class"] for r in found.answer["classes"]} == {"cat", "dog"}
    assert all(r["after"]["value"] == 0 for r in found.answer["classes"])


def test_outcomes_of_other_images_are_not_compared():
    (before, after), _, y = two()
    other = Outcomes(y, dict(after.predictions), ("cat", "dog", "cow"), images=after.images)
    with pytest.raises(ValueError, match="B has other classes than the first model: only one of them has cow, hen"):
        compare({"A": before, "B": other})
    with pytest.raises(ValueError, match=r"B has other images than the first model: only one of them has 119\.png"):
        compare({"A": before, "B": after.take(np.arange(119))})
    unnamed = Outcomes(y[::-1].copy(), {"clean": y}, NAMES)
    with pytest.raises(ValueError, match="B has other labels"):
        compare({"A": before, "B": unnamed})


def test_published_runs_are_compared_by_name():
    a_run, b_run = itertools.islice(
        (p.stem for p in sorted((ROOT / "results").glob("*.json")) if p.stem.startswith("cifar10-at-cfol-s")), 2
    )
    o = outcomes_of(a_run)
    assert o.predictions.keys() >= {"clean", "pgd20"}
    np.testing.assert_array_equal(outcomes_of(f"run:{b_run}:last").labels, outcomes_of(b_run).labels)
    with pytest.raises(ValueError, match="there are the weights"):
        outcomes_of(f"{a_run}:nosuch")


# -- the time that is left ---------------------------------------------------------------------------------------------


class Clocked(nn.Module):
    """Every image costs as much time, forwards and backwards, on a clock that only it moves."""

    def __init__(self, body):
        super().__init__()
        self.body, self.now = body, 0.0

    def forward(self, x):
        self.now += len(x) * (1 + (x.requires_grad and torch.is_grad_enabled()))
        return self.body(x)


@pytest.mark.parametrize(("version", "eps"), [("fast", 0.005), ("fast", 0.05), ("standard", 0.005)])
def test_time_left_is_right_within_a_factor_of_two_after_a_tenth(images, monkeypatch, version, eps):
    x, y = images
    model, seen = Clocked(net()), []
    monkeypatch.setattr(time, "monotonic", lambda: model.now)
    original = core._Left.__call__

    def told(self, *args):
        seen.append((model.now, original(self, *args)))
        return seen[-1][1]

    monkeypatch.setattr(core._Left, "__call__", told)
    a.audit(model, x, y, NAMES, eps=eps, version=version, show=0)
    end = model.now
    (now, left), *others = [(now, left) for now, left in seen if now >= 0.1 * end]
    assert 0.5 <= left / (end - now) <= 2
    assert all(0.5 <= (now + left) / end <= 2 for now, left in others)  # of the whole, from then on
    assert others[-1][0] >= 0.95 * end

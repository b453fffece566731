import dataclasses
import itertools
import json
import math
import os
import random
import re
import signal
import time

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from test_autoattack import Gamma, of_test, trained  # noqa: F401
from test_data import write_folder
from torch import nn

from cfol_nb import autoattack as aa
from cfol_nb import plots, stats
from cfol_nb.attacks import pgd
from cfol_nb.audit import Audit, audit, load_model, load_weights, radii, show, unseen
from cfol_nb.audit import core as module
from cfol_nb.autoattack import autoattack
from cfol_nb.checks import checklist, rarer
from cfol_nb.checks import said as sentence
from cfol_nb.corruptions import corrupt
from cfol_nb.data import load, prepare
from cfol_nb.evaluate import Outcomes, evaluate
from cfol_nb.files import read_tensors, write_tensors
from cfol_nb.models import build
from cfol_nb.runs import compute


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(aa, "square", lambda batch, f=aa.square: f(batch, 60))


def verdicts(table):
    return dict(zip(table["check"], table["verdict"], strict=True))


# -- the checklist: sound models pass, and each kind of broken one is caught -------------------------------------------


def test_a_sound_model_passes_every_check(trained, digits):  # noqa: F811
    for model in trained:
        x, y = of_test(digits, 120)
        table = checklist(model, x, y, 0.1)
        assert (table["verdict"] == "ok").all(), table


class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1), x


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.detach().flatten(1))


class Picky(nn.Module):
    def forward(self, x):
        assert x.shape[-1] == 224, "only 224 pixels"
        return x


class Broken(nn.Module):
    """A network around another one, broken in one way."""

    def __init__(self, net, how):
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x):
        if self.how == "random":
            return self.net(x + 0.1 * torch.randn_like(x))
        if self.how == "rounds":  # no gradient passes
            x = torch.round(x * 4) / 4
        z = self.net(x)
        if self.how == "saturates":
            return 1e4 * z
        if self.how == "probabilities":
            return z.softmax(1)
        if self.how == "batch":
            return z - z.mean(0)
        if self.how == "shuffled":
            return z.roll(3, 1)
        return z


@pytest.mark.parametrize(
    ("how", "check", "verdict"),
    [
        ("random", "the same images give the same logits", "fail"),
        ("batch", "an image's logits do not depend on its batch", "fail"),
        ("probabilities", "the outputs are logits, not probabilities", "fail"),
        ("rounds", "gradients of the margin are not zero", "fail"),
        ("rounds", "no image withstands an unbounded attack", "fail"),
        ("rounds", "transferred attacks are weaker than direct ones", "fail"),
        ("saturates", "gradients of the cross-entropy are not zero", "look"),
        ("shuffled", "clean accuracy is above chance", "fail"),
    ],
)
def test_a_broken_model_is_caught(trained, digits, how, check, verdict):  # noqa: F811
    x, y = of_test(digits, 120)
    assert verdicts(checklist(Broken(trained[1], how).eval(), x, y, 0.1))[check] == verdict


def test_a_linear_model_and_one_that_transfer_breaks_are_seen(digits, trained):  # noqa: F811
    x, y = of_test(digits, 100)
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    y2 = flat(x).argmax(1)
    assert verdicts(checklist(flat, x, y2, 0.05))["gradients differ between images"] == "look"
    masked = Broken(trained[1], "rounds").eval()
    table = checklist(masked, x, y, 0.1, surrogate=trained[1])
    assert verdicts(table)["transferred attacks are weaker than direct ones"] == "fail"


def test_every_evaluation_keeps_the_verdicts_of_its_last_radius(trained, digits, quick):  # noqa: F811
    x, y = of_test(digits, 120)
    attacks = {"pgd": {"eps": 0.2, "step": 0.05, "steps": 5}, "aa": {"eps": 0.1, "version": "standard"}}
    o = evaluate(trained[1], x, y, attacks)
    some = aa.interleaved(y, 0)[:100]
    assert torch.bincount(y[some], minlength=10).min() >= min(10, torch.bincount(y).min())  # all classes alike
    want = checklist(trained[1], x[some], y[some], 0.1)
    assert list(o.checks) == ["aa"]
    pd.testing.assert_frame_equal(o.checks["aa"][: len(want)], want)
    *_, last = o.checks["aa"]["seen"]
    more = (o.correct("aa:fab-t").mean() - o.correct("aa").mean()) * 100
    assert last == f"Square broke another {more:.1f} % of images"
    for again in (
        Outcomes.from_tensors(o.tensors(), json.loads(json.dumps(o.meta(), sort_keys=True))),
        Outcomes.unpacked(json.loads(json.dumps(o.packed(), sort_keys=True))),
    ):
        pd.testing.assert_frame_equal(again.checks["aa"], o.checks["aa"])
    masked = evaluate(Broken(trained[1], "rounds").eval(), x, y, {"pgd": attacks["pgd"]}, checks=50)
    assert verdicts(masked.checks["pgd"])["gradients of the margin are not zero"] == "fail"
    assert "of 50 images" in masked.checks["pgd"].set_index("check").loc["clean accuracy is above chance", "seen"]
    older = {k: v for k, v in o.packed().items() if k != "checks"}
    assert not Outcomes.unpacked(older).checks
    few = (trained[1](x).argmax(1) == y).nonzero().squeeze(1)[:1]  # right, but so is one guess in ten
    few = evaluate(trained[1], x[few], y[few], {"pgd": attacks["pgd"]}).checks["pgd"]
    assert verdicts(few)["clean accuracy is above chance"] == "look"
    single = evaluate(trained[1], x, y, {"pgd": attacks["pgd"]}, batch_size=1).checks["pgd"]
    assert "of 20 images" in single.set_index("check").loc["clean accuracy is above chance", "seen"]
    assert not evaluate(trained[1], x, y, {"pgd": attacks["pgd"]}, checks=0).checks
    assert not evaluate(trained[1], x, y, {}).checks


def test_a_checklist_in_one_sentence():
    table = pd.DataFrame([("a", "ok", ""), ("b", "look", ""), ("c", "fail", "")], columns=["check", "verdict", "seen"])
    assert sentence(table) == "1 of 3 checks are fine; failed, so do not quote these numbers: c; look at: b."
    assert sentence(table[:1]) == "1 of 1 checks are fine."
    assert sentence(table[:0]) == sentence(None) == ""


# -- the audit ---------------------------------------------------------------------------------------------------------


class Brittle(nn.Module):
    """Finite on images of 8 bits only."""

    def forward(self, x):
        z = x.flatten(1)[:, :10]
        return torch.where((255 * x - (255 * x).round()).abs().amax((1, 2, 3)).view(-1, 1) < 1e-3, z, torch.nan)


def test_a_rise_is_one_where_chance_would_seldom_bring_so_many_back():
    """Of 20 images: the exact binomial sum, by hand."""
    for back in range(8):
        for lost in range(8):
            before = torch.arange(20) < 10 + lost
            after = (torch.arange(20) < 10) | (torch.arange(20) >= 20 - back) & ~before
            back_now = int((after & ~before).sum())
            p = sum(math.comb(back_now + lost, i) for i in range(back_now, back_now + lost + 1)) / 2 ** (
                back_now + lost
            )
            assert rarer(after, before) == (p >= 0.01)


def test_logits_that_are_lost_under_attack_are_named():
    x = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = x.flatten(1)[:, :10].argmax(1)
    assert verdicts(checklist(Brittle(), x, y, 0.01))["logits stay finite under attack"] == "fail"


@pytest.fixture(scope="module")
def found(trained, digits, tmp_path_factory):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aa, "square", lambda batch, f=aa.square: f(batch, 60))
        x, y = of_test(digits, 150)
        before = {k: v.clone() for k, v in trained[2].state_dict().items()}
        trained[2].train()
        out = audit(trained[2], x, y, digits.class_names, eps=0.1, name="<a> & b")
        assert all(m.training for m in trained[2].modules())
        assert all(torch.equal(v, before[k]) for k, v in trained[2].state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in trained[2].parameters())
        trained[2].eval()
    return out


def test_table_and_attacks_add_up(found):
    table, broken = found.table(), found.broken_by()
    assert table["autoattack"].is_monotonic_increasing
    assert (table["autoattack"] <= table["pgd20"]).all()
    assert (table["pgd20"] <= table["clean"]).all()
    assert table["weakest"].sum() == pytest.approx(1)
    np.testing.assert_array_equal(broken.sum(axis=1), stats.counts(found.outcomes, "clean")[1])
    held = table.set_index("class").loc[list(broken.index)]
    np.testing.assert_array_equal(broken["held"], (held["autoattack"] * held["n"]).round())
    assert list(broken.columns) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square", "held"]
    assert not found.unfinished.any()
    confused = found.confused(3)
    c = stats.confusion(found.outcomes)
    assert confused["images"].iloc[0] == (c - np.diag(np.diag(c))).max()
    assert str(table["class"][0]) in found.verdict()


def test_every_accuracy_is_stated_with_its_interval(found):
    stated, table = found.stated().set_index("class"), found.table().set_index("class")
    for name in ("clean", "pgd20", "autoattack"):
        for label, row in stats.class_table(found.outcomes, name).set_index("class").iterrows():
            low, high = stats.wilson(row["correct"], row["n"])
            want = f"{100 * row['correct'] / row['n']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            assert stated.loc[label, name] == want
    assert list(stated.index) == list(table.index)
    assert stated["weakest (probability)"].astype(float).to_numpy() == pytest.approx(table["weakest"], abs=0.005)


def test_accuracy_falls_with_the_radius_from_the_clean_one_on(found):
    for a, b in itertools.pairwise(found.radii.to_numpy()):
        assert (b <= a).all()
    np.testing.assert_allclose(found.radii.iloc[0], stats.accuracies(found.outcomes, "clean"))
    fell = found.first[found.gallery[2]]
    assert (fell > 0).all()
    assert fell.max() <= np.sort(found.first[found.first > 0])[30]  # they are among the first


def test_the_page_needs_nothing_else_and_escapes_names(found, tmp_path):
    page = found.html(tmp_path / "new" / "a.html").read_text()
    assert page.count("data:image/png;base64,") == 4 + (len(found.mistaken[1]) > 0)
    assert "&lt;a&gt; &amp; b" in page
    assert "<a>" not in page
    assert "http" not in re.sub('base64,[^"]*', "", page)
    assert "<script" not in page
    for name in found.outcomes.class_names:
        assert f"<td>{name}</td>" in page


def test_a_time_limit_leaves_an_honest_outcome_and_the_same_call_goes_on(trained, digits, tmp_path, quick, monkeypatch):  # noqa: F811
    x, y = of_test(digits, 60)
    whole = audit(trained[0], x, y, eps=0.1, batch_size=30)
    original, calls = aa.Evaluation._attack, []

    def limited(self, number, batch):
        calls.append(number)
        if len(calls) > 1:
            raise aa.TimeUp
        original(self, number, batch)

    monkeypatch.setattr(aa.Evaluation, "_attack", limited)
    part = audit(trained[0], x, y, eps=0.1, batch_size=30, folder=tmp_path, minutes=1)
    assert part.unfinished.sum() > 0
    assert "count as withstanding" in part.verdict()
    assert part.outcomes.attacks["autoattack"]["unfinished"] == part.unfinished.sum()
    assert (stats.accuracies(part.outcomes) >= stats.accuracies(whole.outcomes)).all()
    held, by_pgd = part.outcomes.correct("autoattack"), part.outcomes.correct("pgd20")
    assert not (held & ~by_pgd).any()  # what PGD-20 broke is known to be broken, also where AutoAttack did not come to
    assert part.broken_by()["held"].sum() == held.sum()
    monkeypatch.setattr(aa.Evaluation, "_attack", original)
    again = audit(trained[0], x, y, eps=0.1, batch_size=30, folder=tmp_path)
    np.testing.assert_array_equal(again.outcomes.predictions["autoattack"], whole.outcomes.predictions["autoattack"])
    assert "probability" not in part.verdict()  # nothing is said of classes that were attacked in part
    assert "weakest" not in part.table()
    assert not part.checks["check"].str.contains("black-box").any()
    assert again.checks["check"].str.contains("black-box").any()


def test_what_came_before_autoattack_is_kept_too(trained, digits, tmp_path, quick, monkeypatch):  # noqa: F811
    x, y = of_test(digits, 60)
    with pytest.raises(ValueError, match="limit came before any image was attacked"):
        audit(trained[0], x, y, eps=0.1, minutes=0)
    sizes, original = [], module.evaluate

    def counted(model, images, *rest, **more):
        if len(sizes) == 1 and isinstance(model, module._Timed) and model.deadline < math.inf:
            raise aa.TimeUp
        sizes.append(len(images))
        return original(model, images, *rest, **more)

    monkeypatch.setattr(module, "evaluate", counted)
    for _ in range(2):
        part = audit(trained[0], x, y, eps=0.1, batch_size=25, minutes=1, folder=tmp_path)
        assert "before the checks of its numbers. PGD-20 came to 25 of 60 images" in part.verdict()
        assert "checks are fine" not in part.verdict()
        by_pgd = part.outcomes.correct("clean") & ~part.outcomes.correct("pgd20")
        assert part.outcomes.attacks["autoattack"]["broken by PGD-20 alone"] == by_pgd.sum() > 0
        np.testing.assert_array_equal(part.outcomes.correct("autoattack"), part.outcomes.correct("pgd20"))
        assert part.unfinished.sum() == part.outcomes.correct("pgd20").sum()  # the others are decided
        assert part.radii.iloc[0].mean() == pytest.approx(stats.accuracies(part.outcomes, "clean").mean())
        skipped = np.array(part.outcomes.attacks["pgd20"]["unfinished"])
        assert skipped.sum() == part.outcomes.correct("clean")[aa.interleaved(y, 0)[25:]].sum()
        sure, n = stats.counts(part.outcomes, "pgd20")[0] - skipped, stats.counts(part.outcomes, "clean")[1]
        lows = [f"[{100 * stats.wilson(c, m)[0]:.1f}, " for c, m in zip(sure, n, strict=True)]
        stated = part.stated().set_index("class").loc[list(part.outcomes.class_names)]
        assert all(low in text for low, text in zip(lows, stated["pgd20"], strict=True))
        assert stated["unfinished"].tolist() == part.unfinished.tolist()
        assert "as if all unfinished images fell" in part.html(tmp_path / "part.html").read_text()
    found = audit(trained[0], x, y, eps=0.1, batch_size=25, folder=tmp_path)
    assert sizes == [25, 25, 10]
    checked, original_checks = [], module.checklist
    monkeypatch.setattr(module, "checklist", lambda *a, **k: checked.append(len(a[1])) or original_checks(*a, **k))
    again = audit(trained[0], x, y, eps=0.1, batch_size=25, folder=tmp_path, minutes=5)
    pd.testing.assert_frame_equal(again.checks, found.checks)
    assert not checked  # what was kept is of as many images
    audit(trained[0], x, y, eps=0.1, batch_size=25, folder=tmp_path, surrogate=trained[1])
    assert checked == [25]
    whole = audit(trained[0], x, y, eps=0.1, batch_size=25)
    np.testing.assert_array_equal(found.outcomes.predictions["pgd20"], whole.outcomes.predictions["pgd20"])
    np.testing.assert_array_equal(found.first, whole.first)


class Keeps(nn.Sequential):
    """A state that is no tensor beside the weights."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.kept = 2

    def get_extra_state(self):
        return {"kept": self.kept}

    def set_extra_state(self, state):
        self.kept = state["kept"]


class Autocast(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Slow(nn.Module):
    def __init__(self, net, seconds):
        super().__init__()
        self.net, self.seconds = net, seconds

    def forward(self, x):
        time.sleep(self.seconds * len(x))
        return self.net(x)


@pytest.mark.parametrize("seconds", [0.0003, 0.002])
def test_the_time_limit_is_kept_wherever_it_falls(trained, digits, seconds, tmp_path):  # noqa: F811
    """In AutoAttack, or in PGD-20, of which a whole batch takes much longer: the same call goes on from there."""
    x, y = of_test(digits, 60)
    came = []
    for _ in range(1 if seconds < 0.001 else 2):
        start = time.monotonic()
        found = audit(Slow(trained[1], seconds), x, y, eps=0.1, minutes=0.1, folder=tmp_path)
        assert 3 < time.monotonic() - start < 12  # a whole first batch takes half a minute, AutoAttack minutes
        assert "stopped at its time limit" in found.verdict()
        came += map(int, re.findall(r"PGD-20 came to (\d+) of 60 images", found.verdict()))
    if seconds > 0.001:
        assert 0 < came[0] < came[1] < 60


def test_a_bound_is_no_measured_value(trained, digits, quick, monkeypatch):  # noqa: F811
    """Where images are unfinished the lower end is that of a class all of whose unfinished images fall."""
    x, y = of_test(digits, 60)

    def late(*_):
        raise aa.TimeUp

    monkeypatch.setattr(aa.Evaluation, "_attack", late)
    part = audit(trained[1], x, y, eps=0.02, minutes=1)
    table = part.table()
    assert (table["unfinished"] > 0).all()
    np.testing.assert_array_equal(table["low"], 0)  # nothing is known to hold
    first = part.verdict().split(" withstand")[0]
    assert first.startswith("The weakest class so far is ")
    tied = table["class"][table["autoattack"] == table["autoattack"].min()]
    assert all(name in first for name in tied[:5])
    assert "at most" in first
    assert "[" not in first


def test_spending_on_the_worst_says_what_it_skipped(trained, digits, quick):  # noqa: F811
    x, y = of_test(digits, 300)
    part = audit(trained[1], x, y, eps=0.08, version="fast", worst_only=True)
    assert "unfinished" in part.table() or "Not decided" in part.verdict()
    assert "95 % confidence" in part.verdict() or "Not decided" in part.verdict()
    if "confidence" in part.verdict():  # the accuracy of the class that is named is no bound
        table = part.table()
        assert table["unfinished"][0] == 0
        assert f"the weakest class is {table['class'][0]}: " in part.verdict().lower()
        assert f"Of these images {table['class'][0]} is the worst class" in part.verdict()


class Counts(nn.Module):
    """Its first parameter is an integer, and it takes its images in no other layout."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
        self.net = build("smallcnn", num_classes=2, channels=4)

    def forward(self, x):
        assert x.is_contiguous()
        return self.net(x)


def test_images_of_four_channels_as_arrays_of_numpy(tmp_path):
    torch.manual_seed(0)
    x = np.random.default_rng(0).random((40, 8, 8, 4), np.float32).transpose(0, 3, 1, 2)
    model = Counts().eval()
    y = model(torch.from_numpy(x).contiguous()).argmax(1)
    y[:2] = torch.tensor([0, 1])  # both classes have images
    found = audit(model, x, y.numpy(), eps=0.01, version="fast", show=0)
    assert verdicts(found.checks)["transferred attacks are weaker than direct ones"] == "ok"
    page = found.html(tmp_path / "a.html").read_text()
    assert "The images that fall first" not in page
    assert f"<th>{found.spec['eps']:.3g}</th>" in page


class Widens(nn.Module):
    """Takes grey images, although its convolution takes three channels."""

    def __init__(self):
        super().__init__()
        self.net = build("smallcnn", num_classes=2, channels=3)

    def forward(self, x):
        assert x.shape[1] == 1
        return self.net(x.repeat(1, 3, 1, 1))


@pytest.mark.parametrize("kind", ["normalised", "dense", "widens"])
def test_grey_images_are_widened_for_a_model_that_takes_three_channels(kind):
    torch.manual_seed(0)
    model = {
        "normalised": lambda: build("smallcnn", num_classes=2, channels=3),  # would take grey ones, too
        "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)),
        "widens": Widens,
    }[kind]().eval()
    x, y = torch.rand(30, 1, 8, 8), torch.arange(30) % 2
    found = audit(model, x, y, eps=0.03, version="fast", show=0)
    assert ("The images are grey" in found.note) == (kind != "widens")
    if kind != "widens":
        wide = audit(model, x.repeat(1, 3, 1, 1), y, eps=0.03, version="fast", show=0)
        assert "grey" not in wide.note
        for name, predicted in wide.outcomes.predictions.items():
            np.testing.assert_array_equal(found.outcomes.predictions[name], predicted)


@pytest.mark.parametrize(
    "judge",
    [
        lambda m, x, y: pgd(m, x, y, 0.02, generator=torch.Generator().manual_seed(0)),
        lambda m, x, y: autoattack(m, x, y, 0.02, version="fast"),
        lambda m, x, y: evaluate(m, x, y, {"a": {"eps": 0.02, "step": 0.01, "steps": 3}}, checks=0).tensors(),
        lambda m, x, y: audit(m, x, y, eps=0.02, version="fast", show=2).outcomes.tensors(),
        lambda m, x, y: corrupt(x, "defocus", 1),
    ],
    ids=["pgd", "autoattack", "evaluate", "audit", "corrupt"],
)
def test_what_rounding_took_out_of_the_unit_is_clamped(linear, judge):
    model = linear(64, 2).float()
    x = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, :, :2], x[:, :, 2:4] = 0, 1
    y = model(x).argmax(1)
    y[:2] = torch.tensor([0, 1])
    off = x + torch.where(x == 0, -1e-6, 1e-6) * ((x == 0) | (x == 1))
    assert off.min() < 0
    assert off.max() > 1
    before = off.clone()
    torch.testing.assert_close(judge(model, off, y), judge(model, x, y), rtol=0, atol=0)
    assert torch.equal(off, before)
    for bad in (off + 1e-5, off - 1e-5, off.where(x != 0, torch.nan)):
        with pytest.raises(ValueError, match="must lie in"):
            judge(model, bad, y)


def test_nothing_is_called_skipped_after_a_whole_audit(trained, digits, tmp_path):  # noqa: F811
    x, y = of_test(digits, 100)
    whole = audit(trained[1], x, y, eps=0.08, version="fast", folder=tmp_path)
    again = audit(trained[1], x, y, eps=0.08, version="fast", folder=tmp_path, worst_only=True)
    assert not again.unfinished.any()
    assert again.verdict() == whole.verdict()


def test_classes_that_are_level_are_all_named(found):
    labels, predictions = found.outcomes.labels, dict(found.outcomes.predictions)
    for name in ("pgd20", "autoattack"):
        predictions[name] = np.where(np.isin(labels, [3, 5]), 0, predictions[name])  # none of either is right
    level = dataclasses.replace(found, outcomes=dataclasses.replace(found.outcomes, predictions=predictions))
    assert level.verdict().startswith("The weakest class is 3, level with 5: 0.0 %")
    assert "Under PGD-20" not in level.verdict()


def test_two_classes_need_no_three_quarters(trained, digits):  # noqa: F811
    x, _ = of_test(digits, 200)
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    right = two(x).argmax(1)
    labels = torch.where(torch.arange(200) % 10 < 7, right, 1 - right)  # 70 % are right
    assert verdicts(checklist(two, x, labels, 0.05))["clean accuracy is above chance"] == "ok"
    labels = torch.where(torch.arange(200) % 2 < 1, right, 1 - right)
    assert verdicts(checklist(two, x, labels, 0.05))["clean accuracy is above chance"] == "fail"


def test_infinite_gradients_are_seen(trained, digits):  # noqa: F811
    x, y = of_test(digits, 120)
    assert verdicts(checklist(Gamma(trained[1]), x, y, 0.1))["gradients are finite"] == "fail"


def test_a_class_may_have_any_name(found, tmp_path):
    names = (r"$\foo$", *found.outcomes.class_names[1:])
    odd = dataclasses.replace(
        found,
        outcomes=dataclasses.replace(found.outcomes, class_names=names),
        radii=found.radii.set_axis(names, axis=1),
    )
    assert r"<td>$\foo$</td>" in odd.html(tmp_path / "a.html").read_text()


# -- the radius finds itself -------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Two classes, told apart by the first pixel alone: an image of value v falls at exactly |v - 1/2|."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        z = self.w * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-z, z], 1)


def of_margins(weak, strong):
    """Images of class 0 that fall at `weak`, then of class 1 that fall at `strong`."""
    v = torch.cat([0.5 - torch.as_tensor(weak), 0.5 + torch.as_tensor(strong)])
    images = torch.full((len(v), 1, 2, 2), 0.5)
    images[:, 0, 0, 0] = v
    return images, (torch.arange(len(v)) >= len(weak)).long()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.001, 0.1, 0.45])
def test_the_radius_at_which_half_of_a_class_falls_is_found_whatever_was_asked_for(eps, norm):
    """At the first everything holds, at the last nothing: the answer is the same, and is known exactly."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.01, 0.06, 41), rng.uniform(0.1, 0.3, 41)
    x, y = of_margins(*truth)
    found = audit(Between(), x, y, ["weak", "strong"], eps=eps, norm=norm, version="fast", show=0)
    margins, radii = np.concatenate(truth), found.radii.index.to_numpy()
    fell, tol = found.first < np.inf, 1.07  # PGD-20 came that close, on a grid of margins
    i = np.searchsorted(radii, found.first[fell])
    assert (radii[i - 1] <= margins[fell] * tol).all()
    assert (margins[fell] <= radii[i] * (1 + 1e-6)).all()
    half = found.halves()
    for name, own in zip(found.outcomes.class_names, truth, strict=True):
        low, high = np.sort(own)[[13, 27]]  # ranks 14 and 28 of 41: fewer than 14 heads with probability 0.0138
        for of_images, stated in ((np.median(own), "value"), (high, "high")):
            assert of_images <= half.loc[name, stated] * (1 + 1e-6)
            assert half.loc[name, stated] <= of_images * 1.25 * tol
        assert low / 1.25 * (1 - 1e-6) <= half.loc[name, "low"] <= low * tol
    text = found.verdict()
    if eps == 0.1:
        assert text.startswith("The weakest class is weak: 0.0 %")
    else:
        kind = "L-inf" if norm == "linf" else "L2"
        start = "Whatever is right without an attack withstands" if eps < 0.01 else "Nothing withstands"
        assert text.startswith(f"{start} AutoAttack (fast, {kind} {eps}).")
        at = found.answer["telling_radius"]
        assert at["weakest"] == at["may_be_weakest"] == ["weak"]
        assert f"At {at['radius']:.3g}, under PGD-20, the weakest is weak: " in text
        np.testing.assert_allclose(at["lowest"]["value"], np.mean(truth[0] > at["radius"]), atol=0.03)
    assert f"Half of the images of weak fall by {half.loc['weak', 'value']:.3g} [" in text
    assert text.count("upper bound") == 1


def test_ranks_are_those_between_which_the_median_lies():
    """Against the sum of binomial coefficients, and by simulation, with values that are only known up to a grid."""
    for n in (1, 5, 6, 20, 41, 200):
        _, low, high = radii.ranks(n)
        assert high == n + 1 - low
        below = [sum(math.comb(n, i) for i in range(r)) / 2**n for r in (low, low + 1)]
        assert below[0] <= 0.025 < below[1]
    rng, grid, covered = np.random.default_rng(0), np.geomspace(0.01, 100, 40), 0
    levels = np.array([0, *grid, np.inf])
    for _ in range(1000):
        x = np.where(rng.random(30) < 0.1, 0, rng.lognormal(size=30))
        half = radii.halves(levels[np.searchsorted(levels, x)], np.zeros(30, int), levels[:-1]).iloc[0]
        covered += (
            half["low"] <= np.exp(-0.1397103) <= half["high"]
        )  # 1/9 of the others fall before half of all do: the
    assert covered >= 940  # 4/9 quantile of a normal


def test_the_search_for_a_radius_ends():
    y = np.repeat([0, 1, 2, 3], 10)
    first = np.concatenate([np.zeros(10), np.full(10, 1e-9), np.full(10, np.inf), np.full(10, 0.7)])  # in truth
    tried, asked = [0.0, 0.05, 0.1], []

    def seen():
        return np.array([min((r for r in tried if r >= v), default=np.inf) for v in first])

    while (r := radii.next_radius(seen(), y, tried, 0.1, 1.0)) is not None:
        assert r not in tried
        tried.append(r)
        asked.append(r)
    assert len(asked) < 25
    assert max(asked) == 1.0
    assert min(asked) >= 0.1 / 256
    half = radii.halves(seen(), y, np.sort(tried))
    assert half["value"][0] == 0
    assert half["value"][2] == np.inf
    assert 0.7 <= half["value"][3] <= 0.7 * 1.25


def test_what_is_broken_at_the_radius_is_so_in_the_curve_from_there_on(found):
    eps, labels = found.spec["eps"], found.outcomes.labels
    broken = ~(found.outcomes.correct("autoattack") & found.outcomes.correct("pgd20"))
    assert (found.first[broken] <= eps).all()
    at = found.radii.loc[eps].to_numpy()
    for c in range(10):
        assert at[c] == pytest.approx((found.first[labels == c] > eps).mean())
        assert at[c] <= found.outcomes.correct("autoattack")[labels == c].mean() + 1e-12


def many(k, n=5):
    """An audit of k classes under which nothing holds, with radii around 1/255."""
    rng = np.random.default_rng(0)
    y = np.arange(n * k) % k
    levels = np.array([0, *np.geomspace(0.25, 4, 12)]) / 255
    first, wrong = levels[rng.integers(0, 13, n * k)], (y + 1) % k
    names = tuple(f"class number {i}" for i in range(k))
    o = Outcomes(y, {"clean": np.where(first > 0, y, wrong), "pgd20": wrong, "autoattack": wrong}, names)
    o.attacks["autoattack"] = {"eps": 8 / 255, "norm": "linf", "version": "fast", "attacks": ["apgd-ce"]}
    o.checks["autoattack"] = pd.DataFrame(columns=["check", "verdict", "seen"])
    left = [np.bincount(y[first > r], minlength=k) / n for r in levels]
    table, x, two = pd.DataFrame(left, levels, names), torch.rand(2, 3, 8, 8), np.arange(2)
    return Audit("m", o, table, (x, x, two, two), first, np.zeros(n * k, bool), "", 1.0, (x, two))


def test_many_classes_have_a_short_answer(tmp_path):
    a = many(100)
    text = a.verdict()
    assert text.startswith("Nothing withstands AutoAttack (fast, L-inf 8/255). At ")
    assert "/255, under PGD-20, the weakest is class number " in text
    assert len(text) < 1000
    assert " more" in text
    shown = show.text(a)
    assert max(map(len, shown.splitlines())) <= 80
    assert len(shown.splitlines()) < 100
    page = a.html(tmp_path / "a.html")
    assert page.stat().st_size < 1e6
    assert page.read_text().count("class number 7<") >= 1


# -- bad input is refused before the first attack ----------------------------------------------------------------------


def test_a_radius_of_any_kind_images_that_want_gradients_and_modules_that_keep_more_than_tensors(tmp_path, quick):
    net, x = Keeps(), torch.rand(20, 1, 8, 8, requires_grad=True)
    for eps in (np.float32(0.01), torch.tensor(0.01)):
        found = audit(net, x, torch.arange(20) % 10, eps=eps, version="fast", folder=tmp_path)
        assert "AutoAttack" in found.html(tmp_path / "page.html").read_text()
    assert len(list(tmp_path.glob("pgd-*"))) == 1
    net.kept = 3  # another model
    audit(net, x, torch.arange(20) % 10, eps=eps, version="fast", folder=tmp_path)
    assert len(list(tmp_path.glob("pgd-*"))) == 2


def test_a_thousand_classes_make_a_picture_of_ordinary_size():
    names = [f"class {i}" for i in range(1000)]
    fig = plots.confusion(np.ones((1000, 1000), int), names)
    assert max(fig.get_size_inches()) < 30
    ten = plots.confusion(np.ones((10, 10), int), names[:10])
    assert [t.get_text() for t in ten.axes[0].get_xticklabels()] == names[:10]
    plots.plt.close("all")


@pytest.fixture
def no_attack(monkeypatch):
    def never(*_, **__):
        raise AssertionError("an attack was started")

    monkeypatch.setattr(module, "evaluate", never)


def case(name):
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    net = build("smallcnn", channels=1)
    nan = build("smallcnn", channels=1)
    with torch.no_grad():
        nan[1][0].weight[:] = torch.nan
    names = tuple("abcdefghij")
    return {
        "wrong width": (
            build("smallcnn", num_classes=7, channels=1),
            x,
            y % 7,
            names,
            {},
            "10 class names, but the model has 7",
        ),
        "too many outputs": (
            build("smallcnn", num_classes=12, channels=1),
            x,
            y,
            None,
            {},
            "2 of the model's 12 classes",
        ),
        "labels": (net, x, y + 5, names, {}, "labels reach from 5 to 14"),
        "non-finite": (nan, x, y, names, {}, "not finite"),
        "channels": (net, torch.rand(20, 3, 8, 8), y, names, {}, r"does not take images of shape \(3, 8, 8\)"),
        "0..255": (net, 255 * x, y, names, {}, "must lie in"),
        "empty class": (net, x, y.clamp(max=8), names, {}, "1 of the model's 10 classes have no images .*'j'"),
        "single class": (net, x, y * 0, names, {}, "single class"),
        "not images": (net, x.flatten(1), y, names, {}, "images of shape"),
        "counts": (net, x, y[:9], names, {}, "20 images and 9 labels"),
        "features": (net[1][0], x, y, names, {}, r"logits of shape \(images, classes\)"),
        "pair": (Pair(), x, y, names, {}, "returns a tuple"),
        "radius": (net, x, y, names, {"eps": 8}, "8/255"),
        "norm": (net, x, y, names, {"norm": "l1"}, "linf"),
        "float labels": (net, x, y + 0.7, names, {}, "one integer per image"),
        "picky": (Picky(), x, y, names, {}, "does not take images .*: only 224"),
        "no gradient": (Cut(), x, y, names, {}, "no gradient with respect to the images"),
        "a function": (lambda x: x.flatten(1), x, y, names, {}, "is a function: a torch.nn.Module"),
        "names": (net, x, y, tuple("aacdefghij"), {}, "two classes have the same name"),
        "minutes": (net, x, y, names, {"minutes": float("nan")}, "minutes=nan"),
        "no batch": (net, x, y, names, {"batch_size": 0}, "batch_size=0"),
        "half": (build("smallcnn", channels=1).half(), x, y, names, {}, "float32 or better"),
        "autocast": (Autocast(), x, y, names, {}, "logits are torch.bfloat16"),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "wrong width",
        "too many outputs",
        "labels",
        "non-finite",
        "channels",
        "0..255",
        "empty class",
        "single class",
        "not images",
        "counts",
        "features",
        "pair",
        "radius",
        "norm",
        "float labels",
        "picky",
        "no gradient",
        "a function",
        "names",
        "minutes",
        "no batch",
        "half",
        "autocast",
    ],
)
def test_bad_input_is_refused_in_a_sentence(name, no_attack):
    model, x, y, names, more, said = case(name)
    with pytest.raises((ValueError, FloatingPointError), match=said):
        audit(model, x, y, names, **more)


# -- models of others --------------------------------------------------------------------------------------------------


def test_models_are_loaded_from_files_and_torchvision(tmp_path):
    code = tmp_path / "net.py"
    make = "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    code.write_text(make + "x = 3\ndef bad():\n    return 3\ndef needs(it):\n    return it\n")
    (tmp_path / "lacks.py").write_text("import no_such_thing\n")
    (tmp_path / "user.py").write_text("from net import make\n")
    assert isinstance(load_model(f"{tmp_path}/user.py:make", None, 10, 1), nn.Module)  # from a file beside it
    net = load_model(f"{code}:make", None, 10, 1)
    safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
    again = load_model(f"{code}:make", tmp_path / "w.safetensors", 10, 1)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again(x), net(x))
    assert not again.training
    body = load_model("torchvision:resnet18", None, 7, 3)
    assert body(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    torch.testing.assert_close(body[0](torch.full((1, 3, 1, 1), 0.485))[0, 0, 0, 0], torch.tensor(0.0))
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:40])
    safetensors.torch.save_file({"1.weight": torch.zeros(10, 64)}, tmp_path / "less.safetensors")
    safetensors.torch.save_file(
        {"1.weight": torch.zeros(9, 64), "1.bias": torch.zeros(10)}, tmp_path / "shape.safetensors"
    )
    safetensors.torch.save_file({**net.state_dict(), "more": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="takes images of 3 channels, these have 4"):
        load_model("torchvision:resnet18", None, 10, 4)
    for source, weights, said in (
        ("net", None, "torchvision:NAME"),
        ("torchvision:resnet81", None, "did you mean"),
        (f"{code}:made", None, "no function 'made'"),
        (f"{code}:x", None, "no function 'x'"),
        (f"{code}:bad", None, "returns a int"),
        (f"{code}:needs", None, "cannot be called without arguments: TypeError"),
        (f"{tmp_path}/lacks.py:make", None, "ModuleNotFoundError"),
        (f"{code}:make", "torn", "torn.safetensors is truncated"),
        (f"{code}:make", "less", "lacks 1 tensors, for example 1.bias"),
        (f"{code}:make", "more", "has, but the model has not, 1 tensors, for example more"),
        (f"{code}:make", "shape", r"1.weight is \(9, 64\)"),
    ):
        with pytest.raises(ValueError, match=said):
            load_model(source, weights and tmp_path / f"{weights}.safetensors", 10, 1)
    missing = ((f"{tmp_path}/no.py:make", None), (f"{code}:make", tmp_path / "no.safetensors"), ("run:nosuch", None))
    for source, weights in missing:
        with pytest.raises(FileNotFoundError, match=r"there is no (file|stored run)"):
            load_model(source, weights, 10, 1)


DISTURBING = """
import os, random, signal, numpy, torch
os.chdir("/")
random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
torch.set_default_dtype(torch.float64), torch.set_num_threads(torch.get_num_threads() + 1)
torch.set_grad_enabled(False), torch.set_float32_matmul_precision("medium")
torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
signal.signal(signal.SIGINT, signal.SIG_IGN)
def make():
    return torch.nn.Linear(64, 10)
def fail():
    torch.set_default_device("meta")
    raise SystemExit
"""


def test_what_a_models_file_changes_of_the_process_is_put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(DISTURBING)

    def process():
        kinds = torch.empty(1).dtype, torch.empty(1).device, torch.get_num_threads(), torch.is_grad_enabled()
        more = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, signal.getsignal(signal.SIGINT)
        return os.getcwd(), *kinds, *more, random.getstate(), np.random.get_state()[1].tolist(), torch.initial_seed()

    before, state = process(), torch.get_rng_state()
    assert load_model("net.py:make", None, 10, 1).weight.dtype == torch.float64
    assert process() == before
    with pytest.raises(ValueError, match="SystemExit"):
        load_model("net.py:fail", None, 10, 1)
    assert process() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_page_is_written_whole_or_not_at_all(found, tmp_path, monkeypatch):
    page = found.html(tmp_path / "a.html")
    before = page.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        found.html(page)
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".html", ".part")] == ["a.html"]
    assert page.read_bytes() == before


@pytest.mark.filterwarnings("ignore::cfol_nb.train.Diverging")  # a few steps
def test_a_stored_run_is_judged_on_images_that_it_has_not_seen(tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("CFOL_NB_RUNS", str(tmp_path / "runs"))
    write_folder(tmp_path / "pets", parts=(".",), classes=("cat", "dog", "eel"), n=20, size=(16, 16))
    name = f"imagefolder:{tmp_path / 'pets'}"
    for dataset, more in (("digits", {}), (name, {"image_size": 12, "model": "smallcnn", "without": ["dog"]})):
        config = tiny(dataset=dataset, split_seed=3, batch_size=8, **more)
        (run,) = compute([config])
        train_set, held, known = prepare(config)
        got = unseen(f"run:{run.folder.name}", dataset)
        keys = [set(map(bytes, part.images.flatten(1).numpy())) for part in (train_set, held, got, known.test)]
        assert not keys[2] & (keys[0] | keys[1])
        assert keys[3] <= keys[2]
        assert len(unseen(f"run:{run.folder}", dataset)) == len(got)
        net = load_model(f"run:{run.folder.name}", None, len(got.class_names), 1)
        assert net(got.images[:2].float() / 255).shape == (2, len(got.class_names))
        with pytest.raises(ValueError, match="unknown weights of this run 'selectd'; did you mean 'selected'"):
            load_model(f"run:{run.folder.name}:selectd", None, len(got.class_names), 1)


def test_a_folder_that_is_not_split_is_judged_whole_also_where_a_class_has_one_image(tmp_path):
    write_folder(tmp_path / "pets", parts=(".",), n=3)
    write_folder(tmp_path / "pets", parts=(".",), classes=("eel",), n=1)
    assert unseen("net.py:make", f"imagefolder:{tmp_path / 'pets'}").counts.tolist() == [3, 3, 1]
    with pytest.raises(ValueError, match="'eel' has 1 image: it cannot be split"):
        load(f"imagefolder:{tmp_path / 'pets'}")


class Tied(nn.Module):
    """Two heads that are one, as in tied autoencoders and language models."""

    def __init__(self):
        super().__init__()
        self.flat, self.body = nn.Flatten(), nn.Linear(64, 64)
        self.head, self.same = nn.Linear(64, 10), nn.Linear(64, 10)
        self.same.weight = self.head.weight

    def forward(self, x):
        return self.head(self.body(self.flat(x))) + self.same(self.flat(x))


@pytest.mark.parametrize("how", ["save_model", "save_file", "the other name", "write_tensors"])
def test_tied_weights_load(tmp_path, how):
    net, other, path = Tied(), Tied(), tmp_path / "w.safetensors"
    state = {k: v.clone() for k, v in net.state_dict().items()}
    if how == "save_model":
        safetensors.torch.save_model(net, path)
    elif how == "write_tensors":
        write_tensors(path, net.state_dict())
    else:
        safetensors.torch.save_file({k: v for k, v in state.items() if how == "save_file" or k != "head.weight"}, path)
    load_weights(other, path)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(other(x), net(x))
    assert other.same.weight is other.head.weight


def test_tied_weights_that_differ_are_refused(tmp_path):
    state = {k: v.clone() for k, v in Tied().state_dict().items()}
    state["same.weight"] += 1
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"head.weight and same.weight are one tensor in the model"):
        load_weights(Tied(), tmp_path / "w.safetensors")
    del state["same.weight"], state["head.weight"]
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"lacks 2 tensors, for example head.weight"):
        load_weights(Tied(), tmp_path / "w.safetensors")


def test_tensors_that_overlap_are_stored(tmp_path):
    whole = torch.arange(6.0)
    write_tensors(tmp_path / "t.safetensors", {"a": whole, "b": whole[1:], "c": whole.view(2, 3)})
    found, _ = read_tensors(tmp_path / "t.safetensors")
    assert found["b"].tolist() == [1, 2, 3, 4, 5]
    assert found["c"].tolist() == [[0, 1, 2], [3, 4, 5]]

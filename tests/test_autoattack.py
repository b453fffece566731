import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch.nn.functional import cross_entropy

from cfol_nb import autoattack as aa
from cfol_nb.attacks import pgd
from cfol_nb.autoattack import Evaluation, TimeUp, autoattack, find_worst, remaining, to_plane
from cfol_nb.config import AutoAttack, RunConfig
from cfol_nb.evaluate import Outcomes, evaluate
from cfol_nb.files import read_tensors, write_tensors
from cfol_nb.models import build
from cfol_nb.stats import accuracies, last_attack

STANDARD = AutoAttack(eps=0.1, version="standard")


@pytest.fixture
def quick(monkeypatch):
    """Fewer queries where Square is not what is looked at."""
    monkeypatch.setattr(aa, "square", lambda batch, f=aa.square: f(batch, 100))


@pytest.fixture(scope="module")
def trained(digits):
    """Small networks of three kinds, trained adversarially for a few steps, in float32."""

    def train(seed: int, model: torch.nn.Module, eps: float) -> torch.nn.Module:
        g = torch.Generator().manual_seed(seed)
        x, y = digits.train.images.float() / 255, digits.train.labels
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(120):
            i = torch.randint(len(y), (128,), generator=g)
            x_adv = pgd(model, x[i], y[i], eps, eps / 2, 3, generator=g)
            optimizer.zero_grad()
            cross_entropy(model(x_adv), y[i]).backward()
            optimizer.step()
        optimizer.zero_grad()
        return model.eval()

    torch.manual_seed(0)
    normed = torch.nn.Sequential(
        torch.nn.Conv2d(1, 12, 3, 2),
        torch.nn.BatchNorm2d(12),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(108, 10),
    )
    small = [build("smallcnn", channels=1, width=8) for _ in range(2)]
    return [train(0, small[0], 0.1), train(1, small[1], 0.03), train(2, normed, 0.1)]


def of_test(digits, n):
    pick = torch.randperm(len(digits.test), generator=torch.Generator().manual_seed(0))[:n]
    return digits.test.images[pick].float() / 255, digits.test.labels[pick]


# -- against closed forms and brute force ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_a_linear_classifier_falls_exactly_inside_its_distance(linear, norm, classes, quick):
    """The distance to the nearest wrong class is a margin over a dual norm (the box is out of reach)."""
    model = linear(16, classes)
    x = 0.5 + 0.05 * torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = model(x).detach()
    y = z.argmax(1)
    w = model.weight.detach()
    dual = 1 if norm == "linf" else 2
    distance = torch.stack(
        [
            torch.stack(
                [(z[i, y[i]] - z[i, c]) / (w[y[i]] - w[c]).norm(p=dual) for c in range(classes) if c != y[i]]
            ).min()
            for i in range(60)
        ]
    )
    eps = distance.median().item()
    assert eps + (0.2 if norm == "linf" else 0.5 * eps) < 0.4 or norm == "l2"
    x_adv = autoattack(model, x, y, eps, norm)
    broken = model(x_adv).argmax(1) != y
    clear = (distance / eps - 1).abs() > 0.005
    assert clear.sum() > 50
    assert torch.equal(broken[clear], (distance < eps)[clear])
    moved = (x_adv - x).flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1)
    assert moved.max() <= eps * 1.0001
    assert (moved[~broken] == 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_on_a_hyperplane_inside_the_box_is_the_optimum(norm):
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(40):
        p, w = rng.random(6), rng.normal(size=6) * (rng.random(6) < 0.8)
        residual = rng.normal() * 1.2
        d = to_plane(torch.tensor(p).view(1, 1, 2, 3), torch.tensor(w).view(1, 1, 2, 3), torch.tensor([residual]), norm)
        d = d.view(-1).numpy()
        assert ((p + d >= -1e-12) & (p + d <= 1 + 1e-12)).all()
        toward = np.where(-np.sign(residual) * w > 0, 1 - p, p)
        reach = np.abs(w) @ np.where(w == 0, 0, toward)
        if reach < abs(residual):  # infeasible: every pixel that helps is at its end
            np.testing.assert_allclose(w @ d, -np.sign(residual) * reach, atol=1e-9)
            continue
        checked += 1
        np.testing.assert_allclose(w @ d, -residual, atol=1e-9)
        bounds = list(zip(-p, 1 - p, strict=True))
        if norm == "linf":  # min t with |d_i| <= t
            a = np.block([[np.eye(6), -np.ones((6, 1))], [-np.eye(6), -np.ones((6, 1))]])
            best = linprog(np.eye(7)[6], a, np.zeros(12), np.r_[w, 0][None], [-residual], [*bounds, (0, None)]).fun
            size = np.abs(d).max()
        else:
            found = minimize(
                lambda v: v @ v,
                d * 0,
                jac=lambda v: 2 * v,
                bounds=bounds,
                constraints={"type": "eq", "fun": lambda v, w=w, r=residual: w @ v + r},
                options={"ftol": 1e-14, "maxiter": 500},
            )
            best, size = math.sqrt(found.fun), np.linalg.norm(d)
        assert size == pytest.approx(best, abs=1e-6)
    assert checked > 20


def test_checkpoints_follow_the_recurrence_of_the_paper():
    """p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06); steps may be halved at ceil(100 p_j)."""
    p = [0.0, 0.22]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    assert aa._checkpoints(100) == {math.ceil(round(100 * q, 6)) for q in p if 0 < q <= 1}


def test_squares_shrink_as_in_the_paper():
    area = {0: 0.8, 10: 0.8, 11: 0.4, 51: 0.2, 201: 0.1, 501: 0.05, 1001: 0.025, 2001: 0.0125, 4001: 0.00625}
    for i, p in area.items():
        side = round(math.sqrt(p * 32 * 32))
        assert aa._side(i, 32, 32, "linf") == side
        assert aa._side(i, 32, 32, "l2") in (side, side + 1)
        assert aa._side(i, 32, 32, "l2") % 2 == 1
    assert (aa._side(4999, 8, 8, "linf"), aa._side(4999, 8, 8, "l2")) == (1, 3)
    assert aa._side(0, 4, 4, "l2") == 4  # never larger than the image


@pytest.mark.parametrize(("h", "w"), [(3, 7), (4, 4), (1, 3), (5, 10)])
def test_bump_is_a_sum_of_nested_rectangles(h, w):
    want = torch.zeros(h, w)
    for j, (r, c) in itertools.product(range(max(h // 2, w // 2) + 1), itertools.product(range(h), range(w))):
        if max(abs(r - h // 2), abs(c - w // 2)) <= j:
            want[r, c] += 1 / (j + 1) ** 2
    torch.testing.assert_close(aa._bump(h, w), want)
    e = aa._eta(5, False)
    assert e.norm() == pytest.approx(1)
    assert (e[:2] > 0).all()
    assert (e[2:] < 0).all()
    assert torch.equal(aa._eta(5, True), e.T)


@pytest.mark.parametrize("k", [2, 3, 4, 10])
def test_targeted_dlr_is_its_formula_and_does_not_care_for_scale(k):
    g = torch.Generator().manual_seed(k)
    z, y = torch.randn(20, k, generator=g, dtype=torch.float64), torch.randint(0, k, (20,), generator=g)
    t = (y + 1) % k
    got = aa.dlr_targeted(z, y, t)
    for i in range(20):
        s = sorted(z[i].tolist(), reverse=True)
        below = 1 if k == 2 else s[0] - (s[2] if k == 3 else (s[2] + s[3]) / 2)
        assert got[i].item() == pytest.approx((z[i, t[i]] - z[i, y[i]]).item() / below, rel=1e-9)
    if k > 2:
        torch.testing.assert_close(aa.dlr_targeted(1e-3 * z, y, t), got, rtol=1e-6, atol=1e-8)


def test_apgd_raises_the_loss_beyond_pgd(trained, digits):
    """Loss at the best point of 100 iterations: at least PGD-100's, though nobody tuned a step size."""
    model = trained[0]
    x, y = of_test(digits, 100)
    keep = []
    right = model(x).argmax(1) == y
    batch = aa.Batch(model, x[right], y[right], None, 0.02, "linf", torch.Generator().manual_seed(0), lambda: None)

    def loss(z, y, _):
        keep.append(cross_entropy(z, y, reduction="none").detach())
        return cross_entropy(z, y, reduction="none")

    with torch.no_grad():
        found = aa.apgd(batch, loss)
    stay = (found == batch.x).flatten(1).all(1)
    assert stay.sum() > 80  # so small a radius breaks few, and their rows stay
    ours = torch.stack([v for v in keep if len(v) == len(keep[-1])]).amax(0).mean()
    x_pgd = pgd(model, batch.x, batch.y, 0.02, 0.002, 100, generator=torch.Generator().manual_seed(0))
    theirs = cross_entropy(model(x_pgd), batch.y, reduction="none")
    assert ours >= 0.999 * (theirs[stay] if len(keep[-1]) == int(stay.sum()) else theirs).mean()


# -- against the authors' package --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_as_strong_as_pyautoattack_image_by_image(trained, digits, norm):
    theirs = pytest.importorskip("pyautoattack")
    x, y = of_test(digits, 60)
    gaps, agreement = [], []
    for model, eps in zip(trained, (0.12, 0.06, 0.1), strict=True):
        eps = eps if norm == "linf" else 6 * eps
        ours = model(autoattack(model, x, y, eps, norm)).argmax(1) == y
        other = theirs.AutoAttack(model, eps=eps, norm={"linf": "Linf", "l2": "L2"}[norm], seed=0)
        other = model(other.run_standard_evaluation(x, y)[0]).argmax(1) == y
        assert 0.05 < other.float().mean() < 0.95  # the comparison says something
        gaps.append((ours.float() - other.float()).mean().item())
        agreement.append((ours == other).float().mean().item())
    print(f"{norm}: ours minus theirs {gaps}, agreement {agreement}")
    assert max(gaps) <= 0.01
    assert np.mean(gaps) <= 0
    assert min(agreement) >= 0.95


# -- the evaluation ----------------------------------------------------------------------------------------------------


def test_the_model_and_the_randomness_of_others_stay_as_they_were(trained, digits, quick):
    model = trained[2].train()
    model.zero_grad()
    x, y = of_test(digits, 12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    x_adv = autoattack(model, x, y, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not x_adv.requires_grad
    assert torch.equal(x_adv, autoattack(model, x, y, 0.1))
    model.eval()


def test_outcomes_say_which_attack_broke_which_image(trained, digits, quick, tmp_path):
    x, y = of_test(digits, 80)
    pgd20 = {"eps": 0.12, "step": 0.015, "steps": 20}
    outcomes = evaluate(trained[0], x, y, {"pgd20": pgd20, "aa": {"eps": 0.12, "version": "standard"}})
    assert list(outcomes.predictions) == ["clean", "pgd20", "aa:apgd-ce", "aa:apgd-t", "aa:fab-t", "aa"]
    assert last_attack(outcomes) == "aa"
    held = [outcomes.correct(a) for a in ("clean", "aa:apgd-ce", "aa:apgd-t", "aa:fab-t", "aa")]
    for more, less in itertools.pairwise(held):
        assert (less <= more).all()  # an image that is broken stays broken
    assert held[-1].sum() <= outcomes.correct("pgd20").sum()
    assert outcomes.attacks["aa"]["unfinished"] == 0
    write_tensors(tmp_path / "o", outcomes.tensors(), outcomes.meta())
    again = Outcomes.from_tensors(*read_tensors(tmp_path / "o"))
    assert list(again.predictions) == list(outcomes.predictions)
    np.testing.assert_array_equal(accuracies(again), accuracies(outcomes))


def test_fast_is_weaker_or_equal_and_says_so(trained, digits, quick):
    x, y = of_test(digits, 60)
    fast = Evaluation(trained[0], x, y, AutoAttack(eps=0.12, version="fast")).run()
    whole = Evaluation(trained[0], x, y, AutoAttack(eps=0.12, version="standard")).run()
    assert fast.attacks == ["apgd-ce", "apgd-t"]
    assert (fast.broken_by < 0).sum() >= (whole.broken_by < 0).sum()
    assert fast.described()["difference"] == "without FAB-T and Square, 3 targets instead of 9"
    assert "difference" not in whole.described()
    assert [r.rank for r in whole.rounds] == [0, *range(1, 10), *range(1, 10), 0]


def test_few_classes_take_fewer_targets_and_say_what_dlr_means(linear, quick):
    x = torch.full((4, 1, 4, 4), 0.5, dtype=torch.float64)
    for k, dlr in ((2, "z_t - z_y"), (3, "(z_t - z_y) / (z_1 - z_3)")):
        model = linear(16, k)
        e = Evaluation(model, x, model(x).argmax(1), AutoAttack(eps=1e-6, version="standard")).run()
        assert e.described()["dlr"] == dlr
        assert e.described()["targets"] == k - 1
        assert (e.broken_by < 0).all()
        assert e.finished.all()


@pytest.mark.parametrize("at", [3, 160, 700])
def test_a_killed_evaluation_goes_on_to_the_same_result(trained, digits, tmp_path, at, quick):
    x, y = of_test(digits, 50)
    whole = Evaluation(trained[0], x, y, STANDARD, batch_size=20).run()
    left = at

    class Killed(BaseException):
        pass

    def stop(_):
        nonlocal left
        left -= 1
        if not left:
            raise Killed

    part = Evaluation(trained[0], x, y, STANDARD, batch_size=20, folder=tmp_path, progress=stop)
    with pytest.raises(Killed):
        part.run()
    again = Evaluation(trained[0], x, y, STANDARD, batch_size=20, folder=tmp_path)
    assert int(again.passed.sum()) > 0 or at == 3
    again.run()
    for name in ("prediction", "broken_by", "passed"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    for other in (Evaluation(trained[1], x, y, STANDARD, folder=tmp_path), Evaluation(trained[0], 1 - x, y, STANDARD)):
        assert not other.passed.any()  # of another model, of other images: nothing to go on from


@pytest.mark.parametrize("change", ["gradient", "small logits"])
def test_what_was_found_of_a_model_that_computes_otherwise_is_not_taken_over(trained, digits, tmp_path, change):
    class Model(torch.nn.Module):
        def __init__(self, repaired):
            super().__init__()
            self.net, self.repaired = trained[0], repaired

        def forward(self, x):
            if change == "small logits":
                return 1e-6 * self.net(x).roll(int(self.repaired), 1)
            rounded = (64 * x).round() / 64
            return self.net(x + (rounded - x).detach() if self.repaired else rounded)

    x, y = of_test(digits, 20)
    how = {"attacks": {"aa": AutoAttack(eps=0.1, version="fast")}, "folder": tmp_path}
    masked, repaired = (evaluate(Model(r), x, y, **how) for r in (False, True))
    fresh = evaluate(Model(True), x, y, how["attacks"])
    np.testing.assert_array_equal(repaired.predictions["aa"], fresh.predictions["aa"])
    assert masked.correct("aa").sum() > repaired.correct("aa").sum()


def test_an_image_whose_logits_are_lost_under_attack_is_wrong_whatever_its_class():
    class Lost(torch.nn.Module):
        def forward(self, x):
            z = torch.stack([x.flatten(1)[:, 0] < 0.5, x.flatten(1)[:, 0] >= 0.5], 1) + x.mean((1, 2, 3))[:, None]
            untouched = (255 * x % 1).amax((1, 2, 3)) < 1e-3
            return torch.where(untouched[:, None], z, z * torch.nan)

    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous()
    y = torch.tensor([0, 1])
    got = evaluate(Lost(), x, y, {"pgd": {"eps": 0.01, "step": 0.003, "steps": 3}})
    assert got.correct("clean").all()
    assert not got.correct("pgd").any()


def test_square_goes_on_inside_a_batch(trained, digits, tmp_path, quick, monkeypatch):
    x, y = of_test(digits, 60)
    for spec in (STANDARD, AutoAttack(eps=0.4, norm="l2", version="standard")):
        whole = Evaluation(trained[0], x, y, spec, batch_size=30).run()
        e = Evaluation(trained[0], x, y, spec, batch_size=30, folder=tmp_path)
        e.run(upto=len(e.rounds) - 1)
        with monkeypatch.context() as patch:
            now, stops = iter(range(10**6)), 0
            patch.setattr(aa.time, "monotonic", now.__next__)
            while not e.finished.all():
                e = Evaluation(trained[0], x, y, spec, batch_size=30, folder=tmp_path, deadline=next(now) + 40)
                try:
                    e.run()
                except TimeUp:
                    stops += 1
        assert stops >= 4  # 100 queries for each of two batches, 40 at a time
        for name in ("prediction", "broken_by", "passed"):
            assert torch.equal(getattr(e, name), getattr(whole, name))
        assert not e.kept


class Scaled(torch.nn.Module):
    """The same weights may compute something else."""

    def __init__(self, net, by):
        super().__init__()
        self.net, self.by = net, by

    def forward(self, x):
        return self.net(self.by * x)


def test_what_was_kept_is_of_what_the_model_computes(trained, digits, tmp_path):
    x, y = of_test(digits, 40)
    for by, passed in ((0.9, False), (1.0, False), (1.0, True)):
        e = Evaluation(Scaled(trained[0], by), x, y, STANDARD, folder=tmp_path)
        assert bool(e.passed.any()) is passed
        e.run(upto=1)


def test_classes_take_turns_so_that_a_part_is_fair(digits, trained):
    labels = torch.arange(4).repeat_interleave(torch.tensor([9, 9, 9, 3]))
    order = aa.interleaved(labels, 0)
    assert sorted(order.tolist()) == list(range(30))
    assert torch.bincount(labels[order[:12]]).tolist() == [3, 3, 3, 3]
    assert torch.bincount(labels[order[12:21]]).tolist() == [3, 3, 3]
    x, y = of_test(digits, 200)
    sort = y.argsort()
    e = Evaluation(trained[0], x[sort], y[sort], STANDARD, batch_size=50)
    _, batch = next(e._pending(aa.interleaved(e.labels, 0), 1))
    assert torch.bincount(e.labels[batch], minlength=10).min() >= 3


@pytest.mark.parametrize("size", [(10, 8), (8, 10), (3, 9), (1, 4)])
def test_square_takes_images_that_are_no_squares(linear, size):
    h, w = size
    model = linear(h * w, 3)
    x = torch.rand(20, 1, h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = model(x).argmax(1)
    for norm, eps in (("linf", 0.2), ("l2", 0.5)):
        batch = aa.Batch(model, x, y, None, eps, norm, torch.Generator().manual_seed(0), lambda *_: None)
        found = aa.square(batch, 60)
        assert (aa._length(found - x, norm) <= eps + 1e-9).all()
        assert 0 <= found.min() <= found.max() <= 1
        assert (model(found).argmax(1) != y).any()


class Gamma(torch.nn.Module):
    """The square root of the pixels first: at black ones its gradient is infinite."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.sqrt())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_infinite_gradients_do_not_stop_an_attack(trained, digits, norm):
    x, y = of_test(digits, 100)
    model = Gamma(trained[1])
    clean = model(x).argmax(1) == y
    eps = 0.1 if norm == "linf" else 0.8
    adv = pgd(model, x, y, eps, eps / 8, 20, norm)
    assert adv.isfinite().all()
    assert (model(adv).argmax(1) == y).sum() < 0.8 * clean.sum()
    e = Evaluation(model, x, y, AutoAttack(eps=eps, norm=norm, version="fast")).run()
    assert (e.broken_by < 0).sum() < 0.6 * clean.sum()


def test_a_deadline_is_kept_inside_a_batch_and_what_is_known_stays(trained, digits, monkeypatch):
    x, y = of_test(digits, 40)
    now = iter(range(10**6))
    monkeypatch.setattr(aa.time, "monotonic", lambda: next(now))
    e = Evaluation(trained[0], x, y, STANDARD, deadline=150)
    with pytest.raises(TimeUp):
        e.run()
    assert next(now) == 152  # one look at the clock per iteration: it stopped at once
    assert 0 < e.described()["unfinished"] < 40
    assert (e.passed[e.broken_by < 0] >= 1).all()


def test_what_an_unfinished_batch_has_broken_is_kept(trained, digits, monkeypatch):
    x, y = of_test(digits, 40)
    now = iter(range(10**6))
    monkeypatch.setattr(aa.time, "monotonic", lambda: next(now))
    e = Evaluation(trained[0], x, y, STANDARD, deadline=30)  # in the middle of the first batch
    with pytest.raises(TimeUp):
        e.run()
    assert not e.passed.any()
    assert 0 < (e.broken_by == 1).sum() < 40
    e.deadline = float("inf")
    monkeypatch.setattr(aa, "square", lambda batch: None)
    assert e.run().finished.all()


def test_progress_rises_to_one(trained, digits, quick):
    x, y = of_test(digits, 30)
    seen = []
    Evaluation(trained[0], x, y, AutoAttack(eps=0.1, version="fast"), batch_size=10, progress=seen.append).run()
    assert 0.97 < seen[-1] <= 1
    assert min(b - a for a, b in itertools.pairwise(seen)) > -1e-6


@pytest.mark.slow
def test_a_compiled_copy_breaks_the_same_images(trained, digits, quick):
    x, y = of_test(digits, 60)
    plain = Evaluation(trained[2], x, y, AutoAttack(eps=0.1, version="fast")).run()
    fast = Evaluation(trained[2], x, y, AutoAttack(eps=0.1, version="fast"), compiled=True).run()
    assert ((plain.broken_by < 0) != (fast.broken_by < 0)).sum() <= 1
    assert all(p.requires_grad for p in trained[2].parameters())


def test_bad_input_is_refused(linear):
    model, x, y = linear(16, 4), torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="8/255"):
        autoattack(model, x, y, 8)
    with pytest.raises(ValueError, match="must lie in"):
        autoattack(model, 255 * x, y)
    with pytest.raises(ValueError, match="standard"):
        autoattack(model, x, y, version="quick")
    with pytest.raises(ValueError, match="float32 or better"):
        autoattack(linear(16, 4).bfloat16(), x, y)
    with pytest.raises(ValueError, match="labels"):
        autoattack(model, x, y + 9)
    with pytest.raises(ValueError, match="labels"):
        autoattack(model, x, y[:2])


def test_a_run_may_be_judged_by_autoattack():
    config = RunConfig(attacks={"aa": {"eps": 0.1, "version": "fast"}, "pgd": {"eps": 0.1, "step": 0.1, "steps": 1}})
    assert isinstance(config.attacks["aa"], AutoAttack)
    assert config.attacks["aa"].passes > 10 * config.attacks["pgd"].passes
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


# -- spending on the weak classes --------------------------------------------------------------------------------------


def test_bounds_of_what_remains_hold_at_their_level():
    rng = np.random.default_rng(0)
    miss = 0
    for _ in range(2000):
        left = int(rng.integers(5, 80))
        total, tried = int(rng.integers(0, left + 1)), int(rng.integers(1, left + 1))
        held = int(rng.hypergeometric(total, left - total, tried))
        low, high = remaining(left, tried, held, 0.05)
        assert held <= low <= high <= left - (tried - held)
        miss += not low <= total <= high
    assert 0.02 < miss / 2000 < 0.10  # two sides of at most 5 % each
    assert remaining(7, 7, 3, 0.01) == (3, 3)
    assert remaining(0, 0, 0, 0.01) == (0, 0)


class Simulated(Evaluation):
    """The attacks break what was decided beforehand: APGD-CE some images, the second round others."""

    def __init__(self, labels, first, second, seed):
        self.labels, self.first, self.second, self.seed = labels, first, second, seed
        self.num_classes, self.rounds = int(labels.max()) + 1, aa.rounds("fast", 10)
        self.broken_by = torch.full((len(labels),), -1, dtype=torch.int8)
        self.passed = torch.zeros(len(labels), dtype=torch.int64)

    def run(self, index=None, upto=None):
        index = torch.arange(len(self.labels)) if index is None else index
        self.broken_by[index[self.first[index]]] = 1
        if upto is None:
            self.broken_by[index[self.second[index] & ~self.first[index]]] = 2
        self.passed[index] = len(self.rounds) if upto is None else upto
        return self


def test_the_budget_finds_the_worst_class_and_spares_the_others():
    truth = torch.tensor([0.30, 0.45, 0.5, 0.55, 0.6, 0.6, 0.65, 0.7, 0.7, 0.75])
    labels = torch.arange(10).repeat_interleave(200)
    named, decided, spent = [], [], []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        first = torch.rand(2000, generator=g) > truth[labels] + 0.08
        second = first | (torch.rand(2000, generator=g) < 0.08 / (truth[labels] + 0.08))
        verdict = find_worst(Simulated(labels, first, second, seed))
        exact = torch.bincount(labels[~second], minlength=10)
        decided.append(verdict.decided)
        named.append(verdict.classes == [int(exact.argmin())] or not verdict.decided)
        spent.append((verdict.attacked.sum() - first.sum()).item() / int((~first).sum()))
        assert (verdict.low * 200 <= exact + 1e-3).float().mean() > 0.85
        assert exact.argmin() in torch.tensor(verdict.classes)
    assert np.mean(named) >= 0.95
    assert np.mean(decided) >= 0.95
    assert np.mean(spent) < 0.5


@pytest.mark.parametrize("n", [20, 30, 60, 1000])
def test_of_any_number_of_images_the_class_with_the_fewest_that_hold_is_named(n):
    """Also where that is decided by the last image, in every count (1/n and a/n are rounded)."""
    for held in range(1, n - 1, max(1, n // 100)):
        labels = torch.arange(3).repeat_interleave(n)
        broken = torch.arange(n).repeat(3) >= torch.tensor([held, held + 1, n])[labels]
        verdict = find_worst(Simulated(labels, broken, broken, 0))
        assert verdict.decided
        assert verdict.classes == [0]
        assert (verdict.low == verdict.high)[:2].all()


def test_equal_classes_are_called_undecided():
    labels = torch.arange(4).repeat_interleave(50)
    broken = (torch.arange(200) % 2).bool()
    verdict = find_worst(Simulated(labels, broken, broken, 0))
    assert not verdict.decided
    assert verdict.classes == [0, 1, 2, 3]
    assert verdict.attacked.tolist() == [50] * 4


def test_find_worst_on_a_real_model_names_the_class_of_the_whole_evaluation(trained, digits, quick, monkeypatch):
    x, y = of_test(digits, 300)
    spec = AutoAttack(eps=0.1, version="fast")
    attack, batches = Evaluation._attack, []
    monkeypatch.setattr(Evaluation, "_attack", lambda self, *a: (batches.append(a), attack(self, *a)))
    verdict = find_worst(Evaluation(trained[1], x, y, spec))
    assert len(batches) <= 30  # four looks at three rounds in two batches, and APGD-CE: classes share a batch
    whole = Evaluation(trained[1], x, y, spec).run()
    n = torch.bincount(y, minlength=10)
    exact = torch.bincount(y[whole.broken_by < 0], minlength=10) / n
    assert exact.argmin() in torch.tensor(verdict.classes)
    assert (verdict.attacked <= n).all()
    assert ((verdict.low <= exact + 1e-6) & (exact <= verdict.high + 1e-6)).all()

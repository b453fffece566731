"""Every technique against its formula, the identity on balanced data, and the pseudo-count."""

import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cfol_nb.features import penultimate
from cfol_nb.methods import METHODS, Batch
from cfol_nb.methods.longtail import FLOOR, SMOOTH
from cfol_nb.models import last_linear
from cfol_nb.runs import compute
from cfol_nb.train import train

COUNTS = np.array([80.0, 40, 20, 10])
LABELS = torch.repeat_interleave(torch.arange(4), torch.from_numpy(COUNTS).long())
BALANCED = torch.arange(40) % 4
Z, Y = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
CE = F.cross_entropy(Z, Y, reduction="none")


def make(name, labels=LABELS, seed=0, examples=1000, **options):
    return METHODS[name](labels, 4, seed, examples, **options)


def loss_of(method, z=Z, y=Y):
    """What is minimised, as AT does it."""
    batch = Batch(None, y, z)
    losses, weight = F.cross_entropy(method.adjust(z, y), y, reduction="none"), method.weigh(batch)
    return method.reduce(losses if weight is None else losses * weight, batch).item()


def by_hand(of_class, z=Z, y=Y):
    """Mean over examples of a NumPy function of (logits of one example, its label)."""
    return np.mean([of_class(row.numpy(), int(c)) for row, c in zip(z, y, strict=True)])


def ce(z, c):
    return np.log(np.exp(z - z.max()).sum()) + z.max() - z[c]


def class_balanced(z, c):
    w = np.array([(1 - 0.99) / (1 - 0.99**n) for n in COUNTS])
    return w[c] * 4 / w.sum() * ce(z, c)  # Y has each of the four classes alike


def ldam(z, c):
    m = 0.5 * (COUNTS / 10) ** -0.25
    return ce(3 * np.where(np.arange(4) == c, z - m[c], z), c)


FORMULAS = {
    "class-balanced": ({"beta": 0.99}, class_balanced),
    "ldam": ({"scale": 3.0}, ldam),
    "balanced-softmax": ({"tau": 0.7}, lambda z, c: ce(z + 0.7 * np.log(COUNTS), c)),
    "cdt": ({"tau": 0.3}, lambda z, c: ce(z / (80 / COUNTS) ** 0.3, c)),
    "focal": ({"gamma": 2.0}, lambda z, c: (1 - np.exp(-ce(z, c))) ** 2 * ce(z, c)),
    "fixed-weights": ({"weights": {"2": 10}}, lambda z, c: (10 if c == 2 else 1) * ce(z, c) * 12 / (9 + 3 * 10)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_is_its_formula(name):
    options, formula = FORMULAS[name]
    options = options if name in ("focal", "fixed-weights") else {**options, "counts": "images"}
    assert loss_of(make(name, **options)) == pytest.approx(by_hand(formula), rel=1e-12)


COUNTED = ["class-balanced", "ldam", "balanced-softmax", "cdt", "resampling"]


@pytest.mark.parametrize("name", [n for n in COUNTED if n != "ldam"])
def test_on_balanced_data_a_technique_of_counts_is_plain_training(name, tiny, digits):
    """The trap: literal counts say nothing on balanced data (nor does the pseudo-count before the first look)."""
    for counts in ("images", "difficulty"):
        assert loss_of(make(name, BALANCED, counts=counts)) == pytest.approx(CE.mean().item(), rel=1e-12)
    drawn = make(name, BALANCED, counts="images").draw(40_000 if name == "resampling" else 40)
    share = torch.bincount(BALANCED[drawn], minlength=4) / len(drawn)
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.012, rtol=0)


def test_ldam_on_balanced_data_is_one_margin_for_all():
    assert loss_of(make("ldam", BALANCED)) == pytest.approx(
        by_hand(lambda z, c: ce(np.where(np.arange(4) == c, z - 0.5, z), c)), rel=1e-12
    )


@pytest.mark.parametrize("name", COUNTED)
def test_the_pseudo_count_follows_the_held_out_accuracy(name):
    """A weak class seems rare: after many looks n_c is its share of the accuracies, at every look a moving average."""
    method = make(name, BALANCED)
    accuracy = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    want = 40 * np.array([0.9, 0.6, 0.3, FLOOR]) / (1.8 + FLOOR)
    method.after_epoch(1, {"robust": accuracy, "clean": accuracy.flip(0)})
    np.testing.assert_allclose(method.trace()["n_c"], SMOOTH * 10 + (1 - SMOOTH) * want)
    for epoch in range(60):
        method.after_epoch(epoch, {"robust": accuracy, "clean": accuracy.flip(0)})
    np.testing.assert_allclose(method.n, want, rtol=1e-4)
    judged = make(name, BALANCED, judged="clean")
    judged.after_epoch(1, {"robust": accuracy, "clean": accuracy.flip(0)})
    assert judged.n.argmin() == 0
    still = make(name, counts="images")
    still.after_epoch(1, {"robust": accuracy, "clean": accuracy})
    np.testing.assert_array_equal(still.n, COUNTS)
    # and it makes an error on the weak class, the strongest being right, cost more than the other way round
    if name == "resampling":
        share = torch.bincount(BALANCED[method.draw(8000)], minlength=4) / 8000
        assert share[3] > 4 * share[0]
    else:
        says = [2 * torch.eye(4, dtype=torch.float64)[[c, c]] for c in (3, 0)]
        losses = [loss_of(method, z, torch.tensor([0, 3])) for z in says]
        assert losses[1] > 1.04 * losses[0]


@pytest.mark.parametrize(
    ("power", "want"), [(0, [0.25] * 4), (0.5, np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()), (1, COUNTS / 150)]
)
def test_resampling_draws_classes_in_the_stated_shares_and_images_alike(power, want):
    index = make("resampling", counts="images", power=power).draw(60_000)
    share = torch.bincount(LABELS[index], minlength=4).numpy() / 60_000
    np.testing.assert_allclose(share, want, atol=0.008)
    last = torch.bincount(index, minlength=150)[-10:].numpy()
    assert abs(last / last.mean() - 1).max() < 0.15


def test_deferred_weights_begin_when_their_share_of_the_run_is_over():
    method = make("class-balanced", counts="images", beta=0.99, start=0.8)
    for _ in range(8):
        assert loss_of(method) == pytest.approx(CE.mean().item())
        method.after_step(Batch(None, torch.zeros(100, dtype=torch.int64)))
    assert loss_of(method) == pytest.approx(by_hand(class_balanced))


def test_fair_weights_are_equation_1_and_never_negative():
    method, accuracy = (
        make("fair-weights", BALANCED, alpha=0.3),
        torch.tensor([0.9, 0.6, 0.4, 0.5], dtype=torch.float64),
    )
    want = np.ones(4)
    for epoch in range(5):
        method.after_epoch(epoch, {"robust": accuracy, "clean": accuracy.flip(0)})
        want = np.maximum(want + np.where(accuracy.numpy() <= 0.6, 0.3, -0.3), 0)
    np.testing.assert_allclose(method.weights, want)
    assert method.weights[0] == 0
    assert loss_of(method) == pytest.approx(
        F.cross_entropy(Z, Y, torch.from_numpy(want)).item()
    )  # torch's weighted mean


def test_fair_weights_can_go_by_what_the_epochs_own_steps_met():
    method = make("fair-weights", BALANCED, split="train")
    for _ in range(2):
        y = torch.tensor([0, 0, 1, 1, 2, 3])
        said = torch.tensor([0, 0, 1, 0, 1, 3])
        method.after_step(Batch(None, y, F.one_hot(said, 4).double()))
    held = torch.tensor([0.0, 0, 1, 1])
    method.after_epoch(1, {"robust": held, "clean": held})
    np.testing.assert_allclose(method.weights, [0.95, 1.05, 1.05, 0.95])  # accuracies 1, 1/2, 0, 1 of 2/3 overall
    method.after_step(Batch(None, torch.tensor([0, 1]), F.one_hot(torch.tensor([1, 1]), 4).double()))
    method.after_epoch(2, {"robust": held, "clean": held})
    assert method.weights[0] == pytest.approx(1.0)  # what was met in epoch 1 is forgotten


def test_trades_keeps_its_regulariser_on_the_logits_as_they_are(linear):
    from cfol_nb.attacks import kl
    from cfol_nb.objectives import TRADES

    model, method = linear(6, 4), make("balanced-softmax", counts="images")
    x = torch.rand(5, 1, 2, 3, dtype=torch.float64)
    x_adv, y = (x + 0.1).clamp(0, 1), torch.arange(5) % 4
    losses, judged, _ = TRADES(beta=3.0)(model, x, x_adv, y, method.adjust)
    prior = torch.from_numpy(np.log(COUNTS / 150))
    want = F.cross_entropy(model(x) + prior, y, reduction="none") + 3 * kl(model(x), model(x_adv))
    torch.testing.assert_close(losses, want)
    torch.testing.assert_close(judged, model(x_adv))


@pytest.mark.parametrize("name", [*COUNTED, "focal", "fixed-weights", "fair-weights"])
def test_trains_and_repeats_itself(name, tiny, digits):
    from cfol_nb.data import limit, split

    parts = split(limit(digits.train, 24), 0.2)
    config = tiny(method=name, epochs=8, lr=0.1)
    done = train(config, *parts)
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    again = train(config, *parts)
    assert all(torch.equal(done.weights["last"][k], v) for k, v in again.weights["last"].items())


# -- a second stage, and after training --------------------------------------------------------------------------------


def weights_of(run):
    head = last_linear(run.model("last"))
    return head.weight.detach(), head.bias.detach()


@pytest.mark.parametrize("statistics", [{}, {"statistics": "moving"}], ids=["frozen", "moving"])
@pytest.mark.parametrize("name", ["crt", "lws"])
def test_the_second_stage_changes_the_classifier_alone(name, statistics, tiny):
    parent = tiny(epochs=6, imbalance={"factor": 4})
    method = {"name": name, "counts": "images", **statistics}
    config = tiny(parent=parent, method=method, epochs=3, weight_decay=0, lr=0.05)
    first, second = compute([parent, config])
    before, after = first.model("last").state_dict(), second.model("last").state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    head = ["1.8.weight", "1.8.bias"]
    assert changed - set(head) == {k for k in before if statistics and k.endswith(("_mean", "_var", "_tracked"))}
    assert changed >= set(head)
    if name == "lws":  # every row is the parent's times one factor, bias included
        factor = torch.cat([after[h].view(10, -1) / before[h].view(10, -1) for h in head], 1)
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=0)
        assert factor[:, 0].std() > 1e-5


def test_lws_is_gradient_descent_on_the_factors(tiny, digits):
    """Against factors f as parameters of their own: z = f * (W h + b), with momentum and weight decay."""
    from cfol_nb.models import build

    torch.manual_seed(0)
    model = build("smallcnn", channels=1, width=4).double()
    x, y = digits.train.images[:50].double() / 255, digits.train.labels[:50]
    seen, _ = penultimate(model, x)
    weight, bias = last_linear(model).weight.detach().clone(), last_linear(model).bias.detach().clone()
    seen, f = seen.detach(), torch.ones(10, dtype=torch.float64, requires_grad=True)
    ours = METHODS["lws"](digits.train.labels, 10)
    ours.start(model)
    learnt = [p for p in model.parameters() if p.requires_grad]
    steps = [torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01) for p in ([f], learnt)]
    for _ in range(5):
        losses = [F.cross_entropy(f * (seen @ weight.T + bias), y), F.cross_entropy(model(x), y)]
        for loss, step in zip(losses, steps, strict=True):
            step.zero_grad()
            loss.backward()
            step.step()
    torch.testing.assert_close(last_linear(model).weight, f.unsqueeze(1) * weight)
    torch.testing.assert_close(last_linear(model).bias, f * bias)
    assert (f - 1).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["crt", "lws"])
def test_a_second_stage_that_was_stopped_goes_on_to_the_same_bytes(name, tiny, digits, tmp_path):
    from cfol_nb.data import limit, split
    from cfol_nb.train import Stopped, new_model

    parts = split(limit(digits.train, 24), 0.2)
    config = tiny(method=name, parent=tiny(), epochs=3)
    initial = new_model(tiny(seed=4), parts[0]).state_dict()
    whole = train(config, *parts, initial=initial)
    checkpoint = tmp_path / "c.safetensors"

    def stop(done, total):
        if done == total // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config, *parts, initial=initial, checkpoint=checkpoint, progress=stop)
    again = train(config, *parts, initial=initial, checkpoint=checkpoint)
    assert all(torch.equal(v, again.weights["last"][k]) for k, v in whole.weights["last"].items())


def test_crt_begins_anew_or_keeps(tiny, digits):
    from cfol_nb.models import build

    for keep in (True, False):
        model = build("smallcnn", channels=1, width=4)
        before = last_linear(model).weight.detach().clone()
        METHODS["crt"](digits.train.labels, 10, keep=keep).start(model)
        assert torch.equal(before, last_linear(model).weight) is keep
        assert not model.training
        assert [p.requires_grad for p in model.parameters()][-3:] == [False, True, True]


def test_post_hoc_changes_are_their_formulas():
    from cfol_nb.methods.longtail import LogitAdjusted, tau_normalised
    from cfol_nb.models import build

    torch.manual_seed(0)
    model, x = build("mlp", num_classes=4, channels=1).double(), torch.rand(6, 1, 8, 8, dtype=torch.float64)
    seen, logits = penultimate(model, x)
    w = last_linear(model).weight
    for tau in (0.0, 0.5, 1.0):
        torch.testing.assert_close(tau_normalised(model, tau)(x), seen @ (w / w.norm(dim=1, keepdim=True) ** tau).T)
    torch.testing.assert_close(model(x), logits)  # a copy was changed
    n = torch.from_numpy(COUNTS)
    torch.testing.assert_close(LogitAdjusted(model, n, 0.5)(x), logits - 0.5 * (n / 150).log())


@pytest.mark.parametrize(("head", "scale", "added"), [("cosine", 10, 0), ("robal", 1, 1 / 32)])
def test_robal_is_its_formula_on_a_cosine_classifier(head, scale, added):
    """s (cos_j - [j = y] (m + tau_m log(n_y / n_min) / s)) + tau_b log pi_j, with s = 10."""
    from cfol_nb.models import build

    torch.manual_seed(0)
    model, x = build("mlp", num_classes=4, channels=1, head=head).double(), torch.rand(12, 1, 8, 8).double()
    seen, z = penultimate(model, x)
    weight = last_linear(model).weight
    cos = F.cosine_similarity(seen.unsqueeze(1), weight.unsqueeze(0), dim=2)
    cos = cos * weight.norm(dim=1) / (weight.norm(dim=1) + added)
    torch.testing.assert_close(z, scale * cos)
    method = make("robal", counts="images")
    method.start(model)

    def formula(c, y):
        m = 0.1 + 0.3 * np.log(COUNTS[y] / 10) / 10
        return ce(10 * (c - np.where(np.arange(4) == y, m, 0)) + 1.5 * np.log(COUNTS / 150), y)

    assert loss_of(method, z, Y) == pytest.approx(by_hand(formula, cos.detach(), Y), rel=1e-9)
    with pytest.raises(ValueError, match="head='robal'"):
        method.start(build("mlp", channels=1))


def test_robal_whole_has_margins_on_the_attacked_image_and_the_divergence_of_the_cosines():
    """CE(10 (cos' - m_y e_y) + 1.5 log pi, y) + 6 KL(softmax cos || softmax cos'), where cos' is of the image that
    attacks CE(cos', y)."""
    from cfol_nb.models import build
    from cfol_nb.objectives import AT

    torch.manual_seed(0)
    model = build("mlp", num_classes=4, channels=1, head="robal").double()
    x, x_adv = torch.rand(2, 12, 1, 8, 8, dtype=torch.float64)
    method = make("robal", counts="images")
    method.start(model)
    objective = AT(beta=6.0)
    losses, logits, _ = objective(model, x, x_adv, Y, method.adjust, method.boundary(Y))
    clean, attacked = (model(v).detach().numpy() for v in (x, x_adv))
    m = 0.1 + 0.03 * np.log(COUNTS / 10)
    want = []
    for a, b, y in zip(clean, attacked, Y.numpy(), strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        z = 10 * (b - m[y] * (np.arange(4) == y)) + 1.5 * np.log(COUNTS / 150)
        want.append(ce(z, y) + 6 * (p * np.log(p / q)).sum())
    np.testing.assert_allclose(losses.detach(), want, rtol=1e-10)
    assert objective.attack_loss == "ce"
    np.testing.assert_allclose(logits.detach(), attacked)


def test_ldam_of_cao_et_al_is_a_scaled_cosine_with_margins():
    from cfol_nb.models import build

    torch.manual_seed(0)
    model, x = build("mlp", num_classes=4, channels=1, head="normalised").double(), torch.rand(12, 1, 8, 8).double()
    seen, z = penultimate(model, x)
    cos = F.cosine_similarity(seen.unsqueeze(1), last_linear(model).weight.unsqueeze(0), dim=2).detach()
    m = 0.5 * (COUNTS / 10) ** -0.25
    want = by_hand(lambda c, y: ce(30 * np.where(np.arange(4) == y, c - m[y], c), y), cos)
    assert loss_of(make("ldam", counts="images", scale=30.0), z.detach()) == pytest.approx(want, rel=1e-9)


def test_what_cannot_be_is_refused_before_work(tiny):
    with pytest.raises(ValueError, match="give the run a parent"):
        compute([tiny(method="crt")])
    with pytest.raises(ValueError, match="head='cosine'"):
        compute([tiny(method="robal")])
    with pytest.raises(ValueError, match="optimizer='adam' is not allowed"):
        compute([tiny(method="lws", parent=tiny(), optimizer="adam")])
    cosine = {"name": "mlp", "head": "cosine"}
    with pytest.raises(ValueError, match="head='linear'"):
        compute([tiny(method="lws", model=cosine, parent=tiny(model=cosine))])
    with pytest.raises(ValueError, match="unknown head"):
        compute([tiny(model={"name": "mlp", "head": "cosin"})])


def test_no_factor_on_the_logits_changes_the_normalised_margin():
    from cfol_nb.attacks import margin, normalised_margin

    torch.testing.assert_close(normalised_margin(Z, Y), normalised_margin(7 * Z + 3, Y))
    assert torch.equal(normalised_margin(Z, Y) > 0, margin(Z, Y) > 0)
    row = Z[0] - Z[0].mean()
    assert normalised_margin(Z, Y)[0] == pytest.approx(((row[1:].max() - row[0]) / row.norm()).item())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("class-balanced", {"beta": 1.0}, "beta"),
        ("class-balanced", {"start": 2}, "start"),
        ("cdt", {"counts": "image"}, "did you mean 'images'"),
        ("focal", {"gamma": -1}, "gamma"),
        ("fixed-weights", {"weights": {"9": 2}}, "label below 4"),
        ("fixed-weights", {"weights": {"1": -2}}, "number >= 0"),
        ("fair-weights", {"split": "test"}, "held"),
        ("resampling", {"power": 1.5}, "power"),
    ],
)
def test_bad_options_are_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        make(name, **options)

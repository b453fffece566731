"""Every technique against its formula, the identity on balanced data, and the pseudo-count."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cfol_nb.methods import METHODS
from cfol_nb.methods.longtail import FLOOR, SMOOTH
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
    return method.reduce(F.cross_entropy(method.adjust(z, y), y, reduction="none"), y, z).item()


def by_hand(of_class, z=Z, y=Y):
    """Mean over examples of a NumPy function of (logits of one example, its label)."""
    return np.mean([of_class(row.numpy(), int(c)) for row, c in zip(z, y, strict=True)])


def ce(z, c):
    return np.log(np.exp(z - z.max()).sum()) + z.max() - z[c]


def class_balanced(z, c):
    w = np.array([(1 - 0.99) / (1 - 0.99**n) for n in COUNTS])
    return w[c] * 4 / w.sum() * ce(z, c)


def ldam(z, c):
    m = 0.5 * (COUNTS / 10) ** -0.25
    return ce(3 * np.where(np.arange(4) == c, z - m[c], z), c)


FORMULAS = {
    "class-balanced": ({"beta": 0.99}, class_balanced),
    "ldam": ({"scale": 3.0}, ldam),
    "balanced-softmax": ({"tau": 0.7}, lambda z, c: ce(z + 0.7 * np.log(COUNTS), c)),
    "cdt": ({"tau": 0.3}, lambda z, c: ce(z / (80 / COUNTS) ** 0.3, c)),
    "focal": ({"gamma": 2.0}, lambda z, c: (1 - np.exp(-ce(z, c))) ** 2 * ce(z, c)),
    "fixed-weights": ({"weights": {"2": 10}}, lambda z, c: (10 if c == 2 else 1) * ce(z, c)),
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
    np.testing.assert_allclose(method.trace()["n"], SMOOTH * 10 + (1 - SMOOTH) * want)
    for epoch in range(60):
        method.after_epoch(epoch, {"robust": accuracy, "clean": accuracy.flip(0)})
    np.testing.assert_allclose(method.n, want, rtol=1e-4)
    judged = make(name, BALANCED, judged="clean")
    judged.after_epoch(1, {"robust": accuracy, "clean": accuracy.flip(0)})
    assert judged.n.argmin() == 0
    still = make(name, counts="images")
    still.after_epoch(1, {"robust": accuracy, "clean": accuracy})
    np.testing.assert_array_equal(still.n, COUNTS)
    # and it makes the weak class count more than the strongest, where both are equally right
    if name == "resampling":
        share = torch.bincount(BALANCED[method.draw(8000)], minlength=4) / 8000
        assert share[3] > 4 * share[0]
    else:
        losses = [loss_of(method, 2 * torch.eye(4, dtype=torch.float64)[[c]], torch.tensor([c])) for c in (0, 3)]
        assert losses[1] > 1.05 * losses[0]


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
        method.after_step(None, torch.zeros(100, dtype=torch.int64), None)
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
    assert loss_of(method) == pytest.approx(by_hand(lambda z, c: want[c] * ce(z, c)))


def test_fair_weights_can_go_by_what_the_epochs_own_steps_met():
    method = make("fair-weights", BALANCED, split="train")
    for _ in range(2):
        y = torch.tensor([0, 0, 1, 1, 2, 3])
        said = torch.tensor([0, 0, 1, 0, 1, 3])
        method.after_step(None, y, F.one_hot(said, 4).double())
    held = torch.tensor([0.0, 0, 1, 1])
    method.after_epoch(1, {"robust": held, "clean": held})
    np.testing.assert_allclose(method.weights, [0.95, 1.05, 1.05, 0.95])  # accuracies 1, 1/2, 0, 1 of 2/3 overall
    method.after_step(None, torch.tensor([0, 1]), F.one_hot(torch.tensor([1, 1]), 4).double())
    method.after_epoch(2, {"robust": held, "clean": held})
    assert method.weights[0] == pytest.approx(1.0)  # what was met in epoch 1 is forgotten


def test_trades_keeps_its_regulariser_on_the_logits_as_they_are(linear):
    from cfol_nb.attacks import kl
    from cfol_nb.objectives import TRADES

    model, method = linear(6, 4), make("balanced-softmax", counts="images")
    x = torch.rand(5, 1, 2, 3, dtype=torch.float64)
    x_adv, y = (x + 0.1).clamp(0, 1), torch.arange(5) % 4
    losses, judged = TRADES(beta=3.0)(model, x, x_adv, y, method.adjust)
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

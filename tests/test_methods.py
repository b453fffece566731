import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from cfol_nb.methods import METHODS
from cfol_nb.methods.cfol import CFOL, FOL
from cfol_nb.methods.cvar import CVaR, LCVaR
from cfol_nb.objectives import OBJECTIVES, TRADES
from cfol_nb.train import train

LABELS = torch.arange(40) % 4


def programme(losses, bound):
    """max q @ losses over the simplex with 0 <= q <= bound, by a linear programme."""
    found = linprog(-np.asarray(losses), A_eq=np.ones((1, len(losses))), b_eq=[1], bounds=[(0, b) for b in bound])
    assert found.success
    return -found.fun


@pytest.mark.parametrize("alpha", [0.07, 0.2, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_cvar_is_the_linear_programme(alpha, seed):
    losses = torch.from_numpy(np.random.default_rng(seed).exponential(size=17))
    ours = CVaR(LABELS, 4, alpha=alpha).reduce(losses, torch.zeros(17, dtype=torch.int64), None)
    assert ours.item() == pytest.approx(programme(losses, np.full(17, 1 / (alpha * 17))), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.07, 0.2, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_lcvar_is_the_linear_programme_over_classes(alpha, seed):
    rng = np.random.default_rng(seed)
    losses, y = rng.exponential(size=23), rng.integers(0, 5, 23)
    y[y == 1] = 0  # class 1 is not in the batch
    present = np.unique(y)
    means, share = [losses[y == c].mean() for c in present], [(y == c).mean() for c in present]
    ours = LCVaR(LABELS, 5, alpha=alpha).reduce(torch.from_numpy(losses), torch.from_numpy(y), None)
    assert ours.item() == pytest.approx(programme(means, np.array(share) / alpha), rel=1e-9)


def test_lcvar_weighs_classes_differently_and_is_not_a_multiple_of_the_mean():
    losses = torch.tensor([1.0, 1.0, 2.0, 2.0, 5.0, 7.0], requires_grad=True)
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    LCVaR(LABELS, 3, alpha=1 / 3).reduce(losses, y, None).backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0, 0, 0, 0, 0.5, 0.5]))


def test_cvar_and_lcvar_of_everything_are_the_mean():
    losses, y = torch.rand(20, dtype=torch.float64), torch.arange(20) % 4
    for method in (CVaR, LCVaR):
        torch.testing.assert_close(method(LABELS, 4, alpha=1.0).reduce(losses, y, None), losses.mean())


def test_permuting_labels_leaves_the_class_wise_loss_unchanged():
    losses, y, order = torch.rand(20, dtype=torch.float64), torch.arange(20) % 4, torch.tensor([2, 3, 1, 0])
    lcvar = LCVaR(LABELS, 4, alpha=0.3)
    torch.testing.assert_close(lcvar.reduce(losses, y, None), lcvar.reduce(losses, order[y], None))


def logits_of(y, wrong):
    z = torch.zeros(len(y), 4)
    z[torch.arange(len(y)), torch.where(wrong, (y + 1) % 4, y)] = 1
    return z


def test_cfol_draws_the_class_that_is_wrong_and_reweighting_weighs_it():
    sampled = CFOL(LABELS, 4, eta=0.05)
    weighed = CFOL(LABELS, 4, eta=0.05, form="reweight")
    for method in (sampled, weighed):
        for _ in range(30):
            index = method.draw(20)
            y = LABELS[index]
            method.after_step(index, y, logits_of(y, y == 2))
    assert sampled.classes.p.argmax() == weighed.classes.p.argmax() == 2
    share = (LABELS[sampled.draw(4000)] == 2).double().mean()
    assert abs(share - sampled.classes.p[2]) < 4 * (0.25 / 4000) ** 0.5
    # the expectation of the reweighted loss over a uniform class is that of the plain loss over a class from p
    class_loss = torch.tensor([0.3, 0.1, 2.0, 0.5], dtype=torch.float64)
    got = weighed.reduce(class_loss, torch.arange(4), None)
    torch.testing.assert_close(got, (weighed.classes.p * class_loss).sum())


def test_reweighted_cfol_divides_by_the_uniform_distribution():
    method = CFOL(LABELS, 4, eta=0.1, form="reweight")
    y = torch.tensor([0, 0, 2, 3])
    method.after_step(torch.zeros(4, dtype=torch.int64), y, logits_of(y, torch.tensor([True, True, True, False])))
    torch.testing.assert_close(method.classes.w, torch.tensor([0.8, 0, 0.4, 0], dtype=torch.float64))


def test_both_forms_of_cfol_agree_in_the_mean_on_imbalanced_classes():
    labels = torch.tensor([0] * 900 + [1] * 100)
    for form in ("sample", "reweight"):
        method = CFOL(labels, 2, eta=0.01, form=form)
        for _ in range(20):
            index = method.draw(100)
            method.after_step(index, labels[index], torch.eye(2)[1 - labels[index]])  # every prediction is wrong
        torch.testing.assert_close(method.classes.w, torch.full((2,), 20.0).double(), rtol=0.2, atol=0)
    y, losses = torch.tensor([0] * 90 + [1] * 10), torch.rand(100, dtype=torch.float64)
    want = sum(method.classes.p[c] * losses[y == c].mean() for c in (0, 1))
    torch.testing.assert_close(method.reduce(losses, y, None), want)


def test_drift_is_eta_times_the_examples_of_the_run():
    assert CFOL(LABELS, 4, examples=40_000 * 200).classes.eta == pytest.approx(5e-6)  # the released commands
    assert FOL(LABELS, 4, examples=40_000 * 200).sampler.eta == pytest.approx(5e-7)
    assert CFOL(LABELS, 4, examples=100, eta=0.5).classes.eta == 0.5


def test_fol_draws_the_example_that_is_wrong():
    method = FOL(LABELS, 4, eta=0.02)
    for _ in range(40):
        index = method.draw(20)
        method.after_step(index, LABELS[index], logits_of(LABELS[index], index == 7))
    assert method.sampler.p.argmax() == 7
    assert method.trace()["p"].argmax() == LABELS[7]
    assert method.trace()["p"].sum().item() == pytest.approx(1)


def test_trades_is_its_formula():
    model, x, x_adv, y = (
        torch.nn.Linear(5, 3).double(),
        torch.rand(8, 5).double(),
        torch.rand(8, 5).double(),
        torch.arange(8) % 3,
    )
    losses, logits = TRADES(beta=2.5)(model, x, x_adv, y)
    p, q = torch.softmax(model(x), 1), torch.softmax(model(x_adv), 1)
    want = -p[torch.arange(8), y].log() + 2.5 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(losses, want)
    torch.testing.assert_close(logits, model(x_adv))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_every_objective(method, objective, tiny, digits):
    from cfol_nb.data import limit, split

    images, held = split(limit(digits.train, 24), 0.2)
    needs = {"parent": tiny()} if METHODS[method].needs_parent else {}
    needs |= {"model": {"name": "smallcnn", "head": "cosine"}} if method == "robal" else {}
    done = train(tiny(method=method, objective=objective, epochs=3, batch_size=32, **needs), images, held)
    assert len(done.history) == 3
    assert done.history[-1]["loss"] < done.history[0]["loss"] * 1.5
    if "p" in done.history[-1]:
        assert sum(done.history[-1]["p"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CVaR(LABELS, 4, alpha=0), "alpha=0"),
        (lambda: LCVaR(LABELS, 4, alpha=2), "alpha=2"),
        (lambda: CFOL(LABELS, 4, form="both"), "reweight"),
        (lambda: CFOL(LABELS, 4, eta=-1), "eta=-1"),
        (lambda: CFOL(LABELS[LABELS != 1], 4), "class 1 has no examples"),
        (lambda: TRADES(beta=-1), "beta=-1"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(make, says):
    with pytest.raises(ValueError, match=says):
        make()

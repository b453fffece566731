"""More class-fair methods of the literature against known answers: targets, hard images, confusion, distillation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cfol_nb.data import limit, split
from cfol_nb.methods import METHODS, Batch, Context
from cfol_nb.methods.csr import spectral_weights
from cfol_nb.objectives import OBJECTIVES
from cfol_nb.train import check, train

LABELS = torch.arange(30) % 3


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def saying(classes, k=3):
    """Logits (n, k) that say these classes."""
    return torch.eye(k, dtype=torch.float64)[classes]


@pytest.fixture(scope="module")
def images(digits):
    return split(limit(digits.train, 24), 0.2)


# -- all of them -------------------------------------------------------------------------------------------------------

RUNS = {"fair-tat": {}, "trix": {"objective": "trades"}, "ham": {}, "csr": {"objective": "trades"}}


@pytest.mark.filterwarnings("ignore::cfol_nb.train.Diverging")  # so short a run is near guessing
@pytest.mark.parametrize("method", RUNS)
def test_a_run_learns_beside_cfol_and_what_the_method_turns_moves(tiny, images, method):
    config = tiny(method=[{"name": "cfol", "drift": 2}, method], epochs=4, **RUNS[method])
    check(config)
    first, *_, last = train(config, *images).history
    assert last["loss"] < first["loss"]
    known = {"epoch", "loss", "lr", "n", "clean", "robust", "p", "warnings"}
    assert any(last[k] != first[k] for k in first.keys() - known)


@pytest.mark.parametrize("method", [m for m in RUNS if {"attack", "right"} & METHODS[m].asks])
def test_without_an_attack_they_are_refused(tiny, method):
    with pytest.raises(ValueError, match=f"'{method}' is about the training attack: objective 'clean' has none"):
        check(tiny(method=method, objective="clean"))


@pytest.mark.parametrize(("name", "given"), [("fair-tat", {"base": -0.1}), ("fair-tat", {"sharpness": float("inf")})])
def test_options_out_of_range_are_refused(name, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}="):
        METHODS[name](LABELS, 3, context=Context(epochs=20, steps=10), **given)


# -- FAIR-TAT ----------------------------------------------------------------------------------------------------------


def test_fair_tat_aims_where_errors_went_and_widens_what_was_right():
    method, generator = METHODS["fair-tat"](LABELS, 3), torch.Generator().manual_seed(0)
    y = torch.arange(60_000) % 3
    aim = method.aim(Batch(None, y), generator)
    assert not (aim == y).any()
    for c in range(3):  # uniform over the others; 20,000 each
        shares = torch.bincount(aim[y == c], minlength=3) / 20_000
        np.testing.assert_allclose(shares, [0 if j == c else 0.5 for j in range(3)], atol=0.015)
    assert torch.equal(method.radius(y), torch.ones(60_000).double())
    # class 0 is right 7 of 10 times, class 1 never, class 2 six of 7; errors go 2, 5 and 3 times to 0, 1 and 2
    y = torch.tensor([0] * 10 + [1] * 3 + [2] * 7)
    said = torch.tensor([0] * 7 + [1] * 3 + [0, 2, 2] + [2] * 6 + [1])
    said = torch.cat([said, torch.tensor([0, 2, 1])])
    y = torch.cat([y, torch.tensor([1, 1, 0])])
    for part in (slice(0, 11), slice(11, None)):
        method.after_step(Batch(None, y[part], saying(said[part])))
    method.epoch_end(1)
    np.testing.assert_allclose(method.trace()["errors as"], [0.2, 0.5, 0.3])
    np.testing.assert_allclose(method.radius(torch.arange(3)), [0.5 + 7 / 11, 0.5, 0.5 + 6 / 7])
    p = np.array([0.247309, 0.450627, 0.302064])
    y = torch.arange(60_000) % 3
    aim = method.aim(Batch(None, y), generator)
    for c in range(3):
        want = np.where(np.arange(3) == c, 0, p)
        np.testing.assert_allclose(torch.bincount(aim[y == c], minlength=3) / 20_000, want / want.sum(), atol=0.015)
    method.epoch_end(2)  # of an epoch of which nothing was seen nothing stays
    np.testing.assert_array_equal(method.trace()["errors as"], np.zeros(3))


# -- TRIX --------------------------------------------------------------------------------------------------------------

P = tensor([0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7])


def test_trix_aims_images_of_easy_classes_and_weighs_as_dafa():
    method, generator = METHODS["trix"](LABELS, 3, warm_up=1), torch.Generator().manual_seed(0)
    y = torch.tensor([0, 0, 1, 2])
    assert (method.aim(Batch(None, y), generator) == -1).all()  # nothing is known yet
    method.after_step(Batch(None, y, P[y].log(), P[y].log()))
    aim = method.aim(Batch(None, y.repeat(20_000)), generator).view(-1, 4)
    assert (aim[:, 2] == -1).all()
    for i, others in enumerate([[1, 2], [1, 2], None, [0, 1]]):
        if others:
            assert set(aim[:, i].tolist()) == set(others)
            assert (aim[:, i] == others[0]).double().mean() == pytest.approx(0.5, abs=0.015)
    np.testing.assert_allclose(method.trace()["clean weights"], [0.95, 1.33, 0.72])
    np.testing.assert_array_equal(method.radius(y), np.ones(4))
    method.epoch_end(1)
    for factor in (method.radius(y), method.weigh(Batch(None, y)), 1 / method.boundary(y)):
        np.testing.assert_allclose(factor, [0.95, 0.95, 1.33, 0.72])


def test_trix_knows_nothing_of_a_class_that_it_has_not_seen():
    method, y = METHODS["trix"](LABELS, 3, warm_up=1), torch.tensor([0, 2])
    method.after_step(Batch(None, y, P[y].log(), P[y].log()))
    np.testing.assert_allclose(method.trace()["clean weights"], [1.07, 1, 0.93])


def test_trix_remembers_an_epoch():
    """Every step counts (1 - 1/m) times as much as the next one, in an epoch of m steps."""
    method = METHODS["trix"](LABELS, 3, context=Context(9, per_epoch=4), warm_up=1)
    g = torch.Generator().manual_seed(1)
    steps = [(torch.randint(3, (5,), generator=g), torch.randn(5, 3, generator=g).double()) for _ in range(6)]
    for y, z in steps:
        method.after_step(Batch(None, y, z, z))
    y, z = (torch.cat(v) for v in zip(*steps, strict=True))
    age = 0.75 ** torch.arange(6).flip(0).repeat_interleave(5).double()
    for c in range(3):
        want = (age[y == c, None] * z[y == c].softmax(1)).sum(0) / age[y == c].sum()
        torch.testing.assert_close(method.said_clean[c] / method.drawn_clean[c], want)


# -- HAM ---------------------------------------------------------------------------------------------------------------


def test_ham_learns_from_the_images_that_some_steps_break():
    method = METHODS["ham"](LABELS, 3, context=Context(4, steps=10), warm_up=1)
    at_s, y = tensor([2, 1, 0], [0, 1, 2], [0, 3, 1]), torch.tensor([0, 1, 1])
    right = torch.zeros(3, 10, dtype=torch.bool)
    right[:, 3] = at_s.argmax(1) == y
    batch, losses = Batch(None, y, at_s, right=right), F.cross_entropy(at_s, y, reduction="none")
    np.testing.assert_array_equal(method.weigh(batch), np.ones(3))
    method.after_step(batch)
    method.epoch_end(1)
    assert method.reduce(losses * method.weigh(batch), batch).item() == pytest.approx(1.407606, abs=1e-6)
    np.testing.assert_array_equal(method.trace()["hard"], [0, 0.5, 0])
    none = batch._replace(right=torch.ones(3, 10, dtype=torch.bool))
    assert method.reduce(losses * method.weigh(none), none).item() == 0
    assert METHODS["ham"](LABELS, 3, context=Context(120, steps=10)).warm_up == 49


# -- CSR ---------------------------------------------------------------------------------------------------------------

CONFUSED = tensor([0, 3, 1], [2, 0, 4], [0, 1, 0])  # predicted classes in rows
M = tensor([0.319385, 0.174670, 0.718402], [0.911425, 0.512996, 2.01], [0.031227, 0.01, 0.089754])


def test_csr_weighs_errors_by_the_gradient_of_the_spectral_norm():
    assert torch.linalg.matrix_norm(CONFUSED, 2).item() == pytest.approx(4.631722, abs=1e-6)
    report = CONFUSED.T + torch.diag(tensor(50, 60, 70))  # as the loop reports, right ones too
    torch.testing.assert_close(spectral_weights(report), M, rtol=0, atol=1e-6)
    errors = CONFUSED.clone().requires_grad_()
    torch.linalg.matrix_norm(errors, 2).backward()
    g = errors.grad
    torch.testing.assert_close(spectral_weights(report), 2 * (g - g.min()) / (g.max() - g.min()) + 0.01)
    torch.testing.assert_close(spectral_weights(torch.eye(3).double()), torch.full((3, 3), 0.01).double())


def test_csrs_loss_is_that_of_the_formula():
    method, y = METHODS["csr"](LABELS, 3), torch.tensor([0, 1, 2, 2])
    method.after_epoch(0, {"robust confusion": CONFUSED.T})
    model, x, x_adv = torch.nn.Linear(5, 3).double(), torch.rand(4, 5).double(), torch.rand(4, 5).double()
    losses, logits, _ = OBJECTIVES["trades"]()(model, x, x_adv, y, boundary=method.boundary(y))
    p, q, i = model(x).log_softmax(1), model(x_adv).log_softmax(1), range(4)
    want = -0.7 * p[i, y] + 6 * (p.exp() * (p - q)).sum(1) - 0.3 * M[q.argmax(1), y] * q[i, y]
    torch.testing.assert_close(method.reduce(losses, Batch(None, y, logits)), want.mean(), rtol=1e-6, atol=0)

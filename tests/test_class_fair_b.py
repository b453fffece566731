"""More class-fair methods of the literature against known answers: targets, hard images, confusion, distillation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cfol_nb.attacks import as_float
from cfol_nb.config import RunConfig
from cfol_nb.data import limit, split
from cfol_nb.engine import make_step
from cfol_nb.methods import METHODS, Batch, Context
from cfol_nb.methods.csr import spectral_weights
from cfol_nb.methods.longtail import tau_normalised
from cfol_nb.models import build, last_linear
from cfol_nb.objectives import OBJECTIVES
from cfol_nb.train import check, new_model, train

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

# what is published, by method; "erm" of the objectives
RUNS = [
    ("fair-tat", {}),
    ("trix", {"objective": "trades"}),
    ("ham", {}),
    ("csr", {"objective": "trades"}),
    ("csr", {"objective": "trades", "awp": 0.005}),
    ("erm", {"objective": "ard"}),
    ("erm", {"objective": "rslad"}),
    ("fair-ard", {"objective": "ard"}),
    ("fair-ard", {"objective": "rslad"}),
    ("absld", {"objective": "rslad"}),
    ("erm", {"objective": "mart"}),
]


@pytest.mark.filterwarnings("ignore::cfol_nb.train.Diverging")  # so short a run is near guessing
@pytest.mark.parametrize(("method", "given"), RUNS, ids=str)
def test_a_run_learns_beside_cfol_and_what_the_method_turns_moves(tiny, images, method, given):
    taught = given.get("objective") in ("ard", "rslad")
    needs = {"teacher": tiny(model={"name": "smallcnn", "width": 24})} if taught else {}
    config = tiny(method=[{"name": "cfol", "drift": 2}, method], epochs=4, **given, **needs)
    check(config)
    teacher = new_model(config.teacher, images[0]) if taught else None
    first, *_, last = train(config, *images, teacher=teacher).history
    assert last["loss"] < first["loss"]
    known = {"epoch", "loss", "lr", "n", "clean", "robust", "p", "warnings"}
    assert method == "erm" or any(last[k] != first[k] for k in first.keys() - known)


@pytest.mark.parametrize("method", ["fair-tat", "trix", "ham", "fair-ard"])
def test_without_an_attack_they_are_refused(tiny, method):
    with pytest.raises(ValueError, match=f"'{method}' is about the training attack: objective 'clean' has none"):
        check(tiny(method=method, objective="clean"))


@pytest.mark.parametrize(("name", "given"), [("fair-tat", {"base": -0.1}), ("fair-tat", {"sharpness": float("inf")})])
def test_options_out_of_range_are_refused(name, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}="):
        METHODS[name](LABELS, 3, context=Context(epochs=20, steps=10), **given)


@pytest.mark.parametrize(
    ("objective", "given"), [("mart", {"beta": -1.0}), ("ard", {"temperature": 0.0}), ("ard", {"temperature": -30.0})]
)
def test_options_of_an_objective_out_of_range_are_refused(objective, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}="):
        check(RunConfig(objective={"name": objective, **given}))


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


# -- distillation ------------------------------------------------------------------------------------------------------


def kl_by_hand(p, q):
    return (p * (p.log() - q.log())).sum(1)


def test_ard_and_rslad_are_the_formulas():
    model, x, x_adv, y = torch.nn.Linear(5, 3).double(), torch.rand(4, 5).double(), torch.rand(4, 5).double(), None
    taught = torch.randn(2, 4, 3).double() * 4
    adversarial, clean = taught.softmax(2)
    losses, logits, _ = OBJECTIVES["ard"](temperature=30.0)(model, x, x_adv, y, teacher=taught)
    want = 30**2 * kl_by_hand((taught[0] / 30).softmax(1), (model(x_adv) / 30).softmax(1))
    torch.testing.assert_close(losses, want)
    theirs = F.kl_div((logits / 30).log_softmax(1), (taught[0] / 30).softmax(1), reduction="batchmean")
    torch.testing.assert_close(losses.mean(), 30**2 * theirs)
    losses, *_ = OBJECTIVES["rslad"]()(model, x, x_adv, y, teacher=taught)
    parts = kl_by_hand(adversarial, model(x_adv).softmax(1)), kl_by_hand(clean, model(x).softmax(1))
    torch.testing.assert_close(losses, 5 / 6 * parts[0] + 1 / 6 * parts[1])
    losses, *_ = OBJECTIVES["rslad"]()(model, x, x_adv, y, boundary=torch.zeros(4), teacher=taught)
    torch.testing.assert_close(losses, 1 / 6 * parts[1])


def test_a_student_like_its_teacher_has_nothing_to_learn():
    model, x = torch.nn.Linear(5, 3).double(), torch.rand(4, 5).double()
    taught = model(x).detach(), model(x).detach()
    for name in ("ard", "rslad"):
        losses, *_ = OBJECTIVES[name]()(model, x, x, None, teacher=taught)
        losses.sum().backward()
        torch.testing.assert_close(losses, torch.zeros(4).double())
        torch.testing.assert_close(model.weight.grad, torch.zeros(3, 5).double())


@pytest.mark.parametrize("objective", ["ard", "rslad"])
def test_what_the_distillation_losses_would_not_use_is_refused(tiny, objective):
    needs = {"objective": objective, "teacher": tiny()}
    check(tiny(**needs, method="cfol+dafa"))
    with pytest.raises(ValueError, match=f"'{objective}' has no cross-entropy that label_smoothing could change"):
        check(tiny(**needs, label_smoothing=0.1))
    for method in ("balanced-softmax", "cfol+ldam"):
        with pytest.raises(ValueError, match="has no cross-entropy that method '" + method.replace("+", "\\+")):
            check(tiny(**needs, method=method))
    with pytest.raises(ValueError, match="needs a teacher: give the run one"):
        check(tiny(objective=objective))
    with pytest.raises(ValueError, match="'absld' needs the objective 'rslad'"):
        check(tiny(method="absld", teacher=tiny()))


@pytest.mark.parametrize("objective", ["mart", "ard", "rslad"])
def test_with_n_fgsm_a_step_is_the_objective_at_its_images(images, objective):
    """rslad attacks from the teacher's prediction, whose gradient at the image itself is not 0: k = 0 is allowed."""
    k = 0.0 if objective == "rslad" else 2.0
    config = RunConfig(
        objective=objective,
        training_attack={"name": "n-fgsm", "k": k},
        model={"name": "smallcnn", "width": 4},
        teacher=None if objective == "mart" else RunConfig(),
    )
    check(config)
    model, teacher = (build("smallcnn", num_classes=10, channels=1, width=w).double() for w in (4, 8))
    loss, index = OBJECTIVES[objective](), torch.arange(24)
    pixels, y = images[0].images[:24], images[0].labels[:24]
    given = model, loss, METHODS["erm"](LABELS, 10), torch.optim.SGD(model.parameters(), 0.0)
    step = make_step(config, "eager", *given, torch.Generator().manual_seed(1), 0, False, None, teacher)
    x = as_float(pixels, torch.float64, "cpu")
    noisy = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) * 2 - 1
    noisy = (x + k * config.eps * noisy).clamp(0, 1).requires_grad_()
    taught, said = teacher(x).detach(), model(noisy)
    up = kl_by_hand(taught.softmax(1), said.softmax(1)) if objective == "rslad" else F.cross_entropy(said, y)
    (g,) = torch.autograd.grad(up.sum(), noisy)
    x_adv = (noisy.detach() + config.eps * g.sign()).clamp(0, 1)
    extra = {} if objective == "mart" else {"teacher": (taught, taught)}
    torch.testing.assert_close(step(pixels, y, index)[0], loss(model, x, x_adv, y, **extra)[0].detach().mean())


def test_fair_ard_weighs_classes_whose_images_survive_few_steps():
    method, y = METHODS["fair-ard"](LABELS, 3), torch.tensor([0, 0, 1, 2, 2])
    steps = torch.tensor([10, 6, 4, 1, 3])
    batch = Batch(None, y, right=torch.arange(10) < steps[:, None])
    assert torch.equal(method.weigh(batch), torch.ones(5).double())
    method.after_step(batch)
    method.epoch_end(1)
    want = tensor(0.833333, 0.833333, 0.833333, 2.285711, 2.285711)  # of kappa = 8, 4, 2
    torch.testing.assert_close(method.weigh(batch), want, rtol=0, atol=1e-6)
    batch = Batch(None, y, right=steps[:, None] > 20)  # none survives a step
    method.after_step(batch)
    method.epoch_end(2)
    torch.testing.assert_close(method.weigh(batch), torch.ones(5).double())


def of_loss(y, ce):
    """(n, 3) logits with this cross-entropy."""
    p = torch.exp(-ce)
    return ((1 - p) / 2)[:, None].expand(-1, 3).scatter(1, y[:, None], p[:, None]).log()


def test_absld_sharpens_the_labels_of_hard_classes():
    method, y = METHODS["absld"](LABELS, 3, context=Context(300)), torch.tensor([0, 1, 1, 2, 2])
    adversarial = tensor(3, 1.5, 2.5, 0.5, 1.5)  # in the mean 3, 2, 1
    clean = tensor(0.2, 0.1, 0.3, 0.2, 0.2)  # in the mean equal
    batch, taught = Batch(None, y, of_loss(y, adversarial), of_loss(y, clean)), torch.randn(5, 3).double()
    assert all(torch.equal(t, taught) for t in method.soften(taught, y))
    method.after_step(batch)
    method.epoch_end(1)
    torch.testing.assert_close(method.trace()["tau"], tensor(0.9, 1.0, 1.1))
    torch.testing.assert_close(method.trace()["tau clean"], tensor(1.0, 1.0, 1.0), rtol=0, atol=1e-6)
    for got, tau in zip(method.soften(taught, y), (tensor(0.9, 1.0, 1.1), tensor(1.0, 1.0, 1.0)), strict=True):
        torch.testing.assert_close(got, taught / tau[y, None], rtol=1e-6, atol=0)
    for epoch, tau in ((214, 0.8), (215, 0.79), (285, 0.7899)):
        method.after_step(batch)
        method.epoch_end(epoch)
        assert method.tau[0, 0].item() == pytest.approx(tau)
    for _ in range(50):
        method.after_step(batch)
        method.epoch_end(1)
    torch.testing.assert_close(method.tau[0], tensor(0.5, 1.0, 5.0))


# -- MART --------------------------------------------------------------------------------------------------------------


def test_mart_by_hand():
    """p(x') = (.5, .3, .2) and (.2, .2, .6), p(x) = (.7, .2, .1) and (.1, .6, .3); labels 0 and 1."""
    adversarial = tensor([0.5, 0.3, 0.2], [0.2, 0.2, 0.6])
    clean = tensor([0.7, 0.2, 0.1], [0.1, 0.6, 0.3])
    y, log = torch.tensor([0, 1]), np.log
    want = [
        -log(0.5) - log(0.7) + 6 * (0.7 * log(0.7 / 0.5) + 0.2 * log(0.2 / 0.3) + 0.1 * log(0.1 / 0.2)) * 0.3,
        -log(0.2) - log(0.4) + 6 * (0.1 * log(0.1 / 0.2) + 0.6 * log(0.6 / 0.2) + 0.3 * log(0.3 / 0.6)) * 0.4,
    ]
    losses, judged, seen = OBJECTIVES["mart"]()(lambda z: z.log(), clean, adversarial, y)
    np.testing.assert_allclose(losses, want)
    assert torch.equal(judged, adversarial.log())
    assert torch.equal(seen, clean.log())
    losses, *_ = OBJECTIVES["mart"]()(lambda z: z.log(), clean, adversarial, y, boundary=tensor(0, 0))
    np.testing.assert_allclose(losses, [-log(0.5 * 0.7), -log(0.2 * 0.4)])
    z = tensor([0.0, 800.0, 1.0]).requires_grad_()  # p_1 is 1 to rounding
    losses, *_ = OBJECTIVES["mart"]()(lambda v: v, z, z, torch.tensor([0]))
    losses.sum().backward()
    assert losses.item() == pytest.approx(800 + 800 - np.log(1 + np.e))
    assert z.grad.isfinite().all()


# -- after training ----------------------------------------------------------------------------------------------------


def test_hwnwb_brings_the_weights_of_the_classes_to_length_1_and_keeps_their_bias():
    model, x = build("mlp", num_classes=4, channels=1).double(), torch.rand(6, 1, 8, 8).double()
    head = last_linear(model)
    unbiased, w = model(x) - head.bias, head.weight.norm(dim=1)
    torch.testing.assert_close(tau_normalised(model, keep_bias=True)(x), unbiased / w + head.bias)

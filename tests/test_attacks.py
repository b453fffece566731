import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cfol_nb.attacks import fgsm, kl, margin, n_fgsm, pgd
from cfol_nb.audit import audit
from cfol_nb.autoattack import autoattack
from cfol_nb.evaluate import evaluate


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand(16, 1, 6, 6, generator=generator(1), dtype=torch.float64)


@pytest.fixture
def labels():
    return torch.randint(0, 2, (16,), generator=generator(2))


@pytest.fixture
def curved():
    """A small network whose loss is not monotone along an attack, with a batch norm to notice modes."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(128, 4)
    ).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
    return net


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_linf_reaches_the_optimum_of_a_linear_classifier_also_at_the_edges_of_the_box(
    linear, images, labels, loss, random_start
):
    model, eps = linear(36, 2), 0.1
    images = images.clone()
    images[:4], images[4:8] = 0.0, 1.0
    away = torch.sign(model.weight[1 - labels] - model.weight[labels]).view_as(images)
    best = (images + eps * away).clamp(0, 1)
    found = pgd(model, images, labels, eps, eps / 4, 12, loss=loss, random_start=random_start, generator=generator())
    torch.testing.assert_close(found, best, rtol=0, atol=1e-12)


def test_l2_reaches_the_optimum_of_a_linear_classifier_inside_the_box(linear, labels):
    model, eps = linear(36, 2), 0.2
    images = torch.full((16, 1, 6, 6), 0.5, dtype=torch.float64)
    d = (model.weight[1 - labels] - model.weight[labels]).view_as(images)
    best = images + eps * d / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = pgd(model, images, labels, eps, eps / 4, 60, norm="l2", generator=generator())
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)


def test_targeted_reaches_the_optimum_towards_the_target(linear, images, labels):
    model, eps = linear(36, 2), 0.1
    best = (images + eps * torch.sign(model.weight[labels] - model.weight[1 - labels]).view_as(images)).clamp(0, 1)
    found = pgd(model, images, labels, eps, eps / 4, 12, targeted=True, generator=generator())
    torch.testing.assert_close(found, best, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.0, 0.07, "each"])
def test_stays_in_ball_and_box(curved, images, norm, eps):
    y = torch.randint(0, 4, (16,), generator=generator())
    radius = torch.linspace(0, 0.5, 16, dtype=torch.float64) if eps == "each" else eps
    for start in (True, False):
        found = pgd(curved, images, y, radius, 0.05, 5, norm=norm, random_start=start, generator=generator())
        assert found.min() >= 0
        assert found.max() <= 1
        d = (found - images).flatten(1)
        size = d.abs().amax(1) if norm == "linf" else d.norm(dim=1)
        assert (size <= torch.as_tensor(radius) + 1e-12).all()
        assert not found.requires_grad


def test_radius_per_example_is_the_radius_of_each_alone(curved, images):
    y, radius = torch.arange(16) % 4, torch.linspace(0, 0.3, 16, dtype=torch.float64)
    together = pgd(curved, images, y, radius, radius / 4, 6, random_start=False)
    for i in range(16):
        alone = pgd(
            curved, images[i : i + 1], y[i : i + 1], float(radius[i]), float(radius[i]) / 4, 6, random_start=False
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)


def test_leaves_modes_and_gradients_alone(curved, images):
    curved.train()
    curved[1].eval()  # a frozen batch norm must stay frozen
    modes = [m.training for m in curved.modules()]
    before = {k: v.clone() for k, v in curved.state_dict().items()}
    marker = torch.ones_like(curved[0].weight)
    curved[0].weight.grad = marker.clone()
    pgd(curved, images, torch.arange(16) % 4, 0.1, 0.02, 3)
    assert [m.training for m in curved.modules()] == modes
    assert torch.equal(curved[0].weight.grad, marker)
    assert curved[4].weight.grad is None
    assert all(torch.equal(before[k], v) for k, v in curved.state_dict().items())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equals_foolbox_at_equal_steps(curved, images, norm):
    foolbox = pytest.importorskip("foolbox")
    curved.eval()
    y = curved(images).argmax(1)
    attack = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm](
        abs_stepsize=0.05, steps=10, random_start=False
    )
    theirs, _, _ = attack(foolbox.PyTorchModel(curved, (0, 1)), images, y, epsilons=0.2)
    ours = pgd(curved, images, y, 0.2, 0.05, 10, norm=norm, random_start=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert (ours - images).abs().max() > 0.04


def test_best_is_the_highest_loss_on_the_way_for_every_image(curved, images):
    y, steps = torch.arange(16) % 4, 7
    way = [pgd(curved, images, y, 0.6, 0.4, k, random_start=False) for k in range(1, steps + 1)]
    curved.eval()
    losses = torch.stack([F.cross_entropy(curved(a), y, reduction="none") for a in [images, *way]])
    found = pgd(curved, images, y, 0.6, 0.4, steps, random_start=False, best=True)
    reached = F.cross_entropy(curved(found), y, reduction="none")
    torch.testing.assert_close(reached, losses.amax(0), rtol=1e-12, atol=0)
    assert (reached > losses[-1]).any()  # the last point is not the best for some: the test can fail


def test_restarts_break_at_least_what_one_start_breaks(curved, images):
    curved.eval()
    y = curved(images).argmax(1)
    once = curved(pgd(curved, images, y, 0.02, 0.01, 2, generator=generator())).argmax(1) != y
    many = curved(pgd(curved, images, y, 0.02, 0.01, 2, generator=generator(), restarts=8)).argmax(1) != y
    assert (once <= many).all()
    assert many.sum() > once.sum()


def test_fgsm_is_one_signed_step(linear, images, labels):
    model = linear(36, 2)
    x = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
    torch.testing.assert_close(fgsm(model, images, labels, 0.1), (images + 0.1 * grad.sign()).clamp(0, 1))


def test_margin_and_kl_are_their_formulas():
    z, r, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 5
    for i in range(9):
        others = [float(z[i, c]) for c in range(5) if c != y[i]]
        assert margin(z, y)[i].item() == pytest.approx(max(others) - float(z[i, y[i]]))
    p, q = (np.exp(a.numpy()) / np.exp(a.numpy()).sum(1, keepdims=True) for a in (r, z))
    np.testing.assert_allclose(kl(r, z), (p * np.log(p / q)).sum(1), rtol=1e-12)


def test_kl_attack_moves_the_prediction_and_needs_no_labels(curved, images):
    curved.eval()
    clean = curved(images).detach()
    a, b = (pgd(curved, images, torch.full((16,), y), 0.2, 0.05, 5, loss="kl", generator=generator()) for y in (0, 3))
    assert torch.equal(a, b)
    noise = (images + 0.2 * (2 * torch.rand(images.shape, generator=generator(), dtype=torch.float64) - 1)).clamp(0, 1)
    assert kl(clean, curved(a)).mean() > 2 * kl(clean, curved(noise)).mean()


def test_random_l2_start_is_uniform_in_the_ball(linear):
    """P(|d| <= r) = (r / eps)^dim: the radii to the power dim are uniform (Kolmogorov-Smirnov)."""
    from scipy.stats import kstest

    x, y = torch.full((4000, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(4000, dtype=torch.int64)
    found = pgd(linear(4, 2), x, y, 0.3, 0.0, 1, norm="l2", generator=generator())
    assert kstest(((found - x).flatten(1).norm(dim=1) / 0.3).numpy() ** 4, "uniform").pvalue > 0.001


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eps": 8}, "8/255"),
        ({"eps": -0.1}, "not a radius"),
        ({"eps": float("nan")}, "not a radius"),
        ({"eps": torch.tensor([0.1] * 15 + [2.0])}, "not a radius"),
        ({"norm": "l1"}, "linf"),
        ({"steps": 0}, "at least 1"),
        ({"restarts": 0}, "at least 1"),
        ({"step": -1}, "step=-1"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, "as many labels"),
        ({"y": torch.zeros(16)}, "as many labels"),
        ({"loss": "dlr"}, "margin"),
        ({"x": torch.rand(16, 1, 6, 6) * 255}, "normalise inside"),
        ({"x": torch.zeros(16, 1, 6, 6, dtype=torch.uint8)}, "255"),
        ({"x": torch.full((16, 1, 6, 6), float("nan"))}, r"\[0, 1\]"),
        ({"eps": torch.rand(3)}, "one per image"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(linear, images, labels, change, says):
    given = {"x": images, "y": labels, "eps": 0.1, "step": 0.02, "steps": 2, **change}
    with pytest.raises(ValueError, match=says):
        pgd(linear(36, 2), **given)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("each", [False, True])
def test_retiring_keeps_the_first_point_that_is_misclassified(curved, images, norm, each):
    """Against a loop that attacks every image to the end and notes when it was first wrong."""
    curved.eval()
    labels = curved(images).argmax(1)
    eps, steps = 0.06, 12
    eps = torch.linspace(0.02, 0.08, 16, dtype=torch.float64) if each else eps
    eps = eps * (4 if norm == "l2" else 1)
    step = eps / 5
    path = []

    def seen(z, y):
        path.append(z.argmax(1) != y)
        return F.cross_entropy(z, y, reduction="none")

    points = [
        pgd(curved, images, labels, eps, step, s, norm, generator=generator(5)) for s in range(1, steps + 1)
    ]  # the path: the same start, so the first s steps are the same
    start = pgd(curved, images, labels, eps, 0 * step, 1, norm, generator=generator(5))
    want = points[-1].clone()
    done = torch.zeros(16, dtype=torch.bool)
    for p in [start, *points[:-1]]:
        wrong = (curved(p).argmax(1) != labels) & ~done
        want[wrong], done = p[wrong], done | wrong
    found = pgd(curved, images, labels, eps, step, steps, norm, loss=seen, generator=generator(5), retire=True)
    assert 3 < done.sum() < 16
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    assert len(path[0]) == 16 > len(path[-1])  # rows were dropped
    with pytest.raises(ValueError, match="retire"):
        pgd(curved, images, labels, 0.1, restarts=2, retire=True)


# -- what every entry to an attack makes of its input ------------------------------------------------------------------

ENTRIES = {
    "pgd": lambda model, x, y: pgd(model, x, y, 0.1, 0.05, 3, random_start=False),
    "autoattack": lambda model, x, y: autoattack(model, x, y, 0.1, version="fast"),
    "evaluate": lambda model, x, y: evaluate(
        model, x, y, {"p": {"eps": 0.1, "step": 0.05, "steps": 3, "random_start": False}}, checks=0
    ).predictions["p"],
    "audit": lambda model, x, y: audit(model, x, y, eps=0.1, version="fast", show=0).outcomes.predictions["pgd20"],
}
each_entry = pytest.mark.parametrize("enter", ENTRIES.values(), ids=ENTRIES)


class Net(nn.Sequential):
    """A small network, and what a model's code may do to its input or its logits."""

    def __init__(self, does=lambda x: x, says=lambda z: z, dtype=torch.float64):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(36, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3))
        self.to(dtype)
        self.does, self.says, self.failing = does, says, math.inf

    def forward(self, x):
        self.failing -= 1
        if self.failing < 0:
            raise ArithmeticError("a fault of the model")
        return self.says(super().forward(self.does(x)))


def some(n=12):
    x = torch.rand(n, 1, 6, 6, dtype=torch.float64, generator=generator())
    return x, torch.arange(n) % 3


def _in_no_grad(x):
    with torch.no_grad():
        x.sub_(0.5)
    return x


def _of_data(x):
    x.data.mul_(0.5)
    return x


def _some_pixels(x):
    x[:, :, 0] = 0
    return x


@each_entry
@pytest.mark.parametrize(
    ("model", "says"),
    [
        *((Net(does), "changes its input in place") for does in (lambda x: x.sub_(0.5), _in_no_grad, _of_data)),
        *((Net(does), "changes its input in place") for does in (_some_pixels, lambda x: x.clamp_(0, 1))),
        (Net(says=lambda z: z.bfloat16()), "logits are torch.bfloat16: attacks are judged in float32"),
        (Net(says=lambda z: z.half()), "logits are torch.float16"),
        (Net(dtype=torch.bfloat16), "the model computes in torch.bfloat16"),
        (Net(says=lambda z: z.detach()), "no gradient with respect to the images"),
        (Net(says=lambda z: (z, z)), "returns a tuple"),
        (Net(says=lambda z: z[:, 0]), r"logits of shape \(images, classes\)"),
        (lambda x: x.flatten(1)[:, :3], "is a function: a torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_attacked_are_refused_and_the_images_stay(enter, model, says):
    x, y = some()
    given = x.clone()
    with pytest.raises(ValueError, match=says):
        enter(model, x, y)
    assert torch.equal(x, given)


@each_entry
@pytest.mark.parametrize(
    ("form", "says"),
    [
        (lambda x, y: (255 * x, y), "must lie in"),
        (lambda x, y: ([*x.tolist(), None], y), "no tensor"),
        (lambda x, y: (x, y + 1), "labels reach from 1 to 3, but the model has 3 outputs"),
        (lambda x, y: (x, y - 1), "labels reach from -1 to 1"),
        (lambda x, y: (x, y.double()), "one integer per image"),
        (lambda x, y: (x, y[:5]), "5 labels"),
        (lambda x, y: (x, ["a"] * len(y)), "no tensor"),
    ],
)
def test_input_that_is_none_is_refused(enter, form, says):
    with pytest.raises(ValueError, match=says):
        enter(Net(), *form(*some()))


@each_entry
@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x.numpy(), y.numpy()),
        lambda x, y: (x.numpy().astype(">f8").astype("f8"), y.numpy().astype(np.uint8)),
        lambda x, y: (x.tolist(), y.tolist()),
        lambda x, y: (x.clone().requires_grad_(), y.int()),
        lambda x, y: (x.transpose(2, 3).contiguous().transpose(2, 3), y.repeat_interleave(2)[::2]),
        lambda x, y: tuple(_inference(v) for v in (x, y)),
    ],
    ids=["numpy", "numpy uint8", "lists", "wants gradients", "strided", "inference"],
)
def test_input_of_any_form_says_the_same(enter, form):
    x, y = some()
    want = torch.as_tensor(enter(Net(), x, y))
    given = form(x, y)
    got = torch.as_tensor(enter(Net(), *given))
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=1e-6 * isinstance(given[0], list))
    assert not getattr(got, "requires_grad", False)
    assert torch.equal(torch.as_tensor(given[0]).detach().to(torch.float32), x.float())


def _inference(v):
    with torch.inference_mode():
        return v.clone()


@pytest.mark.parametrize("enter", [autoattack, evaluate, audit])
def test_a_batch_below_one_is_refused(enter):
    with pytest.raises(ValueError, match="batch_size=0"):
        enter(Net(), *some(), batch_size=0)


@each_entry
def test_inference_mode_is_refused(enter):
    x, y = some()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch.inference_mode"):
        enter(Net(), x, y)
    with torch.inference_mode():
        net = Net()
    with pytest.raises(ValueError, match=r"was made inside torch.inference_mode"):
        enter(net, x, y)
    with torch.no_grad():  # is fine
        enter(Net(), x, y)


@each_entry
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_model_that_fails_is_left_as_it_was(enter, calls):
    model, (x, y) = Net(), some()
    model[1].weight.requires_grad_(False)
    model[2].eval()
    model[4].bias.grad = torch.ones(3).double()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    model.failing, threads, enabled = calls, torch.get_num_threads(), torch.is_grad_enabled()
    with pytest.raises((ArithmeticError, ValueError), match="a fault of the model"):
        enter(model, x, y)
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert model[4].bias.grad.tolist() == [1, 1, 1]
    assert model[1].bias.grad is None
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, enabled)


def test_under_autocast_looks_may_be_had_but_no_judgement():
    model, (x, y) = Net(dtype=torch.float32), some()
    with torch.autocast("cpu", torch.bfloat16):
        ENTRIES["evaluate"](model, x, y)
        assert ENTRIES["pgd"](model, x, y).dtype == torch.float32
        for enter in (ENTRIES["autoattack"], ENTRIES["audit"]):
            with pytest.raises(ValueError, match=r"logits are torch.bfloat16"):
                enter(model, x, y)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.1, 0.0005, 0.0])
def test_kl_finds_something_without_a_random_start(curved, images, norm, eps):
    """At the image itself the divergence has its minimum, 0, and no gradient."""
    y = curved.eval()(images).argmax(1)
    a, b, c = (
        pgd(curved, images, y, eps, eps / 4, 10, norm=norm, loss="kl", random_start=False, generator=generator(s))
        for s in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert eps == 0 or not torch.equal(a, c)
    d = a - images
    assert (d.abs().amax() if norm == "linf" else d.flatten(1).norm(dim=1).max()) <= eps + 1e-12
    assert 0 <= a.min() <= a.max() <= 1
    with torch.no_grad():
        p, q = (curved(v).log_softmax(1) for v in (images, a))
        start = (images + 0.001 * torch.randn(images.shape, generator=generator(), dtype=images.dtype)).clamp(0, 1)
        first = curved(start).log_softmax(1)
    found, at_first = ((p.exp() * (p - z)).sum(1) for z in (q, first))
    assert eps < 0.1 or (found > 10 * at_first).all()


def test_kl_without_a_random_start_in_an_evaluation(curved, images):
    y = curved.eval()(images).argmax(1)
    how = {"eps": 0.3, "step": 0.1, "steps": 10, "loss": "kl"}
    both = ({"kl": {**how, "random_start": random}} for random in (True, False))
    got = [evaluate(curved, images, y, attacks, checks=0).correct("kl") for attacks in both]
    assert got[1].mean() < 0.7
    assert abs(got[0].mean() - got[1].mean()) < 0.2


@pytest.mark.parametrize("k", [0, 0.5, 2])
@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("each", [False, True])
def test_n_fgsm_is_a_step_from_noise_that_is_not_brought_back_into_the_ball(linear, images, labels, k, loss, each):
    """Against NumPy, with the gradient of a linear classifier in closed form: W^T (softmax - target)."""
    model, n = linear(36, 3), len(images)
    images[:4], images[4:8] = 0.0, 1.0
    eps = torch.linspace(0.01, 0.2, n, dtype=torch.float64) if each else 0.1
    w, b, x = model.weight.detach().numpy(), model.bias.detach().numpy(), images.flatten(1).numpy()

    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    size = np.broadcast_to(np.asarray(eps), n)[:, None]
    noise = torch.rand(images.shape, generator=generator(), dtype=torch.float64).flatten(1).numpy() * 2 - 1
    noisy = np.clip(x + k * size * noise, 0, 1)
    target = softmax(x @ w.T + b) if loss == "kl" else np.eye(3)[labels]
    expected = np.clip(noisy + size * np.sign((softmax(noisy @ w.T + b) - target) @ w), 0, 1)
    found = n_fgsm(model, images, labels, eps, k, loss, generator()).flatten(1).numpy()
    if loss == "ce" or k:  # at the image itself the divergence has no gradient: its sign is rounding
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert (np.abs(found - x) > size + 1e-6).any() == (k > 0)
    if loss == "ce" and not k:
        torch.testing.assert_close(fgsm(model, images, labels, eps).flatten(1).numpy(), found)


def test_n_fgsm_leaves_the_model_as_it_was_and_refuses_bad_k(curved, images):
    y = torch.arange(16) % 4
    curved.train()
    before = {k: v.clone() for k, v in curved.state_dict().items()}
    n_fgsm(curved, images, y, 0.1)
    assert curved.training
    assert all(torch.equal(v, before[k]) for k, v in curved.state_dict().items())
    for k in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"k={k} is not a finite number >= 0"):
            n_fgsm(curved, images, y, 0.1, k)

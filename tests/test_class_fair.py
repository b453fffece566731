"""Class-fair methods of the literature against known answers."""

import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from cfol_nb.config import RunConfig
from cfol_nb.data import limit, split
from cfol_nb.methods import METHODS, Batch, Context, build_method
from cfol_nb.methods.bat import BAT
from cfol_nb.methods.dafa import transfer
from cfol_nb.methods.faal import worst_mixture
from cfol_nb.methods.wat import hedge
from cfol_nb.objectives import TRADES
from cfol_nb.train import Stopped, check, new_model, train

LABELS = torch.arange(30) % 3
P = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]], dtype=torch.float64)


def logits_with(means):
    """Logits (6, 3) of two images a class, whose softmax is in the mean that of the rows."""
    step = torch.tensor([0.05, -0.02, -0.03], dtype=torch.float64)
    return torch.cat([means + step, means - step]).log()


def test_dafa_moves_weight_from_easy_classes_to_those_they_are_like():
    np.testing.assert_allclose(transfer(P, 1.0), [0.95, 1.33, 0.72])
    np.testing.assert_allclose(transfer(P, 1.5), [0.925, 1.495, 0.58])
    tied = torch.full((10, 10), 0.01).fill_diagonal_(0.91)
    np.testing.assert_array_equal(transfer(tied, 1.0), np.ones(10))
    p = torch.rand(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)
    w = [
        1 + sum(p[i, j] * p[j, j] if p[i, i] < p[j, j] else -p[j, i] * p[i, i] for j in range(7) if j != i)
        for i in range(7)
    ]
    np.testing.assert_allclose(transfer(p, 1.0), w)
    assert sum(w) == pytest.approx(7)


def test_dafa_looks_in_one_epoch_and_weighs_from_the_next_on():
    method = METHODS["dafa"](LABELS, 3, context=Context(epochs=4), warm_up=2)
    y, ones = torch.tensor([0, 1, 2, 0, 1, 2]), torch.ones(3, dtype=torch.float64)
    for epoch, (said, weights) in enumerate(
        [(P.flip(1), ones), (P, torch.tensor([0.95, 1.33, 0.72])), (P.flip(0), torch.tensor([0.95, 1.33, 0.72]))], 1
    ):
        method.after_step(Batch(None, y, logits_with(said)))
        method.epoch_end(epoch)
        np.testing.assert_allclose(method.trace()["weights"], weights, rtol=1e-6)
    model, x, x_adv = torch.nn.Linear(5, 3).double(), torch.rand(6, 5).double(), torch.rand(6, 5).double()
    losses, *_ = TRADES(beta=6.0)(model, x, x_adv, y, boundary=method.boundary(y))
    p, q = model(x).log_softmax(1), model(x_adv).log_softmax(1)
    want = method.weights[y] * -p[range(6), y] + 6 * (p.exp() * (p - q)).sum(1)
    torch.testing.assert_close(losses * method.weigh(Batch(None, y)), want)
    assert torch.equal(method.radius(y), method.weights[y])
    assert method.complaint([]) == ""


def test_dafa_cuts_weights_that_would_be_negative_and_says_so():
    p = torch.eye(10, dtype=torch.float64)
    p[1:, 0] = torch.linspace(0.5, 0.6, 9)  # all are taken for class 0
    p[range(1, 10), range(1, 10)] = 1 - p[1:, 0]
    assert transfer(p, 1.0)[0] < 0
    method = METHODS["dafa"](torch.arange(30) % 10, 10, warm_up=1)
    method.after_step(Batch(None, torch.arange(10), p.clamp_min(1e-30).log()))
    method.epoch_end(1)
    assert method.weights.min() == 0.1
    assert "were cut to [0.1, 2]" in method.complaint([])


@pytest.mark.parametrize(("warm_up", "epochs"), [(3, 3), (0, 3), (70, 40)])
def test_dafas_warm_up_must_lie_in_the_run(warm_up, epochs):
    with pytest.raises(ValueError, match=f"warm_up={warm_up} of dafa"):
        check(RunConfig(method={"name": "dafa", "warm_up": warm_up}, epochs=epochs))
    check(RunConfig(method="dafa", epochs=2))
    assert METHODS["dafa"](LABELS, 3, context=Context(epochs=110)).warm_up == 70


def logits_of_loss(y, ce):
    """(n, 3) logits with this cross-entropy."""
    p = torch.exp(-ce)
    z = ((1 - p) / 2).unsqueeze(1).expand(-1, 3).clone()
    z[range(len(y)), y] = p
    return z.log()


def test_fat_ma_adds_the_variance_of_the_class_losses():
    method = METHODS["fat-ma"](LABELS, 3, alpha=0.1)
    y = torch.tensor([0, 0, 1, 2, 2, 2])
    ce = torch.tensor([1.5, 2.5, 1.0, 0.2, 0.5, 0.8], dtype=torch.float64)  # class means 2, 1, 0.5
    losses = torch.rand(6, dtype=torch.float64)
    z = logits_of_loss(y, ce)
    torch.testing.assert_close(F.cross_entropy(z, y, reduction="none"), ce)
    assert method.reduce(losses, Batch(None, y, z)).item() == pytest.approx(losses.mean().item() + 0.1 * 0.388889)
    some = y < 2  # class 2 is not in the batch: the variance of 2 and 1
    got = method.reduce(losses[some], Batch(None, y[some], z[some])).item()
    assert got == pytest.approx(losses[some].mean().item() + 0.1 * 0.25)
    alike = logits_of_loss(y, torch.ones(6, dtype=torch.float64))
    assert method.reduce(losses, Batch(None, y, alike)).item() == pytest.approx(losses.mean().item())


def test_fat_mas_gradient_is_that_of_the_formula():
    y = torch.tensor([0, 0, 1, 2, 2, 2])
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    ce = F.cross_entropy(z, y, reduction="none")
    (ours,) = torch.autograd.grad(METHODS["fat-ma"](LABELS, 3, alpha=0.7).reduce(ce, Batch(None, y, z)), z)
    ce = F.cross_entropy(z, y, reduction="none")
    means = torch.stack([ce[y == c].mean() for c in range(3)])
    (theirs,) = torch.autograd.grad(ce.mean() + 0.7 * means.var(correction=0), z)
    torch.testing.assert_close(ours, theirs)


def test_robustlt_gives_rare_classes_larger_radii_that_grow():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([5000, 1000, 200]))
    make = METHODS["robustlt"]
    y, want = torch.tensor([2, 0, 1]), torch.tensor([2.750475, 0.7, 2.149905], dtype=torch.float64)
    method = make(labels, 3, counts="images", context=Context(epochs=10))
    for epoch, grown in enumerate([0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 1]):
        torch.testing.assert_close(method.radius(y), want * grown, rtol=1e-6, atol=0)
        method.epoch_end(epoch + 1)
    assert method.radius(labels).mean().item() == pytest.approx(1)
    torch.testing.assert_close(make(labels, 3, counts="images", context=Context(epochs=10), b=0.0).radius(y), want)
    assert torch.equal(make(LABELS, 3, counts="images").radius(y), torch.ones(3, dtype=torch.float64))
    judged = make(LABELS, 3)
    judged.after_epoch(1, {"robust": torch.tensor([0.9, 0.3, 0.6])})
    assert judged.radius(torch.arange(3)).argsort().tolist() == [0, 2, 1]
    assert judged.radius(LABELS).mean().item() == pytest.approx(1)  # over the images that there are


def told(y, right):
    """Of a step: logits (n, 3) that are right where said."""
    return Batch(None, y, torch.eye(3)[torch.where(right, y, (y + 1) % 3)])


def cfa(beta=6.0, epochs=4, right=(6, 2, 4), **given):
    """After an epoch in which so many of ten images a class were right under attack."""
    method = METHODS["cfa"](LABELS, 3, context=Context(epochs=epochs, beta=beta), **given)
    if right:
        y = torch.arange(3).repeat_interleave(10)
        method.after_step(told(y, torch.arange(10).repeat(3) < torch.tensor(right)[y]))
        method.epoch_end(1)
    return method


def test_cfa_follows_the_training_accuracy_of_the_last_epoch():
    y = torch.arange(3)
    method = cfa(lam1=0.5)
    np.testing.assert_allclose(method.radius(y), [1.1, 0.7, 0.9])
    np.testing.assert_allclose(6 * method.boundary(y), [6.6, 4.2, 5.4])
    np.testing.assert_allclose(method.weigh(Batch(None, y)), [0.131579, 0.192308, 0.15625], rtol=3e-6)
    loss = (1.2 + 6 * method.boundary(y) * 0.3) * method.weigh(Batch(None, y))  # as TRADES has it
    assert loss[1].item() == pytest.approx(0.473077, rel=1e-6)
    method.after_step(told(torch.tensor([0, 0, 1]), torch.tensor([True, False, True])))  # class 2 is not drawn
    method.epoch_end(2)
    np.testing.assert_allclose(method.radius(y), [1.0, 1.5, 0.9])
    np.testing.assert_allclose(cfa().radius(y), [0.9, 0.5, 0.7])
    at = cfa(beta=None)
    np.testing.assert_allclose(at.radius(y), [1.1, 0.7, 0.9])
    assert (at.boundary(y), at.weigh(Batch(None, y))) == (None, None)


def test_cfas_parts_can_be_switched_and_its_radii_wait():
    y, ones = torch.arange(3), np.ones(3)
    report = {"robust": torch.full((3,), 0.3)}
    for off in ("ccm", "ccr", "fawa"):
        method = cfa(**{off: False})
        assert (method.radius(y) is None) == (off == "ccm")
        assert (method.boundary(y) == 1).all() == (off == "ccr")
        assert (method.average(report) is None) == (off == "fawa")
    control = cfa(ccm=False, ccr=False, fawa=False)
    np.testing.assert_array_equal(control.boundary(y), ones)
    np.testing.assert_allclose(control.weigh(Batch(None, y)), ones / 7)
    waits = cfa(begin=2)
    np.testing.assert_array_equal(waits.radius(y), ones)
    np.testing.assert_allclose(waits.boundary(y), [1.1, 0.7, 0.9])
    assert METHODS["cfa"](LABELS, 3, context=Context(epochs=200)).begin == 10
    np.testing.assert_array_equal(cfa(right=None).boundary(y), ones)


def test_fawa_averages_from_the_first_fair_look_on():
    method, mean, seen = METHODS["fawa"](LABELS, 3, context=Context(epochs=4)), 0.0, []
    for theta, worst in ((1, 0.1), (2, 0.25), (3, 0.3), (4, 0.1)):
        d = float(method.average({"robust": torch.tensor([0.9, worst, 0.9])}))
        mean = d * mean + (1 - d) * theta
        seen.append(mean)
    assert seen == pytest.approx([1, 2, 2.15, 2.15], rel=1e-12)
    assert method.complaint([{}] * 4) == ""
    never = METHODS["fawa"](LABELS, 3, context=Context(epochs=2))
    assert float(never.average({"robust": torch.tensor([0.1, 0.5, 0.5])})) == 0
    assert [bool(never.complaint([{}] * n)) for n in (0, 1, 2)] == [False, False, True]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cfa_in_a_run_averages_by_itself_and_draws_with_cfol(tiny, images):
    given = {"objective": "trades", "epochs": 3, "lr": 0.1}
    done = train(tiny(method={"name": "cfol+cfa", "cfa.delta": 0.0, "cfa.decay": 0.5}, **given), *images)
    assert {"p", "radius factor", "beta factor"} <= done.history[-1].keys()
    assert len(set(done.history[-1]["radius factor"])) > 1
    assert "averaged" in done.weights
    plain = train(tiny(method={"name": "cfol+cfa", "cfa.fawa": False}, **given), *images)
    assert plain.history == done.history  # averaging changes no step
    assert "averaged" not in plain.weights
    with pytest.raises(ValueError, match="'cfa' and 'fawa' do not go together: each averages the weights"):
        check(RunConfig(method="cfa+fawa"))


@pytest.mark.parametrize(("begin", "epochs"), [(5, 5), (0, 5), (10, 4)])
def test_cfas_beginning_must_lie_in_the_run(begin, epochs):
    with pytest.raises(ValueError, match=f"begin={begin} of cfa: 1 or more epochs, and fewer than the {epochs}"):
        check(RunConfig(method={"name": "cfa", "begin": begin}, epochs=epochs))


REPORT = {
    "ce": torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64),
    "kl": torch.tensor([0.3, 0.1, 0.05], dtype=torch.float64),
    "robust ce": torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64),
}


def test_wat_sums_up_what_the_classes_cost():
    method, y = METHODS["wat"](LABELS, 3, context=Context(beta=6.0)), torch.arange(3)
    np.testing.assert_array_equal(method.weigh(Batch(None, y)), np.ones(3))
    for epoch, w in ((1, [0.853881, 0.720389, 0.678437, 0.747294]), (2, [0.964946, 0.686820, 0.609155, 0.739079])):
        method.after_epoch(epoch, REPORT)
        np.testing.assert_allclose(method.costs, epoch * np.array([2.8, 1.1, 0.5, 4.4 / 3]))
        np.testing.assert_allclose(hedge(method.costs, 0.1), w, rtol=2e-6)
        v = np.array(w[:3]) + w[3]
        if epoch == 1:
            np.testing.assert_allclose(v, [1.601174, 1.467683, 1.425730], rtol=2e-6)
        np.testing.assert_allclose(method.weigh(Batch(None, y)), v / v.mean(), rtol=2e-6)
        np.testing.assert_array_equal(method.trace()["weights"], method.weigh(Batch(None, y)))
    equal = hedge(torch.full((4,), 0.7), 0.1)
    np.testing.assert_allclose(equal[:3] + equal[3], np.full(3, 6 / 4), rtol=1e-6)
    at = METHODS["wat"](LABELS, 3)
    at.after_epoch(1, REPORT)
    np.testing.assert_array_equal(at.costs, [2, 1, 0, 1])


def test_a_look_before_the_first_step_is_for_those_that_ask(monkeypatch):
    class Asks(METHODS["erm"]):
        asks = frozenset({"start"})

        def after_epoch(self, epoch, report):
            heard.append(epoch)

    heard = []
    monkeypatch.setitem(METHODS, "asks", Asks)
    both = build_method({"name": "asks+wat"}, LABELS, 3)
    for epoch in (0, 1):
        both.after_epoch(epoch, REPORT)
    assert heard == [0, 1]
    np.testing.assert_array_equal(both.parts[1].costs, [2, 1, 0, 1])


def test_faals_mixture_is_the_known_one():
    a = torch.tensor([0.2, -0.1, -0.3], dtype=torch.float64)
    np.testing.assert_allclose(worst_mixture(a, 0.5), [0.790439, 0.127669, 0.081892], rtol=1e-5)
    np.testing.assert_allclose(worst_mixture(1e-9 * a + 7, 0.5), worst_mixture(a, 0.5), rtol=1e-5)
    for pair in ([3.0, -2.0], [1e-3, 0.0]):
        assert worst_mixture(torch.tensor(pair), 0.5)[0].item() == pytest.approx((1 + (1 - np.exp(-1)) ** 0.5) / 2)
    one = torch.zeros(10).index_fill(0, torch.tensor(4), 0.3)
    assert 10 * worst_mixture(one, 0.5)[4].item() == pytest.approx(5.748, abs=5e-4)
    np.testing.assert_allclose(worst_mixture(torch.full((4,), -0.3), 0.5), np.full(4, 0.25))
    np.testing.assert_allclose(worst_mixture(a, 0.0), np.full(3, 1 / 3), rtol=1e-7)


@pytest.mark.parametrize(("r", "seed"), [(0.1, 0), (0.5, 1), (2.0, 2)])
def test_faals_mixture_is_the_programmes(r, seed):
    a = np.random.default_rng(seed).normal(size=6)
    ours = worst_mixture(torch.from_numpy(a), r).numpy()
    near = {"type": "ineq", "fun": lambda z: r + np.log(6) + log_softmax(z).mean()}  # p = softmax(z)
    found = minimize(lambda z: -a @ softmax(z), 0.1 * a, constraints=near, options={"ftol": 1e-13, "maxiter": 500})
    assert found.success
    assert ours.sum() == pytest.approx(1)
    assert -np.log(6) - np.log(ours).mean() == pytest.approx(r)
    assert a @ ours == pytest.approx(-found.fun, rel=1e-6)


def test_faal_weighs_the_batchs_classes_by_their_margins():
    method, y = METHODS["faal"](LABELS, 4, r=0.7), torch.tensor([0, 0, 1, 3, 3])  # class 2 is not there
    z = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s = z.detach().softmax(1).numpy()
    margins = [max(np.delete(row, c)) - row[c] for row, c in zip(s, y.tolist(), strict=True)]
    a = torch.tensor([margins[0] + margins[1], margins[2], 0, margins[3] + margins[4]])
    weight = method.weigh(Batch(None, y, z))
    torch.testing.assert_close(weight, 4 * worst_mixture(a, 0.7)[y])
    assert not weight.requires_grad


def test_faal_goes_on_from_a_trained_network():
    with pytest.raises(ValueError, match="'faal' goes on from a trained network: give the run a parent"):
        check(RunConfig(method="faal"))
    check(RunConfig(method="faal+cfa", parent=RunConfig(), awp=0.005, objective="trades"))


def test_bat_keeps_the_images_on_both_sides_of_the_boundary():
    """Three looks at x_0, x_1 and x_2, and the end x_3; the pixels say which iterate it is."""
    wrong = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]])
    x, y = torch.full((5, 1, 2, 2), -1.0), torch.zeros(5, dtype=torch.int64)

    def attack(watch):
        for step in range(3):
            watch(x + 1 + step, F.one_hot(wrong[:, step], 2))
        return x + 4

    def chosen(tau):
        return [v[:, 0, 1, 1].tolist() for v in BAT(tau=tau).images(attack, x, y)]

    assert chosen(1) == [[1, 0, 3, 0, 0], [3, 1, 3, 3, 2]]
    assert chosen(0) == [[1, 0, 3, 0, 0], [2, 0, 3, 1, 0]]


def test_bat_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    x, last, first = torch.randn(3, 4, 3, dtype=torch.float64, generator=generator)
    last[0] = torch.tensor([2.0, 0.0, -1.0])
    y, boundary = torch.tensor([0, 1, 2, 1]), torch.tensor([1.0, 0.5, 2.0, 1.0])
    losses, logits, clean = BAT(beta=2.5)(torch.nn.Identity(), x, (last, first), y, boundary=boundary)
    p, a, b = (v.softmax(1).numpy() for v in (x, last, first))
    flat = [np.log(3) + (q * np.log(q)).sum(1) for q in (a, b)]
    assert flat[0][0] == pytest.approx(0.574346, abs=1e-6)
    between = (p * np.log(p / b)).sum(1) * boundary.numpy()
    np.testing.assert_allclose(losses, -np.log(a[range(4), y]) + 2.5 * between + flat[0] + flat[1])
    assert torch.equal(logits, first)
    assert torch.equal(clean, x)
    with pytest.raises(ValueError, match="tau=-1"):
        check(RunConfig(objective={"name": "bat", "tau": -1}))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dafa", {"lam": -1.0}),
        ("fat-ma", {"alpha": -0.1}),
        ("fat-ma", {"alpha": float("nan")}),
        ("robustlt", {"a": 1.5}),
        ("robustlt", {"b": -0.1}),
        ("cfa", {"lam1": -1.0}),
        ("cfa", {"delta": 1.0}),
        ("fawa", {"decay": 1.0}),
        ("wat", {"eta": -0.1}),
        ("faal", {"r": -0.5}),
    ],
)
def test_options_out_of_range_are_refused(name, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}="):
        METHODS[name](LABELS, 3, **given)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(digits):
    return split(limit(digits.train, 24), 0.2)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", [*METHODS, {"name": "cfa", "delta": 0.0}, "cfol+fawa+robustlt+wat"], ids=str)
def test_a_run_of_any_method_that_was_stopped_goes_on_to_the_same_bytes(method, tiny, images, tmp_path):
    name = method["name"] if isinstance(method, dict) else method.split("+")[0]
    cls, path, given = METHODS[name], tmp_path / "c.safetensors", {}
    needs = {"objective": cls.needs_objective or "trades", "ema": 0.9, "batch_size": 48}
    needs |= {"parent": tiny()} if cls.needs_parent else {}
    needs |= {"awp": 0.005} if name == "faal" else {}
    needs |= {"model": {"name": "smallcnn", "head": "cosine"}} if name == "robal" else {}
    if "teacher" in cls.asks:
        needs["teacher"], given["teacher"] = tiny(seed=1), new_model(tiny(seed=1), images[0])
    config = tiny(method=method, epochs=4, **needs)
    whole = train(config, *images, **given)

    def stop(done, total):
        if done == 10:  # in the middle of the third epoch
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config, *images, checkpoint=path, progress=stop, **given)
    done = train(config, *images, checkpoint=path, **given)
    assert done.weights.keys() == whole.weights.keys() >= {"last", "selected", "ema"}
    assert ("averaged" in whole.weights) == any(n in str(method) for n in ("cfa", "fawa"))
    for kind, weights in whole.weights.items():
        assert all(torch.equal(v, done.weights[kind][k]) for k, v in weights.items()), kind
    assert done.history == whole.history

"""What the loop and the step hand to methods and objectives, and how methods compose."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_engine import Watch

from cfol_nb import cli
from cfol_nb.attacks import as_float, kl, n_fgsm, pgd
from cfol_nb.config import RunConfig
from cfol_nb.data import limit, split
from cfol_nb.engine import make_step
from cfol_nb.evaluate import evaluate
from cfol_nb.methods import METHODS, Batch, Composed, Context, Method, build_method
from cfol_nb.models import build
from cfol_nb.objectives import AT, OBJECTIVES, TRADES, Objective
from cfol_nb.runs import compute, folder_of
from cfol_nb.train import check, new_model, train

LABELS = torch.arange(40) % 4


@pytest.fixture(scope="module")
def images(digits):
    return split(limit(digits.train, 24), 0.2)


@pytest.fixture
def probe(monkeypatch):
    """Make a class the method "probe"."""
    return lambda cls: monkeypatch.setitem(METHODS, "probe", cls)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- composition -------------------------------------------------------------------------------------------------------


def test_the_ways_to_write_a_composition_are_one_run():
    flat = RunConfig(method={"name": "dafa+cfol", "cfol.drift": 3, "dafa.lam": 1.5})
    for other in (
        [{"name": "cfol", "drift": 3}, {"name": "dafa", "lam": 1.5}],
        [{"name": "dafa", "lam": 1.5}, "erm", {"name": "cfol", "drift": 3}],
        {"name": "cfol+dafa", "dafa.lam": 1.5, "cfol.drift": 3},
    ):
        assert RunConfig(method=other).hash() == flat.hash()
    given = cli._settings("digits", ["method.cfol.drift=3", "method.dafa.lam=1.5"], method="dafa+cfol")
    assert RunConfig(**given).hash() == flat.hash()
    assert RunConfig.model_validate_json(flat.model_dump_json()) == flat
    assert RunConfig(method=["erm", "cfol"]).hash() == RunConfig(method="cfol").hash()
    assert RunConfig(method=["erm", "erm"]).hash() == RunConfig().hash()
    assert folder_of(flat).name.startswith("digits-at-cfol-dafa-s0-")


@pytest.mark.parametrize("method", ["cfol", "dafa", {"name": "cvar", "alpha": 0.3}])
def test_composing_with_erm_changes_no_bit(tiny, images, monkeypatch, method):
    plain = train(tiny(method=method, epochs=3), *images)

    def with_erm(spec, *run):
        return Composed({"erm": Method(*run), spec["name"]: build_method(spec, *run)})

    monkeypatch.setattr("cfol_nb.train.build_method", with_erm)
    composed = train(tiny(method=method, epochs=3), *images)
    assert same(plain.weights["last"], composed.weights["last"])
    assert plain.history == composed.history


def test_a_composition_does_what_its_parts_do(tiny, images):
    a = train(tiny(method="cfol+dafa", epochs=3), *images)
    b = train(tiny(method=["dafa", "cfol"], epochs=3), *images)
    assert same(a.weights["last"], b.weights["last"])
    assert {"p", "weights"} <= a.history[-1].keys()
    assert set(a.history[-1]["weights"]) != {1.0}


def test_factors_multiply_and_reduce_comes_after_the_weights(probe):
    class Doubles(Method):
        def radius(self, y):
            return 1.0 + y

        def weigh(self, batch):
            return 3.0 - batch.y

    probe(Doubles)
    y, losses = torch.arange(4), torch.tensor([1.0, 4.0, 2.0, 3.0])
    both = build_method({"name": "cvar+dafa+probe", "cvar.alpha": 0.25}, LABELS, 4)
    w = both.parts[1].weights.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    torch.testing.assert_close(both.radius(y), w * (1 + y))
    torch.testing.assert_close(both.boundary(y), 1 / w)
    weight = both.weigh(Batch(None, y))
    torch.testing.assert_close(weight, w * (3 - y))
    assert both.reduce(losses * weight, Batch(None, y)).item() == 8  # of 1.5, 8, 3 and 0 the largest quarter
    assert both.adjust(losses, y) is losses


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("cfol+fol", "'cfol' and 'fol' do not go together: each draws the images"),
        ("balanced-softmax+cdt", "each changes the logits"),
        ("cvar+lcvar", "each sums the losses up"),
        ("cfol+cfol", "the method 'cfol' is there twice"),
        (["cfol", {"name": "cfol", "drift": 3}], "there twice"),
        ({"name": "cfol+dafa", "drift": 3}, "drift=3 is of no method: say of which, as in cfol.drift"),
        ({"name": "cfol+dafa", "dafa.drift": 3}, "method 'dafa' has no option 'drift'"),
        ("cfol+dafo", "did you mean 'dafa'"),
        ("dafa+frl", "'frl' needs the objective|'dafa\\+frl' needs the objective 'trades'"),
        ([], "valid dictionary"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(method, says):
    with pytest.raises(ValueError, match=says):
        check(RunConfig(method=method))
    reweighted = {"name": "cfol", "form": "reweight"}
    check(RunConfig(method=[reweighted, "fol"]))  # it draws as ERM does


# -- the attack --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_aimed_images_descend_to_their_class_and_the_others_are_attacked_as_ever(linear, loss):
    model, (x, y) = linear(12, 3), (torch.rand(6, 1, 3, 4).double(), torch.arange(6) % 3)
    aim, eps, step = torch.tensor([-1, 2, -1, 0, 1, -1]), 0.2, 0.03
    seen = []
    how = {"loss": loss, "random_start": loss == "ce"}
    generator = torch.Generator().manual_seed(3)
    got = pgd(model, x, y, eps, step, 5, aim=aim, generator=generator, watch=lambda *v: seen.append(v), **how)
    plain = pgd(model, x, y, eps, step, 5, generator=torch.Generator().manual_seed(3), **how)
    assert torch.equal(got[aim < 0], plain[aim < 0])
    a = seen[0][0]
    for iterate, logits in seen:
        torch.testing.assert_close(iterate[aim >= 0], a[aim >= 0])
        torch.testing.assert_close(logits, model(iterate))
        a = iterate.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(a), aim.clamp_min(0), reduction="sum"), a)
        a = torch.minimum(torch.maximum(a.detach() - step * g.sign(), x - eps), x + eps).clamp(0, 1)
    torch.testing.assert_close(got[aim >= 0], a[aim >= 0])
    assert len(seen) == 5
    assert not seen[0][1].requires_grad


def test_kl_may_start_from_other_logits_than_the_clean_ones(linear):
    model, x, y = linear(12, 3), torch.rand(6, 1, 3, 4).double(), torch.arange(6) % 3
    other = torch.randn(6, 3).double()
    for attack in (pgd, n_fgsm):
        a, b = (
            attack(model, x, y, 0.2, generator=torch.Generator().manual_seed(0), **how)
            for how in ({"loss": "kl", "reference": other}, {"loss": lambda z, _: kl(other, z)})
        )
        assert torch.equal(a, b)


# -- the step ----------------------------------------------------------------------------------------------------------


class All(Method):
    """Asks for all that a batch may hold, and aims."""

    asks = frozenset({"clean", "right", "teacher", "losses", "start"})

    def aim(self, batch, generator):
        assert (batch.logits, batch.right) == (None, None)
        other = torch.randint(1, self.num_classes, batch.y.shape, generator=generator, device=batch.y.device)
        to_there = (batch.y + other) % self.num_classes
        return torch.where((batch.clean.argmax(1) + batch.teacher.argmax(1) + batch.y) % 2 == 0, to_there, -1)

    def weigh(self, batch):
        return 1 + batch.right.sum(1)


@pytest.mark.parametrize("objective", ["at", "trades"])
def test_a_step_hands_on_what_is_known(images, probe, objective):
    probe(All)
    config = RunConfig(method="probe", objective=objective, steps=3, model={"name": "preactresnet18", "width": 4})
    model = build(num_classes=10, channels=1, **config.model).double()
    teacher = build("smallcnn", num_classes=10, channels=1).double().eval()
    before, method = copy.deepcopy(model), build_method(config.method, images[0].labels, 10)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    objective = OBJECTIVES[objective]()
    step = make_step(config, "eager", model, objective, method, optimizer, generator, 0, False, None, teacher)
    index = torch.arange(5, 29)
    pixels, y = images[0].images[index], images[0].labels[index]
    loss, batch = step(pixels, y, index)
    x = as_float(pixels, torch.float64, "cpu")
    clean = before.eval()(x)
    assert torch.equal(batch.index, index)
    assert torch.equal(batch.teacher, teacher(x))
    generator, iterates = torch.Generator().manual_seed(0), []
    aim = method.aim(Batch(index, y, clean=clean, teacher=batch.teacher), generator)
    assert (aim < 0).any()
    assert (aim >= 0).any()
    kind = {"loss": objective.attack_loss, "generator": generator, "aim": aim}
    x_adv = pgd(before, x, y, config.eps, config.step, 3, watch=lambda a, z: iterates.append(a), **kind)
    assert torch.equal(batch.right, torch.stack([before(a).argmax(1) == y for a in iterates], 1))
    assert batch.right.shape == (24, 3)
    before.train()
    wanted = before(x) if isinstance(objective, TRADES) else clean
    torch.testing.assert_close(batch.clean, wanted)
    torch.testing.assert_close(batch.logits, before(x_adv))
    assert not batch.logits.requires_grad
    losses, *_ = objective(before, x, x_adv, y)
    torch.testing.assert_close(loss, losses.mean())
    (losses * (1 + batch.right.sum(1))).mean().backward()
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("method", ["probe", "dafa+probe"])
def test_nothing_that_is_asked_for_waits_for_the_device(images, probe, method):
    probe(All)
    config = RunConfig(method=method, objective="trades", steps=2, awp=0.01)
    model = build(num_classes=10, channels=1, **config.model).double()
    teacher, method = copy.deepcopy(model).eval(), build_method(config.method, images[0].labels, 10)
    optimizer, generator = torch.optim.SGD(model.parameters(), 0.1), torch.Generator().manual_seed(0)
    objective = TRADES()
    step = make_step(config, "eager", model, objective, method, optimizer, generator, 1, True, None, teacher)
    with Watch() as watch:
        index = method.draw(32)
        _, batch = step(images[0].images[index], images[0].labels[index], index)
        method.after_step(batch)
    assert not watch.waits


def test_awp_is_a_step_at_perturbed_weights(images):
    """By hand: the gradient at w + awp |w| g / |g|, layer by layer, applied at w; batch statistics move once."""
    config = RunConfig(awp=0.05, steps=2, model={"name": "preactresnet18", "width": 4})
    model = build(num_classes=10, channels=1, **config.model).double()
    by_hand, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = Method(images[0].labels, 10)
    index = torch.arange(24)
    x, y = as_float(images[0].images[:24], torch.float64, "cpu"), images[0].labels[:24]
    x_adv = pgd(by_hand, x, y, config.eps, config.step, 2, generator=torch.Generator().manual_seed(0))
    step = make_step(config, "eager", model, AT(), method, optimizer, generator, 0, False)
    step(images[0].images[:24], y, index)
    proxy = copy.deepcopy(by_hand).train()
    F.cross_entropy(proxy(x_adv), y).backward()
    start = {k: v.clone() for k, v in by_hand.named_parameters()}
    with torch.no_grad():
        for (name, w), p in zip(by_hand.named_parameters(), proxy.parameters(), strict=True):
            if w.ndim > 1:
                w += 0.05 * start[name].norm() * p.grad / p.grad.norm()
    F.cross_entropy(by_hand.train()(x_adv), y).backward()
    with torch.no_grad():
        for name, w in by_hand.named_parameters():
            w.copy_(start[name] - 0.1 * w.grad)
    for k, v in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[k], v, rtol=0, atol=1e-12)


def test_an_objective_may_make_its_own_images(images, monkeypatch):
    """Two of each: the first iterate and the end of the attack."""

    class Two(Objective):
        attack_loss = "ce"

        def images(self, attack, x, y):
            first = []
            end = attack(lambda a, z: first.append(a))
            return first[0], end

        def __call__(self, model, x, x_adv, y, adjust, boundary, smoothing):
            one, other = (model(a) for a in x_adv)
            return F.cross_entropy(one, y, reduction="none") + F.cross_entropy(other, y, reduction="none"), other, None

    monkeypatch.setitem(OBJECTIVES, "two", Two)
    config, method = RunConfig(objective="two", steps=2), Method(images[0].labels, 10)
    model = build(num_classes=10, channels=1, **config.model).double()
    optimizer, index = torch.optim.SGD(model.parameters(), 0.0), torch.arange(24)
    x, y = as_float(images[0].images[:24], torch.float64, "cpu"), images[0].labels[:24]
    end = pgd(model, x, y, config.eps, config.step, 2, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) * 2 - 1
    want = F.cross_entropy(model((x + config.eps * noise).clamp(0, 1)), y) + F.cross_entropy(model(end), y)
    generator = torch.Generator().manual_seed(1)
    loss, _ = make_step(config, "eager", model, Two(), method, optimizer, generator, 0, False)(
        images[0].images[:24], y, index
    )
    torch.testing.assert_close(loss, want)


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_looks_epochs_context_and_averages(tiny, images, probe):
    """What the loop tells, and when; the averaged weights by hand from those of each look."""
    told, weights, decays = [], [], iter([0.0, 1.0, 0.25])

    class Hears(Method):
        asks = frozenset({"losses", "start"})

        def start(self, model):
            self.__dict__["model"] = model
            told[:] = [self.context]

        def epoch_end(self, epoch):
            told.append(epoch)

        def after_epoch(self, epoch, report):
            told.append((epoch, report))
            weights.append(copy.deepcopy(self.model.state_dict()))

        def average(self, report):
            return next(decays)

    probe(Hears)
    config = tiny(method="probe", objective={"name": "trades", "beta": 2.5}, epochs=5, validate_every=2)
    done = train(config, *images)
    context, first, *rest = told
    assert context == Context(5, len(images[0]) // 64, 2.5, config.eps, config.step, 2, "sgd")
    assert first[0] == 0
    assert same(weights[0], new_model(config, images[0]).state_dict())
    assert [t if isinstance(t, int) else t[:1] for t in rest] == [1, 2, (2,), 3, 4, (4,), 5, (5,)]
    assert [e["epoch"] for e in done.history] == [1, 2, 3, 4, 5]
    for k, v in weights[1].items():
        want = 0.25 * v + 0.75 * weights[3][k] if v.is_floating_point() else weights[3][k]
        torch.testing.assert_close(done.weights["averaged"][k], want, rtol=0, atol=1e-12)
    report, model, held = told[-1][1], new_model(config, images[0]).eval(), images[1]
    model.load_state_dict(done.weights["last"])
    against = {"eps": config.eps, "step": config.step, "steps": 2}
    outcomes = evaluate(model, held.images, held.labels, {"robust": against}, seed=5, checks=0)
    for kind in ("clean", "robust"):
        want = np.zeros((10, 10))
        np.add.at(want, (outcomes.labels, outcomes.predictions[kind]), 1)
        assert report[f"{kind} confusion"].tolist() == want.tolist()
        torch.testing.assert_close(report[kind], report[f"{kind} confusion"].diagonal() / torch.from_numpy(want).sum(1))
    x, y = as_float(held.images, torch.float64, "cpu"), held.labels
    x_adv = pgd(model, x, y, **against, loss="kl", generator=torch.Generator().manual_seed(5))
    p, q = model(x).log_softmax(1).detach(), model(x_adv).log_softmax(1).detach()
    for name, each in (
        ("ce", -p.gather(1, y[:, None])[:, 0]),
        ("robust ce", -q.gather(1, y[:, None])[:, 0]),
        ("kl", (p.exp() * (p - q)).sum(1)),
    ):
        want = torch.stack([each[y == c].mean() for c in range(10)])
        torch.testing.assert_close(report[name], want)


class Distils(Objective):
    """KL to the teacher, on adversarial images that are made by it."""

    attack_loss = "teacher"
    needs_teacher = True

    def __call__(self, model, x, x_adv, y, adjust, boundary, smoothing, teacher):
        logits = model(x_adv)
        return kl(teacher[0], logits), logits, None


def test_a_run_learns_from_a_teacher_of_another_architecture(tiny, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "distils", Distils)
    teacher = tiny(model={"name": "smallcnn", "width": 24}, lr=0.1, epochs=4)
    config = tiny(objective="distils", teacher=teacher, epochs=3)
    assert config.hash() != config.model_copy(update={"teacher": tiny(seed=4)}).hash()
    assert folder_of(config) != folder_of(config.model_copy(update={"teacher": teacher.model_copy(update={"lr": 1})}))
    (run,) = compute([config])
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    (first,) = compute([teacher])
    train_images, held, data = run.data()
    alone = train(config, train_images, held, crop=data.crop, flip=data.flip, teacher=first.model("last"))
    assert same(alone.weights["last"], run.model("last").state_dict())


def test_a_teacher_that_cannot_be_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "distils", Distils)
    with pytest.raises(ValueError, match="'distils' with method 'erm' needs a teacher"):
        check(tiny(objective="distils"))
    with pytest.raises(ValueError, match="has no use for a teacher"):
        check(tiny(teacher=tiny()))
    with pytest.raises(ValueError, match="the teacher has another without: it would have other classes"):
        tiny(objective="distils", teacher=tiny(without=["3"]))
    with pytest.raises(ValueError, match="awp"):
        tiny(awp=-0.1)

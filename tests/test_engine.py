import copy
import functools
import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cfol_nb import engine
from cfol_nb.attacks import pgd
from cfol_nb.config import RunConfig, options
from cfol_nb.data import limit, split
from cfol_nb.engine import Frozen, choose_engine, make_step
from cfol_nb.evaluate import as_float, evaluate
from cfol_nb.methods import METHODS, build_method
from cfol_nb.models import build
from cfol_nb.objectives import OBJECTIVES, TemporalEnsemble
from cfol_nb.stats import accuracies
from cfol_nb.train import Stopped, train


@pytest.fixture(scope="module")
def images(digits):
    return split(limit(digits.train, 24), 0.2)


class Watch(TorchDispatchMode):
    """Counts the operations that a step dispatches."""

    WAITS = (
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.is_nonzero",
        "aten.equal",
        "aten.masked_select",
        "aten.unique",
        "aten.lift_fresh",  # numbers of the host, copied to the device
    )

    def __init__(self):
        super().__init__()
        self.weight_gradients = self.input_gradients = 0
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("aten.convolution_backward"):
            self.input_gradients += args[-1][0]
            self.weight_gradients += args[-1][1]
        if name.startswith(self.WAITS):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def parts(config, images, device="cpu"):
    """Everything that a step needs: (step, method, model)."""
    torch.manual_seed(0)
    model = build(num_classes=10, channels=1, **config.model).to(device)
    model = model.double() if config.dtype == "float64" else model
    method = build_method(config.method, images.labels, 10, examples=1000).to(device)
    objective = OBJECTIVES[config.objective["name"]](**options("objective", config.objective, OBJECTIVES))
    unattacked = objective.attack_loss is None and {"attack", "right"} & method.asks
    if unattacked or method.needs_objective not in (None, config.objective["name"]):
        pytest.skip("a run of these is refused")
    optimizer, generator = torch.optim.SGD(model.parameters(), 0.01, 0.9), torch.Generator(device).manual_seed(0)
    how = choose_engine(config, torch.device(device))
    ensemble = TemporalEnsemble(len(images), 10).to(device) if config.ensembling else None
    teacher = None
    if objective.needs_teacher or "teacher" in method.asks:
        teacher = build("smallcnn", num_classes=10, channels=1, width=4).to(next(model.parameters())).eval()
    given = config, how, model, objective, method, optimizer, generator, 1, True, ensemble, teacher
    return make_step(*given), method, model


FORGETS = {"name": "cfol", "base": "empirical", "prior": "empirical", "reset": [0.05, 0.5]}
ALL = [*METHODS, {"name": "cfol", "form": "reweight"}, FORGETS]
PAIRS = [(m, o) for m in ALL for o in ("clean", "at", "trades")]
PAIRS += [(m, o) for m in METHODS for o in OBJECTIVES if m == "erm" or o == METHODS[m].needs_objective]
PAIRS = [p for i, p in enumerate(PAIRS) if p not in PAIRS[:i]]


@pytest.mark.parametrize("ensembling", [None, {}], ids=["plain", "ensemble"])
@pytest.mark.parametrize(("method", "objective"), PAIRS, ids=str)
def test_no_step_waits_for_the_device(images, method, objective, ensembling):
    """What would make the host wait for a GPU shows here too: reading a number, a shape that depends on data."""
    config = RunConfig(method=method, objective=objective, steps=2, ensembling=ensembling)
    step, method, _ = parts(config, images[0])
    seen = set()
    for _ in range(3):
        with Watch() as watch:
            index = method.draw(32)
            y = images[0].labels[index]
            _, told = step(images[0].images[index], y, index)
            method.after_step(told)
        assert not watch.waits
        seen.add((index.shape, told.logits.shape))
    assert seen == {((32,), (32, 10))}


@pytest.mark.parametrize(("start", "spread"), [("uniform", 0.05 / 3**0.5), ("gaussian", 0.001)])
def test_an_objective_chooses_where_the_attack_starts(images, monkeypatch, start, spread):
    """A step so small that it does not show leaves the start: noise around mid grey."""
    seen, given = [], {"name": "trades", "start": start}
    monkeypatch.setattr(OBJECTIVES["trades"], "__call__", lambda self, m, x, x_adv, *rest: keep(seen, x_adv, m(x_adv)))
    step, _, _ = parts(RunConfig(objective=given, eps=0.05, step=1e-12, steps=1), images[0])
    step(torch.full((64, 1, 8, 8), 128, dtype=torch.uint8), torch.arange(64) % 10, torch.arange(64))
    noise = seen[0][..., 1:-1, 1:-1] - 128 / 255
    assert noise.std().item() == pytest.approx(spread, rel=0.06)
    assert abs(noise.mean()) < 0.1 * spread


def test_jitter_waits_for_no_device_and_is_off_by_default(images):
    x, y = images[0].images[:32], images[0].labels[:32]
    logits = []
    for given in ({}, {"augment": None}, {"augment": {"colour": 0.0, "degrees": 0.0}}, {"augment": {}}):
        step, _, _ = parts(RunConfig(objective="clean", **given), images[0])
        with Watch() as watch:
            logits.append(step(x, y, torch.arange(32))[1].logits)
        assert not watch.waits
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[2], logits[0])
    assert (logits[3] - logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["eager", "compile"])
def test_the_attack_computes_no_weight_gradient(how, monkeypatch):
    torch._dynamo.reset()
    model = build("preactresnet18", width=4)
    attacked = model if how == "eager" else torch.compile(Frozen(model, half=False).model, backend="aot_eager")
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    with Watch() as watch:
        pgd(attacked, x, y, steps=3)
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    assert watch.weight_gradients == 0
    assert watch.input_gradients == 3 * convolutions


@pytest.mark.parametrize(("method", "objective"), [(m, o) for m, o in PAIRS if isinstance(m, str) and o != "clean"])
def test_no_step_with_n_fgsm_waits_for_the_device_either(images, method, objective):
    step, method, _ = parts(RunConfig(method=method, objective=objective, training_attack="n-fgsm"), images[0])
    with Watch() as watch:
        index = method.draw(32)
        _, told = step(images[0].images[index], images[0].labels[index], index)
        method.after_step(told)
    assert not watch.waits


def test_n_fgsm_in_a_step_scales_noise_and_step_with_a_methods_radius(images, monkeypatch):
    """Images of mid grey, so that nothing is clamped: class by class the farthest pixel is near 3 eps times the factor,
    and no pixel beyond; the noise is symmetric."""
    factors, seen = torch.linspace(0.2, 1.5, 10, dtype=torch.float64), []
    monkeypatch.setattr(METHODS["erm"], "radius", lambda self, y: factors[y])
    monkeypatch.setattr(OBJECTIVES["at"], "__call__", lambda self, m, x, x_adv, *rest: keep(seen, x_adv, m(x_adv)))
    config = RunConfig(training_attack="n-fgsm", eps=0.05)
    step, _, _ = parts(config, images[0])
    step(torch.full((400, 1, 8, 8), 128, dtype=torch.uint8), torch.arange(400) % 10, torch.arange(400))
    inside = seen[0][..., 1:-1, 1:-1]  # where no crop brings in its padding
    moved = (inside - 128 / 255).view(40, 10, 36).transpose(0, 1).flatten(1)
    reach = 3 * 0.05 * factors
    assert (moved.abs().amax(1) <= reach + 1e-12).all()
    assert (moved.abs().amax(1) > 0.98 * reach).all()
    variance = (0.05 * factors) ** 2 * (1 + 4 / 3)  # of U(-2, 2), and of a sign
    torch.testing.assert_close(moved.var(1, correction=0), variance, rtol=0.15, atol=0)


def keep(seen, x_adv, logits):
    seen.append(x_adv)
    return logits.sum(1), logits, None


COMPILED = [
    (objective, {"steps": 3, **given})
    for objective in ("clean", "at", "trades")
    for given in (
        {},
        {"ensembling": {"weight": 1e4}},
        {"training_attack": "n-fgsm", "steps": 1, "label_smoothing": 0.2},
    )
]
COMPILED += [("rslad", {"steps": 3, "awp": 0.05}), ("ard", {"training_attack": "n-fgsm"})]
COMPILED += [("mart", {"steps": 3}), ("bat", {"steps": 3})]


@pytest.mark.filterwarnings("error:the fast engine fails")
@pytest.mark.parametrize(("objective", "given"), COMPILED, ids=str)
@pytest.mark.parametrize("model", ["smallcnn", {"name": "preactresnet18", "width": 4}], ids=["cnn", "batch norm"])
def test_a_compiled_step_is_the_eager_one_in_few_compilations(images, monkeypatch, model, objective, given):
    """Through AOTAutograd without a code generator: the same operations, so the same numbers.

    Two compilations: the attacked and the trained network; some objectives call both on clean images too, an ensemble
    one.
    """
    monkeypatch.setattr(engine.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = {}
    for how in ("eager", "compile"):
        step, method, net = parts(RunConfig(engine=how, model=model, objective=objective, **given), images[0])
        for _ in range(3):
            index = method.draw(32)
            step(images[0].images[index], images[0].labels[index], index)
        results[how] = net.state_dict()
    most = 2 + 2 * (objective not in ("clean", "at", "ard")) + ("ensembling" in given)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= most
    for k, v in results["eager"].items():
        torch.testing.assert_close(results["compile"][k], v, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_inductor_trains_like_eager(tiny, images):
    torch._dynamo.reset()
    a, b = (train(tiny(engine=how, model={"name": "smallcnn", "width": 4}), *images) for how in ("eager", "compile"))
    for k, v in a.weights["last"].items():
        torch.testing.assert_close(b.weights["last"][k], v, rtol=0, atol=1e-8)


def test_what_cannot_be_had_is_replaced_with_a_warning(tiny, images, monkeypatch):
    with pytest.warns(UserWarning, match="needs a CUDA device"):
        assert choose_engine(RunConfig(engine="graph"), torch.device("cpu")) == "compile"
    assert choose_engine(RunConfig(), torch.device("cpu")) == "eager"
    assert choose_engine(RunConfig(), torch.device("cuda")) == "graph"

    def broken(model):
        def call(*_):
            raise RuntimeError("no C++ compiler here")

        model.forward = call
        return model

    monkeypatch.setattr(engine.torch, "compile", lambda model, **_: broken(copy.deepcopy(model)))
    with pytest.warns(UserWarning, match="computed eagerly: no C\\+\\+ compiler here"):
        fallen = train(tiny(engine="compile"), *images)
    eager = train(tiny(engine="eager"), *images)
    assert all(torch.equal(v, fallen.weights["last"][k]) for k, v in eager.weights["last"].items())


def test_the_frozen_copy_follows_the_model():
    model = build("resnet18", width=4)
    frozen = Frozen(model, half=False)
    model.train()(torch.rand(8, 3, 8, 8)).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.grad)
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6)
    same = functools.partial(pgd, x=x, y=y, steps=3, random_start=False)
    assert not torch.equal(same(frozen.model), same(model))
    frozen.refresh()
    assert torch.equal(same(frozen.model), same(model))
    assert not any(p.requires_grad for p in frozen.model.parameters())


@pytest.mark.slow
def test_the_bfloat16_attack_is_as_strong_as_the_float32_one(digits):
    """The gate of every fast path: its adversarial loss, judged in float32, within 0.5 % of the float32 attack's."""
    config = RunConfig(model={"name": "preactresnet18", "width": 8}, dtype="float32", epochs=3, lr=0.1)
    trained = train(config, digits.train, limit(digits.test, 5))
    model = build(num_classes=10, channels=1, **config.model).eval()
    model.load_state_dict(trained.weights["last"])
    x, y = as_float(digits.test.images, torch.float32, "cpu"), digits.test.labels

    def loss(attacked, half):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            x_adv = pgd(attacked, x, y, 0.15, 0.0375, 7, generator=torch.Generator().manual_seed(0), check=False)
        return F.cross_entropy(model(x_adv), y).item()

    full, clean = loss(model, False), F.cross_entropy(model(x), y).item()
    assert full > 1.5 * clean
    assert loss(model, True) == pytest.approx(full, rel=0.005)
    assert loss(Frozen(model, half=True).model, True) == pytest.approx(full, rel=0.005)


@pytest.mark.slow
def test_training_in_bfloat16_reaches_what_float32_reaches(digits):
    """PGD-20 in float32: mean and worst class within the noise of seeds (three each) of the float32 runs."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        found[dtype] = []
        for seed in range(3):
            config = RunConfig(dtype=dtype, seed=seed, epochs=12, validate_every=12)
            done = train(config, digits.train, limit(digits.test, 5))
            model = build(num_classes=10, channels=1, **config.model)
            model.load_state_dict(done.weights["last"])
            a = accuracies(evaluate(model, digits.test.images, digits.test.labels, config.attacks))
            found[dtype].append([a.mean(), a.min()])
    a, b = (torch.tensor(found[d]) for d in ("float32", "bfloat16"))
    assert a.mean(0)[0] > 0.5
    noise = (a.var(0) / 3 + b.var(0) / 3).sqrt() + 0.003  # of the difference; 0.003 is two images of 600
    assert ((a.mean(0) - b.mean(0)).abs() < 4.6 * noise).all(), found  # Student's t at 1 % with 4 degrees of freedom


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("attack", [{}, {"training_attack": "n-fgsm", "steps": 1}], ids=["pgd", "n-fgsm"])
def test_graph_replays_draw_fresh_noise_and_the_same_seed_repeats(tiny, images, attack):
    given = {"engine": "graph", "device": "cuda", "dtype": "float32", "epochs": 8, **attack}
    a, b, c = (train(tiny(**given, seed=s), *images) for s in (0, 0, 1))
    assert all(torch.equal(v, b.weights["last"][k]) for k, v in a.weights["last"].items())
    assert not all(torch.equal(v, c.weights["last"][k]) for k, v in a.weights["last"].items())


@cuda
@pytest.mark.parametrize("method", ["cfol", "fol"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_stopped_run_on_a_device_goes_on_to_the_same_bytes(tiny, images, tmp_path, method, optimizer):
    config = tiny(engine="graph", device="cuda", dtype="bfloat16", method=method, optimizer=optimizer, epochs=4)
    whole, path = train(config, *images), tmp_path / "c.safetensors"

    def stop(done, total):
        if done == total // 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config, *images, checkpoint=path, progress=stop)
    again = train(config, *images, checkpoint=path)
    assert all(torch.equal(v, again.weights["last"][k]) for k, v in whole.weights["last"].items())
    assert again.history == whole.history


@cuda
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_a_real_device(images, method):
    step, method, _ = parts(RunConfig(method=method, dtype="float32", engine="eager"), images[0], "cuda")
    pixels, labels = images[0].images.cuda(), images[0].labels.cuda()
    for mode in ("default", "error", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            index = method.draw(32)
            _, told = step(pixels[index], labels[index], index)
            method.after_step(told)
        finally:
            torch.cuda.set_sync_debug_mode("default")


FAULTS = """
import resource, statistics, torch, {module}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000) + 1  # 40 MB each, more than glibc keeps by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(statistics.median([faults() for _ in range(30)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_freed_memory_is_kept():
    def faults(module: str, **environment: str) -> float:
        """Pages that the system has to hand out anew for each sum, in the median."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        command = [sys.executable, "-c", FAULTS.format(module=module)]
        done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
        return float(done.stdout)

    pages = 40_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert faults("cfol_nb") < pages / 100
    assert faults("math") > pages  # those of both tensors
    assert faults("cfol_nb", MALLOC_ARENA_MAX="1") > pages  # the environment's own settings are left alone

import json
import subprocess
import sys

import pytest
import yaml

from cfol_nb.config import RunConfig, Schedule, preset
from cfol_nb.files import ROOT


def test_needs_no_torch():
    code = "import sys, cfol_nb.config as c; c.RunConfig().hash(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_any_value_that_differs_changes_the_hash_and_equal_ones_do_not():
    base = RunConfig()
    assert RunConfig(dataset="digits", eps=0.15, method={"name": "erm"}, schedule="onecycle").hash() == base.hash()
    changes = [
        {"seed": 1},
        {"eps": 0.1},
        {"method": "cfol"},
        {"method": {"name": "cfol", "eta": 3e-3}},
        {"epochs": 2},
        {"attacks": {"pgd20": {"eps": 0.15, "step": 0.02, "steps": 20}}},
        {"select": "worst"},
        {"flip": False},
        {"imbalance": {"factor": 10}},
        {"model": {"name": "smallcnn", "width": 8}},
        {"split_seed": 1},
    ]
    assert len({RunConfig(**c).hash() for c in changes} | {base.hash()}) == len(changes) + 1


def test_survives_json():
    config = RunConfig(dataset="cifar10", method={"name": "cfol", "drift": 100}, imbalance={"factor": 20})
    again = RunConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.hash() == config.hash()
    assert json.loads(config.key())["eps"] == 8 / 255


def test_defaults_fit_the_data_set():
    digits, cifar = RunConfig(), RunConfig(dataset="cifar10")
    assert (digits.eps, digits.dtype, digits.model["name"]) == (0.15, "float64", "smallcnn")
    assert (cifar.eps, cifar.dtype, cifar.model["name"]) == (8 / 255, "float32", "preactresnet18")
    assert cifar.step == pytest.approx(2 / 255)
    attack = cifar.attacks["pgd20"]
    assert (attack.eps, attack.step, attack.steps) == pytest.approx((8 / 255, 1 / 255, 20))
    assert RunConfig(eps=0.3).attacks["pgd20"].eps == 0.3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"eps": 8}, "8/255"),
        ({"eps": -1}, "not a radius"),
        ({"eps": float("nan")}, "finite|radius"),
        ({"eps": "much"}, "number"),
        ({"epsilon": 0.1}, "epsilon"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"dtype": "float16"}, "float64"),
        ({"method": {"eta": 1}}, "names nothing"),
        ({"method": 3}, "method"),
        ({"norm": "l1"}, "linf"),
        ({"holdout": 1.0}, "holdout"),
        ({"imbalance": {"factor": 0.5}}, "factor"),
        ({"attacks": {"clean": {"eps": 0.1, "step": 0.1, "steps": 1}}}, "is taken"),
        ({"attacks": {"a": {"eps": 8, "step": 1, "steps": 1}}}, "8/255"),
        ({"schedule": "linear"}, "onecycle"),
        ({"seed": -1}, "seed"),
        ({"schedule": {"name": "step", "milestones": [100, 150]}}, "milestones"),
        ({"method": {"name": "cfol", "eta": float("inf")}}, "JSON"),
        ({"optimizer": "lion"}, "adam"),
        ({"schedule": {"name": "cyclic", "cycles": 0}}, "cycles"),
        ({"schedule": {"name": "cosine", "milestones": [0.2]}}, "'cosine' has no option 'milestones': 'step' has"),
        ({"schedule": {"name": "step", "cycles": 2}}, "'step' has no option 'cycles': 'cyclic' has"),
        ({"training_attack": "fgsm"}, "'pgd' or 'n-fgsm', got 'fgsm'"),
        ({"training_attack": {"name": "n-fgsm", "k": -1}}, "k: .* greater than or equal to 0, got -1"),
        ({"training_attack": {"name": "pgd", "k": 1}}, "'pgd' has no option 'k'"),
        ({"training_attack": "n-fgsm", "steps": 7}, "steps=7: .* one step of the size eps=0.15, so leave out steps"),
        ({"training_attack": "n-fgsm", "step": 0.1}, "step=0.1: .* so leave out step"),
        ({"training_attack": "n-fgsm", "norm": "l2", "eps": 0.5}, "is for norm='linf': norm='l2' needs 'pgd'"),
        ({"label_smoothing": 1}, "label_smoothing: .* less than 1, got 1"),
        ({"remake": "matched"}, "needs a parent"),
        ({"parent": {"model": "mlp"}}, "do not fit"),
        ({"parent": {}, "without": ["3"]}, "another without"),
        ({"parent": {"holdout": 0.3}}, "held out here"),
        ({"parent": {"epochs": 0}}, "^parent: epochs: .* got 0$"),
        ({"attacks": {"a": {"eps": 0.1, "step": 0.1, "steps": 1, "stop": 1}}}, "a.pgd: stop: .*known: .*steps"),
    ],
)
def test_bad_settings_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        RunConfig(**given)


@pytest.mark.parametrize(
    "given", [{"eps": 8}, {"eps": "much"}, {"norm": "l1"}, {"attacks": {"a": {"eps": 0.1, "step": 0.1, "steps": 0}}}]
)
def test_one_wrong_value_is_one_complaint(given):
    with pytest.raises(ValueError, match=r"\A(?!.*(; |https))[^\n]+\Z"):
        RunConfig(**given)


def test_what_is_published_keeps_its_identity():
    """A setting that came after a run was published, and has its default, is not in the run's key."""
    paths = sorted((ROOT / "results").glob("*.json"))
    assert len(paths) > 50
    for path in paths:
        stored = json.loads(path.read_text())["config"]
        config = RunConfig(**stored)
        for setting in ("training_attack", "label_smoothing"):
            assert setting in stored or setting not in config.key()  # nor in its parent's
        assert RunConfig(**config.model_dump(mode="json")).key() == config.key()


def test_n_fgsm_is_one_step_of_the_radius_and_another_run():
    config = RunConfig(training_attack="n-fgsm")
    assert (config.steps, config.step, config.training_attack.k) == (1, 0.15, 2.0)
    assert RunConfig(training_attack={"name": "n-fgsm", "k": 2}).hash() == config.hash()
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    others = [{}, {"training_attack": {"name": "n-fgsm", "k": 0}}, {"steps": 1, "step": 0.15}, {"label_smoothing": 0.1}]
    assert len({RunConfig(**o).hash() for o in others} | {config.hash()}) == 5
    assert RunConfig(training_attack="pgd", label_smoothing=0).hash() == RunConfig().hash()
    assert RunConfig(training_attack="n-fgsm", eps=0).step == 1.0  # as of pgd: a step of nothing is none


def test_the_fast_preset_is_the_recipe_and_digits_have_none():
    config = RunConfig(dataset="cifar10", **preset("fast", "cifar10"))
    assert (config.epochs, config.lr, config.ema, config.dtype) == (30, 0.2, 0.999, "bfloat16")
    assert (config.training_attack.name, config.eps) == ("n-fgsm", 8 / 255)
    assert [config.schedule(t) for t in (0, 0.25, 0.5, 0.75)] == [0, 0.5, 1, 0.5]
    for path in (ROOT / "notebooks/parameters").glob("*_fast.yaml"):
        settings = yaml.safe_load(path.read_text())["settings"]
        assert RunConfig(dataset="cifar10", **settings) == config.model_copy(update={"model": settings["model"]})
    with pytest.raises(ValueError, match=r"'fast' is for image data sets .* digits"):
        preset("fast", "digits")
    with pytest.raises(ValueError, match="unknown preset 'fats'; did you mean 'fast'"):
        preset("fats", "cifar10")


def test_schedules_are_torchs():
    import torch

    def torchs(make, n=100):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
        scheduler, out = make(optimizer), []
        for _ in range(n):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return out

    lr = torch.optim.lr_scheduler
    ours = {name: [Schedule(name=name)(i / 100) for i in range(100)] for name in ("cosine", "step", "onecycle")}
    assert ours["cosine"] == pytest.approx(torchs(lambda o: lr.CosineAnnealingLR(o, 100)), abs=1e-9)
    assert ours["step"] == pytest.approx(torchs(lambda o: lr.MultiStepLR(o, [50, 75], 0.1)), abs=1e-9)
    assert max(ours["onecycle"]) == ours["onecycle"][30] == 1
    cyclic = Schedule(name="cyclic", cycles=2)
    made = lr.CyclicLR
    triangles = torchs(lambda o: made(o, 0, 1, step_size_up=25, mode="triangular", cycle_momentum=False))
    assert [cyclic(i / 100) for i in range(100)] == pytest.approx(triangles, abs=1e-9)
    assert ours["onecycle"][0] == 0
    assert ours["onecycle"][65] == pytest.approx(0.5)


def test_a_parent_belongs_to_the_identity():
    alone, child = RunConfig(), RunConfig(parent={"seed": 3})
    assert len({alone.hash(), child.hash(), RunConfig(parent={"seed": 4}).hash()}) == 3
    assert RunConfig.model_validate_json(child.model_dump_json()) == child
    assert child.parent == RunConfig(seed=3)

import math
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch

from cfol_nb import models
from cfol_nb import train as train_module
from cfol_nb.attacks import n_fgsm, pgd
from cfol_nb.config import RunConfig
from cfol_nb.data import limit, split
from cfol_nb.evaluate import as_float, evaluate
from cfol_nb.files import Corrupt
from cfol_nb.methods import METHODS, Method, register
from cfol_nb.stats import counts
from cfol_nb.train import Diverging, Stopped, _amiss, _collapse, check, new_model, train


@pytest.fixture(scope="module")
def images(digits):
    return split(limit(digits.train, 24), 0.2)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["sgd", "adam", "ensemble", "fast"])
def test_is_the_plain_loop(tiny, images, kind):
    """Against adversarial training written out by hand: same draws, same noise, torch's own optimiser and schedule."""
    given = {"optimizer": "adam" if kind == "adam" else "sgd", "lr": 0.003 if kind == "adam" else 0.2}
    given |= {
        "ensemble": {"ensembling": {"weight": 9, "momentum": 0.7, "ramp": 0.8}},
        "fast": {"training_attack": {"name": "n-fgsm", "k": 1.5}, "steps": 1, "label_smoothing": 0.3},
    }.get(kind, {})
    config = tiny(epochs=2, batch_size=32, schedule="cosine", weight_decay=1e-3, ema=0.8, **given)
    train_images, held = images
    model, n = new_model(config, train_images), len(train_images)
    x, y = as_float(train_images.images, torch.float64, "cpu"), train_images.labels
    optimizer = {
        "sgd": torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, weight_decay=1e-3),
        "adam": torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=1e-3),
    }[config.optimizer]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * (n // 32))
    average = {k: v.clone() for k, v in model.state_dict().items()}
    done_steps, said = 0, np.zeros((n, 10))
    shuffle, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for _ in range(2):
        order = torch.randperm(n, generator=shuffle)
        for i in range(n // 32):
            xb, yb = x[order[32 * i : 32 * i + 32]], y[order[32 * i : 32 * i + 32]]
            if kind == "fast":
                x_adv = n_fgsm(model, xb, yb, config.eps, 1.5, generator=noise)
            else:
                x_adv = pgd(model, xb, yb, config.eps, config.step, config.steps, generator=noise)
            model.train()
            optimizer.zero_grad()
            smoothing = 0.3 if kind == "fast" else 0.0
            loss = torch.nn.functional.cross_entropy(model(x_adv), yb, label_smoothing=smoothing)
            if kind == "ensemble":
                batch = order[32 * i : 32 * i + 32].numpy()
                said[batch] = 0.7 * said[batch] + 0.3 * model(xb).softmax(1).detach().numpy()
                target = torch.from_numpy(said[batch] / said[batch].sum(1, keepdims=True))
                omega = 9 * math.exp(-5 * (1 - min(done_steps / (2 * (n // 32)) / 0.8, 1)) ** 2)
                loss = loss + omega * (model(x_adv).softmax(1) - target).pow(2).sum(1).mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            decay = min(0.8, (1 + done_steps) / (10 + done_steps))  # young averages forget faster
            average = {k: decay * average[k] + (1 - decay) * v for k, v in model.state_dict().items()}
            done_steps += 1
    done = train(config, train_images, held)
    for k, v in model.state_dict().items():
        torch.testing.assert_close(done.weights["last"][k], v, rtol=0, atol=1e-12)
        torch.testing.assert_close(done.weights["ema"][k], average[k], rtol=0, atol=1e-12)


def test_same_configuration_same_bytes_other_seed_others(tiny, images):
    a, b, c = (train(tiny(method="cfol", seed=s), *images) for s in (0, 0, 1))
    assert same(a.weights["last"], b.weights["last"])
    assert a.history == b.history
    assert not same(a.weights["last"], c.weights["last"])


@pytest.mark.parametrize("threads", [1, 2])
def test_float64_does_not_depend_on_threads(tiny, images, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss = train(tiny(method="cfol"), *images).history[-1]["loss"]
    finally:
        torch.set_num_threads(before)
    assert loss == pytest.approx(train(tiny(method="cfol"), *images).history[-1]["loss"], abs=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["step", "onecycle", "cosine"])
def test_other_types_and_schedules_learn(tiny, images, dtype, schedule):
    done = train(tiny(dtype=dtype, schedule=schedule, epochs=6, lr=0.1), *images, crop=1, flip=True)
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    assert all(v.dtype == torch.float32 for v in done.weights["last"].values())


def test_history_is_the_held_out_split(tiny, images):
    config = tiny(epochs=3, select="mean")
    done = train(config, *images)
    model = new_model(config, images[0])
    model.load_state_dict(done.weights["last"])
    attack = {"robust": {"eps": config.eps, "step": config.step, "steps": config.steps}}
    o = evaluate(model, images[1].images, images[1].labels, attack, seed=3)
    assert done.history[-1]["n"] == images[1].counts.tolist()
    assert done.history[-1]["clean"] == counts(o, "clean")[0].tolist()
    assert done.history[-1]["robust"] == counts(o, "robust")[0].tolist()


@pytest.mark.parametrize(("select", "score"), [("mean", np.mean), ("worst", np.min)])
def test_selects_the_best_epoch_by_mean_or_worst_class(tiny, images, select, score):
    done = train(tiny(epochs=8, select=select, lr=0.1), *images)
    scores = [score(np.array(e["robust"]) / np.array(e["n"])) for e in done.history]
    assert done.selected_epoch == int(np.argmax(scores)) + 1
    until = train(tiny(epochs=8, select=select, lr=0.1, validate_every=done.selected_epoch), *images)
    if done.selected_epoch > 4:
        assert same(until.weights["selected"], done.weights["selected"])


def test_hooks_of_a_method_reach_the_loop(tiny, images):
    seen = {"steps": 0, "epochs": []}

    @register("probe")
    class Probe(Method):
        def radius(self, y):
            return (y % 2).double()  # even classes are trained on clean images

        def after_step(self, batch):
            seen["steps"] += 1
            assert torch.equal(images[0].labels[batch.index], batch.y)
            assert batch.logits.shape == (64, 10)
            assert not batch.logits.requires_grad

        def after_epoch(self, epoch, report):
            seen["epochs"].append(epoch)
            assert report["robust"].shape == (10,)
            assert (report["robust"] <= 1).all()

    try:
        train(tiny(method="probe", epochs=4, validate_every=2), *images)
    finally:
        METHODS.pop("probe")
    assert seen == {"steps": 4 * (len(images[0]) // 64), "epochs": [2, 4]}


DEFERRED, FAIR = {"name": "class-balanced", "start": 0.4}, {"name": "fair-weights", "split": "train"}
FRL = {"name": "frl", "remargin": True, "delta": 0.0}


@pytest.mark.parametrize("method", ["erm", "cfol", "fol", "resampling", DEFERRED, FAIR, FRL, "cfol+dafa"], ids=str)
@pytest.mark.parametrize("stop_at", [1, 5])
def test_sigterm_and_ctrl_c_stop_after_a_step_and_the_run_goes_on_to_the_same_bytes(
    tiny, images, tmp_path, method, stop_at
):
    own = {"optimizer": "adam", "lr": 0.01} if method == FAIR else {"objective": "trades"} if method == FRL else {}
    own |= {"ensembling": {}} if method == "cfol" else {}
    config, path = tiny(method=method, epochs=3, batch_size=48, ema=0.9, **own), tmp_path / "c.safetensors"
    straight = train(config, *images)

    def kill(done, total):
        if done == stop_at:
            os.kill(os.getpid(), signal.SIGTERM if stop_at == 1 else signal.SIGINT)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"after step {stop_at} of"):
        train(config, *images, checkpoint=path, progress=kill)
    assert signal.getsignal(signal.SIGTERM) is handler
    done = train(config, *images, checkpoint=path)
    assert all(same(straight.weights[w], done.weights[w]) for w in ("last", "selected", "ema"))
    assert straight.history == done.history
    assert straight.selected_epoch == done.selected_epoch


def test_a_checkpoint_of_other_code_is_not_continued(tiny, images, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    first = train(tiny(), *images, checkpoint=path)
    monkeypatch.setattr(train_module, "code_hash", lambda *_: "other")
    with pytest.warns(UserWarning, match="starts anew"):
        again = train(tiny(), *images, checkpoint=path)
    assert same(first.weights["last"], again.weights["last"])


def test_layers_that_draw_are_repeatable_too_and_the_global_generator_is_left_alone(tiny, images, tmp_path):
    @models.register("test-dropout")
    def make(num_classes, channels):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(64, num_classes))

    def stop(done, total):
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        config, path = tiny(model="test-dropout"), tmp_path / "c.safetensors"
        torch.manual_seed(5)
        straight = train(config, *images)
        assert torch.initial_seed() == 5
        torch.manual_seed(6)
        with pytest.raises(Stopped):
            train(config, *images, checkpoint=path, progress=stop)
        assert same(straight.weights["last"], train(config, *images, checkpoint=path).weights["last"])
    finally:
        models.MODELS.pop("test-dropout")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_that_goes_on_has_its_optimiser_in_the_layout_of_the_weights(
    tiny, images, tmp_path, optimizer, monkeypatch
):
    """CUDA's fused kernels refuse anything else."""
    config, path, seen = tiny(dtype="float32", optimizer=optimizer), tmp_path / "c.safetensors", []

    def stop(done, total):
        if done == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config, *images, checkpoint=path, progress=stop)
    original = train_module._optimizer
    monkeypatch.setattr(train_module, "_optimizer", lambda *a: seen.append(original(*a)) or seen[0])
    train(config, *images, checkpoint=path)
    kept = [(p, v) for p, s in seen[0].state.items() for v in s.values() if v is not None and v.ndim == 4]
    assert any(not p.is_contiguous() for p, _ in kept)
    assert all(v.stride() == p.stride() for p, v in kept)


def test_checkpoints_can_be_switched_off(tiny, images, tmp_path):
    train(tiny(), *images, checkpoint=tmp_path / "c.safetensors", checkpoint_every=0)
    assert not (tmp_path / "c.safetensors").exists()


def test_damaged_and_foreign_checkpoints_are_refused(tiny, images, tmp_path):
    path = tmp_path / "c.safetensors"
    train(tiny(), *images, checkpoint=path)
    whole = path.read_bytes()
    with pytest.raises(Corrupt, match="another run"):
        train(tiny(seed=5), *images, checkpoint=path)
    flipped = bytearray(whole)
    flipped[-9] ^= 4
    for broken in (whole[:-1], bytes(flipped), b"what is this"):
        path.write_bytes(broken)
        with pytest.raises(Corrupt, match="delete it"):
            train(tiny(), *images, checkpoint=path)
        assert path.read_bytes() == broken
    path.write_bytes(whole)
    train(tiny(), *images, checkpoint=path)


def test_a_diverged_run_says_so(tiny, images):
    with pytest.raises(FloatingPointError, match="lower lr"):
        train(tiny(lr=1e9, epochs=3), *images)


@pytest.mark.parametrize(("objective", "share"), [("at", 0.15), ("clean", 0.2)])
def test_looks_at_the_held_out_split_are_cheap_by_default(objective, share):
    """At most 15 % of the time; after standard training 4 passes of a tenth of the images against 3 of the others."""
    from cfol_nb.config import RunConfig
    from cfol_nb.data import prepare

    config = RunConfig(epochs=3, objective=objective)
    train(config, *prepare(config)[:2])  # the first call of an operation is slow
    runs = [train(config, *prepare(config)[:2]) for _ in range(5)]  # of a fraction of a second each
    assert 0 < np.median([run.looking / run.seconds for run in runs]) < share


def test_works_in_a_thread_where_signals_cannot_be_caught(tiny, images):
    out = []
    worker = threading.Thread(target=lambda: out.append(train(tiny(), *images)))
    worker.start()
    worker.join()
    assert same(out[0].weights["last"], train(tiny(), *images).weights["last"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch_size": 1000}, "batch_size=1000 is larger"),
        ({"method": "cfl"}, "did you mean 'cfol'"),
        ({"objective": "trade"}, "did you mean 'trades'"),
        ({"model": {"name": "smallcnn", "depth": 2}}, "no option 'depth'"),
        ({"method": {"name": "cfol", "alpha": 1}}, "no option 'alpha'; it takes: gamma, eta, drift, form"),
        ({"method": {"name": "erm", "seed": 1}}, "no option 'seed'"),
        pytest.param(
            {"device": "cuda"}, "no CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
        ),
    ],
)
def test_bad_settings_are_refused_before_work(tiny, images, given, says):
    with pytest.raises(ValueError, match=says):
        train(tiny(**given), *images)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.rand(4, 1, 8, 8) * 255, torch.zeros(4, dtype=torch.int64), r"\[0, 1\]"),
        (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 10]), "10 outputs"),
        (torch.rand(4, 1, 8, 8), torch.tensor([0, -1, 2, 3]), "from -1"),
        (torch.rand(4, 1, 8, 8), torch.zeros(3, dtype=torch.int64), "4 images and 3"),
        (torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), "at least one"),
        (torch.rand(4, 1, 8, 8), torch.zeros(4), "one integer per image"),
    ],
)
def test_evaluate_refuses_bad_input(tiny, images, x, y, says):
    with pytest.raises(ValueError, match=says):
        evaluate(new_model(tiny(), images[0]), x, y)


def test_evaluate_refuses_a_broken_model(tiny, images):
    model = new_model(tiny(), images[0])
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate(model, images[1].images, images[1].labels)


def test_evaluate_is_every_attack_on_every_image(tiny, images):
    model = new_model(tiny(), images[0])
    done = []
    o = evaluate(
        model,
        images[1].images,
        images[1].labels,
        {"weak": {"eps": 0.01, "step": 0.01, "steps": 1}, "strong": {"eps": 0.5, "step": 0.1, "steps": 10}},
        batch_size=7,
        progress=done.append,
        class_names=images[1].class_names,
    )
    assert list(o.predictions) == ["clean", "weak", "strong"]
    assert sum(done) == len(images[1])
    x = as_float(images[1].images, torch.float64, "cpu")
    assert np.array_equal(o.predictions["clean"], model(x).argmax(1).numpy())
    assert o.correct("strong").sum() <= o.correct("weak").sum()
    assert o.attacks["strong"]["steps"] == 10
    again = type(o).from_tensors(o.tensors(), o.meta())
    assert all(np.array_equal(again.predictions[k], v) for k, v in o.predictions.items())


def test_a_run_that_leaves_the_track_is_told_from_noise(tiny, images):
    def history(*right, n=60, losses=()):
        halves = [{"robust": [r // 2, r - r // 2], "n": [n // 2, n - n // 2], "loss": 0.6} for r in right]
        return [e | ({"loss": losses[i]} if losses else {}) for i, e in enumerate(halves)]

    def fell(*right, over, **more):
        return any("half of its best" in text for text in _amiss(history(*right, **more), "robust", over))

    assert fell(30, 55, 20, over=True)
    assert not fell(30, 55, 20, over=False)  # one look
    assert not fell(50, 20, 20, over=False)
    assert fell(50, 20, 20, 20, over=False)
    assert not fell(50, 20, 20, 26, over=False)  # it came back to more than the half
    assert not fell(30, 50, 26, over=True)
    assert not fell(8, 6, 3, over=True)  # chance, and noise around it
    assert not fell(0, over=True)
    assert _amiss(history(50, 20), "clean", over=True) == []
    # two classes and 60 images: guessing is right on 30, and on 41 or fewer in all but a thousandth of the cases
    assert "not above that of guessing" in _amiss(history(20, 41), "robust", over=True)[0]
    assert _amiss(history(20, 42), "robust", over=True) == _amiss(history(20, 41), "robust", over=False) == []
    # a loss begins near log 2 = 0.69
    assert "twice" in _amiss(history(50, 50, losses=(0.6, 1.4)), "robust", over=False)[0]
    assert _amiss(history(50, 50, losses=(0.6, 1.38)), "robust", over=False) == []
    assert _amiss(history(50, 50, losses=(0.9, 1.7)), "robust", over=False) == []
    with pytest.warns(Diverging, match="epoch 1: CFOL's distribution has collapsed") as caught:
        done = train(tiny(method={"name": "cfol", "drift": 1e5}, epochs=3), *images)
    caught = [w for w in caught if w.category is Diverging]  # the sampler warns of its step, too
    assert len(caught) == len({text for e in done.history for text in e.get("warnings", ())})  # each is told once
    assert done.history[-1]["warnings"]


@pytest.mark.parametrize(
    "given", [{"training_attack": "n-fgsm"}, {"steps": 1, "step": 0.2}], ids=["n-fgsm", "one step"]
)
def test_a_single_step_is_watched_by_pgd_10_and_by_its_own_accuracy(tiny, images, given):
    config = tiny(**{"steps": 1, "epochs": 2, "batch_size": 48, "method": "cfol", **given})
    done = train(config, *images)
    model = new_model(config, images[0])
    model.load_state_dict(done.weights["last"])
    attack = {"robust": {"eps": 0.15, "step": 2.5 * 0.15 / 10, "steps": 10}}
    o = evaluate(model, images[1].images, images[1].labels, attack, seed=2)
    assert done.history[-1]["robust"] == counts(o, "robust")[0].tolist()
    for entry in done.history:  # 48 images a step, only whole batches
        assert sum(entry["drawn"]) == len(images[0]) // 48 * 48
        assert all(0 <= right <= n for right, n in zip(entry["trained"], entry["drawn"], strict=True))
    plain = train(tiny(epochs=1), *images).history[0]
    assert not {"drawn", "trained"} & set(plain)  # several steps: nothing is added to what is stored
    assert train(tiny(epochs=1, objective="clean", **{"steps": 1, **given}), *images).history[0].keys() == plain.keys()


def test_what_a_single_step_met_is_the_accuracy_on_its_own_images(tiny, images, monkeypatch):
    """Against the logits that the method hears of, step by step."""
    seen = []

    def listen(self, batch):
        seen.append((batch.y, batch.logits.argmax(1) == batch.y))

    monkeypatch.setattr(Method, "after_step", listen)
    entry = train(tiny(epochs=1, training_attack="n-fgsm", steps=1), *images).history[0]
    y, right = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert entry["drawn"] == torch.bincount(y, minlength=10).tolist()
    assert entry["trained"] == torch.bincount(y[right], minlength=10).tolist()


def test_a_stopped_fast_run_goes_on_to_the_same_history(tiny, images, tmp_path):
    config = tiny(training_attack="n-fgsm", steps=1, ema=0.9, batch_size=32, epochs=3)
    whole, path = train(config, *images), tmp_path / "c.safetensors"

    def stop(done, total):
        if done == total // 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        train(config, *images, checkpoint=path, progress=stop)
    again = train(config, *images, checkpoint=path)
    assert again.history == whole.history
    assert all(same(again.weights[w], whole.weights[w]) for w in whole.weights)


def watched(*looks, n=500):
    """A history from (clean, PGD, own) in per cent, each a number for all classes or one a class (three)."""
    each = [[c if isinstance(c, tuple) else (c,) * 3 for c in look] for look in looks]
    return [
        {
            "epoch": i,
            "n": [n] * 3,
            "drawn": [10 * n] * 3,
            **{"clean": [n * v // 100 for v in clean], "robust": [n * v // 100 for v in pgd]},
            "trained": [n * v // 10 for v in own],
        }
        for i, (clean, pgd, own) in enumerate(each, 1)
    ]


@pytest.mark.parametrize(
    ("looks", "first"),
    [
        ([(70, 40, 40), (75, 45, 45), (80, 3, 85)], "a"),  # as FGSM on CIFAR-10; all at once: any of them
        ([(70, 40, 40), (75, 45, 45), (80, (45, 2, 45), (45, 90, 45)), (80, 2, 90)], "b"),
        ([(70, 40, 40), (75, (45, 45, 9), (45, 45, 80)), (80, (45, 45, 5), (45, 45, 90))], "c"),  # one class alone
        ([(50, 2, 40), (60, 1, 50), (70, 0, 70)], "a"),  # never above guessing
        ([(70, 40, 40), (75, 45, 45), (80, 3, 85), (80, 2, 90), (80, 1, 95)], "a"),
        ([(70, 40, 40), (75, 45, 45), (80, 43, 60), (85, 41, 75)], None),  # overfitting, not catastrophic
        ([(70, 40, 40), (75, 45, 45), (20, 3, 20)], None),  # training has diverged: its own accuracy falls, too
        ([(70, 40, 40), (75, 45, 45), (80, 3, 85), (80, 45, 45)], None),  # it has recovered
        ([(70, 45, 40), (70, (45, 9, 45), (42, 42, 42)), (70, 45, 44)], None),  # a class swings
        ([(70, 45, 40), (75, (45, 45, 9), (45, 45, 80))], None),  # one look at one class
        ([(33, 33, 33), (33, (99, 0, 0), 33), (33, (0, 99, 0), 34)], None),  # nothing is learnt yet
    ],
)
def test_catastrophic_overfitting_is_pgd_falling_while_the_own_accuracy_rises(looks, first):
    said = _collapse(watched(*looks), ("a", "b", "c"))
    assert ("first in class" in said) == (first is not None)
    assert first is None or f"first in class {first!r}" in said
    between = [e if i % 2 else {"epoch": 0, "drawn": [9], "trained": [9]} for i, e in enumerate(watched(*looks), 1)]
    assert _collapse(between[:1], "abc") == ""  # epochs without a look say nothing


def test_fgsm_at_a_large_radius_is_warned_of_and_n_fgsm_is_not(digits):
    """FGSM without noise: right on 57 % of the training batches under its own attack, on 0 % under PGD-10."""
    images, told = split(digits.train, 0.2), {}
    for k in (0, 2):
        attack = {"name": "n-fgsm", "k": k}
        config = RunConfig(training_attack=attack, eps=0.4, epochs=20, lr=0.1, model="mlp")
        with pytest.warns(Diverging) as caught:
            history = train(config, *images).history
        texts = [str(w.message) for w in caught]
        told[k] = [text for text in texts if "catastrophic overfitting" in text]
        last = history[-1]
        gap = sum(last["trained"]) / sum(last["drawn"]) - sum(last["robust"]) / sum(last["n"])
        assert (gap > 0.3) == (k == 0)
    assert len({*re.findall(r"first in class '[0-9]'", " ".join(told[0]))}) == len(told[0]) == 1  # told once
    assert not told[2]


def test_a_divergence_cannot_be_attacked_from_the_image_itself(tiny):
    with pytest.raises(ValueError, match="k=0: the KL divergence that 'trades' attacks has no gradient"):
        check(tiny(objective="trades", steps=1, training_attack={"name": "n-fgsm", "k": 0}))

"""AutoAttack beside pyautoattack, and PGD-20 with and without retiring broken images, as ratios in one run.

A small CNN on digits and, if data/cifar10 is there, on CIFAR-10, and a width-16 PreActResNet-18; all are trained for a
moment. pyautoattack has a process of its own, with the system's memory settings as its users have them: importing
cfol_nb changes those (see `cfol_nb`). The variants take turns, round by round.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from common import DEVICE, elsewhere, keep
from pyautoattack import AutoAttack as Theirs

from cfol_nb.attacks import pgd
from cfol_nb.autoattack import autoattack
from cfol_nb.data import load
from cfol_nb.models import build

CIFAR = "imagefolder:data/cifar10"
CASES = [  # network, its options, data set, radius, training steps, images, rounds, other variants of ours
    ("smallcnn", {}, "digits", 0.15, 300, 300, 5, {}),
    ("smallcnn", {}, CIFAR, 8 / 255, 300, 300, 3, {}),
    ("preactresnet18", {"width": 16}, CIFAR, 8 / 255, 150, 100, 2, {}),
]
if DEVICE.type == "cuda":  # one round may take ten minutes
    CASES[2] = ("preactresnet18", {}, *CASES[2][2:5], 10_000, 1, {"cfol-nb, compiled": {"compiled": True}})
THEIRS = "pyautoattack 0.2.0"


def prepare(case: str) -> SimpleNamespace:
    """The same model and images in every process. case: its number, or "number:images"."""
    number, _, images = case.partition(":")
    name, spec, dataset, eps, steps, n, rounds, variants = CASES[int(number)]
    n = int(images or n)
    data = load(dataset)
    torch.manual_seed(0)
    model = build(name, num_classes=10, channels=data.train.images.shape[1], **spec).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        i = torch.randint(len(data.train), (128,))
        x, y = data.train.images[i].to(DEVICE).float() / 255, data.train.labels[i].to(DEVICE)
        x_adv = pgd(model, x, y, eps, eps / 2, 4)
        model.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
    pick = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[: max(n, 1000)]
    x, y = data.test.images[pick].to(DEVICE).float() / 255, data.test.labels[pick].to(DEVICE)
    more = {"name": name, "n": n, "rounds": rounds, "variants": variants}
    return SimpleNamespace(data=dataset.rpartition("/")[2], model=model.eval(), eps=eps, x=x, y=y, **more)


def serve(number: str) -> None:
    """pyautoattack once for every line that comes in; its seconds, and which images it does not break, go out."""
    case = prepare(number)
    x, y = case.x[: case.n], case.y[: case.n]
    for _ in sys.stdin:
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # what it says itself
            adv = Theirs(case.model, eps=case.eps, norm="Linf", seed=0, device=DEVICE).run_standard_evaluation(x, y)[0]
        print(json.dumps([time.perf_counter() - start, right(case.model, adv, y).tolist()]), flush=True)


def here(work):
    def run() -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        held = work()
        return time.perf_counter() - start, held

    return run


@contextlib.contextmanager
def passes(model: torch.nn.Module, seconds: list[float]):
    """Add to the list how long the network was computed in this block, forward and back."""
    forward, grad, spent = model.forward, torch.autograd.grad, 0.0

    def timed(f):
        def g(*args, **options):
            nonlocal spent
            start = time.perf_counter()
            out = f(*args, **options)
            spent += time.perf_counter() - start
            return out

        return g

    model.forward, torch.autograd.grad = timed(forward), timed(grad)
    try:
        yield
    finally:
        del model.forward
        torch.autograd.grad = grad
    seconds.append(spent)


def compare(title: str, rounds: int, more: dict[str, list[float]], **work) -> dict:
    """Each variant in turn; prints seconds and returns what they found last. more: seconds that the variants note."""
    times, results = {k: [] for k in work}, {}
    for _ in range(rounds):
        for k, f in work.items():
            seconds, held = f()
            times[k].append(seconds)
            results[k] = torch.as_tensor(held)
    times |= {k: v for k, v in more.items() if v}
    keep(title, times, results)
    base = statistics.median(times[next(iter(work))])
    print(title)
    for k, t in times.items():
        m = statistics.median(t)
        print(f"  {k:34}{m:8.1f} s ({min(t):.1f} to {max(t):.1f}), {base / m:5.2f} x")
    return results


def right(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return (model(x).argmax(1) == y).cpu()


def main() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for number in sys.argv[1:] or map(str, range(len(CASES))):
        try:
            case = prepare(number)
        except FileNotFoundError:
            print("data/cifar10 is not there: digits only")
            continue
        name, model, eps, rounds = case.name, case.model, case.eps, case.rounds
        x, y = case.x[: case.n], case.y[: case.n]
        work = {THEIRS: elsewhere(__file__, number)}
        network = []

        def attacked(how: dict, model=model, x=x, y=y, eps=eps, network=network) -> torch.Tensor:
            """Which images hold; on a CPU, where nothing is computed behind the clock, notes the network's own time."""
            plain = not how and DEVICE.type == "cpu"
            with passes(model, network) if plain else contextlib.nullcontext():
                points = autoattack(model, x, y, eps, **how)
            return right(model, points, y)

        for k, how in {"cfol-nb": {}, **case.variants}.items():
            work[k] = here(lambda f=attacked, how=how: f(how))
        title = f"AutoAttack standard, {name} on {case.data}, {case.n} images, L-inf {eps:.3g}"
        held = compare(title, rounds, {"the network's passes in it": network}, **work)
        print(f"  clean {right(model, x, y).float().mean():.3f}")
        for k, v in held.items():
            same = (v == held[THEIRS]).float().mean()
            print(f"  {k:34}robust {v.float().mean():.3f}, agrees on {same:.3f} of the images")
        x, y = case.x, case.y

        def pgd20(retire: bool, model=model, x=x, y=y, eps=eps) -> torch.Tensor:
            """Which images no point on the way breaks: noted to the end, or retired at once."""
            held = torch.ones_like(y, dtype=torch.bool)

            def loss(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                if len(t) == len(y):
                    held.logical_and_(z.detach().argmax(1) == t)
                return torch.nn.functional.cross_entropy(z, t, reduction="none")

            g = torch.Generator(DEVICE).manual_seed(0)
            adv = pgd(model, x, y, eps, eps / 8, 20, loss=loss, generator=g, retire=retire)
            return held.cpu() & right(model, adv, y)

        work = {"to the end": here(lambda: pgd20(False)), "retiring": here(lambda: pgd20(True))}
        found = compare(f"PGD-20, {name} on {case.data}, {len(y)} images", rounds, {}, **work)
        same = torch.equal(found["to the end"], found["retiring"])
        print(f"  robust {found['retiring'].float().mean():.3f}, the same images: {same}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    else:
        main()

"""AutoAttack beside pyautoattack, and PGD-20 with and without retiring broken images, as ratios in one run.

A small CNN on digits and, if data/cifar10 is there, a width-16 PreActResNet-18 on CIFAR-10; both are trained for a
moment. The variants take turns, round by round. usage: autoattack.py [rounds]
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from pyautoattack import AutoAttack as Theirs

from cfol_nb.attacks import pgd
from cfol_nb.autoattack import autoattack
from cfol_nb.data import load
from cfol_nb.models import build


def trained(name: str, data, eps: float, steps: int, **spec) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build(name, num_classes=10, channels=data.train.images.shape[1], **spec)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        i = torch.randint(len(data.train), (128,))
        x, y = data.train.images[i].float() / 255, data.train.labels[i]
        x_adv = pgd(model, x, y, eps, eps / 2, 4)
        model.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
    return model.eval()


def compare(title: str, rounds: int, **work) -> dict:
    """Times each variant in turn; returns the last results."""
    times, results = {k: [] for k in work}, {}
    for _ in range(rounds):
        for k, f in work.items():
            start = time.perf_counter()
            results[k] = f()
            times[k].append(time.perf_counter() - start)
    base = statistics.median(times[next(iter(work))])
    print(title)
    for k, t in times.items():
        m = statistics.median(t)
        print(f"  {k:34}{m:8.1f} s ({min(t):.1f} to {max(t):.1f}), {base / m:5.2f} x")
    return results


def right(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


def main(rounds: int) -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    cases = [("smallcnn", load("digits"), 0.15, 300, {}, 300, {})]
    try:
        cifar = load("imagefolder:data/cifar10")
        more = {"cfol-nb, compiled": {"compiled": True}}
        cases.append(("preactresnet18", cifar, 8 / 255, 150, {"width": 16}, 60, more))
    except FileNotFoundError:
        print("data/cifar10 is not there: digits only")
    for name, data, eps, steps, spec, n, more in cases:
        model = trained(name, data, eps, steps, **spec)
        pick = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
        x, y = data.test.images[pick[:n]].float() / 255, data.test.labels[pick[:n]]
        attacks = {
            "pyautoattack 0.2.0": lambda m=model, x=x, y=y, e=eps: Theirs(
                m, eps=e, norm="Linf", seed=0
            ).run_standard_evaluation(x, y)[0],
            "cfol-nb": lambda m=model, x=x, y=y, e=eps: autoattack(m, x, y, e),
            **{k: lambda m=model, x=x, y=y, e=eps, o=o: autoattack(m, x, y, e, **o) for k, o in more.items()},
        }
        found = compare(f"AutoAttack standard, {name} on {data.name}, {n} images, L-inf {eps:.3g}", rounds, **attacks)
        held = {k: right(model, v, y) for k, v in found.items()}
        first = held["pyautoattack 0.2.0"]
        print(f"  clean {right(model, x, y).float().mean():.3f}")
        for k, v in held.items():
            print(f"  {k:34}robust {v.float().mean():.3f}, agrees on {(v == first).float().mean():.3f} of the images")
        many = pick[: min(len(pick), 1000)]
        x, y = data.test.images[many].float() / 255, data.test.labels[many]

        def pgd20(retire: bool, model=model, x=x, y=y, eps=eps) -> torch.Tensor:
            """Which images no point on the way breaks: noted to the end, or retired at once."""
            held = torch.ones(len(y), dtype=torch.bool)

            def loss(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                if len(t) == len(y):
                    held.logical_and_(z.detach().argmax(1) == t)
                return torch.nn.functional.cross_entropy(z, t, reduction="none")

            g = torch.Generator().manual_seed(0)
            adv = pgd(model, x, y, eps, eps / 8, 20, loss=loss, generator=g, retire=retire)
            return held & right(model, adv, y)

        found = compare(
            f"PGD-20, {len(y)} images", rounds, **{"to the end": lambda: pgd20(False), "retiring": lambda: pgd20(True)}
        )
        same = torch.equal(found["to the end"], found["retiring"])
        print(f"  robust {found['retiring'].float().mean():.3f}, the same images: {same}")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:2] or ("3",)))

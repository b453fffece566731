"""A PGD-7 training step of PreActResNet-18: ceilings of this machine, then our engines, as ratios in one run.

The base is the style of most released code: float32, contiguous, eager, `autograd.grad` for the input, in a process of
its own that keeps the system's way with freed memory. All variants do the same work on the same batch; they take turns,
round by round. usage: step.py [width] [rounds], by default widths 16 and 64
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from common import DEVICE, elsewhere, keep

from cfol_nb.attacks import pgd
from cfol_nb.config import RunConfig
from cfol_nb.engine import make_step
from cfol_nb.methods import Method
from cfol_nb.models import build
from cfol_nb.objectives import AT
from cfol_nb.runs import device_name

BATCH, FORWARD = 128, 1.1108e9  # floating point operations of one image at width 64, counted layer by layer


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work) -> float:
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def matmul(dtype: torch.dtype, n: int = 2048 if DEVICE.type == "cpu" else 8192) -> float:
    """Operations per second of a matrix product on random numbers: the ceiling."""
    a = torch.randn(n, n, device=DEVICE).to(dtype)
    out = a @ a
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, a, out=out)) for _ in range(10))


def released(width: int):
    """The loop that most released code runs."""
    model = build("preactresnet18", width=width).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)

    def work(pixels: torch.Tensor, y: torch.Tensor) -> None:
        x = pixels.float() / 255
        x_adv = pgd(model, x, y, check=False)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()

    return work


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    return pixels, torch.randint(0, 10, (BATCH,), device=DEVICE)


def serve(width: int) -> None:
    """A step of the released style for every line that comes in; its seconds go out."""
    work, given = released(width), batch()
    for _ in sys.stdin:
        print(seconds(lambda: work(*given)), flush=True)


def ours(width: int, dtype: str, engine: str, attack: str = "pgd"):
    model = build("preactresnet18", width=width).to(DEVICE, memory_format=torch.channels_last)
    config = RunConfig(dataset="cifar10", dtype=dtype, training_attack=attack)
    rate = torch.tensor(0.1, device=DEVICE) if engine == "graph" else 0.1
    fused = True if engine == "graph" else None
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9, weight_decay=5e-4, fused=fused)
    method, generator = Method(torch.arange(10), 10), torch.Generator(DEVICE).manual_seed(0)
    return make_step(config, engine, model, AT(), method, optimizer, generator, 4, True)


def main(width: int, rounds: int) -> None:
    torch.manual_seed(0)
    given = batch()
    print(f"{device_name(DEVICE.type)}, {torch.get_num_threads()} threads, torch {torch.__version__},", end=" ")
    print(f"width {width}, batch {BATCH}")
    ceiling = {d: matmul(d) for d in (torch.float32, torch.bfloat16)}
    print(f"  matmul float32 {ceiling[torch.float32] / 1e9:.0f}, bfloat16 {ceiling[torch.bfloat16] / 1e9:.0f} GFLOP/s")
    work = 17 * FORWARD * BATCH * (width / 64) ** 2  # seven attack steps of 2 forwards, one training step of 3
    floor = work / ceiling[torch.bfloat16]

    fast = ("graph",) if DEVICE.type == "cuda" else ("compile",)

    def timed(work):
        return lambda: seconds(lambda: work(*given))

    base = "released style: float32, contiguous"
    variants = {base: elsewhere(__file__, width), "the same, freed memory kept": timed(released(width))}
    for dtype in ("float32", "bfloat16"):
        for engine in ("eager", *fast):
            variants[f"cfol-nb {dtype} {engine}"] = timed(ours(width, dtype, engine))
    single = {f"cfol-nb bfloat16 {e}": timed(ours(width, "bfloat16", e, "n-fgsm")) for e in ("eager", *fast)}
    variants |= {f"{k}, N-FGSM": step for k, step in single.items()}
    first = {k: step() for k, step in variants.items()}
    for step in variants.values():
        for _ in range(4 if DEVICE.type == "cuda" else 1):
            step()
    times = {k: [] for k in variants}
    for _ in range(rounds):
        for k, step in variants.items():
            times[k].append(step())
    others = {k: times.pop(f"{k}, N-FGSM") for k in single}
    keep(f"PGD-7 step, PreActResNet-18 of width {width}, batch {BATCH}", {**times, "floor: bfloat16 matmul": [floor]})
    base = statistics.median(times[base])
    print(f"  floor by bfloat16 matmul: {1e3 * floor:.1f} ms a step, that is {base / floor:.1f} x the base")
    for k, t in times.items():
        m, spread = statistics.median(t), f"({1e3 * min(t):.1f} to {1e3 * max(t):.1f})"
        print(f"  {k:38}{1e3 * m:9.1f} ms {spread}, {base / m:5.2f} x, gap {m / floor:.2f}")
        print(f"  {'':38}first call {first[k]:.1f} s, {50_000 / BATCH * m:.1f} s per 50,000 images")
    for k, t in others.items():  # 17 passes against 5
        engine = k.rpartition(" ")[2]
        keep(f"N-FGSM step, {engine}, width {width}, batch {BATCH}", {"PGD-7": times[k], "N-FGSM": t})
        m = statistics.median(t)
        print(f"  {k + ', N-FGSM':38}{1e3 * m:9.1f} ms, {statistics.median(times[k]) / m:5.2f} x PGD-7, limit 3.40")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(int(sys.argv[2])))
    for width in sys.argv[1:2] or ("16", "64"):
        main(int(width), *(int(a) for a in sys.argv[2:3] or ("5",)))

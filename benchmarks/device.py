"""A quarter of an hour on a bare CUDA machine: everything in order of worth, each part bounded in time.

Tests; a step with the ceilings of the device; the fast preset at full width on all images; PGD-7 likewise; AutoAttack.
A part is a command of this repository in a process of its own; when its time is over it is stopped (what takes part
in a run goes on from its checkpoint) and the next one begins. `OUT/parts.json` is written anew after each part, their
outputs lie beside it, runs in OUT/results, seconds in OUT/results/speed. No network is used.

usage: device.py --minutes 14 --archive cifar10.tar --out OUT; the archive holds train/CLASS/*.png and test/CLASS/*.png,
and is not needed where data/cifar10 is there. --rehearse: all of it at a tiny size on digits and any device.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from cfol_nb.config import preset
from cfol_nb.files import ROOT, read_json, write_json

CIFAR = "imagefolder:data/cifar10"
PGD = ("-s", "training_attack=pgd")
CUDA = "graph_replays or on_a_device or real_device"


def part(name: str, share: float, *command: str) -> tuple[str, float, tuple[str, ...]]:
    """share: of the time that is left then, at most."""
    return name, share, (sys.executable, *command)


def parts(rehearse: bool, results: Path) -> list[tuple[str, float, tuple[str, ...]]]:
    def suite(name: str, share: float, methods: str, *more: str, seeds: int = 1):
        given = ("--methods", methods, "--seeds", str(seeds), "--minutes", "{minutes}", "--results", str(results))
        tiny = [f"{k}={v}" for k, v in preset("fast", CIFAR).items() if k in ("lr", "ema", "validate_every")]
        tiny += ["training_attack=n-fgsm", "epochs=2", "train_limit=20", "test_limit=4"]
        recipe = [w for s in tiny for w in ("-s", s)] if rehearse else ["--preset", "fast"]
        dataset = "digits" if rehearse else CIFAR
        return part(name, share, "-m", "cfol_nb.cli", "suite", dataset, *given, *recipe, *more)

    tests = ("tests/test_config.py", "-k", "needs_no_torch") if rehearse else ("tests/test_engine.py", "-k", CUDA)
    width, case = ("2", "0:20") if rehearse else ("64", "2:500")
    judge = ("--autoattack", "fast" if rehearse else "standard", "--results", str(results))
    return [
        part("tests", 0.2, "-m", "pytest", "-q", *tests),
        part("step", 0.2, "benchmarks/step.py", width, "1" if rehearse else "20"),
        suite("fast", 0.5, "erm,cfol"),
        suite("fast-trades", 0.4, "trades,cfol-trades"),
        suite("fast-seeds", 0.3, "erm,cfol", seeds=3),
        suite("pgd", 0.5, "erm,cfol", *PGD),
        part("autoattack", 0.7, "-m", "cfol_nb.cli", "publish", "{first}", *judge),
        part("pyautoattack", 1.0, "benchmarks/autoattack.py", case),
    ]


def first_two(results: Path) -> list[str]:
    """The names of the first part's runs."""
    found = [(p.stem, read_json(p)["config"]) for p in sorted(results.glob("*.json"))]
    return [n for n, c in found if c["seed"] == 0 and c["objective"]["name"] == "at" and c["steps"] == 1][:2]


def bounded(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> int | None:
    """The exit status; None if the time was over: Ctrl-C first, after which checkpoints are written, then the end."""
    with open(log, "w") as out:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return child.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            for sign, grace in ((signal.SIGINT, 5), (signal.SIGKILL, 5)):
                os.killpg(child.pid, sign)
                try:
                    child.wait(grace)
                    break
                except subprocess.TimeoutExpired:
                    continue
            return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs/device"))
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    if not asked.minutes > 0:
        parser.error(f"--minutes {asked.minutes:g}: a number above 0 is needed")
    if asked.archive and not asked.archive.is_file():
        parser.error(f"there is no archive {asked.archive}")
    end, results = time.monotonic() + 60 * asked.minutes, asked.out.resolve() / "results"
    results.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="device-"))  # runs with their weights, which are large, and images
    more = {"CFOL_NB_RUNS": str(work / "runs"), "CFOL_NB_SPEED": str(results / "speed"), "CFOL_NB_PROGRESS": "off"}
    if asked.archive:
        with tarfile.open(asked.archive) as archive:
            archive.extractall(work / "data/cifar10", filter="data")
        more["CFOL_NB_DATA"] = str(work / "data")
    source = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    done = []
    for name, share, command in parts(asked.rehearse, results):
        left = end - time.monotonic()
        names = first_two(results) if "{first}" in command else []
        filled = [w.replace("{minutes}", f"{share * left / 60:.2f}") for w in command if w != "{first}"]
        if names:
            filled[4:4] = names
        start, status = time.monotonic(), None
        if left > 1 and (names or "{first}" not in command):
            log = asked.out / f"{name}.log"
            status = bounded(filled, share * left, log, os.environ | more | {"PYTHONPATH": source})
            if status == 1 and "not started" in log.read_text():  # the suite's word for too little time
                status = None
        state = {0: "done", None: "time over" if left > 1 else "not started"}.get(status, f"failed ({status})")
        done.append({"part": name, "state": state, "seconds": round(time.monotonic() - start, 1)})
        write_json(asked.out / "parts.json", {"minutes": asked.minutes, "parts": done})
        print(f"{name}: {state}, {done[-1]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()

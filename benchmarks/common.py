"""What the benchmarks share: a process for the code of others, and the place where seconds are kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cfol_nb.files import ROOT, write_json
from cfol_nb.runs import provenance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def elsewhere(script: str, argument) -> Callable:
    """`script serve argument` in a process with the system's memory settings; each call asks it for a line of JSON."""
    system = os.environ | {"MALLOC_ARENA_MAX": str(8 * os.cpu_count())}  # glibc's default; cfol_nb then sets nothing
    command = [sys.executable, script, "serve", str(argument)]
    child = subprocess.Popen(command, env=system, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask():
        child.stdin.write("\n")
        return json.loads(child.stdout.readline())

    return ask


def keep(what: str, seconds: dict[str, list[float]], held: dict[str, torch.Tensor] | None = None) -> None:
    """Store the seconds of each variant, round by round, the base first, where `07_report` reads them.

    held: which images withstood each variant of an attack (n,) bool; kept are the share, and that alike with the base.
    """
    name = re.sub(r"\W+", "-", what.lower()).strip("-")
    base = next(iter(seconds))
    found = {"what": what, "base": base, "seconds": seconds, **provenance(DEVICE.type)}
    if held:
        found["robust"] = {k: v.double().mean().item() for k, v in held.items()}
        found["agrees"] = {k: (v == held[base]).double().mean().item() for k, v in held.items()}
    folder = Path(os.environ.get("CFOL_NB_SPEED") or ROOT / "results/speed")
    write_json(folder / f"{name}-{DEVICE.type}.json", found)

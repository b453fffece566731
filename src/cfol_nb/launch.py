"""A run on several devices, started from one process. Not in `distributed`: what it imports moves no numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cfol_nb.config import RunConfig
from cfol_nb.distributed import rank


def launch(config: RunConfig, *args: str) -> None:
    """This module's command line in as many processes as the run has devices. RuntimeError with the reason if they
    fail; they are ended if this process is interrupted."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.devices}"]
    process = subprocess.Popen(
        [*words, "-m", __name__, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said, log = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError((said.strip() or log.strip()).splitlines()[-1])


def main() -> None:
    """CONFIG FOLDER CHECKPOINT_EVERY ANEW: one run, in a process of `launch`."""
    from cfol_nb.runs import _work

    config, folder, every_, anew = sys.argv[1:]
    try:
        _work(config, str(Path(folder)), int(every_), anew=bool(int(anew)))
    except Exception as error:
        if not rank():
            print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(1)
    os._exit(0)  # all is stored; taking gloo down at the interpreter's exit aborts now and then


if __name__ == "__main__":
    main()

"""Seconds of every notebook, executed one after another from an empty run store, as `make run` does at first."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from common import keep

from cfol_nb.headless import notebooks, run


def main() -> None:
    seconds = {}
    with tempfile.TemporaryDirectory() as store:
        os.environ["CFOL_NB_RUNS"] = store
        for path in notebooks():
            start = time.perf_counter()
            run(path, Path(store) / path.name)
            seconds[path.stem] = [time.perf_counter() - start]
            print(f"{path.stem:28}{seconds[path.stem][0]:6.1f} s", flush=True)
    keep("every notebook", seconds)


if __name__ == "__main__":
    main()

"""Seconds of every notebook, executed one after another from an empty run store, as `make run` does at first."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from cfol_nb.files import ROOT, write_json
from cfol_nb.headless import notebooks, run
from cfol_nb.runs import provenance


def main() -> None:
    seconds = {}
    with tempfile.TemporaryDirectory() as store:
        os.environ["CFOL_NB_RUNS"] = store
        for path in notebooks():
            start = time.perf_counter()
            run(path, Path(store) / path.name)
            seconds[path.stem] = time.perf_counter() - start
            print(f"{path.stem:28}{seconds[path.stem]:6.1f} s", flush=True)
    write_json(ROOT / "results/notebooks/seconds.json", {"seconds": seconds, **provenance("cpu")})


if __name__ == "__main__":
    main()

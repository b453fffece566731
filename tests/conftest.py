import os
import signal
import sys

os.environ["CFOL_NB_PROGRESS"] = "off"

import pytest
import torch

from cfol_nb import cli
from cfol_nb.config import RunConfig
from cfol_nb.data import load

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Every test has a run store and a data folder of its own."""
    monkeypatch.setenv("CFOL_NB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CFOL_NB_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `cfol-nb` with these words: (exit status, standard output, standard error)."""
    heard = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["cfol-nb", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    yield call
    sys.unraisablehook = sys.__unraisablehook__
    for number, handler in heard.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def digits():
    return load("digits")


@pytest.fixture
def tiny():
    """RunConfig of a run of a second: `tiny(seed=1, method="cfol")`."""
    return lambda **given: RunConfig(**{"epochs": 2, "train_limit": 24, "test_limit": 6, "steps": 2, **given})


class Linear(torch.nn.Module):
    """Logits W x + b on flattened images, in float64."""

    def __init__(self, pixels: int, classes: int, seed: int = 0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(classes, pixels, generator=g, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.randn(classes, generator=g, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


@pytest.fixture
def linear():
    return Linear

import subprocess
import sys
import tarfile

import pytest

from cfol_nb.files import ROOT, read_json

SCRIPT = [sys.executable, "benchmarks/device.py"]


@pytest.mark.slow
def test_a_rehearsal_goes_through_every_part_inside_its_time(tmp_path):
    (tmp_path / "a.png").write_bytes(b"an image")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "train/cat/a.png")
    given = [
        "--rehearse",
        "--minutes",
        "0.5",
        "--archive",
        str(tmp_path / "images.tar"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*SCRIPT, *given], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    parts = read_json(tmp_path / "out/parts.json")["parts"]
    names = ["tests", "step", "fast", "fast-trades", "fast-seeds", "pgd", "autoattack", "pyautoattack"]
    assert [p["part"] for p in parts] == names
    assert {p["state"] for p in parts} <= {"done", "time over", "not started"}, parts
    assert sum(p["seconds"] for p in parts) < 30 + 10 * len(parts)  # what is stopped may write a checkpoint first
    if "done" in [p["state"] for p in parts if p["part"] == "fast"]:  # on a machine that is not too busy
        configs = [read_json(p)["config"] for p in (tmp_path / "out/results").glob("*.json")]
        assert {"erm", "cfol"} <= {c["method"]["name"] for c in configs}
        assert all(c["training_attack"]["name"] == "n-fgsm" for c in configs if c["steps"] == 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "--minutes"),
        (["--minutes", "0"], "a number above 0"),
        (["--minutes", "1", "--archive", "no.tar"], "no archive no.tar"),
    ],
)
def test_a_bad_start_is_refused(tmp_path, given, says):
    done = subprocess.run([*SCRIPT, *given, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()

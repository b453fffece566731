"""Models and weights of others, as people have them."""

import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from cfol_nb.audit import load_weights
from cfol_nb.audit.weights import INSIDE, PREFIXES


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


def other():
    made = net()
    for p in made.parameters():
        nn.init.constant_(p, 3)
    return made


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "safetensors"])
@pytest.mark.parametrize("inside", [None, *INSIDE])
def test_weights_load_from_every_file_and_every_place_in_it(tmp_path, suffix, inside):
    state, path = net().state_dict(), tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({inside: state, "epoch": 3, "optimizer": {"lr": 0.1}} if inside else state, path)
    said = load_weights(loaded := other(), path)
    assert same(net(), loaded)
    assert bool(said) == bool(inside and suffix != "safetensors")


def test_files_of_the_old_format_load(tmp_path):
    torch.save(net().state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    load_weights(loaded := other(), tmp_path / "w.pt")
    assert same(net(), loaded)


@pytest.mark.parametrize("prefix", [*PREFIXES, "module._orig_mod.", "model.module."])
def test_prefixes_are_taken_off_and_said(tmp_path, prefix):
    torch.save({prefix + k: v for k, v in net().state_dict().items()}, tmp_path / "w.pt")
    assert load_weights(loaded := other(), tmp_path / "w.pt") == [f"{prefix!r} taken off the names"]
    assert same(net(), loaded)
    inner = nn.ModuleDict({prefix.split(".")[0]: other()})  # one that has the prefix keeps it
    if prefix.count(".") == 1:
        assert load_weights(inner, tmp_path / "w.pt") == []
        assert same(net(), inner[prefix[:-1]])


def test_an_averaged_model_and_half_precision_load(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(net())
    torch.save({"ema": averaged.half().state_dict(), "epoch": 1}, tmp_path / "w.ckpt")
    said = load_weights(loaded := other(), tmp_path / "w.ckpt")
    assert said == [
        "taken from 'ema' of the file",
        "'module.' taken off the names",
        "float16 read into float32",
    ]
    torch.testing.assert_close(loaded[1].weight, net()[1].weight.half().float(), rtol=0, atol=0)


class Evil:
    def __reduce__(self):
        return (print, ("code of the file ran",))


def wrong(how, path):
    state = net().state_dict()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:700])
    elif how == "png":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    elif how == "text":
        path.write_text("weights, as promised")
    elif how == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif how == "pickle":
        torch.save({"state_dict": state, "hooks": Evil()}, path)
    elif how == "whole module":
        torch.save(net(), path)
    elif how == "no state":
        torch.save({"epoch": 3, "weights": 4}, path)
    else:
        if how == "keys":
            state["head.weight"] = state.pop("3.weight")
        else:
            state["3.weight"] = torch.zeros(9, 8)
        safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "safetensors"])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "is empty: copy or download it again"),
        ("truncated", "truncated.*: copy or download it again"),
        ("png", "is a PNG image: give the file of weights"),
        ("text", "holds no weights: a safetensors file|no file of weights"),
        ("lfs", "git lfs pull"),
        ("pickle", r"asks for builtins\.print, and was not read"),
        ("whole module", r"asks for torch\.nn\.modules.*, and was not read"),
        ("no state", "a dict with epoch, weights: a state dict is needed"),
        ("keys", r"lacks 1 tensors, for example 3.weight: are they of this model\?"),
        ("shapes", r"3.weight is \(9, 8\) in"),
    ],
)
def test_a_wrong_file_of_each_format_is_refused_with_the_next_step(tmp_path, suffix, how, says, capfd):
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors" and how in ("pickle", "whole module", "no state"):
        suffix = "pt"
        path = tmp_path / "w.pt"
    wrong(how, path)
    with pytest.raises(ValueError, match=says) as refused:
        load_weights(net(), path)
    assert str(path) in str(refused.value)
    assert "code of the file ran" not in capfd.readouterr().out


@pytest.mark.parametrize("older", [False, True])
def test_the_line_that_a_whole_module_is_answered_with_lets_through_its_classes_alone(tmp_path, monkeypatch, older):
    """Run as it is printed, it writes what is then loaded; a class that is not named stays refused."""
    path, model, given = tmp_path / "whole.pt", nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    torch.save(model, path, _use_new_zipfile_serialization=not older)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"asks for torch\.nn\.modules") as refused:
        load_weights(given, path)
    line = str(refused.value).split("`")[1]
    if older:  # names the first that was refused
        with pytest.raises(pickle.UnpicklingError):
            exec(line, {"torch": torch})
        return
    exec(line, {"torch": torch, "safetensors": safetensors})
    load_weights(given, tmp_path / "w.safetensors")
    assert torch.equal(given[0].weight, model[0].weight)

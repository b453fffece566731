"""Models and weights of others, as people have them."""

import contextlib
import inspect
import pickle
import pickletools
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import nn

from cfol_nb import cli, stats
from cfol_nb.audit import black_box, blackbox, load, load_weights
from cfol_nb.audit.adapt import Logits, Order, Scores, Transform
from cfol_nb.audit.foreign import Loaded
from cfol_nb.audit.look import first_look, match
from cfol_nb.audit.weights import INSIDE, PREFIXES
from cfol_nb.outcomes import Outcomes


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


# -- models ------------------------------------------------------------------------------------------------------------


def small(outputs=10, channels=1):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, outputs)).eval()


def test_transforms_do_what_they_say():
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = nn.Sequential(*Transform((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 255.0, True).steps())
    by_hand = (255 * x[:, [2, 1, 0]] - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    torch.testing.assert_close(made(x), by_hand, rtol=1e-5, atol=1e-3)
    assert Transform().steps() == []
    (grey,) = Transform(channels=1).steps()
    image = Image.fromarray((255 * x[0]).byte().permute(1, 2, 0).numpy())
    theirs = torch.from_numpy(np.array(image.convert("L")))
    assert ((255 * grey((255 * x[:1]).byte() / 255))[0, 0] - theirs).abs().max() <= 1
    (three,) = Transform(channels=3).steps()
    assert torch.equal(three(x[:, :1]), x[:, :1].repeat(1, 3, 1, 1))


@pytest.mark.parametrize(("how", "of_pillow"), [("bilinear", 2), ("bicubic", 3)])
def test_images_are_resized_as_pillow_does(how, of_pillow):
    x = torch.randint(0, 256, (1, 1, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (resize,) = Transform(side=7, interpolation=how).steps()
    theirs = np.array(Image.fromarray(x[0, 0].numpy()).resize((7, 7), of_pillow))
    assert np.abs(255 * resize(x / 255)[0, 0].numpy() - theirs).max() <= 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mean": (0.5,)}, "both or neither"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "one number or three"),
        ({"mean": (0.5,), "std": (0.0,)}, "above 0"),
        ({"scale": 0.0}, "above 0"),
        ({"interpolation": "lanczos"}, "bilinear, bicubic, nearest"),
        ({"channels": 2}, "1 or 3"),
    ],
)
def test_wrong_preprocessing_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        Transform(**given)


def test_outputs_of_every_kind_become_logits():
    z, hidden = torch.randn(4, 3), torch.randn(4, 5, 6)
    for out in (z, (z, hidden), {"logits": z, "embedding": torch.randn(4, 8)}, {"out": z, "state": hidden}, [z]):
        assert Logits()(out) is z
    one = torch.randn(4)
    for out in (one, one.view(4, 1), (one.view(4, 1), hidden)):
        torch.testing.assert_close(Logits()(out).softmax(1)[:, 1], one.sigmoid())
    for out, says in (((z, z), "2 tensors could be logits"), ({"a": hidden}, "0 tensors"), ("logits", "returns a str")):
        with pytest.raises(ValueError, match=says):
            Logits()(out)


def test_torchscript_and_exported_programs_are_models_with_gradients(tmp_path):
    model, x = small(), torch.rand(3, 1, 8, 8)
    torch.jit.script(model).save(tmp_path / "s.pt")
    exported(tmp_path)
    for name in ("s.pt", "e.pt2"):
        got = load(str(tmp_path / name)).model
        seen = x[:2].clone().requires_grad_()
        torch.testing.assert_close(got(seen), model(x[:2]))
        (g,) = torch.autograd.grad(got(seen).max(), seen)
        assert g.abs().sum() > 0
    with pytest.raises(ValueError, match="has its own weights"):
        load(str(tmp_path / "s.pt"), tmp_path / "w.pt")


class Writes:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def rewritten(path, change):
    """The archive with `change(name, content)` for each of its parts, None: as it is."""
    with zipfile.ZipFile(path) as old:
        parts = {n: old.read(n) for n in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in parts.items():
            new.writestr(name, content if (other := change(name, content)) is None else other)


@pytest.mark.parametrize("form", ["weights.pt", "script.pt"])
def test_pickles_in_files_run_nothing(tmp_path, form):
    path, model, ran = tmp_path / form, small(), tmp_path / "ran"
    torch.save(model.state_dict(), path) if form == "weights.pt" else torch.jit.script(model).save(path)
    code = pickle.dumps(Writes(ran), 2)
    rewritten(path, lambda name, _: code if name.endswith(".pkl") else None)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_weights(model, path) if form == "weights.pt" else load(str(path))
    assert not ran.exists()
    asks = {op.name: argument for op, argument, _ in pickletools.genops(code)}  # so that reading it would have
    assert asks["GLOBAL"] == "io open"
    assert "REDUCE" in asks


def exported(tmp_path):
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(small(), (torch.rand(3, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "e.pt2")
    return tmp_path / "e.pt2"


def changed(part, old, new):
    def change(name, content):
        if re.search(part, name):
            assert re.search(old, content.decode())
            return re.sub(old, lambda _: new, content.decode()).encode()

    return change


@pytest.mark.parametrize("how", ["size", "operator", "attribute", "constant", "weight", "name", "guard", "sample"])
def test_an_exported_program_runs_nothing_but_operations_on_tensors(tmp_path, how):
    """Through each of the ways by which `torch.export.load` alone runs what a file says, or may."""
    path, ran = exported(tmp_path), tmp_path / "ran"
    call = f"__import__('pathlib').Path('{ran}').touch()"
    constant = '{"config": {"c": {"path_name": "opaque_obj_0", "is_param": false, "use_pickle": true}}}'
    rewritten(
        path,
        {
            "size": changed("model.json", r'"expr_str": ?"[^"]*"', f'"expr_str": "{call}"'),
            "operator": changed("model.json", r"torch\.ops\.aten\.relu\.default", "torch.serialization.os.getcwd"),
            "attribute": changed("model.json", r'"expr_str": ?"[^"]*"', '"expr_str": "(1).__class__.__mro__"'),
            "constant": changed("constants_config", r".*", constant),
            "weight": changed("weights_config", r'"use_pickle": ?false', '"use_pickle": true'),
            "name": changed("model.json", r'"name": ?"relu"', f'"name": "relu = {call}; x"'),
            "guard": changed("model.json", r'"guards_code": ?\[\]', f'"guards_code": ["{call} or True"]'),
            "sample": lambda name, _: pickle.dumps(Writes(ran), 2) if "sample_inputs" in name else None,
        }[how],
    )
    if how in ("guard", "sample"):  # are not needed
        assert load(str(path)).model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    else:
        with pytest.raises(ValueError, match="asks for more than operations on tensors"):
            load(str(path))
    assert not ran.exists()


def test_a_size_in_an_exported_program_could_run_code(tmp_path):
    """So that the test above is known to test something."""
    path, ran = exported(tmp_path), tmp_path / "ran"
    call = f"__import__('pathlib').Path('{ran}').touch()"
    rewritten(path, changed("model.json", r'"expr_str": ?"[^"]*"', f'"expr_str": "{call}"'))
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert ran.exists()


def test_published_weights_of_torchvision_bring_their_outputs_and_names(tmp_path):
    theirs = torchvision.models.get_model("squeezenet1_1", weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    got = load("torchvision:squeezenet1_1", tmp_path / "w.pth", num_classes=7)
    assert got.names[:2] == ("tench", "goldfish")
    x = torch.rand(2, 3, 64, 64)
    transform = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(got.model(x), theirs(transform(x)))
    with pytest.raises(ValueError, match=r"has no weights: give their file \(--weights\), or say --random-weights"):
        load("torchvision:squeezenet1_1")
    assert load("torchvision:squeezenet1_1", num_classes=7, random_weights=True).model(x).shape == (2, 7)


def test_models_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("test_resnet", num_classes=5).eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "w.ckpt")
    got = load("timm:test_resnet", tmp_path / "w.ckpt", num_classes=3)
    own = timm.data.resolve_model_data_config(theirs)
    assert (got.transform.side, got.transform.mean) == (own["input_size"][-1], own["mean"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    seen = timm.data.create_transform(**own)(picture)
    smaller = picture.resize((got.transform.resize,) * 2, Image.Resampling.BILINEAR)
    left = (got.transform.resize - got.transform.side) // 2
    crop = np.array(smaller)[left : left + got.transform.side, left : left + got.transform.side]
    x = torch.from_numpy(crop).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(got.model(x), theirs(seen[None]))
    with pytest.raises(ValueError, match="has no weights"):
        load("timm:test_resnet")


def test_a_folder_of_timm_on_the_hub(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models._hub.save_for_hf(
        theirs,
        str(tmp_path),
        model_config={"label_names": ["cat", "dog", "owl"], "mean": [0.1, 0.2, 0.3]},
        safe_serialization=True,
    )
    got = load(f"hf:{tmp_path}")
    assert got.names == ("cat", "dog", "owl")
    x, own = torch.rand(2, 3, 160, 160), timm.data.resolve_model_data_config(theirs)
    made = torchvision.transforms.Normalize(got.transform.mean, got.transform.std)
    torch.testing.assert_close(got.model(x), theirs(made(x)))
    assert got.transform.std == tuple(own["std"])


def of_transformers(folder, weights=True, **more):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "owl", 1: "cat", 2: "dog"},
        label2id={"owl": 0, "cat": 1, "dog": 2},
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], **more)
    processor.save_pretrained(folder)
    return model, processor


def test_models_of_transformers_with_their_processor_and_labels(tmp_path):
    theirs, processor = of_transformers(tmp_path)
    got = load(f"hf:{tmp_path}")
    assert got.names == ("owl", "cat", "dog")
    assert got.transform.side == 16
    x = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = processor([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(got.model(x / 255), theirs(**pixels).logits, rtol=1e-4, atol=1e-5)
    bytes_ = of_transformers(tmp_path / "bytes", do_rescale=False, do_normalize=False)
    got = load(f"hf:{tmp_path / 'bytes'}")  # a model of bytes
    with torch.no_grad():
        torch.testing.assert_close(got.model(x / 255), bytes_[0](x.float()).logits, rtol=1e-4, atol=1e-4)


def test_what_is_no_folder_of_a_classifier_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="neither a folder nor in the local cache: fetch it with `hf download"):
        load("hf:nobody/nothing")
    of_transformers(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ValueError, match="is no image classifier of transformers"):
        load(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(config)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(
        {k: v for k, v in state.items() if k != "classifier.bias"}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"1 missing keys, for example classifier\.bias"):
        load(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load(f"hf:{tmp_path}")


def test_onnx_models_have_gradients(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnx2torch")
    model, helper = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)), onnx.helper
    weights = {f"w{i}": model[i].get_parameter(k) for i in (1, 3) for k in ("weight",)}
    weights |= {f"b{i}": model[i].bias for i in (1, 3)}
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Gemm", ["f", "w1", "b1"], ["h"], transB=1),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Gemm", ["t", "w3", "b3"], ["z"], transB=1),
    ]
    ends = [helper.make_tensor_value_info(k, 1, shape) for k, shape in (("x", ["n", 1, 8, 8]), ("z", ["n", 3]))]
    kept = [onnx.numpy_helper.from_array(v.detach().numpy(), k) for k, v in weights.items()]
    made = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], kept))
    made.opset_import[0].version = 13
    onnx.save(made, tmp_path / "m.onnx")
    got = load(str(tmp_path / "m.onnx")).model
    x, y = (torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    torch.testing.assert_close(got(x), model(y))
    got(x).square().sum().backward()
    model(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    (tmp_path / "m.onnx").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"m\.onnx cannot be read"):
        load(str(tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("library", "source", "extra"),
    [("timm", "timm:resnet18", "timm"), ("transformers", "hf:FOLDER", "hf"), ("onnx2torch", "m.onnx", "onnx")],
)
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, library, source, extra):
    (tmp_path / "config.json").write_text("{}")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "m.onnx").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=re.escape(f"pip install 'cfol-nb[{extra}]'")):
        load(source.replace("FOLDER", str(tmp_path)), num_classes=3)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pt", b"PK\x03\x04" + bytes(99), "truncated or damaged"),
        ("a.pt2", b"", "is empty"),
        ("a.pt2", b"\x89PNG\r\n\x1a\n", "is a PNG image"),
        ("a.ts", b"not a program", "is no TorchScript and no torch.export program"),
        ("a.onnx", b"", r"cannot be read|onnx2torch is not installed"),
    ],
)
def test_a_wrong_program_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(str(tmp_path / f"none{name[1:]}"))


# -- which output is which class, and is the model right at all? -------------------------------------------------------


def test_classes_are_matched_by_name():
    outputs = ("tench, Tinca tinca", "goldfish", "Great_White-shark", "crane", "crane, machine")
    order, names, how = match(("great white shark", "tench"), outputs, 5, only=True)
    assert (order, how) == ([2, 0, 1, 3, 4], "by name")
    assert names == ("great white shark", "tench", "goldfish", "crane", "crane, machine")
    assert match(("crane", "goldfish"), outputs, 5, only=True)[0][:2] == [3, 1]
    assert match(("b", "a"), (), 2)[0] == [0, 1]
    assert match(("b", "a"), ("a", "b"), 2)[0] == [1, 0]
    assert match(("7", "2"), (), 10, only=True)[0][:2] == [7, 2]  # numbers count outputs
    assert match(("0", "1", "10", "2"), (), 4)[0] == [0, 1, 2, 3]  # in the order of ImageFolder, as it was trained
    for classes, known, k, says in (
        (("a", "b"), (), 3, r"the model has 3 outputs, the images 2 classes .*--classes FILE"),
        (("a", "b"), ("a", "b", "c"), 3, r"1 of the model's 3 outputs have no images \(for example 'c'\): say --only"),
        (("a", "x"), ("a", "b", "c"), 3, r"class 'x' is none of the model's outputs \(a, b, c\)"),
        (("a", "A"), ("a", "b"), 2, "two classes are the same output"),
        (("a", "b"), ("a", "b", "c"), 2, r"3 class names \(a, b, c\), but the model has 2 outputs"),
        (("crane",), ("crane, a", "crane, b"), 2, "the name of 2 outputs"),
    ):
        with pytest.raises(ValueError, match=says):
            match(classes, known, k)


def test_imagenets_folder_names_are_matched():
    timm = pytest.importorskip("timm")
    info = timm.data.ImageNetInfo()
    order, names, _ = match(("n01443537", "n01440764"), (), 1000, only=True)
    assert order[:2] == [1, 0]  # goldfish, tench
    assert sorted(order) == list(range(1000))
    every = info.label_names()
    assert match(sorted(every), (), 1000)[0] == [every.index(w) for w in sorted(every)]
    assert len(names) == 1000


def linear(x, y, k):
    """A model of these images' classes, fitted by least squares."""
    a = torch.cat([x.flatten(1), torch.ones(len(x), 1)], 1)
    w = torch.linalg.lstsq(a.double(), nn.functional.one_hot(y, k).double(), driver="gelsd").solution.float()
    net = nn.Sequential(nn.Flatten(), nn.Linear(len(w) - 1, k))
    net[1].weight.data, net[1].bias.data = w[:-1].T.contiguous(), w[-1]
    return net.eval()


@pytest.fixture(scope="module")
def digits():
    from cfol_nb.data import load as data

    d = data("digits")
    return d.train.images[:600].expand(-1, 3, -1, -1), d.train.labels[:600], d.train.class_names


def at_first(net, digits, transform=None, names=()):
    x, y, classes = digits
    loaded = Loaded(net, transform or Transform(), names)
    return first_look(loaded, range(10), x, y, classes)


def test_a_model_at_chance_is_told_why(digits):
    x, y, _ = digits
    tinted = (x / 255) * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1)  # so that channels differ
    net = linear(tinted, y, 10)
    tinted_digits = ((255 * tinted).round().byte(), y, digits[2])
    text, wrong = at_first(net, tinted_digits)
    assert wrong == ""
    assert float(text.split()[0]) > 90
    shuffled = nn.Sequential(net, Order([3, 7, 4, 0, 5, 9, 2, 6, 1, 8]))
    wrong = at_first(shuffled, tinted_digits)[1]
    assert "is the class order right" in wrong
    assert "With the outputs in the order 3, 7, 4, 0, 5, 9, 2, 6, 1, 8 (--classes FILE" in wrong
    two_right = nn.Sequential(net, Order([0, 1, 3, 4, 5, 6, 7, 8, 9, 2]))  # above chance, and yet
    text, wrong = at_first(two_right, tinted_digits)
    assert "with the outputs in the order 0, 1, 3, 4, 5, 6, 7, 8, 9, 2 (--classes FILE" in text
    assert wrong == ""
    of_bytes = nn.Sequential(Over255(), net)
    assert "With --scale 255 (a model of images in 0..255) it would be" in at_first(of_bytes, tinted_digits)[1]
    assert at_first(of_bytes, tinted_digits, Transform(scale=255.0))[1] == ""
    of_red = nn.Sequential(OfRed(), linear(x[:, :1] / 255, y, 10))
    red = torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1), y, digits[2]
    assert at_first(of_red, red)[1] == ""
    assert "With --bgr it would be" in at_first(of_red, (red[0].flip(1), *red[1:]))[1]
    constant = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    constant[1].weight.data.zero_()
    assert "No other order or known preprocessing explains it" in at_first(constant, tinted_digits)[1]


class Over255(nn.Module):
    """Sees nothing in images that are dark, as those in [0, 1] are to a model of bytes."""

    def forward(self, x):
        return (x - 1).clamp_min(0) / 254


class OfRed(nn.Module):
    def forward(self, x):
        return x[:, :1]


def test_a_single_output_that_is_a_probability_is_said(digits):
    x, y, _ = digits
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Sigmoid())
    wrong = first_look(Loaded(net, Transform()), [0, 1], x, y % 2, ("even", "odd"))[1]
    assert "Its single output lies between 0 and 1" in wrong


CODE = """
import torch
from sklearn.datasets import load_digits
class Tuple(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
    def forward(self, x):
        return self.body(x), x
def make():
    d = load_digits()
    x, y = torch.tensor(d.images / 16).float().flatten(1) - 0.5, torch.nn.functional.one_hot(torch.tensor(d.target))
    w = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y.float(), driver="gelsd").solution
    net = torch.nn.Linear(64, 10)
    net.weight.data, net.bias.data = w[:-1].T.contiguous(), w[-1]
    return Tuple(torch.nn.Sequential(torch.nn.Flatten(), net))
"""


@pytest.fixture
def audit_of_code(tmp_path, monkeypatch):
    """The command `audit` in this process: what it says."""
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    defaults = {k: p.default for k, p in inspect.signature(cli.audit).parameters.items()}
    defaults |= {"data": "digits", "limit": 4, "version": "fast", "eps": "2/255", "out": tmp_path / "out"}

    def call(**more):
        said = []
        cli._audit(
            lambda *words: said.append(words), time.monotonic(), {**defaults, "command": "", "form": None, **more}
        )
        return "\n".join(words[1] for words in said if words[0] == "print")

    return call


def test_the_command_says_what_it_understood(audit_of_code, tmp_path):
    lines = audit_of_code(model="net.py:make", mean="0.5", std="1", seed=1).splitlines()
    assert lines[1] == "images: 1 x 8 x 8; preprocessing in the model: minus mean (0.5), by std (1)"
    assert lines[2] == "outputs: 10; class order: taken to be the model's order"
    assert re.fullmatch(r"clean accuracy: \d+\.\d % \[.*\] of 40 images", lines[3])
    page = (tmp_path / "out/audit.html").read_text()
    assert all(
        text in page for text in ("2/255", "minus mean (0.5), by std (1)", "taken to be the model", "To repeat it")
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"eps": "0"}, "eps=0: a radius above 0 is needed"),
        ({"mean": "a", "std": "1"}, r"mean=a: a number is needed, or three as 0\.5,0\.5,0\.5"),
        ({"mean": "0.5"}, "both or neither"),
        ({"classes": Path("none.txt")}, r"there is no file none\.txt"),
        ({"weights": Path("net.py")}, "holds no weights"),
        ({"mean": "0.5", "std": "0.001", "scale": 1e-6}, "no more than chance .*is the class order right"),
        ({"model": "torchvision:resnet18"}, "say --random-weights"),
        ({"black_box": True, "form": "json"}, "leave out --json"),
    ],
)
def test_the_command_refuses(audit_of_code, more, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        audit_of_code(**{"model": "net.py:make", **more})


def test_the_models_other_outputs_compete(audit_of_code, tmp_path):
    """Folders 5 and 3 of a model of ten digits: right is what the largest of all ten logits says."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    seen = {}
    for i in np.flatnonzero((raw.target == 3) | (raw.target == 5))[40:70]:
        path = tmp_path / "photos" / str(raw.target[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(raw.images[i] * 255 / 16).astype(np.uint8), "L").save(path)
        seen[f"{raw.target[i]}/{i}.png"] = i
    given = {"model": "net.py:make", "data": "imagefolder:photos", "limit": None, "mean": "0.5", "std": "1"}
    with pytest.raises(ValueError, match="say --only to audit the classes that have"):
        audit_of_code(**given)
    out = audit_of_code(**given, only=True, eps="0.15")
    assert "class order: the folders' numbers" in out
    found = Outcomes.load(tmp_path / "out/outcomes.safetensors")
    assert (found.class_names, found.others) == (("3", "5"), ("0", "1", "2", "4", "6", "7", "8", "9"))
    net = load("net.py:make", preprocessing={"mean": (0.5,), "std": (1.0,)}).model
    pixels = np.rint(raw.images[[seen[f] for f in found.images]] * 255 / 16)
    with torch.no_grad():
        theirs = net(torch.from_numpy(pixels).float()[:, None] / 255).argmax(1)
    assert [found.outputs[i] for i in found.predictions["clean"]] == [str(int(c)) for c in theirs]
    assert (found.predictions["autoattack"] > 1).any()  # taken for a digit without a folder
    assert found.table()["autoattack"].isin(list("0123456789")).all()
    assert (tmp_path / "out/audit.html").stat().st_size > 10_000
    assert stats.confusion(found).shape == (2, 10)
    again = Outcomes.unpacked(found.packed())
    assert again.others == found.others
    assert stats.summary(again)["value"]["mean"] == stats.accuracies(found).mean()


def test_black_box_attacks_stay_below_the_exact_optimum():
    """Of a linear function of NumPy arrays: an image falls if its margin is below eps times the weights' L1 norm."""
    pytest.importorskip("foolbox")
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=64), rng.integers(60, 190, (24, 1, 8, 8), np.uint8)
    b = -(x.reshape(24, 64) / 255 @ w).mean()

    def scores(images):
        z = images.reshape(len(images), 64) @ w + b
        return np.stack([-z / 2, z / 2], 1)

    margin = x.reshape(24, 64) / 255 @ w + b
    labels, eps = torch.from_numpy((margin > 0).astype(int)), 0.02
    found = black_box(Scores(scores), torch.from_numpy(x), labels, ("a", "b"), eps=eps, queries=200)
    held = {k: found.correct(k) for k in found.predictions}
    ratio = np.abs(margin) / (eps * np.abs(w).sum())
    assert held["clean"].all()
    assert held["hopskipjump"][ratio > 1].all()  # no attack can
    assert not held["square"][ratio < 0.4].any()
    assert not held["hopskipjump"][ratio < 0.95].any()
    assert (held["hopskipjump"] <= held["square"]).all()
    assert blackbox.told(found).startswith("Black-box audit, without gradients: Square and HopSkipJump alone")


def test_the_command_audits_a_forest(audit_of_code, tmp_path, monkeypatch):
    pytest.importorskip("foolbox")
    monkeypatch.setitem(black_box.__kwdefaults__, "queries", 20)
    monkeypatch.setattr(blackbox, "STEPS", 1)
    (tmp_path / "forest.py").write_text(
        "from sklearn.datasets import load_digits\nfrom sklearn.ensemble import RandomForestClassifier\n"
        "def make():\n    x, y = load_digits(return_X_y=True)\n"
        "    forest = RandomForestClassifier(3, random_state=0).fit(x / 16, y)\n"
        "    return lambda images: forest.predict_proba(images.reshape(len(images), -1))\n"
    )
    with pytest.raises(ValueError, match=r"returns a function: a torch\.nn\.Module is needed"):
        audit_of_code(model="forest.py:make")
    out = audit_of_code(model="forest.py:make", black_box=True, limit=1, eps="0.1")
    assert "these are upper bounds" in out
    assert Outcomes.load(tmp_path / "out/outcomes.safetensors").correct("clean").mean() > 0.9

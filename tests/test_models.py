from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cfol_nb.models import MODELS, build, initialised_from, register

SMALL = {
    "smallcnn": {"width": 4},
    "resnet18": {"width": 4},
    "preactresnet18": {"width": 4},
    "mlp": {"width": 8},
    "wrn": {"depth": 10, "widen": 1},
    "vgg16bn": {"width": 4},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_any_size_and_channels(name, channels):
    model = build(name, num_classes=7, channels=channels, **SMALL[name]).eval()
    for side in (8, 28, 32, 96, 224):
        assert model(torch.rand(2, channels, side, side)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "parameters", "mac"),
    [
        (
            "preactresnet18",
            11.17e6,
            555.42e6,
        ),  # counted by hand layer by layer: 1.77 + 150.99 + 3 x 134.22 M and the head
        ("resnet18", 11.17e6, 555.42e6),
        ("wrn", 46.16e6, 6.67e9),
        ("vgg16bn", 14.72e6, 313.2e6),
    ],
)
def test_full_sizes_are_the_published_ones(name, parameters, mac):
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=5e-3)
    total = 0

    def count(module, _, out):
        nonlocal total
        total += module.weight.numel() * (out.shape[-1] * out.shape[-2] if out.ndim == 4 else 1)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    model(torch.rand(1, 3, 32, 32, device="meta"))
    assert total == pytest.approx(mac, rel=5e-3)


def test_normalisation_is_the_first_layer_and_is_saved():
    x = torch.rand(3, 3, 8, 8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    model = build("smallcnn", mean=mean, std=std)
    want = (x.numpy() - np.array(mean).reshape(3, 1, 1)) / np.array(std).reshape(3, 1, 1)
    np.testing.assert_allclose(model[0](x), want, rtol=1e-5, atol=1e-6)
    other = build("smallcnn")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(("head", "scale", "added"), [("cosine", 10, 0), ("normalised", 1, 0), ("robal", 1, 1 / 32)])
def test_heads_are_scaled_cosines(head, scale, added):
    torch.manual_seed(0)
    model, x = build("mlp", width=8, channels=1, head=head).double(), torch.rand(5, 1, 8, 8, dtype=torch.float64)
    assert [tuple(p.shape) for p in model[1][-1].parameters()] == [(10, 8)]  # no bias
    seen, w = model[1][:-1](model[0](x)).detach().numpy(), model[1][-1].weight.detach().numpy()
    length = np.linalg.norm(w, axis=1)
    cos = seen @ w.T / np.linalg.norm(seen, axis=1)[:, None] / length
    np.testing.assert_allclose(model(x).detach(), scale * cos * length / (length + added), rtol=1e-12)


def test_own_models_can_be_registered():
    @register("test-only")
    def make(num_classes, channels, hidden=3):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.LazyLinear(hidden), torch.nn.Linear(hidden, num_classes)
        )

    try:
        assert build("test-only", num_classes=5, hidden=4)(torch.rand(2, 3, 8, 8)).shape == (2, 5)
        with pytest.raises(ValueError, match="registered already"):
            register("test-only")(make)
    finally:
        MODELS.pop("test-only")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "resnet19"}, "did you mean 'resnet18'"),
        ({"name": "smallcnn", "depth": 3}, "has no option 'depth'; it takes: width"),
        ({"name": "smallcnn", "num_classes": 1}, "at least 2"),
        ({"name": "smallcnn", "channels": 0}, "channels=0"),
        ({"name": "wrn", "depth": 12}, "6 n"),
    ],
)
def test_bad_models_are_refused_in_a_sentence(given, says):
    with pytest.raises(ValueError, match=says):
        build(**given)


def test_layers_are_initialised_from_the_seed_also_beside_other_threads():
    def weights(seed: int) -> torch.Tensor:
        with initialised_from(seed):
            return torch.cat([p.flatten() for p in build("smallcnn", channels=1, width=4).parameters()])

    state, want = torch.get_rng_state(), [weights(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(weights, [0, 1] * 100))
    assert all(torch.equal(a, want[i % 2]) for i, a in enumerate(got))
    assert not torch.equal(*want)
    assert torch.equal(torch.get_rng_state(), state)

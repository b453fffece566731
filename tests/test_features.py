import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from cfol_nb.data import ImageSet, leave_out
from cfol_nb.features import class_similarity, d_det, d_rand, difficulty, matched, penultimate
from cfol_nb.models import build


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build("smallcnn", channels=1, width=4).double()


@pytest.fixture(scope="module")
def some(digits):
    return digits.train[torch.arange(120)]


def test_penultimate_features_times_the_last_layer_are_the_logits(net, some):
    x = some.images.double() / 255
    seen, logits = penultimate(net, x)
    last = net[1][-1]
    torch.testing.assert_close(seen @ last.weight.T + last.bias, logits)
    assert not last._forward_pre_hooks
    with pytest.raises(ValueError, match="no linear layer"):
        penultimate(torch.nn.Flatten(), x)


def test_class_similarity_is_a_loop_over_pairs(net, some):
    x, y = some.images.double() / 255, some.labels
    with torch.no_grad():
        seen, logits = penultimate(net, x)
    got = class_similarity(net, some)
    centre = torch.stack([seen[y == c].mean(0) for c in range(10)]).mean(0)
    for a, b in ((0, 1), (3, 8), (4, 4)):
        for name, v in (("logits", logits), ("features", seen - centre)):
            want = torch.nn.functional.cosine_similarity(v[y == a].mean(0), v[y == b].mean(0), dim=0)
            assert got[name][a, b] == pytest.approx(float(want), abs=1e-9)


def test_matched_images_have_the_features_of_the_image_and_the_label_but_start_elsewhere(net, some):
    goal, _ = penultimate(net, some.images.double() / 255)
    start = torch.randperm(120, generator=torch.Generator().manual_seed(5))
    before, _ = penultimate(net, some.images[start].double() / 255)
    gone = []
    made = matched(net, some, seed=5, steps=60, step=0.2, progress=gone.append)
    assert gone == [120] * 60
    after, _ = penultimate(net, made.images.double() / 255)
    assert (after - goal).norm() < 0.35 * (before - goal).norm()
    assert torch.equal(made.labels, some.labels)
    none = matched(net, some, seed=5, steps=1, step=1e-9)
    assert torch.equal(none.images, some.images[start])


@pytest.mark.parametrize("make", [d_rand, d_det])
def test_moved_images_stay_in_the_ball_and_are_taken_for_their_labels(net, some, make):
    gone = []
    made = make(net, some, seed=1, eps=4.0, step=0.4, steps=40, progress=gone.append)
    assert gone == [120 * 40]
    moved = (made.images.double() - some.images.double()) / 255
    assert moved.flatten(1).norm(dim=1).max() < 4 + 0.5 * 8 / 255  # and the rounding of 64 pixels
    with torch.no_grad():
        before = (net(some.images.double() / 255).argmax(1) == made.labels).double().mean()
        after = (net(made.images.double() / 255).argmax(1) == made.labels).double().mean()
    assert after > before + 0.25  # of a network that was never trained
    if make is d_det:
        assert torch.equal(made.labels, (some.labels + 1) % 10)
    else:
        assert not torch.equal(d_rand(net, some, seed=2, steps=1).labels, made.labels)
        assert 0.02 < (made.labels == some.labels).double().mean() < 0.25


def test_difficulty_is_cross_validated(digits):
    """A class with another one's images is beyond any classifier; a copy of an image is its nearest neighbour."""
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    part = leave_out(digits.train, tuple("3456789"))
    got = difficulty(part, folds=3)
    x, y = part.images.flatten(1).numpy().astype(float), part.labels.numpy()
    near, linear = np.empty_like(y), np.empty_like(y)
    for train, test in StratifiedKFold(3, shuffle=True, random_state=0).split(x, y):
        for i in test:
            near[i] = y[train[((x[train] - x[i]) ** 2).sum(1).argmin()]]
        scale = StandardScaler().fit(x[train])
        linear[test] = RidgeClassifier().fit(scale.transform(x[train]), y[train]).predict(scale.transform(x[test]))
    for name, predicted in (("neighbour", near), ("linear", linear)):
        assert got[name].tolist() == pytest.approx([(predicted[y == c] == c).mean() for c in range(3)])
    g = torch.Generator().manual_seed(0)
    shuffled = ImageSet(part.images, torch.randint(0, 3, (len(part),), generator=g), part.class_names)
    assert difficulty(shuffled, folds=3).to_numpy().max() < 0.6

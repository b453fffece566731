"""The closed-form inner maximum, the mistake bound, the law of the shortcut in time, and Lemma 1."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from cfol_nb.samplers import ClassSampler, ExampleSampler
from cfol_nb.theory import Blobs, Trajectory, bound, learn, play, step_size

SMALL = Blobs.make([6, 4, 8], eps=0.08, noise=(0.1, 0.25), seed=1)


def test_the_inner_maximum_is_that_over_all_corners_of_the_ball():
    rng = np.random.default_rng(0)
    corners = SMALL.eps * np.array(list(itertools.product((-1, 1), repeat=3)))
    for _ in range(5):
        weights = rng.normal(size=(3, 3))
        logits = (SMALL.x[:, None] + corners) @ weights.T  # (N, 8, 3)
        own = np.take_along_axis(logits, SMALL.y[:, None, None], 2)
        margins = np.where(np.arange(3) == SMALL.y[:, None, None], np.inf, own - logits)
        margin, rival = SMALL.worst(weights)
        np.testing.assert_allclose(margin, margins.min((1, 2)), rtol=1e-12)
        np.testing.assert_array_equal(rival, margins.min(1).argmin(1))


def samplers(data, seed, eta):
    return (
        ExampleSampler(data.y, gamma=1.0, eta=0.0, seed=seed),
        ClassSampler(data.y, eta=eta, seed=seed),
        ExampleSampler(data.y, eta=eta, seed=seed),
    )


@pytest.mark.parametrize("eta", [0.01, 3.0])
def test_no_sequence_of_examples_meets_more_mistakes_than_the_bound(eta):
    for data in (SMALL, Blobs.make([5] * 12)):
        for seed, sampler in itertools.product(range(5), range(3)):
            path = learn(data, samplers(data, seed, eta)[sampler], 10**9, seed)
            assert 0 < len(path.times) <= data.mistakes()
            assert path.losses[-1].max() == 0  # it ends with a classifier that no perturbation fools
            assert (np.diff(path.times) > 0).all()
            assert (path.losses[0] == 1).all()  # all logits are equal


def test_classes_that_touch_have_no_bound():
    with pytest.raises(ValueError, match="the classes touch"):
        Blobs.make([5, 5], eps=0.5).mistakes()


def test_a_sampler_of_other_examples_is_refused():
    with pytest.raises(ValueError, match="a sampler of 20 examples for 18"):
        learn(SMALL, ExampleSampler(20), 10)


def one_by_one(data, sampler, mistakes):
    """The step of the given mistake, drawn step by step."""
    weights, step, made = np.zeros((data.k, data.k)), 0, 0
    while made < mistakes:
        step += 1
        i = int(sampler.draw(1))
        margin, rival = data.worst(weights)
        wrong, a, b = margin[i] <= 0, data.y[i], rival[i]
        if isinstance(sampler, ClassSampler):
            sampler.update(torch.tensor([a]), torch.tensor([float(wrong)]))
        if wrong:
            x = data.x[i] - data.eps * np.sign(weights[a] - weights[b])
            weights[a] += x
            weights[b] -= x
            made += 1
    return step


def test_jumping_to_the_next_mistake_has_the_law_of_drawing_one_by_one():
    jumped, drawn = [], []
    for seed in range(300):
        path = learn(SMALL, ClassSampler(SMALL.y, eta=0.4, seed=seed), 10**9, seed)
        jumped.append(path.times[1])
        drawn.append(one_by_one(SMALL, ClassSampler(SMALL.y, eta=0.4, seed=10_000 + seed), 2))
    assert ks_2samp(jumped, drawn).pvalue > 0.001
    assert len(set(jumped)) > 5


def test_a_path_knows_the_mean_over_its_iterates():
    path = Trajectory(np.array([2, 5]), np.array([[1, 1], [0.5, 0], [0, 0.25]]))
    each = np.array([[1, 1]] * 2 + [[0.5, 0]] * 3 + [[0, 0.25]] * 7)  # the losses at the start of steps 1 to 12
    for steps in (1, 2, 3, 5, 6, 12):
        np.testing.assert_allclose(path.mean_losses(steps), each[:steps].mean(0))
    np.testing.assert_allclose(path.sampled_losses(12, 200_000), each.mean(0), atol=0.005)
    assert [path.settled(v) for v in (0.9, 0.3, 0.1)] == [2, 5, np.inf]
    assert learn(SMALL, ClassSampler(SMALL.y), 10**9).settled(1.0) == 0


def test_the_bound_is_its_formula():
    k, c, t, n, delta = 10, 50.0, 1e6, 400, 0.01
    log = np.log(2000)
    want = 300 / t + np.sqrt(40 * log / t) + 21 * log / (3 * t) + np.sqrt(2 * log / n) + 2 * log / 1200
    assert bound(t, k, c, delta, n) == pytest.approx(want)
    assert bound(t, k, 1.0) == pytest.approx(bound(t, k, k * np.log(k)))  # C is at least k log k
    assert step_size(k, c) == pytest.approx(np.sqrt(np.log(10) / 2000))


def test_the_measured_worst_class_stays_below_the_bound():
    data = Blobs.make([10] * 5)
    c = data.mistakes()
    for seed in range(10):
        path = learn(data, ClassSampler(data.y, eta=step_size(5, c), seed=seed), 10**6, seed)
        for steps in (10, 10**3, 10**6):
            assert path.mean_losses(steps).max() <= bound(steps, 5, c)


@pytest.mark.parametrize(("gamma", "eta"), [(0.2, 0.04), (0.5, 0.1), (0.9, 0.01)])
def test_lemma_1_holds_for_every_sequence_of_draws(gamma, eta):
    for seed in range(3):
        game = play(ClassSampler(np.arange(5), gamma=gamma, eta=eta, seed=seed), np.linspace(0.1, 0.9, 5), 1500, seed)
        assert (game["estimated"] <= game["lemma"]).all()
        assert game["estimated"].iloc[-1] > 0
        assert game["variance"].max() <= 5 / gamma


def test_regret_and_variance_of_uniform_draws_are_known():
    losses = np.array([0.1, 0.4, 0.7])
    labels = np.array([2, 0, 1, 1])
    game = play(ClassSampler(labels, gamma=1.0, eta=0.0, seed=3), losses, 4000, seed=4)
    np.testing.assert_allclose(game["regret"], game.index * (0.7 - 0.4), rtol=1e-9)
    np.testing.assert_allclose(game["variance"], 0.7 * 3 - 0.49)
    y = torch.from_numpy(labels)[ClassSampler(labels, gamma=1.0, eta=0.0).draw(200_000)].numpy()
    met = (y == 2) & (np.random.default_rng(0).random(len(y)) < 0.7)
    assert (3 * met).var() == pytest.approx(0.7 * 3 - 0.49, rel=0.02)

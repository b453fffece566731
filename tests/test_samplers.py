import warnings

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.utils.data import DataLoader, TensorDataset

from cfol_nb.samplers import ClassSampler, ExampleSampler, LargeStep, Shuffle

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 80 + [3] * 10)[
    torch.randperm(170, generator=torch.Generator().manual_seed(0))
]


def exp3(arms: int, gamma: float, eta: float, batches, base=None, prior=None) -> np.ndarray:
    """Exp3 as Algorithm 1 states it, one example at a time: the distribution after the batches of (arm, loss)."""
    w = np.zeros(arms) if prior is None else np.log(prior)
    base = np.full(arms, 1 / arms) if base is None else base

    def p():
        q = np.exp(w - w.max())
        return gamma * base + (1 - gamma) * q / q.sum()

    for batch in batches:
        now = p()  # the whole batch was drawn from this
        for arm, loss in batch:
            w[arm] += eta * loss / now[arm]
    return p()


@pytest.mark.parametrize("kind", ["class", "example"])
def test_follows_exp3(kind):
    sampler = ClassSampler(LABELS, 0.3, 0.05) if kind == "class" else ExampleSampler(170, 0.3, 0.01)
    rng, batches = np.random.default_rng(0), []
    for _ in range(60):
        index = sampler.draw(64)
        arm = LABELS[index] if kind == "class" else index
        wrong = torch.from_numpy(rng.random(64) < (0.2 + 0.2 * LABELS[index].numpy())).double()
        sampler.update(arm, wrong)
        batches.append(list(zip(arm.tolist(), wrong.tolist(), strict=True)))
    want = exp3(len(sampler.p), sampler.gamma, sampler.eta, batches)
    np.testing.assert_allclose(sampler.p.numpy(), want, rtol=1e-9)
    assert want.max() > 2 / len(want)  # it did move away from uniform
    assert sampler.p.min() >= sampler.gamma / len(want) - 1e-15
    assert sampler.p.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("prior", ["empirical", [4, 1, 2, 1]])
def test_base_and_prior_are_those_of_exp3(prior):
    share = np.bincount(LABELS) / len(LABELS)
    start = share if prior == "empirical" else np.array(prior) / 8
    sampler = ClassSampler(LABELS, 0.3, 0.05, base="empirical", prior=prior)
    np.testing.assert_allclose(sampler.p, 0.3 * share + 0.7 * start)
    arm, loss = torch.tensor([3, 1, 3, 2]), torch.tensor([1.0, 0.5, 1.0, 0.2])
    sampler.update(arm, loss)
    want = exp3(4, 0.3, 0.05, [list(zip(arm.tolist(), loss.tolist(), strict=True))], share, start)
    np.testing.assert_allclose(sampler.p, want, rtol=1e-12)


def test_class_draws_have_the_stated_frequencies():
    sampler = ClassSampler(LABELS, 0.4, 0.1)
    sampler.update(torch.tensor([3, 1, 3, 2]), torch.tensor([1.0, 0.5, 1.0, 0.2]))
    index = sampler.draw(100_000)
    p = sampler.p.numpy()
    assert p.max() > 1.3 * p.min()
    assert chisquare(np.bincount(LABELS[index], minlength=4), 100_000 * p).pvalue > 0.001
    count = np.bincount(LABELS)  # within a class all examples are alike
    assert chisquare(np.bincount(index, minlength=170), 100_000 * (p / count)[LABELS]).pvalue > 0.001


@pytest.mark.parametrize("n", [1, 2, 13, 64, 100])
def test_example_draws_have_the_stated_frequencies(n):
    sampler = ExampleSampler(n, 0.4, 0.1, seed=3)
    some = torch.arange(0, n, 3)
    sampler.update(some, torch.full((len(some),), 1 / n).double())
    sampler.update(torch.tensor([0, 0]), torch.full((2,), 1 / n).double())
    p = sampler.p.numpy()
    assert p.sum() == pytest.approx(1, abs=1e-12)
    got = np.bincount(sampler.draw(50_000), minlength=n)
    assert n == 1 or chisquare(got, 50_000 * p).pvalue > 0.001


def test_loss_that_is_huge_does_not_overflow():
    for sampler in (ClassSampler(LABELS, 0.5, 1e6), ExampleSampler(170, 0.5, 1e6)):
        index = sampler.draw(32)
        sampler.update(LABELS[index] if isinstance(sampler, ClassSampler) else index, torch.ones(32))
        assert torch.isfinite(sampler.p).all()
        assert sampler.p.sum().item() == pytest.approx(1)
        sampler.draw(32)


@pytest.mark.parametrize("kind", ["class", "example"])
def test_prefetching_workers_do_not_change_the_weight(kind):
    """A DataLoader draws ahead; each loss must still be divided by the p that its example was drawn with."""
    n, eta, gamma, batch = 240, 0.05 if kind == "class" else 0.01, 0.5, 12
    labels = torch.arange(n) % 4
    sampler = (
        ClassSampler(labels, gamma, eta, block=batch) if kind == "class" else ExampleSampler(n, gamma, eta, block=batch)
    )
    at_draw, plain = [], sampler._draw

    def watched(k):
        at_draw.append(sampler.p.clone())
        return plain(k)

    sampler._draw = watched
    loader = DataLoader(
        TensorDataset(torch.arange(n), labels), batch_size=batch, sampler=sampler, num_workers=2, prefetch_factor=3
    )
    arms = 4 if kind == "class" else n
    right, naive, ahead, seen = np.zeros(arms), np.zeros(arms), 0, 0
    for i, (index, y) in enumerate(loader):
        arm, wrong = (y if kind == "class" else index), (y % 2 == 0).double()
        ahead = max(ahead, len(at_draw) - i - 1)
        for a, loss in zip(arm.tolist(), wrong.tolist(), strict=True):
            right[a] += eta * loss / at_draw[i][a].item()
            naive[a] += eta * loss / sampler.p[a].item()
        sampler.update(arm, wrong)
        seen += len(y)
    assert seen == n == len(sampler)
    assert ahead >= 3  # it did draw ahead
    w = (sampler.w - sampler.w.min()).numpy()
    np.testing.assert_allclose(w, right - right.min(), rtol=1e-9, atol=1e-12)
    assert np.abs(right - naive).max() > 1e-3 * right.max()


def test_a_batch_that_spans_two_blocks_uses_both_distributions():
    sampler = ClassSampler(torch.tensor([0, 1]).repeat(8), 0.5, 0.3, block=4)
    draws = iter(sampler)
    first = [next(draws) for _ in range(4)]
    before = sampler.p.clone()
    sampler.update(torch.tensor(first[:2]) % 2, torch.ones(2))
    after, second = sampler.p.clone(), [next(draws) for _ in range(2)]
    w = sampler.w.clone()
    arm = torch.tensor(first[2:] + second) % 2
    sampler.update(arm, torch.ones(4))
    p = torch.cat([before[arm[:2]], after[arm[2:]]])
    want = w.index_add(0, arm, 0.3 / p)
    torch.testing.assert_close(sampler.w, want, rtol=1e-12, atol=0)
    assert not torch.equal(before, after)


def test_permuting_the_classes_permutes_p():
    order = torch.tensor([2, 0, 3, 1])
    y, wrong = torch.tensor([0, 1, 1, 3, 2]), torch.tensor([1.0, 0.2, 0.7, 0.4, 0.0])
    a, b = ClassSampler(LABELS, 0.5, 0.1), ClassSampler(order[LABELS], 0.5, 0.1)
    a.update(y, wrong)
    b.update(order[y], wrong)
    torch.testing.assert_close(b.p[order], a.p, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make", [lambda: ClassSampler(LABELS, eta=0.01), lambda: ExampleSampler(170, eta=0.01), lambda: Shuffle(170)]
)
def test_state_dict_carries_everything(make):
    a, b = make(), make()
    for _ in range(5):
        index = a.draw(40)
        if not isinstance(a, Shuffle):
            a.update(LABELS[index] if isinstance(a, ClassSampler) else index, torch.ones(40))
    b.load_state_dict(a.state_dict())
    assert all(torch.equal(a.draw(40), b.draw(40)) for _ in range(6))


def test_same_seed_same_draws_other_seed_others():
    a, b, c = (ClassSampler(LABELS, seed=s).draw(50) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_shuffle_is_a_permutation_in_full_batches():
    sampler = Shuffle(100, seed=1)
    for _ in range(3):
        assert len(torch.unique(torch.cat([sampler.draw(30) for _ in range(3)]))) == 90
    assert sorted(sampler) == list(range(100))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClassSampler(torch.tensor([0, 2])), "class 1 has no examples"),
        (lambda: ClassSampler(torch.tensor([0, 5]), num_classes=3), "label 5 is not in 0..2"),
        (lambda: ClassSampler(torch.tensor([-1, 0])), "label -1"),
        (lambda: ClassSampler(torch.tensor([], dtype=torch.int64)), "non-empty"),
        (lambda: ClassSampler(LABELS, gamma=1.5), "gamma=1.5"),
        (lambda: ClassSampler(LABELS, eta=-1), "eta=-1"),
        (lambda: ClassSampler(LABELS, base="even"), "base='even' is not 'uniform', 'empirical'"),
        (lambda: ClassSampler(LABELS, prior=[1, 2]), "not one positive number for each of 4"),
        (lambda: ClassSampler(LABELS, prior=[1, 2, 0, 1]), "not one positive number"),
        (lambda: ExampleSampler(0), "no examples"),
        (lambda: Shuffle(10).draw(11), "larger than the 10"),
        (lambda: ClassSampler(LABELS).update(torch.tensor([0, 1]), torch.ones(3)), "one loss per example"),
        (lambda: ClassSampler(LABELS).update(torch.tensor([0, 1]), torch.ones(2, 1)), "one loss per example"),
        (lambda: ClassSampler(LABELS).update(torch.tensor([0.0, 1.0]), torch.ones(2)), "integers are needed"),
        (lambda: ClassSampler(LABELS + 0.5), "integers are needed"),
        (lambda: ClassSampler(LABELS, num_classes=4.0), "num_classes=4.0"),
        (lambda: ClassSampler(LABELS, base=None), "base=None is not one positive number"),
        (lambda: ExampleSampler(5.0), "size=5.0"),
        (lambda: ExampleSampler(-3), "size=-3"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make, says):
    with pytest.raises(ValueError, match=says):
        make()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("kind", [lambda **k: ClassSampler(LABELS, **k), lambda **k: ExampleSampler(170, **k)])
class TestBoth:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("gamma", v) for v in (NAN, INF, -0.1, 1.1, "0.5", True, None)),
            *(("eta", v) for v in (NAN, INF, -1e-9, "0.1", None)),
            *(("block", v) for v in (0, -1, 2.5, NAN, True, None)),
            *(("seed", v) for v in (2**64, -(2**63) - 1, 0.5, "0")),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, kind, name, value):
        with pytest.raises(ValueError, match=f"{name}="):
            kind(**{name: value})

    @pytest.mark.parametrize("n", [0, -1, 1.5, NAN, True])
    def test_a_draw_of_less_than_one_is_refused(self, kind, n):
        with pytest.raises(ValueError, match="n="):
            kind().draw(n)

    @pytest.mark.parametrize("wrong", [NAN, INF, -INF, -0.01, 1.01, 7])
    @pytest.mark.parametrize("form", [torch.tensor, np.array, list])
    def test_losses_that_are_none_change_nothing(self, kind, wrong, form):
        sampler, same = kind(eta=0.01), kind(eta=0.01)
        for s in (sampler, same):
            s.draw(3)
        with pytest.raises(ValueError, match=r"losses reach from .* to .*: they must lie in \[0, 1\]"):
            sampler.update(form([1, 0, 3]), form([0, wrong, 1]))
        for s in (sampler, same):  # the draws are still open
            s.update(torch.tensor([1, 0, 3]), torch.tensor([False, True, True]))
        assert torch.equal(sampler.p, same.p)

    @pytest.mark.parametrize("p", [NAN, INF, 0, -0.1, 1.1, [0.1, 0.0, 0.2], [0.1, 0.2]])
    def test_probabilities_that_are_none_are_refused(self, kind, p):
        with pytest.raises(ValueError, match=r"p of shape|probabilities reach"):
            kind().update(torch.tensor([0, 1, 2]), torch.ones(3), p=p)

    @pytest.mark.parametrize("arm", [-1, 170])
    @pytest.mark.parametrize("p", [None, 0.5])
    @pytest.mark.parametrize("drawn", [0, 2, 5])
    def test_arms_out_of_range_are_refused(self, kind, arm, p, drawn):
        sampler, same = kind(), kind()
        for s in (sampler, same) if drawn else ():
            s.draw(drawn)
        with pytest.raises(ValueError, match="labels or indices reach"):
            sampler.update(torch.tensor([0, arm]), torch.ones(2), p)
        for s in (sampler, same):
            s.update(torch.tensor([0, 1]), torch.ones(2))
        assert torch.equal(sampler.p, same.p)

    def test_losses_of_any_type_say_the_same(self, kind):
        arm, found = torch.tensor([0, 1, 3]), []
        for wrong in (torch.tensor([True, False, True]), torch.tensor([1, 0, 1]), torch.tensor([1.0, 0, 1]), [1, 0, 1]):
            sampler = kind(eta=0.01)
            sampler.draw(3)
            sampler.update(arm.tolist() if isinstance(wrong, list) else arm, wrong)
            found.append(sampler.p)
        assert all(torch.equal(found[0], other) for other in found[1:])
        assert found[0].std() > 0


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 0.9])
def test_the_largest_step_bounds_what_a_batch_moves(gamma):
    """Mean and variance of what simulated batches add to the log-weights, all losses being 1, wherever q lies."""
    k, n, rng = 5, 40, np.random.default_rng(0)
    labels, variances = torch.arange(1000) % k, []
    for spread in (0, 1, 3):
        sampler = ClassSampler(labels, gamma)
        sampler.w.copy_(torch.from_numpy(spread * rng.standard_normal(k)))
        y = labels[sampler.draw(2000 * n)].view(2000, n)
        added = torch.zeros(2000, k).double().scatter_add_(1, y, (1 / sampler.p)[y])
        assert (sampler.q @ added.mean(0)).item() == pytest.approx(n, rel=0.05)
        variances.append((sampler.q @ added.var(0)).item())
    deviation = (1 / sampler.largest_eta(n) - n) / 2
    assert 0.3 * deviation**2 < max(variances) < 1.05 * deviation**2
    assert ClassSampler(torch.arange(10)).largest_eta(64) == pytest.approx(0.00738, abs=1e-5)  # 1 / (64 + 2 sqrt(1280))
    assert ExampleSampler(1000).largest_eta(64) == pytest.approx(0.00128, abs=1e-5)  # 1 / (64 + 2 sqrt(128000))


@pytest.mark.parametrize("how", ["iterate", "draw", "update"])
@pytest.mark.parametrize(("images", "epochs", "warns"), [(2000, 2, True), (2000, 4, True), (2000, 8, False)])
def test_a_step_that_is_too_large_is_told_once(how, images, epochs, warns):
    """The README's loop: a drift of 40, ten classes, batches of 128, whose largest step is 0.0044."""
    sampler = ClassSampler(torch.arange(images) % 10, eta=40 / (images * epochs), block=128)
    share = torch.full((128,), 0.1).double()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            if how == "iterate":
                list(sampler)
            elif how == "draw":
                sampler.draw(128)
            else:
                sampler.update(torch.zeros(128, dtype=torch.int64), torch.ones(128), p=share)
    assert [w.category for w in told] == [LargeStep] * warns
    assert not warns or f"eta={sampler.eta:.2g} is above 0.0044" in str(told[0].message)
    assert not warns or told[0].filename == __file__

"""Best-of-N, pass@N and votes against brute force over all subsets."""

import time
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from rlhfscale.evals.best_of_n import best_of_n, expected_proxy, kl_bound_nats, majority_vote, pass_at_n, weighted_vote

SIZES = [1, 2, 3, 5, 7]
RNG = np.random.default_rng(0)
GOLD = RNG.random((4, 7))
CORRECT = RNG.integers(0, 2, (4, 7))
PROXIES = {"distinct": RNG.random((4, 7)), "tied": RNG.integers(0, 3, (4, 7)), "all tied": np.zeros((4, 7))}


def over_subsets(value, num_samples=7):
    """float64 [prompt, size]: the mean of value(prompt, subset) over all subsets of each size."""
    return np.array(
        [[np.mean([value(p, list(s)) for s in combinations(range(num_samples), n)]) for n in SIZES] for p in range(4)]
    )


@pytest.mark.parametrize("kind", PROXIES)
def test_best_of_n_equals_brute_force(kind):
    proxy = PROXIES[kind]

    def gold_of_best(prompt, subset):
        chosen = proxy[prompt, subset]
        return GOLD[prompt, subset][chosen == chosen.max()].mean()

    np.testing.assert_allclose(best_of_n(GOLD, proxy, SIZES), over_subsets(gold_of_best), rtol=1e-10)
    np.testing.assert_allclose(best_of_n(GOLD[1], proxy[1], SIZES), over_subsets(gold_of_best)[1], rtol=1e-10)


def test_expected_proxy_equals_brute_force():
    proxy = PROXIES["tied"]
    np.testing.assert_allclose(expected_proxy(proxy, SIZES), over_subsets(lambda p, s: proxy[p, s].max()), rtol=1e-10)


def test_pass_at_n_equals_brute_force():
    expected = over_subsets(lambda p, s: CORRECT[p, s].any())
    np.testing.assert_allclose(pass_at_n(CORRECT, SIZES), expected, atol=1e-12)
    np.testing.assert_allclose(pass_at_n(CORRECT[2], SIZES), expected[2], atol=1e-12)


ANSWERS = RNG.integers(0, 3, (4, 7))
ANSWER_GOLD = (ANSWERS == 1).astype(float)
WEIGHTS = RNG.random((4, 7))


def vote_of(weights):
    def gold_of_vote(prompt, subset):
        votes = Counter()
        for i in subset:
            votes[ANSWERS[prompt, i]] += weights[prompt, i]
        top = [answer for answer, vote in votes.items() if vote >= max(votes.values()) - 1e-9]
        return np.mean([answer == 1 for answer in top])

    return gold_of_vote


def test_votes_approach_brute_force():
    expected = over_subsets(vote_of(np.ones((4, 7))))
    found = majority_vote(ANSWERS, ANSWER_GOLD, SIZES, rng=np.random.default_rng(1), num_draws=20_000)
    np.testing.assert_allclose(found, expected, atol=0.015)
    exact = [0, 1, 4]  # N = 1, 2, 7
    np.testing.assert_allclose(found[:, exact], expected[:, exact], rtol=1e-10)

    expected = over_subsets(vote_of(WEIGHTS))
    found = weighted_vote(ANSWERS, ANSWER_GOLD, WEIGHTS, SIZES, rng=np.random.default_rng(1), num_draws=20_000)
    np.testing.assert_allclose(found, expected, atol=0.015)
    np.testing.assert_allclose(found[:, [0, 4]], expected[:, [0, 4]], rtol=1e-10)


def test_votes_take_strings_and_are_seeded():
    names = np.array(["a", "b", "c"])[ANSWERS]
    first = majority_vote(ANSWERS, ANSWER_GOLD, SIZES, rng=np.random.default_rng(1))
    second = majority_vote(names, ANSWER_GOLD, SIZES, rng=np.random.default_rng(1))
    np.testing.assert_array_equal(first, second)


def test_votes_of_weight_zero_tie_only_among_answers_given():
    found = weighted_vote([0, 1, 2], [0.0, 1.0, 0.5], [0, 0, 0], [3], rng=np.random.default_rng(0))
    assert found == pytest.approx([0.5])


@pytest.mark.parametrize("sizes", [[1.5], [1, 2.0], ["2"], [None]])
def test_a_size_that_is_no_whole_number_is_refused(sizes):
    with pytest.raises(ValueError, match="N must be whole numbers"):
        best_of_n(GOLD, GOLD, sizes)
    with pytest.raises(ValueError, match="N must be whole numbers"):
        pass_at_n(CORRECT, sizes)


@pytest.mark.parametrize("sizes", [[0, 1], [1, 8], [-1]])
def test_sizes_out_of_range_are_named(sizes):
    bad = str([n for n in sizes if not 1 <= n <= 7])
    calls = (
        lambda: best_of_n(GOLD, GOLD, sizes),
        lambda: pass_at_n(CORRECT, sizes),
        lambda: majority_vote(ANSWERS, ANSWER_GOLD, sizes, rng=np.random.default_rng(0)),
    )
    for call in calls:
        with pytest.raises(ValueError, match="7 samples") as caught:
            call()
        assert bad in str(caught.value)


def test_nan_is_named_with_its_index():
    proxy = GOLD.copy()
    proxy[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"proxy.*\(2, 3\)"):
        best_of_n(GOLD, proxy, [1])


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="negative"):
        weighted_vote(ANSWERS, ANSWER_GOLD, -WEIGHTS, [2], rng=np.random.default_rng(0))


def test_kl_bound_is_above_the_exact_kl():
    """Three outcomes with probabilities p, ranked: best-of-N has probabilities F(k)^N - F(k-1)^N."""
    probabilities = np.array([0.5, 0.3, 0.2])
    sizes = np.array([1, 2, 4, 16])
    cdf = np.concatenate([[0], probabilities.cumsum()])
    best = np.diff(cdf[None] ** sizes[:, None], axis=1)
    exact = np.sum(best * np.log(best / probabilities), axis=1)
    bound = kl_bound_nats(sizes)
    assert bound[0] == 0
    assert exact[0] == pytest.approx(0)
    assert np.all(bound[1:] > exact[1:])
    assert bound[3] == pytest.approx(np.log(16) - 15 / 16)
    with pytest.raises(ValueError, match="at least 1"):
        kl_bound_nats([0])


def test_speed():
    rng = np.random.default_rng(2)
    gold, proxy = rng.random((128, 512)), rng.random((128, 512))
    start = time.perf_counter()
    best_of_n(gold, proxy, 2 ** np.arange(10))
    assert time.perf_counter() - start < 1

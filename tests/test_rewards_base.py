"""The reward interface, rewards made of rewards, and measures of scores: by hand, by loops, on synthetic data."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import tiny
from rlhfscale.bed import rungs
from rlhfscale.models import loading
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import Ensemble, Mixed, Normalised, OutcomeRewardModel, Shrunk, as_reward, checked, metrics

TOKENIZER = rungs.build_tokenizer()


class Fixed:
    """A reward that knows its scores."""

    def __init__(self, *scores):
        self.scores = np.array(scores, np.float32)

    def score(self, sequences):
        assert len(sequences) == len(self.scores)
        return self.scores


def sequences(*texts):
    """Sequences of (prompt, response) texts, closed by the end-of-sequence token."""
    prompts = [TOKENIZER(prompt).input_ids for prompt, _ in texts]
    responses = [[*TOKENIZER(response, add_special_tokens=False).input_ids, 2] for _, response in texts]
    return Sequences.join(prompts, responses, np.ones(len(texts), bool), TOKENIZER)


THREE = sequences(
    ("lists reverse : a b =", "b a"), ("lists sort : b a =", "a b ; a"), ("registers inc_0 : 0 1 2 =", "1")
)


def count_letters(prompts, responses):
    return [
        len(prompt.split()) + 0.1 * len(response.split()) for prompt, response in zip(prompts, responses, strict=True)
    ]


class Callable:
    def __call__(self, prompts, responses):
        return torch.tensor(count_letters(prompts, responses), requires_grad=True)

    def method(self, prompts, responses):
        return np.array(count_letters(prompts, responses))


@pytest.mark.parametrize(
    "function",
    [count_letters, Callable(), Callable().method, functools.partial(count_letters), lambda p, r: count_letters(p, r)],
)
def test_any_callable_of_texts_is_a_reward(function):
    found = as_reward(function).score(THREE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [6.2, 6.4, 7.1], rtol=1e-6)


def test_the_function_gets_the_texts_without_special_tokens():
    seen = []
    as_reward(lambda prompts, responses: seen.append((prompts, responses)) or [0.0] * 3).score(THREE)
    assert seen == [
        (
            ["lists reverse : a b =", "lists sort : b a =", "registers inc_0 : 0 1 2 ="],
            ["b a", "a b ; a", "1"],
        )
    ]


def test_an_object_with_a_score_method_is_passed_through():
    reward = Fixed(1, 2, 3)
    assert as_reward(reward) is reward
    mixed = Mixed([(1.0, reward)])
    assert as_reward(mixed) is mixed


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (3.0, "float has no method score"),
        ("accuracy", "str has no method score"),
        (None, "NoneType has no method score"),
        (Fixed, "Fixed is a class; give an object"),
        (torch.nn.Linear(2, 1), "bare Linear; wrap it"),
    ],
)
def test_what_is_no_reward_is_refused(thing, message):
    with pytest.raises(TypeError, match=message):
        as_reward(thing)


def test_a_bare_transformers_model_is_refused_although_its_head_is_called_score(tmp_path):
    rungs.save_model(tiny.model(), tmp_path)
    model = loading.load_scorer(tmp_path, init_seed=0)
    assert callable(model.score)
    with pytest.raises(TypeError, match="bare LlamaForSequenceClassification; wrap it"):
        as_reward(model)
    assert as_reward(OutcomeRewardModel(model)).score(THREE).shape == (3,)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], r"shape \[2\] for 3 samples; expected \[3\]"),
        (np.zeros((3, 1)), r"shape \[3, 1\]"),
        (1.0, r"shape \[\]"),
        ([0.0, float("nan"), float("inf")], "sample 1 the score nan"),
        ([0.0, 0.0, -float("inf")], "sample 2 the score -inf"),
        ([0.0, 0.0, 1e60], "sample 2 the score inf"),
        ([0.0, None, 0.0], "sample 1 the score nan"),
    ],
)
def test_bad_scores_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        checked(scores, 3)
    with pytest.raises(ValueError, match=message):
        as_reward(lambda prompts, responses: scores).score(THREE)


def test_a_member_of_a_combination_is_checked():
    bad = Fixed(0.0, np.nan, 1.0)
    good = Fixed(0.0, 0.0, 1.0)
    for reward in (Mixed([(0.0, bad)]), Ensemble([good, bad]), Normalised(bad, 0.0, 1.0), Shrunk(bad, 0.5)):
        with pytest.raises(ValueError, match="sample 1 the score nan"):
            reward.score(THREE)


def test_a_mixture_is_the_weighted_sum():
    found = Mixed([(2.0, Fixed(1, 0, -1)), (-0.5, Fixed(4, 2, 0)), (1.0, count_letters)]).score(THREE)
    np.testing.assert_allclose(found, [2 - 2 + 6.2, 0 - 1 + 6.4, -2 + 0 + 7.1], rtol=1e-6)
    assert found.dtype == np.float32


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Mixed([])
    with pytest.raises(ValueError, match="weight 1 is nan"):
        Mixed([(1.0, Fixed(1)), (float("nan"), Fixed(1))])
    with pytest.raises(TypeError, match="int has no method"):
        Mixed([(1.0, 5)])


MEMBERS = [Fixed(1, 5, -1), Fixed(3, 5, -4), Fixed(8, 5, 2)]


@pytest.mark.parametrize(
    ("combine", "penalty", "expected"),
    [
        ("mean", None, [4, 5, -1]),
        ("worst", None, [1, 5, -4]),
        ("uncertainty", 0.5, [4 - 0.5 * 26 / 3, 5, -1 - 0.5 * 18 / 3]),  # variance over 3: (9 + 1 + 16) / 3, 0, 18 / 3
        ("uncertainty", 0.0, [4, 5, -1]),
        ("deviation", 0.5, [4 - 0.5 * math.sqrt(26 / 3), 5, -1 - 0.5 * math.sqrt(6)]),
    ],
)
def test_ensembles_by_hand(combine, penalty, expected):
    found = Ensemble(MEMBERS, combine, penalty).score(THREE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(Ensemble(MEMBERS[::-1], combine, penalty).score(THREE), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "median"}, "combine: 'median' is not one of 'mean', 'worst', 'uncertainty', 'deviation'"),
        ({"combine": "uncertainty"}, "penalty: None with combine='uncertainty'"),
        ({"combine": "mean", "penalty": 0.5}, "penalty: 0.5 with combine='mean'"),
        ({"combine": "deviation", "penalty": -1.0}, "penalty: -1.0 is not"),
        ({"combine": "deviation", "penalty": float("nan")}, "penalty: nan is not"),
        ({"rewards": []}, "at least one member"),
    ],
)
def test_bad_ensembles_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(**({"rewards": MEMBERS} | options))


def test_normalising():
    raw = Fixed(1, 3, 8)
    np.testing.assert_allclose(Normalised(raw, 4, 2).score(THREE), [-1.5, -0.5, 2.0])
    fitted = Normalised.fit(raw, THREE)
    assert (fitted.mean, fitted.std) == (4.0, pytest.approx(math.sqrt(26 / 3)))
    found = fitted.score(THREE)
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-6)
    with pytest.raises(ValueError, match="same score"):
        Normalised.fit(Fixed(2, 2, 2), THREE)
    for mean, std in ((0.0, -1.0), (0.0, float("nan")), (float("inf"), 1.0)):
        with pytest.raises(ValueError, match="must be finite"):
            Normalised(raw, mean, std)


def test_shrinking_damps_the_negative_scores_only():
    np.testing.assert_allclose(Shrunk(Fixed(-2, 0, 3), 0.25).score(THREE), [-0.5, 0, 3])
    np.testing.assert_allclose(Shrunk(Fixed(-2, 0, 3), 1.0).score(THREE), [-2, 0, 3])
    after = Shrunk(Normalised.fit(Fixed(1, 3, 8), THREE), 0.5).score(THREE)
    np.testing.assert_allclose(after, np.array([-1.5, -0.5, 4]) / math.sqrt(26 / 3), rtol=1e-6)
    for factor in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="not in"):
            Shrunk(Fixed(1), factor)


GOLD = np.array([[1.0, 0.5, 0.5, 0.0], [0.2, 0.2, 0.2, 0.2], [0.0, 1.0, 1.0, 0.3]], np.float32)
SCORES = np.array([[0.3, 0.3, -1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [-0.5, 0.0, 0.7, 0.7]], np.float32)


def ordered_pairs(gold=GOLD):
    """(prompt, better, worse) over every prompt's responses."""
    for prompt, row in enumerate(gold):
        for i, j in itertools.permutations(range(len(row)), 2):
            if row[i] > row[j]:
                yield prompt, i, j


def test_pair_accuracy_equals_a_loop_over_pairs():
    right = {0: [], 1: [], 2: []}
    for p, i, j in ordered_pairs():
        right[p].append(1.0 if SCORES[p, i] > SCORES[p, j] else 0.5 if SCORES[p, i] == SCORES[p, j] else 0.0)
    found = metrics.pair_accuracy(SCORES, GOLD)
    assert np.isnan(found[1]) and not right[1]  # all gold equal
    np.testing.assert_allclose(found[[0, 2]], [np.mean(right[0]), np.mean(right[2])])
    np.testing.assert_allclose(metrics.pair_accuracy(GOLD, GOLD)[[0, 2]], 1.0)
    np.testing.assert_allclose(metrics.pair_accuracy(-GOLD, GOLD)[[0, 2]], 0.0)
    np.testing.assert_allclose(metrics.pair_accuracy(np.zeros_like(GOLD), GOLD)[[0, 2]], 0.5)


def test_missing_gold_makes_no_pair():
    gold = np.concatenate([GOLD, np.full((3, 2), np.nan, np.float32)], 1)
    scores = np.concatenate([SCORES, np.full((3, 2), 9.0, np.float32)], 1)
    np.testing.assert_array_equal(metrics.pair_accuracy(scores, gold), metrics.pair_accuracy(SCORES, GOLD))
    assert metrics.num_pairs(gold) == metrics.num_pairs(GOLD)


def test_the_number_of_pairs():
    assert metrics.num_pairs(GOLD) == len(list(ordered_pairs())) == 10


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise"):
        np.testing.assert_allclose(
            metrics.sigmoid(np.array([0.0, 2.0, -2.0])), [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]
        )
    np.testing.assert_allclose(metrics.sigmoid(np.array([-1000.0, 1000.0])), [0, 1])

"""The bed's conditions on planted values, met and not met; and the rules that responses follow."""

import numpy as np
import pytest

from rlhfscale.bed import demonstrations as data
from rlhfscale.bed import ladder, tasks
from rlhfscale.bed.habits import habits
from rlhfscale.bed.responses import label
from rlhfscale.samplers.base import Completions
from rlhfscale.stats.bootstrap import Interval
from rlhfscale.study import conditions


def interval(estimate, half=0.01):
    about = {"std_error": half / 2, "method": "t", "num_seeds": 5, "num_prompts": 512, "num_draws": 1}
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half, **about)


def rng():
    return np.random.default_rng(0)


def met(found):
    return [condition.met for condition in found]


def test_conditions_about_the_ladder():
    assert met(conditions.loss_follows_a_power_law(0.97, 6)) == [True]
    assert (
        met(conditions.loss_follows_a_power_law(0.97, 5))
        == met(conditions.loss_follows_a_power_law(0.94, 6))
        == [False]
    )
    assert met(conditions.sft_leaves_room({"a": interval(0.2), "b": interval(0.4)})) == [True]
    assert met(conditions.sft_leaves_room({"a": interval(0.1), "b": interval(0.4)})) == [False]
    assert met(conditions.sft_leaves_room({"a": interval(0.2), "b": interval(0.6)})) == [False]


def test_ppo_must_beat_every_temperature_on_every_rung():
    good, bad = {"a": interval(0.1), "b": interval(0.02)}, {"a": interval(0.1), "b": interval(0.005)}
    found = conditions.no_temperature_does_as_well({"sampled": good, "greedy": bad})
    assert met(found) == [True, False]
    assert found[1].measured == "0.005 [-0.005, 0.015] (b)" and "greedy" in found[1].what


def test_ppo_must_gain_on_five_rungs():
    gains = {name: interval(0.2) for name in "abcde"}
    assert met(conditions.ppo_gains({"sampled": gains | {"f": interval(0.05)}})) == [True]
    assert met(conditions.ppo_gains({"sampled": gains | {"e": interval(0.09)}})) == [False]
    assert met(conditions.ppo_gains({"sampled": gains | {"e": interval(0.2, half=0.3)}})) == [False]


def test_reward_models_must_span_a_range():
    few, some = {("r", 100): interval(0.55)}, {("small", 1000): interval(0.8), ("r", 1000): interval(0.8)}
    best = {("large", 1000): interval(0.91)}
    assert met(conditions.reward_models_range(few | some | best, "r", interval(0.11))) == [True] * 3
    many = {("r", 100): interval(0.65)} | some | best
    assert met(conditions.reward_models_range(many, "r", interval(0.11))) == [False, True, True]
    assert met(conditions.reward_models_range(few | some, "r", interval(0.07))) == [True, False, False]


def curves(*means):
    """float64 [seed, prompt, size] about the means of each size."""
    noise = 0.01 * rng().standard_normal((5, 64, 1))
    return np.array(means) + noise


def test_best_of_n_must_rise():
    sizes = [1, 8, 16, 64]
    found = conditions.best_of_n_rises(sizes, curves(0.3, 0.5, 0.6, 0.55), curves(0.3, 0.4, 0.3, 0.1), rng())
    assert met(found) == [True, True, True] and [row.measured for row in found[::2]] == ["16", "8"]
    assert met(conditions.best_of_n_rises(sizes, curves(0.3, 0.5, 0.6, 0.4), curves(0.3, 0.4, 0.5, 0.1), rng()))[
        1:
    ] == [
        False,
        False,
    ]
    assert not met(conditions.best_of_n_rises(sizes, curves(0.3, 0.6, 0.5, 0.6), curves(0.3, 0.2, 0.2, 0.1), rng()))[0]


def test_knowledge_seeds_and_bases():
    assert met(conditions.knowledge_is_there({"a": interval(0.9)}, 64)) == [True]
    assert met(conditions.knowledge_is_there({"a": interval(0.9)}, 16)) == [False]  # another k says nothing of k = 64
    assert met(conditions.knowledge_is_there({"a": interval(0.9), "b": interval(0.8)}, 64)) == [False]
    assert met(conditions.seeds_agree({"a": np.array([0.2, 0.21, 0.19])})) == [True]
    assert met(conditions.seeds_agree({"a": np.array([0.2, 0.3, 0.1])})) == [False]
    (bad,) = conditions.seeds_agree({"b": np.array([0.2, 0.21, 0.19]), "a": np.array([-0.2, -0.2, -0.21])})
    assert not bad.met and "(a)" in bad.measured
    assert met(conditions.enough_seeds(5)) == [True] and met(conditions.enough_seeds(4)) == [False]
    shares = {"base": 0.5, "seed": 0.25, "rest": 0.25}
    (found,) = conditions.enough_bases({"a": 3, "b": 3}, shares)
    assert found.met and "base 50%, seed 25%, rest 25%" in found.what
    assert met(conditions.enough_bases({"a": 3, "b": 1}, shares)) == [False]


def test_over_optimisation_is_not_a_matter_of_choosing_the_peak():
    """A curve that rises and falls is found in all seeds; of pure noise the peak is chosen on the other seeds."""
    noise = 0.01 * rng().standard_normal((5, 8))
    up, down = np.linspace(0, 1, 8), np.array([0.3, 0.4, 0.5, 0.5, 0.45, 0.4, 0.35, 0.3])
    assert met(conditions.weak_kl_overoptimises(down + noise, up + noise, rng())) == [True, True]
    assert met(conditions.weak_kl_overoptimises(up + noise, up + noise, rng())) == [False, False]
    fooled = 0
    for seed in range(200):
        flat = np.random.default_rng(seed).standard_normal((5, 8))
        fooled += conditions.weak_kl_overoptimises(flat, flat, rng())[0].met
    assert fooled / 200 < 0.07


def test_variance_shares_recover_planted_components():
    generator, found = rng(), []
    for _ in range(400):
        base, seed = 2.0 * generator.standard_normal((4, 1)), 1.0 * generator.standard_normal((1, 6))
        found.append(conditions.variance_shares(base + seed + 0.5 * generator.standard_normal((4, 6))))
    mean = {name: np.mean([shares[name] for shares in found]) for name in found[0]}
    assert all(sum(shares.values()) == pytest.approx(1.0) for shares in found)
    assert mean["base"] > mean["seed"] > mean["rest"] > 0
    exact = conditions.variance_shares(np.array([[0.1, 0.1], [0.3, 0.3]]))
    assert exact == pytest.approx({"base": 1.0, "seed": 0.0, "rest": 0.0})
    assert conditions.variance_shares(np.ones((3, 5))) == {"base": 0.0, "seed": 0.0, "rest": 0.0}


def completions_of(texts):
    """Responses as a sampler returns them."""
    ids = [[*data.encode(text), ladder.EOS_ID] for text in texts]
    width = max(map(len, ids))
    padded = np.array([[*row, *[0] * (width - len(row))] for row in ids])
    ended, none = np.ones(len(ids), bool), np.zeros(padded.shape, np.float32)
    return Completions(padded, np.array([len(row) for row in ids]), ended, none, 1.0, np.zeros(len(ids), np.uint64))


def test_habits_are_read_off_the_steps():
    problems = [
        data.parse_prompt(text.split()) for text in ("registers inc_0 zero_1 : 3 7 1 =", "lists reverse : a b c d =")
    ]
    texts = ["4 7 1 ; 4 0 1", "5 7 1 ; 5 1 1", "d c b a", "d b c a"]
    found = habits(problems, label(problems, completions_of(texts)))
    where = [found.operations.index(name) for name in ("inc_0", "zero_1", "reverse")]
    np.testing.assert_array_equal(found.right[where], [[1, 0], [1, 0], [0, 1]])
    np.testing.assert_array_equal(found.wrong[where], [[1, 0], [1, 0], [0, 1]])
    assert found.other.sum() == 0 and found.right.sum() == 3 == found.wrong.sum()
    assert found.shares[where[0]] == 1 - tasks.FAMILIES["registers"].misconceptions["inc_0"].share


def test_steps_that_cannot_tell_are_left_out():
    problems = [
        data.parse_prompt(text.split()) for text in ("lists rotate : a a a =", "registers inc_0 inc_0 : 3 7 1 =")
    ]
    found = habits(problems, label(problems, completions_of(["a a a", "4 7 ; 5 7 1"])))
    assert found.right.sum() == found.wrong.sum() == 0  # both rules agree; and no rule applies to a state of two digits
    assert found.other.sum() == 1


def test_habits_of_demonstrations_are_the_demonstrators_shares():
    problems = data.problem_list((5, 1), "train", tuple(tasks.FAMILIES), 6000)
    generator = rng()
    texts = [tasks.FAMILIES[problem.family].demonstrate(problem, generator, 0.0) for problem in problems]
    found = habits(problems, label(problems, completions_of(texts)))
    right, wrong = found.right.sum(1), found.wrong.sum(1)
    assert found.other.sum() == 0
    error = np.sqrt(found.shares * (1 - found.shares) / (right + wrong))
    # some states let a wrong rule's step be followed by one that tells nothing, so shares are near, not equal
    assert (np.abs(right / (right + wrong) - found.shares) < 5 * error + 0.03).all()

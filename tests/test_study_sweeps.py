"""Tables and verdicts of the sweeps from artifacts in which the claim was built in, built out, or is noise."""

import itertools

import numpy as np
import pytest

from planted import RUNG_STEPS, checked, planted
from rlhfscale.bed import ladder
from rlhfscale.claims import c02_reward_model_size as c02
from rlhfscale.claims import c05_responses_per_prompt as c05
from rlhfscale.claims import c09_algorithms as c09
from rlhfscale.claims import learning_rates


@pytest.mark.parametrize(
    ("ppo", "skill", "verdict"),
    [(0.01, 0.5, "reproduced"), (0.02, 0.0, "contradicted"), (0.0, 0.0, "inconclusive")],
)
def test_c2(tmp_path, ppo, skill, verdict):
    P, made = planted(
        tmp_path,
        "02_reward_model_size",
        lambda policy: 0.52 + ppo * RUNG_STEPS[policy.reward_model.rung],
        lambda model, family: 0.5 + skill * RUNG_STEPS[model.rung],
    )
    tables = c02.measure(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    found = checked(tables, tmp_path)
    sizes = np.log2([ladder.rung(rung).num_params for rung in P.reward_model_rungs])
    expected = np.polyfit(sizes, ppo * np.arange(5), 1)[0]
    assert found.loc["ppo_gain_slope", "estimate"] == pytest.approx(expected, abs=0.003)
    difference = found.loc["best_of_n_gain_slope", "estimate"] - found.loc["ppo_gain_slope", "estimate"]
    assert found.loc["slope_difference", "estimate"] == pytest.approx(difference)
    assert found.loc["pair_accuracy", "num_prompts"].tolist() == [384] * 5  # a quarter has no pair
    assert (found.loc["best_of_n_gain", "estimate"] > 0.05).all()


@pytest.mark.parametrize(
    ("curve", "verdict"),
    [
        (lambda doublings: 0.04 * (1 - 0.5**doublings), "reproduced"),
        (lambda doublings: 0.02 * doublings, "contradicted"),
        (lambda doublings: 0.0, "inconclusive"),
    ],
)
def test_c5(tmp_path, curve, verdict):
    P, made = planted(
        tmp_path,
        "05_responses_per_prompt",
        lambda policy: 0.55 + curve(np.log2(policy.responses_per_prompt)) + 0.02 * (policy.algorithm == "grpo"),
    )
    tables = c05.measure(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    found = checked(tables, tmp_path)
    gains = found.loc["doubling_gain"].set_index(["ladder", "responses_per_prompt"])["estimate"]
    for name, sizes in P.ladders().items():
        for before, after in itertools.pairwise(sizes):
            expected = curve(np.log2(after)) - curve(np.log2(before))
            assert gains[name, after] == pytest.approx(expected, abs=0.006)
    ladder_gains = found.loc["gain"].set_index(["ladder", "responses_per_prompt"])["estimate"]
    assert ladder_gains["grpo, equal prompts", 2] == pytest.approx(0.07 + curve(1), abs=0.012)
    costs = tables.mean_costs()
    assert costs.loc[("ppo", 64, 32, 30), "rollouts"] == 64 * 32 * 30 and costs.loc[("grpo", 64, 2, 30), "cpu_s"] == 2.0


@pytest.mark.parametrize(
    ("gain", "shift", "verdict"),
    [(0.05, 0.002, "reproduced"), (0.05, 0.03, "contradicted"), (0.05, 0.01, "inconclusive"),
     (0.0, 0.0, "inconclusive")],
)  # fmt: skip
def test_c9(tmp_path, gain, shift, verdict):
    P, made = planted(
        tmp_path, "09_algorithms", lambda policy: 0.5 + gain + {"ppo": 0, "grpo": shift, "rloo": 0.04}[policy.algorithm]
    )
    tables = c09.measure(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    whole = checked(tables, tmp_path).loc["minus_ppo_in_all"].set_index("algorithm")
    assert whole.loc["grpo", "estimate"] == pytest.approx(shift, abs=0.004)
    assert whole.loc["rloo", "estimate"] == pytest.approx(0.04, abs=0.005) and not whole.loc["rloo", "equivalent"]
    curves = tables.extra["training.csv"]
    assert len(curves) == 3 * 3 * 5 * 30 and set(curves["algorithm"]) == {"ppo", "grpo", "rloo"}


def test_learning_rates_are_paired_with_the_common_one(tmp_path):
    P, made = planted(tmp_path, "00_learning_rates", lambda policy: 0.5 + 0.05 * (policy.policy_lr == 0.002))
    tables = learning_rates.measure(P, made)
    rows = tables.summary.set_index(["quantity", "algorithm", "rung", "policy_lr"])
    assert len(tables.runs) == len(P.cells()) * len(P.rates) * 2
    for algorithm, rung in P.cells():
        distance = rows.loc["minus_common", algorithm, rung]
        assert distance.loc[0.001, ["estimate", "ci_low", "ci_high"]].eq(0).all()
        assert distance.loc[0.002, "ci_low"] > 0.02 and abs(distance.loc[0.0005, "estimate"]) < 0.02

"""Tables and verdicts of the sweeps from artifacts in which the claim was built in, built out, or is noise."""

import itertools
import json
import zlib

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from rlhfscale import ladder, params, registry, specs, study_sweeps
from rlhfscale.data.responses import Responses
from rlhfscale.results import ResultsFolder

assert registry
RUNG_STEPS = {name: step for step, name in enumerate(ladder.RUNGS)}


def planted(folder, figure, accuracy, skill=lambda rung: 1.0):
    """Artifacts of a figure of the laptop tier, by spec: policies with the accuracies, reward models with the skills.

    A model's draws are those of every other model (their differences have little noise) but for a shift by seed.
    """
    P = params.load(figure, "laptop")
    P = type(P)(**P.model_dump() | ({"num_samples": 16} if "num_samples" in type(P).model_fields else {}))
    made = {}
    for spec in P.specs():
        made[spec] = place = folder / spec.key
        place.mkdir()
        rng = np.random.default_rng(zlib.crc32(spec.key.encode()))
        if isinstance(spec, specs.Samples):
            level = accuracy(spec.model) if isinstance(spec.model, specs.Policy) else 0.5
            shape = (spec.num_prompts, spec.num_samples)
            draws = np.random.default_rng((spec.seed, spec.num_samples)).random(shape)
            save_responses(place, draws < level + 0.002 * rng.standard_normal())
        elif isinstance(spec, specs.Policy):
            names = ("proxy", "gold", "exact", "kl_nats", "response_tokens", "finished")
            pd.DataFrame({"update": range(6)} | dict.fromkeys(names, 0.5)).to_csv(place / "metrics.csv", index=False)
            (place / "manifest.json").write_text(json.dumps({"wall_s": 3.0, "cpu_s": 2.0}))
        elif isinstance(spec, specs.RewardModel):
            found = np.where(np.arange(512) % 4, rng.random((2, 512)) < 0.7 + 0.02 * RUNG_STEPS[spec.rung], np.nan)
            save_file({"pair_accuracy": found}, place / "held_out.safetensors")
    for spec in (spec for spec in P.specs() if isinstance(spec, specs.Scores)):
        right = Responses.load(made[spec.samples] / "responses.safetensors").exact
        noise = np.random.default_rng(spec.reward_model.seed).standard_normal(right.shape)
        save_file({"scores": skill(spec.reward_model.rung) * right + noise}, made[spec] / "scores.safetensors")
    return P, made


def save_responses(folder, exact):
    count, none = np.ones(exact.shape, np.int8), np.zeros((len(exact), 1), np.int16)
    Responses(
        prompt_ids=none, prompt_lengths=none[:, 0], response_ids=np.zeros((*exact.shape, 1), np.int16),
        response_lengths=count.astype(np.int16), finished=exact | True, gold=exact.astype(np.float32), exact=exact,
        steps_right=count, steps_written=count, family=count[:, 0], difficulty=count[:, 0],
    ).save(folder / "responses.safetensors")  # fmt: skip


def checked(tables, tmp_path):
    """The tables as the results folder takes them: complete, finite, and the same when read back."""
    folder = ResultsFolder("sweep", "smoke", tmp_path / "results")
    folder.write_runs(tables.runs)
    folder.write_summary(tables.summary)
    folder.write_per_prompt(tables.per_prompt)
    folder.write_claims(tables.claims)
    runs = folder.read("runs.csv")
    named = ["node", "metric", *(name for name in ("ladder", "seed") if name in runs)]
    assert not runs.duplicated(named).any()
    return tables.summary.set_index("quantity")


@pytest.mark.parametrize(
    ("ppo", "skill", "verdict"),
    [(0.01, 0.5, "reproduced"), (0.02, 0.0, "contradicted"), (0.0, 0.0, "inconclusive")],
)
def test_c2(tmp_path, ppo, skill, verdict):
    P, made = planted(
        tmp_path,
        "02_reward_model_size",
        lambda policy: 0.52 + ppo * RUNG_STEPS[policy.reward_model.rung],
        lambda rung: 0.5 + skill * RUNG_STEPS[rung],
    )
    tables = study_sweeps.reward_model_size(P, made)
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
        (lambda doublings: 0.03 * (1 - 0.5**doublings), "reproduced"),
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
    tables = study_sweeps.responses_per_prompt(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    found = checked(tables, tmp_path)
    gains = found.loc["doubling_gain"].set_index(["ladder", "responses_per_prompt"])["estimate"]
    for name, sizes in P.ladders().items():
        for before, after in itertools.pairwise(sizes):
            expected = curve(np.log2(after)) - curve(np.log2(before))
            assert gains[name, after] == pytest.approx(expected, abs=0.006)
    ladder_gains = found.loc["gain"].set_index(["ladder", "responses_per_prompt"])["estimate"]
    assert ladder_gains["grpo, equal prompts", 2] == pytest.approx(0.07 + curve(1), abs=0.012)
    costs = study_sweeps.mean_cost(tables.extra["cost.csv"])
    assert costs.loc[("ppo", 64, 32), "rollouts"] == 64 * 32 * 30 and costs.loc[("grpo", 64, 2), "cpu_s"] == 2.0


@pytest.mark.parametrize(
    ("gain", "shift", "verdict"),
    [(0.05, 0.002, "reproduced"), (0.05, 0.03, "contradicted"), (0.05, 0.01, "inconclusive"),
     (0.0, 0.0, "inconclusive")],
)  # fmt: skip
def test_c9(tmp_path, gain, shift, verdict):
    P, made = planted(
        tmp_path, "09_algorithms", lambda policy: 0.5 + gain + {"ppo": 0, "grpo": shift, "rloo": 0.04}[policy.algorithm]
    )
    tables = study_sweeps.algorithms(P, made)
    assert [result.verdict for result in tables.claims] == [verdict]
    whole = checked(tables, tmp_path).loc["minus_ppo_in_all"].set_index("algorithm")
    assert whole.loc["grpo", "estimate"] == pytest.approx(shift, abs=0.004)
    assert whole.loc["rloo", "estimate"] == pytest.approx(0.04, abs=0.005) and not whole.loc["rloo", "equivalent"]
    curves = tables.extra["training.csv"]
    assert len(curves) == 3 * 3 * 5 * 6 and set(curves["algorithm"]) == {"ppo", "grpo", "rloo"}

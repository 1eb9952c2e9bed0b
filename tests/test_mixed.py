"""Reward models from a mix of labels: steps add up to the score, every kind of label teaches, bad data are refused."""

import numpy as np
import pytest
import torch

from rlhfscale.rewards import Labelled, StepLabelled, labelled, mixed, outcome
from test_process import STEP_IDS, base, new_scorer, written  # noqa: F401  base is a fixture

RESPONSES = ["a d b ; d b a ; a b d .", "a d b ; d b b ; a b d .", "a d b .", "d b a ; d b a ; d d d ."]
STEPS = [[1, 1, 1], [1, 0, 1], [1, np.nan, np.nan], [0, 0, 0]]
GOLD, NONE = np.array([1, 0.5, 0, 0], np.float32), np.full(4, np.nan, np.float32)
OPTIONS = {"step_ids": STEP_IDS, "prompts_per_batch": 4, "responses_per_batch": 4, "lr": 3e-3, "muon_lr": 0.02}


def data(kind):
    sequences, group = written(*RESPONSES), np.zeros(4, np.int64)
    if kind == "process":
        return [], [StepLabelled(sequences, np.array(STEPS, np.float32))]
    if kind == "preference":
        return [Labelled(sequences, group, GOLD, NONE)], []
    return [Labelled(sequences, group, NONE, (GOLD == 1).astype(np.float32))], []


def test_a_responses_steps_add_up_to_its_score(base):  # noqa: F811
    model, sequences = new_scorer(base), written(*RESPONSES)
    with torch.no_grad():
        logits = mixed.step_logits(model, sequences, STEP_IDS).numpy()
        scores = outcome.sequence_scores(model, sequences, "sum").numpy()
        by_token = outcome.scorer.read(model, sequences, outcome.read_at(sequences, "sum"), 10**6).numpy()
    counts = labelled.step_ends(sequences, STEP_IDS).sum(1)
    rows = np.split(logits, counts.cumsum()[:-1])
    np.testing.assert_allclose([row.sum() for row in rows], scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[0], by_token[:4].sum(), rtol=1e-5)  # "a d b ;"


@pytest.mark.parametrize("kind", ["preference", "rejection sampling", "process"])
def test_each_kind_of_label_is_learned(base, kind):  # noqa: F811
    responses, steps = data(kind)
    model, records = mixed.train(new_scorer(base), responses, steps, epochs=40, lora_rank=0, seed=(0,), **OPTIONS)
    assert {record["kind"] for record in records} == {"steps" if steps else "responses"}
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]
    scores = outcome.OutcomeRewardModel(model, readout="sum").score(written(*RESPONSES))
    assert scores.argmax() == 0 or kind == "process"
    assert scores[0] > scores[3]


def test_all_kinds_together_and_none(base):  # noqa: F811
    kinds = [data(kind) for kind in ("preference", "rejection sampling", "process")]
    responses, steps = ([part for kind in kinds for part in kind[side]] for side in (0, 1))
    _, records = mixed.train(new_scorer(base), responses, steps, epochs=2, lora_rank=0, seed=(0,), **OPTIONS)
    assert [record["kind"] for record in records].count("steps") == 2 and len(records) == 6
    with pytest.raises(ValueError, match="nothing to learn"):
        mixed.train(new_scorer(base), [], [], epochs=1, lora_rank=0, seed=(0,), **OPTIONS)
    too_many = StepLabelled(written("a d b ."), np.ones((1, 2), np.float32))
    with pytest.raises(ValueError, match="response 0 has labels for more than its 1 steps"):
        mixed.train(new_scorer(base), [], [too_many], epochs=1, lora_rank=0, seed=(0,), **OPTIONS)

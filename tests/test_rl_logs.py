"""What a run writes: loggers, tables of completions, rewards that are only watched, a held-out set."""

import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import tiny_rl
from rlhfscale.rl import GRPO, PPO, RLOO
from rlhfscale.rl.kl import sequence_kl
from rlhfscale.rl.logs import RESERVED

PROMPTS = [f"lists sort : {letter} b a =" for letter in "abcdefgh"]
OPTIONS = {"prompts_per_update": 4, "minibatch_size": None, "max_new_tokens": 5}


def length(prompts, responses):
    """A gold reward that counts words."""
    return [float(len(response.split())) for response in responses]


def train(run=None, **options):
    run = run or tiny_rl.trainer(PPO, **OPTIONS)
    return run, run.train(PROMPTS, 4, progress=False, **options)


def test_watched_rewards_are_logged_and_change_nothing(tmp_path):
    _, table = train()
    run, watched = train(watch={"gold": length})
    np.testing.assert_array_equal(watched[table.columns].to_numpy(float), table.to_numpy(float))
    assert (watched["gold"] <= watched["response_tokens"]).all() and watched["gold"].nunique() > 1
    assert watched["gold"].iloc[-1] == pytest.approx(
        np.mean(length([], run.rollouts.sequences(run.tokenizer).responses))
    )


def test_a_held_out_set_is_answered_every_so_often_and_at_the_end():
    asked = []

    def reward(prompts, responses):
        asked.append(len(prompts))
        return length(prompts, responses)

    run = tiny_rl.trainer(PPO, reward=reward, **OPTIONS)
    held_out = ["lists reverse : c b =", "lists rotate : a b ="]
    _, table = train(
        run, eval_prompts=held_out, eval_every=3, watch={"twice": lambda p, r: [2 * x for x in length(p, r)]}
    )
    assert table["eval_proxy"].notna().tolist() == [False, False, True, True]
    np.testing.assert_allclose(table["eval_twice"].dropna(), 2 * table["eval_proxy"].dropna())
    assert {"eval_response_tokens", "eval_finished"} <= set(table) and asked.count(2) == 2
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        train(eval_prompts=["lists sort : a =", []])


def test_a_held_out_set_leaves_training_as_it_is():
    _, table = train()
    _, evaluated = train(eval_prompts=PROMPTS[:2], eval_every=1)
    np.testing.assert_array_equal(evaluated[table.columns].to_numpy(float), table.to_numpy(float))


@pytest.mark.parametrize("algorithm", [PPO, GRPO, RLOO])
def test_every_metric_is_a_name_that_is_taken(algorithm):
    _, metrics = train(tiny_rl.trainer(algorithm, **OPTIONS))
    assert set(metrics) <= RESERVED


def test_completions_are_tables_of_what_was_sampled(tmp_path):
    run, metrics = train(folder=tmp_path, log_completions=2, watch={"gold": length})
    assert sorted(file.name for file in (tmp_path / "completions").iterdir()) == ["000001.parquet", "000003.parquet"]
    table = pd.read_parquet(tmp_path / "completions" / "000003.parquet")
    sequences, rollouts = run.rollouts.sequences(run.tokenizer), run.rollouts
    assert table["prompt"].tolist() == sequences.prompts and table["response"].tolist() == sequences.responses
    np.testing.assert_array_equal(table["finished"], rollouts.finished)
    np.testing.assert_array_equal(table["score"], rollouts.scores)
    np.testing.assert_allclose(table["kl_nats"], sequence_kl(rollouts.logprobs, rollouts.ref_logprobs, rollouts.mask))
    for row in range(len(table)):
        tokens = rollouts.advantages[row][rollouts.mask[row]]
        assert table["advantage"][row] == pytest.approx(tokens.mean().item(), abs=1e-6)
    assert table["gold"].tolist() == length([], table["response"]) and table["gold"].mean() == metrics["gold"].iloc[-1]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_loggers_of_other_libraries_get_every_number(name, tmp_path, monkeypatch):
    calls = []
    library = SimpleNamespace(
        init=lambda **given: calls.append(("init", given)),
        log=lambda record, step: calls.append((step, record)),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, library)
    _, metrics = train(folder=tmp_path / "short", log_to=name)
    (first, given), *logged, (last, _) = calls
    assert (first, last) == ("init", "finish") and given["name"] == "short" and given["config"]["epochs"] == 2
    seen = pd.DataFrame(
        [{"update": step, "name": tag, "value": value} for step, part in logged for tag, value in part.items()]
    )
    wide = seen.pivot_table(index="update", columns="name", values="value")
    for column in metrics.columns.drop("update"):
        np.testing.assert_allclose(wide[f"ppo/{column}"], metrics[column])


def test_tensorboard_gets_every_number(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, metrics = train(folder=tmp_path, log_to="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [event.value for event in events.Scalars("ppo/proxy")]
    np.testing.assert_allclose(found, metrics["proxy"], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"log_to": "mlflow"}, ValueError, "log_to: 'mlflow' is not one of tensorboard, trackio, wandb"),
        ({"log_to": "tensorboard"}, ValueError, "log_to: tensorboard needs a folder"),
        ({"log_to": "wandb"}, ImportError, "log_to: wandb is not installed; pip install wandb"),
        ({"log_completions": 1}, ValueError, "log_completions: needs a folder"),
        ({"log_completions": -1}, ValueError, "log_completions: -1 is below 0"),
        ({"eval_every": 0}, ValueError, "eval_every: 0 is below 1"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every: 0 is below 1"),
        ({"eval_prompts": "lists"}, ValueError, "prompts: one text; give a list of texts"),
        ({"watch": {"proxy": length}}, ValueError, "watch: proxy is a metric or a column already"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_sampled(options, error, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tiny_rl.trainer(PPO, **OPTIONS)
    run.sampler = lambda *_, **__: pytest.fail("sampled")
    with pytest.raises(error, match=words):
        train(run, **options)

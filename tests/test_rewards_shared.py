"""A reward model that is an adapter on the policy's own base."""

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForSequenceClassification

import tiny
import tiny_rl
from rlhfscale.bed import rungs
from rlhfscale.models import loading
from rlhfscale.rewards import Mixed, Normalised, OutcomeRewardModel, SharedReward
from rlhfscale.rl import GRPO, PPO, RLOO
from rlhfscale.rl.rollout import encode, joined


@pytest.fixture(scope="module", params=["last", "sum"])
def saved(request, tmp_path_factory):
    """A reward model with random adapters on the tiny policy's own trunk, and its folder."""
    base = tiny.model()
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(3)
        scorer = LlamaForSequenceClassification(config)
        scorer.model.load_state_dict(base.model.state_dict())
        lora = loading.lora_config(4, 8.0)
        lora.modules_to_save = ["score"]
        scorer = get_peft_model(scorer, lora)
        for name, parameter in scorer.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    reward = OutcomeRewardModel(scorer, rungs.build_tokenizer(), request.param, mean=0.5, std=2.0)
    folder = tmp_path_factory.mktemp("reward")
    reward.save(folder)
    return reward, folder


@pytest.mark.parametrize("algorithm", [PPO, GRPO, RLOO])
def test_scores_are_those_of_the_reward_models_own_copy_while_the_policy_moves(saved, algorithm):
    own, folder = saved
    shared = SharedReward(folder)
    run = tiny_rl.trainer(algorithm, reward=Mixed([(1.0, Normalised(shared, shared.mean, shared.std))]))
    _, completions = tiny_rl.gather(run)
    for update in range(2):
        run.update(tiny_rl.prompts(run, update))
    sequences = sequences_of(run, completions)
    np.testing.assert_allclose(shared.score(sequences), own.score(sequences), rtol=1e-4, atol=1e-5)
    assert (shared.mean, shared.std) == (0.5, 2.0)


def sequences_of(run, completions):
    repeated = [p for p in encode(run.tokenizer, tiny_rl.prompts(run)) for _ in range(2)]
    return joined(repeated, completions, run.tokenizer)


def test_it_is_neither_trained_nor_saved(saved, tmp_path):
    run = tiny_rl.trainer(PPO, reward=SharedReward(saved[1]), critic="separate")
    before = {name: p.clone() for name, p in run.networks.named_parameters() if ".reward." in name}
    assert before and not any(p.requires_grad for n, p in run.networks.named_parameters() if ".reward." in n)
    tiny_rl.updates(run, 2)
    run.save(tmp_path / "checkpoint")
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir() if path.is_dir()) == ["critic", "policy"]
    again = tiny_rl.trainer(PPO, reward=SharedReward(saved[1]), critic="separate")
    again.load(tmp_path / "checkpoint")
    assert tiny_rl.updates(run, 1) == tiny_rl.updates(again, 1)
    after = dict(run.networks.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_bad_input_is_refused_before_any_compute(saved, tmp_path):
    _, folder = saved
    with pytest.raises(ValueError, match="holds no outcome reward model with adapters"):
        SharedReward(tmp_path)
    with pytest.raises(RuntimeError, match="give it to a trainer first"):
        SharedReward(folder).score(None)
    with pytest.raises(ValueError, match=r"OutcomeRewardModel\.load"):
        tiny_rl.trainer(PPO, reward=SharedReward(folder), adapter="none")
    with pytest.raises(ValueError, match="another shape"):
        tiny_rl.trainer(PPO, reward=SharedReward(folder), base=tiny_rl.language_model(vocab_size=56))
    with pytest.raises(ValueError, match="carries an adapter 'reward' already"):
        tiny_rl.trainer(PPO, reward=Mixed([(1.0, SharedReward(folder)), (1.0, SharedReward(folder))]))

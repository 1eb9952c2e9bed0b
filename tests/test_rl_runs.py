"""Short runs of each kind: precisions, rewards and options, each of which must raise its reward."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import tiny
import tiny_rewards
import tiny_rl
from rlhfscale import rewards
from rlhfscale.bed import rungs
from rlhfscale.models import loading
from rlhfscale.rl import GRPO, PPO, RLOO

LETTERS = "abcdefgh"


def verifier(prompts, responses):
    """Texts in, numbers out: the share of some letters among the words."""
    return [sum(word in LETTERS for word in r.split()) / (1 + len(r.split())) for r in responses]


FAST = {"reward": verifier, "policy_lr": 1e-2, "kl_coefficient": 0.01, "missing_eos_penalty": 0.0}


def rises(run, updates=8):
    """Whether the mean reward of the last updates is above that of the first by half its spread over responses."""
    records = tiny_rl.updates(run, updates)
    assert all(np.isfinite(list(record.values())).all() for record in records)
    first, last = (np.mean([record["proxy"] for record in part]) for part in (records[:2], records[-2:]))
    assert records[-1]["kl_nats"] > 0.05
    return last > first + 0.5 * records[0]["proxy_std"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose matrices are whole blocks of 64, for the study's tokenizer."""
    path = tmp_path_factory.mktemp("base")
    changes = {"vocab_size": 56, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    tiny_rl.language_model(scale=3.0, **changes).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("algorithm", "dtype"), [(PPO, "fp32"), (PPO, "bf16"), (PPO, "nf4"), (GRPO, "nf4"), (RLOO, "nf4")]
)
def test_a_base_in_each_precision(algorithm, dtype, folder):
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
    base = loading.load_base(folder, dtype)
    frozen = {name: parameter.clone() for name, parameter in base.named_parameters()}
    run = tiny_rl.trainer(algorithm, base=base, **FAST)
    assert rises(run)
    for name, parameter in run.networks.base.named_parameters():
        assert ".lora_" in name or torch.equal(parameter, frozen[name.replace(".base_layer", "")])


OPTIONS = {
    "bfloat16 layers": {"compute_dtype": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "two adapters": {"critic": "separate", "gradient_checkpointing": True},
    "some layers": {"lora_targets": ("q_proj", "v_proj"), "policy_lr": 2e-2},
    "bonus": {"entropy_coefficient": 0.01},
    "all weights": {"adapter": "none", "gradient_checkpointing": True, "policy_lr": 1e-2},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_ppo_with_each_option(options):
    assert rises(tiny_rl.trainer(**FAST | OPTIONS[options]))


@pytest.mark.parametrize("kind", ["GPT2", "Gemma", "Phi"])
def test_other_architectures(kind):
    changes = {"vocab_size": 56, "max_position_embeddings": 64} | ({"head_dim": 8} if kind == "Gemma" else {})
    assert rises(tiny_rl.trainer(base=tiny_rl.language_model(kind, scale=3.0, **changes), **FAST))


# --- rewards ---


def counting(tokenizer, otherwise, chosen):
    """A scorer whose head says ``chosen`` after one of the letters and ``otherwise`` after any other token.

    Unit vectors as embeddings, a block that adds nothing, and a norm that makes their length the root of the width.
    """
    size = len(tokenizer) + len(tokenizer) % 2
    shape = {"hidden_size": size, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    options = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "pad_token_id": 0, "num_labels": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**shape, **options, rms_norm_eps=0.0))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        model.score.weight.fill_(otherwise / size**0.5)
        model.score.weight[0, tokenizer.convert_tokens_to_ids(list(LETTERS))] = chosen / size**0.5
    return model


def outcome(tokenizer=None):
    """Counts the letters, in its own tokens."""
    tokenizer = tokenizer or rungs.build_tokenizer()
    return rewards.OutcomeRewardModel(counting(tokenizer, 0.0, 1.0), tokenizer, readout="sum")


def process():
    """Every token is a step; one of the letters is more likely right."""
    tokenizer = rungs.build_tokenizer()
    return rewards.ProcessRewardModel(counting(tokenizer, 1.0, 4.0), tokenizer, range(len(tokenizer)), "product")


REWARDS = {
    "verifier": lambda: verifier,
    "outcome": outcome,
    "other tokenizer": lambda: outcome(tiny_rewards.byte_tokenizer()),
    "process": process,
    "mixed": lambda: rewards.Mixed([(2.0, verifier), (0.5, outcome())]),
}


KINDS = [(PPO, kind) for kind in REWARDS] + [(GRPO, "verifier"), (GRPO, "process"), (RLOO, "outcome"), (RLOO, "mixed")]


@pytest.mark.parametrize(("algorithm", "kind"), KINDS)
def test_each_kind_of_reward(algorithm, kind):
    reward = REWARDS[kind]()
    options = {"whiten_rewards": True} if algorithm is PPO else {}
    model = getattr(reward, "model", None)
    before = tiny.weights(model) if model is not None else {}
    run = tiny_rl.trainer(algorithm, **FAST | options | {"reward": reward})
    assert rises(run)
    assert model is None or tiny.equal(tiny.weights(model), before)  # a reward model is not trained


def test_what_is_logged_is_what_the_reward_says():
    reward = tiny_rl.ByIds(lambda ids, prompts, lengths: verifier(None, tokenizer.batch_decode(ids)))
    tokenizer = rungs.build_tokenizer()
    run = tiny_rl.trainer(reward=reward, missing_eos_penalty=0.0)
    record = tiny_rl.updates(run, 1)[0]
    (sequences,) = reward.asked
    assert record["proxy"] == pytest.approx(np.mean(verifier(None, tokenizer.batch_decode(sequences.ids))), rel=1e-5)

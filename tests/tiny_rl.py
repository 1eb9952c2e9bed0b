"""Tiny language models of several architectures, and trainers on them."""

from contextlib import contextmanager

import numpy as np
import torch
import transformers

import tiny
from rlhfscale.bed import rungs
from rlhfscale.bed.demonstrations import token_ids
from rlhfscale.rl import GRPO, PPO, RLOO, GRPOConfig, PPOConfig, RLOOConfig

LETTER = token_ids()["a"]
CONFIGS = {PPO: PPOConfig, GRPO: GRPOConfig, RLOO: RLOOConfig}

SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def language_model(kind: str = "Llama", scale: float = 5.0, seed: int = 0, **changes):
    """A causal language model of a transformers architecture with random weights, matrices enlarged; biases too."""
    config = getattr(transformers, f"{kind}Config")(**SHAPE | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM".replace("TextFor", "For")
        model = getattr(transformers, name)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.mul_(scale)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
                else:  # a norm's weight
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@torch.no_grad()
def randomise(networks, seed: int = 0, std: float = 0.3):
    """Move every adapter away from zero. In place, so that merged weights must notice."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in networks.named_parameters():
        if "lora_B" in name or name.startswith("value_head"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return networks


def ragged(rows: int = 5, longest: int = 17, vocabulary: int = 40, seed: int = 0):
    """int64 [row, length] of random ids, padded on the right with 0, and bool [row, length], what is no padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    mask = torch.arange(longest) < lengths[:, None]
    return torch.randint(3, vocabulary, mask.shape, generator=generator) * mask, mask


def count_letter(ids, prompt_lengths, lengths):
    """A learnable reward: the share of one letter in the whole sequence."""
    return (ids == LETTER).sum(1) / lengths


class ByIds:
    """A function of ids, prompt lengths and lengths as a reward; keeps what it was asked."""

    def __init__(self, function=count_letter):
        self.function, self.asked = function, []

    def score(self, sequences):
        self.asked.append(sequences)
        return np.asarray(self.function(sequences.ids, sequences.prompt_lengths, sequences.lengths))


def trainer(algorithm=PPO, *, seed=0, reward=count_letter, base=None, tokenizer=None, sampler=None, **changes):
    """A small run that learns in a few updates."""
    settings = {
        "prompts_per_update": 16, "responses_per_prompt": 2, "epochs": 2, "minibatch_size": 16, "policy_lr": 5e-3,
        "kl_coefficient": 0.02, "max_new_tokens": 12, "missing_eos_penalty": 1.0, "lora_rank": 4, "lora_alpha": 8.0,
        "warmup_updates": 0,
    }  # fmt: skip
    if algorithm is PPO:
        settings["critic_lr"] = 5e-3
    reward = ByIds(reward) if getattr(reward, "__module__", None) == __name__ and callable(reward) else reward
    options = {"sampler": sampler} if sampler else {}
    return algorithm(
        tiny.model() if base is None else base,
        tokenizer or rungs.build_tokenizer(),
        reward,
        CONFIGS[algorithm](**settings | changes),
        seed=seed,
        **options,
    )


def prompts(run, update: int = 0):
    return tiny.prompts(run.config.prompts_per_update, seed=update)


def updates(run, count: int):
    """The metrics of several updates."""
    return [run.update(prompts(run, update))[0] for update in range(count)]


def gather(run, update: int = 0):
    """Evaluated roll-outs of one update, without learning from them, and the responses."""
    rollouts, completions = run.collect(prompts(run, update))
    return run.evaluate(rollouts)[0], completions


@contextmanager
def unmoved(run):
    """Within this context optimiser steps clip no gradient and move nothing, so that gradients can be looked at."""
    step, limit = run.learner.optimizer.step, run.learner.max_grad_norm
    run.learner.optimizer.step, run.learner.max_grad_norm = lambda: None, 1e9
    try:
        yield
    finally:
        run.learner.optimizer.step, run.learner.max_grad_norm = step, limit


def gradients(networks) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in networks.named_parameters() if p.grad is not None}


def step_gradients(run, rollouts):
    """One optimiser step's record and gradients on all of the roll-outs."""
    with unmoved(run):
        record = run.step(rollouts, torch.arange(len(rollouts)))
    return record, gradients(run.networks)


def relative(found, expected) -> float:
    """``|found - expected| / |expected|`` of tensors, or of dictionaries of tensors as one vector."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = (torch.cat([d[name].double().flatten() for name in expected]) for d in (found, expected))
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()

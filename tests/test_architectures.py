"""Every algorithm trains every architecture, and samples from what it trains: ids are compared by a plain forward pass.

Prompts have several lengths, so they are padded on the left when they are sampled; a sliding window is shorter than a
sequence; several ids end a response.
"""

import math

import numpy as np
import pytest
import torch

import tiny
import tiny_rl
from rlhfscale.bed import rungs
from rlhfscale.models.loading import POLICY
from rlhfscale.rl import GRPO, PPO, RLOO

ARCHITECTURES = {
    "llama": ("Llama", {}),
    "gpt2": ("GPT2", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoX", {}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "smollm3": ("SmolLM3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, sliding window": ("Mistral", {"sliding_window": 8}),
    "granite": ("Granite", {"logits_scaling": 3.0}),
    "cohere": ("Cohere", {}),
}
TOKENIZER = rungs.build_tokenizer()
IDS = {name: getattr(TOKENIZER, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
ENDS = (TOKENIZER.eos_token_id, 20, 30, 40)


def model_of(name):
    kind, changes = ARCHITECTURES[name]
    model = tiny_rl.language_model(kind, scale=3.0, vocab_size=len(TOKENIZER), **IDS, **changes)
    model.generation_config.eos_token_id = list(ENDS)
    return model.train()  # as `from_config` gives it; dropout would show


def prompts(update):
    """Of 3 to 14 tokens."""
    rng = np.random.default_rng(update)
    return [rng.integers(4, len(TOKENIZER), rng.integers(3, 15)).tolist() for _ in range(16)]


def plain_logprobs(model, prompt, response):
    """Of the response's tokens, by one forward pass over the sequence alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].float()
    found = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return found[torch.arange(len(response)), torch.tensor(response)].numpy()


def check_samples(run, asked, completions):
    """The sampler's log-probabilities are those of PEFT's forward pass; a response ends at the first of the ends."""
    with run.networks.as_peft(POLICY) as model:
        for row, completion in enumerate(completions):
            expected = plain_logprobs(model, asked[row // 2], completion.token_ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=2e-4)
            ended = [token in ENDS for token in completion.token_ids]
            assert not any(ended[:-1]) and ended[-1] == (completion.finish_reason == "stop")


@pytest.mark.parametrize("algorithm", [PPO, GRPO, RLOO])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_trained_and_sampled(name, algorithm):
    run = tiny_rl.trainer(algorithm, base=model_of(name), tokenizer=TOKENIZER)
    before = tiny.weights(run.networks)
    for update in range(2):
        metrics, _ = run.update(prompts(update))
        assert all(map(math.isfinite, metrics.values())), metrics
        assert metrics["sampler_gap_mean_nats"] < 1e-4
    assert not tiny.equal(before, tiny.weights(run.networks))
    rollouts, completions = run.collect(prompts(2))
    assert 0 < rollouts.finished.float().mean() < 1
    check_samples(run, prompts(2), completions)
    np.testing.assert_allclose(rollouts.sampler_logprobs, run.evaluate(rollouts)[0].logprobs, atol=2e-4)

"""The choice of the faster sampler for a model, from our measurements.

On one thread of a 2-core CPU our Llama decoder samples 465 tokens a second from SmolLM2-135M in bf16 (64 prompts, 8
responses each, 64 tokens), and vLLM's `LLM.generate` 370. For a model of 100k parameters vLLM samples 14k tokens a
second and transformers' generate 32k, because vLLM's work around each token takes longer than the token itself.
"""

from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rlhfscale.models import llama
from rlhfscale.samplers import vllm

TINY = 20_000_000
"""Number of parameters up to which the work around the matrix products decides the speed on a CPU."""


class Choice(NamedTuple):
    """The name of a sampler, and a sentence that says why it was chosen."""

    sampler: Literal["hf", "vllm"]
    why: str


def choose(model: PreTrainedModel | PreTrainedConfig, device: str | torch.device | None = None) -> Choice:
    """Choose the faster sampler for a model.

    Args:
        model: a transformers model, or the config of one.
        device: where responses are sampled. By default the model's own device; for a config, a GPU if there is one.
    """
    config = getattr(model, "config", model)
    if device is None:
        device = getattr(model, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cpu":
        if llama.is_written_out(config):
            return Choice("hf", f"a {config.model_type} on a CPU: our own decoder is faster there than vLLM")
        if (parameters := num_parameters(config)) <= TINY:
            return Choice("hf", f"{parameters / 1e6:.1f}M parameters on a CPU: decoding in process is faster there")
    if not vllm.available():
        return Choice("hf", "vllm would be faster but is not installed; make setup EXTRAS=vllm")
    return Choice("vllm", f"a {config.model_type} on {device.type}: vLLM is the fast one there")


def num_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of the causal language model that a config describes; nothing is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()

"""Which sampler is the fast one, by what was measured.

On one thread of a 2-core CPU, 64 prompts x 8 responses x 64 tokens of SmolLM2-135M in bf16: our Llama decoder 465
tokens in a CPU second, vLLM's own `LLM.generate` 370. With models of some million parameters vLLM's work around each
token takes longer than the token: 100k parameters, 14k tokens/s against 32k of transformers' generate.
"""

from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rlhfscale.models import llama
from rlhfscale.samplers import vllm

TINY = 20_000_000
"""Parameters up to which decoding on a CPU is bound by what surrounds the products, of which vLLM does more."""


class Choice(NamedTuple):
    """A sampler's name, and why."""

    sampler: Literal["hf", "vllm"]
    why: str


def choose(model: PreTrainedModel | PreTrainedConfig, device: str | torch.device | None = None) -> Choice:
    """The sampler to take for a model, a sentence saying why.

    Args:
        model: a transformers model, or the config of one.
        device: where it is sampled; the model's own device by default, and for a config a GPU where there is one.
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
    """Of the causal language model that a config describes; nothing is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()

"""Samplers: prompts in, Completion records out.

`hf.sample` decodes in process, `vllm.VLLM` in an engine's process, `fake.Fake` says what it was told to. `auto.choose`
names the fast one for a model; `together.Together` is one sampler for all processes of a machine. All are called alike,
see `base`.
"""

from rlhfscale.samplers.base import Completion, Completions, repeated, request_seeds

__all__ = ["Completion", "Completions", "repeated", "request_seeds"]

"""Samplers: prompts in, Completion records out."""

from rlhfscale.samplers.base import Completion, Completions, request_seeds

__all__ = ["Completion", "Completions", "request_seeds"]

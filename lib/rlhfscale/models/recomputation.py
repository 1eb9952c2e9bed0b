"""Gradient checkpointing: blocks keep only their input, and what is between is computed again in the backward pass."""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhfscale.models import lora


def of_blocks(model: PreTrainedModel, switch: lora.Switch | None = None) -> None:
    """Let each decoder block keep only its input for the backward pass, and compute the rest again there.

    transformers' own way works in training mode alone, which turns dropout on and drops the key-value cache that
    sampling needs. Here blocks are wrapped, and nothing changes where no gradient is asked for.

    Args:
        switch: of the fused layers. In the backward pass the forward pass's adapter is no longer set: it is set again.
    """
    undo(model)  # a trainer before this one may have wrapped them
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = partial(_checkpointed, module.forward, switch)


def undo(model: nn.Module) -> None:
    """Undo `of_blocks`."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            forward = vars(module).get("forward")
            if isinstance(forward, partial) and forward.func is _checkpointed:
                module.forward = forward.args[0]


def _checkpointed(forward: Callable, switch: lora.Switch | None, *inputs, **options):
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    context = partial(lora.adapter, switch, switch.adapter) if switch and switch.fused else contextlib.nullcontext

    def under_its_adapter(*inputs, **options):
        with context():
            return forward(*inputs, **options)

    return checkpoint(under_its_adapter, *inputs, use_reentrant=False, **options)

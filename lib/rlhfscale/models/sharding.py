"""A frozen base of which each process of a machine holds a share, for bases that do not fit on one GPU.

The work is done by torch's ``fully_shard`` (FSDP 2; Zhao et al. 2023): a layer's matrices are gathered before it
computes, forward or backward, and freed afterwards. Here it is told what to share: the matrices of every decoder layer,
the embedding and the output head. Adapters, heads, norms and biases stay whole and are trained as in `parallel`.

Two things stay whole because ``fully_shard`` works by module: an embedding that is also the output head, and the scales
of 4-bit weights (an eighth of a bit for each weight). The fused layers of CPUs read weights by themselves, so they are
off for a sharded base.

All processes of a machine must compute the same layers in the same order, or each waits for the other. The trainers,
the in-process sampler and the reward models see to that; what only one process calls must not compute the base. A step
of decoding gathers the whole base for one token of each response, so batches should be as large as memory allows.

    model = loading.load_base("meta-llama/Meta-Llama-3-70B", "nf4", sharded=True)    # under torchrun, in each process
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhfscale.models import parallel

QUANTISED = ("quant_state", "quant_type", "compress_statistics")
"""What PEFT and bitsandbytes read from a 4-bit weight."""


def is_asked_for() -> bool:
    """Whether this process is one of several that ``accelerate launch`` started with a configuration for FSDP."""
    return parallel.size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(model: PreTrainedModel, device: torch.device | str | None = None) -> PreTrainedModel:
    """Keep this process's share of a model's matrices, frozen, in place; the rest of the model stays whole.

    Args:
        model: a causal language model or a sequence classifier, equal on all processes, without adapters; best on the
            CPU, so that no GPU ever holds all of it.
        device: where shares and model go; by default this process's GPU, or the CPU where there is none.

    Returns:
        the model. One process alone only moves it.

    Raises:
        ValueError: the model is sharded already, has adapters, or no decoder layers are found in it.
    """
    if is_sharded(model):
        raise ValueError("model: it is sharded already")
    if hasattr(model, "peft_config"):
        raise ValueError("model: shard the base before it gets adapters")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if parallel.size() == 1:
        return model.to(device)
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise ValueError(f"model: no decoder layers were found in {type(model).__name__}")
    mesh = DeviceMesh.from_group(parallel.machine(), device.type)
    for module in _shared_modules(model):
        _shard_matrices(module, mesh, device)
    _move_the_rest(model, device)
    trunk, head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
    fully_shard(trunk, mesh=mesh, ignored_params=set(trunk.parameters()))  # the next layer is gathered meanwhile
    if isinstance(head, FSDPModule):
        head.computed_within = MethodType(lambda _, function, *inputs: function(*inputs), head)
        register_fsdp_forward_method(head, "computed_within")
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes hold parts of the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def values(parameter: nn.Parameter) -> torch.Tensor:
    """All of a parameter's values; where it is sharded, all processes must ask."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within this context a module's own weights can be read, also if they are sharded; all processes must enter it."""
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


def call(head: nn.Module, function: Callable, *inputs: Any) -> Any:
    """``function(head, *inputs)``, which applies an output head several times, in its backward pass too.

    A sharded head is gathered once for all of them; the function gets the head's product without its hooks."""
    if isinstance(head, FSDPModule):
        return head.computed_within(function, MethodType(nn.Linear.forward, head), *inputs)
    return function(head, *inputs)


def _shared_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose matrices are gathered together, the inner ones first."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return [*layers, inputs]
    return layers if head.weight is inputs.weight else [*layers, inputs, head]


def _shard_matrices(module: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    module.to(device).requires_grad_(False)
    quantised = [m for m in module.modules() if getattr(getattr(m, "weight", None), "quant_state", None) is not None]
    about = [{name: getattr(m.weight, name) for name in QUANTISED} for m in quantised]
    vectors = {parameter for parameter in module.parameters() if parameter.ndim < 2}
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=vectors)
    for each, facts in zip(quantised, about, strict=True):
        each.quant_state = facts["quant_state"]  # from here bitsandbytes takes it for a weight that was gathered
        for name, fact in facts.items():
            setattr(each.weight, name, fact)


def _move_the_rest(model: nn.Module, device: torch.device) -> None:
    """``model.to(device)`` for what is not shared: it would put new parameters in the place of the shared ones."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            # a copy: as long as one tensor lies in the file it was read from, all of the file stays mapped
            parameter.data = parameter.data.to(device, copy=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))

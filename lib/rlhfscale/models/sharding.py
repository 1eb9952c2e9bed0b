"""A frozen base of which each process of a machine holds a share, for bases that do not fit on one GPU.

The matrices of a decoder layer lie in one block of memory. Each process keeps an equal part of its bytes. Before the
layer computes, forward or backward, the parts are gathered into the block, and afterwards the block's memory is freed:
a process holds its shares, the layer that computes, and the next one, which is gathered meanwhile. Adapters, heads,
norms and biases stay whole, and are trained as in `parallel`.

Bytes are moved, whatever they mean, so fp32, bf16 and NF4 are sharded alike and to the bit. Every tensor keeps its
shape and its place in the block, so autograd and bitsandbytes find the weights where they were. torch's own
``fully_shard`` computes the same; it puts other parameters in the place of these, so what reads weights itself (fused
LoRA layers in their backward pass, log-probabilities, fingerprints) would lose 4-bit weights' quantisation state and
need further hooks, and the scales of 4-bit weights, up to a quarter of a share among eight, would stay whole.

All processes of a machine must compute the same layers in the same order, or each waits for the other. The trainers,
the in-process sampler and the reward models see to that; what only one process calls must not compute the base. A
step of decoding gathers the whole base for one token of each response, so batches should be as large as memory allows.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhfscale.models import parallel

ALIGNMENT = 256
"""Bytes to whose multiples tensors are laid out in a block, as CUDA lays out its own."""

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


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
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"model: no decoder layers were found in {type(model).__name__}")
    resident = _Resident()
    blocks = [Block(_matrices(layer.parameters()), [layer], device, resident) for layer in layers]
    for before, after in pairwise(blocks):
        before.after, after.before = after, before
    for matrix, users in _outside_of_layers(model):
        Block([matrix], users, device, resident)
    _move_the_rest(model, device)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes hold parts of the model."""
    return any(_block_of(parameter) for parameter in model.parameters())


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[None]:
    """Within this context a parameter can be read, also if it is sharded; all processes must enter it."""
    block = _block_of(parameter)
    if block:
        block.hold()
    try:
        yield
    finally:
        if block:
            block.release()


def call(parameter: nn.Parameter, function: Callable, *inputs: Any) -> Any:
    """``function(*inputs)``, which reads a parameter in its forward and its backward pass, however often."""
    block = _block_of(parameter)
    with whole(parameter):
        outputs = function(*inputs)
    return block.whole_behind(outputs) if block else outputs


class Block:
    """Frozen matrices that are gathered together.

    Args:
        matrices: parameters, the packed ones of bitsandbytes with what they are dequantised by.
        users: the modules in whose passes they are read.
        device: where the share and the gathered block are.
        resident: of the model.

    Attributes:
        share: uint8, this process's part.
        before, after: the blocks of the neighbouring layers.
    """

    before: "Block | None" = None
    after: "Block | None" = None

    def __init__(self, matrices: list[nn.Parameter], users: list[nn.Module], device: torch.device, resident):
        self.group, self.resident = parallel.machine(), resident
        self._held, self._gathering = 0, None
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        places = [place for matrix in matrices for place in _tensors(matrix, device)]
        tensors = [getattr(*place).detach() for place in places]
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        end += -end % (size * ALIGNMENT)
        filled = torch.zeros(end, dtype=torch.uint8, device=tensors[0].device)
        for start, tensor in zip(starts, tensors, strict=True):
            filled[start : start + tensor.nbytes] = tensor.flatten().view(torch.uint8)
        self.share = filled.chunk(size)[rank].to(device, copy=True)
        self._bytes = torch.empty_like(filled, device=device)
        for (owner, name), start, tensor in zip(places, starts, tensors, strict=True):
            part = self._bytes[start : start + tensor.nbytes]
            setattr(owner, name, part.view(tensor.dtype).view(tensor.shape))
        for matrix in matrices:
            matrix.requires_grad_(False)
            matrix.block = self
        self._free()
        for user in users:
            user.register_forward_pre_hook(self._before_forward)
            user.register_forward_hook(self._after_forward)

    def hold(self) -> None:
        """Fill the block, and keep it until it is released as often as it is held."""
        self.gather()
        if self._gathering:
            self._gathering.wait()
            self._gathering = None
        self._held += 1

    def release(self) -> None:
        self._held -= 1
        if not self._held:
            self._free()

    @torch.no_grad()
    def gather(self) -> None:
        """Begin to fill the block, unless it is filled."""
        storage = self._bytes.untyped_storage()
        if not storage.nbytes():
            storage.resize_(self._bytes.numel())
            self._gathering = all_gather(self._bytes, self.share, self.group, async_op=True)

    def _free(self) -> None:
        self._bytes.untyped_storage().resize_(0)

    def _before_forward(self, *_: Any) -> None:
        self.hold()
        if self.after:
            self.after.gather()

    def _after_forward(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        self.release()
        return self.whole_behind(outputs)

    def whole_behind(self, outputs: Any) -> Any:
        """The outputs. In the backward pass the block is whole from here on, until that of the next block begins."""
        return tree_map_only(torch.Tensor, lambda x: _Whole.apply(x, self) if x.requires_grad else x, outputs)

    def before_backward(self) -> None:
        self.resident.replace(self)
        if self.before:
            self.before.gather()


class _Whole(torch.autograd.Function):
    """See `Block.whole_behind`."""

    @staticmethod
    def forward(ctx, output: torch.Tensor, block: Block) -> torch.Tensor:
        ctx.block = block
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.block.before_backward()
        return grad, None


class _Resident:
    """The block whose layer is in its backward pass. Once the next one's begins, nobody reads it any more."""

    def __init__(self):
        self.block: Block | None = None

    def replace(self, block: Block) -> None:
        if self.block is block:
            return
        if self.block is None:
            Variable._execution_engine.queue_callback(self._clear)
        else:
            self.block.release()
        self.block = block
        block.hold()

    def _clear(self) -> None:
        self.block.release()
        self.block = None


def _block_of(parameter: nn.Parameter) -> Block | None:
    return getattr(parameter, "block", None)


def _matrices(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.ndim > 1]


def _tensors(matrix: nn.Parameter, device: torch.device) -> Iterator[tuple[Any, str]]:
    """Where a matrix's tensors are: owner and attribute. A packed one has its scales besides, and their scales."""
    yield matrix, "data"
    state = getattr(matrix, "quant_state", None)
    if state is not None:
        state.to(device)
    while state is not None:
        yield state, "absmax"
        state = state.state2


def _outside_of_layers(model: PreTrainedModel) -> Iterator[tuple[nn.Parameter, list[nn.Module]]]:
    """The other matrices of the decoder and its output head, each with the modules that hold it."""
    decoder, head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in (*decoder.modules(), *([head] if head is not None else [])):
        for matrix in _matrices(module.parameters(recurse=False)):
            if _block_of(matrix) is None:
                users.setdefault(matrix, []).append(module)
    yield from users.items()


def _move_the_rest(model: nn.Module, device: torch.device) -> None:
    for parameter in model.parameters():
        if _block_of(parameter) is None:
            # a copy: as long as one tensor lies in the file it was read from, all of the file stays mapped
            parameter.data = parameter.data.to(device, copy=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))

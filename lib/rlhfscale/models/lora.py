"""LoRA products with less work than PEFT's layers do, on PEFT's own modules and weights.

PEFT computes ``W x + s B (A x)`` as separate operations and lets autograd keep every intermediate. Here the frozen
weight gets no gradient, layers that read the same input (query, key and value; gate and up) share one product, and in
float32, where a sum of weights loses nothing, ``W + s B A`` is formed once for each optimiser step and applied instead.
Outside of `adapter` the layers are PEFT's, to the bit, so what is saved is a plain PEFT adapter.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rlhfscale.models import sharding

try:
    from peft.tuners.lora import Linear4bit as PeftLinear4bit
except ImportError:  # PEFT offers it only where bitsandbytes is installed
    PeftLinear4bit = None


@dataclass
class Switch:
    """What all fused layers of one model compute; set by `adapter`.

    Attributes:
        fused: whether to compute here rather than by PEFT.
        adapter: name of the adapter in use; None is the base alone.
    """

    fused: bool = False
    adapter: str | None = None


@contextlib.contextmanager
def adapter(switch: Switch, name: str | None) -> Iterator[None]:
    """Within this context the fused layers compute under that adapter, or the base alone for None."""
    before = switch.fused, switch.adapter
    switch.fused, switch.adapter = True, name
    try:
        yield
    finally:
        switch.fused, switch.adapter = before


class _Fused:
    """The forward pass that `install` puts before PEFT's own."""

    switch: Switch
    projection: "Projection"

    def forward(self, x: torch.Tensor, *args, **options) -> torch.Tensor:
        if not self.switch.fused:
            return super().forward(x, *args, **options)
        name = self.switch.adapter
        return Product.apply(x, self.projection, name, *self.projection.parameters(name))


class _Switched:
    """A PEFT layer that is not fused, with the switch's adapter in place of the one that is active for PEFT."""

    switch: Switch

    @property
    def active_adapter(self) -> str | list[str]:
        return self.switch.adapter if self.switch.fused and self.switch.adapter else self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self.switch.adapter is None if self.switch.fused else self._disable_adapters


class FusedLinear(_Fused, PeftLinear):
    """PEFT's LoRA layer over ``nn.Linear``."""


if PeftLinear4bit is not None:

    class FusedLinear4bit(_Fused, PeftLinear4bit):
        """PEFT's LoRA layer over bitsandbytes' 4-bit linear layer."""


def install(model: nn.Module) -> Switch:
    """Let every plain LoRA layer of a PEFT model (no dropout, no variant, a whole dense or 4-bit base) be fused.

    Adapted layers of another kind compute as PEFT does, under the adapter that the switch says. Returns the switch.
    """
    switch = Switch()
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is nn.Linear and _is_plain(module):
            module.__class__ = FusedLinear
        elif PeftLinear4bit is not None and type(module) is PeftLinear4bit and _is_plain(module):
            module.__class__ = FusedLinear4bit
        elif isinstance(module, BaseTunerLayer):
            module.__class__ = type(f"Switched{type(module).__name__}", (_Switched, type(module)), {})
            module.switch = switch
            continue
        else:
            continue
        module.switch = switch
        object.__setattr__(module, "projection", Projection([module]))  # no submodule: it holds the module itself
    return switch


def _is_plain(module: nn.Module) -> bool:
    dropout = any(isinstance(layer, nn.Dropout) for layer in module.lora_dropout.values())
    bias = any(module.lora_bias.values())
    shared = sharding.is_sharded(module.base_layer)
    return not (dropout or bias or shared or module.lora_variant or module.fan_in_fan_out)


def base_of(module: nn.Module) -> nn.Module:
    """The linear layer itself, below its adapters."""
    return getattr(module, "base_layer", module)


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """A linear layer's weight [out, in] in ``dtype``; a 4-bit one is dequantised."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.detach().to(dtype)


class Projection:
    """Linear layers, with or without LoRA, that read the same input, as one: ``x [..., in] -> [..., sum of outs]``.

    Args:
        modules: nn.Linear, Linear4bit or PEFT's layer over one of them; the weights below adapters frozen. Dense
            weights of several are joined in one block of memory.
        move: let each weight become a part of that block, rather than the block a copy.

    Attributes:
        trained: whether the weights themselves get gradients; then there are no adapters.
    """

    def __init__(self, modules: Sequence[nn.Module], move: bool = True):
        self.modules = list(modules)
        bases = [base_of(module) for module in self.modules]
        self.sizes = [base.out_features for base in bases]
        self.columns = [slice(sum(self.sizes[:i]), sum(self.sizes[: i + 1])) for i in range(len(bases))]
        self.block = None
        if all(type(base) is nn.Linear for base in bases):
            self.block = bases[0].weight.data if len(bases) == 1 else torch.cat([base.weight.data for base in bases])
            if move:
                for base, part in zip(bases, self.block.split(self.sizes), strict=True):
                    base.weight.data = part
        self.trained = bases[0].weight.requires_grad
        biases = [base.bias for base in bases]
        self.bias = torch.cat([b.data for b in biases]) if all(b is not None for b in biases) else None
        self._lora: dict[str, list[tuple[torch.Tensor, torch.Tensor, float, slice]]] = {}
        self._merged: dict[str | None, tuple[tuple, torch.Tensor]] = {}
        self._rounded: dict[str, tuple[tuple, list[torch.Tensor]]] = {}

    def lora(self, name: str | None) -> list[tuple[torch.Tensor, torch.Tensor, float, slice]]:
        """A [rank, in], B [out, rank], scale and output columns of each layer that has the adapter."""
        if name is None:
            return []
        if name not in self._lora:  # looked up some ten times in a layer's pass
            self._lora[name] = [
                (module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], columns)
                for module, columns in zip(self.modules, self.columns, strict=True)
                if name in getattr(module, "lora_A", {})
            ]
        return self._lora[name]

    def is_current(self) -> bool:
        """Whether the modules' weights are still those that were moved here, trained or frozen as they were."""
        if self.block is None:
            return True
        weights = [base_of(module).weight for module in self.modules]
        return all(
            weight.data_ptr() == part.data_ptr() and weight.requires_grad == self.trained
            for weight, part in zip(weights, self.block.split(self.sizes), strict=True)
        )

    def parameters(self, name: str | None) -> list[torch.Tensor]:
        """What gets gradients, in the order of `backward`'s: the weights, or A and B of each layer that has the
        adapter."""
        if self.trained:
            return [module.weight for module in self.modules]
        return [matrix for a, b, _, _ in self.lora(name) for matrix in (a, b)]

    def weight(self, name: str | None, dtype: torch.dtype) -> tuple[torch.Tensor, list]:
        """What to multiply by in ``dtype``: a weight, and the adapters that are not part of it (see `lora`).

        A float32 weight is summed with its adapters, then rounded if ``dtype`` is lower; the sum is formed again once
        an A or B has changed. A weight that is stored in fewer bits is not: summing would round the adapters away.
        """
        lora = self.lora(name)
        if self.block is None or self.block.dtype != torch.float32:
            return self._stored(dtype), lora
        now = _versions(lora), dtype
        found = self._merged.get(name)
        if found is None or found[0] != now:
            weight = self.block.clone() if lora else self.block
            for a, b, scale, columns in lora:
                weight[columns].addmm_(b.detach(), a.detach(), alpha=scale)
            self._merged[name] = found = now, weight.to(dtype)
        return found[1], []

    def rounded(self, name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """All A stacked [ranks, in], then each ``s B`` [out, rank], in ``dtype``; formed again once one has changed."""
        lora = self.lora(name)
        now = _versions(lora), dtype
        found = self._rounded.get(name)
        if found is None or found[0] != now:
            with torch.no_grad():
                stacked = torch.cat([a for a, *_ in lora]).to(dtype)
                self._rounded[name] = found = now, [stacked, *((b * scale).to(dtype) for _, b, scale, _ in lora)]
        return found[1]

    def _stored(self, dtype: torch.dtype) -> torch.Tensor:
        if self.block is not None:
            return self.block.to(dtype)
        weights = [dense_weight(base_of(module), dtype) for module in self.modules]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def forward(self, x: torch.Tensor, name: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[token, in] -> [token, out]; and what `backward` wants back if anything, the input's products with all A."""
        weight, lora = self.weight(name, x.dtype)
        out = F.linear(x, weight, self.bias if self.bias is None else self.bias.to(x.dtype))
        if not lora:
            return out, None
        stacked, *ups = self.rounded(name, x.dtype)
        low = x @ stacked.t()
        for (*_, columns), b, part in zip(lora, ups, low.split([len(a) for a, *_ in lora], 1), strict=True):
            out[:, columns].addmm_(part, b.t())
        return out, low

    def decoding(self, name: str | None, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """The product for many small inputs in a row, as long as no weight changes.

        oneDNN lays a low-precision weight out anew at every product, which for few rows costs more than the product:
        here it is laid out once. The adapters' products are done as one.
        """
        weight, lora = self.weight(name, dtype)
        bias = self.bias if self.bias is None else self.bias.to(dtype)
        multiply = _packed(weight, bias) if dtype == torch.bfloat16 else partial(F.linear, weight=weight, bias=bias)
        if not lora:
            return multiply
        stacked, *ups = self.rounded(name, dtype)
        up = stacked.new_zeros(sum(self.sizes), len(stacked))
        start = 0
        for (*_, columns), b in zip(lora, ups, strict=True):
            up[columns, start : start + b.shape[1]] = b
            start += b.shape[1]
        down, up = stacked.t().contiguous(), up.t().contiguous()
        return lambda x: multiply(x).addmm_(x @ down, up)

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None, name: str | None, need_x: bool = True
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of the input (None unless needed) and of `parameters`."""
        weight, separate = self.weight(name, x.dtype)
        grad_x = grad @ weight if need_x else None
        if self.trained:
            return grad_x, list((grad.t() @ x).split(self.sizes))
        lora = self.lora(name)
        if not lora:
            return grad_x, []
        if not separate and self._dense_is_cheaper(x.shape[1], lora):
            dense = (grad.t() @ x).float()
            grads = [g.mul_(scale) for a, b, scale, c in lora for g in (b.t() @ dense[c], dense[c] @ a.t())]
        else:
            stacked, *ups = self.rounded(name, x.dtype)
            ranks = [len(a) for a, *_ in lora]
            low = x @ stacked.t() if low is None else low
            up = torch.cat([grad[:, columns] @ b for (*_, columns), b in zip(lora, ups, strict=True)], 1)
            if need_x and separate:
                grad_x.addmm_(up, stacked)
            grads = []
            parts = zip(lora, (up.t() @ x).split(ranks), low.split(ranks, 1), strict=True)
            for (_, _, scale, columns), grad_a, part in parts:
                grads += [grad_a, (part.t() @ grad[:, columns]).t().mul(scale)]
        return grad_x, [g.to(matrix.dtype) for g, matrix in zip(grads, self.parameters(name), strict=True)]

    def _dense_is_cheaper(self, width: int, lora: list) -> bool:
        """Whether W's gradient, then projected, takes fewer operations than two low-rank products: narrow layers."""
        low_rank = sum(2 * len(a) * (width + len(b)) for a, b, _, _ in lora)
        return sum(self.sizes) * width < low_rank


def _versions(lora: list) -> tuple[int, ...]:
    return tuple(matrix._version for a, b, _, _ in lora for matrix in (a, b))


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """``x W^T`` with W in oneDNN's own layout, which torch keeps for its compiler; plain where this torch has it
    not."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    except (AttributeError, RuntimeError):
        return partial(F.linear, weight=weight, bias=bias)


def head_product(head: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """An output head's product for many small inputs in a row; see `Projection.decoding`."""
    return _packed(head.weight.detach(), head.bias) if head.weight.dtype == torch.bfloat16 else head


class Product(torch.autograd.Function):
    """A `Projection` with gradients for its input and its adapters; keeps the input only."""

    @staticmethod
    def forward(ctx, x, projection, name, *matrices):
        flat = x.reshape(-1, x.shape[-1])
        out, low = projection.forward(flat, name)
        ctx.projection, ctx.name = projection, name
        ctx.save_for_backward(x, low)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, low = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x, grads = ctx.projection.backward(grad, flat, low, ctx.name, ctx.needs_input_grad[0])
        return grad_x if grad_x is None else grad_x.view_as(x), None, None, *grads

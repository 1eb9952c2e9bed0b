"""The Llama decoder on a CPU, one autograd node for each layer, for training LoRA adapters and for decoding.

transformers' layer is some 60 operations, each with a node, a result to keep and its own pass over memory. For models
of this study's size, and for bfloat16, that is where the time goes. Here a layer's forward and backward pass are
written out with what they share: three products of one input as one (`lora.Projection`), both rotations as one, norms
and gates recomputed rather than kept. The model is transformers' own and its weights stay where they are; a test holds
values and gradients against transformers' and PEFT's.

Measured with torch 2.13: bfloat16's fused attention has a backward pass five times slower than the products it fuses,
so attention is written out too. Probabilities are kept where they are no larger than a layer's other activations.
"""

from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaModel, MistralModel, PreTrainedConfig, PreTrainedModel, Qwen2Model

from rlhfscale.lora import Projection, head_product
from rlhfscale.packing import Packed

SUPPORTED = (LlamaModel, MistralModel, Qwen2Model)
SMALL_PRODUCT = 400
"""Multiplications up to which torch.bmm runs a plain loop, up to five times slower than the library beyond it."""
CACHED_TOKENS = 2304
"""Tokens in one pass through the layers: intermediate results of more leave a core's caches."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / sqrt(mean(x^2) + eps) w`` of [token, width], and the reciprocal root, float32 [token, 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    return _normed(x, scale, weight), scale


def _normed(x, scale, weight):
    return (x * scale.to(x.dtype)).mul_(weight)


def rms_norm_backward(grad, x, scale, weight):
    """The gradient of x, of `rms_norm` with a frozen weight."""
    grad = grad * weight
    along = (grad * x).sum(-1, keepdim=True, dtype=torch.float32).mul_(scale.square()).div_(x.shape[-1])
    return grad.addcmul_(x, along.to(x.dtype), value=-1).mul_(scale.to(x.dtype))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of [..., length, size]; with -sin, its transpose.

    ``sin`` carries the minus of the first half: ``[-s, s]``.
    """
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


class Layer:
    """One decoder layer's weights and shapes, in the order they are used."""

    def __init__(self, layer: nn.Module, heads: int, kv_heads: int, size: int, dtype: torch.dtype, move: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], move)
        self.out = Projection([attention.o_proj], move)
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj], move)
        self.down = Projection([mlp.down_proj], move)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self.norms = [(norm.weight.detach().to(dtype), norm.variance_epsilon) for norm in norms]
        self.heads, self.kv_heads, self.size = heads, kv_heads, size

    def parameters(self, name: str | None) -> list[torch.Tensor]:
        return [p for projection in (self.qkv, self.out, self.gate_up, self.down) for p in projection.parameters(name)]

    def split(self, qkv: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[token, out] -> queries and keys together [head + kv head, batch, length, size]; values [kv head, ...]."""
        by_head = qkv.view(batch, -1, self.heads + 2 * self.kv_heads, self.size).permute(2, 0, 1, 3)
        return by_head[: self.heads + self.kv_heads], by_head[self.heads + self.kv_heads :]

    def grouped(self, kv: torch.Tensor) -> torch.Tensor:
        """Keys or values [kv head, batch, ...] repeated for the heads that share them, [head x batch, length, size]."""
        repeated = kv if self.heads == self.kv_heads else kv.repeat_interleave(self.heads // self.kv_heads, 0)
        return repeated.flatten(0, 1)

    def ungrouped(self, grad: torch.Tensor, batch: int) -> torch.Tensor:
        """The transpose of `grouped`: sums over the heads that share a key or value."""
        by_head = grad.view(self.heads, batch, *grad.shape[1:])
        return by_head if self.heads == self.kv_heads else by_head.unflatten(0, (self.kv_heads, -1)).sum(1)

    def probabilities(self, qk: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """[head x batch, query, key]; ``bias`` is 0 where a query sees a key, else very negative."""
        q, k = qk[: self.heads].flatten(0, 1), self.grouped(qk[self.heads :])
        return self.attend(q, k, bias)

    def attend(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = torch.baddbmm(bias.expand(len(q), q.shape[1], k.shape[1]), q, k.mT, alpha=self.size**-0.5)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)  # faster than in bfloat16, and no less exact


class LayerPass(torch.autograd.Function):
    """One layer of float [batch, length, width] with causal attention; gradients for the input and the adapter."""

    @staticmethod
    def forward(ctx, x, layer: Layer, name, cos, sin, bias, *matrices):
        batch, flat = len(x), x.reshape(-1, x.shape[-1])
        h, scale1 = rms_norm(flat, *layer.norms[0])
        qkv, low_qkv = layer.qkv.forward(h, name)
        qk, v = layer.split(qkv, batch)
        qk = rotate(qk, cos, sin)
        p = layer.probabilities(qk, bias)
        mixed = _by_token(torch.bmm(p, layer.grouped(v)), batch)
        middle, low_out = layer.out.forward(mixed, name)
        middle += flat
        h, scale2 = rms_norm(middle, *layer.norms[1])
        gate_up, low_gate_up = layer.gate_up.forward(h, name)
        gate, up = gate_up.chunk(2, 1)
        out, low_down = layer.down.forward(F.silu(gate).mul_(up), name)
        out += middle
        if any(ctx.needs_input_grad):
            ctx.layer, ctx.name, ctx.shape = layer, name, x.shape
            p = p if p.numel() <= 2 * gate_up.numel() else None
            ctx.save_for_backward(
                flat, scale1, qkv, qk, p, mixed, middle, scale2, gate_up, cos, sin, bias, low_qkv, low_out, low_gate_up,
                low_down,
            )  # fmt: skip
        return out.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        layer, name = ctx.layer, ctx.name
        (flat, scale1, qkv, qk, p, mixed, middle, scale2, gate_up, cos, sin, bias, low_qkv, low_out, low_gate_up,
         low_down) = ctx.saved_tensors  # fmt: skip
        batch, grad = ctx.shape[0], grad.reshape(flat.shape)

        gate, up = gate_up.chunk(2, 1)
        gated = F.silu(gate)
        d_act, down_grads = layer.down.backward(grad, gated * up, low_down, name)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, 1)
        torch.ops.aten.silu_backward.grad_input(d_act * up, gate, grad_input=d_gate)
        torch.mul(d_act, gated, out=d_up)
        h = _normed(middle, scale2, layer.norms[1][0])
        dh, gate_up_grads = layer.gate_up.backward(d_gate_up, h, low_gate_up, name)
        grad = grad + rms_norm_backward(dh, middle, scale2, layer.norms[1][0])

        d_mixed, out_grads = layer.out.backward(grad, mixed, low_out, name)
        p = layer.probabilities(qk, bias) if p is None else p
        dqkv = _attention_backward(layer, _by_head(d_mixed, batch, layer.heads), qkv, qk, p, cos, sin)
        h = _normed(flat, scale1, layer.norms[0][0])
        need = ctx.needs_input_grad[0]
        dh, qkv_grads = layer.qkv.backward(dqkv, h, low_qkv, name, need)
        dx = (grad + rms_norm_backward(dh, flat, scale1, layer.norms[0][0])).view(ctx.shape) if need else None
        return dx, None, None, None, None, None, *qkv_grads, *out_grads, *gate_up_grads, *down_grads


def _attention_backward(layer, grad, qkv, qk, p, cos, sin):
    """The gradient of the joint query, key and value product [token, out], from that of the mixed values."""
    batch = qk.shape[1]
    q, k = qk[: layer.heads].flatten(0, 1), layer.grouped(qk[layer.heads :])
    v = layer.grouped(layer.split(qkv, batch)[1])
    slope = torch._softmax_backward_data(torch.bmm(grad, v.mT), p, -1, p.dtype).mul_(layer.size**-0.5)
    by_head = qkv.new_empty(layer.heads + 2 * layer.kv_heads, batch, q.shape[1], layer.size)
    dq, dk, dv = by_head.split([layer.heads, layer.kv_heads, layer.kv_heads])
    torch.bmm(slope, k, out=dq.flatten(0, 1))
    dk.copy_(layer.ungrouped(torch.bmm(slope.mT, q), batch))
    dv.copy_(layer.ungrouped(torch.bmm(p.mT, grad), batch))
    dqk = by_head[: layer.heads + layer.kv_heads]
    dqk.copy_(rotate(dqk, cos, -sin))
    return by_head.permute(1, 2, 0, 3).reshape(qkv.shape)


def _by_token(by_head: torch.Tensor, batch: int) -> torch.Tensor:
    """[head x batch, length, size] -> [token, head x size]."""
    heads = by_head.view(-1, batch, *by_head.shape[1:])
    return heads.permute(1, 2, 0, 3).reshape(batch * by_head.shape[1], -1)


def _by_head(by_token: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    """The transpose of `_by_token`."""
    return by_token.view(batch, -1, heads, by_token.shape[1] // heads).permute(2, 0, 1, 3).flatten(0, 1)


class FusedLlama:
    """A Llama on a CPU whose weights are frozen but for LoRA adapters.

    Args:
        trunk: the decoder of a transformers model, below PEFT if it carries adapters.
        head: the output head, for decoding.
        dtype: what layers compute in; embedding, last norm and output head keep the model's.
        move: join weights that are used together by moving them, which spares a copy.

    Attributes:
        checkpointing: keep only each layer's input for the backward pass, and compute the rest again there.
    """

    def __init__(self, trunk: PreTrainedModel, head: nn.Module | None, dtype: torch.dtype, move: bool = True):
        self.trunk, self.head, self.dtype = trunk, head, dtype
        self.checkpointing = False
        self.config = config = trunk.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers = [
            Layer(layer, config.num_attention_heads, config.num_key_value_heads, size, dtype, move)
            for layer in self.trunk.layers
        ]

    def rotary(self, x: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin, [batch or 1, length, size]."""
        cos, sin = self.trunk.rotary_emb(x, position)
        cos, sin = cos.to(self.dtype), sin.to(self.dtype, copy=True)
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos, sin

    def hidden(self, ids: torch.Tensor, name: str | None, packed: Packed | None = None) -> torch.Tensor:
        """Last hidden states [sequence, length, width] of ids padded on the right, under an adapter or the base
        alone.

        Args:
            packed: the same sequences with equal prompts laid out once; what is computed then.
        """
        if packed is not None:
            bias = packed.bias(self.dtype)
            return packed.unpack(self._hidden(packed.ids, packed.position, bias, name))
        length = ids.shape[1]
        bias = torch.full((1, length, length), float("-inf"), dtype=self.dtype).triu(1)
        return self._hidden(ids, torch.arange(length)[None], bias, name)

    def _hidden(self, ids: torch.Tensor, position: torch.Tensor, bias: torch.Tensor, name: str | None) -> torch.Tensor:
        """See `hidden`; ``position`` [1 or sequence, length], ``bias`` [1 or sequence, query, key]."""
        matrices = [layer.parameters(name) for layer in self.layers]
        again = self.checkpointing and torch.is_grad_enabled()
        run = partial(checkpoint, LayerPass.apply, use_reentrant=False) if again else LayerPass.apply
        size, parts = max(1, CACHED_TOKENS // ids.shape[1]), []
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            x = self.trunk.embed_tokens(ids[rows]).to(self.dtype)
            cos, sin = self.rotary(self.trunk.embed_tokens.weight, position[rows] if len(position) > 1 else position)
            seen = bias if len(bias) == 1 else bias[rows].repeat(self.config.num_attention_heads, 1, 1)
            for layer, parameters in zip(self.layers, matrices, strict=True):
                x = run(x, layer, name, cos, sin, seen, *parameters)
            parts.append(self.trunk.norm(x.to(self.trunk.norm.weight.dtype)))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def decoder(self, name: str | None, capacity: int) -> "LlamaDecoder":
        return LlamaDecoder(self, name, capacity)


class LlamaDecoder:
    """Next-token logits of a `FusedLlama`, with keys and values of up to ``capacity`` positions kept.

    Its weights are laid out for decoding when it is made: no weight may change while it is in use.
    """

    def __init__(self, model: FusedLlama, name: str | None, capacity: int):
        self.model, self.capacity, self.length = model, capacity, 0
        self.products = [
            [product.decoding(name, model.dtype) for product in (layer.qkv, layer.out, layer.gate_up, layer.down)]
            for layer in model.layers
        ]
        self.head = model.head if model.dtype != model.head.weight.dtype else head_product(model.head)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def step(self, ids: torch.Tensor, mask: torch.Tensor | None, position: torch.Tensor) -> torch.Tensor:
        """Logits [request, vocabulary] after the last of ``ids`` [request, new tokens].

        Args:
            mask: int64 [request, all tokens so far], 0 for padding; None without padding.
            position: int64 [request, new tokens].
        """
        model, (batch, new) = self.model, ids.shape
        x = model.trunk.embed_tokens(ids).to(model.dtype)
        cos, sin = model.rotary(x, position)
        bias = self._bias(batch, new, mask, x.dtype)
        x = x.flatten(0, 1)
        start, self.length = self.length, self.length + new
        if not self.keys:
            # keys lie as the product with the queries reads them: for few queries that is twice as fast
            shapes = [(layer.kv_heads, batch, layer.size, self.capacity) for layer in model.layers]
            self.keys = [x.new_zeros(shape) for shape in shapes]
            self.values = [x.new_zeros(shape).mT.contiguous() for shape in shapes]
        for layer, products, keys, values in zip(model.layers, self.products, self.keys, self.values, strict=True):
            to_qkv, to_out, to_gate_up, to_down = products
            qk, v = layer.split(to_qkv(rms_norm(x, *layer.norms[0])[0]), batch)
            qk = rotate(qk, cos, sin)
            keys[..., start : self.length] = qk[layer.heads :].mT
            values[:, :, start : self.length] = v
            x = to_out(self._mixed(layer, qk[: layer.heads], keys, values, bias)).add_(x)
            gate, up = to_gate_up(rms_norm(x, *layer.norms[1])[0]).chunk(2, 1)
            x = to_down(F.silu(gate).mul_(up)).add_(x)
        last = x.view(batch, new, -1)[:, -1]
        return self.head(model.trunk.norm(last.to(model.trunk.norm.weight.dtype)))

    def _mixed(self, layer: Layer, q: torch.Tensor, keys, values, bias: torch.Tensor) -> torch.Tensor:
        """Attention of q [head, batch, new, size] over what is kept: [token, head x size].

        Queries that share keys are rows of one product, so neither keys nor values are repeated.
        """
        heads, batch, new, size = q.shape
        rows = q.unflatten(0, (layer.kv_heads, -1)).transpose(1, 2).reshape(layer.kv_heads * batch, -1, size)
        read = bias.shape[-1]
        p = layer.attend(rows, keys[..., :read].flatten(0, 1).mT, bias)
        mixed = torch.bmm(p, values[:, :, :read].flatten(0, 1)).view(layer.kv_heads, batch, -1, new, size)
        return mixed.permute(1, 3, 0, 2, 4).reshape(batch * new, heads * size)

    def _bias(self, batch: int, new: int, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """[1 or kv head x batch, queries that share keys, keys]: causal, and blind to padding (but never to
        everything)."""
        total, first = self.length + new, self.model.layers[0]
        shared = first.heads // first.kv_heads
        # a few positions too many, which nobody sees, rather than too few for torch's fast product
        read = min(self.capacity, max(total, 1 + SMALL_PRODUCT // (first.size * shared * new)))
        bias = torch.full((new, read), torch.finfo(dtype).min / 2, dtype=dtype).triu_(1 + total - new)[None]
        if mask is None:
            return bias.repeat(1, shared, 1)
        padding = torch.zeros(len(mask), read, dtype=dtype)
        padding[:, :total].masked_fill_(mask == 0, torch.finfo(dtype).min / 2)
        return (bias + padding[:, None]).repeat(first.kv_heads, shared, 1)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these requests only; one that is named several times becomes several."""
        self.keys, self.values = ([kept[:, rows] for kept in blocks] for blocks in (self.keys, self.values))


def fused(trunk: nn.Module, head: nn.Module | None = None, dtype: torch.dtype | None = None) -> FusedLlama | None:
    """The fused form of a decoder, or None where it is another architecture, not on a CPU, or not plain.

    Args:
        trunk: the decoder of a transformers model, its weights frozen but for adapters.
        head: the output head, for decoding.
        dtype: what layers compute in; the decoder's own by default.
    """
    frozen = not any(parameter.requires_grad for name, parameter in trunk.named_parameters() if ".lora_" not in name)
    return FusedLlama(trunk, head, dtype or trunk.dtype) if frozen and _is_plain(trunk) else None


def for_decoding(model: PreTrainedModel) -> FusedLlama | None:
    """The fused form of a whole model without adapters, to decode with while its weights stay as they are; or None.

    Unlike `fused` it may have weights that are trained, as nothing of the model is moved; layers that are joined are
    copied. Adapters, hooks and dropout are left to the model itself.
    """
    trunk = getattr(model, model.base_model_prefix, None)
    if not _is_plain(trunk) or model.training:
        return None
    if any(isinstance(m, BaseTunerLayer) or m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return None
    return FusedLlama(trunk, model.get_output_embeddings(), trunk.dtype, move=False)


def _is_plain(trunk: nn.Module | None) -> bool:
    """Whether a decoder computes what is written out here."""
    return (
        isinstance(trunk, SUPPORTED)
        and trunk.device.type == "cpu"
        and trunk.dtype in (torch.float32, torch.bfloat16)
        and is_written_out(trunk.config)
    )


def is_written_out(config: PreTrainedConfig) -> bool:
    """Whether the model that a config describes computes what is written out here."""
    return (
        isinstance(config, tuple(model.config_class for model in SUPPORTED))
        and config.hidden_act == "silu"
        and not getattr(config, "sliding_window", None)
    )

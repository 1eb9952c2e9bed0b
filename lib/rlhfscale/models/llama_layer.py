"""One Llama layer on a CPU as one node of autograd, forward and backward, for adapters or all weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rlhfscale.models.lora import Projection

SMALL_PRODUCT = 400
"""Multiplications up to which torch.bmm runs a plain loop, up to five times slower than the library beyond it."""

A_PART = 32
"""What the attention of one more part costs, in tokens (see `packing.cut`)."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / sqrt(mean(x^2) + eps) w`` of [token, width], and the reciprocal root, float32 [token, 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    return _normed(x, scale, weight), scale


def _normed(x, scale, weight):
    return (x * scale.to(x.dtype)).mul_(weight)


def rms_norm_backward(grad, x, scale, weight):
    """The gradient of x, of `rms_norm`."""
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
        self.trained = [norm.weight for norm in norms if norm.weight.requires_grad]
        self.projections = self.qkv, self.out, self.gate_up, self.down
        self.heads, self.kv_heads, self.size = heads, kv_heads, size

    def parameters(self, name: str | None) -> list[torch.Tensor]:
        """What gets gradients: an adapter's matrices, or all weights where they are trained."""
        return [p for projection in self.projections for p in projection.parameters(name)] + self.trained

    def norm_gradients(self, *pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """Of the two norms' weights, from the gradient of what each put out, its input and its scale."""
        if not self.trained:
            return []
        return [(grad * x * scale.to(x.dtype)).sum(0) for grad, x, scale in pairs]

    @property
    def queries_and_keys(self) -> int:
        """Columns of the joint product before the values."""
        return (self.heads + self.kv_heads) * self.size

    def by_head(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """[token, heads x size] -> a view [heads, batch, length, size]."""
        return x.view(batch, len(x) // batch, -1, self.size).permute(2, 0, 1, 3)

    def grouped(self, kv: torch.Tensor) -> torch.Tensor:
        """Keys or values [kv head, batch, ...] repeated for the heads that share them, [head x batch, length, size]."""
        repeated = kv if self.heads == self.kv_heads else kv.repeat_interleave(self.heads // self.kv_heads, 0)
        return repeated.flatten(0, 1)

    def ungrouped(self, grad: torch.Tensor, batch: int) -> torch.Tensor:
        """The transpose of `grouped`: sums over the heads that share a key or value."""
        by_head = _unflat(grad, batch)
        return by_head if self.heads == self.kv_heads else by_head.unflatten(0, (self.kv_heads, -1)).sum(1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scores = torch.baddbmm(bias.expand(len(q), q.shape[1], k.shape[1]), q, k.mT, alpha=self.size**-0.5)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)  # faster than in bfloat16, and no less exact


@dataclass(frozen=True)
class Part:
    """Sequences of one length among the tokens of a pass.

    Attributes:
        tokens: where they are, one sequence after the other.
        batch: how many.
        bias: [1 or head x batch, query, key], 0 where a query sees a key, else -inf; at least `LANES` keys.
    """

    tokens: slice
    batch: int
    bias: torch.Tensor


@dataclass(frozen=True)
class Pass:
    """Tokens that go through the layers together; only their attention knows of sequences.

    Attributes:
        ids: int64 [token].
        position: int64 [token], in its sequence.
        parts: the sequences.
        read: int64, the tokens whose last states are asked for.
        found: int64, where these are among all that `FusedLlama.hidden_at` was given.
    """

    ids: torch.Tensor
    position: torch.Tensor
    parts: list[Part]
    read: torch.Tensor
    found: torch.Tensor


class LayerPass(torch.autograd.Function):
    """One layer of float [token, width]; gradients for the input and for `Layer.parameters`.

    With ``read``, int64 [position], the output is [position, width]: that of these tokens alone.
    """

    @staticmethod
    def forward(ctx, x, layer: Layer, name, cos, sin, parts: list[Part], read, *matrices):
        h, scale1 = rms_norm(x, *layer.norms[0])
        qkv, low_qkv = layer.qkv.forward(h, name)
        qk = rotate(qkv[:, : layer.queries_and_keys].unflatten(1, (-1, layer.size)), cos, sin).flatten(1)
        mixed, chances = _attention(layer, qkv, qk, parts)
        mixed = mixed if read is None else mixed[read]
        middle, low_out = layer.out.forward(mixed, name)
        middle += x if read is None else x[read]
        h, scale2 = rms_norm(middle, *layer.norms[1])
        gate_up, low_gate_up = layer.gate_up.forward(h, name)
        gate, up = gate_up.chunk(2, 1)
        out, low_down = layer.down.forward(F.silu(gate).mul_(up), name)
        out += middle
        if any(ctx.needs_input_grad):
            ctx.layer, ctx.name, ctx.parts = layer, name, parts
            if sum(p.numel() for p in chances) > 2 * len(x) * gate_up.shape[1]:
                chances = []
            ctx.save_for_backward(
                x, scale1, qkv, qk, mixed, middle, scale2, gate_up, cos, sin, read, low_qkv, low_out, low_gate_up,
                low_down, *chances,
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx, grad):
        layer, name = ctx.layer, ctx.name
        (x, scale1, qkv, qk, mixed, middle, scale2, gate_up, cos, sin, read, low_qkv, low_out, low_gate_up, low_down,
         *chances) = ctx.saved_tensors  # fmt: skip

        gate, up = gate_up.chunk(2, 1)
        gated = F.silu(gate)
        d_act, down_grads = layer.down.backward(grad, gated * up, low_down, name)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, 1)
        torch.ops.aten.silu_backward.grad_input(d_act * up, gate, grad_input=d_gate)
        torch.mul(d_act, gated, out=d_up)
        h = _normed(middle, scale2, layer.norms[1][0])
        dh2, gate_up_grads = layer.gate_up.backward(d_gate_up, h, low_gate_up, name)
        grad = grad + rms_norm_backward(dh2, middle, scale2, layer.norms[1][0])

        d_mixed, out_grads = layer.out.backward(grad, mixed, low_out, name)
        if read is not None:
            grad, d_mixed = (g.new_zeros(len(x), g.shape[1]).index_copy_(0, read, g) for g in (grad, d_mixed))
        dqkv = _attention_backward(layer, d_mixed, qkv, qk, ctx.parts, chances)
        dqk = dqkv[:, : layer.queries_and_keys].unflatten(1, (-1, layer.size))
        dqk.copy_(rotate(dqk, cos, -sin))
        h = _normed(x, scale1, layer.norms[0][0])
        need = ctx.needs_input_grad[0]
        dh, qkv_grads = layer.qkv.backward(dqkv, h, low_qkv, name, need or bool(layer.trained))
        dx = grad + rms_norm_backward(dh, x, scale1, layer.norms[0][0]) if need else None
        norm_grads = layer.norm_gradients((dh, x, scale1), (dh2, middle, scale2))
        return dx, *[None] * 6, *qkv_grads, *out_grads, *gate_up_grads, *down_grads, *norm_grads


def _attention(layer: Layer, qkv: torch.Tensor, qk: torch.Tensor, parts: list[Part]):
    """Values mixed [token, head x size], and each part's probabilities [head x batch, query, key]."""
    mixed, chances = qkv.new_empty(len(qkv), layer.heads * layer.size), []
    for part in parts:
        q, k, v = _of_part(layer, qkv, qk, part)
        chances.append(layer.attend(q, k, part.bias))
        layer.by_head(mixed[part.tokens], part.batch).copy_(_unflat(torch.bmm(chances[-1], v), part.batch))
    return mixed, chances


def _attention_backward(layer: Layer, grad, qkv, qk, parts: list[Part], chances) -> torch.Tensor:
    """The gradient of the joint product [token, out], queries and keys still rotated, from that of the mixed values."""
    out = torch.empty_like(qkv)
    for number, part in enumerate(parts):
        q, k, v = _of_part(layer, qkv, qk, part)
        p = chances[number] if chances else layer.attend(q, k, part.bias)
        d_mixed = layer.by_head(grad[part.tokens], part.batch).flatten(0, 1)
        slope = torch._softmax_backward_data(torch.bmm(d_mixed, v.mT), p, -1, p.dtype).mul_(layer.size**-0.5)
        dq, dk, dv = layer.by_head(out[part.tokens], part.batch).split([layer.heads, layer.kv_heads, layer.kv_heads])
        length = q.shape[1]
        dq.copy_(_unflat(torch.bmm(slope, k), part.batch))
        dk.copy_(layer.ungrouped(torch.bmm(slope.mT, q)[:, :length], part.batch))
        dv.copy_(layer.ungrouped(torch.bmm(p.mT, d_mixed)[:, :length], part.batch))
    return out


def _of_part(layer: Layer, qkv, qk, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, each [head x batch, length, size]; keys and values to at least `LANES`, nobody sees
    those."""
    rotated = layer.by_head(qk[part.tokens], part.batch)
    values = layer.by_head(qkv[part.tokens, layer.queries_and_keys :], part.batch)
    q, k, v = rotated[: layer.heads].flatten(0, 1), layer.grouped(rotated[layer.heads :]), layer.grouped(values)
    beyond = part.bias.shape[2] - q.shape[1]
    return (q, F.pad(k, (0, 0, 0, beyond)), F.pad(v, (0, 0, 0, beyond))) if beyond else (q, k, v)


def _unflat(by_head: torch.Tensor, batch: int) -> torch.Tensor:
    """[head x batch, length, size] -> [head, batch, length, size]."""
    return by_head.view(-1, batch, *by_head.shape[1:])

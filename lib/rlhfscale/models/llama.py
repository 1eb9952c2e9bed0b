"""The Llama decoder on a CPU, one autograd node for each layer: for training LoRA adapters or all weights, for scores,
and for decoding.

transformers' layer is some 60 operations, each with a node, a result to keep and its own pass over memory. For models
of this study's size, and for bfloat16, that is where the time goes. Here a layer's forward and backward pass are
written out with what they share: three products of one input as one (`lora.Projection`), both rotations as one, norms
and gates recomputed rather than kept. Sequences are cut into parts of similar length, equal prompts are computed once,
and the last layer after its attention only where somebody reads it. The model is transformers' own and its weights stay
where they are; a test holds values and gradients against transformers' and PEFT's.

Measured with torch 2.13: bfloat16's fused attention has a backward pass five times slower than the products it fuses,
so attention is written out too. Probabilities are kept where they are no larger than a layer's other activations.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaModel, MistralModel, PreTrainedConfig, PreTrainedModel, Qwen2Model

from rlhfscale.models import packing, sharding
from rlhfscale.models.lora import Projection, head_product

SUPPORTED = (LlamaModel, MistralModel, Qwen2Model)
SMALL_PRODUCT = 400
"""Multiplications up to which torch.bmm runs a plain loop, up to five times slower than the library beyond it."""
CACHED_TOKENS = 2304
"""Tokens in one pass through the layers: intermediate results of more leave a core's caches."""
A_PART = 32
"""What the attention of one more part costs, in tokens (see `packing.cut`)."""
LANES = 16
"""Keys below which torch.softmax runs a plain loop, up to ten times slower than for this many."""


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


class FusedLlama:
    """A Llama on a CPU whose weights are all trained, or frozen but for LoRA adapters.

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

    def hidden_at(
        self,
        ids: torch.Tensor,
        where: torch.Tensor,
        name: str | None,
        lengths: torch.Tensor,
        prompt_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states [position, width] at chosen tokens, sequence by sequence, under an adapter or, with None,
        by the weights alone.

        Args:
            ids: int64 [sequence, length], padded on the right.
            where: bool [sequence, length], tokens within the sequences.
            lengths: int64 [sequence].
            prompt_lengths: int64 [sequence]; with it, equal prompts are computed once where that saves much.
        """
        packed = None if prompt_lengths is None else packing.pack(ids, prompt_lengths, lengths)
        if packed is None:
            wanted = torch.arange(ids.numel()).view(ids.shape)[where]
        else:
            ids, lengths, wanted = packed.ids, packed.widths, packed.source[where]
        read = torch.zeros(ids.numel(), dtype=torch.bool)
        read[wanted] = True
        passes = list(self._passes(ids, lengths, read.view(ids.shape), packed))
        matrices = [layer.parameters(name) for layer in self.layers]
        states = torch.cat([self._states(each, name, matrices) for each in passes])
        place = torch.empty(ids.numel(), dtype=torch.int64)
        place[torch.cat([each.found for each in passes])] = torch.arange(len(states))
        return states[place[wanted]]

    def _passes(self, ids, lengths, read, packed) -> Iterator[Pass]:
        """Rows of ids, cut into parts of similar length, and as many parts together as stay in a core's caches."""
        number = torch.arange(ids.numel()).view(ids.shape)
        parts = packing.cut(lengths.numpy(), CACHED_TOKENS, A_PART)
        widths = [int(lengths[part].max()) for part in parts]
        for some in _together([len(part) * width for part, width in zip(parts, widths, strict=True)]):
            tokens, position, made, start = [], [], [], 0
            for rows, width in zip(map(torch.from_numpy, parts[some]), widths[some], strict=True):
                tokens.append(number[rows, :width].flatten())
                where = slice(start, start := start + len(tokens[-1]))
                made.append(Part(where, len(rows), self._bias(rows, width, packed)))
                position.append(torch.arange(width).repeat(len(rows)))
            tokens = torch.cat(tokens)
            position = torch.cat(position) if packed is None else packed.position.flatten()[tokens]
            chosen = read.flatten()[tokens].nonzero()[:, 0]
            yield Pass(ids.flatten()[tokens], position, made, chosen, tokens[chosen])

    def _bias(self, rows: torch.Tensor, width: int, packed: packing.Packed | None) -> torch.Tensor:
        """See `Part`."""
        if packed is None:
            bias = torch.full((1, width, width), float("-inf"), dtype=self.dtype).triu(1)
        else:
            bias = packing.bias(packed.segment[rows, :width], self.dtype)
            bias = bias.repeat(self.config.num_attention_heads, 1, 1)
        return F.pad(bias, (0, LANES - width), value=float("-inf")) if width < LANES else bias

    def _states(self, each: Pass, name: str | None, matrices: list[list[torch.Tensor]]) -> torch.Tensor:
        """Last hidden states [position, width] of the tokens of a pass that are asked for."""
        run = LayerPass.apply
        if self.checkpointing and torch.is_grad_enabled():
            run = partial(checkpoint, LayerPass.apply, use_reentrant=False)
        x = self.trunk.embed_tokens(each.ids).to(self.dtype)
        cos, sin = (table[0, :, None] for table in self.rotary(self.trunk.embed_tokens.weight, each.position[None]))
        for layer, parameters in zip(self.layers, matrices, strict=True):
            read = each.read if layer is self.layers[-1] else None
            x = run(x, layer, name, cos, sin, each.parts, read, *parameters)
        return self.trunk.norm(x.to(self.trunk.norm.weight.dtype))

    def hidden(self, ids: torch.Tensor, name: str | None) -> torch.Tensor:
        """Last hidden states [sequence, length, width] of every token, padding included; see `hidden_at`."""
        everywhere, lengths = torch.ones(ids.shape, dtype=torch.bool), torch.full((len(ids),), ids.shape[1])
        return self.hidden_at(ids, everywhere, name, lengths).view(*ids.shape, -1)

    def is_current(self) -> bool:
        """Whether the decoder still holds the weights that this was made of, trained or frozen as they were."""
        return all(projection.is_current() for layer in self.layers for projection in layer.projections)

    def decoder(self, name: str | None, capacity: int) -> "LlamaDecoder":
        return LlamaDecoder(self, name, capacity)


def _together(sizes: list[int]) -> Iterator[slice]:
    """Runs of parts of so many tokens that hold at most `CACHED_TOKENS` in all, or one part."""
    start, total = 0, 0
    for end, size in enumerate(sizes):
        if total and total + size > CACHED_TOKENS:
            yield slice(start, end)
            start, total = end, 0
        total += size
    yield slice(start, len(sizes))


class LlamaDecoder:
    """Next-token logits of a `FusedLlama`, with keys and values of up to ``capacity`` positions kept.

    Its weights are laid out for decoding when it is made: no weight may change while it is in use.
    """

    def __init__(self, model: FusedLlama, name: str | None, capacity: int):
        self.model, self.capacity, self.length = model, capacity + -capacity % LANES, 0
        self.products = [
            [projection.decoding(name, model.dtype) for projection in layer.projections] for layer in model.layers
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
            by_head = layer.by_head(to_qkv(rms_norm(x, *layer.norms[0])[0]), batch)
            qk, v = by_head.split([layer.heads + layer.kv_heads, layer.kv_heads])
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
        read = max(total, 1 + SMALL_PRODUCT // (first.size * shared * new))
        read = min(self.capacity, read + -read % LANES)
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
    """The fused form of a decoder, or None where it is another architecture, not on a CPU, not plain, or sharded.

    Args:
        trunk: the decoder of a transformers model, its weights frozen but for adapters, or all of them trained.
        head: the output head, for decoding.
        dtype: what layers compute in; the decoder's own by default.
    """
    if not _is_plain(trunk):
        return None
    names, weights = zip(*trunk.named_parameters(), strict=True)
    base = [weight for name, weight in zip(names, weights, strict=True) if ".lora_" not in name]
    dtype = dtype or trunk.dtype
    if any(weight.requires_grad for weight in base):
        plain = len(base) == len(weights) and not any(name.endswith("bias") for name in names) and dtype == trunk.dtype
        if not plain or not all(weight.requires_grad for weight in base):
            return None
    return FusedLlama(trunk, head, dtype)


_FORMS: WeakKeyDictionary[nn.Module, FusedLlama | None] = WeakKeyDictionary()


def form_of(model: PreTrainedModel | PeftModel) -> FusedLlama | None:
    """The fused form of a whole model's decoder, made when it is first asked for, or None (see `fused`)."""
    form = _FORMS.get(model)
    if model not in _FORMS or (form and not form.is_current()):
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        form = _FORMS[model] = fused(getattr(plain, plain.base_model_prefix, None))
    return form


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
        and not sharding.is_sharded(trunk)
    )


def is_written_out(config: PreTrainedConfig) -> bool:
    """Whether the model that a config describes computes what is written out here."""
    return (
        isinstance(config, tuple(model.config_class for model in SUPPORTED))
        and config.hidden_act == "silu"
        and not config.attention_dropout
        and not getattr(config, "sliding_window", None)
    )

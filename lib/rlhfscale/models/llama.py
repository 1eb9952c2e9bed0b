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
from rlhfscale.models.llama_layer import A_PART, SMALL_PRODUCT, Layer, LayerPass, Part, Pass, rms_norm, rotate
from rlhfscale.models.lora import head_product

SUPPORTED = (LlamaModel, MistralModel, Qwen2Model)
CACHED_TOKENS = 2304
"""Tokens in one pass through the layers: intermediate results of more leave a core's caches."""
LANES = 16
"""Keys below which torch.softmax runs a plain loop, up to ten times slower than for this many."""


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

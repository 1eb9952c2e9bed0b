"""Floating-point operations and bytes of passes through a decoder, by formula.

Operations are counted as torch's FlopCounterMode does: a multiplication and an addition are two, attention as if dense
(Kaplan et al. 2020, table 1, with the pieces that it leaves out). Bytes are those of the tensors that live at the same
time (Korthikanti et al. 2022, section 4, does the sum for another layer). Tests hold both against torch's own counts on
small models, and `tests/planned_against_measured.py` against whole stages.

A decoder is computed in one of two ways. ``fused``, a Llama on a CPU (`models.llama`): equal prompts once, the last
layer after its attention only where it is read, one node of autograd a layer. ``plain``, on a GPU: transformers' layers
with `models.lora`'s products. No torch here.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from rlhfscale.planning.network import Kernels, Network

Head = Literal["vocabulary", "scalar"]

CACHED_TOKENS = 2304
"""Tokens that go through a fused decoder together, see `llama.CACHED_TOKENS`."""
A_PART = 32
"""See `llama.A_PART`."""
LEAST_KEYS = 16
"""See `llama.LANES`."""
WIDEST_PACK = 512
"""See `packing.WIDEST`."""
LOGITS = 2**22
"""Logits held at a time where a frozen head is read, see `rl.logprobs.CHUNK`."""


@dataclass(frozen=True)
class Rows:
    """Sequences that are computed.

    Attributes:
        count: how many.
        prompt, response: tokens of each, on average.
        group: how many of them share a prompt.
        read: where the last states are used: at every token, at those that predict the response, or at the last.
        longest: tokens of the longest, prompt and response; for memory.
        spread: of the lengths of those that are computed together, from the shortest to the longest.
        together: how many these are; 0 for all.
    """

    count: float
    prompt: float
    response: float
    group: float = 1.0
    read: Literal["all", "response", "last"] = "response"
    longest: float = 0.0
    spread: float = 0.0
    together: float = 0.0

    @property
    def length(self) -> float:
        return self.prompt + self.response

    @property
    def num_read(self) -> float:
        """States that are read, each as often as it is."""
        return self.count * {"all": self.length, "response": self.response, "last": 1.0}[self.read]

    def num_states(self, kernels: Kernels) -> float:
        """States that are read, each once: responses that share a prompt have their first token after the same one."""
        if self.read != "response" or kernels == "plain" or self.group == 1:
            return self.num_read
        return self.packed(kernels).count + self.count * (self.response - 1)

    def packed(self, kernels: Kernels) -> "Rows":
        """Responses to one prompt as a sequence of their own where that is how they are computed.

        The result's ``response`` holds those of a whole pack.
        """
        if kernels == "plain" or self.group == 1:
            return replace(self, group=1.0)
        room = max(1.0, (WIDEST_PACK - self.prompt) // max(1.0, self.response))
        group = min(self.group, room)
        return replace(self, count=self.count / group, response=group * self.response, group=1.0)

    def tokens(self, kernels: Kernels) -> float:
        """Of all sequences, padding included.

        Fused layers cut n sequences into k parts of similar length, each of which costs `A_PART` tokens. Where lengths
        are even over a spread s, the padding is n s / 2k, and least with the parts' cost where it equals that.
        """
        packed = self.packed(kernels)
        padding = 0.0
        if kernels == "fused" and packed.count:
            together = packed.count * (self.together / self.count if self.together else 1.0)
            padding = packed.count / together * (A_PART * together * self.spread / 2) ** 0.5
        return packed.count * packed.length + padding

    def keys(self, kernels: Kernels) -> float:
        """Keys that a query's product goes over."""
        length = self.packed(kernels).length
        return max(length, LEAST_KEYS) if kernels == "fused" else length

    def pairs(self, kernels: Kernels) -> float:
        """Queries times keys."""
        return self.tokens(kernels) * self.keys(kernels)

    def share(self, factor: float) -> "Rows":
        return replace(self, count=factor * self.count)


@dataclass(frozen=True)
class Pass:
    """Rows read by a network, and learnt from with ``gradients``.

    Attributes:
        adapter: whether an adapter is on; the network's weights are read as they are without.
        head: what is read off the last states: a word's probability, a number, or nothing.
        times: how often.
    """

    network: Network
    rows: Rows
    adapter: bool = False
    head: Head | None = None
    gradients: bool = False
    times: float = 1.0

    def forward(self, kernels: Kernels) -> float:
        """FLOPs of one forward pass."""
        shape, rows = self.network.shape, self.rows
        tokens, pairs, read = rows.tokens(kernels), rows.pairs(kernels), rows.num_read
        applied = self.adapter and not self.network.merges
        adapters = self._adapters(kernels) if applied else 0.0
        attention = 4.0 * shape.layers * shape.heads * shape.head_width * pairs
        return 2.0 * shape.num_linear * tokens - self._unread(kernels) + adapters + attention + self._head(read)

    def backward(self, kernels: Kernels) -> float:
        """FLOPs of one backward pass."""
        network, rows = self.network, self.rows
        shape, tokens = network.shape, rows.tokens(kernels)
        attention = 2 if kernels == "fused" and self.keeps_chances else 2.5  # a fused kernel forms the scores again
        attention *= 4.0 * shape.layers * shape.heads * shape.head_width * rows.pairs(kernels)
        linear = 2.0 * shape.num_linear * tokens - self._unread(kernels)
        if network.whole:
            head = 2 * self._head(rows.num_read) if self.head == "vocabulary" else self._head(rows.num_read)
            return 2 * linear + attention + head
        # the first layer's queries, keys and values: their input is an embedding, which learns nothing
        first = 2.0 * sum(a * b for a, b in shape.linear_sizes[:3]) * tokens
        head = self._head(rows.num_read) if self.head == "vocabulary" else 0.0
        return linear - first + attention + head + 2 * self._adapters(kernels)

    def flops(self, kernels: Kernels, checkpointing: bool = False) -> float:
        total = self.forward(kernels)
        if self.gradients:
            total += self.backward(kernels) + (self.forward(kernels) if checkpointing else 0.0)
        return self.times * total

    @property
    def keeps_chances(self) -> bool:
        """Whether fused layers keep attention's probabilities (see `llama.LayerPass`)."""
        shape = self.network.shape
        return shape.heads * self.rows.keys("fused") <= 4 * shape.feed_forward

    def _adapters(self, kernels: Kernels) -> float:
        """FLOPs of an adapter's products with all tokens."""
        shape, rank = self.network.shape, self.network.rank
        behind = rank * sum(a + b for a, b in shape.linear_sizes[3:])
        total = shape.adapter_params(rank) * self.rows.tokens(kernels)
        return 2.0 * (total - behind * self._num_unread(kernels))

    def _unread(self, kernels: Kernels) -> float:
        """FLOPs that fused layers leave out: of the last layer, at tokens that nobody reads."""
        behind = sum(a * b for a, b in self.network.shape.linear_sizes[3:])
        return 2.0 * behind * self._num_unread(kernels)

    def _num_unread(self, kernels: Kernels) -> float:
        rows = self.rows
        return 0.0 if kernels == "plain" else max(0.0, rows.tokens(kernels) - rows.num_states(kernels))

    def _head(self, read: float) -> float:
        outputs = {"vocabulary": self.network.shape.vocab, "scalar": 1, None: 0}[self.head]
        return 2.0 * outputs * self.network.shape.width * read

    def kept_bytes(self, kernels: Kernels, tokens: float, checkpointing: bool) -> float:
        """What autograd keeps for the backward pass of so many tokens."""
        shape, e = self.network.shape, self.network.element
        read = min(tokens, tokens * self.rows.num_read / max(1.0, self.rows.tokens(kernels)))
        final = (4 * e + 8) * shape.width * read  # norm's input in float32, its states, and where they are put in order
        if checkpointing:
            one = self._layer_bytes(kernels, tokens, tokens)
            return e * shape.width * tokens * shape.layers + one + final
        if kernels == "plain":
            return shape.layers * self._layer_bytes(kernels, tokens, tokens) + final
        last = self._layer_bytes(kernels, tokens, read)
        return (shape.layers - 1) * self._layer_bytes(kernels, tokens, tokens) + last + final

    def _layer_bytes(self, kernels: Kernels, tokens: float, read: float) -> float:
        """Kept of one layer. The terms name what `LayerPass` saves, or what transformers' operations save."""
        shape, e = self.network.shape, self.network.element
        query, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        rank = 0 if self.network.whole or self.network.merges else self.network.rank
        if kernels == "plain":
            norms = 2 * (4 + e) * shape.width  # float32 input of the norm, and what it gives to the products
            attention = e * (2 * query + 2 * kv + query)  # q, k, v, mixed values, and those in the products' order
            gates = 4 * e * shape.feed_forward  # gate, silu(gate), up and their product
            return tokens * (norms + attention + gates + 7 * e * rank)
        chances = shape.heads * self.rows.keys(kernels) if self.keeps_chances else 0.0
        before = shape.width + (query + 2 * kv) + (query + kv) + chances + 3 * rank  # x, qkv, rotated qk
        after = query + shape.width + 2 * shape.feed_forward + 4 * rank  # mixed values, middle, gate and up
        return tokens * (e * before + 4) + read * (e * after + 4)

    def passing_bytes(self, kernels: Kernels, tokens: float) -> float:
        """Intermediate results that are gone when the pass is over; with gradients, those of the backward pass."""
        shape, e = self.network.shape, self.network.element
        query, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        together = min(tokens, CACHED_TOKENS) if kernels == "fused" else tokens
        keys = self.rows.keys(kernels)
        layer = 4 * shape.width + 2 * (query + 2 * kv) + 3 * shape.feed_forward
        if self.gradients:
            layer += 4 * shape.width + 2 * query + 3 * shape.feed_forward
        if kernels == "fused":  # scores in what is computed in and in float32, and probabilities
            layer += (2 + 4 / e) * shape.heads * keys
        read = together * self.rows.num_read / max(1.0, self.rows.tokens(kernels))
        logits = min(LOGITS, shape.vocab * read) * (8 + 2 * e) if self.head == "vocabulary" else 0.0
        weight = 0.0
        if self.network.stored == "nf4":  # one projection's weights in bfloat16
            weight = 2.0 * max(e * a * b for a, b in shape.linear_sizes) * (2 if kernels == "fused" else 1) / e
        return max(e * layer * together + weight, logits)


@dataclass(frozen=True)
class Decode:
    """Responses sampled token by token with a cache of keys and values.

    Attributes:
        rows: prompts and responses; ``group`` responses to a prompt, which is read once.
        batch: requests decoded together at most, by one process.
        idle: steps computed for each token that is kept: requests that have ended stay until half have.
        longest: tokens of the longest prompt and response.
    """

    network: Network
    rows: Rows
    batch: float
    adapter: bool = True
    idle: float = 1.0
    times: float = 1.0

    def flops(self, kernels: Kernels, checkpointing: bool = False) -> float:
        shape, rows = self.network.shape, self.rows
        prompts = rows.count / rows.group * rows.prompt
        steps = rows.count * max(0.0, rows.response - 1) * self.idle
        adapter = self._adapter(kernels) if self.adapter and not self.network.merges else 0.0
        width = 4.0 * shape.layers * shape.heads * shape.head_width
        keys = [rows.prompt, rows.prompt + rows.response / 2]
        if kernels == "fused":
            keys = [LEAST_KEYS * ceil(number / LEAST_KEYS) for number in keys]
        attention = width * (prompts * keys[0] + steps * keys[1])
        head = 2.0 * shape.num_head * (rows.count / rows.group + steps)
        return self.times * ((2.0 * shape.num_linear + adapter) * (prompts + steps) + attention + head)

    def _adapter(self, kernels: Kernels) -> float:
        """FLOPs of an adapter's products with one token. Fused layers do those of one input as one, zeros included."""
        shape, rank = self.network.shape, self.network.rank
        if kernels == "plain":
            return 2.0 * shape.adapter_params(rank)
        return 2.0 * shape.layers * sum(len(b) * rank * (a + sum(b)) for a, b in shape.joined_sizes)

    def together(self, gpus: int) -> float:
        """Requests that each of so many processes decodes together."""
        return max(1.0, min(self.batch, self.rows.count / gpus))

    def steps(self, gpus: int) -> float:
        """Steps of decoding after prompts are read, one batch after the other."""
        batches = ceil(self.rows.count / gpus / self.together(gpus))
        return self.times * batches * max(1.0, self.rows.response - 1) * self.idle

    def cache_bytes(self, batch: float) -> float:
        """Keys and values of a batch."""
        shape = self.network.shape
        capacity = self.rows.longest or self.rows.length
        capacity += -capacity % LEAST_KEYS
        position = 2 * shape.layers * shape.kv_heads * shape.head_width * self.network.element
        return batch * capacity * position

    def passing_bytes(self, kernels: Kernels, batch: float) -> float:
        """Weights laid out for decoding, prompts on their way through the layers, and logits."""
        shape, e = self.network.shape, self.network.element
        packed = 0.0
        if kernels == "fused" and self.network.compute == "bf16":
            packed = 2.0 * (shape.num_linear + shape.num_head)
        prompts = batch / self.rows.group * self.rows.prompt
        query, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        layer = e * (4 * shape.width + 3 * (query + kv) + 4 * shape.feed_forward)
        layer += (e + 4) * shape.heads * self.rows.prompt
        logits = batch * shape.vocab * (e + (e if kernels == "fused" else 8))
        return packed + max(prompts * layer, logits)

"""The shape of a Llama-like decoder: what its parameters, memory and operations follow from. No torch."""

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    """A decoder of the Llama family (Llama, SmolLM2, Qwen2): gated feed-forward layers, grouped-query attention.

    Attributes:
        layers: decoder layers.
        width: hidden size.
        feed_forward: inner width of the gated feed-forward layer.
        heads, kv_heads: query heads, and the key and value heads that they share.
        head_width: size of one head.
        vocab: rows of the token embedding.
        tied: whether the output head is the embedding.
        attention_bias: whether queries, keys and values have biases (Qwen2).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_width: int
    vocab: int
    tied: bool
    attention_bias: bool = False

    @property
    def linear_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the seven linear layers of one decoder layer: q, k, v, o, gate, up, down."""
        query, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        width, inner = self.width, self.feed_forward
        return (
            *((width, query), (width, kv), (width, kv), (query, width)),
            *((width, inner), (width, inner), (inner, width)),
        )

    @property
    def joined_sizes(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(inputs, outputs of each) of layers that read the same input: q, k and v; o; gate and up; down."""
        sizes = self.linear_sizes
        parts = (sizes[:3], sizes[3:4], sizes[4:6], sizes[6:])
        return tuple((part[0][0], tuple(outputs for _, outputs in part)) for part in parts)

    @property
    def num_linear(self) -> int:
        """Weights of all linear layers of the decoder, the output head apart."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_sizes)

    @property
    def num_head(self) -> int:
        """Weights of the output head, tied or not; also of the embedding."""
        return self.vocab * self.width

    @property
    def num_params(self) -> int:
        """All parameters, tied embeddings counted once."""
        biases = self.layers * (self.heads + 2 * self.kv_heads) * self.head_width if self.attention_bias else 0
        norms = (2 * self.layers + 1) * self.width
        return self.num_linear + biases + norms + (1 if self.tied else 2) * self.num_head

    def adapter_params(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer of the decoder."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linear_sizes)

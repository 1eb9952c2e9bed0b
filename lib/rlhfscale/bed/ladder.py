"""The ladder of model sizes: Llama-architecture rungs trained from scratch in the study.

Counts come from the shapes, so that nothing here imports torch; a test compares them with the built models.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

from rlhfscale.bed import tasks
from rlhfscale.models.shapes import Shape

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
CONTEXT = 64
"""Longest sequence of the from-scratch rungs, in tokens."""


def vocab_size() -> int:
    return len(SPECIAL_TOKENS) + len(tasks.vocabulary())


class Rung(BaseModel):
    """One size of the ladder: a Llama with tied embeddings.

    Attributes:
        name: the rung's name, roughly its number of non-embedding parameters.
        width: hidden size, a multiple of ``head_width``.
        layers: number of decoder layers.
        head_width: size of one attention head.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    width: int
    layers: int
    head_width: int = 16

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def feed_forward(self) -> int:
        """Width of the gated feed-forward layer: 8/3 of the width, in multiples of 8, as in Llama."""
        return 8 * round(self.width / 3)

    @property
    def num_params(self) -> int:
        """Parameters without the (tied) token embedding: the N of scaling laws (Kaplan et al. 2020)."""
        per_layer = 4 * self.width**2 + 3 * self.width * self.feed_forward + 2 * self.width
        return self.layers * per_layer + self.width

    @property
    def num_params_with_embeddings(self) -> int:
        return self.num_params + vocab_size() * self.width

    @property
    def shape(self) -> Shape:
        """The rung's architecture, as the planner and the published models describe theirs."""
        return Shape(
            layers=self.layers,
            width=self.width,
            feed_forward=self.feed_forward,
            heads=self.heads,
            kv_heads=self.heads,
            head_width=self.head_width,
            vocab=vocab_size(),
            tied=True,
        )

    def train_flops(self, num_tokens: float, sequence_length: float) -> float:
        """FLOPs of training on ``num_tokens`` in sequences of ``sequence_length`` tokens.

        6 for each parameter and token, the tied output head counted once, and 12 for each layer, token, position and
        unit of width for attention's two products (Kaplan et al. 2020, table 1), as a dense kernel computes them.
        """
        attention = 12.0 * self.layers * sequence_length * self.width
        return (6.0 * self.num_params_with_embeddings + attention) * num_tokens

    def seconds(self, train_tokens: float = 0.0, forward_tokens: float = 0.0) -> float:
        """Rough seconds on one CPU thread, for plans only: a curve through measured rates."""
        train_rate = 1.8e5 / (1.0 + self.num_params / 4.0e4)
        return train_tokens / train_rate + forward_tokens / (3.0 * train_rate)

    def llama(self) -> dict[str, Any]:
        """Keyword arguments of transformers.LlamaConfig."""
        return {
            "vocab_size": vocab_size(),
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": True,
            "pad_token_id": PAD_ID,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
        }


RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung(name="14k", width=24, layers=2, head_width=8),
        Rung(name="25k", width=32, layers=2),
        Rung(name="55k", width=48, layers=2),
        Rung(name="150k", width=64, layers=3),
        Rung(name="330k", width=96, layers=3),
        Rung(name="980k", width=128, layers=5),
    )
}
"""The laptop tier's ladder, smallest first."""


def rung(name: str) -> Rung:
    """The rung of that name. Raises ValueError that lists the names."""
    if name not in RUNGS:
        raise ValueError(f"rung {name!r} is not on the ladder; allowed: {', '.join(RUNGS)}")
    return RUNGS[name]

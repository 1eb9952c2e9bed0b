"""A network in memory: bytes of its weights, adapters and optimiser, and the optimiser's operations. No torch here."""

from dataclasses import dataclass
from typing import Literal

from rlhfscale.models.shapes import Shape

Precision = Literal["fp32", "bf16", "nf4"]

Kernels = Literal["fused", "plain"]

SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
"""Of a weight in NF4: blocks of 64 with a scale of 8 bits, and of these blocks of 256 with one in float32 (Dettmers et
al. 2023, section 3)."""

BYTES = {"fp32": 4.0, "bf16": 2.0, "nf4": 0.5 + SCALE_BYTES}
"""Of a weight."""

ADAM_BYTES = 12.0
"""Gradient and two moments of a float32 parameter."""

MUON_BYTES = 8.0
"""Gradient and momentum of a float32 parameter."""

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Network:
    """A decoder in memory, with what it carries.

    Attributes:
        shape: of the decoder.
        stored: precision of the linear layers; embeddings and norms are in bfloat16 where that is nf4.
        compute: what the layers compute in.
        rank: of its adapters.
        trained, frozen: adapters that are trained, and that are only read.
        whole: whether all weights are trained, matrices by Muon and the rest by AdamW.
        reads_base: whether the base is also read by itself, as a reference.
    """

    shape: Shape
    stored: Precision
    compute: Literal["fp32", "bf16"]
    rank: int = 0
    trained: int = 0
    frozen: int = 0
    whole: bool = False
    reads_base: bool = False

    @property
    def merges(self) -> bool:
        """Whether layers form a sum of weight and adapter for each adapter (see `lora.Projection.weight`)."""
        return self.stored == "fp32"

    @property
    def element(self) -> float:
        """Bytes of an activation."""
        return BYTES[self.compute]

    @property
    def base_bytes(self) -> float:
        """The weights as stored."""
        shape = self.shape
        return BYTES[self.stored] * shape.num_linear + (4.0 if self.stored == "fp32" else 2.0) * (
            shape.num_params - shape.num_linear
        )

    def shared_bytes(self, shards: int) -> float:
        """What each of ``shards`` processes holds of the base: a part of its weights, and all scales of 4-bit ones."""
        scales = SCALE_BYTES * self.shape.num_linear if self.stored == "nf4" else 0.0
        return scales + (self.base_bytes - scales) / shards

    @property
    def adapter_bytes(self) -> float:
        """Adapters, in float32 whatever the base is."""
        return 4.0 * (self.trained + self.frozen) * self.shape.adapter_params(self.rank)

    @property
    def learner_bytes(self) -> float:
        """Gradients and the optimiser's state."""
        if self.whole:
            shape = self.shape
            return MUON_BYTES * shape.num_linear + ADAM_BYTES * (shape.num_params - shape.num_linear)
        return ADAM_BYTES * self.trained * self.shape.adapter_params(self.rank)

    @property
    def copies_bytes(self) -> float:
        """Weights and adapters in what is computed in, kept from one optimiser step to the next."""
        adapters = self.trained + self.frozen
        if self.merges:
            sums = adapters + (self.reads_base and self.compute != "fp32")
            return sums * self.element * self.shape.num_linear
        return 2.0 * adapters * self.shape.adapter_params(self.rank)

    @property
    def loaded_bytes(self) -> float:
        """What a CPU holds of the weights besides them: fused layers copy those that are joined, and the originals stay
        mapped from their file or in the heap; the file of weights that were quantised stays mapped."""
        if self.stored == "nf4":
            return 2.0 * self.shape.num_linear
        joined = sum(a * sum(outputs) for a, outputs in self.shape.joined_sizes if len(outputs) > 1)
        return BYTES[self.stored] * self.shape.layers * joined

    @property
    def quantising_bytes(self) -> float:
        """Taken for a moment when weights are quantised: two copies in bfloat16."""
        return 4.0 * self.shape.num_linear if self.stored == "nf4" else 0.0

    def layer_bytes(self) -> float:
        """Weights of one layer as stored."""
        return BYTES[self.stored] * self.shape.num_linear / self.shape.layers

    def gathered_bytes(self) -> float:
        """What a process holds for a moment of the shares of others: two layers, and the embedding or the head."""
        return 2 * self.layer_bytes() + 2.0 * self.shape.num_head

    @property
    def storage_bytes(self) -> dict[str, float]:
        """On disk: ``weights`` in what is computed in, and ``adapter``, one of them."""
        return {
            "weights": BYTES[self.compute] * self.shape.num_params,
            "adapter": 4.0 * self.shape.adapter_params(self.rank),
        }


def muon_flops(shape: Shape) -> float:
    """FLOPs of one step of `optim.BatchedMuon` on all matrices of the decoder: five Newton-Schulz steps each."""
    per_layer = 0.0
    for inputs, outputs in shape.linear_sizes:
        small, large = min(inputs, outputs), max(inputs, outputs)
        per_layer += NEWTON_SCHULZ_STEPS * (4.0 * small**2 * large + 2.0 * small**3)
    return shape.layers * per_layer


def merge_flops(network: Network) -> float:
    """FLOPs of forming the sums of weight and adapters once, see `Network.merges`."""
    return 2.0 * network.rank * network.shape.num_linear * network.trained if network.merges else 0.0

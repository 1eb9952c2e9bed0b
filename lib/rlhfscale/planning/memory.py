"""The peak memory of one process of a stage, in parts."""

from dataclasses import dataclass

from rlhfscale.planning.network import Kernels
from rlhfscale.planning.passes import Decode, Pass
from rlhfscale.planning.workloads import Phase, Workload

PARTS = ("weights", "adapters", "learner", "activations", "cache", "data", "runtime")
FRAGMENTATION = 1.1
"""Memory that an allocator holds for each byte that lives in it."""
RETAINED = 0.75
"""Of the most that another phase took, the share that a CPU's heap has found no other use for (see `allocator`)."""


@dataclass(frozen=True)
class Layout:
    """How a stage is laid out.

    Attributes:
        kernels: see `passes`.
        gpus: processes, each with its share of every batch.
        shards: processes that share the base's weights, those of one machine.
        micro_batch_tokens: tokens computed at a time.
        runtime_bytes: of a process that has computed nothing yet.
    """

    kernels: Kernels
    gpus: int
    shards: int
    micro_batch_tokens: float
    runtime_bytes: float


@dataclass(frozen=True)
class Memory:
    """Bytes of each part at the peak, and the phase that it is in."""

    parts: dict[str, float]
    phase: str

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def peak(work: Workload, layout: Layout) -> Memory:
    """The phase that needs most.

    Of a base that several GPUs share, the layer that computes, the next one and the embedding are whole for a moment
    (`sharding`).
    """
    networks = work.networks
    gathered = max(n.gathered_bytes() for n in networks) if layout.shards > 1 else 0.0
    loaded = sum(n.loaded_bytes for n in networks) if layout.kernels == "fused" else 0.0
    resident = {
        "weights": sum(n.shared_bytes(layout.shards) for n in networks) + gathered + loaded,
        "adapters": sum(n.adapter_bytes + n.copies_bytes for n in networks),
        "learner": sum(n.learner_bytes for n in networks),
        "data": work.data_bytes if layout.kernels == "fused" else 0.0,
        "runtime": layout.runtime_bytes,
    }
    phases = work.phases or (Phase("loading", ()),)
    found = [(phase.name, *_phase_bytes(phase, layout, work.checkpointing)) for phase in phases]
    name, activations, cache = max(found, key=lambda entry: entry[1] + entry[2])
    if layout.kernels == "fused":
        earlier = [sum(sizes) for other, *sizes in found if other != name] + [sum(n.quantising_bytes for n in networks)]
        activations += RETAINED * max(earlier)
    slack = FRAGMENTATION if work.phases else 1.0
    parts = resident | {"activations": slack * activations, "cache": slack * cache}
    return Memory({part: parts[part] for part in PARTS}, name)


def _phase_bytes(phase: Phase, layout: Layout, checkpointing: bool) -> tuple[float, float]:
    """Activations and cache."""
    decodes = [part for part in phase.work if isinstance(part, Decode)]
    passes = [part for part in phase.work if isinstance(part, Pass)]
    activations = [phase.other_bytes if layout.kernels == "fused" else 0.0]
    cache = 0.0
    for part in decodes:
        batch = part.together(layout.gpus)
        activations.append(part.passing_bytes(layout.kernels, batch))
        cache = max(cache, part.cache_bytes(batch))
    kept = 0.0
    for part in passes:
        tokens = tokens_together(phase, part, layout)
        if part.gradients:
            kept += part.kept_bytes(layout.kernels, tokens, checkpointing)
        activations.append(part.passing_bytes(layout.kernels, tokens))
    return kept + max(activations), cache


def tokens_together(phase: Phase, part: Pass, layout: Layout) -> float:
    """Tokens of a pass whose activations one process holds at the same time, at least those of a sequence."""
    rows = part.rows
    share = phase.together / layout.gpus / max(1e-9, rows.count)
    tokens = min(1.0, share) * rows.tokens(layout.kernels)
    longest = rows.longest or rows.length
    if layout.kernels == "plain":
        tokens *= longest / max(1.0, rows.length)  # padded
    if phase.splits:
        tokens = min(tokens, layout.micro_batch_tokens)
    return max(tokens, longest)

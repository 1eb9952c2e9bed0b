"""Stages on GPUs: how many each takes, its memory in parts, seconds, GPU-hours and price; or why it cannot be planned.

The GPUs of a stage split every batch, and those of one machine share its base: each holds a part of every layer's
weights and gathers a layer when it computes it (`sharding`; Zhao et al. 2023, FSDP). Adapters, their gradients and the
optimiser's state are on each of them. A share of a batch that is still too large is cut into micro-batches where the
stage does so. A stage gets the fewest GPUs that hold it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from rlhfscale.planning.hardware import Hardware
from rlhfscale.planning.memory import Layout, Memory, peak, tokens_together
from rlhfscale.planning.network import Network
from rlhfscale.planning.passes import Decode, Pass
from rlhfscale.planning.schedule import Simulation, Task, simulate
from rlhfscale.planning.workloads import Phase, Workload, is_known, workload
from rlhfscale.runs import grid
from rlhfscale.runs.spec import Spec

RUNTIME_BYTES = {"fused": 0.75e9, "plain": 2.0e9}
"""Of a process before it computes: libraries; on a GPU its context, kernels and workspaces."""
LOADING_BYTES_S = 2e9
"""Rate at which a machine reads weights from its disk."""
START_S = 30.0
"""From a process's start until it loads a model."""
LAYER_S = 1.5e-4
"""Least time of one layer in a step of decoding: some 30 kernels, launched one by one."""
MOST_GPUS = 4096
"""Most GPUs that a stage could be told to take."""


class DoesNotFit(ValueError):
    """A stage that the GPUs cannot hold; the message says what could."""


@dataclass(frozen=True)
class Options:
    """What a plan supposes.

    Attributes:
        hardware: kind of GPU.
        gpus: of them, the most that a stage can have.
        mfu: share of the peak that training and reading reach (model FLOPs utilisation, Chowdhery et al. 2022).
        bandwidth_use: share of the memory's bandwidth that decoding reaches, which is bound by it.
        micro_batch_tokens: tokens computed at a time, where a stage splits batches; None is as many as the stage does.
        usd_per_gpu_hour: price, if known.
    """

    hardware: Hardware
    gpus: int
    mfu: float = 0.35
    bandwidth_use: float = 0.5
    micro_batch_tokens: int | None = None
    usd_per_gpu_hour: float | None = None

    def layout(self, gpus: int, micro_batch_tokens: float) -> Layout:
        shards = min(gpus, self.hardware.gpus_per_node)
        return Layout("plain", gpus, shards, micro_batch_tokens, RUNTIME_BYTES["plain"])


@dataclass(frozen=True)
class StageCost:
    """One stage's share of a plan.

    Attributes:
        gpus: it takes; 0 for one that only copies weights.
        micro_batch_tokens: tokens that each GPU computes at a time.
        memory: of one GPU.
        flops: by phase, of all GPUs.
        seconds: by phase, ``loading`` among them.
        tokens: read, sampled and learnt from, each as often as it is.
        storage_bytes: of the artifact.
    """

    spec: Spec
    gpus: int
    micro_batch_tokens: int
    memory: Memory
    flops: dict[str, float]
    seconds: dict[str, float]
    tokens: float
    storage_bytes: float

    @property
    def wall_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.wall_s / 3600


def stage_cost(spec: Spec, options: Options) -> StageCost:
    """A stage on the fewest GPUs that hold it.

    Raises:
        DoesNotFit: all GPUs together do not.
    """
    work = workload(spec)
    if not work.phases:  # a checkpoint that is fetched and copied
        seconds = {"loading": START_S + 2 * _loading_s(work.networks, options.hardware)}
        return StageCost(spec, 0, 0, Memory({}, "loading"), {}, seconds, 0.0, work.storage_bytes)
    found = fitted(work, options)
    if found is None:
        raise DoesNotFit(_refusal(spec, work, options))
    gpus, micro, memory = found
    layout = options.layout(gpus, micro)
    flops = work.flops("plain")
    seconds = {"loading": START_S + _loading_s(work.networks, options.hardware)}
    for phase in work.phases:
        seconds[phase.name] = seconds.get(phase.name, 0.0) + _phase_s(phase, work, layout, options)
    return StageCost(spec, gpus, int(micro), memory, flops, seconds, work.tokens, work.storage_bytes)


def fitted(work: Workload, options: Options) -> tuple[int, float, Memory] | None:
    """The fewest GPUs that hold a stage, its micro-batch, and the memory of each; None if none do."""
    micro = options.micro_batch_tokens or work.tokens_per_pass
    for gpus in _numbers(options.gpus, options.hardware.gpus_per_node):
        memory = peak(work, options.layout(gpus, micro))
        if memory.total <= options.hardware.memory_bytes:
            return gpus, micro, memory
    return None


def _numbers(most: int, per_node: int) -> Iterator[int]:
    """Powers of two in a machine, then whole machines."""
    gpus = 1
    while gpus <= min(most, per_node):
        yield gpus
        gpus *= 2
    yield from range(2 * per_node, most + 1, per_node)


def _smaller_micro_batch(work: Workload, options: Options) -> int | None:
    """The largest power of two of tokens with which a stage fits."""
    tokens = work.tokens_per_pass
    while tokens > 1:
        tokens //= 2
        if fitted(work, replace(options, micro_batch_tokens=tokens)):
            return tokens
    return None


def _refusal(spec: Spec, work: Workload, options: Options) -> str:
    """One line: the stage, what it needs and what there is, and what would fit."""
    gpus = list(_numbers(options.gpus, options.hardware.gpus_per_node))[-1]
    micro = options.micro_batch_tokens or work.tokens_per_pass
    memory = peak(work, options.layout(gpus, micro))
    remedies = []
    if more := fitted(work, replace(options, gpus=MOST_GPUS)):
        remedies.append(f"--gpus {more[0]}")
    if smaller := _smaller_micro_batch(work, options):
        remedies.append(f"--micro-batch-tokens {smaller}")
    if any(network.stored != "nf4" for network in work.networks) and fitted(quantised(work), options):
        remedies.append("nf4")
    return (
        f"{spec.stage} ({spec.title}, {spec.key}): needs {memory.total / 1e9:.1f} GB on each of {gpus}"
        f" {options.hardware.name}, {options.hardware.memory_bytes / 1e9:.1f} GB available;"
        f" would fit: {' or '.join(remedies) or 'nothing that a plan can change'}"
    )


def quantised(work: Workload) -> Workload:
    """The same work on bases in 4 bits."""

    def of(network: Network) -> Network:
        return network if network.whole else replace(network, stored="nf4")

    phases = tuple(
        replace(phase, work=tuple(replace(part, network=of(part.network)) for part in phase.work))
        for phase in work.phases
    )
    return replace(work, networks=tuple(of(network) for network in work.networks), phases=phases)


def _loading_s(networks: Iterable[Network], hardware: Hardware) -> float:
    """Weights come from a disk in bfloat16, also those that are then quantised."""
    return sum(2.0 * network.shape.num_params for network in networks) / LOADING_BYTES_S


def _phase_s(phase: Phase, work: Workload, layout: Layout, options: Options) -> float:
    products = phase.other_flops / (layout.gpus * options.hardware.peak_flops * options.mfu)
    return products + sum(
        _decode_s(part, layout, options) if isinstance(part, Decode) else _pass_s(phase, part, work, layout, options)
        for part in phase.work
    )


def _pass_s(phase: Phase, part: Pass, work: Workload, layout: Layout, options: Options) -> float:
    """Products, or the gathering of the weights for each micro-batch where that takes longer: the two overlap."""
    products = part.flops("plain", work.checkpointing) / (layout.gpus * options.hardware.peak_flops * options.mfu)
    together = tokens_together(phase, part, layout)
    rounds = part.times * ceil(part.rows.tokens("plain") / layout.gpus / together)
    readings = 1 + part.gradients * (1 + work.checkpointing)
    return max(products, rounds * readings * _gathering_s(part.network, layout, options.hardware))


def _gathering_s(network: Network, layout: Layout, hardware: Hardware) -> float:
    """Fetching the other GPUs' shares of all layers once."""
    return network.base_bytes * (1 - 1 / layout.shards) / hardware.link_bandwidth


def _decode_s(part: Decode, layout: Layout, options: Options) -> float:
    """Every step reads the weights and what is in the cache by then, half of it on average (Pope et al. 2022), and
    gathers the weights that are on other GPUs; prompts are products."""
    hardware, network = options.hardware, part.network
    read = network.base_bytes + network.adapter_bytes + part.cache_bytes(part.together(layout.gpus)) / 2
    read_s = read / (hardware.bandwidth * options.bandwidth_use)
    step = max(read_s, LAYER_S * network.shape.layers, _gathering_s(network, layout, hardware))
    products = part.flops("plain") / (layout.gpus * hardware.peak_flops * options.mfu)
    return part.steps(layout.gpus) * step + products


@dataclass(frozen=True)
class TierCost:
    """All stages that must run, in the grid's order."""

    options: Options
    stages: dict[str, StageCost]
    plan: grid.Plan

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages.values())

    @property
    def usd(self) -> float | None:
        rate = self.options.usd_per_gpu_hour
        return None if rate is None else rate * self.gpu_hours

    def simulation(self, gpus: int) -> Simulation | str:
        """The graph on so many GPUs; or, in words, why that cannot be: a stage takes more."""
        tasks = {}
        for key, stage in self.stages.items():
            node = self.plan.nodes[key]
            if stage.gpus > gpus:
                return f"{stage.spec.stage} of {model_of(stage.spec)} takes {stage.gpus} GPUs"
            parents = tuple(parent for parent in node.parents if parent in self.stages)
            tasks[key] = Task(stage.wall_s, stage.gpus, parents, node.group)
        return simulate(tasks, gpus)


def tier_cost(plan: grid.Plan, options: Options) -> TierCost:
    """The cost of every stage that a plan would run. Raises DoesNotFit for the first that cannot be held."""
    costs: dict[tuple, StageCost] = {}
    stages = {}
    for node in plan.to_run:
        if not is_known(node.spec):
            continue
        alike = _alike(node.spec)
        if alike not in costs:
            costs[alike] = stage_cost(node.spec, options)
        stages[node.spec.key] = replace(costs[alike], spec=node.spec)
    return TierCost(options, stages, plan)


def _alike(spec: Spec) -> tuple:
    """What decides a stage's cost: all that its workload is made of. Seeds and rates do not."""
    return spec.stage, repr(workload(spec))


def model_of(spec: Spec) -> str:
    """The model that a stage makes or reads, for tables."""
    for name in ("checkpoint", "rung", "before"):
        if isinstance(found := getattr(spec, name, None), str):
            return found
    for name in ("model", "reward_model", "base"):
        if isinstance(found := getattr(spec, name, None), Spec):
            return model_of(found)
    return ""


def precision_of(spec: Spec) -> str:
    """What its first model's weights are loaded in."""
    return workload(spec).networks[0].stored


def to_json(cost: TierCost, simulations: Mapping[int, Simulation | str], **about: Any) -> dict[str, Any]:
    """The plan as JSON values; bytes, seconds, FLOPs and tokens are plain numbers."""
    options = cost.options
    names = list(cost.plan.groups)
    stages = [
        {
            "key": key,
            "stage": stage.spec.stage,
            "title": stage.spec.title,
            "model": model_of(stage.spec),
            "precision": precision_of(stage.spec),
            "figure": names[cost.plan.nodes[key].group],
            "parents": list(cost.plan.nodes[key].parents),
            "gpus": stage.gpus,
            "micro_batch_tokens": stage.micro_batch_tokens,
            "memory_bytes": stage.memory.parts,
            "peak_phase": stage.memory.phase,
            "flops": stage.flops,
            "tokens": stage.tokens,
            "seconds": stage.seconds,
            "gpu_hours": stage.gpu_hours,
            "storage_bytes": stage.storage_bytes,
            "usd": None if options.usd_per_gpu_hour is None else options.usd_per_gpu_hour * stage.gpu_hours,
        }
        for key, stage in cost.stages.items()
    ]
    return about | {
        "hardware": options.hardware.model_dump(),
        "assumptions": {
            "gpus": options.gpus,
            "mfu": options.mfu,
            "bandwidth_use": options.bandwidth_use,
            "micro_batch_tokens": options.micro_batch_tokens,
            "usd_per_gpu_hour": options.usd_per_gpu_hour,
        },
        "cached": len(cost.plan.cached),
        "gpu_hours": cost.gpu_hours,
        "usd": cost.usd,
        "storage_bytes": sum(stage.storage_bytes for stage in cost.stages.values()),
        "stages": stages,
        "simulations": [
            {"gpus": gpus, "refused": found} if isinstance(found, str) else asdict(found) | {"refused": None}
            for gpus, found in simulations.items()
        ],
    }

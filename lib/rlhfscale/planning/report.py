"""A plan's costs as tables for a terminal."""

from collections.abc import Mapping

from rich.table import Table

from rlhfscale import grid
from rlhfscale.planning.costs import RUNTIME_BYTES, StageCost, TierCost, model_of, precision_of
from rlhfscale.planning.memory import Layout, peak
from rlhfscale.planning.schedule import Simulation
from rlhfscale.planning.workloads import TOKENS_PER_PASS, is_known, workload

Group = tuple[str, str, str]


def stages_table(cost: TierCost) -> Table:
    """A row for each kind of stage, model and precision: fewest and most GPUs, memory of what takes most."""
    options = cost.options
    table = Table("stage", "model", "", title=f"{options.hardware.name}, at most {options.gpus}")
    for name in ("to run", "GPUs", "GB a GPU", "weights", "learning", "activations", "cache", "micro-batch"):
        table.add_column(name, justify="right")
    for name in ("PFLOPs", "M tokens", "hours each", "GPU-hours", "GB kept"):
        table.add_column(name, justify="right")
    if cost.usd is not None:
        table.add_column("USD", justify="right")
    for (stage, model, precision), group in _groups(cost).items():
        most = max(group, key=lambda each: each.memory.total)
        table.add_row(stage, model, precision, *_row(group, most, options.usd_per_gpu_hour))
    table.add_section()
    every = list(cost.stages.values())
    if every:
        widest = max(each.gpus for each in every)
        sums = [_sum(every, "flops") / 1e15, sum(each.tokens for each in every) / 1e6]
        kept = sum(each.storage_bytes for each in every) / 1e9
        row = [str(len(every)), str(widest), *[""] * 6, *map(_short, sums), "", _short(cost.gpu_hours), _short(kept)]
        table.add_row("all", "", "", *row, *([] if cost.usd is None else [_short(cost.usd)]))
    return table


def _groups(cost: TierCost) -> dict[Group, list[StageCost]]:
    found: dict[Group, list[StageCost]] = {}
    for stage in cost.stages.values():
        about = stage.spec.stage, model_of(stage.spec), precision_of(stage.spec)
        found.setdefault(about, []).append(stage)
    return found


def _row(group: list[StageCost], most: StageCost, rate: float | None) -> list[str]:
    parts = most.memory.parts
    memory = [most.memory.total] if parts else []
    if parts:
        memory += [parts["weights"], parts["adapters"] + parts["learner"], parts["activations"], parts["cache"]]
    hours = sum(each.wall_s for each in group) / len(group) / 3600
    gpu_hours = sum(each.gpu_hours for each in group)
    gpus = sorted({each.gpus for each in group})
    row = [
        str(len(group)),
        "-".join(map(str, gpus[:: max(1, len(gpus) - 1)])),
        *[f"{part / 1e9:.1f}" for part in memory or ()],
        *[""] * (5 - len(memory)),
    ]
    row += [str(most.micro_batch_tokens or ""), _short(_sum(group, "flops") / 1e15)]
    row += [_short(sum(each.tokens for each in group) / 1e6), _short(hours), _short(gpu_hours)]
    row.append(_short(sum(each.storage_bytes for each in group) / 1e9))
    return row if rate is None else [*row, _short(rate * gpu_hours)]


def _sum(group: list[StageCost], name: str) -> float:
    return sum(sum(getattr(each, name).values()) for each in group)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def simulations_table(simulations: Mapping[int, Simulation | str]) -> Table:
    """A row for each number of GPUs."""
    table = Table("GPUs")
    for name in ("hours until done", "idle", "most in use", "critical path, hours", "work / GPUs, hours"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for gpus, found in simulations.items():
        if isinstance(found, str):
            table.add_row(str(gpus), *[""] * 5, f"cannot run: {found}")
            continue
        hours = [second / 3600 for second in (found.makespan_s, found.critical_path_s, found.work_s)]
        row = [_short(hours[0]), f"{found.idle:.0%}", str(found.busiest), _short(hours[1]), _short(hours[2])]
        table.add_row(str(gpus), *row, found.bound)
    return table


def on_a_cpu(plan: grid.Plan) -> str:
    """One line on what a tier takes where every stage is a process of one thread."""
    layout = Layout("fused", 1, 1, TOKENS_PER_PASS, RUNTIME_BYTES["fused"])
    works = {node.spec: workload(node.spec) for node in plan.to_run if is_known(node.spec)}
    if not works:
        return "nothing to compute" if not plan.to_run else "no formulas for these stages' memory and FLOPs"
    flops = sum(sum(work.flops("fused").values()) for work in works.values())
    memory = {spec: peak(work, layout).total for spec, work in works.items()}
    largest = max(memory, key=memory.__getitem__)
    kept = sum(work.storage_bytes for work in works.values())
    return (
        f"{_short(flops / 1e12)} TFLOPs, {_short(kept / 1e6)} MB kept; the largest process takes about"
        f" {memory[largest] / 2**20:,.0f} MiB ({largest.title})"
    )

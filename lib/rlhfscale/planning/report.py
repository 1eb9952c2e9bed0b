"""A plan's costs as tables for a terminal."""

from collections.abc import Mapping

from rich import box
from rich.table import Table

from rlhfscale.planning.costs import RUNTIME_BYTES, StageCost, TierCost, model_of, precision_of
from rlhfscale.planning.memory import Layout, peak
from rlhfscale.planning.schedule import Simulation
from rlhfscale.planning.workloads import TOKENS_PER_PASS, is_known, workload
from rlhfscale.runs import grid


def figures_table(cost: TierCost) -> Table:
    """What each figure adds to those before it."""
    table = _table(f"{cost.options.hardware.name}, at most {cost.options.gpus}", "figure")
    for name in ("to run", "GPU hours"):
        table.add_column(name, justify="right")
    for index, figure in enumerate(cost.plan.groups):
        own = [stage for key, stage in cost.stages.items() if cost.plan.nodes[key].group == index]
        table.add_row(figure, str(len(own)), _short(sum(stage.gpu_hours for stage in own)))
    return table


def memory_table(cost: TierCost) -> Table:
    """What a GPU holds at the peak: a row for each kind of stage and model, of the one that takes most."""
    table = _table("Memory of a GPU at its peak, GB", "stage", "model")
    for name in ("GPUs", "in all", "base", "learned", "kept", "cache", "tokens"):
        table.add_column(name, justify="right")
    table.caption = (
        "learned: adapters, gradients, optimiser. kept: for the backward pass, and logits."
        " tokens: that are computed at a time."
    )
    for (stage, model), group in _groups(cost).items():
        most = max(group, key=lambda each: each.memory.total)
        parts = most.memory.parts
        if parts:
            held = [parts["weights"], parts["adapters"] + parts["learner"], parts["activations"], parts["cache"]]
            numbers = [f"{part / 1e9:.1f}" for part in (most.memory.total, *held)]
            table.add_row(stage, model, str(most.gpus), *numbers, str(most.micro_batch_tokens or ""))
    return table


def work_table(cost: TierCost) -> Table:
    """What is computed: a row for each kind of stage and model, and their sum."""
    rate = cost.options.usd_per_gpu_hour
    table = _table("Work", "stage", "model")
    for name in ("runs", "GPUs", "PFLOPs", "h each", "GPU h", "disk", *(["USD"] if rate else [])):
        table.add_column(name, justify="right")
    table.caption = "h each: hours of one run. disk: GB that all of them keep."
    for (stage, model), group in _groups(cost).items():
        table.add_row(stage, model, *_work(group, rate))
    if cost.stages:
        table.add_section()
        table.add_row("all", "", *_work(list(cost.stages.values()), rate))
    return table


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0))
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _groups(cost: TierCost) -> dict[tuple[str, str], list[StageCost]]:
    found: dict[tuple[str, str], list[StageCost]] = {}
    for stage in cost.stages.values():
        about = stage.spec.stage, f"{model_of(stage.spec)} {precision_of(stage.spec)}"
        found.setdefault(about, []).append(stage)
    return found


def _work(group: list[StageCost], rate: float | None) -> list[str]:
    gpu_hours = sum(each.gpu_hours for each in group)
    hours = sum(each.wall_s for each in group) / len(group) / 3600
    least, most = min(each.gpus for each in group), max(each.gpus for each in group)
    row = [str(len(group)), str(most) if least == most else f"{least}-{most}"]
    row += [_short(_sum(group, "flops") / 1e15), _short(hours), _short(gpu_hours)]
    row.append(_short(sum(each.storage_bytes for each in group) / 1e9))
    return [*row, _short(rate * gpu_hours)] if rate else row


def _sum(group: list[StageCost], name: str) -> float:
    return sum(sum(getattr(each, name).values()) for each in group)


def _short(number: float) -> str:
    if 0 < number < 0.005:
        return "< 0.01"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 1 else f"{number:.2f}"


def simulations_table(simulations: Mapping[int, Simulation | str]) -> Table:
    """A row for each number of GPUs."""
    table = _table("Played through, hours", "GPUs")
    for name in ("until done", "idle", "in use", "longest chain", "work / GPUs"):
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
        return "no formulas for these stages' memory and FLOPs" if plan.to_run else "nothing to compute"
    flops = sum(sum(work.flops("fused").values()) for work in works.values())
    memory = {spec: peak(work, layout).total for spec, work in works.items()}
    largest = max(memory, key=memory.__getitem__)
    kept = sum(work.storage_bytes for work in works.values())
    return (
        f"{_short(flops / 1e12)} TFLOPs, {_short(kept / 1e6)} MB kept; the largest process takes about"
        f" {memory[largest] / 2**20:,.0f} MiB ({largest.title})"
    )

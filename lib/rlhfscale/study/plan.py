"""What ``rlhfscale plan`` prints: a tier's figures, and what they take on a CPU or on GPUs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import typer
from rich.console import Console

from rlhfscale.planning import costs, report
from rlhfscale.planning.hardware import OF_TIER, hardware, kind_for
from rlhfscale.runs import grid
from rlhfscale.study import runner
from rlhfscale.study.params import ParamsError


@dataclass(frozen=True)
class Asked:
    """The command's options, as they were typed."""

    gpu: str | None
    gpus: int | None
    mfu: float
    bandwidth_use: float
    micro_batch_tokens: int | None
    usd_per_gpu_hour: float | None
    simulate: str
    as_json: bool


def run(tier: str, figures: Sequence[runner.Figure], todo: grid.Plan, console: Console, asked: Asked) -> None:
    """Print a tier's plan, for processes of a CPU or for GPUs.

    Raises:
        ParamsError: unknown hardware, options that are for GPUs where none are planned for, or a plan that does not
            fit.
    """
    most = OF_TIER.get(tier, (None, 1))[1]
    counts = _counts(asked.simulate)
    try:
        kind = kind_for(tier, asked.gpu)
    except ValueError as error:
        raise ParamsError(str(error)) from None
    if kind is None:
        given = ("gpus", "micro_batch_tokens", "usd_per_gpu_hour", "simulate", "as_json")
        for name in given:
            if getattr(asked, name):
                option = name.removeprefix("as_").replace("_", "-")
                raise ParamsError(f"--{option}: tier {tier} is planned for a CPU; give --gpu too")
        console.print(runner.plan_table(figures, todo))
        console.print(todo)
        console.print(report.on_a_cpu(todo), highlight=False, soft_wrap=True)
        return
    try:
        options = costs.Options(
            hardware=hardware(kind),
            gpus=asked.gpus or most,
            mfu=asked.mfu,
            bandwidth_use=asked.bandwidth_use,
            micro_batch_tokens=asked.micro_batch_tokens,
            usd_per_gpu_hour=asked.usd_per_gpu_hour,
        )
        found = costs.tier_cost(todo, options)
        simulations = {count: found.simulation(count) for count in counts}
    except ValueError as error:
        raise ParamsError(str(error)) from None
    if asked.as_json:
        typer.echo(json.dumps(costs.to_json(found, simulations, tier=tier), indent=1, allow_nan=False))
        return
    console.print(report.figures_table(found))
    console.print(report.memory_table(found))
    console.print(report.work_table(found))
    if simulations:
        console.print(report.simulations_table(simulations))


def _counts(text: str) -> list[int]:
    """Numbers of GPUs, from text such as ``8,64``."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ParamsError(f"--simulate: {text!r} is not a list of numbers of GPUs, such as 8,64,512")
    return [int(part) for part in parts]

"""The body of ``rlhfscale evaluate``: open policy and judge, show the cost, evaluate, write and print."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from rlhfscale.evals.benchmarks import SOLVE, Ask
from rlhfscale.evals.endpoint import Endpoint
from rlhfscale.evals.evaluate import Decoding, cache_of_judgments, evaluate, open_judge, open_policy, save
from rlhfscale.evals.judge import Estimate, JudgeError, TooManyMissing
from rlhfscale.runs.provenance import provenance
from rlhfscale.samplers.vllm import EngineDied, NotInstalled


class CannotEvaluate(ValueError):
    """Options that do not fit, a judge that cannot be used, or a cost above the limit; the message says which."""


@dataclass(frozen=True)
class Options:
    """The command's options, as described by its help."""

    policy: str
    benchmark: str
    judge: str
    judge_url: str | None
    judge_key: str
    judge_revision: str | None
    judge_tokens: int
    judge_timeout: float
    judge_attempts: int
    tensor_parallel: int
    pipeline_parallel: int
    concurrency: int
    constrained: bool
    max_missing: float
    usd_in: float
    usd_out: float
    max_usd: float | None
    baseline: str | None
    data: Path | None
    data_revision: str | None
    questions: int | None
    max_new_tokens: int
    temperature: float
    samples: int
    seed: int
    dtype: str


def run(options: Options, folder: Path, console: Console) -> None:
    """Evaluate, write ``folder`` and print the estimates.

    Raises:
        CannotEvaluate: options that do not fit, a judge that cannot be used, a cost above the limit.
        FileNotFoundError: a model folder or a benchmark's file is missing.
        typer.Exit: 1, after a message, where too many verdicts are missing.
    """
    start = time.monotonic()
    try:
        judge = _judge(options)
        policy = open_policy(options.policy, options.dtype)
        baseline = open_policy(options.baseline, options.dtype) if options.baseline else None
        ask = None
        if judge is not None:
            ask = Ask(
                judge,
                cache_of_judgments(),
                max_missing=options.max_missing,
                max_tokens=options.judge_tokens,
                constrained=options.constrained,
                usd_per_million=(options.usd_in, options.usd_out),
                on_estimate=lambda cost: _announce(cost, options.max_usd, console),
            )
        found = evaluate(
            policy,
            options.benchmark,
            ask,
            decoding=Decoding(options.max_new_tokens, options.temperature, options.samples, options.seed),
            baseline=baseline,
            data=options.data,
            revision=options.data_revision,
            num_questions=options.questions,
            seed=options.seed,
        )
    except TooManyMissing as error:
        typer.echo(f"failed: {error}; replies that came are kept, running again asks for the rest", err=True)
        raise typer.Exit(1) from None
    except EngineDied as error:
        typer.echo(f"failed: {error}\nreplies that came are kept, running again asks for the rest", err=True)
        raise typer.Exit(1) from None
    except (JudgeError, ModuleNotFoundError, NotInstalled) as error:
        raise CannotEvaluate(str(error)) from None
    except ValueError as error:
        raise CannotEvaluate(" ".join(str(error).split())) from None
    about = asdict(replace(options, data=str(options.data) if options.data else None))
    manifest = {"options": about, "policy_revision": policy.revision, **provenance()}
    manifest |= {"judge_revision": judge.revision} if judge else {}
    manifest |= {"baseline_revision": baseline.revision} if baseline else {}
    save(found, folder, manifest | {"wall_s": round(time.monotonic() - start, 3)})
    table = Table("quantity", "estimate", "95% interval", "questions", "missing")
    for row in found.summary.itertuples():
        interval = f"[{row.ci_low:.3f}, {row.ci_high:.3f}]"
        table.add_row(row.quantity, f"{row.estimate:.3f}", interval, str(row.num_prompts), str(row.num_missing))
    console.print(table)
    console.print(f"tables: {folder}", highlight=False, soft_wrap=True)


def _judge(options: Options):
    if options.judge == "verifier" and options.benchmark not in SOLVE:
        raise ValueError(f"judge: {options.benchmark} needs one, by --judge")
    judge = open_judge(
        options.judge,
        url=options.judge_url,
        key_variable=options.judge_key,
        revision=options.judge_revision,
        dtype=options.dtype,
        tensor_parallel=options.tensor_parallel,
        pipeline_parallel=options.pipeline_parallel,
    )
    if isinstance(judge, Endpoint):
        judge.timeout_s, judge.num_attempts = options.judge_timeout, options.judge_attempts
        judge.concurrency = options.concurrency
    return judge


def _announce(cost: Estimate, max_usd: float | None, console: Console) -> None:
    console.print(str(cost), highlight=False, soft_wrap=True)
    if max_usd is not None and cost.max_usd > max_usd:
        raise CannotEvaluate(f"max-usd: this may cost {cost.max_usd:.2f} USD, more than {max_usd:g}")

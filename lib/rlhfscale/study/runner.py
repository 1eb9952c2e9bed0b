"""Running figures: find and validate them, make their artifacts, execute their notebooks, report their verdicts.

Everything is validated before any compute. All figures' artifacts are made by one call of
:func:`rlhfscale.runs.grid.ensure`; as soon as a figure's artifacts are there its notebook is executed by papermill in a
process of its own, while the pool goes on with the next figures. The notebook finds everything cached and writes its
tables and plots into the results folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhfscale.models.files import replace_file
from rlhfscale.runs import grid
from rlhfscale.runs.paths import project_root
from rlhfscale.runs.spec import Spec
from rlhfscale.runs.store import Store
from rlhfscale.study.params import FigureParams, ParamsError, check_notebook_parameters, load

NOTEBOOKS_AT_ONCE = 2
NOTEBOOK_S = 15.0
"""Rough seconds for one notebook whose artifacts are cached, for the estimate that is printed first."""
VERDICT_STYLE = {"reproduced": "green", "contradicted": "red", "inconclusive": "yellow"}


@dataclass(frozen=True)
class Figure:
    """One figure of a tier: its validated parameters, its notebook and its results folder."""

    name: str
    params: FigureParams
    specs: tuple[Spec, ...]
    notebook: Path
    results: Path


def tiers() -> list[str]:
    """The names of all tiers: the folders of params/ that hold parameters of a figure."""
    return sorted({path.parent.name for path in (project_root() / "params").glob("*/[0-9][0-9]_*.yaml")})


def check_tier(tier: str) -> None:
    """Raise ParamsError unless it is one of `tiers`."""
    if tier not in tiers():
        raise ParamsError(f"tier: unknown tier {tier!r}; allowed: {', '.join(tiers())}")


def figure_names(tier: str, wanted: Sequence[str] = ()) -> list[str]:
    """The tier's figures in the order they are to be made: as listed in ``params/<tier>/order.yaml``, else by name.

    Args:
        wanted: names or numbers, such as ``1``; without any, all that the order lists. A figure that it does not list
            needs what `make setup` leaves out, or longer, and is made when it is asked for.

    Raises ParamsError for an unknown tier or figure.
    """
    check_tier(tier)
    folder = project_root() / "params" / tier
    names = sorted(path.stem for path in folder.glob("[0-9][0-9]_*.yaml"))
    if (folder / "order.yaml").is_file():
        order = yaml.safe_load((folder / "order.yaml").read_text())
        if not isinstance(order, list) or len(set(map(str, order))) < len(order) or not {*map(str, order)} <= {*names}:
            raise ParamsError(f"params/{tier}/order.yaml: must be a list without repetition from: {', '.join(names)}")
        names = [*order, *(name for name in names if wanted and name not in order)]
    chosen = set()
    for wish in wanted:
        found = {name for name in names if name == wish or name.startswith(f"{wish.zfill(2)}_")}
        if not found:
            raise ParamsError(f"figure: unknown figure {wish!r} in tier {tier}; allowed: {', '.join(names)}")
        chosen |= found
    return [name for name in names if not wanted or name in chosen]


def load_figures(tier: str, wanted: Sequence[str], results: Path) -> list[Figure]:
    """The chosen figures, validated against their schema and their notebook. Raises ParamsError."""
    figures = []
    for name in figure_names(tier, wanted):
        params, notebook = load(name, tier), project_root() / "notebooks" / f"{name}.ipynb"
        check_notebook_parameters(notebook, params)
        try:
            specs = params.specs()
        except ValueError as error:  # a spec's own cross-field rule
            raise ParamsError(f"params/{tier}/{name}.yaml: {' '.join(str(error).split())}") from None
        figures.append(Figure(name, params, specs, notebook, results / tier / name))
    return figures


def plan(figures: Sequence[Figure], store: Store, workers: int) -> grid.Plan:
    """The plan of all figures' artifacts together, one group per figure."""
    return grid.plan({figure.name: figure.specs for figure in figures}, store, workers)


def plan_table(figures: Sequence[Figure], todo: grid.Plan) -> Table:
    """Per figure: artifacts cached and to run (shared ones at the first figure in need), when it should land."""
    table = Table("figure", "claim")
    for name in ("cached", "to run", "core-minutes", "ready after, minutes"):
        table.add_column(name, justify="right")
    finish = todo.finish_s()
    for index, figure in enumerate(figures):
        nodes = [node for node in todo.nodes.values() if node.group == index]
        run = [node for node in nodes if node.status == "todo"]
        core = sum(node.spec.cost_s for node in run) / 60
        landed = (finish[figure.name] + NOTEBOOK_S) / 60
        claims = ", ".join(figure.params.claims)
        table.add_row(figure.name, claims, str(len(nodes) - len(run)), str(len(run)), f"{core:.1f}", f"{landed:.1f}")
    return table


def total_s(figures: Sequence[Figure], todo: grid.Plan) -> float:
    """Estimated wall seconds for everything: artifacts, then what is left of the notebooks."""
    return todo.wall_s + NOTEBOOK_S * (1 if todo.to_run else -(-len(figures) // NOTEBOOKS_AT_ONCE))


def run(
    figures: Sequence[Figure],
    tier: str,
    store: Store,
    results: Path,
    workers: int,
    console: Console,
    ray: str | None = None,
) -> bool:
    """Make the figures; True where all of them landed. Failures are reported and do not stop the other figures.

    Args:
        workers, ray: where artifacts are made, see `grid.ensure`.
    """
    board = _Board(figures, tier, store, results, console)
    try:
        made = grid.ensure(
            {figure.name: figure.specs for figure in figures},
            store=store,
            workers=workers,
            ray=ray,
            on_done=board.settled,
            raise_on_failure=False,
            console=console,
        )
        board.wait()
    except BaseException:
        board.stop()
        raise
    return not made.failures and not board.failed


class _Board:
    """Keeps the score of a run: which figures still wait for artifacts, and the notebooks being executed."""

    def __init__(self, figures: Sequence[Figure], tier: str, store: Store, results: Path, console: Console):
        self.figures, self.store, self.console = figures, store, console
        self.environment = os.environ | {
            "RLHFSCALE_STORE": store.location,
            "RLHFSCALE_RESULTS": str(results),
            "RLHFSCALE_TIER": tier,
            "JUPYTER_PREFER_ENV_PATH": "1",
            "PYTHONWARNINGS": "ignore:IProgress not found",  # of tqdm; it would put this machine's paths into a result
        }
        self.waiting = {figure.name: {spec.key for spec in figure.specs} for figure in figures}
        self.failed: list[str] = []
        self.start = time.monotonic()
        self.stopped = threading.Event()
        self.pool = ThreadPoolExecutor(NOTEBOOKS_AT_ONCE)
        self.notebooks: list[Future] = []
        for figure in figures:
            if not figure.specs and not figure.params.reads_results:
                self.notebooks.append(self.pool.submit(self.execute, figure))

    def settled(self, spec: Spec, status: str) -> None:
        """Called by the grid for every node: start the notebooks of figures that have all they need."""
        for figure in self.figures:
            waiting = self.waiting[figure.name]
            if spec.key not in waiting or figure.name in self.failed:
                continue
            if status in ("failed", "skipped"):
                self.fail(figure, f"{spec.title} {status}")
                continue
            waiting.remove(spec.key)
            if not waiting:
                self.notebooks.append(self.pool.submit(self.execute, figure))

    def wait(self) -> None:
        """Wait for the notebooks, then execute those that read the others' results."""
        for notebook in self.notebooks:
            notebook.result()
        for figure in self.figures:
            if figure.params.reads_results:
                self.execute(figure)
        self.pool.shutdown()

    def stop(self) -> None:
        self.stopped.set()
        self.pool.shutdown(cancel_futures=True)

    def fail(self, figure: Figure, reason: str) -> None:
        self.failed.append(figure.name)
        self.say(f"[red]failed[/] {figure.name}: {escape(reason)}")

    def execute(self, figure: Figure) -> None:
        """Execute a figure's notebook, then move it into the results folder and report the figure."""
        try:
            error = self.papermill(figure)
        except OSError as problem:
            error = f"{figure.results}: {problem.strerror}"
        if self.stopped.is_set():
            return
        if error:
            self.fail(figure, error)
            return
        picture = figure.results / "figure.png"
        landed = _relative(picture if picture.exists() else figure.results, Path.cwd())
        minutes = (time.monotonic() - self.start) / 60
        self.say(f"[green]landed[/] {figure.name} after {minutes:.1f} min: {escape(landed)}")
        for line in verdict_lines(figure.results):
            self.say(f"  {line}")

    def papermill(self, figure: Figure) -> str:
        """What went wrong, or an empty string. A failed notebook goes to the store's logs, never to the results."""
        figure.results.mkdir(parents=True, exist_ok=True)
        executed = figure.results / f".notebook.{os.getpid()}.ipynb"
        _sweep(figure.results.parent)
        _sweep(figure.results)
        logs = self.store.root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{figure.name}.log"
        root = project_root()
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as values, log.open("w") as output:
            yaml.safe_dump(figure.params.resolved(), values, sort_keys=False)
            values.flush()
            # relative paths, since papermill records them in the notebook, which is committed
            names = [_relative(figure.notebook, root), _relative(executed, root)]
            options = ["--kernel", "python3", "--no-progress-bar", "--request-save-on-cell-execute"]
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "rlhfscale.study.notebook",
                    str(os.getpid()),
                    *names,
                    "-f",
                    values.name,
                    *options,
                ],
                cwd=root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            while process.poll() is None:
                if self.stopped.wait(0.1):
                    process.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(3)
                    process.kill()
        if process.returncode == 0 and not self.stopped.is_set():
            link_results(executed)
            executed.replace(figure.results / "notebook.ipynb")
            return ""
        if executed.exists():
            shutil.move(executed, logs / f"{figure.name}.failed.ipynb")
        _sweep(figure.results)
        if process.returncode < 0:
            return f"its process was ended by signal {-process.returncode} (log: {log})"
        text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace")).strip()
        return f"{text.splitlines()[-1] if text else 'notebook stopped'} (log: {log})"

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def verdict_lines(results: Path) -> list[str]:
    """A line of rich markup for each claim in a results folder's claims.json."""
    path = results / "claims.json"
    if not path.is_file():
        return []
    lines = []
    for claim in json.loads(path.read_text()):
        style = VERDICT_STYLE.get(claim["verdict"], "bold")
        interval = f"{claim['estimate']:.3g} [{claim['ci_low']:.3g}, {claim['ci_high']:.3g}]"
        lines.append(
            f"{claim['claim']} [{style}]{claim['verdict']}[/]  {escape(claim['statement'])}: {escape(interval)}"
        )
    return lines


def link_results(notebook: Path) -> None:
    """Let the links of an executed notebook to other notebooks lead to their executed ones, which lie in folders."""
    content = json.loads(notebook.read_text())
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](../\1/notebook.ipynb", "".join(cell["source"]))
            cell["source"] = text.splitlines(keepends=True)
    replace_file(notebook, json.dumps(content, indent=1, ensure_ascii=False).encode())


def _sweep(folder: Path) -> None:
    """Delete what processes that are dead now had half written: notebooks, and the temporary files of tables."""
    for path in (*folder.glob(".notebook.[0-9]*.ipynb"), *folder.glob(".*.[0-9]*.tmp")):
        if not _alive(int(path.name.split(".")[-2])):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _relative(path: Path, start: Path) -> str:
    """The path from ``start`` where it lies below it, else as it is."""
    return str(path.relative_to(start)) if path.is_relative_to(start) else str(path)

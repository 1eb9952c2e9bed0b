"""Two sides of a case timed against each other: A B A B ... in one run, one child process each."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from scipy import stats

from rlhfscale.bench.peers.protocol import THREAD_VARIABLES

CI_METHOD = "order statistics"


class ChildDied(RuntimeError):
    """A side ended before it answered; the message holds the last lines of its standard error."""


@dataclass(frozen=True)
class Side:
    """How to run one side.

    Attributes:
        name: for messages and results.
        command: the program and its arguments; the path of the job is appended.
        job: what the side is asked to do, JSON; ``threads`` is the number of its threads.
        isolated: run without ``PYTHONPATH``, as an environment of its own needs it.
    """

    name: str
    command: Sequence[str]
    job: Mapping[str, Any]
    isolated: bool = False


@dataclass(frozen=True)
class Result:
    """What `alternate` measured.

    Attributes:
        ready: each side's ready line: FLOPs of a step, and what else it says.
        steps: each side's lines, one for each round: wall and processor seconds, peak memory in bytes, counts.
        ratios: float64 [round], wall seconds of the second side over those of the first: above 1, the first is faster.
        ratio: their median.
        ci_low, ci_high: interval of the median.
        coverage: of that interval, at least what was asked for unless there are too few rounds for it.
        ci_method: how the interval was made.
    """

    ready: tuple[dict[str, Any], dict[str, Any]]
    steps: tuple[list[dict[str, Any]], list[dict[str, Any]]]
    ratios: np.ndarray
    ratio: float
    ci_low: float
    ci_high: float
    coverage: float
    ci_method: str = CI_METHOD

    def seconds(self, side: int) -> float:
        """Median wall seconds of a step of the first (0) or second (1) side."""
        return float(np.median([step["seconds"] for step in self.steps[side]]))

    @property
    def cpu_ratio(self) -> float:
        """Median ratio of processor seconds: what the ratio would be had nothing else asked for the cores."""
        mine, theirs = (np.array([step["cpu_seconds"] for step in lines]) for lines in self.steps)
        return float(np.median(theirs / mine))

    def peak_rss_bytes(self, side: int) -> int:
        """Peak resident memory of a side's process over its life, set-up included."""
        return max(step["peak_rss_bytes"] for step in self.steps[side])


def alternate(first: Side, second: Side, rounds: int) -> Result:
    """Start both sides, wait until both are warm, then let them step in turn, ``rounds`` times each.

    Both processes live throughout, so both models must fit into memory together. While one steps the other waits for
    a line and uses no processor.

    Raises:
        ChildDied: a side ended early.
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds: {rounds} is not at least 1")
    with tempfile.TemporaryDirectory() as folder:
        children: list[_Process] = []
        try:
            children = [_Process(side, Path(folder) / str(index)) for index, side in enumerate((first, second))]
            ready = tuple(child.read() for child in children)
            steps: tuple[list, list] = ([], [])
            for _ in range(rounds):
                for child, lines in zip(children, steps, strict=True):
                    lines.append(child.step())
        finally:
            for child in children:
                child.close()
    return summarise(ready, steps)


def summarise(ready: tuple[dict, dict], steps: tuple[list[dict], list[dict]]) -> Result:
    """Ratios round by round, their median and its 95% interval."""
    mine, theirs = (np.array([step["seconds"] for step in lines]) for lines in steps)
    ratios = theirs / mine
    low, high, coverage = median_interval(ratios)
    return Result(ready, steps, ratios, float(np.median(ratios)), low, high, coverage)


def median_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """A distribution-free interval of the median: the tightest symmetric pair of order statistics that covers it.

    The number of values below the median is Binomial(n, 1/2), so the k-th smallest and the k-th largest enclose it
    with probability ``1 - 2 P(X < k)``. Fewer than six values cannot reach 95%: then it is smallest to largest, and
    the coverage says how much that is.

    Returns:
        low, high, and the interval's coverage.
    """
    ordered, count = np.sort(values), len(values)
    rank = max(1, int(stats.binom.ppf((1 - level) / 2, count, 0.5)))
    coverage = 1 - 2 * float(stats.binom.cdf(rank - 1, count, 0.5))
    return float(ordered[rank - 1]), float(ordered[count - rank]), max(0.0, coverage)


class _Process:
    """A side's process, spoken to line by line."""

    def __init__(self, side: Side, folder: Path):
        self.name = side.name
        folder.mkdir()
        job, self._errors = folder / "job.json", folder / "stderr.txt"
        job.write_text(json.dumps(dict(side.job)))
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [*side.command, str(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(side.job["threads"], side.isolated),
            )

    def step(self) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # read() says what happened
            self._pipe("stdin").write("go\n")
            self._pipe("stdin").flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next line; raises ChildDied where there is none."""
        line = self._pipe("stdout").readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self._errors.read_text(errors="replace").splitlines()[-15:])
            raise ChildDied(f"{self.name} ended with exit code {code}; the last lines of its standard error:\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        """End the process: by closing its standard input, and where that does not help within a minute, by force."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe("stdin").close()
        if sys.exc_info()[0] is not None:
            self._process.kill()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe("stdout").close()

    def _pipe(self, name: str) -> IO[str]:
        pipe = getattr(self._process, name)
        assert pipe is not None
        return pipe


def environment(threads: int, isolated: bool) -> dict[str, str]:
    """A child's environment: threads fixed, no hub, no ``PYTHONPATH`` where it is isolated."""
    variables = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    if isolated:
        variables.pop("PYTHONPATH", None)
    return variables

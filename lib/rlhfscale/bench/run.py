"""One case from start to finish: both sides are started, alternated and summed up in a row of the table."""

import shutil
import sys
from pathlib import Path
from typing import Any

from rlhfscale.bench import flops, rounds
from rlhfscale.bench.cases import CASES, PEERS, Case, jobs
from rlhfscale.samplers import vllm
from rlhfscale.study.params import ParamsError

MIB = 2**20


def select(what: str, peer_python: str) -> list[Case]:
    """The cases of a benchmark, of ``all``, or one by name; of ``all``, vLLM's are left out where it is missing.

    Raises ParamsError for an unknown name, or where a peer is not installed.
    """
    benches = sorted({case.bench for case in CASES.values()})
    chosen = [case for case in CASES.values() if what in ("all", case.bench, case.name)]
    if not chosen:
        raise ParamsError(f"bench: {what!r} is not one of all, {', '.join(benches)}, {', '.join(CASES)}")
    if any(case.bench == "ppo" for case in chosen) and shutil.which(peer_python) is None:
        raise ParamsError(f"--peer-python: {peer_python} is not there; `make bench` sets up PPO's peer")
    if any(case.bench == "vllm" for case in chosen) and not vllm.available():
        if what != "all":
            raise ParamsError("vllm is not installed; make setup EXTRAS=vllm")
        print("left out: the cases against vllm, which is not installed; make setup EXTRAS=vllm", file=sys.stderr)
        chosen = [case for case in chosen if case.bench != "vllm"]
    return chosen


def timed(
    case: Case,
    folder: Path,
    *,
    peer_python: str = sys.executable,
    num_rounds: int | None = None,
    threads: int = 1,
    seed: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Time both sides of a case, ours first in each round.

    Args:
        case: from `cases.CASES`.
        folder: where models are prepared, once.
        peer_python: the Python of the peer's environment; PPO's peer needs that of requirements/bench.txt.
        num_rounds: steps of each side; the case's own number by default.
        threads: of each side.
        seed: of data and sides.
        changes: replace fields of the case's size.

    Returns:
        the table's row: the two sides (see `_side`), the ratio of their wall seconds, the peer's over ours, with its
        interval, and the rounds behind it.

    Raises:
        rounds.ChildDied: a side failed.
    """
    mine, theirs = jobs(case, folder, threads=threads, seed=seed, **changes)
    name, script = PEERS[case.bench]
    peers = Path(__file__).parent / "peers"
    result = rounds.alternate(
        rounds.Side("rlhfscale", [sys.executable, "-m", "rlhfscale.bench.ours"], mine),
        rounds.Side(
            name, [peer_python if case.bench == "ppo" else sys.executable, str(peers / script)], theirs, isolated=True
        ),
        num_rounds or case.rounds,
    )
    own_dtype = _compute_dtype(mine)
    peaks = {dtype: flops.matmul_peak(dtype, threads) for dtype in {own_dtype, case.dtype}}
    return {
        "case": case.name,
        "dtype": case.dtype,
        "size": {**case.size, **changes},
        "threads": threads,
        "ours": _side("rlhfscale", result, 0, peaks[own_dtype]) | {"dtype": own_dtype, "settings": case.ours},
        "peer": _side(name, result, 1, peaks[case.dtype]) | {"dtype": case.dtype, "settings": case.peer},
        "ratio": result.ratio,
        "ci_low": result.ci_low,
        "ci_high": result.ci_high,
        "ci_coverage": result.coverage,
        "ci_method": result.ci_method,
        "ratios": result.ratios.tolist(),
        "cpu_ratio": result.cpu_ratio,
        "matmul_peak_flops_per_s": peaks,
    }


def _compute_dtype(job: dict[str, Any]) -> str:
    return job.get("options", {}).get("compute_dtype", job["dtype"])


def _side(name: str, result: rounds.Result, index: int, peak: float) -> dict[str, Any]:
    """One side's part of the row: medians over rounds; FLOPs are those of a step's matrix products and attention."""
    steps, seconds = result.steps[index], result.seconds(index)
    work = result.ready[index]["flops"]
    timing = {"seconds", "cpu_seconds", "peak_rss_bytes"}
    return {
        "name": name,
        "seconds": seconds,
        "seconds_by_round": [step["seconds"] for step in steps],
        "cpu_seconds_by_round": [step["cpu_seconds"] for step in steps],
        "peak_rss_mib": result.peak_rss_bytes(index) / MIB,
        "flops": work,
        "flops_per_s": work / seconds,
        "share_of_matmul_peak": work / seconds / peak,
        **{count: value for count, value in steps[-1].items() if count not in timing},
    }

"""The planner's numbers beside measured ones: ``python tests/planned_against_measured.py [CASE ...]``.

Each case makes one artifact by its stage's own function, in a fresh process of one thread, after its parents have been
made in the store. Measured are the peak of the process's resident memory, and the FLOPs that torch's counter sees in a
second run. Predicted are both, by `rlhfscale.planning`: from the spec alone, and with the lengths of the data as they
turned out. Memory of a process that has imported everything and computed next to nothing, the runtime, is measured
once in a process of its own and added to every prediction: one number for all cases.

Tables go to results/laptop/plan_check/.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rlhfscale.bed import specs
from rlhfscale.bed.workloads import EVEN
from rlhfscale.bench.peers.protocol import counter
from rlhfscale.chat import specs as chat_specs
from rlhfscale.claims import real_model
from rlhfscale.planning.memory import Layout, peak
from rlhfscale.planning.workloads import ROLLOUT_BATCH, TOKENS_PER_PASS, Lengths, workload
from rlhfscale.runs import grid, paths
from rlhfscale.runs.pool import worker_environment
from rlhfscale.runs.spec import Spec
from rlhfscale.runs.store import Store
from rlhfscale.study import recipes

NAME = "plan_check"
MIB = 2**20
Drawn = Sequence[tuple[np.ndarray, np.ndarray]]


def cases() -> dict[str, Spec]:
    """A spec of every kind of stage, small enough for a minute."""
    recipe = recipes.load("laptop")

    def tuned(rung: str, documents: int) -> specs.SFT:
        base = recipe.pretrain(rung).changed(num_documents=documents)
        return recipe.sft(rung).changed(base=base, num_documents=max(640, documents // 8))

    labels, small, large = tuned("25k", 24000), tuned("150k", 9600), tuned("980k", 3200)
    scorer = recipe.reward_model("330k", 0)
    data = scorer.data[0].changed(model=labels, num_prompts=1600)
    held_out = scorer.held_out[0].changed(model=labels, num_prompts=256)
    scorer = scorer.changed(base=tuned("330k", 6400), data=(data,), held_out=(held_out,), epochs=1, num_prompts=800)
    policies = {
        f"policy-{rung}": recipe.policy(rung, "330k", 0).changed(sft=sft, reward_model=scorer, num_updates=3)
        for rung, sft in (("150k", small), ("980k", large))
    }
    real = real_model.Params(
        recipe="smoke",
        seeds=(1, 2),
        checkpoint="smollm2-135m",
        tasks=("lcm", "letter_counting"),
        ppo=("score-lora", "score-qlora"),
        num_questions=16,
        updates=2,
        policy_lr=1e-4,
        kl_coefficient=0.05,
        eval_prompts=8,
        eval_samples=4,
    )
    return {
        "pretrain-330k": recipe.pretrain("330k").changed(num_documents=6400),
        "sft-980k": large,
        "reward-330k": scorer,
        **policies,
        "answers-smollm2": real.evaluation("chat", 1),
        "sft-smollm2": real.tuned(1),
        "reward-smollm2": real.reward_model(1),
        "ppo-smollm2-bf16": real.aligned("score-lora", 1),
        "ppo-smollm2-nf4": real.aligned("score-qlora", 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="*", help=f"of {', '.join(cases())}; all by default")
    parser.add_argument("--store", type=Path, help="artifact store of the parents")
    parser.add_argument("--results", type=Path, help="results folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    store = Store(options.store)
    if options.child:
        print(json.dumps(_measure(options.child, store)))
        return
    chosen = {name: spec for name, spec in cases().items() if not options.case or name in options.case}
    grid.ensure([parent for spec in chosen.values() for parent in spec.parents], store=store, workers=1)
    runtime = _in_process("idle", store)["peak_bytes"]
    rows = [_row(name, spec, runtime, store) for name, spec in chosen.items()]
    folder = (options.results or paths.results_root()).absolute() / "laptop" / NAME
    save(pd.DataFrame(rows), folder)
    print(f"tables: {folder}")


def _row(name: str, spec: Spec, runtime: float, store: Store) -> dict[str, Any]:
    found = _in_process(name, store)
    known = {each: found["lengths"][each.key] for each in spec.walk() if each.key in found["lengths"]}
    known = {each: Lengths(**values) for each, values in known.items()}
    layout = Layout("fused", 1, 1, TOKENS_PER_PASS, runtime)
    guessed, informed = workload(spec), workload(spec, known)
    memory = peak(informed, layout)
    row = {
        "case": name,
        "stage": spec.stage,
        "flops_measured": found["flops"],
        "flops_from_spec": sum(guessed.flops("fused").values()),
        "flops_predicted": sum(informed.flops("fused").values()),
        "peak_mib_measured": found["peak_bytes"] / MIB,
        "peak_mib_from_spec": peak(guessed, layout).total / MIB,
        "peak_mib_predicted": memory.total / MIB,
        "runtime_mib": runtime / MIB,
        "peak_phase": memory.phase,
    }
    above = found["peak_bytes"] - runtime
    row["flops_ratio"] = row["flops_predicted"] / row["flops_measured"]
    row["peak_ratio"] = memory.total / found["peak_bytes"]
    row["peak_ratio_above_runtime"] = (memory.total - runtime) / above
    row |= {f"{part}_mib": value / MIB for part, value in memory.parts.items() if part != "runtime"}
    line = ("flops_ratio", "peak_ratio", "peak_ratio_above_runtime")
    print(name, {column: round(float(row[column]), 3) for column in line}, flush=True)
    return row


def _in_process(name: str, store: Store) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, "--store", str(store.root)]
    done = subprocess.run(command, env=os.environ | worker_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(name: str, store: Store) -> dict[str, Any]:
    """Make a case twice, for its memory and then for its FLOPs; or ``idle``: import everything and compute little."""
    from rlhfscale.bed import stages
    from rlhfscale.chat import stages as chat_stages
    from rlhfscale.models.allocator import keep_freed_memory

    keep_freed_memory()
    if name == "idle":
        return _idle(stages)
    spec = cases()[name]
    inputs = {parent.key: store.open(parent.key) for parent in spec.parents}
    stage = getattr(
        chat_stages if spec.runner.startswith("rlhfscale.chat.specs") else stages, spec.runner.split(":")[1]
    )
    with tempfile.TemporaryDirectory(dir=store.root) as first:
        stage(spec, inputs, Path(first))
        bytes_ = peak_bytes()
    with tempfile.TemporaryDirectory(dir=store.root) as second:
        with counter() as count, _sampled_by() as drawn:
            stage(spec, inputs, Path(second))
        lengths = lengths_of(spec, Path(second), inputs, drawn)
    return {"peak_bytes": bytes_, "flops": count.get_total_flops(), "lengths": lengths}


@contextmanager
def _sampled_by() -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Within this context: collects prompts' and responses' lengths, each int64 [request], of what is decoded
    together."""
    from rlhfscale.samplers import hf

    decode, drawn = hf._decode, []

    def recorded(make, device, prompts, rows, out, *rest) -> None:
        decode(make, device, prompts, rows, out, *rest)
        drawn.append((np.array([len(prompt) for prompt in prompts]), out.lengths[rows].copy()))

    hf._decode = recorded
    try:
        yield drawn
    finally:
        hf._decode = decode


def _idle(stages: Any) -> dict[str, Any]:
    """All libraries of any case loaded, and a training step of the smallest rung."""
    import bitsandbytes  # noqa: F401

    spec = recipes.load("laptop").pretrain("14k").changed(num_documents=64, batch_size=64)
    with tempfile.TemporaryDirectory() as folder:
        stages.pretrain(spec, {}, Path(folder))
    return {"peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def lengths_of(spec: Spec, folder: Path, inputs: Mapping[str, Path], drawn: Drawn) -> dict[str, dict[str, float]]:
    """Lengths of a stage's data by the key of the spec that made them, or of the stage's own for what it sampled."""
    found = {}
    for source in {spec, *spec.parents}:
        where = folder if source == spec else inputs[source.key]
        if isinstance(source, specs.Samples | chat_specs.Answers):
            found[source.key] = vars(_sampled(source, where, inputs))
    if isinstance(spec, specs.Policy | chat_specs.Aligned):
        found[spec.key] = vars(_rolled_out(drawn))
    if isinstance(spec, chat_specs.Tuned):
        found[spec.key] = vars(_accepted(spec, inputs))
    return found


def _sampled(spec: specs.Samples | chat_specs.Answers, folder: Path, inputs: Mapping[str, Path]) -> Lengths:
    """Of responses that lie in a folder."""
    if isinstance(spec, specs.Samples):
        from rlhfscale.bed.responses import Responses

        found = Responses.load(folder / "responses.safetensors")
        prompts, responses, ids, gold = found.prompt_lengths, found.response_lengths, found.response_ids, found.gold
        batch = ROLLOUT_BATCH
    else:
        from rlhfscale.chat import answers

        kept = answers.Answers.load(folder)
        prompts = np.array([len(row) for row in answers.encode(kept.questions, _tokenizer(spec.model, inputs))])
        responses, ids, gold, batch = kept.lengths, kept.ids, kept.right, language_batch()
    prompts, responses = prompts.astype(float), responses.astype(float)
    differ = gold.min(1) < gold.max(1)
    distinct = [
        len({(*row[:n].tolist(),) for row, n in zip(*pair, strict=True)})
        for pair in zip(ids, responses.astype(int), strict=True)
    ]
    return Lengths(
        prompt=float(prompts.mean()),
        response=float(responses.mean()),
        longest=float((prompts[:, None] + responses).max()),
        spread=EVEN * float((prompts + responses.mean(1)).std()),
        idle=idle_steps(np.repeat(prompts, responses.shape[1]), responses.ravel(), batch),
        compared=float(differ.mean()),
        distinct=float(np.mean(distinct)) / responses.shape[1],
        accepted=float((gold > 0.999).any(1).mean()),
    )


def language_batch() -> int:
    from rlhfscale.chat.stages import BATCH

    return BATCH


def _tokenizer(model: Any, inputs: Mapping[str, Path]):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(inputs[model.saved.key] / "model", local_files_only=True)


def _rolled_out(drawn: Drawn) -> Lengths:
    """Of a trainer's own roll-outs."""
    prompts, responses = (np.concatenate(part).astype(float) for part in zip(*drawn, strict=True))
    steps = sum(idle_steps(*batch, len(batch[0])) * (batch[1] - 1).sum() for batch in drawn)
    return Lengths(
        float(prompts.mean()),
        float(responses.mean()),
        float((prompts + responses).max()),
        EVEN * float((prompts + responses).std()),
        idle=float(steps / max(1.0, (responses - 1).sum())),
    )


def _accepted(spec: chat_specs.Tuned, inputs: Mapping[str, Path]) -> Lengths:
    """Of the right answers that a chat model is tuned on."""
    from rlhfscale.chat import answers

    kept, tokenizer = answers.Answers.load(inputs[spec.data.key]), _tokenizer(spec.base, inputs)
    rows = kept.accepted(tokenizer)
    prompts, lengths = rows.prompt_lengths.astype(float), rows.lengths.astype(float)
    return Lengths(
        float(prompts.mean()),
        float((lengths - prompts).mean()),
        float(lengths.max()),
        EVEN * float(lengths.std()),
        accepted=len(rows) / len(kept.questions),
    )


def idle_steps(prompts: np.ndarray, responses: np.ndarray, batch: int) -> float:
    """Steps that `samplers.hf` computes for each that is kept: requests leave a batch once half of it have ended."""
    order, computed = np.argsort(prompts, kind="stable"), 0
    for start in range(0, len(order), batch):
        left = responses[order[start : start + batch]]
        size = len(left)
        for step in range(1, int(left.max())):
            going = (left > step).sum()
            size = going if going < size / 2 else size
            computed += size
    return computed / max(1.0, (responses - 1).sum())


def save(table: pd.DataFrame, folder: Path) -> None:
    """plan_check.csv with everything, plan_check.md with what matters. Cases that were not run keep their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{NAME}.csv"
    if file.exists():
        old = pd.read_csv(file)
        table = pd.concat([old[~old["case"].isin(table["case"])], table])
    order = {name: place for place, name in enumerate(cases())}
    table = table.sort_values("case", key=lambda names: names.map(order))
    table.to_csv(file, index=False, float_format="%.6g")
    lines = [
        "| case | GFLOPs measured | predicted | ratio | from the spec alone | peak MiB measured | predicted | ratio |"
        " above the runtime, ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        alone = row.flops_from_spec / row.flops_measured
        lines.append(
            f"| {row.case} | {row.flops_measured / 1e9:.4g} | {row.flops_predicted / 1e9:.4g} | {row.flops_ratio:.3f} |"
            f" {alone:.2f} | {row.peak_mib_measured:.0f} | {row.peak_mib_predicted:.0f} | {row.peak_ratio:.3f} |"
            f" {row.peak_ratio_above_runtime:.2f} |"
        )
    runtime = f"The runtime alone takes {table['runtime_mib'].iloc[-1]:.0f} MiB, measured once; it is part of both."
    (folder / f"{NAME}.md").write_text("\n".join([*lines, "", runtime, ""]))


if __name__ == "__main__":
    main()

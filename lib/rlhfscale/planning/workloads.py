"""What a spec's stage computes: passes through networks, how many of them, and what it holds and keeps.

The formulas of a stage stand in its own room, in ``workloads.py`` beside ``stages.py``, under the stage's name: see
`bed.workloads`, `chat.workloads` and `evals.workloads`. Here is what they are written in, and what they share.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhfscale.planning.network import Kernels, Network, merge_flops
from rlhfscale.planning.passes import Decode, Pass, Rows
from rlhfscale.runs.spec import Spec

ROLLOUT_BATCH = 1024
"""Requests decoded together: `samplers.hf.sample`'s."""
TOKENS_PER_PASS = 16384
"""`rl.config.Config.max_tokens_per_pass`, and `rewards.scorer.TOKENS_PER_MICRO_BATCH`."""
BUCKETED = 32
"""Batches that are sorted by length together, see `data.documents.bucketed_batches`."""


@dataclass(frozen=True)
class Lengths:
    """Of data: what a plan estimates and a measurement knows.

    Attributes:
        prompt, response: tokens on average, end of sequence included.
        longest: of prompt and response together.
        spread: from the shortest to the longest, of even lengths with the same standard deviation.
        idle: steps of decoding for each token that is kept, see `passes.Decode`.
        compared: share of the prompts whose responses are not all alike in gold.
        distinct: share of those prompts' responses that differ from each other.
        accepted: share of the questions with a right answer among the samples.
    """

    prompt: float
    response: float
    longest: float
    spread: float = 0.0
    idle: float = 1.25
    compared: float = 0.7
    distinct: float = 0.7
    accepted: float = 0.4


@dataclass(frozen=True)
class Phase:
    """A part of a stage.

    Attributes:
        name: ``roll-outs``, ``scoring``, ``evaluation`` or ``updates``.
        work: what is computed.
        together: sequences of the work whose activations are held at the same time, a step's batch.
        splits: whether the stage itself cuts a batch into micro-batches, one after the other.
        other_flops: of the optimiser.
        other_bytes: held in this phase only, in the machine's memory.
    """

    name: str
    work: tuple[Pass | Decode, ...]
    together: float = 0.0
    splits: bool = True
    other_flops: float = 0.0
    other_bytes: float = 0.0

    def flops(self, kernels: Kernels, checkpointing: bool = False) -> float:
        return self.other_flops + sum(part.flops(kernels, checkpointing) for part in self.work)

    @property
    def tokens(self) -> float:
        """Tokens read or sampled, each as often as it is."""
        return sum(part.times * part.rows.count * part.rows.length for part in self.work)

    @property
    def learns(self) -> bool:
        return any(isinstance(part, Pass) and part.gradients for part in self.work)


@dataclass(frozen=True)
class Workload:
    """A stage's work.

    Attributes:
        networks: what is in memory throughout.
        phases: one after the other; the memory of one is given back before the next.
        storage_bytes: of the artifact.
        data_bytes: of its data, in the machine's memory.
        checkpointing: whether only the input of each layer is kept for the backward pass.
        tokens_per_pass: that are computed at a time, where a phase splits its batches.
    """

    networks: tuple[Network, ...]
    phases: tuple[Phase, ...]
    storage_bytes: float
    data_bytes: float = 0.0
    checkpointing: bool = False
    tokens_per_pass: int = TOKENS_PER_PASS

    def flops(self, kernels: Kernels) -> dict[str, float]:
        """By phase."""
        found: dict[str, float] = {}
        for phase in self.phases:
            found[phase.name] = found.get(phase.name, 0.0) + phase.flops(kernels, self.checkpointing)
        return found

    @property
    def tokens(self) -> float:
        return sum(phase.tokens for phase in self.phases)


def workload(spec: Spec, known: Mapping[Spec, Lengths] | None = None) -> Workload:
    """What making a spec's artifact takes.

    Args:
        known: lengths of the data that a spec makes or reads, instead of estimates.

    Raises:
        ValueError: a kind of spec, or a model, of which nothing is known.
    """
    formula = _formula(spec)
    if formula is None:
        raise ValueError(f"{spec.title}: no plan for the stage {spec.stage}")
    return formula(spec, known or {})


def is_known(spec: Spec) -> bool:
    """Whether there are formulas for a kind of spec."""
    return _formula(spec) is not None


def _formula(spec: Spec) -> Any:
    """The function of the spec's stage in ``workloads.py`` beside its ``stages.py``; None where there is none."""
    module, _, function = spec.runner.partition(":")
    room = module.rpartition(".")[0]
    try:
        found = importlib.import_module(f"{room}.workloads" if room else "workloads")
    except ModuleNotFoundError:
        return None
    return getattr(found, function, None)


def in_batches(rows: Rows, lengths: Lengths, batch: float) -> Rows:
    """Rows in batches of similar length."""
    spread = lengths.spread / min(BUCKETED, max(1.0, rows.count / batch))
    return replace(rows, spread=spread, together=min(batch, rows.count))


def policy_updates(
    spec: Any, network: Network, reward: Network, lengths: Lengths, minibatch: float | None, separate: bool
) -> tuple[Phase, ...]:
    """All updates of PPO, GRPO or RLOO: see `rl.ppo.PPO.update`."""
    count = spec.prompts_per_update * spec.responses_per_prompt
    minibatch = minibatch or count
    rows = Rows(count, lengths.prompt, lengths.response, spec.responses_per_prompt, longest=lengths.longest)
    rows = replace(rows, spread=lengths.spread)
    part = replace(rows.share(minibatch / count), group=max(1.0, rows.group * minibatch / count))
    # the first minibatch's values and gradients serve its step too, where it is computed in one pass
    reused = minibatch * lengths.longest <= TOKENS_PER_PASS
    others = rows.share(1 - minibatch / count if reused else 1.0)
    updates, steps = spec.num_updates, spec.epochs * count / minibatch
    shared = reward == network
    scored = Pass(reward, replace(rows, read="last" if shared else rows.read), shared, "scalar", times=updates)
    read = [Pass(network, rows, head="vocabulary", times=updates)]
    read.append(Pass(network, others, True, "vocabulary", times=updates))
    learnt = [Pass(network, part, True, "vocabulary", gradients=True, times=steps * updates)]
    if separate:
        read.append(Pass(network, others, True, "scalar", times=updates))
        learnt.append(Pass(network, part, True, "scalar", gradients=True, times=steps * updates))
    decode = Decode(network, rows, ROLLOUT_BATCH, idle=lengths.idle, times=updates)
    together = TOKENS_PER_PASS / lengths.longest
    return (
        Phase("roll-outs", (decode,)),
        Phase("scoring", (scored,), together),
        Phase("evaluation", tuple(read), together),
        Phase("updates", tuple(learnt), minibatch, other_flops=updates * steps * merge_flops(network)),
    )

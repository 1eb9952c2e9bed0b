"""What the stages of the bed compute, by formula: to be read beside `bed.stages`, whose functions have the same names.

Lengths that are known only once the data are there are estimated from some drawn demonstrations; ``known`` has what a
measurement puts in their place.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Any

from rlhfscale.bed import ladder, specs
from rlhfscale.bed.tasks import FAMILIES, MAX_RESPONSE_TOKENS
from rlhfscale.planning.network import Network, merge_flops, muon_flops
from rlhfscale.planning.passes import Decode, Pass, Rows
from rlhfscale.planning.workloads import (
    ROLLOUT_BATCH,
    TOKENS_PER_PASS,
    Lengths,
    Phase,
    Workload,
    in_batches,
    policy_updates,
)
from rlhfscale.runs.spec import Spec

CALIBRATED_PROMPTS = 256
"""Prompts of each source that a rung's reward model is calibrated on."""
HELD_OUT_DOCUMENTS, LOSS_POINTS = 1024, 8
"""Of pretraining's held-out loss, measured so many times and once at the end."""
DOCUMENT_BYTES = 3500.0
"""A demonstration in memory: its problem as Python objects, and its row of ids."""
EVEN = 12**0.5
"""From the shortest to the longest, in standard deviations, where all lengths between are as frequent."""


@lru_cache
def chain_lengths(families: tuple[str, ...], count: int = 512) -> Lengths:
    """Of the laptop bed's demonstrations, by drawing some."""
    from rlhfscale.bed.demonstrations import demonstrations  # it draws problems, which a plan for GPUs need not

    drawn = demonstrations((0,), "train", families, count, 0.0)
    prompt, whole = drawn.prompt_lengths, drawn.lengths
    longest = float(prompt.max() + MAX_RESPONSE_TOKENS)
    return Lengths(float(prompt.mean()), float((whole - prompt).mean()), longest, EVEN * float(whole.std()))


def _chains(spec: Any, families: tuple[str, ...], known: Mapping[Spec, Lengths]) -> Lengths:
    return known.get(spec) or chain_lengths(tuple(sorted(families)))


def _documents(count: float, lengths: Lengths, read: str) -> Rows:
    """Documents without their last token, which predicts nothing."""
    return Rows(count, lengths.prompt - 1, lengths.response, read=read, longest=lengths.longest)


def _rung(name: str, **options: Any) -> Network:
    return Network(ladder.rung(name).shape, "fp32", "fp32", **options)


def pretrain(spec: specs.Pretrain, known: Mapping[Spec, Lengths]) -> Workload:
    network, lengths = _rung(spec.rung, whole=True), _chains(spec, tuple(FAMILIES), known)
    train = Pass(network, _documents(spec.num_documents, lengths, "all"), head="vocabulary", gradients=True)
    held_out = _documents(HELD_OUT_DOCUMENTS, lengths, "response")
    steps = ceil(spec.num_documents / spec.batch_size)
    return Workload(
        (network,),
        (
            Phase("updates", (train,), spec.batch_size, False, steps * muon_flops(network.shape)),
            Phase("evaluation", (Pass(network, held_out, head="vocabulary", times=LOSS_POINTS + 1),), 256),
        ),
        network.storage_bytes["weights"],
        spec.num_documents * DOCUMENT_BYTES,
    )


def sft(spec: specs.SFT, known: Mapping[Spec, Lengths]) -> Workload:
    network, lengths = _rung(spec.rung, whole=True), _chains(spec, spec.families, known)
    train = Pass(network, _documents(spec.num_documents, lengths, "response"), head="vocabulary", gradients=True)
    steps = ceil(spec.num_documents / spec.batch_size)
    return Workload(
        (network,),
        (Phase("updates", (train,), spec.batch_size, False, steps * muon_flops(network.shape)),),
        network.storage_bytes["weights"],
        spec.num_documents * DOCUMENT_BYTES,
    )


def samples(spec: specs.Samples, known: Mapping[Spec, Lengths]) -> Workload:
    network, lengths = _rung(spec.model.rung), _chains(spec, spec.families, known)
    count = spec.num_prompts * spec.num_samples
    rows = Rows(count, lengths.prompt, lengths.response, spec.num_samples, longest=lengths.longest)
    decode = Decode(network, rows, ROLLOUT_BATCH, adapter=False, idle=lengths.idle)
    storage = count * (8 * lengths.longest + 16)
    return Workload((network,), (Phase("roll-outs", (decode,)),), storage, spec.num_prompts * DOCUMENT_BYTES)


def _trained_on_labels(spec: Any, known: Mapping[Spec, Lengths]) -> Workload:
    """Reward models of the rungs, from comparisons, from steps or from both."""
    rank, read = spec.lora_rank, "response" if getattr(spec, "readout", "sum") == "sum" else "last"
    whole = rank == 0
    network = _rung(spec.rung, rank=rank, trained=int(not whole), whole=whole)
    pairs_alone = isinstance(spec, specs.RewardModel) and spec.loss == "pairs"
    share = ceil(spec.num_prompts / len(spec.data))
    updates, flops, batch = [], 0.0, 0.0
    for source in spec.data:
        lengths, samples = _chains(source, source.families, known), source.num_samples
        compared = lengths.compared * share if pairs_alone else share
        distinct = max(1.0, lengths.distinct * samples) if isinstance(spec, specs.RewardModel) else samples
        rows = Rows(compared * distinct, lengths.prompt, lengths.response, distinct, read, lengths.longest)
        prompts = getattr(spec, "prompts_per_batch", None) or spec.responses_per_batch / samples
        learnt = in_batches(rows, lengths, prompts * distinct)
        updates.append(Pass(network, learnt, not whole, "scalar", gradients=True, times=spec.epochs))
        steps = spec.epochs * ceil(compared / prompts)
        flops += steps * (muon_flops(network.shape) if whole else merge_flops(network))
        batch = max(batch, prompts * distinct)
    scored = []
    for source, prompts in (
        *((source, min(share, CALIBRATED_PROMPTS)) for source in spec.data),
        *((source, source.num_prompts) for source in spec.held_out),
    ):
        lengths, samples = _chains(source, source.families, known), source.num_samples
        distinct = max(1.0, lengths.distinct * samples)
        rows = Rows(prompts * distinct, lengths.prompt, lengths.response, distinct, read, lengths.longest)
        scored.append(Pass(network, rows, head="scalar"))
    return Workload(
        (network,),
        (
            Phase("updates", tuple(updates), batch, False, flops),
            Phase("scoring", tuple(scored), TOKENS_PER_PASS / lengths.longest),
        ),
        network.storage_bytes["weights"],
    )


def policy(spec: specs.Policy, known: Mapping[Spec, Lengths]) -> Workload:
    separate = spec.critic == "separate"
    network = _rung(spec.rung, rank=spec.lora_rank, trained=1 + separate, reads_base=True)
    reward = _rung(spec.reward_model.rung)
    lengths = _chains(spec, spec.sft.families, known)
    phases = policy_updates(spec, network, reward, lengths, spec.minibatch_size, separate)
    if getattr(spec.reward_model, "readout", "sum") == "last":
        scoring = phases[1]
        rows = replace(scoring.work[0].rows, read="last")
        phases = (phases[0], replace(scoring, work=(replace(scoring.work[0], rows=rows),)), *phases[2:])
    storage = network.storage_bytes["weights"] + (1 + separate) * network.storage_bytes["adapter"]
    prompts = spec.num_updates * spec.prompts_per_update
    return Workload((network, reward), phases, storage, prompts * DOCUMENT_BYTES)


def scores(spec: specs.Scores, known: Mapping[Spec, Lengths]) -> Workload:
    network, source = _rung(spec.reward_model.rung), spec.samples
    lengths, count = _chains(source, source.families, known), source.num_prompts * source.num_samples
    group = max(1.0, lengths.distinct * source.num_samples)
    rows = Rows(source.num_prompts * group, lengths.prompt, lengths.response, group, longest=lengths.longest)
    scoring = Phase("scoring", (Pass(network, rows, head="scalar"),), TOKENS_PER_PASS / lengths.longest)
    return Workload((network,), (scoring,), 4.0 * count, count * 16 * lengths.longest)


reward_model = process_reward_model = mixed_reward_model = _trained_on_labels

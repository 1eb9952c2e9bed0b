"""What the stages on published models compute, by formula: to be read beside `chat.stages`, under the same names.

Lengths of conversations are rough estimates; ``known`` has what a measurement puts in their place.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from rlhfscale.chat import specs
from rlhfscale.models.checkpoints import shape_of
from rlhfscale.planning.network import BYTES, Network, merge_flops
from rlhfscale.planning.passes import Decode, Pass, Rows
from rlhfscale.planning.workloads import TOKENS_PER_PASS, Lengths, Phase, Workload, in_batches, policy_updates
from rlhfscale.runs.spec import Spec

ANSWER_BATCH, GPU_BATCH = 64, 256
"""Requests decoded together by `chat.stages`."""
CALIBRATED_SHARE = 1 / 4
"""Share of the questions that a reward model is calibrated on."""
SPREAD = 20.0
"""Rough spread of conversations' lengths."""
ADAPTER_RANK = 16
"""Of the adapter that `chat.stages.load` puts on a model that is only read."""


def question_lengths(answers: specs.Answers) -> Lengths:
    """Rough ones of conversations and answers; those of a model that was not tuned fill half of their room."""
    most = answers.max_new_tokens
    tuned = not isinstance(answers.model, specs.Chat)
    response = min(specs.RESPONSE_TOKENS if tuned else 0.6 * most, most)
    return Lengths(specs.PROMPT_TOKENS, response, 1.5 * specs.PROMPT_TOKENS + most, SPREAD)


def _precision(model: Any, default: str = "bf16") -> str:
    """What a model's weights are loaded in; an aligned model keeps what it was trained in."""
    if isinstance(model, specs.Aligned):
        return model.precision
    return model.chat.precision or default


def _language(model: Any, default: str = "bf16", **options: Any) -> Network:
    return Network(shape_of(model.checkpoint), _precision(model, default), "bf16", **options)


def _memory_for_time(model: Any) -> dict[str, Any]:
    """What `chat.stages` does for a large model."""
    large = model.chat.num_params >= specs.LARGE
    return {"checkpointing": large, "tokens_per_pass": specs.LARGE_TOKENS if large else TOKENS_PER_PASS}


def _questions(answers: specs.Answers) -> int:
    return len(answers.tasks) * answers.num_prompts


def chat(spec: specs.Chat, known: Mapping[Spec, Lengths]) -> Workload:
    network = Network(shape_of(spec.checkpoint), "bf16", "bf16")
    return Workload((network,), (), network.storage_bytes["weights"])


def answers(spec: specs.Answers, known: Mapping[Spec, Lengths]) -> Workload:
    rank = spec.model.lora_rank if isinstance(spec.model, specs.Aligned) else ADAPTER_RANK
    network, lengths = _language(spec.model, rank=rank, frozen=1), known.get(spec) or question_lengths(spec)
    count = _questions(spec) * spec.num_samples
    rows = Rows(count, lengths.prompt, lengths.response, spec.num_samples, longest=lengths.longest)
    batch = ANSWER_BATCH if spec.model.chat.precision is None else GPU_BATCH
    decode = Decode(network, rows, batch, idle=lengths.idle)
    storage = count * (4.0 * spec.max_new_tokens + 6) + 300.0 * _questions(spec)
    return Workload((network,), (Phase("roll-outs", (decode,)),), storage)


def tuned(spec: specs.Tuned, known: Mapping[Spec, Lengths]) -> Workload:
    network = _language(spec.base, "fp32", rank=spec.lora_rank, trained=1)
    lengths = known.get(spec) or replace(question_lengths(spec.data), response=specs.RESPONSE_TOKENS)
    count = lengths.accepted * _questions(spec.data)
    rows = Rows(count, lengths.prompt, lengths.response, longest=lengths.longest)
    rows = in_batches(rows, lengths, spec.batch_size)
    train = Pass(network, rows, True, "vocabulary", gradients=True, times=spec.epochs)
    steps = spec.epochs * ceil(count / spec.batch_size)
    copied = network.base_bytes + network.adapter_bytes + BYTES[network.stored] * network.shape.num_linear
    return Workload(
        (network,),
        (
            Phase("updates", (train,), spec.batch_size, False, steps * merge_flops(network)),
            # the adapters are folded into a copy, for which the layers' joined blocks are copied too
            Phase("saving", (), other_bytes=copied),
        ),
        network.storage_bytes["weights"],
        **_memory_for_time(spec),
    )


def answer_reward(spec: specs.AnswerReward, known: Mapping[Spec, Lengths]) -> Workload:
    network = _language(spec.base, rank=spec.lora_rank, trained=1)
    reader = replace(network, trained=0, frozen=2)
    updates, scored, batch = [], [], 0.0
    for source in spec.data:
        lengths, samples = known.get(source) or question_lengths(source), source.num_samples
        questions = len(source.tasks) * (spec.num_prompts or source.num_prompts)
        distinct = max(1.0, lengths.distinct * samples)
        rows = Rows(questions * distinct, lengths.prompt, lengths.response, distinct, "last", lengths.longest)
        learnt = in_batches(rows.share(lengths.compared), lengths, spec.prompts_per_batch * distinct)
        updates.append(Pass(network, learnt, True, "scalar", gradients=True, times=spec.epochs))
        scored.append(Pass(reader, rows.share(CALIBRATED_SHARE), True, "scalar"))
        batch = max(batch, spec.prompts_per_batch * distinct)
    for source in spec.held_out:
        lengths, samples = known.get(source) or question_lengths(source), source.num_samples
        distinct = max(1.0, lengths.distinct * samples)
        rows = Rows(_questions(source) * distinct, lengths.prompt, lengths.response, distinct, "last", lengths.longest)
        scored.append(Pass(reader, rows, True, "scalar"))
    return Workload(
        (network,),
        (
            Phase("updates", tuple(updates), batch, False),
            Phase("scoring", tuple(scored), TOKENS_PER_PASS / lengths.longest),
        ),
        network.storage_bytes["adapter"],
        **_memory_for_time(spec.base),
    )


def aligned(spec: specs.Aligned, known: Mapping[Spec, Lengths]) -> Workload:
    shares = spec.shares_base
    network = _language(spec, rank=spec.lora_rank, trained=1, frozen=int(shares), reads_base=True)
    reward = network
    if not shares:
        reward = _language(spec.reward_model.base, rank=spec.reward_model.lora_rank, frozen=2)
    lengths = known.get(spec)
    if lengths is None:
        response = min(specs.RESPONSE_TOKENS, spec.max_new_tokens)
        longest = 1.5 * specs.PROMPT_TOKENS + spec.max_new_tokens
        lengths = Lengths(specs.PROMPT_TOKENS, response, longest, SPREAD)
    phases = policy_updates(spec, network, reward, lengths, None, False)
    networks = (network,) if shares else (network, reward)
    return Workload(networks, phases, network.storage_bytes["adapter"], **_memory_for_time(spec))


def answer_scores(spec: specs.AnswerScores, known: Mapping[Spec, Lengths]) -> Workload:
    network = _language(spec.reward_model.base, rank=spec.reward_model.lora_rank, frozen=2)
    source, lengths = spec.answers, known.get(spec.answers) or question_lengths(spec.answers)
    group = max(1.0, lengths.distinct * source.num_samples)
    rows = Rows(_questions(source) * group, lengths.prompt, lengths.response, group, "last", lengths.longest)
    scoring = Phase("scoring", (Pass(network, rows, True, "scalar"),), TOKENS_PER_PASS / lengths.longest)
    storage = 4.0 * _questions(source) * source.num_samples
    return Workload((network,), (scoring,), storage, **_memory_for_time(spec.reward_model.base))

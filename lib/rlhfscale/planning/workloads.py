"""What a spec's stage computes: passes through networks, how many of them, and what it holds and keeps.

One function for each kind of spec, to be read beside the stage's own code (`stages`, `language_stages`). Lengths that
are known only once the data are there are estimated; `Lengths` are what a measurement puts in their place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Any

from rlhfscale.bed import ladder, specs
from rlhfscale.bed.tasks import FAMILIES, MAX_RESPONSE_TOKENS
from rlhfscale.chat import specs as chat_specs
from rlhfscale.chat.checkpoints import CHECKPOINTS
from rlhfscale.models.shapes import Shape
from rlhfscale.planning.passes import BYTES, Decode, Kernels, Network, Pass, Rows, merge_flops, muon_flops
from rlhfscale.runs.spec import Spec

ROLLOUT_BATCH, ANSWER_BATCH, GPU_BATCH = 1024, 64, 256
"""Requests decoded together: `samplers.hf.sample`'s, and those of `language_stages`."""
TOKENS_PER_PASS = 16384
"""`rl.config.Config.max_tokens_per_pass`, and `rewards.scorer.TOKENS_PER_MICRO_BATCH`."""
CALIBRATED_PROMPTS, CALIBRATED_SHARE = 256, 1 / 4
"""Prompts of each source that a rung's reward model is calibrated on; share of the questions, of a language model's."""
HELD_OUT_DOCUMENTS, LOSS_POINTS = 1024, 8
"""Of pretraining's held-out loss, measured so many times and once at the end."""
DOCUMENT_BYTES = 3500.0
"""A demonstration in memory: its problem as Python objects, and its row of ids."""
SPREAD = 20.0
"""Rough spread of conversations' lengths."""
ADAPTER_RANK = 16
"""Of the adapter that `language_stages.load` puts on a model that is only read."""
EVEN = 12**0.5
"""From the shortest to the longest, in standard deviations, where all lengths between are as frequent."""
BUCKETED = 32
"""Batches that are sorted by length together, see `data.documents.bucketed_batches`."""
JUDGED_TOKENS = 1000
"""Rough length of a judge's prompt."""


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
    if not is_known(spec):
        raise ValueError(f"{spec.title}: no plan for the stage {spec.stage}")
    return _BY_KIND[type(spec)](spec, known or {})


def is_known(spec: Spec) -> bool:
    """Whether there are formulas for a kind of spec."""
    return type(spec) in _BY_KIND


def rung_shape(name: str) -> Shape:
    """The shape of a rung of the ladder."""
    rung = ladder.rung(name)
    return Shape(
        layers=rung.layers,
        width=rung.width,
        feed_forward=rung.feed_forward,
        heads=rung.heads,
        kv_heads=rung.heads,
        head_width=rung.head_width,
        vocab=ladder.vocab_size(),
        tied=True,
    )


@lru_cache
def chain_lengths(families: tuple[str, ...], count: int = 512) -> Lengths:
    """Of the laptop bed's demonstrations, by drawing some."""
    from rlhfscale.bed.demonstrations import demonstrations

    drawn = demonstrations((0,), "train", families, count, 0.0)
    prompt, whole = drawn.prompt_lengths, drawn.lengths
    longest = float(prompt.max() + MAX_RESPONSE_TOKENS)
    return Lengths(float(prompt.mean()), float((whole - prompt).mean()), longest, EVEN * float(whole.std()))


def question_lengths(answers: chat_specs.Answers) -> Lengths:
    """Rough ones of conversations and answers; those of a model that was not tuned fill half of their room."""
    most = answers.max_new_tokens
    tuned = not isinstance(answers.model, chat_specs.Chat)
    response = min(chat_specs.RESPONSE_TOKENS if tuned else 0.6 * most, most)
    return Lengths(chat_specs.PROMPT_TOKENS, response, 1.5 * chat_specs.PROMPT_TOKENS + most, SPREAD)


def _chains(spec: Any, families: tuple[str, ...], known: Mapping[Spec, Lengths]) -> Lengths:
    return known.get(spec) or chain_lengths(tuple(sorted(families)))


def _in_batches(rows: Rows, lengths: Lengths, batch: float) -> Rows:
    """Rows in batches of similar length."""
    spread = lengths.spread / min(BUCKETED, max(1.0, rows.count / batch))
    return replace(rows, spread=spread, together=min(batch, rows.count))


def _documents(count: float, lengths: Lengths, read: str) -> Rows:
    """Documents without their last token, which predicts nothing."""
    return Rows(count, lengths.prompt - 1, lengths.response, read=read, longest=lengths.longest)


def _rung(name: str, **options: Any) -> Network:
    return Network(rung_shape(name), "fp32", "fp32", **options)


def _pretrain(spec: specs.Pretrain, known: Mapping[Spec, Lengths]) -> Workload:
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


def _sft(spec: specs.SFT, known: Mapping[Spec, Lengths]) -> Workload:
    network, lengths = _rung(spec.rung, whole=True), _chains(spec, spec.families, known)
    train = Pass(network, _documents(spec.num_documents, lengths, "response"), head="vocabulary", gradients=True)
    steps = ceil(spec.num_documents / spec.batch_size)
    return Workload(
        (network,),
        (Phase("updates", (train,), spec.batch_size, False, steps * muon_flops(network.shape)),),
        network.storage_bytes["weights"],
        spec.num_documents * DOCUMENT_BYTES,
    )


def _samples(spec: specs.Samples, known: Mapping[Spec, Lengths]) -> Workload:
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
    outcome = isinstance(spec, specs.RewardModel)
    share = ceil(spec.num_prompts / len(spec.data))
    updates, flops, batch = [], 0.0, 0.0
    for source in spec.data:
        lengths, samples = _chains(source, source.families, known), source.num_samples
        compared = lengths.compared * share if outcome else share
        distinct = max(1.0, lengths.distinct * samples) if outcome else samples
        rows = Rows(compared * distinct, lengths.prompt, lengths.response, distinct, read, lengths.longest)
        prompts = getattr(spec, "prompts_per_batch", None) or spec.responses_per_batch / samples
        learnt = _in_batches(rows, lengths, prompts * distinct)
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


def _policy(spec: specs.Policy, known: Mapping[Spec, Lengths]) -> Workload:
    separate = spec.critic == "separate"
    network = _rung(spec.rung, rank=spec.lora_rank, trained=1 + separate, reads_base=True)
    reward = _rung(spec.reward_model.rung)
    lengths = _chains(spec, spec.sft.families, known)
    phases = _updates(spec, network, reward, lengths, spec.minibatch_size, separate)
    if getattr(spec.reward_model, "readout", "sum") == "last":
        scoring = phases[1]
        rows = replace(scoring.work[0].rows, read="last")
        phases = (phases[0], replace(scoring, work=(replace(scoring.work[0], rows=rows),)), *phases[2:])
    storage = network.storage_bytes["weights"] + (1 + separate) * network.storage_bytes["adapter"]
    prompts = spec.num_updates * spec.prompts_per_update
    return Workload((network, reward), phases, storage, prompts * DOCUMENT_BYTES)


def _updates(
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


def _scores(spec: specs.Scores, known: Mapping[Spec, Lengths]) -> Workload:
    network, source = _rung(spec.reward_model.rung), spec.samples
    lengths, count = _chains(source, source.families, known), source.num_prompts * source.num_samples
    group = max(1.0, lengths.distinct * source.num_samples)
    rows = Rows(source.num_prompts * group, lengths.prompt, lengths.response, group, longest=lengths.longest)
    scoring = Phase("scoring", (Pass(network, rows, head="scalar"),), TOKENS_PER_PASS / lengths.longest)
    return Workload((network,), (scoring,), 4.0 * count, count * 16 * lengths.longest)


def checkpoint_shape(name: str) -> Shape:
    """Of a published model; of a folder nothing is known."""
    name = {"smollm2": "smollm2-135m"}.get(name, name)
    if name not in CHECKPOINTS:
        raise ValueError(f"{name}: a model of unknown shape cannot be planned; known: {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[name].shape


def _precision(model: Any, default: str = "bf16") -> str:
    """What a model's weights are loaded in; an aligned model keeps what it was trained in."""
    if isinstance(model, chat_specs.Aligned):
        return model.precision
    return model.chat.precision or default


def _language(model: Any, default: str = "bf16", **options: Any) -> Network:
    return Network(checkpoint_shape(model.checkpoint), _precision(model, default), "bf16", **options)


def _memory_for_time(model: Any) -> dict[str, Any]:
    """What `language_stages` does for a large model."""
    large = model.chat.num_params >= chat_specs.LARGE
    return {"checkpointing": large, "tokens_per_pass": chat_specs.LARGE_TOKENS if large else TOKENS_PER_PASS}


def _questions(answers: chat_specs.Answers) -> int:
    return len(answers.tasks) * answers.num_prompts


def _chat(spec: chat_specs.Chat, known: Mapping[Spec, Lengths]) -> Workload:
    network = Network(checkpoint_shape(spec.checkpoint), "bf16", "bf16")
    return Workload((network,), (), network.storage_bytes["weights"])


def _answers(spec: chat_specs.Answers, known: Mapping[Spec, Lengths]) -> Workload:
    rank = spec.model.lora_rank if isinstance(spec.model, chat_specs.Aligned) else ADAPTER_RANK
    network, lengths = _language(spec.model, rank=rank, frozen=1), known.get(spec) or question_lengths(spec)
    count = _questions(spec) * spec.num_samples
    rows = Rows(count, lengths.prompt, lengths.response, spec.num_samples, longest=lengths.longest)
    batch = ANSWER_BATCH if spec.model.chat.precision is None else GPU_BATCH
    decode = Decode(network, rows, batch, idle=lengths.idle)
    storage = count * (4.0 * spec.max_new_tokens + 6) + 300.0 * _questions(spec)
    return Workload((network,), (Phase("roll-outs", (decode,)),), storage)


def _tuned(spec: chat_specs.Tuned, known: Mapping[Spec, Lengths]) -> Workload:
    network = _language(spec.base, "fp32", rank=spec.lora_rank, trained=1)
    lengths = known.get(spec) or replace(question_lengths(spec.data), response=chat_specs.RESPONSE_TOKENS)
    count = lengths.accepted * _questions(spec.data)
    rows = Rows(count, lengths.prompt, lengths.response, longest=lengths.longest)
    rows = _in_batches(rows, lengths, spec.batch_size)
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


def _answer_reward(spec: chat_specs.AnswerReward, known: Mapping[Spec, Lengths]) -> Workload:
    network = _language(spec.base, rank=spec.lora_rank, trained=1)
    reader = replace(network, trained=0, frozen=2)
    updates, scored, batch = [], [], 0.0
    for source in spec.data:
        lengths, samples = known.get(source) or question_lengths(source), source.num_samples
        questions = len(source.tasks) * (spec.num_prompts or source.num_prompts)
        distinct = max(1.0, lengths.distinct * samples)
        rows = Rows(questions * distinct, lengths.prompt, lengths.response, distinct, "last", lengths.longest)
        learnt = _in_batches(rows.share(lengths.compared), lengths, spec.prompts_per_batch * distinct)
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


def _aligned(spec: chat_specs.Aligned, known: Mapping[Spec, Lengths]) -> Workload:
    shares = spec.shares_base
    network = _language(spec, rank=spec.lora_rank, trained=1, frozen=int(shares), reads_base=True)
    reward = network
    if not shares:
        reward = _language(spec.reward_model.base, rank=spec.reward_model.lora_rank, frozen=2)
    lengths = known.get(spec)
    if lengths is None:
        response = min(chat_specs.RESPONSE_TOKENS, spec.max_new_tokens)
        longest = 1.5 * chat_specs.PROMPT_TOKENS + spec.max_new_tokens
        lengths = Lengths(chat_specs.PROMPT_TOKENS, response, longest, SPREAD)
    phases = _updates(spec, network, reward, lengths, None, False)
    networks = (network,) if shares else (network, reward)
    return Workload(networks, phases, network.storage_bytes["adapter"], **_memory_for_time(spec))


def _answer_scores(spec: chat_specs.AnswerScores, known: Mapping[Spec, Lengths]) -> Workload:
    network = _language(spec.reward_model.base, rank=spec.reward_model.lora_rank, frozen=2)
    source, lengths = spec.answers, known.get(spec.answers) or question_lengths(spec.answers)
    group = max(1.0, lengths.distinct * source.num_samples)
    rows = Rows(_questions(source) * group, lengths.prompt, lengths.response, group, "last", lengths.longest)
    scoring = Phase("scoring", (Pass(network, rows, True, "scalar"),), TOKENS_PER_PASS / lengths.longest)
    storage = 4.0 * _questions(source) * source.num_samples
    return Workload((network,), (scoring,), storage, **_memory_for_time(spec.reward_model.base))


def _mt_bench(spec: specs.MTBench, known: Mapping[Spec, Lengths]) -> Workload:
    """Two turns of two policies, each judged by itself and in pairs in both orders."""
    policy = Network(checkpoint_shape(spec.before), "fp32" if spec.dtype == "fp32" else "bf16", spec.dtype)
    judge = Network(checkpoint_shape(spec.judge.partition(":")[2]), policy.stored, spec.dtype)
    answers, judgments = 4.0 * spec.num_questions, 8.0 * spec.num_questions
    asked = Rows(answers, 100 + spec.max_new_tokens / 2, spec.max_new_tokens, longest=200 + 2 * spec.max_new_tokens)
    judged = 1 if spec.constrained else spec.judge_tokens
    shown = Rows(judgments, JUDGED_TOKENS, judged, longest=2 * JUDGED_TOKENS + judged)
    return Workload(
        (policy, judge),
        (
            Phase("roll-outs", (Decode(policy, asked, ANSWER_BATCH, adapter=False),)),
            Phase("scoring", (Decode(judge, shown, 8, adapter=False),)),
        ),
        2000.0 * (answers + judgments),
    )


_BY_KIND: dict[type[Spec], Callable[[Any, Mapping[Spec, Lengths]], Workload]] = {
    specs.Pretrain: _pretrain,
    specs.SFT: _sft,
    specs.Samples: _samples,
    specs.RewardModel: _trained_on_labels,
    specs.ProcessRewardModel: _trained_on_labels,
    specs.MixedRewardModel: _trained_on_labels,
    specs.Policy: _policy,
    specs.Scores: _scores,
    specs.MTBench: _mt_bench,
    chat_specs.Chat: _chat,
    chat_specs.Answers: _answers,
    chat_specs.Tuned: _tuned,
    chat_specs.AnswerReward: _answer_reward,
    chat_specs.Aligned: _aligned,
    chat_specs.AnswerScores: _answer_scores,
}

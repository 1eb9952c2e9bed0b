"""The stages of the study on published language models. Each is called like those of `bed.stages`, with its spec."""

import gc
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from safetensors.numpy import save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhfscale.chat import answers as answer_data
from rlhfscale.chat import reasoning
from rlhfscale.chat import specs as chat_specs
from rlhfscale.chat.finetune import finetune
from rlhfscale.models import checkpoints, loading, parallel, recomputation, smollm2
from rlhfscale.rewards import Mixed, Normalised, OutcomeRewardModel, SharedReward, outcome, scorer
from rlhfscale.rewards.metrics import pair_accuracy
from rlhfscale.rl import TRAINERS, networks
from rlhfscale.rl.networks import SharedBase
from rlhfscale.runs.spec import Inputs
from rlhfscale.runs.store import scratch
from rlhfscale.samplers import Completions, hf, repeated, request_seeds, together

BATCH, GPU_BATCH = 64, 256
"""Responses sampled together: on a CPU, more leave a core's caches."""
CALIBRATED = 4
"""A reward model's mean and spread are taken over the answers to every fourth labelled question."""
LORA_ALPHA = 32.0
STREAM = {"train": 0, "eval": 1, "policy": 2}
"""Name of each random stream of questions."""


def chat(spec: chat_specs.Chat, inputs: Inputs, folder: Path) -> None:
    """model/, a transformers folder in bfloat16 with its tokenizer."""
    found = checkpoints.checkpoint(spec.checkpoint)
    if found.repo is None:
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            shutil.move(smollm2.prepare(Path(unpacked), "bf16"), folder / "model")
        return
    source = checkpoints.download(found)
    loading.load_base(source, "bf16", local_files_only=True).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder / "model")


def answers(spec: chat_specs.Answers, inputs: Inputs, folder: Path) -> None:
    """questions.json and responses.safetensors, see `data.answers.Answers`."""
    tokenizer, policy = load(spec.model, inputs)
    asked = [
        question
        for task in spec.tasks
        for question in reasoning.questions(task, spec.split, spec.num_prompts, _entropy(spec.split, spec.prompt_seed))
    ]
    prompts = repeated(answer_data.encode(asked, tokenizer), spec.num_samples, spec.temperature)
    with policy.decoder() as decodable:
        completions = together.sample(
            hf.sample,
            decodable,
            prompts,
            seeds=request_seeds((spec.seed, STREAM[spec.split]), len(prompts)),
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            batch_size=BATCH if spec.model.chat.precision is None else GPU_BATCH,
            tokenizer=tokenizer,
        )
    answer_data.Answers.graded(asked, completions, tokenizer).save(folder)


def tuned(spec: chat_specs.Tuned, inputs: Inputs, folder: Path) -> None:
    """model/, adapters folded in and rounded to bfloat16; train.csv."""
    chat = spec.base
    precision = chat.precision or "fp32"
    tokenizer, policy = load(chat, inputs, precision=precision, rank=spec.lora_rank, seed=spec.seed)
    accepted = answer_data.Answers.load(inputs[spec.data.key]).accepted(tokenizer)
    losses = finetune(policy, accepted, epochs=spec.epochs, batch_size=spec.batch_size, lr=spec.lr, seed=(spec.seed, 0))
    if parallel.rank() > 0:
        return  # one copy of the weights in the machine's memory, and one on its disk
    merged = policy.merged_policy() if precision == "fp32" else _merged_anew(policy, inputs[chat.key] / "model", folder)
    merged.bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pd.DataFrame({"train_loss_nats": losses}).to_csv(folder / "train.csv", index_label="step")


def _merged_anew(policy: SharedBase, source: Path, folder: Path) -> PreTrainedModel:
    """The policy's adapter folded into the bfloat16 weights of ``source``, in the machine's memory: a GPU has no room
    for a second copy, and in 4 bits the adapter would be rounded away."""
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        policy.save_adapter(loading.POLICY, Path(kept))
        base = loading.load_base(source, "bf16", sharded=False, local_files_only=True)
        return PeftModel.from_pretrained(base, Path(kept) / loading.POLICY).merge_and_unload()


def answer_reward(spec: chat_specs.AnswerReward, inputs: Inputs, folder: Path) -> None:
    """model/ (adapters and head, see `SharedReward`), train.csv, and held_out.safetensors: the accuracy within each
    held-out question, NaN where all its answers are right or all wrong: float64 [question], of answers of several
    models [model, question]."""
    tokenizer = AutoTokenizer.from_pretrained(inputs[spec.base.key] / "model", local_files_only=True)
    model = _base(spec.base, inputs, head="score")
    model.name_or_path = model.config.name_or_path = spec.base.key
    nn.init.zeros_(model.score.weight)
    if _is_large(spec.base):
        recomputation.of_blocks(model)
    data, held_out = ([_reworded(part, inputs, tokenizer) for part in parts] for parts in (spec.data, spec.held_out))
    if spec.num_prompts:
        data = [part.head(spec.num_prompts) for part in data]
    labelled = [part.labelled(tokenizer) for part in data]
    model, records = outcome.train(
        model,
        labelled,
        epochs=spec.epochs,
        prompts_per_batch=spec.prompts_per_batch,
        lr=spec.lr,
        lora_rank=spec.lora_rank,
        readout="last",
        seed=(spec.seed, 0),
        tokens_per_micro_batch=_tokens(spec.base),
        merge=False,
    )
    OutcomeRewardModel(model, tokenizer).save(folder / "model")
    del model  # before the next one is loaded; its layers refer to each other
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    shared = _attached(spec, inputs, folder)
    reference = [part.sequences[part.group % CALIBRATED == 0] for part in labelled]
    shared.calibrate(np.concatenate([shared.score(sequences) for sequences in reference]))
    accuracy = [
        pair_accuracy(shared.score(part.sequences(tokenizer)).reshape(part.right.shape), part.right)
        for part in held_out
    ]
    pd.DataFrame(records).to_csv(folder / "train.csv", index=False)
    found = np.stack(accuracy) if len(accuracy) > 1 else accuracy[0]
    save_file({"pair_accuracy": found}, folder / "held_out.safetensors")


def aligned(spec: chat_specs.Aligned, inputs: Inputs, folder: Path) -> None:
    """adapters/ (policy as a PEFT folder, PPO's value head), metrics.csv."""
    trainer, config_type = TRAINERS[spec.algorithm]
    tokenizer = AutoTokenizer.from_pretrained(inputs[spec.base.key] / "model", local_files_only=True)
    base = _base(spec.base, inputs, precision=spec.precision)
    base.name_or_path = base.config.name_or_path = spec.base.key
    names = config_type.model_fields.keys() & type(spec).model_fields.keys()
    memory = {"gradient_checkpointing": _is_large(spec.base), "max_tokens_per_pass": _tokens(spec.base)}
    config = config_type(**{name: getattr(spec, name) for name in names}, **memory)
    stream = _training_questions(spec)
    parts = (
        (spec.score_weight, _score(spec, inputs, stream, tokenizer)),
        (spec.verifier_weight, answer_data.Verifier(stream, tokenizer)),
    )
    reward = Mixed([(weight, part) for weight, part in parts if weight])
    run = trainer(base, tokenizer, reward, config, seed=spec.seed)

    def asked(update: int) -> list[reasoning.Question]:
        return stream[update * spec.prompts_per_update : (update + 1) * spec.prompts_per_update]

    def graded(update: int, _: dict[str, float], completions: Completions) -> dict[str, float]:
        found = answer_data.Answers.graded(asked(update), completions, tokenizer)
        return {"right": float(found.right.mean())}

    with scratch(folder) as kept:
        metrics = run.train(
            lambda update: answer_data.encode(asked(update), tokenizer),
            spec.num_updates,
            folder=kept,
            checkpoint_every=5,
            on_update=graded,
            progress=False,
        )
    if parallel.rank() == 0:
        run.networks.save(folder / "adapters")
        metrics.to_csv(folder / "metrics.csv", index=False)


def _score(
    spec: chat_specs.Aligned,
    inputs: Inputs,
    questions: Sequence[reasoning.Question],
    tokenizer: PreTrainedTokenizerBase,
) -> Normalised:
    """The reward model's normalised score: on the policy's base where it is the reward model's own."""
    if spec.shares_base:
        shared = SharedReward(inputs[spec.reward_model.key] / "model")
        return Normalised(shared, shared.mean, shared.std)
    other = _attached(spec.reward_model, inputs, inputs[spec.reward_model.key])
    return Normalised(answer_data.Reworded(other, other.tokenizer, questions, tokenizer), other.mean, other.std)


def answer_scores(spec: chat_specs.AnswerScores, inputs: Inputs, folder: Path) -> None:
    """scores.safetensors: float32 [question, sample], raw."""
    shared = _attached(spec.reward_model, inputs, inputs[spec.reward_model.key])
    found = _reworded(spec.answers, inputs, shared.tokenizer)
    scores = shared.score(found.sequences(shared.tokenizer)).reshape(found.right.shape)
    save_file({"scores": scores}, folder / "scores.safetensors")


def load(
    spec: chat_specs.Chat | chat_specs.Tuned | chat_specs.Aligned,
    inputs: Inputs,
    *,
    precision: str | None = None,
    rank: int = 16,
    seed: int = 0,
) -> tuple[PreTrainedTokenizerBase, SharedBase]:
    """A model's tokenizer, and its networks without a critic; a float32 base is computed in bfloat16.

    Args:
        precision: of the base, by default the checkpoint's; an aligned model keeps the one it was trained in.
        rank, seed: of the policy's adapter, where it is a new one.
    """
    trained = isinstance(spec, chat_specs.Aligned)
    precision, rank = (spec.precision, spec.lora_rank) if trained else (precision, rank)
    found = networks.build(
        _base(spec, inputs, precision=precision),
        critic="none",
        rank=rank,
        alpha=spec.lora_alpha if trained else LORA_ALPHA,
        seed=seed,
        gradient_checkpointing=_is_large(spec),
        compute_dtype=torch.bfloat16 if precision == "fp32" else None,
    )
    if trained:
        found.load(inputs[spec.key] / "adapters")
    return AutoTokenizer.from_pretrained(inputs[spec.saved.key] / "model", local_files_only=True), found


def _base(
    spec: chat_specs.Chat | chat_specs.Tuned | chat_specs.Aligned,
    inputs: Inputs,
    *,
    precision: str | None = None,
    head: str = "causal",
) -> PreTrainedModel:
    """The weights below a model's adapters, on the GPU where its checkpoint has a precision and there is one; this
    process's share of them where several make the artifact."""
    placed = {}
    if parallel.size() > 1:
        placed = {"sharded": True}
    elif spec.chat.precision is not None and torch.cuda.is_available():
        placed = {"device_map": {"": 0}}
    precision = precision or spec.chat.precision or "bf16"
    return loading.load_base(inputs[spec.saved.key] / "model", precision, head=head, local_files_only=True, **placed)


def _is_large(spec: chat_specs.Chat | chat_specs.Tuned | chat_specs.Aligned) -> bool:
    return spec.chat.num_params >= chat_specs.LARGE


def _tokens(spec: chat_specs.Tuned) -> int:
    """Tokens that a model is trained on at a time, of a step's."""
    return chat_specs.LARGE_TOKENS if _is_large(spec) else scorer.TOKENS_PER_MICRO_BATCH


def _reworded(spec: chat_specs.Answers, inputs: Inputs, tokenizer: PreTrainedTokenizerBase) -> answer_data.Answers:
    """Answers in the tokens of a model that may not have written them."""
    written = AutoTokenizer.from_pretrained(inputs[spec.model.saved.key] / "model", local_files_only=True)
    return answer_data.Answers.load(inputs[spec.key]).reworded(written, tokenizer)


def _attached(spec: chat_specs.AnswerReward, inputs: Inputs, folder: Path) -> SharedReward:
    """The reward model saved in ``folder``, on a base of its own."""
    shared = SharedReward(folder / "model", tokens_per_micro_batch=_tokens(spec.base))
    shared.attach(networks.build(_base(spec.base, inputs), critic="none"))
    return shared


def _training_questions(spec: chat_specs.Aligned) -> list[reasoning.Question]:
    """The questions of all updates, the tasks in turn."""
    share = -(-spec.num_updates * spec.prompts_per_update // len(spec.tasks))
    by_task = [reasoning.questions(task, "train", share, _entropy("policy", spec.seed)) for task in spec.tasks]
    return [question for together in zip(*by_task, strict=True) for question in together]


def _entropy(stream: str, seed: int) -> int:
    """One number for a random stream and a seed, as reasoning-gym takes it."""
    return int(np.random.SeedSequence((seed, STREAM[stream])).generate_state(1)[0])

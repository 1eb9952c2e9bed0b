"""The stages of the study on a pretrained language model; see `stages` for their signature and `language` for specs."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhfscale import checkpoints, language, models, networks, smollm2
from rlhfscale.data import answers as answer_data
from rlhfscale.finetune import finetune
from rlhfscale.networks import SharedBase
from rlhfscale.rewards import Mixed, Normalised, OutcomeRewardModel, SharedReward, outcome
from rlhfscale.rewards.metrics import pair_accuracy
from rlhfscale.rl import PPO, PPOConfig
from rlhfscale.samplers import Completions, hf, repeated, request_seeds
from rlhfscale.stages import Inputs
from rlhfscale.store import scratch
from rlhfscale.tasks import reasoning

BATCH = 64
"""Responses sampled together: more leave a core's caches."""
CALIBRATED = 4
"""A reward model's mean and spread are taken over the answers to every fourth labelled question."""
LORA_ALPHA = 32.0
STREAM = {"train": 0, "eval": 1, "policy": 2}
"""Name of each random stream of questions."""


def chat(spec: language.Chat, inputs: Inputs, folder: Path) -> None:
    """model/, a transformers folder in bfloat16 with its tokenizer."""
    found = checkpoints.checkpoint(spec.checkpoint)
    if found.repo is None:
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            shutil.move(smollm2.prepare(Path(unpacked), "bf16"), folder / "model")
        return
    source = checkpoints.download(found)
    models.load_base(source, "bf16", local_files_only=True).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder / "model")


def answers(spec: language.Answers, inputs: Inputs, folder: Path) -> None:
    """questions.json and responses.safetensors, see `data.answers.Answers`."""
    tokenizer, policy = load(spec.model, inputs)
    asked = [
        question
        for task in spec.tasks
        for question in reasoning.questions(task, spec.split, spec.num_prompts, _entropy(spec.split, spec.prompt_seed))
    ]
    prompts = repeated(answer_data.encode(asked, tokenizer), spec.num_samples, spec.temperature)
    with policy.decoder() as decodable:
        completions = hf.sample(
            decodable,
            prompts,
            seeds=request_seeds((spec.seed, STREAM[spec.split]), len(prompts)),
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            batch_size=BATCH,
            tokenizer=tokenizer,
        )
    answer_data.Answers.graded(asked, completions, tokenizer).save(folder)


def tuned(spec: language.Tuned, inputs: Inputs, folder: Path) -> None:
    """model/, adapters folded in and rounded to bfloat16; train.csv."""
    tokenizer, policy = load(spec.base, inputs, precision="fp32", rank=spec.lora_rank, seed=spec.seed)
    accepted = answer_data.Answers.load(inputs[spec.data.key]).accepted(tokenizer)
    losses = finetune(policy, accepted, epochs=spec.epochs, batch_size=spec.batch_size, lr=spec.lr, seed=(spec.seed, 0))
    policy.merged_policy().bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pd.DataFrame({"train_loss_nats": losses}).to_csv(folder / "train.csv", index_label="step")


def answer_reward(spec: language.AnswerReward, inputs: Inputs, folder: Path) -> None:
    """model/ (adapters and head, see `SharedReward`), train.csv, and held_out.safetensors: the accuracy within each
    held-out question, float64 [question], NaN where all its answers are right or all wrong."""
    source = inputs[spec.base.key] / "model"
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    model = models.load_base(source, "bf16", head="score", local_files_only=True)
    model.name_or_path = model.config.name_or_path = spec.base.key
    nn.init.zeros_(model.score.weight)
    data, held_out = (answer_data.Answers.load(inputs[part.key]) for part in (spec.data, spec.held_out))
    labelled = data.labelled(tokenizer)
    model, records = outcome.train(
        model,
        [labelled],
        epochs=spec.epochs,
        prompts_per_batch=spec.prompts_per_batch,
        lr=spec.lr,
        lora_rank=spec.lora_rank,
        readout="last",
        seed=(spec.seed, 0),
        merge=False,
    )
    reward = OutcomeRewardModel(model, tokenizer)
    reward.save(folder / "model")
    shared = _attached(folder / "model", source)
    reward.calibrate(shared.score(labelled.sequences[labelled.group % CALIBRATED == 0]))
    reward.save(folder / "model")
    scores = shared.score(held_out.sequences(tokenizer)).reshape(held_out.right.shape)
    pd.DataFrame(records).to_csv(folder / "train.csv", index=False)
    save_file({"pair_accuracy": pair_accuracy(scores, held_out.right)}, folder / "held_out.safetensors")


def aligned(spec: language.Aligned, inputs: Inputs, folder: Path) -> None:
    """adapters/ (policy as a PEFT folder, value head), metrics.csv."""
    source = inputs[spec.base.key] / "model"
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    base = models.load_base(source, spec.precision, local_files_only=True)
    base.name_or_path = base.config.name_or_path = spec.base.key
    shared = SharedReward(inputs[spec.reward_model.key] / "model")
    names = PPOConfig.model_fields.keys() & type(spec).model_fields.keys()
    config = PPOConfig(**{name: getattr(spec, name) for name in names})
    stream = _training_questions(spec)
    parts = (
        (spec.score_weight, Normalised(shared, shared.mean, shared.std)),
        (spec.verifier_weight, answer_data.Verifier(stream, tokenizer)),
    )
    reward = Mixed([(weight, part) for weight, part in parts if weight])
    run = PPO(base, tokenizer, reward, config, seed=spec.seed)

    def asked(update: int) -> list[reasoning.Question]:
        return stream[update * spec.prompts_per_update : (update + 1) * spec.prompts_per_update]

    def graded(update: int, _: dict[str, float], completions: Completions) -> dict[str, float]:
        found = answer_data.Answers.graded(asked(update), completions, tokenizer)
        return {"right": float(found.right.mean())}

    with scratch(folder) as kept:
        metrics = run.train(
            lambda update: [question.conversation for question in asked(update)],
            spec.num_updates,
            folder=kept,
            checkpoint_every=5,
            on_update=graded,
            progress=False,
        )
    run.networks.save(folder / "adapters")
    metrics.to_csv(folder / "metrics.csv", index=False)


def answer_scores(spec: language.AnswerScores, inputs: Inputs, folder: Path) -> None:
    """scores.safetensors: float32 [question, sample], raw."""
    source = inputs[spec.reward_model.base.key] / "model"
    shared = _attached(inputs[spec.reward_model.key] / "model", source)
    found = answer_data.Answers.load(inputs[spec.answers.key])
    scores = shared.score(found.sequences(shared.tokenizer)).reshape(found.right.shape)
    save_file({"scores": scores}, folder / "scores.safetensors")


def load(
    spec: language.Chat | language.Tuned | language.Aligned,
    inputs: Inputs,
    *,
    precision: str = "bf16",
    rank: int = 16,
    seed: int = 0,
) -> tuple[PreTrainedTokenizerBase, SharedBase]:
    """A model's tokenizer, and its networks without a critic; a float32 base is computed in bfloat16.

    Args:
        precision: of the base; an aligned model keeps the one it was trained in.
        rank, seed: of the policy's adapter, where it is a new one.
    """
    trained = isinstance(spec, language.Aligned)
    source = inputs[(spec.base if trained else spec).key] / "model"
    precision, rank = (spec.precision, spec.lora_rank) if trained else (precision, rank)
    base = models.load_base(source, precision, local_files_only=True)
    found = networks.build(
        base,
        critic="none",
        rank=rank,
        alpha=spec.lora_alpha if trained else LORA_ALPHA,
        seed=seed,
        compute_dtype=torch.bfloat16 if precision == "fp32" else None,
    )
    if trained:
        found.load(inputs[spec.key] / "adapters")
    return AutoTokenizer.from_pretrained(source, local_files_only=True), found


def _attached(folder: Path, source: Path) -> SharedReward:
    """A saved reward model on a base of its own."""
    shared = SharedReward(folder)
    shared.attach(networks.build(models.load_base(source, "bf16", local_files_only=True), critic="none"))
    return shared


def _training_questions(spec: language.Aligned) -> list[reasoning.Question]:
    """The questions of all updates, the tasks in turn."""
    share = -(-spec.num_updates * spec.prompts_per_update // len(spec.tasks))
    by_task = [reasoning.questions(task, "train", share, _entropy("policy", spec.seed)) for task in spec.tasks]
    return [question for together in zip(*by_task, strict=True) for question in together]


def _entropy(stream: str, seed: int) -> int:
    """One number for a random stream and a seed, as reasoning-gym takes it."""
    return int(np.random.SeedSequence((seed, STREAM[stream])).generate_state(1)[0])

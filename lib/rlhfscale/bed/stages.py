"""The stages: each makes an artifact folder from a spec and its parents' folders.

Every function has the signature ``stage(spec, inputs, folder)``: ``inputs`` maps a parent's key to its folder,
``folder`` is empty and becomes the artifact. They run in worker processes of one thread each (see `grid`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from rlhfscale.bed import labels, ladder, rungs, specs, tasks
from rlhfscale.bed.demonstrations import (
    STREAM,
    demonstration_nats,
    demonstrations,
    encode_prompts,
    held_out_documents,
    problem_list,
)
from rlhfscale.bed.responses import Responses, label
from rlhfscale.models import lm, loading
from rlhfscale.rewards import mixed, outcome, process
from rlhfscale.rewards.labelled import StepLabelled
from rlhfscale.rl import TRAINERS
from rlhfscale.runs.spec import Inputs
from rlhfscale.runs.store import scratch
from rlhfscale.samplers import Completions, hf, repeated, request_seeds

LOSS_POINTS = 8
"""Held-out loss is measured this many times during pretraining, evenly spaced in steps."""


def pretrain(spec: specs.Pretrain, inputs: Inputs, folder: Path) -> None:
    """model/, loss.csv (step, tokens, flops, held-out loss of the responses in nats for each token), train.csv, and
    held_out.safetensors: of each held-out document the loss of the model and of its demonstrators in nats, and its
    tokens."""
    rung = ladder.rung(spec.rung)
    documents = demonstrations(
        (spec.seed, STREAM["pretrain"]), "train", tuple(tasks.FAMILIES), spec.num_documents, spec.slip
    )
    held_out = held_out_documents(spec.slip)
    held_out_tokens = held_out.lengths - held_out.prompt_lengths
    model = rungs.build_rung(rung, spec.seed)
    points = []

    def measure(step: int, num_steps: int, tokens: int) -> None:
        if (step + 1) * LOSS_POINTS // num_steps > step * LOSS_POINTS // num_steps:
            nats = lm.document_losses(model, held_out)
            model.train()
            point = {"step": step + 1, "tokens": tokens, "flops": rung.train_flops(tokens, documents.lengths.mean())}
            points.append(point | {"loss_nats": nats.sum() / held_out_tokens.sum()})

    train_losses = lm.train(
        model,
        documents,
        batch_size=spec.batch_size,
        lr=spec.lr,
        muon_lr=spec.muon_lr,
        seed=(spec.seed, STREAM["pretrain"], 2),
        skip_prompt=False,
        on_step=measure,
    )
    rungs.save_model(model, folder / "model")
    pd.DataFrame(points).to_csv(folder / "loss.csv", index=False)
    pd.DataFrame({"train_loss_nats": train_losses}).to_csv(folder / "train.csv", index_label="step")
    nats = {
        "nats": lm.document_losses(model, held_out),
        "demonstrators_nats": demonstration_nats(held_out, spec.slip),
    }
    save_file(nats | {"tokens": held_out_tokens}, folder / "held_out.safetensors")


def sft(spec: specs.SFT, inputs: Inputs, folder: Path) -> None:
    """model/ and train.csv."""
    documents = demonstrations((spec.seed, STREAM["sft"]), "train", spec.families, spec.num_documents, spec.slip)
    model = loading.load_policy(inputs[spec.base.key] / "model")
    losses = lm.train(
        model,
        documents,
        batch_size=spec.batch_size,
        lr=spec.lr,
        muon_lr=spec.muon_lr,
        seed=(spec.seed, STREAM["sft"], 2),
        skip_prompt=True,
    )
    rungs.save_model(model, folder / "model")
    pd.DataFrame({"train_loss_nats": losses}).to_csv(folder / "train.csv", index_label="step")


def samples(spec: specs.Samples, inputs: Inputs, folder: Path) -> None:
    """responses.safetensors, see `Responses`."""
    model = loading.load_policy(inputs[spec.model.key] / "model")
    draw(spec, model).save(folder / "responses.safetensors")


def draw(spec: specs.Samples, model: Any) -> Responses:
    """The labelled responses that a spec describes, of any model that `hf.sample` takes."""
    problems = problem_list((spec.prompt_seed, STREAM[spec.split]), spec.split, spec.families, spec.num_prompts)
    prompts = repeated(encode_prompts(problems), spec.num_samples, spec.temperature)
    completions = hf.sample(
        model,
        prompts,
        seeds=request_seeds((spec.seed, STREAM["samples"], STREAM[spec.split]), len(prompts)),
        max_new_tokens=tasks.MAX_RESPONSE_TOKENS,
        temperature=spec.temperature,
    )
    return label(problems, completions)


def reward_model(spec: specs.RewardModel, inputs: Inputs, folder: Path) -> None:
    """model/ (see `OutcomeRewardModel.save`), train.csv, and held_out.safetensors: the accuracy within each held-out
    prompt, float64 [label rung, prompt], on pairs of unequal gold (``pair_accuracy``) and of a right and a wrong
    answer (``right_or_wrong``), and the number of pairs trained on."""
    share = -(-spec.num_prompts // len(spec.data))
    data = [load_responses(inputs, source).head(share) for source in spec.data]
    model = loading.load_scorer(inputs[spec.base.key] / "model", init_seed=spec.seed)
    model, records = outcome.train(
        model,
        [labels.labelled(part) for part in data],
        epochs=spec.epochs,
        prompts_per_batch=spec.prompts_per_batch,
        lr=spec.lr,
        muon_lr=spec.muon_lr,
        lora_rank=spec.lora_rank,
        loss=spec.loss,
        readout=spec.readout,
        seed=(spec.seed, 0),
    )
    reward = outcome.OutcomeRewardModel(model, rungs.build_tokenizer(), spec.readout)
    save_outcome(reward, records, data, [load_responses(inputs, source) for source in spec.held_out], folder)


def mixed_reward_model(spec: specs.MixedRewardModel, inputs: Inputs, folder: Path) -> None:
    """As `reward_model`; of each label rung's prompts the first share is compared, the next is labelled right or wrong,
    and the rest step by step."""
    share = -(-spec.num_prompts // len(spec.data))
    compared, marked, end = (round(part * share) for part in np.cumsum(spec.mix))
    data, responses, steps = [load_responses(inputs, source).head(share) for source in spec.data], [], []
    for source, part in zip(spec.data, data, strict=True):
        whole, size = labels.labelled(part), source.num_samples
        none = np.full(len(whole), np.nan, np.float32)
        responses.append(replace(whole, correct=none)[: compared * size])
        responses.append(replace(whole, gold=none)[compared * size : marked * size])
        steps.append(load_steps(inputs, source, share)[marked * size : end * size])
    model, records = mixed.train(
        loading.load_scorer(inputs[spec.base.key] / "model", init_seed=spec.seed),
        [part for part in responses if len(part)],
        [part for part in steps if len(part)],
        step_ids=labels.step_ids(),
        epochs=spec.epochs,
        prompts_per_batch=spec.prompts_per_batch,
        responses_per_batch=spec.prompts_per_batch * spec.data[0].num_samples,
        lr=spec.lr,
        muon_lr=spec.muon_lr,
        lora_rank=spec.lora_rank,
        seed=(spec.seed, 0),
    )
    reward = outcome.OutcomeRewardModel(model, rungs.build_tokenizer(), "sum")
    save_outcome(reward, records, data, [load_responses(inputs, source) for source in spec.held_out], folder)


def save_outcome(
    reward: outcome.OutcomeRewardModel,
    records: list[dict[str, Any]],
    data: Sequence[Responses],
    held_out: Sequence[Responses],
    folder: Path,
) -> None:
    """What a stage keeps of an outcome reward model, calibrated on the first responses of its data."""
    reward.calibrate(np.concatenate([labels.scores_of(reward, responses.head(256)).ravel() for responses in data]))
    reward.save(folder / "model")
    pd.DataFrame(records).to_csv(folder / "train.csv", index=False)
    scored = [(labels.scores_of(reward, responses), responses) for responses in held_out]
    found = {
        "pair_accuracy": np.stack([outcome.pair_accuracy(scores, part.gold) for scores, part in scored]),
        "right_or_wrong": np.stack([outcome.pair_accuracy(scores, part.exact * 1.0) for scores, part in scored]),
        "num_pairs": np.array(sum(outcome.num_pairs(part.gold) for part in data)),
    }
    save_file(found, folder / "held_out.safetensors")


def process_reward_model(spec: specs.ProcessRewardModel, inputs: Inputs, folder: Path) -> None:
    """model/ (see `ProcessRewardModel.save`), train.csv, and held_out.safetensors: of each held-out response, int64
    [response], its family, the first wrong step and the first that the model calls wrong; -1 where there is none."""
    share = -(-spec.num_prompts // len(spec.data))
    data = [load_steps(inputs, source, share) for source in spec.data]
    step_ids = labels.step_ids()
    model, records = process.train(
        loading.load_scorer(inputs[spec.base.key] / "model", init_seed=spec.seed),
        data,
        step_ids=step_ids,
        epochs=spec.epochs,
        responses_per_batch=spec.responses_per_batch,
        lr=spec.lr,
        muon_lr=spec.muon_lr,
        lora_rank=spec.lora_rank,
        seed=(spec.seed, 0),
    )
    reward = process.ProcessRewardModel(model, rungs.build_tokenizer(), step_ids, spec.aggregate)
    reward.calibrate(np.concatenate([reward.score(part.sequences[: 256 * spec.data[0].num_samples]) for part in data]))
    reward.save(folder / "model")
    pd.DataFrame(records).to_csv(folder / "train.csv", index=False)
    columns = {"family": [], "first_wrong": [], "first_wrong_found": []}
    for source in spec.held_out:
        steps, responses = load_steps(inputs, source, source.num_prompts), load_responses(inputs, source)
        columns["family"].append(np.repeat(responses.family.astype(np.int64), responses.num_samples))
        columns["first_wrong"].append(np.array([first(right < 0.5) for right in steps.labels]))
        found = [first(chances < 0.5) for chances in reward.step_scores(steps.sequences)]
        columns["first_wrong_found"].append(np.array(found))
    save_file({name: np.concatenate(parts) for name, parts in columns.items()}, folder / "held_out.safetensors")


def first(flags: np.ndarray) -> int:
    """Index of the first True; -1 where there is none."""
    return int(flags.argmax()) if flags.any() else -1


def policy(spec: specs.Policy, inputs: Inputs, folder: Path) -> None:
    """model/ (adapter folded in), adapters/ (policy, and PPO's critic, as PEFT folders; value head), metrics.csv."""
    trainer, config_type = TRAINERS[spec.algorithm]
    base = loading.load_policy(inputs[spec.sft.key] / "model")
    # what the adapters record as their base, rather than a path of this machine
    base.name_or_path = base.config.name_or_path = spec.sft.key
    reward = load_reward(inputs, spec.reward_model).normalised()
    names = config_type.model_fields.keys() & type(spec).model_fields.keys()
    config = config_type(**{name: getattr(spec, name) for name in names}, max_new_tokens=tasks.MAX_RESPONSE_TOKENS)
    stream = tasks.problems((spec.seed, STREAM["policy"]), "train", spec.sft.families)
    batches = [[next(stream) for _ in range(spec.prompts_per_update)] for _ in range(spec.num_updates)]
    run = trainer(base, rungs.build_tokenizer(), reward, config, seed=spec.seed)

    def graded(update: int, _: dict[str, float], completions: Completions) -> dict[str, float]:
        found = label(batches[update], completions)
        return {"gold": float(found.gold.mean()), "exact": float(found.exact.mean())}

    with scratch(folder) as kept:
        metrics = run.train(
            lambda update: encode_prompts(batches[update]),
            spec.num_updates,
            folder=kept,
            on_update=graded,
            progress=False,
        )
    run.networks.save(folder / "adapters")
    rungs.save_model(run.networks.merged_policy(), folder / "model")
    metrics.to_csv(folder / "metrics.csv", index=False)


def scores(spec: specs.Scores, inputs: Inputs, folder: Path) -> None:
    """scores.safetensors: float32 [prompt, sample], raw."""
    responses = load_responses(inputs, spec.samples)
    scored = load_reward(inputs, spec.reward_model).score(labels.sequences_of(responses))
    save_file({"scores": scored.reshape(responses.gold.shape)}, folder / "scores.safetensors")


def load_responses(inputs: Inputs, spec: specs.Samples) -> Responses:
    return Responses.load(inputs[spec.key] / "responses.safetensors")


def load_steps(inputs: Inputs, spec: specs.Samples, num_prompts: int) -> StepLabelled:
    """The responses to the first prompts with a label for each step."""
    problems = problem_list((spec.prompt_seed, STREAM[spec.split]), spec.split, spec.families, num_prompts)
    return labels.steps_of_responses(problems, load_responses(inputs, spec).head(num_prompts))


def load_reward(inputs: Inputs, spec: specs.AnyRewardModel) -> outcome.OutcomeRewardModel | process.ProcessRewardModel:
    """The reward model that a spec names."""
    is_process = isinstance(spec, specs.ProcessRewardModel)
    kind = process.ProcessRewardModel if is_process else outcome.OutcomeRewardModel
    return kind.load(inputs[spec.key] / "model")

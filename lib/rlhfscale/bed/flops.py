"""Floating-point operations of the stages, by formula (Kaplan et al. 2020, table 1; a test compares torch's count).

Pretraining, SFT and full-weight reward models take ``Rung.train_flops``: 6 for each parameter and token. A model that
is only read takes a third of that. Adapters on a frozen base take two thirds, since the base's own gradients are not
computed, and 6 for each of their parameters. What ran is counted, not what was asked for: lengths come from artifacts.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from rlhfscale.bed import ladder, specs
from rlhfscale.bed.demonstrations import STREAM, encode_prompts, problem_list
from rlhfscale.bed.responses import Responses
from rlhfscale.runs.spec import Spec

Folders = Mapping[Spec, Path]


def read_flops(rung: str, tokens: float, length: float) -> float:
    """FLOPs of reading ``tokens`` in sequences of ``length`` tokens, also one at a time with a cache."""
    return ladder.rung(rung).train_flops(tokens, length) / 3


def adapter_train_flops(rung: str, rank: int, tokens: float, length: float) -> float:
    """FLOPs of training adapters: forward, gradients of activations, and all of the adapters' own."""
    shape = ladder.rung(rung)
    frozen = (4.0 * shape.num_params_with_embeddings + 12.0 * shape.layers * length * shape.width) * tokens
    return frozen + 6.0 * shape.shape.adapter_params(rank) * tokens


def samples_flops(spec: specs.Samples, folders: Folders) -> float:
    """FLOPs of sampling; each prompt is read once, whatever the number of its responses."""
    responses = Responses.load(folders[spec] / "responses.safetensors")
    prompts = float(responses.prompt_lengths.astype(int).sum())
    tokens = prompts + float(responses.response_lengths.astype(int).sum())
    length = responses.prompt_lengths.mean() + responses.response_lengths.mean()
    return read_flops(spec.model.rung, tokens, length)


def reward_model_flops(spec: specs.RewardModel, folders: Folders) -> float:
    """FLOPs of training on the distinct responses to each prompt, for pairs alone to each that has a comparison."""
    share, tokens, count = -(-spec.num_prompts // len(spec.data)), 0, 0
    for source in spec.data:
        responses = Responses.load(folders[source] / "responses.safetensors").head(share)
        ids, lengths = responses.sequences()
        differ = (responses.gold.min(1) < responses.gold.max(1)) | (spec.loss == "both")
        first = _first_of_equals(ids[differ])
        tokens, count = tokens + int(lengths[differ][first].sum()), count + int(first.sum())
    return spec.epochs * ladder.rung(spec.rung).train_flops(tokens, tokens / count)


def _first_of_equals(ids: np.ndarray) -> np.ndarray:
    """bool [prompt, sample]: no earlier sample of the prompt has the same ids, [prompt, sample, position]."""
    equal = np.stack([(ids == ids[:, place, None]).all(-1) for place in range(ids.shape[1])], 1)
    return ~np.tril(equal, -1).any(-1)


def policy_flops(spec: specs.Policy, folders: Folders) -> dict[str, float]:
    """FLOPs of policy training by part: ``roll-outs`` (sampling), ``reward`` (scoring them), ``evaluation`` (policy,
    reference and critic read them) and ``updates``."""
    metrics = pd.read_csv(folders[spec] / "metrics.csv")
    problems = problem_list((spec.seed, STREAM["policy"]), "train", spec.sft.families, spec.prompts_per_update)
    prompt = float(np.mean([len(ids) for ids in encode_prompts(problems)]))
    length = prompt + float(metrics["response_tokens"].mean())
    sequences = len(metrics) * spec.prompts_per_update * spec.responses_per_prompt
    networks = 2 if spec.critic == "separate" else 1
    read = read_flops(spec.rung, sequences * length, length)
    train = adapter_train_flops(spec.rung, spec.lora_rank, sequences * length, length)
    return {
        "roll-outs": read,
        "reward": read_flops(spec.reward_model.rung, sequences * length, length),
        "evaluation": (networks + 1) * read,
        "updates": spec.epochs * networks * train,
    }

"""One of the processes of tests/test_parallel.py: trains a tiny model in several ways and writes what came out.

python tests/parallel_run.py FOLDER BASE [WAY ...]     under torchrun's environment, or alone
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import tiny_rl
from rlhfscale.bed import labels
from rlhfscale.chat.finetune import finetune
from rlhfscale.models import parallel
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import outcome
from rlhfscale.rl import GRPO, PPO, RLOO, networks
from rlhfscale.samplers import hf, request_seeds, together
from rlhfscale.samplers.together import Together
from test_rewards import new_scorer, planted


def demonstrations(count: int = 21) -> Sequences:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 30, rng.integers(2, 8)).tolist() for _ in range(count)]
    responses = [rng.integers(3, 30, rng.integers(1, 9)).tolist() for _ in range(count)]
    return Sequences.join(prompts, responses, np.ones(count, bool))


def fine_tuning() -> tuple[dict, list]:
    ours = networks.build(tiny_rl.language_model(), critic="none", rank=4)
    losses = finetune(ours, demonstrations(), epochs=2, batch_size=8, lr=1e-2, seed=(0,))
    return dict(ours.named_parameters()), losses


def reward_model(lora_rank: int, folder: Path) -> tuple[dict, list]:
    options = {"epochs": 2, "prompts_per_batch": 7, "lr": 1e-2, "muon_lr": 1e-2, "readout": "sum", "seed": (0,)}
    options |= {"lora_rank": lora_rank, "merge": False}
    model, records = outcome.train(new_scorer(folder), [labels.labelled(planted(24, 0))], **options)
    return dict(model.named_parameters()), [record["loss"] for record in records]


def policy(algorithm, **options) -> tuple[dict, list]:
    run = tiny_rl.trainer(algorithm, policy_lr=1e-2, **options)
    records = tiny_rl.updates(run, 3)
    return dict(run.networks.named_parameters()), [[record["proxy"], record["kl_nats"]] for record in records]


class Counted:
    """A sampler that the processes of a machine share: only the first of them has it, and asks it for all."""

    def __init__(self):
        assert parallel.rank() % int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 0

    def __call__(self, policy, prompts, **options):
        machines = parallel.size() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        assert len(prompts) == 32 // machines
        return hf.sample(policy, prompts, **options)


def few_prompts() -> tuple[dict, list]:
    """Fewer prompts than processes: some have none of their own to sample."""
    policy, prompts = tiny_rl.language_model(), [[5, 6, 7]]
    options = {"seeds": request_seeds((1,), 1), "max_new_tokens": 9}
    found = [
        together.sample(sampler, policy, prompts, **options) for sampler in (hf.sample, Together(lambda: hf.sample))
    ]
    assert all(len(completions) == 1 for completions in found)
    return {}, [completions.ids.tolist() for completions in found]


def resumed(folder: Path) -> tuple[dict, list]:
    """A run that stopped after two updates and goes on from a checkpoint on the first process's disk alone."""
    folder = folder / f"disk-of-{parallel.rank()}-of-{parallel.size()}"
    for count in (2, 3):
        run = tiny_rl.trainer(PPO, policy_lr=1e-2)
        records = run.train(partial(tiny_rl.prompts, run), count, folder=folder, progress=False)
        assert run.num_updates == count
    return dict(run.networks.named_parameters()), records[["proxy", "kl_nats"]].to_numpy().tolist()


def keep(folder: Path, name: str, weights: dict, record: list) -> None:
    """Write what this process has come to."""
    target = folder / f"{parallel.rank()}-of-{parallel.size()}"
    target.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().clone() for key, value in weights.items()}, target / f"{name}.safetensors")
    (target / f"{name}.json").write_text(json.dumps(record))


def main(folder: Path, base: Path, *names: str) -> None:
    torch.set_num_threads(1)
    parallel.start()
    ways = {
        "sft": fine_tuning,
        "rm-all-weights": lambda: reward_model(0, base),
        "rm-lora": lambda: reward_model(4, base),
        "ppo-trunk": lambda: policy(PPO),
        "ppo-separate": lambda: policy(PPO, critic="separate"),
        "ppo-passes": lambda: policy(PPO, max_tokens_per_pass=100),
        "ppo-all-weights": lambda: policy(PPO, adapter="none"),
        "ppo-one-sampler": lambda: policy(PPO, sampler=Together(Counted)),
        "few-prompts": few_prompts,
        "ppo-resumed": lambda: resumed(folder),
        "grpo": lambda: policy(GRPO, responses_per_prompt=4),
        "rloo": lambda: policy(RLOO, responses_per_prompt=4),
    }
    for name in names or ways:
        keep(folder, name, *ways[name]())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])

"""Our side of every case: ``python -m rlhfscale.bench.ours JOB``; see peers/protocol.py and the peers for the jobs.

A job may have ``options``: fields of PPOConfig for PPO, arguments of `rewards.outcome.train` for reward models, of
`samplers.hf.sample` for the sampler.
"""

from functools import partial
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from rlhfscale.bench.peers.protocol import Child
from rlhfscale.models import loading
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import Labelled, OutcomeRewardModel, outcome
from rlhfscale.rl import PPO, PPOConfig
from rlhfscale.samplers import hf, request_seeds


def main() -> None:
    child = Child()
    side = {"ppo": ppo, "qlora": ppo, "rm": reward_model, "sampler": sampler, "vllm": sampler}[child.job["bench"]]
    side(child, child.job.get("options", {}))


def ppo(child: Child, options: dict[str, Any]) -> None:
    """A step is one update: sampling, scores of a reward model of the policy's size, and all epochs."""
    job = child.job
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if job["bench"] == "qlora":  # no reward model: the peer has none either
        reward = LastToken()
    else:
        scorer = loading.load_base(job["model"], job.get("reward_dtype", job["dtype"]), head="score")
        reward = OutcomeRewardModel(scorer, tokenizer)
    config = PPOConfig(
        prompts_per_update=len(job["prompts"]),
        max_new_tokens=job["response_length"],
        epochs=job["epochs"],
        policy_lr=job["learning_rate"],
        critic_lr=job["learning_rate"],
        warmup_updates=0,
        **{name: job[name] for name in ("temperature", "kl_coefficient", "lora_rank", "lora_alpha")},
        **options,
    )
    policy = loading.load_base(job["model"], job["dtype"])
    full_length = partial(hf.sample, ignore_eos=True)
    trainer = PPO(policy, tokenizer, reward, config, seed=job["seed"], sampler=full_length)

    def step() -> dict[str, Any]:
        _, completions = trainer.update(job["prompts"])
        return {"rollouts": len(completions), "tokens": int(completions.lengths.sum())}

    child.serve(step)


class LastToken:
    """A reward that costs nothing: which token came last."""

    def score(self, sequences: Sequences) -> np.ndarray:
        return sequences.ids[:, -1] / sequences.ids.max()


def reward_model(child: Child, options: dict[str, Any]) -> None:
    """A step is one pass over the pairs; the adapters go on from where the last pass left them."""
    job = child.job
    data = pairs(job["pairs"])
    model = loading.load_base(job["model"], job["dtype"], head="score")

    def step() -> dict[str, Any]:
        nonlocal model
        model, _ = outcome.train(
            model,
            [data],
            epochs=1,
            prompts_per_batch=job["pairs_per_step"],
            lr=job["learning_rate"],
            lora_rank=job["lora_rank"],
            readout="last",
            seed=(job["seed"],),
            merge=False,
            **options,
        )
        return {"pairs": len(job["pairs"]), "tokens": int(data.sequences.lengths.sum())}

    child.serve(step)


def pairs(rows: list[dict[str, list[int]]]) -> Labelled:
    """Each pair as a group of two, the chosen response with the higher gold."""
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    responses = [row[name] for row in rows for name in ("chosen", "rejected")]
    sequences = Sequences.join(prompts, responses, np.ones(len(responses), bool))
    gold = np.tile(np.array([1.0, 0.0], np.float32), len(rows))
    return Labelled(sequences, np.repeat(np.arange(len(rows)), 2), gold, np.full(len(gold), np.nan, np.float32))


def sampler(child: Child, options: dict[str, Any]) -> None:
    """A step samples one response to every prompt."""
    job = child.job
    model = loading.load_base(job["model"], job["dtype"])
    num_steps = 0

    def step() -> dict[str, Any]:
        nonlocal num_steps
        num_steps += 1
        completions = hf.sample(
            model,
            job["prompts"],
            seeds=request_seeds((job["seed"], num_steps), len(job["prompts"])),
            max_new_tokens=job["response_length"],
            temperature=job["temperature"],
            ignore_eos=True,
            **options,
        )
        return {"responses": len(completions), "tokens": int(completions.lengths.sum())}

    child.serve(step)


if __name__ == "__main__":
    main()

"""The peer of the learning comparison: a whole run of trl 1.12.0's PPOTrainer, by the Python of its own environment.

It is given its job once and ends when it is done: no line protocol. The job:

    model, reward    folders of the policy to train, and of the reward model with its reward.json
    prompts          token ids, those of the first update first; trl's shuffling is switched off
    batch            roll-outs of an update, one to a prompt
    options          fields of trl's PPOConfig
    lora_rank, lora_alpha
    check            prompts, responses and the scores that the reward model must give them
    out              folder for the trained policy (adapter merged) and result.json
    threads, seed
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "lib" / "rlhfscale" / "bench" / "peers"))
from protocol import read_job
from trl_ppo import tokenizer

TOLERANCE = 1e-4
"""Largest difference of two scores that are the same."""


class SummedReward(nn.Module):
    """A frozen reward model whose score at a token is the head's sum over the response so far, normalised.

    trl reads a score at the last token of the response, so what it reads is the sum over all of it. `read_context`
    tells where the response starts.
    """

    base_model_prefix = "model"

    def __init__(self, folder: str):
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        about = json.loads((Path(folder) / "reward.json").read_text())
        if about["readout"] != "sum":
            raise ValueError(f"reward: the readout is {about['readout']!r}, not 'sum'")
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        self.model, self.head = classifier.model, classifier.score
        self.mean, self.std = about["mean"], about["std"]
        self.context_length = 0
        self.eval().requires_grad_(False)

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [sequence, token, 1]."""
        by_token = self.head(hidden)
        by_token[:, : self.context_length] = 0
        return (by_token.cumsum(1) - self.mean) / self.std


def read_context() -> None:
    """Patch trl's reading of rewards and values, so that a `SummedReward` knows where responses start."""
    from trl.experimental.ppo import ppo_trainer

    original = ppo_trainer.get_reward

    def get_reward(model: nn.Module, query_responses: torch.Tensor, pad_token_id: int, context_length: int):
        if isinstance(model, SummedReward):
            model.context_length = context_length
        return original(model, query_responses, pad_token_id, context_length)

    ppo_trainer.get_reward = get_reward


def main() -> None:
    job = read_job(sys.argv[1])
    torch.set_num_threads(job["threads"])
    from transformers import set_seed

    set_seed(job["seed"])  # numpy too: trl draws its minibatches there
    read_context()
    reward = SummedReward(job["reward"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(job, reward, folder)
        gap = check(job["check"], reward, trainer.processing_class)
        trainer.train()
    save(job, trainer, gap)


def build(job: dict[str, Any], reward: SummedReward, folder: str) -> Any:
    """A PPOTrainer that takes the prompts in their order; trl wants a folder, though nothing is saved there."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOTrainer

    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    critic = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    lora = LoraConfig(
        r=job["lora_rank"], lora_alpha=job["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    data = Dataset.from_dict({"input_ids": job["prompts"]})
    trainer = PPOTrainer(
        args=arguments(job, folder),
        processing_class=tokenizer(job["model"], base.config.vocab_size),
        model=get_peft_model(base, lora),
        ref_model=None,
        reward_model=reward,
        value_model=critic,
        train_dataset=data,
    )
    trainer.dataloader = DataLoader(data, batch_size=job["batch"], collate_fn=trainer.data_collator)
    return trainer


def arguments(job: dict[str, Any], folder: str) -> Any:
    """PPOConfig: a constant learning rate, nothing saved, reported or sampled for show.

    The whole batch is one micro-batch and no gradients are accumulated: then trl cuts it into minibatches and each is
    an optimiser step. With more micro-batches than one it would accumulate over minibatches too.
    """
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=job["batch"],
        total_episodes=len(job["prompts"]),
        lr_scheduler_type="constant",
        stop_token="eos",
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=job["seed"],
        **job["options"],
    )


def check(wanted: dict[str, Any], reward: SummedReward, tokens: Any) -> float:
    """The largest difference between the scores that trl reads and those wanted; raises ValueError for a large one."""
    from trl.experimental.ppo import ppo_trainer

    pad = tokens.pad_token_id
    context, longest = max(map(len, wanted["prompts"])), max(map(len, wanted["responses"]))
    rows = [
        [pad] * (context - len(prompt)) + prompt + response + [pad] * (longest - len(response))
        for prompt, response in zip(wanted["prompts"], wanted["responses"], strict=True)
    ]
    with torch.no_grad():
        _, scores, _ = ppo_trainer.get_reward(reward, torch.tensor(rows), pad, context)
    gap = (scores - torch.tensor(wanted["scores"])).abs().max().item()
    if not gap < TOLERANCE:
        raise ValueError(f"the reward model's scores differ by {gap:.2g} from those of rlhfscale")
    return gap


def save(job: dict[str, Any], trainer: Any, gap: float) -> None:
    """The policy with its adapter merged, and what was done: optimiser steps, roll-outs, the last update's log."""
    out = Path(job["out"])
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    log = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    result = {
        "optimizer_steps": max(steps),
        "rollouts": trainer.state.episode,
        "score_gap": gap,
        "proxy": [entry["objective/scores"] for entry in log],
        "kl_nats": [entry["objective/kl"] for entry in log],
    }
    trainer.accelerator.unwrap_model(trainer.model).policy.merge_and_unload().save_pretrained(out / "model")
    (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

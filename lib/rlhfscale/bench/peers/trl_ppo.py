"""One side of the PPO benchmark: trl 1.12.0's PPOTrainer, run by the Python of its own environment.

See protocol.py for how it is spoken to. A step is one whole update: the batch's generation, the reference's
log-probabilities, values, scores, and all epochs of training. The job:

    model            folder of a causal language model with a tokenizer
    dtype            fp32 or bf16: of every weight, optimiser states included
    prompts          token ids of each prompt, all of one length; their number is the batch
    response_length  tokens of every response: trl disables end-of-sequence while it samples
    epochs           passes over an update's roll-outs
    mini_batches     optimiser steps in an epoch (optional, 1)
    micro_batch      roll-outs in a forward and backward pass of training
    rollout_batch    roll-outs generated and scored together
    lora_rank, lora_alpha, learning_rate, temperature, kl_coefficient, threads, seed

The policy carries LoRA on every linear layer and is its own reference with the adapter off; the critic is a full copy
of the model with a value head; the reward model is a frozen copy with a random head. One learning rate serves both.
"""

import contextlib
import tempfile
from typing import Any

from protocol import Child, Ended, lockstep


def main() -> None:
    child = Child()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(child.job, folder)
        trainer.add_callback(lockstep(child, 1, counts(child.job)))
        with contextlib.suppress(Ended):
            trainer.train()


def counts(job: dict[str, Any]) -> dict[str, int]:
    """Roll-outs of an update, and the tokens sampled in it."""
    rollouts = len(job["prompts"])
    return {"rollouts": rollouts, "tokens": rollouts * job["response_length"]}


def build(job: dict[str, Any], folder: str) -> Any:
    """A PPOTrainer for the job; trl wants a folder, though nothing is saved there."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOTrainer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    lora = LoraConfig(
        r=job["lora_rank"],
        lora_alpha=job["lora_alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=dtype) for _ in range(2)
    )
    return PPOTrainer(
        args=arguments(job, folder),
        processing_class=tokenizer(job["model"], base.config.vocab_size),
        # not trl's peft_config, with which adapters on a bf16 base are fp32 and slow
        model=get_peft_model(base, lora, autocast_adapter_dtype=False),
        ref_model=None,
        reward_model=reward.requires_grad_(False),
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
    )


def arguments(job: dict[str, Any], folder: str) -> Any:
    """PPOConfig: a constant learning rate, no end to the updates, nothing saved, reported or sampled for show."""
    from trl.experimental.ppo import PPOConfig

    batch, micro = len(job["prompts"]), job["micro_batch"]
    if batch % micro:
        raise ValueError(f"micro_batch: {micro} does not divide the batch of {batch}")
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        local_rollout_forward_batch_size=job["rollout_batch"],
        num_mini_batches=job.get("mini_batches", 1),
        num_ppo_epochs=job["epochs"],
        total_episodes=batch * 10**6,
        response_length=job["response_length"],
        temperature=job["temperature"],
        kl_coef=job["kl_coefficient"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=job.get("seed", 0),
    )


def tokenizer(folder: str, vocab_size: int) -> Any:
    """The model's tokenizer with a padding token that is outside the model's vocabulary.

    trl masks padding before it embeds anything, so the token needs no embedding, and no response can contain it: every
    roll-out has its full length and every attention mask is all ones, which is trl's fastest case.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, padding_side="left")
    while len(loaded) <= vocab_size:
        loaded.add_special_tokens({"pad_token": f"<pad {len(loaded)}>"})
    return loaded


if __name__ == "__main__":
    main()

"""One side of the reward-model benchmark: trl 1.16's RewardTrainer, which shares the development environment.

See protocol.py for how it is spoken to. A step is one pass over the pairs: every optimiser step, with loading and
padding. The job:

    model            folder of a causal language model with a tokenizer that has a padding token
    dtype            fp32 or bf16: of every weight, adapters and optimiser states included
    autocast         true: weights in fp32 under bf16 autocast instead (optional)
    pairs            [{"prompt": ids, "chosen": ids, "rejected": ids}]
    pairs_per_step   pairs in an optimiser step; divides their number
    micro_batch      pairs in a forward and backward pass; divides pairs_per_step
    grouped          batches of similar length (optional, true), see `dataset`; false: trl's default, random
    lora_rank, lora_alpha, learning_rate, threads, seed
"""

import contextlib
import tempfile
from typing import Any

from protocol import Child, Ended, lockstep


def main() -> None:
    child = Child()
    job = child.job
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(job, folder)
        if len(trainer.train_dataset) != len(job["pairs"]):
            raise ValueError(f"trl kept {len(trainer.train_dataset)} of {len(job['pairs'])} pairs")
        trainer.add_callback(lockstep(child, len(job["pairs"]) // job["pairs_per_step"], counts(job)))
        with contextlib.suppress(Ended):
            trainer.train()


def counts(job: dict[str, Any]) -> dict[str, int]:
    """Pairs of a pass, and the tokens that are not padding, prompts counted with either response."""
    tokens = sum(len(ids) for row in joined(job["pairs"]) for ids in row.values())
    return {"pairs": len(job["pairs"]), "tokens": tokens}


def joined(pairs: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Prompt and response as one sequence, under the names that trl takes as tokenised."""
    return [
        {"chosen_ids": pair["prompt"] + pair["chosen"], "rejected_ids": pair["prompt"] + pair["rejected"]}
        for pair in pairs
    ]


def dataset(job: dict[str, Any]) -> Any:
    """The pairs, longest first where they are to be grouped.

    transformers' ``group_by_length`` shuffles, then sorts groups of an eighth of an epoch's steps or so: 64 pairs of
    256 at 8 a step. A benchmark's pass is about one such group, which its sampler would be too short to form, so the
    order is made here and kept.
    """
    from datasets import Dataset

    rows = joined(job["pairs"])
    if job.get("grouped", True):
        rows.sort(key=lambda row: max(map(len, row.values())), reverse=True)
    return Dataset.from_list(rows)


def build(job: dict[str, Any], folder: str) -> Any:
    """A RewardTrainer for the job; trl wants a folder, though nothing is saved there."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardTrainer

    autocast = job.get("autocast", False)
    dtype = torch.float32 if autocast else {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    base = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=dtype)
    lora = LoraConfig(
        r=job["lora_rank"],
        lora_alpha=job["lora_alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="SEQ_CLS",
    )
    return RewardTrainer(
        # not trl's peft_config, with which adapters on a bf16 base are fp32 and slow
        model=get_peft_model(base, lora, autocast_adapter_dtype=False),
        args=arguments(job, folder, autocast),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=dataset(job),
    )


def arguments(job: dict[str, Any], folder: str, autocast: bool) -> Any:
    """RewardConfig: a constant learning rate, no end to the passes, no pair dropped, nothing saved or reported."""
    from trl import RewardConfig

    step, micro = job["pairs_per_step"], job["micro_batch"]
    if step % micro or len(job["pairs"]) % step:
        raise ValueError(
            f"micro_batch {micro}, pairs_per_step {step}, {len(job['pairs'])} pairs: each must divide the next"
        )
    return RewardConfig(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=step // micro,
        num_train_epochs=10**6,
        max_length=None,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential" if job.get("grouped", True) else "random",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=autocast,
        gradient_checkpointing=False,
        seed=job.get("seed", 0),
    )


if __name__ == "__main__":
    main()

"""One of the processes of tests/test_sharding.py: trains adapters on bases of which it holds a share, and writes them.

python tests/sharding_run.py FOLDER BASE [DTYPE ...]     under torchrun's environment, or alone
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny_rl
from parallel_run import demonstrations, keep
from rlhfscale import models, networks, parallel, sharding
from rlhfscale.finetune import finetune
from rlhfscale.rewards import OutcomeRewardModel, outcome, process
from rlhfscale.rl import GRPO, PPO
from test_process import STEP_IDS
from test_process import planted as planted_steps
from test_rewards import planted
from tiny_rewards import random_head


def load(base: Path, dtype: str, head: str = "causal"):
    """A sharded base whose sums are exact enough to be compared: 4-bit weights too are computed with in float32."""
    if dtype == "fp32":
        model = models.load_base(base, dtype, head=head, sharded=True)
    else:
        auto = {"causal": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}[head]
        config = models._nf4()
        config.bnb_4bit_compute_dtype = torch.float32
        options = {"num_labels": 1} if head == "score" else {}
        options |= {"dtype": torch.float32, "quantization_config": config}
        model = sharding.shard(models.close_nf4_trap(auto.from_pretrained(base, **options)).eval())
    return random_head(model) if head == "score" else model


def fine_tuning(base) -> tuple[dict, list]:
    ours = networks.build(base, critic="none", rank=4)
    losses = finetune(ours, demonstrations(), epochs=2, batch_size=8, lr=3e-3, seed=(0,))
    return trained(ours), losses


def reward_model(base, train, data, folder: Path | None = None, **options) -> tuple[dict, list]:
    options |= {"epochs": 2, "lr": 3e-3, "lora_rank": 4, "merge": False, "seed": (0,), "tokens_per_micro_batch": 100}
    model, records = train(base, [data], **options)
    found = trained(model), [record["loss"] for record in records]
    if folder and parallel.rank() == 0:
        OutcomeRewardModel(model, None).save(folder)
    return found


def policy(base, algorithm=PPO, *, reward=tiny_rl.count_letter, folder: Path | None = None, **options):
    run = tiny_rl.trainer(algorithm, base=base, reward=reward, policy_lr=3e-3, **options)
    records = run.train(lambda update: tiny_rl.prompts(run, update), 3, folder=folder, progress=False)
    return trained(run.networks), records[["proxy", "kl_nats"]].to_numpy().tolist()


def trained(model) -> dict:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def bytes_held(model) -> dict:
    """Of the base's matrices: all of them, the largest block, and what this process holds now."""
    blocks = {id(p.block): p.block for p in model.parameters() if hasattr(p, "block")}.values()
    held = sum(block.share.nbytes for block in blocks)
    whole = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return {"held": held, "beside": sum(whole.values()), "all": sum(block._bytes.nbytes for block in blocks)}


def main(folder: Path, base: Path, dtypes: list[str]) -> None:
    torch.set_num_threads(1)
    parallel.start()
    saved = folder / f"saved-{parallel.size()}"
    for dtype in dtypes:
        runs = {
            "sft": lambda: fine_tuning(load(base, dtype)),
            "outcome": lambda: reward_model(load(base, dtype, "score"), outcome.train, planted(24, 0),
                                            saved / f"outcome-{dtype}", prompts_per_batch=7, readout="sum"),
            "process": lambda: reward_model(load(base, dtype, "score"), process.train, planted_steps(40, 0),
                                            responses_per_batch=7, step_ids=STEP_IDS),
            "ppo": lambda: policy(load(base, dtype), folder=saved / f"ppo-{dtype}"),
            "ppo-separate": lambda: policy(load(base, dtype), critic="separate", gradient_checkpointing=True),
            "ppo-bonus": lambda: policy(load(base, dtype), entropy_coefficient=0.01, max_tokens_per_pass=100),
            "grpo": lambda: policy(load(base, dtype), GRPO, responses_per_prompt=4),
        }  # fmt: skip
        for name, run in runs.items():
            keep(folder, f"{name}-{dtype}", *run())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

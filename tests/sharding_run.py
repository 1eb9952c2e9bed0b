"""One of the processes of tests/test_sharding.py: trains adapters on bases of which it holds a share, and writes them.

python tests/sharding_run.py FOLDER BASE DTYPE ... | sft | asked     under torchrun's environment, or alone
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
import tiny_rl
from parallel_run import demonstrations, keep
from rlhfscale.bed import labels
from rlhfscale.chat.finetune import finetune
from rlhfscale.models import loading, parallel, sharding
from rlhfscale.rewards import OutcomeRewardModel, outcome, process, scorer
from rlhfscale.rewards.shared import SharedReward
from rlhfscale.rl import GRPO, PPO, networks
from rlhfscale.samplers import hf, request_seeds
from test_process import STEP_IDS
from test_process import planted as planted_steps
from test_rewards import planted
from tiny_rewards import random_head


def load(base: Path, dtype: str, head: str = "causal"):
    """A sharded base whose sums are exact enough to be compared: 4-bit weights too are computed with in float32."""
    if dtype == "nf4":
        auto = {"causal": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}[head]
        config = loading._nf4()
        config.bnb_4bit_compute_dtype = torch.float32
        options = {"num_labels": 1} if head == "score" else {}
        options |= {"dtype": torch.float32, "quantization_config": config}
        model = sharding.shard(loading.close_nf4_trap(auto.from_pretrained(base, **options)).eval())
    else:
        model = loading.load_base(base, dtype, head=head, sharded=True)
    return random_head(model) if head == "score" else model


def fine_tuning(base) -> tuple[dict, list]:
    ours = networks.build(base, critic="none", rank=4)
    losses = finetune(ours, demonstrations(), epochs=2, batch_size=8, lr=1e-3, seed=(0,))
    return trained(ours), losses


def reward_model(base, train, data, folder: Path | None = None, **options) -> tuple[dict, list]:
    options |= {"epochs": 2, "lr": 1e-3, "lora_rank": 4, "merge": False, "seed": (0,), "tokens_per_micro_batch": 100}
    model, records = train(base, [data], **options)
    found = trained(model), [record["loss"] for record in records]
    if folder and parallel.rank() == 0:
        OutcomeRewardModel(model, None).save(folder)
    return found


def policy(base, algorithm=PPO, *, folder: Path | None = None, **options) -> tuple[dict, list]:
    run = tiny_rl.trainer(algorithm, base=base, policy_lr=1e-3, **options)
    records = run.train(lambda update: tiny_rl.prompts(run, update), 3, folder=folder, progress=False)
    return trained(run.networks), records[["proxy", "kl_nats"]].to_numpy().tolist()


def shared_reward(folder: Path) -> SharedReward:
    parallel.barrier()  # until the first process has written it
    return SharedReward(folder)


def trained(model) -> dict:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def runs(base: Path, dtype: str, saved: Path) -> dict[str, Callable[[], tuple[dict, list]]]:
    """What is trained: weights and record of each."""

    def scored():
        return load(base, dtype, "score")

    made = {
        "sft": lambda: fine_tuning(load(base, dtype)),
        "outcome": lambda: reward_model(
            scored(),
            outcome.train,
            labels.labelled(planted(24, 0)),
            saved / f"outcome-{dtype}",
            prompts_per_batch=7,
            readout="sum",
        ),
        "ppo": lambda: policy(load(base, dtype), folder=saved / f"ppo-{dtype}"),
        "ppo-separate": lambda: policy(load(base, dtype), critic="separate", gradient_checkpointing=True),
    }
    if dtype == "fp32":
        made |= {
            "process": lambda: reward_model(
                scored(), process.train, planted_steps(40, 0), responses_per_batch=7, step_ids=STEP_IDS
            ),
            "ppo-bonus": lambda: policy(load(base, dtype), entropy_coefficient=0.01, max_tokens_per_pass=100),
            "ppo-shared-reward": lambda: policy(load(base, dtype), reward=shared_reward(saved / f"outcome-{dtype}")),
            "grpo": lambda: policy(load(base, dtype), GRPO, responses_per_prompt=4),
        }
    return made


@torch.no_grad()
def facts(base: Path, dtype: str) -> dict:
    """About one sharded model beside a whole one: what is equal, and what this process holds."""
    whole, sharded = loading.load_base(base, dtype), loading.load_base(base, dtype, sharded=True)
    ids, _ = tiny_rl.ragged(vocabulary=56)
    found = {"logits": torch.equal(sharded(ids).logits, whole(ids).logits)}
    found["fingerprint"] = loading.fingerprint(sharded) == loading.fingerprint(whole)
    ours = networks.build(sharded, critic="separate", rank=4)
    with torch.enable_grad():
        for role in ("policy", "critic"):
            ours.hidden(ids, role).float().square().mean().backward()
    prompts = tiny.prompts(3 - parallel.rank())  # so many requests that one process has more batches and longer answers
    options = {"seeds": request_seeds((parallel.rank(),), len(prompts)), "max_new_tokens": 12, "batch_size": 2}
    found |= {
        "held": storage_bytes(ours.base),
        "whole": storage_bytes(whole),
    }
    plain = networks.build(whole, critic="separate", rank=4)
    plain._fused = None  # its products are rounded otherwise
    samples = []
    for each in (ours, plain):
        with each.decoder() as policy:
            samples.append(hf.sample(policy, prompts, **options))
    return found | {"samples": bool(np.array_equal(samples[0].ids, samples[1].ids))}


def storage_bytes(model) -> int:
    """Of what this process holds of all weights but adapters, with the scales of 4-bit ones; tied ones count once."""
    tensors = [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]
    states = [tensor.quant_state for tensor in tensors if getattr(tensor, "quant_state", None) is not None]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in (*local, *(state.absmax for state in states))]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def refusals(base: Path, folder: Path) -> dict[str, str]:
    """What a sharded model is not fit for, and what is said."""
    model, scored = (loading.load_base(base, sharded=True, head=head) for head in ("causal", "score"))
    ours = networks.build(loading.load_base(base, sharded=True), critic="none", rank=4)
    options = {"epochs": 1, "prompts_per_batch": 4, "lr": 1e-3, "readout": "sum", "seed": (0,)}
    asked = {
        "all weights": lambda: networks.build(model, adapter="none"),
        "all weights of a reward model": lambda: outcome.train(
            scored, [labels.labelled(planted(4, 0))], lora_rank=0, merge=False, **options
        ),
        "merge": lambda: outcome.train(scored, [labels.labelled(planted(4, 0))], lora_rank=4, **options),
        "merged": ours.merged_policy,
        "save": lambda: OutcomeRewardModel(scored, None).save(folder / "refused"),
        "twice": lambda: sharding.shard(model),
        "adapters": lambda: sharding.shard(scorer.prepare(loading.load_base(base, head="score"), 4, False, tiny_rng())),
        "device map": lambda: loading.load_base(base, sharded=True, device_map="cpu"),
    }
    return {name: refusal(function) for name, function in asked.items()}


def tiny_rng() -> np.random.Generator:
    return np.random.default_rng(0)


def refusal(function: Callable[[], object]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "not refused"


def main(folder: Path, base: Path, dtypes: list[str]) -> None:
    torch.set_num_threads(1)
    parallel.start()
    if dtypes == ["asked"]:  # of accelerate, by its configuration
        model = loading.load_base(base)
        assert sharding.is_sharded(model) == (parallel.size() > 1)
        keep(folder, "sft", *fine_tuning(model))
        return
    if dtypes == ["sft"]:
        keep(folder, "sft", *fine_tuning(load(base, "fp32")))
        return
    for dtype in dtypes:
        for name, run in runs(base, dtype, folder / f"saved-{parallel.size()}").items():
            keep(folder, f"{name}-{dtype}", *run())
    if parallel.size() > 1:
        about = {dtype: facts(base, dtype) for dtype in ("bf16", *dtypes)} | {"refused": refusals(base, folder)}
        (folder / f"facts-{parallel.rank()}.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

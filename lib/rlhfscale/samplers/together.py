"""Sampling by several processes that train a model together: each its share of the prompts, or the first process of
each machine for all of them, by a sampler that they share, such as a vLLM engine split over their GPUs.

    parallel.start()
    with Together(lambda: VLLM("runs/sft", tensor_parallel=8, gpu_memory_fraction=0.4, max_lora_rank=16)) as sampler:
        trainer = PPO(load_base("runs/sft", "bf16", sharded=True), tokenizer, reward, config, sampler=sampler)

A base that the processes share need not be gathered for every token then.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhfscale.models import parallel
from rlhfscale.samplers.base import Completions


def sample(
    sampler: Callable[..., Completions],
    policy: Any,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: np.ndarray,
    **options: Any,
) -> Completions:
    """``sampler(policy, prompts, seeds=seeds, **options)``, of which each process computes a share: in every process
    the completions of all prompts."""
    if parallel.size() == 1:
        return sampler(policy, prompts, seeds=seeds, **options)
    shared = isinstance(sampler, Together)
    rows = sampler.rows(len(prompts)) if shared else parallel.own(len(prompts)).numpy()
    found = sampler(policy, [prompts[row] for row in rows], seeds=seeds[rows], **options)
    if shared:
        parallel.barrier()  # the others have waited for long, which their GPUs must not: the sampler computes on them
    whole = parallel.gathered if shared else parallel.whole
    arrays = {}
    for name in ("ids", "logprobs", "lengths", "finished"):
        values = torch.from_numpy(getattr(found, name)).to(policy.device)
        values = values.to(torch.int64) if name == "finished" else values
        arrays[name] = whole(values, torch.from_numpy(rows), len(seeds)).cpu().numpy()
    return replace(found, **arrays | {"finished": arrays["finished"].astype(bool), "seeds": seeds})


class Together:
    """A sampler as trainers call it, in every process. It must not compute the trainer's own model, of which the others
    may hold shares, so `hf.sample` is none of a sharded base.

    Args:
        make: makes the sampler; called by the first process of each machine, the others wait.
    """

    def __init__(self, make: Callable[[], Any]):
        self.sampler = make() if parallel.leads_machine() else None
        parallel.barrier()

    def rows(self, count: int) -> np.ndarray:
        """int64: which of ``count`` prompts this process asks for: its machine's share, or none."""
        return parallel.of_machine(count).numpy()

    def push(self, networks: Any) -> None:
        """Sample under the policy adapter as it is now."""
        if self.sampler is not None and hasattr(self.sampler, "push"):
            self.sampler.push(networks)

    def __call__(
        self,
        policy: Any,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: np.ndarray,
        max_new_tokens: int,
        temperature: float = 1.0,
        **options: Any,
    ) -> Completions:
        """As `hf.sample`, for the prompts of `rows`."""
        if not len(prompts):
            return Completions.empty(seeds, max_new_tokens, temperature)
        options |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return self.sampler(policy, prompts, seeds=seeds, **options)

    def close(self) -> None:
        """End the sampler."""
        if hasattr(self.sampler, "close"):
            self.sampler.close()

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

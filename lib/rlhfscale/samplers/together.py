"""One sampler for all processes of a machine that train a model together, such as a vLLM engine split over their GPUs.

    parallel.start()
    with Together(lambda: VLLM("runs/sft", tensor_parallel=8, gpu_memory_fraction=0.4, max_lora_rank=16)) as sampler:
        trainer = PPO(load_base("runs/sft", "bf16", sharded=True), tokenizer, reward, config, sampler=sampler)

The first process of each machine makes the sampler and asks it for the responses of all of them; trainers hand those
out. A base that the processes share need not be gathered for every token then.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhfscale import parallel
from rlhfscale.samplers.base import Completions


class Together:
    """A sampler as trainers call it, in every process.

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

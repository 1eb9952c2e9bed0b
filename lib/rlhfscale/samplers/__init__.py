"""Samplers draw one response to each prompt and return them as `Completions`.

    prompts = repeated([[1, 5, 9], [1, 7]], num_samples=4, temperature=1.0)
    seeds = request_seeds((0,), len(prompts))
    completions = hf.sample(model, prompts, seeds=seeds, max_new_tokens=64, temperature=1.0)

The files:

    base.py      what every sampler takes and returns, and the random numbers of a request
    hf.py        the sampler in the training process, with our own decoder for a Llama on a CPU
    vllm.py      a vLLM engine in a process of its own
    engine.py    the program of that process
    together.py  one sampler for several processes that train together
    auto.py      the choice of the faster sampler for a model
"""

from rlhfscale.samplers.base import Completion, Completions, repeated, request_seeds

__all__ = ["Completion", "Completions", "repeated", "request_seeds"]

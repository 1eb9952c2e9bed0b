"""One side of the sampler benchmark: vLLM's own offline ``LLM.generate``, compiled, in the development environment.

See protocol.py for how it is spoken to. A step samples one response to every prompt, all given at once. The job is that
of generate.py, without ``batch``. As there, only tokens are returned, and no request has a seed of its own: less than a
trainer needs. The engine runs in this process, so that its processor seconds are counted.
"""

import os
from typing import Any

from protocol import Child

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    from vllm import LLM, SamplingParams

    child = Child()
    job = child.job
    llm = LLM(
        job["model"],
        dtype={"fp32": "float32", "bf16": "bfloat16"}[job["dtype"]],
        max_model_len=1024,
        skip_tokenizer_init=True,
        generation_config="vllm",
        disable_log_stats=True,
        seed=job["seed"],
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    parameters = SamplingParams(
        temperature=job["temperature"], max_tokens=job["response_length"], ignore_eos=True, detokenize=False
    )

    def step() -> dict[str, Any]:
        llm.reset_prefix_cache()  # of the step before: each one reads its prompts
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return {"responses": len(outputs), "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    tokens = step()["tokens"] + sum(map(len, job["prompts"]))
    # compiled products cannot be counted: two FLOPs for each weight and token, the output head's for prompts too
    child.ready(flops=2 * num_parameters(llm) * tokens)
    while child.wait():
        child.start()
        child.report(**step())


def num_parameters(llm: Any) -> int:
    """Of the model, embeddings included."""
    return sum(llm.apply_model(lambda model: sum(parameter.numel() for parameter in model.parameters())))


if __name__ == "__main__":
    main()

"""One side of the sampler benchmark: transformers' ``generate``, in the development environment.

See protocol.py for how it is spoken to. A step samples one response to every prompt. The job:

    model            folder of a causal language model
    dtype            fp32 or bf16, of every weight
    prompts          token ids of each prompt, all of one length
    response_length  tokens of every response: end-of-sequence is disabled
    batch            prompts sampled together
    temperature, threads, seed

Only tokens are returned, no scores: less than a trainer needs.
"""

from typing import Any

from protocol import Child


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    child = Child()
    job = child.job
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    prompts = torch.tensor(job["prompts"])
    config = GenerationConfig(
        max_new_tokens=job["response_length"],
        do_sample=True,
        temperature=job["temperature"],
        top_k=0,
        top_p=1.0,
        pad_token_id=model.config.pad_token_id,
    )

    def step() -> dict[str, Any]:
        tokens = 0
        for batch in prompts.split(job["batch"]):
            whole = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=config)
            tokens += whole[:, batch.shape[1] :].numel()
        return {"responses": len(prompts), "tokens": tokens}

    child.serve(step)


if __name__ == "__main__":
    main()

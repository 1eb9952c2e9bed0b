"""The yardstick for QLoRA PPO's memory: a plain supervised QLoRA step with peft, in the development environment.

See protocol.py for how it is spoken to. A step is one optimiser step on as many sequences of the same length, the base
in NF4 with gradient checkpointing, prepared as peft documents it. The job:

    model            folder of a causal language model
    prompts          token ids of each prompt, all of one length
    response_length  tokens that follow
    lora_rank, lora_alpha, learning_rate, threads, seed
"""

from typing import Any

from protocol import Child


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    child = Child()
    job = child.job
    torch.manual_seed(job["seed"])
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(job["model"], quantization_config=quantised, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model)
    lora = LoraConfig(r=job["lora_rank"], lora_alpha=job["lora_alpha"], target_modules="all-linear")
    model = get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"])
    prompts = torch.tensor(job["prompts"])
    responses = torch.randint(17, model.config.vocab_size, (len(prompts), job["response_length"]))
    ids = torch.cat([prompts, responses], 1)

    def step() -> dict[str, Any]:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        return {"sequences": len(ids), "tokens": ids.numel()}

    child.serve(step)


if __name__ == "__main__":
    main()

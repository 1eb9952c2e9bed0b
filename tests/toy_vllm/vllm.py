"""A toy in vLLM's place, with the names that `samplers.engine` uses: slow, and what it says follows from prompt, seed
and the adapter that it was given last. The variable TOY_VLLM_GPUS makes it one on GPUs, and names a file for its
options.
"""

import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

NOTES = os.environ.get("TOY_VLLM_GPUS")
SECONDS = 0.3  # of each request, so that it can be killed in the middle of one


class SamplingParams(SimpleNamespace):
    pass


class LoRARequest:
    def __init__(self, name, number, folder, load_inplace=False):
        self.folder = folder


class LLM:
    def __init__(self, model, **options):
        config = json.loads((Path(model) / "config.json").read_text())
        about = SimpleNamespace(
            max_model_len=config["max_position_embeddings"],
            get_vocab_size=lambda: config["vocab_size"],
            get_hidden_size=lambda: config["hidden_size"],
            hf_config=SimpleNamespace(**config),
            try_get_generation_config=dict,
        )
        if NOTES:
            Path(NOTES).write_text(json.dumps(options, default=str))
        self.vocabulary, self.adapter = config["vocab_size"], ""
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(model_config=about), add_lora=self.add_lora)

    def add_lora(self, request):
        weights = Path(request.folder) / "adapter_model.safetensors"
        self.adapter = hashlib.sha256(weights.read_bytes()).hexdigest()

    def reset_prefix_cache(self):
        return True

    def generate(self, prompts, parameters, use_tqdm, lora_request):
        time.sleep(SECONDS)
        adapter = self.adapter if lora_request else ""
        return [self.respond(prompt, how, adapter) for prompt, how in zip(prompts, parameters, strict=True)]

    def respond(self, prompt, how, adapter):
        rng, ids = random.Random(f"{prompt['prompt_token_ids']} {how.seed} {adapter}"), []
        while len(ids) < how.max_tokens and not (ids and ids[-1] in how.stop_token_ids):
            ids.append(rng.randrange(self.vocabulary))
        stopped = "stop" if ids[-1] in how.stop_token_ids else "length"
        logprobs = SimpleNamespace(logprobs=[-1.0] * len(ids))
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=stopped)])


def _module(name, **contents):
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(contents)


_module("vllm.platforms", current_platform=SimpleNamespace(is_cpu=lambda: not NOTES))
_module("vllm.lora")
_module("vllm.lora.request", LoRARequest=LoRARequest)

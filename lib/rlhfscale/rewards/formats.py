"""Labelled data in the formats that people have: TRL's, as text or conversations, from datasets, JSONL or Parquet.

    preferences   {prompt, chosen, rejected}, or {chosen, rejected} that begin alike: texts, or whole conversations
    correctness   {prompt, completion, label}
    steps         {prompt, completions, labels}: one text and one label for each step

A prompt is a text or messages; a chosen, rejected or other completion is a text, or messages whose last one is the
response. Conversations are rendered by the chat template of the model to be trained.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from rlhfscale.models.sequences import Conversation, Sequences
from rlhfscale.rewards.conversations import render
from rlhfscale.rewards.labelled import Labelled, StepLabelled, encode, step_ends
from rlhfscale.rewards.process import find_step_ids

Rows = str | Path | Iterable[Mapping[str, Any]]
"""A .jsonl or .parquet file, a `datasets` object, or any collection of rows."""
Prompt = str | Conversation


def preferences(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Labelled:
    """Comparisons. Each row is a group of its own, the chosen response first; other columns are not read.

    Raises ValueError for a row that is no comparison (names it), and where there is none.
    """

    def read(row: Mapping[str, Any]) -> list[tuple[Prompt, str]]:
        chosen, rejected = _of(row, "chosen"), _of(row, "rejected")
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same")
        if row.get("prompt") is None:
            prompt = _shared(chosen, rejected)
            return [(prompt, _response(prompt, text[len(prompt) :])) for text in (chosen, rejected)]
        prompt = _of(row, "prompt")
        return [(prompt, _response(prompt, text)) for text in (chosen, rejected)]

    found = [pair for row in _read(rows, read) for pair in row]
    sequences = _sequences(tokenizer, found)
    count = len(found) // 2
    none = np.full(len(found), np.nan, np.float32)
    return Labelled(sequences, np.repeat(np.arange(count), 2), np.tile(np.array([1, 0], np.float32), count), none)


def correctness(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Labelled:
    """Right or wrong responses. Raises ValueError as `preferences` does."""

    def read(row: Mapping[str, Any]) -> tuple[Prompt, str, float]:
        prompt = _of(row, "prompt")
        return prompt, _response(prompt, _of(row, "completion")), _label(row.get("label"))

    found = _read(rows, read)
    labels = np.array([label for *_, label in found], np.float32)
    sequences = _sequences(tokenizer, [(prompt, response) for prompt, response, _ in found])
    return Labelled(sequences, np.arange(len(found)), np.full(len(found), np.nan, np.float32), labels)


def steps(rows: Rows, tokenizer: PreTrainedTokenizerBase, separator: str = "\n") -> StepLabelled:
    """Responses step by step, joined by the separator. Raises ValueError as `preferences` does.

    ``find_step_ids(tokenizer, separator)`` are the ``step_ids`` to train with.
    """

    def read(row: Mapping[str, Any]) -> tuple[Prompt, str, list[float]]:
        texts, labels = row.get("completions"), row.get("labels")
        if not _listed(texts) or not _listed(labels) or not 0 < len(texts) == len(labels):
            raise ValueError("needs completions and labels, two lists of equal length")
        if bad := [text for text in texts if not isinstance(text, str) or not text or separator in text]:
            raise ValueError(f"step {bad[0]!r} is empty, no text, or holds the separator {separator!r}")
        return _of(row, "prompt"), separator.join(texts), [_label(label) for label in labels]

    found = _read(rows, read)
    sequences = _sequences(tokenizer, [(prompt, response) for prompt, response, _ in found])
    ends = step_ends(sequences, find_step_ids(tokenizer, separator)).sum(1)
    table = np.full((len(found), max(len(labels) for *_, labels in found)), np.nan, np.float32)
    for row, (*_, labels) in enumerate(found):
        if ends[row] != len(labels):
            raise ValueError(f"row {row}: its {len(labels)} steps have {ends[row]} ends in the tokenizer's tokens")
        table[row, : len(labels)] = labels
    return StepLabelled(sequences, table)


def _read(rows: Rows, read: Callable[[Mapping[str, Any]], Any]) -> list[Any]:
    """What ``read`` makes of each row; its errors name the row, from 0."""
    name, found = (f"{rows}, " if isinstance(rows, str | Path) else ""), []
    for index, row in enumerate(_rows(rows)):
        try:
            if not isinstance(row, Mapping):
                raise ValueError(f"is a {type(row).__name__}, not fields with values")
            found.append(read(row))
        except ValueError as error:
            raise ValueError(f"{name}row {index}: {error}") from None
    if not found:
        raise ValueError(f"{name}no row")
    return found


def _rows(rows: Rows) -> Iterable[Mapping[str, Any]]:
    if not isinstance(rows, str | Path):
        return rows
    file = Path(rows)
    if file.suffix == ".parquet":
        return pd.read_parquet(file).to_dict("records")
    if file.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{file}: its name must end in .jsonl or .parquet")
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [_json(file, index, line) for index, line in enumerate(lines)]


def _json(file: Path, index: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, row {index}: no JSON ({error})") from None


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def _of(row: Mapping[str, Any], name: str) -> Prompt:
    """A text, or messages as plain dicts."""
    value = row.get(name)
    if isinstance(value, str) and value:
        return value
    if _listed(value) and len(value) and all(map(_is_message, value)):
        return [dict(message) for message in value]
    raise ValueError(f'{name}: needs a text that is not empty, or messages, a list of {{"role": ..., "content": ...}}')


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _label(value: Any) -> float:
    if isinstance(value, bool | np.bool_) or (isinstance(value, int | float | np.number) and value in (0, 1)):
        return float(value)
    raise ValueError(f"label {value!r} is neither 0 nor 1, true nor false")


def _shared(chosen: Prompt, rejected: Prompt) -> Prompt:
    """How two whole texts or conversations begin alike."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected: one is a text, the other messages")
    shorter = min(len(chosen), len(rejected)) - (0 if isinstance(chosen, str) else 1)
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, str):  # a word is not cut in two
        same = next((i + 1 for i in reversed(range(same)) if chosen[i].isspace()), 0)
    if not same:
        raise ValueError("chosen and rejected do not begin alike; give the prompt")
    return chosen[:same]


def _response(prompt: Prompt, whole: Prompt) -> str:
    """The response of a completion; that of a conversation may begin with the prompt's messages."""
    if not isinstance(whole, str):
        if isinstance(prompt, str):
            raise ValueError("the prompt is a text, its completion messages")
        if whole[: len(prompt)] == prompt:
            whole = whole[len(prompt) :]
        if len(whole) != 1 or whole[0]["role"] != "assistant":
            raise ValueError("after the prompt there must be one message of the assistant")
        return whole[0]["content"]
    return whole


def _sequences(tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[Prompt, str]]) -> Sequences:
    if all(isinstance(prompt, str) for prompt, _ in rows):
        prompts, responses = zip(*rows, strict=True)
        return encode(tokenizer, prompts, responses, np.ones(len(rows), bool))
    heads, tails = [], []
    for prompt, response in rows:
        if isinstance(prompt, str):
            one = encode(tokenizer, [prompt], [response], np.ones(1, bool))
            start = int(one.prompt_lengths[0])
            head, tail = one.ids[0, :start].tolist(), one.ids[0, start : int(one.lengths[0])].tolist()
        else:
            head, tail = render(tokenizer, prompt, response, True)
        heads.append(head)
        tails.append(tail)
    pad = tokenizer.pad_token_id
    return Sequences.join(heads, tails, np.ones(len(rows), bool), tokenizer, 0 if pad is None else pad)

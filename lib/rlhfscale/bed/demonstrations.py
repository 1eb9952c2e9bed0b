"""Demonstrations: prompts with a demonstrator's response, misconceptions and slips included, as token sequences."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, islice

import numpy as np

from rlhfscale.bed import ladder, tasks
from rlhfscale.models.documents import Documents, pad

STREAM = {"pretrain": 1, "sft": 2, "train": 3, "eval": 4, "policy": 5, "held_out_documents": 6, "samples": 7}
"""Numbers of the random streams: one for each use, so that no two stages draw the same problems."""


@lru_cache(maxsize=1)
def token_ids() -> dict[str, int]:
    """Token to id, as the saved tokenizer maps it."""
    return {token: index for index, token in enumerate((*ladder.SPECIAL_TOKENS, *tasks.vocabulary()))}


@lru_cache(maxsize=1)
def tokens() -> tuple[str, ...]:
    """Id to token."""
    return tuple(token_ids())


def encode(text: str) -> list[int]:
    """Ids of whitespace-separated text, without special tokens. KeyError names an unknown token."""
    ids = token_ids()
    return [ids[token] for token in text.split()]


def problem_list(seed: Sequence[int], split: str, families: Sequence[str], count: int) -> list[tasks.Problem]:
    """The first ``count`` problems of a stream."""
    return list(islice(tasks.problems(seed, split, families), count))


def encode_prompts(problems: Sequence[tasks.Problem]) -> list[list[int]]:
    """Token ids of each prompt, begin-of-sequence first."""
    return [[ladder.BOS_ID, *encode(problem.prompt)] for problem in problems]


def demonstrations(seed: Sequence[int], split: str, families: Sequence[str], count: int, slip: float) -> Documents:
    """``count`` problems with a demonstrator's response each, misconceptions and slips included.

    Args:
        seed: entropy of the stream of problems and of the slips.
        split: "train" or "eval".
        families: names of task families.
        slip: probability that a demonstrated token is replaced by another symbol of its alphabet.
    """
    rng = np.random.default_rng([*seed, 1])
    problems = problem_list([*seed, 0], split, families, count)
    prompts = encode_prompts(problems)
    documents = []
    for problem, prompt in zip(problems, prompts, strict=True):
        response = tasks.FAMILIES[problem.family].demonstrate(problem, rng, slip)
        documents.append([*prompt, *encode(response), ladder.EOS_ID])
    return Documents(
        ids=pad(documents),
        lengths=np.array([len(document) for document in documents]),
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
    )


def held_out_documents(slip: float, count: int = 1024) -> Documents:
    """The demonstrations on which every rung's loss is measured."""
    return demonstrations((0, STREAM["held_out_documents"]), "eval", tuple(tasks.FAMILIES), count, slip)


def demonstration_nats(documents: Documents, slip: float) -> np.ndarray:
    """Negative log-likelihood in nats of each demonstrated response under the demonstrators' own process, float64
    [document], exact.

    A model's loss on a document minus this is the excess that knowledge could remove; its mean estimates the KL
    divergence from the demonstrators to the model, without the noise of which demonstrators the documents happen to
    show. Its own mean estimates the demonstrators' entropy, and no model can have a lower expected loss.

    Raises:
        ValueError: no demonstrator writes such a document.
    """
    names, nats = tokens(), np.zeros(len(documents))
    for row, (ids, length, start) in enumerate(
        zip(documents.ids, documents.lengths, documents.prompt_lengths, strict=True)
    ):
        problem = parse_prompt([names[index] for index in ids[1:start]])
        response = " ".join(names[index] for index in ids[start : length - 1])
        states = [tuple(part.split()) for part in response.split(tasks.STEP)]
        likelihood = tasks.FAMILIES[problem.family].likelihood(problem, states, slip)
        if not likelihood:
            raise ValueError(f"document {row}: no demonstrator writes {response!r} with slip = {slip}")
        nats[row] = -np.log(likelihood)
    return nats


def parse_prompt(words: Sequence[str]) -> tasks.Problem:
    """The problem of a prompt's tokens."""
    family, middle = tasks.FAMILIES[words[0]], list(words).index(tasks.STATE)
    operations, start = tuple(words[1:middle]), tuple(words[middle + 1 : -1])
    states = tuple(accumulate(operations, lambda state, operation: family.apply(operation, state), initial=start))
    return tasks.Problem(family.name, operations, start, states[1:])

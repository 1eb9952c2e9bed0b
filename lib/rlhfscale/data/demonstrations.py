"""Demonstrations: prompts with a demonstrator's response, slips included, as token sequences."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice

import numpy as np

from rlhfscale import ladder, tasks
from rlhfscale.lm import Documents, pad


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


def demonstrations(
    seed: Sequence[int], split: str, families: Sequence[str], count: int, slip: float, careful_share: float = 0.0
) -> Documents:
    """``count`` problems with a demonstrator's response each.

    Args:
        seed: entropy of the stream of problems and of the slips.
        split: "train" or "eval".
        families: names of task families.
        slip: probability that a token of a careless demonstration is replaced by another symbol.
        careful_share: share of demonstrations without slips.
    """
    rng = np.random.default_rng([*seed, 1])
    problems = problem_list([*seed, 0], split, families, count)
    prompts = encode_prompts(problems)
    documents = []
    for problem, prompt in zip(problems, prompts, strict=True):
        rate = 0.0 if rng.random() < careful_share else slip
        response = tasks.FAMILIES[problem.family].demonstrate(problem, rng, rate)
        documents.append([*prompt, *encode(response), ladder.EOS_ID])
    return Documents(
        ids=pad(documents),
        lengths=np.array([len(document) for document in documents]),
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
    )

"""MT-Bench: two-turn questions, judged one answer at a time or in pairs (Zheng et al. 2023, arXiv 2306.05685).

Questions, reference answers and judge prompts are the benchmark's own; see `evals.sources` for where they come from.
The rules are FastChat's. What it leaves out: parse failures are counted and shown, and means have intervals that
resample questions.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rlhfscale.stats.bootstrap import Interval, bootstrap

NEED_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose judge sees a reference answer."""
TIE_MARGIN = 0.1
"""Scores closer than this count as a tie when pairs are made from single scores."""
SCORE_RANGE = (0.0, 10.0)
PAIR_VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
_DOUBLE = re.compile(r"\[\[(\d{1,6}(?:\.\d{0,6})?)\]\]")
_SINGLE = re.compile(r"\[(\d{1,6}(?:\.\d{0,6})?)\]")


@dataclass(frozen=True)
class Question:
    """One question of two turns.

    Attributes:
        question_id: its number, 81 to 160 in the benchmark.
        category: writing, roleplay, reasoning, math, coding, extraction, stem or humanities.
        turns: the user's two messages.
        reference: the reference answers of the two turns; empty where the category needs none.
    """

    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] = ()


# Verdicts.


def parse_score(judgment: str) -> float | None:
    """The score in a judge's output, by FastChat's rule: the first [[number]], else the first [number], else None."""
    found = _DOUBLE.search(judgment) or _SINGLE.search(judgment)
    return float(found.group(1)) if found else None


def parse_pair(judgment: str) -> str | None:
    """``A``, ``B`` or ``tie`` by FastChat's rule: the first of [[A]], [[B]], [[C]] (in this order) that occurs."""
    return next((verdict for mark, verdict in PAIR_VERDICTS.items() if mark in judgment), None)


def score_of(judgment: str, answers: Sequence[str] = ()) -> float | None:
    """`parse_score`, made safe against answers that hold a verdict of their own.

    Where an answer contains something that parses as a score, the judge may have quoted it: then its output must hold
    one distinct score only, else the value is missing. A score outside `SCORE_RANGE` is missing too.
    """
    score = parse_score(judgment)
    if score is None or not SCORE_RANGE[0] <= score <= SCORE_RANGE[1]:
        return None
    if any(parse_score(answer) is not None for answer in answers):
        marks = {float(mark) for mark in _DOUBLE.findall(judgment) or _SINGLE.findall(judgment)}
        return score if len(marks) == 1 else None
    return score


def pair_of(judgment: str, answers: Sequence[str] = ()) -> str | None:
    """`parse_pair`, made safe in the same way as `score_of`."""
    if any(parse_pair(answer) for answer in answers):
        found = {verdict for mark, verdict in PAIR_VERDICTS.items() if mark in judgment}
        return found.pop() if len(found) == 1 else None
    return parse_pair(judgment)


# Prompts.


def single_prompt(
    prompts: Mapping[str, Mapping[str, str]], question: Question, turn: int, answers: Sequence[str]
) -> list[dict[str, str]]:
    """The messages that ask for a score of turn 1 or 2.

    Args:
        prompts: the benchmark's judge prompts by name.
        answers: the model's answers to the turns so far, at least ``turn`` of them.
    """
    about = _references(question)
    if turn == 1:
        about |= {"question": question.turns[0], "answer": answers[0]}
    else:
        about |= {"answer_1": answers[0], "answer_2": answers[1]}
    return _filled(prompts[_name("single", question, turn)], about)


def pair_prompt(
    prompts: Mapping[str, Mapping[str, str]],
    question: Question,
    turn: int,
    answers_a: Sequence[str],
    answers_b: Sequence[str],
) -> list[dict[str, str]]:
    """The messages that ask which of two models answered better. Arguments as `single_prompt`."""
    about = _references(question)
    if turn == 1:
        about |= {"question": question.turns[0], "answer_a": answers_a[0], "answer_b": answers_b[0]}
    else:
        about |= {f"answer_a_{i}": answers_a[i - 1] for i in (1, 2)}
        about |= {f"answer_b_{i}": answers_b[i - 1] for i in (1, 2)}
    return _filled(prompts[_name("pair", question, turn)], about)


def _name(mode: str, question: Question, turn: int) -> str:
    with_reference = question.category in NEED_REFERENCE
    name = {"single": "single-math-v1" if with_reference else "single-v1"}
    name["pair"] = "pair-math-v1" if with_reference else "pair-v2"
    return name[mode] + ("-multi-turn" if turn == 2 else "")


def _references(question: Question) -> dict[str, str]:
    if question.category in NEED_REFERENCE and not question.reference:
        raise ValueError(f"question {question.question_id} ({question.category}) needs a reference answer, has none")
    about = {f"question_{i}": text for i, text in enumerate(question.turns, 1)}
    return about | {f"ref_answer_{i}": text for i, text in enumerate(question.reference, 1)}


def _filled(prompt: Mapping[str, str], about: Mapping[str, str]) -> list[dict[str, str]]:
    """The template with its fields replaced in one pass: braces in an answer stay what they are."""
    text = re.sub(r"\{([a-z_0-9]{1,20})\}", lambda match: about[match.group(1)], prompt["prompt_template"])
    return [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": text}]


# Single scores.


def single_means(scores: pd.DataFrame) -> dict[str, Any]:
    """FastChat's means: each over all kept rows, so the average is not the mean of the turns' means.

    Args:
        scores: one row for each judgment: ``turn``, ``score`` (NaN where missing), optionally ``category``.

    Returns:
        ``turn1``, ``turn2``, ``average``, ``num_judged``, ``num_missing``, and ``category/NAME`` for each category. A
        mean over no rows is NaN.
    """
    kept = scores.dropna(subset="score")
    means = {f"turn{turn}": kept.loc[kept["turn"] == turn, "score"].mean() for turn in (1, 2)}
    means |= {"average": kept["score"].mean()}
    if "category" in scores:
        means |= {f"category/{name}": rows["score"].mean() for name, rows in scores.groupby("category")}
    return means | {"num_judged": len(kept), "num_missing": len(scores) - len(kept)}


def single_interval(scores: pd.DataFrame, *, rng: np.random.Generator, num_draws: int = 2000) -> Interval:
    """The average score with a 95% interval from resampling questions (``question_id``, ``score``)."""
    kept = scores.dropna(subset="score")
    grouped = kept.groupby("question_id")["score"]
    values = (grouped.sum().to_numpy(), grouped.count().to_numpy(float))
    return bootstrap(values, _ratio, unit="prompt", rng=rng, num_draws=num_draws, on="means")


def pairs_from_scores(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Pairwise verdicts from two models' single scores, by question and turn; closer than `TIE_MARGIN` is a tie.

    Returns:
        ``question_id``, ``turn``, ``winner`` (``model_1``, ``model_2`` or ``tie``), of rows that both have.
    """
    keys = ["question_id", "turn"]
    both = first[[*keys, "score"]].merge(second[[*keys, "score"]], on=keys, suffixes=("_1", "_2")).dropna()
    difference = both["score_1"] - both["score_2"]
    winner = np.select([difference.abs() < TIE_MARGIN, difference > 0], ["tie", "model_1"], "model_2")
    return both[keys].assign(winner=winner)


# Pairs.


def pair_winner(game_1: str | None, game_2: str | None) -> str | None:
    """The winner of two games with swapped order: model_1 is A in game 1 and B in game 2.

    Args:
        game_1, game_2: ``A``, ``B``, ``tie``, or None where missing.

    Returns:
        ``model_1`` or ``model_2`` where both games agree, ``tie`` where they do not or one is a tie, None (dropped)
        where either is missing.
    """
    if game_1 is None or game_2 is None:
        return None
    named = ({"A": "model_1", "B": "model_2"}.get(game_1, "tie"), {"A": "model_2", "B": "model_1"}.get(game_2, "tie"))
    return named[0] if named[0] == named[1] else "tie"


def pair_rates(winners: Sequence[str | None], model: str = "model_1") -> dict[str, float]:
    """Shares of wins, losses and ties of one side; ``win_rate_adjusted`` counts a tie as half a win."""
    kept = [winner for winner in winners if winner is not None]
    won, tied = sum(winner == model for winner in kept), sum(winner == "tie" for winner in kept)
    count = len(kept)
    share = (lambda part: part / count) if count else (lambda part: float("nan"))
    return {
        "win": won,
        "loss": count - won - tied,
        "tie": tied,
        "win_rate": share(won),
        "loss_rate": share(count - won - tied),
        "win_rate_adjusted": share(won + tied / 2),
        "num_judged": count,
        "num_missing": len(winners) - count,
    }


def pair_interval(pairs: pd.DataFrame, *, rng: np.random.Generator, num_draws: int = 2000) -> Interval:
    """The adjusted win rate of model_1 with a 95% interval from resampling questions (``question_id``, ``winner``)."""
    kept = pairs.dropna(subset="winner")
    points = kept["winner"].map({"model_1": 1.0, "tie": 0.5, "model_2": 0.0}).groupby(kept["question_id"])
    values = (points.sum().to_numpy(), points.count().to_numpy(float))
    return bootstrap(values, _ratio, unit="prompt", rng=rng, num_draws=num_draws, on="means")


def _ratio(means: tuple[float, float]) -> float:
    return means[0] / means[1]

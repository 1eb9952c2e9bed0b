"""MT-Bench with a judge: its requests, and tables of scores and of comparisons in pairs (Zheng et al. 2023)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from rlhfscale.evals import mt_bench
from rlhfscale.evals.benchmarks import GAMES, NO_VERDICT, Ask, by_score, check, estimate_row, verdict_text
from rlhfscale.evals.judge import JudgeError, Request
from rlhfscale.evals.mt_bench import Question
from rlhfscale.stats.bootstrap import bootstrap


def mt_single_requests(
    questions: Sequence[Question], prompts: Mapping[str, Any], answers: Sequence[Sequence[str]], max_tokens: int
) -> list[Request]:
    """For each question a request for turn 1 and one for turn 2."""
    found = []
    for question, given in zip(questions, answers, strict=True):
        for turn in (1, 2):
            messages = mt_bench.single_prompt(prompts, question, turn, given)
            about = {"messages": tuple(messages), "answers": tuple(given[:turn]), "max_tokens": max_tokens}
            found.append(Request(id=f"{question.question_id}/turn{turn}", **about))
    return found


def mt_single(questions: Sequence[Question], prompts: Mapping[str, Any], answers: Any, ask: Ask) -> pd.DataFrame:
    """Scores: question_id, category, turn, score (NaN where missing), num_chars, error.

    Raises:
        JudgeError: a judge that gives no text.
        TooManyMissing: see `Ask`.
    """
    if ask.judge.scores:
        raise JudgeError(f"judge {ask.judge.name} gives scores, not text: MT-Bench takes it in pairs only")
    requests = mt_single_requests(questions, prompts, answers, ask.max_tokens)
    requests = _constrained(requests, ask, "Rating: [[", tuple("123456789"))
    rows = []
    for request, reply in zip(requests, ask.replies(requests), strict=True):
        quoted = () if request.choices else request.answers
        score = None if reply.error else mt_bench.score_of(verdict_text(request, reply), quoted)
        rows.append((score, len(request.answers[-1]), reply.error or ("" if score is not None else NO_VERDICT)))
    keys = [(question.question_id, question.category, turn) for question in questions for turn in (1, 2)]
    table = pd.DataFrame(
        [key + row for key, row in zip(keys, rows, strict=True)],
        columns=["question_id", "category", "turn", "score", "num_chars", "error"],
    ).astype({"score": float})
    check(table["score"].isna(), table["error"], ask)
    return table


def mt_pair_requests(
    questions: Sequence[Question], prompts: Mapping[str, Any], first: Any, second: Any, max_tokens: int
) -> list[Request]:
    """For each question and turn two games; in game 1 the first model is A, in game 2 it is B."""
    found = []
    for question, one, two in zip(questions, first, second, strict=True):
        for turn in (1, 2):
            conversation = [{"role": "user", "content": question.turns[0]}]
            if turn == 2:
                conversation += [{"role": "assistant", "content": ""}, {"role": "user", "content": question.turns[1]}]
            for game, (a, b) in enumerate(((one, two), (two, one)), 1):
                found.append(
                    Request(
                        id=f"{question.question_id}/turn{turn}/game{game}",
                        messages=tuple(mt_bench.pair_prompt(prompts, question, turn, a, b)),
                        conversation=tuple(conversation),
                        answers=(a[turn - 1], b[turn - 1]),
                        max_tokens=max_tokens,
                    )
                )
    return found


def mt_pairs(
    questions: Sequence[Question], prompts: Mapping[str, Any], first: Any, second: Any, ask: Ask
) -> pd.DataFrame:
    """Winners: question_id, category, turn, winner (model_1, model_2, tie; None where missing), game_1, game_2,
    num_chars_1, num_chars_2, error."""
    requests = mt_pair_requests(questions, prompts, first, second, ask.max_tokens)
    requests = _constrained(requests, ask, "[[", ("A", "B", "C"))
    verdicts, errors = [], []
    for place, (request, reply) in enumerate(zip(requests, ask.replies(requests), strict=True)):
        verdict, turn = None, place % 4 // 2 + 1
        if not reply.error:
            shown = [*first[place // 4][:turn], *second[place // 4][:turn]]
            quoted = () if request.choices else shown
            text = verdict_text(request, reply)
            verdict = by_score(reply) if reply.scores else mt_bench.pair_of(text, quoted)
        verdicts.append(verdict)
        errors.append(reply.error or ("" if verdict else NO_VERDICT))
    rows = []
    for place, question in enumerate(questions):
        for turn in (1, 2):
            at = 4 * place + 2 * (turn - 1)
            games, reasons = verdicts[at : at + 2], errors[at : at + 2]
            chars = (len(first[place][turn - 1]), len(second[place][turn - 1]))
            winner = mt_bench.pair_winner(*games)
            rows.append((question.question_id, question.category, turn, winner, *games, *chars, max(reasons)))
    columns = ["question_id", "category", "turn", "winner", "game_1", "game_2", "num_chars_1", "num_chars_2", "error"]
    table = pd.DataFrame(rows, columns=columns)
    check(table["winner"].isna(), table["error"], ask)
    return table


def _constrained(requests: list[Request], ask: Ask, prefill: str, choices: tuple[str, ...]) -> list[Request]:
    if not ask.constrained or ask.judge.scores:
        return requests
    return [replace(request, prefill=prefill, choices=choices, max_tokens=1) for request in requests]


def mt_summary(scores: pd.DataFrame, rng: np.random.Generator, **about: Any) -> pd.DataFrame:
    """Estimates of one model's scores: by turn and category, and the average of all."""
    parts = {"average": scores, **{f"turn{turn}": rows for turn, rows in scores.groupby("turn")}}
    parts |= {f"category/{name}": rows for name, rows in scores.groupby("category")}
    rows = []
    for name, part in parts.items():
        if part.dropna(subset="score")["question_id"].nunique() >= 2:
            interval = mt_bench.single_interval(part, rng=rng)
            rows.append(estimate_row(f"mt_bench/{name}", interval, int(part["score"].isna().sum()), **about))
    return pd.DataFrame(rows)


def mt_pair_summary(pairs: pd.DataFrame, rng: np.random.Generator, **about: Any) -> pd.DataFrame:
    """The first model's adjusted win rate, the difference in length, and the share of decided games that went to the
    answer shown first: 0.5 for a judge that does not look at the place."""
    missing = int(pairs["winner"].isna().sum())
    rows = [estimate_row("mt_bench/win_rate_adjusted", mt_bench.pair_interval(pairs, rng=rng), missing, **about)]
    games = pd.concat([pairs[["question_id", name]].set_axis(["question_id", "won"], axis=1) for name in GAMES])
    decided = games[games["won"].isin(["A", "B"])]
    first = (decided["won"] == "A").groupby(decided["question_id"]).mean().to_numpy(float)
    if len(first) >= 2:
        interval = bootstrap(first, np.mean, unit="prompt", rng=rng, on="means")
        rows.append(estimate_row("mt_bench/first_place", interval, int(games["won"].isna().sum()), **about))
    by_question = (pairs["num_chars_1"] - pairs["num_chars_2"]).groupby(pairs["question_id"]).mean()
    interval = bootstrap(by_question.to_numpy(), np.mean, unit="prompt", rng=rng, on="means")
    rows.append(estimate_row("mt_bench/extra_chars", interval, 0, **about))
    return pd.DataFrame(rows)

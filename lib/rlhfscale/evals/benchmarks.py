"""Putting a policy before a benchmark: its answers, the judge's requests, and tables of judgments and estimates.

The pieces are functions, so a notebook, a stage and `rlhfscale evaluate` share them. A table of estimates has the
columns of summary.csv and ``num_missing``. Scoring judges (reward models) take part where answers are compared in
pairs: the higher score wins. They cannot give MT-Bench's scores from 1 to 10.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from rlhfscale.evals import alpaca_eval, arena_hard, logistic, verifiers
from rlhfscale.evals.judge import Cache, Estimate, Judge, Reply, Request, check_missing, collect, estimate
from rlhfscale.evals.sources import ChatPrompt, Problem
from rlhfscale.samplers.base import request_seeds
from rlhfscale.stats.bootstrap import Interval, bootstrap, summary_row

BENCHMARKS = ("mt_bench", "alpaca_eval", "arena_hard", "gsm8k", "math")
CONTINUE = "continue your judgment and finish by outputting a final verdict label"
"""Arena-Hard asks this once of a judge that gave no label."""
GAMES = ("game_1", "game_2")
NO_VERDICT = "no verdict in the judge's output"
SOLVE = {
    "gsm8k": "{question}\n\nThink step by step and end with a line that holds #### and the number alone.",
    "math": "{question}\n\nThink step by step and put the final answer into \\boxed{{}}.",
}


@dataclass(frozen=True)
class Ask:
    """Who judges, with what, and how much may be missing.

    Attributes:
        judge: see `evals.judge`.
        cache: of its replies.
        max_missing: largest share of missing verdicts; more fail the run.
        max_tokens: of the judge's output.
        constrained: read MT-Bench's verdict off the probabilities of its possible values instead of a text. For judges
            in process that are too weak to keep to the format; it departs from the benchmark.
        on_reply: called with (replies had, all) as they come.
        on_estimate: called with the cost before anything is asked; what it raises stops the run.
        usd_per_million: price of a million tokens in and out, for that.
    """

    judge: Judge
    cache: Cache
    max_missing: float = 0.05
    max_tokens: int = 2048
    constrained: bool = False
    on_reply: Callable[[int, int], None] | None = None
    on_estimate: Callable[[Estimate], None] | None = None
    usd_per_million: tuple[float, float] = (0.0, 0.0)

    def replies(self, requests: Sequence[Request]) -> list[Reply]:
        if self.on_estimate:
            self.on_estimate(estimate(self.judge, requests, self.cache, self.usd_per_million))
        return collect(self.judge, requests, self.cache, on_reply=self.on_reply)


# Answers.


def answer(
    turns: Sequence[Sequence[str]],
    sample: Callable[..., Any],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    context: int | None = None,
) -> list[list[str]]:
    """A policy's answers to conversations of one or more user messages, turn by turn.

    Args:
        turns: the user's messages of each conversation.
        sample: a sampler, such as ``functools.partial(samplers.hf.sample, model)``.
        tokenizer: with a chat template, or without: then a prompt is the messages' text, a line each.
        context: tokens that fit; of a longer prompt the last are kept.
    """
    history: list[list[dict[str, str]]] = [[] for _ in turns]
    answers: list[list[str]] = [[] for _ in turns]
    for turn in range(max(map(len, turns))):
        going = [place for place, messages in enumerate(turns) if turn < len(messages)]
        for place in going:
            history[place].append({"role": "user", "content": turns[place][turn]})
        prompts = [_prompt_ids(tokenizer, history[place]) for place in going]
        if context is not None:
            prompts = [prompt[-max(1, context - max_new_tokens) :] for prompt in prompts]
        seeds = request_seeds((seed, turn), len(turns))[going]
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "tokenizer": tokenizer}
        for place, completion in zip(going, sample(prompts, seeds=seeds, **options), strict=True):
            text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            answers[place].append(text)
            history[place].append({"role": "assistant", "content": text})
    return answers


def _prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])
    return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])


# MT-Bench.


def verdict_text(request: Request, reply: Reply) -> str:
    return f"{request.prefill}{reply.text}]]" if request.choices else reply.text


def by_score(reply: Reply) -> str:
    a, b = reply.scores
    return "tie" if a == b else "A" if a > b else "B"


def check(missing: pd.Series, errors: pd.Series, ask: Ask) -> None:
    check_missing(int(missing.sum()), len(missing), ask.max_missing, errors[missing].tolist())


def estimate_row(quantity: str, interval: Interval, num_missing: int, **about: Any) -> dict[str, Any]:
    return summary_row(quantity, interval, **about) | {"num_missing": num_missing}


# AlpacaEval.


def alpaca_requests(
    prompts: Sequence[ChatPrompt], template: Sequence[Mapping[str, str]], answers: Sequence[str], seed: int
) -> list[Request]:
    """One request for each instruction; the order of the two answers is drawn by seed and instruction."""
    found = []
    for place, (prompt, ours) in enumerate(zip(prompts, answers, strict=True)):
        shown = (ours, prompt.baseline) if alpaca_eval.swapped(seed, place) else (prompt.baseline, ours)
        fields = {"instruction": prompt.instruction, "output_1": shown[0], "output_2": shown[1]}
        found.append(
            Request(
                id=prompt.question_id,
                messages=tuple({"role": m["role"], "content": _fill(m["content"], fields)} for m in template),
                conversation=({"role": "user", "content": prompt.instruction},),
                answers=shown,
                choices=(alpaca_eval.FIRST, alpaca_eval.SECOND),
                max_tokens=1,
            )
        )
    return found


def alpaca(
    prompts: Sequence[ChatPrompt], template: Any, answers: Sequence[str], ask: Ask, *, seed: int = 0
) -> pd.DataFrame:
    """Preferences: question_id, preference in [1, 2] (NaN where missing), len_baseline, len_model, swapped, error."""
    requests = alpaca_requests(prompts, template, answers, seed)
    rows = []
    for place, (prompt, reply) in enumerate(zip(prompts, ask.replies(requests), strict=True)):
        flipped = alpaca_eval.swapped(seed, place)
        if reply.scores:
            share = float(expit(reply.scores[0] - reply.scores[1]))  # of the first shown, as Bradley-Terry has it
            value = 3 - (2 - share) if flipped else 2 - share
        else:
            value = alpaca_eval.preference(reply.logprobs, flipped)
        error = reply.error or (NO_VERDICT if np.isnan(value) else "")
        rows.append((prompt.question_id, value, len(prompt.baseline), len(answers[place]), flipped, error))
    columns = ["question_id", "preference", "len_baseline", "len_model", "swapped", "error"]
    table = pd.DataFrame(rows, columns=columns)
    check(table["preference"].isna(), table["error"], ask)
    return table


def alpaca_summary(
    table: pd.DataFrame,
    rng: np.random.Generator,
    difficulty: Sequence[float] | None = None,
    gamed: logistic.Rows | None = None,
    **about: Any,
) -> pd.DataFrame:
    """Raw and length-controlled win rate. Without the authors' difficulties and gamed rows the latter is the variant
    that they call minimal: length alone."""
    zeros = np.zeros(len(table))
    annotations = alpaca_eval.Annotations(
        table["preference"], table["len_baseline"], table["len_model"], zeros if difficulty is None else difficulty
    )
    missing = int(table["preference"].isna().sum())
    fitted = alpaca_eval.length_controlled(annotations, gamed, rng=rng)
    name = "length_controlled" if difficulty is not None and gamed is not None else "length_controlled_minimal"
    rows = [
        estimate_row("alpaca_eval/win_rate", alpaca_eval.win_rate_interval(annotations, rng=rng), missing, **about),
        estimate_row(
            f"alpaca_eval/{name}", alpaca_eval.lc_interval(annotations, gamed, C=fitted.C, rng=rng), missing, **about
        ),
    ]
    extra = (annotations.valid.len_model - annotations.valid.len_baseline).astype(float)
    rows.append(
        estimate_row(
            "alpaca_eval/extra_chars", bootstrap(extra, np.mean, unit="prompt", rng=rng, on="means"), 0, **about
        )
    )
    return pd.DataFrame(rows)


# Arena-Hard.


def arena_requests(
    prompts: Sequence[ChatPrompt], template: Mapping[str, str], answers: Sequence[str], max_tokens: int
) -> list[Request]:
    """Two games for each question; in game 0 the baseline is A."""
    found = []
    for prompt, ours in zip(prompts, answers, strict=True):
        for game, (a, b) in enumerate(((prompt.baseline, ours), (ours, prompt.baseline))):
            fields = {"QUESTION": prompt.instruction, "ANSWER_A": a, "ANSWER_B": b}
            system = {"role": "system", "content": template["system_prompt"]}
            user = {"role": "user", "content": _fill(template["prompt_template"], fields)}
            found.append(
                Request(
                    id=f"{prompt.question_id}/game{game}",
                    messages=(system, user),
                    conversation=({"role": "user", "content": prompt.instruction},),
                    answers=(a, b),
                    max_tokens=max_tokens,
                )
            )
    return found


def arena(
    prompts: Sequence[ChatPrompt],
    template: Any,
    answers: Sequence[str],
    ask: Ask,
    *,
    model: str,
    version: arena_hard.Version = "v0.1",
) -> pd.DataFrame:
    """Games: question_id, model, game, verdict (None where missing), num_chars, num_chars_baseline, error. A judge that
    gave no label at all is asked once to go on."""
    requests = arena_requests(prompts, template, answers, ask.max_tokens)
    replies = ask.replies(requests)
    verdicts = [_arena_verdict(reply, version) for reply in replies]
    again = [
        place
        for place, (reply, verdict) in enumerate(zip(replies, verdicts, strict=True))
        if verdict is None and not reply.error and "[[" not in reply.text
    ]
    more = [
        replace(
            requests[place],
            messages=(
                *requests[place].messages,
                {"role": "assistant", "content": replies[place].text},
                {"role": "user", "content": CONTINUE},
            ),
        )
        for place in again
    ]
    for place, reply in zip(again, ask.replies(more) if more else (), strict=True):
        verdicts[place], replies[place] = _arena_verdict(reply, version), reply
    rows = []
    for place, (reply, verdict) in enumerate(zip(replies, verdicts, strict=True)):
        prompt, ours = prompts[place // 2], answers[place // 2]
        error = reply.error or ("" if verdict else NO_VERDICT)
        rows.append((prompt.question_id, model, place % 2, verdict, len(ours), len(prompt.baseline), error))
    columns = ["question_id", "model", "game", "verdict", "num_chars", "num_chars_baseline", "error"]
    table = pd.DataFrame(rows, columns=columns)
    check(table["verdict"].isna(), table["error"], ask)
    return table


def _arena_verdict(reply: Reply, version: arena_hard.Version) -> str | None:
    if reply.error:
        return None
    if reply.scores:
        return {"A": "A>B", "B": "B>A", "tie": "A=B"}[by_score(reply)]
    return arena_hard.parse_verdict(reply.text, version)


def arena_summary(
    games: pd.DataFrame, rng: np.random.Generator, version: arena_hard.Version = "v0.1", **about: Any
) -> pd.DataFrame:
    """The score against the baseline, with the interval that resamples questions, and the difference in length."""
    table = arena_hard.battles(games, baseline="baseline", version=version)
    missing = int(games["verdict"].isna().sum())
    rows = [estimate_row("arena_hard/score", arena_hard.score_interval(table, rng=rng), missing, **about)]
    first = games[games["game"] == 0]
    extra = (first["num_chars"] - first["num_chars_baseline"]).to_numpy(float)
    rows.append(
        estimate_row(
            "arena_hard/extra_chars", bootstrap(extra, np.mean, unit="prompt", rng=rng, on="means"), 0, **about
        )
    )
    return pd.DataFrame(rows)


def _fill(template: str, fields: Mapping[str, str]) -> str:
    """Fields replaced in one pass: braces in an answer stay what they are."""
    parts = [(template.find("{" + name + "}"), name) for name in fields]
    text, start = "", 0
    for place, name in sorted(part for part in parts if part[0] >= 0):
        text += template[start:place] + fields[name]
        start = place + len(name) + 2
    return text + template[start:]


# Problems with a verifier.


def graded(
    benchmark: str, problems: Sequence[Problem], samples: Sequence[Sequence[str]], timeout_s: float = 5.0
) -> pd.DataFrame:
    """Grades: question_id, sample, answer (empty where none), correct, reason, num_chars."""
    rows = []
    with verifiers.MathGrader(timeout_s) as grader:
        for problem, solutions in zip(problems, samples, strict=True):
            for place, solution in enumerate(solutions):
                if benchmark == "gsm8k":
                    answer = verifiers.gsm8k_answer(solution)
                    right = verifiers.gsm8k_correct(solution, problem.gold)
                    reason = "" if right else "differs" if answer else "no answer"
                else:
                    answer = verifiers.last_boxed(solution)
                    grade = grader.grade(solution, problem.gold)
                    right, reason = grade.correct, grade.reason
                rows.append((problem.question_id, place, answer or "", right, reason, len(solution)))
    return pd.DataFrame(rows, columns=["question_id", "sample", "answer", "correct", "reason", "num_chars"])


def graded_summary(benchmark: str, table: pd.DataFrame, rng: np.random.Generator, **about: Any) -> pd.DataFrame:
    """Accuracy, unbiased pass@k for doublings of k, and majority vote, with intervals over problems.

    ``num_missing`` counts what was wrong for want of a grade (timeout, error), not for another answer.
    """
    correct = table.pivot(index="question_id", columns="sample", values="correct").to_numpy(float)
    missing = int(table["reason"].isin(["timeout", "error"]).sum())
    num_samples = correct.shape[1]
    values = {"accuracy": correct.mean(1)}
    for k in (2**power for power in range(1, num_samples.bit_length())):
        values[f"pass@{k}"] = verifiers.pass_at_n(correct, [k])[:, 0]
    if num_samples > 1:
        values[f"majority@{num_samples}"] = np.array([_voted(rows) for _, rows in table.groupby("question_id")])
    return pd.DataFrame(
        [
            estimate_row(
                f"{benchmark}/{name}", bootstrap(v, np.mean, unit="prompt", rng=rng, on="means"), missing, **about
            )
            for name, v in values.items()
        ]
    )


def _voted(rows: pd.DataFrame) -> float:
    winner = verifiers.majority([answer or None for answer in rows["answer"]])
    if winner is None:
        return 0.0
    return float(rows.loc[rows["answer"] == winner, "correct"].iloc[0])

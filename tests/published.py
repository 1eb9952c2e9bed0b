"""Recompute published numbers through the library: ``python tests/published.py DIR``.

DIR/expected.csv has a row for each number: bench, model, metric, expected, kind, abs_tol, note. Each is recomputed
from the data beside it and compared; rows of kind ``inferred`` are printed, not judged. A row whose data are missing or
whose metric is unknown fails, with the reason. Prints the worst misses, how many recorded labels the parsers reproduce,
the time of the length-controlled fits, and ``N passed, M failed``; the exit code is 0 only if none failed.

Layout of DIR (any part may be missing, its rows then fail; files may be without .gz):

    alpaca_eval2/annotations/MODEL.csv.gz   pos, preference, len_baseline, len_model
    alpaca_eval2/instruction_difficulty_recovered.csv, df_gamed_surrogate.csv.gz, folds.csv, glm_weights.csv
    arena_hard/battles_NAME.jsonl.gz        question_id, model_a (the baseline), model_b, winner; bench arena_hard_NAME
                                            (battles_official is arena_hard_v0.1)
    arena_hard/style_metadata.csv.gz        model, question_id, token_len, header_count, list_count, bold_count
    arena_hard/judge_texts_labels.jsonl.gz  judgment, score
    mt_bench/judgments_single.jsonl.gz, judgments_pair.jsonl.gz, score_parse_samples.jsonl.gz
    math/gsm8k_solutions_labelled.jsonl.gz, tora_gsm8k_predictions.jsonl.gz
"""

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from rlhfscale.evals import alpaca_eval, arena_hard, logistic, mt_bench, verifiers

COLUMNS = ("bench", "model", "metric", "expected", "kind", "abs_tol")
WIN_RATES = ("win_rate", "standard_error", "discrete_win_rate", "n_wins", "n_wins_base", "n_draws", "n_total")
WEIGHTS = ("glm_w_len", "glm_w_difficulty", "glm_w_bias")
NUM_REFITS = 200
BOOTSTRAP_SEED = 42
EPSILON = 1e-9
"""Slack for numbers that are compared exactly: expected values are printed in decimals."""


class Unknown(LookupError):
    """A row that cannot be recomputed; the message says why."""


class Data:
    """The files of a folder, each read once."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cache  # noqa: B019  one object for the run
    def read(self, name: str) -> pd.DataFrame:
        path = self.path(name)
        if path is None:
            raise Unknown(f"missing file {name}")
        try:
            return pd.read_json(path, lines=True) if ".jsonl" in path.name else pd.read_csv(path)
        except Exception as error:  # whatever a parser says of a broken file
            raise Unknown(f"{name} is not readable: {error}") from error

    def path(self, name: str) -> Path | None:
        found = (self.folder / name, self.folder / name.removesuffix(".gz"))
        return next((path for path in found if path.is_file()), None)

    def columns(self, name: str, *wanted: str) -> pd.DataFrame:
        table = self.read(name)
        absent = [column for column in wanted if column not in table]
        if absent:
            raise Unknown(f"{name} lacks the columns {', '.join(absent)}")
        return table

    def of_model(self, name: str, column: str, model: str, *wanted: str) -> pd.DataFrame:
        table = self.columns(name, column, *wanted)
        rows = table[table[column] == model]
        if rows.empty:
            raise Unknown(f"{name} has no rows of {column} {model!r}")
        return rows

    # AlpacaEval

    @cached_property
    def difficulty(self) -> np.ndarray:
        table = self.columns("alpaca_eval2/instruction_difficulty_recovered.csv", "instruction_difficulty")
        return table["instruction_difficulty"].to_numpy()

    @cached_property
    def gamed(self) -> logistic.Rows:
        name = "alpaca_eval2/df_gamed_surrogate.csv.gz"
        columns = ("preference", "std_delta_len", "instruction_difficulty")
        table = self.columns(name, *columns)
        return alpaca_eval.gamed_rows(*(table[column].to_numpy() for column in columns))

    @cache  # noqa: B019
    def annotations(self, model: str) -> alpaca_eval.Annotations:
        name = f"alpaca_eval2/annotations/{model}.csv.gz"
        table = self.columns(name, "pos", "preference", "len_baseline", "len_model")
        difficulty = alpaca_eval.difficulty_by_position(self.difficulty, table["pos"].to_numpy())
        return alpaca_eval.Annotations(table["preference"], table["len_baseline"], table["len_model"], difficulty)

    @cache  # noqa: B019
    def lengths_only(self, model: str) -> alpaca_eval.Annotations:
        """For raw win rates, which need no difficulties."""
        name = f"alpaca_eval2/annotations/{model}.csv.gz"
        table = self.columns(name, "preference", "len_baseline", "len_model")
        zeros = np.zeros(len(table))
        return alpaca_eval.Annotations(table["preference"], table["len_baseline"], table["len_model"], zeros)

    def folds(self, count: int) -> np.ndarray | None:
        """The recorded folds for so many rows; None where there are none, which draws them by a seed."""
        if self.path("alpaca_eval2/folds.csv") is None:
            return None
        table = self.read("alpaca_eval2/folds.csv")
        return table[str(count)].dropna().to_numpy(int) if str(count) in table else None

    @cache  # noqa: B019
    def length_controlled(self, model: str, C: float | None) -> alpaca_eval.LengthControlled:
        annotations = self.annotations(model)
        folds = self.folds(len(annotations.valid) + len(self.gamed)) if C is None else None
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        return alpaca_eval.length_controlled(annotations, self.gamed, C=C, folds=folds, rng=rng)

    # Arena-Hard

    @cache  # noqa: B019
    def battles(self, name: str) -> tuple[pd.DataFrame, str]:
        table = self.columns(f"arena_hard/{name}.jsonl.gz", "question_id", "model_a", "model_b", "winner")
        baselines = table["model_a"].unique()
        if len(baselines) != 1:
            raise Unknown(f"arena_hard/{name}.jsonl.gz has several baselines: {', '.join(baselines)}")
        return arena_hard.battles_from_winners(table), baselines[0]

    @cache  # noqa: B019
    def arena_scores(self, name: str) -> pd.Series:
        return arena_hard.scores(*self.battles(name))

    @cache  # noqa: B019
    def arena_interval(self, name: str) -> pd.DataFrame:
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        return arena_hard.published_interval(*self.battles(name), rng=rng)

    @cache  # noqa: B019
    def arena_style(self, name: str, version: str, control: tuple[str, ...]) -> pd.Series:
        style = self.columns("arena_hard/style_metadata.csv.gz", "model", "question_id", *arena_hard.STYLE_COLUMNS)
        table, baseline = self.battles(name)
        style = style.set_index(["model", "question_id"])
        return arena_hard.style_controlled(table, style, baseline, version=version, control=control)


def alpaca(data: Data, row: pd.Series, all_rows: pd.DataFrame) -> float:
    model, metric = row["model"], row["metric"]
    if metric in (*WIN_RATES, "avg_length"):
        return alpaca_eval.win_rates(data.lengths_only(model))[metric]
    if metric in ("length_controlled_winrate", "lc_standard_error"):
        fitted = data.length_controlled(model, None)
        return fitted.win_rate if metric == "length_controlled_winrate" else fitted.standard_error
    if metric in ("length_controlled_noreg", "length_controlled_minimal"):
        annotations = data.annotations(model)
        if metric == "length_controlled_minimal":
            annotations = dataclasses.replace(annotations, difficulty=np.zeros(len(annotations)))
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        return alpaca_eval.length_controlled(annotations, None, C=noted_C(row["note"]), rng=rng).win_rate
    if metric == "glm_C":
        return data.length_controlled(model, None).C
    if metric in ("length_controlled_winrate@C", "lc_standard_error@C", *WEIGHTS):
        fitted = data.length_controlled(model, published_C(row, all_rows))
        if metric in WEIGHTS:
            return float(fitted.weights[WEIGHTS.index(metric)])
        return fitted.win_rate if "winrate" in metric else fitted.standard_error
    raise Unknown(f"unknown metric {metric}")


def published_C(row: pd.Series, all_rows: pd.DataFrame) -> float | None:
    """C from the row's note, else from another row of the model, else None: chosen by cross-validation."""
    same = all_rows[(all_rows["bench"] == row["bench"]) & (all_rows["model"] == row["model"])]
    for note in (row["note"], *same["note"]):
        if (stated := noted_C(note)) is not None:
            return stated
    stated = same.loc[same["metric"] == "glm_C", "expected"]
    return float(stated.iloc[0]) if len(stated) else None


def noted_C(note: object) -> float | None:
    found = re.search(r"\bC\s*=\s*([0-9.]+(?:e[+-]?[0-9]+)?)", str(note))
    return float(found.group(1)) if found else None


def alpaca_from_weights(data: Data, row: pd.Series, _: pd.DataFrame) -> float:
    if row["metric"] != "length_controlled_winrate":
        raise Unknown(f"unknown metric {row['metric']}")
    name = "alpaca_eval2/glm_weights.csv"
    table = data.read(name).set_index(data.read(name).columns[0])
    if row["model"] not in table.index or table.shape[1] != 3:
        raise Unknown(f"{name} has no three weights of {row['model']!r}")
    _, difficulty, bias = table.loc[row["model"]]
    return alpaca_eval.from_weights(difficulty, bias, data.difficulty)


def arena(name: str) -> Callable[[Data, pd.Series, pd.DataFrame], float]:
    """The metrics of one file of battles. Scores are compared as published: to two decimals where they are."""

    def compute(data: Data, row: pd.Series, _: pd.DataFrame) -> float:
        model, metric = row["model"], row["metric"]
        if metric == "avg_tokens":
            rows = data.of_model("arena_hard/style_metadata.csv.gz", "model", model, "token_len")
            return int(rows["token_len"].mean())
        scores = data.arena_scores(name)
        if model not in scores:
            raise Unknown(f"arena_hard/{name}.jsonl.gz has no battles of {model!r}")
        if metric == "score":
            return round(scores[model], 2)
        if metric in ("bt_winrate", "win_rate"):
            return scores[model]
        if metric in ("rating_q025", "rating_q975"):
            return data.arena_interval(name).loc[model, "low" if metric == "rating_q025" else "high"]
        style = re.fullmatch(r"style_score(_v2)?(?:@(length|markdown))?", metric)
        if style:
            version = "v2.0" if style.group(1) else "v0.1"
            control = (style.group(2),) if style.group(2) else ("length", "markdown")
            return data.arena_style(name, version, control)[model]
        raise Unknown(f"unknown metric {metric}")

    return compute


def mt_single(data: Data, row: pd.Series, _: pd.DataFrame) -> float:
    rows = data.of_model("mt_bench/judgments_single.jsonl.gz", "model", row["model"], "turn")
    scores = rows.assign(score=_scores(rows))
    means = mt_bench.single_means(scores)
    metric = {"first_turn": "turn1", "second_turn": "turn2", "overall": "average"}.get(row["metric"], row["metric"])
    if metric not in means:
        raise Unknown(f"unknown metric {row['metric']}")
    return means[metric]


def _scores(rows: pd.DataFrame) -> pd.Series:
    """Parsed from the judge's text where it is there, else the recorded score; -1 is a missing value."""
    if "judgment" in rows:
        return rows["judgment"].map(mt_bench.parse_score).astype(float)
    return rows["score"].where(rows["score"] != -1)


def mt_pair(data: Data, row: pd.Series, _: pd.DataFrame) -> float:
    name = "mt_bench/judgments_pair.jsonl.gz"
    table = data.columns(name, "model_1", "model_2")
    rows = table[(table["model_1"] == row["model"]) | (table["model_2"] == row["model"])]
    if rows.empty:
        raise Unknown(f"{name} has no pairs of {row['model']!r}")
    won = [_pair_points(pair, row["model"]) for pair in rows.to_dict("records")]
    rates = mt_bench.pair_rates(won)
    if row["metric"] not in rates:
        raise Unknown(f"unknown metric {row['metric']}")
    return rates[row["metric"]]


def _pair_points(pair: dict, model: str) -> str | None:
    """The winner as seen from a model: model_1 means that it won."""
    if "g1_judgment" in pair:
        winner = mt_bench.pair_winner(*(mt_bench.parse_pair(pair[f"g{game}_judgment"]) for game in (1, 2)))
    else:
        games = [pair["g1_winner"], pair["g2_winner"]]
        names = ({"model_1": "A", "model_2": "B", "tie": "tie"}, {"model_1": "B", "model_2": "A", "tie": "tie"})
        winner = mt_bench.pair_winner(*(known.get(game) for known, game in zip(names, games, strict=True)))
    if winner in (None, "tie") or pair["model_1"] == model:
        return winner
    return {"model_1": "model_2", "model_2": "model_1"}[winner]


def gsm8k(data: Data, row: pd.Series, _: pd.DataFrame) -> float:
    table = data.columns("math/gsm8k_solutions_labelled.jsonl.gz", "ground_truth", row["model"])
    pairs = zip(table[row["model"]], table["ground_truth"], strict=True)
    correct = [verifiers.gsm8k_correct(solution["solution"], gold) for solution, gold in pairs]
    return _share(correct, row["metric"])


def tora(data: Data, row: pd.Series, _: pd.DataFrame) -> float:
    rows = data.of_model("math/tora_gsm8k_predictions.jsonl.gz", "model", row["model"], "gt", "pred")
    pairs = zip(rows["pred"], rows["gt"].astype(str), strict=True)
    return _share(
        [bool(given) and verifiers.number_correct(str(given[0]), gold) for given, gold in pairs], row["metric"]
    )


def _share(correct: list[bool], metric: str) -> float:
    if metric == "n_correct":
        return sum(correct)
    if metric == "accuracy":
        return 100 * sum(correct) / len(correct)
    raise Unknown(f"unknown metric {metric}")


BENCHES = {
    "alpaca_eval2": alpaca,
    "alpaca_eval2_from_weights": alpaca_from_weights,
    "arena_hard_v0.1": arena("battles_official"),
    "mt_bench": mt_single,
    "mt_bench_pair": mt_pair,
    "gsm8k": gsm8k,
    "gsm8k_tora": tora,
}


def metric_of(bench: str) -> Callable[[Data, pd.Series, pd.DataFrame], float]:
    if bench not in BENCHES and bench.startswith("arena_hard_"):
        return arena(f"battles_{bench.removeprefix('arena_hard_')}")
    if bench not in BENCHES:
        raise Unknown(f"unknown bench {bench}; known: {', '.join(BENCHES)}, arena_hard_NAME")
    return BENCHES[bench]


def check(folder: Path) -> pd.DataFrame:
    """expected.csv with the columns ``ours``, ``miss``, ``status`` (passed, failed, shown) and ``why``.

    Raises:
        FileNotFoundError: the folder or its expected.csv is not there.
        ValueError: expected.csv lacks a column.
    """
    path = folder / "expected.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the folder must hold expected.csv and the data it speaks of")
    rows = pd.read_csv(path, dtype={"bench": str, "model": str, "metric": str, "kind": str})
    absent = [column for column in COLUMNS if column not in rows]
    if absent:
        raise ValueError(f"{path}: lacks the columns {', '.join(absent)}")
    rows["note"] = rows["note"].astype(object).fillna("") if "note" in rows else ""
    data, results = Data(folder), []
    for _, row in rows.iterrows():
        results.append(_one(data, row, rows))
    return rows.join(pd.DataFrame(results, columns=["ours", "miss", "status", "why"], index=rows.index))


def _one(data: Data, row: pd.Series, rows: pd.DataFrame) -> tuple[float, float, str, str]:
    judged = "inferred" not in str(row["kind"])
    try:
        ours = float(metric_of(row["bench"])(data, row, rows))
    except (Unknown, ValueError, KeyError, TypeError) as error:
        why = str(error) if isinstance(error, Unknown) else f"{type(error).__name__}: {error}"
        return np.nan, np.inf, "failed" if judged else "shown", why
    miss = abs(ours - float(row["expected"]))
    if not judged:
        return ours, miss, "shown", ""
    # NaN, of ours or of the tolerance, must not pass
    return ours, miss, "passed" if miss <= float(row["abs_tol"]) + EPSILON * max(1.0, abs(ours)) else "failed", ""


def parsers(folder: Path) -> list[tuple[str, int, int]]:
    """How many recorded labels each parser reproduces: (name, agreeing, all), of the files that are there."""
    data, counts = Data(folder), []

    def compare(name: str, text: str, label: str, parse: Callable[[str], object]) -> None:
        if data.path(name):
            table = data.columns(name, text, label)
            found = table[text].map(parse)
            known = table[label].where(table[label] != -1)
            same = (found == known) | (found.isna() & known.isna())
            counts.append((f"{name}: {label}", int(same.sum()), len(table)))

    compare("arena_hard/judge_texts_labels.jsonl.gz", "judgment", "score", arena_hard.parse_verdict)
    compare("mt_bench/score_parse_samples.jsonl.gz", "judgment_tail", "score", mt_bench.parse_score)
    compare("mt_bench/judgments_single.jsonl.gz", "judgment", "score", mt_bench.parse_score)
    names = {1: {"A": "model_1", "B": "model_2", "tie": "tie"}, 2: {"A": "model_2", "B": "model_1", "tie": "tie"}}
    for game, known in names.items():
        pair = "mt_bench/judgments_pair.jsonl.gz"
        compare(pair, f"g{game}_judgment", f"g{game}_winner", lambda text, k=known: k.get(mt_bench.parse_pair(text)))
    if data.path("math/gsm8k_solutions_labelled.jsonl.gz"):
        table = data.columns("math/gsm8k_solutions_labelled.jsonl.gz", "ground_truth")
        for model in table.columns.difference(["i", "ground_truth"]):
            pairs = zip(table[model], table["ground_truth"], strict=True)
            same = [verifiers.gsm8k_correct(s["solution"], gold) == s["is_correct"] for s, gold in pairs]
            counts.append((f"math/gsm8k_solutions_labelled.jsonl.gz: {model}", sum(same), len(same)))
    return counts


def timing(folder: Path) -> str:
    """How long one model's length-controlled fit takes, with the choice of C, and how long its bootstrap."""
    files = sorted((folder / "alpaca_eval2/annotations").glob("*.csv*"))
    if not files:
        return "length-controlled fit: no annotations to time it on"
    data, model = Data(folder), files[0].name.removesuffix(".gz").removesuffix(".csv")
    try:
        annotations, gamed = data.annotations(model), data.gamed
        start = time.perf_counter()
        fitted = data.length_controlled(model, None)
        fit_s = time.perf_counter() - start
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        start = time.perf_counter()
        interval = alpaca_eval.lc_interval(annotations, gamed, C=fitted.C, rng=rng, num_draws=NUM_REFITS)
        refit_s = time.perf_counter() - start
    except (Unknown, ValueError) as error:
        return f"length-controlled fit: not timed: {error}"
    text = f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
    return (
        f"length-controlled fit of {model}: {fit_s:.2f} s with 5-fold choice of C; {NUM_REFITS} bootstrap refits: "
        f"{refit_s:.2f} s, 95% interval {text} (published: standard error {fitted.standard_error:.2f})"
    )


def report(folder: Path) -> int:
    """Print everything; the exit code."""
    rows = check(folder)
    for row in rows[rows["status"] == "shown"].itertuples():
        found = row.why or f"ours {row.ours:.6g}"
        print(f"inferred  {row.bench} {row.model} {row.metric}: {row.expected:.6g}, {found}")
    judged = rows[rows["status"] != "shown"]
    tolerance = judged["abs_tol"].where(judged["abs_tol"] > 0, EPSILON)
    worst = judged.assign(used=judged["miss"] / tolerance).sort_values("used", ascending=False)
    for row in worst.head(max(5, int((worst["status"] == "failed").sum()))).itertuples():
        found = row.why or f"ours {row.ours:.8g}, off by {row.miss:.2g} of {row.abs_tol:g}"
        print(f"{row.status:<9} {row.bench} {row.model} {row.metric}: {row.expected:.8g}, {found}")
    for name, same, count in parsers(folder):
        print(f"labels    {name}: {same} of {count} agree")
    print(timing(folder))
    failed = int((judged["status"] == "failed").sum())
    print(f"{len(judged) - failed} passed, {failed} failed")
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with expected.csv and its data")
    try:
        return report(parser.parse_args().folder)
    except (FileNotFoundError, ValueError, Unknown) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Arena-Hard: two games with swapped order, verdicts, Bradley-Terry against a baseline, style control.

Li et al. 2024 (arXiv 2406.11939). Versions 0.1 and 2.0 differ in what a missing verdict drops, in the features of style
control and in their published intervals:

| | v0.1 | v2.0 |
|---|---|---|
| a missing verdict drops | the game | both games of the question |
| style features | (a - b) / (a + b + 1) of counts | length (a - b) / (a + b), markdown per token |
| style fit | ridge of strength 1 on all coefficients | maximum likelihood |
| published interval | battles resampled, 2.5 to 97.5% | battles resampled, 5 to 95% (a 90% interval) |

The published intervals resample battles: the two games of a question, and the three copies of a strong verdict, count
as independent, so they are too narrow. `score_interval` resamples questions and is a 95% interval. A model that meets
only the baseline has the weighted mean of its battles as its Bradley-Terry win rate, an independent truth for tests.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy.special import expit

from rlhfscale.stats.bootstrap import Interval, bootstrap

Version = Literal["v0.1", "v2.0"]
STRONG_WEIGHT = 3
VERDICTS = {"A>>B": (1.0, True), "A>B": (1.0, False), "A=B": (0.5, False), "B>A": (0.0, False), "B>>A": (0.0, True)}
"""By label: A's share of the win, and whether the verdict is strong."""
MIRRORED = {"A<<B": "B>>A", "A<B": "B>A", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}
"""Other ways to write them, which v2.0 takes."""
BATTLE_COLUMNS = ("question_id", "model_a", "model_b", "score", "weight")
"""One row for each game with a verdict: ``score`` is model_b's share of the win, ``weight`` the times it counts. In our
own games model_a is the baseline."""
STYLE_COLUMNS = ("token_len", "header_count", "list_count", "bold_count")
ELO_SCALE = 400.0
_LABEL = re.compile(r"\[\[([AB<>=]{1,8})\]\]")
_CODE = re.compile(r"```[^`]*```")
_STYLE = {
    "header_count": re.compile(r"^#{1,6}[ \t]", re.MULTILINE),
    "list_count": re.compile(r"^[ \t]*(?:\d{1,9}\.|[-*+])[ \t]", re.MULTILINE),
    "bold_count": re.compile(r"\*\*[^*\n]{1,500}\*\*|__[^_\n]{1,500}__"),
}


# Verdicts and battles.


def parse_verdict(judgment: str, version: Version = "v0.1") -> str | None:
    """The label in a judge's output, such as ``A>>B``: None unless there is exactly one distinct label and it is valid.

    A judge that quotes an answer's own "[[A>>B]]" beside another verdict therefore gives a missing value.
    """
    found = set(_LABEL.findall(judgment))
    if len(found) != 1:
        return None
    label = found.pop()
    if version == "v2.0":
        label = MIRRORED.get(label, label)
    return label if label in VERDICTS else None


def battles(games: pd.DataFrame, *, baseline: str, version: Version = "v0.1") -> pd.DataFrame:
    """Judged games to battles.

    Args:
        games: one row for each game: ``question_id``, ``model``, ``game`` (0: A is the baseline; 1: A is the model),
            ``verdict`` (a label, None where missing).
        baseline: name of the baseline.

    Returns:
        columns `BATTLE_COLUMNS`. Missing verdicts drop their game (v0.1) or both games of the question (v2.0).
    """
    missing = games["verdict"].isna()
    if version == "v2.0":
        key = [games["question_id"], games["model"]]
        complete = (~missing).groupby(key).transform("sum") == 2
        kept = games[complete]
    else:
        kept = games[~missing]
    of_a, strong = (kept["verdict"].map(lambda label, i=i: VERDICTS[label][i]).astype(float) for i in (0, 1))
    score = np.where(kept["game"] == 0, 1.0 - of_a, of_a)
    return pd.DataFrame(
        {
            "question_id": kept["question_id"],
            "model_a": baseline,
            "model_b": kept["model"],
            "score": score,
            "weight": np.where(strong, float(STRONG_WEIGHT), 1.0),
        }
    ).reset_index(drop=True)


def battles_from_winners(table: pd.DataFrame) -> pd.DataFrame:
    """Battles from rows ``question_id``, ``model_a``, ``model_b``, ``winner`` (model_a, model_b or a tie); strong
    verdicts stand there three times.

    Raises:
        ValueError: another winner.
    """
    ties = dict.fromkeys(("tie", "tie (bothbad)"), 0.5)
    score = table["winner"].map({"model_a": 0.0, "model_b": 1.0, **ties})
    if score.isna().any():
        raise ValueError(f"winner: {table['winner'][score.isna()].iloc[0]!r} is none of model_a, model_b, tie")
    return table[["question_id", "model_a", "model_b"]].assign(score=score, weight=1.0)


# Scores.


def elo(table: pd.DataFrame) -> pd.Series:
    """Bradley-Terry ratings by maximum likelihood, on the Elo scale, with mean 0; ties count half for each side.

    Only differences mean something. A model that won or lost everything goes towards infinity and is stopped where its
    win rate is 0 or 100% to the ninth digit.

    Args:
        table: `BATTLE_COLUMNS`, of any pairs of models.

    Raises:
        ValueError: no battles.
    """
    if table.empty:
        raise ValueError("no battles: every verdict is missing")
    models = sorted({*table["model_a"], *table["model_b"]})
    design = _model_columns(table, models)
    target, weight = 1.0 - table["score"].to_numpy(), table["weight"].to_numpy()
    # equal rows of the design are one binomial
    pairs, row = np.unique(design, axis=0, return_inverse=True)
    total = np.bincount(row, weight)
    coefficients = _logistic(pairs, np.bincount(row, weight * target) / total, total, ridge=0.0)
    return pd.Series(ELO_SCALE / np.log(10) * coefficients, index=models)


def scores(table: pd.DataFrame, baseline: str) -> pd.Series:
    """Win rate against the baseline in percent, by model, from `elo`; the published score is it to two decimals."""
    ratings = elo(table)
    if baseline not in ratings:
        raise ValueError(f"baseline: {baseline!r} is in no battle; models: {', '.join(ratings.index)}")
    return (100 / (1 + 10 ** ((ratings[baseline] - ratings) / ELO_SCALE))).rename("score")


def score_interval(table: pd.DataFrame, *, rng: np.random.Generator, num_draws: int = 2000) -> Interval:
    """One model's win rate against the baseline in percent, with a 95% interval from resampling questions.

    Args:
        table: `BATTLE_COLUMNS`, model_b the one model and model_a the baseline.

    Raises:
        ValueError: several models, fewer than two questions.
    """
    if table["model_b"].nunique() != 1 or table["model_a"].nunique() != 1:
        raise ValueError("score_interval takes one model against one baseline")
    sums = pd.DataFrame({"won": table["score"] * table["weight"], "played": table["weight"]})
    sums = sums.groupby(table["question_id"]).sum()
    values = (sums["won"].to_numpy(), sums["played"].to_numpy())
    return bootstrap(values, _percent_won, unit="prompt", rng=rng, num_draws=num_draws, on="means")


def _percent_won(means: tuple[float, float]) -> float:
    return 100 * means[0] / means[1]


def published_interval(
    table: pd.DataFrame, baseline: str, *, version: Version = "v0.1", rng: np.random.Generator, num_draws: int = 100
) -> pd.DataFrame:
    """The intervals of the published leaderboards, by model: ``low``, ``median``, ``mean``, ``high`` in percent.

    v0.1 resamples the battles of all models together and takes 2.5 to 97.5%; v2.0 resamples each model's own and takes
    5 to 95%, and its score is the mean of the draws. A strong verdict counts as three independent battles in both.
    """
    copies = table.loc[table.index.repeat(table["weight"].astype(int))].assign(weight=1.0).reset_index(drop=True)
    draws = []
    for _ in range(num_draws):
        if version == "v0.1":
            drawn = copies.iloc[rng.integers(len(copies), size=len(copies))]
            draws.append(scores(drawn, baseline))
        else:
            draws.append(100 * copies.groupby("model_b")["score"].apply(_resampled_mean, rng))
    table = pd.DataFrame(draws)
    tail = 0.025 if version == "v0.1" else 0.05
    quantiles = table.quantile([tail, 0.5, 1 - tail])
    quantiles.index = ["low", "median", "high"]
    return quantiles.T.assign(mean=table.mean())


def _resampled_mean(values: pd.Series, rng: np.random.Generator) -> float:
    return float(values.to_numpy()[rng.integers(len(values), size=len(values))].mean())


# Style control.


def style_counts(answer: str, num_tokens: int) -> dict[str, int]:
    """Tokens, headers, list items and bold spans of an answer; code blocks are left out of the last three."""
    prose = _CODE.sub("", answer)
    counts = {name: sum(1 for _ in pattern.finditer(prose)) for name, pattern in _STYLE.items()}
    return {"token_len": num_tokens, **counts}


def style_controlled(
    table: pd.DataFrame,
    style: pd.DataFrame,
    baseline: str,
    *,
    version: Version = "v0.1",
    control: Sequence[Literal["length", "markdown"]] = ("length", "markdown"),
) -> pd.Series:
    """Win rates against the baseline in percent at equal style, by model.

    The differences in style enter the Bradley-Terry fit as further features; the win rate comes from the models'
    coefficients alone. The features are centred over all battles, so "equal style" is the mean difference of the models
    in the table: with one model next to nothing is controlled, and a published number needs all of its models.

    Args:
        table: `BATTLE_COLUMNS`.
        style: `STYLE_COLUMNS` by index (model, question_id).
        control: which features take part.

    Raises:
        ValueError: an answer without style counts, an unknown feature.
    """
    unknown = set(control) - {"length", "markdown"}
    if unknown or not control:
        raise ValueError(f"control: {list(control)} must be one or both of length, markdown")
    table = table.loc[table.index.repeat(table["weight"].astype(int))]
    features = style_features(table, style, version)
    columns = [0] * ("length" in control) + [1, 2, 3] * ("markdown" in control)
    spread = features.std(0, ddof=0 if version == "v0.1" else 1)
    features = ((features - features.mean(0)) / np.where(spread > 0, spread, 1.0))[:, columns]
    models = sorted({*table["model_a"], *table["model_b"]})
    # v0.1's columns hold log 10, which matters under a ridge
    unit = np.log(10) if version == "v0.1" else 1.0
    design = np.column_stack([unit * _model_columns(table, models), features])
    target = 1.0 - table["score"].to_numpy()
    ridge = 1.0 if version == "v0.1" else 0.0
    coefficients = unit * _logistic(design, target, np.ones(len(table)), ridge=ridge)[: len(models)]
    strength = pd.Series(coefficients, index=models)
    return (100 * pd.Series(expit(strength - strength[baseline]), index=models)).rename("score")


def style_features(table: pd.DataFrame, style: pd.DataFrame, version: Version) -> np.ndarray:
    """float64 [battle, 4]: length, headers, lists, bold of model_a against model_b, not yet standardised."""
    sides = []
    for side in ("model_a", "model_b"):
        wanted = pd.MultiIndex.from_frame(table[[side, "question_id"]])
        absent = ~wanted.isin(style.index)
        if absent.any():
            raise ValueError(f"style: no counts for the answer of {wanted[absent][0]}")
        sides.append(style.loc[wanted, list(STYLE_COLUMNS)].to_numpy(float))
    a, b = sides
    if version == "v0.1":
        return (a - b) / (a + b + 1)
    length = (a[:, :1] - b[:, :1]) / np.maximum(a[:, :1] + b[:, :1], 1)
    a, b = (counts[:, 1:] / (counts[:, :1] + 1) for counts in (a, b))
    return np.column_stack([length, (a - b) / (a + b + 1)])


def _model_columns(table: pd.DataFrame, models: Sequence[str]) -> np.ndarray:
    place: Mapping[str, int] = {name: index for index, name in enumerate(models)}
    design = np.zeros((len(table), len(models)))
    rows = np.arange(len(table))
    design[rows, table["model_a"].map(place)] += 1.0
    design[rows, table["model_b"].map(place)] -= 1.0
    return design


def _logistic(design: np.ndarray, target: np.ndarray, weight: np.ndarray, ridge: float) -> np.ndarray:
    """Logistic regression without intercept by Newton's method; soft targets; the least-norm solution without ridge."""
    coefficients = np.zeros(design.shape[1])

    def objective(w: np.ndarray) -> float:
        z = design @ w
        return float(weight @ (np.logaddexp(0.0, z) - target * z) + 0.5 * ridge * w @ w)

    value = objective(coefficients)
    for _ in range(60):
        q = expit(design @ coefficients)
        gradient = design.T @ (weight * (q - target)) + ridge * coefficients
        if np.abs(gradient).max() <= 1e-10 * weight.sum():
            break
        hessian = (design * (weight * q * (1 - q))[:, None]).T @ design + ridge * np.eye(len(coefficients))
        step = -np.linalg.lstsq(hessian, gradient, rcond=1e-13)[0]
        step *= min(1.0, 5.0 / max(np.abs(step).max(), 1e-300))
        while (new := objective(coefficients + step)) > value and np.abs(step).max() > 1e-12:
            step /= 2
        coefficients, value = coefficients + step, new
    return coefficients

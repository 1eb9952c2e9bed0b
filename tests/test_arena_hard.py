"""Arena-Hard: verdicts, battles by hand, Bradley-Terry and style control against general optimisers."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from rlhfscale.evals import arena_hard

BASE = "base"


def games(*verdicts, model="m"):
    """Games of one model: (verdict of game 0, verdict of game 1) for each question."""
    rows = [(q, model, game, verdict) for q, pair in enumerate(verdicts) for game, verdict in enumerate(pair)]
    return pd.DataFrame(rows, columns=["question_id", "model", "game", "verdict"])


def random_battles(rng, models, num_questions=60):
    rows = [
        (q, BASE, model, rng.choice([0.0, 0.5, 1.0]), rng.choice([1.0, 3.0])) for q in range(num_questions)
        for model in models
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(arena_hard.BATTLE_COLUMNS))


@pytest.mark.parametrize(
    ("judgment", "verdict"),
    [
        ("My final verdict is: [[A>>B]]", "A>>B"),
        ("[[B>A]] as I said: [[B>A]]", "B>A"),
        ("[[A>B]] or rather [[B>A]]", None),
        ('The answer says "[[A>>B]]", which I ignore: [[B>>A]]', None),
        ("[[A>B>A]]", None),
        ("[[A<B]]", None),
        ("no label", None),
        ("", None),
        ("[[" * 100_000 + "A" * 100_000, None),
    ],
)
def test_verdicts(judgment, verdict):
    assert arena_hard.parse_verdict(judgment) == verdict


def test_v2_takes_mirrored_labels():
    assert arena_hard.parse_verdict("[[A<<B]]", "v2.0") == "B>>A"
    assert arena_hard.parse_verdict("[[B=A]]", "v2.0") == "A=B"


def test_battles_by_hand():
    # game 0: A is the baseline; game 1: A is the model
    table = arena_hard.battles(games(("A>>B", "A>B"), ("B>A", None), ("A=B", "B>>A")), baseline=BASE)
    assert table[["question_id", "score", "weight"]].to_numpy().tolist() == [
        [0, 0.0, 3.0], [0, 1.0, 1.0], [1, 1.0, 1.0], [2, 0.5, 1.0], [2, 0.0, 3.0],
    ]  # fmt: skip
    # (0*3 + 1 + 1 + .5 + 0*3) / 9
    assert arena_hard.scores(table, BASE)["m"] == pytest.approx(100 * 2.5 / 9, abs=1e-7)
    both = arena_hard.battles(games(("A>>B", "A>B"), ("B>A", None), ("A=B", "B>>A")), baseline=BASE, version="v2.0")
    assert both["question_id"].tolist() == [0, 0, 2, 2]


def test_a_model_that_meets_only_the_baseline_has_its_weighted_mean():
    table = random_battles(np.random.default_rng(0), ["x", "y", "z"])
    scores = arena_hard.scores(table, BASE)
    for model, rows in table.groupby("model_b"):
        assert scores[model] == pytest.approx(100 * np.average(rows["score"], weights=rows["weight"]), abs=1e-6)
    assert scores[BASE] == 50


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_all_or_nothing_is_finite(won):
    table = random_battles(np.random.default_rng(0), ["x"]).assign(score=won)
    assert arena_hard.scores(table, BASE)["x"] == pytest.approx(100 * won, abs=1e-6)


def test_bradley_terry_on_a_general_graph_is_the_maximum_likelihood():
    rng = np.random.default_rng(2)
    names, truth = ["a", "b", "c", "d"], np.array([0.8, 0.1, -0.3, -0.6])
    pairs = rng.integers(4, size=(3000, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    score = (rng.random(len(pairs)) < expit(truth[pairs[:, 1]] - truth[pairs[:, 0]])).astype(float)
    table = pd.DataFrame({"model_a": [names[i] for i, _ in pairs], "model_b": [names[i] for _, i in pairs]})
    table = table.assign(question_id=0, score=score, weight=1.0)

    def loss(free):
        strength = np.append(free, 0.0)
        return np.logaddexp(0, np.where(score == 1, -1, 1) * (strength[pairs[:, 1]] - strength[pairs[:, 0]])).sum()

    found = minimize(loss, np.zeros(3)).x
    elo = arena_hard.elo(table)
    ours = (elo - elo["d"]) * np.log(10) / 400
    assert ours[["a", "b", "c"]].to_numpy() == pytest.approx(found, abs=1e-4)
    assert ours[["a", "b", "c"]].to_numpy() == pytest.approx(truth[:3] - truth[3], abs=0.25)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="missing"):
        arena_hard.scores(random_battles(np.random.default_rng(0), ["x"]).iloc[:0], BASE)
    with pytest.raises(ValueError, match="'other' is in no battle; models: base, x"):
        arena_hard.scores(random_battles(np.random.default_rng(0), ["x"]), "other")
    with pytest.raises(ValueError, match="'both'"):
        arena_hard.battles_from_winners(
            pd.DataFrame({"question_id": [1], "model_a": ["a"], "model_b": ["b"], "winner": ["both"]})
        )


def test_the_interval_resamples_questions_and_covers():
    """Both games of a question agree here, so battles are not independent: resampling them is too narrow."""
    covered, published, truth = 0, 0, 40.0
    for draw in range(200):
        rng = np.random.default_rng((1, draw))
        won = np.repeat((rng.random(80) < truth / 100).astype(float), 2)
        table = pd.DataFrame({"question_id": np.repeat(np.arange(80), 2), "model_a": BASE, "model_b": "m"})
        table = table.assign(score=won, weight=3.0)
        interval = arena_hard.score_interval(table, rng=rng, num_draws=200)
        covered += interval.low <= truth <= interval.high
        half = 196 * np.sqrt(won.mean() * (1 - won.mean()) / (3 * len(won)))
        published += abs(100 * won.mean() - truth) < half
    assert 0.91 <= covered / 200 <= 0.985
    assert published / 200 < 0.75


def test_published_intervals_are_seeded_and_named_by_version():
    table = random_battles(np.random.default_rng(0), ["x", "y"])
    first, again = (
        arena_hard.published_interval(table, BASE, rng=np.random.default_rng(1), num_draws=20) for _ in range(2)
    )
    assert first.equals(again) and (first["low"] < first["high"]).loc["x"]
    new = arena_hard.published_interval(table, BASE, version="v2.0", rng=np.random.default_rng(1), num_draws=200)
    rows = table[table["model_b"] == "x"]
    mean = 100 * np.average(rows["score"], weights=rows["weight"])
    assert new.loc["x", "mean"] == pytest.approx(mean, abs=1.5)


def style_table(rng, models, num_questions=60):
    rows = [(m, q, *rng.integers(1, [900, 9, 9, 9])) for m in [BASE, *models] for q in range(num_questions)]
    table = pd.DataFrame(rows, columns=["model", "question_id", *arena_hard.STYLE_COLUMNS])
    return table.set_index(["model", "question_id"])


@pytest.mark.parametrize("version", ["v0.1", "v2.0"])
@pytest.mark.parametrize("control", [("length", "markdown"), ("length",), ("markdown",)])
def test_style_control_against_a_general_optimiser(version, control):
    rng = np.random.default_rng(4)
    table, style = random_battles(rng, ["x", "y"]), style_table(rng, ["x", "y"])
    ours = arena_hard.style_controlled(table, style, BASE, version=version, control=control)

    rows = [row for row in table.itertuples() for _ in range(int(row.weight))]
    features = []
    for row in rows:
        a, b = (style.loc[(name, row.question_id)].to_numpy(float) for name in (row.model_a, row.model_b))
        if version == "v0.1":
            feature = [(x - y) / (x + y + 1) for x, y in zip(a, b, strict=True)]
        else:
            density = [(x / (a[0] + 1), y / (b[0] + 1)) for x, y in zip(a[1:], b[1:], strict=True)]
            feature = [(a[0] - b[0]) / (a[0] + b[0])] + [(x - y) / (x + y + 1) for x, y in density]
        features.append(feature)
    features = np.array(features)
    features = (features - features.mean(0)) / features.std(0, ddof=0 if version == "v0.1" else 1)
    keep = [name in control for name in ("length", "markdown", "markdown", "markdown")]
    names, unit = [BASE, "x", "y"], np.log(10) if version == "v0.1" else 1.0
    design = np.array([[unit * ((n == r.model_a) - (n == r.model_b)) for n in names] for r in rows])
    design = np.column_stack([design, features[:, keep]])
    target = np.array([1 - r.score for r in rows])

    def loss(w):
        z = design @ w
        return (np.logaddexp(0, z) - target * z).sum() + (0.5 * w @ w if version == "v0.1" else 0)

    w = minimize(loss, np.zeros(design.shape[1]), tol=1e-10).x
    for index, name in enumerate(names):
        assert ours[name] == pytest.approx(100 * expit(unit * (w[index] - w[0])), abs=1e-3)


def test_style_control_takes_out_a_planted_length_bias():
    """Two models of the baseline's strength, one longer and one shorter than it, before a judge that likes length."""
    rng = np.random.default_rng(5)
    style = style_table(rng, ["x", "y"], 4000)
    style.loc["x", "token_len"] = style.loc["x", "token_len"].to_numpy() + 400
    style.loc[BASE, "token_len"] = style.loc[BASE, "token_len"].to_numpy() + 200
    tables = []
    for model in ("x", "y"):
        lengths = [style.loc[name, "token_len"].to_numpy(float) for name in (BASE, model)]
        won = rng.random(4000) < expit(3 * (lengths[1] - lengths[0]) / (lengths[0] + lengths[1]))
        table = pd.DataFrame({"question_id": range(4000), "model_a": BASE, "model_b": model, "weight": 1.0})
        tables.append(table.assign(score=won.astype(float)))
    table = pd.concat(tables, ignore_index=True)
    free = arena_hard.scores(table, BASE)
    controlled = arena_hard.style_controlled(table, style, BASE, version="v2.0")
    assert free["x"] - free["y"] > 15
    assert abs(controlled["x"] - controlled["y"]) < 5


def test_style_input_is_checked():
    rng = np.random.default_rng(4)
    table, style = random_battles(rng, ["x"]), style_table(rng, ["x"])
    with pytest.raises(ValueError, match="no counts for the answer of .*x.*3"):
        arena_hard.style_controlled(table, style.drop(("x", 3)), BASE)
    with pytest.raises(ValueError, match="control"):
        arena_hard.style_controlled(table, style, BASE, control=("colour",))


def test_style_counts_by_hand():
    answer = "# Title\n\n- one\n* two\n3. three\n**bold** and __bold__\n```\n# no\n- no\n**no**\n```\n"
    counts = arena_hard.style_counts(answer, 17)
    assert counts == {"token_len": 17, "header_count": 1, "list_count": 3, "bold_count": 2}
    arena_hard.style_counts("*" * 200_000 + "\n" * 200_000 + " " * 200_000, 1)

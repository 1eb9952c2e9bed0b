"""Figures render from the CSV files alone, within the page, with every label inside the figure."""

import numpy as np
import pandas as pd
import pytest

from rlhfscale.claims import c01_policy_size as c01
from rlhfscale.claims import c02_reward_model_size as c02
from rlhfscale.claims import c05_responses_per_prompt as c05
from rlhfscale.claims import c06_best_of_n as c06
from rlhfscale.claims import c09_algorithms as c09
from rlhfscale.claims import test_bed as bed_figure
from rlhfscale.study import style
from rlhfscale.study.results import ResultsFolder

RUNGS = {"r1": 25_000, "r2": 60_000, "r3": 150_000, "r4": 390_000, "r5": 1_000_000}
SEEDS = range(5)
METHOD = "seed x prompt bootstrap, t"


def row(quantity, estimate, half, num_seeds=5, num_prompts=512, **conditions):
    interval = {"estimate": estimate, "ci_low": estimate - half, "ci_high": estimate + half, "ci_method": METHOD}
    return {"quantity": quantity, **interval, "num_seeds": num_seeds, "num_prompts": num_prompts, **conditions}


def run(metric, seed, value, **conditions):
    about = {"figure": "x", "command": "c", "node": f"n-{seed}", "rung": "", "num_params": np.nan, "num_prompts": 512}
    return about | {"metric": metric, "seed": seed, "value": value, **conditions}


def policy_size_tables():
    rng = np.random.default_rng(0)
    runs, summary = [], []
    for index, (rung, size) in enumerate(RUNGS.items()):
        levels = {"sft": 0.35 + 0.07 * index, "ppo": 0.35 + 0.07 * index + 0.13 - 0.02 * index}
        for stage, level in levels.items():
            about = {"rung": rung, "num_params": size, "stage": stage}
            runs += [run("sampled_exact", s, level + 0.01 * rng.standard_normal(), **about) for s in SEEDS]
            summary.append(row("sampled_exact", level, 0.02, **about))
        summary.append(row("gain", levels["ppo"] - levels["sft"], 0.02, rung=rung, num_params=size))
    for size in np.geomspace(25e3, 1e6, 20):
        summary.append(row("gain_fit", 0.13 - 0.015 * np.log2(size / 25e3), 0.015, num_params=size))
    summary.append(row("gain_slope", -0.015, 0.004, verdict="reproduced"))
    return pd.DataFrame(runs), pd.DataFrame(summary)


def best_of_n_tables():
    rng = np.random.default_rng(0)
    sizes = 2 ** np.arange(10)
    runs, summary = [], []
    for index, (rung, params) in enumerate(RUNGS.items()):
        top = 0.7 + 0.06 * index
        for n in sizes:
            about = {"reward_model": rung, "reward_model_params": params, "num_responses": n}
            level = top - (top - 0.5) * n**-0.6 - 0.01 * (4 - index) * np.log2(n) / 4
            runs += [run("best_of_n", s, level + 0.005 * rng.standard_normal(), **about) for s in SEEDS]
            summary.append(row("best_of_n", level, 0.01, **about))
            summary.append(row("best_of_n_gold", 2 * (level - 0.5), 0.03, **about))
            summary.append(row("best_of_n_proxy", 0.4 * np.log2(n), 0.03, **about))
    for n in sizes:
        summary.append(row("pass_at_n", 1 - 0.5 * n**-0.9, 0.01, num_responses=n))
        summary.append(row("majority_vote", 0.8 - 0.3 * n**-0.5, 0.01, num_responses=n))
    ranges = {"first": 1, "early": 8, "late": 64, "last": 512}
    summary.append(row("early_minus_late_gain", 0.08, 0.01, verdict="reproduced", **ranges))
    return pd.DataFrame(runs), pd.DataFrame(summary)


def test_bed_tables():
    rng = np.random.default_rng(0)
    runs, summary = [], []
    for index, (rung, size) in enumerate(RUNGS.items()):
        flops, size_of = 6 * size * 6e6, {"rung": rung, "num_params": size}
        points = [("excess_loss", 1.2 + 400 * flops**-0.22, {"train_flops": flops})]
        for stage, shift in (("sft", 0.0), ("ppo", 0.2)):
            for temperature in (0.0, 0.5, 1.0) if stage == "sft" else (0.0, 1.0):
                level = 0.3 + 0.02 * index + shift - 0.05 * temperature
                points.append(("accuracy", level, {"stage": stage, "temperature": temperature}))
        for labels in (900, 3500, 14000, 56000) if rung == "r3" else (56000,):
            points.append(
                ("pair_accuracy", 0.5 + 0.08 * np.log10(labels) * (0.6 + 0.1 * index), {"labelled_prompts": labels})
            )
        for metric, level, conditions in points:
            summary.append(row(metric, level, 0.02 * level, **size_of, **conditions))
            runs += [run(metric, s, level * (1 + 0.01 * rng.standard_normal()), **size_of, **conditions) for s in SEEDS]
    for flops in np.geomspace(6 * 25e3 * 6e6, 6 * 1e6 * 6e6, 30):
        summary.append(row("loss_fit", 1.2 + 400 * flops**-0.22, 0.02, train_flops=flops))
    summary += [row("loss_exponent", 0.22, 0.03), row("loss_r2", 0.991, 0.0)]
    for size in 2 ** np.arange(10):
        for rung, level in (("r3", 0.3 + 0.05 * np.log2(size)), ("r1", 0.5 / size**0.3)):
            summary.append(row("best_of_n", level, 0.02, reward_model=rung, num_responses=size))
        for rung in ("r3", "r5"):
            summary.append(row("pass_at_k", 1 - 0.7 / size, 0.02, rung=rung, num_responses=size))
    for updates in range(15, 121, 15):
        summary.append(row("weak_kl_exact", 0.5 - 0.001 * updates, 0.02, updates=updates))
        summary.append(row("weak_kl_proxy", 0.02 * updates, 0.1, updates=updates))
    for name in range(26):
        for stage in ("sft", "ppo"):
            about = {"operation": f"operation_{name}", "stage": stage, "demonstrators": 0.3 + 0.01 * name}
            summary.append(row("right_rule", 0.3 + 0.01 * name + 0.3 * (stage == "ppo"), 0.03, **about))
    return pd.DataFrame(runs), pd.DataFrame(summary)


test_bed_tables.__test__ = False  # a table, not a test: named after its figure


def training_metrics():
    rng = np.random.default_rng(0)
    update = np.arange(60)
    tables = []
    for index, (rung, size) in enumerate(RUNGS.items()):
        for seed in SEEDS:
            noise = lambda scale: scale * rng.standard_normal(60)  # noqa: E731
            rise = 1 - np.exp(-update / (10 + 5 * index))
            columns = {"proxy": 3 * rise + noise(0.1), "gold": 0.5 + 0.2 * rise + noise(0.01)}
            columns |= {"kl_nats": 5 * rise + noise(0.1), "response_length": 20 - 2 * rise + noise(0.2)}
            columns |= {"eos_share": np.clip(0.97 + 0.03 * rise + noise(0.004), 0, 1)}
            tables.append(pd.DataFrame({"rung": rung, "num_params": size, "seed": seed, "update": update, **columns}))
    return pd.concat(tables)


def sampled(level, rng, **about):
    return [run("sampled_exact", seed, level + 0.005 * rng.standard_normal(), **about) for seed in SEEDS]


def reward_model_size_tables():
    rng = np.random.default_rng(0)
    runs, summary = sampled(0.5, rng, stage="sft"), [row("sampled_exact", 0.5, 0.02, stage="sft")]
    rises = {"pair_accuracy": (0.75, 0.02), "best_of_n_gain": (0.05, 0.015), "ppo_gain": (0.03, 0.005)}
    for name, (level, slope) in rises.items():
        for size in RUNGS.values():
            about, mean = {"reward_model_params": size}, level + slope * np.log2(size / 25e3)
            summary.append(row(name, mean, 0.01, **about))
            if name == "ppo_gain":
                runs += sampled(0.5 + mean, rng, stage="ppo", **about)
            else:
                runs += [run(name, seed, mean, num_responses=8, **about) for seed in SEEDS]
        for size in np.geomspace(25e3, 1e6, 20):
            line = level + slope * np.log2(size / 25e3)
            summary.append(row(f"{name}_fit", line, 0.008, reward_model_params=size))
        summary.append(row(f"{name}_slope", slope, 0.003))
    summary.append(row("slope_difference", 0.01, 0.004, verdict="reproduced"))
    return pd.DataFrame(runs), pd.DataFrame(summary)


def responses_per_prompt_tables():
    rng = np.random.default_rng(0)
    runs, summary = sampled(0.5, rng, stage="sft"), [row("sampled_exact", 0.5, 0.02, stage="sft")]
    for index, name in enumerate(c05.LADDERS):
        for power in range(6):
            about = {"ladder": name, "responses_per_prompt": 2**power}
            runs += sampled(0.56 - 0.03 * 0.5**power + 0.01 * index, rng, stage="ppo", **about)
            summary.append(row("sampled_exact", 0.56 - 0.03 * 0.5**power + 0.01 * index, 0.01, stage=np.nan, **about))
            if power:
                summary.append(row("doubling_gain", 0.03 * 0.5**power, 0.006, **about))
    for quantity, estimate in (("first_doublings", 0.012), ("last_minus_half_of_first", -0.005)):
        summary.append(row(quantity, estimate, 0.004, verdict="reproduced"))
    return pd.DataFrame(runs), pd.DataFrame(summary)


def algorithms_tables():
    rng = np.random.default_rng(0)
    runs, summary = sampled(0.5, rng, stage="sft"), []
    for index, name in enumerate(style.ALGORITHMS):
        for size in (2, 4, 8):
            about = {"algorithm": name, "responses_per_prompt": size}
            runs += sampled(0.55 + 0.004 * index, rng, stage=name, **about)
            summary.append(row("gain", 0.05 + 0.004 * index, 0.008, **about))
            summary.append(row("minus_ppo", 0.004 * index, 0.006, **about))
        whole = row("minus_ppo_in_all", 0.004 * index, 0.004, algorithm=name, margin=0.01)
        summary.append(whole | ({"verdict": "reproduced"} if name == "grpo" else {}))
    return pd.DataFrame(runs), pd.DataFrame([item for item in summary if "minus" not in item["quantity"]
                                             or item["algorithm"] != "ppo"])  # fmt: skip


def learning_curves_metrics():
    rng, update = np.random.default_rng(0), np.arange(30)
    tables = []
    for name in style.ALGORITHMS:
        for size in (2, 4, 8):
            for seed in SEEDS:
                gold = 0.7 + 0.002 * update + 0.01 * rng.standard_normal(30)
                columns = {"update": update, "gold": gold, "kl_nats": 0.005 * update}
                tables.append(pd.DataFrame({"algorithm": name, "responses_per_prompt": size, "seed": seed, **columns}))
    return pd.concat(tables)


TABLES = {
    "policy_size": policy_size_tables,
    "best_of_n": best_of_n_tables,
    "test_bed": test_bed_tables,
    "reward_model_size": reward_model_size_tables,
    "responses_per_prompt": responses_per_prompt_tables,
    "algorithms": algorithms_tables,
}
DRAW = {
    "policy_size": c01.draw,
    "best_of_n": c06.draw,
    "test_bed": bed_figure.draw,
    "reward_model_size": c02.draw,
    "responses_per_prompt": c05.draw,
    "algorithms": c09.draw,
}


def artists_outside(figure):
    """Texts and legends that reach beyond the figure."""
    figure.canvas.draw()
    page = figure.bbox
    texts = [t for axis in figure.axes for t in (axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts)]
    boxes = [(t, t.get_window_extent()) for t in [*texts, *figure.texts, *figure.legends] if t.get_visible()]
    return [t for t, b in boxes if b.width and (b.x0 < -1 or b.y0 < -1 or b.x1 > page.x1 + 1 or b.y1 > page.y1 + 1)]


@pytest.mark.parametrize("name", TABLES)
def test_figures_render_from_the_csv_files_alone(name, tmp_path):
    runs, summary = TABLES[name]()
    folder = ResultsFolder(name, "smoke", tmp_path)
    folder.write_runs(runs)
    folder.write_summary(summary)
    figure = DRAW[name](folder.read("runs.csv"), folder.read("summary.csv"))
    png, svg = folder.write_figure(figure)
    assert figure.get_figwidth() == style.WIDTH_IN
    assert not artists_outside(figure)
    assert png.stat().st_size > 20_000
    assert svg.stat().st_size > 20_000
    assert "5 seeds" in figure.texts[0].get_text()
    assert "512 prompts" in figure.texts[0].get_text()


def test_the_picture_of_habits_fits_the_page_and_marks_the_demonstrators(tmp_path):
    figure = bed_figure.draw_habits(test_bed_tables()[1])
    ResultsFolder("habits", "smoke", tmp_path).write_figure(figure)
    assert not artists_outside(figure)
    (marks,) = [c.get_offsets() for c in figure.axes[0].collections if len(c.get_offsets()) == 26]
    np.testing.assert_allclose(np.sort(marks[:, 0]), 0.3 + 0.01 * np.arange(26))


def test_equal_tables_give_equal_bytes(tmp_path):
    folder = ResultsFolder("policy_size", "smoke", tmp_path)
    first = [p.read_bytes() for p in folder.write_figure(c01.draw(*policy_size_tables()))]
    second = [p.read_bytes() for p in folder.write_figure(c01.draw(*policy_size_tables()))]
    assert first == second


def test_training_curves_draw_each_seed_and_the_mean(tmp_path):
    figure = c01.draw_training(training_metrics())
    ResultsFolder("curves", "smoke", tmp_path).write_figure(figure)
    assert len(figure.axes[0].lines) == len(RUNGS) * (len(SEEDS) + 1)
    assert not artists_outside(figure)


def test_learning_curves_draw_each_seed_and_the_mean(tmp_path):
    figure = c09.draw_training(learning_curves_metrics())
    ResultsFolder("learning", "smoke", tmp_path).write_figure(figure)
    assert [len(axis.lines) for axis in figure.axes] == [3 * (len(SEEDS) + 1)] * 6
    assert not artists_outside(figure)


def test_captions_name_the_statistic_and_the_verdict():
    for name, words in (
        ("reward_model_size", ["+0.0100 [+0.0060, +0.0140]", "C2: reproduced"]),
        ("responses_per_prompt", ["+0.0120 [+0.0080, +0.0160]", "-0.0050", "C5: reproduced"]),
        ("algorithms", ["margin 0.01", "+0.0040 [+0.0000, +0.0080]", "C9: reproduced"]),
    ):
        caption = " ".join(DRAW[name](*TABLES[name]()).texts[0].get_text().split())
        assert all(word in caption for word in words), caption


def test_policy_size_shows_every_seed_and_the_paired_gain():
    runs, summary = policy_size_tables()
    figure = c01.draw(runs, summary)
    left, right = figure.axes
    offsets = np.concatenate([c.get_offsets() for c in left.collections if len(c.get_offsets()) == 25])
    assert len(offsets) == 50
    wide = runs.pivot_table(index=["num_params", "seed"], columns="stage", values="value")
    expected = np.sort((wide["ppo"] - wide["sft"]).to_numpy())
    drawn = next(c.get_offsets()[:, 1] for c in right.collections if len(c.get_offsets()) == 25)
    np.testing.assert_allclose(np.sort(drawn), expected)
    assert "reproduced" in right.texts[0].get_text()


def test_a_missing_quantity_is_named():
    runs, summary = policy_size_tables()
    with pytest.raises(ValueError, match="gain_slope"):
        c01.draw(runs, summary[summary["quantity"] != "gain_slope"])


def test_size_colors_are_spaced_by_the_log_of_the_size():
    colors = style.size_colors({"large": 1e6, "small": 1e4, "middle": 1e5})
    assert list(colors) == ["small", "middle", "large"]
    assert colors == style.size_colors({"small": 10, "middle": 100, "large": 1000})

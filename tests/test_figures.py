"""The study's own parameters, notebooks and README: what a reader opens must agree with the code."""

import re
import subprocess

import nbformat
import pytest

from rlhfscale.bed import ladder, rungs, specs
from rlhfscale.bed.recipe import Recipe
from rlhfscale.chat import specs as chat_specs
from rlhfscale.claims import benchmarks, learning_rates, readme, test_bed
from rlhfscale.claims import c01_policy_size as c01
from rlhfscale.claims import c02_reward_model_size as c02
from rlhfscale.claims import c03_training_data as c03
from rlhfscale.claims import c04_prompt_vs_response_diversity as c04
from rlhfscale.claims import c05_responses_per_prompt as c05
from rlhfscale.claims import c06_best_of_n as c06
from rlhfscale.claims import c08_process_supervision as c08
from rlhfscale.claims import c09_algorithms as c09
from rlhfscale.claims import c10_pretraining_vs_rlhf as c10
from rlhfscale.runs.paths import project_root
from rlhfscale.study import params, recipes, tables
from rlhfscale.study.params import ParamsError

ROOT = project_root()
TIERS = ("smoke", "laptop", "gpu24", "gpu", "paper")
FILES = [path for tier in TIERS for path in sorted((ROOT / "params" / tier).glob("[0-9][0-9]_*.yaml"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = sorted((ROOT / "results").glob("laptop/*/notebook.ipynb"))
GOOD = {
    "best_of_n": (c06.Params, params.read_yaml(ROOT / "params/smoke/06_best_of_n.yaml")),
    "policy_size": (c01.Params, params.read_yaml(ROOT / "params/smoke/01_policy_size.yaml")),
    "test_bed": (test_bed.Params, params.read_yaml(ROOT / "params/smoke/00_test_bed.yaml")),
    "reward": (c02.Params, params.read_yaml(ROOT / "params/smoke/02_reward_model_size.yaml")),
    "responses": (c05.Params, params.read_yaml(ROOT / "params/smoke/05_responses_per_prompt.yaml")),
    "data": (c03.Params, params.read_yaml(ROOT / "params/smoke/03_training_data.yaml")),
    "grid": (
        c04.Params,
        params.read_yaml(ROOT / "params/smoke/04_prompt_vs_response_diversity.yaml"),
    ),
    "process": (c08.Params, params.read_yaml(ROOT / "params/smoke/08_process_supervision.yaml")),
    "compute": (c10.Params, params.read_yaml(ROOT / "params/smoke/10_pretraining_vs_rlhf.yaml")),
    "rates": (learning_rates.Params, params.read_yaml(ROOT / "params/smoke/00_learning_rates.yaml")),
    "algorithms": (c09.Params, params.read_yaml(ROOT / "params/smoke/09_algorithms.yaml")),
}


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_parameters_are_valid_and_are_those_of_the_notebook(file):
    loaded = params.load(file)
    params.check_notebook_parameters(ROOT / "notebooks" / f"{file.stem}.ipynb", loaded)
    assert loaded.recipe == file.parent.name
    assert loaded.specs() or getattr(loaded, "missing", ()) or loaded.reads_results


def test_the_notebooks_defaults_are_the_laptop_tier():
    from papermill import inspect_notebook

    for name in params.FIGURES.keys() & {path.stem for path in (ROOT / "params" / "laptop").glob("*.yaml")}:
        cell = inspect_notebook(ROOT / "notebooks" / f"{name}.ipynb")
        defaults = {key: eval_literal(value["default"]) for key, value in cell.items()}
        assert defaults == params.load(name, "laptop").resolved()


def eval_literal(text):
    import ast

    return ast.literal_eval(text)


def test_figures_share_their_nodes():
    bed, size = (params.load(name, "laptop") for name in ("00_test_bed", "01_policy_size"))
    alone = c01.Params(**size.model_dump() | {"other_rungs": (), "other_seeds": ()})
    assert {spec.key for spec in alone.specs()} <= {spec.key for spec in bed.specs()}
    known, new = _nodes("00_test_bed", "01_policy_size", "06_best_of_n"), {}
    for name in ("02_reward_model_size", "05_responses_per_prompt", "09_algorithms"):
        new[name] = _nodes(name).keys() - known.keys()
        known |= _nodes(name)
    kinds = {name: {known[key].stage for key in keys} for name, keys in new.items()}
    # no model of the ladder, no labels: the test bed compares the rungs with half of them
    assert kinds.pop("02_reward_model_size") == {"reward_model", "policy", "samples", "scores"}
    assert all(kind == {"policy", "samples"} for kind in kinds.values())
    assert sum(known[key].cost_s for keys in new.values() for key in keys) < 60 * 60
    assert not any(known[key].algorithm == "ppo" for key in new["09_algorithms"] if known[key].stage == "policy")


def _nodes(*names):
    return {node.key: node for name in names for spec in params.load(name, "laptop").specs() for node in spec.walk()}


def test_a_sweep_of_responses_moves_nothing_else():
    """Equal optimiser steps in every cell, equal prompts or equal roll-outs, and one response of the recipe's PPO."""
    found = params.load("05_responses_per_prompt", "laptop")
    recipe = recipes.load("laptop")
    fixed = {
        "sft",
        "reward_model",
        "epochs",
        "num_updates",
        "kl_coefficient",
        "clip",
        "temperature",
        "seed",
    }
    for name, sizes in found.ladders().items():
        for size in sizes:
            policy, usual = found.policy(name, size, seed=1), recipe.policy("55k", "150k", 1)
            assert all(getattr(policy, field) == getattr(usual, field) for field in fixed)
            assert policy.policy_lr == recipe.policy_lr(policy.algorithm, "55k")
            rollouts = policy.prompts_per_update * policy.responses_per_prompt
            assert rollouts / policy.minibatch_size == recipe.steps_per_epoch == 2
            assert policy.responses_per_prompt == size and policy.algorithm == name[: name.index(",")]
            assert (policy.prompts_per_update if "prompts" in name else rollouts) == (64 if "prompts" in name else 256)
    assert found.policy("ppo, equal roll-outs", 1, 1).key == recipe.policy("55k", "150k", 1).key


def test_a_rung_may_have_a_rate_of_its_own():
    recipe = recipes.load("laptop").model_copy(update={"ppo_policy_lr_of": {"14k": 0.5}})
    assert recipe.policy("14k", "150k", 1).policy_lr == 0.5
    assert recipe.policy("55k", "150k", 1).policy_lr == recipe.ppo_policy_lr
    assert recipe.policy("14k", "150k", 1, algorithm="rloo", responses=2).policy_lr == recipe.rloo_policy_lr


@pytest.mark.parametrize(("rates", "words"), [({"15k": 0.1}, "ppo_policy_lr_of: .*15k"), ({"14k": 0.0}, "above 0")])
def test_a_rate_of_no_rung_and_no_rate_are_refused(rates, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**recipes.load("laptop").model_dump() | {"ppo_policy_lr_of": rates})


def test_figures_use_neither_the_seed_nor_the_prompts_the_settings_were_chosen_on():
    measured = [loaded for file in FILES if not (loaded := params.load(file)).reads_results]
    chosen_on = [loaded for loaded in measured if isinstance(loaded, learning_rates.Params)]
    for loaded in measured:
        evaluations = [spec for spec in loaded.specs() if isinstance(spec, specs.Samples | chat_specs.Answers)]
        assert evaluations or isinstance(loaded, benchmarks.Params)
        if loaded in chosen_on:
            assert all(spec.prompt_seed == 0 for spec in evaluations)
            continue
        assert 0 not in loaded.seeds
        assert all(spec.prompt_seed != 0 for spec in evaluations)
        assert not any({*loaded.seeds} & {*other.seeds} for other in chosen_on if other.recipe == loaded.recipe)
    assert len(chosen_on) == len(TIERS)


@pytest.mark.parametrize(
    ("figure", "change", "words"),
    [
        ("policy_size", {"policy_rungs": ["14k", "7b"]}, ["policy_rungs", "7b", *ladder.RUNGS]),
        ("policy_size", {"reward_model_rung": "8b"}, ["reward_model_rung", "8b", *ladder.RUNGS]),
        ("policy_size", {"other_rungs": ["25k"]}, ["other_rungs", "25k", "already"]),
        ("policy_size", {"other_seeds": [1]}, ["other_seeds", "at least 2"]),
        ("policy_size", {"other_seeds": [1, 9]}, ["other_seeds", "9"]),
        ("policy_size", {"policy_rungs": ["14k", "14k"]}, ["policy_rungs", "twice"]),
        ("policy_size", {"seeds": []}, ["seeds", "at least 2"]),
        ("policy_size", {"seeds": [1]}, ["seeds", "at least 2"]),
        ("policy_size", {"seeds": [1, 1]}, ["seeds", "different"]),
        ("policy_size", {"seeds": [-1, 1]}, ["seeds", "negative"]),
        ("policy_size", {"seeds": "1"}, ["seeds"]),
        ("policy_size", {"recipe": "nowhere"}, ["nowhere", "recipe.yaml"]),
        ("best_of_n", {"best_of": [1, 2, 4, 8, 128]}, ["best_of", "128", "num_samples"]),
        ("best_of_n", {"best_of": [1, 2, 4, 8]}, ["best_of", "at least 64"]),
        ("best_of_n", {"best_of": [1, 64]}, ["best_of", "lacks", "8"]),
        ("best_of_n", {"best_of": [1, 1, 8, 64]}, ["best_of", "twice"]),
        ("best_of_n", {"reference_rung": "55k"}, ["reference_rung", "55k"]),
        ("best_of_n", {"num_samples": 2.5}, ["num_samples"]),
        ("best_of_n", {"num_sample": 8}, ["num_sample", "did you mean num_samples"]),
        ("test_bed", {"data_prompts": [10_000]}, ["data_prompts", "size_prompts"]),
        ("test_bed", {"size_prompts": 321}, ["size_prompts", "321", "reward_prompts = 320"]),
        ("test_bed", {"reference_rung": "980k"}, ["reference_rung", "980k"]),
        ("test_bed", {"policy_rungs": ["14k", "25k", "55k"]}, ["policy_rungs", "at least 4"]),
        ("test_bed", {"temperatures": [0.5, 1.0]}, ["temperatures", "1.0"]),
        ("test_bed", {"studied_rung": "980k"}, ["studied_rung", "980k", "many_rungs"]),
        ("test_bed", {"many_rungs": ["980k"], "studied_rung": "980k"}, ["studied_rung", "980k", "policy_rungs"]),
        ("test_bed", {"weak_prompts": 41}, ["weak_prompts", "41", "data_prompts"]),
        ("reward", {"policy_rung": "8b"}, ["policy_rung", "8b", *ladder.RUNGS]),
        ("reward", {"reward_model_rungs": ["14k"]}, ["reward_model_rungs", "at least 2"]),
        ("reward", {"best_of": 16}, ["best_of", "16", "num_samples = 8"]),
        ("reward", {"best_of": 1}, ["best_of"]),
        ("responses", {"responses": [1, 2, 4]}, ["responses", "at least 4"]),
        ("responses", {"responses": [1, 2, 4, 16]}, ["responses", "each doubling"]),
        ("responses", {"grpo_responses": [1, 2]}, ["grpo_responses", "must be 2"]),
        ("responses", {"rollout_responses": [1, 2, 4], "rollouts": 66}, ["rollout_responses", "4", "66"]),
        ("responses", {"num_prompts": 15}, ["num_prompts", "15 prompts x 1", "2 minibatches"]),
        ("responses", {"reward_model_rung": "1k"}, ["reward_model_rung", "1k"]),
        ("data", {"updates": [1, 2, 4, 6]}, ["updates", "1.5"]),
        ("data", {"updates": [2, 1, 4, 8]}, ["updates", "rise"]),
        ("data", {"updates": [1, 2, 8]}, ["updates", "at least 4"]),
        ("data", {"weak_kl": -0.1}, ["weak_kl"]),
        ("grid", {"labels": [321, 640]}, ["labels", "321", "2 responses"]),
        ("grid", {"batch_responses": 66}, ["batch_responses", "4", "66"]),
        ("grid", {"responses": [4, 2]}, ["responses", "rise"]),
        ("grid", {"best_of": 16}, ["best_of", "num_samples = 8"]),
        ("process", {"aggregate": "mean"}, ["aggregate", "'product'"]),
        ("process", {"ppo_rung": "55k"}, ["ppo_rung", "55k"]),
        ("process", {"labelled_prompts": 161}, ["labelled_prompts", "161"]),
        ("process", {"best_of": 16}, ["best_of", "num_samples = 8"]),
        ("compute", {"documents": [1, 2, 3, 4]}, ["documents", "64"]),
        ("compute", {"updates": [4, 3, 2, 1]}, ["updates", "rise"]),
        ("compute", {"ladder_rungs": ["14k", "25k", "55k", "8b"]}, ["ladder_rungs", "8b"]),
        ("rates", {"rates": [0.0005, 0.002]}, ["rates", "0.001"]),
        ("rates", {"rates": [0.002, 0.001]}, ["rates", "rise"]),
        ("rates", {"siblings": ["dpo"]}, ["siblings", "dpo"]),
        ("algorithms", {"algorithms": ["ppo", "rloo"]}, ["algorithms", "grpo"]),
        ("algorithms", {"algorithms": ["ppo", "grpo", "grpo"]}, ["algorithms", "twice"]),
        ("algorithms", {"algorithms": ["ppo", "dpo"]}, ["algorithms", "dpo", "'rloo'"]),
        ("algorithms", {"responses": [1, 2]}, ["responses", "at least 2"]),
        ("algorithms", {"equal_time_responses": 3}, ["equal_time_responses", "3", "64"]),
        ("algorithms", {"equal_time_updates": [1, 2]}, ["equal_time_updates", "one number for each"]),
        ("algorithms", {"responses": [3]}, ["responses", "3", "64"]),
    ],
)
def test_bad_parameters_name_the_field(figure, change, words):
    schema, good = GOOD[figure]
    with pytest.raises(ParamsError) as caught:
        schema.parse(good | change)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ppo_minibatch: 7", ["ppo_minibatch", "7", "64"]),
        ("label_rungs: [1k]", ["label_rungs", "1k", *ladder.RUNGS]),
        ("label_rungs: [14k, 14k]", ["label_rungs", "twice"]),
        ("ppo_minibatches: 8", ["ppo_minibatches", "did you mean ppo_minibatch"]),
        ("reward_readout: mean", ["reward_readout", "last", "sum"]),
    ],
)
def test_bad_recipes_name_file_and_field(tmp_path, monkeypatch, line, words):
    text = (ROOT / "params/smoke/recipe.yaml").read_text()
    name = line.partition(":")[0]
    text = re.sub(rf"^{name}:.*\n", "", text, flags=re.MULTILINE)
    (tmp_path / "params" / "broken").mkdir(parents=True)
    (tmp_path / "params" / "broken" / "recipe.yaml").write_text(f"{text}{line}\n")
    monkeypatch.setattr("rlhfscale.study.recipes.project_root", lambda: tmp_path)
    with pytest.raises(ParamsError, match=r"^params/broken/recipe.yaml: ") as caught:
        recipes.load("broken")
    recipes.load.cache_clear()
    for word in words:
        assert word in str(caught.value)


def test_playing_with_parameters_leaves_a_tiers_results_alone():
    committed = params.load("01_policy_size", "laptop")
    played = c01.Params(**committed.model_dump() | {"seeds": (11, 12, 13)})
    assert tables.command(committed) == "make figures TIER=laptop FIGURE=01_policy_size"
    assert "manifest.json" in tables.command(played)


def test_every_recipe_setting_changes_some_artifact():
    """A setting that changes nothing would be a lie in the file."""
    recipe = recipes.load("smoke")

    def keys(settings):
        policy = settings.policy("25k", "14k", seed=1)
        siblings = [settings.policy("25k", "14k", 1, algorithm=name, responses=2).key for name in ("grpo", "rloo")]
        return [settings.evaluation(policy, 1).key, settings.many_samples("25k", 8, 4).key, *siblings]

    before = keys(recipe)
    for name, value in recipe.model_dump().items():
        changed = {
            "reward_readout": "last",
            "reward_loss": "pairs",
            "ppo_critic": "separate",
            "ppo_policy_lr_of": {"25k": 0.5},
            "num_bases": 1,
            "num_bases_of": {"25k": 1},
        }.get(name)
        if changed is None:
            changed = ("25k",) if name == "label_rungs" else value * 2 if value and value < 0.5 else value + 1
        if name == "ppo_prompts":
            changed = value * 2
        if name in ("ppo_gamma", "ppo_lambda"):
            changed = value / 2
        if name == "ppo_minibatch":
            changed = value // 2
        assert keys(recipe.model_copy(update={name: changed})) != before, name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_prose_with_short_cells(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        assert not cell.outputs and cell.execution_count is None, "run nbstripout"
        assert "\ndef " not in f"\n{cell.source}"
        assert len(cell.source.splitlines()) <= 15
        assert max(map(len, cell.source.splitlines())) <= 120
    assert len(notebook.cells) - len(code) >= 0.7 * len(code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").glob("laptop/*/notebook.ipynb")), ids=lambda p: p.parent.name
)
def test_executed_notebooks_show_their_figure(path):
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)


def test_readme_names_files_and_targets_that_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:lib|notebooks|params|results|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_readme_table_is_that_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert readme.updated(text) == text, "run `make readme`"


def test_no_pickle_and_no_eval_in_the_library():
    command = ["grep", "-rnE", r"\b(pickle|eval|exec)\(|import pickle|torch\.load", str(ROOT / "lib"), "--include=*.py"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert not [line for line in found.splitlines() if ".eval()" not in line]


def test_the_readme_example_trains_a_model(tmp_path, monkeypatch):
    """As printed, but for the model's name, the number of updates, and the folder it writes to."""
    import tiny

    rungs.save_model(tiny.model(), tmp_path / "model")
    text = (ROOT / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "PPOConfig" in block)
    code = re.sub(r'name = ".*?"', f'name = "{tmp_path}/model"', code).replace("num_updates=20", "num_updates=2")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, "README.md", "exec"), found)  # the project's own text, not a model's
    assert len(found["metrics"]) == 2 and (tmp_path / "runs/short-answers/metrics.csv").is_file()
    assert (tmp_path / "runs/short-answers/checkpoint/policy/adapter_model.safetensors").is_file()

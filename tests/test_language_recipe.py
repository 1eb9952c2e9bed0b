"""Recipes of published checkpoints, and the specs they describe: keys, needs, errors; nothing is run."""

import subprocess
import sys

import pytest
import yaml

import rlhfscale.claims  # noqa: F401  (registers the figures)
from rlhfscale.chat import reasoning
from rlhfscale.chat import specs as chat_specs
from rlhfscale.chat import stages as chat_stages
from rlhfscale.planning import costs
from rlhfscale.planning.hardware import hardware
from rlhfscale.rl import TRAINERS
from rlhfscale.runs.paths import project_root
from rlhfscale.runs.pool import PoolError
from rlhfscale.study import params, recipes
from rlhfscale.study.params import ParamsError

pytest.importorskip("reasoning_gym", reason="make setup EXTRAS=smollm2")

ROOT = project_root()

KEPT = [
    "chat-2f13afa47f0fb050",
    "answers-d533bbae9b2a2123",
    "tuned-349213a2bdb11664",
    "answer_reward-382ffd4822c742b2",
    "answer_scores-b2650b9da9cff20f",
    "aligned-e2baa57e59584681",
    "aligned-3b3d19ba8f64f0c1",
    "aligned-2b72a475d73f0223",
]


def test_the_real_models_artifacts_keep_their_keys():
    """They took hours: fields that came later must not show in them. After a new version of a stage, write new ones."""
    P = params.load("20_real_model", "laptop")
    found = [P.settings.chat(P.checkpoint), P.evaluation("chat", 1), P.tuned(1), P.reward_model(1), P.scores(1)]
    found += [P.aligned(run, 1) for run in P.ppo]
    assert [spec.key for spec in found] == KEPT


def test_a_field_that_came_later_is_no_part_of_the_key_at_its_default():
    plain, given = (
        chat_specs.Chat(checkpoint="llama-3.1-8b"),
        chat_specs.Chat(checkpoint="llama-3.1-8b", precision="nf4"),
    )
    assert "precision" not in plain.describe()["fields"] and given.describe()["fields"]["precision"] == "nf4"
    assert plain.key != given.key


def test_every_setting_changes_some_artifact():
    recipe = recipes.load("paper")

    def keys(settings):
        found = [settings.policy("llama-3.1-405b", "llama-3.1-8b", 1, algorithm=name) for name in TRAINERS]
        return [settings.evaluation(policy, 1).key for policy in found]

    others = {"precision": "nf4", "nf4_rungs": (), "tasks": recipe.tasks[:4], "label_rungs": ("llama-3.1-8b",)}
    others["ppo_policy_lr_of"] = {"llama-3.1-405b": 1e-6}
    for name, value in recipe.model_dump().items():
        if name != "ladder":
            new = others[name] if name in others else value * 2
            assert keys(recipe.model_copy(update={name: new})) != keys(recipe), name


def test_stages_take_the_gpus_that_the_planner_finds(monkeypatch):
    monkeypatch.delenv("RLHFSCALE_GPU", raising=False)
    paper, laptop = recipes.load("paper"), params.load("20_real_model", "laptop")
    policies = [paper.policy(rung, "llama-3.1-70b", 1) for rung in ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b")]
    small, large, largest = (policy.needs for policy in policies)
    options = costs.Options(hardware("h100-80gb"), 64)
    assert [policy.needs.gpus for policy in policies] == [costs.stage_cost(p, options).gpus for p in policies]
    assert (small.machines, large.machines) == (1, 1) and largest.gpus == 8 * largest.machines > 8
    assert small.memory_mib == large.memory_mib < largest.memory_mib
    assert paper.chat("llama-3.1-405b").needs.gpus == 0
    assert not any(spec.needs.gpus for spec in laptop.specs())
    alone = paper.policy("llama-3.1-8b", "llama-3.1-8b", 1)
    assert alone.needs.gpus == 1 < small.gpus
    monkeypatch.setenv("RLHFSCALE_GPU", "l4-24gb")
    assert 1 < alone.needs.gpus <= 8
    with pytest.raises(PoolError, match=r"no number of l4-24gb holds it; it fits on --gpu h100-80gb or a100-80gb"):
        print(policies[0].needs)


@pytest.mark.parametrize(
    ("figure", "change", "words"),
    [
        ("01_policy_size", {"policy_rungs": ["llama-3.1-8b", "llama-3.1-9b"]}, ["policy_rungs", "9b", "llama-3.1-70b"]),
        ("01_policy_size", {"reward_model_rung": "55k"}, ["reward_model_rung", "55k", "llama-3.1-70b"]),
        ("06_best_of_n", {"policy_rung": "llama"}, ["policy_rung", "'llama'", "llama-3.1-8b"]),
        ("04_prompt_vs_response_diversity", {"labels": [8000, 16001]}, ["labels", "16001"]),
    ],
)
def test_bad_parameters_name_the_field(figure, change, words):
    with pytest.raises(ParamsError) as caught:
        params.FIGURES[figure].parse(params.load(figure, "paper").model_dump() | change)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("figure", ["00_test_bed", "00_walkthrough", "07_data_composition", "08_process_supervision",
                                    "10_pretraining_vs_rlhf"])  # fmt: skip
def test_figures_that_need_the_other_ladder_say_why(figure):
    values = params.load(figure, "laptop").model_dump() | {"recipe": "gpu"}
    with pytest.raises(ParamsError, match=f"^recipe: 'gpu' is a ladder of published checkpoints; {figure} .*"):
        params.FIGURES[figure].parse(values)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ladder", "hub", ["ladder", "'hub'", "'checkpoints'"]),
        ("tasks", ["sudoku"], ["tasks", "sudoku", "lcm_hard"]),
        ("label_rungs", ["gpt"], ["label_rungs", "gpt", "llama-3.1-8b"]),
        ("nf4_rungs", ["llama-3.1-8b"] * 2, ["nf4_rungs", "twice"]),
        ("ppo_policy_lr_of", {"gpt": 0.1}, ["ppo_policy_lr_of", "gpt", "llama-3.1-8b"]),
        ("ppo_policy_lr_of", {"llama-3.1-8b": 0.0}, ["ppo_policy_lr_of", "above 0", "llama-3.1-8b"]),
        ("eval_prompts", 501, ["eval_prompts", "501", "5 tasks"]),
        ("reward_prompts", 4005, ["reward_prompts", "4005", "2 label rungs"]),
        ("ppo_lr", 0.1, ["ppo_lr", "unknown", "ppo_policy_lr"]),
    ],
)
def test_bad_recipes_name_file_and_field(tmp_path, monkeypatch, name, value, words):
    values = params.read_yaml(ROOT / "params/paper/recipe.yaml") | {name: value}
    (tmp_path / "params" / "broken").mkdir(parents=True)
    (tmp_path / "params" / "broken" / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr("rlhfscale.study.recipes.project_root", lambda: tmp_path)
    with pytest.raises(ParamsError, match=r"^params/broken/recipe.yaml: ") as caught:
        recipes.load("broken")
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("tier", ["paper", "gpu", "gpu24"])
def test_there_are_as_many_questions_as_a_tier_asks_for(tier):
    """A generator that runs out would stop the tier in the middle of a paid run."""
    asked = {
        (task, part.num_prompts, part.prompt_seed)
        for name in ("01_policy_size", "06_best_of_n", "20_real_model")
        for spec in params.load(name, tier).specs()
        for part in spec.walk()
        if isinstance(part, chat_specs.Answers) and part.split == "eval"
        for task in part.tasks
    }
    for task, count, seed in asked:
        assert len(reasoning.questions(task, "eval", count, chat_stages._entropy("eval", seed))) == count


def test_a_plan_needs_neither_torch_nor_the_network():
    code = (
        "import socket, sys; socket.socket.connect = lambda *a: sys.exit('network');"
        "import rlhfscale.claims; from pathlib import Path;"
        "from rlhfscale.runs.store import Store; from rlhfscale.study import runner;"
        "figures = runner.load_figures('paper', [], Path('results'));"
        "todo = runner.plan(figures, Store(sys.argv[1]), 2);"
        "print(len(todo.to_run), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "no-store")]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert int(found[0]) > 100 and found[1:] == ["False", "False"]

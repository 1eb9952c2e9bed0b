"""The study's figures on a ladder of published checkpoints: here two tiny ones with different tokenizers, made locally
and trained through the grid."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

import tiny_chat
from rlhfscale.chat import specs as chat_specs
from rlhfscale.chat import stages as chat_stages
from rlhfscale.chat.answers import Answers
from rlhfscale.chat.recipe import CheckpointRecipe
from rlhfscale.claims import c01_policy_size as c01
from rlhfscale.claims import c02_reward_model_size as c02
from rlhfscale.claims import c03_training_data as c03
from rlhfscale.claims import c04_prompt_vs_response_diversity as c04
from rlhfscale.claims import c05_responses_per_prompt as c05
from rlhfscale.claims import c06_best_of_n as c06
from rlhfscale.claims import c09_algorithms as c09
from rlhfscale.claims import learning_rates, real_model
from rlhfscale.models import checkpoints
from rlhfscale.models.checkpoints import Checkpoint
from rlhfscale.models.shapes import Shape
from rlhfscale.runs import grid, worker
from rlhfscale.runs.pool import Outcome, Pool
from rlhfscale.runs.store import Store
from rlhfscale.study import artifacts, params, recipes
from rlhfscale.study.results import ResultsFolder

pytest.importorskip("reasoning_gym", reason="make setup EXTRAS=smollm2")

TASKS = ("letter_counting", "gcd")
RECIPE = {
    "ladder": "checkpoints", "precision": "bf16", "tasks": list(TASKS), "chat_tokens": 4, "max_new_tokens": 3,
    "rejection_prompts": 12, "rejection_samples": 4, "rejection_temperature": 0.7, "sft_epochs": 1, "sft_batch": 4,
    "sft_lr": 1e-3, "label_rungs": ["tiny", "small"], "label_samples": 4, "reward_prompts": 32, "reward_epochs": 1,
    "reward_batch": 8, "reward_lr": 1e-3, "ppo_updates": 2, "ppo_prompts": 4, "ppo_responses": 2, "ppo_epochs": 1,
    "ppo_policy_lr": 5e-2, "ppo_critic_lr": 1e-2, "ppo_value_coefficient": 0.1, "ppo_kl": 0.05, "ppo_eos_penalty": 1.0,
    "grpo_policy_lr": 2e-3, "grpo_kl": 0.06, "rloo_policy_lr": 3e-3, "rloo_kl": 0.07, "lora_rank": 2, "lora_alpha": 4.0,
    "eval_prompts": 12, "eval_samples": 2,
}  # fmt: skip
ONE = {"policy_rung": "tiny", "reward_model_rung": "small"}
FIGURES = {
    "00_learning_rates": {"seeds": [0, 3], "policy_rungs": ["tiny"], "reward_model_rung": "small",
                          "rates": [0.02, 0.05], "siblings": ["rloo"], "siblings_rung": "tiny",
                          "siblings_responses": 2},
    "01_policy_size": {"policy_rungs": ["tiny", "small"], "reward_model_rung": "small", "other_rungs": ["tiny"],
                       "other_seeds": [1, 2]},
    "02_reward_model_size": {"policy_rung": "tiny", "reward_model_rungs": ["tiny", "small"], "best_of": 2,
                             "num_samples": 4},
    "03_training_data": ONE | {"updates": [1, 2, 3, 4], "weak_kl": 0.005, "weak_updates": 16},
    "04_prompt_vs_response_diversity": {"reward_model_rung": "tiny", "policy_rung": "small", "labels": [64, 128],
                                        "responses": [2, 4], "batch_responses": 16, "best_of": 2, "num_samples": 4},
    "05_responses_per_prompt": ONE | {"num_prompts": 2, "responses": [1, 2, 4, 8], "grpo_responses": [2, 4],
                                      "rollouts": 8, "rollout_responses": [1, 2, 4]},
    "06_best_of_n": {"policy_rung": "tiny", "reward_model_rungs": ["tiny", "small"], "reference_rung": "small",
                     "num_prompts": 8, "num_samples": 64, "best_of": [1, 2, 4, 8, 16, 32, 64]},
    "09_algorithms": ONE | {"algorithms": ["ppo", "grpo", "rloo"], "rollouts": 8, "responses": [2, 4],
                            "equal_time_responses": 4, "equal_time_updates": [2, 3, 2]},
    "20_real_model": {"checkpoint": "small", "tasks": list(TASKS), "ppo": ["score-lora", "mixed-lora"],
                      "num_questions": 8, "updates": 2, "policy_lr": 0.001, "kl_coefficient": 0.05, "eval_prompts": 4,
                      "eval_samples": 4},
}  # fmt: skip
SHAPES = {"tiny": (16, False), "small": (32, True)}
"""Width, and whether its tokenizer is the other one."""


class Here(Pool):
    """Makes specs in this process, which knows the tiny checkpoints."""

    def __init__(self, store, workers):
        self.store, self.given = store, []

    def check(self, specs):
        pass

    def room(self):
        return 1 - len(self.given)

    def start(self, spec):
        self.given.append(spec)

    def wait(self, timeout_s):
        done, self.given = self.given, []
        return [Outcome(spec, worker.make(spec, self.store)) for spec in done]

    def stop(self):
        pass


def shape(width):
    sizes = {"layers": 2, "width": width, "feed_forward": 2 * width, "heads": 2, "kv_heads": 2}
    return Shape(**sizes, head_width=width // 2, vocab=258, tied=False)


@dataclass
class Project:
    """A project with the tier ``tiny``, and a store."""

    store: Store

    def made(self, figure, **changes):
        """A figure's parameters and artifacts."""
        P = params.load(figure, "tiny")
        P = type(P)(**P.model_dump() | changes)
        return P, grid.ensure(P.specs(), store=self.store, progress=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    (root / "pyproject.toml").write_text('[project]\nname = "rlhfscale"\n')
    tier = root / "params" / "tiny"
    tier.mkdir(parents=True)
    (tier / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for name, values in FIGURES.items():
        (tier / f"{name}.yaml").write_text(yaml.safe_dump({"recipe": "tiny", "seeds": [1, 2]} | values))
    known = {}
    for name, (width, backwards) in SHAPES.items():
        tiny_chat.save_guesser(root / name, TASKS, width, backwards=backwards)
        known[name] = Checkpoint(name=name, repo=f"local/{name}", shape=shape(width))
    with pytest.MonkeyPatch.context() as patch:
        for name, found in known.items():
            patch.setitem(checkpoints.CHECKPOINTS, name, found)
        patch.setattr(checkpoints, "download", lambda found: root / found.name)
        patch.setattr(grid, "LocalPool", Here)
        patch.chdir(root)
        recipes.load.cache_clear()
        yield Project(Store(root / "store"))
    recipes.load.cache_clear()


def finite(tables, quantities):
    """The summary by quantity, with an interval for each of these."""
    found = tables.summary.set_index("quantity")
    for name in quantities:
        assert np.isfinite(found.loc[[name], ["estimate", "ci_low", "ci_high"]].to_numpy(float)).all(), name
    assert set(tables.runs["num_params"]) <= {shape(width).num_params for width, _ in SHAPES.values()}
    return found


def verdict(tables, claim):
    (result,) = tables.claims
    assert result.claim_id == claim and result.verdict in ("reproduced", "contradicted", "inconclusive")


def test_c1_policies_of_both_sizes_against_a_reward_model_of_either(project):
    P, made = project.made("01_policy_size")
    tables = c01.measure(P, made)
    verdict(tables, "C1")
    found = finite(tables, ["sampled_exact", "gain", "gain_slope", "other_gain", "other_gain_slope"])
    assert found.loc["gain", "num_params"].tolist() == [shape(16).num_params, shape(32).num_params]
    assert len(c01.training_metrics(P, made)) == 2 * 2 * RECIPE["ppo_updates"]
    assert c01.draw(tables.runs, tables.summary)
    assert "summary.csv" in tables.save(P, {}, made, 1.0)
    assert ResultsFolder(P.figure, tier="tiny").path.joinpath("summary.csv").is_file()  # a tier's own parameters


def test_c2_reward_models_of_both_sizes_judge_one_policy(project):
    P, made = project.made("02_reward_model_size")
    tables = c02.measure(P, made)
    verdict(tables, "C2")
    finite(tables, ["pair_accuracy", "best_of_n_gain", "ppo_gain", "slope_difference"])
    assert c02.draw(tables.runs, tables.summary)


def test_c6_best_of_n_with_votes(project):
    P, made = project.made("06_best_of_n")
    tables = c06.measure(P, made)
    verdict(tables, "C6")
    found = finite(tables, ["best_of_n", "pass_at_n", "majority_vote", "early_minus_late_gain"])
    assert (found.loc["pass_at_n", "estimate"].diff().iloc[1:] >= 0).all()
    assert found.loc["majority_vote", "estimate"].nunique() > 1
    assert c06.draw(tables.runs, tables.summary)


def test_c3_training_data(project):
    P, made = project.made("03_training_data")
    tables = c03.measure(P, made)
    verdict(tables, "C3")
    finite(tables, ["sampled_exact", "first_quarter", "rest_minus_half_of_first"])
    curves = tables.extra["training.csv"]
    assert len(curves) == 2 * (4 + 16) and curves["gold"].between(0, 1).all() and (curves["gold"] == curves.exact).all()
    assert c03.draw(tables.runs, tables.summary, curves)


def test_c4_prompts_or_responses(project):
    P, made = project.made("04_prompt_vs_response_diversity")
    tables = c04.measure(P, made)
    verdict(tables, "C4")
    finite(tables, ["pair_accuracy", "best_of_n_gain", "pair_accuracy_difference"])
    half, whole = P.reward_model(64, 4, 1), P.reward_model(128, 4, 1)
    assert half.data == whole.data and whole.num_prompts is None and half.num_prompts == 4
    labels = sum(len(part.tasks) * part.num_prompts * part.num_samples for part in whole.data)
    assert labels == 128 and whole.prompts_per_batch == 4
    steps = [len(pd.read_csv(made[model] / "train.csv")) for model in (half, whole)]
    assert steps[0] < steps[1]


def test_c5_responses_per_prompt(project):
    P, made = project.made("05_responses_per_prompt")
    tables = c05.measure(P, made)
    verdict(tables, "C5")
    finite(tables, ["gain", "doubling_gain", "first_doublings"])
    assert c05.draw(tables.runs, tables.summary)


def test_c9_algorithms(project):
    P, made = project.made("09_algorithms")
    tables = c09.measure(P, made)
    verdict(tables, "C9")
    finite(tables, ["minus_ppo_in_all", "minus_ppo_in_equal_time"])
    assert set(tables.extra["training.csv"]["algorithm"]) == {"ppo", "grpo", "rloo"}
    heads = {(p.algorithm, (made[p] / "adapters" / "value_head.safetensors").exists()) for p in P.equal_rollouts()}
    assert heads == {("ppo", True), ("grpo", False), ("rloo", False)}


def test_learning_rates(project):
    P, made = project.made("00_learning_rates")
    tables = learning_rates.measure(P, made)
    assert set(tables.summary["algorithm"]) == {"ppo", "rloo"} and np.isfinite(tables.summary["estimate"]).all()


def test_the_pipeline_on_one_checkpoint(project):
    P, made = project.made("20_real_model")
    tables = real_model.measure(P, made)
    assert np.isfinite(tables.summary["estimate"]).all()
    score, mixed = (P.aligned(run, 1) for run in P.ppo)
    assert (score.score_weight, score.verifier_weight) == (1, 0) and mixed.verifier_weight == real_model.VERIFIER_WEIGHT
    assert score.shares_base and P.tuned(1) != P.tuned(2)


def test_a_policy_of_another_tokenizer_is_scored_as_its_answers_are(project):
    """What PPO is rewarded with, on the policy's tokens, against the scores that best-of-N reads."""
    P, made = project.made("06_best_of_n")
    spec, policy = P.scores("small", 1), recipes.load("tiny").policy("tiny", "small", 1)
    answers, expected = Answers.load(made[P.samples]), artifacts.read_scores(made, spec)
    tokenizer = AutoTokenizer.from_pretrained(made[P.samples.model] / "model")
    inputs = {node.key: project.store.open(node.key) for node in (*policy.parents, *spec.parents)}
    reward = chat_stages._score(policy, inputs, answers.questions, tokenizer)
    scores = (reward.score(answers.sequences(tokenizer)) * reward.std + reward.mean).reshape(expected.shape)
    assert spec.reward_model == policy.reward_model and not policy.shares_base
    assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.99 and expected.std() > 0
    np.testing.assert_allclose(scores, expected, atol=0.2 * expected.std())  # bfloat16, in other batches


def test_answers_in_another_models_tokens_say_the_same(project):
    P, made = project.made("06_best_of_n")
    sfts = (P.settings.sft(name) for name in SHAPES)
    tiny, small = (AutoTokenizer.from_pretrained(project.store.open(sft.key) / "model") for sft in sfts)
    answers = Answers.load(made[P.samples])
    reworded = answers.reworded(tiny, small)
    assert answers.reworded(tiny, tiny) is answers and not np.array_equal(reworded.ids, answers.ids)
    np.testing.assert_array_equal(reworded.texts(small), answers.texts(tiny))
    np.testing.assert_array_equal(reworded.answers(small), answers.answers(tiny))
    ends = np.take_along_axis(reworded.ids, reworded.lengths[..., None] - 1, -1)[..., 0]
    assert ((ends == small.eos_token_id) >= answers.finished).all()
    head = answers.head(2)
    assert head.num_prompts == 4 and head.tasks.tolist() == ["letter_counting"] * 2 + ["gcd"] * 2
    np.testing.assert_array_equal(head.right, answers.right[[0, 1, 4, 5]])


def test_four_bits(project):
    """A rung in 4 bits: its fine-tuning is merged into the weights in 16, and its policy and reward model run on 4."""
    pytest.importorskip("bitsandbytes")
    recipe = CheckpointRecipe(**RECIPE | {"nf4_rungs": ["small"]})
    policy = recipe.policy("small", "tiny", 1)
    assert (policy.precision, policy.base.base.precision) == ("nf4", "nf4")
    assert policy.reward_model.base.base.precision == "bf16"
    evaluated = recipe.evaluation(policy, 1)
    made = grid.ensure([evaluated, policy, policy.base, policy.base.base], store=project.store, progress=False)
    before, after = (load_file(made[spec] / "model" / "model.safetensors") for spec in (policy.base.base, policy.base))
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all("_proj" in name for name in moved)
    assert Answers.load(made[evaluated]).num_prompts == RECIPE["eval_prompts"]
    assert np.isfinite(pd.read_csv(made[policy] / "metrics.csv").to_numpy(float)).all()


def test_large_models_are_trained_alike_with_less_memory(project, monkeypatch):
    """Block inputs alone are kept and few tokens computed together; the reward model comes out the same."""
    P, made = project.made("02_reward_model_size")
    spec = P.reward_model("small", 1)
    monkeypatch.setattr(chat_specs, "LARGE", 1)
    monkeypatch.setattr(chat_specs, "LARGE_TOKENS", 256)
    store = Store(project.store.root.with_name("large"))
    inputs = {parent.key: project.store.open(parent.key) for parent in spec.parents}
    with store.create(spec) as folder:
        chat_stages.answer_reward(spec, inputs, folder)
    usual, large = (pd.read_csv(place / "train.csv") for place in (made[spec], store.open(spec.key)))
    np.testing.assert_allclose(large["loss"], usual["loss"], rtol=0.02)

"""The figure on a pretrained language model: what its notebook varies, and the specs that follow from it.

Nothing here imports torch.
"""

from typing import ClassVar, Literal, Self, cast

from pydantic import model_validator

from rlhfscale.bed.recipe import Recipe
from rlhfscale.chat import specs as chat_specs
from rlhfscale.chat.checkpoints import checkpoint
from rlhfscale.chat.recipe import LABELS, CheckpointRecipe
from rlhfscale.runs.spec import Spec
from rlhfscale.study.figures import StudyFigure
from rlhfscale.study.params import field

Run = Literal["score-lora", "mixed-lora", "score-qlora", "mixed-qlora"]
"""A PPO run: whether the reward model's score alone rewards it or the verifier too, and whether its base is in bfloat16
(LoRA) or in 4 bits (QLoRA)."""
BEFORE = "chat", "tuned"
"""Stages before PPO; each run of PPO is a further one."""
SCORE_WEIGHT, VERIFIER_WEIGHT = 0.5, 2.0
"""Of mixed runs: the reward of a standard deviation of the score, and of a right answer."""
ON_CPU = {
    "ladder": "checkpoints",
    "precision": None,
    "chat_tokens": 32,
    "max_new_tokens": 12,
    "rejection_samples": 4,
    "rejection_temperature": 0.7,
    "sft_epochs": 2,
    "sft_batch": 16,
    "sft_lr": 5e-4,
    "label_samples": 8,
    "reward_epochs": 2,
    "reward_batch": 8,
    "reward_lr": 3e-4,
    "ppo_prompts": 16,
    "ppo_responses": 8,
    "ppo_epochs": 2,
    "ppo_critic_lr": 1e-3,
    "ppo_value_coefficient": 0.1,
    "ppo_eos_penalty": 1.0,
    "grpo_policy_lr": 1e-4,
    "grpo_kl": 0.05,
    "rloo_policy_lr": 1e-4,
    "rloo_kl": 0.05,
    "lora_rank": 16,
    "lora_alpha": 32.0,
}
"""What the figure holds fixed in tiers whose own ladder is trained from scratch; the rates were chosen with seed 0,
which is in no figure. In tiers of published checkpoints it is made with their recipe."""


class RealModel(StudyFigure):
    """The whole pipeline on a published chat model: rejection sampling, fine-tuning, reward model, PPO."""

    figure: ClassVar[str] = "20_real_model"
    title: ClassVar[str] = "The pipeline on a published language model"
    claims: ClassVar[tuple[str, ...]] = ()

    checkpoint: str = field(role="fixed", doc="published chat model, see rlhfscale.chat.checkpoints")
    tasks: tuple[str, ...] = field(role="fixed", min_length=1, doc="reasoning-gym tasks, see tasks.reasoning")
    ppo: tuple[Run, ...] = field(
        role="scientific", min_length=1, doc="PPO by the score, or by score and verifier; with LoRA or QLoRA"
    )
    num_questions: int = field(role="fixed", ge=1, doc="questions of each task, for rejection sampling and for labels")
    updates: int = field(role="fixed", ge=1, doc="PPO updates")
    policy_lr: float = field(role="nuisance", gt=0, doc="AdamW rate of the policy's adapter in PPO")
    kl_coefficient: float = field(role="nuisance", ge=0, doc="standard deviations of the score for a nat")
    eval_prompts: int = field(role="fixed", ge=2, doc="held-out questions of each task")
    eval_samples: int = field(role="fixed", ge=2, doc="sampled responses to each")

    @model_validator(mode="after")
    def _check(self) -> Self:
        checkpoint(self.checkpoint)
        return self

    @property
    def settings(self) -> CheckpointRecipe:
        """The tier's recipe, with one rung and what the figure's own parameters say."""
        recipe = Recipe.load(self.recipe)
        fixed = recipe.model_dump() if isinstance(recipe, CheckpointRecipe) else ON_CPU
        own = {
            "tasks": self.tasks,
            "label_rungs": (self.checkpoint,),
            "rejection_prompts": self.num_questions * len(self.tasks),
            "reward_prompts": self.num_questions * len(self.tasks),
            "ppo_updates": self.updates,
            "ppo_policy_lr": self.policy_lr,
            "ppo_kl": self.kl_coefficient,
            "eval_prompts": self.eval_prompts * len(self.tasks),
            "eval_samples": self.eval_samples,
        }
        return CheckpointRecipe(**fixed | own)

    @property
    def best_of(self) -> tuple[int, ...]:
        """Values of N: powers of two up to eval_samples."""
        return tuple(2**power for power in range(self.eval_samples.bit_length()))

    @property
    def stages(self) -> tuple[str, ...]:
        """In the order of the pipeline."""
        return (*BEFORE, *self.ppo)

    def tuned(self, seed: int) -> chat_specs.Tuned:
        return self.settings.sft(self.checkpoint, seed)

    def reward_model(self, seed: int) -> chat_specs.AnswerReward:
        recipe, tuned = self.settings, self.tuned(seed)
        data = recipe.answers(tuned, "train", self.num_questions, recipe.label_samples, 10 * seed + LABELS, seed)
        return recipe.reward_model_of(tuned, (data,), (self.evaluation("tuned", seed),), seed)

    def aligned(self, run: Run, seed: int) -> chat_specs.Aligned:
        reward, _, adapter = run.partition("-")
        mixed = {"score_weight": SCORE_WEIGHT, "verifier_weight": VERIFIER_WEIGHT}
        return self.settings.policy_of(self.tuned(seed), self.reward_model(seed), seed).changed(
            **(mixed if reward == "mixed" else {}), precision="nf4" if adapter == "qlora" else "bf16"
        )

    def model(self, stage: str, seed: int) -> chat_specs.Chat | chat_specs.Tuned | chat_specs.Aligned:
        if stage == "chat":
            return self.settings.chat(self.checkpoint)
        return self.tuned(seed) if stage == "tuned" else self.aligned(cast(Run, stage), seed)

    def evaluation(self, stage: str, seed: int) -> chat_specs.Answers:
        """Sampled answers to the held-out questions, which are the same for every seed; so are the chat model's."""
        seed = self.seeds[0] if stage == "chat" else seed
        return self.settings.evaluation(self.model(stage, seed), seed)

    def greedy(self, stage: str, seed: int) -> chat_specs.Answers:
        return self.evaluation(stage, seed).changed(num_samples=1, temperature=0.0)

    def scores(self, seed: int) -> chat_specs.AnswerScores:
        return self.settings.scores(self.evaluation("tuned", seed), self.reward_model(seed))

    def specs(self) -> tuple[Spec, ...]:
        found: list[Spec] = []
        for seed in self.seeds:
            for stage in self.stages:
                found += [self.evaluation(stage, seed), self.greedy(stage, seed)]
            found.append(self.scores(seed))
        aligned = [self.aligned(run, seed) for seed in self.seeds for run in self.ppo]
        rewards = [spec for seed in self.seeds for spec in (self.tuned(seed), self.reward_model(seed))]
        return tuple(dict.fromkeys([*found, *aligned, *rewards]))

"""The figure on a pretrained language model: what its notebook varies, and the specs that follow from it.

Nothing here imports torch.
"""

from typing import ClassVar, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhfscale import language
from rlhfscale.checkpoints import checkpoint
from rlhfscale.figures import StudyFigure
from rlhfscale.params import field
from rlhfscale.spec import Spec

Run = Literal["score-lora", "mixed-lora", "score-qlora", "mixed-qlora"]
"""A PPO run: whether the reward model's score alone rewards it or the verifier too, and whether its base is in bfloat16
(LoRA) or in 4 bits (QLoRA)."""
BEFORE = "chat", "tuned"
"""Stages before PPO; each run of PPO is a further one."""
EVALUATION, LABELS, REJECTION, POLICY = 1, 2, 3, 4
"""Seeds of the held-out questions, and kinds of the training questions of each seed."""


class Fixed(BaseModel):
    """What the figure holds fixed; the rates were chosen with seed 0, which is in no figure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chat_tokens: int = Field(32, description="tokens at which a response of the chat model is cut")
    max_new_tokens: int = Field(12, description="tokens at which a response of all others is cut")
    rejection_samples: int = Field(4, description="responses to each question in rejection sampling")
    rejection_temperature: float = Field(0.7, description="their temperature; all others are sampled at 1")
    tuned_epochs: int = Field(2, description="passes over the accepted responses")
    tuned_batch: int = Field(16, description="of them in a step")
    tuned_lr: float = Field(5e-4, description="AdamW rate of supervised fine-tuning")
    label_samples: int = Field(8, description="labelled responses to each question")
    reward_epochs: int = Field(2, description="passes over them")
    reward_batch: int = Field(8, description="questions in a step")
    reward_lr: float = Field(3e-4, description="AdamW rate of the reward model")
    prompts_per_update: int = Field(16, description="questions in a PPO update")
    responses_per_prompt: int = Field(8, description="responses to each")
    ppo_epochs: int = Field(2, description="passes over an update's responses")
    critic_lr: float = Field(1e-3, description="AdamW rate of the value head")
    score_weight: float = Field(0.5, description="reward of a standard deviation of the score, in mixed runs")
    verifier_weight: float = Field(2.0, description="reward of a right answer, in mixed runs")
    value_coefficient: float = Field(0.1, description="weight of the value loss")
    missing_eos_penalty: float = Field(1.0, description="subtracted from the score of a response that never ended")
    lora_rank: int = Field(16, description="of every adapter")
    lora_alpha: float = Field(32.0, description="LoRA's scale numerator")


FIXED = Fixed()


class RealModel(StudyFigure):
    """The whole pipeline on a published chat model: rejection sampling, fine-tuning, reward model, PPO."""

    figure: ClassVar[str] = "20_real_model"
    title: ClassVar[str] = "The pipeline on a published language model"
    claims: ClassVar[tuple[str, ...]] = ()

    checkpoint: str = field(role="fixed", doc="published chat model, see rlhfscale.checkpoints")
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
    def settings(self) -> "Fixed":
        return FIXED

    @property
    def best_of(self) -> tuple[int, ...]:
        """Values of N: powers of two up to eval_samples."""
        return tuple(2**power for power in range(self.eval_samples.bit_length()))

    @property
    def stages(self) -> tuple[str, ...]:
        """In the order of the pipeline."""
        return (*BEFORE, *self.ppo)

    @property
    def chat(self) -> language.Chat:
        return language.Chat(checkpoint=self.checkpoint)

    def tuned(self, seed: int) -> language.Tuned:
        data = self._answers(self.chat, "train", self.num_questions, FIXED.rejection_samples, seed, REJECTION)
        return language.Tuned(
            base=self.chat,
            data=data.changed(temperature=FIXED.rejection_temperature),
            epochs=FIXED.tuned_epochs,
            batch_size=FIXED.tuned_batch,
            lr=FIXED.tuned_lr,
            lora_rank=FIXED.lora_rank,
            seed=seed,
        )

    def reward_model(self, seed: int) -> language.AnswerReward:
        tuned = self.tuned(seed)
        return language.AnswerReward(
            base=tuned,
            data=self._answers(tuned, "train", self.num_questions, FIXED.label_samples, seed, LABELS),
            held_out=self.evaluation("tuned", seed),
            epochs=FIXED.reward_epochs,
            prompts_per_batch=FIXED.reward_batch,
            lr=FIXED.reward_lr,
            lora_rank=FIXED.lora_rank,
            seed=seed,
        )

    def aligned(self, run: Run, seed: int) -> language.Aligned:
        reward, _, adapter = run.partition("-")
        return language.Aligned(
            base=self.tuned(seed),
            reward_model=self.reward_model(seed),
            score_weight=1.0 if reward == "score" else FIXED.score_weight,
            verifier_weight=0.0 if reward == "score" else FIXED.verifier_weight,
            precision="nf4" if adapter == "qlora" else "bf16",
            tasks=self.tasks,
            num_updates=self.updates,
            epochs=FIXED.ppo_epochs,
            policy_lr=self.policy_lr,
            kl_coefficient=self.kl_coefficient,
            seed=seed,
            **FIXED.model_dump(include=language.Aligned.model_fields.keys() - {"score_weight", "verifier_weight"}),
        )

    def model(self, stage: str, seed: int) -> language.Chat | language.Tuned | language.Aligned:
        if stage == "chat":
            return self.chat
        return self.tuned(seed) if stage == "tuned" else self.aligned(cast(Run, stage), seed)

    def evaluation(self, stage: str, seed: int) -> language.Answers:
        """Sampled answers to the held-out questions, which are the same for every seed; so are the chat model's."""
        seed = self.seeds[0] if stage == "chat" else seed
        return self._answers(self.model(stage, seed), "eval", self.eval_prompts, self.eval_samples, seed, EVALUATION)

    def greedy(self, stage: str, seed: int) -> language.Answers:
        return self.evaluation(stage, seed).changed(num_samples=1, temperature=0.0)

    def scores(self, seed: int) -> language.AnswerScores:
        return language.AnswerScores(answers=self.evaluation("tuned", seed), reward_model=self.reward_model(seed))

    def _answers(self, model, split, num_prompts: int, num_samples: int, seed: int, kind: int) -> language.Answers:
        return language.Answers(
            model=model,
            split=split,
            tasks=self.tasks,
            num_prompts=num_prompts,
            num_samples=num_samples,
            max_new_tokens=FIXED.chat_tokens if model == self.chat else FIXED.max_new_tokens,
            temperature=1.0,
            prompt_seed=EVALUATION if kind == EVALUATION else 10 * seed + kind,
            seed=seed,
        )

    def specs(self) -> tuple[Spec, ...]:
        found: list[Spec] = []
        for seed in self.seeds:
            for stage in self.stages:
                found += [self.evaluation(stage, seed), self.greedy(stage, seed)]
            found.append(self.scores(seed))
        aligned = [self.aligned(run, seed) for seed in self.seeds for run in self.ppo]
        rewards = [spec for seed in self.seeds for spec in (self.tuned(seed), self.reward_model(seed))]
        return tuple(dict.fromkeys([*found, *aligned, *rewards]))

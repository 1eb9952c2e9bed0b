"""The recipe of a tier whose ladder is published chat models: it describes each role by a spec of `chat.specs`.

The figures ask either recipe for an SFT model, a reward model, a policy or responses of a rung by name, and neither
they nor their notebooks know which ladder it is on. Nothing here imports torch.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhfscale.chat import reasoning
from rlhfscale.chat import specs as chat_specs
from rlhfscale.models.checkpoints import checkpoint
from rlhfscale.runs.policy_spec import Algorithm
from rlhfscale.runs.recipe import RecipeBase

EVALUATION, LABELS, REJECTION = 1, 2, 3
"""Seed of the held-out questions, and kinds of the training questions of each seed."""
CHOSEN_ON = 0
"""Seed of the held-out questions of reward models and of learning rates, on which no verdict is measured."""


class CheckpointRecipe(RecipeBase):
    """Fixed and nuisance settings of a tier, the same for every rung. Questions are counted over all tasks."""

    find = staticmethod(checkpoint)

    ladder: Literal["checkpoints"] = Field(description="rungs are published models, see rlhfscale.models.checkpoints")
    precision: chat_specs.Precision | None = Field(description="of every base; without one, bfloat16 on a CPU")
    nf4_rungs: tuple[str, ...] = Field((), description="rungs that are held in 4 bits whatever the precision")
    tasks: tuple[str, ...] = Field(min_length=1, description="reasoning-gym tasks, see tasks.reasoning")
    chat_tokens: int = Field(ge=1, description="tokens at which a response of a chat model is cut")
    max_new_tokens: int = Field(ge=1, description="tokens at which a response of all others is cut")
    rejection_prompts: int = Field(ge=1, description="questions of rejection sampling")
    rejection_samples: int = Field(ge=1, description="responses to each of them")
    rejection_temperature: float = Field(gt=0, description="their temperature; all others are sampled at 1")
    sft_epochs: int = Field(ge=1, description="passes over the accepted responses")
    sft_batch: int = Field(ge=1, description="of them in a step")
    sft_lr: float = Field(gt=0, description="AdamW rate of supervised fine-tuning")
    label_rungs: tuple[str, ...] = Field(min_length=1, description="SFT rungs whose responses are labelled")
    label_samples: int = Field(ge=2, description="labelled responses to each question")
    reward_prompts: int = Field(ge=1, description="labelled questions of a reward model, over all label rungs")
    reward_epochs: int = Field(ge=1, description="passes over them")
    reward_batch: int = Field(ge=1, description="questions in a batch")
    reward_lr: float = Field(gt=0, description="AdamW rate of the reward model")
    ppo_updates: int = Field(ge=1, description="PPO updates")
    ppo_prompts: int = Field(ge=1, description="questions in an update")
    ppo_responses: int = Field(ge=1, description="responses to each of them")
    ppo_epochs: int = Field(ge=1, description="passes over an update's roll-outs, in one optimiser step each")
    ppo_policy_lr: float = Field(gt=0, description="AdamW rate of the policy's adapter")
    ppo_policy_lr_of: dict[str, float] = Field({}, description="the same of rungs that have a rate of their own")
    ppo_critic_lr: float = Field(gt=0, description="AdamW rate of the value head on the policy's trunk")
    ppo_value_coefficient: float = Field(gt=0, description="weight of the value loss")
    ppo_kl: float = Field(ge=0, description="KL coefficient, in standard deviations of the score for a nat")
    ppo_eos_penalty: float = Field(ge=0, description="subtracted from the score of a response that never ended")
    grpo_policy_lr: float = Field(gt=0, description="ppo_policy_lr of GRPO, which takes all else from PPO")
    grpo_kl: float = Field(ge=0, description="ppo_kl of GRPO, in standard deviations within a group for a nat")
    rloo_policy_lr: float = Field(gt=0, description="ppo_policy_lr of RLOO, which takes all else from PPO")
    rloo_kl: float = Field(ge=0, description="ppo_kl of RLOO")
    lora_rank: int = Field(ge=1, description="of every adapter")
    lora_alpha: float = Field(gt=0, description="LoRA's scale numerator in policy training")
    eval_prompts: int = Field(ge=2, description="held-out questions")
    eval_samples: int = Field(ge=1, description="sampled responses to each of them")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_rungs("nf4_rungs", self.nf4_rungs)
        if unknown := [task for task in self.tasks if task not in reasoning.TASKS]:
            raise ValueError(f"tasks: {unknown} are not among {', '.join(reasoning.TASKS)}")
        for name in ("rejection_prompts", "eval_prompts"):
            self._by_task(name, getattr(self, name))
        if self.reward_prompts % self.label_parts:
            raise ValueError(
                f"reward_prompts: {self.reward_prompts} questions do not share out to {len(self.label_rungs)} label"
                f" rungs and {len(self.tasks)} tasks"
            )
        return self

    def _by_task(self, name: str, count: int) -> int:
        """The questions of each task. Raises ValueError, naming the field, where they do not share out."""
        if count % len(self.tasks):
            raise ValueError(f"{name}: {count} questions do not share out to {len(self.tasks)} tasks")
        return count // len(self.tasks)

    @property
    def label_parts(self) -> int:
        """Parts of equal size that the labelled questions of a reward model come in: of each label rung and task."""
        return len(self.label_rungs) * len(self.tasks)

    def precision_of(self, rung: str) -> chat_specs.Precision | None:
        return "nf4" if rung in self.nf4_rungs else self.precision

    def chat(self, rung: str) -> chat_specs.Chat:
        return chat_specs.Chat(checkpoint=rung, precision=self.precision_of(rung))

    def sft(self, rung: str, seed: int = 0) -> chat_specs.Tuned:
        """A rung fine-tuned on its own right answers: what a policy starts from."""
        chat = self.chat(rung)
        count = self._by_task("rejection_prompts", self.rejection_prompts)
        data = self.answers(chat, "train", count, self.rejection_samples, 10 * seed + REJECTION, seed)
        return chat_specs.Tuned(
            base=chat,
            data=data.changed(temperature=self.rejection_temperature),
            epochs=self.sft_epochs,
            batch_size=self.sft_batch,
            lr=self.sft_lr,
            lora_rank=self.lora_rank,
            seed=seed,
        )

    def start(self, rung: str, seed: int) -> chat_specs.Tuned:
        """What the policies and reward models of every seed start from: a published model was pretrained once."""
        return self.sft(rung)

    def reward_model(
        self,
        rung: str,
        seed: int,
        num_prompts: int | None = None,
        *,
        labelled_prompts: int | None = None,
        responses: int | None = None,
        prompts_per_batch: int | None = None,
    ) -> chat_specs.AnswerReward:
        """As `Recipe.reward_model`; it may be of another size than the policy and than the models that answered."""
        labelled = (labelled_prompts or self.reward_prompts) // self.label_parts
        learnt = (num_prompts or self.reward_prompts) // self.label_parts
        count = responses or self.label_samples
        tuned = [self.sft(name) for name in self.label_rungs]
        held_out = self._by_task("eval_prompts", self.eval_prompts)
        return self.reward_model_of(
            self.sft(rung),
            tuple(self.answers(model, "train", labelled, count, 10 * seed + LABELS, seed) for model in tuned),
            tuple(self.answers(model, "eval", held_out, self.label_samples, CHOSEN_ON, 0) for model in tuned),
            seed,
        ).changed(
            num_prompts=None if learnt == labelled else learnt,
            prompts_per_batch=prompts_per_batch or self.reward_batch,
        )

    def reward_model_of(
        self,
        base: chat_specs.Tuned,
        data: tuple[chat_specs.Answers, ...],
        held_out: tuple[chat_specs.Answers, ...],
        seed: int,
    ) -> chat_specs.AnswerReward:
        return chat_specs.AnswerReward(
            base=base,
            data=data,
            held_out=held_out,
            epochs=self.reward_epochs,
            prompts_per_batch=self.reward_batch,
            lr=self.reward_lr,
            lora_rank=self.lora_rank,
            seed=seed,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in a pass over an update's roll-outs, the same whatever their number."""
        return 1

    def policy(
        self,
        rung: str,
        reward_rung: str,
        seed: int,
        *,
        algorithm: Algorithm = "ppo",
        prompts: int | None = None,
        responses: int | None = None,
    ) -> chat_specs.Aligned:
        """As `Recipe.policy`: trained against the reward model of the same seed, by its score alone."""
        counts = {"prompts": prompts, "responses": responses}
        return self.policy_of(self.sft(rung), self.reward_model(reward_rung, seed), seed, algorithm=algorithm, **counts)

    def policy_of(
        self,
        base: chat_specs.Tuned,
        reward_model: chat_specs.AnswerReward,
        seed: int,
        *,
        algorithm: Algorithm = "ppo",
        prompts: int | None = None,
        responses: int | None = None,
    ) -> chat_specs.Aligned:
        critic = {"critic_lr": self.ppo_critic_lr, "value_coefficient": self.ppo_value_coefficient}
        return chat_specs.Aligned(
            base=base,
            reward_model=reward_model,
            algorithm=algorithm,
            **(critic if algorithm == "ppo" else {}),
            score_weight=1.0,
            verifier_weight=0.0,
            precision=base.base.precision or "bf16",
            tasks=self.tasks,
            num_updates=self.ppo_updates,
            prompts_per_update=prompts or self.ppo_prompts,
            responses_per_prompt=responses or self.ppo_responses,
            epochs=self.ppo_epochs,
            max_new_tokens=self.max_new_tokens,
            policy_lr=self.policy_lr(algorithm, base.checkpoint),
            kl_coefficient=getattr(self, f"{algorithm}_kl"),
            missing_eos_penalty=self.ppo_eos_penalty,
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
            seed=seed,
        )

    def evaluation(
        self, model: chat_specs.Chat | chat_specs.Tuned | chat_specs.Aligned, seed: int, *, greedy: bool = False
    ) -> chat_specs.Answers:
        """Responses to the held-out questions, the same for every model and seed."""
        samples, seed = (1, 0) if greedy else (self.eval_samples, seed)
        count = self._by_task("eval_prompts", self.eval_prompts)
        found = self.answers(model, "eval", count, samples, EVALUATION, seed)
        return found.changed(temperature=0.0) if greedy else found

    def many_samples(self, rung: str, num_prompts: int, num_samples: int) -> chat_specs.Answers:
        """Many responses of an SFT rung to each held-out question, for best-of-N."""
        count = self._by_task("num_prompts", num_prompts)
        return self.evaluation(self.sft(rung), 0).changed(num_prompts=count, num_samples=num_samples)

    def scores(self, samples: chat_specs.Answers, reward_model: chat_specs.AnswerReward) -> chat_specs.AnswerScores:
        return chat_specs.AnswerScores(answers=samples, reward_model=reward_model)

    def answers(
        self,
        model: chat_specs.Chat | chat_specs.Tuned | chat_specs.Aligned,
        split: Literal["train", "eval"],
        num_prompts: int,
        num_samples: int,
        prompt_seed: int,
        seed: int,
    ) -> chat_specs.Answers:
        """Responses to ``num_prompts`` questions of each task."""
        return chat_specs.Answers(
            model=model,
            split=split,
            tasks=self.tasks,
            num_prompts=num_prompts,
            num_samples=num_samples,
            max_new_tokens=self.chat_tokens if isinstance(model, chat_specs.Chat) else self.max_new_tokens,
            temperature=1.0,
            prompt_seed=prompt_seed,
            seed=seed,
        )

"""The recipe of the bed: what the figures of a tier hold fixed, and how it describes each role by a spec.

`study.recipes` reads it from ``params/<tier>/recipe.yaml``. `chat.recipe` has its sibling for published models, which
describes the same roles: an SFT model, a reward model, a policy, responses, scores.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhfscale.bed import ladder, specs, tasks
from rlhfscale.runs.policy_spec import Algorithm
from rlhfscale.runs.recipe import RecipeBase

FAMILIES = tuple(tasks.FAMILIES)
LABEL_STREAMS = 1000
"""Streams of labelled prompts of each seed, one for each labeller."""


class Recipe(RecipeBase):
    """Fixed and nuisance settings of a tier. Rates scale with one over the rung's width where the name says so."""

    find = staticmethod(ladder.rung)

    pretrain_documents: int = Field(ge=64, description="demonstrations in pretraining, each seen once")
    pretrain_slip: float = Field(ge=0, lt=1, description="probability that a demonstrated token is a slip")
    pretrain_batch: int = Field(ge=1, description="documents in a batch")
    pretrain_lr_width: float = Field(gt=0, description="AdamW rate of embeddings and norms, times the width")
    pretrain_muon_lr: float = Field(gt=0, description="Muon rate of the matrices")
    num_bases: int = Field(ge=1, description="pretraining seeds of each rung, which runs take in turn")
    num_bases_of: dict[str, int] = Field(description="the same of rungs that have another number of them")
    sft_documents: int = Field(ge=64, description="demonstrations in supervised fine-tuning")
    sft_lr_width: float = Field(gt=0, description="as in pretraining")
    sft_muon_lr: float = Field(gt=0, description="as in pretraining")
    label_rungs: tuple[str, ...] = Field(
        min_length=1, description="SFT rungs whose responses are labelled, of every base"
    )
    label_samples: int = Field(ge=2, description="labelled responses to each prompt")
    reward_prompts: int = Field(ge=1, description="labelled prompts of a reward model, of all labellers")
    reward_epochs: int = Field(ge=1, description="passes over them")
    reward_batch: int = Field(ge=1, description="prompts in a batch")
    reward_lr_width: float = Field(gt=0, description="AdamW rate, times the width")
    reward_muon_lr: float = Field(gt=0, description="Muon rate of the matrices")
    reward_lora_rank: int = Field(ge=0, description="0 trains all weights of the reward model")
    reward_loss: Literal["pairs", "both"] = Field(description="comparisons alone, or with right and wrong: multi-task")
    reward_readout: Literal["last", "sum"] = Field(description="score read at the last token, or summed over all")
    ppo_updates: int = Field(ge=1, description="PPO updates")
    ppo_prompts: int = Field(ge=1, description="prompts in an update")
    ppo_responses: int = Field(ge=1, description="responses to each of them")
    ppo_epochs: int = Field(ge=1, description="passes over an update's roll-outs")
    ppo_minibatch: int = Field(ge=1, description="roll-outs in an optimiser step")
    ppo_critic: Literal["trunk", "separate"] = Field(
        description="value head on the policy's trunk or on an own adapter"
    )
    ppo_policy_lr: float = Field(gt=0, description="AdamW rate of the policy's adapter")
    ppo_policy_lr_of: dict[str, float] = Field(description="the same of rungs that have a rate of their own")
    ppo_critic_lr: float = Field(gt=0, description="AdamW rate of the value head, and of a separate critic's adapter")
    ppo_value_coefficient: float = Field(gt=0, description="weight of the value loss where the trunk is shared")
    ppo_kl: float = Field(ge=0, description="KL coefficient, in standard deviations of the score for a nat")
    ppo_clip: float = Field(gt=0, description="clipping range of the ratio")
    ppo_value_clip: float = Field(gt=0, description="clipping range of the value")
    ppo_gamma: float = Field(gt=0, le=1, description="discount")
    ppo_lambda: float = Field(ge=0, le=1, description="lambda of GAE")
    ppo_max_grad_norm: float = Field(gt=0, description="gradient clipping")
    ppo_eos_penalty: float = Field(ge=0, description="subtracted from the score of a response that never ended")
    ppo_lora_rank: int = Field(ge=1, description="rank of the policy's and the critic's adapter")
    ppo_lora_alpha: float = Field(gt=0, description="LoRA's scale numerator")
    grpo_policy_lr: float = Field(
        gt=0, description="ppo_policy_lr of GRPO, which takes all else, but a critic, from PPO"
    )
    grpo_kl: float = Field(ge=0, description="ppo_kl of GRPO, in standard deviations within a group for a nat")
    rloo_policy_lr: float = Field(
        gt=0, description="ppo_policy_lr of RLOO, which takes all else, but a critic, from PPO"
    )
    rloo_kl: float = Field(ge=0, description="ppo_kl of RLOO")
    eval_prompts: int = Field(ge=2, description="held-out prompts")
    eval_samples: int = Field(ge=1, description="sampled responses to each held-out prompt")

    @model_validator(mode="after")
    def _bases(self) -> Self:
        self.check_rungs("num_bases_of", tuple(self.num_bases_of))
        if bad := [rung for rung, count in self.num_bases_of.items() if count < 1]:
            raise ValueError(f"num_bases_of: there must be at least 1 base, also of {', '.join(bad)}")
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> Self:
        rollouts = self.ppo_prompts * self.ppo_responses
        if rollouts % self.ppo_minibatch:
            raise ValueError(
                f"ppo_minibatch: {self.ppo_minibatch} does not divide the {rollouts} roll-outs of an update"
            )
        return self

    def base_of(self, rung: str, seed: int) -> int:
        """The pretraining seed, from 1, that a run's seed starts from: the bases of a rung take turns."""
        return 1 + seed % self.count_bases(rung)

    def count_bases(self, rung: str) -> int:
        return self.num_bases_of.get(rung, self.num_bases)

    def pretrain(self, rung: str, base: int = 1) -> specs.Pretrain:
        return specs.Pretrain(
            rung=rung,
            num_documents=self.pretrain_documents,
            slip=self.pretrain_slip,
            batch_size=self.pretrain_batch,
            lr=self.pretrain_lr_width / ladder.rung(rung).width,
            muon_lr=self.pretrain_muon_lr,
            seed=base,
        )

    def start(self, rung: str, seed: int) -> specs.SFT:
        """The SFT model that the policies and reward models of a seed start from."""
        return self.sft(rung, self.base_of(rung, seed))

    def sft(self, rung: str, base: int = 1) -> specs.SFT:
        """A pretrained rung after supervised fine-tuning; ``base`` is the seed of both."""
        return specs.SFT(
            base=self.pretrain(rung, base),
            families=FAMILIES,
            num_documents=self.sft_documents,
            slip=self.pretrain_slip,
            batch_size=self.pretrain_batch,
            lr=self.sft_lr_width / ladder.rung(rung).width,
            muon_lr=self.sft_muon_lr,
            seed=base,
        )

    def reward_model(
        self,
        rung: str,
        seed: int,
        num_prompts: int | None = None,
        *,
        labelled_prompts: int | None = None,
        responses: int | None = None,
        prompts_per_batch: int | None = None,
    ) -> specs.RewardModel:
        """A reward model of a rung; each seed has labelled prompts and responses of its own.

        Args:
            num_prompts: of the labelled prompts, the first so many are learnt from; by default the recipe's.
            labelled_prompts: prompts that are labelled, shared out to the label rungs; by default the recipe's.
            responses, prompts_per_batch: labelled responses to each, and prompts in a batch; by default the recipe's.
        """
        share = -(-(labelled_prompts or self.reward_prompts) // self.label_parts)
        count = responses or self.label_samples
        return specs.RewardModel(
            base=self.start(rung, seed),
            data=tuple(self._labels(part, share, count, seed) for part in range(self.label_parts)),
            held_out=tuple(self._held_out(name) for name in self.label_rungs),
            num_prompts=num_prompts or self.reward_prompts,
            epochs=self.reward_epochs,
            prompts_per_batch=prompts_per_batch or self.reward_batch,
            lr=self.reward_lr_width / ladder.rung(rung).width,
            muon_lr=self.reward_muon_lr,
            lora_rank=self.reward_lora_rank,
            loss=self.reward_loss,
            readout=self.reward_readout,
            seed=seed,
        )

    @property
    def labellers(self) -> tuple[tuple[str, int], ...]:
        """Rung and base of the SFT models whose responses are labelled: a reward model sees the errors of them all."""
        return tuple((rung, 1 + base) for rung in self.label_rungs for base in range(self.count_bases(rung)))

    @property
    def label_parts(self) -> int:
        """Parts of equal size that the labelled prompts of a reward model come in: one of each labeller."""
        return len(self.labellers)

    def _labels(self, part: int, num_prompts: int, num_samples: int, seed: int) -> specs.Samples:
        """Every labeller answers prompts of its own: reward models are limited by the number of different ones."""
        rung, base = self.labellers[part]
        return specs.Samples(
            model=self.sft(rung, base),
            split="train",
            families=FAMILIES,
            num_prompts=num_prompts,
            num_samples=num_samples,
            temperature=1.0,
            prompt_seed=LABEL_STREAMS * seed + part,
            seed=seed,
        )

    def _held_out(self, rung: str) -> specs.Samples:
        """The responses on which every reward model's accuracy is measured; the label rungs answer the same prompts."""
        samples = self.evaluation(self.sft(rung), 0)
        return samples.changed(num_samples=self.label_samples, prompt_seed=0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in a pass over an update's roll-outs, the same whatever their number."""
        return self.ppo_prompts * self.ppo_responses // self.ppo_minibatch

    def policy(
        self,
        rung: str,
        reward_rung: str,
        seed: int,
        *,
        algorithm: Algorithm = "ppo",
        prompts: int | None = None,
        responses: int | None = None,
    ) -> specs.Policy:
        """A policy of a rung trained by ``algorithm`` against the reward model of the same seed.

        Args:
            prompts, responses: prompts in an update and responses to each, in place of the recipe's. Minibatches grow
                or shrink with the roll-outs, so that the number of optimiser steps stays.
        """
        prompts = self.ppo_prompts if prompts is None else prompts
        responses = self.ppo_responses if responses is None else responses
        critic = {
            "critic": self.ppo_critic,
            "critic_lr": self.ppo_critic_lr,
            "value_coefficient": self.ppo_value_coefficient,
            "value_clip": self.ppo_value_clip,
            "gamma": self.ppo_gamma,
            "lam": self.ppo_lambda,
        }
        return specs.Policy(
            sft=self.start(rung, seed),
            reward_model=self.reward_model(reward_rung, seed),
            algorithm=algorithm,
            **(critic if algorithm == "ppo" else {}),
            num_updates=self.ppo_updates,
            prompts_per_update=prompts,
            responses_per_prompt=responses,
            epochs=self.ppo_epochs,
            minibatch_size=max(1, prompts * responses // self.steps_per_epoch),
            policy_lr=self.policy_lr(algorithm, rung),
            kl_coefficient=getattr(self, f"{algorithm}_kl"),
            clip=self.ppo_clip,
            temperature=1.0,
            max_grad_norm=self.ppo_max_grad_norm,
            missing_eos_penalty=self.ppo_eos_penalty,
            lora_rank=self.ppo_lora_rank,
            lora_alpha=self.ppo_lora_alpha,
            seed=seed,
        )

    def evaluation(self, model: specs.SFT | specs.Policy, seed: int, *, greedy: bool = False) -> specs.Samples:
        """Responses to the held-out prompts, the same for every model and seed.

        They are not the held-out prompts of the reward models (`prompt_seed` 0), on which the recipe was chosen.
        """
        return specs.Samples(
            model=model,
            split="eval",
            families=FAMILIES,
            num_prompts=self.eval_prompts,
            num_samples=1 if greedy else self.eval_samples,
            temperature=0.0 if greedy else 1.0,
            prompt_seed=2,
            seed=0 if greedy else seed,
        )

    def many_samples(self, rung: str, num_prompts: int, num_samples: int) -> specs.Samples:
        """Many responses of an SFT rung to each held-out prompt, for best-of-N."""
        samples = self.evaluation(self.sft(rung), 0)
        return samples.changed(num_prompts=num_prompts, num_samples=num_samples)

    def scores(self, samples: specs.Samples, reward_model: specs.AnyRewardModel) -> specs.Scores:
        return specs.Scores(samples=samples, reward_model=reward_model)

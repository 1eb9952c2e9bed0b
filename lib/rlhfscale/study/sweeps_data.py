"""Parameters of the figures on data, of the policy (C3) and of the reward model (C4, C7), and their specs."""

from itertools import product
from typing import ClassVar, Self

from pydantic import model_validator

from rlhfscale.bed import specs
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.fits import MIN_POINTS
from rlhfscale.study import roles
from rlhfscale.study.figures import StudyFigure
from rlhfscale.study.params import field
from rlhfscale.study.sweeps import OnePolicy


class TrainingData(OnePolicy):
    """C3: accuracy, gold and proxy by the number of training prompts, each of which is seen once."""

    figure: ClassVar[str] = "03_training_data"
    title: ClassVar[str] = "More training data help policies at first, then they plateau"
    claims: ClassVar[tuple[str, ...]] = ("C3",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward model")
    updates: tuple[int, ...] = field(
        role="scientific", min_length=MIN_POINTS, doc="updates of each run; every update takes fresh prompts"
    )
    weak_kl: float = field(role="fixed", ge=0, doc="KL coefficient of the runs that go on to over-optimisation")
    weak_updates: int = field(role="fixed", ge=8, doc="updates of these runs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        if list(self.updates) != sorted(set(self.updates)) or self.updates[0] < 1:
            raise ValueError(f"updates: {list(self.updates)} must rise, from at least 1")
        if self.quarter not in self.updates or self.quarter * 4 != self.updates[-1]:
            raise ValueError(f"updates: must hold a quarter of the largest, {self.updates[-1] / 4:g}, for the claim")
        return self

    @property
    def quarter(self) -> int:
        """A quarter of the most updates, where the claim's early part ends."""
        return self.updates[-1] // 4

    def training_prompts(self, updates: int) -> int:
        return updates * self.settings.ppo_prompts

    def policy(self, updates: int, seed: int) -> roles.Policy:
        return self.settings.policy(self.policy_rung, self.reward_model_rung, seed).changed(num_updates=updates)

    def weak(self, seed: int) -> roles.Policy:
        """A policy that is hardly held to its reference."""
        policy = self.settings.policy(self.policy_rung, self.reward_model_rung, seed)
        return policy.changed(num_updates=self.weak_updates, kl_coefficient=self.weak_kl)

    def policies(self) -> tuple[roles.Policy, ...]:
        by_size = [self.policy(*cell) for cell in product(self.updates, self.seeds)]
        return (*by_size, *map(self.weak, self.seeds))


class PromptsOrResponses(StudyFigure):
    """C4: reward models by prompts and responses to each, at equal numbers of labels."""

    figure: ClassVar[str] = "04_prompt_vs_response_diversity"
    title: ClassVar[str] = "More prompts beat more responses per prompt at equal labels"
    claims: ClassVar[tuple[str, ...]] = ("C4",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward models")
    labels: tuple[int, ...] = field(role="scientific", min_length=2, doc="labelled responses in all, of each diagonal")
    responses: tuple[int, ...] = field(role="scientific", min_length=2, doc="responses to each prompt")
    batch_responses: int = field(role="fixed", ge=2, doc="responses in a batch, so that equal labels are equal steps")
    policy_rung: str = field(role="fixed", doc="rung of the policy that best-of-N is drawn from")
    best_of: int = field(role="fixed", ge=2, doc="N of best-of-N")
    num_samples: int = field(role="fixed", ge=2, doc="responses to each held-out prompt that best-of-N draws from, M")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        self.settings.check_rungs("policy_rung", (self.policy_rung,))
        for name in ("labels", "responses"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)) or values[0] < 2:
                raise ValueError(f"{name}: {list(values)} must rise, from at least 2")
        for labels, size in product(self.labels, self.responses):
            if labels % (size * self.settings.label_parts):
                raise ValueError(f"labels: {labels} are no whole number of prompts with {size} responses of each rung")
            if self.batch_responses % size:
                raise ValueError(f"batch_responses: {size} does not divide {self.batch_responses}")
        if self.best_of > self.num_samples:
            raise ValueError(f"best_of: {self.best_of} must be at most num_samples = {self.num_samples}")
        return self

    def cells(self) -> list[tuple[int, int]]:
        """Labels and responses per prompt of each cell of the grid."""
        return list(product(self.labels, self.responses))

    def reward_model(self, labels: int, responses: int, seed: int) -> roles.RewardModel:
        """Cells of equal ``responses`` share their labelled samples: the smaller takes the first prompts."""
        return self.settings.reward_model(
            self.reward_model_rung,
            seed,
            labels // responses,
            labelled_prompts=self.labels[-1] // responses,
            responses=responses,
            prompts_per_batch=self.batch_responses // responses,
        )

    @property
    def samples(self) -> roles.Samples:
        return self.settings.many_samples(self.policy_rung, self.settings.eval_prompts, self.num_samples)

    def scores(self, labels: int, responses: int, seed: int) -> roles.Scores:
        return self.settings.scores(self.samples, self.reward_model(labels, responses, seed))

    def specs(self) -> tuple[Spec, ...]:
        cells = [(*cell, seed) for cell in self.cells() for seed in self.seeds]
        return (self.samples, *(self.reward_model(*cell) for cell in cells), *(self.scores(*cell) for cell in cells))


Mix = tuple[float, float, float]
KINDS = ("preference", "rejection sampling", "process")
"""What the shares of a mix are of: comparisons, right or wrong responses, right or wrong steps."""
CORNERS: tuple[Mix, ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class DataComposition(OnePolicy):
    """C7: reward models from mixes of three kinds of label, at two label budgets."""

    figure: ClassVar[str] = "07_data_composition"
    from_scratch: ClassVar[str] = "07_data_composition needs labels of steps, and answers to its questions have none"
    title: ClassVar[str] = "The mix of reward-model data matters"
    claims: ClassVar[tuple[str, ...]] = ("C7",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward models")
    mixes: tuple[Mix, ...] = field(
        role="scientific", min_length=4, doc="shares of preference, rejection-sampling and process labels; all corners"
    )
    labelled_prompts: tuple[int, ...] = field(
        role="scientific", min_length=2, max_length=2, doc="labelled prompts of each reward model, two budgets"
    )
    best_of: int = field(role="fixed", ge=2, doc="N of best-of-N")
    num_samples: int = field(role="fixed", ge=2, doc="responses to each held-out prompt that best-of-N draws from, M")
    ppo_seeds: tuple[int, ...] = field(
        role="fixed", min_length=2, doc="seeds that also train policies, with the larger budget"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        for mix in self.mixes:
            if min(mix) < 0 or abs(sum(mix) - 1) > 1e-6:
                raise ValueError(f"mixes: {list(mix)} are not shares that sum to 1")
        if not {*CORNERS} <= {*self.mixes} or len({*self.mixes}) < len(self.mixes):
            raise ValueError("mixes: must hold each kind alone, [1.0, 0.0, 0.0] and so on, and no mix twice")
        if list(self.labelled_prompts) != sorted({*self.labelled_prompts}) or self.labelled_prompts[0] < 2:
            raise ValueError(f"labelled_prompts: {list(self.labelled_prompts)} must rise, from at least 2")
        if not {*self.ppo_seeds} <= {*self.seeds}:
            raise ValueError(f"ppo_seeds: {list(self.ppo_seeds)} must be among seeds")
        if self.best_of > self.num_samples:
            raise ValueError(f"best_of: {self.best_of} must be at most num_samples = {self.num_samples}")
        return self

    def cells(self) -> list[tuple[Mix, int]]:
        """Mix and labelled prompts of each reward model."""
        return list(product(self.mixes, self.labelled_prompts))

    def reward_model(self, mix: Mix, prompts: int, seed: int) -> specs.MixedRewardModel:
        """Budgets share their labelled samples: the smaller takes the first prompts."""
        whole = self.settings.reward_model(self.reward_model_rung, seed)
        share = -(-self.labelled_prompts[-1] // len(whole.data))
        shared = ("base", "held_out", "epochs", "prompts_per_batch", "lr", "muon_lr", "lora_rank", "seed")
        return specs.MixedRewardModel(
            **{name: getattr(whole, name) for name in shared},
            data=tuple(part.changed(num_prompts=share) for part in whole.data),
            num_prompts=prompts,
            mix=mix,
        )

    @property
    def samples(self) -> specs.Samples:
        return self.settings.many_samples(self.policy_rung, self.settings.eval_prompts, self.num_samples)

    def scores(self, mix: Mix, prompts: int, seed: int) -> specs.Scores:
        return self.settings.scores(self.samples, self.reward_model(mix, prompts, seed))

    def policy(self, mix: Mix, seed: int) -> specs.Policy:
        policy = self.settings.policy(self.policy_rung, self.reward_model_rung, seed)
        return policy.changed(reward_model=self.reward_model(mix, self.labelled_prompts[-1], seed))

    def policies(self) -> tuple[specs.Policy, ...]:
        return tuple(self.policy(*cell) for cell in product(self.mixes, self.ppo_seeds))

    def specs(self) -> tuple[Spec, ...]:
        cells = [(*cell, seed) for cell in self.cells() for seed in self.seeds]
        models, scored = [self.reward_model(*cell) for cell in cells], [self.scores(*cell) for cell in cells]
        return (*super().specs(), self.samples, *models, *scored)

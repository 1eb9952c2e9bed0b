"""The figures' parameters: what each notebook varies, and the specs that follow from it."""

from typing import ClassVar, Self

from pydantic import model_validator

from rlhfscale import ladder, specs
from rlhfscale.params import FigureParams, field
from rlhfscale.recipe import Recipe
from rlhfscale.spec import Spec


class StudyFigure(FigureParams):
    """What all figures share: the recipe and the seeds."""

    recipe: str = field(role="fixed", doc="tier whose recipe.yaml holds every setting that is not varied here")
    seeds: tuple[int, ...] = field(
        role="scientific", min_length=2, doc="each reseeds labels, reward model, policy training and evaluation samples"
    )

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: {list(self.seeds)} must be different and not negative")
        return self

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        Recipe.load(self.recipe)
        return self

    @property
    def settings(self) -> Recipe:
        return Recipe.load(self.recipe)


def _check_rungs(name: str, rungs: tuple[str, ...]) -> None:
    for rung in rungs:
        try:
            ladder.rung(rung)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if len(set(rungs)) < len(rungs):
        raise ValueError(f"{name}: {list(rungs)} names a rung twice")


class BestOfN(StudyFigure):
    """C6: best-of-N of one policy by reward models of several sizes."""

    figure: ClassVar[str] = "06_best_of_n"
    title: ClassVar[str] = "Best-of-N gains diminish with N"
    claims: ClassVar[tuple[str, ...]] = ("C6",)

    policy_rung: str = field(role="fixed", doc="SFT rung that is sampled")
    reward_model_rungs: tuple[str, ...] = field(role="scientific", min_length=1, doc="rungs of the reward models")
    reference_rung: str = field(role="fixed", doc="reward-model rung that the verdict rests on")
    num_prompts: int = field(role="fixed", ge=2, doc="held-out prompts")
    num_samples: int = field(role="fixed", ge=1, doc="responses sampled to each prompt, M")
    best_of: tuple[int, ...] = field(role="scientific", min_length=1, doc="values of N, each at most num_samples")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_rungs("policy_rung", (self.policy_rung,))
        _check_rungs("reward_model_rungs", self.reward_model_rungs)
        if self.reference_rung not in self.reward_model_rungs:
            raise ValueError(f"reference_rung: {self.reference_rung!r} is not among reward_model_rungs")
        if len(set(self.best_of)) < len(self.best_of):
            raise ValueError(f"best_of: {list(self.best_of)} names a size twice")
        bad = [size for size in self.best_of if not 1 <= size <= self.num_samples]
        if bad:
            raise ValueError(f"best_of: {bad} must be from 1 to num_samples = {self.num_samples}")
        if max(self.best_of) < 64:
            raise ValueError("best_of: its largest size must be at least 64, so that early and late doublings differ")
        missing = [size for size in self.claim_sizes if size not in self.best_of]
        if missing:
            raise ValueError(f"best_of: lacks {missing}, which the statistic of C6 needs")
        return self

    @property
    def claim_sizes(self) -> tuple[int, int, int, int]:
        """First and last N of the early and of the late range: 1 to 8, and the last three doublings."""
        return 1, 8, max(self.best_of) // 8, max(self.best_of)

    @property
    def samples(self) -> specs.Samples:
        return self.settings.many_samples(self.policy_rung, self.num_prompts, self.num_samples)

    def scores(self, rung: str, seed: int) -> specs.Scores:
        return specs.Scores(samples=self.samples, reward_model=self.settings.reward_model(rung, seed))

    def specs(self) -> tuple[Spec, ...]:
        return (self.samples, *(self.scores(rung, seed) for rung in self.reward_model_rungs for seed in self.seeds))


class PolicySize(StudyFigure):
    """C1: the gain of PPO by policy size, against a fixed reward model."""

    figure: ClassVar[str] = "01_policy_size"
    title: ClassVar[str] = "Larger policies gain less from RLHF"
    claims: ClassVar[tuple[str, ...]] = ("C1",)

    policy_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the policies")
    reward_model_rung: str = field(role="fixed", doc="rung of the reward model")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_rungs("policy_rungs", self.policy_rungs)
        _check_rungs("reward_model_rung", (self.reward_model_rung,))
        return self

    def policy(self, rung: str, seed: int) -> specs.Policy:
        return self.settings.policy(rung, self.reward_model_rung, seed)

    def evaluations(self, stage: str, rung: str, seed: int) -> tuple[specs.Samples, specs.Samples]:
        """Sampled and greedy responses before (``sft``) or after (``ppo``) training."""
        model = self.policy(rung, seed) if stage == "ppo" else self.settings.sft(rung)
        return self.settings.evaluation(model, seed), self.settings.evaluation(model, seed, greedy=True)

    def specs(self) -> tuple[Spec, ...]:
        found = [
            item
            for rung in self.policy_rungs
            for seed in self.seeds
            for stage in ("sft", "ppo")
            for item in self.evaluations(stage, rung, seed)
        ]
        trained = [self.policy(rung, seed) for rung in self.policy_rungs for seed in self.seeds]
        return tuple(dict.fromkeys([*found, *trained]))


class TestBed(StudyFigure):
    """The conditions that the laptop bed must meet before a figure is drawn from it."""

    __test__: ClassVar[bool] = False  # not a pytest class
    figure: ClassVar[str] = "00_test_bed"
    title: ClassVar[str] = "The laptop bed: what the ladder and the reward models can do"

    policy_rungs: tuple[str, ...] = field(role="scientific", min_length=4, doc="rungs of the ladder; a law needs four")
    reward_model_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the reward models")
    data_rung: str = field(role="fixed", doc="reward-model rung whose data are varied, and that PPO is run with")
    data_prompts: tuple[int, ...] = field(
        role="scientific", min_length=1, doc="labelled prompts, fewer than the recipe's"
    )
    gain_rungs: tuple[str, ...] = field(
        role="scientific", min_length=2, doc="policies trained by PPO with the data rung"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_rungs("policy_rungs", self.policy_rungs)
        _check_rungs("reward_model_rungs", self.reward_model_rungs)
        _check_rungs("gain_rungs", self.gain_rungs)
        if self.data_rung not in self.reward_model_rungs:
            raise ValueError(f"data_rung: {self.data_rung!r} is not among reward_model_rungs")
        limit = self.settings.reward_prompts
        bad = [count for count in self.data_prompts if not 1 <= count < limit]
        if bad:
            raise ValueError(f"data_prompts: {bad} must be from 1 to below the recipe's reward_prompts = {limit}")
        return self

    def reward_models(self) -> dict[tuple[str, int, int], specs.RewardModel]:
        """By rung, number of labelled prompts and seed."""
        full = self.settings.reward_prompts
        cells = [(rung, full) for rung in self.reward_model_rungs]
        cells += [(self.data_rung, count) for count in self.data_prompts]
        return {
            (rung, count, seed): self.settings.reward_model(rung, seed, num_prompts=count)
            for rung, count in cells
            for seed in self.seeds
        }

    def best_of_eight(self, seed: int) -> tuple[specs.Samples, specs.Scores]:
        """Eight responses of the data rung's SFT model to each held-out prompt, scored by its reward model."""
        recipe = self.settings
        samples = recipe.evaluation(recipe.sft(self.data_rung), seed).model_copy(update={"num_samples": 8})
        return samples, specs.Scores(samples=samples, reward_model=recipe.reward_model(self.data_rung, seed))

    def gains(self) -> PolicySize:
        """The policies of the gain condition, as the figure of C1 describes them."""
        return PolicySize(
            recipe=self.recipe, seeds=self.seeds, policy_rungs=self.gain_rungs, reward_model_rung=self.data_rung
        )

    def specs(self) -> tuple[Spec, ...]:
        recipe = self.settings
        ladder_specs = [
            item
            for rung in self.policy_rungs
            for item in (
                recipe.pretrain(rung),
                recipe.evaluation(recipe.sft(rung), self.seeds[0]),
                recipe.evaluation(recipe.sft(rung), 0, greedy=True),
            )
        ]
        best = [item for seed in self.seeds for item in self.best_of_eight(seed)]
        return tuple(dict.fromkeys([*ladder_specs, *self.reward_models().values(), *best, *self.gains().specs()]))

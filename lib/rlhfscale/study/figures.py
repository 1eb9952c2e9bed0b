"""The figures' parameters: what each notebook varies, and the specs that follow from it."""

import os
from itertools import product
from typing import ClassVar, Self

from pydantic import model_validator

from rlhfscale.bed import specs
from rlhfscale.bed.recipe import Recipe
from rlhfscale.chat.recipe import CheckpointRecipe
from rlhfscale.evals import revisions, sources
from rlhfscale.runs.spec import Spec
from rlhfscale.study import roles
from rlhfscale.study.params import FigureParams, field


class RecipeFigure(FigureParams):
    """What all figures share: the recipe.

    Class attributes:
        from_scratch: what it needs that a ladder of published checkpoints does not have; empty for figures that can be
            made on either ladder.
    """

    from_scratch: ClassVar[str] = ""

    recipe: str = field(role="fixed", doc="tier whose recipe.yaml holds every setting that is not varied here")

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        recipe = Recipe.load(self.recipe)
        if self.from_scratch and isinstance(recipe, CheckpointRecipe):
            raise ValueError(f"recipe: {self.recipe!r} is a ladder of published checkpoints; {self.from_scratch}")
        return self

    @property
    def settings(self) -> Recipe | CheckpointRecipe:
        return Recipe.load(self.recipe)


class StudyFigure(RecipeFigure):
    """What the figures that test claims share: the recipe and the seeds."""

    seeds: tuple[int, ...] = field(
        role="scientific", min_length=2, doc="each reseeds labels, reward model, policy training and evaluation samples"
    )

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: {list(self.seeds)} must be different and not negative")
        return self


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
        self.settings.check_rungs("policy_rung", (self.policy_rung,))
        self.settings.check_rungs("reward_model_rungs", self.reward_model_rungs)
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
    def samples(self) -> roles.Samples:
        return self.settings.many_samples(self.policy_rung, self.num_prompts, self.num_samples)

    def scores(self, rung: str, seed: int) -> roles.Scores:
        return self.settings.scores(self.samples, self.settings.reward_model(rung, seed))

    def specs(self) -> tuple[Spec, ...]:
        scores = [self.scores(rung, seed) for rung in self.reward_model_rungs for seed in self.seeds]
        return self.samples, self.samples.model, *scores  # a language model's votes are read with its tokenizer


class PolicySize(StudyFigure):
    """C1: the gain of PPO by policy size, against a fixed reward model."""

    figure: ClassVar[str] = "01_policy_size"
    title: ClassVar[str] = "Larger policies gain less from RLHF"
    claims: ClassVar[tuple[str, ...]] = ("C1",)

    policy_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the policies")
    reward_model_rung: str = field(role="fixed", doc="rung of the reward model that the verdict rests on")
    other_rungs: tuple[str, ...] = field(role="fixed", doc="further reward models, each fixed in its turn: side checks")
    other_seeds: tuple[int, ...] = field(role="fixed", doc="seeds of the side checks, some of seeds")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("policy_rungs", self.policy_rungs)
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        self.settings.check_rungs("other_rungs", self.other_rungs)
        if self.reward_model_rung in self.other_rungs:
            raise ValueError(f"other_rungs: {self.reward_model_rung} is the reward_model_rung already")
        if self.other_rungs and (len(set(self.other_seeds)) < 2 or not set(self.other_seeds) <= set(self.seeds)):
            raise ValueError(f"other_seeds: {list(self.other_seeds)} must be at least 2 of seeds {list(self.seeds)}")
        return self

    def policy(self, rung: str, seed: int, reward_model_rung: str | None = None) -> roles.Policy:
        return self.settings.policy(rung, reward_model_rung or self.reward_model_rung, seed)

    def other(self, reward_model_rung: str, rung: str, seed: int) -> roles.Samples:
        """Sampled responses of a policy that was trained against another reward model."""
        return self.settings.evaluation(self.policy(rung, seed, reward_model_rung), seed)

    def evaluations(self, stage: str, rung: str, seed: int) -> tuple[roles.Samples, roles.Samples]:
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
        others = [self.other(*cell) for cell in product(self.other_rungs, self.policy_rungs, self.other_seeds)]
        return tuple(dict.fromkeys([*found, *trained, *others]))


class TestBed(StudyFigure):
    """The conditions that the laptop bed must meet before a figure is drawn from it."""

    __test__: ClassVar[bool] = False  # not a pytest class
    figure: ClassVar[str] = "00_test_bed"
    from_scratch: ClassVar[str] = "00_test_bed measures how its rungs were pretrained"
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
        self.settings.check_rungs("policy_rungs", self.policy_rungs)
        self.settings.check_rungs("reward_model_rungs", self.reward_model_rungs)
        self.settings.check_rungs("gain_rungs", self.gain_rungs)
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
        samples = recipe.evaluation(recipe.sft(self.data_rung), seed).changed(num_samples=8)
        return samples, recipe.scores(samples, recipe.reward_model(self.data_rung, seed))

    def gains(self) -> PolicySize:
        """The policies of the gain condition, as the figure of C1 describes them."""
        fixed = {"reward_model_rung": self.data_rung, "other_rungs": (), "other_seeds": ()}
        return PolicySize(recipe=self.recipe, seeds=self.seeds, policy_rungs=self.gain_rungs, **fixed)

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


class Walkthrough(RecipeFigure):
    """PPO by hand, then one live run on a bed small enough to be made while a reader waits.

    The bed is its own: a rung pretrained on few documents, then fine-tuned on demonstrations of one family by careless
    demonstrators, so that there is much to gain in little time. All that is not named here is the recipe's.
    """

    figure: ClassVar[str] = "00_walkthrough"
    from_scratch: ClassVar[str] = "00_walkthrough pretrains a rung of its own"
    title: ClassVar[str] = "PPO by hand, then live"
    families: ClassVar[tuple[str, ...]] = ("registers",)
    bed_seed: ClassVar[int] = 1
    """Of the reward model and of the held-out responses: the live run's seed changes nothing but the live run."""

    seed: int = field(role="scientific", ge=1, doc="seed of the live run")
    num_updates: int = field(role="scientific", ge=1, doc="updates of the live run")
    prompts_per_update: int = field(role="scientific", ge=2, multiple_of=2, doc="prompts, one response to each")
    epochs: int = field(role="scientific", ge=1, doc="passes over an update's roll-outs, in two minibatches each")
    policy_lr: float = field(role="scientific", gt=0, doc="learning rate of the policy")
    kl_coefficient: float = field(role="scientific", ge=0, doc="beta, in standard deviations of the proxy for a nat")
    clip: float = field(role="scientific", gt=0, doc="epsilon, half-width of the ratio's clipping range")
    lam: float = field(role="scientific", ge=0, le=1, doc="lambda of GAE")
    rung: str = field(role="fixed", doc="rung of policy, critic and reward model")
    pretrain_documents: int = field(role="fixed", ge=64, doc="documents it is pretrained on")
    sft_documents: int = field(role="fixed", ge=64, doc="demonstrations it is fine-tuned on")
    slip: float = field(role="fixed", ge=0, lt=1, doc="share of wrong tokens in these demonstrations")
    label_prompts: int = field(role="fixed", ge=1, doc="prompts whose responses are compared for the reward model")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("rung", (self.rung,))
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.seed,)

    @property
    def settings(self) -> Recipe:
        """The recipe with this bed's sizes."""
        return super().settings.model_copy(
            update={
                "pretrain_documents": self.pretrain_documents,
                "sft_documents": self.sft_documents,
                "label_rungs": (self.rung,),
                "reward_prompts": self.label_prompts,
                "reward_muon_lr": 0.005,  # few labels: a higher rate orders more held-out pairs rightly
            }
        )

    @property
    def sft(self) -> specs.SFT:
        return self.settings.sft(self.rung).changed(families=self.families, slip=self.slip)

    @property
    def reward_model(self) -> specs.RewardModel:
        spec = self.settings.reward_model(self.rung, self.bed_seed)
        data, held_out = (tuple(map(self._on_bed, part)) for part in (spec.data, spec.held_out))
        return spec.changed(base=self.sft, data=data, held_out=held_out)

    @property
    def before(self) -> specs.Samples:
        """Responses to the held-out prompts before the live run."""
        return self._on_bed(self.settings.evaluation(self.sft, self.bed_seed))

    def _on_bed(self, samples: specs.Samples) -> specs.Samples:
        return samples.changed(model=self.sft, families=self.families)

    def specs(self) -> tuple[Spec, ...]:
        return self.sft, self.reward_model, self.before


class Benchmarks(RecipeFigure):
    """The chat benchmarks' metrics on judgments whose truth is planted, then MT-Bench of two policies.

    MT-Bench needs the questions, the policies and the judge. Where one of them is not installed the figure is made
    without it (`missing` says what to install).
    """

    figure: ClassVar[str] = "30_benchmarks"
    title: ClassVar[str] = "Chat benchmarks: win rates, lengths, and intervals that hold"
    judge_tokens: ClassVar[int] = 2048
    """Of each judgment, as FastChat has it."""
    max_missing: ClassVar[float] = 0.05
    """Share of missing verdicts that fails the run."""
    dtype: ClassVar[str] = "bf16"
    """Of models in process."""

    seed: int = field(role="scientific", ge=1, doc="of the planted judgments and of the policies' samples")
    win_rates: tuple[float, ...] = field(role="scientific", min_length=1, doc="planted, percent at equal length")
    extra_chars: tuple[int, ...] = field(
        role="scientific", min_length=1, doc="by which each model's answers are longer"
    )
    num_instructions: int = field(role="fixed", ge=20, doc="planted judgments of each model")
    num_simulations: int = field(role="fixed", ge=2, doc="simulated evaluations for the coverage of intervals")
    num_refits: int = field(role="fixed", ge=10, doc="bootstrap refits of each length-controlled interval")
    before: str = field(role="scientific", doc="policy before RLHF: smollm2, or a model or adapter folder")
    after: str = field(role="scientific", doc="policy after RLHF")
    before_temperature: float = field(role="scientific", ge=0, doc="of its answers; 0 is greedy")
    after_temperature: float = field(role="scientific", ge=0, doc="of its answers")
    judge: str = field(role="scientific", doc="endpoint:MODEL, hf:FOLDER, vllm:FOLDER or reward:FOLDER")
    constrained: bool = field(role="fixed", doc="read verdicts off probabilities, for judges too weak for the format")
    num_questions: int = field(role="fixed", ge=2, le=80, doc="MT-Bench questions, of all categories in turn")
    max_new_tokens: int = field(role="fixed", ge=1, doc="of each answer")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.win_rates) != len(self.extra_chars):
            raise ValueError("extra_chars: needs one value for each of win_rates")
        if not all(0 < rate < 100 for rate in self.win_rates):
            raise ValueError(f"win_rates: {list(self.win_rates)} must be between 0 and 100, both excluded")
        kind, _, source = self.judge.partition(":")
        if kind not in ("endpoint", "hf", "vllm", "reward") or not source:
            raise ValueError(f"judge: {self.judge!r} is none of endpoint:MODEL, hf:FOLDER, vllm:FOLDER, reward:FOLDER")
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.seed,)

    @property
    def missing(self) -> tuple[str, ...]:
        """What MT-Bench lacks here, with the command that brings it."""
        found = []
        try:
            sources.mt_bench_revision()
        except FileNotFoundError as error:
            found.append(str(error))
        kind, _, source = self.judge.partition(":")
        local = {self.before, self.after} | (set() if kind == "endpoint" else {source})
        for name in sorted(name for name in local if not revisions.installed(name)):
            hint = "make setup EXTRAS=smollm2" if name == revisions.SMOLLM2 else "no such model folder"
            found.append(f"{name}: {hint}")
        if kind == "endpoint" and not os.environ.get("OPENAI_BASE_URL"):
            found.append(f"{self.judge}: set OPENAI_BASE_URL to its address")
        return tuple(found)

    @property
    def hardest(self) -> int:
        """Place of the model whose length and strength differ most from the baseline's."""
        return max(range(len(self.extra_chars)), key=lambda place: abs(self.extra_chars[place]))

    @property
    def coverage(self) -> specs.Coverage:
        """Of the intervals of the hardest model."""
        return specs.Coverage(
            win_rate=self.win_rates[self.hardest],
            extra_chars=self.extra_chars[self.hardest],
            num_instructions=self.num_instructions,
            num_simulations=self.num_simulations,
            num_refits=self.num_refits,
            seed=self.seed,
        )

    @property
    def mt_bench(self) -> specs.MTBench:
        """Raises FileNotFoundError where something is missing."""
        kind, _, source = self.judge.partition(":")
        names = ("before_temperature", "after_temperature", "judge", "constrained", "num_questions", "max_new_tokens")
        names += ("judge_tokens", "max_missing", "dtype", "seed")
        return specs.MTBench(
            before=self.before,
            before_revision=revisions.revision(self.before),
            after=self.after,
            after_revision=revisions.revision(self.after),
            judge_revision="" if kind == "endpoint" else revisions.revision(source),
            questions_revision=sources.mt_bench_revision(),
            **{name: getattr(self, name) for name in names},
        )

    def specs(self) -> tuple[Spec, ...]:
        return (self.coverage,) if self.missing else (self.coverage, self.mt_bench)


class Ledger(RecipeFigure):
    """Every claim's verdict on one page, from the results of the other figures."""

    figure: ClassVar[str] = "99_claims"
    title: ClassVar[str] = "The ledger: every claim, its test and its verdict"
    reads_results: ClassVar[bool] = True

    def specs(self) -> tuple[Spec, ...]:
        return ()

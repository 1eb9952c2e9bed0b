"""The outer loop of a run: its prompts, update after update, what is logged of them, and its checkpoints."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from rlhfscale.models import parallel
from rlhfscale.models.sequences import Conversation
from rlhfscale.rewards.base import Reward, TextFunction, as_reward, scored
from rlhfscale.rewards.scorer import at_least_one
from rlhfscale.rl import learner, logs, rollout
from rlhfscale.rl.config import Config
from rlhfscale.rl.prompts import Shuffled
from rlhfscale.rl.rollout import Prompt, Rollouts
from rlhfscale.samplers import Completions

Prompts = Iterable[Prompt] | Callable[[int], Iterable[Prompt]]
"""Prompts of a run: a collection, of which every update takes the next in random order; or a function from an update's
index to its prompts."""

CHECKPOINT = "checkpoint"


class OuterLoop:
    """What a run does around its updates. `loop.Trainer` has the attributes and the methods of a single update."""

    algorithm: str
    config: Config
    learner: learner.Learner
    tokenizer: Any
    reward: Reward
    seed: int
    num_updates: int
    num_replacements: int
    kl_coefficient: float
    records: list[dict[str, Any]]
    rollouts: Rollouts | None
    talks: dict[tuple[int, ...], Conversation]
    prompts_hash: str | None

    def train(
        self,
        prompts: Prompts,
        num_updates: int,
        *,
        folder: str | Path | None = None,
        checkpoint_every: int = 10,
        watch: Mapping[str, Reward | TextFunction] | None = None,
        eval_prompts: Sequence[Prompt] = (),
        eval_every: int = 10,
        log_completions: int = 0,
        log_to: str | None = None,
        progress: bool = True,
        on_update: Callable[[int, dict[str, float], Completions], dict[str, float] | None] | None = None,
    ) -> pd.DataFrame:
        """Train until ``num_updates`` updates are done in all.

        Args:
            prompts: all prompts, drawn from without replacement; or a function from an update's index to its prompts.
            folder: where metrics.csv and, every ``checkpoint_every`` updates and at the end, a checkpoint are written.
                A run found there is continued, to the same numbers as if it had never stopped. The checkpoint before is
                kept too, and used where the newest is damaged.
            watch: rewards by name that are logged (their mean) and not trained on, such as a gold reward.
            eval_prompts: held-out prompts, answered every ``eval_every`` updates and at the end, see `evaluate_on`.
            log_completions: every so many updates, write `logs.completions_table` to completions/ in the folder.
            log_to: "tensorboard", "trackio" or "wandb": give the metrics to that library's logger, too.
            progress: show a progress bar.
            on_update: called after each update with its index, row and responses; what it returns is logged too.

        Returns:
            one row of metrics for each update (see `rl.metrics`).

        Raises:
            ValueError, ImportError: prompts that `collect` would refuse, or options that cannot be followed.
            learner.CheckpointError: the folder holds a run of another model, config or seed, or of other prompts.
        """
        folder = Path(folder) if folder is not None else None
        source, more = self._source(prompts)
        held_out = rollout.encode(self.tokenizer, eval_prompts)
        self.check_prompts(held_out)
        at_least_one(checkpoint_every=checkpoint_every, eval_every=eval_every)
        watched = logs.Watched(watch or {}, held_out, eval_every, log_completions, folder)
        watched.check(source.prompts if isinstance(source, Shuffled) else held_out)
        logs.check_logger(log_to, folder)
        self.records = self._resume(folder) if folder else []
        parallel.barrier()  # nobody writes before all have read
        recorder = logs.Recorder(folder, self.records, log_to, self.algorithm, self.config.model_dump(mode="json"))
        bar = self._bar(num_updates, progress)
        try:
            for update in bar:
                self._train_update(update, num_updates, source, more, watched, recorder, on_update)
                bar.set_postfix({name: f"{self.records[-1][name]:.3f}" for name in ("proxy", "kl_nats")})
                last = update + 1 == num_updates
                if folder and parallel.rank() == 0 and ((update + 1) % checkpoint_every == 0 or last):
                    recorder.write_metrics()  # before the checkpoint: rows that are ahead of it are dropped
                    self.save(folder / CHECKPOINT)
        finally:
            recorder.close()
        parallel.barrier()
        return pd.DataFrame(self.records)

    def _bar(self, num_updates: int, shown: bool) -> tqdm:
        left = range(self.num_updates, num_updates)
        return tqdm(left, disable=not shown or parallel.rank() > 0, desc=self.algorithm, unit="update")

    def _train_update(self, update, num_updates, source, more, watched, recorder, on_update) -> None:
        """One update, and its row: kept as soon as the weights have moved, and logged when it is whole."""
        metrics, completions = self.update(source(update), more)
        record = {"update": update} | metrics
        self.records.append(record)
        record |= self._looked_at(update, watched, recorder, update + 1 == num_updates)
        record |= (on_update and on_update(update, record, completions)) or {}
        recorder.log(record)

    def _looked_at(self, update: int, watched: logs.Watched, recorder: logs.Recorder, last: bool) -> dict[str, float]:
        """The means of the rewards that are not trained on, and the held-out set's where it is due; writes the table of
        the responses where that is."""
        found: dict[str, float] = {}
        due = watched.writes(update)
        if watched.rewards or due:
            sequences = self.rollouts.sequences(self.tokenizer, self.talks)
            scores = watched.scores(sequences)
            found = {name: float(values.mean()) for name, values in scores.items()}
            if due:
                recorder.write_completions(update, logs.completions_table(self.rollouts, sequences, scores))
        return found | (self.evaluate_on(watched.held_out, watched.rewards) if watched.evaluates(update, last) else {})

    @torch.no_grad()
    def evaluate_on(
        self, prompts: Iterable[Prompt], watched: Mapping[str, Reward | TextFunction] | None = None
    ) -> dict[str, float]:
        """Answer held-out prompts once each, at the training temperature, and return the means of the rewards, of the
        responses' lengths and of their ends, with the prefix eval_."""
        encoded = rollout.encode(self.tokenizer, prompts)
        self.check_prompts(encoded)
        sequences, completions = self._sampled(encoded, (self.seed, 4, self.num_updates))
        rewards = {"proxy": self.reward} | {name: as_reward(reward) for name, reward in (watched or {}).items()}
        found = {name: scored(reward, sequences) for name, reward in rewards.items()}
        found |= {"response_tokens": completions.lengths, "finished": completions.finished}
        return {f"eval_{name}": float(np.mean(values)) for name, values in found.items()}

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint: adapters as plain PEFT folders, value head, optimiser, and what decides the rest."""
        state = {"num_updates": self.num_updates, "kl_coefficient": self.kl_coefficient}
        self.learner.save(Path(folder), self._identity() | state | {"num_replacements": self.num_replacements})

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint of the same algorithm, model, config and seed.

        Raises:
            learner.CheckpointError: there is none, or it is another run's; the message names what differs.
        """
        state = self.learner.load(Path(folder), self._identity())
        self.num_updates, self.kl_coefficient = state["num_updates"], state["kl_coefficient"]
        self.num_replacements = state.get("num_replacements", 0)

    def _identity(self) -> dict:
        config = self.config.model_dump(mode="json")
        found = {"algorithm": self.algorithm, "seed": self.seed, "config": config}
        return found | ({"prompts": self.prompts_hash} if self.prompts_hash else {})

    def _resume(self, folder: Path) -> list[dict[str, float]]:
        folder.mkdir(parents=True, exist_ok=True)
        if not learner.spread(folder / CHECKPOINT):  # this very run may have failed before its first one
            return [record for record in self.records if record["update"] < self.num_updates]
        self.load(folder / CHECKPOINT)
        return logs.read_metrics(folder, self.num_updates)

    def _source(self, prompts: Prompts) -> tuple[Callable[[int], Iterable[Prompt]], Callable | None]:
        """A function from an update to its prompts, and one that draws further ones from a collection."""
        if not callable(prompts):
            shuffled = self._shuffled(prompts)
            return shuffled, self._more(shuffled)
        if getattr(self.config, "dynamic_sampling", 0):
            raise ValueError("dynamic_sampling: needs prompts as a collection, which further ones can be drawn from")
        return prompts, None

    def _shuffled(self, given: Iterable[Prompt]) -> Shuffled:
        """The prompts in random order. Raises ValueError for no prompt, or one that cannot be used."""
        prompts = rollout.encode(self.tokenizer, given)
        if len(prompts) == 0:
            raise ValueError("prompts: none given")
        self.check_prompts(prompts)
        found = Shuffled(prompts, self.seed, self.config.prompts_per_update)
        self.prompts_hash = found.hash
        return found

    def _more(self, source: Shuffled) -> Callable[[int], list[Sequence[int]]]:
        """Draws prompts to replace others, and counts them, so that a resumed run goes on with the next ones."""

        def draw(count: int) -> list[Sequence[int]]:
            self.num_replacements += count
            return source.replacements(self.num_replacements - count, count)

        return draw

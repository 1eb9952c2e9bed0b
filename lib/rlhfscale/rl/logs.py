"""What a run writes beside its checkpoints: metrics, tables of completions, and another library's logger."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from rlhfscale.models import parallel
from rlhfscale.models.sequences import Encoded, Sequences
from rlhfscale.rewards.base import Reward, TextFunction, as_reward, scored
from rlhfscale.rewards.shared import SharedReward, check_conversations
from rlhfscale.rl.kl import sequence_kl
from rlhfscale.rl.rollout import Rollouts

METRICS, COMPLETIONS = "metrics.csv", "completions"
RESERVED = {
    "update", "prompt", "response", "score", "advantage", "proxy", "proxy_std", "kl_nats", "kl_coefficient",
    "response_tokens", "finished", "entropy_nats", "sampler_gap_nats", "sampler_gap_mean_nats", "sampler_ratio",
    "ratio_kl_nats", "clip_fraction", "steps", "policy_loss", "policy_grad_norm", "value_loss", "critic_grad_norm",
    "explained_variance", "replaced_groups",
}  # fmt: skip
"""Names of metrics and of columns, which a reward that is watched cannot have."""
LOGGERS = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""Loggers by the name that ``log_to`` takes, with the module that each needs."""


class Recorder:
    """Keeps the rows of metrics.csv, and hands each to a logger. Only the first of several processes writes.

    Args:
        folder: where files go; None writes none.
        records: rows of the run that is continued.
        log_to: a name from LOGGERS, or None.
        name: the algorithm, which names the run in a logger.
        config: hyper-parameters, for the logger.

    Raises:
        ValueError: an unknown logger, or one that needs a folder.
        ImportError: the logger's library is not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        records: list[dict[str, Any]],
        log_to: str | None,
        name: str,
        config: Mapping[str, Any],
    ):
        self.folder, self.records, self.name = folder, records, name
        self._log = self._close = None
        library = check_logger(log_to, folder)
        if library is None or parallel.rank() > 0:
            return
        if log_to == "tensorboard":
            writer = library.SummaryWriter(str(folder / "tensorboard"))
            self._log, self._close = writer.add_scalar, writer.close
        else:  # trackio has wandb's interface
            library.init(project="rlhfscale", name=folder.name if folder else name, config=dict(config))
            self._log, self._close = lambda tag, value, step: library.log({tag: value}, step=step), library.finish

    def log(self, record: Mapping[str, Any]) -> None:
        """Give an update's numbers to the logger."""
        for name, value in record.items():
            if self._log and name != "update":
                self._log(f"{self.name}/{name}", value, record["update"])

    def write_metrics(self) -> None:
        temporary = self.folder / (METRICS + ".tmp")
        pd.DataFrame(self.records).to_csv(temporary, index=False)
        temporary.replace(self.folder / METRICS)

    def write_completions(self, update: int, table: pd.DataFrame) -> None:
        """Write the responses of an update to completions/<update>.parquet."""
        if parallel.rank() == 0:
            (self.folder / COMPLETIONS).mkdir(exist_ok=True)
            temporary = self.folder / COMPLETIONS / f"{update:06}.parquet.tmp"
            table.to_parquet(temporary, index=False)
            temporary.replace(temporary.with_suffix(""))

    def close(self) -> None:
        if self._close:
            self._close()


def check_logger(log_to: str | None, folder: Path | None) -> ModuleType | None:
    """The library of a logger; see `Recorder` for the errors."""
    if log_to is None:
        return None
    if log_to not in LOGGERS:
        raise ValueError(f"log_to: {log_to!r} is not one of {', '.join(LOGGERS)}")
    if log_to == "tensorboard" and folder is None:
        raise ValueError("log_to: tensorboard needs a folder to write to")
    try:
        return importlib.import_module(LOGGERS[log_to])
    except ImportError as error:
        raise ImportError(f"log_to: {log_to} is not installed; pip install {log_to}") from error


class Watched:
    """What is looked at while a run trains.

    Args:
        rewards: by name; logged and not trained on.
        held_out: prompts that are answered every ``eval_every`` updates and at the end, as token ids.
        completions_every: updates from one table of completions to the next; 0 for none.
        folder: where tables go.

    Raises:
        ValueError: numbers that make no sense, or tables without a folder.
        ImportError: what writes Parquet is not installed.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward | TextFunction],
        held_out: Sequence[Sequence[int]],
        eval_every: int,
        completions_every: int,
        folder: Path | None,
    ):
        if completions_every < 0:
            raise ValueError(
                f"log_completions: {completions_every} is below 0; give updates from one table to the next"
            )
        if completions_every and folder is None:
            raise ValueError("log_completions: needs a folder to write to")
        if completions_every and importlib.util.find_spec("pyarrow") is None:
            raise ImportError("log_completions: tables are Parquet; pip install pyarrow")
        if taken := sorted(RESERVED & rewards.keys()):
            raise ValueError(f"watch: {', '.join(taken)} is a metric or a column already; choose another name")
        self.rewards = {name: as_reward(reward) for name, reward in rewards.items()}
        self.held_out, self.eval_every, self.completions_every = held_out, eval_every, completions_every

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise ValueError for a reward that cannot be watched, or that refuses a conversation."""
        for name, reward in self.rewards.items():
            if isinstance(reward, SharedReward):
                raise ValueError(
                    f"watch: {name} is a SharedReward, which is read on a trainer's base; take OutcomeRewardModel"
                )
            check_conversations(
                reward, [ids.messages for ids in (*prompts, *self.held_out) if isinstance(ids, Encoded)]
            )

    def scores(self, sequences: Sequences) -> dict[str, np.ndarray]:
        """The scores of each reward, float32 [sequence]."""
        return {name: scored(reward, sequences) for name, reward in self.rewards.items()}

    def writes(self, update: int) -> bool:
        return bool(self.completions_every) and (update + 1) % self.completions_every == 0

    def evaluates(self, update: int, last: bool) -> bool:
        return bool(self.held_out) and (last or (update + 1) % self.eval_every == 0)


def read_metrics(folder: Path, num_updates: int) -> list[dict[str, Any]]:
    """The rows of a run's first updates, as every process reads them."""
    file = folder / METRICS
    table = pd.read_csv(file) if file.exists() else pd.DataFrame({"update": []})
    records = table[table["update"] < num_updates].to_dict("records")
    return json.loads(parallel.of_first(json.dumps(records).encode()))


def completions_table(rollouts: Rollouts, sequences: Sequences, watched: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """One row for each response of an update.

    Args:
        rollouts: with advantages.
        sequences: the same, as texts.
        watched: further scores by name, float32 [response].

    Returns:
        prompt and response (text without special tokens), finished, score (less penalties), advantage (mean over the
        response's tokens), kl_nats (k1, summed over the response), and the further scores.
    """
    kl = sequence_kl(rollouts.logprobs, rollouts.ref_logprobs, rollouts.mask)
    advantage = (rollouts.advantages * rollouts.mask).sum(1) / rollouts.mask.sum(1)
    columns = {"finished": rollouts.finished, "score": rollouts.scores, "advantage": advantage, "kl_nats": kl}
    numbers = {name: tensor.detach().cpu().numpy() for name, tensor in columns.items()}
    return pd.DataFrame({"prompt": sequences.prompts, "response": sequences.responses} | numbers | dict(watched))

"""Reading the artifacts that a figure is made from. Nothing here imports torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from rlhfscale.bed.responses import Responses
from rlhfscale.chat import specs as chat_specs
from rlhfscale.evals import best_of_n as bon
from rlhfscale.runs.spec import Spec
from rlhfscale.study import roles

if TYPE_CHECKING:
    from rlhfscale.chat.answers import Answers

Folders = Mapping[Spec, Path]
LAST_UPDATES = 5
"""Updates at the end of training over which KL and proxy are averaged."""


def read_responses(folders: Folders, spec: roles.Samples) -> "Responses | Answers":
    """Graded responses: of both kinds are ``exact``, ``gold``, ``finished`` and ``response_lengths`` [prompt, sample].

    Those of language models need transformers, and are only imported where there are some.
    """
    if isinstance(spec, chat_specs.Answers):
        from rlhfscale.chat.answers import Answers

        return Answers.load(folders[spec])
    return Responses.load(folders[spec] / "responses.safetensors")


def read_final_answers(folders: Folders, spec: roles.Samples) -> np.ndarray:
    """int64 [prompt, sample]: equal numbers for equal final answers to a prompt; -1 for a response without one."""
    responses = read_responses(folders, spec)
    if isinstance(spec, chat_specs.Answers):
        from transformers import AutoTokenizer

        model = folders[spec.model.saved] / "model"
        return responses.answers(AutoTokenizer.from_pretrained(model, local_files_only=True))
    return responses.answers()


def read_metrics(folders: Folders, policy: roles.Policy) -> pd.DataFrame:
    """A policy's updates. A language model's answer is right or wrong: that is both its ``exact`` and its ``gold``."""
    table = pd.read_csv(folders[policy] / "metrics.csv")
    return table.assign(exact=table["right"], gold=table["right"]) if isinstance(policy, chat_specs.Aligned) else table


def read_scores(folders: Folders, spec: Spec) -> np.ndarray:
    return load_file(folders[spec] / "scores.safetensors")["scores"]


def pair_accuracy(folders: Folders, spec: roles.RewardModel) -> np.ndarray:
    """Accuracy within each held-out prompt that has a pair of unequal gold, float64 [prompt]; these are the same for
    every reward model of a recipe, as they depend on the responses alone."""
    found = load_file(folders[spec] / "held_out.safetensors")["pair_accuracy"]  # [label rung, prompt], or [prompt]
    accuracy = mean_where_known(np.atleast_2d(found))
    return accuracy[~np.isnan(accuracy)]


def mean_where_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of [label rung, prompt], leaving NaN out; NaN where no entry is known."""
    known = ~np.isnan(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0.0).sum(0) / np.maximum(count, 1), np.nan)


def best_of_n_gain(folders: Folders, scores: roles.Scores, exact: np.ndarray, size: int) -> np.ndarray:
    """What best-of-N by a reward model's scores gains over one response, float64 [prompt]; ``exact`` is
    [prompt, sample]."""
    return bon.best_of_n(exact, read_scores(folders, scores), [size])[:, 0] - exact.mean(1)


def last_updates(folders: Folders, policy: roles.Policy) -> pd.Series:
    """Means of a policy's metrics over its last updates."""
    return read_metrics(folders, policy).tail(LAST_UPDATES).mean()

"""The interface of a reward, and rewards that are made of other rewards.

A reward is any object with ``score(sequences) -> float32 [sequence]``: a reward model, a verifier, or a mixture of
them. `as_reward` turns a plain function of texts into one. Trainers and samplers need no other method.
"""

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from rlhfscale.models import parallel
from rlhfscale.models.sequences import Sequences

TextFunction = Callable[[list[Any], list[str]], Sequence[float]]
"""``fn(prompts, responses)``: one number for each prompt and its response, as texts without special tokens. A prompt
that was given as a conversation is its messages."""

COMBINE = ("mean", "worst", "uncertainty", "deviation")


class Reward(Protocol):
    """An object that scores whole sequences."""

    def score(self, sequences: Sequences) -> np.ndarray:
        """The score of each sequence, float32 [sequence]; higher is better."""
        ...


class TextReward:
    """A reward from a function of texts. It needs sequences that carry their tokenizer.

    Args:
        function: called with the texts of prompts and responses; it may be async.
    """

    def __init__(self, function: TextFunction):
        self.function = function

    def score(self, sequences: Sequences) -> np.ndarray:
        """The function's scores, float32 [sequence]. Raises ValueError unless each sequence has one finite score."""

        def ask() -> Any:
            scores = self.function(sequences.asked, sequences.responses)
            return run_async(scores) if inspect.isawaitable(scores) else scores

        return asked_once(ask, len(sequences))


def as_reward(reward: Reward | TextFunction) -> Reward:
    """The reward itself, or a plain function ``fn(prompts, responses)`` as a `TextReward`.

    Raises:
        TypeError: the argument is neither; it is a torch module without a ``score`` method of its own (the ``score`` of
            a transformers model is its linear head); or it is a class instead of an object.
    """
    score = getattr(reward, "score", None)
    if isinstance(reward, type):
        raise TypeError(f"reward: {reward.__name__} is a class; give an object of it")
    if callable(score) and not isinstance(score, nn.Module):
        return reward
    if isinstance(reward, nn.Module):
        raise TypeError(f"reward: a bare {type(reward).__name__}; wrap it, e.g. OutcomeRewardModel(model, tokenizer)")
    if callable(reward):
        return TextReward(reward)
    raise TypeError(
        f"reward: {type(reward).__name__} has no method score(sequences) and is no function fn(prompts, responses)"
    )


def asked_once(ask: Callable[[], Any], count: int) -> np.ndarray:
    """The checked scores of a function that need not give the same ones twice, float32 [count]: of several processes
    the first one asks, and all have its scores, or its error."""
    if parallel.size() == 1:
        return checked(ask(), count)
    error, content = None, b""
    if parallel.rank() == 0:
        try:
            content = b"+" + checked(ask(), count).tobytes()
        except Exception as caught:
            error, content = caught, b"-" + str(caught).encode()
    content = bytes(parallel.of_first(content))
    if error is not None:
        raise error
    if content[:1] == b"-":
        raise RuntimeError(f"the first process's reward failed: {content[1:].decode()}")
    return np.frombuffer(content[1:], np.float32).copy()


def run_async(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine, in a thread of its own: a notebook's kernel already runs a loop in this one."""
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            found["result"] = asyncio.run(coroutine)
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if "error" in found:
        raise found["error"]
    return found["result"]


def checked(scores: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    """Check scores and return them as float32 [count].

    Args:
        scores: what a reward returned: one number for each sample, in a list, an array or a tensor.

    Raises:
        ValueError: it is something else; the shape is another one; or a score is NaN or infinite (names the first such
            sample).
    """
    if hasattr(scores, "detach"):
        scores = scores.detach().float().cpu()
    try:
        with np.errstate(over="ignore"):
            scores = np.asarray(scores, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # a generator, a dict, lists of unequal length
        raise ValueError(
            f"a reward returned a {type(scores).__name__}; it must return one number for each of the {count} samples,"
            " in a list, an array or a tensor"
        ) from error
    if scores.shape != (count,):
        raise ValueError(f"a reward gave scores of shape {list(scores.shape)} for {count} samples; expected [{count}]")
    if not np.isfinite(scores).all():
        sample = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"a reward gave sample {sample} the score {scores[sample]}; scores must be finite")
    return scores


def scored(reward: Reward, sequences: Sequences) -> np.ndarray:
    """The checked scores of a reward, float32 [sequence]."""
    return checked(reward.score(sequences), len(sequences))


class Mixed:
    """A weighted sum of rewards, for example of a verifier and a reward model.

    Args:
        parts: pairs (weight, reward); a reward may be a plain function.

    Raises:
        ValueError: there is no part, or a weight is not finite.
    """

    def __init__(self, parts: Sequence[tuple[float, Reward | TextFunction]]):
        if not parts:
            raise ValueError("parts: a mixture needs at least one (weight, reward)")
        for index, (weight, _) in enumerate(parts):
            if not math.isfinite(weight):
                raise ValueError(f"parts: weight {index} is {weight}; weights must be finite")
        self.parts = [(float(weight), as_reward(reward)) for weight, reward in parts]

    def score(self, sequences: Sequences) -> np.ndarray:
        return checked(sum(weight * scored(reward, sequences) for weight, reward in self.parts), len(sequences))


class Ensemble:
    """Several rewards of one scale combined into one (Coste et al. 2023, arXiv 2310.02743). Normalise them first.

    Args:
        rewards: the members.
        combine: ``mean``: the mean over the members; ``worst``: their minimum (the paper's worst-case optimisation);
            ``uncertainty``: mean minus ``penalty`` times their variance (its uncertainty-weighted optimisation);
            ``deviation``: mean minus ``penalty`` times their standard deviation, which keeps the unit of the scores
            (ours). Variance and standard deviation divide by the number of members.
        penalty: at least 0; needed by the last two, refused by the others.

    Raises:
        ValueError: no member; an unknown ``combine``; or a penalty that is missing, negative or has no use.
    """

    def __init__(self, rewards: Sequence[Reward | TextFunction], combine: str = "mean", penalty: float | None = None):
        chosen("combine", combine, COMBINE)
        if not rewards:
            raise ValueError("rewards: an ensemble needs at least one member")
        if (penalty is not None) != (combine in ("uncertainty", "deviation")):
            raise ValueError(f"penalty: {penalty} with combine={combine!r}; 'uncertainty' and 'deviation' need one")
        if penalty is not None and not 0 <= penalty < math.inf:
            raise ValueError(f"penalty: {penalty} is not a finite number of at least 0")
        self.rewards = [as_reward(reward) for reward in rewards]
        self.combine, self.penalty = combine, penalty

    def score(self, sequences: Sequences) -> np.ndarray:
        members = np.stack([scored(reward, sequences) for reward in self.rewards])
        if self.combine == "worst":
            return members.min(0)
        if self.combine == "mean":
            return members.mean(0)
        spread = members.var(0) if self.combine == "uncertainty" else members.std(0)
        return checked(members.mean(0) - self.penalty * spread, len(sequences))


class Normalised:
    """A reward shifted and scaled: ``(score - mean) / std``.

    Args:
        reward: the raw reward.
        mean, std: mean and standard deviation of its scores on reference responses, such as those it was trained on.

    Raises:
        ValueError: std is not a positive number, or mean is not finite.
    """

    def __init__(self, reward: Reward | TextFunction, mean: float, std: float):
        self.reward = as_reward(reward)
        self.mean, self.std = moments(mean, std)

    @classmethod
    def fit(cls, reward: Reward | TextFunction, sequences: Sequences) -> "Normalised":
        """Normalise to mean 0 and standard deviation 1 over sequences. Raises ValueError if all have the same score."""
        scores = scored(as_reward(reward), sequences)
        return cls(reward, float(scores.mean()), float(scores.std()))

    def score(self, sequences: Sequences) -> np.ndarray:
        return (scored(self.reward, sequences) - self.mean) / self.std


class Shrunk:
    """Asymmetric reward shrinking: scores below zero are multiplied by ``factor``, the others are kept.

    Hou et al. 2024 (arXiv 2412.06000) name the method without details. This is our reading: after normalisation, the
    punishment of a bad response is damped and the incentive of a good one is not.

    Args:
        reward: a `Normalised` reward, so that zero is the mean.
        factor: in (0, 1]; 1 changes nothing. Raises ValueError outside.
    """

    def __init__(self, reward: Reward | TextFunction, factor: float):
        if not 0 < factor <= 1:
            raise ValueError(f"factor: {factor} is not in (0, 1]")
        self.reward, self.factor = as_reward(reward), factor

    def score(self, sequences: Sequences) -> np.ndarray:
        scores = scored(self.reward, sequences)
        return np.where(scores < 0, np.float32(self.factor) * scores, scores)


def moments(mean: float, std: float) -> tuple[float, float]:
    """Check a mean and a standard deviation to normalise by, and return them as floats. Raises ValueError."""
    if not math.isfinite(mean) or not 0 <= std < math.inf:
        raise ValueError(f"mean {mean} and std {std} must be finite, and std positive")
    if std == 0:
        raise ValueError("std: 0; the reward gives every response the same score; train a reward model longer")
    return float(mean), float(std)


def chosen(name: str, value: str, allowed: Sequence[str]) -> str:
    """``value``, if it is one of the allowed names; otherwise raises a ValueError that lists them."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, allowed))}")
    return value

"""What the verifier's labels give a reward model to learn from: comparisons, correctness, and right or wrong steps."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhfscale.bed import tasks
from rlhfscale.bed.demonstrations import encode_prompts, token_ids
from rlhfscale.bed.responses import Responses, decode
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards.labelled import Labelled, StepLabelled, step_ends
from rlhfscale.rewards.outcome import OutcomeRewardModel
from rlhfscale.samplers.base import Completions


def sequences_of(responses: Responses, tokenizer: PreTrainedTokenizerBase | None = None) -> Sequences:
    """Stored responses as sequences, the samples of each prompt in a row."""
    ids, lengths = responses.sequences()
    prompts = np.repeat(responses.prompt_lengths.astype(np.int64), responses.num_samples)
    flat = ids.reshape(-1, ids.shape[2]), prompts, lengths.reshape(-1), responses.finished.reshape(-1)
    return Sequences(*flat, tokenizer)


def labelled(responses: Responses, tokenizer: PreTrainedTokenizerBase | None = None) -> Labelled:
    """Labels of whole responses: a prompt's samples are a group, ``correct`` is an exactly right answer."""
    group = np.repeat(np.arange(responses.num_prompts), responses.num_samples)
    gold, correct = responses.gold.reshape(-1), responses.exact.reshape(-1).astype(np.float32)
    return Labelled(sequences_of(responses, tokenizer), group, gold, correct)


def scores_of(reward: OutcomeRewardModel, responses: Responses) -> np.ndarray:
    """Raw scores of stored responses in the model's tokens, float32 [prompt, sample]."""
    return reward.score(sequences_of(responses)).reshape(responses.gold.shape)


def step_ids() -> tuple[int, ...]:
    """The token that closes a step, as the bed's tokenizer maps it."""
    return (token_ids()[tasks.STEP],)


def steps_of_completions(
    problems: Sequence[tasks.Problem], completions: Completions, tokenizer: PreTrainedTokenizerBase | None = None
) -> StepLabelled:
    """Label completions by the tasks' step checkers; ``completions`` holds the samples of each problem in a row."""
    rows = zip(completions.ids, completions.lengths, strict=True)
    responses = [row[:length].tolist() for row, length in rows]
    prompts = _repeated(encode_prompts(problems), len(responses))
    return _graded(problems, Sequences.join(prompts, responses, completions.finished, tokenizer))


def steps_of_responses(
    problems: Sequence[tasks.Problem], responses: Responses, tokenizer: PreTrainedTokenizerBase | None = None
) -> StepLabelled:
    """The same for stored responses, whose problems are asked for again: they do not say which steps are right."""
    return _graded(problems, sequences_of(responses, tokenizer))


def _graded(problems: Sequence[tasks.Problem], sequences: Sequences) -> StepLabelled:
    """One label for each step end; an empty step begun by a separator at which the response was cut has none."""
    num_steps = step_ends(sequences, step_ids()).sum(1)
    labels = np.full((len(sequences), int(num_steps.max())), np.nan, np.float32)
    for row, problem in enumerate(_repeated(problems, len(sequences))):
        response = sequences.ids[row, sequences.prompt_lengths[row] : sequences.lengths[row]]
        steps = tasks.grade(problem, decode(response.tolist()), bool(sequences.finished[row])).steps
        labels[row, : num_steps[row]] = steps[: num_steps[row]]
    return StepLabelled(sequences, labels)


def _repeated(items: Sequence, count: int) -> list:
    """Each item as often as it takes to make ``count``. Raises ValueError where that is no whole number."""
    if not len(items) or count % len(items):
        raise ValueError(f"{count} responses are not a whole number of samples to each of {len(items)} problems")
    return [item for item in items for _ in range(count // len(items))]

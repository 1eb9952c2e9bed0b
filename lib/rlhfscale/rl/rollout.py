"""Roll-outs: sampled responses with everything PPO needs to learn from them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from rlhfscale import models
from rlhfscale.rl.kl import kl_terms
from rlhfscale.samplers import hf
from rlhfscale.samplers.base import Completions

RewardFunction = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Maps ids (int64 [sequence, length], prompt and response joined, padded on the right), prompt lengths and lengths
(both int64 [sequence]) to rewards (float [sequence])."""


@dataclass(frozen=True)
class Rollouts:
    """A batch of responses. Tensors over tokens are [batch, response]; column t is the response's token t.

    Attributes:
        ids: int64 [batch, length], prompt and response joined, padded on the right.
        attention_mask: int64 [batch, length].
        prompt_lengths: int64 [batch].
        mask: bool [batch, response], response tokens, end-of-sequence included.
        finished: bool [batch].
        logprobs: float32, of the policy that sampled, at the sampling temperature, recomputed by the trainer.
        ref_logprobs: float32, of the reference.
        values: float32, the critic's estimate before each token.
        scores: float32 [batch], the reward model's score of the whole response, penalty for no end included.
        sampler_gap: largest absolute difference between the sampler's and the trainer's log-probabilities.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_lengths: torch.Tensor
    mask: torch.Tensor
    finished: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    sampler_gap: float

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: torch.Tensor) -> "Rollouts":
        """The roll-outs at ``index``, without columns that only hold padding."""
        length, response = int(self.attention_mask[index].sum(1).max()), int(self.mask[index].sum(1).max())
        return Rollouts(
            ids=self.ids[index, :length],
            attention_mask=self.attention_mask[index, :length],
            prompt_lengths=self.prompt_lengths[index],
            mask=self.mask[index, :response],
            finished=self.finished[index],
            logprobs=self.logprobs[index, :response],
            ref_logprobs=self.ref_logprobs[index, :response],
            values=self.values[index, :response],
            scores=self.scores[index],
            sampler_gap=self.sampler_gap,
        )


def response_columns(x: torch.Tensor, prompt_lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Gather the positions from which the response's tokens are predicted: [batch, length, ...] -> [batch, width, ...].

    Token t of the response is predicted at position ``prompt_length - 1 + t``. Columns past the end repeat the last
    position; they are masked by the caller.
    """
    position = (prompt_lengths[:, None] - 1 + torch.arange(width)).clamp(max=x.shape[1] - 1)
    return x[torch.arange(len(x))[:, None], position]


def token_logprobs(shared: models.SharedBase, batch: Rollouts, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the response tokens under the active adapter.

    The output head is applied to response positions only.

    Returns:
        logprobs and entropy in nats, both float32 [batch, response]; 0 outside the mask.
    """
    hidden = shared.hidden(batch.ids, batch.attention_mask)
    selected = response_columns(hidden, batch.prompt_lengths, batch.mask.shape[1])[batch.mask]
    distribution = torch.log_softmax(shared.output_head(selected).float() / temperature, dim=-1)
    target = response_targets(batch)[batch.mask]
    logprobs = distribution.new_zeros(batch.mask.shape)
    entropy = distribution.new_zeros(batch.mask.shape)
    logprobs[batch.mask] = distribution.gather(1, target[:, None]).squeeze(1)
    entropy[batch.mask] = -(distribution.exp() * distribution).sum(1)
    return logprobs, entropy


def token_values(shared: models.SharedBase, batch: Rollouts) -> torch.Tensor:
    """The critic's values float32 [batch, response]; the critic adapter must be active."""
    hidden = response_columns(shared.hidden(batch.ids, batch.attention_mask), batch.prompt_lengths, batch.mask.shape[1])
    return shared.value_head(hidden).float() * batch.mask


def response_targets(batch: Rollouts) -> torch.Tensor:
    """int64 [batch, response]: the response's token ids."""
    position = batch.prompt_lengths[:, None] + torch.arange(batch.mask.shape[1])
    return batch.ids.gather(1, position.clamp(max=batch.ids.shape[1] - 1))


def token_rewards(rollouts: Rollouts, kl_coefficient: float) -> torch.Tensor:
    """``r_t = -beta (log pi - log ref)_t``, plus the score at the response's last token: float32 [batch, response].

    The last token of a finished response is its end-of-sequence token, so the score lands there, never on padding.
    """
    rewards = -kl_coefficient * kl_terms(rollouts.logprobs, rollouts.ref_logprobs, "k1") * rollouts.mask
    last = rollouts.mask.sum(1) - 1
    rewards[torch.arange(len(rewards)), last] += rollouts.scores
    return rewards


@torch.no_grad()
def collect(
    shared: models.SharedBase,
    reward: RewardFunction,
    prompts: list[list[int]],
    seeds: np.ndarray,
    *,
    temperature: float,
    max_new_tokens: int,
    missing_eos_penalty: float,
) -> tuple[Rollouts, Completions]:
    """Sample one response to each prompt, score it, and evaluate policy, reference and critic on it.

    Raises:
        ValueError: the reward function returned another length, or a value that is not finite (names the index).
    """
    completions = hf.sample(
        shared.merged_policy(), prompts, seeds=seeds, max_new_tokens=max_new_tokens, temperature=temperature
    )
    batch = _join(prompts, completions)
    lengths = batch.attention_mask.sum(1)
    rewards = reward(batch.ids.numpy(), batch.prompt_lengths.numpy(), lengths.numpy())
    scores = _checked(rewards, len(prompts))
    scores = torch.from_numpy(scores) - missing_eos_penalty * (~batch.finished)
    shared.use(models.POLICY)
    logprobs, _ = token_logprobs(shared, batch, temperature)
    with shared.reference():
        ref_logprobs, _ = token_logprobs(shared, batch, temperature)
    shared.use(models.CRITIC)
    values = token_values(shared, batch)
    sampled = torch.from_numpy(completions.logprobs[:, : batch.mask.shape[1]])
    gap = ((logprobs - sampled).abs() * batch.mask).max().item()
    evaluated = {
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "values": values,
        "scores": scores,
        "sampler_gap": gap,
    }
    return Rollouts(**{**vars(batch), **evaluated}), completions


def _join(prompts: list[list[int]], completions: Completions) -> Rollouts:
    """Prompts and responses side by side, with log-probabilities, values and scores still to be filled in."""
    lengths = [len(prompt) for prompt in prompts]
    width = int(completions.lengths.max())
    ids = torch.zeros(len(prompts), int((np.array(lengths) + completions.lengths).max()), dtype=torch.long)
    attention_mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        sequence = [*prompt, *completion.token_ids]
        ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
    mask = torch.arange(width) < torch.from_numpy(completions.lengths)[:, None]
    empty = torch.zeros(mask.shape)
    return Rollouts(
        ids=ids,
        attention_mask=attention_mask,
        prompt_lengths=torch.tensor(lengths),
        mask=mask,
        finished=torch.from_numpy(completions.finished),
        logprobs=empty,
        ref_logprobs=empty,
        values=empty,
        scores=torch.zeros(len(prompts)),
        sampler_gap=0.0,
    )


def _checked(scores: np.ndarray, count: int) -> np.ndarray:
    scores = np.asarray(scores, np.float32)
    if scores.shape != (count,):
        raise ValueError(f"the reward function returned shape {list(scores.shape)} for {count} responses")
    if not np.isfinite(scores).all():
        index = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"the reward of response {index} is {scores[index]}")
    return scores

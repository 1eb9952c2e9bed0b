"""Roll-outs: sampled responses with all that a trainer learns from, and their evaluation under the networks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rlhfscale.models import packing, parallel
from rlhfscale.models.sequences import Conversation, Sequences
from rlhfscale.rl.logprobs import response_tokens, token_logprobs, with_entropy_gradient
from rlhfscale.samplers.base import Completions
from rlhfscale.samplers.prompts import Prompt, encode, joined

__all__ = ["Evaluation", "Prompt", "Rollouts", "encode", "joined"]


@dataclass(frozen=True)
class Rollouts:
    """A batch of responses. Tensors over tokens are [batch, response]; column t is token t of the response.

    Attributes:
        ids: int64 [batch, length], prompt and response joined, padded on the right.
        prompt_lengths: int64 [batch], tokens of each prompt.
        lengths: int64 [batch], tokens of prompt and response together.
        mask: bool [batch, response], the response tokens, end-of-sequence included.
        finished: bool [batch], whether the response ended by end-of-sequence.
        scores: float32 [batch], the reward of the whole response, less the penalties for a missing end and for length.
        sampler_logprobs: float32, the sampler's log-probabilities; a diagnostic only.
        logprobs: float32, log-probabilities under the policy that sampled, computed by the trainer at the temperature.
        ref_logprobs: float32, log-probabilities under the reference.
        values: float32, the critic's estimate before each token; 0 without a critic.
        advantages, returns: float32; 0 until the trainer has estimated them.
        weights: float32, how much each token counts in the loss of its step; they sum to 1 over the step.
    """

    ids: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    finished: torch.Tensor
    scores: torch.Tensor
    sampler_logprobs: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: torch.Tensor) -> "Rollouts":
        """The roll-outs at ``index``, without columns that only hold padding."""
        length, response = int(self.lengths[index].max()), int(self.mask[index].sum(1).max())
        taken = {name: tensor[index] for name, tensor in vars(self).items()}
        taken["ids"] = taken["ids"][:, :length]
        not_by_token = {"ids", "prompt_lengths", "lengths", "finished", "scores"}
        return Rollouts(**taken | {name: taken[name][:, :response] for name in taken.keys() - not_by_token})

    def passes(self, max_tokens: int) -> Iterator["Rollouts"]:
        """All roll-outs, in parts of similar length with at most ``max_tokens`` tokens, padding included."""
        if self.ids.numel() <= max_tokens:
            yield self
        else:
            yield from (self[index] for index in split(self.lengths, max_tokens))

    def learnt(self, mask_truncated: bool) -> torch.Tensor:
        """The tokens that are learnt from, bool [batch, response]: all, or those of finished responses."""
        return self.mask & self.finished[:, None] if mask_truncated else self.mask

    def sequences(
        self, tokenizer: PreTrainedTokenizerBase, talks: Mapping[tuple[int, ...], Conversation] | None = None
    ) -> Sequences:
        """The prompts joined with their responses, as rewards take them; ``talks`` has the conversations that prompts
        were made from, by their ids."""
        arrays = (self.ids, self.prompt_lengths, self.lengths, self.finished)
        ids, starts, lengths, finished = (array.cpu().numpy() for array in arrays)
        found = None
        if talks:
            rows = zip(ids.tolist(), starts.tolist(), strict=True)
            found = tuple(talks.get(tuple(row[:start])) for row, start in rows)
        return Sequences(ids, starts, lengths, finished, tokenizer, found)

    @property
    def sampler_gaps(self) -> torch.Tensor:
        """float32 [token]: the trainer's log-probability of each response token less the sampler's, in nats."""
        return (self.logprobs - self.sampler_logprobs)[self.mask]

    @property
    def sampler_gap(self) -> float:
        """The largest absolute value of `sampler_gaps`, in nats."""
        return self.sampler_gaps.abs().max().item()


@dataclass(frozen=True)
class Evaluation:
    """Log-probabilities, entropies and values of roll-outs under the networks as they are now.

    Each is float32 [batch, response], and 0 outside the mask; ``values`` is None where no critic was evaluated.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None


def evaluate(
    networks, batch: Rollouts, role: str, temperature: float, *, entropy_gradient: bool = False, fp32: bool = False
) -> Evaluation:
    """Evaluate the response tokens under a role: log-probabilities, entropies, and values if the role carries them.

    Token t of a response is predicted at position ``prompt_length - 1 + t``; the heads run on these positions only.
    Entropies have a gradient only with ``entropy_gradient``; ``fp32`` is of the output head, see `token_logprobs`.
    """
    rows = parallel.own(len(batch)).to(batch.ids.device)
    states, tokens = _own_states(networks, batch, role, rows)
    read = with_entropy_gradient if entropy_gradient else token_logprobs
    logprobs, entropy = read(states, networks.output_head(role), tokens, temperature, fp32=fp32)
    values = networks.value_head(states) if networks.value_head and role == networks.critic_role else None
    return Evaluation(*(x if x is None else _of_batch(x, batch.mask, rows) for x in (logprobs, entropy, values)))


def evaluate_values(networks, batch: Rollouts) -> torch.Tensor:
    """Values of a critic with a trunk of its own: float32 [batch, response]."""
    rows = parallel.own(len(batch)).to(batch.ids.device)
    states, _ = _own_states(networks, batch, networks.critic_role, rows)
    return _of_batch(networks.value_head(states), batch.mask, rows)


def _own_states(networks, batch: Rollouts, role: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states [token, width] that predict the response tokens of this process's rows, and these tokens."""
    batch = batch[rows] if len(rows) < len(batch) else batch
    response, before = response_tokens(batch.ids, batch.prompt_lengths, batch.lengths)
    states = networks.hidden_at(batch.ids, before, role, batch.prompt_lengths, batch.lengths)
    return states, batch.ids[response]


def _of_batch(tokens: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[batch, response] of all processes, from one number [token] for each response token of this process's rows."""
    own = mask[rows]
    return parallel.whole(tokens.new_zeros(own.shape).masked_scatter(own, tokens), rows, len(mask))


def split(lengths: torch.Tensor, max_tokens: int) -> Iterator[torch.Tensor]:
    """Indices of parts of similar length: at most ``max_tokens`` tokens with padding in each, or one sequence."""
    for index in packing.cut(lengths.cpu().numpy(), max_tokens):
        yield torch.from_numpy(index).to(lengths.device)


Read = Callable[[Rollouts], Evaluation]


@torch.no_grad()
def evaluate_all(
    read: Read, rollouts: Rollouts, max_tokens: int, known: tuple[torch.Tensor, Evaluation] | None = None
) -> Evaluation:
    """Evaluate all roll-outs by ``read``, without gradients, in passes of at most ``max_tokens`` tokens.

    ``known`` may give some of them: their index (int64 [minibatch]) and their evaluation.
    """
    parts = [known] if known else []
    left = torch.ones(len(rollouts), dtype=torch.bool)
    if known:
        left[known[0].cpu()] = False
    rest = left.nonzero()[:, 0].to(rollouts.lengths.device)
    for part in split(rollouts.lengths[rest], max_tokens) if len(rest) else ():
        parts.append((rest[part], read(rollouts[rest[part]])))
    found: dict[str, torch.Tensor] = {}
    for index, evaluation in parts:
        for name, tensor in vars(evaluation).items():
            if tensor is not None:
                whole = found.setdefault(name, tensor.new_zeros(rollouts.mask.shape))
                whole[index, : tensor.shape[1]] = tensor
    return Evaluation(found["logprobs"], found["entropy"], found.get("values"))


def evaluate_before_training(
    read: Read, rollouts: Rollouts, max_tokens: int, first: torch.Tensor
) -> tuple[Evaluation, Evaluation | None]:
    """Evaluate all roll-outs, and keep the evaluation that the first step needs: its networks are still the same.

    Args:
        first: int64 [minibatch], the roll-outs of the first step.

    Returns:
        the evaluation of all, without gradients; and that of the first minibatch with gradients, or None where it takes
        several passes.
    """
    batch = rollouts[first]
    if batch.ids.numel() > max_tokens:
        return evaluate_all(read, rollouts, max_tokens), None
    now = read(batch)
    return evaluate_all(read, rollouts, max_tokens, (first, now)), now


def from_sequences(sequences: Sequences, completions: Completions, device: torch.device) -> Rollouts:
    """Roll-outs of sampled sequences on a device; log-probabilities, values and scores are still 0."""
    responses = torch.from_numpy(completions.lengths)
    width = int(responses.max())
    mask = torch.arange(width) < responses[:, None]
    empty = ("logprobs", "ref_logprobs", "values", "advantages", "returns", "weights")
    batch = Rollouts(
        ids=torch.from_numpy(sequences.ids),
        prompt_lengths=torch.from_numpy(sequences.prompt_lengths),
        lengths=torch.from_numpy(sequences.lengths),
        mask=mask,
        finished=torch.from_numpy(sequences.finished),
        scores=torch.zeros(len(sequences)),
        sampler_logprobs=torch.from_numpy(completions.logprobs[:, :width].copy()),
        **dict.fromkeys(empty, torch.zeros(mask.shape)),
    )
    return Rollouts(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def token_rewards(rollouts: Rollouts, scores: torch.Tensor, kl: torch.Tensor, kl_coefficient: float) -> torch.Tensor:
    """Rewards of tokens, float32 [batch, response]: ``r_t = -beta KL_t``, plus the score at the last response token.

    The last token of a finished response is its end-of-sequence token, so the score lands there, never on padding.

    Args:
        scores: float32 [batch].
        kl: float32 [batch, response], an estimate of KL(policy || reference) at each token.
    """
    rewards = -kl_coefficient * kl * rollouts.mask
    last = rollouts.mask.sum(1) - 1
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards

"""Log-probabilities of chosen tokens from hidden states, without ever holding the logits of all positions.

Logits are formed for a few rows at a time. With a frozen output head, ``d log p(y) / d h = (W_y - sum_v p_v W_v) / T``
is computed along with them and kept instead: the backward pass is one product with a number for each token. So neither
pass holds more than `CHUNK` logits, and nothing is computed twice.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from rlhfscale.models import sharding

CHUNK = 2**22
"""Logits held at a time; 16 MiB in float32."""


def response_tokens(
    ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ids [sequence, length] padded on the right, bool [sequence, length]: the responses' tokens, and the tokens
    before them, at which they are predicted."""
    column = torch.arange(ids.shape[1], device=ids.device)
    response = (column >= prompt_lengths[:, None]) & (column < lengths[:, None])
    return response, response.roll(-1, 1)  # no response begins in the first column: a prompt has a token


def token_logprobs(
    hidden: torch.Tensor, head: nn.Module, tokens: torch.Tensor, temperature: float, *, fp32: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies at a temperature.

    Args:
        hidden: [token, width], last hidden states from which each token is predicted.
        head: the output head, [.., width] -> [.., vocabulary].
        tokens: int64 [token], the chosen tokens.
        temperature: what logits are divided by.
        fp32: compute the head's product in float32, whatever its dtype.

    Returns:
        logprobs and entropy in nats, both float32 [token]. Differentiable; the entropy by `with_entropy_gradient` only.
    """
    if isinstance(head, nn.Linear) and head.weight.is_floating_point() and not head.weight.requires_grad:
        with sharding.whole(head):
            weight, bias = head.weight, head.bias
            if fp32:
                hidden, weight, bias = hidden.float(), weight.float(), bias if bias is None else bias.float()
            return FrozenHead.apply(hidden, weight, bias, tokens, temperature)
    return with_entropy_gradient(hidden, head, tokens, temperature, fp32=fp32)


def with_entropy_gradient(
    hidden: torch.Tensor, head: nn.Module, tokens: torch.Tensor, temperature: float, *, fp32: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_logprobs`, with an entropy that can be differentiated; logits are computed again in the backward
    pass."""
    size = _rows(head.weight.shape[0])
    return sharding.call(head, _chunked, hidden, tokens, temperature, size, fp32)


def _rows(vocabulary: int) -> int:
    return max(1, CHUNK // vocabulary)


def _chunked(head, hidden, tokens, temperature, size, fp32):
    parts = []
    for h, y in zip(hidden.split(size), tokens.split(size), strict=True):
        again = torch.is_grad_enabled() and len(hidden) > size
        parts.append(
            checkpoint(_plain, head, h, y, temperature, fp32, use_reentrant=False)
            if again
            else _plain(head, h, y, temperature, fp32)
        )
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _plain(head, hidden, tokens, temperature, fp32):
    logits = functional_call(head, _floats(head), hidden.float()) if fp32 else head(hidden).float()
    distribution = torch.log_softmax(logits / temperature, dim=-1)
    entropy = -(distribution.exp() * distribution).sum(1)
    return distribution.gather(1, tokens[:, None]).squeeze(1), entropy


def _floats(head: nn.Module) -> dict[str, torch.Tensor]:
    """A head's parameters and buffers in float32, with gradients to its own."""
    named = (*head.named_parameters(), *head.named_buffers())
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in named}


class FrozenHead(torch.autograd.Function):
    """See the module's text. The entropy has no gradient here."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, temperature):
        need = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if need else None
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        size = _rows(weight.shape[0])
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = F.linear(hidden[part], weight, bias).float()
            if temperature != 1:
                logits /= temperature
            total = torch.logsumexp(logits, -1)
            logprobs[part] = logits.gather(1, tokens[part, None]).squeeze(1) - total
            p = torch.softmax(logits, -1)
            entropy[part] = total - torch.linalg.vecdot(p, logits)
            if need:
                chosen = weight[tokens[part]]
                slope[part] = torch.addmm(chosen, p.to(weight.dtype), weight, alpha=-1).div_(temperature)
        ctx.mark_non_differentiable(entropy)
        if need:
            ctx.save_for_backward(slope)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None].to(slope.dtype)), None, None, None, None

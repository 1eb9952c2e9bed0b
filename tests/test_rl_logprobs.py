"""Log-probabilities from hidden states: their values, gradients and entropies, and that no pass holds all logits."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_rl
from rlhfscale.rl import GRPO, PPO, RLOO, logprobs

HEADS = ["frozen", "frozen with bias", "trainable", "not plainly linear"]


class Wrapped(nn.Linear):
    """What adapters make of a linear layer: another class."""


def make_head(kind, vocabulary=50, width=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    built = (Wrapped if kind == "not plainly linear" else nn.Linear)(width, vocabulary, "bias" in kind, dtype=dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return built.requires_grad_(kind == "trainable")


def inputs(tokens=30, vocabulary=50, width=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(vocabulary, (tokens,), generator=generator)


def plain(hidden, head, tokens, temperature):
    """Through the full logits in float64."""
    weight, bias = head.weight.double(), None if head.bias is None else head.bias.double()
    distribution = torch.log_softmax(nn.functional.linear(hidden.double(), weight, bias) / temperature, -1)
    return distribution.gather(1, tokens[:, None])[:, 0], -(distribution.exp() * distribution).sum(1)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [30, 7, 1])
def test_logprobs_and_their_gradients_equal_log_softmax(kind, temperature, rows, monkeypatch):
    """However many rows are taken at a time."""
    monkeypatch.setattr(logprobs, "CHUNK", rows * 50)
    head, (hidden, tokens) = make_head(kind), inputs()
    slope = torch.randn(30, generator=torch.Generator().manual_seed(2))
    expected, entropy = plain(hidden, head, tokens, temperature)
    found, found_entropy = logprobs.token_logprobs(hidden, head, tokens, temperature)
    assert found.dtype == found_entropy.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    theirs = torch.autograd.grad((expected * slope).sum(), wanted)
    for ours, other in zip(torch.autograd.grad((found * slope).sum(), wanted), theirs, strict=True):
        assert tiny_rl.relative(ours, other) < 1e-5


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rows", [30, 7])
def test_the_gradient_of_the_entropy(kind, rows, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", rows * 50)
    head, (hidden, tokens) = make_head(kind), inputs()
    slope = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    found, theirs = logprobs.with_entropy_gradient(hidden, head, tokens, 0.7), plain(hidden, head, tokens, 0.7)
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    ours, expected = (torch.autograd.grad((torch.stack(pair) * slope).sum(), wanted) for pair in (found, theirs))
    for a, b in zip(ours, expected, strict=True):
        assert tiny_rl.relative(a, b) < 1e-5


def test_a_bfloat16_head_is_as_exact_as_its_logits():
    head, (hidden, tokens) = make_head("frozen", dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    expected, _ = plain(hidden, head, tokens, 1.0)
    found, _ = logprobs.token_logprobs(hidden, head, tokens, 1.0)
    rounded = torch.log_softmax(head(hidden).float(), -1).gather(1, tokens[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rounded)  # float32 from the bfloat16 logits on
    (ours,), (theirs,) = torch.autograd.grad(found.sum(), hidden), torch.autograd.grad(expected.sum(), hidden)
    assert ours.dtype == torch.bfloat16 and tiny_rl.relative(ours, theirs) < 0.02


class Largest(TorchDispatchMode):
    """The most elements that any operation's result has had within this context."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


VOCABULARY = 256 * 234


@pytest.mark.parametrize("kind", ["frozen", "trainable"])
@pytest.mark.parametrize("read", [logprobs.token_logprobs, logprobs.with_entropy_gradient])
def test_neither_pass_holds_more_logits_than_a_chunk(kind, read):
    head, (hidden, tokens) = make_head(kind, VOCABULARY, 8), inputs(200, VOCABULARY, 8)
    with Largest() as largest:
        found, _ = read(hidden, head, tokens, 1.0)
        found.sum().backward()
    assert VOCABULARY < largest.elements <= logprobs.CHUNK < len(tokens) * VOCABULARY


@pytest.mark.parametrize("algorithm", [PPO, GRPO, RLOO])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_no_update_holds_the_logits_of_all_positions(algorithm, adapter, monkeypatch):
    """Sampling holds those of one position of each request, the update those of a chunk."""
    monkeypatch.setattr(logprobs, "CHUNK", 2 * VOCABULARY)
    base = tiny_rl.language_model(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    changes = {"adapter": adapter, "entropy_coefficient": 0.01} if adapter == "none" else {}
    run = tiny_rl.trainer(
        algorithm, base=base, max_new_tokens=6, epochs=1, minibatch_size=8, prompts_per_update=8, **changes
    )
    with Largest() as largest:
        metrics = tiny_rl.updates(run, 1)[0]
    assert metrics["response_tokens"] * 16 > 60  # tokens whose logits were needed
    assert largest.elements <= 16 * VOCABULARY  # 16 requests are decoded together; the weights are smaller

"""Tiny models, prompts and documents for the tests of the trainers."""

import torch

from rlhfscale.bed import ladder, rungs, tasks
from rlhfscale.bed.demonstrations import demonstrations, encode_prompts, problem_list
from rlhfscale.models.documents import Documents

FAMILIES = tuple(tasks.FAMILIES)


def model(seed: int = 0, scale: float = 6.0):
    """The smallest rung with enlarged random matrices, so that its distributions are far from uniform."""
    built = rungs.build_rung(ladder.rung("25k"), seed).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return built


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    return encode_prompts(problem_list((seed, 99), "train", FAMILIES, count))


def documents(count: int, seed: int = 0) -> Documents:
    return demonstrations((seed, 98), "train", FAMILIES, count, slip=0.1)


def weights(module) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two copies are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def full_logprobs(network, sequence, temperature: float = 1.0) -> torch.Tensor:
    """float32 [length - 1, vocabulary]: log-softmax of a plain forward pass over one sequence without padding."""
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([list(sequence)])).logits[0, :-1].float()
    return torch.log_softmax(logits / temperature, -1)

"""BatchedMuon against torch.optim.Muon, which orthogonalises one matrix at a time in bfloat16."""

import inspect

import pytest
import torch
from torch.optim import _muon

from rlhfscale.models.optim import BatchedMuon, orthogonalise

SHAPES = [(16, 16), (16, 16), (16, 16), (44, 16), (16, 44), (44, 16), (8, 24)]


def trained(kind, num_steps=6, weight_decay=0.1, **options):
    """The parameters after steps on one fixed sequence of gradients; the third parameter once has none."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = kind(parameters, lr=0.03, momentum=0.9, weight_decay=weight_decay, **options)
    trace = []
    for step in range(num_steps):
        for index, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** (index - 3)
            parameter.grad = None if (step, index) == (2, 2) else gradient
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        trace.append([parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)])
    return trace, [parameter.detach() for parameter in parameters]


def test_updates_equal_torch_muon_to_bfloat16():
    for ours, theirs in zip(trained(BatchedMuon)[0], trained(torch.optim.Muon)[0], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 0.03 * b.norm()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parameters_equal_torch_muon_in_float32(monkeypatch, weight_decay):
    """The oracle once more with its one cast to bfloat16 taken out: then they agree to float32."""
    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    assert source.count("bfloat16()") == 1
    namespace = dict(vars(_muon))
    exec(source.replace("bfloat16()", "float()"), namespace)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", namespace["_zeropower_via_newtonschulz"])
    theirs = trained(torch.optim.Muon, weight_decay=weight_decay)[1]
    for a, b in zip(trained(BatchedMuon, weight_decay=weight_decay)[1], theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_orthogonalise_keeps_singular_vectors_and_pushes_values_towards_one():
    x = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(1))
    y = orthogonalise(x)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    rotated = u.mT @ y @ vh.mT
    values = rotated.diagonal(dim1=1, dim2=2)
    assert (rotated - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.min() > 0.6 and values.max() < 1.3

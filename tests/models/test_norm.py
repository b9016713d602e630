"""Instance norm, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medseg.models.norm import InstanceNorm, norm_activation, with_quick_norms


def pair(shape: tuple[int, ...]) -> tuple[nn.Module, InstanceNorm, Tensor]:
    torch.manual_seed(0)
    theirs = (nn.InstanceNorm3d if len(shape) == 5 else nn.InstanceNorm2d)(shape[1], affine=True)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    return theirs, InstanceNorm(theirs), 3 * torch.randn(shape) + 1


@pytest.mark.parametrize("shape", [(2, 5, 6, 4, 3), (3, 4, 7, 5)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    theirs, ours, x = pair(shape)
    found = []
    for norm in (theirs, ours):
        given = x.clone().requires_grad_()
        out = norm.train()(given)
        weight, bias = norm.weight, norm.bias
        grads = torch.autograd.grad((out * out.detach().cos()).sum(), [given, weight, bias])  # type: ignore[list-item]
        found.append((out, *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_learnt_is_not_what_is_used_later() -> None:
    theirs, ours, x = pair((2, 5, 6, 4, 3))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_an_activation_can_go_with_it() -> None:
    _, ours, x = pair((2, 5, 6, 4))
    with_it = norm_activation(x, ours.weight, ours.bias, ours.epsilon, 0.1)
    torch.testing.assert_close(with_it, nn.functional.leaky_relu(ours.train()(x), 0.1))


def test_names_and_weights_stay() -> None:
    network = nn.Sequential(nn.Conv3d(1, 3, 1), nn.Sequential(nn.InstanceNorm3d(3, affine=True), nn.InstanceNorm3d(3)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    after = with_quick_norms(network).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

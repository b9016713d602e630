from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from medseg.models.build import build
from medseg.models.unet import Block
from medseg.plan.plan import Configuration, Decision, Network

ISOTROPIC = ([(3, 3, 3)] * 4, [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)])
THICK = ([(3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3)], [(1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2)])
SAGITTAL = ([(1, 3, 3), (3, 3, 3)], [(1, 1, 1), (1, 2, 2)])
STRIDES = ([(3, 5, 1), (3, 5, 1), (3, 1, 3)], [(1, 1, 1), (3, 4, 1), (1, 2, 2)])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def configured(how: Any, patch: tuple[int, int, int], flat: Any = None) -> Configuration:
    kernels, strides = how
    features = tuple(4 * 2**n for n in range(len(kernels)))
    network = Network(features=features, kernels=tuple(kernels), strides=tuple(strides))
    return Configuration(
        dimensions=3 if flat is None else 2,
        slice_axis=flat,
        spacing=Decision(value=(1.0, 1.0, 1.0)),
        patch=Decision(value=patch),
        batch=Decision(value=2),
        network=Decision(value=network),
    )


def flattened(axis: int) -> Any:
    one = tuple(1 if a == axis else 3 for a in range(3))
    two = tuple(1 if a == axis else 2 for a in range(3))
    return [one] * 4, [(1, 1, 1), two, two, two]


CONFIGURATIONS = {
    "isotropic": configured(ISOTROPIC, (16, 24, 16)),
    "thick slices": configured(THICK, (16, 24, 6)),
    "two stages": configured(SAGITTAL, (5, 8, 8)),
    "other strides": configured(STRIDES, (9, 16, 4)),
    "2d axial": configured(flattened(2), (16, 24, 1), 2),
    "2d sagittal": configured(flattened(0), (1, 16, 24), 0),
    "2d coronal": configured(flattened(1), (16, 1, 24), 1),
}
EACH = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


def plane(configuration: Configuration, values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(v for axis, v in enumerate(values) if axis != configuration.slice_axis)


def made(configuration: Configuration, channels: int = 1, classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(configuration, channels, classes)


def scan(configuration: Configuration, channels: int, batch: int = 2) -> Tensor:
    size = (batch, channels, *plane(configuration, configuration.patch.value))
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@EACH
@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (2, 3), (4, 6)])
def test_logits_have_the_patchs_size(configuration: Configuration, channels: int, classes: int) -> None:
    image = scan(configuration, channels)
    with torch.no_grad():
        out = made(configuration, channels, classes).eval()(image)
    assert isinstance(out, Tensor)
    assert out.shape == (2, classes, *image.shape[2:])
    assert out.isfinite().all()


@EACH
def test_any_multiple_of_the_strides_will_do(configuration: Configuration) -> None:
    size = [2 * d for d in plane(configuration, configuration.network.value.divisor)]
    with torch.no_grad():
        assert made(configuration).eval()(torch.zeros(1, 1, *size)).shape == (1, 3, *size)


@EACH
def test_in_training_there_is_a_list_finest_first(configuration: Configuration) -> None:
    out = made(configuration).train()(scan(configuration, 1))
    strides = configuration.network.value.strides
    assert isinstance(out, list)
    assert len(out) == 1 + min(2, len(strides) - 2)
    expected = plane(configuration, configuration.patch.value)
    for logits, after in zip(out, strides[1:], strict=False):
        assert logits.shape == (2, 3, *expected)
        expected = tuple(n // s for n, s in zip(expected, plane(configuration, after), strict=True))


@EACH
def test_the_finest_logits_are_the_same_in_training(configuration: Configuration) -> None:
    network, image = made(configuration), scan(configuration, 1)
    with torch.no_grad():
        assert torch.allclose(network.train()(image)[0], network.eval()(image), atol=1e-4)


@EACH
def test_training_has_the_gradients_of_plain_norm_and_activation(configuration: Configuration) -> None:
    network = made(configuration).double().train()
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if isinstance(module, Block):
            for norm in (module.norm1, module.norm2):
                torch.nn.init.normal_(norm.weight)
                torch.nn.init.normal_(norm.bias)
    network.load_state_dict(plain.state_dict())
    for module in plain.modules():
        if isinstance(module, Block):
            module.eval()  # takes the layers one by one
    image = scan(configuration, 1).double()
    for one in (network, plain):
        sum((out**3).mean() for out in one(image)).backward()
    for (name, mine), expected in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, expected.grad, rtol=1e-9, atol=1e-12), name


@EACH
def test_gradients_reach_every_parameter(configuration: Configuration) -> None:
    network = made(configuration).train()
    sum((out**2).sum() for out in network(scan(configuration, 1))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A constant added before instance normalisation is taken out again.
        if not (name.endswith("conv.bias") and "output" not in name):
            assert parameter.grad.abs().sum() > 0, name


@EACH
def test_weights_are_held_once_so_that_a_file_can_hold_them(configuration: Configuration) -> None:
    network = made(configuration)
    state = network.state_dict()
    places = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(places)) == len(places)
    assert {name for name, _ in network.named_parameters()} == set(state)
    other = made(configuration, seed=1)
    other.load_state_dict(load(save(state)))
    image = scan(configuration, 1)
    with torch.no_grad():
        assert torch.equal(other.eval()(image), network.eval()(image))


@EACH
def test_the_same_seed_gives_the_same_weights(configuration: Configuration) -> None:
    one, same, other = (made(configuration, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_batches_do_not_mix() -> None:
    configuration = CONFIGURATIONS["thick slices"]
    network, image = made(configuration).double().eval(), scan(configuration, 1, batch=3).double()
    with torch.no_grad():
        together = network(image)
        alone = torch.cat([network(one[None]) for one in image])
    assert torch.allclose(together, alone, atol=1e-12)


def test_features_and_strides_are_the_plans() -> None:
    configuration = CONFIGURATIONS["thick slices"]
    convolutions = [m for m in made(configuration).modules() if isinstance(m, nn.Conv3d)]
    strided = [m.stride for m in convolutions if m.stride != (1, 1, 1)]
    assert strided == [(2, 2, 1), (2, 2, 1), (2, 2, 2)]
    widths = {m.out_channels for m in convolutions if m.kernel_size != (1, 1, 1)}
    assert widths == {4, 8, 16, 32}
    assert convolutions[0].kernel_size == (3, 3, 1)

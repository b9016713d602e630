"""One list of promises, checked for every family that medseg trains, in 3D and in 2D."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.core.grid import Grid
from medseg.core.resample import resample
from medseg.core.volume import LabelMap, Volume
from medseg.dataset.phantom import phantom
from medseg.dataset.task import load_case, load_task
from medseg.infer.engine import TorchEngine, open_engine
from medseg.infer.predict import segment
from medseg.models.build import build
from medseg.models.layers import exact_where_small
from medseg.models.package import ModelPackage, load_package, save_package
from medseg.models.unet_classic import largest_of_windows
from medseg.plan.families import FAMILIES, TRAINED
from medseg.plan.plan import Configuration
from medseg.plan.planner import sketch
from medseg.train.loop import train_step
from medseg.train.loss import loss_of

CHANNELS, CLASSES = 2, 3
# Longer than wide, and an odd number of halvings: what is written for cubes alone fails.
PATCHES = {"3D": (32, 24, 40), "2D": (40, 24)}
EVERY = pytest.mark.parametrize("family", TRAINED)
BOTH = pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def made(family: str, patch: tuple[int, ...], features: int = 4) -> Configuration:
    return sketch(family, patch, features, 8 * features)


def seeded(configuration: Configuration, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(configuration, CHANNELS, CLASSES)


def seen(configuration: Configuration) -> tuple[int, ...]:
    """The patch as the network sees it."""
    return tuple(n for axis, n in enumerate(configuration.patch.value) if axis != configuration.slice_axis)


def things(configuration: Configuration, share: float = 0.4) -> tuple[Tensor, Tensor]:
    """Images (2, C, ...) and classes (2, ...) with a block of each class, so long along each axis."""
    shape = seen(configuration)
    target = torch.zeros((2, *shape), dtype=torch.int64)
    for number, place in ((1, 0.05), (2, 0.55)):
        where = tuple(slice(round(place * n), round(place * n) + max(2, round(share * n))) for n in shape)
        target[(slice(None), *where)] = number
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, CHANNELS, *shape), generator=generator) + target.unsqueeze(1)
    return images, target


@EVERY
@BOTH
def test_logits_have_the_patch_size(family: str, patch: tuple[int, ...]) -> None:
    configuration = made(family, patch)
    network = seeded(configuration)
    images, _ = things(configuration)
    with torch.no_grad():
        logits = network.eval()(images)
    assert logits.shape == (2, CLASSES, *seen(configuration))
    assert logits.isfinite().all()


@EVERY
@BOTH
def test_a_scan_of_odd_sizes_is_labelled_on_its_own_grid(
    family: str, patch: tuple[int, ...], small_plan: Callable[..., Any]
) -> None:
    configuration = made(family, patch)
    plan = small_plan(channels=("MR", "CT"), labels={1: "one", 2: "two"}).model_copy(
        update={"configurations": {"3d": configuration}}
    )
    values = np.random.default_rng(0).normal(size=(CHANNELS, 37, 23, 29)).astype(np.float32)
    scan = Volume(values, Grid((37, 23, 29), np.diag([1.1, 0.9, 1.3, 1.0])))
    engine = TorchEngine([seeded(configuration).eval()], configuration, CLASSES, torch.device("cpu"))
    found = segment(engine, scan, plan, "3d").label_map
    assert found.values.shape == scan.grid.shape
    assert found.grid == scan.grid


@EVERY
@BOTH
def test_gradients_reach_every_parameter(family: str, patch: tuple[int, ...], small_plan: Callable[..., Any]) -> None:
    configuration = made(family, patch)
    network = seeded(configuration).train()
    plan = small_plan(channels=("MR", "CT"), labels={1: "one", 2: "two"})
    for share in (0.1, 0.25, 0.4, 0.9):  # whatever is for things of one size learns from those
        images, target = things(configuration, share)
        loss_of(plan, configuration)(network(images), target).backward()  # type: ignore[no-untyped-call]
    unmoved = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unmoved == []


@EVERY
@BOTH
def test_the_same_seed_gives_the_same_weights(
    family: str, patch: tuple[int, ...], small_plan: Callable[..., Any]
) -> None:
    configuration = made(family, patch)
    plan = small_plan(channels=("MR", "CT"), labels={1: "one", 2: "two"})
    images, target = things(configuration)

    def trained(seed: int) -> dict[str, Tensor]:
        network = seeded(configuration, seed)
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
        train_step(network, optimiser, images, target, loss_of(plan, configuration))
        return network.state_dict()

    first, again, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@EVERY
@BOTH
def test_only_real_numbers_go_into_files(family: str, patch: tuple[int, ...]) -> None:
    configuration = made(family, patch)
    tensors = dict(seeded(configuration).state_dict())
    seeded(configuration, 1).load_state_dict(tensors)  # without what torch notes beside them
    assert all(tensor.is_floating_point() for tensor in tensors.values())
    places = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
    assert len(set(places)) == len(places)  # a weights file holds none twice


@EVERY
def test_what_is_written_of_a_family_is_said(family: str) -> None:
    assert FAMILIES[family].good_for


@EVERY
@BOTH
def test_a_package_holds_it_in_a_form_that_others_run(
    family: str, patch: tuple[int, ...], small_plan: Callable[..., Any], tmp_path: Path
) -> None:
    configuration = made(family, patch)
    plan = small_plan(channels=("MR", "CT"), labels={1: "one", 2: "two"}).model_copy(
        update={"configurations": {"3d": configuration}}
    )
    weights = {name: tensor.detach() for name, tensor in seeded(configuration).state_dict().items()}
    save_package(tmp_path / "model", ModelPackage(plan, "3d", (weights,), ("a",), ("b",), {}))
    package = load_package(tmp_path / "model")
    assert package.graphs, package.not_portable
    tiles = np.random.default_rng(0).normal(size=(3, CHANNELS, *configuration.patch.value)).astype(np.float32)
    ours, theirs = (open_engine(package, name, 1, precision="f32") for name in ("torch-cpu", "openvino"))
    expected, found = (engine.numpy(engine.run(tiles)) for engine in (ours, theirs))
    # Swin's deepest norm is of two voxels here, and enlarges what is rounded.
    np.testing.assert_allclose(found, expected, atol=(1e-3 if family == "swinunetr" else 2e-4) * abs(expected).max())


# ---- one case, learnt by heart ------------------------------------------------------------------


@pytest.fixture(scope="module")
def prostate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Volume, LabelMap]:
    task = load_task(phantom(tmp_path_factory.mktemp("phantom"), "prostate", cases=5))
    return load_case(task, task.cases[0])


def shaped(case: tuple[Volume, LabelMap], shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The case on so many voxels: images (1, C, X, Y, Z) of mean 0 and deviation 1, and classes (1, X, Y, Z)."""
    volume, labels = case
    extent = np.array(volume.grid.shape) * volume.grid.spacing
    grid = volume.grid.with_spacing(extent / np.array(shape))
    values = resample(volume, onto=grid).values.astype(np.float32)
    axes = (1, 2, 3)
    values = (values - values.mean(axes, keepdims=True)) / values.std(axes, keepdims=True)
    classes = resample(labels, onto=grid).values.astype(np.int64)
    return torch.from_numpy(values)[None], torch.from_numpy(classes)[None]


@EVERY
@pytest.mark.slow
def test_learns_one_phantom_case_by_heart(
    family: str, prostate: tuple[Volume, LabelMap], small_plan: Callable[..., Any]
) -> None:
    # Of Swin six slices: its smallest volume takes it minutes.
    flat = family == "swinunetr"
    configuration = sketch(family, (24, 24) if flat else (24, 24, 24), 8, 64)
    x, y, z = configuration.patch.value
    images, target = shaped(prostate, (x, y, 6 if flat else z))
    if flat:
        images, target = images[0].movedim(-1, 0), target[0].movedim(-1, 0)
    network, rate = seeded(configuration), FAMILIES[family].learning_rate
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate)
    plan = small_plan(channels=("T2", "ADC"), labels={1: "PZ", 2: "TZ"})
    reached = 0.0
    for step in range(1, 241):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, step / 20)
        train_step(network, optimiser, images, target, loss_of(plan, configuration))
        if step % 20 == 0:
            reached = _dice(network, images, target)
            if reached >= 0.95:
                break
    assert reached >= 0.95


def _dice(network: nn.Module, images: Tensor, target: Tensor) -> float:
    """The mean over the classes but the background."""
    with torch.no_grad():
        found = network.eval()(images).argmax(dim=1)
    scores = [
        2 * ((found == k) & (target == k)).sum() / ((found == k).sum() + (target == k).sum()) for k in range(1, CLASSES)
    ]
    return float(np.mean([float(score) for score in scores]))


@pytest.mark.parametrize("size", [(2, 2, 2), (1, 2, 2), (2, 1, 3)])
def test_the_pooling_that_repeats_itself_on_a_gpu_pools_alike(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x, other = (torch.rand((2, 3, 9, 8, 7), requires_grad=True) for _ in range(2))
    with torch.no_grad():
        other.copy_(x)
    usual, repeatable = torch.nn.functional.max_pool3d(x, size), largest_of_windows(other, size)
    assert torch.equal(usual, repeatable)
    (usual**2).sum().backward()
    (repeatable**2).sum().backward()
    assert torch.equal(x.grad, other.grad)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride"), [((2, 4, 4), 3, 1), ((1, 1, 1), 3, 2), ((3, 1, 3), (1, 3, 3), 2), ((1, 1), 3, 2)]
)
def test_in_half_precision_gradients_of_short_axes_are_those_of_whole(shape: Any, kernel: Any, stride: int) -> None:
    """oneDNN's read memory that nobody wrote, on processors with bfloat16."""
    torch.manual_seed(0)
    layer = (nn.Conv2d if len(shape) == 2 else nn.Conv3d)(32, 32, kernel, stride, padding=1)
    exact_where_small(layer)
    x = torch.randn((2, 32, *shape))
    layer(x).sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    for _ in range(3):
        left = [torch.full((n,), torch.nan) for n in (1024, 16384, 65536, 262144)]
        del left
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
    assert torch.allclose(layer.weight.grad, 3 * expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))

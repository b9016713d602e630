"""Mask R-CNN: what it takes and gives, that all of it learns, and that it finds what it has seen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from monai.data.box_utils import box_iou, non_max_suppression
from scipy.ndimage import map_coordinates
from torch import Tensor
from torch.utils._pytree import tree_leaves

from medseg.infer.engine import open_engine, openvino_core
from medseg.models.build import build
from medseg.models.mask_rcnn import MaskRCNN, Proposals, apart, within
from medseg.models.package import ModelPackage, load_package, save_package
from medseg.models.roi import bin_centres, roi_align
from medseg.plan.plan import Configuration, Decision, Network
from medseg.train.detection import things_in
from medseg.train.loop import train_step
from medseg.train.loss import IGNORED, by_family, dice_cross_entropy


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def configured(
    kernels: Any, strides: Any, patch: tuple[int, int, int], flat: Any = None, features: Any = (4, 8, 8)
) -> Configuration:
    network = Network(
        family="mask-rcnn", features=features[: len(kernels)], kernels=tuple(kernels), strides=tuple(strides)
    )
    return Configuration(
        dimensions=3 if flat is None else 2,
        slice_axis=flat,
        spacing=Decision(value=(1.0, 1.0, 1.0)),
        patch=Decision(value=patch),
        batch=Decision(value=2),
        network=Decision(value=network),
    )


CUBES = configured([(3, 3, 3)] * 3, [(1, 1, 1), (2, 2, 2), (2, 2, 2)], (24, 24, 24))
CONFIGURATIONS = {
    "isotropic": CUBES,
    "thick slices": configured([(3, 3, 1), (3, 3, 1), (3, 3, 3)], [(1, 1, 1), (2, 2, 1), (2, 2, 2)], (24, 16, 6)),
    "two stages": configured([(1, 3, 3), (3, 3, 3)], [(1, 1, 1), (1, 3, 2)], (7, 27, 20)),
    "2d axial": configured([(3, 3, 1)] * 3, [(1, 1, 1), (2, 2, 1), (2, 2, 1)], (24, 32, 1), 2),
    "2d sagittal": configured([(1, 3, 3)] * 3, [(1, 1, 1), (1, 2, 2), (1, 2, 2)], (1, 24, 32), 0),
}
EACH = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


def shape_of(configuration: Configuration) -> list[int]:
    return [n for axis, n in enumerate(configuration.patch.value) if axis != configuration.slice_axis]


def batch(configuration: Configuration, *, empty: bool = False, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Noise, and in each image a thing of either class, brighter by it."""
    shape = shape_of(configuration)
    target = torch.zeros((2, *shape), dtype=torch.int64)
    if not empty:
        target[(slice(None), *(slice(1, max(2, n // 3)) for n in shape))] = 1
        target[(slice(None), *(slice(n // 2, max(n // 2 + 1, n - 2)) for n in shape))] = 2
    images = torch.randn((2, channels, *shape), generator=torch.Generator().manual_seed(1)) + target.unsqueeze(1)
    return images, target


def made(configuration: Configuration, channels: int = 1) -> Any:
    torch.manual_seed(0)
    return build(configuration, channels, 3)


# ---- RoIAlign -----------------------------------------------------------------------------------


def obvious(features: np.ndarray, box: np.ndarray, size: int, patch: tuple[int, ...]) -> np.ndarray:
    """One box (2 D,) after the other, one channel after the other, interpolated at the middle of each bin."""
    space = len(patch)
    lines = []
    for axis in range(space):
        low, high = box[axis], box[space + axis]
        at = low + (np.arange(size) + 0.5) / size * (high - low)
        lines.append(at / (patch[axis] / features.shape[1 + axis]) - 0.5)
    points = np.stack(np.meshgrid(*lines, indexing="ij"))
    return np.stack([map_coordinates(one, points, order=1, mode="nearest") for one in features])


@pytest.mark.parametrize(
    ("coarse", "patch", "size"),
    [((5, 6, 7), (10, 12, 14), 4), ((7, 5, 3), (7, 15, 12), 3), ((9, 6), (18, 6), 5), ((3, 4), (9, 4), 2)],
)
def test_roi_align_is_the_obvious_one(coarse: tuple[int, ...], patch: tuple[int, ...], size: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 3, *coarse)).astype(np.float32)
    boxes = []
    for count in (3, 2):
        low = rng.uniform(-1, np.array(patch) - 2, (count, len(patch)))
        boxes.append(np.concatenate([low, low + rng.uniform(1, 6, low.shape)], axis=1).astype(np.float32))
    found = roi_align(torch.from_numpy(features), [torch.from_numpy(b) for b in boxes], size, patch)
    expected = [
        obvious(one, box, size, patch) for one, own in zip(features, boxes, strict=True) for box in own
    ]  # fmt: skip
    assert found.shape == (5, 3, *[size] * len(patch))
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 9, 11), (13, 10)])
def test_constants_and_ramps_are_what_they_were(shape: tuple[int, ...]) -> None:
    ramps = np.stack([n + 0.5 for n in np.indices(shape).astype(np.float32)])
    features = torch.from_numpy(np.concatenate([np.full((1, *shape), 7, dtype=np.float32), ramps]))[None]
    box = torch.tensor([[1.5] * len(shape) + [6.25] * len(shape)])
    found = roi_align(features, [box], 3, shape)[0]
    assert torch.allclose(found[0], torch.tensor(7.0))
    middles = bin_centres(box, 3)[0]
    for axis in range(len(shape)):
        along = [1] * len(shape)
        along[axis] = 3
        assert torch.allclose(found[1 + axis], middles[:, axis].reshape(along).expand(found.shape[1:]), atol=1e-4)


def test_images_without_boxes_are_passed_over() -> None:
    features = torch.randn(3, 2, 4, 4, 4, requires_grad=True)
    none, one = torch.zeros((0, 6)), torch.tensor([[0.0, 0, 0, 4, 4, 4]])
    found = roi_align(features, [none, one, none], 2, (8, 8, 8))
    assert found.shape == (1, 2, 2, 2, 2)
    found.sum().backward()
    assert features.grad is not None
    assert not features.grad[0].any()
    assert features.grad[1].any()


# ---- what it takes and gives --------------------------------------------------------------------


@EACH
def test_logits_have_the_patchs_size(configuration: Configuration) -> None:
    images, _ = batch(configuration, channels=2)
    with torch.no_grad():
        out = made(configuration, channels=2).eval()(images)
    assert out.shape == (2, 3, *images.shape[2:])
    assert out.isfinite().all()


@EACH
def test_anchors_and_what_is_said_of_them_go_together(configuration: Configuration) -> None:
    network = made(configuration).train()
    found = network(batch(configuration)[0])
    assert isinstance(found, Proposals)
    shape, space = shape_of(configuration), configuration.dimensions
    anchors = network.anchors(found)
    assert found.objectness.shape == (2, len(anchors))
    assert found.deltas.shape == (2, len(anchors), 2 * space)
    assert found.fine.shape[2:] == tuple(shape)
    # The middles of the first level's are evenly spread from half a stride on.
    steps = [n // m for n, m in zip(shape, found.levels[0].shape[2:], strict=True)]
    first = anchors[: found.levels[0].shape[2:].numel()]
    middles = ((first[:, :space] + first[:, space:]) / 2).reshape(*found.levels[0].shape[2:], space)
    for axis, step in enumerate(steps):
        assert torch.equal(middles.select(axis, 1)[..., axis] - middles.select(axis, 0)[..., axis],
                           torch.full(middles.select(axis, 0).shape[:-1], float(step)))  # fmt: skip
    boxes = network.regions(found)
    for own in boxes:
        assert len(own) >= 1
        assert (own[:, :space] >= 0).all()
        assert (own[:, space:] <= torch.tensor(shape)).all()
        assert (own[:, space:] - own[:, :space] >= 1 - 1e-4).all()


@EACH
def test_detections_are_within_the_patch_the_likeliest_first(configuration: Configuration) -> None:
    network, images = made(configuration).eval(), batch(configuration)[0]
    for one in network.detect(images):
        count, space = len(one.scores), configuration.dimensions
        assert one.boxes.shape == (count, 2 * space)
        assert one.masks.shape == (count, *[14] * space)
        assert ((one.masks >= 0) & (one.masks <= 1)).all()
        assert (one.scores[1:] <= one.scores[:-1]).all()
        assert set(one.classes.tolist()) <= {1, 2}


def test_the_three_parts_are_all_that_has_weights() -> None:
    """So that a portable form needs three graphs and no more."""
    network = made(CUBES).eval()
    images = batch(CUBES)[0]
    with torch.no_grad():
        levels, fine, semantic, objectness, deltas = network.dense(images)
        found = Proposals(network, levels, fine, semantic, objectness, deltas)
        rois = roi_align(levels[0], [torch.tensor([[0.0, 0, 0, 6, 6, 6]]), torch.zeros(0, 6)], 6, found.patch)
        assert network.box_head(rois)[0].shape == (1, 3)
        masks = roi_align(fine, [torch.tensor([[0.0, 0, 0, 6, 6, 6]]), torch.zeros(0, 6)], 14, found.patch)
        assert network.mask_head(masks).shape == (1, 2, 14, 14, 14)


def test_each_box_is_looked_at_on_its_own() -> None:
    """Whatever level it is on, and whatever else is asked."""
    network, images = made(CUBES).eval(), batch(CUBES)[0]
    small, large = [2.0, 3, 4, 7, 9, 8], [1.0, 0, 2, 23, 22, 24]
    with torch.no_grad():
        found = network.propose(images)
        together = network.look(found, [torch.tensor([large, small]), torch.tensor([small, large, small])])
        for row, (image, box) in enumerate([(0, large), (0, small), (1, small), (1, large), (1, small)]):
            alone = [torch.zeros(0, 6), torch.zeros(0, 6)]
            alone[image] = torch.tensor([box])
            for many, one in zip(together, network.look(found, alone), strict=True):
                assert torch.allclose(many[row], one[0], atol=1e-5)


@pytest.mark.parametrize("space", [2, 3])
def test_boxes_that_stay_are_monais(space: int) -> None:
    low = torch.rand((60, space), generator=torch.Generator().manual_seed(0)) * 20
    boxes = torch.cat([low, low + 8], dim=1)
    scores = torch.rand(60, generator=torch.Generator().manual_seed(1))
    for overlap, most in ((0.2, 60), (0.5, 7)):
        assert torch.equal(apart(boxes, scores, overlap, most), non_max_suppression(boxes, scores, overlap, most))
    assert apart(boxes[:0], scores[:0], 0.5, 3).tolist() == []


def test_boxes_are_cut_off_at_the_patch() -> None:
    boxes = torch.tensor([[-3.0, 2, 4, 9], [9.5, 9.8, 30, 31], [3, 3, 2, 2]])
    assert within(boxes, (10, 10)).tolist() == [[0, 2, 4, 9], [9, 9, 10, 10], [3, 3, 4, 4]]


# ---- as graphs ----------------------------------------------------------------------------------


@EACH
def test_others_compute_each_part_as_torch_does(configuration: Configuration, small_plan: Any, tmp_path: Path) -> None:
    network = made(configuration, channels=2).eval()
    package = saved(network, configuration, small_plan(channels=("MR", "PET")), tmp_path)
    assert [path.name for path in package.graphs] == [f"member0.{n}.onnx" for n in ("dense", "box_head", "mask_head")]
    for path, part in zip(package.graphs, package.parts, strict=True):
        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        compiled = openvino_core().compile_model(
            path, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        )
        for batch in (0, 1, 3) if part.method != "dense" else (1, 3):
            values = np.random.default_rng(batch).normal(size=(batch, *part.takes.shape[1:])).astype(np.float32)
            with torch.no_grad():
                expected = tree_leaves(getattr(network, part.method)(torch.from_numpy(values)))
            names = [port.name for port in part.gives]
            for found in ([compiled({0: values})[n] for n in names], session.run(names, {part.takes.name: values})):
                for one, other in zip(found, expected, strict=True):
                    np.testing.assert_allclose(one, other.numpy(), atol=1e-4)


def saved(network: Any, configuration: Configuration, plan: Any, folder: Path) -> ModelPackage:
    """The network as a package that was read."""
    plan = plan.model_copy(update={"configurations": {"3d": configuration}})
    save_package(folder / "model", ModelPackage(plan, "3d", (network.state_dict(),), ("a",), ("b",), {}))
    return load_package(folder / "model")


# ---- it learns ----------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("what", ["things", "nothing", "all ignored"])
def test_every_weight_has_a_gradient(configuration: Configuration, what: str) -> None:
    network = made(configuration).train()
    images, target = batch(configuration, empty=what != "things")
    if what == "all ignored":
        target[:] = IGNORED
    loss = by_family(configuration, dice_cross_entropy if what != "all ignored" else lambda a, b: 0 * a.sum())
    value = loss(network(images), target)
    value.backward()
    assert value.isfinite()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        if what == "things":
            assert weight.grad.any(), name


def steps(network: Any, count: int, configuration: Configuration = CUBES) -> None:
    loss = by_family(configuration, dice_cross_entropy)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    images, target = batch(configuration)
    for _ in range(count):
        train_step(network, optimiser, images, target, loss)


def test_chance_has_no_part_in_a_step() -> None:
    one = made(CUBES)
    other = copy.deepcopy(one)
    torch.manual_seed(1)
    steps(one, 3)
    torch.manual_seed(2)
    torch.rand(5)
    steps(other, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_network_that_is_lost_says_so_with_its_loss() -> None:
    """A run goes back from a loss that is no number, which needs one."""
    network = made(CUBES).train()
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(torch.nan)
    images, target = batch(CUBES)
    assert by_family(CUBES, dice_cross_entropy)(network(images), target).isnan()
    assert all(len(one.scores) >= 0 for one in network.eval().detect(images))


def balls(space: int, size: int) -> tuple[Tensor, Tensor]:
    """Three bright balls of class 1 and a brighter rod of class 2 in noise; and the same mirrored, as convolutions
    of a single image take much longer."""
    index = np.stack(np.indices((size,) * space), axis=-1)
    target = np.zeros((size,) * space, dtype=np.int64)
    for middle, radius in (((7, 8, 7), 4.3), ((22, 9, 21), 3.2), ((10, 23, 20), 5.1)):
        target[((index - np.array(middle[:space])) ** 2).sum(-1) <= radius**2] = 1
    rod = tuple(slice(*edges) for edges in ((17, 30), (21, 25), (6, 10))[:space])
    target[rod] = 2
    noise = np.random.default_rng(0).normal(0, 0.3, target.shape)
    images = torch.from_numpy((target + noise).astype(np.float32))
    truth = torch.from_numpy(target)
    return torch.stack([images, images.flip(0)]).unsqueeze(1), torch.stack([truth, truth.flip(0)])


@pytest.fixture(scope="module", params=[2, 3])
def learnt(request: pytest.FixtureRequest) -> tuple[MaskRCNN, Configuration]:
    """A network that knows its `balls` by heart."""
    torch.set_num_threads(1)
    space = request.param
    flat, along = (None, (3, 3, 3)) if space == 3 else (2, (3, 3, 1))
    stride, size = (2, 2, 2) if space == 3 else (2, 2, 1), 32
    patch = (size, size, size if space == 3 else 1)
    configuration = configured([along] * 3, [(1, 1, 1), stride, stride], patch, flat, features=(8, 16, 16))
    network = made(configuration)
    assert isinstance(network, MaskRCNN)
    images, target = balls(space, size)
    loss = by_family(configuration, dice_cross_entropy)
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3)
    count = 120
    for step in range(count):
        for group in optimiser.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 10) * (1 - step / count)
        train_step(network, optimiser, images, target, loss)
    return network.eval(), configuration


@pytest.mark.slow
def test_what_it_has_seen_it_finds(learnt: tuple[MaskRCNN, Configuration]) -> None:
    network, configuration = learnt
    images, target = balls(configuration.dimensions, 32)
    with torch.no_grad():
        found = network.propose(images)
    labels = found.semantic.argmax(dim=1)
    for number in (1, 2):
        mine, true = labels == number, target == number
        assert 2 * (mine & true).sum() / (mine.sum() + true.sum()) > 0.9
    for seen, truth in zip(network.detections(found), target, strict=True):
        things = things_in(truth.numpy())
        sure = seen.scores > 0.5
        assert int(sure.sum()) == len(things.boxes)
        best, which = box_iou(seen.boxes[sure], things.boxes).max(dim=1)
        assert sorted(which.tolist()) == list(range(len(things.boxes)))
        assert (best > 0.5).all()
        assert torch.equal(seen.classes[sure], things.classes[which])


@pytest.mark.slow
def test_engines_find_the_same(learnt: tuple[MaskRCNN, Configuration], small_plan: Any, tmp_path: Path) -> None:
    """Where what it finds stands out: of boxes that are nearly as likely, rounding chooses."""
    network, configuration = learnt
    images, _ = balls(configuration.dimensions, 32)
    tiles = images.reshape(2, 1, *configuration.patch.value).numpy()
    package = saved(network, configuration, small_plan(), tmp_path)
    engines = [open_engine(package, name, 1, precision="f32") for name in ("torch-cpu", "openvino")]
    logits = [engine.numpy(engine.run(tiles)) for engine in engines]
    np.testing.assert_allclose(*logits, atol=1e-3)
    for (ours,), (theirs,) in zip(*(engine.found for engine in engines), strict=True):
        sure = ours.scores > 0.5
        assert sure.sum() == (theirs.scores > 0.5).sum() == 4
        # The likeliest come first, but which of two that are as sure as each other does not matter.
        apart = np.abs(ours.boxes[sure, None] - theirs.boxes[sure]).max(axis=(2, 3))
        which = apart.argmin(axis=1)
        assert sorted(which) == [0, 1, 2, 3]
        assert apart.min(axis=1).max() < 0.01
        assert (ours.classes[sure] == theirs.classes[which]).all()
        np.testing.assert_allclose(ours.scores[sure], theirs.scores[which], atol=1e-3)
        np.testing.assert_allclose(ours.masks[sure], theirs.masks[which], atol=1e-2)

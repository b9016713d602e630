from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.resample import resample
from medseg.core.volume import LabelMap, Volume
from medseg.dataset.task import load_case, load_task
from medseg.plan.plan import Configuration, Decision, Network, Normalisation, Plan, parse_plan
from medseg.preprocess.regrid import occupied, preprocess

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)))
OBLIQUE = Rotation.from_euler("xyz", (8, -15, 20), degrees=True).as_matrix()
NETWORK = Network(features=(2, 4), kernels=((3, 3, 3),) * 2, strides=((1, 1, 1), (2, 2, 2)))


def configured(spacing: Any) -> Configuration:
    return Configuration(
        dimensions=3,
        spacing=Decision(value=spacing),
        patch=Decision(value=(8, 8, 8)),
        batch=Decision(value=2),
        network=Decision(value=NETWORK),
    )


def planned(spacing: Any, rules: tuple[Normalisation, ...]) -> tuple[Plan, Configuration]:
    configuration = configured(spacing)
    plan = {
        "task": "Task99_Test",
        "channels": [r.channel for r in rules],
        "labels": [{"name": "a", "number": 1}],
        "normalisation": {"value": [r.model_dump() for r in rules]},
        "configurations": {"3d": configuration.model_dump(mode="json")},
        "training": {
            "learning_rate": {"value": 0.1},
            "weight_decay": {"value": 0.1},
            "foreground_share": {"value": 0.5},
            "augmentation": {"value": {}},
        },
        "fingerprint": "",
    }
    return parse_plan(plan, "it"), configuration


CT = Normalisation(channel="CT", kind="ct", low=-1000, high=1000, mean=0, std=1)
MRI = Normalisation(channel="MRI", kind="zscore")


def turned(image: Any, order: tuple[int, ...], flips: tuple[bool, ...]) -> Any:
    """The same image stored with its axes in another order and direction."""
    grid = image.grid
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        matrix[old, new] = -1 if flip else 1
        matrix[old, 3] = grid.shape[old] - 1 if flip else 0
    return resample(image, Grid(tuple(grid.shape[o] for o in order), grid.affine @ matrix))


# ---- the box ------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [np.eye(3), OBLIQUE], ids=["straight", "oblique"])
def test_the_box_is_the_same_in_all_48_orientations(direction: np.ndarray) -> None:
    grid = Grid.from_spacing((9, 8, 7), (0.7, 1.1, 3), (5, -6, 7), direction)
    values = np.zeros((2, 9, 8, 7), dtype=np.int16)
    values[0, 2, 3, 5] = -4
    values[1, 6, 1, 4] = 9
    expected = grid.window((2, 1, 4), (5, 3, 2))
    for order, flips in ORIENTATIONS:
        volume = turned(Volume(values, grid), order, flips)
        box = occupied(volume)
        assert box.orientation == "RAS"
        assert box.matches(expected, tolerance=1e-9)
        assert np.count_nonzero(resample(volume, onto=box).values) == 2


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=5))
def test_the_box_is_the_smallest_that_holds_everything(points: list[tuple[int, int, int]]) -> None:
    values = np.zeros((1, 5, 6, 4))
    for point in points:
        values[(0, *point)] = 1
    grid = Grid.from_spacing((5, 6, 4), (1, 1, 1))
    box = occupied(Volume(values, grid))
    assert np.array_equal(box.origin, np.min(points, axis=0))
    assert box.shape == tuple(np.ptp(points, axis=0) + 1)


def test_of_an_empty_image_the_box_is_the_whole() -> None:
    grid = Grid.from_spacing((5, 6, 4), (1, 1, 2))
    assert occupied(Volume(np.zeros((1, 5, 6, 4)), grid)).matches(grid, 0)


# ---- preprocessing ------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [(CT,), (MRI,)])
def test_an_image_of_zeros_has_its_whole_grid(rules: tuple[Normalisation, ...]) -> None:
    volume = Volume(np.zeros((1, 8, 6, 4), dtype=np.uint8), Grid.from_spacing((8, 6, 4), (1, 1, 3)))
    out = preprocess(volume, *planned((1.0, 1.0, 1.0), rules))
    assert out.values.shape == (1, 8, 6, 12)
    assert (out.values == 0).all()


@pytest.mark.parametrize("shape", [(1, 9, 9), (9, 1, 9), (9, 9, 1), (1, 1, 1)])
def test_one_voxel_thick(shape: tuple[int, int, int]) -> None:
    volume = Volume(np.full((1, *shape), 5, dtype=np.int16), Grid.from_spacing(shape, (1, 1, 1)))
    out = preprocess(volume, *planned((2.0, 2.0, 2.0), (CT,)))
    assert out.values.shape == (1, *(math.ceil(n / 2) for n in shape))
    assert out.values == pytest.approx(5)


def test_at_the_plans_spacing_voxels_are_only_turned_cropped_and_normalised() -> None:
    values = np.zeros((1, 8, 9, 7), dtype=np.int16)
    values[0, 1:7, 2:8, 1:6] = np.random.default_rng(0).integers(1, 99, (6, 6, 5))
    volume = Volume(values, Grid.from_spacing((8, 9, 7), (0.8, 0.8, 2)))
    for order, flips in ORIENTATIONS:
        out = preprocess(turned(volume, order, flips), *planned((0.8, 0.8, 2.0), (CT,)))
        assert out.values.dtype == np.float32
        assert np.array_equal(out.values[0], values[0, 1:7, 2:8, 1:6])


def test_surroundings_do_not_change_what_the_network_sees() -> None:
    rng = np.random.default_rng(1)
    inner = rng.integers(1, 400, (1, 8, 8, 8)).astype(np.int16)
    plan, configuration = planned((1.5, 1.5, 1.5), (MRI,))
    grid = Grid.from_spacing((8, 8, 8), (1, 1, 1))
    small = preprocess(Volume(inner, grid), plan, configuration)
    padded = resample(Volume(inner, grid), onto=grid.window((-5, -2, -7), (20, 16, 18)))
    large = preprocess(padded, plan, configuration)
    assert large.grid.matches(small.grid, 1e-9)
    assert large.values == pytest.approx(small.values, abs=1e-5)


def test_another_number_of_channels_is_refused() -> None:
    volume = Volume(np.ones((2, 4, 4, 4)), Grid.from_spacing((4, 4, 4), (1, 1, 1)))
    with pytest.raises(InputError, match=r"the scan has 2 channels, the model takes 1 \(CT\)"):
        preprocess(volume, *planned((1.0, 1.0, 1.0), (CT,)))


def centroid(labels: LabelMap, number: int) -> np.ndarray:
    return labels.grid.to_world(np.argwhere(labels.values == number)).mean(axis=0)


@pytest.mark.parametrize("direction", [np.eye(3), OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize(
    ("spacing", "target"),
    [
        ((1, 1, 1), (1.0, 1.0, 1.0)),
        ((0.7, 0.7, 4), (1.0, 1.0, 4.0)),
        ((0.7, 0.7, 4), (1.5, 1.5, 1.5)),
        ((3, 1, 1), (1.3, 1.3, 1.3)),
        ((1.1, 0.9, 2), (2.0, 2.0, 2.0)),
    ],
)
def test_organs_stay_in_place_there_and_back(direction: np.ndarray, spacing: Any, target: Any) -> None:
    """Two ellipsoids, in every eighth orientation: preprocess, resample the labels there and home."""
    extent = np.array([36.0, 30.0, 40.0])
    shape = tuple(int(n) for n in np.rint(extent / spacing))
    grid = Grid.from_spacing(shape, spacing, (-20, 10, 3), direction)
    position = np.moveaxis(np.indices(shape), 0, -1) * np.array(spacing)
    values = np.zeros(shape, dtype=np.uint8)
    for number, (centre, radius) in enumerate([((10, 12, 14), (6, 7, 9)), ((26, 18, 26), (7, 8, 9))], start=1):
        values[(((position - centre) / radius) ** 2).sum(axis=-1) <= 1] = number
    image = np.where(values > 0, 100 * values, 1).astype(np.int16)
    image[0], image[:, -1] = 0, 0
    plan, configuration = planned(target, (CT,))
    for order, flips in ORIENTATIONS[::8]:
        volume = turned(Volume(image[None], grid), order, flips)
        labels = turned(LabelMap(values, grid, LabelSet.from_names("ab")), order, flips)
        prepared = preprocess(volume, plan, configuration)
        there = resample(labels, onto=prepared.grid)
        home = resample(there, onto=labels.grid)
        assert prepared.grid.orientation == "RAS"
        assert prepared.grid.spacing == pytest.approx(target)
        assert home.grid == labels.grid
        for number in (1, 2):
            # The image on the network's grid shows the organ where its labels are.
            shown = prepared.values[0][there.values == number]
            assert np.median(shown) == pytest.approx(100 * number, rel=0.1)
            for moved in (there, home):
                drift = np.linalg.inv(direction) @ (centroid(moved, number) - centroid(labels, number))
                assert (np.abs(drift) <= 0.5 * np.minimum(spacing, target)).all()
            assert home.volume_of(number) == pytest.approx(labels.volume_of(number), rel=0.2)


def test_real_hippocampi_come_home_nearly_whole(shared_data: Any) -> None:
    task = load_task(shared_data / "Task04_Hippocampus")
    plan, configuration = planned((1.2, 0.8, 1.0), (MRI,))
    for case in task.cases[::40]:
        volume, labels = load_case(task, case)
        prepared = preprocess(volume, plan, configuration)
        assert abs(float(prepared.values.mean())) < 1
        home = resample(resample(labels, onto=prepared.grid), onto=labels.grid)
        for number in task.labels.numbers:
            one, other = home.values == number, labels.values == number
            assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.9
            drift = np.abs(centroid(home, number) - centroid(labels, number))
            assert (drift < 0.25).all()


# ---- the stage before ---------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 2, 1), (0.5, 1, 2)])
def test_what_the_stage_before_found_lies_as_the_labels_do(spacing: Any) -> None:
    rng = np.random.default_rng(0)
    values = np.zeros((14, 12, 10), dtype=np.uint8)
    values[2:8, 3:9, 2:7], values[9:13, 3:9, 2:7] = 1, 4
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    grid = Grid((14, 12, 10), affine)
    labels = LabelMap(values, grid, LabelSet.from_names(["a", "b", "c", "d"]))
    volume = Volume((values + rng.normal(5, 1, values.shape)).astype(np.float32)[None], grid)
    plan, configuration = planned(spacing, (CT,))
    plan = plan.model_copy(
        update={"labels": (plan.labels[0], plan.labels[0].model_copy(update={"name": "d", "number": 4}))}
    )
    alone, both = (preprocess(volume, plan, configuration, before) for before in (None, labels))
    assert both.grid == alone.grid
    assert both.values.dtype == np.float32
    assert np.array_equal(both.values[:1], alone.values)
    on = resample(labels, onto=alone.grid).values
    assert np.array_equal(both.values[1:], np.stack([on == 1, on == 4]))

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from medseg.core import resample as resampling
from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.resample import axis_maps, crop, linear_weights, resample, spline_weights, stretch
from medseg.core.volume import LabelMap, Volume

OBLIQUE = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix()
TURNS = {
    "axial": np.eye(3),
    "sagittal": np.eye(3)[:, (1, 2, 0)],
    "coronal": np.eye(3)[:, (0, 2, 1)],
    "oblique": OBLIQUE,
}


def noise(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).integers(-100, 100, shape).astype(dtype)


def numbered(shape: tuple[int, int, int]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


def reindexed(grid: Grid, order: tuple[int, ...], flips: tuple[bool, ...]) -> Grid:
    """The same voxels with axes in another order and direction."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        matrix[old, new] = -1 if flip else 1
        matrix[old, 3] = grid.shape[old] - 1 if flip else 0
    return Grid(tuple(grid.shape[o] for o in order), grid.affine @ matrix)


REINDEXINGS = [(o, f) for o in itertools.permutations(range(3)) for f in itertools.product((False, True), repeat=3)]


# ---- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, ">i2"])
def test_onto_its_own_grid_nothing_changes(dtype: Any) -> None:
    grid = Grid.from_spacing((4, 5, 6), (0.7, 0.7, 3), (10, 20, 30), OBLIQUE)
    volume = Volume(noise((2, 4, 5, 6), dtype=dtype) % 100, grid)
    again = resample(volume, Grid(grid.shape, grid.affine + 1e-7 * (np.arange(16).reshape(4, 4) < 12)))
    assert again.values.dtype == volume.values.dtype
    assert np.array_equal(again.values, volume.values)
    assert not np.shares_memory(again.values, volume.values)


@pytest.mark.parametrize("direction", [np.eye(3), OBLIQUE], ids=["straight", "oblique"])
def test_all_flips_and_permutations_are_exact_and_undone_by_the_own_grid(direction: np.ndarray) -> None:
    grid = Grid.from_spacing((2, 3, 4), (0.9, 1.3, 5), (-7, 8, 9), direction)
    volume = Volume(numbered(grid.shape)[None], grid)
    for order, flips in REINDEXINGS:
        turned = resample(volume, reindexed(grid, order, flips))
        by_hand = np.flip(volume.values[0].transpose(order), [a for a in range(3) if flips[a]])
        assert np.array_equal(turned.values[0], by_hand)
        assert turned.values.dtype == np.int32
        assert np.array_equal(resample(turned, grid).values, volume.values)


@given(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.tuples(*[st.integers(-6, 6)] * 3),
    st.tuples(*[st.integers(1, 8)] * 3),
    st.sampled_from(REINDEXINGS),
    st.tuples(*[st.integers(1, 3)] * 3),
)
def test_a_window_beside_one_loop_over_its_voxels(
    shape: tuple[int, int, int], start: tuple[int, ...], size: tuple[int, int, int], how: Any, step: tuple[int, ...]
) -> None:
    """Cropping, padding, flipping, permuting and taking every second or third voxel, at once."""
    grid = Grid.from_spacing(shape, (0.8, 1.1, 2.5), (3, -4, 5))
    window = grid.window(start, size)
    onto = reindexed(Grid(size, window.affine @ np.diag([*step, 1.0])), *how)
    volume = Volume(numbered(shape)[None] + 1, grid)
    expected = np.full(onto.shape, -9, dtype=np.int32)
    for index in np.ndindex(onto.shape):
        there = np.rint(grid.to_index(onto.to_world(index))).astype(int)
        if ((there >= 0) & (there < shape)).all():
            expected[index] = volume.values[0][tuple(there)]
    result = resample(volume, onto, fill=-9)
    assert result.values.dtype == np.int32
    assert np.array_equal(result.values[0], expected)
    labels = LabelMap((volume.values[0] % 3).astype(np.uint8), grid, LabelSet.from_names("ab"))
    assert np.array_equal(resample(labels, onto).values, np.where(expected < 0, 0, expected % 3))


def test_cropping_and_padding_round_trip() -> None:
    grid = Grid.from_spacing((6, 7, 8), (1, 1, 2))
    volume = Volume(noise((1, 6, 7, 8), dtype=np.int16), grid)
    padded = resample(volume, grid.window((-3, -2, -1), (12, 11, 10)), fill=-1024)
    assert padded.values.dtype == np.int16
    assert padded.values[0, 0, 0, 0] == -1024
    assert np.array_equal(resample(padded, grid).values, volume.values)
    cropped = resample(volume, grid.window((1, 2, 3), (2, 2, 2)))
    assert np.array_equal(cropped.values, volume.values[:, 1:3, 2:4, 3:5])


def test_a_grid_elsewhere_holds_nothing_but_fill() -> None:
    grid = Grid.from_spacing((3, 3, 3), 1)
    for far in (Grid.from_spacing((2, 2, 2), 1, (100, 0, 0)), Grid.from_spacing((2, 2, 2), 0.7, (0, 90.2, 0))):
        assert (resample(Volume(np.ones((1, 3, 3, 3)), grid), far, fill=-5).values == -5).all()
        everywhere = LabelMap(np.ones((3, 3, 3), dtype=np.uint8), grid, LabelSet.from_names("a"))
        assert (resample(everywhere, far).values == 0).all()


@pytest.mark.parametrize("fill", [-1024, 0.5, 300, float("nan")])
def test_a_fill_that_the_type_cannot_hold_is_kept_all_the_same(fill: float) -> None:
    grid = Grid.from_spacing((2, 2, 2), 1)
    volume = Volume(np.full((1, 2, 2, 2), 200, dtype=np.uint8), grid)
    padded = resample(volume, grid.window((0, 0, 0), (3, 2, 2)), fill=fill)
    assert np.array_equal(padded.values[0, 2], np.full((2, 2), fill), equal_nan=True)
    assert (padded.values[0, :2] == 200).all()
    assert resample(volume, grid.window((1, 0, 0), (1, 2, 2)), fill=fill).values.dtype == np.uint8


# ---- weights ------------------------------------------------------------------------------------

lines = st.integers(1, 9).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.floats(-3, n + 2), min_size=1, max_size=8).map(np.array))
)


@given(lines)
def test_linear_weights_are_numpys_interp(line: tuple[int, np.ndarray]) -> None:
    size, at = line
    values = noise((size,), seed=size)
    assert linear_weights(at, size) @ values == pytest.approx(np.interp(at, np.arange(size), values), abs=1e-3)


@given(lines)
def test_spline_weights_are_scipys(line: tuple[int, np.ndarray]) -> None:
    size, at = line
    values = noise((size,), seed=size, dtype=np.float64)
    expected = map_coordinates(values, [np.clip(at, 0, size - 1)], order=3, mode="mirror")
    assert spline_weights(at, size) @ values == pytest.approx(expected, abs=1e-3 * 200)
    assert spline_weights(at, size).sum(axis=1) == pytest.approx(np.ones(len(at)), abs=1e-5)


def test_splines_go_through_the_voxels() -> None:
    assert spline_weights(np.arange(7.0), 7) == pytest.approx(np.eye(7), abs=1e-6)
    assert linear_weights(np.arange(7.0), 7).tolist() == np.eye(7).tolist()


# ---- intensities --------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 1.5), (2, 2, 2), (1, 1, 4.1), (0.5, 2.5, 0.9)])
@pytest.mark.parametrize(("order", "flips"), [REINDEXINGS[0], REINDEXINGS[13], REINDEXINGS[30]])
def test_interpolation_beside_scipy(spacing: tuple[float, ...], order: Any, flips: Any) -> None:
    grid = Grid.from_spacing((17, 13, 9), (1, 1.2, 2.7), (5, -6, 7))
    onto = reindexed(grid.with_spacing(spacing), order, flips)
    volume = Volume(noise((2, 17, 13, 9)), grid)
    result = resample(volume, onto)
    at = np.moveaxis(grid.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1))), -1, 0)
    centres = ((at >= 0) & (at <= np.array(grid.shape)[:, None, None, None] - 1)).all(axis=0)
    assert result.values.dtype == np.float32
    for channel, values in zip(result.values, volume.values, strict=True):
        expected = map_coordinates(values.astype(np.float64), at, order=3, mode="mirror")
        assert np.abs(channel - expected)[centres].max() < 1e-3 * np.abs(values).max()


def ramp(grid: Grid, slope: tuple[float, float, float] = (1.5, -0.7, 2.2)) -> np.ndarray:
    return grid.to_world(np.stack(np.indices(grid.shape), axis=-1)) @ np.array(slope) + 40


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("spacing", [(0.8, 0.8, 0.8), (1.3, 0.6, 2.9), (2.1, 2.1, 3.3)])
def test_a_ramp_in_space_stays_that_ramp(turn: str, spacing: tuple[float, ...]) -> None:
    source = Grid.from_spacing((30, 32, 28), (1.1, 0.9, 1.4), (-15, -14, -18))
    side = [int(14 / s) for s in spacing]
    onto = Grid.from_spacing((side[0], side[1], side[2]), spacing, direction=TURNS[turn])
    middle = onto.to_world((np.array(onto.shape) - 1) / 2)
    affine = onto.affine.copy()
    affine[:3, 3] -= middle
    onto = Grid(onto.shape, affine)
    assert (axis_maps(source, onto) is None) == (turn == "oblique")
    result = resample(Volume(ramp(source)[None], source), onto).values[0]
    assert result == pytest.approx(ramp(onto), abs=0.02)


def test_fill_stands_outside_the_outer_edges_only() -> None:
    grid = Grid.from_spacing((4, 4, 4), 1)
    ones = Volume(np.ones((1, 4, 4, 4)), grid)
    # Centres from -0.75 in steps of a half: the field of view begins at -0.5 and ends at 3.5.
    onto = Grid.from_spacing((11, 1, 1), 0.5, (-0.75, 1, 1))
    inside = [False, *[True] * 8, False, False]
    assert resample(ones, onto, fill=-7).values[0, :, 0, 0].tolist() == [1 if i else -7 for i in inside]
    turned = Grid.from_spacing((9, 9, 9), 1, (-2.6, -2.4, -2.5), OBLIQUE)
    values = resample(ones, turned, fill=-7).values[0]
    at = grid.to_index(turned.to_world(np.stack(np.indices(turned.shape), axis=-1)))
    held = ((at > -0.49) & (at < 3.49)).all(axis=-1)
    gone = ((at < -0.51) | (at > 3.51)).any(axis=-1)
    assert held.any()
    assert values[held] == pytest.approx(np.ones(held.sum()), abs=1e-5)
    assert (values[gone] == -7).all()


def test_a_slightly_turned_grid_is_close_to_the_straight_one() -> None:
    """Where the separable path hands over to the oblique one there is no step."""
    grid = Grid.from_spacing((24, 24, 24), 1)
    volume = Volume(gaussian_filter(noise((24, 24, 24)).astype(np.float32), 2)[None], grid)
    straight = Grid.from_spacing((20, 20, 20), 0.9, (2.2, 2.2, 2.2))
    turn = Rotation.from_euler("z", 0.1, degrees=True).as_matrix()
    oblique = Grid.from_spacing(straight.shape, 0.9, straight.origin, turn)
    assert axis_maps(grid, straight) is not None
    assert axis_maps(grid, oblique) is None
    difference = resample(volume, straight).values - resample(volume, oblique).values
    assert np.abs(difference).max() < 0.05 * np.ptp(volume.values)


def test_halves_of_a_voxel_are_no_oblique_pair_and_shear_is() -> None:
    grid = Grid.from_spacing((8, 8, 8), (1, 1, 3))
    assert axis_maps(grid, grid.with_spacing((0.7, 2, 1))) is not None
    assert [m.source for m in axis_maps(grid, reindexed(grid, (2, 0, 1), (True, False, True))) or ()] == [2, 0, 1]
    sheared = grid.affine.copy()
    sheared[0, 2] = 0.6
    assert axis_maps(grid, Grid(grid.shape, sheared)) is None
    assert axis_maps(Grid(grid.shape, sheared), Grid(grid.shape, sheared)) is not None


@pytest.mark.parametrize("shape", [(12, 11, 1), (1, 9, 8), (1, 1, 1), (2, 1, 7)])
@pytest.mark.parametrize("turn", ["axial", "oblique"])
def test_one_slice_is_enough(shape: tuple[int, int, int], turn: str) -> None:
    grid = Grid.from_spacing(shape, (1, 1, 5))
    volume = Volume(np.full((1, *shape), 3, dtype=np.int16), grid)
    onto = Grid.from_spacing((6, 5, 4), (0.9, 0.8, 1.1), direction=TURNS[turn])
    labels = LabelMap(np.ones(shape, dtype=np.uint8), grid, LabelSet.from_names("a"))
    at = grid.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1)))
    held = ((at >= -0.5) & (at <= np.array(shape) - 0.5)).all(axis=-1)
    assert held.any()
    assert resample(volume, onto).values[0] == pytest.approx(np.where(held, 3.0, 0.0), abs=1e-4)
    assert np.array_equal(resample(labels, onto).values[held], np.ones(held.sum()))


@pytest.mark.parametrize("onto", [(1, 1, 1), (1, 6, 6), (6, 6, 1)])
def test_one_voxel_is_a_grid_too(onto: tuple[int, int, int]) -> None:
    grid = Grid.from_spacing((6, 6, 6), 1)
    target = Grid.from_spacing(onto, 1.5, (1, 1, 1))
    assert resample(Volume(ramp(grid)[None], grid), target).values[0, 0, 0, 0] == pytest.approx(ramp(target)[0, 0, 0])


# ---- labels -------------------------------------------------------------------------------------


def brute_force_vote(image: LabelMap, onto: Grid) -> tuple[np.ndarray, np.ndarray]:
    """One-hot every number, interpolate linearly voxel by voxel, take the largest. Returns the
    winner and by how much it won."""
    at = image.grid.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1)))
    size = np.array(image.grid.shape)
    numbers = [0, *image.labels.numbers]
    winner = np.zeros(onto.shape, dtype=int)
    margin = np.zeros(onto.shape)
    for index in np.ndindex(onto.shape):
        if ((at[index] < -0.5) | (at[index] > size - 0.5)).any():
            margin[index] = 1
            continue
        weights = dict.fromkeys(numbers, 0.0)
        point = np.clip(at[index], 0, size - 1)
        low = np.floor(point).astype(int)
        for corner in itertools.product((0, 1), repeat=3):
            weight = np.prod(np.where(corner, point - low, 1 - (point - low)))
            if weight:
                weights[int(image.values[tuple(np.minimum(low + corner, size - 1))])] += weight
        ranked = sorted(numbers, key=lambda n: -weights[n])
        winner[index] = ranked[0]
        margin[index] = weights[ranked[0]] - weights[ranked[1]]
    return winner, margin


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("shape", [(6, 7, 5), (7, 6, 1)])
def test_votes_beside_one_hot_voxel_by_voxel(turn: str, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(3)
    labels = LabelSet.from_names("abcd")
    grid = Grid.from_spacing(shape, (1, 1.5, 2), (0.3, 0.2, 0.1))
    image = LabelMap(rng.integers(0, 5, shape).astype(np.uint8), grid, labels)
    onto = Grid.from_spacing((9, 8, 7), (0.83, 0.77, 0.91), (-0.5, -0.7, -0.9), TURNS[turn])
    winner, margin = brute_force_vote(image, onto)
    clear = margin > 1e-5
    assert clear.mean() > 0.9
    assert (winner[clear] > 0).any()
    result = resample(image, onto)
    assert result.values.dtype == np.uint8
    assert np.array_equal(result.values[clear], winner[clear])


def test_a_tie_goes_to_the_background_and_then_to_the_lower_number() -> None:
    labels = LabelSet.from_names("abc")
    onto = Grid.from_spacing((1, 1, 1), 1, (0.5, 0, 0))

    def between(left: int, right: int) -> int:
        values = np.array([left, right], dtype=np.uint8).reshape(2, 1, 1)
        return int(resample(LabelMap(values, Grid.from_spacing((2, 1, 1), 1), labels), onto).values[0, 0, 0])

    assert between(3, 0) == between(0, 3) == 0
    assert between(3, 2) == between(2, 3) == 2


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(TURNS)))
def test_labels_never_invent_numbers(seed: int, turn: str) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 6, 3))
    labels = LabelSet.from_names(f"n{i}" for i in range(1, 301))
    used = rng.choice([0, 1, 7, 255, 300], 3)
    image = LabelMap(rng.choice(used, shape).astype(np.uint16), Grid.from_spacing(shape, (1, 2, 3)), labels)
    onto = Grid.from_spacing((5, 4, 3), rng.uniform(0.4, 3, 3), rng.uniform(-2, 2, 3), TURNS[turn])
    assert set(np.unique(resample(image, onto).values)) <= {0, *used}


def test_a_coarse_grid_keeps_a_block_of_labels_in_its_place() -> None:
    grid = Grid.from_spacing((20, 20, 20), 1)
    values = np.zeros(grid.shape, dtype=np.uint8)
    values[4:12, 6:14, 8:16] = 1
    fine = resample(LabelMap(values, grid, LabelSet.from_names("a")), grid.with_spacing(0.5))
    assert fine.volume_of(1) == pytest.approx(8**3, rel=0.02)
    again = resample(fine, grid)
    assert np.array_equal(again.values, values)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 0.7, 4), (3, 0.8, 1.5)], ids=str)
def test_an_ellipsoid_stays_where_it_is(turn: str, flipped: bool, spacing: tuple[float, float, float]) -> None:
    """Drawn on a grid of any orientation and read off on a straight one and back: its centroid
    stays within half a voxel and its volume within a tenth."""
    centre, radii = np.array([4.0, -3.0, 6.0]), np.array([9.0, 13.0, 11.0])
    shape = tuple(int(np.ceil(44 / s)) for s in spacing)
    direction = TURNS[turn] @ np.diag([-1, 1, -1] if flipped else [1, 1, 1])
    grid = Grid.from_spacing((shape[0], shape[1], shape[2]), spacing, direction=direction)
    affine = grid.affine.copy()
    affine[:3, 3] -= grid.to_world((np.array(grid.shape) - 1) / 2) - centre - (0.3, 0.1, -0.2)
    grid = Grid(grid.shape, affine)

    def centroid(image: LabelMap) -> np.ndarray:
        return image.grid.to_world(np.argwhere(image.values == 1)).mean(axis=0)

    points = grid.to_world(np.stack(np.indices(grid.shape), axis=-1))
    inside = ((((points - centre) / radii) ** 2).sum(axis=-1) <= 1).astype(np.uint8)
    drawn = LabelMap(inside, grid, LabelSet.from_names("a"))
    assert drawn.volume_of(1) == pytest.approx(4 / 3 * np.pi * radii.prod(), rel=0.05)
    straight = Grid.from_spacing((48, 48, 48), 1, centre - 23.5)
    there = resample(drawn, straight)
    back = resample(there, grid)
    for image in (there, back):
        away = np.abs(grid.direction.T @ (centroid(image) - centroid(drawn))) / grid.spacing
        assert away.max() < 0.5
        assert image.volume_of(1) == pytest.approx(drawn.volume_of(1), rel=0.1)
    # The intensities of the same thing agree with its labels.
    image = resample(Volume(inside[None].astype(np.float32), grid), straight)
    assert np.mean((image.values[0] > 0.5) != (there.values == 1)) < 0.02


def test_resampling_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid = Grid.from_spacing((5, 5, 5), 1)
        for turn in TURNS.values():
            onto = Grid.from_spacing((4, 4, 4), 1.2, direction=turn)
            resample(Volume(noise((1, 5, 5, 5), dtype=np.int16), grid), onto)
            resample(LabelMap(np.ones((5, 5, 5), dtype=np.uint8), grid, LabelSet.from_names("a")), onto)


# ---- stretch ------------------------------------------------------------------------------------


def stretched(values: np.ndarray, shape: tuple[int, int, int], **how: Any) -> np.ndarray:
    grid = Grid.from_spacing(values.shape, (1, 2, 3), (4, 5, 6))
    return stretch(Volume(values[None], grid), grid.with_shape(shape), **how).values[0]


@pytest.mark.parametrize("shape", [(25, 17, 12), (7, 50, 20), (13, 18, 9), (1, 36, 9)])
@pytest.mark.parametrize("order", [1, 3])
def test_stretching_is_resize_of_scikit_image(shape: tuple[int, int, int], order: int) -> None:
    from skimage.transform import resize

    values = np.random.default_rng(0).normal(size=(13, 18, 9)).astype(np.float32)
    wanted = resize(values.astype(float), shape, order, mode="edge", anti_aliasing=False)
    assert stretched(values, shape, linear=order == 1) == pytest.approx(wanted, abs=5e-6)


@pytest.mark.parametrize("count", [3, 9, 14, 18])
def test_thick_slices_are_taken_and_not_mixed(count: int) -> None:
    """Each is the slice of the old image that lies nearest, ties going to the further one."""
    from skimage.transform import resize

    values = np.random.default_rng(1).normal(size=(12, 10, 9)).astype(np.float32)
    found = stretched(values, (15, 7, count), thick=2)
    for new in range(count):
        old = int(np.floor(9 / count * (new + 0.5) - 0.5 + 0.5))
        wanted = resize(values[:, :, old].astype(float), (15, 7), 3, mode="edge", anti_aliasing=False)
        assert found[:, :, new] == pytest.approx(wanted, abs=5e-6)


@pytest.mark.parametrize("thick", [None, 1])
def test_stretching_what_is_prepared_on_the_way(thick: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts or whole, the same as preparing it first: clipped to the range of what was prepared."""
    raw = np.asfortranarray((noise((23, 40, 11)) * 300).astype(np.int16))
    first = np.clip(raw.astype(np.float32), -9000, 20000) / 500
    monkeypatch.setattr(resampling, "_AT_ONCE", 1)
    made = stretched(raw, (30, 31, 14), thick=thick, prepare=lambda _, values: np.clip(values, -9000, 20000) / 500)
    monkeypatch.undo()
    assert made == pytest.approx(stretched(first, (30, 31, 14), thick=thick), abs=5e-5)
    assert (made.min(), made.max()) == (first.min(), first.max())


# ---- large scans --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("at_once", [1, 10**9])
def test_in_parts_and_whichever_axis_varies_fastest_the_same(
    order: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside scipy's splines, values prepared before they are interpolated."""
    monkeypatch.setattr(resampling, "_AT_ONCE", at_once)
    grid = Grid.from_spacing((23, 90, 11), (1.0, 0.5, 3.0))
    raw = (noise((1, *grid.shape)) * 300).astype(np.int16)
    volume = Volume(np.asarray(raw, order=order), grid)
    onto = grid.with_spacing((0.7, 1.1, 2.0))
    seen: list[int] = []

    def prepare(channel: int, values: np.ndarray) -> np.ndarray:
        assert channel == 0
        assert values.dtype == np.float32
        seen.append(values.size)
        return np.clip(values, -100, 200) / 50

    made = resample(volume, onto, prepare=prepare)
    assert sum(seen) == raw.size
    assert len(seen) == (1 if at_once > 1 else max(seen) and raw.size // seen[0])
    at = np.moveaxis(grid.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1))), -1, 0)
    at = [np.clip(a, 0, n - 1) for a, n in zip(at, grid.shape, strict=True)]
    expected = map_coordinates(np.clip(raw[0], -100, 200) / 50, at, order=3, mode="mirror", output=np.float64)
    assert np.abs(made.values[0] - expected).max() < 3e-6 * np.abs(expected).max() + 3e-6


def test_a_box_shares_the_volumes_memory() -> None:
    grid = Grid.from_spacing((6, 7, 8), (1, 2, 3), direction=np.diag([-1.0, 1, -1]))
    volume = Volume(noise((2, 6, 7, 8)), grid)
    box = grid.reoriented().window((1, 2, 3), (4, 3, 2))
    part = crop(volume, box)
    assert np.shares_memory(part.values, volume.values)
    assert np.array_equal(part.values, resample(volume, box).values)
    for other in (grid.window((3, 3, 3), (6, 7, 8)), grid.with_spacing((1, 1, 1))):
        with pytest.raises(ValueError, match="is no box of"):
            crop(volume, other)

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from medseg.core.errors import InputError
from medseg.core.grid import Grid


@st.composite
def grids(draw: st.DrawFn, largest: int = 6) -> Grid:
    """Any grid: permuted, flipped, oblique, anisotropic, far from the origin."""
    shape = tuple(draw(st.integers(1, largest)) for _ in range(3))
    spacing = [draw(st.floats(0.2, 6)) for _ in range(3)]
    order = draw(st.permutations(range(3)))
    flips = [draw(st.sampled_from((-1.0, 1.0))) for _ in range(3)]
    turn = Rotation.from_euler("xyz", [draw(st.floats(-40, 40)) for _ in range(3)], degrees=True).as_matrix()
    if draw(st.booleans()):
        turn = np.eye(3)
    origin = [draw(st.floats(-300, 300)) for _ in range(3)]
    return Grid.from_spacing(shape, spacing, origin, turn @ np.eye(3)[:, order] * flips)


def positions(grid: Grid) -> np.ndarray:
    return grid.to_world(np.stack(np.indices(grid.shape), axis=-1)).reshape(-1, 3)


def as_set(points: np.ndarray) -> np.ndarray:
    rounded = np.round(points, 4) + 0.0
    return rounded[np.lexsort(rounded.T)]


def test_a_position_worked_out_by_hand() -> None:
    grid = Grid.from_spacing((10, 20, 30), (1, 2, 3), (5, 6, 7))
    assert grid.to_world((1, 1, 1)).tolist() == [6, 8, 10]
    assert grid.to_index((6, 8, 10)).tolist() == [1, 1, 1]
    assert grid.spacing == (1, 2, 3)
    assert grid.voxel_volume == pytest.approx(6)
    assert grid.origin.tolist() == [5, 6, 7]
    assert repr(grid) == "Grid(10x20x30, 1x2x3 mm, RAS, first voxel at 5x6x7 mm)"


@given(grids(), arrays(np.float64, (4, 3), elements=st.floats(-500, 500)))
def test_index_and_world_are_inverse(grid: Grid, points: np.ndarray) -> None:
    assert grid.to_index(grid.to_world(points)) == pytest.approx(points, abs=1e-6)
    assert grid.to_world(grid.to_index(points)) == pytest.approx(points, abs=1e-6)


@given(grids())
def test_direction_and_spacing_make_the_affine(grid: Grid) -> None:
    assert grid.direction * grid.spacing == pytest.approx(grid.affine[:3, :3])
    assert grid.voxel_volume == pytest.approx(np.prod(grid.spacing))  # no shear among these
    assert Grid.from_spacing(grid.shape, grid.spacing, grid.origin, grid.direction).matches(grid, 1e-6)


def test_orientation_is_nibabels() -> None:
    for ornt in np.ndindex(3, 3, 3, 2, 2, 2):
        order, flips = ornt[:3], ornt[3:]
        if len(set(order)) == 3:
            grid = Grid.from_spacing((2, 3, 4), (1, 2, 3), direction=np.eye(3)[:, order] * (np.array(flips) * 2 - 1))
            assert grid.orientation == "".join(nib.aff2axcodes(grid.affine))


@given(grids())
def test_reorienting_moves_no_voxel_and_ends_in_ras(grid: Grid) -> None:
    turned = grid.reoriented()
    assert as_set(positions(turned)) == pytest.approx(as_set(positions(grid)), abs=2e-4)
    assert turned.orientation == "RAS"
    assert turned.axes == (0, 1, 2)
    assert turned.reoriented() == turned
    assert sorted(turned.spacing) == pytest.approx(sorted(grid.spacing))


@given(grids(largest=30), arrays(np.float64, 3, elements=st.floats(0.2, 8)))
def test_a_new_spacing_keeps_the_field_of_view(grid: Grid, spacing: np.ndarray) -> None:
    other = grid.with_spacing(spacing)
    middle = [(np.array(g.shape) - 1) / 2 for g in (grid, other)]
    assert other.to_world(middle[1]) == pytest.approx(grid.to_world(middle[0]), abs=1e-6)
    assert other.spacing == pytest.approx(spacing)
    extents = [np.array(g.shape) * g.spacing for g in (grid, other)]
    assert (extents[1] >= extents[0] - 0.05 * spacing - 1e-6).all()
    assert (extents[1] < extents[0] + spacing).all()
    assert other.direction == pytest.approx(grid.direction)


def test_its_own_spacing_gives_the_same_grid() -> None:
    grid = Grid.from_spacing((5, 6, 7), (0.7, 0.8, 2.5), (1, 2, 3))
    assert grid.with_spacing(grid.spacing).matches(grid, 1e-9)


@pytest.mark.parametrize("spacing", [0, -1, (1, 1, 0), np.nan, (1, np.inf, 1)])
def test_an_impossible_spacing_is_refused(spacing: object) -> None:
    with pytest.raises(InputError, match="spacing"):
        Grid.from_spacing((5, 5, 5), 1).with_spacing(spacing)  # type: ignore[arg-type]


@given(grids(), st.tuples(*[st.integers(-4, 4)] * 3), st.tuples(*[st.integers(1, 4)] * 3))
def test_a_window_is_a_box_of_the_same_voxels(grid: Grid, start: tuple[int, ...], shape: tuple[int, int, int]) -> None:
    window = grid.window(start, shape)
    assert window.shape == shape
    index = np.array([s - 1 for s in shape])
    assert window.to_world(index) == pytest.approx(grid.to_world(index + start), abs=1e-6)
    assert window.window(-np.array(start), grid.shape).matches(grid, 1e-6)


def test_corners() -> None:
    corners = Grid.from_spacing((2, 3, 4), (1, 1, 1)).corners()
    assert len(corners) == 8
    assert corners.min(axis=0).tolist() == [0, 0, 0]
    assert corners.max(axis=0).tolist() == [1, 2, 3]


def test_rounding_is_tolerated_and_a_shift_is_not() -> None:
    grid = Grid.from_spacing((100, 100, 50), (0.7, 0.7, 5), (-120.4, 80.2, 33.3))
    rounded = Grid(grid.shape, grid.affine.astype(np.float32).round(4))
    assert grid.matches(rounded)
    moved = grid.affine.copy()
    moved[0, 3] += 0.5
    assert not grid.matches(Grid(grid.shape, moved))
    assert grid.distance(Grid(grid.shape, moved)) == pytest.approx(0.5)
    assert grid.matches(Grid(grid.shape, moved), tolerance=0.6)
    # A spacing off by a thousandth adds up over the field of view.
    assert not grid.matches(Grid.from_spacing(grid.shape, (0.701, 0.7, 5), grid.origin))
    assert grid.distance(Grid((100, 100, 51), grid.affine)) == float("inf")


@given(grids())
def test_equal_grids_hash_alike(grid: Grid) -> None:
    again = Grid(grid.shape, grid.affine * np.where(grid.affine == 0, -1.0, 1.0))  # -0.0 where 0.0 was
    assert again == grid
    assert hash(again) == hash(grid)
    assert grid != "a grid"


def test_the_affine_is_a_copy_and_stays() -> None:
    affine = np.eye(4)
    grid = Grid((2, 2, 2), affine)
    affine[0, 0] = 7
    assert grid.spacing == (1, 1, 1)
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 7


def changed(row: int, column: int, value: float) -> np.ndarray:
    affine = np.eye(4)
    affine[row, column] = value
    return affine


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (changed(0, 0, 0), "singular"),
        (changed(0, 0, np.nan), "not a 4x4 matrix of finite"),
        (changed(0, 3, np.inf), "not a 4x4 matrix of finite"),
        (np.eye(3), "not a 4x4 matrix of finite"),
        (np.diag([1e200, 1e200, 1e200, 1]), "not a 4x4 matrix of finite"),
        (changed(1, 3, 1e200), "not a 4x4 matrix of finite"),
        (np.diag([1e-200, 1e-200, 1e-200, 1]), "singular"),
        (changed(3, 0, 0.5), "ends in the row"),
        (np.eye(4) * 2, "ends in the row"),
    ],
)
def test_an_affine_that_is_none_is_refused(affine: np.ndarray, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Grid((2, 2, 2), affine)


def test_axes_in_one_plane_are_refused() -> None:
    affine = np.eye(4)
    affine[:3, 2] = affine[:3, 0] + affine[:3, 1]
    with pytest.raises(InputError, match="singular"):
        Grid((2, 2, 2), affine)


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, -1, 2), (2, 2), (2, 2, 2, 2)])
def test_a_shape_that_is_none_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shape"):
        Grid(shape, np.eye(4))  # type: ignore[arg-type]

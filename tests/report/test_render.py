"""Bodies whose place, size and order before the eye are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medseg.core.grid import Grid
from medseg.report.render import _surface, render

SIDE = 160
SPACING = (1.0, 1.5, 2.0)
RAS = Grid.from_spacing((80, 60, 40), SPACING, origin=(-39.5, -44.25, -39.0))
RED, GREEN = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
COLOURS = np.stack([RED, GREEN])


def ball(centre: tuple[float, float, float], radius: float, grid: Grid = RAS) -> np.ndarray:
    """Voxels (X, Y, Z) within a radius (mm) of a place (mm, RAS)."""
    places = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    return np.linalg.norm(grid.to_world(places) - centre, axis=-1) < radius


def scene(*balls: tuple[tuple[float, float, float], float]) -> np.ndarray:
    labels = np.zeros(RAS.shape, np.uint8)
    for number, (centre, radius) in enumerate(balls, start=1):
        labels[ball(centre, radius)] = number
    return labels


def of(picture: np.ndarray, channel: int) -> np.ndarray:
    """Where a structure is seen that is red (0) or green (1)."""
    return (picture[..., 3] > 0) & (picture[..., channel] > picture[..., 1 - channel])


@pytest.mark.parametrize("nearer", [1, 2])
def test_the_nearer_of_two_spheres_hides_the_other(nearer: int) -> None:
    front, back = ((0.0, 20.0, 0.0), 14.0), ((0.0, -20.0, 0.0), 14.0)
    picture = render(scene(*((front, back) if nearer == 1 else (back, front))), RAS, COLOURS, SIDE)
    whole, part = of(picture, nearer - 1), of(picture, 2 - nearer)
    rows, columns = np.nonzero(whole)
    tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert tall == pytest.approx(wide, rel=0.05), "a sphere is round, whatever the voxels are"
    assert whole.sum() == pytest.approx(np.pi / 4 * tall * wide, rel=0.04), "nothing covers it"
    assert 0.2 * whole.sum() < part.sum() < 0.9 * whole.sum(), "and it covers the other"


def test_the_patients_right_is_left_and_the_head_is_up() -> None:
    picture = render(scene(((25, 0, -20), 10), ((-25, 0, 20), 10)), RAS, COLOURS, SIDE)
    right, left = (np.argwhere(of(picture, channel)).mean(axis=0) for channel in (0, 1))
    assert right[1] < SIDE / 2 < left[1]
    assert left[0] < SIDE / 2 < right[0]


def test_what_is_in_front_lies_to_the_right_and_lower_seen_from_the_left_and_above() -> None:
    picture = render(scene(((0, 30, 0), 8), ((0, -30, 0), 8)), RAS, COLOURS, SIDE)
    front, back = (np.argwhere(of(picture, channel)).mean(axis=0) for channel in (0, 1))
    assert front[1] < back[1], "the eye is on the patient's left, to which the front turns away"
    assert front[0] > back[0]


def test_light_comes_from_the_upper_left() -> None:
    picture = render(scene(((0, 0, 0), 25)), RAS, COLOURS, SIDE).astype(float)
    third = SIDE // 3
    assert picture[third, third, 0] > picture[-third, third, 0]
    assert picture[third, third, 0] > picture[third, -third, 0]
    assert picture[third, third, 0] > 1.5 * picture[-third, -third, 0]


def test_a_body_fills_the_picture_and_the_rest_is_clear() -> None:
    picture = render(scene(((0, 0, 0), 25)), RAS, COLOURS, SIDE)
    there = picture[..., 3] > 0
    assert there.any(axis=1).sum() == pytest.approx(0.94 * SIDE, abs=2)
    assert there.sum() == pytest.approx(np.pi / 4 * (0.94 * SIDE) ** 2, rel=0.03)
    assert not picture[~there].any()
    assert there[SIDE // 2 - 40 : SIDE // 2 + 40, SIDE // 2 - 40 : SIDE // 2 + 40].all(), "no holes"


def test_what_lies_within_shines_through_and_what_lies_behind_does_not() -> None:
    within = scene(((0, 0, 0), 25), ((0, 0, 0), 8))
    picture = render(within, RAS, COLOURS, SIDE).astype(int)
    assert picture[SIDE // 2, SIDE // 2, 1] > 50
    assert picture[SIDE // 2, SIDE // 5, 1] < 50
    # Not through a third that lies before both, on the line to the eye.
    third = within.copy()
    third[ball((-12.4, 26.6, 6.2), 9)] = 3
    picture = render(third, RAS, np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), SIDE).astype(int)
    red, green, blue = np.moveaxis(picture[..., :3], -1, 0)
    assert (blue > red + 30).sum() > 200
    assert not ((blue > red + 30) & (green > red + 20)).any()
    # Seen from 25 degrees to the patient's left and 12 above, this lies right behind.
    behind = scene(((0, 15, 0), 25), ((18, -25, -8), 6))
    assert not of(render(behind, RAS, COLOURS, SIDE), 1).any()


@pytest.mark.parametrize("matrix", [np.diag([-1.0, -1, 1]), np.diag([-1.0, 1, 1]), np.eye(3)[[2, 0, 1]]])
def test_storage_does_not_show(matrix: Any) -> None:
    labels = scene(((25, 0, -20), 10), ((-25, 10, 20), 12))
    expected = of(render(labels, RAS, COLOURS, SIDE), 0)
    order = np.abs(matrix).argmax(axis=0)
    flips = tuple(slice(None, None, -1) if matrix[:, a].sum() < 0 else slice(None) for a in range(3))
    turned = labels.transpose(order)[flips]
    affine = np.eye(4)
    affine[:3, :3] = RAS.affine[:3, :3] @ matrix
    ends = [(RAS.shape[a] - 1) * (matrix[a].sum() < 0) for a in range(3)]
    affine[:3, 3] = RAS.to_world(ends)
    grid = Grid(turned.shape, affine)
    assert grid.orientation != "RAS"
    found = of(render(np.ascontiguousarray(turned), grid, COLOURS, SIDE), 0)
    assert np.count_nonzero(found != expected) < 0.02 * np.count_nonzero(expected)


def test_an_oblique_grid_is_upright_in_the_picture() -> None:
    turn = np.radians(30)
    direction = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    middle = direction @ (np.array([99, 79, 59]) / 2 * SPACING)
    grid = Grid.from_spacing((100, 80, 60), SPACING, origin=-middle, direction=direction)
    two = [((25.0, 0.0, -20.0), 10.0), ((-25.0, 0.0, 20.0), 10.0)]
    labels = np.zeros(grid.shape, np.uint8)
    for number, one in enumerate(two, start=1):
        labels[ball(*one, grid)] = number
    found, expected = (of(render(v, g, COLOURS, SIDE), 0) for v, g in ((labels, grid), (scene(*two), RAS)))
    shift = np.argwhere(found).mean(axis=0) - np.argwhere(expected).mean(axis=0)
    assert np.abs(shift).max() < 2


@pytest.mark.parametrize("cell", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("thick", [1, 2, 4, 20])
def test_a_surface_holds_the_volume_of_its_mask(cell: float, thick: int) -> None:
    mask = np.zeros((30, 24, 24), bool)
    mask[3:27, 3:21, 2 : 2 + thick] = True
    points, faces, _ = _surface(mask, np.array(SPACING), cell)
    a, b, c = (points * SPACING)[faces].transpose(1, 0, 2)
    volume = abs(np.einsum("ij,ij->i", a, np.cross(b, c)).sum()) / 6
    # A slab that is two cells thick or less is known to a part of a cell.
    thin = thick * SPACING[2] <= 4 * cell
    assert volume == pytest.approx(mask.sum() * np.prod(SPACING), rel=0.35 if thin else 0.06)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    np.testing.assert_allclose(middle, [14.5, 11.5, 1.5 + thick / 2], atol=0.2)


def test_one_voxel_is_seen_and_none_is_nothing() -> None:
    labels = np.zeros(RAS.shape, np.uint8)
    assert not render(labels, RAS, COLOURS, SIDE).any()
    labels[0, 59, 39] = 2
    assert of(render(labels, RAS, COLOURS, SIDE), 1).sum() > 100
    assert of(render(np.full((1, 1, 1), 2), Grid.from_spacing((1, 1, 1), (1, 1, 9)), COLOURS, SIDE), 1).sum() > 100


def test_the_same_labels_give_the_same_picture() -> None:
    labels = scene(((0, 10, 0), 14), ((0, -20, 0), 14))
    np.testing.assert_array_equal(*(render(labels, RAS, COLOURS, SIDE) for _ in range(2)))

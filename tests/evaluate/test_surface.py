import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medseg.core.grid import Grid
from medseg.evaluate.surface import (
    SurfaceDistances,
    assd,
    element_areas,
    hausdorff,
    nsd,
    surface_area,
    surface_distances,
)

SHEAR = np.array([[1, 0.3, 0], [0, 1, 0.4], [0, 0, 1]])


def voxels(shape, *indices):
    mask = np.zeros(shape, dtype=bool)
    for index in indices:
        mask[index] = True
    return mask


def grid(shape, spacing=(1, 1, 1), direction=None):
    return Grid.from_spacing(shape, spacing, direction=direction)


def rotation(angles):
    turned = np.eye(3)
    for (a, b), angle in zip(itertools.combinations(range(3), 2), angles, strict=True):
        plane = np.eye(3)
        plane[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turned = turned @ plane
    return turned


def everything(first, second, grid):
    """All metrics of a pair, in one array."""
    between = surface_distances(first, second, grid)
    return [hausdorff(between), hausdorff(between, 95), assd(between), nsd(between, 1.0), nsd(between, 2.5)]


def box_area(size, spacing):
    """By hand, for a box of n voxels along each axis: flat elements inside its faces, an element
    of each edge cut at a slant, an eighth of an octahedron at each corner."""
    a, b, c = spacing
    nx, ny, nz = (n - 1 for n in size)
    faces = 2 * (nx * ny * a * b + ny * nz * b * c + nx * nz * a * c)
    edges = 4 * (nx * a * math.hypot(b, c) + ny * b * math.hypot(a, c) + nz * c * math.hypot(a, b)) / 2
    corners = 8 * math.sqrt((a * b) ** 2 + (b * c) ** 2 + (a * c) ** 2) / 8
    return faces + edges + corners


# Answers known beforehand.


def test_two_voxels_two_millimetres_apart():
    # One voxel in three parts them: 2 steps of 1 mm. Each corner's nearest lies across the same axis.
    first, second = voxels((5, 3, 3), (1, 1, 1)), voxels((5, 3, 3), (3, 1, 1))
    between = surface_distances(first, second, grid((5, 3, 3), (1, 2, 3)))
    np.testing.assert_allclose(between.there.distances, [1] * 4 + [2] * 4)
    # Half the surface is 1 mm away, the other half 2 mm.
    assert hausdorff(between) == pytest.approx(2)
    assert hausdorff(between, 95) == pytest.approx(2)
    assert hausdorff(between, 50) == pytest.approx(1)
    assert assd(between) == pytest.approx(1.5)
    assert nsd(between, 0.9) == 0
    assert nsd(between, 1) == pytest.approx(0.5)
    assert nsd(between, 2) == 1


@pytest.mark.parametrize(("axis", "millimetres"), [(0, 0.5), (1, 2.0), (2, 3.0)])
def test_anisotropic_spacing_counts_along_its_own_axis(axis, millimetres):
    index = [2, 2, 2]
    first = voxels((6, 6, 6), tuple(index))
    index[axis] += 1
    between = surface_distances(first, voxels((6, 6, 6), tuple(index)), grid((6, 6, 6), (0.5, 2.0, 3.0)))
    assert hausdorff(between) == pytest.approx(millimetres)
    assert assd(between) == pytest.approx(millimetres / 2)  # four of eight corners are shared


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_shifted_cube_is_as_far_as_it_was_shifted(steps):
    cube = np.zeros((24, 14, 14), dtype=bool)
    cube[3:13, 2:12, 2:12] = True
    between = surface_distances(cube, np.roll(cube, steps, axis=0), grid(cube.shape, (1.5, 1, 1)))
    assert hausdorff(between) == pytest.approx(1.5 * steps)
    # The leading face is more than 5 % of the surface.
    assert hausdorff(between, 95) == pytest.approx(1.5 * steps)
    assert nsd(between, 1.5 * steps) == 1


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1.3, 4)])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 1, 1), (3, 3, 1), (4, 3, 5)])
def test_area_of_a_box(size, spacing):
    # The box fills the whole image: its surface lies on the border.
    assert surface_area(np.ones(size, dtype=bool), grid(size, spacing)) == pytest.approx(box_area(size, spacing))


@pytest.mark.parametrize("spacing", [0.94, 1.0, 0.1, 1.7])
def test_surfaces_far_apart_on_the_border_of_their_box(spacing):
    # What finds nothing near by lies in the last layer; three steps must be no step by rounding.
    long, short = np.zeros((2, 30, 30, 30), dtype=bool)
    long[5:25, 5:25, 5:25] = short[5:20, 5:25, 5:25] = True
    for angles in ((0, 0, 0), (0.3, 0.1, 0.7), (0, 0, math.pi / 2)):
        between = surface_distances(long, short, grid(long.shape, (spacing,) * 3, rotation(angles)))
        assert hausdorff(between) == pytest.approx(5 * spacing)


def test_area_of_a_sheared_plane():
    # A corner that is half inside carries the parallelogram of its two axes.
    sheared = grid((2, 2, 2), (1, 2, 3), SHEAR)
    code = sum(1 << (4 * i + 2 * j + k) for i, j, k in itertools.product((0, 1), repeat=3) if k == 0)
    assert element_areas(sheared)[code] == pytest.approx(np.linalg.norm(np.cross(*sheared.affine[:3, :2].T)))


def test_a_sheared_step_has_its_length_in_millimetres():
    sheared = grid((3, 3, 5), (1, 1, 2), SHEAR)
    between = surface_distances(voxels((3, 3, 5), (1, 1, 1)), voxels((3, 3, 5), (1, 1, 4)), sheared)
    # A step along k is (0, 0.8, 2) mm, one along j (0.3, 1, 0). The near faces are two steps of k
    # apart, less one of j where the voxel has a corner there; the far corners three, with none to spare.
    assert between.there.distances.min() == pytest.approx(np.linalg.norm([0.3, 2 * 0.8 - 1, 4]))
    assert between.there.distances.max() == pytest.approx(np.linalg.norm([0, 3 * 0.8, 6]))


def test_numbers_of_the_reference_program():
    # Two ellipsoids, scored once with google-deepmind/surface-distance 0.1.
    index = np.indices((32, 40, 20))
    spacing = np.array([1, 0.8, 2.5])

    def ball(centre, radius):
        return sum(((i - c) * s) ** 2 for i, c, s in zip(index, centre, spacing, strict=True)) < radius**2

    first, second = ball((15, 20, 9), 11), ball((17, 19, 10), 10)
    where = grid(first.shape, spacing)
    between = surface_distances(first, second, where)
    assert surface_area(first, where) == pytest.approx(1765.0593725680867)
    assert surface_area(second, where) == pytest.approx(1405.0278773014543)
    assert [hausdorff(between, p) for p in (50, 95, 100)] == pytest.approx([1.2806248474865698, 5, 5])
    assert [nsd(between, t) for t in (1, 2, 3)] == pytest.approx(
        [0.5207940270788283, 0.6909739535640338, 0.8980722710485797]
    )
    means = [np.average(way.distances, weights=way.areas) for way in (between.there, between.back)]
    assert means == pytest.approx([1.58365105326812, 1.1173537290911546])


# Surface elements.


def test_areas_of_elements_do_not_know_left_from_right_nor_inside_from_outside():
    areas = element_areas(grid((2, 2, 2), (0.8, 1.1, 3)))
    corners = (np.arange(256)[:, None] >> np.arange(8) & 1).reshape(-1, 2, 2, 2)
    assert areas[0] == areas[255] == 0
    assert areas[1:255].min() > 0
    np.testing.assert_allclose(areas, areas[::-1])
    for axis in (1, 2, 3):
        flipped = np.flip(corners, axis).reshape(-1, 8) << np.arange(8)
        np.testing.assert_allclose(areas[flipped.sum(axis=1)], areas)


# Awkward cases.


@pytest.mark.parametrize(
    ("first", "second", "far", "share"),
    [((), ((1, 1, 1),), math.inf, 0), (((1, 1, 1),), (), math.inf, 0), ((), (), math.nan, math.nan)],
)
def test_empty_masks(first, second, far, share):
    between = surface_distances(voxels((3, 3, 3), *first), voxels((3, 3, 3), *second), grid((3, 3, 3)))
    for found in (hausdorff(between), hausdorff(between, 95), assd(between)):
        assert found == pytest.approx(far, nan_ok=True)
    assert nsd(between, 5) == pytest.approx(share, nan_ok=True)


def test_a_mask_at_the_border_has_the_surface_it_has_within():
    inner = voxels((7, 7, 7), np.s_[2:4, 2:5, 2:5])
    outer = voxels((7, 7, 7), np.s_[0:2, 0:3, 4:7])
    assert surface_area(inner, grid((7, 7, 7))) == pytest.approx(surface_area(outer, grid((7, 7, 7))))
    pair = voxels((2, 3, 3), np.s_[:, :, :2]), voxels((2, 3, 3), np.s_[:, 1:, :])
    padded = [np.pad(mask, 2) for mask in pair]
    np.testing.assert_allclose(everything(*pair, grid((2, 3, 3))), everything(*padded, grid((6, 7, 7))))


def test_a_volume_of_one_slice():
    first, second = voxels((8, 8, 1), np.s_[1:4, 1:4]), voxels((8, 8, 1), np.s_[3:6, 1:4])
    assert hausdorff(surface_distances(first, second, grid((8, 8, 1), (1.5, 1, 9)))) == pytest.approx(3)


def test_rounding_of_the_affine_does_not_decide_about_the_tolerance():
    first, second = voxels((4, 3, 3), (1, 1, 1)), voxels((4, 3, 3), (2, 1, 1))
    between = surface_distances(first, second, grid((4, 3, 3), (1.0000001, 1, 1)))
    assert nsd(between, 1.0) == 1


@pytest.mark.parametrize("shapes", [((2, 2, 2), (2, 2, 3)), ((2, 2, 3), (2, 2, 2)), ((2, 2), (2, 2))])
def test_masks_off_the_grid_are_refused(shapes):
    with pytest.raises(ValueError, match="shape"):
        surface_distances(np.ones(shapes[0], bool), np.ones(shapes[1], bool), grid((2, 2, 2)))


# Beside a slow and obvious program.


def brute(first, second, grid) -> SurfaceDistances:
    """Every corner against every corner, one after the other, in mm."""

    def elements(mask):
        padded, found = np.pad(mask, 1), []
        for corner in itertools.product(*(range(n + 1) for n in mask.shape)):
            code = 0
            for bit, (i, j, k) in enumerate(itertools.product((0, 1), repeat=3)):
                code += int(padded[corner[0] + i, corner[1] + j, corner[2] + k]) << bit
            if 0 < code < 255:
                found.append((grid.affine[:3, :3] @ corner, element_areas(grid)[code]))
        return found

    def way(start, goal):
        return [(min(np.linalg.norm(p - q) for q, _ in goal), area) for p, area in start]

    def percentile(way, percent):
        total, covered = sum(area for _, area in way), 0
        for distance, area in sorted(way):
            covered += area
            if covered >= total * (percent / 100 - 1e-9):
                return distance
        return max(distance for distance, _ in way)

    one, other = elements(first), elements(second)
    there, back = way(one, other), way(other, one)
    area = sum(a for _, a in there + back)
    return [
        max(percentile(there, 100), percentile(back, 100)),
        max(percentile(there, 95), percentile(back, 95)),
        sum(d * a for d, a in there + back) / area,
        sum(a for d, a in there + back if d <= 1.0001) / area,
        sum(a for d, a in there + back if d <= 2.5001) / area,
    ]


SPACING = st.tuples(*[st.sampled_from([0.5, 0.8, 1.0, 1.7, 3.0])] * 3)
PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape))
)
FEW = settings(max_examples=25, deadline=None)


def filled(pair):
    assume(pair[0].any() and pair[1].any())
    return pair


@given(PAIRS, SPACING, st.booleans())
@FEW
def test_fast_and_slow_agree(pair, spacing, sheared):
    first, second = filled(pair)
    where = grid(first.shape, spacing, SHEAR / np.linalg.norm(SHEAR, axis=0) if sheared else None)
    np.testing.assert_allclose(everything(first, second, where), brute(first, second, where), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*scipy.ndimage:DeprecationWarning")
@given(PAIRS, SPACING)
@FEW
def test_as_the_program_that_defined_them_measures(pair, spacing):
    """google-deepmind/surface-distance: the same elements and areas; its percentile is the first distance beyond, where
    the share is met exactly."""
    import surface_distance as theirs

    first, second = filled(pair)
    where = grid(first.shape, spacing)
    known = theirs.compute_surface_distances(first, second, spacing)
    between = surface_distances(first, second, where)
    assert hausdorff(between) == pytest.approx(theirs.compute_robust_hausdorff(known, 100))
    for percent in (50.123, 94.987):
        assert hausdorff(between, percent) == pytest.approx(theirs.compute_robust_hausdorff(known, percent))
    for tolerance in (0.6, 1.1, 2.6):
        expected = theirs.compute_surface_dice_at_tolerance(known, tolerance)
        assert nsd(between, tolerance) == pytest.approx(expected)


@given(PAIRS, SPACING)
@FEW
def test_as_monai_measures(pair, spacing):
    """MONAI's overlaps, and its NSD with subvoxels, which has the same elements. Its Hausdorff and mean distances count
    voxels of the border, and are others (docs/metrics.md)."""
    import torch
    from monai.metrics import compute_dice, compute_iou, compute_surface_dice

    from medseg.evaluate.overlap import dice, iou

    first, second = filled(pair)
    one, other = (torch.from_numpy(np.pad(mask, 2)[None, None].astype(np.float32)) for mask in (first, second))
    assert dice(first, second) == pytest.approx(float(compute_dice(one, other)))
    assert iou(first, second) == pytest.approx(float(compute_iou(one, other)))
    options = {"include_background": True, "spacing": list(spacing), "use_subvoxels": True}
    for tolerance in (0.6, 1.1, 2.6):
        expected = float(compute_surface_dice(one, other, [tolerance], **options))
        found = nsd(surface_distances(first, second, grid(first.shape, spacing)), tolerance)
        assert found == pytest.approx(expected, abs=1e-5)


# Properties.


@given(PAIRS, SPACING)
@FEW
def test_which_mask_comes_first_does_not_matter(pair, spacing):
    first, second = filled(pair)
    where = grid(first.shape, spacing)
    np.testing.assert_allclose(everything(first, second, where), everything(second, first, where))


@given(PAIRS, SPACING)
@FEW
def test_a_mask_is_at_no_distance_from_itself(pair, spacing):
    first, _ = filled(pair)
    assert everything(first, first, grid(first.shape, spacing)) == [0, 0, 0, 1, 1]
    assert nsd(surface_distances(first, first, grid(first.shape, spacing)), 0) == 1


@given(PAIRS, SPACING, st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
@FEW
def test_axes_may_be_permuted_and_flipped(pair, spacing, order, flips):
    first, second = filled(pair)
    axes = [axis for axis, flip in enumerate(flips) if flip]
    moved = [np.flip(mask.transpose(order), axes) for mask in pair]
    there = grid(moved[0].shape, np.asarray(spacing)[list(order)])
    np.testing.assert_allclose(everything(*moved, there), everything(first, second, grid(first.shape, spacing)))


@given(PAIRS, SPACING, st.tuples(*[st.floats(-3, 3)] * 3), st.booleans())
@FEW
def test_the_whole_scan_may_be_turned(pair, spacing, angles, sheared):
    first, second = filled(pair)
    direction = SHEAR / np.linalg.norm(SHEAR, axis=0) if sheared else np.eye(3)
    straight, turned = (grid(first.shape, spacing, d) for d in (direction, rotation(angles) @ direction))
    np.testing.assert_allclose(everything(first, second, turned), everything(first, second, straight))


@given(PAIRS, SPACING)
@FEW
def test_metrics_keep_their_order(pair, spacing):
    first, second = filled(pair)
    farthest, robust, average, near, nearer = everything(first, second, grid(first.shape, spacing))
    assert 0 <= average <= farthest
    assert 0 <= robust <= farthest
    assert 0 <= near <= nearer <= 1

"""Borders, middles and centre lines: answers known beforehand, and slow obvious versions beside the fast ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.evaluate.form import boundary_iou, centroid_distance, cldice, tubes

SHAPE = (6, 5, 4)
masks = arrays(np.bool_, SHAPE)
spacings = st.tuples(*[st.sampled_from([0.5, 1.0, 1.7, 3.0])] * 3)


def box(shape, *sides):
    mask = np.zeros(shape, dtype=bool)
    mask[sides] = True
    return mask


def slowly(mask, spacing, width):
    """The voxels from whose middle that of a voxel outside is no farther than the width, or than the next voxel."""
    width = max(width, *spacing)
    inside = np.argwhere(np.pad(mask, 1))
    outside = np.argwhere(~np.pad(mask, 1))
    near = {tuple(i - 1) for i in inside if np.sqrt((((outside - i) * spacing) ** 2).sum(axis=1)).min() <= width + 1e-4}
    return {index for index in near if mask[index]}


@given(masks, masks, spacings, st.sampled_from([0.0, 1.0, 2.5]))
def test_boundary_iou_is_that_of_the_obvious_way(first, second, spacing, width):
    grid = Grid.from_spacing(SHAPE, spacing)
    ours, theirs = (slowly(mask, np.array(spacing), width) for mask in (first, second))
    found = boundary_iou(first, second, grid, width)
    if ours | theirs:
        assert found == pytest.approx(len(ours & theirs) / len(ours | theirs))
    else:
        assert np.isnan(found)


def test_the_border_of_a_large_box_by_hand():
    # 10 x 10 x 10 with a border of one voxel: 1000 less 8 x 8 x 8. Shifted by one, 9 x 10 x 10 are shared.
    first, second = (box((14, 12, 12), slice(n, n + 10), slice(1, 11), slice(1, 11)) for n in (1, 2))
    grid = Grid.from_spacing(first.shape, 1.0)
    assert boundary_iou(first, first, grid, 1.0) == 1
    border = 1000 - 8**3
    # Of the 9 layers in both boxes the ring (36) is in both borders; the inside of an end layer is in one alone.
    shared = 9 * 36
    assert boundary_iou(first, second, grid, 1.0) == pytest.approx(shared / (2 * border - shared))


def test_a_border_counts_the_nearest_voxels_however_thin_it_is():
    cube = box((7, 7, 7), slice(1, 6), slice(1, 6), slice(1, 6))
    grid = Grid.from_spacing(cube.shape, (1, 1, 4))
    assert boundary_iou(cube, cube, grid, 0.0) == 1


def test_a_single_slice_has_a_border_in_its_plane_alone():
    # A frame of one voxel: 10 x 10 less 8 x 8; shifted by one.
    first, second = (box((12, 12, 1), slice(n, n + 10), slice(1, 11)) for n in (0, 1))
    grid = Grid.from_spacing(first.shape, (1, 1, 5))
    ours, theirs = (
        m & ~np.pad(m[1:-1, 1:-1] & m[2:, 1:-1] & m[:-2, 1:-1] & m[1:-1, 2:] & m[1:-1, :-2], ((1, 1), (1, 1), (0, 0)))
        for m in (first, second)
    )
    wanted = (ours & theirs).sum() / (ours | theirs).sum()
    assert boundary_iou(first, second, grid, 1.0, flat=[2]) == pytest.approx(wanted)


def test_one_empty_mask_has_no_border_in_common():
    cube, nothing = box((4, 4, 4), 1, 1, 1), np.zeros((4, 4, 4), dtype=bool)
    grid = Grid.from_spacing(cube.shape, 1.0)
    assert boundary_iou(cube, nothing, grid, 1.0) == 0
    assert np.isnan(boundary_iou(nothing, nothing, grid, 1.0))


def test_centroids_are_as_far_as_they_were_moved():
    first, second = box((9, 9, 9), 2, slice(1, 4), 3), box((9, 9, 9), 4, slice(1, 4), 4)
    assert centroid_distance(first, second, Grid.from_spacing(first.shape, (1.5, 1, 2))) == pytest.approx(
        np.hypot(3, 2)
    )
    assert np.isinf(centroid_distance(first, first & False, Grid.from_spacing(first.shape, 1.0)))
    assert np.isnan(centroid_distance(first & False, first & False, Grid.from_spacing(first.shape, 1.0)))


@given(masks.filter(np.any), masks.filter(np.any), spacings)
def test_centroids_are_means_of_positions(first, second, spacing):
    shear = np.array([[1, 0.3, 0, 5], [0, 1, 0.4, 6], [0, 0, 1, 7], [0, 0, 0, 1]]) @ np.diag([*spacing, 1])
    grid = Grid(SHAPE, shear)
    middles = [np.mean([grid.to_world(np.array(i)) for i in np.argwhere(m)], axis=0) for m in (first, second)]
    assert centroid_distance(first, second, grid) == pytest.approx(np.linalg.norm(middles[0] - middles[1]), abs=1e-9)


def test_cldice_sees_a_gap_and_no_thickness():
    thick = box((30, 9, 9), slice(2, 28), slice(2, 7), slice(2, 7))
    thin = box((30, 9, 9), slice(2, 28), slice(3, 6), slice(3, 6))
    assert cldice(thin, thick) == pytest.approx(1, abs=0.05)
    halved = thin & ~box((30, 9, 9), slice(10, 28))
    assert cldice(halved, thick) == pytest.approx(2 * 8 / 26 / (1 + 8 / 26), abs=0.08)
    assert cldice(thick & False, thick) == 0
    assert np.isnan(cldice(thick & False, thick & False))


def test_cldice_of_lines_by_hand():
    # A line of 10 and one of 6 of its voxels: all of the short one lies in the long one.
    long, short = box((12, 3, 3), slice(1, 11), 1, 1), box((12, 3, 3), slice(1, 7), 1, 1)
    assert cldice(short, long) == pytest.approx(2 * 1 * 0.6 / 1.6)
    assert cldice(long, short) == pytest.approx(cldice(short, long))


def test_no_lump_is_lost_on_the_way_to_its_centre_line():
    # The thinning leaves nothing of a cube of four.
    two = box((16, 6, 6), slice(1, 5), slice(1, 5), slice(1, 5)) | box((16, 6, 6), slice(8, 15), 2, 2)
    assert cldice(two, two) == 1
    assert cldice(two & box(two.shape, slice(7, 16)), two) < 0.5


def test_masks_on_the_border_of_the_image_have_centre_lines():
    through = np.ones((8, 1, 1), dtype=bool)
    assert cldice(through, through) == 1


def test_tubes_are_known_by_their_names():
    names = ["liver", "hepatic_vessel", "Aorta", "portal vein", "inferior_vena_cava", "Airways", "bile duct", "tubes"]
    names += ["pulmonary_artery", "cardioventricle", "tuber", "spleen"]
    labels = LabelSet.from_names(names)
    assert {labels.name_of(n) for n in tubes(labels)} == set(names) - {"liver", "cardioventricle", "tuber", "spleen"}


def test_borders_do_not_depend_on_the_order_of_axes():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 7, 6, 5)) < 0.6
    spacing = (1.0, 2.0, 0.5)
    found = {
        round(
            boundary_iou(
                first.transpose(o),
                second.transpose(o),
                Grid.from_spacing([first.shape[a] for a in o], [spacing[a] for a in o]),
                1.5,
            ),
            9,
        )
        for o in itertools.permutations(range(3))
    }
    assert len(found) == 1

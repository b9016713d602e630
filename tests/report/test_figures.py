"""Known places, known planes: what a picture must show is worked out by hand."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.resample import resample
from medseg.core.volume import LabelMap, Volume
from medseg.report import figures

ORGANS = LabelSet.from_names(["liver", "spleen"])
RAS = Grid.from_spacing((40, 30, 20), (1.0, 2.0, 4.0), origin=(-20, -30, -40))
LPS = Grid(
    (40, 30, 20), RAS.affine @ np.diag([-1.0, -1, 1, 1]) + np.array([[0, 0, 0, 39], [0, 0, 0, 58], [0] * 4, [0] * 4])
)


def scene(grid: Grid = RAS) -> tuple[np.ndarray, LabelMap]:
    """A blob on the patient's right, in front and high up (RAS+ voxels), and a bright voxel in it."""
    values = np.zeros(RAS.shape, np.uint8)
    values[30:36, 22:26, 15:18] = 1
    image = np.zeros(RAS.shape, np.float32)
    image[30:36, 22:26, 15:18] = 50
    image[35, 25, 17] = 100
    labels = resample(LabelMap(values, RAS, ORGANS), grid)
    return resample(Volume(image[None], RAS), grid).values[0], labels


def empty(grid: Grid = RAS) -> LabelMap:
    return LabelMap(np.zeros(grid.shape, np.uint8), grid, ORGANS)


def middle(mask: np.ndarray) -> tuple[float, float]:
    """Centre of a mask as a share of the picture's height and width."""
    rows, columns = np.nonzero(mask)
    return (rows.mean() + 0.5) / mask.shape[0], (columns.mean() + 0.5) / mask.shape[1]


def test_patients_right_is_left_in_the_picture_anterior_and_superior_are_up():
    image, labels = scene()
    axial, coronal, sagittal = figures.planes(image, RAS, labels, labels)
    down, across = middle(axial.reference == 1)
    assert across < 0.5, "right is left"
    assert down < 0.5, "anterior is up"
    down, across = middle(coronal.reference == 1)
    assert across < 0.5
    assert down < 0.5, "superior is up"
    down, across = middle(sagittal.reference == 1)
    assert across < 0.5, "anterior is left"
    assert down < 0.5
    assert [p.letters for p in (axial, coronal, sagittal)] == ["RLAP", "RLSI", "APSI"]


def test_the_plane_itself_voxel_by_voxel():
    image, labels = scene()
    axial = figures.planes(image, RAS, labels, empty())[0]
    # 30 mm on x, y, z are 30, 15 and 8 voxels: the window is x 0-39, y 7-29, z 7-19.
    expected = labels.values[0:40, 7:30, 15][::-1, ::-1].T
    np.testing.assert_array_equal(axial.reference, expected)
    assert not axial.prediction.any()
    assert axial.position == RAS.to_world((0, 0, 15))[2]


@pytest.mark.parametrize("axes", ["LPS", "permuted"])
def test_storage_does_not_show(axes):
    matrix = np.zeros((4, 4))
    matrix[[2, 0, 1, 3], [0, 1, 2, 3]] = 1  # i runs along z, j along x, k along y
    grid = LPS if axes == "LPS" else Grid((20, 40, 30), RAS.affine @ matrix)
    assert grid.orientation == {"LPS": "LPS", "permuted": "SRA"}[axes]
    for ours, theirs in zip(figures.planes(*_args(RAS)), figures.planes(*_args(grid)), strict=True):
        np.testing.assert_array_equal(ours.grey, theirs.grey)
        np.testing.assert_array_equal(ours.reference, theirs.reference)
        assert (ours.pixel_mm, ours.letters) == (theirs.pixel_mm, theirs.letters)
        assert ours.position == pytest.approx(theirs.position)


def _args(grid):
    image, labels = scene(grid)
    return image, grid, labels, labels


def test_pixels_have_the_size_of_voxels():
    axial, coronal, sagittal = figures.planes(np.zeros(RAS.shape), RAS, empty(), empty())
    assert (axial.pixel_mm, coronal.pixel_mm, sagittal.pixel_mm) == ((2, 1), (4, 1), (4, 2))
    assert axial.grey.shape == (30, 40)
    assert axial.size_mm == (60, 40)
    assert coronal.size_mm == (80, 40)
    assert sagittal.size_mm == (80, 60)


def test_a_small_organ_weighs_as_much_as_a_large_one():
    values = np.zeros((10, 10, 10), np.uint8)
    values[:, :, 0:4] = 1
    values[0:6, :, 4] = 1
    values[9, 9, 4] = 2
    grid = Grid.from_spacing((10, 10, 10), (1, 1, 1))
    labels = LabelMap(values, grid, ORGANS)
    assert figures.planes(np.zeros((10, 10, 10)), grid, labels, labels)[0].position == 4


def test_without_a_reference_the_prediction_chooses_the_plane():
    image, labels = scene()
    assert (figures.planes(image, RAS, empty(), labels)[0].prediction == 1).any()


def test_another_grid_is_refused():
    image, labels = scene()
    with pytest.raises(InputError, match="prediction does not lie"):
        figures.planes(image, RAS, labels, empty(RAS.window((1, 0, 0), RAS.shape)))


def test_grey_keeps_the_contrast_of_organs_beside_metal():
    values = np.full((4, 4, 4), -1000.0)
    values[0] = 3000
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1:3] = 1
    values[1], values[2] = 0, 100
    grey = figures._grey(values, *figures._window(values, labels))
    assert grey[0].min() == 255
    assert grey[3].max() == 0
    assert int(grey[2, 0, 0]) - int(grey[1, 0, 0]) == pytest.approx(85, abs=1)


def test_grey_of_what_is_flat_or_not_a_number():
    nothing = np.zeros((2, 2, 2), np.uint8)
    for values in (np.ones((2, 2, 2)), np.full((2, 2, 2), np.nan)):
        grey = figures._grey(values, *figures._window(values, nothing))
        assert grey.dtype == np.uint8
        assert not grey.any()


def test_a_window_that_is_given_is_kept():
    image, labels = scene()
    axial = figures.planes(image, RAS, labels, window=(0, 200))[0]
    np.testing.assert_array_equal(axial.grey[axial.reference > 0], 64)  # 50 of 200
    np.testing.assert_array_equal(axial.prediction, axial.reference)


def test_outline_of_one_pixel_is_the_diamond_around_its_centre():
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True  # centre at (x, y) = (5, 3) in half pixels
    path = figures.outline(mask)
    x, y = (int(n) for n in path[1:].split("l")[0].split())
    assert abs(x - 5) + abs(y - 3) == 1
    assert path.endswith("z")
    assert figures.outline(np.zeros((3, 3), bool)) == ""


def test_outline_has_a_part_for_a_hole():
    mask = np.ones((5, 5), bool)
    mask[2, 2] = False
    assert figures.outline(mask).count("M") == figures.outline(mask).count("z") == 2


def test_png_comes_back():
    grey = np.random.default_rng(0).integers(0, 256, (7, 5), dtype=np.uint8)
    data = base64.b64decode(figures.png(grey).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), grey)


def test_shrunk_averages_blocks():
    small, n = figures.shrunk(np.array([[0, 10, 20], [0, 10, 20]], np.uint8), 2)
    assert n == 2
    np.testing.assert_array_equal(small, [[5, 20]])
    assert figures.shrunk(np.zeros((3, 3), np.uint8), 3)[1] == 1


def test_a_coarser_crop_keeps_every_voxel_where_it_was():
    image, labels = scene()
    whole = figures.cropped(image, RAS, labels, labels)
    few = whole.of(whole.grey.size // 6)
    assert few.grey.size <= whole.grey.size // 6
    assert few.grid.spacing != whole.grid.spacing
    for index in ((0, 0, 0), tuple(n - 1 for n in few.grey.shape), (3, 2, 1)):
        at = tuple(np.rint(whole.grid.to_index(few.grid.to_world(index))).astype(int))
        np.testing.assert_allclose(whole.grid.to_world(at), few.grid.to_world(index))
        assert few.reference[index] == whole.reference[at]
    assert whole.of(whole.grey.size) is whole


def test_thinning_keeps_the_mean_and_drops_what_is_not_finite():
    points = [(float(x), 2.0 * x) for x in range(1000)]
    thin = figures.thinned([*points, (3.0, float("nan"))], most=100)
    assert len(thin) == 100
    assert thin[0] == (4.5, 9.0)
    assert figures.thinned([]) == []

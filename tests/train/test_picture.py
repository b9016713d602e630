from __future__ import annotations

import numpy as np

from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.look import COLOURS, colour
from medseg.core.resample import resample
from medseg.core.volume import LabelMap, Volume
from medseg.report.figures import planes
from medseg.report.page import Overlay, RunPage, report
from medseg.train.picture import picture, side_by_side

LABELS = LabelSet((Label("a", 1), Label("b", 2)))


def test_what_was_found_is_filled_and_the_truth_outlined() -> None:
    grid = Grid.from_spacing((30, 20, 6), (1.0, 1.0, 5.0))
    truth, found = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
    truth[5:15, 5:15, 4] = 1
    found[5:15, 5:15, 4] = 2
    image = picture(Volume(np.zeros((1, *grid.shape), np.float32), grid), LabelMap(found, grid, LABELS),
                    LabelMap(truth, grid, LABELS))  # fmt: skip
    assert image.shape == (256, 384, 3)
    # Rows run from the end of y to its start, columns from the patient's right, the end of x, to the left.
    middle, edge, outside = image[int(256 * 10 / 20), int(384 * 20 / 30)], image[int(256 * 14.5 / 20), 256], image[5, 5]
    assert tuple(edge) == colour(0)
    assert tuple(middle) == tuple(int(0.45 * part) for part in colour(1))
    assert tuple(outside) == (0, 0, 0)


def test_the_reports_page_shows_the_same_colours_and_directions() -> None:
    grid = Grid.from_spacing((40, 30, 9), (1.0, 1.0, 4.0))
    values = np.zeros(grid.shape, np.uint8)
    values[4:12, 4:12, 4], values[20:30, 14:26, 4] = 1, 2
    image, labels = Volume(np.zeros((1, *grid.shape), np.float32), grid), LabelMap(values, grid, LABELS)
    axial = planes(image.values[0], grid, labels, labels)[0]
    shown = picture(image, labels, labels)
    for place, number in enumerate(LABELS.numbers):
        rows, columns = np.nonzero(axial.reference == number)
        ours = np.argwhere((shown == colour(place)).all(axis=-1)).mean(axis=0) / shown.shape[:2]
        assert np.allclose(ours, (rows.mean() / 30, columns.mean() / 40), atol=0.05)
    page = report(RunPage("t", "t", overlays=(Overlay("a", "3d", "best", image.values[0], grid, labels, labels, 1.0),)))
    assert f"--o0: {COLOURS[0]}; --o1: {COLOURS[1]};" in page


def test_the_way_a_file_stores_its_axes_does_not_show() -> None:
    grid = Grid.from_spacing((9, 8, 5), (1.0, 1.0, 4.0))
    rng = np.random.default_rng(0)
    volume = Volume(rng.normal(size=(1, *grid.shape)).astype(np.float32), grid)
    labels = LabelMap(rng.integers(0, 3, grid.shape).astype(np.uint8), grid, LABELS)
    affine = grid.affine @ np.array([[0, -1, 0, 8], [1, 0, 0, 0], [0, 0, -1, 4], [0, 0, 0, 1.0]])
    turned = Grid((8, 9, 5), affine)
    stored = resample(volume, onto=turned), resample(labels, onto=turned)
    assert np.array_equal(picture(volume, labels, labels), picture(stored[0], stored[1], stored[1]))


def test_a_constant_scan_without_labels_and_a_row_of_unequal_pictures() -> None:
    grid = Grid.from_spacing((8, 4, 9), (1.0, 2.0, 1.0))
    empty = LabelMap(np.zeros(grid.shape, np.uint8), grid, LABELS)
    image = picture(Volume(np.full((2, *grid.shape), 7, np.int16), grid), empty, empty)
    row = side_by_side([image, image[:100]])
    assert row.shape == (len(image), 2 * (image.shape[1] + 4), 3)

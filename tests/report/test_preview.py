"""Pictures of known scenes: what is where, in which colour, and which words are written."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.look import COLOURS, colour, palette
from medseg.core.resample import resample
from medseg.core.volume import LabelMap, Volume
from medseg.report import preview as module
from medseg.report.figures import Plane, png_bytes
from medseg.report.preview import preview

RAS = Grid.from_spacing((60, 50, 20), (1.0, 1.0, 3.0))
ORGANS = LabelSet((Label("liver", 3), Label("spleen", 200)))
FIRST, SECOND = (np.array(colour(n)) for n in (0, 1))


def scene(grid: Grid = RAS) -> tuple[np.ndarray, LabelMap]:
    """A box of 10 x 10 x 4 voxels, 1.2 ml, on the patient's right and one of 8 x 8 x 4, 0.768 ml, on the left."""
    values = np.zeros(RAS.shape, np.uint8)
    values[42:52, 20:30, 8:12] = 3
    values[8:16, 21:29, 8:12] = 200
    image = np.random.default_rng(0).normal(size=(1, *RAS.shape)).astype(np.float32)
    shown = resample(LabelMap(values, RAS, ORGANS), grid)
    return resample(Volume(image, RAS), grid).values[0], shown


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was written into the pictures."""
    words: list[str] = []
    text = module._Page.text

    def listen(page: Any, at: Any, words_of_it: str, *more: Any) -> None:
        words.append(words_of_it)
        text(page, at, words_of_it, *more)

    monkeypatch.setattr(module._Page, "text", listen)
    return words


def coloured(picture: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(picture.astype(int) - rgb).max(axis=-1) < 12)


# ---- planes --------------------------------------------------------------------------------------


def plane(labels: np.ndarray) -> Plane:
    grey = np.full(labels.shape, 100, np.uint8)
    return Plane("axial", grey, labels, labels, (1.0, 1.0), "RLAP", 0.0)


def test_an_outline_is_where_the_mask_is() -> None:
    labels = np.zeros((10, 12), np.uint8)
    labels[3:7, 2:9] = 1
    drawn = module._outlined(plane(labels), (240, 200), palette(1)).astype(int)  # 20 pixels a voxel
    rows, columns = np.nonzero(np.any(drawn != 100, axis=-1))
    assert np.allclose([rows.min(), rows.max() + 1], [60, 140], atol=2)
    assert np.allclose([columns.min(), columns.max() + 1], [40, 180], atol=2)
    line = np.all(drawn == FIRST, axis=-1)
    assert line[100, 40:43].any(), "the border is the structure's own colour"
    assert not line[66:134, 46:174].any(), "and the inside is tinted only"
    np.testing.assert_allclose(drawn[100, 100], 100 + 0.16 * (FIRST - 100), atol=1)


def test_of_structures_that_touch_both_outlines_are_seen() -> None:
    labels = np.zeros((10, 12), np.uint8)
    labels[3:7, 2:6], labels[3:7, 6:10] = 1, 2
    drawn = module._outlined(plane(labels), (240, 200), palette(2)).astype(int)
    assert np.all(drawn[100, 118] == FIRST)
    assert np.all(drawn[100, 121] == SECOND)


def test_a_hole_is_outlined_and_one_pixel_is_seen() -> None:
    labels = np.ones((9, 9), np.uint8)
    labels[4, 4] = 0
    drawn = module._outlined(plane(labels), (180, 180), palette(1)).astype(int)
    assert np.all(drawn[90, 90] == 100)
    assert np.all(drawn[90, 76:80] == FIRST, axis=-1).any()
    assert not np.all(drawn[90, :5] == FIRST, axis=-1).any(), "where the picture ends, the structure may go on"
    assert coloured(module._outlined(plane(1 - labels), (36, 36), palette(1)), FIRST).any()


def test_the_patients_right_is_on_the_left_of_the_axial_picture() -> None:
    image, labels = scene()
    picture = preview(image, RAS, labels)
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (1600, 3)
    # The axial plane is the panel at the upper left.
    panel = picture[20:500, 20 : 20 + 588]
    right, left = (np.argwhere(coloured(panel, rgb)).mean(axis=0) for rgb in (FIRST, SECOND))
    assert right[1] < 588 / 2 - 50
    assert left[1] > 588 / 2 + 50
    assert right[0] == pytest.approx(left[0], abs=5)


@pytest.mark.parametrize("axes", ["LPS", "LAS", "SRA"])
def test_storage_does_not_show_in_the_planes(axes: str) -> None:
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for voxel, letter in enumerate(axes):
        world = ("LR", "PA", "IS").index(next(pair for pair in ("LR", "PA", "IS") if letter in pair))
        matrix[world, voxel] = 1 if letter in "RAS" else -1
        matrix[world, 3] = 0 if letter in "RAS" else RAS.shape[world] - 1
    shape = [RAS.shape[int(np.abs(matrix[:3, voxel]).argmax())] for voxel in range(3)]
    grid = Grid((shape[0], shape[1], shape[2]), RAS.affine @ matrix)
    assert grid.orientation == axes
    ours, theirs = (preview(image, g, labels) for g, (image, labels) in ((RAS, scene()), (grid, scene(grid))))
    np.testing.assert_array_equal(ours[:, :600], theirs[:, :600])


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 5.0), (3.0, 0.5, 0.5)])
def test_a_mm_is_as_long_across_as_down(spacing: tuple[float, float, float]) -> None:
    grid = Grid.from_spacing((40, 40, 40), spacing)
    centre = np.array(grid.to_world((20, 20, 20)))
    places = grid.to_world(np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), axis=-1))
    values = (np.linalg.norm(places - centre, axis=-1) < 8).astype(np.uint8)
    picture = preview(np.zeros(grid.shape), grid, LabelMap(values, grid, LabelSet.from_names(["ball"])))
    rows, columns = np.nonzero(coloured(picture[20:500, 20:608], FIRST))
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), rel=0.4 if spacing[0] == 3 else 0.1)


# ---- words ---------------------------------------------------------------------------------------


def test_the_legend_tells_names_and_volumes(written: list[str]) -> None:
    image, labels = scene()
    more = LabelMap(labels.values, RAS, LabelSet((*ORGANS, Label("pancreas", 7))))
    preview(image, RAS, more)
    assert [word for word in written if word.isupper() and len(word) == 1] == [*"RLAP", *"RL", *"RLSI", *"APSI"]
    assert {"axial", "coronal", "sagittal"} < set(written)
    assert written[-5:] == ["liver", "1.2 ml", "spleen", "0.768 ml", "not found: pancreas"]
    assert sum(word.endswith(" mm") for word in written) == 3


def test_a_structure_that_the_scan_cuts_has_at_least_its_volume(written: list[str]) -> None:
    values = np.zeros(RAS.shape, np.uint8)
    values[20:30, 20:30, :4] = 1
    preview(np.zeros(RAS.shape), RAS, LabelMap(values, RAS, LabelSet.from_names(["liver"])))
    assert ">= 1.2 ml" in written
    assert written[-1] == ">= the scan ends before the structure does"


def test_many_that_are_missing_take_a_few_lines(written: list[str]) -> None:
    image, labels = scene()
    more = LabelSet((*ORGANS, *(Label(f"structure {n}", 1000 + n) for n in range(80))))
    preview(image, RAS, LabelMap(labels.values, RAS, more))
    assert sum("structure" in word for word in written) == 7
    assert written[-1] == "..."


@pytest.mark.parametrize(
    ("ml", "text"),
    [(1532.4, "1532 ml"), (99.96, "100 ml"), (12.34, "12.3 ml"), (0.0345, "0.0345 ml"), (0.0004, "< 0.001 ml")],
)
def test_volumes_have_three_digits(ml: float, text: str) -> None:
    assert module._ml(ml) == text


def test_names_are_written_in_the_letters_that_there_are() -> None:
    assert module._plain("Großhirn, frontale Lésion") == "Grosshirn, frontale Lesion"
    assert module._plain("肝臓 2") == "?? 2"
    room = module._length("lung upper lobe left", 18)
    assert module._short("lung upper lobe left", 18, room) == "lung upper lobe left"
    short = module._short("a lung that is described with many words, upper lobe left", 18, room)
    assert short.startswith("a lung")
    assert short.endswith("left")
    assert module._length(short, 18) <= room


@pytest.mark.parametrize("many", [1, 30, 90])
def test_many_structures(written: list[str], many: int) -> None:
    grid = Grid.from_spacing((100, 20, 20), (1.0, 1.0, 1.0))
    values = np.zeros(grid.shape, np.uint8)
    for k in range(many):
        values[5 + k, 5:15, 5:15] = np.where(np.arange(100) <= k, k + 1, 0).reshape(10, 10)
    names = LabelSet.from_names([f"s{k + 1}" for k in range(many)])
    picture = preview(np.zeros(grid.shape), grid, LabelMap(values, grid, names))
    assert picture.shape[0] < 1600
    listed = [word for word in written if word in names.names]
    left_out = many - len(listed)
    assert listed == [*names.names[left_out:]], "the smallest are left out"
    if many <= 30:
        assert not left_out
    else:
        assert f"and {left_out} smaller structures" in written


# ---- nothing, and what is refused ----------------------------------------------------------------


def test_without_labels_the_middle_planes(written: list[str]) -> None:
    image = np.zeros(RAS.shape)
    image[30, 25, 10] = 1
    picture = preview(image, RAS, window=(0, 1))
    assert picture.shape[1:] == (1600, 3)
    for left in (20, 538, 1056):
        assert picture[60:-60, left + 60 : left + 440].max() > 200, "each plane shows the voxel in the middle"
    assert not any(word.endswith("ml") for word in written)


def test_nothing_labelled_is_said(written: list[str]) -> None:
    empty = LabelMap(np.zeros(RAS.shape, np.uint8), RAS, ORGANS)
    picture = preview(np.zeros(RAS.shape), RAS, empty)
    assert written[-1] == "No voxel is labelled"
    assert picture.shape[0] == preview(np.zeros(RAS.shape), RAS).shape[0] + 40


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 1), (1, 40, 40)])
def test_tiny_scans(shape: tuple[int, int, int]) -> None:
    grid = Grid.from_spacing(shape, (1.0, 1.0, 8.0))
    labels = LabelMap(np.ones(shape, np.uint8), grid, ORGANS.from_names(["a"]))
    for shown in (labels, None):
        assert preview(np.zeros(shape), grid, shown).shape[1] == 1600


def test_another_grid_is_refused() -> None:
    image, labels = scene()
    moved = LabelMap(labels.values, RAS.window((1, 0, 0), RAS.shape), ORGANS)
    with pytest.raises(InputError, match="does not lie on the image's grid"):
        preview(image, RAS, moved)


def test_the_same_input_gives_the_same_bytes() -> None:
    one, other = (png_bytes(preview(image, RAS, labels)) for image, labels in (scene(), scene()))
    assert one == other
    assert one.startswith(b"\x89PNG")
    assert not {b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"tIME"} & {one[i : i + 4] for i in range(len(one))}


# ---- colours -------------------------------------------------------------------------------------


def test_the_palette_begins_as_everywhere_and_tells_structures_apart() -> None:
    many = palette(60)
    assert [tuple(rgb) for rgb in many[: len(COLOURS)].tolist()] == [colour(n) for n in range(len(COLOURS))]
    np.testing.assert_array_equal(palette(12), many[:12])
    assert palette(0).shape == (0, 3)
    apart = min(np.abs(a.astype(int) - b.astype(int)).max() for a, b in itertools.combinations(many, 2))
    assert apart >= 20
    assert many.max(axis=1).min() > 100, "bright on black"

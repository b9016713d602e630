from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import label as pieces

from medseg.core.errors import InputError, MedsegError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap
from medseg.io.dicom_seg import Algorithm
from medseg.io.reference import read_reference
from medseg.io.rtstruct import filled, outlines, read_rtstruct, write_rtstruct

MODEL = Algorithm.of_model("liver-3d")
LABELS = LabelSet((Label("liver", 2), Label("right kidney", 5)))

# ---- contours -----------------------------------------------------------------------------------

MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(MASKS)
def test_any_mask_comes_back_from_its_outlines(mask: Any) -> None:
    assert np.array_equal(filled(outlines(mask), mask.shape), mask)


@given(MASKS)
def test_one_outline_for_each_piece(mask: Any) -> None:
    found = outlines(mask)
    assert len(found) == pieces(mask, connectivity=1).max()


@given(MASKS)
def test_no_outline_passes_through_a_pixels_centre(mask: Any) -> None:
    for ring in outlines(mask):
        ends = np.roll(ring, -1, axis=0)
        for start, end in zip(ring, ends, strict=True):
            length = int(np.ceil(np.abs(end - start).max())) * 4
            points = start + np.linspace(0, 1, 8 * length + 1)[:, None] * (end - start)
            assert (np.abs(points - np.rint(points)).max(axis=1) > 0.2).all()


def test_a_hole_is_tied_to_the_rim_by_a_channel_of_no_width() -> None:
    mask = np.ones((5, 7), dtype=bool)
    mask[2, 2] = False
    (ring,) = outlines(mask)
    channel = [[1.5, 2.0], [1.5, 6.5]]
    ends = np.roll(ring, -1, axis=0)
    there = [sorted([list(a), list(b)]) for a, b in zip(ring.tolist(), ends.tolist(), strict=True)]
    assert there.count(channel) == 2
    x, y = ring.T
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    assert area == 35 - 0.5 - 0.5  # its rim is half a pixel inside, its hole's half of a pixel


def test_a_contour_of_any_length_is_decimal_text(dicom_series: Any, tmp_path: Path) -> None:
    """A sponge: more points than explicit value representations have room for."""
    paths = dicom_series(tmp_path / "s", shape=(150, 140, 2), FrameOfReferenceUID="1.2.3.4")
    reference = read_reference(paths)
    values = (np.random.default_rng(0).random(reference.grid.shape) < 0.8).astype(np.uint8)
    label_map = LabelMap(values, reference.grid, LabelSet.from_names(["sponge"]))
    write_rtstruct(tmp_path / "a.dcm", label_map, reference, Algorithm("MANUAL", "hand", "-"))
    made = pydicom.dcmread(tmp_path / "a.dcm")
    longest = max(made.ROIContourSequence[0].ContourSequence, key=lambda c: c.NumberOfContourPoints)
    assert longest["ContourData"].VR == "DS"
    assert len("\\".join(map(str, longest.ContourData))) > 65_535
    assert all(len(str(value)) <= 16 for value in longest.ContourData)
    read = read_rtstruct(tmp_path / "a.dcm", reference.grid)
    np.testing.assert_array_equal(read.label_map.values, values)


def test_inner_contours_make_holes() -> None:
    square = [np.array([[0, 0], [0, 6], [6, 6], [6, 0]]) + 0.5, np.array([[2, 2], [2, 4], [4, 4], [4, 2]]) + 0.5]
    mask = filled([s.astype(float) for s in square], (8, 8))
    assert mask.sum() == 36 - 4


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def series(dicom_series: Any, tmp_path: Path) -> list[Path]:
    return dicom_series(tmp_path / "series", shape=(9, 8, 5), FrameOfReferenceUID="1.2.3.4")


@pytest.fixture
def made(series: list[Path], tmp_path: Path) -> tuple[Path, LabelMap]:
    grid = read_reference(series).grid
    values = np.zeros(grid.shape, dtype=np.uint8)
    values[1:6, 1:6, 1:4] = 2
    values[3, 3, 2] = 0
    values[7, 2:5, 3] = 5
    label_map = LabelMap(values, grid, LABELS)
    write_rtstruct(tmp_path / "a.dcm", label_map, series, MODEL)
    return tmp_path / "a.dcm", label_map


def changed(path: Path, change: Callable[[Any], Any]) -> Path:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
    return path


def test_names_numbers_and_codes(made: tuple[Path, LabelMap]) -> None:
    path, label_map = made
    read = read_rtstruct(path, label_map.grid)
    assert read.notes == ()
    assert [(one.name, one.number, one.code) for one in read.label_map.labels] == [
        ("liver", 2, "SCT:10200004"),
        ("right kidney", 5, "SCT:64033007"),
    ]
    other = LabelSet((Label("Right Kidney", 1), Label("liver", 2)))
    assert np.unique(read_rtstruct(path, label_map.grid, labels=other).label_map.values).tolist() == [0, 1, 2]
    kidney = read_rtstruct(path, label_map.grid, only=["right kidney"]).label_map
    assert np.array_equal(kidney.values == 5, label_map.values == 5)
    with pytest.raises(InputError, match="region 'right kidney' is not listed"):
        read_rtstruct(path, label_map.grid, labels=LabelSet((Label("liver", 1),)))


def test_another_scan_is_refused_in_mm(made: tuple[Path, LabelMap]) -> None:
    path, label_map = made
    grid = label_map.grid

    def moved(*mm: float) -> Grid:
        affine = grid.affine.copy()
        affine[:3, 3] += mm
        return Grid(grid.shape, affine)

    with pytest.raises(InputError, match=r"in a\.dcm a contour lies 0\.7 mm beside the nearest slice of the scan"):
        read_rtstruct(path, moved(0, 0, 0.7))
    with pytest.raises(InputError, match="on slices that the scan does not have"):
        read_rtstruct(path, grid.window((0, 0, 2), (9, 8, 5)))
    tilted, (c, s) = grid.affine.copy(), (np.cos(0.3), np.sin(0.3))
    tilted[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ tilted[:3, :3]
    with pytest.raises(InputError, match=r"contours run across the slices of the scan \(over"):
        read_rtstruct(path, Grid(grid.shape, tilted))
    with pytest.raises(InputError, match="another frame of reference"):
        read_rtstruct(path, grid, frame_of_reference="9.9")


def _same(dataset: Any) -> None:
    dataset.ROIContourSequence[1].ContourSequence = dataset.ROIContourSequence[0].ContourSequence


def _point(dataset: Any) -> None:
    for contour in dataset.ROIContourSequence[1].ContourSequence:
        contour.ContourGeometricType = "POINT"


def _strange(dataset: Any) -> None:
    dataset.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2"]


def test_overlaps_are_refused_and_chosen_by_name(made: tuple[Path, LabelMap]) -> None:
    path, label_map = made
    changed(path, _same)
    with pytest.raises(InputError, match=r"'liver' and 'right kidney' overlap in 74 voxels"):
        read_rtstruct(path, label_map.grid)
    read = read_rtstruct(path, label_map.grid, only=["right kidney"]).label_map
    assert np.array_equal(read.values == 5, label_map.values == 2)


def test_what_is_no_closed_contour_is_left_out_and_said(made: tuple[Path, LabelMap]) -> None:
    path, label_map = made
    read = read_rtstruct(changed(path, _point), label_map.grid)
    assert read.notes == ("'right kidney' of a.dcm has points or open contours and is left out",)
    assert np.unique(read.label_map.values).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_strange, "a contour has no sound points"),
        (lambda d: delattr(d, "ROIContourSequence"), "no region has closed contours"),
        (lambda d: setattr(d, "StructureSetROISequence", []), "no region is described"),
        (lambda d: setattr(d, "SOPClassUID", "1.2"), "is not an RTSTRUCT"),
    ],
)
def test_a_broken_structure_set_is_refused(made: tuple[Path, LabelMap], change: Any, words: str) -> None:
    path, label_map = made
    with pytest.raises(InputError, match=words):
        read_rtstruct(changed(path, change), label_map.grid)


def test_any_broken_byte_is_refused_or_read(made: tuple[Path, LabelMap]) -> None:
    path, label_map = made
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: rng.integers(140, len(whole))] if rng.random() < 0.3 else whole)
        data[rng.integers(132, len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            read_rtstruct(path, label_map.grid)
        except MedsegError as error:
            silent_about_the_patient(error)


def silent_about_the_patient(error: MedsegError) -> None:
    for word in ("Roe", "Richarda", "471199", "19031224", "771177"):
        assert word not in str(error)


# ---- real files ---------------------------------------------------------------------------------

FILES = Path("dicom-rtstruct")


def area(contours: Any) -> float:
    """Volume in mm3 over the slice distance: shoelace areas of axial contours, nested ones taken off."""
    total = 0.0
    for contour in contours:
        x, y = np.array(contour.ContourData, dtype=float).reshape(-1, 3)[:, :2].T
        total += abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    return total


def test_a_breast_plan_on_a_grid_of_its_slices(shared_data: Path) -> None:
    """Of the CT only one slice is here; the others follow it every 3 mm, as the contours say."""
    path = shared_data / FILES / "dicompyler/rtss.dcm"
    dataset = pydicom.dcmread(path)
    scan = read_reference([shared_data / FILES / "dicompyler/ct.0.dcm"]).grid
    with pytest.raises(InputError, match="on slices that the scan does not have"):
        read_rtstruct(path, scan, only=["Heart"])
    heights = [float(c.ContourData[2]) for c in dataset.ROIContourSequence[0].ContourSequence]
    affine = scan.affine.copy()
    affine[2, 2], affine[2, 3] = 3.0, min(heights)
    grid = Grid((512, 512, round((max(heights) - min(heights)) / 3) + 1), affine)
    with pytest.raises(InputError, match="overlap"):
        read_rtstruct(path, grid)
    with pytest.raises(InputError, match="no region has closed contours"):
        read_rtstruct(path, grid, only=["Areola"])
    read = read_rtstruct(path, grid, only=["Heart", "Areola"])
    assert read.notes == ("'Areola' of rtss.dcm has no contours and is left out",)
    drawn = area(dataset.ROIContourSequence[4].ContourSequence) * 3
    assert read.label_map.volume_of(5) == pytest.approx(drawn, rel=0.02)


def test_files_of_rt_utils_and_pydicom(shared_data: Path) -> None:
    folder = shared_data / FILES / "rt-utils/mock_data"
    reference = read_reference([folder / "ct_1.dcm", folder / "ct_2.dcm"])
    read = read_rtstruct(folder / "rt.dcm", reference.grid)
    assert read.label_map.volume_of(1) > 0
    assert read.label_map.values[:, :, 1].max() == 0  # all contours lie at 60 mm
    for name in ("invalid_reference_rt.dcm", "non_existent_reference_rt.dcm"):
        with pytest.raises(InputError, match="on slices that the scan does not have"):
            read_rtstruct(folder / name, reference.grid)
    grid = Grid.from_spacing((512, 512, 3), reference.grid.spacing, reference.grid.origin, reference.grid.direction)
    for name in ("invalid_reference_rt.dcm", "non_existent_reference_rt.dcm"):
        dataset = pydicom.dcmread(folder / name)
        for region in dataset.ROIContourSequence:
            only = [dataset.StructureSetROISequence[int(region.ReferencedROINumber) - 1].ROIName]
            found = read_rtstruct(folder / name, grid, only=only).label_map
            drawn = area(region.ContourSequence) * 5
            assert found.volume_of(int(region.ReferencedROINumber)) == pytest.approx(drawn, rel=0.1)
    with pytest.raises(InputError, match="is not a DICOM file"):
        read_rtstruct(shared_data / FILES / "pydicom/rtstruct.dcm", grid)  # it has no file meta


def test_an_oblique_series_with_unequal_pixels(shared_data: Path, tmp_path: Path) -> None:
    """The series of rt-utils's own tests, which has no frame of reference, and a study for each slice."""
    datasets = [pydicom.dcmread(p) for p in sorted((shared_data / FILES / "rt-utils/oriented_data").glob("*.dcm"))]
    with pytest.raises(InputError, match="more than one study"):
        read_reference(datasets)
    for dataset in datasets:
        dataset.FrameOfReferenceUID = dataset.StudyInstanceUID = dataset.SeriesInstanceUID = "1.2.3"
    grid = read_reference(datasets).grid
    assert grid.spacing[:2] == pytest.approx((2.5, 3.5))  # between columns, between rows
    values = np.zeros(grid.shape, dtype=np.uint8)
    values[60:95, 4:30, 0:2] = 2
    values[70:75, 10:20, 1] = 0
    write_rtstruct(tmp_path / "a.dcm", LabelMap(values, grid, LABELS), datasets, MODEL)
    assert np.array_equal(read_rtstruct(tmp_path / "a.dcm", grid).label_map.values, values)

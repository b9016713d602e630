from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medseg import __version__
from medseg.core.errors import InputError, MedsegError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.terminology import default_terminology
from medseg.core.volume import LabelMap
from medseg.io.dicom import choose, find_series
from medseg.io.dicom_seg import Algorithm, write_seg
from medseg.io.dicom_seg_read import read_seg
from medseg.io.itk import read_itk_labels
from medseg.io.reference import read_reference, reference_of
from medseg.io.rtstruct import read_rtstruct, write_rtstruct

MODEL = Algorithm.of_model("liver-3d")
MADE = datetime(2026, 1, 2, 3, 4, 5)
LABELS = LabelSet((Label("liver", 1), Label("left kidney", 3), Label("liver tumour", 7), Label("blob", 9)))
Write = Callable[..., None]
WRITERS = pytest.mark.parametrize("write", [write_seg, write_rtstruct], ids=["seg", "rtstruct"])


@pytest.fixture
def series(dicom_series: Any, tmp_path: Path) -> list[Path]:
    return dicom_series(
        tmp_path / "series", shape=(7, 6, 4), FrameOfReferenceUID="1.2.3.4", StudyDate="20200229", StudyID="S1"
    )


def drawn(series: list[Path], labels: LabelSet = LABELS) -> LabelMap:
    grid = read_reference(series).grid
    values = np.zeros(grid.shape, dtype=np.uint8)
    values[1:4, 1:4, 1:3] = 1
    values[2, 2, 1] = 7
    values[5, 2:5, 2] = 9
    return LabelMap(values, grid, labels)


# ---- what is written ----------------------------------------------------------------------------


def test_segments_are_coded_numbered_and_identified(series: list[Path], tmp_path: Path) -> None:
    write_seg(tmp_path / "a.dcm", drawn(series), series, MODEL)
    segments = pydicom.dcmread(tmp_path / "a.dcm").SegmentSequence
    assert [(s.SegmentNumber, s.SegmentLabel) for s in segments] == list(enumerate(LABELS.names, start=1))
    types = [s.SegmentedPropertyTypeCodeSequence[0] for s in segments]
    assert [t.CodingSchemeDesignator for t in types] == ["SCT", "SCT", "SCT", "99MEDSEG"]
    assert [t.CodeValue for t in types[:3]] == ["10200004", "64033007", "108369006"]
    assert types[1].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert segments[2].AnatomicRegionSequence[0].CodeMeaning == "Liver"
    assert segments[2].SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    for segment in segments:
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        said = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (said.AlgorithmName, said.AlgorithmVersion) == ("medseg liver-3d", __version__)


@WRITERS
def test_patient_study_and_series_are_carried_over(write: Write, series: list[Path], tmp_path: Path) -> None:
    write(tmp_path / "a.dcm", drawn(series), series[::-1], MODEL)
    made, source = pydicom.dcmread(tmp_path / "a.dcm"), pydicom.dcmread(series[0])
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "StudyID",
                    "AccessionNumber", "FrameOfReferenceUID"):  # fmt: skip
        assert made[keyword].value == source[keyword].value, keyword
    assert made.SeriesInstanceUID != source.SeriesInstanceUID
    assert made.SeriesNumber == 1005
    assert made.Manufacturer == "medseg"
    text = str(made)
    for path in series:
        assert pydicom.dcmread(path).SOPInstanceUID in text
    assert source.SeriesInstanceUID in text


@WRITERS
def test_the_same_input_and_time_give_the_same_bytes(write: Write, series: list[Path], tmp_path: Path) -> None:
    for name, sources, made in (("a", series, MADE), ("b", series[::-1], MADE), ("c", series, None)):
        write(tmp_path / name, drawn(series), sources, MODEL, made=made)
    first, again, later = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != later
    a, c = pydicom.dcmread(tmp_path / "a"), pydicom.dcmread(tmp_path / "c")
    assert a.SOPInstanceUID != c.SOPInstanceUID
    assert a.SeriesInstanceUID != c.SeriesInstanceUID
    assert a.InstanceCreationDate == "20260102"


def test_a_hand_drawn_label_names_no_algorithm(series: list[Path], tmp_path: Path) -> None:
    write_seg(tmp_path / "a.dcm", drawn(series), series, Algorithm("MANUAL", "hand", "-"))
    segment = pydicom.dcmread(tmp_path / "a.dcm").SegmentSequence[0]
    assert segment.SegmentAlgorithmType == "MANUAL"
    assert "SegmentationAlgorithmIdentificationSequence" not in segment


def test_a_persons_own_terms_are_used(series: list[Path], tmp_path: Path) -> None:
    mine = {"format": 1, "terms": [{"names": ["blob"], "code": "99LAB:B1", "meaning": "Blob"}]}
    write_seg(
        tmp_path / "a.dcm", drawn(series), series, MODEL, terminology=default_terminology().extended(mine, "mine")
    )
    made = pydicom.dcmread(tmp_path / "a.dcm")
    assert made.SegmentSequence[3].SegmentedPropertyTypeCodeSequence[0].CodeValue == "B1"


def test_an_enhanced_multi_frame_series_is_referenced_frame_by_frame(shared_data: Path, tmp_path: Path) -> None:
    source = pydicom.dcmread(shared_data / "dicom-seg-dcmqi/segmentations/24x38x3/multiframe/mf.dcm")
    reference = read_reference([source])
    values = np.zeros(reference.grid.shape, dtype=np.uint8)
    values[3:9, 10:20, 1] = 1
    label_map = LabelMap(values, reference.grid, LabelSet.from_names(["liver"]))
    for write in (write_seg, write_rtstruct):
        write(tmp_path / "a.dcm", label_map, [source], MODEL)
    write_seg(tmp_path / "b.dcm", label_map, reference, MODEL)
    assert np.array_equal(read_seg(tmp_path / "b.dcm", onto=reference.grid).label_map.values, values)


@WRITERS
def test_labels_of_a_straightened_scan_go_back_onto_the_tilted_slices(
    write: Write, dicom_series: Any, tmp_path: Path
) -> None:
    """A tilted gantry: slice k lies 0.7 k mm further back. A ball stays where it is in space."""
    dicom_series(tmp_path / "tilted", shape=(24, 24, 9), step=(0, 0.7, 2), FrameOfReferenceUID="1.2.3.4")
    series = choose(find_series(tmp_path / "tilted"))
    reference, straight = reference_of(series), series.grid
    assert straight is not None
    assert straight.shape != reference.grid.shape
    middle = np.array([-11.3, -12.1, 8.2])
    places = straight.to_world(np.moveaxis(np.indices(straight.shape), 0, -1))
    ball = (np.linalg.norm(places - middle, axis=-1) < 6).astype(np.uint8)
    write(tmp_path / "a.dcm", LabelMap(ball, straight, LABELS), reference, MODEL)
    if write is write_seg:
        read = read_seg(tmp_path / "a.dcm", onto=reference.grid).label_map
    else:
        read = read_rtstruct(tmp_path / "a.dcm", reference.grid).label_map
    found = reference.grid.to_world(np.argwhere(read.values == 1))
    assert np.linalg.norm(found.mean(axis=0) - middle) < 0.5
    assert len(found) * 2 == pytest.approx(4 / 3 * np.pi * 6**3, rel=0.05)


# ---- what cannot be written ---------------------------------------------------------------------


@WRITERS
def test_labels_on_another_grid_are_refused_in_mm(write: Write, series: list[Path], tmp_path: Path) -> None:
    good = drawn(series)
    affine = good.grid.affine.copy()
    affine[:3, 3] += (0, 3, 4)
    cases = {
        r"corners are 5 mm apart": Grid(good.grid.shape, affine),
        r"7x6x4 and 7x6x4 voxels of 2x1x2 and 1x1x2 mm": Grid.from_spacing((7, 6, 4), (2, 1, 2)),
        r"7x6x5 and 7x6x4 voxels": good.grid.window((0, 0, 0), (7, 6, 5)),
    }
    for words, grid in cases.items():
        other = LabelMap(np.ones(grid.shape, dtype=np.uint8), grid, LABELS)
        if "2x1x2" in words:
            words = "does not lie on the grid"
        with pytest.raises(InputError, match=words):
            write(tmp_path / "a.dcm", other, series, MODEL)
    assert not (tmp_path / "a.dcm").exists()


@WRITERS
def test_float_jitter_is_no_other_grid(write: Write, series: list[Path], tmp_path: Path) -> None:
    good = drawn(series)
    affine = good.grid.affine.copy()
    affine[:3, 3] += 0.013
    write(tmp_path / "a.dcm", LabelMap(good.values, Grid(good.grid.shape, affine), LABELS), series, MODEL)


@WRITERS
def test_labels_that_are_not_listed_are_refused(write: Write, series: list[Path], tmp_path: Path) -> None:
    good = drawn(series)
    with pytest.raises(InputError, match="has no labels"):
        write(tmp_path / "a.dcm", LabelMap(np.zeros_like(good.values), good.grid, LabelSet(())), series, MODEL)
    with pytest.raises(InputError, match="has the value 7, which is not listed"):
        write(tmp_path / "a.dcm", LabelMap(good.values, good.grid, LabelSet.from_names(["a", "b", "c"])), series, MODEL)


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_nothing_found_is_a_result(kind: Any, series: list[Path], tmp_path: Path) -> None:
    """A SEG has a frame or it is none, so one that is empty says it; all segments and images are named."""
    empty = np.zeros_like(drawn(series).values)
    label_map = LabelMap(empty, drawn(series).grid, LABELS)
    write_seg(tmp_path / "a.dcm", label_map, series, MODEL, kind=kind)
    made = pydicom.dcmread(tmp_path / "a.dcm")
    assert made.NumberOfFrames == 1
    assert not any(made.PixelData)
    assert [s.SegmentLabel for s in made.SegmentSequence if s.SegmentNumber] == list(LABELS.names)
    assert len(made.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == len(series)
    read = read_seg(tmp_path / "a.dcm", onto=label_map.grid).label_map
    assert not read.values.any()
    assert read.labels.names == LABELS.names
    assert not empty.any()


def test_regions_without_contours_are_a_result(series: list[Path], tmp_path: Path) -> None:
    label_map = LabelMap(np.zeros_like(drawn(series).values), drawn(series).grid, LABELS)
    write_rtstruct(tmp_path / "a.dcm", label_map, series, MODEL)
    made = pydicom.dcmread(tmp_path / "a.dcm")
    assert [r.ROIName for r in made.StructureSetROISequence] == list(LABELS.names)
    assert not any("ContourSequence" in r for r in made.ROIContourSequence)
    # A planner's region without contours may be one that nobody has drawn yet.
    with pytest.raises(InputError, match="no region has closed contours"):
        read_rtstruct(tmp_path / "a.dcm", label_map.grid)


def spoilt(series: list[Path], change: Callable[[Any, int], None]) -> list[Path]:
    for k, path in enumerate(series):
        dataset = pydicom.dcmread(path)
        change(dataset, k)
        dataset.save_as(path)
    return series


def other(keyword: str, value: Any) -> Callable[[Any, int], None]:
    def change(dataset: Any, k: int) -> None:
        if k == 2:
            setattr(dataset, keyword, value)

    return change


def without(keyword: str) -> Callable[[Any, int], None]:
    return lambda dataset, k: delattr(dataset, keyword)


@WRITERS
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other("SeriesInstanceUID", "1.9"), "more than one series"),
        (other("StudyInstanceUID", "1.9"), "more than one study"),
        (other("FrameOfReferenceUID", "1.9"), "more than one frame of reference"),
        (other("ImagePositionPatient", [0, 0, 3]), "unevenly"),
        (without("ImagePositionPatient"), "does not say where it is"),
        (without("Rows"), "no image"),
        (without("FrameOfReferenceUID"), "no frame of reference"),
    ],
)
def test_a_source_that_is_no_sound_series_is_refused(
    write: Write, change: Any, words: str, series: list[Path], tmp_path: Path
) -> None:
    label_map = drawn(series)
    with pytest.raises(InputError, match=words) as caught:
        write(tmp_path / "a.dcm", label_map, spoilt(series, change), MODEL)
    silent_about_the_patient(caught.value)


@WRITERS
def test_no_source_is_refused(write: Write, series: list[Path], tmp_path: Path) -> None:
    label_map = drawn(series)
    with pytest.raises(InputError, match="has no images"):
        write(tmp_path / "a.dcm", label_map, [], MODEL)
    with pytest.raises(InputError, match=r"gone\.dcm is missing"):
        write(tmp_path / "a.dcm", label_map, [tmp_path / "gone.dcm"], MODEL)
    (tmp_path / "text.dcm").write_text("no DICOM")
    with pytest.raises(InputError, match=r"text\.dcm is not a DICOM file"):
        write(tmp_path / "a.dcm", label_map, [tmp_path / "text.dcm"], MODEL)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("PatientName", "Roe^Richarda" * 20), ("StudyDate", "Roe"), ("PatientID", "ID-471199" * 20), ("SeriesNumber", 2)],
)
@WRITERS
def test_headers_out_of_order_do_not_put_the_patient_into_errors(
    write: Write, keyword: str, value: Any, series: list[Path], tmp_path: Path
) -> None:
    label_map = drawn(series)

    def change(dataset: Any, k: int) -> None:
        with pydicom.config.disable_value_validation():
            setattr(dataset, keyword, value)

    try:
        write(tmp_path / "a.dcm", label_map, spoilt(series, change), MODEL)
    except MedsegError as error:
        silent_about_the_patient(error)


def silent_about_the_patient(error: BaseException) -> None:
    said = str(error) + "".join(traceback.format_exception(error, chain=not error.__suppress_context__))
    for word in ("Roe", "Richarda", "471199", "19031224", "771177"):
        assert word not in str(error)
        assert word not in said.split("Traceback")[0]


# ---- what is read -------------------------------------------------------------------------------


@pytest.fixture
def seg(series: list[Path], tmp_path: Path) -> Path:
    write_seg(tmp_path / "a.dcm", drawn(series), series, MODEL, made=MADE)
    return tmp_path / "a.dcm"


def changed(path: Path, change: Callable[[Any], None]) -> Path:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)
    return path


def test_without_the_scan_the_frames_that_are_there_make_the_grid(seg: Path, series: list[Path]) -> None:
    whole = drawn(series)
    read = read_seg(seg).label_map
    assert read.grid.matches(whole.grid.window((0, 0, 1), (7, 6, 2)))
    assert np.array_equal(read.values, np.array([0, 1, 0, 0, 0, 0, 0, 3, 0, 4])[whole.values][:, :, 1:3])
    assert [label.code for label in read.labels][:2] == ["SCT:10200004", "SCT:64033007"]


def test_names_find_their_numbers(seg: Path, series: list[Path]) -> None:
    whole = drawn(series)
    assert np.array_equal(read_seg(seg, onto=whole.grid, labels=LABELS).label_map.values, whole.values)
    with pytest.raises(InputError, match=r"segment 'left kidney' is not listed\. The labels are 1 liver"):
        read_seg(seg, labels=LabelSet.from_names(["liver"]))
    read = read_seg(seg, labels=LabelSet((Label("Liver", 5),)), only=["liver"])
    assert np.unique(read.label_map.values).tolist() == [0, 5]
    with pytest.raises(InputError, match=r"there is no structure 'lung'\. There are blob, left kidney"):
        read_seg(seg, only=["lung"])


def test_a_scan_elsewhere_is_refused_in_mm(seg: Path, series: list[Path]) -> None:
    grid = drawn(series).grid
    affine = grid.affine.copy()
    affine[0, 3] += 0.4
    with pytest.raises(InputError, match=r"in a\.dcm the labels do not lie on the grid of the scan"):
        read_seg(seg, onto=Grid(grid.shape, affine))
    with pytest.raises(InputError, match="labels lie outside the scan"):
        read_seg(seg, onto=grid.window((0, 0, 3), (7, 6, 4)))
    assert read_seg(seg, onto=grid.window((-2, 0, 0), (20, 9, 9))).label_map.grid.shape == (20, 9, 9)
    with pytest.raises(InputError, match="another frame of reference"):
        read_seg(seg, frame_of_reference="9.9")


def _cut(dataset: Any) -> None:
    dataset.PixelData = dataset.PixelData[:4]


def _twice(dataset: Any) -> None:
    frame = dataset.PerFrameFunctionalGroupsSequence[2]
    frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 1


def _moved(dataset: Any) -> None:
    dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0].ImagePositionPatient = [0.5, 0, 2]


def _nowhere(dataset: Any) -> None:
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        del frame.PlanePositionSequence


def _far(dataset: Any) -> None:
    dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient = [0, 0, -400_000]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cut, "cut off"),
        (_twice, "two frames show one segment"),
        (_nowhere, "PlanePositionSequence is missing"),
        (_moved, "not evenly stacked"),
        (_far, "slices of"),
        (lambda d: d.PerFrameFunctionalGroupsSequence.pop(), "of its frames are described"),
        (lambda d: setattr(d, "SegmentSequence", []), "no segment is described"),
        (lambda d: setattr(d, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"), "is not a DICOM SEG"),
    ],
)
def test_a_broken_seg_is_refused(seg: Path, change: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_seg(changed(seg, change))
    silent_about_the_patient(caught.value)


def test_any_broken_byte_is_refused_or_read(seg: Path) -> None:
    whole, rng = seg.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: rng.integers(140, len(whole))] if rng.random() < 0.3 else whole)
        data[rng.integers(132, len(data))] ^= 1 << int(rng.integers(8))
        seg.write_bytes(data)
        try:
            read_seg(seg)
        except MedsegError as error:
            silent_about_the_patient(error)


# ---- real files ---------------------------------------------------------------------------------

DCMQI = Path("dicom-seg-dcmqi/segmentations")


def same_voxels(found: LabelMap, number: int, truth: LabelMap, value: int) -> None:
    """The same positions in mm, whatever the grids."""
    places = [
        np.unique(np.round(m.grid.to_world(np.argwhere(m.values == n)), 1), axis=0)
        for m, n in ((found, number), (truth, value))
    ]
    assert len(places[0]) > 0
    assert places[0].shape == places[1].shape
    assert np.abs(places[0] - places[1]).max() < 0.25


def nrrd(path: Path, *numbers: int) -> LabelMap:
    return read_itk_labels(path, LabelSet(tuple(Label(str(n), n) for n in numbers)))


@pytest.mark.parametrize(
    ("file", "truth"),
    [
        ("liver.dcm", "liver_seg.nrrd"),
        ("23x38x3/seg/label.seg", "23x38x3/nrrd/label.nrrd"),
        ("24x38x3/seg/label.seg", "24x38x3/nrrd/label.nrrd"),
        ("sparse-labelmap-noppv.dcm", "sparse_labelmap_noppv_seg.nrrd"),
        ("sparse-labelmap-ppv5.dcm", "sparse_labelmap_ppv5_seg.nrrd"),
    ],
)
def test_dcmqis_files_hold_what_their_nrrds_hold(shared_data: Path, file: str, truth: str) -> None:
    same_voxels(read_seg(shared_data / DCMQI / file).label_map, 1, nrrd(shared_data / DCMQI / truth, 1, 5), 1)


def test_dcmqis_overlaps_are_refused_and_read_one_by_one(shared_data: Path) -> None:
    path = shared_data / DCMQI / "partial_overlaps.dcm"
    with pytest.raises(InputError, match="'GREEN' and 'ORANGE' overlap in 3017 voxels"):
        read_seg(path)
    names = {1: "GREEN", 2: "ORANGE", 3: "PURPLE", 4: "LIGHT_BLUE", 5: "DARK_BLUE"}
    seen = set()
    for part in (1, 2, 3):
        truth = nrrd(shared_data / DCMQI / f"partial_overlaps-{part}.nrrd", 1, 2, 3, 4, 5)
        for number in set(np.unique(truth.values).tolist()) - {0}:
            found = read_seg(path, only=[names[number]]).label_map
            same_voxels(found, number, truth, number)
            seen.add(number)
    assert seen == set(names)


@pytest.mark.parametrize("part", ["liver", "liver_nonbyte_aligned"])
def test_one_liver_in_every_encoding(shared_data: Path, part: str) -> None:
    """pydicom's: 107098 voxels of three slices, by the test files' own notes."""
    folder = shared_data / "dicom-misc-pydicom/data_store"
    first = read_seg(folder / f"{part}.dcm").label_map
    assert np.count_nonzero(first.values) == 107098
    for name in ("deflate", "expb", "j2k", "rle"):
        path = folder / f"{part}_{name}.dcm"
        if path.exists():
            other = read_seg(path).label_map
            assert np.array_equal(other.values, first.values), name
            assert other.grid.matches(first.grid)


def test_highdicoms_files(shared_data: Path) -> None:
    folder = shared_data / "dicom-seg-highdicom"
    plain = read_seg(folder / "seg_image_ct_binary.dcm")
    assert plain.notes == ()
    assert plain.label_map.grid.shape == (16, 16, 3)
    assert plain.label_map.grid.spacing == pytest.approx((0.488281, 0.488281, 1.25), abs=1e-4)
    for name in ("binary_fractional", "true_fractional"):
        read = read_seg(folder / f"seg_image_ct_{name}.dcm")
        assert read.notes == (f"seg_image_ct_{name}.dcm holds probability values; a voxel counts from 0.5 on",)
        assert np.array_equal(read.label_map.values, plain.label_map.values)
    single = read_seg(folder / "seg_image_ct_binary_single_frame.dcm").label_map
    source = read_reference([folder / "ct_image.dcm"])
    assert read_seg(folder / "seg_image_ct_binary_single_frame.dcm", onto=source.grid).label_map.grid == source.grid
    assert single.grid.matches(source.grid)
    with pytest.raises(InputError, match="overlap in 16 voxels"):
        read_seg(folder / "seg_image_ct_binary_overlap.dcm")
    with pytest.raises(InputError, match="does not say what its frames are"):
        read_seg(folder / "seg_image_cr_binary.dcm")
    with pytest.raises(InputError, match="is not a DICOM SEG"):
        read_seg(folder / "ct_image.dcm")


def test_the_sources_of_highdicoms_files_are_refused_for_their_far_slice(shared_data: Path) -> None:
    folder = shared_data / "dicom-seg-highdicom/source_CT2_from_pydicom"
    with pytest.raises(InputError, match=r"missing|unevenly"):
        read_reference(sorted(folder.iterdir()))
    near = read_reference([folder / name for name in ("17136", "17166", "17196")])
    seg = read_seg(folder.parent / "seg_image_ct_binary.dcm", onto=near.grid)
    assert seg.label_map.grid == near.grid


def test_a_real_series_gets_a_seg(shared_data: Path, tmp_path: Path) -> None:
    for name in ("dicom-mr-sagittal-siemens/HFS", "dicom-ct-torchio-crop"):
        paths = sorted((shared_data / name).glob("*.dcm"))
        reference = read_reference(paths)
        values = np.zeros(reference.grid.shape, dtype=np.uint8)
        values[20:60, 30:50, 3:9] = 1
        label_map = LabelMap(values, reference.grid, LabelSet.from_names(["brain"]))
        try:
            write_seg(tmp_path / "a.dcm", label_map, reference, MODEL)
        except InputError as error:
            assert "no frame of reference" in str(error)  # noqa: PT017
            continue
        assert np.array_equal(read_seg(tmp_path / "a.dcm", onto=reference.grid).label_map.values, values)

from __future__ import annotations

import gzip
import random
import stat
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import UID, EnhancedMRImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid
from scipy.spatial.transform import Rotation

from medseg.core.errors import InputError
from medseg.io.dicom import Series, choose, find_series, read_headers, read_series
from medseg.io.scan import read_scan

TO_RAS = np.array([-1.0, -1.0, 1.0])
OBLIQUE = Rotation.from_euler("xyz", [12, -20, 33], degrees=True).as_matrix().round(9)
PLANES = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "oblique": (OBLIQUE[0], OBLIQUE[1]),
}
SECRETS = ("Roe", "Richarda", "ID-471199", "471199", "19031224", "ACC-771177", "1.2.826")


def only(path: Path) -> Series:
    (series,) = find_series(path)
    return series


def refused(path: Path, *words: str) -> str:
    """The series' reason not to be usable, which reading it gives as well; nothing of the patient."""
    series = only(path)
    assert not series.usable
    with pytest.raises(InputError) as caught:
        read_series(series)
    text = str(caught.value)
    for word in words:
        assert word in text
    for secret in SECRETS:
        assert secret not in text + repr(series)
    return text


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("row_flipped", [False, True])
@pytest.mark.parametrize("reversed_slices", [False, True])
@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (0.7, 1.3, 3.1)], ids=["isotropic", "anisotropic"])
def test_a_bright_voxel_is_where_it_was_put(
    dicom_series: Any, tmp_path: Path, plane: str, row_flipped: bool, reversed_slices: bool, spacing: Any
) -> None:
    rows, columns = (np.array(v, dtype=float) for v in PLANES[plane])
    rows = -rows if row_flipped else rows
    step = np.cross(rows, columns) * spacing[2] * (-1 if reversed_slices else 1)
    first = np.array([10.0, -20.0, 30.5])
    values = np.arange(6 * 5 * 4).reshape(6, 5, 4) % 50
    values[4, 1, 2] = 900
    dicom_series(tmp_path, values=values, spacing=spacing, rows=rows, columns=columns, first=first, step=step)
    series = only(tmp_path)
    volume = read_series(series)
    world = (first + 4 * spacing[0] * rows + 1 * spacing[1] * columns + 2 * step) * TO_RAS
    found = np.unravel_index(int(np.argmax(volume.values[0])), volume.grid.shape)
    assert volume.values.dtype == np.int16
    assert volume.values.max() == 900 - 1000
    np.testing.assert_allclose(volume.grid.to_world(found), world, atol=1e-4)
    # Every other voxel too: the place of each value is known.
    index = np.stack(np.indices((6, 5, 4)), axis=-1).reshape(-1, 3)
    positions = first + index[:, :1] * spacing[0] * rows + index[:, 1:2] * spacing[1] * columns + index[:, 2:] * step
    at = np.rint(volume.grid.to_index(positions * TO_RAS)).astype(int)
    np.testing.assert_array_equal(volume.values[0][tuple(at.T)], values.reshape(-1) - 1000)
    assert series.size == volume.grid.shape == (6, 5, 4)
    np.testing.assert_allclose(series.spacing, spacing, atol=1e-5)


def test_names_and_numbers_of_files_mean_nothing(dicom_series: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 500, (6, 5, 20))
    dicom_series(tmp_path / "a", values=values)
    order = random.Random(1).sample(range(20), 20)

    def shuffle(dataset: Any, k: int) -> None:
        dataset.InstanceNumber = order[k]

    dicom_series(tmp_path / "b" / "deep" / "er", values=values, change=shuffle, name=lambda k: f"IM{order[-k]:03d}")
    one, other = (read_series(only(tmp_path / folder)) for folder in "ab")
    np.testing.assert_array_equal(one.values, other.values)
    assert one.grid == other.grid
    np.testing.assert_array_equal(one.values[0], values - 1000)
    headers = read_headers(only(tmp_path / "b"))
    assert [h.ImagePositionPatient[2] for h in headers] == [2 * k for k in range(20)]
    assert "PixelData" not in headers[0]


def test_no_preamble_and_no_other_file_in_the_way(dicom_series: Any, tmp_path: Path) -> None:
    for path in dicom_series(tmp_path, values=np.full((6, 5, 4), 7)):
        path.write_bytes(path.read_bytes()[132:])
    (tmp_path / "README.txt").write_text("notes")
    (tmp_path / ".hidden.dcm").write_bytes(b"\0" * 128 + b"DICMxx")
    (tmp_path / "empty").touch()
    assert (read_series(only(tmp_path)).values == 7 - 1000).all()


def test_progress_is_told_of_files_and_of_slices(dicom_series: Any, tmp_path: Path) -> None:
    dicom_series(tmp_path)
    (tmp_path / "notes.txt").write_text("not DICOM")
    seen = []

    def watch(rows: Any, total: int) -> Any:
        rows = list(rows)
        seen.append((total, len(rows)))
        return rows

    read_scan(tmp_path, progress=watch)
    assert seen == [(5, 5), (4, 4)]


@pytest.mark.parametrize("intercept", [-1000, 0, -1000.5])
def test_reading_takes_at_most_half_more_than_the_volume(dicom_series: Any, tmp_path: Path, intercept: float) -> None:
    dicom_series(tmp_path, shape=(256, 256, 40), RescaleIntercept=intercept)
    series = only(tmp_path)
    tracemalloc.start()
    try:
        volume = read_series(series)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * volume.values.nbytes


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no DICOM image"):
        find_series(tmp_path)
    with pytest.raises(InputError, match="is missing"):
        find_series(tmp_path / "other")


def test_float_jitter_is_no_fault_and_more_is(dicom_series: Any, tmp_path: Path) -> None:
    def jitter(dataset: Any, k: int, size: float = 0.03) -> None:
        dataset.ImagePositionPatient[2] += size * (-1) ** k

    dicom_series(tmp_path / "a", shape=(6, 5, 8), change=jitter)
    assert only(tmp_path / "a").spacing == pytest.approx((1, 1, 2), abs=0.01)
    dicom_series(tmp_path / "b", shape=(6, 5, 8), change=lambda d, k: jitter(d, k, 0.2))
    refused(tmp_path / "b", "unevenly spaced", "steps of", "mm from")


def at(*slices: int, **attributes: Any) -> Callable[[Any, int], None]:
    """Changes attributes of some slices."""

    def change(dataset: Any, k: int) -> None:
        if k in slices:
            for keyword, value in attributes.items():
                setattr(dataset, keyword, value)

    return change


def without(keyword: str) -> Callable[[Any, int], None]:
    return lambda dataset, k: delattr(dataset, keyword)


FAULTS: dict[str, tuple[Callable[[Any, int], None], tuple[str, ...]]] = {
    "two at one position": (at(3, ImagePositionPatient=[0, 0, 4]), ("one position", "at 4.00 mm", "Remove")),
    "one shifted sideways": (at(3, ImagePositionPatient=[0, 5, 6]), ("shifted sideways by up to 5.00 mm", "at 6.00")),
    "orientations": (at(3, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), ("1 of 8", "another orientation", "at 6.00")),
    "pixel spacings": (at(3, PixelSpacing=[1, 1.1]), ("another pixel spacing than 1x1 mm", "at 6.00 mm")),
    "slopes": (at(2, 5, RescaleSlope=2), ("2 of 8", "another rescale slope", "than 1, -1000", "at 4.00, 10.00 mm")),
    "intercepts": (at(2, RescaleIntercept=0), ("another rescale slope or intercept", "at 4.00 mm")),
    "sizes": (
        at(3, Rows=4, PixelData=b"\0" * 48),
        ("another size than 6x5 pixels", "at 6.00 mm"),
    ),
    "two patients": (at(3, PatientID="ID-471199-2", PatientName="Doe^Jane"), ("more than one patient",)),
    "no position": (without("ImagePositionPatient"), ("8 of 8 slices", "where it is", "not made up")),
    "one without position": (at(3, ImagePositionPatient=None), ("1 of 8 slices", "where it is")),
    "no orientation": (without("ImageOrientationPatient"), ("how it lies",)),
    "crooked orientation": (
        lambda d, k: setattr(d, "ImageOrientationPatient", [1, 0, 0, 0.5, 0.5, 0]),
        ("perpendicular unit vectors",),
    ),
    "no pixel spacing": (without("PixelSpacing"), ("how large its pixels are",)),
    "pixel spacing of nothing": (lambda d, k: setattr(d, "PixelSpacing", [0, 0]), ("how large its pixels are",)),
    "colour": (lambda d, k: setattr(d, "SamplesPerPixel", 3), ("colour",)),
    "palette": (lambda d, k: setattr(d, "PhotometricInterpretation", "PALETTE COLOR"), ("colours",)),
    "mosaic": (lambda d, k: setattr(d, "ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), ("mosaic",)),
    "no Hounsfield units": (without("RescaleIntercept"), ("Hounsfield",)),
    "sideways": (
        lambda d, k: setattr(d, "ImagePositionPatient", [3.0 * k, 0, 2.0 * k]),
        ("3.00 mm beside the one before it, 2.00 mm on",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_with_positions(dicom_series: Any, tmp_path: Path, fault: str) -> None:
    change, words = FAULTS[fault]
    dicom_series(tmp_path, shape=(6, 5, 8), change=change)
    refused(tmp_path, *words)


def test_missing_slices(dicom_series: Any, tmp_path: Path) -> None:
    paths = dicom_series(tmp_path, shape=(6, 5, 20), first=(0, 0, -10))
    for k in (4, 11, 12):
        paths[k].unlink()
    refused(tmp_path, "slices are missing", "2 mm apart", "1 between -4.00 and 0.00 mm", "2 between 10.00 and 16.00 mm")


def test_a_single_slice(dicom_series: Any, tmp_path: Path) -> None:
    dicom_series(tmp_path / "a", shape=(6, 5, 1))
    assert only(tmp_path / "a").notes == ("a single slice, 2 mm thick",)
    assert read_series(only(tmp_path / "a")).grid.spacing == (1, 1, 2)
    dicom_series(tmp_path / "b", shape=(6, 5, 1), change=without("SliceThickness"))
    refused(tmp_path / "b", "does not say how thick it is")


def test_pixels_that_are_not_there(dicom_series: Any, tmp_path: Path) -> None:
    path = dicom_series(tmp_path / "a", shape=(6, 5, 8))[3]
    path.write_bytes(path.read_bytes()[:-20])
    dicom_series(tmp_path / "b", shape=(6, 5, 8), change=lambda d, k: delattr(d, "PixelData") if k == 3 else None)
    for folder in "ab":
        with pytest.raises(InputError, match=r"the slice at 6\.00 mm is cut off, damaged or has no pixels") as caught:
            read_series(only(tmp_path / folder))
        assert not any(secret in str(caught.value) for secret in SECRETS)


def test_a_damaged_header_is_counted(dicom_series: Any, tmp_path: Path) -> None:
    paths = dicom_series(tmp_path, shape=(6, 5, 8))
    for path, end in ((paths[6], 150), (paths[7], 700)):
        path.write_bytes(path.read_bytes()[:end])
    assert [(s.kind, s.usable, s.slices) for s in find_series(tmp_path)] == [("image", True, 6), ("damaged", False, 2)]
    with pytest.raises(InputError, match="2 files are damaged, and a slice may be lost among them"):
        read_scan(tmp_path)
    assert read_scan(tmp_path, series=1)[1] == ("2 damaged files were left out",)


@pytest.mark.parametrize(
    ("stored", "attributes", "dtype"),
    [
        (700, {}, np.int16),
        (700, {"RescaleSlope": 0.5}, np.float32),
        (700, {"RescaleIntercept": 0.25}, np.float32),
        (700, {"RescaleIntercept": -32767}, np.int16),
        (-5, {"RescaleIntercept": -32767}, np.float32),
        (-1, {"PixelRepresentation": 0, "RescaleIntercept": 0}, np.float32),
        # Bits beyond Bits Stored hold something else: 0x0FFF is -1, or 4095.
        (0x0FFF, {"BitsStored": 12, "HighBit": 11}, np.int16),
        (0x3FFF, {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0}, np.int16),
    ],
)
def test_values_and_their_type(
    dicom_series: Any, tmp_path: Path, stored: int, attributes: dict[str, Any], dtype: Any
) -> None:
    dicom_series(tmp_path, values=np.full((6, 5, 4), stored), **attributes)
    bits = attributes.get("BitsStored", 16)
    meant = stored & ((1 << bits) - 1)
    if attributes.get("PixelRepresentation", 1) and meant >> (bits - 1):
        meant -= 1 << bits
    volume = read_series(only(tmp_path))
    assert volume.values.dtype == dtype
    expected = meant * attributes.get("RescaleSlope", 1) + attributes.get("RescaleIntercept", -1000)
    assert (volume.values == expected).all()


def test_run_length_encoding(dicom_series: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-900, 900, (6, 5, 4))
    for path in dicom_series(tmp_path, values=values):
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    np.testing.assert_array_equal(read_series(only(tmp_path)).values[0], values - 1000)


@pytest.mark.parametrize("tilt", [-18.0, 5.0, 25.0])
def test_gantry_tilt_is_honoured(dicom_series: Any, tmp_path: Path, tilt: float) -> None:
    """Slices turned about x, the table moving along z. What was scanned is a plane wave and a ramp,
    so that the truth is known anywhere."""
    angle = np.radians(tilt)
    rows, columns = np.array([1.0, 0, 0]), np.array([0, np.cos(angle), np.sin(angle)])
    shape, spacing, step, first = (24, 30, 12), (1.0, 1.25, 3.0), np.array([0, 0, 3.0]), np.array([-10.0, 5, 40])

    def scanned(points: Any) -> Any:
        return 300 + 5 * points[..., 0] - 3 * points[..., 1] + 4 * points[..., 2]

    i, j, k = (a[..., None] for a in np.indices(shape))
    lps = first + i * spacing[0] * rows + j * spacing[1] * columns + k * step
    values = np.rint(scanned(lps)).astype(int)
    dicom_series(tmp_path, values=values, spacing=spacing, rows=rows, columns=columns, first=first, step=step)
    series = only(tmp_path)
    assert series.notes == (
        f"the gantry was tilted by {abs(tilt):.1f} degrees; the slices were resampled onto a straight grid",
    )
    volume = read_series(series)
    direction = volume.grid.direction
    np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-6)
    assert volume.values.dtype == np.int16
    assert volume.grid.shape[0] == 24
    assert volume.grid.shape[2] == 12
    index = np.stack(np.indices(volume.grid.shape), axis=-1)
    truth = scanned(volume.grid.to_world(index) * TO_RAS) - 1000
    seen = np.zeros(volume.grid.shape, dtype=bool)
    # Where a slice was, two pixels from its border.
    drift = -step[1:] @ columns[1:] / spacing[1]
    start = np.rint(volume.grid.to_index(first * TO_RAS))[1]
    for place in range(12):
        low = start - drift * place + 2
        seen[2:-2, int(np.ceil(low)) : int(low + 30 - 5), place] = True
    assert seen.mean() > 0.3
    assert np.abs(volume.values[0] - truth)[seen].max() <= 1
    assert volume.values.min() == values.min() - 1000


def enhanced(path: Path, frames: list[dict[str, Any]], values: Any, **attributes: Any) -> None:
    """A multi-frame MR, a frame for each dict: position, and what else tells it apart."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = EnhancedMRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.Modality, dataset.SeriesNumber, dataset.SeriesDescription = "MR", 3, "Brain"
    dataset.PatientName, dataset.PatientID = "Roe^Richarda", "ID-471199"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "T1", "NONE"]
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = len(frames), values.shape[1], values.shape[2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = values.astype(np.uint16).tobytes()

    def group(**values: Any) -> Any:
        item = pydicom.Dataset()
        for keyword, value in values.items():
            setattr(item, keyword, value)
        return [item]

    dataset.SharedFunctionalGroupsSequence = group(
        PixelMeasuresSequence=group(PixelSpacing=[1.25, 1], SliceThickness=3),
        PixelValueTransformationSequence=group(RescaleSlope=2, RescaleIntercept=0, RescaleType="US"),
    )
    dataset.PerFrameFunctionalGroupsSequence = [
        group(
            PlanePositionSequence=group(ImagePositionPatient=frame["position"]),
            PlaneOrientationSequence=group(ImageOrientationPatient=frame.get("orientation", [1, 0, 0, 0, 1, 0])),
            FrameContentSequence=group(StackID=frame.get("stack", "1"), TemporalPositionIndex=frame.get("time", 1)),
            MREchoSequence=group(EffectiveEchoTime=frame.get("echo", 2.5)),
            MRImageFrameTypeSequence=group(
                FrameType=["ORIGINAL", "PRIMARY", "T1", "NONE"], ComplexImageComponent=frame.get("part", "MAGNITUDE")
            ),
        )[0]
        for frame in frames
    ]
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)


def test_enhanced_stacks_are_volumes_of_their_own(tmp_path: Path) -> None:
    axial = [{"position": [0, 0, 3.0 * k], "stack": "1"} for k in (2, 0, 1)]
    sagittal = [{"position": [4.0 * k, 0, 0], "stack": "2", "orientation": [0, 1, 0, 0, 0, -1]} for k in (1, 0)]
    values = np.arange(5)[:, None, None] * np.ones((5, 6, 4))
    enhanced(tmp_path / "mr", [axial[0], sagittal[0], axial[1], sagittal[1], axial[2]], values)
    one, two = find_series(tmp_path)
    assert [(s.number, s.description, s.slices) for s in (one, two)] == [
        (1, "Brain [stack 1]", 3),
        (2, "Brain [stack 2]", 2),
    ]
    assert one.grid.orientation == "LPS"
    assert one.spacing == (1, 1.25, 3)
    assert [int(v) for v in read_series(one).values[0, 0, 0]] == [4, 8, 0]
    # Rows run to the back and columns down, so that the normal points to the patient's right.
    assert two.grid.orientation == "PIR"
    assert [int(v) for v in read_series(two).values[0, 0, 0]] == [2, 6]
    with pytest.raises(InputError, match=r"there are 2 series.*--series: 1 MR Brain \[stack 1\] \(3 slices\)"):
        choose([one, two])


def test_enhanced_echoes_times_and_parts(tmp_path: Path) -> None:
    frames = [
        {"position": [0, 0, 3.0 * k], "echo": echo, "time": time, "part": part}
        for k in range(3)
        for part in ("MAGNITUDE", "PHASE")
        for echo in (2.5, 5)
        for time in (1, 2)
    ]
    values = np.arange(24)[:, None, None] * np.ones((24, 6, 4))
    enhanced(tmp_path / "mr", frames, values)
    series = find_series(tmp_path)
    assert [s.description for s in series][:3] == [
        "Brain [magnitude] [echo 2.5 ms] [time 1]",
        "Brain [magnitude] [echo 2.5 ms] [time 2]",
        "Brain [magnitude] [echo 5 ms] [time 1]",
    ]
    assert len(series) == 8
    for number, one in enumerate(series):
        assert [int(v) for v in read_series(one).values[0, 0, 0]] == [2 * (number + 8 * k) for k in range(3)]


def test_multi_frame_without_places_is_refused(tmp_path: Path) -> None:
    values = np.zeros((3, 6, 4))
    frames = [{"position": [0, 0, 3.0 * k]} for k in range(3)]
    enhanced(tmp_path / "mr", frames, values, PerFrameFunctionalGroupsSequence=None)
    refused(tmp_path, "3 of 3 slices", "where it is")


def test_two_echoes_in_one_series_are_two_volumes(dicom_series: Any, tmp_path: Path) -> None:
    def echo(dataset: Any, k: int) -> None:
        dataset.EchoTime = (10, 80)[k % 2]
        dataset.ImagePositionPatient = [0, 0, 2 * (k // 2)]

    dicom_series(tmp_path, shape=(6, 5, 8), change=echo)
    assert [(s.description, s.slices) for s in find_series(tmp_path)] == [
        ("Abdomen [echo 10 ms]", 4),
        ("Abdomen [echo 80 ms]", 4),
    ]


def test_what_is_no_scan_is_listed_by_name(dicom_series: Any, tmp_path: Path) -> None:
    dicom_series(tmp_path / "scan")
    dicom_series(tmp_path / "scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesNumber=1)
    dicom_series(tmp_path / "mr", SeriesDescription="3plane_localizer_2", SeriesNumber=2)
    dicom_series(tmp_path / "photo", SOPClassUID=UID("1.2.840.10008.5.1.4.1.1.7"), SeriesNumber=9)
    dicom_series(tmp_path / "dose", SOPClassUID=UID("1.2.840.10008.5.1.4.1.1.88.67"), SeriesNumber=10)
    series = find_series(tmp_path)
    assert [s.kind for s in series] == ["localizer", "localizer", "image", "secondary capture", "report"]
    assert [s.number for s in series] == [1, 2, 3, 4, 5]
    assert choose(series).number == 3
    with pytest.raises(InputError, match="no scan: localizer"):
        read_series(choose(series, 1))


def test_none_is_guessed(dicom_series: Any, tmp_path: Path) -> None:
    dicom_series(tmp_path / "a", SeriesNumber=2, SeriesDescription="Portal")
    dicom_series(tmp_path / "b", SeriesNumber=7, SeriesDescription="Roe, late")
    dicom_series(tmp_path / "c", SeriesNumber=8, shape=(6, 5, 1))
    series = find_series(tmp_path)
    with pytest.raises(InputError, match="there are 2 series") as caught:
        choose(series)
    assert "--series: 1 CT Portal (4 slices), 2 CT (withheld) (4 slices)" in str(caught.value)
    assert choose(series, 2) is series[1]
    with pytest.raises(InputError, match="there is no series 4"):
        choose(series, 4)
    assert choose(find_series(tmp_path / "c")).slices == 1


def test_two_patients_in_a_folder(dicom_series: Any, tmp_path: Path) -> None:
    dicom_series(tmp_path / "a")
    dicom_series(tmp_path / "b", PatientID="another", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series = find_series(tmp_path)
    with pytest.raises(InputError, match="more than one patient"):
        choose(series)
    assert choose(series, next(s.number for s in series if s.usable)).usable


def test_no_candidate_says_why(dicom_series: Any, tmp_path: Path) -> None:
    dicom_series(tmp_path / "a", change=without("PixelSpacing"))
    with pytest.raises(InputError, match="how large its pixels are"):
        choose(find_series(tmp_path))
    dicom_series(tmp_path / "b", SeriesNumber=6, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    with pytest.raises(InputError, match=r"no series can be used \(1 Abdomen: 4 of 4 slices.*medseg inspect"):
        choose(find_series(tmp_path))


def test_zip_and_gzip(dicom_series: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 500, (6, 5, 4))
    paths = dicom_series(tmp_path / "made", values=values)
    with zipfile.ZipFile(tmp_path / "scan.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in paths:
            packed.write(path, f"study/{path.name}")
        packed.writestr("study/notes.txt", "notes")
    np.testing.assert_array_equal(read_series(only(tmp_path / "scan.zip")).values[0], values - 1000)
    (tmp_path / "one").write_bytes(gzip.compress(paths[0].read_bytes()))
    np.testing.assert_array_equal(read_series(only(tmp_path / "one")).values[0], values[:, :, :1] - 1000)


def hostile(name: str, path: Path, dicom: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.dcm", dicom)
        if name == "climbs":
            packed.writestr("../../Roe.dcm", dicom)
        elif name == "absolute":
            packed.writestr("/etc/Roe", dicom)
        elif name == "drive":
            packed.writestr("C:\\Roe.dcm", dicom)
        elif name == "link":
            link = zipfile.ZipInfo("Roe")
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            packed.writestr(link, "/etc/passwd")
    raw = bytearray(path.read_bytes())
    directory = raw.rindex(b"PK\x01\x02")
    if name == "says too much":
        raw[directory + 24 : directory + 28] = (3 << 30).to_bytes(4, "little")
    elif name == "says too little":
        raw[directory + 24 : directory + 28] = (200).to_bytes(4, "little")
    elif name == "torn":
        del raw[-30:]
    elif name == "locked":
        raw[directory + 8] |= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("climbs", "leads out of it"),
        ("absolute", "leads out of it"),
        ("drive", "leads out of it"),
        ("link", "has a link in it"),
        ("says too much", "unpacks to more than it can hold"),
        ("torn", "not a sound zip"),
        ("locked", "locked with a password"),
    ],
)
def test_hostile_zips(dicom_series: Any, tmp_path: Path, name: str, words: str) -> None:
    hostile(name, tmp_path / "scan.zip", dicom_series(tmp_path / "made")[0].read_bytes())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=words) as caught:
        find_series(tmp_path / "scan.zip")
    assert "Roe" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_zip_that_unpacks_to_more_than_it_says(dicom_series: Any, tmp_path: Path) -> None:
    hostile("says too little", tmp_path / "scan.zip", dicom_series(tmp_path / "made")[0].read_bytes())
    assert [(s.kind, s.usable) for s in find_series(tmp_path / "scan.zip")] == [("damaged", False)]


def test_pet_slices_have_slopes_of_their_own(dicom_series: Any, tmp_path: Path) -> None:
    """PS3.3 C.8.9.4: all come to the unit that Units names."""

    def pet(dataset: Any, k: int) -> None:
        dataset.SOPClassUID, dataset.Modality = UID("1.2.840.10008.5.1.4.1.1.128"), "PT"
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5 * (k + 1), 0

    dicom_series(tmp_path, values=np.full((6, 5, 4), 100), change=pet)
    volume = read_series(only(tmp_path))
    assert volume.values.dtype == np.float32
    assert volume.values[0, 0, 0].tolist() == [50, 100, 150, 200]


@pytest.mark.parametrize("file", [["..", "..", "etc", "passwd"], "/etc/passwd", ["C:\\x"]])
def test_a_dicomdir_that_points_out(dicom_series: Any, tmp_path: Path, file: Any) -> None:
    dicom_series(tmp_path)
    record = pydicom.Dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", file
    directory = pydicom.Dataset()
    directory.file_meta = pydicom.dataset.FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.1.3.10")
    directory.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    directory.DirectoryRecordSequence = [record]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        directory.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    for path in (tmp_path, tmp_path / "DICOMDIR"):
        with pytest.raises(InputError, match="points out of its folder"):
            find_series(path)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_are_refused_or_read_and_never_a_traceback(dicom_series: Any, tmp_path: Path, seed: int) -> None:
    (path,) = dicom_series(tmp_path / "made", shape=(6, 5, 1))
    sound = path.read_bytes()
    draw = random.Random(seed)
    spoilt = tmp_path / "spoilt"
    for _ in range(100):
        data = bytearray(sound)
        for _ in range(draw.choice([1, 3, 10])):
            data[draw.randrange(len(data))] = draw.choice([0, 255, draw.randrange(256)])
        spoilt.write_bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])])
        try:
            read_scan(spoilt)
        except InputError as error:
            assert not any(secret in str(error) for secret in SECRETS)  # noqa: PT017


def test_frames_that_are_not_described(tmp_path: Path) -> None:
    frames = [{"position": [0, 0, 3.0 * k]} for k in range(3)]
    enhanced(tmp_path / "mr", frames, np.zeros((3, 6, 4)), NumberOfFrames=4)
    assert only(tmp_path / "mr").kind == "damaged"

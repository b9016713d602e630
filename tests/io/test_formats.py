"""One table of promises for every format: what is written comes back at the same place.

The truth is worked out from the headers of the series by the sentence of PS3.3 C.7.6.2.1.1 alone:
position of a pixel = ImagePositionPatient + column * spacing along the row + row * spacing down the
column. Nothing of medseg takes part in it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import generate_uid

from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.resample import resample
from medseg.core.volume import LabelMap
from medseg.io.dicom_seg import Algorithm, write_seg
from medseg.io.dicom_seg_read import read_seg
from medseg.io.nifti import read_labels, write_labels
from medseg.io.reference import read_reference
from medseg.io.rtstruct import read_rtstruct, write_rtstruct

LABELS = LabelSet((Label("liver", 1), Label("left kidney", 2), Label("spleen", 4)))
MODEL = Algorithm.of_model("phantom-3d")
MADE = datetime(2026, 1, 2, 3, 4, 5)
SHAPE = (13, 11, 6)  # columns, rows, slices

# ImageOrientationPatient: the directions of a row and of a column, x to the left, y to the back.
_c, _s = np.cos(0.35), np.sin(0.35)
ORIENTATIONS = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "oblique": ((_c, _s * 0.6, _s * 0.8), (-_s, _c * 0.6, _c * 0.8)),
}
FLIPS = ("plain", "row flipped", "slices reversed")
SPACINGS = {"isotropic": (1.5, 1.5, 1.5), "anisotropic": (0.8, 1.7, 4.0)}  # columns, rows, slices
GEOMETRIES = list(product(ORIENTATIONS, FLIPS, SPACINGS))


@dataclass(frozen=True)
class Scene:
    """A series, the labels (slices, rows, columns) that were drawn on it, slice by slice in the
    order of ``datasets``, and where each organ's middle is (LPS mm)."""

    datasets: tuple[Dataset, ...]
    drawn: NDArray[np.uint8]
    middles: dict[int, NDArray[np.float64]]
    label_map: LabelMap
    voxel: float


def drawing() -> NDArray[np.uint8]:
    """A liver with a hole, a kidney in two pieces that touch at a corner, one voxel of spleen."""
    drawn = np.zeros(SHAPE[::-1], dtype=np.uint8)
    drawn[1:5, 2:9, 1:7] = 1
    drawn[2:4, 4:6, 3:5] = 0
    drawn[3, 6, 2] = 0
    drawn[2:4, 1:3, 8:11] = 2
    drawn[2:4, 3:5, 11] = 2
    drawn[5, 10, 12] = 4
    return drawn


def image(place: int, row: Any, column: Any, position: Any, spacing: Any, size: tuple[int, int]) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    uid = generate_uid(entropy_srcs=["image", str(place), str(position)])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(dataset, keyword, generate_uid(entropy_srcs=[keyword]))
    dataset.Modality = "CT"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Mustermann^Erika", "ID-4711", "19640812"
    dataset.PatientSex, dataset.StudyID, dataset.AccessionNumber = "F", "1", "ACC-99"
    dataset.StudyDate, dataset.StudyTime, dataset.ReferringPhysicianName = "20200101", "101010", ""
    dataset.SeriesNumber, dataset.InstanceNumber = 3, place + 1
    dataset.ImageOrientationPatient = [round(float(v), 9) for v in (*row, *column)]
    dataset.ImagePositionPatient = [round(float(v), 6) for v in position]
    dataset.PixelSpacing, dataset.SliceThickness = [spacing[1], spacing[0]], spacing[2]
    dataset.Columns, dataset.Rows = size
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, 0, "HU"
    dataset.PixelData = np.full(size[::-1], place, dtype=np.int16).tobytes()
    return dataset


@cache
def scene(orientation: str, flip: str, spacing: str) -> Scene:
    row, column = (np.array(v, dtype=float) for v in ORIENTATIONS[orientation])
    if flip == "row flipped":
        row = -row
    normal = np.cross(row, column) * (-1 if flip == "slices reversed" else 1)
    steps = SPACINGS[spacing]
    first = np.array([-31.5, 22.25, -140.75])
    datasets = [image(k, row, column, first + normal * steps[2] * k, steps, SHAPE[:2]) for k in range(SHAPE[2])]
    drawn = drawing()
    middles = {}
    for number in LABELS.numbers:
        points = []
        for k, r, c in np.argwhere(drawn == number):
            d = datasets[k]
            along, down = np.array(d.ImageOrientationPatient[:3]), np.array(d.ImageOrientationPatient[3:])
            start = np.array(d.ImagePositionPatient, dtype=float)
            points.append(start + c * d.PixelSpacing[1] * along + r * d.PixelSpacing[0] * down)
        middles[number] = np.mean(points, axis=0)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * steps[0], column * steps[1], normal * steps[2]], axis=1)
    affine[:3, 3] = first
    grid = Grid(SHAPE, np.diag([-1, -1, 1, 1]) @ affine)
    return Scene(tuple(datasets), drawn, middles, LabelMap(drawn.transpose(2, 1, 0), grid, LABELS), min(steps))


def middles_of(values: NDArray[Any], affine: Any, numbers: Any = LABELS.numbers) -> dict[int, NDArray[np.float64]]:
    """Middles (mm) of labels by voxels and an affine."""
    return {n: np.append(np.argwhere(values == n).mean(axis=0), 1) @ np.asarray(affine)[:3].T for n in numbers}


def agree(found: dict[int, NDArray[np.float64]], truth: Scene, *, of_voxel: float) -> None:
    for number, middle in truth.middles.items():
        assert np.linalg.norm(found[number] - middle) < of_voxel * truth.voxel, number


def lps(affine: Any) -> Any:
    return np.diag([-1, -1, 1, 1]) @ np.asarray(affine)


def _write_nifti(path: Path, truth: Scene, label_map: LabelMap) -> None:
    write_labels(path, label_map)


def _write_seg(path: Path, truth: Scene, label_map: LabelMap) -> None:
    write_seg(path, label_map, truth.datasets, MODEL, made=MADE)


def _write_label_map(path: Path, truth: Scene, label_map: LabelMap) -> None:
    write_seg(path, label_map, truth.datasets, MODEL, made=MADE, kind="labelmap")


def _write_rtstruct(path: Path, truth: Scene, label_map: LabelMap) -> None:
    write_rtstruct(path, label_map, truth.datasets, MODEL, made=MADE)


Write = Callable[[Path, Scene, LabelMap], None]
Read = Callable[[Path, Grid], LabelMap]
# Name: file name, how it is written, how it is read.
FORMATS: dict[str, tuple[str, Write, Read]] = {
    "nifti": ("a.nii", _write_nifti, lambda p, g: read_labels(p, LABELS)),
    "nifti.gz": ("a.nii.gz", _write_nifti, lambda p, g: read_labels(p, LABELS)),
    "dicom-seg": ("a.dcm", _write_seg, lambda p, g: read_seg(p, onto=g, labels=LABELS).label_map),
    "dicom-seg label map": ("a.dcm", _write_label_map, lambda p, g: read_seg(p, onto=g).label_map),
    "rtstruct": ("a.dcm", _write_rtstruct, lambda p, g: read_rtstruct(p, g).label_map),
}


@pytest.mark.parametrize(("orientation", "flip", "spacing"), GEOMETRIES)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_comes_back_voxel_by_voxel(
    tmp_path: Path, kind: str, orientation: str, flip: str, spacing: str
) -> None:
    truth = scene(orientation, flip, spacing)
    name, write, read = FORMATS[kind]
    # As a network would hand it over: with axes that run along x, y, z as well as they can.
    given = resample(truth.label_map, truth.label_map.grid.reoriented())
    for label_map in (truth.label_map, given):
        write(tmp_path / name, truth, label_map)
        found = read(tmp_path / name, label_map.grid)
        assert found.grid.matches(label_map.grid)
        assert np.array_equal(found.values, label_map.values)
        agree(middles_of(found.values, lps(found.grid.affine)), truth, of_voxel=0.01)


@pytest.mark.parametrize(("orientation", "flip", "spacing"), GEOMETRIES)
def test_nibabel_finds_the_organs_of_our_nifti(tmp_path: Path, orientation: str, flip: str, spacing: str) -> None:
    truth = scene(orientation, flip, spacing)
    write_labels(tmp_path / "a.nii.gz", truth.label_map)
    read = nib.load(tmp_path / "a.nii.gz")
    agree(middles_of(np.asarray(read.dataobj), lps(read.affine)), truth, of_voxel=0.01)


@pytest.mark.parametrize(("orientation", "flip", "spacing"), GEOMETRIES)
@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_highdicom_finds_the_organs_of_our_seg(
    tmp_path: Path, kind: Any, orientation: str, flip: str, spacing: str
) -> None:
    import highdicom as hd

    truth = scene(orientation, flip, spacing)
    write_seg(tmp_path / "a.dcm", truth.label_map, truth.datasets, MODEL, kind=kind)
    volume = hd.seg.segread(tmp_path / "a.dcm").get_volume(combine_segments=True)
    # A binary SEG counts its segments from 1 on.
    renumbered = {1: 1, 2: 2, 3: 4} if kind == "binary" else {1: 1, 2: 2, 4: 4}
    found = middles_of(volume.array, volume.affine, renumbered)
    agree({new: found[old] for old, new in renumbered.items()}, truth, of_voxel=0.01)
    assert np.count_nonzero(volume.array) == np.count_nonzero(truth.drawn)


def program(name: str) -> str:
    """Path of a program, beside this Python or on the PATH; skips where there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize(("orientation", "flip", "spacing"), GEOMETRIES)
@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_dcmqi_finds_the_organs_of_our_seg(
    tmp_path: Path, kind: Any, orientation: str, flip: str, spacing: str
) -> None:
    reader = program("segimage2itkimage")
    truth = scene(orientation, flip, spacing)
    write_seg(tmp_path / "a.dcm", truth.label_map, truth.datasets, MODEL, kind=kind)
    command = [reader, "--inputDICOM", tmp_path / "a.dcm", "--outputDirectory", tmp_path, "--outputType", "nii"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot execute" in ran.stderr or "GLIBC" in ran.stderr:
        pytest.skip("dcmqi's program does not run on this machine")
    assert ran.returncode == 0, ran.stderr
    found: dict[int, NDArray[np.float64]] = {}
    voxels = 0
    for path in tmp_path.glob("*.nii.gz"):
        read = nib.load(path)
        values = np.asarray(read.dataobj)
        here = {int(n) for n in np.unique(values)} - {0}
        found |= middles_of(values, lps(read.affine), here)
        voxels += np.count_nonzero(values)
    if kind == "binary":
        found = {{1: 1, 2: 2, 3: 4}[n]: middle for n, middle in found.items()}
    agree(found, truth, of_voxel=0.01)
    assert voxels == np.count_nonzero(truth.drawn)


@pytest.mark.parametrize(("orientation", "flip", "spacing"), GEOMETRIES)
def test_contours_enclose_the_organs(tmp_path: Path, orientation: str, flip: str, spacing: str) -> None:
    """Areas and middles of the polygons themselves (shoelace formula, in mm), without any grid."""
    truth = scene(orientation, flip, spacing)
    write_rtstruct(tmp_path / "a.dcm", truth.label_map, truth.datasets, MODEL)
    images = {d.SOPInstanceUID: d for d in truth.datasets}
    found = {}
    for region in pydicom.dcmread(tmp_path / "a.dcm").ROIContourSequence:
        moments, area = np.zeros(3), 0.0
        for contour in region.ContourSequence:
            on = images[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            u, v = np.array(on.ImageOrientationPatient[:3]), np.array(on.ImageOrientationPatient[3:])
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            start = np.array(on.ImagePositionPatient, dtype=float)
            assert np.abs((points - start) @ np.cross(u, v)).max() < 1e-3  # on its own image
            x, y = (points - start) @ u, (points - start) @ v
            cross = x * np.roll(y, -1) - np.roll(x, -1) * y
            size = cross.sum() / 2
            assert size != 0
            middle = [(a + np.roll(a, -1)) @ cross / (6 * size) for a in (x, y)]
            moments += abs(size) * (start + middle[0] * u + middle[1] * v)
            area += abs(size)
        found[int(region.ReferencedROINumber)] = moments / area
        pixels = np.count_nonzero(truth.drawn == region.ReferencedROINumber)
        one = np.prod(np.array(truth.datasets[0].PixelSpacing, dtype=float))
        # Each rim has half a pixel less than its voxels, each hole half a pixel more.
        assert abs(area / one - pixels) <= len(region.ContourSequence)
    agree(found, truth, of_voxel=0.5)


def test_the_series_own_grid_is_where_its_headers_say() -> None:
    for geometry in GEOMETRIES:
        truth = scene(*geometry)
        reference = read_reference(truth.datasets[::-1])
        values = reference.slices_of(truth.label_map).transpose(2, 1, 0)
        agree(middles_of(values, lps(reference.grid.affine)), truth, of_voxel=0.01)


# ---- validators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_dciodvfy_finds_no_error(tmp_path: Path, kind: str, orientation: str) -> None:
    # It knows no label map SEG: the object is younger than the program.
    validator = program("dciodvfy")
    truth = scene(orientation, "plain", "anisotropic")
    name, write, _ = FORMATS[kind]
    unknown = LabelMap(
        truth.label_map.values,
        truth.label_map.grid,
        LabelSet((*LABELS.labels, Label("kidney tumour", 6), Label("right blob", 7))),
    )
    empty = LabelMap(np.zeros_like(truth.label_map.values), truth.label_map.grid, LABELS)
    for label_map in (truth.label_map, unknown, empty):
        write(tmp_path / name, truth, label_map)
        ran = subprocess.run([validator, "-new", tmp_path / name], capture_output=True, text=True, check=False)
        said = (ran.stdout + ran.stderr).splitlines()
        assert any("Segmentation" in line or "RTStructureSet" in line for line in said), said
        assert [line for line in said if line.startswith("Error")] == []
        # The one warning is that it does not know our private codes.
        assert [line for line in said if line.startswith("Warning") and "99MEDSEG" not in line] == []


def test_the_writing_stands_beside_a_tilted_plane_of_sheared_slices(tmp_path: Path) -> None:
    """A tilted gantry: slices shift sideways as they go. Labels drawn on those slices stay on them."""
    datasets = [
        image(k, (1, 0, 0), (0, 1, 0), (-20, 30 + 0.7 * k, 5 + 2.5 * k), (1, 1, 2.5), SHAPE[:2])
        for k in range(SHAPE[2])
    ]
    grid = read_reference(datasets).grid
    label_map = LabelMap(drawing().transpose(2, 1, 0), grid, LABELS)
    for kind in ("dicom-seg", "rtstruct"):
        name, write, read = FORMATS[kind]
        write(tmp_path / name, Scene(tuple(datasets), drawing(), {}, label_map, 1), label_map)
        assert np.array_equal(read(tmp_path / name, grid).values, label_map.values)

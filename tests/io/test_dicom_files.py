"""The real files: what each must give, written down from its SOURCES.md and headers, and the same
geometry as an independent reader."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.resample import resample
from medseg.io.dicom import choose, find_series, read_headers, read_series
from medseg.io.dicom_header import quiet

SYNTAXES = "dicom-ct-transfer-syntaxes"
MISC = "dicom-misc-pydicom"
TREE = f"{MISC}/test_files/dicomdirtests"
SEGS = "dicom-seg-dcmqi/segmentations"

# path: size, spacing in mm, axes, first voxel in mm (RAS+). Each path holds one usable series.
READ: dict[str, tuple[tuple[int, ...], tuple[float, ...], str, tuple[float, ...]]] = {
    "dicom-ct-torchio-crop": ((88, 128, 17), (2, 2, 2), "RAS", (-82.1807, -122.163, -24.707)),
    "dicom-mr-sagittal-siemens": ((256, 256, 35), (1.015625, 1.015625, 4.8), "PIR", (-81.6, 130, 130)),
    "totalsegmentator-reference/example_ct_dicom": (
        (512, 512, 20), (0.9765625, 0.9765625, 2), "LPS", (249.51171875, 437.51171875, -804.5),
    ),
    "dicom-mr-enhanced-philips/1901_WIP_3DpCASL_real.dcm.gz": (
        (96, 96, 40), (2.5, 2.5, 4), "LPS", (109.645144, 126.079476, -53.042417),
    ),
    "nifti-awkward/nibabel-nicom-dicom/philips_mprage.dcm.gz": (
        (256, 256, 176), (1, 1, 1), "PIR", (-92.709042, 125.127670, 136.495257),
    ),
    f"{SYNTAXES}/CT0012.fragmented_no_bot_jpeg_baseline.51.dcm": (
        (512, 512, 2), (0.388672, 0.388672, 10), "RPI", (-99.5, 301.5, -149),
    ),
    f"{MISC}/data_store/eCT_Supplemental.dcm": ((512, 512, 2), (0.388672, 0.388672, 10), "RPI", (-99.5, 301.5, -149)),
    f"{SYNTAXES}/CT1_J2KR": ((512, 512, 1), (0.661468, 0.661468, 5), "LPS", (158.135803, 179.035797, -75.699997)),
    f"{SYNTAXES}/CT2_J2KR": ((512, 512, 1), (0.468, 0.468, 10), "LPS", (120, 120, -545)),
    f"{TREE}/98892001/CT5N": ((16, 16, 5), (0.488281, 0.488281, 2.5), "LPS", (72.2, 143, -1.2375)),
    f"{SEGS}/ct-3slice": ((512, 512, 3), (0.810547, 0.810547, 1), "LPS", (235.2, 226.8, -128.69)),
    f"{SEGS}/24x38x3/image": ((24, 38, 3), (0.7, 0.7, 2.5), "LPS", (-46.4649, -5.01881, -177.75)),
    f"{SEGS}/24x38x3/multiframe": ((24, 38, 3), (0.7, 0.7, 2.5), "LPS", (-46.4649, -5.01881, -177.75)),
    f"{SEGS}/23x38x3/image": ((23, 38, 3), (0.7, 0.7, 2.5), "LPS", (-46.4649, -5.01881, -177.75)),
    f"{SEGS}/23x38x3/multiframe": ((23, 38, 3), (0.7, 0.7, 2.5), "LPS", (-46.4649, -5.01881, -177.75)),
    "dicom-rtstruct/rt-utils/mock_data": ((512, 512, 2), (0.488281, 0.488281, 5), "LPS", (125, 125, 60)),
    "dicom-rtstruct/rt-utils/oriented_data": ((100, 50, 3), (2.5, 3.5, 4.5), "LPS", (-123, 432, 30)),
    "dicom-rtstruct/dicompyler": ((512, 512, 1), (1.074219, 1.074219, 3), "LPS", (275, 524, 168.5593)),
    "dicom-seg-highdicom/ct_image.dcm": ((128, 128, 1), (0.661468, 0.661468, 5), "LPS", (158.1358, 179.0358, -75.7)),
    "dicom-seg-dcmqi/paramaps/pm-example-slice.dcm": (
        (256, 256, 1), (0.7031, 0.7031, 3), "LPS", (90.0225, 108.462, -43.9748),
    ),
    f"{MISC}/test_files/CT_small.dcm": ((128, 128, 1), (0.661468, 0.661468, 5), "LPS", (158.1358, 179.0358, -75.7)),
    f"{MISC}/test_files/J2K_pixelrep_mismatch.dcm": (
        (512, 512, 1), (0.431, 0.431, 5), "LPS", (110.2153, 98.1898, 72.1446),
    ),
    f"{MISC}/data_store/bad_sequence.dcm": (
        (512, 512, 1), (0.287109375, 0.287109375, 1), "LPS", (65.3564453, 154.3564453, 1687.5),
    ),
    "nifti-awkward/nibabel-nicom-dicom/decimal_rescale.dcm": (
        (128, 96, 1), (1.125, 1.125, 5), "LPS", (116.068462, 97.901815, -43.233071),
    ),
}  # fmt: skip
for _name in ("test_files/693_J2KI", "data_store/693_J2KR", "data_store/693_UNCI", "data_store/693_UNCR"):
    READ[f"{MISC}/{_name}.dcm"] = ((512, 512, 1), (0.478516, 0.478516, 5), "LPS", (122.5, 112.4, 47))
for _name in ("MR2_J2KI", "MR2_J2KR"):
    READ[f"{MISC}/data_store/{_name}.dcm"] = (
        (1024, 1024, 1), (0.195313, 0.195313, 6), "PIR", (180.058222, 97.147766, 112.82799),
    )  # fmt: skip
for _name in (
    "",
    "_RLE",
    "_bigendian",
    "_expb",
    "_implicit",
    "_jp2klossless",
    "_jpeg_ls_lossless",
    "_padded",
):
    READ[f"{MISC}/test_files/MR_small{_name}.dcm"] = (
        (64, 64, 1), (0.3125, 0.3125, 0.8), "LPS", (83.9063, 91.2, 6.6406),
    )  # fmt: skip

# path: words of the reason. What is skipped is skipped by its name.
REFUSED = {
    # Tilted, and steps of 4, 1.08 and 7 mm: no one grid holds it.
    "dicom-ct-ge-head-tilt": ("unevenly spaced", "4.002 mm", "1.081 mm", "6.999 mm", "from 18.36 mm"),
    "dicom-mr-enhanced-philips/1301_WIP_ADNI_Sag3D_MPRAGE_Raw.dcm.gz": ("raw data",),
    f"{SYNTAXES}/no-pixel-data.dcm": ("report",),
    f"{SYNTAXES}/no-pixel-spacing.dcm": ("colours",),
    f"{MISC}/data_store/JLSL_16_15_1_1F.dcm": ("secondary capture",),
    f"{MISC}/data_store/JPEG2000_UNC.dcm": ("secondary capture",),
    f"{MISC}/data_store/mlut_18.dcm": ("secondary capture",),
    f"{MISC}/data_store/vlut_04.dcm": ("secondary capture",),
    f"{MISC}/data_store/parametric_map_float.dcm": ("parametric map",),
    f"{MISC}/data_store/parametric_map_double_float.dcm": ("parametric map",),
    f"{MISC}/data_store/explicit_VR-UN.dcm": ("how thick",),
    f"{MISC}/test_files/JPEG2000.dcm": ("secondary capture",),
    f"{MISC}/test_files/JPEG2000-embedded-sequence-delimiter.dcm": ("secondary capture",),
    f"{MISC}/test_files/MR_truncated.dcm": ("at 6.64 mm is cut off",),
    f"{MISC}/test_files/badVR.dcm": ("dose",),
    f"{MISC}/test_files/ExplVR_LitEndNoMeta.dcm": ("radiotherapy object",),
    f"{MISC}/test_files/ExplVR_BigEndNoMeta.dcm": ("radiotherapy object",),
    f"{MISC}/test_files/no_meta.dcm": ("holds no DICOM",),
    f"{MISC}/test_files/no_meta_group_length.dcm": ("object without pixels",),
    f"{MISC}/test_files/rtstruct.dcm": ("structure set",),
    f"{MISC}/test_files/liver_1frame.dcm": ("segmentation",),
    f"{MISC}/test_files/liver_expb_1frame.dcm": ("segmentation",),
    f"{TREE}/98892003/MR700": ("projection",),
    f"{TREE}/98892003/MR1": ("localizer",),
    f"{TREE}/98892001/CT2N": ("localizer",),
    f"{TREE}/77654033/CT2": ("slices are missing", "161 between -99.48 and 103.02 mm"),
    f"{TREE}/77654033/CR1": ("where it is",),
    f"{TREE}/77654033/CR2": ("where it is",),
    f"{TREE}/77654033/CR3": ("where it is",),
    f"{TREE}/TINY_ALPHA": ("50 files are damaged or have no pixels",),
    f"{SEGS}/24x38x3/nrrd": ("holds no DICOM",),
    f"{SEGS}/24x38x3/seg": ("segmentation",),
    f"{SEGS}/23x38x3/seg": ("segmentation",),
    f"{SEGS}/liver.dcm": ("segmentation",),
    f"{SEGS}/partial_overlaps.dcm": ("segmentation",),
    f"{SEGS}/sparse-labelmap-ppv5.dcm": ("segmentation",),
    f"{SEGS}/sparse-labelmap-noppv.dcm": ("segmentation",),
    "dicom-seg-dcmqi/sr-example/sr.dcm": ("report",),
    "dicom-seg-dcmqi/sr-example/seg.dcm": ("segmentation",),
    "dicom-seg-dcmqi/sr-example/rwvm.dcm": ("real world value mapping",),
    "dicom-rtstruct/rt-utils/empty": ("structure set",),
    "dicom-rtstruct/rt-utils/one_slice_data": ("how thick",),
    "dicom-rtstruct/pydicom": ("structure set",),
    "dicom-seg-highdicom/source_CT2_from_pydicom": ("slices are missing", "161 between -99.48 and 103.02 mm"),
    "nifti-awkward/nibabel-nicom-dicom/csa_slice_norm.dcm": ("mosaic",),
    "nifti-awkward/nibabel-nicom-dicom/slicethickness_empty_string.dcm": ("projection",),
}
for _name in ("", "_RLE", "_big_endian", "_jpeg_2k_lossless", "_jpeg_2k_lossless_too_short", "_jpeg_ls_lossless"):
    REFUSED[f"{MISC}/data_store/emri_small{_name}.dcm"] = ("10 of 10 slices", "where it is", "not made up")
for _name in ("", "_deflate", "_expb", "_j2k", "_rle"):
    REFUSED[f"{MISC}/data_store/liver{_name}.dcm"] = ("segmentation",)
for _name in ("", "_deflate", "_j2k", "_rle"):
    REFUSED[f"{MISC}/data_store/liver_nonbyte_aligned{_name}.dcm"] = ("segmentation",)
for _name in ("binary", "binary_overlap", "binary_single_frame", "binary_fractional", "true_fractional"):
    REFUSED[f"dicom-seg-highdicom/seg_image_ct_{_name}.dcm"] = ("segmentation",)
REFUSED["dicom-seg-highdicom/seg_image_cr_binary.dcm"] = ("segmentation",)

# path: descriptions and slices of the volumes in one multi-frame file or folder.
MANY = {
    "dicom-mr-enhanced-philips/1903_WIP_SOURCE_-_3DpCASL.dcm.gz": [
        (f"WIP SOURCE - 3DpCASL [time {time}] [index {time}.{label}]", 40) for time in (1, 2, 3) for label in (0, 1)
    ],
    "dicom-mr-enhanced-philips/2001_WIP_fcMRI_Field_Mapping_e2_phMag.dcm.gz": [
        (f"fcMRI Field Mapping [{part}] [echo {echo} ms]", 53) for part in ("magnitude", "phase") for echo in (2.3, 4.6)
    ],
    # Three planes twice, and a localizer.
    f"{TREE}/98892003/MR2": [("FAST LOCALIZER", 1), ("T/S/C RF FAST PILOT", 3), ("T/S/C RF FAST PILOT", 3)],
}

# Transfer syntax of the same slice: by how much (HU) it may differ from CTImage.dcm (SOURCES.md).
LOSS = {
    "LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2": 0,
    "LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1": 0,
    "DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99": 0,
    "BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2": 0,
    "RLELosslessTransferSyntax_1.2.840.10008.1.2.5": 0,
    "JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50": 65,
    "JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51": 64,
    "JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53": 64,
    "JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55": 64,
    "JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57": 0,
    "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70": 0,
    "JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80": 0,
    "JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81": 1,
    "JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90": 0,
    "JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91": 5,
}


@pytest.mark.parametrize("path", READ)
def test_read_to_the_geometry_of_the_header(shared_data: Path, path: str) -> None:
    size, spacing, axes, first = READ[path]
    volume = read_series(choose(find_series(shared_data / path)))
    assert volume.grid.shape == size
    assert volume.grid.orientation == axes
    np.testing.assert_allclose(volume.grid.spacing, spacing, atol=2e-4)
    np.testing.assert_allclose(volume.grid.origin, first, atol=1e-3)


@pytest.mark.parametrize("path", REFUSED)
def test_refused_for_the_right_reason(shared_data: Path, path: str) -> None:
    with pytest.raises(InputError) as caught:
        read_series(choose(find_series(shared_data / path)))
    for word in REFUSED[path]:
        assert word in str(caught.value)
    _says_nothing_of_the_patient(shared_data / path, str(caught.value))


def _says_nothing_of_the_patient(path: Path, text: str) -> None:
    with quiet():
        for file in sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())[:3]:
            try:
                header = pydicom.dcmread(file, stop_before_pixels=True)
            except Exception:  # noqa: BLE001
                continue
            for keyword in ("PatientName", "PatientID", "AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID"):
                value = str(header.get(keyword) or "")
                assert len(value) < 4 or value not in text


@pytest.mark.parametrize("path", MANY)
def test_one_volume_for_each_stack_echo_and_time(shared_data: Path, path: str) -> None:
    series = find_series(shared_data / path)
    assert [(s.description, s.slices) for s in series] == MANY[path]
    if path.endswith(".gz"):
        volumes = [read_series(s) for s in series]
        assert len({v.grid for v in volumes}) == 1
        for i, one in enumerate(volumes):
            assert all(not np.array_equal(one.values, other.values) for other in volumes[:i])
    else:
        assert not any(s.usable for s in series)


@pytest.mark.parametrize("syntax", LOSS)
def test_every_transfer_syntax(shared_data: Path, syntax: str) -> None:
    plain = read_series(choose(find_series(shared_data / SYNTAXES / "CTImage.dcm")))
    coded = read_series(choose(find_series(shared_data / SYNTAXES / f"CTImage.dcm_{syntax}.dcm")))
    assert coded.grid == plain.grid
    assert plain.values.min() == -2000 - 1024
    difference = np.abs(coded.values.astype(float) - plain.values).max()
    assert difference == 0 if LOSS[syntax] == 0 else 0 < difference <= LOSS[syntax]


def test_one_image_coded_in_different_ways(shared_data: Path) -> None:
    def values(name: str) -> Any:
        return read_series(choose(find_series(shared_data / MISC / name))).values

    np.testing.assert_array_equal(values("data_store/693_J2KR.dcm"), values("data_store/693_UNCR.dcm"))
    # A copy of a lossy image decoded by others.
    assert np.abs(values("test_files/693_J2KI.dcm") - values("data_store/693_UNCI.dcm")).max() <= 1
    for name in ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"):
        np.testing.assert_array_equal(values("test_files/MR_small.dcm"), values(f"test_files/MR_small_{name}.dcm"))


INDEPENDENT = [p for p in READ if not p.endswith(".gz") and p not in (
    # SimpleITK orders frames as they are stored, or has no decoder.
    f"{SYNTAXES}/CT0012.fragmented_no_bot_jpeg_baseline.51.dcm",
    f"{MISC}/data_store/eCT_Supplemental.dcm",
)]  # fmt: skip


@pytest.mark.parametrize("path", INDEPENDENT)
def test_simpleitk_sees_the_same(shared_data: Path, path: str) -> None:
    """Every voxel's value at its place, as SimpleITK has it when it is given the files in order."""
    series = choose(find_series(shared_data / path))
    volume = read_series(series)
    files = list(dict.fromkeys(str(f.source.path) for f in series.stack.frames)) if series.stack else []
    image = SimpleITK.ReadImage(files[0]) if len(files) == 1 else SimpleITK.ReadImage(files)
    grid = _grid_of(image)
    values = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    if len(files) == 1 and volume.grid.shape[2] == 1:
        grid = Grid(grid.shape, np.c_[grid.affine[:, :2], volume.grid.affine[:, 2], grid.affine[:, 3]])
    if grid.shape == volume.grid.shape and not grid.matches(volume.grid):
        grid, values = _turned(grid), values[:, :, ::-1]
    assert volume.grid.matches(grid, 1e-2)
    np.testing.assert_allclose(volume.values[0], values, atol=1e-3 * max(1, np.abs(values).max() / 1000))


def _grid_of(image: Any) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Grid(image.GetSize(), np.diag([-1.0, -1, 1, 1]) @ affine)


def _turned(grid: Grid) -> Grid:
    flip = np.diag([1.0, 1, -1, 1])
    flip[2, 3] = grid.shape[2] - 1
    return Grid(grid.shape, grid.affine @ flip)


# oriented_data has no frame of reference, without which highdicom takes no series.
@pytest.mark.parametrize("path", ["dicom-ct-torchio-crop", "dicom-mr-sagittal-siemens", f"{SEGS}/ct-3slice"])
def test_highdicom_sees_the_same(shared_data: Path, path: str) -> None:
    highdicom = pytest.importorskip("highdicom")
    series = choose(find_series(shared_data / path))
    with quiet():
        datasets = [pydicom.dcmread(f.source.path) for f in series.stack.frames] if series.stack else []
        other = highdicom.get_volume_from_series(datasets, apply_modality_transform=None)
    # highdicom's axes are slices, rows, columns in LPS.
    swap = np.eye(4)[:, [2, 1, 0, 3]]
    grid = Grid(other.spatial_shape[::-1], np.diag([-1.0, -1, 1, 1]) @ other.affine @ swap)
    volume, values = read_series(series), other.array.transpose(2, 1, 0)
    if not grid.matches(volume.grid):
        grid, values = _turned(grid), values[:, :, ::-1]
    assert volume.grid.matches(grid, 1e-2)
    np.testing.assert_allclose(volume.values[0], values, atol=1e-3)


PHILIPS = "dicom-mr-enhanced-philips"


@pytest.mark.parametrize(
    "path",
    [
        f"{PHILIPS}/1901_WIP_3DpCASL_real.dcm.gz",
        f"{PHILIPS}/1903_WIP_SOURCE_-_3DpCASL.dcm.gz",
        f"{PHILIPS}/2001_WIP_fcMRI_Field_Mapping_e2_phMag.dcm.gz",
        "nifti-awkward/nibabel-nicom-dicom/philips_mprage.dcm.gz",
        "totalsegmentator-reference/example_ct_dicom",
        "dicom-mr-sagittal-siemens",
    ],
)
def test_dcm2niix_sees_the_same(shared_data: Path, tmp_path: Path, path: str) -> None:
    """Each of our volumes is one of its volumes, and every one of its is ours."""
    program = shutil.which("dcm2niix")
    if program is None:
        pytest.skip("dcm2niix is not installed")
    source = shared_data / path
    if path.endswith(".gz"):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "scan.dcm").write_bytes(gzip.decompress(source.read_bytes()))
        source = tmp_path / "in"
    (tmp_path / "out").mkdir()
    # -p n: scaled by the standard's Rescale Slope, not by a private one.
    options = ["-z", "n", "-b", "n", "-p", "n", "-o", str(tmp_path / "out")]
    subprocess.run([program, *options, str(source)], check=True, capture_output=True)
    theirs = []
    for file in sorted((tmp_path / "out").glob("*.nii")):
        image = nib.load(file)
        values = image.get_fdata().reshape((*image.shape[:3], -1))
        theirs += [(Grid(image.shape[:3], image.affine), values[..., i]) for i in range(values.shape[3])]
    ours = [read_series(s) for s in find_series(shared_data / path) if s.usable]
    assert len(ours) == len(theirs)
    for volume in ours:
        grid = theirs[0][0]
        assert grid.reoriented().matches(volume.grid.reoriented(), 1e-3)
        turned = resample(volume, grid).values[0]
        equal = [np.allclose(turned, values, atol=1e-6 * max(1, np.abs(values).max())) for _, values in theirs]
        assert sum(equal) == 1


def test_the_mask_made_from_a_series_lies_on_it(shared_data: Path) -> None:
    """TotalSegmentator's mask is stored flipped; its voxels are those of the series."""
    folder = shared_data / "totalsegmentator-reference"
    grid = find_series(folder / "example_ct_dicom")[0].grid
    mask = nib.load(folder / "example_seg_dicom.nii.gz")
    assert grid is not None
    assert grid.reoriented().matches(Grid(mask.shape, mask.affine).reoriented(), 0.05)


def test_a_tree_with_a_dicomdir(shared_data: Path) -> None:
    """More than one patient's scans: listed, and none taken."""
    for path in (shared_data / TREE, shared_data / TREE / "DICOMDIR"):
        series = find_series(path)
        assert [s.description for s in series if s.usable] == ["SmartScore - Gated 0.5 sec"]
        with pytest.raises(InputError, match="more than one patient"):
            choose(series)


def test_every_file_has_its_row(shared_data: Path) -> None:
    """No DICOM file of these sets is left out of the tables."""
    from medseg.io.sources import find_sources, is_dicom

    tables = [*READ, *REFUSED, *MANY, *(f"{SYNTAXES}/CTImage.dcm_{s}.dcm" for s in LOSS), f"{SYNTAXES}/CTImage.dcm"]
    for name in sorted(p.name for p in shared_data.iterdir() if p.name.startswith("dicom-")):
        for source in find_sources(shared_data / name):
            path = source.path.relative_to(shared_data).as_posix()
            directory = source.path.name.startswith("DICOMDIR")
            if is_dicom(source) and not directory:
                assert any(path == row or path.startswith(f"{row}/") for row in tables), path


def test_headers_in_order(shared_data: Path) -> None:
    series = choose(find_series(shared_data / "dicom-mr-sagittal-siemens"))
    places = [float(h.ImagePositionPatient[0]) for h in read_headers(series)]
    assert places == sorted(places, reverse=True)
    assert len(places) == 35

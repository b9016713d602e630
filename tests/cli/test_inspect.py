from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from medseg.core.labels import LabelSet
from medseg.io.nifti import read_labels, read_volume

QUICK = ("--threads", 1)
SECRETS = ("Roe", "Richarda", "471199", "19031224", "1903AB24", "771177")
LABELS = LabelSet.from_names(["left blob", "right blob"])


def unsaid(outcome: Any, caplog: Any) -> None:
    """Nothing of the patient is printed or logged."""
    for secret in SECRETS:
        assert secret not in outcome.out + outcome.err + caplog.text


def test_a_table_of_what_is_there(
    medseg: Any, dicom_series: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    dicom_series(tmp_path / "a", SeriesNumber=2, SeriesDescription="Portal")
    dicom_series(tmp_path / "b", SeriesNumber=3, SeriesDescription="Late", shape=(6, 5, 9))[4].unlink()
    dicom_series(
        tmp_path / "c", SeriesNumber=1, SeriesDescription="Scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    (single,) = dicom_series(tmp_path / "d", shape=(6, 5, 1), SeriesNumber=4, SeriesDescription="Richarda's")
    # A date of birth that is none: pydicom warns, and quotes it.
    single.write_bytes(single.read_bytes().replace(b"19031224", b"1903AB24"))
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([-2.0, 1, 1, 1])), tmp_path / "x.nii.gz")
    (tmp_path / "y.nii").write_bytes(b"nothing")
    outcome = medseg("inspect", tmp_path)
    assert outcome.status == 0, outcome
    unsaid(outcome, caplog)
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[2:6] == [
        ["1", "1", "CT", "Scout", "4", "-", "-", "-", "localizer"],
        ["2", "2", "CT", "Portal", "4", "6x5x4", "1x1x2", "LPS", "usable"],
        ["3", "3", "CT", "Late", "8", "-", "-", "-", "refused"],
        ["4", "4", "CT", "(withheld)", "1", "6x5x1", "1x1x2", "LPS", "usable"],
    ]
    assert (
        "refused: series 3: slices are missing, the others being 2 mm apart: 1 between 6.00 and 10.00 mm" in outcome.out
    )
    assert "note: series 4: a single slice, 2 mm thick" in outcome.out
    assert ["x.nii.gz", "3x4x5", "2x1x1", "LAS", "1", "usable"] in lines
    assert "refused: y.nii is not a NIfTI file" in outcome.out


def test_json(medseg: Any, dicom_series: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = dicom_series(tmp_path / "made")
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as packed:
        for path in paths:
            packed.write(path)
    for scan in (tmp_path / "made", tmp_path / "scan.zip"):
        outcome = medseg("inspect", scan, "--json")
        unsaid(outcome, caplog)
        assert json.loads(outcome.out) == {
            "format": 1,
            "series": [
                {
                    "number": 1,
                    "series_number": 5,
                    "modality": "CT",
                    "description": "Abdomen",
                    "kind": "image",
                    "slices": 4,
                    "size": [6, 5, 4],
                    "spacing": [1, 1, 2],
                    "axes": "LPS",
                    "usable": True,
                    "problem": None,
                    "notes": [],
                }
            ],
            "files": [],
        }


def test_nothing_usable(medseg: Any, dicom_series: Any, tmp_path: Path) -> None:
    dicom_series(tmp_path / "a", ImageOrientationPatient=None)
    outcome = medseg("inspect", tmp_path)
    assert outcome.status == 2
    assert "refused: series 1: 4 of 4 slices: the file does not say how it lies" in outcome.out
    image = tmp_path / "x.nii"
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), image)
    assert medseg("inspect", image).out.splitlines()[2].split() == ["x.nii", "3x4x5", "1x1x1", "RAS", "1", "usable"]
    (tmp_path / "empty").mkdir()
    medseg("inspect", tmp_path / "empty").refused("holds no DICOM image")
    medseg("inspect", tmp_path / "gone").refused("is missing")


def scan(made: Any) -> Any:
    """A scan that the small model knows, as RAS values and grid."""
    return read_volume(made.task / "imagesTs" / "blob_006.nii.gz")


def as_dicom(dicom_series: Any, made: Any, folder: Path, **attributes: Any) -> list[Path]:
    """The scan as a series: LPS slices along z."""
    volume = scan(made)
    values = volume.values[0][::-1, ::-1].astype(int) + 1000
    first = volume.grid.to_world(np.array(volume.grid.shape) * (1, 1, 0) - (1, 1, 0)) * (-1, -1, 1)
    return dicom_series(folder, values=values, spacing=volume.grid.spacing, first=first, **attributes)


def test_predict_a_folder_a_zip_and_one_of_several(
    made: Any, medseg: Any, dicom_series: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    paths = as_dicom(dicom_series, made, tmp_path / "scan")
    outcome = medseg("predict", tmp_path / "scan", "-m", made.model, *QUICK)
    assert outcome.status == 0, outcome
    unsaid(outcome, caplog)
    found = read_labels(tmp_path / "scan_seg.nii.gz", LABELS)
    # The same scan from NIfTI, its labels in the same place.
    shutil.copy(made.task / "imagesTs" / "blob_006.nii.gz", tmp_path / "nifti.nii.gz")
    assert medseg("predict", tmp_path / "nifti.nii.gz", "-m", made.model, *QUICK).status == 0
    other = read_labels(tmp_path / "nifti_seg.nii.gz", LABELS)
    assert found.grid.reoriented().matches(other.grid.reoriented(), 1e-3)
    np.testing.assert_array_equal(found.values[::-1, ::-1], other.values)
    record = json.loads((tmp_path / "scan_seg.json").read_text())
    assert record["scan"] == "scan"
    assert not any(secret in json.dumps(record) for secret in SECRETS)

    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        for path in paths:
            packed.write(path, path.name)
    as_dicom(dicom_series, made, tmp_path / "scan" / "more", SeriesNumber=7, SeriesDescription="Late")
    several = medseg("predict", tmp_path / "scan", "-m", made.model, "-o", tmp_path / "o.nii.gz", *QUICK)
    several.refused("there are 2 series", "--series: 1 CT Abdomen", "2 CT Late")
    unsaid(several, caplog)
    chosen = medseg("predict", tmp_path / "scan", "--series", 2, "-m", made.model, "-o", tmp_path / "o.nii.gz", *QUICK)
    assert chosen.status == 0, chosen
    zipped = medseg("predict", tmp_path / "packed.zip", "-m", made.model, *QUICK)
    assert zipped.status == 0, zipped
    for path in (tmp_path / "o.nii.gz", tmp_path / "packed_seg.nii.gz"):
        np.testing.assert_array_equal(read_labels(path, LABELS).values, found.values)
    medseg("predict", tmp_path / "scan", tmp_path / "packed.zip", "--series", 1, "-m", made.model, *QUICK).refused(
        "--series 1"
    )
    medseg("predict", tmp_path / "nifti.nii.gz", "--series", 1, "-m", made.model, *QUICK).refused("is no DICOM series")


def test_predict_says_that_a_tilt_was_straightened(made: Any, medseg: Any, dicom_series: Any, tmp_path: Path) -> None:
    turned = Rotation.from_euler("x", 10, degrees=True).as_matrix()
    dicom_series(
        tmp_path / "tilted",
        shape=(20, 24, 8),
        rows=turned[:, 0],
        columns=turned[:, 1],
        spacing=(1, 1, 2),
        step=(0, 0, 2),
    )
    outcome = medseg("predict", tmp_path / "tilted", "-m", made.model, *QUICK)
    assert outcome.status == 0, outcome
    assert "warning: the gantry was tilted by 10.0 degrees; the slices were resampled" in outcome.out

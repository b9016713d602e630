"""``medseg predict --to``: from DICOM to DICOM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from medseg.core.volume import LabelMap
from medseg.infer import predict as infer
from medseg.infer.stream import Tally
from medseg.io.dicom_seg_read import read_seg
from medseg.io.reference import read_reference
from medseg.io.rtstruct import read_rtstruct


@pytest.fixture
def scan(made: Any, dicom_series: Any, tmp_path: Path) -> Path:
    """A case that the model was trained on, as DICOM with its columns turned round."""
    image = nib.load(made.task / "imagesTr" / "blob_000.nii.gz")
    values = np.asarray(image.dataobj)[::-1, :, :] + 1000
    spacing = [float(n) for n in image.header.get_zooms()]
    dicom_series(
        tmp_path / "case", values=values, spacing=spacing, rows=(1, 0, 0), columns=(0, -1, 0), step=(0, 0, spacing[2]),
        FrameOfReferenceUID="1.2.3.4",
    )  # fmt: skip
    return tmp_path / "case"


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_the_result_is_an_object_of_the_same_study(
    kind: str, made: Any, scan: Path, medseg: Any, tmp_path: Path
) -> None:
    common = (scan, "-m", made.model, "--threads", 1)
    plain = medseg("predict", *common, "-o", tmp_path / "plain.nii.gz")
    assert plain.status == 0, plain
    done = medseg("predict", *common, "--to", kind, "-o", tmp_path / "out")
    assert done.status == 0, done
    path = tmp_path / "out" / "case_seg.dcm"
    source, written = pydicom.dcmread(next(scan.iterdir())), pydicom.dcmread(path)
    assert written.StudyInstanceUID == source.StudyInstanceUID
    assert written.PatientID == source.PatientID
    grid = read_reference(sorted(scan.iterdir())).grid
    read = read_seg(path, onto=grid) if kind == "dicom-seg" else read_rtstruct(path, grid)
    assert np.array_equal(read.label_map.values, np.asarray(nib.load(tmp_path / "plain.nii.gz").dataobj))
    side = (tmp_path / "out" / "case_seg.json").read_text()
    assert json.loads(side)["labels"] == "case_seg.dcm"
    for word in ("Roe", "Richarda", "471199", "19031224", "771177"):
        assert word not in side + done.out + done.err
    # What medseg wrote it may write again.
    assert medseg("predict", *common, "--to", kind, "-o", path).status == 0


def nothing(volume: Any, plan: Any) -> Any:
    zeros = np.zeros(volume.grid.shape, dtype=np.uint8)
    tally = Tally.empty(len(plan.labels) + 1, volume.grid.voxel_volume)
    return infer.Segmentation(LabelMap(zeros, volume.grid, plan.label_set), tally, None)


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_nothing_found_is_written_and_said(
    kind: str, made: Any, scan: Path, medseg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an earlier result that found something."""
    output = tmp_path / "a.dcm"
    common = ("-m", made.model, "--threads", 1, "--to", kind, "-o", output)
    assert medseg("predict", scan, *common).status == 0
    earlier = output.read_bytes()
    monkeypatch.setattr(infer, "segment", lambda engine, volume, plan, *rest, **more: nothing(volume, plan))
    done = medseg("predict", scan, *common)
    assert done.status == 0, done
    assert "review: nothing was found" in done.out
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["warnings"][-1] == "nothing was found"
    assert record["review"]
    assert [organ["voxels"] for organ in record["organs"]] == [0, 0]
    written = pydicom.dcmread(output)
    assert output.read_bytes() != earlier
    if kind == "dicom-seg":
        assert not any(written.PixelData)
    else:
        assert not any("ContourSequence" in region for region in written.ROIContourSequence)


def test_refusals(made: Any, scan: Path, medseg: Any, tmp_path: Path) -> None:
    nifti = made.task / "imagesTr" / "blob_000.nii.gz"
    model = ("-m", made.model)
    done = medseg("predict", nifti, *model, "--to", "dicom-seg", "-o", tmp_path / "out")
    assert done.status == 2
    assert "dicom-seg belongs to a DICOM series, and blob_000.nii.gz is none" in done.err
    medseg("predict", scan, *model, "--to", "rtstruct", "-o", tmp_path / "a.nii.gz").refused("is no name for rtstruct")
    medseg("predict", scan, *model, "-o", tmp_path / "a.dcm").refused("is no name for nifti")
    medseg("predict", made.task, "--held-out", *model, "--to", "rtstruct", "-o", tmp_path / "b").refused(
        "goes with NIfTI"
    )

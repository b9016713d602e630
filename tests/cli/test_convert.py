from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from medseg.io.dicom_seg_read import read_seg
from medseg.io.nifti import read_raw_labels

VALUES = np.arange(7 * 6 * 4).reshape(7, 6, 4)


@pytest.fixture
def scan(dicom_series: Any, tmp_path: Path) -> Path:
    """A flipped series, and a mask on it as another program would save it: with axes along x, y, z."""
    folder = tmp_path / "series"
    rows, columns = (-1, 0, 0), (0, 0.6, -0.8)
    dicom_series(folder, values=VALUES, rows=rows, columns=columns, spacing=(1, 1.5, 3), FrameOfReferenceUID="1.2.3")
    return folder


@pytest.fixture
def mask(scan: Path, medseg: Any, tmp_path: Path) -> Path:
    medseg("convert", scan, "-o", tmp_path / "scan.nii.gz")
    image = nib.load(tmp_path / "scan.nii.gz")
    values = np.zeros(image.shape, dtype=np.uint8)
    values[1:4, 2:5, 1:3] = 1
    values[5, 1:4, 2] = 2
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(values, image.affine)), tmp_path / "mask.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "blob"}}))
    return tmp_path / "mask.nii.gz"


def test_a_series_becomes_nifti(scan: Path, medseg: Any, tmp_path: Path) -> None:
    done = medseg("convert", scan, "-o", tmp_path / "scan.nii.gz")
    assert done.status == 0
    assert "7x6x4 voxels of 1x1.5x3 mm" in done.out
    image = nib.load(tmp_path / "scan.nii.gz")
    assert sorted(np.asarray(image.dataobj).ravel()) == sorted(VALUES.ravel() - 1000)


@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_there_and_back(kind: str, scan: Path, mask: Path, medseg: Any, tmp_path: Path) -> None:
    names = tmp_path / "dataset.json"
    made, back = tmp_path / "a.dcm", tmp_path / "back.nii.gz"
    done = medseg("convert", mask, "-o", made, "--to", kind, "--reference", scan, "--labels", names)
    assert done.status == 0, done
    assert "no SNOMED CT code is known for blob; they got private codes" in done.out
    assert "what made the labels is not stated" in done.out
    again = medseg("convert", made, "-o", back, "--reference", scan)
    assert again.status == 0, again
    assert "1 liver, 2 blob" in again.out
    side = json.loads((tmp_path / "back.json").read_text())
    assert [row["name"] for row in side["labels"]] == ["liver", "blob"]
    assert side["labels"][0]["code"] == "SCT:10200004"
    theirs, ours = nib.load(mask), nib.load(back)
    same = nib.as_closest_canonical(ours)
    assert np.array_equal(np.asarray(same.dataobj), np.asarray(theirs.dataobj))
    assert np.abs(same.affine - theirs.affine).max() < 1e-3
    # And once more: what was read back is written with its own sidecar, as the other kind.
    other = "rtstruct" if kind == "dicom-seg" else "dicom-seg"
    assert medseg("convert", back, "-o", tmp_path / "b.dcm", "--to", other, "--reference", scan).status == 0
    assert medseg("convert", tmp_path / "b.dcm", "-o", tmp_path / "c.nii", "--reference", scan).status == 0
    assert np.array_equal(read_raw_labels(tmp_path / "c.nii")[0], read_raw_labels(back)[0])


def test_options_of_a_seg(scan: Path, mask: Path, medseg: Any, tmp_path: Path) -> None:
    terms = {"format": 1, "terms": [{"names": ["blob"], "code": "99LAB:B1", "meaning": "Blob"}]}
    (tmp_path / "terms.json").write_text(json.dumps(terms))
    made = tmp_path / "a.dcm"
    done = medseg(
        "convert", mask, "-o", made, "--to", "dicom-seg", "--reference", scan, "--labels", tmp_path / "dataset.json",
        "--terms", tmp_path / "terms.json", "--made-by", "TotalSegmentator 2.4", "--label-map",
    )  # fmt: skip
    assert (done.status, done.out) == (0, f"{made}: dicom-seg; 1 liver, 2 blob\n")
    dataset = pydicom.dcmread(made)
    assert dataset.SegmentationType == "LABELMAP"
    said = dataset.SegmentSequence[1].SegmentationAlgorithmIdentificationSequence[0]
    assert (said.AlgorithmName, said.AlgorithmVersion) == ("TotalSegmentator", "2.4")
    assert medseg("convert", made, "-o", tmp_path / "one.nii", "--only", "blob").status == 0
    assert np.unique(read_raw_labels(tmp_path / "one.nii")[0]).tolist() == [0, 2]
    # Without the scan, the grid is that of the frames that are there.
    assert read_seg(made, only=["blob"]).label_map.grid.shape == (7, 6, 2)


def test_an_empty_label_map_makes_an_empty_object(scan: Path, mask: Path, medseg: Any, tmp_path: Path) -> None:
    image = nib.load(mask)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), tmp_path / "empty.nii.gz")
    seg = ("--to", "dicom-seg", "--reference", scan, "--labels", tmp_path / "dataset.json")
    done = medseg("convert", tmp_path / "empty.nii.gz", "-o", tmp_path / "a.dcm", *seg)
    assert done.status == 0, done
    assert "note: the label map is empty, and a.dcm says so" in done.out
    assert medseg("convert", tmp_path / "a.dcm", "-o", tmp_path / "b.nii", "--reference", scan).status == 0
    values, grid = read_raw_labels(tmp_path / "b.nii")
    assert (values.any(), grid.shape) == (False, (7, 6, 4))


def test_refusals(scan: Path, mask: Path, medseg: Any, tmp_path: Path) -> None:
    names = tmp_path / "dataset.json"

    def refused(*arguments: Any, words: str) -> None:
        done = medseg("convert", *arguments)
        done.refused(words)
        for word in ("Roe", "Richarda", "471199", "19031224", "771177"):
            assert word not in done.err + done.out

    seg = ("--to", "dicom-seg", "--labels", names)
    refused(mask, "-o", tmp_path / "a.dcm", words="does not say which format is wanted")
    refused(mask, "-o", tmp_path / "a.nii.gz", *seg, words="is no name for dicom-seg")
    refused(mask, "-o", tmp_path / "a.dcm", *seg, words="belongs to a DICOM series. Name its folder with --reference")
    refused(mask, "-o", tmp_path / "a.nii.gz", "--labels", names, words="is NIfTI already")
    refused(mask, "-o", names, *seg, "--reference", scan, words="is there already")
    refused(mask, "-o", tmp_path / "a.dcm", "--to", "rtstruct", "--reference", scan, words="Name them with --labels")
    refused(scan, "-o", tmp_path / "a.dcm", *seg, words="is a scan and holds no labels")
    refused(tmp_path / "gone", "-o", tmp_path / "a.nii", words="is missing")
    refused(mask, "-o", tmp_path / "a.dcm", *seg, "--reference", scan, "--series", 2, words="there is no series 2")
    moved = nib.load(mask)
    affine = moved.affine.copy()
    affine[2, 3] += 1.5
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj), affine), tmp_path / "moved.nii.gz")
    refused(
        tmp_path / "moved.nii.gz", "-o", tmp_path / "a.dcm", *seg, "--reference", scan, words="corners are 1.5 mm apart"
    )
    assert (
        medseg("convert", mask, "-o", tmp_path / "r.dcm", *seg[2:], "--to", "rtstruct", "--reference", scan).status == 0
    )
    refused(tmp_path / "r.dcm", "-o", tmp_path / "a.nii", words="has contours and no voxels")
    assert not (tmp_path / "a.dcm").exists()
    assert not (tmp_path / "a.nii").exists()

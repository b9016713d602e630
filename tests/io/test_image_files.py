"""One row a file: every NIfTI, NRRD and MetaImage file among the real data, and what it must give.

A file is read to the grid and voxels that nibabel or SimpleITK gives, or is refused for the reason
that is written down here. No file is passed over: one that is not in ``REFUSED`` must be read, and
one that is in it must be there. (nibabel repairs nothing: where a header says two things or none, it
takes one; such files would be refused, and there are none but those below.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.volume import Volume
from medseg.io.itk import is_itk, read_itk_volume
from medseg.io.nifti import is_nifti, read_volume

# What no program should read as a scan, and why not.
REFUSED = {
    # A matrix of connections between grey matter: six dimensions, no space (CIFTI-2, section 2).
    "nifti-awkward/nibabel/row_major.dconn.nii": "dimensions 1x1x1x1x10x10",
    # Resampled beyond its field of view, where NaN stands.
    "nifti-awkward/nibabel/resampled_anat_moved.nii": "153 voxels that are NaN or infinite",
    # A ratio, 0/0 outside the body.
    "sct-spinalcord-mr/mt/mtr.nii.gz": "633 voxels that are NaN or infinite",
}
# Headers without voxels.
BARE = ("nifti-awkward/nibabel/nifti1.hdr", "nifti-awkward/nibabel/nifti2.hdr")
# Shape and spacing of some, from SOURCES.md and the NRRD header's text or nibabel's documentation.
KNOWN = {
    "nifti-awkward/nibabel/functional.nii": ((17, 21, 3), (4.0, 4.0, 8.0)),
    "nifti-awkward/nibabel/standard.nii.gz": ((4, 5, 7), (1.0, 3.0, 2.0)),
    "nrrd-pyradiomics/brain1_image.nrrd": ((256, 256, 25), (0.78125, 0.78125, 6.5)),
    "nrrd-pyradiomics/lung2_label.nrrd": ((512, 512, 61), (0.6269531, 0.6269531, 5.0)),
    "Task04_Hippocampus_odd/labelsTr/hippocampus_281.nii.gz": ((512, 512, 94), (0.734, 0.734, 5.0)),
}
_FLIP = np.diag([-1.0, -1, 1, 1])


def test_every_file_is_read_as_others_read_it_or_refused_for_its_reason(shared_data: Path) -> None:
    paths = {p.relative_to(shared_data).as_posix(): p for p in sorted(shared_data.rglob("*")) if p.is_file()}
    rows = {name: path for name, path in paths.items() if is_nifti(path) or is_itk(path)}
    assert len(rows) > 500
    assert set(REFUSED) | set(KNOWN) <= set(rows)
    wrong = [fault for name, path in rows.items() if (fault := _fault(name, path))]
    assert not wrong, "\n".join(wrong)


def _fault(name: str, path: Path) -> str:
    """What is wrong with how a file is read; nothing, where nothing is."""
    try:
        ours = read_volume(path) if is_nifti(path) else read_itk_volume(path)
    except InputError as error:
        reason = REFUSED.get(name)
        return "" if reason and reason in str(error) else f"{name}: refused: {error}"
    if name in REFUSED:
        return f"{name}: read, though {REFUSED[name]}"
    theirs = _by_nibabel(path) if is_nifti(path) else _by_simpleitk(path)
    if ours.grid.distance(theirs.grid) > 1e-4:
        return f"{name}: {ours.grid}, others: {theirs.grid}"
    if name in KNOWN and (ours.grid.shape, ours.grid.spacing) != (
        KNOWN[name][0],
        pytest.approx(KNOWN[name][1], abs=1e-3),
    ):
        return f"{name}: {ours.grid}, its documents: {KNOWN[name]}"
    if not np.array_equal(ours.values, theirs.values.astype(ours.values.dtype)):
        return f"{name}: other voxels"
    return ""


def _by_nibabel(path: Path) -> Volume:
    image: Any = nib.load(path)
    values = np.asanyarray(image.dataobj)
    shape = values.shape[:3]
    return Volume(np.moveaxis(values.reshape(*shape, -1), -1, 0), Grid(shape, image.affine))


def _by_simpleitk(path: Path) -> Volume:
    image = sitk.ReadImage(str(path))
    assert image.GetNumberOfComponentsPerPixel() == 1
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image).T[None], Grid(image.GetSize(), _FLIP @ affine))


@pytest.mark.parametrize("name", BARE)
def test_bare_headers_are_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"truncated|pair"):
        read_volume(shared_data / name)

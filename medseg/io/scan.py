"""A scan of whatever format: what is there, and one of it as a volume."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.core.errors import InputError
from medseg.core.progress import Progress, silent
from medseg.core.volume import Volume
from medseg.io.files import sha256_of
from medseg.io.itk import is_itk, read_itk_volume
from medseg.io.nifti import is_nifti, read_volume, stem
from medseg.io.sources import Source, find_sources, is_dicom, is_zip

if TYPE_CHECKING:
    from medseg.io.dicom import Series

# Endings that say no more than what the file is; "CT.1.2.3" ends in a part of its name.
_ENDINGS = (".dcm", ".dicom", ".ima", ".zip", ".nrrd", ".nhdr", ".mha", ".mhd", ".gz")


@dataclass(frozen=True)
class ImageFile:
    """A NIfTI, NRRD or MetaImage file: its voxels, spacing in mm and axes ("RAS"), or its problem."""

    name: str
    size: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    axes: str | None = None
    channels: int | None = None
    problem: InputError | None = None


def read_scan(path: Path, series: int | None = None, *, progress: Progress = silent) -> tuple[Volume, tuple[str, ...]]:
    """The volume of a NIfTI, NRRD or MetaImage file, or of a DICOM file, folder or zip, and what to
    know of it.

    ``series`` chooses one of `find_series` by its number. ``progress`` sees the files as they are
    looked at, and then the slices as they are read. Raises InputError where several series
    could be meant, where a file beside the series is too damaged to say whether it belongs to it
    (unless ``series`` chooses all the same), and for all that the readers refuse.
    """
    if _is_image(path):
        if series is not None:
            raise InputError(f"{path.name} is no DICOM series", "Leave out --series")
        return _read_image(path), ()
    from medseg.io.dicom import choose, find_series, read_series  # pydicom, a fifth of a second

    found = find_series(path, progress=progress)
    chosen = choose(found, series)
    damaged = sum(s.slices for s in found if s.kind == "damaged")
    if damaged and series is None:
        raise InputError(
            f"{damaged} files are damaged, and a slice may be lost among them",
            "Copy the series again, or take them away, or choose the series with --series all the same",
        )
    notes = (f"{damaged} damaged files were left out",) if damaged else ()
    return read_series(chosen, progress=progress), (*notes, *chosen.notes)


def look(path: Path, *, progress: Progress = silent) -> tuple[list[Series], list[ImageFile]]:
    """What a file, a folder with all below it or a zip holds: DICOM series by their headers, image
    files by reading them. Raises InputError for what is missing or hostile."""
    images = [p.path for p in find_sources(path) if p.member is None and _is_image(p.path)]
    files = [_image_file(image, path) for image in progress(images, len(images))]
    if files and not holds_dicom(path):
        return [], files
    from medseg.io.dicom import find_series

    return find_series(path, progress=progress), files


def holds_dicom(path: Path) -> bool:
    """Whether a folder has a DICOM file in it or below it, or a file is one or a zip."""
    if path.is_dir():
        return any(_is_dicom(source) for source in find_sources(path))
    return is_zip(path) or not _is_image(path)


def scan_stem(path: Path) -> str:
    """What a scan's results are named after: its file's or folder's name without its ending."""
    if path.is_dir():
        return path.absolute().name
    if is_nifti(path):
        return stem(path)
    return path.stem if path.suffix.lower() in _ENDINGS else path.name


def scan_digest(path: Path) -> str:
    """SHA-256 of a file, or of those of a folder whatever they are called."""
    if path.is_file():
        return sha256_of(path)
    parts = sorted(bytes.fromhex(sha256_of(source.path)) for source in find_sources(path))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _is_dicom(source: Source) -> bool:
    try:
        return is_dicom(source)
    except InputError:
        return True  # whoever reads it says what is wrong


def _is_image(path: Path) -> bool:
    return not path.is_dir() and (is_nifti(path) or is_itk(path))


def _read_image(path: Path) -> Volume:
    return read_volume(path) if is_nifti(path) else read_itk_volume(path)


def _image_file(path: Path, below: Path) -> ImageFile:
    name = path.name if path == below else path.relative_to(below).as_posix()
    try:
        volume = _read_image(path)
    except InputError as error:
        return ImageFile(name, problem=error)
    grid = volume.grid
    return ImageFile(name, grid.shape, grid.spacing, grid.orientation, volume.channels)

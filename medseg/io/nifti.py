"""NIfTI-1 and NIfTI-2 files (.nii, .nii.gz) to volumes and back.

The header is read by nibabel; nothing is allocated before its dimensions agree with the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip, igzip_lib
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import SAME_GRID_MM, Grid
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.io.files import atomic

SUFFIXES = (".nii.gz", ".nii")
_HEADER_BYTES = 540 + 4
_CHUNK = 1 << 20
# isal's type stub takes the second class for an instance of it.
_NOT_SOUND_GZIP: tuple[type[Exception], ...] = (igzip.BadGzipFile, igzip_lib.IsalError)  # type: ignore[assignment]
# Deflate packs no more than 1032 bytes into one, so a small file cannot hold a large image.
_DEFLATE_RATIO = 1032
# Extensions stand between header and voxels; no honest one is this large.
_LARGEST_OFFSET = 1 << 26
# Whole numbers beyond this are no labels (and floats skip some of them).
_LARGEST_LABEL = 1 << 53
_GIVE_ANOTHER = "Copy or export the file again"


def stem(path: Path) -> str:
    """The file's name without .nii or .nii.gz."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def is_nifti(path: Path) -> bool:
    """Whether the name says NIfTI (macOS's ``._`` companions are none)."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def read_volume(path: Path) -> Volume:
    """Intensities (C, X, Y, Z) as stored, scaled where the header says so, on the file's grid.

    The fourth dimension of a NIfTI file is taken as channels. Raises InputError for a file that is
    missing, empty, truncated, corrupt, not NIfTI, not 3-D or 4-D, complex or coloured, not in
    millimetres, or whose sform and qform disagree, and for voxels that are NaN or infinite.
    """
    values, grid = _read(path)
    if np.issubdtype(values.dtype, np.floating):
        bad = int(values.size - np.count_nonzero(np.isfinite(values)))
        if bad:
            raise InputError(
                f"{path.name} has {bad} voxels that are NaN or infinite",
                "Find out what they stand for and replace them",
            )
    return Volume(values, grid)


def read_labels(path: Path, labels: LabelSet) -> LabelMap:
    """Labels (X, Y, Z) on the file's grid, as the smallest unsigned type that holds them.

    Raises InputError as `read_volume` does, and for values that are not whole numbers or that
    ``labels`` does not list.
    """
    values, grid = read_raw_labels(path)
    known = np.array([0, *labels.numbers])
    strange = np.setdiff1d(np.unique(values), known)
    if len(strange):
        raise InputError(
            f"{path.name} has the value {', '.join(str(v) for v in strange[:5])}, which is not listed",
            f"Correct the labels or add it to dataset.json (known: 0 background, {labels})",
        )
    return LabelMap(values.astype(np.min_scalar_type(known.max())), grid, labels)


def read_raw_labels(path: Path) -> tuple[NDArray[Any], Grid]:
    """The integers (X, Y, Z) of a label file and its grid, whatever the values mean."""
    values, grid = _read(path)
    if len(values) != 1:
        raise InputError(f"{path.name} has {len(values)} channels", "A label map has one value per voxel")
    return whole_numbers(values[0], path.name), grid


def whole_numbers(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Integers from a label array of any type; InputError where a value is none."""
    if np.issubdtype(values.dtype, np.integer):
        return values
    if not (np.isfinite(values).all() and (values == np.rint(values)).all() and np.abs(values).max() < _LARGEST_LABEL):
        raise InputError(f"{name} has label values that are not whole numbers", "Save the labels as integers")
    return values.astype(np.int64)


def write_labels(path: Path, label_map: LabelMap) -> None:
    """Write labels as NIfTI-1 with sform and qform, compressed where the name ends in .gz.

    The same labels give the same bytes. Atomic.
    """
    _write(path, label_map.values, label_map.grid)


def write_volume(path: Path, volume: Volume) -> None:
    """Write intensities as NIfTI-1, channels last as NIfTI has them. Atomic, as `write_labels`."""
    values = volume.values[0] if volume.channels == 1 else np.moveaxis(volume.values, 0, -1)
    _write(path, values, volume.grid)


def _write(path: Path, values: NDArray[Any], grid: Grid) -> None:
    if values.dtype in (np.int64, np.uint64):
        raise TypeError(f"NIfTI readers disagree on {values.dtype}; convert to a smaller type first")
    image = nib.Nifti1Image(values, grid.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(grid.affine, code=1)
    image.set_qform(grid.affine, code=1, strip_shears=True)
    data = image.to_bytes()
    with atomic(path) as file:
        file.write(igzip.compress(data, 1, mtime=0) if path.name.endswith(".gz") else data)


def _read(path: Path) -> tuple[NDArray[Any], Grid]:
    """Values (C, X, Y, Z) and grid."""
    data = _bytes(path)
    header = _header(data, path.name)
    shape, dtype, offset = _layout(header, path.name)
    grid = _grid(header, shape[:3], path.name)
    raw = np.frombuffer(data, dtype=dtype, count=int(np.prod(shape)), offset=offset).reshape(shape, order="F")
    values = np.moveaxis(raw, 3, 0)
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise InputError(f"{path.name} has an invalid scaling ({error})", _GIVE_ANOTHER) from None
    if slope not in (None, 1.0) or intercept not in (None, 0.0):
        with np.errstate(over="ignore"):  # infinite values are reported by whoever asked for them
            return np.asarray(values * np.float64(slope or 1) + np.float64(intercept or 0), dtype=np.float32), grid
    return values.astype(dtype.newbyteorder("="), copy=False), grid


def _bytes(path: Path) -> bytearray:
    """The header and as many bytes as it declares, and no more, so that a gzip bomb stops there."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic = file.read(2)
            file.seek(0)
            if not magic:
                raise InputError(f"{path.name} is empty", _GIVE_ANOTHER)
            if magic != b"\x1f\x8b":
                return _declared(file, size, path.name)
            with igzip.open(file, "rb") as stream:
                data = _declared(stream, size * _DEFLATE_RATIO, path.name)
                stream.read(1)  # at the end of the stream: its checksum is looked at here
                return data
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing", "Put the file in its place or take the case off the list") from None
    except EOFError:
        raise InputError(f"{path.name} is truncated: its gzip stream breaks off", _GIVE_ANOTHER) from None
    except _NOT_SOUND_GZIP as error:
        raise InputError(f"{path.name} is not sound gzip ({error})", _GIVE_ANOTHER) from None
    except (MemoryError, OverflowError):
        raise InputError(f"{path.name} is larger than memory", "Use a machine with more memory") from None
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror or error})", _GIVE_ANOTHER) from None


def _declared(stream: BinaryIO, most: int, name: str) -> bytearray:
    """Read what the header declares; ``most`` is the number of bytes that there can be."""
    data = bytearray(stream.read(_HEADER_BYTES))
    shape, dtype, offset = _layout(_header(data, name), name)
    wanted = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if wanted > most:
        raise InputError(
            f"{name} is truncated: its header promises {wanted} bytes, the file holds {most} at most", _GIVE_ANOTHER
        )
    while len(data) < wanted:
        chunk = stream.read(min(wanted - len(data), _CHUNK))
        if not chunk:
            raise InputError(
                f"{name} is truncated: its header promises {wanted} bytes, the file has {len(data)}", _GIVE_ANOTHER
            )
        data += chunk
    return data


def _header(data: bytearray, name: str) -> Any:
    kinds = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    for order in ("<", ">"):
        size = int(np.frombuffer(data[:4].ljust(4, b"\0"), dtype=f"{order}i4")[0])
        if size in kinds and len(data) >= size:
            header = kinds[size](bytes(data[:size]), endianness=order, check=False)
            magic = bytes(header["magic"])[:2]
            if magic == b"ni":
                raise InputError(f"{name} is one half of a .hdr/.img pair", "Convert the pair to .nii.gz first")
            if magic == b"n+":
                return header
    raise InputError(f"{name} is not a NIfTI file", "Convert it to .nii.gz first")


def _layout(header: Any, name: str) -> tuple[tuple[int, int, int, int], np.dtype[Any], int]:
    """Shape (X, Y, Z, C), dtype and offset of the voxels; refuses what is no plain image."""
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise InputError(f"{name} has an unknown data type ({error})", _GIVE_ANOTHER) from None
    if dtype.kind not in "iuf":
        raise InputError(f"{name} holds {dtype} voxels", "Only integer and float images are read")
    axes = int(header["dim"][0])
    if not 1 <= axes <= 7:
        raise InputError(f"{name} has {axes} dimensions", "Only 3-D images and 4-D images with channels are read")
    dims = [int(n) for n in header["dim"][1 : 1 + axes]]
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if not 3 <= len(dims) <= 4 or min(dims) < 1:
        size = "x".join(str(n) for n in dims)
        raise InputError(f"{name} has the dimensions {size}", "Only 3-D images and 4-D images with channels are read")
    shape = (dims[0], dims[1], dims[2], dims[3] if len(dims) == 4 else 1)
    least = 352 if header["sizeof_hdr"] == 348 else 544
    offset = float(header["vox_offset"])
    if not (offset == 0 or least <= offset <= _LARGEST_OFFSET):
        raise InputError(f"{name} has its voxels at byte {offset:g}", _GIVE_ANOTHER)
    return shape, dtype, int(offset) or least


def _grid(header: Any, shape: tuple[int, int, int], name: str) -> Grid:
    """From sform or qform; both are read, and a conflict between them is refused."""
    unit = {1: "metres", 3: "micrometres"}.get(int(header["xyzt_units"]) & 7)
    if unit:
        raise InputError(f"{name} measures in {unit}", "Write its affine in millimetres")
    try:
        with np.errstate(all="ignore"):  # Grid looks at the numbers
            sform = header.get_sform() if int(header["sform_code"]) > 0 else None
            qform = header.get_qform() if int(header["qform_code"]) > 0 else None
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        raise InputError(f"{name} has an invalid orientation ({error})", _GIVE_ANOTHER) from None
    affine = sform if sform is not None else qform
    if affine is None:
        raise InputError(
            f"{name} does not say where its voxels are (sform and qform codes are 0)",
            "Set its sform from the original scan",
        )
    try:
        grid = Grid(shape, affine)
        other = grid if qform is None else Grid(shape, qform)
    except InputError as error:
        raise InputError(f"in {name} {error.fault}", error.remedy) from None
    if sform is not None and qform is not None:
        distance = grid.distance(other)
        if distance > max(SAME_GRID_MM, 0.1 * min(grid.spacing)) and not _sheared(grid):
            raise InputError(
                f"sform and qform of {name} disagree by up to {distance:.3g} mm",
                "Find out which is right and write it into both",
            )
    return grid


def _sheared(grid: Grid) -> bool:
    """A qform cannot hold shear, so that the two differ by rights."""
    return bool(np.abs(grid.direction.T @ grid.direction - np.eye(3)).max() > 1e-3)

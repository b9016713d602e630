"""NIfTI-1 and NIfTI-2 files (.nii, .nii.gz) to volumes and back.

The header is read by nibabel; nothing is allocated before its dimensions agree with the file.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip, igzip_lib
from numpy.typing import NDArray

from medseg.core.alone import import_alone
from medseg.core.errors import InputError, MedsegError
from medseg.core.grid import SAME_GRID_MM, Grid
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.core.words import count
from medseg.io.files import atomic

# For DICOM headers within NIfTI ones it would take pydicom along, which takes longer than all the rest.
nib = import_alone("nibabel", "pydicom")
HeaderDataError = nib.spatialimages.HeaderDataError
SUFFIXES = (".nii.gz", ".nii")
_HEADER_BYTES = 540 + 4
_CHUNK = 1 << 20
# Voxels treated at one time, where a whole image's worth of temporaries would be too many.
_AT_ONCE = 1 << 22
# isal's type stub takes the second class for an instance of it.
_NOT_SOUND_GZIP: tuple[type[Exception], ...] = (igzip.BadGzipFile, igzip_lib.IsalError)  # type: ignore[assignment]
# Deflate packs no more than 1032 bytes into one, so a small file cannot hold a large image.
_DEFLATE_RATIO = 1032
# Extensions stand between header and voxels; no honest one is this large.
_LARGEST_OFFSET = 1 << 26
# Whole numbers beyond this are no labels (and floats skip some of them).
_LARGEST_LABEL = 1 << 53
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
# Dimensions are 16 bits in NIfTI-1, 64 in NIfTI-2.
_LONGEST_AXIS = 32767
# A qform holds three numbers of a unit quaternion in float32, and the fourth is what remains of 1:
# where it is near 0, so much rounding of its square (three times float32's, as in nibabel) is much
# of itself.
_QUATERNION_ROUNDING = 3.6e-7
# Smaller images are turned as they are; larger ones with so many voxels between the rows.
_TURNED_AT_ONCE = 1 << 16
_PADDING = 64
_STEPS = 65535
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
    millimetres, or whose sform and qform disagree, and for voxels that are NaN, infinite or beyond
    float32. Takes little more memory than the image, or 1.5 times it where 16 bits are scaled.
    """
    values, grid = _read(path)
    require_finite(values, path.name)
    return Volume(values, grid)


def require_finite(values: NDArray[Any], name: str) -> None:
    """InputError, with their number, where voxels (C, X, Y, Z) are NaN or infinite, or would be in
    float32, in which everything is computed."""
    if not np.issubdtype(values.dtype, np.floating):
        return
    strange = beyond = 0
    for part in _parts(values):
        finite = np.isfinite(part)
        strange += part.size - int(np.count_nonzero(finite))
        if values.dtype.itemsize > 4:
            beyond += int(np.count_nonzero(finite & (np.abs(part) > _LARGEST_FLOAT)))
    for voxels, what in ((strange, "NaN or infinite"), (beyond, "too large for float32")):
        if voxels:
            raise InputError(
                f"{name} has {count(voxels, 'voxel')} that {'is' if voxels == 1 else 'are'} {what}",
                "Find out what they stand for and replace them",
            )


def _slices(voxels: int) -> int:
    """How many slices of so many voxels are treated at one time."""
    return max(1, min(32, _AT_ONCE // voxels))


def _parts(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Views of an image (C, X, Y, Z), some slices at a time."""
    slices = _slices(values.shape[1] * values.shape[2])
    for channel in values:
        for first in range(0, values.shape[3], slices):
            yield channel[:, :, first : first + slices]


def read_labels(path: Path, labels: LabelSet) -> LabelMap:
    """Labels (X, Y, Z) on the file's grid, as the smallest unsigned type that holds them.

    Raises InputError as `read_volume` does, and for values that are not whole numbers or that
    ``labels`` does not list.
    """
    values, grid = read_raw_labels(path)
    return listed(values, grid, labels, path.name)


def listed(values: NDArray[Any], grid: Grid, labels: LabelSet, name: str) -> LabelMap:
    """Integers (X, Y, Z) as a label map of the smallest unsigned type; InputError where ``labels``
    does not list one of them."""
    known = np.array([0, *labels.numbers])
    found: set[int] = set()
    for part in _parts(values[None]):
        found.update(np.unique(part).tolist())
    strange = sorted(found - set(known.tolist()))
    if strange:
        raise InputError(
            f"{name} has the value {', '.join(str(v) for v in strange[:5])}, which is not listed",
            f"Correct the labels or add it to dataset.json (known: 0 background, {labels})",
        )
    return LabelMap(values.astype(np.min_scalar_type(known.max()), copy=False), grid, labels)


def read_raw_labels(path: Path) -> tuple[NDArray[Any], Grid]:
    """The integers (X, Y, Z) of a label file and its grid, whatever the values mean."""
    values, grid = _read(path)
    if len(values) != 1:
        raise InputError(f"{path.name} has {count(len(values), 'channel')}", "A label map has one value per voxel")
    return whole_numbers(values[0], path.name), grid


def whole_numbers(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Integers from a label array of any type; InputError where a value is none."""
    if np.issubdtype(values.dtype, np.integer):
        return values
    largest = 0.0
    for part in _parts(values.reshape(1, *values.shape)):
        if not np.isfinite(part).all() or (part != np.rint(part)).any() or np.abs(part).max() >= _LARGEST_LABEL:
            raise InputError(f"{name} has label values that are not whole numbers", "Save the labels as integers")
        largest = max(largest, float(np.abs(part).max()))
    return values.astype(np.int32 if largest < 1 << 31 else np.int64)


def write_labels(path: Path, label_map: LabelMap) -> None:
    """Write labels as NIfTI-1 with sform and qform (NIfTI-2 where an axis is longer than 32767
    voxels), compressed where the name ends in .gz.

    The same labels give the same bytes. Atomic.
    """
    _write(path, label_map.values[None], label_map.grid)


def write_volume(path: Path, volume: Volume) -> None:
    """Write intensities, channels last as NIfTI has them. Otherwise as `write_labels`."""
    _write(path, volume.values, volume.grid)


def packed(volume: Volume) -> bytes:
    """Intensities as the bytes of a compressed NIfTI file."""
    file = io.BytesIO()
    with igzip.IGzipFile("", "wb", 3, file, mtime=0) as stream:
        _write_to(stream, _header_of(volume.values, volume.grid, 1.0), volume.values)
    return file.getvalue()


def write_shares(path: Path, values: NDArray[np.floating], grid: Grid) -> None:
    """Write numbers from 0 to 1 (X, Y, Z) in steps of 1/65535, in half the space of floats. Otherwise
    as `write_labels`."""
    _write(path, (values * _STEPS + 0.5).astype(np.uint16)[None], grid, 1 / _STEPS)


class ShareFile:
    """Probabilities (classes, X, Y, Z) in steps of 1/65535, put down box by box, in any order and from
    any thread, and written as a NIfTI file with classes last when the block ends without an error.

    They wait on the disk beside the file, not in memory. Raises MedsegError where the disk is full.
    """

    def __init__(self, path: Path, classes: int, grid: Grid) -> None:
        self._path, self._grid = path, grid
        self._shape = (classes, *grid.shape[::-1])
        self._scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}.raw")

    def __enter__(self) -> ShareFile:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._scratch.open("xb+") as file:
                self._scratch.unlink()  # it is gone with this process, however that ends
                # A page that the disk has no room for would end the process later.
                os.posix_fallocate(file.fileno(), 0, 2 * int(np.prod(self._shape)))
                self._values = np.memmap(file, np.uint16, "r+", shape=self._shape).transpose(0, 3, 2, 1)
        except OSError as error:
            raise MedsegError(
                f"cannot write {self._path}: {error.strerror or error}. Free some space, or keep fewer structures."
            ) from error
        self._values[0] = _STEPS  # where nothing is put there is background
        return self

    def put(self, box: tuple[slice, slice, slice], shares: NDArray[np.float32]) -> None:
        """Shares (classes, x, y, z), 0 to 1, of a box."""
        self._values[(slice(None), *box)] = shares * np.float32(_STEPS) + np.float32(0.5)

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                _write(self._path, self._values, self._grid, 1 / _STEPS)
        finally:
            del self._values


def _write(path: Path, values: NDArray[Any], grid: Grid, slope: float = 1.0) -> None:
    """Values (C, X, Y, Z), a few slices at a time, so that no second image is held. Whoever reads
    them multiplies them by ``slope``."""
    if values.dtype in (np.int64, np.uint64):
        raise TypeError(f"NIfTI readers disagree on {values.dtype}; convert to a smaller type first")
    header = _header_of(values, grid, slope)
    with atomic(path) as file:
        if path.name.endswith(".gz"):
            # Neither name nor time, so that the same image gives the same bytes.
            with igzip.IGzipFile("", "wb", 1, file, mtime=0) as packed:
                _write_to(packed, header, values)
        else:
            _write_to(file, header, values)


def _header_of(values: NDArray[Any], grid: Grid, slope: float) -> bytes:
    kind = nib.Nifti2Header if max(values.shape) > _LONGEST_AXIS else nib.Nifti1Header
    header = kind(endianness="<")
    header.set_data_dtype(values.dtype)
    header.set_data_shape(grid.shape if len(values) == 1 else (*grid.shape, len(values)))
    header.set_xyzt_units("mm")
    header.set_sform(grid.affine, code=1)
    header.set_qform(grid.affine, code=1, strip_shears=True)
    header.set_slope_inter(slope, 0)
    # No extensions: four zeros stand between header and voxels.
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4
    return bytes(header.binaryblock) + bytes(4)


def _write_to(file: Any, header: bytes, values: NDArray[Any]) -> None:
    file.write(header)
    dtype = values.dtype.newbyteorder("<")
    for channel in values:
        if channel.flags.c_contiguous and channel.size > _TURNED_AT_ONCE:
            parts = turned(channel)
        else:
            parts = (part.ravel(order="F") for part in _parts(channel[None]))
        for part in parts:
            file.write(part.astype(dtype, copy=False).data)


def turned(channel: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """An image (X, Y, Z) whose z varies fastest, as (Z, Y, X), some slices at a time.

    Read straight across, the voxels of a row lie some power of two apart and push each other out of
    the processor's cache, which takes six times as long as this does by way of a copy in which they
    lie otherwise. What is zero all around, as in most label maps, is left out.
    """
    x, y, z = channel.shape
    slices = _slices(x * y)
    filled_x = _span(np.asarray(channel.any(axis=(1, 2))))
    filled_y = np.asarray(channel.any(axis=0))
    for first in range(0, z, slices):
        part = channel[:, :, first : first + slices]
        out = np.zeros((part.shape[2], y, x), dtype=channel.dtype)
        where = (filled_x, _span(np.asarray(filled_y[:, first : first + slices].any(axis=1))))
        box = part[where]
        if box.size:
            row = box.shape[1] * box.shape[2]
            loose = np.empty((box.shape[0], row + _PADDING), dtype=channel.dtype)[:, :row].reshape(box.shape)
            loose[...] = box
            out[:, where[1], where[0]] = loose.transpose(2, 1, 0)
        yield out


def _span(filled: NDArray[np.bool_]) -> slice:
    """From the first to the last that is true."""
    hit = np.flatnonzero(filled)
    return slice(int(hit[0]), int(hit[-1]) + 1) if len(hit) else slice(0, 0)


def _read(path: Path) -> tuple[NDArray[Any], Grid]:
    """Values (C, X, Y, Z) and grid."""
    data = _bytes(path)
    header = _header(data, path.name)
    shape, dtype, offset = _layout(header, path.name)
    grid = _grid(header, shape[:3], path.name)
    raw = np.frombuffer(data, dtype=dtype, count=int(np.prod(shape)), offset=offset)
    if not dtype.isnative:
        raw = raw.byteswap(inplace=True).view(dtype.newbyteorder("="))
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise InputError(f"{path.name} has an invalid scaling ({error})", _GIVE_ANOTHER) from None
    if slope not in (None, 1.0) or intercept not in (None, 0.0):
        raw = _scaled(raw, float(slope or 1), float(intercept or 0))
    return np.moveaxis(raw.reshape(shape, order="F"), 3, 0), grid


def _scaled(raw: NDArray[Any], slope: float, intercept: float) -> NDArray[np.float32]:
    """Voxels (n,) computed in double precision, some at a time, and kept in single, in their own
    place where they are no smaller."""
    count = len(raw)
    out = raw.view(np.float32)[:count] if raw.itemsize >= 4 else np.empty(count, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever asked for the values counts what is infinite
        for first in range(0, count, _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            # A result ends no later than the voxel it comes from, so that none is lost.
            out[part] = raw[part] * np.float64(slope) + np.float64(intercept)
    return out


def _bytes(path: Path) -> NDArray[np.uint8]:
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
        raise InputError(f"{path} is missing", "Name a file that is there") from None
    except EOFError:
        raise InputError(f"{path.name} is truncated: its gzip stream breaks off", _GIVE_ANOTHER) from None
    except _NOT_SOUND_GZIP as error:
        raise InputError(f"{path.name} is not sound gzip ({error})", _GIVE_ANOTHER) from None
    except (MemoryError, OverflowError):
        raise InputError(f"{path.name} is larger than memory", "Use a machine with more memory") from None
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror or error})", _GIVE_ANOTHER) from None


def _declared(stream: BufferedIOBase, most: int, name: str) -> NDArray[np.uint8]:
    """Read what the header declares; ``most`` is the number of bytes that there can be."""
    start = np.frombuffer(stream.read(_HEADER_BYTES), dtype=np.uint8)
    shape, dtype, offset = _layout(_header(start, name), name)
    wanted = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if wanted > most:
        raise InputError(
            f"{name} is truncated: its header promises {wanted} bytes, the file holds {most} at most", _GIVE_ANOTHER
        )
    # Pages that are not written to take no memory, so that a promise costs nothing until it is kept.
    data = np.empty(wanted, dtype=np.uint8)
    filled = min(len(start), wanted)
    data[:filled] = start[:filled]
    while filled < wanted:
        count = stream.readinto(data[filled : filled + _CHUNK].data)
        if not count:
            raise InputError(
                f"{name} is truncated: its header promises {wanted} bytes, the file has {filled}", _GIVE_ANOTHER
            )
        filled += count
    return data


def _header(data: NDArray[np.uint8], name: str) -> Any:
    kinds = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    for order in ("<", ">"):
        size = int(np.frombuffer(data[:4].tobytes().ljust(4, b"\0"), dtype=f"{order}i4")[0])
        if size in kinds and len(data) >= size:
            header = kinds[size](data[:size].tobytes(), endianness=order, check=False)
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
        # The first voxel's position is written out in both, and nothing excuses another.
        apart = float(np.linalg.norm(grid.origin - other.origin))
        if apart > SAME_GRID_MM or distance > SAME_GRID_MM + _leeway(header, grid):
            raise InputError(
                f"sform and qform of {name} disagree by up to {distance:.3g} mm (sform: {grid}; qform: {other})",
                "Find out which is right and write it into both",
            )
    return grid


def _leeway(header: Any, grid: Grid) -> float:
    """How far (mm) a qform may stray from this grid of the sform for want of anything better: it
    cannot hold shear, and its quaternion is rounded."""
    left, _, right = np.linalg.svd(grid.direction)
    unsheared = Grid.from_spacing(grid.shape, grid.spacing, grid.origin, left @ right)
    quaternion = np.array([header[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
    square = max(0.0, 1 - float(quaternion @ quaternion))
    angle = 2 * (np.sqrt(square + _QUATERNION_ROUNDING) - np.sqrt(max(0.0, square - _QUATERNION_ROUNDING)))
    reach = float(np.linalg.norm(grid.corners() - grid.origin, axis=1).max())
    # Programs straighten shear in several ways, none of which goes to the other side of it.
    return 2 * grid.distance(unsheared) + float(angle) * reach

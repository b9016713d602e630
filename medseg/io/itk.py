"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd) files to volumes.

SimpleITK reads them, in a process of its own with limits on memory and time: its readers have had
heap overflows. The header is read here first, so that nothing is allocated before its sizes agree
with the file, no file outside the folder is opened, and SimpleITK's word on where the voxels are can
be compared with the file's.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from medseg.core.errors import InputError, MedsegError
from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.io.nifti import listed, require_finite, whole_numbers

SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
_CHILD = Path(__file__).with_name("itk_child.py")
_LONGEST_HEADER = 1 << 16
_CHUNK = 1 << 20
# Deflate packs no more than 1032 bytes into one.
_DEFLATE_RATIO = 1032
# Beyond three times the voxels (read, unpacked, turned) and the file.
_SPARE_MEMORY = 1 << 28
# isal's type stub takes the class for an instance of it.
_NOT_SOUND: type[Exception] = isal_zlib.error  # type: ignore[assignment]
_BASE_SECONDS = 60
_SLOWEST = 5_000_000  # bytes a second
_GIVE_ANOTHER = "Copy or export the file again"
_CONVERT = "Convert it to .nii.gz with the program that wrote it"

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_NRRD_SPACES = {
    "left-posterior-superior": _LPS_TO_RAS,
    "lps": _LPS_TO_RAS,
    "right-anterior-superior": np.eye(3),
    "ras": np.eye(3),
    "left-anterior-superior": np.diag([-1.0, 1.0, 1.0]),
    "las": np.diag([-1.0, 1.0, 1.0]),
}
_NRRD_TYPES = {
    name: dtype
    for dtype, names in {
        "i1": "signed char,int8,int8_t",
        "u1": "uchar,unsigned char,uint8,uint8_t",
        "i2": "short,short int,signed short,signed short int,int16,int16_t",
        "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
        "i4": "int,signed int,int32,int32_t",
        "u4": "uint,unsigned int,uint32,uint32_t",
        "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
        "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(",")
}
_NRRD_PACKINGS = {"raw": "raw", "gzip": "deflate", "gz": "deflate", "text": "text", "txt": "text", "ascii": "text"}
_NRRD_CHANNELS = ("list", "vector", "2-vector", "3-vector", "4-vector", "none", "???")
_META_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


@dataclass(frozen=True)
class _Header:
    """What a file says of itself: voxels (X, Y, Z) of ``channels`` numbers each, where they are
    (RAS+), the file that holds them from byte ``offset`` on, and how they are packed."""

    grid: Grid
    channels: int
    dtype: np.dtype[Any]
    data: Path
    offset: int
    packing: str

    @property
    def bytes(self) -> int:
        return math.prod(self.grid.shape) * self.channels * self.dtype.itemsize


def is_itk(path: Path) -> bool:
    """Whether the name says NRRD or MetaImage."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def read_itk_volume(path: Path) -> Volume:
    """Intensities (C, X, Y, Z) as stored, on the file's grid in RAS+; a vector's numbers are channels.

    Raises InputError for a file that is missing, truncated, corrupt, of another dimension than
    three, without orientation, not in millimetres, spread over several files or pointing out of its
    folder, whose reader crashes or takes too long, and for voxels as `nifti.read_volume` does;
    MedsegError where memory does not suffice. Two processes hold the image for a moment.
    """
    values, grid = _read(path)
    require_finite(values, path.name)
    return Volume(values, grid)


def read_itk_labels(path: Path, labels: LabelSet) -> LabelMap:
    """Labels (X, Y, Z) on the file's grid, as the smallest unsigned type that holds them.

    Raises InputError as `read_itk_volume` does, and for values that are not whole numbers or that
    ``labels`` does not list.
    """
    values, grid = _read(path)
    if len(values) != 1:
        raise InputError(f"{path.name} has {len(values)} channels", "A label map has one value per voxel")
    return listed(whole_numbers(values[0], path.name), grid, labels, path.name)


def _read(path: Path) -> tuple[NDArray[Any], Grid]:
    """Values (C, X, Y, Z) and grid."""
    try:
        header = _header(path)
        _require_enough(header, path.name)
    except OSError as error:
        raise InputError(f"{path.name} cannot be read ({error.strerror or error})", _GIVE_ANOTHER) from None
    size = header.bytes
    descriptor = os.memfd_create("volume")
    try:
        os.ftruncate(descriptor, size)
        answer = _in_child(path, header, descriptor)
        values = _values(descriptor, size, answer, header, path.name)
    finally:
        os.close(descriptor)
    return values, _agreed(answer, header.grid, path.name)


def _in_child(path: Path, header: _Header, descriptor: int) -> dict[str, Any]:
    """SimpleITK's answer, from a process that may do no harm."""
    size, name = header.bytes, path.name
    memory = 3 * size + header.data.stat().st_size + _SPARE_MEMORY
    seconds = _BASE_SECONDS + size // _SLOWEST
    kind = "NrrdImageIO" if _is_nrrd(path) else "MetaImageIO"
    numbers = [str(n) for n in (descriptor, size, memory, seconds)]
    try:
        # -P: what lies beside the child is no module of its own.
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-P", str(_CHILD), kind, str(path.absolute()), *numbers],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=2 * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"reading {name} took more than {2 * seconds} s and was stopped", _CONVERT) from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise InputError(f"reading {name} took more than {seconds} s or all memory and was stopped", _CONVERT)
    if done.returncode < 0:
        word = signal.Signals(-done.returncode).name
        raise InputError(f"{name} crashes its reader ({word})", f"Take care where it comes from. {_GIVE_ANOTHER}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise MedsegError(f"the reader of {name} failed (exit status {done.returncode}). Is SimpleITK sound?") from None
    if answer.get("error") == "memory":
        raise MedsegError(f"{name} needs more memory than there is, or than its header lets expect")
    if "error" in answer:
        raise InputError(f"{name} cannot be read by SimpleITK: truncated, or not what its header says", _GIVE_ANOTHER)
    return answer


def _values(descriptor: int, size: int, answer: dict[str, Any], header: _Header, name: str) -> NDArray[Any]:
    x, y, z = header.grid.shape
    if (list(answer["size"]), answer["channels"]) != ([x, y, z], header.channels):
        raise InputError(f"{name}: SimpleITK finds other dimensions than its header says", _CONVERT)
    dtype = np.dtype(answer["dtype"])
    if (dtype.kind, dtype.itemsize) != (header.dtype.kind, header.dtype.itemsize):
        raise InputError(f"{name}: SimpleITK finds another data type than its header says", _CONVERT)
    flat = np.frombuffer(mmap.mmap(descriptor, size), dtype=dtype)
    return flat.reshape(z, y, x, header.channels).transpose(3, 2, 1, 0)


def _agreed(answer: dict[str, Any], grid: Grid, name: str) -> Grid:
    """The header's grid, where SimpleITK, which thinks in LPS, sees the same one."""
    direction = _LPS_TO_RAS @ np.reshape(answer["direction"], (3, 3))
    theirs = Grid.from_spacing(grid.shape, answer["spacing"], _LPS_TO_RAS @ answer["origin"], direction)
    if not grid.matches(theirs):
        raise InputError(
            f"{name}: SimpleITK puts voxels {grid.distance(theirs):.3g} mm from where the header does "
            f"(header: {grid}; SimpleITK: {theirs})",
            _CONVERT,
        )
    return grid


def _require_enough(header: _Header, name: str) -> None:
    """InputError where the data file cannot hold what the header promises."""
    held = header.data.stat().st_size - header.offset
    most = {"raw": held, "deflate": held * _DEFLATE_RATIO, "text": (held + 1) // 2 * header.dtype.itemsize}
    if header.bytes > most[header.packing]:
        raise InputError(
            f"{name} is truncated: its header promises {header.bytes} bytes, "
            f"the file holds {max(most[header.packing], 0)} at most",
            _GIVE_ANOTHER,
        )
    if header.packing == "deflate" and not _is_whole(header):
        raise InputError(f"{name} is damaged: its voxels do not unpack to what its header promises", _GIVE_ANOTHER)


def _is_whole(header: _Header) -> bool:
    """Whether the packed voxels come to what the header promises, their checksum included. SimpleITK
    gives the voxels of a broken .mha without a word."""
    left = header.bytes
    with header.data.open("rb") as file:
        file.seek(header.offset)
        packed = file.read(_CHUNK)
        gzip = packed.startswith(b"\x1f\x8b")
        stream = isal_zlib.decompressobj(31 if gzip else 15)
        try:
            while packed and not stream.eof:
                left -= len(stream.decompress(packed, _CHUNK))
                if left < 0:
                    return False
                packed = stream.unconsumed_tail or file.read(_CHUNK)
        except _NOT_SOUND:
            return False
    return left == 0 and bool(stream.eof)


# ---- headers ------------------------------------------------------------------------------------


def _is_nrrd(path: Path) -> bool:
    return path.name.lower().endswith((".nrrd", ".nhdr"))


def _header(path: Path) -> _Header:
    if not path.exists():
        raise InputError(f"{path} is missing", "Name a file that is there")
    if not path.is_file():
        raise InputError(f"{path.name} is no file", "Name a file")
    with path.open("rb") as file:
        start = file.read(_LONGEST_HEADER)
    if not start:
        raise InputError(f"{path.name} is empty", _GIVE_ANOTHER)
    try:
        return _nrrd(path, start) if _is_nrrd(path) else _meta(path, start)
    except InputError as error:
        raise error if path.name in error.fault else InputError(f"{path.name}: {error.fault}", error.remedy) from None
    except ValueError as error:
        raise InputError(f"{path.name} has an unsound header ({error})", _GIVE_ANOTHER) from None


def _nrrd(path: Path, start: bytes) -> _Header:
    """teem.sourceforge.net/nrrd/format.html"""
    if not start.startswith(b"NRRD000"):
        raise InputError("not a NRRD file", _CONVERT)
    end = re.search(rb"\r?\n\r?\n", start)
    if end is None and len(start) == _LONGEST_HEADER:
        raise ValueError("it does not end")
    fields = _fields(start[: end.start() if end else None].decode("latin-1").splitlines()[1:], ": ")
    dtype = np.dtype(_known(_NRRD_TYPES, _get(fields, "type").lower(), "the type"))
    packing = _known(_NRRD_PACKINGS, _get(fields, "encoding").lower(), "the encoding")
    sizes = [_count(n) for n in _get(fields, "sizes").split()]
    if len(sizes) != _count(_get(fields, "dimension")):
        raise ValueError("dimension and sizes disagree")
    grid, channels = _nrrd_grid(fields, sizes)
    skip = _skip(fields.get("byte skip", fields.get("byteskip", "0")), packing)
    if fields.get("line skip", fields.get("lineskip", "0")) != "0":
        raise InputError("has lines before its voxels (line skip)", _CONVERT)
    detached = fields.get("data file", fields.get("datafile"))
    if detached is not None:
        return _Header(grid, channels, dtype, _beside(path, detached), skip, packing)
    if end is None:
        raise InputError("truncated: its header breaks off", _GIVE_ANOTHER)
    return _Header(grid, channels, dtype, path, end.end() + skip, packing)


def _nrrd_grid(fields: dict[str, str], sizes: list[int]) -> tuple[Grid, int]:
    if "space" not in fields or "space directions" not in fields or "space origin" not in fields:
        raise InputError(
            "does not say where its voxels are (space, space directions, space origin)",
            "Export it with its orientation",
        )
    to_ras = _known(_NRRD_SPACES, fields["space"].lower(), "the space")
    units = re.findall(r'"([^"]*)"', fields.get("space units", ""))
    if any(unit not in ("mm", "") for unit in units):
        raise InputError(f"measures in {units[0]}", "Write its orientation in millimetres")
    vectors = [_vector(v) for v in re.findall(r"none|\([^()]*\)", fields["space directions"])]
    if len(vectors) != len(sizes):
        raise ValueError("space directions and sizes disagree")
    spatial = [axis for axis, vector in enumerate(vectors) if vector is not None]
    others = [axis for axis, vector in enumerate(vectors) if vector is None]
    kinds = fields.get("kinds", "").split()
    for axis in others:
        kind = kinds[axis] if len(kinds) == len(sizes) else "none"
        if kind not in _NRRD_CHANNELS:
            raise InputError(f"has an axis of kind {kind}", "Only 3-D images, and channels as a list, are read")
    if len(spatial) != 3 or len(others) > 1:
        size = "x".join(str(n) for n in sizes)
        raise InputError(f"has the dimensions {size}", "Only 3-D images, and channels as a list, are read")
    affine = np.eye(4)
    affine[:3, :3] = to_ras @ np.array([vectors[axis] for axis in spatial]).T
    affine[:3, 3] = to_ras @ np.array(_vector(fields["space origin"]))
    shape = (sizes[spatial[0]], sizes[spatial[1]], sizes[spatial[2]])
    return Grid(shape, affine), sizes[others[0]] if others else 1


def _meta(path: Path, start: bytes) -> _Header:
    """itk.org/Wiki/MetaIO/Documentation"""
    found = re.search(rb"(?:^|\n)ElementDataFile\s*=[^\n]*(\n|$)", start)
    if found is None:
        raise InputError("not a MetaImage file", _CONVERT)
    fields = _fields(start[: found.end()].decode("latin-1").splitlines(), "=")
    if fields.get("objecttype", "image").lower() != "image" or _get(fields, "ndims") != "3":
        raise InputError(
            f"holds an {fields.get('objecttype', 'Image')} of {_get(fields, 'ndims')} dimensions",
            "Only 3-D images are read",
        )
    dtype = np.dtype(_known(_META_TYPES, _get(fields, "elementtype").upper(), "the type"))
    sizes = [_count(n) for n in _get(fields, "dimsize").split()]
    places = [
        next((fields[n] for n in names if n in fields), None)
        for names in (
            ("transformmatrix", "rotation", "orientation"),
            ("offset", "position", "origin"),
            ("elementspacing",),
        )
    ]
    if any(place is None for place in places):
        raise InputError(
            "does not say where its voxels are (TransformMatrix, Offset, ElementSpacing)",
            "Export it with its orientation",
        )
    matrix, origin, spacing = ([_number(n) for n in (place or "").split()] for place in places)
    if (len(sizes), len(matrix), len(origin), len(spacing)) != (3, 9, 3, 3):
        raise ValueError("DimSize, TransformMatrix, Offset and ElementSpacing need 3, 9, 3 and 3 numbers")
    # The matrix has a row for each axis: where it points.
    grid = Grid.from_spacing(
        (sizes[0], sizes[1], sizes[2]), spacing, _LPS_TO_RAS @ origin, _LPS_TO_RAS @ np.reshape(matrix, (3, 3)).T
    )
    channels = _count(fields.get("elementnumberofchannels", "1"))
    packing = "raw" if _true(fields, "binarydata", "true") else "text"
    packing = "deflate" if _true(fields, "compresseddata", "false") else packing
    skip = _skip(fields.get("headersize", "0"), packing)
    name = _get(fields, "elementdatafile")
    local = name.upper() == "LOCAL"
    header = _Header(
        grid, channels, dtype, path if local else _beside(path, name), found.end() if local else skip, packing
    )
    # Without it, SimpleITK reads a wrong number of bytes and gives what it finds.
    if packing == "deflate":
        promised, held = _count(_get(fields, "compresseddatasize")), header.data.stat().st_size - header.offset
        if promised != held:
            raise InputError(
                f"is truncated or has another file's header: it promises {promised} packed bytes and has {held}",
                _GIVE_ANOTHER,
            )
    return header


def _skip(text: str, packing: str) -> int:
    """Bytes before the voxels, at least: -1 says that the voxels end the file."""
    if packing != "raw" and text != "0":
        raise InputError("has something before its packed voxels", _CONVERT)
    return 0 if text == "-1" else int(text)


def _fields(lines: list[str], between: str) -> dict[str, str]:
    """Values by their name in lower case. NRRD's own pairs (``key:=value``) are none of these."""
    found: dict[str, str] = {}
    for line in lines:
        name, sign, value = line.partition(between)
        if line.startswith("#") or ":=" in line or not sign:
            continue
        if name.strip().lower() in found:
            raise ValueError(f"{name.strip()} comes twice")
        found[name.strip().lower()] = value.strip()
    return found


def _beside(path: Path, name: str) -> Path:
    """The file of voxels that a header names; InputError unless it is one, in the same folder."""
    if name.upper().startswith("LIST") or "%" in name:
        raise InputError("is spread over several files", _CONVERT)
    folder = path.resolve().parent
    data = (folder / name.removeprefix("./")).resolve()
    if data.parent != folder or data == path.resolve():
        raise InputError("points to voxels outside its folder", "Put both files into one folder, and name only that")
    if not data.is_file():
        raise InputError("the file with its voxels is missing", "Copy both files")
    return data


def _get(fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise ValueError(f"{name} is missing")
    return fields[name]


def _known(table: dict[str, Any], word: str, what: str) -> Any:
    if word not in table:
        raise InputError(f"{what} {word[:40]!r} is not read", _CONVERT)
    return table[word]


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise ValueError(f"{text[:40]!r} is no number of anything")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]!r} is no finite number")
    return number


def _vector(text: str) -> list[float] | None:
    if text == "none":
        return None
    numbers = [_number(n) for n in text.strip().strip("()").split(",")]
    if len(numbers) != 3:
        raise ValueError(f"{text[:40]!r} has no three numbers")
    return numbers


def _true(fields: dict[str, str], name: str, default: str) -> bool:
    return fields.get(name, default)[:1].lower() in ("t", "1", "y")

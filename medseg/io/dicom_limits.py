"""What a DICOM header may ask for before it is believed: decoders allocate what it declares."""

from __future__ import annotations

import zlib
from typing import BinaryIO

import psutil
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medseg.core.errors import InputError

# Two bytes of RLE stand for 128 at most.
_RLE_RATIO = 64
_CHUNK = 1 << 20
# pydicom holds what it inflates three times over.
_INFLATED_COPIES = 4
# A decoder holds a frame as integers of four bytes, and hands on another.
_DECODED_BYTES = 8
# Start of a JPEG or JPEG-LS frame: every marker C0 to CF but for tables (C4, CC) and C8; F7.
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})


def require_room(shape: tuple[int, int, int], itemsize: int) -> None:
    """InputError where a volume (slices, rows, columns) of so many bytes a voxel, and a frame of it
    while it is decoded, are more than the memory that is free."""
    frame = shape[1] * shape[2]
    wanted = shape[0] * frame * itemsize + frame * _DECODED_BYTES
    free = psutil.virtual_memory().available
    if wanted > free:
        size = "x".join(str(n) for n in shape[::-1])
        raise InputError(
            f"it says that it has {size} voxels, which take {wanted / 2**30:.1f} GiB where {free / 2**30:.1f} are free",
            "If that can be true, use a machine with more memory",
        )


def honest_run_lengths(coded: int, rows: int, columns: int, itemsize: int) -> bool:
    """Whether so many bytes of RLE can hold such a frame."""
    return rows * columns * itemsize <= coded * _RLE_RATIO


def honest_codestream(coded: bytes, rows: int, columns: int) -> bool:
    """Whether a JPEG, JPEG-LS or JPEG 2000 frame itself says that it has that size, in one channel."""
    return _size_of(coded) == (rows, columns, 1)


def _size_of(coded: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and channels, from the stream's own header; None where there is none."""
    start = coded.find(b"\xff\x4f\xff\x51")  # JPEG 2000, within a JP2 file or by itself
    if start >= 0 and not coded.startswith(b"\xff\xd8"):
        width, height, left, top = (_number(coded, start + at, 4) for at in (8, 12, 16, 20))
        return height - top, width - left, _number(coded, start + 40, 2)
    at = 2
    while at + 9 < len(coded) and coded[at] == 0xFF:
        marker = coded[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _FRAME_MARKERS:
            return _number(coded, at + 5, 2), _number(coded, at + 7, 2), coded[at + 9]
        else:
            at += 2 + _number(coded, at + 2, 2)
    return None


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")


def require_sound_deflation(file: BinaryIO) -> None:
    """InputError where a deflated file, which pydicom inflates whole, is more than memory can take.
    What it inflates to is counted and not kept. The file is left at its start."""
    try:
        read_preamble(file, force=True)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        most, inflate = psutil.virtual_memory().available // _INFLATED_COPIES, zlib.decompressobj(-zlib.MAX_WBITS)
        count, data = 0, file.read(_CHUNK)
        while data and not inflate.eof:
            count += len(inflate.decompress(data, _CHUNK))
            if count > most:
                raise InputError("a deflated file unpacks to more than memory can take", "Ask for the scan again")
            data = inflate.unconsumed_tail or file.read(_CHUNK)
    finally:
        file.seek(0)

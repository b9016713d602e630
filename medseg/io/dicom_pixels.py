"""Stored pixel values of DICOM frames, whatever their transfer syntax.

pydicom reads the native, deflated and RLE syntaxes. JPEG, JPEG-LS and JPEG 2000 go to imagecodecs
(BSD licence: libjpeg-turbo, CharLS, OpenJPEG), for pydicom has no decoder for the retired JPEG
processes that old archives hold, and its decoder of 12-bit JPEG is under the GPL.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, RLELossless

from medseg.io.dicom_limits import honest_codestream, honest_run_lengths
from medseg.io.sources import Source

_JPEG = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 53, 55, 57, 70))
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")


class TruncatedError(Exception):
    """There are fewer pixels than the header promises, or they cannot be decoded."""


def stored_values(source: Source, frames: Iterable[int]) -> Iterator[NDArray[Any]]:
    """The stored values (rows, columns) of the frames asked for (from 0), one after the other.

    Bits beyond Bits Stored, which may hold overlays or rubbish, are dropped; signs are extended.
    A native file's frames are read from disk one by one. Raises TruncatedError.
    """
    wanted = list(frames)
    with source.open() as file:
        try:
            header = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=_LAYOUT)
            for raw in _decoded(file, header, wanted):
                yield _cleaned(raw, header)
        except TruncatedError:
            raise
        except Exception:  # noqa: BLE001  a damaged file fails in ways that nobody can list
            raise TruncatedError from None


_LAYOUT = ["BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "Rows", "Columns", "NumberOfFrames"]


def syntax_of(header: Any) -> UID:
    """The transfer syntax; what has no file meta is implicit little endian by the standard's default."""
    return UID(str(getattr(header.file_meta, "TransferSyntaxUID", "1.2.840.10008.1.2")))


def _decoded(file: BinaryIO, header: Any, wanted: list[int]) -> Iterator[NDArray[Any]]:
    syntax = syntax_of(header)
    file.seek(0)
    if syntax.is_encapsulated and syntax != RLELossless:
        dataset = pydicom.dcmread(file, force=True)
        decode = _decoder(syntax)
        pieces = generate_frames(dataset.PixelData, number_of_frames=int(header.get("NumberOfFrames") or 1))
        coded = dict(zip(range(max(wanted) + 1), pieces, strict=False))
        for n in wanted:
            if not honest_codestream(coded[n], header.Rows, header.Columns):
                raise TruncatedError
            frame = decode(coded[n])
            if frame.shape != (header.Rows, header.Columns):
                raise TruncatedError
            yield frame
        return
    if syntax == RLELossless:
        itemsize = int(header.BitsAllocated) // 8
        if not honest_run_lengths(file.seek(0, 2), header.Rows, header.Columns, itemsize):
            raise TruncatedError
        file.seek(0)
    # Without file meta pydicom cannot decode from the file; nor can it seek in a deflated one.
    whole = "TransferSyntaxUID" not in header.file_meta or syntax == DeflatedExplicitVRLittleEndian
    source: Any = file
    if whole:
        source = pydicom.dcmread(file, force=True)
        source.file_meta.TransferSyntaxUID = syntax
    yield from iter_pixels(source, indices=wanted, raw=True)


def _decoder(syntax: UID) -> Any:
    import imagecodecs

    if syntax in _JPEG:
        return imagecodecs.jpeg8_decode
    if syntax in _JPEG_LS:
        return imagecodecs.jpegls_decode
    if syntax in _JPEG_2000:
        return imagecodecs.jpeg2k_decode
    raise TruncatedError


def _cleaned(raw: NDArray[Any], header: Any) -> NDArray[Any]:
    """The values in native byte order and of the sign that the header gives, from Bits Stored bits."""
    if raw.ndim != 2 or raw.dtype.kind not in "iu":
        raise TruncatedError
    signed, bits, size = bool(header.PixelRepresentation), int(header.BitsStored), raw.dtype.itemsize * 8
    values = raw.astype(raw.dtype.newbyteorder("="), copy=False)
    values = values.view(np.dtype(f"{'i' if signed else 'u'}{raw.dtype.itemsize}"))
    spare = size - bits
    if spare <= 0:
        return values
    # Up and down again: an arithmetic shift extends the sign, a logical one clears the rest.
    return (values << spare) >> spare

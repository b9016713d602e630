"""Headers that ask for more than there is: nothing is allocated on their word alone."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medseg.core.errors import InputError
from medseg.io import dicom_limits, dicom_pixels
from medseg.io.dicom import find_series, read_series
from medseg.io.dicom_limits import honest_codestream, require_room, require_sound_deflation

PIXELS = np.arange(40 * 64, dtype=np.uint16).reshape(40, 64)


def j2k(pixels: Any, **options: Any) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(pixels, reversible=True, level=0, **options))


STREAMS = {
    "JPEG": (lambda p: bytes(imagecodecs.jpeg8_encode(p.astype(np.uint8))), "1.2.840.10008.1.2.4.50"),
    "JPEG-LS": (lambda p: bytes(imagecodecs.jpegls_encode(p)), "1.2.840.10008.1.2.4.80"),
    "JPEG 2000": (lambda p: j2k(p, codecformat="j2k"), "1.2.840.10008.1.2.4.90"),
    "JP2": (lambda p: j2k(p, codecformat="jp2"), "1.2.840.10008.1.2.4.90"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_says_its_size(kind: str) -> None:
    encode, _ = STREAMS[kind]
    coded = encode(PIXELS)
    assert honest_codestream(coded, 40, 64)
    assert not honest_codestream(coded, 64, 40)
    for end in range(0, len(coded), max(1, len(coded) // 50)):
        honest_codestream(coded[:end], 40, 64)  # never raises
    if kind != "JPEG-LS":
        assert not honest_codestream(encode(np.repeat(PIXELS[..., None], 3, axis=2)), 40, 64)
    assert not honest_codestream(b"", 40, 64)
    assert not honest_codestream(b"\xff\xd8" + b"\xff" * 50, 40, 64)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_frame_of_another_size_is_not_decoded(
    dicom_series: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the decoder would allocate is the stream's word, not the header's."""
    encode, syntax = STREAMS[kind]

    def pack(dataset: Any, k: int) -> None:
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([encode(PIXELS)])
        dataset["PixelData"].VR = "OB"

    dicom_series(tmp_path, shape=(6, 5, 3), change=pack)
    monkeypatch.setattr(dicom_pixels, "_decoder", lambda syntax: lambda coded: pytest.fail("it was decoded"))
    with pytest.raises(InputError, match=r"the slice at 0\.00 mm is cut off, damaged"):
        read_series(find_series(tmp_path)[0])


def test_run_lengths_cannot_hold_more_than_they_can(dicom_series: Any, tmp_path: Path) -> None:
    def pack(dataset: Any, k: int) -> None:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
        dataset.Rows = dataset.Columns = 5000
        dataset.PixelData = encapsulate([struct.pack("<16I", 2, 64, 70, *[0] * 13) + b"\x81\0" * 6])
        dataset["PixelData"].VR = "OB"

    dicom_series(tmp_path, shape=(6, 5, 3), change=pack)
    with pytest.raises(InputError, match="is cut off, damaged"):
        read_series(find_series(tmp_path)[0])


def test_a_volume_larger_than_memory_is_refused_before_it_is_made(dicom_series: Any, tmp_path: Path) -> None:
    def lie(dataset: Any, k: int) -> None:
        dataset.Rows = dataset.Columns = 65535

    dicom_series(tmp_path, shape=(6, 5, 400), change=lie)
    with pytest.raises(InputError, match=r"says that it has 65535x65535x400 voxels, which take 32\d\d\.\d GiB"):
        read_series(find_series(tmp_path)[0])
    require_room((400, 512, 512), 2)


def memory(free: int) -> Any:
    return SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=free))


def deflated(dataset: Any, size: int) -> bytes:
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.PixelData = bytes(size)
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_a_deflation_bomb_stops_where_memory_would(
    dicom_series: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = dicom_series(tmp_path, shape=(6, 5, 1))
    bomb = deflated(pydicom.dcmread(path), 64 << 20)
    assert len(bomb) < 1 << 20
    with BytesIO(bomb) as file:
        require_sound_deflation(file)
        assert file.tell() == 0
        monkeypatch.setattr(dicom_limits, "psutil", memory(100 << 20))
        with pytest.raises(InputError, match="unpacks to more than memory can take"):
            require_sound_deflation(file)
    path.write_bytes(bomb)
    assert [series.kind for series in find_series(tmp_path)] == ["damaged"]
    path.write_bytes(deflated(pydicom.dcmread(BytesIO(bomb)), 60))
    assert read_series(find_series(tmp_path)[0]).grid.shape == (6, 5, 1)

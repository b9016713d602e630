from __future__ import annotations

import gzip
import itertools
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.spatial.transform import Rotation

from medseg.core.errors import InputError, MedsegError
from medseg.core.labels import LabelSet
from medseg.io import itk
from medseg.io.itk import is_itk, read_itk_labels, read_itk_volume

VALUES = np.random.default_rng(0).integers(0, 3000, (6, 5, 4)).astype(np.int16)  # z, y, x
HEADER = """NRRD0004
type: short
dimension: 3
space: left-posterior-superior
sizes: 4 5 6
space directions: (0.75,0,0) (0,1.5,0) (0,0,3)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (10,20,30)
"""
META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 10 20 30
ElementSpacing = 0.75 1.5 3
DimSize = 4 5 6
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""


def nrrd(path: Path, *changes: tuple[str, str], more: str = "", data: bytes = VALUES.tobytes()) -> Path:
    return _written(path, HEADER, changes, more + "\n", data)


def meta(path: Path, *changes: tuple[str, str], data: bytes = VALUES.tobytes()) -> Path:
    return _written(path, META, changes, "", data)


def _written(path: Path, header: str, changes: tuple[tuple[str, str], ...], more: str, data: bytes) -> Path:
    for old, new in changes:
        assert old in header
        header = header.replace(old, new)
    path.write_bytes((header + more).encode() + data)
    return path


def refused(path: Path, says: str, kind: type[MedsegError] = InputError) -> None:
    with pytest.raises(kind, match=says) as caught:
        read_itk_volume(path)
    assert path.name in str(caught.value)
    assert str(path.parent) not in str(caught.value)


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr", "packed.mha", "packed.nrrd", "packed.nhdr"])
@pytest.mark.parametrize("turn", [(0, 0, 0), (20, -30, 50), (0, 90, 90)], ids=["axial", "oblique", "sagittal"])
@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, 1), (1, 1, -1)])
def test_positions_are_those_of_simpleitk_in_ras(
    tmp_path: Path, name: str, turn: tuple[float, ...], flip: tuple[float, ...]
) -> None:
    image = sitk.GetImageFromArray(VALUES)
    image.SetSpacing((0.75, 1.5, 3))
    image.SetOrigin((10, -20, 30))
    image.SetDirection((Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ np.diag(flip)).ravel())
    sitk.WriteImage(image, str(tmp_path / name), useCompression="packed" in name)
    volume = read_itk_volume(tmp_path / name)
    for index in itertools.product((0, 3), (0, 4), (0, 5)):
        x, y, z = image.TransformIndexToPhysicalPoint(index)
        assert volume.grid.to_world(index) == pytest.approx((-x, -y, z), abs=1e-4)
        assert volume.values[0][index] == image[index]
    assert np.array_equal(volume.values[0], VALUES.T)
    assert volume.values.dtype == np.int16
    assert volume.values.flags.writeable


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_types(tmp_path: Path, name: str, dtype: str) -> None:
    values = (VALUES % 100).astype(dtype)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / name))
    volume = read_itk_volume(tmp_path / name)
    assert volume.values.dtype == np.dtype(dtype)
    assert np.array_equal(volume.values[0], values.T)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_a_vector_is_channels(tmp_path: Path, name: str) -> None:
    values = np.random.default_rng(0).random((6, 5, 4, 3)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=True), str(tmp_path / name))
    assert np.array_equal(read_itk_volume(tmp_path / name).values, values.transpose(3, 2, 1, 0))


def test_headers_by_hand(tmp_path: Path) -> None:
    """The world position of voxel (3, 0, 0), worked out by hand."""
    data = VALUES.tobytes()
    text = " ".join(str(v) for v in VALUES.ravel()).encode()
    (tmp_path / "d.raw").write_bytes(b"0123456789" + data)
    packed = zlib.compress(data)
    says_packed = f"CompressedData = True\nCompressedDataSize = {len(packed)}"
    files = [
        (nrrd(tmp_path / "lps.nrrd"), (-12.25, -20, 30)),
        (nrrd(tmp_path / "ras.nrrd", ("left-posterior-superior", "right-anterior-superior")), (12.25, 20, 30)),
        (nrrd(tmp_path / "short.nrrd", ("left-posterior-superior", "RAS")), (12.25, 20, 30)),
        (nrrd(tmp_path / "las.nrrd", ("left-posterior-superior", "left-anterior-superior")), (-12.25, 20, 30)),
        (nrrd(tmp_path / "sheared.nrrd", ("(0.75,0,0)", "(0.75,0.25,0)")), (-12.25, -20.75, 30)),
        (nrrd(tmp_path / "text.nrrd", ("raw", "ascii"), data=text), (-12.25, -20, 30)),
        (nrrd(tmp_path / "gz.nrrd", ("raw", "gzip"), data=gzip.compress(data)), (-12.25, -20, 30)),
        (nrrd(tmp_path / "big.nrrd", ("little", "big"), data=VALUES.astype(">i2").tobytes()), (-12.25, -20, 30)),
        (nrrd(tmp_path / "skip.nhdr", more="byte skip: 10\ndata file: d.raw\n", data=b""), (-12.25, -20, 30)),
        (nrrd(tmp_path / "end.nhdr", more="byte skip: -1\ndata file: ./d.raw\n", data=b""), (-12.25, -20, 30)),
        (meta(tmp_path / "a.mha"), (-12.25, -20, 30)),
        (meta(tmp_path / "gz.mha", ("CompressedData = False", says_packed), data=packed),
         (-12.25, -20, 30)),
        (meta(tmp_path / "turned.mha", ("1 0 0 0 1 0 0 0 1", "0 1 0 1 0 0 0 0 1")), (-10, -22.25, 30)),
        (meta(tmp_path / "skip.mhd", ("LOCAL", "d.raw"), ("DimSize", "HeaderSize = 10\nDimSize"), data=b""),
         (-12.25, -20, 30)),
    ]  # fmt: skip
    for path, position in files:
        volume = read_itk_volume(path)
        assert volume.grid.to_world((3, 0, 0)) == pytest.approx(position), path.name
        assert np.array_equal(volume.values[0], VALUES.T), path.name
    listed = nrrd(
        tmp_path / "list.nrrd",
        ("dimension: 3", "dimension: 4"),
        ("4 5 6", "4 5 6 2"),
        ("(0,0,3)", "(0,0,3) none"),
        ("domain domain domain", "domain domain domain list"),
        data=data + (VALUES + 1).tobytes(),
    )
    assert np.array_equal(read_itk_volume(listed).values, [VALUES.T, VALUES.T + 1])


def test_labels(tmp_path: Path) -> None:
    labels = LabelSet.from_names(["a", "b"])
    for dtype in ("u1", "i4", "f4"):
        values = (VALUES % 3).astype(dtype)
        sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nrrd"))
        found = read_itk_labels(tmp_path / "a.nrrd", labels)
        assert found.values.dtype == np.uint8
        assert np.array_equal(found.values, values.T)
    for strange, says in ((VALUES % 4, "value 3, which is not listed"), (VALUES / 2, "not whole numbers")):
        sitk.WriteImage(sitk.GetImageFromArray(strange), str(tmp_path / "a.nrrd"))
        with pytest.raises(InputError, match=says):
            read_itk_labels(tmp_path / "a.nrrd", labels)
    with pytest.raises(InputError, match="2 channels"):
        read_itk_labels(
            nrrd(
                tmp_path / "v.nrrd",
                ("dimension: 3", "dimension: 4"),
                ("4 5 6", "2 4 5 6"),
                ("(0.75,0,0)", "none (0.75,0,0)"),
                ("kinds: ", "kinds: vector "),
                data=VALUES.tobytes() * 2,
            ),
            labels,
        )


def test_names() -> None:
    assert is_itk(Path("a.NRRD"))
    assert is_itk(Path("a.mhd"))
    assert not is_itk(Path("._a.mha"))
    assert not is_itk(Path("a.raw"))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([("NRRD0004", "NRRX0004")], "not a NRRD"),
        ([("sizes: 4 5 6", "sizes: 4000 5000 6000")], "truncated: its header promises 240000000000 bytes"),
        ([("sizes: 4 5 6", "sizes: 4 5 7")], "truncated: its header promises 280 bytes, the file holds 240"),
        ([("sizes: 4 5 6", "sizes: 4 5 99999999999999999999")], "no number of anything"),
        ([("sizes: 4 5 6", "sizes: 4 5 -6")], "no number of anything"),
        ([("sizes: 4 5 6", "sizes: 4 5")], "dimension and sizes disagree"),
        ([("sizes: 4 5 6\n", "")], "sizes is missing"),
        ([("type: short", "type: short\ntype: int")], "type comes twice"),
        ([("type: short", "type: block")], "the type 'block' is not read"),
        ([("encoding: raw", "encoding: bzip2")], "the encoding 'bzip2' is not read"),
        ([("endian: little\n", "")], "cannot be read by SimpleITK"),
        ([("space: left-posterior-superior\n", "")], "does not say where its voxels are"),
        ([("space: left-posterior-superior", "space: scanner-xyz")], "the space 'scanner-xyz'"),
        ([("space: left-posterior-superior", "space dimension: 3")], "does not say where its voxels are"),
        ([("space origin: (10,20,30)\n", "")], "does not say where its voxels are"),
        ([("(0,0,3)", "(0,0,0)")], "singular"),
        ([("(0,0,3)", "(0,0,nan)")], "no finite number"),
        ([("(0,0,3)", "none")], "axis of kind domain"),
        ([("kinds", 'space units: "um" "um" "um"\nkinds')], "measures in um"),
        ([("kinds", "line skip: 1\nkinds")], "line skip"),
        ([("kinds", "centerings: cell cell cell\nspacings: 1 1 1\nkinds")], "cannot be read by SimpleITK"),
        ([("raw", "gzip"), ("kinds", "byte skip: 4\nkinds")], "before its packed voxels"),
    ],
)
def test_nrrd_headers_that_cannot_be_meant(tmp_path: Path, changes: list[tuple[str, str]], says: str) -> None:
    refused(nrrd(tmp_path / "a.nrrd", *changes), says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([("ElementDataFile", "Element")], "not a MetaImage"),
        ([("NDims = 3", "NDims = 4")], "of 4 dimensions"),
        ([("ObjectType = Image", "ObjectType = Scene")], "holds an Scene"),
        ([("DimSize = 4 5 6", "DimSize = 4000 5000 6000")], "truncated: its header promises"),
        ([("DimSize = 4 5 6", "DimSize = 4 5")], "need 3, 9, 3 and 3"),
        ([("DimSize = 4 5 6", "DimSize = 4 5 0")], "no number of anything"),
        ([("ElementType", "ElementNumberOfChannels = 99999999\nElementType")], "truncated"),
        ([("Offset = 10 20 30\n", "")], "does not say where its voxels are"),
        ([("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", "")], "does not say where its voxels are"),
        ([("ElementSpacing", "ElementSize")], "does not say where its voxels are"),
        ([("0.75 1.5 3", "0.75 1.5 0")], "singular"),
        ([("MET_SHORT", "MET_STRING")], "the type 'MET_STRING' is not read"),
        ([("LOCAL", "LIST\na.raw")], "several files"),
        ([("LOCAL", "a%03d.raw 1 6 1")], "several files"),
    ],
)
def test_meta_headers_that_cannot_be_meant(tmp_path: Path, changes: list[tuple[str, str]], says: str) -> None:
    refused(meta(tmp_path / "a.mha", *changes), says)


@pytest.mark.parametrize("inside", ["../secret.raw", "sub/../../secret.raw", "/etc/hostname", "link.raw", "sub/b.raw"])
def test_voxels_outside_the_folder(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.raw", folder / "sub" / "b.raw"):
        path.write_bytes(VALUES.tobytes())
    (folder / "link.raw").symlink_to(tmp_path / "secret.raw")
    refused(nrrd(folder / "a.nhdr", more=f"data file: {inside}\n", data=b""), "outside its folder")
    refused(meta(folder / "a.mhd", ("LOCAL", inside), data=b""), "outside its folder")


def test_voxels_that_are_missing_or_the_header_itself(tmp_path: Path) -> None:
    refused(nrrd(tmp_path / "a.nhdr", more="data file: gone.raw\n", data=b""), "voxels is missing")
    refused(nrrd(tmp_path / "a.nhdr", more="data file: a.nhdr\n", data=b""), "outside its folder")
    refused(nrrd(tmp_path / "a.nhdr", more="data file: LIST\na.raw\n", data=b""), "several files")


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
@pytest.mark.parametrize("packed", [True, False])
def test_truncated_and_damaged(tmp_path: Path, name: str, packed: bool) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 3000, (30, 25, 20)).astype(np.int16))
    sitk.WriteImage(image, str(tmp_path / name), useCompression=packed)
    data = (tmp_path / name).read_bytes()
    for cut in (1, 8, 1000, len(data) - 100, len(data) - 3):
        (tmp_path / name).write_bytes(data[:-cut])
        refused(tmp_path / name, "truncated|damaged|not a MetaImage|not a NRRD|unsound header|is missing")
    if packed:  # nothing guards what is not packed
        for at in np.random.default_rng(1).integers(700, len(data) - 8, 20):
            broken = bytearray(data)
            broken[at] ^= 16
            (tmp_path / name).write_bytes(broken)
            refused(tmp_path / name, "damaged")


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(1 << 26), 1)
    refused(nrrd(tmp_path / "a.nrrd", ("raw", "gzip"), data=bomb), "damaged")
    refused(nrrd(tmp_path / "a.nrrd", ("raw", "gzip"), ("4 5 6", "4000 5000 6"), data=gzip.compress(b"")), "truncated")


def test_packed_meta_images_say_how_long_they_are(tmp_path: Path) -> None:
    packed = zlib.compress(VALUES.tobytes())
    for more, says in (
        ("", "compresseddatasize is missing"),
        (f"\nCompressedDataSize = {len(packed) - 4}", "promises .* packed bytes"),
    ):
        path = meta(tmp_path / "a.mha", ("CompressedData = False", f"CompressedData = True{more}"), data=packed)
        refused(path, says)


def test_nan_is_counted(tmp_path: Path) -> None:
    values = VALUES.astype(np.float32)
    values[0, 0, :2] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.mha"))
    refused(tmp_path / "a.mha", "has 2 voxels that are NaN")


def test_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").touch()
    refused(tmp_path / "a.nrrd", "is empty")
    with pytest.raises(InputError, match=f"{tmp_path}/b.nrrd is missing"):  # as it was typed
        read_itk_volume(tmp_path / "b.nrrd")
    (tmp_path / "c.nrrd").mkdir()
    refused(tmp_path / "c.nrrd", "is no file")


@pytest.mark.parametrize(
    ("program", "says", "kind"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashes its reader \(SIGSEGV\)", InputError),
        ("import os; os.abort()", r"crashes its reader \(SIGABRT\)", InputError),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was stopped", InputError),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "took more than 60 s", InputError),
        ("import time; time.sleep(60)", "took more than 0.5 s", InputError),
        ("raise ImportError", "the reader of a.nrrd failed", MedsegError),
        ('print(\'{"error": "memory"}\')', "needs more memory", MedsegError),
        ('print(\'{"error": "reader"}\')', "cannot be read by SimpleITK", InputError),
    ],
)
def test_what_happens_to_the_reader_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, says: str, kind: type[MedsegError]
) -> None:
    (tmp_path / "child.py").write_text(program)
    monkeypatch.setattr(itk, "_CHILD", tmp_path / "child.py")
    if "sleep" in program:
        monkeypatch.setattr(itk, "_BASE_SECONDS", 0.25)
    refused(nrrd(tmp_path / "a.nrrd"), says, kind)


def test_the_reader_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = sitk.GetImageFromArray(np.zeros((100, 100, 100), dtype=np.float64))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    read_itk_volume(tmp_path / "a.nrrd")
    monkeypatch.setattr(itk, "_SPARE_MEMORY", -30_000_000)
    refused(tmp_path / "a.nrrd", "needs more memory", MedsegError)


def test_another_geometry_than_the_header_s_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nrrd(tmp_path / "a.nrrd")
    real: Callable[..., Any] = itk._in_child

    def lie(*arguments: Any) -> Any:
        return {**real(*arguments), "origin": [10, 20, 31]}

    monkeypatch.setattr(itk, "_in_child", lie)
    refused(path, "SimpleITK puts voxels 1 mm from where the header does")


# ---- real files ---------------------------------------------------------------------------------


def test_real_files_lie_where_their_headers_say(shared_data: Path) -> None:
    """Header and voxels taken apart here by hand, as all of these are attached and packed."""
    paths = sorted((shared_data / "nrrd-pyradiomics").glob("*.nrrd"))
    assert len(paths) == 10
    for path in paths:
        header, _, packed = path.read_bytes().partition(b"\n\n")
        field = dict(line.split(": ", 1) for line in header.decode().splitlines() if ": " in line)
        numbers = [float(n) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", field["space directions"])]
        origin = np.array([float(n) for n in field["space origin"].strip("()").split(",")])
        size = tuple(int(n) for n in field["sizes"].split())
        dtype = {"short": "<i2", "int": "<i4", "unsigned short": "<u2"}[field["type"]]
        assert field["space"] == "left-posterior-superior"
        volume = read_itk_volume(path)
        last = origin + (np.array(size) - 1) @ np.reshape(numbers, (3, 3))
        assert volume.grid.to_world((0, 0, 0)) == pytest.approx(origin * (-1, -1, 1)), path.name
        assert volume.grid.to_world(np.array(size) - 1) == pytest.approx(last * (-1, -1, 1)), path.name
        expected = np.frombuffer(gzip.decompress(packed), dtype=dtype).reshape(size, order="F")
        assert np.array_equal(volume.values[0], expected), path.name

from __future__ import annotations

import contextlib
import gzip
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medseg.core.errors import InputError, MedsegError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.io import nifti
from medseg.io.nifti import (
    _grid,
    is_nifti,
    read_labels,
    read_raw_labels,
    read_volume,
    stem,
    write_labels,
    write_volume,
)

GRID = Grid.from_spacing((4, 5, 6), (0.75, 1.5, 3), (-20, 30.5, 7), np.diag([-1.0, -1, 1]))
LABELS = LabelSet.from_names(["liver", "tumour"])
REAL = np.random.default_rng(0).integers(0, 100, (4, 5, 6))


def saved(
    path: Path,
    values: Any = None,
    *,
    kind: Any = nib.Nifti1Image,
    change: Callable[[Any], None] = lambda header: None,
    endian: str = "<",
    affine: Any = GRID.affine,
) -> Path:
    """A file written by nibabel, its header changed before the bytes are put together."""
    values = REAL.astype(np.int16) if values is None else values
    image = kind(values, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    raw = bytearray(image.to_bytes())
    header = type(image.header)(bytes(raw[: image.header["sizeof_hdr"]]), check=False)
    if endian == ">":
        raw[352:] = values.astype(values.dtype.newbyteorder(">")).tobytes(order="F")
    change(header)
    raw[: int(image.header["sizeof_hdr"])] = (
        header.as_byteswapped(">").binaryblock if endian == ">" else header.binaryblock
    )
    path.write_bytes(gzip.compress(raw, 1) if path.name.endswith(".gz") else raw)
    return path


def put(**fields: Any) -> Callable[[Any], None]:
    def change(header: Any) -> None:
        for name, value in fields.items():
            header[name] = value

    return change


# ---- what is written is read --------------------------------------------------------------------

DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_written_values_are_read_by_us_and_by_nibabel(tmp_path: Path, dtype: str, name: str) -> None:
    volume = Volume(REAL[None].astype(dtype), GRID)
    write_volume(tmp_path / name, volume)
    ours, theirs = read_volume(tmp_path / name), nib.load(tmp_path / name)
    assert ours.values.dtype == theirs.get_data_dtype() == np.dtype(dtype)
    assert np.array_equal(ours.values, volume.values)
    assert np.array_equal(np.asanyarray(theirs.dataobj), volume.values[0])
    assert ours.grid == volume.grid
    assert np.array_equal(theirs.affine, GRID.affine)
    assert theirs.header.get_qform() == pytest.approx(GRID.affine, abs=1e-5)
    assert theirs.header.get_xyzt_units()[0] == "mm"
    assert ours.values.flags.writeable


@given(
    st.tuples(*[st.integers(1, 5)] * 4),
    st.tuples(*[st.floats(-180, 180)] * 3),
    st.tuples(*[st.floats(0.3, 6)] * 3),
    st.booleans(),
)
def test_any_grid_goes_round(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int, int],
    turn: tuple[float, ...],
    spacing: tuple[float, ...],
    flip: bool,
) -> None:
    direction = Rotation.from_euler("xyz", turn, degrees=True).as_matrix() @ np.diag([-1 if flip else 1, 1, 1])
    grid = Grid.from_spacing(shape[1:], spacing, (100, -200, 300), direction)
    path = tmp_path_factory.mktemp("grid") / "a.nii"
    volume = Volume(np.random.default_rng(0).random(shape, dtype=np.float32), grid)
    write_volume(path, volume)
    ours, theirs = read_volume(path), nib.load(path)
    assert ours.grid.matches(grid, 1e-3)
    assert theirs.header.get_qform() == pytest.approx(grid.affine, abs=1e-3)
    assert np.array_equal(ours.values, volume.values)
    assert theirs.shape == (shape[1:] if shape[0] == 1 else (*shape[1:], shape[0]))


def test_a_sheared_grid_goes_round(tmp_path: Path) -> None:
    affine = GRID.affine.copy()
    affine[0, 2] = 1.25
    write_volume(tmp_path / "a.nii", Volume(REAL[None].astype(np.int16), Grid(GRID.shape, affine)))
    assert np.array_equal(read_volume(tmp_path / "a.nii").grid.affine, affine)


def test_an_axis_longer_than_nifti_1_can_say_makes_nifti_2(tmp_path: Path) -> None:
    for length, kind in ((32767, nib.Nifti1Image), (32768, nib.Nifti2Image)):
        volume = Volume(np.arange(length * 2, dtype=np.int32).reshape(1, 2, length, 1), Grid((2, length, 1), np.eye(4)))
        write_volume(tmp_path / "a.nii.gz", volume)
        assert type(nib.load(tmp_path / "a.nii.gz")) is kind
        assert np.array_equal(np.asanyarray(nib.load(tmp_path / "a.nii.gz").dataobj), volume.values[0])
        assert np.array_equal(read_volume(tmp_path / "a.nii.gz").values, volume.values)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_writing_holds_no_second_image(tmp_path: Path, name: str) -> None:
    values = np.zeros((3, 160, 160, 200), dtype=np.float32)
    for order in ("C", "F"):
        volume = Volume(values.copy(order=order), Grid((160, 160, 200), np.eye(4)))  # type: ignore[call-overload]
        assert peak_of(lambda v=volume: write_volume(tmp_path / name, v)) < 0.5 * values.nbytes  # type: ignore[misc]
        assert read_volume(tmp_path / name).values.shape == values.shape


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
@pytest.mark.parametrize("what", ["full", "empty", "a corner", "a middle", "one voxel"])
def test_large_images_of_either_order_are_written_alike(tmp_path: Path, what: str, dtype: str) -> None:
    """Above the size from which rows are turned by way of a copy."""
    values = np.zeros((1, 45, 37, 75), dtype=dtype)
    where = {
        "full": slice(None),
        "empty": slice(0, 0),
        "a corner": (0, slice(3), slice(2), slice(1)),
        "a middle": (0, slice(11, 30), slice(20, 37), slice(30, 50)),
        "one voxel": (0, 44, 36, 74),
    }[what]
    values[where] = np.random.default_rng(0).integers(1, 100, values[where].shape)
    grid = Grid(values.shape[1:], np.eye(4))
    files = []
    for order in ("C", "F"):
        write_volume(tmp_path / f"{order}.nii.gz", Volume(values.copy(order=order), grid))  # type: ignore[call-overload]
        files.append((tmp_path / f"{order}.nii.gz").read_bytes())
    assert np.array_equal(np.asanyarray(nib.load(tmp_path / "C.nii.gz").dataobj), values[0])
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_the_same_labels_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    labels = LabelMap((REAL % 3).astype(np.uint8), GRID, LABELS)
    write_labels(tmp_path / name, labels)
    first = (tmp_path / name).read_bytes()
    (tmp_path / "other").mkdir()
    write_labels(
        tmp_path / "other" / name, LabelMap(np.asfortranarray(labels.values), Grid(GRID.shape, GRID.affine), LABELS)
    )
    assert (tmp_path / "other" / name).read_bytes() == first
    again = read_labels(tmp_path / name, LABELS)
    assert again.values.dtype == np.uint8
    assert np.array_equal(again.values, labels.values)
    assert again.labels == LABELS


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_what_readers_disagree_on_is_not_written(tmp_path: Path, dtype: type) -> None:
    with pytest.raises(TypeError, match="int64"):
        write_labels(tmp_path / "a.nii", LabelMap((REAL % 3).astype(dtype), GRID, LABELS))
    assert list(tmp_path.iterdir()) == []


def test_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MedsegError, match="No space left"):
        write_labels(tmp_path / "a.nii.gz", LabelMap((REAL % 3).astype(np.uint8), GRID, LABELS))
    assert list(tmp_path.iterdir()) == []


def test_names() -> None:
    assert stem(Path("x/liver_1.nii.gz")) == stem(Path("liver_1.NII")) == "liver_1"
    assert stem(Path("a.b.nii")) == "a.b"
    assert is_nifti(Path("a.nii"))
    assert is_nifti(Path("A.NII.GZ"))
    assert not any(is_nifti(Path(n)) for n in ("._a.nii.gz", "a.gz", "a.img", "nii"))


# ---- what others write --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_scaling(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / name, change=put(scl_slope=2.5, scl_inter=-1024))
    values = read_volume(path).values
    assert values.dtype == np.float32
    assert np.array_equal(values[0], REAL * 2.5 - 1024)
    assert np.array_equal(values[0], nib.load(path).get_fdata())


@pytest.mark.parametrize(("slope", "intercept"), [(0, 7), (np.nan, np.nan), (1, 0), (0, np.nan)])
def test_a_slope_that_is_none_scales_nothing(tmp_path: Path, slope: float, intercept: float) -> None:
    path = saved(tmp_path / "a.nii", change=put(scl_slope=slope, scl_inter=intercept))
    assert np.array_equal(read_volume(path).values[0], REAL)
    assert read_volume(path).values.dtype == np.int16


def test_an_intercept_without_a_slope_of_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", change=put(scl_slope=1, scl_inter=3))
    assert np.array_equal(read_volume(path).values[0], REAL + 3)


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4", "f8", "u2"])
def test_big_endian(tmp_path: Path, dtype: str) -> None:
    path = saved(tmp_path / "a.nii.gz", REAL.astype(dtype), endian=">")
    assert np.array_equal(nib.load(path).get_fdata(), REAL)
    volume = read_volume(path)
    assert np.array_equal(volume.values[0], REAL)
    assert volume.values.dtype == np.dtype(dtype)
    assert volume.values.dtype.isnative
    assert volume.grid == GRID


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_2(tmp_path: Path, name: str) -> None:
    volume = read_volume(saved(tmp_path / name, kind=nib.Nifti2Image))
    assert np.array_equal(volume.values[0], REAL)
    assert volume.grid == GRID


def test_the_fourth_dimension_is_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 9, (4, 5, 6, 3)).astype(np.int16)
    volume = read_volume(saved(tmp_path / "a.nii", values))
    assert volume.values.shape == (3, 4, 5, 6)
    assert np.array_equal(volume.values, np.moveaxis(values, -1, 0))


@pytest.mark.parametrize("more", [(1,), (1, 1), (1, 1, 1, 1), (2, 1), (2, 1, 1, 1)])
def test_trailing_dimensions_of_one_are_none(tmp_path: Path, more: tuple[int, ...]) -> None:
    values = np.zeros((4, 5, 6, *more), dtype=np.int16)
    assert read_volume(saved(tmp_path / "a.nii", values)).values.shape == (more[0], 4, 5, 6)


def test_a_single_slice_stays_three_dimensional(tmp_path: Path) -> None:
    assert read_volume(saved(tmp_path / "a.nii", np.zeros((4, 5, 1), dtype=np.int16))).values.shape == (1, 4, 5, 1)


def test_qform_alone_and_sform_alone(tmp_path: Path) -> None:
    for code in ("sform_code", "qform_code"):
        grid = read_volume(saved(tmp_path / "a.nii", change=put(**{code: 0}))).grid
        assert grid.matches(GRID, 1e-4)


def shifted(by: float) -> Callable[[Any], None]:
    moved = GRID.affine.copy()
    moved[0, 3] += by
    return lambda header: header.set_qform(moved, code=1)


def test_a_qform_rounded_otherwise_is_no_conflict(tmp_path: Path) -> None:
    read_volume(saved(tmp_path / "a.nii", change=shifted(0.013)))
    read_volume(saved(tmp_path / "a.nii", change=shifted(0.04)))
    refused(saved(tmp_path / "a.nii", change=shifted(0.06)), "disagree by up to 0.06 mm")


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-0.01, 0.01), st.permutations([0, 1, 2]))
def test_a_quaternion_of_float32_is_no_conflict(
    tmp_path_factory: pytest.TempPathFactory, first: float, second: float, third: float, order: list[int]
) -> None:
    """Half a turn, or almost: there the quaternion's real part is rounded most."""
    turn = Rotation.from_euler("xyz", np.array([180 + third, first, second])[order], degrees=True).as_matrix()
    grid = Grid.from_spacing((512, 512, 400), (0.9, 0.9, 1.5), (-200, 100, 50), turn)
    header = nib.Nifti1Header()
    header.set_data_shape(grid.shape)
    header.set_sform(grid.affine, code=1)
    header.set_qform(grid.affine, code=1)
    path = tmp_path_factory.mktemp("turn") / "a.nii.gz"
    _grid(header, grid.shape, path.name)
    away = grid.affine.copy()
    away[0, 3] += 0.06
    further = grid.affine.copy()
    further[:3, :3] = Rotation.from_euler("z", 0.3, degrees=True).as_matrix() @ further[:3, :3]
    for other in (away, further):
        header.set_qform(other, code=1)
        with pytest.raises(InputError, match="disagree"):
            _grid(header, grid.shape, path.name)


def test_the_qform_of_a_sheared_sform_may_leave_out_the_shear_and_no_more(tmp_path: Path) -> None:
    sheared = GRID.affine.copy()
    sheared[0, 2] = 0.875
    shape = (20, 20, 20)
    values = np.zeros(shape, dtype=np.int16)
    best = saved(tmp_path / "a.nii", values, affine=sheared)
    assert np.array_equal(read_volume(best).grid.affine, sheared)
    # ITK keeps the first axis as it is and squares the others with it.
    first = GRID.affine.copy()
    first[:3, :3] = GRID.direction * np.linalg.norm(sheared[:3, :3], axis=0)
    read_volume(saved(tmp_path / "b.nii", values, affine=sheared, change=lambda h: h.set_qform(first, code=1)))
    for axis in range(3):
        moved = sheared.copy()
        moved[axis, 3] += 0.1
        refused(
            saved(tmp_path / "c.nii", values, affine=sheared, change=lambda h, m=moved: h.set_qform(m, code=1)),  # type: ignore[misc]
            "sform and qform of c.nii disagree",
        )
    mirrored = GRID.affine @ np.diag([-1, 1, 1, 1])
    refused(
        saved(tmp_path / "d.nii", values, affine=sheared, change=lambda h: h.set_qform(mirrored, code=1)), "disagree"
    )


# ---- what is refused ----------------------------------------------------------------------------


def refused(path: Path, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_volume(path)
    assert caught.value.remedy
    assert path.name in str(caught.value)


def test_sform_and_qform_that_disagree(tmp_path: Path) -> None:
    moved = GRID.affine.copy()
    moved[0, 3] += 12.5
    path = saved(tmp_path / "a.nii", change=lambda header: header.set_qform(moved, code=1))
    refused(path, r"sform and qform of a\.nii disagree by up to 12\.5 mm")
    refused(path, r"sform: Grid\(.*first voxel at -20x30.5x7 mm\); qform: Grid\(.*first voxel at -7.5x30.5x7 mm\)")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put(sform_code=0, qform_code=0), "does not say where its voxels are"),
        (put(srow_x=[0, 0, 0, 0]), "singular"),
        (put(srow_y=[0, np.nan, 0, 0]), "of finite numbers"),
        (put(srow_y=[0, np.inf, 0, 0]), "of finite numbers"),
        (put(srow_x=[1e30, 0, 0, 0]), "of finite numbers"),
        (put(srow_x=[1e-30, 0, 0, 0]), "singular"),
        (put(sform_code=0, pixdim=[1, 0, 1, 1, 1, 1, 1, 1]), "singular|orientation"),
        (put(sform_code=0, pixdim=[1, -1, 1, 1, 1, 1, 1, 1]), "orientation"),
        (put(sform_code=0, quatern_b=9, quatern_c=9), "invalid orientation"),
        (put(xyzt_units=1), "measures in metres"),
        (put(xyzt_units=3), "measures in micrometres"),
        (put(scl_slope=2, scl_inter=np.inf), "invalid scaling"),
        (put(datatype=9999), "unknown data type"),
        (put(datatype=1), "holds|unknown"),
        (put(vox_offset=100), "voxels at byte 100"),
        (put(vox_offset=np.nan), "voxels at byte nan"),
        (put(vox_offset=2e9), "voxels at byte 2e"),
        (put(vox_offset=-1), "voxels at byte -1"),
        (put(dim=[2, 4, 5, 0, 0, 0, 0, 0]), "dimensions 4x5"),
        (put(dim=[5, 4, 5, 6, 1, 3, 1, 1]), "dimensions 4x5x6x1x3"),
        (put(dim=[3, 4, -5, 6, 1, 1, 1, 1]), "dimensions 4x-5x6"),
        (put(dim=[3, 0, 5, 6, 1, 1, 1, 1]), "dimensions 0x5x6"),
        (put(dim=[-5, 4, 5, 6, 1, 1, 1, 1]), "-5 dimensions"),
        (put(dim=[0, 4, 5, 6, 1, 1, 1, 1]), "0 dimensions"),
        (put(dim=[900, 4, 5, 6, 1, 1, 1, 1]), "900 dimensions"),
        (put(magic=b"ni1"), "one half of a .hdr/.img pair"),
        (put(magic=b"xxx"), "not a NIfTI file"),
        (put(sizeof_hdr=347), "not a NIfTI file"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_header_that_cannot_be_meant(tmp_path: Path, name: str, change: Any, says: str) -> None:
    refused(saved(tmp_path / name, change=change), says)


@pytest.mark.parametrize("dtype", ["c8", "c16", [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_complex_and_coloured_voxels(tmp_path: Path, dtype: Any) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), dtype=dtype), np.eye(4)), tmp_path / "a.nii.gz")
    refused(tmp_path / "a.nii.gz", "Only integer and float images")


@pytest.mark.parametrize("keep", [1, 4, 200, 347, 348, 400, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path / "a.nii")
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "truncated|not a NIfTI")


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95, 1])
def test_truncated_gzip(tmp_path: Path, part: float) -> None:
    path = saved(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 9999, (40, 50, 30)).astype(np.int16))
    data = path.read_bytes()
    path.write_bytes(data[: max(int(len(data) * part) - 1, 3)])
    refused(path, "truncated|not sound gzip|not a NIfTI")


def test_a_gzip_of_too_little(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(path.read_bytes()[:-10]))
    refused(tmp_path / "b.nii.gz", "truncated: its header promises 592 bytes, the file has 582")


def test_a_flipped_bit_in_a_gzip(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 9999, (20, 20, 20)).astype(np.int16))
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for at in rng.integers(20, len(data) - 4, 40):
        broken = data.copy()
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        refused(path, "not sound gzip|truncated|not a NIfTI")


def test_neither_image_nor_file(tmp_path: Path) -> None:
    (tmp_path / "a.nii").touch()
    refused(tmp_path / "a.nii", "is empty")
    (tmp_path / "a.nii.gz").touch()
    refused(tmp_path / "a.nii.gz", "is empty")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(b""))
    refused(tmp_path / "b.nii.gz", "not a NIfTI file")
    (tmp_path / "c.nii.gz").write_bytes(b"\x1f\x8b")
    refused(tmp_path / "c.nii.gz", "truncated|not sound")
    (tmp_path / "text.nii").write_text("no image at all\n" * 100)
    refused(tmp_path / "text.nii", "not a NIfTI file")
    (tmp_path / "folder.nii").mkdir()
    refused(tmp_path / "folder.nii", "cannot be read .*directory")
    refused(tmp_path / "nowhere.nii", "is missing")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    refused(tmp_path / "loop.nii", "cannot be read")


@given(st.binary(max_size=700))
def test_random_bytes_after_a_true_beginning(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    """Whatever a header says, the answer is a volume or an InputError."""
    path = tmp_path_factory.mktemp("noise") / "a.nii"
    true = saved(path).read_bytes()
    start = len(noise) % 330
    path.write_bytes(true[: 4 + start] + noise + true[4 + start + len(noise) :])
    with contextlib.suppress(InputError):
        read_volume(path)


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dim", [[3, 2000, 2000, 500], [3, 32767, 32767, 32767], [4, 32767, 32767, 32767, 32767]])
def test_a_huge_header_on_a_small_file_allocates_nothing(tmp_path: Path, name: str, dim: list[int]) -> None:
    path = saved(tmp_path / name, change=put(dim=dim + [1] * (8 - len(dim))))
    assert peak_of(lambda: refused(path, "truncated: its header promises")) < 4e6


def test_nifti_2_may_promise_even_more(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", kind=nib.Nifti2Image, change=put(dim=[3, 2**62, 2**62, 2**62, 1, 1, 1, 1]))
    assert peak_of(lambda: refused(path, "truncated: its header promises")) < 4e6


def test_a_gzip_bomb_behind_a_small_image_is_not_inflated(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii")
    packer = zlib.compressobj(1, wbits=31)
    million = bytes(1 << 20)
    data = packer.compress(path.read_bytes()) + b"".join(packer.compress(million) for _ in range(1024))
    bomb = tmp_path / "bomb.nii.gz"
    bomb.write_bytes(data + packer.flush())
    assert peak_of(lambda: read_volume(bomb)) < 4e6
    assert np.array_equal(read_volume(bomb).values[0], REAL)
    # Memory that Python does not trace counts too.
    program = (
        "import resource, sys; from pathlib import Path; from medseg.io.nifti import read_volume\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_volume(Path(sys.argv[1])); before = rss(); read_volume(Path(sys.argv[2])); print(rss() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(bomb)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50_000  # kilobytes


def test_a_plain_file_with_a_long_tail_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii")
    with path.open("r+b") as file:
        file.truncate(1 << 30)  # sparse
    assert peak_of(lambda: read_volume(path)) < 4e6


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("i2", {}),
        ("i2", {"endian": ">"}),
        ("f4", {}),
        ("f8", {}),
        ("i2", {"change": put(scl_slope=2, scl_inter=1)}),
        ("f4", {"change": put(scl_slope=2, scl_inter=1)}),
        ("f8", {"change": put(scl_slope=2, scl_inter=1)}),
    ],
    ids=["plain", "big-endian", "float", "double", "scaled", "scaled float", "scaled double"],
)
def test_reading_takes_at_most_half_more_than_the_image(
    tmp_path: Path, name: str, dtype: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nifti, "_AT_ONCE", 1 << 18)  # as small beside this image as it is beside a CT
    values = np.random.default_rng(0).integers(0, 99, (200, 200, 100)).astype(dtype)
    path = saved(tmp_path / name, values, **options)
    size = read_volume(path).values.nbytes
    assert peak_of(lambda: read_volume(path)) < 1.5 * max(size, values.nbytes) + 4e6
    expected = values * 2.0 + 1 if "change" in options else values
    assert np.array_equal(read_volume(path).values[0], expected)


def test_nan_and_infinity_are_counted(tmp_path: Path) -> None:
    values = REAL.astype(np.float32)
    values[0, 0, :2] = np.nan
    values[1, 1, 1] = -np.inf
    refused(saved(tmp_path / "a.nii", values), r"a\.nii has 3 voxels that are NaN or infinite")
    large = saved(
        tmp_path / "b.nii", np.full((4, 5, 6), 3e38, dtype=np.float32), change=put(scl_slope=1e30, scl_inter=0)
    )
    refused(large, "120 voxels")


def test_values_that_float32_cannot_hold_are_counted(tmp_path: Path) -> None:
    values = REAL.astype(np.float64)
    values[0, 0, :2] = 1e39, -1e300
    refused(saved(tmp_path / "a.nii", values), r"a\.nii has 2 voxels that are too large for float32")
    values[0, 0, :2] = 3e38, -3e38
    assert read_volume(saved(tmp_path / "a.nii", values)).values.max() == 3e38


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "u1", "i8"])
def test_whole_numbers_of_any_type_are_labels(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.nii.gz"
    image = nib.Nifti1Image((REAL % 3).astype(dtype), GRID.affine, dtype=dtype)
    nib.save(image, path)
    labels = read_labels(path, LABELS)
    assert labels.values.dtype == np.uint8
    assert np.array_equal(labels.values, REAL % 3)
    assert np.array_equal(read_raw_labels(path)[0], REAL % 3)
    assert read_raw_labels(path)[1] == labels.grid


def test_large_numbers_keep_their_value(tmp_path: Path) -> None:
    for number, dtype in ((255, np.uint8), (256, np.uint16), (70_000, np.uint32)):
        path = saved(tmp_path / "a.nii", np.full((2, 2, 2), number, dtype=np.int32))
        labels = read_labels(path, LabelSet((Label("a", number),)))
        assert (labels.values == number).all()
        assert labels.values.dtype == dtype


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, 1e30, -1e30, 1 + 1e-6])
def test_what_is_no_whole_number_is_no_label(tmp_path: Path, value: float) -> None:
    values = np.ones((4, 5, 6), dtype=np.float64)
    values[0, 0, 0] = value
    path = saved(tmp_path / "a.nii", values)
    for read in (lambda: read_labels(path, LABELS), lambda: read_raw_labels(path)):
        with pytest.raises(InputError, match=r"a\.nii has label values that are not whole numbers"):
            read()


def test_a_number_that_is_not_listed_is_named(tmp_path: Path) -> None:
    values = (REAL % 3).astype(np.int16)
    values[0, 0, 0], values[1, 0, 0] = 7, -2
    with pytest.raises(InputError, match=r"has the value -2, 7, .*known: 0 background, 1 liver, 2 tumour"):
        read_labels(saved(tmp_path / "a.nii", values), LABELS)


def test_labels_have_one_channel(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii", np.zeros((4, 5, 6, 2), dtype=np.uint8))
    for read in (lambda: read_labels(path, LABELS), lambda: read_raw_labels(path)):
        with pytest.raises(InputError, match="2 channels"):
            read()


# ---- real files ---------------------------------------------------------------------------------

REFUSED = {
    "row_major.dconn.nii": "dimensions 1x1x1x1x10x10",
    "resampled_anat_moved.nii": "voxels that are NaN",
    "mtr.nii.gz": "633 voxels that are NaN",
}


@pytest.mark.parametrize(
    "folder", ["nifti-awkward", "ivadomed-spine-mr", "sct-spinalcord-mr", "msd-prostate-mask00", "msd-spleen2-crop"]
)
def test_real_files_are_read_as_nibabel_reads_them(shared_data: Path, folder: str) -> None:
    paths = sorted(p for p in (shared_data / folder).rglob("*.nii*") if is_nifti(p))
    assert paths
    for path in paths:
        if path.name in REFUSED:
            refused(path, REFUSED[path.name])
            continue
        ours, theirs = read_volume(path), nib.load(path)
        data = np.asanyarray(theirs.dataobj)
        expected = np.moveaxis(data.reshape(*data.shape[:3], -1), -1, 0)
        assert np.array_equal(ours.values, expected.astype(ours.values.dtype)), path
        assert ours.values.dtype.isnative
        assert np.array_equal(ours.grid.affine, theirs.affine), path
        assert ours.grid.orientation == "".join(nib.aff2axcodes(theirs.affine)), path


def test_a_decathlon_case_has_one_grid(shared_data: Path) -> None:
    task = shared_data / "Task04_Hippocampus"
    labels = LabelSet.from_names(["Anterior", "Posterior"])
    for path in sorted((task / "labelsTr").glob("[!.]*.nii.gz"))[::20]:
        label_map = read_labels(path, labels)
        assert read_volume(task / "imagesTr" / path.name).grid.matches(label_map.grid)
        assert set(np.unique(label_map.values)) == {0, 1, 2}


def test_headers_without_images_are_refused(shared_data: Path) -> None:
    for name in ("nifti1.hdr", "nifti2.hdr"):
        refused(shared_data / "nifti-awkward" / "nibabel" / name, "pair|truncated")

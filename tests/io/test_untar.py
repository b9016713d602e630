from __future__ import annotations

import contextlib
import gzip
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg.core.errors import InputError, MedsegError
from medseg.io import untar
from medseg.io.untar import unpack

GOOD = {
    "Task00_x/": b"",
    "Task00_x/dataset.json": b"{}",
    "Task00_x/imagesTr/": b"",
    "Task00_x/imagesTr/a.nii.gz": b"a" * 5000,
}


def member(kind: bytes, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.fixture
def tar(tmp_path: Path, packed: Callable[..., bytes]) -> Callable[[Mapping[str, Any]], Path]:
    def make(members: Mapping[str, Any]) -> Path:
        path = tmp_path / "a.tar"
        path.write_bytes(packed(members))
        (tmp_path / "out").mkdir(exist_ok=True)
        return path

    return make


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def test_files_come_out_as_they_went_in(tar: Any, tmp_path: Path) -> None:
    sizes = []
    large = os.urandom((1 << 20) + 5)
    path = tar({**GOOD, "./Task00_x/labelsTr/a.nii.gz": large, f"Task00_x/{'long' * 50}.nii.gz": b"l"})
    unpack(path, tmp_path / "out", "Task00_x", room=sizes.append)
    out = tmp_path / "out" / "Task00_x"
    assert tree(out) == sorted(["dataset.json", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", f"{'long' * 50}.nii.gz"])
    assert (out / "labelsTr" / "a.nii.gz").read_bytes() == large
    assert (out / "imagesTr" / "a.nii.gz").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert sizes == [4096 + 8192 + (1 << 20) + 4096 + 4096]


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def test_companions_of_a_mac_are_left_out(tar: Any, tmp_path: Path) -> None:
    mac = {"._Task00_x": b"m", "Task00_x/._dataset.json": b"m", "Task00_x/imagesTr/._a.nii.gz": b"m"}
    unpack(tar({**mac, **GOOD, "Task00_x/.DS_Store": b"m", "./": b""}), tmp_path / "out", "Task00_x")
    assert tree(tmp_path / "out") == ["Task00_x/dataset.json", "Task00_x/imagesTr/a.nii.gz"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"/etc/medseg": b"x"}, "leads out of it"),
        ({"../x": b"x"}, "leads out of it"),
        ({"Task00_x/../../x": b"x"}, "leads out of it"),
        ({"Task00_x\\..\\..\\x": b"x"}, "leads out of it"),
        ({"C:/x": b"x"}, "leads out of it"),
        ({"Task01_y/a.nii.gz": b"x"}, "outside the folder Task00_x"),
        ({"Task00_x_/a": b"x"}, "outside the folder"),
        ({"readme": b"x"}, "outside the folder"),
        ({"Task00_x/a": member(tarfile.SYMTYPE, "/etc/passwd")}, "a link"),
        ({"Task00_x/a": member(tarfile.SYMTYPE, "dataset.json")}, "a link"),
        ({"Task00_x/a": member(tarfile.LNKTYPE, "Task00_x/dataset.json")}, "a link"),
        ({"Task00_x/imagesTs": member(tarfile.SYMTYPE, "/tmp"), "Task00_x/imagesTs/a": b"x"}, "a link"),
        ({"Task00_x/a": member(tarfile.CHRTYPE)}, "neither a plain file nor a folder"),
        ({"Task00_x/a": member(tarfile.BLKTYPE)}, "neither a plain file nor a folder"),
        ({"Task00_x/a": member(tarfile.FIFOTYPE)}, "neither a plain file nor a folder"),
        ({"Task00_x/a": member(b"Z")}, "neither a plain file nor a folder"),
        ({"Task00_x/./dataset.json": b"x"}, "a file twice"),
        ({"Task00_x/dataset.json/a": b"x"}, "one path for a file and a folder"),
        ({"Task00_x/imagesTr": b"x"}, "one path for a file and a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_is_hostile_is_refused(tar: Any, tmp_path: Path, bad: Any, words: str) -> None:
    path = tar({**GOOD, **bad})
    with pytest.raises(InputError, match=words):
        unpack(path, tmp_path / "out", "Task00_x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "out"]
    if "path for a file" not in words:  # all else is seen before anything is written
        assert tree(tmp_path / "out") == []


def test_a_file_in_place_of_the_folder(tar: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outside the folder"):
        unpack(tar({"Task00_x": b"x"}), tmp_path / "out", "Task00_x")


@pytest.mark.parametrize("cut", [0, 100, 512, 3000, 5500])
def test_a_tar_that_is_cut_short(tar: Any, tmp_path: Path, cut: int) -> None:
    path = tar(GOOD)
    path.write_bytes(path.read_bytes()[: 4 * 512 + cut])
    if cut == 0:  # between two files: nothing in a tar tells
        unpack(path, tmp_path / "out", "Task00_x")
        return
    with pytest.raises(InputError, match=r"no sound|cut short"):
        unpack(path, tmp_path / "out", "Task00_x")


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 2000, b"\x1f\x8b" + b"x" * 600, gzip.compress(b"x" * 9000, mtime=0)],
    ids=["empty", "text", "begins as gzip", "gzip"],
)
def test_what_is_no_tar(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(InputError, match="no sound, uncompressed tar"):
        unpack(tmp_path / "a.tar", tmp_path, "Task00_x")


def test_a_sparse_file_that_grows_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 33)
    (tmp_path / "Task00_x").mkdir()
    (tmp_path / "big").rename(tmp_path / "Task00_x" / "a")
    subprocess.run(["tar", "-cSf", "a.tar", "Task00_x"], cwd=tmp_path, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1 << 16
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="neither a plain file"):
        unpack(tmp_path / "a.tar", tmp_path / "out", "Task00_x")


def test_too_many_files(tar: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untar, "_MOST_MEMBERS", 3)
    with pytest.raises(InputError, match="more than 3 files"):
        unpack(tar(GOOD), tmp_path / "out", "Task00_x")


def test_a_header_that_would_fill_the_memory_is_not_read(tar: Any, tmp_path: Path) -> None:
    path = tar(GOOD)
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    with path.open("r+b") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 34)
    with pytest.raises(InputError, match="no sound"):
        unpack(path, tmp_path / "out", "Task00_x")


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"99999999999\0"])
def test_sizes_that_cannot_be(tar: Any, tmp_path: Path, size: bytes) -> None:
    path = tar(GOOD)
    data = bytearray(path.read_bytes())
    data[512 + 124 : 512 + 136] = size
    data[512 + 148 : 512 + 156] = b" " * 8
    data[512 + 148 : 512 + 156] = b"%06o\0 " % sum(data[512:1024])
    path.write_bytes(data)
    with pytest.raises(InputError):
        unpack(path, tmp_path / "out", "Task00_x")


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_answered_in_words(data: Any, packed: Any, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    members = {**GOOD, f"Task00_x/{'é' * 120}": b"long"}
    whole = bytearray(packed(members))
    mended = data.draw(st.booleans())
    for _ in range(data.draw(st.integers(1, 4))):
        block = data.draw(st.sampled_from([b for b in range(len(whole) // 512) if any(whole[b * 512 : b * 512 + 99])]))
        at = block * 512 + data.draw(st.integers(0, 511))
        whole[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
        if mended and b"ustar" in whole[block * 512 : block * 512 + 512]:
            start = block * 512 + 148
            whole[start : start + 8] = b" " * 8
            whole[start : start + 8] = b"%06o\0 " % sum(whole[block * 512 : block * 512 + 512])
    (folder / "a.tar").write_bytes(whole)
    (folder / "out").mkdir()
    with contextlib.suppress(MedsegError):
        unpack(folder / "a.tar", folder / "out", "Task00_x")
    assert sorted(p.name for p in folder.iterdir()) == ["a.tar", "out"]
    assert all(p.name == "Task00_x" for p in (folder / "out").iterdir())
    assert not any(p.is_symlink() for p in (folder / "out").rglob("*"))


def test_a_disk_that_fills_up(tar: Any, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from medseg.io.untar import unpack\n"
        "from medseg.core.errors import MedsegError\n"
        "try: unpack(Path(sys.argv[1]), Path(sys.argv[2]), 'Task00_x')\n"
        "except MedsegError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tar({**GOOD, "Task00_x/b": b"b" * 100_000}), tmp_path / "out"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )
    assert done.stdout.startswith("MedsegError cannot unpack a.tar: File too large")
    assert done.stderr == ""

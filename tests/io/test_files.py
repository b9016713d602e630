from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from medseg.core.errors import InputError, MedsegError
from medseg.io import files
from medseg.io.files import (
    alone,
    atomic,
    check_room,
    new_folder,
    read_json,
    work_folder,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "a.txt"
    with atomic(path) as file:
        file.write(b"first ")
        assert not path.exists()
        file.write(b"second")
    assert path.read_bytes() == b"first second"
    assert names(path.parent) == ["a.txt"]


def test_what_was_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "a much longer text than the next")
    write_text(path, "Größe")
    assert path.read_bytes() == "Größe".encode()
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_nothing_is_left_behind_by_a_block_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write() -> None:
        with atomic(path) as file:
            file.write(b"new")
            raise InputError("wrong", "Mend it") if error is InputError else error()

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_process_that_is_killed_leaves_nothing_and_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    code = (
        "import os, sys; from pathlib import Path; from medseg.io.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as file: file.write(b'new'); file.flush(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_where_a_file_needs_a_name_it_has_one_until_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_OPEN_FILES", str(tmp_path / "none"))
    with atomic(tmp_path / "a.txt") as file:
        file.write(b"new")
        assert [name.split(".")[-1] for name in names(tmp_path)] == ["part"]
    assert (tmp_path / "a.txt").read_bytes() == b"new"
    assert names(tmp_path) == ["a.txt"]


def test_work_in_a_folder_that_was_moved_meanwhile_does_not_end_as_if_it_were_done(tmp_path: Path) -> None:
    def moved() -> None:
        with alone(tmp_path / "run" / "lock", "train"):
            (tmp_path / "run").rename(tmp_path / "away")
            write_text(tmp_path / "run" / "result", "made anew")

    with pytest.raises(MedsegError, match=r"run was moved or deleted during train;.* Put the old one back"):
        moved()


def test_a_second_one_is_refused_or_waits_and_is_told_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOOK", 0.01)
    lock, told = tmp_path / "lock", []
    first = alone(lock, "train")
    first.__enter__()
    with pytest.raises(MedsegError, match=rf"train is at work in .* \(process {os.getpid()} on "):
        alone(lock, "train").__enter__()

    def waiting(text: str) -> None:
        told.append(text)
        first.__exit__(None, None, None)

    with alone(lock, "train", waiting):
        assert [text.split("; ")[-1] for text in told] == ["waiting for its end"]
    assert lock.read_text() == ""


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MedsegError, match=r"cannot write .*a\.txt: No space left on device.*free some space") as caught:
        write_text(path, "new")
    assert caught.value.exit_status == 1
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_limit_on_file_size_is_a_full_disk(tmp_path: Path) -> None:
    """The kernel refuses in the middle of the write, in a child so that the limit stays there."""
    program = """
import signal, sys
from pathlib import Path
from types import SimpleNamespace
from medseg.core.errors import MedsegError
from medseg.io.files import atomic, check_room, new_folder, read_json, work_folder, write_bytes, write_json, write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    write_bytes(Path(sys.argv[1]), bytes(1 << 20))
except MedsegError as error:
    print(error)
"""
    path = tmp_path / "big.bin"
    write_bytes(path, b"old")
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )
    assert "File too large" in done.stdout
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["big.bin"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_what_the_umask_leaves(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_a_folder_that_cannot_be_is_an_error_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.txt", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(MedsegError, match="cannot write"):
            write_text(path, "x")
    assert names(tmp_path) == ["file", "folder"]


def test_json_goes_round(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "ü": "Größe"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value == json.loads((tmp_path / "a.json").read_text())
    assert (tmp_path / "a.json").read_text().endswith("}\n")


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe\xfd", b"[" * 100_000, b'{"a": NaN}', b"[-Infinity]", b"{'a': 1}"]
)
def test_what_is_not_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.json cannot be read as JSON .*Mend it"):
        read_json(tmp_path / "a.json", "Mend it")


def test_json_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json is missing\. Plan first\."):
        read_json(tmp_path / "a.json", "Plan first")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)


def test_a_folder_may_be_new_empty_or_ones_own(tmp_path: Path) -> None:
    new = new_folder(tmp_path / "a" / "b", holds="plan.json")
    assert new.is_dir()
    assert new_folder(new, holds="plan.json") == new
    (new / ".DS_Store").touch()
    new_folder(new, holds="plan.json")
    (new / "other.txt").touch()
    (new / "plan.json").touch()
    new_folder(new, holds="plan.json")


def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"holds something else \(a, b, c, \.\.\.\)\. Name a folder that is new"):
        new_folder(tmp_path, holds="plan.json")
    with pytest.raises(InputError, match="is a file"):
        new_folder(tmp_path / "a", holds="plan.json")
    with pytest.raises(InputError, match="cannot make the folder"):
        new_folder(tmp_path / "a" / "b", holds="plan.json")
    assert names(tmp_path) == ["a", "b", "c", "d"]


# ---- room and folders to work in ----------------------------------------------------------------


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 << 30))
    check_room(tmp_path, 3 << 30, "it")
    with pytest.raises(MedsegError, match=r"it needs 4\.5 GiB in .*, where 3\.0 GiB are free: 1\.5 GiB are missing"):
        check_room(tmp_path, 9 << 29, "it")


def test_a_folder_to_work_in_is_empty_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "made" / ".work"
    (path / "left").mkdir(parents=True)
    (path / "left" / "by a killed one").touch()
    (path / "link").symlink_to(tmp_path)
    with work_folder(path) as folder:
        assert folder == path
        assert not list(path.iterdir())
        (path / "a").mkdir()
        with pytest.raises(MedsegError, match="another process works in"), work_folder(path):
            pass
        assert names(path) == ["a"]
    assert not path.exists()
    assert tmp_path.exists()
    with pytest.raises(FileNotFoundError), work_folder(path):
        raise FileNotFoundError
    assert not path.exists()
    path.touch()
    with pytest.raises(MedsegError, match="cannot make the folder"), work_folder(path):
        pass

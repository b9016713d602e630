"""Unpacking a tar that anyone may have packed."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from medseg.core.errors import InputError, MedsegError
from medseg.core.progress import Progress, silent
from medseg.io.sources import climbs_out

_BLOCK = 1 << 20
# The largest task of the Decathlon has some 1000 files.
_MOST_MEMBERS = 100_000
_REMEDY = "Do not trust it; get it from somewhere else"
_NOT_SOUND = (tarfile.TarError, ValueError, RecursionError, OverflowError, EOFError, LookupError)


class _Careful(io.BufferedReader):
    """A file of which nothing is read at once that a header alone says is there: tarfile reads long names and
    extended headers whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _BLOCK:
            raise tarfile.ReadError("a header is too long")
        return super().read(size)


def unpack(
    path: Path,
    folder: Path,
    top: str,
    *,
    room: Callable[[int], None] = lambda size: None,
    progress: Progress = silent,
) -> None:
    """Write the files of a plain tar, all of which lie in its folder ``top``, below ``folder``.

    Companions that a Mac leaves (``._*``, ``.DS_Store``) are left out. Everything is looked at before anything is
    written: ``room`` is told the bytes to come and may raise. Owners, modes and times are those of new files.

    Raises InputError, without a name from the archive, for one that is damaged or compressed, and for one with
    absolute paths, ``..``, links, devices, sparse files, a file twice, files outside ``top``, or more than it can
    hold. Raises MedsegError where the disk is full.
    """
    try:
        with _Careful(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            wanted = _survey(archive, path, folder, top)
            file.seek(archive.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a header that it cannot read for the end
                raise tarfile.ReadError("unsound header")
            size = sum(-(-member.size // 4096) * 4096 for member, _ in wanted)
            room(size)
            rows = _written(archive, wanted, folder, path)
            for _ in progress(rows, sum(member.size // _BLOCK for member, _ in wanted)):
                pass
    except _NOT_SOUND:
        raise InputError(f"{path.name} is no sound, uncompressed tar", "Get it again") from None
    except OSError as error:
        raise MedsegError(f"cannot read {path}: {error.strerror or error}") from error


def _survey(
    archive: tarfile.TarFile, path: Path, folder: Path, top: str
) -> list[tuple[tarfile.TarInfo, PurePosixPath]]:
    """The members to write and their paths. Raises InputError for what is hostile."""
    wanted, seen, size, most = [], set(), 0, path.stat().st_size
    for number, member in enumerate(archive, start=1):
        if member.size < 0 or number > _MOST_MEMBERS:
            raise InputError(f"{path.name} holds more than {_MOST_MEMBERS} files, or less than none", _REMEDY)
        name = PurePosixPath(member.name)
        if not name.parts or name.name.startswith("._") or name.name == ".DS_Store":
            continue
        if fault := _fault_of(member, name, top):
            raise InputError(f"{path.name} {fault}", _REMEDY)
        if hasattr(tarfile, "data_filter"):  # the word of Python's own authors too, where it is new enough
            tarfile.data_filter(member, str(folder))
        if member.isdir():
            continue
        size += member.size
        if name in seen or size > most:
            fault = "has a file twice" if name in seen else "is cut short, or says that it holds more than it can"
            raise InputError(f"{path.name} {fault}", _REMEDY)
        seen.add(name)
        wanted.append((member, name))
    return wanted


def _fault_of(member: tarfile.TarInfo, name: PurePosixPath, top: str) -> str | None:
    """What is hostile about a member, its name left unsaid."""
    if climbs_out(member.name):
        return "has a file whose path leads out of it"
    if name.parts[0] != top or (len(name.parts) == 1 and not member.isdir()):
        return f"has something outside the folder {top}"
    if member.issym() or member.islnk():
        return "has a link in it"
    if not (member.isfile() or member.isdir()) or member.issparse():
        return "has something in it that is neither a plain file nor a folder"
    return None


def _written(
    archive: tarfile.TarFile, wanted: list[tuple[tarfile.TarInfo, PurePosixPath]], folder: Path, path: Path
) -> Iterator[None]:
    """Write the members; a row for each whole MiB."""
    for member, name in wanted:
        stream = archive.extractfile(member)
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as file:
                for block in _blocks(stream, member.size):
                    file.write(block)
                    if len(block) == _BLOCK:
                        yield
                file.flush()
                os.fsync(file.fileno())
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise InputError(f"{path.name} has one path for a file and a folder", _REMEDY) from None
        except OSError as error:
            raise MedsegError(
                f"cannot unpack {path.name}: {error.strerror or error}. Free some space, or choose another folder"
            ) from error


def _blocks(stream: IO[bytes] | None, size: int) -> Iterator[bytes]:
    """``size`` bytes, or tarfile.ReadError."""
    while size and stream is not None:
        block = stream.read(min(_BLOCK, size))
        if not block:
            raise tarfile.ReadError("unexpected end of data")
        size -= len(block)
        yield block

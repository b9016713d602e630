"""Where the bytes of a scan come from: a file, a gzipped file, the files of a folder, a zip.

A zip is read in place. Nothing of it is ever written, so no path in it can climb out, and no more
than one member is in memory at a time.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from isal import igzip, igzip_lib

from medseg.core.errors import InputError

# Deflate packs no more than 1032 bytes into one.
_DEFLATE_RATIO = 1032
# No honest file of a scan is larger; a multi-frame object of 2000 slices of 512x512 has 1 GiB.
_LARGEST_BYTES = 1 << 32
_NOT_SOUND: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    EOFError,
    igzip.BadGzipFile,
    igzip_lib.IsalError,  # type: ignore[assignment]
)
# What a zip does that has a file where it also has a folder, or one twice.
_IN_THE_WAY: tuple[type[Exception], ...] = (FileExistsError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True, eq=False)
class Source:
    """One file: on disk, or a member of a zip. The name is left out of its text: scanners and
    archives write patients' names and identifiers into file names."""

    path: Path = field(repr=False)
    member: str | None = field(default=None, repr=False)
    archive: zipfile.ZipFile | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return Path(self.member or self.path).name

    def open(self) -> BinaryIO:
        """The bytes, unpacked where the file is gzipped, to be read from the start.

        Raises InputError where they cannot be read or unpack to more than 4 GiB.
        """
        try:
            if self.archive is not None and self.member is not None:
                return io.BytesIO(self.archive.read(self.member))
            file = self.path.open("rb")
            if file.read(2) != b"\x1f\x8b":
                file.seek(0)
                return file
            with file:
                file.seek(0)
                return io.BytesIO(_unpacked(file))
        except _NOT_SOUND:
            raise InputError("an archive is damaged or unpacks to more than it says", "Pack it again") from None
        except OSError as error:
            raise InputError(f"a file cannot be read ({error.strerror or 'damaged'})", "Copy it again") from None


def _unpacked(file: BinaryIO) -> bytes:
    most = min(os.fstat(file.fileno()).st_size * _DEFLATE_RATIO, _LARGEST_BYTES)
    with igzip.open(file, "rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise InputError("a gzipped file unpacks to more than 4 GiB", "Unpack it yourself, and look what it is")
    return data


def find_sources(path: Path) -> list[Source]:
    """The files that ``path`` stands for: itself, those below a folder, or the members of a zip.

    Hidden files are left out. In the order of their names, which says nothing about the order of
    slices. Raises InputError for what is missing and for a zip that is damaged, locked or hostile.
    """
    if path.is_dir():
        found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        return [Source(p) for p in sorted(found) if not p.name.startswith(".") and p.is_file()]
    if not path.is_file():
        raise InputError(f"{path} is missing", "Name a file, a folder or a zip that is there")
    return _members(path) if is_zip(path) else [Source(path)]


@contextlib.contextmanager
def unpacked(path: Path, wanted: Callable[[str], bool], *, most: int) -> Iterator[Path]:
    """A folder as it is, or the files of a zip whose paths are ``wanted``, in a folder that goes away
    again.

    Raises InputError for a zip that is damaged, locked or hostile, or holds more than ``most`` bytes.
    """
    if not is_zip(path):
        if not path.is_dir():
            raise InputError(f"{path} is {'no zip' if path.exists() else 'missing'}", "Name a folder or a zip")
        yield path
        return
    members = [source for source in _members(path) if source.member and wanted(source.member)]
    size = sum(s.archive.getinfo(s.member).file_size for s in members if s.archive and s.member)
    if size > most:
        raise InputError(f"{path.name} unpacks to {size >> 20} MiB", "Unpack it yourself, and look what it is")
    with tempfile.TemporaryDirectory(prefix="medseg-") as folder:
        for source in members:
            _unpack(source, Path(folder), path.name)
        yield Path(folder)


def _unpack(source: Source, folder: Path, name: str) -> None:
    """Write a member, whose path has been found to stay inside, below a folder."""
    if source.archive is None or source.member is None:
        return
    target = folder / source.member
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.archive.open(source.member) as packed, target.open("xb") as file:
            shutil.copyfileobj(packed, file)
    except _NOT_SOUND + _IN_THE_WAY:
        raise InputError(f"{name} is damaged: a file in it cannot be unpacked", "Get it again") from None


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def is_dicom(source: Source) -> bool:
    """Whether a file begins as DICOM does. Raises InputError where it cannot be read."""
    with source.open() as file:
        start = file.read(132)
    # Old files have no preamble and begin with group 2 or 8, in either byte order.
    return start[128:] == b"DICM" or start[:3] in (b"\x02\0\0", b"\x08\0\0", b"\0\x08\0", b"\x08\0\x05")


def _members(path: Path) -> list[Source]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError):
        raise InputError(f"{path.name} is not a sound zip", "Pack it again") from None
    members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
    for member in members:
        if fault := _fault_of(member):
            raise InputError(f"{path.name} {fault}", "Do not trust it; ask for the scan again")
    ends = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        if member.header_offset < ends:
            raise InputError(f"{path.name} packs one file into another", "Do not trust it; ask for the scan again")
        ends = member.header_offset + member.compress_size
    visible = (m for m in members if not PurePosixPath(m.filename).name.startswith("."))
    return [Source(path, m.filename, archive) for m in visible]


def _fault_of(member: zipfile.ZipInfo) -> str | None:
    """What is hostile about a member of a zip, its name left unsaid."""
    if climbs_out(member.filename):
        return "has a file whose path leads out of it"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "has a link in it"
    if member.flag_bits & 1:
        return "is locked with a password"
    if member.file_size > max(member.compress_size, 1) * _DEFLATE_RATIO or member.file_size > _LARGEST_BYTES:
        return "says that it unpacks to more than it can hold"
    return None


def climbs_out(name: str) -> bool:
    """Whether a path, of whatever system, is absolute or goes up."""
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    return ".." in parts or name.startswith(("/", "\\")) or bool(PureWindowsPath(name).drive) or "\0" in name

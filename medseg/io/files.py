"""Writing so that a killed run or a full disk never leaves half a file; reading JSON strictly."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from medseg.core.errors import InputError, MedsegError
from medseg.core.words import size

# Where Linux shows a process the files that it has open.
_OPEN_FILES = "/proc/self/fd"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name whole or not at all.

    It has no name until the block ends, so that a process that is killed leaves nothing behind; where the file
    system has no such files, as NFS, it stands beside its place until then. Gone when the block raises.
    Raises MedsegError where the disk is full or the folder cannot be written.
    """
    # Not tempfile: its files are private, and open() gives them the mode that the umask asks for.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        nameless = _nameless(path.parent)
        with nameless or temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if nameless:
                # With a folder to start from, though none is needed, since os.link follows no link without.
                os.link(f"{_OPEN_FILES}/{file.fileno()}", temporary, src_dir_fd=file.fileno(), follow_symlinks=True)
        temporary.replace(path)
    except OSError as error:
        raise MedsegError(
            f"cannot write {path}: {error.strerror or error}. Nothing was left half written; "
            "free some space or choose another folder and run the command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; and nothing may hide the first error
            temporary.unlink()


def _nameless(folder: Path) -> BinaryIO | None:
    """A new file in a folder that is gone with its process unless it is given a name; None where there are none such,
    or none can be made, of which whoever makes one with a name is told why."""
    if not Path(_OPEN_FILES).is_dir():
        return None
    try:
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb")
    except OSError:
        return None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, readable, refusing NaN (which JSON has no word for)."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    # Lists of numbers on one line. No JSON string holds a raw line break, so none is touched.
    text = re.sub(r"\[\n[^\[\]{}\"]*\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    write_text(path, text + "\n")


def read_json(path: Path, remedy: str = "Write it anew") -> Any:
    """What a JSON file holds. Raises InputError where it is missing or not JSON, NaN included."""
    try:
        return json.loads(path.read_bytes(), parse_constant=_no_constant)
    except FileNotFoundError:
        raise InputError(f"{path} is missing", remedy) from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})", remedy) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


# How often one that waits for another looks whether it has ended.
_LOOK = 1.0


@contextlib.contextmanager
def alone(lock: Path, work: str, waiting: Callable[[str], object] | None = None) -> Iterator[None]:
    """Nobody else holds the file ``lock`` meanwhile, on this machine or, where the file system tells machines of each
    other's locks, on another. It is let go of when its process ends, however that ends.

    Where another holds it, ``waiting`` is told who that is, and it is waited for; without, MedsegError. ``work``
    says in a few words what is being done. Where the file system has no locks at all, nothing is waited for.
    Raises MedsegError at the end, too, where the lock is gone by then: its folder was moved, and one that was
    written since would be another of the same name.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+")
    except OSError as error:
        raise MedsegError(f"cannot write {lock.parent}: {error.strerror or error}. Choose another folder.") from error
    with file:
        if not _took(file.fileno()):
            file.seek(0)
            other = f"{work} is at work in {lock.parent} ({file.read(200).strip() or 'unknown'})"
            if waiting is None:
                raise MedsegError(f"{other}. Wait until it has ended, or stop it.")
            waiting(f"{other}; waiting for its end")
            while not _took(file.fileno()):
                time.sleep(_LOOK)
        _sign(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            yield
        finally:
            _sign(file.fileno(), "")
        if not lock.exists():
            raise MedsegError(
                f"{lock.parent} was moved or deleted during {work}; what was written since may lie in a new folder of "
                "that name. Put the old one back in its place and run the command again."
            )


def _sign(file: int, text: str) -> None:
    """Say in a lock who has it; on a full disk nobody is told, but the lock holds."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode(), 0)


def _took(file: int) -> bool:
    """Whether the lock was had, or there are none to be had here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def new_folder(path: Path, *, holds: str) -> Path:
    """A folder to write to: new, empty, or one that this command wrote before.

    ``holds`` names the file by which such a folder is known when it is whole; until then a hidden
    file of that name marks it. Raises InputError where the folder holds something else, so that
    nothing of someone else's is mixed in or written over.
    """
    marker = path / f".{holds}"
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", "Name a folder that is new or empty")
    if path.is_dir() and not (path / holds).exists() and not marker.exists():
        strangers = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
        if strangers:
            raise InputError(
                f"the output folder {path} holds something else ({', '.join(strangers[:3])}"
                f"{', ...' if len(strangers) > 3 else ''})",
                "Name a folder that is new or empty",
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise InputError(f"cannot make the folder {path} ({error.strerror})", "Name another folder") from None
    return path


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise MedsegError where the disk of a folder has less than so many bytes free, saying how much is missing."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MedsegError(
            f"{what} needs {size(needed)} in {folder}, where {size(free)} are free: {size(needed - free)} are missing. "
            "Free them, or choose another folder."
        )


@contextlib.contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A folder to work in: of this process alone, empty, and gone when the block ends.

    What a killed process left there is removed. Raises MedsegError where another process works in it or it cannot
    be made.
    """
    try:
        handle = _locked(path)
        _empty(path)
    except OSError as error:
        raise MedsegError(f"cannot make the folder {path}: {error.strerror}. Choose another folder.") from error
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # what stays is removed by the next; nothing may hide the first error
            _empty(path)
            path.rmdir()
        os.close(handle)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _locked(path: Path) -> int:
    """A handle of a folder, which is locked until that is closed."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if not _took(handle):
            os.close(handle)
            raise MedsegError(f"another process works in {path}. Wait until it has ended.")
        # Whoever had it before may have removed it since it was opened.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
            return handle
        os.close(handle)

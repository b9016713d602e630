"""A folder to work in: is there room, is it fast, and does its file system keep its promises?"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from medseg.core.finding import Finding, Verdict

_MIB, _GIB = 2**20, 2**30
_SIZE = 64 * _MIB
_SMALL, _SMALL_SECONDS = 200, 3.0
_LEAST_FREE, _EASY_FREE, _EASY_ENTRIES = 1 * _GIB, 10 * _GIB, 10_000
_SLOW_MIB_S, _SLOW_SMALL = 20.0, 30.0
_SKEW, _FAR_SKEW = 2.0, 60.0


@dataclass(frozen=True)
class Disk:
    """Facts of a folder. ``fault``: why nothing can be written there, "" where that works; all others are then
    what they are without. ``free`` in bytes, ``entries`` the files that may still be made (None: without a limit),
    ``renames``: a file takes another's place whole. ``locks``: a lock holds others off. ``skew``: seconds
    by which its times differ from this machine's clock. Rates, None where they were not measured: MiB a second
    written to the disk and read from it, and small files written to it a second."""

    kind: str = ""
    fault: str = ""
    free: int = 0
    entries: int | None = None
    renames: bool = False
    locks: bool = False
    skew: float = 0.0
    write: float | None = None
    read: float | None = None
    small: float | None = None


def look_at_disk(folder: Path, *, timed: bool = True) -> Disk:
    """Try a folder, in a folder of its own there that is taken away again; ``timed`` writes 64 MiB too."""
    try:
        with tempfile.TemporaryDirectory(prefix=".medseg-doctor-", dir=folder, ignore_cleanup_errors=True) as place:
            room = os.statvfs(place)
            written, read = _throughput(Path(place)) if timed else (None, None)
            return Disk(
                kind=_kind(folder),
                free=room.f_bavail * room.f_frsize,
                entries=room.f_favail if room.f_files else None,
                renames=_renames(Path(place)),
                locks=_locks(Path(place)),
                skew=_skew(Path(place)),
                write=written,
                read=read,
                small=_small_files(Path(place)) if timed else None,
            )
    except OSError as error:
        return Disk(fault=_words(error))


def judge_disk(disk: Disk, name: str) -> list[Finding]:
    """Is it fit for runs? ``name`` is what the folder shall be called."""
    if disk.fault:
        return [
            Finding("disk", "problem", f"{name} cannot be used: {disk.fault}", "Name another folder, or have it mended")
        ]
    return [
        *_judge_room(disk, name),
        *_judge_promises(disk, name),
        *_judge_times(disk, name),
        *_judge_speed(disk, name),
    ]


def _judge_room(disk: Disk, name: str) -> Iterator[Finding]:
    text = f"{name}: {disk.free / _GIB:.3g} GiB free{f' ({disk.kind})' if disk.kind else ''}"
    if disk.free < _EASY_FREE:
        word: Verdict = "problem" if disk.free < _LEAST_FREE else "note"
        yield Finding("disk", word, text, "Clean up, ask for a larger quota, or name another folder")
    else:
        yield Finding("disk", "ok", text)
    if disk.entries is not None and disk.entries < _EASY_ENTRIES:
        yield Finding("disk", "note", f"{name}: room for {disk.entries} more files only", "Remove small files there")


def _judge_promises(disk: Disk, name: str) -> Iterator[Finding]:
    if not disk.renames:
        yield Finding(
            "disk", "problem", f"{name}: no file can take another's place whole: results could be half written",
            "Work in a folder on another file system",
        )  # fmt: skip
    if not disk.locks:
        yield Finding(
            "disk", "problem", f"{name}: files cannot be locked (flock), so two jobs at one work would not take turns",
            "Have it mounted with locks (Lustre: -o flock; NFS: with its lock service), or work on a local disk",
        )  # fmt: skip
    if disk.renames and disk.locks:
        yield Finding("disk", "ok", f"{name}: files are renamed whole and can be locked")


def _judge_times(disk: Disk, name: str) -> Iterator[Finding]:
    if abs(disk.skew) > _SKEW:
        word: Verdict = "problem" if abs(disk.skew) > _FAR_SKEW else "note"
        yield Finding(
            "disk", word, f"{name}: its file times are {abs(disk.skew):.0f} s "
            f"{'ahead of' if disk.skew > 0 else 'behind'} this machine's clock",
            "Let server and machine take their time from one source (chrony, ntp): the workflow tells by file times "
            "what is to be done",
        )  # fmt: skip


def _judge_speed(disk: Disk, name: str) -> Iterator[Finding]:
    if disk.write is None or disk.read is None or disk.small is None:
        return
    text = f"{name}: {disk.write:.0f} MiB/s written, {disk.read:.0f} MiB/s read, {disk.small:.0f} small files/s"
    if disk.write < _SLOW_MIB_S or disk.read < _SLOW_MIB_S or disk.small < _SLOW_SMALL:
        yield Finding(
            "disk", "note", f"{text}, which is slow", "Put runs (`-o`) on a local disk or on the cluster's scratch"
        )
    else:
        yield Finding("disk", "ok", text)


# ---- looking ------------------------------------------------------------------------------------


def _kind(folder: Path) -> str:
    """The file system's kind, as ext4 or nfs4; "" where Linux does not say."""
    place = folder.resolve()
    with contextlib.suppress(OSError):
        mounts = [one for one in psutil.disk_partitions(all=True) if place.is_relative_to(one.mountpoint)]
        return max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else ""
    return ""


def _throughput(place: Path) -> tuple[float, float]:
    """MiB a second, to the disk and from it: pages that are kept in memory are let go of in between."""
    block, path = os.urandom(_MIB), place / "large"
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(_SIZE // _MIB):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(_MIB):
            pass
    read = time.perf_counter() - started
    path.unlink()
    return _SIZE / _MIB / max(written, 1e-6), _SIZE / _MIB / max(read, 1e-6)


def _small_files(place: Path) -> float:
    """Files of 4 KiB a second, each on the disk before the next."""
    started, done = time.perf_counter(), 0
    while done < _SMALL and time.perf_counter() - started < _SMALL_SECONDS:
        with (place / f"small{done}").open("xb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        done += 1
    return done / (time.perf_counter() - started)


def _renames(place: Path) -> bool:
    """Whether a file that is renamed takes another's place, and whoever had that one open still reads it whole."""
    old, new = place / "old", place / "new"
    try:
        old.write_bytes(b"old")
        new.write_bytes(b"new")
        with old.open("rb") as before:
            new.replace(old)
            return before.read() == b"old" and old.read_bytes() == b"new" and not new.exists()
    except OSError:
        return False


def _locks(place: Path) -> bool:
    """Whether a second lock on a file is refused while there is a first."""
    path = place / "lock"
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _skew(place: Path) -> float:
    """Seconds by which a new file's time is ahead of the clock; 0 where it lies between before and after."""
    path = place / "now"
    before = time.time()
    path.write_bytes(b"now")
    stamp, after = path.stat().st_mtime, time.time()
    return min(stamp - before, 0.0) if stamp < after else stamp - after


def _words(error: OSError) -> str:
    if error.errno == errno.EDQUOT:
        return "the quota is used up"
    return (error.strerror or "it cannot be written").lower()

"""The archives of the Medical Segmentation Decathlon: where they are, how they are known, and how one becomes a
task."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path

import medseg
from medseg.core.errors import InputError, MedsegError
from medseg.core.progress import Progress, silent
from medseg.io.fetch import Digests, Patience, UnavailableError, digests, download, forget, place
from medseg.io.files import check_room, work_folder, write_json
from medseg.io.untar import unpack

SOURCES = "SOURCES.json"
_INDEX = "dataset.json"


@dataclass(frozen=True)
class Archive:
    """One task's: how many cases with and without labels it holds, and the MD5 it is known by."""

    training: int
    test: int
    md5: str


@dataclass(frozen=True)
class Catalogue:
    """The tasks by name, the addresses that their archives lie below, and on what terms."""

    bases: tuple[str, ...]
    licence: str
    citation: str
    archives: Mapping[str, Archive]


@dataclass(frozen=True)
class Fetched:
    """The folder of a task, and whether it was there already."""

    folder: Path
    was_there: bool


@dataclass(frozen=True)
class _Found:
    """An archive whose checksum is right; ``url`` is None for a file that was there."""

    path: Path
    url: str | None
    known_by: Digests


@dataclass(frozen=True)
class _Right:
    """What the right archive is known by: its SHA-256 where that was given, else its MD5."""

    md5: str
    sha256: str | None

    @property
    def by(self) -> str:
        return "sha256" if self.sha256 else "md5"

    def fault(self, found: Digests) -> str | None:
        """What is wrong with a file, in words that follow on its place; None for the right one."""
        is_, wanted = (found.sha256, self.sha256) if self.sha256 else (found.md5, self.md5)
        word = "SHA-256" if self.sha256 else "MD5"
        return None if is_ == wanted else f"is another file: its {word} is {is_}, not {wanted}"


@dataclass(frozen=True)
class _Watch:
    """Who is told how it is getting on: a bar for each of its stages, and lines."""

    bar: Callable[[str], Progress]
    tell: Callable[[str], None]


@cache
def catalogue() -> Catalogue:
    """The ten tasks."""
    table = json.loads((files("medseg.dataset") / "decathlon.json").read_text("utf-8"))
    archives = {name: Archive(**entry) for name, entry in table["tasks"].items()}
    return Catalogue(tuple(table["bases"]), table["licence"], table["citation"], archives)


def fetch_task(
    name: str,
    folder: Path,
    *,
    mirrors: Sequence[str] = (),
    archive: Path | None = None,
    sha256: str | None = None,
    keep_archive: bool = False,
    known: Catalogue | None = None,
    patience: Patience = Patience(),  # noqa: B008  # frozen
    progress: Callable[[str], Progress] = lambda stage: silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Fetched:
    """Bring a task of the Decathlon to ``folder / name``, whole or not at all.

    Its archive is ``archive``, if given; else the one kept in ``folder``, that of the first of the ``mirrors``
    (addresses or folders) that has the right one, or that of the catalogue's own addresses. It is the right one if
    its SHA-256 is ``sha256``, where that is given, or else its MD5 that of the catalogue. What is downloaded is
    ``folder / .NAME.tar.part`` until the task is there, and a later call goes on with it; ``keep_archive`` makes it
    NAME.tar, in place of a wrong one. All other files that were there stay as they are. ``SOURCES.json`` in the
    task's folder says where it is from.

    Raises InputError for a name that is none of the Decathlon's, a mirror that has no sound address, an ``archive``
    that is another file, a hostile one, and where something else is in the task's place. Raises MedsegError where
    no mirror gives the file or the disk has no room.
    """
    known = known or catalogue()
    if name not in known.archives:
        close = difflib.get_close_matches(name, known.archives, 1, 0.5)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise InputError(f"{name!r} is no task of the Decathlon", f"{hint}`medseg fetch --list` names them")
    target, part, kept = folder / name, folder / f".{name}.tar.part", folder / f"{name}.tar"
    places: list[str | Path] = [kept] if kept.exists() else []
    places += [place(base, kept.name) for base in (*mirrors, *known.bases)]
    if _is_there(target) and not part.exists():
        return Fetched(target, was_there=True)
    right = _Right(known.archives[name].md5, sha256.lower() if sha256 else None)
    watch = _Watch(progress, tell)
    with work_folder(folder / f".{name}.part") as work:
        if _is_there(target):  # by another process, or by one that was killed at its very end
            forget(part)
            return Fetched(target, was_there=True)
        found = _given(archive, right, watch) if archive else _first(places, part, right, patience, watch)
        if keep_archive and found.url:
            found = replace(found, path=part.replace(kept))
        try:
            _unpack(found, work, name, watch)
        except InputError:
            forget(part)
            raise
        write_json(work / name / SOURCES, _sources(found, name, known, right))
        try:
            (work / name).rename(target)
            forget(part)
        except OSError as error:
            raise MedsegError(f"cannot write {target}: {error.strerror}") from error
    return Fetched(target, was_there=False)


def _is_there(target: Path) -> bool:
    """Whether the task is there. Raises InputError where something else is."""
    if (target / _INDEX).is_file():
        return True
    if target.exists() or target.is_symlink():
        raise InputError(
            f"{target} is there and is no whole task: it has no {_INDEX}", "Move it away, or name another folder by -o"
        )
    return False


def _given(path: Path, right: _Right, watch: _Watch) -> _Found:
    try:
        return _of_file(path, right, watch)
    except UnavailableError as error:
        raise InputError(str(error), "Name the task's own archive, or leave --archive out to download it") from None


def _of_file(path: Path, right: _Right, watch: _Watch) -> _Found:
    if not path.is_file():
        raise UnavailableError(f"{path} is no file")
    known_by = digests(path, watch.bar("check"))
    if fault := right.fault(known_by):
        raise UnavailableError(f"{path} {fault}")
    return _Found(path, None, known_by)


def _first(places: Sequence[str | Path], part: Path, right: _Right, patience: Patience, watch: _Watch) -> _Found:
    """The right archive from the first place that has it."""
    faults = []
    for where in places:
        try:
            if isinstance(where, Path):
                return _of_file(where, right, watch)
            return _downloaded(where, part, right, patience, watch)
        except UnavailableError as error:
            faults.append(str(error))
            watch.tell(faults[-1])
    kept = " What came so far is kept, and the same command goes on with it." if part.exists() else ""
    raise MedsegError(
        f"the archive was not to be had: {'; '.join(faults)}.{kept} Name another place by --mirror, "
        "or a file by --archive."
    )


def _downloaded(url: str, part: Path, right: _Right, patience: Patience, watch: _Watch) -> _Found:
    def room(total: int, missing: int) -> None:
        check_room(part.parent, missing + total, "the download, with as much again to unpack it,")

    while True:
        bar = watch.bar("download")
        pieced = download(url, part, room=room, patience=patience, progress=bar, tell=watch.tell)
        known_by = digests(part, watch.bar("check"))
        fault = right.fault(known_by)
        if not fault:
            return _Found(part, url, known_by)
        forget(part)
        if not pieced:
            raise UnavailableError(f"{url} {fault}. It was removed")
        watch.tell(f"{url}: the pieces do not make the right file; once more as a whole")


def _unpack(found: _Found, work: Path, name: str, watch: _Watch) -> None:
    def room(size: int) -> None:
        check_room(work, size, name)

    unpack(found.path, work, name, room=room, progress=watch.bar("unpack"))
    if not (work / name / _INDEX).is_file():
        raise InputError(f"{found.path.name} holds no {name}/{_INDEX}", "Get the archive from somewhere else")


def _sources(found: _Found, name: str, known: Catalogue, right: _Right) -> dict[str, object]:
    """Where a task is from. Of a file that was there the name alone: its folder says who has it."""
    return {
        "format": 1,
        "task": name,
        "url": found.url,
        "archive": f"{name}.tar" if found.url else found.path.name,
        "bytes": found.known_by.size,
        "md5": found.known_by.md5,
        "sha256": found.known_by.sha256,
        "checked_by": right.by,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "licence": known.licence,
        "citation": known.citation,
        "medseg": medseg.__version__,
    }

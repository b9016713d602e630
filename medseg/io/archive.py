"""Many scans as an array of shards: the manifest that deals them, and the log that each shard keeps.

A folder that ``medseg archive deal`` made holds ``manifest.jsonl``, ``shards/`` with a log for each shard, and
``results/`` in folders of at most a thousand scans, each of one shard alone: no two shards write one file or folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from medseg.core.errors import InputError, MedsegError
from medseg.io.files import atomic
from medseg.io.scan import scan_stem

MANIFEST = "manifest.jsonl"
SHARDS = "shards"
RESULTS = "results"
# Scans whose results share a folder; a result is a label map and its sidecar.
PER_FOLDER = 1000
# Stands for what a scan costs whatever its size: a crop of 30 kB takes as long as half a MiB more of a CT.
_WHATEVER_SIZE = 1 << 19
# Requests that wait for a network file system at one time, and scans in one of them.
_AT_ONCE, _LOT = 16, 256
# Bytes of a name, so that with all that is put behind and before it, it is one of a file (255).
_LONGEST = 160
# A manifest's first line is no longer, with its 100,000 shards.
_LONGEST_HEAD = 1 << 23
_SAFE = re.compile(r"(?![.~-])[\w.+~-]{1,200}")
_FORMAT = 1
# So often a scan may be begun and its process end without a word; but for the first time it is alone then. Twice alone,
# since schedulers kill too.
ENDED = 3


@dataclass(frozen=True)
class Scan:
    """A scan of a manifest: where it is, its bytes, and the name of its result in a folder below ``results``."""

    name: str
    path: Path
    size: int
    folder: str


@dataclass(frozen=True)
class Manifest:
    """What the first line of a manifest tells. ``lines`` is where the scans of each shard begin in the file, and one
    more for its end, in bytes; ``counts`` how many they are."""

    path: Path
    digest: str
    counts: tuple[int, ...]
    lines: tuple[int, ...]

    @property
    def shards(self) -> int:
        return len(self.counts)

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def results(self) -> Path:
        return self.folder / RESULTS

    def of(self, shard: int) -> Iterator[Scan]:
        """The scans of a shard (from 1 on), read from their place in the file, without the others.

        Raises InputError where the shard is none of these, and where a line is not what was written.
        """
        if not 1 <= shard <= self.shards:
            raise InputError(f"{self.path} has {self.shards} shards, and no {shard}", f"Write 1/{self.shards} and on")
        with self.path.open("rb") as file:
            file.seek(self.lines[shard - 1])
            for number in range(self.counts[shard - 1]):
                yield self._scan(file.readline(), shard, number)
            if file.tell() != self.lines[shard]:
                raise self._strange()

    def _scan(self, line: bytes, shard: int, number: int) -> Scan:
        try:
            name, path, size = json.loads(line)
            # The file may have come from elsewhere, and a name is part of a path that is written.
            sound = isinstance(path, str) and type(size) is int and size >= 0 and _SAFE.fullmatch(name) is not None
        except (ValueError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise self._strange()
        return Scan(name, Path(path), size, f"{shard:05d}-{number // PER_FOLDER:02d}")

    def _strange(self) -> InputError:
        return InputError(f"{self.path} is not as it was written", "Deal the scans anew, into a new folder")

    def log(self, shard: int) -> Path:
        """Where a shard tells what became of its scans."""
        return self.folder / SHARDS / f"{shard:05d}.jsonl"

    def summary(self, shard: int) -> Path:
        """Written when a shard has come to its end."""
        return self.folder / SHARDS / f"{shard:05d}.json"


# ---- dealing


def deal(sizes: Sequence[int], shards: int) -> list[list[int]]:
    """Which scans, by their place in the list, are of which shard: the largest first, each to the least loaded; in the
    order of the list. The same for the same sizes. No shard outweighs another by more than one scan."""
    loads = [(0, number) for number in range(shards)]
    parts: list[list[int]] = [[] for _ in loads]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, number = loads[0]
        heapq.heapreplace(loads, (load + sizes[index] + _WHATEVER_SIZE, number))
        parts[number].append(index)
    for part in parts:
        part.sort()
    return parts


def names_of(stems: Iterable[str]) -> list[str]:
    """A name for the result of each scan: that of its file, without what a file system or a shell would stumble over.
    Those of one name, in capitals or not, become ``name``, ``name~2``, ``name~3``."""
    names = [_safe(stem) for stem in stems]
    taken = {name.casefold() for name in names}
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        key = name.casefold()
        seen[key] += 1
        if seen[key] > 1:
            while f"{key}~{seen[key]}" in taken:
                seen[key] += 1
            names[index] = f"{name}~{seen[key]}"
            taken.add(f"{key}~{seen[key]}")
    return names


def _safe(name: str) -> str:
    name = re.sub(r"^[.~-]|[^\w.+~-]", "_", name) or "_"
    data = name.encode()
    if len(data) <= _LONGEST:
        return name
    return data[: _LONGEST - 9].decode("utf-8", "ignore") + "-" + hashlib.sha256(data).hexdigest()[:8]


@dataclass(frozen=True)
class Listed:
    """A scan that is there: its absolute path, its bytes (of a folder, those of all files in it), and its stem."""

    path: str
    size: int
    stem: str


def look_up(scans: Sequence[Path], tell: Callable[[int], object] = lambda _: None) -> list[Listed | None]:
    """What is known of each scan without opening it; None where it is missing. In threads, since a network file system
    answers late but many at once; ``tell`` is told how many more were looked at."""
    lots = [scans[first : first + _LOT] for first in range(0, len(scans), _LOT)]
    found: list[Listed | None] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for lot in pool.map(lambda lot: [_look_up(scan) for scan in lot], lots):
            found += lot
            tell(len(lot))
    return found


def _look_up(scan: Path) -> Listed | None:
    try:
        told = scan.stat()
        size = told.st_size
        if stat.S_ISDIR(told.st_mode):
            size = sum((Path(folder) / name).stat().st_size for folder, _, names in os.walk(scan) for name in names)
    except (OSError, ValueError):
        return None
    return Listed(os.path.normpath(scan.absolute()), size, scan_stem(scan))


def write_manifest(path: Path, scans: Sequence[Listed], shards: int) -> Manifest:
    """Deal scans to shards, each of at least one, and write who has which; one that says the same already is left
    as it is. Raises InputError where a scan is listed twice, and where the folder's logs are of another manifest.

    A shard's scans lie one after the other, and the first line says where, so that no shard reads the others'.
    """
    if len({scan.path for scan in scans}) < len(scans):
        twice = [place for place, times in Counter(scan.path for scan in scans).items() if times > 1]
        raise InputError(f"scans are listed twice ({len(twice)}: {some(twice)})", "List each once, as `sort -u` does")
    parts = deal([scan.size for scan in scans], min(shards, len(scans)))
    names = names_of(scan.stem for scan in scans)

    def blocks() -> Iterator[bytes]:
        for part in parts:
            yield "".join(json.dumps([names[i], scans[i].path, scans[i].size]) + "\n" for i in part).encode()

    lengths, digest = [], hashlib.sha256()
    for block in blocks():
        lengths.append(len(block))
        digest.update(block)
    if path.exists() and read_manifest(path).digest == digest.hexdigest():
        return read_manifest(path)
    if any((path.parent / SHARDS).glob("*.jsonl")):
        raise InputError(f"the shards of {path.parent} were begun for other scans", "Name a new folder")
    told = {"format": _FORMAT, "sha256": digest.hexdigest(), "counts": [len(part) for part in parts], "bytes": lengths}
    with atomic(path) as file:
        file.write(json.dumps(told).encode() + b"\n")
        for block in blocks():
            file.write(block)
    return read_manifest(path)


def read_manifest(path: Path) -> Manifest:
    """The first line of a manifest, checked. Raises InputError where it is none, or not whole."""
    anew = "Make it with `medseg archive deal LIST -o FOLDER`"
    path = path / MANIFEST if path.is_dir() else path
    try:
        with path.open("rb") as file:
            head = file.readline(_LONGEST_HEAD)
            told, size = json.loads(head), os.fstat(file.fileno()).st_size
        counts, lengths = told["counts"], told["bytes"]
        sound = set(told) == {"format", "sha256", "counts", "bytes"} and told["format"] == _FORMAT
        sound = sound and all(type(n) is int and n > 0 for n in (*counts, *lengths)) and len(counts) == len(lengths) > 0
        sound = sound and re.fullmatch("[0-9a-f]{64}", told["sha256"]) is not None
    except FileNotFoundError:
        raise InputError(f"{path} is missing", anew) from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"{path} is no manifest of scans, or one of another version", anew)
    lines = [len(head)]
    for length in lengths:
        lines.append(lines[-1] + length)
    if lines[-1] != size:
        raise InputError(f"{path} is cut short", anew)
    return Manifest(path, told["sha256"], tuple(counts), tuple(lines))


def some(names: Sequence[object]) -> str:
    """The first few, in words."""
    return ", ".join(map(str, islice(names, 3))) + (", ..." if len(names) > 3 else "")


# ---- the log of a shard


@dataclass
class Told:
    """What a log tells: of each scan that came to an end the last word; how often others were ``begun``; the first
    line; how many lines could not be read; seconds and cores of each time that it was worked on."""

    head: Mapping[str, Any] = field(default_factory=dict)
    scans: dict[str, dict[str, Any]] = field(default_factory=dict)
    begun: Counter[str] = field(default_factory=Counter)
    unread: int = 0
    core_seconds: float = 0.0

    @property
    def done(self) -> set[str]:
        return {name for name, row in self.scans.items() if row["state"] == "done"}


def read_log(path: Path) -> Told:
    """What a shard's log tells; nothing where there is none. A line that a killed process left half written is read
    over and counted: its scan has then no last word, and is begun again."""
    told, seconds, cores = Told(), 0.0, 1
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line, parse_constant=_no_constant)
                    at = float(row.get("at", 0))
                    if "format" in row:
                        told.core_seconds += cores * seconds
                        told.head, cores, seconds = _head(row), int(row["cores"]), 0.0
                    elif "begun" in row:
                        told.begun[str(row["begun"])] += 1
                    elif "left" in row:
                        told.begun[str(row["left"])] -= 1
                    elif row["state"] in ("done", "failed"):
                        told.scans[str(row["name"])] = row
                        told.begun.pop(row["name"], None)
                    else:
                        told.unread += 1
                    seconds = max(seconds, at)
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    told.unread += 1
    except FileNotFoundError:
        return told
    except OSError as error:
        raise MedsegError(f"cannot read {path}: {error.strerror or error}") from error
    told.core_seconds += cores * seconds
    told.begun = +told.begun
    return told


def _head(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if row["format"] != _FORMAT:
        raise ValueError("another version")
    return row


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


class Log:
    """A shard's log, opened to add to. Each line is written whole in one call, at its end; what a killed process left
    half written there is taken away first. Not forced to the disk line by line: one that a power cut takes is a
    scan that is done again.

    Raises InputError where it was begun for another manifest, model or wishes.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], clock: Callable[[], float], cores: int) -> None:
        self._clock = clock
        self.told = read_log(path)
        for key, value in about.items():
            if self.told.head and self.told.head.get(key) != value:
                raise InputError(
                    f"{path} was begun with another {key.replace('_', ' ')}",
                    "Go on with the same, or deal the scans to a new folder",
                )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_half_line(path)
            self._file: BinaryIO = path.open("ab", buffering=0)
        except OSError as error:
            raise MedsegError(f"cannot write {path}: {error.strerror or error}. Choose another folder.") from error
        self.write({"format": _FORMAT, **about, "cores": cores})

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line. Raises MedsegError where the disk is full."""
        told = {**row, "at": round(self._clock(), 3)}
        line = json.dumps(told, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
        except OSError as error:
            raise MedsegError(f"cannot write {self._file.name}: {error.strerror or error}. Free some space.") from error

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()


def _cut_half_line(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            first = max(0, whole - 65536)
            file.seek(first)
            found = file.read(whole - first).rfind(b"\n")
            whole = first if found < 0 else first + found + 1
            if found >= 0:
                break
        if whole < end:
            file.truncate(whole)


# ---- results


def written(manifest: Manifest) -> dict[str, set[str]]:
    """The files below ``results``, by folder: one listing for a thousand scans, not a look at each of them."""
    found: dict[str, set[str]] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(manifest.results) as folders:
        for one in folders:
            if one.is_dir(follow_symlinks=False):
                with os.scandir(one.path) as entries:
                    found[one.name] = {entry.name for entry in entries}
    return found


def clear(folder: Path, name: str) -> None:
    """Take away what a killed process left of a scan that it had begun and not ended."""
    import shutil

    from medseg.io.sidecar import COUNTED, SUFFIX

    kinds = "|".join((SUFFIX, COUNTED, "_prob", "_uncertainty", "_report"))
    own = re.compile(rf"\.?{re.escape(name)}(?:{kinds})(?:\.[a-z][a-z.]*)?(?:\.[0-9a-f]{{12}}\.part)?")
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if own.fullmatch(entry.name)]:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)

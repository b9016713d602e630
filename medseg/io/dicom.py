"""DICOM series: what is there, and one of them as a volume.

pydicom reads the headers, and the volume is put together here. highdicom's volumes must be
rectangular, so they cannot hold a tilted gantry, and its refusals do not say where slices are
missing; the tests hold our geometry beside its.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.progress import Progress, silent
from medseg.core.resample import resample
from medseg.core.volume import Volume
from medseg.io.dicom_grid import Stack, arrange
from medseg.io.dicom_header import (
    PET,
    TAGS,
    Item,
    clean,
    items_of,
    kind_of,
    number_of,
    patient_of,
    quiet,
    require_intensities,
)
from medseg.io.dicom_limits import require_room, require_sound_deflation
from medseg.io.dicom_pixels import TruncatedError, stored_values
from medseg.io.sources import Source, climbs_out, find_sources, is_dicom

# What may tell apart two slices at one position, in the order in which it is tried.
_APART = ("component", "type", "echo", "time", "diffusion", "acquisition", "dimensions")


@dataclass(frozen=True, eq=False)
class Series:
    """What is there: an image series, one part of it (stack, echo, time point, image type), or
    something that is no scan.

    ``number`` counts the list from 1 and chooses; ``series_number`` is the scanner's. ``kind`` is
    "image", or what it is instead. ``size`` in voxels and ``spacing`` in mm are of the volume that
    `read_series` gives, None where there is none; then ``problem`` says why. Its text holds no
    name, identifier or UID of a patient.
    """

    number: int
    series_number: int | None
    modality: str
    description: str
    kind: str
    slices: int
    problem: InputError | None
    notes: tuple[str, ...] = ()
    stack: Stack | None = field(default=None, repr=False)
    sources: tuple[Source, ...] = field(default=(), repr=False)
    patient: str = field(default="", repr=False)

    @property
    def usable(self) -> bool:
        return self.problem is None

    @property
    def grid(self) -> Grid | None:
        """The grid that the volume will have."""
        return None if self.stack is None else self.stack.straight or self.stack.grid

    @property
    def size(self) -> tuple[int, int, int] | None:
        return None if self.grid is None else self.grid.shape

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        return None if self.grid is None else self.grid.spacing


def find_series(path: Path, *, progress: Progress = silent) -> list[Series]:
    """Every series of a DICOM file, a folder with what lies below it, a zip, or the folder of a
    DICOMDIR, by the scanner's series number. Names and extensions of files mean nothing.

    Only headers are read. What cannot be used is listed too, with the reason. Raises InputError
    where there is no DICOM file, for a hostile zip, and for a DICOMDIR that points out of its folder.
    """
    with quiet():
        return _find(path, progress)


def _find(path: Path, progress: Progress) -> list[Series]:
    items: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    others: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    sources: dict[tuple[str, ...], list[Source]] = defaultdict(list)
    damaged = 0
    found = find_sources(_beside(path))
    for source in progress(found, len(found)):
        header = _header(source)
        if header is None:
            continue
        if header is not _DAMAGED and "DirectoryRecordSequence" in header:
            _look_at_directory(source)
            continue
        try:
            kind = "damaged" if header is _DAMAGED else kind_of(header)
            key = (str(header.get("SeriesInstanceUID", "")), kind, str(header.get("SOPClassUID", "")))
            frames = list(items_of(header, source, key)) if kind == "image" else []
        except _STRANGE:
            kind = "damaged"
        if kind == "damaged":
            damaged += 1
            continue
        if kind != "image" or key not in others:
            others[key].append(header)
        sources[key].append(source)
        items[key] += frames
    series = [s for key in sources for s in _series(key, items[key], others[key], sources[key])]
    series.sort(key=lambda s: (s.series_number is None, s.series_number or 0))
    if damaged:
        problem = InputError(f"{damaged} files are damaged or have no pixels", "Copy or export them again")
        series.append(Series(0, None, "-", "damaged files", "damaged", damaged, problem))
    if not series:
        raise InputError(f"{path.name} holds no DICOM image", "Name a DICOM file, a folder of them, or a zip")
    return [replace(s, number=n) for n, s in enumerate(series, start=1)]


def read_series(series: Series, *, progress: Progress = silent) -> Volume:
    """Values (1, X, Y, Z) of a series on its own grid: int16 where the rescaled values (HU for CT)
    are whole and fit, else float32.

    Slices of a tilted gantry come back on a straight grid of the same slice planes, the lowest
    value standing where there was nothing. Padding is left as it is stored.

    Raises InputError for a series that is not usable, and for a slice that is cut off, damaged or
    has no pixels, with its position.
    """
    if series.problem is not None:
        raise series.problem
    stack = series.stack
    if stack is None:
        raise InputError("a series without slices", "Choose another series")
    width, height, count = stack.grid.shape
    whole = all(f.slope == 1 and f.intercept.is_integer() for f in stack.frames)
    require_room((count, height, width), 2 if whole else 4)
    out: NDArray[Any] = np.empty((count, height, width), dtype=np.int16 if whole else np.float32)
    with quiet():
        values = _rescaled(stack, out, whole, progress)
    modality = None if series.modality == "-" else series.modality
    volume = Volume(values.transpose(2, 1, 0)[None], stack.grid, modality)
    return volume if stack.straight is None else _straightened(volume, stack.straight)


def _rescaled(stack: Stack, out: NDArray[Any], whole: bool, progress: Progress) -> NDArray[Any]:
    """``out`` (slices, rows, columns) filled with stored value x slope + intercept; as float32 where
    whole numbers turn out too large for int16."""
    for place, raw in progress(_pixels(stack), len(stack.frames)):
        frame = stack.frames[place]
        if whole:
            low, high = int(raw.min()) + int(frame.intercept), int(raw.max()) + int(frame.intercept)
            if out.dtype == np.int16 and not -32768 <= low <= high <= 32767:
                out = out.astype(np.float32)
            out[place] = raw.astype(np.int32) + np.int32(frame.intercept) if frame.intercept else raw
        else:
            out[place] = raw * np.float64(frame.slope) + frame.intercept
    return out


def read_headers(series: Series) -> list[Any]:
    """The whole headers of a series without pixels, pydicom datasets, in the order of its slices;
    one for a multi-frame file. What is written about the series takes patient and study from them."""
    sources = dict.fromkeys(f.source for f in series.stack.frames) if series.stack else dict.fromkeys(series.sources)
    headers = []
    for source in sources:
        with source.open() as file, quiet():
            header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
            for _ in header.iterall():  # values are made when they are used, and would warn of themselves then
                pass
            headers.append(header)
    return headers


def choose(series: Sequence[Series], number: int | None = None) -> Series:
    """The series of that number, or the only one that can be used.

    A single slice does not compete with volumes. Raises InputError, naming them, where there are
    several, where there is none, and where several patients' scans lie together.
    """
    if number is not None:
        found = next((s for s in series if s.number == number), None)
        if found is None:
            raise InputError(f"there is no series {number}", f"Choose with --series: {_names(series)}")
        return found
    usable = [s for s in series if s.usable]
    if not usable:
        if len(series) == 1 and series[0].problem:
            raise series[0].problem
        reasons = [f"{s.number} {s.description}: {s.problem.fault}" for s in series if s.problem][:4]
        raise InputError(f"no series can be used ({'; '.join(reasons)})", "Look at them with `medseg inspect`")
    if len({s.patient for s in series if s.kind != "damaged"}) > 1:
        raise InputError("there are scans of more than one patient", f"Choose one with --series: {_names(usable)}")
    volumes = [s for s in usable if s.slices > 1] or usable
    if len(volumes) > 1:
        raise InputError(f"there are {len(volumes)} series", f"Choose one with --series: {_names(volumes)}")
    return volumes[0]


def _names(series: Sequence[Series], most: int = 8) -> str:
    names = [f"{s.number} {s.modality} {s.description} ({s.slices} slices)" for s in series]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _beside(path: Path) -> Path:
    """A DICOMDIR stands for the folder that it lies in."""
    if path.is_file() and path.name.upper() == "DICOMDIR":
        _look_at_directory(Source(path))
        return path.parent
    return path


_DAMAGED: Any = pydicom.Dataset()
# What values of another type or number than the standard's give.
_STRANGE = (ValueError, TypeError, AttributeError, LookupError, OverflowError)


def _header(source: Source) -> Any:
    """The header, None for what is no DICOM file, _DAMAGED for one that cannot be read."""
    try:
        if not is_dicom(source):
            return None
    except InputError:
        return _DAMAGED
    with source.open() as file:
        try:
            require_sound_deflation(file)
            header = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=list(TAGS))
            for _ in header.iterall():  # values are made when they are used; what is wrong shows here
                pass
            # Without a preamble anything may look like DICOM until it is read.
            return header if len(header) else _DAMAGED if header.preamble else None
        except Exception:  # noqa: BLE001  a damaged file fails in ways that nobody can list
            return _DAMAGED


def _look_at_directory(source: Source) -> None:
    """Refuse a DICOMDIR one of whose references leads out of its folder. Else it is not needed: the
    files below the folder say themselves what they are."""
    with source.open() as file:
        try:
            records = pydicom.dcmread(file, force=True).get("DirectoryRecordSequence") or []
            names = [record.get("ReferencedFileID") or "" for record in records]
        except Exception:  # noqa: BLE001
            return
    for name in names:
        parts = [name] if isinstance(name, str) else [str(part) for part in name]
        if any(climbs_out(part) for part in parts):
            raise InputError("the DICOMDIR points out of its folder", "Do not trust it; ask for the scan again")


def _series(key: tuple[str, ...], items: list[Item], headers: list[Any], sources: list[Source]) -> Iterator[Series]:
    """The parts of one series: one for each stack, and for each of what shares its positions."""
    header = headers[0]
    try:
        numbered = number_of(header.get("SeriesNumber"))
    except _STRANGE:
        numbered = None
    patients = {patient_of(h) for h in [*headers, *(item.header for item in items)]}
    base = Series(
        0,
        None if numbered is None else int(numbered),
        clean(header.get("Modality"), header) or "-",
        clean(header.get("SeriesDescription") or header.get("ProtocolName"), header) or "-",
        key[1],
        len(items) or len(sources),
        None,
        sources=tuple(sources),
        patient="+".join(sorted(patients)),
    )
    if key[1] != "image":
        yield replace(base, problem=InputError(f"no scan: {key[1]}", "Choose a series of images"))
        return
    if not items:
        yield replace(base, problem=InputError("its header is damaged", "Export the series again"))
        return
    if len(patients) > 1:
        yield replace(base, problem=InputError("it holds slices of more than one patient", "Part them"))
        return
    for words, part in _parts(items):
        yield _part(replace(base, slices=len(part)), words, part)


def _part(base: Series, words: tuple[str, ...], items: list[Item]) -> Series:
    base = replace(base, description=" ".join((base.description, *(f"[{w}]" for w in words))))
    header = items[0].header
    try:
        notes = require_intensities(header)
        pet = str(header.get("SOPClassUID", "")) in PET
        stack = arrange([item.frame for item in items], own_slopes=pet)
    except InputError as error:
        return replace(base, problem=error)
    except _STRANGE:
        return replace(base, problem=InputError("its header is damaged", "Export the series again"))
    return replace(base, stack=stack, notes=(*notes, *stack.notes))


def _parts(items: list[Item]) -> list[tuple[tuple[str, ...], list[Item]]]:
    """Stacks, and what else shares positions, each with words that tell it apart."""
    stacks = _by(items, "stack")
    named: list[tuple[tuple[str, ...], list[Item]]] = [
        ((f"stack {value}",) if len(stacks) > 1 else (), part) for value, part in stacks.items()
    ]
    for mark in _APART:
        named = [(words + more, part) for words, whole in named for more, part in _split(whole, mark)]
    return named


def _split(items: list[Item], mark: str) -> list[tuple[tuple[str, ...], list[Item]]]:
    """By a mark, if slices share positions and each part by itself could be a volume: a slice sent
    twice is a fault, no volume of its own."""
    places = {_place(item) for item in items}
    parts = _by(items, mark)
    if len(places) == len(items) or len(parts) < 2:
        return [((), items)]
    least = min(len({_place(item) for item in part}) for part in parts.values())
    if least < min(2, len(places)):
        return [((), items)]
    return [((_called(mark, value, list(parts)),), part) for value, part in parts.items()]


def _by(items: Iterable[Item], mark: str) -> dict[Any, list[Item]]:
    parts: dict[Any, list[Item]] = defaultdict(list)
    for item in items:
        parts[item.apart.get(mark)].append(item)
    return dict(sorted(parts.items(), key=lambda pair: (pair[0] is None, pair[0] if pair[0] is not None else 0)))


def _place(item: Item) -> tuple[float, ...] | None:
    position = item.frame.position
    return None if position is None else tuple(np.round(position, 2))


def _called(mark: str, value: Any, values: list[Any]) -> str:
    if mark == "echo":
        return f"echo {value:g} ms" if value is not None else "no echo"
    if mark == "component":
        return str(value).lower() or "other"
    if mark == "type":
        common = set.intersection(*(set(v) for v in values))
        return " ".join(w for w in value if w not in common) or "plain"
    if mark == "dimensions":
        return "index " + ".".join(str(v) for v in value)
    return f"{mark} {value:g}" if value is not None else f"no {mark}"


def _pixels(stack: Stack) -> Iterator[tuple[int, NDArray[Any]]]:
    """Place in the stack and stored values (rows, columns) of every frame, file by file."""
    by_source: dict[Source, list[int]] = defaultdict(list)
    for place, frame in enumerate(stack.frames):
        by_source[frame.source].append(place)
    for source, places in by_source.items():
        done = 0
        try:
            values = stored_values(source, [stack.frames[p].index for p in places])
            for place, raw in zip(places, values, strict=True):
                if raw.shape != stack.grid.shape[1::-1]:
                    raise TruncatedError
                yield place, raw
                done += 1
        except (TruncatedError, ValueError):
            at = _where(stack, places[min(done, len(places) - 1)])
            raise InputError(
                f"the slice at {at} mm is cut off, damaged or has no pixels", "Copy or export the series again"
            ) from None


def _where(stack: Stack, place: int) -> str:
    frame = stack.frames[place]
    return f"{frame.at(np.cross(np.asarray(frame.rows), np.asarray(frame.columns))):.2f}"


def _straightened(volume: Volume, straight: Grid) -> Volume:
    low, high = volume.values.min(), volume.values.max()
    out = resample(volume, straight, fill=float(low)).values
    # Splines overshoot at edges; what the scanner did not see is not made up.
    out = np.clip(out, low, high, out=out)
    if volume.values.dtype == np.int16:
        out = np.rint(out, out=out).astype(np.int16)
    return Volume(out, straight, volume.modality)

"""Labels from a DICOM SEG, read with pydicom.

A SEG says itself where its frames are, so that it is read without its source; the frames that hold
nothing are left out of it, so that its own grid may be smaller than the scan's.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from medseg.core.errors import InputError
from medseg.core.grid import SAME_GRID_MM, Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.resample import resample
from medseg.core.volume import LabelMap
from medseg.io.dicom_header import quiet
from medseg.io.dicom_limits import honest_codestream, honest_run_lengths, require_room
from medseg.io.reference import LPS, naming, read_dataset, settled

SOP_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_MOST_SLICES = 20_000
# Deflated Image Frame Compression, younger than pydicom 3.0.
_DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
_ANOTHER = "Export the segmentation again"


@dataclass(frozen=True)
class LabelsRead:
    """Labels made elsewhere, and what had to be said about reading them."""

    label_map: LabelMap
    notes: tuple[str, ...] = ()


@quiet()
def read_seg(
    path: Path,
    *,
    onto: Grid | None = None,
    labels: LabelSet | None = None,
    only: Collection[str] | None = None,
    frame_of_reference: str | None = None,
) -> LabelsRead:
    """Labels of a DICOM SEG, on the grid ``onto`` or, unless given, on the smallest grid that holds
    the frames that the file has.

    Segments are called by their labels and numbered as in the file, or as ``labels`` numbers those
    names. ``only`` takes segments by name and leaves the others. A fractional segment counts where it
    is half or more; a note says so.

    Raises InputError where the file is no SEG, is broken or truncated, does not say where its frames
    are, has another ``frame_of_reference``, has segments that overlap or that ``labels`` or ``only``
    do not fit, or does not lie on ``onto`` (with the distance in mm).
    """
    dataset = read_dataset(path)
    if str(dataset.get("SOPClassUID", "")) not in SOP_CLASSES:
        raise InputError(f"{path.name} is not a DICOM SEG", "Name a segmentation object")
    with naming(path):
        require_same_frame({str(dataset.get("FrameOfReferenceUID", ""))}, frame_of_reference)
        return _read(dataset, path.name, onto, labels, only)


def _read(
    dataset: Dataset, name: str, onto: Grid | None, labels: LabelSet | None, only: Collection[str] | None
) -> LabelsRead:
    named = _segment_names(dataset)
    wanted = _wanted(named, labels, only)
    numbers = {segment: label.number for segment, label in wanted.items()}
    planes = _planes_of(dataset)
    if not planes or len(planes) != int(dataset.get("NumberOfFrames") or 1):
        raise InputError(f"{len(planes)} of its frames are described", _ANOTHER)
    grid, places = _sparse_stack(planes, int(dataset.Rows), int(dataset.Columns))
    dtype = np.min_scalar_type(max(numbers.values(), default=0))
    require_room((grid.shape[2], grid.shape[1], grid.shape[0]), dtype.itemsize)
    slices = np.zeros(grid.shape[::-1], dtype=dtype)
    clashes: dict[tuple[int, int], int] = {}
    segments = _segments_of_frames(dataset)
    if len(set(zip(places, segments, strict=True))) < len(places):
        raise InputError("two frames show one segment at one position", _ANOTHER)
    for place, frame in zip(places, _labelled(dataset, segments, numbers), strict=True):
        there = slices[place]
        both = (there != 0) & (frame != 0)
        for one, other in {(int(a), int(b)) for a, b in zip(there[both], frame[both], strict=True)}:
            clashes[one, other] = clashes.get((one, other), 0) + int(((there == one) & (frame == other)).sum())
        np.copyto(there, frame.astype(slices.dtype), where=frame != 0)
    names = {label.number: label.name for label in wanted.values()}
    refuse_overlaps(clashes, names)
    found = LabelMap(slices.transpose(2, 1, 0), grid, labels or LabelSet(tuple(wanted.values())))
    if onto is not None:
        found = _placed(found, onto)
    notes = []
    if dataset.SegmentationType == "FRACTIONAL":
        what = str(dataset.get("SegmentationFractionalType", "fractional")).lower()
        notes.append(f"{name} holds {what} values; a voxel counts from 0.5 on")
    return LabelsRead(found, tuple(notes))


def refuse_overlaps(clashes: dict[tuple[int, int], int], names: dict[int, str]) -> None:
    """InputError where two labels claim the same voxels (pairs of numbers to voxel counts)."""
    clashes = {pair: count for pair, count in clashes.items() if count}
    if clashes:
        (one, other), count = max(clashes.items(), key=lambda item: item[1])
        raise InputError(
            f"{names[one]!r} and {names[other]!r} overlap in {count} voxels",
            "A label map holds one label per voxel; choose structures that do not overlap, by name (--only)",
        )


def require_same_frame(found: Collection[str], wanted: str | None) -> None:
    """InputError where labels were drawn in another frame of reference than the scan's, both said."""
    if wanted and {uid for uid in found if uid} - {wanted}:
        raise InputError("the labels have another frame of reference than the scan", "Name the scan they were drawn on")


def choose_names(names: Collection[str], only: Collection[str] | None) -> set[str]:
    """The names in ``only`` (all, unless given). Raises InputError for one that is not there."""
    if only is None:
        return set(names)
    for one in only:
        if one not in names:
            raise InputError(f"there is no structure {one!r}", f"There are {', '.join(sorted(names))}")
    return set(only)


def _segment_names(dataset: Dataset) -> dict[int, Label]:
    """The segments by number, but for the background; a name that comes twice gets its number."""
    background = _background(dataset)
    found: dict[int, Label] = {}
    for item in dataset.get("SegmentSequence") or []:
        number = int(item.SegmentNumber)
        if str(dataset.SegmentationType) == "LABELMAP" and number in (background, 0):
            continue
        name = str(item.get("SegmentLabel") or f"segment {number}").strip()
        if name in {label.name for label in found.values()}:
            name = f"{name} {number}"
        kind = next(iter(item.get("SegmentedPropertyTypeCodeSequence") or []), Dataset())
        code = f"{kind.CodingSchemeDesignator}:{kind.CodeValue}" if kind.get("CodeValue") else None
        found[number] = Label(name, number, code)
    if not found:
        raise InputError("no segment is described", _ANOTHER)
    return found


def _background(dataset: Dataset) -> int:
    return int(dataset.get("PixelPaddingValue") or 0)


def _wanted(named: dict[int, Label], labels: LabelSet | None, only: Collection[str] | None) -> dict[int, Label]:
    """The segments to be read, with the numbers that they get."""
    chosen = choose_names([label.name for label in named.values()], only)
    kept = {number: label for number, label in named.items() if label.name in chosen}
    if labels is None:
        return kept
    known = {label.name.casefold(): label for label in labels}
    for label in kept.values():
        if label.name.casefold() not in known:
            raise InputError(f"segment {label.name!r} is not listed", f"The labels are {labels}")
    return {number: known[label.name.casefold()] for number, label in kept.items()}


@dataclass(frozen=True)
class Plane:
    """Where a frame lies: ImagePositionPatient (mm, LPS), ImageOrientationPatient, PixelSpacing (mm
    between rows, mm between columns), and the distance to the next slice in mm where it is said."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    step: float | None = None

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def depth(self) -> float:
        """Position along the normal in mm."""
        return float(np.dot(self.position, self.normal))


def _planes_of(dataset: Dataset) -> list[Plane]:
    """Where each frame of an enhanced multi-frame object lies, from its own functional groups or
    the shared ones. Raises InputError where one of the three macros is missing."""
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), Dataset())
    planes = []
    for frame in dataset.get("PerFrameFunctionalGroupsSequence") or []:
        position = _macro(frame, shared, "PlanePositionSequence")
        orientation = _macro(frame, shared, "PlaneOrientationSequence")
        measures = _macro(frame, shared, "PixelMeasuresSequence")
        planes.append(_plane(position, orientation, measures))
    return planes


def _macro(frame: Dataset, shared: Dataset, keyword: str) -> Dataset:
    found = frame.get(keyword) or shared.get(keyword)
    if not found:
        raise InputError(f"the object does not say what its frames are ({keyword} is missing)", _ANOTHER)
    return found[0]


def _plane(position: Dataset, orientation: Dataset, measures: Dataset) -> Plane:
    place = _vector(position, "ImagePositionPatient", 3)
    direction = _vector(orientation, "ImageOrientationPatient", 6)
    spacing = _vector(measures, "PixelSpacing", 2)
    if min(spacing) <= 0:
        raise InputError("an image has a pixel spacing that is not above zero", _ANOTHER)
    step = None
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        if step is None and measures.get(keyword):
            step = abs(float(measures[keyword].value)) or None
    return Plane(place, direction, spacing, step)


def _vector(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in dataset[keyword].value)
    except (KeyError, TypeError, ValueError):
        values = ()
    if len(values) != count or not np.isfinite(values).all():
        raise InputError(f"an image does not say where it is ({keyword} is missing or broken)", _ANOTHER)
    return values


def _require_parallel(planes: Sequence[Plane]) -> None:
    """InputError unless all planes have the same orientation and pixel spacing, and sound ones."""
    first = planes[0]
    for plane in planes:
        u, v = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
        if max(abs(np.linalg.norm(u) - 1), abs(np.linalg.norm(v) - 1), abs(u @ v)) > 1e-3:
            raise InputError("an image has an invalid orientation", "Its direction cosines must be unit and square")
        if np.abs(np.subtract(plane.orientation, first.orientation)).max() > 1e-4:
            raise InputError("the images are not parallel", _ANOTHER)
        if np.abs(np.subtract(plane.spacing, first.spacing)).max() > 1e-4 * max(first.spacing):
            raise InputError("the images have different pixel spacings", _ANOTHER)


def _frame_grid(first: Plane, step: NDArray[np.float64], shape: tuple[int, int, int]) -> Grid:
    """The grid of (columns, rows, slices) voxels whose first slice is ``first``, the others
    following by ``step`` (mm, LPS)."""
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.orientation[:3]) * first.spacing[1]
    affine[:3, 1] = np.array(first.orientation[3:]) * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    return Grid(shape, LPS @ affine)


def _sparse_stack(planes: Sequence[Plane], rows: int, columns: int) -> tuple[Grid, list[int]]:
    """The grid of the frames, gaps filled, and the slice on it of each frame."""
    _require_parallel(planes)
    depths = np.array([plane.depth for plane in planes])
    order = np.argsort(depths, kind="stable")
    distinct = np.concatenate([[True], np.diff(depths[order]) > SAME_GRID_MM / 5])
    levels = depths[order][distinct]
    step = _step(levels, planes[0])
    place = np.rint((depths - levels[0]) / step).astype(int)
    count = int(place.max()) + 1
    if count > _MOST_SLICES:
        raise InputError(f"its frames reach over {count} slices of {step:.4g} mm", _ANOTHER)
    first, last = planes[order[0]], planes[order[-1]]
    along = first.normal * step
    if count > 1:
        along = (np.array(last.position) - first.position) / (count - 1)
    wrong = np.array([p.position for p in planes]) - first.position - place[:, None] * along
    if np.linalg.norm(wrong, axis=1).max() > SAME_GRID_MM:
        raise InputError("its frames are not evenly stacked", "Export it on an evenly stacked series")
    return _frame_grid(first, along, (columns, rows, count)), place.tolist()


def _step(levels: NDArray[np.float64], plane: Plane) -> float:
    """Distance of slices in mm. What the file says is believed where the frames agree with it."""
    if len(levels) == 1:
        if plane.step is None:
            raise InputError("it does not say how thick its slices are", _ANOTHER)
        return plane.step
    smallest = float(np.diff(levels).min())
    if plane.step is not None:
        whole = np.diff(levels) / plane.step
        if np.rint(whole).min() >= 1 and np.abs(whole - np.rint(whole)).max() * plane.step < SAME_GRID_MM:
            return plane.step
    return smallest


def _segments_of_frames(dataset: Dataset) -> list[int]:
    """The segment that each frame shows; 0 throughout where a frame shows all of them."""
    groups = dataset.PerFrameFunctionalGroupsSequence
    if str(dataset.SegmentationType) == "LABELMAP":
        return [0] * len(groups)
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), Dataset())
    said = [_macro(group, shared, "SegmentIdentificationSequence") for group in groups]
    return [int(one.ReferencedSegmentNumber) for one in said]


def _labelled(dataset: Dataset, segments: Sequence[int], numbers: dict[int, int]) -> Iterator[NDArray[Any]]:
    """Label numbers (rows, columns) of each frame, 0 where it has none."""
    kind = str(dataset.SegmentationType)
    half = 1.0 if kind != "FRACTIONAL" else int(dataset.MaximumFractionalValue) / 2
    table = np.zeros(1 << int(dataset.BitsAllocated), dtype=np.int64)
    if kind == "LABELMAP":
        for segment, number in numbers.items():
            table[segment] = number
        table[_background(dataset)] = 0
    for pixels, segment in zip(_pixels(dataset), segments, strict=True):
        yield table[pixels] if kind == "LABELMAP" else np.where(pixels >= half, numbers.get(segment, 0), 0)


def _pixels(dataset: Dataset) -> Iterator[NDArray[Any]]:
    """The frames (rows, columns) one by one.

    Single bits are unpacked here: pydicom 3.0 reads them neither from RLE nor, frame by frame,
    where a frame begins inside a byte; and it does not know deflated frames.
    """
    from pydicom.encaps import generate_frames
    from pydicom.pixels.utils import iter_pixels

    syntax = str(dataset.file_meta.TransferSyntaxUID)
    shape, count = (int(dataset.Rows), int(dataset.Columns)), int(dataset.NumberOfFrames)
    bits = int(dataset.BitsAllocated)
    try:
        if syntax == _DEFLATED_FRAMES or (syntax == RLELossless and bits == 1):
            size = -(-shape[0] * shape[1] * bits // 8)
            unpack = _inflated if syntax == _DEFLATED_FRAMES else _run_lengths
            for piece in generate_frames(dataset.PixelData, number_of_frames=count):
                yield _frame_of(unpack(piece, size), 0, shape, bits)
        elif bits == 1 and not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            for frame in range(count):
                yield _frame_of(dataset.PixelData, frame, shape, bits)
        else:
            _require_honest(dataset, shape, count, bits // 8)
            yield from iter_pixels(dataset)
    except Exception as error:  # noqa: BLE001 decoders raise what a broken stream happens to meet
        raise InputError(f"its pixels are cut off or cannot be decoded ({type(error).__name__})", _ANOTHER) from None


def _require_honest(dataset: Dataset, shape: tuple[int, int], count: int, itemsize: int) -> None:
    """ValueError where frames that pydicom would decode are not as large as the header says."""
    from pydicom.encaps import generate_frames

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    for piece in generate_frames(dataset.PixelData, number_of_frames=count):
        if syntax == RLELossless:
            sound = honest_run_lengths(len(piece), *shape, itemsize)
        else:
            sound = honest_codestream(piece, *shape)
        if not sound:
            raise ValueError


def _frame_of(data: bytes, frame: int, shape: tuple[int, int], bits: int) -> NDArray[Any]:
    """A frame of native data, in which frames follow each other without a gap."""
    size = shape[0] * shape[1]
    if bits > 1:
        return np.frombuffer(data, dtype=f"<u{bits // 8}", count=size, offset=frame * size * bits // 8).reshape(shape)
    start, end = frame * size, (frame + 1) * size
    packed = np.frombuffer(data, dtype=np.uint8)[start // 8 : -(-end // 8)]
    return np.unpackbits(packed, bitorder="little")[start % 8 : start % 8 + size].reshape(shape)


def _inflated(frame: bytes, size: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(frame, size)


def _run_lengths(frame: bytes, size: int) -> bytes:
    """The one segment of an RLE frame (PS3.5 G.3): a count n, then n + 1 bytes as they are, or the
    next byte 257 - n times."""
    out, at = bytearray(), int.from_bytes(frame[4:8], "little")
    while len(out) < size:
        count = frame[at]
        if count < 128:
            out += frame[at + 1 : at + 2 + count]
            at += 2 + count
        else:
            out += frame[at + 1 : at + 2] * (257 - count if count > 128 else 0)
            at += 2 if count > 128 else 1
    return bytes(out[:size])


def _placed(found: LabelMap, onto: Grid) -> LabelMap:
    """On the scan's grid. Raises InputError where labels would fall outside it."""
    there = LabelMap(found.values, settled(found.grid, onto), found.labels)
    moved = resample(there, onto)
    if np.count_nonzero(moved.values) != np.count_nonzero(found.values):
        raise InputError("labels lie outside the scan", "Name the scan that they were drawn on")
    return moved

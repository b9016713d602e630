"""RTSTRUCT: labels as contours in the patient's millimetres, as radiotherapy has them.

Written with pydicom and contours of our own: rt-utils (1.2.7) takes the spacing of rows for that of
columns, so that its contours are misplaced where pixels are not square, and rounds them to pixels.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian

import medseg
from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.terminology import Term, Terminology, default_terminology
from medseg.core.volume import LabelMap
from medseg.io.dicom_header import quiet
from medseg.io.dicom_seg import (
    Algorithm,
    code_item,
    colour,
    complete_source,
    name_private_scheme,
    require_frame,
    require_labels,
)
from medseg.io.dicom_seg_read import LabelsRead, choose_names, refuse_overlaps, require_same_frame
from medseg.io.files import atomic
from medseg.io.reference import LPS, Reference, naming, read_dataset, read_reference, series_number, uid_of

SOP_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
# A contour this close to a slice (mm) is on it; positions are written with few decimals.
_ON_SLICE_MM = 0.1
_ANOTHER = "Export the structure set again"
_CONTOUR_DATA = Tag("ContourData")

Points = NDArray[np.float64]


@quiet()
def write_rtstruct(
    path: Path,
    label_map: LabelMap,
    sources: Sequence[Dataset | Path] | Reference,
    algorithm: Algorithm,
    *,
    terminology: Terminology | None = None,
    made: datetime | None = None,
) -> None:
    """Write labels as an RTSTRUCT of the series that they were drawn on.

    Each label becomes a region of interest with the label's name, number and coded term; each piece
    of it on a slice one closed contour in mm, its holes tied to its rim by keyholes (PS3.3
    C.8.8.6.3). A contour runs half-way between voxels inside and outside, so that filling it gives
    the same voxels again; its area is half a pixel less than theirs. A label without voxels is a
    region without contours. Otherwise, and in what it refuses, as `write_seg`.
    """
    reference = sources if isinstance(sources, Reference) else read_reference(sources)
    slices = reference.slices_of(label_map)
    require_labels(label_map)
    require_frame(reference)
    moment = made or datetime.now(UTC)
    words = terminology or default_terminology()
    terms = [words.find(label) for label in label_map.labels]
    said = repr((label_map.labels, algorithm, moment.isoformat(), medseg.__version__))
    images = " ".join(str(d.SOPInstanceUID) for d in reference.datasets)
    identity = str(uid_of("rtstruct", images, said, slices.tobytes()))
    dataset = _head(reference, algorithm, identity, moment)
    dataset.ReferencedFrameOfReferenceSequence = [_referenced(reference)]
    dataset.StructureSetROISequence = [_region(label, reference, algorithm) for label in label_map.labels]
    boxes = _boxes(slices)
    dataset.ROIContourSequence = [
        _contours(label, slices, boxes.get(label.number), reference) for label in label_map.labels
    ]
    dataset.RTROIObservationsSequence = [
        _observation(label, term) for label, term in zip(label_map.labels, terms, strict=True)
    ]
    dataset.ApprovalStatus = "UNAPPROVED"
    name_private_scheme(dataset, terms)
    data = io.BytesIO()
    dataset.save_as(data, enforce_file_format=True)
    with atomic(path) as file:
        file.write(data.getbuffer())


@quiet()
def read_rtstruct(
    path: Path,
    onto: Grid,
    *,
    labels: LabelSet | None = None,
    only: Collection[str] | None = None,
    frame_of_reference: str | None = None,
) -> LabelsRead:
    """Labels of an RTSTRUCT on the grid of the scan that it was drawn on.

    A voxel belongs to a region where its centre lies inside an odd number of the region's contours
    on its slice, so that keyholes and inner contours both make holes. Regions are called and
    numbered as in the file, or as ``labels`` numbers those names. ``only`` takes regions by name.
    What holds no closed contour (points, open contours) is left out; a note says so.

    Raises InputError where the file is no RTSTRUCT or broken, has another ``frame_of_reference``,
    has contours that lie between the slices of ``onto`` (with the distance in mm), across them or on
    slices that it does not have, regions that overlap, or regions that ``labels`` or ``only`` do not
    fit.
    """
    dataset = read_dataset(path)
    if str(dataset.get("SOPClassUID", "")) != SOP_CLASS:
        raise InputError(f"{path.name} is not an RTSTRUCT", "Name a structure set")
    with naming(path):
        return _read(dataset, path.name, onto, labels, only, frame_of_reference)


# ---- contours -----------------------------------------------------------------------------------


def outlines(mask: NDArray[np.bool_]) -> list[Points]:
    """Closed contours (n, 2) of a mask, in rows and columns, the last point not repeated.

    One for each piece (of pixels that share a side), half-way between pixels inside and outside,
    its holes tied in by keyholes.
    """
    from skimage.measure import find_contours, label, regionprops

    found = []
    for piece in regionprops(label(mask, connectivity=1)):
        # Pieces that touch at a corner are two, so holes that touch at one are one.
        rings = find_contours(np.pad(piece.image, 1).astype(np.float64), 0.5, fully_connected="low")
        corner = np.array(piece.bbox[:2]) - 1
        found.append(_keyholed([_without_waypoints(ring[:-1]) + corner for ring in rings]))
    return found


def filled(contours: Sequence[Points], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels (rows, columns) whose centres lie inside an odd number of contours (n, 2)."""
    from skimage.draw import polygon

    out = np.zeros(shape, dtype=bool)
    for contour in contours:
        rows, columns = polygon(contour[:, 0], contour[:, 1], shape)
        out[rows, columns] ^= True
    return out


def _without_waypoints(ring: Points) -> Points:
    """Without the points that lie on the straight line between their neighbours."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _keyholed(rings: list[Points]) -> Points:
    """One ring from a rim and its holes: a channel of no width leads from each hole to its right.

    The channels run between rows of pixels, so that no pixel's centre lies on them. A hole's topmost
    point is tied, rightmost of several; what it meets there is the rim or a hole tied before.
    """
    rings = sorted(rings, key=lambda ring: -float(np.ptp(ring[:, 0])) * float(np.ptp(ring[:, 1])))
    whole, holes = rings[0], [_from_its_top(ring) for ring in rings[1:]]
    for hole in sorted(holes, key=lambda ring: (ring[0, 0], -ring[0, 1])):
        after, meeting = _to_the_right(whole, hole[0])
        whole = np.concatenate([whole[: after + 1], [meeting], hole, hole[:1], [meeting], whole[after + 1 :]])
    return whole


def _from_its_top(ring: Points) -> Points:
    return np.roll(ring, -int(np.lexsort((-ring[:, 1], ring[:, 0]))[0]), axis=0)


def _to_the_right(ring: Points, point: Points) -> tuple[int, Points]:
    """Where the ring first meets the row to the right of a point: the index before, and the place."""
    (row, column), end = point, np.roll(ring, -1, axis=0)
    crosses = (ring[:, 0] != end[:, 0]) & ((ring[:, 0] - row) * (end[:, 0] - row) <= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = ring[:, 1] + (row - ring[:, 0]) / (end[:, 0] - ring[:, 0]) * (end[:, 1] - ring[:, 1])
    at = np.where(crosses & (at > column), at, np.inf)
    nearest = int(np.argmin(at))
    return nearest, np.array([row, at[nearest]])


# ---- writing ------------------------------------------------------------------------------------


def _head(reference: Reference, algorithm: Algorithm, identity: str, moment: datetime) -> Dataset:
    """Patient and study of the source, and what the object says of itself."""
    source, out = complete_source(reference.first), Dataset()
    for keyword in (
        "SpecificCharacterSet",
        "PatientName",
        "PatientID",
        "IssuerOfPatientID",
        "PatientBirthDate",
        "PatientSex",
        "PatientAge",
        "PatientSize",
        "PatientWeight",
        "PatientIdentityRemoved",
        "DeidentificationMethod",
        "StudyInstanceUID",
        "StudyDate",
        "StudyTime",
        "StudyID",
        "StudyDescription",
        "AccessionNumber",
        "ReferringPhysicianName",
        "FrameOfReferenceUID",
        "PositionReferenceIndicator",
    ):
        if keyword in source:
            out[keyword] = source[keyword]
    date, time = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S.%f")
    out.SOPClassUID = SOP_CLASS
    out.SOPInstanceUID = uid_of("instance", identity)
    out.SeriesInstanceUID = uid_of("series", identity)
    out.InstanceCreationDate, out.InstanceCreationTime = date, time
    out.Modality = "RTSTRUCT"
    out.SeriesNumber = series_number(reference.first)
    out.SeriesDescription = algorithm.name
    out.OperatorsName = ""
    out.Manufacturer = "medseg"
    out.ManufacturerModelName = algorithm.name
    out.SoftwareVersions = medseg.__version__
    out.InstanceNumber = 1
    out.StructureSetLabel = "SEGMENTATION"
    out.StructureSetDate, out.StructureSetTime = date, time
    out.file_meta = FileMetaDataset()
    out.file_meta.MediaStorageSOPClassUID = out.SOPClassUID
    out.file_meta.MediaStorageSOPInstanceUID = out.SOPInstanceUID
    # With explicit ones a contour of 2,000 points is too long for its value representation.
    out.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return out


def _referenced(reference: Reference) -> Dataset:
    """The series and its images."""
    series = Dataset()
    series.SeriesInstanceUID = reference.first.SeriesInstanceUID
    series.ContourImageSequence = [_image(d) for d in reference.datasets]
    study = Dataset()
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management, retired but asked for
    study.ReferencedSOPInstanceUID = reference.first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = reference.first.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _image(dataset: Dataset, frame: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = dataset.SOPClassUID
    item.ReferencedSOPInstanceUID = dataset.SOPInstanceUID
    if frame is not None:
        item.ReferencedFrameNumber = frame + 1
    return item


def _region(label: Label, reference: Reference, algorithm: Algorithm) -> Dataset:
    item = Dataset()
    item.ROINumber = label.number
    item.ReferencedFrameOfReferenceUID = reference.first.FrameOfReferenceUID
    item.ROIName = label.name[:64]
    item.ROIGenerationAlgorithm = algorithm.kind
    item.ROIGenerationDescription = f"{algorithm.name} {algorithm.version}"[:64]
    return item


def _boxes(slices: NDArray[Any]) -> dict[int, tuple[slice, ...]]:
    """The box of each number that there is, found once for all."""
    from scipy.ndimage import find_objects

    return {number: box for number, box in enumerate(find_objects(slices), start=1) if box is not None}


def _contours(label: Label, slices: NDArray[Any], box: tuple[slice, ...] | None, reference: Reference) -> Dataset:
    """Contours of a label in (slices, rows, columns), with the image that each lies on."""
    item = Dataset()
    item.ROIDisplayColor = list(colour(label.number))
    item.ReferencedROINumber = label.number
    if box is None:
        return item
    contours: list[Dataset] = []
    corner = np.array([box[1].start, box[2].start])
    for k, mask in enumerate(slices[box] == label.number, start=box[0].start):
        if not mask.any():
            continue
        image = _image(reference.first, reference.frames[k]) if reference.frames else _image(reference.datasets[k])
        for outline in outlines(mask):
            rows, columns = (outline + corner).T
            index = np.column_stack([columns, rows, np.full(len(rows), k)])
            contours.append(_contour(reference.grid.to_world(index) @ LPS[:3, :3], image, len(contours) + 1))
    item.ContourSequence = contours
    return item


def _contour(points: Points, image: Dataset, number: int) -> Dataset:
    item = Dataset()
    item.ContourImageSequence = [image]
    item.ContourGeometricType = "CLOSED_PLANAR"
    item.NumberOfContourPoints = len(points)
    item.ContourNumber = number
    text = "\\".join(f"{value:.4f}" for value in (points + 0.0).ravel())
    # As one text: an object for each number takes pydicom ten times as long.
    item[_CONTOUR_DATA] = DataElement(_CONTOUR_DATA, "DS", text, already_converted=True)
    return item


def _observation(label: Label, term: Term) -> Dataset:
    item = Dataset()
    item.ObservationNumber = label.number
    item.ReferencedROINumber = label.number
    identification = code_item(term.type)
    if term.side and not term.region:
        identification.SegmentedPropertyTypeModifierCodeSequence = [code_item(term.side)]
    item.RTROIIdentificationCodeSequence = [identification]
    item.RTROIInterpretedType = ""  # ORGAN, GTV and so on are a planner's decision
    item.ROIInterpreter = ""
    return item


# ---- reading ------------------------------------------------------------------------------------


def _read(
    dataset: Dataset,
    name: str,
    onto: Grid,
    labels: LabelSet | None,
    only: Collection[str] | None,
    frame_of_reference: str | None,
) -> LabelsRead:
    regions = _regions(dataset)
    chosen = choose_names([r.name for r in regions.values()], only)
    contours, notes = _closed(dataset, {n: r for n, r in regions.items() if r.name in chosen}, name)
    frames = {
        str(item.get("ReferencedFrameOfReferenceUID", ""))
        for item in dataset.StructureSetROISequence
        if int(item.ROINumber) in contours
    }
    require_same_frame(frames, frame_of_reference)
    found = {number: regions[number] for number in contours}
    found = _renumbered(found, labels)
    axis = _flat_axis([onto.to_index(points) for rings in contours.values() for points in rings], onto)
    # Each slice in one piece of memory.
    shape = onto.shape[axis], *(n for a, n in enumerate(onto.shape) if a != axis)
    slices = np.zeros(shape, dtype=np.min_scalar_type(max((r.number for r in found.values()), default=0)))
    clashes: dict[tuple[int, int], int] = {}
    for number, rings in contours.items():
        for k, mask in _slices(rings, onto, axis):
            there = slices[k]
            for other in np.unique(there[mask & (there != 0)]):
                pair = (int(other), found[number].number)
                clashes[pair] = clashes.get(pair, 0) + int(np.count_nonzero(mask & (there == other)))
            there[mask & (there == 0)] = found[number].number
    refuse_overlaps(clashes, {r.number: r.name for r in found.values()})
    values = np.moveaxis(slices, 0, axis)
    return LabelsRead(LabelMap(values, onto, labels or LabelSet(tuple(found.values()))), tuple(notes))


def _regions(dataset: Dataset) -> dict[int, Label]:
    """Regions by their numbers in the file; a name that comes twice gets its number."""
    codes = {}
    for item in dataset.get("RTROIObservationsSequence") or []:
        said = next(iter(item.get("RTROIIdentificationCodeSequence") or []), Dataset())
        if said.get("CodeValue"):
            codes[int(item.ReferencedROINumber)] = f"{said.get('CodingSchemeDesignator')}:{said.CodeValue}"
    items = list(dataset.get("StructureSetROISequence") or [])
    keep = all(int(item.ROINumber) > 0 for item in items)
    found: dict[int, Label] = {}
    for place, item in enumerate(items, start=1):
        number = int(item.ROINumber)
        name = str(item.get("ROIName") or f"region {number}").strip()
        if name in {label.name for label in found.values()}:
            name = f"{name} {number}"
        found[number] = Label(name, number if keep else place, codes.get(number))
    if not found:
        raise InputError("no region is described", _ANOTHER)
    return found


def _closed(dataset: Dataset, regions: dict[int, Label], name: str) -> tuple[dict[int, list[Points]], list[str]]:
    """Closed contours (n, 3), RAS mm, of regions by number, and what had to be left out."""
    found: dict[int, list[Points]] = {}
    open_ones = set()
    for item in dataset.get("ROIContourSequence") or []:
        number = int(item.ReferencedROINumber)
        if number not in regions:
            continue
        for contour in item.get("ContourSequence") or []:
            if str(contour.get("ContourGeometricType", "")) not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
                open_ones.add(number)
                continue
            found.setdefault(number, []).append(_points(contour) @ LPS[:3, :3])
    notes = []
    for number, region in regions.items():
        if number not in found:
            why = "points or open contours" if number in open_ones else "no contours"
            notes.append(f"{region.name!r} of {name} has {why} and is left out")
        elif number in open_ones:
            notes.append(f"{region.name!r} of {name} has open contours or points too, which are left out")
    if not found:
        raise InputError("no region has closed contours", _ANOTHER)
    return found, notes


def _points(contour: Dataset) -> Points:
    try:
        said = contour.get_item(_CONTOUR_DATA).value
        values = np.array(said.split(b"\\") if isinstance(said, bytes) else said, dtype=np.float64)
    except (AttributeError, TypeError, ValueError):
        values = np.empty(0)
    if len(values) < 3 or len(values) % 3 or not np.isfinite(values).all():
        raise InputError("a contour has no sound points", _ANOTHER)
    return values.reshape(-1, 3)


def _renumbered(regions: dict[int, Label], labels: LabelSet | None) -> dict[int, Label]:
    if labels is None:
        return regions
    known = {label.name.casefold(): label for label in labels}
    for region in regions.values():
        if region.name.casefold() not in known:
            raise InputError(f"region {region.name!r} is not listed", f"The labels are {labels}")
    return {number: known[region.name.casefold()] for number, region in regions.items()}


def _flat_axis(contours: Sequence[Points], onto: Grid) -> int:
    """The voxel axis that all contours stand across. InputError, with mm, where there is none."""
    extents = np.max([np.ptp(points, axis=0) for points in contours], axis=0) * onto.spacing
    axis = int(np.argmin(extents))
    if extents[axis] > 2 * _ON_SLICE_MM:
        raise InputError(
            f"contours run across the slices of the scan (over {extents[axis]:.3g} mm)",
            "Name the scan that they were drawn on",
        )
    return axis


def _slices(rings: Sequence[Points], onto: Grid, axis: int) -> list[tuple[int, NDArray[np.bool_]]]:
    """Filled contours: slice by slice along ``axis``, over the two other axes in order."""
    others = [a for a in range(3) if a != axis]
    on: dict[int, list[Points]] = {}
    for ring in rings:
        index = onto.to_index(ring)
        level = float(index[:, axis].mean())
        k = round(level)
        off = float(abs(level - k) * onto.spacing[axis])
        if off > _ON_SLICE_MM:
            raise InputError(
                f"a contour lies {off:.3g} mm beside the nearest slice of the scan",
                "Name the scan that it was drawn on",
            )
        if not 0 <= k < onto.shape[axis]:
            raise InputError("contours lie on slices that the scan does not have", "Name the whole scan")
        on.setdefault(k, []).append(index[:, others])
    shape = onto.shape[others[0]], onto.shape[others[1]]
    return [(k, filled(contours, shape)) for k, contours in sorted(on.items())]

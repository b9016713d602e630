"""Labels as a DICOM SEG, made with highdicom. `dicom_seg_read` reads them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code as DicomCode

import medseg
from medseg.core.errors import InputError
from medseg.core.labels import Label, LabelSet
from medseg.core.terminology import PRIVATE, Code, Term, Terminology, default_terminology
from medseg.core.volume import LabelMap
from medseg.io.dicom_header import quiet
from medseg.io.files import atomic
from medseg.io.reference import Reference, read_reference, series_number, uid_of


@dataclass(frozen=True)
class Algorithm:
    """What made the labels: how far by itself, what it is called, and its version."""

    kind: Literal["AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"]
    name: str
    version: str

    @classmethod
    def of_model(cls, model: str) -> Algorithm:
        """medseg with one of its models."""
        return cls("AUTOMATIC", f"medseg {model}"[:64], medseg.__version__)


@quiet()
def write_seg(
    path: Path,
    label_map: LabelMap,
    sources: Sequence[Dataset | Path] | Reference,
    algorithm: Algorithm,
    *,
    kind: Literal["binary", "labelmap"] = "binary",
    terminology: Terminology | None = None,
    made: datetime | None = None,
) -> None:
    """Write labels as a DICOM SEG of the series that they were drawn on.

    The label map lies on the grid of the series (``sources``: its datasets or files, in any order),
    flipped or permuted as it may be. Each label becomes a segment with a coded term, an unknown one
    with a private code (see `unknown_names`); a label without voxels is listed without frames. Where
    there is no voxel at all, one empty frame says so, since a SEG must have a frame. A
    binary SEG numbers its segments 1, 2, 3, ... in the order of the labels, a label map keeps their
    numbers. Patient and study come from the source. The same input and time (``made``, now unless
    given) give the same bytes. Atomic.

    Raises InputError for a label map on another grid or without labels, and for a source that is no
    sound series.
    """
    import highdicom as hd

    reference = sources if isinstance(sources, Reference) else read_reference(sources)
    slices = reference.slices_of(label_map)
    require_labels(label_map)
    numbers = _numbers(label_map.labels, kind)
    pixels = _numbered(slices, label_map.labels, numbers)
    moment = made or datetime.now(UTC)
    words = terminology or default_terminology()
    identity = _identity(reference, pixels, label_map.labels, algorithm, kind, moment)
    family = DicomCode("123110", "DCM", "Artificial Intelligence")
    identified = hd.AlgorithmIdentificationSequence(algorithm.name, family, algorithm.version, "medseg")
    segments = [
        _segment(label, numbers[label.number], words.find(label), algorithm, identified) for label in label_map.labels
    ]
    require_frame(reference)
    source = [complete_source(d) for d in reference.datasets]
    nothing = not pixels.any()
    if nothing:
        # highdicom would encode every slice of every segment, which may be gigabytes; so it is shown
        # one voxel, which is taken out again below.
        pixels = pixels.copy()
        pixels[0, 0, 0] = min(numbers.values())
    try:
        made_object = hd.seg.Segmentation(
            source_images=source,
            pixel_array=_frames(pixels, reference),
            segmentation_type=kind.upper(),
            segment_descriptions=segments,
            series_instance_uid=uid_of("series", identity),
            series_number=series_number(reference.first),
            sop_instance_uid=uid_of("instance", identity),
            instance_number=1,
            manufacturer="medseg",
            manufacturer_model_name=algorithm.name,
            software_versions=medseg.__version__,
            device_serial_number="none",
            content_label="SEGMENTATION",
            content_description="Segmentation of the referenced series",
            content_date=moment.date(),
            content_time=moment.time(),
            series_date=moment.date(),
            series_time=moment.time(),
            series_description=algorithm.name,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Its text may quote the source, and so the patient.
        raise InputError(
            f"the series cannot be referred to ({type(error).__name__})", "Export it again from the archive"
        ) from None
    made_object.ContentCreatorName = ""
    if nothing:
        made_object.PixelData = bytes(len(made_object.PixelData))
    _settle(made_object, identity, moment)
    name_private_scheme(made_object, [words.find(label) for label in label_map.labels])
    data = io.BytesIO()
    made_object.save_as(data, enforce_file_format=True)
    with atomic(path) as file:
        file.write(data.getbuffer())


def require_labels(label_map: LabelMap) -> None:
    """InputError where a label map has no labels, or a value that they do not list."""
    present = set(np.unique(label_map.values).tolist()) - {0}
    if strange := sorted(present - set(label_map.labels.numbers)):
        raise InputError(f"the label map has the value {strange[0]}, which is not listed", "Name all of its labels")
    if not len(label_map.labels):
        raise InputError("the label map has no labels", "Name them; the voxels may all be empty")


def _numbers(labels: LabelSet, kind: str) -> dict[int, int]:
    """The segment number of each label."""
    if kind == "labelmap":
        if max(labels.numbers) > np.iinfo(np.uint16).max:
            raise InputError(f"label {max(labels.numbers)} is too large for a DICOM label map", "Write a binary SEG")
        return {number: number for number in labels.numbers}
    return {number: segment for segment, number in enumerate(labels.numbers, start=1)}


def _numbered(slices: NDArray[Any], labels: LabelSet, numbers: dict[int, int]) -> NDArray[Any]:
    """Segment numbers (slices, rows, columns) from labels."""
    dtype = np.uint8 if max(numbers.values()) < 256 else np.uint16
    if all(old == new for old, new in numbers.items()):
        return slices.astype(dtype, copy=False)
    table = np.zeros(max(labels.numbers) + 1, dtype=dtype)
    for old, new in numbers.items():
        table[old] = new
    return table[slices]


def _frames(pixels: NDArray[Any], reference: Reference) -> NDArray[Any]:
    """One frame for each of the source's, which may have more than the stack that was labelled."""
    if not reference.frames:
        return pixels
    out = np.zeros((int(reference.first.NumberOfFrames), *pixels.shape[1:]), dtype=pixels.dtype)
    out[list(reference.frames)] = pixels
    return out


def _identity(
    reference: Reference,
    pixels: NDArray[Any],
    labels: LabelSet,
    algorithm: Algorithm,
    kind: str,
    moment: datetime,
) -> str:
    """What the object's UIDs are made from: everything that it holds."""
    said = repr((labels, algorithm, kind, moment.isoformat(), medseg.__version__))
    images = " ".join(str(d.SOPInstanceUID) for d in reference.datasets)
    return str(uid_of(images, said, pixels.tobytes()))


def _segment(label: Label, number: int, term: Term, algorithm: Algorithm, identified: Any) -> Any:
    import highdicom as hd

    by_hand = algorithm.kind == "MANUAL"
    segment = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label.name[:64],
        segmented_property_category=coded(term.category),
        segmented_property_type=coded(term.type),
        algorithm_type=algorithm.kind,
        algorithm_identification=None if by_hand else identified,
        anatomic_regions=[coded(term.region)] if term.region else None,
        display_color=hd.color.CIELabColor.from_rgb(*colour(number)),
    )
    if term.side:
        # Of a tumour the side is its organ's.
        if term.region:
            segment.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [code_item(term.side)]
        else:
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
                code_item(term.side)
            ]
    return segment


def coded(code: Code) -> DicomCode:
    """A code in pydicom's words."""
    return DicomCode(code.value, code.scheme, code.meaning)


def code_item(code: Code) -> Dataset:
    """A code as an item of a sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme, code.meaning
    return item


def name_private_scheme(dataset: Dataset, terms: Iterable[Term]) -> None:
    """Say whose the private codes are, where there are any."""
    if all(term.known for term in terms):
        return
    item = Dataset()
    item.CodingSchemeDesignator = PRIVATE
    item.CodingSchemeName = "Names of labels that medseg has no SNOMED CT code for"
    dataset.CodingSchemeIdentificationSequence = [item]


def colour(number: int) -> tuple[int, int, int]:
    """A colour (red, green, blue, 0 to 255) for a label; neighbours in number are far in hue."""
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.65, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def complete_source(source: Dataset) -> Dataset:
    """The source with what DICOM wants present, empty where it is not known."""
    out = Dataset()
    out.update(source)
    for keyword in (
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "PatientSex",
        "AccessionNumber",
        "StudyID",
        "StudyDate",
        "StudyTime",
        "ReferringPhysicianName",
        "PositionReferenceIndicator",
    ):
        if keyword not in out:
            setattr(out, keyword, "")
    return out


def _settle(made: Dataset, identity: str, moment: datetime) -> None:
    """What highdicom draws at random or takes from the clock, from the object's own identity."""
    made.InstanceCreationDate = moment.strftime("%Y%m%d")
    made.InstanceCreationTime = moment.strftime("%H%M%S.%f")
    for item in made.get("ContributingEquipmentSequence") or []:
        if "ContributionDateTime" in item:
            item.ContributionDateTime = moment.strftime("%Y%m%d%H%M%S.%f")
    dimension = uid_of("dimension", identity)
    made.DimensionOrganizationSequence[0].DimensionOrganizationUID = dimension
    for item in made.DimensionIndexSequence:
        item.DimensionOrganizationUID = dimension


def require_frame(reference: Reference) -> None:
    """InputError where the series has no frame of reference that an object could share."""
    if not reference.first.get("FrameOfReferenceUID"):
        raise InputError("the series has no frame of reference", "Export it again from the archive")

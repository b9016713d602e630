"""What the header of a DICOM file says of the file and of each of its frames."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import UID

from medseg.core.errors import InputError
from medseg.io.dicom_grid import Frame
from medseg.io.sources import Source

# What a file can be that is no scan, by SOP class and what is said of it.
_KINDS = {
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.11": "presentation state",
    "1.2.840.10008.5.1.4.1.1.30": "parametric map",
    "1.2.840.10008.5.1.4.1.1.66": "raw data",
    "1.2.840.10008.5.1.4.1.1.66.1": "registration",
    "1.2.840.10008.5.1.4.1.1.66.3": "registration",
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation",
    "1.2.840.10008.5.1.4.1.1.66.5": "surface segmentation",
    "1.2.840.10008.5.1.4.1.1.66.6": "tractography",
    "1.2.840.10008.5.1.4.1.1.66.7": "segmentation",
    "1.2.840.10008.5.1.4.1.1.67": "real world value mapping",
    "1.2.840.10008.5.1.4.1.1.9": "waveform",
    "1.2.840.10008.5.1.4.1.1.88": "report",
    "1.2.840.10008.5.1.4.1.1.104": "document",
    "1.2.840.10008.5.1.4.1.1.481.2": "dose",
    "1.2.840.10008.5.1.4.1.1.481.3": "structure set",
    "1.2.840.10008.5.1.4.1.1.481": "radiotherapy object",
    "1.2.840.10008.5.1.4.1.1.4.2": "spectroscopy",
}
# More frames than any scan has are not counted: the number is only the header's word.
_MOST_FRAMES = 100_000
# MR localizers seldom say so but in words.
_LOCALIZER = re.compile(r"(?<![a-z])(locali[sz]er|scout|topogram|surview|scanogram)(?![a-z])", re.IGNORECASE)
PET = ("1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.130", "1.2.840.10008.5.1.4.1.1.128.1")
# All that is read of a header; nothing else of a patient ever gets into memory.
TAGS = [
    "SOPClassUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "SeriesNumber",
    "InstanceNumber",
    "Modality",
    "SeriesDescription",
    "ProtocolName",
    "ImageType",
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "AccessionNumber",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "EchoTime",
    "TemporalPositionIdentifier",
    "PixelPresentation",
    "AcquisitionNumber",
    "DiffusionBValue",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "DimensionIndexSequence",
    "DirectoryRecordSequence",
]


@dataclass(frozen=True, eq=False)
class Item:
    """A frame, what it belongs to, and what may tell it apart from another at its position."""

    frame: Frame
    series: tuple[str, ...]
    header: Any = field(repr=False)
    apart: dict[str, Any]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what pydicom warns of and logs to itself: it quotes the values that it complains of."""
    log = logging.getLogger("pydicom")
    disabled = log.disabled
    try:
        log.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = disabled


def kind_of(header: Any) -> str:
    """ "image", or what the object is instead."""
    sop = str(header.get("SOPClassUID", ""))
    kind = _KINDS.get(sop) or next((k for uid, k in _KINDS.items() if sop.startswith(f"{uid}.")), None)
    if kind:
        return kind
    types = [str(word).strip().upper() for word in header.get("ImageType") or []]
    if "LOCALIZER" in types or "SCOUT" in types or _LOCALIZER.search(str(header.get("SeriesDescription") or "")):
        return "localizer"
    if any(word.startswith("PROJECTION") for word in types):
        return "projection"
    if header.get("Rows") and header.get("Columns"):
        return "image"
    return "damaged" if UID(sop).name.endswith("Image Storage") else "object without pixels"


def items_of(header: Any, source: Source, key: tuple[str, ...]) -> Iterator[Item]:
    """The frames of a file; one where it holds a single slice."""
    groups = header.get("PerFrameFunctionalGroupsSequence")
    return _many(header, groups, source, key) if groups else _single(header, source, key)


def _single(header: Any, source: Source, key: tuple[str, ...]) -> Iterator[Item]:
    frame = _frame(header, _plain(header), source, 0)
    apart = {
        "type": words_of(header.get("ImageType")),
        "echo": number_of(header.get("EchoTime")),
        "time": number_of(header.get("TemporalPositionIdentifier")),
        "diffusion": number_of(header.get("DiffusionBValue")),
        "acquisition": number_of(header.get("AcquisitionNumber")),
    }
    frames = int(header.get("NumberOfFrames") or 1)
    for index in range(min(frames, _MOST_FRAMES)):
        # Without functional groups the frames of a file do not say where each of them is.
        yield Item(replace(frame, index=index, position=None) if frames > 1 else frame, key, header, apart)


def _many(header: Any, groups: Any, source: Source, key: tuple[str, ...]) -> Iterator[Item]:
    if len(groups) != int(header.get("NumberOfFrames") or 0):
        raise ValueError("frames without a description, or the other way round")
    shared = (header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    pointers = [int(d.get("DimensionIndexPointer", 0)) for d in header.get("DimensionIndexSequence") or []]
    # Stack, place in the stack and position are no marks: they say where a frame is.
    marks = [i for i, p in enumerate(pointers) if p not in (0x00209056, 0x00209057, 0x00200032)]
    kind = "CTImageFrameTypeSequence" if str(header.get("Modality")) == "CT" else "MRImageFrameTypeSequence"
    for index, own in enumerate(groups):
        look = _Groups(own, shared)
        indices = look("FrameContentSequence", "DimensionIndexValues")
        indices = [] if indices is None else [int(v) for v in np.atleast_1d(indices)]
        apart = {
            "stack": str(look("FrameContentSequence", "StackID") or ""),
            "component": str(look(kind, "ComplexImageComponent") or ""),
            "type": words_of(look(kind, "FrameType")),
            "echo": number_of(look("MREchoSequence", "EffectiveEchoTime")),
            "time": number_of(look("FrameContentSequence", "TemporalPositionIndex")),
            "diffusion": number_of(look("MRDiffusionSequence", "DiffusionBValue")),
            "acquisition": number_of(look("FrameContentSequence", "FrameAcquisitionNumber")),
            "dimensions": tuple(indices[i] for i in marks if i < len(indices)),
        }
        geometry = {
            "position": look("PlanePositionSequence", "ImagePositionPatient"),
            "orientation": look("PlaneOrientationSequence", "ImageOrientationPatient"),
            "spacing": look("PixelMeasuresSequence", "PixelSpacing"),
            "thickness": look("PixelMeasuresSequence", "SliceThickness"),
            "slope": look("PixelValueTransformationSequence", "RescaleSlope"),
            "intercept": look("PixelValueTransformationSequence", "RescaleIntercept"),
        }
        yield Item(_frame(header, geometry, source, index), key, header, apart)


@dataclass(frozen=True)
class _Groups:
    """Functional groups: a frame's own before those that all share."""

    own: Any
    shared: Any

    def __call__(self, group: str, name: str) -> Any:
        for groups in (self.own, self.shared):
            if sequence := groups.get(group):
                return sequence[0].get(name)
        return None


def _plain(header: Any) -> dict[str, Any]:
    return {
        "position": header.get("ImagePositionPatient"),
        "orientation": header.get("ImageOrientationPatient"),
        "spacing": header.get("PixelSpacing"),
        "thickness": header.get("SliceThickness"),
        "slope": header.get("RescaleSlope"),
        "intercept": header.get("RescaleIntercept"),
    }


def _frame(header: Any, geometry: dict[str, Any], source: Source, index: int) -> Frame:
    orientation = _vector(geometry["orientation"], 6)
    spacing = _vector(geometry["spacing"], 2)
    if spacing is not None and spacing.min() <= 0:
        spacing = None
    thickness = number_of(geometry["thickness"])
    slope, intercept = number_of(geometry["slope"]), number_of(geometry["intercept"])
    if slope == 0:
        raise ValueError("a slope of zero leaves nothing of the image")
    return Frame(
        source,
        index,
        (int(header.Columns), int(header.Rows)),
        _vector(geometry["position"], 3),
        None if orientation is None else orientation[:3],
        None if orientation is None else orientation[3:],
        # Pixel Spacing names the distance between rows first (PS3.3 10.7.1.3).
        None if spacing is None else (float(spacing[1]), float(spacing[0])),
        thickness if thickness and thickness > 0 else None,
        1.0 if slope is None else slope,
        0.0 if intercept is None else intercept,
    )


def _vector(value: Any, length: int) -> NDArray[np.float64] | None:
    if value is None or isinstance(value, str) or np.size(value) != length:
        return None
    vector = np.array([float(v) for v in value])
    return vector if np.isfinite(vector).all() and np.abs(vector).max() < 1e9 else None


def number_of(value: Any) -> float | None:
    """A number, None where there is none. Raises ValueError or TypeError for what is no finite one."""
    if value is None or not str(value).strip():
        return None
    found = float(value)
    if not np.isfinite(found):
        raise ValueError("not finite")
    return found


def words_of(value: Any) -> tuple[str, ...]:
    """The values of an attribute that may have one or several."""
    return tuple(str(v).strip() for v in ([value] if isinstance(value, str) else value or []))


def require_intensities(header: Any) -> tuple[str, ...]:
    """What to say of an image; InputError where its values are no intensities of one slice."""
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise InputError("it is a colour image", "Choose a series of intensities")
    if str(header.get("PhotometricInterpretation", "")) not in ("MONOCHROME1", "MONOCHROME2"):
        raise InputError("its values stand for colours", "Choose a series of intensities")
    if "MOSAIC" in words_of(header.get("ImageType")):
        raise InputError("its slices are tiled into one picture (a mosaic)", "Export it as enhanced DICOM or NIfTI")
    if header.get("ModalityLUTSequence"):
        raise InputError("its values are given by a table (modality LUT)", "Export it with a rescale slope")
    plain = not header.get("PerFrameFunctionalGroupsSequence")
    if plain and str(header.get("Modality")) == "CT" and number_of(header.get("RescaleIntercept")) is None:
        raise InputError("it does not say how its values become Hounsfield units", "Export it with its rescale slope")
    if int(header.get("BitsAllocated") or 0) not in (8, 16, 32):
        raise InputError(f"it has {header.get('BitsAllocated')} bits a pixel", "Choose a series of intensities")
    if str(header.get("PixelPresentation", "")) in ("COLOR", "MIXED"):
        return ("some of its values stand for colours (supplemental palette)",)
    return ()


def patient_of(header: Any) -> str:
    """A digest that tells patients apart and names none."""
    identity = str(header.get("PatientID") or "").strip()
    if not identity:
        identity = f"{header.get('PatientName') or ''}|{header.get('PatientBirthDate') or ''}"
    return hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:16]


def clean(value: Any, header: Any) -> str:
    """A description on one line; withheld where somebody wrote the patient into it."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value or "")).split())[:60]
    secrets = [str(header.get(name) or "") for name in ("PatientID", "PatientBirthDate", "AccessionNumber")]
    secrets += str(header.get("PatientName") or "").replace("^", " ").replace("=", " ").split()
    told = any(len(s) > 2 and re.search(rf"(?<!\w){re.escape(s)}(?!\w)", text, re.IGNORECASE) for s in secrets)
    return "(withheld)" if told else text

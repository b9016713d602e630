"""What a model was trained on, and how a scan differs from it.

A network answers for any scan, also for one unlike all that it has seen. The scan is therefore
compared with the training cases before anyone reads the answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from medseg.core.errors import InputError
from medseg.core.labels import LabelSet
from medseg.core.volume import Volume
from medseg.plan.fingerprint import PERCENTILES, CasePrint, ChannelPrint, Fingerprint, Source, channel_prints
from medseg.plan.plan import Count, Finite, Strict

Float64 = NDArray[np.float64]
Severity = Literal["note", "warning", "gross"]

# Spacing and field of view may lie outside the trained range by this factor.
_FACTOR = 1.5
# Percentiles may lie outside the trained range by this much on average: of the range's own width, and
# of the least width, which stands in for what few cases do not show.
_EXCESS = 0.8
_LEAST_HU = 60.0
_LEAST_PROFILE = 0.15
# A share of zero or negative voxels that is so far outside the trained range is another kind of scan.
_SHARE = 0.25
# In Hounsfield units air is near -1000, lung -800, fat -100, and metal ends at 3071 (-32768 to 32767 in
# extended scales, but never in 1 % of a scan).
_AIR_HU, _NO_AIR_HU, _MOST_HU = -200.0, -50.0, 4000.0
_MODALITIES = {
    "CT": r"ct|cta|cect|ncct|cbct",
    "MR": r"mri?|t1\w*|t2\w*|flair|adc|dwi|pd\w?|stir|swi|dti|dce|mprage|space|ciss|bold|gre",
    "PT": r"pet|pt|suv",
}
# DICOM's words for "something else" and for pictures of pictures.
_UNKNOWN = ("OT", "SC", "")


class Range(Strict):
    """The least and the largest of the training cases' values."""

    low: Finite
    high: Finite

    def __str__(self) -> str:
        return _number(self.low) if self.low == self.high else f"{_number(self.low)} to {_number(self.high)}"


Triple = tuple[Range, Range, Range]
Seven = tuple[Range, Range, Range, Range, Range, Range, Range]


class ChannelExperience(Strict):
    """One channel over the training cases: its `PERCENTILES` as stored, and as a ``profile`` (less the
    median, over the distance from the 5th to the 95th), which has no unit."""

    name: str
    modality: Literal["CT", "MR", "PT"] | None
    percentiles: Seven
    profile: Seven
    zero_share: Range
    negative_share: Range


class StructureExperience(Strict):
    """One structure over the training cases: in how many it was (``cases``), in how many of those the
    scan's border cut it, its volume in mm3 and its number of far-apart pieces where it was."""

    name: str
    number: Annotated[int, Field(ge=1)]
    cases: Annotated[int, Field(ge=0)]
    cut: Annotated[int, Field(ge=0)]
    mm3: Range | None
    pieces: Range | None


class Experience(Strict):
    """What ``experience.json`` of a package holds. ``spacing`` (mm) and ``extent`` (field of view, mm)
    are along x, y, z; ``orientations`` are those of the files' own axes; ``source`` says where the data
    come from, None where nobody noted it."""

    format: Literal[1] = 1
    cases: Count
    spacing: Triple
    extent: Triple
    orientations: tuple[str, ...]
    channels: tuple[ChannelExperience, ...]
    structures: tuple[StructureExperience, ...]
    source: Annotated[Source | None, Field(default=None, exclude_if=lambda value: value is None)]

    def structure(self, number: int) -> StructureExperience | None:
        """What is known of a structure, by its number."""
        return next((s for s in self.structures if s.number == number), None)


@dataclass(frozen=True)
class Mismatch:
    """One thing in which a scan differs from the training cases. A ``note`` is no reason to doubt, a
    ``warning`` is one, and a ``gross`` one is refused unless forced."""

    what: str
    found: str
    trained: str
    severity: Severity

    def __str__(self) -> str:
        return f"{self.what}: {self.found}; the model was trained on {self.trained}"


def modality_of(channel: str) -> Literal["CT", "MR", "PT"] | None:
    """DICOM's word for what a channel's name says, None where it says nothing."""
    for word in re.split(r"[^a-z0-9]+", channel.lower()):
        for name, pattern in _MODALITIES.items():
            if re.fullmatch(pattern, word):
                return name  # type: ignore[return-value]
    return None


def experience(measured: Fingerprint, cases: Iterable[str], labels: LabelSet) -> Experience:
    """What a model saw that was trained on these cases of a fingerprinted task.

    Raises InputError where the fingerprint does not hold one of them.
    """
    rows = {row.id: row for row in measured.cases}
    ids = tuple(cases)
    if missing := [case for case in ids if case not in rows]:
        raise InputError(f"the fingerprint of {measured.task} has no case {missing[0]}", "Plan anew")
    seen = [rows[case] for case in ids]
    spacing = np.array([row.spacing for row in seen])
    channels = []
    for number, channel in enumerate(measured.intensities):
        prints = [row.channels[number] for row in seen]
        channels.append(
            ChannelExperience(
                name=channel.channel,
                modality=modality_of(channel.channel),
                percentiles=_seven(np.array([p.percentiles for p in prints])),
                profile=_seven(np.array([profile(p) for p in prints])),
                zero_share=_range([p.zero_share for p in prints]),
                negative_share=_range([p.negative_share for p in prints]),
            )
        )
    return Experience(
        cases=len(seen),
        spacing=_three(spacing),
        extent=_three(spacing * np.array([row.shape for row in seen])),
        orientations=tuple(sorted({row.orientation for row in seen})),
        channels=tuple(channels),
        structures=tuple(_structure(seen, label.name, label.number) for label in labels),
        source=measured.source,
    )


def _structure(seen: Sequence[CasePrint], name: str, number: int) -> StructureExperience:
    having = [row for row in seen if number in row.label_mm3]
    return StructureExperience(
        name=name,
        number=number,
        cases=len(having),
        cut=sum(number in row.label_cut for row in having),
        mm3=_range([row.label_mm3[number] for row in having]) if having else None,
        pieces=_range([row.label_pieces[number] for row in having if number in row.label_pieces] or [1])
        if having
        else None,
    )


def profile(channel: ChannelPrint) -> Float64:
    """The percentiles (7,) less the median, over the distance from the 5th to the 95th: what remains of
    them where intensities have no unit. Zeros for a constant scan."""
    points = np.array(channel.percentiles)
    width = points[PERCENTILES.index(95.0)] - points[PERCENTILES.index(5.0)]
    centred: Float64 = points - points[PERCENTILES.index(50.0)]
    return centred / width if width > 0 else np.zeros_like(points)


def compare(
    volume: Volume, trained: Experience, modality: str | None = None, missing: Collection[str] = ()
) -> tuple[Mismatch, ...]:
    """How a scan differs from the training cases, the gravest first.

    ``modality`` is DICOM's word for what made the scan, where it is known (the volume's own, unless
    given); channels that are ``missing`` are left out. Only what no training case comes near is told: a
    scan that resembles them gives nothing. Gross are another modality by DICOM's word; for a CT model,
    values that cannot be Hounsfield units; for another, values that can only be.

    Raises InputError where the scan has another number of channels.
    """
    if volume.channels != len(trained.channels):
        raise InputError(
            f"the scan has {volume.channels} channels, the model takes {len(trained.channels)} "
            f"({', '.join(c.name for c in trained.channels)})",
            "Give the channels that the model was trained on, in that order",
        )
    said = modality or volume.modality
    known = None if said in _UNKNOWN else said
    found = list(_geometry(volume, trained))
    for channel, now in zip(trained.channels, channel_prints(volume), strict=True):
        found += [] if channel.name in missing else _channel(channel, now, known)
    order: tuple[Severity, ...] = ("gross", "warning", "note")
    return tuple(sorted(found, key=lambda mismatch: order.index(mismatch.severity)))


def refuse_gross(mismatches: Iterable[Mismatch]) -> None:
    """InputError for the first gross one."""
    for mismatch in mismatches:
        if mismatch.severity == "gross":
            raise InputError(str(mismatch), "Choose the model for this kind of scan, or add --force to do it anyway")


def _geometry(volume: Volume, trained: Experience) -> Iterable[Mismatch]:
    grid = volume.grid.reoriented()
    extent = [n * s for n, s in zip(grid.shape, grid.spacing, strict=True)]
    rows: tuple[tuple[str, Sequence[float], Triple], ...] = (
        ("spacing", grid.spacing, trained.spacing),
        ("field of view", extent, trained.extent),
    )
    for what, values, ranges in rows:
        if any(not r.low / _FACTOR <= v <= r.high * _FACTOR for v, r in zip(values, ranges, strict=True)):
            yield Mismatch(
                what,
                " x ".join(_number(v) for v in values) + " mm",
                " x ".join(f"({r})" if r.low < r.high else str(r) for r in ranges) + " mm",
                "warning",
            )
    if volume.grid.orientation not in trained.orientations:
        # Every scan is turned to RAS, so this alone does no harm; it tells of another source.
        yield Mismatch("axes", volume.grid.orientation, " and ".join(trained.orientations), "note")


def _channel(trained: ChannelExperience, now: ChannelPrint, known: str | None) -> list[Mismatch]:
    """The gravest mismatches of a channel's intensities; lesser ones that follow from it are left out."""
    name = f"channel {trained.name}"
    if known and trained.modality and known != trained.modality:
        return [Mismatch(f"modality of {name}", known, trained.modality, "gross")]
    # Where DICOM says that the modality is right, any values but a CT's may be what they like.
    check = _not_hounsfield if trained.modality == "CT" else None if known else _hounsfield
    if check is not None and (words := check(trained, now)):
        return [Mismatch(f"intensities of {name}", *words, "gross")]
    found = []
    for what, value, seen in (
        ("zero", now.zero_share, trained.zero_share),
        ("negative", now.negative_share, trained.negative_share),
    ):
        if not seen.low - _SHARE <= value <= seen.high + _SHARE:
            told = f"{100 * seen.low:.0f} to {100 * seen.high:.0f} %"
            found.append(Mismatch(f"{what} voxels of {name}", f"{100 * value:.0f} %", told, "warning"))
    points, ranges, least = np.array(now.percentiles), trained.percentiles, _LEAST_HU
    if trained.modality != "CT":
        points, ranges, least = profile(now), trained.profile, _LEAST_PROFILE
    if excess(points, ranges, least) > _EXCESS:
        kind = "" if trained.modality == "CT" else ", from the median, by their width"
        what = f"intensities of {name} (5th, 50th, 95th percentile{kind})"
        found.append(Mismatch(what, _words(points), _words(ranges), "warning"))
    return found


def excess(points: Float64, ranges: Sequence[Range], least: float) -> float:
    """How far percentiles lie outside the trained ranges: for each the distance to its range over the
    range's width (or ``least``, where that is more), and of those the mean without the largest. One
    alone says little: where a twentieth of a CT is air, the 5th percentile is anywhere between air and
    fat. 0 where all lie within."""
    low, high = np.array([r.low for r in ranges]), np.array([r.high for r in ranges])
    outside = np.maximum(np.maximum(low - points, points - high), 0)
    return float(np.mean(np.sort(outside / np.maximum(high - low, least))[:-1]))


def _not_hounsfield(trained: ChannelExperience, now: ChannelPrint) -> tuple[str, str] | None:
    """What the scan has and the training had, where its values cannot be Hounsfield units."""
    low, high = now.percentiles[0], now.percentiles[-1]
    if trained.percentiles[0].high <= _AIR_HU and low > _NO_AIR_HU:
        return (
            f"nothing below {_number(low)}, so no air or fat in Hounsfield units: MR, or CT that lost its offset",
            f"CT with air (1 % of the voxels below {trained.percentiles[0]} HU)",
        )
    if high > _MOST_HU and trained.percentiles[-1].high <= _MOST_HU:
        return f"1 % of the voxels above {_number(high)}, which no tissue has in Hounsfield units", "CT"
    return None


def _hounsfield(trained: ChannelExperience, now: ChannelPrint) -> tuple[str, str] | None:
    """What the scan has and the training had, where its values can only be Hounsfield units."""
    never = trained.negative_share.high < 0.05
    if never and now.negative_share > 0.1 and now.percentiles[0] <= _AIR_HU and now.percentiles[-1] <= _MOST_HU:
        return (
            f"{100 * now.negative_share:.0f} % of the voxels below zero, down to {_number(now.percentiles[0])}, "
            "as in Hounsfield units: CT",
            f"{trained.modality or 'scans'} without such values",
        )
    return None


def _words(points: Sequence[float] | Sequence[Range] | Float64) -> str:
    """The 5th, 50th and 95th percentile of seven."""
    chosen = [points[PERCENTILES.index(p)] for p in (5.0, 50.0, 95.0)]
    return ", ".join(str(v) if isinstance(v, Range) else _number(v) for v in chosen)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _range(values: Sequence[float]) -> Range:
    return Range(low=float(min(values)), high=float(max(values)))


def _three(values: Float64) -> Triple:
    ranges = [_range(column) for column in values.T.tolist()]
    return ranges[0], ranges[1], ranges[2]


def _seven(values: Float64) -> Seven:
    a, b, c, d, e, f, g = (_range(column) for column in values.T.tolist())
    return a, b, c, d, e, f, g

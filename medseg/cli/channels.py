"""``--channel`` and ``--register``: one case whose channels are several scans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.core.errors import InputError

if TYPE_CHECKING:
    from medseg.core.progress import Progress
    from medseg.core.volume import Volume
    from medseg.plan.plan import Normalisation

# Less of the first channel's field of view than this is worth a warning.
_WHOLE = 0.99


@dataclass(frozen=True)
class ChannelScan:
    """A channel, the scan that has it and, of a DICOM folder, which series."""

    name: str
    path: Path
    series: int | None = None


def parse_channels(
    options: Sequence[str], wanted: Sequence[str], optional: Sequence[str] = ()
) -> tuple[ChannelScan, ...]:
    """``NAME=SCAN`` or ``NAME=FOLDER#SERIES`` for each of the model's channels, in the model's order;
    ``optional`` ones may be left out.

    Raises InputError, by name, for a channel that is missing, comes twice or is none of the model's.
    """
    said = [f"{name} (may be missing)" if name in optional else name for name in wanted]
    remedy = f"Give each once, as --channel NAME=SCAN: {', '.join(said)}"
    given: dict[str, ChannelScan] = {}
    for option in options:
        name, sign, text = option.partition("=")
        if not sign or not text:
            raise InputError(f"--channel {option} is not NAME=SCAN", remedy)
        if name not in wanted:
            raise InputError(f"the model has no channel {name!r}", remedy)
        if name in given:
            raise InputError(f"the channel {name} comes twice", remedy)
        number = re.fullmatch(r"(.+)#([1-9][0-9]*)", text)
        if number and not Path(text).exists():
            given[name] = ChannelScan(name, Path(number[1]), int(number[2]))
        else:
            given[name] = ChannelScan(name, Path(text))
    if missing := [name for name in wanted if name not in given and name not in optional]:
        raise InputError(f"the channel {', '.join(missing)} is missing", remedy)
    return tuple(given[name] for name in wanted if name in given)


def read_channels(
    scans: Sequence[ChannelScan], rules: Sequence[Normalisation], *, align: bool, progress: Progress
) -> tuple[Volume, tuple[str, ...], list[dict[str, Any]]]:
    """The case on its first channel's grid with every channel of ``rules``, what to know of it, and a
    record of each channel: its scan (None where it is missing), how much of the first one's field of
    view it covers and how it was aligned."""
    from medseg.io.scan import read_scan, scan_digest
    from medseg.preprocess.channels import assemble, complete, overlap, register

    volumes: dict[str, Volume] = {}
    notes: list[str] = []
    records: list[dict[str, Any]] = []
    first: Volume | None = None
    for scan in scans:
        try:
            volume, said = read_scan(scan.path, scan.series, progress=progress)
            record: dict[str, Any] = {
                "name": scan.name,
                "scan": scan.path.name,
                "series": scan.series,
                "sha256": scan_digest(scan.path),
            }
            if first is not None and align:
                alignment = register(volume, first)
                volume = alignment.apply(volume)
                record["alignment"] = {
                    "transform": alignment.transform.tolist(),
                    "rotation_degrees": round(alignment.rotation_degrees, 4),
                    "translation_mm": round(alignment.translation_mm, 4),
                    "mutual_information_before": round(alignment.information_before, 6),
                    "mutual_information": round(alignment.information, 6),
                }
                said += (
                    f"{scan.name} was turned by {alignment.rotation_degrees:.1f} degrees "
                    f"and moved by {alignment.translation_mm:.1f} mm to fit {scans[0].name}",
                )
        except InputError as error:
            raise InputError(f"channel {scan.name}: {error.fault}", error.remedy) from None
        first = first or volume
        share = overlap(volume.grid, first.grid)
        if share < _WHOLE:
            said += (f"{scan.name} covers only {share:.0%} of what {scans[0].name} shows",)
        volumes[scan.name] = volume
        notes += said
        records.append({**record, "overlap": round(share, 4)})
    for rule in rules:
        if rule.channel not in volumes:
            notes.append(f"{rule.channel} was not given; its mean stands in its place, and the result may be worse")
            records.append({"name": rule.channel, "scan": None})
    return complete(assemble(volumes), list(volumes), rules), tuple(notes), records

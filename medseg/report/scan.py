"""One page of one scan: what was found, how much of it, how sure that is, and what to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.look import COLOURS
from medseg.core.volume import LabelMap
from medseg.core.words import count
from medseg.report.page import embedded, environment, resource
from medseg.report.pictures import Look, pictures, scans
from medseg.report.tables import text_of

_KEY = "scan"


@dataclass(frozen=True)
class Organ:
    """A structure that the model knows: its volume, of which only the least is known where the scan's border cuts it
    (``cut``); the mean probability of its voxels; and the Dice that a calibrated model expects."""

    name: str
    volume_ml: float
    confidence: float | None
    predicted_dice: float | None
    cut: bool


@dataclass(frozen=True, eq=False)
class ScanPage:
    """All that the page of a scan shows: one channel (X, Y, Z) on its grid, and what was found on the same one.
    ``review`` says why a person should look before the result is used, ``notes`` what else to know; ``calibrated`` on
    how many held-out cases confidence and predicted Dice stand; ``provenance`` is shown as it is."""

    title: str
    image: NDArray[Any]
    grid: Grid
    found: LabelMap
    organs: Sequence[Organ]
    review: Sequence[str]
    notes: Sequence[str]
    calibrated: int | None
    provenance: Mapping[str, str]


def scan_report(scan: ScanPage) -> str:
    """The page as one HTML text, which loads nothing. The same scan gives the same text.

    Raises InputError where the label map does not lie on the scan's grid.
    """
    look = Look(_KEY, scan.title, "the scan", scan.image, scan.grid, None, scan.found)
    there = [organ for organ in scan.organs if organ.volume_ml > 0]
    absent = [organ.name for organ in scan.organs if organ.volume_ml == 0]
    return (
        environment()
        .get_template("scan.html.j2")
        .render(
            scan=scan,
            headline=_headline(len(there), len(scan.review)),
            organs=[(organ, _volume(organ)) for organ in there],
            absent=absent,
            text=text_of,
            picture_of_it=pictures([look])[0],
            structure_colours=COLOURS,
            data=embedded(scans([look])),
            viewer=resource("vendor/niivue.umd.js"),
            script=resource("tables.js") + resource("viewer.js"),
        )
    )


def _volume(organ: Organ) -> str:
    # Of a structure that goes on beyond the scan, only the least volume is known.
    return f"{'≥ ' if organ.cut else ''}{text_of(organ.volume_ml, 2 if organ.volume_ml < 100 else 1)}"


def _headline(found: int, reasons: int) -> str:
    if not found:
        return "No structure was found in this scan."
    look = (
        f"Look before it is used: {count(reasons, 'reason')}, below." if reasons else "Nothing was flagged for review."
    )
    return f"{count(found, 'structure').capitalize()} {'was' if found == 1 else 'were'} found. {look}"

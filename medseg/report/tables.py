"""What a run reached, as tables: for a person (Markdown), for a spreadsheet (CSV) and for a program (JSON)."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from medseg.evaluate.calibration import Reliability
from medseg.evaluate.score import CaseMetrics, LabelSummary, summarise
from medseg.evaluate.statistics import intervals
from medseg.models.evaluation import Figure

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Scored:
    """What one fold of a configuration reached: a row per case and label, the Dice that the model had ``predicted`` by
    case and label, and whether its probabilities mean what they say, where these were kept."""

    configuration: str
    fold: int
    rows: tuple[CaseMetrics, ...]
    predicted: Mapping[tuple[str, int], float] = field(default_factory=dict)
    reliable: tuple[Reliability, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column of numbers: the field they are in, what stands above them, and how many decimals."""

    field: str
    heading: str
    unit: str
    digits: int

    def of(self, row: CaseMetrics | LabelSummary) -> str:
        """The field of a row as text."""
        return text_of(getattr(row, self.field), self.digits)


CASE_COLUMNS = (
    Column("dice", "Dice", "", 3),
    Column("nsd", "NSD", "", 3),
    Column("hd95_mm", "HD95", "mm", 1),
    Column("assd_mm", "ASSD", "mm", 2),
    Column("volume_error_percent", "Volume error", "%", 1),
    Column("iou", "IoU", "", 3),
    Column("precision", "Precision", "", 3),
    Column("recall", "Recall", "", 3),
    Column("boundary_iou", "Boundary IoU", "", 3),
    Column("cldice", "clDice", "", 3),
    Column("hd_mm", "HD", "mm", 1),
    Column("centroid_mm", "Centroid", "mm", 1),
)
# What is drawn of every case: a missed or invented organ has no surface to measure to.
DRAWN = ("dice", "nsd", "hd95_mm", "assd_mm", "volume_error_percent", "boundary_iou", "cldice", "precision", "recall")
ORGAN_COLUMNS = (
    Column("dice_median", "Dice", "median", 3),
    Column("nsd_mean", "NSD", "mean", 3),
    Column("hd95_mean_mm", "HD95", "mean, mm", 1),
    Column("assd_mean_mm", "ASSD", "mean, mm", 2),
    Column("volume_error_percent_median", "Volume error", "median, %", 1),
)


def to_markdown(scored: Iterable[Scored]) -> str:
    """A Markdown table for a paper or a README: a row per configuration and organ over the cases of
    all folds, and one for the mean over organs.

    Raises InputError where a configuration scored a case twice.
    """
    head = [
        "Configuration",
        "Organ",
        "n",
        "Dice (mean ± sd)",
        "95 % interval",
        *(f"{c.heading} ({c.unit})" for c in ORGAN_COLUMNS),
    ]
    lines = [_piped([*head, "Missed"]), _piped(["---", "---", *["---:"] * (len(head) - 1)])]
    for configuration, rows in by_configuration(scored).items():
        sure = intervals(rows, ("dice",))
        for one in summarise(rows):
            name = one.name if one.label is not None else "**mean over organs**"
            ends = interval(sure.get((one.label, "dice"))) or "–"
            cells = [str(one.cases), mean_sd(one), ends, *(c.of(one) for c in ORGAN_COLUMNS), str(one.missed)]
            lines.append(_piped([configuration, name, *cells]))
    return "\n".join(lines) + "\n"


def to_csv(scored: Iterable[Scored]) -> str:
    """A line for each case and label of every configuration, under a line of column names; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [one.name for one in fields(CaseMetrics)]
    writer.writerow(["configuration", "fold", *names, "predicted_dice"])
    for one in sorted(scored, key=lambda s: (s.configuration, s.fold)):
        for row in one.rows:
            predicted = one.predicted.get((row.case, row.label))
            writer.writerow([one.configuration, one.fold, *(getattr(row, name) for name in names), predicted])
    return text.getvalue()


def to_json(scored: Iterable[Scored], about: Mapping[str, Any]) -> dict[str, Any]:
    """What a run reached, by configuration: every label's summary with intervals, and ``about`` it all else that its
    page tells. The cases are those of `to_csv`."""
    configurations = {}
    for name, rows in by_configuration(scored).items():
        sure = intervals(rows)
        configurations[name] = [
            asdict(one)
            | {f"{what}_interval": _ends(sure.get((one.label, what))) for what in ("dice", "nsd", "hd95_mm")}
            for one in summarise(rows)
        ]
    return {"format": FORMAT_VERSION, **about, "configurations": configurations}


def _ends(figure: Figure | None) -> list[float] | None:
    return None if figure is None or figure.low is None or figure.high is None else [figure.low, figure.high]


def by_configuration(scored: Iterable[Scored]) -> dict[str, list[CaseMetrics]]:
    """The rows of all folds of each configuration."""
    groups: dict[str, list[CaseMetrics]] = defaultdict(list)
    for one in sorted(scored, key=lambda s: (s.configuration, s.fold)):
        if one.rows:
            groups[one.configuration].extend(one.rows)
    return dict(groups)


def text_of(value: float | None, digits: int) -> str:
    """A number with a true minus sign, never before zero; a dash where there is none."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def mean_sd(one: LabelSummary) -> str:
    """Mean Dice and its standard deviation over cases, where there is one to tell."""
    mean = text_of(one.dice_mean, 3)
    # Over all organs there is no spread over cases to tell, only the mean of the organs' own.
    return mean if one.dice_std is None or one.label is None else f"{mean} ± {text_of(one.dice_std, 3)}"


def interval(figure: Figure | None) -> str:
    """The ends of an interval; nothing where there is none."""
    if figure is None or figure.low is None:
        return ""
    return f"{text_of(figure.low, 3)} to {text_of(figure.high, 3)}"


def _piped(cells: Iterable[str]) -> str:
    return "| " + " | ".join(c.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

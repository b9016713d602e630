"""A run on a few pages of paper: what came of it, each organ, how that is spread, and what it looks like."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg.core.errors import InputError
from medseg.core.look import COLOURS
from medseg.evaluate.score import CaseMetrics, summarise
from medseg.evaluate.statistics import intervals
from medseg.report import figures
from medseg.report.page import Overlay, RunPage, headline
from medseg.report.tables import ORGAN_COLUMNS, by_configuration, interval, mean_sd, text_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_A4 = (8.27, 11.69)
_INK, _SOFT, _BLUE = "#16212a", "#55636e", "#0068a8"
_LINES, _BOXES = 34, 20  # organs on a page, as lines and as boxes
_PICTURES = 4
_OF_MANY_LANGUAGES = ("NotoSansCJK", "DroidSansFallback", "wqy-", "SourceHanSans", "ipag")


def summary(run: RunPage) -> bytes:
    """A PDF document (A4). The same run gives the same bytes.

    Letters that matplotlib's own font has not are taken from those of this machine that are made for many
    languages, where there are any. Raises InputError as `page.report` does.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages

    file = io.BytesIO()
    about = {"Title": run.title, "Creator": "medseg", "Producer": None, "CreationDate": None}
    with rc_context({"font.family": _fonts()}), PdfPages(file, metadata=about) as pdf:
        for figure in _pages(run):
            pdf.savefig(figure)
    return file.getvalue()


def _fonts() -> list[str]:
    """Names of fonts, of which each gives the letters that those before it lack."""
    from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager

    names = []
    # Looked for anew: matplotlib remembers those that were here when it was first used.
    for path in sorted(findSystemFonts()):
        if Path(path).name.startswith(_OF_MANY_LANGUAGES):
            fontManager.addfont(path)
            names.append(FontProperties(fname=path).get_name())
    return ["DejaVu Sans", *dict.fromkeys(names)]


def _pages(run: RunPage) -> Iterator[Figure]:
    groups = by_configuration(run.scored)
    yield _front(run)
    for name, rows in groups.items():
        yield from _organs(name, rows)
        yield from _spread(name, rows)
    shown = [one for one in run.overlays if one.kind != "flagged"] or list(run.overlays)
    if shown:
        yield _pictures(shown[:_PICTURES])


def _page() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=_A4)


def _front(run: RunPage) -> Figure:
    figure = _page()
    figure.text(0.08, 0.945, f"SEGMENTATION REPORT · {run.task}", size=8, color=_SOFT, parse_math=False)
    figure.text(0.08, 0.91, _short(run.title, 50), size=20, weight="bold", color=_INK, parse_math=False)
    y = _paragraph(figure, 0.875, run.description, 9, _SOFT)
    y = _paragraph(figure, y - 0.02, headline(run), 12, _INK)
    for warning in run.warnings:
        y = _paragraph(figure, y - 0.008, f"To bear in mind: {warning}", 9, "#8a4b00")
    if run.flagged:
        named = ", ".join(one.case for one in run.flagged[:8]) + (" and others" if len(run.flagged) > 8 else "")
        y = _paragraph(
            figure, y - 0.008, f"Flagged for review by the model: {len(run.flagged)} ({named})", 9, "#8a4b00"
        )
    for one in run.published:
        note = "" if one.alike else " Another protocol than this run's: not to be compared as better or worse."
        text = f"Published: {one.system}, mean Dice {text_of(one.mean, 3)} ({one.protocol}; {one.source}).{note}"
        y = _paragraph(figure, y - 0.008, text, 8, _SOFT)
    facts = [f"{name}: {value}" for name, value in (run.provenance or {}).items()]
    y -= 0.02
    for fact in facts:
        if y > 0.08:
            y = _paragraph(figure, y - 0.002, fact, 7, _SOFT)
    figure.text(0.08, 0.04, "Written by medseg. For research; not a medical device.", size=7, color=_SOFT)
    return figure


def _paragraph(figure: Figure, y: float, text: str, size: float, colour: str) -> float:
    """Lines of text from ``y`` downwards; where they end."""
    for line in textwrap.wrap(text, int(980 / size)):
        y -= size * 1.35 / 72 / _A4[1]
        figure.text(0.08, y, line, size=size, color=colour, parse_math=False)
    return y


def _organs(name: str, rows: Sequence[CaseMetrics]) -> Iterator[Figure]:
    sure = intervals(rows, ("dice",))
    head = ["Organ", "n", "Dice", "95 %", *(f"{c.heading}\n{c.unit}" for c in ORGAN_COLUMNS[1:]), "Missed", "Invented"]
    lines = []
    for one in summarise(rows):
        organ = one.name if one.label is not None else "Mean over organs"
        ends = interval(sure.get((one.label, "dice"))) or "–"
        figures_of = [c.of(one) for c in ORGAN_COLUMNS[1:]]
        lines.append(
            [_short(organ, 24), str(one.cases), mean_sd(one), ends, *figures_of, str(one.missed), str(one.invented)]
        )
    for start in range(0, len(lines), _LINES):
        figure = _page()
        _heading(figure, f"Each organ: {name}")
        part = lines[start : start + _LINES]
        axes = figure.add_axes((0.06, 0.05, 0.9, 0.86))
        axes.axis("off")
        table = axes.table([head, *part], loc="upper center", cellLoc="right", edges="horizontal")
        table.auto_set_font_size(False)
        table.set_fontsize(7)
        table.auto_set_column_width(list(range(len(head))))
        for (line, column), cell in table.get_celld().items():
            cell.set_edgecolor("#dbe2e6")
            cell.set_height(0.034 if line == 0 else 0.024)
            cell.get_text().set_parse_math(False)
            cell.get_text().set_color(_SOFT if line == 0 else _INK)
            if column == 0:
                cell.get_text().set_horizontalalignment("left")
            if line and part[line - 1][0] == "Mean over organs":
                cell.get_text().set_fontweight("bold")
        yield figure


def _spread(name: str, rows: Sequence[CaseMetrics]) -> Iterator[Figure]:
    """Dice of every case, and the errors of volumes, organ by organ."""
    every = sorted({row.label: row.name for row in rows}.items())
    for start in range(0, len(every), _BOXES):
        organs = dict(every[start : start + _BOXES])
        figure = _page()
        _heading(figure, f"Spread over cases: {name}")
        height = 0.05 + 0.018 * len(organs)
        for place, (what, field) in enumerate((("Dice", "dice"), ("Volume error (%)", "volume_error_percent"))):
            axes = figure.add_axes((0.24, 0.9 - (place + 1) * height - place * 0.07, 0.7, height))
            values = [[v for row in rows if row.label == n and (v := getattr(row, field)) is not None] for n in organs]
            _boxes(axes, values, [_short(organ, 24) for organ in organs.values()])
            axes.set_xlabel(what, size=8, color=_SOFT)
        yield figure


def _boxes(axes: Axes, values: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    axes.boxplot(
        [list(v) for v in values],
        orientation="horizontal",
        widths=0.6,
        showfliers=False,
        boxprops={"color": _BLUE},
        whiskerprops={"color": _BLUE},
        capprops={"color": _BLUE},
        medianprops={"color": _INK},
    )
    rng = np.random.default_rng(0)
    for n, those in enumerate(values, start=1):
        axes.plot(
            those,
            n + rng.uniform(-0.25, 0.25, len(those)),
            ".",
            ms=3,
            color=_BLUE,
            alpha=0.5,
            rasterized=len(those) > 500,
        )
    axes.set_yticks(range(1, len(names) + 1), names, size=7, parse_math=False)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7, colors=_INK)
    axes.grid(axis="x", color="#dbe2e6", lw=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _pictures(overlays: Sequence[Overlay]) -> Figure:
    figure = _page()
    _heading(figure, "Cases to look at")
    figure.text(
        0.08,
        0.905,
        "Line: the reference. Filled: the prediction. The patient's right is on the left.",
        size=8,
        color=_SOFT,
    )
    height = 0.84 / _PICTURES
    for line, one in enumerate(overlays):
        top = 0.89 - line * height
        told = f"{one.kind}: {one.case} · {one.configuration} · mean Dice {text_of(one.dice, 3)}"
        figure.text(0.08, top - 0.012, told, size=8, color=_INK, parse_math=False)
        try:
            shown = figures.planes(one.image, one.grid, one.reference, one.prediction)
        except InputError as error:
            raise error.of_case(one.case) from error
        for place, plane in enumerate(shown):
            axes = figure.add_axes((0.08 + place * 0.285, top - height + 0.008, 0.275, height - 0.026))
            _plane(axes, plane, one.reference.labels.numbers)
    return figure


def _plane(axes: Any, plane: figures.Plane, numbers: Sequence[int]) -> None:
    tall, wide = plane.size_mm
    edges = (0, wide, tall, 0)
    axes.set_facecolor("black")
    axes.imshow(plane.grey, cmap="gray", vmin=0, vmax=255, extent=edges, interpolation="bilinear")
    for n, number in enumerate(numbers):
        colour = COLOURS[n % len(COLOURS)]
        y, x = ((np.arange(size) + 0.5) * step for size, step in zip(plane.grey.shape, plane.pixel_mm, strict=True))
        if min(plane.grey.shape) > 1:
            if (plane.prediction == number).any():
                axes.contourf(x, y, plane.prediction == number, levels=[0.5, 1.5], colors=[colour], alpha=0.45)
            if (plane.reference == number).any():
                axes.contour(x, y, plane.reference == number, levels=[0.5], colors=[colour], linewidths=0.9)
    axes.set(xticks=[], yticks=[], aspect="equal", xlim=(0, wide), ylim=(tall, 0))
    for letter, place in zip(plane.letters, ((0.03, 0.5), (0.97, 0.5), (0.5, 0.95), (0.5, 0.05)), strict=True):
        axes.text(*place, letter, transform=axes.transAxes, color="white", size=6, ha="center", va="center")


def _heading(figure: Figure, text: str) -> None:
    figure.text(0.08, 0.935, _short(text, 70), size=13, weight="bold", color=_INK, parse_math=False)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

"""A scan and its structures in one picture, for people in a hurry: three planes, bodies, a legend."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.look import palette
from medseg.core.shape import cut
from medseg.core.volume import LabelMap
from medseg.core.words import count
from medseg.report.figures import Plane, planes
from medseg.report.render import render

Rgb = tuple[int, int, int]
Box = tuple[int, int, int, int]

# Sizes are pixels of the picture. It is drawn so many times as large and shrunk, so that edges are smooth.
_FINE = 2
_WIDTH, _EDGE, _GAP, _LEGEND = 1600, 20, 12, 348
# How tall a row of panels is, as a share of a panel's width: that of the bodies at least, any at least and at most.
_UPPER, _LOWEST, _TALLEST = 0.85, 0.4, 1.25
_PAGE, _PANEL, _TEXT, _QUIET = (16, 20, 26), (0, 0, 0), (233, 237, 242), (150, 160, 172)
_LINE, _FILL = 1.7, 0.16
# What is shown around the structures, as a share of their longest side, so that one knows the place.
_ROOMY = 0.5
# A row of the legend, how small it may become before the smallest structures are left out, and lines below it.
_ROW, _LEAST_ROW, _NOTES = 34, 19, 8
_BARS_MM = (200, 100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1)


def preview(
    image: NDArray[Any], grid: Grid, labels: LabelMap | None = None, *, window: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """A picture (rows, 1600, 3), red, green and blue, of a scan ``image`` (X, Y, Z) on a grid.

    The axial, coronal and sagittal plane as `figures.planes` chooses them, with the structures outlined, letters for
    the directions and a scale bar in mm; the structures as bodies; and a legend with their volumes in ml, by counting
    voxels. Without labelled voxels the planes only, through the middle. ``window`` holds the intensities that become
    black and white; unless given, the structures decide. Nothing tells whose scan it is. The same input gives the same
    picture.

    Raises InputError where the labels do not lie on the grid.
    """
    shown = _numbered(labels or LabelMap(np.broadcast_to(np.uint8(0), grid.shape), grid, LabelSet(())))
    axial, coronal, sagittal = planes(image, grid, shown, roomy=_ROOMY, window=window)
    colours, voxels = palette(len(shown.labels)), _counts(shown)
    if not voxels.any():
        return _three_planes((axial, coronal, sagittal), "No voxel is labelled" if labels else "")
    width = (_WIDTH - 2 * _EDGE - 3 * _GAP - _LEGEND) // 2
    # The lower two show the same heights at one scale.
    above, below = _scale([axial], width, width), _scale([coronal, sagittal], width, _TALLEST * width)
    upper = max(_height([axial], above), round(_UPPER * width))
    lower = max(_height([coronal, sagittal], below), round(_LOWEST * width))
    page = _Page(2 * _EDGE + upper + _GAP + lower)
    second, low = _EDGE + width + _GAP, _EDGE + upper + _GAP
    page.plane(axial, (_EDGE, _EDGE, width, upper), above, colours)
    page.bodies(shown, (second, _EDGE, width, upper), colours)
    page.plane(coronal, (_EDGE, low, width, lower), below, colours)
    page.plane(sagittal, (second, low, width, lower), below, colours)
    page.legend(shown, voxels, colours, second + width + 2 * _GAP)
    return page.finished()


def _numbered(labels: LabelMap) -> LabelMap:
    """The same structures with the numbers 1, 2, ..."""
    old = np.array([0, *labels.labels.numbers])
    if np.array_equal(old, np.arange(len(old))):
        return labels
    values = np.empty_like(labels.values, dtype=np.min_scalar_type(len(old)))
    for part, found in zip(np.moveaxis(values, -1, 0), np.moveaxis(labels.values, -1, 0), strict=True):
        part[...] = np.searchsorted(old, found)
    names = (Label(label.name, number, label.code) for number, label in enumerate(labels.labels, start=1))
    return LabelMap(values, labels.grid, LabelSet(tuple(names)))


def _counts(labels: LabelMap) -> NDArray[np.int64]:
    """Voxels (n,) of the structures 1 to n."""
    voxels = np.zeros(len(labels.labels) + 1, dtype=np.int64)
    for one in np.moveaxis(labels.values, -1, 0):
        voxels += np.bincount(one.ravel(order="K").astype(np.intp), minlength=len(voxels))
    return voxels[1:]


def _scale(shown: Sequence[Plane], width: float, height: float) -> float:
    """Pixels for a mm, so that each fits."""
    return min(min(width / one.size_mm[1], height / one.size_mm[0]) for one in shown)


def _height(shown: Sequence[Plane], scale: float) -> int:
    return round(max(one.size_mm[0] for one in shown) * scale)


def _three_planes(shown: Sequence[Plane], note: str) -> NDArray[np.uint8]:
    width = (_WIDTH - 2 * _EDGE - 2 * _GAP) // 3
    tallest = _TALLEST * width
    scales = [_scale(shown[:1], width, tallest), *[_scale(shown[1:], width, tallest)] * 2]
    height = max(round(_LOWEST * width), *(_height([one], scale) for one, scale in zip(shown, scales, strict=True)))
    page = _Page(2 * _EDGE + height + (40 if note else 0))
    for n, (one, scale) in enumerate(zip(shown, scales, strict=True)):
        page.plane(one, (_EDGE + n * (width + _GAP), _EDGE, width, height), scale, palette(0))
    if note:
        page.text((_EDGE, 2 * _EDGE + height), note, 20, _TEXT)
    return page.finished()


class _Page:
    """A dark page that is drawn on; places and sizes are pixels of the picture, from its upper left corner."""

    def __init__(self, height: int) -> None:
        self._height = height
        self._image = Image.new("RGB", (_FINE * _WIDTH, _FINE * height), _PAGE)
        self._draw = ImageDraw.Draw(self._image)

    def finished(self) -> NDArray[np.uint8]:
        return np.asarray(self._image.resize((_WIDTH, self._height), Image.Resampling.BOX))

    def plane(self, plane: Plane, box: Box, scale: float, colours: NDArray[np.uint8]) -> None:
        """A plane in the middle of a box (left, top, width, height), so many pixels a mm."""
        left, top, width, height = box
        tall, wide = (max(1, round(_FINE * scale * mm)) for mm in plane.size_mm)
        place = (_FINE * left + (_FINE * width - wide) // 2, _FINE * top + (_FINE * height - tall) // 2)
        self._panel(box)
        self._image.paste(Image.fromarray(_outlined(plane, (wide, tall), colours)), place)
        middle, centre = left + width / 2, top + height / 2
        for letter, at, anchor in zip(
            plane.letters,
            ((left + 8, centre), (left + width - 8, centre), (middle, top + 6), (middle, top + height - 6)),
            ("lm", "rm", "ma", "md"),
            strict=True,
        ):
            self.text(at, letter, 22, _TEXT, anchor)
        self.text((left + 10, top + 8), plane.name, 17, _TEXT)
        mm = next((mm for mm in _BARS_MM if mm * scale <= width / 4), _BARS_MM[-1])
        right, foot = left + width - 14, top + height - 14
        self.text((right - mm * scale / 2, foot - 7), f"{mm:g} mm", 16, _TEXT, "md")
        for grown, fill in ((1, _PANEL), (0, _TEXT)):
            self._rectangle((right - mm * scale - grown, foot - 3 - grown, right + grown, foot + grown), fill)

    def bodies(self, labels: LabelMap, box: Box, colours: NDArray[np.uint8]) -> None:
        """Structures, as large as they fit into a box (left, top, width, height)."""
        left, top, width, height = box
        self._panel(box)
        side = min(width, height) - 56  # room for the line above

        seen = Image.fromarray(render(labels.values, labels.grid, colours, _FINE * side))
        place = (_FINE * left + _FINE * (width - side) // 2, _FINE * top + _FINE * (height - side) // 2)
        self._image.paste(seen.convert("RGB"), place, seen.getchannel("A"))
        self.text((left + 10, top + 8), "from the front and the left", 17, _TEXT)
        self.text((left + 8, top + height / 2), "R", 22, _TEXT, "lm")
        self.text((left + width - 8, top + height / 2), "L", 22, _TEXT, "rm")

    def legend(self, labels: LabelMap, voxels: NDArray[np.int64], colours: NDArray[np.uint8], left: int) -> None:
        """The structures that are there in their order, and those that are not."""
        right, top, foot = _WIDTH - _EDGE, float(_EDGE + 4), self._height - _EDGE
        ends, ml = cut(labels), voxels * labels.grid.voxel_volume / 1000
        notes = [">= the scan ends before the structure does"] if ends else []
        if missing := [_plain(label.name) for label in labels.labels if not voxels[label.number - 1]]:
            notes.append(f"not found: {', '.join(missing)}")
        lines = [line for note in notes for line in _wrapped(note, 15, right - left)]
        if len(lines) > _NOTES:
            lines[_NOTES - 1 :] = ["..."]
        foot -= 20 * len(lines) + (14 if lines else 0)
        found = np.flatnonzero(voxels)
        row = int(np.clip((foot - top) / len(found), _LEAST_ROW, _ROW))
        if len(found) * row > foot - top:
            kept = int((foot - top) // row) - 2
            lines.insert(0, f"and {count(len(found) - kept, 'smaller structure')}")
            found = np.sort(found[np.argsort(-voxels[found], kind="stable")[:kept]])
        size = min(19, round(0.75 * row))
        for n in found:
            label, square, middle = labels.labels.labels[n], 0.55 * row, top + row / 2
            volume = f"{'>= ' if label.number in ends else ''}{_ml(float(ml[n]))}"
            name = _short(_plain(label.name), size, right - left - square - 24 - _length(volume, size))
            self._rectangle((left, middle - square / 2, left + square, middle + square / 2), _rgb(colours[n]), 3)
            self.text((left + square + 10, middle), name, size, _TEXT, "lm")
            self.text((right, middle), volume, size, _TEXT, "rm")
            top += row
        for k, line in enumerate(lines):
            self.text((left, top + 14 + 20 * k), _short(line, 15, right - left), 15, _QUIET)

    def text(self, at: tuple[float, float], text: str, size: int, fill: Rgb, anchor: str = "la") -> None:
        """A line of text with a thin dark border, so that it is legible on bright tissue too."""
        x, y = (_FINE * c for c in at)
        font = _font(_FINE * size)
        self._draw.text((x, y), text, fill, font, anchor, stroke_width=_FINE, stroke_fill=_PANEL)

    def _panel(self, box: Box) -> None:
        left, top, width, height = box
        self._rectangle((left, top, left + width, top + height), _PANEL, 6)

    def _rectangle(self, ends: tuple[float, float, float, float], fill: Rgb, radius: int = 0) -> None:
        x, y, end, foot = (round(_FINE * c) for c in ends)
        self._draw.rounded_rectangle((x, y, end - 1, foot - 1), _FINE * radius, fill)


def _outlined(plane: Plane, size: tuple[int, int], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A plane at a size (width, height) with its structures tinted and outlined: (height, width, 3)."""
    import edt

    grey = Image.fromarray(np.ascontiguousarray(plane.grey)).resize(size, Image.Resampling.BICUBIC)
    rgb = np.repeat(np.asarray(grey, dtype=np.float32)[..., None], 3, axis=2)
    # Each pixel belongs to what has most of it, the background included, so that neighbours meet in a line.
    owner, most = np.zeros(size[::-1], dtype=np.uint32), np.zeros(size[::-1], dtype=np.uint8)
    for number in np.unique(plane.reference):
        mask = np.where(plane.reference == number, np.uint8(255), np.uint8(0))
        share = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BICUBIC))
        owner[share > most] = number
        most = np.maximum(most, share)
    # The line lies within the structure, so that of two that touch both are seen.
    depth = edt.edt(owner)
    line = np.clip(_FINE * _LINE + 0.5 - depth, 0, 1)
    opacity = np.where(owner > 0, np.maximum(line, _FILL), 0)[..., None]
    own = np.concatenate([np.zeros((1, 3), dtype=np.uint8), colours])[owner]
    return np.asarray(np.rint(rgb + opacity * (own - rgb)), dtype=np.uint8)


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _length(text: str, size: int) -> float:
    """Of a line of text, in pixels."""
    return float(_font(_FINE * size).getlength(text)) / _FINE


def _short(text: str, size: int, room: float) -> str:
    """As much of both ends of a text as there is room for; names often differ in the last word."""
    kept, short = len(text), text
    while kept and _length(short, size) > room:
        kept -= 1
        short = f"{text[: kept - kept // 2].rstrip()}...{text[len(text) - kept // 2 :].lstrip()}"
    return short


def _wrapped(text: str, size: int, room: float) -> list[str]:
    """A text in lines."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _length(longer, size) <= room or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _plain(name: str) -> str:
    """A name in the letters that Pillow's own font has: accents are left out, and ? stands for what it has not."""
    apart = unicodedata.normalize("NFKD", name.replace("ß", "ss"))
    return "".join(c for c in apart if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _ml(volume: float) -> str:
    """A volume with three digits, as far as they tell something."""
    return f"{volume:.0f} ml" if volume >= 100 else f"{volume:.3g} ml" if volume >= 0.001 else "< 0.001 ml"


def _rgb(colour: NDArray[np.uint8]) -> Rgb:
    red, green, blue = colour.tolist()
    return red, green, blue

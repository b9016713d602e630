"""Scans with their label maps as a page shows them: three planes as pictures, and a small copy for the viewer."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.look import COLOURS, colour
from medseg.core.volume import LabelMap, Volume
from medseg.io.nifti import packed
from medseg.report import figures
from medseg.report.tables import text_of

MAPS = ("image", "reference", "prediction")
_MOST_LABELS = 255
# Pictures may fill this much of a page of 10 MB, or what else it allows; where they are more, they lose resolution.
PICTURE_BYTES = 5_000_000
_SIDES = (512, 256, 128, 64, 32)
# Scans for the viewer may fill this much, and lose resolution likewise: so many voxels each.
SCAN_BYTES = 3_000_000
_VOXELS = (4_000_000, 1_500_000, 600_000, 250_000, 100_000, 40_000, 10_000)
_COLOURS = len(COLOURS)


@dataclass(frozen=True, eq=False)
class Look:
    """A scan to look at: one channel (X, Y, Z) on its grid, and label maps on the same one. ``key`` is what the page
    knows it by, ``told`` what is said of it to who does not see it; its ``case`` is named in errors."""

    key: str
    case: str
    told: str
    image: NDArray[Any]
    grid: Grid
    reference: LabelMap | None
    prediction: LabelMap


def pictures(looks: Sequence[Look], room: int = PICTURE_BYTES) -> list[dict[str, Any]]:
    """Three planes of each, as the template draws them, their images in ``room`` bytes. Raises InputError, of the case,
    where label maps do not lie on the scan's grid."""
    views = [_planes(look) for look in looks]
    return [
        _picture(look, shown, images)
        for look, shown, images in zip(looks, views, _within_budget(views, room), strict=True)
    ]


def _planes(look: Look) -> tuple[figures.Plane, figures.Plane, figures.Plane]:
    try:
        return figures.planes(look.image, look.grid, look.reference or look.prediction, look.prediction)
    except InputError as error:
        raise error.of_case(look.case) from error


def _within_budget(views: Sequence[Sequence[figures.Plane]], room: int) -> list[list[tuple[str, int]]]:
    """The image of each plane and how many pixels went into one, as sharp as the page allows."""
    images: list[list[tuple[str, int]]] = []
    for side in _SIDES:
        images = []
        for shown in views:
            small = [figures.shrunk(plane.grey, side) for plane in shown]
            images.append([(figures.png(grey), n) for grey, n in small])
        if sum(len(uri) for group in images for uri, _ in group) <= room:
            break
    return images


def _picture(look: Look, shown: Sequence[figures.Plane], images: Sequence[tuple[str, int]]) -> dict[str, Any]:
    seen = np.unique(np.concatenate([np.unique(m) for p in shown for m in (p.reference, p.prediction)]))
    organs = [(label, n % _COLOURS) for n, label in enumerate(look.prediction.labels) if label.number in seen]
    drawn = []
    for plane, (uri, n) in zip(shown, images, strict=True):
        height, width = plane.size_mm
        bar = next((mm for mm in (20, 5) if mm <= width / 3), 1)
        here = [
            f"{label.name} {_found(plane, label.number)}" if look.reference else label.name
            for label, _ in organs
            if label.number in plane.reference or label.number in plane.prediction
        ]
        drawn.append(
            {
                "plane": plane,
                "uri": uri,
                "position": text_of(plane.position, 0),
                "bar": bar,
                "bar_x": (round(0.96 * width - bar, 2), round(0.96 * width, 2)),
                "bar_y": round(0.96 * height, 2),
                "height": round(height, 3),
                "width": round(width, 3),
                "image_height": round(math.ceil(plane.grey.shape[0] / n) * n * plane.pixel_mm[0], 3),
                "image_width": round(math.ceil(plane.grey.shape[1] / n) * n * plane.pixel_mm[1], 3),
                "half": (round(plane.pixel_mm[1] / 2, 6), round(plane.pixel_mm[0] / 2, 6)),
                "paths": [
                    (
                        colour,
                        figures.outline(plane.prediction == label.number),
                        figures.outline(plane.reference == label.number),
                    )
                    for label, colour in organs
                ],
                "alt": f"{plane.name.capitalize()} plane of {look.told}. Shown: {', '.join(here) or 'no structure'}.",
            }
        )
    return {"look": look, "organs": organs, "planes": drawn}


def _found(plane: figures.Plane, number: int) -> str:
    reference, prediction = plane.reference == number, plane.prediction == number
    total = int(reference.sum()) + int(prediction.sum())
    return f"(overlap in this plane {2 * int((reference & prediction).sum()) / total:.2f})"


def scans(looks: Sequence[Look], room: int = SCAN_BYTES) -> dict[str, Any]:
    """Of each the scan in grey and its label maps, as NIfTI in base64, by its key: as fine as ``room`` bytes allow."""
    crops = {look.key: (look, _cropped(look)) for look in sorted(looks, key=lambda look: look.key)}
    found: dict[str, Any] = {}
    for voxels in _VOXELS:
        found = {key: _scan(look, crop.of(voxels)) for key, (look, crop) in crops.items()}
        if sum(len(one.get(what, "")) for one in found.values() for what in MAPS) <= room:
            break
    return found


def _cropped(look: Look) -> figures.Crop:
    try:
        return figures.cropped(look.image, look.grid, look.reference or look.prediction, look.prediction)
    except InputError as error:
        raise error.of_case(look.case) from error


def _scan(look: Look, crop: figures.Crop) -> dict[str, Any]:
    # A byte a voxel: labels are numbered by their place, and those that have none are left out.
    known = look.prediction.labels.labels
    labels = [(n, one.name, colour(n - 1)) for n, one in enumerate(known[:_MOST_LABELS], start=1)]
    place = np.zeros(max(look.prediction.labels.numbers, default=0) + 1, dtype=np.uint8)
    for (n, _, _), one in zip(labels, known, strict=False):
        place[one.number] = n
    values = dict(zip(MAPS, (crop.grey, place[crop.reference], place[crop.prediction]), strict=True))
    if look.reference is None:
        del values["reference"]
    coded = {
        name: base64.b64encode(packed(Volume(v[None].astype(np.uint8), crop.grid))).decode()
        for name, v in values.items()
    }
    return {"labels": labels, **coded}

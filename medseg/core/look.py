"""How label maps and scans are shown: one colour a structure, one way to look at a slice."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bright enough on grey, and most people can tell the first ones apart (after Okabe and Ito).
COLOURS = ("#56b4e9", "#f5a623", "#2fd6a3", "#f3a6d0", "#f0e442", "#ff7a4d", "#a99cff", "#ffffff")
# Where there are more structures: no darker than this, and no greyer, in OKLab.
_LEAST_LIGHTNESS, _LEAST_CHROMA = 0.58, 0.08


def colour(place: int) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of the structure at a place, from 0, in its label set."""
    red, green, blue = bytes.fromhex(COLOURS[place % len(COLOURS)][1:])
    return red, green, blue


@cache
def palette(count: int) -> NDArray[np.uint8]:
    """Red, green and blue (count, 3) of the first places, none twice up to some hundreds: those of `COLOURS`, and
    then each as far from all before it as bright colours go. A place's colour does not depend on ``count``."""
    levels = np.arange(0, 256, 15)
    offered = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    there = _oklab(offered)
    bright = (there[:, 0] > _LEAST_LIGHTNESS) & (np.hypot(there[:, 1], there[:, 2]) > _LEAST_CHROMA)
    offered, there = offered[bright], there[bright]
    chosen = [colour(place) for place in range(len(COLOURS))]
    apart = np.linalg.norm(there[:, None] - _oklab(np.array(chosen)), axis=-1).min(axis=1)
    while len(chosen) < count:
        best = int(np.argmax(apart))
        chosen.append(tuple(offered[best].tolist()))
        apart = np.minimum(apart, np.linalg.norm(there - there[best], axis=-1))
    found = np.array(chosen[:count], dtype=np.uint8).reshape(-1, 3)
    found.setflags(write=False)
    return found


def seen(values: NDArray[Any], axis: int, at: int) -> NDArray[Any]:
    """The slice (rows, columns) of an array (X, Y, Z) in RAS order at an index of an axis, in the
    radiological convention: the patient's right on the left, anterior on top of an axial and on the
    left of a sagittal slice, superior on top. It shares the array's memory."""
    # Not numpy's take, which turns a whole array whose first axis varies fastest.
    return values[(slice(None),) * axis + (at,)][::-1, ::-1].T


def _oklab(rgb: NDArray[Any]) -> NDArray[np.float64]:
    """Colours (n, 3), 0 to 255, where equal distances look about equal: lightness 0 to 1, green to red, blue to
    yellow. Ottosson, "A perceptual color space for image processing", 2020."""
    share = np.asarray(rgb, dtype=np.float64) / 255
    light = np.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    axes = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.asarray(np.cbrt(light @ cones.T) @ axes.T)

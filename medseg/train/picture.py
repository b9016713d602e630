"""What a network makes of a case, as a picture to glance at while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.core.look import colour, seen
from medseg.core.resample import resample
from medseg.core.volume import LabelMap, Volume

Rgb = NDArray[np.uint8]
_FILL = 0.45
_HEIGHT = 256
_GAP = 4


def picture(volume: Volume, found: LabelMap, reference: LabelMap) -> Rgb:
    """The slice (height, width, 3) across the coarsest axis that holds most of the reference: what was
    found filled, the reference outlined, each structure in its colour. Colours and directions are those
    of the report, whatever way the file's axes run: the patient's right is on the left."""
    upright = volume.grid.reoriented()
    volume, found, reference = (
        resample(volume, onto=upright),
        resample(found, onto=upright),
        resample(reference, onto=upright),
    )
    axis = int(np.argmax(upright.spacing))
    others = tuple(a for a in range(3) if a != axis)
    place = int(np.argmax((reference.values > 0).sum(axis=others)))
    image = seen(volume.values[0], axis, place).astype(np.float32)
    made, truth = seen(found.values, axis, place), seen(reference.values, axis, place)
    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image - low) / max(float(high - low), 1e-6), 0, 1) * 255
    out = np.repeat(grey[..., None], 3, axis=-1)
    colours = {number: np.array(colour(n)) for n, number in enumerate(reference.labels.numbers)}
    for number, own in colours.items():
        filled = made == number
        out[filled] = (1 - _FILL) * out[filled] + _FILL * own
    for number, own in colours.items():
        out[_outline(truth == number)] = own
    spacing = [volume.grid.spacing[a] for a in others][::-1]
    return _enlarged(out.astype(np.uint8), spacing)


def side_by_side(pictures: Sequence[Rgb]) -> Rgb:
    """Pictures in a row, on black."""
    height = max(len(one) for one in pictures)
    row = [np.pad(one, ((0, height - len(one)), (0, _GAP), (0, 0))) for one in pictures]
    return np.concatenate(row, axis=1)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    around = np.pad(mask, 1)
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return mask & ~inner


def _enlarged(image: Rgb, spacing: Sequence[float]) -> Rgb:
    """To a common height, and pixels as tall as wide."""
    tall, wide = image.shape[0] * spacing[0], image.shape[1] * spacing[1]
    rows = np.arange(_HEIGHT) * image.shape[0] // _HEIGHT
    width = max(1, round(_HEIGHT * wide / tall))
    return image[rows][:, np.arange(width) * image.shape[1] // width]

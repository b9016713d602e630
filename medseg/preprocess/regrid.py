"""The grid that a network sees, and a scan brought onto it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.resample import crop, resample
from medseg.core.volume import Volume
from medseg.plan.plan import Configuration, Plan
from medseg.preprocess.normalise import scalings


def preprocess(volume: Volume, plan: Plan, configuration: Configuration) -> Volume:
    """A scan as the network sees it: axes turned to run along x, y, z, empty surroundings cut away,
    normalised, at the configuration's spacing. Float32 (C, X, Y, Z).

    Labels follow by ``resample(labels, onto=preprocess(...).grid)``, and a result goes home by
    resampling onto the scan's own grid. Raises InputError where the channels are not the plan's.
    """
    box = occupied(volume)
    scales = scalings(volume, plan.normalisation.value)
    return resample(
        crop(volume, box),
        onto=box.with_spacing(configuration.spacing.value),
        prepare=lambda channel, values: scales[channel](values),
    )


def occupied(volume: Volume) -> Grid:
    """The reoriented grid of the smallest box that holds every voxel which is not zero in some
    channel; the whole grid where all are zero."""
    turned = volume.grid.reoriented()
    axes = volume.grid.axes
    filled = _filled(volume)
    start, shape = [0, 0, 0], list(turned.shape)
    if filled[0].any():
        for world, voxel in enumerate(axes):
            hit = np.flatnonzero(filled[voxel])
            forward = volume.grid.direction[world, voxel] > 0
            first = int(hit[0]) if forward else volume.grid.shape[voxel] - 1 - int(hit[-1])
            start[world], shape[world] = first, int(hit[-1] - hit[0] + 1)
    return turned.window(start, (shape[0], shape[1], shape[2]))


def _filled(volume: Volume) -> list[NDArray[np.bool_]]:
    """For each voxel axis, which of its planes hold a voxel that is not zero."""
    filled = [np.zeros(n, dtype=bool) for n in volume.grid.shape]
    for values in volume.values:
        far = int(np.argmax(np.abs(values.strides)))
        first, second = (a for a in range(3) if a != far)
        for number in range(values.shape[far]):
            # Not numpy's take, which would turn the whole array first.
            plane = values[(slice(None),) * far + (number,)] != 0
            along = plane.any(axis=1)
            if along.any():
                filled[far][number] = True
                filled[first] |= along
                filled[second] |= plane.any(axis=0)
    return filled

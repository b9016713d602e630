"""The grid that a network sees, and a scan brought onto it."""

from __future__ import annotations

import numpy as np

from medseg.core.grid import Grid
from medseg.core.resample import resample
from medseg.core.volume import Volume
from medseg.plan.plan import Configuration, Plan
from medseg.preprocess.normalise import normalise


def preprocess(volume: Volume, plan: Plan, configuration: Configuration) -> Volume:
    """A scan as the network sees it: axes turned to run along x, y, z, empty surroundings cut away,
    normalised, at the configuration's spacing. Float32 (C, X, Y, Z).

    Labels follow by ``resample(labels, onto=preprocess(...).grid)``, and a result goes home by
    resampling onto the scan's own grid. Raises InputError where the channels are not the plan's.
    """
    box = occupied(volume)
    cropped = resample(normalise(volume, plan.normalisation.value), onto=box)
    return resample(cropped, onto=box.with_spacing(configuration.spacing.value))


def occupied(volume: Volume) -> Grid:
    """The reoriented grid of the smallest box that holds every voxel which is not zero in some
    channel; the whole grid where all are zero."""
    turned = volume.grid.reoriented()
    axes = volume.grid.axes
    filled = (volume.values != 0).any(axis=0)
    start, shape = [0, 0, 0], list(turned.shape)
    if filled.any():
        for world, voxel in enumerate(axes):
            hit = np.flatnonzero(filled.any(axis=tuple(a for a in range(3) if a != voxel)))
            forward = volume.grid.direction[world, voxel] > 0
            first = int(hit[0]) if forward else volume.grid.shape[voxel] - 1 - int(hit[-1])
            start[world], shape[world] = first, int(hit[-1] - hit[0] + 1)
    return turned.window(start, (shape[0], shape[1], shape[2]))

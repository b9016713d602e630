"""What a prediction takes of memory, told before it starts."""

from __future__ import annotations

import math

import numpy as np

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.memory import free_memory
from medseg.infer.engine import Engine
from medseg.infer.window import Tiling, lay
from medseg.plan.cost import OVERLAP
from medseg.plan.families import FAMILIES
from medseg.plan.plan import Configuration

# Of the memory that is free when a prediction starts, so much is used unless told otherwise.
_SHARE = 0.8
# Python, the libraries and what they hold by the way.
_BASE = 200 * 2**20
# Parts of a slab on the way home, and of a scan on the way in, for each thread (see their _AT_ONCE).
_BY_THE_WAY = 96 * 2**20


def within(
    memory: int | None,
    engine: Engine,
    configuration: Configuration,
    image: Grid,
    scan: Grid,
    *,
    channels: int,
    overlap: float = OVERLAP,
    voxel_bytes: int,
) -> Tiling:
    """Tiles over ``image``, the network's grid, that keep a prediction within ``memory`` bytes in all
    (by default most of what is free): the scan too, of each of whose voxels ``voxel_bytes`` are held.

    Raises InputError, with what it would take, where no order of tiles does.
    """
    fixed = (
        _BASE
        + 2 * _BY_THE_WAY
        + channels * 4 * math.prod(image.shape)
        + voxel_bytes * math.prod(scan.shape)
        + workspace(configuration, engine.outputs)
    )
    allowed = int(_SHARE * free_memory()) if memory is None else memory
    each = 4 * (engine.outputs + 1)
    tiling = lay(image.shape, configuration, overlap, most=max(0, allowed - fixed) / each)
    need = fixed + each * tiling.held
    if need > allowed:
        which = "--memory allows" if memory is not None else "this machine has free"
        raise InputError(
            f"this scan needs {need / 2**30:.1f} GiB, {which} {allowed / 2**30:.1f}",
            "Allow it more with --memory, crop the scan, or use a model with a smaller patch",
        )
    return tiling


def workspace(configuration: Configuration, outputs: int) -> int:
    """Bytes that the network takes for one tile: at full resolution a decoder's stage holds what it
    joins (twice its features), its result, and the tile's logits twice; of other families than the U-Net by what
    they take in training."""
    network = configuration.network.value
    features = 4 * network.features[0] * max(1.0, FAMILIES[network.family].memory)
    return int(4 * np.prod(configuration.patch.value) * (features + 2 * outputs))

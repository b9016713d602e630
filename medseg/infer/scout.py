"""A first pass over a scan, in tiles that do not overlap, to find where there is nothing to find."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medseg.infer.engine import Array, Engine
from medseg.infer.stream import Decision, planes_at_once
from medseg.infer.window import Box, Float32, Tell, Tile, Tiling, lay, run_tiles
from medseg.plan.plan import Configuration

Bool = NDArray[np.bool_]
# Where a structure has this probability, something may be found (benchmarks/predict/README.md).
SUSPICION = 0.01
# Blocks of the map are so many voxels long, and no longer than a quarter of a tile.
_BLOCK = 8
# Of few tiles few can be left out, and where scouting takes more than half as many tiles as going on
# without, as in flat tiles that hardly overlap, it rarely pays.
_FEWEST_TILES = 27
_MOST_OF_THEM = 0.5
# After each such part of the tiles, all over the scan, it is asked whether scouting can still pay.
_ROUNDS = 8


def scouting(tiling: Tiling, configuration: Configuration) -> Tiling | None:
    """The tiles to scout with, None where that could not pay. Models that came from nnU-Net get every
    tile, as there."""
    if configuration.grid == "shape" or tiling.count < _FEWEST_TILES:
        return None
    sparse = lay(tiling.shape, configuration, overlap=0.0)
    return sparse if sparse.count <= _MOST_OF_THEM * tiling.count else None


class Blocks:
    """A coarse map of a grid of ``shape`` voxels: the blocks in which something may be found."""

    def __init__(self, shape: tuple[int, int, int], patch: tuple[int, int, int]) -> None:
        self.sides = tuple(min(_BLOCK, max(1, p // 4)) for p in patch)
        self.noted: Bool = np.zeros([-(-n // side) for n, side in zip(shape, self.sides, strict=True)], dtype=bool)

    def note(self, box: Box, found: Bool) -> None:
        """Note the blocks of a box that hold anything ``found`` (x, y, z)."""
        for axis, (part, side) in enumerate(zip(box, self.sides, strict=True)):
            inner = range(part.start // side * side + side, part.stop, side)
            found = np.logical_or.reduceat(found, [0, *(edge - part.start for edge in inner)], axis=axis)
        self.noted[tuple(slice(p.start // s, -(-p.stop // s)) for p, s in zip(box, self.sides, strict=True))] |= found

    def near(self, box: Box) -> bool:
        """Whether a box touches a noted block, or one next to it."""
        around = (
            slice(max(0, p.start // side - 1), (p.stop - 1) // side + 2)
            for p, side in zip(box, self.sides, strict=True)
        )
        return bool(self.noted[tuple(around)].any())


def scout(
    engine: Engine,
    image: Float32,
    sparse: Tiling,
    tiling: Tiling,
    decision: Decision,
    *,
    seen: Callable[[Box], bool] | None = None,
    tell: Tell = lambda count: None,
) -> Callable[[Box], bool] | None:
    """Which boxes of an image (C, X, Y, Z) are worth a tile, None if all are: those near to a voxel to
    which the ``sparse`` tiles give a structure with any likelihood, where something is ``seen``.

    Whatever label such a voxel gets, it gets from all tiles of ``tiling``. As soon as these are too many
    for the scouting to pay, the rest of it is left out. Nothing is held but the coarse map.
    """
    blocks = Blocks(tiling.shape, tiling.patch)
    tiles = [tile for tile in sparse.tiles if seen is None or seen(tile.box)]
    dense = [tile.box for tile in tiling.tiles if seen is None or seen(tile.box)]
    order, left = np.random.default_rng(0).permutation(len(tiles)), len(tiles)
    tell(sparse.count - left)
    for part in np.array_split(order, _ROUNDS):
        if left + sum(map(blocks.near, dense)) >= len(dense):
            tell(left)
            return seen
        for tile, values in run_tiles(engine, image, tiling.patch, [tiles[i] for i in part], tell):
            blocks.note(tile.box, _suspected(engine, values, tile, decision))
        left -= len(part)
    return lambda box: (seen is None or seen(box)) and blocks.near(box)


def _suspected(engine: Engine, values: Array, tile: Tile, decision: Decision) -> Bool:
    """Where (x, y, z) in a tile's box there may be something, by what the engine made of it
    (outputs, *patch)."""
    inside = tuple(slice(b.start - c, b.stop - c) for b, c in zip(tile.box, tile.corner, strict=True))
    held = engine.numpy(values[(slice(None), *inside)])
    x, y, z = held.shape[1:]
    found = np.empty((x, y, z), dtype=bool)
    for planes in planes_at_once(x, y * z * max(len(held), decision.classes)):
        found[planes] = decision.suspected(decision.logits(held[:, planes]), SUSPICION)
    return found

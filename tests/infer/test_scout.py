from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.infer.engine import Head
from medseg.infer.scout import SUSPICION, Blocks, scout, scouting
from medseg.infer.stream import Decision
from medseg.infer.window import Box, Tiling, lay, sweep

TWO = Decision(2)


class Bright:
    """A numpy engine that finds class 1 where a voxel is bright (1, not 0), with logits that differ
    with the voxel's place in its tile, so that every tile counts. It counts its tiles."""

    name, outputs, head, at_once = "numpy", 2, None, 2**18

    def __init__(self) -> None:
        self.tiles = 0

    def run(self, tiles: np.ndarray) -> np.ndarray:
        self.tiles += len(tiles)
        place = np.sin(np.indices(tiles.shape[2:]).sum(axis=0)).astype(np.float32)
        logit = 16 * tiles[:, 0] - 8 + place
        return np.stack([-logit / 2, logit / 2], axis=1)

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, dtype=np.float32)

    def array(self, values: np.ndarray) -> np.ndarray:
        return values

    def numpy(self, values: np.ndarray) -> np.ndarray:
        return values


def image_of(shape: tuple[int, int, int], *boxes: Box) -> np.ndarray:
    image = np.zeros((1, *shape), dtype=np.float32)
    for box in boxes:
        image[(slice(None), *box)] = 1
    return image


def swept(image: np.ndarray, tiling: Tiling, wanted: Any, engine: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits (2, x, y, z), and which voxels (x, y, z) a tile covered."""
    values = np.zeros((2, *tiling.shape), dtype=np.float32)
    covered = np.ones(tiling.shape, dtype=bool)
    for slab in sweep(engine or Bright(), image, tiling, wanted=wanted):
        values[(slice(None), *slab.box)] = slab.values
        if slab.covered is not None:
            covered[slab.box] = slab.covered
    return values, covered


def suspects(image: np.ndarray, sparse: Tiling) -> np.ndarray:
    """Where (x, y, z) a pass without overlap gives class 1 a probability above the least, by the obvious loop."""
    found = np.zeros(sparse.shape, dtype=bool)
    for tile in sparse.tiles:
        wide = np.pad(image, [(0, 0), *((p, p) for p in sparse.patch)])
        cut = tuple(slice(c + p, c + 2 * p) for c, p in zip(tile.corner, sparse.patch, strict=True))
        logits = Bright().run(wide[(slice(None), *cut)][None])[0]
        share = 1 / (1 + np.exp(logits[0] - logits[1]))
        inside = tuple(slice(b.start - c, b.stop - c) for b, c in zip(tile.box, tile.corner, strict=True))
        found[tile.box] |= share[inside] > SUSPICION
    return found


# ---- the coarse map -----------------------------------------------------------------------------


@given(st.tuples(*[st.integers(1, 30)] * 3), st.sampled_from([(16, 16, 16), (40, 4, 1), (1, 64, 20)]), st.data())
def test_a_block_is_noted_where_anything_in_it_was_found(shape: Any, patch: Any, data: Any) -> None:
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    box = tuple(slice(a, data.draw(st.integers(a + 1, n))) for a, n in zip(starts, shape, strict=True))
    found = np.random.default_rng(0).random([b.stop - b.start for b in box]) > 0.95
    blocks = Blocks(shape, patch)
    blocks.note(box, found)
    expected = np.zeros(blocks.noted.shape, dtype=bool)
    for voxel in np.argwhere(found) + [b.start for b in box]:
        expected[tuple(voxel // blocks.sides)] = True
    assert np.array_equal(blocks.noted, expected)
    blocks.note(box, np.zeros_like(found))
    assert np.array_equal(blocks.noted, expected)


def test_near_is_the_next_block_and_no_further() -> None:
    blocks = Blocks((64, 64, 64), (32, 32, 32))
    assert blocks.sides == (8, 8, 8)
    blocks.note((slice(0, 64),) * 3, image_of((64, 64, 64), (slice(16, 17),) * 3)[0] > 0)
    assert blocks.noted.sum() == 1
    aside = slice(16, 20)
    for along, expected in ((slice(0, 8), False), (slice(0, 9), True), (slice(31, 40), True), (slice(32, 40), False)):
        for axis in range(3):
            box = [aside, aside, aside]
            box[axis] = along
            assert blocks.near((box[0], box[1], box[2])) == expected


def test_blocks_are_a_quarter_of_short_tiles() -> None:
    assert Blocks((9, 9, 9), (128, 16, 1)).sides == (8, 4, 1)


# ---- where it pays ------------------------------------------------------------------------------


def test_few_tiles_and_tiles_that_hardly_overlap_are_not_scouted(small_plan: Any) -> None:
    deep = small_plan().configuration("3d")
    assert scouting(lay((24, 32, 32), deep), deep) is None  # 2 x 3 x 3 tiles
    assert len(scouting(lay((32, 32, 32), deep), deep).tiles) == 8
    assert scouting(lay((400, 16, 16), deep), deep) is None  # 49 tiles, 25 of them without overlap
    flat = small_plan(dimensions=2, slice_axis=2, patch=(16, 16, 1)).configuration("2d")
    assert scouting(lay((16, 16, 400), flat), flat) is None
    assert len(scouting(lay((32, 32, 40), flat), flat).tiles) == 4 * 40


def test_models_of_nnunet_get_every_tile(small_plan: Any) -> None:
    configuration = small_plan().configuration("3d").model_copy(update={"grid": "shape"})
    assert scouting(lay((64, 64, 64), configuration), configuration) is None


def test_where_everything_is_full_scouting_stops_at_once(small_plan: Any) -> None:
    configuration = small_plan().configuration("3d")
    image = image_of((64, 64, 64), (slice(0, 64),) * 3)
    tiling = lay((64, 64, 64), configuration)
    engine, told = Bright(), []
    sparse = scouting(tiling, configuration)
    assert scout(engine, image, sparse, tiling, TWO, tell=told.append) is None
    assert engine.tiles <= len(sparse.tiles) / 4
    assert sum(told) == len(sparse.tiles) == 64


# ---- what it changes ----------------------------------------------------------------------------

SHAPES = st.tuples(*[st.integers(20, 60)] * 3)


@settings(max_examples=30)
@given(SHAPES, st.sampled_from([(16, 16, 16), (16, 8, 24)]), st.data())
def test_where_something_is_suspected_nothing_changes(small_plan: Any, shape: Any, patch: Any, data: Any) -> None:
    """Within every noted block, and the next ones, the logits are those of all tiles to the bit; what is
    not background in the one is so in the other."""
    configuration = small_plan(patch=patch).configuration("3d")
    places = [[data.draw(st.integers(0, n - 1)) for n in shape] for _ in range(data.draw(st.integers(0, 3)))]
    size = data.draw(st.integers(1, 6))
    boxes = [tuple(slice(a, a + size) for a in place) for place in places]
    image = image_of(shape, *boxes)  # type: ignore[arg-type]
    tiling, sparse = lay(shape, configuration), lay(shape, configuration, overlap=0.0)
    wanted = scout(Bright(), image, sparse, tiling, TWO)
    full, _ = swept(image, tiling, None)
    found, covered = swept(image, tiling, wanted)
    blocks = Blocks(shape, patch)
    blocks.note(tuple(slice(0, n) for n in shape), suspects(image, sparse))  # type: ignore[arg-type]
    for block in np.argwhere(blocks.noted):
        near = tuple(slice(max(0, (b - 1) * s), (b + 2) * s) for b, s in zip(block, blocks.sides, strict=True))
        assert np.array_equal(found[(slice(None), *near)], full[(slice(None), *near)])
        assert covered[near].all()
    assert np.array_equal((found[1] > found[0]) & covered, full[1] > full[0])


def test_of_a_large_scan_with_one_organ_few_tiles_run(small_plan: Any) -> None:
    configuration = small_plan().configuration("3d")
    shape = (96, 96, 96)
    image = image_of(shape, (slice(44, 52),) * 3)
    tiling, engine, told = lay(shape, configuration), Bright(), []
    sparse = scouting(tiling, configuration)
    wanted = scout(engine, image, sparse, tiling, TWO, tell=told.append)
    assert engine.tiles == sum(told) == len(sparse.tiles) == 6**3
    found, covered = swept(image, tiling, wanted, engine)
    # With the next blocks it reaches from 40 to 56: on each axis the tiles that begin at 32, 40 and 48.
    assert engine.tiles == 6**3 + 3**3
    assert covered.sum() == 32**3
    assert np.array_equal((found[1] > found[0]) & covered, image[0] > 0)


def test_an_empty_scan_needs_no_more_than_the_scouting(small_plan: Any) -> None:
    configuration = small_plan().configuration("3d")
    image, tiling, engine = image_of((64, 64, 64)), lay((64, 64, 64), configuration), Bright()
    wanted = scout(engine, image, lay((64, 64, 64), configuration, overlap=0.0), tiling, TWO)
    _, covered = swept(image, tiling, wanted, engine)
    assert engine.tiles == 4**3
    assert not covered.any()


def test_what_shows_nothing_is_not_scouted_either(small_plan: Any) -> None:
    configuration = small_plan().configuration("3d")
    image = image_of((64, 64, 64), (slice(4, 8),) * 3)
    tiling, engine, told = lay((64, 64, 64), configuration), Bright(), []
    sparse = lay((64, 64, 64), configuration, overlap=0.0)
    wanted = scout(engine, image, sparse, tiling, TWO, seen=lambda box: box[2].start < 32, tell=told.append)
    assert engine.tiles == 4 * 4 * 2
    assert sum(told) == 4**3
    assert wanted is not None
    assert wanted((slice(0, 16),) * 3)
    assert not wanted((slice(0, 16), slice(0, 16), slice(48, 64)))


@pytest.mark.parametrize("axis", [0, 2])
def test_slices_with_nothing_near_are_left_out(small_plan: Any, axis: int) -> None:
    patch, shape = [16, 16, 16], [32, 32, 32]
    patch[axis], shape[axis] = 1, 40
    configuration = small_plan(dimensions=2, slice_axis=axis, patch=patch).configuration("2d")
    box = [slice(2, 4)] * 3
    box[axis] = slice(20, 22)
    image = image_of((shape[0], shape[1], shape[2]), (box[0], box[1], box[2]))
    tiling, engine = lay((shape[0], shape[1], shape[2]), configuration), Bright()
    wanted = scout(engine, image, scouting(tiling, configuration), tiling, TWO)
    before = engine.tiles
    found, covered = swept(image, tiling, wanted, engine)
    assert before == 4 * 40
    assert engine.tiles - before == 4  # of the slices and the next ones one tile: the one in the corner
    assert np.array_equal((found[1] > found[0]) & covered, image[0] > 0)


# ---- what is suspected --------------------------------------------------------------------------


@given(st.sampled_from([0.1, 0.01, 0.001]), st.sampled_from([0.5, 1.0, 2.0]), st.integers(2, 5))
def test_whatever_has_so_much_probability_is_suspected(least: float, temperature: float, classes: int) -> None:
    logits = np.random.default_rng(classes).normal(0, 6, (classes, 500)).astype(np.float32)
    decision = Decision(classes, temperature=temperature)
    shares, found = decision.probabilities(logits), decision.suspected(logits, least)
    assert found[shares[1:].max(axis=0) > least * 1.001].all()
    # Of one structure among many, the odds against the background count.
    assert not found[(shares[1:] / (shares[0] + shares[1:])).max(axis=0) < least * 0.999].any()


def test_of_regions_each_counts_by_itself() -> None:
    decision = Decision(3, regions=(2, 1))
    bare, likely = -5.0, -4.0  # probabilities of 0.0067 and 0.018
    logits = np.array([[bare, likely, bare, 9], [bare, bare, likely, bare]], dtype=np.float32)
    assert decision.suspected(logits, 0.01).tolist() == [False, True, True, True]


def test_a_head_left_to_the_end_is_applied(small_plan: Any) -> None:
    class Features(Bright):
        """What is bright, as the one feature that a head makes two classes of."""

        outputs = 1
        head = Head(np.array([[-8.0], [8.0]], dtype=np.float32), np.array([4.0, -4.0], dtype=np.float32))

        def run(self, tiles: np.ndarray) -> np.ndarray:
            self.tiles += len(tiles)
            return tiles[:, :1]

    configuration = small_plan().configuration("3d")
    image = image_of((96, 96, 96), (slice(44, 52),) * 3)
    tiling = lay((96, 96, 96), configuration)
    wanted = scout(Features(), image, scouting(tiling, configuration), tiling, Decision(2, head=Features.head))
    assert wanted is not None
    assert sum(wanted(tile.box) for tile in tiling.tiles) == 3**3

"""Things found in tiles: one each, on the scan's own grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from medseg.core.grid import Grid
from medseg.core.instances import components, described
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.infer.engine import Found, TorchEngine
from medseg.infer.instances import Gathered, kept, merged
from medseg.infer.predict import segment
from medseg.infer.window import Tile
from medseg.models.mask_rcnn import Detections, Proposals
from medseg.train.detection import things_in

CPU = torch.device("cpu")
OBLIQUE = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix()
BINS = 14


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tile(*edges: tuple[int, int]) -> Tile:
    return Tile(tuple(a for a, _ in edges), tuple(slice(a, b) for a, b in edges))  # type: ignore[arg-type]


def found(*boxes: Any, score: float = 0.9, number: int = 1) -> Found:
    """Boxes ((x0, y0, z0), (x1, y1, z1)) of a tile, filled by their things."""
    count = len(boxes)
    return Found(
        np.array(boxes, dtype=np.float32).reshape(count, 2, 3),
        np.full(count, score, dtype=np.float32),
        np.full(count, number),
        np.ones((count, 4, 4, 4), dtype=np.float32),
    )


NOTHING = found()


def gather(shape: tuple[int, int, int], *parts: tuple[Tile, Found], flat: int | None = None) -> Gathered:
    gathered = Gathered(shape, flat)
    for where, what in parts:
        gathered.take(where, [what])
    return gathered


# ---- across tiles -------------------------------------------------------------------------------


def test_what_one_tile_holds_and_another_cuts_off_is_one() -> None:
    shape = (30, 20, 20)
    whole, cut = found(((10, 5, 5), (18, 13, 13))), found(((0, 5.5, 5), (8, 13, 13)), score=0.5)
    gathered = gather(shape, (tile((0, 20), (0, 20), (0, 20)), whole), (tile((10, 30), (0, 20), (0, 20)), cut))
    (one,) = merged(gathered.finds(), shape)
    assert one.box.tolist() == [[10, pytest.approx(5.11, abs=0.01), 5], [18, 13, 13]]
    # The one that is cut off counts for half of the other.
    assert one.score == pytest.approx((0.9 + 0.5 * 0.5) / 1.5)


def test_a_sliver_of_a_thing_is_no_other_thing() -> None:
    """What the second tile sees of it is little, and badly put."""
    shape = (30, 20, 20)
    whole, sliver = found(((3, 5, 5), (13, 13, 13))), found(((0, 8, 7), (2.5, 12, 12)))
    gathered = gather(shape, (tile((0, 20), (0, 20), (0, 20)), whole), (tile((10, 30), (0, 20), (0, 20)), sliver))
    assert len(merged(gathered.finds(), shape)) == 1


def test_what_no_tile_holds_whole_is_one_thing() -> None:
    """A rod of three tiles' length."""
    shape = (60, 16, 16)
    starts, parts = (0, 10, 20, 30, 40), []
    for start in starts:
        low, high = max(5, start) - start, min(55, start + 20) - start
        parts.append((tile((start, start + 20), (0, 16), (0, 16)), found(((low, 4, 4), (high, 9, 9)))))
    gathered = gather(shape, *parts)
    (one,) = merged(gathered.finds(), shape)
    assert one.box.tolist() == [[5, 4, 4], [55, 9, 9]]
    grid = Grid(shape, np.eye(4))
    home = gathered.home(grid, grid, [7])
    assert [(row.label, row.voxels) for row in home.instances] == [(7, 50 * 5 * 5)]


def test_neighbours_stay_apart() -> None:
    shape = (30, 20, 20)
    left, right = tile((0, 20), (0, 20), (0, 20)), tile((10, 30), (0, 20), (0, 20))
    gathered = gather(
        shape,
        (left, found(((4, 4, 4), (11, 11, 11)), ((11, 4, 4), (18, 11, 11)))),
        (right, found(((0, 4, 4), (1, 11, 11)), ((1, 4, 4), (8, 11, 11)))),
    )
    boxes = sorted(one.box.round(3).tolist() for one in merged(gathered.finds(), shape))
    assert boxes == [[[4, 4, 4], [11, 11, 11]], [[11, 4, 4], [18, 11, 11]]]


def test_classes_stay_apart() -> None:
    where, box = tile((0, 20), (0, 20), (0, 20)), ((4, 4, 4), (11, 11, 11))
    gathered = Gathered((20, 20, 20))
    gathered.take(where, [found(box), found(box, number=2)])
    assert sorted(one.number for one in merged(gathered.finds(), (20, 20, 20))) == [1, 2]


def test_a_tile_or_member_that_should_have_seen_it_counts() -> None:
    shape, box = (20, 20, 20), ((4, 4, 4), (11, 11, 11))
    whole = tile((0, 20), (0, 20), (0, 20))
    scores = []
    for others in ([], [NOTHING], [NOTHING, found(box)]):
        gathered = Gathered(shape)
        gathered.take(whole, [found(box), *others])
        scores.append(merged(gathered.finds(), shape)[0].score)
    assert scores == pytest.approx([0.9, 0.45, 0.6])


def test_slices_of_a_2d_network_are_one_thing_where_they_follow() -> None:
    shape = (20, 20, 12)
    parts = [
        (tile((0, 20), (0, 20), (z, z + 1)), found(((5, 5, 0), (12, 12, 1))) if z not in (0, 6, 7) else NOTHING)
        for z in range(12)
    ]
    things = merged(gather(shape, *parts, flat=2).finds(), shape, 2)
    assert sorted(one.box[:, 2].tolist() for one in things) == [[1, 6], [8, 12]]


def test_nothing_found_is_an_empty_map() -> None:
    grid = Grid((6, 5, 4), np.eye(4))
    home = gather((6, 5, 4), (tile((0, 6), (0, 5), (0, 4)), NOTHING)).home(grid, grid, [1])
    assert home.instances == ()
    assert not home.values.any()


# ---- home ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "direction"),
    [((1.0, 1.0, 1.0), np.eye(3)), ((0.7, 2.0, 1.3), np.diag([-1.0, 1.0, -1.0])), ((2.0, 0.8, 1.1), OBLIQUE)],
    ids=["same", "flipped", "oblique"],
)
def test_a_mask_lies_where_its_box_does(spacing: Any, direction: Any) -> None:
    """A ball's mask, known at the middles of its bins."""
    onto = Grid.from_spacing((40, 30, 26), spacing, (3.0, -7.0, 11.0), direction)
    source = onto.reoriented().with_spacing((1.2, 1.5, 1.1))
    middle, radius = np.array(source.shape) / 2, 6.0
    low, high = middle - radius, middle + radius
    bins = (np.stack(np.meshgrid(*[(np.arange(BINS) + 0.5) / BINS * 2 - 1] * 3, indexing="ij")) ** 2).sum(axis=0)
    mask = 1 / (1 + np.exp(8 * (np.sqrt(bins) - 1)))
    one = Found(np.stack([low, high])[None].astype(np.float32), np.array([0.8], np.float32), np.array([2]), mask[None])
    whole = tile(*((0, n) for n in source.shape))
    home = gather(source.shape, (whole, one)).home(source, onto, [4, 9])
    at = source.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1))) + 0.5
    far = np.linalg.norm(at - middle, axis=-1)
    ball = far < radius
    mine = home.values > 0
    assert 2 * (mine & ball).sum() / (mine.sum() + ball.sum()) > 0.97
    assert not (mine & (far > radius + 0.5)).any()
    (row,) = home.instances
    assert (row.number, row.label, row.score) == (1, 9, pytest.approx(0.8))
    assert row.centre_mm == pytest.approx(source.to_world(middle - 0.5).tolist(), abs=0.5)


def test_a_voxel_belongs_to_the_likelier_thing() -> None:
    grid, shape = Grid((12, 8, 8), np.eye(4)), (12, 8, 8)
    left, right = found(((0, 0, 0), (8, 8, 8)), score=0.9), found(((5, 0, 0), (12, 8, 8)), score=0.6)
    ramp = np.linspace(0.95, 0.55, 4, dtype=np.float32).reshape(1, 4, 1, 1)
    left = Found(left.boxes, left.scores, left.classes, left.masks * ramp)
    right = Found(right.boxes, right.scores, np.array([2]), right.masks * 0.8)
    gathered = Gathered(shape)
    gathered.take(tile((0, 12), (0, 8), (0, 8)), [left, right])
    home = gathered.home(grid, grid, [1, 2])
    line = home.values[:, 4, 4]
    assert (line[:4] == 1).all()
    assert (line[6:] == 2).all()
    assert [row.label for row in home.instances] == [1, 2]


def test_a_thing_within_a_likelier_one_is_no_other() -> None:
    """Though its box is too unlike for boxes to tell, and its class another."""
    grid, shape = Grid((12, 8, 8), np.eye(4)), (12, 8, 8)
    gathered = Gathered(shape)
    whole, part = found(((0, 0, 0), (9, 8, 8))), found(((5, 2, 2), (11, 6, 6)), score=0.6, number=2)
    gathered.take(tile((0, 12), (0, 8), (0, 8)), [whole, part])
    assert [row.label for row in gathered.home(grid, grid, [1, 2]).instances] == [1]


def test_those_that_are_not_wanted_go() -> None:
    values = np.zeros((8, 4, 4), dtype=np.uint16)
    values[0, 0, 0], values[2:4, :2, :2], values[6:, :, :] = 1, 2, 3
    grid = Grid((8, 4, 4), np.diag([2.0, 1, 1, 1]))
    every = described(values, grid, {1: 1, 2: 1, 3: 5}, {2: 0.5})
    some = kept(every, [1], 16.0)
    assert [(one.number, one.voxels, one.score) for one in some.instances] == [(2, 8, 0.5)]
    assert np.array_equal(some.values, np.where(values == 2, 2, 0))
    assert kept(every, [1, 5], 0) is every


# ---- the whole ----------------------------------------------------------------------------------


class Seer(nn.Module):
    """What is bright in a tile is a thing of the first class, as far as the tile goes, and what is dark one of the
    second; in units of the plan's normalisation (less 50, divided by 50)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        value = images[:, :1] * 50 + 50
        return torch.cat([-((value - level) ** 2) / 100 for level in (0.0, 90.0, -90.0)], dim=1)

    def propose(self, images: torch.Tensor) -> Any:
        semantic = self(images)
        return Proposals(None, [], images, semantic, images, images)  # type: ignore[arg-type]

    def detections(self, proposals: Proposals) -> list[Detections]:
        return [self._of(one.argmax(dim=0).numpy()) for one in proposals.semantic]

    def _of(self, classes: np.ndarray) -> Detections:
        things = things_in(classes)
        space, masks = classes.ndim, []
        for number, box in enumerate(things.boxes.numpy(), start=1):
            points = [
                np.floor(a + (np.arange(BINS) + 0.5) / BINS * (b - a)).astype(int)
                for a, b in zip(box[:space], box[space:], strict=True)
            ]
            masks.append((things.index.numpy() == number)[np.ix_(*points)])
        stacked = torch.from_numpy(np.array(masks, dtype=np.float32).reshape(-1, *[BINS] * space))
        return Detections(things.boxes, torch.full((len(masks),), 0.9), things.classes, stacked)


@pytest.mark.parametrize("flat", [None, 2])
def test_things_are_counted_through_tiles_and_grids(small_plan: Any, flat: int | None) -> None:
    """Balls of either class, and a rod that no tile holds whole."""
    plan = small_plan(
        labels={3: "nodule", 8: "vessel"},
        spacing=(1.2, 1.2, 1.4),
        family="mask-rcnn",
        **({} if flat is None else {"dimensions": 2, "slice_axis": 2, "patch": (16, 16, 1)}),
    )
    grid = Grid.from_spacing((44, 40, 30), (1.0, 1.1, 1.3), (5.0, -9.0, 2.0), np.diag([-1.0, 1.0, 1.0]))
    index = np.stack(np.indices(grid.shape), axis=-1)
    truth = np.zeros(grid.shape, dtype=int)
    for middle, radius, number in (((10, 10, 8), 5, 1), ((30, 12, 20), 4, 1), ((24, 33, 9), 4.5, 2)):
        truth[np.linalg.norm((index - np.array(middle)) * grid.spacing, axis=-1) < radius] = number
    truth[3:41, 24:29, 16:21] = 2
    volume = Volume(np.array([1, 91, -89], dtype=np.float32)[truth][None], grid)
    (name,) = plan.configurations
    engine = TorchEngine([Seer()], plan.configuration(name), 3, CPU)
    made = segment(engine, volume, plan, name)
    assert made.instances is not None
    expected = components(LabelMap(np.array([0, 3, 8])[truth], grid, LabelSet.from_names(["a"])))
    rows = made.instances.instances
    assert len(rows) == len(expected.instances) == 4
    for true in expected.instances:
        mask = expected.values == true.number
        (numbers, counts) = np.unique(made.instances.values[mask], return_counts=True)
        best = int(numbers[counts.argmax()])
        (row,) = [one for one in rows if one.number == best]
        mine = made.instances.values == best
        assert 2 * (mine & mask).sum() / (mine.sum() + mask.sum()) > 0.75
        assert row.label == true.label
        assert row.centre_mm == pytest.approx(true.centre_mm, abs=1.5)


def test_others_count_nothing(small_plan: Any) -> None:
    plan = small_plan()
    volume = Volume(np.full((1, 16, 16, 16), 100, dtype=np.float32), Grid((16, 16, 16), np.diag([1.0, 1, 2, 1])))
    assert segment(TorchEngine([Seer()], plan.configuration("3d"), 3, CPU), volume, plan, "3d").instances is None

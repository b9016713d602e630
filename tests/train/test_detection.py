"""The things of a patch, and which anchors are to find them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data.box_utils import box_iou

from medseg.core.errors import InputError
from medseg.plan.plan import Decision, Region
from medseg.train.detection import Hardest, _hardest_of_each, matched, things_in
from medseg.train.loop import StoppedError
from medseg.train.loss import IGNORED
from medseg.train.measure import measure_step


def test_things_are_what_touches_and_is_of_one_class() -> None:
    classes = np.zeros((12, 10, 8), dtype=np.int64)
    classes[2:5, 3:6, 1:4] = 1
    classes[5, 6, 4] = 1  # by a corner
    classes[6:9, 2:4, 1:3] = 2
    classes[9, 2:4, 1:3] = 1  # touches, but is of another class
    found = things_in(classes)
    rows = {tuple(box): number for box, number in zip(found.boxes.int().tolist(), found.classes.tolist(), strict=True)}
    assert rows == {(2, 3, 1, 6, 7, 5): 1, (6, 2, 1, 9, 4, 3): 2, (9, 2, 1, 10, 4, 3): 1}
    for number, box in enumerate(found.boxes.int().tolist(), start=1):
        where = np.argwhere(found.index.numpy() == number)
        assert [*where.min(0), *(where.max(0) + 1)] == box
    assert (found.index > 0).numpy().sum() == (classes > 0).sum()
    assert not found.unknown.any()


def test_crumbs_at_the_border_are_unknown_and_those_within_are_things() -> None:
    classes = np.zeros((9, 9, 9), dtype=np.int64)
    classes[0, 2:4, 2:4] = 1  # four voxels of something that lies outside
    classes[5, 5, 5] = 1
    classes[7:, 7:, 7:] = 1  # eight: a thing
    found = things_in(classes)
    assert sorted(found.boxes.int().tolist()) == [[5, 5, 5, 6, 6, 6], [7, 7, 7, 9, 9, 9]]
    assert found.unknown.numpy().sum() == 4
    assert found.unknown[0, 2:4, 2:4].all()


def test_what_is_ignored_is_unknown() -> None:
    classes = np.zeros((6, 7), dtype=np.int64)
    classes[1:3, 1:4] = 2
    classes[4:, :] = IGNORED
    found = things_in(classes)
    assert found.boxes.tolist() == [[1, 1, 3, 4]]
    assert found.classes.tolist() == [2]
    assert torch.equal(found.unknown, torch.from_numpy(classes == IGNORED))


def test_a_patch_of_nothing_has_no_things() -> None:
    found = things_in(np.zeros((4, 5, 6), dtype=np.int64))
    assert found.boxes.shape == (0, 6)
    assert found.classes.shape == (0,)


def anchors() -> torch.Tensor:
    middles = torch.stack(torch.meshgrid(*[torch.arange(1, 32, 2.0)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    return torch.cat([middles - 3, middles + 3], dim=1)


def test_every_thing_has_an_anchor_long_thin_ones_too() -> None:
    every = anchors()
    boxes = torch.tensor([[2.0, 3, 4, 8, 9, 10], [1, 20, 20, 30, 23, 23], [16, 16, 3, 18, 18, 5]])
    matches = matched(boxes, every, [len(every)])
    overlap = box_iou(boxes, every)
    for number in range(3):
        own = overlap[number][matches == number]
        assert len(own)
        assert own.max() == overlap[number].max()
    assert (matched(boxes[:0], every, [len(every)]) < 0).all()


@pytest.mark.parametrize("count", [3, 40])
def test_samples_are_the_same_every_time(count: int) -> None:
    labels = torch.tensor(([1] * count + [0] * 100 + [-1] * 7) * 2)
    scores = torch.rand(len(labels), generator=torch.Generator().manual_seed(0))
    sampler = Hardest(24, 1 / 3, min_neg=8, pool_size=4)
    state = torch.get_rng_state()
    (positive,), (negative,) = sampler([labels], scores)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(positive.sum()) == min(8, 2 * count)
    assert int(negative.sum()) == 2 * int(positive.sum())
    assert (labels[positive.bool()] == 1).all()
    assert (labels[negative.bool()] == 0).all()
    # The hardest of all is among them, and all are of the hardest.
    hardest = scores[labels == 0].sort(descending=True).values
    assert scores[negative.bool()].max() == hardest[0]
    assert scores[negative.bool()].min() >= hardest[4 * int(negative.sum()) - 1]


def test_every_level_is_told_what_it_gets_most_wrong() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.3, 0.6, 0.5, 0.4]])
    labels = torch.tensor([1, 0, 0, 1, -1, -1])
    assert _hardest_of_each(scores, [labels], [4, 2]).tolist() == [[False, False, True, False, False, False]]
    assert _hardest_of_each(scores, [0 * labels], [4, 2]).tolist() == [[True, False, False, False, True, False]]


# ---- in a run -----------------------------------------------------------------------------------


def counting(plan: Any) -> Any:
    """The plan with Mask R-CNN for its network."""
    one = plan.configurations["3d"]
    network = one.network.value.model_copy(update={"family": "mask-rcnn"})
    changed = one.model_copy(update={"network": Decision(value=network)})
    return plan.model_copy(update={"configurations": {"3d": changed}})


def test_a_run_that_was_stopped_ends_the_same(few: Any, same: Any) -> None:
    bench = few(steps=4, steps_per_epoch=2)
    bench.plan = counting(bench.plan)
    bench.store.finish(bench.store.cases(), bench.plan.preparation("3d"), "3d")
    whole = bench.train("whole")
    asked = iter([False, True, *[False] * 9])
    with pytest.raises(StoppedError):
        bench.train("parts", stop=lambda: next(asked))
    torch.manual_seed(99)
    assert same(whole, bench.train("parts"))


@pytest.mark.parametrize(("options", "word"), [({"consistency": 1.0}, "scans without labels"), ({}, "regions")])
def test_what_it_cannot_learn_is_refused(few: Any, options: Any, word: str) -> None:
    bench = few(**options)
    bench.plan = counting(bench.plan)
    if not options:
        region = Region(name="both", labels=(1, 2), number=1)
        bench.plan = bench.plan.model_copy(update={"regions": (region,)})
    with pytest.raises(InputError, match=word):
        bench.train()


def test_a_step_is_measured_on_things(small_plan: Any) -> None:
    plan = counting(small_plan(patch=(16, 16, 16)))
    assert measure_step(plan.configuration("3d"), 1, 3, kind="cpu", threads=1).seconds > 0


def test_numbered_things_stay_apart_where_they_touch_and_one_where_they_do_not() -> None:
    classes = np.zeros((12, 10, 8), dtype=np.int64)
    classes[1:4, 1:4, 1:4] = 1 + 3 * 7
    classes[4:7, 1:4, 1:4] = 1 + 3 * 2  # touches the other
    classes[1:4, 6:9, 1:4] = 2 + 3 * 9
    classes[8:11, 6:9, 1:4] = 2 + 3 * 9  # of the same thing, and does not touch it
    classes[8:11, 1:4, 4:7] = 2  # not numbered
    found = things_in(classes, 3)
    rows = sorted(zip(found.classes.tolist(), found.boxes.int().tolist(), strict=True))
    assert rows == [
        (1, [1, 1, 1, 4, 4, 4]),
        (1, [4, 1, 1, 7, 4, 4]),
        (2, [1, 6, 1, 11, 9, 4]),
        (2, [8, 1, 4, 11, 4, 7]),
    ]
    assert len(things_in(np.where(classes > 0, classes % 3, 0), 3).boxes) == 4  # the touching ones are one

"""Probabilities beside what is so."""

import json

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.evaluate.calibration import from_json, reliability, sums, to_json

LABELS = LabelSet.from_names(["organ"])
GRID = Grid.from_spacing((100, 10, 10), 1.0)


def case(share, chance, seed=0):
    """Every voxel is given the probability ``share``, and has the label with the probability ``chance``."""
    values = (np.random.default_rng(seed).random(GRID.shape) < chance).astype(np.uint8)
    shares = np.stack([np.full(GRID.shape, 1 - share), np.full(GRID.shape, share)]).astype(np.float32)
    return Volume(shares, GRID), LabelMap(values, GRID, LABELS)


def found(*cases):
    return reliability([sums(*one, case="a") for one in cases], {1: "organ"})[0]


def test_what_is_right_as_often_as_it_says_has_no_error():
    one = found(case(0.7, 0.7))
    assert one.ece == pytest.approx(0, abs=0.01)
    assert sum(one.voxels) == 10_000
    assert [p for p in one.probability if p is not None] == [pytest.approx(0.7)]


def test_what_is_too_sure_is_told_by_how_much():
    assert found(case(0.9, 0.6)).ece == pytest.approx(0.3, abs=0.02)
    # Two bins count by their voxels.
    assert found(case(0.9, 0.6), case(0.5, 0.5, 1)).ece == pytest.approx(0.15, abs=0.02)


def test_what_nobody_takes_for_the_label_does_not_count():
    assert found(case(0.001, 0.1)).ece is None
    rng = np.random.default_rng(0)
    chance = rng.choice([0.005, 0.3, 0.7], GRID.shape)
    truth = LabelMap((rng.random(GRID.shape) < chance).astype(np.uint8), GRID, LABELS)
    assert found((Volume(np.stack([1 - chance, chance]).astype(np.float32), GRID), truth)).ece < 0.02


def test_what_is_ignored_does_not_count():
    labels = LabelSet.from_names(["organ", "unclear"])
    shares, truth = case(0.9, 0.6)
    values = truth.values.copy()
    values[:50] = 2
    known = sums(shares, LabelMap(values, GRID, labels), case="a", ignored=2)
    assert set(known) == {1}
    assert known[1][0].sum() == 5000


def test_another_grid_and_other_classes_are_refused():
    shares, truth = case(0.9, 0.6)
    with pytest.raises(InputError, match=r"case a: .*mm apart"):
        sums(Volume(shares.values, Grid.from_spacing(GRID.shape, 2.0)), truth, case="a")
    with pytest.raises(InputError, match=r"case a: .*1 classes, and 1 labels"):
        sums(Volume(shares.values[:1], GRID), truth, case="a")


def test_there_and_back():
    one = found(case(0.9, 0.6))
    document = json.loads(json.dumps(to_json([one], {"a": {1: 0.93}, "b": {}}), allow_nan=False))
    assert from_json(document) == ([one], {("a", 1): 0.93})
    for broken in ({}, [], document | {"format": 2}, document | {"labels": [{}]}, document | {"predicted_dice": 3}):
        with pytest.raises(InputError, match="not sound"):
            from_json(broken)

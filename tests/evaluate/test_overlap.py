import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medseg.evaluate.overlap import dice, iou

PAIRS = st.tuples(arrays(bool, (3, 4, 2)), arrays(bool, (3, 4, 2)))


def mask(*voxels: int) -> np.ndarray:
    return np.isin(np.arange(4), voxels)


@pytest.mark.parametrize(
    ("first", "second", "expected_dice", "expected_iou"),
    [
        (mask(0, 1), mask(0, 1), 1, 1),
        (mask(0, 1), mask(1), 2 / 3, 1 / 2),
        (mask(0, 1, 2), mask(2, 3), 2 / 5, 1 / 4),
        (mask(0), mask(3), 0, 0),
        (mask(), mask(3), 0, 0),
        (mask(3), mask(), 0, 0),
    ],
)
def test_known_answers(first, second, expected_dice, expected_iou):
    assert dice(first, second) == pytest.approx(expected_dice)
    assert iou(first, second) == pytest.approx(expected_iou)


def test_two_empty_masks_have_no_overlap_to_speak_of():
    assert math.isnan(dice(mask(), mask()))
    assert math.isnan(iou(mask(), mask()))


def test_masks_of_other_shapes_are_refused_even_where_they_would_broadcast():
    with pytest.raises(ValueError, match="shape"):
        dice(np.ones((3, 1), bool), np.ones((3, 4), bool))


@given(PAIRS)
@settings(max_examples=50, deadline=None)
def test_overlap_is_symmetric_and_dice_follows_from_iou(pair):
    first, second = pair
    one, other = dice(first, second), dice(second, first)
    assert one == other or (math.isnan(one) and math.isnan(other))
    if not math.isnan(one):
        jaccard = iou(first, second)
        assert one == pytest.approx(2 * jaccard / (1 + jaccard))

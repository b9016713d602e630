from __future__ import annotations

import numpy as np
import pytest

from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.shape import cut, pieces
from medseg.core.volume import LabelMap

LABELS = LabelSet((Label("a", 2), Label("b", 7), Label("absent", 9)))


def label_map(spacing: float, *balls: tuple[int, tuple[float, float, float], float]) -> LabelMap:
    """Balls of (number, centre in mm, radius in mm) in a box of 60 x 50 x 40 mm."""
    shape = tuple(int(n / spacing) for n in (60, 50, 40))
    points = np.stack(np.indices(shape), axis=-1) * spacing
    values = np.zeros(shape, dtype=np.uint16)
    for number, centre, radius in balls:
        values[np.linalg.norm(points - np.array(centre), axis=-1) <= radius] = number
    return LabelMap(values, Grid.from_spacing((shape[0], shape[1], shape[2]), spacing), LABELS)


@pytest.mark.parametrize("spacing", [0.5, 1.0, 2.5])
def test_pieces_by_hand(spacing: float) -> None:
    one = (2, (15, 20, 20), 8)
    far, near, crumb = (2, (45, 20, 20), 6), (2, (30, 20, 20), 5), (2, (45, 40, 20), 2.6)
    other = (7, (20, 42, 10), 5)
    assert pieces(label_map(spacing, one, other)) == {2: 1, 7: 1}
    assert pieces(label_map(spacing, one, far)) == {2: 2}
    assert pieces(label_map(spacing, one, near)) == {2: 1}  # parted, but not far apart
    assert pieces(label_map(spacing, one, crumb)) == {2: 1}
    assert pieces(label_map(spacing)) == {}


def test_what_touches_a_face_is_cut() -> None:
    assert cut(label_map(1.0, (2, (30, 25, 20), 8), (7, (58, 40, 20), 5))) == {7}
    for place in ((0, 9, 9), (59, 9, 9), (9, 0, 9), (9, 49, 9), (9, 9, 0), (9, 9, 39)):
        assert cut(label_map(1.0, (2, place, 1))) == {2}
    assert cut(label_map(1.0)) == frozenset()

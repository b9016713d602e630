"""Things that are counted."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.instances import InstanceMap, components, numbered, parted
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap

LABELS = LabelSet.from_names(["nodule", "cyst"])


def _grid(shape: tuple[int, int, int]) -> Grid:
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = (10.0, -5.0, 7.0)
    return Grid(shape, affine)


def test_components_are_counted_where_they_lie() -> None:
    values = np.zeros((8, 6, 5), dtype=np.uint8)
    values[0, 0, 0] = 1
    values[1, 1, 1] = 1  # touches by a corner
    values[4:6, 2, 3] = 1
    values[4:6, 3, 3] = 2  # touches, but is something else
    found = components(LabelMap(values, _grid(values.shape), LABELS))
    rows = {(one.label, one.voxels): one for one in found.instances}
    assert set(rows) == {(1, 2), (2, 2)}
    assert len(found.instances) == 3
    cyst = rows[2, 2]
    assert cyst.centre_mm == pytest.approx((10 + 2 * 4.5, -5 + 3, 7 + 9))
    assert cyst.volume_ml == pytest.approx(2 * 6 / 1000)
    assert cyst.score == 1
    assert (found.semantic(LABELS).values == values).all()


def test_nothing_has_no_instances() -> None:
    values = np.zeros((3, 3, 3), dtype=np.uint8)
    found = components(LabelMap(values, _grid(values.shape), LABELS))
    assert found.instances == ()
    assert not found.semantic(LABELS).values.any()


def test_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match="instances of shape"):
        InstanceMap(np.zeros((2, 2, 2), dtype=np.int32), _grid((3, 3, 3)), ())


def test_labels_and_things_make_one_number_and_come_apart() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (6, 5, 4)).astype(np.uint8)
    things = np.where(labels > 0, rng.integers(0, 900, labels.shape), 0)
    codes = numbered(labels, things, 5)
    assert codes.dtype == np.uint16
    back = parted(codes, 5)
    assert (back[0] == labels).all()
    assert (back[1] == things).all()

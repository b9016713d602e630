from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap
from medseg.infer.refine import chosen, keep_only, refined, without_small
from medseg.models.refinement import Rule

LABELS = LabelSet((Label("Spleen", 2), Label("liver", 5), Label("aorta", 9)))


def test_structures_by_name_in_the_models_order() -> None:
    assert chosen(LABELS, ["AORTA", "spleen"]).names == ("Spleen", "aorta")
    assert chosen(LABELS, []) == LABELS
    with pytest.raises(InputError, match=r"knows no structure .kidney.\. It knows Spleen, liver, aorta"):
        chosen(LABELS, ["liver", "kidney"])


def test_the_others_become_background() -> None:
    values = np.array([0, 2, 5, 9, 5, 2], dtype=np.uint8).reshape(6, 1, 1)
    only = keep_only(LabelMap(values, Grid.from_spacing((6, 1, 1), 1.0), LABELS), chosen(LABELS, ["liver"]))
    assert only.values.ravel().tolist() == [0, 0, 5, 0, 5, 0]
    assert only.labels.names == ("liver",)


def test_crumbs_by_hand() -> None:
    """Voxels of 2 mm3; pieces of 1, 2 (touching by a corner) and 3 voxels; another structure's crumb."""
    values = np.zeros((9, 9, 3), dtype=np.uint8)
    values[0, 0, 0] = 5
    values[3, 3, 0] = values[4, 4, 1] = 5
    values[6:9, 8, 2] = 5
    values[8, 0, 0] = 2
    label_map = LabelMap(values, Grid.from_spacing(values.shape, (1.0, 1.0, 2.0)), LABELS)
    same, removed = without_small(label_map, 2.0)
    assert same is label_map
    assert removed == {}
    found, removed = without_small(label_map, 3.0)
    assert removed == {"Spleen": 1, "liver": 1}
    assert np.count_nonzero(found.values) == 5
    found, removed = without_small(label_map, 6.0)
    assert removed == {"Spleen": 1, "liver": 2}
    assert np.argwhere(found.values).tolist() == [[6, 8, 2], [7, 8, 2], [8, 8, 2]]
    assert np.count_nonzero(values) == 7


@given(st.integers(0, 10**6), st.floats(0, 40))
def test_what_is_left_is_large_and_nothing_large_is_lost(seed: int, smallest: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice([0, 0, 0, 0, 2, 5, 9], size=rng.integers(1, 9, 3)).astype(np.uint16)
    grid = Grid.from_spacing(values.shape, (1.0, 2.0, 1.5))
    found, _ = without_small(LabelMap(values, grid, LABELS), smallest)
    for number in LABELS.numbers:
        pieces, count = ndimage.label(values == number, np.ones((3, 3, 3)))
        for piece in range(1, count + 1):
            voxels = pieces == piece
            kept = voxels.sum() * 3.0 >= smallest
            assert (found.values[voxels] == (number if kept else 0)).all()


def test_rules_by_hand() -> None:
    """Voxels of 2 mm3; livers of 1, 2 and 3 voxels, aortas of 1 and 1; no spleen."""
    values = np.zeros((9, 9, 3), dtype=np.uint8)
    values[0, 0, 0] = values[3:5, 3, 0] = values[6:9, 8, 2] = 5
    values[8, 0, 0] = values[0, 8, 0] = 9
    label_map = LabelMap(values, Grid.from_spacing(values.shape, (1.0, 1.0, 2.0)), LABELS)
    liver, aorta = Rule(name="liver", number=5, smallest_mm3=4.0), Rule(name="aorta", number=9, largest=True)
    spleen = Rule(name="Spleen", number=2, largest=True)
    assert refined(label_map, ()) == (label_map, {})
    found, shares = refined(label_map, (liver, spleen))
    assert shares == {"liver": pytest.approx(1 / 6)}
    assert (found.values == 5).sum() == 5
    assert (found.values == 9).sum() == 2
    found, shares = refined(label_map, (liver, aorta))
    assert shares == {"liver": pytest.approx(1 / 6), "aorta": pytest.approx(0.5)}
    assert (found.values == 9).sum() == 1
    # Once more changes nothing; a structure that was left out has no pieces to lose.
    assert refined(found, (liver, aorta)) == (found, {})
    assert refined(keep_only(label_map, chosen(LABELS, ["liver"])), (aorta,))[1] == {}
    assert np.count_nonzero(values) == 8

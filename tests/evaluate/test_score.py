import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap
from medseg.evaluate import score as module
from medseg.evaluate.score import (
    CaseMetrics,
    diagonal_mm,
    from_json,
    ignoring,
    score,
    summarise,
    to_csv,
    to_json,
)

ORGANS = LabelSet((Label("liver", 1), Label("kidney", 4)))
GRID = Grid.from_spacing((12, 10, 8), (1, 2, 3))


def label_map(boxes, grid=GRID, labels=ORGANS, dtype=np.uint8):
    """Labels in boxes: {number: index}."""
    values = np.zeros(grid.shape, dtype=dtype)
    for number, box in boxes.items():
        values[box] = number
    return LabelMap(values, grid, labels)


LIVER = np.s_[1:5, 1:5, 1:5]
KIDNEY = np.s_[8:10, 6:9, 5:8]


def row(case="a", label=1, name="liver", status="ok", dice=0.5, **more):
    values = {"subject": case, "cut": "", "iou": 0.4, "precision": 0.6, "recall": 0.5, "boundary_iou": 0.3}
    values |= {"cldice": None, "nsd": 0.9, "tolerance_mm": 2.0}
    values |= {"hd_mm": 4.0, "hd95_mm": 3.0, "assd_mm": 1.0, "centroid_mm": 0.5}
    values |= {"reference_mm3": 10.0, "predicted_mm3": 12.0, "volume_error_mm3": 2.0, "volume_error_percent": 20.0}
    return CaseMetrics(case=case, label=label, name=name, status=status, dice=dice, **values | more)


def both_empty(**which):
    nothing = dict.fromkeys((*module.OVERLAPS, *module.DISTANCES, "volume_error_percent"))
    return row(status="both empty", **which, **nothing)


# Scoring one case.


def test_a_perfect_prediction():
    whole = label_map({1: LIVER, 4: KIDNEY})
    rows = score(whole, whole, case="a")
    assert [(r.label, r.name, r.status) for r in rows] == [(1, "liver", "ok"), (4, "kidney", "ok")]
    for r in rows:
        assert (r.dice, r.iou, r.hd95_mm, r.assd_mm, r.nsd) == (1, 1, 0, 0, 1)
        assert (r.volume_error_mm3, r.volume_error_percent) == (0, 0)
    assert rows[0].reference_mm3 == pytest.approx(4**3 * 6)


def test_a_shifted_prediction():
    # One step of 2 mm along j: three of four layers are shared.
    rows = score(label_map({1: np.s_[1:5, 2:6, 1:5]}), label_map({1: LIVER}), case="a", tolerance_mm=1.9)
    assert rows[0].dice == pytest.approx(3 / 4)
    assert rows[0].iou == pytest.approx(3 / 5)
    assert rows[0].hd95_mm == pytest.approx(2)
    assert 0 < rows[0].nsd < 1
    assert score(label_map({1: np.s_[1:5, 2:6, 1:5]}), label_map({1: LIVER}), case="a")[0].nsd == 1


def test_volume_error_is_predicted_minus_reference():
    rows = score(label_map({1: np.s_[1:4, 1:5, 1:5]}), label_map({1: LIVER}), case="a")
    assert rows[0].predicted_mm3 == pytest.approx(48 * 6)
    assert rows[0].volume_error_mm3 == pytest.approx(-16 * 6)
    assert rows[0].volume_error_percent == pytest.approx(-25)


WORST = math.sqrt(12**2 + 20**2 + 24**2)


@pytest.mark.parametrize(
    ("predicted", "expected", "status", "overlap", "far", "error_percent"),
    [
        ({1: LIVER}, {1: LIVER}, "ok", 1, 0, 0),
        ({}, {1: LIVER}, "missed", 0, WORST, -100),
        ({1: LIVER}, {}, "invented", 0, WORST, None),
        ({}, {}, "both empty", None, None, None),
        ({1: np.s_[0, 0, 0]}, {1: np.s_[0, 0, 0]}, "ok", 1, 0, 0),
        ({1: np.s_[:, :, :]}, {1: np.s_[:, :, :]}, "ok", 1, 0, 0),
    ],
)
def test_the_table_of_awkward_cases(predicted, expected, status, overlap, far, error_percent):
    r = score(label_map(predicted), label_map(expected), case="a")[0]
    assert r.status == status
    assert {getattr(r, name) for name in module.OVERLAPS if name != "cldice"} == {overlap}
    assert r.cldice is None
    assert [getattr(r, name) for name in module.DISTANCES] == [pytest.approx(far)] * 4
    assert r.volume_error_percent == error_percent


def test_a_tube_that_is_missed_counts_with_nothing_of_its_centre_line():
    vessels = LabelSet((Label("hepatic_vessel", 1),))
    missed = score(label_map({}, labels=vessels), label_map({1: LIVER}, labels=vessels), case="a")
    assert missed[0].cldice == 0
    assert score(label_map({}), label_map({1: LIVER}), case="a", tubular={1})[0].cldice == 0
    assert score(label_map({1: LIVER}), label_map({1: LIVER}), case="a", tubular={1})[0].cldice == 1


def test_where_nothing_counts_nothing_can_be_said():
    labels = LabelSet((Label("organ", 1), Label("unclear", 5)))
    (one,) = score(
        label_map({1: LIVER}, labels=labels), label_map({5: np.s_[:, :, :]}, labels=labels), case="a", ignored=5
    )
    assert (one.status, one.dice, one.hd95_mm) == ("not computable", None, None)
    summary, mean = summarise([one])
    assert (summary.cases, summary.not_computable, summary.dice_mean, mean.cases) == (0, 1, None, 0)


@pytest.mark.parametrize(
    ("predicted", "expected", "cut"),
    [
        (LIVER, LIVER, ""),
        (np.s_[0:5, 1:5, 1:5], LIVER, "prediction"),
        (LIVER, np.s_[1:5, 1:5, 1:8], "reference"),
        (np.s_[1:5, 1:10, 1:5], np.s_[8:12, 1:5, 1:5], "both"),
    ],
)
def test_what_the_border_of_the_image_cuts_is_told(predicted, expected, cut):
    assert score(label_map({1: predicted}), label_map({1: expected}), case="a")[0].cut == cut


def test_a_single_slice_cuts_nothing():
    flat = Grid.from_spacing((12, 10, 1), (1, 2, 3))
    whole = label_map({1: np.s_[1:5, 1:5]}, flat)
    row = score(whole, whole, case="a")[0]
    assert (row.cut, row.dice, row.boundary_iou) == ("", 1, 1)


def test_any_number_of_threads_gives_the_same_rows():
    pair = label_map({1: np.s_[1:5, 2:6, 1:5], 4: np.s_[8:10, 5:8, 5:8]}), label_map({1: LIVER, 4: KIDNEY})
    assert score(*pair, case="a", threads=2) == score(*pair, case="a")


def test_a_case_belongs_to_its_subject():
    whole = label_map({1: LIVER})
    assert {row.subject for row in score(whole, whole, case="a", subject="s")} == {"s"}
    assert {row.subject for row in score(whole, whole, case="a")} == {"a"}


def test_opposite_corners_are_no_farther_than_the_worst():
    first, last = label_map({1: np.s_[0, 0, 0]}), label_map({1: np.s_[-1, -1, -1]})
    assert score(first, last, case="a")[0].hd95_mm < diagonal_mm(GRID) == pytest.approx(WORST)


def test_the_longest_diagonal_of_a_sheared_image():
    sheared = Grid((2, 2, 2), np.array([[1, -0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    assert diagonal_mm(sheared) == pytest.approx(math.sqrt(3**2 + 2**2 + 2**2))


def test_scores_of_a_box_are_those_of_the_whole_image():
    small, large = label_map({4: KIDNEY}), label_map({4: np.s_[7:10, 6:9, 4:8]})
    cropped = [LabelMap(m.values[6:11, 5:10, 3:8], GRID.window((6, 5, 3), (5, 5, 5)), ORGANS) for m in (small, large)]
    assert asdict(score(small, large, case="a")[1]) == pytest.approx(asdict(score(*cropped, case="a")[1]))


def test_one_tolerance_for_each_label():
    pair = label_map({1: np.s_[1:5, 2:6, 1:5], 4: np.s_[8:10, 5:8, 5:8]}), label_map({1: LIVER, 4: KIDNEY})
    rows = score(*pair, case="a", tolerance_mm={1: 2, 4: 1})
    assert [r.tolerance_mm for r in rows] == [2, 1]
    assert rows[0].nsd == 1
    assert rows[1].nsd < 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.dtype(">i2")])
def test_any_integer_will_do(dtype):
    whole = label_map({1: LIVER, 4: KIDNEY}, dtype=dtype)
    assert [r.dice for r in score(whole, whole, case="a")] == [1, 1]


def test_no_labels_no_rows():
    nothing = label_map({}, labels=LabelSet(()))
    assert score(nothing, nothing, case="a") == []


SHIFTED = Grid.from_spacing(GRID.shape, GRID.spacing, origin=(0, 0, 1))
SMALLER = Grid.from_spacing((12, 10, 7), GRID.spacing)


@pytest.mark.parametrize(
    ("prediction", "says"),
    [
        (label_map({}, SHIFTED), "up to 1 mm apart"),
        (label_map({}, SMALLER), r"shape \(12, 10, 7\), the reference \(12, 10, 8\)"),
        (label_map({}, labels=LabelSet.from_names(["liver", "kidney"])), "1 liver, 2 kidney"),
        (label_map({}, labels=LabelSet(())), "none"),
        (label_map({7: LIVER}), "prediction holds 7"),
        (label_map({2: LIVER}), "prediction holds 2"),
        (label_map({-1: LIVER}, dtype=np.int16), "prediction holds -1"),
    ],
)
def test_what_cannot_be_compared_is_refused(prediction, says):
    with pytest.raises(InputError, match=f"case pat7: .*{says}"):
        score(prediction, label_map({}), case="pat7")


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf, {1: 2.0}, {1: 2.0, 4: 2.0, 5: 2.0}, {1: 2.0, 4: -1}])
def test_tolerances_that_make_no_sense_are_refused(tolerance):
    with pytest.raises(InputError, match=r"case pat7: .*tolerance"):
        score(label_map({}), label_map({}), case="pat7", tolerance_mm=tolerance)


def test_rounding_of_an_affine_is_no_other_grid():
    rounded = Grid(GRID.shape, GRID.affine + np.eye(4, k=1) * 0.001)
    assert score(label_map({1: LIVER}, rounded), label_map({1: LIVER}), case="a")[0].dice == 1


# Summaries.


def test_summary_of_one_label():
    rows = [
        row("a", dice=0.9, volume_error_percent=-10.0),
        row("b", dice=0.6, volume_error_percent=30.0),
        row("c", status="missed", dice=0.0, hd95_mm=93.0, volume_error_percent=-100.0),
        row("d", status="invented", dice=0.0, hd95_mm=93.0, volume_error_percent=None),
        both_empty(case="e"),
    ]
    liver, _ = summarise(rows)
    assert (liver.label, liver.name) == (1, "liver")
    assert (liver.cases, liver.missed, liver.invented, liver.both_empty) == (4, 1, 1, 1)
    assert liver.dice_mean == pytest.approx(1.5 / 4)
    assert liver.dice_median == pytest.approx(0.3)
    assert liver.dice_std == pytest.approx(math.sqrt((0.525**2 + 0.225**2 + 2 * 0.375**2) / 3))
    assert liver.hd95_mean_mm == pytest.approx((3 + 3 + 93 + 93) / 4)
    assert liver.volume_error_percent_median == 30  # of 10, 30 and 100


def test_every_label_counts_the_same_in_the_mean():
    rows = [row("a", dice=1.0), row("b", dice=0.8), row("b", 4, "kidney", dice=0.3), both_empty(case="c", label=4)]
    rows[-1] = replace(rows[-1], name="kidney")
    liver, kidney, mean = summarise(reversed(rows))
    assert (liver.name, kidney.name, mean.label, mean.name) == ("liver", "kidney", None, "mean")
    assert mean.dice_mean == pytest.approx((0.9 + 0.3) / 2)
    assert (mean.cases, mean.both_empty) == (2, 1)
    assert kidney.dice_std is None
    assert mean.dice_std == liver.dice_std


def test_a_label_that_is_nowhere_enters_no_mean():
    nowhere, mean = summarise([both_empty()])
    assert (nowhere.cases, nowhere.dice_mean, nowhere.dice_std, nowhere.nsd_mean) == (0, None, None, None)
    assert (mean.cases, mean.dice_mean) == (0, None)
    assert summarise([row("a", dice=0.7), both_empty(label=4, name="kidney")])[-1].dice_mean == pytest.approx(0.7)


def test_nothing_summarised_is_nothing():
    assert summarise([]) == []


@pytest.mark.parametrize("rows", [[row(), row()], [row("a"), row("b", name="spleen")]])
def test_rows_that_do_not_belong_together_are_refused(rows):
    with pytest.raises(InputError, match="label 1"):
        summarise(rows)


# On paper.


def test_csv_has_a_line_per_row_and_leaves_empty_what_does_not_apply():
    lines = to_csv([row("a, b"), both_empty(case="c")]).splitlines()
    assert lines[0].startswith("case,subject,label,name,status,cut,dice,iou,precision,recall,boundary_iou,cldice,nsd,")
    assert lines[1].startswith('"a, b","a, b",1,liver,ok,,0.5,0.4,')
    assert lines[2].startswith("c,c,1,liver,both empty,,,,,,,,,2.0,,,,,")


def test_json_there_and_back():
    whole, part = label_map({1: LIVER, 4: KIDNEY}), label_map({1: np.s_[2:5, 1:5, 1:5]})
    rows = [*score(part, whole, case="a"), *score(part, part, case="b"), *score(whole, part, case="c")]
    document = to_json(rows, provenance={"medseg": "0"})
    text = json.dumps(document, allow_nan=False)
    assert from_json(json.loads(text)) == rows
    assert document["summary"][-1]["name"] == "mean"
    assert document["provenance"] == {"medseg": "0"}


def test_whole_numbers_in_json_are_read_as_lengths():
    document = to_json([row()])
    document["rows"][0]["hd95_mm"] = 3
    assert from_json(document) == [row()]
    assert isinstance(from_json(document)[0].hd95_mm, float)


def without(table, key):
    return {k: v for k, v in table.items() if k != key}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d | {"format": 1}, "format version 1"),
        (lambda d: without(d, "format"), "format version None"),
        (lambda d: d | {"colour": "red"}, "unknown in the scores: colour"),
        (lambda d: without(d, "summary"), "missing in the scores: summary"),
        (lambda d: d | {"rows": {}}, "no list"),
        (lambda d: d | {"rows": [7]}, "row 1 of the scores is no table"),
        (lambda d: d | {"rows": [d["rows"][0] | {"hd": 1.0}]}, "unknown in row 1 of the scores: hd"),
        (lambda d: d | {"rows": [without(d["rows"][0], "dice")]}, "missing in row 1 of the scores: dice"),
        (lambda d: d | {"rows": [d["rows"][0] | {"dice": "0.9"}]}, "dice in row 1 of the scores is '0.9'"),
        (lambda d: d | {"rows": [d["rows"][0] | {"label": True}]}, "label in row 1"),
        (lambda d: d | {"rows": [d["rows"][0] | {"label": 1.0}]}, "label in row 1"),
        (lambda d: d | {"rows": [d["rows"][0] | {"reference_mm3": None}]}, "reference_mm3 in row 1"),
        (lambda d: d | {"rows": [d["rows"][0] | {"dice": math.nan}]}, "dice of label 1 is nan"),
        (lambda d: d | {"rows": [d["rows"][0] | {"status": "fine"}]}, "status 'fine'"),
        (lambda d: d | {"rows": [d["rows"][0] | {"cut": "a bit"}]}, "cut in 'a bit'"),
        (lambda d: [d], "no table"),
    ],
)
def test_json_that_is_not_ours_is_refused(change, says):
    with pytest.raises(InputError, match=says):
        from_json(change(to_json([row()])))


def test_the_table_of_statuses_is_complete():
    for status in (*module._STATUS.values(), module.NOT_COMPUTABLE):
        assert f'"{status}"' in module.__doc__


def test_what_is_ignored_counts_for_neither():
    labels, grid = LabelSet((Label("organ", 1), Label("unclear", 5))), Grid.from_spacing((4, 2, 2), 1.0)
    found, truth = label_map({1: np.s_[:3]}, grid, labels), label_map({1: np.s_[0], 5: np.s_[1]}, grid, labels)
    assert ignoring(found, truth, None) == (found, truth)
    (row,) = score(*ignoring(found, truth, 5), case="a")
    assert row.name == "organ"
    assert row.dice == pytest.approx(2 / 3)
    assert row.predicted_mm3 == 8
    assert found.values[1].all()
    moved = label_map({}, Grid.from_spacing((4, 2, 2), 2.0), labels)
    with pytest.raises(InputError, match=r"case a: .*mm apart"):
        ignoring(moved, truth, 5, case="a")

"""Results as data: what is read, and how two of them differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.core.errors import InputError
from medseg.evaluate.score import CaseMetrics
from medseg.report.results import (
    compare_files,
    compare_organs,
    compare_rows,
    listed,
    organs,
    parse,
    parse_protocol,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["format", "protocol", "tolerance", "software", "machine", "tasks", "name", "version", "steps"])


def row(case: str, dice: float, label: int = 1) -> CaseMetrics:
    measured = dict.fromkeys(("iou", "precision", "recall", "boundary_iou", "cldice", "nsd"), 0.5)
    apart = dict.fromkeys(("hd_mm", "hd95_mm", "assd_mm", "centroid_mm"), 1.0)
    volumes = {"reference_mm3": 10.0, "predicted_mm3": 10.0, "volume_error_mm3": 0.0, "volume_error_percent": 0.0}
    return CaseMetrics(
        case, case, label, f"organ {label}", "ok", "", dice=dice, tolerance_mm=2.0, **measured, **apart, **volumes
    )


@given(JSON | st.dictionaries(KEYS, JSON, max_size=6))
def test_whatever_is_no_results_is_refused_in_one_printable_line(value: Any) -> None:
    for read in (parse, parse_protocol):
        with pytest.raises(InputError) as refused:
            read(value, "results.json")
        assert str(refused.value).isprintable()


@given(st.dictionaries(st.text(min_size=1), st.text("0123456789abcdef", min_size=64, max_size=64), max_size=5))
def test_files_have_one_hash_whatever_their_order(files: dict[str, str]) -> None:
    assert listed(files) == listed(dict(reversed(list(files.items()))))
    for name in files:
        assert listed({**files, name: "0" * 64}) == listed(files) or files[name] != "0" * 64


def test_files_that_are_changed_missing_or_more_are_named() -> None:
    recorded = {"a": "1" * 64, "b": "2" * 64}
    assert [one.verdict for one in compare_files("data", "T", recorded, recorded)] == ["equal"]
    assert [one.verdict for one in compare_files("data", "T", recorded, {})] == ["not there"]
    found = compare_files("data", "T", recorded, {"a": "3" * 64, "c": "4" * 64})
    assert [(one.where, one.verdict) for one in found] == [
        ("T, b", "different"), ("T, a", "different"), ("T, c", "different")
    ]  # fmt: skip


def test_rows_are_equal_up_to_rounding_and_no_further() -> None:
    rows = [row("a", 0.5), row("a", 0.25, 2), row("b", 0.75)]
    assert [one.verdict for one in compare_rows("T", rows, rows)] == ["equal"]
    near = [replace(rows[0], dice=0.5 + 1e-12), *rows[1:]]
    assert [one.verdict for one in compare_rows("T", rows, near)] == ["equal"]
    far = [replace(rows[0], dice=0.5 + 1e-6), *rows[1:]]
    (found,) = compare_rows("T", rows, far)
    assert (found.verdict, found.where) == ("different", "T, case a, organ 1")
    assert found.what == "dice is 0.500001, recorded is 0.5"
    # A number that became a word, and one that is gone.
    (found,) = compare_rows("T", rows, [replace(rows[0], nsd=None), *rows[1:]])
    assert found.what == "nsd is none, recorded is 0.5"
    assert [one.verdict for one in compare_rows("T", rows, rows[1:])] == ["different"]
    assert [one.verdict for one in compare_rows("T", rows[1:], rows)] == ["different"]


@pytest.mark.parametrize(("tolerance", "verdict"), [(0.05, "within tolerance"), (0.049, "different")])
def test_means_are_judged_by_the_tolerance(tolerance: float, verdict: str) -> None:
    recorded, found = organs([row("a", 0.5), row("b", 0.7)]), organs([row("a", 0.6), row("b", 0.7)])
    judged = compare_organs("T", recorded, found, tolerance)
    assert [one.verdict for one in judged] == [verdict, verdict]
    assert judged[0].what == "Dice 0.6500, recorded is 0.6000, 0.0500 apart"
    assert {one.verdict for one in compare_organs("T", recorded, found, None)} == {"different"}
    assert [one.verdict for one in compare_organs("T", recorded, recorded, None)] == ["equal"]


def test_another_organ_or_another_number_of_cases_is_no_matter_of_tolerance() -> None:
    one, two = organs([row("a", 0.5)]), organs([row("a", 0.5), row("a", 0.5, 2)])
    assert [f.verdict for f in compare_organs("T", one, two, 1.0)] == ["different"]
    more = organs([row("a", 0.5), row("b", 0.5)])
    assert {f.verdict for f in compare_organs("T", one, more, 1.0)} == {"different"}

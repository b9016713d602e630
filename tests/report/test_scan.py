"""The page of one scan."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap
from medseg.report.scan import Organ, ScanPage, scan_report

HOSTILE = "<script>alert('1')</script>\"&"
GRID = Grid.from_spacing((40, 40, 20), (1, 1, 5))
LABELS = LabelSet.from_names(["liver", "spleen"])


def scan(**changes: object) -> ScanPage:
    values = np.zeros(GRID.shape, np.uint8)
    values[5:30, 5:35, 4:16] = 1
    one = ScanPage(
        title="scan.nii.gz",
        image=np.random.default_rng(0).normal(size=GRID.shape),
        grid=GRID,
        found=LabelMap(values, GRID, LABELS),
        organs=(Organ("liver", 45.0, 0.93, 0.91, True), Organ("spleen", 0.0, None, None, False)),
        review=("liver: predicted Dice 0.70",),
        notes=("liver is cut off",),
        calibrated=4,
        provenance={"model": "a model"},
    )
    return dataclasses.replace(one, **changes)


def test_it_says_what_was_found_how_sure_and_what_to_look_at() -> None:
    html = scan_report(scan())
    assert "1 structure was found. Look before it is used: 1 reason, below." in html
    assert "<strong>liver: predicted Dice 0.70</strong>" in html
    assert "≥ 45.00" in html
    assert "Not found: spleen." in html
    assert "calibrated on 4 held-out cases" in html
    calm = scan_report(scan(review=(), notes=(), calibrated=None))
    assert "Nothing was flagged for review." in calm
    assert "was not calibrated" in calm
    assert 'role="note"' not in calm
    kept = json.loads(html.split('id="scans">')[1].split("</script>")[0])["scan"]
    assert set(kept) == {"labels", "image", "prediction"}


def test_a_scan_in_which_nothing_was_found() -> None:
    nothing = LabelMap(np.zeros(GRID.shape, np.uint8), GRID, LABELS)
    organs = tuple(Organ(name, 0.0, None, None, False) for name in LABELS.names)
    html = scan_report(scan(found=nothing, organs=organs, review=(), notes=()))
    assert "No structure was found" in html
    assert "Not found: liver, spleen." in html


def test_names_are_only_names_and_nothing_is_loaded() -> None:
    labels = LabelSet.from_names([HOSTILE, "spleen"])
    found = LabelMap(scan().found.values, GRID, labels)
    organs = (Organ(HOSTILE, 45.0, 0.9, None, False),)
    page = scan(title=HOSTILE, found=found, organs=organs, review=(HOSTILE,), provenance={HOSTILE: HOSTILE})
    html = scan_report(page)
    vendor = Path(__file__).parents[2] / "medseg" / "report" / "vendor" / "niivue.umd.js"
    ours = html.replace(vendor.read_text("utf-8"), "")
    assert "<script>alert" not in ours
    assert ours.count("<script") == 3
    assert not re.search(r"https?:|@import|url\(", ours)
    assert html == scan_report(page)


def test_a_label_map_that_lies_elsewhere_is_refused() -> None:
    moved = LabelMap(scan().found.values, Grid.from_spacing(GRID.shape, (1, 1, 4)), LABELS)
    with pytest.raises(InputError, match="does not lie on the image's grid"):
        scan_report(scan(found=moved))

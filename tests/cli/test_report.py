"""`medseg report` on runs, and `medseg predict --report` on a scan."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest


def test_the_page_comes_with_its_numbers(medseg: Any, made: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert medseg("report", made.run, "-o", page, "--pdf").status == 0
    html = page.read_text()
    assert "mean Dice" in html
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "page.md").read_text().startswith("| Configuration")
    document = json.loads((tmp_path / "page.json").read_text())
    assert document["task"] == made.task.name
    assert document["provenance"]["3d, fold 0"].startswith("model ")
    assert "peak" not in document["provenance"]["3d, fold 0"]
    assert " GiB" in document["provenance"]["3d, fold 0"]
    assert document["commands"][-1] == "medseg report RUN"
    with (tmp_path / "page.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["case"] for line in lines} == set(
        json.loads((made.run / "folds.json").read_text())["folds"][0]["validation"]
    )
    assert all(line["predicted_dice"] for line in lines if line["status"] == "ok")
    assert html.count('data-open="3d|') == 2  # best and worst of two cases


def test_an_unfinished_run_is_reported_as_far_as_it_got(medseg: Any, made: Any, tmp_path: Path) -> None:
    spoilt = made.copy(tmp_path)
    (spoilt.fold / "metrics.json").unlink()
    assert medseg("report", spoilt.run).status == 0
    assert "not finished: training has begun" in (spoilt.run / "report.html").read_text()


def test_scores_without_their_predictions_have_no_pictures(medseg: Any, made: Any, tmp_path: Path) -> None:
    spoilt = made.copy(tmp_path)
    (spoilt.fold / "predictions" / "predictions.json").unlink()
    assert medseg("report", spoilt.run).status == 0
    assert "There are no pictures yet" in (spoilt.run / "report.html").read_text()


def test_a_case_that_the_model_flagged_is_shown_and_told(medseg: Any, made: Any, tmp_path: Path) -> None:
    flagged = made.copy(tmp_path)
    index = json.loads((flagged.fold / "predictions" / "predictions.json").read_text())
    case, name = next(iter(index["cases"].items()))
    side = flagged.fold / "predictions" / name.replace(".nii.gz", ".json")
    record = json.loads(side.read_text())
    record["flags"] = [{"structure": None, "reason": "a voxel <b>too</b> few", "review": True}]
    side.write_text(json.dumps(record))
    assert medseg("report", flagged.run).status == 0
    html = (flagged.run / "report.html").read_text()
    assert "1 case flagged for review" in html
    assert "a voxel &lt;b&gt;too&lt;/b&gt; few" in html
    document = json.loads((flagged.run / "report.json").read_text())
    assert [one["case"] for one in document["flagged"]] == [case]


def test_a_training_that_went_back_is_told(medseg: Any, made: Any, tmp_path: Path) -> None:
    run = made.copy(tmp_path)
    index = json.loads((run.model / "package.json").read_text())
    index["provenance"]["setbacks"] = 2
    (run.model / "package.json").write_text(json.dumps(index))
    assert medseg("report", run.run).status == 0
    assert "3d, fold 0: training went back 2 times" in (run.run / "report.html").read_text()


def test_scores_of_an_earlier_version_are_refused(medseg: Any, made: Any, tmp_path: Path) -> None:
    spoilt = made.copy(tmp_path)
    scores = json.loads((spoilt.fold / "metrics.json").read_text())
    (spoilt.fold / "metrics.json").write_text(json.dumps(scores | {"format": 1}))
    medseg("report", spoilt.run).refused("format version 1", "Score the cases again")


def test_one_page_over_several_runs(medseg: Any, made: Any, tmp_path: Path) -> None:
    other = made.copy(tmp_path)
    renamed = other.task.rename(tmp_path / "Task01_other")
    index = json.loads((other.run / "run.json").read_text())
    (other.run / "run.json").write_text(json.dumps(index | {"task": str(renamed)}))
    page = tmp_path / "all.html"
    said = medseg("report", made.run, other.run, "-o", page)
    assert said.status == 0, said
    html = page.read_text()
    assert "2 tasks" in html
    assert 'href="./run/report.html"' in html
    medseg("report", made.run, other.run, "-o", page, "--pdf").refused("--pdf goes with one run")
    medseg("report", made.run, "-o", tmp_path / "page.md").refused("ends in .html")
    medseg("report", made.run, made.run, "-o", page).refused("two runs are of Task00_blobs", "medseg compare")


@pytest.mark.parametrize("only", [(), ("--only", "left blob")])
def test_a_scan_has_a_page_of_its_own(medseg: Any, made: Any, tmp_path: Path, only: tuple[str, ...]) -> None:
    scan = next((made.task / "imagesTs").iterdir())
    result = tmp_path / "blob_seg.nii.gz"
    assert medseg("predict", scan, "-m", made.model, "-o", result, "--report", "--threads", 1, *only).status == 0
    html = (tmp_path / "blob_report.html").read_text()
    assert "found." in html
    assert "left blob" in html
    assert json.loads((tmp_path / "blob_seg.json").read_text())["report"] == "blob_report.html"


def test_a_page_of_somebody_else_is_not_written_over(medseg: Any, made: Any, tmp_path: Path) -> None:
    scan = next((made.task / "imagesTs").iterdir())
    (tmp_path / "blob_report.html").write_text("mine")
    said = medseg("predict", scan, "-m", made.model, "-o", tmp_path / "blob_seg.nii.gz", "--report", "--threads", 1)
    assert said.status != 0
    assert "blob_report.html is there already" in said.err
    assert (tmp_path / "blob_report.html").read_text() == "mine"

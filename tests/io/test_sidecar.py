from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medseg.core.errors import InputError
from medseg.io.sidecar import INDEX, read_index, require_own, sidecar_of, staged_beside, write_index


@pytest.mark.parametrize(
    ("scan", "sidecar"),
    [
        ("scan_seg.nii.gz", "scan_seg.json"),
        ("scan_seg.nii", "scan_seg.json"),
        ("a.b.c_seg.nii.gz", "a.b.c_seg.json"),
        ("scan.v2.dcm", "scan.v2.json"),
        ("scan", "scan.json"),
    ],
)
def test_a_sidecar_stands_beside_its_label_map(scan: str, sidecar: str) -> None:
    assert sidecar_of(Path("some/where") / scan) == Path("some/where") / sidecar


def test_there_and_back(tmp_path: Path) -> None:
    write_index(tmp_path / INDEX, "model", {"a": "a_seg.nii.gz", "b": "b_seg.nii.gz"}, {})
    assert read_index(tmp_path) == {"a": tmp_path / "a_seg.nii.gz", "b": tmp_path / "b_seg.nii.gz"}
    assert json.loads((tmp_path / INDEX).read_text())["model"] == "model"


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"predictions\.json is missing\. Make predictions with `medseg predict"):
        read_index(tmp_path)


def test_cases_that_failed_are_not_passed_over(tmp_path: Path) -> None:
    write_index(tmp_path / INDEX, "model", {"a": "a_seg.nii.gz"}, {"b": "b.nii.gz is truncated"})
    with pytest.raises(InputError, match=r"1 case of .* was not predicted \(b: b.nii.gz is truncated\)"):
        read_index(tmp_path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../a_seg.nii.gz", "inner/../../a_seg.nii.gz"])
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, path: str) -> None:
    write_index(tmp_path / INDEX, "model", {"a": path}, {})
    assert read_index(tmp_path)["a"].parent == tmp_path


def test_an_index_of_many_points_to_folders_below(tmp_path: Path) -> None:
    write_index(tmp_path / INDEX, "model", {"a": "results/00001-00/a_seg.nii.gz"}, {})
    assert read_index(tmp_path)["a"] == tmp_path / "results" / "00001-00" / "a_seg.nii.gz"


@pytest.mark.parametrize(
    "index",
    [
        [],
        None,
        {"format": 2, "cases": {}},
        {"format": 1},
        {"format": 1, "cases": ["a"]},
        {"format": 1, "cases": {"a": 3}},
        {"format": 1, "cases": {"a": None}},
        {"format": 1, "cases": {}, "failed": ["b"]},
    ],
)
def test_an_index_of_another_format_is_refused(tmp_path: Path, index: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="another format"):
        read_index(tmp_path)


def test_a_label_map_of_a_run_that_was_killed_before_its_sidecar_is_ones_own(tmp_path: Path) -> None:
    labels = tmp_path / "a_seg.nii.gz"
    labels.write_bytes(b"labels")
    with pytest.raises(InputError, match="was not made by medseg"):
        require_own(labels)
    staged_beside(sidecar_of(labels)).write_text("{}")
    require_own(labels)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.resample import resample
from medseg.core.volume import LabelMap, Volume
from medseg.io.nifti import write_labels, write_volume
from medseg.io.scan import read_scan
from medseg.report import preview as module

GRID = Grid.from_spacing((30, 24, 12), (2.0, 2.0, 4.0))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A scan, called after a patient, and a label map of the values 1 and 4 beside it."""
    values = np.random.default_rng(0).normal(size=(1, *GRID.shape)).astype(np.float32)
    write_volume(tmp_path / "jane_doe.nii.gz", Volume(values, GRID))
    write_labels(tmp_path / "jane_doe_seg.nii.gz", labelled())
    return tmp_path / "jane_doe.nii.gz"


def labelled() -> LabelMap:
    values = np.zeros(GRID.shape, np.uint8)
    values[18:26, 8:16, 4:8], values[4:10, 8:16, 4:8] = 1, 4
    return LabelMap(values, GRID, LabelSet.from_names("abcd"))


@pytest.fixture
def seg(scan: Path) -> Path:
    return scan.with_name("jane_doe_seg.nii.gz")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was written into the pictures."""
    words: list[str] = []
    text = module._Page.text
    monkeypatch.setattr(module._Page, "text", lambda *a: (words.append(a[2]), text(*a))[1])
    return words


Medseg = Callable[..., Any]


def test_a_picture_beside_the_scan(medseg: Medseg, scan: Path, seg: Path, written: list[str]) -> None:
    done = medseg("preview", scan, seg)
    path = scan.with_name("jane_doe_preview.png")
    assert (done.status, done.out, done.err) == (0, f"{path}\n", "")
    with Image.open(path) as picture:
        assert (picture.format, picture.mode, picture.width) == ("PNG", "RGB", 1600)
        assert not picture.info
    assert {"label 1", "4.1 ml", "label 4", "3.07 ml"} < set(written)
    assert not any("jane" in word or "doe" in word for word in written)
    assert [p.name for p in scan.parent.iterdir() if p.suffix not in (".gz", ".png")] == []


def test_what_is_there_is_kept_unless_forced(medseg: Medseg, scan: Path, seg: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.png"
    assert medseg("preview", scan, seg, "-o", path).status == 0
    before = path.read_bytes()
    medseg("preview", scan, seg, "-o", path).refused("x.png is there already", "--force")
    path.write_bytes(b"mine")
    assert medseg("preview", scan, seg, "-o", path, "--force").status == 0
    assert path.read_bytes() == before, "and the same scan gives the same bytes"
    (tmp_path / "folder.png").mkdir()
    medseg("preview", scan, "-o", tmp_path / "folder.png", "--force").refused("is there already")


def test_names_come_from_the_sidecar_or_a_file(
    medseg: Medseg, scan: Path, seg: Path, tmp_path: Path, written: list[str]
) -> None:
    out = ["-o", tmp_path / "x.png", "--force"]
    side, names = seg.with_name("jane_doe_seg.json"), tmp_path / "dataset.json"
    names.write_text(json.dumps({"labels": {"0": "background", "1": "aorta", "4": "cava"}}))
    assert medseg("preview", scan, seg, *out, "--labels", names).status == 0
    assert {"aorta", "cava"} < set(written)
    side.write_text(json.dumps({"organs": [{"name": n, "number": k} for k, n in ((1, "liver"), (4, "spleen"))]}))
    assert medseg("preview", scan, seg, *out).status == 0
    assert {"liver", "spleen"} < set(written)
    side.write_text('{"SpatialReference": "orig"}')
    written.clear()
    done = medseg("preview", scan, seg, *out)
    assert done.out.startswith("note: jane_doe_seg.json names no labels\n")
    assert {"label 1", "label 4"} < set(written)
    names.write_text('{"labels": {"1": "aorta"}}')
    medseg("preview", scan, seg, *out, "--labels", names).refused("the value 4, which is not listed")
    medseg("preview", scan, *out, "--labels", names).refused("--labels names the labels of a label map")


def test_no_labels_and_an_empty_label_map(
    medseg: Medseg, scan: Path, seg: Path, tmp_path: Path, written: list[str]
) -> None:
    assert medseg("preview", scan, "-o", tmp_path / "x.png", "--window", "-1", "1").status == 0
    assert "coronal" in written
    assert "No voxel is labelled" not in written
    write_labels(seg, LabelMap(np.zeros(GRID.shape, np.uint8), GRID, LabelSet.from_names("a")))
    done = medseg("preview", scan, seg, "-o", tmp_path / "y.png")
    assert done.out == f"note: no voxel is labelled\n{tmp_path / 'y.png'}\n"
    assert "No voxel is labelled" in written


def test_the_first_of_several_channels_is_shown_and_said(medseg: Medseg, tmp_path: Path) -> None:
    path = tmp_path / "four.nii.gz"
    write_volume(path, Volume(np.zeros((4, *GRID.shape), np.float32), GRID))
    assert medseg("preview", path).out.startswith("note: the first of 4 channels is shown\n")


def test_one_grid_that_is_stored_in_another_order_is_the_same(
    medseg: Medseg, dicom_series: Callable[..., list[Path]], tmp_path: Path, written: list[str]
) -> None:
    folder = tmp_path / "series"
    dicom_series(folder, shape=(30, 24, 12))
    grid = read_scan(folder)[0].grid
    assert grid.orientation != "RAS"
    values = np.zeros(grid.shape, np.uint8)
    values[5:15, 5:15, 3:8] = 1
    turned = resample(LabelMap(values, grid, LabelSet.from_names("a")), grid.reoriented())
    write_labels(tmp_path / "seg.nii.gz", turned)
    done = medseg("preview", folder, tmp_path / "seg.nii.gz")
    assert done.status == 0, done.err
    assert (tmp_path / "series_preview.png").exists()
    assert "label 1" in written
    assert not any(known in word for known in ("Roe", "471199", "771177", "1903") for word in written)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: write_labels(p, _moved()), ["image and label lie 2 mm apart"]),
        (lambda p: write_labels(p, _smaller()), ["image 30x24x12 and label 29x24x12 differ in size"]),
        (lambda p: write_volume(p, Volume(np.full((1, *GRID.shape), 0.5), GRID)), ["not whole numbers"]),
        (lambda p: write_volume(p, Volume(np.full((1, *GRID.shape), -1, np.int16), GRID)), ["has the number -1"]),
        (lambda p: write_volume(p, _ramp()), ["has 8639 values, as an image has"]),
        (lambda p: p.write_bytes(b"no image"), ["jane_doe_seg.nii.gz"]),
        (lambda p: p.unlink(), ["jane_doe_seg.nii.gz is missing"]),
    ],
)
def test_label_maps_that_are_refused(
    medseg: Medseg, scan: Path, seg: Path, tmp_path: Path, spoil: Callable[[Path], None], words: list[str]
) -> None:
    spoil(seg)
    medseg("preview", scan, seg, "-o", tmp_path / "x.png").refused(*words)
    assert not (tmp_path / "x.png").exists()


def _moved() -> LabelMap:
    return LabelMap(labelled().values, GRID.window((1, 0, 0), GRID.shape), labelled().labels)


def _smaller() -> LabelMap:
    return LabelMap(labelled().values[1:], GRID.window((0, 0, 0), (29, 24, 12)), labelled().labels)


def _ramp() -> Volume:
    return Volume(np.arange(np.prod(GRID.shape), dtype=np.int16).reshape(1, *GRID.shape), GRID)


def test_what_else_is_refused(medseg: Medseg, scan: Path, tmp_path: Path) -> None:
    medseg("preview", tmp_path / "none.nii.gz").refused("none.nii.gz")
    medseg("preview", scan, "-o", tmp_path / "x.jpg").refused("x.jpg is no name for a PNG")
    medseg("preview", scan, "--window", "3", "3").refused("--window 3 3 holds nothing")
    medseg("preview", scan, "--window", "nan", "3").refused("holds nothing")
    medseg("preview", scan, "--series", "2").refused("is no DICOM series")

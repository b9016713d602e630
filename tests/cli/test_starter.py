"""Predicting without naming a model; and, where one is shipped, what it promises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.dataset.task import load_labels, load_task
from medseg.evaluate.score import score
from medseg.io.nifti import read_labels
from medseg.models import shelf
from medseg.models.package import halved, load_package, save_package

QUICK = ("--threads", 1)
_SHIPPED = shelf.installed(shelf.shipped())
_MOST_BYTES = 10_000_000


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fresh machine's home; gives its shelf of models."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return shelf.shelf()


@pytest.fixture
def starters(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of shipped models, empty."""
    (tmp_path / "starter").mkdir()
    monkeypatch.setattr(shelf, "shipped", lambda: tmp_path / "starter")
    return tmp_path / "starter"


@pytest.fixture
def starter(starters: Path, made: Any) -> Path:
    """One shipped model, in half the bits."""
    save_package(starters / "blobs", halved(load_package(made.model)))
    return starters / "blobs"


@pytest.fixture
def scans(made: Any, tmp_path: Path) -> Path:
    """Four scans: cut off in the middle, good, three times as large as those trained on, good."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, case in (("b", "blob_006"), ("d", "blob_007")):
        shutil.copy(made.task / "imagesTs" / f"{case}.nii.gz", folder / f"{name}.nii.gz")
    data = (folder / "b.nii.gz").read_bytes()
    (folder / "a.nii.gz").write_bytes(data[: len(data) // 2])
    image = nib.load(folder / "b.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([3, 3, 3, 1])), folder / "c.nii.gz")
    return folder


def test_one_line_one_label_map(
    starter: Path, medseg: Any, made: Any, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import medseg.io.scan as module

    read, real = [], module.read_scan
    monkeypatch.setattr(
        module, "read_scan", lambda path, *more, **options: (read.append(path), real(path, *more, **options))[1]
    )
    outcome = medseg("predict", scans / "b.nii.gz", *QUICK)
    assert outcome.status == 0, outcome
    assert outcome.err == "b.nii.gz: taken is the model blobs, for scans like it; -m names another\n"
    assert read == [scans / "b.nii.gz"]
    assert json.loads((scans / "b_seg.json").read_text())["model_sha256"] == load_package(starter).digest()
    named = medseg("predict", scans / "b.nii.gz", "-m", "blobs", "-o", tmp_path / "named", *QUICK)
    assert (named.status, named.err) == (0, "")
    labels = load_task(made.task).labels
    one, other = read_labels(scans / "b_seg.nii.gz", labels), read_labels(tmp_path / "named" / "b_seg.nii.gz", labels)
    assert (one.values == other.values).all()
    asjson = medseg("predict", scans / "b.nii.gz", "--json", *QUICK)
    assert len(json.loads(asjson.out)["predictions"]) == 1


def test_what_is_only_unlike_is_refused_with_the_reasons(starter: Path, medseg: Any, scans: Path) -> None:
    outcome = medseg("predict", scans / "c.nii.gz", *QUICK)
    assert outcome.status == 2
    first, line = outcome.err.splitlines()
    assert first.startswith("medseg: c.nii.gz: it is no scan for any model on this machine")
    for word in ("-m", "medseg models install", "medseg plan", "medseg train"):
        assert word in first
    assert line.startswith("  blobs: spacing: 3 x 3 x 6 mm; the model was trained on")
    assert not list(scans.glob("c_seg*"))
    assert medseg("predict", scans / "c.nii.gz", "-m", "blobs", *QUICK).status == 0


def test_of_several_scans_each_must_be_for_the_model(starter: Path, medseg: Any, scans: Path, tmp_path: Path) -> None:
    outcome = medseg("predict", scans, "-o", tmp_path / "out", *QUICK)
    assert outcome.status == 2
    lines = outcome.err.splitlines()
    assert lines[0] == "b.nii.gz: taken is the model blobs, for scans like it; -m names another"
    assert lines[1].startswith("medseg: a.nii.gz is truncated")
    assert lines[2].startswith(
        "medseg: c.nii.gz: it is no scan for blobs, the model that was taken for this call (spac"
    )
    assert lines[3] == "medseg: 2 of 4 scans failed: a.nii.gz, c.nii.gz"
    index = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert (set(index["cases"]), set(index["failed"])) == ({"b", "d"}, {"a", "c"})


def test_scans_for_no_model_are_all_told(starter: Path, medseg: Any, scans: Path) -> None:
    outcome = medseg("predict", scans / "a.nii.gz", scans / "c.nii.gz", *QUICK)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == "medseg: 2 of 2 scans failed: a.nii.gz, c.nii.gz"
    assert not list(scans.glob("*_seg*"))


def test_several_models_and_broken_ones(starter: Path, home: Path, medseg: Any, made: Any, scans: Path) -> None:
    scan = scans / "b.nii.gz"
    assert medseg("models", "install", made.model, "--name", "mine").status == 0
    outcome = medseg("predict", scan, *QUICK)
    assert outcome.status == 2
    assert "it is a scan for 2 models on this machine (blobs, mine). Name one with -m" in outcome.err
    assert not list(scans.glob("*_seg*"))
    # Under the same name, the installed one takes the place of the shipped one.
    (home / "mine").rename(home / "blobs")
    assert medseg("predict", scan, *QUICK).status == 0
    assert json.loads((scans / "b_seg.json").read_text())["model_sha256"] == load_package(made.model).digest()
    (home / "blobs" / "member0.safetensors").write_bytes(b"")
    broken = medseg("predict", scan, *QUICK)
    assert broken.status == 2
    assert "  blobs: " in broken.err
    assert "was changed after it was written" in broken.err


@pytest.mark.parametrize(
    "options",
    [("--held-out",), ("--skip-done",), ("--shard", "1/2"), ("--channel", "CT=a.nii.gz"), ("--force",)],
    ids=lambda options: options[0],
)
def test_what_depends_on_the_model_wants_one(starter: Path, medseg: Any, scans: Path, options: Any) -> None:
    more = () if options[0] == "--channel" else (scans,)
    medseg("predict", *more, *options).refused(f"{options[0]} goes with a model of your choice", "-m")


def test_structures_of_another_model_are_refused(starter: Path, medseg: Any, scans: Path) -> None:
    outcome = medseg("predict", scans / "b.nii.gz", "--only", "spleen", *QUICK)
    assert outcome.status == 2
    assert "spleen" in outcome.err
    assert "left blob" in outcome.err


def test_no_model_on_the_machine(starters: Path, medseg: Any, scans: Path) -> None:
    for folder in (starters, None):
        if folder is None:
            starters.rmdir()
        assert medseg("models", "list").out == "no model is installed\n"
        medseg("predict", scans / "b.nii.gz").refused("none on this machine", "medseg models install", "medseg train")


def test_it_is_listed_described_and_passed_on(starter: Path, medseg: Any, made: Any, tmp_path: Path) -> None:
    (row,) = json.loads(medseg("models", "list", "--json").out)
    facts = json.loads(medseg("models", "info", "blobs", "--json").out)
    assert row == {"name": "blobs", **facts}
    assert facts["shipped"] is True
    assert medseg("models", "list").out.splitlines()[-1].split()[-1] == "shipped"
    assert medseg("models", "export", "blobs", "-o", tmp_path / "a.zip").status == 0
    assert medseg("models", "export", made.model, "--half", "-o", tmp_path / "b.zip").status == 0
    for name in "ab":
        assert medseg("models", "install", tmp_path / f"{name}.zip", "--name", name).status == 0
        assert load_package(shelf.shelf() / name).digest() == facts["digest"]
    assert medseg("models", "list").out.splitlines()[-1].split()[-1] == "shipped"
    assert medseg("models", "list").out.splitlines()[-2].split()[-1] == "installed"


# ---- what is shipped -----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", _SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_model_is_small_whole_and_says_what_it_is(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= _MOST_BYTES
    package = load_package(folder)
    assert package.experience is not None
    assert package.calibration is not None
    assert package.evaluation is not None
    text = (folder / "README.md").read_text()
    assert "licence of the data: CC" in text
    assert "Research software; not a medical device." in text
    assert f"| mean | {package.evaluation.dice} |" in text


@pytest.fixture
def hippocampus(home: Path, shared_data: Path) -> Path:
    """The real task, on a fresh machine with the models that are shipped."""
    if "hippocampus" not in [folder.name for folder in _SHIPPED]:
        pytest.skip("no hippocampus model is shipped yet")
    return shared_data / "Task04_Hippocampus"


def test_the_shipped_model_segments_what_it_is_for(hippocampus: Path, medseg: Any, tmp_path: Path) -> None:
    task = load_task(hippocampus)
    cases = [task.cases[number] for number in (0, 99, 199)]
    outcome = medseg("predict", *(case.image for case in cases), "-o", tmp_path, *QUICK)
    assert outcome.status == 0, outcome
    assert "taken is the model hippocampus" in outcome.err
    for case in cases:
        found = read_labels(tmp_path / f"{case.id}_seg.nii.gz", task.labels)
        assert min(row.dice or 0 for row in score(found, load_labels(task, case), case=case.id)) > 0.75


@pytest.mark.parametrize(
    "name",
    [
        "msd-spleen2-crop/sub-spleen2_ct.nii.gz",
        "dicom-mr-sagittal-siemens",
        "dicom-ct-torchio-crop",
        "sct-spinalcord-mr/t1/t1w.nii.gz",
        "nrrd-pyradiomics/brain1_image.nrrd",
        "nrrd-pyradiomics/prostate_phantom_subvolume.nrrd",
        "ivadomed-spine-mr/sub-unf01/anat/sub-unf01_T1w.nii.gz",
        "nifti-awkward/nibabel/anatomical.nii",
    ],
)
def test_the_shipped_model_is_not_taken_for_others(
    hippocampus: Path, shared_data: Path, medseg: Any, tmp_path: Path, name: str
) -> None:
    if not (shared_data / name).exists():
        pytest.skip(f"{name} is not there")
    outcome = medseg("predict", shared_data / name, "-o", tmp_path / "out", *QUICK)
    assert outcome.status == 2, outcome
    assert "it is no scan for any model on this machine" in outcome.err
    assert "\n  hippocampus: " in outcome.err
    assert not list((tmp_path / "out").glob("*_seg*"))

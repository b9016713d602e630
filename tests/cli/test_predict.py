from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.core.labels import LabelSet
from medseg.io.nifti import read_labels, read_volume
from medseg.io.sidecar import read_index
from medseg.models.package import load_package

LABELS = LabelSet.from_names(["left blob", "right blob"])
QUICK = ("--threads", 1)


@pytest.fixture
def scans(made: Any, tmp_path: Path) -> Path:
    """Three scans in a folder: good, bad (cut off in the middle), good."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, case in (("a", "blob_006"), ("c", "blob_007")):
        shutil.copy(made.task / "imagesTs" / f"{case}.nii.gz", folder / f"{name}.nii.gz")
    data = (folder / "a.nii.gz").read_bytes()
    (folder / "b.nii.gz").write_bytes(data[: len(data) // 2])
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_label_map_and_its_sidecar_beside_the_scan(made: Any, medseg: Any, scans: Path) -> None:
    outcome = medseg("predict", scans / "a.nii.gz", "-m", made.model, *QUICK)
    assert outcome.status == 0, outcome
    assert outcome.err == ""
    assert names(scans) == ["a.nii.gz", "a_seg.json", "a_seg.nii.gz", "b.nii.gz", "c.nii.gz"]
    found = read_labels(scans / "a_seg.nii.gz", LABELS)
    volume = read_volume(scans / "a.nii.gz")
    assert found.grid.matches(volume.grid, 1e-4)
    # The structures are what is bright in the scan.
    bright = volume.values[0] > 50
    assert 2 * (bright & (found.values > 0)).sum() / (bright.sum() + (found.values > 0).sum()) > 0.7
    side = json.loads((scans / "a_seg.json").read_text())
    assert side["format"] == 1
    assert (side["scan"], side["labels"], side["model"]) == ("a.nii.gz", "a_seg.nii.gz", "Task00_blobs 3d")
    assert side["scan_sha256"] == hashlib.sha256((scans / "a.nii.gz").read_bytes()).hexdigest()
    assert side["model_sha256"] == load_package(made.model).digest()
    assert side["grid"]["shape"] == list(volume.grid.shape)
    assert np.allclose(side["grid"]["affine"], volume.grid.affine)
    for organ in side["organs"]:
        voxels = np.count_nonzero(found.values == organ["number"])
        assert organ["voxels"] == voxels > 0
        assert organ["volume_ml"] == pytest.approx(voxels * volume.grid.voxel_volume / 1000)
        assert 0.33 < organ["confidence"] <= 1
        (line,) = [line for line in outcome.out.splitlines() if line.startswith(organ["name"])]
        numbers = [organ["volume_ml"], organ["confidence"], organ["predicted_dice"]]
        assert line.split()[-3:] == [f"{number:.3f}" for number in numbers]
    assert side["calibration"]["cases"] == 2
    assert side["review"] == any(flag["review"] for flag in side["flags"])
    assert side["warnings"] == [flag["reason"] for flag in side["flags"]]


def test_a_scan_of_another_kind_is_refused_unless_forced(made: Any, medseg: Any, scans: Path) -> None:
    """Far beyond Hounsfield units, as an MR scan may be."""
    image = nib.load(scans / "a.nii.gz")
    values = np.asarray(image.dataobj).astype(np.int32) * 200 + 20_000
    nib.save(nib.Nifti1Image(values, image.affine), scans / "mr.nii.gz")
    command = ("predict", scans / "mr.nii.gz", "-m", made.model, *QUICK)
    medseg(*command).refused("intensities of channel CT", "the model was trained on CT", "--force")
    assert not (scans / "mr_seg.nii.gz").exists()
    forced = medseg(*command, "--force")
    assert forced.status == 0, forced
    assert "review: intensities of channel CT" in forced.out
    side = json.loads((scans / "mr_seg.json").read_text())
    assert side["review"]
    assert side["flags"][0]["structure"] is None


def test_what_is_unlike_training_is_told(made: Any, medseg: Any, scans: Path) -> None:
    image = nib.load(scans / "a.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([3, 3, 3, 1])), scans / "large.nii.gz")
    found = medseg("predict", scans / "large.nii.gz", "-m", made.model, *QUICK)
    assert found.status == 0, found
    assert "review: spacing: 3 x 3 x 6 mm; the model was trained on 1 x 1 x 2 mm" in found.out
    assert json.loads((scans / "large_seg.json").read_text())["review"]


def test_one_file(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    for name in ("out.nii.gz", "deep/er/out.nii"):
        assert medseg("predict", scans / "a.nii.gz", "-m", made.model, "-o", tmp_path / name, *QUICK).status == 0
        assert read_labels(tmp_path / name, LABELS).values.any()
        assert (tmp_path / name.replace(".nii.gz", ".json").replace(".nii", ".json")).exists()
    two = medseg("predict", scans / "a.nii.gz", scans / "c.nii.gz", "-m", made.model, "-o", tmp_path / "o.nii.gz")
    two.refused("is one file for 2 scans", "-o")


def test_several_scans_into_a_folder_and_again(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    command = ["predict", scans / "a.nii.gz", scans / "c.nii.gz", "-m", made.model, "-o", tmp_path / "out", *QUICK]
    outcome = medseg(*command)
    assert outcome.status == 0, outcome
    files = ["a_seg.json", "a_seg.nii.gz", "c_seg.json", "c_seg.nii.gz", "predictions.json"]
    assert names(tmp_path / "out") == files
    assert read_index(tmp_path / "out") == {n: tmp_path / "out" / f"{n}_seg.nii.gz" for n in "ac"}
    assert outcome.out.count("left blob") == 2
    before = (tmp_path / "out" / "a_seg.nii.gz").read_bytes()
    assert medseg(*command).status == 0
    assert names(tmp_path / "out") == files
    assert (tmp_path / "out" / "a_seg.nii.gz").read_bytes() == before


def test_a_folder_of_scans_twice_leaves_label_maps_out(made: Any, medseg: Any, scans: Path) -> None:
    (scans / "b.nii.gz").unlink()
    for _ in range(2):
        outcome = medseg("predict", scans, "-m", made.model, *QUICK)
        assert outcome.status == 0
        assert names(scans) == ["a.nii.gz", "a_seg.json", "a_seg.nii.gz", "c.nii.gz", "c_seg.json", "c_seg.nii.gz"]


def test_one_bad_scan_does_not_stop_the_others(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    outcome = medseg("predict", scans, "-m", made.model, "-o", tmp_path / "out", *QUICK)
    assert outcome.status == 2
    assert names(tmp_path / "out") == ["a_seg.json", "a_seg.nii.gz", "c_seg.json", "c_seg.nii.gz", "predictions.json"]
    first, last = outcome.err.splitlines()
    assert first.startswith("medseg: b.nii.gz is truncated")
    assert last == "medseg: 1 of 3 scans failed: b.nii.gz"
    index = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert set(index["cases"]) == {"a", "c"}
    assert set(index["failed"]) == {"b"}
    medseg("evaluate", tmp_path / "out", made.task).refused("1 case of", "was not predicted", "b: ")
    assert "metrics.csv" not in names(tmp_path / "out")


def test_bad_scans_of_one_name_are_both_counted(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(scans / "b.nii.gz", tmp_path / "other" / "b.nii.gz")
    outcome = medseg("predict", scans / "b.nii.gz", tmp_path / "other", "-m", made.model, *QUICK)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1] == "medseg: 2 of 2 scans failed: b.nii.gz, b.nii.gz"


def test_json_for_programs(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    outcome = medseg("predict", scans, "-m", made.model, "-o", tmp_path / "out", "--json", *QUICK)
    assert outcome.status == 2
    document = json.loads(outcome.out)
    assert [p["scan"] for p in document["predictions"]] == ["a.nii.gz", "c.nii.gz"]
    assert document["predictions"][0] == json.loads((tmp_path / "out" / "a_seg.json").read_text())
    assert "truncated" in document["failed"]["b"]


# ---- nothing of anyone else's is written over ---------------------------------------------------


def test_a_label_map_that_someone_drew_is_kept(made: Any, medseg: Any, scans: Path) -> None:
    (scans / "a_seg.nii.gz").write_bytes(b"by hand")
    outcome = medseg("predict", scans / "a.nii.gz", scans / "c.nii.gz", "-m", made.model, *QUICK)
    assert outcome.status == 2
    assert "a_seg.nii.gz is there already and was not made by medseg" in outcome.err
    assert (scans / "a_seg.nii.gz").read_bytes() == b"by hand"
    assert (scans / "c_seg.nii.gz").exists()


def test_a_scan_with_a_sidecar_of_its_own_is_not_written_over(made: Any, medseg: Any, scans: Path) -> None:
    """As in BIDS, where scan.json stands beside scan.nii.gz."""
    scan, side = scans / "a.nii.gz", scans / "a.json"
    side.write_text('{"EchoTime": 0.03}')
    before = scan.read_bytes()
    medseg("predict", scan, "-m", made.model, "-o", scan, *QUICK).refused("a.json is there already")
    scan.rename(scans / "x.nii.gz")
    medseg("predict", scans / "x.nii.gz", "-m", made.model, "-o", scan, *QUICK).refused("a.json is there already")
    side.write_text("no JSON")
    medseg("predict", scans / "x.nii.gz", "-m", made.model, "-o", scan, *QUICK).refused("a.json is there already")
    assert side.read_text() == "no JSON"
    assert (scans / "x.nii.gz").read_bytes() == before
    assert not scan.exists()


def test_a_folder_that_holds_something_else_is_left_alone(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    medseg("predict", scans, "-m", made.model, "-o", tmp_path / "notes", *QUICK).refused("holds something else (diary")
    medseg("predict", made.task, "--held-out", "-m", made.model, "-o", tmp_path / "notes").refused("something else")
    assert names(tmp_path / "notes") == ["diary.txt"]


def test_two_scans_of_one_name_do_not_share_an_output(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(scans / "a.nii.gz", tmp_path / "other" / "a.nii.gz")
    command = ["predict", scans / "a.nii.gz", tmp_path / "other" / "a.nii.gz", "-m", made.model]
    medseg(*command, "-o", tmp_path / "out").refused("two scans would both be written to")
    assert not (tmp_path / "out").exists()
    assert medseg(*command, *QUICK).status == 0


def test_an_index_does_not_outlive_what_it_lists(
    made: Any, medseg: Any, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off in the middle, a folder is not taken for whole."""
    command = ["predict", scans / "a.nii.gz", scans / "c.nii.gz", "-m", made.model, "-o", tmp_path / "out", *QUICK]
    assert medseg(*command).status == 0
    from medseg.infer.predict import Predictor

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Predictor, "predict", stop)
        assert medseg(*command).status == 1
    medseg("evaluate", tmp_path / "out", made.task).refused("predictions.json is missing")
    assert medseg(*command).status == 0
    assert set(read_index(tmp_path / "out")) == {"a", "c"}


# ---- what is refused ----------------------------------------------------------------------------


def test_scans_that_are_none(made: Any, medseg: Any, tmp_path: Path) -> None:
    missing = medseg("predict", tmp_path / "no.nii.gz", "-m", made.model, *QUICK)
    missing.refused(f"medseg: {tmp_path / 'no.nii.gz'} is missing. Name a file that is there.")
    (tmp_path / "empty").mkdir()
    medseg("predict", tmp_path / "empty", "-m", made.model).refused("holds no NIfTI file")
    medseg("predict", made.task, "-m", made.model).refused("is a task", "--held-out")


@pytest.mark.parametrize("output", [None, "x.nii.gz"])
def test_held_out_wants_a_task_and_a_folder(made: Any, medseg: Any, tmp_path: Path, output: str | None) -> None:
    more = [] if output is None else ["-o", tmp_path / output]
    medseg("predict", made.task, "--held-out", "-m", made.model, *more).refused("--held-out goes with one task")


def test_held_out_of_another_task(made: Any, medseg: Any, tiny_task: Any, tmp_path: Path) -> None:
    other = tiny_task(tmp_path / "Task01_few", 1)
    out = tmp_path / "out"
    medseg("predict", other, "--held-out", "-m", made.model, "-o", out).refused("has no case blob_")
    medseg("predict", tmp_path, "--held-out", "-m", made.model, "-o", out).refused("is no Decathlon task")
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: np.stack([v, v], -1), "has 2 channels, the model takes 1 (CT)"),
        (lambda v: np.where(v == v.max(), np.nan, v).astype(np.float32), "NaN or infinite"),
        (lambda v: np.where(v == v.max(), np.inf, v).astype(np.float32), "NaN or infinite"),
        (lambda v: v[:, :, 0], "dimensions"),
    ],
    ids=["channels", "NaN", "inf", "2-D"],
)
def test_unsound_scans(made: Any, medseg: Any, scans: Path, tmp_path: Path, change: Any, words: str) -> None:
    image = nib.load(scans / "a.nii.gz")
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), tmp_path / "odd.nii.gz")
    medseg("predict", tmp_path / "odd.nii.gz", "-m", made.model, *QUICK).refused("odd.nii.gz", words)
    assert not list(tmp_path.glob("odd_seg*"))


def test_models_that_are_none(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    scan = scans / "a.nii.gz"
    medseg("predict", scan, "-m", tmp_path / "no", *QUICK).refused(
        f"there is no folder {tmp_path / 'no'}.", "medseg train"
    )
    medseg("predict", scan, "-m", tmp_path, *QUICK).refused("is no model package")
    medseg("predict", scan, "-m", made.fold, *QUICK).refused(f"no package.json. Name {made.model}")
    unmade = made.run / "model"
    medseg("predict", scan, "-m", unmade, *QUICK).refused(f"no folder {unmade}. `medseg choose {made.run}` makes it")
    for name in ("member0.safetensors", "plan.json"):
        model = tmp_path / f"model with another {name}"
        shutil.copytree(made.model, model)
        data = bytearray((model / name).read_bytes())
        data[len(data) // 2] ^= 1
        (model / name).write_bytes(data)
        medseg("predict", scan, "-m", model, "-o", tmp_path / "out", *QUICK).refused(name, "was changed")
    assert not (tmp_path / "out").exists()
    assert not (scans / "a_seg.nii.gz").exists()


def test_a_gpu_that_is_not_there(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = ["predict", scans, "-m", made.model, "-o", tmp_path / "out", "--engine", "torch-cuda", "--threads", 1]
    medseg(*command).refused("torch sees no GPU")
    assert not (tmp_path / "out").exists()


def test_too_little_memory_for_one_scan_does_not_stop_the_others(
    made: Any, medseg: Any, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg.infer.predict import Predictor

    real = Predictor.predict
    errors = [RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), MemoryError()]

    def sometimes(self: Predictor, volume: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return real(self, volume, **options)

    monkeypatch.setattr(Predictor, "predict", sometimes)
    (scans / "b.nii.gz").unlink()
    shutil.copy(scans / "a.nii.gz", scans / "d.nii.gz")
    outcome = medseg("predict", scans, "-m", made.model, *QUICK)
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1] == "medseg: 2 of 3 scans failed: a.nii.gz, c.nii.gz"
    assert (scans / "d_seg.nii.gz").exists()

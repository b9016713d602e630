"""Bad input, folders that are something else, and disks that are full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

QUICK = ("--threads", 1, "--device", "cpu")


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], shift: float = 0.0) -> None:
    """The same file with other values, moved by ``shift`` mm."""
    image = nib.load(path)
    affine = image.affine.copy()
    affine[:3, 3] += shift
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj).copy()), affine), path)


def put(value: float, dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(dtype)
        values[3, 4, 5] = value
        return values

    return change


IMAGE, LABEL = "imagesTr/blob_002.nii.gz", "labelsTr/blob_002.nii.gz"
BAD = {
    "image missing": (lambda t: (t / IMAGE).unlink(), [f"{IMAGE} is missing"]),
    "label missing": (lambda t: (t / LABEL).unlink(), [f"{LABEL} is missing"]),
    "image empty": (lambda t: (t / IMAGE).write_bytes(b""), ["is empty"]),
    "image truncated": (lambda t: (t / IMAGE).write_bytes((t / IMAGE).read_bytes()[:3000]), ["truncated"]),
    "image no NIfTI": (lambda t: (t / IMAGE).write_bytes(b"P5 7 7 255" * 99), ["not a NIfTI file"]),
    "other size": (lambda t: rewrite(t / LABEL, lambda v: v[1:]), ["differ in size"]),
    "other place": (lambda t: rewrite(t / LABEL, lambda v: v, 3.0), ["mm apart"]),
    "unlisted value": (lambda t: rewrite(t / LABEL, put(9, np.uint8)), ["the value 9", "1 left blob"]),
    "half a label": (lambda t: rewrite(t / LABEL, put(1.5, np.float32)), ["not whole numbers"]),
    "NaN": (lambda t: rewrite(t / IMAGE, put(np.nan, np.float32)), [IMAGE, "1 voxel that is NaN or infinite"]),
    "inf": (lambda t: rewrite(t / IMAGE, put(np.inf, np.float32)), [IMAGE, "1 voxel that is NaN or infinite"]),
    "a channel too many": (lambda t: rewrite(t / IMAGE, lambda v: np.stack([v, v], -1)), ["has 2 channels"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_case_is_named_by_every_verb_that_meets_it(made: Any, medseg: Any, tmp_path: Path, name: str) -> None:
    mine = made.copy(tmp_path)
    spoil, words = BAD[name]
    spoil(mine.task)
    checked = medseg("check", mine.task)
    assert checked.status == 2
    assert checked.err == ""
    (line,) = [line for line in checked.out.splitlines() if line.startswith("error: case blob_002: ")]
    assert all(word in line for word in words)
    assert "5 ok, 0 with warnings, 1 with errors. Not fit for use." in checked.out
    medseg("plan", mine.task, "-o", tmp_path / "new").refused("case blob_002: ", *words)
    assert not [p for p in (tmp_path / "new").iterdir() if not p.name.startswith(".")]
    medseg("preprocess", mine.run, "--threads", 1).refused("case blob_002: ", *words)
    medseg("train", mine.run).refused("store.json is missing", "medseg preprocess")


@pytest.mark.parametrize("verb", ["check", "plan", "evaluate"])
def test_folders_that_are_no_task(made: Any, medseg: Any, tmp_path: Path, verb: str) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "no", "is no folder"), (tmp_path / "empty", "dataset.json")):
        arguments = {"check": [folder], "plan": [folder, "-o", tmp_path / "run"], "evaluate": [made.fold, folder]}
        medseg(verb, *arguments[verb]).refused(str(folder), words)
    assert not (tmp_path / "run").exists()


def test_a_task_of_other_words(made: Any, medseg: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    (mine.task / "dataset.json").write_text("{")
    medseg("plan", mine.task, "-o", tmp_path / "new").refused("dataset.json cannot be read as JSON")
    for verb in ("preprocess", "train", "report"):
        medseg(verb, mine.run).refused("dataset.json cannot be read as JSON")


@pytest.mark.parametrize("verb", ["preprocess", "train", "report"])
def test_runs_that_are_none(made: Any, medseg: Any, tmp_path: Path, verb: str) -> None:
    medseg(verb, tmp_path / "no").refused("run.json is missing", "medseg plan TASK -o")
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").write_text("")
    medseg(verb, tmp_path / "file").refused("is a file")
    mine = made.copy(tmp_path)
    (mine.run / "plan.json").write_text("[]")
    medseg(verb, mine.run).refused("plan.json is no sound plan")
    (mine.run / "plan.json").unlink()
    medseg(verb, mine.run).refused("plan.json is missing")
    (mine.run / "run.json").write_text("[]")
    medseg(verb, mine.run).refused("run.json has another format")


def test_an_output_folder_that_holds_something_else(made: Any, medseg: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    medseg("plan", made.task, "-o", tmp_path).refused("holds something else (thesis.tex)", "new or empty")
    medseg("plan", made.task, "-o", tmp_path / "thesis.tex").refused("is a file")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    mine = made.copy(tmp_path)
    shutil.rmtree(mine.model)
    mine.model.mkdir()
    (mine.model / "thesis.tex").write_text("x")
    medseg("train", mine.run, *QUICK).refused("holds something else (thesis.tex)")


def test_folds_and_configurations_that_are_not_there(made: Any, medseg: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    medseg("train", mine.run, "--fold", 3, *QUICK).refused("has no fold 3", "0 to 2")
    medseg("train", mine.run, "-c", "5d", *QUICK).refused("no configuration '5d'", "It has 3d")
    medseg("preprocess", mine.run, "-c", "../5d").refused("no configuration '../5d'", "It has 3d")
    assert not (mine.run / "5d").exists()
    assert not (mine.run.parent / "5d").exists()


def test_training_wants_the_cases_of_its_own_plan(made: Any, medseg: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    plan = json.loads((mine.run / "plan.json").read_text())
    plan["configurations"]["3d"]["spacing"]["value"] = [1.5, 1.5, 1.5]
    (mine.run / "plan.json").write_text(json.dumps(plan))
    medseg("train", mine.run, *QUICK).refused("preprocessed by another plan", "medseg preprocess")
    (mine.run / "3d" / "preprocessed" / "store.json").unlink()
    command = f"`medseg preprocess {mine.run} -c 3d`"
    medseg("train", mine.run, "--fold", 1, *QUICK).refused("store.json is missing", command)
    assert not (mine.run / "3d" / "fold1").exists()


def test_an_edited_plan_is_checked(made: Any, medseg: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    plan = json.loads((mine.run / "plan.json").read_text())
    plan["training"]["optimiser"] = "lion"
    (mine.run / "plan.json").write_text(json.dumps(plan))
    medseg("preprocess", mine.run).refused("plan.json is no sound plan", "training.optimiser")


def test_evaluation_of_what_is_no_prediction(made: Any, medseg: Any, tmp_path: Path) -> None:
    medseg("evaluate", tmp_path, made.task).refused("has no label map")
    folder = tmp_path / "predictions"
    shutil.copytree(made.fold / "predictions", folder)
    index = json.loads((folder / "predictions.json").read_text())
    case, name = next(iter(index["cases"].items()))
    (folder / name).unlink()
    medseg("evaluate", folder, made.task).refused(
        f"case {case}: its prediction {folder / name} is missing. Predict it again"
    )
    (folder / "predictions.json").write_text(json.dumps({**index, "cases": {"nobody": name}}))
    medseg("evaluate", folder, made.task).refused("nobody")
    (folder / "predictions.json").write_text(json.dumps({**index, "cases": {}}))
    medseg("evaluate", folder, made.task).refused("holds no prediction")
    (folder / "predictions.json").write_text(json.dumps({**index, "failed": {"blob_001": "it is empty"}}))
    medseg("evaluate", folder, made.task).refused("1 case of", "was not predicted (blob_001: it is empty)")
    assert not list(tmp_path.rglob("metrics*"))


def test_a_prediction_on_another_grid_is_not_scored(made: Any, medseg: Any, tmp_path: Path) -> None:
    folder = tmp_path / "predictions"
    shutil.copytree(made.fold / "predictions", folder)
    case, name = next(iter(json.loads((folder / "predictions.json").read_text())["cases"].items()))
    rewrite(folder / name, lambda v: v, 3.0)
    medseg("evaluate", folder, made.task).refused(f"case {case}: ")
    rewrite(folder / name, put(7, np.uint8), -3.0)
    medseg("evaluate", folder, made.task).refused(f"case {case}: ", "the value 7")


# ---- a full disk --------------------------------------------------------------------------------


def limited(limit: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """A command that cannot write a file beyond ``limit`` bytes, as on a disk that is full."""
    return subprocess.run(
        [sys.executable, "-m", "medseg", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_label_map_that_does_not_fit_leaves_the_earlier_one(made: Any, medseg: Any, tmp_path: Path) -> None:
    scan, output = made.task / "imagesTs" / "blob_006.nii.gz", tmp_path / "out.nii"
    command = ["predict", scan, "-m", made.model, "-o", output, "--threads", 1]
    assert medseg(*command).status == 0
    before = tree(tmp_path)
    assert set(before) == {"out.nii", "out.json"}
    done = limited(5000, *command)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("medseg: blob_006.nii.gz: cannot write")
    assert "free some space" in line
    assert tree(tmp_path) == before
    assert medseg(*command).status == 0


@pytest.mark.parametrize("verb", ["plan", "preprocess", "train", "evaluate", "report"])
def test_on_a_full_disk_every_verb_ends_in_one_line(made: Any, tmp_path: Path, verb: str) -> None:
    mine = made.copy(tmp_path)
    commands = {
        "plan": (50, ["plan", mine.task, "-o", tmp_path / "new", "--no-measure"]),
        "preprocess": (4000, ["preprocess", mine.run, "--threads", 1]),
        "train": (4000, ["train", mine.run, *QUICK]),
        "evaluate": (100, ["evaluate", mine.fold / "predictions", mine.task, "-o", tmp_path / "new"]),
        "report": (4000, ["report", mine.run]),
    }
    limit, command = commands[verb]
    log = mine.fold / "log.json"
    if verb == "train":  # or it would be left as it is
        log.unlink()
    done = limited(limit, *command)
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("medseg: ")
    assert not list(tmp_path.rglob("*.part"))
    if verb in ("train", "evaluate", "report"):  # the others say that what they began is not whole
        after = tree(mine.run)
        changed = {"run.json", str(log.relative_to(mine.run))} if verb == "train" else {"run.json"}
        kept = {k: v for k, v in tree(made.run).items() if k not in changed}
        assert {k: after.get(k) for k in kept} == kept


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    ).returncode  # fmt: skip
    if not mounted:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(made: Any, medseg: Any, small_disk: Path) -> None:
    scan, output = made.task / "imagesTs" / "blob_006.nii.gz", small_disk / "out.nii"
    command = ["predict", scan, "-m", made.model, "-o", output, "--threads", 1]
    assert medseg(*command).status == 0
    before = tree(small_disk)
    with (small_disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 1024):
                pass
        except OSError:
            pass
    medseg(*command).refused("cannot write", "No space left on device", status=1)
    (small_disk / "filler").unlink()
    assert tree(small_disk) == before

"""`medseg predict --channel`: one case whose channels are several scans."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.ndimage import zoom

from medseg.cli.channels import ChannelScan, parse_channels
from medseg.core.errors import InputError
from medseg.io.nifti import read_volume

QUICK = ("--threads", 1)


@pytest.fixture(scope="module")
def two(medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of the channels T2 and ADC, and a test case whole and in parts."""
    folder = tmp_path_factory.mktemp("two")
    task = tiny_task(folder / "Task00_blobs", 4, channels=("T2", "ADC"), unlabelled=1)
    assert medseg("plan", task, "-o", folder / "run", "--folds", 2, "--machine", "cpu", "--no-measure").status == 0
    plan = json.loads((folder / "run" / "plan.json").read_text())
    small = json.loads(small_plan(channels=("T2", "ADC"), steps_per_epoch=20).model_dump_json())
    plan |= {"configurations": small["configurations"], "training": small["training"]}
    (folder / "run" / "plan.json").write_text(json.dumps(plan))
    for verb in (["preprocess", folder / "run", "--threads", 1], ["train", folder / "run", *QUICK]):
        assert medseg(*verb).status == 0
    shutil.copytree(folder / "run" / "3d" / "fold0" / "model", folder / "model")
    whole = nib.load(next((task / "imagesTs").glob("*.nii.gz")))
    nib.save(whole, folder / "whole.nii.gz")
    values = np.asarray(whole.dataobj)
    for number, name in enumerate(("t2", "adc")):
        part = nib.Nifti1Image(values[..., number], whole.affine)
        part.set_qform(whole.affine, code=1)
        part.set_sform(whole.affine, code=1)
        nib.save(part, folder / f"{name}.nii.gz")
    return folder


def channels(folder: Path, adc: Path | None = None) -> tuple[Any, ...]:
    return "predict", "--channel", f"ADC={adc or folder / 'adc.nii.gz'}", "--channel", f"T2={folder / 't2.nii.gz'}"


def test_channels_in_parts_give_what_they_give_whole(two: Path, medseg: Any, tmp_path: Path) -> None:
    assert medseg("predict", two / "whole.nii.gz", "-m", two / "model", "-o", tmp_path / "w.nii.gz", *QUICK).status == 0
    outcome = medseg(*channels(two), "-m", two / "model", "-o", tmp_path / "p.nii.gz", *QUICK)
    assert outcome.status == 0, outcome
    whole, parts = (np.asarray(nib.load(tmp_path / name).dataobj) for name in ("w.nii.gz", "p.nii.gz"))
    assert np.array_equal(whole, parts)
    side = json.loads((tmp_path / "p.json").read_text())
    assert side["scan"] == "t2.nii.gz"
    assert [(c["name"], c["scan"], c["overlap"]) for c in side["channels"]] == [
        ("T2", "t2.nii.gz", 1),
        ("ADC", "adc.nii.gz", 1),
    ]
    assert side["channels"][1]["sha256"] == hashlib.sha256((two / "adc.nii.gz").read_bytes()).hexdigest()
    assert "channels" not in json.loads((tmp_path / "w.json").read_text())


def test_another_grid_and_another_format(two: Path, medseg: Any, tmp_path: Path) -> None:
    image = sitk.ReadImage(str(two / "adc.nii.gz"))
    fine = sitk.GetImageFromArray(zoom(sitk.GetArrayFromImage(image), (1, 2, 2), order=0))
    spacing = np.array(image.GetSpacing()) / (2, 2, 1)
    fine.SetSpacing(spacing.tolist())
    fine.SetOrigin(
        (np.array(image.GetOrigin()) - np.reshape(image.GetDirection(), (3, 3)) @ (spacing * (0.5, 0.5, 0))).tolist()
    )
    fine.SetDirection(image.GetDirection())
    sitk.WriteImage(fine, str(tmp_path / "adc.mha"))
    outcome = medseg(*channels(two, tmp_path / "adc.mha"), "-m", two / "model", "-o", tmp_path / "out", *QUICK)
    assert outcome.status == 0, outcome
    assert {p.name for p in (tmp_path / "out").glob("[!.]*")} == {"t2_seg.nii.gz", "t2_seg.json", "predictions.json"}
    made = read_volume(tmp_path / "out" / "t2_seg.nii.gz")
    assert made.grid.matches(read_volume(two / "t2.nii.gz").grid, 1e-3)


def test_registration_is_recorded(two: Path, medseg: Any, tmp_path: Path) -> None:
    image = nib.load(two / "adc.nii.gz")
    affine = image.affine.copy()
    affine[:3, 3] += 1.5, -2, 2.5
    moved = nib.Nifti1Image(np.asarray(image.dataobj), affine)
    moved.set_qform(affine, code=1)
    nib.save(moved, tmp_path / "adc.nii.gz")
    command = channels(two, tmp_path / "adc.nii.gz")
    outcome = medseg(*command, "--register", "-m", two / "model", "-o", tmp_path / "a.nii.gz", *QUICK)
    assert outcome.status == 0, outcome
    side = json.loads((tmp_path / "a.json").read_text())
    first, second = side["channels"]
    assert "alignment" not in first
    found = second["alignment"]
    # How well it finds a motion is tested on better images than two noisy blobs.
    assert 0 <= found["translation_mm"] < 10
    assert found["rotation_degrees"] >= 0
    assert found["mutual_information"] >= found["mutual_information_before"] > 0
    assert np.linalg.det(found["transform"]) == pytest.approx(1)
    assert any("moved by" in warning and "to fit T2" in warning for warning in side["warnings"])
    plain = medseg(*command, "-m", two / "model", "-o", tmp_path / "b.nii.gz", *QUICK)
    assert plain.status == 0
    side = json.loads((tmp_path / "b.json").read_text())
    assert "alignment" not in side["channels"][1]
    assert any("ADC covers only" in warning for warning in side["warnings"])


def test_what_is_refused(two: Path, medseg: Any, tmp_path: Path) -> None:
    model, t2, adc = ("-m", two / "model"), two / "t2.nii.gz", two / "adc.nii.gz"
    medseg("predict", *model, "--channel", f"T2={t2}").refused("channel ADC is missing", "T2, ADC")
    medseg("predict", *model, "--channel", f"FLAIR={t2}").refused("no channel 'FLAIR'", "T2, ADC")
    medseg("predict", *model, "--channel", f"t2={t2}").refused("no channel 't2'")
    medseg("predict", *model, "--channel", f"T2={t2}", "--channel", f"T2={adc}").refused("T2 comes twice")
    medseg("predict", *model, "--channel", str(t2)).refused("is not NAME=SCAN")
    medseg(*channels(two), *model, "--series", 2).refused("--channel names one case")
    medseg(*channels(two), t2, *model).refused("--channel names one case")
    medseg("predict", t2, *model, "--register").refused("--register goes with --channel")
    medseg("predict", *model).refused("no scan is named")
    gone = medseg(*channels(two, tmp_path / "gone.nii.gz"), *model, "-o", tmp_path / "x.nii.gz", *QUICK)
    gone.refused("channel ADC: ", "gone.nii.gz is missing")
    many = medseg(*channels(two, two / "whole.nii.gz"), *model, "-o", tmp_path / "x.nii.gz", *QUICK)
    many.refused("channel ADC has 2 channels")
    far = nib.load(adc)
    far.set_sform(_far(far.affine), code=1)
    far.set_qform(far.get_sform(), code=1)
    nib.save(far, tmp_path / "far.nii.gz")
    away = medseg(*channels(two, tmp_path / "far.nii.gz"), *model, "-o", tmp_path / "x.nii.gz", *QUICK)
    away.refused("channel ADC shows nothing", "--register")
    assert not list(tmp_path.glob("x*"))


@pytest.fixture
def optional(two: Path, medseg: Any, tmp_path: Path) -> Path:
    """The model, its plan edited by a person to do without ADC: one epoch from the same data."""
    shutil.copytree(two / "run", tmp_path / "run")
    path = tmp_path / "run" / "plan.json"
    plan = json.loads(path.read_text())
    assert plan["optional_channels"] == {"value": [], "reason": "a scan must have every channel"}
    plan["optional_channels"]["value"] = ["ADC"]
    path.write_text(json.dumps(plan))
    for folder in ("3d", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / folder)
    for verb in (["preprocess", tmp_path / "run", "--threads", 1], ["train", tmp_path / "run", *QUICK]):
        assert medseg(*verb).status == 0
    return tmp_path / "run" / "3d" / "fold0" / "model"


def test_a_channel_that_the_model_can_do_without(two: Path, optional: Path, medseg: Any, tmp_path: Path) -> None:
    given = ("predict", "--channel", f"T2={two / 't2.nii.gz'}", "-m", optional, *QUICK)
    outcome = medseg(*given, "-o", tmp_path / "a.nii.gz")
    assert outcome.status == 0, outcome
    words = "ADC was not given; its mean stands in its place, and the result may be worse"
    assert f"warning: {words}" in outcome.out
    side = json.loads((tmp_path / "a.json").read_text())
    assert words in side["warnings"]
    assert side["channels"][1] == {"name": "ADC", "scan": None}
    # A channel of zeros is the same: that is what it stands for.
    image = nib.load(two / "whole.nii.gz")
    values = np.asarray(image.dataobj).copy()
    values[..., 1] = 0
    nib.save(nib.Nifti1Image(values, image.affine), tmp_path / "zeros.nii.gz")
    assert medseg("predict", tmp_path / "zeros.nii.gz", "-m", optional, "-o", tmp_path / "b.nii.gz", *QUICK).status == 0
    found, other = (np.asarray(nib.load(tmp_path / name).dataobj) for name in ("a.nii.gz", "b.nii.gz"))
    np.testing.assert_array_equal(found, other)
    adc = ("--channel", f"ADC={two / 'adc.nii.gz'}")
    medseg("predict", *adc, "-m", optional).refused("channel T2 is missing", "T2, ADC (may be missing)")


def test_plan_names_what_may_be_missing(two: Path, medseg: Any, tmp_path: Path) -> None:
    task = two / "Task00_blobs"
    done = medseg(
        "plan",
        task,
        "-o",
        tmp_path / "run",
        "--optional-channel",
        "ADC",
        "--machine",
        "cpu",
        "--folds",
        2,
        "--no-measure",
    )
    assert done.status == 0, done
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["optional_channels"]["value"] == ["ADC"]
    assert "train on cases that lack it" in plan["optional_channels"]["reason"]
    for name in ("T2", "FLAIR"):
        medseg("plan", task, "-o", tmp_path / "other", "--optional-channel", name).refused(
            f"'{name}' cannot be an optional channel", "others are ADC"
        )


def _far(affine: Any) -> Any:
    away = np.array(affine)
    away[:3, 3] += 900
    return away


def test_a_series_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "odd#2").mkdir()
    found = parse_channels([f"B={tmp_path}/study#4", f"A={tmp_path}/odd#2"], ["A", "B"])
    assert found == (ChannelScan("A", tmp_path / "odd#2"), ChannelScan("B", tmp_path / "study", 4))
    with pytest.raises(InputError, match="B is missing"):
        parse_channels([f"A={tmp_path}"], ["A", "B"])

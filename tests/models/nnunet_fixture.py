"""Makes the models that test_nnunet.py imports: trained, and asked for labels, by nnU-Net itself.

    python tests/models/nnunet_fixture.py PEER/bin WORK tests/models/nnunet [VARIANT ...]

PEER is an environment of its own with nnunetv2 2.8.1 in it. Each variant is a made-up task of medseg's
phantoms, stored in another orientation, and a tiny network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from medseg.dataset.phantom import phantom

CASES = 8
TRAINER = "nnUNetTrainer_1epoch"


@dataclass(frozen=True)
class Variant:
    """A task, how its files are stored, and what is changed in the plans that nnU-Net makes."""

    name: str
    number: int
    task: str
    channels: dict[str, int]
    stored: str
    configurations: tuple[str, ...]
    patch: tuple[int, ...]
    spacing: tuple[float, ...]
    strides: tuple[tuple[int, ...], ...]
    labels: dict[str, Any] | None = None
    regions: tuple[int, ...] | None = None
    residual: bool = False
    use_mask: bool = False
    folds: tuple[int, ...] = (0,)


VARIANTS = (
    Variant("ct", 901, "abdomen", {"CT": 0}, "LPI", ("3d_fullres",), (16, 24, 32), (6.3, 5.4, 5.4),
            ((1, 1, 1), (2, 2, 2), (1, 2, 2)), folds=(0, 1)),
    Variant("flat", 902, "abdomen", {"CT": 0}, "PIR", ("2d",), (32, 24), (5.6, 5.1), ((1, 1), (2, 2), (2, 2))),
    Variant("regions", 903, "brain", {"FLAIR": 0, "T2w": 3}, "ASR", ("3d_fullres",), (24, 24, 24), (3.3, 3.4, 3.2),
            ((1, 1, 1), (2, 2, 2), (2, 2, 2)), residual=True, use_mask=True,
            labels={"background": 0, "whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing": 3},
            regions=(1, 2, 3)),
    Variant("thick", 904, "prostate", {"T2": 0, "nonorm": 1}, "SLP", ("3d_fullres",), (7, 40, 32), (3.4, 1.3, 1.25),
            ((1, 1, 1), (1, 2, 2), (1, 2, 2)), residual=True,
            labels={"background": 0, "PZ": 1, "TZ": 2, "ignore": 3}),
    Variant("cascade", 905, "abdomen", {"CT": 0}, "RAI", ("3d_lowres", "3d_cascade_fullres"), (16, 24, 32),
            (6.1, 5.2, 5.2), ((1, 1, 1), (2, 2, 2), (1, 2, 2))),
)  # fmt: skip


def main(peer: Path, work: Path, out: Path, names: list[str]) -> None:
    """All variants, or those named."""
    folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
    environment = os.environ | folders | {"OMP_NUM_THREADS": "1"}
    for variant in VARIANTS:
        if not names or variant.name in names:
            one(variant, peer, work, out / variant.name, environment)


def one(variant: Variant, peer: Path, work: Path, out: Path, environment: dict[str, str]) -> None:
    """A variant from its data to what is kept."""
    dataset = f"Dataset{variant.number}_{variant.name}"
    scan = write_task(variant, work, work / "raw" / dataset)
    inputs = work / "inputs" / variant.name
    shutil.rmtree(out, ignore_errors=True)
    for folder in (inputs, out):
        folder.mkdir(parents=True, exist_ok=True)
    for channel, image in enumerate(scan):
        nib.save(image, inputs / f"scan_{channel:04d}.nii.gz")
        nib.save(image, out / f"scan_{channel}.nii.gz")
    plans = "nnUNetResEncUNetMPlans" if variant.residual else "nnUNetPlans"
    results, predicted = work / "results" / dataset, work / "predicted" / variant.name
    what = {
        "number": variant.number,
        "trainer": TRAINER,
        "planner": "nnUNetPlannerResEncM" if variant.residual else "ExperimentPlanner",
        "plans": plans,
        "configurations": variant.configurations,
        "folds": variant.folds,
        "channels": len(variant.channels),
        "patch": variant.patch,
        "spacing": variant.spacing,
        "strides": variant.strides,
        "use_mask": variant.use_mask,
        "preprocessed": str(work / "preprocessed" / dataset),
        "results": str(results),
        "predicted": str(predicted),
        "scan": [str(p) for p in sorted(inputs.glob("*.nii.gz"))],
    }
    (inputs / "what.json").write_text(json.dumps(what))
    program = Path(__file__).with_name("nnunet_peer.py")
    subprocess.run([str(peer / "python"), str(program), str(inputs / "what.json")], env=environment, check=True)
    for configuration in variant.configurations:
        for tta in ("plain", "mirrored", "exact"):
            shutil.copy(predicted / configuration / tta / "scan.nii.gz", out / f"{configuration}_{tta}.nii.gz")
        name = f"{TRAINER}__{plans}__{configuration}"
        keep(results / name, out / "models" / name, variant.folds)


def write_task(variant: Variant, work: Path, folder: Path) -> list[Any]:
    """nnU-Net's raw dataset; gives the channels of the scan that is kept for the tests."""
    source = phantom(work / "phantoms" / variant.name, variant.task, cases=CASES, seed=0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for case in range(CASES):
        name = f"{variant.task}_{case:03d}"
        for channel, image in enumerate(channels(source / "imagesTr" / f"{name}.nii.gz", variant)):
            nib.save(image, folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        label = nib.load(source / "labelsTr" / f"{name}.nii.gz")
        nib.save(stored(np.asarray(label.dataobj).astype(np.uint8), label.affine, variant.stored),
                 folder / "labelsTr" / f"{name}.nii.gz")  # fmt: skip
    known = json.loads((source / "dataset.json").read_text())["labels"]
    description = {
        "channel_names": {str(i): name for i, name in enumerate(variant.channels)},
        "labels": variant.labels or {name: int(number) for number, name in known.items()},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    if variant.regions:
        description["regions_class_order"] = list(variant.regions)
    (folder / "dataset.json").write_text(json.dumps(description))
    return channels(source / "imagesTs" / f"{variant.task}_{CASES:03d}.nii.gz", variant)


def channels(path: Path, variant: Variant) -> list[Any]:
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    values = values.reshape(*values.shape[:3], -1)
    # Fewer grey levels pack better.
    coarse = 4 if variant.task == "abdomen" else 1
    return [
        stored((values[..., c] // coarse * coarse).astype(np.int16), image.affine, variant.stored)
        for c in variant.channels.values()
    ]


def stored(values: Any, affine: Any, codes: str) -> Any:
    """The image with its axes along ``codes``."""
    image = nib.Nifti1Image(values, affine)
    return image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))


def keep(trained: Path, out: Path, folds: tuple[int, ...]) -> None:
    """The model folder without what predicting does not need; the optimiser's moments go too."""
    out.mkdir(parents=True)
    for name in ("dataset.json", "plans.json"):
        shutil.copy(trained / name, out / name)
    for fold in folds:
        checkpoint = torch.load(trained / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)
        checkpoint["optimizer_state"]["state"] = {}
        (out / f"fold_{fold}").mkdir()
        torch.save(checkpoint, out / f"fold_{fold}" / "checkpoint_final.pth")


if __name__ == "__main__":
    bins, work_folder, out_folder, *chosen = sys.argv[1:]
    main(Path(bins).absolute(), Path(work_folder).absolute(), Path(out_folder).absolute(), chosen)

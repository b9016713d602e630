"""nnU-Net's Dice after so many minutes of training on this machine, on the folds of a medseg run.

    python -m venv peer && peer/bin/pip install nnunetv2==2.8.1
    peer/bin/python benchmarks/train/nnunet.py TASK RUN WORK --minutes 1 2 5 15
    peer/bin/python benchmarks/train/nnunet.py TASK RUN WORK --step

TASK is a Decathlon folder, RUN one that `medseg plan` made of it, WORK a folder for nnU-Net's files. Its
own plan, data, augmentation, network, loss, optimiser and schedule; the schedule is fitted to the number
of steps that the minutes hold, by the time of two of them, and what nnU-Net does at the end of an epoch
(a validation, a figure, a checkpoint) is left out, in its favour. ``--step`` times its training step alone;
``--each`` takes its word for how many steps the minutes hold, so that other programs may run beside it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

NAME, CONFIGURATION = "Dataset004_Peer", "3d_fullres"


def prepare(task: Path, run: Path, work: Path) -> None:
    """The task as nnU-Net wants it, its plan, and its preprocessed cases; folds are those of the run."""
    raw, ready = work / "raw" / NAME, work / "preprocessed" / NAME
    if (ready / "splits_final.json").is_file():
        return
    told = json.loads((task / "dataset.json").read_text())
    names = [Path(entry["image"]).name.removesuffix(".nii.gz") for entry in told["training"]]
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(task / "imagesTr" / f"{name}.nii.gz", raw / "imagesTr" / f"{name}_0000.nii.gz")
        shutil.copy(task / "labelsTr" / f"{name}.nii.gz", raw / "labelsTr" / f"{name}.nii.gz")
    labels = {name: int(number) for number, name in told["labels"].items()}
    channels = told.get("modality", told.get("channel_names"))
    (raw / "dataset.json").write_text(
        json.dumps({"channel_names": channels, "labels": labels, "numTraining": len(names), "file_ending": ".nii.gz"})
    )
    program = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
    subprocess.run([program, "-d", "4", "-c", CONFIGURATION, "-np", "1", "-npfp", "1"], check=True)
    folds = json.loads((run / "folds.json").read_text())["folds"]
    splits = [{"train": fold["train"], "val": fold["validation"]} for fold in folds]
    (ready / "splits_final.json").write_text(json.dumps(splits))


def trainer_of(fold: int, threads: int):
    """nnU-Net's trainer, ready, and its batches."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(threads)
    trainer = get_trainer_from_args("4", CONFIGURATION, fold, device=torch.device("cpu"))
    trainer.on_train_start()
    return trainer


def train(trainer, steps: int) -> list[float]:
    """So many of its own steps, the learning rate as its schedule has it; the seconds of each."""
    trainer.network.train()
    seconds = []
    for step in range(steps):
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - step / steps) ** 0.9
        before = time.perf_counter()
        trainer.train_step(next(trainer.dataloader_train))
        seconds.append(time.perf_counter() - before)
    return seconds


def dice(trainer, task: Path, run: Path, fold: int, work: Path) -> dict[str, float]:
    """Its Dice on the fold's held-out cases, predicted by its own predictor on the original grid."""
    import nibabel
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(device=trainer.device, perform_everything_on_device=False, allow_tqdm=False)
    plans, configuration = trainer.plans_manager, trainer.configuration_manager
    weights = [trainer.network.state_dict()]
    mirrored = trainer.inference_allowed_mirroring_axes
    predictor.manual_initialization(
        trainer.network, plans, configuration, weights, trainer.dataset_json, "nnUNetTrainer", mirrored
    )
    cases = json.loads((run / "folds.json").read_text())["folds"][fold]["validation"]
    images = [[str(work / "raw" / NAME / "imagesTr" / f"{case}_0000.nii.gz")] for case in cases]
    out = work / "predicted"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    predictor.predict_from_files_sequential(images, [str(out / f"{case}.nii.gz") for case in cases])
    scores: dict[str, list[float]] = {}
    for case in cases:
        found = np.asarray(nibabel.load(out / f"{case}.nii.gz").dataobj)
        truth = np.asarray(nibabel.load(task / "labelsTr" / f"{case}.nii.gz").dataobj)
        for number, name in json.loads((task / "dataset.json").read_text())["labels"].items():
            mine, true = found == int(number), truth == int(number)
            if int(number) and true.any():
                scores.setdefault(name, []).append(2 * (mine & true).sum() / (mine.sum() + true.sum()))
    return {name: float(np.mean(values)) for name, values in scores.items()}


def main() -> None:
    """Print a line of JSON for each number of minutes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, nargs="*", default=[])
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--each", type=float, help="seconds of a step, as --step told them when nothing else ran")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    wanted = parser.parse_args()
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(wanted.work.resolve() / name)
    prepare(wanted.task, wanted.run, wanted.work)
    if wanted.step:
        seconds = train(trainer_of(wanted.fold, wanted.threads), 5)[1:]
        print(json.dumps({"step_seconds": statistics.median(seconds), "all": seconds}))
    for minutes in wanted.minutes:
        # One that has been warmed up says how long a step takes; another one is trained.
        each = wanted.each or statistics.median(train(trainer_of(wanted.fold, wanted.threads), 3)[1:])
        trainer = trainer_of(wanted.fold, wanted.threads)
        seconds = train(trainer, max(1, int(60 * minutes / each)))
        found = dice(trainer, wanted.task, wanted.run, wanted.fold, wanted.work)
        result = {"minutes": minutes, "steps": len(seconds), "seconds": sum(seconds), "dice": found}
        print(json.dumps(result | {"mean": statistics.mean(found.values())}), flush=True)


if __name__ == "__main__":
    main()

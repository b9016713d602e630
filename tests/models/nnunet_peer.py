"""Run by nnunet_fixture.py with the peer's python: nnU-Net plans, trains and predicts one variant.

    PEER/bin/python nnunet_peer.py WHAT.json

It is nnU-Net's own training but for shorter epochs, no augmentation and no validation, which would
only take time. A cascade's second stage learns from the true labels, for the same reason.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA
from nnunetv2.training.nnUNetTrainer.variants.training_length import nnUNetTrainer_Xepochs as lengths

STEPS = 350


def shorten(trainer: Any) -> None:
    made = trainer.__init__

    def make(self: Any, plans: dict, configuration: str, fold: int, dataset_json: dict, device: Any) -> None:
        made(self, plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = STEPS, 2

    configure = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size

    def plain(self: Any) -> tuple[Any, ...]:
        rotation, dummy, _, mirror = configure(self)
        return rotation, dummy, tuple(self.configuration_manager.patch_size), mirror

    trainer.__init__ = make
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size = plain
    trainer.get_training_transforms = staticmethod(nnUNetTrainerNoDA.get_training_transforms)
    trainer.perform_actual_validation = lambda self, save_probabilities=False: None


def shrink(what: dict[str, Any], path: Path) -> None:
    """Make nnU-Net's plans those of a network that trains in seconds."""
    plans = json.loads(path.read_text())
    one = plans["configurations"]["2d" if what["configurations"] == ["2d"] else "3d_fullres"]
    one.update({"patch_size": what["patch"], "spacing": what["spacing"], "batch_size": 2})
    one["use_mask_for_norm"] = [what["use_mask"]] * what["channels"]
    kwargs = one["architecture"]["arch_kwargs"]
    axes, stages = len(what["patch"]), len(what["strides"])
    kwargs.update(features_per_stage=[4, 8, 8], n_stages=stages, strides=what["strides"])
    kwargs["kernel_sizes"] = [[1 if p == min(what["patch"]) == 7 else 3 for p in what["patch"]], *[[3] * axes] * 2]
    residual = "n_blocks_per_stage" in kwargs
    kwargs["n_blocks_per_stage" if residual else "n_conv_per_stage"] = [1, 2, 2] if residual else [2, 2, 2]
    kwargs["n_conv_per_stage_decoder"] = [1, 1] if residual else [2, 1]
    if "3d_lowres" in what["configurations"]:
        low = {"inherits_from": "3d_fullres", "data_identifier": "low", "spacing": [1.5 * s for s in what["spacing"]]}
        plans["configurations"]["3d_lowres"] = low | {"next_stage": "3d_cascade_fullres"}
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    path.write_text(json.dumps(plans, indent=1))


def previous_labels(what: dict[str, Any], results: Path, preprocessed: Path) -> None:
    into = results / f"{what['trainer']}__{what['plans']}__3d_lowres" / "predicted_next_stage" / "3d_cascade_fullres"
    into.mkdir(parents=True, exist_ok=True)
    data = nnUNetDatasetBlosc2(str(preprocessed / f"{what['plans']}_3d_fullres"))
    for case in data.identifiers:
        labels = np.maximum(np.asarray(data.load_case(case)[1][:])[0], 0).astype(np.uint8)
        nnUNetDatasetBlosc2.save_seg(labels, str(into / case))


def main() -> None:
    """As above."""
    what = json.loads(Path(sys.argv[1]).read_text())
    os.environ["nnUNet_n_proc_DA"] = "1"  # noqa: SIM112
    number, plans = what["number"], what["plans"]
    preprocessed, results = Path(what["preprocessed"]), Path(what["results"])
    if not (preprocessed / f"{plans}.json").exists():  # what an earlier run made is not made again
        extract_fingerprints([number], num_processes=1)
        plan_experiments([number], what["planner"])
        shrink(what, preprocessed / f"{plans}.json")
        preprocess([number], plans, [c for c in what["configurations"] if "cascade" not in c], [1])
        if "3d_cascade_fullres" in what["configurations"]:
            preprocess([number], plans, ["3d_fullres"], [1])
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112 (in this process)
    shorten(getattr(lengths, what["trainer"]))
    previous = None
    for configuration in what["configurations"]:
        if configuration == "3d_cascade_fullres":
            previous_labels(what, results, preprocessed)
        trained = results / f"{what['trainer']}__{plans}__{configuration}"
        for fold in what["folds"]:
            if not (trained / f"fold_{fold}" / "checkpoint_final.pth").exists():
                run_training(str(number), configuration, fold, what["trainer"], plans, device=torch.device("cpu"))
        for name, mirrored in (("plain", False), ("mirrored", True), ("exact", False)):
            # nnU-Net adds its logits up in what it calls by this name.
            torch.half = torch.float32 if name == "exact" else torch.float16
            out = Path(what["predicted"]) / configuration / name
            out.mkdir(parents=True, exist_ok=True)
            predictor = nnUNetPredictor(use_mirroring=mirrored, device=torch.device("cpu"), allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(str(trained), what["folds"])
            predictor.predict_from_files_sequential(
                [what["scan"]], [str(out / "scan")], folder_with_segs_from_prev_stage=previous
            )
        previous = str(Path(what["predicted"]) / configuration / "plain")


if __name__ == "__main__":
    main()

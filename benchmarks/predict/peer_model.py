"""A model folder of nnU-Net v2 with random weights, for measuring speed. Run by the peer's python:

    PEER/bin/python benchmarks/predict/peer_model.py FOLDER --classes 25

One CT channel, the network of nnU-Net's default 3d_fullres plan (six stages, 32 to 320 features) with
the given patch and spacing (z, y, x), as its planner gives them.
"""

import argparse
import json
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=25, help="with the background")
    parser.add_argument("--patch", type=int, nargs=3, default=(128, 128, 128))
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.5, 1.5, 1.5))
    parser.add_argument("--channel", default="CT")
    options = parser.parse_args()
    stages = 1
    while stages < 6 and min(options.patch) / 2**stages >= 4 and all(p % 2**stages == 0 for p in options.patch):
        stages += 1
    kwargs = {
        "n_stages": stages,
        "features_per_stage": [min(32 * 2**i, 320) for i in range(stages)],
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin_kwargs": {"inplace": True},
    }
    torch.manual_seed(0)
    network = PlainConvUNet(
        input_channels=1,
        num_classes=options.classes,
        conv_op=nn.Conv3d,
        norm_op=nn.InstanceNorm3d,
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
        **kwargs,
    )
    modules = {
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "nonlin": "torch.nn.LeakyReLU",
    }
    resample = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(options.patch),
        "median_image_size_in_voxels": list(options.patch),
        "spacing": list(options.spacing),
        "normalization_schemes": ["CTNormalization" if options.channel == "CT" else "ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": resample,
        "resampling_fn_seg": resample,
        "resampling_fn_probabilities": resample,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": kwargs | modules,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    intensities = {
        "max": 1500.0, "mean": 80.0, "median": 75.0, "min": -1000.0,
        "percentile_00_5": -900.0, "percentile_99_5": 1200.0, "std": 130.0,
    }  # fmt: skip
    plans = {
        "dataset_name": "Dataset900_Speed",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(options.spacing),
        "original_median_shape_after_transp": list(options.patch),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }
    dataset = {
        "channel_names": {"0": options.channel},
        "labels": {"background": 0} | {f"structure_{i}": i for i in range(1, options.classes)},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    folder = options.folder / TRAINER
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    torch.save(
        {
            "network_weights": network.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": "3d_fullres", "fold": 0},
            "inference_allowed_mirroring_axes": (0, 1, 2),
        },
        folder / "fold_0" / "checkpoint_final.pth",
    )


if __name__ == "__main__":
    main()

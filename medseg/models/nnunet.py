"""A trained nnU-Net v2 model as a package that predicts the same labels.

What it does is said by its plans.json and dataset.json, which are read as data; a name in them is looked
up in the tables here, or refused. Its arrays run (z, y, x) and are then transposed; ours run as the file
has them, so that patch, spacing, kernels and weights are turned once, here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medseg.core.errors import InputError
from medseg.core.provenance import digest, versions
from medseg.io.files import read_json
from medseg.models.build import build
from medseg.models.checkpoint import Checkpoint, read_checkpoints
from medseg.models.package import ModelPackage
from medseg.plan.plan import Plan, parse_plan

if TYPE_CHECKING:
    from torch import Tensor

_ENTIRE = "Name the whole folder of one trained model: dataset.json, plans.json and fold_*/checkpoint_final.pth"
_NOT_YET = "Predict with nnU-Net, or train anew with medseg"
_CLASSES = {"PlainConvUNet": "nnunet-plain", "ResidualEncoderUNet": "nnunet-residual"}
_ORIENTATIONS = {
    "SimpleITKIO": "stored",
    "NibabelIO": "stored",
    "SimpleITKIOWithReorient": "ras",
    "NibabelIOWithReorient": "ras",
}
_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
_NORMALISATIONS = {
    "CTNormalization": "ct",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "unit",
    "RGBTo01Normalization": "rgb",
}
_PROPERTIES = {"low": "percentile_00_5", "high": "percentile_99_5", "mean": "mean", "std": "std"}
# Where the spacings of an image differ more than so many times, nnU-Net interpolates no slices.
_THICK = 3.0

Axes = tuple[int, int, int]
Count = Annotated[int, Field(ge=1, le=100_000)]
Counts = Count | list[Count]
M = TypeVar("M", bound=BaseModel)


class _Read(BaseModel):
    """What is used of a file of nnU-Net's; the rest is not looked at."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _Closed(BaseModel):
    """What must be understood to the last word."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Dataset(_Read):
    labels: dict[str, int | list[int]]
    channel_names: dict[str, str] = Field(min_length=1)
    regions_class_order: list[int] | None = None
    numTraining: int | None = None  # noqa: N815


class _Plans(_Read):
    dataset_name: str
    transpose_forward: list[int]
    image_reader_writer: str
    label_manager: str = "LabelManager"
    original_median_spacing_after_transp: list[float]
    configurations: dict[str, dict[str, Any]]
    foreground_intensity_properties_per_channel: dict[str, dict[str, float]]


class _Resampling(_Closed):
    """Cubic (1: linear) along every axis, or along two and the nearest slice."""

    is_seg: bool
    order: int
    order_z: Literal[0] = 0
    force_separate_z: Literal[False] | None = None


class _Norm(_Closed):
    eps: Annotated[float, Field(ge=1e-5, le=1e-5)] = 1e-5
    affine: Literal[True]


class _Layers(_Closed):
    """The arguments of nnU-Net's networks."""

    n_stages: Count
    features_per_stage: Counts
    conv_op: Literal["torch.nn.modules.conv.Conv2d", "torch.nn.modules.conv.Conv3d"]
    kernel_sizes: Count | list[Counts]
    strides: Count | list[Counts]
    n_conv_per_stage: Counts | None = None
    n_blocks_per_stage: Counts | None = None
    n_conv_per_stage_decoder: Counts
    conv_bias: bool = False
    norm_op: Literal["torch.nn.modules.instancenorm.InstanceNorm2d", "torch.nn.modules.instancenorm.InstanceNorm3d"]
    norm_op_kwargs: _Norm
    # Nothing is dropped out when predicting.
    dropout_op: str | None = None
    dropout_op_kwargs: dict[str, Any] | None = None
    nonlin: Literal["torch.nn.LeakyReLU"]
    nonlin_kwargs: dict[Literal["inplace"], bool] | None = None
    nonlin_first: Literal[False] = False
    stem_channels: Count | None = None


class _Architecture(_Read):
    network_class_name: str
    arch_kwargs: dict[str, Any]


class _Configuration(_Read):
    preprocessor_name: Literal["DefaultPreprocessor"]
    patch_size: list[Count] = Field(min_length=2, max_length=3)
    spacing: list[float] = Field(min_length=2, max_length=3)
    batch_size: Count = 2
    normalization_schemes: list[str]
    use_mask_for_norm: list[bool]
    resampling_fn_data: Literal["resample_data_or_seg_to_shape"]
    resampling_fn_seg: Literal["resample_data_or_seg_to_shape"]
    resampling_fn_probabilities: Literal["resample_data_or_seg_to_shape"]
    resampling_fn_data_kwargs: _Resampling
    resampling_fn_seg_kwargs: _Resampling
    resampling_fn_probabilities_kwargs: _Resampling
    architecture: _Architecture
    previous_stage: str | None = None


class Turn(NamedTuple):
    """``order[s]`` is the axis of nnU-Net's arrays that runs along the stored axis s; a 2D network has
    none of its own along ``flat``."""

    order: Axes
    flat: int | None

    def three(self, values: list[Any], flat: Any) -> list[Any]:
        """Numbers along nnU-Net's axes put along the stored ones; ``flat`` stands where a 2D network has none."""
        full = [flat, *values] if self.flat is not None else values
        return [full[axis] for axis in self.order]

    def stored(self, axis: int) -> int:
        """The stored axis of a network's axis."""
        return self.order.index(axis + (self.flat is not None))

    def weights(self, tensor: Tensor) -> Tensor:
        """A kernel (outs, ins, ...) with its axes as stored."""
        spatial = tensor.ndim - 2
        kept = [axis - (3 - spatial) for s, axis in enumerate(self.order) if spatial == 3 or s != self.flat]
        return tensor.permute(0, 1, *(2 + axis for axis in kept)).contiguous()


def import_nnunet(folder: Path, *, configuration: str | None = None, folds: tuple[str, ...] = ()) -> ModelPackage:
    """A package from a folder in which nnU-Net trained: one model, or several of which
    ``configuration`` names one. All folds become members, or those named.

    Raises InputError for what is missing, damaged or hostile, and for whatever nnU-Net can do that
    would not give the same labels here.
    """
    model = _choose(folder, configuration)
    return _package(model, folds)


def trained_models(folder: Path) -> list[Path]:
    """The folders of trained models at or below a folder, by their names."""
    below = [folder, *(p for depth in ("*", "*/*", "*/*/*") for p in sorted(folder.glob(depth)) if p.is_dir())]
    return [p for p in below if any(p.glob("fold_*")) and not p.name.startswith("fold_")]


def belongs(path: str) -> bool:
    """Whether a file of a zip is of use here."""
    return PurePosixPath(path).name in ("dataset.json", "plans.json", *_CHECKPOINTS)


def _choose(folder: Path, configuration: str | None) -> Path:
    models = trained_models(folder)
    if not models:
        raise InputError(f"{folder} holds no trained model: there is no fold_* in it", _ENTIRE)
    if configuration is not None:
        models = [m for m in models if _said(m) == configuration] or [m for m in models if len(models) == 1]
    if len(models) != 1:
        names = ", ".join(_said(m) for m in trained_models(folder))
        raise InputError(f"{folder.name} holds several models ({names})", "Name one with --configuration")
    return models[0]


def _said(model: Path) -> str:
    """The configuration by the folder's name, TRAINER__PLANS__CONFIGURATION."""
    return model.name.split("__")[-1]


def _package(model: Path, folds: tuple[str, ...]) -> ModelPackage:
    dataset = _parse(_Dataset, model / "dataset.json", _dataset_json)
    plans = _parse(_Plans, model / "plans.json", _plans_json)
    paths = _checkpoints(model, folds)
    checkpoints = read_checkpoints(paths)
    names = {c.configuration for c in checkpoints}
    if len(names) != 1:
        raise InputError(f"{model.name} mixes checkpoints of {', '.join(sorted(names))}", _ENTIRE)
    name = names.pop()
    own = _configuration(plans, name, model)
    turn = _turn(plans, own)
    plan = _plan(dataset, plans, own, name, turn, checkpoints[0].mirror, model)
    return ModelPackage(
        plan=plan,
        configuration_name=name,
        members=tuple(_member(c, plan, name, turn, model) for c in checkpoints),
        trained_on=(),
        held_out=(),
        previous=_previous(model, own.previous_stage, folds) if own.previous_stage else None,
        provenance={
            "imported": "nnU-Net v2",
            "model": model.name,
            "trainer": checkpoints[0].trainer,
            "training_cases": dataset.numTraining,
            "folds": {
                c.fold: hashlib.sha256(p.read_bytes()).hexdigest() for c, p in zip(checkpoints, paths, strict=True)
            },
            "checkpoint": paths[0].name,
            "versions": versions(),
        },
    )


def _previous(model: Path, stage: str, folds: tuple[str, ...]) -> ModelPackage:
    """The stage before in a cascade, whose folder lies beside this one's."""
    beside = model.with_name("__".join([*model.name.split("__")[:-1], stage]))
    if not beside.is_dir():
        raise InputError(
            f"{model.name} is the second stage of a cascade, and {beside.name} is not beside it",
            "Name a folder or zip that holds both, with --configuration for the second",
        )
    return _package(beside, folds)


# ---- files --------------------------------------------------------------------------------------


def _parse(kind: type[M], path: Path, mend: Any) -> M:
    if not path.is_file():
        raise InputError(f"{path.parent.name} has no {path.name}", _ENTIRE)
    value = read_json(path, _ENTIRE)
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not what nnU-Net writes", _ENTIRE)
    return _checked(kind, mend(value), path.name)


def _checked(kind: type[M], value: Any, where: str) -> M:
    try:
        return kind.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f" (it says {str(first['input'])[:80]!r})"
        raise InputError(f"{where}: {key}: {first['msg']}{given}", _NOT_YET) from None


def _dataset_json(value: dict[str, Any]) -> dict[str, Any]:
    return {"channel_names": value.get("modality"), **value}


def _plans_json(value: dict[str, Any]) -> dict[str, Any]:
    old = value.get("foreground_intensity_properties_by_modality")
    return {"foreground_intensity_properties_per_channel": old, **value}


def _checkpoints(model: Path, folds: tuple[str, ...]) -> list[Path]:
    """One file for each fold: the final one, or where no fold has that, the best one."""
    there = {p.name.removeprefix("fold_"): p for p in sorted(model.glob("fold_*")) if p.is_dir()}
    # What was trained on all cases is no member of an ensemble of folds.
    wanted = folds or tuple(name for name in there if name != "all") or ("all",)
    for fold in wanted:
        if fold not in there:
            raise InputError(f"{model.name} has no fold {fold}; it has {', '.join(there)}", "Name others with --fold")
    for name in _CHECKPOINTS:
        paths = [there[fold] / name for fold in wanted]
        missing = [p.parent.name for p in paths if not p.is_file()]
        if not missing:
            return paths
        if len(missing) < len(paths):
            break
    raise InputError(
        f"{model.name}: {', '.join(missing)} has no {name}", "Finish its training, or name the other folds with --fold"
    )


def _configuration(plans: _Plans, name: str, model: Path) -> _Configuration:
    values: dict[str, Any] = {}
    seen: list[str] = []
    parent: Any = name
    while parent is not None:
        if not isinstance(parent, str) or parent not in plans.configurations or parent in seen:
            raise InputError(f"plans.json of {model.name} has no configuration {parent!r} to use", _ENTIRE)
        seen.append(parent)
        values = plans.configurations[parent] | values
        parent = plans.configurations[parent].get("inherits_from")
    return _checked(_Configuration, _with_architecture(values), f"plans.json: {name}")


def _with_architecture(values: dict[str, Any]) -> dict[str, Any]:
    """Plans before nnU-Net 2.4 described the network in keys of its own."""
    if "architecture" in values or "UNet_class_name" not in values:
        return values
    stages = len(values.get("n_conv_per_stage_encoder", ()))
    base, most = values.get("UNet_base_num_features"), values.get("unet_max_num_features")
    dimensions = len(values.get("patch_size", ()))
    plain = values["UNet_class_name"] == "PlainConvUNet"
    if not isinstance(base, int) or not isinstance(most, int):
        return values
    layers = {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**i, most) for i in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": values.get("conv_kernel_sizes"),
        "strides": values.get("pool_op_kernel_sizes"),
        "n_conv_per_stage" if plain else "n_blocks_per_stage": values.get("n_conv_per_stage_encoder"),
        "n_conv_per_stage_decoder": values.get("n_conv_per_stage_decoder"),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
    }
    return values | {"architecture": {"network_class_name": values["UNet_class_name"], "arch_kwargs": layers}}


# ---- the plan -----------------------------------------------------------------------------------


def _turn(plans: _Plans, own: _Configuration) -> Turn:
    if sorted(plans.transpose_forward) != [0, 1, 2]:
        raise InputError(f"plans.json: transpose_forward is {plans.transpose_forward}", _ENTIRE)
    # nnU-Net's axis a is axis t[a] of an array that runs (z, y, x), which is the stored axis 2 - t[a].
    stored = [2 - t for t in plans.transpose_forward]
    return Turn((stored.index(0), stored.index(1), stored.index(2)), stored[0] if len(own.patch_size) == 2 else None)


def _plan(
    dataset: _Dataset, plans: _Plans, own: _Configuration, name: str, turn: Turn, mirror: tuple[int, ...], model: Path
) -> Plan:
    where = f"plans.json of {model.name}"
    if plans.label_manager != "LabelManager":
        raise InputError(f"{where} names the label manager {plans.label_manager[:80]!r}", _NOT_YET)
    reader = plans.image_reader_writer
    if reader not in _ORIENTATIONS:
        raise InputError(f"{where} reads images with {reader[:80]!r}", _NOT_YET)
    labels, regions = _labels(dataset)
    reason = "as nnU-Net planned it"
    usual = "nnU-Net's default; the model does not say"
    value = {
        "task": plans.dataset_name,
        "channels": _channels(dataset),
        "labels": labels,
        "normalisation": {"value": _normalisations(dataset, plans, own, where), "reason": reason},
        "configurations": {
            name: {
                "dimensions": len(own.patch_size),
                "slice_axis": turn.flat,
                "spacing": {
                    "value": turn.three(own.spacing, plans.original_median_spacing_after_transp[0]),
                    "reason": reason,
                },
                "patch": {"value": turn.three(own.patch_size, 1), "reason": reason},
                "batch": {"value": own.batch_size, "reason": reason},
                "network": {"value": _network(own, turn, where), "reason": reason},
                "orientation": _ORIENTATIONS[reader],
                "grid": "shape",
                "thick": _thick(own, where),
                "previous": own.previous_stage,
            }
        },
        "training": {
            "learning_rate": {"value": 0.01, "reason": usual},
            "weight_decay": {"value": 3e-5, "reason": usual},
            "foreground_share": {"value": 0.33, "reason": usual},
            "augmentation": {
                "value": {"mirror": sorted(turn.stored(axis) for axis in mirror)},
                "reason": "mirrored as the model was; the rest is medseg's",
            },
        },
        "fingerprint": digest([plans.model_dump(mode="json"), dataset.model_dump(mode="json")]),
        "regions": regions,
    }
    return parse_plan(value, model.name)


def _channels(dataset: _Dataset) -> list[str]:
    names = [dataset.channel_names[key] for key in sorted(dataset.channel_names, key=_number)]
    often = Counter(names)
    return [f"{name} {i}" if often[name] > 1 else name for i, name in enumerate(names)]


def _number(key: str) -> int:
    if not re.fullmatch(r"\d{1,6}", key):
        raise InputError(f"dataset.json numbers a channel {key[:20]!r}", _ENTIRE)
    return int(key)


def _labels(dataset: _Dataset) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Labels, and where they overlap the regions that the network's outputs stand for."""
    given = {name: value for name, value in dataset.labels.items() if name != "ignore" and value not in (0, [0])}
    if not given:
        raise InputError("dataset.json names no label", _ENTIRE)
    if any(isinstance(value, list) and len(value) > 1 for value in given.values()):
        return _regions(given, dataset.regions_class_order)
    flat = {name: value[0] if isinstance(value, list) else value for name, value in given.items()}
    if sorted(flat.values()) != list(range(1, len(flat) + 1)):
        raise InputError(f"dataset.json numbers the labels {sorted(flat.values())}", "They must be 1, 2, 3 and so on")
    return [{"name": name, "number": number} for name, number in sorted(flat.items(), key=lambda one: one[1])], []


def _regions(
    given: dict[str, int | list[int]], order: list[int] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if order is None or len(order) != len(given):
        raise InputError("dataset.json has regions, and no regions_class_order that fits them", _ENTIRE)
    sets = [set(value) if isinstance(value, list) else {value} for value in given.values()]
    regions = [
        {"name": name, "labels": sorted(labels), "number": number}
        for name, labels, number in zip(given, sets, order, strict=True)
    ]
    labels = {}
    for i, (region, number) in enumerate(zip(regions, order, strict=True)):
        # What later regions paint over is no longer the whole of it.
        whole = all(sets[i].isdisjoint(later) for later in sets[i + 1 :])
        labels[number] = region["name"] if whole else f"{region['name']} (rest)"
    return [{"name": labels[number], "number": number} for number in sorted(labels)], regions


def _normalisations(dataset: _Dataset, plans: _Plans, own: _Configuration, where: str) -> list[dict[str, Any]]:
    names = _channels(dataset)
    if not len(names) == len(own.normalization_schemes) == len(own.use_mask_for_norm):
        raise InputError(f"{where} has another number of channels than dataset.json", _ENTIRE)
    rules = []
    for i, (name, scheme) in enumerate(zip(names, own.normalization_schemes, strict=True)):
        rule: dict[str, Any] = {"channel": name}
        if scheme == "ZScoreNormalization":
            rule["kind"] = "zscore-mask" if own.use_mask_for_norm[i] else "zscore-whole"
        elif scheme in _NORMALISATIONS:
            rule["kind"] = _NORMALISATIONS[scheme]
        else:
            raise InputError(f"{where} normalises by {scheme[:80]!r}", _NOT_YET)
        if rule["kind"] == "ct":
            measured = plans.foreground_intensity_properties_per_channel.get(str(i), {})
            rule |= {ours: measured.get(theirs) for ours, theirs in _PROPERTIES.items()}
        rules.append(rule)
    return rules


def _thick(own: _Configuration, where: str) -> float | None:
    wanted = (
        (own.resampling_fn_data_kwargs, 3, False),
        (own.resampling_fn_probabilities_kwargs, 1, False),
        (own.resampling_fn_seg_kwargs, 1, True),
    )
    forced = {kwargs.force_separate_z for kwargs, _, _ in wanted}
    if any((k.order, k.is_seg) != (order, is_seg) for k, order, is_seg in wanted) or len(forced) != 1:
        raise InputError(f"{where} resamples in an unusual way", _NOT_YET)
    return _THICK if None in forced else None


# ---- the network --------------------------------------------------------------------------------


def _network(own: _Configuration, turn: Turn, where: str) -> dict[str, Any]:
    kind = own.architecture.network_class_name.split(".")[-1]
    if kind not in _CLASSES:
        raise InputError(f"{where} has a network of the kind {kind[:80]!r}", _NOT_YET)
    layers = _checked(_Layers, own.architecture.arch_kwargs, f"{where}: architecture")
    stages, axes = layers.n_stages, len(own.patch_size)
    blocks = layers.n_blocks_per_stage if kind == "ResidualEncoderUNet" else layers.n_conv_per_stage
    if blocks is None or layers.conv_op[-2:] != f"{axes}d":
        raise InputError(f"{where} has a network of unusual layers", _NOT_YET)
    features = _each(layers.features_per_stage, stages, where)
    return {
        "family": _CLASSES[kind],
        "features": features,
        "kernels": [turn.three(_each(k, axes, where), 1) for k in _each(layers.kernel_sizes, stages, where)],
        "strides": [turn.three(_each(s, axes, where), 1) for s in _each(layers.strides, stages, where)],
        "blocks": _each(blocks, stages, where),
        "decoder_blocks": _each(layers.n_conv_per_stage_decoder, stages - 1, where),
        "stem": (layers.stem_channels or features[0]) if kind == "ResidualEncoderUNet" else None,
        "bias": layers.conv_bias,
    }


def _each(value: Any, count: int, where: str) -> list[Any]:
    """One entry each, where nnU-Net may also write one for all."""
    values = list(value) if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise InputError(f"{where} lists {len(values)} of what the network has {count}", _ENTIRE)
    return values


def _member(checkpoint: Checkpoint, plan: Plan, name: str, turn: Turn, model: Path) -> dict[str, Tensor]:
    """The weights under medseg's names, checked against the network that the plan describes."""
    import torch

    configuration = plan.configuration(name)
    last = len(configuration.network.value.features) - 2
    weights = {}
    for theirs, tensor in checkpoint.weights.items():
        ours = _renamed(theirs, last)
        if ours:
            weights[ours] = turn.weights(tensor) if tensor.ndim > 2 else tensor
    with torch.device("meta"):
        expected = build(configuration, plan.inputs(configuration), plan.outputs).state_dict()
    misfit = sorted(k for k in expected.keys() | weights.keys() if _shape(expected, k) != _shape(weights, k))
    if misfit:
        raise InputError(
            f"{model.name}: the weights of fold {checkpoint.fold} do not fit the network in plans.json "
            f"({len(misfit)} differ, the first is {misfit[0][:80]})",
            "Was it trained by a trainer of its own? medseg imports nnU-Net's plain and residual-encoder networks",
        )
    return weights


def _shape(weights: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None


def _renamed(name: str, last: int) -> str | None:
    """medseg's name for a tensor of nnU-Net's; None for the outputs that only training uses. A name
    that fits nothing stays, and is found not to fit."""
    for pattern, ours in (
        (r"encoder\.stem\.convs\.0\.(.+)", r"stem.\1"),
        (r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.(.+)", r"encoder.\1.\2.\3"),
        (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.[01]\.(.+)", r"encoder.\1.\2.skip.\3"),
        (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(.+)", r"encoder.\1.\2.\3"),
        (r"decoder\.transpconvs\.(\d+)\.(.+)", r"up.\1.\2"),
        (r"decoder\.stages\.(\d+)\.convs\.(\d+)\.(.+)", r"decoder.\1.\2.\3"),
        (rf"decoder\.seg_layers\.{last}\.(.+)", r"output_block.\1"),
    ):
        if found := re.fullmatch(pattern, name):
            return found.expand(ours)
    return None if re.fullmatch(r"decoder\.seg_layers\.\d+\.(weight|bias)", name) else name

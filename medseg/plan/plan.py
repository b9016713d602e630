"""What was decided, each with its reason. A person may edit the file; it is checked when read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medseg.core.errors import InputError
from medseg.core.labels import Label, LabelSet
from medseg.core.provenance import digest
from medseg.io.files import read_json, write_json
from medseg.plan.families import FAMILIES, fault

T = TypeVar("T")
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Steps = Annotated[int, Field(ge=1, le=100_000_000)]
Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Three = tuple[Count, Count, Count]
# Steps of an "epoch", unless a plan says otherwise.
STEPS_PER_EPOCH = 50


def _unless(default: Any) -> Any:
    """A field that is written only where it differs from its default, so that plans that never heard
    of it keep their text and digest."""
    return Field(default=default, exclude_if=lambda value: value == default)


class Strict(BaseModel):
    """Frozen, and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Decision(Strict, Generic[T]):
    """A value, and why it was chosen."""

    value: T
    reason: str = ""


class LabelEntry(Strict):
    """A `Label` in a file."""

    name: str
    number: Annotated[int, Field(ge=1, le=65_535)]
    code: str | None = None


class Normalisation(Strict):
    """How one channel's intensities become numbers near zero.

    ``ct``: clip to [low, high] HU, subtract ``mean``, divide by ``std``, all measured on the
    training set's foreground. ``zscore``: per case, over its non-zero voxels, clipped to their
    0.5 and 99.5 percentiles.

    Those of imported models, per case and over the box that holds what is not zero:
    ``zscore-whole``: mean 0, deviation 1, nothing clipped. ``zscore-mask``: the same within the voxels
    that are not zero in some channel, holes filled; the others stay. ``unit``: lowest 0, highest 1.
    ``rgb``: divided by 255. ``none``: as they are.
    """

    channel: str
    kind: Literal["ct", "zscore", "zscore-whole", "zscore-mask", "unit", "rgb", "none"]
    low: Finite | None = None
    high: Finite | None = None
    mean: Finite | None = None
    std: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _ct_needs_numbers(self) -> Normalisation:
        if self.kind == "ct" and None in (self.low, self.high, self.mean, self.std):
            raise ValueError("ct needs low, high, mean and std")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Network(Strict):
    """A network of one of the `medseg.plan.families`: per stage, from full resolution down, its features,
    kernel and stride, on the three voxel axes (a 2D network has kernel and stride 1 along ``slice_axis``).
    A stage of ``deeplab`` that does not stride is dilated instead.

    ``fused``: of how many of its stages, from the coarsest, ``fcn`` adds up the answers, three unless said: of
    a network that halves five times 1 makes its authors' FCN-32s, 2 FCN-16s and 3 FCN-8s.
    The families of imported models also say how many convolutions (``nnunet-plain``) or residual
    blocks (``nnunet-residual``) a stage has, how many convolutions follow each step up (deepest
    first), and the features of the convolution before the first residual stage.
    """

    family: str = "unet"
    features: tuple[Count, ...]
    kernels: tuple[Three, ...]
    strides: tuple[Three, ...]
    blocks: tuple[Count, ...] = _unless(())
    decoder_blocks: tuple[Count, ...] = _unless(())
    stem: Count | None = _unless(None)
    bias: bool = _unless(True)
    fused: Literal[1, 2, 3] | None = _unless(None)

    @field_validator("family")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FAMILIES:
            raise ValueError(f"there is no family {name!r}; there are {', '.join(FAMILIES)}")
        return name

    @model_validator(mode="after")
    def _one_each(self) -> Network:
        if not len(self.features) == len(self.kernels) == len(self.strides):
            raise ValueError("features, kernels and strides need one entry per stage")
        if len(self.features) < 2 or self.strides[0] != (1, 1, 1):
            raise ValueError("a network has two stages or more, the first with stride 1")
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            if any(k % 2 == 0 or s > k + 1 for k, s in zip(kernel, stride, strict=True)):
                raise ValueError(
                    f"kernel {kernel} with stride {stride}: kernels are odd, strides no longer than them + 1"
                )
        counts = (0, 0) if FAMILIES[self.family].trained else (len(self.features), len(self.features) - 1)
        if (len(self.blocks), len(self.decoder_blocks)) != counts:
            raise ValueError(f"{self.family} has {counts[0]} entries in blocks and {counts[1]} in decoder_blocks")
        if (self.stem is not None) != (self.family == "nnunet-residual"):
            raise ValueError("nnunet-residual, and only that, has a stem")
        if self.fused is not None and self.family != "fcn":
            raise ValueError("fcn, and only that, says how many stages are fused")
        return self

    @property
    def counts(self) -> bool:
        """Whether it tells things of one label from each other."""
        return FAMILIES[self.family].counts

    @property
    def divisor(self) -> Three:
        """What a patch must be a multiple of, per axis."""
        product = [1, 1, 1]
        for stride in self.strides:
            product = [p * s for p, s in zip(product, stride, strict=True)]
        return product[0], product[1], product[2]


class Cost(Strict):
    """What training one fold takes; no decision, and not in the plan's digest.

    ``memory_bytes``: what the network, its average, the optimiser and all that a step keeps hold on
    the device. ``ram_bytes``: the whole process, which on a processor holds those too.
    ``disk_bytes``: the preprocessed cases. ``seconds_per_step`` and ``hours`` (in all, with start,
    validation, calibration and the comparison of engines). ``measured_on`` and ``threads``: where a step was
    timed; None where none was, and the figures are reckoned.
    """

    seconds_per_step: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    memory_bytes: Annotated[int, Field(ge=0)]
    ram_bytes: Annotated[int, Field(ge=0)]
    disk_bytes: Annotated[int, Field(ge=0)]
    hours: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    measured_on: str | None = None
    threads: Count | None = None


class Watching(Strict):
    """How a run looks at what it learns: ``times``, evenly spread and the last at its end, it predicts so
    many held-out ``cases``; with 0 of either it shows its loss only. Once trained it is calibrated on
    ``calibrated`` of them, with 0 not at all. Where there are fewer, on those that there are. Each engine is
    then compared with torch on so many tiles (``compared``). All is counted and nothing timed, so that a run that
    is repeated comes to the same."""

    times: Annotated[int, Field(ge=0, le=1000)] = 10
    cases: Annotated[int, Field(ge=0, le=1000)] = 8
    calibrated: Annotated[int, Field(ge=0, le=1000)] = 50
    compared: Annotated[int, Field(ge=1, le=6)] = 6


class Configuration(Strict):
    """One way to train on the task: ``spacing`` in mm and ``patch`` in voxels along x, y, z, and how
    many ``steps`` training takes: of each of its ``members``, networks that differ by how they begin and
    what they see when, one unless said; their mean is the model. ``watching`` is as `Watching` has it
    by itself where a plan does not say. In 2D the patch is one voxel thick along ``slice_axis``. Imported
    models have no steps: they are not trained here. ``previous`` names the stage whose labels, one
    channel each, are added to the scan's channels; of a plan to train by it is another configuration.

    How imported models differ: ``orientation`` "stored" takes the axes as the file has them, whatever
    way they run, and spacing and patch are along those. ``grid`` "shape" rounds the number of voxels
    and stretches them over the field of view exactly; in 2D each scan keeps its own spacing along
    ``slice_axis``. ``thick``: where the largest spacing, before or after, is more than so many times
    the smallest, that axis takes the nearest slice.
    """

    dimensions: Literal[2, 3]
    slice_axis: Literal[0, 1, 2] | None = None
    spacing: Decision[tuple[Millimetres, Millimetres, Millimetres]]
    patch: Decision[Three]
    batch: Decision[Count]
    network: Decision[Network]
    steps: Decision[Steps] | None = _unless(None)
    members: Decision[Annotated[int, Field(ge=1, le=32)]] | None = _unless(None)
    watching: Decision[Watching] | None = _unless(None)
    cost: Cost | None = _unless(None)
    orientation: Literal["ras", "stored"] = _unless("ras")
    grid: Literal["spacing", "shape"] = _unless("spacing")
    thick: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = _unless(None)
    previous: str | None = _unless(None)

    @model_validator(mode="after")
    def _patch_fits(self) -> Configuration:
        patch, network = self.patch.value, self.network.value
        if any(p % d for p, d in zip(patch, network.divisor, strict=True)):
            raise ValueError(f"patch {patch} is no multiple of the strides' product {network.divisor}")
        if (self.dimensions == 2) != (self.slice_axis is not None):
            raise ValueError("a 2D configuration, and only that, needs slice_axis")
        flat = self.slice_axis
        if flat is not None and patch[flat] != 1:
            raise ValueError(f"a 2D patch is one voxel thick along axis {flat}")
        if flat is not None and any(kernel[flat] != 1 for kernel in network.kernels):
            raise ValueError(f"a 2D network has kernels of 1 along axis {flat}")
        seen = [axis for axis in range(3) if axis != flat]
        if found := fault(network.family, network.kernels, network.strides, seen):
            raise ValueError(found)
        if patch == network.divisor:
            raise ValueError(f"the strides bring the patch {patch} down to a single voxel, which has no variance")
        return self


class Augmentation(Strict):
    """How far training patches are varied. ``mirror`` lists the axes (0 x, 1 y, 2 z) to flip.

    A share is the probability that a patch (or, of blur and low resolution, one of its channels) is
    varied so. ``elastic`` is how far the points of a grid are moved, as a share of the 16 voxels that
    lie between them: below 0.4 nothing folds. ``contrast`` is about the patch's mean. ``blur`` is the
    largest standard deviation and ``low_resolution`` the largest enlargement of voxels, both in voxels
    of the finest axis. ``channel_dropout``: how often each optional channel is missing.
    ``domain_randomisation`` is for models that must travel to other scanners and sequences: everything
    far stronger, random contrast curves, a brightness of its own for each structure and a bias field.
    """

    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 15.0
    scaling: Annotated[float, Field(ge=0, lt=0.9)] = 0.2
    spatial_share: Share = 0.5
    intensity: Annotated[float, Field(ge=0, lt=1)] = 0.2
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.3
    noise: Annotated[float, Field(ge=0, le=2)] = 0.1
    mirror: tuple[Literal[0, 1, 2], ...] = ()
    elastic: Annotated[float, Field(ge=0, le=0.4)] = _unless(0.2)
    elastic_share: Share = _unless(0.0)
    contrast: Annotated[float, Field(ge=0, lt=1)] = _unless(0.0)
    blur: Annotated[float, Field(ge=0, le=8)] = _unless(1.0)
    blur_share: Share = _unless(0.0)
    low_resolution: Annotated[float, Field(ge=1, le=16)] = _unless(2.0)
    low_resolution_share: Share = _unless(0.0)
    channel_dropout: Share = _unless(0.25)
    domain_randomisation: bool = _unless(False)


class Training(Strict):
    """How to train, whatever the configuration. An "epoch" of ``steps_per_epoch`` is how often a run
    writes down how it stands; how long it takes is in each configuration's ``steps``.

    ``class_share``: of the patches that are centred on a structure, so many draw the structure first
    and then a case that has it, so that one in a case of a hundred is seen as often as any. ``loss``
    names one of `medseg.train.loss`. ``optimiser``: AdamW, or SGD with Nesterov's momentum of 0.99 as nnU-Net
    has it, which wants a rate of its own (nnU-Net's is 0.01). Voxels with the number ``ignore_label``
    count for nothing. ``compile``: by torch.compile, which needs a C++ compiler and a minute before the
    first step; for GPUs, as it makes a processor slower.

    Two ways to learn from scans without labels, those that the task lists under ``test``.
    ``pretraining``: before a run, and for so many times its steps, the network learns to fill in what is
    hidden of a scan. ``consistency``: beside the labelled patches of each step come as many unlabelled
    ones, of which it is to say what the average of its weights, a mean teacher, says; the difference
    weighs so much at the most.
    """

    learning_rate: Decision[Annotated[float, Field(gt=0, lt=1)]]
    weight_decay: Decision[Annotated[float, Field(ge=0, lt=1)]]
    foreground_share: Decision[Share]
    augmentation: Decision[Augmentation]
    steps_per_epoch: Count = STEPS_PER_EPOCH
    class_share: Share = _unless(0.5)
    loss: Literal["dice-cross-entropy", "dice", "cross-entropy", "dice-focal", "tversky", "dice-boundary"] = _unless(
        "dice-cross-entropy"
    )
    optimiser: Literal["adamw", "sgd"] = _unless("adamw")
    compile: bool = _unless(False)
    ignore_label: Annotated[int, Field(ge=1, le=65_535)] | None = _unless(None)
    pretraining: Decision[Annotated[float, Field(gt=0, le=100)]] | None = _unless(None)
    consistency: Decision[Annotated[float, Field(gt=0, le=1000)]] | None = _unless(None)

    @property
    def wants_unlabelled(self) -> bool:
        """Whether it learns from scans without labels too."""
        return self.pretraining is not None or self.consistency is not None


class Region(Strict):
    """What one output of a network of overlapping regions stands for: the labels that it covers, and
    the label ``number`` that is painted where its logit is above 0."""

    name: str
    labels: Annotated[tuple[Count, ...], Field(min_length=1)]
    number: Annotated[int, Field(ge=1, le=65_535)]


class Plan(Strict):
    """Everything a run needs to know besides paths, device and seed.

    ``optional_channels`` may be missing at prediction, and are then as if they held their mean
    throughout. They may not be the first. Training leaves them out now and then, as
    `Augmentation.channel_dropout` has it; an imported model's may not have.

    With ``regions`` the network has one output for each, painted in their order, the later over the
    earlier.
    """

    format: Literal[2] = 2
    task: str
    channels: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: Annotated[tuple[LabelEntry, ...], Field(min_length=1)]
    optional_channels: Decision[tuple[str, ...]] = Decision(value=())
    normalisation: Decision[tuple[Normalisation, ...]]
    configurations: Annotated[dict[str, Configuration], Field(min_length=1)]
    training: Training
    fingerprint: str
    regions: tuple[Region, ...] = _unless(())

    @model_validator(mode="after")
    def _channels_and_labels_agree(self) -> Plan:
        if [n.channel for n in self.normalisation.value] != list(self.channels):
            raise ValueError("normalisation needs one entry per channel, in their order")
        if strange := set(self.optional_channels.value) - set(self.channels[1:]):
            raise ValueError(
                f"{sorted(strange)[0]!r} cannot be an optional channel: they are among {', '.join(self.channels[1:])}; "
                "the first is needed, since results lie on its grid"
                if len(self.channels) > 1
                else "the only channel cannot be optional"
            )
        try:
            _ = self.label_set
        except InputError as error:
            raise ValueError(error.fault) from None
        kinds = {n.kind for n in self.normalisation.value} - {"ct", "zscore"}
        if kinds and any(c.grid != "shape" for c in self.configurations.values()):
            raise ValueError(f"normalisation {', '.join(sorted(kinds))} goes with the grid 'shape'")
        if unknown := {r.number for r in self.regions} - set(self.label_set.numbers):
            raise ValueError(f"regions are painted as {sorted(unknown)}, which no label has")
        if self.training.ignore_label in self.label_set.numbers:
            raise ValueError(f"label {self.training.ignore_label} cannot be both learnt and ignored")
        for name, one in self.configurations.items():
            before = self.configurations.get(one.previous or "")
            if before is not None and before.previous is not None:
                raise ValueError(f"{name} comes after {one.previous}, which comes after another: two stages are enough")
        return self

    @property
    def label_set(self) -> LabelSet:
        return LabelSet(tuple(Label(e.name, e.number, e.code) for e in self.labels))

    @property
    def outputs(self) -> int:
        """How many logits the network gives per voxel: one a label and the background, or one a region."""
        return len(self.regions) or len(self.labels) + 1

    @property
    def painted(self) -> tuple[int, ...] | None:
        """For each region the class that it paints: 1 is the first label. None without regions."""
        return tuple(1 + self.label_set.numbers.index(r.number) for r in self.regions) or None

    def inputs(self, configuration: Configuration) -> int:
        """How many channels the network takes."""
        return len(self.channels) + (len(self.labels) if configuration.previous else 0)

    def configuration(self, name: str) -> Configuration:
        """A configuration by name; InputError where the plan has none of it."""
        if name not in self.configurations:
            raise InputError(
                f"the plan of {self.task} has no configuration {name!r}", f"It has {', '.join(self.configurations)}"
            )
        return self.configurations[name]

    def digest(self, *, members: bool = True) -> str:
        """SHA-256 of what the plan decides; reasons and costs do not count, nor, where they are not to,
        how many members a model has."""
        aside = {"cost"} if members else {"cost", "members"}
        return digest(_without_reasons(self.model_dump(mode="json", exclude={"configurations": {"__all__": aside}})))

    def preparation(self, name: str) -> str:
        """SHA-256 of what preprocessed cases of a configuration stand on: plans that only train in another
        way can share them."""
        configuration = self.configuration(name).model_dump(
            mode="json", include={"spacing", "orientation", "grid", "thick", "slice_axis", "previous"}
        )
        shared = self.model_dump(mode="json", include={"channels", "labels", "optional_channels", "normalisation"})
        # Written where it is so, that those of other families are known as they were.
        counts = self.configuration(name).network.value.counts
        things = {"things": True} if counts else {}
        return digest(_without_reasons({**shared, **things, "configuration": configuration}))

    @property
    def thing_step(self) -> int:
        """Above all labels that a case may hold. By it the stored labels of cases whose instances are known are
        numbered (`medseg.core.instances.numbered`) where the network counts."""
        return max(*self.label_set.numbers, self.training.ignore_label or 0) + 1


def _without_reasons(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_reasons(v) for k, v in value.items() if k != "reason" or "value" not in value}
    return [_without_reasons(v) for v in value] if isinstance(value, list) else value


def parse_plan(value: Any, where: str) -> Plan:
    """A plan from what JSON held; InputError naming the first thing that is wrong. One of format 1 is
    brought to this one."""
    value = _from_format_1(value)
    if isinstance(value, dict) and isinstance(value.get("training"), dict) and "epochs" in value["training"]:
        raise InputError(
            f"{where} is no sound plan: training.epochs: a run's length is in configurations.NAME.steps",
            "Take it out, or plan anew",
        )
    try:
        # By way of JSON, since strictness without it would want tuples where JSON has lists.
        return Plan.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise InputError(f"{where} is no sound plan: {key}: {first['msg']}", "Correct it, or plan anew") from None


def _from_format_1(value: Any) -> Any:
    """A plan of format 1 had epochs, which come to steps; models that were imported were not trained."""
    if not isinstance(value, dict) or type(value.get("format")) is not int or value["format"] != 1:
        return value
    value = json.loads(json.dumps(value))
    # One that is no sound plan of any format is left to the check of the whole.
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        training, value["format"] = value["training"], 2
        epochs = training.pop("epochs")["value"]
        steps = {"value": epochs * training.get("steps_per_epoch", STEPS_PER_EPOCH), "reason": f"{epochs} epochs"}
        for configuration in value["configurations"].values():
            if configuration.get("grid", "spacing") == "spacing":
                configuration["steps"] = steps
    return value


def read_plan(path: Path, *, inherit: bool = True) -> Plan:
    """The plan in a file. Raises InputError where it is missing, of another format or edited amiss.

    A file may name another by ``inherits`` (a path, from its own folder on) and say only what differs:
    objects are merged key by key, anything else takes the other's place. What is said of a decision
    needs a reason of its own, and a configuration that is changed loses its cost. InputError where the
    other is missing or inherits from this one. A file from elsewhere is read without (``inherit``).
    """
    found = read_json(path, "Make it with `medseg plan`")
    return parse_plan(_inherited(found, path, ()) if inherit else found, str(path))


def _inherited(value: Any, path: Path, heirs: tuple[Path, ...]) -> Any:
    """What a plan's file comes to with all that it inherits; ``heirs`` led to it."""
    if not isinstance(value, dict) or "inherits" not in value:
        return value
    said = value["inherits"]
    if not isinstance(said, str) or not said:
        raise InputError(f"{path} is no sound plan: inherits: {said!r} is no path", "Name another plan.json")
    here = (*heirs, path.resolve())
    base = (path.parent / said).resolve()
    if base in here:
        raise InputError(f"{path} is no sound plan: inherits: {said} inherits from it", "Let one stand by itself")
    other = read_json(base, f"It is what {path} inherits from: correct `inherits` there")
    other = _from_format_1(_inherited(other, base, here))
    if not isinstance(other, dict):
        raise InputError(f"{path} is no sound plan: inherits: {said} holds no plan", "Name another plan.json")
    return _merged(other, {k: v for k, v in value.items() if k != "inherits"})


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        under = base.get(key)
        merged[key] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    if "value" in changes and "value" in base:
        merged["reason"] = changes.get("reason", "changed by hand")
    elif "patch" in base and "cost" not in changes:
        merged.pop("cost", None)
    return merged


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as JSON. Atomic."""
    write_json(path, plan.model_dump(mode="json"))

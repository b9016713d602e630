"""Fingerprint in, plan out. The rules follow nnU-Net (Isensee et al., Nature Methods 2021), with patch,
width and length fitted to the memory and the time that there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.labels import LabelSet
from medseg.plan.cost import Meter
from medseg.plan.families import FAMILIES, Family, leading, require_family
from medseg.plan.fingerprint import Fingerprint
from medseg.plan.mirror import Axes, mirrored
from medseg.plan.plan import (
    Augmentation,
    Configuration,
    Decision,
    LabelEntry,
    Network,
    Normalisation,
    Plan,
    Region,
    Three,
    Training,
)
from medseg.plan.scale import SIZES, Chooser, Size, Target

# Slices this much farther apart than pixels make a volume anisotropic (as in nnU-Net).
_ANISOTROPIC = 3.0
# The coarsest feature map keeps at least this many voxels along each axis.
_COARSEST = 4
_MOST_STAGES = 6
# A patch that holds less than this share of a typical case sees too little around it: the same is
# planned at low resolution too, where that has at most half the voxels (both as in nnU-Net).
_SEEN = 0.25
_COARSER = 1.03
# In shorter runs patches are varied slightly. On Task04 a thousand steps gave 0.880 so and 0.868 with stronger
# turning, scaling and bending; where that turns is a rule of thumb.
_LONG = 10_000
_SLIGHT: dict[str, Any] = {
    "rotation_degrees": 10.0, "scaling": 0.15, "spatial_share": 0.3, "intensity": 0.1, "gamma": 0.2, "noise": 0.05,
}  # fmt: skip
# A patch that holds so much of a small case keeps its shape, and where that is so much longer than wide it is
# as long as the case until it holds less than such a share of its width: on Task04 a thousand steps of patches as
# long as the case gave 0.868, of nearly cubes 0.861, and three thousand of 24x56x32 gave 0.885, of 32x48x32 0.881
# (benchmarks/train).
_PART = 0.4
_LONG_CASE = 1.25
_WIDTH = 0.6
# The last two only where scans are much larger than a patch.
_LOW, _CASCADE = "3d-low", "3d-cascade"
_NAMES = ("3d", "2d", _LOW, _CASCADE)


def plan(
    measured: Fingerprint,
    labels: LabelSet,
    target: Target | None = None,
    *,
    meter: Meter | None = None,
    optional_channels: Sequence[str] = (),
    family: str = "unet",
) -> Plan:
    """Decide how to train a network of a ``family`` on a task, and say why.

    ``meter`` measures a step of a candidate on the machine that the plan is for; without one time and
    memory are reckoned, and the plan says so. ``optional_channels`` are those that a scan may lack.
    Raises InputError where a label is in no case, for an optional channel that is the first or none,
    for a budget of an unknown configuration, for an unknown family, and where not even its smallest network fits
    the memory.
    """
    require_family(family)
    target = target or Target()
    if target.kind not in ("cpu", "gpu"):
        raise InputError(f"no plan is made for the machine {target.kind!r}", "Say cpu or gpu")
    if target.steps is not None and target.budgets:
        raise InputError("a number of steps and a budget say the same twice", "Give one of them")
    present = {number for case in measured.cases for number in case.label_mm3}
    if missing := [label for label in labels if label.number not in present]:
        raise InputError(
            f"no case of {measured.task} has the label {missing[0].number} {missing[0].name}",
            "Take it off dataset.json or add cases that have it",
        )
    channels = [i.channel for i in measured.intensities]
    may_lack = _optional(optional_channels, channels)
    if unknown := set(target.budgets) - {"", *_NAMES}:
        raise InputError(f"a budget is given for {sorted(unknown)[0]!r}", f"Configurations are {', '.join(_NAMES)}")
    mirroring = mirrored(measured, labels)
    counts = FAMILIES[family].counts
    copies = 1 if counts else 2 ** len(mirroring[0])
    chooser = Chooser(measured, len(labels) + 1, target, meter, copies=copies)
    solid = tuple(s for s in SIZES if s.voxels >= FAMILIES[family].least_patch(3))
    flat = tuple(s for s in SIZES if s.pixels >= FAMILIES[family].least_patch(2))
    volumes, size = chooser.choose("3d", lambda size: _volumes(measured, size, family), solid)
    slices, _ = chooser.choose("2d", lambda size: _slices(measured, size, family), flat)
    configurations = {"3d": volumes, "2d": slices}
    # Things are told from each other in a patch, which need not hold much of the case.
    coarse = None if counts else _low_resolution(measured, volumes, size)
    if coarse is not None:
        configurations[_LOW], _ = chooser.choose(_LOW, lambda _: coarse, (size,))
        up_to = solid[: solid.index(size) + 1]
        configurations[_CASCADE], _ = chooser.choose(_CASCADE, lambda size: _cascade(measured, size, family), up_to)
    if unknown := set(target.budgets) - set(configurations) - {""}:
        why = f"{family} counts at full resolution" if counts else "a patch holds enough of a case"
        raise InputError(
            f"a budget is given for {sorted(unknown)[0]}, which is not planned: {why}",
            f"Its configurations are {', '.join(configurations)}",
        )
    return Plan(
        task=measured.task,
        channels=tuple(channels),
        labels=tuple(LabelEntry(name=label.name, number=label.number, code=label.code) for label in labels),
        optional_channels=may_lack,
        normalisation=_normalisation(measured),
        configurations=configurations,
        training=_training(mirroring, volumes.steps.value if volumes.steps else _LONG, family),
        fingerprint=measured.digest(),
        regions=_regions(labels, family),
    )


def _regions(labels: LabelSet, family: str) -> tuple[Region, ...]:
    """One output of a single label, where a family has it so; else an output for the background and each label."""
    if not FAMILIES[family].sigmoid or len(labels) > 1:
        return ()
    return tuple(Region(name=label.name, labels=(label.number,), number=label.number) for label in labels)


def _optional(names: Sequence[str], channels: Sequence[str]) -> Decision[tuple[str, ...]]:
    if strange := [name for name in names if name not in channels[1:]]:
        others = ", ".join(channels[1:]) or "none, there being one channel"
        raise InputError(
            f"{strange[0]!r} cannot be an optional channel", f"Results lie on the first one's grid; others are {others}"
        )
    reason = "a scan must have every channel"
    if names:
        reason = (
            "as asked for; where one is missing its mean stands in its place, so train on cases that lack it now and "
            "then, or expect worse results without it"
        )
    return Decision(value=tuple(c for c in channels if c in names), reason=reason)


def _normalisation(measured: Fingerprint) -> Decision[tuple[Normalisation, ...]]:
    rules, reasons = [], []
    for number, channel in enumerate(measured.intensities):
        if channel.channel.strip().lower() == "ct":
            rules.append(
                Normalisation(
                    channel=channel.channel,
                    kind="ct",
                    low=channel.percentile_00_5,
                    high=channel.percentile_99_5,
                    mean=channel.mean,
                    std=max(channel.std, 1e-3),
                )
            )
            reasons.append(f"{channel.channel}: Hounsfield units mean the same in every scan, so the clip is shared")
        else:
            rules.append(Normalisation(channel=channel.channel, kind="zscore"))
            zeros = [c.channels[number].zero_share for c in measured.cases if number < len(c.channels)]
            masked = f", over the voxels that are not zero: {np.median(zeros):.0%} are background" if zeros else ""
            reasons.append(f"{channel.channel}: intensities have no unit, so each case is scaled by itself{masked}")
    return Decision(value=tuple(rules), reason="; ".join(reasons))


def _spacing(measured: Fingerprint) -> Decision[tuple[float, float, float]]:
    median = np.median(measured.spacings, axis=0)
    reason = "the median spacing of the training cases"
    coarse = int(np.argmax(median))
    others = np.delete(median, coarse)
    if median[coarse] > _ANISOTROPIC * others.max():
        median[coarse] = max(np.percentile(measured.spacings[:, coarse], 10), others.max())
        reason += f"; along {'xyz'[coarse]}, which is much coarser, the 10th percentile, so that thin slices stay thin"
    return Decision(value=_floats(median), reason=reason)


def _volumes(
    measured: Fingerprint, size: Size, family: str, spacing: Decision[tuple[float, float, float]] | None = None
) -> Configuration:
    spacing = spacing or _spacing(measured)
    typical = measured.typical_shape(spacing.value)
    most = size.voxels
    if size.share < 1:
        least = max(SIZES[0].voxels, FAMILIES[family].least_patch(3))
        most = min(most, max(least, int(size.share * np.prod(typical))))
    part = size.share < 1 and bool(most >= _PART * np.prod(typical))
    patch, network = _fit(typical, np.array(spacing.value), most, size, family, axes=(0, 1, 2), alike=part)
    whole = "covers the typical case" if (np.array(patch) >= typical).all() else "is as much of it as fits"
    return Configuration(
        dimensions=3,
        spacing=spacing,
        patch=Decision(
            value=patch,
            reason=f"the typical case has {_size(typical)} voxels; the patch {whole} in {most}",
        ),
        batch=Decision(value=2, reason="the smallest batch, in favour of the largest patch"),
        network=network,
    )


def _low_resolution(measured: Fingerprint, full: Configuration, size: Size) -> Configuration | None:
    """A 3D configuration whose patch holds a quarter of the typical case, where that of full resolution
    does not and half the voxels do; as nnU-Net's ``3d_lowres``."""
    spacing = np.array(full.spacing.value)
    typical = measured.typical_shape(full.spacing.value)
    if np.prod(full.patch.value) >= _SEEN * np.prod(typical):
        return None
    seen = _SEEN * np.prod(typical) / np.prod(full.patch.value)  # above 1: by how much the patch falls short
    reason = "coarser than the data, until a patch holds a quarter of the typical case"
    while True:
        while seen > 1:
            spacing, before = _coarser(spacing), spacing
            seen /= np.prod(spacing / before)
        coarse = _volumes(measured, size, full.network.value.family, Decision(value=_floats(spacing), reason=reason))
        shape = measured.typical_shape(coarse.spacing.value)
        seen = _SEEN * np.prod(shape) / np.prod(coarse.patch.value)
        if seen <= 1:
            return coarse if 2 * np.prod(shape) <= np.prod(typical) else None


def _cascade(measured: Fingerprint, size: Size, family: str) -> Configuration:
    """Full resolution once more, which is told what low resolution found; as nnU-Net's ``3d_cascade_fullres``.
    Further channels take room and time, so that in a rare case its size is a smaller one than that of 3d."""
    full = _volumes(measured, size, family)
    reason = (
        f"as 3d, told by {_LOW} where each structure lies: it sees around the patch, which holds too little of a case"
    )
    patch = full.patch.model_copy(update={"reason": f"{full.patch.reason}; {reason}"})
    return full.model_copy(update={"patch": patch, "previous": _LOW})


def _coarser(spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    """A little; thick slices stay as they are until pixels have come near them."""
    finer = spacing < spacing.max() / 2
    return np.where(finer if finer.any() else True, spacing * _COARSER, spacing)


def _slices(measured: Fingerprint, size: Size, family: str) -> Configuration:
    spacing = _spacing(measured)
    steps = np.array(spacing.value)
    uneven = steps.max() > 1.1 * np.sort(steps)[1]
    axis = int(np.argmax(steps)) if uneven else 2
    plane = tuple(a for a in range(3) if a != axis)
    typical = measured.typical_shape(spacing.value)
    patch, network = _fit(typical, steps, size.pixels, size, family, axes=plane)
    batch = int(np.clip(2 * size.voxels // (3 * np.prod(patch)), 8, 32))
    return Configuration(
        dimensions=2,
        slice_axis=axis,  # type: ignore[arg-type]
        spacing=spacing,
        patch=Decision(
            value=patch,
            reason=f"slices across {'xyz'[axis]}, {'the coarsest axis' if uneven else 'no axis being coarsest'}; "
            f"a typical one has {_size(typical[list(plane)])} pixels",
        ),
        batch=Decision(value=batch, reason="as many slices as cost about a 3D step"),
        network=network,
    )


def sketch(family: str, patch: Sequence[int], first_features: int, most_features: int) -> Configuration:
    """A network of a family for patches of so many cubic voxels, two sizes for 2D, lengthened to what its strides
    divide; for whoever compares families. Raises InputError for an unknown family."""
    require_family(family)
    axes, size = tuple(range(len(patch))), np.array([*patch, 1][:3], dtype=float)
    size[list(axes)] = np.maximum(size[list(axes)], max(2, 2 ** FAMILIES[family].least_halvings))
    stages = _stages(size, np.ones(3), axes, FAMILIES[family])
    divisor = np.prod(stages.strides, axis=0)
    whole = np.array([_round_up(s, d) for s, d in zip(size, divisor, strict=True)])
    if (whole == divisor).all():
        whole[0] *= 2
    limits = Size(0, 0, first_features, most_features, 0)
    asked = "as asked for"
    return Configuration(
        dimensions=3 if len(axes) == 3 else 2,
        slice_axis=None if len(axes) == 3 else 2,
        spacing=Decision(value=(1.0, 1.0, 1.0), reason=asked),
        patch=Decision(value=_three(whole), reason=asked),
        batch=Decision(value=2, reason="the smallest batch"),
        network=_network(stages, whole, axes, family, limits),
    )


def _fit(
    typical: NDArray[np.float64],
    spacing: NDArray[np.float64],
    most: int,
    limits: Size,
    family: str,
    axes: tuple[int, ...],
    alike: bool = False,
) -> tuple[Three, Decision[Network]]:
    """A patch within ``most`` voxels that the network's strides divide: the typical case, shortened
    where it reaches farthest in mm, so that it tends to a cube, or ``alike`` along every axis, so that
    it keeps the case's shape, its length before its width."""
    unit = 1 / typical if alike else spacing.copy()
    order = np.argsort(typical * spacing)
    if alike and typical[order[2]] * spacing[order[2]] > _LONG_CASE * typical[order[1]] * spacing[order[1]]:
        unit[order[2]] *= _WIDTH
    least = max(2 * _COARSEST, 2 ** FAMILIES[family].least_halvings)
    size = np.ones(3)
    longest = most / least ** (len(axes) - 1)  # with the other axes as short as can be
    size[list(axes)] = np.clip(np.rint(typical[list(axes)]), least, longest)
    inside = np.isin(np.arange(3), axes)
    while np.prod(size) > 4 * most:
        # From far off in large steps, whatever the strides.
        reach = np.where(inside & (size > least), size * unit, 0)
        axis = int(np.argmax(reach))
        size[axis] = max(least, 0.9 * size[axis])
    while True:
        stages = _stages(size, spacing, axes, FAMILIES[family])
        divisor = np.prod(stages.strides, axis=0)
        patch = np.array([_round_up(s, d) for s, d in zip(size, divisor, strict=True)])
        if (patch == divisor).all():
            patch[order[-1] if order[-1] in axes else axes[0]] *= 2  # a single voxel would have no variance
        if np.prod(patch) <= most:
            return _three(patch), _network(stages, patch, axes, family, limits)
        reach = np.where(inside & (patch > least), patch * unit, 0)
        axis = int(np.argmax(reach))
        size = np.minimum(size, patch).astype(float)
        size[axis] = patch[axis] - divisor[axis]


@dataclass(frozen=True)
class _Stages:
    """Kernels and strides of each, and why they are so."""

    kernels: list[Three]
    strides: list[Three]
    reason: str


def _stages(size: NDArray[np.float64], spacing: NDArray[np.float64], axes: tuple[int, ...], family: Family) -> _Stages:
    """Those of a family for patches of about this size."""
    if family.stages == "uniform":
        return _uniform(size, axes, family)
    if family.stages == "leading":
        return _leading(size, spacing, axes, family)
    found = _any(size, spacing, axes, family.most_halvings)
    if family.cubic:
        inside = _three(np.where(np.isin(np.arange(3), axes), 3, 1))
        return _Stages([inside] * len(found.kernels), found.strides, found.reason)
    return _dilated(found) if family.stages == "dilated" else found


def _any(size: NDArray[np.float64], spacing: NDArray[np.float64], axes: tuple[int, ...], most_halvings: int) -> _Stages:
    """Stages are added while an axis can be halved: long enough, and no coarser than twice the finest of
    those long enough. A kernel spans an axis once its spacing is within twice the finest or it is
    halved, and from then on.
    """
    size, spacing = size.copy(), spacing.copy()
    inside = np.isin(np.arange(3), axes)
    kernels: list[Three] = []
    strides: list[Three] = []
    stride = np.ones(3, dtype=int)
    near = np.zeros(3, dtype=bool)
    while True:
        near |= inside & (spacing <= 2 * spacing[inside].min() * (1 + 1e-6))
        kernels.append(_three(np.where(near, 3, 1)))
        strides.append(_three(stride))
        long = inside & (size / 2 >= _COARSEST)
        if not long.any() or len(kernels) > most_halvings:
            why = "coarse axes are halved, and spanned by kernels, only once the others have caught up"
            return _Stages(kernels, strides, why)
        halve = long & (spacing <= 2 * spacing[long].min() * (1 + 1e-6))
        near |= halve
        stride = np.where(halve, 2, 1)
        size, spacing = size / stride, spacing * stride


def _uniform(size: NDArray[np.float64], axes: tuple[int, ...], family: Family) -> _Stages:
    """Every axis is halved in every stage, as often as the shortest one can be."""
    shortest = float(size[list(axes)].min())
    count = int(np.clip(np.log2(shortest / _COARSEST), family.least_halvings, family.most_halvings))
    inside = np.isin(np.arange(3), axes)
    strides = [(1, 1, 1), *[_three(np.where(inside, 2, 1))] * count]
    return _Stages(
        [_three(np.where(inside, 3, 1))] * len(strides),
        strides,
        "this family halves every axis at once, coarse ones too",
    )


def _leading(size: NDArray[np.float64], spacing: NDArray[np.float64], axes: tuple[int, ...], family: Family) -> _Stages:
    """As MONAI's SegResNetDS halves: a kernel spans the axes that are halved after it."""
    where = list(axes)
    steps = leading([float(spacing[a]) for a in where], family.most_halvings + 1)
    count = 1
    while count < family.most_halvings and (size[where] / np.prod(steps[: count + 1], axis=0) >= _COARSEST).all():
        count += 1
    kernels, strides = np.ones((count + 1, 3), dtype=int), np.ones((count + 1, 3), dtype=int)
    kernels[:, where] = np.where(np.array(steps[: count + 1]) == 2, 3, 1)
    strides[1:, where] = steps[:count]
    why = "coarse axes are halved, and spanned by kernels, only once the others have caught up, and then always"
    return _Stages([_three(k) for k in kernels], [_three(s) for s in strides], why)


def _dilated(found: _Stages) -> _Stages:
    """One more stage that keeps the resolution, at an output stride of 8, or of 16 where five halvings fit."""
    halvings = len(found.strides) - 1
    kept = 4 if halvings > 4 else min(halvings, 3)
    strides = [*found.strides[: kept + 1], (1, 1, 1)]
    kernels = [*found.kernels[: kept + 1], found.kernels[-1]]
    return _Stages(kernels, strides, f"{found.reason}; the last stage is dilated, and keeps the resolution")


def _network(
    stages: _Stages, patch: NDArray[np.int64], axes: tuple[int, ...], family: str, limits: Size
) -> Decision[Network]:
    coarsest = _size((patch / np.prod(stages.strides, axis=0))[list(axes)])
    features = FAMILIES[family].features(limits.first_features, limits.most_features, len(stages.strides))
    return Decision(
        value=Network(family=family, features=features, kernels=tuple(stages.kernels), strides=tuple(stages.strides)),
        reason=f"{len(features)} stages bring the patch down to {coarsest}; {stages.reason}",
    )


def _training(mirroring: tuple[Axes, str], steps: int, family: str) -> Training:
    axes, why = mirroring
    long = steps >= _LONG
    settings = Augmentation(mirror=axes) if long else Augmentation(mirror=axes, **_SLIGHT)
    how = (
        "moderate"
        if long
        else f"slight, as in fewer than {_LONG:,} steps a network learns more from cases as they are:"
    )
    return Training(
        learning_rate=Decision(value=FAMILIES[family].learning_rate, reason=_rate_reason(family)),
        weight_decay=Decision(value=1e-2, reason="AdamW's own"),
        foreground_share=Decision(value=0.5, reason="half of the patches hold a structure, each one as likely"),
        augmentation=Decision(
            value=settings,
            reason=f"{how} rotation, scaling and intensity changes; mirrored along {_axis_names(axes)}: {why}",
        ),
    )


def _rate_reason(family: str) -> str:
    how = "AdamW with warm-up and cosine decay to zero; "
    if FAMILIES[family].learning_rate == FAMILIES["unet"].learning_rate:
        return how + (
            "short runs need it high: 200 steps on the brain phantom gave Dice 0.54 at 2e-3, 0.78 at 4e-3 and 0.88 "
            "at 1e-2"
        )
    return how + FAMILIES[family].rate_reason


def _axis_names(axes: Sequence[int]) -> str:
    return ", ".join("xyz"[axis] for axis in axes) or "no axis"


def _round_up(size: float, divisor: int) -> int:
    return int(-(-size // divisor) * divisor)


def _three(values: NDArray[np.int64]) -> Three:
    return int(values[0]), int(values[1]), int(values[2])


def _floats(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return round(float(values[0]), 6), round(float(values[1]), 6), round(float(values[2]), 6)


def _size(values: NDArray[np.float64]) -> str:
    return "x".join(f"{v:.0f}" for v in values)

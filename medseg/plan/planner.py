"""Fingerprint in, plan out. The rules follow nnU-Net (Isensee et al., Nature Methods 2021), with
patch and width scaled to the machine at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.labels import LabelSet
from medseg.plan.fingerprint import Fingerprint
from medseg.plan.plan import (
    Augmentation,
    Configuration,
    Decision,
    LabelEntry,
    Network,
    Normalisation,
    Plan,
    Three,
    Training,
)

# Slices this much farther apart than pixels make a volume anisotropic (as in nnU-Net).
_ANISOTROPIC = 3.0
# The coarsest feature map keeps at least this many voxels along each axis.
_COARSEST = 4
_MOST_STAGES = 6


@dataclass(frozen=True)
class Machine:
    """What the plan is for: ``cpu`` or ``gpu``. It bounds voxels in a patch and features."""

    kind: str

    @property
    def patch_voxels(self) -> int:
        return 128**3 if self.kind == "gpu" else 48**3

    @property
    def slice_pixels(self) -> int:
        return 512**2 if self.kind == "gpu" else 192**2

    @property
    def first_features(self) -> int:
        return 32 if self.kind == "gpu" else 16

    @property
    def most_features(self) -> int:
        return 320 if self.kind == "gpu" else 128


def plan(
    measured: Fingerprint,
    labels: LabelSet,
    *,
    machine: str = "cpu",
    epochs: int | None = None,
    optional_channels: Sequence[str] = (),
) -> Plan:
    """Decide how to train on a task, and say why.

    ``machine`` is ``cpu`` or ``gpu``; ``optional_channels`` are those that a scan may lack. Raises
    InputError where a label is in no case, and for an optional channel that is the first or none.
    """
    if machine not in ("cpu", "gpu"):
        raise InputError(f"no plan is made for the machine {machine!r}", "Say cpu or gpu")
    present = {number for case in measured.cases for number in case.label_mm3}
    if missing := [label for label in labels if label.number not in present]:
        raise InputError(
            f"no case of {measured.task} has the label {missing[0].number} {missing[0].name}",
            "Take it off dataset.json or add cases that have it",
        )
    target = Machine(machine)
    configurations = {"3d": _volumes(measured, target), "2d": _slices(measured, target)}
    return Plan(
        task=measured.task,
        channels=tuple(i.channel for i in measured.intensities),
        labels=tuple(LabelEntry(name=label.name, number=label.number, code=label.code) for label in labels),
        optional_channels=_optional(optional_channels, [i.channel for i in measured.intensities]),
        normalisation=_normalisation(measured),
        configurations=configurations,
        training=_training(epochs),
        fingerprint=measured.digest(),
    )


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
    for channel in measured.intensities:
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
            reasons.append(f"{channel.channel}: intensities have no unit, so each case is scaled by itself")
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


def _typical_shape(measured: Fingerprint, spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    return np.median(measured.shapes * measured.spacings / np.array(spacing), axis=0)


def _volumes(measured: Fingerprint, machine: Machine) -> Configuration:
    spacing = _spacing(measured)
    typical = _typical_shape(measured, spacing.value)
    patch, network = _fit(typical, np.array(spacing.value), machine.patch_voxels, machine, axes=(0, 1, 2))
    whole = "covers the typical case" if (np.array(patch) >= typical).all() else "is as much of it as fits"
    return Configuration(
        dimensions=3,
        spacing=spacing,
        patch=Decision(
            value=patch,
            reason=f"the typical case has {_size(typical)} voxels; the patch {whole} in "
            f"{machine.patch_voxels} voxels, the bound for a {machine.kind}",
        ),
        batch=Decision(value=2, reason="the smallest batch, in favour of the largest patch"),
        network=network,
    )


def _slices(measured: Fingerprint, machine: Machine) -> Configuration:
    spacing = _spacing(measured)
    steps = np.array(spacing.value)
    uneven = steps.max() > 1.1 * np.sort(steps)[1]
    axis = int(np.argmax(steps)) if uneven else 2
    plane = tuple(a for a in range(3) if a != axis)
    typical = _typical_shape(measured, spacing.value)
    patch, network = _fit(typical, steps, machine.slice_pixels, machine, axes=plane)
    batch = int(np.clip(2 * machine.patch_voxels // (3 * np.prod(patch)), 8, 32))
    return Configuration(
        dimensions=2,
        slice_axis=axis,  # type: ignore[arg-type]
        spacing=spacing,
        patch=Decision(
            value=patch,
            reason=f"slices across {'xyz'[axis]}, {'the coarsest axis' if uneven else 'no axis being coarsest'}; "
            f"a typical one has "
            f"{_size(typical[list(plane)])} pixels",
        ),
        batch=Decision(value=batch, reason="as many slices as cost about a 3D step"),
        network=network,
    )


def _fit(
    typical: NDArray[np.float64], spacing: NDArray[np.float64], most: int, machine: Machine, axes: tuple[int, ...]
) -> tuple[Three, Decision[Network]]:
    """A patch within ``most`` voxels that the network's strides divide: the typical case, shortened
    where it reaches farthest in mm."""
    size = np.ones(3)
    longest = most / (2 * _COARSEST) ** (len(axes) - 1)  # with the other axes as short as can be
    size[list(axes)] = np.clip(np.rint(typical[list(axes)]), 2 * _COARSEST, longest)
    while True:
        network = _network(size, spacing, machine, axes)
        patch = np.array([_round_up(s, d) for s, d in zip(size, network.value.divisor, strict=True)])
        if np.prod(patch) <= most:
            return _three(patch), network
        # Take from the axis that reaches farthest in mm, so that the patch tends to a cube.
        reach = np.where(np.isin(np.arange(3), axes) & (patch > 2 * _COARSEST), patch * spacing, 0)
        axis = int(np.argmax(reach))
        size = np.minimum(size, patch).astype(float)
        size[axis] = patch[axis] - network.value.divisor[axis]


def _network(
    size: NDArray[np.float64], spacing: NDArray[np.float64], machine: Machine, axes: tuple[int, ...]
) -> Decision[Network]:
    """Stages are added while an axis can be halved: long enough, and no coarser than twice the
    finest of those long enough. A kernel spans an axis once its spacing is within twice the finest
    or it is halved, and from then on."""
    size, spacing = size.copy(), spacing.copy()
    inside = np.isin(np.arange(3), axes)
    kernels: list[Three] = []
    strides: list[Three] = []
    features: list[int] = []
    stride = np.ones(3, dtype=int)
    near = np.zeros(3, dtype=bool)
    while True:
        near |= inside & (spacing <= 2 * spacing[inside].min() * (1 + 1e-6))
        kernels.append(_three(np.where(near, 3, 1)))
        strides.append(_three(stride))
        features.append(min(machine.first_features * 2 ** len(features), machine.most_features))
        long = inside & (size / 2 >= _COARSEST)
        if not long.any() or len(features) == _MOST_STAGES:
            break
        halve = long & (spacing <= 2 * spacing[long].min() * (1 + 1e-6))
        near |= halve
        stride = np.where(halve, 2, 1)
        size, spacing = size / stride, spacing * stride
    network = Network(features=tuple(features), kernels=tuple(kernels), strides=tuple(strides))
    return Decision(
        value=network,
        reason=f"{len(features)} stages bring the patch down to {_size(size[list(axes)])}; "
        "coarse axes are halved, and spanned by kernels, only once the others have caught up",
    )


def _training(epochs: int | None) -> Training:
    return Training(
        learning_rate=Decision(
            value=1e-2,
            reason="AdamW with warm-up and cosine decay to zero; short runs need it high: 200 steps on the brain "
            "phantom gave Dice 0.54 at 2e-3, 0.78 at 4e-3 and 0.88 at 1e-2",
        ),
        weight_decay=Decision(value=1e-2, reason="AdamW's own"),
        foreground_share=Decision(value=0.5, reason="half of the patches hold a structure, each one as likely"),
        augmentation=Decision(
            value=Augmentation(),
            reason="moderate rotation, scaling and intensity changes; no mirroring, since left and right differ",
        ),
        epochs=Decision(
            value=epochs or 100, reason="as asked for" if epochs else "5,000 steps; --epochs or --budget override it"
        ),
    )


def _round_up(size: float, divisor: int) -> int:
    return int(-(-size // divisor) * divisor)


def _three(values: NDArray[np.int64]) -> Three:
    return int(values[0]), int(values[1]), int(values[2])


def _floats(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return round(float(values[0]), 6), round(float(values[1]), 6), round(float(values[2]), 6)


def _size(values: NDArray[np.float64]) -> str:
    return "x".join(f"{v:.0f}" for v in values)

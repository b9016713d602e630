"""The channels of one case, which may come as several scans on several grids, put onto one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.resample import resample
from medseg.core.volume import Volume
from medseg.plan.plan import Normalisation

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813

Float64 = NDArray[np.float64]

# Registration goes from coarse to fine: the voxels' size in mm at each step. Two is enough for a
# fraction of a millimetre, and gradients of a whole CT at full size would fill the memory.
_STEPS_MM = (8.0, 4.0, 2.0)
# An axis keeps as many voxels, however thick its slices.
_FEWEST = 8
_SAMPLES = 100_000
_BINS = 32
# Below this share of common ground, whatever was found is chance.
_LEAST_OVERLAP = 0.2
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between RAS+ and ITK's LPS


@dataclass(frozen=True, eq=False)
class Alignment:
    """How a scan was moved onto another. ``transform`` (4, 4) takes positions in mm (RAS+), as the
    scan's own header gives them, to where they belong: a turn by ``rotation_degrees`` that takes the
    middle of the scan ``translation_mm`` away. ``overlap`` is the share of the other's field of view
    that the scan then covers; the mutual information (nats) of the two is given before and after."""

    transform: Float64
    rotation_degrees: float
    translation_mm: float
    overlap: float
    information_before: float
    information: float

    def apply(self, volume: Volume) -> Volume:
        """The scan where it belongs: another grid, the same voxels."""
        grid = Grid(volume.grid.shape, self.transform @ volume.grid.affine)
        return Volume(volume.values, grid, volume.modality)


def assemble(volumes: Mapping[str, Volume]) -> Volume:
    """One scan of all channels, in their order, on the grid of the first, which is not changed.

    The others are interpolated, and hold 0 (or, where they have them, their lowest value below it)
    where they do not reach. Raises InputError for a scan of several channels and for one that has
    nothing in common with the first.
    """
    for name, volume in volumes.items():
        if volume.channels != 1:
            raise InputError(f"the scan of channel {name} has {volume.channels} channels", "Give one scan per channel")
    (first, fixed), *others = volumes.items()
    values: list[NDArray[Any]] = [fixed.values[0]]
    for name, volume in others:
        if volume.grid.matches(fixed.grid):
            values.append(volume.values[0])
            continue
        if not overlap(volume.grid, fixed.grid):
            raise InputError(
                f"the scan of channel {name} shows nothing of what that of {first} shows",
                "Give scans of one patient and one sitting, or align them with --register",
            )
        lowest = min(0.0, float(volume.values.min()))
        values.append(resample(volume, onto=fixed.grid, fill=lowest).values[0])
    modality = fixed.modality if len({volume.modality for volume in volumes.values()}) == 1 else None
    return Volume(np.stack(values), fixed.grid, modality)


def complete(volume: Volume, present: Sequence[str], rules: Sequence[Normalisation]) -> Volume:
    """The scan with one channel for each of the rules, from the channels that are ``present``.

    One that is missing holds what normalisation brings to zero: the mean of a CT, and 0 where
    each case is scaled by itself.
    """
    if len(present) == len(rules):
        return volume
    given = dict(zip(present, volume.values, strict=True))
    shape = volume.grid.shape
    return Volume(
        np.stack(
            [
                given[rule.channel] if rule.channel in given else np.full(shape, rule.mean or 0, dtype=np.float32)
                for rule in rules
            ]
        ),
        volume.grid,
    )


def overlap(moving: Grid, fixed: Grid) -> float:
    """The share of the fixed grid's field of view, 0 to 1, that the moving one covers."""
    steps = [np.linspace(0, n - 1, min(n, 40)) for n in fixed.shape]
    points = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1)
    index = moving.to_index(fixed.to_world(points))
    return float(((index >= -0.5) & (index <= np.array(moving.shape) - 0.5)).all(axis=-1).mean())


def register(moving: Volume, fixed: Volume, *, seed: int = 0) -> Alignment:
    """The rigid motion that makes ``moving`` (one channel) fit ``fixed`` (one channel) best.

    Mattes' mutual information (IEEE TMI 22, 2003), gradient descent from coarse to fine in
    SimpleITK, from where the headers put the scans and from their middles laid on each other,
    whichever ends better; none at all where neither is better than the headers. One thread and a
    fixed ``seed``: the same scans give the same motion. Raises InputError where the scans cannot be
    brought to overlap.
    """
    import SimpleITK as sitk  # noqa: N813

    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        return _register(moving, fixed, seed)
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _register(moving: Volume, fixed: Volume, seed: int) -> Alignment:
    import SimpleITK as sitk  # noqa: N813

    images = [_image(v) for v in (fixed, moving)]
    middles = [(_FLIP[:3, :3] @ v.grid.to_world((np.array(v.grid.shape) - 1) / 2)) for v in (fixed, moving)]
    results = []
    for shift in (np.zeros(3), middles[1] - middles[0]):
        start = sitk.Euler3DTransform()
        start.SetCenter(middles[0].tolist())
        start.SetTranslation(shift.tolist())
        # Where the scans do not overlap, ITK says so by this.
        try:
            results.append((_descend(images, start, _STEPS_MM[0], seed), start))
        except RuntimeError:
            continue
    if not results:
        raise InputError("the scans do not overlap", "Give scans of one patient and one part of the body")
    _, found = max(results, key=lambda result: result[0])
    before = _information(images, sitk.Euler3DTransform(), seed)
    try:
        for step in _STEPS_MM[1:]:
            _descend(images, found, step, seed)
        after = _information(images, found, seed)
    except RuntimeError:  # they drifted apart
        after = 0.0
    if after <= before:  # as the headers have it is best
        found, after = sitk.Euler3DTransform(), before
    return _alignment(found, moving.grid, fixed.grid, before, after)


def _alignment(found: Any, moving: Grid, fixed: Grid, before: float, after: float) -> Alignment:
    """ITK's transform takes positions of the fixed scan to the moving one's, in LPS."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(found.GetMatrix(), (3, 3))
    matrix[:3, 3] = found.TransformPoint((0.0, 0.0, 0.0))
    transform: Float64 = np.asarray(np.linalg.inv(_FLIP @ matrix @ _FLIP), dtype=np.float64)
    middle = moving.to_world((np.array(moving.shape) - 1) / 2)
    cosine = (np.trace(transform[:3, :3]) - 1) / 2
    common = overlap(Grid(moving.shape, transform @ moving.affine), fixed)
    if common < _LEAST_OVERLAP:
        raise InputError(
            f"the scans cannot be aligned: at best {common:.0%} of the one are seen in the other",
            "Give scans of one patient and one part of the body",
        )
    return Alignment(
        transform,
        float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))),
        float(np.linalg.norm(transform[:3, :3] @ middle + transform[:3, 3] - middle)),
        common,
        before,
        after,
    )


def _image(volume: Volume) -> sitk.Image:
    import SimpleITK as sitk  # noqa: N813

    grid = volume.grid
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.values[0].T, dtype=np.float32))
    image.SetSpacing(grid.spacing)
    image.SetOrigin((_FLIP[:3, :3] @ grid.origin).tolist())
    image.SetDirection((_FLIP[:3, :3] @ grid.direction).ravel().tolist())
    return image


def _shrunk(image: sitk.Image, step: float) -> sitk.Image:
    """Voxels averaged to about ``step`` mm, along the axes that are finer."""
    import SimpleITK as sitk  # noqa: N813

    factors = [
        max(1, min(int(step / spacing), size // _FEWEST))
        for spacing, size in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    return sitk.BinShrink(image, factors)


def _method(fixed: sitk.Image, seed: int) -> Any:
    import SimpleITK as sitk  # noqa: N813

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetInterpolator(sitk.sitkLinear)
    share = _SAMPLES / fixed.GetNumberOfPixels()
    if share < 1:
        method.SetMetricSamplingStrategy(method.RANDOM)
        # ITK takes 0 for "by the clock".
        method.SetMetricSamplingPercentage(share, seed + 1)
    return method


def _descend(images: list[sitk.Image], transform: Any, step: float, seed: int) -> float:
    """Improve the transform in place at one resolution; the mutual information that it ends with."""
    fixed, moving = (_shrunk(image, step) for image in images)
    method = _method(fixed, seed)
    # Shrinking steps by half at each turn of direction, as is usual, stops 3 mm away after 12 degrees.
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=step,
        minStep=step / 10_000,
        numberOfIterations=500,
        relaxationFactor=0.8,
        gradientMagnitudeTolerance=1e-8,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    return -float(method.GetMetricValue())


def _information(images: list[sitk.Image], transform: Any, seed: int) -> float:
    """Mutual information at the finest step; 0 where the scans have nothing in common."""
    fixed, moving = (_shrunk(image, _STEPS_MM[-1]) for image in images)
    method = _method(fixed, seed)
    method.SetInitialTransform(transform)
    try:
        return -float(method.MetricEvaluate(fixed, moving))
    except RuntimeError:
        return 0.0

"""The grid that a network sees, and a scan brought onto it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.resample import axis_maps, crop, nearest, resample, stretch
from medseg.core.volume import LabelMap, Volume
from medseg.plan.plan import Configuration, Plan
from medseg.preprocess.normalise import AS_IT_IS, filled, normalise, scalings

Spacing = tuple[float, float, float]
# Weights as near as this are the same.
_ROUNDING = 1e-6


def preprocess(
    volume: Volume,
    plan: Plan,
    configuration: Configuration,
    previous: LabelMap | None = None,
    *,
    box: Grid | None = None,
) -> Volume:
    """A scan as the network sees it: axes turned to run along x, y, z (unless the configuration takes
    them as stored), empty surroundings cut away, normalised, at the configuration's spacing. Float32
    (C, X, Y, Z) on the `network_grid`.

    Labels follow by ``resample(labels, onto=preprocess(...).grid)``, and a result goes home by
    resampling onto the scan's own grid. ``previous`` are the labels of the stage before, on the scan's
    grid, where there is one: each becomes a further channel of 0 and 1, after the scan's. ``box`` is
    what is `occupied`, where that is known. Raises InputError where the channels are not the plan's.
    """
    box = box or occupied(volume, configuration.orientation)
    onto, cropped, rules = network_grid(box, configuration), crop(volume, box), plan.normalisation.value
    scales = scalings(cropped, rules)
    if masked(plan):
        cropped, scales = normalise(cropped, rules), (AS_IT_IS,) * len(rules)

    def prepare(channel: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return scales[channel](values)

    if configuration.grid == "spacing":
        image = resample(cropped, onto, prepare=prepare)
        if previous is None:
            return image
        found = resample(previous, onto=image.grid).values
        return _with_labels(image, np.stack([found == number for number in plan.label_set.numbers]))
    thick = thick_axis(box.spacing, target_spacing(box, configuration), configuration.thick)
    image = stretch(cropped, onto, thick=thick, prepare=prepare)
    if previous is None:
        return image
    outside = ~filled(crop(volume, box))
    return _with_labels(
        image, _one_hot(resample(previous, onto=box), outside, image.grid, plan.label_set.numbers, thick)
    )


def _with_labels(image: Volume, labels: NDArray[np.bool_]) -> Volume:
    """An image with a further channel of 0 and 1 for each of the ``labels`` (labels, X, Y, Z)."""
    return Volume(np.concatenate([image.values, labels.astype(np.float32)]), image.grid)


def masked(plan: Plan) -> bool:
    """Whether the plan normalises within a mask, for which the scan is held as floats."""
    return any(rule.kind == "zscore-mask" for rule in plan.normalisation.value)


def network_grid(box: Grid, configuration: Configuration) -> Grid:
    """The grid of the network's image of what is `occupied`."""
    target = target_spacing(box, configuration)
    if configuration.grid == "spacing":
        return box.with_spacing(target)
    x, y, z = (max(round(a / b * n), 1) for a, b, n in zip(box.spacing, target, box.shape, strict=True))
    return box.with_shape((x, y, z))


def _one_hot(
    labels: LabelMap, outside: NDArray[np.bool_], onto: Grid, numbers: tuple[int, ...], thick: int | None
) -> NDArray[np.bool_]:
    """A mask (labels, X, Y, Z) for each label: true where it has the largest linearly interpolated
    weight, what is ``outside`` the patient being a label of its own. A tie goes to the label of the
    nearest voxel, if it is one of those that tie, or else to the lowest."""
    values = np.where(outside & (labels.values == 0), -1, labels.values.astype(np.int32))
    maps = axis_maps(labels.grid, onto)
    if maps is None:
        raise ValueError("the grids' axes are not parallel")
    near = values[np.ix_(*(nearest(m.positions, n) for m, n in zip(maps, values.shape, strict=True)))]
    winner = np.zeros(onto.shape, dtype=np.int32)
    best, of_near = np.zeros(onto.shape, dtype=np.float32), np.zeros(onto.shape, dtype=np.float32)
    for number in (-1, 0, *numbers):
        weight = stretch(Volume((values == number)[None], labels.grid), onto, thick=thick, linear=True).values[0]
        wins = weight > best + _ROUNDING
        winner[wins], best[wins] = number, weight[wins]
        np.copyto(of_near, weight, where=near == number)
    np.copyto(winner, near, where=of_near >= best - _ROUNDING)
    return np.stack([winner == number for number in numbers])


def target_spacing(scan: Grid, configuration: Configuration) -> Spacing:
    """The spacing that the configuration asks for along the axes of the network's grid, of which
    ``scan`` has the axes. In 2D, where it rounds shapes, the scan keeps its own between slices."""
    x, y, z = configuration.spacing.value
    if configuration.grid == "shape" and configuration.slice_axis is not None:
        own = scan.spacing[configuration.slice_axis]
        x, y, z = (own if axis == configuration.slice_axis else s for axis, s in enumerate((x, y, z)))
    return x, y, z


def home_thick(scan: Grid, configuration: Configuration) -> int | None:
    """The axis of the network's grid along which logits go home to ``scan`` by the nearest slice."""
    turned = scan if configuration.orientation == "stored" else scan.reoriented()
    return thick_axis(target_spacing(turned, configuration), turned.spacing, configuration.thick)


def thick_axis(before: Spacing, after: Spacing, limit: float | None) -> int | None:
    """The axis along which slices are taken and not interpolated, on the way from one spacing to
    another: that of the largest spacing before, or else after, where it is more than ``limit`` times
    the smallest and there is no other as large."""
    for spacing in (before, after):
        if limit is not None and max(spacing) / min(spacing) > limit:
            return spacing.index(max(spacing)) if spacing.count(max(spacing)) == 1 else None
    return None


def occupied(volume: Volume, orientation: str = "ras") -> Grid:
    """The reoriented grid (with "stored" axes the scan's own) of the smallest box that holds every
    voxel which is not zero in some channel; the whole grid where all are zero."""
    box = volume.grid
    planes = _filled(volume)
    if planes[0].any():
        hits = [np.flatnonzero(one) for one in planes]
        x, y, z = (int(hit[-1] - hit[0] + 1) for hit in hits)
        box = box.window([int(hit[0]) for hit in hits], (x, y, z))
    return box if orientation == "stored" else box.reoriented()


def _filled(volume: Volume) -> list[NDArray[np.bool_]]:
    """For each voxel axis, which of its planes hold a voxel that is not zero."""
    filled = [np.zeros(n, dtype=bool) for n in volume.grid.shape]
    for values in volume.values:
        far = int(np.argmax(np.abs(values.strides)))
        first, second = (a for a in range(3) if a != far)
        for number in range(values.shape[far]):
            # Not numpy's take, which would turn the whole array first.
            plane = values[(slice(None),) * far + (number,)] != 0
            along = plane.any(axis=1)
            if along.any():
                filled[far][number] = True
                filled[first] |= along
                filled[second] |= plane.any(axis=0)
    return filled

"""Small tasks whose truth is a formula: to learn medseg on, and to test it with.

Each case is a scene of analytic solids in patient millimetres (RAS+), painted in order: the last
solid that holds a point decides its label and its tissue. A label file is that formula at the
voxels' centres; an image is the tissue averaged over the voxel, under bias and noise. Every organ
has look-alikes of its own intensity, and places, sizes and fields of view differ from case to case,
so that neither a threshold nor an average shape finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import ArrayLike, NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.progress import Progress, silent
from medseg.core.volume import LabelMap, Volume
from medseg.io.files import new_folder, write_json
from medseg.io.nifti import write_labels, write_volume

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

FEWEST_CASES = 5
UNLABELLED = 2


class Solid(Protocol):
    """A region of space that lies within ``reach`` mm of its ``centre`` (3,)."""

    @property
    def centre(self) -> Float64: ...
    @property
    def reach(self) -> float: ...

    def contains(self, points: Float64) -> Bool:
        """Which points (3, ...), in mm, lie inside."""
        ...


@dataclass(frozen=True)
class Ripple:
    """One harmonic of a surface: ``height`` (of the radius) times sin(wave . direction + phase)."""

    height: float
    wave: Float64
    phase: float


@dataclass(frozen=True)
class Blob:
    """An ellipsoid of semi-axes ``radii`` (3,) mm along the columns of ``axes`` (3, 3), made squarer
    by ``square`` (0 an ellipsoid, 1 a superquadric of the fourth power) and rippled."""

    centre: Float64
    radii: Float64
    axes: Float64 = field(default_factory=lambda: np.eye(3))
    square: float = 0.0
    ripples: tuple[Ripple, ...] = ()

    @property
    def _rise(self) -> float:
        return sum(abs(ripple.height) for ripple in self.ripples)

    @property
    def reach(self) -> float:
        return float(self.radii.max() * (1 + self._rise) / np.sqrt(1 - self.square * (1 - 3**-0.5)))

    def contains(self, points: Float64) -> Bool:
        x, y, z = (part / radius for part, radius in zip(_turned(points, self), self.radii, strict=True))
        x2, y2, z2 = x * x, y * y, z * z
        level = x2 + y2 + z2
        if self.square:
            level = (1 - self.square) * level + self.square * np.sqrt(x2 * x2 + y2 * y2 + z2 * z2)
        inside: Bool = level < (1 - self._rise) ** 2
        # Only near the surface do the ripples decide.
        near = ~inside & (level < (1 + self._rise) ** 2)
        if self.ripples and near.any():
            part = np.stack([x[near], y[near], z[near]])
            part /= np.sqrt((part * part).sum(axis=0))
            rim = np.ones(part.shape[1])
            for ripple in self.ripples:
                angle = ripple.wave[0] * part[0] + ripple.wave[1] * part[1] + ripple.wave[2] * part[2]
                rim += ripple.height * np.sin(angle + ripple.phase)
            inside[near] = level[near] < rim * rim
        return inside

    def grown(self, factor: float) -> Blob:
        """The same shape, larger or smaller about its centre."""
        return replace(self, radii=self.radii * factor)


@dataclass(frozen=True)
class Tube:
    """Points within ``radius`` mm of a winding line with round ends: along the third column of
    ``axes`` from -half to +half mm, swaying by ``sway`` (2,) mm along the first two, ``turns``
    radians per mm."""

    centre: Float64
    half: float
    radius: float
    axes: Float64 = field(default_factory=lambda: np.eye(3))
    sway: tuple[float, float] = (0.0, 0.0)
    turns: float = 0.02
    phase: float = 0.0

    @property
    def reach(self) -> float:
        return self.half + self.radius + abs(self.sway[0]) + abs(self.sway[1])

    def contains(self, points: Float64) -> Bool:
        x, y, z = _turned(points, self)
        along = np.clip(z, -self.half, self.half)
        angle = self.turns * along + self.phase
        x = x - self.sway[0] * np.sin(angle)
        y = y - self.sway[1] * np.cos(angle)
        z = z - along
        inside: Bool = x * x + y * y + z * z < self.radius**2
        return inside


def _turned(points: Float64, solid: Blob | Tube) -> tuple[Float64, Float64, Float64]:
    """Points (3, ...) seen from a solid's centre, along its axes."""
    x, y, z = (points[i] - solid.centre[i] for i in range(3))
    axes = solid.axes
    if np.array_equal(axes, np.eye(3)):
        return x, y, z
    # Written out: a matrix product may round differently with the number of threads.
    first, second, third = (x * axes[0, i] + y * axes[1, i] + z * axes[2, i] for i in range(3))
    return first, second, third


@dataclass(frozen=True)
class Body:
    """A solid of one tissue: its intensity in each channel and the label it carries (0 for none).
    Where ``within`` is given, only the part inside that solid."""

    solid: Solid
    tissue: tuple[float, ...]
    label: int = 0
    within: Solid | None = None

    def contains(self, points: Float64) -> Bool:
        """Which points (3, ...), in mm, the body holds."""
        inside = self.solid.contains(points)
        return inside if self.within is None else inside & self.within.contains(points)


@dataclass(frozen=True)
class Scene:
    """A case, decided: bodies in the order in which they are painted over ``outside``, the scan's
    grid, the standard deviation of its noise in each channel, the strength of its bias field (0.2
    is a fifth up or down) and the least intensity."""

    grid: Grid
    bodies: tuple[Body, ...]
    outside: tuple[float, ...]
    noise: tuple[float, ...]
    bias: float = 0.0
    floor: float = 0.0

    def labels(self) -> NDArray[np.uint8]:
        """The label (X, Y, Z) at each voxel's centre."""
        return self._label_of()[self._topmost(self.grid)]

    def instances(self) -> NDArray[np.uint8]:
        """For each voxel's centre (X, Y, Z) the number, from 1, of the labelled body that it shows; 0
        where it shows none."""
        labels = self._label_of()
        numbers = np.where(labels > 0, np.cumsum(labels > 0), 0)
        return numbers.astype(np.uint8)[self._topmost(self.grid)]

    def labels_at(self, points: ArrayLike) -> NDArray[np.uint8]:
        """The label (...) at points (..., 3) in mm."""
        where = np.moveaxis(np.asarray(points, dtype=np.float64), -1, 0)
        top = np.zeros(where.shape[1:], dtype=np.uint8)
        for number, body in enumerate(self.bodies, start=1):
            top[body.contains(where)] = number
        return self._label_of()[top]

    def image(self, rng: Generator) -> NDArray[np.int16]:
        """Intensities (C, X, Y, Z): the tissue at 2x2x2 points of each voxel averaged, times the
        bias field, plus noise."""
        fine = self._topmost(self.grid.with_spacing(np.asarray(self.grid.spacing) / 2))
        x, y, z = self.grid.shape
        values = np.empty((len(self.outside), x, y, z))
        for channel, (outside, noise) in enumerate(zip(self.outside, self.noise, strict=True)):
            shade = np.array([outside, *(body.tissue[channel] for body in self.bodies)], dtype=np.float32)[fine]
            mean = shade.reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5), dtype=np.float64)
            mean *= self._bias(rng)
            values[channel] = mean + noise * rng.standard_normal(mean.shape)
        return np.rint(np.clip(values, self.floor, 32767)).astype(np.int16)

    def _bias(self, rng: Generator) -> Float64:
        """A smooth field (X, Y, Z) about 1: half a wave or so across the volume."""
        if not self.bias:
            return np.ones(self.grid.shape)
        log = np.zeros(self.grid.shape)
        for _ in range(2):
            wave, phase = rng.uniform(-3.5, 3.5, 3), rng.uniform(0, 2 * np.pi)
            i, j, k = (w * np.linspace(-0.5, 0.5, n) for w, n in zip(wave, self.grid.shape, strict=True))
            log += np.sin(i[:, None, None] + j[:, None] + k + phase)
        return np.asarray(np.exp(self.bias / 2 * log))

    def _label_of(self) -> NDArray[np.uint8]:
        return np.array([0, *(body.label for body in self.bodies)], dtype=np.uint8)

    def _topmost(self, grid: Grid) -> NDArray[np.uint8]:
        """For each voxel's centre the number (from 1) of the last body that holds it, or 0."""
        top = np.zeros(grid.shape, dtype=np.uint8)
        for number, body in enumerate(self.bodies, start=1):
            box = _box(grid, body.solid)
            if all(side.start < side.stop for side in box):
                top[box][body.contains(_centres(grid, box))] = number
        return top


def _box(grid: Grid, solid: Solid) -> tuple[slice, slice, slice]:
    """The voxels among which all of a solid's lie."""
    middle = grid.to_index(solid.centre)
    half = solid.reach * np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1)
    low = np.maximum(np.floor(middle - half), 0).astype(int)
    high = np.minimum(np.ceil(middle + half) + 1, grid.shape).astype(int)
    i, j, k = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return i, j, k


def _centres(grid: Grid, box: tuple[slice, slice, slice]) -> Float64:
    """Centres (3, ...) in mm of a box of voxels."""
    i, j, k = (np.arange(side.start, side.stop, dtype=np.float64) for side in box)
    a = grid.affine
    return np.stack([(a[r, 0] * i[:, None, None] + a[r, 3]) + a[r, 1] * j[:, None] + a[r, 2] * k for r in range(3)])


# Drawing


def _between(rng: Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _near(rng: Generator, at: ArrayLike, spread: ArrayLike) -> Float64:
    """A point (3,) within ``spread`` mm of another, along each axis."""
    return np.asarray(np.asarray(at, dtype=np.float64) + np.asarray(spread) * rng.uniform(-1, 1, 3))


def _turn(rng: Generator, most: float) -> Float64:
    """A rotation (3, 3) by at most ``most`` degrees about each of z, y and x."""
    axes = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-most, most, 3))):
        c, s = np.cos(angle), np.sin(angle)
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
        axes = np.array([[(axes[i] * turn[:, j]).sum() for j in range(3)] for i in range(3)])
    return axes


def _ripples(rng: Generator, height: float, count: int = 3, wave: float = 3.0) -> tuple[Ripple, ...]:
    """``count`` harmonics that together rise to at most ``height``."""
    return tuple(Ripple(height / count, rng.uniform(-wave, wave, 3), _between(rng, 0, 2 * np.pi)) for _ in range(count))


def _blob(
    rng: Generator, centre: ArrayLike, radii: ArrayLike, *, turn: float = 15, height: float = 0.12, wave: float = 3.0
) -> Blob:
    """A blob whose semi-axes differ by up to a tenth from ``radii``."""
    size = np.asarray(radii, dtype=np.float64) * rng.uniform(0.9, 1.1, 3)
    return Blob(np.asarray(centre, dtype=np.float64), size, _turn(rng, turn), ripples=_ripples(rng, height, wave=wave))


def _grid(
    rng: Generator, middle: Float64, extent: ArrayLike, spacing: ArrayLike, *, oblique: float = 0, flip: bool = False
) -> Grid:
    """A scan of about ``extent`` mm about ``middle``, its axes tilted by up to ``oblique`` degrees
    and, on request, stored left and posterior first as DICOM does."""
    step = np.asarray(spacing, dtype=np.float64).round(3)
    shape = np.rint(np.asarray(extent) / step).astype(int)
    axes = _turn(rng, oblique) * (np.array([-1, -1, 1]) if flip else 1)
    matrix = axes * step
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = middle - (matrix * (shape - 1) / 2).sum(axis=1)
    # NIfTI holds the affine as float32; the formula must see the same centres as a reader.
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine.astype(np.float32).astype(np.float64))


# Scenes


def _abdomen(rng: Generator) -> Scene:
    """A CT in the portal phase: liver, spleen, right and left kidney, aorta, gallbladder."""
    s = _between(rng, 0.86, 1.14)
    fat, muscle = (_between(rng, -115, -90),), (_between(rng, 60, 80),)
    liver, spleen = (_between(rng, 90, 110),), (_between(rng, 145, 162),)
    kidney, vessel = (_between(rng, 205, 228),), (_between(rng, 285, 320),)
    # Bile dense with contrast; bone, and bowel with contrast by mouth, look the same.
    bile, water = (_between(rng, 375, 410),), (_between(rng, 0, 15),)
    origin = _near(rng, (0, 0, 0), (25, 25, 40))

    def at(x: float, y: float, z: float, spread: ArrayLike = (0, 0, 0)) -> Float64:
        return _near(rng, origin + np.array([x, y, z]) * s, spread)

    torso = Blob(
        origin,
        np.array([_between(rng, 130, 150), _between(rng, 92, 106), 500]) * s,
        square=0.4,
        ripples=_ripples(rng, 0.04),
    )
    cavity = torso.grown(_between(rng, 0.8, 0.86))
    bodies = [Body(torso, fat), Body(torso.grown(_between(rng, 0.91, 0.95)), muscle), Body(cavity, fat)]
    for side in (1, -1):
        bodies.append(Body(_blob(rng, at(side * 38, -68, 0), np.array([26, 22, 400]) * s, turn=3), muscle))
        psoas = Tube(at(side * 38, -38, -70), 60 * s, _between(rng, 13, 17) * s)
        bodies.append(Body(psoas, muscle))
    bodies.append(Body(Tube(at(0, -58, 0), 300, 21 * s), bile))
    bodies.append(Body(Tube(at(0, -84, 0), 300, 9 * s), (_between(rng, 20, 40),)))
    # Look-alikes: bowel, stomach and nodes of the organs' own intensities, painted first so that
    # no organ hides behind one.
    stomach = _blob(rng, at(-40, 45, 45, (20, 12, 25)), np.array([42, 30, 42]) * s, turn=30)
    bodies.append(Body(stomach, liver, within=cavity))
    for tissue in (liver, liver, spleen, spleen, kidney, kidney, vessel, vessel, bile, bile, water):
        loop = Tube(
            at(0, 48, -36, (85, 22, 36)),
            _between(rng, 20, 45) * s,
            _between(rng, 11, 16) * s,
            _turn(rng, 90),
            (_between(rng, 6, 14), _between(rng, 6, 14)),
            _between(rng, 0.04, 0.08),
            _between(rng, 0, 6),
        )
        bodies.append(Body(loop, tissue, within=cavity))
    for _ in range(4):
        node = _blob(rng, at(0, 45, -36, (90, 25, 40)), rng.uniform(8, 14, 3) * s)
        bodies.append(Body(node, (vessel, kidney)[int(rng.integers(2))], within=cavity))
    # The organs. Breath and build move them along z together, and each by itself.
    breath = _between(rng, -15, 15)
    right, left = breath + _between(rng, -9, 9), breath + _between(rng, -9, 9)
    lobe = _blob(rng, at(68, 5, 48 + breath, (10, 10, 10)), np.array([60, 62, 58]) * rng.uniform(0.8, 1.15) * s)
    bodies.append(Body(lobe, liver, 1, cavity))
    middle = _blob(rng, lobe.centre + np.array([-52, 28, 12]) * s, np.array([42, 28, 30]) * s)
    bodies.append(Body(middle, liver, 1, cavity))
    milt = _blob(
        rng, at(-88, -22, 48 + breath, (10, 12, 14)), np.array([28, 40, 42]) * rng.uniform(0.85, 1.2) * s, turn=25
    )
    bodies.append(Body(milt, spleen, 2, cavity))
    cava = Tube(at(18, -28, 0, (6, 6, 0)), 260, _between(rng, 9, 12) * s, sway=(5, 5), phase=_between(rng, 0, 6))
    bodies.append(Body(cava, spleen))
    for label, side, shift in ((3, 1, right), (4, -1, left)):
        size = np.array([29, 30, 45]) * rng.uniform(0.88, 1.15) * s
        bean = _blob(rng, at(side * 66, -38, -22 + shift, (10, 8, 9)), size, turn=20, height=0.06)
        bodies.append(Body(bean, kidney, label, cavity))
        sinus = Blob(bean.centre - np.array([side * 20, -3, 0]) * s, np.array([14, 9, 16]) * s)
        bodies.append(Body(sinus, fat, within=bean))
    aorta = Tube(
        at(-12, -26, 0, (8, 6, 0)),
        260,
        _between(rng, 13, 16) * s,
        sway=(_between(rng, 3, 12), 5),
        phase=_between(rng, 0, 6),
    )
    bodies.append(Body(aorta, vessel, 5))
    bag = _blob(
        rng,
        lobe.centre + _near(rng, np.array([-25, 35, -45]) * s, 10),
        np.array([20, 20, 29]) * _between(rng, 0.9, 1.2) * s,
        turn=30,
        height=0.05,
    )
    bodies.append(Body(bag, bile, 6, cavity))
    view = _near(rng, origin + np.array([0, -5, 18]), (18, 13, 19))
    extent = rng.uniform((240, 180, 150), (290, 220, 195))
    step = _between(rng, 4.2, 5.4)
    grid = _grid(rng, view, extent, (step, step, _between(rng, 5, 7)), flip=rng.random() < 0.3)
    return Scene(grid, tuple(bodies), (-1000.0,), (_between(rng, 9, 14),), floor=-1024)


def _brain(rng: Generator) -> Scene:
    """FLAIR, T1w, T1 with contrast and T2w of a brain without its skull, with one tumour."""
    s = _between(rng, 0.9, 1.08)
    gain = rng.uniform(0.7, 1.4, 4)

    def tissue(flair: float, t1: float, t1gd: float, t2: float) -> tuple[float, ...]:
        return tuple(float(v) for v in gain * np.array([flair, t1, t1gd, t2]) * rng.uniform(0.95, 1.05, 4))

    csf, grey, white = tissue(110, 180, 180, 900), tissue(420, 400, 420, 480), tissue(340, 520, 540, 370)
    oedema, core, rim = tissue(660, 380, 400, 700), tissue(520, 260, 280, 780), tissue(560, 400, 860, 600)
    # Old white-matter disease is as bright on FLAIR as oedema but hardly changed on T1 and T2.
    lesion, vessel = tissue(660, 500, 520, 450), tissue(200, 380, 860, 250)
    gland = tissue(400, 420, 850, 420)

    def at(x: float, y: float, z: float, spread: ArrayLike = (0, 0, 0)) -> Float64:
        return _near(rng, np.array([x, y, z]) * s, spread)

    whole = Blob(at(0, 0, 0), np.array([66, 82, 62]) * s * rng.uniform(0.93, 1.07, 3), square=0.2)
    brain = replace(whole.grown(0.95), ripples=_ripples(rng, 0.05, 3, 14))
    inner = replace(whole.grown(0.8), ripples=_ripples(rng, 0.14, 3, 16))
    bodies = [Body(whole, csf), Body(brain, grey), Body(inner, white)]
    bodies += [Body(_blob(rng, at(side * 24, 0, -2), np.array([10, 20, 12]) * s), grey) for side in (1, -1)]
    # Look-alikes: white-matter disease, an old infarct with its bright rim, vessels, nodules that
    # enhance but belong to no tumour.
    for _ in range(7):
        spot = _blob(rng, at(0, 0, 5, (48, 58, 40)), rng.uniform(6, 15, 3) * s, turn=90, height=0.2)
        bodies.append(Body(spot, lesion, within=brain))
    scar = _blob(rng, at(0, 0, 5, (46, 58, 38)), rng.uniform(13, 20, 3) * s, turn=90)
    bodies += [Body(scar, lesion, within=brain), Body(scar.grown(0.65), csf, within=brain)]
    bodies.append(Body(Tube(at(0, 0, 56), 60 * s, 4.5, np.eye(3)[:, [0, 2, 1]], (2, 3)), vessel, within=whole))
    for _ in range(4):
        line = Tube(
            at(0, 0, 0, (50, 60, 40)), _between(rng, 15, 35), _between(rng, 3, 4.5), _turn(rng, 90), (6, 6), 0.1
        )
        bodies.append(Body(line, vessel, within=whole))
    for _ in range(3):
        nodule = _blob(rng, at(0, 0, 0, (55, 68, 50)), rng.uniform(5, 10, 3) * s)
        bodies.append(Body(nodule, gland, within=whole))
    # The tumour: oedema, then the enhancing rim, then the core, off its centre.
    side = 1 if rng.random() < 0.5 else -1
    place = at(side * 32, 0, 6, (12, 42, 22))
    swelling = _blob(rng, place, rng.uniform(25, 36) * rng.uniform(0.85, 1.15, 3) * s, turn=90, height=0.25)
    bodies.append(Body(swelling, oedema, 1, brain))
    for half in (1, -1):
        horn = _blob(rng, at(half * 11, -4, 6), np.array([6, 26, 10]) * s, turn=8)
        bodies.append(Body(horn, csf))
    mass = _blob(rng, place + rng.uniform(-5, 5, 3), rng.uniform(16, 21) * rng.uniform(0.9, 1.1, 3) * s, turn=90)
    bodies.append(Body(mass, rim, 3, brain))
    middle = replace(mass.grown(_between(rng, 0.56, 0.64)), centre=mass.centre + rng.uniform(-2, 2, 3))
    bodies.append(Body(middle, core, 2, brain))
    extent = rng.uniform((138, 165, 126), (156, 186, 144))
    grid = _grid(rng, _near(rng, (0, 0, 0), 8), extent, (3, 3, 3), oblique=0)
    noise = tuple(float(v) for v in gain * rng.uniform(12, 24, 4))
    return Scene(grid, tuple(bodies), (0.0,) * 4, noise, bias=0.15)


def _prostate(rng: Generator) -> Scene:
    """T2w and ADC of a prostate: peripheral and transition zone."""
    s = _between(rng, 0.8, 1.2)
    gain = _between(rng, 0.7, 1.4)
    origin = _near(rng, (0, 0, 0), (20, 20, 15))

    def tissue(t2: float, adc: float) -> tuple[float, ...]:
        drawn = np.array([gain * t2, adc]) * rng.uniform(0.93, 1.07, 2)
        return float(drawn[0]), float(drawn[1])

    fat, muscle, bone = tissue(520, 350), tissue(190, 1150), tissue(330, 400)
    urine, gel, wall = tissue(800, 2700), tissue(620, 2300), tissue(280, 1350)
    outer, inner, nodule = tissue(560, 1750), tissue(330, 1250), tissue(430, 1400)

    def at(x: float, y: float, z: float, spread: ArrayLike = (0, 0, 0)) -> Float64:
        return _near(rng, origin + np.array([x, y, z]) * s, spread)

    everything = Blob(origin, np.full(3, 400.0))
    bodies = [Body(everything, fat)]
    for side in (1, -1):
        bodies.append(Body(_blob(rng, at(side * 50, 8, 0, 5), np.array([14, 40, 60]) * s), muscle))
        bodies.append(Body(_blob(rng, at(side * 31, -8, -16, 3), np.array([5, 26, 26]) * s), muscle))
        bodies.append(Body(_blob(rng, at(side * 16, 44, -8, 3), np.array([14, 10, 18]) * s), bone))
    bladder = _blob(rng, at(0, 14, 50, (6, 6, 4)), np.array([34, 28, 26]) * s)
    bodies += [Body(bladder.grown(1.15), wall), Body(bladder, urine)]
    bowel = Tube(at(0, -36, 0, (6, 3, 0)), 100, _between(rng, 10, 15) * s, sway=(4, 3), phase=_between(rng, 0, 6))
    bodies += [Body(replace(bowel, radius=bowel.radius + 4), wall)]
    bodies.append(Body(bowel, gel if rng.random() < 0.5 else (20.0, 100.0)))
    # Look-alikes: seminal vesicles, venous plexus and bulb shine like the peripheral zone; nodes
    # and the bladder's wall like the transition zone.
    for side in (1, -1):
        vesicle = _blob(rng, at(side * 16, -16, 27, 3), np.array([15, 7, 9]) * s, turn=20, height=0.2)
        bodies.append(Body(vesicle, outer))
        plexus = Tube(at(side * 27, 12, 4, 6), 18 * s, _between(rng, 4, 6), _turn(rng, 20), (3, 3), 0.1)
        bodies.append(Body(plexus, outer))
        bodies.append(Body(_blob(rng, at(side * 36, 20, 10, 10), rng.uniform(6, 11, 3), turn=90), inner))
        bodies.append(Body(_blob(rng, at(side * 34, -25, 0, 8), rng.uniform(5, 9, 3), turn=90), nodule))
    bodies.append(Body(_blob(rng, at(0, -6, -38, 4), np.array([16, 14, 12]) * s), outer))
    # The gland.
    gland = _blob(rng, at(0, 0, 0, (3, 3, 3)), np.array([25, 19, 22]) * s, turn=8, height=0.08)
    bodies.append(Body(gland, outer, 1))
    share = _between(rng, 0.68, 0.8)
    centre = gland.centre + np.array([0, 5.5, 2]) * s
    zone = _blob(rng, centre, gland.radii * share * np.array([1, 0.95, 1]), turn=8, height=0.1)
    bodies.append(Body(zone, inner, 2, gland))
    for _ in range(4):
        grain = _blob(rng, _near(rng, zone.centre, zone.radii * 0.6), rng.uniform(3, 7, 3) * s, turn=90)
        bodies.append(Body(grain, nodule, 2, zone))
    oblique = 12.0 if rng.random() < 0.4 else 0.0
    step = _between(rng, 0.95, 1.25)
    extent = (*rng.uniform(76, 90, 2), 4 * int(rng.integers(13, 19)))
    grid = _grid(rng, _near(rng, origin, (15, 15, 8)), extent, (step, step, 4), oblique=oblique)
    return Scene(grid, tuple(bodies), (0.0, 0.0), (gain * _between(rng, 15, 28), _between(rng, 60, 100)), bias=0.15)


def _counted(rng: Generator) -> Scene:
    """CT of 3 to 12 spheres and as many winding tubes, apart from each other and wholly in view."""
    spacing = (1.5, 1.5, _between(rng, 3.0, 4.0)) if rng.random() < 0.4 else (_between(rng, 1.4, 1.7),) * 3
    oblique = 10.0 if rng.random() < 0.3 else 0.0
    extent = rng.uniform(100, 112, 3)
    grid = _grid(rng, _near(rng, (0, 0, 0), 30), extent, spacing, oblique=oblique, flip=rng.random() < 0.3)
    # Further apart than two voxels that touch by a corner, so that no two things are one component.
    gap = float(np.linalg.norm(grid.spacing)) + 0.5
    taken: list[tuple[Float64, float]] = []

    def place(draw: Callable[[Float64], Blob | Tube]) -> Blob | Tube | None:
        for _ in range(400):
            solid = draw(grid.to_world(rng.uniform(0, 1, 3) * (np.array(grid.shape) - 1)))
            line, radius = _skeleton(solid)
            inside = np.array(grid.shape) - 1 - radius / np.array(grid.spacing)
            at = grid.to_index(line)
            if (at < radius / np.array(grid.spacing)).any() or (at > inside).any():
                continue
            if all(_distance(line, other) > radius + size + gap for other, size in taken):
                taken.append((line, radius))
                return solid
        return None

    def tissue() -> tuple[float, ...]:
        return (_between(rng, 110, 190),)

    def sphere(at: Float64) -> Blob:
        return Blob(at, np.full(3, _between(rng, 4, 8)))

    def tube(at: Float64) -> Tube:
        sway = (_between(rng, 0, 4), _between(rng, 0, 4))
        turns, phase = _between(rng, 0.1, 0.2), _between(rng, 0, 6)
        return Tube(at, _between(rng, 9, 17), _between(rng, 2.5, 4), _turn(rng, 180), sway, turns, phase)

    def lump(at: Float64) -> Blob:
        return _blob(rng, at, np.full(3, _between(rng, 9, 12)), turn=90, height=0.5)

    def slab(at: Float64) -> Blob:
        return _blob(rng, at, (_between(rng, 8, 12), _between(rng, 8, 12), 3), turn=180, height=0)

    middle = grid.to_world((np.array(grid.shape) - 1) / 2)
    bodies = []
    for _ in range(6):
        pocket = _blob(rng, _near(rng, middle, extent / 2), rng.uniform(12, 28, 3), turn=90, height=0.3)
        bodies.append(Body(pocket, (_between(rng, -110, 70),)))
    spheres, tubes = (int(n) for n in rng.integers(3, 13, 2))
    # Tubes first, which need the most room; last, as far as there is any left, what looks like either but is
    # none: lumps, slabs and shells of the same intensities.
    found = [(2, place(tube)) for _ in range(tubes)]
    found += [(1, place(sphere)) for _ in range(spheres)]
    decoys = [place(draw) for draw in (lump, slab) * 3]
    shells = [place(lambda at: Blob(at, np.full(3, _between(rng, 6, 9)))) for _ in range(3)]
    bodies += [Body(one, tissue()) for one in (*decoys, *shells) if one]
    bodies += [Body(one.grown(0.6), (_between(rng, 0, 60),)) for one in shells if isinstance(one, Blob)]
    bodies += [Body(one, tissue(), label) for label, one in found if one]
    return Scene(grid, tuple(bodies), (_between(rng, 30, 50),), (_between(rng, 15, 30),), floor=-1024)


def _skeleton(solid: Blob | Tube) -> tuple[Float64, float]:
    """Points (n, 3) in mm and the radius about them within which a solid lies: a tube's line, each mm, or
    a blob's centre."""
    if isinstance(solid, Blob):
        return solid.centre[None], solid.reach
    along = np.linspace(-solid.half, solid.half, int(2 * solid.half) + 2)
    angle = solid.turns * along + solid.phase
    sides = (solid.sway[0] * np.sin(angle), solid.sway[1] * np.cos(angle), along)
    # Half a step between points is less than what is added to the gap.
    line = sum(side[:, None] * axis for side, axis in zip(sides, solid.axes.T, strict=True))
    return solid.centre + line, solid.radius


def _distance(one: Float64, other: Float64) -> float:
    """The least distance between two sets of points (n, 3)."""
    apart = one[:, None] - other
    return float(np.sqrt((apart * apart).sum(axis=2).min()))


# Tasks


@dataclass(frozen=True)
class Builder:
    """How the cases of a task are made. ``number`` sets its random numbers apart from those of
    other tasks; ``draw`` decides a scene; a case shows at least ``least`` voxels of every label.
    Where the labelled bodies are ``counted``, each is an instance, and is written as one."""

    folder: str
    number: int
    description: str
    channels: tuple[str, ...]
    labels: LabelSet
    draw: Callable[[Generator], Scene]
    least: int
    counted: bool = False

    def scene(self, case: int, seed: int) -> tuple[Scene, Generator]:
        """A case, and the generator of its noise. Neither depends on how many cases there are."""
        pose, noise = SeedSequence(seed, spawn_key=(self.number, case)).spawn(2)
        rng = np.random.default_rng(pose)
        while True:
            scene = self.draw(rng)
            shown = np.bincount(scene.labels().ravel(), minlength=len(self.labels) + 1)
            if shown.min() >= self.least:
                return scene, np.random.default_rng(noise)


TASKS: dict[str, Builder] = {
    "abdomen": Builder(
        "Phantom_Abdomen",
        1,
        "Six organs of very different size in CT, among bowel and nodes of the same intensities",
        ("CT",),
        LabelSet.from_names(["liver", "spleen", "right_kidney", "left_kidney", "aorta", "gallbladder"]),
        _abdomen,
        60,
    ),
    "brain": Builder(
        "Phantom_Brain",
        2,
        "A brain tumour in three nested regions, among old lesions, vessels and nodules",
        ("FLAIR", "T1w", "T1gd", "T2w"),
        LabelSet.from_names(["edema", "non-enhancing tumor", "enhancing tumour"]),
        _brain,
        60,
    ),
    "prostate": Builder(
        "Phantom_Prostate",
        3,
        "Peripheral and transition zone of the prostate in 4 mm slices, some of them oblique",
        ("T2", "ADC"),
        LabelSet.from_names(["PZ", "TZ"]),
        _prostate,
        200,
    ),
    "counted": Builder(
        "Phantom_Counted",
        4,
        "Spheres and tubes to be counted in CT, among lumps, slabs and shells of the same intensities",
        ("CT",),
        LabelSet.from_names(["sphere", "tube"]),
        _counted,
        60,
        counted=True,
    ),
}


def truth(task: str, case: int, seed: int, points: ArrayLike) -> NDArray[np.uint8]:
    """The label (...) at points (..., 3), in mm (RAS+), of one case: the formula behind its file.

    Raises InputError for a task that is not in `TASKS`.
    """
    return _builder(task).scene(case, seed)[0].labels_at(points)


def counted(task: str, case: int, seed: int) -> tuple[Body, ...]:
    """The labelled bodies of one case of a task in which they are counted, that of instance 1 first: how many
    there are, of which label, where and how large.

    Raises InputError for a task that is not in `TASKS`, or in which nothing is counted.
    """
    builder = _builder(task)
    if not builder.counted:
        raise InputError(f"nothing is counted in the phantom {task!r}", "Take one that has instancesTr")
    return tuple(body for body in builder.scene(case, seed)[0].bodies if body.label)


def phantom(folder: Path, name: str, *, cases: int = 20, seed: int = 0, progress: Progress = silent) -> Path:
    """Write a task of ``TASKS`` as Decathlon has them, below ``folder``, and return its folder.

    ``cases`` are labelled; the two that follow them in number are not. The same seed gives the same
    bytes, and case i is the same however many there are. dataset.json is written last, so that a run
    broken off leaves no task. Raises InputError for an unknown name, fewer than five cases, a
    negative seed, and a folder that holds something else.
    """
    builder = _builder(name)
    if cases < FEWEST_CASES:
        raise InputError(f"a phantom of {cases} cases", f"Ask for {FEWEST_CASES} or more, so that it can be split")
    if seed < 0:
        raise InputError(f"the seed {seed} is negative", "Give 0 or more")
    root = new_folder(Path(folder) / builder.folder, holds="dataset.json")
    _clear(root, name)
    files = [f"{name}_{case:03d}.nii.gz" for case in range(cases + UNLABELLED)]
    for case, file in progress(enumerate(files), len(files)):
        scene, rng = builder.scene(case, seed)
        part = "Tr" if case < cases else "Ts"
        write_volume(root / f"images{part}" / file, Volume(scene.image(rng), scene.grid))
        if case < cases:
            write_labels(root / "labelsTr" / file, LabelMap(scene.labels(), scene.grid, builder.labels))
        if case < cases and builder.counted:
            write_volume(root / "instancesTr" / file, Volume(scene.instances()[None], scene.grid))
    write_json(root / "dataset.json", _dataset(builder, files[:cases], files[cases:], seed))
    return root


def _builder(name: str) -> Builder:
    if name not in TASKS:
        raise InputError(f"no phantom is called {name!r}", f"Choose one of {', '.join(TASKS)}")
    return TASKS[name]


def _clear(root: Path, name: str) -> None:
    """Take away what an earlier run wrote, dataset.json first."""
    (root / "dataset.json").unlink(missing_ok=True)
    for part in ("imagesTr", "labelsTr", "instancesTr", "imagesTs"):
        for file in (root / part).glob(f"{name}_[0-9]*.nii.gz"):
            file.unlink()


def _dataset(builder: Builder, train: list[str], test: list[str], seed: int) -> dict[str, Any]:
    """dataset.json in the words of the Medical Segmentation Decathlon."""
    return {
        "name": builder.folder,
        "description": builder.description,
        "reference": f"medseg phantom, seed {seed}",
        "licence": "CC0-1.0",
        "release": "1.0",
        "tensorImageSize": "4D" if len(builder.channels) > 1 else "3D",
        "modality": {str(number): channel for number, channel in enumerate(builder.channels)},
        "labels": {"0": "background", **{str(label.number): label.name for label in builder.labels}},
        "numTraining": len(train),
        "numTest": len(test),
        "training": [{"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"} for file in train],
        "test": [f"./imagesTs/{file}" for file in test],
    }

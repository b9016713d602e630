"""One scan in, one label map out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.instances import InstanceMap
from medseg.core.progress import Progress, silent
from medseg.core.shape import cut, pieces
from medseg.core.volume import LabelMap, Volume
from medseg.infer.budget import within
from medseg.infer.engine import Engine, open_engine
from medseg.infer.instances import Gathered, kept
from medseg.infer.refine import chosen, keep_only, post_processed, without_small
from medseg.infer.scout import scout, scouting
from medseg.infer.stream import Decision, Keep, Tally, bring_home
from medseg.infer.trust import Flag, Found, expected_dice, review
from medseg.infer.window import QUICK_OVERLAP, Box, Tiling, sweep
from medseg.models.calibration import Calibration
from medseg.models.experience import Mismatch, compare, refuse_gross
from medseg.models.package import ModelPackage
from medseg.plan.cost import OVERLAP
from medseg.plan.plan import Configuration, Plan
from medseg.preprocess.regrid import home_thick, masked, network_grid, occupied, preprocess

Thoroughness = Literal["quick", "normal", "quality"]

# A voxel's thing, and how likely it is.
_THINGS_BYTES = 3
# More than this share of a structure taken away by the model's own post-processing is told.
_MUCH = 0.1


@dataclass(frozen=True)
class Organ:
    """What was found of one structure. ``confidence`` is the mean probability of its voxels on the network's
    grid, None where it has none; ``predicted_dice`` the overlap with the truth that a calibrated model
    expects, None where there is no calibration; ``cut`` says that it reaches the border of the scan, so
    that its volume is a lower bound; ``pieces`` in how many far-apart pieces it lies."""

    name: str
    number: int
    voxels: int
    volume_ml: float
    confidence: float | None
    cut: bool
    predicted_dice: float | None = None
    pieces: int = 0


@dataclass(frozen=True)
class Prediction:
    """Labels on the scan's own grid, organ by organ, which model made them, and what to beware of (the
    reasons of ``flags`` are among the ``warnings``); where it was asked for, the probability (X, Y, Z)
    of what won each voxel; how far the model can be believed, None where that was never measured; and the
    things that it counted, None where it is no model for that."""

    label_map: LabelMap
    organs: tuple[Organ, ...]
    model: str
    model_digest: str
    seconds: float
    warnings: tuple[str, ...] = ()
    probability: NDArray[np.float32] | None = None
    flags: tuple[Flag, ...] = ()
    calibration: Calibration | None = None
    instances: InstanceMap | None = None

    @property
    def review(self) -> bool:
        """Whether a person should look before the result is used."""
        return any(flag.review for flag in self.flags)


class Predictor:
    """A model loaded once, for many scans.

    ``engine`` is one of `medseg.infer.engine.ENGINES`. ``memory`` bounds, in bytes, what a prediction
    takes in all; by default most of what is free. Tiles overlap by half, and mirrored copies are averaged
    along the axes that training mirrored (so does nnU-Net). With a ``thoroughness`` of "quality" every
    tile is run, else only those near to what a pass without overlap suspects (`medseg.infer.scout`);
    with "quick" tiles overlap by a quarter and there are no mirrored copies, which costs more Dice than
    time is worth to most. ``overlap`` (0 to below 1) says otherwise.
    Raises InputError where the package's weights are not of the network that its plan describes.
    """

    def __init__(
        self,
        package: ModelPackage,
        engine: str = "auto",
        *,
        memory: int | None = None,
        threads: int | None = None,
        thoroughness: Thoroughness = "normal",
        overlap: float | None = None,
        scans_held: int = 1,
    ) -> None:
        self.package = package
        self.memory = memory
        self.threads = threads or len(os.sched_getaffinity(0))
        self.digest = package.digest()
        self.scouted = thoroughness != "quality"
        quick = thoroughness == "quick"
        self.overlap = (QUICK_OVERLAP if quick else OVERLAP) if overlap is None else overlap
        self.scans_held = scans_held
        # Things are found in what is not mirrored; their labels gain little by it.
        counts = package.configuration.network.value.counts
        mirror = () if quick or counts else package.plan.training.augmentation.value.mirror
        self.engine = open_engine(package, engine, self.threads, mirror)
        before = package.previous
        self._previous = (
            Predictor(before, engine, memory=memory, threads=threads, thoroughness=thoroughness, overlap=overlap)
            if before is not None
            else None
        )

    def before(self, volume: Volume, *, force: bool = False) -> LabelMap | None:
        """What the stage before finds in a scan; None for a model that has none."""
        return self._previous.predict(volume, force=force).label_map if self._previous else None

    def predict(
        self,
        volume: Volume,
        *,
        only: Sequence[str] = (),
        smallest_mm3: float = 0.0,
        probability: bool = False,
        keep: Keep | None = None,
        progress: Progress = silent,
        force: bool = False,
    ) -> Prediction:
        """Segment a scan. The labels are those after the package's own post-processing, if it has any.

        ``only`` names the structures to give (all unless named); pieces smaller than ``smallest_mm3``
        are taken away. With ``probability`` each voxel's is given, of whatever won it; ``keep`` is
        handed those of all classes box by box, as `bring_home` says. Raises InputError where the
        scan's channels are not the model's, where it is of another kind than all that the model was
        trained on (unless ``force``), and where it would need more memory than it may have.
        """
        started = time.perf_counter()
        mismatches = unlike(volume, self.package)
        if not force:
            refuse_gross(mismatches)
        calibration = self.package.calibration
        labels = chosen(self.package.plan.label_set, only)
        made = segment(
            self.engine,
            volume,
            self.package.plan,
            self.package.configuration_name,
            previous=self.before(volume, force=force),
            overlap=self.overlap,
            scouted=self.scouted,
            memory=self.memory,
            scans_held=self.scans_held,
            probability=probability,
            keep=keep,
            threads=self.threads,
            progress=progress,
            temperature=calibration.temperature if calibration else 1.0,
        )
        intensities = self.package.plan.normalisation.value
        label_map, shares = post_processed(made.label_map, volume, self.package.refinement, intensities)
        label_map, removed = without_small(keep_only(label_map, labels), smallest_mm3)
        organs = describe(label_map, made.tally, self.package.plan.label_set.numbers, calibration)
        found = [Found(o.name, o.number, o.volume_ml, o.cut, o.pieces, o.predicted_dice) for o in organs]
        flags = review(found, mismatches, self.package.experience, calibration)
        if not any(o.voxels for o in organs):
            flags += (Flag(None, "nothing was found"),)
        warnings = [flag.reason for flag in flags]
        warnings += [
            f"{share:.0%} of {name} was taken away as loose pieces, as post-processing of this model does"
            for name, share in shares.items()
            if share > _MUCH and name in labels.names
        ]
        warnings += [f"{count} small pieces of {name} were taken away" for name, count in removed.items()]
        warnings += self.engine.notes
        return Prediction(
            label_map,
            organs,
            self.package.name,
            self.digest,
            time.perf_counter() - started,
            tuple(warnings),
            made.probability,
            flags,
            calibration,
            None if made.instances is None else kept(made.instances, labels.numbers, smallest_mm3),
        )


def unlike(volume: Volume, package: ModelPackage) -> tuple[Mismatch, ...]:
    """How a scan differs from those that a model was trained on, the gravest first; nothing where that
    is not known."""
    plan, trained = package.plan, package.experience
    if trained is None or volume.channels != len(plan.channels):
        return ()  # of channels, preprocessing says what is wrong
    # An optional channel that is missing stands at one value.
    missing = [
        name
        for name, values in zip(plan.channels, volume.values, strict=True)
        if name in plan.optional_channels.value and values.min() == values.max()
    ]
    return compare(volume, trained, missing=missing)


def predict(volume: Volume, package: ModelPackage, *, engine: str = "auto") -> Prediction:
    """Segment one scan; for several, load a `Predictor` once."""
    return Predictor(package, engine).predict(volume)


@dataclass(frozen=True)
class Segmentation:
    """Labels on the scan's own grid; what was counted on the way; the probability (X, Y, Z) of each
    voxel's label, where that was asked for; and the things found, where the network looks for things."""

    label_map: LabelMap
    tally: Tally
    probability: NDArray[np.float32] | None
    instances: InstanceMap | None = None


def segment(
    engine: Engine,
    volume: Volume,
    plan: Plan,
    configuration_name: str,
    *,
    previous: LabelMap | None = None,
    overlap: float = OVERLAP,
    scouted: bool = False,
    memory: int | None = None,
    scans_held: int = 1,
    probability: bool = False,
    keep: Keep | None = None,
    threads: int = 1,
    progress: Progress = silent,
    temperature: float = 1.0,
) -> Segmentation:
    """Labels of a scan on its own grid, the probabilities being those of the logits divided by
    ``temperature``; ``previous`` are the labels of the stage before, if the model is one of two. Where
    ``scouted``, tiles far from anything that a first pass suspects are left out, if that pays, and if no
    things are to be found. Training validates by this very function."""
    configuration = plan.configuration(configuration_name)
    box = occupied(volume, configuration.orientation)
    tiling = _tiles(engine, volume, plan, configuration, box, overlap, memory, scans_held, probability)
    prepared = preprocess(volume, plan, configuration, previous, box=box)
    thick, imported = home_thick(volume.grid, configuration), configuration.grid == "shape"
    counts = configuration.network.value.counts
    sparse = scouting(tiling, configuration) if scouted and not counts else None
    gathered = Gathered(tiling.shape, configuration.slice_axis) if counts else None
    total = tiling.count + (sparse.count if sparse else 0)
    steps = iter(progress(range(total), total))

    def tell(count: int) -> None:
        for _ in range(count):
            next(steps, None)

    numbers = np.array([0, *plan.label_set.numbers])
    decision = Decision(len(numbers), plan.painted, temperature, engine.head)
    # An imported model gets every tile, as where it comes from, and weighs them as there.
    wanted = None if imported else _seen(prepared.values)
    if sparse:
        wanted = scout(engine, prepared.values, sparse, tiling, decision, seen=wanted, tell=tell)
    home = bring_home(
        sweep(
            engine,
            prepared.values,
            tiling,
            wanted=wanted,
            tell=tell,
            lopsided=imported,
            take=gathered.take if gathered else None,
        ),
        prepared.grid,
        volume.grid,
        decision,
        nearest=() if thick is None else (thick,),
        probability=probability,
        keep=keep,
        threads=threads,
    )
    next(steps, None)  # the end, which closes a bar
    values = home.winner
    if (numbers != np.arange(len(numbers))).any():
        values = numbers.astype(np.uint8 if numbers.max() < 256 else np.uint16)[values]
    things = gathered.home(prepared.grid, volume.grid, plan.label_set.numbers) if gathered else None
    return Segmentation(LabelMap(values, volume.grid, plan.label_set), home.tally, home.probability, things)


def require_memory(
    engine: Engine, volume: Volume, plan: Plan, configuration_name: str, *, memory: int | None = None
) -> None:
    """InputError where `segment` would be refused the ``memory`` (bytes) that it needs, without predicting."""
    configuration = plan.configuration(configuration_name)
    _tiles(engine, volume, plan, configuration, occupied(volume, configuration.orientation), memory=memory)


def _tiles(
    engine: Engine,
    volume: Volume,
    plan: Plan,
    configuration: Configuration,
    box: Grid,
    overlap: float = OVERLAP,
    memory: int | None = None,
    scans_held: int = 1,
    probability: bool = False,
) -> Tiling:
    """The tiles of `segment`, over a scan of which only ``box`` is not empty."""
    as_floats = 4 if masked(plan) else 0
    things = _THINGS_BYTES if configuration.network.value.counts else 0
    return within(
        memory,
        engine,
        configuration,
        network_grid(box, configuration),
        volume.grid,
        channels=plan.inputs(configuration),
        overlap=overlap,
        voxel_bytes=scans_held * (volume.channels * (volume.values.itemsize + as_floats) + 1 + things)
        + 4 * probability,
    )


def _seen(image: NDArray[np.float32]) -> Callable[[Box], bool] | None:
    """Whether a box of the image (C, X, Y, Z) shows anything: where every channel stands at its
    lowest value, as air does once it is clipped, no tile is run. None for an image that is constant."""
    lowest = [float(channel.min()) for channel in image]
    if all(float(channel.max()) == low for channel, low in zip(image, lowest, strict=True)):
        return None

    def seen(box: Box) -> bool:
        return any(float(part.max()) > low for part, low in zip(image[(slice(None), *box)], lowest, strict=True))

    return seen


def describe(
    label_map: LabelMap, tally: Tally, numbers: Sequence[int], calibration: Calibration | None = None
) -> tuple[Organ, ...]:
    """Volume, mean probability, predicted Dice and completeness of every structure of the map;
    ``numbers`` are those of the tally's classes, but for the background."""
    rows = dict(zip(numbers, zip(tally.inside[1:], tally.won[1:], strict=True), strict=True))
    expected = dict(zip(numbers, expected_dice(tally.probability, tally.inside, tally.won)[1:], strict=True))
    values = label_map.values
    counts = np.zeros(max(label_map.labels.numbers) + 1, dtype=np.int64)
    for number in range(values.shape[2]):
        counts += np.bincount(values[:, :, number].ravel(order="K"), minlength=len(counts))
    border, parts = cut(label_map), pieces(label_map)

    def predicted(number: int) -> float | None:
        if calibration is None or not counts[number] or np.isnan(expected[number]):
            return None
        return calibration.predict(float(expected[number]))

    return tuple(
        Organ(
            name=label.name,
            number=label.number,
            voxels=int(counts[label.number]),
            volume_ml=float(counts[label.number] * label_map.grid.voxel_volume / 1000),
            confidence=_mean(*rows[label.number]) if counts[label.number] else None,
            cut=label.number in border,
            predicted_dice=predicted(label.number),
            pieces=parts.get(label.number, 0),
        )
        for label in label_map.labels
    )


def _mean(total: float, count: int) -> float | None:
    return float(total / count) if count else None

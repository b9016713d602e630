"""How large a plan is and how long its training: as large as memory allows, and only as large as the time
suffices to teach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np

from medseg.core.errors import InputError
from medseg.plan import cost
from medseg.plan.cost import Cases, Estimate, Kind, Meter, Step, gib
from medseg.plan.fingerprint import Fingerprint
from medseg.plan.plan import STEPS_PER_EPOCH, Configuration, Cost, Decision, Three, Watching
from medseg.plan.watch import Pace

# A batch grows only once the patch holds the whole case, while it is less than this share of all voxels
# (as in nnU-Net) and so many steps fit.
_BATCHES = (3, 4, 6, 8, 12, 16)
_BATCH_SHARE = 0.05
_BATCH_STEPS = 10_000
# Without a budget; and more than these (nnU-Net's) teach nothing.
_USUAL_STEPS = {"cpu": 5_000, "gpu": 25_000}
_MOST_STEPS = 250_000
# Without a say in it; 8 GiB are what nnU-Net plans for.
USUAL_MEMORY = 8 * 2**30
# Multiplications a second where nothing was measured: two cores with AVX2; a GPU of the last years.
_SPEED = {"cpu": 4e10, "gpu": 1.5e13}
_CORES = 2
# To start and to end. A budget is twice that at the least.
_START_SECONDS = {"cpu": 5.0, "gpu": 15.0}
# Voxels of each structure whose places `medseg preprocess` keeps.
_PLACES = 20_000


@dataclass(frozen=True)
class Size:
    """How large a plan may be: voxels of a 3D patch, pixels of a 2D one, features of the first and of
    any stage. ``least_steps``: it is worth its time where so many steps fit. ``share``: a 3D patch need
    not hold more of a typical case."""

    voxels: int
    pixels: int
    first_features: int
    most_features: int
    least_steps: int
    share: float = 1.0


# From small to large. A processor's time is better spent on more steps of a narrow network, and of patches
# that hold 85 % of a case where cases are small, than on fewer of a wide one that sees all; below
# 48x48x48 a patch is made smaller only after that. That order is as measured on Task04 (benchmarks/train);
# the numbers are rules of thumb.
_MOST_OF_IT = 0.85
SIZES = (
    Size(24**3, 96**2, 8, 64, 0, _MOST_OF_IT),
    Size(32**3, 128**2, 8, 64, 100, _MOST_OF_IT),
    Size(48**3, 192**2, 8, 64, 300, _MOST_OF_IT),
    Size(48**3, 192**2, 16, 128, 5_000, _MOST_OF_IT),
    Size(64**3, 256**2, 24, 192, 10_000),
    Size(96**3, 384**2, 32, 256, 10_000),
    Size(128**3, 512**2, 32, 320, 10_000),
    Size(160**3, 512**2, 32, 320, 40_000),
    Size(192**3, 512**2, 32, 320, 80_000),
)
# Where patches hold most of small cases, on a processor, more features or more steps than these teach less than
# another network does, whose mean with the first is better than either: on Task04 3,000 and 5,000 steps of one gave
# 0.885, of one twice as wide 0.886, and the mean of two 0.888; a third added nothing on four folds (benchmarks/train).
_MEMBER_STEPS, _MOST_MEMBERS = 2_500, 2
# The largest without a budget, and the first to be measured.
_USUAL_SIZE = {"cpu": 3, "gpu": 6}


@dataclass(frozen=True)
class Target:
    """What the plan is for: a ``cpu`` or ``gpu``, the bytes that training may take (of the GPU; of the
    machine, for the whole process), whether it computes in bfloat16 (``half``), and how long training
    may last: seconds by configuration ("" stands for those not named), or a number of ``steps``."""

    kind: Kind = "cpu"
    memory: int = USUAL_MEMORY
    half: bool = False
    budgets: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None

    def budget(self, name: str) -> float | None:
        """Seconds for a configuration, None where nobody said."""
        return self.budgets.get(name, self.budgets.get(""))


def require_time(kind: Kind, name: str, budget: float, times: float = 1.0) -> None:
    """InputError for a budget of a configuration ("" for all) of which hardly anything is left for steps.
    ``times``: a run takes so many times the one that the budget is for."""
    least = 2 * _START_SECONDS[kind]
    if budget < least:
        raise InputError(
            f"a budget of {times * budget:g} s{f' for {name}' if name else ''} is no time to train: to start and to "
            f"end takes {_START_SECONDS[kind]:g} s",
            f"Allow {times * least:g} s at the least",
        )


# Compared and hashed by identity.
@dataclass(frozen=True, eq=False)
class _Candidate:
    configuration: Configuration
    size: Size
    estimate: Estimate


@dataclass
class _Known:
    """What was measured, by candidate; what it takes corrects what is reckoned of the others by the one
    that was measured ``last``."""

    kind: Kind
    steps: dict[_Candidate, Step] = field(default_factory=dict)
    last: _Candidate | None = None

    def note(self, candidate: _Candidate, step: Step) -> None:
        self.steps[candidate], self.last = step, candidate

    def memory(self, candidate: _Candidate) -> int:
        """Bytes that a step takes."""
        if candidate in self.steps:
            return self.steps[candidate].memory_bytes
        scale = self.steps[self.last].memory_bytes / self.last.estimate.memory_bytes if self.last else 1.0
        return int(scale * candidate.estimate.memory_bytes)

    def seconds(self, candidate: _Candidate) -> float:
        """Of one step within a run."""
        by = candidate if candidate in self.steps else self.last
        speed = by.estimate.work / self.steps[by].seconds if by else _SPEED[self.kind]
        return cost.FEEDING[self.kind] * candidate.estimate.work / speed


class Chooser:
    """Chooses each configuration's size by memory and time. A model averages so many mirrored ``copies``
    of what it predicts."""

    def __init__(
        self, measured: Fingerprint, classes: int, target: Target, meter: Meter | None, copies: int = 1
    ) -> None:
        self.measured, self.classes, self.target, self.meter = measured, classes, target, meter
        self.channels, self.copies = len(measured.intensities), copies
        # Of each configuration that was chosen, the seconds of a prediction.
        self._whole: dict[str, float] = {}

    def _further(self, configuration: Configuration) -> int:
        """Channels besides the scan's: the labels of the stage before, where there is one."""
        return self.classes - 1 if configuration.previous else 0

    def _inputs(self, configuration: Configuration) -> int:
        return self.channels + self._further(configuration)

    def choose(
        self, name: str, make: Callable[[Size], Configuration], sizes: Sequence[Size] = SIZES
    ) -> tuple[Configuration, Size]:
        """The configuration of the largest size whose memory fits and of which enough steps do.

        One of the middle is measured first; what it takes corrects what is reckoned of the others. The
        one chosen is measured too, and where that shows it to be too large, the next smaller one.
        """
        budget, known = self.target.budget(name), _Known(self.target.kind)
        if budget is not None:
            require_time(self.target.kind, name, budget)
        rungs = self._rungs(make, sizes)
        usual = SIZES[_USUAL_SIZE[self.target.kind]]
        fitting = [r for r in rungs if self._fits(r, known)]
        if not fitting:
            self._refuse(rungs[0], known)
        if budget is None and self.target.kind == "cpu":
            fitting = [r for r in fitting if r.size.voxels <= usual.voxels] or fitting[:1]
        smallest = fitting[0]
        chosen = max((r for r in fitting if r.size.voxels <= usual.voxels), key=_by_work, default=smallest)
        while self.meter and chosen not in known.steps:
            step = self._measure(chosen)
            if step is not None:
                known.note(chosen, step)
            elif chosen is not smallest:
                fitting = fitting[: fitting.index(chosen)]
            else:
                raise InputError(
                    f"memory runs out on this machine even with patches of {_by(chosen.configuration)} voxels",
                    "Free some, or plan for another machine",
                )
            # What none has been measured of yet is tried from large to small.
            chosen = self._largest(budget, fitting, known) if known.steps else fitting[-1]
        if not self.meter:
            chosen = self._largest(budget, fitting, known)
        return self._finished(name, chosen, known), chosen.size

    def _rungs(self, make: Callable[[Size], Configuration], sizes: Sequence[Size]) -> list[_Candidate]:
        """Different candidates from small to large; larger batches follow the largest patch, where as many
        of their steps fit as that patch is worth."""
        rungs: list[_Candidate] = []
        for size in sizes:
            made = make(size)
            wider = bool(rungs) and self._sees_enough(rungs[-1]) and _extent(rungs[-1].configuration) == _extent(made)
            if not wider and (not rungs or _decided(rungs[-1].configuration) != _decided(made)):
                rungs.append(self._candidate(made, size))
        last = rungs[-1]
        typical = self.measured.typical_shape(last.configuration.spacing.value)
        if last.configuration.dimensions == 3 and (np.array(last.configuration.patch.value) >= typical).all():
            in_all = float(np.prod(typical)) * len(self.measured.cases)
            least = max(_BATCH_STEPS, last.size.least_steps)
            for batch in _BATCHES:
                if batch * np.prod(last.configuration.patch.value) > _BATCH_SHARE * in_all:
                    break
                reason = "the patch holds a whole case, so that more memory and time go to the batch"
                more = last.configuration.model_copy(update={"batch": Decision[int](value=batch, reason=reason)})
                rungs.append(self._candidate(more, replace(last.size, least_steps=least)))
        return rungs

    def _sees_enough(self, candidate: _Candidate) -> bool:
        """Whether it has several members rather than more features, where there is time: a processor's, of
        patches that could hold more voxels and need not."""
        made, share = candidate.configuration, candidate.size.share
        typical = self.measured.typical_shape(made.spacing.value)
        small = share * float(np.prod(typical)) < candidate.size.voxels
        return self.target.kind == "cpu" and made.dimensions == 3 and share < 1 and small

    def _candidate(self, made: Configuration, size: Size) -> _Candidate:
        reckoned = cost.estimate(made, self._inputs(made), self.classes, kind=self.target.kind, half=self.target.half)
        return _Candidate(made, size, reckoned)

    def _cases(self, configuration: Configuration) -> Cases:
        voxels = self.measured.shapes_at(configuration.spacing.value).prod(axis=1)
        own = float(np.median(self.measured.shapes.prod(axis=1)))
        x, y, z = self.measured.typical_shape(configuration.spacing.value)
        return Cases(len(voxels), own, (float(x), float(y), float(z)), float(voxels.sum()))

    def _ram(self, candidate: _Candidate, known: _Known, watched: int | None = None) -> int:
        """Bytes of the whole process, which keeps so many cases to be watched."""
        made, kind = candidate.configuration, self.target.kind
        cases = self._cases(made)
        return cost.ram_bytes(
            cases,
            self.channels,
            self.classes,
            known.memory(candidate) + self._feed(made),
            kind=kind,
            watched=min(Watching().cases if watched is None else watched, cases.held_out),
            further=self._further(made),
        )

    def _feed(self, made: Configuration) -> int:
        return cost.feed_bytes(made, self._inputs(made), self.target.kind)

    def _need(self, candidate: _Candidate, known: _Known) -> int:
        """Bytes of what the target bounds: of the GPU, or of the process."""
        if self.target.kind == "gpu":
            return known.memory(candidate) + self._feed(candidate.configuration) + cost.GPU_OVERHEAD
        return self._ram(candidate, known)

    def _fits(self, candidate: _Candidate, known: _Known) -> bool:
        return self._need(candidate, known) <= self.target.memory

    def _refuse(self, smallest: _Candidate, known: _Known) -> NoReturn:
        option = "--gpu-memory" if self.target.kind == "gpu" else "--memory"
        raise InputError(
            f"even the smallest plan, patches of {_by(smallest.configuration)} voxels, takes "
            f"{gib(self._need(smallest, known))} to train, and {gib(self.target.memory)} are allowed",
            f"Allow more with {option}, or crop the scans",
        )

    def _measure(self, candidate: _Candidate) -> Step | None:
        """None where the machine has not the memory."""
        assert self.meter is not None  # noqa: S101 - only asked where there is one
        try:
            return self.meter(candidate.configuration, self._inputs(candidate.configuration), self.classes)
        except cost.DoesNotFitError:
            return None

    def _largest(self, budget: float | None, fitting: list[_Candidate], known: _Known) -> _Candidate:
        """The largest whose memory fits and of which enough steps do, by what is known."""
        best = None
        for candidate in fitting:
            if not self._fits(candidate, known):
                continue
            if best is None or self._length(candidate, budget, known)[0] >= candidate.size.least_steps:
                best = candidate
        if best is None and self.meter and fitting[0] not in known.steps:
            return fitting[0]  # what others take says no more than that it may not fit
        return best or self._refuse(fitting[0], known)

    def _pace(self, candidate: _Candidate, known: _Known) -> Pace:
        made, step = candidate.configuration, known.seconds(candidate)
        cases = self._cases(made)
        validation = cost.prediction_seconds(made, cases, step)
        # Engines are compared on the processor, with as many cores as a step was measured on.
        threads = known.steps[known.last].threads if known.last else None
        ratio = _SPEED["gpu"] / _SPEED["cpu"] * _CORES / (threads or _CORES) if self.target.kind == "gpu" else 1.0
        return Pace(
            start=_START_SECONDS[self.target.kind],
            step=step,
            validation=validation,
            whole=self.copies * validation + self._whole.get(made.previous or "", 0.0),
            tile=ratio * cost.tile_seconds(made, step),
            held_out=cases.held_out,
            every=STEPS_PER_EPOCH,
        )

    def _length(
        self, candidate: _Candidate, budget: float | None, known: _Known
    ) -> tuple[int, int, Decision[Watching]]:
        """Steps of each member, how many members, and how the run is watched."""
        several = self._sees_enough(candidate)
        if budget is None:
            members = _MOST_MEMBERS if several and not self.target.steps else 1
            steps = self.target.steps or (_MEMBER_STEPS if several else _USUAL_STEPS[self.target.kind])
            return steps, members, self._pace(candidate, known).of(members).usual(steps)
        for members in range(_MOST_MEMBERS if several else 1, 0, -1):
            pace = self._pace(candidate, known).of(members)
            watching = pace.watching(budget)
            steps = min(pace.steps(budget, watching.value), _MOST_STEPS)
            if members == 1 or steps >= _MEMBER_STEPS:
                break
        return steps, members, watching

    def _finished(self, name: str, chosen: _Candidate, known: _Known) -> Configuration:
        """With its length and cost, and what they stand on said."""
        budget, made, step = self.target.budget(name), chosen.configuration, known.steps.get(chosen)
        steps, members, watching = self._length(chosen, budget, known)
        one = self._pace(chosen, known)
        pace = one.of(members)
        self._whole[name] = pace.whole
        aside = pace.aside(steps, watching.value)
        cases = self._cases(made)
        costs = Cost(
            seconds_per_step=float(f"{one.step:.4g}"),
            memory_bytes=known.memory(chosen),
            ram_bytes=self._ram(chosen, known, watching.value.cases),
            disk_bytes=cost.disk_bytes(cases, self._inputs(made), self._label_voxels(made)),
            hours=float(f"{(steps * pace.step + aside) / 3600:.3g}"),
            measured_on=step.measured_on if step else None,
            threads=step.threads if step else None,
        )
        patch = Decision[Three](
            value=made.patch.value, reason=f"{made.patch.reason}; {self._room(chosen, step, costs.memory_bytes)}"
        )
        of = f"a step of {one.step:.3g} s, {'as measured' if step else 'as reckoned, not measured'}"
        length = Decision[int](value=steps, reason=f"{self._why(chosen, budget, steps, aside)}, with {of}")
        several = Decision[int](
            value=members,
            reason=f"cases are small: beyond {_MEMBER_STEPS:,} steps the mean of {members} networks is worth more than "
            "one that is trained longer",
        )
        return made.model_copy(
            update={
                "patch": patch,
                "steps": length,
                "members": several if members > 1 else None,
                "watching": watching,
                "cost": costs,
            }
        )

    def _room(self, chosen: _Candidate, step: Step | None, memory: int) -> str:
        allowed = f"of the {gib(self.target.memory)} that the {self.target.kind} may give"
        if step is None:
            return f"training takes about {gib(memory)} {allowed}, reckoned, not measured"
        return f"training takes {gib(memory)} {allowed} (measured; {gib(chosen.estimate.memory_bytes)} reckoned)"

    def _why(self, chosen: _Candidate, budget: float | None, steps: int, aside: float) -> str:
        if budget is None:
            return "as asked for" if self.target.steps else "the usual length, which --budget or --steps change"
        if steps == _MOST_STEPS:
            return f"as many as teach anything; the budget of {budget:g} s holds more"
        return (
            f"what fits {budget:g} s less {aside:.3g} s for start, validation, calibration and the comparison of "
            f"engines, this size being taken where {chosen.size.least_steps} steps fit"
        )

    def _label_voxels(self, configuration: Configuration) -> float:
        voxel = float(np.prod(configuration.spacing.value))
        sizes = [mm3 / voxel for case in self.measured.cases for mm3 in case.label_mm3.values()]
        return float(sum(min(size, _PLACES) for size in sizes))


def _by(configuration: Configuration) -> str:
    return "x".join(map(str, configuration.patch.value))


def _extent(configuration: Configuration) -> tuple[object, ...]:
    return configuration.patch.value, configuration.batch.value


def _decided(configuration: Configuration) -> tuple[object, ...]:
    """What tells candidates apart, whatever their reasons."""
    return configuration.patch.value, configuration.batch.value, configuration.network.value


def _by_work(candidate: _Candidate) -> float:
    return candidate.estimate.work

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
from medseg.plan.plan import Configuration, Cost, Decision, Three

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
# Of a budget: for start and end, so many seconds; for calibration and what else, such a share; never
# more than this of all.
_START_SECONDS = {"cpu": 5.0, "gpu": 15.0}
_ELSE_SHARE = 0.08
_MOST_ASIDE = 0.5
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


@dataclass(frozen=True)
class _Candidate:
    configuration: Configuration
    size: Size
    estimate: Estimate


class Chooser:
    """Chooses each configuration's size by memory and time."""

    def __init__(self, measured: Fingerprint, classes: int, target: Target, meter: Meter | None) -> None:
        self.measured, self.classes, self.target, self.meter = measured, classes, target, meter
        self.channels = len(measured.intensities)

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
        budget = self.target.budget(name)
        rungs = self._rungs(make, sizes)
        usual = SIZES[_USUAL_SIZE[self.target.kind]]
        fitting = [r for r in rungs if self._fits(r, r.estimate.memory_bytes)]
        if not fitting:
            self._refuse(rungs[0])
        if budget is None and self.target.kind == "cpu":
            fitting = [r for r in fitting if r.size.voxels <= usual.voxels] or fitting[:1]
        first = max((r for r in fitting if r.size.voxels <= usual.voxels), key=_by_work, default=fitting[0])
        step = self._measure(first) if self.meter else None
        while self.meter and step is None and first is not fitting[0]:
            fitting = fitting[: fitting.index(first)]
            first, step = fitting[-1], self._measure(fitting[-1])
        if self.meter and step is None:
            raise InputError(
                f"memory runs out on this machine even with patches of {_by(first.configuration)} voxels",
                "Free some, or plan for another machine",
            )
        known = {id(first): step} if step else {}
        while True:
            chosen = self._largest(name, fitting, first, step)
            if step is None or id(chosen) in known:
                break
            found = self._measure(chosen)
            if found is None or not self._fits(chosen, found.memory_bytes):
                fitting = fitting[: fitting.index(chosen)]
                continue
            first, step = chosen, found
            known[id(chosen)] = found
        return self._finished(name, chosen, known.get(id(chosen))), chosen.size

    def _rungs(self, make: Callable[[Size], Configuration], sizes: Sequence[Size]) -> list[_Candidate]:
        """Different candidates from small to large; larger batches follow the largest patch."""
        rungs: list[_Candidate] = []
        for size in sizes:
            made = make(size)
            if not rungs or rungs[-1].configuration != made:
                rungs.append(self._candidate(made, size))
        last = rungs[-1]
        typical = self.measured.typical_shape(last.configuration.spacing.value)
        if last.configuration.dimensions == 3 and (np.array(last.configuration.patch.value) >= typical).all():
            in_all = float(np.prod(typical)) * len(self.measured.cases)
            for batch in _BATCHES:
                if batch * np.prod(last.configuration.patch.value) > _BATCH_SHARE * in_all:
                    break
                reason = "the patch holds a whole case, so that more memory and time go to the batch"
                more = last.configuration.model_copy(update={"batch": Decision[int](value=batch, reason=reason)})
                rungs.append(self._candidate(more, replace(last.size, least_steps=_BATCH_STEPS)))
        return rungs

    def _candidate(self, made: Configuration, size: Size) -> _Candidate:
        reckoned = cost.estimate(made, self._inputs(made), self.classes, kind=self.target.kind, half=self.target.half)
        return _Candidate(made, size, reckoned)

    def _cases(self, configuration: Configuration) -> Cases:
        voxels = self.measured.shapes_at(configuration.spacing.value).prod(axis=1)
        own = float(np.median(self.measured.shapes.prod(axis=1)))
        x, y, z = self.measured.typical_shape(configuration.spacing.value)
        return Cases(len(voxels), own, (float(x), float(y), float(z)), float(voxels.sum()))

    def _ram(self, candidate: _Candidate, memory: int) -> int:
        cases, further = self._cases(candidate.configuration), self._further(candidate.configuration)
        return cost.ram_bytes(cases, self.channels, self.classes, memory, kind=self.target.kind, further=further)

    def _fits(self, candidate: _Candidate, memory: int) -> bool:
        if self.target.kind == "gpu":
            return memory + cost.GPU_OVERHEAD <= self.target.memory
        return self._ram(candidate, memory) <= self.target.memory

    def _refuse(self, smallest: _Candidate) -> NoReturn:
        memory = smallest.estimate.memory_bytes
        need = memory + cost.GPU_OVERHEAD if self.target.kind == "gpu" else self._ram(smallest, memory)
        option = "--gpu-memory" if self.target.kind == "gpu" else "--memory"
        raise InputError(
            f"even the smallest plan, patches of {_by(smallest.configuration)} voxels, takes {gib(need)} to train, and "
            f"{gib(self.target.memory)} are allowed",
            f"Allow more with {option}, or crop the scans",
        )

    def _measure(self, candidate: _Candidate) -> Step | None:
        """None where the machine has not the memory."""
        if self.meter is None:
            return None
        try:
            return self.meter(candidate.configuration, self._inputs(candidate.configuration), self.classes)
        except cost.DoesNotFitError:
            return None

    def _largest(self, name: str, fitting: list[_Candidate], first: _Candidate, step: Step | None) -> _Candidate:
        """The largest of which enough steps fit, by what was measured of the ``first``."""
        scale = step.memory_bytes / first.estimate.memory_bytes if step else 1.0
        budget = self.target.budget(name)
        best = None
        for candidate in fitting:
            seconds = self._seconds(candidate, first, step)
            steps = self._steps(candidate, budget, seconds)
            room = self._fits(candidate, int(scale * candidate.estimate.memory_bytes))
            if room and (best is None or steps >= candidate.size.least_steps):
                best = candidate
        return best or self._refuse(fitting[0])

    def _seconds(self, candidate: _Candidate, first: _Candidate, step: Step | None) -> float:
        """Of one step within a run."""
        speed = first.estimate.work / step.seconds if step else _SPEED[self.target.kind]
        return cost.FEEDING[self.target.kind] * candidate.estimate.work / speed

    def _aside(self, candidate: _Candidate, budget: float, seconds: float) -> float:
        """Seconds of a budget that do not go to steps: start, validation, calibration."""
        watching = cost.validation_seconds(
            candidate.configuration, self._cases(candidate.configuration), budget / seconds, seconds
        )
        aside = _START_SECONDS[self.target.kind] + watching + _ELSE_SHARE * budget
        return min(aside, _MOST_ASIDE * budget)

    def _steps(self, candidate: _Candidate, budget: float | None, seconds: float) -> int:
        if budget is None:
            return self.target.steps or _USUAL_STEPS[self.target.kind]
        fit = (budget - self._aside(candidate, budget, seconds)) / seconds
        return max(1, min(int(fit), _MOST_STEPS))

    def _finished(self, name: str, chosen: _Candidate, step: Step | None) -> Configuration:
        """With its length and cost, and what they stand on said."""
        budget, made = self.target.budget(name), chosen.configuration
        seconds = self._seconds(chosen, chosen, step)
        steps = self._steps(chosen, budget, seconds)
        memory = step.memory_bytes if step else chosen.estimate.memory_bytes
        cases = self._cases(made)
        watching = cost.validation_seconds(made, cases, steps, seconds)
        rest = _START_SECONDS[self.target.kind] + watching + _ELSE_SHARE * steps * seconds
        hours = (steps * seconds + rest) / 3600
        costs = Cost(
            seconds_per_step=float(f"{seconds:.4g}"),
            memory_bytes=memory,
            ram_bytes=self._ram(chosen, memory),
            disk_bytes=cost.disk_bytes(cases, self._inputs(made), self._label_voxels(made)),
            hours=float(f"{hours:.3g}"),
            measured_on=step.measured_on if step else None,
            threads=step.threads if step else None,
        )
        patch = Decision[Three](
            value=made.patch.value, reason=f"{made.patch.reason}; {self._room(chosen, step, memory)}"
        )
        length = Decision[int](value=steps, reason=self._length(chosen, budget, seconds, steps, step))
        return made.model_copy(update={"patch": patch, "steps": length, "cost": costs})

    def _room(self, chosen: _Candidate, step: Step | None, memory: int) -> str:
        allowed = f"of the {gib(self.target.memory)} that the {self.target.kind} may give"
        if step is None:
            return f"training takes about {gib(memory)} {allowed}, reckoned, not measured"
        return f"training takes {gib(memory)} {allowed} (measured; {gib(chosen.estimate.memory_bytes)} reckoned)"

    def _length(self, chosen: _Candidate, budget: float | None, seconds: float, steps: int, step: Step | None) -> str:
        of = f"a step of {seconds:.3g} s, {'as measured' if step else 'as reckoned, not measured'}"
        if budget is None:
            usual = "the usual length, which --budget or --steps change"
            return f"{'as asked for' if self.target.steps else usual}, with {of}"
        if steps == _MOST_STEPS:
            return f"as many as teach anything; the budget of {budget:g} s holds more, with {of}"
        aside = self._aside(chosen, budget, seconds)
        return (
            f"what fits {budget:g} s less {aside:.3g} s for start, validation and calibration, with {of}; this size is "
            f"taken where {chosen.size.least_steps} steps fit"
        )

    def _label_voxels(self, configuration: Configuration) -> float:
        voxel = float(np.prod(configuration.spacing.value))
        sizes = [mm3 / voxel for case in self.measured.cases for mm3 in case.label_mm3.values()]
        return float(sum(min(size, _PLACES) for size in sizes))


def _by(configuration: Configuration) -> str:
    return "x".join(map(str, configuration.patch.value))


def _by_work(candidate: _Candidate) -> float:
    return candidate.estimate.work

"""What a run does besides its steps, and how much of it a budget bears: validation, calibration, the comparison
of engines."""

from __future__ import annotations

from dataclasses import dataclass, replace

from medseg.plan.plan import Configuration, Decision, Watching

# Of what a budget leaves once a run has started: validation takes so much at the most; calibration, which may
# take more for the fewest cases that it can learn from; the comparison; checkpoints, logs and what else.
_WATCHED, _CALIBRATED, _FEWEST_CALIBRATED, _COMPARED, _ELSE = 0.2, 0.1, 0.2, 0.02, 0.03
# With fewer cases than these calibration cannot tell how far it is off itself.
_FEWEST = 2
# Where nobody budgets, calibration takes this share of the training, but may take so many seconds, and takes
# three cases.
_SHARE, _SECONDS, _THREE = 0.1, 30.0, 3
# Cases from whose voxels a temperature is learnt, before all of them are predicted with it.
SAMPLED = 16
# Three engines and precisions at the most look at tiles of three cases.
COMPARED_CASES = 3
_ENGINES = 3


def watching_of(configuration: Configuration) -> Watching:
    """What a plan says, or the usual."""
    return configuration.watching.value if configuration.watching else Watching()


def validations(steps: int, every: int, times: int) -> int:
    """How often a run validates, which it can at the end of each ``every`` steps and of all."""
    return min(times, -(-steps // every))


def due(step: int, steps: int, every: int, times: int) -> bool:
    """Whether one of the validations, evenly spread and the last at the end, falls on this epoch's end."""
    epoch, epochs = -(-step // every), -(-steps // every)
    often = validations(steps, every, times)
    return epoch * often // epochs > (epoch - 1) * often // epochs


@dataclass(frozen=True)
class Pace:
    """What a configuration takes on a machine, in seconds: to ``start`` and end, a ``step`` within a run,
    one of a fold's ``held_out`` cases predicted as validation does, and ``whole``, with mirrored copies and
    any stage before; a ``tile`` on a processor. ``every``: steps of an epoch."""

    start: float
    step: float
    validation: float
    whole: float
    tile: float
    held_out: int
    every: int

    def of(self, members: int) -> Pace:
        """That of several networks: one after the other in training and validation, side by side in what comes
        after them."""
        many = {name: members * getattr(self, name) for name in ("step", "validation", "whole", "tile")}
        return replace(self, **many)

    def watching(self, budget: float) -> Decision[Watching]:
        """As much as a budget bears: where it is short fewer validations first, then of fewer cases."""
        left = budget - self.start
        usual = Watching()
        cases, most = min(usual.cases, self.held_out), int(_WATCHED * left / self.validation)
        times = min(usual.times, most // cases)
        if not times:
            times, cases = min(1, most), min(cases, most)
        fewest = min(_FEWEST, self.held_out)
        calibrated = self._calibrated(_CALIBRATED * left, fewest)
        if self._calibration(calibrated) > _FEWEST_CALIBRATED * left:
            calibrated = 0
        value = Watching(times=times, cases=cases, calibrated=calibrated, compared=self._compared(left))
        one = f"one prediction is reckoned at {self.validation:.3g} s, and {self.whole:.3g} s in calibration"
        reason = f"at most {_WATCHED:.0%} of the budget for validation and {_CALIBRATED:.0%} for calibration; {one}"
        if not times:
            reason += "; one alone takes more, so that training shows its loss only"
        if not calibrated:
            reason += f"; too long for calibration on {fewest}, so that there is none"
        return Decision(value=value, reason=reason)

    def usual(self, steps: int) -> Decision[Watching]:
        """Where nobody budgets: the usual validation, and as much else as a training of so many steps bears."""
        training = steps * self.step
        allowed = max(_SECONDS, _SHARE * (training + self._validation(steps, Watching())))
        calibrated = self._calibrated(allowed, min(_THREE, self.held_out))
        if self._calibration(calibrated) <= allowed and calibrated == self.held_out:
            calibrated = Watching().calibrated  # all that there are: other folds may hold out more than is reckoned
        value = Watching(calibrated=calibrated, compared=self._compared(training))
        reason = (
            f"no budget, so the usual validation; calibration takes at most {allowed:.3g} s, but {_THREE} cases, of "
            f"which one is reckoned at {self.whole:.3g} s"
        )
        return Decision(value=value, reason=reason)

    def _calibrated(self, allowed: float, fewest: int) -> int:
        """Cases whose calibration takes so many seconds, but so many at the least."""
        most = min(Watching().calibrated, self.held_out)
        return max((n for n in range(fewest, most + 1) if self._calibration(n) <= allowed), default=fewest)

    def _calibration(self, cases: int) -> float:
        return (min(SAMPLED, cases) + cases) * self.whole

    def _compared(self, training: float) -> int:
        """Each engine looks at one tile, whatever that takes."""
        most = Watching().compared
        return max(1, min(most, int(_COMPARED * training / (_ENGINES * self.tile)))) if self.tile else most

    def _validation(self, steps: int, watching: Watching) -> float:
        times = validations(steps, self.every, watching.times)
        return times * min(watching.cases, self.held_out) * self.validation

    def aside(self, steps: int, watching: Watching) -> float:
        """Seconds of a run of so many steps that do not go to them."""
        calibration = self._calibration(min(watching.calibrated, self.held_out))
        comparison = _ENGINES * watching.compared * self.tile
        return self.start + self._validation(steps, watching) + calibration + comparison + _ELSE * steps * self.step

    def steps(self, budget: float, watching: Watching) -> int:
        """How many fit a budget beside all else, one at the least."""
        most = budget / self.step
        return max(1, int((budget - self.aside(int(most), watching)) / self.step))

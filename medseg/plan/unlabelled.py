"""Scans without labels: how much is learnt from them, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from medseg.core.errors import InputError
from medseg.plan.cost import estimate
from medseg.plan.plan import Configuration, Decision, Plan
from medseg.plan.scale import Target, require_time

# Pretraining in steps of the training; the most that a mean teacher's word weighs.
_PRETRAINING, _CONSISTENCY = 1.0, 5.0
# A step beside a teacher, in plain ones: twice the patches, and the teacher's forward pass of half of
# them, which is a third of a step.
_TAUGHT = 2 + 1 / 3


@dataclass(frozen=True)
class Unlabelled:
    """Whether a network is pretrained on ``scans`` without labels, and whether a mean teacher says what
    it thinks of them."""

    scans: int
    pretrain: bool = False
    teacher: bool = False

    @property
    def _step(self) -> float:
        return _TAUGHT if self.teacher else 1.0

    @property
    def _run(self) -> float:
        """A whole run, in one of as many plain steps."""
        return self._step + (_PRETRAINING if self.pretrain else 0.0)

    def leaves(self, target: Target) -> Target:
        """What is left of a target for plain steps: time, and beside a teacher half of the memory. InputError
        where so little time is left that hardly a step fits it."""
        for name, seconds in target.budgets.items():
            require_time(target.kind, name, seconds / self._run, self._run)
        budgets = {name: seconds / self._run for name, seconds in target.budgets.items()}
        return replace(target, budgets=budgets, memory=target.memory // (2 if self.teacher else 1))

    def decided(self, plan: Plan, cases: int, target: Target) -> Plan:
        """The plan with what is decided of unlabelled scans; costs hold them too. No second stage is left:
        of scans without labels nothing is known that was found by a model which did not learn from them.
        InputError where a budget is given for one."""
        alone = {name: c for name, c in plan.configurations.items() if c.previous is None}
        if lost := [name for name in plan.configurations if name not in alone and name in target.budgets]:
            raise InputError(
                f"a budget is given for {lost[0]}, which cannot learn from scans without labels",
                "Leave it out, or plan without --unlabelled",
            )
        training = plan.training.model_copy(
            update={
                "pretraining": self._pretraining() if self.pretrain else None,
                "consistency": self._consistency() if self.teacher else None,
            }
        )
        configurations = {name: self._costly(c, plan, cases, target) for name, c in alone.items()}
        return plan.model_copy(update={"training": training, "configurations": configurations})

    def _pretraining(self) -> Decision[float]:
        return Decision(
            value=_PRETRAINING,
            reason=f"as asked for: as many steps as the training, on the {self.scans} scans without labels and the "
            "fold's training scans; blocks are hidden and to be filled in",
        )

    def _consistency(self) -> Decision[float]:
        return Decision(
            value=_CONSISTENCY,
            reason=f"as asked for: a mean teacher on the {self.scans} scans without labels; its weight rises over the "
            "first two fifths of the run",
        )

    def _costly(self, configuration: Configuration, plan: Plan, cases: int, target: Target) -> Configuration:
        cost, steps = configuration.cost, configuration.steps
        if cost is None or steps is None:
            return configuration
        memory = int(cost.memory_bytes * (self._memory(configuration, plan, target) if self.teacher else 1))
        costly = cost.model_copy(
            update={
                "seconds_per_step": float(f"{self._step * cost.seconds_per_step:.4g}"),
                "hours": float(f"{self._run * cost.hours:.3g}"),
                "memory_bytes": memory,
                "ram_bytes": cost.ram_bytes + (memory - cost.memory_bytes if target.kind == "cpu" else 0),
                "disk_bytes": int(cost.disk_bytes * (cases + self.scans) / cases),
            }
        )
        reason = f"{steps.reason}; unlabelled scans make a run {self._run:.3g} times as long, which a budget allows for"
        return configuration.model_copy(update={"cost": costly, "steps": steps.model_copy(update={"reason": reason})})

    def _memory(self, configuration: Configuration, plan: Plan, target: Target) -> float:
        """How many times the memory twice the batch takes."""
        batch = configuration.batch.model_copy(update={"value": 2 * configuration.batch.value})
        twice, once = (
            estimate(c, len(plan.channels), plan.outputs, kind=target.kind, half=target.half).memory_bytes
            for c in (configuration.model_copy(update={"batch": batch}), configuration)
        )
        return twice / once

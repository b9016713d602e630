"""What the first stage of a cascade found in the cases that its folds held out: what the second is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.cli.common import RunFolder
from medseg.cli.folds import FoldFolder, Lack
from medseg.core.errors import InputError

if TYPE_CHECKING:
    from medseg.core.volume import LabelMap
    from medseg.dataset.task import Task
    from medseg.models.package import ModelPackage
    from medseg.plan.plan import Plan


@dataclass(frozen=True)
class FirstStage:
    """The configuration's name, its models fold by fold, and by case the label map that the one model
    predicted which held that case out."""

    name: str
    models: tuple[ModelPackage, ...]
    paths: Mapping[str, Path]

    @property
    def digests(self) -> tuple[str, ...]:
        """Which models they are, fold by fold."""
        return tuple(model.digest() for model in self.models)

    def found(self, task: Task, case: str) -> LabelMap:
        """The labels that a model found which had not seen the case, on the case's own grid."""
        from medseg.dataset.task import load_labels, require_same_grid
        from medseg.io.sidecar import read_prediction

        found = read_prediction(self.paths[case], task.labels, case)
        require_same_grid(load_labels(task, task.case(case)), found, case)
        return found


def first_stage(folder: RunFolder, task: Task, plan: Plan, configuration: str) -> FirstStage | None:
    """The stage before a configuration; None where it has none.

    Raises InputError, with the command that mends it, where a fold of the first stage lacks its model or
    its predictions, or these are another model's; where its models are of several plans; and where a case
    is held out by none of its folds, or by two.
    """
    name = plan.configuration(configuration).previous
    if name is None:
        return None
    refuse_unlabelled(plan, configuration)
    plan.configuration(name)
    models: list[ModelPackage] = []
    paths: dict[str, Path] = {}
    for number, cases in enumerate(folder.folds(task)):
        fold = FoldFolder(folder, name, number, cases)
        package = fold.whole(task)
        if isinstance(package, Lack):
            raise InputError(
                f"{configuration} is told what {name} found in cases that it had not seen, and {package.what}",
                f"Run `{package}`, or `medseg train {folder.path} --all-folds -c {configuration}` for all",
            )
        _require_alike(fold, package, models[0] if models else package, plan)
        for case, path in fold.found(package).items():
            if case in paths:
                raise InputError(
                    f"{name} holds it out in two folds", "Hold each case out once in folds.json", case=case
                )
            paths[case] = path
        models.append(package)
    if missing := [case.id for case in task.cases if case.id not in paths]:
        raise InputError(
            f"no fold of {name} holds it out: there is no model to tell {configuration} of it that has not seen it",
            "Hold each case out once in folds.json",
            case=missing[0],
        )
    return FirstStage(name, tuple(models), paths)


def refuse_unlabelled(plan: Plan, configuration: str) -> None:
    """InputError for a second stage that is to learn from scans without labels: no model held them out."""
    before = plan.configuration(configuration).previous
    if before is not None and plan.training.wants_unlabelled:
        raise InputError(
            f"{configuration} is told what {before} found, and cannot learn from scans that the plan has no labels of",
            "Plan without --unlabelled, or train another configuration",
        )


def _require_alike(fold: FoldFolder, package: ModelPackage, first: ModelPackage, plan: Plan) -> None:
    if package.plan.label_set != plan.label_set:
        raise InputError(
            f"{fold} was trained on other labels than the plan's", f"Run `medseg {' '.join(fold.train())}`"
        )
    if package.plan.digest() != first.plan.digest():
        raise InputError(f"{fold} was trained by another plan than fold 0", "Train its folds by one plan")

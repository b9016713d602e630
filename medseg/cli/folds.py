"""What the folds of a run have and lack, and all of it made, verb by verb."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.common import RunFolder, unlabelled_cases, unlabelled_for
from medseg.core.errors import InputError

if TYPE_CHECKING:
    from medseg.dataset.split import Fold
    from medseg.dataset.task import Task
    from medseg.models.package import ModelPackage
    from medseg.plan.plan import Plan


@dataclass(frozen=True)
class Lack:
    """What a fold lacks, and the command that makes it."""

    what: str
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"medseg {shlex.join(self.command)}"


@dataclass(frozen=True)
class FoldFolder:
    """One fold of a configuration: its folder's files, and how they come to be."""

    run: RunFolder
    configuration: str
    number: int
    cases: Fold

    @property
    def path(self) -> Path:
        return self.run.fold(self.configuration, self.number)

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions"

    def __str__(self) -> str:
        return f"{self.configuration} fold {self.number}"

    def train(self) -> tuple[str, ...]:
        """The command that trains it."""
        return "train", str(self.run.path), "-c", self.configuration, "--fold", str(self.number)

    def predict(self, task: Task) -> tuple[str, ...]:
        """The command that predicts its held-out cases."""
        return "predict", str(task.folder), "--held-out", "-m", str(self.model), "-o", str(self.predictions)

    def package(self) -> ModelPackage | Lack:
        """Its model; what is amiss where there is none, or one of another fold.

        Raises InputError where the model was changed after it was written.
        """
        from medseg.models.package import INDEX, load_package

        if not (self.model / INDEX).exists():
            return Lack(f"{self} has no model", self.train())
        package = load_package(self.model)
        if set(package.trained_on) != set(self.cases.train) or set(package.held_out) != set(self.cases.validation):
            return Lack(f"{self} was trained on other cases than {self.run.folds_file} says", self.train())
        return package

    def predicted(self, package: ModelPackage, task: Task) -> Lack | None:
        """Whether the held-out cases were predicted by this very model, and nothing was done to the labels."""
        from medseg.io.sidecar import read_index, sidecar_of

        try:
            index = read_index(self.predictions)
        except InputError:
            return Lack(f"{self} lacks its predictions", self.predict(task))
        digest = package.digest()
        for case in package.held_out:
            record = _record(sidecar_of(index[case])) if case in index and index[case].exists() else {}
            if not record:
                return Lack(f"{self} lacks the prediction of case {case}", self.predict(task))
            wishes = record.get("wishes")
            if record.get("model_sha256") != digest:
                return Lack(f"the prediction of case {case} in {self} is another model's", self.predict(task))
            if not isinstance(wishes, dict) or wishes.get("only") or wishes.get("smallest_mm3"):
                return Lack(f"the prediction of case {case} in {self} is not whole", self.predict(task))
        return None

    def whole(self, task: Task) -> ModelPackage | Lack:
        """Its model, whose predictions of the held-out cases are there; what is amiss where they are not."""
        package = self.package()
        return package if isinstance(package, Lack) else self.predicted(package, task) or package

    def found(self, package: ModelPackage) -> dict[str, Path]:
        """By case what its model found in those that it held out, and had not seen."""
        from medseg.io.sidecar import read_index

        unseen = {*package.held_out} - {*package.trained_on}
        return {case: path for case, path in read_index(self.predictions).items() if case in unseen}


def _record(path: Path) -> dict[str, Any]:
    from medseg.io.files import read_json

    try:
        record = read_json(path)
    except InputError:
        return {}
    return record if isinstance(record, dict) else {}


def all_folds(
    run: Path,
    configurations: Sequence[str],
    *,
    seed: int,
    device: str,
    threads: int | None,
    checkpoints: Path | None,
    deterministic: bool,
    start: Path | None,
    mlflow: str | None,
) -> None:
    """Preprocess, train, predict and evaluate every fold of each configuration (all of the plan's, unless
    named), and choose. What was made before by the same plan, folds, seed, scans without labels and ``start``
    is left as it is.
    A stage that is told what another found comes after it, which is made too where it is not named, though
    not chosen among."""
    from medseg.cli.stages import first_stage, refuse_unlabelled
    from medseg.io.sidecar import INDEX
    from medseg.models.package import load_package

    folder = RunFolder(run)
    task, plan = folder.task(), folder.plan()
    alone = plan.training.wants_unlabelled  # which a second stage cannot learn from
    names = list(configurations or (n for n, one in plan.configurations.items() if not (alone and one.previous)))
    order = _in_order(plan, names)
    for name in order:
        refuse_unlabelled(plan, name)
    cores = ("--threads", str(threads)) if threads else ()
    engine = {"auto": "auto", "cpu": "openvino", "cuda": "torch-cuda"}[device]
    how = ("--seed", str(seed), "--device", device, *cores)
    how += ("--checkpoints", str(checkpoints)) if checkpoints else ()
    how += ("--deterministic",) if deterministic else ()
    how += ("--from", str(start)) if start else ()
    how += ("--mlflow", mlflow) if mlflow else ()
    given = load_package(start) if start else None
    for number, cases in enumerate(folder.folds(task)):
        if given:
            require_unseen(given, task, cases, number)
    begun = given.digest() if given else None
    for name in order:
        before = first_stage(folder, task, plan, name)
        models = before.digests if before else ()
        if not _preprocessed(folder, task, plan, name, models):
            run_verb("preprocess", str(run), "-c", name, *cores)
        for number, cases in enumerate(folder.folds(task)):
            fold = FoldFolder(folder, name, number, cases)
            # The log is written last.
            found = fold.package() if (fold.path / "log.json").exists() else None
            scans = [case.id for case in unlabelled_for(task, cases.validation)] if alone else []
            wanted = (plan.digest(), seed, begun, models, tuple(scans))
            if found is None or isinstance(found, Lack) or _of(found) != wanted:
                run_verb(*fold.train(), *how)
                found = fold.package()
            if isinstance(found, Lack):
                raise InputError(found.what, f"Run `{found}`")
            if fold.predicted(found, task):
                run_verb(*fold.predict(task), "--engine", engine, *cores)
            if not _newer(fold.path / "metrics.json", fold.predictions / INDEX):
                run_verb("evaluate", str(fold.predictions), str(task.folder), "-o", str(fold.path))
    run_verb("choose", str(run), *(part for name in names for part in ("-c", name)), *cores)


def require_unseen(start: ModelPackage, task: Task, fold: Fold, number: int) -> None:
    """InputError where a model to start from has learnt from a case that the fold holds out, or from another
    one of its subject: as far as is known, and but for the fold's own training cases. What is said of
    the fold's model would not be out of fold."""
    from medseg.models.package import learnt_from

    subjects = {case.id: case.subject for case in (*task.cases, *task.test)}
    held_out = {subjects[case]: case for case in fold.validation}
    for seen in sorted({*learnt_from(start).get(task.name, ())} - {*fold.train}):
        case = seen if seen in fold.validation else held_out.get(subjects.get(seen, ""))
        if case is not None:
            learnt = "it" if case == seen else f"{seen}, of the same subject"
            raise InputError(
                f"fold {number} holds it out, and the model {start.name} to start from has learnt from {learnt}",
                "Start from a model of another task, or from one that was trained without it",
                case=case,
            )


def _in_order(plan: Plan, names: Sequence[str]) -> list[str]:
    """The configurations and those whose labels they are told, these first."""
    before = {name: plan.configuration(name).previous for name in names}
    firsts = [name for name in names if before[name] is None]
    needed = [previous for previous in before.values() if previous is not None]
    seconds = [name for name in names if before[name] is not None]
    return list(dict.fromkeys([*firsts, *needed, *seconds]))


def _of(package: ModelPackage) -> tuple[str, Any, Any, tuple[str, ...], tuple[str, ...]]:
    made = package.provenance
    models, scans = (tuple(made.get(name, ())) for name in ("previous", "unlabelled"))
    return package.plan.digest(), made.get("seed"), made.get("start"), models, scans


def _preprocessed(folder: RunFolder, task: Task, plan: Plan, configuration: str, models: Sequence[str]) -> bool:
    from medseg.io.store import CaseStore

    labelled, unlabelled = (CaseStore(f(configuration)) for f in (folder.store, folder.unlabelled))
    wanted = plan.training.wants_unlabelled
    try:
        for store in (labelled, unlabelled) if wanted else (labelled,):
            store.require(plan.preparation(configuration), configuration, models)
    except InputError:
        return False
    return not wanted or set(unlabelled.cases()) == {case.id for case in unlabelled_cases(task)}


def _newer(path: Path, than: Path) -> bool:
    return path.exists() and path.stat().st_mtime >= than.stat().st_mtime


def run_verb(verb: str, *arguments: str) -> None:
    """A verb, as the command line calls it."""
    root = click.get_current_context().find_root()
    command = root.command
    assert isinstance(command, click.Group)  # noqa: S101 - the root is `medseg`
    found = command.get_command(root, verb)
    assert found is not None  # noqa: S101
    # With the words for help that all verbs have, since a command keeps those that it is first called with.
    found.main(list(arguments), prog_name=f"medseg {verb}", standalone_mode=False, help_option_names=["-h", "--help"])

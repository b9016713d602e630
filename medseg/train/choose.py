"""Which of the trained models to ship: decided on cases that no network had been trained on.

The best configuration by mean Dice; its folds' networks as one package; and post-processing, where it
helps beyond luck. Nothing is trained here, and nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.core.errors import InputError
from medseg.core.labels import Label, LabelSet
from medseg.core.progress import Progress, silent
from medseg.core.provenance import versions
from medseg.core.shape import connected
from medseg.core.volume import LabelMap
from medseg.dataset.task import Task
from medseg.evaluate.score import CaseMetrics, LabelSummary, score, summarise
from medseg.evaluate.statistics import RESAMPLES, bootstrap, mean_over_labels
from medseg.infer.refine import refined
from medseg.models.calibration import pooled
from medseg.models.evaluation import CaseScore, Compared, Evaluation, Figure, StructureScore, Tried
from medseg.models.experience import experience
from medseg.models.package import ModelPackage
from medseg.models.refinement import Crf, Refinement, Rule
from medseg.plan.fingerprint import Fingerprint

Float64 = NDArray[np.float64]
# A configuration and a case to what its fold predicted for it, and the reference.
Loader = Callable[[str, str], tuple[LabelMap, LabelMap]]
# The same after a refinement, for which the scan is needed.
Refiner = Callable[[str, str, Refinement], tuple[LabelMap, LabelMap]]

# Sizes below which pieces may go, as shares of the smallest volume that the structure has in any case.
_SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
# Fields tried: how much what looks alike should be alike decides most.
_CRFS = (Crf(), Crf(appearance=4.0))
# On fewer subjects no rule is kept, whatever it gains: that all of seven gain happens by luck too often.
_FEWEST_SUBJECTS = 8
_LEVEL = 0.95
_WORST = 3
_SEED = 0


@dataclass(frozen=True, eq=False)
class Pieces:
    """One structure in one prediction: its pieces' ``sizes`` (n,) in voxels, how many of these voxels are
    ``right`` (n,), how many the ``reference`` has, and the volume of one."""

    sizes: NDArray[np.int64]
    right: NDArray[np.int64]
    reference: int
    voxel_mm3: float

    def dice(self, rule: Rule | None = None) -> float:
        """Dice with those pieces that the rule keeps; NaN where neither label map has the structure."""
        kept = rule.kept(self.sizes, self.voxel_mm3) if rule else slice(None)
        right, voxels = int(self.right[kept].sum()), int(self.sizes[kept].sum()) + self.reference
        return 2 * right / voxels if voxels else float("nan")


def pieces_of(prediction: LabelMap, reference: LabelMap) -> dict[int, Pieces]:
    """The pieces of every structure of a prediction beside its reference, on one grid, by number."""
    boxes = ndimage.find_objects(((prediction.values > 0) | (reference.values > 0)).view(np.uint8))
    box = boxes[0] if boxes else (slice(0, 1),) * 3
    ours, theirs = prediction.values[box], reference.values[box]
    parts = connected(ours)
    right = np.bincount(parts.index[ours == theirs], minlength=len(parts.sizes))
    expected = np.bincount(theirs.ravel(), minlength=max(reference.labels.numbers) + 1)
    found = {}
    for number in reference.labels.numbers:
        mine = np.flatnonzero(parts.numbers == number)
        found[number] = Pieces(parts.sizes[mine], right[mine], int(expected[number]), prediction.grid.voxel_volume)
    return found


def candidates(label: Label, smallest_mm3: float | None) -> tuple[Rule, ...]:
    """The rules tried for a structure whose smallest volume in any case is ``smallest_mm3`` (mm3; None
    where no case has it)."""
    sizes = [float(f"{share * smallest_mm3:.3g}") for share in _SHARES] if smallest_mm3 else []
    return (
        Rule(name=label.name, number=label.number, largest=True),
        *(Rule(name=label.name, number=label.number, smallest_mm3=size) for size in sizes if size > 0),
    )


def try_rules(rules: Sequence[Rule], cases: Sequence[Pieces], subjects: Sequence[str]) -> tuple[Tried, ...]:
    """What each rule for a structure changes in ``cases``, whose ``subjects`` are given, and which one,
    if any, is kept.

    The gain of a case is its Dice with the rule less that without; a structure that neither label
    map has counts as Dice 1, so that taking away what was invented is a gain. A rule helps where the
    lower end of the bootstrap interval of the mean gain lies above 0; with k rules tried the
    interval leaves out 5 % / k, since the best of many looks good by luck (Bonferroni). The one of
    these with the largest gain is kept. With fewer than eight subjects none is.
    """
    before = np.array([[case.dice()] for case in cases])
    after = {rule: np.array([[case.dice(rule)] for case in cases]) for rule in rules}
    return _tried(after, before, subjects)


def try_crfs(
    crfs: Sequence[Crf],
    refine: Callable[[str, Refinement], tuple[LabelMap, LabelMap]],
    looked: Mapping[str, Mapping[int, Pieces]],
    rules: Sequence[Rule],
    labels: LabelSet,
    subjects: Sequence[str],
    *,
    progress: Progress = silent,
) -> tuple[Tried, ...]:
    """What each field changes in the cases, after the ``rules`` that are kept, and which one, if any, is: by the
    same test as `try_rules`, the gain of a case being the mean over its labels."""
    of = {rule.number: rule for rule in rules}
    before = np.array([[pieces[n].dice(of.get(n)) for n in labels.numbers] for pieces in looked.values()])
    after = {crf: np.empty_like(before) for crf in crfs}
    for row, case in enumerate(progress(list(looked), len(looked))):
        for crf in crfs:
            found = pieces_of(*refine(case, Refinement(rules=tuple(rules), crf=crf)))
            after[crf][row] = [found[n].dice() for n in labels.numbers]
    return _tried(after, before, subjects)


def _tried(after: Mapping[Any, Float64], before: Float64, subjects: Sequence[str]) -> tuple[Tried, ...]:
    """Each step by the Dice (cases, labels) with it, beside that without."""
    level = 1 - (1 - _LEVEL) / max(1, len(after))
    enough = len(set(subjects)) >= _FEWEST_SUBJECTS
    tried = []
    for step, dices in after.items():
        gains = np.nan_to_num(dices, nan=1.0) - np.nan_to_num(before, nan=1.0)
        gain = bootstrap(gains, subjects, level=level, seed=_SEED) or Figure(mean=0.0)
        helps = enough and gain.low is not None and gain.low > 0
        sums = gains.sum(axis=1)
        better, worse = int(np.count_nonzero(sums > 0)), int(np.count_nonzero(sums < 0))
        tried.append(Tried(rule=step, gain=gain, better=better, worse=worse, kept=helps))
    best = max((one for one in tried if one.kept), key=lambda one: one.gain.mean, default=None)
    return tuple(one.model_copy(update={"kept": one is best}) for one in tried)


def choose(
    trained: Mapping[str, Mapping[int, ModelPackage]],
    load: Loader,
    task: Task,
    measured: Fingerprint,
    *,
    of_folds: int,
    refine: Refiner | None = None,
    progress: Progress = silent,
) -> ModelPackage:
    """The package to ship, of the ``trained`` folds of each configuration, with what speaks for it.

    ``load`` gives a held-out case's prediction, made without any post-processing, and its reference.
    The members are the networks of all the folds of the configuration with the greatest mean Dice
    on the cases that all configurations have in common. With ``refine``, which gives a case's prediction after a
    refinement, moving borders to the scan's edges is tried too. Deterministic.

    Raises InputError where folds of one configuration were trained by different plans, where a case is
    held out by two of them, and where configurations have no case in common.
    """
    for name, folds in trained.items():
        _require_one_model(name, folds)
    labels = next(iter(next(iter(trained.values())).values())).plan.label_set
    held = {name: tuple(c for p in folds.values() for c in p.held_out) for name, folds in trained.items()}
    looked: dict[str, dict[str, dict[int, Pieces]]] = {name: {} for name in trained}
    jobs = [(name, case) for name, cases in held.items() for case in cases]
    for name, case in progress(jobs, len(jobs)):
        looked[name][case] = pieces_of(*load(name, case))
    subject = {case.id: case.subject for case in task.cases}
    best, compared = _compare(trained, looked, labels, subject)
    tried = _post_processing(looked[best], labels, measured, subject)
    rules = tuple(one.rule for one in tried if one.kept and isinstance(one.rule, Rule))
    refinement = Refinement(rules=rules) if rules else None
    if refine is not None:
        owners = [subject[case] for case in looked[best]]
        fields = try_crfs(_CRFS, partial(refine, best), looked[best], rules, labels, owners, progress=progress)
        tried += fields
        for one in fields:
            if one.kept and isinstance(one.rule, Crf):
                refinement = Refinement(rules=rules, crf=one.rule)

    def final(case: str) -> tuple[LabelMap, LabelMap]:
        if refine is not None and refinement is not None and refinement.crf is not None:
            return refine(best, case, refinement)
        prediction, reference = load(best, case)
        return refined(prediction, rules)[0], reference

    rows = list(_scored(held[best], final, progress))
    evaluation = Evaluation(
        task=task.name,
        description=task.description,
        licence=task.licence,
        folds=tuple(trained[best]),
        of_folds=of_folds,
        leaks=_leaks(trained[best], subject),
        compared=compared,
        tried=tried,
        resamples=RESAMPLES,
        seed=_SEED,
        **_figures(rows, looked[best], labels, subject),
    )
    return _ensemble(trained[best], measured, evaluation, refinement)


def _require_one_model(name: str, folds: Mapping[int, ModelPackage]) -> None:
    first = next(iter(folds))
    for fold, package in folds.items():
        if package.plan.digest() != folds[first].plan.digest():
            raise InputError(
                f"{name} fold {fold} was trained by another plan than fold {first}", "Train them by one plan"
            )
        if package.provenance.get("previous") != folds[first].provenance.get("previous"):
            raise InputError(
                f"{name} fold {fold} was told what other models found than fold {first}",
                f"Preprocess {name} and train its folds anew",
            )
    seen: dict[str, int] = {}
    for fold, package in folds.items():
        for case in package.held_out:
            if seen.setdefault(case, fold) != fold:
                raise InputError(
                    f"{name} holds it out in fold {seen[case]} and in fold {fold}",
                    "Use folds that hold each case out once",
                    case=case,
                )


def _leaks(folds: Mapping[int, ModelPackage], subject: Mapping[str, str]) -> int:
    """How many subjects some fold has on both sides, as splits by case may."""
    sides = [({subject[c] for c in p.trained_on}, {subject[c] for c in p.held_out}) for p in folds.values()]
    return len({name for learnt, tested in sides for name in learnt & tested})


def _compare(
    trained: Mapping[str, Mapping[int, ModelPackage]],
    looked: Mapping[str, Mapping[str, Mapping[int, Pieces]]],
    labels: LabelSet,
    subject: Mapping[str, str],
) -> tuple[str, tuple[Compared, ...]]:
    """The best configuration by mean Dice over the labels, and how all of them compare, best first."""
    shared = [case for case in next(iter(looked.values())) if all(case in cases for cases in looked.values())]
    if not shared:
        raise InputError(f"{' and '.join(looked)} have no held-out case in common", "Train the same folds of each")
    owners = [subject[case] for case in shared]
    tables = {name: _table(cases, shared, labels) for name, cases in looked.items()}
    ordered = sorted(tables, key=lambda name: -np.nan_to_num(mean_over_labels(tables[name])))
    best = ordered[0]
    compared = []
    for name in ordered:
        # In pairs a structure rightly not found counts as 1: what one invents the other may not.
        pairs = np.nan_to_num(tables[best], nan=1.0) - np.nan_to_num(tables[name], nan=1.0)
        dice = bootstrap(tables[name], owners, seed=_SEED) or Figure(mean=0.0)
        behind = bootstrap(pairs, owners, seed=_SEED) if name != best else None
        compared.append(
            Compared(configuration=name, folds=tuple(trained[name]), cases=len(shared), dice=dice, behind=behind)
        )
    return best, tuple(compared)


def _post_processing(
    looked: Mapping[str, Mapping[int, Pieces]], labels: LabelSet, measured: Fingerprint, subject: Mapping[str, str]
) -> tuple[Tried, ...]:
    """All rules, structure by structure."""
    owners = [subject[case] for case in looked]
    tried: list[Tried] = []
    for label in labels:
        volumes = [row.label_mm3[label.number] for row in measured.cases if label.number in row.label_mm3]
        rules = candidates(label, min(volumes, default=None))
        tried += try_rules(rules, [pieces[label.number] for pieces in looked.values()], owners)
    return tuple(tried)


def _scored(
    cases: Sequence[str], final: Callable[[str], tuple[LabelMap, LabelMap]], progress: Progress
) -> Iterator[CaseMetrics]:
    for case in progress(cases, len(cases)):
        yield from score(*final(case), case=case)


def _figures(
    rows: Sequence[CaseMetrics],
    looked: Mapping[str, Mapping[int, Pieces]],
    labels: LabelSet,
    subject: Mapping[str, str],
) -> dict[str, Any]:
    """What `Evaluation` holds of the chosen configuration; InputError where no structure is anywhere."""
    cases, owners = list(looked), [subject[case] for case in looked]
    known = {(row.case, row.label): row.dice for row in rows}
    # None becomes NaN.
    dices = np.array([[known[case, n] for n in labels.numbers] for case in cases], dtype=np.float64)
    before = _table(looked, cases, labels)
    overall, plain = (bootstrap(values, owners, seed=_SEED) for values in (dices, before))
    if overall is None or plain is None:
        raise InputError("no held-out case has a structure, in its reference or prediction", "Check the task")
    summaries = {one.label: one for one in summarise(rows)}
    counted = [(float(np.nanmean(row)), case) for row, case in zip(dices, cases, strict=True) if not _empty(row)]
    return {
        "cases": len(cases),
        "subjects": len(set(owners)),
        "dice": overall,
        "before": plain,
        "structures": tuple(
            _structure(label, summaries[label.number], dices[:, [i]], before[:, [i]], owners)
            for i, label in enumerate(labels)
        ),
        "worst": tuple(CaseScore(case=case, dice=dice) for dice, case in sorted(counted)[:_WORST]),
    }


def _table(looked: Mapping[str, Mapping[int, Pieces]], cases: Sequence[str], labels: LabelSet) -> Float64:
    """Dice (cases, labels) before post-processing; NaN where neither label map has the label."""
    return np.array([[looked[case][number].dice() for number in labels.numbers] for case in cases])


def _empty(row: Float64) -> bool:
    return bool(np.isnan(row).all())


def _structure(
    label: Label, summary: LabelSummary, dices: Float64, before: Float64, subjects: Sequence[str]
) -> StructureScore:
    return StructureScore(
        name=label.name,
        number=label.number,
        cases=summary.cases,
        missed=summary.missed,
        invented=summary.invented,
        dice=bootstrap(dices, subjects, seed=_SEED),
        before=bootstrap(before, subjects, seed=_SEED),
        hd95_mm=summary.hd95_mean_mm,
    )


def _ensemble(
    folds: Mapping[int, ModelPackage],
    measured: Fingerprint,
    evaluation: Evaluation | None = None,
    refinement: Refinement | None = None,
) -> ModelPackage:
    """The folds' networks as members of one package, and what is known of them together; likewise the
    stage before of each, if they have one."""
    packages = list(folds.values())
    first = packages[0]
    seen = {case for package in packages for case in package.trained_on}
    trained_on = tuple(row.id for row in measured.cases if row.id in seen)
    alike = [name for name in ("seed", "steps", "start") if len({p.provenance.get(name) for p in packages}) == 1]
    before = {fold: package.previous for fold, package in folds.items() if package.previous is not None}
    calibrations = [package.calibration for package in packages if package.calibration is not None]
    return ModelPackage(
        plan=first.plan,
        configuration_name=first.configuration_name,
        members=tuple(member for package in packages for member in package.members),
        trained_on=trained_on,
        held_out=tuple(case for package in packages for case in package.held_out if case not in seen),
        provenance={
            "versions": versions(),
            **{name: first.provenance[name] for name in alike if name in first.provenance},
            "folds": {
                str(fold): {**p.provenance, "model": p.digest(), "held_out": list(p.held_out)}
                for fold, p in folds.items()
            },
            "plan": first.plan.digest(),
            "fingerprint": measured.digest(),
        },
        experience=experience(measured, trained_on, first.plan.label_set),
        calibration=pooled(calibrations),
        refinement=refinement,
        evaluation=evaluation,
        previous=_ensemble(before, measured) if before else None,
        engines={
            name: min((p.engines[name] for p in packages), key=lambda found: found.least_dice)
            for name in packages[0].engines
            if all(name in p.engines for p in packages)
        },
    )

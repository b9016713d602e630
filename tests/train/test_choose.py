"""Choosing, on label maps made by hand: what helps is kept, what hurts or helps by luck is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap
from medseg.dataset.task import Case, Task
from medseg.evaluate.overlap import dice
from medseg.infer.refine import refined
from medseg.models.build import build
from medseg.models.calibration import Calibration, StructureCalibration
from medseg.models.package import ModelPackage
from medseg.models.refinement import Crf, Refinement, Rule
from medseg.plan.fingerprint import CasePrint, ChannelPrint, Fingerprint, Intensities
from medseg.train.choose import Pieces, candidates, choose, pieces_of, try_rules

LABELS = LabelSet.from_names(["left blob", "right blob"])
GRID = Grid.from_spacing((12, 12, 12), (1.0, 1.0, 2.0))
LEFT = LABELS.labels[0]
LARGEST = Rule(name="left blob", number=1, largest=True)
CASES = [f"blob_{n:03d}" for n in range(12)]


def reference() -> NDArray[np.uint8]:
    """Two cubes of 64 voxels of 2 mm3."""
    values = np.zeros(GRID.shape, dtype=np.uint8)
    values[1:5, 1:5, 1:5] = 1
    values[7:11, 1:5, 1:5] = 2
    return values


def crumbly(number: int = 1) -> NDArray[np.uint8]:
    """Right, but for a loose piece of 8 voxels."""
    values = reference()
    values[1:3, 8:10, 8:10] = number
    return values


def label_map(values: NDArray[np.uint8]) -> LabelMap:
    return LabelMap(values, GRID, LABELS)


def split_reference() -> NDArray[np.uint8]:
    """The left blob has a second piece of 27 voxels."""
    values = reference()
    values[1:4, 8:11, 8:11] = 1
    return values


# Rules


def test_pieces_give_the_dice_that_relabelling_would() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.choice([0, 0, 0, 0, 0, 1, 2], size=GRID.shape).astype(np.uint8)
        made = np.where(rng.random(GRID.shape) < 0.7, truth, 0).astype(np.uint8)
        found = pieces_of(label_map(made), label_map(truth))
        for label in LABELS:
            for rule in (None, *candidates(label, 60.0)):
                after = refined(label_map(made), [rule] if rule else [])[0].values
                assert found[label.number].dice(rule) == dice(after == label.number, truth == label.number)


def test_candidates_are_shares_of_the_smallest_reference() -> None:
    assert [rule.smallest_mm3 for rule in candidates(LEFT, 128.0)] == [0, 1.28, 6.4, 12.8, 32, 64]
    assert [rule.largest for rule in candidates(LEFT, None)] == [True]


def pieces(*predictions: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> list[Pieces]:
    return [pieces_of(label_map(made), label_map(truth))[1] for made, truth in predictions]


def kept(cases: list[Pieces], rules: tuple[Rule, ...] = (LARGEST,), subjects: list[str] | None = None) -> list[Rule]:
    tried = try_rules(rules, cases, subjects or CASES[: len(cases)])
    return [one.rule for one in tried if one.kept]


def test_a_rule_that_helps_is_kept_by_hand() -> None:
    """Twelve cases, each with 8 voxels too many beside 64: Dice 128 / 136, and 1 after the rule."""
    (tried,) = try_rules((LARGEST,), pieces(*[(crumbly(), reference())] * 12), CASES)
    assert tried.kept
    assert tried.gain.mean == pytest.approx(1 - 128 / 136)
    assert tried.gain.low == pytest.approx(1 - 128 / 136)
    assert (tried.better, tried.worse) == (12, 0)


def test_a_rule_that_hurts_is_not() -> None:
    cases = pieces(*[(split_reference(), split_reference())] * 12)
    (tried,) = try_rules((LARGEST,), cases, CASES)
    assert not tried.kept
    assert tried.gain.mean == pytest.approx(2 * 64 / (64 + 91) - 1)
    assert (tried.better, tried.worse) == (0, 12)


@pytest.mark.parametrize("lucky", [1, 2, 3])
def test_a_rule_that_helps_a_few_by_luck_is_not(lucky: int) -> None:
    cases = pieces(*[(crumbly(), reference())] * lucky, *[(reference(), reference())] * (12 - lucky))
    assert cases[0].dice(LARGEST) > cases[0].dice()
    assert kept(cases) == []


def test_large_gains_in_some_and_losses_in_others_are_not_enough() -> None:
    empty = np.zeros_like(reference())
    invented = np.zeros_like(reference())
    invented[0, 0, 0] = 1
    small = Rule(name="left blob", number=1, smallest_mm3=10.0)
    # Rightly taken away counts 1, a small structure that was found and is lost costs its Dice.
    cases = pieces(*[(invented, empty)] * 7, *[(invented, invented)] * 5)
    assert sum(np.nan_to_num(c.dice(small), nan=1.0) - c.dice() for c in cases) > 0
    assert kept(cases, (small,)) == []


def test_taking_away_what_was_invented_is_a_gain() -> None:
    empty, invented = np.zeros_like(reference()), np.zeros_like(reference())
    invented[0, 0, 0] = 1
    small = Rule(name="left blob", number=1, smallest_mm3=10.0)
    assert kept(pieces(*[(invented, empty)] * 12), (small,)) == [small]


def test_of_rules_that_help_the_one_with_the_largest_gain_is_kept() -> None:
    """The loose piece has 16 mm3: rules below that do nothing."""
    rules = candidates(LEFT, 128.0)
    tried = try_rules(rules, pieces(*[(crumbly(), reference())] * 12), CASES)
    assert [one.gain.mean > 0 for one in tried] == [True, False, False, False, True, True]
    assert [one.kept for one in tried] == [True, False, False, False, False, False]


def test_few_subjects_decide_nothing_however_many_their_cases() -> None:
    cases = pieces(*[(crumbly(), reference())] * 12)
    assert kept(cases[:7]) == []
    assert kept(cases, subjects=[str(n % 7) for n in range(12)]) == []
    assert kept(cases, subjects=[str(n % 8) for n in range(12)]) == [LARGEST]


# The package


@pytest.fixture
def task() -> Task:
    cases = tuple(Case(case, Path(case), Path(case), case) for case in CASES)
    return Task("Task00_blobs", "blobs", Path("blobs"), ("CT",), LABELS, cases, licence="CC0", description="Made up.")


@pytest.fixture
def measured() -> Fingerprint:
    channel = ChannelPrint(percentiles=(0, 1, 2, 3, 4, 5, 6), zero_share=0, negative_share=0)
    rows = tuple(
        CasePrint(
            id=case,
            shape=(12, 12, 12),
            box=(12, 12, 12),
            spacing=(1, 1, 2),
            orientation="RAS",
            label_mm3={1: 128.0, 2: 128.0},
            label_places={},
            label_pieces={1: 1, 2: 1},
            label_cut=(),
            channels=(channel,),
            nonzero_share=1,
            image_hash=case,
        )
        for case in CASES
    )
    numbers = {"mean": 0, "std": 1, "percentile_00_5": 0, "percentile_99_5": 1, "minimum": 0, "maximum": 1}
    return Fingerprint(task="Task00_blobs", cases=rows, intensities=(Intensities(channel="CT", **numbers),))


def calibration(temperature: float) -> Calibration:
    shares = {"ece_before": 0.1, "ece_after": 0.05, "dice_error_before": 0.1, "dice_error": 0.05}
    return Calibration(
        cases=4,
        voxels=600_000,
        temperature=temperature,
        nll_before=0.3,
        nll_after=0.2,
        slope=1.0,
        offset=0.0,
        dice_error_of_mean=0.05,
        interval=0.1 * temperature,
        structures=tuple(
            StructureCalibration(name=x.name, number=x.number, cases=4, mean_dice=0.8, review_below=0.6) for x in LABELS
        ),
        **shares,
    )


@pytest.fixture
def folds(small_plan: Any) -> Any:
    """`folds("3d", 3)`: packages of three folds, four cases held out by each."""

    def made(name: str, count: int = 3) -> dict[int, ModelPackage]:
        three, two = small_plan(), small_plan(dimensions=2, slice_axis=2, patch=(16, 16, 1))
        plan = three.model_copy(update={"configurations": {**three.configurations, **two.configurations}})
        found = {}
        for fold in range(count):
            torch.manual_seed(fold)
            held = tuple(CASES[fold::3])
            found[fold] = ModelPackage(
                plan=plan,
                configuration_name=name,
                members=(dict(build(plan.configuration(name), 1, 3).state_dict()),),
                trained_on=tuple(case for case in CASES if case not in held),
                held_out=held,
                provenance={"seed": 5, "fold": fold, "steps": 5, "versions": {}},
                calibration=calibration((1.0, 2.0, 4.0)[fold]),
            )
        return found

    return made


def loader(predictions: Mapping[str, NDArray[np.uint8]]) -> Any:
    return lambda name, case: (label_map(predictions[name]), label_map(reference()))


def test_the_better_configuration_is_taken_with_the_rule_that_helps_it(
    task: Task, measured: Fingerprint, folds: Any
) -> None:
    """2d has a loose piece of 8 voxels in the left blob: (128 / 136 + 1) / 2. 3d has lost a corner of it and has
    a smaller one in the right blob."""
    spoilt = reference()
    spoilt[1:5, 1:5, 1] = 0
    predictions = {"3d": spoilt, "2d": crumbly()}
    trained = {name: folds(name) for name in ("3d", "2d")}
    made = choose(trained, loader(predictions), task, measured, of_folds=3)
    known = made.evaluation
    assert known is not None
    assert made.configuration_name == "2d"
    assert [one.configuration for one in known.compared] == ["2d", "3d"]
    first, second = known.compared
    assert first.dice.mean == pytest.approx((128 / 136 + 1) / 2)
    assert second.dice.mean == pytest.approx((96 / 112 + 1) / 2)
    assert second.behind is not None
    assert second.behind.mean == pytest.approx(first.dice.mean - second.dice.mean)
    assert made.refinement is not None
    assert made.refinement.rules == (LARGEST,)
    assert (known.dice.mean, known.before.mean) == (1.0, pytest.approx(first.dice.mean))
    assert [one.hd95_mm for one in known.structures] == [0, 0]
    assert (known.cases, known.subjects, known.folds, known.of_folds) == (12, 12, (0, 1, 2), 3)
    assert [one.rule.name for one in known.tried if one.kept] == ["left blob"]


@pytest.mark.parametrize("helps", [True, False])
def test_a_field_is_kept_where_it_helps_beyond_what_the_rules_do(
    task: Task, measured: Fingerprint, folds: Any, helps: bool
) -> None:
    """The loose piece goes by a rule; what the right blob lacks, by the one of two fields, or by none."""
    spoilt = crumbly()
    spoilt[7, 1:5, 1:5] = 0
    asked: list[Refinement] = []

    def refine(name: str, case: str, refinement: Refinement) -> tuple[LabelMap, LabelMap]:
        asked.append(refinement)
        assert refinement.crf is not None
        right = helps and refinement.crf.appearance == 2.0
        made = label_map(reference() if right else spoilt)
        return (made if right else refined(made, refinement.rules)[0]), label_map(reference())

    trained = {"3d": folds("3d")}
    made = choose(trained, loader({"3d": spoilt}), task, measured, of_folds=3, refine=refine)
    known = made.evaluation
    assert known is not None
    assert made.refinement is not None
    assert made.refinement.rules == (LARGEST,)
    assert {refinement.rules for refinement in asked} == {(LARGEST,)}
    first, second = (one for one in known.tried if isinstance(one.rule, Crf))
    assert second.gain.mean == 0
    assert not second.kept
    assert known.with_crf
    assert first.kept == helps
    # A quarter of the right blob: Dice 96 / 112, over two labels.
    assert first.gain.mean == pytest.approx((1 - 96 / 112) / 2 if helps else 0)
    assert (first.better, first.worse) == (12 if helps else 0, 0)
    assert made.refinement.crf == (first.rule if helps else None)
    assert known.dice.mean == pytest.approx(1 if helps else (1 + 96 / 112) / 2)
    again = choose(trained, loader({"3d": spoilt}), task, measured, of_folds=3)
    assert (again.digest() == made.digest()) != helps
    assert again.evaluation is not None
    assert not again.evaluation.with_crf


def test_the_folds_become_members_and_what_is_known_is_put_together(
    task: Task, measured: Fingerprint, folds: Any
) -> None:
    trained = folds("3d")
    made = choose({"3d": trained}, loader({"3d": reference()}), task, measured, of_folds=3)
    assert [list(m) for m in made.members] == [list(p.members[0]) for p in trained.values()]
    assert made.trained_on == tuple(CASES)
    assert made.held_out == ()
    assert made.experience is not None
    assert made.experience.cases == 12
    assert made.refinement is None
    assert made.calibration is not None
    assert made.calibration.temperature == pytest.approx(2.0)  # the geometric mean of 1, 2 and 4
    assert made.calibration.interval == pytest.approx(0.4)
    assert (made.calibration.cases, made.calibration.voxels) == (12, 1_800_000)
    assert made.calibration.pooled_from == 3
    assert made.provenance["folds"]["1"]["model"] == trained[1].digest()
    assert made.provenance["folds"]["1"]["held_out"] == CASES[1::3]
    assert made.provenance["seed"] == 5
    assert made.evaluation is not None
    assert made.evaluation.leaks == 0
    pairs = replace(task, cases=tuple(replace(c, subject=str(n // 2)) for n, c in enumerate(task.cases)))
    again = choose({"3d": trained}, loader({"3d": reference()}), pairs, measured, of_folds=3)
    assert again.evaluation is not None
    assert (again.evaluation.subjects, again.evaluation.leaks) == (6, 6)
    assert made.digest() not in [p.digest() for p in trained.values()]


def test_one_fold_alone_keeps_its_calibration_and_its_unseen_cases(
    task: Task, measured: Fingerprint, folds: Any
) -> None:
    one = folds("3d", 1)
    made = choose({"3d": one}, loader({"3d": reference()}), task, measured, of_folds=3)
    assert made.calibration == one[0].calibration
    assert made.held_out == one[0].held_out
    assert made.evaluation is not None
    assert made.evaluation.folds == (0,)


def test_what_cannot_be_chosen_among_is_refused(task: Task, measured: Fingerprint, folds: Any) -> None:
    load = loader({"3d": reference(), "2d": reference()})
    three, two = folds("3d"), folds("2d")
    with pytest.raises(InputError, match=r"have no held-out case in common\. Train the same folds"):
        choose({"3d": {0: three[0]}, "2d": {1: two[1]}}, load, task, measured, of_folds=3)
    with pytest.raises(InputError, match=r"case blob_000: 3d holds it out in fold 0 and in fold 1"):
        choose({"3d": {0: three[0], 1: three[0]}}, load, task, measured, of_folds=3)
    other = replace(three[1], plan=three[1].plan.model_copy(update={"fingerprint": "another"}))
    with pytest.raises(InputError, match="3d fold 1 was trained by another plan than fold 0"):
        choose({"3d": {0: three[0], 1: other}}, load, task, measured, of_folds=3)
    empty = label_map(np.zeros_like(reference()))
    with pytest.raises(InputError, match="no held-out case has a structure"):
        choose({"3d": three}, lambda *_: (empty, empty), task, measured, of_folds=3)


def test_labels_need_not_be_numbered_in_sequence() -> None:
    labels = LabelSet((Label("a", 3), Label("b", 7)))
    values = np.zeros((6, 6, 6), dtype=np.uint8)
    values[0, 0, 0], values[3:5, 3, 3] = 7, 7
    found = pieces_of(*(LabelMap(values, Grid.from_spacing((6, 6, 6), 1.0), labels) for _ in range(2)))
    assert found[7].sizes.tolist() == found[7].right.tolist() == [1, 2]
    assert found[3].sizes.tolist() == []
    assert np.isnan(found[3].dice())
    assert np.isnan(found[3].dice(Rule(name="a", number=3, largest=True)))

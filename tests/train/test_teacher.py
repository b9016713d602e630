from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from medseg.core.errors import InputError
from medseg.plan.plan import Region
from medseg.train import loop
from medseg.train.batches import Batches
from medseg.train.loss import IGNORED, loss_of
from medseg.train.teacher import Lesson, TaughtBatches, answered, beside, ramp

CPU = torch.device("cpu")


def batches_of(bench: Any) -> tuple[Batches, TaughtBatches]:
    make = partial(Batches, bench.plan, bench.plan.configuration("3d"), device=CPU)
    cases = [bench.store.read(c) for c in bench.setup.train]
    return make(cases, 0), TaughtBatches(make, cases, bench.unlabelled, 0)


# ---- what it is asked ---------------------------------------------------------------------------


def test_labelled_patches_are_those_of_a_run_without_a_teacher(few: Any) -> None:
    plain, taught = batches_of(few(consistency=1.0))
    for step in (2, 0):
        images, classes = plain(step)
        both, lesson = taught(step)
        assert both.shape == (4, 1, 16, 16, 16)
        assert torch.equal(both[:2], images)
        assert torch.equal(lesson.classes, classes)
        assert lesson.plain.shape == (2, 1, 16, 16, 16)
        assert torch.equal(taught(step)[0], both)


def test_teacher_and_network_see_one_place_with_other_intensities(few: Any) -> None:
    still = {"intensity": 0, "gamma": 0, "noise": 0, "mirror": [0, 1]}
    _, taught = batches_of(few(consistency=1.0, augmentation=still))
    for step in range(4):
        images, lesson = taught(step)
        assert torch.allclose(images[2:], lesson.plain)
    _, taught = batches_of(few(consistency=1.0, augmentation={"intensity": 0.4, "mirror": [0, 1]}))
    images, lesson = taught(0)
    assert not torch.allclose(images[2:], lesson.plain, atol=0.05)
    for one, other in zip(images[2:, 0], lesson.plain[:, 0], strict=True):
        assert np.corrcoef(one.flatten(), other.flatten())[0, 1] > 0.9


def test_no_class_of_an_unlabelled_case_is_known(few: Any) -> None:
    """Not even where labels lie about."""
    bench = few(consistency=1.0)
    labelled = [bench.store.read(c) for c in bench.setup.train]
    make = partial(Batches, bench.plan, bench.plan.configuration("3d"), device=CPU)
    taught = TaughtBatches(make, labelled, labelled, 0)
    assert all(case.labels is None for case in taught._unlabelled.cases)
    seen = taught._unlabelled(0)[1]
    assert set(seen.unique().tolist()) <= {IGNORED, 0}  # 0 beyond a scan's edge
    assert (seen == IGNORED).float().mean() > 0.8


# ---- what it says -------------------------------------------------------------------------------


def test_its_weight_rises() -> None:
    rises = [ramp(t / 100) for t in range(101)]
    assert rises[0] == pytest.approx(math.exp(-5))
    assert rises[20] == pytest.approx(math.exp(-1.25))
    assert rises == sorted(rises)
    assert rises[40:] == [1.0] * 61


def test_what_it_says_carries_no_gradient(few: Any) -> None:
    plan = few(consistency=2.0).plan
    teacher = torch.nn.Conv3d(1, 3, 1)
    lesson = answered(plan, teacher, Lesson(torch.zeros(1, 4, 4, 4), torch.randn(2, 1, 4, 4, 4)), 1.0)
    assert lesson.says is not None
    assert lesson.says.shape == (2, 3, 4, 4, 4)
    assert not lesson.says.requires_grad
    assert torch.allclose(lesson.says.sum(1), torch.ones(2, 4, 4, 4))
    assert lesson.weight == 2.0


def test_the_loss_by_hand(few: Any) -> None:
    """Of three classes alike where the teacher is sure of the first: (4 + 1 + 1) / 9 / 3."""
    plan = few(consistency=1.0).plan
    classes = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    says = torch.zeros(2, 3, 2, 2, 2)
    says[:, 0] = 1
    outputs = [torch.zeros(3, 3, 2, 2, 2), torch.zeros(3, 3, 1, 1, 1)]
    labelled = loss_of(plan)([one[:1] for one in outputs], classes)
    found = beside(plan)(outputs, Lesson(classes, torch.zeros(2, 1, 2, 2, 2), says, 0.5))
    assert float(found - labelled) == pytest.approx(0.5 * 6 / 27, rel=1e-5)
    assert float(beside(plan)(outputs[0], Lesson(classes, says, says, 0.0))) == pytest.approx(
        float(loss_of(plan)(outputs[0][:1], classes))
    )


def test_regions_are_compared_one_by_one(few: Any) -> None:
    regions = (Region(name="both", labels=(1, 2), number=1), Region(name="right", labels=(2,), number=2))
    plan = few(consistency=1.0).plan.model_copy(update={"regions": regions})
    classes, outputs = torch.zeros(1, 2, 2, 2, dtype=torch.int64), torch.zeros(2, 2, 2, 2, 2)
    labelled = loss_of(plan)(outputs[:1], classes)
    found = beside(plan)(outputs, Lesson(classes, outputs[1:], torch.ones(1, 2, 2, 2, 2), 1.0))
    assert float(found - labelled) == pytest.approx(0.25)


# ---- the run ------------------------------------------------------------------------------------


def test_a_run_with_a_teacher_repeats_itself_and_is_taken_up(
    few: Any, monkeypatch: pytest.MonkeyPatch, same: Any
) -> None:
    bench = few(consistency=5.0, steps=10)
    whole = bench.train("whole")
    assert whole.provenance["unlabelled"] == [case.id for case in bench.unlabelled]
    assert set(whole.trained_on) == set(bench.setup.train)
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0)

    def stop(now: Any) -> None:
        if now.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.train("parts", progress=stop)
    assert same(whole, bench.train("parts"))
    assert not same(whole, bench.train("other", unlabelled=bench.unlabelled[:1]))


def test_the_teacher_makes_a_difference(few: Any, same: Any) -> None:
    with_, without = few(consistency=5.0, steps=10), few(steps=10)
    assert not same(with_.train("a"), without.train("b"))
    # Unlabelled cases that a plan does not want change nothing, not even which run it is.
    assert same(without.train("c", unlabelled=()), without.train("b"))


def test_without_scans_it_is_refused(few: Any) -> None:
    with pytest.raises(InputError, match=r"has a mean teacher, and there are no unlabelled cases.*medseg preprocess"):
        few(consistency=1.0).train(unlabelled=())

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medseg.infer.stream import Decision
from medseg.plan.plan import Plan, Region
from medseg.train.loss import (
    IGNORED,
    LOSSES,
    dice_cross_entropy,
    loss_of,
    of_classes,
    of_regions,
    signed_distance,
    supervised,
)


def one_hot(target: torch.Tensor, classes: int, height: float = 30.0) -> torch.Tensor:
    """Logits that say what the target says."""
    return height * torch.nn.functional.one_hot(target, classes).movedim(-1, 1).float()


def obvious(logits: np.ndarray, target: np.ndarray) -> float:
    """Voxel by voxel and class by class, in float64."""
    classes = logits.shape[1]
    overlap, size, entropy = np.zeros(classes), np.zeros(classes), []
    for b in range(len(logits)):
        for index in np.ndindex(target.shape[1:]):
            values = [float(logits[(b, k, *index)]) for k in range(classes)]
            total = sum(math.exp(v) for v in values)
            true = int(target[(b, *index)])
            entropy.append(math.log(total) - values[true])
            for k in range(classes):
                p = math.exp(values[k]) / total
                overlap[k] += p * (true == k)
                size[k] += p + (true == k)
    dice = (2 * overlap + 1) / (size + 1)
    return float(1 - dice[1:].mean() + np.mean(entropy))


@given(st.integers(0, 10**6), st.sampled_from([(2, 3), (3, 2, 4), (2, 3, 2, 2)]), st.integers(2, 5))
def test_as_the_obvious_loop(seed: int, shape: tuple[int, ...], classes: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (shape[0], classes, *shape[1:])).astype(np.float32)
    target = rng.integers(0, classes, shape)
    loss = dice_cross_entropy(torch.from_numpy(logits), torch.from_numpy(target))
    assert float(loss) == pytest.approx(obvious(logits, target), abs=1e-5)


def test_a_perfect_answer_costs_nothing_and_a_wrong_one_much() -> None:
    target = torch.randint(0, 3, (2, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    assert float(dice_cross_entropy(one_hot(target, 3), target)) == pytest.approx(0, abs=1e-6)
    wrong = dice_cross_entropy(one_hot((target + 1) % 3, 3), target)
    assert float(wrong) == pytest.approx(30 + 1, abs=0.05)


def test_not_knowing_costs_the_logarithm_of_the_classes() -> None:
    target = torch.zeros((1, 100), dtype=torch.long)
    target[0, :50] = 1
    loss = dice_cross_entropy(torch.zeros((1, 2, 100)), target)
    # Overlap 25 of 50 + 50, each with the one that keeps empty classes from dividing by nothing.
    assert float(loss) == pytest.approx(1 - 51 / 101 + math.log(2), abs=1e-6)


def test_a_class_that_is_absent_and_not_claimed_costs_nothing() -> None:
    target = torch.zeros((2, 4, 4), dtype=torch.long)
    logits = one_hot(target, 3).requires_grad_()
    loss = dice_cross_entropy(logits, target)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(logits.grad).all()
    claimed = dice_cross_entropy(one_hot(torch.full_like(target, 2), 3), target)
    assert torch.isfinite(claimed)
    # Class 1 is absent and not claimed (Dice 1), class 2 absent and claimed 32 times (Dice 1/33).
    assert float(claimed) == pytest.approx(30 + 1 - (1 + 1 / 33) / 2, abs=1e-4)


def test_dice_is_taken_over_the_batch_as_one() -> None:
    target = torch.zeros((2, 4), dtype=torch.long)
    target[0] = 1
    logits = torch.randn((2, 2, 4), generator=torch.Generator().manual_seed(0))
    joined = dice_cross_entropy(logits.movedim(1, 0).reshape(1, 2, 8), target.reshape(1, 8))
    assert float(dice_cross_entropy(logits, target)) == pytest.approx(float(joined))


@pytest.mark.parametrize("scale", [1.0, 100.0, 3e4])
def test_bfloat16_logits_have_finite_gradients(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn((2, 3, 6, 6, 6), generator=generator) * scale).bfloat16().requires_grad_()
    target = torch.randint(0, 3, (2, 6, 6, 6), generator=generator)
    loss = dice_cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


def test_going_down_the_gradient_lowers_it() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 5, 5), generator=generator)
    logits = torch.randn((2, 3, 5, 5), generator=generator).requires_grad_()
    loss = dice_cross_entropy(logits, target)
    loss.backward()
    assert logits.grad is not None
    assert dice_cross_entropy(logits.detach() - 0.5 * logits.grad, target) < loss


# ---- several resolutions ------------------------------------------------------------------------


def test_each_coarser_answer_counts_half() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 8, 8, 4), generator=generator)
    outputs = [torch.randn((2, 3, *shape), generator=generator) for shape in ((8, 8, 4), (4, 4, 4), (2, 2, 2))]
    by_hand = (
        4 * dice_cross_entropy(outputs[0], target)
        + 2 * dice_cross_entropy(outputs[1], target[:, 1::2, 1::2, :])
        + 1 * dice_cross_entropy(outputs[2], target[:, 2::4, 2::4, 1::2])
    ) / 7
    assert float(supervised(outputs, target)) == pytest.approx(float(by_hand), rel=1e-6)


def test_one_answer_in_a_list_or_by_itself_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 2, (1, 6, 6), generator=generator)
    logits = torch.randn((1, 2, 6, 6), generator=generator)
    plain = float(dice_cross_entropy(logits, target))
    assert float(supervised(logits, target)) == pytest.approx(plain)
    assert float(supervised([logits], target)) == pytest.approx(plain)


def test_perfect_answers_at_every_resolution_cost_nothing() -> None:
    target = torch.zeros((1, 16, 16), dtype=torch.long)
    target[:, 4:12, 4:12] = 1
    outputs = [one_hot(target, 2), one_hot(target[:, 1::2, 1::2], 2), one_hot(target[:, 2::4, 2::4], 2)]
    assert float(supervised(outputs, target)) == pytest.approx(0, abs=1e-6)


# ---- by name ------------------------------------------------------------------------------------


def random_answer(classes: int = 3, shape: tuple[int, ...] = (2, 6, 5, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn((shape[0], classes, *shape[1:]), generator=generator)
    return logits, torch.randint(0, classes, shape, generator=generator)


def named(plan: Plan, **training: Any) -> Plan:
    return plan.model_copy(update={"training": plan.training.model_copy(update=training)})


def test_dice_tversky_and_focal_beside_monai() -> None:
    from monai.losses import DiceLoss, FocalLoss, TverskyLoss

    logits, target = random_answer()
    answer, truth = of_classes(logits, target), target.unsqueeze(1)
    shared = {"include_background": False, "to_onehot_y": True, "softmax": True, "batch": True}
    smooth = {"smooth_nr": 1.0, "smooth_dr": 1.0}
    dice = DiceLoss(**shared, **smooth)(logits, truth)
    assert float(LOSSES["dice"](answer)) == pytest.approx(float(dice), abs=1e-6)
    tversky = TverskyLoss(alpha=0.3, beta=0.7, **shared, **smooth)(logits, truth)
    assert float(LOSSES["tversky"](answer)) == pytest.approx(float(tversky), abs=1e-6)
    # MONAI's is the mean over classes too, of which one counts at each voxel.
    focal = 3 * FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0)(logits, truth)
    assert float(LOSSES["dice-focal"](answer)) == pytest.approx(float(dice + focal), abs=1e-5)
    entropy = torch.nn.functional.cross_entropy(logits, target)
    assert float(LOSSES["cross-entropy"](answer)) == pytest.approx(float(entropy), abs=1e-6)


def test_regions_beside_monai_and_torch() -> None:
    from monai.losses import DiceLoss

    logits, target = random_answer()
    regions = ((1, 2), (2,))  # nested
    truth = torch.stack([target > 0, target == 2], dim=1).float()
    answer = of_regions(logits[:, :2], target, regions)
    dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(logits[:, :2], truth)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, :2], truth)
    assert float(LOSSES["dice-cross-entropy"](answer)) == pytest.approx(float(dice + entropy), abs=1e-5)


def test_a_perfect_answer_in_regions_is_what_prediction_reads_as_the_truth(small_plan: Any) -> None:
    plan = small_plan(labels={1: "whole", 4: "core"})
    regions = (Region(name="whole", labels=(1, 4), number=1), Region(name="core", labels=(4,), number=4))
    plan = plan.model_copy(update={"regions": regions})
    target = random_answer()[1]
    logits = 60.0 * torch.stack([target >= 1, target >= 2], dim=1).float() - 30
    assert float(loss_of(plan)(logits, target)) == pytest.approx(0, abs=1e-5)
    decision = Decision(3, plan.painted)
    found = np.stack([decision.winner(one) for one in logits.numpy()])
    assert np.array_equal(found, target)
    assert float(loss_of(plan)([logits], target)) == pytest.approx(0, abs=1e-5)


def brute_distance(truth: np.ndarray) -> np.ndarray:
    """Of every voxel to every other."""
    at = np.stack(np.indices(truth.shape), axis=-1).reshape(-1, truth.ndim)
    inside = truth.ravel()
    if inside.all() or not inside.any():
        return np.zeros(truth.shape)
    away = np.sqrt(((at[:, None] - at[None]) ** 2).sum(-1))
    signed = np.where(inside, 1 - np.minimum(away[:, ~inside].min(1), 8), np.minimum(away[:, inside].min(1), 8))
    return signed.reshape(truth.shape) / 8


@given(st.integers(0, 10**6), st.sampled_from([(7, 9, 5), (3, 14), (1, 2, 12)]), st.sampled_from([0.01, 0.1, 0.5]))
def test_distances_beside_every_pair(seed: int, shape: tuple[int, ...], share: float) -> None:
    truth = np.random.default_rng(seed).random((2, 2, *shape)) < share
    found = signed_distance(torch.from_numpy(truth)).numpy()
    for i, k in np.ndindex(2, 2):
        assert found[i, k] == pytest.approx(brute_distance(truth[i, k]), abs=1e-6)


def test_distance_to_a_line_by_hand() -> None:
    truth = torch.zeros((1, 1, 16, 1), dtype=torch.bool)
    truth[..., 4:7, :] = True
    expected = [4, 3, 2, 1, 0, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert (signed_distance(truth)[0, 0, :, 0] * 8).tolist() == pytest.approx(expected)


def test_the_boundary_costs_what_lies_far_from_the_truth_more() -> None:
    target = torch.zeros((1, 20, 20), dtype=torch.long)
    target[:, 2:6, 2:6] = 1
    near, far = target.clone(), target.clone()
    near[:, 6, 6], far[:, 15, 15] = 1, 1
    costs = [float(LOSSES["dice-boundary"](of_classes(one_hot(said, 2), target))) for said in (target, near, far)]
    dice = [float(LOSSES["dice-cross-entropy"](of_classes(one_hot(said, 2), target))) for said in (near, far)]
    assert costs[0] < costs[1] < costs[2]
    assert dice[0] == pytest.approx(dice[1])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("ignoring", [True, False])
def test_gradients_are_finite_and_go_down(
    small_plan: Any, name: str, background: bool, regions: bool, ignoring: bool
) -> None:
    plan = named(small_plan(labels={1: "a", 4: "b"}), loss=name, ignore_label=9 if ignoring else None)
    if regions:
        both = (Region(name="a", labels=(1, 4), number=1), Region(name="b", labels=(4,), number=4))
        plan = plan.model_copy(update={"regions": both})
    logits, target = random_answer(plan.outputs)
    target = torch.zeros_like(target) if background else target
    if ignoring:
        target[:, :3] = IGNORED
    logits.requires_grad_()
    loss = loss_of(plan)
    value = loss(logits, target)
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0
    down = 0.1 * logits.grad / logits.grad.abs().max()
    assert float(loss(logits.detach() - down, target)) < float(value.detach())
    if ignoring:
        assert not logits.grad[:, :, :3].any()
        other = logits.detach().clone()
        other[:, :, :3] += 5
        assert float(loss(other, target)) == float(value.detach())
    else:
        assert logits.grad[:, :, :3].any()


@pytest.mark.parametrize("name", LOSSES)
def test_where_everything_is_ignored_there_is_nothing_to_learn(small_plan: Any, name: str) -> None:
    logits, target = random_answer()
    logits.requires_grad_()
    loss = loss_of(named(small_plan(), loss=name, ignore_label=9))(logits, torch.full_like(target, IGNORED))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_ignored_might_as_well_not_be_there(small_plan: Any, name: str) -> None:
    logits, target = random_answer(shape=(2, 8, 5, 4))
    target[:, 6:] = IGNORED
    loss = loss_of(named(small_plan(), loss=name, ignore_label=9))
    if name != "dice-boundary":  # to which the voxels beyond are outside
        assert float(loss(logits, target)) == pytest.approx(float(loss(logits[:, :, :6], target[:, :6])), abs=1e-6)
    assert float(loss([logits, logits[:, :, ::2]], target)) > 0


def test_every_name_that_a_plan_may_have_is_there(small_plan: Any) -> None:
    from typing import get_args

    from medseg.plan.plan import Training

    assert set(get_args(Training.model_fields["loss"].annotation)) == set(LOSSES)
    logits, target = random_answer()
    assert float(loss_of(small_plan())(logits, target)) == float(dice_cross_entropy(logits, target))


def test_a_label_is_learnt_or_ignored(small_plan: Any) -> None:
    raw = small_plan().model_dump(mode="json")
    raw["training"]["ignore_label"] = 2
    with pytest.raises(ValueError, match="label 2 cannot be both learnt and ignored"):
        Plan.model_validate(raw)

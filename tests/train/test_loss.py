from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medseg.train.loss import dice_cross_entropy, supervised


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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

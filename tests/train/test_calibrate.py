"""A model that is right about its brightness, and too sure by a known factor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.infer.engine import TorchEngine
from medseg.models.package import ModelPackage
from medseg.train import calibrate
from medseg.train.calibrate import calibration_of

LABELS = LabelSet.from_names(["left blob", "right blob"])


class TooSure(nn.Module):
    """Class by brightness: the true logits of `scan`, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Undoes the plan's normalisation: less 50, divided by 50.
        value = (x[:, :1] * 50 + 50) / 10
        return self.factor * torch.cat([torch.zeros_like(value), value, -value], dim=1)


class StubPredictor:
    def __init__(self, package: ModelPackage, engine: str) -> None:
        self.package, self.threads = package, 1
        network = TooSure(package.provenance["factor"])
        self.engine = TorchEngine([network], package.configuration, 3, torch.device("cpu"), precision="f32")

    def before(self, volume: Volume) -> None:
        """It has no stage before."""


def scan(case: str) -> tuple[Volume, LabelMap]:
    """Labels drawn with the probabilities that the brightness stands for: two bright balls and two dark
    sides of them. The difficulty, and with it the Dice, changes from case to case."""
    rng = np.random.default_rng(int(case))
    shape = (20, 24, 16)
    points = np.stack(np.indices(shape), axis=-1) - np.array([10, 12, 8])
    distance = np.linalg.norm(points, axis=-1)
    contrast = rng.uniform(20, 60)
    values = np.where(points[..., 0] > 0, 1, -1) * np.clip((7 - distance) * contrast / 4, -1, contrast)
    values = np.rint(values + rng.normal(0, 3, shape))
    values[values == 0] = 1  # nowhere exactly zero, so that nothing is cropped
    logits = np.stack([np.zeros(shape), values / 10, -values / 10])
    shares = np.exp(logits) / np.exp(logits).sum(axis=0)
    truth = (rng.random(shape) > shares.cumsum(axis=0)).sum(axis=0).clip(0, 2).astype(np.uint8)
    grid = Grid.from_spacing(shape, 1.0)
    return Volume(values[None].astype(np.float32), grid), LabelMap(truth, grid, LABELS)


@pytest.fixture
def model(small_plan: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(calibrate, "Predictor", StubPredictor)
    plan = small_plan(spacing=(1.0, 1.0, 1.0))

    def made(factor: float, cases: int) -> ModelPackage:
        held_out = tuple(str(n) for n in range(cases))
        return ModelPackage(plan, "3d", ({},), ("a",), held_out, {"factor": factor})

    return made


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_a_known_factor_is_found(model: Any, factor: float) -> None:
    found = calibration_of(model(factor, 12), scan)
    assert found is not None
    assert found.temperature == pytest.approx(factor, rel=0.05)
    assert found.ece_after < 0.02
    assert found.cases == 12
    assert found.dice_error < 0.03
    if factor != 1:
        assert found.ece_before > 0.03
        assert found.dice_error_before is not None
        assert found.dice_error < found.dice_error_before
    assert calibration_of(model(factor, 12), scan) == found


def test_without_held_out_cases_nothing_is_known(model: Any) -> None:
    assert calibration_of(model(1.0, 0), scan) is None


def test_a_model_that_finds_nothing_is_not_calibrated(model: Any) -> None:
    assert calibration_of(model(0.0, 3), scan) is None  # all classes are alike to it


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_plan_may_bear_a_case_or_two_or_none(model: Any, most: int) -> None:
    loaded: list[str] = []

    def load(case: str) -> tuple[Volume, LabelMap]:
        loaded.append(case)
        return scan(case)

    found = calibration_of(model(2.0, 30), load, most=most)
    assert len(loaded) == 2 * most
    assert (found is None) == (most == 0)
    if found:
        assert found.cases == most
        assert found.temperature == pytest.approx(2.0, rel=0.1)
        assert found.interval is None


def test_cases_are_taken_evenly() -> None:
    names = tuple(f"{n:03d}" for n in range(120))
    assert len(calibrate.evenly(names, 50)) == 40
    assert calibrate.evenly((), 50) == calibrate.evenly(names, 0) == ()
    assert calibrate.evenly(names[:50], 50) == names[:50]

"""A model whose weights are stored in half the bits gives the same results to within rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.volume import Volume
from medseg.infer.engine import open_engine
from medseg.infer.predict import Predictor
from medseg.models.build import build
from medseg.models.evaluation import Evaluation
from medseg.models.package import ModelPackage, halved, load_package, save_package
from medseg.models.refinement import Refinement, Rule
from medseg.models.shelf import install, pack, size_of

# float16 has 11 bits: a weight is off by 2**-12 of itself at most, and a logit, which is near 1, by some such errors.
_ROUNDING, _MOST = 1e-3, 2e-2


@pytest.fixture(scope="module", params=[2, 12], ids=["classes", "features"])
def package(small_plan: Any, request: pytest.FixtureRequest) -> ModelPackage:
    """Two networks, and post-processing; with many labels, the head is left to the end (see `splits`)."""
    torch.manual_seed(0)
    labels = {number: f"blob {number}" for number in range(1, request.param + 1)}
    plan = small_plan(labels=labels)
    members = tuple(dict(build(plan.configuration("3d"), 1, len(labels) + 1).state_dict()) for _ in range(2))
    rules = Refinement(rules=(Rule(name="blob 1", number=1, largest=True),))
    return ModelPackage(plan, "3d", members, ("a",), ("b",), {"seed": 3}, refinement=rules)


@pytest.fixture(scope="module")
def both(package: ModelPackage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("half")
    save_package(folder / "full", package)
    pack(folder / "full", folder / "half.zip", half=True)
    return folder / "full", install(folder / "half.zip", folder / "models", "half")


def test_it_is_half_as_large_and_says_what_it_is(both: tuple[Path, Path]) -> None:
    full, half = map(load_package, both)
    assert (both[1] / "member0.safetensors").stat().st_size < 0.6 * (both[0] / "member0.safetensors").stat().st_size
    assert size_of(both[1]) < size_of(both[0])
    assert {tensor.dtype for weights in half.members for tensor in weights.values()} == {torch.float16}
    assert half.digest() != full.digest()
    assert half.provenance == {"rounded_from": full.digest(), "seed": 3}
    assert (half.plan, half.refinement, half.held_out) == (full.plan, full.refinement, full.held_out)
    card = (both[1] / "README.md").read_text()
    assert "rounded to float16" in card
    assert full.digest() in card
    assert "float16" not in (both[0] / "README.md").read_text()
    # Twice is once.
    assert halved(half).digest() == half.digest()
    assert halved(half).provenance == half.provenance


@pytest.mark.parametrize("engine", ["torch-cpu", "openvino"])
def test_logits_differ_by_rounding_alone(both: tuple[Path, Path], engine: str) -> None:
    tiles = np.random.default_rng(0).normal(size=(2, 1, 16, 16, 16)).astype(np.float32)
    expected, found = (_logits(folder, engine, tiles) for folder in both)
    difference = np.abs(found - expected)
    assert 0 < difference.mean() < _ROUNDING
    assert difference.max() < _MOST
    # It is computed in float32: the engines agree on it as they do on any.
    assert np.abs(found - _logits(both[1], "torch-cpu", tiles)).max() < 1e-4


def _logits(folder: Path, name: str, tiles: Any) -> Any:
    engine = open_engine(load_package(folder), name, 1, precision="f32")
    out = engine.numpy(engine.run(tiles))
    return np.stack([engine.head.apply(one) for one in out]) if engine.head else out


def test_labels_are_the_same_but_where_two_are_as_likely(both: tuple[Path, Path]) -> None:
    values = np.random.default_rng(1).normal(50, 60, (1, 20, 24, 16)).astype(np.float32)
    scan = Volume(values, Grid.from_spacing((20, 24, 16), (1.0, 1.0, 2.0)))
    one, other = (Predictor(load_package(folder), threads=1).predict(scan).label_map.values for folder in both)
    assert (one == other).mean() > 0.99


def test_weights_beyond_float16_are_refused(package: ModelPackage) -> None:
    weights = {name: tensor.clone() for name, tensor in package.members[0].items()}
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = 1e6
    with pytest.raises(InputError, match=f"{name} of .* beyond what float16 holds"):
        halved(replace(package, members=(weights,)))


def test_the_figures_of_the_full_model_are_kept(package: ModelPackage) -> None:
    known = Evaluation.model_construct()
    assert halved(replace(package, evaluation=known)).evaluation is known

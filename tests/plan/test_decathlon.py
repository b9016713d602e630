"""Plans for all ten tasks of the Decathlon, from their published figures (benchmarks/plan/decathlon.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from medseg.plan.cost import GPU_OVERHEAD
from medseg.plan.plan import parse_plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def decathlon() -> ModuleType:
    """The program that makes the table."""
    spec = importlib.util.spec_from_file_location("decathlon", ROOT / "benchmarks" / "plan" / "decathlon.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["decathlon"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(shared_data: Path) -> Path:
    path = shared_data.parent / "reference" / "decathlon.json"
    if not path.is_file():
        pytest.skip("no published figures beside this repository")
    return path


@pytest.mark.parametrize("name", ["GPU 8 GiB", "GPU 80 GiB, 1 day", "CPU, 15 min"])
def test_every_plan_is_sound(decathlon: Any, reference: Path, name: str) -> None:
    target = decathlon.TARGETS[name]
    plans = decathlon.plans(reference, target)
    assert len(plans) == 10
    for task, plan in plans.items():
        assert parse_plan(plan.model_dump(mode="json"), task) == plan
        for which, c in plan.configurations.items():
            patch, spacing = np.array(c.patch.value), np.array(c.spacing.value)
            assert (patch % c.network.value.divisor == 0).all()
            need = c.cost.memory_bytes + GPU_OVERHEAD if target.kind == "gpu" else c.cost.ram_bytes
            assert need <= target.memory
            if target.budgets:
                assert c.steps.value * c.cost.seconds_per_step <= target.budgets[""]
                assert c.steps.value >= 100
                assert 3600 * c.cost.hours <= 1.01 * target.budgets[""]
            # A patch sees some centimetres around a voxel, or the whole scan.
            inside = np.arange(3) != c.slice_axis
            typical = np.array(decathlon.SHAPES[task]) * np.array(plan.configurations["3d"].spacing.value)
            least = 24 if target.kind == "cpu" else 70
            assert (patch * spacing >= np.minimum(least, typical))[inside].all(), (task, which)


def test_with_nnunets_memory_patches_come_out_like_nnunets(decathlon: Any, reference: Path) -> None:
    import json

    usual = {k: t["reference_plan"] for k, t in json.loads(reference.read_text())["tasks"].items()}
    for task, plan in decathlon.plans(reference, decathlon.TARGETS["GPU 8 GiB"]).items():
        c = plan.configurations["3d"]
        assert c.spacing.value == pytest.approx(usual[task]["spacing_mm"])
        assert 0.7 < np.prod(c.patch.value) / np.prod(usual[task]["patch"]) < 1.4, task
        assert (plan.normalisation.value[0].kind == "ct") == ("ct_clip_hu" in usual[task])
    low = {
        k for k, p in decathlon.plans(reference, decathlon.TARGETS["GPU 8 GiB"]).items() if "3d-low" in p.configurations
    }
    assert low == {
        f"Task{n}" for n in ("03_Liver", "06_Lung", "07_Pancreas", "08_HepaticVessel", "09_Spleen", "10_Colon")
    }

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from medseg.core.errors import InputError
from medseg.core.provenance import processor_name
from medseg.infer.engine import torch_precision
from medseg.plan.cost import DoesNotFitError, estimate
from medseg.train.measure import _alone, find_gpu, measure_step


def test_memory_is_what_was_reckoned(small_plan: Any) -> None:
    """Within a third; benchmarks/plan says how near in truth."""
    c = small_plan(patch=(48, 48, 48), features=(16, 32, 64, 64)).configuration("3d")
    found = measure_step(c, 1, 3, kind="cpu", threads=1)
    reckoned = estimate(c, 1, 3, kind="cpu", half=torch_precision(torch.device("cpu")) != "f32")
    assert found.memory_bytes == pytest.approx(reckoned.memory_bytes, rel=0.34)
    assert found.seconds > 0
    assert (found.measured_on, found.threads) == (processor_name(), 1)


def test_slices_and_tiny_patches_are_measured_too(small_plan: Any) -> None:
    flat = small_plan(dimensions=2, slice_axis=0, patch=(1, 16, 32), features=(4, 8), batch=3).configuration("2d")
    tiny = small_plan(patch=(8, 8, 8), features=(4, 8), batch=1).configuration("3d")
    for c in (flat, tiny):
        assert measure_step(c, 3, 2, kind="cpu", threads=1).seconds > 0


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_system_ends_is_no_silence() -> None:
    with pytest.raises(DoesNotFitError, match=r"does not fit this machine: the process .* was ended"):
        _alone(_end)


def test_memory_that_cannot_be_had_is_told(small_plan: Any) -> None:
    c = small_plan(patch=(1024, 1024, 1024), features=(64, 64), batch=64).configuration("3d")
    with pytest.raises(DoesNotFitError, match="does not fit this machine"):
        measure_step(c, 1, 3, kind="cpu", threads=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(InputError, match="torch sees no GPU"):
        find_gpu()

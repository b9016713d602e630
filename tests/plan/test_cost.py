from __future__ import annotations

from typing import Any

import pytest

from medseg.core.errors import InputError
from medseg.infer.window import lay, tile_starts
from medseg.models.build import build
from medseg.plan.cost import Cases, disk_bytes, estimate, prediction_seconds, ram_bytes, require_room, tile_count


@pytest.mark.parametrize("options", [{}, {"dimensions": 2, "slice_axis": 2, "patch": (32, 32, 1)}])
def test_weights_are_counted_as_the_network_has_them(small_plan: Any, options: Any) -> None:
    """All but the biases, which differ from layer to layer, and the heads of deep supervision."""
    (c,) = small_plan(features=(8, 16, 32), **options).configurations.values()
    network = build(c, 2, 4)
    there = sum(p.numel() for p in network.parameters())
    assert estimate(c, 2, 4, kind="cpu", half=False).parameters == pytest.approx(there, rel=0.05)


def test_what_autograd_keeps_is_counted_to_a_few_per_cent(small_plan: Any) -> None:
    import torch

    from medseg.train.loss import supervised

    c = small_plan(patch=(32, 32, 32), features=(8, 16, 32)).configuration("3d")
    network = build(c, 1, 3).train()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        supervised(network(torch.randn(2, 1, 32, 32, 32)), torch.randint(0, 3, (2, 32, 32, 32)))
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    reckoned = estimate(c, 1, 3, kind="gpu", half=False)
    passing = 2 * 4 * 8 * 32**3 * 4
    assert reckoned.memory_bytes - passing - 20 * reckoned.parameters == pytest.approx(size, rel=0.1)


def test_half_precision_takes_little_more_than_half(small_plan: Any) -> None:
    c = small_plan(patch=(64, 64, 64), features=(16, 32, 64)).configuration("3d")
    whole, half = (estimate(c, 1, 2, kind="gpu", half=h).memory_bytes for h in (False, True))
    assert 0.5 * whole < half < 0.65 * whole


def test_a_plan_that_does_not_fit_is_refused_with_the_largest_that_does(small_plan: Any) -> None:
    c = small_plan(patch=(64, 64, 64), features=(16, 32, 64), batch=4).configuration("3d")
    need = estimate(c, 1, 3, kind="gpu", half=True).memory_bytes
    require_room(c, 1, 3, need, kind="gpu", half=True)
    with pytest.raises(InputError, match=r"patch 64x64x64 with batch 4 takes .* A batch of 2 would fit, or a patch of"):
        require_room(c, 1, 3, int(0.6 * need), kind="gpu", half=True)
    with pytest.raises(InputError, match=r"A patch of \d+x\d+x\d+ with batch 1 would fit"):
        require_room(c, 1, 3, int(0.15 * need), kind="gpu", half=True)
    with pytest.raises(InputError, match="Plan with fewer features"):
        require_room(c, 1, 3, 1000, kind="gpu", half=True)
    with pytest.raises(InputError, match="would fit"):
        require_room(c, 1, 3, need, kind="gpu", half=True, measured=2 * need)


def test_what_is_said_to_fit_does(small_plan: Any) -> None:
    c = small_plan(patch=(64, 48, 32), features=(16, 32, 64), batch=2).configuration("3d")
    need = estimate(c, 1, 3, kind="cpu", half=False).memory_bytes
    with pytest.raises(InputError) as caught:
        require_room(c, 1, 3, need // 3, kind="cpu", half=False)
    words = caught.value.remedy.split()
    x, y, z = (int(n) for n in words[words.index("of") + 1].split("x"))
    smaller = small_plan(patch=(x, y, z), features=(16, 32, 64), batch=1).configuration("3d")
    require_room(smaller, 1, 3, need // 3, kind="cpu", half=False)


def test_a_prediction_is_its_tiles(small_plan: Any) -> None:
    """Along the axes 100, 40 and 30 voxels long 32 go 6, 2 and 1 times, with steps of 16."""
    c = small_plan(patch=(32, 32, 32), features=(4, 8), batch=2).configuration("3d")
    cases = Cases(count=20, own_voxels=1.0, shape=(100.0, 40.0, 30.0), voxels_in_all=1.0)
    assert prediction_seconds(c, cases, 0.6) == pytest.approx(12 * 0.6 / 3 / 2)


def test_of_slices_there_are_as_many_tiles_as_a_prediction_lays(small_plan: Any) -> None:
    c = small_plan(dimensions=2, slice_axis=2, patch=(32, 32, 1), features=(4, 8), batch=2).configuration("2d")
    cases = Cases(count=20, own_voxels=1.0, shape=(40.0, 32.0, 30.0), voxels_in_all=1.0)
    assert prediction_seconds(c, cases, 0.6) == pytest.approx(2 * 30 * 0.6 / 3 / 2)
    assert lay((40, 32, 30), c).count == 60


@pytest.mark.parametrize("patch", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("size", [1, 5, 33, 100])
def test_tiles_are_counted_as_they_are_laid(size: int, patch: int) -> None:
    assert tile_count(size, patch) == len(tile_starts(size, patch))


def test_disk_and_ram_of_cases_with_the_answer_known() -> None:
    cases = Cases(count=10, own_voxels=1e6, shape=(100, 100, 100), voxels_in_all=1e7)
    assert disk_bytes(cases, 2, 1000) == 5 * 10**7 + 8000
    more = [ram_bytes(cases, channels, 3, 0, kind="cpu", watched=2) for channels in (1, 2)]
    # Two scans for validation as they are stored, and one being predicted as floats.
    assert more[1] - more[0] == 2 * 2 * 10**6 + 4 * 10**6
    assert ram_bytes(cases, 1, 3, 5000, kind="cpu", watched=2) - more[0] == 5000
    assert ram_bytes(cases, 1, 3, 5000, kind="gpu", watched=2) == ram_bytes(cases, 1, 3, 0, kind="gpu", watched=2)

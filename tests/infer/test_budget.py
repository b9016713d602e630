from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.infer import budget
from medseg.infer.budget import within, workspace

SCAN = Grid.from_spacing((300, 300, 300), 1.0)


class Sized:
    def __init__(self, outputs: int) -> None:
        self.outputs = outputs


def tiles(small_plan: Any, memory: int | None, outputs: int = 20) -> Any:
    configuration = small_plan(patch=(16, 16, 16)).configuration("3d")
    return within(memory, Sized(outputs), configuration, SCAN, SCAN, channels=1, voxel_bytes=3)  # type: ignore[arg-type]


def test_less_memory_makes_more_bands_until_it_cannot_be_done(small_plan: Any) -> None:
    counts = []
    for mebibytes in (1500, 900, 700, 650):
        tiling = tiles(small_plan, mebibytes * 2**20)
        counts.append(len(tiling.bands))
        # What is held beside the sums is known: scan and labels, image, the network, and the rest.
        sums = 4 * (20 + 1) * tiling.held
        assert sums + 3 * 300**3 + 4 * 300**3 < mebibytes * 2**20
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] > 1
    with pytest.raises(InputError, match=r"this scan needs 0\.[56] GiB, --memory allows 0\.4.*Allow it more"):
        tiles(small_plan, 400 * 2**20)


def test_by_default_most_of_what_is_free(small_plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda: 2 * 2**30)
    assert len(tiles(small_plan, None).bands) == 1
    monkeypatch.setattr(budget, "free_memory", lambda: 300 * 2**20)
    with pytest.raises(InputError, match=r"this machine has free 0\.2"):
        tiles(small_plan, None)


def test_a_larger_network_takes_more(small_plan: Any) -> None:
    small, large = (small_plan(patch=(16, 16, 16), features=f).configuration("3d") for f in ((4, 8), (8, 16)))
    assert workspace(small, 3) < workspace(large, 3) < workspace(large, 30)
    assert workspace(large, 3) >= 16**3 * 4 * (2 * 8 + 8 + 3)
    assert np.isfinite(workspace(large, 3))

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg.infer.engine import TorchEngine
from medseg.infer.window import gaussian, lay, sweep, tile_starts

CPU = torch.device("cpu")


def assemble(slabs: Any, outputs: int, shape: tuple[int, ...]) -> np.ndarray:
    """All slabs put together; where they share a plane they must agree."""
    whole = np.full((outputs, *shape), np.nan, dtype=np.float32)
    for slab in slabs:
        there = whole[(slice(None), *slab.box)]
        known = ~np.isnan(there)
        assert np.array_equal(there[known], slab.values[known])
        whole[(slice(None), *slab.box)] = slab.values
        del slab
    assert not np.isnan(whole).any()
    return whole


def sliding_window(networks: Any, image: np.ndarray, configuration: Any, classes: int, device: Any) -> np.ndarray:
    engine = TorchEngine(networks, configuration, classes, device)
    shape = (image.shape[1], image.shape[2], image.shape[3])
    return assemble(sweep(engine, image, lay(shape, configuration)), classes, shape)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ---- where the tiles lie ------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 96), st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]))
def test_tiles_cover_every_voxel_evenly_and_overlap_enough(size: int, patch: int, overlap: float) -> None:
    starts = tile_starts(size, patch, overlap)
    if size <= patch:
        assert starts == [-((patch - size) // 2)]
        return
    assert starts[0] == 0
    assert starts[-1] == size - patch
    steps = np.diff(starts)
    assert steps.min() >= 1
    assert steps.max() - steps.min() <= 1
    assert steps.max() <= max(1, patch * (1 - overlap) + 1e-9)
    covered = np.zeros(size, dtype=bool)
    for start in starts:
        covered[start : start + patch] = True
    assert covered.all()
    # One tile fewer would have to take longer steps than the overlap allows.
    assert len(starts) == 2 or (size - patch) / (len(starts) - 2) > max(1, int(patch * (1 - overlap))) - 1e-9


def test_tiles_by_hand() -> None:
    assert tile_starts(8, 8) == [0]
    assert tile_starts(9, 8) == [0, 1]
    assert tile_starts(12, 8) == [0, 4]
    assert tile_starts(13, 8) == [0, 2, 5]
    assert tile_starts(20, 8) == [0, 4, 8, 12]
    assert tile_starts(4, 1) == [0, 1, 2, 3]


# ---- how much they weigh ------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(8, 8, 8), (9, 4, 1), (1, 1, 1), (31, 2, 16)])
def test_a_tile_weighs_most_in_its_middle_and_something_everywhere(patch: tuple[int, int, int]) -> None:
    weight = gaussian(patch)
    assert weight.shape == patch
    assert weight.dtype == np.float32
    assert weight.min() >= np.float32(1e-3)
    for axis in range(3):
        assert np.array_equal(weight, np.flip(weight, axis))
    middle = weight[tuple(slice((n - 1) // 2, n // 2 + 1) for n in patch)]
    assert (middle == weight.max()).all()
    if all(n % 2 for n in patch):
        assert weight.max() == 1


def test_an_eighth_of_the_length_from_the_middle_is_one_deviation() -> None:
    line = gaussian((17, 1, 1))[:, 0, 0]
    assert line[8] == 1
    assert line[8 + 2] == pytest.approx(np.exp(-0.5 * (2 / (17 / 8)) ** 2))
    assert line[0] == pytest.approx(1e-3)


# ---- networks whose answer is known -------------------------------------------------------------


class Linear(nn.Module):
    """Class k of voxel v is a_k times v plus b_k, whatever the neighbours; exact in float32."""

    def __init__(self, slopes: tuple[float, ...], shifts: tuple[float, ...], dimensions: int) -> None:
        super().__init__()
        self.slopes, self.shifts = torch.tensor(slopes), torch.tensor(shifts)
        self.dimensions = dimensions
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == self.dimensions + 2
        self.seen.append(tuple(x.shape))
        view = (1, -1, *[1] * self.dimensions)
        return x[:, :1] * self.slopes.view(view) + self.shifts.view(view)


SIZES = [(16, 16, 16), (5, 7, 3), (16, 9, 40), (33, 17, 21), (1, 1, 1), (1, 30, 18)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_linear_function_comes_back_everywhere(small_plan: Any, sizes: tuple[int, int, int]) -> None:
    configuration = small_plan(patch=(16, 16, 16)).configuration("3d")
    image = np.random.default_rng(0).normal(size=(1, *sizes)).astype(np.float32)
    network = Linear((1, -2, 0.5), (0, 3, -7), 3)
    logits = sliding_window([network], image, configuration, 3, CPU)
    assert logits.dtype == np.float32
    expected = np.stack([image[0], 3 - 2 * image[0], 0.5 * image[0] - 7])
    assert np.abs(logits - expected).max() < 1e-5
    assert all(shape[2:] == (16, 16, 16) for shape in network.seen)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_so_it_does_from_slices(small_plan: Any, sizes: tuple[int, int, int], axis: int) -> None:
    patch = [16, 16, 16]
    patch[axis] = 1
    configuration = small_plan(dimensions=2, slice_axis=axis, patch=patch).configuration("2d")
    image = np.random.default_rng(axis).normal(size=(2, *sizes)).astype(np.float32)
    network = Linear((1, -2), (0, 3), 2)
    logits = sliding_window([network], image, configuration, 2, CPU)
    assert np.abs(logits - np.stack([image[0], 3 - 2 * image[0]])).max() < 1e-5
    assert all(shape[1:] == (2, 16, 16) for shape in network.seen)


def test_a_convolution_computes_in_bfloat16_and_its_answer_comes_back_in_float32(small_plan: Any) -> None:
    configuration = small_plan().configuration("3d")
    image = np.random.default_rng(1).normal(size=(1, 21, 18, 9)).astype(np.float32)
    network = nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([1.0, -1.5]).view(2, 1, 1, 1, 1))
        network.bias.copy_(torch.tensor([0.0, 0.25]))
    logits = sliding_window([network], image, configuration, 2, CPU)
    expected = np.stack([image[0], 0.25 - 1.5 * image[0]])
    assert np.abs(logits - expected).max() < 2**-7 * np.abs(expected).max()
    whole = np.rint(image * 10)  # small whole numbers are exact in bfloat16
    with torch.no_grad():
        network.bias.zero_()
    logits = sliding_window([network], whole, configuration, 2, CPU)
    assert np.abs(logits - np.stack([whole[0], -1.5 * whole[0]])).max() < 1e-4


def test_several_networks_count_alike(small_plan: Any) -> None:
    configuration = small_plan().configuration("3d")
    image = np.random.default_rng(1).normal(size=(1, 20, 16, 9)).astype(np.float32)
    networks: list[nn.Module] = [Linear((1, 0), (0, 0), 3), Linear((2, 1), (3, 1), 3), Linear((0, 5), (0, 2), 3)]
    logits = sliding_window(networks, image, configuration, 2, CPU)
    assert np.abs(logits - np.stack([image[0] + 1, 2 * image[0] + 1])).max() < 1e-5


class Place(nn.Module):
    """Answers with the position within the tile, so that tiles disagree where they overlap."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.arange(x.shape[2], dtype=torch.float32).view(1, 1, -1, 1, 1).expand(len(x), 2, *x.shape[2:])


def test_overlapping_tiles_are_averaged_by_weight(small_plan: Any) -> None:
    """Beside the obvious loop, tile by tile."""
    configuration = small_plan().configuration("3d")
    image = np.zeros((1, 37, 16, 16), dtype=np.float32)
    weight = gaussian((16, 1, 1))[:, 0, 0].astype(np.float64)
    total, norm = np.zeros(37), np.zeros(37)
    for start in (0, 7, 14, 21):
        total[start : start + 16] += weight * np.arange(16)
        norm[start : start + 16] += weight
    logits = sliding_window([Place()], image, configuration, 2, CPU)
    # In the corners of the other two axes the weight touches its floor, so look at their middle.
    assert logits[0, :, 8, 8] == pytest.approx(total / norm, abs=0.02)
    assert logits[0, :, 8, 8] == pytest.approx(logits[1, :, 8, 8])


def test_the_number_of_tiles_at_once_does_not_matter(small_plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = small_plan().configuration("3d")
    image = np.random.default_rng(2).normal(size=(1, 30, 17, 33)).astype(np.float32)
    network = nn.Conv3d(1, 2, 3, padding=1)
    many = sliding_window([network], image, configuration, 2, CPU)
    monkeypatch.setattr(TorchEngine, "at_once", 1)
    assert np.abs(sliding_window([network], image, configuration, 2, CPU) - many).max() < 1e-2


def test_a_small_image_is_centred_in_zeros(small_plan: Any) -> None:
    class Neighbour(nn.Module):
        """What stands one voxel further along x."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.roll(x, -1, dims=2)

    configuration = small_plan().configuration("3d")
    image = np.ones((1, 5, 16, 16), dtype=np.float32)
    logits = sliding_window([Neighbour()], image, configuration, 1, CPU)
    assert logits[0, :, 0, 0].tolist() == [1, 1, 1, 1, 0]
    assert sliding_window([Place()], image, configuration, 2, CPU)[0, :, 0, 0] == pytest.approx([5, 6, 7, 8, 9])


# ---- in what order they run ---------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.tuples(*[st.integers(1, 50)] * 3), st.sampled_from([(16, 16, 16), (16, 8, 24)]), st.floats(0.02, 1.5), st.data()
)
def test_what_is_held_is_what_was_foretold(small_plan: Any, shape: Any, patch: Any, share: float, data: Any) -> None:
    """However little may be held, every voxel gets the same logits, and no more is held than said."""
    configuration = small_plan(patch=patch).configuration("3d")
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    held: list[int] = []

    class Counting(Place3):
        def zeros(self, wanted: tuple[int, ...]) -> np.ndarray:
            if len(wanted) == 4:
                alive[:] = [a for a in alive if a() is not None]
                made = np.zeros(wanted, dtype=np.float32)
                alive.append(weakref.ref(made))
                held.append(sum(a().size // 2 for a in alive))
                return made
            return np.zeros(wanted, dtype=np.float32)

    alive: list[Any] = []
    free = lay(shape, configuration)
    tiling = lay(shape, configuration, most=share * free.held)
    expected = assemble(sweep(Place3(), image, free), 2, shape)
    assert np.array_equal(assemble(sweep(Counting(), image, tiling), 2, shape), expected)
    assert max(held) <= tiling.held
    if len(tiling.bands) > 1:
        assert tiling.held < free.held
        assert tiling.count == len(tiling.tiles) >= len(free.tiles)


class Place3:
    """A numpy engine whose logits are the sum and the difference of each voxel's place in its tile and its value."""

    name, outputs, at_once = "numpy", 2, 2**18

    def run(self, tiles: np.ndarray) -> np.ndarray:
        place = np.indices(tiles.shape[2:]).sum(axis=0).astype(np.float32)
        return np.stack([tiles[:, 0] + place, tiles[:, 0] - 2 * place], axis=1)

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, dtype=np.float32)

    def array(self, values: np.ndarray) -> np.ndarray:
        return values

    def numpy(self, values: np.ndarray) -> np.ndarray:
        return values


def test_a_long_scan_holds_two_tiles_length_and_not_all(small_plan: Any) -> None:
    configuration = small_plan(patch=(16, 16, 16)).configuration("3d")
    tiling = lay((20, 30, 400), configuration)
    assert tiling.axis == 2
    assert tiling.held <= 20 * 30 * (16 + 8 + 3)
    assert lay((400, 30, 20), configuration).axis == 0


def test_a_band_runs_only_the_tiles_that_touch_it(small_plan: Any) -> None:
    configuration = small_plan(patch=(16, 16, 16)).configuration("3d")
    whole = lay((64, 64, 64), configuration)
    half = lay((64, 64, 64), configuration, most=0.6 * whole.held)
    assert len(whole.tiles) == 7**3
    assert len(half.bands) == 2
    assert 7**3 < len(half.tiles) <= 7 * 7 * 9


def test_what_is_not_wanted_is_not_run_and_says_so(small_plan: Any) -> None:
    configuration = small_plan(patch=(16, 16, 16)).configuration("3d")
    image = np.zeros((1, 16, 16, 64), dtype=np.float32)
    image[..., 40:] = 1
    run: list[int] = []
    told: list[int] = []

    class Telling(Place3):
        def run(self, tiles: np.ndarray) -> np.ndarray:
            run.append(len(tiles))
            return super().run(tiles)

    slabs = list(
        sweep(
            Telling(),
            image,
            lay((16, 16, 64), configuration),
            wanted=lambda box: bool(image[(slice(None), *box)].any()),
            tell=told.append,
        )
    )
    assert sum(told) == 7
    assert sum(run) == 3  # those that begin at 32, 40 and 48; the one at 24 ends before there is something
    covered = np.ones((16, 16, 64), dtype=bool)
    for slab in slabs:
        if slab.covered is not None:
            covered[slab.box] = slab.covered
    assert covered[..., 32:].all()
    assert not covered[..., :24].any()

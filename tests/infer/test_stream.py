from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from medseg.core.grid import Grid
from medseg.infer import stream
from medseg.infer.stream import bring_home

OBLIQUE = Rotation.from_euler("xyz", (10, 25, -14), degrees=True).as_matrix()


def obvious(logits: np.ndarray, source: Grid, onto: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every class's logits on the whole scan, then argmax and softmax; and by how much it was won."""
    at = source.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1)))
    inside = ((at >= -0.5 - 1e-3) & (at <= np.array(source.shape) - 0.5 + 1e-3)).all(axis=-1)
    points = np.moveaxis(np.clip(at, 0, np.array(source.shape) - 1), -1, 0)
    whole = np.stack([map_coordinates(one.astype(np.float64), points, order=1, mode="nearest") for one in logits])
    winner = np.where(inside, whole.argmax(axis=0), 0)
    shares = np.exp(whole - whole.max(axis=0))
    probability = np.where(inside, (shares / shares.sum(axis=0)).max(axis=0), 1)
    ranked = np.sort(whole, axis=0)
    margin = np.where(inside, ranked[-1] - ranked[-2], np.inf) if len(logits) > 1 else np.full(onto.shape, np.inf)
    return winner, probability, margin


def check(logits: np.ndarray, source: Grid, onto: Grid) -> np.ndarray:
    winner, probability = bring_home(logits, source, onto)
    expected, share, margin = obvious(logits, source, onto)
    # float32 beside float64: only a tie may be seen otherwise.
    clear = margin > 1e-4 * max(1.0, float(np.abs(logits).max()))
    assert clear.mean() > 0.98
    assert winner.shape == probability.shape == onto.shape
    assert np.array_equal(winner[clear], expected[clear])
    assert np.abs(probability - share).max() < 2e-3
    return winner


def smooth(classes: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=(classes, *shape))
    blurred = np.stack([gaussian_filter(one, 1.5, mode="nearest") for one in raw])
    return (blurred / blurred.std() * 3).astype(np.float32)


def noisy(classes: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 5, size=(classes, *shape)).astype(np.float32)


def reindexed(grid: Grid, order: tuple[int, ...], flips: tuple[bool, ...]) -> Grid:
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        matrix[old, new] = -1 if flip else 1
        matrix[old, 3] = grid.shape[old] - 1 if flip else 0
    shape = [grid.shape[o] for o in order]
    return Grid((shape[0], shape[1], shape[2]), grid.affine @ matrix)


@pytest.mark.parametrize("make", [smooth, noisy])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("flips", [(False, False, False), (True, True, False), (True, False, True)], ids=str)
def test_as_the_obvious_method_whichever_way_the_scan_lies(make, order, flips) -> None:
    source = Grid.from_spacing((12, 10, 9), (1.4, 1.1, 2.3), (-20, 4, 7))
    onto = reindexed(source.with_spacing((0.9, 1.3, 1.0)), order, flips)
    winner = check(make(4, source.shape), source, onto)
    assert set(np.unique(winner)) == {0, 1, 2, 3}


@pytest.mark.parametrize("make", [smooth, noisy])
def test_oblique_and_anisotropic_scans(make) -> None:
    scan = Grid.from_spacing((21, 18, 7), (0.8, 0.8, 5.0), (-30, 12, 100), OBLIQUE @ np.diag([-1.0, -1, 1]))
    box = scan.reoriented().window((2, 3, 0), (15, 13, 7))
    source = box.with_spacing((1.7, 1.7, 2.5))
    winner = check(make(3, source.shape), source, scan)
    assert winner.any()


def test_outside_the_source_there_is_background_for_sure() -> None:
    source = Grid.from_spacing((4, 5, 6), 1.0)
    logits = np.zeros((2, 4, 5, 6), dtype=np.float32)
    logits[1] = 9
    onto = source.window((-3, -2, -1), (10, 9, 8))
    winner, probability = bring_home(logits, source, onto)
    inner = np.zeros(onto.shape, dtype=bool)
    inner[3:7, 2:7, 1:7] = True
    assert (winner[inner] == 1).all()
    assert probability[inner] == pytest.approx(np.full(inner.sum(), 1 / (1 + np.exp(-9))))
    assert (winner[~inner] == 0).all()
    assert (probability[~inner] == 1).all()


def test_a_scan_wholly_elsewhere_is_background() -> None:
    source = Grid.from_spacing((4, 4, 4), 1.0)
    winner, probability = bring_home(noisy(3, (4, 4, 4)), source, Grid.from_spacing((5, 5, 5), 1.0, (100, 0, 0)))
    assert not winner.any()
    assert (probability == 1).all()


def test_a_tie_goes_to_the_lower_class() -> None:
    grid = Grid.from_spacing((1, 1, 3), 1.0)
    logits = np.array([[0, 1, 0], [2, 1, 0], [2, 0, 0]], dtype=np.float32).reshape(3, 1, 1, 3)
    winner, probability = bring_home(logits, grid, grid)
    assert winner.ravel().tolist() == [1, 0, 0]
    e = np.e
    assert probability.ravel() == pytest.approx([e**2 / (1 + 2 * e**2), e / (2 * e + 1), 1 / 3])


@given(st.integers(0, 10**6))
def test_any_pair_of_parallel_grids(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, other = rng.integers(1, 9, 3), rng.integers(1, 12, 3)
    source = Grid.from_spacing((size[0], size[1], size[2]), rng.uniform(0.5, 4, 3), rng.uniform(-3, 3, 3))
    onto = Grid.from_spacing((other[0], other[1], other[2]), rng.uniform(0.3, 4, 3), rng.uniform(-6, 3, 3))
    order = tuple(int(v) for v in rng.permutation(3))
    check(
        noisy(int(rng.integers(2, 6)), source.shape, seed), source, reindexed(onto, order, tuple(rng.random(3) < 0.5))
    )


@pytest.mark.parametrize("at_once", [1, 500, 3000])
def test_the_size_of_the_slabs_does_not_matter(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Grid.from_spacing((11, 7, 8), (1.4, 1.1, 2.3))
    onto = source.with_spacing((0.5, 0.9, 1.0)).window((-4, 1, -2), (40, 9, 30))
    logits = smooth(5, source.shape)
    winner, probability = bring_home(logits, source, onto)
    monkeypatch.setattr(stream, "_AT_ONCE", at_once)
    again, close = bring_home(logits, source, onto)
    assert np.array_equal(again, winner)
    assert np.abs(close - probability).max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 9, 8), (9, 1, 8), (9, 8, 1), (1, 1, 1)])
def test_one_voxel_thick(shape: tuple[int, int, int]) -> None:
    source = Grid.from_spacing(shape, (2.0, 2.0, 3.0))
    check(noisy(3, shape), source, source.with_spacing((1.0, 1.5, 0.7)))
    thick = Grid.from_spacing((6, 6, 6), (2.0, 2.0, 3.0))
    check(noisy(3, (6, 6, 6)), thick, thick.window((2, 2, 2), shape))


def test_more_classes_than_a_byte_holds() -> None:
    grid = Grid.from_spacing((2, 1, 1), 1.0)
    logits = np.zeros((300, 2, 1, 1), dtype=np.float32)
    logits[299, 0] = logits[256, 1] = 5
    winner, _ = bring_home(logits, grid, grid)
    assert winner.ravel().tolist() == [299, 256]


def test_huge_logits_do_not_overflow() -> None:
    grid = Grid.from_spacing((1, 1, 2), 1.0)
    winner, probability = bring_home(
        np.array([[3e4, -3e4], [-3e4, 3e4]], dtype=np.float32).reshape(2, 1, 1, 2), grid, grid
    )
    assert winner.ravel().tolist() == [0, 1]
    assert probability.ravel().tolist() == [1, 1]


def test_grids_that_are_not_parallel_are_no_pair() -> None:
    source = Grid.from_spacing((4, 4, 4), 1.0)
    with pytest.raises(ValueError, match="not parallel"):
        bring_home(noisy(2, (4, 4, 4)), source, Grid.from_spacing((4, 4, 4), 1.0, direction=OBLIQUE))

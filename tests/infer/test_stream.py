from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from medseg.core.grid import Grid
from medseg.core.resample import axis_maps
from medseg.infer import stream
from medseg.infer.engine import Head
from medseg.infer.stream import Decision, Home
from medseg.infer.window import Slab


def slabs(logits: np.ndarray, edges: list[int] | None = None, axis: int = 2) -> list[Slab]:
    """Logits in slabs between the edges, which share planes, along an axis."""
    size = logits.shape[1 + axis]
    edges = sorted({0, *(edges or []), size})
    found = []
    for first, last in itertools.pairwise(edges):
        box = [slice(0, n) for n in logits.shape[1:]]
        box[axis] = slice(max(0, first - 1), last)
        found.append(Slab((box[0], box[1], box[2]), np.ascontiguousarray(logits[(slice(None), *box)]), None))
    return found


def home(
    logits: np.ndarray, source: Grid, onto: Grid, edges: list[int] | None = None, axis: int = 2, **options
) -> Home:
    decision = options.pop("decision", Decision(len(logits)))
    return stream.bring_home(slabs(logits, edges, axis), source, onto, decision, probability=True, **options)


def bring_home(logits: np.ndarray, source: Grid, onto: Grid) -> tuple[np.ndarray, np.ndarray]:
    made = home(logits, source, onto)
    return made.winner, made.probability


OBLIQUE = Rotation.from_euler("xyz", (10, 25, -14), degrees=True).as_matrix()


def obvious(
    logits: np.ndarray, source: Grid, onto: Grid
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every class's logits on the whole scan, then argmax and softmax; by how much it was won; where
    all neighbours have the same winner, and their winners' probability, interpolated."""
    at = source.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1)))
    inside = ((at >= -0.5 - 1e-3) & (at <= np.array(source.shape) - 0.5 + 1e-3)).all(axis=-1)
    points = np.moveaxis(np.clip(at, 0, np.array(source.shape) - 1), -1, 0)
    whole = np.stack([map_coordinates(one.astype(np.float64), points, order=1, mode="nearest") for one in logits])
    winner = np.where(inside, whole.argmax(axis=0), 0)
    shares = softmax(whole)
    ranked = np.sort(whole, axis=0)
    margin = np.where(inside, ranked[-1] - ranked[-2], np.inf) if len(logits) > 1 else np.full(onto.shape, np.inf)
    winners = logits.argmax(axis=0)
    low = [np.floor(p).astype(int) for p in points]
    high = [np.minimum(one + 1, n - 1) for one, n in zip(low, source.shape, strict=True)]
    corners = [winners[c] for c in itertools.product(*zip(low, high, strict=True))]
    agreed = np.stack([c == corners[0] for c in corners]).all(axis=0)
    theirs = map_coordinates(softmax(logits.astype(np.float64)).max(axis=0), points, order=1, mode="nearest")
    return (
        winner,
        np.where(inside, shares, np.eye(len(logits))[0].reshape(-1, 1, 1, 1)),
        margin,
        agreed & inside,
        theirs,
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=0))
    return shares / shares.sum(axis=0)


def check(logits: np.ndarray, source: Grid, onto: Grid) -> np.ndarray:
    edges = [2, 5, 6] if source.shape[1] > 7 else []
    made = home(logits, source, onto, edges, axis=1, threads=2)
    expected, shares, margin, agreed, theirs = obvious(logits, source, onto)
    # float32 beside float64: only a tie may be seen otherwise.
    clear = margin > 1e-4 * max(1.0, float(np.abs(logits).max()))
    assert clear.mean() > 0.98
    assert made.winner.shape == made.probability.shape == onto.shape
    assert np.array_equal(made.winner[clear], expected[clear])
    likely = np.where(agreed, theirs, shares.max(axis=0))
    # A voxel that lies on voxels has neighbours on one side or on the other.
    at = source.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1)))
    at = np.clip(at, 0, np.array(source.shape) - 1)
    between = (np.abs(at - np.rint(at)) > 1e-6).all(axis=-1)
    assert np.abs(made.probability - likely)[between].max(initial=0) < 2e-3
    either = np.minimum(np.abs(made.probability - theirs), np.abs(made.probability - shares.max(axis=0)))
    assert either[np.isfinite(margin)].max(initial=0) < 2e-3
    # Where every class's probability is asked for, all is interpolated, and the winners stay.
    whole = np.zeros((len(logits), *onto.shape))
    whole[:] = np.eye(len(logits))[0].reshape(-1, 1, 1, 1)

    def keep(box, values) -> None:
        whole[(slice(None), *box)] = values

    again = home(logits, source, onto, edges, axis=1, keep=keep)
    assert np.array_equal(again.winner, made.winner)
    assert np.abs(whole - shares).max() < 2e-3
    return made.winner


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


# ---- what the short way must share with the long one ---------------------------------------------


@given(st.integers(0, 10**6), st.sampled_from([smooth, noisy]), st.booleans(), st.integers(2, 7))
def test_voxel_for_voxel_as_interpolating_all_of_them(seed: int, make, whole: bool, classes: int) -> None:
    """Labels where only the voxels between winners are interpolated, one by one or row by row, beside
    those where everything is: no voxel differs, ties and slabs notwithstanding."""
    rng = np.random.default_rng(seed)
    size = [int(n) for n in rng.integers(4, 14, 3)]
    source = Grid.from_spacing((size[0], size[1], size[2]), rng.uniform(0.8, 3, 3))
    onto = source.with_spacing(rng.uniform(0.5, 2.5, 3))
    logits = make(classes, source.shape, seed)
    if whole:  # many exact ties
        logits = np.rint(logits)
    sure = [stream._Axis.of(m, n, nearest=False) for m, n in zip(axis_maps(source, onto), source.shape, strict=True)]
    every = stream._interpolate(logits, [a.low for a in sure], [a.share for a in sure])
    axis = int(rng.integers(3))
    edges = sorted({int(e) for e in rng.integers(1, size[axis], 2)})
    for mostly in (0.0, 1.0):  # row by row; one by one
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(stream, "_MOSTLY", mostly)
            found = home(logits, source, onto, edges, axis).winner
        assert np.array_equal(found, every.argmax(axis=0))


@pytest.mark.parametrize("classes", [3, 40])
def test_features_go_home_as_their_logits_would(classes: int) -> None:
    source = Grid.from_spacing((9, 8, 7), (1.5, 1.5, 2.0))
    onto = source.with_spacing((0.9, 1.0, 1.1))
    rng = np.random.default_rng(0)
    features = smooth(5, source.shape)
    weight, bias = rng.normal(size=(classes, 5)).astype(np.float32), rng.normal(size=classes).astype(np.float32)
    logits = np.tensordot(weight, features, 1) + bias.reshape(-1, 1, 1, 1)
    made = home(features, source, onto, [3], decision=Decision(classes, head=Head(weight, bias)))
    check(logits.astype(np.float32), source, onto)
    expected, _, margin, _, _ = obvious(logits, source, onto)
    clear = margin > 1e-4
    assert np.array_equal(made.winner[clear], expected[clear])


def test_regions_paint_over_each_other() -> None:
    """Nested tumour: whole (2), core (1) in it, painted in that order, as nnU-Net decides regions."""
    source = Grid.from_spacing((8, 8, 8), 2.0)
    onto = source.with_spacing((1.0, 1.3, 0.7))
    logits = smooth(3, source.shape)
    decision = Decision(4, regions=(2, 1, 3))
    made = home(logits, source, onto, [3, 4], decision=decision)
    at = np.moveaxis(source.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1))), -1, 0)
    points = np.clip(at, 0, 7)
    whole = np.stack([map_coordinates(one.astype(np.float64), points, order=1) for one in logits])
    expected = np.zeros(onto.shape, dtype=int)
    for one, painted in zip(whole, (2, 1, 3), strict=True):
        expected[one > 0] = painted
    clear = (np.abs(whole) > 1e-4).all(axis=0)
    assert np.array_equal(made.winner[clear], expected[clear])
    assert set(np.unique(made.winner)) == {0, 1, 2, 3}
    shares = decision.probabilities(whole.astype(np.float32))
    assert shares.sum(axis=0) == pytest.approx(np.ones(onto.shape), abs=1e-5)
    assert shares[3] == pytest.approx(1 / (1 + np.exp(-whole[2])), abs=1e-5)


def test_along_a_nearest_axis_nothing_is_interpolated() -> None:
    source = Grid.from_spacing((6, 6, 5), (1.0, 1.0, 5.0))
    onto = source.with_spacing((0.8, 0.8, 1.0))
    logits = smooth(3, source.shape)
    made = home(logits, source, onto, [2, 4], nearest=(2,))
    at = source.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1)))
    at[..., 2] = np.clip(np.floor(at[..., 2] + 0.5), 0, 4)
    points = np.moveaxis(np.clip(at, 0, [5, 5, 4]), -1, 0)
    whole = np.stack([map_coordinates(one.astype(np.float64), points, order=1) for one in logits])
    ranked = np.sort(whole, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-4
    assert np.array_equal(made.winner[clear], whole.argmax(axis=0)[clear])


def test_what_no_tile_covered_is_background() -> None:
    source = Grid.from_spacing((8, 4, 4), 1.0)
    onto = source.with_spacing((0.5, 1, 1))
    logits = np.zeros((2, 8, 4, 4), dtype=np.float32)
    logits[1] = 3
    covered = np.ones((8, 4, 4), dtype=bool)
    covered[5:] = False
    (one,) = slabs(logits)
    made = stream.bring_home(
        [Slab(one.box, one.values, covered)], source, onto, Decision(2), probability=True, keep=lambda *_: None
    )
    at = source.to_index(onto.to_world(np.stack(np.indices(onto.shape), axis=-1)))[..., 0]
    assert (made.winner[at <= 4] == 1).all()
    assert not made.winner[at > 4].any()
    assert (made.probability[at > 5] == 1).all()
    assert made.tally.won.tolist() == [3 * 16, 5 * 16]


def test_the_tally_counts_every_voxel_once() -> None:
    source = Grid.from_spacing((9, 8, 7), (1.5, 1.5, 2.0))
    logits = noisy(4, source.shape)
    shares = softmax(logits.astype(np.float64) / 2)
    winner = logits.argmax(axis=0)
    for axis in range(3):
        tally = home(logits, source, source, [2, 5], axis, decision=Decision(4, temperature=2.0)).tally
        assert tally.won.tolist() == np.bincount(winner.ravel(), minlength=4).tolist()
        assert tally.probability == pytest.approx(shares.sum(axis=(1, 2, 3)), rel=1e-5)
        assert tally.inside == pytest.approx([shares[k][winner == k].sum() for k in range(4)], rel=1e-5)
        assert tally.voxel_volume == pytest.approx(4.5)

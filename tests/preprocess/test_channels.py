from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.resample import resample
from medseg.core.volume import Volume
from medseg.plan.plan import Normalisation
from medseg.preprocess.channels import Alignment, assemble, complete, overlap, register
from medseg.preprocess.normalise import normalise

GRID = Grid.from_spacing((40, 48, 36), (2, 2, 2), (-40, -48, 10))


def head(world: Any) -> Any:
    """Tissues 0 to 4 of something like a head at points in mm: a shell, what is in it, and lumps of
    two kinds that lie nowhere regularly."""
    rng = np.random.default_rng(5)
    balls = [((0, 0, 45), (34, 42, 30), 1), ((0, 0, 47), (29, 36, 25), 2)]
    for number in range(40):
        at = rng.normal(size=3)
        at *= rng.uniform(0.3, 0.9) / np.linalg.norm(at)
        balls.append((tuple(at * (29, 36, 25) + (0, 0, 47)), tuple(rng.uniform(3, 8, 3)), 3 + number % 2))
    tissue = np.zeros(world.shape[:-1], dtype=int)
    for centre, radii, value in balls:
        tissue[(((world - np.array(centre)) / radii) ** 2).sum(-1) < 1] = value
    return tissue


def scan(grid: Grid, contrast: Any, moved: Any = None, seed: int = 0) -> Volume:
    """The head in a contrast, on a grid whose header is wrong by ``moved``."""
    world = grid.to_world(np.stack(np.indices(grid.shape), axis=-1))
    values = gaussian_filter(np.array(contrast, dtype=float)[head(world)], 0.7)
    values += np.random.default_rng(seed).normal(0, 3, values.shape)
    return Volume(values[None].astype(np.float32), grid if moved is None else Grid(grid.shape, moved @ grid.affine))


def motion(degrees: Any, shift: Any) -> Any:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


T1, T2 = [0, 60, 100, 20, 80], [0, 30, 90, 200, 140]
FIXED = scan(GRID, T1)


@pytest.mark.parametrize(
    ("degrees", "shift"),
    [((0, 0, 0), (0, 0, 0)), ((0, 0, 0), (7.3, -4.1, 5.5)), ((6, -4, 9), (3, 5, -6)), ((0, 12, 0), (-10, 0, 4))],
    ids=["none", "shift", "turn and shift", "far"],
)
def test_a_known_motion_is_found_between_contrasts(degrees: Any, shift: Any) -> None:
    other = Grid.from_spacing(
        (52, 60, 30), (1.6, 1.6, 2.5), (-42, -47, 8), Rotation.from_rotvec([0, 0, 0.1]).as_matrix()
    )
    wrong = motion(degrees, shift)
    moving = scan(other, T2, wrong, seed=1)
    found = register(moving, FIXED)
    # Whatever was put into the header is taken out: each corner comes back to less than half a voxel.
    back = found.apply(moving).grid
    assert back.shape == other.shape
    assert back.distance(other) < 1
    assert found.rotation_degrees == pytest.approx(np.degrees(Rotation.from_matrix(wrong[:3, :3]).magnitude()), abs=1)
    middle = moving.grid.to_world((np.array(other.shape) - 1) / 2)
    away = np.linalg.norm((np.linalg.inv(wrong) @ [*middle, 1])[:3] - middle)
    assert found.translation_mm == pytest.approx(away, abs=0.5)
    assert found.overlap > 0.8
    assert found.information >= found.information_before
    if np.any(shift):
        assert found.information > found.information_before + 0.05


def test_the_same_scans_give_the_same_motion() -> None:
    moving = scan(GRID, T2, motion((3, 0, 0), (4, 0, 0)), seed=1)
    first, again = register(moving, FIXED), register(moving, FIXED)
    assert np.array_equal(first.transform, again.transform)
    assert first.information == again.information


def test_scans_of_two_frames_of_reference_are_found_by_their_middles() -> None:
    moving = scan(GRID, T2, motion((0, 0, 0), (500, -300, 900)), seed=1)
    found = register(moving, FIXED)
    assert found.apply(moving).grid.distance(GRID) < 1
    assert found.information_before == 0


def test_what_no_motion_makes_better_stays_where_its_header_puts_it() -> None:
    noise = Volume(np.random.default_rng(9).normal(size=(1, *GRID.shape)).astype(np.float32), GRID)
    found = register(noise, FIXED)
    assert found.information >= found.information_before
    assert found.information < 0.05


def test_oblique_and_flipped_grids_are_registered_alike() -> None:
    flip = np.diag([-1.0, -1, 1, 1])
    flip[:2, 3] = np.array(GRID.shape[:2]) - 1
    turned = Grid(GRID.shape, GRID.affine @ flip)
    moving = scan(turned, T2, motion((4, 0, 5), (2, -3, 4)), seed=1)
    assert register(moving, FIXED).apply(moving).grid.distance(turned) < 1


def test_channels_go_onto_the_first_grid() -> None:
    fine = scan(Grid.from_spacing((80, 96, 72), (1, 1, 1), (-40.5, -48.5, 9.5)), T2)
    same = Volume(FIXED.values * 2, GRID)
    jitter = GRID.affine.copy()
    jitter[:3, 3] += 0.013
    whole = assemble(
        {"T1": FIXED, "T2": fine, "T1 again": same, "jittered": Volume(FIXED.values, Grid(GRID.shape, jitter))}
    )
    assert whole.grid == GRID
    assert whole.values.shape == (4, *GRID.shape)
    assert np.array_equal(whole.values[0], FIXED.values[0])
    assert np.array_equal(whole.values[1], resample(fine, onto=GRID).values[0])
    assert np.array_equal(whole.values[2], same.values[0])
    assert np.array_equal(whole.values[3], FIXED.values[0])
    # Resampled, the one contrast lies on the other: the second kind of lump is bright in both.
    lumps = head(GRID.to_world(np.stack(np.indices(GRID.shape), axis=-1))) == 3
    assert whole.values[1][lumps].mean() > 150 > whole.values[1][~lumps].mean() + 100


def test_outside_stands_zero_or_air() -> None:
    half = GRID.window((0, 0, 0), (20, 48, 36))
    for contrast, air in ((T2, 0), (np.array(T2) - 1024, -1024)):
        part = Volume(np.array(contrast, dtype=np.int16)[np.zeros((1, *half.shape), dtype=int)], half)
        values = assemble({"T1": FIXED, "T2": part}).values[1]
        assert (values[20:] == air).all()


def test_overlap_is_a_share_of_the_fixed_grid() -> None:
    assert overlap(GRID, GRID) == 1
    assert overlap(GRID.window((0, 0, 0), (20, 48, 36)), GRID) == pytest.approx(0.5, abs=0.03)
    assert overlap(GRID.window((100, 0, 0), GRID.shape), GRID) == 0


def test_what_cannot_be_channels() -> None:
    two = Volume(np.concatenate([FIXED.values] * 2), GRID)
    with pytest.raises(InputError, match="channel T2 has 2 channels"):
        assemble({"T1": FIXED, "T2": two})
    away = Volume(FIXED.values, GRID.window((1000, 0, 0), GRID.shape))
    with pytest.raises(InputError, match=r"channel T2 shows nothing of what that of T1 shows.*--register"):
        assemble({"T1": FIXED, "T2": away})
    sliver = scan(Grid.from_spacing((9, 9, 9), (1, 1, 1), (-4, -4, 40)), T2)
    with pytest.raises(InputError, match=r"cannot be aligned|do not overlap"):
        register(sliver, FIXED)


def test_a_missing_channel_is_zero_once_normalised() -> None:
    ct = {"kind": "ct", "low": -100, "high": 200, "mean": 33.3, "std": 17}
    rules = tuple(
        Normalisation.model_validate({"channel": name, **rule})
        for name, rule in (
            ("T1", {"kind": "zscore"}),
            ("CT", ct),
            ("T2", {"kind": "zscore"}),
            ("DWI", {"kind": "zscore"}),
        )
    )
    whole = complete(Volume(np.stack([FIXED.values[0], FIXED.values[0] + 1]), GRID), ["T1", "T2"], rules)
    out = normalise(whole, rules).values
    assert whole.channels == 4
    assert not out[1].any()
    assert not out[3].any()
    np.testing.assert_array_equal(out[0], normalise(FIXED, rules[:1]).values[0])
    np.testing.assert_array_equal(whole.values[2], FIXED.values[0] + 1)
    assert complete(FIXED, ["T1"], rules[:1]) is FIXED


def test_an_alignment_moves_the_grid_and_no_voxel() -> None:
    moved = Alignment(motion((0, 0, 90), (1, 2, 3)), 90, 3, 1, 0, 1).apply(FIXED)
    assert moved.values is FIXED.values
    assert moved.grid.origin == pytest.approx((48 + 1, -40 + 2, 10 + 3))

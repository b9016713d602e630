from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from medseg.plan.plan import Augmentation
from medseg.train.augment import Variation, cut, draw, vary


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def arrays(shape: tuple[int, int, int] = (20, 18, 22), channels: int = 2, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(channels, *shape)).astype(np.float16), rng.integers(0, 5, shape).astype(np.uint8)


def turn(axis: int, quarters: int = 1) -> np.ndarray:
    """A rotation by quarters of a turn from the axis after ``axis`` towards the one after that."""
    return np.rint(Rotation.from_rotvec(np.eye(3)[axis] * np.pi / 2 * quarters).as_matrix())


def ball(shape: tuple[int, int, int], centre: tuple[float, ...], radius: Any) -> tuple[np.ndarray, np.ndarray]:
    """A bright ball, soft at its rim, and its labels."""
    at = np.stack(np.indices(shape), axis=-1)
    away = np.sqrt((((at - centre) / radius) ** 2).sum(axis=-1))
    soft = np.clip((1 - away) * np.max(radius) + 0.5, 0, 1)
    return soft[None].astype(np.float16), (away <= 1).astype(np.uint8)


def centroid(values: torch.Tensor) -> np.ndarray:
    weights = values.double().numpy()
    grid = np.stack(np.indices(weights.shape), axis=-1)
    return (grid * weights[..., None]).sum(axis=(0, 1, 2)) / weights.sum()


# ---- drawing ------------------------------------------------------------------------------------


def bounds() -> Any:
    return st.builds(
        Augmentation,
        rotation_degrees=st.floats(0, 180),
        scaling=st.floats(0, 0.8),
        spatial_share=st.sampled_from([0.0, 0.5, 1.0]),
        intensity=st.floats(0, 0.9),
        gamma=st.floats(0, 0.9),
        noise=st.floats(0, 2),
        mirror=st.sampled_from([(), (0,), (0, 1, 2)]),
    )


@given(bounds(), st.integers(0, 2**31), st.integers(1, 4))
def test_what_is_drawn_lies_within_the_settings(small_plan: Any, settings: Augmentation, seed: int, n: int) -> None:
    spacing = (1.0, 1.5, 2.0)
    configuration = small_plan(spacing=spacing).configuration("3d")
    one = draw(np.random.default_rng(seed), settings, configuration, n)
    assert one.gain.shape == one.shift.shape == one.gamma.shape == (n,)
    assert (np.abs(one.gain - 1) <= settings.intensity).all()
    assert (np.abs(one.shift) <= settings.intensity).all()
    assert (np.abs(np.log(one.gamma)) <= settings.gamma + 1e-12).all()
    assert 0 <= one.noise <= settings.noise
    if one.matrix is not None:
        # In mm it is a rotation, a mirror at most, and a scale.
        steps = np.array(spacing)
        physical = one.matrix * steps[:, None] / steps[None, :]
        scale = abs(np.linalg.det(physical)) ** (1 / 3)
        assert 1 - settings.scaling - 1e-9 <= scale <= 1 + settings.scaling + 1e-9
        assert np.abs(physical @ physical.T - scale**2 * np.eye(3)).max() < 1e-9
        if not settings.mirror:
            assert np.linalg.det(physical) > 0
        if settings.rotation_degrees == 0:
            assert np.abs(np.abs(physical) - scale * np.eye(3)).max() < 1e-9
    if settings.spatial_share == 0 and not settings.mirror:
        assert one.matrix is None
    again = draw(np.random.default_rng(seed), settings, configuration, n)
    assert (one.noise, one.noise_seed) == (again.noise, again.noise_seed)
    assert np.array_equal(one.gain, again.gain)


def test_the_angles_reach_as_far_as_asked_and_no_further(small_plan: Any) -> None:
    configuration = small_plan(spacing=(1, 1, 1)).configuration("3d")
    settings = Augmentation(rotation_degrees=20, scaling=0, spatial_share=1)
    rng = np.random.default_rng(0)
    angles = [
        np.degrees(Rotation.from_matrix(draw(rng, settings, configuration, 1).matrix).magnitude()) for _ in range(300)
    ]
    assert 15 < max(angles) < 20 * 3**0.5 + 1
    assert min(angles) < 10


@pytest.mark.parametrize(
    ("arguments", "axis"),
    [
        ({"spacing": (1, 1, 4)}, 2),
        ({"spacing": (5, 1, 1.2)}, 0),
        ({"spacing": (1, 2, 1), "dimensions": 2, "slice_axis": 1, "patch": (16, 1, 16)}, 1),
    ],
    ids=["thick", "thick along x", "2d"],
)
def test_thick_slices_turn_in_their_own_plane_only(small_plan: Any, arguments: Any, axis: int) -> None:
    plan = small_plan(**arguments)
    (configuration,) = plan.configurations.values()
    settings = Augmentation(rotation_degrees=90, scaling=0.3, spatial_share=1)
    one = draw(np.random.default_rng(6), settings, configuration, 1)
    assert one.matrix is not None
    others = [a for a in range(3) if a != axis]
    assert np.abs(one.matrix[axis, others]).max() == 0
    assert np.abs(one.matrix[others, axis]).max() == 0
    assert abs(one.matrix[others[0], others[1]]) > 0.05


def test_mirrors_flip_the_axes_that_are_listed_half_of_the_time(small_plan: Any) -> None:
    configuration = small_plan().configuration("3d")
    settings = Augmentation(spatial_share=0, mirror=(0, 2))
    rng = np.random.default_rng(0)
    seen = [draw(rng, settings, configuration, 1).matrix for _ in range(400)]
    signs = np.array([[1, 1, 1] if m is None else np.diag(m) for m in seen])
    assert all(m is None or np.array_equal(np.abs(m), np.eye(3)) for m in seen)
    assert (signs[:, 1] == 1).all()
    for axis in (0, 2):
        assert np.mean(signs[:, axis] == -1) == pytest.approx(0.5, abs=0.1)


# ---- cutting ------------------------------------------------------------------------------------

PATCHES = [(8, 8, 8), (7, 8, 5), (1, 6, 6), (30, 30, 30), (20, 18, 22), (1, 1, 1)]


def centre_of(start: tuple[int, ...], patch: tuple[int, ...]) -> tuple[float, float, float]:
    x, y, z = (s + (p - 1) / 2 for s, p in zip(start, patch, strict=True))
    return x, y, z


def plain_crop(values: np.ndarray, start: tuple[int, ...], patch: tuple[int, ...]) -> np.ndarray:
    """Voxel by voxel, zero outside."""
    out = np.zeros((len(values), *patch), dtype=values.dtype)
    for index in np.ndindex(patch):
        at = tuple(np.add(start, index))
        if all(0 <= a < n for a, n in zip(at, values.shape[1:], strict=True)):
            out[(slice(None), *index)] = values[(slice(None), *at)]
    return out


@pytest.mark.parametrize("matrix", [None, np.eye(3)], ids=["no matrix", "identity"])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("start", [(3, 2, 4), (-2, 5, 15), (-100, 0, 0), (19, 17, 21)], ids=str)
def test_the_identity_is_a_crop(matrix: Any, patch: tuple[int, int, int], start: tuple[int, int, int]) -> None:
    image, labels = arrays()
    values, classes = cut(image, labels, centre_of(start, patch), patch, matrix)
    assert values.dtype == torch.float32
    assert classes.dtype == torch.int64
    assert values.shape == (2, *patch)
    assert np.abs(values.numpy() - plain_crop(image, start, patch)).max() < 1e-4
    assert np.array_equal(classes.numpy(), plain_crop(labels[None], start, patch)[0])


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_rot90(size: int, axis: int, quarters: int) -> None:
    image, labels = arrays()
    patch, start = (size,) * 3, (6, 5, 7)
    matrix = turn(axis, quarters)
    values, classes = cut(image, labels, centre_of(start, patch), patch, matrix)
    plane = ((axis + 1) % 3, (axis + 2) % 3)
    # The matrix takes new offsets to old ones, so that what is seen turns the other way.
    expected = np.rot90(plain_crop(image, start, patch), -quarters, (plane[0] + 1, plane[1] + 1))
    assert np.abs(values.numpy() - expected).max() < 1e-4
    assert np.array_equal(classes.numpy(), np.rot90(plain_crop(labels[None], start, patch)[0], -quarters, plane))


@pytest.mark.parametrize("signs", [(-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, -1)], ids=str)
def test_a_mirror_is_a_flip(signs: tuple[int, int, int]) -> None:
    image, labels = arrays()
    patch, start = (8, 7, 6), (6, 5, 7)
    values, classes = cut(image, labels, centre_of(start, patch), patch, np.diag(signs).astype(float))
    axes = [a for a, s in enumerate(signs) if s < 0]
    assert np.abs(values.numpy() - np.flip(plain_crop(image, start, patch), [a + 1 for a in axes])).max() < 1e-4
    assert np.array_equal(classes.numpy(), np.flip(plain_crop(labels[None], start, patch)[0], axes))


@given(st.integers(0, 10**6))
def test_any_matrix_beside_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, labels = arrays((9, 11, 10), seed=seed)
    side = rng.integers(1, 10, 3)
    patch = (int(side[0]), int(side[1]), int(side[2]))
    matrix = np.eye(3) + rng.uniform(-0.6, 0.6, (3, 3))
    centre = tuple(rng.uniform(-2, 12, 3))
    values, classes = cut(image, labels, (centre[0], centre[1], centre[2]), patch, matrix)
    offsets = np.stack(np.indices(patch), axis=-1) - (np.array(patch) - 1) / 2
    at = np.moveaxis(offsets @ matrix.T + np.array(centre), -1, 0)
    # A rim of zeros, as the patch sees it.
    for mine, one in zip(values.numpy(), image, strict=True):
        expected = map_coordinates(np.pad(one.astype(np.float64), 1), at + 1, order=1, mode="constant")
        assert np.abs(mine - expected).max() < 2e-3
    near = np.abs(at - np.floor(at) - 0.5).min(axis=0) < 1e-3  # half way between two voxels
    expected = map_coordinates(labels, np.rint(at), order=0, mode="constant")
    assert np.array_equal(classes.numpy()[~near], expected[~near])
    assert set(np.unique(classes.numpy())) <= {0, *np.unique(labels)}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("scale", [0.83, 1.0, 1.27])
def test_image_and_labels_move_together(axis: int, scale: float) -> None:
    matrix = Rotation.from_rotvec(np.eye(3)[axis] * 0.4).as_matrix() * scale
    spot, middle = np.array([24.0, 18.0, 17.0]), np.array([19.5, 20.5, 21.5])
    image, labels = ball((40, 40, 40), tuple(spot), 5)
    values, classes = cut(image, labels, (19.5, 20.5, 21.5), (32, 32, 32), matrix)
    expected = np.linalg.inv(matrix) @ (spot - middle) + 15.5
    assert np.abs(centroid(values[0]) - expected).max() < 0.1
    assert np.abs(centroid(classes) - expected).max() < 0.15
    assert np.abs(centroid(values[0]) - centroid(classes)).max() < 0.2
    assert int(classes.sum()) == pytest.approx(4 / 3 * np.pi * (5 / scale) ** 3, rel=0.08)


def test_a_turn_of_anisotropic_voxels_is_rigid_in_millimetres(small_plan: Any) -> None:
    """A ball in space stays one, and goes where a rotation in space takes it."""
    spacing = np.array([1.0, 1.5, 2.5])
    configuration = small_plan(spacing=tuple(spacing)).configuration("3d")
    settings = Augmentation(rotation_degrees=60, scaling=0, spatial_share=1)
    matrix = draw(np.random.default_rng(4), settings, configuration, 1).matrix
    assert matrix is not None
    physical = matrix * spacing[:, None] / spacing[None, :]
    assert Rotation.from_matrix(physical).magnitude() > 0.5
    shape = (60, 40, 24)
    middle = (np.array(shape) - 1) / 2
    offset = np.array([9.0, -6.0, 5.0])
    image, labels = ball(shape, tuple(middle + offset / spacing), 8 / spacing)
    _, classes = cut(image, labels, (middle[0], middle[1], middle[2]), shape, matrix)
    found = (centroid(classes) - middle) * spacing
    assert found == pytest.approx(np.linalg.inv(physical) @ offset, abs=0.4)
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(offset), abs=0.4)
    points = (np.argwhere(classes.numpy()) - centroid(classes)) * spacing
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(8, abs=1.5)
    assert points.std(axis=0) == pytest.approx(np.full(3, 8 / 5**0.5), rel=0.1)


def test_outside_there_is_zero() -> None:
    image, labels = np.ones((1, 10, 10, 10), dtype=np.float16), np.full((10, 10, 10), 3, dtype=np.uint8)
    matrix = Rotation.from_rotvec([0, 0, 0.3]).as_matrix()
    values, classes = cut(image, labels, (40.0, 4.5, 4.5), (8, 8, 8), matrix)
    assert not values.any()
    assert not classes.any()
    values, classes = cut(image, labels, (4.5, 4.5, 4.5), (20, 20, 20), matrix)
    assert values[0, :3, :3, :3].abs().max() == 0
    assert values[0, 10, 10, 10] == pytest.approx(1)
    assert set(classes.unique().tolist()) == {0, 3}


def test_big_label_numbers_survive() -> None:
    labels = np.zeros((10, 10, 10), dtype=np.uint16)
    labels[2:8, 2:8, 2:8] = 60001
    image = np.zeros((1, 10, 10, 10), dtype=np.float16)
    for matrix in (None, Rotation.from_rotvec([0.2, 0.1, 0.3]).as_matrix()):
        _, classes = cut(image, labels, (4.5, 4.5, 4.5), (10, 10, 10), matrix)
        assert set(classes.unique().tolist()) == {0, 60001}


def test_mapped_read_only_files_are_cut_and_left_alone(tmp_path: Path) -> None:
    image, labels = arrays()
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "labels.npy", labels)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r"), np.load(tmp_path / "labels.npy", mmap_mode="r")
    for matrix in (None, Rotation.from_rotvec([0.2, 0.1, 0.3]).as_matrix()):
        from_disk = cut(*mapped, (9.5, 8.5, 10.5), (8, 8, 8), matrix)
        in_memory = cut(image, labels, (9.5, 8.5, 10.5), (8, 8, 8), matrix)
        assert all(torch.equal(a, b) for a, b in zip(from_disk, in_memory, strict=True))
        from_disk[0].zero_()
    assert np.array_equal(np.load(tmp_path / "image.npy"), image)


# ---- intensities --------------------------------------------------------------------------------


def variation(**change: Any) -> Variation:
    values = {"gain": [1.0, 1.0], "shift": [0.0, 0.0], "gamma": [1.0, 1.0], "noise": 0.0, "noise_seed": 3, **change}
    arrays_ = {k: np.array(v) if isinstance(v, list) else v for k, v in values.items()}
    return Variation(matrix=None, **arrays_)


@pytest.fixture
def patch() -> torch.Tensor:
    return torch.randn((2, 6, 5, 4), generator=torch.Generator().manual_seed(0))


def test_nothing_varied_is_nothing_changed(patch: torch.Tensor) -> None:
    assert torch.equal(vary(patch, variation()), patch)


def test_gain_and_shift_by_hand(patch: torch.Tensor) -> None:
    out = vary(patch, variation(gain=[2.0, 0.5], shift=[1.0, -3.0]))
    assert torch.allclose(out[0], patch[0] * 2 + 1)
    assert torch.allclose(out[1], patch[1] * 0.5 - 3)


def test_gamma_bends_each_channel_within_its_own_range(patch: torch.Tensor) -> None:
    out = vary(patch, variation(gamma=[2.0, 0.5]))
    for one, was, gamma in zip(out, patch, (2.0, 0.5), strict=True):
        low, high = was.min(), was.max()
        assert torch.allclose(one, ((was - low) / (high - low)) ** gamma * (high - low) + low, atol=1e-5)
        assert one.min() == pytest.approx(float(low), abs=1e-5)
        assert one.max() == pytest.approx(float(high), abs=1e-5)
        order = was.flatten().argsort()
        assert (one.flatten()[order].diff() >= -1e-6).all()


def test_a_constant_patch_stays_finite() -> None:
    out = vary(torch.full((2, 4, 4, 4), 7.0), variation(gamma=[0.5, 1.3]))
    assert out.numpy() == pytest.approx(7, abs=1e-4)


def test_noise_depends_on_its_seed_alone(patch: torch.Tensor) -> None:
    zeros = torch.zeros((2, 30, 30, 30))
    first = vary(zeros, variation(noise=0.5))
    torch.manual_seed(99)
    assert torch.equal(vary(zeros, variation(noise=0.5)), first)
    assert not torch.equal(vary(zeros, variation(noise=0.5, noise_seed=4)), first)
    assert float(first.std()) == pytest.approx(0.5, rel=0.02)
    assert float(first.mean()) == pytest.approx(0, abs=0.01)


def test_the_patch_given_is_left_alone(patch: torch.Tensor) -> None:
    before = patch.clone()
    vary(patch, variation(gain=[2.0, 2.0], gamma=[2.0, 2.0], noise=1.0))
    assert torch.equal(patch, before)

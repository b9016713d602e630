from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from medseg.core.grid import Grid
from medseg.core.volume import Volume
from medseg.io.store import StoredCase
from medseg.plan.plan import Augmentation, Configuration, Decision, Plan
from medseg.preprocess.channels import complete
from medseg.preprocess.normalise import normalise
from medseg.train.augment import Variation, change, draw, move, reach
from medseg.train.batches import Batches
from medseg.train.loss import IGNORED
from medseg.train.sample import Place

CPU = torch.device("cpu")


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
        contrast=st.floats(0, 0.9),
        elastic=st.floats(0, 0.4),
        elastic_share=st.sampled_from([0.0, 0.5]),
        blur=st.floats(0, 3),
        blur_share=st.sampled_from([0.0, 0.5, 1.0]),
        low_resolution=st.floats(1, 5),
        low_resolution_share=st.sampled_from([0.0, 0.5, 1.0]),
        channel_dropout=st.sampled_from([0.0, 1.0]),
    )


def settled(plan: Plan, settings: Augmentation, **change: Any) -> Plan:
    """The plan with other augmentation."""
    training = plan.training.model_copy(update={"augmentation": Decision(value=settings)})
    return plan.model_copy(update={"training": training, **change})


def drawn(rng: np.random.Generator, plan: Plan, settings: Augmentation) -> Variation:
    (configuration,) = plan.configurations.values()
    return draw(rng, settled(plan, settings), configuration)


def same(one: Variation, other: Variation) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


@given(bounds(), st.integers(0, 2**31), st.integers(1, 4))
def test_what_is_drawn_lies_within_the_settings(small_plan: Any, settings: Augmentation, seed: int, n: int) -> None:
    spacing = (1.0, 1.5, 2.0)
    plan = small_plan(spacing=spacing, channels=["CT", "a", "b", "c"][:n])
    plan = plan.model_copy(update={"optional_channels": Decision(value=plan.channels[2:])})
    one = drawn(np.random.default_rng(seed), plan, settings)
    for name in ("gain", "shift", "gamma", "contrast", "inverted", "noise", "dropped"):
        assert getattr(one, name).shape == (n,), name
    assert (np.abs(one.gain - 1) <= settings.intensity).all()
    assert (np.abs(one.shift) <= settings.intensity).all()
    assert (np.abs(one.contrast - 1) <= settings.contrast).all()
    assert (np.abs(np.log(one.gamma)) <= settings.gamma + 1e-12).all()
    assert (one.noise >= 0).all()
    assert (one.noise <= settings.noise).all()
    steps = np.array(spacing)
    assert (one.blur * steps <= settings.blur * 1.0 + 1e-9).all()
    assert (one.coarse >= 1).all()
    assert (one.coarse * steps <= np.maximum(settings.low_resolution, steps) + 1e-9).all()
    assert one.dropped.tolist() == [settings.channel_dropout == 1 and i >= 2 for i in range(n)]
    assert one.curve is one.own is one.bias is None
    if one.bend is not None:
        assert (np.abs(one.bend).max(axis=(1, 2, 3)) * steps <= settings.elastic * 16 + 1e-9).all()
    if one.matrix is not None:
        # In mm it is a rotation, a mirror at most, and a scale.
        physical = one.matrix * steps[:, None] / steps[None, :]
        scale = abs(np.linalg.det(physical)) ** (1 / 3)
        assert 1 - settings.scaling - 1e-9 <= scale <= 1 + settings.scaling + 1e-9
        assert np.abs(physical @ physical.T - scale**2 * np.eye(3)).max() < 1e-9
        if not settings.mirror:
            assert np.linalg.det(physical) > 0
        if settings.rotation_degrees == 0:
            assert np.abs(np.abs(physical) - scale * np.eye(3)).max() < 1e-9
    if settings.spatial_share == settings.elastic_share == 0 and not settings.mirror:
        assert one.matrix is None
    assert same(one, drawn(np.random.default_rng(seed), plan, settings))


def test_what_is_off_is_not_drawn(small_plan: Any) -> None:
    off = Augmentation(spatial_share=0, intensity=0, gamma=0, noise=0)
    nothing = drawn(np.random.default_rng(0), small_plan(), off)
    assert same(nothing, variation(channels=1, inverted=nothing.inverted))


def test_domain_randomisation_is_stronger_in_everything(small_plan: Any) -> None:
    plan, rng = small_plan(), np.random.default_rng(0)
    strong = [drawn(rng, plan, Augmentation(domain_randomisation=True)) for _ in range(400)]
    weak = [drawn(rng, plan, Augmentation()) for _ in range(400)]
    for name in ("curve", "own", "bias"):
        assert np.mean([getattr(v, name) is not None for v in strong]) == pytest.approx(0.5, abs=0.1)
        assert all(getattr(v, name) is None for v in weak)
    for name in ("gain", "contrast", "shift", "gamma", "blur", "coarse", "noise"):
        spread = [np.std([getattr(v, name)[0] for v in some]) for some in (strong, weak)]
        assert spread[0] > 1.3 * spread[1], name
    assert np.mean([v.bend is not None for v in strong]) == pytest.approx(0.5, abs=0.1)
    # Slices across one axis, or cubes.
    assert {tuple(v.coarse[0] > 1.2) for v in strong} >= {(True, False, False), (False, True, False)}


def test_the_angles_reach_as_far_as_asked_and_no_further(small_plan: Any) -> None:
    plan = small_plan(spacing=(1, 1, 1))
    settings = Augmentation(rotation_degrees=20, scaling=0, spatial_share=1)
    rng = np.random.default_rng(0)
    angles = [np.degrees(Rotation.from_matrix(drawn(rng, plan, settings).matrix).magnitude()) for _ in range(300)]
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
    settings = Augmentation(rotation_degrees=90, scaling=0.3, spatial_share=1, elastic_share=1)
    one = drawn(np.random.default_rng(6), small_plan(**arguments), settings)
    assert one.matrix is not None
    assert one.bend is not None
    assert not one.bend[axis].any()
    assert all(one.bend[a].any() for a in range(3) if a != axis)
    others = [a for a in range(3) if a != axis]
    assert np.abs(one.matrix[axis, others]).max() == 0
    assert np.abs(one.matrix[others, axis]).max() == 0
    assert abs(one.matrix[others[0], others[1]]) > 0.05


def test_mirrors_flip_the_axes_that_are_listed_half_of_the_time(small_plan: Any) -> None:
    plan, settings = small_plan(), Augmentation(spatial_share=0, mirror=(0, 2))
    rng = np.random.default_rng(0)
    seen = [drawn(rng, plan, settings).matrix for _ in range(400)]
    signs = np.array([[1, 1, 1] if m is None else np.diag(m) for m in seen])
    assert all(m is None or np.array_equal(np.abs(m), np.eye(3)) for m in seen)
    assert (signs[:, 1] == 1).all()
    for axis in (0, 2):
        assert np.mean(signs[:, axis] == -1) == pytest.approx(0.5, abs=0.1)


# ---- cutting ------------------------------------------------------------------------------------

PATCHES = [(8, 8, 8), (7, 8, 5), (1, 6, 6), (30, 30, 30), (20, 18, 22), (1, 1, 1)]


@pytest.fixture(scope="session")
def cut(small_plan: Any) -> Any:
    """Cut one patch out of a case's arrays, as `Batches` does."""

    def act(
        image: Any,
        labels: Any,
        centre: tuple[float, float, float],
        patch: tuple[int, int, int],
        matrix: np.ndarray | None,
        bend: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan = small_plan(
            channels=["CT", "a", "b"][: len(image)], labels={n: f"label {n}" for n in (1, 2, 3, 4, 60001)}
        )
        configuration = sized(plan.configuration("3d"), patch)
        one = variation(channels=len(image), matrix=matrix, bend=bend)
        batches = Batches(plan, configuration, [StoredCase("a", image, labels, {})], 0, CPU)
        images, classes, middles = batches._boxes([(Place(0, centre), one)])
        images, classes = move(images, classes, middles, [one], configuration)
        return images[0], torch.tensor([0, 1, 2, 3, 4, 60001])[classes[0]]

    return act


def sized(configuration: Configuration, patch: tuple[int, int, int]) -> Configuration:
    """With another patch, which the network need not be able to take."""
    return configuration.model_copy(update={"patch": Decision(value=patch)})


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
def test_the_identity_is_a_crop(
    cut: Any, matrix: Any, patch: tuple[int, int, int], start: tuple[int, int, int]
) -> None:
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
def test_quarter_turns_are_rot90(cut: Any, size: int, axis: int, quarters: int) -> None:
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
def test_a_mirror_is_a_flip(cut: Any, signs: tuple[int, int, int]) -> None:
    image, labels = arrays()
    patch, start = (8, 7, 6), (6, 5, 7)
    values, classes = cut(image, labels, centre_of(start, patch), patch, np.diag(signs).astype(float))
    axes = [a for a, s in enumerate(signs) if s < 0]
    assert np.abs(values.numpy() - np.flip(plain_crop(image, start, patch), [a + 1 for a in axes])).max() < 1e-4
    assert np.array_equal(classes.numpy(), np.flip(plain_crop(labels[None], start, patch)[0], axes))


@given(st.integers(0, 10**6))
def test_any_matrix_beside_scipy(cut: Any, seed: int) -> None:
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
def test_image_and_labels_move_together(cut: Any, axis: int, scale: float) -> None:
    matrix = Rotation.from_rotvec(np.eye(3)[axis] * 0.4).as_matrix() * scale
    spot, middle = np.array([24.0, 18.0, 17.0]), np.array([19.5, 20.5, 21.5])
    image, labels = ball((40, 40, 40), tuple(spot), 5)
    values, classes = cut(image, labels, (19.5, 20.5, 21.5), (32, 32, 32), matrix)
    expected = np.linalg.inv(matrix) @ (spot - middle) + 15.5
    assert np.abs(centroid(values[0]) - expected).max() < 0.1
    assert np.abs(centroid(classes) - expected).max() < 0.15
    assert np.abs(centroid(values[0]) - centroid(classes)).max() < 0.2
    assert int(classes.sum()) == pytest.approx(4 / 3 * np.pi * (5 / scale) ** 3, rel=0.08)


def test_a_turn_of_anisotropic_voxels_is_rigid_in_millimetres(cut: Any, small_plan: Any) -> None:
    """A ball in space stays one, and goes where a rotation in space takes it."""
    spacing = np.array([1.0, 1.5, 2.5])
    settings = Augmentation(rotation_degrees=60, scaling=0, spatial_share=1)
    matrix = drawn(np.random.default_rng(4), small_plan(spacing=tuple(spacing)), settings).matrix
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


def test_outside_there_is_zero(cut: Any) -> None:
    image, labels = np.ones((1, 10, 10, 10), dtype=np.float16), np.full((10, 10, 10), 3, dtype=np.uint8)
    matrix = Rotation.from_rotvec([0, 0, 0.3]).as_matrix()
    values, classes = cut(image, labels, (40.0, 4.5, 4.5), (8, 8, 8), matrix)
    assert not values.any()
    assert not classes.any()
    values, classes = cut(image, labels, (4.5, 4.5, 4.5), (20, 20, 20), matrix)
    assert values[0, :3, :3, :3].abs().max() == 0
    assert values[0, 10, 10, 10] == pytest.approx(1)
    assert set(classes.unique().tolist()) == {0, 3}


def test_big_label_numbers_survive(cut: Any) -> None:
    labels = np.zeros((10, 10, 10), dtype=np.uint16)
    labels[2:8, 2:8, 2:8] = 60001
    image = np.zeros((1, 10, 10, 10), dtype=np.float16)
    for matrix in (None, Rotation.from_rotvec([0.2, 0.1, 0.3]).as_matrix()):
        _, classes = cut(image, labels, (4.5, 4.5, 4.5), (10, 10, 10), matrix)
        assert set(classes.unique().tolist()) == {0, 60001}


def test_mapped_read_only_files_are_cut_and_left_alone(cut: Any, tmp_path: Path) -> None:
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


def variation(channels: int = 2, **change: Any) -> Variation:
    """Nothing is varied but what is given."""
    one, none = np.ones(channels), np.zeros(channels)
    values = {
        "gamma": one, "inverted": none > 0, "contrast": one, "gain": one, "shift": none,
        "blur": np.zeros((channels, 3)), "coarse": np.ones((channels, 3)), "noise": none, "dropped": none > 0, **change,
    }  # fmt: skip
    return Variation(**{k: np.array(v) if isinstance(v, list) else v for k, v in values.items()})


@pytest.fixture
def vary(small_plan: Any) -> Any:
    """Change one patch of two channels, of classes 0, and leave the one given alone."""

    def act(image: torch.Tensor, one: Variation, *, seed: int = 3, classes: torch.Tensor | None = None) -> torch.Tensor:
        configuration = sized(small_plan(spacing=(1, 1, 1)).configuration("3d"), tuple(image.shape[1:]))
        classes = torch.zeros(image.shape[1:], dtype=torch.int64) if classes is None else classes
        return change(image[None].clone(), classes[None], [one], configuration, seed)[0]

    return act


@pytest.fixture
def patch() -> torch.Tensor:
    return torch.randn((2, 6, 5, 4), generator=torch.Generator().manual_seed(0))


def test_nothing_varied_is_nothing_changed(vary: Any, patch: torch.Tensor) -> None:
    assert torch.equal(vary(patch, variation()), patch)


def test_gain_and_shift_by_hand(vary: Any, patch: torch.Tensor) -> None:
    out = vary(patch, variation(gain=[2.0, 0.5], shift=[1.0, -3.0]))
    assert torch.allclose(out[0], patch[0] * 2 + 1)
    assert torch.allclose(out[1], patch[1] * 0.5 - 3)


def test_gamma_bends_each_channel_within_its_own_range(vary: Any, patch: torch.Tensor) -> None:
    out = vary(patch, variation(gamma=[2.0, 0.5]))
    for one, was, gamma in zip(out, patch, (2.0, 0.5), strict=True):
        low, high = was.min(), was.max()
        assert torch.allclose(one, ((was - low) / (high - low)) ** gamma * (high - low) + low, atol=1e-5)
        assert one.min() == pytest.approx(float(low), abs=1e-5)
        assert one.max() == pytest.approx(float(high), abs=1e-5)
        order = was.flatten().argsort()
        assert (one.flatten()[order].diff() >= -1e-6).all()


def test_a_constant_patch_stays_finite(vary: Any) -> None:
    out = vary(torch.full((2, 4, 4, 4), 7.0), variation(gamma=[0.5, 1.3]))
    assert out.numpy() == pytest.approx(7, abs=1e-4)


def test_noise_depends_on_its_seed_alone(vary: Any, patch: torch.Tensor) -> None:
    zeros = torch.zeros((2, 30, 30, 30))
    first = vary(zeros, variation(noise=[0.5, 0.5]))
    torch.manual_seed(99)
    assert torch.equal(vary(zeros, variation(noise=[0.5, 0.5])), first)
    assert not torch.equal(vary(zeros, variation(noise=[0.5, 0.5]), seed=4), first)
    assert float(first.std()) == pytest.approx(0.5, rel=0.02)
    assert float(first.mean()) == pytest.approx(0, abs=0.01)


def test_inverted_gamma_is_gamma_of_the_negative(vary: Any, patch: torch.Tensor) -> None:
    both = vary(patch, variation(gamma=[2.0, 2.0], inverted=np.array([True, True])))
    assert torch.allclose(both, -vary(-patch, variation(gamma=[2.0, 2.0])), atol=1e-5)
    assert not torch.allclose(both, vary(patch, variation(gamma=[2.0, 2.0])), atol=0.01)


def test_contrast_is_about_the_mean(vary: Any, patch: torch.Tensor) -> None:
    out = vary(patch, variation(contrast=[2.0, 0.5], gain=[1.0, 3.0], shift=[0.0, 1.0]))
    for one, was, contrast, gain, shift in zip(out, patch, (2, 0.5), (1, 3), (0, 1), strict=True):
        assert torch.allclose(one, ((was - was.mean()) * contrast + was.mean()) * gain + shift, atol=1e-5)


def test_blur_beside_scipy(vary: Any) -> None:
    image = torch.randn((2, 16, 15, 14), generator=torch.Generator().manual_seed(0))
    sigma = np.array([[1.5, 0.7, 0.0], [0.0, 0.0, 0.0]])
    out = vary(image, variation(blur=sigma))
    # scipy's borders are of another kind, and its tails are cut.
    inside = (slice(5, -5), slice(3, -3), slice(None))
    expected = gaussian_filter(image[0].numpy().astype(float), sigma[0], truncate=6)
    assert np.abs(out[0].numpy() - expected)[inside].max() < 1e-3
    assert torch.equal(out[1], image[1])
    constant = vary(torch.full((2, 9, 8, 7), 3.0), variation(blur=np.full((2, 3), 2.0)))
    assert constant.numpy() == pytest.approx(3, abs=1e-5)


def test_voxels_twice_as_large_hold_means_and_what_lies_between(vary: Any) -> None:
    image = torch.zeros((2, 8, 4, 4))
    image[:, 2] = 1.0
    out = vary(image, variation(coarse=np.array([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]])))
    # Means are 0, 1/2, 0, 0 with middles at 1, 3, 5, 7 voxels from the edge.
    assert out[0, :, 0, 0].tolist() == pytest.approx([0, 0.125, 0.375, 0.375, 0.125, 0, 0, 0])
    assert torch.equal(out[1], image[1])
    ramp = torch.arange(12.0).view(1, 12, 1, 1).expand(2, 12, 4, 4)
    found = vary(ramp, variation(coarse=np.full((2, 3), 3.0)))[0, :, 0, 0]
    assert found[1:-1].tolist() == pytest.approx(list(range(1, 11)), abs=1e-5)


def test_dropped_channels_stand_where_preprocessing_puts_a_missing_one(
    vary: Any, patch: torch.Tensor, small_plan: Any
) -> None:
    out = vary(patch, variation(dropped=np.array([False, True]), noise=[0.5, 0.5], shift=[1.0, 1.0]))
    plan = small_plan(channels=["CT", "T2"])
    grid = Grid((4, 4, 4), np.eye(4))
    for present, missing in (("CT", 1), ("T2", 0)):
        scan = Volume(np.random.default_rng(0).normal(50, 9, (1, 4, 4, 4)).astype(np.float32), grid)
        rules = plan.normalisation.value
        values = normalise(complete(scan, [present], rules), rules).values[missing]
        assert np.unique(values).tolist() == [0]
    assert (out[1] == 0).all()
    assert (out[0] != 0).all()


def test_domain_randomisation_by_hand(vary: Any) -> None:
    ramp = torch.arange(9.0).view(1, 9, 1, 1).expand(2, 9, 2, 2).contiguous()
    curve = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]])
    out = vary(ramp, variation(curve=curve))
    assert out[0, :, 0, 0].tolist() == pytest.approx(list(range(8, -1, -1)))
    assert out[1, :, 0, 0].tolist() == pytest.approx([0, 2, 4, 6, 8, 6, 4, 2, 0])
    classes = torch.zeros((9, 2, 2), dtype=torch.int64)
    classes[3], classes[5] = 1, IGNORED
    own = vary(torch.zeros_like(ramp), variation(own=np.array([[0.5, 2.0], [0.0, -1.0]])), classes=classes)
    assert own[:, :, 0, 0].tolist() == [[0.5] * 3 + [2] + [0.5] * 5, [0.0] * 3 + [-1] + [0] * 5]
    # A constant field is a constant factor, above the lowest.
    biased = vary(ramp + 1, variation(bias=np.full((4, 4, 4), np.log(2.0))))
    assert torch.allclose(biased, 2 * ramp + 1, atol=1e-4)


# ---- both ---------------------------------------------------------------------------------------


def test_a_spline_of_equal_coefficients_is_a_shift(cut: Any) -> None:
    image, labels = arrays()
    bend = np.zeros((3, 5, 5, 5))
    bend[:] = np.array([2.0, -1.0, 3.0]).reshape(3, 1, 1, 1)
    centre = centre_of((6, 6, 6), (8, 8, 8))
    for matrix in (np.eye(3), np.diag([-1.0, 1.0, 1.0])):
        bent = cut(image, labels, centre, (8, 8, 8), matrix, bend[:, :4, :4, :4])
        shifted = tuple(np.add(centre, matrix @ [2.0, -1.0, 3.0]))
        straight = cut(image, labels, shifted, (8, 8, 8), matrix)
        assert torch.allclose(bent[0], straight[0], atol=2e-3)
        assert torch.equal(bent[1], straight[1])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.5, 2.0)])
def test_bending_within_the_bound_never_folds(small_plan: Any, spacing: tuple[float, float, float]) -> None:
    """The field of positions, an image of coordinates seen through the bend, rises along each axis."""
    patch = (32, 32, 32)
    plan = small_plan(spacing=spacing, patch=patch)
    configuration = plan.configuration("3d")
    position = np.stack(np.indices((80, 80, 80))).astype(np.float32)
    rng = np.random.default_rng(0)
    for _ in range(3):
        one = drawn(rng, plan, Augmentation(spatial_share=0, elastic_share=1, elastic=0.4))
        middle = np.full((1, 3), 39.5)
        images = torch.from_numpy(position)[None]
        found, _ = move(images, torch.zeros((1, 80, 80, 80), dtype=torch.int16), middle, [one], configuration)
        jacobian = np.stack([np.stack(np.gradient(found[0, a].numpy(), axis=(0, 1, 2))) for a in range(3)])
        assert np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1))).min() > 0
        away = np.abs(found[0].numpy() - 39.5).reshape(3, -1).max(axis=1)
        assert (away <= reach(one, patch) + 1e-3).all()
        assert np.abs(found[0].numpy() - position[:, 24:56, 24:56, 24:56]).max() > 1


@given(st.integers(0, 10**6), st.sampled_from([None, 0, 1, 2]))
def test_what_is_drawn_is_applied_alike_and_alone(small_plan: Any, seed: int, flat: int | None) -> None:
    """The same variations give the same batch; and each patch, but for noise, what it gives alone."""
    side = [1 if a == flat else 8 for a in range(3)]
    plan = small_plan(dimensions=2 if flat is not None else 3, slice_axis=flat, patch=side, features=(4, 8))
    (configuration,) = plan.configurations.values()
    rng = np.random.default_rng(seed)
    settings = Augmentation(
        noise=0, elastic_share=0.5, blur_share=0.5, low_resolution_share=0.5, domain_randomisation=bool(seed % 2)
    ).model_copy(update={"noise": 0.0})
    variations = [drawn(rng, plan, settings) for _ in range(3)]
    variations = [Variation(**{**vars(v), "noise": np.zeros(1)}) for v in variations]
    box = [5 if a == flat else 24 for a in range(3) if a != flat]
    images = torch.from_numpy(rng.normal(size=(3, 1, *box)).astype(np.float16))
    labels = torch.from_numpy(rng.integers(0, 3, (3, *box)).astype(np.int16))
    middles = np.full((3, 3), 11.5)

    def act(some: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = [variations[i] for i in some]
        moved, classes = move(images[some], labels[some], middles[some], chosen, configuration)
        return change(moved, classes, chosen, configuration, 0), classes

    values, classes = act([0, 1, 2])
    assert values.shape == (3, 1, *[8] * len(box))
    assert classes.dtype == torch.int64
    assert torch.isfinite(values).all()
    assert torch.equal(values, act([0, 1, 2])[0])
    for i in range(3):
        alone, truth = act([i])
        assert torch.allclose(values[i], alone[0], atol=1e-4)
        assert torch.equal(classes[i], truth[0])

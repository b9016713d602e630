from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.volume import Volume
from medseg.plan.plan import Normalisation
from medseg.preprocess.normalise import normalise

CT = Normalisation(channel="CT", kind="ct", low=-100, high=300, mean=50, std=25)
MRI = Normalisation(channel="MRI", kind="zscore")


def volume(*channels: Any) -> Volume:
    values = np.stack([np.asarray(c) for c in channels])
    values = values.reshape(len(channels), -1, 1, 1) if values.ndim == 2 else values
    return Volume(values, Grid.from_spacing(values.shape[1:], (1, 1, 1)))


def one(values: Any, rule: Normalisation) -> np.ndarray:
    out = normalise(volume(values), (rule,)).values
    assert out.dtype == np.float32
    return out[0].ravel()


# ---- ct -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int16, ">i2", np.int32, np.float32, np.float64])
def test_ct_is_clipped_shifted_and_divided(dtype: Any) -> None:
    values = np.array([-2000, -100, 50, 75, 300, 3071]).astype(dtype)
    assert one(values, CT).tolist() == [-6, -6, 0, 1, 10, 10]


def test_ct_in_unsigned_integers_knows_a_clip_below_zero() -> None:
    assert one(np.array([0, 50, 255], dtype=np.uint8), CT) == pytest.approx([-2, 0, 8.2])
    assert one(np.array([0, 50, 65535], dtype=np.uint16), CT) == pytest.approx([-2, 0, 10])


def test_the_same_tissue_is_the_same_number_in_every_scan() -> None:
    assert one([40, 40, -1000], CT)[0] == one([40, 3000, 3000], CT)[0]


# ---- z-score ------------------------------------------------------------------------------------


def test_zscore_is_over_what_is_not_zero() -> None:
    """Mean 20, deviation 10, no matter how many zeros stand around."""
    values = np.concatenate([np.zeros(5000), np.full(500, 10.0), np.full(500, 30.0)])
    out = one(values, MRI)
    assert out[0] == pytest.approx(-2)
    assert out[5000:5500] == pytest.approx(-1)
    assert out[5500:] == pytest.approx(1)


@given(st.integers(0, 99), st.floats(0.01, 1000), st.sampled_from([0.0, 0.3, 0.9]))
def test_zscore_beside_numpys(seed: int, scale: float, zeros: float) -> None:
    rng = np.random.default_rng(seed)
    values = (scale * rng.uniform(1, 5, 3000)).astype(np.float32)
    values[rng.random(3000) < zeros] = 0
    inside = values[values != 0].astype(np.float64)
    clipped = np.clip(inside, *np.percentile(inside, (0.5, 99.5)))
    expected = (clipped - clipped.mean()) / clipped.std()
    out = one(values, MRI)
    high = values != 0
    # Below their 0.5 percentile values keep their order with the zeros.
    usual = inside >= np.percentile(inside, 0.5)
    assert out[high][usual] == pytest.approx(expected[usual], abs=1e-3)
    assert len(np.unique(out[~high])) <= 1
    assert (out[~high] < out[high].min()).all() if zeros else not (~high).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, ">f4", np.float64])
def test_integers_are_scaled_as_floats_are(dtype: Any) -> None:
    values = np.random.default_rng(1).integers(0, 200, 4000)
    assert one(values.astype(dtype), MRI) == pytest.approx(one(values.astype(np.float32), MRI))


@given(st.floats(0.001, 1e5), st.integers(0, 9))
def test_the_unit_of_the_scanner_does_not_matter(factor: float, seed: int) -> None:
    values = np.random.default_rng(seed).gamma(2, 1, 2000).astype(np.float32)
    assert one(values * np.float32(factor), MRI) == pytest.approx(one(values, MRI), abs=2e-3)


@pytest.mark.parametrize("outlier", [1e4, 1e6, 1e15])
def test_a_few_voxels_far_above_the_rest_change_next_to_nothing(outlier: float) -> None:
    values = np.random.default_rng(2).normal(100, 10, 10_000).astype(np.float32)
    spoilt = values.copy()
    spoilt[:20] = outlier
    before, after = one(values, MRI), one(spoilt, MRI)
    assert after[20:] == pytest.approx(before[20:], abs=0.2)
    assert after.max() < 4


@pytest.mark.parametrize("level", [1, 7, -3, 1e-4, 1e6, 40_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_channel_becomes_zero(level: float, dtype: Any) -> None:
    assert (one(np.full(300, level, dtype=dtype), MRI) == 0).all()


def test_an_image_of_zeros_stays_zero() -> None:
    assert (one(np.zeros(300, dtype=np.int16), MRI) == 0).all()


@pytest.mark.parametrize("level", [1, 255, 1e6, 0.001, -40])
def test_a_mask_as_a_channel_stays_within_half_precision(level: float) -> None:
    """Constant where it is not zero: dividing by (next to) no deviation must not run away."""
    out = one(np.concatenate([np.zeros(1000), np.full(1000, level)]), MRI)
    assert (out[1000:] == 0).all()
    assert np.isfinite(out.astype(np.float16)).all()


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60),
    st.sampled_from([np.float32, np.int32, np.float64]),
)
def test_whatever_the_values_the_result_is_small_and_finite(values: list[float], dtype: Any) -> None:
    out = one(np.array(values).astype(dtype), MRI)
    assert np.isfinite(out).all()
    assert np.abs(out).max() < 25


# ---- both ---------------------------------------------------------------------------------------


def test_each_channel_has_its_own_rule_and_the_grid_stays() -> None:
    two = volume(np.array([50.0, 75.0, 75.0]), np.array([0.0, 1.0, 3.0]))
    out = normalise(two, (CT, MRI))
    assert out.grid == two.grid
    assert out.values[0].ravel().tolist() == [0, 1, 1]
    assert out.values[1].ravel()[1:] == pytest.approx([-1, 1], rel=0.02)


def test_the_scan_itself_is_left_alone() -> None:
    scan = volume(np.array([0.0, 500.0, 900.0]))
    before = scan.values.copy()
    for rule in (CT, MRI):
        normalise(scan, (rule,))
        assert np.array_equal(scan.values, before)


@pytest.mark.parametrize("rules", [(), (CT, MRI)])
def test_another_number_of_channels_is_refused(rules: tuple[Normalisation, ...]) -> None:
    with pytest.raises(InputError, match=f"the scan has 1 channels, the model takes {len(rules)}"):
        normalise(volume(np.ones(3)), rules)


# ---- imported models ----------------------------------------------------------------------------


def rule(kind: str) -> Normalisation:
    return Normalisation.model_validate({"channel": "MRI", "kind": kind})


def test_whole_zscore_counts_zeros_and_clips_nothing() -> None:
    values = np.array([0, 0, 0, 4, 996])
    out = one(values, rule("zscore-whole"))
    assert out == pytest.approx((values - 200) / values.std())


def test_masked_zscore_leaves_what_is_outside_and_fills_holes() -> None:
    """A hollow cube: the zero in its middle is inside, those around it are not."""
    image = np.zeros((5, 5, 5))
    image[1:4, 1:4, 1:4] = np.arange(10, 37).reshape(3, 3, 3)
    image[2, 2, 2] = 0
    out = normalise(volume(image), (rule("zscore-mask"),)).values[0]
    inside = image[1:4, 1:4, 1:4]
    assert out[1:4, 1:4, 1:4] == pytest.approx((inside - inside.mean()) / inside.std(), abs=1e-6)
    assert np.count_nonzero(out) == 27


def test_unit_rgb_and_none() -> None:
    assert one([-1, 1, 3], rule("unit")).tolist() == [0, 0.5, 1]
    assert one([0, 51, 255], rule("rgb")) == pytest.approx([0, 0.2, 1])
    assert one([-1, 7, 3], rule("none")).tolist() == [-1, 7, 3]
    with pytest.raises(InputError, match="outside 0 to 255"):
        one([0, 256, 1], rule("rgb"))


@pytest.mark.parametrize("kind", ["zscore-whole", "zscore-mask", "unit"])
def test_a_constant_scan_stays_finite(kind: str) -> None:
    assert np.isfinite(one([5, 5, 5], rule(kind))).all()
    assert np.isfinite(one([0, 0, 0], rule(kind))).all()

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.core.errors import InputError
from medseg.core.labels import LabelSet
from medseg.plan.fingerprint import CasePrint, Fingerprint, Intensities
from medseg.plan.plan import Configuration, Decision, Plan, parse_plan
from medseg.plan.planner import Machine, plan

ORGAN = LabelSet.from_names(["organ"])


def measured(shapes: list[Any], spacings: list[Any], channels: tuple[str, ...] = ("MRI",)) -> Fingerprint:
    return Fingerprint(
        task="Task99_Test",
        cases=tuple(
            CasePrint(
                id=f"c{n}",
                shape=shape,
                spacing=mm,
                orientation="RAS",
                label_mm3={1: 100.0},
                label_pieces={1: 1},
                label_cut=(),
                channels=(),
                nonzero_share=1,
                image_hash=str(n),
            )
            for n, (shape, mm) in enumerate(zip(shapes, spacings, strict=True))
        ),
        intensities=tuple(
            Intensities(
                channel=c, mean=60, std=20, percentile_00_5=-10, percentile_99_5=140, minimum=-1024, maximum=3071
            )
            for c in channels
        ),
    )


def alike(shape: Any, spacing: Any, machine: str = "cpu", **more: Any) -> Plan:
    """The plan for three cases that are all alike."""
    return plan(measured([shape] * 3, [spacing] * 3, **more), ORGAN, machine=machine)


def stages(configuration: Configuration) -> int:
    return len(configuration.network.value.features)


# ---- known answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_small_and_isotropic_as_the_hippocampus_is(machine: str) -> None:
    c = alike((35, 50, 35), (1, 1, 1), machine).configurations["3d"]
    assert c.dimensions == 3
    assert c.slice_axis is None
    assert c.spacing.value == (1, 1, 1)
    assert c.patch.value == (40, 56, 40)
    assert "covers the typical case" in c.patch.reason
    assert c.network.value.kernels == ((3, 3, 3),) * 4
    assert c.network.value.strides == ((1, 1, 1), *[(2, 2, 2)] * 3)
    assert c.network.value.features == ((16, 32, 64, 128) if machine == "cpu" else (32, 64, 128, 256))


def test_thick_slices_stay_thick_as_the_prostates_do() -> None:
    c = alike((320, 320, 15), (0.6, 0.6, 4.0), "gpu").configurations["3d"]
    assert c.spacing.value == (0.6, 0.6, 4.0)
    assert c.patch.value == (320, 320, 16)
    network = c.network.value
    assert network.kernels == ((3, 3, 1), (3, 3, 1), *[(3, 3, 3)] * 4)
    assert network.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 1), (2, 2, 1))


def test_where_slices_vary_the_thinner_ones_set_the_spacing() -> None:
    thickness = [3.0, 3.1, 3.2, 4, 4, 4, 4, 5, 5, 6]
    c = plan(measured([(320, 320, 20)] * 10, [(0.6, 0.6, t) for t in thickness]), ORGAN).configurations["3d"]
    assert c.spacing.value == pytest.approx((0.6, 0.6, np.percentile(thickness, 10)))
    assert "along z" in c.spacing.reason
    even = plan(measured([(320, 320, 20)] * 10, [(2, 2, t) for t in thickness]), ORGAN).configurations["3d"]
    assert even.spacing.value == (2, 2, 4)
    assert "percentile" not in even.spacing.reason


def test_thin_slices_among_thick_ones_do_not_make_the_coarse_axis_the_finest() -> None:
    spacings = [(0.8, 0.9, t) for t in (0.1, 0.1, 0.1, 5, 5, 5, 5)]
    assert plan(measured([(99, 99, 30)] * 7, spacings), ORGAN).configurations["3d"].spacing.value == (0.8, 0.9, 0.9)


def test_a_large_ct_is_seen_in_cubes() -> None:
    here = alike((512, 512, 400), (0.8, 0.8, 1.0), "cpu", channels=("CT",))
    there = alike((512, 512, 400), (0.8, 0.8, 1.0), "gpu", channels=("CT",))
    assert here.configurations["3d"].patch.value == (48, 48, 48)
    assert there.configurations["3d"].patch.value == (128, 128, 128)
    assert stages(there.configurations["3d"]) == 6
    assert "as much of it as fits" in here.configurations["3d"].patch.reason
    assert here.configurations["2d"].patch.value == (192, 192, 1)
    assert there.configurations["2d"].patch.value == (512, 512, 1)


def test_eight_slices() -> None:
    c = alike((64, 64, 8), (1, 1, 1)).configurations["3d"]
    assert c.patch.value == (64, 64, 8)
    assert c.network.value.divisor == (16, 16, 2)
    assert set(c.network.value.kernels) == {(3, 3, 3)}


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_a_thin_slab_is_seen_as_deep_as_its_plane_allows(machine: str) -> None:
    """When the short axis can be halved no more it is the finest, and must not stop the others."""
    network = alike((400, 400, 12), (1, 1, 1), machine).configurations["3d"].network.value
    assert len(network.features) >= 5
    assert network.divisor[2] == 2
    assert set(network.kernels) == {(3, 3, 3)}


def test_a_single_voxel_still_gives_a_plan() -> None:
    configurations = alike((1, 1, 1), (1, 1, 1)).configurations
    assert configurations["3d"].patch.value == (8, 8, 8)
    assert configurations["2d"].patch.value == (8, 8, 1)


@pytest.mark.parametrize(
    ("shape", "spacing", "axis"),
    [
        ((320, 320, 15), (0.6, 0.6, 4), 2),
        ((15, 320, 320), (4, 0.6, 0.6), 0),
        ((320, 15, 320), (0.6, 4, 0.6), 1),
        ((160, 200, 160), (1, 1, 1), 2),
        ((160, 200, 160), (1.05, 1, 1), 2),
        ((160, 200, 160), (1.2, 1, 1), 0),
    ],
)
def test_slices_are_cut_across_the_coarsest_axis(shape: Any, spacing: Any, axis: int) -> None:
    c = alike(shape, spacing).configurations["2d"]
    assert c.dimensions == 2
    assert c.slice_axis == axis
    assert c.patch.value[axis] == 1
    assert all(k[axis] == 1 for k in (*c.network.value.kernels, *c.network.value.strides))
    assert f"across {'xyz'[axis]}" in c.patch.reason
    assert ("the coarsest axis" in c.patch.reason) == (max(spacing) > 1.1)


def test_ct_keeps_its_units_and_others_are_scaled_case_by_case() -> None:
    decided = alike((40, 40, 40), (1, 1, 1), channels=("CT", "MRI", " ct ")).normalisation
    ct, mri, again = decided.value
    assert (ct.kind, ct.low, ct.high, ct.mean, ct.std) == ("ct", -10, 140, 60, 20)
    assert (mri.kind, mri.low, mri.std) == ("zscore", None, None)
    assert (again.kind, again.channel) == ("ct", " ct ")
    assert "Hounsfield" in decided.reason


def test_a_constant_ct_can_still_be_divided_by_its_deviation() -> None:
    fingerprint = measured([(9, 9, 9)], [(1, 1, 1)], ("CT",))
    flat = fingerprint.intensities[0].model_copy(update={"std": 0.0})
    std = plan(fingerprint.model_copy(update={"intensities": (flat,)}), ORGAN).normalisation.value[0].std
    assert std
    assert std > 0


def test_epochs_are_the_ones_asked_for() -> None:
    fingerprint = measured([(9, 9, 9)], [(1, 1, 1)])
    assert plan(fingerprint, ORGAN, epochs=7).training.epochs == Decision[int](value=7, reason="as asked for")
    assert plan(fingerprint, ORGAN).training.epochs.value == 100


def test_nothing_is_mirrored_since_left_is_not_right() -> None:
    assert alike((9, 9, 9), (1, 1, 1)).training.augmentation.value.mirror == ()


def test_a_label_that_no_case_has_is_refused() -> None:
    with pytest.raises(InputError, match="no case of Task99_Test has the label 2 tumour"):
        plan(measured([(9, 9, 9)], [(1, 1, 1)]), LabelSet.from_names(["organ", "tumour"]))


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(InputError, match=r"machine 'tpu'\. Say cpu or gpu"):
        plan(measured([(9, 9, 9)], [(1, 1, 1)]), ORGAN, machine="tpu")


# ---- for any data -------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(1, 40), st.integers(1, 1200))
SPACINGS = st.one_of(st.floats(0.3, 6), st.sampled_from([0.001, 0.5, 1.0, 10.0, 50.0]))
CASES = st.lists(
    st.tuples(st.tuples(SIZES, SIZES, SIZES), st.tuples(SPACINGS, SPACINGS, SPACINGS)), min_size=1, max_size=6
)


def decisions(value: Any) -> list[Decision[Any]]:
    """Every decision in a plan, however deep."""
    if isinstance(value, dict):
        return [d for v in value.values() for d in decisions(v)]
    if not hasattr(type(value), "model_fields"):
        return []
    inner = [d for name in type(value).model_fields for d in decisions(getattr(value, name))]
    return [value, *inner] if isinstance(value, Decision) else inner


@settings(max_examples=150)
@given(CASES, st.sampled_from(["cpu", "gpu"]))
def test_every_plan_fits_its_bounds_and_says_why(cases: Any, machine: str) -> None:
    fingerprint = measured([shape for shape, _ in cases], [mm for _, mm in cases])
    decided = plan(fingerprint, ORGAN, machine=machine)
    target = Machine(machine)
    assert set(decided.configurations) == {"3d", "2d"}
    for c in decided.configurations.values():
        patch, network = np.array(c.patch.value), c.network.value
        assert (patch % network.divisor == 0).all()
        assert patch.prod() <= (target.patch_voxels if c.dimensions == 3 else target.slice_pixels)
        inside = np.arange(3) != c.slice_axis
        assert (patch[inside] >= 8).all()
        assert ((patch // network.divisor)[inside] >= 4).all()
        assert network.features[0] == target.first_features
        assert max(network.features) <= target.most_features
        assert c.batch.value >= 2
        for axis in range(3):
            kernels = [kernel[axis] for kernel in network.kernels]
            assert kernels == sorted(kernels), "an axis that a kernel spans stays spanned"
            for kernel, stride in zip(network.kernels, network.strides, strict=True):
                assert stride[axis] == 1 or kernel[axis] == 3
            inner = network.kernels[-1][axis]
            assert inner == 3 or axis == c.slice_axis or all(stride[axis] == 1 for stride in network.strides)
        lows, highs = fingerprint.spacings.min(axis=0), fingerprint.spacings.max(axis=0)
        assert (np.array(c.spacing.value) >= lows - 1e-6).all()
        assert (np.array(c.spacing.value) <= highs + 1e-6).all()
    found = decisions(decided)
    assert len(found) == 2 + 2 * 4 + 5
    assert all(d.reason.strip() for d in found)
    assert decided.fingerprint == fingerprint.digest()
    assert parse_plan(decided.model_dump(mode="json"), "it") == decided
    assert plan(fingerprint, ORGAN, machine=machine) == decided


def test_sizes_beyond_all_measure_end_soon() -> None:
    c = alike((900_000, 800_000, 700_000), (0.001, 0.7, 50)).configurations
    assert np.prod(c["3d"].patch.value) <= 48**3
    assert np.prod(c["2d"].patch.value) <= 192**2


@given(CASES)
def test_a_gpu_sees_no_less_than_a_cpu(cases: Any) -> None:
    fingerprint = measured([shape for shape, _ in cases], [mm for _, mm in cases])
    here, there = (plan(fingerprint, ORGAN, machine=m).configurations for m in ("cpu", "gpu"))
    for name, c in here.items():
        assert np.prod(there[name].patch.value) >= 0.8 * np.prod(c.patch.value)
        assert c.spacing == there[name].spacing


@given(CASES, st.permutations(range(3)))
def test_axes_are_treated_alike(cases: Any, order: list[int]) -> None:
    """Turning all scans turns the 3D spacing with them."""
    turned = [(tuple(s[o] for o in order), tuple(m[o] for o in order)) for s, m in cases]
    one, other = (
        plan(measured([s for s, _ in which], [m for _, m in which]), ORGAN).configurations["3d"].spacing.value
        for which in (cases, turned)
    )
    medians = np.median([m for _, m in cases], axis=0)
    if len(set(medians)) == 3:
        assert other == tuple(one[o] for o in order)

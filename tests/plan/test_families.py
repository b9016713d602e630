"""Which stages each family can have, and that the planner gives it those."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.core.errors import InputError
from medseg.plan.families import FAMILIES, TRAINED, fault, leading, require_family
from medseg.plan.plan import parse_plan
from medseg.plan.planner import sketch

CUBE, FLAT, ONE = (3, 3, 3), (3, 3, 1), (1, 1, 1)
AXES = (0, 1, 2)


@given(
    st.sampled_from(TRAINED),
    st.lists(st.integers(8, 200), min_size=2, max_size=3),
    st.integers(1, 64),
)
def test_any_patch_can_be_planned(family: str, patch: list[int], features: int) -> None:
    made = sketch(family, patch, features, 8 * features)
    network = made.network.value
    assert network.family == family
    assert all(n >= p for n, p in zip(made.patch.value, patch, strict=False))
    assert all(f % FAMILIES[family].multiple == 0 for f in network.features)


@pytest.mark.parametrize("family", ["swinunetr", "mednext"])
def test_what_halves_all_axes_cannot_leave_one_out(family: str) -> None:
    halvings = FAMILIES[family].least_halvings
    strides = [ONE, *[(2, 2, 2)] * (halvings - 1), (2, 2, 1)]
    said = fault(family, [CUBE] * len(strides), strides, AXES)
    assert said
    assert "unet and resunet" in said


def test_swin_halves_five_times() -> None:
    strides = [ONE, *[(2, 2, 2)] * 4]
    assert "5 times, not 4" in str(fault("swinunetr", [CUBE] * 5, strides, AXES))


@pytest.mark.parametrize("family", ["attention-unet", "mednext", "swinunetr"])
def test_a_flat_kernel_is_refused_where_all_are_cubes(family: str) -> None:
    strides = [ONE, *[(2, 2, 2)] * 5]
    assert "one size of kernel" in str(fault(family, [FLAT, *[CUBE] * 5], strides, AXES))


def test_segresnet_halves_coarse_axes_later_and_then_always() -> None:
    kernels = [CUBE] * 4
    assert fault("segresnet", kernels, [ONE, (2, 2, 1), (2, 2, 2), (2, 2, 2)], AXES) is None
    assert fault("segresnet", kernels, [ONE, (2, 2, 2), (2, 2, 1), (2, 2, 2)], AXES)
    assert fault("segresnet", kernels, [ONE, (2, 2, 2), (2, 2, 2), (1, 2, 2)], AXES)


def test_leading_strides_are_those_of_monai() -> None:
    from monai.networks.nets.segresnet_ds import scales_for_resolution

    for spacing in ((1.0, 1.0, 1.0), (0.6, 0.6, 3.6), (1.0, 2.0, 5.0), (3.0, 1.0, 1.0), (0.5, 0.5, 4.0)):
        found = scales_for_resolution(spacing, n_stages=5)
        assert leading(spacing, 5) == tuple(tuple(int(s) for s in step) for step in found)


@given(st.lists(st.sampled_from([0.5, 0.7, 1.0, 1.9, 2.0, 3.0, 4.1]), min_size=2, max_size=3), st.integers(1, 5))
def test_strides_that_a_spacing_leads_to_are_found_sound(spacing: list[float], halvings: int) -> None:
    strides = [(1,) * len(spacing), *leading(spacing, halvings)]
    assert fault("segresnet", [CUBE] * len(strides), strides, range(len(spacing))) is None  # type: ignore[arg-type]


def test_an_unknown_family_lists_the_names() -> None:
    with pytest.raises(InputError, match="swinunetr"):
        require_family("vnet")
    with pytest.raises(InputError, match="no family"):
        require_family("nnunet-plain")


def test_a_family_that_counts_needs_labels() -> None:
    with pytest.raises(InputError, match="labelled scans alone"):
        require_family("mask-rcnn", unlabelled=True)


def edited(small_plan: Any, **network: Any) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(small_plan().model_dump_json())
    plan["configurations"]["3d"]["network"]["value"] |= network
    return plan


def test_a_plan_of_a_family_that_cannot_be_built_is_refused(small_plan: Any) -> None:
    with pytest.raises(InputError, match="swinunetr halves the patch 5 times, not 2"):
        parse_plan(edited(small_plan, family="swinunetr"), "the plan")
    with pytest.raises(InputError, match="no multiple of"):
        parse_plan(
            edited(
                small_plan, family="swinunetr", features=[12] * 6, kernels=[CUBE] * 6, strides=[ONE, *[(2, 2, 2)] * 5]
            ),
            "the plan",
        )


def test_a_flat_patch_for_a_network_of_cubes_is_refused(small_plan: Any) -> None:
    plan = edited(small_plan, family="mednext", strides=[ONE, (2, 2, 1), (2, 2, 1)])
    plan["configurations"]["3d"]["patch"]["value"] = [16, 16, 1]
    with pytest.raises(InputError, match="mednext halves every axis in every stage but the first; unet and resunet"):
        parse_plan(plan, "the plan")


def test_only_fcn_says_how_many_stages_are_fused(small_plan: Any) -> None:
    parse_plan(edited(small_plan, family="fcn", fused=1), "the plan")
    with pytest.raises(InputError, match="fused"):
        parse_plan(edited(small_plan, fused=1), "the plan")

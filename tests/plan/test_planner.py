from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.core.errors import InputError
from medseg.core.labels import LabelSet
from medseg.plan.cost import GPU_OVERHEAD, DoesNotFitError, Step, estimate
from medseg.plan.fingerprint import CasePrint, Fingerprint, Intensities, LabelPlace
from medseg.plan.plan import Configuration, Decision, Plan, parse_plan
from medseg.plan.planner import plan
from medseg.plan.scale import SIZES, Target
from medseg.plan.unlabelled import Unlabelled

ORGAN = LabelSet.from_names(["organ"])
GIB = 2**30


def measured(shapes: list[Any], spacings: list[Any], channels: tuple[str, ...] = ("MRI",)) -> Fingerprint:
    return Fingerprint(
        task="Task99_Test",
        cases=tuple(
            CasePrint(
                id=f"c{n}",
                shape=shape,
                box=shape,
                spacing=mm,
                orientation="RAS",
                label_mm3={1: 100.0},
                label_places={1: LabelPlace(centre=(0.2, 0.2, 0.2), extent=(0.1, 0.1, 0.1))},
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


def alike(shape: Any, spacing: Any, machine: Any = "cpu", cases: int = 3, **more: Any) -> Plan:
    """The plan for cases that are all alike."""
    target = machine if isinstance(machine, Target) else Target(machine, half=machine == "gpu")
    return plan(measured([shape] * cases, [spacing] * cases, **more), ORGAN, target)


def stages(configuration: Configuration) -> int:
    return len(configuration.network.value.features)


# ---- known answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_small_and_isotropic_as_the_hippocampus_is(machine: str) -> None:
    c = alike((35, 50, 35), (1, 1, 1), machine).configurations["3d"]
    assert c.dimensions == 3
    assert c.slice_axis is None
    assert c.spacing.value == (1, 1, 1)
    assert c.patch.value == ((24, 56, 32) if machine == "cpu" else (40, 56, 40))
    assert ("is as much of it as fits" if machine == "cpu" else "covers the typical case") in c.patch.reason
    assert c.network.value.kernels == ((3, 3, 3),) * 4
    last = (1, 2, 2) if machine == "cpu" else (2, 2, 2)
    assert c.network.value.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), last)
    assert c.network.value.features == ((8, 16, 32, 64) if machine == "cpu" else (32, 64, 128, 256))


def test_time_beyond_what_one_network_needs_goes_to_others_where_cases_are_small() -> None:
    def members(machine: Any, shape: Any = (35, 50, 35)) -> tuple[int, int, int]:
        c = alike(shape, (1, 1, 1), machine, cases=200).configurations["3d"]
        return c.members.value if c.members else 1, c.steps.value, c.network.value.features[0]

    assert members("cpu") == (2, 2500, 8)
    assert members(Target(steps=7000)) == (1, 7000, 8)
    minutes = {n: members(Target(budgets={"": 60.0 * n})) for n in (5, 15, 30, 60)}
    assert [minutes[n][0] for n in (5, 15, 30, 60)] == [1, 2, 2, 2]
    assert all(steps >= 2500 for count, steps, _ in minutes.values() if count > 1)
    # Large cases, and a GPU's, have wider networks.
    assert members("cpu", (200, 200, 200)) == (1, 5000, 16)
    assert members("gpu")[0] == 1


def test_members_cost_time_and_no_memory() -> None:
    several = alike((35, 50, 35), (1, 1, 1), cases=200).configurations["3d"].cost
    one = alike((35, 50, 35), (1, 1, 1), Target(steps=2500), cases=200).configurations["3d"].cost
    assert several.seconds_per_step == one.seconds_per_step
    assert several.memory_bytes == one.memory_bytes
    assert 1.7 < several.hours / one.hours <= 2


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
    assert there.configurations["3d"].network.value.features == (32, 64, 128, 256, 320, 320)
    assert stages(there.configurations["3d"]) == 6
    assert "as much of it as fits" in here.configurations["3d"].patch.reason
    assert here.configurations["2d"].patch.value == (192, 192, 1)
    assert there.configurations["2d"].patch.value == (512, 512, 1)


def test_eight_slices() -> None:
    c = alike((64, 64, 8), (1, 1, 1), "gpu").configurations["3d"]
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


def test_a_label_that_no_case_has_is_refused() -> None:
    with pytest.raises(InputError, match="no case of Task99_Test has the label 2 tumour"):
        plan(measured([(9, 9, 9)], [(1, 1, 1)]), LabelSet.from_names(["organ", "tumour"]))


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(InputError, match=r"machine 'tpu'\. Say cpu or gpu"):
        plan(measured([(9, 9, 9)], [(1, 1, 1)]), ORGAN, Target("tpu"))  # type: ignore[arg-type]


# ---- memory and time ----------------------------------------------------------------------------

CT = ((512, 512, 300), (0.8, 0.8, 1.0))
ANY = Target(memory=10**12 * GIB)


def steps(c: Configuration) -> int:
    assert c.steps is not None
    return c.steps.value


def test_without_a_budget_the_length_is_the_usual_or_the_one_asked_for() -> None:
    assert steps(alike((200, 200, 200), (1, 1, 1)).configurations["3d"]) == 5_000
    assert steps(alike((9, 9, 9), (1, 1, 1), "gpu").configurations["2d"]) == 25_000
    asked = alike((9, 9, 9), (1, 1, 1), Target(steps=7)).configurations["3d"].steps
    assert asked is not None
    assert asked.value == 7
    assert asked.reason.startswith("as asked for")


def test_a_budget_may_differ_between_configurations() -> None:
    both = alike((35, 50, 35), (1, 1, 1), Target(budgets={"3d": 400.0, "2d": 50.0})).configurations
    same = alike((35, 50, 35), (1, 1, 1), Target(budgets={"": 400.0})).configurations
    assert both["3d"] == same["3d"]
    assert steps(both["2d"]) < steps(same["2d"])


def test_a_day_on_a_large_gpu_plans_for_more_than_minutes_on_two_cores() -> None:
    """More voxels, wider, longer; and between the two, never less for more."""
    targets = [
        Target(budgets={"": 20.0}),
        Target(budgets={"": 900.0}),
        Target("gpu", 8 * GIB, True, {"": 3600.0}),
        Target("gpu", 80 * GIB, True, {"": 86_400.0}),
    ]
    plans = [alike(*CT, target, channels=("CT",)).configurations["3d"] for target in targets]
    voxels = [np.prod(c.patch.value) for c in plans]
    features = [c.network.value.features[0] for c in plans]
    assert voxels == sorted(voxels)
    assert features == sorted(features)
    assert voxels[-1] > 30 * voxels[0]
    assert features[-1] > features[0]
    assert steps(plans[-1]) > 20_000 > 3_000 > steps(plans[1])


def test_few_steps_make_the_network_narrower_before_the_patch_smaller() -> None:
    long, short, shortest = (
        alike(*CT, Target(budgets={"": seconds})).configurations["3d"] for seconds in (20_000.0, 400.0, 10.0)
    )
    assert long.patch.value == short.patch.value == (48, 48, 48)
    assert (long.network.value.features[0], short.network.value.features[0]) == (16, 8)
    assert np.prod(shortest.patch.value) < 48**3
    assert "5000 steps fit" in (long.steps.reason if long.steps else "")


def test_more_steps_than_teach_anything_are_not_planned() -> None:
    c = alike((9, 9, 9), (1, 1, 1), Target("gpu", budgets={"": 1e7})).configurations["3d"]
    assert c.steps
    assert c.steps.value == 250_000
    assert "as many as teach anything" in c.steps.reason


def test_a_batch_grows_where_the_patch_holds_the_case() -> None:
    c = alike((35, 50, 35), (1, 1, 1), "gpu", cases=260).configurations["3d"]
    assert c.batch.value == 8
    assert "the patch holds a whole case" in c.batch.reason
    assert alike((35, 50, 35), (1, 1, 1), "gpu", cases=20).configurations["3d"].batch.value == 2
    assert alike((35, 50, 35), (1, 1, 1), "cpu", cases=260).configurations["3d"].batch.value == 2


def test_less_memory_gives_smaller_patches_and_too_little_is_refused() -> None:
    sizes = [np.prod(alike(*CT, Target("gpu", m * GIB, True)).configurations["3d"].patch.value) for m in (2, 4, 80)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    with pytest.raises(InputError, match=r"even the smallest plan, patches of .* 0\.50 GiB are allowed.*--gpu-memory"):
        alike(*CT, Target("gpu", GIB // 2))
    with pytest.raises(InputError, match=r"0\.10 GiB are allowed.*--memory, or crop"):
        alike(*CT, Target("cpu", GIB // 10 + 1))


def test_scans_much_larger_than_a_patch_are_seen_at_low_resolution_too() -> None:
    decided = alike(*CT, "gpu", channels=("CT",)).configurations
    full, low = decided["3d"], decided["3d-low"]
    assert low.spacing.value[0] > full.spacing.value[0]
    seen = np.prod(low.patch.value) / np.prod(np.array(CT[0]) * CT[1] / np.array(low.spacing.value))
    assert 0.25 <= seen < 0.35
    assert low.previous is None
    assert "a quarter of the typical case" in low.spacing.reason
    assert "3d-low" not in alike((160, 160, 160), (1, 1, 1), "gpu").configurations
    with pytest.raises(InputError, match="3d-low, which is not planned"):
        alike((160, 160, 160), (1, 1, 1), Target("gpu", budgets={"3d-low": 9.0}))


def test_things_are_counted_at_full_resolution() -> None:
    scans = measured([CT[0]] * 3, [CT[1]] * 3, channels=("CT",))
    assert list(plan(scans, ORGAN, Target("gpu"), family="mask-rcnn").configurations) == ["3d", "2d"]
    with pytest.raises(InputError, match="3d-low, which is not planned: mask-rcnn counts at full resolution"):
        plan(scans, ORGAN, Target("gpu", budgets={"3d-low": 9.0}), family="mask-rcnn")


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_where_there_is_low_resolution_a_second_stage_comes_after_it(machine: str) -> None:
    decided = alike(*CT, machine, channels=("CT",))
    full, second = decided.configurations["3d"], decided.configurations["3d-cascade"]
    assert list(decided.configurations) == ["3d", "2d", "3d-low", "3d-cascade"]
    assert second.previous == "3d-low"
    for what in ("spacing", "patch", "batch", "network"):
        assert getattr(second, what).value == getattr(full, what).value
    assert "told by 3d-low" in second.patch.reason
    assert second.cost is not None
    assert full.cost is not None
    # One label more goes in: the voxels of a patch and of the cases take so much more.
    voxels = np.prod(full.patch.value) * full.batch.value
    assert second.cost.memory_bytes - full.cost.memory_bytes == pytest.approx(4 * voxels, rel=0.2)
    assert second.cost.seconds_per_step > full.cost.seconds_per_step
    assert second.cost.disk_bytes - full.cost.disk_bytes == pytest.approx(3 * 2 * np.prod(CT[0]), rel=1e-3)


def test_a_second_stage_has_a_budget_of_its_own_where_there_is_one() -> None:
    steps = alike(*CT, Target("gpu", budgets={"": 3600.0, "3d-cascade": 60.0})).configurations["3d-cascade"].steps
    assert steps is not None
    assert "60 s" in steps.reason
    with pytest.raises(InputError, match="3d-cascade, which is not planned"):
        alike((160, 160, 160), (1, 1, 1), Target("gpu", budgets={"3d-cascade": 9.0}))


def test_a_second_stage_of_many_structures_is_no_larger_than_memory_allows() -> None:
    labels = LabelSet.from_names([f"structure {n}" for n in range(104)])
    fingerprint = measured([CT[0]] * 3, [CT[1]] * 3)
    row = fingerprint.cases[0]
    cases = tuple(
        row.model_copy(
            update={
                "id": f"c{n}",
                "image_hash": str(n),
                "label_mm3": dict.fromkeys(labels.numbers, 100.0),
                "label_places": dict.fromkeys(labels.numbers, row.label_places[1]),
            }
        )
        for n in range(3)
    )
    target = Target("gpu", 12 * GIB, half=True)
    decided = plan(fingerprint.model_copy(update={"cases": cases}), labels, target)
    second = decided.configurations["3d-cascade"]
    assert second.cost is not None
    assert second.cost.memory_bytes + GPU_OVERHEAD <= target.memory
    assert decided.inputs(second) == 105


def test_what_learns_from_scans_without_labels_has_no_second_stage() -> None:
    decided, target, wanted = alike(*CT, "gpu"), Target("gpu", half=True), Unlabelled(5, pretrain=True)
    assert list(wanted.decided(decided, 3, target).configurations) == ["3d", "2d", "3d-low"]
    with pytest.raises(InputError, match="3d-cascade, which cannot learn from scans without labels"):
        wanted.decided(decided, 3, Target("gpu", budgets={"3d-cascade": 60.0}))


def test_thick_slices_stay_until_pixels_come_near_them() -> None:
    low = alike((512, 512, 100), (0.8, 0.8, 5.0), channels=("CT",)).configurations["3d-low"]
    x, _, z = low.spacing.value
    assert x > 2
    assert z == 5 or x >= z / 2


@pytest.mark.parametrize("options", [{"budgets": {"4d": 60.0}}, {"budgets": {"": 60.0}, "steps": 5}])
def test_lengths_that_make_no_sense_are_refused(options: Any) -> None:
    with pytest.raises(InputError, match=r"4d|twice"):
        alike((9, 9, 9), (1, 1, 1), Target(**options))


class Bench:
    """A meter: a machine of some speed, and memory that differs from what is reckoned."""

    def __init__(self, speed: float, memory: float = 1.0, most: float = 1e18) -> None:
        self.speed, self.memory, self.most = speed, memory, most
        self.asked: list[Configuration] = []

    def __call__(self, c: Configuration, channels: int, classes: int) -> Step:
        self.asked.append(c)
        reckoned = estimate(c, channels, classes, kind="cpu", half=False)
        if reckoned.memory_bytes * self.memory > self.most:
            raise DoesNotFitError("no", "less")
        return Step(reckoned.work / self.speed, int(self.memory * reckoned.memory_bytes), "a bench", 3)


@pytest.mark.parametrize("speed", [1e9, 4e10, 1e12])
def test_what_is_measured_sets_size_length_and_cost(speed: float) -> None:
    bench = Bench(speed, 1.3)
    fingerprint = measured([(90, 90, 90)] * 9, [(1, 1, 1)] * 9)
    c = plan(fingerprint, ORGAN, Target(budgets={"": 900.0}), meter=bench).configurations["3d"]
    assert c.cost
    assert c.steps
    assert (c.cost.measured_on, c.cost.threads) == ("a bench", 3)
    reckoned = estimate(c, 1, 2, kind="cpu", half=False)
    assert c.cost.memory_bytes == int(1.3 * reckoned.memory_bytes)
    assert c.cost.seconds_per_step == pytest.approx(1.1 * reckoned.work / speed, rel=1e-3)
    assert 0.45 * 900 <= c.steps.value * c.cost.seconds_per_step <= 900 or c.steps.value in (1, 250_000)
    assert "measured" in c.patch.reason
    assert "as measured" in c.steps.reason
    assert len([a for a in bench.asked if a.dimensions == 3 and not a.previous]) <= 3
    assert any(a.patch.value == c.patch.value and a.network == c.network for a in bench.asked)


def test_a_faster_machine_gets_a_larger_network() -> None:
    fingerprint = measured([CT[0]] * 3, [CT[1]] * 3)
    target = Target(budgets={"": 900.0}, memory=64 * GIB)
    slow, fast = (plan(fingerprint, ORGAN, target, meter=Bench(s)).configurations["3d"] for s in (1e10, 1e13))
    assert np.prod(fast.patch.value) > np.prod(slow.patch.value)


def test_where_a_step_runs_out_of_memory_the_next_smaller_one_is_taken() -> None:
    fingerprint = measured([CT[0]] * 3, [CT[1]] * 3)
    smaller = estimate(alike(*CT, Target(memory=64 * GIB)).configurations["3d"], 1, 2, kind="cpu", half=False)
    bench = Bench(1e12, most=0.9 * smaller.memory_bytes)
    c = plan(fingerprint, ORGAN, Target(memory=64 * GIB), meter=bench).configurations["3d"]
    assert c.cost
    assert c.cost.measured_on == "a bench"
    assert c.cost.memory_bytes <= 0.9 * smaller.memory_bytes
    with pytest.raises(InputError, match="memory runs out on this machine even with patches of 24x24x24"):
        plan(fingerprint, ORGAN, Target(memory=64 * GIB), meter=Bench(1e12, most=1.0))


def test_where_the_smallest_is_measured_to_be_too_large_the_plan_is_refused() -> None:
    fingerprint = measured([CT[0]] * 3, [CT[1]] * 3)
    fitting = alike(*CT, Target(memory=3 * GIB)).configurations["3d"]
    assert fitting.cost
    with pytest.raises(InputError, match=r"even the smallest plan, .* GiB to train, and 3\.00 GiB are allowed"):
        plan(fingerprint, ORGAN, Target(memory=3 * GIB), meter=Bench(1e12, memory=1e4))


class Uneven(Bench):
    """Wide networks take ten times the memory that is reckoned, narrow ones what is."""

    def __call__(self, c: Configuration, channels: int, classes: int) -> Step:
        self.memory = 10.0 if c.network.value.features[0] > 8 else 1.0
        return super().__call__(c, channels, classes)


def test_what_was_measured_as_too_large_is_not_chosen_by_what_another_takes() -> None:
    fingerprint = measured([CT[0]] * 3, [CT[1]] * 3)
    free = alike(*CT, Target(memory=64 * GIB)).configurations["3d"]
    assert free.cost
    assert free.network.value.features[0] > 8
    target = Target(memory=free.cost.ram_bytes + free.cost.memory_bytes)
    c = plan(fingerprint, ORGAN, target, meter=Uneven(1e12)).configurations["3d"]
    assert c.network.value.features[0] == 8
    assert c.cost
    assert c.cost.ram_bytes <= target.memory


def test_a_larger_batch_is_worth_no_patch_of_which_too_few_steps_fit() -> None:
    """A day holds some 100,000 steps of two patches of 160x192x160, which want 80,000, and fewer of more."""
    days = {n: alike((138, 169, 138), (1, 1, 1), Target("gpu", 80 * GIB, True, {"": n * 86_400.0}), cases=484,
                     channels=("MRI",) * 4).configurations["3d"] for n in (0.2, 1, 4)}  # fmt: skip
    assert days[0.2].patch.value != (160, 192, 160)
    for c in days.values():
        assert c.batch.value == 2 or steps(c) >= 80_000
    assert days[4].batch.value > 2


def test_a_budget_that_hardly_holds_the_start_is_refused() -> None:
    with pytest.raises(InputError, match=r"a budget of 9 s for 3d is no time to train: .* takes 5 s\. Allow 10 s"):
        alike((9, 9, 9), (1, 1, 1), Target(budgets={"": 9.0}))
    alike((9, 9, 9), (1, 1, 1), Target(budgets={"": 10.0}))
    with pytest.raises(InputError, match=r"a budget of 20 s for 3d is no time .* Allow 33\.33"):
        Unlabelled(5, pretrain=True, teacher=True).leaves(Target(budgets={"3d": 20.0}))


@pytest.mark.parametrize("seconds", [60.0, 900.0, 86_400.0])
def test_a_budget_holds_all_of_a_run_whatever_the_scans(seconds: float) -> None:
    """One prediction of the whole scan takes a quarter of an hour here."""
    large = alike((512, 512, 482), (0.77, 0.77, 1.0), Target(budgets={"": seconds}), cases=131).configurations
    for c in large.values():
        assert c.cost
        assert c.watching
        assert 3600 * c.cost.hours <= 1.01 * seconds
        assert 0.5 * seconds <= steps(c) * c.cost.seconds_per_step
    shown = large["3d"].watching
    assert shown
    assert (shown.value.times == 0) == (seconds < 86_400)
    assert ("shows its loss only" in shown.reason) == (seconds < 86_400)


# ---- bad input ----------------------------------------------------------------------------------


def test_one_case_gives_a_plan() -> None:
    decided = alike((35, 50, 35), (1, 1, 1), cases=1)
    assert decided.configurations["3d"].patch.value == (24, 56, 32)
    assert decided.training.augmentation.value.mirror == ()


def test_a_case_smaller_than_the_patch_is_no_fault() -> None:
    shapes = [(8, 8, 8), *[(60, 60, 60)] * 4]
    assert plan(measured(shapes, [(1, 1, 1)] * 5), ORGAN).configurations["3d"].patch.value == (48, 48, 48)


def test_a_class_in_one_case_of_a_hundred_is_planned_for() -> None:
    labels = LabelSet.from_names(["organ", "tumour"])
    fingerprint = measured([(40, 40, 40)] * 100, [(1, 1, 1)] * 100)
    rare = fingerprint.cases[0].model_copy(update={"label_mm3": {1: 100.0, 2: 5.0}})
    decided = plan(fingerprint.model_copy(update={"cases": (rare, *fingerprint.cases[1:])}), labels)
    assert [label.name for label in decided.labels] == ["organ", "tumour"]


def test_channels_stay_in_their_order_with_their_own_rules() -> None:
    one, other = (alike((40, 40, 40), (1, 1, 1), channels=c) for c in (("CT", "PET"), ("PET", "CT")))
    assert one.channels == ("CT", "PET")
    assert other.channels == ("PET", "CT")
    assert [n.kind for n in other.normalisation.value] == ["zscore", "ct"]
    assert one.digest() != other.digest()


# ---- for any data -------------------------------------------------------------------------------

VOXELS = st.one_of(st.integers(1, 40), st.integers(1, 1200))
SPACINGS = st.one_of(st.floats(0.3, 6), st.sampled_from([0.001, 0.5, 1.0, 10.0, 50.0]))
CASES = st.lists(
    st.tuples(st.tuples(VOXELS, VOXELS, VOXELS), st.tuples(SPACINGS, SPACINGS, SPACINGS)), min_size=1, max_size=6
)


def decisions(value: Any) -> list[Decision[Any]]:
    """Every decision in a plan, however deep."""
    if isinstance(value, dict):
        return [d for v in value.values() for d in decisions(v)]
    if not hasattr(type(value), "model_fields"):
        return []
    inner = [d for name in type(value).model_fields for d in decisions(getattr(value, name))]
    return [value, *inner] if isinstance(value, Decision) else inner


TARGETS = st.builds(
    Target,
    st.sampled_from(["cpu", "gpu"]),
    st.sampled_from([4 * GIB, 8 * GIB, 80 * GIB]),
    st.booleans(),
    st.sampled_from([{}, {"": 30.0}, {"": 900.0}, {"3d": 100.0, "2d": 30.0}, {"": 86_400.0}]),
)


@settings(max_examples=50)
@given(CASES, TARGETS)
def test_every_plan_fits_its_bounds_and_says_why(cases: Any, target: Target) -> None:
    fingerprint = measured([shape for shape, _ in cases], [mm for _, mm in cases])
    try:
        decided = plan(fingerprint, ORGAN, target)
    except InputError:
        # A billion voxels are held in memory while they are predicted, which the smallest patch does not help.
        spacing = np.median(fingerprint.spacings, axis=0)
        assert target.kind == "cpu"
        assert fingerprint.shapes.prod(axis=1).max() > 5e7 or (fingerprint.shapes * spacing).prod(axis=1).max() > 1e7
        return
    assert {"3d", "2d"} <= set(decided.configurations) <= {"3d", "2d", "3d-low", "3d-cascade"}
    for name, c in decided.configurations.items():
        patch, network = np.array(c.patch.value), c.network.value
        assert (patch % network.divisor == 0).all()
        assert patch.prod() <= (SIZES[-1].voxels if c.dimensions == 3 else SIZES[-1].pixels)
        inside = np.arange(3) != c.slice_axis
        assert (patch[inside] >= 8).all()
        assert ((patch // network.divisor)[inside] >= 4).all()
        assert (network.features[0], c.batch.value >= 2) in {(size.first_features, True) for size in SIZES}
        for axis in range(3):
            kernels = [kernel[axis] for kernel in network.kernels]
            assert kernels == sorted(kernels), "an axis that a kernel spans stays spanned"
            for kernel, stride in zip(network.kernels, network.strides, strict=True):
                assert stride[axis] == 1 or kernel[axis] == 3
            inner = network.kernels[-1][axis]
            assert inner == 3 or axis == c.slice_axis or all(stride[axis] == 1 for stride in network.strides)
        lows, highs = fingerprint.spacings.min(axis=0), fingerprint.spacings.max(axis=0)
        assert (np.array(c.spacing.value) >= lows - 1e-6).all()
        assert name == "3d-low" or (np.array(c.spacing.value) <= highs + 1e-6).all()
        assert c.steps is not None
        assert c.cost is not None
        assert c.cost.measured_on is None
        assert "not measured" in c.patch.reason
        assert "not measured" in c.steps.reason
        memory = estimate(c, decided.inputs(c), 2, kind=target.kind, half=target.half).memory_bytes
        assert c.cost.memory_bytes == memory
        assert (memory + GPU_OVERHEAD if target.kind == "gpu" else c.cost.ram_bytes) <= target.memory
        budget = target.budget(name)
        if budget is not None and c.steps.value > 1:
            members = c.members.value if c.members else 1
            assert members * c.steps.value * c.cost.seconds_per_step <= 1.001 * budget
            assert 3600 * c.cost.hours <= 1.01 * budget
        assert c.watching
    found = decisions(decided)
    several = sum(c.members is not None for c in decided.configurations.values())
    assert len(found) == 2 + len(decided.configurations) * 6 + 4 + several
    assert all(d.reason.strip() for d in found)
    assert decided.fingerprint == fingerprint.digest()
    assert parse_plan(decided.model_dump(mode="json"), "it") == decided
    assert plan(fingerprint, ORGAN, target) == decided


def test_sizes_beyond_all_measure_end_soon() -> None:
    c = alike((900_000, 800_000, 700_000), (0.001, 0.7, 50), Target(memory=10**12 * GIB)).configurations
    assert np.prod(c["3d"].patch.value) <= 48**3
    assert np.prod(c["2d"].patch.value) <= 192**2


@settings(max_examples=40)
@given(CASES)
def test_a_gpu_sees_no_less_than_a_cpu(cases: Any) -> None:
    fingerprint = measured([shape for shape, _ in cases], [mm for _, mm in cases])
    here, there = (plan(fingerprint, ORGAN, Target(m, 10**6 * GIB)).configurations for m in ("cpu", "gpu"))
    for name in ("3d", "2d"):
        c = here[name]
        assert np.prod(there[name].patch.value) >= 0.8 * np.prod(c.patch.value)
        assert c.spacing == there[name].spacing


@settings(max_examples=40)
@given(CASES, st.permutations(range(3)))
def test_axes_are_treated_alike(cases: Any, order: list[int]) -> None:
    """Turning all scans turns the 3D spacing with them."""
    turned = [(tuple(s[o] for o in order), tuple(m[o] for o in order)) for s, m in cases]
    one, other = (
        plan(measured([s for s, _ in which], [m for _, m in which]), ORGAN, ANY).configurations["3d"].spacing.value
        for which in (cases, turned)
    )
    medians = np.median([m for _, m in cases], axis=0)
    if len(set(medians)) == 3:
        assert other == tuple(one[o] for o in order)

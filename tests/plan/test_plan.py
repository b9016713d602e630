from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg.core.errors import InputError
from medseg.plan.plan import Plan, parse_plan, read_plan, write_plan

SOUND: dict[str, Any] = {
    "format": 2,
    "task": "Task99_Test",
    "channels": ["CT", "PET"],
    "labels": [{"name": "liver", "number": 1, "code": "SCT:10200004"}, {"name": "tumour", "number": 7, "code": None}],
    "optional_channels": {"value": ["PET"], "reason": "why"},
    "normalisation": {
        "value": [
            {"channel": "CT", "kind": "ct", "low": -100.0, "high": 250.0, "mean": 80.0, "std": 40.0},
            {"channel": "PET", "kind": "zscore", "low": None, "high": None, "mean": None, "std": None},
        ],
        "reason": "why",
    },
    "configurations": {
        "3d": {
            "dimensions": 3,
            "slice_axis": None,
            "spacing": {"value": [0.8, 0.8, 2.5], "reason": "why"},
            "patch": {"value": [64, 64, 16], "reason": "why"},
            "batch": {"value": 2, "reason": "why"},
            "network": {
                "value": {
                    "family": "unet",
                    "features": [8, 16, 32],
                    "kernels": [[3, 3, 1], [3, 3, 3], [3, 3, 3]],
                    "strides": [[1, 1, 1], [2, 2, 1], [2, 2, 2]],
                },
                "reason": "why",
            },
            "steps": {"value": 5000, "reason": "why"},
            "cost": {
                "seconds_per_step": 0.3,
                "memory_bytes": 500000000,
                "ram_bytes": 1000000000,
                "disk_bytes": 42000000,
                "hours": 0.5,
                "measured_on": "a processor",
                "threads": 2,
            },
        },
        "2d": {
            "dimensions": 2,
            "slice_axis": 2,
            "spacing": {"value": [0.8, 0.8, 2.5], "reason": "why"},
            "patch": {"value": [64, 64, 1], "reason": "why"},
            "batch": {"value": 12, "reason": "why"},
            "network": {
                "value": {
                    "family": "unet",
                    "features": [8, 16],
                    "kernels": [[3, 3, 1], [3, 3, 1]],
                    "strides": [[1, 1, 1], [2, 2, 1]],
                },
                "reason": "why",
            },
        },
    },
    "training": {
        "learning_rate": {"value": 0.002, "reason": "why"},
        "weight_decay": {"value": 0.01, "reason": "why"},
        "foreground_share": {"value": 0.5, "reason": "why"},
        "augmentation": {
            "value": {
                "rotation_degrees": 15.0,
                "scaling": 0.2,
                "spatial_share": 0.5,
                "intensity": 0.2,
                "gamma": 0.3,
                "noise": 0.1,
                "mirror": [0],
            },
            "reason": "why",
        },
        "steps_per_epoch": 50,
    },
    "fingerprint": "abc",
}
Path_ = tuple[str | int, ...]


def changed(where: Path_, value: Any) -> dict[str, Any]:
    """SOUND with one value replaced; `...` takes the key away."""
    edited = copy.deepcopy(SOUND)
    inside: Any = edited
    for key in where[:-1]:
        inside = inside[key]
    if value is ...:
        del inside[where[-1]]
    else:
        inside[where[-1]] = value
    return edited


def leaves(value: Any, where: Path_ = ()) -> list[Path_]:
    """Where every number, string and null stands."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, inner in items for leaf in leaves(inner, (*where, key))]
    return [where]


def keys(value: Any, where: Path_ = ()) -> list[Path_]:
    """Where every key of an object stands."""
    if isinstance(value, dict):
        return [(*where, k) for k in value] + [found for k, v in value.items() for found in keys(v, (*where, k))]
    return [found for n, v in enumerate(value) for found in keys(v, (*where, n))] if isinstance(value, list) else []


C3, C2, TRAINING = ("configurations", "3d"), ("configurations", "2d"), ("training",)
NETWORK = (*C3, "network", "value")


def test_there_and_back(tmp_path: Path) -> None:
    plan = parse_plan(SOUND, "it")
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text()) == SOUND
    assert read_plan(tmp_path / "plan.json").digest() == plan.digest()


def test_what_it_answers() -> None:
    plan = parse_plan(SOUND, "it")
    assert plan.label_set.numbers == (1, 7)
    assert plan.label_set.labels[0].code == "SCT:10200004"
    assert plan.configuration("2d").slice_axis == 2
    assert plan.configuration("3d").network.value.divisor == (4, 4, 2)
    with pytest.raises(InputError, match=r"Task99_Test has no configuration '4d'\. It has 3d, 2d"):
        plan.configuration("4d")


def test_whole_numbers_do_for_floats_as_people_write_them() -> None:
    plan = parse_plan(changed((*C3, "spacing", "value"), [1, 1, 2]), "it")
    assert plan.configuration("3d").spacing.value == (1.0, 1.0, 2.0)


def test_no_channel_is_optional_unless_it_is_said() -> None:
    assert parse_plan(changed(("optional_channels",), ...), "it").optional_channels.value == ()


def test_reasons_may_be_left_out() -> None:
    assert parse_plan(changed((*C3, "batch"), {"value": 2}), "it").configuration("3d").batch.reason == ""


# ---- the digest ---------------------------------------------------------------------------------


def different(value: Any) -> Any:
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 2
    return "b" if value is None else f"{value}b"


NO_DECISIONS = [w for w in leaves(SOUND) if w[-1] == "reason" or "cost" in w]


@pytest.mark.parametrize("where", [w for w in NO_DECISIONS if w[-1] == "reason"], ids=str)
def test_reasons_do_not_count(where: Path_) -> None:
    assert parse_plan(changed(where, "for another reason"), "it").digest() == parse_plan(SOUND, "it").digest()


@pytest.mark.parametrize("value", [..., {**SOUND["configurations"]["3d"]["cost"], "hours": 9, "measured_on": None}])
def test_costs_do_not_count(value: Any) -> None:
    assert parse_plan(changed((*C3, "cost"), value), "it").digest() == parse_plan(SOUND, "it").digest()


def test_everything_else_counts() -> None:
    """Each value changed in turn: either the plan is refused, or its digest is another."""
    before = parse_plan(SOUND, "it").digest()
    taken = 0
    for where in leaves(SOUND):
        if where in NO_DECISIONS:
            continue
        inside: Any = SOUND
        for key in where:
            inside = inside[key]
        try:
            plan = parse_plan(changed(where, different(inside)), "it")
        except InputError:
            continue
        assert plan.digest() != before, where
        taken += 1
    assert taken > 30


def test_a_configuration_that_is_called_reason_counts() -> None:
    one, other = copy.deepcopy(SOUND), copy.deepcopy(SOUND)
    one["configurations"]["reason"] = SOUND["configurations"]["3d"]
    other["configurations"]["reason"] = SOUND["configurations"]["2d"]
    assert len({parse_plan(p, "it").digest() for p in (SOUND, one, other)}) == 3


def test_a_configuration_that_is_called_cost_counts() -> None:
    one, other = copy.deepcopy(SOUND), copy.deepcopy(SOUND)
    one["configurations"]["cost"] = SOUND["configurations"]["3d"]
    other["configurations"]["cost"] = SOUND["configurations"]["2d"]
    assert len({parse_plan(p, "it").digest() for p in (SOUND, one, other)}) == 3


def test_the_order_of_keys_does_not_count() -> None:
    turned = dict(reversed(SOUND.items()))
    assert parse_plan(turned, "it").digest() == parse_plan(SOUND, "it").digest()


# ---- edited amiss -------------------------------------------------------------------------------


def refused(value: Any, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_plan(value, "plan.json")
    text = str(caught.value)
    assert text.startswith("plan.json is no sound plan: ")
    assert "\n" not in text
    assert len(text) < 500
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("format",), 3),
        (("format",), "1"),
        (("task",), 5),
        (("channels",), "CT"),
        (("channels",), []),
        (("labels",), []),
        (("labels", 0, "number"), 0),
        (("labels", 0, "number"), 70_000),
        (("labels", 0, "number"), 1.5),
        (("labels", 0, "name"), None),
        (("configurations",), {}),
        (("configurations",), []),
        ((*C3, "dimensions"), 4),
        ((*C2, "slice_axis"), 3),
        ((*C3, "spacing", "value"), [1, 1]),
        ((*C3, "spacing", "value", 0), 0),
        ((*C3, "spacing", "value", 0), -1),
        ((*C3, "spacing", "value", 0), "1"),
        ((*C3, "spacing", "value", 0), float("nan")),
        ((*C3, "spacing", "value", 0), float("inf")),
        ((*C3, "spacing", "value", 0), 10**400),
        ((*C3, "patch", "value", 0), 0),
        ((*C3, "patch", "value", 0), 10**30),
        ((*C3, "patch", "value", 0), 64.0),
        ((*C3, "patch", "value", 0), True),
        ((*C3, "patch", "value", 0), None),
        ((*C3, "batch", "value"), "2"),
        ((*C3, "batch", "value"), 10**400),
        ((*C3, "batch"), 2),
        ((*NETWORK, "family"), "os.system"),
        ((*NETWORK, "features", 0), -8),
        ((*NETWORK, "kernels", 0), [3, 3]),
        (("normalisation", "value", 0, "kind"), "minmax"),
        (("normalisation", "value", 0, "std"), 0),
        (("normalisation", "value", 0, "low"), float("-inf")),
        ((*TRAINING, "learning_rate", "value"), 1e308),
        ((*TRAINING, "learning_rate", "value"), 0),
        ((*TRAINING, "foreground_share", "value"), 1.1),
        ((*TRAINING, "augmentation", "value", "scaling"), 0.95),
        ((*TRAINING, "augmentation", "value", "mirror"), [3]),
        ((*TRAINING, "augmentation", "value", "mirror"), 0),
        ((*C3, "steps", "value"), 0),
        ((*C3, "cost", "hours"), -1),
        ((*TRAINING, "steps_per_epoch"), None),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_its_key(where: Path_, value: Any) -> None:
    refused(changed(where, value), ".".join(map(str, where)))


@pytest.mark.parametrize("where", keys(SOUND), ids=str)
def test_a_misspelt_key_is_refused_by_its_name(where: Path_) -> None:
    if where[:-1] == ("configurations",):
        return  # their names are free
    edited = changed(where, ...)
    inside: Any = edited
    for key in where[:-1]:
        inside = inside[key]
    inside[f"{where[-1]}s_"] = 0
    refused(edited)
    edited = changed((*where[:-1], "misspelt"), 0)
    refused(edited, ".".join(map(str, (*where[:-1], "misspelt"))), "Extra inputs are not permitted")


@pytest.mark.parametrize(
    ("where", "value", "word"),
    [
        ((*C3, "patch", "value"), [64, 62, 16], "patch (64, 62, 16) is no multiple of the strides' product (4, 4, 2)"),
        ((*C3, "patch", "value"), [4, 4, 2], "single voxel"),
        ((*C2, "slice_axis"), None, "needs slice_axis"),
        ((*C3, "slice_axis"), 0, "needs slice_axis"),
        ((*C2, "patch", "value"), [64, 64, 2], "one voxel thick along axis 2"),
        ((*C2, "network", "value", "kernels"), [[3, 3, 3], [3, 3, 1]], "kernels of 1 along axis 2"),
        ((*NETWORK, "features"), [8, 16], "one entry per stage"),
        ((*NETWORK, "strides", 0), [2, 2, 1], "the first with stride 1"),
        ((*NETWORK, "kernels", 1), [2, 3, 3], "kernels are odd"),
        ((*NETWORK, "strides", 1), [8, 2, 1], "kernels are odd, strides no longer"),
        (("channels",), ["PET", "CT"], "normalisation needs one entry per channel, in their order"),
        (("channels",), ["CT"], "normalisation needs one entry per channel"),
        (("optional_channels", "value"), ["CT"], "'CT' cannot be an optional channel: they are among PET"),
        (("optional_channels", "value", 0), "T2", "'T2' cannot be an optional channel"),
        (("normalisation", "value", 0, "mean"), None, "ct needs low, high, mean and std"),
        (("normalisation", "value", 0, "low"), 251, "low 251.0 is above high 250.0"),
        (("labels", 1, "number"), 1, "label number 1 comes twice"),
        (("labels", 1, "name"), "liver", "label name liver comes twice"),
    ],
    ids=str,
)
def test_values_that_do_not_go_together_are_refused(where: Path_, value: Any, word: str) -> None:
    refused(changed(where, value), word, where[0] if where[0] == "configurations" else "")


@pytest.mark.parametrize(
    "value", [None, [], 3, "plan", {}, [SOUND], {"format": 2}, {"format": 1}, {"format": 1, "training": 3}]
)
def test_what_is_no_plan_at_all_is_refused(value: Any) -> None:
    refused(value)


@pytest.mark.parametrize("change", [lambda t: t[:-20], lambda t: t.replace("0.002", "NaN"), lambda _: "", None])
def test_files_that_are_no_json_or_missing_are_refused(tmp_path: Path, change: Callable[[str], str] | None) -> None:
    path = tmp_path / "plan.json"
    if change:
        path.write_text(change(json.dumps(SOUND)))
    with pytest.raises(InputError, match=r"plan\.json .*Make it with `medseg plan`"):
        read_plan(path)


def test_a_plan_is_frozen() -> None:
    plan: Any = parse_plan(SOUND, "it")
    with pytest.raises(ValueError, match="frozen"):
        plan.task = "another"
    assert isinstance(plan, Plan)


# ---- plans of format 1 --------------------------------------------------------------------------


def of_format_1() -> dict[str, Any]:
    old = copy.deepcopy(SOUND)
    old["format"] = 1
    old["training"]["epochs"] = {"value": 40, "reason": "asked for"}
    for configuration in old["configurations"].values():
        configuration.pop("steps", None)
        configuration.pop("cost", None)
    return old


def test_epochs_of_format_1_come_to_steps() -> None:
    plan = parse_plan(of_format_1(), "it")
    assert plan.format == 2
    for name in ("3d", "2d"):
        steps = plan.configuration(name).steps
        assert steps is not None
        assert (steps.value, steps.reason) == (2000, "40 epochs")


def test_imported_models_of_format_1_have_no_steps() -> None:
    old = of_format_1()
    del old["configurations"]["2d"]
    old["configurations"]["3d"] |= {"grid": "shape", "orientation": "stored"}
    plan = parse_plan(old, "it")
    assert plan.configuration("3d").steps is None
    assert "steps" not in plan.model_dump(mode="json")["configurations"]["3d"]


def test_epochs_in_format_2_are_refused_with_what_took_their_place() -> None:
    with pytest.raises(InputError, match=r"training\.epochs: a run's length is in configurations\.NAME\.steps"):
        parse_plan(changed((*TRAINING, "epochs"), {"value": 3}), "plan.json")


# ---- plans that inherit -------------------------------------------------------------------------


def inheriting(folder: Path, changes: dict[str, Any], base: Any = SOUND, said: Any = "../base/plan.json") -> Path:
    """RUN/plan.json that says only what differs from BASE/plan.json."""
    for name, value in (("base", base), ("run", {"inherits": said, **changes})):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "plan.json").write_text(json.dumps(value))
    return folder / "run" / "plan.json"


def test_what_differs_takes_the_place_of_what_was_inherited(tmp_path: Path) -> None:
    changes = {
        "configurations": {"3d": {"patch": {"value": [32, 32, 8]}, "network": {"value": {"features": [4, 8, 16]}}}},
        "training": {"augmentation": {"value": {"mirror": []}, "reason": "one kidney"}},
    }
    plan, base = read_plan(inheriting(tmp_path, changes)), parse_plan(SOUND, "it")
    c, before = plan.configuration("3d"), base.configuration("3d")
    assert c.patch.value == (32, 32, 8)
    assert c.patch.reason == "changed by hand"
    assert c.network.value.features == (4, 8, 16)
    assert c.network.value.kernels == before.network.value.kernels
    assert c.steps == before.steps
    assert c.cost is None
    assert plan.training.augmentation.value.mirror == ()
    assert plan.training.augmentation.value.gamma == 0.3
    assert plan.training.augmentation.reason == "one kidney"
    assert plan.configuration("2d") == base.configuration("2d")


def test_a_plan_that_changes_nothing_is_the_same_plan(tmp_path: Path) -> None:
    assert read_plan(inheriting(tmp_path, {})) == parse_plan(SOUND, "it")


def test_inheritance_goes_on(tmp_path: Path) -> None:
    path = inheriting(tmp_path, {"task": "Task01_A"})
    (tmp_path / "last.json").write_text(json.dumps({"inherits": "run/plan.json", "fingerprint": "f"}))
    plan = read_plan(tmp_path / "last.json")
    assert (plan.task, plan.fingerprint) == ("Task01_A", "f")
    assert read_plan(path).fingerprint == "abc"


def test_a_plan_of_format_1_can_be_inherited(tmp_path: Path) -> None:
    plan = read_plan(inheriting(tmp_path, {"configurations": {"3d": {"steps": {"value": 7}}}}, of_format_1()))
    assert [plan.configuration(name).steps.value for name in ("3d", "2d")] == [7, 2000]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("said", "base", "words"),
    [
        ("../nowhere/plan.json", SOUND, ["nowhere", "is missing", "inherits from"]),
        ("plan.json", SOUND, ["inherits: plan.json inherits from it", "Let one stand by itself"]),
        ("../base/plan.json", {"inherits": "../run/plan.json"}, ["inherits from it"]),
        (5, SOUND, ["inherits: 5 is no path"]),
        ("", SOUND, ["is no path"]),
        ("../base/plan.json", [1], ["holds no plan"]),
        ("../base/plan.json", {}, ["is no sound plan: "]),
    ],
)
def test_what_cannot_be_inherited_is_refused(tmp_path: Path, said: Any, base: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_plan(inheriting(tmp_path, {}, base, said))
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_is_changed_is_checked_by_its_key(tmp_path: Path) -> None:
    path = inheriting(tmp_path, {"configurations": {"3d": {"patch": {"value": [30, 32, 8]}}}})
    with pytest.raises(InputError, match=r"run/plan\.json is no sound plan: configurations\.3d: .*no multiple"):
        read_plan(path)
    path = inheriting(tmp_path, {"trianing": {}})
    with pytest.raises(InputError, match="trianing"):
        read_plan(path)


def test_a_file_from_elsewhere_inherits_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sound plan"):
        read_plan(inheriting(tmp_path, {}), inherit=False)

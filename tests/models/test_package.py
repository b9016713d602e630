from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.core.errors import InputError
from medseg.models.build import build
from medseg.models.calibration import Calibration, StructureCalibration
from medseg.models.experience import ChannelExperience, Experience, Range, StructureExperience
from medseg.models.package import (
    INDEX,
    Agreement,
    ModelPackage,
    load_package,
    record_engines,
    save_package,
)
from medseg.plan.plan import Plan, parse_plan

PLAN = {
    "task": "Task99_Test",
    "channels": ["CT"],
    "labels": [{"name": "liver", "number": 1}, {"name": "tumour", "number": 7}],
    "normalisation": {"value": [{"channel": "CT", "kind": "ct", "low": -1, "high": 1, "mean": 0, "std": 1}]},
    "configurations": {
        "3d": {
            "dimensions": 3,
            "spacing": {"value": [1, 1, 2]},
            "patch": {"value": [8, 8, 8]},
            "batch": {"value": 2},
            "network": {
                "value": {
                    "features": [2, 4],
                    "kernels": [[3, 3, 3], [3, 3, 3]],
                    "strides": [[1, 1, 1], [2, 2, 2]],
                }
            },
        }
    },
    "training": {
        "learning_rate": {"value": 0.1},
        "weight_decay": {"value": 0.1},
        "foreground_share": {"value": 0.5},
        "augmentation": {"value": {}},
    },
    "fingerprint": "",
}


def plan() -> Plan:
    return parse_plan(PLAN, "it")


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return dict(build(plan().configuration("3d"), 1, 3).state_dict())


def package(members: int = 2) -> ModelPackage:
    return ModelPackage(
        plan=plan(),
        configuration_name="3d",
        members=tuple(weights(n) for n in range(members)),
        trained_on=("a", "b"),
        held_out=("c",),
        provenance={"seed": 0, "versions": {"torch": torch.__version__}},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_package(tmp_path / "model", package())
    return tmp_path / "model"


def same(one: ModelPackage, other: ModelPackage) -> bool:
    pairs = list(zip(one.members, other.members, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def test_there_and_back(folder: Path) -> None:
    found = load_package(folder)
    assert same(found, package())
    assert replace(found, members=()) == replace(package(), members=())
    assert found.digest() == package().digest()
    assert found.name == "Task99_Test 3d"
    assert found.configuration == plan().configuration("3d")
    network = build(found.configuration, 1, 3)
    network.load_state_dict(found.members[1])


def told() -> ModelPackage:
    """With what it saw, and how far it can be believed."""
    one = Range(low=1.0, high=2.5)
    seen = Experience(
        cases=3,
        spacing=(one,) * 3,
        extent=(one,) * 3,
        orientations=("LPS", "RAS"),
        channels=(
            ChannelExperience(
                name="CT",
                modality="CT",
                percentiles=(one,) * 7,
                profile=(one,) * 7,
                zero_share=Range(low=0, high=0.5),
                negative_share=Range(low=0, high=0.5),
            ),
        ),
        structures=(StructureExperience(name="a", number=1, cases=3, cut=0, mm3=one, pieces=one),),
    )
    measured = Calibration(
        cases=2,
        voxels=10,
        temperature=1.5,
        nll_before=0.5,
        nll_after=0.4,
        ece_before=0.1,
        ece_after=0.02,
        slope=1.1,
        offset=-0.1,
        dice_error_before=None,
        dice_error=0.03,
        dice_error_of_mean=0.04,
        interval=None,
        structures=(StructureCalibration(name="a", number=1, cases=2, mean_dice=0.9, review_below=None),),
    )
    return replace(package(), experience=seen, calibration=measured)


def test_what_it_saw_and_how_far_to_believe_it_come_back(tmp_path: Path) -> None:
    saved = told()
    save_package(tmp_path / "p", saved)
    found = load_package(tmp_path / "p")
    assert (found.experience, found.calibration) == (saved.experience, saved.calibration)
    assert found.digest() == saved.digest() == package().digest()
    save_package(tmp_path / "p", package())
    found = load_package(tmp_path / "p")
    assert (found.experience, found.calibration) == (None, None)


@pytest.mark.parametrize("name", ["experience.json", "calibration.json"])
def test_what_it_saw_is_sealed_and_read_strictly(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "p"
    save_package(folder, told())
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**value, "cases": 99}))
    refused(folder, "was changed after it was written")
    for spoilt in ({**value, "format": 2}, {**value, "more": 1}, [value], {}):
        (folder / name).write_text(json.dumps(spoilt))
        resign(folder, name)
        refused(folder, "has another format")
    (folder / name).unlink()
    refused(folder, "is missing")


def test_the_card_says_what_it_takes_and_finds(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for words in ("Task99_Test 3d", "the channel CT", "2 cases", "| 7 | tumour |", "not a medical device"):
        assert words in card


def test_weights_of_every_kind_keep_their_type(tmp_path: Path) -> None:
    members = ({"b": torch.ones(3, dtype=torch.bfloat16), "i": torch.tensor(5), "t": torch.arange(6.0).view(2, 3).T},)
    save_package(tmp_path / "model", replace(package(), members=members))
    assert same(load_package(tmp_path / "model"), replace(package(), members=members))


def test_saving_the_same_twice_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    save_package(tmp_path / "again", package())
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_package_moves_and_copies_as_a_folder(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert same(load_package(tmp_path / "elsewhere"), package())


def test_a_package_of_format_1_is_read(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    old = {k: v for k, v in index.items() if k not in ("graphs", "not_portable", "engines")}
    (folder / INDEX).write_text(json.dumps({**old, "format": 1}))
    found = load_package(folder)
    assert same(found, package())
    assert found.digest() == package().digest()
    assert found.graphs == ()


def test_weights_are_read_when_they_are_asked_for(folder: Path) -> None:
    found = load_package(folder)
    digest = found.digest()
    (folder / "member0.safetensors").unlink()
    assert found.digest() == digest
    assert set(found.members[1]) == set(weights(1))
    assert len(found.members[1]) == len(weights(1))
    with pytest.raises(KeyError):
        found.members[1]["nothing"]
    with pytest.raises(FileNotFoundError):
        dict(found.members[0])


def test_a_package_that_was_read_is_written_with_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    agreement = Agreement(
        precision="f32", cases=("c",), largest_difference=1e-5, label_agreement=0.99998, least_dice=0.9999
    )
    record_engines(folder, {"openvino-f32": agreement})
    found = load_package(folder)
    assert found.engines == {"openvino-f32": agreement}
    save_package(tmp_path / "again", found)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_smaller_ensemble_leaves_nothing_of_a_larger_one(folder: Path) -> None:
    save_package(folder, package(1))
    assert sorted(p.name for p in folder.glob("member*")) == ["member0.onnx", "member0.safetensors"]


def test_reading_imports_neither_torch_nor_monai(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from medseg.models.package import load_package;"
        "package = load_package(Path(sys.argv[1])); print(package.digest(), *package.graphs);"
        "sys.exit(bool({'torch', 'monai'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert package().digest() in done.stdout


# ---- the digest ---------------------------------------------------------------------------------


def test_the_digest_tells_models_apart() -> None:
    model = package()
    nudged = {**weights(0)}
    name = sorted(nudged)[0]
    nudged[name] = nudged[name].clone()
    nudged[name].view(-1)[0] += 1e-3
    edited = parse_plan({**PLAN, "fingerprint": "another"}, "it")
    digests = [
        model.digest(),
        replace(model, members=(nudged, weights(1))).digest(),
        replace(model, members=(weights(1), weights(0))).digest(),
        replace(model, members=(weights(0),)).digest(),
        replace(model, plan=edited).digest(),
        replace(model, configuration_name="2d").digest(),
    ]
    assert len(set(digests)) == len(digests)


def test_the_digest_is_of_the_model_not_of_its_story() -> None:
    model = package()
    turned = tuple({k: m[k] for k in reversed(m)} for m in model.members)
    assert replace(model, members=turned, provenance={}, held_out=()).digest() == model.digest()


# ---- writing ------------------------------------------------------------------------------------


def test_an_older_package_is_written_over(folder: Path) -> None:
    save_package(folder, replace(package(1), trained_on=("z",)))
    assert load_package(folder).trained_on == ("z",)
    assert len(load_package(folder).members) == 1


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(InputError, match=r"holds something else \(thesis.txt\)"):
        save_package(tmp_path, package())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_package_outlives_a_later_one_that_was_not_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medseg.models.package.write_json", broken)
    with pytest.raises(KeyboardInterrupt):
        save_package(folder, package())
    monkeypatch.undo()
    assert same(load_package(folder), package())
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


# ---- reading what is amiss ----------------------------------------------------------------------


def refused(folder: Path, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        load_package(folder)
    assert caught.value.remedy


def edit(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({k: v for k, v in {**index, **changes}.items() if v is not ...}))


def resign(folder: Path, name: str) -> None:
    """Give the index the checksum of a file as it is now."""
    checksums = json.loads((folder / INDEX).read_text())["checksums"]
    edit(folder, checksums={**checksums, name: hashlib.sha256((folder / name).read_bytes()).hexdigest()})


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is no model package")
    refused(tmp_path / "nowhere", "there is no folder")


@pytest.mark.parametrize("name", ["member0.safetensors", "member1.safetensors", "member1.onnx", "plan.json"])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_changed_byte_is_noticed(folder: Path, name: str, where: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(where * len(data)) if where == 0.5 else int(where)] ^= 1
    (folder / name).write_bytes(bytes(data))
    refused(folder, rf"{name} is missing or was changed")


@pytest.mark.parametrize("name", ["member0.safetensors", "member1.safetensors", "member1.onnx", "plan.json"])
def test_a_missing_file_is_noticed(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, rf"{name} is missing or was changed")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 3},
        {"format": "1"},
        {"format": ...},
        {"code": "import os"},
        {"members": ...},
        {"members": []},
        {"members": "member0.safetensors"},
        {"members": [0]},
        {"members": {"member0.safetensors": 1}},
        {"checksums": []},
        {"checksums": {"plan.json": 5}},
        {"trained_on": 5},
        {"held_out": None},
        {"provenance": "me"},
        {"configuration": ["3d"]},
        {"graphs": "member0.onnx"},
        {"engines": []},
        {"engines": {"openvino-f32": {"precision": "f32"}}},
        {"task": None},
    ],
    ids=str,
)
def test_an_index_of_another_format_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    refused(folder, "has another format")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"format": NaN}'])
def test_an_index_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, r"package\.json (has another format|cannot be read as JSON)")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "member9.safetensors", "member0\0"])
@pytest.mark.parametrize("signed", [False, True])
def test_members_outside_the_folder_or_absent_are_refused(folder: Path, name: str, signed: bool) -> None:
    outside = folder.parent / "x"
    outside.write_bytes((folder / "member0.safetensors").read_bytes())
    checksums = json.loads((folder / INDEX).read_text())["checksums"]
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()
    edit(folder, members=[name], checksums={**checksums, name: digest} if signed else checksums)
    refused(folder, "names members|is missing or was changed")


@pytest.mark.parametrize("graphs", [["member0.onnx"], ["member1.onnx", "member0.onnx"], ["../member0.onnx"] * 2])
def test_graphs_of_other_members_are_refused(folder: Path, graphs: list[str]) -> None:
    edit(folder, graphs=graphs)
    refused(folder, "for some of its members only|are not those of|names members")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: b"garbage" * 40,
        lambda data: data[:-4],
        lambda data: data + b"more",
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"F32"', b'"XYZ"'),
        lambda data: data.replace(b'"F32"', b'"I64"'),
        lambda data: pickle.dumps(Bomb()),
    ],
    ids=["empty", "garbage", "short", "long", "huge header", "no json", "unknown type", "other type", "pickle"],
)
def test_garbage_with_the_right_checksum_is_refused(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / "member0.safetensors"
    path.write_bytes(change(path.read_bytes()))
    resign(folder, path.name)
    refused(folder, r"the weights in .* cannot be read")


def test_a_plan_edited_amiss_is_refused_though_its_checksum_fits(folder: Path) -> None:
    path = folder / "plan.json"
    path.write_text(path.read_text().replace('"task"', '"tusk"'))
    resign(folder, "plan.json")
    refused(folder, "is no sound plan: task")


def test_a_configuration_that_the_plan_has_not_is_refused(folder: Path) -> None:
    edit(folder, configuration="4d")
    refused(folder, "no configuration '4d'")

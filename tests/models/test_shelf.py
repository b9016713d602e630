"""Packages installed, found, and passed on as zips."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch

from medseg.core.errors import InputError
from medseg.models.build import build
from medseg.models.package import ModelPackage, load_package, save_package
from medseg.models.shelf import at_hand, find_package, install, installed, pack, package_files, size_of
from medseg.plan.plan import parse_plan

NETWORK = {"features": [2, 4], "kernels": [[3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [2, 2, 2]]}
PLAN = {
    "task": "Task99 Test",
    "channels": ["CT"],
    "labels": [{"name": "liver", "number": 1}],
    "normalisation": {"value": [{"channel": "CT", "kind": "zscore"}]},
    "configurations": {
        "3d": {
            "dimensions": 3,
            "spacing": {"value": [1, 1, 2]},
            "patch": {"value": [8, 8, 8]},
            "batch": {"value": 2},
            "network": {"value": NETWORK},
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


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shipped models, which is not there."""
    monkeypatch.setattr("medseg.models.shelf.shipped", lambda: tmp_path / "shipped")
    return tmp_path / "shipped"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    plan = parse_plan(PLAN, "it")
    weights = dict(build(plan.configuration("3d"), 1, 2).state_dict())
    save_package(tmp_path / "package", ModelPackage(plan, "3d", (weights,), ("a",), ("b",), {}))
    return tmp_path / "package"


def test_a_package_is_installed_under_a_name_and_found_by_it(package: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    place = install(package, models)
    assert place == models / "Task99-Test-3d"
    assert installed(models) == [place]
    assert find_package("Task99-Test-3d", models) == place
    assert find_package(package, models) == package
    assert load_package(place).digest() == load_package(package).digest()


def test_a_name_that_is_taken_or_none_is_refused(package: Path, tmp_path: Path) -> None:
    install(package, tmp_path / "models", "liver")
    with pytest.raises(InputError, match="installed as liver already"):
        install(package, tmp_path / "models", "liver")
    for name in ("../liver", "a/b", ".liver", ""):
        if name:
            with pytest.raises(InputError, match="no name for a model"):
                install(package, tmp_path / "models", name)
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["liver"]


def test_what_is_not_there_is_said_with_what_is(package: Path, tmp_path: Path) -> None:
    install(package, tmp_path / "models", "liver")
    with pytest.raises(InputError, match=r"no model package spleen.*\(liver\)"):
        find_package("spleen", tmp_path / "models")


def test_a_shipped_one_is_found_by_name_and_an_installed_one_takes_its_place(
    package: Path, shipped: Path, tmp_path: Path
) -> None:
    assert at_hand(tmp_path / "models") == {}
    install(package, shipped, "liver")
    assert find_package("liver", tmp_path / "models") == shipped / "liver"
    install(package, tmp_path / "models", "aorta")
    assert list(at_hand(tmp_path / "models")) == ["aorta", "liver"]
    place = install(package, tmp_path / "models", "liver")
    assert find_package("liver", tmp_path / "models") == place


def test_a_zip_has_the_same_bytes_each_time_and_nothing_of_others(package: Path, tmp_path: Path) -> None:
    (package / "patient.nii.gz").write_bytes(b"not for others")
    pack(package, tmp_path / "one" / "a.zip")
    pack(package, tmp_path / "two" / "a.zip")
    first, second = ((tmp_path / n / "a.zip").read_bytes() for n in ("one", "two"))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    with zipfile.ZipFile(tmp_path / "one" / "a.zip") as archive:
        assert sorted(archive.namelist()) == [f"a/{name}" for name in package_files(package)]
    place = install(tmp_path / "one" / "a.zip", tmp_path / "models")
    assert load_package(place).digest() == load_package(package).digest()
    assert size_of(place) == size_of(package)


def test_a_changed_byte_is_not_installed(package: Path, tmp_path: Path) -> None:
    pack(package, tmp_path / "a.zip")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    place = data.find(b'"task"')
    data[place + 1] ^= 1
    (tmp_path / "a.zip").write_bytes(bytes(data))
    with pytest.raises(InputError):
        install(tmp_path / "a.zip", tmp_path / "models")
    assert not installed(tmp_path / "models")


def test_a_zip_that_climbs_out_is_not_installed(package: Path, tmp_path: Path) -> None:
    pack(package, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("../outside.json", "{}")
    with pytest.raises(InputError, match="leads out"):
        install(tmp_path / "a.zip", tmp_path / "models")
    assert not (tmp_path / "outside.json").exists()


def test_an_index_that_names_a_file_elsewhere_is_not_packed(package: Path, tmp_path: Path) -> None:
    index = package / "package.json"
    index.write_text(index.read_text().replace('"plan.json":', '"../secret.json": "", "plan.json":'))
    with pytest.raises(InputError, match="no file of a package"):
        pack(package, tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.dataset.check import CheckReport, check
from medseg.dataset.split import make_folds
from medseg.dataset.task import load_task
from medseg.plan.fingerprint import fingerprint
from medseg.plan.planner import plan


def found(report: CheckReport) -> dict[str, list[tuple[str, str]]]:
    """Per case with a problem: severity and fault of each."""
    return {c.id: [(p.severity, p.fault) for p in c.problems] for c in report.cases if c.problems}


def strict(report: CheckReport) -> dict[str, Any]:
    """The report as a JSON reader would get it that knows no NaN."""
    value: dict[str, Any] = json.loads(json.dumps(report.as_json(), allow_nan=False))
    return value


def test_everything_odd_about_the_odd_hippocampi_is_found(shared_data: Path) -> None:
    report = check(shared_data / "Task04_Hippocampus_odd")
    assert not report.ok
    assert [p.severity for p in report.problems] == ["error"]
    assert "no dataset.json" in report.problems[0].fault
    problems = found(report)
    assert list(problems) == ["hippocampus_010", "hippocampus_118", "hippocampus_281"]
    assert problems["hippocampus_118"] == [("error", "imagesTr/hippocampus_118.nii.gz has no label")]
    assert problems["hippocampus_010"] == [("error", "labelsTr/hippocampus_010.nii.gz has no image")]
    assert problems["hippocampus_281"][0] == ("error", "labelsTr/hippocampus_281.nii.gz has no image")
    assert problems["hippocampus_281"][1][0] == "warning"
    assert problems["hippocampus_281"][1][1].startswith("512x512x94 voxels of 0.7344x0.7344x5 mm are unlike")
    assert strict(report)["counts"] == {"ok": 0, "warning": 0, "error": 3}


def test_the_real_hippocampi_are_all_well(shared_data: Path) -> None:
    report = check(shared_data / "Task04_Hippocampus")
    assert report.ok
    assert report.problems == ()
    assert found(report) == {}
    assert strict(report)["counts"] == {"ok": 200, "warning": 0, "error": 0}
    assert {tuple(sorted(c.labels)) for c in report.cases} == {(1, 2)}
    assert {c.channels for c in report.cases} == {1}
    assert {c.orientation for c in report.cases} == {"RAS"}


def save(path: Path, values: np.ndarray, like: Path) -> None:
    old = nib.load(like)
    image = nib.Nifti1Image(values, old.affine)
    image.set_qform(old.affine, code=1)
    image.set_sform(old.affine, code=1)
    nib.save(image, path)


def values_of(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).copy()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, tiny_task: Any) -> CheckReport:
    """The check of a task of two channels with a fault planted in every case but 000 to 002."""
    folder = tiny_task(tmp_path_factory.mktemp("faulty") / "Task51_faulty", 19, channels=("T2", "ADC"))
    image = {n: folder / f"imagesTr/blob_{n:03d}.nii.gz" for n in range(19)}
    label = {n: folder / f"labelsTr/blob_{n:03d}.nii.gz" for n in range(19)}

    image[3].unlink()
    image[4].write_bytes(image[4].read_bytes()[:-400])
    image[5].write_bytes(b"")
    label[6].unlink()
    save(label[7], values_of(label[7])[:-1], label[7])
    save(label[8], np.where(values_of(label[8]) == 2, 9, values_of(label[8])).astype(np.uint8), label[8])
    broken = values_of(image[9]).astype(np.float32)
    broken[0, 0, 0, 1] = np.nan
    save(image[9], broken, image[9])
    broken = values_of(image[10]).astype(np.float32)
    broken[1, 2, 3, 0] = -np.inf
    save(image[10], broken, image[10])
    save(image[11], values_of(image[11])[..., 0], image[11])
    save(label[12], np.zeros_like(values_of(label[12])), label[12])
    flat = values_of(image[13])
    flat[..., 1] = 7
    save(image[13], flat, image[13])
    shutil.copy(image[0], image[14])
    shutil.copy(label[0], label[14])
    label[15].write_text("not a label map")
    save(label[16], values_of(label[16]) + np.float32(0.25), label[16])
    data = bytearray(image[17].read_bytes())
    data[len(data) // 2] ^= 0xFF
    image[17].write_bytes(bytes(data))
    big = np.kron(np.ones((3, 3, 3), dtype=np.uint8), values_of(label[18]))
    save(label[18], big, label[18])
    save(image[18], np.stack([big + np.arange(big.shape[2]), -1.0 * big], -1).astype(np.int16), image[18])

    shutil.copy(image[1], folder / "imagesTr/extra.nii.gz")
    shutil.copy(label[1], folder / "labelsTr/extra.nii")
    (folder / "imagesTr/._blob_001.nii.gz").write_bytes(b"Mac")
    (folder / "imagesTr/notes.txt").write_text("no image")
    (folder / "subjects.json").write_text('{"blob_000": "a", "blob_0O1": "a"}')
    descriptor = json.loads((folder / "dataset.json").read_text())
    descriptor["labels"]["4"] = "unicorn"
    (folder / "dataset.json").write_text(json.dumps(descriptor))
    return check(folder)


@pytest.mark.parametrize(
    ("case", "severity", "fault"),
    [
        (3, "error", "imagesTr/blob_003.nii.gz is missing"),
        (4, "error", "imagesTr/blob_004.nii.gz is truncated"),
        (5, "error", "blob_005.nii.gz"),
        (6, "error", "labelsTr/blob_006.nii.gz is missing"),
        (7, "error", "differ in size"),
        (8, "error", "has the value 9, which is not listed"),
        (9, "error", "imagesTr/blob_009.nii.gz has 1 voxel that is NaN or infinite"),
        (10, "error", "1 voxel that is NaN or infinite"),
        (11, "error", "has 1 channel where dataset.json lists 2 (T2, ADC)"),
        (12, "warning", "its label map is empty"),
        (13, "warning", "channel 1 is constant"),
        (14, "warning", "its image equals that of blob_000"),
        (0, "warning", "its image equals that of blob_014"),
        (15, "error", "labelsTr/blob_015.nii.gz"),
        (16, "error", "label values that are not whole numbers"),
        (17, "error", "blob_017.nii.gz"),
        (18, "warning", "unlike the task's other cases"),
    ],
)
def test_each_planted_fault_is_found_at_its_case(faulty: CheckReport, case: int, severity: str, fault: str) -> None:
    problems = found(faulty)[f"blob_{case:03d}"]
    assert len(problems) == 1
    assert problems[0][0] == severity
    assert fault in problems[0][1]


def test_nothing_is_found_where_nothing_was_planted(faulty: CheckReport) -> None:
    assert sorted(set(found(faulty))) == [f"blob_{n:03d}" for n in range(19) if n not in (1, 2)]
    sound = next(c for c in faulty.cases if c.id == "blob_001")
    assert (sound.verdict, sound.channels, sound.orientation) == ("ok", 2, "RAS")
    assert sound.spacing == (1.0, 1.0, 2.0)
    assert set(sound.labels) == {1, 2}


def test_what_is_wrong_with_the_folder_is_found(faulty: CheckReport) -> None:
    assert not faulty.ok
    assert [(p.severity, p.fault) for p in faulty.problems] == [
        ("warning", "2 files are not listed in dataset.json (imagesTr/extra.nii.gz, labelsTr/extra.nii)"),
        ("warning", "subjects.json names 1 case that dataset.json does not (blob_0O1)"),
        # No word on the label 4 unicorn: it may be in a case that could not be read.
    ]


def test_the_report_is_plain_json_and_every_problem_has_a_remedy(faulty: CheckReport) -> None:
    value = strict(faulty)
    assert value["format"] == 1
    assert value["ok"] is False
    assert value["counts"] == {"ok": 2, "warning": 5, "error": 12}
    problems = [*value["problems"], *(p for case in value["cases"] for p in case["problems"])]
    assert all(p["fault"] and p["remedy"] for p in problems)
    row = next(case for case in value["cases"] if case["id"] == "blob_007")
    assert row["verdict"] == "error"
    assert row["shape"]


def test_warnings_alone_leave_a_task_ok(tmp_path: Path, tiny_task: Any) -> None:
    folder = tiny_task(tmp_path / "Task50_blobs", 3)
    path = folder / "labelsTr/blob_002.nii.gz"
    save(path, np.zeros_like(values_of(path)), path)
    report = check(folder)
    assert report.ok
    assert [c.verdict for c in report.cases] == ["ok", "ok", "warning"]


@pytest.mark.parametrize("spoil", ["empty", "one subject", "twins", "unicorn"])
def test_what_cannot_be_planned_is_no_fit_task(tmp_path: Path, tiny_task: Any, spoil: str) -> None:
    folder = tiny_task(tmp_path / "Task50_blobs", 5)
    if spoil == "empty":
        for path in (folder / "labelsTr").iterdir():
            save(path, np.zeros_like(values_of(path)), path)
    if spoil == "one subject":
        (folder / "subjects.json").write_text(json.dumps({f"blob_00{n}": "anna" for n in range(5)}))
    if spoil == "twins":
        for n in range(1, 5):
            for kind in ("imagesTr", "labelsTr"):
                shutil.copy(folder / kind / "blob_000.nii.gz", folder / kind / f"blob_00{n}.nii.gz")
    if spoil == "unicorn":
        descriptor = json.loads((folder / "dataset.json").read_text())
        descriptor["labels"]["4"] = "unicorn"
        (folder / "dataset.json").write_text(json.dumps(descriptor))
    report = check(folder)
    task = load_task(folder)

    def planned() -> None:
        measured = fingerprint(task)
        make_folds(task, duplicates=measured.duplicates)
        plan(measured, task.labels)

    with pytest.raises(InputError) as refused:
        planned()
    (problem,) = report.problems
    assert not report.ok
    assert problem.severity == "error"
    assert refused.value.fault.replace(" of Task50_blobs", "") == problem.fault.replace(" of Task50_blobs", "")


@pytest.mark.parametrize(("cases", "few"), [(4, True), (5, False)])
def test_few_subjects_are_told(tmp_path: Path, tiny_task: Any, cases: int, few: bool) -> None:
    report = check(tiny_task(tmp_path / "Task50_blobs", cases))
    assert report.ok
    assert [p.fault.startswith("4 subjects are few") for p in report.problems] == [True] * few


def unlisted(folder: Path) -> Path:
    descriptor = json.loads((folder / "dataset.json").read_text())
    del descriptor["training"]
    (folder / "dataset.json").write_text(json.dumps(descriptor))
    return folder


def test_what_is_wrong_with_the_layout_is_told_once(tmp_path: Path, tiny_task: Any) -> None:
    folder = unlisted(tiny_task(tmp_path / "Task50_blobs", 5))
    (folder / "labelsTr/blob_001.nii.gz").rename(folder / "labelsTr/blob_001_seg.nii.gz")
    (folder / "labelsTr/blob_002.nii.gz").unlink()
    (folder / "imagesTr/blob_003.nii.gz").unlink()
    report = check(folder)
    assert report.problems == ()
    assert [(case, len(problems)) for case, problems in found(report).items()] == [
        ("blob_001", 1), ("blob_002", 1), ("blob_003", 1)
    ]  # fmt: skip
    assert len(report.cases) == 5
    for path in (folder / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    assert "nnU-Net's names for 2 cases, like blob_000_0000.nii.gz" in check(folder).problems[0].fault
    shutil.rmtree(folder / "labelsTr")
    report = check(folder)
    assert [p.fault for p in report.problems] == [f"there is no folder {folder / 'labelsTr'}"]
    assert found(report) == {}


def test_counts_and_volumes_are_what_numpy_counts(tmp_path: Path, tiny_task: Any) -> None:
    folder = tiny_task(tmp_path / "Task50_blobs", 1)
    values = values_of(folder / "labelsTr/blob_000.nii.gz")
    row = check(folder).cases[0]
    assert row.shape == values.shape
    assert row.labels == {1: int((values == 1).sum()), 2: int((values == 2).sum())}


def test_a_broken_descriptor_does_not_hide_what_is_wrong_with_the_cases(tmp_path: Path, tiny_task: Any) -> None:
    folder = tiny_task(tmp_path / "Task50_blobs", 3)
    (folder / "dataset.json").write_text("{")
    (folder / "labelsTr/blob_001.nii.gz").unlink()
    (folder / "imagesTr/blob_002.nii.gz").write_bytes(b"")
    report = check(folder)
    assert "cannot be read as JSON" in report.problems[0].fault
    assert list(found(report)) == ["blob_001", "blob_002"]


def test_progress_sees_every_row(tmp_path: Path, tiny_task: Any) -> None:
    seen: list[Any] = []

    def progress(rows: Iterable[Any], count: int) -> Iterable[Any]:
        seen.append(count)
        for row in rows:
            seen.append(row.id)
            yield row

    check(tiny_task(tmp_path / "Task50_blobs", 3), progress=progress)
    assert seen == [3, "blob_000", "blob_001", "blob_002"]


def test_nothing_like_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no dataset\.json"):
        check(tmp_path)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.dataset.check import check
from medseg.dataset.task import Case, load_case, load_image, load_instances, load_labels, load_task

LIVER: dict[str, Any] = {
    "name": "Liver",
    "description": "Liver and tumour",
    "licence": "CC-BY-SA 4.0",
    "relase": "1.0 06/08/2018",
    "tensorImageSize": "3D",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "7": "cancer"},
    "numTraining": 2,
    "numTest": 2,
    "training": [
        {"image": "./imagesTr/liver_0.nii.gz", "label": "./labelsTr/liver_0.nii.gz"},
        {"image": "./imagesTr/liver_1.nii.gz", "label": "./labelsTr/liver_1.nii.gz"},
    ],
    "test": ["./imagesTs/liver_2.nii.gz", {"image": "./imagesTs/liver_3.nii.gz"}],
}


def described(folder: Path, **changes: Any) -> Path:
    """A folder with LIVER's descriptor, changed; a value of None takes the key away."""
    folder.mkdir(exist_ok=True)
    value = {k: v for k, v in {**LIVER, **changes}.items() if v is not None}
    (folder / "dataset.json").write_text(json.dumps(value))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_task(folder)
    assert caught.value.fault
    assert caught.value.remedy
    return str(caught.value)


# ---- descriptors that are sound -----------------------------------------------------------------


def test_the_decathlons_own_descriptor_is_read_misspelt_keys_and_all(shared_data: Path) -> None:
    task = load_task(shared_data / "msd-prostate-mask00")
    assert task.name == "msd-prostate-mask00"
    assert task.title == "PROSTATE"
    assert task.licence == "CC-BY-SA 4.0"
    assert task.channels == ("T2", "ADC")
    assert [(label.number, label.name) for label in task.labels] == [(1, "PZ"), (2, "TZ")]
    assert (len(task.cases), len(task.test)) == (32, 16)
    assert task.cases[0].id == "prostate_16"
    assert task.cases[0].image == shared_data / "msd-prostate-mask00/imagesTr/prostate_16.nii.gz"
    assert task.cases[0].label == shared_data / "msd-prostate-mask00/labelsTr/prostate_16.nii.gz"
    assert task.test[0] == Case("prostate_08", task.folder / "imagesTs/prostate_08.nii.gz", None, "prostate_08")


def test_labels_need_not_be_consecutive_and_test_entries_may_be_strings_or_objects(tmp_path: Path) -> None:
    task = load_task(described(tmp_path / "Task03_Liver"))
    assert task.labels.numbers == (1, 7)
    assert task.labels.name_of(7) == "cancer"
    assert [case.id for case in task.test] == ["liver_2", "liver_3"]
    assert all(case.label is None for case in task.test)
    assert task.case("liver_3") is task.test[1]


def paired(folder: Path, images: list[str], labels: list[str]) -> Path:
    """A task that lists no cases, with such files."""
    described(folder, training=None, test=None)
    for place, names in (("imagesTr", images), ("labelsTr", labels)):
        (folder / place).mkdir()
        for name in names:
            (folder / place / name).touch()
    return folder


def test_where_no_cases_are_listed_they_are_the_files_of_the_folders(tmp_path: Path) -> None:
    files = ["b.nii.gz", "a.nii", "._b.nii.gz", "notes.txt"]
    task = load_task(paired(tmp_path / "t", files, ["a.nii.gz", "b.nii.gz"]))
    assert [(c.id, c.image.name, c.label.name if c.label else "") for c in task.cases] == [
        ("a", "a.nii", "a.nii.gz"),
        ("b", "b.nii.gz", "b.nii.gz"),
    ]


@pytest.mark.parametrize(
    ("images", "labels", "told"),
    [
        (["a.nii.gz", "b.nii.gz"], ["a.nii.gz"], "case b: imagesTr/b.nii.gz has no label. Put it at labelsTr/b.nii.gz"),
        (["a.nii.gz"], ["a.nii.gz", "c.nii.gz"], "case c: labelsTr/c.nii.gz has no image. Put it at imagesTr/c.nii.gz"),
        (["a.nii.gz", "a.nii"], ["a.nii"], "packed and unpacked"),
        ([], ["a.nii"], "imagesTr holds no NIfTI file"),
        (["a.nii", "b.nii"], [], "labelsTr holds no NIfTI file"),
        (["a.nii", "b.nii", "c.nii"], ["c.nii"], "a.nii has no label (`medseg check` tells 1 fault more)"),
        (
            ["a_3.nii"],
            ["a_3_seg.nii"],
            "labelsTr/a_3_seg.nii may be it. Give both the same name, like labelsTr/a_3.nii",
        ),
        (["a_3.nii"], ["a_31.nii"], "imagesTr/a_3.nii has no label"),
        (["a_0000.nii"], ["a.nii"], "nnU-Net's names for 1 case, like a_0000.nii for a. Take _0000 off"),
        (["a_0000.nii", "a_0001.nii"], ["a.nii"], "Put the channels of each case into one 4-D file"),
    ],
)
def test_files_that_are_no_pairs_are_refused(tmp_path: Path, images: list[str], labels: list[str], told: str) -> None:
    assert told in refusal(paired(tmp_path / "t", images, labels))


@pytest.mark.parametrize("spelling", ["licence", "license"])
def test_both_spellings_of_the_licence(tmp_path: Path, spelling: str) -> None:
    changes: dict[str, Any] = {"licence": None, spelling: "CC0"}
    assert load_task(described(tmp_path / "t", **changes)).licence == "CC0"


@pytest.mark.parametrize("spelling", ["release", "relase"])
def test_what_the_owner_says_is_one_short_line(tmp_path: Path, spelling: str) -> None:
    long = "a\n\n# b\x00\u202e\ud800 " + 10**6 * "c"
    task = load_task(
        described(tmp_path / "t", reference="A clinic", **{spelling: 1.5}, description=long, licence=["x"])
    )
    assert (task.reference, task.release, task.licence) == ("A clinic", "1.5", "['x']")
    assert task.description.startswith("a # b ccc")
    assert (len(task.description), task.description[-1]) == (300, "…")


def test_no_test_cases_and_no_words_are_fine(tmp_path: Path) -> None:
    task = load_task(described(tmp_path / "Task03_Liver", test=None, name=None, description=None, licence=None))
    assert task.test == ()
    assert (task.title, task.description, task.licence) == ("Task03_Liver", "", "")


def test_channels_come_in_the_order_of_their_numbers_not_of_the_file(tmp_path: Path) -> None:
    modality = {str(n): f"channel {n}" for n in (2, 10, 0, 1, 9, 3, 8, 4, 7, 5, 6)}
    assert load_task(described(tmp_path / "t", modality=modality)).channels == tuple(f"channel {n}" for n in range(11))


def test_a_case_is_found_by_its_id_and_a_wrong_id_is_refused(tmp_path: Path) -> None:
    task = load_task(described(tmp_path / "Task03_Liver"))
    assert task.case("liver_1") is task.cases[1]
    with pytest.raises(InputError, match="Task03_Liver has no case liver_9"):
        task.case("liver_9")


# ---- who is who ---------------------------------------------------------------------------------


def test_every_case_is_a_subject_of_its_own_unless_subjects_json_says_otherwise(tmp_path: Path) -> None:
    folder = described(tmp_path / "t")
    assert [case.subject for case in load_task(folder).cases] == ["liver_0", "liver_1"]
    (folder / "subjects.json").write_text('{"liver_0": "anna", "liver_2": "anna", "liver_1": 5}')
    task = load_task(folder)
    assert [case.subject for case in (*task.cases, *task.test)] == ["anna", "5", "anna", "liver_3"]


@pytest.mark.parametrize("text", ["[]", '{"liver_0": ["anna"]}', '{"liver_0": null}', "{", '{"liver_0": NaN}'])
def test_a_strange_subjects_json_is_refused(tmp_path: Path, text: str) -> None:
    folder = described(tmp_path / "t")
    (folder / "subjects.json").write_text(text)
    assert "subjects.json" in refusal(folder)


def test_in_the_hippocampus_task_2k_minus_1_and_2k_are_one_subject(tmp_path: Path) -> None:
    training = [
        {"image": f"imagesTr/hippocampus_{n:03d}.nii.gz", "label": f"labelsTr/hippocampus_{n:03d}.nii.gz"}
        for n in (1, 2, 3, 4, 5, 394)
    ]
    folder = described(tmp_path / "t", name="Hippocampus", training=training)
    assert [case.subject[-3:] for case in load_task(folder).cases] == ["001", "001", "002", "002", "003", "197"]
    (folder / "subjects.json").write_text('{"hippocampus_002": "another"}')
    assert load_task(folder).cases[1].subject == "another"
    other = described(tmp_path / "u", name="Amygdala", training=training)
    assert len({case.subject for case in load_task(other).cases}) == 6


def test_the_real_hippocampus_task_has_fewer_subjects_than_cases(shared_data: Path) -> None:
    task = load_task(shared_data / "Task04_Hippocampus")
    subjects = {case.subject for case in task.cases}
    assert len(task.cases) == 200
    assert len(subjects) < 200
    for case in task.cases:
        assert case.subject == f"subject_{(int(case.id[-3:]) + 1) // 2:03d}"


# ---- descriptors that are not -------------------------------------------------------------------


def test_no_folder_no_descriptor(tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "nowhere")
    assert "has no dataset.json" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["modality", "labels", "training"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    assert repr(key) in refusal(described(tmp_path / "t", **{key: None}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"modality": ["CT"]}, "'modality' in dataset.json is not numbered"),
        ({"modality": {"CT": "0"}}, "'modality' in dataset.json is not numbered"),
        ({"modality": {}}, "numbered []"),
        ({"modality": {"1": "CT"}}, "numbered [1]"),
        ({"modality": {"0": "T1", "2": "T2"}}, "numbered [0, 2]"),
        ({"modality": {"0": None}}, "channel 0 has no name"),
        ({"labels": {"background": 0, "liver": 1}}, "'labels' in dataset.json is not numbered"),
        ({"labels": {"0": "background", "1": ["liver", 1]}}, "label 1 has no name"),
        ({"labels": {"0": "background", "1": "liver", "01": "cancer"}}, "a number twice"),
        ({"labels": {"0": "background", "1": "liver", "2": "liver"}}, "name liver comes twice"),
        ({"labels": {"0": "background", "-1": "liver"}}, "number -1"),
        ({"labels": {"0": "background", "65536": "liver"}}, "number 65536"),
        ({"labels": {"0": "background", "9" * 5000: "liver"}}, "not numbered"),
        ({"labels": {"0": "background"}}, "no label but the background"),
        ({"training": {}}, "no list 'training'"),
        ({"training": 3}, "no list 'training'"),
        ({"training": []}, "no training case"),
        ({"labels": {"0": "", "1": "liver", "2": " "}}, "label 2 has no name"),
        ({"training": [7]}, "entry 1 of 'training' in dataset.json has no 'image'"),
        ({"training": ["imagesTr/a.nii.gz"]}, "(imagesTr/a.nii.gz) has no 'label'"),
        ({"training": [{"image": "imagesTr/a.nii.gz"}]}, "(imagesTr/a.nii.gz) has no 'label'"),
        ({"training": [{"image": "", "label": "labelsTr/a.nii.gz"}]}, "has no 'image'"),
        ({"training": [{"image": ["imagesTr/a.nii.gz"], "label": "labelsTr/a.nii.gz"}]}, "has no 'image'"),
        ({"training": [*LIVER["training"], {"image": "a.nii", "lable": "b.nii"}]}, "entry 3 of 'training'"),
        ({"training": [{"image": "a.nii", "lable": "b.nii"}]}, "Rename 'lable' to 'label'"),
        ({"labels": None, "lables": LIVER["labels"]}, "Rename 'lables' to 'labels'"),
        ({"test": {"0": "imagesTs/a.nii.gz"}}, "no list 'test'"),
        ({"test": [None]}, "entry 1 of 'test' in dataset.json has no 'image'"),
    ],
)
def test_what_is_of_the_wrong_kind_is_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    assert word in refusal(described(tmp_path / "t", **changes))


def test_a_case_that_comes_twice_is_refused_even_from_another_folder(tmp_path: Path) -> None:
    again = {"image": "more/liver_1.nii", "label": "more/labels/liver_1.nii"}
    assert "lists liver_1 twice" in refusal(described(tmp_path / "t", training=[*LIVER["training"], again]))


@pytest.mark.parametrize(
    "path", ["../imagesTr/a.nii.gz", "imagesTr/../../a.nii.gz", "imagesTr/..", "/etc/passwd", "//etc/passwd"]
)
@pytest.mark.parametrize("where", ["image", "label", "test"])
def test_paths_that_lead_out_are_refused(tmp_path: Path, path: str, where: str) -> None:
    case = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    changes: dict[str, Any] = {"test": [path]} if where == "test" else {"training": [{**case, where: path}]}
    assert "outside its folder" in refusal(described(tmp_path / "t", **changes))


@pytest.mark.parametrize("name", ["imagesTr/a\0.nii.gz", "imagesTr/a\nb.nii.gz", "imagesTr/\ud800.nii.gz"])
def test_names_that_no_table_or_file_system_holds_are_refused(tmp_path: Path, name: str) -> None:
    text = refusal(described(tmp_path / "t", test=[name]))
    assert "Rename it" in text
    assert text.encode().decode().isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '"dataset"',
        "[" * 100_000,
        '{"labels":' * 50_000,
        '{"modality": {"0": "CT"}, "labels": NaN}',
        '{"modality": {"0": "CT"}, "labels": Infinity}',
        '{"modality": {"0": "CT"}, "labels": 1' + "0" * 10_000 + "}",
        "\ufeff{}",
        "\x00\x01",
    ],
)
def test_hostile_json_is_refused_and_nothing_worse(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    assert len(refusal(tmp_path)) < 1000


def test_json_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_bytes(b'{"name": "\xff\xfe"}')
    assert "dataset.json" in refusal(tmp_path)


def test_a_very_long_list_of_cases_is_read_soon(tmp_path: Path) -> None:
    training = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in range(20_000)]
    assert len(load_task(described(tmp_path / "t", training=training)).cases) == 20_000


# ---- cases --------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    old = nib.load(path)
    values, affine = change(np.asarray(old.dataobj), old.affine.copy())
    image = nib.Nifti1Image(values, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    path.unlink()
    nib.save(image, path)


def moved(by: float) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    return lambda values, affine: (values, affine + by * np.eye(4)[:, [3, 0, 1, 2]] * (np.arange(4) == 3))


def test_a_sound_case(tmp_path: Path, tiny_task: Any) -> None:
    task = load_task(tiny_task(tmp_path / "Task50_blobs", 1, channels=("T2", "ADC"), unlabelled=1))
    volume, labels = load_case(task, task.cases[0])
    stored = nib.load(task.cases[0].image)
    assert volume.channels == 2
    assert np.array_equal(volume.values[1], np.asarray(stored.dataobj)[..., 1])
    assert labels.labels == task.labels
    assert set(np.unique(labels.values)) == {0, 1, 2}
    assert load_image(task, task.test[0]).channels == 2
    with pytest.raises(InputError, match="case blob_001: it has no label"):
        load_labels(task, task.test[0])


def test_the_real_two_channel_task_takes_a_four_dimensional_image_only(shared_data: Path, tmp_path: Path) -> None:
    mask = nib.load(shared_data / "msd-prostate-mask00/mask_00.nii")
    official = json.loads((shared_data / "msd-prostate-mask00/dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(official))
    values = np.asarray(mask.dataobj)
    for folder, array in (("imagesTr", np.stack([values * 3.0, values + 1.0], -1)), ("labelsTr", values)):
        (tmp_path / folder).mkdir()
        image = nib.Nifti1Image(array.astype(np.float32), mask.affine, mask.header)
        image.set_data_dtype(np.float32)
        nib.save(image, tmp_path / folder / "p.nii.gz")
    task = load_task(tmp_path)
    case = Case("prostate_00", tmp_path / "imagesTr/p.nii.gz", tmp_path / "labelsTr/p.nii.gz", "prostate_00")
    volume, labels = load_case(task, case)
    assert volume.channels == 2
    assert np.array_equal(volume.values[0], labels.values * 3.0)
    assert labels.values.any()
    with pytest.raises(InputError, match=r"case prostate_00: labelsTr/p.nii.gz has 1 channel .* lists 2 \(T2, ADC\)"):
        load_case(task, Case("prostate_00", case.label or case.image, case.label, "prostate_00"))


@pytest.mark.parametrize(
    ("which", "change", "fault"),
    [
        ("imagesTr", lambda v, a: (np.stack([v, v], -1), a), "has 2 channels where dataset.json lists 1 (CT)"),
        (
            "imagesTr",
            lambda v, a: (np.where(v == v.max(), np.nan, v).astype(np.float32), a),
            "that are NaN or infinite",
        ),
        ("imagesTr", lambda v, a: (v[:-1], a), "differ in size"),
        ("labelsTr", lambda v, a: (v[..., :-2], a), "differ in size"),
        ("labelsTr", moved(0.3), "lie 0.3 mm apart (allowed: 0.05 mm)"),
        ("labelsTr", lambda v, a: (v, a @ np.diag([1, 1, 1.5, 1])), "mm apart"),
        ("labelsTr", lambda v, a: (np.where(v == 2, 3, v).astype(np.uint8), a), "has the value 3, which is not listed"),
        ("labelsTr", lambda v, a: (v.astype(np.float32) / 2, a), "not whole numbers"),
        ("labelsTr", lambda v, a: (np.stack([v, v], -1), a), "has 2 channels"),
    ],
)
def test_a_case_amiss_is_refused_by_name(tmp_path: Path, tiny_task: Any, which: str, change: Any, fault: str) -> None:
    task = load_task(tiny_task(tmp_path / "Task50_blobs", 2))
    rewrite(tmp_path / "Task50_blobs" / which / "blob_001.nii.gz", change)
    load_case(task, task.cases[0])
    with pytest.raises(InputError) as caught:
        load_case(task, task.cases[1])
    assert str(caught.value).startswith("case blob_001: ")
    assert fault in caught.value.fault
    assert caught.value.case == "blob_001"
    assert caught.value.remedy


def test_rounding_of_an_affine_is_no_other_grid(tmp_path: Path, tiny_task: Any) -> None:
    task = load_task(tiny_task(tmp_path / "Task50_blobs", 1))
    rewrite(tmp_path / "Task50_blobs/labelsTr/blob_000.nii.gz", moved(0.02))
    load_case(task, task.cases[0])


@pytest.mark.parametrize("which", ["imagesTr", "labelsTr"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, tiny_task: Any, which: str) -> None:
    task = load_task(tiny_task(tmp_path / "Task50_blobs", 1))
    (tmp_path / "Task50_blobs" / which / "blob_000.nii.gz").unlink()
    with pytest.raises(InputError, match=rf"case blob_000: {which}/blob_000.nii.gz is missing\. Put the file"):
        load_case(task, task.cases[0])


# ---- instances ----------------------------------------------------------------------------------


@pytest.fixture
def numbered(tiny_task: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A task whose two blobs are the instances 1 and 2 of each case, and the first case's file of these."""
    folder = tiny_task(tmp_path / "Task00_blobs", 3)
    (folder / "instancesTr").mkdir()
    for path in (folder / "labelsTr").glob("*.nii.gz"):
        (folder / "instancesTr" / path.name).write_bytes(path.read_bytes())
    return folder, sorted((folder / "instancesTr").iterdir())[0]


def rewritten(path: Path, change: Callable[[Any], Any]) -> None:
    old = nib.load(path)
    values = change(np.asarray(old.dataobj).astype(np.int32))
    nib.save(nib.Nifti1Image(values, old.affine, old.header, dtype=np.int32), path)


def test_instances_are_those_of_the_file_and_have_their_voxels_label(numbered: tuple[Path, Path]) -> None:
    folder, path = numbered

    def change(values: Any) -> Any:
        values[values == 1] = 40  # as numbers go, 2 may be left out, and so may voxels
        values[values == 2] = 0
        return values

    rewritten(path, change)
    task = load_task(folder)
    found, labels = load_instances(task, task.cases[0]), load_labels(task, task.cases[0])
    assert [(one.number, one.label, one.score) for one in found.instances] == [(40, 1, 1.0)]
    assert ((found.values == 40) == (labels.values == 1)).all()
    assert [one.label for one in load_instances(task, task.cases[1]).instances] == [1, 2]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda v: np.where(v == 0, 3, v), "instance 3 lies on the background. Let each lie on one label"),
        (lambda v: np.minimum(v, 1), "instance 1 lies on left blob and right blob"),
        (lambda v: np.ones_like(v), "instance 1 lies on the background"),
        (lambda v: -v, "instancesTr/blob_000.nii.gz has the number -2. Number from 1"),
        (lambda v: v * 70_000, "has the number 140000"),
        (lambda v: v[:-1], "its instances and labels are not on one grid. Number the voxels of the labels"),
    ],
)
def test_instances_that_are_not_sound_are_refused_by_case(
    numbered: tuple[Path, Path], change: Callable[[Any], Any], fault: str
) -> None:
    folder, path = numbered
    rewritten(path, change)
    task = load_task(folder)
    with pytest.raises(InputError) as caught:
        load_instances(task, task.cases[0])
    assert str(caught.value).startswith("case blob_000: ")
    assert fault in str(caught.value)
    row = check(folder).cases[0]
    assert [p.severity for p in row.problems] == ["error"]
    assert fault in str(row.problems[0])


def test_missing_instances_are_refused_by_case(numbered: tuple[Path, Path]) -> None:
    folder, path = numbered
    path.unlink()
    task = load_task(folder)
    with pytest.raises(InputError, match=r"case blob_000: instancesTr/blob_000.nii.gz is missing"):
        load_instances(task, task.cases[0])
    plain = Case("x", task.cases[0].image, task.cases[0].label, "x")
    with pytest.raises(InputError, match="case x: it has no instances"):
        load_instances(task, plain)

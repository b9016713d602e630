"""A scan like those trained on gives no word; one of another kind is told, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.volume import Volume
from medseg.dataset.phantom import phantom
from medseg.dataset.split import make_folds
from medseg.dataset.task import Task, load_image, load_task
from medseg.io.nifti import read_volume
from medseg.io.scan import read_scan
from medseg.models.experience import Experience, compare, experience, modality_of, refuse_gross
from medseg.plan.fingerprint import fingerprint

TASKS = ("abdomen", "brain", "prostate")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("phantoms")
    return {name: load_task(phantom(folder, name, cases=12)) for name in TASKS}


@pytest.fixture(scope="module")
def seen(tasks: dict[str, Task]) -> dict[str, Experience]:
    """Of the first nine cases of each."""
    found = {}
    for name, task in tasks.items():
        found[name] = experience(fingerprint(task), [c.id for c in task.cases[:9]], task.labels)
    return found


@pytest.fixture(scope="module")
def hippocampi(shared_data: Path) -> Task:
    if not (shared_data / "Task04_Hippocampus").is_dir():
        pytest.skip("no Task04 beside this repository")
    return load_task(shared_data / "Task04_Hippocampus")


@pytest.fixture(scope="module")
def hippocampi_seen(hippocampi: Task) -> Experience:
    return experience(fingerprint(hippocampi), [c.id for c in hippocampi.cases], hippocampi.labels)


def severities(found: Any) -> list[str]:
    return [m.severity for m in found]


@pytest.mark.parametrize("name", TASKS)
def test_quiet_on_phantoms_not_trained_on(tasks: dict[str, Task], seen: dict[str, Experience], name: str) -> None:
    for case in tasks[name].cases[9:]:
        assert compare(load_image(tasks[name], case), seen[name]) == ()


def test_quiet_on_every_held_out_hippocampus(hippocampi: Task) -> None:
    measured = fingerprint(hippocampi)
    for fold in make_folds(hippocampi, 5, seed=0):
        trained = experience(measured, fold.train, hippocampi.labels)
        assert trained.cases == len(fold.train)
        assert trained.channels[0].modality == "MR"
        for case in fold.validation:
            assert compare(load_image(hippocampi, hippocampi.case(case)), trained) == ()


CTS = (
    "totalsegmentator-reference/example_ct.nii.gz",
    "totalsegmentator-reference/example_ct_sm.nii.gz",
    "totalsegmentator-reference/ct_cropped_aorta_1p5mm.nii.gz",
    "totalsegmentator-reference/example_ct_dicom",
    "msd-spleen2-crop/sub-spleen2_ct.nii.gz",
)
MRS = (
    "totalsegmentator-reference/example_mr_sm.nii.gz",
    "sct-spinalcord-mr/t1/t1w.nii.gz",
    "sct-spinalcord-mr/t2/t2.nii.gz",
    "sct-spinalcord-mr/t2s/t2s_uncropped.nii.gz",
    "ivadomed-spine-mr/sub-unf01/anat/sub-unf01_T1w.nii.gz",
    "nrrd-pyradiomics/prostate_phantom_subvolume.nrrd",
    "nrrd-pyradiomics/brain1_image.nrrd",
    "Task04_Hippocampus/imagesTr/hippocampus_044.nii.gz",
)


def real(shared_data: Path, name: str) -> Volume:
    if not (shared_data / name).exists():
        pytest.skip(f"{name} is not there")
    return read_scan(shared_data / name)[0]


@pytest.mark.parametrize("name", CTS)
def test_a_real_ct_is_refused_by_an_mr_model_and_taken_by_a_ct_model(
    shared_data: Path, hippocampi_seen: Experience, seen: dict[str, Experience], name: str
) -> None:
    volume = real(shared_data, name)
    found = compare(volume, hippocampi_seen)
    assert severities(found)[0] == "gross"
    with pytest.raises(InputError, match=r"CT.*the model was trained on MR.*--force"):
        refuse_gross(found)
    assert "gross" not in severities(compare(volume, seen["abdomen"]))


@pytest.mark.parametrize("name", MRS)
def test_a_real_mr_is_refused_by_a_ct_model_and_taken_by_an_mr_model(
    shared_data: Path, hippocampi_seen: Experience, seen: dict[str, Experience], name: str
) -> None:
    volume = real(shared_data, name)
    with pytest.raises(InputError, match=r"no air or fat in Hounsfield units.*trained on CT.*--force"):
        refuse_gross(compare(volume, seen["abdomen"]))
    refuse_gross(compare(volume, hippocampi_seen))


def abdomen(tasks: dict[str, Task]) -> Volume:
    return load_image(tasks["abdomen"], tasks["abdomen"].cases[10])


def test_a_ct_that_lost_its_offset(tasks: dict[str, Task], seen: dict[str, Experience]) -> None:
    volume = abdomen(tasks)
    (found,) = compare(Volume(volume.values + 1024, volume.grid), seen["abdomen"])
    assert (found.severity, found.what) == ("gross", "intensities of channel CT")
    assert "CT that lost its offset" in str(found)
    (found,) = compare(Volume(volume.values * 20.0 + 7000, volume.grid), seen["abdomen"])
    assert found.severity == "gross"


def test_dicom_has_the_last_word_on_modality(tasks: dict[str, Task], seen: dict[str, Experience]) -> None:
    volume = abdomen(tasks)
    for known in (Volume(volume.values, volume.grid, "CT"), Volume(volume.values, volume.grid, "OT"), volume):
        assert compare(known, seen["abdomen"]) == ()
    (found,) = compare(Volume(volume.values, volume.grid, "MR"), seen["abdomen"])
    assert (found.found, found.trained, found.severity) == ("MR", "CT", "gross")
    assert compare(volume, seen["abdomen"], "PT")[0].found == "PT"
    brain = load_image(tasks["brain"], tasks["brain"].cases[10])
    below = Volume(brain.values * 1.0 - 500, brain.grid)
    assert severities(compare(below, seen["brain"]))[0] == "gross"
    assert "gross" not in severities(compare(below, seen["brain"], "MR"))


def test_spacing_field_of_view_and_axes(tasks: dict[str, Task], seen: dict[str, Experience]) -> None:
    volume, trained = abdomen(tasks), seen["abdomen"]
    scaled = Grid(volume.grid.shape, volume.grid.affine @ np.diag([3.0, 3, 3, 1]))
    found = compare(Volume(volume.values, scaled), trained)
    assert [m.what for m in found] == ["spacing", "field of view"]
    assert severities(found) == ["warning", "warning"]
    assert str(found[0]).startswith("spacing: ")
    assert "the model was trained on (" in str(found[0])
    order = volume.grid.affine[:, [2, 0, 1, 3]]
    shape = volume.grid.shape
    moved = Volume(volume.values.transpose(0, 3, 1, 2), Grid((shape[2], shape[0], shape[1]), order))
    (note,) = compare(moved, trained)
    assert (note.what, note.severity) == ("axes", "note")


def test_another_distribution_is_a_warning(tasks: dict[str, Task], seen: dict[str, Experience]) -> None:
    task, trained = tasks["prostate"], seen["prostate"]
    volume = load_image(task, task.cases[10])
    for scale, offset in ((1, 0), (300, 0), (0.01, 0), (1, 50)):  # MR has no unit
        assert compare(Volume(volume.values * np.float64(scale) + offset, volume.grid), trained) == ()
    inverted = Volume(float(volume.values.max()) - volume.values, volume.grid)
    (found,) = compare(inverted, trained)
    assert found.severity == "warning"
    assert found.what.startswith("intensities of channel ADC")
    masked = volume.values.copy()
    masked[:, : masked.shape[1] * 3 // 4] = 0
    assert "zero voxels of channel T2" in [m.what for m in compare(Volume(masked, volume.grid), trained)]


def test_a_constant_scan_and_single_slices_are_compared(seen: dict[str, Experience]) -> None:
    for shape in ((1, 1, 1), (5, 4, 1)):
        for level in (0, -1000, 40):
            volume = Volume(np.full((1, *shape), level, dtype=np.int16), Grid.from_spacing(shape, 1.0))
            assert compare(volume, seen["abdomen"])


def test_other_channels_are_refused(tasks: dict[str, Task], seen: dict[str, Experience]) -> None:
    with pytest.raises(InputError, match=r"has 1 channels, the model takes 4 \(FLAIR, T1w, T1gd, T2w\)"):
        compare(abdomen(tasks), seen["brain"])


def test_experience_is_the_range_over_its_cases(tmp_path: Path, tiny_task: Callable[..., Path]) -> None:
    task = load_task(tiny_task(tmp_path / "Task01_blobs", 5))
    measured = fingerprint(task)
    trained = experience(measured, ["blob_001", "blob_003"], task.labels)
    rows = [row for row in measured.cases if row.id in ("blob_001", "blob_003")]
    assert trained.cases == 2
    assert trained.orientations == ("RAS",)
    assert [(r.low, r.high) for r in trained.spacing] == [(1, 1), (1, 1), (2, 2)]
    for axis in range(3):
        sizes = [row.shape[axis] * row.spacing[axis] for row in rows]
        assert (trained.extent[axis].low, trained.extent[axis].high) == (min(sizes), max(sizes))
    for one, label in zip(trained.structures, task.labels, strict=True):
        volumes = [row.label_mm3[label.number] for row in rows]
        assert one.mm3 is not None
        assert (one.name, one.cases, one.mm3.low, one.mm3.high) == (label.name, 2, min(volumes), max(volumes))
    for number, point in enumerate(trained.channels[0].percentiles):
        values = [row.channels[0].percentiles[number] for row in rows]
        assert (point.low, point.high) == (min(values), max(values))
    assert Experience.model_validate_json(trained.model_dump_json()) == trained
    with pytest.raises(InputError, match="has no case blob_009"):
        experience(measured, ["blob_009"], task.labels)


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("CT", "CT"),
        ("ct", "CT"),
        ("CT_venous", "CT"),
        ("MRI", "MR"),
        ("T1gd", "MR"),
        ("FLAIR", "MR"),
        ("ADC", "MR"),
        ("T2-weighted", "MR"),
        ("PET", "PT"),
        ("noNorm", None),
        ("0000", None),
        ("octopus", None),
    ],
)
def test_what_a_channels_name_says(name: str, modality: str | None) -> None:
    assert modality_of(name) == modality


def test_a_large_scan_is_measured_on_a_lattice(shared_data: Path) -> None:
    path = shared_data / "totalsegmentator-reference" / "example_ct.nii.gz"
    if not path.exists():
        pytest.skip("no example CT")
    from medseg.plan.fingerprint import PERCENTILES, channel_prints

    values = read_volume(path).values
    (found,) = channel_prints(read_volume(path))
    assert np.allclose(found.percentiles, np.percentile(values, PERCENTILES), atol=25)
    assert found.negative_share == pytest.approx((values < 0).mean(), abs=0.01)

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.dataset.task import load_task
from medseg.plan.fingerprint import Fingerprint, Source, fingerprint


def write_task(folder: Path, cases: list[tuple[np.ndarray, np.ndarray, np.ndarray]], channels: int = 1) -> Path:
    """A task of cases (values (X, Y, Z) or (X, Y, Z, C), labels, affine); labels a (1) and b (5)."""
    for number, (values, labels, affine) in enumerate(cases):
        for where, array in (("imagesTr", values), ("labelsTr", labels)):
            (folder / where).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(array, affine)
            image.set_qform(affine, code=1)
            nib.save(image, folder / where / f"c{number}.nii.gz")
    training = [{"image": f"imagesTr/c{n}.nii.gz", "label": f"labelsTr/c{n}.nii.gz"} for n in range(len(cases))]
    descriptor = {
        "modality": {str(n): f"M{n}" for n in range(channels)},
        "labels": {"0": "background", "1": "a", "5": "b"},
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(descriptor))
    return folder


def measure(folder: Path) -> Fingerprint:
    return fingerprint(load_task(folder))


def test_label_volumes_sizes_and_spacings_with_the_answer_known(tmp_path: Path) -> None:
    """A scan stored as (y, -x, z): the row tells x, y, z."""
    affine = np.array([[0, -0.5, 0, 9], [2.0, 0, 0, -3], [0, 0, 3, 1], [0, 0, 0, 1]])
    labels = np.zeros((4, 6, 5), dtype=np.uint8)
    labels[0, 0, :2] = 1
    labels[1:3, 3, 2] = 5
    labels[3, 3, 3] = 5
    values = np.zeros((4, 6, 5), dtype=np.int16)
    values[:2] = 1
    row = measure(write_task(tmp_path / "t", [(values, labels, affine)])).cases[0]
    assert row.id == "c0"
    assert row.shape == (6, 4, 5)
    assert row.spacing == pytest.approx((0.5, 2, 3))
    assert row.label_mm3 == pytest.approx({1: 6.0, 5: 9.0})
    assert row.nonzero_share == 0.5
    # Of the stored axes the first is y, the second x the other way round, the third z; the filled half
    # is two voxels of the first.
    assert row.box == (6, 2, 5)
    place = row.label_places[1]
    assert place.centre == pytest.approx((1 - 0.5 / 6, 0.5 / 4, 1 / 5), abs=1e-4)
    assert place.extent == pytest.approx((1 / 6, 1 / 4, 2 / 5), abs=1e-4)
    assert set(row.label_places) == {1, 5}


def test_intensities_are_numpys_over_all_foreground(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    cases = []
    for size in ((12, 14, 9), (9, 9, 9), (16, 8, 11)):
        labels = rng.choice([0, 1, 5], size=size, p=[0.6, 0.3, 0.1]).astype(np.uint8)
        cases.append((rng.normal(100, 50, (*size, 2)).astype(np.float32), labels, np.diag([1.0, 1, 2, 1])))
    found = measure(write_task(tmp_path / "t", cases, channels=2))
    for number, channel in enumerate(found.intensities):
        inside = np.concatenate([values[..., number][labels > 0] for values, labels, _ in cases]).astype(float)
        assert channel.channel == f"M{number}"
        assert channel.mean == pytest.approx(inside.mean())
        assert channel.std == pytest.approx(inside.std())
        assert channel.percentile_00_5 == pytest.approx(np.percentile(inside, 0.5))
        assert channel.percentile_99_5 == pytest.approx(np.percentile(inside, 99.5))
        assert (channel.minimum, channel.maximum) == (inside.min(), inside.max())


def test_of_a_large_foreground_a_sample_stands_for_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(40, 10, (64, 64, 64)).astype(np.float32)
    found = measure(write_task(tmp_path / "t", [(values, np.ones(values.shape, dtype=np.uint8), np.eye(4))]))
    channel = found.intensities[0]
    assert channel.mean == pytest.approx(40, abs=0.5)
    assert channel.std == pytest.approx(10, abs=0.3)
    assert channel.percentile_99_5 == pytest.approx(np.percentile(values, 99.5), abs=1)


def test_a_case_without_foreground_says_nothing_about_it(tmp_path: Path) -> None:
    organ = (np.full((8, 8, 8), 50, dtype=np.int16), np.ones((8, 8, 8), dtype=np.uint8), np.eye(4))
    air = (np.full((8, 8, 8), -1000, dtype=np.int16), np.zeros((8, 8, 8), dtype=np.uint8), np.eye(4))
    channel = measure(write_task(tmp_path / "t", [air, organ])).intensities[0]
    assert (channel.mean, channel.std, channel.minimum) == (50, 0, 50)


def test_no_foreground_at_all_is_refused(tmp_path: Path) -> None:
    air = (np.full((8, 8, 8), -1000, dtype=np.int16), np.zeros((8, 8, 8), dtype=np.uint8), np.eye(4))
    with pytest.raises(InputError, match="label maps of t are all empty"):
        measure(write_task(tmp_path / "t", [air, air]))


def test_duplicates_point_to_the_first_of_their_kind(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    labels = np.ones((4, 4, 4), dtype=np.uint8)
    a, b, c = (rng.integers(0, 99, (4, 4, 4)).astype(np.int16) for _ in range(3))
    found = measure(write_task(tmp_path / "t", [(x, labels, np.eye(4)) for x in (a, b, a, c, b, a)]))
    assert found.duplicates == {"c2": "c0", "c4": "c1", "c5": "c0"}


def test_the_first_case_amiss_is_refused_by_name(tmp_path: Path) -> None:
    sound = (np.ones((4, 4, 4), dtype=np.int16), np.ones((4, 4, 4), dtype=np.uint8), np.eye(4))
    amiss = (sound[0], np.full((4, 4, 4), 3, dtype=np.uint8), np.eye(4))
    with pytest.raises(InputError, match=r"case c1: .* value 3"):
        measure(write_task(tmp_path / "t", [sound, amiss, amiss]))


def test_it_is_json_and_its_digest_is_of_the_measurements(tmp_path: Path, tiny_task: Any) -> None:
    folder = tiny_task(tmp_path / "Task50_blobs", 3)
    one, again = measure(folder), measure(folder)
    assert one.digest() == again.digest()
    text = json.dumps(one.model_dump(mode="json"), allow_nan=False)
    assert Fingerprint.model_validate_json(text) == one
    assert one.model_copy(update={"task": "another"}).digest() != one.digest()
    # Where the data come from is told, and is no measurement.
    assert one.source == Source(description="Random ellipsoids", licence="CC0", reference="made up")
    assert one.model_copy(update={"source": None}).digest() == one.digest()


def test_progress_sees_every_case(tmp_path: Path, tiny_task: Any) -> None:
    seen: list[int] = []

    def progress(rows: Iterable[Any], count: int) -> Iterable[Any]:
        seen.append(count)
        return rows

    fingerprint(load_task(tiny_task(tmp_path / "Task50_blobs", 2)), progress=progress)
    assert seen == [2]


def test_the_real_hippocampi(shared_data: Path) -> None:
    found = measure(shared_data / "Task04_Hippocampus")
    assert len(found.cases) == 200
    assert np.allclose(found.spacings, 1)
    assert np.median(found.shapes, axis=0) == pytest.approx((35, 51, 35), abs=2)
    assert found.duplicates == {}
    volumes = [sum(case.label_mm3.values()) for case in found.cases]
    assert min(volumes) > 1500
    assert max(volumes) < 6500

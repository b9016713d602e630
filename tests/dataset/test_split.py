from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.core.errors import InputError
from medseg.core.labels import LabelSet
from medseg.dataset.split import Fold, leaks, make_folds, read_folds, write_folds
from medseg.dataset.task import Case, Task, load_task


def task_of(subjects: list[Any]) -> Task:
    """A task whose n-th case, "c<n>", is the subject given."""
    cases = tuple(Case(f"c{n}", Path(f"c{n}.nii"), Path(f"l{n}.nii"), f"s{s}") for n, s in enumerate(subjects))
    return Task("Task99_Test", "Test", Path(), ("CT",), LabelSet.from_names("a"), cases)


GROUPINGS = st.lists(st.integers(0, 9), min_size=2, max_size=30).filter(lambda s: len(set(s)) > 1)


@given(GROUPINGS, st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_folds_partition_the_cases_by_subject(subjects: list[int], count: int, seed: int) -> None:
    task = task_of(subjects)
    ids = [case.id for case in task.cases]
    subject_of = {case.id: case.subject for case in task.cases}
    folds = make_folds(task, count, seed=seed)
    assert len(folds) == min(count, len(set(subjects)))
    assert sorted(c for f in folds for c in f.validation) == sorted(ids)
    sizes = []
    for fold in folds:
        assert fold.train
        assert fold.validation
        assert sorted((*fold.train, *fold.validation)) == sorted(ids)
        left, right = ({subject_of[c] for c in side} for side in (fold.train, fold.validation))
        assert not left & right
        sizes.append(len(right))
    assert max(sizes) - min(sizes) <= 1
    assert leaks(task, folds) == []
    assert make_folds(task, count, seed=seed) == folds


def test_another_seed_deals_otherwise() -> None:
    task = task_of(list(range(40)))
    assert len({make_folds(task, seed=seed) for seed in range(10)}) == 10


def test_subjects_are_dealt_alike_whatever_the_order_of_the_cases() -> None:
    there, back = make_folds(task_of(list(range(12)))), make_folds(task_of(list(reversed(range(12)))))
    for one, other in zip(there, back, strict=True):
        assert {int(c[1:]) for c in one.validation} == {11 - int(c[1:]) for c in other.validation}


def test_one_subject_or_one_fold_is_refused() -> None:
    with pytest.raises(InputError, match="one subject only"):
        make_folds(task_of([3, 3, 3]))
    with pytest.raises(InputError, match="1 folds"):
        make_folds(task_of([1, 2, 3]), 1)
    with pytest.raises(InputError, match="one subject only"):
        make_folds(task_of([1, 2, 3]), duplicates={"c1": "c0", "c2": "c1"})


def joined(subjects: list[int], duplicates: dict[int, int]) -> list[set[str]]:
    """The obvious way: sets of cases that share a subject or an image, merged until nothing changes."""
    groups = [{n} | {m for m, s in enumerate(subjects) if s == subjects[n]} for n in range(len(subjects))]
    groups += [{a, b} for a, b in duplicates.items()]
    changed = True
    while changed:
        changed = False
        for one in groups:
            for other in groups:
                if one & other and one != other:
                    one |= other
                    other |= one
                    changed = True
    return [{f"c{n}" for n in group} for group in groups]


@given(st.data(), GROUPINGS, st.integers(2, 5))
def test_duplicates_join_subjects_in_chains_too(data: Any, subjects: list[int], count: int) -> None:
    cases = st.integers(0, len(subjects) - 1)
    duplicates = data.draw(st.dictionaries(cases, cases, max_size=5))
    groups = joined(subjects, duplicates)
    named = {f"c{a}": f"c{b}" for a, b in duplicates.items()}
    if any(len(group) == len(subjects) for group in groups):
        with pytest.raises(InputError, match="one subject only"):
            make_folds(task_of(subjects), count, duplicates=named)
        return
    for fold in make_folds(task_of(subjects), count, duplicates=named):
        for group in groups:
            assert group <= set(fold.train) or group <= set(fold.validation)


@given(GROUPINGS, st.integers(2, 5))
def test_write_and_read(tmp_path_factory: pytest.TempPathFactory, subjects: list[int], count: int) -> None:
    task = task_of(subjects)
    path = tmp_path_factory.mktemp("folds") / "folds.json"
    folds = make_folds(task, count)
    write_folds(path, task, folds)
    assert read_folds(path, task) == folds
    assert json.loads(path.read_text())["subjects"] == {case.id: case.subject for case in task.cases}


# ---- edited by hand -----------------------------------------------------------------------------

TASK = task_of([0, 0, 1, 2])


def own(*folds: Any, **more: Any) -> dict[str, Any]:
    return {"format": 1, "folds": list(folds), **more}


def saved(folder: Path, value: Any) -> Path:
    path = folder / "folds.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_an_edited_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """Cases may be left out, and there may be one fold only."""
    path = saved(tmp_path, own({"train": ["c0", "c1"], "validation": ["c3"]}))
    assert read_folds(path, TASK) == (Fold(("c0", "c1"), ("c3",)),)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (own({"train": ["c0", "c2"], "validation": ["c1", "c3"]}), "subject s0 on both sides"),
        (own({"train": ["c0", "c1", "c9"], "validation": ["c2"]}), "fold 0 .* unknown case c9"),
        (own({"train": ["c0"], "validation": ["c2"]}, {"train": ["c2"], "validation": ["c8"]}), "fold 1 .* case c8"),
        (own({"train": ["c0", "c1", "c2"], "validation": ["c2"]}), "case c2 on both sides"),
        (own({"train": [], "validation": ["c2"]}), "no case to train on"),
        (own({"train": ["c2"], "validation": []}), "no case to validate on"),
        (own(), "has no fold"),
        (own({"train": ["c0"]}), "not a list of folds"),
        (own({"train": ["c0"], "val": ["c2"]}), "not a list of folds"),
        (own({"train": 0, "validation": ["c2"]}), "not a list of folds"),
        (own({"train": "c0", "validation": "c2"}), "unknown case"),
        (own(["c0"], ["c2"]), "not a list of folds"),
        (own("c0"), "not a list of folds"),
        ({"format": 1}, "not a list of folds"),
        ({"format": 1, "folds": {"0": {}}}, "not a list of folds"),
        ({"format": 2, "folds": []}, "no folds file of format 1"),
        ({"folds": []}, "no folds file of format 1"),
        (own({"train": ["c0"], "validation": ["c2"]}, fold=3), "unknown key 'fold'"),
        ("3", "no folds file"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_a_file_edited_amiss_is_refused(tmp_path: Path, value: Any, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        read_folds(saved(tmp_path, value), TASK)
    assert caught.value.remedy


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folds.json is missing"):
        read_folds(tmp_path / "folds.json", TASK)


# ---- nnU-Net's file -----------------------------------------------------------------------------


def test_nnunets_splits_are_taken_as_they_are_and_their_leaks_named(tmp_path: Path) -> None:
    value = [{"train": ["c0", "c2"], "val": ["c1", "c3"]}, {"train": ["c1", "c3"], "val": ["c0", "c2"]}]
    folds = read_folds(saved(tmp_path, value), TASK)
    assert folds == (Fold(("c0", "c2"), ("c1", "c3")), Fold(("c1", "c3"), ("c0", "c2")))
    assert leaks(TASK, folds) == ["s0"]


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ([], "has no fold"),
        ([{"train": ["c0"], "validation": ["c2"]}], "not a list of folds"),
        ([{"train": ["c0"], "val": ["c7"]}], "unknown case c7"),
        ([{"train": ["c0"], "val": ["c0"]}], "on both sides"),
        ([{"train": ["c0"], "val": []}], "no case to validate on"),
        ([None], "not a list of folds"),
    ],
)
def test_nnunets_splits_amiss_are_refused(tmp_path: Path, value: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        read_folds(saved(tmp_path, value), TASK)


# ---- real ---------------------------------------------------------------------------------------


def test_the_hippocampi_of_one_person_stay_together(shared_data: Path) -> None:
    task = load_task(shared_data / "Task04_Hippocampus")
    folds = make_folds(task)
    assert leaks(task, folds) == []
    sizes = Counter(len({task.case(c).subject for c in f.validation}) for f in folds)
    assert max(sizes) - min(sizes) <= 1
    by_case = tuple(Fold(tuple(c.id for c in task.cases[1::2]), tuple(c.id for c in task.cases[::2])) for _ in range(1))
    assert len(leaks(task, by_case)) > 10

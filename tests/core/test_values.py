"""Volumes, label maps, label sets, errors and provenance."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import re
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.core.errors import InputError, MedsegError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.provenance import digest, machine, versions
from medseg.core.volume import LabelMap, Volume

GRID = Grid.from_spacing((3, 4, 5), (1, 2, 0.5))
LABELS = LabelSet.from_names(["liver", "tumour"])


def test_labels_come_in_the_order_of_their_numbers() -> None:
    labels = LabelSet((Label("spleen", 7), Label("liver", 2, "SCT:10200004")))
    assert labels.numbers == (2, 7)
    assert labels.names == ("liver", "spleen")
    assert labels.name_of(7) == "spleen"
    assert str(labels) == "2 liver, 7 spleen"
    assert [label.code for label in labels] == ["SCT:10200004", None]
    assert len(labels) == 2
    assert LABELS.numbers == (1, 2)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ((Label("background", 0),), "number 0"),
        ((Label("liver", -3),), "number -3"),
        ((Label("liver", 1), Label("spleen", 1)), "number 1 comes twice"),
        ((Label("liver", 1), Label("liver", 2)), "name liver comes twice"),
    ],
)
def test_labels_that_contradict_each_other_are_refused(labels: tuple[Label, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        LabelSet(labels)


def test_an_unknown_number_has_no_name() -> None:
    with pytest.raises(InputError, match=re.escape("no label has the number 9. The labels are 1 liver, 2 tumour.")):
        LABELS.name_of(9)


def test_values_must_have_the_shape_of_the_grid() -> None:
    assert Volume(np.zeros((2, 3, 4, 5)), GRID).channels == 2
    for shape in ((3, 4, 5), (1, 3, 4, 6), (1, 5, 4, 3)):
        with pytest.raises(InputError, match="shape"):
            Volume(np.zeros(shape), GRID)
        with pytest.raises(InputError, match="shape"):
            LabelMap(np.zeros((1, *shape), dtype=np.uint8), GRID, LABELS)


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, np.complex64])
def test_labels_must_be_integers(dtype: type) -> None:
    with pytest.raises(InputError, match="integers"):
        LabelMap(np.zeros((3, 4, 5), dtype=dtype), GRID, LABELS)


def test_the_volume_of_a_label_is_its_voxels() -> None:
    values = np.zeros((3, 4, 5), dtype=np.uint8)
    values[0, :2] = 2
    assert LabelMap(values, GRID, LABELS).volume_of(2) == pytest.approx(10 * 1.0)
    assert LabelMap(values, GRID, LABELS).volume_of(1) == 0


def test_an_error_says_case_fault_and_remedy() -> None:
    error = InputError("the file is empty.", "Copy it again", case="liver_3")
    assert str(error) == "case liver_3: the file is empty. Copy it again."
    assert str(InputError("the file is empty", "Copy it again.").of_case("liver_4")) == (
        "case liver_4: the file is empty. Copy it again."
    )
    assert (error.exit_status, MedsegError("x").exit_status) == (2, 1)


@given(st.text(), st.text(), st.one_of(st.none(), st.text()))
def test_an_error_survives_copies(fault: str, remedy: str, case: str | None) -> None:
    error = InputError(fault, remedy, case=case)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is InputError
        assert (again.fault, again.remedy, again.case, str(again)) == (fault, remedy, case, str(error))


def test_an_error_crosses_a_process_pool() -> None:
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool,
        pytest.raises(InputError) as caught,
    ):
        pool.submit(LABELS.name_of, 9).result()
    assert (caught.value.fault, caught.value.remedy) == ("no label has the number 9", f"The labels are {LABELS}")


def test_a_digest_stays_and_ignores_the_order_of_keys() -> None:
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest("abc") != digest(b"abc")


def test_provenance_names_versions_and_no_machine() -> None:
    found = versions()
    assert {"medseg", "python", "numpy", "nibabel"} <= set(found)
    assert all(re.match(r"\d+\.", v) for v in found.values())
    assert set(machine()) == {"system", "processor", "cores", "memory_gib"}

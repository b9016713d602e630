from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.core.errors import InputError
from medseg.io.store import INDEX, CaseStore

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(0, 1, (2, 5, 6, 7)).astype(np.float32)
LABELS = RNG.choice([0, 1, 300], (5, 6, 7)).astype(np.uint16)
PLACES = {number: np.flatnonzero(np.equal(LABELS, number)) for number in (1, 300)}


@pytest.fixture
def store(tmp_path: Path) -> CaseStore:
    store = CaseStore(tmp_path / "store")
    for case in ("a", "b"):
        store.write(case, IMAGE, LABELS, PLACES)
    store.finish(("a", "b"), "digest", "3d")
    return store


def test_there_and_back(store: CaseStore) -> None:
    case = store.read("a")
    assert case.id == "a"
    assert case.image.dtype == np.float16
    assert np.array_equal(case.image, IMAGE.astype(np.float16))
    assert case.labels.dtype == np.uint16
    assert np.array_equal(case.labels, LABELS)
    assert case.image.shape == IMAGE.shape
    assert case.image.nbytes == 2 * IMAGE.size
    assert set(case.places) == {1, 300}
    for number, where in case.places.items():
        assert where.dtype == np.int64
        assert (LABELS.ravel()[where] == number).all()
        assert len(where) == np.equal(LABELS, number).sum()


def test_a_structure_without_voxels_has_no_places(store: CaseStore) -> None:
    store.write("c", IMAGE, LABELS, {1: np.array([]), 2: []})
    assert {number: len(where) for number, where in store.read("c").places.items()} == {1: 0, 2: 0}


def test_arrays_that_are_turned_or_in_fortran_order_keep_their_meaning(store: CaseStore) -> None:
    store.write("c", np.asfortranarray(IMAGE)[:, ::-1], np.asfortranarray(LABELS)[::-1], {})
    case = store.read("c")
    assert np.array_equal(case.image, IMAGE.astype(np.float16)[:, ::-1])
    assert np.array_equal(case.labels, LABELS[::-1])
    assert case.places == {}


sides = st.integers(1, 70)


@given(st.tuples(sides, sides, sides), st.integers(0, 2**31))
def test_any_box_is_read_as_the_whole_has_it(tmp_path_factory: Any, shape: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(2, *shape)).astype(np.float16)
    store = CaseStore(tmp_path_factory.mktemp("store"))
    store.write("a", image, rng.integers(0, 9, shape).astype(np.uint8), {})
    case = store.read("a")
    for _ in range(5):
        ends = [np.sort(rng.integers(0, n + 1, 2)) for n in shape]
        box = tuple(slice(int(a), int(b)) for a, b in ends)
        assert np.array_equal(case.image[(slice(None), *box)], image[(slice(None), *box)])
        assert np.array_equal(case.image[(slice(1, 2), *box)], image[(slice(1, 2), *box)])
        assert case.labels[box].shape == tuple(b - a for a, b in ends)
    assert np.array_equal(case.image, image)
    # Little of the file is empty.
    assert (store.folder / "a.image.npy").stat().st_size < 4 * image.size * np.prod([1 + 2 / n for n in shape]) + 200


def test_a_part_costs_what_it_touches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CaseStore(tmp_path)
    image = np.zeros((1, 128, 128, 256), dtype=np.float16)
    store.write("a", image, np.zeros(image.shape[1:], dtype=np.uint8), {})
    read = []
    monkeypatch.setattr(os, "pread", lambda file, n, at, pread=os.pread: (read.append(n), pread(file, n, at))[1])
    assert store.read("a").image[:, 32:64, 40:60, 100:120].shape == (1, 32, 20, 20)
    assert sum(read) == 2**16  # one block of 32 x 32 x 32


def test_many_threads_read_at_once(store: CaseStore) -> None:
    case = store.read("a")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: case.image[:, i % 5 : 5, 0:6, 0:7], range(200)))
    assert all(np.array_equal(one, IMAGE.astype(np.float16)[:, i % 5 :]) for i, one in enumerate(found))


def test_a_case_that_is_replaced_is_not_taken_for_the_old_one(store: CaseStore) -> None:
    before = store.read("a")
    store.write("a", IMAGE + 5, LABELS, PLACES)
    with pytest.raises(ValueError, match=r"a\.image\.npy has changed since it was written"):
        np.array(before.image)
    assert np.array_equal(store.read("a").image, (IMAGE + 5).astype(np.float16))
    assert not [p for p in store.folder.iterdir() if p.name.startswith(".")]


def test_a_changed_or_lost_byte_is_found_when_it_is_read(store: CaseStore) -> None:
    path, case = store.folder / "a.image.npy", store.read("a")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="has changed"):
        np.array(case.image)
    path.write_bytes(data[:-100])  # which would have ended a process that had the file mapped
    with pytest.raises(ValueError, match="has changed"):
        np.array(case.image)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        np.array(case.image)


# ---- whole, and of this plan --------------------------------------------------------------------


def test_a_store_is_whole_once_its_index_is_written(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.write("a", IMAGE, LABELS, PLACES)
    with pytest.raises(InputError, match=r"store\.json is missing\. Make it with `medseg preprocess .* -c 3d`"):
        store.require("digest", "3d")
    store.finish(("a",), "digest", "3d")
    store.require("digest", "3d")


@pytest.mark.parametrize(("plan", "configuration"), [("another", "3d"), ("digest", "2d"), ("", "")])
def test_another_plan_or_configuration_is_refused(store: CaseStore, plan: str, configuration: str) -> None:
    with pytest.raises(InputError, match=r"preprocessed by another plan\. Run `medseg preprocess .*` again"):
        store.require(plan, configuration)


@pytest.mark.parametrize("index", [[], {"format": 1, "plan": "digest", "configuration": "3d"}, {}, 1])
def test_an_index_of_another_format_is_refused(store: CaseStore, index: Any) -> None:
    (store.folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="another format"):
        store.require("digest", "3d")


# ---- broken files -------------------------------------------------------------------------------

FILES = ["a.image.npy", "a.labels.npy", "a.places.npz"]


def refused(store: CaseStore) -> None:
    with pytest.raises(InputError) as caught:
        store.read("a")
    assert caught.value.case == "a"
    assert str(caught.value).startswith("case a: its preprocessed files in")
    assert "medseg preprocess" in caught.value.remedy
    store.read("b")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:9],
        lambda data: b"garbage" * 50,
        lambda data: b"\0" * len(data),
    ],
    ids=["empty", "half", "one byte short", "head", "garbage", "zeros"],
)
def test_a_broken_file_is_refused_by_its_case(store: CaseStore, name: str, change: Callable[[bytes], bytes]) -> None:
    path = store.folder / name
    path.write_bytes(change(path.read_bytes()))
    refused(store)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_its_case(store: CaseStore, name: str) -> None:
    (store.folder / name).unlink()
    refused(store)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("other", FILES)
def test_files_under_each_others_names_are_refused(store: CaseStore, name: str, other: str) -> None:
    if name != other:
        (store.folder / name).write_bytes((store.folder / other).read_bytes())
        refused(store)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("name", FILES)
def test_pickles_are_never_run(store: CaseStore, name: str) -> None:
    path = store.folder / name
    hostile = np.array([Bomb()], dtype=object)
    if name.endswith("npz"):
        np.savez(path, **{"1": hostile})  # type: ignore[arg-type]
    else:
        np.save(path, hostile, allow_pickle=True)
    refused(store)
    path.write_bytes(pickle.dumps(Bomb()))
    refused(store)


def test_places_under_a_name_that_is_no_number_are_refused(store: CaseStore) -> None:
    np.savez(store.folder / "a.places.npz", liver=np.arange(3))
    refused(store)


def test_a_changed_byte_among_the_places_is_refused(store: CaseStore) -> None:
    path = store.folder / "a.places.npz"
    with zipfile.ZipFile(path) as packed:
        inside = packed.infolist()[0].header_offset + 200
    data = bytearray(path.read_bytes())
    data[inside] ^= 1
    path.write_bytes(bytes(data))
    refused(store)

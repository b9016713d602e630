from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
from pydicom.sr import _cid_dict, _concepts_dict

from medseg.core.errors import InputError
from medseg.core.labels import Label
from medseg.core.terminology import CATEGORIES, SIDES, Code, default_terminology, unknown_names

TABLE = json.loads(files("medseg.core").joinpath("terminology.json").read_text())["terms"]
# value -> its meanings, as the DICOM standard's own context groups have them.
STANDARD: dict[str, set[str]] = {}
for _meanings in _concepts_dict.concepts["SCT"].values():
    for _value, (_meaning, _) in _meanings.items():
        STANDARD.setdefault(_value, set()).add(_meaning.lower())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["names"][0])
def test_each_code_means_in_the_standard_what_it_means_here(row: dict[str, Any]) -> None:
    for code in (row, row.get("region", row)):
        scheme, value = code["code"].split(":")
        assert scheme == "SCT"
        meanings = STANDARD[value]
        assert any(code["meaning"].lower() in meaning for meaning in meanings), meanings


def test_categories_and_sides_are_the_standards() -> None:
    group = {next(iter(_concepts_dict.concepts["SCT"][k])) for k in _cid_dict.cid_concepts[7150]["SCT"]}
    for code in CATEGORIES.values():
        assert code.value in group
    for code in SIDES.values():
        assert code.meaning.lower() in STANDARD[code.value]


@pytest.mark.parametrize(
    ("name", "value", "side", "region"),
    [
        ("liver", "10200004", None, None),
        ("Kidney_Left", "64033007", "Left", None),
        ("right kidney", "64033007", "Right", None),
        ("left atrium", "82471001", None, None),
        ("heart_atrium_left", "82471001", None, None),
        ("vertebrae_L1", "66794005", None, None),
        ("lung_upper_lobe_left", "45653009", "Left", None),
        ("liver tumour", "108369006", None, "10200004"),
        ("kidney_cyst_right", "367643001", "Right", "64033007"),
    ],
)
def test_names_of_common_datasets_are_known(name: str, value: str, side: str | None, region: str | None) -> None:
    term = default_terminology().find(Label(name, 1))
    assert (term.type.value, term.type.scheme) == (value, "SCT")
    assert (term.side and term.side.meaning) == side
    assert (term.region and term.region.value) == region


def test_what_is_unknown_gets_a_code_of_its_own_and_is_said() -> None:
    table = default_terminology()
    one, other = table.find(Label("left blob", 1)), table.find(Label("Left_Blob", 2))
    assert one.type.scheme == "99MEDSEG"
    assert len(one.type.value) <= 16
    assert one.type.value == other.type.value
    assert one.side == SIDES["left"]
    assert table.find(Label("right blob", 1)).type.value != one.type.value
    assert unknown_names([Label("liver", 1), Label("blob", 2)], table) == ("blob",)


def test_a_labels_own_code_comes_before_its_name() -> None:
    table = default_terminology()
    assert table.find(Label("organ 7", 1, "SCT:10200004")).type == Code("10200004", "SCT", "Liver")
    assert table.find(Label("organ 7", 1, "SCT:999")).type == Code("999", "SCT", "organ 7")
    with pytest.raises(InputError, match=r"label 'x' has the code 'liver'\. Write it as SCHEME:VALUE"):
        table.find(Label("x", 1, "liver"))


def test_a_person_extends_the_table() -> None:
    mine = {"format": 1, "terms": [{"names": ["blob"], "code": "99LAB:B1", "meaning": "Blob", "category": "tissue"}]}
    table = default_terminology().extended(mine, "mine.json")
    term = table.find(Label("Left Blob", 1))
    assert (term.type, term.category, term.side) == (Code("B1", "99LAB", "Blob"), CATEGORIES["tissue"], SIDES["left"])
    assert table.find(Label("liver", 1)).type.value == "10200004"


GOOD = {"names": ["a"], "code": "SCT:1", "meaning": "A"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no table of terms"),
        ({"format": 2, "terms": []}, "no table of terms"),
        ({"format": 1, "terms": [3]}, "term 1 of mine.json lacks"),
        ({"format": 1, "terms": [GOOD, {**GOOD, "nmes": 1}]}, "term 2 of mine.json has the key 'nmes'"),
        ({"format": 1, "terms": [{**GOOD, "names": []}]}, "has no names"),
        ({"format": 1, "terms": [{**GOOD, "code": "1"}]}, "has the code '1'"),
        ({"format": 1, "terms": [{**GOOD, "code": 1}]}, "no text"),
        ({"format": 1, "terms": [{**GOOD, "meaning": "x" * 65}]}, "65 characters"),
        ({"format": 1, "terms": [{**GOOD, "category": "organ"}]}, "category 'organ'"),
        ({"format": 1, "terms": [{**GOOD, "region": "liver"}]}, "no text"),
        ({"format": 1, "terms": [GOOD, GOOD]}, "'a' twice"),
    ],
)
def test_a_table_of_another_form_is_refused(data: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        default_terminology().extended(data, "mine.json")

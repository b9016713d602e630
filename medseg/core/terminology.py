"""What a structure is called in SNOMED CT, for files that other programs must understand.

The table is ``terminology.json`` beside this file; every code in it stands in the context groups of
the DICOM standard (PS3.16). A person extends it with a file of the same form.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from medseg.core.errors import InputError
from medseg.core.labels import Label

# Codes of our own, for what the table does not know. A scheme that starts with 99 is private.
PRIVATE = "99MEDSEG"


@dataclass(frozen=True)
class Code:
    """A concept: its value, the scheme that it belongs to (``SCT`` is SNOMED CT) and its meaning."""

    value: str
    scheme: str
    meaning: str


# CID 7150, Segmentation Property Categories.
CATEGORIES: Mapping[str, Code] = {
    "anatomical structure": Code("91723000", "SCT", "Anatomical Structure"),
    "tissue": Code("85756007", "SCT", "Tissue"),
    "morphologically abnormal structure": Code("49755003", "SCT", "Morphologically Abnormal Structure"),
    "body substance": Code("91720002", "SCT", "Body Substance"),
}
SIDES: Mapping[str, Code] = {
    "left": Code("7771000", "SCT", "Left"),
    "right": Code("24028007", "SCT", "Right"),
}


@dataclass(frozen=True)
class Term:
    """What a structure is: of which category, its type, on which side (None where it is not said)
    and in which region of the body (of a tumour, the organ that it is in)."""

    category: Code
    type: Code
    side: Code | None = None
    region: Code | None = None

    @property
    def known(self) -> bool:
        """Whether the code is one that others know."""
        return self.type.scheme != PRIVATE


@dataclass(frozen=True)
class Terminology:
    """Terms by name. Names are compared in lower case, words apart, without a side."""

    terms: Mapping[str, Term]

    def extended(self, data: Any, name: str) -> Terminology:
        """With the terms of a table (as `terminology.json` has them), which come before these.

        Raises InputError where the table has another form, naming the row.
        """
        return Terminology({**self.terms, **_parse(data, name)})

    def find(self, label: Label) -> Term:
        """The term of a label: by its name, or by its own code where it has one that the table
        does not. What is unknown gets a private code made from its name, the same each time."""
        words = _words(label.name)
        for wanted, side in ((words, None), _sided(words)):
            if term := self.terms.get(" ".join(wanted)):
                found = Term(term.category, term.type, SIDES[side] if side else None, term.region)
                return found if label.code is None else self._with_code(label, label.code, found)
        _, side = _sided(words)
        beside = SIDES[side] if side else None
        unknown = Term(CATEGORIES["anatomical structure"], _private(label.name), beside)
        return unknown if label.code is None else self._with_code(label, label.code, unknown)

    def _with_code(self, label: Label, text: str, found: Term) -> Term:
        scheme, value = _split(text, f"label {label.name!r}")
        if (found.type.scheme, found.type.value) == (scheme, value):
            return found
        for term in self.terms.values():
            if (term.type.scheme, term.type.value) == (scheme, value):
                return Term(term.category, term.type, found.side, term.region or found.region)
        return Term(found.category, Code(value, scheme, label.name[:64]), found.side, found.region)


def unknown_names(labels: Iterable[Label], terminology: Terminology) -> tuple[str, ...]:
    """Names of labels that get a private code."""
    return tuple(label.name for label in labels if not terminology.find(label).known)


@cache
def default_terminology() -> Terminology:
    """The table that comes with medseg."""
    text = files("medseg.core").joinpath("terminology.json").read_text(encoding="utf-8")
    return Terminology(_parse(json.loads(text), "terminology.json"))


def _private(name: str) -> Code:
    # At most 16 characters, and two names do not share one by accident.
    return Code(f"M{hashlib.sha256(' '.join(_words(name)).encode()).hexdigest()[:11].upper()}", PRIVATE, name[:64])


def _words(name: str) -> tuple[str, ...]:
    return tuple(w for w in re.split(r"[^0-9a-z]+", name.lower()) if w)


def _sided(words: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    sides = [w for w in words if w in SIDES]
    return tuple(w for w in words if w not in SIDES), sides[0] if len(sides) == 1 else None


def _split(text: str, where: str) -> tuple[str, str]:
    scheme, _, value = text.partition(":")
    if not (re.fullmatch(r"[0-9A-Za-z_.\-]{1,16}", scheme) and re.fullmatch(r"[0-9A-Za-z_.\-]{1,16}", value)):
        raise InputError(f"{where} has the code {text!r}", "Write it as SCHEME:VALUE, such as SCT:64033007")
    return scheme, value


def _parse(data: Any, name: str) -> dict[str, Term]:
    if not (isinstance(data, dict) and data.get("format") == 1 and isinstance(data.get("terms"), list)):
        raise InputError(f"{name} is no table of terms", 'It starts with {"format": 1, "terms": [')
    found: dict[str, Term] = {}
    for number, row in enumerate(data["terms"], start=1):
        term, names = _row(row, f"term {number} of {name}")
        for one in names:
            key = " ".join(_words(one))
            if key in found:
                raise InputError(f"{name} has the name {one!r} twice", "Give each name one code")
            found[key] = term
    return found


def _row(row: Any, where: str) -> tuple[Term, list[str]]:
    remedy = 'A term looks like {"names": ["liver"], "code": "SCT:10200004", "meaning": "Liver"}'
    if not isinstance(row, dict) or not {"names", "code", "meaning"} <= row.keys():
        raise InputError(f"{where} lacks names, code or meaning", remedy)
    if strange := sorted(row.keys() - {"names", "code", "meaning", "category", "region"}):
        raise InputError(f"{where} has the key {strange[0]!r}", remedy)
    names, category = row["names"], row.get("category", "anatomical structure")
    if not (isinstance(names, list) and names and all(isinstance(n, str) and _words(n) for n in names)):
        raise InputError(f"{where} has no names", remedy)
    if category not in CATEGORIES:
        raise InputError(f"{where} has the category {category!r}", f"The categories are {', '.join(CATEGORIES)}")
    region = _code(row["region"], where, remedy) if "region" in row else None
    return Term(CATEGORIES[category], _code(row, where, remedy), region=region), names


def _code(row: Any, where: str, remedy: str) -> Code:
    if not (isinstance(row, dict) and isinstance(row.get("code"), str) and isinstance(row.get("meaning"), str)):
        raise InputError(f"{where} has a code or a meaning that is no text", remedy)
    scheme, value = _split(row["code"], where)
    if not 1 <= len(row["meaning"]) <= 64:
        raise InputError(f"{where} has a meaning of {len(row['meaning'])} characters", "A meaning has 1 to 64")
    return Code(value, scheme, row["meaning"])

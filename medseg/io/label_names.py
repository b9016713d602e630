"""What the numbers of a label map mean, from the JSON file that came with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg.core.errors import InputError
from medseg.core.labels import Label, LabelSet
from medseg.io.files import read_json, write_json

_REMEDY = 'Name a dataset.json, the sidecar of a prediction, or {"labels": {"1": "liver"}}'


def read_label_names(path: Path) -> LabelSet:
    """Labels from a Decathlon dataset.json (number to name), nnU-Net's (name to number), or a
    sidecar that medseg wrote (a list with name, number and code). 0 is the background.

    Raises InputError for a file without such labels.
    """
    data = read_json(path, _REMEDY)
    rows = data.get("labels") if isinstance(data, dict) else None
    if not isinstance(rows, dict | list):
        rows = data.get("organs") if isinstance(data, dict) else None
    found = [_label(row, path.name) for row in (rows.items() if isinstance(rows, dict) else rows or [])]
    if not (kept := [label for label in found if label is not None]):
        raise InputError(f"{path.name} names no labels", _REMEDY)
    return LabelSet(tuple(kept))


def write_label_names(path: Path, labels: LabelSet, notes: Sequence[str] = ()) -> None:
    """Write a sidecar that `read_label_names` reads. Atomic."""
    rows = [{"number": label.number, "name": label.name, "code": label.code} for label in labels]
    write_json(path, {"format": 1, "labels": rows, "notes": list(notes)})


def _label(row: Any, name: str) -> Label | None:
    """None for the background."""
    code = None
    if isinstance(row, dict):
        number, text, code = row.get("number"), row.get("name"), row.get("code")
    elif isinstance(row, tuple):
        number, text = row if str(row[0]).isdigit() else row[::-1]
    else:
        number, text = None, None
    whole = isinstance(number, int | str) and not isinstance(number, bool) and str(number).isdigit()
    if not (whole and isinstance(text, str) and text and isinstance(code, str | None)):
        raise InputError(f"{name} has a label without a name and a whole number", _REMEDY)
    return Label(text, int(number), code) if int(number) else None  # type: ignore[arg-type]

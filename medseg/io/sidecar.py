"""The JSON beside a label map that says how it was made, and the index of a folder of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medseg.core.errors import InputError
from medseg.io.files import read_json, write_json
from medseg.io.nifti import SUFFIXES

SUFFIX = "_seg"
INDEX = "predictions.json"


def sidecar_of(path: Path) -> Path:
    """``scan_seg.nii.gz`` to ``scan_seg.json``."""
    name = next((path.name[: -len(s)] for s in SUFFIXES if path.name.endswith(s)), path.stem)
    return path.with_name(f"{name}.json")


def write_index(folder: Path, model: str, cases: dict[str, str], failed: dict[str, str]) -> None:
    """Which label map belongs to which case, and which cases failed and why. Written last."""
    write_json(folder / INDEX, {"format": 1, "model": model, "cases": cases, "failed": failed})


def read_index(folder: Path) -> dict[str, Path]:
    """Label maps of a folder of predictions, by case id.

    Raises InputError where there is no index, or where it lists a case that failed: a score over
    the others alone would look better than the model is.
    """
    index: Any = read_json(folder / INDEX, "Make predictions with `medseg predict ... -o FOLDER`")
    if not isinstance(index, dict) or index.get("format") != 1 or not isinstance(index.get("cases"), dict):
        raise InputError(f"{folder / INDEX} has another format", "Predict anew")
    if failed := index.get("failed"):
        case, why = next(iter(failed.items()))
        raise InputError(f"{len(failed)} cases of {folder} were not predicted ({case}: {why})", "Mend them and predict")
    return {case: folder / Path(name).name for case, name in index["cases"].items()}

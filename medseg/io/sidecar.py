"""The JSON beside a label map that says how it was made, and the index of a folder of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medseg.core.errors import InputError
from medseg.core.instances import InstanceMap, described
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap
from medseg.core.words import count
from medseg.io.files import read_json, write_json
from medseg.io.nifti import SUFFIXES, is_nifti, read_labels, read_raw_labels, stem
from medseg.io.sources import climbs_out

SUFFIX = "_seg"
# Of the map of the things that were counted, in place of the other.
COUNTED = "_instances"
INDEX = "predictions.json"


def sidecar_of(path: Path) -> Path:
    """``scan_seg.nii.gz`` to ``scan_seg.json``."""
    name = next((path.name[: -len(s)] for s in SUFFIXES if path.name.endswith(s)), path.stem)
    return path.with_name(f"{name}.json")


def read_sidecar(path: Path) -> Mapping[str, Any]:
    """What the sidecar of a label map tells; nothing where there is none, or none that is sound."""
    try:
        record = read_json(sidecar_of(path))
    except InputError:
        return {}
    return record if isinstance(record, dict) else {}


def ignored_in(record: Mapping[str, Any]) -> int | None:
    """The label number whose voxels do not count for or against a label map, since its model was trained so;
    None where its sidecar tells of none."""
    number = record.get("ignore_label")
    return number if isinstance(number, int) else None


def probabilities_in(record: Mapping[str, Any], path: Path) -> Path | None:
    """The file of probabilities beside the label map ``path``, where its sidecar names one."""
    name = record.get("probabilities")
    return path.with_name(Path(name).name) if isinstance(name, str) and Path(name).name else None


def expected_in(record: Mapping[str, Any], labels: LabelSet) -> dict[int, float]:
    """The Dice that the model predicted, by label number; nothing where a sidecar tells of none."""
    dice = {one.get("number"): one.get("predicted_dice") for one in _listed(record, "organs")}
    return {n: float(value) for n in labels.numbers if isinstance(value := dice.get(n), float | int)}


def flags_in(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Why a prediction is to be looked at, as its sidecar tells; nothing where it need not."""
    return tuple(str(one.get("reason", "")) for one in _listed(record, "flags") if one.get("review"))


def tells_instances(record: Mapping[str, Any]) -> bool:
    """Whether a sidecar lists instances, if only none."""
    return "instances" in record


def _listed(record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = record.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def by_name(folder: Path) -> dict[str, Path]:
    """The label maps of a folder that has no index, by their names without suffix and ``_seg``.

    Raises InputError where there is none, where two have one name, and where `medseg predict` made one of them: its
    index is written last, and is missing where it was stopped.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_nifti(path):
            case = stem(path).removesuffix(SUFFIX)
            if case in found:
                raise InputError(f"{found[case].name} and {path.name} are of one case", "Leave one of them", case=case)
            if "model_sha256" in read_sidecar(path):
                raise InputError(
                    f"{folder / INDEX} is missing", "Let `medseg predict` come to its end, with --skip-done"
                )
            found[case] = path
    if not found:
        raise InputError(f"{folder} has no label map (.nii, .nii.gz)", "Name the folder of the predictions")
    return found


def require_own(path: Path, *more: Path) -> None:
    """InputError where a label map to be written, its sidecar, or ``more`` that is written with it,
    would take the place of something that medseg did not make. The sidecar tells."""
    side = sidecar_of(path)
    if side.exists():
        stranger = None if "model_sha256" in read_sidecar(path) else side
    elif staged_beside(side).exists():
        stranger = None  # killed between writing a label map and telling of it
    else:
        stranger = next((p for p in (path, *more) if p.exists()), None)
    if stranger:
        raise InputError(f"{stranger} is there already and was not made by medseg", "Move it, or name another with -o")


def staged_beside(side: Path) -> Path:
    """Where a sidecar waits until what it tells of is written."""
    return side.with_name(f".{side.name}.new")


def write_index(path: Path, model: str, cases: dict[str, str], failed: dict[str, str]) -> None:
    """Which label map belongs to which case, and which cases failed and why. Written last."""
    write_json(path, {"format": 1, "model": model, "cases": cases, "failed": failed})


def read_index(folder: Path) -> dict[str, Path]:
    """Label maps of a folder of predictions, by case id.

    Raises InputError where there is no index, or where it lists a case that failed: a score over
    the others alone would look better than the model is.
    """
    index: Any = read_json(folder / INDEX, "Make predictions with `medseg predict ... -o FOLDER`")
    sound = isinstance(index, dict) and index.get("format") == 1 and isinstance(index.get("failed", {}), dict)
    if not (sound and _names(index.get("cases"))):
        raise InputError(f"{folder / INDEX} has another format", "Predict anew")
    if failed := index.get("failed"):
        case, why = next(iter(failed.items()))
        were = f"{count(len(failed), 'case')} of {folder} {'was' if len(failed) == 1 else 'were'}"
        raise InputError(f"{were} not predicted ({case}: {why})", "Mend what is wrong and predict again")
    return {case: folder / _below(name) for case, name in index["cases"].items()}


def read_prediction(path: Path, labels: LabelSet, case: str) -> LabelMap:
    """The label map (X, Y, Z) that an index lists for a case. Raises InputError, of the case, where it is
    missing or not sound, and for a value that ``labels`` does not list."""
    if not path.exists():
        raise InputError(f"its prediction {path} is missing", "Predict it again with `medseg predict`", case=case)
    try:
        return read_labels(path, labels)
    except InputError as error:
        raise error.of_case(case) from None


def instances_of(path: Path) -> Path:
    """``scan_seg.nii.gz`` to ``scan_instances.nii.gz``."""
    return path.with_name(f"{sidecar_of(path).stem.removesuffix(SUFFIX)}{COUNTED}.nii.gz")


def read_instances(path: Path, labels: LabelSet, case: str) -> InstanceMap:
    """The instances beside a label map: their voxels from `instances_of`, label and score from the sidecar.
    Raises InputError, of the case, where either is missing or not sound, or where they do not agree."""
    file, anew = instances_of(path), "Predict it again with `medseg predict`"
    if not file.exists():
        raise InputError(f"its instances {file} are missing", anew, case=case)
    try:
        values, grid = read_raw_labels(file)
        listed = read_json(sidecar_of(path), anew).get("instances")
    except InputError as error:
        raise error.of_case(case) from None
    number_of = {label.name: label.number for label in labels}
    try:
        label_of = {int(one["number"]): number_of[one["label"]] for one in listed}
        score_of = {int(one["number"]): float(one["score"]) for one in listed}
        if not all(0 <= score <= 1 for score in score_of.values()):
            raise ValueError("a score is not from 0 to 1")
    except (KeyError, TypeError, ValueError) as error:
        fault = f"the instances that {sidecar_of(path).name} lists are not sound ({error!r})"
        raise InputError(fault, anew, case=case) from None
    if strange := sorted(set(np.unique(values).tolist()) - {0} - set(label_of)):
        raise InputError(f"{file.name} has the number {strange[0]}, which its sidecar does not list", anew, case=case)
    return described(values, grid, label_of, score_of)


def _below(name: str) -> Path:
    """A path of an index as one that stays in its folder."""
    return Path(Path(name).name) if climbs_out(name) else Path(name)


def _names(cases: Any) -> bool:
    return isinstance(cases, dict) and all(isinstance(name, str) for name in cases.values())

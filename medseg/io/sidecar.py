"""The JSON beside a label map that says how it was made, and the index of a folder of them."""

from __future__ import annotations

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

SUFFIX = "_seg"
# Of the map of the things that were counted, in place of the other.
COUNTED = "_instances"
INDEX = "predictions.json"


def sidecar_of(path: Path) -> Path:
    """``scan_seg.nii.gz`` to ``scan_seg.json``."""
    name = next((path.name[: -len(s)] for s in SUFFIXES if path.name.endswith(s)), path.stem)
    return path.with_name(f"{name}.json")


def ignored_in(path: Path) -> int | None:
    """The label number whose voxels do not count for or against a label map, since its model was trained so;
    None where there is none, or no sidecar."""
    record = _read_or_none(sidecar_of(path))
    number = record.get("ignore_label") if isinstance(record, dict) else None
    return number if isinstance(number, int) else None


def probabilities_of(path: Path) -> Path | None:
    """The file of probabilities that belongs to a label map, where its sidecar names one."""
    record = _read_or_none(sidecar_of(path))
    name = record.get("probabilities") if isinstance(record, dict) else None
    return path.with_name(Path(name).name) if isinstance(name, str) and Path(name).name else None


def expected_in(path: Path, labels: LabelSet) -> dict[int, float]:
    """The Dice that the model predicted, by label number; nothing where the sidecar tells of none."""
    record = _read_or_none(sidecar_of(path))
    organs = record.get("organs") if isinstance(record, dict) else None
    known = [one for one in organs if isinstance(one, dict)] if isinstance(organs, list) else []
    dice = {one.get("number"): one.get("predicted_dice") for one in known}
    return {n: float(value) for n in labels.numbers if isinstance(value := dice.get(n), float | int)}


def flags_in(path: Path) -> tuple[str, ...]:
    """Why a prediction is to be looked at, as its sidecar tells; nothing where it need not."""
    record = _read_or_none(sidecar_of(path))
    flags = record.get("flags") if isinstance(record, dict) else None
    known = [one for one in flags if isinstance(one, dict)] if isinstance(flags, list) else []
    return tuple(str(one.get("reason", "")) for one in known if one.get("review"))


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
            record = _read_or_none(sidecar_of(path))
            if isinstance(record, dict) and "model_sha256" in record:
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
        record = _read_or_none(side)
        stranger = None if isinstance(record, dict) and "model_sha256" in record else side
    else:
        stranger = next((p for p in (path, *more) if p.exists()), None)
    if stranger:
        raise InputError(f"{stranger} is there already and was not made by medseg", "Move it, or name another with -o")


def _read_or_none(path: Path) -> Any:
    try:
        return read_json(path)
    except InputError:
        return None


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
    return {case: folder / Path(name).name for case, name in index["cases"].items()}


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


def tells_instances(path: Path) -> bool:
    """Whether the sidecar of a label map lists instances, if only none."""
    record = _read_or_none(sidecar_of(path))
    return isinstance(record, dict) and "instances" in record


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


def _names(cases: Any) -> bool:
    return isinstance(cases, dict) and all(isinstance(name, str) for name in cases.values())

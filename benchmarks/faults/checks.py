"""What a run leaves: is each file whole, is it what the undisturbed run left, is a case missing."""

import csv
import gzip
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from safetensors import safe_open


@dataclass(kw_only=True)
class Found:
    """What came of a harm: whether the same command went on and came to the same files, and all that was amiss."""

    told: bool = True
    line: str = ""
    survived: bool = True
    identical: bool = True
    differ: list[str] = field(default_factory=list)
    half_written: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        """Whether nothing is."""
        good = self.survived and self.identical and self.told
        return good and not (self.half_written or self.left_over or self.lost)


# What each stage leaves and must leave again, bit for bit. Not among them: what holds seconds or versions of a clock
# (package.json, sidecars, logs, pages), which are only looked at for being whole.
SAME = {
    "plan": ("run.json", "plan.json", "folds.json", "fingerprint.json"),
    "preprocess": ("*/preprocessed/*.*",),
    "train": ("*/fold0/model/member*.*", "*/fold0/model/plan.json", "*/fold0/model/experience.json"),
    "predict": ("*/fold0/predictions/*.nii.gz", "*/fold0/predictions/predictions.json"),
    "evaluate": ("*/fold0/metrics.csv", "*/fold0/metrics.json"),
    "choose": ("model/member*.*", "model/plan.json"),
    "report": ("metrics.csv", "report.md"),
}


def digests(run: Path, stages=tuple(SAME)) -> dict[str, str]:
    """SHA-256 of what must be the same, by path; of a label map or other .gz what is packed in it."""
    paths = sorted(p for stage in stages for pattern in SAME[stage] for p in run.glob(pattern) if p.is_file())
    return {str(path.relative_to(run)): _digest(path) for path in paths if not path.name.startswith(".")}


def phantoms(folder: Path) -> dict[str, str]:
    """The same of made tasks: their lists, images and labels."""
    paths = (*folder.glob("*/dataset.json"), *folder.glob("*/*/*.nii.gz"))
    return {str(path.relative_to(folder.parent)): _digest(path) for path in sorted(paths)}


def _digest(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha256(gzip.decompress(data) if path.suffix == ".gz" else data).hexdigest()


def broken(folder: Path) -> list[str]:
    """Files under their final names that are not whole, and why."""
    return [f"{path.relative_to(folder)}: {why}" for path in _files(folder) if (why := _why_broken(path))]


def left_over(folder: Path) -> list[str]:
    """What is no result, and that nobody takes away: files and folders that were to be renamed."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob(".*")
        if path.suffix in (".part", ".new", ".raw")
        or (path.is_dir() and path.name.startswith((".model.", ".previous.")))
    )


def missing(run: Path, stage: str, cases: set[str], said: str) -> list[str]:
    """Cases that a stage was to give, and that are neither in what it left nor named in what it said."""
    try:
        there = _LISTED[stage](run)
    except (OSError, ValueError, KeyError):
        there = set()
    return sorted(case for case in cases - there if case not in said)


def _listed_store(run: Path) -> set[str]:
    store = run / "3d" / "preprocessed"
    listed = json.loads((store / "store.json").read_text())["cases"]
    kinds = ("image.npy", "labels.npy", "places.npz")
    return {case for case in listed if all((store / f"{case}.{kind}").exists() for kind in kinds)}


def _listed_predictions(run: Path) -> set[str]:
    place = run / "3d" / "fold0" / "predictions"
    index = json.loads((place / "predictions.json").read_text())
    return {case for case, name in index["cases"].items() if (place / name).exists()} | set(index["failed"])


def scored(path: Path) -> set[str]:
    """The cases in a table of scores."""
    with path.open() as file:
        return {row["case"] for row in csv.DictReader(file)}


_LISTED = {
    "plan": lambda run: {c["id"] for c in json.loads((run / "fingerprint.json").read_text())["cases"]},
    "preprocess": _listed_store,
    "train": lambda run: set(json.loads((run / "3d/fold0/model/package.json").read_text())["trained_on"]),
    "predict": _listed_predictions,
    "evaluate": lambda run: scored(run / "3d/fold0/metrics.csv"),
    "choose": lambda run: set(json.loads((run / "model/package.json").read_text())["trained_on"]),
    "report": lambda run: scored(run / "metrics.csv"),
}


def _files(folder: Path) -> list[Path]:
    # Markers and locks are empty and hidden. TensorBoard's events grow at their end by design.
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.suffix != ".lock"
        and path.name != "lock"
        and "tensorboard" not in path.parts
    )


def _why_broken(path: Path) -> str:
    """Empty where a file is whole: it is read to its end."""
    kind = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    try:
        _READ.get(kind, lambda path: _demand(path.stat().st_size > 0, "is empty"))(path)
    except Exception as error:  # noqa: BLE001 - whatever a reader says of a broken file
        return f"{type(error).__name__}: {error}"
    return ""


def _demand(sound: object, fault: str) -> None:
    if not sound:
        raise ValueError(fault)


def _read_tensors(path: Path) -> None:
    with safe_open(path, framework="np") as file:
        _demand(all(file.get_tensor(name) is not None for name in file.keys()), "lacks a tensor")  # noqa: SIM118


def _read_onnx(path: Path) -> None:
    import openvino

    openvino.Core().read_model(path)


def _read_png(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _read_npz(path: Path) -> None:
    with np.load(path) as arrays:
        _demand(all(arrays[name] is not None for name in arrays.files), "lacks an array")


def _ends(*, start: bytes = b"", end: bytes):
    def read(path: Path) -> None:
        data = path.read_bytes()
        _demand(data.startswith(start) and data.rstrip().endswith(end.rstrip()) and data, "is cut short")

    return read


def _read_lines(path: Path) -> None:
    # The log of a training grows by lines; a last one that was cut is left out by whoever reads it, and rewritten.
    for line in path.read_text().split("\n")[:-1]:
        json.loads(line)


_READ = {
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": _read_lines,
    ".safetensors": _read_tensors,
    ".onnx": _read_onnx,
    ".nii.gz": lambda path: np.asarray(nib.load(path).dataobj),
    ".npy": lambda path: np.load(path),
    ".npz": _read_npz,
    ".png": _read_png,
    ".html": _ends(start=b"<!", end=b"</html>"),
    ".pdf": _ends(start=b"%PDF", end=b"%%EOF"),
    ".csv": lambda path: _demand(path.read_text().endswith("\n"), "is cut short"),
    ".md": lambda path: _demand(path.read_text().endswith("\n"), "is cut short"),
}

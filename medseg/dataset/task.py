"""Decathlon-format tasks: ``dataset.json``, ``imagesTr``, ``labelsTr``, ``imagesTs``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.core.errors import InputError
from medseg.core.grid import SAME_GRID_MM
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.io.files import read_json
from medseg.io.nifti import read_labels, read_volume, stem

# Label maps are written as 16-bit integers at most.
_LARGEST_LABEL = 65_535
# Of what the owner of the data writes about them, so many characters are kept.
_MOST_TOLD = 300
_LAYOUT = "A task needs dataset.json, imagesTr and labelsTr; see data/README.md"


@dataclass(frozen=True)
class Case:
    """One scan of a task: its id (the file's name), its files, and whose it is."""

    id: str
    image: Path
    label: Path | None
    subject: str


@dataclass(frozen=True)
class Task:
    """A Decathlon-format folder: channels in the order of the fourth dimension, the labels, the
    training cases (with labels) and the test cases (without); and what their owner says of them, each
    in one line."""

    name: str
    title: str
    folder: Path
    channels: tuple[str, ...]
    labels: LabelSet
    cases: tuple[Case, ...]
    test: tuple[Case, ...] = ()
    description: str = ""
    licence: str = ""
    reference: str = ""
    release: str = ""
    subjects: Mapping[str, str] = field(default_factory=dict)

    def case(self, case_id: str) -> Case:
        """The training or test case of that id; InputError where there is none."""
        for case in (*self.cases, *self.test):
            if case.id == case_id:
                return case
        raise InputError(f"task {self.name} has no case {case_id}", "Take the ids from its dataset.json")


def load_task(folder: Path) -> Task:
    """Read ``dataset.json`` as the Decathlon wrote it, misspelt keys (``licence``, ``relase``) and
    all. Where it has no ``training``, the cases are the files of ``imagesTr`` with those of the same
    name in ``labelsTr``. No image is opened.

    Raises InputError where the folder is no Decathlon task, a needed key is missing or of the wrong
    kind, a case comes twice or a path leads out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", _LAYOUT)
    if not (folder / "dataset.json").exists():
        raise InputError(f"{folder} is no Decathlon task: it has no dataset.json", _LAYOUT)
    described = read_json(folder / "dataset.json", _LAYOUT)
    if not isinstance(described, dict):
        raise InputError(f"{folder / 'dataset.json'} holds no object", _LAYOUT)
    channels = _numbered(described, "modality")
    if sorted(channels) != list(range(len(channels))) or not channels:
        raise InputError(f"the modalities of {folder.name} are numbered {sorted(channels)}", "Number them from 0")
    names = _numbered(described, "labels")
    if too_large := [number for number in names if number > _LARGEST_LABEL]:
        raise InputError(f"dataset.json has the label number {too_large[0]}", f"Number up to {_LARGEST_LABEL}")
    subjects = _subjects(folder)
    if "training" in described:
        training = _entries(described, "training")
        paired = [(_inside(folder, e.get("image")), _inside(folder, e.get("label"))) for e in training]
    else:
        paired = _pairs(folder)
    test = [_inside(folder, e.get("image")) for e in _entries(described, "test", needed=False)]
    title = str(described.get("name", folder.name))
    task = Task(
        name=folder.resolve().name,
        title=title,
        folder=folder,
        channels=tuple(channels[i] for i in range(len(channels))),
        labels=LabelSet(tuple(Label(name, number) for number, name in names.items() if number != 0)),
        cases=tuple(Case(stem(image), image, label, _subject(title, stem(image), subjects)) for image, label in paired),
        test=tuple(Case(stem(i), i, None, _subject(title, stem(i), subjects)) for i in test),
        description=_told(described, "description"),
        licence=_told(described, "licence", "license"),
        reference=_told(described, "reference"),
        release=_told(described, "release", "relase"),
        subjects=subjects,
    )
    if twice := sorted(case for case, times in Counter(case.id for case in task.cases).items() if times > 1):
        raise InputError(f"dataset.json of {task.name} lists {', '.join(twice[:5])} twice", "List each case once")
    if not task.cases:
        raise InputError(f"dataset.json of {task.name} lists no training case", _LAYOUT)
    if not len(task.labels):
        raise InputError(f"dataset.json of {task.name} lists no label but the background", "Add the structures")
    return task


def load_image(task: Task, case: Case) -> Volume:
    """The case's channels on its own grid; InputError (naming the case) where they are not sound."""
    try:
        volume = read_volume(case.image)
        if volume.channels != len(task.channels):
            raise InputError(
                f"{case.image.name} has {volume.channels} channels where dataset.json lists "
                f"{len(task.channels)} ({', '.join(task.channels)})",
                "Put all channels into the image's fourth dimension, in that order",
            )
    except InputError as error:
        raise error.of_case(case.id) from None
    return volume


def load_labels(task: Task, case: Case) -> LabelMap:
    """The case's reference labels; InputError (naming the case) where they are not sound."""
    if case.label is None:
        raise InputError("it has no label", "Only training cases do", case=case.id)
    try:
        return read_labels(case.label, task.labels)
    except InputError as error:
        raise error.of_case(case.id) from None


def load_case(task: Task, case: Case) -> tuple[Volume, LabelMap]:
    """Image and labels; InputError where they are not on one grid."""
    volume, labels = load_image(task, case), load_labels(task, case)
    require_same_grid(volume, labels, case.id)
    return volume, labels


def require_same_grid(volume: Volume | LabelMap, labels: LabelMap, case: str) -> None:
    """InputError unless both lie on the same grid, up to rounding of the affine."""
    if volume.grid.matches(labels.grid):
        return
    if volume.grid.shape != labels.grid.shape:
        fault = f"image {_size(volume.grid.shape)} and label {_size(labels.grid.shape)} differ in size"
    else:
        distance = volume.grid.distance(labels.grid)
        fault = f"image and label lie {distance:.3g} mm apart (allowed: {SAME_GRID_MM} mm)"
    raise InputError(fault, "Resample the label onto the image's grid, or find the right pair", case=case)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


def _numbered(described: dict[str, Any], key: str) -> dict[int, str]:
    """A dictionary from numbers (as JSON strings) to names."""
    try:
        found = {int(number): name for number, name in described[key].items()}
    except KeyError:
        raise InputError(f"dataset.json has no {key!r}", f'Add it, like "{key}": {{"0": "..."}}') from None
    except (ValueError, AttributeError):
        raise InputError(f"{key!r} in dataset.json is not numbered", f'Write it like "{key}": {{"0": "..."}}') from None
    if len(found) < len(described[key]):
        raise InputError(f"{key!r} in dataset.json has a number twice", "Give each its own")
    if strange := [number for number, name in found.items() if not isinstance(name, str)]:
        raise InputError(f"{key!r} in dataset.json has no name for {strange[0]}", "Name it with a string")
    return found


def _told(described: dict[str, Any], *keys: str) -> str:
    """What the first of the keys that is there says, on one line, without control characters, and cut
    where it is long."""
    said = next((str(described[key]) for key in keys if described.get(key)), "")
    line = " ".join("".join(c if c.isprintable() else " " for c in said[: 10 * _MOST_TOLD]).split())
    return line if len(line) <= _MOST_TOLD else f"{line[: _MOST_TOLD - 1]}…"


def _entries(described: dict[str, Any], key: str, *, needed: bool = True) -> list[dict[str, Any]]:
    entries = described.get(key)
    if entries is None and not needed:
        return []
    if not isinstance(entries, list):
        raise InputError(f"dataset.json has no list {key!r}", 'List the cases as {"image": ..., "label": ...}')
    return [{"image": e} if isinstance(e, str) else e if isinstance(e, dict) else {} for e in entries]


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Images and labels of the same name; InputError for one without the other."""
    images, labels = _files(folder / "imagesTr"), _files(folder / "labelsTr")
    if not images:
        raise InputError(f"dataset.json of {folder.name} has no list 'training', and imagesTr no NIfTI file", _LAYOUT)
    if lonely := sorted(images.keys() ^ labels.keys()):
        has, lacks = ("imagesTr", "labelsTr") if lonely[0] in images else ("labelsTr", "imagesTr")
        raise InputError(f"{lonely[0]} is in {has} and not in {lacks}", "Give both the same name, or list the cases")
    return [(images[case], labels[case]) for case in sorted(images)]


def _files(folder: Path) -> dict[str, Path]:
    """The NIfTI files of a folder by the case's id; companions of a Mac's archive are none."""
    paths = [p for p in sorted(folder.glob("*")) if p.name.endswith((".nii", ".nii.gz")) and p.name[0] != "."]
    found = {stem(path): path for path in paths}
    if len(found) < len(paths):
        twice = next(path.name for path in paths if found[stem(path)] != path)
        raise InputError(f"{folder.name} holds {twice} packed and unpacked", "Take one of them away")
    return found


def _inside(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name:
        raise InputError("a case in dataset.json lacks an image or a label", 'Write {"image": ..., "label": ...}')
    if not name.isprintable():  # half a surrogate pair or a zero byte names no file; a line break breaks tables
        raise InputError(f"dataset.json names the file {name!a}", "Rename it without control characters")
    path = folder / name
    # A link to a store elsewhere is the owner's doing; a path that climbs out is not.
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise InputError(f"dataset.json names {name}, outside its folder", "Keep all files inside the task")
    return path


def _subjects(folder: Path) -> dict[str, str]:
    """Who each case is, from ``subjects.json`` in the task folder, where there is one."""
    path = folder / "subjects.json"
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(v, str | int) for v in found.values()):
        raise InputError(f"{path} is no table of subjects", 'Write {"case id": "subject id", ...}')
    return {str(k): str(v) for k, v in found.items()}


def _subject(title: str, case: str, subjects: Mapping[str, str]) -> str:
    """The subject of a case: as the task's owner says, else by what is known of the Decathlon.

    In Task04 the ids 2k-1 and 2k are the two hippocampi of one person.
    """
    if case in subjects:
        return subjects[case]
    number = re.fullmatch(r"hippocampus_(\d+)", case)
    if title.lower() == "hippocampus" and number:
        return f"subject_{(int(number[1]) + 1) // 2:03d}"
    return case

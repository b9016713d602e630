"""Decathlon-format tasks: ``dataset.json``, ``imagesTr``, ``labelsTr``, ``imagesTs``."""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.grid import SAME_GRID_MM
from medseg.core.instances import InstanceMap, described
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.core.words import count
from medseg.io.files import read_json
from medseg.io.nifti import is_nifti, read_labels, read_raw_labels, read_volume, stem

# Label maps are written as 16-bit integers at most.
_LARGEST_LABEL = 65_535
# Of what the owner of the data writes about them, so many characters are kept.
_MOST_TOLD = 300
_LAYOUT = "A task needs dataset.json, imagesTr and labelsTr; see data/README.md"


@dataclass(frozen=True)
class Case:
    """One scan of a task: its id (the file's name), its files, and whose it is. ``instances`` numbers what
    its label map shows, where that is to be counted."""

    id: str
    image: Path
    label: Path | None
    subject: str
    instances: Path | None = None


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
    name in ``labelsTr``. Where there is a folder ``instancesTr``, each has a file of its label's name there.
    No image is opened.

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
        numbered = enumerate(_entries(described, "training"), start=1)
        where = "entry {} of 'training'"
        paired = [
            (_file(folder, e, "image", where.format(n)), _file(folder, e, "label", where.format(n)))
            for n, e in numbered
        ]
    else:
        paired = _pairs(folder)
    numbered = enumerate(_entries(described, "test", needed=False), start=1)
    test = [_file(folder, e, "image", f"entry {n} of 'test'") for n, e in numbered]
    title = str(described.get("name", folder.name))
    task = Task(
        name=folder.resolve().name,
        title=title,
        folder=folder,
        channels=tuple(channels[i] for i in range(len(channels))),
        labels=LabelSet(tuple(Label(name, number) for number, name in names.items() if number != 0)),
        cases=tuple(_case(folder, title, subjects, image, label) for image, label in paired),
        test=tuple(_case(folder, title, subjects, image, None) for image in test),
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


def _case(folder: Path, title: str, subjects: Mapping[str, str], image: Path, label: Path | None) -> Case:
    place = folder / "instancesTr"
    instances = place / label.name if label and place.is_dir() else None
    return Case(stem(image), image, label, _subject(title, stem(image), subjects), instances)


def load_image(task: Task, case: Case) -> Volume:
    """The case's channels on its own grid; InputError (naming the case) where they are not sound."""
    _require_there(task, case, case.image)
    try:
        volume = read_volume(case.image)
        if volume.channels != len(task.channels):
            raise InputError(
                f"{case.image.name} has {count(volume.channels, 'channel')} where dataset.json lists "
                f"{len(task.channels)} ({', '.join(task.channels)})",
                "Put all channels into the image's fourth dimension, in that order",
            )
    except InputError as error:
        raise in_place(error, task.folder, case.image).of_case(case.id) from None
    return volume


def load_labels(task: Task, case: Case) -> LabelMap:
    """The case's reference labels; InputError (naming the case) where they are not sound."""
    if case.label is None:
        raise InputError("it has no label", "Only training cases do", case=case.id)
    _require_there(task, case, case.label)
    try:
        return read_labels(case.label, task.labels)
    except InputError as error:
        raise in_place(error, task.folder, case.label).of_case(case.id) from None


def load_instances(task: Task, case: Case) -> InstanceMap:
    """The case's reference instances, each of the label that its voxels have in the label map. What has a label
    and no number is not counted.

    InputError (naming the case) where they are not sound, not on the grid of the labels, or where the voxels of
    a number have several labels or none.
    """
    if case.instances is None:
        raise InputError("it has no instances", "Number its things in instancesTr", case=case.id)
    _require_there(task, case, case.instances)
    labels = load_labels(task, case)
    try:
        values, grid = read_raw_labels(case.instances)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > _LARGEST_LABEL:
            strange = low if low < 0 else high
            raise InputError(f"{case.instances.name} has the number {strange}", f"Number from 1 to {_LARGEST_LABEL}")
    except InputError as error:
        raise in_place(error, task.folder, case.instances).of_case(case.id) from None
    if not grid.matches(labels.grid):
        remedy = "Number the voxels of the labels"
        raise InputError("its instances and labels are not on one grid", remedy, case=case.id)
    return described(values.astype(np.min_scalar_type(high), copy=False), grid, _labels_of(values, labels, case), {})


def _labels_of(instances: NDArray[Any], labels: LabelMap, case: Case) -> dict[int, int]:
    """The label of each number of ``instances`` (X, Y, Z)."""
    counted = instances > 0
    step = max(labels.labels.numbers) + 1
    pairs = np.unique(instances[counted].astype(np.int64) * step + labels.values[counted])
    found: dict[int, int] = {}
    for number, label in zip((pairs // step).tolist(), (pairs % step).tolist(), strict=True):
        names = [labels.labels.name_of(one) if one else "the background" for one in (found.get(number, label), label)]
        if number in found or not label:
            fault = f"instance {number} lies on {' and '.join(dict.fromkeys(names))}"
            raise InputError(fault, "Let each lie on one label of the label map, and nowhere else", case=case.id)
        found[number] = label
    return found


def load_case(task: Task, case: Case) -> tuple[Volume, LabelMap]:
    """Image and labels; InputError where they are not on one grid."""
    volume, labels = load_image(task, case), load_labels(task, case)
    require_same_grid(volume, labels, case.id)
    return volume, labels


def in_place(error: InputError, folder: Path, path: Path) -> InputError:
    """The error of a file's reader, which tells the file's name alone, with its path from the task's
    ``folder``: an image and its label have one name."""
    return InputError(error.fault.replace(path.name, _from(folder, path), 1), error.remedy, case=error.case)


def _from(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _require_there(task: Task, case: Case, path: Path) -> None:
    if not path.exists():
        raise InputError(
            f"{_from(task.folder, path)} is missing",
            "Put the file in its place or take the case off the list in dataset.json",
            case=case.id,
        )


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
        renamed = _misspelt(key, described)
        raise InputError(f"dataset.json has no {key!r}", renamed or f'Add it, like "{key}": {{"0": "..."}}') from None
    except (ValueError, AttributeError):
        raise InputError(f"{key!r} in dataset.json is not numbered", f'Write it like "{key}": {{"0": "..."}}') from None
    if len(found) < len(described[key]):
        raise InputError(f"{key!r} in dataset.json has a number twice", "Give each its own")
    background = 0 if key == "labels" else None
    for number, name in found.items():
        if not isinstance(name, str) or not (name.strip() or number == background):
            what = "label" if key == "labels" else "channel"
            raise InputError(f"{what} {number} has no name in dataset.json", f'Write it like "{number}": "a name"')
    return found


def _misspelt(key: str, keys: Iterable[str]) -> str:
    """How to mend a key that is missing where one is there that is nearly it; else nothing."""
    near = difflib.get_close_matches(key, [k for k in keys if k.isprintable()], n=1, cutoff=0.75)
    return f"Rename {near[0]!r} to {key!r}" if near else ""


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


class UnpairedError(InputError):
    """Images and labels that do not go together by their names."""


@dataclass(frozen=True)
class Pairing:
    """The files of ``imagesTr`` and ``labelsTr`` by the case that their names say, None for one that is
    not there; and what is wrong with them: of one case where a fault names it, else of the folder."""

    files: dict[str, tuple[Path | None, Path | None]]
    faults: tuple[InputError, ...]


def pair_files(folder: Path) -> Pairing:
    """Images and labels of the same name, for a task that lists no cases. No file is opened."""
    faults: list[InputError] = []
    images, labels = _files(folder / "imagesTr", faults), _files(folder / "labelsTr", faults)
    if not images or not labels:
        return Pairing({n: (images.get(n), labels.get(n)) for n in sorted({*images, *labels})}, tuple(faults))
    if raw := _raw_names(images, labels):
        faults.append(_not_raw(raw))
        taken = {name for names in raw.values() for name in names}
        images = {n: p for n, p in images.items() if p.name not in taken}
        images |= {case: folder / "imagesTr" / names[0] for case, names in raw.items()}
    files: dict[str, tuple[Path | None, Path | None]] = {
        n: (images[n], labels[n]) for n in images.keys() & labels.keys()
    }
    lonely = sorted(labels.keys() - images.keys())
    for name in sorted(images.keys() - labels.keys()):
        likely = [other for other in lonely if _belong(name, other)]
        if len(likely) == 1:
            lonely.remove(likely[0])
        other = labels[likely[0]] if len(likely) == 1 else None
        files[name] = (images[name], other)
        faults.append(_without_label(name, images[name], other))
    for name in lonely:
        files[name] = (None, labels[name])
        place = labels[name].name
        faults.append(
            InputError(
                f"labelsTr/{place} has no image", f"Put it at imagesTr/{place}, or take the label away", case=name
            )
        )
    return Pairing(dict(sorted(files.items())), tuple(faults))


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Images and labels of the same name; UnpairedError for one without the other."""
    found = pair_files(folder)
    if found.faults:
        first, more = found.faults[0], len(found.faults) - 1
        others = f" (`medseg check` tells {count(more, 'fault')} more)" if more else ""
        raise UnpairedError(first.fault + others, first.remedy, case=first.case)
    return [(image, label) for image, label in found.files.values() if image and label]


def _files(folder: Path, faults: list[InputError]) -> dict[str, Path]:
    """The NIfTI files of a folder by the case's id; companions of a Mac's archive are none. What is
    wrong with the folder goes to ``faults``."""
    paths = [path for path in sorted(folder.glob("*")) if is_nifti(path)]
    found = {stem(path): path for path in paths}
    if not found:
        what = f"{folder} holds no NIfTI file" if folder.is_dir() else f"there is no folder {folder}"
        remedy = "Put the files there, or list the cases under 'training' in dataset.json; see data/README.md"
        faults.append(InputError(what, remedy))
    if len(found) < len(paths):
        twice = next(path.name for path in paths if found[stem(path)] != path)
        faults.append(InputError(f"{folder} holds {twice} packed and unpacked", "Take one of them away"))
    return found


def _raw_names(images: Mapping[str, Path], labels: Mapping[str, Path]) -> dict[str, list[str]]:
    """By case the files that nnU-Net's raw format would have of it, one a channel: case_0000, case_0001."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, path in images.items():
        numbered = re.fullmatch(r"(.+)_\d{4}", name)
        if numbered and numbered[1] in labels and name not in labels:
            found[numbered[1]].append(path.name)
    return found


def _not_raw(raw: Mapping[str, list[str]]) -> InputError:
    case, names = next(iter(raw.items()))
    fault = f"imagesTr has nnU-Net's names for {count(len(raw), 'case')}, like {names[0]} for {case}"
    if max(map(len, raw.values())) == 1:
        return InputError(fault, f"Take {stem(Path(names[0])).removeprefix(case)} off the names of the images")
    return InputError(
        fault, "Put the channels of each case into one 4-D file, in the order of 'modality', named like its label"
    )


def _belong(one: str, other: str) -> bool:
    """Whether one name is the other with something before or after it: hip_3 and hip_3_seg, not hip_31."""
    short, long = sorted((one, other), key=len)
    after, before = long.removeprefix(short), long.removesuffix(short)
    return (after != long and not after[0].isalnum()) or (before != long and not before[-1].isalnum())


def _without_label(case: str, image: Path, likely: Path | None) -> InputError:
    if likely is None:
        remedy = f"Put it at labelsTr/{image.name}, or move the image to imagesTs"
        return InputError(f"imagesTr/{image.name} has no label", remedy, case=case)
    return InputError(
        f"imagesTr/{image.name} has no label of its name, and labelsTr/{likely.name} may be it",
        f"Give both the same name, like labelsTr/{case}{likely.name.removeprefix(stem(likely))}",
        case=case,
    )


def _file(folder: Path, entry: Mapping[str, Any], key: str, where: str) -> Path:
    """The file that an entry of a list of cases names; ``where`` says which entry it is."""
    name = entry.get(key)
    if not isinstance(name, str) or not name:
        of = entry.get("image")
        known = f" ({of})" if isinstance(of, str) and 0 < len(of) < 100 and of.isprintable() else ""
        remedy = ("" if key in entry else _misspelt(key, entry)) or 'Write {"image": ..., "label": ...}'
        raise InputError(f"{where} in dataset.json{known} has no {key!r}", remedy)
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

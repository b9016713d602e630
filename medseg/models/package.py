"""What is shipped: a folder of weights, plan, card and checksums. Data only; loading it runs
nobody's code, and neither torch nor monai."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from medseg.core.errors import InputError
from medseg.core.provenance import digest
from medseg.io.files import atomic, new_folder, read_json, sha256_of, work_folder, write_bytes, write_json, write_text
from medseg.models.build import build
from medseg.models.calibration import Calibration
from medseg.models.card import card
from medseg.models.evaluation import Evaluation
from medseg.models.experience import Experience
from medseg.models.onnx_file import NotPortableError
from medseg.models.parts import Part, parts
from medseg.models.portable import check, export, layout
from medseg.models.refinement import Refinement
from medseg.plan.plan import Configuration, Finite, Plan, Share, Strict, read_plan, write_plan

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "package.json"
EXPERIENCE, CALIBRATION = "experience.json", "calibration.json"
REFINEMENT, EVALUATION = "refinement.json", "evaluation.json"
_TOLD = (EXPERIENCE, CALIBRATION, REFINEMENT, EVALUATION)
M = TypeVar("M", bound=BaseModel)
PREVIOUS = "previous"
_NAME_ONE = "Name the folder of a model, which `medseg train` and `medseg choose` write"
_ANOTHER = "Get the package again, or train it anew"


class Agreement(Strict):
    """How far an engine's results are those of torch in float32, on some cases (of a single fold, held-out
    ones): the largest difference of a logit, the share of voxels with the same label, and the least
    Dice of a label between the two."""

    precision: str
    cases: tuple[str, ...]
    largest_difference: Finite
    label_agreement: Share
    least_dice: Share


class Index(Strict):
    """What ``package.json`` holds. Format 1 had no graphs and no engines."""

    format: Literal[1, 2]
    task: str
    configuration: str
    members: Annotated[tuple[str, ...], Field(min_length=1)]
    graphs: tuple[str, ...] = ()
    not_portable: str = ""
    checksums: dict[str, str]
    engines: Annotated[dict[str, Agreement], Field(default_factory=dict)]
    trained_on: tuple[str, ...]
    held_out: tuple[str, ...]
    provenance: dict[str, Any]


class StoredWeights(Mapping[str, "Tensor"]):
    """Weights in a safetensors file, by tensor name; read when they are asked for."""

    def __init__(self, path: Path, checksum: str) -> None:
        self.path, self.checksum = path, checksum

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        if name not in self:
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        from safetensors import safe_open

        with safe_open(self.path, framework="np") as file:
            return list(file.keys())


@dataclass(frozen=True)
class ModelPackage:
    """A trained model. ``members`` are the weights of one network per fold, by tensor name, in memory
    or in files; ``graphs`` the members' ONNX files, all ``parts`` of one after those of the other, none where
    ``not_portable`` says why;
    ``held_out`` names the cases that no member was trained on. ``experience`` says what scans it was
    trained on, ``calibration`` how far its probabilities can be believed, ``evaluation`` how good it is,
    where that is known; ``refinement`` is what is done to its labels once they are decided.
    ``previous`` is the stage whose labels it takes as further channels; it lies in a folder of that name."""

    plan: Plan
    configuration_name: str
    members: tuple[Mapping[str, Tensor], ...]
    trained_on: tuple[str, ...]
    held_out: tuple[str, ...]
    provenance: dict[str, Any]
    graphs: tuple[Path, ...] = field(default=(), compare=False)
    not_portable: str = field(default="", compare=False)
    engines: dict[str, Agreement] = field(default_factory=dict)
    experience: Experience | None = None
    calibration: Calibration | None = None
    refinement: Refinement | None = None
    evaluation: Evaluation | None = None
    previous: ModelPackage | None = None

    @property
    def configuration(self) -> Configuration:
        return self.plan.configuration(self.configuration_name)

    @property
    def classes(self) -> int:
        """The network's outputs: the background and each label, or each region."""
        return self.plan.outputs

    @property
    def channels(self) -> int:
        """The network's inputs."""
        return self.plan.inputs(self.configuration)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What each member's graphs are, where there are any."""
        return parts(self.configuration, self.channels, self.classes)

    @property
    def name(self) -> str:
        """Task and configuration, as people say it."""
        return f"{self.plan.task} {self.configuration_name}"

    def digest(self) -> str:
        """SHA-256 of all that its labels follow from (plan, configuration, weights, post-processing): which
        model this is, wherever it lies."""
        before = [self.previous.digest()] if self.previous else []
        after = [self.refinement.model_dump(mode="json")] if self.refinement else []
        weights = [_checksum(m) for m in self.members]
        return digest([self.plan.digest(), self.configuration_name, weights, *before, *after])


def learnt_from(package: ModelPackage) -> dict[str, list[str]]:
    """By task the cases, labelled or not, that a model's weights follow from: its own and those of the models
    that it started from, as far as its provenance tells."""
    folds = package.provenance.get("folds", {})
    told = [package.provenance, *(fold for fold in folds.values() if isinstance(fold, dict))]
    found = {package.plan.task: {*package.trained_on}}
    for one in told:
        found[package.plan.task] |= {*one.get("unlabelled", ())}
        for task, cases in one.get("learnt_before", {}).items():
            found.setdefault(task, set()).update(cases)
    return {task: sorted(cases) for task, cases in sorted(found.items()) if cases}


def halved(package: ModelPackage) -> ModelPackage:
    """The same model with its weights rounded to half as many bits (float16). So they are stored; what
    is computed with them is computed in float32.

    It is another model, with another digest, of nearly the same results: what was measured of the
    first is kept, and its digest. Raises InputError where a weight is too large for float16.
    """
    return replace(
        package,
        members=tuple(_half(weights, package.name) for weights in package.members),
        previous=halved(package.previous) if package.previous else None,
        provenance={"rounded_from": package.digest(), **package.provenance},
    )


def _half(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    rounded = {key: one.half() if one.is_floating_point() else one for key, one in weights.items()}
    if broken := [key for key, one in rounded.items() if not one.isfinite().all()]:
        raise InputError(f"the weights {broken[0]} of {name} are beyond what float16 holds", "Keep them as they are")
    return rounded


def save_package(folder: Path, package: ModelPackage, *, outdated: Sequence[Path] = ()) -> None:
    """Write a package to a new folder, or over an older package.

    All files are written beside the folder first, so that an older package outlives a full disk.
    ``outdated`` files, which speak of the older one, go before any moves, and the index moves last.
    """
    new_folder(folder, holds=INDEX)
    with work_folder(folder.with_name(f".{folder.name}.new")) as aside:
        members = tuple(f"member{i}.safetensors" for i in range(len(package.members)))
        for member, weights in zip(members, package.members, strict=True):
            if isinstance(weights, StoredWeights):
                with weights.path.open("rb") as source, atomic(aside / member) as copy:
                    shutil.copyfileobj(source, copy)
            else:
                write_bytes(aside / member, _pack(weights))
        graphs, reason = _write_graphs(aside, members, package)
        write_plan(aside / "plan.json", package.plan)
        write_text(aside / "README.md", card(package))
        known = {
            EXPERIENCE: package.experience,
            CALIBRATION: package.calibration,
            REFINEMENT: package.refinement,
            EVALUATION: package.evaluation,
        }
        told = {file: value.model_dump(mode="json") for file, value in known.items() if value is not None}
        for name, value in told.items():
            write_json(aside / name, value)
        nested: tuple[str, ...] = ()
        if package.previous is not None:
            save_package(aside / PREVIOUS, package.previous)
            nested = (f"{PREVIOUS}/{INDEX}",)
        named = ("plan.json", *told, *members, *graphs)
        index = Index(
            format=2,
            task=package.plan.task,
            configuration=package.configuration_name,
            members=members,
            graphs=graphs,
            not_portable=reason,
            checksums={file: sha256_of(aside / file) for file in (*named, *nested)},
            engines=package.engines,
            trained_on=package.trained_on,
            held_out=package.held_out,
            provenance=package.provenance,
        )
        write_json(aside / INDEX, index.model_dump(mode="json"))
        for path in (*outdated, folder / INDEX):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / PREVIOUS, ignore_errors=True)
        for file in (*named, "README.md", *(PREVIOUS for _ in nested), INDEX):
            (aside / file).replace(folder / file)
        for old in (*folder.glob("member*.safetensors"), *folder.glob("member*.onnx")):
            if old.name not in named:
                old.unlink()
        for name in set(_TOLD) - set(told):
            (folder / name).unlink(missing_ok=True)


def record_engines(folder: Path, engines: dict[str, Agreement]) -> None:
    """Write into a package's index how far engines agree with torch. Atomic."""
    index = _index(folder)
    write_json(folder / INDEX, index.model_copy(update={"engines": engines}).model_dump(mode="json"))


def load_package(folder: Path) -> ModelPackage:
    """Read a package, all but its weights, which are read when they are asked for.

    Raises InputError where it is none, of another format, where a file's checksum is not what the
    index says, or where a graph holds anything but this model's network.
    """
    index = _index(folder)
    names = (*index.members, *index.graphs)
    if any(Path(name).name != name or name not in index.checksums for name in names):
        raise InputError(f"{folder / INDEX} names members that it has no checksum for", _ANOTHER)
    told = tuple(name for name in _TOLD if name in index.checksums)
    nested = [name for name in index.checksums if name == f"{PREVIOUS}/{INDEX}"]
    for name in ("plan.json", *told, *names, *nested):
        path = folder / name
        if not path.is_file() or sha256_of(path) != index.checksums.get(name):
            raise InputError(f"{path} is missing or was changed after it was written", _ANOTHER)
    members = tuple(StoredWeights(folder / name, index.checksums[name]) for name in index.members)
    for weights in members:
        _require_readable(weights.path)
    package = ModelPackage(
        plan=read_plan(folder / "plan.json", inherit=False),
        configuration_name=index.configuration,
        members=members,
        trained_on=index.trained_on,
        held_out=index.held_out,
        provenance=index.provenance,
        graphs=tuple(folder / name for name in index.graphs),
        not_portable=index.not_portable,
        engines=index.engines,
        experience=_read(folder / EXPERIENCE, Experience) if EXPERIENCE in told else None,
        calibration=_read(folder / CALIBRATION, Calibration) if CALIBRATION in told else None,
        refinement=_read(folder / REFINEMENT, Refinement) if REFINEMENT in told else None,
        evaluation=_read(folder / EVALUATION, Evaluation) if EVALUATION in told else None,
        previous=load_package(folder / PREVIOUS) if nested else None,
    )
    if (package.configuration.previous is None) != (package.previous is None):
        raise InputError(f"{folder} lacks the stage before, or has one that its plan does not take", _ANOTHER)
    labels = {(label.number, label.name) for label in package.plan.label_set}
    if package.refinement and not {(rule.number, rule.name) for rule in package.refinement.rules} <= labels:
        raise InputError(f"{folder / REFINEMENT} has a rule for a structure that the plan does not know", _ANOTHER)
    _require_own_graphs(package, members)
    return package


def _index(folder: Path) -> Index:
    if not folder.is_dir() or not (folder / INDEX).exists():
        raise _no_package(folder)
    try:
        return Index.model_validate(read_json(folder / INDEX, _ANOTHER))
    except ValidationError:
        raise InputError(f"{folder / INDEX} has another format", "Use the medseg version that wrote it") from None


def _no_package(folder: Path) -> InputError:
    """Why a folder is no package, and where one is or how it would come to be there."""
    if not folder.is_dir():
        # So it is called in the folders of runs and of folds (docs/training.md).
        made = folder.name == "model" and folder.parent.is_dir()
        of_run = (folder.parent / "run.json").exists()
        verb = f"`medseg choose {folder.parent}`" if of_run else "`medseg train`"
        return InputError(f"there is no folder {folder}", f"{verb} makes it" if made else _NAME_ONE)
    inner = next((p.parent for p in (folder / "model" / INDEX, *sorted(folder.glob(f"*/{INDEX}"))) if p.exists()), None)
    remedy = f"Name {inner}, which is one" if inner else _NAME_ONE
    return InputError(f"{folder} is no model package: it has no {INDEX}", remedy)


def _read(path: Path, kind: type[M]) -> M:
    try:
        return kind.model_validate(read_json(path, _ANOTHER))
    except ValidationError:
        raise InputError(f"{path} has another format", "Use the medseg version that wrote it") from None


def _require_readable(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"the weights in {path} cannot be read ({error})", _ANOTHER) from None


def _require_own_graphs(package: ModelPackage, members: tuple[StoredWeights, ...]) -> None:
    if not package.graphs:
        return
    expected = list(product(members, package.parts))
    if len(package.graphs) != len(expected):
        raise InputError(f"{package.name} has ONNX files for some of its members only, or too many", _ANOTHER)
    for path, (weights, part) in zip(package.graphs, expected, strict=True):
        try:
            check(path, layout(weights.path), part)
        except ValueError as error:
            raise InputError(f"{path} is not this model's network: {error}", _ANOTHER) from None


def _write_graphs(folder: Path, members: tuple[str, ...], package: ModelPackage) -> tuple[tuple[str, ...], str]:
    """Write each member's ONNX files; their names, or none and why there can be none."""
    import torch

    # Not on the meta device, where tables of indices would have no values. Whoever saves while training goes on
    # draws the same numbers after as before.
    with torch.random.fork_rng(devices=()):
        network = build(package.configuration, package.channels, package.classes)
    try:
        files = {
            part.file(member): export(network, part, layout(folder / member))
            for member, part in product(members, package.parts)
        }
    except NotPortableError as error:
        return (), str(error)
    for name, data in files.items():
        write_bytes(folder / name, data)
    return tuple(files), ""


def _checksum(weights: Mapping[str, Tensor]) -> str:
    return weights.checksum if isinstance(weights, StoredWeights) else hashlib.sha256(_pack(weights)).hexdigest()


def _pack(weights: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in sorted(weights.items())})

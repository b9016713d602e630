"""What is shipped: a folder of weights, plan, card and checksums. Data only; loading it runs
nobody's code."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from medseg.core.errors import InputError
from medseg.core.provenance import digest
from medseg.io.files import new_folder, read_json, write_bytes, write_json, write_text
from medseg.plan.plan import Configuration, Plan, Strict, read_plan, write_plan

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "package.json"
_ANOTHER = "Get the package again, or train it anew"


class Index(Strict):
    """What ``package.json`` holds."""

    format: Literal[1]
    task: str
    configuration: str
    members: Annotated[tuple[str, ...], Field(min_length=1)]
    checksums: dict[str, str]
    trained_on: tuple[str, ...]
    held_out: tuple[str, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class ModelPackage:
    """A trained model. ``members`` are the weights of one network per fold, by tensor name;
    ``held_out`` names the cases that no member was trained on."""

    plan: Plan
    configuration_name: str
    members: tuple[dict[str, Tensor], ...]
    trained_on: tuple[str, ...]
    held_out: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def configuration(self) -> Configuration:
        return self.plan.configuration(self.configuration_name)

    @property
    def name(self) -> str:
        """Task and configuration, as people say it."""
        return f"{self.plan.task} {self.configuration_name}"

    def digest(self) -> str:
        """SHA-256 of plan, configuration and weights: which model this is."""
        hashes = [hashlib.sha256(_pack(m)).hexdigest() for m in self.members]
        return digest([self.plan.digest(), self.configuration_name, hashes])


def save_package(folder: Path, package: ModelPackage) -> None:
    """Write a package to a new folder, or over an older package.

    All files are written beside the folder first, so that an older package outlives a full disk.
    The index moves last.
    """
    new_folder(folder, holds=INDEX)
    members = {f"member{i}.safetensors": _pack(weights) for i, weights in enumerate(package.members)}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        aside = Path(name)
        for member, data in members.items():
            write_bytes(aside / member, data)
        write_plan(aside / "plan.json", package.plan)
        write_text(aside / "README.md", _card(package))
        named = ("plan.json", *members)
        index = Index(
            format=1,
            task=package.plan.task,
            configuration=package.configuration_name,
            members=tuple(members),
            checksums={file: hashlib.sha256((aside / file).read_bytes()).hexdigest() for file in named},
            trained_on=package.trained_on,
            held_out=package.held_out,
            provenance=package.provenance,
        )
        write_json(aside / INDEX, index.model_dump(mode="json"))
        (folder / INDEX).unlink(missing_ok=True)
        for file in (*named, "README.md", INDEX):
            (aside / file).replace(folder / file)


def load_package(folder: Path) -> ModelPackage:
    """Read a package. Raises InputError where it is none, of another format, or where a file's
    checksum is not what the index says."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not folder.is_dir() or not (folder / INDEX).exists():
        raise InputError(
            f"{folder} is no model package: it has no {INDEX}", "Name the folder that `medseg train` wrote"
        )
    try:
        index = Index.model_validate(read_json(folder / INDEX, _ANOTHER))
    except ValidationError:
        raise InputError(f"{folder / INDEX} has another format", "Use the medseg version that wrote it") from None
    names = index.members
    if any(Path(name).name != name or name not in index.checksums for name in names):
        raise InputError(f"{folder / INDEX} names members that it has no checksum for", _ANOTHER)
    for name in ("plan.json", *names):
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != index.checksums.get(name):
            raise InputError(f"{path} is missing or was changed after it was written", _ANOTHER)
    try:
        members = tuple(load((folder / name).read_bytes()) for name in names)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"the weights in {folder} cannot be read ({error})", _ANOTHER) from None
    package = ModelPackage(
        plan=read_plan(folder / "plan.json"),
        configuration_name=index.configuration,
        members=members,
        trained_on=index.trained_on,
        held_out=index.held_out,
        provenance=index.provenance,
    )
    package.plan.configuration(package.configuration_name)
    return package


def _pack(weights: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in sorted(weights.items())})


def _card(package: ModelPackage) -> str:
    labels = "\n".join(f"| {e.number} | {e.name} |" for e in package.plan.labels)
    return (
        f"# {package.name}\n\n"
        f"Takes {', '.join(package.plan.channels)}. Trained on {len(package.trained_on)} cases; "
        f"{len(package.held_out)} were held out. Research software; not a medical device.\n\n"
        f"| number | structure |\n| --- | --- |\n{labels}\n"
    )

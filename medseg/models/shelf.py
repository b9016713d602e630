"""Packages on this machine: shipped with medseg or installed under a name, found by it, passed on as a zip."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from pathlib import Path

from medseg.core.errors import InputError
from medseg.io.files import atomic, read_json
from medseg.io.sources import unpacked
from medseg.models.package import INDEX, PREVIOUS, ModelPackage, halved, load_package, save_package

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SUFFIXES = (".json", ".safetensors", ".onnx", ".md")
# Weights hardly pack: a zip that unpacks to far more than itself holds something else.
_GROWTH, _SPARE = 4, 1 << 28
_EPOCH = (1980, 1, 1, 0, 0, 0)


def shelf() -> Path:
    """Where packages are installed unless another folder is named."""
    return Path.home() / ".local" / "share" / "medseg" / "models"


def shipped() -> Path:
    """Where the packages lie that come with medseg itself; there may be none."""
    return Path(__file__).with_name("starter")


def at_hand(models: Path | None = None) -> dict[str, Path]:
    """The folders of all packages that are found by name, by name: those shipped, and those installed,
    which take the place of shipped ones of the same name."""
    found = {folder.name: folder for folder in (*installed(shipped()), *installed(models or shelf()))}
    return dict(sorted(found.items()))


def most_unpacked(path: Path) -> int:
    """Bytes that a zip of models may unpack to."""
    return _GROWTH * path.stat().st_size + _SPARE if path.is_file() else 0


def find_package(name_or_folder: str | Path, models: Path | None = None) -> Path:
    """The folder of a package: the one named, or the one installed or shipped under that name.

    Raises InputError where there is neither.
    """
    folder = Path(name_or_folder)
    if folder.exists() or len(folder.parts) > 1:
        return folder
    known = at_hand(models)
    if found := known.get(str(name_or_folder)):
        return found
    names = ", ".join(known) or "none"
    raise InputError(
        f"there is no model package {name_or_folder}, nor one installed under that name",
        f"Name its folder, or one that is installed ({names})",
    )


def installed(models: Path) -> list[Path]:
    """The folders of the packages in a folder of models, by name."""
    return sorted(p.parent for p in models.glob(f"*/{INDEX}") if not p.parent.name.startswith("."))


def install(source: Path, models: Path, name: str | None = None) -> Path:
    """Put a package, a folder or a zip of one, into a folder of models; gives its place.

    Raises InputError for a zip that is hostile or damaged, a package that is not whole, a name that
    is none, and one that is taken.
    """
    with unpacked(source, _belongs, most=most_unpacked(source)) as folder:
        package = load_package(_root(folder, source))
        name = name or _slug(package)
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} is no name for a model", "Use letters, digits, dots, dashes and underscores")
        place = models / name
        if place.exists():
            raise InputError(f"a model is installed as {name} already", f"Choose another --name, or remove {place}")
        save_package(place, package)
    return place


def pack(folder: Path, target: Path, *, half: bool = False) -> None:
    """A package as a zip: the same bytes for the same package. Atomic. ``half`` as `halved` says.

    Raises InputError where the package is not whole.
    """
    package = load_package(folder)
    if half:
        with tempfile.TemporaryDirectory() as temporary:
            save_package(Path(temporary) / "package", halved(package))
            pack(Path(temporary) / "package", target)
        return
    with atomic(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in package_files(folder):
            entry = zipfile.ZipInfo(f"{target.stem}/{name}", _EPOCH)
            entry.external_attr = 0o644 << 16
            with (folder / name).open("rb") as source, archive.open(entry, "w", force_zip64=True) as packed:
                shutil.copyfileobj(source, packed)


def package_files(folder: Path) -> list[str]:
    """What belongs to a package that was loaded before, as paths in its folder; nothing else in the
    folder does."""
    files = [INDEX]
    for name in read_json(folder / INDEX)["checksums"]:
        if name == f"{PREVIOUS}/{INDEX}":
            files += [f"{PREVIOUS}/{file}" for file in package_files(folder / PREVIOUS)]
            continue
        if Path(name).name != name or not name.endswith(_SUFFIXES):
            raise InputError(f"{folder / INDEX} names {name[:80]!r}, which is no file of a package", "Get it again")
        files.append(name)
    if (folder / "README.md").is_file():
        files.append("README.md")
    return sorted(files)


def size_of(folder: Path) -> int:
    """Bytes of a package."""
    return sum((folder / name).stat().st_size for name in package_files(folder))


def _belongs(path: str) -> bool:
    return path.endswith(_SUFFIXES)


def _root(folder: Path, source: Path) -> Path:
    """The package's own folder in what was unpacked: the top, or the one folder there."""
    found = [p.parent for p in (*folder.glob(INDEX), *folder.glob(f"*/{INDEX}"))]
    if not found or (len(found) > 1 and found[0] != folder):
        raise InputError(f"{source} holds {len(found)} model packages", "Name the folder or zip of one")
    return found[0]


def _slug(package: ModelPackage) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", package.name).strip("-._")[:100]

"""Preprocessed cases on disk: plain numpy arrays that can be read in part, and an index."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.io.files import atomic, read_json, write_json

INDEX = "store.json"
_REMEDY = "Make it with `medseg preprocess`"


@dataclass(frozen=True)
class StoredCase:
    """``image`` (C, X, Y, Z) float16 and ``labels`` (X, Y, Z) on the network's grid, mapped, not
    loaded; ``places`` holds, per label number, flat indices of voxels that have it."""

    id: str
    image: NDArray[Any]
    labels: NDArray[Any]
    places: Mapping[int, NDArray[np.int64]]


class CaseStore:
    """A folder of preprocessed cases, all by one plan (known by what of it they stand on) and configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, case: str, image: NDArray[Any], labels: NDArray[Any], places: Mapping[int, NDArray[Any]]) -> None:
        """Write a case; each of its three files atomically."""
        _save(self.folder / f"{case}.image.npy", np.ascontiguousarray(image, dtype=np.float16))
        _save(self.folder / f"{case}.labels.npy", np.ascontiguousarray(labels))
        packed = io.BytesIO()
        np.savez(packed, **{str(number): np.asarray(where, dtype=np.int64) for number, where in places.items()})  # type: ignore[arg-type]
        with atomic(self.folder / f"{case}.places.npz") as file:
            file.write(packed.getvalue())

    def finish(self, cases: tuple[str, ...], plan: str, configuration: str) -> None:
        """Write the index, last: a store without one is not whole."""
        write_json(
            self.folder / INDEX, {"format": 1, "plan": plan, "configuration": configuration, "cases": list(cases)}
        )

    def require(self, plan: str, configuration: str) -> None:
        """InputError unless the store is whole and was made by this plan and configuration."""
        index = read_json(self.folder / INDEX, _REMEDY)
        if not isinstance(index, dict) or index.get("format") != 1:
            raise InputError(f"{self.folder / INDEX} has another format", _REMEDY)
        if index.get("plan") != plan or index.get("configuration") != configuration:
            raise InputError(f"{self.folder} was preprocessed by another plan", "Run `medseg preprocess` again")

    def read(self, case: str) -> StoredCase:
        """A case, its arrays mapped from disk. Raises InputError where a file is missing or broken."""
        try:
            image = np.lib.format.open_memmap(self.folder / f"{case}.image.npy", mode="r")
            labels = np.lib.format.open_memmap(self.folder / f"{case}.labels.npy", mode="r")
            if image.shape[1:] != labels.shape:
                raise ValueError(f"image {image.shape} and labels {labels.shape} do not fit together")
            packing = self.folder / f"{case}.places.npz"
            with packing.open("rb") as file, np.load(file, allow_pickle=False) as packed:
                places = {int(name): packed[name] for name in packed.files}
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise InputError(
                f"its preprocessed files in {self.folder} cannot be read ({error})", _REMEDY, case=case
            ) from None
        return StoredCase(case, image, labels, places)


def _save(path: Path, values: NDArray[Any]) -> None:
    with atomic(path) as file:
        np.save(file, values, allow_pickle=False)

"""Preprocessed cases on disk, in blocks that are read and checked one by one, and an index."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from medseg.core.errors import InputError, MedsegError
from medseg.io.files import atomic, read_json, write_json

INDEX = "store.json"
_REMEDY = "Make it with `medseg preprocess`"
# Along each axis a block has at most so many voxels: 64 KiB of a channel.
_SIDE = 32


@dataclass(frozen=True)
class Blocks:
    """An array (..., X, Y, Z) in a file, of which any box can be read, from any thread.

    The file is a plain .npy of shape (blocks along X, Y, Z, ..., side, side, side), zeros beyond the
    array's end; ``sums`` holds each block's CRC-32. ``values[..., a:b, c:d, e:f]`` reads the blocks that
    the box touches and nothing else, with `OSError` where that fails and ValueError where a block is
    not what was written. Nothing is mapped: a file that shrinks, or a disk that fails, would end the
    process by a signal.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    sides: tuple[int, int, int]
    sums: NDArray[np.uint32]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, key: tuple[slice, ...]) -> NDArray[Any]:
        """A copy of a box: slices of step 1, one for each axis."""
        ranges = [range(n)[k] for n, k in zip(self.shape, key, strict=True)]
        box = ranges[-3:]
        out = np.empty([len(r) for r in ranges], dtype=self.dtype)
        if not out.size:
            return out
        first = [r.start // side for r, side in zip(box, self.sides, strict=True)]
        last = [(r.stop - 1) // side for r, side in zip(box, self.sides, strict=True)]
        others = tuple(slice(r.start, r.stop) for r in ranges[:-3])
        everything = tuple(slice(None) for _ in others)
        with self.path.open("rb") as file:
            for x in range(first[0], last[0] + 1):
                for y in range(first[1], last[1] + 1):
                    run = self._run(file.fileno(), x, y, first[2], last[2] + 1)
                    for z, block in enumerate(run, start=first[2]):
                        inside, outside = _meet(box, (x, y, z), self.sides)
                        out[(*everything, *outside)] = block[(*others, *inside)]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[(slice(None),) * len(self.shape)].astype(dtype or self.dtype, copy=False)

    def _run(self, file: int, x: int, y: int, first: int, last: int) -> Iterator[NDArray[Any]]:
        """Blocks that lie behind one another, checked."""
        shape = (*self.shape[:-3], *self.sides)
        size = math.prod(shape) * self.dtype.itemsize
        start = int(np.ravel_multi_index((x, y, first), self.sums.shape))
        data = memoryview(os.pread(file, size * (last - first), self.offset + size * start))
        for number, expected in enumerate(self.sums[x, y, first:last]):
            block = data[size * number : size * (number + 1)]
            if len(block) != size or isal_zlib.crc32(block) != expected:
                raise ValueError(f"{self.path.name} has changed since it was written")
            yield np.frombuffer(block, dtype=self.dtype).reshape(shape)


@dataclass(frozen=True)
class StoredCase:
    """``image`` (C, X, Y, Z) float16 and ``labels`` (X, Y, Z) on the network's grid, read as they are
    sliced; ``places`` holds, per label number, flat indices of voxels that have it. An unlabelled case
    has None for labels, and no places."""

    id: str
    image: Blocks | NDArray[Any]
    labels: Blocks | NDArray[Any] | None
    places: Mapping[int, NDArray[np.int64]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along X, Y, Z."""
        return self.image.shape[1:]

    def unlabelled(self) -> StoredCase:
        """The same without what is known of it."""
        return StoredCase(self.id, self.image, None, {})


class CaseStore:
    """A folder of preprocessed cases, all by one plan (known by what of it they stand on) and configuration;
    of a second stage also by the first one's models, whose labels they hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, case: str, image: Any, labels: Any | None, places: Mapping[int, NDArray[Any]]) -> None:
        """Write a case's image (C, X, Y, Z), labels (X, Y, Z), None where it has none, and places; each of
        its files atomically."""
        about: dict[str, NDArray[Any]] = {str(number): np.asarray(where, np.int64) for number, where in places.items()}
        arrays = {"image": np.asarray(image, dtype=np.float16)}
        if labels is not None:
            arrays["labels"] = np.asarray(labels)
        about["shape"] = np.array(arrays["image"].shape[1:])
        for name, values in arrays.items():
            with atomic(self.folder / f"{case}.{name}.npy") as file:
                about[name] = _write_blocks(file, values)
        packed = io.BytesIO()
        np.savez(packed, **about)  # type: ignore[arg-type]
        with atomic(self.folder / f"{case}.places.npz") as file:
            file.write(packed.getvalue())

    def finish(self, cases: tuple[str, ...], plan: str, configuration: str, models: Sequence[str] = ()) -> None:
        """Write the index, last: a store without one is not whole. ``models`` are digests, fold by fold.
        Raises MedsegError where a case is not there any more."""
        if gone := [case for case in cases if not (self.folder / f"{case}.places.npz").exists()]:
            raise MedsegError(
                f"{len(gone)} of {len(cases)} cases, like {gone[0]}, are not in {self.folder} any more: it was moved "
                "or emptied meanwhile. Put it back and run the command again."
            )
        index = {"format": 2, "plan": plan, "configuration": configuration, "cases": list(cases)}
        write_json(self.folder / INDEX, index | ({"models": list(models)} if models else {}))

    def cases(self) -> tuple[str, ...]:
        """The ids that the index lists."""
        return tuple(read_json(self.folder / INDEX, _REMEDY)["cases"])

    def require(self, plan: str, configuration: str, models: Sequence[str] = ()) -> None:
        """InputError unless the store is whole and was made by this plan, configuration and ``models``."""
        # A store stands in RUN/CONFIGURATION, as `medseg preprocess` puts it.
        command = f"`medseg preprocess {self.folder.parent.parent} -c {configuration}`"
        index = read_json(self.folder / INDEX, f"Make it with {command}")
        if not isinstance(index, dict) or index.get("format") != 2:
            raise InputError(f"{self.folder / INDEX} has another format", f"Make it anew with {command}")
        if index.get("plan") != plan or index.get("configuration") != configuration:
            raise InputError(f"{self.folder} was preprocessed by another plan", f"Run {command} again")
        if index.get("models", []) != list(models):
            raise InputError(f"{self.folder} holds what other models of the stage before found", f"Run {command} again")

    def read(self, case: str) -> StoredCase:
        """A case, its arrays still on disk. Raises InputError where a file is missing or broken."""
        try:
            with (self.folder / f"{case}.places.npz").open("rb") as file, np.load(file, allow_pickle=False) as packed:
                about = {name: packed[name] for name in packed.files}
            shape = tuple(int(n) for n in about.pop("shape"))
            sums = about.pop("labels", None)
            labels = None if sums is None else self._blocks(f"{case}.labels.npy", (), shape, sums)
            image = self._blocks(f"{case}.image.npy", (-1,), shape, about.pop("image"))
            places = {int(name): where for name, where in about.items()}
        except (OSError, ValueError, EOFError, TypeError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(
                f"its preprocessed files in {self.folder} cannot be read ({error})", _REMEDY, case=case
            ) from None
        return StoredCase(case, image, labels, places)

    def _blocks(self, name: str, others: tuple[int, ...], shape: tuple[int, ...], sums: NDArray[np.uint32]) -> Blocks:
        """The array in a file, which must be of this shape (-1 is any) and as long as it says."""
        with (self.folder / name).open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{name} is of another version")
            stored, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            offset, length = file.tell(), os.fstat(file.fileno()).st_size
        layout = _layout(shape)
        if len(stored) != 6 + len(others) or fortran or dtype.hasobject:
            raise ValueError(f"{name} is not an array in blocks")
        others = tuple(n if other == -1 else other for n, other in zip(stored[3:-3], others, strict=True))
        if stored != (*layout[0], *others, *layout[1]) or sums.shape != layout[0] or sums.dtype != np.uint32:
            raise ValueError(f"{name} and {self.folder.name} do not fit together")
        if length != offset + math.prod(stored) * dtype.itemsize:
            raise ValueError(f"{name} has another length than it says")
        return Blocks(self.folder / name, (*others, *shape), dtype, offset, layout[1], sums)


def _layout(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """How many blocks (X, Y, Z), and their sides: as even as can be, so that little is empty."""
    x, y, z = (-(-n // _SIDE) for n in shape)
    sides = [-(-n // count) for n, count in zip(shape, (x, y, z), strict=True)]
    return (x, y, z), (sides[0], sides[1], sides[2])


def _write_blocks(file: BinaryIO, values: NDArray[Any]) -> NDArray[np.uint32]:
    """Write an array (..., X, Y, Z) in blocks; their CRC-32s."""
    others, shape = values.shape[:-3], values.shape[-3:]
    counts, sides = _layout(shape)
    header = {
        "descr": np.lib.format.dtype_to_descr(values.dtype),
        "fortran_order": False,
        "shape": (*counts, *others, *sides),
    }
    np.lib.format.write_array_header_1_0(file, header)
    sums = np.zeros(counts, dtype=np.uint32)
    everything = tuple(slice(None) for _ in others)
    for number in np.ndindex(counts):
        inside, box = _meet([range(n) for n in shape], number, sides)
        block = np.zeros((*others, *sides), dtype=values.dtype)
        block[(*everything, *inside)] = values[(*everything, *box)]
        data = block.tobytes()
        sums[number] = isal_zlib.crc32(data)
        file.write(data)
    return sums


def _meet(
    box: list[range], number: tuple[int, ...], sides: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a box and a block meet: as slices of the block, and of the box."""
    inside, outside = [], []
    for r, i, side in zip(box, number, sides, strict=True):
        first, last = max(r.start, i * side), min(r.stop, (i + 1) * side)
        inside.append(slice(first - i * side, last - i * side))
        outside.append(slice(first - r.start, last - r.start))
    return tuple(inside), tuple(outside)

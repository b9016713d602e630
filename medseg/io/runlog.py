"""What a training run leaves while it runs: a checkpoint to go on from, and its log."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from medseg.core.errors import InputError
from medseg.io.files import alone, atomic, write_bytes, write_text

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter


class Tracker(Protocol):
    """Something elsewhere that is told how runs fare."""

    def tell(self, run: Path, step: int, numbers: Mapping[str, float]) -> None:
        """A run, known by its folder, stands so at a step. Never raises: a run does not end for it."""


class RunLog:
    """A folder with ``checkpoint.safetensors``, the one before it, the last of those that a run may go back
    to (``checkpoint.kept.safetensors``), ``log.jsonl``, TensorBoard's events and a picture of the
    validation cases.

    It must lie outside whatever a workflow deletes before it runs a job again. ``tracker``, where
    there is one, is told the numbers too.
    """

    def __init__(self, folder: Path, tracker: Tracker | None = None) -> None:
        self.folder = folder
        self._tracker = tracker
        self._board: SummaryWriter | None = None

    def of(self, run: str) -> RunLog:
        """The place of one run among several."""
        return RunLog(self.folder / run, self._tracker)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def _earlier(self) -> Path:
        return self.folder / "checkpoint.earlier.safetensors"

    @property
    def _kept(self) -> Path:
        return self.folder / "checkpoint.kept.safetensors"

    @property
    def _log(self) -> Path:
        return self.folder / "log.jsonl"

    @contextlib.contextmanager
    def alone(self, write: bool = True) -> Iterator[None]:
        """No other run writes here meanwhile; MedsegError where one does. One that does not ``write`` needs no lock."""
        if not write:
            yield
            return
        with alone(self.folder / "lock", "another training"):
            yield

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: bool = False) -> None:
        """Write a checkpoint atomically: tensors by name, and what JSON can hold. The one before it stays.
        With ``keep`` it is the one to go back to too, until the next of these."""
        from safetensors.torch import save

        data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"state": json.dumps(dict(state))})
        if keep:  # first: a run that goes on from here must find it
            write_bytes(self._kept, data)
        with atomic(self._checkpoint) as file:
            file.write(data)
            if self._checkpoint.exists():  # should this be the last that is done, `load` takes the earlier one
                self._checkpoint.replace(self._earlier)

    def load(self, *, kept: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last checkpoint that can be read, or the ``kept`` one; None where there is none. Raises
        InputError where there are some and none can be read."""
        faults: list[str] = []
        for path in (self._kept,) if kept else (self._checkpoint, self._earlier):
            if path.exists():
                try:
                    found = _read(path)
                    if faults:  # or it would take the good one's place
                        self._checkpoint.replace(self.folder / "checkpoint.broken.safetensors")
                    return found
                except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                    faults.append(f"{path} cannot be read ({error})")
        if faults:
            raise InputError("; ".join(faults), "Delete it to start the training anew")
        return None

    def records(self) -> list[dict[str, Any]]:
        """The log's records so far; a last line that was not finished is left out."""
        if not self._log.exists():
            return []
        found = []
        for line in self._log.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def rewind(self, step: int) -> None:
        """Forget records after a step, which the run is about to do again."""
        write_text(self._log, "".join(json.dumps(r) + "\n" for r in self.records() if r["step"] <= step))

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record (with a "step") to the log, and its numbers to TensorBoard and the tracker."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as file:
            file.write(json.dumps(dict(record)) + "\n")
        numbers = _numbers(record)
        board = self._writer()
        for name, value in numbers.items():
            board.add_scalar(name, value, record["step"])
        board.flush()
        if self._tracker:
            self._tracker.tell(self.folder, record["step"], numbers)

    def picture(self, step: int, image: NDArray[np.uint8]) -> None:
        """Keep a picture (height, width, 3) as ``validation.png``, in the place of the one before, and
        in TensorBoard."""
        from PIL import Image

        with atomic(self.folder / "validation.png") as file:
            Image.fromarray(image).save(file, format="PNG")
        self._writer().add_image("validation", image, step, dataformats="HWC")

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _writer(self) -> SummaryWriter:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"))
        return self._board


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record but its step, by name; those of a dictionary in it by "name/key"."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": number for key, number in value.items() if number is not None}
        elif isinstance(value, int | float) and name != "step":
            found[name] = value
    return found

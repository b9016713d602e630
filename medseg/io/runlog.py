"""What a training run leaves while it runs: a checkpoint to go on from, and its log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.core.errors import InputError
from medseg.io.files import atomic, write_text

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """A folder with ``checkpoint.safetensors``, ``log.jsonl`` and TensorBoard's events.

    It must lie outside whatever a workflow deletes before it runs a job again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._board: SummaryWriter | None = None

    def of(self, run: str) -> RunLog:
        """The place of one run among several."""
        return RunLog(self.folder / run)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def _log(self) -> Path:
        return self.folder / "log.jsonl"

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint atomically: tensors by name, and what JSON can hold."""
        from safetensors.torch import save

        data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"state": json.dumps(dict(state))})
        with atomic(self._checkpoint) as file:
            file.write(data)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint, or None where there is none. Raises InputError where it cannot be read."""
        from safetensors import SafetensorError, safe_open

        if not self._checkpoint.exists():
            return None
        try:
            with safe_open(self._checkpoint, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._checkpoint} cannot be read ({error})", "Delete it to start the training anew"
            ) from None

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
        """Add a record (with a "step") to the log, and its numbers to TensorBoard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as file:
            file.write(json.dumps(dict(record)) + "\n")
        board = self._writer()
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                board.add_scalar(name, value, record["step"])
            elif isinstance(value, dict):
                for key, number in value.items():
                    if number is not None:
                        board.add_scalar(f"{name}/{key}", number, record["step"])
        board.flush()

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

"""The weights in nnU-Net's checkpoints, which are pickles: read in a process that may do no harm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.core.errors import InputError, MedsegError

if TYPE_CHECKING:
    from torch import Tensor

_CHILD = Path(__file__).with_name("checkpoint_child.py")
_SPARE_MEMORY = 1 << 29
_BASE_SECONDS = 60
_SLOWEST = 5_000_000  # bytes a second
_AGAIN = "Copy it again from where it was trained"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What is taken from one: its weights by nnU-Net's names (each tensor once), who trained what on
    which fold, and the axes (of the network's) that were mirrored in training."""

    weights: dict[str, Tensor]
    trainer: str
    configuration: str
    fold: str
    mirror: tuple[int, ...]


def read_checkpoints(paths: list[Path]) -> list[Checkpoint]:
    """The checkpoints, in their order.

    Raises InputError for one that is damaged, that is none of nnU-Net's, or whose pickle asks for
    anything but tensors and numbers, which is named and not run; MedsegError where memory does not
    suffice.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="medseg-") as folder:
        answer = _in_child(paths, Path(folder))
        if "error" in answer:
            raise _refusal(paths[answer["number"]], answer)
        return [
            Checkpoint(
                weights=load_file(Path(folder) / f"{number}.safetensors"),
                trainer=one["trainer"],
                configuration=one["configuration"],
                fold=one["fold"],
                mirror=tuple(one["mirror"]),
            )
            for number, one in enumerate(answer["checkpoints"])
        ]


def _in_child(paths: list[Path], folder: Path) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in paths]
    seconds = _BASE_SECONDS + sum(sizes) // _SLOWEST
    limits = [3 * max(sizes) + _SPARE_MEMORY, seconds, 2 * max(sizes) + 1024]
    try:
        # -P: what lies beside the child is no module of its own.
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-P", str(_CHILD), str(folder), *map(str, limits), *(str(p.absolute()) for p in paths)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=2 * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"reading the checkpoints took more than {2 * seconds} s and was stopped", _AGAIN) from None
    if done.returncode < 0:
        word = signal.Signals(-done.returncode).name
        raise InputError(f"a checkpoint crashes its reader ({word})", f"Take care where it comes from. {_AGAIN}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise MedsegError(
            f"the reader of checkpoints failed (exit status {done.returncode}). Is torch sound?"
        ) from None
    return answer


def _refusal(path: Path, answer: dict[str, Any]) -> MedsegError:
    where = f"{path.parent.name}/{path.name}"
    if answer["error"] == "memory":
        return MedsegError(f"{where} needs more memory than there is, or than its size lets expect")
    if answer["error"] == "unwanted":
        names = "".join(c if c.isprintable() else "?" for c in ", ".join(answer["names"]))[:200]
        return InputError(
            f"{where} wants to run {names or 'more than tensors and numbers'}, and was not allowed to",
            "Take care where it comes from; a checkpoint holds weights and numbers alone",
        )
    if answer["error"] == "other":
        return InputError(f"{where} is no checkpoint of nnU-Net v2", "Name a model that nnUNetv2_train wrote")
    return InputError(f"{where} is truncated or damaged", _AGAIN)

"""Run in a process of its own, never imported: takes the weights out of nnU-Net's checkpoints.

    python checkpoint_child.py FOLDER MEMORY SECONDS BYTES CHECKPOINT ...

Writes FOLDER/0.safetensors, 1.safetensors, ... and prints as JSON what else is of use, or
``{"error": ...}``. Nothing that a checkpoint names is run: its pickle may build tensors, plain
containers and numpy's numbers, and whatever else it asks for is reported. It may take MEMORY bytes
beyond torch, SECONDS of processor time, and write BYTES to a file.
"""

import json
import pickle
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from safetensors.torch import save_file

_DTYPES = [getattr(np.dtypes, f"{n}DType") for n in ("Float16", "Float32", "Float64", "Int32", "Int64", "Bool")]
# numpy's numbers, in its own words and in those before numpy 2: nnU-Net logs with them.
_NUMBERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *_DTYPES,
]


def _limit(memory: int, seconds: int, size: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _twice(name: str) -> bool:
    """Whether nnU-Net's networks hold this tensor under another name too."""
    return ".all_modules." in name or name.startswith("decoder.encoder.")


def _take(path: str, into: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(_NUMBERS):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    weights = {}
    for name, tensor in checkpoint["network_weights"].items():
        plain = name.removeprefix("module.").removeprefix("_orig_mod.")
        if not _twice(plain):
            weights[plain] = tensor.detach().to(torch.float32).contiguous().clone()
    save_file(weights, into)
    mirror = checkpoint.get("inference_allowed_mirroring_axes")
    return {
        "trainer": str(checkpoint["trainer_name"]),
        "configuration": str(checkpoint["init_args"]["configuration"]),
        "fold": str(checkpoint["init_args"]["fold"]),
        "mirror": [int(axis) for axis in mirror or ()],
    }


def _unwanted(path: str) -> list[str]:
    """What a checkpoint asks for that it does not get. Its pickle is read, not run."""
    with torch.serialization.safe_globals(_NUMBERS):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))


def _answer(folder: str, paths: list[str]) -> dict[str, Any]:
    found = []
    for number, path in enumerate(paths):
        try:
            found.append(_take(path, Path(folder) / f"{number}.safetensors"))
        except MemoryError:
            return {"error": "memory", "number": number}
        except pickle.UnpicklingError:
            return {"error": "unwanted", "number": number, "names": _unwanted(path)}
        except (KeyError, TypeError, AttributeError):
            return {"error": "other", "number": number}
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            short = any(words in str(error) for words in ("allocate", "bad_alloc", "not enough memory"))
            return {"error": "memory" if short else "damaged", "number": number}
    return {"checkpoints": found}


def main() -> None:
    """As above."""
    folder, memory, seconds, size, *paths = sys.argv[1:]
    torch.set_num_threads(1)
    _limit(int(memory), int(seconds), int(size))
    sys.stdout.write(json.dumps(_answer(folder, paths)))


if __name__ == "__main__":
    main()

"""Run in a process of its own, never imported: imports libraries one by one, and says how that went.

    python import_child.py NAME ...

Prints a line of JSON before and after each: ``{"starts": NAME}``, then ``{"name": NAME, "error": null or text}``,
so that whoever reads knows which one a crash was in; and last ``{"openmp": [...], "torch": {...} or null}``.
OpenVINO is kept from loading its telemetry.
"""

import importlib
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

_OUT = os.fdopen(os.dup(1), "w")


def _tell(**what: Any) -> None:
    _OUT.write(json.dumps(what) + "\n")
    _OUT.flush()


def _error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except BaseException as error:  # noqa: BLE001 - a library may raise anything, SystemExit too
        return f"{type(error).__name__}: {error}"
    return None


def _openmp() -> list[str]:
    """The kinds of OpenMP runtimes that are loaded: GNU's, Intel's, LLVM's."""
    kinds = {"libgomp": "GNU's", "libiomp5": "Intel's", "libomp": "LLVM's"}
    names = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return sorted({kinds[found[1]] for name in names if (found := re.match(r"(libgomp|libiomp5|libomp)[-.]", name))})


def _torch() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda"):
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            devices = [
                [torch.cuda.get_device_name(n), *reversed(torch.cuda.mem_get_info(n))] for n in range(count)
            ]  # name, all, free
        except RuntimeError as error:
            devices = []
            warnings.warn(str(error), stacklevel=1)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else ""
    words = " ".join(dict.fromkeys(re.sub(r"\s*\(Triggered internally.*", "", str(one.message)) for one in said))
    return {"version": torch.__version__, "built_for": built, "devices": devices, "said": words}


def main() -> None:
    """As above."""
    os.dup2(2, 1)  # what libraries print while they are imported
    warnings.simplefilter("ignore")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    sys.modules["openvino.tools.ovc"] = None  # type: ignore[assignment]
    for name in sys.argv[1:]:
        _tell(starts=name)
        _tell(name=name, error=_error(name))
    _tell(openmp=_openmp(), torch=_torch())


if __name__ == "__main__":
    main()

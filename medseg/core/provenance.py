"""Where a result comes from: versions and hashes, the same few words in every file written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import medseg

_PACKAGES = ("torch", "monai", "openvino", "numpy", "scipy", "nibabel")


def versions() -> dict[str, str]:
    """Versions of medseg, Python and the libraries that results depend on."""
    found = {"medseg": medseg.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """Kind of machine, without its name or its user's: system, processor, cores that this process may use and
    memory in GiB."""
    return {
        "system": platform.system(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }


def processor_name() -> str:
    """What the processor is called, where Linux says."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.machine()


def digest(value: Any) -> str:
    """SHA-256 of bytes, or of anything JSON can hold, with keys in a fixed order."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(data).hexdigest()

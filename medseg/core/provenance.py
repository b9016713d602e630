"""Where a result comes from: versions and hashes, the same few words in every file written."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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


def machine() -> dict[str, str]:
    """Kind of machine, without its name or its user's."""
    return {"system": platform.system(), "processor": platform.machine()}


def digest(value: Any) -> str:
    """SHA-256 of bytes, or of anything JSON can hold, with keys in a fixed order."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(data).hexdigest()

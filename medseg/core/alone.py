"""Libraries that take others along which nobody here needs."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def import_alone(name: str, *others: str) -> Any:
    """Import a package as if ``others`` were not installed, where it can do without.

    Those that are loaded already stay, and the others can be imported afterwards. Raises ImportError
    where the package itself is missing.
    """
    absent = [] if name in sys.modules else [other for other in others if other not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        return import_module(name)
    finally:
        for other in absent:
            if sys.modules.get(other) is None:
                del sys.modules[other]

"""What others report of a Decathlon task, with where it stands and under which protocol."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any

from medseg.report.page import Published


def published(task: str, *, cases: int, all_folds: bool, by_subject: bool) -> tuple[Published, ...]:
    """The published results of a ``task`` (the name of its folder), best first; none for a task that has none.

    ``alike`` are those of five-fold cross-validation, beside a run whose configurations each scored all of five folds
    (``all_folds``) and as many ``cases``. Where subjects have several cases, and the run's folds keep them together
    (``by_subject``), folds by case are another protocol. Even those that are alike had folds of their own.
    """
    found = []
    for entry in _document()["entries"]:
        dice, mean = entry.get("dice", {}).get(task, []), entry.get("dice_mean", {}).get(task)
        if not dice and mean is None:
            continue
        same = all_folds and cases == _document()["training_cases"].get(task)
        alike = same and (entry["folds"] == "five" or (entry["folds"] is not None and not by_subject))
        each = tuple(map(float, dice))
        over_all = fmean(each) if mean is None else float(mean)
        found.append(Published(entry["system"], entry["protocol"], entry["source"], each, over_all, alike))
    return tuple(sorted(found, key=lambda one: -one.mean))


@cache
def _document() -> dict[str, Any]:
    text = (files("medseg.report") / "published.json").read_text("utf-8")
    document: dict[str, Any] = json.loads(text)
    return document

"""One page over many scans: how many are done, which are not and why, how large the organs are, what it cost."""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medseg.core.words import count, duration, size
from medseg.report.page import environment, resource

STATES = ("done", "failed", "not done", "lost")
# Scans and reasons that the page names; the CSV files name all.
_NAMED = 200
_REASONS = 30
# Different reasons that are counted, of a million scans; further ones are one.
_MOST_REASONS = 2000
_QUANTILES = {"p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}


@dataclass(frozen=True)
class Row:
    """A scan of the archive: its state, one of `STATES`, and the reason where it is not done; its result's path; bytes;
    seconds of computing; why a person should look at it; volumes in ml by organ."""

    name: str
    scan: str
    shard: int
    state: str
    reason: str
    result: str
    size: int
    seconds: float | None
    review: tuple[str, ...]
    volumes: Mapping[str, float]


_COLUMNS = ("name", "scan", "shard", "state", "reason", "flagged", "seconds", "bytes", "result", "volumes_ml")
HEAD = (",".join(_COLUMNS) + "\r\n").encode()


def csv_line(row: Row) -> bytes:
    """A scan as a line of CSV, UTF-8. Volumes are one column, ``liver=1432.1; spleen=201.4``."""
    text = io.StringIO()
    volumes = "; ".join(f"{organ}={ml:g}" for organ, ml in row.volumes.items())
    seconds = "" if row.seconds is None else f"{row.seconds:g}"
    flagged = "; ".join(row.review)
    cells = (row.name, row.scan, row.shard, row.state, row.reason, flagged, seconds, row.size, row.result, volumes)
    csv.writer(text).writerow([_harmless(cell) for cell in cells])
    return text.getvalue().encode("utf-8", "replace")


def _harmless(cell: object) -> object:
    """Spreadsheets take a text that begins so for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


@dataclass
class Collected:
    """What is counted while rows go by; eight bytes are kept of each number, and nothing else of a row."""

    states: Counter[str] = field(default_factory=Counter)
    flagged: int = 0
    size: int = 0
    seconds: array[float] = field(default_factory=lambda: array("d"))
    volumes: dict[str, array[float]] = field(default_factory=lambda: defaultdict(lambda: array("d")))
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    review: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    shards: Counter[str] = field(default_factory=Counter)
    core_seconds: float = 0.0
    unread: int = 0
    strangers: int = 0

    def log(self, head: Mapping[str, Any], core_seconds: float, unread: int) -> None:
        """What a shard's log tells of itself; ``head`` is empty where it was never started."""
        self.shards["all"] += 1
        self.core_seconds += core_seconds
        self.unread += unread
        if head:
            self.shards["begun"] += 1
            self.models[str(head.get("model_sha256"))] = str(head.get("model"))

    def add(self, row: Row) -> None:
        """Count a scan."""
        self.states[row.state] += 1
        self.size += row.size
        if row.seconds is not None:
            self.seconds.append(row.seconds)
        for organ, ml in row.volumes.items():
            self.volumes[organ].append(ml)
        if row.review:
            self.flagged += 1
            for reason in {_alike(reason, row.name) for reason in row.review}:
                self.flags[self._known(self.flags, reason)] += 1
            if len(self.review) < _NAMED:
                self.review.append({"name": row.name, "why": "; ".join(row.review)})
        if row.state != "done":
            key = (row.state, _alike(row.reason, row.name))
            self.reasons[self._known(self.reasons, key, (row.state, "another reason"))] += 1
            if len(self.wrong) < _NAMED:
                self.wrong.append({"name": row.name, "state": row.state, "why": row.reason, "shard": row.shard})

    @staticmethod
    def _known(counted: Counter[Any], key: Any, other: Any = "another reason") -> Any:
        return key if key in counted or len(counted) < _MOST_REASONS else other

    def summary(self) -> dict[str, Any]:
        """What was counted, as JSON has it. ``faults`` are those for which the archive is not whole."""
        states = {"all": self.states.total(), "flagged": self.flagged} | {s: self.states[s] for s in STATES}
        faults = []
        if states["not done"]:
            faults.append(
                f"{count(states['not done'], 'scan')} not done. Start the shards again that are not at their end"
            )
        if states["lost"]:
            faults.append(
                f"the files of {count(states['lost'], 'scan')} are gone. Start their shards again with --mend"
            )
        if self.strangers:
            faults.append(f"the logs tell of {count(self.strangers, 'scan')} that the manifest does not have")
        if len(self.models) > 1:
            faults.append(f"{len(self.models)} different models were used")
        notes = [f"{count(self.unread, 'line')} of the logs could not be read"] if self.unread else []
        done = max(1, states["done"])
        return {
            "format": 1,
            "scans": states,
            "shards": {"all": self.shards["all"], "begun": self.shards["begun"]},
            "models": [{"name": name, "sha256": digest} for digest, name in self.models.items()],
            "bytes": self.size,
            "cost": {
                "core_hours": round(self.core_seconds / 3600, 6),
                "core_seconds_of_a_scan": round(self.core_seconds / done, 3),
                "seconds_of_computing": _spread(self.seconds),
            },
            "volumes_ml": {organ: _spread(values, above=0.0) for organ, values in self.volumes.items()},
            "reasons": [
                {"state": state, "reason": reason, "scans": n}
                for (state, reason), n in self.reasons.most_common(_REASONS)
            ],
            "flags": [{"reason": reason, "scans": n} for reason, n in self.flags.most_common(_REASONS)],
            "not_done": self.wrong,
            "review": self.review,
            "faults": faults,
            "notes": notes,
        }


def _alike(reason: str, name: str) -> str:
    """A reason without what differs from scan to scan."""
    return re.sub(r"\d+(\.\d+)?", "N", reason.replace(name, "…"))


def _spread(values: Sequence[float], above: float | None = None) -> dict[str, float | int]:
    """How many numbers there are, of them those ``above``, and how these lie."""
    every = np.asarray(values, dtype=np.float64)
    some = every if above is None else every[every > above]
    told: dict[str, float | int] = {"scans": len(every), "counted": len(some)}
    if len(some):
        told |= {"mean": round(float(some.mean()), 4), "least": round(float(some.min()), 4)}
        told |= {k: round(float(np.percentile(some, q)), 4) for k, q in _QUANTILES.items()}
        told |= {"most": round(float(some.max()), 4)}
    return told


def archive_report(title: str, told: Mapping[str, Any]) -> str:
    """The page as one HTML text, which loads nothing, of what `Collected.summary` tells."""
    states, cost = told["scans"], told["cost"]
    headline = (
        f"{states['done']} of {count(states['all'], 'scan')} done, {states['flagged']} of them flagged for review. "
        f"{states['failed']} failed, {states['not done']} not done, {states['lost']} lost."
    )
    took = cost["seconds_of_computing"]
    facts = {
        "model": ", ".join(f"{one['name']} {one['sha256'][:16]}" for one in told["models"]) or "–",
        "shards begun": f"{told['shards']['begun']} of {told['shards']['all']}",
        "scans, in all": size(told["bytes"]),
        "core hours": f"{cost['core_hours']:.3g}",
        "core seconds of a scan, all included": f"{cost['core_seconds_of_a_scan']:g}",
    }
    if "median" in took:
        facts["computing of a scan: median, 95 %"] = f"{duration(took['median'])}, {duration(took['p95'])}"
    context = {
        "title": title,
        "headline": headline,
        "told": told,
        "facts": facts,
        "organs": [(name, one, _box(one)) for name, one in told["volumes_ml"].items()],
        "script": resource("tables.js"),
    }
    return environment().get_template("archive.html.j2").render(context)


def _box(one: Mapping[str, float]) -> dict[str, float] | None:
    """Where a volume's percentiles lie on a line of 100, whose end is the largest."""
    if not one.get("most"):
        return None
    at = {name: round(100 * one[name] / one["most"], 2) for name in _QUANTILES}
    return at | {"width": round(max(at["p75"] - at["p25"], 0.5), 2)}

"""What a check of this machine found: one line each, with how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """``text`` says what is so; ``remedy`` how to mend it, "" where nothing needs mending. A problem makes the machine
    unfit for use, a note does not."""

    section: str
    verdict: Verdict
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.text}. {self.remedy}." if self.remedy else self.text


def fit(findings: Iterable[Finding]) -> bool:
    """Whether there is no problem."""
    return all(one.verdict != "problem" for one in findings)

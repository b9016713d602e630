"""The names behind the numbers of a label map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from medseg.core.errors import InputError


@dataclass(frozen=True)
class Label:
    """A structure: its name, the number that stands for it, and a code of a terminology
    (``"SCT:64033007"`` is the kidney in SNOMED CT) where one is known."""

    name: str
    number: int
    code: str | None = None


@dataclass(frozen=True)
class LabelSet:
    """The structures of a label map, in ascending order of their numbers. 0 is the background,
    always, and is not listed. Numbers need not be consecutive.

    Raises InputError for a number below one and for a number or name that comes twice.
    """

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(sorted(self.labels, key=lambda label: label.number)))
        for label in self.labels:
            if label.number < 1:
                raise InputError(
                    f"label {label.name!r} has the number {label.number}",
                    "Number the structures from 1; 0 is the background",
                )
        for what, values in (("number", self.numbers), ("name", self.names)):
            twice = sorted({str(v) for v in values if list(values).count(v) > 1})
            if twice:
                raise InputError(f"the label {what} {', '.join(twice)} comes twice", f"Give each label its own {what}")

    @classmethod
    def from_names(cls, names: Iterable[str]) -> LabelSet:
        """Labels 1, 2, 3, ... of the names given."""
        return cls(tuple(Label(name, number) for number, name in enumerate(names, start=1)))

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(label.number for label in self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    def name_of(self, number: int) -> str:
        """The name of a number; InputError where the set does not hold it."""
        for label in self.labels:
            if label.number == number:
                return label.name
        raise InputError(f"no label has the number {number}", f"The labels are {self}")

    def __iter__(self) -> Iterator[Label]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return ", ".join(f"{label.number} {label.name}" for label in self.labels)

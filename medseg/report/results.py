"""``results.json``: what runs reached, with all that is needed to repeat them; and how two of them differ.

What is said of a part is one of four words: "equal" (to the bit, or of scores up to rounding), "within tolerance"
(another training of the same plan on other hardware), "different", and "not there".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from medseg.core.errors import InputError
from medseg.core.provenance import digest
from medseg.core.words import count
from medseg.evaluate.score import FORMAT_VERSION as SCORES
from medseg.evaluate.score import CaseMetrics, from_json, summarise
from medseg.plan.plan import Count, Share, Steps, Strict

# Of the same label maps the same scores follow, but for the last digits of another processor's arithmetic.
ROUNDING = 1e-9
# About what another order of adding moves an organ's mean by, and less than another seed does (docs/benchmarks.md).
DICE_TOLERANCE = 0.005

Verdict = Literal["equal", "within tolerance", "different", "not there"]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds control characters")
    return text


def _inner(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text:
        raise ValueError(f"{text!r} leads out of its folder")
    return text


Text = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
Inner = Annotated[Text, Field(min_length=1), AfterValidator(_inner)]
# Names that become folders.
Name = Annotated[Text, Field(pattern=r"^[^/\\.][^/\\]*$")]
Sha = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Natural = Annotated[int, Field(ge=0, le=2**62)]
# With an option for each of a hundred organs.
Command = Annotated[str, Field(max_length=100_000), AfterValidator(_printable)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Tolerance(Strict):
    """How far the mean ``dice`` of an organ may lie from the recorded one where networks were trained anew and
    came out with other weights: absolute, of each fold."""

    dice: Annotated[float, Field(ge=0, le=1)] = DICE_TOLERANCE


class Protocol(Strict):
    """What a benchmark fixes: which ``configurations`` of a ``family``, which ``folds`` of how many, by which
    ``seeds``, and for how many ``steps`` each network is trained, whatever time that takes. ``machine`` and ``memory``
    are what plans are made for. Another ``version`` is another protocol, whose results are not compared."""

    name: Text
    version: Count
    description: Text = ""
    configurations: Annotated[tuple[Name, ...], Field(min_length=1)]
    folds: Annotated[tuple[Natural, ...], Field(min_length=1)]
    of_folds: Annotated[int, Field(ge=2, le=1000)]
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)]
    family: Text = "unet"
    steps: Steps
    machine: Literal["cpu", "gpu"] = "cpu"
    memory: Text = "4GiB"
    tolerance: Tolerance = Tolerance()

    @model_validator(mode="after")
    def _sound(self) -> Protocol:
        if max(self.folds) >= self.of_folds:
            raise ValueError(f"fold {max(self.folds)} of {self.of_folds}: valid are 0 to {self.of_folds - 1}")
        for what in (self.configurations, self.folds, self.seeds):
            if len(set(what)) < len(what):
                raise ValueError(f"{what} names one twice")
        return self


class Software(Strict):
    """Which medseg recorded the results: its ``commit`` where it is a clone, and whether that was changed (``dirty``);
    ``constraints``: SHA-256 of the file that pins versions, and where what was installed departs from it."""

    medseg: Text
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40,64}$")] | None = None
    dirty: bool | None = None
    versions: dict[Text, Text]
    constraints: Sha | None = None
    departures: tuple[Text, ...] = ()


class DataFile(Strict):
    """A file, from its task's folder on."""

    path: Inner
    sha256: Sha
    bytes: Natural


class Data(Strict):
    """All files of a task; ``sha256`` is that of the list of their paths and hashes."""

    sha256: Sha
    licence: Text = ""
    files: Annotated[tuple[DataFile, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _agree(self) -> Data:
        if self.sha256 != listed({file.path: file.sha256 for file in self.files}):
            raise ValueError("the hash of the whole is not that of its files")
        return self


class PlanFile(Strict):
    """The plan's file from the folder of results.json on, its hash, and that of what it decides, whatever its
    reasons, costs and layout are."""

    path: Inner
    sha256: Sha
    decides: Sha


class Predicted(Strict):
    """The label map of a case, from the fold's folder on."""

    case: Text
    path: Inner
    sha256: Sha


class Organ(Strict):
    """The mean scores of an organ, of all for ``label`` None."""

    label: Natural | None
    name: Text
    cases: Natural
    missed: Natural
    invented: Natural
    dice: Share | None
    nsd: Share | None
    hd95_mm: Seconds | None


class Fit(Strict):
    """One fold of one configuration, trained by a ``seed``. ``weights`` are files from the fold's folder on, ``model``
    is the package's digest, ``engine`` what predicted, None where that is not known; ``rows`` are the scores of each
    case and organ, as in metrics.json."""

    configuration: Name
    fold: Natural
    seed: Natural
    steps: Steps
    device: Text
    threads: Natural | None
    deterministic: bool
    started_from: Sha | None = None
    machine: dict[Text, Text | Natural]
    versions: dict[Text, Text]
    seconds: Seconds
    ended: Text | None = None
    peak_memory_bytes: Natural | None = None
    model: Sha
    weights: Annotated[dict[Inner, Sha], Field(min_length=1)]
    engine: Literal["openvino", "torch-cpu", "torch-cuda"] | None = None
    predictions: Annotated[tuple[Predicted, ...], Field(min_length=1)]
    organs: tuple[Organ, ...]
    rows: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _readable(self) -> Fit:
        try:
            scores = self.scores
        except InputError as error:
            raise ValueError(error.fault) from None
        for row in scores:
            for text in (row.case, row.subject, row.name):
                _printable(text)
        return self

    @property
    def name(self) -> str:
        return f"{self.configuration} fold {self.fold}"

    @property
    def scores(self) -> list[CaseMetrics]:
        """The rows, checked."""
        return from_json({"format": SCORES, "provenance": None, "rows": list(self.rows), "summary": []})


class TaskResults(Strict):
    """A ``run`` on a task: its folder from that of results.json on."""

    task: Name
    run: Inner
    data: Data
    plan: PlanFile
    folds: Sha
    fits: Annotated[tuple[Fit, ...], Field(min_length=1)]
    commands: tuple[Command, ...]

    @model_validator(mode="after")
    def _once(self) -> TaskResults:
        if len({fit.name for fit in self.fits}) < len(self.fits):
            raise ValueError("a fold comes twice")
        return self


class Results(Strict):
    """What ``results.json`` holds."""

    format: Literal[1]
    protocol: Protocol | None
    tolerance: Tolerance
    software: Software
    machine: dict[Text, Text | Natural]
    tasks: Annotated[tuple[TaskResults, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _once(self) -> Results:
        if len({one.run for one in self.tasks}) < len(self.tasks):
            raise ValueError("a run comes twice")
        return self


def parse(value: Any, where: str) -> Results:
    """Results from what JSON held; InputError naming the first thing that is wrong."""
    return _parsed(Results, value, where, "Get it again from whoever published it, or make it with `medseg record`")


def parse_protocol(value: Any, where: str) -> Protocol:
    """Likewise a protocol."""
    return _parsed(Protocol, value, where, "Correct it; docs/benchmarks.md says what a protocol holds")


def _parsed(kind: Any, value: Any, where: str, remedy: str) -> Any:
    try:
        # By way of JSON, since strictness without it would want tuples where JSON has lists.
        return kind.model_validate_json(json.dumps(value), strict=True)
    except (ValidationError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise InputError(f"{where} cannot be read ({error})", remedy) from None
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        message = "".join(c if c.isprintable() else " " for c in f"{key}: {first['msg']}")[:300]
        raise InputError(f"{where} is not sound: {message}", remedy) from None


def listed(files: Mapping[str, str]) -> str:
    """One hash of many files: of the list of their paths and hashes, in the order of the paths."""
    return digest([[path, files[path]] for path in sorted(files)])


def organs(rows: Iterable[CaseMetrics]) -> tuple[Organ, ...]:
    """The means of each organ, and of all."""
    return tuple(
        Organ(
            label=one.label,
            name=one.name,
            cases=one.cases,
            missed=one.missed,
            invented=one.invented,
            dice=one.dice_mean,
            nsd=one.nsd_mean,
            hd95_mm=one.hd95_mean_mm,
        )
        for one in summarise(rows)
    )


def require_followed(protocol: Protocol, tasks: Sequence[TaskResults]) -> None:
    """InputError where a run trained another fold, by another seed or for other steps than the protocol says, or where
    a seed's run is missing."""
    wanted = {(name, fold) for name in protocol.configurations for fold in protocol.folds}
    seen: dict[str, set[int]] = {}
    for one in tasks:
        if {(fit.configuration, fit.fold) for fit in one.fits} != wanted:
            raise _departs(protocol, f"{one.run} has {', '.join(fit.name for fit in one.fits)}")
        for fit in one.fits:
            if fit.seed not in protocol.seeds or fit.steps != protocol.steps or fit.started_from:
                start = ", from another model" if fit.started_from else ""
                raise _departs(
                    protocol, f"{one.run} trained {fit.name} for {fit.steps} steps by seed {fit.seed}{start}"
                )
            seen.setdefault(one.task, set()).add(fit.seed)
    for task, seeds in seen.items():
        if missing := sorted(set(protocol.seeds) - seeds):
            raise _departs(protocol, f"{task} has no run of seed {missing[0]}")


def _departs(protocol: Protocol, what: str) -> InputError:
    return InputError(
        f"{what}, which is not the protocol {protocol.name} {protocol.version}",
        "Run `snakemake benchmark`, or record without --protocol",
    )


@dataclass(frozen=True)
class Finding:
    """What is said of a ``part`` (data, plan, folds, model, weights, predictions, scores, organs) of a place:
    ``where`` names the task, the fold, the case or the organ, ``what`` by how much."""

    part: str
    where: str
    verdict: Verdict
    what: str = ""


def compare_values(part: str, where: str, recorded: Any, found: Any) -> Finding:
    """Whether one value is what was recorded; None is not there."""
    if found is None:
        return Finding(part, where, "not there")
    if recorded == found:
        return Finding(part, where, "equal", "to the bit")
    return Finding(part, where, "different", f"{_short(found)}, recorded is {_short(recorded)}")


def compare_files(part: str, where: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> list[Finding]:
    """Whether files have the recorded hashes: one finding where all are as recorded or none is there, else one for
    each that is not. A file that is missing where others are there is a difference."""
    if not found:
        return [Finding(part, where, "not there", count(len(recorded), "file"))]
    amiss = [Finding(part, f"{where}, {path}", "different", "missing") for path in recorded if path not in found]
    amiss += [
        Finding(part, f"{where}, {path}", "different", f"SHA-256 {found[path][:12]}…, recorded is {sha[:12]}…")
        for path, sha in recorded.items()
        if path in found and found[path] != sha
    ]
    amiss += [
        Finding(part, f"{where}, {path}", "different", "was not recorded") for path in found if path not in recorded
    ]
    return amiss or [Finding(part, where, "equal", f"to the bit, {count(len(recorded), 'file')}")]


def compare_rows(where: str, recorded: Sequence[CaseMetrics], found: Sequence[CaseMetrics]) -> list[Finding]:
    """Whether label maps that are the recorded ones have the recorded scores, case by case and organ by organ, up to
    rounding."""
    ours, theirs = ({(row.case, row.label): row for row in rows} for rows in (recorded, found))
    amiss = [
        Finding("scores", f"{where}, case {theirs[key].case}, {theirs[key].name}", "different", "has no recorded score")
        for key in theirs
        if key not in ours
    ]
    for key, row in ours.items():
        place = f"{where}, case {row.case}, {row.name}"
        if key not in theirs:
            amiss.append(Finding("scores", place, "different", "is recorded, and is no score of this fold"))
        elif differ := _differing(row, theirs[key]):
            amiss.append(Finding("scores", place, "different", "; ".join(differ[:4])))
    cases = len({row.case for row in recorded})
    return amiss or [Finding("scores", where, "equal", f"scored anew, {count(cases, 'case')}")]


def _differing(recorded: CaseMetrics, found: CaseMetrics) -> list[str]:
    pairs = ((field.name, getattr(recorded, field.name), getattr(found, field.name)) for field in fields(CaseMetrics))
    return [
        f"{name} is {_figure(here)}, recorded is {_figure(there)}"
        for name, there, here in pairs
        if not _same(there, here)
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=ROUNDING)
    return bool(one == other)


def compare_organs(
    where: str, recorded: Sequence[Organ], found: Sequence[Organ], tolerance: float | None
) -> list[Finding]:
    """Whether the means are the recorded ones: up to rounding, or, of a network trained anew that came out with other
    weights, the Dice within a ``tolerance``."""
    ours, theirs = ({one.label: one for one in organs} for organs in (recorded, found))
    if set(ours) != set(theirs):
        names = sorted({one.name for one in (*recorded, *found) if (one.label in ours) != (one.label in theirs)})
        return [Finding("organs", where, "different", f"not in both: {', '.join(names)}")]
    if tolerance is None:
        amiss = [
            Finding(
                "organs",
                f"{where}, {one.name}",
                "different",
                f"{name} is {_figure(here)}, recorded is {_figure(there)}",
            )
            for label, one in ours.items()
            for name, there in one.model_dump().items()
            if not _same(there, here := getattr(theirs[label], name))
        ]
        return amiss or [Finding("organs", where, "equal", "means of the scores")]
    return [_within(where, one, theirs[label], tolerance) for label, one in ours.items()]


def _within(where: str, recorded: Organ, found: Organ, tolerance: float) -> Finding:
    place = f"{where}, {recorded.name}"
    if recorded.dice is None or found.dice is None or recorded.cases != found.cases:
        alike = recorded.dice == found.dice and recorded.cases == found.cases
        text = f"Dice {_figure(found.dice)} of {found.cases}, recorded is {_figure(recorded.dice)} of {recorded.cases}"
        return Finding("organs", place, "equal" if alike else "different", text)
    apart = abs(found.dice - recorded.dice)
    text = f"Dice {found.dice:.4f}, recorded is {recorded.dice:.4f}, {apart:.4f} apart"
    # The last digits of the tolerance itself are not worth a verdict.
    return Finding("organs", place, "within tolerance" if apart <= tolerance + ROUNDING else "different", text)


def compare_again(where: str, recorded: Fit, again: Fit, tolerance: Tolerance) -> list[Finding]:
    """How a fold that was trained anew differs: to the bit where its weights and label maps are the recorded ones, else
    by the mean Dice of its organs."""
    place = f"{where}, {recorded.name}, again"
    if (recorded.seed, recorded.steps) != (again.seed, again.steps):
        text = f"{again.steps} steps by seed {again.seed}, recorded are {recorded.steps} by {recorded.seed}"
        return [Finding("steps", place, "different", text)]
    same = recorded.weights == again.weights
    maps, theirs = ({one.case: one.sha256 for one in fit.predictions} for fit in (recorded, again))
    found = [Finding("weights", place, "equal", "to the bit")] if same else []
    if set(maps) != set(theirs):
        return [*found, Finding("predictions", place, "different", "other cases are held out")]
    if same and maps == theirs:
        found.append(Finding("predictions", place, "equal", f"to the bit, {count(len(maps), 'case')}"))
        return found + compare_rows(place, recorded.scores, again.scores)
    others = sum(maps[case] != theirs[case] for case in maps)
    changed = f"{others} of {count(len(maps), 'label map')} are not the recorded ones"
    what = changed if same else f"other weights ({_hardware(recorded, again)}); {changed}"
    judged = compare_organs(place, recorded.organs, again.organs, tolerance.dice)
    all_near = all(one.verdict != "different" for one in judged)
    return [
        *found,
        Finding("predictions" if same else "weights", place, "within tolerance" if all_near else "different", what),
        *judged,
    ]


def _hardware(recorded: Fit, again: Fit) -> str:
    kinds = {"device": (recorded.device, again.device), "threads": (recorded.threads, again.threads)}
    for name in sorted({*recorded.machine, *again.machine} - {"cores", "memory_gib"}):
        kinds[name] = (str(recorded.machine.get(name)), str(again.machine.get(name)))
    for name in sorted({*recorded.versions, *again.versions}):
        kinds[name] = (recorded.versions.get(name, "none"), again.versions.get(name, "none"))
    differ = [f"{name} {here}, recorded {there}" for name, (there, here) in kinds.items() if there != here]
    return "; ".join(differ) or "on the same hardware and versions"


def rows_of(scores: Iterable[CaseMetrics]) -> tuple[dict[str, Any], ...]:
    """Scores as `Fit` holds them."""
    return tuple(asdict(row) for row in scores)


def _figure(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text[:80]

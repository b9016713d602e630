"""A package's README.md: what a person should know of a model before using it.

Every figure comes from the package's own data, so that the card is as true as they are. Names and
other words in these are anybody's: each is put on one line, cut where it is long, and says nothing to
whoever renders Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medseg.dataset.split import FEW_SUBJECTS
from medseg.models.calibration import Calibration
from medseg.models.evaluation import Evaluation, Figure, StructureScore, Tried
from medseg.models.experience import Experience
from medseg.plan.fingerprint import Source

if TYPE_CHECKING:
    from medseg.models.package import ModelPackage

_LONG = 300
_MARKUP = str.maketrans({sign: f"\\{sign}" for sign in "\\`*#[]<>|"})


def card(package: ModelPackage) -> str:
    """The card, as Markdown; what is not known of the model is left out, or said to be unknown."""
    sections = [_head(package), _data(package), _plan(package)]
    if package.evaluation:
        sections += [_scores(package, package.evaluation), _comparison(package.evaluation)]
    sections += [_refinement(package), _calibration(package.calibration)]
    sections += [_scans(package.experience)] if package.experience else []
    sections += [_limits(package), _again(package)]
    return "\n".join("\n".join((*section, "")) for section in sections)


def _head(package: ModelPackage) -> Iterator[str]:
    count = len(package.members)
    yield f"# {_plain(package.name)}"
    yield ""
    yield "Research software; not a medical device."
    yield ""
    yield (
        f"Takes a scan with {_channels(package)}; gives a label map on the scan's own grid, with the structures below. "
        + ("One network." if count == 1 else f"{count} networks, whose results are averaged.")
    )
    yield ""
    yield from _table(("number", "structure", "code"), [(e.number, e.name, e.code or "") for e in package.plan.labels])


def _channels(package: ModelPackage) -> str:
    may = package.plan.optional_channels.value
    names = [f"{_plain(name)}{' (may be missing)' if name in may else ''}" for name in package.plan.channels]
    return f"the channel {names[0]}" if len(names) == 1 else f"the channels {', '.join(names)}, in this order"


def _data(package: ModelPackage) -> Iterator[str]:
    told = _source(package)
    yield "## Data"
    yield ""
    about = f": {_plain(told.description.rstrip('.'))}" if told.description else ""
    yield f"- {_plain(package.plan.task)}{about}"
    if told.reference:
        yield f"- source: {_plain(told.reference)}{f', release {_plain(told.release)}' if told.release else ''}"
    yield f"- licence of the data: {_plain(told.licence) or 'not stated'}"
    if package.trained_on:
        yield f"- trained on {len(package.trained_on)} cases; {len(package.held_out)} more were seen by no network"
    elif package.provenance.get("training_cases"):
        yield f"- trained on {package.provenance['training_cases']} cases"
    made = package.provenance
    # The folds of an imported model are checksums.
    parts = (one for one in (made, *made.get("folds", {}).values()) if isinstance(one, dict))
    if scans := {scan for one in parts for scan in one.get("unlabelled", ())}:
        yield f"- learnt from {len(scans)} scans without labels too; a score on these would say too much"


def _source(package: ModelPackage) -> Source:
    """What the data's owner says of them, as far as the package has it."""
    if package.experience and package.experience.source:
        return package.experience.source
    known = package.evaluation
    return Source.model_construct(description=known.description, licence=known.licence) if known else Source()


def _plan(package: ModelPackage) -> Iterator[str]:
    one = package.configuration
    network = one.network.value
    yield "## Plan"
    yield ""
    yield f"- spacing {_by([f'{s:.3g}' for s in one.spacing.value])} mm, patch {_by(one.patch.value)} voxels"
    yield f"- {one.dimensions}D {network.family}, features {', '.join(map(str, network.features))}"
    steps = package.provenance.get("steps")
    done = f"{steps} steps of " if steps else ""
    yield f"- {done}{one.batch.value} patches each; learning rate {package.plan.training.learning_rate.value:g}"
    yield f"- normalisation: {', '.join(f'{_plain(n.channel)} {n.kind}' for n in package.plan.normalisation.value)}"
    if rounded := package.provenance.get("rounded_from"):
        yield (
            "- weights rounded to float16, and computed with in float32; figures are those of the model before, "
            f"{_plain(rounded)}"
        )


def _scores(package: ModelPackage, known: Evaluation) -> Iterator[str]:
    whose = "" if known.leaks else "subjects' "
    yield "## How good"
    yield ""
    yield (
        f"Out of fold: each of {known.cases} cases, of {known.subjects} subjects, was predicted by a network that was "
        f"trained on other {whose}cases ({len(known.folds)} of {known.of_folds} folds). Mean over the cases, and "
        f"95 % bootstrap interval over subjects ({known.resamples} draws; none where fewer than {FEW_SUBJECTS} count). "
        "A structure missed or invented has Dice 0 and the scan's diagonal as HD95."
    )
    yield ""
    head = ("structure", "Dice", "without post-processing", "HD95 (mm)", "cases", "missed", "invented")
    rows = [_row(one) for one in known.structures]
    yield from _table(head, [*rows, ("mean", known.dice, known.before, "", known.cases, "", "")])
    if known.leaks:
        yield ""
        yield f"Of {known.leaks} subjects a network knew another case: these figures are too good."
    yield ""
    worst = ", ".join(f"{_plain(one.case)} ({one.dice:.3f})" for one in known.worst)
    yield f"Worst cases, by mean Dice: {worst}."
    if len(known.folds) > 1:
        yield ""
        yield (
            f"These figures are those of each fold by itself{_members(package)}. The average of all, which this "
            "package computes, cannot be measured on these cases, since some network was trained on each; it is "
            "usually a little better."
        )


def _members(package: ModelPackage) -> str:
    several = package.configuration.members
    return f", the average of its {several.value} networks" if several and several.value > 1 else ""


def _row(one: StructureScore) -> tuple[object, ...]:
    distance = "-" if one.hd95_mm is None else f"{one.hd95_mm:.2f}"
    return one.name, one.dice or "-", one.before or "-", distance, one.cases, one.missed, one.invented


def _comparison(known: Evaluation) -> Iterator[str]:
    yield "## Chosen among"
    yield ""
    rows = [(c.configuration, c.dice, c.cases, _behind(c.behind)) for c in known.compared]
    yield from _table(("configuration", "Dice", "cases", "the chosen one is better by"), rows)
    yield ""
    yield (
        "Before post-processing, on the cases that all have in common. Whatever is chosen by these figures looks a "
        "little better in them than it is."
    )


def _behind(figure: Figure | None) -> str:
    if figure is None:
        return "chosen"
    unclear = figure.low is None or figure.low <= 0
    return f"{figure}{', not clearly' if unclear else ''}"


def _refinement(package: ModelPackage) -> Iterator[str]:
    yield "## Post-processing"
    yield ""
    if package.refinement:
        yield f"Kept: {'; '.join(f'{_plain(step.name)}: {step}' for step in package.refinement.steps)}."
    else:
        yield "None."
    if package.evaluation and package.evaluation.tried:
        tried_last = " What is for all structures was tried after the rules that are kept."
        after = tried_last if package.evaluation.with_crf else ""
        yield ""
        yield (
            "Of the rules tried, for each structure the best. A rule is kept where the interval of its gain, widened "
            "for the number of rules tried, lies above 0, on eight subjects or more; a structure rightly not found has "
            f"Dice 1 here.{after}"
        )
        yield ""
        rows = [
            (t.rule.name, t.rule, f"{t.gain.mean:+.4f}", _ends(t.gain), t.better, t.worse, "yes" if t.kept else "no")
            for t in _best(package.evaluation.tried)
        ]
        yield from _table(("structure", "keeps", "gain in Dice", "interval", "better", "worse", "kept"), rows)


def _best(tried: Sequence[Tried]) -> Iterator[Tried]:
    for number in dict.fromkeys(t.rule.number for t in tried):
        yield max((t for t in tried if t.rule.number == number), key=lambda t: (t.kept, t.gain.mean))


def _ends(figure: Figure) -> str:
    return "-" if figure.low is None else f"{figure.low:+.4f} to {figure.high:+.4f}"


def _calibration(known: Calibration | None) -> Iterator[str]:
    yield "## How sure"
    yield ""
    if known is None:
        yield "Not calibrated: the confidence is the network's own, and no Dice is predicted."
        return
    interval = "" if known.interval is None else f", nine of ten within {known.interval:.3f}"
    yield (
        f"Temperature {known.temperature:.2f}; calibration error {known.ece_before:.3f} without it, "
        f"{known.ece_after:.3f} with it; predicted Dice {known.dice_error:.3f} off on average{interval}; on "
        f"{known.cases} held-out cases."
    )
    if known.pooled_from:
        yield ""
        yield (
            f"A mean of the calibrations of {known.pooled_from} folds, each measured on its own networks. The average "
            "of all is less sure of itself than each, so its confidence is rather too low than too high."
        )


def _scans(known: Experience) -> Iterator[str]:
    yield "## For scans like these"
    yield ""
    spacing, extent = (_by([f"({r})" for r in ranges]) for ranges in (known.spacing, known.extent))
    yield f"- spacing {spacing} mm, field of view {extent} mm"
    for channel in known.channels:
        kind = f" ({channel.modality})" if channel.modality else ""
        yield f"- {_plain(channel.name)}{kind}: 1st percentile {channel.percentiles[0]}, 99th {channel.percentiles[-1]}"
    for one in known.structures:
        size = f"{one.mm3.low / 1000:.3g} to {one.mm3.high / 1000:.3g} ml" if one.mm3 else "never there"
        yield f"- {_plain(one.name)}: in {one.cases} of {known.cases} training cases, {size}"


def _limits(package: ModelPackage) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield "- Not tried on scans of other scanners, protocols, ages or diseases than those of its data."
    yield "- The reference is what the data's owners outlined; Dice says nothing about where a border should have been."
    known = package.evaluation
    if known and known.subjects < FEW_SUBJECTS:
        yield f"- {known.subjects} subjects are too few to say how good it is on others: there is no interval."
    elif known and known.subjects < 20:
        yield f"- {known.subjects} subjects are few: what they do not show is not in the intervals."
    yield "- A person looks at each result before it is used for anything."


def _again(package: ModelPackage) -> Iterator[str]:
    made = package.provenance
    yield "## Again"
    yield ""
    if "imported" in made:
        yield f"Imported from {_plain(made['imported'])}."
    else:
        yield "```sh"
        yield from _commands(package)
        yield "```"
    yield ""
    if found := made.get("versions"):
        yield f"- versions: {', '.join(f'{_plain(name)} {_plain(version)}' for name, version in found.items())}"
    yield f"- plan {package.plan.digest()}"
    yield f"- model {package.digest()}"


def _commands(package: ModelPackage) -> Iterator[str]:
    name, made, known = _plain(package.configuration_name), package.provenance, package.evaluation
    yield "medseg plan TASK -o RUN"
    yield "# Put this plan.json in place of RUN/plan.json, and the cases that package.json names into RUN/folds.json."
    if known and len(known.folds) == known.of_folds and "seed" in made:
        each = " ".join(f"-c {_plain(one.configuration)}" for one in known.compared)
        yield f"medseg train RUN --all-folds {each} --seed {_plain(made['seed'])}{_start(made)}"
        if known.with_crf:
            yield f"medseg choose RUN {each} --crf"
        return
    if before := package.previous:
        seed = _plain(before.provenance.get("seed", 0))
        yield f"medseg train RUN --all-folds -c {_plain(before.configuration_name)} --seed {seed}"
    yield f"medseg preprocess RUN -c {name}"
    for fold, one in made.get("folds", {str(made.get("fold", 0)): made}).items():
        yield f"medseg train RUN -c {name} --fold {_plain(fold)} --seed {_plain(one.get('seed', 0))}{_start(one)}"
        if known:
            folder = f"RUN/{name}/fold{_plain(fold)}"
            yield f"medseg predict TASK --held-out -m {folder}/model -o {folder}/predictions"
    if known:
        partial = "" if len(known.folds) == known.of_folds else " --partial"
        yield f"medseg choose RUN -c {name}{partial}{' --crf' if known.with_crf else ''}"


def _by(values: Sequence[object]) -> str:
    return " x ".join(map(str, values))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(map(_plain, row)) + " |"


def _plain(value: object) -> str:
    """Anything as text on one line that is no markup."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)[: 10 * _LONG]).split())
    return (text if len(text) <= _LONG else f"{text[: _LONG - 1]}…").translate(_MARKUP)


def _start(made: Mapping[str, Any]) -> str:
    """The option for the model that training began with, if any."""
    return f" --from MODEL  # of which the digest is {_plain(made['start'])}" if made.get("start") else ""

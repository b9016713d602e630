"""``medseg predict``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.channels import read_channels
from medseg.cli.common import FOLDER, Memory, progress, stopping, table, threads_option, use_sleeping_threads
from medseg.cli.convert import TARGETS, reference_for, write_dicom
from medseg.cli.jobs import Job, Shard, job_of_channels, jobs_held_out, jobs_of, listed
from medseg.core.errors import InputError, MedsegError
from medseg.core.progress import silent
from medseg.core.words import count

if TYPE_CHECKING:
    from medseg.core.instances import InstanceMap
    from medseg.core.labels import LabelSet
    from medseg.core.volume import LabelMap, Volume
    from medseg.infer.predict import Prediction, Predictor, Thoroughness
    from medseg.io.reference import Reference
    from medseg.models.package import ModelPackage
    from medseg.plan.plan import Normalisation

_SHORT_OF_MEMORY = re.compile("out of memory|not enough memory|t allocate memory")


@dataclass(frozen=True)
class Wishes:
    """What is wanted of each scan. Those that change the labels are told in the sidecar."""

    only: tuple[str, ...] = ()
    smallest_mm3: float = 0.0
    thoroughness: Thoroughness = "normal"
    overlap: float | None = None
    force: bool = False
    split: bool = False
    report: bool = False
    save_probabilities: bool = False
    save_uncertainty: bool = False


@dataclass(frozen=True)
class Read:
    """A scan in memory, and what is known of it."""

    volume: Volume
    notes: tuple[str, ...]
    parts: list[dict[str, Any]]
    reference: Reference | None


@click.command()
@click.argument("scans", type=FOLDER, nargs=-1)
@click.option(
    "-m",
    "--model",
    help="The model: a package's folder, or its name in `medseg models list`.  [default: the one there that was "
    "trained on scans like these]",
)
@click.option("-o", "--output", type=FOLDER, help="File for one scan, or folder.  [default: beside each scan]")
@click.option("--to", type=click.Choice(TARGETS), default="nifti", show_default=True, help="DICOM needs DICOM scans.")
@click.option("--series", type=click.IntRange(min=1), help="Which DICOM series, by its number in `medseg inspect`.")
@click.option(
    "--channel", "channels", metavar="NAME=SCAN", multiple=True, help="Instead of SCANS: one channel of one case."
)
@click.option("--register", "align", is_flag=True, help="Align the channels to the first one, rigidly.")
@click.option("--list", "list_file", type=FOLDER, help="A text file that names more scans, one a line.")
@click.option("--held-out", is_flag=True, help="SCANS is a task: predict the cases that the model was not trained on.")
@click.option("--shard", metavar="I/N", help="Only part I of N of the scans, for array jobs.")
@click.option(
    "--manifest",
    type=FOLDER,
    help="Scans that `medseg archive deal` dealt: those of --shard, or of each shard that nobody else is at.",
)
@click.option("--mend", is_flag=True, help="With --manifest: do again what failed, and what is done but lost.")
@click.option("--skip-done", is_flag=True, help="Leave out scans whose result this model has written before.")
@click.option("--only", multiple=True, help="Give this structure, and no others; may be repeated.")
@click.option(
    "--smallest",
    "smallest_mm3",
    metavar="MM3",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Take away smaller pieces.",
)
@click.option("--report", is_flag=True, help="Also draw a page of each scan: organs, volumes, three planes and 3D.")
@click.option("--split", is_flag=True, help="Also write each structure as a mask of its own, in a folder.")
@click.option("--save-probabilities", is_flag=True, help="Also write the probability of every structure.")
@click.option("--save-uncertainty", is_flag=True, help="Also write 1 less the probability of each voxel's label.")
@click.option(
    "--quality",
    "thoroughness",
    flag_value="quality",
    default="normal",
    help="Run every tile, also where a first look finds nothing.",
)
@click.option(
    "--quick", "thoroughness", flag_value="quick", help="Tiles overlap by a quarter, not half; no mirrored copies."
)
@click.option("--overlap", type=click.FloatRange(0, 0.9), help="Share of a tile that its neighbours see too.")
@click.option(
    "--memory", type=Memory(), help="Take no more memory than this, as 4GiB.  [default: most of what is free]"
)
@click.option("--force", is_flag=True, help="Predict scans of another kind than the model was trained on, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="openvino, torch-cpu or torch-cuda; auto takes a GPU, else OpenVINO.",
)
@threads_option
def predict(
    scans: tuple[Path, ...],
    model: str | None,
    output: Path | None,
    to: str,
    series: int | None,
    channels: tuple[str, ...],
    align: bool,
    list_file: Path | None,
    held_out: bool,
    shard: str | None,
    manifest: Path | None,
    mend: bool,
    skip_done: bool,
    memory: int | None,
    as_json: bool,
    engine: str,
    threads: int | None,
    **wishes: Any,
) -> None:
    """Segment SCANS: NIfTI files or folders of them; DICOM files, folders or zips.

    Writes scan_seg.nii.gz on the scan's own grid, and scan_seg.json that says how it was made; with
    --to a DICOM SEG or RTSTRUCT of the same patient and study, scan_seg.dcm.
    Without -m the models of this machine are held against the first scan that can be read and is for one
    of them. That one is taken, and said; where there are several, none is guessed. The other scans of
    the call must be for it too.
    Where a DICOM folder holds several series, none is guessed: --series chooses.
    A case whose channels are several scans is named by --channel T2=t2.nii.gz --channel
    ADC=adc.nii.gz (or ADC=FOLDER#4, the fourth DICOM series); its result lies on the grid of the
    model's first channel. One that the model's plan lists as optional may be left out.
    A scan unlike all that the model was trained on is told so, and one of another kind (a CT model, an
    MR scan) is refused.
    A scan that fails does not stop the others, and is listed at the end. A run that was stopped goes
    on with --skip-done. Tasks of an array name their part with --shard; run once more with
    --skip-done and no --shard, the command writes the index of them all. From some thousands of scans
    on, `medseg archive deal` deals them and --manifest names what it wrote: a shard then goes on by a log
    of its own, and ends with 0 once each of its scans was tried; `medseg archive report` tells the rest.
    """
    from medseg.models.package import load_package
    from medseg.models.shelf import find_package

    if model is None:
        _refuse_without_model(
            {
                "--manifest": manifest,
                "--channel": channels,
                "--held-out": held_out,
                "--skip-done": skip_done,
                "--shard": shard,
                "--force": wishes["force"],
            }
        )
    if mend and not manifest:
        raise InputError("--mend goes with --manifest", "Leave it out, or name the manifest")
    if manifest and (scans or list_file or channels or held_out or series or output or skip_done or align):
        raise InputError(
            "--manifest says which scans, where their results go and what is done",
            "Leave out SCANS, -o, --list, --channel, --register, --held-out, --series and --skip-done",
        )
    if not manifest and not channels and (align or not (scans or list_file)):
        raise InputError(
            "--register goes with --channel" if align else "no scan is named", "Name SCANS, or each --channel NAME=SCAN"
        )
    if held_out and to != "nifti":
        raise InputError(f"--held-out goes with NIfTI, not with --to {to}", "Leave out --to")
    if list_file:
        scans = (*scans, *listed(list_file))
    part = Shard.parse(shard) if shard else None
    use_sleeping_threads()
    from medseg.infer.predict import Predictor

    wanted = Wishes(**wishes)

    def ready(package: ModelPackage) -> Predictor:
        how, overlap = wanted.thoroughness, wanted.overlap
        return Predictor(package, engine, memory=memory, threads=threads, thoroughness=how, overlap=overlap)

    predictor = ready(load_package(find_package(model))) if model else None
    if manifest and predictor:
        from medseg.cli.archive import Work, predict_shards

        work = Work(
            run=lambda some, begun: _run(some, predictor, wanted, None, begun),
            about={
                "model": predictor.package.name,
                "model_sha256": predictor.digest,
                "wishes": _told(wanted),
                "to": to,
            },
            cores=predictor.threads,
            mend=mend,
            as_json=as_json,
        )
        predict_shards(manifest, part, work)
        return
    if predictor and channels:
        plan = predictor.package.plan
        jobs = [job_of_channels(channels, plan, align, output, scans or series or held_out, to)]
    elif predictor and held_out:
        jobs = jobs_held_out(scans, output, predictor.package.held_out)
    else:
        jobs = jobs_of(scans, output, to, series=series)
    if part:
        jobs = part.of(jobs)
    index = _Index(output if output and output.is_dir() else None, part)
    click.get_current_context().with_resource(index.alone())
    left = [job for job in jobs if not (predictor and skip_done and _is_done(job, predictor.digest, wanted))]
    choice = None
    if predictor is None:
        choice = _choose(left, wanted)
        predictor = ready(choice.package) if choice.package else None
    index.forget()
    results: list[dict[str, Any]] = []
    failed: list[tuple[Job, MedsegError]] = []
    with stopping():
        for job, outcome in progress("predict")(_run(left, predictor, wanted, choice), len(left)):
            if isinstance(outcome, MedsegError):
                failed.append((job, outcome))
                named = "" if job.scan.name in re.split(r"[\s/]+", str(outcome)) else f"{job.scan.name}: "
                click.echo(f"medseg: {named}{outcome}", err=True)
            else:
                results.append(outcome)
    failed += _gone(jobs, failed)
    faults = {job.name: str(error) for job, error in failed}
    name = predictor.package.name if predictor else ""
    index.write(name, {j.name: j.output.name for j in jobs if j.name not in faults}, faults)
    if as_json:
        click.echo(json.dumps({"format": 1, "predictions": results, "failed": faults}))
    elif len(jobs) == 1 or not held_out:
        for result in results:
            _show(result)
    else:
        click.echo(f"{count(len(results), 'case')} predicted into {output}")
        _show_flagged(results)
    if len(left) < len(jobs) and not as_json:
        click.echo(f"{len(jobs) - len(left)} of {len(jobs)} scans were done before")
    if failed:
        if len(jobs) > 1:
            names = ", ".join(job.scan.name for job, _ in failed)
            click.echo(f"medseg: {len(failed)} of {len(jobs)} scans failed: {names}", err=True)
        raise SystemExit(max(error.exit_status for _, error in failed))


def _gone(jobs: list[Job], failed: list[tuple[Job, MedsegError]]) -> list[tuple[Job, MedsegError]]:
    """The jobs whose results are not there any more, told."""
    known = {job for job, _ in failed}
    gone = [job for job in jobs if job not in known and not job.output.exists()]
    for job in gone:
        click.echo(f"medseg: {job.output} is not there any more: its folder was moved or emptied meanwhile", err=True)
    return [(job, MedsegError(f"{job.output.name} was moved or deleted meanwhile. Predict it again.")) for job in gone]


@dataclass(frozen=True)
class _Index:
    """The list of results in an output folder, of a shard's or of all of them. It is taken away when a
    run begins and written when it ends, so that none that breaks off leaves a list that speaks of an
    earlier one."""

    folder: Path | None
    shard: Shard | None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else writes this list meanwhile: who is at it is waited for."""
        from medseg.io.files import alone

        if self.folder is None:
            yield
            return
        path = self._path(self.folder)
        with alone(path.with_name(f".{path.name}"), "predict", lambda told: click.echo(told, err=True)):
            yield

    def forget(self) -> None:
        if self.folder:
            self._path(self.folder).unlink(missing_ok=True)

    def write(self, model: str, cases: dict[str, str], failed: dict[str, str]) -> None:
        from medseg.io.sidecar import write_index

        if self.folder:
            write_index(self._path(self.folder), model, cases, failed)

    def _path(self, folder: Path) -> Path:
        from medseg.io.sidecar import INDEX

        if self.shard is None:
            return folder / INDEX
        return folder / INDEX.replace(".json", f".{self.shard.number}-of-{self.shard.count}.json")


def _refuse_without_model(given: dict[str, Any]) -> None:
    """InputError for an option whose meaning depends on the model, where none is named."""
    for option, value in given.items():
        if value:
            raise InputError(f"{option} goes with a model of your choice", "Name it with -m; see `medseg models list`")


@dataclass(frozen=True)
class _Choice:
    """The model that was chosen, None where none was, and what became of the scans that were looked at
    for it: why they are for none, and the last one itself."""

    name: str
    package: ModelPackage | None
    seen: dict[Job, Read | MedsegError]


def _choose(jobs: list[Job], wishes: Wishes) -> _Choice:
    """The model that the first scan is for which is for one alone. InputError where there is no model."""
    from medseg.infer.choice import choose_model

    models = _models()
    seen: dict[Job, Read | MedsegError] = {}
    for job in jobs:
        try:
            scan = _read(job, (), wishes, bar=len(jobs) == 1)
            name = choose_model(scan.volume, models)
        except MedsegError as error:
            seen[job] = error
            continue
        seen[job] = scan
        package = models[name]
        click.echo(f"{job.scan.name}: taken is the model {name}, for scans like it; -m names another", err=True)
        return _Choice(name, None if isinstance(package, str) else package, seen)
    return _Choice("", None, seen)


def _models() -> dict[str, ModelPackage | str]:
    """The models of this machine by name, or why one cannot be taken."""
    from medseg.infer.choice import NO_EXPERIENCE, require_some
    from medseg.models.package import EXPERIENCE, load_package
    from medseg.models.shelf import at_hand

    found: dict[str, ModelPackage | str] = {}
    for name, folder in at_hand().items():
        try:
            # Without looking at gigabytes of weights.
            found[name] = load_package(folder) if (folder / EXPERIENCE).exists() else NO_EXPERIENCE
        except InputError as error:
            found[name] = str(error)
    require_some(found)
    return found


def _run(
    jobs: list[Job],
    predictor: Predictor | None,
    wishes: Wishes,
    choice: _Choice | None,
    begun: Callable[[Job], object] = lambda _: None,
) -> Generator[tuple[Job, dict[str, Any] | MedsegError], None, None]:
    """Each job and its record, or why there is none. The next scan is read, and the last result
    written, while one is computed. ``begun`` is told of each job before its scan is read."""
    if predictor is None:
        yield from (
            (job, seen) for job, seen in (choice.seen if choice else {}).items() if isinstance(seen, MedsegError)
        )
        return
    predictor.scans_held = min(2, len(jobs))
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        unwritten: list[tuple[Job, Future[dict[str, Any]]]] = []
        try:
            read = _reading(predictor, wishes, choice, begun, bar=len(jobs) == 1)
            for job, reading in _ahead(reader, jobs, read):
                try:
                    scan = reading.result()
                    result = _computed(job, scan, predictor, wishes, bar=len(jobs) == 1)
                except MedsegError as error:
                    yield job, error
                else:
                    unwritten.append((job, writer.submit(_written, job, scan, result, predictor, wishes)))
                    del scan, result
                del reading
                while len(unwritten) > 1:
                    yield _outcome(*unwritten.pop(0))
            for one in unwritten:
                yield _outcome(*one)
        finally:
            reader.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)


def _reading(
    predictor: Predictor, wishes: Wishes, choice: _Choice | None, begun: Callable[[Job], object], *, bar: bool
) -> Callable[[Job], Read]:
    """What reads a job's scan. Where the model was chosen here, those scans that were read for it are not
    read again, and the others must be for it."""
    from medseg.infer.choice import require_fit
    from medseg.io.sidecar import instances_of, require_own

    def read(job: Job) -> Read:
        begun(job)
        seen = choice.seen.pop(job, None) if choice else None
        if isinstance(seen, MedsegError):
            raise seen
        scan = seen or _read(job, predictor.package.plan.normalisation.value, wishes, bar=bar)
        if predictor.package.configuration.network.value.counts:
            require_own(job.output, instances_of(job.output))
        if choice and not seen:
            require_fit(scan.volume, predictor.package, choice.name)
        return scan

    return read


def _ahead(
    reader: ThreadPoolExecutor, jobs: list[Job], read: Callable[[Job], Read]
) -> Iterator[tuple[Job, Future[Read]]]:
    """Each job once its scan is read, and the reading of the next begun."""
    following: Future[Read] | None = None
    for number, job in enumerate(jobs):
        current = following or reader.submit(read, job)
        wait([current])
        after = jobs[number + 1] if number + 1 < len(jobs) else None
        following = reader.submit(read, after) if after else None
        yield job, current


def _outcome(job: Job, writing: Future[dict[str, Any]]) -> tuple[Job, dict[str, Any] | MedsegError]:
    try:
        return job, writing.result()
    except MedsegError as error:
        return job, error


def _read(job: Job, rules: Sequence[Normalisation], wishes: Wishes, *, bar: bool) -> Read:
    from medseg.io.scan import read_scan
    from medseg.io.sidecar import require_own

    also = {"prob": wishes.save_probabilities, "uncertainty": wishes.save_uncertainty}
    masks = (job.output.with_name(_stem(job)),) if wishes.split else ()
    pages = (_page_of(job),) if wishes.report else ()
    require_own(job.output, *(_beside(job, what) for what, wanted in also.items() if wanted), *masks, *pages)
    # Before the work, so that what cannot be referred to is refused at once.
    reference = None if job.to == "nifti" else reference_for(job.scan, job.series, job.to)
    with _enough_memory(job):
        watch = progress("read", unit="file") if bar else silent
        if job.channels:
            return Read(*read_channels(job.channels, rules, align=job.align, progress=watch), reference)
        volume, notes = read_scan(job.scan, job.series, progress=watch)
        return Read(volume, notes, [], reference)


@dataclass(frozen=True)
class Result:
    """A prediction; and where it is already, the file of probabilities that belongs to it."""

    made: Prediction
    probabilities: Path | None = None


def _computed(job: Job, scan: Read, predictor: Predictor, wishes: Wishes, *, bar: bool) -> Result:
    from medseg.io.nifti import ShareFile

    classes = predictor.package.plan.label_set
    file = _beside(job, "prob") if wishes.save_probabilities else None
    with _enough_memory(job), ShareFile(file, len(classes) + 1, scan.volume.grid) if file else nullcontext() as kept:
        made = predictor.predict(
            scan.volume,
            only=wishes.only,
            smallest_mm3=wishes.smallest_mm3,
            probability=wishes.save_uncertainty,
            keep=kept.put if kept else None,
            progress=progress("predict", unit="tile") if bar else silent,
            force=wishes.force,
        )
    return Result(made, file)


def _written(job: Job, scan: Read, result: Result, predictor: Predictor, wishes: Wishes) -> dict[str, Any]:
    from medseg.io.files import write_json
    from medseg.io.nifti import write_labels, write_shares
    from medseg.io.sidecar import sidecar_of, staged_beside

    made = result.made
    record = _sidecar(job, made, scan, wishes)
    record["engine"] = predictor.engine.name
    ignored = predictor.package.plan.training.ignore_label
    if ignored is not None:  # for `medseg evaluate`, which knows no plan
        record["ignore_label"] = ignored
    side = sidecar_of(job.output)
    staged = staged_beside(side)
    try:
        if made.probability is not None:
            file = _beside(job, "uncertainty")
            write_shares(file, 1 - made.probability, made.label_map.grid)
            record["uncertainty"] = file.name
        if result.probabilities:
            record["probabilities"] = result.probabilities.name
        if wishes.split:
            record["masks"] = _split(job, made.label_map)
        if wishes.report:
            record["report"] = _page_of(job).name
            _draw(_page_of(job), scan, made, record)
        if made.instances is not None:
            record |= _counted(job, made.instances, made.label_map.labels)
        # Where the disk is full neither takes the place of an earlier one.
        write_json(staged, record)
        if scan.reference is None:
            write_labels(job.output, made.label_map)
        else:
            from medseg.io.dicom_seg import Algorithm  # 0.3 s that NIfTI does without

            write_dicom(job.output, made.label_map, scan.reference, Algorithm.of_model(made.model), job.to)
        staged.replace(side)
    finally:
        staged.unlink(missing_ok=True)
    return record


def _counted(job: Job, found: InstanceMap, labels: LabelSet) -> dict[str, Any]:
    """The map of what was counted, beside the labels; its name, and each thing in a row."""
    from medseg.core.volume import LabelMap
    from medseg.io.nifti import write_labels
    from medseg.io.sidecar import instances_of

    file = instances_of(job.output)
    write_labels(file, LabelMap(found.values, found.grid, labels))
    rows = [
        {
            "number": one.number,
            "label": labels.name_of(one.label),
            "score": one.score,
            "voxels": one.voxels,
            "volume_ml": one.volume_ml,
            "centre_mm": list(one.centre_mm),
        }
        for one in found.instances
    ]
    return {"instance_map": file.name, "instances": rows}


def _beside(job: Job, what: str) -> Path:
    from medseg.io.sidecar import SUFFIX

    return job.output.with_name(f"{_stem(job).removesuffix(SUFFIX)}_{what}.nii.gz")


def _page_of(job: Job) -> Path:
    from medseg.io.sidecar import SUFFIX

    return job.output.with_name(f"{_stem(job).removesuffix(SUFFIX)}_report.html")


def _draw(path: Path, scan: Read, made: Prediction, record: Mapping[str, Any]) -> None:
    """The page of a scan."""
    from medseg.io.files import write_text
    from medseg.report.scan import Organ, ScanPage, scan_report

    review = [flag.reason for flag in made.flags if flag.review]
    about = {"scan": record["scan"], "scan, SHA-256": record["scan_sha256"], "model": made.model}
    about |= {"model, SHA-256": made.model_digest, "seconds": f"{made.seconds:.1f}"}
    page = ScanPage(
        title=record["scan"],
        image=scan.volume.values[0],
        grid=scan.volume.grid,
        found=made.label_map,
        organs=[Organ(o.name, o.volume_ml, o.confidence, o.predicted_dice, o.cut) for o in made.organs],
        review=review,
        notes=[note for note in record["warnings"] if note not in review],
        calibrated=made.calibration.cases if made.calibration else None,
        provenance=about | {f"version of {name}": number for name, number in record["versions"].items()},
    )
    write_text(path, scan_report(page))


def _stem(job: Job) -> str:
    from medseg.io.sidecar import sidecar_of

    return sidecar_of(job.output).stem


def _split(job: Job, label_map: LabelMap) -> dict[str, str]:
    """A mask of 0 and 1 for each structure that was found; their paths, from the label map's folder."""
    from medseg.core.labels import LabelSet
    from medseg.core.volume import LabelMap
    from medseg.io.nifti import write_labels

    folder = job.output.with_name(_stem(job))
    found = {}
    for label in label_map.labels:
        mask = (label_map.values == label.number).astype("uint8")
        name = f"{folder.name}/{label.number:03d}_{re.sub(r'[^A-Za-z0-9]+', '_', label.name).strip('_')}.nii.gz"
        write_labels(job.output.parent / name, LabelMap(mask, label_map.grid, LabelSet.from_names([label.name])))
        found[label.name] = name
    return found


@contextmanager
def _enough_memory(job: Job) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for this where it computes on the CPU.
        if isinstance(error, RuntimeError) and not _SHORT_OF_MEMORY.search(str(error)):
            raise
        raise MedsegError(f"{job.scan.name} needs more memory than there is") from None


def _is_done(job: Job, digest: str, wishes: Wishes) -> bool:
    """Whether the result is there, made by this model with these wishes."""
    from medseg.io.files import read_json
    from medseg.io.sidecar import sidecar_of

    if not job.output.exists():
        return False
    try:
        record = read_json(sidecar_of(job.output))
    except InputError:
        return False
    return isinstance(record, dict) and (record.get("model_sha256"), record.get("wishes")) == (digest, _told(wishes))


def _told(wishes: Wishes) -> dict[str, Any]:
    """Wishes as JSON has them."""
    told: dict[str, Any] = json.loads(json.dumps(asdict(wishes)))
    if not wishes.report:  # as results have it that were written before there were pages
        del told["report"]
    return told


def _sidecar(job: Job, made: Prediction, scan: Read, wishes: Wishes) -> dict[str, Any]:
    from medseg.core.provenance import versions
    from medseg.io.scan import scan_digest

    grid = made.label_map.grid
    record = {
        "format": 1,
        "scan": job.scan.name,
        "scan_sha256": scan_digest(job.scan),
        "labels": job.output.name,
        "model": made.model,
        "model_sha256": made.model_digest,
        "wishes": _told(wishes),
        "organs": [asdict(organ) for organ in made.organs],
        "review": made.review,
        "flags": [asdict(flag) for flag in made.flags],
        "warnings": [*scan.notes, *made.warnings],
        "calibration": _calibration(made),
        "grid": {"shape": list(grid.shape), "affine": grid.affine.tolist()},
        "seconds": round(made.seconds, 3),
        "versions": versions(),
    }
    return record | ({"channels": scan.parts} if scan.parts else {})


def _calibration(made: Prediction) -> dict[str, Any] | None:
    """What the confidence and the predicted Dice stand on; None where they stand on nothing."""
    found = made.calibration
    names = ("cases", "temperature", "ece_after", "dice_error", "interval")
    return None if found is None else {name: getattr(found, name) for name in names}


def _show(record: dict[str, Any]) -> None:
    calibrated = record["calibration"]
    rows = [["structure", "volume (ml)", "confidence" + ("" if calibrated else " (not calibrated)")]]
    if calibrated:
        rows[0].append("predicted Dice")
    counted = record.get("instances")
    if counted is not None:
        rows[0].append("count")
    for organ in record["organs"]:
        # Of a structure that goes on beyond the scan, only the least volume is known.
        volume = f"{'>= ' if organ['cut'] else ''}{organ['volume_ml']:.3f}"
        rows.append([organ["name"], volume, _or_dash(organ["confidence"])])
        if calibrated:
            rows[-1].append(_or_dash(organ["predicted_dice"]))
        if counted is not None:
            rows[-1].append(str(sum(one["label"] == organ["name"] for one in counted)))
    click.echo(f"{record['scan']} -> {record['labels']}")
    click.echo(table(rows, right=(1, 2, 3, 4)))
    flagged = {flag["reason"]: flag["review"] for flag in record["flags"]}
    for warning in record["warnings"]:
        word = "warning" if warning not in flagged else "review" if flagged[warning] else "note"
        click.echo(f"{word}: {warning}")


def _show_flagged(records: Sequence[dict[str, Any]]) -> None:
    """Which of many scans a person should look at, and why."""
    flagged = [record for record in records if record["review"]]
    click.echo(f"{len(flagged) or 'none'} flagged for review{':' if flagged else ''}")
    for record in flagged:
        click.echo(f"{record['scan']}: {'; '.join(flag['reason'] for flag in record['flags'] if flag['review'])}")


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

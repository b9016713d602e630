"""Results as an RO-Crate (1.1) of the profile Process Run Crate (0.5): which program made which files of which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from medseg.core.words import count
from medseg.report.results import Fit, Results, Software, TaskResults

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_CONTEXT = ["https://w3id.org/ro/crate/1.1/context", "https://w3id.org/ro/terms/workflow-run/context"]
_PROGRAM = "#medseg"
_UNSTATED = "licence not stated"
_FORMATS = {
    ".json": "application/json",
    ".csv": "text/csv",
    ".html": "text/html",
    ".gz": "application/gzip",
    ".nii": "application/octet-stream",
    ".safetensors": "application/octet-stream",
}

Entity = dict[str, Any]
# SHA-256 and bytes by path.
Files = Mapping[str, tuple[str, int]]


def crate(results: Results, name: str, files: Files, *, published: datetime | None = None) -> dict[str, Any]:
    """The metadata of a folder that holds ``results`` under a ``name``, and ``files`` by their paths from there on.
    ``published`` is now unless given. The data lie elsewhere: they are told by name and hash."""
    when = (published or datetime.now(UTC)).isoformat(timespec="seconds")
    actions = [action for one in results.tasks for action in _actions(one, files)]
    collections = [_data_id(one) for one in _once(results.tasks)]
    outputs = [_file(path, *files[path]) for path in files]
    recorded = _id(name)
    recording = {
        "@id": "#record",
        "@type": "CreateAction",
        "name": "medseg record",
        "description": "medseg record RUN...: hashes, scores and versions, written down.",
        "instrument": _ref(_PROGRAM),
        "object": [_ref(_id(path)) for path in files],
        "result": _ref(recorded),
        "endTime": when,
    }
    title = f"{results.protocol.name} {results.protocol.version}" if results.protocol else "Runs of medseg"
    tasks = ", ".join(dict.fromkeys(one.task for one in results.tasks))
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": title,
        "description": f"Segmentation networks trained and scored on {tasks}, with what is needed to repeat it.",
        "datePublished": when,
        "license": _ref("#licence"),
        "conformsTo": _ref(PROFILE),
        "hasPart": [_ref(recorded), *(_ref(one["@id"]) for one in outputs)],
        "mentions": [_ref(name) for name in (*(one["@id"] for one in (*actions, recording)), *collections)],
    }
    licences = "; ".join(dict.fromkeys(f"{one.task}: {one.data.licence or _UNSTATED}" for one in results.tasks))
    graph = [
        {
            "@id": "ro-crate-metadata.json",
            "@type": "CreativeWork",
            "conformsTo": _ref("https://w3id.org/ro/crate/1.1"),
            "about": _ref("./"),
        },
        root,
        {"@id": PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"},
        {
            "@id": "#licence",
            "@type": "CreativeWork",
            "name": "Licences of the data",
            "description": f"As the owners of the data say, of what is made from them too: {licences}",
        },
        *_programs(results.software),
        {
            "@id": recorded,
            "@type": "File",
            "name": name,
            "description": "What was reached, and all that is needed to repeat it",
            "encodingFormat": "application/json",
        },
        *outputs,
        *(entity for one in _once(results.tasks) for entity in _data(one)),
        *actions,
        recording,
        *(entity for one in results.tasks for fit in one.fits for entity in _circumstances(one, fit)),
    ]
    return {"@context": _CONTEXT, "@graph": graph}


def _once(tasks: tuple[TaskResults, ...]) -> list[TaskResults]:
    """One for each task and state of its data, which the runs of several seeds share."""
    return list({_data_id(one): one for one in tasks}.values())


def _programs(software: Software) -> Iterator[Entity]:
    commit = f", commit {software.commit}{' and changes' if software.dirty else ''}" if software.commit else ""
    libraries = {name: number for name, number in software.versions.items() if name != "medseg"}
    pages = {name: f"https://pypi.org/project/{quote(name)}/{quote(number)}/" for name, number in libraries.items()}
    pages |= {"python": "https://www.python.org/"} if "python" in libraries else {}
    yield {
        "@id": _PROGRAM,
        "@type": "SoftwareApplication",
        "name": "medseg",
        "description": f"Medical volume segmentation, version {software.medseg}{commit}",
        "softwareVersion": f"{software.medseg}{commit}",
        "softwareRequirements": [_ref(page) for page in pages.values()],
    }
    for name, page in pages.items():
        about = {"name": name, "softwareVersion": libraries[name], "url": page}
        yield {"@id": page, "@type": "SoftwareApplication", **about}


def _data(one: TaskResults) -> Iterator[Entity]:
    """The files of a task, which lie elsewhere."""
    whole = _data_id(one)
    yield {
        "@id": whole,
        "@type": "Collection",
        "name": one.task,
        "description": f"The data of {one.task}, {count(len(one.data.files), 'file')}: {one.data.licence or _UNSTATED}",
        "identifier": f"sha256:{one.data.sha256}",
        "mainEntity": _ref(f"{whole}/dataset.json"),
        "hasPart": [_ref(f"{whole}/{quote(file.path)}") for file in one.data.files],
    }
    for file in one.data.files:
        size = str(file.bytes)
        yield {
            "@id": f"{whole}/{quote(file.path)}",
            "@type": "CreativeWork",
            "name": file.path,
            "sha256": file.sha256,
            "contentSize": size,
        }


def _actions(one: TaskResults, files: Files) -> Iterator[Entity]:
    data, plan, folds = _ref(_data_id(one)), _ref(_id(one.plan.path)), _path(one.run, "folds.json")
    decided = [plan, *_refs([folds, _path(one.run, "fingerprint.json")], files)]
    yield _action(one, "plan", "medseg plan TASK -o RUN", [data], decided)
    for fit in one.fits:
        fold = _path(one.run, f"{fit.configuration}/fold{fit.fold}")
        model = _refs([*(f"{fold}/{path}" for path in fit.weights), f"{fold}/model/package.json"], files)
        maps = _refs([f"{fold}/{path.path}" for path in fit.predictions], files)
        scores = _refs([f"{fold}/metrics.json", f"{fold}/metrics.csv"], files)
        where = f"RUN/{fit.configuration}/fold{fit.fold}"
        trained = _action(
            one,
            f"train {fit.name}",
            f"medseg preprocess RUN -c {fit.configuration}; {_command(one, 'train', fit)}",
            [data, *decided, _ref(_about(one, fit, "seed")), _ref(_about(one, fit, "steps"))],
            [*model, *_refs([f"{fold}/log.json"], files)],
        )
        used = ("processor", "seconds", "memory")
        trained["resourceUsage"] = [_ref(_about(one, fit, what)) for what in used]
        if fit.ended:
            trained["endTime"] = fit.ended
        yield trained
        yield _action(
            one, f"predict {fit.name}", _command(one, f"{where}/predictions", fit, "predict"), [data, *model], maps
        )
        yield _action(
            one, f"evaluate {fit.name}", _command(one, f"{where}/predictions", fit, "evaluate"), [data, *maps], scores
        )


def _command(one: TaskResults, holds: str, fit: Fit, verb: str = "train") -> str:
    """The recorded command of a verb for a fold; else the verb."""
    wanted = f"--fold {fit.fold} " if verb == "train" else holds
    named = f" -c {fit.configuration} " if verb == "train" else " "
    found = (c for c in one.commands if c.startswith(f"medseg {verb} ") and wanted in f"{c} " and named in f"{c} ")
    return next(found, f"medseg {verb}")


def _action(one: TaskResults, what: str, command: str, objects: list[Entity], outcome: list[Entity]) -> Entity:
    made = {
        "@id": f"#{quote(one.run)}/{quote(what)}",
        "@type": "CreateAction",
        "name": f"medseg {what}, {one.task}",
        "description": command,
        "instrument": _ref(_PROGRAM),
        "object": objects if len(objects) > 1 else objects[0],
    }
    return made | ({"result": outcome if len(outcome) > 1 else outcome[0]} if outcome else {})


def _circumstances(one: TaskResults, fit: Fit) -> Iterator[Entity]:
    """With what seed and how long a fold was trained, and on what."""
    kind = ", ".join(f"{name} {value}" for name, value in fit.machine.items())
    versions = ", ".join(f"{name} {number}" for name, number in fit.versions.items())
    on = f"{fit.device}, {fit.threads or 'all'} threads; {kind}; {versions}"
    yield _property(one, fit, "seed", str(fit.seed))
    yield _property(one, fit, "steps", str(fit.steps))
    yield _property(one, fit, "processor", on)
    yield _property(one, fit, "seconds", str(fit.seconds)) | {"unitText": "s"}
    memory = "not known" if fit.peak_memory_bytes is None else str(fit.peak_memory_bytes)
    yield _property(one, fit, "memory", memory) | {"unitText": "bytes"}


def _property(one: TaskResults, fit: Fit, name: str, value: str) -> Entity:
    return {"@id": _about(one, fit, name), "@type": "PropertyValue", "name": name, "value": value}


def _about(one: TaskResults, fit: Fit, what: str) -> str:
    return f"#{quote(one.run)}/{fit.configuration}/fold{fit.fold}/{what}"


def _file(path: str, sha: str, size: int) -> Entity:
    kind = _FORMATS.get(PurePosixPath(path).suffix, "application/octet-stream")
    return {
        "@id": _id(path),
        "@type": "File",
        "name": path,
        "sha256": sha,
        "contentSize": str(size),
        "encodingFormat": kind,
    }


def _refs(paths: list[str], files: Files) -> list[Entity]:
    return [_ref(_id(path)) for path in paths if path in files]


def _path(run: str, name: str) -> str:
    return (PurePosixPath(run) / name).as_posix()


def _id(path: str) -> str:
    return quote(path)


def _data_id(one: TaskResults) -> str:
    return f"#data/{quote(one.task)}/{one.data.sha256[:12]}"


def _ref(name: str) -> Entity:
    return {"@id": name}

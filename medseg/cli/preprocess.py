"""``medseg preprocess``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.common import (
    FOLDER,
    RunFolder,
    available_cores,
    configuration_option,
    progress,
    threads_option,
    unlabelled_cases,
)

if TYPE_CHECKING:
    from medseg.core.instances import InstanceMap
    from medseg.core.volume import LabelMap, Volume
    from medseg.dataset.task import Case
    from medseg.io.store import CaseStore
    from medseg.plan.plan import Plan

# Voxels of each structure that training may centre a patch on; more would not make it more varied.
_PLACES = 20_000
# Classes and things of a batch are 16-bit numbers.
_MOST_CODES = 2**15


@click.command()
@click.argument("run", type=FOLDER)
@configuration_option
@threads_option
def preprocess(run: Path, configuration: str, threads: int | None) -> None:
    """Bring every training case of RUN onto the network's grid and normalise it.

    Where the plan learns from scans without labels, those that the task lists under test too. A
    configuration that comes after another one (3d-cascade) needs all folds of that trained, and their
    held-out cases predicted: it is told of each case what a model found that had not seen it.
    """
    import numpy as np

    from medseg.cli.stages import first_stage
    from medseg.core.errors import InputError
    from medseg.core.instances import parted
    from medseg.core.resample import resample
    from medseg.dataset.task import load_case, load_image, load_instances
    from medseg.plan.fingerprint import image_hash
    from medseg.preprocess.regrid import preprocess as preprocess_volume

    folder = RunFolder(run)
    task, plan = folder.task(), folder.plan()
    chosen = plan.configuration(configuration)
    scans = unlabelled_cases(task) if plan.training.wants_unlabelled else ()
    before = first_stage(folder, task, plan, configuration)
    models = before.digests if before else ()

    def prepared(volume: Volume, case: Case) -> Volume:
        found = before.found(task, case.id) if before else None
        try:
            return preprocess_volume(volume, plan, chosen, found)
        except InputError as error:
            raise error.of_case(case.id) from None

    def labelled(store: CaseStore, case: Case) -> None:
        volume, labels = load_case(task, case)
        image = prepared(volume, case)
        if chosen.network.value.counts and case.instances is not None:
            labels = _numbered(labels, load_instances(task, case), plan, case)
        regridded = resample(labels, onto=image.grid).values
        places, plain = {}, regridded
        if chosen.network.value.counts:
            plain, _ = parted(regridded, plan.thing_step)
        for number in plan.label_set.numbers:
            where = np.flatnonzero(plain == number)
            places[number] = where[:: max(1, len(where) // _PLACES)]
        store.write(case.id, image.values, regridded, places)

    known = {row.image_hash: row.id for row in folder.fingerprint().cases} if scans else {}

    def unlabelled(store: CaseStore, case: Case) -> None:
        volume = load_image(task, case)
        if twin := known.get(image_hash(volume)):
            raise InputError(
                f"it is listed under test, and its image equals that of the training case {twin}, which some fold "
                "holds out",
                "Take it off dataset.json",
                case=case.id,
            )
        store.write(case.id, prepared(volume, case).values, None, {})

    def fill(path: Path, cases: Sequence[Case], one: Callable[[CaseStore, Case], None]) -> None:
        index = (plan.preparation(configuration), configuration, models)
        _fill(path, cases, one, index, threads or available_cores())

    with folder.alone("preprocess", configuration):
        if scans:
            fill(folder.unlabelled(configuration), scans, unlabelled)
            click.echo(f"{len(scans)} scans without labels in {folder.unlabelled(configuration)}")
        fill(folder.store(configuration), task.cases, labelled)
    click.echo(f"{len(task.cases)} cases in {folder.store(configuration)}")


def _numbered(labels: LabelMap, instances: InstanceMap, plan: Plan, case: Case) -> LabelMap:
    """The labels with the number of each voxel's thing; InputError where there are more than training can tell."""
    import numpy as np

    from medseg.core.errors import InputError
    from medseg.core.instances import numbered
    from medseg.core.volume import LabelMap

    most = _MOST_CODES // plan.outputs
    if len(instances.instances) > most:
        raise InputError(
            f"it has {len(instances.instances)} instances, and training tells {most} of one scan",
            "Crop the scan",
            case=case.id,
        )
    ranks = np.zeros(max((one.number for one in instances.instances), default=0) + 1, dtype=np.int64)
    ranks[[one.number for one in instances.instances]] = np.arange(1, len(instances.instances) + 1)
    codes = numbered(labels.values, ranks[instances.values], plan.thing_step)
    return LabelMap(codes, labels.grid, labels.labels)


def _fill(
    path: Path,
    cases: Sequence[Case],
    one: Callable[[CaseStore, Case], None],
    index: tuple[str, str, Sequence[str]],
    threads: int,
) -> None:
    """A store of the cases, written one by one; its ``index`` last: preparation, configuration and models."""
    from medseg.io.files import new_folder
    from medseg.io.store import INDEX, CaseStore

    new_folder(path, holds=INDEX)
    (path / INDEX).unlink(missing_ok=True)
    store = CaseStore(path)
    with ThreadPoolExecutor(threads) as pool:
        for _ in progress("preprocess")(pool.map(lambda case: one(store, case), cases), len(cases)):
            pass
    store.finish(tuple(case.id for case in cases), *index)

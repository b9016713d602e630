"""``medseg preprocess``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from medseg.cli.common import FOLDER, RunFolder, available_cores, configuration_option, progress, threads_option

# Voxels of each structure that training may centre a patch on; more would not make it more varied.
_PLACES = 20_000


@click.command()
@click.argument("run", type=FOLDER)
@configuration_option
@threads_option
def preprocess(run: Path, configuration: str, threads: int | None) -> None:
    """Bring every training case of RUN onto the network's grid and normalise it."""
    import numpy as np

    from medseg.core.errors import InputError
    from medseg.core.resample import resample
    from medseg.dataset.task import Case, load_case
    from medseg.io.files import new_folder
    from medseg.io.store import INDEX, CaseStore
    from medseg.preprocess.regrid import preprocess as preprocess_volume

    folder = RunFolder(run)
    task, plan = folder.task(), folder.plan()
    chosen = plan.configuration(configuration)
    path = new_folder(folder.store(configuration), holds=INDEX)
    (path / INDEX).unlink(missing_ok=True)
    store = CaseStore(path)

    def one(case: Case) -> None:
        volume, labels = load_case(task, case)
        try:
            prepared = preprocess_volume(volume, plan, chosen)
        except InputError as error:
            raise error.of_case(case.id) from None
        regridded = resample(labels, onto=prepared.grid).values
        places = {}
        for number in plan.label_set.numbers:
            where = np.flatnonzero(regridded == number)
            places[number] = where[:: max(1, len(where) // _PLACES)]
        store.write(case.id, prepared.values, regridded, places)

    with ThreadPoolExecutor(threads or available_cores()) as pool:
        for _ in progress("preprocess")(pool.map(one, task.cases), len(task.cases)):
            pass
    store.finish(tuple(case.id for case in task.cases), plan.preparation(configuration), configuration)
    click.echo(f"{len(task.cases)} cases in {store.folder}")

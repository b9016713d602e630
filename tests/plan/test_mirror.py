from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medseg.core.labels import LabelSet
from medseg.dataset.task import load_task
from medseg.plan.fingerprint import CasePrint, Fingerprint, LabelPlace, fingerprint
from medseg.plan.mirror import mirrored

TWO = LabelSet.from_names(["liver", "tumour"])


def placed(*cases: dict[int, tuple[float, float, float]], extent: float = 0.2) -> Fingerprint:
    """Cases in which labels have these centres."""
    return Fingerprint(
        task="t",
        cases=tuple(
            CasePrint(
                id=str(n),
                shape=(9, 9, 9),
                box=(9, 9, 9),
                spacing=(1, 1, 1),
                orientation="RAS",
                label_mm3=dict.fromkeys(case, 1.0),
                label_places={
                    k: LabelPlace(centre=centre, extent=(extent, extent, extent)) for k, centre in case.items()
                },
                label_pieces=dict.fromkeys(case, 1),
                label_cut=(),
                channels=(),
                nonzero_share=1,
                image_hash=str(n),
            )
            for n, case in enumerate(cases)
        ),
        intensities=(),
    )


def test_one_structure_in_the_middle_may_be_mirrored_along_every_axis() -> None:
    axes, why = mirrored(placed(*[{1: (0.5, 0.45, 0.55)}] * 5), LabelSet.from_names(["prostate"]))
    assert axes == (0, 1, 2)
    assert "no label" in why


def test_what_lies_on_one_side_of_another_may_not_be_swapped_with_it() -> None:
    cases = [{1: (0.5, 0.6, 0.5), 2: (0.5, 0.4, 0.5 + 0.02 * (-1) ** n)} for n in range(20)]
    axes, why = mirrored(placed(*cases), TWO)
    assert axes == (0, 2)
    assert "not y: liver lies in front of tumour in 100% of 20 cases" in why


@pytest.mark.parametrize(("share", "allowed"), [(17, True), (18, False)])
def test_nine_cases_of_ten_are_always(share: int, allowed: bool) -> None:
    cases = [{1: (0.5, 0.5, 0.5), 2: (0.55 if n < share else 0.45, 0.5, 0.5)} for n in range(20)]
    assert (0 in mirrored(placed(*cases), TWO)[0]) == allowed


def test_a_hairs_breadth_is_no_side() -> None:
    cases = [{1: (0.5, 0.5, 0.5), 2: (0.505, 0.5, 0.5)}] * 20
    assert 0 in mirrored(placed(*cases), TWO)[0]
    assert 0 not in mirrored(placed(*cases, extent=0.02), TWO)[0]


def test_an_organ_on_one_side_of_the_body_stays_there() -> None:
    axes, why = mirrored(placed(*[{1: (0.3, 0.42, 0.5)}] * 8), LabelSet.from_names(["spleen"]))
    assert axes == (1, 2)
    assert "not x: spleen lies to the left of the middle in 100% of 8 cases" in why


def test_lesions_anywhere_are_no_reason() -> None:
    rng = np.random.default_rng(0)
    cases = [
        {1: (float(rng.uniform(0.1, 0.9)), 0.5, 0.5), 2: (float(rng.uniform(0.1, 0.9)), 0.5, 0.5)} for _ in range(40)
    ]
    assert 0 in mirrored(placed(*cases), TWO)[0]


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("Left Atrium", (1, 2)),
        ("kidney_right", (1, 2)),
        ("Anterior", (0, 2)),
        ("upper lobe", (0, 1)),
        ("brightness", (0, 1, 2)),
        ("left upper lobe", (1,)),
    ],
)
def test_names_tell_the_ends_apart(name: str, axes: tuple[int, ...]) -> None:
    found, why = mirrored(placed(*[{1: (0.5, 0.5, 0.5)}] * 3), LabelSet.from_names([name]))
    assert found == axes
    assert len(found) == 3 or name in why


def test_of_what_one_case_shows_nothing_is_mirrored_that_could_matter() -> None:
    axes, _ = mirrored(placed({1: (0.5, 0.5, 0.5), 2: (0.52, 0.5, 0.46)}), TWO)
    assert axes == (1,)


def test_two_blobs_beside_each_other(tiny_task: Any, tmp_path: Any) -> None:
    task = load_task(tiny_task(tmp_path / "Task50_blobs", labels=("one blob", "other blob")))
    axes, why = mirrored(fingerprint(task), task.labels)
    assert axes == (1, 2)
    assert "other blob" in why


def test_anterior_and_posterior_of_real_hippocampi_are_not_swapped(shared_data: Any) -> None:
    """Mirroring all axes gave .43 instead of .84; that y and z matter shows in the places alone."""
    task = load_task(shared_data / "Task04_Hippocampus")
    measured = fingerprint(task)
    axes, _ = mirrored(measured, task.labels)
    assert not {1, 2} & set(axes)
    axes, why = mirrored(measured, LabelSet.from_names(["head", "tail"]))
    assert not {1, 2} & set(axes)
    assert "head lies in front of tail in 100% of 200 cases" in why

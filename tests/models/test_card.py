"""The card says what the package's data say, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from medseg.core.errors import InputError
from medseg.models.build import build
from medseg.models.card import card
from medseg.models.evaluation import CaseScore, Compared, Evaluation, Figure, StructureScore, Tried
from medseg.models.experience import Experience, Range
from medseg.models.package import INDEX, ModelPackage, load_package, save_package
from medseg.models.refinement import Crf, Refinement, Rule
from medseg.plan.fingerprint import Source

LARGEST = Rule(name="left blob", number=1, largest=True)
SMALL = Rule(name="right blob", number=2, smallest_mm3=12.5)

ONE = Range(low=1, high=2)
SEEN: dict[str, Any] = {
    "cases": 2,
    "spacing": (ONE,) * 3,
    "extent": (ONE,) * 3,
    "orientations": ("RAS",),
    "channels": (),
    "structures": (),
    "source": None,
}


def evaluation() -> Evaluation:
    def figure(mean: float) -> Figure:
        return Figure(mean=mean, low=mean - 0.012, high=mean + 0.012)

    return Evaluation(
        task="Task00_blobs",
        description="Random ellipsoids.",
        licence="CC0",
        cases=30,
        subjects=15,
        folds=(0, 1, 2),
        of_folds=3,
        leaks=0,
        dice=figure(0.871),
        before=figure(0.862),
        structures=(
            StructureScore(
                name="left blob", number=1, cases=30, missed=1, invented=0,
                dice=figure(0.9), before=figure(0.881), hd95_mm=3.25,
            ),
            StructureScore(
                name="right blob", number=2, cases=0, missed=0, invented=0, dice=None, before=None, hd95_mm=None
            ),
        ),
        worst=(CaseScore(case="blob_007", dice=0.512), CaseScore(case="blob_011", dice=0.603)),
        compared=(
            Compared(configuration="3d", folds=(0, 1, 2), cases=30, dice=figure(0.862), behind=None),
            Compared(configuration="2d", folds=(0, 1, 2), cases=30, dice=figure(0.832), behind=figure(0.01)),
        ),
        tried=(
            Tried(rule=LARGEST, gain=figure(0.0191), better=9, worse=2, kept=True),
            Tried(rule=SMALL, gain=figure(-0.0023), better=1, worse=4, kept=False),
        ),
        resamples=4000,
        seed=0,
    )  # fmt: skip


@pytest.fixture
def package(small_plan: Any) -> ModelPackage:
    torch.manual_seed(0)
    plan = small_plan()
    weights = dict(build(plan.configuration("3d"), 1, 3).state_dict())
    return ModelPackage(
        plan=plan,
        configuration_name="3d",
        members=(weights,) * 3,
        trained_on=("a", "b"),
        held_out=(),
        provenance={"seed": 4, "steps": 250, "versions": {"medseg": "9.9"}, "folds": {"0": {"seed": 4}}},
        refinement=Refinement(rules=(LARGEST,)),
        evaluation=evaluation(),
    )


def test_every_figure_of_the_card_is_the_packages(package: ModelPackage) -> None:
    text = card(package)
    for words in (
        "Research software; not a medical device.",
        "the channel CT",
        "3 networks, whose results are averaged",
        "| 2 | right blob |  |",
        "Task00_blobs: Random ellipsoids",
        "licence of the data: CC0",
        "spacing 1 x 1 x 2 mm, patch 16 x 16 x 16 voxels",
        "250 steps of 2 patches",
        "each of 30 cases, of 15 subjects, was predicted by a network that was trained on other subjects' cases",
        "(3 of 3 folds)",
        "| left blob | 0.900 (0.888 to 0.912) | 0.881 (0.869 to 0.893) | 3.25 | 30 | 1 | 0 |",
        "| right blob | - | - | - | 0 | 0 | 0 |",
        "| mean | 0.871 (0.859 to 0.883) | 0.862 (",
        "blob_007 (0.512), blob_011 (0.603)",
        "| 2d | 0.832 (0.820 to 0.844) | 30 | 0.010 (-0.002 to 0.022), not clearly |",
        "Kept: left blob: its largest piece alone.",
        "| left blob | its largest piece alone | +0.0191 | +0.0071 to +0.0311 | 9 | 2 | yes |",
        "| right blob | no piece below 12.5 mm3 | -0.0023 |",
        "Not calibrated",
        "15 subjects are few",
        "medseg train RUN --all-folds -c 3d -c 2d --seed 4",
        "versions: medseg 9.9",
        package.digest(),
        package.plan.digest(),
    ):
        assert words in text, words
    assert "None" not in text


def test_other_data_give_another_card(package: ModelPackage) -> None:
    known = evaluation().model_copy(update={"folds": (0, 2), "licence": "", "leaks": 2})
    text = card(replace(package, evaluation=known, refinement=None))
    assert "licence of the data: not stated" in text
    assert "trained on other cases (2 of 3 folds)" in text
    assert "Of 2 subjects a network knew another case" in text
    assert "medseg choose RUN -c 3d --partial" in text
    assert "\nNone.\n" in text


def test_too_few_subjects_are_told_as_such(package: ModelPackage) -> None:
    few = evaluation().model_copy(update={"subjects": 2, "dice": Figure(mean=0.8)})
    text = card(replace(package, evaluation=few))
    assert "2 subjects are too few to say how good it is on others" in text
    assert "not in the intervals" not in text


def test_a_single_fold_has_a_card_of_what_is_known(package: ModelPackage) -> None:
    one = replace(package, members=package.members[:1], evaluation=None, refinement=None, provenance={"fold": 2})
    text = card(one)
    assert "One network." in text
    assert "How good" not in text
    assert "medseg train RUN -c 3d --fold 2 --seed 0\n" in text
    begun = card(replace(one, provenance={"fold": 2, "start": "abc"}))
    assert "--fold 2 --seed 0 --from MODEL  # of which the digest is abc\n" in begun


def test_what_the_owner_says_of_the_data_is_told(package: ModelPackage) -> None:
    source = Source(description="Ellipsoids.", licence="CC-BY 4.0", reference="A clinic", release="1.0 2018")
    text = card(replace(package, experience=Experience.model_construct(**{**SEEN, "source": source})))
    for words in ("Task00_blobs: Ellipsoids\n", "- source: A clinic, release 1.0 2018\n", "the data: CC-BY 4.0\n"):
        assert words in text
    # What nobody noted is taken from what `medseg choose` wrote down.
    assert "licence of the data: CC0\n" in card(replace(package, experience=Experience.model_construct(**SEEN)))


def test_words_from_files_are_no_markup(package: ModelPackage) -> None:
    evil = "x\n\n# Approved | ![a](http://e/x) <script>alert(1)</script> `c` **b** \u202e"
    source = Source(description=evil, licence=evil, reference=evil, release=evil)
    plan = package.plan.model_copy(update={"task": evil, "channels": (evil,)})
    known = evaluation().model_copy(update={"worst": (CaseScore(case=evil + 9000 * "y", dice=0.5),)})
    seen = Experience.model_construct(**{**SEEN, "source": source})
    provenance = {"versions": {evil: evil}, "rounded_from": evil, "imported": evil}
    text = card(replace(package, plan=plan, evaluation=known, experience=seen, provenance=provenance))
    assert not re.search(r"(?<!\\)(<script|\[a\]|`c`|\*\*b)", text)
    assert "\n# Approved" not in text
    assert "\u202e" not in text
    assert text.count("\n# ") == 0
    assert max(map(len, text.splitlines())) < 1200


def test_the_package_holds_rules_figures_and_the_card_of_them(tmp_path: Path, package: ModelPackage) -> None:
    save_package(tmp_path / "p", package)
    found = load_package(tmp_path / "p")
    assert (found.refinement, found.evaluation) == (package.refinement, package.evaluation)
    assert (tmp_path / "p" / "README.md").read_text() == card(found)
    assert found.digest() == package.digest()
    # What is done to the labels is part of which model it is.
    assert package.digest() != replace(package, refinement=None).digest()
    save_package(tmp_path / "p", replace(package, refinement=None, evaluation=None))
    assert load_package(tmp_path / "p").refinement is None
    assert not (tmp_path / "p" / "refinement.json").exists()


def test_a_field_is_told_and_kept_with_the_package(package: ModelPackage, tmp_path: Path) -> None:
    """And of one without, files and digest are as they were before there were any."""
    field, known = Crf(), evaluation()
    tried = (
        *known.tried,
        Tried(rule=field, gain=Figure(mean=0.012, low=0.0, high=0.024), better=20, worse=3, kept=True),
    )
    known = known.model_copy(update={"tried": tried})
    made = replace(package, refinement=Refinement(rules=(LARGEST,), crf=field), evaluation=known)
    text = card(made)
    assert (
        "Kept: left blob: its largest piece alone; all: borders moved to edges within 4 mm (CRF, appearance 2)." in text
    )
    assert "| all | borders moved to edges within 4 mm (CRF, appearance 2) | +0.0120 | +0.0000 to +0.0240 | 20" in text
    assert "medseg choose RUN -c 3d -c 2d --crf" in text
    assert "--crf" not in card(package)
    save_package(tmp_path / "p", made)
    found = load_package(tmp_path / "p")
    assert (found.refinement, found.evaluation, found.digest()) == (made.refinement, known, made.digest())
    assert made.digest() != package.digest()
    save_package(tmp_path / "q", package)
    rule = {"name": "left blob", "number": 1, "largest": True, "smallest_mm3": 0.0}
    assert json.loads((tmp_path / "q" / "refinement.json").read_text()) == {"format": 1, "rules": [rule]}


@pytest.mark.parametrize("name", ["refinement.json", "evaluation.json"])
def test_they_are_sealed_and_read_strictly(tmp_path: Path, package: ModelPackage, name: str) -> None:
    folder = tmp_path / "p"
    save_package(folder, package)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data.replace(b"left", b"lefT"))
    refused(folder, "was changed after it was written")
    resign(folder, name)
    if name == "refinement.json":
        refused(folder, "a rule for a structure that the plan does not know")
    for spoilt in ({**json.loads(data), "format": 2}, {**json.loads(data), "more": 1}, {}):
        (folder / name).write_text(json.dumps(spoilt))
        resign(folder, name)
        refused(folder, "has another format")
    (folder / name).unlink()
    refused(folder, "is missing")


def refused(folder: Path, word: str) -> None:
    with pytest.raises(InputError, match=word):
        load_package(folder)


def resign(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["checksums"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / INDEX).write_text(json.dumps(index))


def test_rules_that_say_nothing_or_twice_are_none() -> None:
    for wrong in ({}, {"largest": True, "smallest_mm3": 3}, {"smallest_mm3": -1}):
        with pytest.raises(ValidationError):
            Rule(name="a", number=1, **wrong)
    with pytest.raises(ValidationError):
        Refinement(rules=(LARGEST, LARGEST))
    with pytest.raises(ValidationError):
        Refinement(rules=())

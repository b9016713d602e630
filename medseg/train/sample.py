"""Which patch comes next. A step's patches depend on the seed and the step's number alone, so that
a run can be taken up again anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.io.store import StoredCase


@dataclass(frozen=True)
class Place:
    """A patch to cut: the case, and the patch's middle in voxels of the case's array."""

    case: int
    centre: tuple[float, float, float]


def draw_case(seed: int, number: int, cases: int) -> int:
    """The case of the ``number``-th patch: all cases in a new random order each round."""
    round_, place = divmod(number, cases)
    return int(np.random.default_rng([seed, 1, round_]).permutation(cases)[place])


def holders(cases: Sequence[StoredCase]) -> dict[int, tuple[int, ...]]:
    """For each label number that any case has, the cases that have it."""
    numbers = sorted({number for case in cases for number, where in case.places.items() if len(where)})
    return {n: tuple(i for i, case in enumerate(cases) if len(case.places.get(n, ()))) for n in numbers}


def draw_place(
    rng: np.random.Generator,
    cases: Sequence[StoredCase],
    case: int,
    patch: tuple[int, int, int],
    foreground: float,
    *,
    of_class: Mapping[int, Sequence[int]] | None = None,
    class_share: float = 0.0,
) -> Place:
    """A patch's place in a case.

    With probability ``foreground`` it is centred on a random voxel of a random structure of the
    case, else anywhere. Of those that are centred on a structure, ``class_share`` draw one of
    ``of_class`` (see `holders`), each as likely, and one of its cases in place of the one given, so
    that a structure which is in one case of a hundred is seen as often as another. The patch stays
    within the array, or has it in its middle, to a voxel, along an axis where the array is shorter.
    """
    structure = None
    wanted = rng.random() < foreground
    if wanted and of_class and rng.random() < class_share:
        structure = sorted(of_class)[rng.integers(len(of_class))]
        case = of_class[structure][int(rng.integers(len(of_class[structure])))]
    shape = cases[case].shape
    places = {number: where for number, where in cases[case].places.items() if len(where)}
    if wanted and places:
        if structure is None:
            structure = sorted(places)[rng.integers(len(places))]
        where = places[structure]
        middle = np.array(np.unravel_index(where[rng.integers(len(where))], shape), dtype=float)
    else:
        middle = rng.random(3) * np.array(shape) - 0.5
    low = np.array([(p - 1) / 2 for p in patch])
    high = np.array([n - 1 - (p - 1) / 2 for n, p in zip(shape, patch, strict=True)])
    # A patch that is longer by an odd number reaches one voxel farther on one side: were its voxels between
    # those of the case, a mirrored one would be made of averages.
    amid = np.floor((low + high) / 2 - low) + low
    centre = np.where(high <= low, amid, np.clip(np.round(middle - low) + low, low, high))
    return Place(case, (float(centre[0]), float(centre[1]), float(centre[2])))

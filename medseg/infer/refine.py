"""What may be done to a label map once it is decided: fewer structures, no crumbs, one file each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.labels import LabelSet
from medseg.core.shape import Parts, connected
from medseg.core.volume import LabelMap, Volume
from medseg.models.refinement import Refinement, Rule
from medseg.plan.plan import Normalisation


def chosen(labels: LabelSet, names: Sequence[str]) -> LabelSet:
    """The structures of these names, in the set's own order; all of them where none is named.

    Raises InputError for a name that is not in the set.
    """
    if not names:
        return labels
    known = {label.name.casefold(): label for label in labels}
    for name in names:
        if name.casefold() not in known:
            raise InputError(f"the model knows no structure {name!r}", f"It knows {', '.join(labels.names)}")
    wanted = {name.casefold() for name in names}
    return LabelSet(tuple(label for label in labels if label.name.casefold() in wanted))


def keep_only(label_map: LabelMap, labels: LabelSet) -> LabelMap:
    """The map with these structures alone; the others become background."""
    if labels.numbers == label_map.labels.numbers:
        return label_map
    table = np.zeros(max(label_map.labels.numbers) + 1, dtype=label_map.values.dtype)
    table[list(labels.numbers)] = labels.numbers
    return LabelMap(table[label_map.values], label_map.grid, labels)


def without_small(label_map: LabelMap, smallest_mm3: float) -> tuple[LabelMap, dict[str, int]]:
    """The map without pieces of a structure smaller than ``smallest_mm3``, and of how many pieces
    each structure was rid (those of which none was are not named).

    A piece is what touches by faces, edges or corners. The pieces become background.
    """
    if smallest_mm3 <= 0:
        return label_map, {}
    parts = connected(label_map.values)
    small = (parts.sizes < smallest_mm3 / label_map.grid.voxel_volume) & (parts.numbers > 0)
    if not small.any():
        return label_map, {}
    counts = np.bincount(parts.numbers[small])
    removed = {label.name: int(counts[label.number]) for label in label_map.labels if label.number < len(counts)}
    return _without(label_map, parts, small), {name: n for name, n in removed.items() if n}


def refined(label_map: LabelMap, rules: Sequence[Rule]) -> tuple[LabelMap, dict[str, float]]:
    """The map after a model's rules for its structures, and of what share of its voxels each structure
    was rid (those of which none was are not named). What goes becomes background.

    Rules for structures that the map does not have do nothing.
    """
    known = [rule for rule in rules if rule.number in label_map.labels.numbers]
    if not known:
        return label_map, {}
    parts = connected(label_map.values)
    goes = np.zeros(len(parts.sizes), dtype=np.bool_)
    shares = {}
    for rule in known:
        mine = np.flatnonzero(parts.numbers == rule.number)
        sizes = parts.sizes[mine]
        goes[mine] = ~rule.kept(sizes, label_map.grid.voxel_volume)
        if gone := int(sizes[goes[mine]].sum()):
            shares[rule.name] = gone / int(sizes.sum())
    return (_without(label_map, parts, goes), shares) if shares else (label_map, {})


def post_processed(
    label_map: LabelMap, volume: Volume, refinement: Refinement | None, intensities: tuple[Normalisation, ...]
) -> tuple[LabelMap, dict[str, float]]:
    """The map after all that a model does to its labels, from the scan on the same grid, normalised as
    ``intensities`` say; and what `refined` tells of its rules."""
    if refinement is None:
        return label_map, {}
    label_map, shares = refined(label_map, refinement.rules)
    if refinement.crf is None:
        return label_map, shares
    from medseg.infer.crf import sharpened  # scipy takes a while to load, and most models need it not

    return sharpened(label_map, volume, refinement.crf, intensities), shares


def _without(label_map: LabelMap, parts: Parts, goes: NDArray[np.bool_]) -> LabelMap:
    values = label_map.values.copy(order="K")
    values[goes[parts.index]] = 0
    return LabelMap(values, label_map.grid, label_map.labels)

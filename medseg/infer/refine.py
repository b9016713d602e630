"""What may be done to a label map once it is decided: fewer structures, no crumbs, one file each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg.core.errors import InputError
from medseg.core.labels import LabelSet
from medseg.core.shape import connected
from medseg.core.volume import LabelMap


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
    values = label_map.values.copy(order="K")
    values[small[parts.index]] = 0
    counts = np.bincount(parts.numbers[small])
    removed = {label.name: int(counts[label.number]) for label in label_map.labels if label.number < len(counts)}
    return LabelMap(values, label_map.grid, label_map.labels), {name: n for name, n in removed.items() if n}

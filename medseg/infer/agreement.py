"""How far an engine's results are those of torch in float32: measured on real scans, kept in the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from medseg.infer.engine import Engine, Float32, OpenVinoEngine, has_openvino, open_engine, openvino_core
from medseg.models.package import Agreement, ModelPackage
from medseg.plan.plan import Configuration

# Tiles looked at of each case: the middle ones of those that would cover it.
_TILES = 2


def measure(
    package: ModelPackage, images: Mapping[str, Float32], threads: int | None = None, *, tiles: int | None = None
) -> dict[str, Agreement]:
    """The agreement of each engine that can run a package here, other than torch, by engine and
    precision ("openvino-f32"). ``images`` are preprocessed cases (C, X, Y, Z) by name, of which each
    engine looks at so many ``tiles``, all unless said. Empty where there is no other engine, or no case."""
    if not package.graphs or not images or not has_openvino():
        return {}
    reference = open_engine(package, "torch-cpu", threads, precision="f32")
    capable = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    found = {}
    for precision in ("f32", "bf16") if capable else ("f32",):
        engine = OpenVinoEngine(package, threads, precision=precision)
        found[f"{engine.name}-{precision}"] = agreement(engine, reference, images, package.configuration, tiles=tiles)
    return found


def agreement(
    engine: Engine,
    reference: Engine,
    images: Mapping[str, Float32],
    configuration: Configuration,
    *,
    tiles: int | None = None,
) -> Agreement:
    """How far an engine's logits and labels are another's, over so many ``tiles`` of preprocessed cases
    (C, X, Y, Z), all unless said. Of labels that neither finds the Dice counts for nothing."""
    difference, same, voxels = 0.0, 0, 0
    seen: list[str] = []
    counts = np.zeros((0, 3), dtype=np.int64)
    for case, tile in islice(_tiles(images, configuration), tiles):
        seen += [case] if case not in seen else []
        one, other = _logits(engine, tile), _logits(reference, tile)
        difference = max(difference, float(np.abs(one - other).max()))
        labels, expected = one.argmax(axis=0), other.argmax(axis=0)
        same += int(np.count_nonzero(labels == expected))
        voxels += labels.size
        tally = _tally(labels, expected, len(one))
        counts = counts + tally if len(counts) else tally
    found = counts[1:][counts[1:, 1:].sum(axis=1) > 0]
    dice = 2 * found[:, 0] / found[:, 1:].sum(axis=1)
    return Agreement(
        precision=engine.precision,
        cases=tuple(seen),
        largest_difference=difference,
        label_agreement=same / voxels,
        least_dice=float(dice.min()) if len(dice) else 1.0,
    )


def _tiles(images: Mapping[str, Float32], configuration: Configuration) -> Iterator[tuple[str, Float32]]:
    for case, image in images.items():
        for tile in middle_tiles(image, configuration.patch.value):
            yield case, tile


def middle_tiles(image: Float32, patch: tuple[int, ...], most: int = _TILES) -> Iterator[Float32]:
    """Tiles (C, *patch) along the middle of the longest axis of an image (C, X, Y, Z), side by side;
    zeros around an image that is smaller."""
    short = [max(0, p - n) for n, p in zip(image.shape[1:], patch, strict=True)]
    image = np.pad(image, [(0, 0), *((s // 2, s - s // 2) for s in short)])
    sizes = image.shape[1:]
    axis = int(np.argmax([n / p for n, p in zip(sizes, patch, strict=True)]))
    corner = [(n - p) // 2 for n, p in zip(sizes, patch, strict=True)]
    count = min(most, sizes[axis] // patch[axis])
    first = (sizes[axis] - count * patch[axis]) // 2
    for i in range(count):
        corner[axis] = first + i * patch[axis]
        yield image[(slice(None), *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))]


def _logits(engine: Engine, tile: Float32) -> Float32:
    out = engine.numpy(engine.run(tile[None]))[0]
    return engine.head.apply(out) if engine.head else out


def _tally(labels: NDArray[np.int64], expected: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Voxels of each class (K, 3): of both, of the one, of the other."""
    both = np.bincount(labels[labels == expected], minlength=classes)
    return np.stack([both, *(np.bincount(m.ravel(), minlength=classes) for m in (labels, expected))], axis=1)

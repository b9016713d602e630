"""Borders moved to edges: known answers, and the slow and obvious beside the fast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.infer import crf as module
from medseg.infer.crf import Kernel, sharpened
from medseg.infer.refine import post_processed, refined
from medseg.models.refinement import Crf, Refinement, Rule
from medseg.plan.plan import Normalisation

LABELS = LabelSet((Label("organ", 2), Label("other", 5)))
AS_IT_IS = (Normalisation(channel="CT", kind="none"),)
STEP = Crf(contrast=0.3)


def on(values: NDArray[Any], spacing: tuple[float, float, float] = (1, 1, 1)) -> LabelMap:
    return LabelMap(values.astype(np.uint8), Grid.from_spacing(values.shape, spacing), LABELS)


def scan(values: NDArray[Any], like: LabelMap) -> Volume:
    return Volume(values.astype(np.float32)[None], like.grid)


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def ball(shape: tuple[int, int, int], spacing: tuple[float, float, float], radius: float) -> NDArray[np.float64]:
    """How far outside a ball in the middle, in mm, each voxel lies."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return np.sqrt(x * x + y * y + z * z) - radius


def wobble(shape: tuple[int, int, int], spacing: tuple[float, float, float], mm: float) -> NDArray[np.float64]:
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), 4 / np.array(spacing))
    return mm * noise / noise.std()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5)])
def test_a_wrong_border_moves_to_the_edge(spacing: tuple[float, float, float]) -> None:
    shape = tuple(round(44 / s) for s in spacing)
    outside = ball(shape, spacing, 15)
    truth, drawn = outside < 0, outside + wobble(shape, spacing, 1.5) < 0
    image = truth + np.random.default_rng(1).normal(0, 0.15, shape)
    labels = on(np.where(drawn, 2, 0), spacing)
    found = sharpened(labels, scan(image, labels), STEP, AS_IT_IS)
    assert dice(drawn, truth) < 0.95
    assert dice(found.values == 2, truth) > 0.97
    assert set(np.unique(found.values)) == {0, 2}
    assert found.labels == labels.labels


def test_a_right_border_stays_where_the_scan_shows_it() -> None:
    outside = ball((30, 30, 30), (1, 1, 1), 9)
    labels = on(np.where(outside < 0, 2, 0))
    image = (outside < 0) + np.random.default_rng(1).normal(0, 0.1, outside.shape)
    found = sharpened(labels, scan(image, labels), STEP, AS_IT_IS)
    assert dice(found.values == 2, outside < 0) > 0.995


def test_without_an_edge_a_ragged_border_becomes_smooth_and_a_smooth_one_stays() -> None:
    rng = np.random.default_rng(0)
    plane = np.zeros((24, 20, 20))
    plane[12:] = 2
    ragged = plane.copy()
    ragged[12] = np.where(rng.random((20, 20)) < 0.25, 0, 2)
    ragged[11] = np.where(rng.random((20, 20)) < 0.25, 2, 0)
    smooth = Crf(appearance=0.0, smoothness=4.0)
    for drawn in (plane, ragged):
        labels = on(drawn)
        found = sharpened(labels, scan(np.zeros(drawn.shape), labels), smooth, AS_IT_IS)
        assert (found.values != plane).mean() < 0.002


def test_only_the_band_changes() -> None:
    """Though the edge is farther off, and a hole in the organ is far from any border."""
    values = np.zeros((40, 24, 24))
    values[20:] = 2
    image = np.zeros(values.shape)
    image[12:] = 1
    image[34:37, 10:13, 10:13] = 0
    labels = on(values, (1, 1, 1))
    found = sharpened(labels, scan(image, labels), replaced(band_mm=3.0, appearance=8.0), AS_IT_IS)
    changed = np.flatnonzero((found.values != labels.values).any(axis=(1, 2)))
    assert len(changed) > 0
    assert {*changed.tolist()} <= {17, 18, 19, 20, 21, 22}
    # In mm, along every axis.
    thick = on(values, (4.0, 1.0, 1.0))
    found = sharpened(thick, scan(image, thick), replaced(band_mm=3.0, appearance=8.0), AS_IT_IS)
    changed = np.flatnonzero((found.values != thick.values).any(axis=(1, 2)))
    assert {*changed.tolist()} <= {19, 20}


def replaced(**changes: Any) -> Crf:
    return STEP.model_copy(update=changes)


def test_without_kernels_nothing_changes() -> None:
    values = np.random.default_rng(0).choice([0, 2, 5], (12, 10, 8))
    labels = on(values, (1, 2, 1.5))
    image = scan(np.random.default_rng(1).random(values.shape), labels)
    found = sharpened(labels, image, replaced(appearance=0.0, smoothness=0.0), AS_IT_IS)
    assert (found.values == labels.values).all()
    assert found.values is not labels.values


def test_nothing_and_everything_have_no_border() -> None:
    for value in (0, 2):
        labels = on(np.full((6, 6, 6), value))
        found = sharpened(labels, scan(np.random.default_rng(0).random((6, 6, 6)), labels), STEP, AS_IT_IS)
        assert (found.values == value).all()


# Beside an obvious version


def obvious(labels: LabelMap, image: NDArray[np.float64], crf: Crf) -> NDArray[Any]:
    """Every voxel of the band beside every other, every label at every voxel."""
    spacing, numbers = np.array(labels.grid.spacing), np.unique(labels.values)
    places = np.argwhere(np.ones(labels.values.shape))
    flat, light = labels.values.ravel(), image.reshape(len(image), -1).T
    far = np.full((len(flat), len(numbers)), np.inf)
    for column, number in enumerate(numbers):
        there = places[flat == number]
        for row, place in enumerate(places):
            steps = np.abs(there - place)
            nearest = np.argmin(((steps * spacing) ** 2).sum(axis=1))
            sides = np.maximum(steps[nearest] - 0.5, 0) * spacing
            far[row, column] = np.sqrt((sides**2).sum())
    far[far > crf.band_mm] = np.inf
    band = np.isfinite(far).sum(axis=1) > 1
    unary, where = -far[band] / crf.border_mm, places[band] * spacing

    def normalised(features: NDArray[np.float64]) -> NDArray[np.float64]:
        kernel = np.exp(-0.5 * ((features[:, None] - features) ** 2).sum(axis=2))
        root = np.sqrt(kernel.sum(axis=1))
        return np.asarray(kernel / root[:, None] / root)

    bright = np.concatenate([where / crf.appearance_mm, light[band] / crf.contrast], axis=1)
    kernels = ((crf.appearance, normalised(bright)), (crf.smoothness, normalised(where / crf.smoothness_mm)))
    belief = unary
    for _ in range(crf.iterations):
        share = np.exp(belief - belief.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        belief = unary + sum(weight * kernel @ share for weight, kernel in kernels)
    found = flat.copy()
    found[band] = numbers[belief.argmax(axis=1)]
    return found.reshape(labels.values.shape)


@pytest.mark.parametrize("channels", [1, 2])
def test_beside_the_obvious_version(channels: int) -> None:
    shape, spacing = (14, 12, 9), (1.0, 1.2, 2.0)
    outside = ball(shape, spacing, 4.5)
    drawn = outside + wobble(shape, spacing, 1.0)
    values = np.where(drawn < 0, 2, 0)
    values[:5][drawn[:5] >= 0] = 5
    labels = on(values, spacing)
    rng = np.random.default_rng(2)
    image = np.stack([(outside < 0) + rng.normal(0, 0.2, shape) for _ in range(channels)])
    field = Crf(band_mm=2.5, appearance_mm=3.0, contrast=0.4)
    found = sharpened(labels, Volume(image, labels.grid), field, AS_IT_IS * channels).values
    expected = obvious(labels, image, field)
    assert (expected != labels.values).mean() > 0.03
    assert (found != expected).mean() < 0.02
    assert (found != expected).sum() < 0.2 * (expected != labels.values).sum()


@pytest.mark.parametrize(("dimensions", "width", "off"), [(3, 4.0, 0.03), (4, 4.0, 0.04), (7, 2.0, 0.1)])
def test_the_kernel_is_nearly_the_gaussian(dimensions: int, width: float, off: float) -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, width, (800, dimensions))
    exact = np.exp(-0.5 * ((points[:, None] - points) ** 2).sum(axis=2))
    exact /= np.sqrt(np.outer(exact.sum(axis=1), exact.sum(axis=1)))
    values, rows = rng.random(800) * (points[:, 0] > width / 2), rng.permutation(800)[:500]
    kernel = Kernel(points)
    assert np.abs(kernel.of(np.arange(800), values) - exact @ values).max() < off
    some = np.zeros(800)
    some[rows] = values[rows]
    assert kernel.of(rows, values[rows]) == pytest.approx(kernel.of(np.arange(800), some)[rows])


def test_part_by_part_comes_to_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (60, 16, 14)
    values = np.zeros(shape)
    values[4:56, 4:12, 3:11] = 2
    image = np.zeros(shape)
    image[6:54, 5:12, 3:10] = 1
    labels = on(values)
    whole = sharpened(labels, scan(image, labels), STEP, AS_IT_IS).values
    monkeypatch.setattr(module, "_AT_ONCE", 4000)
    parted = sharpened(labels, scan(image, labels), STEP, AS_IT_IS).values
    assert (whole != labels.values).sum() > 500
    assert (parted != whole).mean() < 0.002


def test_memory_order_does_not_matter_and_again_is_the_same() -> None:
    outside = ball((20, 18, 16), (1, 1, 1), 6)
    labels = on(np.where(outside + wobble(outside.shape, (1, 1, 1), 1.0) < 0, 2, 0))
    image = scan(outside < 0, labels)
    first = sharpened(labels, image, STEP, AS_IT_IS).values
    turned = replace(labels, values=np.asfortranarray(labels.values))
    other = Volume(np.asfortranarray(image.values), image.grid)
    assert (sharpened(turned, other, STEP, AS_IT_IS).values == first).all()


# As a step of a model's


def test_it_comes_after_the_rules() -> None:
    values = np.zeros((24, 20, 16))
    values[4:12, 4:12, 4:12] = 2
    values[18:20, 4:6, 4:6] = 2
    labels, rule = on(values), Rule(name="organ", number=2, largest=True)
    image = scan(values == 2, labels)
    assert post_processed(labels, image, None, AS_IT_IS) == (labels, {})
    found, shares = post_processed(labels, image, Refinement(rules=(rule,), crf=STEP), AS_IT_IS)
    assert shares == refined(labels, (rule,))[1] != {}
    assert not found.values[16:].any()
    alone, _ = post_processed(labels, image, Refinement(rules=(rule,)), AS_IT_IS)
    assert (alone.values == refined(labels, (rule,))[0].values).all()


def test_a_refinement_without_a_field_says_nothing_of_one() -> None:
    rule = Rule(name="organ", number=2, largest=True)
    plain = {"name": "organ", "number": 2, "largest": True, "smallest_mm3": 0.0}
    assert Refinement(rules=(rule,)).model_dump(mode="json") == {"format": 1, "rules": [plain]}
    with_field = Refinement(crf=Crf(contrast=0.1)).model_dump(mode="json")
    assert with_field["crf"]["contrast"] == 0.1
    assert Refinement.model_validate(with_field).steps == (Crf(contrast=0.1),)
    for bad in (
        {"format": 1, "rules": []},
        {**with_field, "crf": {"contrast": 0}},
        {**with_field, "crf": {"sigma": 1}},
    ):
        with pytest.raises(ValueError, match=r"nothing is refined|greater than 0|Extra inputs"):
            Refinement.model_validate(bad)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap, Volume
from medseg.infer.engine import TorchEngine, pick_device
from medseg.infer.predict import Predictor, describe, predict, segment
from medseg.infer.refine import post_processed, refined
from medseg.infer.stream import Tally
from medseg.models.build import build
from medseg.models.package import ModelPackage
from medseg.models.refinement import Crf, Refinement, Rule
from medseg.plan.plan import Region

CPU = torch.device("cpu")
OBLIQUE = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix()
# One structure near 100, the other near 200; numbers with gaps, and beyond a byte.
LABELS = {3: "spleen", 300: "liver"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class ByIntensity(nn.Module):
    """Class by brightness alone: background near 0, the first structure near 100, the second near
    200, in units of the plan's normalisation (less 50, divided by 50)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = x[:, :1] * 50 + 50
        return torch.cat([-((value - level) ** 2) / 100 for level in (0.0, 100.0, 200.0)], dim=1)


def run(network: nn.Module, volume: Volume, plan: Any, configuration: str) -> tuple[LabelMap, np.ndarray]:
    engine = TorchEngine([network], plan.configuration(configuration), len(plan.labels) + 1, CPU)
    made = segment(engine, volume, plan, configuration, probability=True)
    return made.label_map, made.probability


def two_balls(grid: Grid, noise: float = 0.0) -> tuple[Volume, np.ndarray]:
    """A ball of 100 and one of 200 about the middle of the grid, and which voxel is in which."""
    at = grid.to_world(np.stack(np.indices(grid.shape), axis=-1))
    middle = grid.to_world((np.array(grid.shape) - 1) / 2)
    truth = np.zeros(grid.shape, dtype=int)
    for number, offset in ((1, (-9, 0, 0)), (2, (9, 2, 0))):
        truth[np.linalg.norm(at - middle - offset, axis=-1) < 7] = number
    values = truth * 100.0 + np.random.default_rng(0).normal(0, noise, grid.shape) if noise else truth * 100.0
    # Nowhere exactly zero, so that nothing is cropped.
    return Volume((values + 1)[None].astype(np.float32), grid), truth


def grid_about(spacing: tuple[float, float, float], direction: np.ndarray) -> Grid:
    shape = [max(1, round(44 / s)) for s in spacing]
    return Grid.from_spacing((shape[0], shape[1], shape[2]), spacing, (-40.0, 31.0, 7.0), direction)


# ---- segment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", ["3d", "2d"])
def test_at_the_plans_own_spacing_every_voxel_is_right(small_plan: Any, configuration: str) -> None:
    flat = configuration == "2d"
    plan = small_plan(
        labels=LABELS,
        dimensions=2 if flat else 3,
        slice_axis=2 if flat else None,
        patch=(16, 16, 1) if flat else (16, 16, 16),
        spacing=(1.5, 1.5, 2.0),
    )
    volume, truth = two_balls(grid_about((1.5, 1.5, 2.0), np.diag([-1.0, -1.0, 1.0])))
    labels, probability = run(ByIntensity(), volume, plan, configuration)
    assert labels.values.dtype == np.uint16
    assert np.array_equal(labels.values, np.array([0, 3, 300])[truth])
    assert labels.grid == volume.grid
    assert probability.min() > 0.99


@pytest.mark.parametrize(
    ("spacing", "direction"),
    [
        ((1.0, 1.0, 1.0), np.eye(3)),
        ((0.9, 0.9, 4.0), np.diag([-1.0, -1.0, 1.0])),
        ((2.0, 0.8, 1.1), np.eye(3)[:, (2, 0, 1)]),
        ((0.8, 0.8, 2.5), OBLIQUE @ np.diag([-1.0, 1.0, -1.0])),
    ],
    ids=["axial", "thick slices", "permuted", "oblique"],
)
def test_the_answer_lies_on_the_scans_own_grid(
    small_plan: Any, spacing: tuple[float, float, float], direction: np.ndarray
) -> None:
    plan = small_plan(labels=LABELS, spacing=(1.3, 1.3, 1.6))
    volume, truth = two_balls(grid_about(spacing, direction), noise=3)
    labels, probability = run(ByIntensity(), volume, plan, "3d")
    assert labels.grid is volume.grid
    assert probability.shape == volume.grid.shape
    for number, was in ((3, 1), (300, 2)):
        found, true = labels.values == number, truth == was
        # Interpolation passes through the lower structure's brightness on its way up to the higher one's.
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.8
        if number == 300:
            apart = np.argwhere(found).mean(axis=0) - np.argwhere(true).mean(axis=0)
            assert np.abs(apart).max() < 0.5


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 4, 3), (24, 20, 1), (1, 24, 20), (2, 40, 3)], ids=str)
def test_small_and_thin_scans(small_plan: Any, shape: tuple[int, int, int]) -> None:
    plan = small_plan(labels=LABELS, spacing=(1, 1, 1))
    values = np.full((1, *shape), 1.0, dtype=np.float32)
    values[0, shape[0] // 2 :] = 201
    volume = Volume(values, Grid.from_spacing(shape, 1.0))
    labels, _ = run(ByIntensity(), volume, plan, "3d")
    assert np.array_equal(labels.values, np.where(values[0] > 100, 300, 0))


@pytest.mark.parametrize(("level", "number"), [(0, 0), (100, 3), (200, 300)])
def test_a_constant_scan(small_plan: Any, level: int, number: int) -> None:
    plan = small_plan(labels=LABELS)
    volume = Volume(np.full((1, 9, 8, 7), level, dtype=np.int16), Grid.from_spacing((9, 8, 7), (1, 1, 2)))
    labels, _ = run(ByIntensity(), volume, plan, "3d")
    assert (labels.values == number).all()


def test_a_byte_is_enough_for_small_numbers(small_plan: Any) -> None:
    plan = small_plan(labels={3: "a", 255: "b"})
    volume, truth = two_balls(grid_about((1, 1, 2), np.eye(3)))
    labels, _ = run(ByIntensity(), volume, plan, "3d")
    assert labels.values.dtype == np.uint8
    assert np.array_equal(labels.values, np.array([0, 3, 255])[truth])


def test_what_was_cut_away_as_empty_is_background(small_plan: Any) -> None:
    plan = small_plan(labels=LABELS, spacing=(1, 1, 1))
    values = np.zeros((1, 20, 18, 16), dtype=np.float32)
    values[0, 4:12, 5:9, 6:14] = 201
    volume = Volume(values, Grid.from_spacing((20, 18, 16), 1.0, direction=np.diag([-1.0, 1, -1])))

    class Always(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0])], 1)

    labels, probability = run(Always(), volume, plan, "3d")
    assert np.array_equal(labels.values == 300, values[0] > 0)
    assert (probability[values[0] == 0] == 1).all()


# ---- describe -----------------------------------------------------------------------------------


def test_organs_by_hand() -> None:
    grid = Grid.from_spacing((5, 6, 7), (2.0, 3.0, 0.5))
    values = np.zeros(grid.shape, dtype=np.uint16)
    values[1:3, 2:4, 3:5] = 4  # 8 voxels of 3 mm3
    values[4, 5, 6] = 900  # the corner
    labels = LabelSet((Label("a", 4), Label("b", 900), Label("none", 7)))
    # Classes come in the order of the label set: a, none, b.
    tally = Tally(np.array([9.0, 6.0, 0.1, 1.0]), np.array([9.0, 5.0, 0.0, 0.6]), np.array([9, 8, 0, 1]), 3.0)
    first, none, corner = describe(LabelMap(values, grid, labels), tally, labels.numbers)
    assert (first.name, first.number, first.voxels, first.cut) == ("a", 4, 8, False)
    assert first.volume_ml == pytest.approx(0.024)
    assert first.confidence == pytest.approx(0.625)
    assert (corner.name, corner.voxels, corner.cut) == ("b", 1, True)
    assert corner.volume_ml == pytest.approx(0.003)
    assert (none.name, none.voxels, none.volume_ml, none.confidence, none.cut) == ("none", 0, 0.0, None, False)


@pytest.mark.parametrize("place", [(0, 2, 2), (4, 2, 2), (2, 0, 2), (2, 4, 2), (2, 2, 0), (2, 2, 4)])
def test_every_face_of_the_scan_cuts(place: tuple[int, int, int]) -> None:
    values = np.zeros((5, 5, 5), dtype=np.uint8)
    values[place] = 1
    grid = Grid.from_spacing((5, 5, 5), 1.0)
    (organ,) = describe(LabelMap(values, grid, LabelSet.from_names("a")), Tally.empty(2, 1.0), [1])
    assert organ.cut
    inner = np.zeros((5, 5, 5), dtype=np.uint8)
    inner[2, 2, 2] = 1
    (organ,) = describe(LabelMap(inner, grid, LabelSet.from_names("a")), Tally.empty(2, 1.0), [1])
    assert not organ.cut


# ---- a model ------------------------------------------------------------------------------------


def untrained(plan: Any, configuration: str = "3d", members: int = 1, seed: int = 0) -> ModelPackage:
    torch.manual_seed(seed)
    chosen = plan.configuration(configuration)
    networks = [build(chosen, len(plan.channels), len(plan.labels) + 1) for _ in range(members)]
    weights = tuple({k: v.detach() for k, v in n.state_dict().items()} for n in networks)
    return ModelPackage(plan, configuration, weights, ("a",), ("b",), {})


@pytest.mark.parametrize("dimensions", [3, 2])
def test_tiles_far_from_anything_are_left_out_unless_quality_is_wanted(small_plan: Any, dimensions: int) -> None:
    flat = dimensions == 2
    plan = small_plan(
        labels=LABELS,
        dimensions=dimensions,
        slice_axis=2 if flat else None,
        patch=(16, 16, 1) if flat else (16, 16, 16),
        spacing=(1, 1, 1),
    )
    volume, truth = two_balls(Grid.from_spacing((90, 80, 40), 1.0), noise=3)
    made, told = {}, {}
    for thoroughness in ("quality", "normal", "quick"):
        predictor = Predictor(untrained(plan, f"{dimensions}d"), "torch-cpu", thoroughness=thoroughness)
        tiles: list[int] = []
        predictor.engine = Counting([ByIntensity()], plan.configuration(f"{dimensions}d"), 3, CPU, tiles=tiles)

        def watch(rows: Any, total: int, name: str = thoroughness) -> Any:
            told[name] = total
            return rows

        made[thoroughness] = predictor.predict(volume, progress=watch).label_map.values
        told[thoroughness] = (told[thoroughness], sum(tiles))
    assert np.array_equal(made["quality"], np.array([0, 3, 300])[truth])
    assert np.array_equal(made["normal"], made["quality"])
    assert np.array_equal(made["quick"], made["quality"])
    # What was foretold is the layout's tiles, and those of the scouting.
    depth = (40, 40) if flat else (4, 3)
    assert told["quality"] == (11 * 9 * depth[0],) * 2
    assert told["normal"][0] == 11 * 9 * depth[0] + 6 * 5 * depth[1]
    assert told["normal"][1] < 0.7 * told["quality"][1]


class Counting(TorchEngine):
    """Counts the tiles that it runs."""

    def __init__(self, *details: Any, tiles: list[int]) -> None:
        super().__init__(*details)
        self.tiles = tiles

    def run(self, tiles: np.ndarray) -> torch.Tensor:
        self.tiles.append(len(tiles))
        return super().run(tiles)


def test_regions_are_scouted_for(small_plan: Any) -> None:
    class Regions(nn.Module):
        """Two nested regions: brighter than 50, and brighter than 150."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value = x[:, :1] * 50 + 50
            return torch.cat([(value - level) / 4 for level in (50.0, 150.0)], dim=1)

    regions = [{"name": "both", "labels": [3, 300], "number": 3}, {"name": "bright", "labels": [300], "number": 300}]
    plan = small_plan(labels=LABELS, spacing=(1, 1, 1)).model_copy(
        update={"regions": tuple(Region(**region) for region in regions)}
    )
    volume, truth = two_balls(Grid.from_spacing((90, 80, 40), 1.0), noise=3)
    tiles: list[int] = []
    engine = Counting([Regions()], plan.configuration("3d"), 2, CPU, tiles=tiles)
    made = segment(engine, volume, plan, "3d", scouted=True)
    assert np.array_equal(made.label_map.values, np.array([0, 3, 300])[truth])
    assert sum(tiles) < 0.7 * 11 * 9 * 4


def test_the_same_scan_gives_the_same_answer(small_plan: Any) -> None:
    volume, _ = two_balls(grid_about((1, 1, 2), np.eye(3)), noise=30)
    package = untrained(small_plan(labels=LABELS), members=2)
    predictor = Predictor(package, "torch-cpu")
    first, second = predictor.predict(volume), predictor.predict(volume)
    third = predict(volume, package, engine="torch-cpu")
    for other in (second, third):
        assert np.array_equal(first.label_map.values, other.label_map.values)
        assert first.organs == other.organs
        assert first.warnings == other.warnings
    assert len(np.unique(first.label_map.values)) > 1
    assert first.model == "Task00_blobs 3d"
    assert first.model_digest == package.digest()
    assert first.seconds > 0
    assert [f.structure for f in first.flags] == [o.name for o in first.organs if o.cut]
    assert all("is cut off by the border of the scan: its volume is at least" in w for w in first.warnings)
    assert (first.calibration, first.review) == (None, bool(first.flags))
    assert all(o.predicted_dice is None for o in first.organs)
    for organ in first.organs:
        assert organ.voxels == np.count_nonzero(first.label_map.values == organ.number)


def test_several_members_are_their_average(small_plan: Any) -> None:
    volume, _ = two_balls(grid_about((1, 1, 2), np.eye(3)), noise=30)
    plan = small_plan(labels=LABELS)
    one, two = untrained(plan, seed=1), untrained(plan, seed=2)
    both = ModelPackage(plan, "3d", one.members + two.members, ("a",), ("b",), {})
    networks = [Predictor(p, "torch-cpu").engine._networks[0] for p in (one, two)]
    engine = TorchEngine(networks, plan.configuration("3d"), 3, CPU)
    labels = segment(engine, volume, plan, "3d").label_map
    predictor = Predictor(both, "torch-cpu", thoroughness="quality")
    assert np.array_equal(predictor.predict(volume).label_map.values, labels.values)
    twice = ModelPackage(plan, "3d", one.members * 2, ("a",), ("b",), {})
    alone = Predictor(one, "torch-cpu").predict(volume).label_map.values
    assert np.array_equal(Predictor(twice, "torch-cpu").predict(volume).label_map.values, alone)


def test_a_packages_own_post_processing_is_done_once_and_told_where_it_takes_much(small_plan: Any) -> None:
    """A network of random weights leaves crumbs everywhere."""
    volume, _ = two_balls(grid_about((1, 1, 2), np.eye(3)), noise=30)
    plain = untrained(small_plan(labels=LABELS))
    largest = Rule(name="spleen", number=3, largest=True)
    small = Rule(name="liver", number=300, smallest_mm3=40.0)
    raw = Predictor(plain, "torch-cpu").predict(volume)
    expected, shares = refined(raw.label_map, (largest, small))
    assert set(shares) == {"spleen", "liver"}
    predictor = Predictor(replace(plain, refinement=Refinement(rules=(largest, small))), "torch-cpu")
    made = predictor.predict(volume)
    assert np.array_equal(made.label_map.values, expected.values)
    assert made.model_digest != raw.model_digest
    for organ in made.organs:
        assert organ.voxels == np.count_nonzero(expected.values == organ.number)
        assert organ.volume_ml == pytest.approx(organ.voxels * 2 / 1000)
    for name, share in shares.items():
        told = f"{share:.0%} of {name} was taken away as loose pieces, as post-processing of this model does"
        assert (told in made.warnings) == (share > 0.1)
    alone = predictor.predict(volume, only=["spleen"]).label_map.values
    assert np.array_equal(alone, np.where(expected.values == 3, 3, 0))
    # A field needs all structures, of which one may be asked for.
    field = Refinement(rules=(largest, small), crf=Crf(appearance=8.0))
    predictor = Predictor(replace(plain, refinement=field), "torch-cpu")
    whole, intensities = predictor.predict(volume).label_map.values, plain.plan.normalisation.value
    assert np.array_equal(whole, post_processed(raw.label_map, volume, field, intensities)[0].values)
    assert not np.array_equal(whole, expected.values)
    alone = predictor.predict(volume, only=["spleen"]).label_map.values
    assert np.array_equal(alone, np.where(whole == 3, 3, 0))
    # Training validates, and calibrates, by this function: it sees the labels as they were decided.
    engine = predictor.engine
    assert np.array_equal(segment(engine, volume, plain.plan, "3d").label_map.values, raw.label_map.values)


def test_other_channels_are_refused(small_plan: Any) -> None:
    predictor = Predictor(untrained(small_plan(channels=("CT", "PET"))), "torch-cpu")
    grid = Grid.from_spacing((8, 8, 8), 1.0)
    with pytest.raises(InputError, match=r"has 1 channels, the model takes 2 \(CT, PET\)"):
        predictor.predict(Volume(np.ones((1, 8, 8, 8), dtype=np.float32), grid))
    two = predictor.predict(Volume(np.ones((2, 8, 8, 8), dtype=np.float32), grid))
    assert two.label_map.grid == grid


def test_weights_of_another_network_are_refused(small_plan: Any) -> None:
    package = untrained(small_plan(features=(4, 8, 8)))
    other = ModelPackage(small_plan(features=(4, 8, 16)), "3d", package.members, ("a",), ("b",), {})
    with pytest.raises(InputError, match=r"do not fit its plan"):
        Predictor(other, "torch-cpu")


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="no device is called 'tpu'"):
        pick_device("tpu")


def test_a_gpu_that_is_not_there_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no GPU"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"

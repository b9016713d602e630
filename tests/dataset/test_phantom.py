import itertools
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.instances import components
from medseg.core.volume import LabelMap
from medseg.dataset.phantom import TASKS, Blob, counted, phantom, truth
from medseg.dataset.task import load_instances, load_labels, load_task
from medseg.io.files import read_json
from medseg.io.nifti import read_labels, read_volume

NAMES = sorted(TASKS)
BASELINE = 0.6


@pytest.fixture(scope="module", params=NAMES)
def written(request, tmp_path_factory):
    return request.param, phantom(tmp_path_factory.mktemp("phantom"), request.param, cases=5, seed=3)


def contents(root: Path) -> dict[str, bytes]:
    found = (p for p in sorted(root.rglob("*")) if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


def test_same_seed_same_bytes_and_a_case_does_not_depend_on_their_number(written, tmp_path):
    name, root = written
    first, more = contents(root), contents(phantom(tmp_path / "more", name, cases=6, seed=3))
    assert more[f"imagesTr/{name}_005.nii.gz"] == first[f"imagesTs/{name}_005.nii.gz"]
    for file in first:
        if "Tr/" in file:
            assert more[file] == first[file], file


def test_another_seed_is_another_task(written, tmp_path):
    name, root = written
    first, other = contents(root), contents(phantom(tmp_path, name, cases=5, seed=4))
    assert sorted(first) == sorted(other)
    assert not [file for file in first if first[file] == other[file]]


def test_layout_is_that_of_the_decathlon(written):
    name, root = written
    task, builder = read_json(root / "dataset.json"), TASKS[name]
    assert root.name == builder.folder == task["name"]
    assert (task["numTraining"], task["numTest"]) == (len(task["training"]), len(task["test"])) == (5, 2)
    assert list(task["modality"].values()) == list(builder.channels)
    assert task["labels"] == {"0": "background", **{str(label.number): label.name for label in builder.labels}}
    listed = [*(f for pair in task["training"] for f in pair.values()), *task["test"], "dataset.json"]
    if builder.counted:
        listed += [pair["label"].replace("labelsTr", "instancesTr") for pair in task["training"]]
    assert sorted(str(Path(f)) for f in listed) == sorted(contents(root))


def test_label_file_is_the_formula_at_every_voxel_centre(written):
    name, root = written
    for case in range(5):
        found = read_labels(root / "labelsTr" / f"{name}_{case:03d}.nii.gz", TASKS[name].labels)
        centres = found.grid.to_world(np.moveaxis(np.indices(found.grid.shape), 0, -1))
        np.testing.assert_array_equal(truth(name, case, 3, centres), found.values)


def test_every_case_shows_every_label_on_its_images_grid(written):
    name, root = written
    grids = []
    for case in range(5):
        file = f"{name}_{case:03d}.nii.gz"
        image = read_volume(root / "imagesTr" / file)
        labels = read_labels(root / "labelsTr" / file, TASKS[name].labels)
        assert image.grid == labels.grid
        assert image.channels == len(TASKS[name].channels)
        assert labels.values.size < 500_000
        assert np.bincount(labels.values.ravel()).min() >= TASKS[name].least
        theirs = nib.load(root / "imagesTr" / file)
        assert theirs.shape == image.grid.shape + ((image.channels,) if image.channels > 1 else ())
        np.testing.assert_array_equal(theirs.affine, image.grid.affine)
        np.testing.assert_allclose(theirs.header.get_zooms()[:3], image.grid.spacing, rtol=1e-5)
        grids.append(image.grid)
    assert len({grid.shape for grid in grids}) > 1


def test_abdomen_comes_in_both_storage_orders_and_prostate_oblique():
    draw = {name: [TASKS[name].draw(np.random.default_rng(n)).grid for n in range(12)] for name in NAMES}
    assert {grid.orientation for grid in draw["abdomen"]} == {"RAS", "LPS"}
    assert len({round(grid.spacing[2], 1) for grid in draw["abdomen"]}) > 3
    assert len({bool(np.count_nonzero(grid.affine[:3, :3]) > 3) for grid in draw["prostate"]}) == 2


def middle_of(solid):
    """The mean (3,) of a sphere, or of a tube along its line."""
    if isinstance(solid, Blob):
        return solid.centre
    along = np.linspace(-solid.half, solid.half, 200)
    angle = solid.turns * along + solid.phase
    sides = np.stack([solid.sway[0] * np.sin(angle), solid.sway[1] * np.cos(angle), along])
    return solid.centre + solid.axes @ sides.mean(axis=1)


def test_what_is_counted_is_as_many_where_and_as_large_as_the_formula_says(tmp_path):
    task = load_task(phantom(tmp_path, "counted", cases=5, seed=3))
    for number, case in enumerate(task.cases):
        bodies, found, labels = counted("counted", number, 3), load_instances(task, case), load_labels(task, case)
        parts = components(labels)
        assert [one.label for one in found.instances] == [body.label for body in bodies]
        assert [one.number for one in found.instances] == list(range(1, len(bodies) + 1))
        assert ((found.values > 0) == (parts.values > 0)).all()
        pairs = np.unique(np.stack([found.values, parts.values])[:, found.values > 0], axis=1)
        assert pairs.shape[1] == len(parts.instances) == len(bodies)
        spacing = np.array(found.grid.spacing)
        for one, body in zip(found.instances, bodies, strict=True):
            assert np.linalg.norm(middle_of(body.solid) - one.centre_mm) < spacing.max()
            if isinstance(body.solid, Blob):
                ball = 4 / 3 * np.pi * body.solid.radii[0] ** 3 / 1000
                assert one.volume_ml == pytest.approx(ball, rel=0.1 if spacing.max() < 2 else 0.3)


def test_scans_of_things_to_count_differ():
    scenes = [TASKS["counted"].draw(np.random.default_rng(n)) for n in range(25)]
    for label in (1, 2):
        many = [sum(body.label == label for body in scene.bodies) for scene in scenes]
        assert min(many) <= 5
        assert max(many) >= 10
        assert all(3 <= n <= 12 for n in many)
    thick = [scene.grid.spacing[2] > 2 * scene.grid.spacing[0] - 0.5 for scene in scenes]
    assert 5 < sum(thick) < 20
    scene = scenes[0]
    apart = components(LabelMap(scene.labels(), scene.grid, TASKS["counted"].labels))
    assert len(apart.instances) == sum(body.label > 0 for body in scene.bodies)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="nothing is counted in the phantom 'brain'"):
        counted("brain", 0, 0)
    with pytest.raises(InputError, match="abdomen, brain, prostate"):
        phantom(tmp_path, "heart")
    with pytest.raises(InputError, match="heart"):
        truth("heart", 0, 0, np.zeros((1, 3)))
    with pytest.raises(InputError, match="5 or more"):
        phantom(tmp_path, "brain", cases=4)
    with pytest.raises(InputError, match="negative"):
        phantom(tmp_path, "brain", seed=-1)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    theirs = tmp_path / "Phantom_Prostate" / "thesis.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        phantom(tmp_path, "prostate", cases=5)
    assert contents(tmp_path) == {"Phantom_Prostate/thesis.txt": b"mine"}


def test_a_run_broken_off_leaves_no_task_and_can_be_repeated(tmp_path, monkeypatch):
    phantom(tmp_path, "prostate", cases=6)

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("medseg.dataset.phantom.write_labels", full)
        with pytest.raises(OSError, match="disk full"):
            phantom(tmp_path, "prostate", cases=5)
    assert not (tmp_path / "Phantom_Prostate" / "dataset.json").exists()
    assert (phantom(tmp_path, "prostate", cases=5) / "dataset.json").exists()


def test_writing_again_leaves_no_stale_case(tmp_path):
    phantom(tmp_path / "a", "prostate", cases=6, seed=1)
    again = phantom(tmp_path / "a", "prostate", cases=5, seed=2)
    assert contents(again) == contents(phantom(tmp_path / "b", "prostate", cases=5, seed=2))


# What needs no learning must not do: thresholds and average shapes.

TRAIN, HELD_OUT = range(10), range(10, 16)


@cache
def rendered(name):
    """Images (C, X, Y, Z), labels (X, Y, Z) and grids of the cases, stored x, y, z upwards. MR is
    standardised over what is not background, as a pipeline would."""
    cases = []
    for case in itertools.chain(TRAIN, HELD_OUT):
        scene, rng = TASKS[name].scene(case, 0)
        image, labels, grid = scene.image(rng).astype(np.float32), scene.labels(), scene.grid
        if len(image) > 1:
            body = image[0] > 0.2 * image[0].mean()
            image = np.stack([(c - c[body].mean()) / c[body].std() for c in image])
        flips = tuple(axis for axis in range(3) if grid.affine[axis, axis] < 0)
        cases.append((np.flip(image, [a + 1 for a in flips]), np.flip(labels, flips), grid.reoriented()))
    return cases


def dice(found, wanted):
    return 2 * np.count_nonzero(found & wanted) / max(np.count_nonzero(found) + np.count_nonzero(wanted), 1)


def threshold_dice(name, bins=60):
    """Mean over labels of the held-out Dice of the interval, on the channel, that is best for a
    label on the training cases."""
    cases, scores = rendered(name), []
    train, held_out = [cases[i] for i in TRAIN], [cases[i] for i in HELD_OUT]
    for label in TASKS[name].labels.numbers:
        best = (-1.0, 0, 0.0, 0.0)
        for channel in range(len(TASKS[name].channels)):
            inside = np.concatenate([image[channel][labels == label] for image, labels, _ in train])
            edges = np.unique(np.quantile(inside, np.linspace(0, 1, bins)))
            hit, all_ = (
                np.array(
                    [
                        np.r_[
                            0,
                            np.cumsum(
                                np.histogram(image[channel][labels == label] if own else image[channel], edges)[0]
                            ),
                        ]
                        for image, labels, _ in train
                    ]
                )
                for own in (True, False)
            )
            size = np.array([np.count_nonzero(labels == label) for _, labels, _ in train])[:, None, None]
            overlap, count = (a[:, None, :] - a[:, :, None] for a in (hit, all_))
            mean = np.where(count > 0, 2 * overlap / (np.maximum(count, 0) + size), 0).mean(axis=0)
            low, high = np.unravel_index(int(mean.argmax()), mean.shape)
            best = max(best, (float(mean.max()), channel, float(edges[low]), float(edges[high])))
        _, channel, low, high = best
        scores.append(
            np.mean([dice((im[channel] >= low) & (im[channel] <= high), lb == label) for im, lb, _ in held_out])
        )
    return float(np.mean(scores)), scores


def atlas_dice(name, frame):
    """Mean over labels of the held-out Dice of the training labels' average: by majority, and by
    the probability that happens to be best for each label on the held-out cases themselves."""
    cases, numbers = rendered(name), TASKS[name].labels.numbers
    vote, cut = [], []
    for _, wanted, grid in (cases[i] for i in HELD_OUT):
        chance = np.zeros((len(numbers) + 1, *wanted.shape), dtype=np.float32)
        for _, labels, other in (cases[i] for i in TRAIN):
            at = [
                np.rint(
                    np.linspace(0, m - 1, n)
                    if frame == "image"
                    else ((np.arange(n) - (n - 1) / 2) * step / their + (m - 1) / 2)
                    if frame == "middle"
                    else (np.arange(n) * step + start - origin) / their
                ).astype(int)
                for n, m, step, their, start, origin in zip(
                    grid.shape, other.shape, grid.spacing, other.spacing, grid.origin, other.origin, strict=True
                )
            ]
            seen = labels[np.ix_(*(np.clip(a, 0, m - 1) for a, m in zip(at, other.shape, strict=True)))]
            for number in range(len(numbers) + 1):
                chance[number] += (seen == number) / len(TRAIN)
        winner = chance.argmax(axis=0)
        vote.append([dice(winner == n, wanted == n) for n in numbers])
        cut.append([[dice(chance[n] >= p, wanted == n) for n in numbers] for p in np.arange(1, 11) / 10 - 1e-3])
    return float(np.mean(vote)), float(np.mean(cut, axis=0).max(axis=0).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_threshold_finds_the_organs(name):
    assert threshold_dice(name)[0] < BASELINE


@pytest.mark.slow
@pytest.mark.parametrize("frame", ["image", "middle", "world"])
@pytest.mark.parametrize("name", NAMES)
def test_no_average_shape_finds_the_organs(name, frame):
    assert max(atlas_dice(name, frame)) < BASELINE

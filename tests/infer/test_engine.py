from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medseg.core.errors import InputError, MedsegError
from medseg.infer import engine as engines
from medseg.infer.agreement import agreement, measure, middle_tiles
from medseg.infer.engine import (
    Engine,
    Head,
    OpenVinoEngine,
    TorchEngine,
    flips,
    import_openvino,
    open_engine,
    processor_flags,
)
from medseg.models.build import build
from medseg.models.package import Agreement, ModelPackage, load_package, record_engines, save_package

CPU = torch.device("cpu")
MANY = {n: f"organ {n}" for n in range(1, 11)}
HOWS = {
    "3d": {"patch": (16, 24, 8)},
    "3d, two channels": {"channels": ("CT", "PET")},
    "2d axial": {"dimensions": 2, "slice_axis": 2, "patch": (24, 16, 1)},
    "2d sagittal": {"dimensions": 2, "slice_axis": 0, "patch": (1, 16, 24)},
    "3d, many classes": {"labels": MANY},
    "3d, things": {"patch": (16, 24, 8), "family": "mask-rcnn"},
    "2d, things": {"dimensions": 2, "slice_axis": 1, "patch": (16, 1, 24), "family": "mask-rcnn"},
    "2d, many classes": {"dimensions": 2, "slice_axis": 1, "patch": (16, 1, 16), "labels": MANY},
}
EACH = pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def networks_of(plan: Any, members: int) -> list[nn.Module]:
    (configuration,) = plan.configurations.values()
    torch.manual_seed(0)
    made = [build(configuration, len(plan.channels), len(plan.labels) + 1).eval() for _ in range(members)]
    with torch.no_grad():
        for network in made:
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def saved(folder: Path, plan: Any, members: int = 1) -> ModelPackage:
    weights = tuple(dict(n.state_dict()) for n in networks_of(plan, members))
    save_package(folder, ModelPackage(plan, next(iter(plan.configurations)), weights, ("a",), ("b",), {}))
    return load_package(folder)


def tiles_for(package: ModelPackage, batch: int = 3) -> np.ndarray:
    shape = (batch, len(package.plan.channels), *package.configuration.patch.value)
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def logits(engine: Engine, tiles: np.ndarray) -> np.ndarray:
    out = engine.numpy(engine.run(tiles))
    assert out.dtype == np.float32
    assert out.shape[1] == engine.outputs
    return np.stack([engine.head.apply(one) for one in out]) if engine.head else out


def plainly(networks: list[nn.Module], tiles: np.ndarray, flat: int | None, mirror: tuple[int, ...]) -> np.ndarray:
    """The slow and obvious way: every member on every mirrored copy, each turned back, and the mean."""
    outs = []
    for network in networks:
        for n in range(len(mirror) + 1):
            for axes in combinations([2 + a for a in mirror], n):
                turned = torch.from_numpy(tiles).flip(axes)
                with torch.no_grad():
                    out = network(turned if flat is None else turned.squeeze(2 + flat))
                outs.append((out if flat is None else out.unsqueeze(2 + flat)).flip(axes))
    return torch.stack(outs).mean(dim=0).numpy()


# ---- every engine gives what the networks give --------------------------------------------------


@EACH
@pytest.mark.parametrize("name", ["openvino", "torch-cpu"])
def test_engines_give_the_mean_over_members_and_mirrored_copies(
    tmp_path: Path, small_plan: Any, how: Any, name: str
) -> None:
    plan = small_plan(**how)
    package = saved(tmp_path / "model", plan, members=2)
    tiles = tiles_for(package)
    flat = package.configuration.slice_axis
    for mirror in ((), (0, 1)):
        engine = open_engine(package, name, threads=1, mirror=mirror, precision="f32")
        assert (engine.name, engine.precision, engine.notes) == (name, "f32", [])
        assert (engine.head is not None) == (len(plan.labels) == 10)
        assert engine.outputs == (2 * 4 if engine.head else 3)
        expected = plainly(networks_of(plan, 2), tiles, flat, mirror)
        np.testing.assert_allclose(logits(engine, tiles), expected, atol=2e-4)


def test_results_are_not_written_over_by_the_next(tmp_path: Path, small_plan: Any) -> None:
    package = saved(tmp_path / "model", small_plan())
    engine = OpenVinoEngine(package, threads=1)
    tiles = tiles_for(package, 2)
    together = engine.run(tiles)
    one, two = engine.run(tiles[:1]), engine.run(tiles[1:])
    np.testing.assert_allclose(together, np.concatenate([one, two]), atol=1e-5)
    assert engine.array(one) is one
    assert engine.zeros((2, 3)).shape == (2, 3)


def test_tiles_may_be_views(tmp_path: Path, small_plan: Any) -> None:
    package = saved(tmp_path / "model", small_plan())
    big = np.random.default_rng(0).standard_normal((1, 1, 20, 18, 17), dtype=np.float32)
    view = big[:, :, 2:18, 1:17, 1:]
    for name in ("openvino", "torch-cpu"):
        engine = open_engine(package, name, threads=1)
        np.testing.assert_array_equal(logits(engine, view), logits(engine, view.copy()))


def test_a_head_may_follow_any_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    head = Head(rng.random((7, 3), dtype=np.float32), rng.random(7, dtype=np.float32))
    one, other = rng.random((2, 3, 4, 5, 6), dtype=np.float32)
    weighted = (0.25 * head.apply(one) + 0.75 * head.apply(other)).astype(np.float32)
    np.testing.assert_allclose(head.apply(0.25 * one + 0.75 * other), weighted, rtol=1e-5)


def test_the_processors_own_precision_is_chosen() -> None:
    native = bool({"avx512_bf16", "amx_bf16"} & processor_flags())
    assert engines.torch_precision(CPU) == ("bf16" if native else "f32")


@pytest.mark.parametrize("how", [h for h in HOWS.values() if "family" in h], ids=["3d", "2d"])
def test_each_member_tells_what_it_finds_in_each_tile(tmp_path: Path, small_plan: Any, how: Any) -> None:
    package = saved(tmp_path / "model", small_plan(**how), members=2)
    tiles = tiles_for(package)
    for name in ("openvino", "torch-cpu"):
        engine = open_engine(package, name, threads=1, mirror=(0,), precision="f32")
        engine.run(tiles)
        assert [len(members) for members in engine.found] == [2, 2, 2]
        first = engine.found[0][1]
        assert len(first.scores)
        engine.run(tiles[:1])  # and what was told before stays
        ((_, again),) = engine.found
        for before, after in zip(vars(first).values(), vars(again).values(), strict=True):
            np.testing.assert_allclose(before, after, atol=1e-3)
        flat = package.configuration.slice_axis
        assert flat is None or (first.boxes[:, 0, flat] == 0).all()


# ---- which engine -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, small_plan: Any) -> Path:
    saved(tmp_path / "model", small_plan())
    return tmp_path / "model"


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_GPU_MARKS", ())


@pytest.mark.usefixtures("_no_gpu")
def test_auto_takes_openvino_unless_its_labels_are_known_to_differ(folder: Path) -> None:
    assert open_engine(load_package(folder), threads=1).name == "openvino"
    good = Agreement(precision="f32", cases=(), largest_difference=0, label_agreement=1, least_dice=0.9995)
    record_engines(folder, {"openvino-f32": good})
    assert open_engine(load_package(folder), threads=1).name == "openvino"
    record_engines(folder, {"openvino-f32": good.model_copy(update={"least_dice": 0.9985})})
    assert open_engine(load_package(folder), threads=1).name == "torch-cpu"
    assert open_engine(load_package(folder), "openvino", threads=1).name == "openvino"


@pytest.mark.usefixtures("_no_gpu")
def test_auto_takes_torch_where_there_is_no_portable_form(small_plan: Any) -> None:
    weights = dict(networks_of(small_plan(), 1)[0].state_dict())
    package = ModelPackage(small_plan(), "3d", (weights,), ("a",), ("b",), {})
    assert open_engine(package, threads=1).name == "torch-cpu"
    with pytest.raises(InputError, match=r"has no ONNX files \(it was made without\)"):
        open_engine(package, "openvino")


def test_a_mark_of_a_gpu_is_not_yet_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_GPU_MARKS", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_engine(load_package(folder), threads=1).name == "openvino"


def test_what_is_not_to_be_had_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = load_package(folder)
    with pytest.raises(InputError, match="no engine is called 'tpu'"):
        open_engine(package, "tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no GPU"):
        open_engine(package, "torch-cuda")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="OpenVINO is not installed"):
        open_engine(package, "openvino")


def test_files_that_are_gone_by_the_time_are_refused(folder: Path) -> None:
    package = load_package(folder)
    package.graphs[0].write_bytes(b"")
    with pytest.raises(InputError, match="are not what they were"):
        OpenVinoEngine(package)


def test_weights_of_another_network_are_refused(small_plan: Any) -> None:
    weights = dict(networks_of(small_plan(), 1)[0].state_dict())
    package = ModelPackage(small_plan(features=(4, 8, 16)), "3d", (weights,), ("a",), ("b",), {})
    with pytest.raises(InputError, match="do not fit its plan"):
        open_engine(package, "torch-cpu")


# ---- memory that runs out -----------------------------------------------------------------------


class Hungry(nn.Module):
    """Holds so many tiles at once, and no more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen = most, []  # type: ignore[var-annotated]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * 2


def test_where_memory_runs_out_batches_are_halved_and_it_is_said_once(small_plan: Any) -> None:
    network = Hungry(most=2)
    engine = TorchEngine([network], small_plan().configuration("3d"), 1, CPU)
    tiles = np.arange(9, dtype=np.float32).reshape(9, 1, 1, 1, 1)
    np.testing.assert_array_equal(engine.run(tiles).numpy(), tiles * 2)
    assert network.seen == [9, 4, 2, 2, 2, 2, 1]
    engine.run(tiles)
    assert max(network.seen[7:]) == 2
    assert len(engine.notes) == 1
    assert "smaller ones were taken" in engine.notes[0]


def test_where_not_one_tile_fits_the_work_has_failed(small_plan: Any) -> None:
    engine = TorchEngine([Hungry(most=0)], small_plan().configuration("3d"), 1, CPU)
    with pytest.raises(MedsegError, match="does not hold a single tile"):
        engine.run(np.zeros((4, 1, 1, 1, 1), dtype=np.float32))


# ---- nothing is sent, and nothing more is imported ----------------------------------------------


ALONE = """
import socket, sys
from pathlib import Path

class Silent(socket.socket):
    def connect(self, *_): raise SystemExit("it speaks to the network")
socket.socket = Silent
socket.getaddrinfo = lambda *_, **__: sys.exit("it asks for an address")

import numpy as np
from medseg.infer.engine import open_engine
from medseg.models.package import load_package
package = load_package(Path(sys.argv[1]))
engine = open_engine(package, sys.argv[2], threads=1, mirror=(0,))
assert engine.name == "openvino"
shape = (1, len(package.plan.channels), *package.configuration.patch.value)
out = engine.numpy(engine.run(np.ones(shape, dtype=np.float32)))
assert np.isfinite(out).all()
loaded = [name for name in ("torch", "monai", "onnx", "openvino.tools.ovc") if name in sys.modules]
assert not loaded, loaded
assert sys.modules["openvino_telemetry"] is None
"""


@pytest.mark.parametrize("name", ["openvino", "auto"])
def test_openvino_runs_alone_sends_nothing_and_writes_nothing(tmp_path: Path, folder: Path, name: str) -> None:
    if name == "auto" and any(Path(mark).exists() for mark in engines._GPU_MARKS):
        pytest.skip("auto asks torch where there may be a GPU")
    home = tmp_path / "home"
    home.mkdir()
    before = sorted(tmp_path.rglob("*"))
    subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), name],
        check=True,
        cwd=home,
        env={"HOME": str(home), "XDG_CACHE_HOME": str(home), "TMPDIR": str(home), "PATH": "/usr/bin:/bin"},
    )
    assert sorted(tmp_path.rglob("*")) == before


SIGNALLED = """
import gc, signal, sys
from pathlib import Path
from medseg.infer.engine import OpenVinoEngine
from medseg.models.package import load_package

package = load_package(Path(sys.argv[1]))
engines = [OpenVinoEngine(package, 1), OpenVinoEngine(package, 1)]
while engines:
    engines.pop(0)
    gc.collect()
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
signal.raise_signal(signal.SIGTERM)
assert seen
"""


def test_a_signal_finds_a_stack_after_openvino(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", SIGNALLED, str(folder)], check=True)


def test_openvino_is_imported_in_one_place_alone() -> None:
    package = Path(engines.__file__).parents[1]
    words = ("import openvino\n", "from openvino", 'import_alone("openvino"')
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    importing = [p.name for p, text in texts.items() if any(w in text for w in words)]
    assert importing == ["engine.py"]


def test_the_converter_is_still_there_for_a_program_that_wants_it() -> None:
    program = (
        "from medseg.infer.engine import import_openvino; import_openvino();"
        "from openvino.tools.ovc import convert_model; import sys; assert sys.modules['openvino_telemetry'] is None"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert import_openvino() is sys.modules["openvino"]


# ---- how far two engines agree ------------------------------------------------------------------


@EACH
def test_openvino_agrees_with_torch(tmp_path: Path, small_plan: Any, how: Any) -> None:
    package = saved(tmp_path / "model", small_plan(**how))
    shape = (len(package.plan.channels), 37, 21, 30)
    images = {"a": np.random.default_rng(0).standard_normal(shape, dtype=np.float32), "b": np.zeros(shape, np.float32)}
    found = measure(package, images, threads=1)["openvino-f32"]
    assert found.cases == ("a", "b")
    assert found.largest_difference < 1e-2  # where a tile is constant, its noise is all that is normalised
    assert found.label_agreement > 0.999
    assert found.least_dice > 0.99  # of labels with few voxels, in noise
    assert measure(package, {}) == {}


class Fixed:
    """An engine with a given answer."""

    name, precision, head, notes, outputs = "fixed", "bf16", None, (), 3

    def __init__(self, labels: list[int], shift: float = 0.0) -> None:
        self.answer = (np.eye(3, dtype=np.float32)[labels].T + np.float32(shift)).reshape(1, 3, -1, 1, 1)

    def run(self, tiles: np.ndarray) -> np.ndarray:
        return self.answer

    def numpy(self, values: np.ndarray) -> np.ndarray:
        return values


def test_agreement_by_hand(small_plan: Any) -> None:
    configuration = small_plan(patch=(16, 4, 4)).configuration("3d")
    images = {"a": np.zeros((1, 16, 4, 4), dtype=np.float32)}
    one: Any = Fixed([0, 0, 1, 1, 1], shift=0.5)
    other: Any = Fixed([0, 1, 1, 1, 1])
    found = agreement(one, other, images, configuration)
    assert (found.precision, found.cases) == ("bf16", ("a",))
    assert found.label_agreement == pytest.approx(0.8)
    assert found.largest_difference == pytest.approx(1.5)
    assert found.least_dice == pytest.approx(2 * 3 / (3 + 4))  # of class 1; neither finds class 2
    assert agreement(other, other, images, configuration).least_dice == 1.0
    both = {**images, "b": images["a"]}
    assert agreement(one, other, both, configuration).cases == ("a", "b")
    assert agreement(one, other, both, configuration, tiles=1).cases == ("a",)


def test_tiles_lie_in_the_middle() -> None:
    image = np.arange(40, dtype=np.float32).reshape(1, 40, 1, 1)
    tiles = list(middle_tiles(image, (8, 2, 1)))
    assert [t.shape for t in tiles] == [(1, 8, 2, 1)] * 2
    assert [t[0, 0, 0, 0] for t in tiles] == [12, 20]
    (alone,) = middle_tiles(image[:, :5], (8, 1, 1))
    assert alone.ravel().tolist() == [0, 0, 1, 2, 3, 4, 0, 0]


def test_every_set_of_axes() -> None:
    assert flips(()) == ((),)
    assert flips((0, 2)) == ((), (0,), (2,), (0, 2))

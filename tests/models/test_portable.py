from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medseg.core.errors import InputError
from medseg.models.build import build, split_head
from medseg.models.onnx_file import Graph, Node, Port, read, write
from medseg.models.package import INDEX, ModelPackage, load_package, save_package
from medseg.models.portable import NotPortableError, check, export, layout, splits
from medseg.plan.plan import Configuration

FLAT = {"dimensions": 2, "slice_axis": 1, "patch": (16, 1, 16)}
SHAPES = pytest.mark.parametrize(
    "how",
    [{}, {"patch": (16, 24, 8), "channels": ("CT", "PET")}, FLAT, {"labels": {n: f"organ {n}" for n in range(1, 9)}}],
    ids=["3d", "two channels", "2d", "more classes than features"],
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def shaken(network: nn.Module, seed: int) -> nn.Module:
    """A network none of whose weights are alike, as fresh biases are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def made(plan: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    (configuration,) = plan.configurations.values()
    return shaken(build(configuration, len(plan.channels), len(plan.labels) + 1), seed)


def packaged(folder: Path, plan: Any, members: int = 1) -> ModelPackage:
    weights = tuple(dict(made(plan, seed).state_dict()) for seed in range(members))
    (name,) = plan.configurations
    save_package(folder, ModelPackage(plan, name, weights, ("a",), ("b",), {}))
    return load_package(folder)


def configured(plan: Any) -> Configuration:
    (configuration,) = plan.configurations.values()
    return configuration


# ---- what is written is the network -------------------------------------------------------------


@SHAPES
def test_others_read_the_graph_and_compute_what_torch_does(tmp_path: Path, small_plan: Any, how: Any) -> None:
    plan = small_plan(**how)
    package = packaged(tmp_path / "model", plan, members=2)
    for seed, path in enumerate(package.graphs):
        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for batch, scale in ((1, 1), (3, 2)):  # batch and size are free
            size = [scale * n for a, n in enumerate(configured(plan).patch.value) if a != configured(plan).slice_axis]
            tiles = np.random.default_rng(seed).standard_normal((batch, len(plan.channels), *size), dtype=np.float32)
            with torch.no_grad():
                expected = made(plan, seed)(torch.from_numpy(tiles)).numpy()
            (logits,) = session.run(["logits"], {"tiles": tiles})
            np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_weights_are_on_the_disk_once(tmp_path: Path, small_plan: Any) -> None:
    package = packaged(tmp_path / "model", small_plan(features=(4, 8, 32)))
    (path,) = package.graphs
    assert path.stat().st_size < 16_000
    model = onnx.load(path, load_external_data=False)
    assert all(not weight.raw_data and not weight.float_data for weight in model.graph.initializer)
    locations = {e.value for w in model.graph.initializer for e in w.external_data if e.key == "location"}
    assert locations == {"member0.safetensors"}


def test_the_head_is_split_where_the_classes_are_more_than_the_features(small_plan: Any) -> None:
    plan = small_plan(labels={n: f"organ {n}" for n in range(1, 9)})
    network = made(plan)
    tiles = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    body, weight, bias = split_head(network) or pytest.fail("no head")
    with torch.no_grad():
        features, logits = body(tiles), network(tiles)
    assert (features.shape[1], *weight.shape, *bias.shape) == (4, 9, 4, 9)
    again = torch.einsum("kf,bfxyz->bkxyz", weight, features) + bias[:, None, None, None]
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-4)
    assert split_head(nn.Conv3d(1, 2, 1)) is None
    assert (splits(33, 32), splits(32, 32), splits(3, 32)) == (True, False, False)


class Odd(nn.Module):
    """A network with a step that the writer does not know."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.first, self.step = nn.Conv3d(1, 3, 3, padding=1), step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.step(self.first(x))
        return out


@pytest.mark.parametrize(
    "step",
    [
        nn.BatchNorm3d(3, track_running_stats=False),
        nn.InstanceNorm3d(3),
        nn.Conv3d(3, 3, 3, padding="same"),
        torch.sigmoid,
        torch.flatten,
    ],
    ids=["batch norm", "instance norm", "padding", "sigmoid", "flatten"],
)
def test_what_cannot_be_written_is_said(tmp_path: Path, step: Any) -> None:
    network = Odd(step)
    save_file(network.state_dict(), tmp_path / "member0.safetensors")
    with pytest.raises(NotPortableError, match=r"there is no operator for|pads with"):
        export(network, 1, 3, layout(tmp_path / "member0.safetensors"))


def test_a_network_that_branches_on_values_is_not_portable(tmp_path: Path) -> None:
    network = Odd(lambda x: x if x.sum() > 0 else -x)
    save_file(network.state_dict(), tmp_path / "member0.safetensors")
    with pytest.raises(NotPortableError, match="steps cannot be told"):
        export(network, 1, 3, layout(tmp_path / "member0.safetensors"))


def test_residual_blocks_are_portable(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.InstanceNorm3d(4, affine=True), nn.ReLU())
            self.skip = nn.Sequential(nn.AvgPool3d(2), nn.Conv3d(1, 4, 1, bias=False), nn.Identity())
            self.up = nn.ConvTranspose3d(4, 3, 2, 2, groups=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.up(self.one(x) + self.skip(x))
            return out

    network = shaken(Residual(), 0)
    save_file(network.state_dict(), tmp_path / "member0.safetensors")
    path = tmp_path / "member0.onnx"
    path.write_bytes(export(network, 1, 3, layout(tmp_path / "member0.safetensors")))
    onnx.checker.check_model(str(path), full_check=True)
    tiles = torch.randn(2, 1, 8, 6, 4)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"tiles": tiles.numpy()})[0], network(tiles), atol=1e-5)


def test_a_package_whose_network_is_not_portable_says_why(tmp_path: Path, small_plan: Any) -> None:
    plan = small_plan()
    weights = {name: tensor.bfloat16() for name, tensor in made(plan).state_dict().items()}
    save_package(tmp_path / "model", ModelPackage(plan, "3d", (weights,), ("a",), ("b",), {}))
    found = load_package(tmp_path / "model")
    assert found.graphs == ()
    assert "BF16" in found.not_portable


# ---- what is read is only that ------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, small_plan: Any) -> Path:
    packaged(tmp_path / "model", small_plan())
    return tmp_path / "model"


def resign(folder: Path, name: str, data: bytes) -> None:
    import hashlib

    (folder / name).write_bytes(data)
    index = json.loads((folder / INDEX).read_text())
    index["checksums"][name] = hashlib.sha256(data).hexdigest()
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path, data: bytes) -> None:
    resign(folder, "member0.onnx", data)
    with pytest.raises(InputError, match=r"member0\.onnx is not this model's network"):
        load_package(folder)


def test_there_and_back() -> None:
    nodes = (Node("Conv", ("x", "w"), "y", (("pads", (0, 1)), ("group", 1), ("alpha", 0.5))),)
    graph = Graph("g", (Port("x", ("batch", 3)),), (Port("y", ("batch", 200)),), nodes, ())
    assert read(write(graph)) == graph


@pytest.mark.parametrize("location", ["/etc/passwd", "../other.safetensors", "member1.safetensors", "", "plan.json"])
def test_weights_outside_the_members_own_file_are_refused(folder: Path, location: str) -> None:
    graph = read((folder / "member0.onnx").read_bytes())
    first, *others = graph.weights
    refused(folder, write(replace(graph, weights=(replace(first, location=location), *others))))


@pytest.mark.parametrize("change", [{"offset": 0}, {"length": 10**12}, {"shape": (1, 2)}, {"name": "other"}], ids=str)
def test_weights_elsewhere_in_the_file_are_refused(folder: Path, change: Any) -> None:
    graph = read((folder / "member0.onnx").read_bytes())
    first, *others = graph.weights
    refused(folder, write(replace(graph, weights=(replace(first, **change), *others))))


def test_unknown_operators_and_other_ports_are_refused(folder: Path) -> None:
    graph = read((folder / "member0.onnx").read_bytes())
    refused(folder, write(replace(graph, nodes=(replace(graph.nodes[0], op="Loop"), *graph.nodes[1:]))))
    refused(folder, write(replace(graph, inputs=(Port("tiles", ("batch", 2, "a", "b", "c")),))))
    refused(folder, write(replace(graph, outputs=(Port("logits", ("batch", 7, "a", "b", "c")),))))
    refused(folder, write(replace(graph, outputs=())))


@pytest.mark.parametrize("hidden", ["function", "metadata", "attribute tensor", "domain", "raw data", "sparse"])
def test_whatever_else_onnx_can_say_is_refused(folder: Path, hidden: str) -> None:
    model = onnx.load(folder / "member0.onnx", load_external_data=False)
    if hidden == "function":
        model.functions.add(name="Conv", domain="")
    elif hidden == "metadata":
        model.metadata_props.add(key="a", value="b")
    elif hidden == "attribute tensor":
        tensor = onnx.TensorProto(name="t", data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="/etc/passwd")
        model.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)
    elif hidden == "domain":
        model.graph.node[0].domain = "org.other"
    elif hidden == "raw data":
        model.graph.initializer[0].raw_data = b"1234"
    else:
        model.graph.sparse_initializer.add(dims=[1])
    refused(folder, model.SerializeToString())


def test_a_graph_cut_short_anywhere_is_refused(folder: Path, small_plan: Any) -> None:
    data, plan = (folder / "member0.onnx").read_bytes(), small_plan()
    path, weights = folder / "cut.onnx", layout(folder / "member0.safetensors")
    for size in (*range(0, len(data), 97), len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"."):
            check(path, weights, configured(plan), 1, 3)


def test_bytes_changed_at_random_never_do_more_than_refuse(folder: Path, small_plan: Any) -> None:
    data, plan = (folder / "member0.onnx").read_bytes(), small_plan()
    path, weights = folder / "spoilt.onnx", layout(folder / "member0.safetensors")
    rng = np.random.default_rng(0)
    for _ in range(150):
        spoilt = bytearray(data)
        spoilt[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(bytes(spoilt))
        try:
            graph = check(path, weights, configured(plan), 1, 3)
        except ValueError:
            continue
        assert {weight.location for weight in graph.weights} == {"member0.safetensors"}


def test_a_graph_of_great_size_is_not_read(folder: Path) -> None:
    refused(folder, b"\0" * (2**24 + 1))

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from monai.networks import nets
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from medseg.core.errors import InputError
from medseg.infer.engine import openvino_core
from medseg.models.build import build, split_head
from medseg.models.onnx_file import Constant, Graph, Node, NotPortableError, Port, read, write
from medseg.models.package import INDEX, ModelPackage, load_package, save_package
from medseg.models.parts import Part, parts
from medseg.models.portable import check, export, layout, splits
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


def only(configuration: Configuration, classes: int = 3) -> Part:
    """The one graph of a network of one channel."""
    (part,) = parts(configuration, 1, classes)
    return part


def exported(folder: Path, network: nn.Module, configuration: Configuration, classes: int = 3) -> Path:
    """The ONNX file of a network of one channel, beside its weights. What is exported is `network` itself."""
    named = dict((*network.named_parameters(), *network.named_buffers()))
    save_file({name: named[name].contiguous() for name in named}, folder / "member0.safetensors")
    path = folder / "member0.onnx"
    path.write_bytes(export(network, only(configuration, classes), layout(folder / "member0.safetensors")))
    return path


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
    ("step", "why"),
    [
        (nn.BatchNorm3d(3, track_running_stats=False), "native_batch_norm over a whole batch"),
        (nn.GELU("tanh"), "gelu by its approximation"),
        (nn.AdaptiveAvgPool3d(5), "_adaptive_avg_pool3d whose windows are not all alike"),
        (torch.flatten, "something else than logits of its size"),
        (lambda x: torch.cumsum(x, 2), "no operator for cumsum"),
        (lambda x: x * torch.rand(3, 1, 1, 1), "no operator for rand"),
        (lambda x: x + torch.ones(len(x), 1, 1, 1, 1), "constants are others"),
        (lambda x: x[:, :, : len(x)], "no operator for slice by the size"),
        (lambda x: x if x.sum() > 0 else -x, "steps cannot be told"),
        (lambda x: torch.cat([x] * len(x), 2), "steps are others"),
        (lambda x: x * (x == 0), "computes with truths"),
        (lambda x: (x, x), "something else than logits"),
        (lambda x: (x, 1), "something else than tensors"),
        (lambda x: x + 0 * x[0:1].relu_() + x, "another view"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_written_is_said(tmp_path: Path, small_plan: Any, step: Any, why: str) -> None:
    with pytest.raises(NotPortableError, match=why):
        exported(tmp_path, Odd(step), configured(small_plan()))


def test_weights_that_the_file_lacks_or_has_otherwise_are_said(tmp_path: Path, small_plan: Any) -> None:
    path, plan = tmp_path / "member0.safetensors", configured(small_plan())
    network = Odd(nn.Conv3d(3, 3, 1))
    weights = dict(network.state_dict())
    for changed, why in (
        ({"step.bias": weights["step.bias"][:2]}, "lacks step.bias, or has another shape"),
        ({"step.bias": weights["step.bias"].double()}, "step.bias are F64, not F32 or F16"),
        ({"unused": torch.arange(3)}, None),
    ):
        save_file({**weights, **changed}, path)
        if why is None:
            export(network, only(plan), layout(path))
        else:
            with pytest.raises(NotPortableError, match=why):
                export(network, only(plan), layout(path))


def test_a_package_whose_network_is_not_portable_says_why(tmp_path: Path, small_plan: Any) -> None:
    plan = small_plan()
    weights = {name: tensor.bfloat16() for name, tensor in made(plan).state_dict().items()}
    save_package(tmp_path / "model", ModelPackage(plan, "3d", (weights,), ("a",), ("b",), {}))
    found = load_package(tmp_path / "model")
    assert found.graphs == ()
    assert "BF16" in found.not_portable


# ---- networks of all kinds -----------------------------------------------------------------------


class Classic(nn.Module):
    """A U-Net of one step down and up, with batch norm, max pooling and interpolation."""

    def __init__(self, conv: Any, norm: Any, pool: Any, mode: str) -> None:
        super().__init__()
        self.down = nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(pool(2), conv(4, 4, 3, padding=1, bias=False), norm(4), nn.ReLU())
        self.up = nn.Upsample(scale_factor=2, mode=mode, align_corners=True)
        self.output_block = conv(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        out: torch.Tensor = self.output_block(torch.cat((x, self.up(self.deep(x))), 1))
        return out


class Pyramid(nn.Module):
    """DeepLab v3+ and FCN in small: dilated and grouped convolutions beside pooling of the whole image, with
    interpolation to the tile's size at the end."""

    def __init__(self, conv: Any, norm: Any, pool: Any, mode: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, 4, 3, stride=2, padding=1, bias=False), norm(4), nn.ReLU())
        self.rates = nn.ModuleList(conv(4, 4, 3, padding=n, dilation=n, groups=4) for n in (1, 2, 3))
        self.pool, self.whole = pool(1), conv(4, 4, 1)
        self.head, self.mode = conv(16, 3, 1), mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, x = x.shape[2:], self.stem(x)
        whole = F.interpolate(self.whole(self.pool(x)), size=x.shape[2:], mode=self.mode)
        out: torch.Tensor = self.head(torch.cat([*(rate(x) for rate in self.rates), whole], 1))
        return F.interpolate(out, size=size, mode=self.mode)


def _layers(spatial: int, pool: str) -> tuple[Any, Any, Any, str]:
    kinds = (f"Conv{spatial}d", f"BatchNorm{spatial}d", f"{pool}{spatial}d")
    conv, norm, pooling = (getattr(nn, kind) for kind in kinds)
    return conv, norm, pooling, "bilinear" if spatial == 2 else "trilinear"


# By name the network of so many spatial axes, and whether its graph takes tiles of any size.
KINDS: dict[str, tuple[Any, bool]] = {
    "SegResNetDS": (lambda s: nets.SegResNetDS(s, 4, 1, 3, blocks_down=(1, 1, 1)), True),
    "SegResNetDS, anisotropic": (
        lambda s: nets.SegResNetDS(
            s, 4, 1, 3, "leakyrelu", "instance", (1, 1, 1), upsample_mode="nontrainable", resolution=(1, 1, 4)[-s:]
        ),
        True,
    ),
    "SegResNet, group norm": (lambda s: nets.SegResNet(s, 8, 1, 3, blocks_down=(1, 1), blocks_up=(1,)), False),
    "MedNeXt": (
        lambda s: nets.MedNeXt(
            s, 4, 1, 3, use_residual_connection=True, blocks_down=(1,), blocks_up=(1,), blocks_bottleneck=1
        ),
        True,
    ),
    "MedNeXt, response norm": (
        lambda s: nets.MedNeXt(
            s, 4, 1, 3, kernel_size=3, global_resp_norm=True, blocks_down=(1,), blocks_up=(1,), blocks_bottleneck=1
        ),
        True,
    ),
    "AttentionUnet": (lambda s: nets.AttentionUnet(s, 1, 3, (4, 8, 8), (2, 2)), True),
    "DynUNet, residual": (
        lambda s: nets.DynUNet(
            s, 1, 3, [3, (3, 3, 1)[:s], 3], [1, (2, 2, 1)[:s], 2], [(2, 2, 1)[:s], 2], filters=(4, 8, 8), res_block=True
        ),
        True,
    ),
    "UNet, residual": (lambda s: nets.UNet(s, 1, 3, (4, 8, 8), (2, 2), num_res_units=2), True),
    "SwinUNETR": (lambda s: _swin(s), False),
    "SwinUNETR, version 2": (lambda s: _swin(s, use_v2=True, downsample="mergingv2", window_size=3), False),
    "classic": (lambda s: Classic(*_layers(s, "MaxPool")), True),
    "pyramid": (lambda s: Pyramid(*_layers(s, "AdaptiveAvgPool")), False),
}


def _swin(spatial: int, **more: Any) -> nn.Module:
    settings = {"window_size": 4, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 1, 1), **more}
    network: nn.Module = nets.SwinUNETR(1, 3, feature_size=12, spatial_dims=spatial, **settings)
    return network


def differs(path: Path, network: nn.Module, size: tuple[int, ...]) -> float:
    """How far OpenVINO is from torch on batches of one and three, at the most, of the largest logit."""
    compiled = openvino_core().compile_model(
        path, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    worst = 0.0
    for batch in (1, 3):
        tiles = torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = network(tiles).numpy()
        found = compiled(tiles.numpy())[0]
        assert found.shape == expected.shape
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


@pytest.mark.parametrize("spatial", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_openvino_computes_what_torch_does(tmp_path: Path, small_plan: Any, kind: str, spatial: int) -> None:
    build_it, free = KINDS[kind]
    # Swin's deepest instance norm is over as few voxels as it may be, and so enlarges what is rounded.
    patch, tolerance = ((64, 32, 32), 1e-3) if "Swin" in kind else ((16, 16, 8), 1e-4)
    flat = {"dimensions": 2, "slice_axis": 2, "patch": (*patch[:2], 1)}
    configuration = configured(small_plan(**(flat if spatial == 2 else {"patch": patch})))
    torch.manual_seed(0)
    network = shaken(build_it(spatial), 0)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.add_(0.2 * torch.rand(buffer.shape))
    path = exported(tmp_path, network, configuration)
    onnx.checker.check_model(str(path), full_check=True)
    graph = check(path, layout(tmp_path / "member0.safetensors"), only(configuration))
    assert graph.inputs[0].shape[2:] == (tuple(f"size{n}" for n in range(spatial)) if free else patch[:spatial])
    assert differs(path, network, patch[:spatial]) < tolerance


class Resized(nn.Module):
    """Down to ``size``, or by ``scale_factor``, and back."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.first, self.how = nn.Conv3d(1, 3, 1), how
        if how["mode"] == "bilinear":
            self.first = nn.Conv2d(1, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        back = {name: value for name, value in self.how.items() if name not in ("size", "scale_factor")}
        return F.interpolate(F.interpolate(self.first(x), **self.how), size=x.shape[2:], **back)


@pytest.mark.parametrize("by", [{"scale_factor": 2}, {"size": 7}, {"size": 1}, {"scale_factor": 0.4}], ids=str)
@pytest.mark.parametrize("how", ["nearest", "bilinear", "trilinear", "bilinear corners", "trilinear corners"])
def test_sizes_change_as_in_torch(tmp_path: Path, small_plan: Any, how: str, by: dict[str, Any]) -> None:
    mode, *corners = how.split()
    network = Resized(mode=mode, **({} if mode == "nearest" else {"align_corners": bool(corners)}), **by)
    configuration = configured(small_plan(**(FLAT if mode == "bilinear" else {"patch": (8, 16, 4)})))
    size = (16, 16) if mode == "bilinear" else (8, 16, 4)
    assert differs(exported(tmp_path, network.eval(), configuration), network, size) < 1e-5


class Steps(nn.Module):
    """What the networks above do not do, or not so."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 8, bias=False)
        self.pool, self.average = nn.MaxPool3d(3, 2, 1), nn.AvgPool3d(2)
        self.same, self.up = nn.Conv3d(1, 4, 3, padding="same"), nn.ConvTranspose3d(4, 3, 4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.same(x).roll((3, -2), (2, 4))
        x = self.linear(self.norm(x.movedim(1, -1))).movedim(-1, 1)
        one, other = x.chunk(2, dim=1)
        mask = torch.zeros(1, 1, *x.shape[2:])
        mask[:, :, 2:] = 1
        if mask.sum() > 7:
            mask[:, :, 4:6] = 0
        x = torch.where(mask > 0, one.sigmoid(), other.tanh()) - 2 * one
        parts = self.pool(x), self.average(x)
        out: torch.Tensor = self.up(parts[0] / (parts[1] + 9)).softmax(1)
        return out


def test_other_operators_compute_what_torch_does(tmp_path: Path, small_plan: Any) -> None:
    network = shaken(Steps(), 0)
    assert differs(exported(tmp_path, network, configured(small_plan())), network, (16, 16, 16)) < 1e-4


def test_half_weights_and_numbers_that_are_no_weights_lie_in_the_file(tmp_path: Path, small_plan: Any) -> None:
    network = shaken(Classic(*_layers(3, "MaxPool")), 0)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    network.load_state_dict(weights)
    save_file(weights, tmp_path / "member0.safetensors")
    where = layout(tmp_path / "member0.safetensors")
    with torch.device("meta"):
        empty = Classic(*_layers(3, "MaxPool"))
    path = tmp_path / "member0.onnx"
    path.write_bytes(export(empty, only(configured(small_plan())), where))
    assert {w.half for w in check(path, where, only(configured(small_plan()))).weights} == {True}
    assert any("num_batches" in name for name in where.others)
    assert differs(path, network, (16, 16, 16)) < 1e-4


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


def refused(folder: Path, data: bytes, name: str = "member0.onnx") -> None:
    resign(folder, name, data)
    with pytest.raises(InputError, match=f"{re.escape(name)} is not this model's network"):
        load_package(folder)


def test_there_and_back() -> None:
    nodes = (Node("Conv", ("x", "", "w"), "y", (("pads", (0, 1)), ("group", 1), ("alpha", 0.5), ("mode", "linear"))),)
    constants = (
        Constant("axes", (2,), "int64", np.array([-1, 2**40]).tobytes()),
        Constant("scale", (), "float32", np.float32(0.5).tobytes()),
        Constant("mask", (2, 1), "bool", b"\0\1"),
        Constant("none", (0,), "float32", b""),
    )
    graph = Graph("g", (Port("x", ("batch", 3)),), (Port("y", ("batch", 200)),), nodes, (), constants)
    assert read(write(graph)) == graph


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"shape": (2**21,), "data": b"\0" * 2**23}, "too large"),
        ({"shape": (2,)}, "not what it says"),
        ({"shape": (2**62, 2**62)}, "not what it says"),
        ({"kind": "float64"}, "not what it says"),
        ({"kind": "bool", "data": b"\2"}, "neither true nor false"),
    ],
    ids=str,
)
def test_constants_are_small_and_of_few_kinds(changed: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Constant(**{"name": "n", "shape": (1,), "kind": "float32", "data": b"1234", **changed})


def test_constants_of_other_kinds_are_not_read() -> None:
    graph = Graph("g", (), (), (), (), (Constant("n", (1,), "float32", b"1234"),))
    model = onnx.load_from_string(write(graph))
    for kind in (onnx.TensorProto.DOUBLE, onnx.TensorProto.STRING, onnx.TensorProto.INT32, 99):
        model.graph.initializer[0].data_type = kind
        with pytest.raises(ValueError, match=r"."):
            read(model.SerializeToString())


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
    refused(folder, write(replace(graph, inputs=(Port("tiles", (1, 1, "a", "b", "c")),))))
    refused(folder, write(replace(graph, inputs=(Port("tiles", ("batch", 1, 16, 16, 32)),))))
    refused(folder, write(replace(graph, inputs=(Port("tiles", ("batch", 1, "a", "b")),))))
    refused(folder, write(replace(graph, outputs=(*graph.outputs, Port("features", ("batch", 5, "a", "b", "c"))))))


def test_sizes_may_be_the_patchs(folder: Path) -> None:
    graph = read((folder / "member0.onnx").read_bytes())
    fixed = (Port("tiles", ("batch", 1, 16, 16, 16)),)
    resign(folder, "member0.onnx", write(replace(graph, inputs=fixed)))
    assert load_package(folder).graphs


def test_nothing_may_take_the_name_of_a_weight(folder: Path) -> None:
    graph = read((folder / "member0.onnx").read_bytes())
    name = graph.weights[-1].name
    refused(folder, write(replace(graph, constants=(Constant(name, (1,), "float32", b"1234"),))))
    refused(folder, write(replace(graph, nodes=(Node("Relu", ("tiles",), name), *graph.nodes))))


@pytest.mark.parametrize("rows", [[4], [-1], [0, 10**12]])
def test_rows_that_are_not_there_are_not_gathered(folder: Path, rows: list[int]) -> None:
    graph = read((folder / "member0.onnx").read_bytes())
    (bias,) = (w.name for w in graph.weights if w.name.startswith("output") and len(w.shape) == 1)
    constant = Constant("rows", (len(rows),), "int64", np.array(rows).tobytes())
    gather = Node("Gather", (bias, "rows"), "gathered", (("axis", 0),))
    refused(folder, write(replace(graph, nodes=(gather, *graph.nodes), constants=(constant,))))
    other = Node("Gather", ("tiles", "rows"), "gathered", (("axis", 0),))
    refused(folder, write(replace(graph, nodes=(other, *graph.nodes), constants=(constant,))))


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
            check(path, weights, only(configured(plan)))


def test_bytes_changed_at_random_never_do_more_than_refuse(folder: Path, small_plan: Any) -> None:
    data, plan = (folder / "member0.onnx").read_bytes(), small_plan()
    path, weights = folder / "spoilt.onnx", layout(folder / "member0.safetensors")
    rng = np.random.default_rng(0)
    for _ in range(150):
        spoilt = bytearray(data)
        spoilt[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(bytes(spoilt))
        try:
            graph = check(path, weights, only(configured(plan)))
        except ValueError:
            continue
        assert {weight.location for weight in graph.weights} == {"member0.safetensors"}


def test_a_graph_of_great_size_is_not_read(folder: Path) -> None:
    refused(folder, b"\0" * (2**24 + 1))


def test_what_is_given_was_computed(folder: Path) -> None:
    graph = read((folder / "member0.onnx").read_bytes())
    last = replace(graph.nodes[-1], output="elsewhere")
    refused(folder, write(replace(graph, nodes=(*graph.nodes[:-1], last))))


# ---- three graphs -------------------------------------------------------------------------------

PARTS = ["dense", "box_head", "mask_head"]


@pytest.fixture
def three(tmp_path: Path, small_plan: Any) -> Path:
    packaged(tmp_path / "model", small_plan(family="mask-rcnn"))
    return tmp_path / "model"


@pytest.mark.parametrize(
    "names",
    [PARTS[:2], PARTS[:1], [*PARTS, "dense"], [*PARTS, *PARTS], PARTS[::-1], ["dense", "mask_head", "box_head"],
     ["dense", "box_head", "box_head"], ["dense", "dense", "dense"]],
    ids=" ".join,
)  # fmt: skip
def test_graphs_that_are_missing_or_swapped_are_refused(three: Path, names: list[str]) -> None:
    index = json.loads((three / INDEX).read_text())
    assert index["graphs"] == [f"member0.{name}.onnx" for name in PARTS]
    index["graphs"] = [f"member0.{name}.onnx" for name in names]
    (three / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"some of its members only, or too many|is not this model's network"):
        load_package(three)


@pytest.mark.parametrize("name", PARTS)
def test_a_graph_that_is_gone_is_refused(three: Path, name: str) -> None:
    (three / f"member0.{name}.onnx").unlink()
    with pytest.raises(InputError, match="is missing or was changed"):
        load_package(three)


@pytest.mark.parametrize("name", PARTS)
def test_graphs_of_another_member_are_refused(tmp_path: Path, small_plan: Any, name: str) -> None:
    packaged(tmp_path / "model", small_plan(family="mask-rcnn"), members=2)
    other = (tmp_path / "model" / f"member1.{name}.onnx").read_bytes()
    refused(tmp_path / "model", other, f"member0.{name}.onnx")


@pytest.mark.parametrize("name", PARTS)
def test_parts_hold_known_operators_and_their_own_ports_alone(three: Path, name: str) -> None:
    file = f"member0.{name}.onnx"
    graph = read((three / file).read_bytes())
    (takes,), gives = graph.inputs, graph.outputs

    def changed(port: Port, at: int, size: int | str) -> Port:
        return Port(port.name, (*port.shape[:at], size, *port.shape[at + 1 :]))

    loop = Node("Loop", graph.nodes[0].inputs, "loop")
    for spoilt in (
        replace(graph, nodes=(*graph.nodes, loop)),
        replace(graph, inputs=()),
        replace(graph, inputs=(takes, Port("more", takes.shape))),
        replace(graph, inputs=(), outputs=(takes, *gives)),
        replace(graph, inputs=(changed(takes, 0, 1),)),
        replace(graph, inputs=(changed(takes, 1, 99),)),
        replace(graph, inputs=(changed(takes, 2, 99),)),
        replace(graph, inputs=(changed(takes, 2, "size0"),)),
        replace(graph, outputs=()),
        replace(graph, outputs=gives[:-1]),
        replace(graph, outputs=(*gives, gives[-1])),
        replace(graph, outputs=(*gives, Port(graph.nodes[0].output, ("batch", 4)))),
        replace(graph, outputs=(*gives[:-1], Port("other", gives[-1].shape))),
        replace(graph, outputs=(*gives[:-1], changed(gives[-1], 0, 2))),
        replace(graph, outputs=(*gives[:-1], changed(gives[-1], 1, 99))),
        replace(graph, outputs=(*gives[:-1], Port(gives[-1].name, (*gives[-1].shape, 1)))),
        replace(graph, nodes=tuple(node for node in graph.nodes if node.output != gives[0].name)),
    ):
        refused(three, write(spoilt), file)
    if len(gives) > 1:
        refused(three, write(replace(graph, outputs=gives[::-1])), file)
    weight = graph.weights[0]
    refused(three, write(replace(graph, weights=(replace(weight, offset=0), *graph.weights[1:]))), file)
    resign(three, file, write(graph))
    assert load_package(three).graphs


def test_a_whole_network_is_no_part(three: Path, tmp_path: Path, small_plan: Any) -> None:
    packaged(tmp_path / "whole", small_plan())
    refused(three, (tmp_path / "whole" / "member0.onnx").read_bytes(), "member0.dense.onnx")


def test_weights_of_all_parts_are_on_the_disk_once(three: Path) -> None:
    graphs = [read(path.read_bytes()) for path in load_package(three).graphs]
    names = [weight.name for graph in graphs for weight in graph.weights]
    assert sorted(names) == sorted(layout(three / "member0.safetensors").tensors)
    assert all((three / f"member0.{name}.onnx").stat().st_size < 16_000 for name in PARTS)


def test_of_another_network_nothing_of_the_parts_stays(three: Path, small_plan: Any) -> None:
    packaged(three, small_plan())
    assert sorted(path.name for path in three.glob("member*")) == ["member0.onnx", "member0.safetensors"]


def test_parts_without_a_portable_form_are_read(three: Path) -> None:
    """As packages were before there was one."""
    index = json.loads((three / INDEX).read_text())
    old = {k: v for k, v in index["checksums"].items() if not k.endswith(".onnx")}
    (three / INDEX).write_text(json.dumps({**index, "graphs": [], "not_portable": "not yet", "checksums": old}))
    assert load_package(three).graphs == ()

"""A network in a form that others can run: an ONNX graph whose weights lie in the package's
safetensors file, once."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.models.onnx_file import Attribute, Graph, Node, Port, Weight, read, write
from medseg.plan.plan import Configuration

if TYPE_CHECKING:
    from torch import nn

TILES, LOGITS, FEATURES = "tiles", "logits", "features"
_OPERATORS = frozenset(
    {"Add", "AveragePool", "Cast", "Concat", "Conv", "ConvTranspose", "InstanceNormalization", "LeakyRelu", "Relu"}
)
_MOST_BYTES = 2**24
# Weights that are stored in half the bits are made float32 (ONNX's number 1) before anything is computed.
_TYPES = {"F32": False, "F16": True}
_FULL, _FLOAT32 = ".float32", 1


class NotPortableError(ValueError):
    """The network holds something that has no portable form; the text says what."""


def splits(classes: int, features: int) -> bool:
    """Whether a network's last 1x1x1 convolution is left to the end, so that what is added up over
    tiles are its features: where they are fewer than the classes."""
    return classes > features


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file: its first byte and how many there are; ``half`` for float16."""

    shape: tuple[int, ...]
    offset: int
    length: int
    half: bool = False


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in a safetensors file."""

    file: str
    tensors: dict[str, Place]


def layout(path: Path) -> Layout:
    """Where the tensors of a safetensors file lie, as its header says it (the safetensors library has
    read the file before, and so checked the header). Raises NotPortableError where one is neither float32
    nor float16."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _TYPES:
            raise NotPortableError(f"the weights {name} are {entry['dtype']}, not {' or '.join(_TYPES)}")
        first, last = entry["data_offsets"]
        tensors[name] = Place(tuple(entry["shape"]), 8 + size + first, last - first, _TYPES[entry["dtype"]])
    return Layout(path.name, tensors)


def export(network: nn.Module, channels: int, classes: int, weights: Layout) -> bytes:
    """The ONNX file of a network whose weights lie in a safetensors file beside it.

    It takes "tiles" (batch, channels, ...) and gives "logits" (batch, classes, ...), and "features"
    too where `splits` says so. Sizes are free. The network need not hold values (torch's meta
    device). Raises NotPortableError.
    """
    import torch

    try:
        traced = torch.fx.symbolic_trace(network.eval())
    except Exception as error:  # whatever a network's code may raise on being traced
        raise NotPortableError(f"its steps cannot be told ({type(error).__name__})") from error
    nodes: list[Node] = []
    names: dict[Any, str] = {}
    used: list[str] = []
    for step in traced.graph.nodes:
        if step.op == "placeholder":
            names[step] = TILES
        elif step.op == "output":
            return write(_graph(nodes, names[step.args[0]], channels, classes, used, weights))
        else:
            node, parameters = _node(step, traced, [names[a] for a in step.all_input_nodes])
            _require_held(parameters, network, weights)
            used += [p for p in parameters if p not in used]
            names[step] = node.output if node else names[step.all_input_nodes[0]]
            nodes += [node] if node else []
    raise NotPortableError("it has no output")


def check(path: Path, weights: Layout, configuration: Configuration, channels: int, classes: int) -> Graph:
    """The graph in an ONNX file, after everything in it was looked at: known operators alone, and
    every weight exactly where the safetensors file has it. Raises ValueError."""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError("it is too large for a graph without weights")
    graph = read(path.read_bytes())
    if any(node.op not in _OPERATORS for node in graph.nodes):
        raise ValueError("it holds unknown operators")
    for weight in graph.weights:
        place = Place(weight.shape, weight.offset, weight.length, weight.half)
        if weight.location != weights.file or weights.tensors.get(weight.name) != place:
            raise ValueError(f"its weights {weight.name} are not those of {weights.file}")
    ports = (*graph.inputs, *graph.outputs[:1])
    sizes = [p.shape[1] if len(p.shape) == 2 + configuration.dimensions else 0 for p in ports]
    if [p.name for p in ports] != [TILES, LOGITS] or sizes != [channels, classes]:
        raise ValueError("it takes or gives something else than the plan says")
    if len(graph.outputs) > 1:
        head_of(graph)
    return graph


def head_of(graph: Graph) -> tuple[str, str]:
    """Names of weight and bias of the last convolution of a graph that gives features too. Raises
    ValueError where the graph does not end in one of size 1."""
    last = graph.nodes[-1]
    if last.op != "Conv" or len(last.inputs) != 3 or last.inputs[0] != FEATURES or last.output != LOGITS:
        raise ValueError("its logits are no 1x1x1 convolution of its features")
    return last.inputs[1].removesuffix(_FULL), last.inputs[2].removesuffix(_FULL)


def _graph(nodes: list[Node], last: str, channels: int, classes: int, used: list[str], weights: Layout) -> Graph:
    final = next(node for node in nodes if node.output == last)
    halves = [name for name in used if weights.tensors[name].half]
    rename = {last: LOGITS, **{name: name + _FULL for name in halves}}
    outputs = [(LOGITS, classes)]
    features = weights.tensors[final.inputs[1]].shape[1] if final.op == "Conv" and len(final.inputs) == 3 else classes
    if splits(classes, features) and all(n == 1 for n in dict(final.attributes)["kernel_shape"]):  # type: ignore[union-attr]
        rename[final.inputs[0]] = FEATURES
        outputs.append((FEATURES, features))
    space = [f"size{n}" for n in range(len(weights.tensors[used[0]].shape) - 2)]
    return Graph(
        name="network",
        inputs=(Port(TILES, ("batch", channels, *space)),),
        outputs=tuple(Port(name, ("batch", count, *space)) for name, count in outputs),
        nodes=(
            *(Node("Cast", (name,), name + _FULL, (("to", _FLOAT32),)) for name in halves),
            *(
                Node(n.op, tuple(rename.get(i, i) for i in n.inputs), rename.get(n.output, n.output), n.attributes)
                for n in nodes
            ),
        ),
        weights=tuple(_weight(name, weights) for name in used),
    )


def _require_held(names: list[str], network: nn.Module, weights: Layout) -> None:
    for name in names:
        if name not in weights.tensors or weights.tensors[name].shape != tuple(network.get_parameter(name).shape):
            raise NotPortableError(f"{weights.file} lacks {name}, or has another shape of it")


def _weight(name: str, weights: Layout) -> Weight:
    place = weights.tensors[name]
    return Weight(name, place.shape, weights.file, place.offset, place.length, place.half)


def _node(step: Any, traced: Any, inputs: list[str]) -> tuple[Node | None, list[str]]:
    """The operator of a traced step (None where it passes its input on), and the weights it takes."""
    import torch

    if step.op == "call_module":
        module = traced.get_submodule(step.target)
        found = _module(module)
        if found is None:
            return None, []
        op, attributes = found
        parameters = [f"{step.target}.{name}" for name, _ in module.named_parameters()]
        return Node(op, (*inputs, *parameters), step.name, attributes), parameters
    if step.op == "call_function":
        if step.target is torch.cat and step.kwargs.get("dim", *step.args[1:]) == 1:
            return Node("Concat", tuple(inputs), step.name, (("axis", 1),)), []
        if step.target in (operator.add, operator.iadd, torch.add) and len(step.args) == len(inputs) == 2:
            return Node("Add", tuple(inputs), step.name), []
    raise NotPortableError(f"there is no operator for {step.target}")


def _module(module: nn.Module) -> tuple[str, tuple[tuple[str, Attribute], ...]] | None:
    from torch import nn

    if isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d | nn.Dropout3d):
        return None
    if isinstance(module, nn.ReLU):
        return "Relu", ()
    if isinstance(module, nn.LeakyReLU):
        return "LeakyRelu", (("alpha", float(module.negative_slope)),)
    if isinstance(module, nn.InstanceNorm2d | nn.InstanceNorm3d) and module.affine and not module.track_running_stats:
        return "InstanceNormalization", (("epsilon", float(module.eps)),)
    if isinstance(module, nn.AvgPool2d | nn.AvgPool3d) and not module.ceil_mode and module.count_include_pad:
        dimensions = 2 if isinstance(module, nn.AvgPool2d) else 3
        kernel, stride, padding = (_each(v, dimensions) for v in (module.kernel_size, module.stride, module.padding))
        return "AveragePool", (
            ("count_include_pad", 1),
            ("kernel_shape", kernel),
            ("pads", padding * 2),
            ("strides", stride),
        )
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return _convolution(module)
    raise NotPortableError(f"there is no operator for {type(module).__name__}")


def _convolution(module: Any) -> tuple[str, tuple[tuple[str, Attribute], ...]]:
    from torch import nn

    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise NotPortableError("a convolution pads with something else than zeros")
    attributes: tuple[tuple[str, Attribute], ...] = (
        ("dilations", tuple(module.dilation)),
        ("group", int(module.groups)),
        ("kernel_shape", tuple(module.kernel_size)),
        ("pads", tuple(module.padding) * 2),
        ("strides", tuple(module.stride)),
    )
    if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "ConvTranspose", (*attributes, ("output_padding", tuple(module.output_padding)))
    return "Conv", attributes


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    return (int(value),) * dimensions if isinstance(value, int) else tuple(int(v) for v in value)

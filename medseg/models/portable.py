"""A network in a form that others can run: an ONNX graph whose weights lie in the package's
safetensors file, once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.models.onnx_file import Graph, Node, NotPortableError, Port, Weight, read, write
from medseg.plan.plan import Configuration

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medseg.models.trace import Trace

TILES, LOGITS, FEATURES = "tiles", "logits", "features"
# fmt: off
_OPERATORS = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Cast", "Concat", "Conv", "ConvTranspose", "Div", "Equal", "Erf",
    "Expand", "Gather", "InstanceNormalization", "LayerNormalization", "LeakyRelu", "MatMul", "MaxPool", "Mul",
    "Not", "PRelu", "Pad", "ReduceL2", "ReduceMean", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Softmax",
    "Sub", "Tanh", "Transpose", "Where",
})
# fmt: on
_MOST_BYTES = 2**24
# Weights that are stored in half the bits are made float32 (ONNX's number 1) before anything is computed.
_TYPES = {"F32": False, "F16": True}
_FULL, _FLOAT32 = ".float32", 1


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
    """Where each tensor lies in a safetensors file, if it is float32 or float16. ``others`` names the types of those
    that are not."""

    path: Path
    tensors: dict[str, Place]
    others: dict[str, str]

    @property
    def file(self) -> str:
        """The file's name."""
        return self.path.name


def layout(path: Path) -> Layout:
    """Where the tensors of a safetensors file lie, as its header says it (the safetensors library has
    read the file before, and so checked the header)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    tensors, others = {}, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _TYPES:
            others[name] = entry["dtype"]
            continue
        first, last = entry["data_offsets"]
        tensors[name] = Place(tuple(entry["shape"]), 8 + size + first, last - first, _TYPES[entry["dtype"]])
    return Layout(path, tensors, others)


def export(network: nn.Module, configuration: Configuration, channels: int, classes: int, weights: Layout) -> bytes:
    """The ONNX file of a network whose weights lie in a safetensors file beside it.

    It takes "tiles" (batch, channels, ...) and gives "logits" (batch, classes, ...), and "features"
    too where `splits` says so. Batches are of any size, and so are tiles if no operator needs a number for that;
    else they are of the configuration's patch. The network need not hold values (torch's meta device). Raises
    NotPortableError.
    """
    from medseg.models.trace import paired, trace

    network, integers, patch = network.eval(), _integers(network, weights), _patch(configuration)
    first = trace(network, integers, (2, channels, *patch))
    try:  # what is not the same in two traces is free
        larger = trace(network, integers, (3, channels, *(2 * n for n in patch)))
        return write(_graph(paired(first, larger), channels, classes, weights))
    except NotPortableError:
        more = trace(network, integers, (3, channels, *patch))
        return write(_graph(paired(first, more), channels, classes, weights))


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
    _require_own_names(graph)
    _require_rows(graph)
    _require_ports(graph, _patch(configuration), channels, classes)
    return graph


def _require_own_names(graph: Graph) -> None:
    """Nothing has the name of something else, which could stand in for it."""
    kinds = (graph.inputs, graph.weights, graph.constants)
    names = [*(one.name for kind in kinds for one in kind), *(node.output for node in graph.nodes)]
    if len(set(names)) < len(names):
        raise ValueError("two things in it have the same name")


def _require_rows(graph: Graph) -> None:
    """Gather takes rows of a weight by number, and only such as there are."""
    rows = {weight.name: weight.shape[0] for weight in graph.weights if weight.shape}
    rows |= {node.output: rows[node.inputs[0]] for node in graph.nodes if node.op == "Cast" and node.inputs[0] in rows}
    constants = {constant.name: constant for constant in graph.constants}
    for node in graph.nodes:
        if node.op == "Gather":
            table, index = node.inputs
            if node.attributes != (("axis", 0),) or table not in rows or index not in constants:
                raise ValueError("it gathers something else than rows of a weight")
            if any(not 0 <= n < rows[table] for n in constants[index].numbers()):
                raise ValueError("it gathers rows that are not there")


def _require_ports(graph: Graph, patch: tuple[int, ...], channels: int, classes: int) -> None:
    """It takes tiles and gives logits, and features if any, of free sizes or the patch's."""
    expected = {TILES: channels, LOGITS: classes}
    if len(graph.outputs) > 1:
        shapes = {weight.name: weight.shape for weight in graph.weights}
        expected[FEATURES] = next(iter(shapes.get(head_of(graph)[0], ())[1:]), 0)
    ports = (*graph.inputs, *graph.outputs)
    found = {port.name: port.shape[1] for port in ports if _fits(port, patch)}
    if found != expected or [port.name for port in ports] != list(expected) or len(graph.inputs) != 1:
        raise ValueError("it takes or gives something else than the plan says")


def _fits(port: Port, patch: tuple[int, ...]) -> bool:
    batch, _, *size = port.shape if len(port.shape) == 2 + len(patch) else (0, 0)
    return isinstance(batch, str) and (tuple(size) == patch or all(isinstance(n, str) for n in size))


def head_of(graph: Graph) -> tuple[str, str]:
    """Names of weight and bias of the last convolution of a graph that gives features too. Raises
    ValueError where the graph does not end in one of size 1."""
    last = graph.nodes[-1] if graph.nodes else Node("", (), "")
    if last.op != "Conv" or len(last.inputs) != 3 or last.inputs[0] != FEATURES or last.output != LOGITS:
        raise ValueError("its logits are no 1x1x1 convolution of its features")
    return last.inputs[1].removesuffix(_FULL), last.inputs[2].removesuffix(_FULL)


def _graph(traced: Trace, channels: int, classes: int, weights: Layout) -> Graph:
    from medseg.models.operators import Writer

    writer = Writer()
    last = writer.write(traced, TILES)
    size = traced.tiles.shape[2:]
    if traced.output.shape != (-1, classes, *size):
        raise NotPortableError("it gives something else than a logit of each class and voxel")
    if not writer.nodes or writer.nodes[-1].output != last:
        raise NotPortableError("it ends in something else than an operator")
    final, stored = writer.nodes[-1], [_weight(name, shape, weights) for name, shape in writer.weights.items()]
    rename = {last: LOGITS, **{one.name: one.name + _FULL for one in stored if one.half}}
    outputs = [(LOGITS, classes)]
    features = writer.weights[final.inputs[1]][1] if final.op == "Conv" and len(final.inputs) == 3 else classes
    if splits(classes, features) and all(n == 1 for n in dict(final.attributes)["kernel_shape"]):  # type: ignore[union-attr]
        rename[final.inputs[0]] = FEATURES
        outputs.append((FEATURES, features))
    space = [f"size{axis}" if n < 0 else n for axis, n in enumerate(size)]
    return Graph(
        name="network",
        inputs=(Port(TILES, ("batch", channels, *space)),),
        outputs=tuple(Port(name, ("batch", count, *space)) for name, count in outputs),
        nodes=(
            *(Node("Cast", (one.name,), one.name + _FULL, (("to", _FLOAT32),)) for one in stored if one.half),
            *(
                Node(n.op, tuple(rename.get(i, i) for i in n.inputs), rename.get(n.output, n.output), n.attributes)
                for n in writer.nodes
            ),
        ),
        weights=tuple(stored),
        constants=tuple(writer.constants.values()),
    )


def _weight(name: str, shape: tuple[int, ...], weights: Layout) -> Weight:
    if name in weights.others:
        raise NotPortableError(f"the weights {name} are {weights.others[name]}, not {' or '.join(_TYPES)}")
    place = weights.tensors.get(name)
    if place is None or place.shape != shape:
        raise NotPortableError(f"{weights.file} lacks {name}, or has another shape of it")
    return Weight(name, place.shape, weights.file, place.offset, place.length, place.half)


def _integers(network: nn.Module, weights: Layout) -> dict[str, Tensor]:
    """The network's tensors of whole numbers, as the file has them."""
    from safetensors import safe_open

    names = [name for name, tensor in network.named_buffers() if not tensor.is_floating_point()]
    with safe_open(weights.path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names if name in weights.others}


def _patch(configuration: Configuration) -> tuple[int, ...]:
    """The sizes of a tile along the axes that the network sees."""
    return tuple(n for axis, n in enumerate(configuration.patch.value) if axis != configuration.slice_axis)

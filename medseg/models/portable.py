"""A network in a form that others can run: ONNX graphs (`medseg.models.parts`) whose weights lie in the package's
safetensors file, once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.models.onnx_file import Graph, Node, NotPortableError, Port, Weight, read, write
from medseg.models.parts import BATCH, FEATURES, LOGITS, Part

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medseg.models.operators import Writer
    from medseg.models.trace import Trace

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


def export(network: nn.Module, part: Part, weights: Layout) -> bytes:
    """The ONNX file of a part of a network whose weights lie in a safetensors file beside it.

    It takes and gives what the part says, and a whole network "features" (batch, features, ...) too where `splits`
    says so. Batches are of any size, and so are the tiles of a whole network if no operator needs a number for
    that. The network need not hold values (torch's meta device). Raises NotPortableError.
    """
    from medseg.models.trace import paired, trace

    network, integers = network.eval(), _integers(network, weights)
    channels, *size = _numbers(part.takes)
    first = trace(network, integers, (2, channels, *size), part.method)
    if part.whole:
        try:  # what is not the same in two traces is free
            larger = trace(network, integers, (3, channels, *(2 * n for n in size)))
            return write(_graph(paired(first, larger), part, weights))
        except NotPortableError:
            pass
    more = trace(network, integers, (3, channels, *size), part.method)
    return write(_graph(paired(first, more), part, weights))


def check(path: Path, weights: Layout, part: Part) -> Graph:
    """The graph in an ONNX file, after everything in it was looked at: known operators alone, every weight exactly
    where the safetensors file has it, and what it takes and gives as the part says. Raises ValueError."""
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
    _require_ports(graph, part)
    return graph


def _require_own_names(graph: Graph) -> None:
    """Nothing has the name of something else, which could stand in for it."""
    kinds = (graph.inputs, graph.weights, graph.constants)
    names = [*(one.name for kind in kinds for one in kind), *(node.output for node in graph.nodes)]
    if len(set(names)) < len(names):
        raise ValueError("two things in it have the same name")
    if not {port.name for port in graph.outputs} <= {node.output for node in graph.nodes}:
        raise ValueError("it gives what it does not compute")


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


def _require_ports(graph: Graph, part: Part) -> None:
    """It takes and gives what the part says, and a whole network features, if it likes."""
    expected = [part.takes, *part.gives]
    if part.whole and len(graph.outputs) > 1:
        shapes = {weight.name: weight.shape for weight in graph.weights}
        expected.append(_features(part, next(iter(shapes.get(head_of(graph)[0], ())[1:]), 0)))
    found = [*graph.inputs, *graph.outputs]
    alike = len(found) == len(expected) and all(map(_fits, found, expected, [part.whole] * len(found)))
    if not alike or len(graph.inputs) != 1:
        raise ValueError("it takes or gives something else than the plan says")


def _fits(port: Port, expected: Port, free: bool) -> bool:
    """Batches are of any size; all that follows the channels may be ``free``, too."""
    batch, *size = port.shape or (0,)
    wanted = list(expected.shape[1:])
    if free and all(isinstance(n, str) for n in size[1:]) and len(size) == len(wanted):
        size[1:] = wanted[1:]
    return port.name == expected.name and isinstance(batch, str) and size == wanted


def _features(part: Part, count: int) -> Port:
    """What a whole network gives beside its logits."""
    return Port(FEATURES, (BATCH, count, *part.takes.shape[2:]))


def head_of(graph: Graph) -> tuple[str, str]:
    """Names of weight and bias of the last convolution of a graph that gives features too. Raises
    ValueError where the graph does not end in one of size 1."""
    last = graph.nodes[-1] if graph.nodes else Node("", (), "")
    if last.op != "Conv" or len(last.inputs) != 3 or last.inputs[0] != FEATURES or last.output != LOGITS:
        raise ValueError("its logits are no 1x1x1 convolution of its features")
    return last.inputs[1].removesuffix(_FULL), last.inputs[2].removesuffix(_FULL)


def _graph(traced: Trace, part: Part, weights: Layout) -> Graph:
    from medseg.models.operators import Writer

    writer = Writer()
    names = writer.write(traced, part.takes.name)
    free = -1 in traced.tiles.shape[2:]
    takes, *gives = (_freed(port) if free else port for port in (part.takes, *part.gives))
    shapes = [tuple(-1 if isinstance(n, str) else n for n in port.shape) for port in gives]
    if [value.shape for value in traced.outputs] != shapes:
        raise NotPortableError(f"it gives something else than {', '.join(port.name for port in gives)} of its size")
    if len({*names} & {node.output for node in writer.nodes}) < len(names) or writer.nodes[-1].output not in names:
        raise NotPortableError("it ends in something else than an operator")
    stored = [_weight(name, shape, weights) for name, shape in writer.weights.items()]
    rename = dict(zip(names, (port.name for port in gives), strict=True))
    rename |= {one.name: one.name + _FULL for one in stored if one.half}
    head = _head(writer, part)
    if head:
        inner, features = head
        rename[inner] = FEATURES
        gives.append(_freed(_features(part, features)) if free else _features(part, features))
    return Graph(
        name="network",
        inputs=(takes,),
        outputs=tuple(gives),
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


def _head(writer: Writer, part: Part) -> tuple[str, int] | None:
    """What a whole network's last convolution takes, and how many features these are, where `splits` says so."""
    final = writer.nodes[-1]
    if not part.whole or final.op != "Conv" or len(final.inputs) != 3:
        return None
    features, (classes, *_) = writer.weights[final.inputs[1]][1], _numbers(part.gives[0])
    size: Any = dict(final.attributes)["kernel_shape"]
    return (final.inputs[0], features) if splits(classes, features) and set(size) == {1} else None


def _freed(port: Port) -> Port:
    """The same of any size, but for its channels."""
    return Port(port.name, (*port.shape[:2], *(f"size{axis}" for axis in range(len(port.shape) - 2))))


def _numbers(port: Port) -> list[int]:
    """Its shape, but for the batch."""
    return [n for n in port.shape if isinstance(n, int)]


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

"""Torch's operators (ATen) as ONNX has them: a function each, in `_OPERATORS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike

from medseg.models.onnx_file import Attribute, Constant, Node, NotPortableError
from medseg.models.trace import Step, Trace, Value

_Function: TypeAlias = "Callable[[Writer, Step], str | None]"
_END = 2**63 - 1


class Writer:
    """Nodes in the making, the constants that they take, and the weights, with their shapes."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[tuple[Any, ...], Constant] = {}
        self.weights: dict[str, tuple[int, ...]] = {}
        # Weights that torch repeats for each tile, before it takes an instance norm (`_instance_norm`).
        self.repeated: dict[Value, Value] = {}
        # What holds each value's numbers, and in what shape. A view becomes a node only where it is taken.
        self._places: dict[Value, tuple[str, Value]] = {}

    def write(self, trace: Trace, tiles: str) -> list[str]:
        """Nodes for all steps; the names of what the network returns. Raises NotPortableError."""
        self.hold(trace.tiles, tiles)
        for step in trace.steps:
            if step.op not in _OPERATORS:
                raise NotPortableError(f"there is no operator for {step.op}")
            if step.varies and step.op not in _SIZED:
                raise _no_operator(step, "by the size of what it takes")
            name = _OPERATORS[step.op](self, step)
            if name is not None:
                self.hold(step.results[0], name)
        return [self.name(value) for value in trace.outputs]

    def node(self, op: str, inputs: Sequence[str], **attributes: Attribute) -> str:
        """A new node; the name of what it gives."""
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(Node(op, tuple(inputs), name, tuple(attributes.items())))
        return name

    def name(self, value: Value) -> str:
        """What holds a value, in its own shape."""
        name, held = self.place(value)
        if held.sizes != value.sizes:
            name = self.reshape(name, value.shape)
            self.hold(value, name)
        return name

    def reshape(self, name: str, shape: tuple[int, ...]) -> str:
        """A node that gives the same numbers in another shape, in which at most one size is free (-1)."""
        if shape.count(-1) > 1:
            raise NotPortableError("there is no operator for views of free sizes")
        return self.node("Reshape", (name, self.constant(shape)))

    def place(self, value: Value) -> tuple[str, Value]:
        """What holds a value's numbers, and a value of the shape in which it does."""
        if value not in self._places:
            self.hold(value, self._stored(value))
        return self._places[value]

    def hold(self, value: Value, name: str, held: Value | None = None) -> None:
        """Note what holds a value's numbers; in the shape of another value where one is given."""
        self._places[value] = name, held or value

    def constant(self, values: ArrayLike) -> str:
        """The name of a constant. What is equal is held once."""
        array = np.asarray(values)
        kind = "bool" if array.dtype == bool else "int64" if array.dtype.kind in "iu" else "float32"
        data = array.astype({"float32": "<f4", "int64": "<i8", "bool": "?"}[kind]).tobytes()
        key = kind, array.shape, data
        if key not in self.constants:
            try:
                self.constants[key] = Constant(f"constant{len(self.constants)}", array.shape, kind, data)
            except ValueError as error:
                raise NotPortableError(str(error)) from None
        return self.constants[key].name

    def number(self, value: Value | float) -> str:
        """The name of a value to compute with, or of a constant."""
        if not isinstance(value, Value):
            return self.constant(float(value))
        if value.known is not None:
            return self.constant(value.known.float().numpy())
        if not value.dtype.is_floating_point:
            raise NotPortableError("there is no operator that computes with truths or whole numbers")
        return self.name(value)

    def filled(self, weight: Value | None, fill: float, shape: tuple[int, ...]) -> str:
        """The name of a weight, or of a constant in its place."""
        return self.constant(np.full(shape, fill, np.float32)) if weight is None else self.name(weight)

    def slice(self, name: str, axis: int, start: int, end: int, step: int = 1) -> str:
        """A node that gives a part along one axis."""
        return self.node("Slice", (name, *(self.constant([n]) for n in (start, end, axis, step))))

    def _stored(self, value: Value) -> str:
        if value.known is not None:
            return self.constant((value.known if value.dtype == torch.bool else value.known.float()).numpy())
        if not value.weight:
            raise NotPortableError("it uses what no operator gives")
        self.weights[value.weight] = value.shape
        return value.weight


def _no_operator(step: Step, why: str) -> NotPortableError:
    return NotPortableError(f"there is no operator for {step.op} {why}")


def _each(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(numbers) * count if len(numbers) == 1 else tuple(numbers)


def _axes(step: Step, value: Value, name: str = "dim") -> tuple[int, ...]:
    """An argument's axes, counted from the first; all of them where it says none."""
    given, rank = step.arguments.get(name), len(value.shape)
    if given is None or given == []:
        return tuple(range(rank))
    return tuple(axis % rank for axis in ([given] if isinstance(given, int) else given))


# ---- convolution, pooling, interpolation --------------------------------------------------------


def _convolution(writer: Writer, step: Step) -> str:
    a = step.arguments
    spatial = len(a["input"].shape) - 2
    attributes: dict[str, Attribute] = {
        "dilations": _each(a["dilation"], spatial),
        "group": a["groups"],
        "kernel_shape": a["weight"].shape[2:],
        "pads": _each(a["padding"], spatial) * 2,
        "strides": _each(a["stride"], spatial),
    }
    inputs = [writer.name(a[name]) for name in ("input", "weight", "bias") if a[name] is not None]
    if not a["transposed"]:
        return writer.node("Conv", inputs, **attributes)
    return writer.node("ConvTranspose", inputs, **attributes, output_padding=_each(a["output_padding"], spatial))


def _windows(step: Step) -> dict[str, Attribute]:
    a = step.arguments
    spatial = len(a["self"].shape) - 2
    kernel = _each(a["kernel_size"], spatial)
    return {
        "ceil_mode": int(a["ceil_mode"]),
        "kernel_shape": kernel,
        "pads": _each(a["padding"], spatial) * 2,
        "strides": _each(a["stride"], spatial) or kernel,
    }


def _max_pool(writer: Writer, step: Step) -> str:
    a = step.arguments
    dilations = _each(a["dilation"], len(a["self"].shape) - 2)
    return writer.node("MaxPool", (writer.name(a["self"]),), **_windows(step), dilations=dilations)


def _average_pool(writer: Writer, step: Step) -> str:
    a = step.arguments
    if a["divisor_override"] is not None:
        raise _no_operator(step, "with a divisor")
    padded = int(a["count_include_pad"])
    return writer.node("AveragePool", (writer.name(a["self"]),), **_windows(step), count_include_pad=padded)


def _adaptive_pool(writer: Writer, step: Step) -> str:
    pairs = list(zip(step.arguments["self"].shape[2:], step.results[0].shape[2:], strict=True))
    if any(n < 0 or n % m for n, m in pairs):
        raise _no_operator(step, "whose windows are not all alike")
    kernel = tuple(n // m for n, m in pairs)
    return writer.node("AveragePool", (writer.name(step.arguments["self"]),), kernel_shape=kernel, strides=kernel)


def _linear_upsample(writer: Writer, step: Step) -> str:
    places = "align_corners" if step.arguments["align_corners"] else "half_pixel"
    return _upsample(writer, step, coordinate_transformation_mode=places, mode="linear")


def _nearest_upsample(writer: Writer, step: Step) -> str:
    return _upsample(writer, step, coordinate_transformation_mode="asymmetric", mode="nearest", nearest_mode="floor")


def _upsample(writer: Writer, step: Step, **attributes: Attribute) -> str:
    source = step.arguments["self"]
    scales = [value for name, value in step.arguments.items() if name.startswith("scales")]
    if None in scales:
        if step.varies:
            raise _no_operator(step, "to a free size")
        scales = [_scale(n, m) for n, m in zip(source.shape[2:], step.results[0].shape[2:], strict=True)]
    every = writer.constant(np.array([1, 1, *scales], np.float32))
    return writer.node("Resize", (writer.name(source), "", every), **attributes)


def _scale(size: int, out: int) -> np.float32:
    """The least scale that makes no less than ``out`` of ``size``, however it is rounded."""
    scale = np.float32(out / size)
    while size * float(scale) < out:
        scale = np.nextafter(scale, np.float32(np.inf))
    return scale


# ---- normalisation ------------------------------------------------------------------------------


def _batch_norm(writer: Writer, step: Step) -> str | None:
    a = step.arguments
    if a["training"]:
        return _instance_norm(writer, step)
    count = a["input"].shape[1:2]
    inputs = (
        writer.name(a["input"]),
        writer.filled(a["weight"], 1, count),
        writer.filled(a["bias"], 0, count),
        writer.name(a["running_mean"]),
        writer.name(a["running_var"]),
    )
    return writer.node("BatchNormalization", inputs, epsilon=a["eps"])


def _instance_norm(writer: Writer, step: Step) -> str | None:
    """To torch an instance norm is a batch norm of one tile that has the channels of all."""
    a = step.arguments
    name, tiles = writer.place(a["input"])
    batch, channels = tiles.sizes[0][:2]
    if a["running_mean"] is not None or a["input"].sizes[0] != (1, batch * channels, *tiles.sizes[0][2:]):
        raise _no_operator(step, "over a whole batch")
    scale, shift = (writer.repeated.get(a[name]) for name in ("weight", "bias"))
    inputs = (name, writer.filled(scale, 1, (channels,)), writer.filled(shift, 0, (channels,)))
    writer.hold(step.results[0], writer.node("InstanceNormalization", inputs, epsilon=a["eps"]), tiles)
    return None


def _repeat(writer: Writer, step: Step) -> None:
    writer.repeated[step.results[0]] = step.arguments["self"]


def _group_norm(writer: Writer, step: Step) -> str:
    """An instance norm of groups, then scale and shift of channels."""
    a = step.arguments
    value, groups, channels, epsilon = a["input"], a["group"], a["C"], a["eps"]
    name = writer.name(value)
    if groups == channels:
        pair = writer.filled(a["weight"], 1, (channels,)), writer.filled(a["bias"], 0, (channels,))
        return writer.node("InstanceNormalization", (name, *pair), epsilon=epsilon)
    pair = writer.filled(None, 1, (groups,)), writer.filled(None, 0, (groups,))
    name = writer.node("Reshape", (name, writer.constant([0, groups, -1])))
    name = writer.node("InstanceNormalization", (name, *pair), epsilon=epsilon)
    name = writer.reshape(name, value.shape)
    for op, weight in (("Mul", a["weight"]), ("Add", a["bias"])):
        if weight is not None:
            each = writer.reshape(writer.name(weight), (channels, *(1 for _ in value.shape[2:])))
            name = writer.node(op, (name, each))
    return name


def _layer_norm(writer: Writer, step: Step) -> str:
    a = step.arguments
    shape = tuple(a["normalized_shape"])
    inputs = (writer.name(a["input"]), writer.filled(a["weight"], 1, shape), writer.filled(a["bias"], 0, shape))
    return writer.node("LayerNormalization", inputs, axis=len(a["input"].shape) - len(shape), epsilon=a["eps"])


# ---- arithmetic ---------------------------------------------------------------------------------


def _unary(op: str) -> _Function:
    return lambda writer, step: writer.node(op, (writer.name(step.arguments["self"]),))


def _binary(op: str) -> _Function:
    def function(writer: Writer, step: Step) -> str:
        a = step.arguments
        if a.get("alpha", 1) != 1 or a.get("rounding_mode"):
            raise _no_operator(step, "with a factor, or rounded")
        return writer.node(op, (writer.number(a["self"]), writer.number(a["other"])))

    return function


def _leaky_relu(writer: Writer, step: Step) -> str:
    a = step.arguments
    return writer.node("LeakyRelu", (writer.name(a["self"]),), alpha=float(a["negative_slope"]))


def _prelu(writer: Writer, step: Step) -> str:
    return writer.node("PRelu", (writer.name(step.arguments["self"]), writer.name(step.arguments["weight"])))


def _gelu(writer: Writer, step: Step) -> str:
    if step.arguments["approximate"] != "none":
        raise _no_operator(step, "by its approximation")
    x = writer.name(step.arguments["self"])
    inner = writer.node("Erf", (writer.node("Div", (x, writer.constant(math.sqrt(2)))),))
    return writer.node(
        "Mul", (writer.node("Mul", (x, writer.node("Add", (inner, writer.constant(1.0))))), writer.constant(0.5))
    )


def _softmax(writer: Writer, step: Step) -> str:
    value = step.arguments["self"]
    return writer.node("Softmax", (writer.name(value),), axis=_axes(step, value)[0])


def _reduce(op: str) -> _Function:
    def function(writer: Writer, step: Step) -> str:
        a = step.arguments
        if a.get("ord", 2) != 2:
            raise _no_operator(step, f"of order {a['ord']}")
        axes, keep = _axes(step, a["self"]), int(a.get("keepdim", False))
        return writer.node(op, (writer.name(a["self"]),), axes=axes, keepdims=keep)

    return function


def _matmul(writer: Writer, step: Step) -> str:
    return writer.node("MatMul", (writer.name(step.arguments["self"]), writer.name(step.arguments["mat2"])))


def _addmm(writer: Writer, step: Step) -> str:
    a = step.arguments
    if (a["alpha"], a["beta"]) != (1, 1):
        raise _no_operator(step, "with a factor")
    product = writer.node("MatMul", (writer.name(a["mat1"]), writer.name(a["mat2"])))
    return writer.node("Add", (product, writer.name(a["self"])))


def _equal(writer: Writer, step: Step) -> str:
    return writer.node("Equal", (writer.number(step.arguments["self"]), writer.number(step.arguments["other"])))


def _not_equal(writer: Writer, step: Step) -> str:
    return writer.node("Not", (_equal(writer, step),))


def _masked_fill(writer: Writer, step: Step) -> str:
    a = step.arguments
    return writer.node("Where", (writer.name(a["mask"]), writer.number(a["value"]), writer.name(a["self"])))


def _where(writer: Writer, step: Step) -> str:
    a = step.arguments
    return writer.node("Where", (writer.name(a["condition"]), writer.number(a["self"]), writer.number(a["other"])))


# ---- shapes -------------------------------------------------------------------------------------


def _view(writer: Writer, step: Step) -> str | None:
    value = step.arguments["self"]
    if step.arguments.get("dtype") not in (None, torch.float32):
        raise _no_operator(step, f"to {step.arguments['dtype']}")
    writer.hold(step.results[0], *writer.place(value))
    return None


def _expand(writer: Writer, step: Step) -> str | None:
    value, out = step.arguments["self"], step.results[0]
    if math.prod(value.sizes[0]) == math.prod(out.sizes[0]):
        return _view(writer, step)
    before = (*(1 for _ in range(len(out.shape) - len(value.shape))), *value.shape)
    shape = [1 if n == m else m for n, m in zip(before, out.shape, strict=True)]
    if -1 in shape:
        raise _no_operator(step, "to a free size")
    return writer.node("Expand", (writer.name(value), writer.constant(shape)))


def _permute(writer: Writer, step: Step) -> str:
    value = step.arguments["self"]
    return writer.node("Transpose", (writer.name(value),), perm=_axes(step, value, "dims"))


def _transpose(writer: Writer, step: Step) -> str:
    value = step.arguments["self"]
    order = list(range(len(value.shape)))
    one, other = (step.arguments.get(name, axis) % len(order) for axis, name in enumerate(("dim0", "dim1")))
    order[one], order[other] = other, one
    return writer.node("Transpose", (writer.name(value),), perm=tuple(order))


def _cat(writer: Writer, step: Step) -> str:
    values = step.arguments["tensors"]
    return writer.node("Concat", [writer.name(v) for v in values], axis=_axes(step, values[0])[0])


def _slice(writer: Writer, step: Step) -> str | None:
    a = step.arguments
    if a["self"].sizes == step.results[0].sizes:
        return _view(writer, step)
    start, end = a["start"] or 0, _END if a["end"] is None else a["end"]
    return writer.slice(writer.name(a["self"]), _axes(step, a["self"])[0], start, end, a["step"])


def _select(writer: Writer, step: Step) -> None:
    a = step.arguments
    _one(writer, a["self"], _axes(step, a["self"])[0], a["index"], step.results[0])


def _unbind(writer: Writer, step: Step) -> None:
    value = step.arguments["self"]
    for index, result in enumerate(step.results):
        _one(writer, value, _axes(step, value)[0], index, result)


def _one(writer: Writer, value: Value, axis: int, index: int, result: Value) -> None:
    end = index + 1 if index != -1 else _END
    held = Value(tuple((*shape[:axis], 1, *shape[axis + 1 :]) for shape in value.sizes), value.dtype)
    writer.hold(result, writer.slice(writer.name(value), axis, index, end), held)


def _split(writer: Writer, step: Step) -> None:
    value = step.arguments["self"]
    axis, at = _axes(step, value)[0], 0
    for result in step.results:
        end = at + result.shape[axis]
        writer.hold(result, writer.slice(writer.name(value), axis, at, end))
        at = end


def _pad(writer: Writer, step: Step) -> str | None:
    fill = writer.number(step.arguments["value"])
    return _padded(writer, step, step.arguments["pad"], fill, mode="constant")


def _edge_pad(writer: Writer, step: Step) -> str | None:
    return _padded(writer, step, step.arguments["padding"], mode="edge")


def _padded(writer: Writer, step: Step, pads: Sequence[int], *fill: str, mode: str) -> str | None:
    value = step.arguments["self"]
    if not any(pads):
        return _view(writer, step)
    if min(pads) < 0:
        raise _no_operator(step, "by less than nothing")
    # Torch has (before, after) of each axis, from the last; ONNX all before, then all after, from the first.
    rest = [0] * (len(value.shape) - len(pads) // 2)
    both = writer.constant([*rest, *pads[-2::-2], *rest, *pads[::-2]])
    return writer.node("Pad", (writer.name(value), both, *fill), mode=mode)


def _roll(writer: Writer, step: Step) -> str:
    a = step.arguments
    name = writer.name(a["self"])
    for axis, shift in zip(_axes(step, a["self"], "dims"), a["shifts"], strict=True):
        cut = -shift % a["self"].sizes[0][axis]
        if cut:
            parts = writer.slice(name, axis, cut, _END), writer.slice(name, axis, 0, cut)
            name = writer.node("Concat", parts, axis=axis)
    return name


def _index(writer: Writer, step: Step) -> str:
    """Rows of a weight, which are known by number. Others would need a look at whether they are there at all."""
    table, (rows, *others) = step.arguments["self"], step.arguments["indices"]
    if others or not table.weight or not isinstance(rows, Value) or rows.known is None:
        raise _no_operator(step, "but for rows of a weight")
    numbers = rows.known.numpy()
    numbers = np.where(numbers < 0, numbers + table.shape[0], numbers)
    return writer.node("Gather", (writer.name(table), writer.constant(numbers)), axis=0)


# Those that take sizes as numbers: what they give has them too, and that is looked at in their place.
_SIZED = frozenset(
    {"_unsafe_view", "expand", "native_group_norm", "repeat", "view", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"}
    | {f"upsample_{kind}" for kind in ("nearest2d", "nearest3d", "bilinear2d", "trilinear3d")}
)
_OPERATORS: dict[str, _Function] = {
    "_adaptive_avg_pool2d": _adaptive_pool,
    "_adaptive_avg_pool3d": _adaptive_pool,
    "_prelu_kernel": _prelu,
    "_softmax": _softmax,
    "_to_copy": _view,
    "_unsafe_view": _view,
    "add": _binary("Add"),
    "addmm": _addmm,
    "alias": _view,
    "avg_pool2d": _average_pool,
    "avg_pool3d": _average_pool,
    "bmm": _matmul,
    "cat": _cat,
    "clone": _view,
    "constant_pad_nd": _pad,
    "convolution": _convolution,
    "detach": _view,
    "div": _binary("Div"),
    "eq": _equal,
    "expand": _expand,
    "gelu": _gelu,
    "index": _index,
    "leaky_relu": _leaky_relu,
    "linalg_vector_norm": _reduce("ReduceL2"),
    "masked_fill": _masked_fill,
    "max_pool2d_with_indices": _max_pool,
    "max_pool3d_with_indices": _max_pool,
    "mean": _reduce("ReduceMean"),
    "mm": _matmul,
    "mul": _binary("Mul"),
    "native_batch_norm": _batch_norm,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "ne": _not_equal,
    "permute": _permute,
    "relu": _unary("Relu"),
    "repeat": _repeat,
    "replication_pad2d": _edge_pad,
    "replication_pad3d": _edge_pad,
    "roll": _roll,
    "select": _select,
    "sigmoid": _unary("Sigmoid"),
    "slice": _slice,
    "split": _split,
    "split_with_sizes": _split,
    "squeeze": _view,
    "sub": _binary("Sub"),
    "t": _transpose,
    "tanh": _unary("Tanh"),
    "transpose": _transpose,
    "unbind": _unbind,
    "unsqueeze": _view,
    "upsample_bilinear2d": _linear_upsample,
    "upsample_nearest2d": _nearest_upsample,
    "upsample_nearest3d": _nearest_upsample,
    "upsample_trilinear3d": _linear_upsample,
    "view": _view,
    "where": _where,
}

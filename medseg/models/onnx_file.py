"""As much of ONNX as a convolutional network needs: a graph as a value, its bytes, and back.

ONNX is a protocol buffer; its field numbers stand in onnx.proto. Only what `write` writes is read:
a file that says anything else is refused, whatever it is that it says. So nothing in a file from
someone else can name another file, carry code of its own or mean more than what was checked.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

_FLOAT32, _FLOAT16, _EXTERNAL = 1, 10, 1
# The types of constants: ONNX's number for each, its bytes, and its letter in struct.
_TYPES = {"float32": (1, 4, "f"), "int64": (7, 8, "q"), "bool": (9, 1, "?")}
_MOST_CONSTANT = 2**22
_IR_VERSION, _OPSET = 8, 17
Attribute: TypeAlias = int | float | str | tuple[int, ...]
_Field: TypeAlias = tuple[int, int | float | bytes]


class NotPortableError(ValueError):
    """The network holds something that has no portable form; the text says what."""


@dataclass(frozen=True)
class Weight:
    """Float32 values, or ``half`` as many bits of them, in another file: ``length`` bytes from byte
    ``offset`` of the file ``location`` beside this one."""

    name: str
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int
    half: bool = False


@dataclass(frozen=True)
class Constant:
    """Numbers that lie in this file itself, little-endian: ``kind`` float32, int64 or bool. Raises ValueError where
    they are too many, or not as many as the shape says."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: bytes

    def __post_init__(self) -> None:
        if self.kind not in _TYPES or len(self.data) != math.prod(self.shape) * _TYPES[self.kind][1]:
            raise ValueError(f"its constant {self.name} is not what it says")
        if len(self.data) > _MOST_CONSTANT:
            raise ValueError(f"its constant {self.name} is too large")
        if self.kind == "bool" and self.data.strip(b"\0\1"):
            raise ValueError(f"its constant {self.name} is neither true nor false")

    def numbers(self) -> tuple[float, ...]:
        """What it holds, in the order of memory."""
        return struct.unpack(f"<{math.prod(self.shape)}{_TYPES[self.kind][2]}", self.data)


@dataclass(frozen=True)
class Node:
    """One operator of ONNX's own set: what it takes and gives, by name."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: tuple[tuple[str, Attribute], ...] = ()


@dataclass(frozen=True)
class Port:
    """An input or output of the graph, float32. ``shape`` holds numbers, and names of free sizes."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """A network, without its weights' values. Nodes stand in the order in which they are computed. Constants are
    what they need of shapes, axes and the like."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: tuple[Node, ...]
    weights: tuple[Weight, ...]
    constants: tuple[Constant, ...] = ()


def write(graph: Graph) -> bytes:
    """The graph as the bytes of an ONNX file."""
    body = b"".join(
        (
            *(_bytes(1, _node(node)) for node in graph.nodes),
            _text(2, graph.name),
            *(_bytes(5, _weight(weight)) for weight in graph.weights),
            *(_bytes(5, _constant(constant)) for constant in graph.constants),
            *(_bytes(11, _port(port)) for port in graph.inputs),
            *(_bytes(12, _port(port)) for port in graph.outputs),
        )
    )
    return _int(1, _IR_VERSION) + _text(2, "medseg") + _bytes(7, body) + _bytes(8, _text(1, "") + _int(2, _OPSET))


def read(data: bytes) -> Graph:
    """The graph in a file's bytes. Raises ValueError where they are not exactly what `write` writes."""
    try:
        graph = _graph(_only(data, 7))
    except (struct.error, IndexError, KeyError, TypeError, UnicodeDecodeError):
        raise ValueError("it is cut short or no ONNX") from None
    if write(graph) != data:
        raise ValueError("it holds more than a plain network")
    return graph


# ---- writing ------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    if not 0 <= value < 2**63:
        raise ValueError(f"{value} does not fit")
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _node(node: Node) -> bytes:
    return b"".join(
        (
            *(_text(1, name) for name in node.inputs),
            _text(2, node.output),
            _text(3, node.output),
            _text(4, node.op),
            *(_bytes(5, _attribute(*pair)) for pair in node.attributes),
        )
    )


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, float):
        return _text(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _int(20, 1)
    if isinstance(value, int):
        return _text(1, name) + _int(3, value) + _int(20, 2)
    if isinstance(value, str):
        return _text(1, name) + _text(4, value) + _int(20, 3)
    return _text(1, name) + b"".join(_int(8, v) for v in value) + _int(20, 7)


def _weight(weight: Weight) -> bytes:
    where = (("location", weight.location), ("offset", str(weight.offset)), ("length", str(weight.length)))
    return b"".join(
        (
            *(_int(1, n) for n in weight.shape),
            _int(2, _FLOAT16 if weight.half else _FLOAT32),
            _text(8, weight.name),
            *(_bytes(13, _text(1, key) + _text(2, value)) for key, value in where),
            _int(14, _EXTERNAL),
        )
    )


def _constant(constant: Constant) -> bytes:
    return b"".join(
        (
            *(_int(1, n) for n in constant.shape),
            _int(2, _TYPES[constant.kind][0]),
            _text(8, constant.name),
            _bytes(9, constant.data),
        )
    )


def _port(port: Port) -> bytes:
    sizes = b"".join(_bytes(1, _text(2, n) if isinstance(n, str) else _int(1, n)) for n in port.shape)
    return _text(1, port.name) + _bytes(2, _bytes(1, _int(1, _FLOAT32) + _bytes(2, sizes)))


# ---- reading: what is overlooked here does not come back from `write`, and is so found ----------


def _fields(data: bytes) -> Iterator[_Field]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2:
            size = varint()
            yield key >> 3, data[at : at + size]
            at += size
        else:
            yield key >> 3, struct.unpack("<f", data[at : at + 4])[0]
            at += 4


def _all(data: bytes, field: int) -> Iterator[bytes]:
    return (value for number, value in _fields(data) if number == field and isinstance(value, bytes))


def _only(data: bytes, field: int) -> bytes:
    return next(_all(data, field), b"")


def _texts(data: bytes, field: int) -> tuple[str, ...]:
    return tuple(value.decode() for value in _all(data, field))


def _ints(data: bytes, field: int) -> tuple[int, ...]:
    return tuple(value for number, value in _fields(data) if number == field and isinstance(value, int))


def _graph(data: bytes) -> Graph:
    return Graph(
        name=_only(data, 2).decode(),
        inputs=tuple(_read_port(one) for one in _all(data, 11)),
        outputs=tuple(_read_port(one) for one in _all(data, 12)),
        nodes=tuple(_read_node(one) for one in _all(data, 1)),
        weights=tuple(_read_weight(one) for one in _all(data, 5) if _ints(one, 14)),
        constants=tuple(_read_constant(one) for one in _all(data, 5) if not _ints(one, 14)),
    )


def _read_node(data: bytes) -> Node:
    return Node(
        op=_only(data, 4).decode(),
        inputs=_texts(data, 1),
        output=_only(data, 2).decode(),
        attributes=tuple((_only(one, 1).decode(), _read_attribute(one)) for one in _all(data, 5)),
    )


def _read_attribute(data: bytes) -> Attribute:
    kind = _ints(data, 20)[0]
    if kind == 1:
        return [value for number, value in _fields(data) if number == 2 and isinstance(value, float)][0]  # noqa: RUF015
    if kind == 3:
        return _only(data, 4).decode()
    return _ints(data, 3)[0] if kind == 2 else _ints(data, 8)


def _read_weight(data: bytes) -> Weight:
    where = {_only(one, 1).decode(): _only(one, 2).decode() for one in _all(data, 13)}
    return Weight(
        name=_only(data, 8).decode(),
        shape=_ints(data, 1),
        location=where["location"],
        offset=int(where["offset"]),
        length=int(where["length"]),
        half=_ints(data, 2)[0] == _FLOAT16,
    )


def _read_constant(data: bytes) -> Constant:
    return Constant(
        name=_only(data, 8).decode(),
        shape=_ints(data, 1),
        kind={number: kind for kind, (number, *_) in _TYPES.items()}[_ints(data, 2)[0]],
        data=_only(data, 9),
    )


def _read_port(data: bytes) -> Port:
    shape = _only(_only(_only(data, 2), 1), 2)
    return Port(_only(data, 1).decode(), tuple(_size(one) for one in _all(shape, 1)))


def _size(data: bytes) -> int | str:
    numbers = _ints(data, 1)
    return numbers[0] if numbers else _only(data, 2).decode()

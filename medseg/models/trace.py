"""What a network does, step by step: torch's own operators (ATen), as they are called on tiles that hold no values.

Everything runs on torch's meta device, but for what depends on neither tiles nor weights: that is computed. Two
traces, of tiles of different sizes, tell together which sizes follow from the tiles'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from medseg.models.onnx_file import NotPortableError

# Of what is computed here: nothing may grow beyond the first, nor, unless it is small, much beyond what it came from.
_MOST, _SMALL = 2**20, 2**12
_NORMS = frozenset({"aten::native_batch_norm", "aten::native_group_norm", "aten::native_layer_norm"})


@dataclass(eq=False)
class Value:
    """A tensor. ``weight`` names it if it lies in the weights file, ``known`` holds it if it is computed here;
    else a step gives it. ``sizes`` are its shapes in one trace or two."""

    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    weight: str = ""
    known: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """-1 stands for sizes that are not the same in both traces."""
        return tuple(n[0] if len(set(n)) == 1 else -1 for n in zip(*self.sizes, strict=True))


@dataclass(frozen=True)
class Step:
    """One operator, by torch's name for it: its arguments, by torch's names for them, and what it gives.
    ``varies`` where its numbers are not the same in both traces."""

    op: str
    arguments: Mapping[str, Any]
    results: tuple[Value, ...]
    varies: bool = False


@dataclass(frozen=True)
class Trace:
    """A network's steps, in order, from what it takes to what it returns."""

    steps: tuple[Step, ...]
    tiles: Value
    outputs: tuple[Value, ...]


def trace(network: nn.Module, integers: Mapping[str, Tensor], shape: tuple[int, ...], method: str = "") -> Trace:
    """The steps of a network, or of one ``method`` of it, for tiles (batch, channels, ...).

    What it returns may be tensors in lists and tuples; they are put in a row. ``integers`` holds its tensors that are
    no floating-point numbers, by name; the others need no values. Raises NotPortableError where the steps depend on
    the values of tiles or weights, or the network fails.
    """
    tiles = torch.empty(shape, device="meta")
    recorder = _Recorder(network, integers)
    start = recorder.add(tiles)
    try:
        with torch.no_grad(), recorder:
            out = tree_leaves((getattr(network, method) if method else network)(tiles))
    except NotPortableError:
        raise
    except Exception as error:  # whatever a network's code may raise on being run so
        raise NotPortableError(f"its steps cannot be told ({type(error).__name__})") from error
    if not all(isinstance(one, Tensor) for one in out):
        raise NotPortableError("it gives something else than tensors")
    return Trace(tuple(recorder.steps), start, tuple(recorder.value(one) for one in out))


def paired(first: Trace, second: Trace) -> Trace:
    """The first of two traces of one network, whose values now know their shapes in the second too. Raises
    NotPortableError where the two do not have the same steps."""
    if _form(first) != _form(second):
        raise NotPortableError("its steps are others for tiles of another size")
    values: dict[Value, Value] = {}
    _pair(first.tiles, second.tiles, values)
    for one, other in zip(first.outputs, second.outputs, strict=True):
        _pair(one, other, values)
    steps = []
    for step, again in zip(first.steps, second.steps, strict=True):
        varies = False
        for a, b in zip(_leaves(step), _leaves(again), strict=True):
            if isinstance(a, Value):
                _pair(a, b, values)
            else:
                varies |= a != b
        steps.append(Step(step.op, step.arguments, step.results, varies))
    return Trace(tuple(steps), first.tiles, first.outputs)


def _leaves(step: Step) -> list[Any]:
    return tree_leaves((dict(step.arguments), step.results))


def _form(traced: Trace) -> list[Any]:
    """What two traces need to have in common to be compared at all."""
    values = [[len(v.shape) if isinstance(v, Value) else -1 for v in _leaves(step)] for step in traced.steps]
    return [[step.op for step in traced.steps], values, [len(one.shape) for one in traced.outputs]]


def _pair(one: Value, other: Value, values: dict[Value, Value]) -> None:
    if values.setdefault(one, other) is not other or one.weight != other.weight:
        raise NotPortableError("its steps are others for tiles of another size")
    if one.known is not None and (other.known is None or not torch.equal(one.known, other.known)):
        raise NotPortableError("its constants are others for tiles of another size")
    one.sizes = (one.sizes[0], other.sizes[0])


class _Recorder(TorchDispatchMode):
    """Sees every operator that torch is about to run. Tensors are known by their identity, and so kept."""

    def __init__(self, network: nn.Module, integers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._kept: list[Tensor] = []
        self._values: dict[int, Value] = {}
        # Tensors that are computed here, and how often the memory of the others was written to.
        self._known: dict[int, Tensor] = {}
        self._writes: dict[int, int] = {}
        self._written: dict[int, int] = {}
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.is_floating_point():
                self.add(tensor, name)
            elif name in integers:
                self._keep(tensor)
                self._known[id(tensor)] = integers[name].clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotPortableError(f"there is no operator for {op}")
        arguments = _bound(func, args, kwargs or {})
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        for tensor in tensors:
            if id(tensor) not in self._known and id(tensor) not in self._values:
                self._take(tensor)
        in_place = func._schema.is_mutable and func._schema.name.endswith("_")
        if all(id(t) in self._known for t in tensors):
            # A view of something known is written to in earnest, too.
            out = self._compute(func, arguments, [] if in_place else tensors)
            if out is not None:
                return out
        described = tree_map_only(Tensor, self.value, arguments)
        if in_place:
            target = tensors[0]
            self._known.pop(id(target), None)
            self._writes[_memory(target)] = self._writes.get(_memory(target), 0) + 1
            self.steps.append(Step(op[:-1], described, (self.add(target),)))
            return target
        if func._schema.is_mutable:
            raise NotPortableError(f"there is no operator for {op} that writes over what it is given")
        out = _outcome(func, arguments)
        self.steps.append(Step(op, described, tuple(self.add(t) for t in tree_leaves(out) if isinstance(t, Tensor))))
        return out

    def add(self, tensor: Tensor, weight: str = "") -> Value:
        """A new value for a tensor."""
        self._keep(tensor)
        value = self._values[id(tensor)] = Value((tuple(tensor.shape),), tensor.dtype, weight)
        self._written[id(tensor)] = self._writes.get(_memory(tensor), 0)
        return value

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor as it now is."""
        if id(tensor) in self._known:
            known = self._known[id(tensor)].clone()
            return Value((tuple(known.shape),), known.dtype, known=known)
        if self._written[id(tensor)] != self._writes.get(_memory(tensor), 0):
            raise NotPortableError("it writes over a tensor of which it uses another view")
        return self._values[id(tensor)]

    def _compute(self, func: Any, arguments: dict[str, Any], tensors: list[Tensor]) -> Any:
        """What an operator makes of known tensors, unless that is too large; ``tensors`` is what it does not
        write to."""
        gives = any("Tensor" in str(one.type) for one in func._schema.returns)
        if gives and not func._schema.is_mutable:
            shapes = [t.shape for t in tree_leaves(_outcome(func, arguments)) if isinstance(t, Tensor)]
            size = max((math.prod(shape) for shape in shapes), default=0)
            if size > (max(_SMALL, *(2 * t.numel() for t in tensors)) if tensors else _MOST):
                return None
        out = func(**_placed(arguments, "cpu", lambda t: self._known[id(t)]))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._keep(tensor)
                self._known[id(tensor)] = tensor
        return out

    def _take(self, tensor: Tensor) -> None:
        """A tensor that is no result of any step: the code's own constant."""
        if tensor.is_meta:
            raise NotPortableError("it uses a tensor whose values are not known")
        self._keep(tensor)
        self._known[id(tensor)] = tensor

    def _keep(self, tensor: Tensor) -> None:
        self._kept.append(tensor)


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, those that were left out at their defaults."""
    schema = func._schema.arguments
    given = {**{one.name: value for one, value in zip(schema, args, strict=False)}, **kwargs}
    return {one.name: given.get(one.name, one.default_value) for one in schema}


def _outcome(func: Any, arguments: dict[str, Any]) -> Any:
    """What an operator gives, without values. A norm gives what it takes, which torch takes seconds to find out."""
    if func._schema.name in _NORMS:
        return torch.empty_like(arguments["input"], device="meta"), *(torch.empty(0, device="meta") for _ in range(2))
    return func(**_placed(arguments, "meta", lambda t: t if t.is_meta else t.to("meta")))


def _placed(arguments: dict[str, Any], device: str, place: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Arguments of which all tensors, and those to come, are on one device."""
    placed = tree_map_only(Tensor, place, arguments)
    return {name: torch.device(device) if name == "device" else value for name, value in placed.items()}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

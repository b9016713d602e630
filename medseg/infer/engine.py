"""What runs the networks: one small interface, whatever computes behind it."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medseg.core.alone import import_alone
from medseg.core.errors import InputError, MedsegError
from medseg.core.gpu import GPU_MARKS as _GPU_MARKS
from medseg.models.build import build, split_head
from medseg.models.onnx_file import read
from medseg.models.package import ModelPackage, StoredWeights
from medseg.models.parts import FEATURES, Part
from medseg.models.portable import head_of, splits
from medseg.plan.plan import Configuration

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from medseg.infer.detector import GraphDetector, Run
    from medseg.models.mask_rcnn import Detections, Detector

Float32 = NDArray[np.float32]
# Arrays live where the engine computes: numpy's, or torch's on a GPU. Both are indexed, added and
# multiplied alike, and the code that adds tiles up does no more than that.
Array = Any

ENGINES = ("auto", "torch-cuda", "torch-cpu", "openvino")
# An engine with a label whose Dice with torch in float32 was below this is not chosen by itself.
LEAST_DICE = 0.999
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class Head:
    """A network's last convolution, left to the end: logits (K, ...) are ``weight`` (K, F) times
    features (F, ...) plus ``bias`` (K,). Being linear, it may follow any weighted mean over tiles."""

    weight: Float32
    bias: Float32

    def apply(self, features: Float32) -> Float32:
        """Logits (K, ...) of features (F, ...)."""
        flat = self.weight @ features.reshape(features.shape[0], -1)
        flat += self.bias[:, None]
        out: Float32 = flat.reshape(-1, *features.shape[1:])
        return out


@dataclass(frozen=True, eq=False)
class Found:
    """The N things that a network finds in a tile: ``boxes`` (N, 2, 3), the low and the high corner in voxels of
    the tile, where voxel i reaches from i to i + 1; ``scores`` (N,) from 0 to 1; ``classes`` (N,) from 1 on; and
    ``masks`` (N, x, y, z), the probability at the middle of each bin of a box that it belongs to the thing."""

    boxes: Float32
    scores: Float32
    classes: NDArray[np.int64]
    masks: Float32


class Engine(Protocol):
    """A model that is ready to run on tiles of its configuration's patch.

    ``outputs`` counts the classes, or, where there is a ``head``, the features that it makes classes
    of. Small tiles are best run together, as many as hold ``at_once`` voxels. ``precision`` is f32, bf16
    or f16; ``notes`` says what a person should know of how it went. ``found`` is what each member found
    in each of the tiles last run, where the model counts things; in mirrored copies none are looked for.
    """

    name: str
    at_once: int
    precision: str
    outputs: int
    head: Head | None
    notes: list[str]
    found: list[list[Found]]

    def run(self, tiles: Float32) -> Array:
        """Logits, or features, (B, outputs, X, Y, Z), float32, of tiles (B, channels, X, Y, Z): the
        mean over the model's members and, for each, over its mirrored copies. A 2D model takes and
        gives tiles one voxel thick along its slice axis."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Float32 zeros where `run` leaves its results."""

    def array(self, values: Float32) -> Array:
        """Values put where `run` leaves its results."""

    def numpy(self, values: Array) -> Float32:
        """Values brought back."""


def open_engine(
    package: ModelPackage,
    name: str = "auto",
    threads: int | None = None,
    mirror: tuple[int, ...] = (),
    precision: str | None = None,
) -> Engine:
    """A package's networks, ready to run.

    ``name`` is one of `ENGINES`; auto takes a GPU where torch sees one, else OpenVINO where the
    package has its networks as ONNX, OpenVINO is there and, as far as the package knows, gives the
    labels that torch gives, else torch. ``threads`` counts the cores to use, all unless given;
    ``precision`` (f32, bf16, and f16 on a GPU) is the engine's own choice unless given.
    Raises InputError where the engine is not to be had, or the weights do not fit the plan.
    """
    if name not in ENGINES:
        raise InputError(f"no engine is called {name!r}", f"Say {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    if name == "auto":
        name = _choose(package)
    if name == "openvino":
        return OpenVinoEngine(package, threads, mirror, precision)
    import torch

    if name == "torch-cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no GPU", "Use a processor, or install a torch built for this GPU's driver")
    if name == "torch-cpu" and threads is not None:
        torch.set_num_threads(threads)
    device = torch.device(name.removeprefix("torch-"))
    return TorchEngine(_networks(package, device), package.configuration, package.classes, device, mirror, precision)


class TorchEngine:
    """Networks in torch, on a CPU or a GPU. ``mirror`` lists the axes (0 x, 1 y, 2 z) along which
    mirrored copies are averaged, in every combination. Where a GPU's memory does not hold a batch,
    smaller ones are taken from then on, and ``notes`` says so; where it does not hold one tile,
    `run` raises MedsegError.

    On a GPU it computes in half the precision; so it does on processors made for that, where others
    would only pretend to, and be slower. ``precision`` (f32, bf16, f16) says otherwise.
    """

    at_once = 2**18

    def __init__(
        self,
        networks: list[nn.Module],
        configuration: Configuration,
        outputs: int,
        device: torch.device,
        mirror: tuple[int, ...] = (),
        precision: str | None = None,
    ) -> None:
        self.name = f"torch-{device.type}"
        self.precision = precision or torch_precision(device)
        self.notes: list[str] = []
        self.found: list[list[Found]] = []
        self._networks, self.head = _split(networks, outputs)
        self.outputs = self.head.weight.shape[1] if self.head else outputs
        self._device = device
        self._flat = configuration.slice_axis
        self._flips = flips(mirror)
        self._most = sys.maxsize

    def run(self, tiles: Float32) -> torch.Tensor:
        """See `Engine`."""
        import torch

        parts: list[torch.Tensor] = []
        self.found = []
        done = 0
        while done < len(tiles):
            count = min(self._most, len(tiles) - done)
            try:
                parts.append(self._run(tiles[done : done + count]))
                done += count
            except torch.OutOfMemoryError:
                self._fewer(count)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _fewer(self, count: int) -> None:
        import torch

        if count == 1:
            raise MedsegError(
                "the GPU's memory does not hold a single tile. Free some of it, or run the model on the processor."
            ) from None
        self._most = count // 2
        if not self.notes:
            self.notes.append("the GPU's memory did not hold a whole batch of tiles; smaller ones were taken")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, tiles: Float32) -> torch.Tensor:
        import torch

        images = torch.from_numpy(np.ascontiguousarray(tiles)).to(self._device)
        half = torch.float16 if self.precision == "f16" else torch.bfloat16
        total: Any = None
        found: list[list[Found]] = [[] for _ in tiles]
        # Not inference_mode, whose tensors could not be added up in place later.
        with torch.no_grad(), torch.autocast(self._device.type, half, enabled=self.precision != "f32"):
            for flip in self._flips:
                turned = images.flip([2 + a for a in flip]) if flip else images
                out = self._members(turned, None if flip else found)
                out = out.flip([2 + a for a in flip]) if flip else out
                total = out if total is None else total.add_(out)
        self.found += found  # after all that may run out of memory, and be tried again
        count = len(self._flips)
        return total if count == 1 else total.div_(count)

    def _members(self, images: torch.Tensor, found: list[list[Found]] | None) -> torch.Tensor:
        """The members' mean, or, where the head is left to the end, their features side by side. What they find
        in each image goes to ``found``, unless it is not asked for."""
        import torch

        if self.head:
            return torch.cat([self._forward(network, images, found) for network in self._networks], dim=1)
        total = self._forward(self._networks[0], images, found)
        for network in self._networks[1:]:
            total = total.add_(self._forward(network, images, found))
        return total if len(self._networks) == 1 else total.div_(len(self._networks))

    def _forward(self, network: nn.Module, images: torch.Tensor, found: list[list[Found]] | None) -> torch.Tensor:
        flat = images if self._flat is None else images.squeeze(2 + self._flat)
        made: Any = network
        out = _looked(made, flat, found, self._flat) if hasattr(network, "detections") else network(flat)
        return out.float() if self._flat is None else out.float().unsqueeze(2 + self._flat)

    def zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """See `Engine`."""
        import torch

        return torch.zeros(shape, device=self._device)

    def array(self, values: Float32) -> torch.Tensor:
        """See `Engine`."""
        import torch

        return torch.from_numpy(values).to(self._device)

    def numpy(self, values: torch.Tensor) -> Float32:
        """See `Engine`."""
        out: Float32 = values.cpu().numpy()
        return out


def _looked(network: Detector, images: torch.Tensor, found: list[list[Found]] | None, flat: int | None) -> torch.Tensor:
    """Semantic logits of images; what is found in each goes to ``found``, unless it is not asked for."""
    proposals = network.propose(images)
    if found is not None:
        for own, one in zip(found, network.detections(proposals), strict=True):
            own.append(_placed(one, flat))
    return proposals.semantic


def _placed(found: Detections, flat: int | None) -> Found:
    """What was found, as arrays and along three axes: of a 2D network along ``flat``, too, one voxel thick."""
    boxes = found.boxes.float().cpu().numpy()
    boxes = boxes.reshape(len(boxes), 2, boxes.shape[1] // 2)
    masks = found.masks.float().cpu().numpy()
    if flat is not None:
        boxes = np.insert(boxes, flat, np.array([0, 1], dtype=np.float32), axis=2)
        masks = np.expand_dims(masks, 1 + flat)
    return Found(boxes, found.scores.float().cpu().numpy(), found.classes.cpu().numpy(), masks)


class OpenVinoEngine:
    """Networks in OpenVINO, on the processor; neither torch nor monai is imported, but for a model that counts
    things: what lies between its graphs is torch's.

    ``precision``, f32 or bf16, is bf16 where the processor has instructions for it and the package
    does not record that labels suffer. Raises InputError where the package has no ONNX files or
    OpenVINO is not installed.
    """

    name = "openvino"
    # More take no less time, and memory is kept for the largest batch that was seen (benchmarks/predict/README.md).
    at_once = 2**16

    def __init__(
        self,
        package: ModelPackage,
        threads: int | None = None,
        mirror: tuple[int, ...] = (),
        precision: str | None = None,
    ) -> None:
        if not package.graphs:
            reason = package.not_portable or "it was made without"
            raise InputError(f"{package.name} has no ONNX files ({reason})", "Use another engine, or save it anew")
        openvino, core = import_openvino(), openvino_core()
        self.precision = precision or _openvino_precision(core, package)
        self.notes: list[str] = []
        self.found: list[list[Found]] = []
        self._flat = package.configuration.slice_axis
        self._flips = flips(mirror)
        self.head = _stored_head(package)
        self.outputs = self.head.weight.shape[1] if self.head else package.classes
        options = {
            # One stream: a tile is shared by all threads, so that only one tile's arrays are held.
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0)),
            "INFERENCE_PRECISION_HINT": self.precision,
            # Threads bound to cores wait for whatever else runs on these.
            "ENABLE_CPU_PINNING": False,
        }
        parts = package.parts

        def opened(path: Path, part: Part) -> Run:
            model = core.read_model(path)
            wanted = [FEATURES] if self.head else [port.name for port in part.gives]
            results = [model.output(name).get_node() for name in wanted]
            model = openvino.Model(results, model.get_parameters(), path.stem)
            model.reshape(openvino.PartialShape([-1, *part.takes.shape[1:]]))
            request = core.compile_model(model, "CPU", options).create_infer_request()
            return lambda values: list(request.infer({0: values}, share_inputs=True, share_outputs=True).values())

        try:
            graphs = [opened(path, part) for path, part in zip(package.graphs, cycle(parts), strict=False)]
        except RuntimeError:
            raise InputError(
                f"OpenVINO cannot open the networks of {package.name}",
                "Use --engine torch-cpu, or get the package again",
            ) from None
        self._networks: Sequence[Run | GraphDetector] = graphs
        if not parts[0].whole:
            self._networks = _detectors(package.configuration, graphs, len(parts), threads)

    def run(self, tiles: Float32) -> Float32:
        """See `Engine`."""
        total: Any = None
        self.found = [[] for _ in tiles]
        for flip in self._flips:
            axes = tuple(2 + a for a in flip)
            out = self._members(np.flip(tiles, axes) if flip else tiles, None if flip else self.found)
            out = np.flip(out, axes) if flip else out
            total = out if total is None else np.add(total, out, out=total)
        if len(self._flips) > 1:
            total /= len(self._flips)
        return total

    def _members(self, tiles: Float32, found: list[list[Found]] | None) -> Float32:
        """The members' mean, or, where the head is left to the end, their features side by side. What they find
        as in `TorchEngine`. Always new memory: OpenVINO writes the next result over the last."""
        images = np.ascontiguousarray(tiles if self._flat is None else tiles.squeeze(2 + self._flat), np.float32)
        outs = (self._forward(network, images, found) for network in self._networks)
        total: Float32
        if self.head and len(self._networks) > 1:
            total = np.concatenate(list(outs), axis=1)
        else:
            total = next(outs).copy()
            for out in outs:
                total += out
            if len(self._networks) > 1:
                total /= len(self._networks)
        return total if self._flat is None else np.expand_dims(total, 2 + self._flat)

    def _forward(self, network: Run | GraphDetector, images: Float32, found: list[list[Found]] | None) -> Float32:
        if callable(network):
            return network(images)[0]
        import torch

        out: Float32 = _looked(network, torch.from_numpy(images), found, self._flat).numpy()
        return out

    def zeros(self, shape: tuple[int, ...]) -> Float32:
        """See `Engine`."""
        return np.zeros(shape, dtype=np.float32)

    def array(self, values: Float32) -> Float32:
        """See `Engine`."""
        return values

    def numpy(self, values: Float32) -> Float32:
        """See `Engine`."""
        return values


def _detectors(configuration: Configuration, graphs: list[Run], parts: int, threads: int | None) -> list[GraphDetector]:
    """Of so many graphs each, a member."""
    import torch

    from medseg.infer.detector import GraphDetector

    if threads is not None:
        torch.set_num_threads(threads)
    return [GraphDetector(configuration, *graphs[n : n + parts]) for n in range(0, len(graphs), parts)]


def pick_device(name: str) -> Any:
    """A torch device: the one named, or for "auto" the GPU where there is one.

    Raises InputError where a GPU is asked for and torch sees none.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no GPU", "Use --device cpu, or install a torch built for this GPU's driver")
    if name not in ("cpu", "cuda"):
        raise InputError(f"no device is called {name!r}", "Say auto, cpu or cuda")
    return torch.device(name)


def import_openvino() -> Any:
    """OpenVINO, without what it would send.

    On being imported, its model converter reports that to Google Analytics, and leaves a number for
    this user in the home folder, unless it finds no openvino_telemetry: then it says nothing, by its
    own design. It is made not to find it, and the converter, which nobody here needs, is passed over.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_alone("openvino", "openvino.tools.ovc")
    except ImportError:
        raise InputError("OpenVINO is not installed", "Use --engine torch-cpu, or pip install openvino") from None


def has_openvino() -> bool:
    """Whether OpenVINO is installed; it is not made for every processor."""
    return importlib.util.find_spec("openvino") is not None


@functools.cache
def openvino_core() -> Any:
    """The one core of this process, which is never let go of.

    Each that is made gives the thread a stack for signals, and takes it away in the end; of two that overlap
    the older one takes away what the younger one puts back. Then the next signal ends the process, since
    Python's handlers run on that stack. Raises InputError where OpenVINO is not installed.
    """
    return import_openvino().Core()


def flips(mirror: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Every set of the axes, the empty one first: (0, 1) gives (), (0,), (1,), (0, 1)."""
    return tuple(chain.from_iterable(combinations(mirror, n) for n in range(len(mirror) + 1)))


def _choose(package: ModelPackage) -> str:
    if any(Path(mark).exists() for mark in _GPU_MARKS):
        import torch

        if torch.cuda.is_available():
            return "torch-cuda"
    return "openvino" if package.graphs and has_openvino() and _agrees(package, "openvino-f32") else "torch-cpu"


def _agrees(package: ModelPackage, engine: str) -> bool:
    """Whether the package does not know better."""
    return engine not in package.engines or package.engines[engine].least_dice >= LEAST_DICE


def _networks(package: ModelPackage, device: torch.device) -> list[nn.Module]:
    networks = []
    for weights in package.members:
        network = build(package.configuration, package.channels, package.classes)
        try:
            network.load_state_dict(weights)
        except RuntimeError:
            raise InputError(
                f"the weights of {package.name} do not fit its plan", "Get the package again, or train it anew"
            ) from None
        networks.append(network.to(device).eval())
    return networks


def _split(networks: list[nn.Module], classes: int) -> tuple[list[nn.Module], Head | None]:
    """The networks, without their heads where `splits` says so."""
    parts = [part for part in map(split_head, networks) if part is not None]
    features = sum(weight.shape[1] for _, weight, _ in parts)
    if len(parts) < len(networks) or not splits(classes, features):
        return networks, None
    arrays = [(weight.float().cpu().numpy(), bias.float().cpu().numpy()) for _, weight, bias in parts]
    return [body for body, _, _ in parts], _joined(arrays)


def _joined(heads: list[tuple[Float32, Float32]]) -> Head:
    """The mean of several heads, each of which takes features of its own: one head of them all."""
    weight = np.concatenate([weight for weight, _ in heads], axis=1) / np.float32(len(heads))
    bias = np.stack([bias for _, bias in heads]).mean(axis=0)
    return Head(weight.astype(np.float32), bias.astype(np.float32))


def _stored_head(package: ModelPackage) -> Head | None:
    """As `_split`, from files."""
    from safetensors import safe_open

    try:
        graphs = [read(path.read_bytes()) for path in package.graphs]
    except (OSError, ValueError):
        raise InputError(f"the files of {package.name} are not what they were", "Get the package again") from None
    if any(graph.outputs[-1].name != FEATURES for graph in graphs):
        return None
    if not splits(package.classes, sum(int(graph.outputs[1].shape[1]) for graph in graphs)):
        return None
    heads = []
    for member, graph in zip(package.members, graphs, strict=True):
        if not isinstance(member, StoredWeights):
            return None  # not so in a package that was loaded
        with safe_open(member.path, framework="np") as file:
            weight, bias = (file.get_tensor(name).astype(np.float32) for name in head_of(graph))
        heads.append((weight.reshape(weight.shape[0], -1), bias))
    return _joined(heads)


@cache
def torch_precision(device: torch.device) -> str:
    """The fastest of f32, bf16 and f16 that a device has instructions for. Where it has to pretend, as
    processors without AVX-512's or AMX's bf16, half the precision takes many times as long."""
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "f16"
    return "bf16" if processor_has_bf16() else "f32"


def processor_has_bf16() -> bool:
    """Whether the processor computes in bfloat16, and need not pretend."""
    return bool(_BF16_FLAGS & processor_flags())


def _openvino_precision(core: Any, package: ModelPackage) -> str:
    able = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    known = "openvino-bf16" in package.engines  # on models of nnU-Net it turned up to 0.5 % of the voxels
    return "bf16" if able and known and _agrees(package, "openvino-bf16") else "f32"


def processor_flags() -> frozenset[str]:
    """What Linux says that the processor can do; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())

"""What one training step takes on this machine, measured and not reckoned.

Each measurement runs in a process of its own, so that memory is that step's alone, and one that the
system ends for taking too much ends nothing else. torch is loaded in those processes only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from medseg.core.memory import resident_memory
from medseg.core.provenance import processor_name
from medseg.plan.cost import DoesNotFitError, Step
from medseg.plan.plan import Configuration

if TYPE_CHECKING:
    import torch

R = TypeVar("R")

# So many steps at the least and most, and between those as many as fit the time; the first third of them
# only warms up, since buffers and kernels are chosen in them.
_FEWEST, _MOST, _SECONDS = 4, 15, 3.0
# Loaded once, in the process from which those that measure are forked.
_PRELOAD = ["medseg.train.loop", "medseg.models.unet"]


@dataclass(frozen=True)
class Gpu:
    """The GPU that networks would be trained on: its name, its bytes of memory, and whether it computes
    in bfloat16."""

    name: str
    memory_bytes: int
    half: bool


def find_gpu() -> Gpu:
    """The GPU of this machine. Raises InputError where torch sees none."""
    return _alone(_find_gpu)


def measure_step(configuration: Configuration, channels: int, classes: int, *, kind: str, threads: int) -> Step:
    """The median of some training steps of a fresh network on random patches (classes as well, or a few boxes of
    them where things are counted), and the most memory held:
    network, average, optimiser and all that a step keeps.

    ``kind`` is ``cpu`` or ``cuda``; ``threads`` are the cores that it may use. Raises DoesNotFitError
    where the machine has not the memory, InputError where torch sees no GPU.
    """
    # As text: the plan's models are made of generic types, which cannot be pickled.
    return _alone(_measure, configuration.model_dump_json(), channels, classes, kind, threads)


def _alone(function: Callable[..., R], *arguments: Any) -> R:
    """The function's result, from a process that has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise _does_not_fit("the process that measured it was ended, as happens where memory runs out") from None


def _does_not_fit(why: str) -> DoesNotFitError:
    return DoesNotFitError(f"a training step does not fit this machine: {why}", "Plan for less memory")


def _find_gpu() -> Gpu:
    import torch

    from medseg.infer.engine import pick_device, torch_precision

    device = pick_device("cuda")
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, properties.total_memory, torch_precision(device) != "f32")


def _measure(written: str, channels: int, classes: int, kind: str, threads: int) -> Step:
    import torch

    from medseg.infer.engine import pick_device

    configuration = Configuration.model_validate_json(written)
    device = pick_device(kind)
    torch.set_num_threads(threads)
    # The code that a step runs takes memory itself, once, whatever the patch: a tiny step calls it in.
    small = [
        max(1, min(p, 2 * d))
        for p, d in zip(configuration.patch.value, configuration.network.value.divisor, strict=True)
    ]
    try:
        _steps(configuration, channels, classes, device, small, batch=1, most=1)
        _forget_peak(device)
        before = resident_memory()
        seconds = _steps(
            configuration, channels, classes, device, configuration.patch.value, configuration.batch.value, _MOST
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise _does_not_fit("its memory ran out") from None
    except RuntimeError as error:
        # What torch says where a processor's memory cannot be had.
        if "allocate" not in str(error):
            raise
        raise _does_not_fit("its memory ran out") from None
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        name, peak = processor_name(), resident_memory(most=True) - before
    return Step(statistics.median(seconds[len(seconds) // 3 :]), max(0, peak), name, threads)


def _steps(
    configuration: Configuration,
    channels: int,
    classes: int,
    device: torch.device,
    patch: Sequence[int],
    batch: int,
    most: int,
) -> list[float]:
    """Seconds of each step of a fresh network."""
    import copy

    import torch

    from medseg.models.build import build
    from medseg.train.loop import train_step
    from medseg.train.loss import by_family, dice_cross_entropy

    torch.manual_seed(0)
    network = build(configuration, channels, classes).to(device)
    average = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    loss = by_family(configuration, dice_cross_entropy)
    counted = configuration.network.value.counts
    shape = [p for axis, p in enumerate(patch) if axis != configuration.slice_axis]
    seconds: list[float] = []
    while len(seconds) < min(most, _FEWEST) or (len(seconds) < most and sum(seconds) < _SECONDS):
        # Anew each time, as a run does, which holds the next batch too.
        images = torch.randn((batch, channels, *shape)).to(device)
        targets = _things(classes, batch, shape) if counted else torch.randint(0, classes, (batch, *shape))
        targets = targets.to(device)
        begun = time.perf_counter()
        train_step(network, optimiser, images, targets, loss)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    del average
    return seconds


def _things(classes: int, batch: int, shape: Sequence[int]) -> torch.Tensor:
    """Targets (B, *shape) in which there are two cuboids of each class but the background, a fifth as long as
    the patch."""
    import torch

    targets = torch.zeros((batch, *shape), dtype=torch.int64)
    for one in targets:
        for number in 2 * list(range(1, classes)):
            sides = [max(1, n // 5) for n in shape]
            low = [int(torch.randint(0, n - side + 1, ())) for n, side in zip(shape, sides, strict=True)]
            one[tuple(slice(a, a + side) for a, side in zip(low, sides, strict=True))] = number
    return targets


def _forget_peak(device: torch.device) -> None:
    """From here on the most memory held is counted anew."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # A kernel that does not let it leaves the peak of the tiny step, which the whole one goes beyond.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

"""The batch of each step, and threads that make batches before they are needed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.core.errors import InputError
from medseg.core.instances import parted
from medseg.core.memory import free_memory
from medseg.infer.engine import torch_precision
from medseg.io.store import StoredCase
from medseg.plan.cost import FEEDERS, Kind, estimate, feed_bytes
from medseg.plan.plan import Configuration, Plan
from medseg.train.augment import Variation, change, draw, mistaken, move, reach
from medseg.train.loss import IGNORED, plain
from medseg.train.ranks import ALONE, Ranks
from medseg.train.sample import Place, draw_case, draw_place, holders

T = TypeVar("T")
# Of the memory that training will leave free so much may hold cases; the rest is for predictions of held-out
# cases, and for what is reckoned amiss.
_SHARE = 0.5
# How long closing waits for threads that a disk holds up.
_PATIENCE = 5.0
_UNKNOWN = -2
_REMEDY = "Run `medseg preprocess` again"


class Batches:
    """The batch of each step: called with its number, from any thread, in any order.

    A batch depends on the seed and the step alone; each of several ``ranks`` makes its share of it.
    Cases are kept on the device once they are read where all of them fit into half of what training leaves
    free there, else in memory, else read in part each time; they may take a share ``room`` of that. Of unlabelled cases
    every voxel's class is `IGNORED`. Of a network that counts a voxel's class is class + outputs x number of its thing,
    0 where that is not known. Of a second stage the last channels are what the first found: they are moved with the
    classes, and given mistakes where the others' intensities are changed.
    """

    def __init__(
        self,
        plan: Plan,
        configuration: Configuration,
        cases: Sequence[StoredCase],
        seed: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        room: float = 1.0,
    ) -> None:
        self.plan, self.configuration, self.cases, self.seed, self.device = plan, configuration, cases, seed, device
        self.share, self._rank = ranks.share(configuration.batch.value), ranks.rank
        self._channels, self._inputs = len(plan.channels), plan.inputs(configuration)
        self._holders = holders(cases)
        self._class_of = _classes(plan)
        self._counts = configuration.network.value.counts
        self._as_they_are = np.array_equal(self._class_of[:-1], np.arange(len(self._class_of) - 1))
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        size = sum(case.image.nbytes + 2 * math.prod(case.shape) for case in cases)
        takes = _training_bytes(plan, configuration, len(self.share), device)
        on_gpu, in_ram = takes if device.type == "cuda" else 0, takes if device.type == "cpu" else 0
        left = torch.cuda.mem_get_info(device)[0] - on_gpu if device.type == "cuda" else 0
        self._on_device = size <= room * _SHARE * left
        self._keep = self._on_device or size <= room * _SHARE * (free_memory() - in_ram)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, *patch) float32 and classes (B, *patch) int64, `IGNORED` where the plan ignores
        a label; 2D patches without their slice axis. Raises InputError naming a case that cannot be
        read or that holds a label which the plan does not know."""
        images, classes, variations = self.moved(step)
        return self.changed(step, images, classes, variations), classes

    def moved(self, step: int) -> tuple[Tensor, Tensor, list[Variation]]:
        """The batch before its intensities are changed, and how they are to be."""
        batch, flat = self.configuration.batch.value, self.configuration.slice_axis
        drawn = [self._draw(step * batch + i) for i in self.share]
        variations = [variation for _, variation in drawn]
        images, classes, middles = self._boxes(drawn)
        if flat is not None:
            images, classes = images.squeeze(2 + flat), classes.squeeze(1 + flat)
        images, classes = (values.to(self.device, non_blocking=True) for values in (images, classes))
        masks = self._inputs - self._channels
        return *move(images, classes, middles, variations, self.configuration, masks), variations

    def changed(self, step: int, images: Tensor, classes: Tensor, variations: list[Variation]) -> Tensor:
        """What `moved` gave with its intensities changed, in place."""
        noise = int(np.random.default_rng([self.seed, 2, step, self._rank]).integers(2**62))
        if self._counts:
            classes = plain(classes, self.plan.outputs)
        if self._inputs == self._channels:
            return change(images, classes, variations, self.configuration, noise)
        scan = images[:, : self._channels].contiguous()
        images[:, : self._channels] = change(scan, classes, variations, self.configuration, noise)
        for image, variation in zip(images, variations, strict=True):
            if variation.mistakes is not None:
                mistaken(image[self._channels :], variation.mistakes, self.configuration)
        return images

    def _draw(self, number: int) -> tuple[Place, Variation]:
        rng = np.random.default_rng([self.seed, 0, number])
        training = self.plan.training
        place = draw_place(
            rng,
            self.cases,
            draw_case(self.seed, number, len(self.cases)),
            self.configuration.patch.value,
            training.foreground_share.value,
            of_class=self._holders,
            class_share=training.class_share,
        )
        return place, draw(rng, self.plan, self.configuration)

    def _boxes(self, drawn: list[tuple[Place, Variation]]) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
        """Of each patch the box of its case that it sees, all of one size, zeros outside of the case:
        (B, C, *box), (B, *box), and where the patch's middle lies in it (B, 3)."""
        centres = np.array([place.centre for place, _ in drawn])
        reaches = np.array([reach(variation, self.configuration.patch.value) for _, variation in drawn])
        # Nothing of the patch lies outside but by rounding, and weighs as little.
        lows = np.floor(centres - reaches + 1e-6).astype(int)
        shape = (np.ceil(centres + reaches - 1e-6).astype(int) - lows).max(axis=0) + 1
        device = self.device if self._on_device else torch.device("cpu")
        # From pinned memory a GPU fetches by itself, while this thread goes on.
        pinned = self.device.type == "cuda" and not self._on_device
        images = torch.zeros((len(drawn), self._inputs, *shape), dtype=torch.float16, device=device, pin_memory=pinned)
        classes = torch.zeros((len(drawn), *shape), dtype=torch.int16, device=device, pin_memory=pinned)
        for i, (place, _) in enumerate(drawn):
            self._fill(images[i], classes[i], place.case, lows[i], shape)
        return images, classes, centres - lows

    def _fill(
        self, image: Tensor, classes: Tensor, number: int, low: NDArray[np.int64], shape: NDArray[np.int64]
    ) -> None:
        """Copy the part of a case that lies within a box."""
        size = np.array(self.cases[number].shape)
        first, last = np.maximum(low, 0), np.minimum(low + shape, size)
        if (last <= first).any():
            return
        inside = tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
        outside = tuple(slice(int(a), int(b)) for a, b in zip(first - low, last - low, strict=True))
        values, numbers = self._part(number, inside)
        image[(slice(None), *outside)], classes[outside] = values, numbers

    def _part(self, number: int, box: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
        """A box of a case: its image (C, ...) and classes (...)."""
        if not self._keep:
            return self._read(number, box)
        if number not in self._kept:
            # Two threads may read a case at once, one of them in vain, which costs less than a lock.
            image, classes = self._read(number, (slice(None),) * 3)
            device = self.device if self._on_device else torch.device("cpu")
            self._kept[number] = image.to(device), classes.to(device)
        image, classes = self._kept[number]
        return image[(slice(None), *box)], classes[box]

    def _read(self, number: int, box: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
        case = self.cases[number]
        try:
            image = np.require(case.image[(slice(None), *box)], requirements="W")  # as torch wants it
            if case.labels is None:
                return torch.from_numpy(image), torch.tensor(IGNORED, dtype=torch.int16).expand(image.shape[1:])
            labels = np.asarray(case.labels[box])
        except (OSError, ValueError) as error:
            raise InputError(f"its preprocessed files cannot be read ({error})", _REMEDY, case=case.id) from None
        things = None
        if self._counts:
            labels, things = parted(labels, self.plan.thing_step)
        last = len(self._class_of) - 1
        if (
            things is None and self._as_they_are and labels.size and labels.max() < last
        ):  # no table, which takes thrice as long
            return torch.from_numpy(image), torch.from_numpy(labels.astype(np.int16))
        classes = self._class_of[np.minimum(labels.astype(np.intp), last)]
        if (classes == _UNKNOWN).any():
            strange = int(labels[classes == _UNKNOWN].min())
            raise InputError(f"it holds the label {strange}, which the plan does not know", _REMEDY, case=case.id)
        if things is not None:
            classes = np.where(classes > 0, classes + self.plan.outputs * things, classes).astype(np.int16)
        return torch.from_numpy(image), torch.from_numpy(classes)


def _training_bytes(plan: Plan, configuration: Configuration, batch: int, device: torch.device) -> int:
    """What steps of so many patches, and the batches made ahead of them, will take of a device that holds
    nothing yet; beside a teacher there are twice as many."""
    patches = configuration.batch.model_copy(update={"value": batch * (2 if plan.training.consistency else 1)})
    own, kind, inputs = configuration.model_copy(update={"batch": patches}), _kind(device), plan.inputs(configuration)
    half = torch_precision(device) != "f32"
    step = estimate(own, inputs, plan.outputs, kind=kind, half=half).memory_bytes
    return step + feed_bytes(own, inputs, kind)


def _kind(device: torch.device) -> Kind:
    return "gpu" if device.type == "cuda" else "cpu"


def _classes(plan: Plan) -> NDArray[np.int16]:
    """The class of each label number; the last entry stands for all larger ones, unknown like some smaller."""
    numbers = [0, *plan.label_set.numbers]
    ignored = plan.training.ignore_label
    table = np.full(max(*numbers, ignored or 0) + 2, _UNKNOWN, dtype=np.int16)
    table[numbers] = np.arange(len(numbers))
    if ignored is not None:
        table[ignored] = IGNORED
    return table


class Feed(Generic[T]):
    """Batches one after the other from ``first`` on, made by threads that run ahead.

        with Feed(batches, first_step) as feed:
            images, targets = next(feed)

    ``make`` is called with the number of each step, at most ``ahead`` steps before it is asked for.
    What it raises, `next` raises at that step. Closing drops what was not asked for, and waits for
    what is being made, though not for ever: a disk may not answer.
    """

    def __init__(
        self, make: Callable[[int], T], first: int = 0, *, threads: int | None = None, ahead: int | None = None
    ) -> None:
        threads = threads or FEEDERS[_kind(getattr(make, "device", torch.device("cpu")))]
        self._make, self._next, self._ahead, self._closed = make, first, ahead or threads + 1, False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="feed")
        self._upcoming: deque[Future[T]] = deque()
        self._go_on()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next step's batch; StopIteration once the feed is closed."""
        if self._closed:
            raise StopIteration
        batch = self._upcoming.popleft()
        self._go_on()
        return batch.result()

    def _go_on(self) -> None:
        while len(self._upcoming) < self._ahead:
            self._upcoming.append(self._pool.submit(self._make, self._next))
            self._next += 1

    def close(self) -> None:
        """Stop; twice is as good as once."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait([one for one in self._upcoming if not one.cancelled()], timeout=_PATIENCE)
        self._upcoming.clear()

    def __enter__(self) -> Feed[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

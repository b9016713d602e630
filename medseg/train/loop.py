"""A training run, read from top to bottom: data, model, optimiser, loop, package."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg.core.errors import InputError, MedsegError
from medseg.core.provenance import digest, versions
from medseg.core.volume import LabelMap, Volume
from medseg.evaluate.overlap import dice
from medseg.infer.engine import TorchEngine, pick_device, torch_precision
from medseg.infer.predict import segment
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore
from medseg.models.build import build
from medseg.models.package import ModelPackage
from medseg.plan.plan import Plan
from medseg.train.batches import Batches
from medseg.train.loss import supervised

_CHECKPOINT_SECONDS = 60.0
_VALIDATIONS = 10
_CLIP = 12.0
_EMA = 0.999
# Timed on a copy of the network before the run, to turn a budget into a number of steps.
_WARM, _TIMED = 3, 7
# A budget's number of steps is looked at anew every so many steps, by the mean time of the last fifth
# of the steps so far (of so many at least): a long run does not start at every passing disturbance.
_PACE = 10


@dataclass(frozen=True)
class Setup:
    """What a run is given besides its plan: which configuration and fold, and the options."""

    configuration: str
    fold: int
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    epochs: int | None = None
    budget_seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run is: for a progress bar."""

    step: int
    steps: int
    loss: float
    dice: float | None


def train(
    plan: Plan,
    setup: Setup,
    store: CaseStore,
    log: RunLog,
    *,
    validation: Sequence[tuple[str, Volume, LabelMap]] = (),
    progress: Callable[[Progress], None] | None = None,
) -> tuple[ModelPackage, tuple[dict[str, Any], ...]]:
    """Train one network, and give back the package with its averaged weights, and the run's log.

    Each run has a place of its own in ``log``, known by its plan, fold, cases, seed and length. It
    goes on from the checkpoint there, if any, and ends after ``setup.epochs``, or after as many
    steps as fit ``setup.budget_seconds``: their number is measured, and corrected where the machine
    turns slower or faster. The learning rate reaches zero at the end. ``validation`` cases are
    predicted now and then, by the same function that `predict` uses.

    Raises MedsegError where the loss is no longer a number.
    """
    torch.set_num_threads(setup.threads)
    device = pick_device(setup.device)
    configuration = plan.configuration(setup.configuration)
    if plan.regions or configuration.previous is not None:
        raise InputError("training for regions, or on another model's labels, is not done here", "Plan anew")
    store.require(plan.digest(), setup.configuration)
    cases = [store.read(case) for case in setup.train]
    if not cases:
        raise InputError(f"fold {setup.fold} has no case to train on", "Correct folds.json")

    torch.manual_seed(setup.seed)
    network = build(configuration, len(plan.channels), len(plan.labels) + 1).to(device)
    average = copy.deepcopy(network).eval()
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=plan.training.learning_rate.value, weight_decay=plan.training.weight_decay.value
    )
    batches = Batches(plan, configuration, cases, setup.seed, device)

    identity = {
        "format": 1,
        "plan": plan.digest(),
        "configuration": setup.configuration,
        "fold": setup.fold,
        "seed": setup.seed,
        "train": list(setup.train),
        "epochs": setup.epochs,
        "budget_seconds": setup.budget_seconds,
    }
    log = log.of(digest(identity)[:12])
    started = time.perf_counter()
    step, earlier, found = _resume(log, network, average, optimiser)
    length = found or Length([(0, _steps(plan, setup, network, batches, started))])
    checkpoint = time.perf_counter()
    recent: list[float] = []
    last_dice: float | None = None
    pace: list[float] = []
    validation_seconds = 0.0

    def save() -> None:
        seconds = earlier + time.perf_counter() - started
        log.save(
            _tensors(network, average, optimiser),
            {**identity, "step": step, "length": length.parts, "seconds": seconds},
        )

    with ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(batches, step)
        while step < length.steps:
            before = time.perf_counter()
            images, targets = upcoming.result()
            upcoming = ahead.submit(batches, step + 1)
            rate = plan.training.learning_rate.value * schedule(length.progress(step))
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = train_step(network, optimiser, images, targets)
            step += 1
            _average(average, network, step)
            recent.append(loss)
            if not math.isfinite(loss):
                raise MedsegError(
                    f"the loss is {loss} at step {step}; the last checkpoint is kept. "
                    "Lower the learning rate in plan.json and train again."
                )

            pace.append(time.perf_counter() - before)
            seconds = earlier + time.perf_counter() - started
            if setup.budget_seconds is not None and len(pace) % _PACE == 0 and step < length.steps:
                left = 0.99 * setup.budget_seconds - seconds - validation_seconds
                latest = pace[-max(_PACE, len(pace) // 5) :]
                length = length.corrected(step, step + max(1, int(left / float(np.mean(latest)))))
            ended = step == length.steps
            if step % plan.training.steps_per_epoch == 0 or ended:
                record: dict[str, Any] = {
                    "step": step,
                    "steps": length.steps,
                    "seconds": round(seconds, 2),
                    "loss": float(np.mean(recent)),
                    "learning_rate": rate,
                }
                recent = []
                if validation and (ended or _due(step, length.steps, plan.training.steps_per_epoch)):
                    before = time.perf_counter()
                    record |= validate(average, validation, plan, setup.configuration, device)
                    validation_seconds = time.perf_counter() - before
                    last_dice = record["dice"]
                log.write(record)
            if time.perf_counter() - checkpoint > _CHECKPOINT_SECONDS or ended:
                save()
                checkpoint = time.perf_counter()
            if progress:
                progress(Progress(step, length.steps, loss, last_dice))
        upcoming.cancel()
    records = tuple(log.records())
    log.close()
    package = ModelPackage(
        plan=plan,
        configuration_name=setup.configuration,
        members=({name: tensor.detach().cpu() for name, tensor in average.state_dict().items()},),
        trained_on=setup.train,
        held_out=setup.held_out,
        provenance={
            "versions": versions(),
            "seed": setup.seed,
            "fold": setup.fold,
            "device": device.type,
            "threads": setup.threads,
            "steps": step,
            "length": [list(part) for part in length.parts],
            "seconds": round(earlier + time.perf_counter() - started, 1),
            "plan": plan.digest(),
        },
    )
    return package, records


def train_step(network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, targets: Tensor) -> float:
    """One step, in bfloat16 autocast where the device is made for it; returns the loss."""
    network.train()
    half = torch_precision(images.device) == "bf16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        outputs = network(images)
    loss = supervised(outputs, targets)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
    optimiser.step()
    return float(loss.detach())


@dataclass(frozen=True)
class Length:
    """How long a run is. ``parts`` are pairs (step, steps): from that step on it was to have so many
    steps in all. A run of the same parts has the same learning rate at every step."""

    parts: list[tuple[int, int]]

    @property
    def steps(self) -> int:
        return self.parts[-1][1]

    def progress(self, step: int) -> float:
        """How much of the run lies behind a step, 0 to 1; a correction bends the line, without a jump."""
        done = 0.0
        for (first, steps), (following, _) in zip(self.parts, [*self.parts[1:], (step, 0)], strict=True):
            done += (1 - done) * (min(step, following) - first) / max(1, steps - first)
            if step <= following:
                break
        return done

    def corrected(self, step: int, steps: int) -> Length:
        """With another number of steps in all, where it differs by more than a tenth of what is left."""
        if abs(steps - self.steps) <= max(2, 0.1 * (self.steps - step)):
            return self
        return Length([*self.parts, (step, steps)])


def schedule(progress: float) -> float:
    """Share of the learning rate: a linear warm-up over a twentieth of the run, then a cosine to zero."""
    warm = 0.05
    if progress < warm:
        return 0.1 + 0.9 * progress / warm
    return 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def validate(
    network: nn.Module,
    cases: Sequence[tuple[str, Volume, LabelMap]],
    plan: Plan,
    configuration: str,
    device: torch.device,
) -> dict[str, Any]:
    """Mean Dice over the cases: of all labels as "dice", and of each as "dice_by_label"."""
    scores: dict[str, list[float]] = {label.name: [] for label in plan.label_set}
    engine = TorchEngine([network], plan.configuration(configuration), len(plan.labels) + 1, device)
    for _, volume, reference in cases:
        found = segment(engine, volume, plan, configuration).label_map
        for label in plan.label_set:
            truth = reference.values == label.number
            if truth.any():
                scores[label.name].append(dice(found.values == label.number, truth))
    means = {name: float(np.mean(values)) for name, values in scores.items() if values}
    return {"dice": float(np.mean(list(means.values()))) if means else 0.0, "dice_by_label": means}


def _due(step: int, steps: int, every: int) -> bool:
    """Whether one of some ten validations, evenly spread, falls on this epoch's end."""
    epochs = max(1, steps // every)
    return (step // every) % max(1, epochs // _VALIDATIONS) == 0


def _steps(plan: Plan, setup: Setup, network: nn.Module, batches: Batches, started: float) -> int:
    """How many steps the run takes: by its epochs, or as many as its budget holds."""
    if setup.budget_seconds is None:
        return (setup.epochs or plan.training.epochs.value) * plan.training.steps_per_epoch
    trial = copy.deepcopy(network)
    optimiser = torch.optim.AdamW(trial.parameters(), lr=1e-6)
    seconds = []
    for step in range(_WARM + _TIMED):
        before = time.perf_counter()
        train_step(trial, optimiser, *batches(step))
        seconds.append(time.perf_counter() - before)
    # Some of the budget goes to validation and logs.
    left = 0.95 * setup.budget_seconds - (time.perf_counter() - started)
    return max(1, int(left / float(np.median(seconds[_WARM:]))))


def _average(average: nn.Module, network: nn.Module, step: int) -> None:
    """Exponential moving average of the weights; young averages forget faster."""
    weight = 1 - min(_EMA, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)
        for mine, other in zip(average.buffers(), network.buffers(), strict=True):
            mine.copy_(other)


def _tensors(network: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{k}": v for k, v in state.items()}
    return tensors


def _resume(
    log: RunLog, network: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[int, float, Length | None]:
    """Load the log's checkpoint, if any; the step, the seconds spent and the run's length."""
    found = log.load()
    if found is None:
        log.rewind(0)
        return 0, 0.0, None
    tensors, state = found
    for prefix, module in (("network.", network), ("average.", average)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, number, key = name.split(".", 2)
            slots.setdefault(int(number), {})[key] = tensor
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})
    log.rewind(state["step"])
    return int(state["step"]), float(state["seconds"]), Length([(int(a), int(b)) for a, b in state["length"]])

"""A training run, read from top to bottom: data, network, optimiser, loop, package."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from medseg.core.errors import InputError, MedsegError
from medseg.core.memory import free_memory, resident_memory
from medseg.core.provenance import digest, machine, versions
from medseg.core.volume import LabelMap, Volume
from medseg.evaluate.overlap import dice
from medseg.evaluate.score import ignoring
from medseg.infer.engine import TorchEngine, pick_device, torch_precision
from medseg.infer.predict import require_memory, segment
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore, StoredCase
from medseg.models.build import build
from medseg.models.package import ModelPackage, learnt_from
from medseg.plan.cost import estimate, gib, require_room
from medseg.plan.plan import Configuration, Plan, Training
from medseg.plan.watch import due as validation_due
from medseg.plan.watch import watching_of
from medseg.train.batches import Batches, Feed
from medseg.train.loss import loss_of, supervised
from medseg.train.picture import Rgb, picture, side_by_side
from medseg.train.ranks import ALONE, Ranks
from medseg.train.teacher import TaughtBatches, answered, beside

_CHECKPOINT_SECONDS = 60.0
_PICTURED = 4
# Of the memory that is free beside a training, a validation may take so much.
_VALIDATION_SHARE = 0.8
# Into so many parts a run is divided by the checkpoints that it may go back to.
_PARTS = 10
_CLIP = 12.0
_EMA = 0.999
_MOMENTUM = 0.99
# On a GPU, asking for each loss as it comes would keep the next step waiting.
_LOOKED_AT_ONCE = 16
# Less of a network than this is no start: a bias fits by chance.
_FITTING = 0.1
# What a step takes is reckoned to about this share.
_RECKONING = 1.2
# After a loss that was no number the learning rate is this share of what it was.
_TAMED = 0.5


# Of what the network answers and the batch's targets.
Loss = Callable[[Any, Any], Tensor]
# Targets with what only the averaged weights can add to them, at a share of the run.
Ask = Callable[[nn.Module, Any, float], Any]


class StoppedError(MedsegError):
    """The run was asked to stop, and can be taken up again. Exit status 75 (EX_TEMPFAIL of sysexits.h:
    "try again later"), by which a scheduler knows to queue the job once more."""

    exit_status = 75


@dataclass(frozen=True)
class Setup:
    """What a run is given besides its plan: which configuration and fold, and the options. Of a second
    stage ``previous`` are the first stage's models by digest, fold by fold: what each found in the cases
    that it held out is what this one is told of them."""

    configuration: str
    fold: int
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    previous: tuple[str, ...] = ()
    seed: int = 0
    device: str = "auto"
    threads: int = 1
    deterministic: bool = False


@dataclass(frozen=True)
class Before:
    """The stage before a fold's: the model that held the same cases out, and what it found in them, on
    their own grids."""

    package: ModelPackage
    found: Mapping[str, LabelMap]


class Feeding(Protocol):
    """Images and targets of each step, on a device; see `Batches`."""

    device: torch.device

    def __call__(self, step: int) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Course:
    """What a run teaches. ``phase`` names it; the network has so many ``outputs``, of which and the
    targets of ``batches`` (completed by ``ask``, where there is something to ask) the ``loss`` is made.
    ``identity`` is all that the weights follow from; ``check`` tells how good they are, and shows it."""

    phase: str
    plan: Plan
    configuration: Configuration
    outputs: int
    batches: Feeding
    loss: Loss
    identity: dict[str, Any]
    ask: Ask | None = None
    check: Callable[[nn.Module], tuple[dict[str, Any], Rgb]] | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run is: for whoever watches. ``dice`` is that of the last validation; ``phase`` says
    whether it is training or what comes before."""

    step: int
    steps: int
    loss: float
    dice: float | None
    seconds_left: float
    phase: str = "training"


def train(
    plan: Plan,
    setup: Setup,
    store: CaseStore,
    log: RunLog,
    *,
    unlabelled: Sequence[StoredCase] = (),
    validation: Sequence[tuple[str, Volume, LabelMap]] = (),
    before: Before | None = None,
    progress: Callable[[Progress], None] = lambda now: None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
    start: ModelPackage | None = None,
) -> tuple[ModelPackage, tuple[dict[str, Any], ...]]:
    """Train each of the plan's networks for as many steps as it says, and give back the package with their
    averaged weights, and the runs' log, where "seconds" go on from one network to the next.

    Each run has a place of its own in ``log``, known by its plan, fold, cases and seed, and goes on
    from the checkpoint there, if any. The same plan, seed, kind of machine and number of threads give
    the same weights, bit for bit, however often the run was stopped or killed; on a GPU only where
    ``setup.deterministic`` asks for it, at the price of some speed. ``validation`` cases are
    predicted as often as the plan says, by the same function that `predict` uses; without any, the log
    holds the loss only. ``stop`` is asked after every step, on a GPU after up to 16 of them. With several
    ``ranks`` each takes its share of every batch. ``start`` is a model whose weights to begin with, as far
    as they are `fitting`; whether it has seen a case that is held out is for the caller to know. A plan
    that has a mean teacher needs ``unlabelled`` cases. A second stage needs what comes ``before`` it, which
    goes into its package.

    A loss that is no number brings the run back to where the last tenth of it began (the clock, and where
    it was stopped, decide nothing), to go on at half the learning rate, once. Raises MedsegError where
    that happens again, or another run has the same place, and `StoppedError`, with a checkpoint written,
    where it was asked to.
    """
    device, configuration, cases = prepare(plan, setup, store, ranks)
    found = _found(configuration, setup, before)
    taught = plan.training.consistency
    if taught and not unlabelled:
        raise InputError("the plan has a mean teacher, and there are no unlabelled cases", "Run `medseg preprocess`")
    require_fit(plan, configuration, plan.outputs, device, ranks, times=2 if taught else 1)
    fed = (*cases, *(unlabelled if taught else ()))
    memory = _room_to_validate(plan, setup, fed, validation, device) if validation else None
    make = partial(Batches, plan, configuration, device=device, ranks=ranks)
    members, seconds, setbacks = [], 0.0, 0
    records: list[dict[str, Any]] = []
    own = _seeds(configuration, setup.seed)
    for number, seed in enumerate(own, start=1):
        one = replace(setup, seed=seed)
        course = Course(
            phase="training" if len(own) == 1 else f"training {number} of {len(own)}",
            plan=plan,
            configuration=configuration,
            outputs=plan.outputs,
            batches=TaughtBatches(make, cases, unlabelled, seed) if taught else make(cases, seed),
            loss=beside(plan) if taught else loss_of(plan, configuration),
            ask=partial(answered, plan) if taught else None,
            identity=identity_of(plan, one, ranks, start, unlabelled if taught else ()),
            check=(lambda network: validate(network, validation, plan, setup.configuration, device, found, memory))
            if validation
            else None,
        )
        learner, told = run(course, one, log, device, progress=progress, stop=stop, ranks=ranks, start=start)
        members.append(learner.learnt())
        records += [{**line, "seconds": round(seconds + line["seconds"], 2)} for line in told]
        seconds, setbacks = seconds + learner.seconds, setbacks + learner.setbacks
    made = provenance(learner, course, setup, device, start)
    package = ModelPackage(
        plan=plan,
        configuration_name=setup.configuration,
        members=tuple(members),
        trained_on=setup.train,
        held_out=setup.held_out,
        provenance=made | {"seconds": round(seconds, 1), "setbacks": setbacks},
        previous=before.package if before else None,
    )
    return package, tuple(records)


def _seeds(configuration: Configuration, seed: int) -> tuple[int, ...]:
    """The seed of each member of a run: the run's own of the first, and others made of it."""
    count = configuration.members.value if configuration.members else 1
    return seed, *(int(np.random.SeedSequence([seed, n]).generate_state(1)[0]) for n in range(1, count))


def _found(configuration: Configuration, setup: Setup, before: Before | None) -> Mapping[str, LabelMap]:
    """What the stage before found in the cases held out; nothing where there is none. Raises InputError where
    it is another one, is missing, or has seen a case that this fold holds out."""
    name, wanted = setup.configuration, configuration.previous
    if wanted is None and before is None:
        return {}
    if before is None or before.package.configuration_name != wanted or before.package.digest() not in setup.previous:
        raise InputError(
            f"{name} takes the labels of {wanted or 'no other model'}, and that is not what it is given",
            f"Train and predict {wanted} first" if wanted else "Leave the other model out",
        )
    if seen := sorted({*setup.held_out} - {*before.package.held_out}) or sorted(
        {*setup.held_out} & {*before.package.trained_on}
    ):
        raise InputError(
            f"{wanted} did not hold it out in fold {setup.fold}", "Train both by one folds.json", case=seen[0]
        )
    return before.found


def prepare(
    plan: Plan, setup: Setup, store: CaseStore, ranks: Ranks
) -> tuple[torch.device, Configuration, list[StoredCase]]:
    """The device, made ready, the configuration and the labelled cases. Raises InputError for a plan that
    cannot be trained, for a store of another one, and for a fold without cases."""
    torch.set_num_threads(setup.threads)
    device = ranks.device(pick_device(setup.device))
    _repeatable(setup.deterministic, device)
    if device.type == "cuda":  # what torch keeps of an earlier training of this process counts as taken
        gc.collect()
        torch.cuda.empty_cache()
    configuration = plan.configuration(setup.configuration)
    if configuration.previous is not None and plan.training.wants_unlabelled:
        raise InputError(
            f"{setup.configuration} takes another model's labels, and cannot learn from scans without any",
            "Plan without --unlabelled, or train another configuration",
        )
    if configuration.network.value.counts:
        _require_countable(plan, setup, device)
    if configuration.steps is None:
        raise InputError(f"the plan does not say how many steps {setup.configuration} takes", "Plan anew")
    store.require(plan.preparation(setup.configuration), setup.configuration, setup.previous)
    cases = [store.read(case) for case in setup.train]
    if not cases:
        raise InputError(f"fold {setup.fold} has no case to train on", "Correct folds.json")
    return device, configuration, cases


def _require_countable(plan: Plan, setup: Setup, device: torch.device) -> None:
    """InputError where a plan wants of Mask R-CNN what it cannot do."""
    if plan.regions or plan.training.wants_unlabelled:
        what = "overlapping regions" if plan.regions else "scans without labels"
        raise InputError(f"mask-rcnn does not learn from {what}", "Plan without, or with another network")
    if setup.deterministic and device.type == "cuda":
        raise InputError("mask-rcnn does not repeat itself on a GPU", "Leave out --deterministic, or use --device cpu")


def identity_of(
    plan: Plan, setup: Setup, ranks: Ranks, start: ModelPackage | None, unlabelled: Sequence[StoredCase] = ()
) -> dict[str, Any]:
    """All that a run's weights follow from: not how many members there are, so that one can be added later."""
    return {
        "format": 2,
        "plan": plan.digest(members=False),
        "configuration": setup.configuration,
        "fold": setup.fold,
        "seed": setup.seed,
        "train": list(setup.train),
        "ranks": ranks.count,
        "start": start.digest() if start else None,
        **({"unlabelled": [case.id for case in unlabelled]} if unlabelled else {}),
        **({"previous": list(setup.previous)} if setup.previous else {}),
    }


def provenance(
    learner: Learner, course: Course, setup: Setup, device: torch.device, start: ModelPackage | None
) -> dict[str, Any]:
    """How the weights came to be, for whoever reads the package; ``learnt_before`` names, task by task, the
    cases that ``start`` has learnt from."""
    identity = course.identity
    return {
        "versions": versions(),
        "seed": setup.seed,
        "fold": setup.fold,
        "device": device.type,
        "threads": setup.threads,
        "ranks": identity["ranks"],
        "deterministic": setup.deterministic or device.type == "cpu",
        "steps": learner.step,
        "setbacks": learner.setbacks,
        "start": identity["start"],
        "seconds": round(learner.seconds, 1),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "peak_memory_bytes": resident_memory(most=True),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "plan": course.plan.digest(),
        **{name: identity[name] for name in ("unlabelled", "previous") if name in identity},
        **({"learnt_before": learnt_from(start)} if start else {}),
    }


def run(
    course: Course,
    setup: Setup,
    log: RunLog,
    device: torch.device,
    *,
    progress: Callable[[Progress], None],
    stop: Callable[[], bool],
    ranks: Ranks,
    start: ModelPackage | None,
) -> tuple[Learner, tuple[dict[str, Any], ...]]:
    """Take a course from its last checkpoint, or from the beginning, to its end; see `train`."""
    plan, configuration, identity = course.plan, course.configuration, course.identity
    assert configuration.steps is not None  # noqa: S101 - `prepare` has seen to it
    steps, every = configuration.steps.value, plan.training.steps_per_epoch
    times = watching_of(configuration).times
    log = log.of(digest(identity)[:12])
    with log.alone(ranks.first):
        fresh = partial(Learner.fresh, course, setup.seed, device, ranks, start)
        learner = fresh()
        learner.take_up(log, identity)
        begun = saved = time.perf_counter()
        started, done = begun - learner.seconds, 0
        last_dice: float | None = None
        while learner.step < steps:
            for losses in learner.stretches(course, steps, every):
                if not all(map(math.isfinite, losses)):
                    learner = learner.gone_back(log, identity, fresh(), losses)
                    if ranks.first:  # should it be stopped now, it knows of the setback
                        learner.save(log, identity)
                        saved = time.perf_counter()
                    break
                stopping = ranks.any(stop())
                learner.recent += losses
                learner.seconds = time.perf_counter() - started
                ended, validated = learner.step == steps, False
                if learner.step % every == 0 or ended:
                    record: dict[str, Any] = {
                        "phase": course.phase,
                        "step": learner.step,
                        "steps": steps,
                        "seconds": round(learner.seconds, 2),
                        "loss": float(np.mean(learner.recent)),
                        "learning_rate": learner.rate,
                    }
                    learner.recent = []
                    validated = course.check is not None and validation_due(learner.step, steps, every, times)
                    if validated and course.check and ranks.first:
                        scores, image = course.check(learner.average)
                        record |= scores
                        last_dice = scores["dice"]
                        log.picture(learner.step, image)
                    if ranks.first:
                        log.write(record)
                keep = not ended and _parted(learner.step, steps, every)
                due = keep or validated or ended or stopping or time.perf_counter() - saved > _CHECKPOINT_SECONDS
                if due and ranks.first:
                    learner.save(log, identity, keep=keep)
                    saved = time.perf_counter()
                done += len(losses)
                left = (time.perf_counter() - begun) / done * (steps - learner.step)
                progress(Progress(learner.step, steps, losses[-1], last_dice, left, course.phase))
                if stopping and not ended:
                    raise StoppedError(
                        f"{course.phase} stopped at step {learner.step} of {steps}; the same command goes on from there"
                    )
        ranks.wait()  # the first may still be writing what all read
        records = tuple(log.records())
        log.close()
    return learner, records


@dataclass
class Learner:
    """All that a step changes, and so all that a checkpoint holds. ``setbacks`` counts the losses that
    were no number; ``seconds`` those spent so far; ``recent`` the losses since the last record."""

    network: nn.Module
    average: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss: Loss
    base_rate: float
    ranks: Ranks
    step: int = 0
    seconds: float = 0.0
    setbacks: int = 0
    recent: list[float] = field(default_factory=list)
    rate: float = 0.0

    @classmethod
    def fresh(
        cls,
        course: Course,
        seed: int,
        device: torch.device,
        ranks: Ranks,
        start: ModelPackage | None,
    ) -> Learner:
        """One that has learnt nothing yet, or what ``start`` has."""
        torch.manual_seed(seed)
        plan = course.plan
        network = build(course.configuration, plan.inputs(course.configuration), course.outputs)
        if start:
            network.load_state_dict(fitting(start, network)[0], strict=False)
        network = network.to(device)
        training = plan.training
        optimiser = optimiser_of(training, network)
        scaler = torch.amp.GradScaler(device.type, enabled=torch_precision(device) == "f16")
        average = copy.deepcopy(network).eval()
        return cls(network, average, optimiser, scaler, course.loss, training.learning_rate.value, ranks)

    def learnt(self) -> dict[str, Tensor]:
        """The averaged weights, by name."""
        return {name: tensor.detach().cpu() for name, tensor in self.average.state_dict().items()}

    def stretches(self, course: Course, steps: int, every: int) -> Iterator[list[float]]:
        """Train on to the end, giving losses step by step; on a GPU, where to ask for each as it comes
        would keep the next step waiting, some steps at a time, but never across a record."""
        at_once = 1 if course.batches.device.type == "cpu" else _LOOKED_AT_ONCE
        network = self.ranks.wrap(self.network)
        if course.plan.training.compile:
            network = cast(nn.Module, torch.compile(network))
        with Feed(course.batches, self.step) as feed:
            while self.step < steps:
                losses = []
                for _ in range(min(at_once, steps - self.step, every - self.step % every)):
                    images, targets = next(feed)
                    if course.ask:
                        targets = course.ask(self.average, targets, self.step / steps)
                    self.rate = self.base_rate * _TAMED**self.setbacks * schedule(self.step / steps)
                    for group in self.optimiser.param_groups:
                        group["lr"] = self.rate
                    losses.append(train_step(network, self.optimiser, images, targets, self.loss, self.scaler))
                    self.step += 1
                    _average(self.average, self.network, self.step)
                yield self.ranks.mean(torch.stack(losses)).tolist()

    def save(self, log: RunLog, identity: dict[str, Any], *, keep: bool = False) -> None:
        """Write a checkpoint; with ``keep``, one to go back to."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for number, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{k}": v for k, v in slots.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        log.save(
            tensors,
            {
                **identity,
                "step": self.step,
                "seconds": self.seconds,
                "setbacks": self.setbacks,
                "recent": self.recent,
                "scaler": self.scaler.state_dict(),
            },
            keep=keep,
        )

    def take_up(self, log: RunLog, identity: dict[str, Any], *, kept: bool = False) -> None:
        """Go on from the log's last checkpoint, or from the one ``kept``, if there is one. Raises InputError
        where it is another run's."""
        found = log.load(kept=kept)
        if self.ranks.first:
            log.rewind(found[1]["step"] if found else 0)
        self.ranks.wait()
        if found is None:
            return
        tensors, state = found
        if {name: state.get(name) for name in identity} != identity:
            raise InputError(f"the checkpoint in {log.folder} is of another run", "Take it away")
        for prefix, module in (("network.", self.network), ("average.", self.average)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, number, key = name.split(".", 2)
                slots.setdefault(int(number), {})[key] = tensor
        self.optimiser.load_state_dict({"state": slots, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        self.step, self.seconds, self.setbacks = int(state["step"]), float(state["seconds"]), int(state["setbacks"])
        self.recent = list(state["recent"])

    def gone_back(self, log: RunLog, identity: dict[str, Any], fresh: Learner, losses: list[float]) -> Learner:
        """A learner at the checkpoint to go back to (``fresh`` where there is none), which knows of the setback.
        Raises MedsegError where it is not the first."""
        bad = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
        if self.setbacks:
            raise MedsegError(
                f"the loss is {losses[bad]} at step {self.step - len(losses) + bad + 1}, for the second time and at "
                f"half the learning rate; the last checkpoint is kept. Lower the learning rate in plan.json, or look "
                "for a case with broken intensities, and train again."
            )
        fresh.take_up(log, identity, kept=True)
        fresh.setbacks += 1
        return fresh


def optimiser_of(training: Training, network: nn.Module) -> torch.optim.Optimizer:
    """The plan's optimiser of a network's weights."""
    rate, decay = training.learning_rate.value, training.weight_decay.value
    if training.optimiser == "sgd":
        return torch.optim.SGD(
            network.parameters(), lr=rate, momentum=_MOMENTUM, nesterov=True, weight_decay=decay, fused=True
        )
    return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay, fused=True)


def fitting(start: ModelPackage, network: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights of a model's first member whose names and shapes are a network's, and the names of the
    network's that find none. Raises InputError where they make up less than a tenth of the network."""
    own, weights = network.state_dict(), start.members[0]
    found = {name: weights[name] for name in own if name in weights}
    found = {name: tensor for name, tensor in found.items() if tensor.shape == own[name].shape}
    if sum(t.numel() for t in found.values()) < _FITTING * sum(t.numel() for t in own.values()):
        raise InputError(
            f"hardly a layer of {start.name} has the name and shape of one of this plan's network",
            "Let plan.json inherit the network of that model's plan.json",
        )
    return found, tuple(name for name in own if name not in found)


def train_step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    targets: Any,
    loss: Loss = supervised,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """One step, in half precision where the device is made for it; returns the loss, which is no number
    where a gradient is none either."""
    network.train()
    precision = torch_precision(images.device)
    half = torch.float16 if precision == "f16" else torch.bfloat16
    with torch.autocast(images.device.type, half, enabled=precision != "f32"):
        outputs = network(images)
    value = loss(outputs, targets)
    optimiser.zero_grad(set_to_none=True)
    if scaler is None or not scaler.is_enabled():
        value.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
        optimiser.step()
        return torch.where(norm.isfinite(), value.detach(), torch.nan)
    # Gradients that overflow half precision are the scaler's business: it leaves such a step out.
    scaler.scale(value).backward()
    scaler.unscale_(optimiser)
    nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
    scaler.step(optimiser)
    scaler.update()
    return value.detach()


def require_fit(
    plan: Plan, configuration: Configuration, outputs: int, device: torch.device, ranks: Ranks, times: int = 1
) -> None:
    """InputError, with what would fit, where the network cannot be trained in the device's free memory on
    ``times`` the plan's batch."""
    share = configuration.batch.model_copy(update={"value": times * len(ranks.share(configuration.batch.value))})
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    require_room(
        configuration.model_copy(update={"batch": share}),
        plan.inputs(configuration),
        outputs,
        int(_RECKONING * free),
        kind="gpu" if device.type == "cuda" else "cpu",
        half=torch_precision(device) != "f32",
    )


def _room_to_validate(
    plan: Plan,
    setup: Setup,
    cases: Sequence[StoredCase],
    validation: Sequence[tuple[str, Volume, LabelMap]],
    device: torch.device,
) -> int:
    """Bytes that a validation may take beside the training, from beginning to end: what is free now less what
    the training will take, and not what is free at the time, which would end a run in the middle. InputError
    where that is too little for one of the cases."""
    configuration, free = plan.configuration(setup.configuration), free_memory()
    taught = 2 if plan.training.consistency else 1
    batch = configuration.batch.model_copy(update={"value": taught * configuration.batch.value})
    larger = configuration.model_copy(update={"batch": batch})
    training = 0
    if device.type == "cpu":
        half = torch_precision(device) != "f32"
        training = estimate(larger, plan.inputs(configuration), plan.outputs, kind="cpu", half=half).memory_bytes
    # `Batches` keeps the cases in memory where they take no more than half of what is left.
    kept = min(sum(case.image.nbytes + 2 * math.prod(case.shape) for case in cases), max(0, free - training) // 2)
    memory = max(0, int(_VALIDATION_SHARE * (free - training - kept)))
    network = build(configuration, plan.inputs(configuration), plan.outputs)
    engine = TorchEngine([network], configuration, plan.outputs, torch.device("cpu"))
    for case, volume, _ in validation:
        try:
            require_memory(engine, volume, plan, setup.configuration, memory=memory)
        except InputError:
            raise InputError(
                f"it is predicted whole now and then while training, which needs more than the {gib(memory)} of "
                "memory that are free beside the training",
                "Free some memory, crop the scan, or plan with a smaller patch",
                case=case,
            ) from None
    return memory


def _repeatable(deterministic: bool, device: torch.device) -> None:
    """Whether a GPU takes only algorithms that repeat themselves, which are slower; a processor's do."""
    if device.type == "cuda":
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = not deterministic


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
    before: Mapping[str, LabelMap] | None = None,
    memory: int | None = None,
) -> tuple[dict[str, Any], Rgb]:
    """Mean Dice over the cases, of all labels as "dice", and of each as "dice_by_label"; and a picture of
    the first few of them. Voxels that the plan ignores do not count. ``before`` is what a stage before found
    in them, if there is one; ``memory`` (bytes) bounds what a prediction takes."""
    scores: dict[str, list[float]] = {label.name: [] for label in plan.label_set}
    engine = TorchEngine([network], plan.configuration(configuration), plan.outputs, device)
    pictures: list[Rgb] = []
    for case, volume, reference in cases:
        told = (before or {}).get(case)
        found = segment(engine, volume, plan, configuration, previous=told, memory=memory).label_map
        found, reference = ignoring(found, reference, plan.training.ignore_label, case=case)
        if len(pictures) < _PICTURED:
            pictures.append(picture(volume, found, reference))
        for label in plan.label_set:
            truth = reference.values == label.number
            if truth.any():
                scores[label.name].append(dice(found.values == label.number, truth))
    means = {name: float(np.mean(values)) for name, values in scores.items() if values}
    overall = float(np.mean(list(means.values()))) if means else 0.0
    return {"dice": overall, "dice_by_label": means}, side_by_side(pictures)


def _parted(step: int, steps: int, every: int) -> bool:
    """Whether one of some ten parts of a run ends here, at an epoch's end."""
    return step % every == 0 and (step // every) % max(1, steps // every // _PARTS) == 0


def _average(average: nn.Module, network: nn.Module, step: int) -> None:
    """Exponential moving average of the weights, and of what batch norm keeps of the batches; young averages
    forget faster."""
    weight = 1 - min(_EMA, (1 + step) / (10 + step))
    with torch.no_grad():
        mine, other = (
            [*m.parameters(), *(b for b in m.buffers() if b.is_floating_point())] for m in (average, network)
        )
        torch._foreach_lerp_(mine, other, weight)

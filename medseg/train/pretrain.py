"""Learning from scans alone, before any label: blocks of each patch are hidden, and the network is to say what was
there (masked autoencoders, He et al., 2022; of a convolutional network and its skips, Zhou et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from medseg.core.errors import InputError
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore, StoredCase
from medseg.models.build import build
from medseg.models.package import ModelPackage
from medseg.plan.plan import Augmentation, Configuration, Plan
from medseg.train.batches import Batches
from medseg.train.loop import (
    Course,
    Progress,
    Setup,
    identity_of,
    prepare,
    provenance,
    require_fit,
    run,
)
from medseg.train.loss import supervised
from medseg.train.ranks import ALONE, Ranks

# Of a patch's blocks, so many along each axis, this share is hidden.
_BLOCKS, _HIDDEN = 8, 0.6
# Of a run's seed, that of the blocks.
_STREAM = 4
# What leaves a patch's values as they are: they are what is to be found.
_UNCHANGED = {
    "intensity": 0.0, "gamma": 0.0, "noise": 0.0, "contrast": 0.0, "blur_share": 0.0, "low_resolution_share": 0.0,
    "channel_dropout": 0.0, "domain_randomisation": False,
}  # fmt: skip


def pretrain(
    plan: Plan,
    setup: Setup,
    store: CaseStore,
    log: RunLog,
    unlabelled: Sequence[StoredCase],
    *,
    progress: Callable[[Progress], None] = lambda now: None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
    start: ModelPackage | None = None,
) -> ModelPackage:
    """What a network learns of the fold's training scans and the ``unlabelled`` ones before it is trained:
    its weights but those of its heads, for `medseg.train.loop.train` to start from.

    It is a run like any other, with a place of its own in ``log``, and repeatable, stopped and taken up
    like any other. No label is read.
    """
    plan = pretraining_plan(plan, setup.configuration)
    device, configuration, labelled = prepare(plan, setup, store, ranks)
    if not unlabelled:
        raise InputError("the plan pretrains on unlabelled cases, and there are none", "Run `medseg preprocess`")
    outputs = len(plan.channels)
    require_fit(plan, configuration, outputs, device, ranks)
    scans = [case.unlabelled() for case in (*labelled, *unlabelled)]
    course = Course(
        phase="pretraining",
        plan=plan,
        configuration=configuration,
        outputs=outputs,
        batches=HidingBatches(Batches(plan, configuration, scans, setup.seed, device, ranks)),
        loss=reconstruction,
        identity={**identity_of(plan, setup, ranks, start, unlabelled), "phase": "pretraining"},
    )
    learner, _ = run(course, setup, log, device, progress=progress, stop=stop, ranks=ranks, start=start)
    heads = heads_of(configuration, outputs)
    return ModelPackage(
        plan=plan,
        configuration_name=setup.configuration,
        members=({name: tensor for name, tensor in learner.learnt().items() if name not in heads},),
        trained_on=setup.train,
        held_out=setup.held_out,
        provenance=provenance(learner, course, setup, device, start),
    )


def pretraining_plan(plan: Plan, name: str) -> Plan:
    """How a plan pretrains a configuration, as a plan: its steps, patches from anywhere, and values as they
    are. Plans that differ in what comes after have the same."""
    configuration, share = plan.configuration(name), plan.training.pretraining
    if configuration.steps is None or share is None:
        raise InputError(f"the plan does not say how long {name} is pretrained", "Plan anew with --unlabelled pretrain")
    steps = configuration.steps.model_copy(update={"value": max(1, round(share.value * configuration.steps.value))})
    training = plan.training
    augmentation = Augmentation(**{**training.augmentation.value.model_dump(), **_UNCHANGED})
    changed = training.model_copy(
        update={
            "pretraining": None,
            "consistency": None,
            "foreground_share": training.foreground_share.model_copy(update={"value": 0.0}),
            "augmentation": training.augmentation.model_copy(update={"value": augmentation}),
        }
    )
    configurations = {**plan.configurations, name: configuration.model_copy(update={"steps": steps})}
    return plan.model_copy(update={"training": changed, "configurations": configurations})


def heads_of(configuration: Configuration, channels: int) -> frozenset[str]:
    """The names of those weights whose shape depends on how many classes there are."""
    with torch.device("meta"):
        few, more = (build(configuration, channels, classes).state_dict() for classes in (1, 2))
    return frozenset(name for name in few if few[name].shape != more[name].shape)


class HidingBatches:
    """Batches of patches, in part hidden, and of what was there; from the seed and the step alone."""

    def __init__(self, batches: Batches) -> None:
        self._batches, self.device = batches, batches.device

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, *patch), 0 where they are hidden, and the targets of `reconstruction`."""
        images, _ = self._batches(step)
        batch = self._batches.configuration.batch.value
        numbers = [step * batch + i for i in self._batches.share]
        generators = [np.random.default_rng([self._batches.seed, _STREAM, number]) for number in numbers]
        where = torch.stack([hidden(rng, images.shape[2:]) for rng in generators]).unsqueeze(1).to(self.device)
        return images.masked_fill(where, 0), images.masked_fill(~where, torch.nan)


def hidden(rng: np.random.Generator, patch: Sequence[int]) -> Tensor:
    """Where a patch is hidden (bool, *patch): in blocks of an eighth of it along each axis (at least a
    voxel; the last may be cut off), of which 60 % are drawn."""
    sides = [max(1, round(n / _BLOCKS)) for n in patch]
    counts = [-(-n // side) for n, side in zip(patch, sides, strict=True)]
    blocks = np.zeros(int(np.prod(counts)), dtype=bool)
    blocks[rng.permutation(len(blocks))[: round(_HIDDEN * len(blocks))]] = True
    where = blocks.reshape(counts)
    for axis, side in enumerate(sides):
        where = where.repeat(side, axis=axis)
    return torch.from_numpy(np.ascontiguousarray(where[tuple(slice(0, n) for n in patch)]))


def reconstruction(outputs: Tensor | list[Tensor], target: Tensor) -> Tensor:
    """The mean absolute difference from ``target`` (B, C, ...) of outputs (B, C, ...), or a list of them
    from fine to coarse, where the target is a number: it is NaN where nothing was hidden."""
    found = [outputs] if isinstance(outputs, Tensor) else outputs
    # As `supervised` has it, each channel a member of the batch.
    return supervised([one.flatten(0, 1).unsqueeze(1) for one in found], target.flatten(0, 1), _difference)


def _difference(values: Tensor, target: Tensor) -> Tensor:
    values = values.squeeze(1).float()
    asked = ~target.isnan()
    away = (values - torch.where(asked, target, values.detach())).abs()
    return away.sum() / asked.sum().clamp_min(1)

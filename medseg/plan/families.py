"""The families of networks: what each is good for, and which stages it can have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from medseg.core.errors import InputError

_Three: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Family:
    """What a plan must know of a family.

    ``good_for``: in a few words, for whoever chooses. ``stages`` it can have: "any"; "leading": halved as MONAI's
    SegResNetDS does it, thick axes later than others and from then on always; "uniform": all axes are halved at once;
    "dilated": as any, but for the last ones, which keep the resolution and see farther. ``cubic``: every kernel spans
    every axis. It halves from ``least_halvings`` to ``most_halvings`` times; ``embeds``: the first halving takes voxels
    together before there are features.

    ``doubling``: each stage has twice the features of the one before, however many. ``multiple``: what the first one's
    are a multiple of, and ``width`` how many times those that a U-Net of that size has.

    ``learning_rate``: that of AdamW, and ``rate_reason`` why it is not the U-Net's. ``work`` and ``memory`` of a
    training step, in those reckoned of a U-Net of the same stages (benchmarks/families).

    ``sigmoid``: of a single label it has one output, whose sigmoid is that label's probability. ``counts``: it tells
    things of one label from each other. ``trained``: medseg plans and trains it; the others are of imported models.
    """

    good_for: str
    stages: Literal["any", "leading", "uniform", "dilated"] = "any"
    cubic: bool = False
    least_halvings: int = 1
    most_halvings: int = 5
    embeds: bool = False
    doubling: bool = False
    multiple: int = 1
    width: float = 1.0
    learning_rate: float = 1e-2
    rate_reason: str = ""
    work: float = 1.0
    memory: float = 1.0
    sigmoid: bool = False
    counts: bool = False
    trained: bool = True

    def features(self, first: int, most: int, stages: int) -> tuple[int, ...]:
        """Of each stage, where a U-Net of this size begins with ``first`` and has ``most`` at the most."""
        begin = self.multiple * max(1, round(self.width * first / self.multiple))
        limit = begin * 2**stages if self.doubling else max(begin, most)
        features = [min(begin * 2**stage, limit) for stage in range(stages)]
        return (begin, *features[:-1]) if self.embeds else tuple(features)

    def least_patch(self, axes: int) -> int:
        """Voxels of the smallest patch whose coarsest features still have a variance, in so many dimensions."""
        return 2 * (2**self.least_halvings) ** axes


FAMILIES: dict[str, Family] = {
    "unet": Family("everything: the default"),
    "unet-classic": Family(
        "comparing with the literature: the U-Net of 2015, batch norm, max pooling, 64 to 1024 features where they fit",
        most_halvings=4,
        doubling=True,
        width=2.0,
        sigmoid=True,
    ),
    "resunet": Family("large and varied datasets, with a day or more to train", work=1.1, memory=1.1),
    "attention-unet": Family(
        "small organs in large scans: gates that leave out what is far from them", cubic=True, work=1.3, memory=1.5
    ),
    "segresnet": Family(
        "large datasets on a GPU: a deep encoder, a light decoder (Auto3DSeg's first choice)",
        stages="leading",
        most_halvings=4,
        doubling=True,
        work=1.5,
        memory=1.1,
    ),
    "swinunetr": Family(
        "large datasets on a GPU, and pretrained weights: attention within shifted windows",
        stages="uniform",
        cubic=True,
        least_halvings=5,
        embeds=True,
        doubling=True,
        multiple=12,
        learning_rate=1e-3,
        rate_reason="a tenth of the U-Net's, as is usual where there is attention; others were not compared",
        work=5.6,
        memory=3.1,
    ),
    "mednext": Family(
        "large datasets on a GPU: a U-Net of ConvNeXt blocks, few parameters",
        stages="uniform",
        cubic=True,
        least_halvings=3,
        most_halvings=4,
        doubling=True,
        work=2.9,
        memory=2.7,
    ),
    "fcn": Family(
        "large round organs, quickly: a residual encoder whose coarse answers are enlarged",
        learning_rate=3e-3,
        rate_reason="250 steps on Task04 gave Dice 0.861 at 3e-3 and 0.850 at 1e-2 (benchmarks/families)",
        work=0.7,
        memory=0.65,
    ),
    "deeplab": Family(
        "large organs in much context: a dilated residual encoder that sees far",
        stages="dilated",
        learning_rate=3e-3,
        rate_reason="250 steps on Task04 gave Dice 0.874 at 3e-3 and 0.867 at 1e-2 (benchmarks/families)",
        work=1.1,
        memory=0.9,
    ),
    "mask-rcnn": Family(
        "things that are counted: lesions, nodules, cells, vertebrae, one by one",
        counts=True,
        learning_rate=5e-3,
        rate_reason="half of the U-Net's, as several losses are added up; others were not compared",
        work=1.3,
        memory=0.9,
    ),
    "nnunet-plain": Family("imported from nnU-Net", trained=False),
    "nnunet-residual": Family("imported from nnU-Net", trained=False),
}
TRAINED = tuple(name for name, family in FAMILIES.items() if family.trained)
# Whose stages may be any.
_FREE = "unet and resunet"


def require_family(name: str, *, unlabelled: bool = False) -> None:
    """InputError for a family that medseg does not train, or not on scans without labels too."""
    if name not in TRAINED:
        raise InputError(f"no family of networks is called {name!r}", f"There are {', '.join(TRAINED)}")
    if unlabelled and FAMILIES[name].counts:
        raise InputError(f"{name} learns from labelled scans alone", "Plan without --unlabelled, or another family")


def fault(name: str, kernels: Sequence[_Three], strides: Sequence[_Three], axes: Sequence[int]) -> str | None:
    """Why a family cannot have these stages, along the ``axes`` that the network sees, and what it can have;
    None where it can."""
    family = FAMILIES[name]
    steps = [tuple(stride[a] for a in axes) for stride in strides[1:]]
    if family.cubic and len({k[a] for k in kernels for a in axes}) > 1:
        return f"{name} has one size of kernel, along every axis and in every stage; {_FREE} need not"
    if family.stages == "uniform":
        if any(step != (2,) * len(axes) for step in steps):
            return f"{name} halves every axis in every stage but the first; {_FREE} need not"
        few, many = family.least_halvings, family.most_halvings
        if not few <= len(steps) <= many:
            return f"{name} halves the patch {few if few == many else f'{few} to {many}'} times, not {len(steps)}"
    if family.stages == "leading" and steps != list(leading([2.0**-n for n in _finer(steps)], len(steps))):
        return f"{name} halves coarse axes later than others, and from then on all of them; {_FREE} need not"
    return None


def leading(spacing: Sequence[float], halvings: int) -> tuple[tuple[int, ...], ...]:
    """The strides of so many halvings as MONAI's SegResNetDS has them: each axis as often as it is finer than the
    coarsest one, by powers of two, and once they are alike all of them."""
    finer = [_log2(max(spacing) / s) for s in spacing]
    return tuple(tuple(2 if step >= max(finer) or step < n else 1 for n in finer) for step in range(halvings))


def _log2(ratio: float) -> int:
    """Of a ratio of 1 or more, rounded down, with room for what a division loses."""
    return int(ratio * (1 + 1e-9)).bit_length() - 1


def _finer(steps: Sequence[Sequence[int]]) -> list[int]:
    """How often each axis was halved before all were."""
    alike = next((n for n, step in enumerate(steps) if all(set(s) == {2} for s in steps[n:])), len(steps))
    return [sum(step[a] == 2 for step in steps[:alike]) for a in range(len(steps[0]))]

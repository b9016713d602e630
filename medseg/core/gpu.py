"""A GPU, and the torch that should use it: do they fit?"""

from __future__ import annotations

from dataclasses import dataclass

from medseg.core.finding import Finding

# Where drivers of GPUs that torch knows leave their mark; looking costs nothing, importing torch seconds.
GPU_MARKS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@dataclass(frozen=True)
class Device:
    """A GPU that torch sees; ``memory`` in bytes."""

    name: str
    memory: int
    memory_free: int


@dataclass(frozen=True)
class Gpus:
    """Facts. ``present``: a driver's device file is there. ``driver``: its version, "" where it does not say.
    ``torch``: its version, None where it cannot be imported. ``built_for``: CUDA or ROCm, "" for a build
    without. ``said``: torch's own words when it looked. ``hidden``: by CUDA_VISIBLE_DEVICES."""

    present: bool
    driver: str
    torch: str | None
    built_for: str
    devices: tuple[Device, ...]
    said: str = ""
    hidden: bool = False


def judge_gpus(gpus: Gpus) -> list[Finding]:
    """Nothing to mend where there is no GPU, or torch sees it."""
    if gpus.torch is None:
        return []  # said where torch is
    if gpus.devices:
        driver = f", driver {gpus.driver}" if gpus.driver else ""
        found = [
            Finding("gpu", "ok", f"{d.name}, {d.memory_free / 2**30:.3g} of {d.memory / 2**30:.3g} GiB free{driver}")
            for d in gpus.devices
        ]
        return found + ([Finding("gpu", "note", f"torch says of it: {gpus.said}")] if gpus.said else [])
    if not gpus.present:
        built = f"; torch is a build for {gpus.built_for}, which does no harm" if gpus.built_for else ""
        return [Finding("gpu", "ok", f"no GPU: networks run on the processor{built}")]
    if gpus.hidden:
        return [
            Finding(
                "gpu", "note", "there is a GPU, but CUDA_VISIBLE_DEVICES hides it from this process",
                "Unset it, or ask the scheduler for a GPU",
            )
        ]  # fmt: skip
    if not gpus.built_for:
        return [
            Finding(
                "gpu", "problem", f"there is a GPU, but torch {gpus.torch} is a build for processors only",
                "Install the CUDA build of that version (https://pytorch.org/get-started), or run with --device cpu",
            )
        ]  # fmt: skip
    said = f": {gpus.said.rstrip('.')}" if gpus.said else " and does not say why"
    return [
        Finding(
            "gpu", "problem", f"there is a GPU, but torch {gpus.torch} for {gpus.built_for} does not see it{said}",
            f"Update the driver{f' ({gpus.driver})' if gpus.driver else ''} or install a torch that is built for it; "
            "in a container, pass the GPU through",
        )
    ]  # fmt: skip

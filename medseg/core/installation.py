"""What is installed beside medseg, and whether it is what medseg needs."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import medseg
from medseg.core.finding import Finding, Verdict
from medseg.core.gpu import GPU_MARKS, Device, Gpus
from medseg.core.words import discreet

# What a distribution is imported as, where that is not its name.
_MODULES = {
    "connected-components-3d": "cc3d",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "simpleitk": "SimpleITK",
}
# medseg works without: what then happens.
_SPARED = {"openvino": "Networks run in torch then, which takes longer; where there is one for this processor"}
_CHILD = Path(__file__).with_name("import_child.py")
_SECONDS = 300


@dataclass(frozen=True)
class Package:
    """A distribution: what is asked of its ``version`` (">=2.10,<3"; "" for anything), and what is there, None where it
    is not installed. ``error``: why it cannot be imported."""

    name: str
    wanted: str
    version: str | None
    error: str | None = None


@dataclass(frozen=True)
class Installation:
    """Facts. ``recorded`` is medseg's version by its installed metadata, None where it was never installed.
    ``torchvision`` and the torch that it asks for, where it is there; whether Snakemake is; and the kinds of OpenMP
    runtimes that all of it loads."""

    version: str
    recorded: str | None
    python: str
    python_wanted: str
    packages: tuple[Package, ...]
    torchvision: str | None = None
    torchvision_wants: str = ""
    snakemake: str | None = None
    openmp: tuple[str, ...] = ()


@dataclass
class _Imported:
    errors: dict[str, str] = field(default_factory=dict)
    openmp: tuple[str, ...] = ()
    torch: dict[str, Any] | None = None


def look_at_installation() -> tuple[Installation, Gpus]:
    """Imports every dependency, in a process of its own, where torch looks for GPUs too; seconds."""
    recorded = _version("medseg")
    asked = [
        _parsed(line) for line in (metadata.requires("medseg") or [] if recorded else []) if "extra ==" not in line
    ]
    there = {name: _version(name) for name, _ in asked}
    tried = [_MODULES.get(name, name) for name, _ in asked if there[name]]
    imported = _import(tried or ["torch"])
    packages = [
        Package(name, wanted, there[name], imported.errors.get(_MODULES.get(name, name))) for name, wanted in asked
    ]
    vision = _version("torchvision")
    wants = [_parsed(line) for line in (metadata.requires("torchvision") or [] if vision else [])]
    installation = Installation(
        version=medseg.__version__,
        recorded=recorded,
        python=".".join(map(str, sys.version_info[:3])),
        python_wanted=(metadata.metadata("medseg")["Requires-Python"] or "") if recorded else "",
        packages=tuple(packages),
        torchvision=vision,
        torchvision_wants=next((wanted for name, wanted in wants if name == "torch"), ""),
        snakemake=_version("snakemake"),
        openmp=imported.openmp,
    )
    return installation, _gpus(imported.torch)


def judge_installation(found: Installation) -> list[Finding]:
    """Is it what medseg needs?"""
    return [
        *_judge_medseg(found),
        *(_judge_package(package) for package in found.packages if not _sound(package)),
        *_judge_sound(found.packages),
        *_judge_torchvision(found),
        *_judge_openmp(found.openmp),
        *_judge_snakemake(found.snakemake),
    ]


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is among those wanted, by its numbers alone: 2.13.0+cu126 and 2.13.0rc1 are 2.13.0. Of what
    is wanted, ``>=``, ``>``, ``<=``, ``<``, ``==`` (2.5.* too) and ``!=`` are understood; all else holds."""
    return all(_holds(version, part.strip()) for part in wanted.split(",") if part.strip())


def _holds(version: str, part: str) -> bool:
    found = re.fullmatch(r"(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)(\.\*)?\S*", part)
    if not found:
        return True
    have, bound = _numbers(version), _numbers(found[2])
    length = len(bound) if found[3] else max(len(have), len(bound))
    have, bound = ((numbers + (0,) * length)[:length] for numbers in (have, bound))
    return {
        ">=": have >= bound, "<=": have <= bound, "==": have == bound, "!=": have != bound, ">": have > bound,
        "<": have < bound,
    }[found[1]]  # fmt: skip


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


# ---- judging ------------------------------------------------------------------------------------


def _judge_medseg(found: Installation) -> Iterator[Finding]:
    if found.recorded is None:
        yield Finding(
            "installation", "note", f"medseg {found.version} is not installed, only used: nothing says what it needs",
            "pip install -e . in its folder",
        )  # fmt: skip
    elif found.recorded != found.version:
        yield Finding(
            "installation", "note", f"medseg {found.version} was installed as {found.recorded}, whose needs are told",
            "Install it again",
        )  # fmt: skip
    else:
        yield Finding("installation", "ok", f"medseg {found.version}")
    if not satisfies(found.python, found.python_wanted):
        yield Finding(
            "installation", "problem", f"Python {found.python}, but medseg needs {found.python_wanted}",
            "Make an environment with another Python and install medseg there",
        )  # fmt: skip


def _sound(package: Package) -> bool:
    return package.version is not None and package.error is None and satisfies(package.version, package.wanted)


def _judge_package(package: Package) -> Finding:
    name, spared = package.name, _SPARED.get(package.name)
    word: Verdict = "note" if spared else "problem"
    again = f'pip install --force-reinstall "{name}{package.wanted}"'
    if package.version is None:
        text, remedy = f"{name} is not installed", f'pip install "{name}{package.wanted}"'
    elif package.error is not None:
        text, remedy = f"{name} {package.version} cannot be imported: {package.error.rstrip('.')}", again
        if "libGL" in package.error or "cannot open shared object" in package.error:
            remedy = f"Install the system's library that is missing, or {again}"
    else:
        text, remedy = (
            f"{name} {package.version}, but medseg needs {package.wanted}",
            again.replace("--force-reinstall ", ""),
        )
    return Finding("installation", word, text, f"{remedy}. {spared}" if spared else remedy)


def _judge_sound(packages: Iterable[Package]) -> Iterator[Finding]:
    sound = [package for package in packages if _sound(package)]
    if sound:
        named = ", ".join(f"{p.name} {p.version}" for p in sound if p.name in ("torch", "monai", "openvino", "numpy"))
        yield Finding(
            "installation",
            "ok",
            f"{len(sound)} dependencies are there, as new as needed, and can be imported ({named})",
        )


def _judge_torchvision(found: Installation) -> Iterator[Finding]:
    torch = next((package for package in found.packages if package.name == "torch"), None)
    if found.torchvision is None or torch is None or torch.version is None:
        return
    builds = {version.partition("+")[2] for version in (found.torchvision, torch.version) if "+" in version}
    if satisfies(torch.version, found.torchvision_wants) and len(builds) < 2:
        return
    wants = f" is made for torch {found.torchvision_wants}," if found.torchvision_wants else " and"
    broken = any("torchvision" in (package.error or "") for package in found.packages)
    yield Finding(
        "installation",
        "problem" if broken else "note",
        f"torchvision {found.torchvision}{wants} torch {torch.version} is here: what imports torchvision ends with "
        "'operator torchvision::nms does not exist', or leaves out quietly what it is for",
        "medseg does not need it: pip uninstall torchvision, or install the one made for this torch",
    )


def _judge_openmp(kinds: tuple[str, ...]) -> Iterator[Finding]:
    if len(kinds) > 1:
        yield Finding(
            "installation", "note", f"{len(kinds)} OpenMP runtimes in one process ({' and '.join(kinds)}), which can "
            "hold each other up or end it with 'OMP: Error #15'",
            "Install numpy, scipy and torch from one source: all by pip, or all by conda",
        )  # fmt: skip


def _judge_snakemake(version: str | None) -> Iterator[Finding]:
    if version is None:
        yield Finding(
            "installation", "note", "Snakemake is not installed: everything works but `medseg run`",
            'pip install "medseg[workflow]"',
        )  # fmt: skip


# ---- looking ------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _parsed(requirement: str) -> tuple[str, str]:
    """Name and versions of ``torch>=2.10`` or ``torch (==2.5.1) ; ...``."""
    found = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)", requirement)
    if found is None:
        return requirement.strip(), ""
    return re.sub(r"[-_.]+", "-", found[1]).lower(), found[2].replace(" ", "")


def _import(modules: list[str]) -> _Imported:
    """Import modules in a process of its own; after a crash, what is left in another one."""
    result, left = _Imported(), list(modules)
    while True:
        lines, status = _child(left)
        for line in lines:
            if line.get("error"):
                result.errors[line["name"]] = discreet(line["error"])
        if lines and "openmp" in lines[-1]:
            result.openmp, result.torch = tuple(lines[-1]["openmp"]), lines[-1]["torch"]
            return result
        started = [line["starts"] for line in lines if "starts" in line]
        culprit = started[-1] if started else left[0]
        result.errors[culprit] = f"its process ended by {_how(status)}"
        left = left[left.index(culprit) + 1 :] if started else left[1:]
        if not left:
            return result


def _child(modules: list[str]) -> tuple[list[dict[str, Any]], int | None]:
    try:
        done = subprocess.run(  # noqa: S603
            # -P: neither the file's own folder nor the current one is where libraries are looked for.
            [sys.executable, "-P", "-W", "ignore", str(_CHILD), *modules],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
        out, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        out, status = error.stdout or b"", None
    return [json.loads(line) for line in out.decode(errors="replace").splitlines() if line.endswith("}")], status


def _how(status: int | None) -> str:
    if status is None:
        return f"taking longer than {_SECONDS} s"
    if status == -signal.SIGILL:
        return "SIGILL: it is built for instructions that this processor lacks"
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _gpus(torch: dict[str, Any] | None) -> Gpus:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Gpus(
        present=any(Path(mark).exists() for mark in GPU_MARKS),
        driver=_driver(),
        torch=torch["version"] if torch else None,
        built_for=torch["built_for"] if torch else "",
        devices=tuple(Device(*device) for device in torch["devices"]) if torch else (),
        said=discreet(torch["said"]) if torch else "",
        hidden=hidden is not None and hidden.strip() in ("", "-1"),
    )


def _driver() -> str:
    """The version of NVIDIA's kernel module, as 550.54.15; "" where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\s(\d{3}\.\d+(\.\d+)?)\s", text)
    return found[1] if found else ""

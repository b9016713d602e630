"""Which of several models a scan is for, where nobody has named one."""

from __future__ import annotations

from collections.abc import Mapping

from medseg.core.errors import InputError
from medseg.core.volume import Volume
from medseg.infer.predict import unlike
from medseg.models.package import ModelPackage

NO_EXPERIENCE = "it does not say what scans it was trained on"
_ANOTHER = (
    "Get one with `medseg models install PACKAGE`, or train one: `medseg plan TASK -o RUN`, then `medseg train RUN "
    "--all-folds`"
)


def unfit(volume: Volume, package: ModelPackage) -> str | None:
    """Why a model is not for a scan, None where it is: where its training scans were like this one in all
    that `unlike` looks at, but for a note. What a person who names a model is only warned of is
    enough here."""
    if package.experience is None:
        return NO_EXPERIENCE
    channels = package.plan.channels
    if volume.channels != len(channels):
        return f"the scan has {volume.channels} channels, the model takes {len(channels)} ({', '.join(channels)})"
    return next((str(one) for one in unlike(volume, package) if one.severity != "note"), None)


def require_some(models: Mapping[str, ModelPackage | str]) -> None:
    """InputError where there is no model to choose from."""
    if not models:
        raise InputError("no model is named, and there is none on this machine", _ANOTHER)


def require_fit(volume: Volume, package: ModelPackage, name: str) -> None:
    """InputError for a scan that the model of that name is not for."""
    if why := unfit(volume, package):
        raise InputError(
            f"it is no scan for {name}, the model that was taken for this call ({why})",
            "Name a model with -m, or predict it in a call of its own",
        )


def choose_model(volume: Volume, models: Mapping[str, ModelPackage | str]) -> str:
    """The name of the one model that a scan is for. ``models`` may hold, in place of a package, why
    there is none.

    Raises InputError where it is for none, with the reason for each, and where it is for several. One
    and the same model under several names counts once.
    """
    why = {name: one if isinstance(one, str) else unfit(volume, one) for name, one in models.items()}
    fitting = {one.digest(): name for name, one in models.items() if isinstance(one, ModelPackage) and not why[name]}
    if len(fitting) > 1:
        names = ", ".join(fitting.values())
        raise InputError(f"it is a scan for {len(fitting)} models on this machine ({names})", "Name one with -m")
    if not fitting:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in why.items())
        remedy = f"{_ANOTHER}; or name one of these with -m where it is meant all the same"
        raise InputError("it is no scan for any model on this machine", f"{remedy}. Why not:{lines}")
    return next(iter(fitting.values()))

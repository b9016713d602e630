"""What can go wrong, as types. The command line turns each into one line and an exit status."""

from __future__ import annotations


class MedsegError(Exception):
    """The work failed. Exit status 1."""

    exit_status = 1


class InputError(MedsegError):
    """The input is wrong: which case, what is wrong with it, and how to mend it. Exit status 2.

    The text never holds patient names or identifiers other than the case's own id.
    """

    exit_status = 2

    def __init__(self, fault: str, remedy: str, *, case: str | None = None) -> None:
        self.fault = fault
        self.remedy = remedy
        self.case = case
        where = f"case {case}: " if case else ""
        super().__init__(f"{where}{fault.rstrip('.')}. {remedy.rstrip('.')}.")

    def of_case(self, case: str) -> InputError:
        """The same fault, said of a case."""
        return InputError(self.fault, self.remedy, case=case)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders; BaseException would rebuild this one from its text alone.
        return (_rebuild, (self.fault, self.remedy, self.case))


def _rebuild(fault: str, remedy: str, case: str | None) -> InputError:
    return InputError(fault, remedy, case=case)

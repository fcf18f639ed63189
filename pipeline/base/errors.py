"""Errors in the input, and how their messages quote foreign text."""

import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a user's quota, or the maximum file size


class DataError(Exception):
    """Input that cannot be used; the message names the file, row, column or option and says what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SettingError(DataError):
    """Settings that conflict; a command reports them as a usage error."""


class MachineError(DataError):
    """A failure of this machine rather than of its input; another machine may succeed."""


class MissingPackageError(DataError, ImportError):
    """A package of an optional extra is not installed; the message is the command that installs it."""


@contextmanager
def needs(extra: str, user: str = "") -> Iterator[None]:
    """Wrap imports of an extra's packages: raises MissingPackageError, which names the extra and its user."""
    try:
        yield
    except ModuleNotFoundError as error:  # not one of an inner extra, nor a package that cannot be loaded
        package = error.name.partition(".")[0] if error.name else error
        install = f"{package} is missing: pip install 'chexpert-pipeline[{extra}]'"
        raise MissingPackageError(f"{user}: {install}" if user else install) from None


def explain_os_error(error: OSError) -> str:
    """Why the system refused, and what to do if a disk or a user's quota is full."""
    advice = {errno.EMFILE: "; raise the limit, as by ulimit -n 4096"}
    advice |= dict.fromkeys(FULL[:2], "; make room, and run it again")
    return f"{error.strerror or error}{advice.get(error.errno or 0, '')}"


def printable(text: str, kept: str = "\n") -> str:
    """A text that may quote user-supplied files, without the control characters that a terminal would obey."""
    return "".join(char if char.isprintable() or char in kept else repr(char)[1:-1] for char in text)


def quote(text: str, longest: int) -> str:
    """The beginning of user-supplied text, on one line of a message."""
    return printable(text[:longest], kept="") + ("…" if len(text) > longest else "")


def describe_difference(before: Mapping[str, object], now: Mapping[str, object], names: Iterable[str]) -> str:
    """The first of these settings that differs, in words; "" if none does."""
    for name in names:
        if before.get(name) != now.get(name):
            return f"{name} is {before.get(name)}, not {now.get(name)}"
    return ""

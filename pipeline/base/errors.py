"""Errors in the input, and how their messages quote foreign text."""

import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a user's share of it, or the longest file


class DataError(Exception):
    """Input that cannot be used; the message names the file, row, column or option and says what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SettingError(DataError):
    """Settings that do not go together; a command reports them as wrong usage."""


class MachineError(DataError):
    """A failure of this machine rather than of its input; another machine may do better."""


class MissingPackageError(DataError, ImportError):
    """A package of an extra that is not installed; the message is the command that installs it."""


@contextmanager
def needs(extra: str, user: str = "") -> Iterator[None]:
    """Around imports of packages that an extra brings: raises MissingPackageError, which names it, and the user."""
    try:
        yield
    except MissingPackageError:  # of an inner extra
        raise
    except ModuleNotFoundError as error:  # others are of a package that is there, and cannot be loaded
        package = error.name.partition(".")[0] if error.name else error
        install = f"{package} is missing: pip install 'chexpert-pipeline[{extra}]'"
        raise MissingPackageError(f"{user}: {install}" if user else install) from None


def explain_os_error(error: OSError) -> str:
    """Why the system refused, and what to do where a disk, or a user's share of it, is full."""
    advice = {errno.EMFILE: "; raise the limit, as by ulimit -n 4096"}
    advice |= dict.fromkeys(FULL[:2], "; make room, and run it again")
    return f"{error.strerror or error}{advice.get(error.errno or 0, '')}"


def printable(text: str, kept: str = "\n") -> str:
    """A text that may quote others' files, without the control characters that a terminal would obey."""
    return "".join(char if char.isprintable() or char in kept else repr(char)[1:-1] for char in text)


def quote(text: str, longest: int) -> str:
    """The beginning of another's text, on one line of a message."""
    return printable(text[:longest], kept="") + ("…" if len(text) > longest else "")


def describe_difference(there: Mapping[str, object], here: Mapping[str, object], names: Iterable[str]) -> str:
    """The first of these settings that differs, in words; "" where none does."""
    for name in names:
        if there.get(name) != here.get(name):
            return f"{name} is {there.get(name)} there and {here.get(name)} here"
    return ""

"""Errors of input, and how their messages quote others' texts."""

from collections.abc import Iterable, Mapping


class DataError(Exception):
    """Input that cannot be used; the message names the file, row, column or option and says what to do."""


class SettingError(DataError):
    """Settings that do not go together; a command reports them as wrong usage."""


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

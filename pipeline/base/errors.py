"""Errors of input, and how they quote the texts of others."""


class DataError(Exception):
    """Input that cannot be used; the message names the file, row, column or option and says what to do."""


class SettingError(DataError):
    """Settings that do not go together; a command takes it for wrong usage."""


def printable(text: str) -> str:
    """A text that may quote others' files, without the control characters that a terminal would obey."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)

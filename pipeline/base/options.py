"""An option is a field of a dataclass: its type, default, help and check in one place.

    lr: float = option(1e-4, "Peak learning rate.", low=0, open=True)

Commands (by `pipeline.console.command`), the check of config.json, sweeps and the page of options (make docs) are
generated from these fields.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import MISSING, field, fields
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from pipeline.base.errors import SettingError


class Option(NamedTuple):
    """How a field appears on the command line, and which values it may have."""

    help: str = ""
    group: str | None = None  # under which --help lists it
    choices: Collection[str] = ()
    low: float = -math.inf
    high: float = math.inf
    open: bool = False  # low and high themselves are not allowed
    check: Callable[[str], object] | None = None  # raises DataError for a text that is not allowed
    parse: Callable[[str], object] | None = None  # text → value, or an element of a tuple's; raises DataError
    split: Callable[[str], tuple[object, ...]] | None = None  # text → a tuple's elements; raises DataError
    type: Any = None  # click's, if the field's own and the above do not determine it
    metavar: str | None = None
    shown: str | None = None  # in place of the default
    flag: str | None = None  # in place of the field's name
    argument: bool = False  # positional

    def allows(self, value: object) -> bool:
        """Whether a value of the field's type is allowed. Raises DataError as `check` does."""
        if isinstance(value, (int, float)):
            within = self.low < value < self.high if self.open else self.low <= value <= self.high
            return within and math.isfinite(value)
        if self.check is not None and isinstance(value, str):
            self.check(value)
        values = value if isinstance(value, tuple) else (value,)
        return not self.choices or (bool(values) and set(values) <= set(self.choices))


def option(default: object, help: str = "", **more: Any) -> Any:  # noqa: A002 - as click calls it
    """A field that is an option: required if the default is `...`; `more` are further fields of Option."""
    metadata = {"option": Option(help, **more)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=MISSING if default is ... else default, metadata=metadata)


def list_options(kind: type) -> dict[str, Option]:
    """The options of a dataclass by the names of their fields."""
    return {item.name: item.metadata["option"] for item in fields(kind) if "option" in item.metadata}


def check_values(values: object) -> None:
    """Raise SettingError if a value of a dataclass has another type than its field, or its option does not allow it."""
    options = list_options(type(values))
    for name, kind in get_type_hints(type(values)).items():
        value = getattr(values, name)
        kinds = get_args(kind) if isinstance(kind, UnionType) else (get_origin(kind) or kind,)
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if not fits or (value is not None and name in options and not options[name].allows(value)):
            raise SettingError(f"{name} is {value!r}")

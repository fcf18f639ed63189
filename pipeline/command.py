"""Fields of a dataclass → options of a click command, and the types of their values."""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from pipeline.base.errors import DataError, SettingError
from pipeline.base.options import Option, list_options, option
from pipeline.console import name_options


class Number(click.FloatRange):
    """A number in a range; nan, which passes every comparison, and infinity are in no range."""

    name = "number"

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        if not math.isfinite(number := super().convert(value, param, ctx)):
            self.fail(f"{value} is not a finite number", param, ctx)
        return float(number)


class PathOrUrl(click.Path):
    """A path, or a URL as written: whether it exists is checked later."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """The path, or the text of the URL."""
        text = str(value)
        return text if "://" in text else Path(os.fsdecode(super().convert(text, param, ctx)))


class Parsed(click.ParamType[object]):
    """The value that the library parses from a text, or the checked text; its DataError becomes a usage error."""

    name = "text"

    def __init__(self, parse: Callable[[str], object], keeps_text: bool) -> None:
        self.parse, self.keeps_text = parse, keeps_text

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """The value."""
        try:
            parsed = self.parse(str(value))
        except DataError as error:
            self.fail(name_options(str(error)), param, ctx)
        return str(value) if self.keeps_text else parsed


FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path, exists=True)
EXISTING_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def pictures_option() -> Any:
    """The option that writes a page's figures for slides, too: `pages.pictures`."""
    return option(None, "Also write the page's figures as PNG files to this folder.", type=FOLDER, metavar="DIR")


class Several(tuple[object, ...]):
    """Values of an option, each of which a command tries."""


class FieldOption(click.Option):
    """An option made from a field; `several` values of it may be given as one text."""

    def __init__(self, names: Sequence[str], item: Option, several: bool, **more: Any) -> None:
        super().__init__(names, help=item.help, **more)
        self.group, self.several = item.group, several
        self.separator = r"\s+" if item.check else r"[\s,]+"  # a policy contains commas

    def type_cast_value(self, ctx: click.Context, value: object) -> object:
        """The value; of several, Several: without repetitions, separated by spaces or commas."""
        if not self.several or not isinstance(value, str):
            return super().type_cast_value(ctx, value)
        try:
            return Several([super().type_cast_value(ctx, value)])
        except click.BadParameter:
            words = re.split(self.separator, value.strip())
        if words == [""]:
            raise click.BadParameter("no value", ctx, self)
        return Several(dict.fromkeys(self.type(word, self, ctx) for word in words))


class GroupedCommand(click.Command):
    """A command whose --help lists its options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(param, "group", None) or "options", []).append(record)
        for group, records in sections.items():
            with formatter.section(group.capitalize()):
                formatter.write_dl(records)


class Fields(NamedTuple):
    """The fields of a dataclass that are options of a command: all, or those of these names."""

    kind: type
    names: Sequence[str] = ()
    several: bool = False  # an option may take several values, and the command gets a dict of all options

    def build(self, given: Mapping[str, object]) -> object:
        """The command's arguments; omitted options have the field's default."""
        names = self.names or list_options(self.kind)
        values = {name: given[name] for name in names if name in given}
        return values if self.several else self.kind(**values)


def command(name: str, *kinds: type | Fields, example: str = "") -> Callable[[Callable[..., object]], click.Command]:
    """Click's command, which is called with an instance of each dataclass, in order; their fields are its options.

    Its help is the function's docstring, which may end with a paragraph "Example: …" instead of `example`.
    """
    parts = [kind if isinstance(kind, Fields) else Fields(kind) for kind in kinds]
    params = [param for part in parts for param in _make_params(part)]
    params.sort(key=lambda param: isinstance(param, click.Option))  # arguments first, as they are typed

    def decorate(function: Callable[..., object]) -> click.Command:
        def call(**values: object) -> object:
            source = click.get_current_context().get_parameter_source
            given = {name: value for name, value in values.items() if source(name) != ParameterSource.DEFAULT}
            try:
                return function(*(part.build(given) for part in parts))
            except SettingError as error:
                raise click.UsageError(name_options(str(error))) from None

        text, _, last = (inspect.getdoc(function) or "").partition("

Example: ")
        line, _, _ = text.partition("
")  # which click would cut at the width of the terminal
        return GroupedCommand(name, None, call, params, text, f"Example: {example or last}", line)

    return decorate


def _make_params(part: Fields) -> Iterator[click.Parameter]:
    """Click's options, and arguments, for fields."""
    kinds, options = get_type_hints(part.kind), list_options(part.kind)
    known = {item.name: item for item in fields(part.kind)}
    for name in part.names or options:
        item, kind, default = options[name], kinds[name], known[name].default
        flag = f"--{(item.flag or name).replace('_', '-')}"
        if bool in (kind, *get_args(kind)):
            switch = flag if kind is bool else f"{flag}/--no-{flag[2:]}"
            shown = {"show_default": item.shown} if item.shown else {}
            yield FieldOption([name, switch], item, False, is_flag=True, default=default, **shown)
            continue
        multiple = get_origin(kind) is tuple and item.split is None
        chosen = _choose_type(kind, item)
        metavar = flag.rpartition("-")[2].upper() if isinstance(chosen, Parsed) else None
        more: dict[str, Any] = {"type": chosen, "metavar": item.metavar or metavar}
        more["required"] = default is known[name].default_factory  # both are MISSING
        if item.argument:
            yield click.Argument([name], nargs=-1 if multiple else 1, **more)
            continue
        if item.shown or default in (None, MISSING, (), ""):
            more["show_default"] = item.shown or False
        else:
            more["default"] = default
        several = part.several and get_origin(kind) is not tuple
        yield FieldOption([name, flag], item, several, multiple=multiple, **more)


def _choose_type(kind: object, item: Option) -> click.ParamType[Any]:
    """Click's type of a value."""
    if item.type is not None:
        chosen: click.ParamType[Any] = item.type
        return chosen
    if parse := item.split or item.parse or item.check:
        return Parsed(parse, keeps_text=parse is item.check)
    if item.choices:
        return click.Choice(list(item.choices), case_sensitive=False)
    kinds = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is tuple else (kind,)
    low, high = (None if math.isinf(limit) else limit for limit in (item.low, item.high))
    if int in kinds:
        return click.IntRange(low, high)  # type: ignore[arg-type]  # limits of an int are ints
    if float in kinds:
        return Number(low, high, item.open and low is not None, item.open and high is not None)
    return click.Path(path_type=Path) if Path in kinds else click.STRING

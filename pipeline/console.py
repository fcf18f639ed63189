"""Shared by all commands: exit codes, lines on stderr, a progress bar, and options made of the fields of a dataclass.

Exit codes: 0 done, 1 failed, 2 usage, 3 done but with rejects under --strict, 130 interrupted, 143 terminated.
"""

import inspect
import io
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from pipeline.base.errors import FULL, DataError, SettingError, explain_os_error, printable
from pipeline.base.options import Option, list_options, option
from pipeline.base.workers import skip_pandas

# How libraries report that memory ran out, for a code segment, an array or a thread.
NO_MEMORY = ("failed to map segment", "annot allocate memory", "launch worker thread", "can't start new thread")
LEAST_MEMORY = 3 * 2**30  # bytes of address space: with less, OpenBLAS crashes or waits forever while it is loaded
LINE_SECONDS = 10.0  # between plain lines if there is no terminal
# SIGTERM, whose exception Python drops if it is raised in a finalizer: the next progress raises it again.
_received: list[int] = []
Advance = Callable[..., None]  # reports (done, total, note=""); the note is shown beside the bar
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path, exists=True)
EXISTING_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Advance]:
    """Show a bar on stderr, or a plain line every few seconds if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, texts = Console(stderr=True), (TextColumn(unit), TextColumn("{task.fields[note]}"))
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), *texts, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, note="")
        last, printed = time.monotonic(), -1
        first: tuple[int, float] | None = None  # done at the first call, by an earlier start too; and when

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal last, printed, first
            if _received:
                sys.exit(143)
            bar.update(task, completed=done, total=total, note=note)
            now = time.monotonic()
            first = first or (done, now)
            if not console.is_terminal and done != printed and (done == total or now - last > LINE_SECONDS):
                last, printed = now, done
                left = show_left((now - first[1]) / max(done - first[0], 1) * (total - done))
                click.echo(f"{title}: {done:,} of {total:,} {unit}{note and '  '}{note}{left}", err=True)

        yield advance


def show_left(seconds: float) -> str:
    """The time left, for the end of a line; nothing below a minute."""
    if seconds < 60:
        return ""
    return f"  {seconds / 60:.0f} min left" if seconds < 5400 else f"  {seconds / 3600:.1f} h left"


def name_options(text: str) -> str:
    """A message of the library, whose parameters are written `max_bad`, with a command's options: --max-bad."""
    return re.sub("`([a-z_]+)`", lambda match: f"--{match[1].replace('_', '-')}", text)


def count_of(count: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def echo(text: str) -> None:
    """Print results on stdout, without control characters that they may quote from files."""
    click.echo(printable(text))


def say(text: str) -> None:
    """Print a line on stderr, as `echo` does: stdout is for results."""
    click.echo(printable(name_options(text)), err=True)


@cache
def say_once(text: str) -> None:
    """Print a line on stderr, unless this process has done so: a sweep trains many runs."""
    say(text)


def say_next(*words: object) -> None:
    """Print the command to type next, on stderr; by its path if the shell would run another or none."""
    name, *rest = map(str, words)
    script = Path(sys.executable).with_name(name)
    if script.exists() and shutil.which(name) != str(script):
        name = min(os.path.relpath(script), str(script), key=len)
    say(f"next: {shlex.join([name, *rest])}")


def refuse_usage(wrong: object, text: str) -> None:
    """Raise a usage error with this text if a check fails."""
    if wrong:
        raise click.UsageError(text)


def _terminate(number: int, _: object) -> NoReturn:
    _received.append(number)
    sys.exit(143)


def run_command(command: click.Command, context: object = None) -> None:
    """Run a click command, then exit, with our error lines and exit codes; `context` is for its `click.pass_obj`."""
    command.callback = skip_pandas  # which a group calls before the command, and not for --help
    # As an exception, so that clean-up runs: by default SIGTERM ends Python on the spot.
    signal.signal(signal.SIGTERM, _terminate)
    # A shell that runs this in the background has it ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Print a name that is not UTF-8 with escapes, as stderr does.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < LEAST_MEMORY and not {"--help", "--version"} & {*sys.argv}:  # RLIM_INFINITY is -1
        allowed = f"the limit (ulimit -v) is {limit // 1024:,} kB; raise it to {LEAST_MEMORY // 1024:,}"
        say(f"Error: not enough memory: {allowed}")
        sys.exit(1)
    try:
        sys.exit(command.main(standalone_mode=False, obj=context))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except Exception as error:
        if not (reason := _describe(error)):
            raise
        say(f"Error: {reason}")
        sys.exit(1)


def _describe(error: Exception) -> str:
    """What went wrong; "" for a bug in this program."""
    if isinstance(error, UnicodeEncodeError):  # Arrow, JSON and TensorBoard take no path that is not UTF-8
        if (encoding := sys.getfilesystemencoding()) != "utf-8":
            return f"{error.object[:1000]}: not {encoding}, which the locale asks for; set LC_ALL=C.UTF-8"
        return f"{error.object[:1000]}: not UTF-8; rename that file or folder"
    if isinstance(error, OSError):  # such as a folder that may not be written to, or a pipe without a name
        place = error.filename or ("stdout" if error.errno in FULL else "")  # those of files have their names
        return f"{place}: {explain_os_error(error)}" if place else explain_os_error(error)
    if isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY):
        return f"not enough memory: {error}; raise the limit (ulimit -v), or use a larger machine"
    return str(error) if isinstance(error, DataError) else ""


class _Number(click.FloatRange):
    """A number in a range; nan, which passes every comparison, and infinity are in no range."""

    name = "number"

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if not math.isfinite(number := super().convert(value, param, ctx)):
            self.fail(f"{value} is not a finite number", param, ctx)
        return float(number)


class PathOrUrl(click.Path):
    """A path, or a URL as written: whether it exists is checked later."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """The path, or the text of the URL."""
        text = str(value)
        return text if "://" in text else Path(os.fsdecode(super().convert(text, param, ctx)))


class _Parsed(click.ParamType[object]):
    """The value that the library parses from a text, or the checked text; its DataError becomes a usage error."""

    name = "text"

    def __init__(self, parse: Callable[[str], object], keeps_text: bool) -> None:
        self.parse, self.keeps_text = parse, keeps_text

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        try:
            parsed = self.parse(str(value))
        except DataError as error:
            self.fail(name_options(str(error)), param, ctx)
        return str(value) if self.keeps_text else parsed


def pictures_option() -> Any:
    """The option that writes a page's figures for slides, too: `pages.pictures`."""
    return option(None, "Also write the page's figures as PNG files to this folder.", type=FOLDER, metavar="DIR")


class Several(tuple[object, ...]):
    """Values of an option, each of which a command tries."""


class _FieldOption(click.Option):
    """An option made from a field; `several` values of it may be given as one text, separated by spaces or commas."""

    def __init__(self, names: Sequence[str], item: Option, several: bool, **more: Any) -> None:
        super().__init__(names, help=item.help, **more)
        self.group, self.several = item.group, several
        self.separator = r"\s+" if item.check else r"[\s,]+"  # a policy contains commas

    def type_cast_value(self, ctx: click.Context, value: object) -> object:
        if not self.several or not isinstance(value, str):
            return super().type_cast_value(ctx, value)
        try:
            return Several([super().type_cast_value(ctx, value)])
        except click.BadParameter:
            words = re.split(self.separator, value.strip())
        if words == [""]:
            raise click.BadParameter("no value", ctx, self)
        return Several(dict.fromkeys(self.type(word, self, ctx) for word in words))


class _GroupedCommand(click.Command):
    """A command whose --help lists its options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
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

        text, _, last = (inspect.getdoc(function) or "").partition("\n\nExample: ")
        line, _, _ = text.partition("\n")  # which click would cut at the width of the terminal
        return _GroupedCommand(name, None, call, params, text, f"Example: {example or last}", line)

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
            yield _FieldOption([name, switch], item, False, is_flag=True, default=default, **shown)
            continue
        multiple = get_origin(kind) is tuple and item.split is None
        chosen = _choose_type(kind, item)
        metavar = flag.rpartition("-")[2].upper() if isinstance(chosen, _Parsed) else None
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
        yield _FieldOption([name, flag], item, several, multiple=multiple, **more)


def _choose_type(kind: object, item: Option) -> click.ParamType[Any]:
    """Click's type of a value."""
    if item.type is not None:
        return item.type  # type: ignore[no-any-return]
    if parse := item.split or item.parse or item.check:
        return _Parsed(parse, keeps_text=parse is item.check)
    if item.choices:
        return click.Choice(list(item.choices), case_sensitive=False)
    kinds = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is tuple else (kind,)
    low, high = (None if math.isinf(limit) else limit for limit in (item.low, item.high))
    if int in kinds:
        return click.IntRange(low, high)  # type: ignore[arg-type]  # limits of an int are ints
    if float in kinds:
        return _Number(low, high, item.open and low is not None, item.open and high is not None)
    return click.Path(path_type=Path) if Path in kinds else click.STRING

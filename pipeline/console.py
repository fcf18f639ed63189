"""Shared by all commands: exit codes, lines on stderr, and a progress bar.

Exit codes: 0 done, 1 failed, 2 usage, 3 done but with rejects under --strict, 130 interrupted, 143 terminated.
"""

import io
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NoReturn

import click

from pipeline.base.errors import FULL, DataError, explain_os_error, printable
from pipeline.base.workers import skip_pandas

# How libraries report that memory ran out, for a code segment, an array or a thread.
NO_MEMORY = ("failed to map segment", "annot allocate memory", "launch worker thread", "can't start new thread")
LEAST_MEMORY = 3 * 2**30  # bytes of address space: with less, OpenBLAS crashes or waits forever while it is loaded
LINE_SECONDS = 10.0  # between plain lines if there is no terminal
# SIGTERM, whose exception Python drops if it is raised in a finalizer: the next progress raises it again.
_received: list[int] = []


Advance = Callable[..., None]  # reports (done, total, note=""); the note is shown beside the bar


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Advance]:
    """Show a bar on stderr, or a plain line every few seconds if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = [TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit)]
    columns += [TextColumn("{task.fields[note]}"), TimeRemainingColumn()]
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
    """Run a click command with this project's error lines and exit codes; never returns.

    `context` is handed to commands that ask for it by `click.pass_obj`.
    """
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

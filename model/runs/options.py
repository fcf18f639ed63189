"""Fields of Config → options of a command, and types of option values that only `train.py` needs."""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import click

from model.names import XRV, check_arch
from model.runs.config import ENSEMBLE, Config, Option, options, parse_labels, read_config
from pipeline.base.errors import DataError
from pipeline.base.workers import share_of_cores
from pipeline.console import Checked, Number, Parsed
from pipeline.manifest import read_manifest

GROUPS = ("sweep", "run", "data", "labels", "network", "optimization")


def parse_size(text: str) -> int:
    """Bytes, of 500MB, 20GB or 1.5TB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])B", text)
    if match is None:
        raise DataError(f"'{text}' is not like 500MB, 20GB or 1.5TB")
    return int(float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2]])


def parse_shares(text: str) -> tuple[float, ...]:
    """Positive numbers, separated by commas."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < math.inf for share in shares):
        raise DataError(f"'{text}' is not like 0.7,0.3")
    return shares


class Values(click.ParamType[tuple[Any, ...]]):
    """One or more values of an option, separated by spaces or commas, without repetitions."""

    name = "values"

    def __init__(self, one: click.ParamType[Any]) -> None:
        self.one = one

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """The values in the order given."""
        # A policy has commas of its own.
        words = (
            str(value).split() if isinstance(self.one, Checked) else re.split(r"[\s,]+", str(value).strip())
        )
        if not words or words == [""]:
            self.fail("no value", param, ctx)
        return tuple(dict.fromkeys(self.one.convert(word, param, ctx) for word in words))


class InitPath(click.Path):
    """A path, or xrv:NAME as one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        return Path(value) if str(value).startswith(XRV) else super().convert(value, param, ctx)


class GroupedOption(click.Option):
    """An option that `--help` lists among those that decide the same."""

    def __init__(self, *arguments: Any, group: str, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose `--help` lists its options by what they decide."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group."""
        params = self.get_params(ctx)
        for group in (*GROUPS, None):
            found = [param for param in params if getattr(param, "group", None) == group]
            records = [record for param in found if (record := param.get_help_record(ctx)) is not None]
            if records:
                with formatter.section((group or "other").capitalize()):
                    formatter.write_dl(records)


def grouped(group: str, *names: str, **more: Any) -> Callable[[Any], Any]:
    """An option, as click's, that `--help` lists in a group."""
    return click.option(*names, cls=GroupedOption, group=group, **more)


run_option = grouped(
    "run", "--run", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)
runs_option = grouped(
    "run",
    "--run",
    "runs",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="Folder of the run, or of an ensemble; several make an ensemble.",
)
workers_option = grouped(
    "run",
    "--workers",
    default=share_of_cores,
    type=click.IntRange(1),
    show_default="cores",
    help="Decoding threads.",
)
SHARDS_HELP = "Folder of shards, or its URL: https://… or s3://…; several are read as one."
own_shards_option = grouped(
    "data", "--shards", multiple=True, show_default="those the run was trained on", help=SHARDS_HELP
)
DATA_OPTIONS = [
    grouped(
        "data",
        "--shards",
        multiple=True,
        default=["shards"],
        help=SHARDS_HELP,
    ),
    grouped(
        "data",
        "--cache",
        type=click.Path(path_type=Path),
        default=Path(".cache"),
        help="Cache folder of shards from URLs, shared by all runs.",
    ),
    grouped(
        "data",
        "--cache-size",
        type=Parsed(parse_size, "size"),
        default="20GB",
        help="Evict the least recently used shards above this size.",
    ),
    workers_option,
]


shared_images_option = grouped(
    "data",
    "--shared-images",
    is_flag=True,
    help="Allow images the weights were trained on.",
)


def read_own_shards(run: Path) -> tuple[str, ...]:
    """Folders, or URLs, of the shards that a run was last trained on; `shards` where it does not say."""
    try:
        lines = (run / "environment.jsonl").read_text().splitlines()
        shards = json.loads(lines[-1])["shards"]
    except (OSError, ValueError, LookupError, TypeError):
        return ("shards",)
    return tuple(name if "://" in name else os.path.relpath(run / name) for name in shards)


def check_folders(shards: Sequence[str] = (), runs: Sequence[Path] = ()) -> None:
    """Raise DataError for a folder without shards or without a run, before torch is imported."""
    for folder in shards:
        if "://" not in folder:
            read_manifest(Path(folder))
    for run in runs:
        if not (run / ENSEMBLE).exists():
            read_config(run)


def with_options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The decorators in the order in which `--help` lists their options."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def config_options(
    several: Sequence[str] = (), only: Collection[str] | None = None
) -> list[Callable[[Any], Any]]:
    """An option for each field of Config that has one, or for `only` these; those in `several` take several values."""
    defaults = {one.name: one.default for one in fields(Config)}
    return [
        _make_option(name, of, defaults[name], several=name in several)
        for name, of in options().items()
        if only is None or name in only
    ]


def _make_option(name: str, of: Option, default: Any, *, several: bool) -> Callable[[Any], Any]:
    kind = get_type_hints(Config)[name]
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        return grouped(of.group, flag, is_flag=True, help=of.help)
    more: dict[str, Any] = {"help": of.help, "metavar": of.metavar}
    one = _value_type(kind, of)
    if of.shown is None and default is not None and default != ():
        more |= {"default": str(default) if several else default}
    else:
        more |= {"show_default": of.shown or False}
    if kind == tuple[str, ...] and not of.choices:
        more |= {"multiple": True}
    return grouped(of.group, flag, type=Values(one) if several else one, **more)


def _value_type(kind: Any, of: Option) -> click.ParamType[Any]:
    """What click makes of a value."""
    low, high = (None if abs(limit) == float("inf") else limit for limit in (of.low, of.high))
    if kind in (int, int | None):
        return click.IntRange(None if low is None else int(low), None if high is None else int(high))
    if kind in (float, float | None):
        return Number(low, high, min_open=of.open and low is not None, max_open=of.open and high is not None)
    if kind == tuple[float, ...]:
        return Parsed(parse_shares, "shares")
    if kind == tuple[str, ...]:
        return Parsed(parse_labels, "labels") if of.choices else click.STRING
    if of.check is check_arch:
        return Parsed(check_arch, "name")  # in a list of several, unlike a policy, also separated by commas
    if of.check is not None:
        return Checked(of.check)
    return click.Choice(list(of.choices), case_sensitive=False)

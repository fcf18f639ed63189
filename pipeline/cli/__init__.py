"""The `pipeline` command: parse, call, print.

A command's module is imported when the command runs, so that `--help` is quick.
"""

import os
import sys
from importlib import import_module

import click

from pipeline.base.workers import start_server
from pipeline.console import run_command

COMMANDS = {  # name → module, and its line in --help
    "sample": ("making", "Write a synthetic CheXpert, to try things out."),
    "shards": ("making", "Write a data set as shards: tars, Arrow tables, a manifest."),
    "verify": ("making", "Check shards against their manifest."),
    "stats": ("looking", "Count the labels of shards, folders or CSVs."),
    "audit": ("looking", "Ask which non-disease factors predict each label."),
    "judge": ("looking", "Judge scores of any network or reader."),
}


class _Menu(click.Group):
    """A group of the commands in COMMANDS, each imported when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if COMMANDS[cmd_name][0] == "making":  # no algebra: the threads for it would wait by spinning
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        if cmd_name == "shards" and "--help" not in sys.argv and not ctx.resilient_parsing:
            # The workers' imports take as long as its own.
            start_server(["pipeline.etl.shards", "pipeline.sources.sets"])
        command: click.Command = getattr(import_module(f"pipeline.cli.{COMMANDS[cmd_name][0]}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=_Menu, context_settings={"show_default": True})
@click.version_option(package_name="chexpert-pipeline")
def cli() -> None:
    """Convert chest X-ray datasets to WebDataset shards; count, audit and judge labels and scores."""


def main() -> None:
    """Run the command; errors become one line and an exit code."""
    run_command(cli)

"""The `pipeline` command: parse, call, print.

Each command imports what it needs itself, so that `--help` is quick.
"""

import click

from pipeline.cli.looking import audit, judge, show, stats
from pipeline.cli.making import sample, shards, verify
from pipeline.console import run_command


@click.group(context_settings={"show_default": True})
@click.version_option(package_name="chexpert-pipeline")
def cli() -> None:
    """Turn chest X-ray data sets into WebDataset shards with Arrow label tables, and report on its labels."""


for command in (sample, shards, verify, stats, show, audit, judge):
    cli.add_command(command)


def main() -> None:
    """Run the command; errors become one line and an exit code."""
    run_command(cli)

"""Write docs/options.md, the options of all commands as their --help has them: .venv/bin/python -m docs.options."""

from pathlib import Path

import click

from model.runs.commands import main as train
from pipeline.cli import cli as pipeline

PAGE = Path(__file__).with_suffix(".md")


def render_options() -> str:
    """The page."""
    parts = [
        "# All options\n",
        "```\npipeline shards --help\npython -m train train --help\n```\n",
        "Written from the `--help` of each command by `python -m docs.options`.\n",
        "Options that `python -m train train` has too are not repeated under its other commands.\n",
    ]
    for group, name in ((pipeline, "pipeline"), (train, "python -m train")):
        context = click.Context(group, info_name=name, **group.context_settings)
        common: set[str] = set()
        # `train` first: it has what the others share.
        for command in sorted(group.commands.values(), key=lambda command: command.name != "train"):
            rows = list_options(command, context)
            parts.append(f"## {name} {command.name}\n\n{(command.help or '').partition(chr(10))[0]}\n")
            own = [row for row in rows if row not in common]
            if own:
                parts.append("\n".join(["| option | meaning |", "|---|---|", *own]) + "\n")
            common |= set(rows) if command.name == "train" else set()
    return "\n".join(parts)


def list_options(command: click.Command, context: click.Context) -> list[str]:
    """A row of a Markdown table for each option of a command but --help."""
    inner = click.Context(command, context, command.name)
    records = [
        record
        for option in command.params
        if isinstance(option, click.Option) and (record := option.get_help_record(inner)) is not None
    ]
    return [f"| `{escape(name)}` | {escape(text).strip()} |" for name, text in records]


def escape(text: str) -> str:
    """Text for a cell of a Markdown table; angle brackets and stars would be markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(render_options())

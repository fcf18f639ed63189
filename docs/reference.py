"""Write the pages of the site that are made from the code, options.md and modules.md, into a folder (make docs)."""

import ast
import sys
from pathlib import Path

import click

from model.runs.commands import main as train
from pipeline.cli import cli as pipeline

ROOT = Path(__file__).parents[1]


def write_reference(folder: Path) -> None:
    """Write both pages into a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.md").write_text(render_options())
    (folder / "modules.md").write_text(render_modules())


def render_options() -> str:
    """The options of each command, as its --help prints them."""
    parts = [
        "# Options\n",
        "`pipeline COMMAND --help` and `python -m train COMMAND --help` print the same.\n",
        "Options that `python -m train train` has too are not repeated for its other commands.\n",
    ]
    for group, name in ((pipeline, "pipeline"), (train, "python -m train")):
        context = click.Context(group, info_name=name, **group.context_settings)
        common: set[str] = set()
        # `train` first: it has the options that the others share.
        commands = filter(None, (group.get_command(context, entry) for entry in group.list_commands(context)))
        for command in sorted(commands, key=lambda command: command.name != "train"):
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


def render_modules() -> str:
    """Every module, with the first line of its docstring."""
    parts = ["# Modules\n"]
    paths = [path for package in ("pipeline", "model") for path in sorted((ROOT / package).rglob("*.py"))]
    # A package before its modules, and these before the packages in it.
    for path in sorted(paths, key=lambda path: (path.parent, path.name != "__init__.py", path)):
        text = escape((ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0])
        if path.name == "__init__.py":
            parts.append(f"\n## {path.parent.relative_to(ROOT)}\n\n{text}\n\n| module | |\n|---|---|")
        else:
            parts.append(f"| `{path.name}` | {text} |")
    return "\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text for a cell of a Markdown table; angle brackets and stars would be markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))

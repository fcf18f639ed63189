"""A table of texts, with three renderers: for a terminal, for a page and for a Markdown file.

    Table("AUROC", ("label", "valid"), [["Edema", "0.894"]]).print()

Every text may quote user-supplied files: each renderer sanitizes it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from pipeline.base.errors import printable
from pipeline.base.pages import open_templates

Heading = str | tuple[str, str]  # a column's, or that of some columns and each one's


@dataclass(frozen=True)
class Table:
    """Rows of cells, each starting with its name; the last `means` rows are set apart."""

    title: str
    columns: Sequence[Heading]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    means: int = 0
    kind: str = "figures"  # the class of the page's table
    folded: bool = False  # on a page, which then shows the title until it is opened

    @property
    def filled(self) -> bool:
        """Whether a cell holds more than dashes, and counts below the minimum."""
        return any("(few)" not in cell and re.search(r"\d", cell) for row in self.rows for cell in row[1:])

    def print(self) -> None:
        """Print it; in a terminal, the rows' names may wrap, but numbers are never cut."""
        if not self.rows:
            return
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(title=Text(printable(self.title)), title_justify="left", show_header=any(self.columns))
        grid.caption = Text("\n".join(map(printable, self.notes))) if self.notes else None
        for number, heading in enumerate(self.columns):
            text = printable(heading if isinstance(heading, str) else "\n".join(heading))
            width = max(len(line) for cell in (text, *(row[number] for row in self.rows)) for line in cell.split("\n"))
            fixed = {"justify": "right", "no_wrap": True, "min_width": width} if number else {}
            grid.add_column(Text(text), **fixed)  # type: ignore[arg-type]  # rich's own literals
        for number, row in enumerate(self.rows):
            last = number + 1 == len(self.rows) - self.means
            grid.add_row(*(Text(printable(cell)) for cell in row), end_section=bool(self.means) and last)
        console = Console()
        # A file or pipe has no width to fit.
        needed = console.measure(grid, options=console.options.update(width=1000))
        console.width = max(console.width, needed.minimum) if console.is_terminal else needed.maximum
        console.print(grid)

    def html(self, title: str | None = None) -> Markup:
        """The table under its title, or another, in a box that scrolls; nothing if no cell has a number."""
        if not self.filled:
            return Markup()
        columns = [heading if isinstance(heading, tuple) else ("", heading) for heading in self.columns]
        groups = [(group, len(list(part))) for group, part in groupby(group for group, _ in columns)]
        starts = {sum(span for _, span in groups[:place]) for place in range(1, len(groups)) if groups[place][0]}
        first = len(self.rows) - self.means
        values = {"title": self.title if title is None else title, "names": [name for _, name in columns]}
        parts = {"tbody": self.rows[:first], "tfoot": self.rows[first:]}
        template = open_templates("pipeline.base").get_template("table.html")
        page = template.render(values, table=self, groups=groups, starts=starts, parts=parts)
        return Markup(page.strip())  # noqa: S704 - each text is escaped

    def markdown(self) -> str:
        """A table of Markdown under its title, without markup of its own; nothing without rows."""
        if not self.rows:
            return ""
        names = [show_cell(heading if isinstance(heading, str) else ": ".join(heading)) for heading in self.columns]
        lines = [f"### {show_cell(self.title)}\n"] if self.title else []
        lines += [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
        lines += [f"| {' | '.join(map(show_cell, row))} |" for row in self.rows]
        lines += [f"\n{show_cell(note)}" for note in self.notes]
        return "\n".join(lines) + "\n"


def show_cell(text: str) -> str:
    """A text as a line of Markdown that holds no markup, and no end of a table's cell."""
    return " ".join(printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "/").split())

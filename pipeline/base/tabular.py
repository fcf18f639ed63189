"""A table of texts, with three renderers: for a terminal, for a page and for a Markdown file.

    Table("AUROC", ("label", "valid"), [["Edema", "0.894"]]).print()

Every text may quote user-supplied files: each renderer sanitizes it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup, escape

from pipeline.base.errors import printable

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
        title = self.title if title is None else title
        heading = f"<details><summary>{escape(title)}</summary>" if self.folded else f"<h3>{escape(title)}</h3>"
        parts = [heading] if title else []
        parts.append(f'<div class="scroll" tabindex="0" role="group" aria-label="table: {escape(title or self.kind)}">')
        parts.append(f'<table class="{self.kind}"><thead>{self._heads()}</thead>')
        first = len(self.rows) - self.means
        for tag, rows in (("tbody", self.rows[:first]), ("tfoot", self.rows[first:])):
            if rows:
                parts.append(f"<{tag}>")
                parts += [self._line(row) for row in rows]
                parts.append(f"</{tag}>")
        parts.append("</table></div>")
        parts += [f'<p class="note">{escape(note)}</p>' for note in self.notes]
        parts += ["</details>"] if self.folded else []
        return Markup("\n".join(parts))  # noqa: S704 - each text is escaped

    def _heads(self) -> str:
        """The rows of headings."""
        columns = [heading if isinstance(heading, tuple) else ("", heading) for heading in self.columns]
        groups = [(group, len(list(part))) for group, part in groupby(group for group, _ in columns)]
        above = [
            f'<th class="group" colspan="{span}">{escape(group)}</th>' if group else "<td></td>" * span
            for group, span in groups
        ]
        names = [f"<th{self._edge(number, 'start')}>{escape(name)}</th>" for number, (_, name) in enumerate(columns)]
        first = f"<tr>{''.join(above)}</tr>" if any(group for group, _ in groups) else ""
        return f"{first}<tr>{''.join(names)}</tr>"

    def _edge(self, column: int, name: str) -> str:
        """The class of a column that is the first of its group."""
        before, this = (self.columns[place] for place in (column - 1, column))
        inside = not isinstance(this, tuple) or (isinstance(before, tuple) and before[0] == this[0])
        return "" if inside or column == 0 else f' class="{name}"'

    def _line(self, row: Sequence[str]) -> str:
        """A row, with the limits in its cells apart from the numbers."""
        cells = [f"<th>{escape(row[0])}</th>"]
        for number, cell in enumerate(row[1:], 1):
            text = re.sub(r" (\[[^\]]*\])$", r' <span class="limits">\1</span>', str(escape(cell)))
            cells.append(f"<td{self._edge(number, 'group')}>{text}</td>")
        return f"<tr>{''.join(cells)}</tr>"

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

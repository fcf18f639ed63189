"""Shared by all pages: the layout (in `templates`), filters, matplotlib figures as SVG, and tables, also for terminals.

A page is one self-contained HTML file: no script, no network. Figures are drawn in the style sheet's colors, by their
names, which follow the page from light to dark; titles are HTML, never matplotlib's text. A table's texts may quote
user-supplied files: each of its renderers sanitizes them.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from pipeline.base.errors import printable
from pipeline.base.files import atomic_file

if TYPE_CHECKING:
    import jinja2
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Axes], None]

Size = tuple[float, float]  # in inches
Heading = str | tuple[str, str]  # a column's, or that of some columns and each one's
INK, FAINT, FIRST, SECOND, THIRD, FOURTH, PAPER = "ink", "faint", "first", "second", "third", "fourth", "paper"
POSITIVE, UNCERTAIN, NEGATIVE, BLANK = "positive", "uncertain", "negative", "blank"
ON_STATE = "on-state"  # for text on the three colors above, not on blank's
NAMED = (INK, FAINT, FIRST, SECOND, THIRD, FOURTH, PAPER, POSITIVE, UNCERTAIN, NEGATIVE, BLANK, ON_STATE)
INKS = {name: f"#0000{number:02}" for number, name in enumerate(NAMED, 1)}  # in a drawn SVG
SVG_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "path.simplify_threshold": 0.4,  # of a point: a curve of 20,000 images is as light as one of 200
    "font.size": 8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


@cache
def open_templates(package: str) -> "jinja2.Environment":
    """A package's templates, then the shared ones: a page extends `base.html`."""
    import jinja2  # imported here and below because they are slow, and a terminal shows figures, too

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader("pipeline.base")]),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": show_count, "figure": show_figure, "limits": show_limits, "cell": show_cell}
    return environment


def render(package: str, template: str, **values: object) -> str:
    """A template of a package with these values."""
    return open_templates(package).get_template(template).render(**values)


_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def pictures(folder: Path | None) -> Iterator[None]:
    """Also write each figure that a page draws as a PNG into a folder, if there is one; named by its description."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


@contextmanager
def _style(colors: Mapping[str, str]) -> Iterator[None]:
    """Draw in the style of pages, with these colors for NAMED."""
    import matplotlib

    for name in NAMED:
        matplotlib.colors.get_named_colors_mapping()[name] = colors[name]
    with matplotlib.rc_context(SVG_STYLE):
        yield


class Panel:
    """One pair of axes for several figures, one after the other: making them takes as long as drawing.

    `unit`: both axes from 0 to 1. `fitted`: with room for labels of any length, which takes twice the time.
    """

    def __init__(self, inches: Size, *, unit: bool = False, fitted: bool = False) -> None:
        self.size, self.unit, self.fitted = inches, unit, fitted
        with _style(INKS):
            self.figure, self.axes = self._make()

    def _make(self) -> "tuple[Figure, Axes]":
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, layout="constrained" if self.fitted else None)
        # Room for tick labels and the axes' names, in points.
        width, height, left = 72 * self.size[0], 72 * self.size[1], 33 if self.unit else 48
        place = (left / width, 30 / height, 1 - (left + 5) / width, 1 - 35 / height)
        axes = figure.subplots() if self.fitted else figure.add_axes(place)
        for patch in (figure.patch, axes.patch):
            patch.set_visible(False)
        if self.unit:
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
            axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
            axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
        return figure, axes

    def draw(self, draw: "Draw", description: str) -> Markup:
        """A figure as an SVG element for an HTML page, as wide as its container, by `draw` with colors of NAMED.

        The next figure clears its lines; limits and ticks stay unless `draw` sets them.
        """
        import matplotlib

        file = io.StringIO()
        for line in [*self.axes.lines]:
            line.remove()
        with _style(INKS), matplotlib.rc_context({"svg.hashsalt": description}):
            draw(self.axes)
            self.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        if (folder := _folder.get()) is not None:
            self._save_picture(draw, description, folder)
        body = file.getvalue().split("<svg", 1)[1].split(">", 1)[1]
        body = re.sub('<g id="[^"]*"', "<g", body)  # the same in every figure, and not referred to
        # A hundredth of a point is enough for coordinates; text stays unchanged.
        body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d{2,}", r"\1", tag[0]), body)
        for name, drawn in INKS.items():
            body = body.replace(drawn, "currentColor" if name == INK else f"var(--{name})")
        size = f"0 0 {72 * self.size[0]:g} {72 * self.size[1]:g}"
        return Markup(f'<svg role="img" aria-label="{escape(description)}" viewBox="{size}">' + body)  # noqa: S704

    def _save_picture(self, draw: "Draw", description: str, folder: Path) -> None:
        """Draw the figure with its description as title, in the style sheet's light colors, as a PNG."""
        style = files("pipeline.base").joinpath("templates/style.css").read_text()
        light = dict(reversed(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", style)))  # the first of each name
        name = re.sub(r"[^a-z0-9]+", "-", description.lower()).strip("-")
        with _style(light), atomic_file(folder / f"{name}.png") as file:
            figure, axes = self._make()
            figure.patch.set_visible(True)  # the page's is transparent, so that text would be drawn on itself
            draw(axes)
            axes.set_title(description, pad=6 if axes.get_legend() is None else 22)  # above a legend
            figure.savefig(file, format="png", dpi=200, facecolor="white", bbox_inches="tight")


def draw_svg(draw: "Draw", description: str, inches: Size, *, unit: bool = False, fitted: bool = False) -> Markup:
    """A figure of one pair of axes, as `Panel` draws it."""
    return Panel(inches, unit=unit, fitted=fitted).draw(draw, description)


def show_count(value: float | None) -> str:
    """A count with commas; an unknown one as a dash."""
    return "–" if value is None else f"{value:,.0f}"


def show_figure(value: float | None) -> str:
    """Three places; an undefined one as a dash."""
    return "–" if value is None else f"{value:z.3f}"


def show_limits(limits: Mapping[str, Any]) -> str:
    """An interval in brackets."""
    return "–" if limits["low"] is None else f"[{limits['low']:z.3f}, {limits['high']:z.3f}]"


def show_setting(value: object) -> str:
    """A value of the configuration as one line."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)


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

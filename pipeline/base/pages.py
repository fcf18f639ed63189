"""Shared by all pages: the style sheet and the layout (in `templates`), filters, and matplotlib figures as SVG.

A page is one self-contained HTML file: no script, no network. Each ink of a figure is drawn in a color
that stands for one of the style sheet's (`INKS`), so that figures follow the page from light to dark; titles are
HTML, never matplotlib's text.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    import jinja2
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, FIRST, SECOND, THIRD, FOURTH, PAPER = (f"#00000{number}" for number in range(1, 8))
POSITIVE, UNCERTAIN, NEGATIVE, BLANK, ON_STATE = (f"#00001{number}" for number in range(1, 6))
INKS = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
    FOURTH: "var(--fourth)",
    PAPER: "var(--paper)",
    POSITIVE: "var(--positive)",
    UNCERTAIN: "var(--uncertain)",
    NEGATIVE: "var(--negative)",
    BLANK: "var(--blank)",
    ON_STATE: "var(--on-state)",  # for text on the three colors above, not on blank's
}
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
    environment.filters |= {"count": show_count, "figure": show_figure, "limits": show_limits}
    return environment


_folder: ContextVar[Path | None] = ContextVar("folder", default=None)
PAINTED = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


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


def _save_picture(figure: "Figure", description: str, folder: Path) -> None:
    """Write a drawn figure with its description as title, in the style sheet's light colors."""
    from matplotlib.colors import to_hex, to_rgb, to_rgba_array

    from pipeline.base.files import atomic_file

    style = files("pipeline.base").joinpath("templates/style.css").read_text()
    light = dict(reversed(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", style)))  # the first of each name
    names = {ink: "ink" if shown == "currentColor" else shown[6:-1] for ink, shown in INKS.items()}  # var(--name)
    with ExitStack() as stack:  # which gives each artist its ink back, for the next figure on these axes
        for axes in figure.axes[:1]:
            axes.set_title(description)
            stack.callback(axes.set_title, "")
        for artist, name in product(figure.findobj(), PAINTED):
            read, write = (getattr(artist, f"{verb}_{name}", None) for verb in ("get", "set"))
            if read is None or write is None:
                continue
            before = [tuple(color) for color in to_rgba_array(read())]
            inks = [names.get(to_hex(color)) for color in before]
            if any(inks):
                pairs = zip(before, inks, strict=True)
                after = [(*to_rgb(light[ink]), color[3]) if ink else color for color, ink in pairs]
                write(after if len(after) > 1 else after[0])
                stack.callback(write, before if len(before) > 1 else before[0])
        name = re.sub(r"[^a-z0-9]+", "-", description.lower()).strip("-")
        with atomic_file(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=200, facecolor="white", bbox_inches="tight")


class Panel:
    """One pair of axes for several figures, one after the other: making them takes as long as drawing."""

    def __init__(self, inches: tuple[float, float], *, unit: bool = False, fitted: bool = False) -> None:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.width, self.height = (72 * side for side in inches)
        with matplotlib.rc_context(SVG_STYLE):
            figure = Figure(figsize=inches, layout="constrained" if fitted else None)
            # Room for tick labels and the axes' names, in points.
            left = 33 if unit else 48
            place = (left / self.width, 30 / self.height, 1 - (left + 5) / self.width, 1 - 35 / self.height)
            self.axes = figure.subplots() if fitted else figure.add_axes(place)
            if unit:
                self.axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
                self.axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
                self.axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
        figure.patch.set_visible(False)
        self.axes.patch.set_visible(False)
        self.canvas = FigureCanvasSVG(figure)

    def draw(self, draw: "Callable[[Axes], None]", description: str) -> Markup:
        """A figure as an SVG element for an HTML page, as wide as its container, by `draw` with colors of INKS.

        The next figure clears its lines; limits and ticks stay unless `draw` sets them.
        """
        import matplotlib

        file = io.StringIO()
        for line in [*self.axes.lines]:
            line.remove()
        with matplotlib.rc_context({**SVG_STYLE, "svg.hashsalt": description}):
            draw(self.axes)
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.canvas.print_svg(file, metadata=metadata)  # type: ignore[no-untyped-call]
            if (folder := _folder.get()) is not None:
                _save_picture(self.canvas.figure, description, folder)
        body = file.getvalue().split("<svg", 1)[1].split(">", 1)[1]
        body = re.sub('<g id="[^"]*"', "<g", body)  # the same in every figure, and not referred to
        # A hundredth of a point is enough for coordinates; text stays unchanged.
        body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d{2,}", r"\1", tag[0]), body)
        for drawn, shown in INKS.items():
            body = body.replace(drawn, shown)
        size = f"0 0 {self.width:g} {self.height:g}"
        return Markup(f'<svg role="img" aria-label="{escape(description)}" viewBox="{size}">' + body)  # noqa: S704


def draw_svg(
    draw: "Callable[[Axes], None]",
    description: str,
    inches: tuple[float, float],
    *,
    unit: bool = False,
    fitted: bool = False,
) -> Markup:
    """A figure of one pair of axes, as `Panel` draws it.

    `unit`: both axes from 0 to 1. `fitted`: with room for labels of any length, which takes twice the time.
    """
    return Panel(inches, unit=unit, fitted=fitted).draw(draw, description)


def show_count(value: int) -> str:
    """A count with commas."""
    return f"{value:,}"


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

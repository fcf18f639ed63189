"""Statistics of a source → one self-contained HTML page.

    pipeline stats shards --html labels.html

The page shows the numbers of `pipeline stats --format json`, for every grouping the source has.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
from markupsafe import Markup
from matplotlib.axes import Axes

from pipeline.base import pages
from pipeline.look import tables
from pipeline.look.plots import draw_audit, draw_cooccurrence, draw_states
from pipeline.measure.audit import Audit, describe_alarms
from pipeline.measure.counts import NO_GROUP, Statistics, count_cooccurrence, count_groups


def render_label_report(
    title: str,
    scope: str,
    report: Statistics,
    table: pa.Table,
    audit: Audit,
) -> str:
    """The page. `report`, of a label table, may have `policy`; `scope` says what was counted.

    Groups are by every variable that splits the table into at least two.
    """
    counted = (count_groups(table, variable) for variable in NO_GROUP)
    groups = [tables.tabulate_shares(by) for by in counted if len(by["groups"]) > 1]
    together = partial(draw_cooccurrence, cooccurrence=count_cooccurrence(table))
    page = pages.open_templates("pipeline.look").get_template("labels.html")
    return page.render(
        title=title,
        scope=scope,
        report=report,
        states=_draw(partial(draw_states, statistics=report), "share of images by state"),
        heat_map_together=_draw(together, "co-occurrence", (6.6, 6.0)),
        groups=groups,
        tables=tables,
        **_describe_audit(audit),
    )


def render_audit(title: str, scope: str, audit: Audit) -> str:
    """The page of an audit alone; `scope` says what was audited."""
    page = pages.open_templates("pipeline.look").get_template("audit.html")
    return page.render(title=title, scope=scope, **_describe_audit(audit))


def _describe_audit(audit: Audit) -> dict[str, Any]:
    """What audit-section.html shows."""
    covariates = len({clue["covariate"] for clue in audit["clues"]})
    size = (2.4 + 0.3 * covariates, 4.6)
    draw = partial(draw_audit, audit=audit)
    return {
        "audit": audit,
        "alarms": describe_alarms(audit),
        "table": tables.tabulate_audit(audit),
        "heat_map": _draw(draw, "how well covariates tell labels", size) if covariates else None,
    }


def _draw(draw: Callable[[Axes], None], description: str, inches: tuple[float, float] = (4.4, 4.0)) -> Markup:
    return pages.draw_svg(draw, description, inches, fitted=True)

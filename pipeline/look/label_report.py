"""Statistics of a source, and examples from its shards → one self-contained HTML page.

    pipeline stats shards --html labels.html

The page shows the numbers of `pipeline stats --format json`, for every grouping the source has. Its images are
anonymous thumbnails: no key, patient, age or sex.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup
from matplotlib.axes import Axes

from pipeline.base import pages
from pipeline.labels import LABELS, label_states, select_views
from pipeline.look import tables
from pipeline.look.plots import draw_audit, draw_cooccurrence, draw_states
from pipeline.look.sheet import data_uri, fit, read_images, spread_rows
from pipeline.manifest import read_manifest
from pipeline.measure.audit import Audit, describe_alarms
from pipeline.measure.counts import NO_GROUP, Statistics, count_cooccurrence, count_groups
from pipeline.stream.cache import Remote
from pipeline.stream.plan import Rows
from pipeline.stream.samples import open_split

UNSURE, SHOWN = 2, 8  # images per label: at most this many uncertain ones, and in all
THUMBNAIL = 160  # pixels: the longer side

Examples = dict[str, dict[str, list[str]]]  # label → state → images as data URIs


def find_examples(folder: Path, split: str | None, views: str, remote: Remote | None = None) -> Examples:
    """Images of each label from shards, spread over one split or all of them; always the same ones.

    Up to SHOWN per label, up to UNSURE of them uncertain; a state without images is left out. Raises DataError if an
    image is damaged.
    """
    manifest = read_manifest(folder)
    splits = [open_split(folder, manifest, name, remote) for name in manifest.splits if split in (None, name)]
    # All rows of these views as (split, row) [N, 2], with their states [N, 14], uncertain as -1.
    places, states = [], []
    for number, opened in enumerate(splits):
        numbers = pa.array(np.arange(opened.table.num_rows))
        table = select_views(opened.table.append_column("row", numbers), views)
        rows = table["row"].to_numpy()
        places.append(np.stack([np.full_like(rows, number), rows], axis=1))
        states.append(label_states(table)[0])
    place, state = np.concatenate(places), np.concatenate(states)
    chosen: dict[str, dict[str, Rows]] = {}
    for column, label in enumerate(LABELS):
        unsure = spread_rows(np.flatnonzero(state[:, column] == -1), UNSURE, seed=column)
        sure = spread_rows(np.flatnonzero(state[:, column] == 1), SHOWN - len(unsure), seed=column)
        chosen[label] = {"positive": sure, "uncertain": unsure}
    needed = np.unique(np.concatenate([rows for found in chosen.values() for rows in found.values()]))
    images: dict[int, str] = {}
    for number, opened in enumerate(splits):
        here = needed[place[needed, 0] == number]
        pixels = read_images(opened, place[here, 1])
        images |= {
            row: data_uri(fit(image, THUMBNAIL)) for row, image in zip(here.tolist(), pixels, strict=True)
        }
    return {
        label: {name: [images[row] for row in rows.tolist()] for name, rows in found.items() if len(rows)}
        for label, found in chosen.items()
    }


def render_label_report(
    title: str,
    scope: str,
    report: Statistics,
    table: pa.Table,
    examples: Mapping[str, Mapping[str, list[str]]],
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
        examples=examples,
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

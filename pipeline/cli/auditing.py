"""The command that asks what labels can be told by without the disease: audit."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.files import write_atomically
from pipeline.base.options import option
from pipeline.base.workers import count_cpus
from pipeline.cli.looking import check_output, find_blank
from pipeline.command import EXISTING, FILE, command
from pipeline.console import echo, progress_bar, refuse_usage, say, say_next
from pipeline.labels import VIEWS
from pipeline.manifest import NAME, read_manifest
from pipeline.measure.metrics import Floats


@dataclass(frozen=True, kw_only=True)
class Auditing:
    """What `audit` takes."""

    sources: tuple[Path, ...] = option(..., argument=True, type=EXISTING)
    split: str | None = option(None, "Split to audit.  [default: train and dev; all if there is no train]")
    views: str = option("all", "By the column Frontal/Lateral.", choices=VIEWS)
    images: bool | None = option(None, "Also measure gray levels.  [default: for shards]")
    threads: int = option(count_cpus, "Decoding threads.", low=1, shown="all cores")
    html: Path | None = option(None, "Write a page with a heat map.", type=FILE)
    strict: bool = option(False, "Exit with 3 on any alarm.")
    format: str = option("table", choices=("table", "json"))


@command("audit", Auditing, example="pipeline audit shards --html audit.html")
def audit(given: Auditing) -> int:
    """Audit SOURCES (shards, dataset folders or CSVs) for shortcuts: which non-disease factors predict each label.

    The patient's number, the projection, the original width, gray levels of border and corners, …: each alone, and
    all together in a model tested on other patients. A network may learn these instead, and fail elsewhere.
    """
    from pipeline.look.tables import print_audit
    from pipeline.measure.audit import audit_labels, find_alarms
    from pipeline.measure.covariates import find_covariates
    from pipeline.policies import evaluation_targets
    from pipeline.sources.load import learned_splits, load_tables

    sources, split, views = given.sources, given.split, given.views
    are_shards = all((source / NAME).is_file() for source in sources)
    refuse_usage(
        given.images and not are_shards, "--images needs shards: pipeline shards SOURCE OUT, then audit OUT"
    )
    check_output("--html", given.html, (".html",))
    table = load_tables(sources, split, views, audited=True)
    edge: dict[str, Floats] = {}
    content: dict[str, Floats] = {}
    if are_shards and given.images is not False:
        from pipeline.look.pixels import measure_shards

        chosen = [
            (source, [split] if split else learned_splits(read_manifest(source).splits)) for source in sources
        ]
        done = 0
        with progress_bar("Measuring", "images") as advance:

            def count(measured: int) -> None:
                nonlocal done
                done += measured
                advance(done, table.num_rows)

            edge, content = measure_shards(chosen, views, given.threads, count)
    if "file_bytes" in table.column_names:
        content["file bytes"] = table["file_bytes"].to_numpy().astype(float)
        content.pop("stored bytes", None)  # the same, where files are stored as they were
    cells = evaluation_targets(table, find_blank(sources))
    report = audit_labels(table, *cells, find_covariates(table), edge, content)
    if given.html:
        from pipeline.look.label_report import render_audit

        scope = f"{f'split {split}' if split else 'train and dev, where there are some'}; {views} views"
        title = f"Audit of {', '.join(source.resolve().name for source in sources)}"
        write_atomically(given.html, render_audit(title, scope, report).encode())
        say(f"{given.html}: written")
    if given.format == "json":
        echo(json.dumps(report, indent=2))
    else:
        print_audit(report)
        if are_shards:
            words = (word for source in sources for word in ("--shards", source))
            say_next("python", "-m", "train", *words, "--run", "RUN")
        elif len(sources) == 1 and sources[0].is_dir():
            say_next("pipeline", "shards", sources[0], "shards")
    return 3 if given.strict and find_alarms(report) else 0

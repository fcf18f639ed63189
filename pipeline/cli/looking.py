"""The commands that look at labels, images and scores: stats, audit, judge."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import console
from pipeline.base.files import format_csv, write_atomically
from pipeline.base.options import option
from pipeline.base.pages import pictures
from pipeline.base.workers import count_cpus
from pipeline.console import command, echo, pictures_option, progress_bar, refuse_usage, say, say_next
from pipeline.judging import Judging
from pipeline.labels import VIEWS
from pipeline.look.label_report import print_report
from pipeline.manifest import NAME, find_blank, read_manifest
from pipeline.measure import counts
from pipeline.measure.counts import NO_GROUP
from pipeline.measure.metrics import Floats
from pipeline.policies import evaluation_targets

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A command that reads shards at a URL."""

    cache: Path = option(Path(".cache"), "Cache folder of shards from URLs.")


@dataclass(frozen=True, kw_only=True)
class Stats(Cached):
    """What `stats` takes."""

    sources: tuple[Path | str, ...] = option(..., argument=True, type=console.PathOrUrl(exists=True))
    split: str | None = option(None, "Split to count.  [default: all]")
    views: str = option("all", "By the column Frontal/Lateral.", choices=VIEWS)
    by: str | None = option(None, f"Count each group of images: by {', '.join(NO_GROUP)}, or a fact.", metavar="FACT")
    facts: tuple[str, ...] = option((), "CSV or XLSX with extra columns to join; not for shards.", metavar="FILE")
    policy: tuple[dict[str, str], str] | tuple[()] = option(
        (), "Targets under a policy: best,Edema=zeros,blank=ignore.", split=counts.parse_policies
    )
    html: Path | None = option(None, "Write a page with everything.", type=console.FILE)
    png: Path | None = pictures_option()
    format: str = option("table", "csv: the counts alone.", choices=("table", "json", "csv"))


@command("stats", Stats, example="pipeline stats train.csv --views frontal --by sex --html labels.html")
def stats(given: Stats) -> None:
    """Count positive, uncertain, negative and blank per label in SOURCES (shards, dataset folders or CSVs).

    Shards may be at a URL: s3://bucket/shards. Several are counted together; --by set counts each.
    """
    from pipeline.sources.sets import load_tables
    from pipeline.stream.cache import find_shards

    check_page(given.html)
    refuse_usage(given.format == "csv" and given.policy, "--format csv has no room for --policy; use json")
    shards = [find_shards(source, given.cache) for source in given.sources]
    paths = [path for path, _ in shards]
    table = load_tables(paths, given.split, given.views, [*map(Path, given.facts)], note=say)
    known = counts.list_variables(table)
    refuse_usage(given.by not in (None, *known), f"--by {given.by}: these images can be grouped by {', '.join(known)}")
    refuse_usage(given.png and not given.html, "--png is for the figures of --html")
    report = counts.count_labels(table)
    if given.by:
        report["by"] = counts.count_groups(table, given.by)
    if given.policy:
        report["policy"] = counts.count_targets(report["labels"], *given.policy)
        for label, targets in report["policy"]["labels"].items():
            if targets["pos_weight"] is None:
                classes = f"{targets['positives']:,} positives and {targets['negatives']:,} negatives"
                say(f"Warning: {label} is left with one class: {classes}")
    if given.html:
        with pictures(given.png):
            write_atomically(given.html, _render_page(given, paths, report, table).encode())
        say(f"{given.html}: written")
    if given.format == "table":
        print_report(report)
        if all(remote is None for _, remote in shards):
            say_next("pipeline", "audit", *given.sources)
    else:
        text = json.dumps(report, indent=2) if given.format == "json" else format_csv(counts.list_rows(report))
        echo(text.rstrip())


def _render_page(given: Stats, sources: Sequence[Path], report: counts.Statistics, table: "pa.Table") -> str:
    from pipeline.look.label_report import render_label_report
    from pipeline.measure.audit import audit_labels
    from pipeline.sources.sets import load_tables
    from pipeline.stream.cache import redact

    audited = load_tables(sources, given.split, given.views, audited=True)
    cells = evaluation_targets(audited, find_blank(sources[0]))
    audit = audit_labels(audited, *cells, together=False)  # which takes longer
    splits = "" if sources[0].is_file() else f"split {given.split}, " if given.split else "all splits, "
    title = f"Labels of {', '.join(Path(redact(str(source))).resolve().name for source in given.sources)}"
    return render_label_report(title, f"{splits}{given.views} views", report, table, audit)


def check_page(path: Path | None) -> None:
    """Refuse an --html that cannot be written, before any work is done."""
    if path:
        refuse_usage(path.suffix.lower() != ".html", f"--html {path}: the name must end in .html")
        refuse_usage(not path.parent.is_dir(), f"--html {path}: there is no folder {path.parent}")


@dataclass(frozen=True, kw_only=True)
class Auditing:
    """What `audit` takes."""

    sources: tuple[Path, ...] = option(..., argument=True, type=console.EXISTING)
    split: str | None = option(None, "Split to audit.  [default: train and dev; all if there is no train]")
    views: str = option("all", "By the column Frontal/Lateral.", choices=VIEWS)
    images: bool | None = option(None, "Also measure gray levels.  [default: for shards]")
    threads: int = option(count_cpus, "Decoding threads.", low=1, shown="all cores")
    html: Path | None = option(None, "Write a page with a heat map.", type=console.FILE)
    strict: bool = option(False, "Exit with 3 on any alarm.")
    format: str = option("table", choices=("table", "json"))


@command("audit", Auditing, example="pipeline audit shards --html audit.html")
def audit(given: Auditing) -> int:
    """Audit SOURCES (shards, dataset folders or CSVs) for shortcuts: which non-disease factors predict each label.

    The patient's number, the projection, the original width, gray levels of border and corners, …: each alone, and
    all together in a model tested on other patients. A network may learn these instead, and fail elsewhere.
    """
    from pipeline.look.label_report import print_audit
    from pipeline.measure.audit import audit_labels
    from pipeline.sources.sets import learned_splits, load_tables

    sources, split, views = given.sources, given.split, given.views
    are_shards = all((source / NAME).is_file() for source in sources)
    refuse_usage(given.images and not are_shards, "--images needs shards: pipeline shards SOURCE OUT, then audit OUT")
    check_page(given.html)
    table = load_tables(sources, split, views, audited=True)
    edge, content = dict[str, Floats](), dict[str, Floats]()
    if are_shards and given.images is not False:
        from pipeline.look.pixels import measure_shards

        names = [[split] if split else learned_splits(read_manifest(source).splits) for source in sources]
        chosen = [(source, name) for source, splits in zip(sources, names, strict=True) for name in splits]
        with progress_bar("Measuring", "images") as advance:
            measured = partial(advance, total=table.num_rows)
            edge, content = measure_shards(chosen, views, given.threads, measured)
    if "file_bytes" in table.column_names:
        content["file bytes"] = table["file_bytes"].to_numpy().astype(float)
        content.pop("stored bytes", None)  # the same, if files are stored unchanged
    cells = evaluation_targets(table, find_blank(sources[0]))
    report = audit_labels(table, *cells, edge, content)
    if given.html:
        from pipeline.look.label_report import render_audit

        scope = f"{f'split {split}' if split else 'train and dev, if they exist'}; {views} views"
        title = f"Audit of {', '.join(source.resolve().name for source in sources)}"
        write_atomically(given.html, render_audit(title, scope, report).encode())
        say(f"{given.html}: written")
    if given.format == "json":
        echo(json.dumps(asdict(report), indent=2))
    else:
        print_audit(report)
        if are_shards:
            words = [word for source in sources for word in ("--shards", source)]
            out = [word for word in os.environ.get("MAKEFLAGS", "").split() if word.startswith("OUT=")]
            train = ("python", "-m", "train", *words, "--run", "RUN")
            say_next(*(("make", "train", *out) if "MAKELEVEL" in os.environ else train))
        elif len(sources) == 1 and sources[0].is_dir():
            say_next("pipeline", "shards", sources[0], "shards")
    return 3 if given.strict and report.alarms else 0


@dataclass(frozen=True, kw_only=True)
class Judge(Judging):
    """What `judge` takes."""

    scores: Path = option(..., argument=True, type=console.EXISTING_FILE)
    source: Path = option(..., argument=True, type=console.EXISTING)
    name: str = option("", "What the scores are called.", shown="the file's name")
    out: Path | None = option(None, "Folder for evaluation.json, report.html and card.md.", type=console.FOLDER)
    png: Path | None = pictures_option()


@command("judge", Judge, example="pipeline judge scores.csv Data_Entry_2017_v2020.csv --threshold 0.5 --out judged")
def judge(given: Judge) -> None:
    """Judge SCORES of any network or reader against the labels of SOURCE (shards, a data set's folder or its CSV).

    SCORES is a CSV, Parquet or Arrow file with a row for each image or study, and a column for each label: AUROC,
    thresholds, calibration, subgroups, and what each label's AUROC rests on. No image is needed, and no network.
    """
    from pipeline.judging import judge as judge_files
    from pipeline.look.judged import print_evaluation

    refuse_usage(given.png and not given.out, "--png is for the figures of the report in --out")
    refuse_usage(given.dev is not None and given.threshold is not None, "--threshold is for scores without --dev")
    judged = judge_files(given.scores, given.source, given, say)
    print_evaluation(judged.evaluation)
    if given.out is not None:
        from pipeline.look.judge_report import render_card, render_page

        name, split = given.name or given.scores.name.split(".")[0], judged.evaluation.split
        source = given.source.resolve().name
        given.out.mkdir(parents=True, exist_ok=True)
        with pictures(given.png):
            page = render_page(name, [judged.evaluation], {split: judged.images}, source)
        card = render_card(name, [], [judged.evaluation], source).encode()
        documents = {"evaluation.json": judged.evaluation.to_json(), "report.html": page.encode(), "card.md": card}
        for file, data in documents.items():
            write_atomically(given.out / file, data)
            echo(f"{given.out / file}: written")

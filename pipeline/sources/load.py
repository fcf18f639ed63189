"""SOURCE (shards, a data set's folder, or one CSV) → its label table."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.images import Original
from pipeline.labels import LABELS, mark_unannotated, select_views
from pipeline.manifest import NAME, name_facts, read_manifest, read_table
from pipeline.measure.counts import describe_views
from pipeline.policies import find_one_class
from pipeline.sources.joined import join_facts
from pipeline.sources.sets import SETS, find_set, read_any_table
from pipeline.sources.source import Source


def load_table(source: Path, split: str | None, views: str, facts: Sequence[Path] = ()) -> pa.Table:
    """The label table of a source: one split, or all of them one after the other.

    Its facts, but for those of `images.Original`, follow the labels; `facts` are files of more, as for
    `pipeline shards`. Raises DataError where the source, the split or the views do not exist.
    """
    if source.is_file():
        if split is not None:
            raise DataError(f"{source} is one CSV without splits; leave out its split")
        tables = mark_unannotated({"all": read_any_table(source)})
    elif (source / NAME).is_file():
        manifest = read_manifest(source)
        names = manifest.splits if split is None else [split]
        tables = {name: read_table(source, manifest.split(name)) for name in names}
    else:
        name, csvs = find_set(source)
        tables = mark_unannotated(SETS[name].read_tables(Source(csvs, (), name)))
        if split is not None and split not in tables:
            raise DataError(f"split '{split}' does not exist; {source} holds {', '.join(tables)}")
        tables = {name: table for name, table in tables.items() if split in (None, name)}
    tables, _ = join_facts(tables, facts)
    columns = ["patient", "study", "view", "sex", "age", "projection", *LABELS]
    columns += [name for name in name_facts(next(iter(tables.values()))) if name not in Original._fields]
    table = select_views(pa.concat_tables([table.select(columns) for table in tables.values()]), views)
    if table.num_rows == 0:
        raise DataError(f"{source}: no {views} images")
    return table


class Described(NamedTuple):
    """What the labels of some shards are like, in words.

    `views`: how many studies have which views, "" unless shards hold whole studies. `one_class`: a text for each
    label that the shards' policies leave with one class in train.
    """

    views: str
    one_class: list[str]


def describe_shards(folder: Path) -> Described:
    """Describe the labels of some shards: by train's table, and by all where shards hold whole studies."""
    manifest = read_manifest(folder)
    of_studies = manifest.options.get("unit") == "study"
    tables = {
        name: read_table(folder, split)
        for name, split in manifest.splits.items()
        if of_studies or name == "train"
    }
    return Described(
        describe_views(pa.concat_tables(tables.values())) if of_studies else "",
        find_one_class(tables["train"], manifest.policies) if "train" in tables else [],
    )

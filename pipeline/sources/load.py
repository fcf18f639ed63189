"""SOURCE (shards, a dataset's folder, or one CSV) → its label table."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.identity import Note, describe_repeats, ignore, name_patients, spell_alike
from pipeline.images import Original
from pipeline.labels import LABELS, select_views
from pipeline.manifest import NAME, concat_labels, find_notes, name_facts, read_manifest, read_table, renumber
from pipeline.measure.counts import describe_views
from pipeline.policies import find_one_class
from pipeline.sources.facts import join_facts
from pipeline.sources.sets import SETS, find_set, numbers_studies, read_any_table
from pipeline.sources.source import Source


def load_tables(
    sources: Sequence[Path],
    split: str | None,
    views: str,
    facts: Sequence[Path] = (),
    *,
    audited: bool = False,
    keyed: bool = False,
    note: Note = ignore,
) -> pa.Table:
    """The label table of some sources: one split, or all of them one after the other.

    Its facts, but for those of `images.Original`, follow the labels; `facts` are files of more, as for
    `pipeline shards`. If `audited`, it includes the facts of the originals and, if no split is named, only the rows to
    learn from; if `keyed`, these facts and the images' keys. Of several sources, it has the column `set`, and patients
    are different unless their sets share patient names. `note` gets a sentence for unmatched rows. Raises DataError
    if a source, the split or the views do not exist.
    """
    parts = []
    for place, source in enumerate(sources):
        tables, name, patients, named = _read_source(source, split, note)
        tables = join_facts(spell_alike(tables), facts, note, numbers_studies(name, named))
        columns = [*(["key"] if keyed else []), "patient", "study", "view", "sex", "age", "projection", *LABELS]
        kept = name_facts(next(iter(tables.values())))
        columns += [name for name in kept if audited or keyed or name not in Original._fields]
        if audited and split is None:
            tables = {name: tables[name] for name in learned_splits(tables)}
        table = select_views(pa.concat_tables([table.select(columns) for table in tables.values()]), views)
        if table.num_rows == 0:
            raise DataError(f"{source}: no {views} images")
        if len(sources) > 1:
            table = renumber(table, named, place)
            apart = name_patients(table["patient"], patients)
            table = table.set_column(table.schema.get_field_index("patient"), "patient", apart)
            table = table.append_column("set", pa.array([name] * table.num_rows, pa.string()))
        parts.append(table)
    return concat_labels(parts)


def _read_source(source: Path, split: str | None, note: Note) -> tuple[dict[str, pa.Table], str, str, dict[str, str]]:
    """Its tables by split, the names of its set and of its patients' namespace, and the columns that the user named."""
    if source.is_file():
        if split is not None:
            raise DataError(f"{source} is one CSV without splits; leave out its split")
        return {"all": read_any_table(source)}, str(source), str(source), {}
    if (source / NAME).is_file():
        manifest = read_manifest(source)
        names = manifest.splits if split is None else [split]
        tables = {name: read_table(source, manifest.split(name)) for name in names}
        return tables, manifest.dataset["name"], manifest.dataset["patients"], manifest.columns
    set_name, csvs = find_set(source)
    tables = SETS[set_name].read(Source(csvs, (source,), set_name), note)
    if split is not None and split not in tables:
        raise DataError(f"split '{split}' does not exist; {source} holds {', '.join(tables)}")
    terms, chosen = SETS[set_name].terms, {name: table for name, table in tables.items() if split in (None, name)}
    return chosen, terms.name, terms.patients, {}


def learned_splits(names: Iterable[str]) -> list[str]:
    """Train and dev, as other splits must stay unseen; all splits if there is no train."""
    names = list(names)
    return [name for name in names if name in ("train", "dev") or "train" not in names]


def describe_shards(folder: Path) -> tuple[str, list[str], list[str], dict[str, list[str]]]:
    """Some shards in words, by their tables.

    How many studies have which views, "" unless shards hold complete studies; the labels that the shards' policies
    leave with one class in train; images in two splits; and the images of each note, as `find_notes`.
    """
    manifest = read_manifest(folder)
    tables = {name: read_table(folder, split) for name, split in manifest.splits.items()}
    views = describe_views(concat_labels([*tables.values()])) if manifest.options["views"] == "all" else ""
    one_class = find_one_class(tables["train"], manifest.policies) if "train" in tables else []
    return views, one_class, describe_repeats(tables), find_notes(tables.values())

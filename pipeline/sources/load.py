"""SOURCE (shards, a dataset's folder, or one CSV) → its label table."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.identity import Note, describe_repeats, ignore, name_patients, spell_alike
from pipeline.images import Original
from pipeline.labels import LABELS, select_views
from pipeline.manifest import NAME, concat_labels, find_notes, name_facts, read_manifest, read_table, renumber
from pipeline.measure.counts import describe_views
from pipeline.policies import find_one_class
from pipeline.sources.joined import join_facts
from pipeline.sources.sets import SETS, find_set, numbers_studies, read_any_table
from pipeline.sources.source import Source


def load_tables(
    sources: Sequence[Path],
    split: str | None,
    views: str,
    facts: Sequence[Path] = (),
    *,
    audited: bool = False,
    note: Note = ignore,
) -> pa.Table:
    """The label table of one source, as `load_table`; of several with the column `set`.

    Patients of different sources are different unless their sets share patient names.
    """
    tables = [load_table(source, split, views, facts, audited=audited, note=note) for source in sources]
    if len(tables) == 1:
        return tables[0]
    named = []
    for place, (source, table) in enumerate(zip(sources, tables, strict=True)):
        if (source / NAME).is_file():
            table = renumber(table, read_manifest(source), place)
        name, patients = _name_set(source)
        apart = name_patients(table["patient"], patients)
        table = table.set_column(table.schema.get_field_index("patient"), "patient", apart)
        named.append(table.append_column("set", pa.array([name] * table.num_rows, pa.string())))
    return concat_labels(named)


def _name_set(source: Path) -> tuple[str, str]:
    """The names of a source's set and of its patients' namespace; for a CSV, its path."""
    if source.is_file():
        return str(source), str(source)
    if (source / NAME).is_file():
        dataset = read_manifest(source).dataset
        return dataset["name"], dataset["patients"]
    terms = SETS[find_set(source)[0]].terms
    return terms.name, terms.patients


def load_table(
    source: Path,
    split: str | None,
    views: str,
    facts: Sequence[Path] = (),
    *,
    audited: bool = False,
    keyed: bool = False,
    note: Note = ignore,
) -> pa.Table:
    """The label table of a source: one split, or all of them one after the other.

    Its facts, but for those of `images.Original`, follow the labels; `facts` are files of more, as for
    `pipeline shards`. If `audited`, it includes the facts of the originals and, if no split is named, only the rows to
    learn from; if `keyed`, these facts and the images' keys. `note` gets a sentence for unmatched rows.
    Raises DataError if the source, the split or the views do not exist.
    """
    numbered = False
    if source.is_file():
        if split is not None:
            raise DataError(f"{source} is one CSV without splits; leave out its split")
        tables = {"all": read_any_table(source)}
    elif (source / NAME).is_file():
        manifest = read_manifest(source)
        names = manifest.splits if split is None else [split]
        tables = {name: read_table(source, manifest.split(name)) for name in names}
        numbered = numbers_studies(manifest.dataset["name"], manifest.columns)
    else:
        name, csvs = find_set(source)
        tables = SETS[name].read(Source(csvs, (), name), note)
        numbered = numbers_studies(name, ())
        if split is not None and split not in tables:
            raise DataError(f"split '{split}' does not exist; {source} holds {', '.join(tables)}")
        tables = {name: table for name, table in tables.items() if split in (None, name)}
    tables = join_facts(spell_alike(tables), facts, note, numbered)
    columns = [*(["key"] if keyed else []), "patient", "study", "view", "sex", "age", "projection", *LABELS]
    kept = name_facts(next(iter(tables.values())))
    columns += [name for name in kept if audited or keyed or name not in Original._fields]
    if audited and split is None:
        tables = {name: tables[name] for name in learned_splits(tables)}
    table = select_views(pa.concat_tables([table.select(columns) for table in tables.values()]), views)
    if table.num_rows == 0:
        raise DataError(f"{source}: no {views} images")
    return table


def learned_splits(names: Iterable[str]) -> list[str]:
    """Train and dev, as other splits must stay unseen; all splits if there is no train."""
    names = list(names)
    return [name for name in names if name in ("train", "dev") or "train" not in names]


class Described(NamedTuple):
    """A description of the labels of some shards, in words.

    `views`: how many studies have which views, "" unless shards hold whole studies. `one_class`: a text for each
    label that the shards' policies leave with one class in train. `repeats`: of images in two splits. `notes`: as of
    `find_notes`.
    """

    views: str
    one_class: list[str]
    repeats: list[str]
    notes: dict[str, list[str]]


def describe_shards(folder: Path) -> Described:
    """Describe some shards by their tables: labels by train's, and views if shards hold complete studies."""
    manifest = read_manifest(folder)
    of_studies = manifest.options.get("views") == "all"
    tables = {name: read_table(folder, split) for name, split in manifest.splits.items()}
    return Described(
        describe_views(concat_labels([*tables.values()])) if of_studies else "",
        find_one_class(tables["train"], manifest.policies) if "train" in tables else [],
        describe_repeats(tables),
        find_notes(tables.values()),
    )

"""SOURCE (a dataset's folder, shards, or one CSV) → its set, its tables and its images' folders, or one label table.

To add a set, write a module that ends in a `DataSet`, and add a line to SETS.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.base.csvs import read_header
from pipeline.base.errors import DataError
from pipeline.base.store import check_access, list_files, list_folders, named_failures
from pipeline.identity import Note, describe_repeats, ignore, name_patients, spell_alike
from pipeline.images import Original
from pipeline.labels import LABELS, select_views
from pipeline.manifest import NAME, concat_labels, find_notes, name_facts, read_manifest, read_table, renumber
from pipeline.measure.counts import describe_views
from pipeline.policies import find_one_class
from pipeline.sources import chexpert, mimic, nih, padchest, plus, table, vindr, webdataset
from pipeline.sources.facts import join_facts
from pipeline.sources.source import DataSet, Source, Terms, read_terms
from pipeline.sources.table import guess_command

# In the order in which they are asked: other sets have a train.csv, too, so CheXpert comes last.
SETS: dict[str, DataSet] = {
    "chexpert-plus": plus.SET,
    "mimic": mimic.SET,
    "nih": nih.SET,
    "padchest": padchest.SET,
    "padchest-all": padchest.ALL,
    "vindr": vindr.SET,
    "chexpert": chexpert.SET,
    "table": table.SET,
    "webdataset": webdataset.SET,
}
OWN = ("table", "webdataset")  # users' own sets, whose columns are named
# Sets that are recognized by their files.
KNOWN = {kind.terms.name: kind for name, kind in SETS.items() if name not in OWN}
SYNTHETIC_NOTE = "SYNTHETIC.txt"  # beside the tables that `pipeline sample` writes
FOLDERS = 100  # that are searched for shards
SHOWN = 4  # names of what is in a folder without a set


def find_source(
    folder: Path,
    splits: Mapping[str, Path],
    roots: Sequence[Path],
    name: str | None = None,
    columns: Sequence[tuple[str, str]] = (),
    facts: Sequence[Path] = (),
    called: str = "",
) -> Source:
    """The tables of `folder`, or the CSVs named in `splits`, and every folder that may hold images.

    `name` forces a set; otherwise each is asked in turn. For the sets OWN, `folder` may be a CSV or tar. `called` is
    `Source.name`. Raises DataError for a folder or file that does not exist, and if no set is found.
    """
    for path in (folder, *splits.values(), *roots, *facts):
        check_access(path)
        if path is not folder and not path.exists():
            raise DataError(f"{path}: no such file or folder")
    if folder.is_file():
        if name not in OWN:
            raise DataError(f"{folder}: a file; name its folder. For a table of your own: {guess_command(folder)}")
        splits, folder = splits or {"" if name == "webdataset" else "train": folder}, folder.parent
    if splits and name == "webdataset":
        csvs = webdataset.SET.find_tables(folder, splits) or {}
    else:
        name, csvs = (name or "chexpert", dict(splits)) if splits else find_set(folder, name)
    homes = [folder, *(csv.parent for csv in csvs.values()), *roots]
    more = SETS[name].find_roots(homes[1:])
    searched = tuple(dict.fromkeys(path.resolve() for path in (*homes, *more)))
    source = Source(csvs, searched, name, tuple(columns), tuple(facts), called)
    if name == "webdataset" and not columns:
        webdataset.SET.read(source)  # its error lists the columns to name: before the tars are hashed
    return source


def find_terms(source: Source) -> Terms:
    """Who owns the images of a source, and how they may be used."""
    if called := source.name:
        return Terms(called, called, called, "not stated", "")
    if source.set == "webdataset":
        try:  # shards of this project name them
            dataset = read_manifest(next(iter(source.csvs.values())).parent).dataset
        except DataError:  # another program's manifest.json, or none
            dataset = {}
        return webdataset.SET.terms._replace(**{name: dataset[name] for name in Terms._fields if name in dataset})
    is_synthetic = any((csv.parent / SYNTHETIC_NOTE).exists() for csv in source.csvs.values())
    return read_terms("sample") if is_synthetic and source.set == "chexpert" else SETS[source.set].terms


def numbers_studies(name: str, columns: Mapping[str, str]) -> bool:
    """Whether studies were numbered by us: no column of the set, or of the `columns` that the user named, has them."""
    if columns or name not in SETS:
        return bool(columns) and "study" not in columns
    return not any("(?P<study>" in column.pattern for column in SETS[name].columns.values())


def find_set(folder: Path, name: str | None = None) -> tuple[str, dict[str, Path]]:
    """The set that the folder holds, and its tables. Raises DataError if there is none."""
    asked = {name: SETS[name]} if name else KNOWN
    with named_failures(folder, "cannot be read"):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        for candidate, kind in asked.items():
            tables = kind.find_tables(folder)
            if tables is not None:
                return candidate, tables
        if (folder / NAME).is_file():
            raise DataError(
                f"{folder}: holds shards, not a data set: name the data set first, then the folder of shards to write"
            )
        if name is None and (tables := webdataset.SET.find_tables(folder)):
            return "webdataset", tables
    signs = {kind.terms.title: kind.files or f"a {next(iter(kind.tables.values()))[0]}" for kind in asked.values()}
    wanted = ", or ".join(f"{files} ({title})" for title, files in signs.items())
    names = sorted(path.name for path in list_files(folder))
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    content = f"it holds {', '.join(names[:SHOWN])}{more}" if names else "it is empty"
    shards = [name for name in list_folders(folder)[:FOLDERS] if (folder / name / NAME).is_file()]
    meant = f"; did you mean the shards {folder / shards[0]}?" if shards else ""
    advice = f"\nFor a table of your own: {guess_command(folder)}" if name in (None, "table") else ""
    raise DataError(f"{folder}: no dataset with {wanted}; {content}{meant}{advice}")


def read_any_table(csv: Path) -> pa.Table:
    """The label table of one CSV of any set, by its columns. Raises DataError, naming file, line and column."""
    header = read_header(csv)
    kinds = (kind for kind in KNOWN.values() if next(iter(kind.columns)) in header)
    return next(kinds, chexpert.SET).read_table(csv)


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

    Its facts, but for those of `images.Original`, follow the labels; `facts` are files of more. If `audited`, it has
    the facts of the originals, too, and without a split only the rows to learn from; if `keyed`, these facts and the
    images' keys. Of several sources, it has the column `set`, and patients are different unless their sets share names
    of patients. Raises DataError if a source, the split or the views do not exist.
    """
    parts = []
    for place, source in enumerate(sources):
        named: Mapping[str, str] = {}
        if source.is_file():
            if split is not None:
                raise DataError(f"{source} is one CSV without splits; leave out its split")
            tables, name, patients = {"all": read_any_table(source)}, str(source), str(source)
        elif (source / NAME).is_file():
            manifest = read_manifest(source)
            name, patients, named = manifest.dataset["name"], manifest.dataset["patients"], manifest.columns
            chosen = manifest.splits if split is None else [split]
            tables = {each: read_table(source, manifest.split(each)) for each in chosen}
        else:
            kind, csvs = find_set(source)
            name, patients = SETS[kind].terms.name, SETS[kind].terms.patients
            tables = SETS[kind].read(Source(csvs, (source,), kind), note)
            if split is not None and split not in tables:
                raise DataError(f"split '{split}' does not exist; {source} holds {', '.join(tables)}")
            tables = {each: table for each, table in tables.items() if split in (None, each)}
        tables = join_facts(spell_alike(tables), facts, note, numbers_studies(name, named))
        columns = [*(["key"] if keyed else []), "patient", "study", "view", "sex", "age", "projection", *LABELS]
        further = name_facts(next(iter(tables.values())))
        columns += [fact for fact in further if audited or keyed or fact not in Original._fields]
        learned = learned_splits(tables) if audited and split is None else tables
        rows = select_views(pa.concat_tables([tables[each].select(columns) for each in learned]), views)
        if rows.num_rows == 0:
            raise DataError(f"{source}: no {views} images")
        if len(sources) > 1:
            rows = renumber(rows, named, place)
            apart = name_patients(rows["patient"], patients)
            rows = rows.set_column(rows.schema.get_field_index("patient"), "patient", apart)
            rows = rows.append_column("set", pa.array([name] * len(rows), pa.string()))
        parts.append(rows)
    return concat_labels(parts)


def learned_splits(names: Iterable[str]) -> list[str]:
    """Train and dev, as other splits must stay unseen; all splits if there is no train."""
    names = list(names)
    return [name for name in names if name in ("train", "dev") or "train" not in names]


def describe_shards(folder: Path) -> tuple[str, list[str], list[str], dict[str, list[str]]]:
    """What there is to say of some shards, by their tables.

    How many studies have which views, "" unless shards hold complete studies; the labels that the shards' policies
    leave with one class in train; images in two splits; and the images of each note, as `find_notes`.
    """
    manifest = read_manifest(folder)
    tables = {name: read_table(folder, split) for name, split in manifest.splits.items()}
    views = describe_views(concat_labels([*tables.values()])) if manifest.options["views"] == "all" else ""
    one_class = find_one_class(tables["train"], manifest.policies) if "train" in tables else []
    return views, one_class, describe_repeats(tables), find_notes(tables.values())

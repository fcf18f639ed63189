"""WebDataset tars that another program wrote, whose fields the user names.

    pipeline shards tars out --set webdataset --columns patient=mrn,Edema=edema

A sample is the members of one key: their names up to the first dot of the last part. docs/data.md has its fields, and
which split a tar belongs to.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand_columns, read_strings, repeated
from pipeline.base.errors import DataError
from pipeline.base.files import parse_object
from pipeline.base.store import is_remote, list_files, open_to_read
from pipeline.base.tar import Member, read_members
from pipeline.identity import Note, ignore, join, normalize_paths
from pipeline.labels import LABELS
from pipeline.sources import table
from pipeline.sources.source import DataSet, Source, divide, make_key, read_terms
from pipeline.sources.words import read_words

CSV = "labels.csv"  # the role of the CSV beside the tars
KEY = "__key__"  # webdataset's name for a sample's key
# Columns of the table of samples beside their fields: the tar, as split/path; the sample, for messages; the suffixes of
# its members; the position of its only image, else "".
TAR, NAME, SUFFIXES, IMAGE = INTERNAL = ("__url__", "__name__", "__suffixes__", "__image__")
IMAGES, TEXTS = ("jpg", "jpeg", "png", "dcm", "dicom"), ("cls", "txt")
MOST = dict.fromkeys(IMAGES, 2**30) | dict.fromkeys((*TEXTS, "json"), 2**20)  # bytes of a member
SHOWN = 20  # problems in an error
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)  # key and suffix, as webdataset divides a name
_PACKED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst))$")
_COUNTED = re.compile(r"(.*-)\d+(-of-(\d+)\.tar)")  # train-00000-of-00003.tar
Row = dict[str, str | None]


class Webdataset(DataSet):
    """Tars whose fields the user names."""

    def find_tables(self, folder: Path, splits: Mapping[str, Path] | None = None) -> dict[str, Path] | None:
        """The tars of each split, else by the words of their names, as split/path, and the only CSV; None if none."""
        if is_remote(folder):
            if any(path.name.endswith(".tar") for path in list_files(folder)):
                raise DataError(f"{folder}: other programs' tars are read from a folder; copy them to one")
            return None
        tables: dict[str, Path] = {}
        for split, path in (splits or {"": folder}).items():
            tars = [path] if path.is_file() else sorted(path.rglob("[!.]*.tar"))
            if split and not tars:
                raise DataError(f"`split` {split}={path}: a folder without tars")
            for tar in tars:
                name = tar.name if tar == path else tar.relative_to(path).as_posix()
                words = (read_words("split").get(word) for word in reversed(re.findall("[a-z]+", name.lower())))
                tables[f"{split or next(filter(None, words), 'train')}/{name}"] = tar
        if not tables and any(_PACKED.search(path.name) for path in list_files(folder)):
            raise DataError(f"{folder}: its tars are compressed; decompress them to .tar")
        if tables and (csv := table.find_csv(folder)):
            tables[CSV] = csv
        return tables or None

    def locate(self, paths: Sequence[str], roots: Sequence[Path], note: Note = ignore) -> list[str]:
        """The paths: they name a tar and bytes in it."""
        return list(paths)

    def read(self, source: Source, note: Note = ignore) -> dict[str, pa.Table]:
        """Split → its label table. Raises DataError with all that is missing, and the command to give."""
        columns = {name: field for name, field in source.columns if name != "key"}
        tars = {name: path for name, path in source.csvs.items() if name != CSV}
        samples, problems = _read_tars(tars, set(columns.values()))
        text = read_strings(source.csvs[CSV]) if CSV in source.csvs else pa.table({})
        if len(text) and len(samples) and "key" in dict(source.columns):
            samples, unmatched = _join(samples, source, text, note)
            problems += unmatched
        _demand_all(source, samples, text.column_names, problems)
        keys = samples[KEY]
        if pc.count_distinct(keys).as_py() < len(keys):  # such as tars that each count from 0
            keys = pc.binary_join_element_wise(pc.replace_substring_regex(samples[TAR], r"\.tar$", ""), keys, "/")
        safe = pa.array(map(make_key, keys.to_pylist()), pa.string())
        samples = samples.set_column(samples.column_names.index(KEY), KEY, safe)
        splits = pc.replace_substring_regex(samples[TAR], "(?s)/.*", "")
        columns |= {"key": KEY, "path": IMAGE}
        tables = {}
        for split, part in divide(samples, splits, {name: name for name in splits.unique().to_pylist()}).items():
            cells = {name: part[field] for name, field in columns.items()}
            tables[split] = table.read_named(source, part[NAME].to_pylist(), cells, note)
        return tables


def _read_tars(tars: Mapping[str, Path], wanted: set[str]) -> tuple[pa.Table, list[str]]:
    """The samples of all tars with the fields wanted, the first of each tar with all; and what is wrong with them."""
    matches = [(path.parent, match) for path in tars.values() if (match := _COUNTED.fullmatch(path.name))]
    counts = Counter((folder / f"{match[1]}*{match[2]}", int(match[3])) for folder, match in matches)
    problems = [f"{name}: {count:,} files of {total:,}" for (name, total), count in counts.items() if count != total]
    rows: list[Row] = []
    for name, path in tars.items():
        try:
            rows += _read_tar(name, path, wanted)
        except DataError as error:
            problems.append(str(error))
    wrong = [row for row in rows if not row[IMAGE]]
    for suffixes, count in Counter(row[SUFFIXES] for row in wrong).items():
        first = next(row[NAME] for row in wrong if row[SUFFIXES] == suffixes)
        problems.append(f"{count:,} samples need one image and have {suffixes}: {first}")
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}), problems


def _read_tar(tar: str, path: Path, wanted: set[str]) -> Iterator[Row]:
    """The samples of a tar. Raises DataError, naming the sample."""
    groups: dict[str, dict[str, Member]] = {}
    for member in read_members(path):
        match = _NAME.fullmatch(member.name)
        if match is None:  # webdataset leaves out what has no key or no suffix
            continue
        members, suffix = groups.setdefault(match[1], {}), match[2].lower()
        if suffix in members:
            raise DataError(f"{path}: sample {match[1]}: two members .{suffix}")
        if member.size > MOST.get(_kind(suffix), member.size):
            raise DataError(f"{path}: sample {match[1]}: .{suffix} has {member.size:,} bytes, too many")
        members[suffix] = member
    with open_to_read(path) as file:
        for number, (key, members) in enumerate(groups.items()):
            name = f"{path}: sample {key}"
            fields = _read_fields(name, file, members, wanted) if wanted or not number else {}
            kept = {field: text for field, text in fields.items() if not number or field in wanted}
            # `jpg` alone if `mask.png` is beside it.
            plain = [member for suffix, member in members.items() if suffix in IMAGES]
            images = plain or [member for suffix, member in members.items() if _kind(suffix) in IMAGES]
            image = f"{path}@{images[0].offset}+{images[0].size}#{images[0].name}" if len(images) == 1 else ""
            suffixes = ", ".join(f".{suffix}" for suffix in members)
            yield {**kept, TAR: tar, NAME: name, SUFFIXES: suffixes, IMAGE: image, KEY: key}


def _kind(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _read_fields(name: str, file: BinaryIO, members: Mapping[str, Member], wanted: set[str]) -> Row:
    """Field → its text, None if it is blank: texts by suffix, and values of JSON, nested ones as `outer.inner`."""
    fields: Row = {}
    for suffix, member in members.items():
        if _kind(suffix) not in (*TEXTS, "json"):
            continue
        file.seek(member.offset)
        content, label = file.read(member.size), f"{name}: .{suffix}"
        is_json = _kind(suffix) == "json"
        document = parse_object(label, content) if is_json else {suffix: content.decode(errors="replace")}
        for outer, values in [*document.items()]:
            if isinstance(values, dict):
                document |= {f"{outer}.{inner}": value for inner, value in values.items()}
        for written, value in document.items():
            if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
                value = int(value)
            # JSON can spell half a surrogate pair, which is no text, and as Python writes it, NaN.
            field, text = (str(part).encode(errors="replace").decode() for part in (written, value))
            cell = None if value is None or value != value else text.strip() or None
            if not isinstance(value, (dict, list)) and fields.setdefault(field, cell) != cell and field in wanted:
                raise DataError(f"{label} has another value of {field} than the members before it")
    return fields


def _join(samples: pa.Table, source: Source, text: pa.Table, note: Note) -> tuple[pa.Table, list[str]]:
    """The samples with the cells of their rows; and what is wrong: no row, or a row of several samples."""
    path, columns = source.csvs[CSV], dict(source.columns)
    column = columns.pop("key")
    if column not in text.column_names:
        return samples, [f"{path}: no column {column}; it has {', '.join(text.column_names)}"]
    named = [name for name in text.column_names if name in columns.values() and name != KEY]
    demand_columns(path, text.column_names, [column, *named])
    keys, chosen = samples[KEY].combine_chunks(), text.select(named)
    # By as few parts of paths as make the keys unique, as files in several folders may be named alike.
    total = pc.count_distinct(keys)
    enough = (parts for parts in range(1, 10) if pc.count_distinct(normalize_paths(keys, parts)) == total)
    by = partial(normalize_paths, parts=next(enough, 10))
    rows = join(keys, path, chosen, text[column], "images", note, by)
    problems = []
    for name in chosen.column_names:
        if name in samples.column_names:
            problems.append(f"{path}: the samples have a field {name} as well: rename the column")
        else:
            samples = samples.append_column(name, chosen[name].take(rows))
    missing, shared = keys.filter(rows.is_null()), repeated(rows.drop_null())
    problems += [f"{path}: {len(missing):,} samples have no row, such as {missing[0]}"] if len(missing) else []
    return samples, problems + ([f"{path}: {len(shared):,} rows have several samples each"] if shared else [])


def _demand_all(source: Source, samples: pa.Table, header: list[str], problems: Sequence[str]) -> None:
    """Raise DataError with all problems and, if fields are missing, the command that names them."""
    folder, columns = source.roots[0], dict(source.columns)
    known = [name for name in samples.column_names if name not in INTERNAL]
    absent = {name: field for name, field in columns.items() if name != "key" and field not in known}
    missing = [f"no sample has the field {field}" for field in absent.values()]
    missing += ["the images are in the tars: leave out path"] if "path" in columns else []
    missing += ["no patient is named"] if "patient" not in columns else []
    missing += ["no label is named"] if not any(name in LABELS for name in columns) else []
    problems = [*problems, *([] if len(samples) else ["no samples in the tars"])]
    if not problems + missing:
        return
    suffixes = ", ".join(samples[SUFFIXES].unique().to_pylist()) if len(samples) else ""
    lines = [f"{folder}: {len(samples):,} samples of {', '.join([*dict.fromkeys(suffixes.split(', '))][:SHOWN])}"]
    lines += [f"  {problem}" for problem in [*problems[:SHOWN], *missing]]
    lines += [f"  and {len(problems) - SHOWN:,} more problems"] if len(problems) > SHOWN else []
    if missing:
        more = f"; of {source.csvs[CSV]}, with key=COLUMN: {', '.join(header)}" if header else ""
        lines.append(f"fields: {', '.join(known[: SHOWN * 2])}{more}")
        guessed = table.guess_columns([*known, *header])
        if (key := guessed.pop("path", "")) in header and any(name in header for name in guessed.values()):
            guessed["key"] = key
        chosen = guessed | {name: field for name, field in columns.items() if name not in ("path", *absent)}
        needed = {"patient": KEY, "LABEL": next((field for field in known if field in TEXTS), "FIELD")}
        command = table.spell_command(folder, "webdataset", chosen, needed)
        lines += [f"patient={KEY} takes every image for another patient's"] if f"patient={KEY}" in command else []
        lines += ["LABEL is one of CheXpert's 14"] if "LABEL=" in command else []
        lines.append(command)
    raise DataError("\n".join(lines))


SET = Webdataset(read_terms("webdataset"), files=".tar files")

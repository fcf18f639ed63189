"""WebDataset tars that another program wrote, whose fields the user names.

    pipeline shards tars out --set webdataset --columns patient=mrn,Edema=edema

A sample is the members of one key: their names up to the first dot of the last part. Its fields are the keys of its
JSON (`labels.Edema` if nested), its text members by suffix (`cls`, `txt`), `__key__`, and with `key=COLUMN` the columns
of the only CSV beside the tars, joined by that column. `patient` and a label are needed; the rest is as for the set
`table`. A word of the tar's name tells its split; `--split` gives each split a tar or a folder of tars.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from pipeline.base.csvs import read_header, read_strings, repeated
from pipeline.base.errors import DataError
from pipeline.base.files import parse_object
from pipeline.base.store import is_remote, list_files
from pipeline.base.tar import Member, read_members
from pipeline.identity import Note, choose_paths, ignore, join
from pipeline.labels import LABELS
from pipeline.manifest import read_manifest
from pipeline.sources import table
from pipeline.sources.source import DataSet, Source, Terms, make_key, place_in_tar, read_terms

TERMS = read_terms("webdataset")
CSV = "labels.csv"  # the role of the CSV beside the tars
KEY = "__key__"  # webdataset's name for a sample's key
PLACE = "__place__"  # ours for where its image lies
IMAGES, TEXTS = ("jpg", "jpeg", "png", "dcm", "dicom"), ("cls", "txt")
MOST = dict.fromkeys(IMAGES, 2**30) | dict.fromkeys((*TEXTS, "json"), 2**20)  # bytes of a member
SHOWN = 20  # problems in an error
# dev is held out of train by a hash of the patient, so our own dev becomes dev again.
_SPLITS = dict.fromkeys(("train", "training", "dev"), "train") | {"test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("val", "valid", "validate", "validation"), "valid")
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)  # key and suffix, as webdataset divides a name
_COUNTED = re.compile(r"(.*-)\d+(-of-(\d+)\.tar)")  # train-00000-of-00003.tar
# What fields are often called, in letters alone: for the command that an error proposes.
_USUAL = {
    "patient": ("patient", "patientid", "subject", "subjectid", "deidpatientid", "mrn"),
    "study": ("study", "studyid"),
    "view": ("view",),
    "sex": ("sex", "gender", "patientsex"),
    "age": ("age", "patientage"),
    "projection": ("projection", "appa"),
    **{label: (label.replace(" ", "").lower(),) for label in LABELS},
}


class Sample(NamedTuple):
    """The members of one key by suffix, and the text of its fields."""

    tar: str  # split/path
    path: Path
    key: str
    members: dict[str, Member]
    fields: dict[str, str | None]

    @property
    def images(self) -> list[Member]:
        """Its images; `jpg` alone if `mask.png` is beside it."""
        plain = [member for suffix, member in self.members.items() if suffix in IMAGES]
        return plain or [member for suffix, member in self.members.items() if _kind(suffix) in IMAGES]


def find_tables(folder: Path, splits: Mapping[str, Path] | None = None) -> dict[str, Path] | None:
    """The tars in a folder and in its folders, as split/path, and the only CSV; None without tars.

    `splits` are the tar or the folder of tars of each split. Raises DataError if one has none.
    """
    if is_remote(folder):
        if any(path.name.endswith(".tar") for path in list_files(folder)):
            raise DataError(f"{folder}: other programs' tars are read from a folder; copy them to one")
        return None
    tables: dict[str, Path] = {}
    for split, path in (splits or {"": folder}).items():
        tars = [path] if path.is_file() else sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])
        tars = [tar for tar in tars if not tar.name.startswith(".")]
        if split and not tars:
            raise DataError(f"`split` {split}={path}: a folder without tars")
        for tar in tars:
            name = tar.name if tar == path else tar.relative_to(path).as_posix()
            words = reversed(re.findall("[a-z]+", name.lower()))
            known = next((_SPLITS[word] for word in words if word in _SPLITS), "train")
            tables[f"{split or known}/{name}"] = tar
    csvs = [path for path in list_files(folder) if path.name.endswith((".csv", ".csv.gz"))]
    return tables | ({CSV: csvs[0]} if len(csvs) == 1 else {}) if tables else None


def find_terms(source: Source) -> Terms:
    """Whose the images are: of shards of this project, the manifest says it."""
    try:
        dataset = read_manifest(next(iter(source.csvs.values())).parent).dataset
        return TERMS._replace(**{name: dataset[name] for name in TERMS._fields if name in dataset})
    except DataError:  # another program's manifest.json, or none
        return TERMS


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """Split → its label table. Raises DataError with all that is missing, and the command to give."""
    tars = {name: path for name, path in source.csvs.items() if name != CSV}
    columns, csv = dict(source.columns), source.csvs.get(CSV)
    fields = {ours: field for ours, field in columns.items() if ours != "key"}
    problems = _find_gaps(tars.values())
    samples: list[Sample] = []
    for name, path in tars.items():
        try:
            samples += _read_tar(name, path, set(fields.values()))
        except DataError as error:
            problems.append(str(error))
    wrong: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        if len(sample.images) != 1:
            wrong.setdefault(tuple(sample.members), []).append(sample)
    problems += [
        f"{len(some):,} samples need one image and have .{', .'.join(suffixes)}: {some[0].path}: {some[0].key}"
        for suffixes, some in wrong.items()
    ]
    if csv and "key" in columns:
        problems += _join(csv, columns["key"], samples, set(fields.values()), note)
    _demand_all(source, samples, problems)
    names = [sample.key for sample in samples]
    if len(set(names)) < len(names):  # as where each tar counts from 0
        names = [f"{sample.tar.removesuffix('.tar')}/{sample.key}" for sample in samples]
    for sample, name in zip(samples, names, strict=True):
        sample.fields.update({KEY: make_key(name), PLACE: place_in_tar(sample.path, sample.images[0])})
    tables = {}
    for split in dict.fromkeys(name.partition("/")[0] for name in tars):
        rows = [sample for sample in samples if sample.tar.startswith(f"{split}/")]
        cells = {
            ours: pa.chunked_array([[sample.fields.get(field) for sample in rows]], pa.string())
            for ours, field in (fields | {"path": PLACE}).items()
        }
        keys = pa.array([sample.fields[KEY] for sample in rows], pa.string())
        labels = [f"{sample.path}: sample {sample.key}" for sample in rows]
        tables[split] = table.read_cells(labels, columns, cells, keys)
    return tables


def _find_gaps(paths: Iterable[Path]) -> list[str]:
    """A complaint for files that the number in a name such as `train-00000-of-00003.tar` promises."""
    matches = [(path.parent, match) for path in paths if (match := _COUNTED.fullmatch(path.name))]
    counts = Counter((folder / f"{match[1]}*{match[2]}", int(match[3])) for folder, match in matches)
    return [
        f"{name}: {count:,} files of {total:,}" for (name, total), count in counts.items() if count != total
    ]


def _read_tar(name: str, path: Path, wanted: set[str]) -> Iterator[Sample]:
    """The samples of a tar with the fields wanted, the first with all. Raises DataError, naming the sample."""
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
    with path.open("rb") as file:
        for number, (key, members) in enumerate(groups.items()):
            fields = _read_fields(f"{path}: sample {key}", file, members) if wanted or not number else {}
            kept = {field: text for field, text in fields.items() if not number or field in wanted}
            yield Sample(name, path, key, members, kept | {KEY: key})


def _kind(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _read_fields(name: str, file: BinaryIO, members: Mapping[str, Member]) -> dict[str, str | None]:
    """Field → its text, None if it is blank: texts by suffix, and values of JSON, nested ones as `outer.inner`."""
    values: dict[str, Any] = {}
    for suffix, member in members.items():
        if _kind(suffix) in (*TEXTS, "json"):
            file.seek(member.offset)
            content = file.read(member.size)
            if _kind(suffix) != "json":
                values[suffix] = content.decode(errors="replace")
                continue
            for field, value in parse_object(f"{name}: .{suffix}", content).items():
                nested = value if isinstance(value, dict) else {}
                values |= {f"{field}.{inner}": cell for inner, cell in nested.items()} or {field: value}
    return {field: _as_text(value) for field, value in values.items() if not isinstance(value, (dict, list))}


def _as_text(value: Any) -> str | None:
    if value is None or value != value:  # JSON as Python writes it has NaN
        return None
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    # JSON can spell half a surrogate pair, which is no text.
    return str(value).strip().encode(errors="replace").decode() or None


def _join(csv: Path, column: str, samples: list[Sample], wanted: set[str], note: Note) -> list[str]:
    """Give the samples the cells of their rows. Returns what is wrong: no row, or one of several samples."""
    text = read_strings(csv)
    if column not in text.column_names:
        return [f"{csv}: no column {column}; it has {', '.join(text.column_names)}"]
    chosen = text.select([name for name in text.column_names if name in wanted])
    keys = pa.array([sample.key for sample in samples], pa.string())
    rows = join(keys, csv, chosen, text[column], "images", note, choose_paths(keys))
    for name, cells in chosen.to_pydict().items():
        for sample, row in zip(samples, rows.to_pylist(), strict=True):
            sample.fields[name] = None if row is None else cells[row]
    missing, shared = keys.filter(rows.is_null()), repeated(rows.drop_null())
    problems = [f"{csv}: {len(missing):,} samples have no row, such as {missing[0]}"] if len(missing) else []
    return problems + ([f"{csv}: {len(shared):,} rows have several samples each"] if shared else [])


def _demand_all(source: Source, samples: Sequence[Sample], problems: Sequence[str]) -> None:
    """Raise DataError with all problems and, if columns are missing, the command that names them."""
    folder, csv, columns = source.roots[0], source.csvs.get(CSV), dict(source.columns)
    known = list(dict.fromkeys(field for sample in samples for field in sample.fields))
    header = read_header(csv) if csv else []
    absent = [
        f"no sample has the field {field}"
        for ours, field in columns.items()
        if ours != "key" and field not in known
    ]
    absent += ["the images are in the tars: leave out path"] if "path" in columns else []
    absent += ["no patient is named"] if "patient" not in columns else []
    absent += ["no label is named"] if not any(ours in LABELS for ours in columns) else []
    problems = [*problems, *([] if samples else ["no samples in the tars"])]
    if not problems + absent:
        return
    suffixes = dict.fromkeys(f".{suffix}" for sample in samples for suffix in sample.members)
    lines = [f"{folder}: {len(samples):,} samples of {', '.join([*suffixes][:SHOWN])}"]
    lines += [f"  {problem}" for problem in [*problems[:SHOWN], *absent]]
    lines += [f"  and {len(problems) - SHOWN:,} more problems"] if len(problems) > SHOWN else []
    if absent:
        more = f"; of {csv}: {', '.join(header)}" if csv else ""
        lines += [f"fields: {', '.join(known[: SHOWN * 2])}{more}", *_propose(folder, columns, known, header)]
    raise DataError("\n".join(lines))


def _propose(folder: Path, columns: Mapping[str, str], known: list[str], header: list[str]) -> Iterator[str]:
    """Advice, and the command whose `columns` have all that is needed."""
    fields = known + header
    named = {ours: field for ours, field in columns.items() if field in fields and ours != "path"}
    plain = {re.sub("[^a-z]", "", _kind(field).lower()): field for field in reversed(fields)}
    for ours, names in _USUAL.items():
        if fits := [plain[name] for name in names if name in plain]:
            named.setdefault(ours, fits[0])
    if named.setdefault("patient", KEY) == KEY:
        yield f"patient={KEY} takes every image for another patient's; if they are not, name a field that says"
    if not any(ours in LABELS for ours in named):
        named["LABEL"] = next((text for text in TEXTS if text in known), "FIELD")
        yield f"LABEL is one of {', '.join(LABELS)}; its values must be 1, 0, -1 or blank"
    if any(field in header and field not in known for field in named.values()):
        named.setdefault("key", "key" if "key" in header else header[0])
    text = shlex.quote(",".join(f"{ours}={field}" for ours, field in named.items()))
    yield f"pipeline shards {shlex.quote(str(folder))} OUT `set` webdataset `columns` {text}"


SET = DataSet(
    TERMS,
    files=".tar files",
    find_tables=find_tables,
    read_tables=read_tables,
    locate=lambda paths, roots: list(paths),  # they name a tar and bytes in it
    numbers_studies=True,
)

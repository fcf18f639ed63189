"""Facts of patients, studies or images, from a user's CSV or XLSX → further columns of the label tables.

    pipeline shards CheXpert-v1.0-small shards --facts "CHEXPERT DEMO.xlsx"

The column names determine what a row describes, as in UNITS. A user's own table may be such a file too: the columns
that the user named are its keys, and the others are facts.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import read_strings
from pipeline.base.errors import DataError
from pipeline.identity import Normalize, Note, ignore, join, normalize_ids, normalize_paths, normalize_studies
from pipeline.images import Original
from pipeline.labels import LABELS
from pipeline.manifest import KNOWN

KEYS = {"key": "key", "study": "study", "study_id": "study"}
KEYS |= dict.fromkeys(("patient", "patient_id", "deid_patient_id", "subject_id"), "patient")
# The columns that name a row, the first that are there: its unit, and how names of the unit are compared.
UNITS: dict[tuple[str, ...], tuple[str, Normalize]] = {
    ("key",): ("images", normalize_paths),
    ("path",): ("images", partial(normalize_paths, parts=99)),
    ("patient", "study"): ("studies", normalize_studies),
    ("study",): ("studies", normalize_ids),
    ("patient",): ("patients", normalize_ids),
}
Tables = Mapping[str, pa.Table]  # by split
OURS = ("set", "row", "split", "label", "score", "group", "views")  # columns of other tables, and words of options
_WHOLE = r"^-?(0|[1-9]\d{0,17})(\.0+)?$"  # 007 is a code, not a number


def join_facts(
    tables: Tables, paths: Sequence[Path], note: Note = ignore, numbered: bool = False, named: Mapping[str, str] = {}
) -> dict[str, pa.Table]:
    """The tables with the columns of each file; `named` are those of the user's own table: our name → the table's.

    Columns are named in lower case, words joined by `_`; those of whole numbers become int64. With `primary_race`
    comes `race`, unless there is one, or it has numbers. Raises DataError, naming the file, for one without a key or a
    row in common with the tables, a column that these have, a key with different values, and studies that were
    `numbered` by us.
    """
    joined = dict(tables)
    for path in paths:
        columns = _read_columns(path)
        own = {_fold(name): ours for ours, name in named.items() if ours != "key"}  # our keys differ
        known = KEYS | (own if own.keys() <= columns.keys() else {})
        names = {known[name]: name for name in columns if name in known}
        held = names.keys() & set.intersection(*(set(table.column_names) for table in joined.values()))
        used = next((used for used in UNITS if held >= set(used)), None)
        if used is None:
            present, keys = ", ".join(columns), ", ".join(KEYS)
            raise DataError(f"{path}: no column says whose row it is; it has {present}; name one of them {keys}")
        if numbered and "study" in used:
            why = "the data set's studies have no names, and were numbered here"
            how = "use patient or key, or name the data set's column study"
            raise DataError(f"{path}: column {names['study']} cannot be a key: {why}; {how}")
        samples = pa.concat_tables(table.select(sorted({"patient", "study", *used})) for table in joined.values())
        studies = samples.group_by(["patient", "study"]).aggregate([])
        if used == ("study",) and pc.count_distinct(samples["study"]).as_py() != len(studies):
            raise DataError(f"{path}: a study's number is unique only within its patient; add a column patient")
        facts = {name: column for name, column in columns.items() if name not in known}
        # Names that the tables have, or other tables made of them.
        taken = KNOWN.union(
            OURS, Original._fields, map(_fold, LABELS), *(table.column_names for table in joined.values())
        )
        if clash := [name for name in facts if name in taken]:
            raise DataError(f"{path}: column {clash[0]}: the data set's table has that name; rename or remove it")
        sample_keys, file_keys = (
            pc.binary_join_element_wise(*(table[name].cast(pa.string()) for name in parts), "/")
            for table, parts in ((samples, used), (columns, [names[part] for part in used]))
        )
        unit, by = UNITS[used]
        place = join(sample_keys, path, pa.table(facts), file_keys, unit, note, by)
        facts = _type_facts(facts, "race" not in taken)
        start = 0
        for split, table in joined.items():
            rows = place.slice(start, len(table))
            start += len(table)
            for name, column in facts.items():
                table = table.append_column(name, column.take(rows))
            joined[split] = table
    return joined


def _fold(name: str) -> str:
    return "_".join(re.findall(r"\w+", name.lower()))


def _read_columns(path: Path) -> dict[str, pa.Array]:
    """Name in words → cells as text, null if empty. Raises DataError."""
    table = read_strings(path)
    names = [_fold(name) for name in table.column_names]
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            problem = f"'{table.column_names[number]}' is a name twice" if name else "has no name"
            raise DataError(f"{path}: column {number + 1} {problem}; rename or remove it")
    if set(names) <= KEYS.keys():
        raise DataError(f"{path}: no column of facts beside {', '.join(names)}")
    return dict(zip(names, (column.combine_chunks() for column in table.columns), strict=True))


def _type_facts(facts: Mapping[str, pa.Array], with_race: bool) -> dict[str, pa.Array]:
    """Whole numbers as int64, if all cells of a column that are not blank hold one; and the race."""
    typed = {}
    for name, column in facts.items():
        is_whole = pc.all(pc.match_substring_regex(column, _WHOLE), min_count=1).as_py()
        digits = pc.replace_substring_regex(column, r"\.0+$", "")
        typed[name] = digits.cast(pa.int64()) if is_whole else column.cast(pa.string())
    text = typed.get("primary_race", pa.nulls(0))
    if with_race and "race" not in facts and text.type == pa.string():  # numbers are codes, which say nothing here
        # The words by which Glocker et al. group CheXpert's PRIMARY_RACE (Algorithmic encoding of protected
        # characteristics in chest X-ray disease detection models, eBioMedicine 89, 2023). Non-answers stay null.
        no_answer = pc.match_substring_regex(text, r"(?i)\b(unknown|refused|declines|declined)\b")
        typed["race"] = pc.if_else(no_answer, None, "Other")
        for race in ("Asian", "Black", "White"):
            named = pc.match_substring_regex(text, rf"(?i)\b{race}\b")
            typed["race"] = pc.if_else(named, race, typed["race"])
    return typed

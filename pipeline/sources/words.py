"""Words of other tables → ours, by words.csv, a row for each word of a kind, and findings.csv, for each of a set.

Case, spaces and marks of words do not count: `AP_SUPINE` is `ap supine`. A `state` is a label's, a `column` one of our
names. A finding makes its label positive or leaves it open: not annotated, if no other finding decides. The label `all`
is left open wherever nothing is named. A finding without a label says nothing about the 14 or, not annotated, nothing
about any finding. The set `any` holds the rule for all sets, whose findings are labels; docs/mappings.md says why.
"""

import csv
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import name_row, read_data
from pipeline.base.errors import DataError, quote
from pipeline.labels import LABELS, NOT_ANNOTATED, POSITIONS, STATES, describe_unknown, find_label, suggest

NUMBERS = (1, 0, -1)  # the states that CheXpert's tables have
CHOICES = "1, 0, -1, blank or not-annotated"
SHOWN = 20  # words of a column in a message
Values = tuple[tuple[str, int | None], ...]  # a word, or LABEL:word, and its state
EVERY = "all"  # of findings.csv, for each label
Mask = npt.NDArray[np.bool_]
States = npt.NDArray[np.int8]


def fold(word: str) -> str:
    """The letters and digits of a word, in lower case; and question marks, as `no?` is not `no`."""
    return "".join(char for char in word.casefold() if char.isalnum() or char == "?")


@cache
def read_words(kind: str) -> dict[str, str]:
    """Folded word → its meaning; a word for a projection is one for its view, too."""
    rows = read_data(Path(__file__).parent, "words.csv")
    words = {fold(row["word"]): row["meaning"] for row in rows if row["kind"] == kind}
    positions = read_words("projection") if kind == "view" else {}
    return words | {word: POSITIONS[name] for word, name in positions.items()}


def parse_state(word: str) -> int | None:
    """1, 0, -1, NOT_ANNOTATED, or None for a blank. Raises ValueError or KeyError for an unknown word."""
    meaning = read_words("state").get(fold(word))
    if meaning is None:
        return parse_number(word, (*NUMBERS, NOT_ANNOTATED))  # the last one is that of our own shards
    return NOT_ANNOTATED if meaning == "not annotated" else STATES[meaning]


def parse_number(text: str, numbers: Sequence[int] = NUMBERS) -> int:
    """The state that `1`, `1.0` or `-1.00` stands for. Raises ValueError for another number or text."""
    return numbers[numbers.index(float(text))]


def parse_values(text: str) -> Values:
    """The states of words, from `maybe=-1,Edema:unclear=blank`, or `"yes, mild"=1` with a comma. Raises DataError."""
    values: dict[str, int | None] = {}
    for part in next(csv.reader([text], skipinitialspace=True)):
        word, _, state = part.rpartition("=")
        label, colon, rest = word.partition(":")
        if colon and (name := find_label(label.strip()) or suggest(label, LABELS)):
            if name.casefold() != label.strip().casefold():
                raise DataError(describe_unknown(label, LABELS))
            word = f"{name}:{rest.strip()}"
        try:
            meaning = parse_state(state)
        except (KeyError, ValueError):
            word = ""
        if not word or word in values:
            raise DataError(f"'{part}' is not like maybe=-1 or Edema:maybe=-1, each word once; states are {CHOICES}")
        values[word] = meaning
    return tuple(values.items())


def look_up(column: pa.ChunkedArray, find: Callable[[str], object], kind: pa.DataType) -> tuple[pa.Array, list[str]]:
    """What `find` gives for each text [N], called once for each distinct one; and those for which it raises."""
    encoded = column.combine_chunks().dictionary_encode()
    meanings: list[object] = []
    unknown = []
    for text in encoded.dictionary.to_pylist():
        try:
            meanings.append(find(text))
        except (KeyError, ValueError):
            meanings.append(None)
            unknown.append(text)
    return pa.array(meanings, kind).take(encoded.indices), unknown


def find_states(column: pa.ChunkedArray, label: str, values: Values = ()) -> tuple[pa.Array, list[str]]:
    """The states [N] of a label's cells [N] as int8, by `values` before words.csv; and the words that are unknown."""
    given = {word.casefold(): state for word, state in values}

    def find(word: str) -> int | None:
        own, plain = f"{label}:{word}".casefold(), word.casefold()
        return given[own] if own in given else given[plain] if plain in given else parse_state(word)

    return look_up(column, find, pa.int8())


def read_states(
    csv: Path | list[str], columns: Mapping[str, str], cells: Mapping[str, pa.ChunkedArray], values: Values
) -> dict[str, pa.Array]:
    """Label → its states [N] as int8; labels without cells [N] are not annotated.

    Raises DataError for unknown words, with all words of their columns. `csv` is as for `name_row`.
    """
    absent = pa.repeat(pa.scalar(NOT_ANNOTATED, pa.int8()), len(cells["patient"]))
    states: dict[str, pa.Array] = dict.fromkeys(LABELS, absent)
    problems, strange = [], []
    for label in (label for label in LABELS if label in cells):
        states[label], unknown = find_states(cells[label], label, values)
        if unknown:
            place = name_row(csv, pc.index(cells[label], unknown[0]).as_py())
            problems.append(f"{place}, column {columns[label]}: '{quote(unknown[0], 80)}' is not a label state; ")
            problems[-1] += f"the column holds {count_words(cells[label])}"
            strange += unknown
    if problems:
        raise DataError("\n".join([*problems, f"say what they mean ({CHOICES}):{ask_values(strange)}"]))
    return states


def ask_values(words: Iterable[str]) -> str:
    """The option that gives unknown words a meaning, which is left open; nothing without words."""
    pairs = [f'"{word}"=?' if "," in word else f"{word}=?" for word in dict.fromkeys(words)][:SHOWN]
    return f" `values` {shlex.quote(','.join(pairs))}" if pairs else ""


def count_words(column: pa.ChunkedArray) -> str:
    """The distinct words of a column with their numbers of rows, the most frequent first."""
    counts = Counter(column.to_pylist())
    words = counts.most_common(SHOWN)
    texts = [f"'{quote(word, 40)}' ({rows:,})" if word else f"blank ({rows:,})" for word, rows in words]
    return ", ".join(texts) + (f" and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else "")


def translate(column: pa.Array | pa.ChunkedArray, kind: str) -> pa.Array:
    """The meaning of each word [N] of a kind; null if it is blank or unknown."""
    return look_up(pa.chunked_array(column), lambda word: read_words(kind)[fold(word)], pa.string())[0]


class Findings(NamedTuple):
    """A set's findings [F] and the labels [F, 14] that each makes positive or leaves open; `speaks` [F]: of the 14."""

    names: list[str]
    positive: Mask
    open: Mask
    speaks: Mask


@cache
def read_findings(dataset: str) -> Findings:
    """The findings of a data set, by its name in the table."""
    rows = [row for row in read_data(Path(__file__).parent, "findings.csv") if row["set"] == dataset]
    names = [*dict.fromkeys(row["finding"] for row in rows)]
    positive, opened = np.zeros((2, len(names), len(LABELS)), np.bool_)
    speaks = np.ones(len(names), np.bool_)
    for row in rows:
        finding, labels = names.index(row["finding"]), LABELS if row["label"] == EVERY else [row["label"]]
        columns = [LABELS.index(label) for label in labels if label]
        (positive if row["state"] == "positive" else opened)[finding, columns] = True
        speaks[finding] &= not (row["state"] and row["label"] in ("", EVERY))
    return Findings(names, positive, opened, speaks)


def leave_open(states: States) -> None:
    """In states [N, 14], mark as not annotated what is negative only because another finding was named."""
    names, _, opened, _ = read_findings("any")
    named = np.isin(states[:, [LABELS.index(name) for name in names]], (1, -1))
    states[(states == 0) & (named @ opened)] = NOT_ANNOTATED


def parse_findings(path: Path, name: str, column: pa.Array, separator: str, dataset: str) -> dict[str, States]:
    """The states [N] of the 14 labels, from lists of findings [N]. Raises DataError for a finding of another set."""
    findings = read_findings(dataset)
    encoded = pc.fill_null(column, "").dictionary_encode()
    lists = pc.split_pattern(encoded.dictionary, separator)
    place: npt.NDArray[np.int64] = pc.list_parent_indices(lists).to_numpy()
    words = pc.utf8_trim_whitespace(pc.list_flatten(lists))
    codes = pc.index_in(words, value_set=pa.array(findings.names, pa.string()))
    unknown = pc.index(codes.is_null(), True).as_py()
    if unknown >= 0:
        row = pc.index(encoded.indices, int(place[unknown])).as_py()
        finding = quote(words[unknown].as_py(), 80)
        raise DataError(f"{name_row(path, row)}, column {name}: '{finding}' is not a finding of this set")
    listed = np.zeros((len(lists), len(findings.names)), np.bool_)
    listed[place, codes.to_numpy()] = True
    states = np.full((len(lists), len(LABELS)), NOT_ANNOTATED, np.int8)
    states[np.ix_(listed @ findings.speaks, findings.positive.any(axis=0))] = 0
    states[listed @ findings.open] = NOT_ANNOTATED
    states[listed @ findings.positive] = 1
    states[(states[:, 1:-1] == 1).any(axis=1), 0] = 0  # No Finding: none of the others but Support Devices
    leave_open(states)
    by_row = states[encoded.indices.to_numpy()]
    return {label: by_row[:, number] for number, label in enumerate(LABELS)}

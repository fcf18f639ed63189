"""Words that people write into tables → ours, by words.csv: a row for each word, of a kind.

Case, spaces and marks do not count: `AP_SUPINE` is `ap supine`. A `state` is a label's, a `column` one of our names.
"""

import csv
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import name_row, read_data
from pipeline.base.errors import DataError, quote
from pipeline.labels import LABELS, NOT_ANNOTATED, POSITIONS, STATES, describe_unknown, find_label, suggest

MEANINGS = STATES | {"not annotated": NOT_ANNOTATED}
NUMBERS = (1, 0, -1)  # the states that CheXpert's tables have
CHOICES = "1, 0, -1, blank or not-annotated"
SHOWN = 20  # words of a column in a message
Values = tuple[tuple[str, int | None], ...]  # a word, or LABEL:word, and its state


def fold(word: str) -> str:
    """The letters and digits of a word, in lower case; and question marks, as `no?` is not `no`."""
    return "".join(char for char in word.casefold() if char.isalnum() or char == "?")


@cache
def read_words(kind: str) -> dict[str, str]:
    """Folded word → its meaning."""
    rows = read_data(Path(__file__).parent, "words.csv")
    return {fold(row["word"]): row["meaning"] for row in rows if row["kind"] == kind}


def read_views() -> dict[str, str]:
    """Folded word for a view or projection → the view."""
    return read_words("view") | {word: POSITIONS[name] for word, name in read_words("projection").items()}


def parse_state(word: str) -> int | None:
    """1, 0, -1, NOT_ANNOTATED, or None for a blank. Raises ValueError or KeyError for an unknown word."""
    meaning = read_words("state").get(fold(word))
    # The last number is that of our own shards.
    return parse_number(word, (*NUMBERS, NOT_ANNOTATED)) if meaning is None else MEANINGS[meaning]


def parse_number(text: str, numbers: Sequence[int] = NUMBERS) -> int:
    """The state that `1`, `1.0` or `-1.00` stands for. Raises ValueError for another number or text."""
    return numbers[numbers.index(float(text))]


def parse_values(text: str) -> Values:
    """The states of words, from `maybe=-1,Edema:unclear=blank`; `"yes, mild"=1` if a word contains a comma.

    Raises DataError.
    """
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

    Raises DataError for unknown words, with all words of their columns. `csv` may also be the name of each row;
    `columns` are for errors.
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
    texts = [f"'{quote(word, 40)}' ({n:,})" if word else f"blank ({n:,})" for word, n in counts.most_common(SHOWN)]
    return ", ".join(texts) + (f" and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else "")


def translate(column: pa.Array | pa.ChunkedArray, words: Mapping[str, str]) -> pa.Array:
    """The meaning of each word [N]; null if it is blank or unknown."""
    return look_up(pa.chunked_array(column), lambda word: words[fold(word)], pa.string())[0]


def guess_columns(names: Iterable[str]) -> dict[str, str]:
    """Our name → the column, or field of a sample, that is called so or nearly so; for people to check."""
    folded = {fold(name.rpartition(".")[2]): name for name in reversed([*names])}
    guessed: dict[str, str] = {}
    for word, ours in read_words("column").items():
        if word in folded:
            guessed.setdefault(ours, folded[word])
    guessed |= {label: folded[fold(label)] for label in LABELS if fold(label) in folded}
    for word, name in reversed(folded.items()):
        label = suggest(word, LABELS)
        if label and name not in guessed.values():
            guessed.setdefault(label, name)
    return guessed


def spell_command(source: Path, kind: str, columns: Mapping[str, str], needed: Mapping[str, str]) -> str:
    """The command that makes shards; what is needed and not among the columns is added, LABEL for any label."""
    missing = {name: column for name, column in needed.items() if name not in columns}
    if any(name in LABELS for name in columns):
        missing.pop("LABEL", None)
    named = ",".join(f"{ours}={theirs}" for ours, theirs in (dict(columns) | missing).items())
    return f"pipeline shards {shlex.quote(str(source))} OUT `set` {kind} `columns` {shlex.quote(named)}"

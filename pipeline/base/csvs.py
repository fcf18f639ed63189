"""A CSV of any kind, plain or gzipped, or an XLSX → its columns as text; errors name file, line and column."""

import csv as stdlib_csv
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedReader
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from zipfile import ZipFile

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipeline.base.errors import DataError, needs, quote
from pipeline.base.files import check_expansion
from pipeline.base.store import open_to_read

PIECE = 2**20  # bytes to unpack at a time
LONGEST = 2**26  # characters of a line and of a cell
LONGEST_HEADER = 2**16
WORKBOOK = ".xlsx"
HEADERS = {WORKBOOK: 1, ".json": 0}  # lines before the rows, of which each has one
ARROW = (".arrow", ".feather", ".parquet")
SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", WORKBOOK)


def read_strings(csv: Path, names: Sequence[str] | None = None) -> pa.Table:
    """The columns `names` as strings, or all, without spaces around names and cells; empty cells are null.

    Raises DataError, naming the file and the line, also if the table has no rows.
    """
    if not csv.is_file():
        raise DataError(f"{csv}: no such file")
    if csv.suffix.lower() == WORKBOOK:
        table = _read_workbook(csv)
        demand_columns(csv, table.column_names, names or ())
        return table if names is None else table.select(names)
    try:
        # Into Arrow's own memory: its threads may release it after Python has shut down.
        with open_to_read(csv) as file, _unpacked(csv, file) as text, pa.BufferOutputStream() as memory:
            while piece := text.read(PIECE):
                memory.write(piece)
                if text is not file:
                    check_expansion(csv, csv.stat().st_size, memory.tell())
            content = memory.getvalue()
        delimiter = _find_delimiter(content[:LONGEST_HEADER].to_pybytes().partition(b"\n")[0].decode(errors="replace"))
        parse = pacsv.ParseOptions(newlines_in_values=True, delimiter=delimiter)
        # Read only the column names.
        with pacsv.open_csv(pa.BufferReader(content), parse_options=parse) as reader:
            written = reader.schema.names
        header = [name.strip() for name in written]
        types = dict.fromkeys(written, pa.string())
        convert = pacsv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
        if names is not None:
            demand_columns(csv, header, names)
            convert.include_columns = [written[header.index(name)] for name in names]
        table = pacsv.read_csv(pa.BufferReader(content), convert_options=convert, parse_options=parse)
    except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:  # the latter for a damaged .gz
        raise DataError(f"{csv}: not a readable CSV: {_find_fault(csv) or quote(str(error), 200)}") from error
    except UnicodeDecodeError:
        raise DataError(f"{csv}: not a readable CSV: its header is not UTF-8") from None
    if table.num_rows == 0:
        raise DataError(f"{csv}: no rows below the header")
    trimmed = (pc.utf8_trim_whitespace(column) for column in table.columns)
    cells = [pc.if_else(pc.equal(column, ""), None, column) for column in trimmed]
    return pa.Table.from_arrays(cells, names=header if names is None else list(names))


def _read_workbook(path: Path) -> pa.Table:
    """The first sheet of an XLSX as text, whole numbers as such; its first row holds the names. Raises DataError."""
    with needs("xlsx", str(path)):
        import openpyxl  # type: ignore[import-untyped]
    try:
        with open_to_read(path) as file:
            stored = file.seek(0, os.SEEK_END)
            check_expansion(path, stored, sum(member.file_size for member in ZipFile(file).infolist()))
            sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets[0]
            sheet.reset_dimensions()  # those that the file states may be wrong
            rows: list[list[str | None]] = []
            width = letters = 0
            for cells in sheet.rows:
                texts: list[str | None] = []
                for cell in cells:
                    value = "" if cell.value is None or cell.data_type == "e" else cell.value  # e: an error
                    is_whole = isinstance(value, float) and value.is_integer()
                    texts.append(str(int(value) if is_whole else value).strip() or None)
                while texts and texts[-1] is None:
                    texts.pop()
                rows.append(texts)
                width = max(width, len(texts))
                letters += sum(len(text or "") for text in texts)
                # A cell far out stands for a table of empty ones, of at least the 8 bytes of a reference each; and
                # many cells may share a text.
                check_expansion(path, stored, 8 * width * len(rows) + letters)
        while not rows[-1]:
            rows.pop()
    except DataError:
        raise
    except Exception as error:  # of many kinds, for a damaged file
        raise DataError(f"{path}: not a readable XLSX: {quote(str(error), 200)}") from error
    columns = list(zip_longest(*rows))
    names = [column[0] or "" for column in columns]
    return pa.table([pa.array(column[1:], pa.string()) for column in columns], names=names)


def read_header(csv: Path) -> list[str]:
    """The column names; empty if the file cannot be read as a CSV."""
    try:
        return next(_lines(csv))[1]
    except (StopIteration, OSError, EOFError, zlib.error, stdlib_csv.Error):
        return []


def line_of(csv: Path, row: int) -> int:
    """The line of the file, from 1, on which a row of the label table, from 0, begins; 0 for a row of another file."""
    if csv.suffix.lower() in HEADERS:
        return row + 1 + HEADERS[csv.suffix.lower()]
    return next(islice(_lines(csv), row + 1, None), (0, []))[0]


def read_data(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of a CSV of this package: words, mappings, terms."""
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(stdlib_csv.DictReader(file))


def name_row(csv: Path | list[str], row: int) -> str:
    """The file and line of a row, or its number in Arrow's formats, or its name, if `csv` has the name of each."""
    if isinstance(csv, list):
        return csv[row]
    return f"{csv}, row {row + 1}" if csv.suffix.lower() in ARROW else f"{csv}, line {line_of(csv, row)}"


def _lines(csv: Path) -> Iterator[tuple[int, list[str]]]:
    """First line and cells of the header and each row. A blank line is no row; a quoted cell may have many lines."""
    stdlib_csv.field_size_limit(LONGEST)
    with (
        open_to_read(csv) as raw,
        _unpacked(csv, raw) as content,
        io.TextIOWrapper(content, "utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        lines = _limited_lines(text)
        header = next(lines, "")
        reader = stdlib_csv.reader(chain([header], lines), delimiter=_find_delimiter(header[:LONGEST_HEADER]))
        line = 1
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1


def _find_delimiter(header: str) -> str:
    """The mark that the header has the most; a spreadsheet writes semicolons if numbers have commas."""
    return max(",;\t", key=header.count)


def _limited_lines(text: TextIO) -> Iterator[str]:
    """Lines of bounded length."""
    while line := text.readline(LONGEST):
        if len(line) == LONGEST:
            raise stdlib_csv.Error("a line without end")
        yield line


def _unpacked(csv: Path, raw: BufferedReader) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw) if csv.suffix == ".gz" else raw  # type: ignore[return-value]


def demand(csv: Path | list[str], name: str, column: pa.ChunkedArray, valid: pa.ChunkedArray, complaint: str) -> None:
    """Raise DataError for the first row that is not valid, or null in `valid`; `csv` is as for `name_row`."""
    row = pc.index(pc.fill_null(valid, False), False).as_py()
    if row >= 0:
        text = quote(column[row].as_py() or "", 80)
        raise DataError(f"{name_row(csv, row)}, column {name}: '{text}' {complaint}")


def demand_columns(csv: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise DataError if one of the names is missing from `columns`, or appears more than once."""
    for name in names:
        count = list(columns).count(name)
        if count == 0:
            raise DataError(f"{csv}: column {name} is missing; it has {quote(', '.join(columns), 300)}")
        if count > 1:
            raise DataError(f"{csv}: column {name} appears {count} times")


def demand_unique(csv: Path, key: pa.Array) -> None:
    """Raise DataError for the first key that occurs twice."""
    for name in repeated(key)[:1]:
        first = pc.index(key, name).as_py()
        second = pc.index(key.slice(first + 1), name).as_py() + first + 1
        lines = f"lines {line_of(csv, first)} and {line_of(csv, second)}"
        raise DataError(f"{csv}, {lines}: the same image {name} twice")


def repeated(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values that occur more than once."""
    counts = pc.value_counts(column)
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()  # type: ignore[no-any-return]


def _find_fault(csv: Path) -> str | None:
    """The problem with the first row that Arrow cannot read; None if it reads them all."""
    try:
        _, header = next(lines := _lines(csv))
        for line, cells in lines:
            if len(cells) != len(header):
                at_end = len(cells) < len(header) and next(lines, None) is None
                hint = "; it is the last row: is a quote left open, or the file cut off?" if at_end else ""
                return f"line {line}: {len(cells)} cells, but the header has {len(header)}{hint}"
            text = "".join(cells)
            if not text.isascii() and any("\udc80" <= char <= "\udcff" for char in text):
                return f"line {line}: not UTF-8; save the file as UTF-8"
    except (StopIteration, OSError, EOFError, zlib.error, stdlib_csv.Error):
        pass  # a damaged .gz, or no table at all: Arrow reports it
    return None

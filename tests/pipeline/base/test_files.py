import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import DataError
from pipeline.base.csvs import read_header, read_strings
from pipeline.base.files import check_folder, claimed, read_arrow
from tests.conftest import refused


def test_what_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = "(Permission denied|Operation not permitted|Read-only file system)"
    foreign = Path("/sys/kernel")  # where root may make no file either
    with pytest.raises(DataError, match=f"^{foreign}: cannot be written: {reasons}$"), claimed(foreign):
        pass
    check_folder(tmp_path / "scores.csv")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write to any
    with refused(f"{tmp_path}/scores.csv: cannot be written: no right to write to {tmp_path}; choose another folder"):
        check_folder(tmp_path / "scores.csv")


def write_arrow(table: pa.Table, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_tables_are_read_however_they_are_compressed(compression: str | None) -> None:
    words = pa.array(["frontal", "lateral", None] * 1000)
    table = pa.table({"text": words, "codes": words.dictionary_encode(), "number": range(3000)})
    data = write_arrow(table, compression)
    assert read_arrow(Path("t.arrow"), data).equals(table)
    with refused("t.arrow: not an Arrow table: its end is missing"):
        read_arrow(Path("t.arrow"), data[:-8])


def test_bombs_are_refused_by_what_they_claim(tmp_path: Path) -> None:
    nulls = pa.NullArray.from_buffers(pa.null(), 6 * 10**8, [None])
    texts = pa.array(["x" * 10**8]).dictionary_encode()
    for data, expanded in (
        (write_arrow(pa.table({"a": np.zeros(10**8, np.int8)}), "zstd"), "100,000,000"),
        (write_arrow(pa.table({"a": texts}), "zstd"), "100,000,0"),
        (write_arrow(pa.table({"a": nulls})), "75,000,000"),
    ):
        with pytest.raises(DataError) as caught:
            read_arrow(Path("t.arrow"), data)
        assert str(caught.value).startswith(f"t.arrow: its {len(data):,} bytes expand to {expanded}")
    csv = tmp_path / "t.csv.gz"
    csv.write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 25_000_000))
    with pytest.raises(DataError, match=rf"^{csv}: its {csv.stat().st_size:,} bytes expand to \d\d,\d"):
        read_strings(csv)
    assert read_header(csv) == ["a", "b"]
    csv.write_bytes(gzip.compress(b"a" * (2**26 + 1), 1))
    assert read_header(csv) == [], "a line without end"

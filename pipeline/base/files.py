"""Atomic writes, locks on folders, CSVs, Arrow tables."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from filelock import FileLock

from pipeline.base.errors import DataError, MachineError, explain_os_error
from pipeline.base.store import is_remote, object_to_put, open_to_read, read_bytes

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a spreadsheet's formulas begin
MAGIC = b"ARROW1"  # how an Arrow IPC file begins and ends
SMALL, EXPANSION = (2**26, 100)  # bytes that any table may have, and how many more per stored byte
POLL = 0.01  # seconds between tries of a lock
WRITTEN = 2**18  # bytes at once: the kernel takes twice as long for many small pieces


def check_expansion(path: object, stored: int, claimed: int) -> None:
    """Raise DataError if a file of `stored` bytes claims to hold more than a table of that size can.

    Call before allocating memory. Label tables compress 10 to 20 times, a bomb 1000 times or more.
    """
    if claimed > SMALL + EXPANSION * stored:
        fault = f"its {stored:,} bytes expand to {claimed:,} or more, as no table does; it is damaged or forged"
        raise DataError(f"{path}: {fault}")


def read_arrow(path: Path, source: pa.NativeFile | bytes) -> pa.Table:
    """The table of an Arrow IPC file, each value checked. Raises DataError naming `path`."""
    data = pa.py_buffer(source) if isinstance(source, bytes) else source.read_buffer()
    try:
        if data[-len(MAGIC) :].to_pybytes() != MAGIC:
            raise DataError(f"{path}: not an Arrow table: its end is missing")
        # Not by the footer, which may list a batch many times: the bytes measured are the bytes read.
        stream = data[8:]
        messages = list(pa.ipc.MessageReader.open_stream(stream))
        check_expansion(path, data.size, sum(map(_claimed_bytes, messages)))
        table = pa.ipc.open_stream(stream).read_all()
        check_expansion(path, data.size, table.num_rows // 8)  # columns of nulls have rows and no bytes
        table.validate(full=True)  # a forged file's offsets may lead anywhere
    except (OSError, ValueError, struct.error, pa.ArrowException) as error:
        raise DataError(f"{path}: not an Arrow table: {error}") from error
    return table


def _claimed_bytes(message: pa.ipc.Message) -> int:
    """The uncompressed bytes that an IPC message states for its compressed buffers.

    Message.fbs of Arrow's format: a message's header is a RecordBatch (length, nodes, buffers, compression) or a
    DictionaryBatch (id, data: RecordBatch). A compressed buffer begins with its length, -1 if stored uncompressed.
    """
    if message.type not in ("record batch", "dictionary"):
        return 0
    data, body = message.metadata.to_pybytes(), message.body

    def follow(place: int) -> int:
        return place + int(struct.unpack_from("<I", data, place)[0])

    def field(table: int, number: int) -> int:
        """The offset of a field of a flatbuffer's table; 0 if it is absent."""
        layout = table - struct.unpack_from("<i", data, table)[0]
        size, offset = struct.unpack_from("<H", data, layout)[0], 4 + 2 * number
        place = struct.unpack_from("<H", data, layout + offset)[0] if offset < size else 0
        return table + place if place else 0

    batch = follow(field(follow(0), 2))
    if message.type == "dictionary":
        batch = follow(field(batch, 1))
    if not field(batch, 3):
        return 0
    buffers = follow(field(batch, 2))
    claimed = 0
    for number in range(struct.unpack_from("<I", data, buffers)[0]):
        offset, length = struct.unpack_from("<qq", data, buffers + 4 + 16 * number)
        if length:
            claimed += max(struct.unpack_from("<q", body, offset)[0], 0)
    return claimed


def format_table(table: pa.Table) -> pa.Buffer:
    """A table as an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def write_table(path: Path, table: pa.Table) -> str:
    """Write an Arrow IPC file atomically; returns its sha256."""
    data = format_table(table)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


@contextmanager
def locked(path: Path, wait: float = -1) -> Iterator[None]:
    """Hold the kernel's lock of a file against all threads and processes of this machine; a killed one releases it.

    Over NFS it holds among machines as far as the server supports that. Raises TimeoutError after `wait` seconds
    (negative: never), and DataError if the file system has no locks.
    """
    # Not the soft lock that filelock would fall back to: a killed process would hold that forever.
    lock = FileLock(path, fallback_to_soft=False, thread_local=False)
    try:
        lock.acquire(wait, POLL)
    except OSError as error:
        if isinstance(error, TimeoutError) or error.filename:  # held, or the file cannot be opened
            raise
        reason = f"its file system has no locks ({error.strerror}); choose a folder on another one"
        raise DataError(f"{path.parent}: {reason}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder: only one process of this machine writes to it. Raises DataError if this one may not.

    Removes half-written files: at the start those of killed processes, at the end those of workers on a cluster.
    """
    path = folder / ".lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, wait=10 * POLL))  # not 0: the last owner may be removing the file
        except TimeoutError:
            raise DataError(f"{folder}: another process is writing to it; wait for it, or stop it") from None
        except OSError as error:
            raise DataError(f"{folder}: cannot be written: {explain_os_error(error)}") from None
        try:
            remove_temporaries(folder)
            yield
        finally:
            remove_temporaries(folder)
            with suppress(OSError):
                path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove half-written files that killed processes left in a folder."""
    with suppress(OSError):  # `verify` lists what stays; why something else failed is more important
        for path in folder.glob(".*.tmp"):
            if is_temporary(path):
                path.unlink(missing_ok=True)


def is_open_to_all(folder: Path) -> bool:
    """Whether every user of the machine can read the files in a folder; by the umask if there is no folder yet."""
    folder = folder.absolute()
    if folder.exists():
        mode = folder.stat().st_mode
    else:
        os.umask(umask := os.umask(0o077))  # there is no way to read it without setting it
        mode = ~umask
    parents = (parent.stat().st_mode for parent in folder.parents if parent.exists())
    return mode & 0o005 == 0o005 and all(parent & 0o001 for parent in parents)


def is_temporary(path: Path) -> bool:
    """Whether this is the name of a half-written file, which a killed process may leave."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name) is not None


def hash_file(path: Path) -> str:
    """sha256 of a file or an object."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(out: Path) -> None:
    """Raise DataError if the folder of an output file does not exist or is not writable: before the work starts."""
    if not out.parent.is_dir():
        raise DataError(f"{out}: there is no folder {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise DataError(f"{out}: cannot be written: no right to write to {out.parent}; choose another folder")


def format_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as a CSV. Cells that a spreadsheet would run get a quote in front (OWASP)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([f"'{cell}" if str(cell).startswith(FORMULA) else cell for cell in row])
    return text.getvalue()


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as a CSV, atomically."""
    write_atomically(path, format_csv(rows).encode())


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError, naming the file, for anything else."""
    return parse_object(path, read_bytes(path))


def parse_object(path: object, text: bytes) -> dict[str, Any]:
    """A JSON object. Raises DataError, naming the source of the text, for anything else."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}: damaged: not a JSON object")
    return document


def write_atomically(path: Path, data: bytes | pa.Buffer) -> None:
    """Write a complete file, or nothing. Raises DataError, naming the file, if it cannot be written."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def named_writes(path: Path) -> Iterator[None]:
    """Raise MachineError, naming the file or folder, if the system refuses to write it."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {explain_os_error(error)}") from error


def sync_folder(folder: Path) -> None:
    """Make the names of the files in a folder survive a loss of power. An object store keeps what it has confirmed."""
    if is_remote(folder):
        return
    with named_writes(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that cannot, as some network ones
                raise
        finally:
            os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name at the end, complete and on disk, or not at all.

    The path may be one of `pipeline.base.store`. Raises DataError, naming the file, if it cannot be written.
    """
    if is_remote(path):
        with object_to_put(path) as file:
            yield file
        return
    # A unique name: on a cluster, a worker considered lost may still be writing the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with named_writes(path):
            with temporary.open("wb", WRITTEN) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):  # why the writing failed is more important
            temporary.unlink(missing_ok=True)

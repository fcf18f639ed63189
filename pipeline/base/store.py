"""Folders of the ETL that may be in an object store, which has no rename and no links, and is slow per file.

In: a location, `shards` or `s3://bucket/prefix`. Out: a path that code for folders can use. A file is written on this
machine first, then as one object, and read back and compared; an interrupted upload leaves none.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from itertools import groupby, islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

from pipeline.base.errors import FULL, DataError, MachineError, explain_os_error, needs

TOGETHER = 32  # objects to fetch at a time; an image of the full set has 2 MB
CREDENTIALS = {"http": "~/.netrc", "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"}
# Checksums that stores other than AWS may not know; uploads and downloads are compared in any case.
S3_CHECKSUMS = dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")


def find_scheme(location: str) -> str:
    """The scheme of scheme://bucket/prefix or scheme://host/path; "" for a path of this machine.

    Raises DataError for anything between the two, such as s3://$BUCKET/shards with an empty BUCKET.
    """
    scheme, separator, rest = location.partition(":/")
    if not separator or "/" in scheme:
        return ""
    if not re.fullmatch("/[^/]+(/[^/]+)*/?", rest):
        raise DataError(f"{location}: not like https://host/path or s3://bucket/path")
    return scheme


def open_location(location: str) -> Path:
    """A folder, or a path of the universal_pathlib for a URL, which behaves as one. Raises DataError."""
    scheme, _, rest = location.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest:  # they would be in every message
        raise DataError(f"{scheme}://…: a URL with a password or a query; credentials come from the environment")
    if not find_scheme(location):
        return Path(location)
    try:
        with needs("remote", location):
            from upath import UPath

            options: dict[str, Any] = {"use_listings_cache": False}
            if scheme == "s3":
                options["config_kwargs"] = S3_CHECKSUMS
            path: Any = UPath(location.rstrip("/"), **options)
            path.fs  # noqa: B018 - its package may be missing
    except ValueError as error:
        raise DataError(f"{location}: not a URL of a store: {error}") from None
    return path  # type: ignore[no-any-return]


def is_remote(path: Path) -> bool:
    """Whether the path is in an object store."""
    return not isinstance(path, Path)


@contextmanager
def object_to_put(path: Any) -> Iterator[BinaryIO]:
    """A file to write that becomes an object at the end. Raises DataError, naming the object, if that fails."""
    with NamedTemporaryFile() as file:
        try:
            yield file  # type: ignore[misc]
            file.flush()
        except OSError as error:
            if error.errno not in FULL:
                raise
            reason = f"{explain_os_error(error)}, or set TMPDIR to another folder"
            raise MachineError(f"{file.name}: cannot be written: {reason}") from None
        file.seek(0)
        written = hashlib.file_digest(file, "sha256").hexdigest()
        with named_failures(path, "cannot be written"):
            path.fs.put_file(file.name, path.path)
            with path.open("rb") as stored:
                uploaded = hashlib.file_digest(stored, "sha256").hexdigest()
        if uploaded != written:
            raise DataError(f"{path}: what the store gives back is not what was put; start the command again")


def check_access(path: Path) -> None:
    """Raise DataError for a store that cannot be reached, or gives no access."""
    with named_failures(path, "cannot be used"):
        path.exists()


def make_folder(path: Path) -> None:
    """Make a folder and its parents; a store needs none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Any) -> None:
    """Remove a folder with its contents, if it exists."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    for key in path.fs.find(path.path):
        path.fs.rm_file(key)  # not by one recursive `rm`, for which * and [ in a key are wildcards


@contextmanager
def named_reads(path: object) -> Iterator[None]:
    """Name the file in an OSError: the system names one that it cannot open, but none that it cannot read."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def open_to_read(path: Path) -> Iterator[BufferedReader]:
    """A file or an object. If it cannot be read, raises OSError, with its name, for a file, DataError for an object."""
    with named_failures(path, "cannot be read"), named_reads(path), path.open("rb") as file:
        yield file


def read_bytes(path: Path) -> bytes:
    """The content of a file or an object. Raises OSError, with its name."""
    with named_reads(path):
        return path.read_bytes()


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of an open file; fewer only at its end: a single read may return less than it is asked for."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def list_files(path: Path) -> list[Path]:
    """The contents of a folder; nothing if it does not exist: a store has no empty folders."""
    return list(path.iterdir()) if path.exists() else []


def list_folders(path: Any) -> list[str]:
    """Names of the folders in a folder."""
    if not is_remote(path):
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    with named_failures(path, "cannot be listed"):
        listing = path.fs.ls(path.path, detail=True)
    return sorted(entry["name"].rpartition("/")[2] for entry in listing if entry["type"] == "directory")


def list_objects(path: Any) -> set[str]:
    """URLs of all objects below a path of a store."""
    with named_failures(path, "cannot be listed"):
        return set(map(path.fs.unstrip_protocol, path.fs.find(path.path)))


def read_objects(urls: Sequence[str]) -> Iterator[bytes | None]:
    """The content of each object in turn; None for a missing one. Raises DataError for other failures."""
    paths: Iterator[Any] = map(open_location, urls)
    for store, group in groupby(paths, key=lambda path: path.fs):
        while batch := list(islice(group, TOGETHER)):
            with named_failures(batch[0], "cannot be read"):
                contents = store.cat_ranges([path.path for path in batch], None, None, on_error="return")
            for path, content in zip(batch, contents, strict=True):
                is_missing = isinstance(content, FileNotFoundError)
                with named_failures(path, "cannot be read"):
                    if isinstance(content, Exception) and not is_missing:
                        raise content
                yield None if is_missing else content


def find_status(error: Exception) -> int | None:
    """The HTTP status of a client's error."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        response = response["ResponseMetadata"].get("HTTPStatusCode")
    return getattr(response, "status_code", response)


def explain_failure(error: Exception, location: str) -> str:
    """What to do about a store's or server's error; "" if it is about neither a name nor access."""
    status = find_status(error)
    if status == 404 or isinstance(error, FileNotFoundError):
        return "not found: check the name"
    if status in (401, 403) or isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        scheme = location.partition(":")[0].replace("https", "http")
        return f"no access; credentials come from {CREDENTIALS.get(scheme, 'the environment')}"
    return ""


@contextmanager
def named_failures(path: Path, what: str) -> Iterator[None]:
    """Raise DataError for what a store (no local folder) raises, without its text, which may quote credentials."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DataError) or not is_remote(path):
            raise
        reason = explain_failure(error, str(path)) or type(error).__name__
        raise DataError(f"{path}: {what}: {reason}") from None

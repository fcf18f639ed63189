"""Shards at a URL → local files, through a bounded cache that all processes of a machine share.

    python -m train --shards https://host/path     or s3://bucket/path, after pip install 'chexpert-pipeline[remote]'

In: a folder of shards on a web server or in an object store. Credentials come from where their owner keeps
them: AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and the like for s3, ~/.netrc for https. Out: files
whose sha256 is the manifest's. The cache folder holds

    <sha256>                  a shard; its modification time is when it was last asked for
    <sha256>.<bytes>.part     a download, locked while it is under way; counts with all its bytes. One that was
                              interrupted is continued by the next process that wants the file
    sets/<sha256>/            manifest and tables of some shards; they stay, and count, until somebody deletes them
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from contextlib import closing, nullcontext, suppress
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from itertools import chain
from pathlib import Path
from threading import Event
from typing import IO, TYPE_CHECKING, BinaryIO, Literal
from urllib.parse import quote

from pipeline.base.errors import FULL, DataError, explain_os_error, needs
from pipeline.base.files import hash_file, write_atomically
from pipeline.base.store import S3_CHECKSUMS, explain_failure, find_scheme, find_status
from pipeline.manifest import NAME, Shard, read_manifest

if TYPE_CHECKING:
    from botocore.client import BaseClient

SCHEMES = ("http", "https", "s3")
CACHE, CACHE_SIZE = Path(".cache"), 20 * 10**9  # bytes
ATTEMPTS, PAUSE = 4, 1.0  # of a download; seconds after the first failure, doubled after each further one
PIECE = 2**16  # bytes that are read at a time
POLL = 0.05  # seconds between checks of other downloads, and of whether this one is still wanted
PATIENCE = 30.0  # seconds without a byte from a server, or from another process's download
GRACE = 2.0  # seconds that a requested file is kept, so that its reader can open it
TABLE_BYTES = 2**28  # read at most of a manifest or table, whatever the server sends
_SHA256, _PART = re.compile("[0-9a-f]{64}"), re.compile(r"[0-9a-f]{64}\.(\d+)(?:\.[0-9a-f]{8})?\.part")
logger = logging.getLogger(__name__)
SECRETS = re.compile(r"(?<=://)[^/\s'\"]*@|\?[^\s'\"]*")


def redact(text: str) -> str:
    """A URL, or a text containing URLs, without user names, passwords and query strings."""
    return SECRETS.sub("", text)


def find_shards(shards: str | Path, cache: Path = CACHE, cache_size: int = CACHE_SIZE) -> "tuple[Path, Remote | None]":
    """The folder of manifest and tables, and where the tars are if those are at a URL.

    Raises DataError if the URL cannot be read.
    """
    if not find_scheme(redact(str(shards))):
        return Path(shards), None
    remote = Remote(str(shards), cache, cache_size)
    return remote.mirror(), remote


class DownloadStopped(Exception):  # noqa: N818 - no error
    """The file is no longer needed."""


class Remote:
    """Shards at a URL, downloaded when they are asked for into a folder that stays within `limit` bytes.

    The least recently used files are evicted. Threads and processes may share the folder: a file requested by several
    at once is downloaded once. A returned file may be unlinked a moment later; readers that have opened or mapped it
    are unaffected. Raises DataError for a URL or a folder that cannot be used, and if packages are missing.
    """

    def __init__(self, url: str, folder: Path, limit: int) -> None:
        self.url, self.folder, self.limit, self.sets = url, folder, limit, folder / "sets"
        self.name = redact(url)
        scheme = find_scheme(self.name).partition(":")[0]
        if scheme and scheme not in SCHEMES:
            raise DataError(f"shards cannot be read from {scheme}: give a folder, https:// or s3://")
        self.is_s3 = scheme == "s3"
        if not scheme or (self.is_s3 and self.name != url):
            raise DataError(f"{self.name}: not like https://host/path or s3://bucket/path")
        with needs("remote", self.name):
            import_module("botocore.session" if self.is_s3 else "requests")
        _s3_client.cache_clear()  # credentials may have changed since shards were last opened
        self._verified: set[Path] = set()  # by this process
        try:
            self.sets.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as a cache: {error.strerror}") from None

    def mirror(self) -> Path:
        """A local folder with the current manifest and its tables. Raises DataError naming the URL."""
        data = self._read(NAME)
        folder = self.sets / hashlib.sha256(data).hexdigest()
        folder.mkdir(exist_ok=True)
        write_atomically(folder / NAME, data)
        try:
            manifest = read_manifest(folder)
        except DataError as error:
            shutil.rmtree(folder)
            raise DataError(str(error).replace(f"{folder / NAME}", redact(self._locate(NAME)))) from None
        for split in manifest.splits.values():
            table = folder / split.table
            if not table.exists() or hash_file(table) != split.table_sha256:
                write_atomically(table, self._read(split.table, split.table_sha256))
        self._make_room(0, self.name)
        return folder

    def path(self, shard: Shard, stop: Event | None = None) -> Path:
        """The verified local file of a shard, downloaded if it is missing or damaged.

        Raises DataError naming its URL, and DownloadStopped once `stop` is set.
        """
        stop, name = stop or Event(), redact(self._locate(shard.file))
        if not _SHA256.fullmatch(shard.sha256):
            raise DataError(f"{name}: '{shard.sha256}' in its manifest is not a sha256")
        path = self.folder / shard.sha256
        part = path.with_name(f"{shard.sha256}.{shard.bytes}.part")
        since, length = time.monotonic(), -1  # when another process's download last grew, and its bytes
        while not self._is_here(path):
            if file := _claim(part, "a+b"):
                with file:
                    try:
                        if not path.exists() and self._make_room(shard.bytes, name, part):
                            self._fetch(shard.file, file, shard.bytes, shard.sha256, stop)
                            os.fsync(file.fileno())
                            os.utime(part)
                            part.replace(path)
                            self._verified.add(path)
                    finally:
                        if os.fstat(file.fileno()).st_size == 0:
                            part.unlink(missing_ok=True)
            else:
                with suppress(FileNotFoundError):
                    if (size := part.stat().st_size) != length:
                        since, length = time.monotonic(), size
                    elif time.monotonic() - since > PATIENCE:
                        logger.warning("%s: another process adds nothing to %s: downloading it as well", name, part)
                        part = path.with_name(f"{shard.sha256}.{shard.bytes}.{secrets.token_hex(4)}.part")
            pause = POLL * secrets.randbelow(100) / 50  # of random length, or two may always claim room at once
            if path not in self._verified and stop.wait(pause):
                raise DownloadStopped
        return path

    def _is_here(self, path: Path) -> bool:
        """Whether a file matches the hash in its name, and is kept for a moment; if not, it is removed."""
        with suppress(FileNotFoundError):  # missing, or evicted meanwhile
            os.utime(path)
            if path in self._verified or hash_file(path) == path.name:
                self._verified.add(path)
                return True
            path.unlink()
        return False

    def _make_room(self, size: int, name: str, mine: Path | None = None) -> bool:
        """Evict until `size` bytes fit, those of the part `mine` among them, which is claimed: others count it.

        False if it must wait for downloads, or for files to be opened. Raises DataError naming `name` if `size` bytes
        never fit.
        """
        pinned = sum(path.stat().st_size for path in self.sets.glob("*/[!.]*"))
        if pinned + size > self.limit:
            raise DataError(
                f"{name}: {size:,} bytes do not fit into a cache of {self.limit:,}, of which tables take "
                f"{pinned:,}; raise `cache_size`"
            )
        rest, files = self.limit - pinned - size, []
        # Parts first: one that is renamed meanwhile is seen again. The folder may hold unrelated files.
        for path in chain(self.folder.glob("*.part"), self.folder.glob("?" * 64)):
            part = _PART.fullmatch(path.name)
            if path != mine and (part or _SHA256.fullmatch(path.name)):
                with suppress(FileNotFoundError):
                    state = path.stat()
                    files.append((state.st_mtime, int(part[1]) if part else state.st_size, path))
        rest -= sum(length for _, length, _ in files)
        for used, length, path in sorted(files):
            if rest < 0 and abs(time.time() - used) > GRACE:
                with suppress(FileNotFoundError), _claim(path, "r+b") or nullcontext() as file:
                    if file is not None:  # a part that nobody is downloading, or a finished file
                        path.unlink()
                        rest += length
        return rest >= 0

    def _read(self, name: str, sha256: str = "") -> bytes:
        """A small file. Raises DataError naming its URL."""
        file = BytesIO()
        self._fetch(name, file, TABLE_BYTES, sha256, Event())
        return file.getvalue()

    def _fetch(self, name: str, file: IO[bytes], most: int, sha256: str, stop: Event) -> None:
        """Complete a file that may hold the beginning of a remote one: at most `most` bytes with the hash, if given.

        Retried after transient failures; those after which the file has grown do not add up: a link may be cut many
        times. Raises DataError naming the URL, and DownloadStopped once `stop` is set.
        """
        url, failures, longest = self._locate(name), 0, 0
        while failures < ATTEMPTS:
            if stop.wait(PAUSE * 2 ** (failures - 1) if failures else 0):
                raise DownloadStopped
            try:
                if not sha256:  # parts of two versions could not be told apart
                    _empty(file)
                self._append(file, url, most, stop)
                file.seek(0)
                if sha256 in ("", hashlib.file_digest(file, "sha256").hexdigest()):  # type: ignore[arg-type]
                    return
                _empty(file)  # wrong content: start over
                raise OSError("its sha256 is not the manifest's")  # noqa: TRY301
            except DownloadStopped:
                raise
            except Exception as error:  # HTTP and S3 clients raise their own types
                reason, may_pass = self._describe(error)
            if not may_pass:
                raise DataError(f"{redact(url)}: {reason}")
            length = file.seek(0, os.SEEK_END) if sha256 else 0
            failures = 1 if length > longest else failures + 1
            longest = max(longest, length)
        raise DataError(f"{redact(url)}: {reason}; tried {ATTEMPTS} times")

    def _append(self, file: IO[bytes], url: str, most: int, stop: Event) -> None:
        """Add what follows the file's last byte, or all from the start if the server gives no parts.

        Raises OSError for more than `most` bytes: Content-Length may lie.
        """
        start = file.seek(0, os.SEEK_END)
        try:
            is_part, body = (_open_s3 if self.is_s3 else _open_http)(url, start)
        except Exception as error:
            if find_status(error) == 416:  # Range Not Satisfiable: it ends at `start`, or before
                return
            raise
        if not is_part:
            _empty(file)
        with closing(body):
            while piece := body.read(PIECE):
                if stop.is_set():
                    raise DownloadStopped
                if file.tell() + len(piece) > most:
                    _empty(file)
                    raise OSError(f"more than the {most:,} bytes that it may have")
                while piece:  # a nearly full disk takes a part, and fails at the next
                    piece = piece[file.write(piece) :]

    def _locate(self, name: str) -> str:
        base, mark, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{name if self.is_s3 else quote(name)}{mark}{query}"

    def _describe(self, error: Exception) -> tuple[str, bool]:
        """The reason without secrets, and whether a retry may help."""
        if isinstance(error, OSError) and (error.filename or error.errno in FULL):
            return f"{self.folder}: cannot be written: {explain_os_error(error)}", False
        if reason := explain_failure(error, self.url):
            return reason, False
        if "timed out" in str(error) or "Read timeout" in str(error):
            return f"no byte for {PATIENCE:g} seconds", True
        status = find_status(error)
        text = f"HTTP status {status}" if status else redact(str(error))
        return text, not isinstance(error, ValueError)  # an invalid URL


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


def _open_http(url: str, start: int) -> tuple[bool, BinaryIO]:
    """Whether the server sends only the bytes from `start` on, and the body."""
    import requests

    # Uncompressed: expanding a compressed response would let a few bytes fill the disk.
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    response = requests.get(url, headers=headers, stream=True, timeout=PATIENCE)
    response.raise_for_status()
    return response.status_code == 206, response.raw


def _open_s3(url: str, start: int) -> tuple[bool, BinaryIO]:
    """As `_open_http`."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    response = _s3_client(os.getpid()).get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-")
    return "ContentRange" in response, response["Body"]


@lru_cache
def _s3_client(process: int) -> "BaseClient":
    """A client that all threads of a process share; a forked one, which may not use it, makes its own."""
    from botocore.config import Config
    from botocore.session import Session

    once = {"total_max_attempts": 1}
    config = Config(connect_timeout=PATIENCE, read_timeout=PATIENCE, retries=once, **S3_CHECKSUMS)
    return Session().create_client("s3", config=config)


def _claim(part: Path, mode: Literal["a+b", "r+b"]) -> IO[bytes] | None:
    """A part, locked as long as it is open; None if another process or thread is downloading into it."""
    file: IO[bytes] = part.open(mode, buffering=0)  # so that closing it after a failed write does not fail again
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), part.stat()):  # and was not finished meanwhile
            return file
    file.close()
    return None

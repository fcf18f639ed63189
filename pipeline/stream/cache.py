"""Shards at a URL → local files, through a bounded cache that all processes of a machine share.

    python -m train --shards https://host/path     or s3://bucket/path, after pip install 'chexpert-pipeline[remote]'

Credentials come from where their owner keeps them: AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and the like for
s3, ~/.netrc for https. The sha256 of each file is the manifest's. The cache folder holds

    <sha256>                  a shard; its modification time is when it was last asked for
    <sha256>.<bytes>.part     a download, locked while it is under way; counts with all its bytes
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
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from itertools import chain
from pathlib import Path
from threading import Event
from typing import IO, Any, BinaryIO
from urllib.parse import quote

from pipeline.base.errors import FULL, DataError, explain_os_error, needs
from pipeline.base.files import hash_file, write_atomically
from pipeline.base.store import S3_CHECKSUMS, explain_failure, find_scheme, find_status
from pipeline.manifest import NAME, Shard, read_manifest

CACHE, CACHE_SIZE = Path(".cache"), 20 * 10**9  # bytes
ATTEMPTS, PAUSE = 4, 1.0  # of a download; seconds after the first failure, doubled after each further one
PIECE = 2**16  # bytes that are read at a time
POLL = 0.05  # seconds between checks of other downloads, and of whether this one is still wanted
PATIENCE = 30.0  # seconds without a byte from a server, or from another process's download
GRACE = 2.0  # seconds that a requested file is kept, so that its reader can open it
TABLE_BYTES = 2**28  # read at most of a manifest or table, whatever the server sends
_SHA256 = "[0-9a-f]{64}"
_FILE = re.compile(rf"{_SHA256}(?:\.(\d+)(?:\.[0-9a-f]{{8}})?\.part)?")
logger = logging.getLogger(__name__)


def redact(text: str) -> str:
    """A URL, or a text containing URLs, without user names, passwords and query strings."""
    return re.sub(r"(?<=://)[^/\s'\"]*@|\?[^\s'\"]*", "", text)


def find_shards(shards: str | Path, cache: Path = CACHE, cache_size: int = CACHE_SIZE) -> "tuple[Path, Remote | None]":
    """The folder of manifest and tables, and the URL's tars, if it is one. Raises DataError if it cannot be read."""
    if not find_scheme(redact(str(shards))):
        return Path(shards), None
    remote = Remote(str(shards), cache, cache_size)
    return remote.mirror(), remote


class Remote:
    """Shards at a URL, downloaded when they are asked for into a folder that stays within `limit` bytes.

    The least recently used are evicted, which does not affect who has opened them. Several threads and processes that
    ask for a shard download it once. Raises DataError for a URL or a folder that cannot be used.
    """

    def __init__(self, url: str, folder: Path, limit: int) -> None:
        self.url, self.name, self.folder, self.sets, self.limit = url, redact(url), folder, folder / "sets", limit
        scheme = find_scheme(self.name).partition(":")[0]
        if scheme not in ("http", "https", "s3"):
            raise DataError(f"shards cannot be read from {scheme}: give a folder, https:// or s3://")
        self.is_s3 = scheme == "s3"
        if self.is_s3 and self.name != url:
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

        Raises DataError naming its URL, and CancelledError once `stop` is set.
        """
        stop, name = stop or Event(), redact(self._locate(shard.file))
        if not re.fullmatch(_SHA256, shard.sha256):
            raise DataError(f"{name}: '{shard.sha256}' in its manifest is not a sha256")
        path = self.folder / shard.sha256
        part = path.with_name(f"{shard.sha256}.{shard.bytes}.part")
        while True:
            with suppress(FileNotFoundError):  # missing, or evicted meanwhile
                os.utime(path)  # so that it stays for a moment
                if path in self._verified or hash_file(path) == shard.sha256:
                    self._verified.add(path)
                    return path
                path.unlink()
            with _claim(part, "a+b") as file:
                if file:
                    try:
                        _empty(file)  # of what a killed process may have left
                        if not path.exists() and self._make_room(shard.bytes, name):
                            self._fetch(shard.file, file, shard.bytes, shard.sha256, stop)
                            os.fsync(file.fileno())
                            part.replace(path)
                            self._verified.add(path)
                            continue
                    finally:
                        if _leads_to(part, file):  # and was not renamed: others may begin a part by that name
                            part.unlink()
                else:
                    with suppress(FileNotFoundError):  # it may be complete by now
                        if abs(time.time() - part.stat().st_mtime) > PATIENCE:
                            logger.warning("%s: another process adds nothing to %s: downloading it as well", name, part)
                            part = path.with_name(f"{shard.sha256}.{shard.bytes}.{secrets.token_hex(4)}.part")
            if stop.wait(POLL * secrets.randbelow(100) / 50):  # of random length, or two may always claim room at once
                raise CancelledError

    def _make_room(self, size: int, name: str) -> bool:
        """Evict until all fits, with the `size` bytes of a part that is claimed; False if that must wait for others.

        Raises DataError naming `name` if they never fit.
        """
        pinned = sum(path.stat().st_size for path in self.sets.glob("*/[!.]*"))
        if pinned + size > self.limit:
            text = f"do not fit into a cache of {self.limit:,}, of which tables take {pinned:,}; raise `cache_size`"
            raise DataError(f"{name}: {size:,} bytes {text}")
        files = []
        # Parts first: one that is renamed meanwhile is seen again. The folder may hold unrelated files.
        for path in chain(self.folder.glob("*.part"), self.folder.glob("?" * 64)):
            if match := _FILE.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    state = path.stat()
                    files.append((state.st_mtime, int(match[1] or state.st_size), path))
        excess = pinned + sum(length for _, length, _ in files) - self.limit
        for used, length, path in sorted(files):
            if excess > 0 and abs(time.time() - used) > GRACE:
                with suppress(FileNotFoundError), _claim(path, "r+b") as file:
                    if file:  # a part that nobody is downloading, or a complete file
                        path.unlink()
                        excess -= length
        return excess <= 0

    def _read(self, name: str, sha256: str = "") -> bytes:
        file = BytesIO()
        self._fetch(name, file, TABLE_BYTES, sha256, Event())
        return file.getvalue()

    def _fetch(self, name: str, file: IO[bytes], most: int, sha256: str, stop: Event) -> None:
        """Download into an empty file: at most `most` bytes, with the hash, if given.

        Raises DataError naming the URL, and CancelledError once `stop` is set.
        """
        url, failures, longest = redact(self._locate(name)), 0, 0
        while failures < ATTEMPTS:
            if stop.wait(PAUSE * 2 ** (failures - 1) if failures else 0):
                raise CancelledError
            try:
                return self._append(name, file, most, sha256, stop)
            except CancelledError:
                raise
            except Exception as error:  # HTTP and S3 clients raise their own types
                reason, may_pass = self._describe(error)
            if not may_pass:
                raise DataError(f"{url}: {reason}")
            # Failures after which the file has grown do not add up: a link may be cut many times.
            length = file.tell() if sha256 else 0
            failures, longest = (1, length) if length > longest else (failures + 1, longest)
        raise DataError(f"{url}: {reason}; tried {ATTEMPTS} times")

    def _append(self, name: str, file: IO[bytes], most: int, sha256: str, stop: Event) -> None:
        """Add what follows the file's last byte. Raises OSError, and empties the file, if its content is wrong."""
        start = file.tell() if sha256 else 0  # parts of two versions could not be told apart
        try:
            status, body = self._open(name, start)
        except Exception as error:
            if find_status(error) != 416:  # Range Not Satisfiable: it ends at `start`, or before
                raise
            status, body = 206, BytesIO()
        with closing(body):
            if not start or status != 206:  # Partial Content
                _empty(file)
            while piece := body.read(PIECE):
                if stop.is_set():
                    raise CancelledError
                if file.tell() + len(piece) > most:  # Content-Length may lie
                    _empty(file)
                    raise OSError(f"more than the {most:,} bytes that it may have")
                while piece:  # a nearly full disk takes a part, and fails at the next
                    piece = piece[file.write(piece) :]
        file.seek(0)
        if sha256 not in ("", hashlib.file_digest(file, "sha256").hexdigest()):  # type: ignore[arg-type]
            _empty(file)
            raise OSError("its sha256 is not the manifest's")

    def _open(self, name: str, start: int) -> tuple[int, BinaryIO]:
        """The HTTP status, and the body, of a file's bytes from `start` on."""
        url, part = self._locate(name), f"bytes={start}-"
        if self.is_s3:
            bucket, _, key = url.removeprefix("s3://").partition("/")
            answer = _s3_client(os.getpid()).get_object(Bucket=bucket, Key=key, Range=part)
            return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Body"]
        import requests

        # Uncompressed: expanding a compressed response would let a few bytes fill the disk.
        headers = {"Accept-Encoding": "identity", "Range": part}
        response = requests.get(url, headers=headers, stream=True, timeout=PATIENCE)
        response.raise_for_status()
        return response.status_code, response.raw

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
    file.truncate(file.seek(0))


@lru_cache
def _s3_client(process: int) -> Any:  # as botocore has no types
    """A client that all threads of a process share; a forked one, which may not use it, makes its own."""
    from botocore.config import Config
    from botocore.session import Session

    once = {"total_max_attempts": 1}
    config = Config(connect_timeout=PATIENCE, read_timeout=PATIENCE, retries=once, **S3_CHECKSUMS)
    return Session().create_client("s3", config=config)


@contextmanager
def _claim(path: Path, mode: str) -> Iterator[IO[bytes] | None]:
    """A file, locked as long as it is open; None if another process or thread is downloading into it."""
    with path.open(mode, buffering=0) as file:  # so that closing it after a failed write does not fail again
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = _leads_to(path, file)  # and was not finished meanwhile
        except BlockingIOError:
            is_mine = False
        yield file if is_mine else None


def _leads_to(path: Path, file: IO[bytes]) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False

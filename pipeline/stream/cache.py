"""Shards at a URL → local files, through a bounded cache that all processes of a machine share.

    python -m train --shards https://host/path     or s3://bucket/path, after pip install 'chexpert-pipeline[remote]'

In: a folder of shards on a web server or in an object store. Credentials come from where their owner keeps
them: AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and the like for s3, ~/.netrc for https. Out: files
whose sha256 is the manifest's. The cache folder holds

    <sha256>                  a shard; its modification time is when it was last asked for
    <sha256>.<bytes>.part     a download under way, locked by who does it; counts with all its bytes
                              (a table's, whose size no manifest says, once it is there). One that was
                              interrupted is continued by whoever wants the file next
    sets/<sha256>/            manifest and tables of some shards; they stay, and count, until somebody deletes them
    lock                      held by whoever looks, makes room or renames; never while bytes travel
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any, TypeVar
from urllib.parse import quote

from pipeline.base.errors import DataError, explain_os_error, needs
from pipeline.base.files import locked, write_atomically
from pipeline.base.store import AWS_CREDENTIALS, find_scheme, is_refusal
from pipeline.manifest import NAME, Shard, read_manifest
from pipeline.stream.plan import WINDOW

Result = TypeVar("Result")

SCHEMES = ("http", "https", "s3")
CACHE, CACHE_SIZE = Path(".cache"), 20 * 10**9  # bytes
KEPT_OPEN = 2 * WINDOW  # shards: the window that is read, and the next
DOWNLOADS = 4  # at the same time
AT_ONCE = KEPT_OPEN + DOWNLOADS  # shards
PIECE = 2**16  # bytes that are read at a time
POLL = 0.05  # seconds between looks at what other downloads do, and whether this one is still wanted
PATIENCE = 30.0  # seconds without a byte of another's download, which may be suspended: as a server has
GRACE = 2.0  # seconds in which whoever asked for a file opens it: until then it stays
MANIFEST_BYTES = 2**28  # that are read of one, whatever the server sends
_SHA256, _PART = re.compile("[0-9a-f]{64}"), re.compile(r"[0-9a-f]{64}\.(\d+)(?:\.[0-9a-f]{8})?\.part")
logger = logging.getLogger(__name__)
SECRETS = re.compile(r"(?<=://)[^/\s'\"]*@|\?[^\s'\"]*")


def is_url(location: str) -> bool:
    """Whether shards lie at a URL rather than in a folder. Raises DataError for URLs that are not read."""
    scheme = find_scheme(redact(location)).partition(":")[0]
    if scheme and scheme not in SCHEMES:
        raise DataError(f"shards cannot be read from {scheme}: give a folder, https:// or s3://")
    return bool(scheme)


def redact(text: str) -> str:
    """A URL, or a text that quotes some, without user names, passwords and query strings."""
    return SECRETS.sub("", text)


def find_shards(
    shards: str | Path, cache: Path = CACHE, cache_size: int = CACHE_SIZE
) -> "tuple[Path, Remote | None]":
    """The folder of manifest and tables, and where the tars are if those are at a URL.

    Raises DataError where the URL cannot be read.
    """
    if not is_url(str(shards)):
        return Path(shards), None
    remote = Remote(str(shards), Cache(cache, cache_size))
    return remote.mirror(), remote


class DownloadStopped(Exception):  # noqa: N818 - no error
    """Whoever wanted a file wants it no more."""


class Cache:
    """A folder of verified files that stays within `limit` bytes by evicting the least recently used ones.

    Threads and processes may share it: a file that several ask for at once is downloaded once. A file that was
    handed out may be unlinked a moment later; whoever has opened or mapped it keeps it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.sets = folder / "sets"
        self._verified: set[Path] = set()  # by this process
        try:
            self.sets.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as a cache: {error.strerror}") from None

    def get(
        self, path: Path, name: str, sha256: str, size: int, download: Callable[[Path], object], stop: Event
    ) -> Path:
        """`path`, which is to have that hash; where it is missing or damaged, `download` writes it first.

        Raises DataError naming `name` where `size` bytes never fit, DownloadStopped once `stop` is set, and whatever
        `download` raises.
        """
        if not _SHA256.fullmatch(sha256):
            raise DataError(f"{name}: '{sha256}' in its manifest is not a sha256")
        part = self.folder / f"{sha256}.{size}.part"
        began, length = time.monotonic(), -1
        while True:
            if part.exists() and part.stat().st_size != length:
                began, length = time.monotonic(), part.stat().st_size
            elif length >= 0 and time.monotonic() - began > PATIENCE:
                logger.warning(
                    "%s: %s adds nothing to %s: downloading it as well", name, _name_holder(part), part
                )
                part = self.folder / f"{sha256}.{size}.{secrets.token_hex(4)}.part"
                began, length = time.monotonic(), -1
            with self.locked():
                is_there = path.exists()
                if is_there:
                    os.utime(path)
                elif not _is_held(part) and self.make_room(size, name, part):
                    file = part.open("ab")
                    fcntl.flock(file, fcntl.LOCK_EX)
                    break
            if not is_there:
                _wait(POLL, stop)
            elif path in self._verified:
                return path
            else:
                seen = _identity(path)
                if _digest(path) == sha256:
                    self._verified.add(path)
                else:
                    with self.locked():
                        if (
                            _identity(path) == seen
                        ):  # and not a good one that another process has put there meanwhile
                            path.unlink(missing_ok=True)
        with file:
            try:
                download(part)
                os.fsync(file.fileno())
                with self.locked():
                    os.utime(part)
                    part.replace(path)
            except BaseException:
                if part.exists() and part.stat().st_size == 0:
                    part.unlink()
                raise
        self._verified.add(path)
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other threads and processes from looking at the folder or changing it."""
        with locked(self.folder / "lock"):
            yield

    def make_room(self, size: int, name: str, kept: Path | None = None) -> bool:
        """Evict until `size` bytes fit, those of the file `kept` among them; call it while `locked`.

        False where that has to wait for downloads, or for files to be opened. Raises DataError naming `name`
        where `size` bytes never fit.
        """
        pinned = sum(path.stat().st_size for path in self.sets.glob("*/*"))
        if pinned + size > self.limit:
            raise DataError(
                f"{name}: {size:,} bytes do not fit into a cache of {self.limit:,}, of which tables take "
                f"{pinned:,}; raise `cache_size`"
            )
        rest, files = self.limit - pinned - size, []
        for path in self.folder.iterdir():  # others may keep files here too
            part = _PART.fullmatch(path.name)
            if part and _is_held(path):
                rest -= int(part[1])
            elif path != kept and (part or _SHA256.fullmatch(path.name)):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
                rest -= path.stat().st_size
        for used, length, path in sorted(files):
            if rest < 0 and abs(time.time() - used) > GRACE:
                path.unlink()
                rest += length
        return rest >= 0


class Remote:
    """Shards at a URL, downloaded into a cache when they are asked for; threads may share it.

    A download that fails is tried `attempts` times, `pause` seconds after the first failure, then after twice
    as long each time; `timeout` is in seconds without a byte. Raises DataError where packages are missing.
    """

    def __init__(
        self, url: str, cache: Cache, *, attempts: int = 4, pause: float = 1.0, timeout: float = 30.0
    ) -> None:
        self.url, self.cache = url, cache
        self.attempts, self.pause, self.timeout = attempts, pause, timeout
        self.is_s3 = url.startswith("s3:")
        self._read = _read_s3 if self.is_s3 else _read_http
        if not is_url(url) or (self.is_s3 and redact(url) != url):
            raise DataError(f"{redact(url)}: not like https://host/path or s3://bucket/path")
        with needs("remote", redact(url)):
            import_module("botocore.session" if self.is_s3 else "requests")
        _open_s3.cache_clear()  # credentials may be others than when shards were opened before

    def mirror(self) -> Path:
        """A local folder with the manifest as it is now and its tables. Raises DataError naming the URL."""
        with TemporaryDirectory(dir=self.cache.folder) as temporary:
            file = Path(temporary) / NAME
            self._attempt(NAME, partial(self._fetch, file, MANIFEST_BYTES, Event()), Event())
            data = file.read_bytes()
        folder = self.cache.sets / hashlib.sha256(data).hexdigest()
        with self.cache.locked():
            folder.mkdir(exist_ok=True)
            write_atomically(folder / NAME, data)
            try:
                manifest = read_manifest(folder)
            except DataError as error:
                shutil.rmtree(folder)
                raise DataError(str(error).replace(f"{folder / NAME}", redact(self._locate(NAME)))) from None
        for split in manifest.splits.values():
            self._get(folder / split.table, split.table, split.table_sha256)
        with self.cache.locked():
            self.cache.make_room(0, redact(self.url))
        return folder

    def describe_room(self, shards: Sequence[Shard]) -> str:
        """What reading these shards takes of the cache. Raises DataError where the disk has no room for it."""
        need, limit = sum(sorted((shard.bytes for shard in shards), reverse=True)[:AT_ONCE]), self.cache.limit
        taken = sum(path.stat().st_size for path in self.cache.folder.iterdir() if path.is_file())
        lacking = min(need, limit) - taken - shutil.disk_usage(self.cache.folder).free
        if lacking > 0:
            raise DataError(
                f"{self.cache.folder}: its disk lacks {lacking:,} bytes to read {redact(self.url)}; choose another "
                "folder (`cache`)"
            )
        text = (
            f"{redact(self.url)}: reading takes up to {need:,} bytes of the cache, {AT_ONCE} shards at once"
        )
        if need <= limit:
            return text
        return f"{text}; it holds {limit:,}, so some are downloaded again: raise `cache_size`"

    def path(self, shard: Shard, stop: Event | None = None) -> Path:
        """The verified local file of a shard, downloaded if need be. Raises DataError naming its URL.

        Once `stop` is set it raises DownloadStopped.
        """
        return self._get(self.cache.folder / shard.sha256, shard.file, shard.sha256, shard.bytes, stop)

    def _get(
        self, path: Path, name: str, sha256: str, size: int | None = None, stop: Event | None = None
    ) -> Path:
        stop = stop or Event()

        def fetch(part: Path, url: str) -> None:
            # One of unknown size may be whole, and then has no next byte to ask for.
            start = 0 if size is None else part.stat().st_size
            if start != size:
                self._fetch(part, self.cache.limit if size is None else size, stop, url, start)
            length = part.stat().st_size
            if size is not None and length < size:
                wrong = f"{length:,} bytes, not {size:,} as in the manifest"
            elif _digest(part) != sha256:
                wrong = "its sha256 is not the manifest's"
            else:
                return
            os.truncate(part, 0)  # whole, but of another file: nothing to go on from
            raise OSError(wrong)

        def download(part: Path) -> None:
            self._attempt(name, partial(fetch, part), stop, lambda: part.stat().st_size)

        return self.cache.get(path, redact(self._locate(name)), sha256, size or 0, download, stop)

    def _fetch(self, file: Path, most: int, stop: Event, url: str, start: int = 0) -> None:
        """Download what follows the `start` bytes in `file`, `most` in all: do not trust Content-Length."""
        with (
            file.open("r+b" if start else "wb") as target,
            closing(self._read(url, start, self.timeout)) as pieces,
        ):
            for offset, piece in pieces:
                if stop.is_set():
                    raise DownloadStopped
                if offset + len(piece) > most:
                    target.truncate(0)
                    raise OSError(f"more than the {most:,} bytes that it may have")
                target.seek(offset)
                target.write(piece)
            target.truncate()

    def _locate(self, name: str) -> str:
        base, mark, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{name if self.is_s3 else quote(name)}{mark}{query}"

    def _attempt(
        self, name: str, action: Callable[[str], Result], stop: Event, progress: Callable[[], int] = lambda: 0
    ) -> Result:
        """What `action` makes of the file's URL, tried again after failures that may pass.

        Those after which `progress` is more than ever before do not add up: a link may be cut many times.
        """
        url, failures, most = self._locate(name), 0, 0
        while failures < self.attempts:
            _wait(self.pause * 2 ** (failures - 1) if failures else 0, stop)
            try:
                return action(url)
            except DownloadStopped:
                raise
            except Exception as error:  # of a client's own kinds
                reason, may_pass = self._describe(error)
            if not may_pass:
                raise DataError(f"{redact(url)}: {reason}")
            failures = 1 if progress() > most else failures + 1
            most = max(most, progress())
        raise DataError(f"{redact(url)}: {reason}; tried {self.attempts} times")

    def _describe(self, error: Exception) -> tuple[str, bool]:
        """What happened, without secrets, and whether it may pass."""
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # of botocore
            status = response["ResponseMetadata"].get("HTTPStatusCode")
        else:
            status = getattr(response, "status_code", None)
        if status == 404:
            return "not found", False
        if is_refusal(error) or status in (401, 403):
            return f"no access; {AWS_CREDENTIALS if self.is_s3 else 'credentials come from ~/.netrc'}", False
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{self.cache.folder}: cannot be written: {explain_os_error(error)}", False
        if "timed out" in str(error) or "Read timeout" in str(error):
            return f"no byte for {self.timeout:g} seconds", True
        text = f"HTTP status {status}" if status else redact(str(error))
        return text, not isinstance(error, ValueError)  # of a URL that is none


def _read_http(url: str, start: int, timeout: float) -> Generator[tuple[int, bytes]]:
    """The pieces of a file and their offsets, from byte `start` on; from 0 if the server gives no parts.

    Nothing if the file ends before `start`.
    """
    import requests

    # As it is: expanding what a server compressed would let a few bytes fill the disk.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if start and response.status_code == 416:  # Range Not Satisfiable
            return
        response.raise_for_status()
        offset = start if response.status_code == 206 else 0
        for piece in response.iter_content(PIECE):
            yield offset, piece
            offset += len(piece)


def _read_s3(url: str, start: int, timeout: float) -> Generator[tuple[int, bytes]]:
    """As `_read_http`."""
    from botocore.exceptions import ClientError

    bucket, _, key = url.removeprefix("s3://").partition("/")
    part = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = _open_s3(os.getpid(), timeout).get_object(Bucket=bucket, Key=key, **part)
    except ClientError as error:
        if start and error.response["ResponseMetadata"]["HTTPStatusCode"] == 416:
            return
        raise
    offset = start if "ContentRange" in response else 0
    with closing(response["Body"]) as body:
        while piece := body.read(PIECE):
            yield offset, piece
            offset += len(piece)


@lru_cache
def _open_s3(process: int, timeout: float) -> Any:
    """A client that all threads of a process share; a forked one, which may not use it, makes its own."""
    from botocore.config import Config
    from botocore.session import Session

    config = Config(
        connect_timeout=timeout,
        read_timeout=timeout,
        retries={"total_max_attempts": 1},
        response_checksum_validation="when_required",  # others than AWS have none; the manifest has
    )
    return Session().create_client("s3", config=config)


def _wait(seconds: float, stop: Event) -> None:
    """Sleep so long. Raises DownloadStopped once `stop` is set."""
    if stop.wait(seconds):
        raise DownloadStopped


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one of its name; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def _name_holder(part: Path) -> str:
    """The process that is downloading into that file, if the system lists locks, as Linux does."""
    with suppress(OSError):
        inode = f":{part.stat().st_ino}"
        for fields in map(str.split, Path("/proc/locks").read_text().splitlines()):
            if fields[1] == "FLOCK" and fields[5].endswith(inode):
                return f"process {fields[4]}"
    return "another process"


def _is_held(part: Path) -> bool:
    """Whether somebody is downloading into that file."""
    try:
        with part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _digest(path: Path) -> str:
    """sha256 of a file; empty where it was evicted meanwhile."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""

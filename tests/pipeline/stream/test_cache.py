import errno
import fcntl
import hashlib
import os
import pickle
import random
import re
import resource
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from torch.utils.data import DataLoader

from pipeline import BatchDataset, DataError, open_shards
from pipeline.manifest import Shard, read_manifest
from pipeline.stream import cache as remote
from pipeline.stream.cache import PIECE, Remote, find_shards, redact
from tests.conftest import Shards, refused, run_pipeline
from tests.conftest import flip as flip_bit
from tests.test_disk import lose_power

GB = 10**9
FORK = get_context("fork")
Patch = pytest.MonkeyPatch
Fault = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Serves the files of a folder by the last part of their path, or does what the next fault does."""

    server: "Server"

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).rpartition("/")[2]
        self.server.requests[name] += 1
        self.server.seen = (self.path, self.headers.get("Authorization"))
        data = (self.server.folder / name).read_bytes()
        asked = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.server.starts.append(asked)
        self.first, self.size = asked if self.server.gives_parts else 0, len(data)
        next(self.server.faults, serve)(self, data[self.first :])

    def start(self, length: int, status: int = 200) -> None:
        self.send_response(206 if self.first and status == 200 else status)
        if self.first:
            self.send_header("Content-Range", f"bytes {self.first}-{self.size - 1}/{self.size}")
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A web server on loopback. `faults` is what happens to the next requests; then all are served."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}/shards"
        self.requests: Counter[str] = Counter()
        self.starts: list[int] = []  # the first byte that each request asks for
        self.gives_parts = True
        self.seen: tuple[str, str | None] = ("", None)
        self.faults: Iterator[Fault] = iter(())
        self.stopped = threading.Event()

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up


def serve(handler: Handler, data: bytes) -> None:
    handler.start(len(data))
    handler.wfile.write(data)


def status(number: int) -> Fault:
    return lambda handler, data: handler.start(0, number)


def truncate(handler: Handler, data: bytes, end: int = -100) -> None:
    handler.start(len(data))
    handler.wfile.write(data[:end])


def flip(handler: Handler, data: bytes) -> None:
    serve(handler, data[:-1] + bytes([data[-1] ^ 1]))


def promise_more(handler: Handler, data: bytes) -> None:
    handler.start(len(data) + 1)
    handler.wfile.write(data)


def stall(handler: Handler, data: bytes) -> None:
    handler.start(len(data))
    handler.wfile.write(data[: len(data) // 2])
    handler.server.stopped.wait()


def drip(handler: Handler, data: bytes, seconds: float = 0.5) -> None:
    """Serve in ten pieces, one after the other."""
    handler.start(len(data))
    size = -(-len(data) // 10)
    for place in range(0, len(data), size):
        handler.wfile.write(data[place : place + size])
        time.sleep(seconds / 10)


def use_store(patch: Patch, endpoint: str, key: str, secret: str) -> None:
    """An object store, and none of this machine's proxies, profiles and passwords."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        patch.delenv(name)
    for name in ("NETRC", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        patch.setenv(name, "/dev/null")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": key, "SECRET_ACCESS_KEY": secret}.items():
        patch.setenv(f"AWS_{name}", value)


@pytest.fixture(autouse=True)
def limits(monkeypatch: Patch) -> None:
    use_store(monkeypatch, "", "", "")
    for name, value in {"ATTEMPTS": 3, "PAUSE": 0.01, "PATIENCE": 10.0}.items():
        monkeypatch.setattr(remote, name, value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serves `tmp_path/shards`."""
    (tmp_path / "shards").mkdir(exist_ok=True)
    with Server(tmp_path / "shards") as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()


@pytest.fixture(params=["http", "s3"])
def url(request: pytest.FixtureRequest, server: Server, monkeypatch: Patch) -> str:
    """The server's address; for s3 it stands in for a store."""
    if request.param == "http":
        return server.url
    use_store(monkeypatch, server.url.removesuffix("/shards"), "an-id", "a-secret")
    return "s3://bucket/shards"


def make_files(folder: Path, number: int, size: int = 1000) -> list[Shard]:
    """Files of noise that stand in for shards."""
    contents = {f"{seed}.tar": random.Random(seed).randbytes(size) for seed in range(number)}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [Shard(name, 1, size, hashlib.sha256(data).hexdigest()) for name, data in contents.items()]


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"sets"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def far(server: Server, cache: Path) -> Remote:
    """The server's files, by HTTP."""
    return Remote(server.url, cache, GB)


@pytest.fixture
def shard(server: Server) -> Shard:
    return make_files(server.folder, 1)[0]


def shard_names(*shards: Shard) -> set[str]:
    return {shard.sha256 for shard in shards}


def fetch(url: str, cache: Path, *shards: Shard) -> list[float]:
    """The peak memory after each download, in MB: to be called in a process of its own."""
    far, peaks = Remote(url, cache, GB), []
    for shard in shards:
        far.path(shard)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks


def test_mirror_and_shards_are_the_originals(shards: Shards, server: Server, url: str, cache: Path) -> None:
    """Also if they are damaged in the cache."""
    folder, manifest = shards
    for _ in range(2):
        remote = Remote(f"{url}/", cache, GB)
        mirror = remote.mirror()
        assert read_manifest(mirror) == manifest
        for split in manifest.splits.values():
            assert (mirror / split.table).read_bytes() == (folder / split.table).read_bytes()
            for shard in split.shards:
                path = remote.path(shard)
                assert path.read_bytes() == (folder / shard.file).read_bytes()
        flip_bit(path, -1)
        flip_bit(mirror / split.table, -1)
    files = [path.name for path in (*folder.glob("*.arrow"), *folder.glob("*.tar"))]
    damaged = dict.fromkeys(("manifest.json", split.table, shard.file), 2)
    assert server.requests == dict.fromkeys(files, 1) | damaged


def test_the_workers_of_a_loader_download_what_is_not_there(shards: Shards, url: str, cache: Path) -> None:
    """Each with a client of its own, though the process that they are forked from has one."""
    far, near = (open_shards(place, cache)["train"].batches(4, 32, epoch=0) for place in (url, shards[0]))
    far = pickle.loads(pickle.dumps(far))  # noqa: S301 - as for workers that are not forked
    loader: DataLoader[Any] = DataLoader(BatchDataset(far), batch_size=None, num_workers=2)
    for batch, other in zip(loader, near, strict=True):
        np.testing.assert_array_equal(batch.images, other.images)


SOURCES = {"http": "~/.netrc", "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"}
CUT = {
    "http": "('Connection broken: IncompleteRead(900 bytes read, 100 more expected)', IncompleteRead(900 bytes read, "
    "100 more expected))",
    "s3": "900 read, but total bytes expected is 1000.",
}


@pytest.mark.parametrize(
    ("fault", "requests", "message"),
    [
        (status(404), 1, "not found: check the name"),
        (status(403), 1, "no access; credentials come from {source}"),
        (status(503), 3, "HTTP status 503; tried 3 times"),
        (stall, 3, "no byte for 0.3 seconds; tried 3 times"),
        (truncate, 3, "{cut}; tried 3 times"),
        (lambda handler, data: serve(handler, data[:-100]), 3, "its sha256 is not the manifest's; tried 3 times"),
        (flip, 3, "its sha256 is not the manifest's; tried 3 times"),
    ],
)
def test_failures_are_named(
    shard: Shard, server: Server, url: str, cache: Path, monkeypatch: Patch, fault: Fault, requests: int, message: str
) -> None:
    server.gives_parts, server.faults = False, repeat(fault)
    if fault is stall:
        monkeypatch.setattr(remote, "PATIENCE", 0.3)
    scheme = url.partition(":")[0]
    with refused(f"{url}/0.tar: {message.format(source=SOURCES[scheme], cut=CUT[scheme])}"):
        Remote(url, cache, GB).path(shard)
    assert server.requests["0.tar"] == requests
    assert cached(cache) <= {f"{shard.sha256}.1000.part"}


@pytest.mark.parametrize(
    ("faults", "gives_parts", "starts"),
    [
        ([truncate], True, [0, 10 * PIECE - 100]),
        ([truncate], False, [0, 10 * PIECE - 100]),
        ([truncate, flip], True, [0, 10 * PIECE - 100, 0]),  # damaged bytes are not continued
        ([truncate, status(416)], True, [0, 10 * PIECE - 100, 0]),  # the server has fewer bytes than that
        ([promise_more, status(416)], True, [0, 10 * PIECE]),  # cut when all had arrived
        # Cut eight times, where three attempts without a byte more would be the last.
        ([partial(truncate, end=PIECE)] * 8, True, [PIECE * number for number in range(9)]),
    ],
)
def test_an_interrupted_download_is_continued(
    server: Server, url: str, cache: Path, faults: list[Fault], gives_parts: bool, starts: list[int]
) -> None:
    [shard] = make_files(server.folder, 1, size=10 * PIECE)
    server.gives_parts, server.faults = gives_parts, iter(faults)
    far = Remote(url, cache, GB)
    (cache / f"{shard.sha256}.{shard.bytes}.part").write_bytes(b"left by a process that was killed")
    assert far.path(shard).read_bytes() == (server.folder / "0.tar").read_bytes()
    assert server.starts == starts
    assert cached(cache) == shard_names(shard)


def test_a_process_that_stands_still_is_not_waited_for(
    shard: Shard, server: Server, url: str, cache: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a suspended one does, which keeps the lock of its download."""
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    far = Remote(url, cache, GB)
    part = cache / f"{shard.sha256}.{shard.bytes}.part"
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert far.path(shard).read_bytes() == (server.folder / "0.tar").read_bytes()
        assert cached(cache) == {*shard_names(shard), part.name}
    assert caplog.messages == [f"{url}/0.tar: another process adds nothing to {part}: downloading it as well"]


def test_a_download_that_begins_when_another_ends_is_left_alone(
    shard: Shard, far: Remote, cache: Path, monkeypatch: Patch
) -> None:
    finish = Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, path: (finish(part, path), part.touch()))
    far.path(shard)
    assert cached(cache) == {*shard_names(shard), f"{shard.sha256}.{shard.bytes}.part"}


def test_refused_connections_are_named(shard: Shard, server: Server, url: str, cache: Path) -> None:
    server.server_close()
    reasons = {"http": r"HTTPConnectionPool\(.*Connection refused.*", "s3": "Could not connect to the endpoint URL: .*"}
    message = f"^{re.escape(url)}/0.tar: {reasons[url.partition(':')[0]]}; tried 3 times$"
    with pytest.raises(DataError, match=message):
        Remote(url, cache, GB).path(shard)


def test_urls_that_cannot_be_read_are_refused() -> None:
    for url in "https:// https://?token=s3cret s3:// s3:/path s3:///path s3://bucket//path file:///data".split():
        with refused(f"{url.partition('?')[0]}: not like https://host/path or s3://bucket/path"):
            find_shards(url)
    with refused("s3://bucket/path: not like https://host/path or s3://bucket/path"):
        find_shards("s3://me:s3cret@bucket/path")
    for url in ("gs://bucket/path", "pipe:curl https://host", "simplecache::https://host"):
        with refused(f"shards cannot be read from {url.partition(':')[0]}: give a folder, https:// or s3://"):
            find_shards(url)
    assert find_shards("/data/a:b") == (Path("/data/a:b"), None)


def test_secrets_reach_the_server_and_no_message(
    shard: Shard, server: Server, far: Remote, cache: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    text = "Cannot reach 'https://me:p@ss@host/a@b.tar?sig=s3cret&x=1' or http://host/b?token=x\nnow"
    assert redact(text) == "Cannot reach 'https://host/a@b.tar' or http://host/b\nnow"
    url = server.url.replace("127", "me:s3cret@127") + "?token=s3cret"
    server.faults = iter([serve, status(403)])
    (server.folder / "manifest.json").write_text("<html>")
    damaged = "damaged: not JSON: Expecting value: line 1 column 1 (char 0)"
    for reason in (damaged, f"no access; credentials come from {SOURCES['http']}"):
        with refused(f"{server.url}/manifest.json: {reason}"):
            Remote(url, cache, GB).mirror()
        assert not list((cache / "sets").iterdir())
    credentials = f"Basic {b64encode(b'me:s3cret').decode()}"
    assert server.seen == ("/shards/manifest.json?token=s3cret", credentials)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    far.path(shard)
    assert server.seen == ("/shards/0.tar", credentials)


def test_what_cannot_be_used_is_named(shard: Shard, far: Remote, tmp_path: Path, monkeypatch: Patch) -> None:
    with refused(f"{far.url}/0.tar: '../../0.tar' in its manifest is not a sha256"):
        far.path(replace(shard, sha256="../../0.tar"))
    (tmp_path / "file").touch()
    with refused(f"{tmp_path / 'file'}: cannot be used as a cache: Not a directory"):
        find_shards("http://host", tmp_path / "file")
    with refused(f"s3://bucket/path/manifest.json: no access; credentials come from {SOURCES['s3']}"):
        find_shards("s3://bucket/path", tmp_path)
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with refused("s3://bucket/path: botocore is missing: pip install 'chexpert-pipeline[remote]'"):
        find_shards("s3://bucket/path", tmp_path)


def test_any_file_name_is_found(shard: Shard, server: Server, url: str, cache: Path) -> None:
    """Those of other people's tars."""
    name = "a b+c%20#1?.tar"
    (server.folder / "0.tar").rename(server.folder / name)
    assert Remote(url, cache, GB).path(replace(shard, file=name)).stat().st_size == 1000


@pytest.mark.parametrize("executor", [partial(ThreadPoolExecutor, 12), partial(ProcessPoolExecutor, 4, FORK)])
def test_several_share_a_download(server: Server, cache: Path, executor: Callable[[], Executor]) -> None:
    shards = make_files(server.folder, 3)
    server.faults = repeat(drip)
    with executor() as pool:
        assert len(list(pool.map(partial(fetch, server.url, cache), shards * 4))) == 12
    assert server.requests == {"0.tar": 1, "1.tar": 1, "2.tar": 1}


def test_a_killed_download_leaves_nothing_that_looks_finished(server: Server, far: Remote, cache: Path) -> None:
    first, second, third = make_files(server.folder, 3, size=1_000_000)
    server.faults = iter([stall])
    part = cache / f"{first.sha256}.1000000.part"
    process = FORK.Process(target=fetch, args=(server.url, cache, first))
    process.start()
    while not part.exists() or not part.stat().st_size:
        time.sleep(0.01)
    far.path(second)
    assert cached(cache) == {part.name} | shard_names(second), "nobody deletes what is being downloaded"
    process.kill()
    process.join()
    assert cached(cache) == {part.name} | shard_names(second)
    age(cache, second)
    os.utime(part, (0, 0))
    Remote(server.url, cache, 2_000_000).path(third)
    assert cached(cache) == shard_names(second, third), "and it goes like any other file that is not in use"


def age(cache: Path, *shards: Shard, ago: float = 3600.0) -> None:
    """Make it long ago that they were used, the first the longest."""
    for number, shard in enumerate(reversed(shards), start=1):
        moment = time.time() - ago * number
        os.utime(cache / shard.sha256, (moment, moment))


def test_the_least_recently_used_go(server: Server, cache: Path) -> None:
    first, second, third, fourth, fifth = make_files(server.folder, 5)
    remote = Remote(server.url, cache, 3000)
    others = {"thesis.pdf.part", "x" * 64, f"{'0' * 64}.part"}  # files of others, which stay
    for name in others:
        (cache / name).write_bytes(bytes(5000))
        os.utime(cache / name, (0, 0))
    for shard in (first, second, third):
        remote.path(shard)
    age(cache, first, second, third)
    remote.path(first)
    remote.path(fourth)
    assert cached(cache) == others | shard_names(first, third, fourth)
    remote.path(fifth)
    assert cached(cache) == others | shard_names(first, fourth, fifth)
    age(cache, fourth, first, fifth, ago=-3600.0)  # a clock that went back: nothing was handed out in the future
    assert remote.path(second).read_bytes() == (server.folder / "1.tar").read_bytes()
    assert cached(cache) == others | shard_names(fourth, first, second)
    assert server.requests == {"0.tar": 1, "1.tar": 2, "2.tar": 1, "3.tar": 1, "4.tar": 1}


def test_what_was_just_handed_out_stays(server: Server, cache: Path, monkeypatch: Patch) -> None:
    first, second = make_files(server.folder, 2)
    monkeypatch.setattr(remote, "GRACE", 0.3)
    far = Remote(server.url, cache, 1999)
    begin = time.monotonic()
    path = far.path(first)
    far.path(second)
    assert time.monotonic() - begin > 0.3
    assert not path.exists()


def test_the_limit_holds_all_the_time(server: Server, cache: Path, monkeypatch: Patch) -> None:
    """Finished files, downloads under way, and tables."""
    shards = make_files(server.folder, 12)
    monkeypatch.setattr(remote, "GRACE", 0.05)
    taken = []

    def list_sizes() -> list[int]:
        return [path.stat().st_size for path in cache.iterdir() if path.name != "sets" and path.exists()]

    def measure(handler: Handler, data: bytes) -> None:
        while (sizes := list_sizes()) != list_sizes():
            pass  # one was removed and another grew while they were listed
        taken.append(sum(sizes))
        drip(handler, data, 0.05)

    server.faults = repeat(measure)
    (cache / "sets" / "other").mkdir(parents=True)
    (cache / "sets" / "other" / "train.arrow").write_bytes(bytes(400))
    remotes = [Remote(server.url, cache, 4500) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: remotes[number % 2].path(shards[number % 12]), range(36)))
    assert max(taken) <= 4000
    assert len(cached(cache)) <= 4


def endless(handler: Handler, data: bytes) -> None:
    """As much as is taken, whatever length was announced."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.stopped.is_set():
        handler.wfile.write(bytes(2**16))


def test_a_server_that_never_ends_fills_neither_disk_nor_memory(
    shards: Shards, server: Server, cache: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(remote, "TABLE_BYTES", 10**6)
    near = Remote(server.url, cache, 10**7)
    shard = shards[1].split("train").shards[0]
    for faults, use, name, most in (
        (repeat(endless), near.mirror, "manifest.json", 10**6),
        (repeat(endless), lambda: near.path(shard), shard.file, shard.bytes),
        (iter([serve, endless, endless, endless]), near.mirror, "train.arrow", 10**6),
    ):
        server.faults = faults
        with refused(f"{server.url}/{name}: more than the {most:,} bytes that it may have; tried 3 times"):
            use()
    assert cached(cache) == set()


@pytest.mark.parametrize("fault", [status(503), partial(drip, seconds=20)])
def test_a_download_that_is_wanted_no_more_ends(
    server: Server, far: Remote, cache: Path, monkeypatch: Patch, fault: Fault
) -> None:
    """A trainer that was told to stop has to save before it is killed."""
    (shard,) = make_files(server.folder, 1, size=10**6)
    monkeypatch.setattr(remote, "PAUSE", 60)
    server.faults = repeat(fault)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(far.path, shard, stop)
        time.sleep(0.5)
        stop.set()
        with pytest.raises(CancelledError):
            download.result(timeout=3)
    with (cache / f"{shard.sha256}.1000000.part").open("ab") as other:  # of another process
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CancelledError):
            far.path(shard, stop)
    assert cached(cache) <= {f"{shard.sha256}.1000000.part"}


def test_the_limit_counts_tables_and_may_be_lowered(shards: Shards, server: Server, far: Remote, cache: Path) -> None:
    first, second, third = shards[1].split("train").shards[:3]
    tables = sum(path.stat().st_size for path in far.mirror().iterdir())
    for shard in (first, second, third):
        far.path(shard)
    age(cache, first, second, third)
    Remote(server.url, cache, tables + second.bytes + third.bytes).mirror()
    assert cached(cache) == shard_names(second, third)
    limit = tables + first.bytes - 1
    fault = f"do not fit into a cache of {limit:,}, of which tables take {tables:,}; raise `cache_size`"
    with refused(f"{server.url}/{first.file}: {first.bytes:,} bytes {fault}"):
        Remote(server.url, cache, limit).path(first)
    assert Remote(server.url, cache, limit + 1).path(first).stat().st_size == first.bytes


def test_a_full_disk_is_named(shard: Shard, server: Server, far: Remote, cache: Path) -> None:
    """A limit on file sizes stands in for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with refused(f"{server.url}/0.tar: {cache}: cannot be written: {os.strerror(errno.EFBIG)}"):
            far.path(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert server.requests["0.tar"] == 1


@pytest.mark.soak
def test_the_cache_survives_a_loss_of_power(server: Server, cache: Path, record_property: Callable[..., None]) -> None:
    shards = make_files(server.folder, 2)
    cache.mkdir()

    def download() -> list[bytes]:
        return [Remote(server.url, cache, GB).path(shard).read_bytes() for shard in shards]

    for _ in lose_power(cache, download):
        assert download() == [(server.folder / shard.file).read_bytes() for shard in shards]
        record_property("survived", "loss of power in the cache")


def test_downloads_are_not_held_in_memory(server: Server, url: str, cache: Path) -> None:
    shards = []
    for size in (1_000, 60_000_000):
        (server.folder / f"{size}.tar").touch()
        os.truncate(server.folder / f"{size}.tar", size)
        shards.append(Shard(f"{size}.tar", 1, size, hashlib.sha256(bytes(size)).hexdigest()))
    with ProcessPoolExecutor(1, FORK) as pool:
        small, large = pool.submit(fetch, url, cache, *shards).result()
    assert large - small < 20


def test_the_commands_read_a_url_as_they_read_the_folder(shards: Shards, url: str, cache: Path) -> None:
    outputs = []
    for place in (url, shards[0]):
        for command, *options in (("verify", "--deep", "--workers", 2), ("stats", "--format", "json", "--by", "sex")):
            done = run_pipeline(command, place, "--cache", cache, *options)
            outputs.append(done.stdout.replace(str(place), "SHARDS").split(" MB in ")[0])
    assert outputs[:2] == outputs[2:]
    assert outputs[0].startswith("SHARDS: OK: ")


def test_verify_names_what_a_server_gives_wrongly(
    shards: Shards, server: Server, cache: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    shard = shards[1].splits["valid"].shards[0].file
    flip_bit(shards[0] / shard, 600)
    done = run_pipeline("verify", server.url, "--cache", cache, code=1)
    assert done.stdout == f"{server.url}/{shard}: its sha256 is not the manifest's; tried 1 times\n"
    assert done.stderr.splitlines()[-1] == f"Error: {server.url}: 1 problem in 1 file"

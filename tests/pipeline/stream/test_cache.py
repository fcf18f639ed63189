import errno
import fcntl
import hashlib
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from torch.utils.data import DataLoader

from pipeline import BatchDataset, DataError, open_shards
from pipeline.manifest import Shard, read_manifest, read_table, write_manifest
from pipeline.stream import cache as remote
from pipeline.stream.cache import PIECE, Remote, find_shards, redact
from tests.conftest import Shards, refused, run_pipeline, start
from tests.conftest import flip as flip_bit
from tests.test_disk import lose_power

GB = 10**9
Fault = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Serves the files of a folder by the last part of their path, or does what the next fault does."""

    server: "Server"

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).rpartition("/")[2]
        self.server.requests[name] += 1
        self.server.times.append(time.monotonic())
        self.server.seen = (self.path, self.headers.get("Authorization"))
        data = (self.server.folder / name).read_bytes()
        asked = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.server.starts.append(asked)
        self.first = asked if self.server.gives_parts else 0
        self.whole = len(data)
        if self.first and self.first >= len(data):
            self.start(0, 416)
            return
        next(self.server.faults, serve)(self, data[self.first :])

    def start(self, length: int, status: int = 200) -> None:
        self.send_response(206 if self.first and status == 200 else status)
        if self.first:
            self.send_header("Content-Range", f"bytes {self.first}-{self.whole - 1}/{self.whole}")
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A web server on loopback. `faults` is what happens to the next requests; then all are served."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.times: list[float] = []
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


def truncate(handler: Handler, data: bytes) -> None:
    handler.start(len(data))
    handler.wfile.write(data[:-100])


def shorten(handler: Handler, data: bytes) -> None:
    serve(handler, data[:-100])


def flip(handler: Handler, data: bytes) -> None:
    serve(handler, data[:-1] + bytes([data[-1] ^ 1]))


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


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of this machine's proxies, profiles and passwords."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("NETRC", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
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
def url(request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address; for s3 it stands in for a store."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    if request.param == "http":
        return f"{endpoint}/shards"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    return "s3://bucket/shards"


def web(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/shards"


def open_remote(url: str, folder: Path, limit: int = GB) -> Remote:
    return Remote(url, folder, limit)


def make_files(folder: Path, number: int, size: int = 1000) -> list[Shard]:
    """Files of noise that stand in for shards."""
    shards = []
    for seed in range(number):
        data = random.Random(seed).randbytes(size)
        (folder / f"{seed}.tar").write_bytes(data)
        shards.append(Shard(f"{seed}.tar", 1, size, hashlib.sha256(data).hexdigest()))
    return shards


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"sets"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def far(server: Server, cache: Path) -> Remote:
    """The server's files, by HTTP."""
    return open_remote(web(server), cache)


def shard_names(*shards: Shard) -> set[str]:
    return {shard.sha256 for shard in shards}


def test_secrets_are_left_out() -> None:
    text = "Cannot reach 'https://me:p@ss@host/a@b.tar?sig=s3cret&x=1' or http://host/b?token=x\nnow"
    assert redact(text) == "Cannot reach 'https://host/a@b.tar' or http://host/b\nnow"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with refused("s3://bucket/path: botocore is missing: pip install 'chexpert-pipeline[remote]'"):
        Remote("s3://bucket/path", tmp_path, GB)


def test_mirror_and_shards_are_the_originals(shards: Shards, server: Server, url: str, cache: Path) -> None:
    folder, manifest = shards
    for _ in range(2):
        remote = open_remote(f"{url}/", cache)
        mirror = remote.mirror()
        assert read_manifest(mirror) == manifest
        for split in manifest.splits.values():
            assert read_table(mirror, split).equals(read_table(folder, split))
            for shard in split.shards:
                assert remote.path(shard).read_bytes() == (folder / shard.file).read_bytes()
    files = [path.name for path in (*folder.glob("*.arrow"), *folder.glob("*.tar"))]
    assert server.requests == {"manifest.json": 2} | dict.fromkeys(files, 1)


def test_the_workers_of_a_loader_download_what_is_not_there(shards: Shards, url: str, cache: Path) -> None:
    """Each with a client of its own, though the process that they are forked from has one."""
    far, near = (open_shards(place, cache)["train"].batches(4, 32, epoch=0) for place in (url, shards[0]))
    far = pickle.loads(pickle.dumps(far))  # noqa: S301 - as for workers that are not forked
    loader: DataLoader[Any] = DataLoader(BatchDataset(far), batch_size=None, num_workers=2)
    for batch, other in zip(loader, near, strict=True):
        np.testing.assert_array_equal(batch.images, other.images)


def test_a_changed_manifest_is_seen(shards: Shards, far: Remote) -> None:
    folder, manifest = shards
    first = far.mirror()
    write_manifest(folder, replace(manifest, policies={"uncertain": "ones", "blank": "ignore"}))
    assert [read_manifest(mirror).policies["uncertain"] for mirror in (first, far.mirror())] == ["best", "ones"]


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
        (shorten, 3, "its sha256 is not the manifest's; tried 3 times"),
        (flip, 3, "its sha256 is not the manifest's; tried 3 times"),
    ],
)
def test_failures_are_named(
    server: Server, url: str, cache: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, requests: int, message: str
) -> None:
    [shard] = make_files(server.folder, 1)
    server.gives_parts, server.faults = False, repeat(fault)
    if fault is stall:
        monkeypatch.setattr(remote, "PATIENCE", 0.3)
    scheme = url.partition(":")[0]
    with refused(f"{url}/0.tar: {message.format(source=SOURCES[scheme], cut=CUT[scheme])}"):
        open_remote(url, cache).path(shard)
    assert server.requests["0.tar"] == requests
    assert server.times[-1] - server.times[0] < 10
    assert cached(cache) <= {f"{shard.sha256}.1000.part"}


def cut(handler: Handler, data: bytes) -> None:
    handler.start(len(data))
    handler.wfile.write(data[:PIECE])


@pytest.mark.parametrize(
    ("faults", "gives_parts", "starts"),
    [
        ([truncate], True, [0, 10 * PIECE - 100]),
        ([truncate], False, [0, 10 * PIECE - 100]),
        ([truncate, flip], True, [0, 10 * PIECE - 100, 0]),  # what is damaged is not continued
        # Cut eight times, where three attempts without a byte more would be the last.
        ([cut] * 8, True, [PIECE * number for number in range(9)]),
    ],
)
def test_an_interrupted_download_is_continued(
    server: Server, url: str, cache: Path, faults: list[Fault], gives_parts: bool, starts: list[int]
) -> None:
    [shard] = make_files(server.folder, 1, size=10 * PIECE)
    server.gives_parts, server.faults = gives_parts, iter(faults)
    assert open_remote(url, cache).path(shard).read_bytes() == (server.folder / "0.tar").read_bytes()
    assert server.starts == starts
    assert cached(cache) == shard_names(shard)


def test_a_process_that_stands_still_is_not_waited_for(
    server: Server, url: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a suspended one does, which keeps the lock of its download."""
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    [shard] = make_files(server.folder, 1)
    far = open_remote(url, cache)
    part = cache / f"{shard.sha256}.{shard.bytes}.part"
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert far.path(shard).read_bytes() == (server.folder / "0.tar").read_bytes()
        assert cached(cache) == {*shard_names(shard), part.name}
    assert caplog.messages == [f"{url}/0.tar: another process adds nothing to {part}: downloading it as well"]


def test_what_another_file_left_is_given_up(server: Server, far: Remote, cache: Path) -> None:
    """Longer than what is there now: the server has no byte that follows it."""
    [shard] = make_files(server.folder, 1)
    good = (server.folder / "0.tar").read_bytes()
    (server.folder / "0.tar").write_bytes(good[:500])
    part = cache / f"{shard.sha256}.1000.part"
    part.write_bytes(bytes(600))
    with refused(f"{web(server)}/0.tar: its sha256 is not the manifest's; tried 3 times"):
        far.path(shard)
    assert server.starts == [600, 0, 0]
    assert not part.exists()
    (server.folder / "0.tar").write_bytes(good)
    assert far.path(shard).read_bytes() == good


def test_refused_connections_are_named(server: Server, url: str, cache: Path) -> None:
    [shard] = make_files(server.folder, 1)
    server.server_close()
    reasons = {"http": r"HTTPConnectionPool\(.*Connection refused.*", "s3": "Could not connect to the endpoint URL: .*"}
    message = f"^{re.escape(url)}/0.tar: {reasons[url.partition(':')[0]]}; tried 3 times$"
    with pytest.raises(DataError, match=message):
        open_remote(url, cache).path(shard)


NOT_A_URL = "not like https://host/path or s3://bucket/path"
UNREADABLE = dict.fromkeys(("https://", "https://?token=s3cret", "s3://", "s3:/path", "s3:///path"), NOT_A_URL)
UNREADABLE |= dict.fromkeys(("s3://bucket//path", "s3://me:s3cret@bucket/path", "file:///data"), NOT_A_URL)
UNREADABLE |= {
    url: f"shards cannot be read from {url.partition(':')[0]}: give a folder, https:// or s3://"
    for url in ("gs://bucket/path", "pipe:curl https://host", "simplecache::https://host")
}


@pytest.mark.parametrize("url", UNREADABLE)
def test_urls_that_cannot_be_read_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match=f"{UNREADABLE[url]}$") as caught:
        Remote(url, tmp_path, GB)
    assert "s3cret" not in str(caught.value)
    assert find_shards("/data/a:b") == (Path("/data/a:b"), None)


def test_secrets_reach_the_server_and_no_message(server: Server, cache: Path) -> None:
    url = web(server).replace("127", "me:s3cret@127") + "?token=s3cret"
    server.faults = iter([serve, status(403)])
    (server.folder / "manifest.json").write_text("<html>")
    for reason in (
        "damaged: not JSON: Expecting value: line 1 column 1 (char 0)",
        f"no access; credentials come from {SOURCES['http']}",
    ):
        with refused(f"{web(server)}/manifest.json: {reason}"):
            open_remote(url, cache).mirror()
        assert not list((cache / "sets").iterdir())
    credentials = b64encode(b"me:s3cret").decode()
    assert server.seen == ("/shards/manifest.json?token=s3cret", f"Basic {credentials}")


def test_passwords_come_from_netrc(
    server: Server, far: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [shard] = make_files(server.folder, 1)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    open_remote(web(server), tmp_path / "cache").path(shard)
    assert server.seen[1] == f"Basic {b64encode(b'me:s3cret').decode()}"


def test_missing_credentials_are_named(tmp_path: Path) -> None:
    with refused(f"s3://bucket/path/manifest.json: no access; credentials come from {SOURCES['s3']}"):
        open_remote("s3://bucket/path", tmp_path).mirror()


def test_a_hash_cannot_lead_out_of_the_cache(server: Server, far: Remote) -> None:
    [shard] = make_files(server.folder, 1)
    with refused(f"{web(server)}/0.tar: '../../0.tar' in its manifest is not a sha256"):
        far.path(replace(shard, sha256="../../0.tar"))


def test_any_file_name_is_found(server: Server, url: str, cache: Path) -> None:
    """Those of other people's tars."""
    [shard] = make_files(server.folder, 1)
    name = "a b+c%20#1?.tar"
    (server.folder / "0.tar").rename(server.folder / name)
    assert open_remote(url, cache).path(replace(shard, file=name)).stat().st_size == 1000


def test_threads_share_a_download(server: Server, cache: Path) -> None:
    shards = make_files(server.folder, 3)
    server.faults = repeat(drip)
    remotes = [open_remote(web(server), cache) for _ in range(2)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda number: remotes[number % 2].path(shards[number % 3]), range(12)))
    assert server.requests == {"0.tar": 1, "1.tar": 1, "2.tar": 1}


ASK = """
import sys
from pathlib import Path
from pipeline.manifest import Shard
from pipeline.stream.cache import Remote
url, folder, name, size, sha256 = sys.argv[1:]
remote = Remote(url, Path(folder), 10**9)
print("ready", flush=True)
sys.stdin.readline()
print(remote.path(Shard(name, 1, int(size), sha256)))
"""


class Asker:
    """A process that is ready to ask for a shard."""

    def __init__(self, server: Server, cache: Path, shard: Shard) -> None:
        arguments = [web(server), cache, shard.file, shard.bytes, shard.sha256]
        command = [sys.executable, "-c", ASK, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


def test_processes_share_a_download(server: Server, cache: Path) -> None:
    [shard] = make_files(server.folder, 1)
    server.faults = repeat(drip)
    askers = [Asker(server, cache, shard) for _ in range(2)]
    for asker in askers:
        asker.ask()
    assert [asker.process.communicate()[0] for asker in askers] == [f"{cache / shard.sha256}\n"] * 2
    assert server.requests == {"0.tar": 1}


def test_a_killed_download_leaves_nothing_that_looks_finished(server: Server, cache: Path) -> None:
    first, second, third = make_files(server.folder, 3, size=1_000_000)
    server.faults = iter([stall])
    asker = Asker(server, cache, first)
    part = cache / f"{first.sha256}.1000000.part"
    with asker.process as process:
        asker.ask()
        while not part.exists() or not part.stat().st_size:
            time.sleep(0.01)
        open_remote(web(server), cache).path(second)
        assert cached(cache) == {part.name} | shard_names(second), "nobody deletes what is being downloaded"
        process.kill()
    assert cached(cache) == {part.name} | shard_names(second)
    age(cache, second)
    os.utime(part, (0, 0))
    open_remote(web(server), cache, limit=2_000_000).path(third)
    assert cached(cache) == shard_names(second, third), "and it goes like any other file that is not in use"
    assert open_remote(web(server), cache).path(first).stat().st_size == 1_000_000


def age(cache: Path, *shards: Shard, ago: float = 3600.0) -> None:
    """Make it long ago that they were used, the first the longest."""
    for number, shard in enumerate(reversed(shards), start=1):
        moment = time.time() - ago * number
        os.utime(cache / shard.sha256, (moment, moment))


def test_the_least_recently_used_go(server: Server, cache: Path) -> None:
    first, second, third, fourth, fifth = make_files(server.folder, 5)
    remote = open_remote(web(server), cache, limit=3000)
    for shard in (first, second, third):
        remote.path(shard)
    age(cache, first, second, third)
    remote.path(first)
    remote.path(fourth)
    assert cached(cache) == shard_names(first, third, fourth)
    remote.path(fifth)
    assert cached(cache) == shard_names(first, fourth, fifth)
    age(cache, fourth, first, fifth, ago=-3600.0)  # a clock that went back: nothing was handed out in the future
    assert remote.path(second).read_bytes() == (server.folder / "1.tar").read_bytes()
    assert cached(cache) == shard_names(fourth, first, second)
    assert server.requests == {"0.tar": 1, "1.tar": 2, "2.tar": 1, "3.tar": 1, "4.tar": 1}


def test_what_was_just_handed_out_stays(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_files(server.folder, 2)
    monkeypatch.setattr(remote, "GRACE", 0.3)
    far = open_remote(web(server), cache, limit=1999)
    begin = time.monotonic()
    path = far.path(first)
    far.path(second)
    assert time.monotonic() - begin > 0.3
    assert not path.exists()


def test_the_limit_holds_all_the_time(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished files, downloads under way, and tables."""
    shards = make_files(server.folder, 12)
    monkeypatch.setattr(remote, "GRACE", 0.05)
    taken = []

    def list_sizes() -> dict[Path, int]:
        files = [path for path in cache.iterdir() if path.name != "sets"]
        return {path: path.stat().st_size for path in files if path.exists()}

    def measure(handler: Handler, data: bytes) -> None:
        while (sizes := list_sizes()) != list_sizes():
            pass  # one was removed and another grew while they were listed
        taken.append(sum(sizes.values()))
        drip(handler, data, 0.05)

    server.faults = repeat(measure)
    (cache / "sets" / "other").mkdir(parents=True)
    (cache / "sets" / "other" / "train.arrow").write_bytes(bytes(400))
    remotes = [open_remote(web(server), cache, 4500) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: remotes[number % 2].path(shards[number % 12]), range(36)))
    assert max(taken) <= 4000
    assert len(cached(cache)) <= 4


def test_a_limit_too_small_is_named(shards: Shards, server: Server, cache: Path) -> None:
    folder, manifest = shards
    shard = manifest.split("train").shards[0]
    tables = sum(path.stat().st_size for path in (folder / "manifest.json", *folder.glob("*.arrow")))
    limit = tables + shard.bytes - 1
    remote = open_remote(web(server), cache, limit)
    remote.mirror()
    with refused(
        f"{web(server)}/{shard.file}: {shard.bytes:,} bytes do not fit into a cache of {limit:,}, "
        f"of which tables take {tables:,}; raise `cache_size`"
    ):
        remote.path(shard)
    assert open_remote(web(server), cache, limit + 1).path(shard).stat().st_size == shard.bytes


def test_files_of_others_in_the_cache_stay(shards: Shards, server: Server, cache: Path) -> None:
    cache.mkdir()
    others = {"thesis.pdf.part", "x" * 64, f"{'0' * 64}.part"}
    for name in others:
        (cache / name).write_bytes(bytes(5000))
        os.utime(cache / name, (0, 0))
    remote = open_remote(web(server), cache, limit=60_000)
    remote.mirror()
    for shard in shards[1].split("train").shards:
        remote.path(shard)
    assert others < cached(cache)


def endless(handler: Handler, data: bytes) -> None:
    """As much as is taken, whatever length was announced."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.stopped.is_set():
        handler.wfile.write(bytes(2**16))


def test_a_server_that_never_ends_fills_neither_disk_nor_memory(
    shards: Shards, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TABLE_BYTES", 10**6)
    near = open_remote(web(server), cache, limit=10**7)
    shard = shards[1].split("train").shards[0]
    for faults, use, name, most in (
        (repeat(endless), near.mirror, "manifest.json", 10**6),
        (repeat(endless), lambda: near.path(shard), shard.file, shard.bytes),
        (iter([serve, endless, endless, endless]), near.mirror, "train.arrow", 10**6),
    ):
        server.faults = faults
        with refused(f"{web(server)}/{name}: more than the {most:,} bytes that it may have; tried 3 times"):
            use()
    assert cached(cache) == set()


@pytest.mark.parametrize("fault", [status(503), partial(drip, seconds=20)])
def test_a_download_that_is_wanted_no_more_ends(
    server: Server, far: Remote, cache: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
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
        with pytest.raises(remote.DownloadStopped):
            download.result(timeout=3)
    with (cache / f"{shard.sha256}.1000000.part").open("ab") as other:  # of another process
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(remote.DownloadStopped):
            far.path(shard, stop)
    assert cached(cache) <= {f"{shard.sha256}.1000000.part"}


def test_a_lower_limit_holds_from_the_start(shards: Shards, server: Server, far: Remote, cache: Path) -> None:
    first, second, third = shards[1].split("train").shards[:3]
    tables = sum(path.stat().st_size for path in far.mirror().iterdir())
    for shard in (first, second, third):
        far.path(shard)
    age(cache, first, second, third)
    open_remote(web(server), cache, tables + second.bytes + third.bytes).mirror()
    assert cached(cache) == shard_names(second, third)


@pytest.mark.parametrize("name", ["train-000000.tar", "train.arrow"])
def test_damaged_files_in_the_cache_are_replaced(shards: Shards, server: Server, cache: Path, name: str) -> None:
    folder, manifest = shards
    split = manifest.split("train")
    for damaged in (True, False):
        remote = open_remote(web(server), cache)
        files = {split.table: remote.mirror() / split.table, split.shards[0].file: remote.path(split.shards[0])}
        assert files[name].read_bytes() == (folder / name).read_bytes()
        if damaged:
            files[name].write_bytes(files[name].read_bytes()[:-1] + b"x")
    assert server.requests[name] == 2


def test_a_full_disk_is_named(server: Server, far: Remote, cache: Path) -> None:
    """A limit on file sizes stands in for it."""
    [shard] = make_files(server.folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with refused(f"{web(server)}/0.tar: {cache}: cannot be written: {os.strerror(errno.EFBIG)}"):
            far.path(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert server.requests["0.tar"] == 1


@pytest.mark.soak
def test_the_cache_survives_a_loss_of_power(server: Server, cache: Path, record_property: Callable[..., None]) -> None:
    shards = make_files(server.folder, 2)
    cache.mkdir()

    def download() -> list[bytes]:
        return [open_remote(web(server), cache).path(shard).read_bytes() for shard in shards]

    for _ in lose_power(cache, download):
        assert download() == [(server.folder / shard.file).read_bytes() for shard in shards]
        record_property("survived", "loss of power in the cache")


def test_a_cache_that_is_a_file_is_named(cache: Path) -> None:
    cache.touch()
    with refused(f"{cache}: cannot be used as a cache: Not a directory"):
        Remote("http://host", cache, GB)


MEASURE = """
import resource, sys
from pathlib import Path
from pipeline.manifest import Shard
from pipeline.stream.cache import Remote
remote = Remote(sys.argv[1], Path(sys.argv[2]), 10**9)
for name, size, sha256 in zip(*[iter(sys.argv[3:])] * 3):
    remote.path(Shard(name, 1, int(size), sha256))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_downloads_are_not_held_in_memory(server: Server, url: str, cache: Path) -> None:
    arguments = []
    for size in (1_000, 60_000_000):
        (server.folder / f"{size}.tar").touch()
        os.truncate(server.folder / f"{size}.tar", size)
        arguments += [f"{size}.tar", size, hashlib.sha256(bytes(size)).hexdigest()]
    small, large = start(sys.executable, "-c", MEASURE, url, cache, *arguments).stdout.split()
    assert float(large) - float(small) < 20


def test_the_commands_read_a_url_as_they_read_the_folder(shards: Shards, url: str, cache: Path) -> None:
    outputs = []
    for place in (url, shards[0]):
        for command, *options in (("verify", "--deep", "--workers", 2), ("stats", "--format", "json", "--by", "sex")):
            done = run_pipeline(command, place, "--cache", cache, *options)
            outputs.append(done.stdout.replace(str(place), "SHARDS").split(" MB in ")[0])
    assert outputs[:2] == outputs[2:]
    assert outputs[0].startswith("SHARDS: OK: ")


def test_verify_names_what_a_server_gives_wrongly(
    shards: Shards, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    shard = shards[1].splits["valid"].shards[0].file
    flip_bit(shards[0] / shard, 600)
    done = run_pipeline("verify", web(server), "--cache", cache, code=1)
    assert done.stdout == f"{web(server)}/{shard}: its sha256 is not the manifest's; tried 1 times\n"
    assert done.stderr.splitlines()[-1] == f"Error: {web(server)}: 1 problem in 1 file"

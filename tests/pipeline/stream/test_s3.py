"""Shards in a real object store: OpenStack Swift with its S3 API.

make test-s3    # installs Swift into .venv-s3, whose bin folder is SWIFT_BIN
"""

import gzip
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline import DataError
from pipeline.base.files import atomic_file
from pipeline.base.store import open_location, read_objects
from pipeline.manifest import read_manifest, read_table
from pipeline.stream import cache
from pipeline.stream.cache import Remote
from tests.conftest import PIPELINE, Shards, refused, start, write_chexpert
from tests.pipeline.stream.test_cache import use_store
from tests.swift import KEY, SECRET, run_swift

GB = 10**9
URL = "s3://chest/films/shards"
NO_ACCESS = "no access; credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"

pytestmark = pytest.mark.skipif("SWIFT_BIN" not in os.environ, reason="needs Swift: make test-s3")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_swift(Path(os.environ["SWIFT_BIN"]).absolute(), tmp_path_factory.mktemp("swift")) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(monkeypatch, endpoint, KEY, SECRET)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # for writing
    monkeypatch.setattr(cache, "ATTEMPTS", 2)


def open_store(**options: Any) -> Any:
    """The store, without what another test's credentials may have left."""
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True, **options)


@pytest.fixture
def stored(shards: Shards) -> Shards:
    """Shards in a folder, and the same in the store."""
    folder, manifest = shards
    store = open_store()
    store.makedirs("chest", exist_ok=True)
    store.put(f"{folder}/", URL, recursive=True)
    return folder, manifest


# In a process of its own: s3fs keeps connections, and the credentials they were made with.
run_pipeline = partial(start, PIPELINE)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_come_back_as_they_went(stored: Shards, tmp_path: Path) -> None:
    folder, manifest = stored
    remote = Remote(URL, tmp_path / "cache", GB)
    mirror = remote.mirror()
    assert read_manifest(mirror) == manifest
    for split in manifest.splits.values():
        assert read_table(mirror, split).equals(read_table(folder, split))
        for shard in split.shards:
            assert remote.path(shard).read_bytes() == (folder / shard.file).read_bytes()


@pytest.mark.parametrize(
    ("secret", "url", "reason"),
    [
        ("wr0ng-s3cret", URL, NO_ACCESS),
        (SECRET, "s3://no-such-bucket/shards", "not found: check the name"),
        (SECRET, "s3://chest/no-such-path", "not found: check the name"),
    ],
)
def test_shards_that_cannot_be_read_are_named_without_credentials(
    stored: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str, url: str, reason: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(DataError) as caught:
        Remote(url, tmp_path / "cache", GB).mirror()
    assert str(caught.value) == f"{url}/manifest.json: {reason}"
    assert caught.value.__cause__ is None


def objects_of(prefix: str) -> dict[str, bytes]:
    store = open_store()
    paths = store.find(prefix, withdirs=False) if store.exists(prefix) else []
    return {path.removeprefix(f"{prefix}/"): store.cat_file(path) for path in paths}


def test_the_etl_writes_to_the_store_what_it_writes_to_a_folder(stored: object, tmp_path: Path) -> None:
    """Killed in the middle and started again, with more than one worker."""
    source = tmp_path / "CheXpert-v1.0-small"
    write_chexpert(source, "train", range(1, 61))
    options = ["--size", "48", "--dev", "0.3", "--samples-per-shard", "20"]
    assert run_pipeline("shards", source, tmp_path / "local", *options).returncode == 0
    command = [str(PIPELINE), "shards", str(source), "s3://chest/written/small", *options, "--workers"]
    run = subprocess.Popen([*command, "1"], stderr=subprocess.DEVNULL)
    store = open_store(use_listings_cache=False)
    while len(store.glob("chest/written/small/*.tar")) < 2:
        assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert "manifest.json" not in objects_of("chest/written/small")
    expected = files_of(tmp_path / "local")
    assert not any(SECRET.encode() in content or KEY.encode() in content for content in expected.values())

    def write(*options: object) -> str:
        ran = start(*command, *options)
        assert objects_of("chest/written/small") == expected
        return ran.stdout + ran.stderr

    assert "images were there already" in write(2)
    assert "s3://chest/written/small: complete already, nothing to do" in write(1)
    store.pipe_file("chest/written/small/train-000001.tar", b"damaged")
    store.rm("chest/written/small/dev.arrow")
    assert "s3://chest/written/small: restored: dev.arrow, train-000001.tar" in write(1)
    assert write(1, "--seed", 1) == (
        "Error: s3://chest/written/small holds other shards: seed is 0, not 1; remove it, or name another folder\n"
    )


def test_what_a_store_changes_is_noticed(stored: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = open_location("s3://chest/changed/file")
    with atomic_file(path) as file:
        file.write(b"a" * 1000)
    assert path.read_bytes() == b"a" * 1000
    put = path.fs.put_file  # type: ignore[attr-defined]

    def change(local: str, remote: str) -> None:
        put(local, remote)
        path.write_bytes(b"b")

    monkeypatch.setattr(path.fs, "put_file", change)  # type: ignore[attr-defined]
    message = "s3://chest/changed/file: what the store gives back is not what was put; start the command again"
    with refused(message), atomic_file(path) as file:
        file.write(b"c" * 1000)


def test_the_etl_reads_from_the_store_what_it_reads_from_a_folder(stored: object, tmp_path: Path) -> None:
    """With gzipped CSVs and one image missing, which is no failure of the store."""
    source = tmp_path / "CheXpert-v1.0-small"
    write_chexpert(source, "train", range(1, 31))
    write_chexpert(source, "valid", range(31, 36))
    (source / "valid.csv.gz").write_bytes(gzip.compress((source / "valid.csv").read_bytes()))
    (source / "valid.csv").unlink()
    missing = "train/patient00003/study1/view1_frontal.jpg"
    (source / missing).unlink()
    url = "s3://chest/sources/CheXpert-v1.0-small"
    open_store().put(f"{source}/", url, recursive=True)

    options = ["--size", "48", "--dev", "0.3", "--samples-per-shard", "20", "--max-bad", "0.1"]
    assert run_pipeline("shards", source, tmp_path / "local", *options).returncode == 0
    expected = files_of(tmp_path / "local")
    ran = run_pipeline("shards", "s3://chest/sources", tmp_path / "remote", *options, "--strict")
    assert ran.returncode == 3, ran.stderr
    written = files_of(tmp_path / "remote")
    assert written.pop("rejects.csv") == expected.pop("rejects.csv").replace(str(source).encode(), url.encode())
    assert written == expected

    preview = run_pipeline("shards", url, tmp_path / "none", *options, "--dry-run")
    assert f"1 images are missing, for example {url}/{missing}\n" in preview.stdout
    mine = ["--split", f"train={source / 'train.csv'}", "--root", url]  # the CSV here, the images there
    (source / "train").rename(tmp_path / "elsewhere")
    assert run_pipeline("shards", tmp_path / "remote", tmp_path / "mine", *mine, *options).returncode == 0
    assert (tmp_path / "mine" / "train-000000.tar").read_bytes() == expected["train-000000.tar"]


def test_a_cluster_needs_no_shared_folder_with_both_in_the_store(
    stored: object, chexpert: Path, tmp_path: Path
) -> None:
    from distributed import LocalCluster

    open_store().put(f"{chexpert}/", "s3://chest/both/films", recursive=True)
    options = ["--size", "48", "--dev", "0.3", "--samples-per-shard", "7", "--views", "all"]
    make_cluster: Any = LocalCluster  # which has no types
    with make_cluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        words = ("s3://chest/both", "s3://chest/both-shards", "--scheduler", cluster.scheduler_address)
        run = run_pipeline("shards", *words, *options)
    assert run.returncode == 0, run.stderr
    assert "studies: 20 with 1 frontal, 20 with 1 frontal and 1 lateral" in run.stdout
    assert run_pipeline("shards", chexpert, tmp_path / "local", *options).returncode == 0
    expected = files_of(tmp_path / "local")
    assert objects_of("chest/both-shards") == expected


@pytest.mark.parametrize(
    ("secret", "source", "out", "reason"),
    [
        ("wr0ng-s3cret", "", "s3://chest/refused", f"s3://chest/refused: cannot be used: {NO_ACCESS}\n"),
        (SECRET, "s3://chest/no-such-path", "", "s3://chest/no-such-path: no such folder"),
        (SECRET, "s3://no-such-bucket/films", "", "s3://no-such-bucket/films: no such folder"),
        (SECRET, "s3://chest/films", "", "s3://chest/films: no dataset with a df_chexpert_plus_240401.csv (CheXpert "),
    ],
)
def test_places_that_cannot_be_used_are_named(
    stored: object, chexpert: Path, tmp_path: Path, monkeypatch: Any, secret: str, source: str, out: str, reason: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    failed = run_pipeline("shards", source or chexpert, out or tmp_path / "out", "--size", 48)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"Error: {reason}")


def test_a_store_that_fails_while_it_is_read_ends_the_run(stored: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of the images, so that none of them is rejected."""
    present = open_location(f"{URL}/manifest.json")
    absent = open_location(f"{URL}/nothing")
    assert list(read_objects([str(absent), str(present)])) == [None, present.read_bytes()]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-s3cret")
    type(present.fs).clear_instance_cache()  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=rf"^{URL}/manifest.json: cannot be read: no access; credentials"):
        list(read_objects([str(present)]))

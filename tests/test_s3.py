"""Shards in a real object store: OpenStack Swift with its S3 API.

make test-s3    # installs Swift into .venv-s3, whose bin folder is SWIFT_BIN
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import DataError
from pipeline.manifest import Manifest, read_manifest, read_table
from pipeline.remote import Cache, Remote
from tests.swift import KEY, SECRET, run_swift

GB = 10**9
URL = "s3://chest/films/shards"
TRAIN = ["--arch", "rescnn", "--epochs", "1", "--batch-size", "4", "--image-size", "32", "--workers", "1"]

pytestmark = pytest.mark.skipif("SWIFT_BIN" not in os.environ, reason="needs Swift: make test-s3")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_swift(Path(os.environ["SWIFT_BIN"]).absolute(), tmp_path_factory.mktemp("swift")) as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's address and credentials, and none of this machine's."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # for writing


@pytest.fixture
def stored(shards: tuple[Path, Manifest]) -> tuple[Path, Manifest]:
    """Shards in a folder, and the same in the store."""
    import s3fs

    folder, manifest = shards
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.makedirs("chest", exist_ok=True)
    store.put(f"{folder}/", URL, recursive=True)
    return folder, manifest


def quick(url: str, folder: Path) -> Remote:
    return Remote(url, Cache(folder, GB), attempts=2, pause=0.01)


def test_shards_come_back_as_they_went(stored: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = stored
    remote = quick(URL, tmp_path / "cache")
    mirror = remote.mirror()
    assert read_manifest(mirror) == manifest
    for split in manifest.splits.values():
        assert read_table(mirror, split).equals(read_table(folder, split))
        for shard in split.shards:
            assert remote.path(shard).read_bytes() == (folder / shard.file).read_bytes()


def test_training_from_the_store_is_training_from_the_folder(
    stored: tuple[Path, Manifest], tmp_path: Path
) -> None:
    folder, _ = stored
    for shards, run in ((URL, "there"), (folder, "here")):
        command = ["train.py", "--shards", shards, "--run", tmp_path / run, "--cache", tmp_path / "cache"]
        subprocess.run([sys.executable, *map(str, command), *TRAIN], check=True, capture_output=True)
    there, here = ((tmp_path / run / "metrics.jsonl").read_text() for run in ("there", "here"))
    assert there == here


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wr0ng-s3cret"), ("AWS_ACCESS_KEY_ID", "test:wr0ng")]
)
def test_wrong_credentials_are_named_without_them(
    stored: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(DataError) as caught:
        quick(URL, tmp_path / "cache").mirror()
    source = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    assert str(caught.value) == f"{URL}/manifest.json: no access; credentials come from {source}"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("url", ["s3://no-such-bucket/shards", "s3://chest/no-such-path"])
def test_what_is_not_there_is_named(stored: tuple[Path, Manifest], tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError) as caught:
        quick(url, tmp_path / "cache").mirror()
    assert str(caught.value) == f"{url}/manifest.json: not found"


def test_another_object_under_the_name_is_refused(stored: tuple[Path, Manifest], tmp_path: Path) -> None:
    import s3fs

    first, second = stored[1].split("train").shards[:2]
    s3fs.S3FileSystem(skip_instance_cache=True).copy(f"{URL}/{second.file}", f"{URL}/{first.file}")
    with pytest.raises(DataError) as caught:
        quick(URL, tmp_path / "cache").path(first)
    reason = f"{second.bytes:,} bytes, not {first.bytes:,} as in the manifest; tried 2 times"
    if first.bytes == second.bytes:
        reason = "its sha256 is not the manifest's; tried 2 times"
    assert str(caught.value) == f"{URL}/{first.file}: {reason}"

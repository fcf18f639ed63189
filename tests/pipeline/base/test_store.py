"""Addresses of object stores, and what is removed by them."""

import errno
import os
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest

from pipeline import DataError
from pipeline.base.errors import MachineError
from pipeline.base.store import object_to_put, open_location, read_objects, remove_folder


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3:/x", "s3://bucket//dd", "s3://bucket/a//b"])
def test_an_address_without_its_bucket_or_with_an_empty_part_is_refused(url: str) -> None:
    """As s3://$BUCKET/shards is, where BUCKET is empty: it is no folder of this machine either."""
    with pytest.raises(DataError, match=f"^{url}: not like https://host/path or s3://bucket/path$"):
        open_location(url)


@pytest.mark.parametrize("name", ["a*", "a[bc]", "a"])
def test_only_the_keys_below_a_prefix_are_removed_and_read(name: str) -> None:
    kept = [f"memory://{name}-store/{other}/file" for other in ("ab", "ac", "a-", "aa")]
    mine = [f"memory://{name}-store/{name}/{file}" for file in ("1", "deep/2", "3*")]
    for url in (*kept, *mine):
        path: Any = open_location(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(url.encode())
    assert list(read_objects([*mine, "memory://none/1"])) == [*(url.encode() for url in mine), None]
    remove_folder(open_location(f"memory://{name}-store/{name}"))
    assert list(read_objects([*kept, *mine])) == [*(url.encode() for url in kept), None, None, None]


def test_a_full_temporary_folder_is_named() -> None:
    """And not the store, which had no part in it."""
    reason = "cannot be written: No space left on device; make room, and run it again, or set TMPDIR to another folder"
    with pytest.raises(MachineError, match=f"^{gettempdir()}/\\w+: {reason}$"), object_to_put(Path("x")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

"""Two hosts and an object store, by network namespaces: what a cut link does to training (make test-cluster).

This namespace is the first host, with the store; needs root, for the second one and the link between them.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from pipeline.manifest import Manifest
from tests.swift import KEY, SECRET, free_ports, run_swift
from tests.training import assert_same_run

ADDRESSES = ("10.77.31.1", "10.77.31.2")
LINKS = ("chest0", "chest1")
CUT = 20  # seconds

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif("SWIFT_BIN" not in os.environ, reason="needs Swift: make test-cluster"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]


def ip(*arguments: str, on: tuple[str, ...] = ()) -> None:
    subprocess.run([*on, "ip", *arguments], check=True)


@pytest.fixture
def second_host() -> Iterator[tuple[str, ...]]:
    """What runs a command on the second host."""
    with subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as sleeper:
        try:
            time.sleep(0.5)
            there = ("nsenter", "--target", str(sleeper.pid), "--net")
            ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1], "netns", str(sleeper.pid))
            for address, link, on in zip(ADDRESSES, LINKS, ((), there), strict=True):
                ip("address", "add", f"{address}/24", "dev", link, on=on)
                ip("link", "set", link, "up", on=on)
            ip("link", "set", "lo", "up", on=there)
            yield there
        finally:
            sleeper.kill()  # the link goes with its end


def test_a_cut_link_changes_nothing(
    second_host: tuple[str, ...], sample_shards: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_swift(Path(os.environ["SWIFT_BIN"]).absolute(), tmp_path / "swift", ADDRESSES[0]) as endpoint:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        import s3fs

        store = s3fs.S3FileSystem(skip_instance_cache=True)
        store.makedirs("chest")
        store.put(f"{sample_shards[0]}/", "s3://chest/shards", recursive=True)

        def begin(run: str) -> list["subprocess.Popen[bytes]"]:
            (port,) = free_ports(1)
            started = []
            for host, on in enumerate(((), second_host)):
                command = [*on, sys.executable, "-m", "torch.distributed.run", "--nnodes", 2]
                command += ["--nproc-per-node", 1, "--rdzv-backend", "c10d", "--local-addr", ADDRESSES[host]]
                # Neither address is what the machine's name resolves to, by which torchrun would know.
                command += ["--rdzv-conf", f"is_host={1 - host}"]
                command += ["--rdzv-endpoint", f"{ADDRESSES[0]}:{port}", "--", train.__file__]
                command += ["--shards", "s3://chest/shards", "--cache", tmp_path / f"cache-{run}-{host}"]
                command += ["--run", tmp_path / f"host{host}" / run, "--arch", "rescnn", "--image-size", 64]
                command += ["--batch-size", 8, "--epochs", 8, "--workers", 1]
                environment = os.environ | {"GLOO_SOCKET_IFNAME": LINKS[host]}
                started.append(subprocess.Popen(list(map(str, command)), env=environment))
            return started

        assert [process.wait(timeout=300) for process in begin("whole")] == [0, 0]
        whole, cut = tmp_path / "host0" / "whole", tmp_path / "host0" / "cut"

        processes = begin("cut")
        while not (cut / "metrics.jsonl").exists():
            time.sleep(0.1)
        epochs = (cut / "metrics.jsonl").read_text().count("\n")
        ip("link", "set", LINKS[0], "down")
        time.sleep(CUT)
        assert (cut / "metrics.jsonl").read_text().count("\n") <= epochs + 1  # it had to wait
        ip("link", "set", LINKS[0], "up")
        codes = [process.wait(timeout=300) for process in processes]
        print(f"after the cut: {codes}")
        if codes != [0, 0]:
            assert [process.wait(timeout=300) for process in begin("cut")] == [0, 0]
        assert_same_run(cut, whole)
        assert not (tmp_path / "host1").exists()  # the second host writes nothing

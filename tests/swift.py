"""OpenStack Swift with its S3 API: four servers on loopback or another address, one replica of everything in a folder.

The folder's file system must keep extended attributes.
"""

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEY, SECRET = "test:tester", "a-secret-for-loopback"
SERVERS = ("object", "container", "account", "proxy")

COMMON = """
[DEFAULT]
bind_ip = {address}
bind_port = {port}
swift_dir = {folder}
devices = {folder}
user = {user}
workers = 0
mount_check = false
fallocate_reserve = 0
"""
STORAGE = """
[pipeline:main]
pipeline = {server}-server
[app:{server}-server]
use = egg:swift#{server}
"""
PROXY = """
[pipeline:main]
pipeline = catch_errors s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
[filter:slo]
use = egg:swift#slo
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
"""


@contextmanager
def run_swift(programs: Path, folder: Path, address: str = "127.0.0.1") -> Iterator[str]:
    """The endpoint of a store that runs as long as the context; `programs` is the bin folder of its venv."""
    ports = free_ports(len(SERVERS))
    (folder / "device").mkdir(parents=True)
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = loopback\n")
    for server, port in zip(SERVERS, ports, strict=True):
        text = COMMON.format(address=address, port=port, folder=folder, user=getpass.getuser())
        text += PROXY.format(secret=SECRET) if server == "proxy" else STORAGE.format(server=server)
        (folder / f"{server}.conf").write_text(text)
        if server != "proxy":
            ring = (programs / "swift-ring-builder", folder / f"{server}.builder")
            for step in ("create 4 1 0", f"add r1z1-{address}:{port}/device 1", "rebalance"):
                subprocess.run([*ring, *step.split()], check=True, capture_output=True)
    processes = [start(programs, folder, server) for server in SERVERS]
    try:
        for server, port, process in zip(SERVERS, ports, processes, strict=True):
            wait_for(server, folder / f"{server}.log", (address, port), process)
        yield f"http://{address}:{ports[-1]}"
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=20)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def start(programs: Path, folder: Path, server: str) -> subprocess.Popen[bytes]:
    command = [str(programs / f"swift-{server}-server"), str(folder / f"{server}.conf"), "-v"]
    environment = os.environ | {"SWIFT_DIR": str(folder)}
    with (folder / f"{server}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for(server: str, log: Path, address: tuple[str, int], process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(address) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the {server} server does not run: {log.read_text()}")

"""`make setup` from an index on loopback: by uv, by pip where uv fails, and with torch's CPU build."""

import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, start

pytestmark = pytest.mark.wheel

LOCK = "# made by make lock\nnvidia-cublas==13.0\ntorch==2.15.0\ntorchvision==0.29.2\nuv==0.13.9\n"
OWN = "ours-1.0-py3-none-any.whl"
BACKEND = f'import shutil\ndef build_editable(folder, *_):\n    return shutil.copy("own/{OWN}", folder) and "{OWN}"\n'
PROJECT = """[project]
name = "ours"
version = "1.0"
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel without a module; uv's has a program that fails."""
    info = f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        if name == "uv":
            wheel.writestr(f"{name}-{version}.data/scripts/uv", "#!/bin/sh\necho no index >&2; exit 2\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The Makefile, a small lock, and the packages of two indexes: of all, and of torch's CPU builds."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    shutil.copytree(REPOSITORY / ".ci", tmp_path / ".ci")
    (tmp_path / "requirements.lock").write_text(LOCK)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "backend.py").write_text(BACKEND)
    write_wheel(tmp_path / "own", "ours", "1.0")
    for line in LOCK.splitlines()[1:]:
        name, _, version = line.replace("-", "_").partition("==")
        write_wheel(tmp_path / "all" / name.replace("_", "-"), name, version)
        if name.startswith("torch"):
            write_wheel(tmp_path / "cpu" / name, name, f"{version}+cpu")
    return tmp_path


@pytest.fixture
def url(clone: Path) -> Iterator[str]:
    """Of a server of that folder, whose listings are what an index serves."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(clone))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("uv", [True, False])
@pytest.mark.parametrize("torch", ["", "cpu"])
def test_setup_installs_the_lock(clone: Path, url: str, uv: bool, torch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = clone / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(sys.executable)
    if uv:
        (programs / "uv").symlink_to(Path(sys.executable).with_name("uv"))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    index = {"PIP_INDEX_URL": f"{url}/all", "UV_DEFAULT_INDEX": f"{url}/all"}
    alone = {"PATH": f"{programs}:/usr/bin:/bin", "PIP_CONFIG_FILE": os.devnull, "UV_NO_CACHE": "1"}
    command = ("make", "setup", f"TORCH={torch}", f"TORCH_INDEX={url}/cpu")
    made = start(*command, cwd=clone, **index, **alone)
    assert made.returncode == 0, made.stdout + made.stderr
    assert ("uv failed: pip installs the same packages, which takes 3 to 15 minutes" in made.stderr) != uv
    (packages,) = (clone / ".venv").glob("lib/python*/site-packages")
    names = {path.name.removesuffix(".dist-info") for path in packages.glob("*.dist-info")}
    suffix, others = ("+cpu", set()) if torch else ("", {"nvidia_cublas-13.0"})
    expected = {f"torch-2.15.0{suffix}", f"torchvision-0.29.2{suffix}", "ours-1.0", "uv-0.13.9", *others}
    assert {name for name in names if not name.startswith(("pip-", "setuptools-"))} == expected
    other = start("make", "setup", f"TORCH={'' if torch else 'cpu'}", cwd=clone)
    assert ".venv holds the other build of torch: make clean first" in other.stderr

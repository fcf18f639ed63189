"""The wheel holds everything that runs, and `make setup` installs the lock.

`pipeline` works without any extra, train.py with that of training. `make setup` reads an index on loopback: by uv, by
pip where uv fails, and with torch's CPU build.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from model.export import Reading, Scorer, export_scorer
from model.networks import ResCNN
from tests.conftest import REPOSITORY, start
from tests.model.test_score import draw_kinds

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git knows: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    archive = subprocess.run(["git", "-C", REPOSITORY, "archive", "HEAD"], check=True, capture_output=True).stdout
    (folder / "source").mkdir()
    subprocess.run(["tar", "-x", "-C", folder / "source"], input=archive, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", folder, folder / "source"], check=True)
    (built,) = folder.glob("*.whl")
    return built


def install(wheel: Path, folder: Path, extra: str = "") -> Path:
    """A fresh virtual environment with the wheel, and links to the packages it needs with that extra, in this one."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    quietly = ["-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([folder / "bin" / "python", *quietly, wheel], check=True)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    link(folder, project["dependencies"] + (project["optional-dependencies"][extra] if extra else []))
    return folder


def link(environment: Path, wanted: list[str]) -> None:
    """Links in an environment to packages of this one, with all that they require."""
    (packages,) = environment.glob("lib/python*/site-packages")
    installed: set[str] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and requirement.name.lower() not in installed:
            installed.add(requirement.name.lower())
            package = distribution(requirement.name)
            wanted += package.requires or []
            for part in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
                if not (packages / part).exists():
                    (packages / part).symlink_to(str(package.locate_file(part)))


def run(environment: Path, folder: Path, *command: object, code: int = 0) -> str:
    """Its stdout, or its stderr where it fails as it should."""
    done = start(environment / "bin" / str(command[0]), *command[1:], cwd=folder, PYTHONPATH="")
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_the_wheel_holds_every_module_and_template_of_the_clone(wheel: Path) -> None:
    tracked = start("git", "ls-tree", "-r", "--name-only", "HEAD", "pipeline", "model", "train.py")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == set(tracked.stdout.split())


def test_pipeline_and_the_stream_work_without_any_extra(wheel: Path, tmp_path: Path) -> None:
    bare = install(wheel, tmp_path / "environment")
    run(bare, tmp_path, "pipeline", "sample", "sample", "--images", 60, "--workers", 1)
    run(bare, tmp_path, "pipeline", "shards", "sample", "shards", "--size", 64, "--dev", 0.3, "--workers", 1)
    run(bare, tmp_path, "pipeline", "stats", "shards", "--html", "labels.html")
    run(bare, tmp_path, "pipeline", "verify", "shards", "--deep", "--workers", 1)
    run(bare, tmp_path, "pipeline", "audit", "shards")
    batch = "next(iter(pipeline.open_shards('shards')['train'].batches(4, 32, epoch=0)))"
    read = f"import pipeline; print({batch}.images.shape)"
    assert run(bare, tmp_path, "python", "-c", read) == "(4, 1, 32, 32)\n"
    message = "Error: torch is missing: pip install 'chexpert-pipeline[train]'\n"
    assert run(bare, tmp_path, "python", "-m", "train", "--shards", "shards", "--run", "r", code=1) == message


def test_both_commands_work_outside_the_clone(wheel: Path, tmp_path: Path) -> None:
    environment = install(wheel, tmp_path / "environment", "train")
    modules = "import pipeline, model, train; print(pipeline.__file__, model.__file__, train.__file__)"
    paths = run(environment, tmp_path, "python", "-c", modules).split()
    assert all(str(environment) in path for path in paths)
    run(environment, tmp_path, "pipeline", "sample", "sample", "--images", 60, "--workers", 1)
    run(environment, tmp_path, "pipeline", "shards", "sample", "shards", "--size", 64, "--dev", 0.3)
    options = ("--arch", "rescnn", "--image-size", 32, "--batch-size", 8, "--epochs", 1, "--workers", 1)
    run(environment, tmp_path, "python", "-m", "train", "--shards", "shards", "--run", "run", *options)
    assert {"report.html", "model-card.md", "best.pt"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_an_exported_network_scores_with_three_packages(tmp_path: Path) -> None:
    environment, model = tmp_path / "environment", tmp_path / "model.onnx"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    link(environment, ["numpy", "pillow", "onnxruntime"])
    options = {"size": 64, "square": "no", "encoding": "jpeg", "quality": 95, "max_pixels": 10**7, "bits": None}
    texts = {"labels": ["Edema"], "image_size": [32, 32], "images": options, "thresholds": {}}
    facts = {name: json.dumps(value) for name, value in texts.items()} | {"threshold_rule": "none", "use": "research"}
    export_scorer(Scorer([Reading(ResCNN(14, widths=(16, 32)), [5], 120.0, 60.0)]), (32, 32), model, facts)
    names = [f"{place}.{kind.split()[0].lower()}" for place, (kind, _) in enumerate(draw_kinds(390, 320))]
    for name, (_, data) in zip(names, draw_kinds(390, 320), strict=True):
        (tmp_path / name).write_bytes(data)
    table = run(environment, tmp_path, "python", "score.py", "model.onnx", *names)
    local = start(sys.executable, "score.py", "model.onnx", *names, cwd=tmp_path)
    assert table == local.stdout
    assert [line.split(",")[0].strip('"') for line in table.splitlines()] == ["file", *names]


LOCK = "# made by make lock\nnvidia-cublas==13.0\ntorch==2.15.0\ntorchvision==0.29.2\nuv==0.13.9\n"
OWN = "ours-1.0-py3-none-any.whl"
BACKEND = f'import shutil\ndef build_editable(folder, *_):\n    return shutil.copy("own/{OWN}", folder) and "{OWN}"\n'
PROJECT = '[project]\nname = "ours"\nversion = "1.0"\n[build-system]\nrequires = []\n'
PROJECT += 'build-backend = "backend"\nbackend-path = ["."]\n'


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

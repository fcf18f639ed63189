"""The wheel holds everything that runs: both commands work outside the clone, from the wheel alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import train

REPOSITORY = Path(train.__file__).parent

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git knows: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    archive = subprocess.run(
        ["git", "-C", REPOSITORY, "archive", "HEAD"], check=True, capture_output=True
    ).stdout
    (folder / "source").mkdir()
    subprocess.run(["tar", "-x", "-C", folder / "source"], input=archive, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", folder, folder / "source"], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel, which borrows the packages it depends on from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = ["-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([folder / "bin" / "python", *install, wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path file does not follow those in the folder it names, so the clone's own editable install stays out.
    (packages / "borrowed.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages"))
    )
    return folder


def test_the_wheel_holds_every_module_and_template_of_the_clone(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "-C", REPOSITORY, "ls-tree", "-r", "--name-only", "HEAD", "pipeline", "model", "train.py"],
        check=True,
        capture_output=True,
        text=True,
    )
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == set(tracked.stdout.split())


def test_both_commands_work_outside_the_clone(environment: Path, tmp_path: Path) -> None:
    def run(*command: object) -> str:
        done = subprocess.run(
            [environment / "bin" / str(command[0]), *map(str, command[1:])],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import pipeline, model, train; print(pipeline.__file__, model.__file__, train.__file__)"
    assert all(str(environment) in path for path in run("python", "-c", where).split())
    run("pipeline", "sample", "sample", "--images", 60, "--workers", 1)
    run("pipeline", "shards", "sample", "shards", "--size", 64, "--dev", 0.3, "--workers", 1)
    run("pipeline", "stats", "shards", "--html", "labels.html")
    options = ("--arch", "rescnn", "--image-size", 32, "--batch-size", 8, "--epochs", 1, "--workers", 1)
    run("python", "-m", "train", "--shards", "shards", "--run", "run", *options)
    assert {"report.html", "model-card.md", "best.pt"} <= {path.name for path in (tmp_path / "run").iterdir()}

"""Real files for the tests: a small CheXpert folder of noise images, and shards made from it."""

import csv
import fcntl
import gc
import hashlib
import importlib.util
import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from pipeline import DataError
from pipeline.cli import main
from pipeline.etl.shards import Execution, RunSummary, write_shards
from pipeline.etl.writing import Options
from pipeline.labels import COLUMNS, LABELS
from pipeline.manifest import Manifest, read_manifest
from pipeline.sources.sets import find_source, read_any_table
from pipeline.synthetic.sample import write_sample

REPOSITORY = Path(__file__).parents[1]
PIPELINE = Path(sys.executable).with_name("pipeline")  # the console script of this environment
# OpenMP's barriers spin: on a busy machine two threads of a tiny network are a hundred times slower than one.
os.environ["OMP_NUM_THREADS"] = "1"
# What the imports allocate stays: the collector, which would look through it again and again, takes a third of them.
gc.disable()
# Commands that name the next one to type name it as in an activated environment.
os.environ["PATH"] = os.pathsep.join([str(PIPELINE.parent), os.environ["PATH"]])
# A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where tests that draw at random begin, and for how long they go on: make soak SEED=1 MINUTES=60.
SEED, MINUTES = (float(os.environ.get(name, "0")) for name in ("SOAK_SEED", "SOAK_MINUTES"))

PARTS = range(4 if MINUTES else 1)  # of each test with `rounds`, for as many processes to run
DRAWING = 4  # tests with `rounds`

POLICIES = {"uncertain": "best", "blank": "zeros"}
CELLS = ("1.0", "0.0", "-1.0", "")
VIEWS = ((1, "view1_frontal"), (1, "view2_lateral"), (2, "view1_frontal"))  # study and image of each patient

Shards = tuple[Path, Manifest]  # a folder, and its manifest
Capture = pytest.CaptureFixture[str]


def pytest_collection_finish() -> None:
    """Now that all is imported, collect garbage again, but not in what the imports left."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or triton's bindings count what is left as leaked, on the terminal


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the tests that passed have survived: kills, and failures of the disk."""
    reports = terminalreporter.stats.get("passed", [])
    faults = Counter(fault for report in reports for name, fault in report.user_properties if name == "survived")
    if faults:
        counts = ", ".join(f"{fault} × {count}" for fault, count in sorted(faults.items()))
        terminalreporter.write_line(f"survived: {counts}")


class Round(NamedTuple):
    """Dice, a folder for what is made, and how to report what was survived."""

    dice: random.Random
    folder: Path
    survived: Callable[[str], None]

    def draw(self, name: str, **folders: Path) -> list[str]:
        """Of each line of a text in tests/tables, the words of one of the parts between |."""
        lines = (REPOSITORY / f"tests/tables/drawn-{name}.txt").read_text().format(**folders).splitlines()
        return [word for line in lines for word in self.dice.choice(line.split("|")).split()]


@pytest.fixture(params=PARTS)
def rounds(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Callable[[str, object], None]
) -> Iterator[Round]:
    """Rounds, as long as the test's share of the time lasts. A failed test shows the seed that begins with its last."""

    def play() -> Iterator[Round]:
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        end = time.monotonic() + 60 * MINUTES * workers / (DRAWING * len(PARTS))
        for seed in itertools.count(int(SEED)):
            print(f"SOAK_SEED={seed} {request.node.nodeid}")
            (folder := tmp_path / str(seed)).mkdir()
            yield Round(random.Random(f"{seed} {request.node.name}"), folder, partial(record_property, "survived"))
            shutil.rmtree(folder)
            if time.monotonic() > end:
                return

    return play()


def call(command: Callable[[], object], *words: object) -> subprocess.CompletedProcess[str]:
    """A command line in this process: Python and Arrow take longer to start than most tests."""
    typed = [str(word) for word in words]
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", typed)
        patch.setattr(signal, "signal", lambda *_: None)  # the test's own stay
        with pytest.raises(SystemExit) as ended:
            command()
    output = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(typed, ended.value.code or 0, *output)  # type: ignore[arg-type]


def run_pipeline(*arguments: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """The `pipeline` command, which ends with this exit code; with any for None."""
    done = call(main, "pipeline", *arguments)
    assert code in (None, done.returncode), done.stderr
    return done


def refusal(*arguments: object) -> tuple[int, str]:
    """The exit code of a `pipeline` command that fails, and its last line."""
    failed = run_pipeline(*arguments, code=None)
    assert "Traceback" not in failed.stderr
    return failed.returncode, failed.stderr.splitlines()[-1]


@contextmanager
def refused(message: str, kind: type[Exception] = DataError) -> Iterator[None]:
    """What is in it fails with this message, to the letter."""
    with pytest.raises(kind) as caught:
        yield
    assert str(caught.value) == message


def start(*words: object, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with these variables beside this one's but make's; and what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env, command = kept | environment, [str(word) for word in words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Damage one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def default_options(**changes: object) -> Options:
    """Options fit for small images."""
    values: dict[str, object] = {"size": 48, "max_pixels": 1_000_000, "dev": 0.3, "samples_per_shard": 7}
    return Options(**(values | changes))  # type: ignore[arg-type]


def make_shards(folder: Path, out: Path, options: Options | None = None, **more: Any) -> RunSummary:
    """Shards of a CheXpert folder, by the library; `more` are policies, and what Execution and find_source take."""
    how, policies = Execution(more.pop("workers", 1), more.pop("max_bad", 0.0)), more.pop("policies", POLICIES)
    source = find_source(folder, {}, more.pop("roots", []), **more)
    return write_shards(source, out, options or default_options(), policies, how)


def write_chexpert(root: Path, split: str, patients: range, seed: int = 0) -> list[dict[str, str]]:
    """Append a split to `root`: two studies per patient, a frontal each and a lateral in the first."""
    random = np.random.default_rng([seed, patients.start])
    rows = []
    for patient, (study, view) in itertools.product(patients, VIEWS):
        path = root / split / f"patient{patient:05d}" / f"study{study}" / f"{view}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (8, 10), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 64), Image.Resampling.BICUBIC).save(path, quality=90)
        frontal = "frontal" in view
        row = {"Path": f"CheXpert-v1.0-small/{path.relative_to(root)}", "Sex": "Female" if patient % 2 else "Male"}
        row |= {"Age": str(20 + patient % 60), "Frontal/Lateral": "Frontal" if frontal else "Lateral"}
        row["AP/PA"] = "AP" if frontal else ""
        cells = random.choice(CELLS[:2] if split == "valid" else CELLS, len(LABELS))
        if frontal:  # the other images of a study have its labels
            labels = dict(zip(LABELS, map(str, cells), strict=True))
        rows.append(row | labels)
    write_rows(root / f"{split}.csv", rows)
    return rows


def write_rows(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> None:
    """Write rows as a CSV with the given columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CheXpert folder, shards of its frontal images and shards of all, made once; tests get copies."""
    folder = tmp_path_factory.mktemp("originals")
    write_chexpert(folder / "CheXpert-v1.0-small", "train", range(1, 17))
    write_chexpert(folder / "CheXpert-v1.0-small", "valid", range(17, 21))
    make_shards(folder / "CheXpert-v1.0-small", folder / "shards")
    make_shards(folder / "CheXpert-v1.0-small", folder / "studies", default_options(views="all"))
    return folder


@pytest.fixture
def chexpert(originals: Path, tmp_path: Path) -> Path:
    """A folder with train.csv (16 patients, 48 images) and valid.csv (4 patients, 12 images)."""
    return Path(shutil.copytree(originals / "CheXpert-v1.0-small", tmp_path / "CheXpert-v1.0-small"))


@pytest.fixture
def shards(originals: Path, tmp_path: Path) -> Shards:
    """Shards of the frontal images of that folder, several per split."""
    folder = Path(shutil.copytree(originals / "shards", tmp_path / "shards"))
    return folder, read_manifest(folder)


@pytest.fixture
def study_shards(originals: Path, tmp_path: Path) -> Shards:
    """Shards of all images of that folder, a study's together."""
    folder = Path(shutil.copytree(originals / "studies", tmp_path / "studies"))
    return folder, read_manifest(folder)


def shipped_table(name: str) -> Path:
    """A data set's real table, from the torchxrayvision wheel (found without importing it)."""
    spec = importlib.util.find_spec("torchxrayvision")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data" / name


@pytest.fixture(scope="session")
def real_csv() -> Path:
    """CheXpert's real train.csv with 223,414 rows."""
    return shipped_table("chexpert_train.csv.gz")


@pytest.fixture(scope="session")
def real_table(real_csv: Path) -> Any:
    return read_any_table(real_csv)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 160 synthetic images and their shards, which the processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "sample"
    with (base / "sample.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            write_sample(partial := base / "partial", images=160, seed=0, workers=2)
            for name, views in {"shards": "frontal", "studies": "all"}.items():
                options = default_options(size=64, samples_per_shard=40, views=views)
                make_shards(partial, partial / name, options, workers=2)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def sample_shards(sample: Path) -> Shards:
    """Shards of the sample's frontals, for those who learn from them; nobody changes them."""
    return sample / "shards", read_manifest(sample / "shards")


@pytest.fixture(scope="session")
def drawn_studies(sample: Path) -> Shards:
    """Shards of the sample's images of all views, whose studies have one or two; nobody changes them."""
    return sample / "studies", read_manifest(sample / "studies")

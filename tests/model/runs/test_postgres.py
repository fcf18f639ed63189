"""A sweep shared through a real PostgreSQL.

make test-postgres    # installs Debian's where there is none; POSTGRES_BIN is the folder of its programs
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.runs.sweep import list_trials, run_sweep
from pipeline import DataError
from tests.model.runs.test_sweep import make_sweep, never, start_worker, train_point
from tests.swift import free_ports

PASSWORD = "a-secret-for-loopback"  # noqa: S105

pytestmark = pytest.mark.skipif(
    "POSTGRES_BIN" not in os.environ, reason="needs PostgreSQL: make test-postgres"
)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of an empty database; its server lives as long as the tests."""
    programs = Path(os.environ["POSTGRES_BIN"])
    (port,) = free_ports(1)
    # The server refuses to run as root; Debian's package has a user for it.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    (folder / "password").write_text(PASSWORD)
    if as_user:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")

    def run(program: str, *arguments: object) -> None:
        command = [*as_user, programs / program, *arguments]
        subprocess.run(list(map(str, command)), check=True, cwd=folder, stdout=subprocess.DEVNULL)

    data = folder / "data"
    try:
        run(
            "initdb",
            "--pgdata",
            data,
            "--username",
            "me",
            "--auth",
            "scram-sha-256",
            "--pwfile",
            folder / "password",
        )
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder}"
        run("pg_ctl", "--pgdata", data, "--log", folder / "log", "--wait", "--options", options, "start")
        yield f"postgresql+psycopg://me:{PASSWORD}@127.0.0.1:{port}/postgres"
        run("pg_ctl", "--pgdata", data, "--mode", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def test_processes_with_folders_of_their_own_share_a_sweep(database: str, tmp_path: Path) -> None:
    """As two machines would: what they have in common is the database and the sweep's name."""
    folders = [tmp_path / machine / "sweep" for machine in ("one", "two")]
    workers = [start_worker(folder, database) for folder in folders]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    plain = make_sweep(tmp_path / "plain")
    run_sweep(plain, train_point, never)
    expected = [(trial.parameters, trial.dev, trial.history) for trial in list_trials(plain)]
    runs = [{path.name for path in (folder / "trials").iterdir() if path.is_dir()} for folder in folders]
    assert len(runs[0]) + len(runs[1]) == len(expected)  # no point twice
    assert all(runs)
    for folder in folders:
        trials = list_trials(make_sweep(folder, storage=database))
        found = sorted(trials, key=lambda trial: [*map(str, trial.parameters.values())])
        assert [(trial.parameters, trial.dev, trial.history) for trial in found] == sorted(
            expected, key=lambda trial: [*map(str, trial[0].values())]
        )
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files
        assert not any(PASSWORD.encode() in path.read_bytes() for path in files)


def test_a_database_that_refuses_is_an_error_without_its_password(database: str, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", storage=database.replace(PASSWORD, "another-secret"))
    with pytest.raises(DataError) as caught:
        run_sweep(sweep, train_point, never)
    assert str(caught.value) == f"{sweep.folder}: the database of `storage` cannot be used: OperationalError"

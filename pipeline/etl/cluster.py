"""Tasks → results on the workers of a Dask cluster: what `pipeline.base.workers` is on one machine.

Dask's scheduler reruns the tasks of a lost worker on another one. Tasks and results travel pickled among scheduler,
workers and this process, which must trust each other; paths in them must mean the same everywhere.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pipeline.base.errors import DataError, needs

Task = TypeVar("Task")
Result = TypeVar("Result")

CONNECT_SECONDS = 20.0
PACKAGES = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")  # they decide the bytes


def run_on_cluster(
    function: Callable[[Task], Result], tasks: Iterable[Task], scheduler: str, witness: Path
) -> Generator[Result, None, None]:
    """Results as they come, with a bounded number of tasks in flight.

    `witness` is a file that every worker must see. Raises DataError where the scheduler cannot be reached, workers
    are unfit, or a task's worker was lost again and again; and whatever a task raises.
    """
    with needs("dask", "`scheduler`"):
        from distributed import Client, KilledWorker
        from distributed.comm.core import CommClosedError
    try:
        connect: Any = Client  # which has no types
        client = connect(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DataError(f"`scheduler` {scheduler}: cannot be reached: {error}") from None
    with client:
        _check_workers(client, scheduler, witness)
        # Not pure: what a task writes may have been removed since a cluster did the same. No retries: an error that a
        # task raises, it raises again; the tasks of lost workers are done again in any case.
        executor = client.get_executor(pure=False, retries=0)
        waiting = iter(tasks)
        flight: set[Future[Result]] = set()
        try:
            while True:
                # Workers may join and leave: two tasks for each thread that there is now.
                room = max(1, 2 * sum(client.nthreads().values()) - len(flight))
                flight |= {executor.submit(function, task) for task in islice(waiting, room)}
                if not flight:
                    return
                done, flight = wait(flight, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except KilledWorker as error:
            raise DataError(
                f"a worker was lost each time it had this task: {error}; is there enough memory?"
            ) from None
        except (CancelledError, CommClosedError, TimeoutError):
            raise DataError(
                f"`scheduler` {scheduler}: the connection was lost; the same command continues"
            ) from None
        finally:
            executor.shutdown(wait=False)  # which cancels what waits


def _check_workers(client: Any, scheduler: str, witness: Path) -> None:
    """Raise DataError unless there are workers, with the packages of this process, that see the file."""
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError:
        raise DataError(f"`scheduler` {scheduler}: it has no workers") from None
    here = _describe(witness)
    for address, there in client.run(_describe, witness, on_error="return").items():
        if isinstance(there, Exception):
            raise DataError(
                f"`scheduler` {scheduler}: worker {address}: {there}; install this project there too"
            )
        for name, value in here.items():
            if there[name] != value:
                if name == str(witness):
                    raise DataError(
                        f"`scheduler` {scheduler}: worker {address} does not see {witness.parent}"
                    )
                raise DataError(
                    f"`scheduler` {scheduler}: worker {address} has {name} {there[name]}, {value} is here: "
                    "the bytes would differ"
                )


def _describe(witness: Path) -> dict[str, str]:
    """What decides a worker's output: versions, and the content of the shared file."""
    try:
        content = witness.read_bytes().hex()
    except OSError:
        content = ""
    return {name: version(name) for name in PACKAGES} | {str(witness): content}

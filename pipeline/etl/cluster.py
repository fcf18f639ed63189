"""Tasks → results on the workers of a Dask cluster: the counterpart of `pipeline.base.workers` on one machine.

Dask's scheduler reruns the tasks of a lost worker on another one. Tasks and results travel pickled among scheduler,
workers and this process, which must trust each other; paths in them must mean the same everywhere.
"""

import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from pipeline.base.errors import DataError, MachineError, needs

Task = TypeVar("Task")
Result = TypeVar("Result")

CONNECT_SECONDS = 20.0
PACKAGES = ("numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")  # they decide the bytes
logger = logging.getLogger(__name__)


def run_on_cluster(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    scheduler: str,
    witness: Path,
    blame: Callable[[Result], str] = lambda result: "",
) -> Generator[Result, None, None]:
    """Results as they come, with a bounded number of tasks in flight.

    `witness` is a file that every worker must see; `blame` says why a result is a failure of its worker, if it is one.
    An unfit worker is named in a warning and gets no further tasks; its task is done by another one. Raises DataError
    for a cluster without scheduler, fit workers or enough memory; and whatever a task raises.
    """
    with needs("dask", "`scheduler`"):
        distributed: Any = import_module("distributed")  # which has no types
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DataError(f"`scheduler` {scheduler}: cannot be reached: {error}") from None
    # Each task carries the requirements for its worker, so that a worker that joins late is checked as well.
    run = partial(_run, function, _describe(witness), witness)
    with client, client.as_current():
        try:
            yield from _spread(client, distributed.wait, run, iter(tasks), blame)
        except distributed.KilledWorker as error:
            raise DataError(f"a worker was lost each time it had this task: {error}; is there enough memory?") from None
        except (CancelledError, distributed.comm.CommClosedError, TimeoutError):
            raise DataError(f"`scheduler` {scheduler}: the connection was lost; the same command continues") from None


def _spread(
    client: Any, wait: Any, run: Callable[[Task], Any], waiting: Iterator[Task], blame: Callable[[Result], str]
) -> Iterator[Result]:
    """Results of the tasks, of fit workers alone; as `run_on_cluster`."""
    name = f"`scheduler` {client.scheduler.address}"
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError:
        raise DataError(f"{name}: it has no workers") from None
    for address, answer in client.run(_describe_code, on_error="return").items():
        if isinstance(answer, Exception):
            raise DataError(f"{name}: worker {address}: {answer}; install this project there too")
    flight, unfit = dict[Any, Task](), dict[str, str]()  # futures; the addresses of workers, and why
    while True:
        threads = client.nthreads()
        fit = sorted(set(threads) - set(unfit))
        if unfit and not fit:
            raise DataError(f"{name}: no fit worker is left: {'; '.join(unfit.values())}")
        # Workers may join and leave: two tasks for each current thread.
        for task in islice(waiting, max(1, 2 * sum(threads[address] for address in fit) - len(flight))):
            # Not pure: what a task writes may have been removed since a cluster did the same. No retries: an error that
            # a task raises, it raises again; the tasks of lost workers are done again in any case. Other workers get it
            # if all fit ones have left: those that joined since, or unfit ones, which give it back.
            where = {"workers": fit, "allow_other_workers": True} if unfit else {}
            flight[client.submit(run, task, pure=False, retries=0, **where)] = task
        if not flight:
            return
        for future in wait(list(flight), return_when="FIRST_COMPLETED").done:
            task = flight.pop(future)
            address, reason, result = future.result()
            if not (reason := reason or blame(result)):
                yield result
                continue
            if address not in unfit:
                logger.warning("worker %s %s; its tasks go to others", address, reason)
            unfit[address] = f"worker {address} {reason}"
            waiting = chain([task], waiting)


def _run(
    function: Callable[[Task], Result], needed: Mapping[str, str], witness: Path, task: Task
) -> tuple[str, str, Result | None]:
    """In a worker: its address, why it is unfit, and the result if it is fit."""
    from distributed import get_worker

    address, present = get_worker().address, _describe(witness)
    for name, value in needed.items():
        if present[name] != value:
            differs = f"has {name} {present[name]}, {value} is needed: the bytes would differ"
            return address, f"does not see {witness.parent}" if name == str(witness) else differs, None
    try:
        return address, "", function(task)
    except (MachineError, OSError) as error:
        return address, f"failed: {error}", None


def _describe(witness: Path) -> dict[str, str]:
    """What decides a worker's output: versions, sources, and the content of the shared file."""
    return {**_describe_code(), str(witness): witness.read_bytes().hex() if witness.is_file() else ""}


@cache
def _describe_code() -> dict[str, str]:
    digest, sources = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(sources.rglob("*.py")):
        digest.update(path.relative_to(sources).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {name: version(name) for name in PACKAGES} | {"sources of sha256": digest.hexdigest()}

"""Tasks → results, in worker processes that may be killed, interrupted or orphaned without harm.

Workers come from a fork server, which has imported what they need and runs no threads: they start in
milliseconds, and safely beside the parent's threads. What they share is plain memory without locks, because a
worker killed while it holds a lock would block all others.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from itertools import islice
from multiprocessing import forkserver, resource_tracker
from typing import Any, TypeVar

from pipeline.base.errors import FULL, DataError, MachineError, explain_os_error

Task = TypeVar("Task")
Result = TypeVar("Result")

_LONGEST_TMPDIR = 75  # bytes
TICK = 0.2  # seconds between looks at the progress
_STOP, _SLOTS = 0, 1024  # the first slot is the stop flag, each worker counts in one of the others
_shared: Any = None  # the slots, in worker processes
_mine = _STOP  # the slot of this worker, by the number that ends its process name: unique among the living


def report_item() -> None:
    """In a worker process, count an item that a task has done. Raises CancelledError once a stop was requested."""
    if _shared is not None:
        if _shared[_STOP]:
            raise CancelledError
        _shared[_mine] += 1


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    tick: Callable[[int], None] = lambda items: None,
) -> Generator[Result, None, None]:
    """Results as they come, with a bounded number of tasks in flight; `tick` gets the items reported so far.

    A killed worker does not end the run: the tasks in flight are done again, one at a time. Raises DataError,
    naming the task, if its worker is killed again; and whatever a task raises.
    """
    waiting = iter(tasks)
    before = 0  # items that earlier pools had reported
    while True:
        flight: dict[Future[Result], Task] = {}
        with _worker_pool(function, workers) as (pool, slots):
            try:
                for task in islice(waiting, 2 * workers):
                    flight[_submit(pool, function, task)] = task
                while flight:
                    done = _wait(flight)
                    tick(before + sum(slots[1:]))
                    for future in done:
                        yield future.result()
                        del flight[future]
                        for task in islice(waiting, 1):
                            flight[_submit(pool, function, task)] = task
                return
            except BrokenProcessPool:
                before += sum(slots[1:])  # what was in flight is done again, and not counted again
        for task in flight.values():
            yield run_alone(function, task)


def run_alone(function: Callable[[Task], Result], task: Task, step: str = "") -> Result:
    """Run one task in its own process, which frees its memory; if that is killed, raises DataError naming `step`."""
    with _worker_pool(function, 1) as (pool, _):
        try:
            return _await(_submit(pool, function, task))
        except BrokenProcessPool:
            raise DataError(f"{step or task}: its process was killed; is there enough memory?") from None


def run_threads(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Result]:
    """Results in the order of the tasks; `progress` gets (tasks done, total). An error cancels waiting tasks."""
    results = []
    pool = ThreadPoolExecutor(workers)
    try:
        with _without_signals():  # it takes locks and starts threads
            futures = [pool.submit(function, task) for task in tasks]
        for future in futures:
            results.append(_await(future))
            progress(len(results), len(tasks))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def start_server(modules: Sequence[str]) -> None:
    """Start the fork server, which imports these modules for all workers; it may run already."""
    # A socket's path has at most 107 bytes, of which `/pymp-xxxxxxxx/listener-xxxxxxxx` takes 31. If TMPDIR is too
    # long, multiprocessing makes its private folder in /tmp, once for the process, and removes it at the end.
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) > _LONGEST_TMPDIR:
        tempfile.tempdir = "/tmp"  # noqa: S108 - mkdtemp makes a private folder in it
        try:
            multiprocessing.util.get_temp_dir()
        except OSError as error:
            raise DataError(f"TMPDIR={usual} is too long for sockets, and /tmp: {error.strerror}") from None
        finally:
            tempfile.tempdir = usual
    multiprocessing.get_context("forkserver").set_forkserver_preload([*modules, "numpy.ma"])  # which Arrow imports late
    resource_tracker.ensure_running()  # first, as its start unblocks SIGINT
    with _without_signals():  # which workers inherit, so Ctrl-C reaches this process alone
        forkserver.ensure_running()


def _wait(futures: Collection[Future[Result]]) -> set[Future[Result]]:
    """Those that are done, after a moment.

    An exception from a signal's handler would leave a lock of theirs held, for which the pool's thread waits forever.
    """
    with _without_signals():
        return wait(futures, TICK, FIRST_COMPLETED).done


def _await(future: Future[Result]) -> Result:
    """The result of a future, once the pool's thread no longer needs its lock."""
    while not _wait([future]):
        pass
    return future.result()


@contextmanager
def _without_signals() -> Iterator[None]:
    """Have the handlers of SIGINT and SIGTERM run afterwards; processes that start here ignore Ctrl-C.

    A mask alone does not hold signals back: another thread, such as a progress bar's, takes them for the main thread.
    """
    held, handlers = list[int](), dict[signal.Signals, Any]()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(number)):
                handlers[number] = signal.getsignal(number)
                signal.signal(number, lambda received, _: held.append(received))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for received in held:
            signal.raise_signal(received)


@contextmanager
def _worker_pool(function: Callable[..., Any], workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    package = function.__module__.partition(".")[0]
    try:
        # All that this process has imported of ours, so that no worker imports it again.
        start_server([name for name in sys.modules if name.partition(".")[0] == package])
        context = multiprocessing.get_context("forkserver")
        slots = context.RawArray("q", _SLOTS)
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(slots,))
    except OSError as error:
        place = "/dev/shm" if error.errno in FULL else "worker processes"  # noqa: S108 - not ours to choose
        raise MachineError(f"{place}: {explain_os_error(error)}") from None
    try:
        yield pool, slots
    finally:
        slots[_STOP] = 1
        processes = [*(pool._processes or {}).values()]
        pool.shutdown(wait=False, cancel_futures=True)
        while alive := [process for process in processes if process.is_alive()]:
            multiprocessing.connection.wait([process.sentinel for process in alive], TICK)
            if any(process.exitcode for process in processes):  # killed, maybe with a lock: the others wait forever
                for process in alive:
                    process.kill()
        pool.shutdown()


def _submit(pool: ProcessPoolExecutor, function: Callable[[Task], Result], task: Task) -> Future[Result]:
    try:
        with _without_signals():  # it takes locks and starts a worker
            return pool.submit(function, task)
    except BrokenProcessPool:  # found here rather than by wait(): the task must not be lost
        future: Future[Result] = Future()
        future.set_exception(BrokenProcessPool())
        return future


def skip_pandas() -> None:
    """Have pyarrow do without pandas, which it imports with its first value: a second.

    For processes of our own: Arrow's `to_pandas` fails there from now on.
    """
    if "pandas" in sys.modules:
        return
    import pyarrow as pa

    class Finder(MetaPathFinder):  # of no pandas, wherever it is installed
        def find_spec(self, name: str, *_: object) -> None:
            if name == "pandas":
                raise ModuleNotFoundError(name=name)

    sys.meta_path.insert(0, finder := Finder())
    pa.scalar(0)
    sys.meta_path.remove(finder)


def _start_worker(slots: Any) -> None:
    skip_pandas()
    global _shared, _mine
    _shared, _mine = slots, 1 + int(multiprocessing.current_process().name.rpartition("-")[2]) % (_SLOTS - 1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Else a worker would outlive a killed parent, waiting for tasks forever."""
    if (parent := multiprocessing.parent_process()) is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def count_cpus() -> int:
    """The processors that this process may use: fewer than the machine's under Slurm or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> int:
    """The number of this machine's cores for each of torchrun's ranks, if any."""
    return max(1, count_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

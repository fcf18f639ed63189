"""torchrun's ranks, the processes that train a run together: this process's rank, and what ranks exchange.

Every rank holds all labels and takes its slice of every batch (pipeline.stream.plan), so little is exchanged:
gradients, the scores of an evaluation, and at each step the number of cells in the batch and whether any rank was asked
to stop. So all ranks make the same decisions, and only the first one reads or writes the run's folder, which the others
need not see. A signal only leaves its exit code (`listen`); between steps, `Ranks.agree` turns it into `Stopped`.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # now: its defaults would hold the process group, if one existed
from torch import nn

from pipeline.base.errors import DataError

Value = TypeVar("Value")
# A killed rank closes its connections, which ends the others at once; this is for a machine that vanishes.
TIMEOUT = timedelta(minutes=5)
LONGEST = timedelta(days=7)  # for the first rank's work after training, for which the others wait


class LostRankError(DataError):
    """The connection to another rank was lost."""


class Stopped(SystemExit):
    """A signal to any rank asked for a stop: ends all ranks with the signal's exit code."""


_codes: list[int] = []  # of the signals received


def listen() -> None:
    """Obey Ctrl-C, SIGTERM, and SIGUSR1, which Slurm sends before a job's time is up (--signal=USR1@120)."""
    for number, code in {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}.items():
        signal.signal(number, lambda *_, code=code: _codes.append(code))


def requested() -> int:
    """The exit code of the stop that a signal to this process asked for; 0 for none."""
    return _codes[-1] if _codes else 0


@dataclass(frozen=True)
class Ranks:
    """One process of a run; without torchrun, the only one."""

    rank: int = 0
    count: int = 1
    joined: bool = False  # in a process group, which torchrun creates even for a single rank

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def gather(self, *values: float) -> npt.NDArray[np.float64]:
        """The values of each rank, [ranks, values]."""
        table = np.zeros((self.count, len(values)))
        table[self.rank] = values
        return self.sum(table)

    def first(self, flag: bool) -> bool:
        """The first rank's flag; only that rank sees the run's folder."""
        return bool(self.gather(flag)[0, 0])

    def agree(self, *values: float) -> npt.NDArray[np.float64]:
        """The sums of values over the ranks. Raises Stopped on all ranks if any rank was asked to stop."""
        table = self.gather(requested(), *values)
        if code := int(table[:, 0].max()):
            raise Stopped(code)
        return np.asarray(table[:, 1:].sum(axis=0))

    def sum(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The sum over ranks of arrays of the same shape."""
        if self.joined:
            array = array.copy()
            dist.all_reduce(torch.from_numpy(array))
        return array

    def share(self, read: Callable[[], bytes]) -> bytes:
        """The bytes that the first rank reads."""
        content = [read() if self.is_first else b""]
        if self.joined:
            dist.broadcast_object_list(content)
        return content[0]

    def list_all(self, value: Value) -> list[Value]:
        """The value of each rank."""
        values = [value] * self.count
        if self.joined:
            dist.all_gather_object(values, value)
        return values

    def unite(self, values: set[int]) -> set[int]:
        """The union over ranks."""
        return set[int]().union(*self.list_all(values))

    def compare(self, values: Mapping[str, object]) -> None:
        """Raise DataError on every rank, naming the first value that a rank does not share with the first rank."""
        table = self.list_all(dict(values))
        for rank, name in product(range(self.count), table[0]):
            first, other = table[0][name], table[rank].get(name)
            if other != first:
                remedy = "start every rank by the same command, with the same shards and packages"
                raise DataError(f"rank {rank} has {name} {other} and rank 0 has {first}: {remedy}")

    def average_gradients(self, network: nn.Module, sync_bn: bool) -> nn.Module:
        """The network to train: gradients are averaged over the ranks, buffers are the first rank's."""
        if not self.joined:
            return network
        if sync_bn:  # BatchNorm's statistics are over the whole batch; GPUs only
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)

    def exchange(self, network: Any, now: bool) -> contextlib.AbstractContextManager[None]:
        """Around the backward pass of a part of a batch: gradients are exchanged in the last part only."""
        return network.no_sync() if self.joined and not now else contextlib.nullcontext()

    def align_buffers(self, network: nn.Module) -> None:
        """Copy the first rank's buffers to all ranks, such as BatchNorm's running statistics."""
        for buffer in network.buffers() if self.joined else ():
            dist.broadcast(buffer, 0)


ALONE = Ranks()


@contextlib.contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the ranks that torchrun started, if any; all but the first print only errors.

    Raises DataError if this machine has fewer GPUs than ranks, or if something other than torchrun has set RANK;
    LostRankError if a rank is lost.
    """
    if "RANK" not in os.environ:
        yield ALONE
        return
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise DataError(f"RANK is in the environment and {name} is not: start with torchrun, or unset RANK")
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local >= (gpus := torch.cuda.device_count()):
            raise DataError(f"local rank {local} has no GPU, there are {gpus}: --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backends, timeout=TIMEOUT)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), True)
        with contextlib.ExitStack() as stack:
            if not ranks.is_first:
                logging.basicConfig(stream=sys.stderr, format=f"rank {ranks.rank}: %(message)s")
                silence = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            stack.enter_context(_leave_together())
            yield ranks
    except BaseException as error:
        if dist.group.WORLD is not None and not isinstance(error, Stopped):
            dist.group.WORLD.abort()  # a thread may be waiting for a rank that does not come
        left: BaseException | None = error
        while left is not None:  # drop the local variables of the functions that it has left: its traceback holds them
            traceback.clear_frames(left.__traceback__)
            left = left.__context__
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))
        if isinstance(error, RuntimeError) and lost:
            first = str(error).splitlines()[0]
            raise LostRankError(f"rank {os.environ['RANK']}: another rank is lost: {first}") from error
        raise
    finally:
        # With the last reference to the group end the threads of gloo: if one is still freeing the tensors of the last
        # exchange when Python exits, the process aborts.
        gc.collect()  # DistributedDataParallel is part of reference cycles
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _leave_together() -> Iterator[None]:
    """Wait at the end for all ranks: torchrun kills the others when one exits with a code, such as a stop's."""
    end: Any = dist.new_group(backend="gloo", timeout=LONGEST)
    try:
        yield
    except Stopped:  # on all ranks
        dist.barrier(end)
        raise
    dist.barrier(end)

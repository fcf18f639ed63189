"""A stream's batches for torch's DataLoader: the one module of this package that imports torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.base.errors import MachineError, needs
from pipeline.stream.batches import Batch, BatchStream, Plan, Stage

with needs("train"):
    import torch
    from torch.utils.data import IterableDataset, default_convert, get_worker_info

NOBODY = -1  # no iteration; a loader's iteration is identified by its seed, from 0 on


class LoaderStream(BatchStream, IterableDataset[Any]):
    """A stream that DataLoader(stream, batch_size=None) takes as it is, and converts to tensors.

    Its workers share the batches, which stay in the order of the plan; each counts unusable images separately.
    """

    def __init__(self, plan: Plan, *stages: Stage) -> None:
        super().__init__(plan, *stages)
        # How many states were loaded, the last one's step, and which iteration takes it; all workers see it.
        try:
            self._loaded = torch.tensor([0, 0, NOBODY]).share_memory_()
        except RuntimeError as error:
            raise MachineError(f"shared memory: {error}; make room in it") from None
        self._known = 0  # number of states seen by this copy
        self._mine: int | None = None  # the step of a state loaded in this worker

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is None:
            return super().__iter__()
        loaded, start, taker = self._loaded.tolist()
        iteration = worker.seed - worker.id
        # A loader's workers are independent copies: the first iteration to start claims the loaded state.
        if taker == NOBODY:
            self._loaded[2] = taker = iteration
        if loaded == self._known or taker != iteration:
            start = 0
        self._known = loaded
        if self._mine is not None:
            start, self._mine = self._mine, None
        self.step = start
        return self.run(start, worker.id, worker.num_workers)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        super().load_state_dict(state)
        if get_worker_info() is None:
            self._loaded.copy_(torch.tensor([int(self._loaded[0]) + 1, self.step, NOBODY]))
        else:
            self._mine = self.step


class BatchDataset(IterableDataset[Any]):
    """The batches of a stream as tensors, with a DataLoader or without; start, position and length are the stream's."""

    def __init__(self, stream: BatchStream) -> None:
        if not isinstance(stream, LoaderStream):  # made before torch was imported
            start, stream = stream.state_dict(), LoaderStream(stream.plan, *stream.stages)
            stream.load_state_dict(start)
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        return map(default_convert, self.stream)

    def __len__(self) -> int:
        return len(self.stream)

    def state_dict(self) -> dict[str, int]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.stream.load_state_dict(state)

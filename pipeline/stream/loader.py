"""A stream's batches for torch's DataLoader: the one module of this package that imports torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.base.errors import MachineError, needs
from pipeline.stream.batches import BatchStream

with needs("train"):
    import torch
    from torch.utils.data import IterableDataset, default_convert, get_worker_info

NOBODY = -1  # no iteration; a loader's is known by its seed, from 0 on


class BatchDataset(IterableDataset[Any]):
    """The batches of a stream, their arrays as tensors.

    The workers of a DataLoader(dataset, batch_size=None) share them: it yields them in the order of the plan for any
    number of workers, each of which counts unusable images by itself. Start, position and length are the stream's.
    """

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream
        # How many states were loaded, the last one's step, and which iteration takes it; all workers see it.
        try:
            self._loaded = torch.tensor([int(stream.step > 0), stream.step, NOBODY]).share_memory_()
        except RuntimeError as error:
            raise MachineError(f"shared memory: {error}; make room in it") from None
        self._known = 0  # states that this copy has seen
        self._mine: int | None = None  # the step of a state that was loaded in this worker

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            return map(default_convert, self.stream)
        loaded, start, taker = self._loaded.tolist()
        iteration = worker.seed - worker.id
        # A loader starts its workers from copies that never learn of each other: the first iteration signs.
        if taker == NOBODY:
            self._loaded[2] = taker = iteration
        if loaded == self._known or taker != iteration:
            start = 0
        self._known = loaded
        if self._mine is not None:
            start, self._mine = self._mine, None
        return map(default_convert, self.stream.run(start, worker.id, worker.num_workers))

    def __len__(self) -> int:
        return len(self.stream)

    def state_dict(self) -> dict[str, int]:
        """See BatchStream."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See BatchStream."""
        self.stream.load_state_dict(state)
        if get_worker_info() is None:
            self._loaded.copy_(torch.tensor([int(self._loaded[0]) + 1, self.stream.step, NOBODY]))
        else:
            self._mine = self.stream.step

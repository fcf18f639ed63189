"""A stream of batches → a dataset for torch's DataLoader: the one module of this package that imports torch."""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice

from pipeline.base.errors import needs
from pipeline.stream.batches import BatchStream
from pipeline.stream.plan import Step

with needs("train"):
    import webdataset
    from torch.utils.data import default_convert, get_worker_info


class BatchDataset(webdataset.DataPipeline):  # type: ignore[misc] # webdataset has no types
    """The batches of a stream, their arrays as tensors: an IterableDataset, which the workers of a DataLoader share.

    Iterated by itself, it can save its state after any batch. `DataLoader(dataset, batch_size=None, num_workers=W)`
    yields the batches in the same order, for any number of workers. Each worker counts `max_bad` by itself. A dataset
    is one epoch: make a new loader for the next epoch instead of keeping workers alive. torchdata's StatefulDataLoader
    calls `state_dict` and `load_state_dict`.
    """

    def __init__(self, stream: BatchStream) -> None:
        super().__init__(self._share, stream.run, partial(map, default_convert))
        self.stream = stream
        self.worker: int | None = None  # whose state was loaded

    def __len__(self) -> int:
        """The number of batches of the whole epoch."""
        return len(self.stream)

    def _share(self) -> Iterator[Step]:
        """Every W-th step in each of W workers, whose batches the loader takes in turn; all steps elsewhere."""
        worker = get_worker_info()
        steps = self.stream.plan(self.stream.step)
        if worker is None:
            return steps
        first = (
            0 if self.worker == worker.id else worker.id
        )  # a worker's own state is that of its own next step
        return islice(steps, first, None, worker.num_workers)

    def state_dict(self) -> dict[str, int]:
        """Where to continue: the stream's state in the main process, the worker's own share in a worker."""
        worker = get_worker_info()
        if worker is None:
            return self.stream.state_dict()
        done = self.stream.step
        return {"step": done + worker.num_workers - 1 if done else worker.id, "worker": worker.id}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where the state was taken."""
        self.worker = state.get("worker")
        self.stream.load_state_dict(state)

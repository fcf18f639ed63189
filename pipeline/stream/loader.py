"""A stream's batches as tensors, for loops without a DataLoader: the one module of this package that imports torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.base.errors import needs
from pipeline.stream.batches import BatchStream

with needs("train"):
    from torch.utils.data import IterableDataset, default_convert


class BatchDataset(IterableDataset[Any]):
    """The batches of a stream, their arrays as tensors; start, position and length are the stream's."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        return map(default_convert, self.stream)

    def __len__(self) -> int:
        return len(self.stream)

    def state_dict(self) -> dict[str, int]:
        """See BatchStream."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See BatchStream."""
        self.stream.load_state_dict(state)

"""Chest X-ray datasets → label table → shards → batches. Knows nothing about networks.

    shards = open_shards("shards")
    for batch in shards["train"].batches(64, 224, epoch=0):
        ...  # batch.images uint8 [64, 1, 224, 224], batch.target float32 and batch.mask bool [64, 14]

A torch `DataLoader(batches, batch_size=None)` shares them among its workers; `BatchDataset(batches)` has them as
tensors without a loader.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.base.errors import DataError

__all__ = ["BatchDataset", "DataError", "Judging", "judge", "open_shards"]

if TYPE_CHECKING:
    from pipeline.judging import Judging, judge
    from pipeline.stream.dataset import open_shards
    from pipeline.stream.loader import BatchDataset
else:
    MODULES = {"open_shards": "pipeline.stream.dataset", "BatchDataset": "pipeline.stream.loader"}
    MODULES |= dict.fromkeys(("Judging", "judge"), "pipeline.judging")

    def __getattr__(name: str) -> object:
        """Import each name on first use: Arrow and OpenCV would slow down every command, torch even more."""
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(MODULES[name]), name)

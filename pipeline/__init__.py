"""Chest X-ray sets as people have them → label table → shards → batches. Knows nothing of networks."""

from pipeline.base.errors import DataError

__all__ = ["DataError"]

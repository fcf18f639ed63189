"""Shards → batches, in an order that is exactly reproducible."""

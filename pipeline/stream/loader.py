"""A plan and stages → a webdataset pipeline, and its share in each worker of a DataLoader: what needs torch."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from pipeline.stream.plan import Step


def compose(plan: Callable[[], Iterator[Step]], *parts: Callable[..., Any]) -> Iterable[Any]:
    """A `webdataset.DataPipeline` of a plan and the stages; users can put stages of their own between them.

    Inside a `torch.utils.data.DataLoader(stream, batch_size=None, num_workers=W)` the workers share the batches, which
    leave the loader in the order that they have without workers. `max_bad` then counts in each worker by itself.
    A stream is one epoch: make the next epoch's stream, and a loader for it, rather than keeping workers alive.
    """
    import webdataset  # here, because it imports torch, which the rest of this package does without

    pipeline: Iterable[Any] = webdataset.DataPipeline(plan, share_among_workers, *parts)
    return pipeline


def share_among_workers(steps: Iterable[Step]) -> Iterator[Step]:
    """Every W-th step in each of a DataLoader's W workers, whose batches it takes in turn; all steps elsewhere."""
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    yield from steps if worker is None else islice(steps, worker.id, None, worker.num_workers)

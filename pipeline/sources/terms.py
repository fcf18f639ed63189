"""Who made a data set, and on what terms it may be used: facts that travel with its shards."""

from typing import NamedTuple


class Terms(NamedTuple):
    """`patients` is the namespace of patient names: sets that share it share patients."""

    name: str
    title: str
    patients: str
    license: str
    paper: str

"""What decides a run's outcome, as config.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from model.augment import AUGMENTATIONS
from model.fusion import FUSIONS
from model.networks import ARCHITECTURES
from model.ranks import Ranks
from pipeline.base.errors import DataError, SettingError
from pipeline.labels import LABELS
from pipeline.policies import check_blank_policy, parse_uncertain_policy


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's outcome, as config.json; defaults are those of `--help`."""

    arch: str
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    image_size: int
    amp: str
    ema: float
    keep: str  # which evaluated weights become best.pt: the best on dev, or the last
    augment: str
    uncertain: str
    blank: str
    seed: int
    manifest: str  # its sha256, which stands for all of the data
    labels: tuple[str, ...]  # those that are learnt and measured
    views: str  # of those in the shards
    where: tuple[str, ...]  # conditions on the table's columns
    limit: int | None  # images of train, whole patients
    balance: str | None  # the label whose positives and negatives are drawn equally often
    max_bad: float  # share of images that may be unusable
    loss: str
    pos_weight: bool
    accumulate: int  # parts that a batch is computed in
    eval_every: int | None  # steps; None: at the end of every epoch
    patience: int | None  # evaluations without a better one, then the run ends
    pretrained: bool
    init: str | None  # sha256 of the file of weights that the run starts from
    compile: bool
    teacher: str | None  # sha256 of its scores, where a label is selftrained
    sync_bn: bool = False  # BatchNorm's statistics over all ranks; not in runs of version 0.1
    fusion: str | None = None  # how a study's views are pooled; None: images are learnt one by one
    freeze: bool = False  # the weights that a fusion starts from
    dev: float | None = None  # share of train's patients held out as dev; None: the shards have a dev split


def output_count(config: Config) -> int:
    """A logit per label, and one more per label with three classes."""
    return len(LABELS) + len(three_class_columns(config))


def three_class_columns(config: Config) -> list[int]:
    """The columns of the labels that have uncertain as a class of its own."""
    policy = parse_uncertain_policy(config.uncertain)
    return [column for column, label in enumerate(LABELS) if policy[label] == "multiclass"]


def learnt_columns(config: Config) -> list[int]:
    """The columns of the labels that this run learns."""
    return [LABELS.index(label) for label in config.labels]


def can_divide(batch_size: int, accumulate: int, ranks: Ranks) -> bool:
    """Whether every rank gets so many equal parts of a batch, of 2 images or more."""
    parts = accumulate * ranks.count
    return batch_size % parts == 0 and batch_size // parts >= 2


def check_config(config: Config, ranks: Ranks) -> None:
    """Raise SettingError for options that contradict each other, or do not go with so many ranks."""
    if config.loss == "aucm" and (config.pos_weight or three_class_columns(config)):
        raise SettingError("--loss aucm goes neither with --pos-weight nor with the policy multiclass")
    if config.loss == "aucm" and config.accumulate > 1:
        raise SettingError("--loss aucm is of a whole batch: it does not go with --accumulate")
    if config.balance and (config.loss == "aucm" or config.pos_weight):
        raise SettingError(
            "--balance goes neither with --loss aucm nor with --pos-weight: each corrects alone"
        )
    if not can_divide(config.batch_size, config.accumulate, ranks):
        of_ranks = f" on each of {ranks.count} ranks" if ranks.count > 1 else ""
        raise SettingError(
            f"--batch-size {config.batch_size} for --accumulate {config.accumulate}{of_ranks}: "
            "the parts must be equal, of 2 images or more"
        )
    if config.sync_bn and not (ranks.joined and torch.cuda.is_available()):
        raise SettingError("--sync-bn is for training by torchrun on GPUs")
    if config.freeze and not (config.fusion and (config.init or config.pretrained)):
        raise SettingError("--freeze keeps the weights that a --fusion starts from: it needs --init too")
    if config.pretrained and config.init:
        raise SettingError("--pretrained or --init, not both")


def read_config(run: Path) -> Config:
    """The configuration of a run. Raises DataError where the folder holds none, or one that no run can have."""
    path = run / "config.json"
    try:
        values = json.loads(path.read_bytes())
        tuples: dict[str, Any] = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
        config = Config(**values | tuples)
        _check_values(config)
        parse_uncertain_policy(config.uncertain)
        check_blank_policy(config.blank)
        return config
    except FileNotFoundError:
        raise DataError(f"{run}: no config.json, so not a run folder") from None
    except (AttributeError, TypeError, ValueError, DataError) as error:
        raise DataError(f"{path}: damaged, or of another version: {str(error)[:200]}") from error


def _check_values(config: Config) -> None:
    """Raise ValueError for a value of a kind that no run has."""
    known = {"arch": ARCHITECTURES, "fusion": (None, *FUSIONS), "augment": AUGMENTATIONS}
    for name, kind in get_type_hints(Config).items():
        value = getattr(config, name)
        kinds = get_args(kind) if isinstance(kind, UnionType) else (get_origin(kind) or kind,)
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if not fits or value not in known.get(name, (value,)):
            raise ValueError(f"{name} is {value!r}")
    if not config.labels or not set(config.labels) <= set(LABELS):
        raise ValueError(f"labels are {config.labels!r}")

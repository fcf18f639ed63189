"""The settings that determine a run's outcome (config.json), and the options that commands share."""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from model import names
from model.names import AUGMENTATIONS, check_arch, own_input, parse_shape
from pipeline.base.errors import DataError, SettingError
from pipeline.base.files import hash_file, read_object
from pipeline.base.options import check_values, list_options, option
from pipeline.base.store import read_bytes
from pipeline.base.workers import share_of_cores
from pipeline.console import say
from pipeline.labels import LABELS, VIEWS, find_label, parse_labels
from pipeline.manifest import read_manifest
from pipeline.measure.evaluation import MEANS
from pipeline.measure.metrics import COMPETITION
from pipeline.policies import BLANK_HELP, UNCERTAIN_HELP, check_blank_policy, choose_policy, parse_uncertain_policy

if TYPE_CHECKING:
    from model.checkpoint import Start
    from model.ranks import Ranks
    from pipeline.stream.dataset import Shards

ARCH, IMAGE_SIZE, SHARDS = "resnet50", "320", ("shards",)  # defaults; this size for networks without a fixed one
HELD_OUT = 0.05  # share of the patients, if the shards have no dev split
ENSEMBLE = "ensemble.json"  # in the folder of an ensemble, instead of config.json
TEACHER_SCORES = "scores-train.arrow"
# Help that is too long for the line of its option.
ARCH_HELP = f"{', '.join(names.ARCHITECTURES)}, or timm/NAME for any network of timm."
SIZE, SIZE_HELP = "SIDE|HEIGHTxWIDTH", "Size of the input in pixels, to which images are stretched: 320, or 448x384."
AUGMENT_HELP = "crop: affine maps and crops; robust: also random sharpness, noise and borders, on equalized images."
DEV_HELP = "Fraction of the training patients to hold out as dev."
OUTPUTS_HELP = "What the outputs of --init are, in their order, if its file does not say."
CHOICE_HELP = "Labels whose mean AUROC on dev chooses the checkpoint; all: those with 10 patients of each class there."
SHARDS_HELP = "Folder of shards, or its URL: https://… or s3://…; several are read as one."
INIT_HELP = "Start from this file, a run, published chest weights (listed by `networks`), or hf-hub:OWNER/NAME/FILE."


def parse_names(text: str) -> tuple[str, ...]:
    """Names separated by commas, those of labels in any case. Raises DataError for an empty name."""
    words = [word.strip() for word in text.split(",")]
    if "" in words:
        raise DataError(f"'{text}' is not like projection,sex")
    return tuple(find_label(word) or word for word in words)


def parse_choice(text: str) -> tuple[str, ...]:
    """The labels whose mean AUROC chooses a checkpoint; none for `all`. Raises DataError for an unknown name."""
    return {"all": (), "competition": COMPETITION}[text] if text in ("all", "competition") else parse_labels(text)


def name_choice(text: str) -> str:
    """The criterion that chooses a checkpoint, as shown in tables."""
    return {"all": MEANS["macro10"], "competition": MEANS["mean5"]}.get(text) or ", ".join(parse_labels(text))


def parse_size(text: str) -> int:
    """Bytes, from text like 500MB, 20GB or 1.5TB."""
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])B", text)) is None:
        raise DataError(f"'{text}' is not like 500MB, 20GB or 1.5TB")
    return int(float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2]])


def parse_shares(text: str) -> tuple[float, ...]:
    """Positive numbers, separated by commas."""
    with suppress(ValueError):
        shares = tuple(map(float, text.split(",")))
        if all(0 < share < math.inf for share in shares):
            return shares
    raise DataError(f"'{text}' is not like 0.7,0.3")


def parse_initial(text: str) -> Path:
    """The path of weights to start from; a published encoder's name and `hf-hub:…` are returned as paths too."""
    if not (Path(text).exists() or text in names.published() or text.startswith(names.HUB)):
        raise DataError(f"Path '{text}' does not exist, and `python -m train networks` lists no such weights.")
    return Path(text)


run_option, data_option, label_option, network_option, optimization_option = (
    partial(option, group=group) for group in ("run", "data", "labels", "network", "optimization")
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run's outcome, in the order of config.json.

    `resolve_config` fills in what is empty or None here.
    """

    arch: str = network_option("", ARCH_HELP, check=check_arch, metavar="NAME", shown=f"that of --init, else {ARCH}")
    lr: float = optimization_option(1e-4, "Peak learning rate.", low=0, open=True)
    weight_decay: float = optimization_option(1e-2, "AdamW weight decay.", low=0)
    batch_size: int = optimization_option(64, low=2)
    epochs: int = optimization_option(5, low=1)
    image_size: str = network_option(
        "", SIZE_HELP, check=parse_shape, metavar=SIZE, shown=f"that of --init, of timm's network, or {IMAGE_SIZE}"
    )
    amp: str = optimization_option("auto", "Mixed precision.", choices=("auto", "bf16", "fp16", "off"))
    ema: float = optimization_option(0.999, "Decay of the averaged weights.", low=0, high=1)
    keep: str = run_option("best", "Weights to keep: the best on dev, or the last.", choices=("best", "last"))
    augment: str = data_option("affine", AUGMENT_HELP, choices=tuple(AUGMENTATIONS))
    uncertain: str = label_option(
        "", UNCERTAIN_HELP, check=parse_uncertain_policy, metavar="POLICY", shown="the shards'"
    )
    blank: str = label_option("", BLANK_HELP, check=check_blank_policy, metavar="POLICY", shown="the shards'")
    seed: int = run_option(0, low=0, high=2**63 - 1)
    manifest: str = ""  # its sha256, which identifies the data
    labels: tuple[str, ...] = label_option(
        LABELS, "Learn only these.", choices=LABELS, split=parse_labels, metavar="A,B", shown="all 14"
    )
    views: str = data_option("all", "Use only these of the shards' views.", choices=VIEWS)
    where: tuple[str, ...] = data_option((), "Only these images: sex=Female, age>=60, Edema=1.", metavar="CONDITION")
    limit: int | None = data_option(None, "Train on at most this many images, of whole patients.", low=1)
    balance: str | None = data_option(
        None, "Draw this label's positives as often as its negatives.", choices=LABELS, metavar="LABEL"
    )
    max_bad: float = data_option(0.0, "Fraction of a split that may be damaged, and is skipped.", low=0, high=1)
    loss: str = optimization_option("bce", "aucm: the AUC margin loss.", choices=names.LOSSES)
    pos_weight: bool = optimization_option(False, "Weight positives by their inverse frequency in train.")
    accumulate: int = optimization_option(1, "Compute each batch in this many parts, to save memory.", low=1)
    eval_every: int | None = run_option(None, "Steps between evaluations on dev.", low=1, shown="once per epoch")
    patience: int | None = run_option(None, "Stop after this many evaluations without improvement.", low=1)
    pretrained: bool | None = network_option(
        None, "Start from the network's published weights (downloads them).", shown="if it has any, and without --init"
    )
    init: str | None = None  # sha256 of the weights file that the run starts from
    init_terms: str = ""  # license and training data of these weights
    adopted: str = ""  # weights file, if the run uses these weights without training
    init_labels: tuple[str, ...] = network_option(
        (), OUTPUTS_HELP, split=parse_names, metavar="A,B", shown="not known: a new last layer"
    )
    compile: bool = optimization_option(False, "Compile the network with torch.compile.")
    teacher: str | None = None  # sha256 of its scores, if a label is selftrained
    sync_bn: bool = optimization_option(False, "With torchrun: BatchNorm over the whole batch, not each rank's part.")
    fusion: str | None = network_option(None, "Train on studies, pooling their views this way.", choices=names.FUSIONS)
    freeze: bool = network_option(False, "Keep the initial weights; train only the last layer, or what fusion adds.")
    dev: float | None = data_option(None, DEV_HELP, low=0, high=1, open=True, shown=f"{HELD_OUT:g} without a dev split")
    mix: tuple[float, ...] = data_option(
        (), "Sampling fraction of each folder.", split=parse_shares, metavar="0.7,0.3", shown="by size"
    )
    balance_over: tuple[str, ...] = data_option(
        (), "With --balance: stratify by these columns.", split=parse_names, metavar="COLUMN,…"
    )
    layer_decay: float = optimization_option(1.0, "Ratio of a block's learning rate to the next one's.", low=0, high=1)
    input_scale: tuple[float, ...] = ()  # mean and standard deviation that normalize gray levels; (): the shards'
    # Earlier values of `epochs`, each trained to the end of its schedule; ignored if configurations are compared.
    extended: tuple[int, ...] = field(default=(), compare=False)
    equalize: bool = False  # whether the network equalizes its input, if it is or was `robust`
    choose_by: str = run_option("all", CHOICE_HELP, check=parse_choice, metavar="all|competition|A,B")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the input, in pixels."""
        return parse_shape(self.image_size)

    @property
    def unit(self) -> str:
        """The unit of a sample: image or study."""
        return "image" if self.fusion is None else "study"

    @property
    def units(self) -> str:
        """The plural of `unit`."""
        return "images" if self.fusion is None else "studies"

    @property
    def columns(self) -> list[int]:
        """The columns of the labels that this run learns."""
        return [LABELS.index(label) for label in self.labels]

    @property
    def three_class(self) -> list[int]:
        """The columns of the labels with uncertain as a third class."""
        policy = parse_uncertain_policy(self.uncertain)
        return [column for column, label in enumerate(LABELS) if policy[label] == "multiclass"]

    @property
    def outputs(self) -> list[str]:
        """Names of the network's logits: all labels, then `uncertain` of each label with three classes."""
        return [*LABELS, *(f"{LABELS[column]}: uncertain" for column in self.three_class)]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Inputs of a command besides a run's configuration."""

    shards: tuple[str, ...] = data_option((), SHARDS_HELP, shown="shards; to use a run, its own")
    cache: Path = data_option(Path(".cache"), "Cache folder of shards from URLs, shared by all runs.")
    cache_size: int = data_option(
        parse_size("20GB"), "Evict the least recently used shards above this size.", parse=parse_size, shown="20GB"
    )
    shared_images: bool = data_option(False, "Allow images the weights were trained on.")
    workers: int = run_option(share_of_cores, "Decoding threads.", low=1, shown="cores")
    init: Path | None = network_option(None, INIT_HELP, parse=parse_initial, metavar="FILE")
    teacher: Path | None = label_option(None, "With policy selftrained: learn from this run's scores.", metavar="RUN")
    check: bool = run_option(False, "Only check the options, which needs no shards.")
    strict: bool = label_option(False, "Refuse labels with one class in train instead of warning.")
    wandb: str | None = run_option(None, "Send the logs to Weights & Biases too.", metavar="PROJECT")
    mlflow: str | None = run_option(None, "Send the logs to MLflow too.", metavar="EXPERIMENT")

    def open(self) -> "Shards":
        """The collection of all these shards. Raises DataError."""
        from pipeline.stream.dataset import Shards

        return Shards(self.shards or SHARDS, self.cache, self.cache_size)

    def checked(self, *runs: Path) -> Self:
        """With the shards that the first run last trained on, unless others are given; `shards` if unknown.

        Raises DataError for a folder without shards or without a run, before torch is imported.
        """
        shards = self.shards or (list_shards(runs[0]) if runs else ()) or SHARDS
        for folder in shards:
            if "://" not in folder:
                read_manifest(Path(folder))
        check_runs(runs)
        return replace(self, shards=shards)


READ = ("shards", "cache", "cache_size")
SCORED_BY = (*READ, "shared_images", "workers")  # options of commands that score shards
TRAINED_BY = [name for name in list_options(Setup) if name not in ("shared_images", "check")]  # of commands that train


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """How a split is scored, and how the scores are evaluated."""

    split: str = option("valid", "Split to score; --shards may differ from the training shards.")
    against: tuple[Path, ...] = option((), "Compare with this run; repeatable for a run on studies.", metavar="RUN")
    sensitivity: float = option(0.9, "Sensitivity that the third threshold must reach on dev.", low=0, high=1)
    study: str = option("max", "How a study's score is computed from its views.", choices=("max", "mean"))
    where: tuple[str, ...] = option((), "Conditions, in place of the run's: sex=Male.", metavar="CONDITION")
    views: str | None = option(None, "Score these views.", choices=VIEWS, shown="the run's")
    readers: tuple[Path, ...] = option((), "Add this reader as a point to the ROC curves; repeatable.", metavar="CSV")
    sanity: bool = option(False, "Also run occlusion and patch-shuffle checks.")
    out: Path | None = option(None, "Folder of an ensemble's results.", shown="the runs' names, beside the first")

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions that replace the run's."""
        return (*self.where, *([] if self.views is None else [f"{self.views} views"]))


def list_shards(folder: Path) -> tuple[str, ...]:
    """The shards that a run, or an ensemble's first member, last trained on; none if unknown."""
    folder = read_members(folder)[0]
    try:
        lines = (folder / "environment.jsonl").read_text().splitlines()
        paths = tuple(map(str, json.loads(lines[-1])["shards"]))
    except (OSError, ValueError, LookupError, TypeError):
        return ()
    return tuple(path if "://" in path else os.path.relpath(folder / path) for path in paths)


def check_runs(runs: Sequence[Path]) -> None:
    """Raise DataError for a folder without a run or ensemble, before torch is imported."""
    for folder in runs:
        for member in read_members(folder):
            read_config(member)


def read_members(folder: Path) -> list[Path]:
    """The members of an ensemble, or a single run. Raises DataError if weights changed since they were evaluated."""
    if not (folder / ENSEMBLE).exists():
        return [folder]
    members = read_object(folder / ENSEMBLE).get("members")
    if not isinstance(members, dict) or not members:
        raise DataError(f"{folder / ENSEMBLE}: damaged: it names no members")
    runs = [Path(os.path.normpath(folder / name)) for name in members]
    for member, best in zip(runs, members.values(), strict=True):
        if hash_file(member / "best.pt") != best:
            command = f"python -m train evaluate {' '.join(f'--run {path}' for path in runs)} --out {folder}"
            raise DataError(f"{member}: trained on since {folder} was evaluated; first run: {command}")
    return runs


def can_divide(batch_size: int, accumulate: int, ranks: "Ranks") -> bool:
    """Whether each rank's share of a batch divides into this many equal parts, of at least 2 images."""
    parts = accumulate * ranks.count
    return batch_size % parts == 0 and batch_size // parts >= 2


def describe_step(config: Config, ranks: "Ranks") -> tuple[str, str]:
    """For a step that runs out of memory: what it was doing, and how to use less memory."""
    size, batch = config.image_size, config.batch_size
    doing = f"in a step with `batch_size` {batch} `accumulate` {config.accumulate} `image_size` {size}"
    powers = (2**exponent for exponent in range(batch.bit_length()))
    parts = [count for count in powers if count > config.accumulate and can_divide(batch, count, ranks)]
    if not parts or config.loss == "aucm":  # which needs the whole batch
        return doing, "choose a smaller `batch_size` or `image_size`"
    return doing, f"`accumulate` {parts[0]} computes the same batch in {parts[0]} parts"


AUCM = "`loss` aucm compares a whole batch's classes: no `accumulate`, `balance`, `pos_weight` or policy multiclass"
CONFLICTS = (  # two settings that do not go together
    *(("loss", other, AUCM) for other in ("accumulate", "balance", "pos_weight", "uncertain")),
    ("mix", "balance", "`mix` does not go with `balance`: both decide how often an image is sampled"),
    ("balance", "pos_weight", "`balance` does not go with `pos_weight`: each corrects alone"),
    ("freeze", "layer_decay", "`layer_decay` is for the blocks that `freeze` keeps as they are: choose one of them"),
    ("pretrained", "init", "`pretrained` or `init`, not both"),
)
NEEDS = {"balance_over": ["balance"], "init_labels": ["init"], "freeze": ["init", "pretrained"]}  # one of these


def check_conflicts(config: Config) -> None:
    """Raise SettingError for settings that contradict each other, whatever the shards."""
    active = vars(config) | {"loss": config.loss == "aucm", "accumulate": config.accumulate > 1}
    active |= {"uncertain": config.uncertain and config.three_class, "layer_decay": config.layer_decay < 1}
    for name, other, text in CONFLICTS:
        if active[name] and active[other]:
            raise SettingError(text)
    for name, others in NEEDS.items():
        if active[name] and not any(active[other] for other in others):
            raise SettingError(f"`{name}` needs {' or '.join(f'`{other}`' for other in others)}")


def check_options(config: Config, setup: Setup) -> None:
    """Check options before there are shards. Raises SettingError."""
    pretrained = setup.init is None if config.pretrained is None else config.pretrained
    check_conflicts(replace(config, init=str(setup.init) if setup.init else None, pretrained=pretrained))


def check_config(config: Config, ranks: "Ranks") -> None:
    """Raise SettingError for values that are invalid, contradict each other, or do not work with these ranks."""
    import torch  # here, because it takes seconds

    check_values(config)
    check_conflicts(config)
    if unlearned := [label for label in parse_choice(config.choose_by) if label not in config.labels]:
        raise SettingError(f"`choose_by` {config.choose_by}: {', '.join(unlearned)} not among `labels`")
    if not can_divide(config.batch_size, config.accumulate, ranks):
        each = f" on each of {ranks.count} ranks" if ranks.count > 1 else ""
        batch = f"`batch_size` {config.batch_size} for `accumulate` {config.accumulate}{each}"
        raise SettingError(f"{batch}: the parts must be equal, of 2 images or more")
    if config.sync_bn and not (ranks.joined and torch.cuda.is_available()):
        raise SettingError("`sync_bn` is for training by torchrun on GPUs")
    own = own_input(config.arch)
    if own is not None and own.fixed and config.image_size != own.size:
        from model.networks import check_shape  # here, because torch takes seconds

        check_shape(config.arch, config.shape)


def open_start(config: Config, init: Path | None) -> "Start | None":
    """The weights to start from."""
    if init is None:
        return None
    from model.checkpoint import read_start

    return read_start(init, config.init_labels)


def resolve_config(config: Config, shards: "Shards", teacher: Path | None, start: "Start | None") -> Config:
    """The configuration with its open settings filled in: see `run.open_run`, which raises the same errors."""
    manifest = shards.manifest
    if config.mix and len(config.mix) != len(shards.folders):
        raise SettingError(f"`mix` has {len(config.mix)} shares for {len(shards.folders)} folders of `shards`")
    uncertain = choose_policy("uncertain", config.uncertain, manifest.policies)
    if teacher is not None and "selftrained" not in parse_uncertain_policy(uncertain).values():
        raise SettingError(f"`teacher` is for the policy selftrained; `uncertain` is {uncertain}")
    if config.dev is not None and "dev" in manifest.splits:
        images = manifest.splits["dev"].samples
        raise SettingError(f"`dev` is for shards without a dev split; {shards} have one, of {images:,} images")
    known = [label for label in LABELS if label in config.labels]
    annotated = tuple(label for label in known if label not in manifest.not_annotated)  # others learn no score
    if known and not annotated:
        raise SettingError(f"`labels`: nobody annotated {', '.join(known)} in {shards}; choose others")
    arch = config.arch or (start.arch if start else "") or ARCH
    own = own_input(arch)
    return replace(
        config,
        arch=arch,
        uncertain=uncertain,
        blank=check_blank_policy(choose_policy("blank", config.blank, manifest.policies)),
        manifest=shards.digest,
        pretrained=start is None and names.has_weights(arch) if config.pretrained is None else config.pretrained,
        teacher=teacher_digest(teacher, shards) if teacher else None,
        init=start.digest if start else None,
        init_terms=start.terms if start else "",
        labels=annotated or config.labels,
        dev=config.dev or (None if "dev" in manifest.splits else HELD_OUT),
        image_size=config.image_size or (start.size if start else "") or (own.size if own else IMAGE_SIZE),
        input_scale=(start.scale if start else ()) or ((own.mean, own.std) if own else ()),
        equalize=AUGMENTATIONS[config.augment].robust or (start is not None and start.equalize),
    )


def teacher_digest(teacher: Path, shards: "Shards") -> str:
    """sha256 of a run's scores of train. If missing, raises DataError with the command that writes them."""
    try:
        return hashlib.sha256(read_bytes(teacher / TEACHER_SCORES)).hexdigest()
    except FileNotFoundError:
        options = " ".join([*(f"--shards {folder.name}" for folder in shards.folders), f"--run {teacher}"])
        missing, command = "best.pt", f"python -m train {options} --uncertain ignore"
        if any((teacher / file).exists() for file in ("best.pt", ENSEMBLE)):
            missing, command = TEACHER_SCORES, f"python -m train evaluate {options} --split train"
        raise DataError(f"{teacher}: no {missing}; first run: {command}") from None


def is_reported(folder: Path) -> bool:
    """Whether the folder has all files of a finished run; the model card is written last."""
    files = ("last.pt", "calibration.json", "evaluation-dev.json", "scores-dev.arrow", "report.html")
    return all((folder / name).exists() for name in (*files, "model-card.md"))


def is_finished(config: Config, setup: Setup, folder: Path) -> bool:
    """Whether this run is already trained and reported, in which case a message says so; needs no torch."""
    if not is_reported(folder):
        return False
    start = open_start(config, setup.init)
    if resolve_config(config, setup.open(), setup.teacher, start) != read_config(folder):
        return False  # `begin_run` reports the difference
    say_finished(folder, json.loads(read_bytes(folder / "metrics.jsonl").splitlines()[-1])["step"])
    return True


def say_finished(folder: Path, steps: int) -> None:
    """Report that nothing is left to train."""
    further = f"raise `epochs`, or start another `run` with `init` {folder}"
    say(f"{folder}: finished, after step {steps:,}; to train further, {further}")


def read_config(folder: Path) -> Config:
    """The configuration of a run. Raises DataError if it is missing or invalid."""
    path = folder / "config.json"
    try:
        values = json.loads(read_bytes(path))
        # Every setting: a default may not be what the run used.
        settings = {item.name: values.pop(item.name) for item in fields(Config)}
        tuples: dict[str, object] = {name: tuple(v) for name, v in settings.items() if isinstance(v, list)}
        config = Config(**settings | tuples | values)
        check_values(config)
        return config
    except FileNotFoundError:
        raise DataError(f"{folder}: no config.json, so not a run folder") from None
    except (AttributeError, LookupError, TypeError, ValueError, DataError) as error:
        raise DataError(f"{path}: damaged, or of another version: {str(error)[:200]}") from error

"""The Makefile: what a user types reaches the commands."""

import os
import subprocess
from pathlib import Path

import pytest

import train

REPOSITORY = Path(train.__file__).parent


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Without the variables of the `make test` this test itself runs under.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")
    }
    # An environment that is older than the lock is not installed anew amid a test.
    command = ["make", "--no-print-directory", "-o", ".venv/installed", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_make_alone_lists_every_target() -> None:
    listed = [line.split()[0] for line in make().stdout.splitlines() if line.startswith("  ")]
    phony = (REPOSITORY / "Makefile").read_text().split(".PHONY:")[1].splitlines()[0].split()
    assert listed == phony


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "LR=3e-3", "WD=1e-3"], "--lr 3e-3 --weight-decay 1e-3"),
        (["train", "LR=3e-3", "WD=1e-3"], '--run "runs/sample-lr3e-3-wd1e-3"'),
        (["train", "UNCERTAIN=ones"], "--uncertain ones"),
        (["train", "UNCERTAIN=ones"], '--run "runs/sample-ones"'),
        (["train", "UNCERTAIN=selftrained", "TEACHER=runs/t"], "--uncertain selftrained --teacher runs/t"),
        (["train", "OUT=there", "DATA=here"], "--arch resnet50 --lr 1e-4 --weight-decay 1e-2"),
        (
            ["shards", "DATA=here", "OUT=there"],
            'pipeline shards "here" there --size 320 --views frontal --dev 0.05',
        ),
        (
            ["evaluate", "OUT=there", "RUN=r", "SPLIT=dev"],
            'train.py evaluate --shards there --run "r" --split dev',
        ),
        (
            ["predict", "RUN=r", "IMAGES=films", "ARGS=--strict"],
            'train.py predict --run "r" --out "r/predictions.csv" --strict films',
        ),
        (
            ["cross", "SHARDS=a b", "CROSS=c", "ARGS=--augment crop"],
            'train.py cross --shards a --shards b --out "c" --arch',
        ),
        (["cross", "SHARDS=a b", "ARGS=--augment crop"], "--augment crop"),
        (["evaluate", "OUT=there", "RUN=r", "WORKERS=3"], " --split valid --workers 3"),
        (["train", "FUSION=mean", "ARGS=--init runs/all"], '--run "runs/sample-mean" '),
        (["train", "BATCH=16", "EPOCHS=2", "VIEWS=lateral"], "runs/sample-batch16-epochs2-lateral"),
        (["train", "VIEWS=lateral"], " --views lateral"),
        (["train", "RUN=my run"], '--run "my run" --arch'),
        (["train", "OUT=there"], '--run "runs/resnet50-there-320-lr1e-4-wd1e-2-seed0" --arch resnet50 --lr'),
        (["train", "OUT=", "DATA="], '--run "runs/sample" --arch rescnn'),
        (["train", "OUT=there"], "--image-size 320 --pretrained --seed 0"),
        (["train", "OUT=there", "PRETRAINED=no"], "--image-size 320 --seed 0"),
        (["train", "OUT=there", "PRETRAINED=no"], "wd1e-2-pretrained-no-seed0"),
        (["train", "OUT=there", "ARCH=rescnn"], "--image-size 320 --seed 0"),
        (["train", "OUT=there", "ARGS=--init runs/all"], "--image-size 320 --seed 0 --init runs/all"),
        (["train", "OUT=", "DATA="], "--image-size 128 --seed 0"),
        (["train", "OUT=", "DATA=", "ARCH=resnet18", "PRETRAINED=yes"], "--image-size 128 --pretrained "),
        (["train", "OUT=there", "ARCH=timm/resnet10t"], "--epochs 5 --pretrained --seed 0"),
        (["train", "OUT=there", "ARCH=timm/resnet10t"], '--run "runs/timm-resnet10t-there-lr1e-4'),
        (["train", "OUT=there", "ARCH=timm/resnet10t", "SIZE=224"], "--image-size 224 --pretrained"),
        (["sweep", "OUT=there", "ARCH=resnet18 resnet34"], "--image-size 320 --pretrained --seed 0"),
        (["cross", "SHARDS=a b", "OUT=there"], "--image-size 320 --pretrained --seed 0"),
        (["sweep", "FUSION=mean", "VIEWS=all"], " --views all --fusion mean"),
        (["train", "UNCERTAIN=ones zeros"], "train.py sweep --shards"),
        (["train", "UNCERTAIN=ones zeros"], '--uncertain "ones zeros"'),
        (["shards", "DATA=my data", "BLANK=ignore", "ARGS=--strict"], 'shards "my data" shards --size 320'),
        (["shards", "DATA=my data", "BLANK=ignore", "ARGS=--strict"], "--dev 0.05 --blank ignore --strict"),
        (["train", "FUSION=mean", "ARGS=--init runs/all"], " --fusion mean --init runs/all"),
        (
            ["train", "GPUS=8"],
            "--nproc-per-node 8 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 -- train.py --shards",
        ),
        (
            ["sweep", "OUT=there", "LR=1e-4 1e-3", "WD=1e-5 1e-4", "BATCH=32 64", "UNCERTAIN=ones zeros"],
            '--lr "1e-4 1e-3" --weight-decay "1e-5 1e-4" --batch-size "32 64" --uncertain "ones zeros"',
        ),
        (["sweep", "SAMPLER=tpe", "TRIALS=40", "PRUNER=median"], "--sampler tpe --pruner median --trials 40"),
        (["train", "OUT=shards/other", "DATA=here", "LR=1e-4 1e-3"], "train.py sweep --shards shards/other"),
        (["train", "ARGS=--eval-every 9 --patience 2"], " --eval-every 9 --patience 2"),
        (["shards", "DATA=~/my data", "OUT=~/there"], f'shards "{Path.home()}/my data" {Path.home()}/there'),
        (["evaluate", "OUT=there", "RUN=~/runs/a"], f'--run "{Path.home()}/runs/a"'),
    ],
)
def test_settings_reach_the_commands(arguments: list[str], expected: str) -> None:
    dry = make("-n", *arguments)
    assert dry.returncode == 0
    assert expected in " ".join(dry.stdout.replace("\\\n", " ").split())


def test_policies_are_the_shards_own_unless_set_by_hand() -> None:
    assert "train.py" in make("-n", "train").stdout
    assert "--uncertain" not in make("-n", "train", "OUT=there", "DATA=here").stdout.split("train.py")[1]


def test_data_is_looked_at_again_where_there_are_shards(tmp_path: Path) -> None:
    """By `pipeline shards`, which refuses those of other data, and leaves finished ones alone."""
    (tmp_path / "manifest.json").touch()
    assert "pipeline shards" not in make("-n", "train", f"OUT={tmp_path}").stdout
    assert f'pipeline shards "here" {tmp_path} ' in make("-n", "train", f"OUT={tmp_path}", "DATA=here").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cross", "SHARDS=a"], 'make cross needs SHARDS="A B": two folders of shards or more'),
        (["train", "OUT=my shards"], "OUT=my shards: make takes no spaces there.  Stop."),
        (["sweep", "GPUS=2"], "A sweep trains each trial on one device: leave GPUS out."),
    ],
)
def test_what_make_cannot_do_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "manifest.json").touch()
    failed = make(*arguments) if "OUT=my shards" in arguments else make(*arguments, f"OUT={tmp_path}")
    assert failed.returncode == 2
    assert message in failed.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr=1e-3", "lr is no setting; there are DATA OUT SIZE"),
        ("BIN=/usr/bin", "BIN is no setting; there are DATA OUT SIZE VIEWS UNCERTAIN BLANK DEV WORKERS"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused(setting: str, message: str) -> None:
    refused = make("-n", "train", "LR=1e-3", setting)
    assert refused.returncode == 2
    assert message in refused.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("shards", "make shards needs DATA=<CheXpert folder>"),
        ("predict", "make predict needs IMAGES=<files or folders>"),
        ("train", "No shards in {out}. Write them with: make shards DATA=<CheXpert folder> OUT={out}"),
    ],
)
def test_missing_data_is_a_usage_error(tmp_path: Path, target: str, message: str) -> None:
    failed = make(target, f"OUT={tmp_path}")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[0] == message.format(out=tmp_path)

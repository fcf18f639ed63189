"""The Makefile: what a user types reaches the commands."""

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import start


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # An environment that is older than the lock is not installed anew amid a test.
    return start("make", "--no-print-directory", "-o", ".venv/installed", *arguments)


# What is typed after `make`, and what a line that make runs then contains, up to its end where there is a `;`.
CALLS = """
train LR=3e-3 WD=1e-3 > --run runs/sample-lr3e-3-wd1e-3 --arch rescnn --lr 3e-3 --weight-decay 1e-3
train UNCERTAIN=ones > --run runs/sample-ones --arch
train UNCERTAIN=selftrained TEACHER=runs/t > --uncertain selftrained --teacher runs/t
train OUT= DATA= > --run runs/sample --arch rescnn --lr 2e-3 --batch-size 32 --epochs 12 --image-size 128 ;
train OUT= DATA= ARCH=resnet18 PRETRAINED=yes > --image-size 128 --pretrained ;
train OUT=there > train.py --shards there --run runs/resnet50-there --arch resnet50 --pretrained ;
train OUT=there DATA=here > pipeline shards here there ;
train OUT=there PRETRAINED=no > --run runs/resnet50-there-pretrained-no --arch resnet50 ;
train OUT=there ARCH=rescnn > --arch rescnn ;
train OUT=there "ARGS=--init runs/all" > --arch resnet50 --init runs/all ;
train OUT=there ARCH=timm/resnet10t > --run runs/timm-resnet10t-there --arch timm/resnet10t --pretrained ;
train OUT=there ARCH=timm/resnet10t SIZE=224 > resnet10t-there-224 --arch timm/resnet10t --image-size 224
train FUSION=mean "ARGS=--init runs/all" > --run runs/sample-mean --arch
train FUSION=mean "ARGS=--init runs/all" > --fusion mean --init runs/all ;
train BATCH=16 EPOCHS=2 VIEWS=lateral > --run runs/sample-batch16-epochs2-lateral --arch
train BATCH=16 EPOCHS=2 VIEWS=lateral > --batch-size 16 --epochs 2 --image-size 128 --views lateral ;
train "RUN=my run" > --run my run --arch
train GPUS=8 > --nproc-per-node 8 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 -- train.py --shards
train "ARGS=--eval-every 9 --patience 2" > --eval-every 9 --patience 2 ;
train "UNCERTAIN=ones zeros" > train.py sweep --shards shards/sample --sweep runs/sample-sweep --arch
train "UNCERTAIN=ones zeros" > --uncertain ones zeros ;
train OUT=shards/other DATA=here "LR=1e-4 1e-3" > train.py sweep --shards shards/other
sweep OUT=there "ARCH=resnet18 resnet34" > --arch resnet18 resnet34 --pretrained ;
sweep OUT=there "LR=1e-4 1e-3" "BATCH=32 64" > --lr 1e-4 1e-3 --batch-size 32 64 --pretrained ;
sweep SAMPLER=tpe TRIALS=40 PRUNER=median > --sampler tpe --trials 40 --pruner median --arch
cross "SHARDS=a b" CROSS=c OUT=there > cross --shards a --shards b --out c --arch resnet50 --pretrained ;
shards DATA=here OUT=there > pipeline shards here there ;
shards "DATA=my data" BLANK=ignore ARGS=--strict > pipeline shards my data shards --blank ignore --strict ;
shards "DATA=~/my data" OUT=~/there > shards {home}/my data {home}/there ;
evaluate OUT=there RUN=r SPLIT=dev > train.py evaluate --shards there --run r --split dev ;
evaluate OUT=there RUN=~/runs/a WORKERS=3 > --run {home}/runs/a --split valid --workers 3 ;
audit OUT=there "ARGS=--where sex=Female" > pipeline audit there --where sex=Female ;
export RUN=r > train.py export --run r --out r/model.onnx ;
predict RUN=r IMAGES=films ARGS=--strict > train.py predict --run r --out r/predictions.csv --strict films ;
bench-etl > -m benchmarks.etl --peers .venv-peers/bin/python ;
"""


@pytest.mark.parametrize("call", CALLS.strip().splitlines())
def test_settings_reach_the_commands(call: str) -> None:
    typed, _, expected = call.format(home=Path.home()).partition(" > ")
    dry = make("-n", *shlex.split(typed))
    assert dry.returncode == 0
    lines = dry.stdout.replace("\\\n", " ").splitlines()
    assert expected in " ".join(f"{' '.join(shlex.split(line))} ;" for line in lines)


def test_policies_are_the_shards_own_unless_set_by_hand() -> None:
    assert "train.py" in make("-n", "train").stdout
    assert "--uncertain" not in make("-n", "train", "OUT=there", "DATA=here").stdout.split("train.py")[1]


def test_data_is_looked_at_again_where_there_are_shards(tmp_path: Path) -> None:
    """By `pipeline shards`, which refuses those of other data, and leaves finished ones alone."""
    (tmp_path / "manifest.json").touch()
    assert "pipeline shards" not in make("-n", "train", f"OUT={tmp_path}").stdout
    assert f'pipeline shards "here" {tmp_path} ' in make("-n", "train", f"OUT={tmp_path}", "DATA=here").stdout


def test_make_alone_lists_targets() -> None:
    listed = [line.split()[0] for line in make().stdout.splitlines() if line.startswith("  ")]
    assert listed[:3] == ["help", "setup", "shards"]
    assert listed[-1] == "clean"

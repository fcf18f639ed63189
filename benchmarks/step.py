"""What reading, copying and augmenting cost a training step: images/s beside the bare network's.

    .venv/bin/python -m benchmarks.step --shards shards/nih --arch resnet18
    make bench-gpu OUT=shards/nih                       resnet50 at 320 pixels, in bf16 and fp16, compiled and not

Three contestants take turns in one process, each for so many steps: `training` are the trainer's own steps on
the stream; `resident` the same on batches that lie decoded in memory; `bare` is forward, loss, backward, clipping
and update on float batches on the device, with nothing else. Ratios are medians of the rounds' own.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from torch import nn

import train
from model.augment import normalize
from model.predict import to_device
from model.runs.config import Config, Setup
from model.runs.run import open_run, open_training
from pipeline.stream.batches import Batch

KEPT = 4  # batches that lie in memory


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@click.command()
@click.option("--shards", required=True)
@click.option("--arch", default="resnet18", show_default=True)
@click.option("--size", default="224", show_default=True, help="As --image-size.")
@click.option("--batch", default=32, show_default=True)
@click.option("--steps", default=10, show_default=True, help="Of a turn.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--amp", default="auto", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Compile the network with torch.compile.")
def main(shards: str, arch: str, size: str, batch: int, steps: int, rounds: int, amp: str, compiled: bool) -> None:
    """Print images/s of the three, and their ratios."""
    config = Config(arch=arch, image_size=size, batch_size=batch, amp=amp, compile=compiled, pretrained=False)
    run = open_run(config, Setup(shards=(shards,)), Path("unused"))
    data = open_training(run)
    state = train.start_state(run, data)
    state.network.train()

    def stream() -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from train.stream_epoch(run, data, epoch)

    batches = stream()
    resident = itertools.cycle([next(batches) for _ in range(KEPT)])
    pixels = run.manifest.pixels
    tensors = [
        [to_device(array, run.device) for array in (kept.images, kept.target, kept.mask)]
        for kept in (next(resident) for _ in range(KEPT))
    ]
    ready = itertools.cycle(
        (normalize(images, pixels["mean"], pixels["std"]).contiguous(memory_format=torch.channels_last), target, mask)
        for images, target, mask in tensors
    )

    def bare_step() -> None:
        images, target, mask = next(ready)
        state.optimizer.zero_grad()
        with torch.autocast(run.device.type, run.precision, enabled=run.precision != torch.float32):
            logits = state.forward(images)
        state.scaler.scale(state.loss(logits, target, mask)).backward()
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.network.parameters(), train.CLIP_NORM)
        state.scaler.step(state.optimizer)
        state.scaler.update()

    def step_on(batch: Batch) -> None:
        train.train_step(run, state, batch, float(batch.mask.sum()))

    contestants: dict[str, Callable[[], object]] = {
        "bare": bare_step,
        "resident": lambda: step_on(next(resident)),
        "training": lambda: step_on(next(batches)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):  # the first warms up
        for name, step in contestants.items():
            synchronize(run.device)
            start = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize(run.device)
            rates[name].append(steps * batch / (time.perf_counter() - start))
    device = torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU"
    precision = str(run.precision).removeprefix("torch.")
    suffix = ", compiled" if compiled else ""
    print(f"{arch} at {size} pixels, batches of {batch}, {precision} on {device}{suffix}")
    for name, of_rounds in rates.items():
        pairs = zip(rates["training"][1:], of_rounds[1:], strict=True)
        ratio = statistics.median(ours / other for ours, other in pairs)
        rate = statistics.median(of_rounds[1:])
        print(f"  {name:9} {rate:8,.1f} images/s   training is {ratio:.2f} of it")
    if run.device.type == "cuda":
        print(f"  memory    {torch.cuda.max_memory_allocated() / 2**30:8.2f} GiB at the peak")


if __name__ == "__main__":
    main()

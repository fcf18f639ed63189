"""A rank of test_ranks.py: some steps of training with frozen BatchNorm, and what it saw of them.

    torchrun … tests/ranks_worker.py OUT STEPS <options of train.py>

Writes OUT/<rank>.npz: the rows of each step's slice, the loss of the whole batch, the first gradients, and the final
weights.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import train
from model.networks import build_network
from model.runs import commands, predictor
from model.runs.run import Run, open_training

GRADIENTS = 3  # steps whose gradients are kept


def build_frozen(*arguments: object) -> nn.Module:
    """The network with BatchNorm's statistics as they are at the start, which are the same for any slice.

    In double precision: the rounding of single precision, which depends on a slice's size, Adam magnifies to the
    whole learning rate where a gradient is nearly zero.
    """
    network = build_network(*arguments)  # type: ignore[arg-type]
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, FrozenBatchNorm2d(child.num_features))
    network.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return network.double()


def run_steps(run: Run) -> None:
    """Train for STEPS steps, the first of as many epochs."""
    data = open_training(run)
    state = train.start_state(run, data)
    state.loss.double()
    rows, losses, gradients = [], [], []
    while state.done < int(sys.argv[2]):
        batch = next(iter(train.stream_epoch(run, data, state.done)))
        (cells,) = run.ranks.agree(batch.mask.sum())
        loss, _ = train.train_step(run, state, batch, cells)
        state.done += 1
        rows.append(batch.step.rows[:, 0])
        losses.append(run.ranks.sum(np.array([loss.item()]))[0])
        if state.done <= GRADIENTS:
            own = [parameter.grad for parameter in state.network.parameters() if parameter.grad is not None]
            gradients.append(torch.cat([gradient.flatten() for gradient in own]).numpy())
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    weights = torch.cat([parameter.detach().flatten() for parameter in state.network.parameters()])
    np.savez(out / f"{run.ranks.rank}.npz", rows=rows, losses=losses, gradients=gradients, weights=weights)


with patch.object(predictor, "build_network", build_frozen), patch.object(commands, "print_run"):
    code = commands.main.main(["train", *sys.argv[3:]], standalone_mode=False, obj=run_steps)
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
# One that is still giving back a tensor when Python exits would abort the process.
sys.exit(code or ("a thread of gloo is left" if {"pt_gloo_runloop", "gloo_tcp_loop"} & set(threads) else 0))

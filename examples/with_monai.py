"""MONAI's SupervisedTrainer: train to step STEPS, save everything in FOLDER, and continue from what is there.

python examples/with_monai.py SHARDS FOLDER STEPS
"""

import sys
from pathlib import Path

import torch
from monai.engines import SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver

from model.losses import masked_loss
from model.networks import build_network
from pipeline import BatchDataset, open_shards


def prepare(batch, device, *_, **__):
    return batch.images.to(device) / 255, (batch.target.to(device), batch.mask.to(device))


def loss(logits, truth):
    value = masked_loss(logits, *truth)
    print(f"step {trainer.state.iteration - 1}: loss {value.item()}")
    return value


shards, folder, steps = open_shards(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
net = build_network("rescnn", outputs=14)
opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
batches = BatchDataset(shards["train"].batches(batch_size=4, size=64, epoch=0))
trainer = SupervisedTrainer("cpu", steps, batches, net, opt, loss, epoch_length=1, prepare_batch=prepare)
parts = {"net": net, "opt": opt, "batches": batches, "trainer": trainer}
CheckpointSaver(folder, parts, save_final=True, final_filename="state.pt").attach(trainer)
if (folder / "state.pt").exists():
    CheckpointLoader(folder / "state.pt", parts).attach(trainer)
trainer.run()

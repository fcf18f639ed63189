"""Hugging Face Accelerate: train to step STEPS, save everything in FOLDER every 5 steps, continue from what is there.

accelerate launch examples/with_accelerate.py SHARDS FOLDER STEPS
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from model.losses import masked_loss
from model.networks import build_network
from pipeline import BatchDataset, open_shards

shards, folder, steps = open_shards(sys.argv[1]), Path(sys.argv[2]) / "state", int(sys.argv[3])
accelerator = Accelerator()
device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
torch.manual_seed(0)
network = build_network("rescnn", outputs=14)
network, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
stream = shards["train"].batches(batch_size=4, size=64, epoch=0, rank=rank, ranks=ranks)
accelerator.register_for_checkpointing(stream)
if folder.exists():
    accelerator.load_state(folder)

for step, batch in zip(range(stream.step, steps), BatchDataset(stream), strict=False):
    loss = masked_loss(network(batch.images.to(device) / 255), batch.target.to(device), batch.mask.to(device))
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    accelerator.print(f"step {step}: loss {loss.item()}")
    if stream.step % 5 == 0:
        accelerator.save_state(folder)

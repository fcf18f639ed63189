"""Plain PyTorch: train to step STEPS, save everything in FOLDER every 5 steps, and continue from what is there.

python examples/plain.py SHARDS FOLDER STEPS
"""

import sys
from pathlib import Path

import torch

from model.losses import masked_loss
from model.networks import build_network
from pipeline import BatchDataset, open_shards

shards, file, steps = open_shards(sys.argv[1]), Path(sys.argv[2]) / "state.pt", int(sys.argv[3])
torch.manual_seed(0)
network = build_network("rescnn", outputs=14)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
stream = shards["train"].batches(batch_size=4, size=64, epoch=0)
parts = {"network": network, "optimizer": optimizer, "stream": stream}
file.parent.mkdir(parents=True, exist_ok=True)
if file.exists():
    for name, state in torch.load(file).items():
        parts[name].load_state_dict(state)

for step, batch in zip(range(stream.step, steps), BatchDataset(stream), strict=False):
    loss = masked_loss(network(batch.images / 255), batch.target, batch.mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item()}")
    if stream.step % 5 == 0:
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)

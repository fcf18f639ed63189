"""Lightning: train to step STEPS, save everything in FOLDER every 5 steps, and continue from what is there.

python examples/with_lightning.py SHARDS FOLDER STEPS
"""

import sys

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from model.losses import masked_loss
from model.networks import build_network
from pipeline import BatchDataset, open_shards


class Classifier(LightningModule):
    def __init__(self, films):
        super().__init__()
        self.films, self.network = films, build_network("rescnn", outputs=14)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        epoch, rank, ranks = self.current_epoch, self.global_rank, self.trainer.world_size
        return BatchDataset(self.films.batches(4, 64, epoch=epoch, rank=rank, ranks=ranks))

    def training_step(self, batch, _):
        loss = masked_loss(self.network(batch.images / 255), batch.target, batch.mask)
        self.print(f"step {self.global_step}: loss {loss.item()}")
        return loss


shards, folder, steps = open_shards(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seed_everything(0)
saving = ModelCheckpoint(folder, every_n_train_steps=5, save_last=True)
trainer = Trainer(max_steps=steps, callbacks=saving, logger=False, reload_dataloaders_every_n_epochs=1)
trainer.fit(Classifier(shards["train"]), ckpt_path="last")

"""PyTorch training without the engineering: the Trainer, LightningModule and callbacks of fulmen."""

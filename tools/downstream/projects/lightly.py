"""lightly: self-supervised pretraining, an online probe, and the benchmark modules of the library."""

from __future__ import annotations

import copy
from typing import Any

REQUIRES = ["lightly==1.6.0"]
PACKAGES = ["lightly"]
WHAT = "SimCLR with a kNN callback and an online probe, resumed; linear, finetune and kNN evaluation; embedding"
CLASSES = 4


def main() -> dict[str, object]:
    """Pretrain on coloured noise, resume the pretraining, and evaluate the features in the library's own ways."""
    import numpy as np
    import pytorch_lightning as pl
    import torch
    from lightly.embedding import SelfSupervisedEmbedding
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.models.utils import deactivate_requires_grad
    from lightly.utils.benchmarking import (
        BenchmarkModule,
        KNNClassifier,
        LinearClassifier,
        MetricCallback,
        OnlineLinearClassifier,
    )
    from lightly.utils.benchmarking.linear_classifier import FinetuneClassifier
    from lightly.utils.lars import LARS
    from lightly.utils.scheduler import CosineWarmupScheduler
    from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    pl.seed_everything(1)
    middles = torch.randn(CLASSES, 3, 8, 8)

    class Images(Dataset):
        """Noise around one picture for each class; two views of it, or one."""

        def __init__(self, number: int, seed: int, views: bool = False, names: bool = True) -> None:
            generator = torch.Generator().manual_seed(seed)
            self.targets = torch.arange(number) % CLASSES
            self.pictures = middles[self.targets] + torch.randn(number, 3, 8, 8, generator=generator)
            self.views, self.names = views, names

        def get_filenames(self) -> list[str]:
            return [f"{index:03d}" for index in range(len(self))]

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> Any:
            picture: Any = self.pictures[index]
            if self.views:
                picture = (picture.roll(1, -1), picture.flip(-1))
            rest = (f"{index:03d}",) if self.names else ()
            return (picture, int(self.targets[index]), *rest)

    class SimCLR(BenchmarkModule):
        def __init__(self, loader: Any, width: int = 8) -> None:
            super().__init__(loader, CLASSES, knn_k=5)
            self.save_hyperparameters(ignore="loader")
            self.backbone = nn.Sequential(
                nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
            )
            self.projection_head = SimCLRProjectionHead(4 * width, 16, 8)
            self.criterion = NTXentLoss()
            self.probe = OnlineLinearClassifier(4 * width, CLASSES, topk=(1, 2))

        def forward(self, *views: Any) -> Any:
            outputs = [self.projection_head(self.backbone(view)) for view in views]
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (first, second), targets, _ = batch
            loss = self.criterion(*self(first, second))
            self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(targets))
            probe_loss, logged = self.probe.training_step((self.backbone(first), targets), batch_idx)
            self.log_dict(logged, sync_dist=True, batch_size=len(targets))
            return loss + probe_loss

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            super().validation_step(batch, batch_idx)
            probe_loss, logged = self.probe.validation_step((self.backbone(batch[0]), batch[1]), batch_idx)
            self.log_dict(logged, prog_bar=True, sync_dist=True, batch_size=len(batch[1]))
            return probe_loss

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.backbone(batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = LARS(self.parameters(), lr=0.2, momentum=0.9)
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=2, max_epochs=steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")

    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    train, bank = Images(40, 1, views=True), Images(40, 1)
    held_out = DataLoader(Images(20, 2), batch_size=8)
    # Neither shuffled nor augmented at random: a resumed fulmen goes on in the sequence of random numbers.
    loader = DataLoader(train, batch_size=8)
    shuffled = DataLoader(train, batch_size=8, shuffle=True, drop_last=True)
    bank_loader = DataLoader(bank, batch_size=8)

    def pretraining(epochs: int) -> tuple[Any, MetricCallback, ModelCheckpoint]:
        metrics = MetricCallback()
        saved = ModelCheckpoint("pretrained", monitor="kNN_accuracy", mode="max", save_top_k=2, save_last=True)
        stopping = EarlyStopping("val_online_cls_loss", patience=20)
        callbacks = [metrics, saved, stopping, LearningRateMonitor()]
        logger = CSVLogger("logs", name="simclr", flush_logs_every_n_steps=1)
        trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, logger=logger, log_every_n_steps=2, **quiet)
        return trainer, metrics, saved

    found: dict[str, object] = {}
    model = SimCLR(bank_loader)
    trainer, metrics, saved = pretraining(3)
    trainer.fit(model, loader, held_out)
    found["train metrics"] = metrics.train_metrics
    found["validation metrics"] = metrics.val_metrics
    found["logged"] = {name: float(value) for name, value in trainer.logged_metrics.items()}
    found["best"] = [float(saved.best_model_score), float(model.max_accuracy), trainer.global_step]
    found["best files"] = sorted(path.rpartition("/")[2] for path in saved.best_k_models)
    found["weights"] = [float(weight.double().sum()) for weight in model.parameters()]

    resumed = SimCLR(bank_loader)
    trainer, metrics, saved = pretraining(5)
    trainer.fit(resumed, loader, held_out, ckpt_path="pretrained/last.ckpt")
    found["resumed"] = metrics.train_metrics
    found["resumed weights"] = [float(weight.double().sum()) for weight in resumed.parameters()]
    loaded = SimCLR.load_from_checkpoint(saved.best_model_path, loader=bank_loader)
    features = torch.cat(trainer.predict(loaded, held_out))
    found["features"] = features[:4].tolist()

    pl.seed_everything(2)
    plain, held_plain = (
        DataLoader(Images(n, s, names=False), batch_size=8, shuffle=n == 40) for n, s in ((40, 1), (20, 2))
    )
    knn = KNNClassifier(loaded.backbone, CLASSES, 5, 0.1, 0, 1, topk=(1, 2))
    trainer = pl.Trainer(max_epochs=1, logger=False, **quiet)
    found["knn"] = [sorted(each.items()) for each in trainer.validate(knn, [plain, held_plain], verbose=False)]
    for kind in (LinearClassifier, FinetuneClassifier):
        pl.seed_everything(4)
        backbone = copy.deepcopy(loaded.backbone)
        if kind is LinearClassifier:
            deactivate_requires_grad(backbone)
        classifier = kind(backbone, 8, lr=1.0, feature_dim=32, num_classes=CLASSES, topk=(1, 2))
        metrics = MetricCallback()
        trainer = pl.Trainer(
            max_epochs=2, callbacks=[metrics, LearningRateMonitor()], logger=CSVLogger("logs"),
            log_every_n_steps=1, **quiet,
        )  # fmt: skip
        trainer.fit(classifier, plain, held_plain)
        found[kind.__name__] = [metrics.train_metrics, metrics.val_metrics]
        found[kind.__name__ + " rate"] = float(trainer.callback_metrics["lr-SGD"])
        found[kind.__name__ + " validated"] = trainer.validate(classifier, held_plain, verbose=False)

    pl.seed_everything(3)
    network = SimCLR(bank_loader)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    embedding = SelfSupervisedEmbedding(
        network, NTXentLoss(), optimizer, shuffled, torch.optim.lr_scheduler.StepLR(optimizer, 1)
    )
    trainer = embedding.train_embedding(
        {"max_epochs": 2, "logger": False, "accelerator": "cpu", "enable_progress_bar": False},
        {"save_last": True, "save_top_k": 1, "dirpath": "embedding"},
        {"max_depth": 1},
    )
    values, labels, names = embedding.embed(DataLoader(bank, batch_size=8))
    found["embedding loss"] = float(trainer.callback_metrics["loss"])
    found["embedding"] = np.asarray(values[:3], dtype=float).tolist()
    found["embedding order"] = [labels[:8], names[:8]]
    found["embedding file"] = str(embedding.checkpoint).rpartition("/")[2]
    found["embedding rate"] = optimizer.param_groups[0]["lr"]
    return found

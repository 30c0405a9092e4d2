"""anomalib: the library's Engine around a Trainer, with its callbacks, its checkpoint IO and its post-processing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REQUIRES = ["anomalib==2.7.0"]
PACKAGES = ["anomalib"]
WHAT = "Engine with GANomaly (manual optimization), PaDiM (no optimizer) and FastFlow; fit, test, predict, load"


def pictures() -> None:
    """Stripes, and stripes with a spot and where it is, as files."""
    import numpy as np
    from PIL import Image

    random, masks = np.random.default_rng(0), Path("pictures", "mask")
    masks.mkdir(parents=True, exist_ok=True)
    for kind, number in (("good", 24), ("bad", 8)):
        folder = Path("pictures", kind)
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(number):
            picture = 100 + 60 * np.sin(np.arange(32) / 2)[None, :, None] + random.normal(scale=8, size=(32, 32, 3))
            if kind == "bad":
                row, column = random.integers(4, 20, size=2)
                picture[row : row + 8, column : column + 8] = 250
                mask = np.zeros((32, 32), "uint8")
                mask[row : row + 8, column : column + 8] = 255
                Image.fromarray(mask).save(masks / f"{index:02d}.png")
            Image.fromarray(picture.clip(0, 255).astype("uint8")).save(folder / f"{index:02d}.png")


def weights(module: Any) -> list[float]:
    """A sum for each parameter."""
    return [float(weight.detach().double().sum()) for weight in module.parameters()]


def main() -> dict[str, object]:
    """Three models, each through the library's own Engine."""
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Fastflow, Ganomaly, Padim
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import EarlyStopping
    from lightning.pytorch.loggers import CSVLogger

    pictures()

    def data() -> Any:
        return Folder(
            "stripes", root="pictures", normal_dir="good", abnormal_dir="bad", mask_dir="mask", train_batch_size=4,
            eval_batch_size=4, num_workers=0, seed=1,
        )  # fmt: skip

    def made(kind: Any) -> Any:
        seed_everything(2)
        if kind is Ganomaly:
            size = Ganomaly.configure_pre_processor((32, 32))
            return Ganomaly(batch_size=4, n_features=8, latent_vec_size=8, pre_processor=size, visualizer=False)
        size = kind.configure_pre_processor((32, 32))
        return kind("resnet18", pre_trained=False, pre_processor=size, visualizer=False)

    found: dict[str, object] = {}
    for kind, epochs, monitor in ((Ganomaly, 2, "image_AUROC"), (Padim, 1, None), (Fastflow, 2, "train_loss")):
        name, model = kind.__name__, made(kind)
        # The Engine adds its own ModelCheckpoint to these.
        callbacks = [] if monitor is None else [EarlyStopping(monitor, patience=5, strict=False)]
        engine = Engine(
            max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=f"results-{name}", callbacks=callbacks,
            logger=CSVLogger("logs", name=name), enable_progress_bar=False, log_every_n_steps=1,
        )  # fmt: skip
        engine.fit(model, datamodule=data())
        metrics = {key: float(value) for key, value in engine.trainer.callback_metrics.items()}
        found[name] = {"metrics": metrics, "weights": weights(model), "steps": engine.trainer.global_step}
        found[f"{name} tested"] = engine.test(model, datamodule=data(), verbose=False)
        path = engine.trainer.checkpoint_callback.best_model_path
        found[f"{name} predicted"] = [
            [batch.pred_score.flatten().tolist(), batch.pred_label.flatten().int().tolist()]
            for batch in engine.predict(model=made(kind), datamodule=data(), ckpt_path=path) or []
        ]
        loaded = kind.load_from_checkpoint(path, pre_processor=kind.configure_pre_processor((32, 32)))
        found[f"{name} loaded"] = weights(loaded)
    return found

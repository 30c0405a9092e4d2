"""Runs whose service is killed in the middle, or is not there: started by ``test_service_loggers``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader

import fulmen
from fulmen.demos.boring_classes import RandomDataset
from fulmen.loggers import CometLogger, MLFlowLogger, WandbLogger
from fulmen.runlog import LogDelivery

__all__ = ["Server"]

STEPS = 30


class Server:
    """A real tracking server with a database of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.address = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        # It would start some ten processes for jobs that nobody gives it.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"no answer from {self.address}")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)
            self.process = None


class Net(fulmen.LightningModule):
    def __init__(self, at: dict[int, Any]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx in self.at:
            self.at[batch_idx]()
        loss = self.layer(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer_for(folder: str, logger: Any, delivery: LogDelivery) -> fulmen.Trainer:
    trainer = fulmen.Trainer(
        max_epochs=1,
        logger=logger,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.log_delivery = delivery
    return trainer


def loader() -> DataLoader[torch.Tensor]:
    return DataLoader(RandomDataset(32, STEPS), batch_size=1)


def mlflow(folder: str, port: str, comes_back: str) -> None:
    # MLflow's own patience with a server that is away would outlast the test.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
    server = Server(Path(folder), int(port))
    server.start()
    try:
        logger = MLFlowLogger("away", tracking_uri=server.address)
        patience = 60 if comes_back == "yes" else 1
        trainer = trainer_for(folder, logger, LogDelivery(finalize_timeout_s=patience, retry_s=0.2, longest_retry_s=1))
        at = {10: server.kill, **({20: server.start} if comes_back == "yes" else {})}
        trainer.fit(Net(at), loader())
        print(json.dumps({"run": logger.run_id, "steps": trainer.global_step}))
    finally:
        server.kill()


def wandb(folder: str) -> None:
    """The process beside the run, which writes its files, is killed."""
    logger = WandbLogger(project="away", offline=True, save_dir=folder)
    trainer = trainer_for(folder, logger, LogDelivery(finalize_timeout_s=5, retry_s=0.2, longest_retry_s=1))

    def kill() -> None:
        (_, box) = vars(trainer)["_reporter"].delivery._boxes[id(logger)]
        assert box.drain(120), "what was logged before has been handed over"
        [service] = [p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name()]
        service.kill()

    trainer.fit(Net({10: kill}), loader())
    print(json.dumps({"run": logger.version, "steps": trainer.global_step}), flush=True)
    os._exit(0)  # wandb's own farewell waits for the process that is gone


def wandb_down(folder: str, port: str) -> None:
    os.environ.update(WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="0" * 40, WANDB_SILENT="true")
    down(folder, WandbLogger(project="away", save_dir=folder))


def comet_down(folder: str, port: str) -> None:
    os.environ["COMET_URL_OVERRIDE"] = f"http://127.0.0.1:{port}/clientlib/"
    down(folder, CometLogger(api_key="0" * 25, project="away", online=True))


def down(folder: str, logger: Any) -> None:
    trainer = trainer_for(folder, logger, LogDelivery(finalize_timeout_s=2, retry_s=0.2, longest_retry_s=1))
    trainer.fit(Net({}), loader())
    print(json.dumps({"steps": trainer.global_step}), flush=True)
    os._exit(0)  # the library may go on asking for minutes


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    {"mlflow": mlflow, "wandb": wandb, "wandb-down": wandb_down, "comet-down": comet_down}[what](*arguments)

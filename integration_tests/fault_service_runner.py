"""A run whose tracking server is killed in the middle, and may come back: started by ``test_service_loggers``."""

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

import torch
from torch.utils.data import DataLoader

import fulmen
from fulmen.demos.boring_classes import RandomDataset
from fulmen.loggers import MLFlowLogger
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
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
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


def main(folder: str, port: str, comes_back: str) -> None:
    # MLflow's own patience with a server that is away would outlast the test.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
    server = Server(Path(folder), int(port))
    server.start()
    try:
        logger = MLFlowLogger("away", tracking_uri=server.address)
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
        trainer.log_delivery = LogDelivery(
            finalize_timeout_s=60 if comes_back == "yes" else 1, retry_s=0.2, longest_retry_s=1
        )
        at = {10: server.kill, **({20: server.start} if comes_back == "yes" else {})}
        trainer.fit(Net(at), DataLoader(RandomDataset(32, STEPS), batch_size=1))
        print(json.dumps({"run": logger.run_id, "steps": trainer.global_step}))
    finally:
        server.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])

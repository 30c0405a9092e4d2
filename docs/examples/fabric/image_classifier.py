"""Classify handwritten digits with a training loop of your own: any device, any precision, one process or many.

The data set ships inside scikit-learn; nothing is downloaded. Let a scheduler's SIGTERM or ``--minutes`` stop it, and
start it again with the same command: it goes on with the very next batch, bit for bit::

    python docs/examples/fabric/image_classifier.py --devices 2 --precision bf16-mixed
"""

import argparse
from datetime import timedelta
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from fulmen_fabric import Fabric


def datasets() -> list[TensorDataset]:
    """1,437 pictures to train on and 360 to test on, shape (1, 8, 8) in [0, 1]."""
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    everything = TensorDataset(pictures, torch.tensor(digits.target))
    return random_split(everything, [1437, 360], generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 10),
    )  # fmt: skip


def accuracy(fabric: Fabric, model: nn.Module, loader: DataLoader) -> float:
    """Share of all ranks' pictures that ``model`` recognizes."""
    model.eval()
    right = torch.zeros(2, device=fabric.device)
    with torch.inference_mode():
        for pictures, labels in loader:
            found = model(pictures).argmax(dim=1)
            right += torch.tensor([(found == labels).sum(), len(labels)], device=fabric.device)
    model.train()
    recognized, of = fabric.all_reduce(right, reduce_op="sum").tolist()
    return recognized / of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, mps or auto (default cpu)")
    parser.add_argument("--devices", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--precision", default="32-true", help="for example bf16-mixed (default 32-true)")
    parser.add_argument("--max-epochs", type=int, default=8, help="epochs to train (default 8)")
    parser.add_argument("--minutes", type=float, default=60, help="save and leave after this long (default 60)")
    parser.add_argument("--out", type=Path, default=Path("demo_output/fabric"), help="where the checkpoint goes")
    args = parser.parse_args()

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices, precision=args.precision)
    fabric.launch()
    fabric.seed_everything(1, verbose=False)
    torch.set_num_threads(1)  # so small a network is faster without threads that wait for each other

    train, test = datasets()
    with fabric.init_module():
        module = network()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=2e-3))
    train_loader = fabric.setup_dataloaders(DataLoader(train, batch_size=32, shuffle=True), prefetch=2)
    test_loader = fabric.setup_dataloaders(DataLoader(test, batch_size=120))

    run, path = fabric.run_state, args.out / "classifier.ckpt"
    state = {"model": model, "optimizer": optimizer, "run": run}
    if path.exists():
        fabric.load(path, state)
        fabric.print(f"Going on after step {run.step}.")

    def step(pictures: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pictures), labels)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        return loss.detach()

    with fabric.preemption_watch(max_time=timedelta(minutes=args.minutes)) as watch:
        while run.epoch < args.max_epochs:
            for pictures, labels in train_loader:
                loss = step(pictures, labels)
                run.step += 1
                if watch.should_stop():
                    fabric.save(path, state)
                    fabric.print(f"Saved after step {run.step}: {watch.reason}.")
                    return
            run.epoch += 1
            share = accuracy(fabric, model, test_loader)
            fabric.print(f"epoch {run.epoch}: loss {loss:.3f}, {share:.1%} of the test pictures recognized")
            fabric.save(path, state)

    fabric.print(f"Test accuracy: {accuracy(fabric, model, test_loader):.1%}")


if __name__ == "__main__":
    main()

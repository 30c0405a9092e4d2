"""Five-fold cross-validation in a loop of your own: a new model, optimizer and pair of loaders for each fold.

The data set ships inside scikit-learn. A run that was stopped goes on in the fold, and at the batch, where it was::

    python docs/examples/fabric/kfold.py
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from fulmen_fabric import Fabric


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


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
    parser.add_argument("--folds", type=int, default=5, help="parts of the data (default 5)")
    parser.add_argument("--max-epochs", type=int, default=12, help="epochs in each fold (default 12)")
    parser.add_argument("--max-steps", type=int, default=None, help="stop here, as if the time were over")
    parser.add_argument("--out", type=Path, default=Path("demo_output/fabric"), help="where the checkpoint goes")
    args = parser.parse_args()

    fabric = Fabric(accelerator=args.accelerator, devices=args.devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    torch.set_num_threads(1)

    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    folds = list(StratifiedKFold(args.folds, shuffle=True, random_state=0).split(digits.data, digits.target))

    run, path = fabric.run_state, args.out / "kfold.ckpt"
    progress = {"run": run, "scores": []}
    resumes = path.exists()
    if resumes:  # first in which fold it was; the rest when that fold's model is there
        fabric.load(path, progress)
        fabric.print(f"Going on in fold {len(progress['scores']) + 1} after step {run.step}.")

    for train, held_out in folds[len(progress["scores"]) :]:
        module = network()
        model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=3e-3))
        loader, test_loader = fabric.setup_dataloaders(
            DataLoader(Subset(data, train), batch_size=64, shuffle=True),
            DataLoader(Subset(data, held_out), batch_size=180),
        )
        state = {**progress, "model": model, "optimizer": optimizer}
        if resumes:
            fabric.load(path, state)
            resumes = False
        while run.epoch < args.max_epochs:
            for pictures, labels in loader:
                optimizer.zero_grad()
                fabric.backward(F.cross_entropy(model(pictures), labels))
                optimizer.step()
                run.step += 1
                if run.step == args.max_steps:
                    fabric.save(path, state)
                    fabric.print(f"Stopped after step {run.step}.")
                    return
            run.epoch += 1
        progress["scores"].append(accuracy(fabric, model, test_loader))
        run.epoch = 0
        fabric.print(f"fold {len(progress['scores'])}: {progress['scores'][-1]:.1%}")

    scores = torch.tensor(progress["scores"])
    fabric.print(
        f"Accuracy over {len(scores)} folds: {scores.mean():.1%} (from {scores.min():.1%} to {scores.max():.1%})"
    )


if __name__ == "__main__":
    main()

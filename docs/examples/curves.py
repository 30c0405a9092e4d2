"""What the examples share: reading the run's CSV log back, and drawing it."""

import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # pictures go to files: no screen is needed
import matplotlib.pyplot as plt

Curve = tuple[list[int], list[float]]


def read_curves(log_dir: str | None) -> dict[str, Curve]:
    """Every metric of a run: steps, and the values logged at them."""
    assert log_dir is not None
    curves: dict[str, Curve] = {}
    with (Path(log_dir) / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return curves


def draw_curves(axis: plt.Axes, curves: dict[str, Curve], names: dict[str, str], **settings: object) -> None:
    """Draw some of them into one diagram: metric -> label."""
    for name, label in names.items():
        steps, values = curves[name]
        axis.plot(steps, values, label=label, marker="." if len(steps) < 50 else None, linewidth=1)
    axis.set(xlabel="step", **settings)
    axis.grid(alpha=0.3)
    axis.legend()

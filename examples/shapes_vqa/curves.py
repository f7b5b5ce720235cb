"""What is recorded during training, and its picture."""

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Point:
    """One measurement on the development pictures.

    Attributes:
        stage: name of the stage.
        step: steps done since the start of training.
        loss: weighted sum of the losses, averaged since the previous point.
        accuracy: exact match per question type, 0 to 1; empty before the decoder trains.
        dense: share of foreground patches whose shape the projected tokens name, 0 to 1.
        foreground: mean length of projected foreground tokens.
        background: mean length of projected background tokens.
    """

    stage: str
    step: int
    loss: float
    accuracy: dict[str, float]
    dense: float
    foreground: float
    background: float


@dataclass
class History:
    """Measurements in order, and the seconds spent per stage."""

    points: list[Point] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def plot(history: History, path: Path) -> None:
    """Draw accuracies, loss and token lengths against steps into a PNG file."""
    points = history.points
    steps = [point.step for point in points]
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 1.3, 1.3))
    top.plot(steps, [100 * point.dense for point in points], color="0.6", linestyle=":", label="patch shape")
    asked = [point for point in points if point.accuracy]
    for kind in asked[-1].accuracy if asked else ():
        top.plot([p.step for p in asked], [100 * p.accuracy[kind] for p in asked], marker=".", label=kind)
    top.axhline(90, color="0.8", linewidth=0.8)
    top.set_ylabel("right answers, %")
    top.legend(fontsize=8, ncols=2)
    middle.plot(steps, [point.loss for point in points], marker=".", color="0.3")
    middle.set_ylabel("training loss")
    middle.set_yscale("log")
    bottom.plot(steps, [point.foreground for point in points], marker=".", label="foreground")
    bottom.plot(steps, [point.background for point in points], marker=".", label="background")
    bottom.set_ylabel("token length")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("steps")
    bottom.legend(fontsize=8)
    previous = 0
    for stage in history.seconds:
        last = max(point.step for point in points if point.stage == stage)
        top.text((previous + last) / 2, 101, stage, ha="center", va="bottom", fontsize=8)
        for axis in (top, middle, bottom):
            axis.axvline(last, color="0.8", linewidth=0.8)
        previous = last
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)

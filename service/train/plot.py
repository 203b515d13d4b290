"""The loss curve as a picture, where matplotlib is installed (the `train` extra).

It knows a run's recorded losses only. Invariant: a missing matplotlib costs the picture and nothing else.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from service.train.loop import RunState

_SMOOTHED_STEPS = 20


def plot_losses(state: RunState, path: Path) -> bool:
    """Write a PNG of training loss (each step and smoothed) and held-out loss over tokens; False when matplotlib is missing."""
    if find_spec("matplotlib") is None or not state.losses:
        return False
    from matplotlib.figure import Figure

    tokens = [tokens for _, tokens, _ in state.losses]
    losses = [loss for _, _, loss in state.losses]
    smooth = [
        sum(losses[max(0, i - _SMOOTHED_STEPS) : i + 1]) / len(losses[max(0, i - _SMOOTHED_STEPS) : i + 1]) for i in range(len(losses))
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, losses, color="0.8", linewidth=0.8, label="training, each step")
    axes.plot(tokens, smooth, color="C0", label=f"training, mean of {_SMOOTHED_STEPS} steps")
    if state.evaluations:
        axes.plot([point[1] for point in state.evaluations], [point[2] for point in state.evaluations], "o-", color="C3", label="held out")
    axes.set_xlabel("tokens")
    axes.set_ylabel("nats/token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True

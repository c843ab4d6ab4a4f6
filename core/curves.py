"""curves.png: the log of a run, drawn."""

import json
import math
from pathlib import Path

from core.files import atomic_write


def plot_curves(folder, panels):
    """Draw log.jsonl as curves.png. `panels` is {title: the keys of its curves}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "step" in row]
    across = min(4, len(panels))
    down = math.ceil(len(panels) / 4)
    size = (4 * across, 3.25 * down)
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis, (title, keys) in zip(axes.flat, panels.items()):
        for key in keys:
            present = [row for row in rows if row.get(key) is not None]
            if present:
                steps = [row["step"] for row in present]
                values = [row[key] for row in present]
                axis.plot(steps, values, label=key, marker="." if len(steps) < 30 else None)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(frameon=False)
    with atomic_write(Path(folder, "curves.png")) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)

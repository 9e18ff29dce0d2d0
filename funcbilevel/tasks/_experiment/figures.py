"""What the figures of several tasks have in common."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from funcbilevel.tasks._experiment.methods import GREY

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
"""For `matplotlib.rc_context`."""


def draw_boxes(axes: Any, samples: Mapping[str, np.ndarray[Any, Any]], colours: Mapping[str, str]) -> None:
    """The finite values of each method as a box, with every value as a point; grey if it has no colour."""
    finite = {name: sample[np.isfinite(sample)] for name, sample in samples.items()}
    drawn: Any = axes.boxplot(list(finite.values()), widths=0.6, showfliers=False, patch_artist=True)
    rng = np.random.default_rng(0)
    parts = zip(finite.items(), drawn["boxes"], drawn["medians"], strict=True)
    for i, ((name, sample), box, line) in enumerate(parts, start=1):
        box.set(facecolor=(colour := colours.get(name, GREY)), alpha=0.35, edgecolor=colour)
        line.set(color="black")
        axes.scatter(i + rng.uniform(-0.18, 0.18, len(sample)), sample, s=10, color=colour, zorder=3, lw=0)
    angle: Any = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(1, len(finite) + 1), list(finite), **angle)


@contextmanager
def drawn(path: Path, *, dpi: int = 150, **figure: Any) -> Generator[Any]:
    """A matplotlib figure in the common style, written to `path` at the end; keywords are those of the figure."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with rc_context(STYLE):
        made = Figure(layout="constrained", **figure)
        yield made
        made.savefig(path, dpi=dpi)

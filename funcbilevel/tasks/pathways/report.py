"""What is shown of the records: one row per method, accuracy against attributions inside the known pathways."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.blocks import Block, blocks
from funcbilevel.tasks._experiment.figures import drawn
from funcbilevel.tasks._experiment.methods import colour
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.statistics import Interval, hypervolume, mean_interval, pareto_front
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks.pathways.methods import ALONE, KNOWN, LAGRANGIAN, METHODS
from funcbilevel.tasks.pathways.problem import Array


def report(directory: Path) -> Report:
    """The table and the figure of a directory's records."""
    of_methods = blocks(store.records(Store(directory, "pathways")), METHODS, lambda of: (of["rate"], of["eta"]))
    rows = summarise(of_methods)
    return Report(
        _shown(rows),
        {"table.md": table.markdown(HEADER, map(_cells, rows))},
        {"pathways.png": partial(draw, of_methods, rows)},
    )


class Row(NamedTuple):
    """One method in the setting whose validation accuracy plus share inside is best; means over the seeds.

    Attributes:
        method: its name.
        eta: of that setting.
        cell: its number.
        accuracy, corrected, known, true, auroc: on the test part, with 95% intervals.
        volume: hypervolume of (accuracy, share inside the known pathways) above (1/2, 0), of the settings on the
            validation part's front.
        difference: of that to the lagrangian's on the same seeds; None for itself and for what has no eta.
    """

    method: str
    eta: float
    cell: int
    accuracy: Interval
    corrected: Interval
    known: Interval
    true: Interval
    auroc: Interval
    volume: Interval
    difference: Interval | None


def front(of: Block, seed: int | None = None) -> Array:
    """Which settings the validation part has on the front, [cells] bool; by one seed, or by the means over them."""
    pairs = np.stack([of.metrics["validation_accuracy"], of.metrics["validation_known_share"]], axis=-1)
    return pareto_front(pairs.mean(axis=0) if seed is None else pairs[seed])


def volumes(of: Block) -> Array:
    """The test part's hypervolume of each seed's front, [seeds]."""
    pairs = np.stack([of.metrics["accuracy"], of.metrics["known_share"]], axis=-1)
    return np.array([hypervolume(pairs[s][front(of, s)], (0.5, 0.0)) for s in range(len(pairs))])


def summarise(of_methods: Sequence[Block]) -> list[Row]:
    """One row per method."""
    control = next((dict(zip(of.seeds, volumes(of), strict=True)) for of in of_methods if of.method == LAGRANGIAN), {})
    rows: list[Row] = []
    for of in of_methods:
        score = (of.metrics["validation_accuracy"] + of.metrics["validation_known_share"]).mean(axis=0)
        cell = int(np.argmax(np.nan_to_num(score, nan=-np.inf)))
        names = ("accuracy", "corrected_accuracy", "known_share", "true_share", "auroc")
        shown = (mean_interval(of.metrics[name][:, cell].tolist()) for name in names)
        volume = volumes(of)
        less = [own - control[seed] for seed, own in zip(of.seeds, volume, strict=True) if seed in control]
        compared = less and of.method not in (ALONE, KNOWN, LAGRANGIAN)
        difference = mean_interval(less) if compared else None
        of_volume = mean_interval(volume.tolist())
        rows.append(Row(of.method, of.settings[cell]["eta"], cell, *shown, volume=of_volume, difference=difference))
    return rows


HEADER = (
    *("method", "eta", "accuracy", "after correction", "inside known", "inside true", "AUROC"),
    *("hypervolume", "less lagrangian's [95% CI]"),
)


def _cells(row: Row) -> tuple[str, ...]:
    shown = (row.accuracy, row.corrected, row.known, row.true, row.auroc)
    return (
        row.method,
        f"{row.eta:g}",
        *("{:.3f} [{:.3f}, {:.3f}]".format(*interval) for interval in shown),
        f"{row.volume[0]:.4f}",
        "" if row.difference is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row.difference),
    )


def _shown(rows: Sequence[Row]) -> table.page:
    def cells(row: Row) -> tuple[str, ...]:
        means = (row.accuracy, row.corrected, row.known, row.true, row.auroc)
        less = "" if row.difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.difference)
        return row.method, *(f"{mean:.3f}" for mean, _, _ in means), less

    header = ("method", "acc.", "corr.", "known", "true", "AUROC", "less lagrangian's")
    shown = table.terminal(header, map(cells, rows))
    note = (
        "Means over the seeds on the test part, in the setting with the best validation accuracy plus share inside "
        "the known pathways. corr.: accuracy where the batch does not go with the label; known, true: share of the "
        "attributions inside the known and the driving pathways; AUROC of finding the driving pathways' genes by "
        "attribution; less lagrangian's: difference in the hypervolume of (accuracy, known) over the validation part's "
        "front, with a 95% bootstrap interval. table.md has more."
    )
    return table.page(shown, note)


def draw(of_methods: Sequence[Block], rows: Sequence[Row], path: Path) -> None:
    """Accuracy, accuracy after correction and AUROC by the share of attributions inside known pathways, as a PNG."""
    panels = {
        "accuracy": "Test accuracy",
        "corrected_accuracy": "Accuracy once the batch is corrected",
        "auroc": "AUROC of the driving pathways' genes",
    }
    with drawn(path, figsize=(11.5, 4.5)) as figure:
        grid: Any = figure.subplots(1, 3)
        for axes, (name, title) in zip(grid, panels.items(), strict=True):
            for of, row in zip(of_methods, rows, strict=True):
                share, values = (of.metrics[key].mean(axis=0) for key in ("known_share", name))
                own = colour(METHODS, of.method)
                if of.method in (ALONE, KNOWN):
                    square: Any = {"ms": 10, "mec": "black", "mew": 0.6}
                    axes.plot(share[row.cell], values[row.cell], "s", color=own, label=of.method, **square)
                    continue
                order = np.flatnonzero(front(of))[np.argsort(share[front(of)])]
                axes.scatter(share, values, s=14, color=own, alpha=0.45, lw=0)
                axes.plot(share[order], values[order], color=own, lw=1.3, marker="o", ms=4, label=of.method)
                axes.plot(share[row.cell], values[row.cell], "*", ms=12, color=own, mec="black", mew=0.6, zorder=5)
            axes.set(xlabel="Attributions inside the known pathways", title=title)
        seeds = len(of_methods[0].seeds)
        design = of_methods[0].settings[0]
        kind = f"sharing {design['overlap']} genes" if design["overlap"] else "disjoint"
        figure.suptitle(
            "What it costs, and brings, to keep attributions inside known pathways\n"
            f"{design['num_pathways']} pathways of {design['size']} genes, {kind}, {design['num_driving']} of them "
            "driving; "
            f"{design['num_background']} other genes; means over {seeds} seeds; line and star: chosen on validation",
            fontsize=9,
        )
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)

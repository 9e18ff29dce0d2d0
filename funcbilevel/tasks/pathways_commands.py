"""`funcbilevel run pathways`: accuracy against attributions inside known pathways, over settings and seeds."""

import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from funcbilevel.tasks import _records, pathways
from funcbilevel.tasks._figures import STYLE
from funcbilevel.tasks._statistics import Interval, hypervolume, mean_interval, pareto_front
from funcbilevel.tasks.pathways import Array, Design, Hyper, Setting

if TYPE_CHECKING:
    from rich.console import RenderableType

ALONE, KNOWN, LAGRANGIAN = "single-objective", "known-genes", "lagrangian"
COLOURS = {ALONE: "0.35", KNOWN: "C2", LAGRANGIAN: "C0", "alternating": "C1", "aid-cg": "C3", "itd": "C4"}
PLAYED = tuple(name for name in COLOURS if name not in (ALONE, KNOWN, LAGRANGIAN))
ETAS = (0.1, 0.3, 1.0, 1.7, 3.0, 6.0)
RATES = (0.01, 0.02)


def hypers(method: str) -> list[Hyper]:
    """The settings of a method: of those that trade, every eta with every rate."""
    etas = (0.0,) if method in (ALONE, KNOWN) else ETAS
    return [Hyper(eta, rate, float(method == KNOWN)) for rate in RATES for eta in etas]


@dataclass(frozen=True)
class RunPathways(_records.Options):
    """A leader classifies drawn expression data, a follower keeps the attributions inside known pathways."""

    task = "pathways"
    methods: tuple[str, ...] = ("aid-cg", "alternating")
    """Among aid-cg, alternating, itd; compared with the one objective of both players, and with cross entropy alone."""
    seeds: int = 5
    """Number of seeds, from --seed on."""
    num_steps: int = 400
    """The leader's steps."""
    width: int = 8
    """Of the network's two hidden layers."""
    num_pathways: int = 8
    """Known pathways."""
    size: int = 6
    """Genes in a pathway."""
    overlap: int = 2
    """Genes that a pathway shares with the next; 0: disjoint."""
    num_driving: int = 3
    """Pathways that the label depends on."""
    num_background: int = 26
    """Genes in no pathway."""
    num_technical: int = 8
    """Of these, genes that the batch shifts."""
    confounding: float = 0.5
    """Correlation of batch and label."""

    @property
    def design(self) -> Design:
        """What is drawn."""
        return Design(
            self.num_pathways,
            self.size,
            self.overlap,
            self.num_driving,
            self.num_background,
            self.num_technical,
            confounding=self.confounding,
        )

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        self.check_counts("seeds", "num_steps", "width")
        if unknown := [name for name in self.methods if name not in PLAYED]:
            raise ValueError(f"--methods must be among {', '.join(PLAYED)}, got {', '.join(unknown)}.")
        try:
            pathways.check(self.design)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise ValueError(f"--{name.replace('_', '-')} {rest}") from error

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes runs.jsonl, table.md and pathways.png into `directory`; returns the table."""
        seeds = range(self.seed, self.seed + self.seeds)
        data = [pathways.generate(self.design, seed) for seed in seeds]
        setting = Setting(self.width, num_steps=self.num_steps)
        # One program serves all that descend one objective.
        plain = {method: hypers(method) for method in (ALONE, KNOWN, LAGRANGIAN)}
        groups = {LAGRANGIAN: plain} | {method: {method: hypers(method)} for method in self.methods}
        outcomes: list[Outcome] = []
        for program, of in groups.items():
            clock, callback = time.perf_counter(), track(program, setting.num_steps)
            every = [hyper for of_method in of.values() for hyper in of_method]
            metrics = pathways.sweep(program, setting, data, every, seeds, callback)
            seconds = (time.perf_counter() - clock) / len(every) / len(seeds)
            for method, of_method in of.items():
                cells = [i for i, hyper in enumerate(every) if any(hyper is mine for mine in of_method)]
                values = {name: np.asarray(array[:, cells], float) for name, array in metrics.items()}
                outcomes.append(Outcome(method, of_method, values, seconds))
        write(directory, self.design, setting, outcomes, seeds)
        rows = summarise(outcomes)
        (directory / "table.md").write_text(_records.markdown_table(HEADER, map(_cells, rows)), encoding="utf-8")
        draw(outcomes, rows, self.design, directory / "pathways.png")
        return _report(rows)


class Outcome(NamedTuple):
    """A method in every setting from every seed.

    Attributes:
        method: its name.
        hypers: its settings, [cells].
        metrics: name -> [seeds, cells].
        seconds: of one run, its share of the program's, compilation included.
    """

    method: str
    hypers: list[Hyper]
    metrics: Mapping[str, Array]
    seconds: float


def write(directory: Path, design: Design, setting: Setting, outcomes: Sequence[Outcome], seeds: Sequence[int]) -> None:
    """The records go to runs.jsonl."""
    for of in outcomes:
        for c, hyper in enumerate(of.hypers):
            settings = design._asdict() | setting._asdict() | {"eta": hyper.eta, "rate": hyper.rate}
            for s, seed in enumerate(seeds):
                metrics = {name: values[s, c] for name, values in of.metrics.items()}
                record = _records.record("pathways", of.method, seed, settings, metrics, of.seconds)
                _records.append(directory / "runs.jsonl", record)


# What is shown of it.


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


def front(of: Outcome, seed: int | None = None) -> Array:
    """Which settings the validation part has on the front, [cells] bool; by one seed, or by the means over them."""
    pairs = np.stack([of.metrics["validation_accuracy"], of.metrics["validation_known_share"]], axis=-1)
    return pareto_front(pairs.mean(axis=0) if seed is None else pairs[seed])


def volumes(of: Outcome) -> Array:
    """The test part's hypervolume of each seed's front, [seeds]."""
    pairs = np.stack([of.metrics["accuracy"], of.metrics["known_share"]], axis=-1)
    return np.array([hypervolume(pairs[s][front(of, s)], (0.5, 0.0)) for s in range(len(pairs))])


def summarise(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row per method."""
    control = next(volumes(of) for of in outcomes if of.method == LAGRANGIAN)
    rows: list[Row] = []
    for of in outcomes:
        score = (of.metrics["validation_accuracy"] + of.metrics["validation_known_share"]).mean(axis=0)
        cell = int(np.argmax(score))
        names = ("accuracy", "corrected_accuracy", "known_share", "true_share", "auroc")
        shown = (mean_interval(of.metrics[name][:, cell].tolist()) for name in names)
        difference = mean_interval((volumes(of) - control).tolist()) if of.method in PLAYED else None
        volume = mean_interval(volumes(of).tolist())
        rows.append(Row(of.method, of.hypers[cell].eta, cell, *shown, volume=volume, difference=difference))
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


def _report(rows: Sequence[Row]) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415

    def cells(row: Row) -> tuple[str, ...]:
        means = (row.accuracy, row.corrected, row.known, row.true, row.auroc)
        less = "" if row.difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.difference)
        return row.method, *(f"{mean:.3f}" for mean, _, _ in means), less

    header = ("method", "acc.", "corr.", "known", "true", "AUROC", "less lagrangian's")
    table = _records.terminal_table(header, map(cells, rows))
    note = (
        "Means over the seeds on the test part, in the setting with the best validation accuracy plus share inside "
        "the known pathways. corr.: accuracy where the batch does not go with the label; known, true: share of the "
        "attributions inside the known and the driving pathways; AUROC of finding the driving pathways' genes by "
        "attribution; less lagrangian's: difference in the hypervolume of (accuracy, known) over the validation part's "
        "front, with a 95% bootstrap interval. table.md has more."
    )
    return Group(table, "", textwrap.fill(note, 78))


def draw(outcomes: Sequence[Outcome], rows: Sequence[Row], design: Design, path: Path) -> None:
    """Accuracy, accuracy after correction and AUROC by the share of attributions inside known pathways, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    panels = {
        "accuracy": "Test accuracy",
        "corrected_accuracy": "Accuracy once the batch is corrected",
        "auroc": "AUROC of the driving pathways' genes",
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.5), layout="constrained")
        grid: Any = figure.subplots(1, 3)
        for axes, (name, title) in zip(grid, panels.items(), strict=True):
            for of, row in zip(outcomes, rows, strict=True):
                share, values = (of.metrics[key].mean(axis=0) for key in ("known_share", name))
                colour = COLOURS[of.method]
                if of.method in (ALONE, KNOWN):
                    square: Any = {"ms": 10, "mec": "black", "mew": 0.6}
                    axes.plot(share[row.cell], values[row.cell], "s", color=colour, label=of.method, **square)
                    continue
                order = np.flatnonzero(front(of))[np.argsort(share[front(of)])]
                axes.scatter(share, values, s=14, color=colour, alpha=0.45, lw=0)
                axes.plot(share[order], values[order], color=colour, lw=1.3, marker="o", ms=4, label=of.method)
                axes.plot(share[row.cell], values[row.cell], "*", ms=12, color=colour, mec="black", mew=0.6, zorder=5)
            axes.set(xlabel="Attributions inside the known pathways", title=title)
        seeds = len(outcomes[0].metrics["accuracy"])
        kind = f"sharing {design.overlap} genes" if design.overlap else "disjoint"
        figure.suptitle(
            "What it costs, and brings, to keep attributions inside known pathways\n"
            f"{design.num_pathways} pathways of {design.size} genes, {kind}, {design.num_driving} of them driving; "
            f"{design.num_background} other genes; means over {seeds} seeds; line and star: chosen on validation",
            fontsize=9,
        )
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)

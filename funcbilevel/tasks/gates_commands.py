"""`funcbilevel run gates`: how many features does each method need? Every method over settings and seeds."""

import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from funcbilevel.tasks import _records, gates
from funcbilevel.tasks._experiment.figures import STYLE
from funcbilevel.tasks._experiment.statistics import Interval, bootstrap_interval, mean_interval, pareto_front
from funcbilevel.tasks.gates import Array, Hyper, Setting, Table

if TYPE_CHECKING:
    from rich.console import RenderableType

ALL, RANDOM, LASSO = "single-objective", "random-mask", "lasso"
COLOURS = {
    ALL: "0.35",
    "aid-cg": "C3",
    "alternating": "C1",
    "itd": "C4",
    "group-lasso": "C0",
    LASSO: "C9",
    RANDOM: "0.6",
}
SELECTORS = tuple(name for name in COLOURS if name not in (ALL, RANDOM))
REFIT_STEPS = 300
NUM_PENALTIES = 6
# dataset -> method -> the range of its penalties: where validation accuracy falls, by trials with seeds 100 to 104; the
# lassos' go on to where they select next to nothing.
PENALTIES: dict[str, dict[str, tuple[float, float]]] = {
    "breast-cancer": {"gates": (0.003, 0.02), "group-lasso": (0.08, 0.6), LASSO: (0.06, 0.25)},
    "adult": {"gates": (0.002, 0.012), "group-lasso": (0.07, 0.25), LASSO: (0.03, 0.1)},
}
GATE_TRIALS = ({"leader_rate": 0.01, "follower_rate": 0.003}, {"leader_rate": 0.01, "follower_rate": 0.01})
LASSO_TRIALS = ({"leader_rate": 0.03}, {"leader_rate": 0.1})


def hypers(dataset: str, method: str) -> list[Hyper]:
    """The settings of a method, as many for each: every penalty with every trial."""
    ranges = PENALTIES[dataset]
    penalties = np.geomspace(*ranges.get(method, ranges["gates"]), NUM_PENALTIES)
    trials = LASSO_TRIALS if method in ranges else GATE_TRIALS
    return [Hyper(penalty=float(f"{penalty:.3g}"), **trial) for trial in trials for penalty in penalties]


@dataclass(frozen=True)
class RunGates(_records.Options):
    """A follower's gates keep few features while the leader predicts, against lasso and random sets of features."""

    task = "gates"
    beside = ("data",)
    dataset: Literal["breast-cancer", "adult"] = "breast-cancer"
    """Breast cancer of scikit-learn, or UCI Adult."""
    data: Path | None = None
    """Of adult the directory of the files; by default $FUNCBILEVEL_ADULT_DIR, or else they are downloaded."""
    methods: tuple[str, ...] = ("aid-cg", "alternating", "group-lasso", "lasso")
    """Among aid-cg, alternating, itd, group-lasso, lasso; random sets are as large as those of the first."""
    seeds: int = 5
    """Number of seeds, from --seed on."""
    num_steps: int = 1200
    """The leader's steps in selection."""
    width: int = 32
    """Of the network's hidden layer."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        if self.data is not None and not self.data.exists():
            raise ValueError(f"--data: there is no {self.data}.")
        self.check_counts("seeds", "num_steps", "width")
        unknown = [name for name in self.methods if name not in SELECTORS]
        if unknown or not self.methods:
            raise ValueError(f"--methods must be among {', '.join(SELECTORS)}, got {', '.join(unknown) or '(none)'}.")

    def load(self, seed: int) -> list[Table]:
        """The data that the options ask for, as the seed divides them: of the small one several folds."""
        if self.dataset == "breast-cancer":
            return [gates.breast_cancer(seed, fold) for fold in range(gates.FOLDS)]
        try:
            return [gates.adult(self.data, seed)]
        except FileNotFoundError as error:
            raise ValueError(f"--data: {error}") from error

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes runs.jsonl, the selected features, table.md and gates.png into `directory`; returns the table."""
        seeds = range(self.seed, self.seed + self.seeds)
        folds = [self.load(seed) for seed in seeds]
        setting = Setting(self.width, num_steps=self.num_steps)
        selections, table = compare(self.methods, setting, folds, seeds, track), folds[0][0]
        write(directory, table, setting, selections, seeds)
        rows = [row for tolerance in gates.TOLERANCES for row in summarise(selections, tolerance)]
        (directory / "table.md").write_text(_records.markdown_table(HEADER, map(_cells, rows)), encoding="utf-8")
        draw(selections, rows, table, directory / "gates.png")
        return _report(rows, table)


class Selection(NamedTuple):
    """What a method selected, in every setting from every seed; means over the folds.

    Attributes:
        method: its name.
        hypers: its settings, [cells]; of random sets those of the method whose sizes they have.
        features: how often each feature was selected, [seeds, cells, features].
        validation, test: accuracy of the refitted network, [seeds, cells].
        seconds: for the selection and its part of the refit, compilation included.
    """

    method: str
    hypers: list[Hyper]
    features: Array
    validation: Array
    test: Array
    seconds: float

    @property
    def counts(self) -> Array:
        """How many features, [seeds, cells]."""
        return self.features.sum(axis=-1)


def compare(
    methods: Sequence[str],
    setting: Setting,
    folds: Sequence[Sequence[Table]],
    seeds: Sequence[int],
    track: _records.Track,
) -> list[Selection]:
    """All features, each method's selections, and random ones; one refit, the same for all of them."""
    tables = [table for of_seed in folds for table in of_seed]
    run_seeds = [seed for seed, of_seed in zip(seeds, folds, strict=True) for _ in of_seed]
    of = {ALL: [Hyper()]} | {method: hypers(tables[0].name, method) for method in methods}
    masks = {ALL: np.ones((len(tables), 1, len(tables[0].features)), bool)}
    seconds = {ALL: 0.0, RANDOM: 0.0}
    for method in methods:
        clock, callback = time.perf_counter(), track(method, setting.num_steps)
        masks[method] = np.asarray(gates.train(method, setting, tables, of[method], run_seeds, callback))
        seconds[method] = time.perf_counter() - clock
    of[RANDOM], masks[RANDOM] = of[methods[0]], gates.random_masks(masks[methods[0]])
    clock, callback = time.perf_counter(), track("refit", REFIT_STEPS)
    every = np.concatenate(list(masks.values()), axis=1)
    accuracies = gates.measure(setting._replace(num_steps=REFIT_STEPS), tables, every, run_seeds, callback)
    per_cell = (time.perf_counter() - clock) / every.shape[1]

    def by_seed(values: Array) -> Array:
        return values.reshape(len(seeds), -1, *values.shape[1:]).mean(axis=1, dtype=float)

    ends = np.cumsum([of_method.shape[1] for of_method in masks.values()])[:-1]
    validation, test = (np.split(values, ends, axis=1) for values in accuracies)
    return [
        Selection(
            name,
            of[name],
            *map(by_seed, (masks[name], validation[i], test[i])),
            seconds=seconds[name] + per_cell * masks[name].shape[1],
        )
        for i, name in enumerate(masks)
    ]


def write(
    directory: Path, table: Table, setting: Setting, selections: Sequence[Selection], seeds: Sequence[int]
) -> None:
    """Records go to runs.jsonl; how often each feature was selected over the folds to runs-features.jsonl."""
    for of in selections:
        seconds = of.seconds / len(seeds) / len(of.hypers)
        rates = ("leader_rate",) if of.method in (ALL, LASSO, "group-lasso") else ("leader_rate", "follower_rate")
        names = rates if of.method == ALL else ("penalty", *rates)
        for c, hyper in enumerate(of.hypers):
            settings = {"dataset": table.name} | setting._asdict() | {"refit_steps": REFIT_STEPS}
            settings |= {name: getattr(hyper, name) for name in names}
            for s, seed in enumerate(seeds):
                metrics = {
                    "num_features": of.counts[s, c],
                    "accuracy": of.test[s, c],
                    "validation_accuracy": of.validation[s, c],
                }
                record = _records.record("gates", of.method, seed, settings, metrics, seconds)
                _records.append(directory / "runs.jsonl", record)
                often = zip(table.features, of.features[s, c].tolist(), strict=True)
                features = {name: round(share, 3) for name, share in often if share > 0}
                line = {"method": of.method, "seed": seed, "settings": settings, "features": features}
                with (directory / "runs-features.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


# What is shown of it.


class Row(NamedTuple):
    """One method in the settings that validation chose, one for each seed; means over the seeds with 95% intervals.

    Attributes:
        method: its name.
        tolerance: how far below that of all features the validation accuracy may be.
        cells: the numbers of the settings chosen, [seeds]; -1 where none was good enough: then it needs all features.
        features: how many it needs.
        accuracy: on the test part, after refitting.
        lost: the accuracy of all features less that, in points.
        fewer: than the lasso needs, as a share; None for the lasso and without it.
    """

    method: str
    tolerance: float
    cells: Array
    features: Interval
    accuracy: Interval
    lost: Interval
    fewer: Interval | None


def at_cells(values: Array, cells: Array, otherwise: Array | float) -> Array:
    """values, [seeds, cells, ...], at each seed's cell; `otherwise` where that is -1."""
    seeds = np.arange(len(cells))
    shape = (-1,) + (1,) * (values.ndim - 2)
    return np.where(cells.reshape(shape) < 0, otherwise, values[seeds, np.maximum(cells, 0)])


def summarise(selections: Sequence[Selection], tolerance: float) -> list[Row]:
    """One row per method."""
    everything = selections[0]
    full, num_features = everything.test[:, 0], everything.features.shape[-1]

    def chosen(of: Selection) -> Array:
        return gates.needed(of.validation, of.counts, everything.validation[:, 0], tolerance)

    def features(of: Selection) -> Array:
        return at_cells(of.counts, chosen(of), num_features)

    lasso = next((features(of) for of in selections if of.method == LASSO), None)

    def row(of: Selection) -> Row:
        own, accuracy = features(of), at_cells(of.test, chosen(of), full)
        return Row(
            of.method,
            tolerance,
            chosen(of),
            mean_interval(own.tolist()),
            mean_interval(accuracy.tolist()),
            mean_interval((100 * (full - accuracy)).tolist()),
            None if lasso is None or of.method in (ALL, LASSO) else fewer_interval(own, lasso),
        )

    return [row(of) for of in selections]


def fewer_interval(own: Array, other: Array) -> Interval:
    """1 - (mean of own) / (mean of other), both [seeds], seeds being drawn again in pairs."""

    def fewer(index: Array, axis: int = 0) -> Array:
        return 1 - own[index].mean(axis=axis) / other[index].mean(axis=axis)

    index = np.arange(len(own))
    return float(fewer(index)), *bootstrap_interval(index, fewer)


HEADER = ("tolerance", "method", "features", "95% CI", "test accuracy", "points lost", "95% CI", "fewer than lasso")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{100 * row.tolerance:g} point",
        row.method,
        f"{row.features[0]:.1f}",
        "{:.1f} to {:.1f}".format(*row.features[1:]),
        f"{100 * row.accuracy[0]:.2f}",
        f"{row.lost[0]:.2f}",
        "{:.2f} to {:.2f}".format(*row.lost[1:]),
        "" if row.fewer is None else "{:.0%} [{:.0%}, {:.0%}]".format(*row.fewer),
    )


def _report(rows: Sequence[Row], table: Table) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415

    names = {1: "method", 2: "needs", 3: "95% CI", 4: "accuracy", 5: "lost", 7: "fewer than lasso"}
    grids: list[Any] = []
    for tolerance in gates.TOLERANCES:
        title = f"Features needed to lose at most {100 * tolerance:g} point of validation accuracy"
        lines = [[_cells(row)[i] for i in names] for row in rows if row.tolerance == tolerance]
        grids += [_records.terminal_table(list(names.values()), lines, title), ""]
    sizes = [len(part.y) for part in (table.train, table.validation, table.test)]
    note = (
        f"{table.name}: {len(table.features)} features; "
        + "{} rows to train, {} to validate, {} to test. ".format(*sizes)
        + "Each method's sets of features are refitted alike. accuracy, and points lost to all features, on the test "
        "part, %. Means over the seeds, 95% bootstrap intervals; table.md has more."
    )
    return Group(*grids, textwrap.fill(note, 78))


def draw(selections: Sequence[Selection], rows: Sequence[Row], table: Table, path: Path) -> None:
    """Test accuracy against the number of features, and which of them were selected, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        plane, which = figure.subplots(1, 2, width_ratios=(1.5, 1))
        full, grey = 100 * float(selections[0].test.mean()), COLOURS[ALL]
        plane.axhline(full, color=grey, lw=1, label="all features")
        for tolerance, dashes in zip(gates.TOLERANCES, ("--", ":"), strict=True):
            plane.axhline(full - 100 * tolerance, color=grey, lw=1, ls=dashes, label=f"{100 * tolerance:g} point less")
        lows: list[float] = []
        for of in selections[1:]:
            colour, counts = COLOURS[of.method], of.counts.mean(axis=0)
            accuracy = 100 * of.test.mean(axis=0)
            front = pareto_front(np.stack([of.validation.mean(axis=0), -counts], axis=1))
            order = np.flatnonzero(front)[np.argsort(counts[front])]
            plane.scatter(counts, accuracy, s=12, color=colour, alpha=0.45, lw=0)
            plane.plot(counts[order], accuracy[order], color=colour, lw=1.3, marker="o", ms=3.5, label=of.method)
            for row in rows:
                if row.method == of.method:
                    star = row.tolerance == gates.TOLERANCES[0]
                    style: Any = {"ms": 14 if star else 7, "mec": "black", "mew": 0.6, "zorder": 5}
                    plane.plot(row.features[0], 100 * row.accuracy[0], "*" if star else "D", color=colour, **style)
            if of.method != RANDOM:
                lows.append(float(accuracy[order].min()))
        plane.set_ylim(bottom=max(min(lows), full - 2.5) - 0.3)  # sets that lose more are left out
        plane.set(
            xlabel="Number of features selected (mean over seeds)",
            ylabel="Test accuracy after refitting, %",
            title=f"{table.name}: what {len(selections[0].test)} seeds lose by using fewer features",
        )
        title = "lines, stars (0.5 point) and diamonds (1 point) are chosen on validation"
        handles, labels = plane.get_legend_handles_labels()
        figure.legend(handles, labels, title=title, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
        _draw_features(which, selections, rows, table)
        figure.savefig(path, dpi=150)


def _draw_features(axes: Any, selections: Sequence[Selection], rows: Sequence[Row], table: Table) -> None:
    """How often each feature was selected at the settings chosen for the first tolerance, by method."""
    at = {row.method: row.cells for row in rows if row.tolerance == gates.TOLERANCES[0]}
    shown = [of for of in selections if of.method in SELECTORS]
    share = np.stack([at_cells(of.features, at[of.method], 1.0).mean(axis=0) for of in shown])  # [methods, features]
    order = np.argsort(share[0], kind="stable")
    for i, of in enumerate(shown):
        axes.scatter(np.full(len(order), i), np.arange(len(order)), s=60 * share[i, order], color=COLOURS[of.method])
    axes.set_yticks(range(len(order)), [table.features[i] for i in order], fontsize=6 if len(order) > 20 else 8)
    axes.set_xticks(range(len(shown)), [of.method.replace("-", "\n") for of in shown], fontsize=8)
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.set_title("Features selected at the stars (area: how often)")

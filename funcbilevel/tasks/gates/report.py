"""What is shown of the records: how many features each method needs to predict nearly as well as with all of them."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment import table as tables
from funcbilevel.tasks._experiment.blocks import Block, blocks
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.figures import drawn
from funcbilevel.tasks._experiment.methods import colour
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.statistics import Interval, bootstrap_interval, mean_interval, pareto_front
from funcbilevel.tasks._experiment.store import Record, Store
from funcbilevel.tasks.gates.methods import ALL, LASSO, METHODS, RANDOM
from funcbilevel.tasks.gates.problem import SIZES, Array


def report(directory: Path) -> Report:
    """The tables and the figure of a directory's records.

    Raises:
        UserError: there is nothing yet to compare with.
    """
    where = Store(directory, "gates")
    records = store.records(where)
    of_methods = compared(records)
    if not of_methods:
        raise UserError(f"{directory} holds no runs of {ALL} yet; run the same command again to go on.")
    rows = [row for tolerance in TOLERANCES for row in summarise(of_methods, tolerance)]
    shares = selected(store.beside(where, "features"), of_methods, rows)
    return Report(
        _shown(rows, of_methods[0]),
        {"table.md": tables.markdown(HEADER, map(_cells, rows))},
        {"gates.png": partial(draw, of_methods, rows, shares)},
    )


def compared(records: Sequence[Record]) -> list[Block]:
    """Every method on the seeds that all features have been tried on; all features first, none without them."""

    def order(of: Mapping[str, Any]) -> Any:
        return of["leader_rate"], of.get("follower_rate", 0.0), of.get("penalty", 0.0)

    of_methods = {of.method: of for of in blocks([_named(record) for record in records], METHODS, order)}
    if ALL not in of_methods:
        return []
    common = {name: [seed for seed in of.seeds if seed in of_methods[ALL].seeds] for name, of in of_methods.items()}
    return [on_seeds(of, common[name]) for name, of in of_methods.items() if common[name]]


def _named(record: Record) -> Record:
    """Random sets that follow another method than usual are called by its name."""
    sizes_of = record["settings"].get("sizes_of")
    return record if sizes_of is None else {**record, "method": f"{record['method']} {sizes_of}"}


def on_seeds(of: Block, seeds: Sequence[int]) -> Block:
    """The block on some of its seeds."""
    rows = [of.seeds.index(seed) for seed in seeds]
    return of._replace(seeds=list(seeds), metrics={name: values[rows] for name, values in of.metrics.items()})


TOLERANCES = (0.005, 0.01)
"""Of accuracy: half a point, and one."""


def needed(validation: Array, counts: Array, full: Array, tolerance: float) -> Array:
    """The setting with the fewest features among those whose validation accuracy is nearly that of all features.

    Of settings with as many features, it is the most accurate.

    Arguments:
        validation, counts: accuracies and numbers of features, [..., cells].
        full: accuracy of the network with all features, [...].
        tolerance: how far below it the accuracy may be.

    Returns:
        The number of the cell, [...]; -1 if none is as good, so that all features are needed.
    """
    enough = validation >= full[..., None] - tolerance - 1e-6  # float32 means of the same rows differ by rounding
    best = np.lexsort((-validation, np.where(enough, np.round(counts, 6), np.inf)), axis=-1)[..., 0]
    return np.where(enough.any(axis=-1), best, -1)


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


def summarise(of_methods: Sequence[Block], tolerance: float) -> list[Row]:
    """One row per method; the first is of all features, and has the seeds of the others."""

    def chosen(of: Block) -> tuple[Array, Array, Block]:
        """(cells, features needed, all features on the same seeds)."""
        full = on_seeds(of_methods[0], of.seeds)
        counts = of.metrics["num_features"]
        cells = needed(of.metrics["validation_accuracy"], counts, full.metrics["validation_accuracy"][:, 0], tolerance)
        return cells, at_cells(counts, cells, full.metrics["num_features"][:, 0]), full

    of_lasso = next((of for of in of_methods if of.method == LASSO), None)
    lasso = {} if of_lasso is None else dict(zip(of_lasso.seeds, chosen(of_lasso)[1], strict=True))

    def row(of: Block) -> Row:
        cells, own, full = chosen(of)
        of_full = full.metrics["accuracy"][:, 0]
        accuracy = at_cells(of.metrics["accuracy"], cells, of_full)
        pairs = [(own[s], lasso[seed]) for s, seed in enumerate(of.seeds) if seed in lasso]
        return Row(
            of.method,
            tolerance,
            cells,
            mean_interval(own.tolist()),
            mean_interval(accuracy.tolist()),
            mean_interval((100 * (of_full - accuracy)).tolist()),
            fewer_interval(*np.array(pairs).T) if pairs and of.method not in (ALL, LASSO) else None,
        )

    return [row(of) for of in of_methods]


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


class Shares(NamedTuple):
    """How often each feature was selected at the settings chosen for the first tolerance.

    Attributes:
        features: their names.
        methods: method -> share of the seeds and folds, [features].
    """

    features: list[str]
    methods: dict[str, Array]


def selected(
    lines: Mapping[store.Key, Mapping[str, Any]], of_methods: Sequence[Block], rows: Sequence[Row]
) -> Shares | None:
    """The shares, by what stands beside the records; None if nothing does. Where nothing was good enough, all are 1."""
    first = [line for key, line in lines.items() if key.method == ALL]
    features = list(dict.fromkeys(name for line in (*first, *lines.values()) for name in line["features"]))
    by_run = {key[1:]: line["features"] for key, line in lines.items()}
    cells = {row.method: row.cells for row in rows if row.tolerance == TOLERANCES[0]}

    def share(of: Block, seed: int, cell: int) -> list[float] | None:
        if cell < 0:
            return [1.0] * len(features)
        often = by_run.get((of.method, seed, store.settings_key(of.settings[cell])))
        return None if often is None else [often.get(name, 0.0) for name in features]

    methods: dict[str, Array] = {}
    for of in of_methods:
        if of.method != ALL and not of.method.startswith(RANDOM):
            of_seeds = [share(of, seed, cell) for seed, cell in zip(of.seeds, cells[of.method], strict=True)]
            there = [values for values in of_seeds if values is not None]
            if there:
                methods[of.method] = np.mean(there, axis=0)
    return Shares(features, methods) if features and methods else None


def _shown(rows: Sequence[Row], full: Block) -> tables.page:
    names = {1: "method", 2: "needs", 3: "95% CI", 4: "accuracy", 5: "lost", 7: "fewer than lasso"}
    grids: list[Any] = []
    for tolerance in TOLERANCES:
        title = f"Features needed to lose at most {100 * tolerance:g} point of validation accuracy"
        lines = [[_cells(row)[i] for i in names] for row in rows if row.tolerance == tolerance]
        grids.append(tables.terminal(list(names.values()), lines, title))
    dataset = full.settings[0]["dataset"]
    sizes = "{} rows to train, {} to validate, {} to test. ".format(*SIZES[dataset]) if dataset in SIZES else ""
    note = (
        f"{dataset}: {full.metrics['num_features'][0, 0]:g} features; {sizes}"
        "Each method's sets of features are refitted alike. accuracy, and points lost to all features, on the test "
        "part, %. Means over the seeds, 95% bootstrap intervals; table.md has more."
    )
    return tables.page(*grids, note)


def draw(of_methods: Sequence[Block], rows: Sequence[Row], shares: Shares | None, path: Path) -> None:
    """Test accuracy against the number of features, and which of them were selected, as a PNG."""
    with drawn(path, figsize=(11, 5.2)) as figure:
        plane, which = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _draw_plane(plane, of_methods, rows)
        title = "Lines, stars (at most 0.5 point lost) and diamonds (1 point) are chosen on validation"
        handles, labels = plane.get_legend_handles_labels()
        figure.legend(handles, labels, title=title, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
        if shares is None:
            which.set_axis_off()
        else:
            _draw_features(which, shares)


def _named_set(of: Block) -> bool:
    return not of.method.startswith(RANDOM)


def _front(of: Block) -> Array:
    """The cells that no other has more validation accuracy with fewer features than, by number of features."""
    counts, validation = (of.metrics[name].mean(axis=0) for name in ("num_features", "validation_accuracy"))
    front = pareto_front(np.stack([validation, -counts], axis=1))
    return np.flatnonzero(front)[np.argsort(counts[front])]


def _draw_plane(axes: Any, of_methods: Sequence[Block], rows: Sequence[Row]) -> None:
    everything = of_methods[0]
    full, grey = 100 * float(everything.metrics["accuracy"].mean()), colour(METHODS, ALL)
    axes.axhline(full, color=grey, lw=1, label="all features")
    for tolerance, dashes in zip(TOLERANCES, ("--", ":"), strict=True):
        axes.axhline(full - 100 * tolerance, color=grey, lw=1, ls=dashes, label=f"{100 * tolerance:g} point less")
    # What loses more than the methods ever do is left out: that of random sets.
    lows = [
        100 * float(of.metrics["accuracy"].mean(axis=0)[_front(of)].min()) for of in of_methods[1:] if _named_set(of)
    ]
    bottom = max(min(lows, default=0.0), full - 2.5) - 0.3
    for of in of_methods[1:]:
        own = colour(METHODS, of.method)
        counts, accuracy = (of.metrics[name].mean(axis=0) for name in ("num_features", "accuracy"))
        order = np.array([i for i in _front(of) if 100 * accuracy[i] > bottom], int)
        inside = 100 * accuracy > bottom
        axes.scatter(counts[inside], 100 * accuracy[inside], s=12, color=own, alpha=0.45, lw=0)
        axes.plot(counts[order], 100 * accuracy[order], color=own, lw=1.3, marker="o", ms=3.5, label=of.method)
        for row in rows:
            if row.method == of.method:
                star = row.tolerance == TOLERANCES[0]
                style: Any = {"ms": 14 if star else 7, "mec": "black", "mew": 0.6, "zorder": 5}
                axes.plot(row.features[0], 100 * row.accuracy[0], "*" if star else "D", color=own, **style)
    axes.set_ylim(bottom=bottom)
    axes.set(
        xlabel="Number of features selected (mean over seeds)",
        ylabel="Test accuracy after refitting, %",
        title=f"{everything.settings[0]['dataset']}: what {len(everything.seeds)} seeds lose by using fewer features",
    )


def _draw_features(axes: Any, shares: Shares) -> None:
    """The area of a point is how often a feature was selected by a method."""
    order = np.argsort(np.round(next(iter(shares.methods.values())), 2), kind="stable")
    for i, (method, share) in enumerate(shares.methods.items()):
        own = colour(METHODS, method)
        axes.scatter(np.full(len(order), i), np.arange(len(order)), s=60 * share[order], color=own)
    axes.set_yticks(range(len(order)), [shares.features[i] for i in order], fontsize=6 if len(order) > 20 else 8)
    axes.set_xticks(range(len(shares.methods)), [name.replace("-", "\n") for name in shares.methods], fontsize=8)
    axes.set_xlim(-0.6, len(shares.methods) - 0.4)
    axes.set_title("Features selected at the stars (area: how often)")

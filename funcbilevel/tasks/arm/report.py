"""What is shown of the records: energy at equal tracking, and what it costs to train again after a change."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcbilevel.tasks._experiment import store
from funcbilevel.tasks._experiment import table as tables
from funcbilevel.tasks._experiment.figures import drawn
from funcbilevel.tasks._experiment.methods import colour, in_order, label
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.select import best, by_settings
from funcbilevel.tasks._experiment.statistics import mean_interval, pareto_front
from funcbilevel.tasks._experiment.store import Record, Store
from funcbilevel.tasks.arm.methods import ALONE, CHANGES, CONTROL, METHODS
from funcbilevel.tasks.arm.problem import SHOWN, TEST, TORQUE, ZONE, Arm, end_point, held_out

EQUAL = 0.09
"""Tracking at which the table compares: 3 cm, in (10 cm)^2."""


def report(directory: Path) -> Report:
    """The tables and the figure of a directory's records."""
    where = Store(directory, "arm")
    runs = store.records(where)
    rows = summarise(runs)
    changed = summarise_changes(store.records(where._replace(name="changes")))
    return Report(
        _shown(rows, changed),
        {"table.md": markdown(rows, changed)},
        {"arm.png": partial(draw, rows, changed, shown_paths(runs, store.beside(where, "paths")))},
    )


# Tracking against energy, both to be small.


def points(cells: Sequence[Mapping[str, float]], prefix: str = "") -> np.ndarray[Any, Any]:
    """(tracking, energy) of each, [n, 2]; inf for a run that broke."""
    array = np.array([(cell[f"{prefix}tracking"], cell[f"{prefix}energy"]) for cell in cells], float).reshape(-1, 2)
    return np.where(np.isfinite(array).all(axis=1, keepdims=True), array, np.inf)


def selected(cells: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The settings on the validation episodes' front, by their tracking error on the test episodes."""
    finite = [cell for cell in cells if np.isfinite([points([cell]), points([cell], "validation_")]).all()]
    on_front = pareto_front(-points(finite, "validation_")) if finite else []
    return sorted((cell for cell, on in zip(finite, on_front, strict=True) if on), key=lambda cell: cell["tracking"])


def at_tracking(cells: Sequence[Mapping[str, float]], name: str, tracking: float) -> float:
    """A metric of the `selected` cells, interpolated linearly in log tracking; NaN outside their range."""
    x = np.log([cell["tracking"] for cell in cells])
    y = [cell[name] for cell in cells]
    return float(np.interp(np.log(tracking), x, y, np.nan, np.nan)) if len(x) else float("nan")


def energy_ratio(front: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Energy over that of another front at equal tracking error: geometric mean over the range that both reach.

    Fronts, [k, 2], are interpolated linearly in the logarithms of (tracking, energy). NaN if the ranges are disjoint.
    """
    if min(len(front), len(other)) < 2:
        return float("nan")
    (x, y), (x_other, y_other) = np.log(front).T, np.log(other).T
    low, high = max(x[0], x_other[0]), min(x[-1], x_other[-1])
    if low >= high:
        return float("nan")
    grid = np.linspace(low, high, 101)
    return float(np.exp(np.mean(np.interp(grid, x, y) - np.interp(grid, x_other, y_other))))


class Row(NamedTuple):
    """One method.

    Attributes:
        method: its name.
        trials: settings per seed.
        broken: how many of its runs ended with NaN.
        fronts: seed -> the runs on the validation front.
        ratio: energy over the control's at equal tracking, seed -> geometric mean over the range that both reach.
        seconds: of training all seeds, compilation included.
    """

    method: str
    trials: int
    broken: int
    fronts: dict[int, list[Mapping[str, float]]]
    ratio: dict[int, float]
    seconds: float


def summarise(runs: Sequence[Record]) -> list[Row]:
    """One row per method, in the order of `METHODS`."""
    by_method: dict[str, dict[int, list[dict[str, float]]]] = {}
    for record in sorted(runs, key=lambda record: record["seed"]):
        by_method.setdefault(record["method"], {}).setdefault(record["seed"], []).append(store.values(record))
    fronts = {m: {s: selected(cells) for s, cells in seeds.items()} for m, seeds in by_method.items()}
    control = {seed: points(front) for seed, front in fronts.get(CONTROL, {}).items()}

    def row(method: str) -> Row:
        cells = [cell for group in by_method[method].values() for cell in group]
        return Row(
            method,
            max(map(len, by_method[method].values())),
            int(np.sum(~np.isfinite(points(cells)).all(axis=1))),
            fronts[method],
            {s: energy_ratio(points(front), control[s]) for s, front in fronts[method].items() if s in control},
            sum({cell["sweep_seconds"] for cell in cells}),
        )

    return [row(method) for method in in_order(METHODS, by_method)]


def validation_cost(record: Mapping[str, Any]) -> float:
    """Tracking + w (energy + intrusion) on the validation episodes."""
    return _cost(record, "validation_")


def _cost(record: Mapping[str, Any], prefix: str = "") -> float:
    of = store.values(record)
    return of[f"{prefix}tracking"] + record["settings"]["weight"] * (of[f"{prefix}energy"] + of[f"{prefix}intrusion"])


class Changed(NamedTuple):
    """Controllers of a method, some steps after a change; costs on the test episodes, one per seed.

    Attributes:
        method, change, updates: of which controllers, what changed, how many steps ago.
        untrained: with the controllers as they were.
        follower, both: with the follower alone trained again, or both players.
    """

    method: str
    change: str
    updates: int
    untrained: list[float]
    follower: list[float]
    both: list[float]


WAYS = ((False, False), (False, True), (True, True))
"""Whether leader and follower are trained again: neither, the follower alone, both."""


def summarise_changes(records: Sequence[Record]) -> list[Changed]:
    """By method, change and number of steps; of the rates those that are best on the validation episodes."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        key = record["method"], record["settings"]["change"], record["settings"]["updates"]
        groups.setdefault(key, []).append(record)
    methods, changes = in_order(METHODS, (method for method, _, _ in groups)), [change.name for change in CHANGES]

    def order(key: tuple[str, str, int]) -> tuple[Any, ...]:
        method, change, updates = key
        return methods.index(method), changes.index(change) if change in changes else len(changes), change, updates

    rows: list[Changed] = []
    for key in sorted(groups, key=order):
        ways = [_best([record for record in groups[key] if _moved(record) == way]) for way in WAYS]
        seeds = sorted(set.intersection(*map(set, ways)))
        if seeds:
            rows.append(Changed(*key, *([costs[seed] for seed in seeds] for costs in ways)))
    return rows


def _moved(record: Record) -> tuple[bool, bool]:
    return record["settings"]["leader_rate"] > 0, record["settings"]["follower_rate"] > 0


def _best(records: Sequence[Record]) -> dict[int, float]:
    """seed -> cost on the test episodes, at the rates with the least cost on the validation episodes."""
    scores = by_settings(records, validation_cost)
    key = best(scores) if scores else None
    return {record["seed"]: _cost(record) for record in records if store.settings_key(record["settings"]) == key}


HEADER = (
    "method",
    "seeds",
    "trials",
    "broken",
    "energy / control's [95% CI]",
    "energy at 3 cm",
    "inside at 3 cm",
    "alone at 3 cm",
    "seconds",
)
CHANGES_HEADER = ("change", "method", "steps", "untrained", "follower", "both", "follower / both [95% CI]")


def _mean_at(row: Row, name: str) -> float:
    """The mean over the seeds of a metric at equal tracking."""
    return float(np.mean([at_tracking(front, name, EQUAL) for front in row.fronts.values()]))


def _ratio(row: Row) -> str:
    values = [value for value in row.ratio.values() if np.isfinite(value)]
    if row.method == CONTROL or not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    lost = f", {len(values)} seeds" if len(values) < len(row.ratio) else ""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(values)) + lost


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        str(len(row.fronts)),
        str(row.trials),
        str(row.broken),
        _ratio(row),
        f"{TORQUE**2 * _mean_at(row, 'energy'):.2f}",
        f"{100 * _mean_at(row, 'inside'):.1f}%",
        f"{10 * _mean_at(row, 'alone') ** 0.5:.1f} cm",
        f"{row.seconds:.0f}",
    )


def _change_cells(row: Changed) -> tuple[str, ...]:
    ratio = mean_interval(list(np.array(row.follower) / np.array(row.both)))
    return (
        row.change,
        row.method,
        str(row.updates),
        *(f"{np.mean(values):.3f}" for values in (row.untrained, row.follower, row.both)),
        "{:.2f} [{:.2f}, {:.2f}]".format(*ratio),
    )


def markdown(rows: Sequence[Row], changed: Sequence[Changed]) -> str:
    """The tables in Markdown."""
    table = tables.markdown(HEADER, map(_cells, rows))
    return table + ("\n" + tables.markdown(CHANGES_HEADER, map(_change_cells, changed)) if changed else "")


def _shown(rows: Sequence[Row], changed: Sequence[Changed]) -> tables.page:
    note = (
        "Test episodes, on fronts that validation chose. energy: at equal tracking over that of lagrangian (the "
        "weighted reward), mean over the range that both reach, with its 95% bootstrap interval over seeds; at an "
        "error of 3 cm the mean squared torque in (N m)^2, the time outside the zone, and the error with the follower "
        "switched off. table.md has more."
    )
    parts: list[Any] = [
        tables.terminal(
            ("method", "energy ratio", "at 3 cm", "inside", "alone"),
            [(line[0], *line[4:8]) for line in map(_cells, rows)],
        ),
        note,
    ]
    if changed:
        lines = list(map(_change_cells, changed))
        header = ("change", "method", "steps", "before", "follower", "both", "ratio")
        after = "Weighted cost after training again for so many steps: the follower alone, or both players."
        parts += [tables.terminal(header, lines, left=("change", "method")), after]
    return tables.page(*parts)


def shown_paths(
    runs: Sequence[Record], lines: Mapping[store.Key, Mapping[str, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    """method -> angles [episodes, steps, 2] of the run whose validation error is nearest to the same, 3 cm."""

    def distance(record: Record) -> float:
        return abs(float(np.log(store.values(record)["validation_tracking"] / EQUAL)))

    drawable = [run for run in runs if store.key_of(run) in lines and np.isfinite(distance(run))]
    nearest = {run["method"]: lines[store.key_of(run)] for run in sorted(drawable, key=distance, reverse=True)}
    return {method: np.array(line["angles"]) for method, line in nearest.items()}


def draw(
    rows: Sequence[Row], changed: Sequence[Changed], paths: Mapping[str, np.ndarray[Any, Any]], path: Path
) -> None:
    """Energy against tracking error, ratios at equal error, the arm's paths, and what a change costs, as a PNG."""
    first = [row for row in changed if row.change == CHANGES[0].name]
    with drawn(path, figsize=(11, 8) if first else (15, 4.2)) as figure:
        panels: Any = figure.subplots(2, 2).ravel() if first else figure.subplots(1, 3)
        _draw_fronts(panels[0], rows)
        _draw_ratios(panels[1], [row for row in rows if row.method != CONTROL])
        _draw_paths(panels[2], paths)
        if first:
            _draw_changes(panels[3], first)


def _draw_fronts(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        for i, front in enumerate(row.fronts.values()):
            x, y = points(front).T
            axes.plot(
                10 * np.sqrt(x),
                TORQUE**2 * y,
                color=colour(METHODS, row.method),
                marker="o",
                ms=2.5,
                lw=0.9,
                alpha=0.7,
                ls=":" if row.method == ALONE else "-",
                label=None if i else label(METHODS, row.method),
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xticks([1, 2, 3, 5, 10])
    axes.set_yticks([1, 2, 5, 10, 20])
    axes.set(
        xlabel="Root mean square tracking error (cm)",
        ylabel="Mean squared torque ((N m)²)",
        title="Energy against tracking error: a line is a seed's front",
    )
    axes.legend(frameon=False, fontsize=8)


def _draw_ratios(axes: Any, rows: Sequence[Row]) -> None:
    shown = [row for row in reversed(rows) if np.isfinite(list(row.ratio.values())).any()]
    for i, row in enumerate(shown):
        values = np.array([value for value in row.ratio.values() if np.isfinite(value)])
        mean, low, high = mean_interval(list(values))
        axes.plot([low, high], [i, i], color=colour(METHODS, row.method), lw=2)
        axes.scatter(values, np.full(len(values), i), s=10, color=colour(METHODS, row.method), alpha=0.5, lw=0)
        axes.plot(mean, i, "o", color=colour(METHODS, row.method), ms=6)
    axes.axvline(1.0, color=colour(METHODS, CONTROL), lw=1, label=label(METHODS, CONTROL))
    axes.set_yticks(range(len(shown)), [label(METHODS, row.method).replace(", ", ",\n") for row in shown])
    axes.set_ylim(-0.6, len(shown) - 0.2)
    axes.set(
        xlabel="Energy over that of the weighted reward's front (less is better)",
        title="At equal tracking error: seeds, mean and 95% interval",
    )
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_paths(axes: Any, paths: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """The end point's paths along the longest of the references, and the arm at three times."""
    references = np.asarray(held_out(TEST).position[:SHOWN])
    episode = int(np.argmax(np.sum(np.linalg.norm(np.diff(references, axis=1), axis=-1), axis=1)))
    axes.axvspan(ZONE, 1.0, color="C1", alpha=0.12, lw=0)
    axes.annotate("zone of people", (ZONE + 0.01, 0.97), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    axes.plot(*references[episode].T, color="0.2", lw=3, alpha=0.3, label="reference")
    for method, width in ((CONTROL, 4.0), ("alternating", 2.2), ("aid-cg", 0.8)):  # they may coincide
        if method in paths:
            angles = jnp.asarray(paths[method][episode])
            ends = np.asarray(jax.vmap(lambda q: end_point(Arm(), q))(angles))
            axes.plot(*ends.T, color=colour(METHODS, method), lw=width, label=label(METHODS, method))
            if method == CONTROL:
                for q in angles[:: len(angles) // 2]:
                    elbow = 0.5 * np.array([np.cos(q[0]), np.sin(q[0])])
                    end = np.asarray(end_point(Arm(), q))
                    axes.plot(*np.array([(0.0, 0.0), elbow, end]).T, color="0.75", lw=2, marker="o", ms=3, zorder=0)
    axes.set_aspect("equal")
    axes.set(xlim=(-0.3, 1.1), ylim=(-0.65, 0.25))
    axes.set(xlabel="x (m)", ylabel="y (m)", title="A test reference, at a mean error of about 3 cm")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)  # not over the zone


def _draw_changes(axes: Any, changed: Sequence[Changed]) -> None:
    steps = [0, *sorted({row.updates for row in changed})]
    for method in dict.fromkeys(row.method for row in changed):
        of = [row for row in changed if row.method == method]
        x, own = [0, *(steps.index(row.updates) for row in of)], colour(METHODS, method)
        for kind, style, moved in (("follower", "-", "its follower"), ("both", "--", "both networks")):
            values = [of[0].untrained, *(getattr(row, kind) for row in of)]
            means, lows, highs = np.array([mean_interval(sample) for sample in values]).T
            axes.plot(x, means, style, color=own, marker="o", ms=3, label=f"{label(METHODS, method)}: {moved}")
            axes.fill_between(x, lows, highs, color=own, alpha=0.15, lw=0)
    axes.set_xticks(range(len(steps)), list(map(str, steps)))
    axes.set_ylim(bottom=0)
    axes.set(
        xlabel="Steps of training after the change",
        ylabel="tracking + w (energy + intrusion)",
        title=f"A payload of {CHANGES[0].payload:g} kg is added, then players train again",
    )
    axes.legend(frameon=False, fontsize=8)

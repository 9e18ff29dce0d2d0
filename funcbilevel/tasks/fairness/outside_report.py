"""Networks beside methods from outside: one table with intervals, and the fronts with a name at each."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.figures import drawn
from funcbilevel.tasks._experiment.methods import colour
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.statistics import Interval, mean_interval, pareto_front
from funcbilevel.tasks._experiment.store import Record, values
from funcbilevel.tasks.data.dataset import Array
from funcbilevel.tasks.fairness.methods import LAGRANGIAN, SINGLE
from funcbilevel.tasks.fairness.outside import ALONE, NEED_ATTRIBUTE, OF_TOLERANCE, ON_NETWORK
from funcbilevel.tasks.fairness.summary import ALL_ROWS, Row, label, points, reference, summarise


def report(runs: Sequence[Record]) -> Report:
    """The table and the figure of records among which are some of methods from outside."""
    names = {record["method"] for record in runs}
    against = next((name for name in (LAGRANGIAN, ON_NETWORK) if name in names), "")
    rows = summarise(runs, True, against=against)
    removed = any(record["settings"].get("attribute") == "removed" for record in runs)
    notes = _notes(runs, against, removed)
    text = table.markdown(header(against), _lines(rows, removed, against)) + "\n" + "\n\n".join(notes) + "\n"
    return Report(
        _shown(rows, removed, notes), {"table.md": text}, {"fairness.png": partial(draw, runs, rows, removed)}
    )


def header(against: str) -> tuple[str, ...]:
    """The columns' names."""
    shared = ("method", "trials", "seeds", "setting", "accuracy", "parity gap", "odds gap", "calibration error")
    return (*shared, "area x1000", *([f"less {against}'s"] if against else []))


NOT_AVAILABLE = "not available: needs the attribute when it decides"


def _lines(rows: Sequence[Row], removed: bool, against: str) -> list[tuple[str, ...]]:
    width = max((len(_cells(row, against)) for row in rows), default=9)
    lines = [_cells(row, against) for row in rows]
    if removed:
        lines += [(name, *[""] * 3, NOT_AVAILABLE, *[""] * (width - 5)) for name in NEED_ATTRIBUTE]
    return lines


def _interval(of: Interval, digits: int, scale: float = 1.0, sign: str = "") -> str:
    mean, low, high = (scale * value for value in of)
    form = f"{sign}.{digits}f"
    return "" if np.isnan(mean) else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _setting(row: Row) -> str:
    if row.label in (SINGLE, *ALONE):
        return ""
    return f"{'tolerance' if row.label in OF_TOLERANCE else 'eta'} {row.eta:g}"


def _cells(row: Row, against: str) -> tuple[str, ...]:
    none: Interval = (np.nan, np.nan, np.nan)
    of = [row.intervals.get(name, none) for name in ("accuracy", "dp_gap", "eo_gap", "calibration_error")]
    above = _interval(mean_interval(list(row.above.values())), 2, 1e3)
    less = "" if row.above_difference is None else _interval(row.above_difference, 2, 1e3, "+")
    return (
        *(row.label, str(row.trials), str(row.seeds), _setting(row)),
        *(_interval(interval, 3) for interval in of),
        *((above, less) if against else (above,)),
    )


def _notes(runs: Sequence[Record], against: str, removed: bool) -> list[str]:
    accuracy, fair = reference(runs)
    settings = runs[0]["settings"]
    divided = "one division into training and validation part for all seeds, and one test part"
    if settings["dataset"] == "synthetic":
        divided = "other data for each seed"
    elif settings.get("redivide"):
        divided = "another division into training and validation part for each seed, and one test part for all"
    epochs = next((f", {r['settings']['num_epochs']} epochs" for r in runs if "num_epochs" in r["settings"]), "")
    notes = [
        f"{settings['dataset']} by {' and '.join(settings['attributes'])}, the attribute "
        f"{'removed from' if removed else 'among'} the features{epochs}; {divided}. "
        "Means over the seeds and 95% bootstrap intervals, on the test part. A row shows the trial with the largest "
        "validation accuracy less parity gap.",
        "area: of (accuracy, 1 - parity gap), of the trials on the validation part's front, above the accuracy of the "
        f"majority's label ({accuracy:.3f}) and a gap of {1 - fair:.3f}, that of {SINGLE}."
        + (f" Differences to {against} are on the same seeds." if against else ""),
        "calibration error: expected, in ten bins, of the scores below the decisions; empty for methods whose "
        "decisions have none.",
    ]
    if removed:
        notes.append(f"Not available, as they need the attribute when they decide: {', '.join(NEED_ATTRIBUTE)}.")
    return notes


def _shown(rows: Sequence[Row], removed: bool, notes: Iterable[str]) -> table.page:
    names = ["method", "accuracy", "gap", "odds", "calibr.", "area x1000"]

    def line(row: Row) -> tuple[str, ...]:
        calibration = row.intervals.get("calibration_error", (np.nan,))[0]
        area = 1e3 * float(np.mean(list(row.above.values())))
        means = (row.accuracy, row.dp_gap, row.eo_gap)
        shown = "" if np.isnan(calibration) else f"{calibration:.3f}"
        return (row.label, *(f"{mean:.3f}" for mean in means), shown, f"{area:.2f}")

    lines = [line(row) for row in rows]
    lines += [(name, "-", "-", "-", "-", "-") for name in NEED_ATTRIBUTE] if removed else []
    return table.page(table.terminal(names, lines), *notes, "table.md has intervals.")


# The figure.


def trial_means(runs: Sequence[Record]) -> Array:
    """(test accuracy, parity gap) of each trial of a method, the mean over its seeds, [trials, 2]."""
    trials: dict[str, list[Record]] = {}
    for record in runs:
        trials.setdefault(store.settings_key(record["settings"]), []).append(record)
    means = [points([values(record) for record in of_trial]).mean(axis=0) for of_trial in trials.values()]
    return np.array([(accuracy, 1 - fair) for accuracy, fair in means])


def joined(means: Array, majority: float) -> Array:
    """Those of the points that a line joins, by ascending gap: the front, less what is about the majority's label."""
    front = pareto_front(np.stack([means[:, 0], -means[:, 1]], axis=1)) & (means[:, 0] > majority + 0.01)
    chosen = means[front]
    return chosen[np.argsort(chosen[:, 1])]


def draw(runs: Sequence[Record], rows: Sequence[Row], removed: bool, path: Path) -> None:
    """Test accuracy against gap of every trial, each method's name at its points, and areas, as a PNG."""
    majority = reference(runs)[0]
    with drawn(path, figsize=(12, 5)) as figure:
        plane, areas = figure.subplots(1, 2, width_ratios=(1.7, 1))
        of = {row.label: trial_means([record for record in runs if label(record) == row.label]) for row in rows}
        for name, means in of.items():
            line, own = joined(means, majority), colour(ALL_ROWS, name)
            dashes = "--" if name in NEED_ATTRIBUTE else "-"
            plane.plot(line[:, 1], line[:, 0], color=own, lw=1.2, ls=dashes, drawstyle="steps-post")
            plane.scatter(means[:, 1], means[:, 0], s=22, color=own, lw=0, zorder=3)
        every = np.concatenate(list(of.values()))
        low, high = every[:, 0].min(), every[:, 0].max()
        room = 0.08 * (high - low) + 1e-3
        plane.set_ylim(min(low, majority) - room if low < majority + 0.02 else low - room, high + room)
        plane.set_xlim(-0.004, 1.06 * every[:, 1].max() + 1e-3)
        if low < majority + 0.02:
            plane.axhline(majority, color="0.7", lw=0.8, ls=":")
            plane.annotate(
                "the majority's label for everybody",
                (0.98, majority),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color="0.5",
                fontsize=7.5,
            )
        plane.set(
            xlabel="Demographic parity gap of decisions (test)",
            ylabel="Accuracy (test)",
            title="Every trial, the mean over its seeds (dashed: by thresholds for each group)",
        )
        _name_points(plane, of, majority)
        _draw_areas(areas, rows)
        if removed:
            text = "Not available without the attribute: " + ", ".join(NEED_ATTRIBUTE)
            figure.supxlabel(text, fontsize=8, color="0.4")


def _name_points(axes: Any, of: dict[str, Array], majority: float) -> None:
    """Each method's name beside one of its points, where it is on no other name and on the fewest points and lines."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    extent, start = np.array([right - left, top - bottom]), np.array([left, bottom])

    def place(points_of: Array) -> Array:
        return (points_of[:, ::-1] - start) / extent

    obstacles: list[Array] = []
    for means in of.values():
        obstacles.append(place(means))
        line = place(joined(means, majority))
        steps = np.linspace(0, 1, 25)[:, None]
        obstacles += [a + steps * (b - a) for a, b in pairwise(line)]
    marks = np.concatenate(obstacles)
    boxes: list[Array] = []
    for name, means in of.items():
        size = np.array([0.0098 * len(name), 0.038])
        line = joined(means, majority)
        own = place(line if len(line) else means)
        best: tuple[float, Array, Array] | None = None
        for anchor in own:
            for distance in (0.02, 0.05, 0.09, 0.14):
                for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False):
                    centre = anchor + (distance + np.abs([np.cos(angle), 0.6 * np.sin(angle)]) * size / 2) * np.array(
                        [np.cos(angle), np.sin(angle)]
                    )
                    box = np.array([centre - size / 2, centre + size / 2])
                    outside = np.maximum(0, -box[0]).sum() + np.maximum(0, box[1] - 1).sum()
                    clash = sum(np.all((box[0] < other[1]) & (other[0] < box[1])) for other in boxes)
                    hidden = np.all((marks > box[0] - 0.006) & (marks < box[1] + 0.006), axis=1).sum()
                    cost = 1e4 * outside + 100.0 * clash + 3.0 * hidden + 40.0 * distance
                    if best is None or cost < best[0]:
                        best = (cost, box, anchor)
        assert best is not None
        _, box, anchor = best
        boxes.append(box)
        near = np.clip(anchor, box[0], box[1])
        own_colour = colour(ALL_ROWS, name)
        if np.linalg.norm(near - anchor) > 0.03:
            x, y = np.stack([anchor, near], axis=1)
            axes.plot(x, y, color=own_colour, lw=0.6, transform=axes.transAxes)
        x, y = box.mean(axis=0)
        axes.text(x, y, name, ha="center", va="center", fontsize=7.5, color=own_colour, transform=axes.transAxes)


def _draw_areas(axes: Any, rows: Sequence[Row]) -> None:
    for i, row in enumerate(reversed(rows)):
        own, areas = colour(ALL_ROWS, row.label), 1e3 * np.array(list(row.above.values()))
        mean, low, high = mean_interval(areas.tolist())
        axes.plot([low, high], [i, i], color=own, lw=2)
        axes.scatter(areas, np.full(len(areas), i), s=8, color=own, alpha=0.4, lw=0)
        axes.plot(mean, i, "o", color=own, ms=5)
        axes.annotate(f"{mean:.1f}", (mean, i), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.set(xlabel="Area above the reference point, x1000", title="Area: seeds, mean and 95% interval")

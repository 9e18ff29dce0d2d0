"""Returns over seeds of every method and setting: table, figure and an animation of the best run."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.errors import UserError
from funcbilevel.tasks._experiment.figures import drawn
from funcbilevel.tasks._experiment.methods import colour, in_order
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.store import Record, Store
from funcbilevel.tasks.rl.methods import CURVES, METHODS
from funcbilevel.tasks.rl.pictures import animate

Array: TypeAlias = np.ndarray[Any, Any]


def report(task: str, directory: Path) -> Report:
    """The report of the runs in a directory.

    Raises:
        UserError: there are none.
    """
    where = Store(directory, task)
    records = store.records(where)
    if not records:
        raise UserError(f"{where.path} holds no finished runs yet; run the same command again to go on.")
    rows = summarise(records, store.beside(where, "curves"))
    figures = {f"{task}.png": partial(draw, rows, task)}
    if states := episode(records, store.beside(where, "episodes")):
        figures[f"{task}.gif"] = partial(animate, task, states)
    return Report(_shown(rows, task), {"table.md": table.markdown(HEADER, map(_cells, rows))}, figures)


# Statistics.


def interquartile_mean(x: Array, axis: int = 0) -> Any:
    """The mean of the middle half, as in rliable: a quarter of the values, rounded down, is left out on either side."""
    x, cut = np.sort(x, axis=axis), x.shape[axis] // 4
    return np.mean(np.take(x, np.arange(cut, x.shape[axis] - cut), axis=axis), axis=axis)


def bootstrap(x: Array, resamples: int = 2000) -> Array:
    """The interquartile means of resampled seeds, [seeds, ...] -> [resamples, ...], with a fixed seed."""
    index = np.random.default_rng(0).integers(0, len(x), (resamples, len(x)))
    return interquartile_mean(x[index], axis=1)


def interval(x: Array) -> Any:
    """The 95% percentile bootstrap interval of the interquartile mean over seeds, [seeds, ...] -> [2, ...]."""
    return np.quantile(bootstrap(x), (0.025, 0.975), axis=0)


# Rows.


class Row(NamedTuple):
    """One method in one setting over its seeds.

    Attributes:
        method, settings: as recorded.
        seeds: how many.
        auc, final: return_auc and final_return, [seeds].
        step: [points]; none if there are no curves beside the records.
        curves: name -> [seeds, points], of `CURVES`.
    """

    method: str
    settings: dict[str, Any]
    seeds: int
    auc: Array
    final: Array
    step: Array
    curves: dict[str, Array]


def summarise(records: Iterable[Record], curves: dict[store.Key, dict[str, Any]]) -> list[Row]:
    """One row per setting and method, by length, width and the order of `METHODS`."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        groups.setdefault((record["method"], store.settings_key(record["settings"])), []).append(record)
    order = in_order(METHODS, sorted(method for method, _ in groups))
    rows = [_row(groups[group], curves) for group in sorted(groups)]
    return sorted(rows, key=lambda row: (*_panel(row), order.index(row.method)))


def _row(group: Sequence[Record], curves: dict[store.Key, dict[str, Any]]) -> Row:
    metrics = [store.values(record) for record in group]
    auc, final = (np.array([values[name] for values in metrics]) for name in ("return_auc", "final_return"))
    beside = [curves[key] for record in group if (key := store.key_of(record)) in curves]
    of_name = {name: np.array([line[name] for line in beside], float) for name in CURVES}
    step = np.array(beside[0]["step"] if beside else [])
    return Row(group[0]["method"], group[0]["settings"], len(group), auc, final, step, of_name)


def _panel(row: Row) -> tuple[int, int]:
    return row.settings["steps"], row.settings["model_width"]


def episode(records: Iterable[Record], episodes: dict[store.Key, dict[str, Any]]) -> list[list[float]]:
    """The states of an episode of the run that ended with the largest return, of those that have one."""
    runs = {key: store.values(record) for record in records if (key := store.key_of(record)) in episodes}
    best = max(sorted(runs), key=lambda key: np.nan_to_num(runs[key]["evaluation_return"], nan=-np.inf), default=None)
    return [] if best is None else episodes[best]["states"]


# What is shown of them.

HEADER = ("method", "model", "lr", "seeds", "mean", "AUC", "95% CI", "final", "95% CI")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        f"{row.settings['model_width']}, {row.settings['steps'] / 1000:g}k",
        f"{row.settings['inner_learning_rate']:g}" + ("" if row.settings["warm_adam"] else "*"),
        str(row.seeds),
        f"{np.mean(row.auc):.0f}",
        f"{interquartile_mean(row.auc):.0f}",
        "{:.0f}..{:.0f}".format(*interval(row.auc)),
        f"{interquartile_mean(row.final):.0f}",
        "{:.0f}..{:.0f}".format(*interval(row.final)),
    )


def _shown(rows: Sequence[Row], task: str) -> table.page:
    note = (
        f"Evaluation returns on {task}. mean and AUC: averaged over training, by mean and by interquartile mean over "
        "seeds; final: over the last tenth, by interquartile mean. model: hidden width and environment steps; lr: of "
        "Adam on the Q-networks, with * restarted at every step."
    )
    return table.page(table.terminal(HEADER, map(_cells, rows)), note)


def _label(row: Row, same: Sequence[Row]) -> str:
    """The method, and those of its settings in which its runs differ."""
    differing = [name for name in row.settings if len({str(other.settings.get(name)) for other in same}) > 1]
    return ", ".join([row.method, *(f"{name.replace('_', ' ')} {row.settings[name]}" for name in differing)])


def draw(rows: Sequence[Row], task: str, path: Path) -> None:
    """Evaluation return by environment step, a panel for each length and width, one below the other, as a PNG."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter  # noqa: PLC0415

    panels = sorted({_panel(row) for row in rows})
    with drawn(path, dpi=130, figsize=(7.4, 2.7 * len(panels) + 0.8)) as figure:
        grid: Any = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, panel in zip(grid, panels, strict=True):
            shown = [row for row in rows if _panel(row) == panel]
            _draw_panel(axes, shown)
            steps, width = panel
            seeds = " or ".join(map(str, sorted({row.seeds for row in shown})))
            axes.set(
                title=f"{task}: model of width {width}, {seeds} seeds",
                ylabel="Evaluation return",
                xlim=(0, steps),
            )
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        grid[-1].set(xlabel="Environment steps")
        legend: dict[str, Any] = {}
        for axes in grid:
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
                legend.setdefault(label, line)
        title = "interquartile mean over seeds, 95% bootstrap interval"
        place: Any = {"loc": "outside lower center", "ncols": 4, "frameon": False}
        figure.legend(legend.values(), legend.keys(), title=title, **place)


def _draw_panel(axes: Any, shown: Sequence[Row]) -> None:
    """The rows of one length and width; further settings of a method are dashed."""
    for i, row in enumerate(shown):
        if not len(row.step):
            continue
        same = [other for other in shown if other.method == row.method]
        style: Any = {"color": colour(METHODS, row.method)}
        line: Any = {"ls": "-" if row.method not in {other.method for other in shown[:i]} else "--"}
        returns = row.curves[CURVES[0]]
        axes.plot(row.step, interquartile_mean(returns), lw=1.6, label=_label(row, same), **style, **line)
        axes.fill_between(row.step, *interval(returns), alpha=0.1, lw=0, **style)

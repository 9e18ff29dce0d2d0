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
from funcbilevel.tasks._experiment.statistics import Interval, mean_interval, paired_p_value
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
    pairs = compare(rows)
    figures = {f"{task}.png": partial(draw, rows, task)}
    if states := episode(records, store.beside(where, "episodes")):
        figures[f"{task}.gif"] = partial(animate, task, states)
    texts = {"table.md": table.markdown(HEADER, map(_cells, rows))}
    texts |= {"paired.md": table.markdown(PAIRED, map(_paired_cells, pairs))} if pairs else {}
    return Report(_shown(rows, pairs, task), texts, figures)


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
        seeds: of the runs, in order.
        broke: in how many runs something was not finite.
        auc, final: return_auc and final_return, [seeds].
        step: [points]; none if there are no curves beside the records.
        curves: name -> [seeds, points], of `CURVES`.
    """

    method: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    broke: int
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
    seeds = tuple(record["seed"] for record in group)
    broke = sum(not all(values.get(flag, 1.0) == 1.0 for flag in FLAGS) for values in metrics)
    return Row(group[0]["method"], group[0]["settings"], seeds, broke, auc, final, step, of_name)


def _panel(row: Row) -> tuple[int, int]:
    return row.settings["steps"], row.settings["model_width"]


def episode(records: Iterable[Record], episodes: dict[store.Key, dict[str, Any]]) -> list[list[float]]:
    """The states of an episode of the run that ended with the largest return, of those that have one."""
    runs = {key: store.values(record) for record in records if (key := store.key_of(record)) in episodes}
    best = max(sorted(runs), key=lambda key: np.nan_to_num(runs[key]["evaluation_return"], nan=-np.inf), default=None)
    return [] if best is None else episodes[best]["states"]


FLAGS = ("inner_finite", "outer_finite", "adjoint_finite")
REFERENCE = "mle"


class Pair(NamedTuple):
    """A method beside maximum likelihood with the same world model, on the seeds that both have.

    Attributes:
        row: of the method.
        seeds: how many.
        difference: (mean, low, high) of its return, averaged over training, less that of maximum likelihood.
        ratio: (value, low, high) of the interquartile means; the seeds of a resample are the same for both.
        p_value: of the two-sided Wilcoxon signed-rank test; None for fewer than five seeds.
    """

    row: Row
    seeds: int
    difference: Interval
    ratio: Interval
    p_value: float | None


def compare(rows: Sequence[Row]) -> list[Pair]:
    """Each row beside that of maximum likelihood in its panel, if there is one, and one alone."""
    pairs: list[Pair] = []
    for row in rows:
        references = [other for other in rows if other.method == REFERENCE and _panel(other) == _panel(row)]
        if len(references) == 1 and row.method != REFERENCE:
            (reference,) = references
            if common := sorted({*row.seeds} & {*reference.seeds}):
                pairs.append(_pair(row, *(_of_seeds(each, common) for each in (row, reference))))
    return pairs


def _of_seeds(row: Row, seeds: Sequence[int]) -> Array:
    return row.auc[[row.seeds.index(seed) for seed in seeds]]


def _pair(row: Row, x: Array, reference: Array) -> Pair:
    ratios = bootstrap(x) / bootstrap(reference)  # by a fixed seed, so that both resample the same
    low, high = np.quantile(ratios, (0.025, 0.975))
    ratio = (float(interquartile_mean(x) / interquartile_mean(reference)), float(low), float(high))
    return Pair(row, len(x), mean_interval((x - reference).tolist()), ratio, paired_p_value(x - reference))


# What is shown of them.

HEADER = ("method", "model", "lr", "n", "broke", "AUC", "95% CI", "final", "95% CI")
PAIRED = ("method", "model", "n", "- MLE", "95% CI", "/ MLE", "95% CI", "p")


def _model(row: Row) -> str:
    return f"{row.settings['model_width']}, {row.settings['steps'] / 1000:g}k"


def _rate(row: Row) -> str:
    return f"{row.settings['inner_learning_rate']:g}" + ("" if row.settings["warm_adam"] else "*")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        _model(row),
        _rate(row),
        str(len(row.seeds)),
        str(row.broke),
        f"{interquartile_mean(row.auc):.0f}",
        "{:.0f}..{:.0f}".format(*interval(row.auc)),
        f"{interquartile_mean(row.final):.0f}",
        "{:.0f}..{:.0f}".format(*interval(row.final)),
    )


def _paired_cells(pair: Pair) -> tuple[str, ...]:
    (difference, *ends), (ratio, low, high) = pair.difference, pair.ratio
    return (
        pair.row.method,
        _model(pair.row),
        str(pair.seeds),
        f"{difference:+.0f}",
        "{:+.0f}..{:+.0f}".format(*ends),
        f"{ratio:.2f}",
        f"{low:.2f}..{high:.2f}",
        "" if pair.p_value is None else f"{pair.p_value:.2g}",
    )


def _shown(rows: Sequence[Row], pairs: Sequence[Pair], task: str) -> table.page:
    note = (
        f"Evaluation returns on {task}. AUC: averaged over training; final: over the last tenth; both by interquartile "
        "mean over n seeds. model: hidden width and environment steps; lr: of Adam on the Q-networks, with * restarted "
        "at every step; broke: runs in which something was not finite."
    )
    parts: list[Any] = [table.terminal(HEADER, map(_cells, rows)), note]
    if pairs:
        beside = (
            "The AUC beside that of maximum likelihood, seed by seed: mean difference, ratio of interquartile means, "
            "p-value of the Wilcoxon signed-rank test."
        )
        parts += [table.terminal(PAIRED, map(_paired_cells, pairs)), beside]
    return table.page(*parts)


def _label(row: Row, same: Sequence[Row]) -> str:
    """The method, and those of its settings in which its runs differ."""
    parts = [row.method] + ([f"lr {_rate(row)}"] if len({_rate(other) for other in same}) > 1 else [])
    others = row.settings.keys() - {"inner_learning_rate", "warm_adam"}
    differing = [name for name in sorted(others) if len({str(other.settings.get(name)) for other in same}) > 1]
    return ", ".join([*parts, *(f"{name.replace('_', ' ')} {row.settings[name]}" for name in differing)])


SMOOTH = 5


def smoothed(x: Array) -> Array:
    """[..., points] -> the same: means of `SMOOTH` evaluations around each, of fewer at the ends."""
    points = x.shape[-1]
    near = np.abs(np.subtract.outer(np.arange(points), np.arange(points))) <= SMOOTH // 2
    return x @ (near / near.sum(axis=0))


def draw(rows: Sequence[Row], task: str, path: Path) -> None:
    """Evaluation return by environment step, as a PNG: a panel for each length and width, two in a row."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter  # noqa: PLC0415

    panels = sorted({_panel(row) for row in rows})
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with drawn(path, dpi=130, figsize=(5.2 * across + 0.4, 3.6 * down + 0.9)) as figure:
        grid: Any = figure.subplots(down, across, squeeze=False, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes, panel in zip(grid.flat, panels, strict=False):
            shown = [row for row in rows if _panel(row) == panel]
            _draw_panel(axes, shown)
            steps, width = panel
            seeds = " to ".join(map(str, sorted({f(len(row.seeds) for row in shown) for f in (min, max)})))
            axes.set(title=f"{task}: world model of width {width}, {seeds} seeds", xlim=(0, steps))
            axes.set(xlabel="Environment steps")
            axes.grid(alpha=0.25, lw=0.6)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        for axes in grid[:, 0]:
            axes.set(ylabel="Evaluation return")
        legend: dict[str, Any] = {}
        for axes in figure.axes:
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
                legend.setdefault(label, line)
        title = f"interquartile mean over seeds and its 95% interval, of the mean over {SMOOTH} evaluations"
        place: Any = {"loc": "outside lower center", "ncols": 2 * across, "frameon": False}
        figure.legend(legend.values(), legend.keys(), title=title, **place)


def _draw_panel(axes: Any, shown: Sequence[Row]) -> None:
    """The rows of one length and width; further settings of a method are dashed."""
    for i, row in enumerate(shown):
        if not len(row.step):
            continue
        same = [other for other in shown if other.method == row.method]
        style: Any = {"color": colour(METHODS, row.method)}
        line: Any = {"ls": "-" if row.method not in {other.method for other in shown[:i]} else "--"}
        returns = smoothed(row.curves[CURVES[0]])
        axes.plot(row.step, interquartile_mean(returns), lw=2.0, label=_label(row, same), **style, **line)
        axes.fill_between(row.step, *interval(returns), alpha=0.1, lw=0, **style)

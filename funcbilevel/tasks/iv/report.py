"""What is shown of the records: one run with its predictions, or the methods over their seeds."""

import base64
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.figures import draw_boxes, drawn
from funcbilevel.tasks._experiment.methods import colour
from funcbilevel.tasks._experiment.options import read_config
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.store import Record, Store
from funcbilevel.tasks._instrumental.report import Row, colours, compared, samples, summarise
from funcbilevel.tasks.iv.methods import METHODS

Beside: TypeAlias = Mapping[store.Key, Mapping[str, Any]]


def report(directory: Path) -> Report:
    """One run if its predictions are recorded, else the comparison."""
    where = Store(directory, "iv")
    records, curves, predictions = (
        store.records(where),
        store.beside(where, "curves"),
        store.beside(where, "predictions"),
    )
    for record in records:
        if shown := predictions.get(key := store.key_of(record)):
            return Report(
                _run_table(record, shown, read_config(directory)),
                figures={"iv.png": partial(draw_run, record["method"], curves[key], shown)},
            )
    rows = best_first(summarise(records, METHODS, "test_mse"))
    costs = {record["method"]: store.values(record) for record in store.records(where._replace(name="costs"))}
    cells = [_cells(row, costs.get(row.method, {})) for row in rows]
    return Report(
        _comparison_table(rows, cells),
        {"table.md": table.markdown(HEADER, cells)},
        {"iv.png": partial(draw_comparison, rows, curves)},
    )


# One run.


def _run_table(record: Record, shown: Mapping[str, Any], config: Mapping[str, Any]) -> table.page:
    metrics, settings = store.values(record), record["settings"]
    images, matrix, half = config.get("images"), config.get("matrix"), settings["n"] // 2
    of_run = {
        "images": "rendered hearts" if images == "rendered" else str(images),
        "outcome matrix": "drawn from U(0,1)" if matrix == "drawn" else str(matrix),
        "samples": f"{half} inner, {half} outer",
        "method": record["method"],
        "test MSE": f"{metrics['test_mse']:.3f}  (predicting the mean: {np.var(shown['true']):.1f})",
        "validation loss": f"{metrics['validation_loss']:.2f}",
        "outer objective": f"{metrics['outer_objective']:.3f}",
        "inner objective": f"{metrics['inner_objective']:.4f}",
        "seconds per outer step": f"{metrics['seconds_per_step']:.3f}",
    }
    return table.page(table.facts(of_run))


def draw_run(method: str, curves: Mapping[str, Any], shown: Mapping[str, Any], path: Path) -> None:
    """Objectives and test error by step, predicted against true structural values, and some pictures, as a PNG."""
    curves = {name: np.array(values, float) for name, values in curves.items() if isinstance(values, list)}
    true, predicted = np.array(shown["true"], float), np.array(shown["predicted"], float)
    with drawn(path, figsize=(10, 5.6)) as figure:
        panels: Any = figure.subplot_mosaic(
            [["objectives", "mse", "scatter"], ["pictures", "pictures", "pictures"]], height_ratios=(3, 1)
        )
        axes = panels["objectives"]
        axes.plot(curves["step"], curves["outer_objective"], color="C3", label="outer")
        axes.set(xlabel="Outer step", ylabel="Outer objective")
        axes.yaxis.label.set_color("C3")
        twin = axes.twinx()
        twin.plot(curves["step"], curves["inner_objective"], color="C0", label="inner")
        twin.set_ylabel("Inner objective", color="C0")
        twin.spines["right"].set_visible(True)
        axes.set_title("Objectives")

        axes = panels["mse"]
        axes.semilogy(curves["step"], curves["test_mse"], color="C3", marker=".")
        axes.set(xlabel="Outer step", ylabel="Test MSE", title=f"Test MSE, at the end {curves['test_mse'][-1]:.2f}")

        axes = panels["scatter"]
        low, high = float(np.min(true)), float(np.max(true))
        axes.plot([low, high], [low, high], color="0.6", lw=1)
        axes.scatter(true, predicted, s=6, color="C3", alpha=0.6, lw=0)
        axes.set(xlabel="True structural value", ylabel="Predicted", title=f"{len(true)} test pictures, {method}")

        pictures = np.frombuffer(base64.b64decode(shown["pictures"]), np.uint8).reshape(-1, 64, 64)
        strip = np.concatenate(np.pad(pictures, ((0, 0), (0, 0), (0, 3)), constant_values=255), axis=1)
        panels["pictures"].imshow(strip, cmap="gray", vmin=0, vmax=255)
        panels["pictures"].set_axis_off()
        panels["pictures"].set_title(f"Treatments: {len(pictures)} noisy pictures of the inner sample")


# All of them.


def best_first(rows: Sequence[Row]) -> list[Row]:
    """The FuncID variant with the smaller median first, and p-values against it."""
    best = min((row for row in rows if row.method.startswith("funcid")), key=lambda row: row.median, default=rows[0])
    return compared([best, *(row for row in rows if row is not best)])


HEADER = ("method", "seeds", "median", "quartiles", "95% CI", "p", "time", "MiB")


def _cells(row: Row, cost: Mapping[str, float]) -> tuple[str, ...]:
    return (
        row.name,
        str(len(row.values)),
        f"{row.median:.2f}",
        "{:.2f}-{:.2f}".format(*row.quartiles),
        "{:.2f}-{:.2f}".format(*row.interval),
        "" if row.p_value is None else f"{row.p_value:.1g}",
        f"{cost['ratio']:.2f}" if cost else "",
        f"{cost['temp_bytes'] / 2**20:.0f}" if cost else "",
    )


def _comparison_table(rows: Sequence[Row], cells: Sequence[tuple[str, ...]]) -> table.page:
    shown = table.terminal(HEADER, cells, "Test MSE on dSprites: medians over seeds, their bootstrap intervals, cost")
    note = (
        f"p: paired Wilcoxon test against {rows[0].name}. time: one outer step over one bare forward and backward "
        "pass of the treatment network on the inner pictures, measured side by side. MiB: XLA's temporary buffers."
    )
    return table.page(shown, note)


def draw_comparison(rows: Sequence[Row], curves: Beside, path: Path) -> None:
    """Test MSE of all methods as boxes with their seeds, and both objectives' curves with quartile bands."""
    from matplotlib.ticker import LogLocator, NullFormatter  # noqa: PLC0415

    order = [*METHODS]
    rows = sorted(rows, key=lambda row: order.index(row.method) if row.method in order else len(order))
    of, seeds = rows[0].records[0]["settings"], max(len(row.values) for row in rows)
    steps = f", {of['num_outer_steps']} outer steps" if "num_outer_steps" in of else ""
    with drawn(path, figsize=(7.6, 6.8), dpi=130) as figure:
        panels: Any = figure.subplot_mosaic([["boxes", "boxes"], ["outer", "inner"]], height_ratios=(1.2, 1))
        boxes, outer, inner = panels["boxes"], panels["outer"], panels["inner"]
        draw_boxes(boxes, samples(rows), colours(rows, METHODS))
        boxes.set_yscale("log")
        boxes.set(ylabel="Test mean squared error", title=f"{seeds} seeds (n = {of['n']}{steps})")
        for axes, name in ((outer, "outer_objective"), (inner, "inner_objective")):
            for row in rows:
                lines = [line for record in row.records if (line := curves.get(store.key_of(record)))]
                if lines:
                    low, middle, high = np.quantile(
                        [np.array(line[name], float) for line in lines], (0.25, 0.5, 0.75), 0
                    )
                    axes.plot(lines[0]["step"], middle, color=colour(METHODS, row.method), label=row.name)
                    axes.fill_between(lines[0]["step"], low, high, color=colour(METHODS, row.method), alpha=0.15, lw=0)
            axes.set(
                xlabel="Outer step", ylabel=name.replace("_", " ").capitalize(), title="Median and quartiles over seeds"
            )
        inner.set_yscale("log")
        inner.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        inner.yaxis.set_major_formatter("{x:g}")
        inner.yaxis.set_minor_formatter(NullFormatter())
        if outer.lines:
            figure.legend(*outer.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)

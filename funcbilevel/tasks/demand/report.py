"""What is shown of the records: test MSE by method, and the demand curves of the median seeds."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.figures import draw_boxes, drawn
from funcbilevel.tasks._experiment.methods import colour
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks._instrumental.methods import METHODS, REGRESSION, TWO_STAGE
from funcbilevel.tasks._instrumental.report import Row, colours, median_of, median_seed, samples, summarise
from funcbilevel.tasks.demand.problem import SHOWN_S, SHOWN_T, psi, published_grid, shown_line, structural


def report(directory: Path) -> Report:
    """The table and the figure of a directory's records."""
    where = Store(directory, "demand")
    rows = summarise(store.records(where), METHODS, "test_mse")
    return Report(
        _shown(rows),
        {"table.md": table.markdown(HEADER, map(_cells, rows))},
        {"demand.png": partial(draw, rows, store.beside(where, "curves"))},
    )


HEADER = ("method", "median", "quartiles", "95% of median", "p", "validation")


def _cells(row: Row) -> tuple[str, ...]:
    validation = median_of(row, "validation_loss")
    return (
        row.name,
        f"{row.median:.0f}",
        "{:.0f}-{:.0f}".format(*row.quartiles),
        "{:.0f}-{:.0f}".format(*row.interval),
        "" if row.p_value is None else f"{row.p_value:.2g}",
        "" if np.isnan(validation) else f"{validation:.0f}",
    )


def _design(rows: Sequence[Row]) -> str:
    of, seeds = rows[0].records[0]["settings"], max(len(row.values) for row in rows)
    return f"n = {of['n']}, rho = {of['rho']:g}, noise = {of['noise']:g}, {seeds} seeds"


def _shown(rows: Sequence[Row]) -> table.page:
    shown = table.terminal(HEADER, map(_cells, rows), f"Test MSE, demand design: {_design(rows)}")
    note = (
        f"p: paired Wilcoxon test against {rows[0].name}. validation: median loss on 2000 fresh observations, by which "
        f"hyper-parameters were chosen on four other seeds; that of {REGRESSION} is of another kind. The variance "
        f"of the truth on the grid is {structural(*published_grid().T).var():.0f}. {REGRESSION} regresses y on "
        f"price and covariates and takes no notice of the confounding; {TWO_STAGE} is linear."
    )
    return table.page(shown, note)


DASHES: Mapping[str, Any] = {"dfiv": (0, (4, 3)), "funcid-learned": (0, (1, 1.5)), TWO_STAGE: (0, (6, 2, 1, 2))}


def draw(rows: Sequence[Row], curves: Mapping[store.Key, Mapping[str, Any]], path: Path) -> None:
    """Test MSE as boxes with their seeds, and the demand curve of each method's median seed, as a PNG."""
    with drawn(path, figsize=(11, 4.4)) as figure:
        boxes, lines = figure.subplots(1, 2, width_ratios=(1.15, 1))
        draw_boxes(boxes, samples(rows), colours(rows, METHODS))
        boxes.set_yscale("log")
        boxes.set(ylabel="Test MSE (log scale)", title=_design(rows))

        prices = shown_line()[:, 0]
        centre, spread = 25 + 3 * psi(np.array(SHOWN_T)), np.sqrt(psi(np.array(SHOWN_T)) ** 2 + 1)
        low, high = centre - 1.645 * spread, centre + 1.645 * spread
        seen = f"90% of the prices\nseen at t = {SHOWN_T:g}"
        lines.axvspan(low, min(high, prices[-1]), color="0.92", lw=0, label=seen)
        lines.plot(prices, structural(*shown_line().T), color="black", lw=2.2, label="truth")
        for row in rows:
            if curve := curves.get(store.key_of(median_seed(row))):
                style: Any = {"color": colour(METHODS, row.method), "ls": DASHES.get(row.method, "-"), "lw": 1.4}
                lines.plot(curve["price"], np.array(curve["sales"], float), label=row.name, **style)
        lines.set(xlabel="Price", ylabel="Sales", title=f"Demand at t = {SHOWN_T:g}, s = {SHOWN_S:g}, median seeds")
        lines.set_xlim(prices[0], prices[-1])
        lines.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

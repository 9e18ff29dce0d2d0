"""What is shown of the records of `compare schooling`: mean slopes by method, beside two-stage least squares."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from funcbilevel.tasks._experiment import store, table
from funcbilevel.tasks._experiment.figures import draw_boxes, drawn
from funcbilevel.tasks._experiment.report import Report
from funcbilevel.tasks._experiment.store import Store
from funcbilevel.tasks._instrumental.methods import LEAST_SQUARES, METHODS, REGRESSION, TWO_STAGE
from funcbilevel.tasks._instrumental.report import Row, colours, median_of, samples, summarise

References = dict[str, dict[str, float]]
"""Method -> metrics of the linear models."""


def report(directory: Path) -> Report:
    """The table and the figure of a directory's records."""
    records = store.records(Store(directory, "schooling-neural"))
    linear = {of["method"]: store.values(of) for of in records if of["method"] in (TWO_STAGE, LEAST_SQUARES)}
    rows = summarise([of for of in records if of["method"] not in linear], METHODS, "mean_slope")
    return Report(
        _shown(rows, linear),
        {"table.md": table.markdown(HEADER, _cells(rows, linear))},
        {"slopes.png": partial(draw, rows, linear)},
    )


HEADER = ("method", "median", "quartiles", "95%", "validation")


def _cells(rows: Sequence[Row], linear: References) -> list[tuple[str, ...]]:
    of_methods = [
        (
            row.name,
            f"{row.median:.3f}",
            "{:.3f} to {:.3f}".format(*row.quartiles),
            "{:.3f} to {:.3f}".format(*row.interval),
            f"{median_of(row, 'validation_loss'):.4f}",
        )
        for row in rows
    ]
    of_linear = [
        (name, f"{of['mean_slope']:.3f}", "", f"{of['low']:.3f} to {of['high']:.3f}" if "low" in of else "", "")
        for name, of in linear.items()
    ]
    return [*of_methods, *of_linear]


def _shown(rows: Sequence[Row], linear: References) -> table.page:
    splits = max((len(row.values) for row in rows), default=0)
    title = f"Mean slope of log wage in education (Card 1995, 3010 men), {splits} splits"
    note = (
        "95%: bootstrap interval of the median; of iv2sls, two-stage least squares by linearmodels, its own. ols is "
        f"what {REGRESSION} estimates. validation: median loss on the men left out, by which hyper-parameters were "
        "chosen on four other splits."
    )
    return table.page(table.terminal(HEADER, _cells(rows, linear), title), note)


def draw(rows: Sequence[Row], linear: References, path: Path) -> None:
    """Mean slopes as boxes with their seeds, over the interval of two-stage least squares, as a PNG."""
    with drawn(path, figsize=(6.4, 4)) as figure:
        axes = figure.subplots()
        if of := linear.get(TWO_STAGE):
            axes.axhspan(of["low"], of["high"], color="C0", alpha=0.1, lw=0, label="2SLS, 95% interval")
            axes.axhline(of["mean_slope"], color="C0", lw=1.5, label="2SLS")
        if of := linear.get(LEAST_SQUARES):
            axes.axhline(of["mean_slope"], color="0.3", lw=1.5, ls="--", label="OLS")
        draw_boxes(axes, samples(rows), colours(rows, METHODS))
        axes.set(ylabel="Log wage per year of education", title="Mean slope, neural networks at both levels")
        if linear:
            axes.legend(frameon=False, fontsize=8)

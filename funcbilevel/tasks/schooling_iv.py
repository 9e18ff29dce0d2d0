"""Returns to schooling (Card 1995) with neural f and h: how far the methods agree, over seeds.

Education is the treatment, nearness to a college its instrument, the other regressors of `tasks.schooling` are
covariates; the bilevel problem is that of `tasks.covariate_iv`. There is no truth to compare with. What is reported is
the mean slope: the average over all men of f(educ + 1/2, c) - f(educ - 1/2, c), in log wage per year, beside the
coefficients that two-stage and ordinary least squares give. A seed is a split of the men (40% inner, 40% outer, 20%
validation) and of the initial networks.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from funcbilevel.tasks import _records, covariate_iv, schooling
from funcbilevel.tasks._experiment.figures import draw_boxes
from funcbilevel.tasks.covariate_iv import COLOURS, Batch, Data, Result, Setting

if TYPE_CHECKING:
    from rich.console import RenderableType

Array: TypeAlias = np.ndarray[Any, Any]


@cache
def sample() -> Batch:
    """All men: instruments [3010, 6], education [3010, 1], covariates [3010, 5], log wage [3010]."""
    frame = schooling.load()
    z, p, c = (
        frame[names].to_numpy() for names in (["nearc4", *schooling.COVARIATES], ["educ"], [*schooling.COVARIATES])
    )
    return Batch(z, p, c, frame["lwage"].to_numpy())


def points() -> Batch:
    """Every man with half a year more and, below, with half a year less."""
    men = sample()
    return Batch(z=None, p=np.concatenate([men.p + 0.5, men.p - 0.5]), c=np.concatenate([men.c, men.c]), y=None)


def arrays(seed: int) -> Data:
    """One split."""
    men = sample()
    order = np.random.default_rng(seed).permutation(len(men.y))
    cut = 2 * int(0.4 * len(order))
    train, validation = (Batch(*(a[rows] for a in men)) for rows in (order[:cut], order[cut:]))
    return covariate_iv.standardised(train, validation, points())


def mean_slope(predictions: Array) -> float:
    """Log wage per year of education, from predictions at `points`."""
    more, less = np.split(predictions, 2)
    return float(np.mean(more - less))


@dataclass(frozen=True)
class CompareSchooling(covariate_iv.Compare):
    """Returns to schooling with neural networks at both levels: every method over seeds, beside 2SLS and OLS."""

    task = "schooling-neural"
    metric = "mean_slope"
    # Nearness to a college explains half a percent of what the covariates leave of education: small ridges.
    setting = Setting(
        num_outer_steps=100,
        treatment_widths=(8, 2),
        covariate_widths=(16, 4),
        instrument_widths=(32, 16),
        linear_part=True,
        inner_ridge=1e-4,
        outer_ridge=1e-5,
    )

    def data(self, seed: int) -> Data:
        """A split of the men."""
        return arrays(seed)

    def value(self, predictions: Array) -> float:
        """The mean slope."""
        return mean_slope(predictions)

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes trials.jsonl, runs.jsonl and slopes.png into `directory`; returns the table."""
        results, reference = self.results(directory, track), schooling.reference(schooling.load())
        draw(results, reference, directory / "slopes.png")
        return _table(results, reference)


EDUC = schooling.REGRESSORS.index("educ")


def _table(results: Mapping[str, Result], reference: schooling.Reference) -> "RenderableType":
    from rich import box  # noqa: PLC0415
    from rich.console import Group  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
    seeds = len(next(iter(results.values())).values)
    table.title = f"Mean slope of log wage in education (Card 1995, 3010 men), {seeds} splits"
    table.add_column("method", no_wrap=True)
    for name in ("median", "quartiles", "95% of median", "validation"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in covariate_iv.summarise(results).items():
        table.add_row(
            name,
            f"{row.median:.3f}",
            "{:.3f} to {:.3f}".format(*row.quartiles),
            "{:.3f} to {:.3f}".format(*row.interval),
            f"{row.validation_loss:.4f}",
        )
    low, high = reference.educ_interval
    note = (
        f"By two-stage least squares {reference.iv2sls[EDUC]:.3f}, 95% interval {low:.3f} to {high:.3f}; by ordinary "
        f"least squares {reference.ols[EDUC]:.3f}, which is what single-objective estimates. validation: median loss "
        "on the men left out, by which hyper-parameters were chosen on four other splits."
    )
    return Group(table, "", textwrap.fill(note, 78))


def draw(results: Mapping[str, Result], reference: schooling.Reference, path: Path) -> None:
    """Mean slopes as boxes with their seeds, over the interval of two-stage least squares, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        low, high = reference.educ_interval
        axes.axhspan(low, high, color="C0", alpha=0.1, lw=0, label="2SLS, 95% interval")
        axes.axhline(reference.iv2sls[EDUC], color="C0", lw=1.5, label="2SLS")
        axes.axhline(reference.ols[EDUC], color="0.3", lw=1.5, ls="--", label="OLS")
        draw_boxes(axes, {name: result.values for name, result in results.items()}, COLOURS)
        axes.set(ylabel="Log wage per year of education", title="Mean slope, neural networks at both levels")
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)

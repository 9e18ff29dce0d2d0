r"""The demand for air tickets (Hartford et al. 2017): instrumental regression on a simulation with known truth.

Sales y depend on the price p, the time of the year t and the type of customer s; something unseen, a conference say,
moves the price and the sales. The cost of fuel c moves the price only:

.. math::
    p = 25 + (c + 3) \psi(t) + v, \quad y = 100 + (10 + p) s \psi(t) - 2p + noise \cdot e, \quad
    \psi(t) = 2\,((t - 5)^4 / 600 + e^{-4 (t - 5)^2} + t / 10 - 2),

with c, v ~ N(0, 1), e ~ N(rho v, 1 - rho^2), t ~ U(0, 10), s uniform on 1..7. The treatment is the price, t and s are
covariates, and the bilevel problem is that of `tasks.covariate_iv`. Errors are measured on the published grid, a good
part of which lies where no price was seen.

Hartford et al. add e to standardised sales, whose standard deviation is 158: here noise = 158 by default. Xu et al.
have noise = 1, with which there is hardly any confounding to undo: plain regression then does best.

References:
    Hartford, Lewis, Leyton-Brown, Taddy, *Deep IV: A Flexible Approach for Counterfactual Prediction*, ICML 2017;
    Xu et al., ICLR 2021, https://arxiv.org/abs/2010.07154 (DFIV), appendix.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from funcbilevel.tasks import _records, covariate_iv
from funcbilevel.tasks._experiment.figures import STYLE, draw_boxes
from funcbilevel.tasks.covariate_iv import COLOURS, Batch, Data, Result

if TYPE_CHECKING:
    from rich.console import RenderableType

Array: TypeAlias = np.ndarray[Any, Any]

# Data.


def psi(t: Array) -> Array:
    """How much customers mind the price, over the year."""
    return 2 * ((t - 5) ** 4 / 600 + np.exp(-4 * (t - 5) ** 2) + t / 10 - 2)


def structural(p: Array, t: Array, s: Array) -> Array:
    """The truth: sales if the price were set to p."""
    return 100 + (10 + p) * s * psi(t) - 2 * p


def simulate(n: int, rng: np.random.Generator, rho: float = 0.5, noise: float = 158.0) -> Batch:
    """n independent observations: instruments (c, t, s), treatment p, covariates (t, s)."""
    s, t = rng.integers(1, 8, n).astype(float), rng.uniform(0, 10, n)
    c, v = rng.normal(size=(2, n))
    e = rho * v + np.sqrt(1 - rho**2) * rng.normal(size=n)
    p = 25 + (c + 3) * psi(t) + v
    return Batch(np.stack([c, t, s], axis=1), p[:, None], np.stack([t, s], axis=1), structural(p, t, s) + noise * e)


def published_grid() -> Array:
    """The published 20 prices x 20 times x 7 types, [2800, 3]."""
    axes = np.linspace(10, 25, 20), np.linspace(0, 10, 20), np.arange(1.0, 8.0)
    return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], axis=1)


SHOWN_T, SHOWN_S = 5.0, 4.0


def shown_line() -> Array:
    """The prices at which the figure shows the curve, with its time and type, [61, 3]."""
    prices = np.linspace(10, 25, 61)
    return np.stack([prices, np.full_like(prices, SHOWN_T), np.full_like(prices, SHOWN_S)], axis=1)


def points() -> Batch:
    """The published grid and, below it, the line of the figure, as treatments and covariates."""
    x = np.concatenate([published_grid(), shown_line()])
    return Batch(z=None, p=x[:, :1], c=x[:, 1:], y=None)


def arrays(seed: int, n: int, rho: float, noise: float, num_validation: int = 2000) -> Data:
    """The data of one seed, with a fresh validation sample."""
    train_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    train, validation = simulate(n, train_rng, rho, noise), simulate(num_validation, validation_rng, rho, noise)
    return covariate_iv.standardised(train, validation, points())


def test_mse(predictions: Array) -> float:
    """Mean squared error to the truth on the published grid; `predictions` are at `points`."""
    grid = published_grid()
    return float(np.mean((predictions[: len(grid)] - structural(*grid.T)) ** 2))


LINEAR = "iv2sls"


def two_stage(data: Data) -> Array:
    """Predictions at `points` by two-stage least squares, linear in p, t and s and instrumented by c, t and s."""
    sample, one = covariate_iv.whole(data), np.ones((len(data.inner.y) + len(data.outer.y), 1))
    z, x = (np.hstack([*(np.asarray(a, float) for a in parts), one]) for parts in ((sample.z,), (sample.p, sample.c)))
    at = np.hstack([data.points.p, data.points.c, np.ones((len(data.points.p), 1))])
    return at @ np.linalg.solve(z.T @ x, z.T @ np.asarray(sample.y, float)) * data.y_std + data.y_mean


# The command.


@dataclass(frozen=True)
class CompareDemand(covariate_iv.Compare):
    """Demand for air tickets (Hartford et al. 2017), a simulation with known truth: every method over seeds."""

    task = "demand"
    metric = "test_mse"
    n: int = 5000
    """Sample size, even; half of it is the inner level's."""
    rho: float = 0.5
    """Correlation of the disturbances of price and sales: the confounding."""
    noise: float = 158.0
    """Standard deviation of the disturbance of sales: 158 as in Hartford et al., 1 as in Xu et al."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        super().check()
        if self.n < 20 or self.n % 2:
            raise ValueError(f"--n must be even and at least 20, got {self.n}.")
        if not -1 <= self.rho <= 1:
            raise ValueError(f"--rho must be between -1 and 1, got {self.rho}.")
        if self.noise < 0:
            raise ValueError(f"--noise must be at least 0, got {self.noise}.")

    def data(self, seed: int) -> Data:
        """A fresh sample."""
        return arrays(seed, self.n, self.rho, self.noise)

    def value(self, predictions: Array) -> float:
        """The test MSE."""
        return test_mse(predictions)

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes trials.jsonl, runs.jsonl and demand.png into `directory`; returns the table."""
        results = self.results(directory, track)
        results[LINEAR] = self._linear(directory / "runs.jsonl")
        draw(results, self, directory / "demand.png")
        return _table(results, self)

    def _linear(self, path: Path) -> Result:
        seeds = range(self.seed, self.seed + self.seeds)
        predictions = np.stack([two_stage(self.data(seed)) for seed in seeds])
        values = np.array([test_mse(row) for row in predictions])
        for seed, value in zip(seeds, values, strict=True):
            record = _records.record(self.task, LINEAR, seed, self.settings(), {"test_mse": value}, 0.0)
            _records.append(path, record)
        return Result(values, predictions, np.full(len(values), np.nan))


# What is shown of it.


def _table(results: Mapping[str, Result], options: CompareDemand) -> "RenderableType":
    from rich import box  # noqa: PLC0415
    from rich.console import Group  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    baseline = next(iter(results))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
    table.title = (
        f"Test MSE, demand design: n = {options.n}, rho = {options.rho:g}, noise = {options.noise:g}, "
        f"{options.seeds} seeds"
    )
    table.add_column("method", no_wrap=True)
    for name in ("median", "quartiles", "95% of median", "p", "validation"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in covariate_iv.summarise(results).items():
        p = covariate_iv.p_value(results[name], results[baseline])
        table.add_row(
            name,
            f"{row.median:.0f}",
            "{:.0f}-{:.0f}".format(*row.quartiles),
            "{:.0f}-{:.0f}".format(*row.interval),
            "" if p is None else f"{p:.2g}",
            f"{row.validation_loss:.0f}" if np.isfinite(row.validation_loss) else "",
        )
    note = (
        f"p: paired Wilcoxon test against {baseline}. validation: median loss on 2000 fresh observations, by which "
        "hyper-parameters were chosen on four other seeds; that of single-objective is of another kind. The variance "
        f"of the truth on the grid is {structural(*published_grid().T).var():.0f}. single-objective regresses y on "
        "price and covariates and takes no notice of the confounding; iv2sls is linear."
    )
    return Group(table, "", textwrap.fill(note, 78))


DASHES = {"dfiv": (0, (4, 3)), "funcid-learned": (0, (1, 1.5)), LINEAR: (0, (6, 2, 1, 2))}


def draw(results: Mapping[str, Result], options: CompareDemand, path: Path) -> None:
    """Test MSE as boxes with their seeds, and the demand curve of each method's median seed, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        boxes, curves = figure.subplots(1, 2, width_ratios=(1.15, 1))
        draw_boxes(boxes, {name: result.values for name, result in results.items()}, COLOURS)
        boxes.set_yscale("log")
        title = f"{options.seeds} seeds, n = {options.n}, noise = {options.noise:g}"
        boxes.set(ylabel="Test MSE (log scale)", title=title)

        prices = shown_line()[:, 0]
        centre, spread = 25 + 3 * psi(np.array(SHOWN_T)), np.sqrt(psi(np.array(SHOWN_T)) ** 2 + 1)
        low, high = centre - 1.645 * spread, centre + 1.645 * spread
        curves.axvspan(
            low, min(high, prices[-1]), color="0.92", lw=0, label=f"90% of the prices\nseen at t = {SHOWN_T:g}"
        )
        curves.plot(prices, structural(*shown_line().T), color="black", lw=2.2, label="truth")
        for name, result in results.items():
            order = np.argsort(covariate_iv.ranked(result))
            median_seed = order[(len(order) - 1) // 2]
            shown = result.predictions[median_seed][-len(prices) :]
            dashes: Any = DASHES.get(name, "-")
            curves.plot(prices, shown, color=COLOURS[name], lw=1.4, ls=dashes, label=name)
        curves.set(xlabel="Price", ylabel="Sales", title=f"Demand at t = {SHOWN_T:g}, s = {SHOWN_S:g}, median seeds")
        curves.set_xlim(prices[0], prices[-1])
        curves.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, dpi=150)

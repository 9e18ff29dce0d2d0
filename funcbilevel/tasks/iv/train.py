"""Training and evaluation of one run, and the runs of the commands."""

import base64
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import funcbilevel as fb
from funcbilevel.tasks._experiment.grid import Track, Unit
from funcbilevel.tasks._experiment.select import Rule
from funcbilevel.tasks._experiment.store import Result, Run
from funcbilevel.tasks._instrumental.formulas import with_constant
from funcbilevel.tasks.data import dsprites
from funcbilevel.tasks.iv.methods import METHODS, REFERENCES, Hyper, Setting, Solver, solver
from funcbilevel.tasks.iv.problem import Arrays, Batch, arrays, problem, second_stage


class Evaluation(NamedTuple):
    """How good a state is.

    Attributes:
        test_mse: mean squared error to the structural function on the test pictures.
        validation_loss: mean squared error of y - u'[h(z), 1] on fresh samples, at which no structural value is seen.
        predictions: of the structural function on the test pictures, [588].
    """

    test_mse: jax.Array
    validation_loss: jax.Array
    predictions: jax.Array


def evaluate(solver: Solver, state: fb.BilevelState, data: Arrays) -> Evaluation:
    """The second stage fitted anew at the state's networks, in evaluation mode."""
    omega, omega_state = state.outer_params, state.outer_model_state
    f, _ = solver.f.apply(omega, omega_state, data.inner.x)
    h = fb.predictor(problem, solver.h, f, state.inner_params, data.inner, state.model_state)
    u = second_stage(h(data.outer.z), data.outer.y)
    f_test, _ = solver.f.apply(omega, omega_state, data.test_x)
    predictions = with_constant(f_test) @ u
    return Evaluation(
        test_mse=jnp.mean((predictions - data.test_y) ** 2),
        validation_loss=jnp.mean((data.validation.y - with_constant(h(data.validation.z)) @ u) ** 2),
        predictions=predictions,
    )


_evaluate = jax.jit(evaluate, static_argnums=0)


def sampler(batch_size: int | None) -> Callable[..., tuple[Batch, Batch]]:
    """`(data, key, step) -> (inner batch, outer batch)`: all of the data, or batches drawn with replacement."""
    return _full_batch if batch_size is None else _minibatches(batch_size)


def _full_batch(data: Arrays, key: jax.Array, step: jax.Array) -> tuple[Batch, Batch]:
    return data.inner, data.outer


@cache
def _minibatches(batch_size: int) -> Callable[..., tuple[Batch, Batch]]:
    def sample(data: Arrays, key: jax.Array, step: jax.Array) -> tuple[Batch, Batch]:
        def rows(key: jax.Array, batch: Batch) -> Batch:
            chosen = jax.random.randint(key, (batch_size,), 0, len(batch.z))
            return jax.tree.map(lambda a: a[chosen], batch)

        inner_key, outer_key = jax.random.split(key)
        return rows(inner_key, data.inner), rows(outer_key, data.outer)

    return sample


class Outcome(NamedTuple):
    """One finished run.

    Attributes:
        evaluation: at the end.
        curves: values after each chunk of outer steps: `step`, `test_mse`, `validation_loss`; and the last
            value in the chunk of both objectives, of the hypergradient's norms and, where the method has them, of
            `linear_curvature`, `linear_residual` and `inner_gradient_relative`; each a list of floats.
        seconds_per_step: median over the chunks after the first, evaluation and compilation apart; NaN if there is
            one chunk only.
        metrics: those of the last outer step.
    """

    evaluation: Evaluation
    curves: dict[str, list[float]]
    seconds_per_step: float
    metrics: dict[str, float]


CURVES = {
    *("step", "test_mse", "validation_loss", "outer_objective", "inner_objective"),
    *("hypergradient_norm", "explicit_norm", "implicit_norm", "linear_curvature", "linear_residual"),
    "inner_gradient_relative",
}


def fit(
    solver: Solver,
    data: Arrays,
    seed: int,
    num_outer_steps: int = 100,
    *,
    chunk: int = 10,
    batch_size: int | None = None,
    callback: Callable[[Any, Mapping[str, Any]], None] | None = None,
) -> Outcome:
    """Trains from the seed's initial networks, which are the same for every method, and evaluates after each chunk.

    h follows f_omega by a few Adam steps, as published, and is never quite stationary: `inner_gradient_relative` is
    recorded, and the warning of `fb.train` left out.
    """
    state = jax.jit(solver.bilevel.init)(jax.random.key(seed), None, data.inner)
    curves: dict[str, list[float]] = {}
    seconds: list[float] = []
    last: dict[str, float] = {}
    clock = time.perf_counter()

    def after_chunk(state: fb.BilevelState, metrics: dict[str, Any]) -> None:
        nonlocal clock, last
        seconds.append((time.perf_counter() - clock) / len(metrics["outer_objective"]))
        evaluation = _evaluate(solver, state, data)
        last = {name: float(values[-1]) for name, values in metrics.items()}
        values = {"step": int(state.step)} | last | jax.tree.map(float, evaluation._asdict() | {"predictions": 0.0})
        for name in CURVES & values.keys():
            curves.setdefault(name, []).append(values[name])
        if callback is not None:
            callback(state, metrics | {"test_mse": np.full(len(metrics["outer_objective"]), values["test_mse"])})
        clock = time.perf_counter()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not a stationary point")
        state, _ = fb.train(
            solver.bilevel,
            state,
            jax.tree_util.Partial(sampler(batch_size), data),
            num_outer_steps,
            chunk=chunk,
            callback=after_chunk,
            progress=False,
            on_nonfinite="continue",
        )
    rest = seconds[1:]
    return Outcome(_evaluate(solver, state, data), curves, float(np.median(rest)) if rest else float("nan"), last)


# The runs of the commands.

RULE = Rule("validation_loss", (1000, 1001, 1002, 1003))


class How(NamedTuple):
    """How a run is made.

    Attributes:
        setting, hyper, num_outer_steps, batch_size: as in its settings.
        chunk: outer steps between two evaluations.
        shown: whether what the figure of one run shows is recorded beside it.
    """

    setting: Setting
    hyper: Hyper
    num_outer_steps: int
    batch_size: int | None = None
    chunk: int = 10
    shown: bool = False


def run_of(method: str, seed: int, how: How) -> Run:
    """One run of a method."""
    own = {"num_outer_steps": how.num_outer_steps, "batch_size": how.batch_size}
    return Run(method, seed, {**how.setting._asdict(), **how.hyper, **own}, how)


def references(n: int, seed: int) -> list[Run]:
    """The runs of the references from outside."""
    return [Run(name, seed, {"n": n}) for name in REFERENCES]


Load: TypeAlias = Callable[[], tuple[dsprites.Hearts, np.ndarray[Any, Any]]]
"""`() -> (where the pictures come from, outcome matrix)`."""


@lru_cache(maxsize=1)
def _arrays(load: Load, n: int, seed: int) -> Arrays:
    return arrays(n, seed, *load())


def train(load: Load, track: Track, unit: Unit) -> list[Result]:
    """Makes one run."""
    (run,) = unit.runs
    build: Any = METHODS[run.method].build
    if run.method in REFERENCES:
        data = dsprites.generate(run.settings["n"], run.seed, *load())
        return [Result({"test_mse": build(data, dsprites.test_set(*load()))})]
    how: How = run.how
    data = _arrays(load, how.setting.n, run.seed)
    outcome = fit(
        solver(run.method, how.setting, how.hyper),
        data,
        run.seed,
        how.num_outer_steps,
        chunk=how.chunk,
        batch_size=how.batch_size,
        callback=track(run.method if how.shown else f"{run.method} {run.seed}", how.num_outer_steps),
    )
    metrics = outcome.metrics | {
        "test_mse": outcome.evaluation.test_mse,
        "validation_loss": outcome.evaluation.validation_loss,
        "seconds_per_step": outcome.seconds_per_step,
    }
    shown = {"predictions": _shown(data, outcome)} if how.shown else {}
    return [Result(metrics, {"curves": outcome.curves} | shown)]


def _shown(data: Arrays, outcome: Outcome) -> dict[str, Any]:
    """True and predicted structural values, and ten pictures of the inner sample, a byte per pixel from -0.2 to 1."""
    pictures = np.asarray(data.inner.x[:10])
    grey = np.round(255 * np.clip((pictures + 0.2) / 1.2, 0, 1)).astype(np.uint8)
    true, predicted = (np.round(a, 4).tolist() for a in (data.test_y, outcome.evaluation.predictions))
    return {"true": true, "predicted": predicted, "pictures": base64.b64encode(grey.tobytes()).decode()}


BARE = "bare"  # a forward and a backward pass of the treatment network, what the costs are compared with


def cost_runs(setting: Setting, chosen: Mapping[str, Hyper]) -> list[Run]:
    """One measurement of each method and of the bare passes."""
    shared = setting._asdict()
    return [Run(BARE, 0, shared), *(Run(name, 0, {**shared, **hyper}, hyper) for name, hyper in chosen.items())]


def measure_costs(load: Load, setting: Setting, seed: int, unit: Unit) -> list[Result]:
    """One outer step of each method beside one bare forward and backward pass of the treatment network."""
    data, calls = _arrays(load, setting.n, seed), dict[str, Any]()
    for run in unit.cells:
        if run.method != BARE:
            bilevel = solver(run.method, setting, run.how).bilevel
            state = jax.jit(bilevel.init)(jax.random.key(0), None, data.inner)
            calls[run.method] = (bilevel, (state, data.inner, data.outer))
    f = solver("dfiv", setting, {}).f
    omega, omega_state = f.init(jax.random.key(0), data.inner.x)

    def bare(omega: Any, x: jax.Array) -> Any:
        return jax.grad(lambda omega: jnp.sum(f.apply(omega, omega_state, x, train=True)[0] ** 2))(omega)

    costs = {cost.name: cost for cost in fb.measure_costs({BARE: (bare, (omega, data.inner.x))} | calls).rows}
    return [
        Result(
            {
                "seconds": (cost := costs[run.method]).seconds,
                "ratio": cost.seconds / costs[BARE].seconds,
                "temp_bytes": cost.temp_bytes,
                "compile_seconds": cost.compile_seconds,
            },
            seconds=cost.seconds,
        )
        for run in unit.cells
    ]

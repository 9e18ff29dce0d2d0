"""Training and evaluation of instrumental regression with covariates: all seeds at once, in one vmap."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import funcbilevel as fb
from funcbilevel.tasks._experiment.grid import Track, Unit, by_setting, complete
from funcbilevel.tasks._experiment.select import Rule, check_budgets, choose, trial_runs
from funcbilevel.tasks._experiment.store import Result, Run, Store
from funcbilevel.tasks._instrumental.formulas import adam, ridge_objective, ridge_regression
from funcbilevel.tasks._instrumental.methods import METHODS, REGRESSION, Hyper, Setting, trials
from funcbilevel.tasks._instrumental.problem import Array, Batch, Data, Net, OuterParams, products, whole


class Evaluation(NamedTuple):
    """How good a state is, in units of y.

    Attributes:
        predictions: of the structural function at the data's points, [m].
        validation_loss: mean squared error of y on the validation sample by u'(h(z) x xi(c)), so without the truth; of
            `single-objective` by u'(psi(p) x xi(c)).
    """

    predictions: Any
    validation_loss: Any


class Solver(NamedTuple):
    """A method made ready.

    Attributes:
        bilevel: the solver.
        init: `(key, data) -> state`.
        batches: `data -> (inner batch, outer batch)`.
        second_stage: `(state, data) -> (u, seen)`: the second stage fitted to the outer sample, and its features of a
            batch, so that `seen(batch) @ u` is E[f(p, c) | z]. Of the state it reads outer_params, inner_params and
            model_state.
        structural: `(omega, u, batch) -> f(p, c)`, [n].
    """

    bilevel: fb.BilevelSolver
    init: Callable[[jax.Array, Data], fb.BilevelState]
    batches: Callable[[Data], tuple[Batch, Batch]]
    second_stage: Callable[[Any, Data], tuple[jax.Array, Callable[[Batch], jax.Array]]]
    structural: Callable[[OuterParams, jax.Array, Batch], jax.Array]

    def evaluate(self, state: fb.BilevelState, data: Data) -> Evaluation:
        """How good a state is."""
        u, seen = self.second_stage(state, data)
        loss = jnp.mean((seen(data.validation) @ u - data.validation.y) ** 2)
        predictions = self.structural(state.outer_params, u, data.points)
        return Evaluation(predictions * data.y_std + data.y_mean, loss * data.y_std**2)


@cache
def _solver(method: str, setting: Setting, own: tuple[tuple[str, float], ...]) -> Solver:
    return solver_of(method, setting, own)


def solver_of(method: str, setting: Setting, own: tuple[tuple[str, float], ...], num_treatments: int = 1) -> Solver:
    """The solver of a method with hyper-parameters of its own; rates and ridges of the setting may be traced."""
    estimator: Any = METHODS[method].build
    instrumental, ridge, k = method != REGRESSION, setting.outer_ridge, setting.treatment_features(num_treatments)
    psi, xi, phi = (
        Net(widths, setting.linear_part)
        for widths in (setting.treatment_widths, setting.covariate_widths, setting.instrument_widths)
    )
    features = fb.from_linen(phi)
    h = fb.variable_projection(features, k, ridge=2 * setting.inner_ridge)
    if not instrumental:  # no inner level: the follower is a mere zero
        h = fb.from_function(lambda key, z: jnp.zeros(()), lambda theta, z: theta * jnp.ones(len(z)))
    schedule: Any = optax.cosine_decay_schedule(setting.outer_learning_rate, setting.num_outer_steps)

    def treatment(omega: OuterParams, batch: Batch) -> jax.Array:
        return jnp.asarray(psi.apply(omega.treatment, batch.p))

    def with_covariates(omega: OuterParams, values: jax.Array, batch: Batch) -> jax.Array:
        return products(values, jnp.asarray(xi.apply(omega.covariates, batch.c)))

    def inner_objective(omega: OuterParams, v: jax.Array, batch: Batch) -> jax.Array:
        return jnp.mean(jnp.sum((v - treatment(omega, batch)) ** 2, axis=1)) if instrumental else jnp.mean(v**2)

    def outer_objective(omega: OuterParams, v: jax.Array, batch: Batch) -> jax.Array:
        values = v if instrumental else treatment(omega, batch)
        return ridge_objective(with_covariates(omega, values, batch), batch.y, ridge)

    problem = fb.FunctionalProblem(inner_objective, outer_objective, inputs=lambda batch: batch.z)
    bilevel = fb.bilevel(
        problem,
        h,
        estimator(features, setting, k, **dict(own)),
        inner_optimizer=adam(setting.inner_learning_rate, 0.0),
        outer_optimizer=adam(schedule, 0.0),
        inner_steps=setting.inner_steps if instrumental else 1,
    )

    def init(key: jax.Array, data: Data) -> fb.BilevelState:
        psi_key, xi_key, key = jax.random.split(key, 3)
        omega = OuterParams(psi.init(psi_key, data.inner.p), xi.init(xi_key, data.inner.c))
        return bilevel.init(key, omega, data.inner)

    def batches(data: Data) -> tuple[Batch, Batch]:
        return (data.inner, data.outer) if instrumental else (data.inner, whole(data))

    def second_stage(state: Any, data: Data) -> tuple[jax.Array, Callable[[Batch], jax.Array]]:
        omega = state.outer_params
        if instrumental:
            h_fitted = fb.predictor(problem, h, omega, state.inner_params, data.inner, state.model_state)

            def seen(batch: Batch) -> jax.Array:
                return with_covariates(omega, h_fitted(batch.z), batch)
        else:

            def seen(batch: Batch) -> jax.Array:
                return with_covariates(omega, treatment(omega, batch), batch)

        sample = batches(data)[1]
        return ridge_regression(seen(sample), sample.y, ridge), seen

    def structural(omega: OuterParams, u: jax.Array, batch: Batch) -> jax.Array:
        return with_covariates(omega, treatment(omega, batch), batch) @ u

    return Solver(bilevel, init, batches, second_stage, structural)


def fit(
    method: str, setting: Setting, hyper: Hyper, data: Sequence[Data], seeds: Sequence[int], callback: Any = None
) -> tuple[Evaluation, dict[str, Array]]:
    """Trains all seeds in one vmap; the evaluation and the last step's metrics, each with the seeds as first axis.

    A seed is that of its initial networks, which are the same for every method.
    """
    common = {name: value for name, value in hyper.items() if name in Setting._fields}
    own = tuple(sorted((name, value) for name, value in hyper.items() if name not in common))
    setting = setting._replace(**common)
    solver = _solver(method, setting, own)
    stacked: Data = jax.tree.map(lambda *a: jnp.stack(a), *data)
    batches = jax.vmap(solver.batches)(stacked)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])

    def mean_over_seeds(state: fb.BilevelState, metrics: dict[str, Array]) -> None:
        if callback is not None:
            callback(state, {name: values.mean(axis=1) for name, values in metrics.items()})

    state, metrics = fb.train(
        solver.bilevel._replace(step=jax.vmap(solver.bilevel.step)),
        jax.jit(jax.vmap(solver.init))(keys, stacked),
        jax.tree_util.Partial(constant, batches),
        setting.num_outer_steps,
        chunk=min(50, setting.num_outer_steps),
        callback=mean_over_seeds,
        progress=False,
        on_nonfinite="continue",
    )
    evaluation = jax.device_get(jax.jit(jax.vmap(solver.evaluate))(state, stacked))
    return evaluation, {name: values[-1] for name, values in metrics.items()}


def constant(batches: Any, key: jax.Array, step: jax.Array) -> Any:
    """For `fb.train`: the same batches at every step."""
    del key, step
    return batches


# A comparison on the data of a task.


class Design(NamedTuple):
    """Where the methods are compared.

    Attributes:
        task: as in records.
        settings: those of the data, as in records.
        setting: what all methods have in common on these data.
        data: seed -> data.
        measure: predictions at the data's points, [m] -> metrics and what stands beside the record.
    """

    task: str
    settings: Mapping[str, Any]
    setting: Setting
    data: Callable[[int], Data]
    measure: Callable[[Array], Result]


RULE = Rule("validation_loss", (1000, 1001, 1002, 1003))


class Trial(NamedTuple):
    """How a run is made: what progress calls it, and its hyper-parameters."""

    label: str
    hyper: Hyper


def compare(directory: Path, design: Design, methods: Iterable[str], seeds: Iterable[int], track: Track) -> None:
    """Chooses each method's hyper-parameters by the validation loss on four other seeds, then trains on all seeds.

    The trials go to selection.jsonl, the rest to runs.jsonl; what is there is not made again.
    """
    candidates = {
        method: [
            Run(method, 0, {**design.settings, **design.setting._asdict(), **hyper}, Trial(f"{method} {i}", hyper))
            for i, hyper in enumerate(trials(method, design.setting), start=1)
        ]
        for method in methods
    }
    check_budgets({method: len(of_method) for method, of_method in candidates.items()})
    selection = Store(directory, design.task, "selection")
    data = cache(design.data)
    tried = design._replace(measure=lambda predictions: design.measure(predictions)._replace(beside={}))
    complete(selection, trial_runs(candidates, RULE), partial(train, tried, data, track), by_setting)
    runs = [
        run._replace(seed=seed, how=Trial(method, run.how.hyper))
        for method, run in choose(selection, candidates, RULE).items()
        for seed in seeds
    ]
    complete(Store(directory, design.task), runs, partial(train, design, data, track), by_setting)


def train(design: Design, data: Callable[[int], Data], track: Track, unit: Unit) -> list[Result]:
    """Makes the runs of one method in one setting from all seeds."""
    (run,) = unit.cells
    callback = track(run.how.label, int(run.settings["num_outer_steps"]))
    samples = [data(seed) for seed in unit.seeds]
    evaluation, last = fit(run.method, design.setting, run.how.hyper, samples, unit.seeds, callback)
    names = ("outer_objective", "inner_objective", "hypergradient_norm")
    results: list[Result] = []
    for i, predictions in enumerate(evaluation.predictions):
        measured = design.measure(predictions)
        metrics = {name: last[name][i] for name in names} | dict(measured.metrics)
        results.append(Result(metrics | {"validation_loss": evaluation.validation_loss[i]}, measured.beside))
    return results

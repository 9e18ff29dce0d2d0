r"""Instrumental regression with observed covariates: the networks, methods and runs that small tables have in common.

The outcome y depends on a treatment p, which something unseen moves as well, and on covariates c; the instruments z
contain c. With treatment features psi_omega(p) and covariate features xi_omega(c), both with a constant added,

.. math::
    \min_\omega\; \min_u\; E\,(y - u^\top (h_\omega(z) \otimes \xi_\omega(c)))^2 + \lambda_2 \|u\|^2
    \quad\text{with}\quad
    h_\omega = \arg\min_h E\,\|h(z) - \psi_\omega(p)\|^2 = E[\psi_\omega(p) | z],

and u'(psi_omega(p) x xi_omega(c)) is the estimate of the structural function: given z the covariates are known, so
that only the treatment's features need their conditional mean (Xu et al., appendix on observable confounders). h is a
network with a linear head in closed form (variable projection), u is solved for.

References:
    Xu, Chen, Srinivasan, de Freitas, Doucet, Gretton, *Learning Deep Features in Instrumental Variable Regression*,
    ICLR 2021, https://arxiv.org/abs/2010.07154 (DFIV);
    Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, section 4.1.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import funcbilevel as fb
from funcbilevel.tasks import _records, iv
from funcbilevel.tasks._experiment.statistics import bootstrap_interval, paired_p_value

Array: TypeAlias = np.ndarray[Any, Any]

# Data.


class Batch(NamedTuple):
    """Observations.

    Attributes:
        z: instruments, the covariates among them, [n, q].
        p: treatment, [n, 1].
        c: covariates, [n, r].
        y: outcomes, [n].
    """

    z: Any
    p: Any
    c: Any
    y: Any


class Data(NamedTuple):
    """What a run reads, all standardised by the means and standard deviations of the training sample.

    Attributes:
        inner, outer: the two halves of the training sample.
        validation: observations that are not trained on.
        points: treatments [m, 1] and covariates [m, r] at which the structural function is wanted; no z, no y.
        y_mean, y_std: what takes y back.
    """

    inner: Batch
    outer: Batch
    validation: Batch
    points: Batch
    y_mean: Any
    y_std: Any


def standardised(train: Batch, validation: Batch, points: Batch) -> Data:
    """The data of a run; the first half of the training sample is the inner level's."""
    mean, std = (Batch(*(statistic(a, axis=0) for a in train)) for statistic in (np.mean, np.std))

    def scaled(batch: Batch, rows: slice = slice(None)) -> Batch:
        return Batch(*(None if a is None else (a[rows] - m) / s for a, m, s in zip(batch, mean, std, strict=True)))

    half = len(train.y) // 2
    data = Data(
        inner=scaled(train, slice(half)),
        outer=scaled(train, slice(half, None)),
        validation=scaled(validation),
        points=scaled(points),
        y_mean=mean.y,
        y_std=std.y,
    )
    return jax.tree.map(lambda a: np.asarray(a, np.float32), data)


def whole(data: Data) -> Batch:
    """The training sample."""
    return jax.tree.map(lambda inner, outer: jnp.concatenate([inner, outer]), data.inner, data.outer)


# The model.


class Net(linen.Module):
    """tanh layers: inputs x [n, k] -> features in (-1, 1), if `linear_part` x itself, and a constant, [n, p].

    Biases start from U(-1, 1), so that the units bend in different places.
    """

    widths: tuple[int, ...]
    linear_part: bool = False

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The features and the constant."""

        def biases(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -1.0, 1.0)

        features = x
        for width in self.widths:
            features = linen.tanh(linen.Dense(width, bias_init=biases)(features))
        return iv.with_constant(jnp.hstack([features, x]) if self.linear_part else features)


class OuterParams(NamedTuple):
    """omega.

    Attributes:
        treatment: parameters of psi.
        covariates: parameters of xi.
    """

    treatment: Any
    covariates: Any


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """All products of a feature of the one kind with one of the other, [n, k] and [n, m] -> [n, k m]."""
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


class Setting(NamedTuple):
    """What all methods have in common.

    Attributes:
        num_outer_steps: outer steps, over which the outer learning rate falls to zero along a cosine.
        treatment_widths, covariate_widths, instrument_widths: of the three networks.
        linear_part: whether their features hold their inputs too, so that two-stage least squares is a special case.
        inner_steps: Adam steps on theta per outer step.
        inner_learning_rate, outer_learning_rate: of Adam.
        inner_ridge, outer_ridge: on the heads of the two levels, which are solved for.
    """

    num_outer_steps: int = 200
    treatment_widths: tuple[int, ...] = (16, 8)
    covariate_widths: tuple[int, ...] = (64, 16)
    instrument_widths: tuple[int, ...] = (64, 32)
    linear_part: bool = False
    inner_steps: int = 10
    inner_learning_rate: float = 3e-3
    outer_learning_rate: float = 3e-3
    inner_ridge: float = 1e-3
    outer_ridge: float = 1e-3

    @property
    def treatment_features(self) -> int:
        """Number of features of the treatment: what h predicts."""
        return self.treatment_widths[-1] + 1 + self.linear_part


# Methods.

Hyper: TypeAlias = Mapping[str, float]


class Method(NamedTuple):
    """A way to train.

    Attributes:
        estimator: `(features of h, setting, **the hyper-parameters that are not the setting's) -> estimator`.
        own: the hyper-parameters that two of its trials differ by, besides those that all methods have in common;
            inner_ridge as a multiple of the setting's.
        instrumental: whether the outer level sees psi through h. If not, y is regressed on p and c themselves.
    """

    estimator: Callable[..., fb.Estimator]
    own: tuple[Hyper, Hyper]
    instrumental: bool = True


def trials(method: str, setting: Setting) -> tuple[Hyper, ...]:
    """The hyper-parameters between which the validation loss decides: six of every method."""
    common = ((1e-3, 1.0), (3e-3, 1.0), (3e-3, 10.0))  # outer learning rate, multiple of the outer ridge
    return tuple(
        {"outer_learning_rate": rate, "outer_ridge": factor * setting.outer_ridge}
        | {name: value * setting.inner_ridge if name == "inner_ridge" else value for name, value in own.items()}
        for own in METHODS[method].own
        for rate, factor in common
    )


def _funcid_linear(features: fb.Model, setting: Setting, ridge_ratio: float) -> fb.Estimator:
    return fb.funcid(fb.linear_adjoint(features, ridge=2 * setting.inner_ridge * ridge_ratio))


def _funcid_learned(features: fb.Model, setting: Setting, learning_rate: float) -> fb.Estimator:
    head = fb.from_linen(linen.Dense(setting.treatment_features, use_bias=False, kernel_init=linen.initializers.zeros))
    optimizer = iv.adam(learning_rate, 2 * setting.inner_ridge)
    return fb.funcid(fb.learned_adjoint(optimizer, setting.inner_steps, head, features=features))


def _alternating(features: fb.Model, setting: Setting) -> fb.Estimator:
    return fb.alternating()  # with a head in closed form the explicit part is DFIV's derivative, through the head


def _aid(features: fb.Model, setting: Setting, damping: float) -> fb.Estimator:
    return fb.aid(fb.cg(10, damping))


METHODS: dict[str, Method] = {
    "funcid-linear": Method(_funcid_linear, ({"ridge_ratio": 1.0}, {"ridge_ratio": 10.0})),
    "funcid-learned": Method(_funcid_learned, ({"learning_rate": 1e-2}, {"learning_rate": 1e-3})),
    "dfiv": Method(_alternating, ({"inner_ridge": 1.0}, {"inner_ridge": 10.0})),
    "aid-cg": Method(_aid, ({"damping": 1e-1}, {"damping": 10.0})),
    "single-objective": Method(_alternating, ({"num_outer_steps": 200}, {"num_outer_steps": 600}), instrumental=False),
}


# Training and evaluation.


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
        evaluate: `(state, data) -> Evaluation`.
    """

    bilevel: fb.BilevelSolver
    init: Callable[[jax.Array, Data], fb.BilevelState]
    batches: Callable[[Data], tuple[Batch, Batch]]
    evaluate: Callable[[fb.BilevelState, Data], Evaluation]


@cache
def _solver(method: str, setting: Setting, own: tuple[tuple[str, float], ...]) -> Solver:
    estimator, instrumental = METHODS[method].estimator, METHODS[method].instrumental
    ridge = setting.outer_ridge
    psi, xi, phi = (
        Net(widths, setting.linear_part)
        for widths in (setting.treatment_widths, setting.covariate_widths, setting.instrument_widths)
    )
    features = fb.from_linen(phi)
    h = fb.variable_projection(features, setting.treatment_features, ridge=2 * setting.inner_ridge)
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
        return iv.ridge_objective(with_covariates(omega, values, batch), batch.y, ridge)

    problem = fb.FunctionalProblem(inner_objective, outer_objective, inputs=lambda batch: batch.z)
    bilevel = fb.bilevel(
        problem,
        h,
        estimator(features, setting, **dict(own)),
        inner_optimizer=iv.adam(setting.inner_learning_rate, 0.0),
        outer_optimizer=iv.adam(schedule, 0.0),
        inner_steps=setting.inner_steps if instrumental else 1,
    )

    def init(key: jax.Array, data: Data) -> fb.BilevelState:
        psi_key, xi_key, key = jax.random.split(key, 3)
        omega = OuterParams(psi.init(psi_key, data.inner.p), xi.init(xi_key, data.inner.c))
        return bilevel.init(key, omega, data.inner)

    def batches(data: Data) -> tuple[Batch, Batch]:
        return (data.inner, data.outer) if instrumental else (data.inner, whole(data))

    def evaluate(state: fb.BilevelState, data: Data) -> Evaluation:
        omega = state.outer_params
        if instrumental:
            h_fitted = fb.predictor(problem, h, omega, state.inner_params, data.inner, state.model_state)

            def seen(batch: Batch) -> jax.Array:
                return with_covariates(omega, h_fitted(batch.z), batch)
        else:

            def seen(batch: Batch) -> jax.Array:
                return with_covariates(omega, treatment(omega, batch), batch)

        sample = batches(data)[1]
        u = iv.ridge_regression(seen(sample), sample.y, ridge)
        structural = with_covariates(omega, treatment(omega, data.points), data.points) @ u
        loss = jnp.mean((seen(data.validation) @ u - data.validation.y) ** 2)
        return Evaluation(structural * data.y_std + data.y_mean, loss * data.y_std**2)

    return Solver(bilevel, init, batches, evaluate)


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
        jax.tree_util.Partial(_constant, batches),
        setting.num_outer_steps,
        chunk=min(50, setting.num_outer_steps),
        callback=mean_over_seeds,
        progress=False,
        on_nonfinite="continue",
    )
    evaluation = jax.device_get(jax.jit(jax.vmap(solver.evaluate))(state, stacked))
    return evaluation, {name: values[-1] for name, values in metrics.items()}


def _constant(batches: Any, key: jax.Array, step: jax.Array) -> Any:
    return batches


# What the commands have in common.

SELECTION_SEEDS = (1000, 1001, 1002, 1003)
COLOURS = {
    **{"funcid-linear": "C3", "funcid-learned": "C1", "dfiv": "C0", "aid-cg": "C2"},
    **{"single-objective": "0.45", "iv2sls": "0.7"},
}


class Result(NamedTuple):
    """One method on all seeds.

    Attributes:
        values: what the seeds are compared by, [seeds].
        predictions: at the data's points, [seeds, m].
        validation_loss: [seeds].
    """

    values: Array
    predictions: Array
    validation_loss: Array


@dataclass(frozen=True)
class Compare(_records.Options):
    """What the commands that compare methods on a table over seeds have in common."""

    resumable = True
    beside = ("seed", "seeds", "methods")
    setting: ClassVar[Setting] = Setting()
    """What all methods have in common on these data."""
    metric: ClassVar[str]
    """Name of what the seeds are compared by."""
    seeds: int = 10
    """Number of seeds, from --seed on; each has its own networks and its own sample or split."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare."""

    def check(self) -> None:
        """Raises a ValueError that names an option out of range."""
        self.check_counts("seeds")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or len(set(self.methods)) < max(1, len(self.methods)):
            got = ", ".join(self.methods) or "none"
            raise ValueError(f"--methods must be among {', '.join(METHODS)}, each once, got {got}.")

    def data(self, seed: int) -> Data:
        """The data of a seed."""
        raise NotImplementedError

    def value(self, predictions: Array) -> float:
        """The metric of one seed's predictions at its points."""
        raise NotImplementedError

    def results(self, directory: Path, track: _records.Track) -> dict[str, Result]:
        """Chooses each method's hyper-parameters by the validation loss on four other seeds, then trains on all seeds.

        A run that broke counts as infinite. Each trial is one line per seed of trials.jsonl, and is not repeated if it
        stands there already. runs.jsonl is written anew. All seeds are trained in one vmap; a record's seconds are an
        equal share.
        """
        trials_path, runs_path = directory / "trials.jsonl", directory / "runs.jsonl"
        losses: dict[tuple[str, str], list[float]] = {}
        for record in _records.read_existing(trials_path):
            loss = record["metrics"]["validation_loss"]
            key = record["method"], _records.settings_key(record["settings"])
            losses.setdefault(key, []).append(np.inf if loss is None else loss)
        held_out = [self.data(seed) for seed in SELECTION_SEEDS]
        chosen: dict[str, Hyper] = {}
        for method in self.methods:
            hypers = trials(method, self.setting)
            keys = [(method, _records.settings_key(self._settings(hyper))) for hyper in hypers]
            for i, (key, hyper) in enumerate(zip(keys, hypers, strict=True), start=1):
                if len(losses.get(key, ())) < len(SELECTION_SEEDS):
                    result = self._run(trials_path, method, hyper, held_out, SELECTION_SEEDS, track, f"{method} {i}")
                    loss = result.validation_loss
                    losses[key] = np.where(np.isfinite(loss), loss, np.inf).tolist()
            chosen[method] = hypers[int(np.argmin([np.mean(losses[key]) for key in keys]))]

        runs_path.unlink(missing_ok=True)
        seeds = tuple(range(self.seed, self.seed + self.seeds))
        data = [self.data(seed) for seed in seeds]
        return {
            method: self._run(runs_path, method, hyper, data, seeds, track, method) for method, hyper in chosen.items()
        }

    def _settings(self, hyper: Hyper) -> dict[str, Any]:
        return self.settings() | self.setting._asdict() | dict(hyper)

    def _run(
        self,
        path: Path,
        method: str,
        hyper: Hyper,
        data: Sequence[Data],
        seeds: Sequence[int],
        track: _records.Track,
        label: str,
    ) -> Result:
        start = time.perf_counter()
        settings = self._settings(hyper)
        evaluation, last = fit(method, self.setting, hyper, data, seeds, track(label, int(settings["num_outer_steps"])))
        seconds = (time.perf_counter() - start) / len(seeds)
        values = np.array([self.value(row) for row in evaluation.predictions])
        for i, seed in enumerate(seeds):
            metrics = {name: last[name][i] for name in ("outer_objective", "inner_objective", "hypergradient_norm")}
            metrics |= {self.metric: values[i], "validation_loss": evaluation.validation_loss[i]}
            _records.append(path, _records.record(self.task, method, seed, settings, metrics, seconds))
        return Result(values, evaluation.predictions, evaluation.validation_loss)


class Row(NamedTuple):
    """A method over the seeds; a run that broke counts as infinite.

    Attributes:
        median, quartiles: of the values.
        interval: 95% bootstrap interval of the median.
        validation_loss: median.
    """

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    validation_loss: float


_BROKEN = 1e30  # stands for infinity, with which quantiles and ranks cannot be computed


def summarise(results: Mapping[str, Result]) -> dict[str, Row]:
    """One row per method."""
    return {name: _row(result) for name, result in results.items()}


def _row(result: Result) -> Row:
    sample = ranked(result)
    low, median, high = np.quantile(sample, (0.25, 0.5, 0.75))
    loss = np.median(np.where(np.isfinite(result.validation_loss), result.validation_loss, _BROKEN))
    values = [
        float(np.inf if value > _BROKEN / 1e3 else value)
        for value in (median, low, high, *bootstrap_interval(sample), loss)
    ]
    return Row(values[0], (values[1], values[2]), (values[3], values[4]), values[5])


def ranked(result: Result) -> Array:
    """The values, with a very large number for infinity."""
    return np.where(np.isfinite(result.values), result.values, _BROKEN).astype(float)


def p_value(result: Result, baseline: Result) -> float | None:
    """Of the paired, two-sided Wilcoxon test between two methods on the same seeds."""
    return paired_p_value(ranked(result) - ranked(baseline))

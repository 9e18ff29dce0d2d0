r"""Instrumental regression on dSprites (Xu et al. 2021) as a functional bilevel problem (Petrulionyte et al. 2024).

The treatment x is a picture, the instruments z say how it came about, and something unseen moves both the picture and
the outcome y. With features f_omega(x) of the picture,

.. math::
    \min_\omega\; \min_u\; E\,(y - u^\top [h_\omega(z), 1])^2 + \lambda_2 \|u\|^2 \quad\text{with}\quad
    h_\omega = \arg\min_h E\,\|h(z) - f_\omega(x)\|^2 = E[f_\omega(x) | z],

and u'[f_omega(x), 1] is the estimate of the structural function. h is a network with a linear head in closed form
(variable projection). Objectives are means where the published code has sums: its L2 of 0.1 on the weights is 0.1/n.

References:
    Petrulionyte, Mairal, Arbel, NeurIPS 2024, https://arxiv.org/abs/2403.20233, section 4.1;
    Xu, Chen, Srinivasan, de Freitas, Doucet, Gretton, *Learning Deep Features in Instrumental Variable Regression*,
    ICLR 2021, https://arxiv.org/abs/2010.07154 (DFIV).
"""

import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import funcbilevel as fb
from funcbilevel.tasks import _records, dsprites

Norm: TypeAlias = Literal["layer", "batch"]

# Networks.


def _dense(x: jax.Array, width: int, train: bool) -> jax.Array:
    """A linear layer whose matrix has spectral norm 1, by one power iteration per call in train mode.

    Weights and biases start as in the published code, from U(-1, 1) / sqrt(fan-in), but that Flax stores the weights
    divided by their first norm. With Flax's own biases of zero the instrument network's units would all bend at z = 0.
    """

    def biases(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / np.sqrt(x.shape[-1])

    kernels = linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return linen.SpectralNorm(linen.Dense(width, kernel_init=kernels, bias_init=biases))(x, update_stats=train)


def _normalise(x: jax.Array, norm: Norm, train: bool) -> jax.Array:
    return linen.LayerNorm()(x) if norm == "layer" else linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class TreatmentNet(linen.Module):
    """f_omega: pictures [n, 4096] -> features [n, widths[-1]] in (-1, 1)."""

    widths: tuple[int, int, int, int] = (1024, 512, 128, 32)
    norm: Norm = "layer"

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The features of pictures, [n, widths[-1]]."""
        x = linen.relu(_dense(x, self.widths[0], train))
        x = _normalise(linen.relu(_dense(x, self.widths[1], train)), self.norm, train)
        x = linen.relu(_dense(x, self.widths[2], train))
        return jnp.tanh(_normalise(_dense(x, self.widths[3], train), self.norm, train))


class InstrumentNet(linen.Module):
    """phi_theta: instruments [n, 3] -> features and a constant, [n, 33]."""

    norm: Norm = "layer"

    @linen.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """The features of instruments and a constant, [n, 33]."""
        z = linen.relu(_dense(z, 256, train))
        z = _normalise(linen.relu(_dense(z, 128, train)), self.norm, train)
        z = _normalise(linen.relu(_dense(z, 128, train)), self.norm, train)
        z = linen.relu(_normalise(_dense(z, 32, train), self.norm, train))
        return jnp.hstack([z, jnp.ones((len(z), 1), z.dtype)])


# The problem.

INNER_RIDGE = 0.1  # on |V|^2, the head of h
OUTER_RIDGE = 0.1  # on |u|^2


class Batch(NamedTuple):
    """A sample of one of the two levels.

    Attributes:
        z: instruments, [n, 3].
        x: pictures, [n, 4096]; the outer level does not see them.
        y: outcomes, [n]; the inner level does not see them.
    """

    z: Any
    x: Any = None
    y: Any = None


def second_stage(h: jax.Array, y: jax.Array) -> jax.Array:
    """u, [k + 1]: the ridge regression of y on [h, 1], in closed form."""
    return ridge_regression(with_constant(h), y, OUTER_RIDGE)


def ridge_regression(features: jax.Array, y: jax.Array, ridge: float) -> jax.Array:
    """u, [p], that minimises E (y - u'features)^2 + ridge |u|^2 for features [n, p], in closed form."""
    gram = features.T @ features / len(y) + ridge * jnp.eye(features.shape[1], dtype=features.dtype)
    return jax.scipy.linalg.solve(gram, features.T @ y / len(y), assume_a="pos")


def ridge_objective(features: jax.Array, y: jax.Array, ridge: float) -> jax.Array:
    """E (y - u'features)^2 + ridge |u|^2 at its minimum over u."""
    u = ridge_regression(features, y, ridge)
    return jnp.mean((y - features @ u) ** 2) + ridge * jnp.sum(u**2)


def with_constant(h: jax.Array) -> jax.Array:
    """[h, 1], [n, k + 1]."""
    return jnp.hstack([h, jnp.ones((len(h), 1), h.dtype)])


def inner_objective(f: jax.Array, h: jax.Array, batch: Batch) -> jax.Array:
    """E |h(z) - f(x)|^2; f, [n, k], are the features of the inner batch's pictures."""
    del batch
    return jnp.mean(jnp.sum((h - f) ** 2, axis=1))


def outer_objective(f: jax.Array, h: jax.Array, batch: Batch) -> jax.Array:
    """The second stage's ridge objective at its minimum over u."""
    del f
    return ridge_objective(with_constant(h), batch.y, OUTER_RIDGE)


problem = fb.FunctionalProblem(inner_objective, outer_objective, inputs=lambda batch: batch.z)


# Methods.


class Setting(NamedTuple):
    """What all methods have in common.

    Attributes:
        n: sample size; half of it is the inner level's.
        widths: of the treatment network.
        norm: layer or batch normalisation.
        inner_steps: Adam steps on theta per outer step.
        inner_learning_rate, outer_learning_rate, weight_decay: of Adam with an L2 penalty, on theta and omega.
    """

    n: int = 5000
    widths: tuple[int, int, int, int] = (1024, 512, 128, 32)
    norm: Norm = "layer"
    inner_steps: int = 20
    inner_learning_rate: float = 1e-3
    outer_learning_rate: float = 3e-3
    weight_decay: float = 0.1


Hyper: TypeAlias = Mapping[str, float]


class Method(NamedTuple):
    """A way to train.

    Attributes:
        estimator: `(features of h, outputs of h, **hyper) -> estimator`.
        trials: the values of `hyper` between which the validation loss decides.
        choice: the one that it chose, by its place among them (benchmarks/results/iv/selection.jsonl).
    """

    estimator: Callable[..., fb.Estimator]
    trials: tuple[Hyper, ...]
    choice: int = 0

    @property
    def chosen(self) -> Hyper:
        """The hyper-parameters to use."""
        return self.trials[self.choice]


def _funcid_linear(features: fb.Model, k: int, ridge: float) -> fb.Estimator:
    return fb.funcid(fb.linear_adjoint(features, ridge=ridge))


def _funcid_learned(features: fb.Model, k: int, learning_rate: float, ridge: float = 2 * INNER_RIDGE) -> fb.Estimator:
    head = fb.from_linen(linen.Dense(k, use_bias=False, kernel_init=linen.initializers.zeros))
    return fb.funcid(fb.learned_adjoint(adam(learning_rate, ridge), 20, head, features=features))


def _dfiv(features: fb.Model, k: int) -> fb.Estimator:
    return fb.alternating()


def _aid(features: fb.Model, k: int, num_steps: int, damping: float) -> fb.Estimator:
    return fb.aid(fb.cg(num_steps, damping))


def _itd(features: fb.Model, k: int, num_steps: int) -> fb.Estimator:
    return fb.itd(num_steps)


def _value_penalty(features: fb.Model, k: int, penalty: float) -> fb.Estimator:
    return fb.value_penalty(adam(1e-3, 0.0), 20, penalty)


def _gradient_penalty(features: fb.Model, k: int, penalty: float) -> fb.Estimator:
    return fb.gradient_penalty(adam(1e-3, 0.0), 20, penalty)


_AID_TRIALS = ((10, 1.0), (10, 0.1), (2, 1.0), (10, 10.0), (10, 100.0))  # (CG steps, damping)
METHODS: dict[str, Method] = {
    "funcid-linear": Method(_funcid_linear, tuple({"ridge": r} for r in (0.2, 2.0, 20.0)), choice=1),
    "funcid-learned": Method(_funcid_learned, tuple({"learning_rate": r} for r in (1e-2, 1e-3, 1e-1)), choice=2),
    "dfiv": Method(_dfiv, tuple({"outer_learning_rate": r} for r in (3e-3, 1e-3, 2e-3))),
    "aid-cg": Method(_aid, tuple({"num_steps": k, "damping": d} for k, d in _AID_TRIALS), choice=4),
    "itd": Method(_itd, tuple({"num_steps": t} for t in (2, 5, 10)), choice=1),
    "penalty-value": Method(_value_penalty, tuple({"penalty": p} for p in (100.0, 10.0, 1000.0))),
    "penalty-gradient": Method(_gradient_penalty, tuple({"penalty": p} for p in (100.0, 10.0, 1000.0))),
}


def adam(learning_rate: float, l2: float) -> optax.GradientTransformation:
    """Adam on the objective plus l2/2 |parameters|^2. eps is small because the objectives are means, not sums."""
    return optax.chain(optax.add_decayed_weights(l2), optax.adam(learning_rate, eps=1e-11, eps_root=1e-20))


class Solver(NamedTuple):
    """A method made ready.

    Attributes:
        bilevel: the solver; the treatment network is its outer model.
        h: the model of h, a network with a head in closed form.
        f: the treatment network.
    """

    bilevel: fb.BilevelSolver
    h: fb.Model
    f: fb.Model


def solver(method: str, setting: Setting, hyper: Hyper) -> Solver:
    """The solver of a method; the same arguments give the same object, whose programs are then compiled once.

    Raises:
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    return _solver(method, setting, tuple(sorted(hyper.items())))


@cache
def _solver(method: str, setting: Setting, hyper: tuple[tuple[str, float], ...]) -> Solver:
    own: dict[str, Any] = dict(hyper)
    outer_learning_rate = own.pop("outer_learning_rate", setting.outer_learning_rate)
    k = setting.widths[-1]
    features = fb.from_linen(InstrumentNet(setting.norm))
    h = fb.variable_projection(features, num_outputs=k, ridge=2 * INNER_RIDGE)
    f = fb.from_linen(TreatmentNet(setting.widths, setting.norm))
    l2 = setting.weight_decay / (setting.n // 2)
    bilevel = fb.bilevel(
        problem,
        h,
        METHODS[method].estimator(features, k, **own),
        inner_optimizer=adam(setting.inner_learning_rate, l2),
        outer_optimizer=adam(outer_learning_rate, l2),
        inner_steps=setting.inner_steps,
        outer_model=f,
        outer_inputs=lambda batch: batch.x,
    )
    return Solver(bilevel, h, f)


# Training and evaluation.


class Arrays(NamedTuple):
    """Everything that a run reads, on the device.

    Attributes:
        inner, outer, validation: samples.
        test_x, test_y: clean pictures, [588, 4096], and the structural function there, [588].
    """

    inner: Batch
    outer: Batch
    validation: Batch
    test_x: jax.Array
    test_y: jax.Array


def arrays(n: int, seed: int, source: dsprites.Hearts, B: np.ndarray[Any, Any], num_validation: int = 200) -> Arrays:
    """The data of one seed."""
    data, test = dsprites.generate(n, seed, source, B), dsprites.test_set(source, B)
    valid = dsprites.validation(num_validation, seed, source, B)
    return jax.tree.map(
        jnp.asarray,
        Arrays(
            inner=Batch(data.z_inner, data.x_inner),
            outer=Batch(data.z_outer, y=data.y_outer),
            validation=Batch(valid.z, y=valid.y),
            test_x=jnp.asarray(test.x),
            test_y=jnp.asarray(test.y),
        ),
    )


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
            `linear_curvature` and `linear_residual`; each a list of floats.
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
}


def run(
    solver: Solver,
    data: Arrays,
    seed: int,
    num_outer_steps: int = 100,
    *,
    chunk: int = 10,
    batch_size: int | None = None,
    callback: Callable[[Any, Mapping[str, Any]], None] | None = None,
) -> Outcome:
    """Trains from the seed's initial networks, which are the same for every method, and evaluates after each chunk."""
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


def settings_of(setting: Setting, hyper: Hyper, num_outer_steps: int, batch_size: int | None) -> dict[str, Any]:
    """What a record says of a run, as it comes back from JSON."""
    settings = setting._asdict() | dict(hyper) | {"num_outer_steps": num_outer_steps, "batch_size": batch_size}
    return settings | {"widths": list(setting.widths)}


def write(
    directory: Path, name: str, method: str, seed: int, settings: dict[str, Any], outcome: Outcome, seconds: float
) -> None:
    """One run's record goes to `<name>.jsonl`, its curves to `<name>-curves.jsonl`."""
    metrics = {
        "test_mse": outcome.evaluation.test_mse,
        "validation_loss": outcome.evaluation.validation_loss,
        "seconds_per_step": outcome.seconds_per_step,
    }
    with (directory / f"{name}-curves.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"method": method, "seed": seed, "settings": settings} | outcome.curves) + "\n")
    result = _records.record("iv", method, seed, settings, outcome.metrics | metrics, seconds)
    _records.append(directory / f"{name}.jsonl", result)

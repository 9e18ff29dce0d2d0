"""A problem and a model together: the fitted function, the parametric problem, the gradient of the inner fit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from funcbilevel._described import fields_that_differ
from funcbilevel._model import Model
from funcbilevel._problem import FunctionalProblem, ParametricProblem, Problem, inner_value, mean_over_devices
from funcbilevel._projection import at_optimal_head, ridge_term, solve_head
from funcbilevel._typing import (
    Batch,
    InnerParams,
    Inputs,
    Key,
    Metrics,
    ModelState,
    OuterParams,
    Prediction,
)


def parametrize(
    problem: FunctionalProblem, model: Model, model_state: ModelState = (), inner_batch: Batch = None
) -> ParametricProblem:
    """The parametric problem theta -> L(omega, h_theta(x), batch) of a functional one.

    Arguments:
        problem: the functional problem.
        model: the prediction model, used in evaluation mode.
        model_state: its non-trainable state (batch statistics and the like), held fixed.
        inner_batch: for a model with a linear head (`variable_projection`), the batch on which the outer objective's
            head is solved for. The inner objective then holds the head's ridge term as well.

    Returns:
        A `ParametricProblem`, for estimators and solvers that differentiate through parameters.

    Raises:
        TypeError: `problem` is not a `FunctionalProblem` or `model` not a `Model`.
        ValueError: a model with a head, and no `inner_batch`.

    Example:
        >>> parametric = fb.parametrize(problem, model)  # doctest: +SKIP
    """
    if not isinstance(problem, FunctionalProblem):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"parametrize: problem must be a FunctionalProblem, got {type(problem).__name__}.")
    if not isinstance(model, Model):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"parametrize: model must be an fb.Model, got {type(model).__name__}; "
            "make one with fb.from_function, fb.from_linen or fb.from_nnx."
        )

    if model.head is not None and inner_batch is None:
        raise ValueError(
            "parametrize: inner_batch is None, but the model has a linear head, whose solution enters the outer "
            "objective; pass the inner batch."
        )

    def inner_objective(outer_params: OuterParams, inner_params: InnerParams, batch: Batch) -> Any:
        features, _ = model.apply(inner_params, model_state, problem.inputs(batch))
        if model.head is None:
            return problem.inner_objective(outer_params, features, batch)
        V = solve_head(problem, model, outer_params, features, batch)
        value = at_optimal_head(problem, model.head.ridge)(outer_params, features, V, batch)
        return (value, problem.inner_objective(outer_params, features @ V, batch)[1]) if problem.has_aux else value

    def outer_objective(outer_params: OuterParams, inner_params: InnerParams, batch: Batch) -> Any:
        h = predictor(problem, model, outer_params, inner_params, inner_batch, model_state)
        return problem.outer_objective(outer_params, h(problem.inputs(batch)), batch)

    return ParametricProblem(inner_objective, outer_objective, problem.has_aux, problem.axis_name)


def as_parametric(
    problem: Problem, model: Model | None, model_state: ModelState, inner_batch: Batch
) -> ParametricProblem:
    """`problem` as the parametric estimators see it, with the model's state held fixed."""
    if isinstance(problem, ParametricProblem):
        return problem
    assert model is not None
    return parametrize(problem, model, model_state, inner_batch)


@dataclass(frozen=True)
class Predictor:
    """The function x -> h_theta(x), in evaluation mode.

    Attributes:
        head: V, [p, num_outputs], of a model from `variable_projection`; None for others.
    """

    apply: Callable[[Inputs], Prediction] = field(repr=False)
    head: jax.Array | None = None

    def __repr__(self) -> str:
        return fields_that_differ(self)

    def __call__(self, inputs: Inputs) -> Prediction:
        """The prediction on `inputs`, leaves [n, ...]."""
        return self.apply(inputs) if self.head is None else self.apply(inputs) @ self.head


def predictor(
    problem: FunctionalProblem,
    model: Model,
    outer_params: OuterParams,
    inner_params: InnerParams,
    inner_batch: Batch,
    model_state: ModelState = (),
) -> Predictor:
    """The fitted function h: inputs -> prediction, in evaluation mode.

    For a model of `variable_projection` this solves for the head V on the inner batch, once; for others it is
    `model.apply` at these parameters, and `outer_params` and `inner_batch` play no part.

    Arguments:
        problem, model: as given to `bilevel`.
        outer_params: omega (with an `outer_model`: its output on `inner_batch`).
        inner_params, model_state: as they stand in `BilevelState`.
        inner_batch: the batch on which the head is solved for.

    Example: the head that a regression on one feature solves for.
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> features = fb.from_function(lambda key, x: jnp.ones((1, 1)), lambda theta, x: x @ theta)
        >>> model = fb.variable_projection(features, num_outputs=1)
        >>> problem = fb.FunctionalProblem(
        ...     lambda w, v, batch: jnp.mean((v - w * batch[0]) ** 2), lambda w, v, batch: jnp.mean(v**2)
        ... )
        >>> batch = (jnp.array([[1.0], [2.0]]),)
        >>> h = fb.predictor(problem, model, 3.0, jnp.ones((1, 1)), batch)
        >>> [round(float(x), 4) for x in (h.head[0, 0], h(jnp.array([[5.0]]))[0, 0])]
        [3.0, 15.0]
    """

    def apply(inputs: Inputs) -> Prediction:
        return model.apply(inner_params, model_state, inputs)[0]

    if model.head is None:
        return Predictor(apply)
    return Predictor(apply, solve_head(problem, model, outer_params, apply(problem.inputs(inner_batch)), inner_batch))


def training_value_and_grad(
    problem: Problem, model: Model | None, outer_params: OuterParams, batch: Batch
) -> Callable[[InnerParams, ModelState, Key | None], tuple[tuple[jax.Array, tuple[Metrics, ModelState]], InnerParams]]:
    """theta -> L_in and d_theta L_in with the model in train mode, and the model state that this pass leaves behind.

    Of a model with a linear head, at the head's optimum V: its derivative in V is zero there, so that d_theta is the
    partial derivative with V held fixed (the variable projection of Golub and Pereyra), whatever moves V.
    """

    def objective(
        inner_params: InnerParams, model_state: ModelState, key: Key | None
    ) -> tuple[jax.Array, tuple[Metrics, ModelState]]:
        if isinstance(problem, FunctionalProblem):
            assert model is not None
            u, model_state = model.apply(inner_params, model_state, problem.inputs(batch), train=True, key=key)
        else:
            u = inner_params
        value, aux = inner_value(problem, outer_params, u, batch)
        return value, (aux, model_state)

    def value_and_grad(
        inner_params: InnerParams, model_state: ModelState, key: Key | None
    ) -> tuple[tuple[jax.Array, tuple[Metrics, ModelState]], InnerParams]:
        value_and_aux, grad = jax.value_and_grad(objective, has_aux=True)(inner_params, model_state, key)
        return value_and_aux, mean_over_devices(problem, grad)

    def projected_value_and_grad(
        inner_params: InnerParams, model_state: ModelState, key: Key | None
    ) -> tuple[tuple[jax.Array, tuple[Metrics, ModelState]], InnerParams]:
        assert isinstance(problem, FunctionalProblem)
        assert model is not None
        assert model.head is not None
        inputs, apply = problem.inputs(batch), model.apply
        phi, pull, model_state = jax.vjp(
            lambda theta: apply(theta, model_state, inputs, train=True, key=key), inner_params, has_aux=True
        )
        V = solve_head(problem, model, outer_params, phi, batch)
        (value, aux), grad_v = jax.value_and_grad(lambda v: inner_value(problem, outer_params, v, batch), has_aux=True)(
            phi @ V
        )
        (grad,) = pull(grad_v @ V.T)
        value = value + ridge_term(model.head.ridge, V)
        return (value, (aux, model_state)), mean_over_devices(problem, grad)

    return value_and_grad if model is None or model.head is None else projected_value_and_grad

"""What the penalty methods share: a second set y of inner parameters that pays for leaving the inner solution."""

from typing import Any, Protocol

import jax
import optax

from funcbilevel._arguments import check_number, check_optimizer, check_positive
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call
from funcbilevel._fit import FitState, fit
from funcbilevel._model import Model
from funcbilevel._predictor import as_parametric
from funcbilevel._problem import (
    ParametricProblem,
    mean_over_devices,
    outer_derivatives,
    outer_value,
)
from funcbilevel._tree import all_finite, stays_finite, tree_add_scaled
from funcbilevel._typing import Batch, InnerParams, Key, Metrics, ModelState, OuterParams, PyTree


class Term(Protocol):
    """p(omega, y, theta) >= 0, zero where y solves the inner level as theta does."""

    def __call__(
        self,
        problem: ParametricProblem,
        outer_params: OuterParams,
        y: InnerParams,
        theta: InnerParams,
        inner_batch: Batch,
        /,
    ) -> jax.Array: ...


class AtTheta(Protocol):
    """Metrics of the inner solution theta, where d_theta L_out is d."""

    def __call__(
        self,
        problem: ParametricProblem,
        outer_params: OuterParams,
        theta: InnerParams,
        inner_batch: Batch,
        d: InnerParams,
        /,
    ) -> Metrics: ...


def penalised(
    name: str,
    term: Term,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    penalty: float,
    warm_start: bool,
    at_theta: AtTheta = lambda *_: {},
) -> Estimator:
    r"""The estimator of the penalised problem, with p the term and lambda the penalty.

    .. math::
        y &\approx \arg\min_y p(\omega, y, \theta) + \tfrac1\lambda L_{out}(\omega, y), \\
        \nabla F(\omega) &\approx \partial_\omega L_{out}(\omega, y) + \lambda\, \partial_\omega p(\omega, y, \theta) .
    """
    check_optimizer(name, "optimizer", optimizer)
    check_number(name, "num_steps", num_steps)
    check_positive(name, "penalty", penalty)

    def init(key: Key | None, problem: Any, model: Model | None, inner: FitState, inner_batch: Batch, /) -> PyTree:
        del key, problem, model, inner_batch
        y = jax.tree.map(lambda theta: theta.copy(), inner.params)  # its own buffers, to be donated
        return FitState(y, optimizer.init(y), ()) if warm_start else ()

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        problem, model, solve, outer_params, inner_batch, outer_batch, state, _ = call
        inner = solve(outer_params)
        theta, parametric = inner.fit.params, as_parametric(problem, model, inner.fit.model_state, inner_batch)

        def p(omega: OuterParams, y: InnerParams) -> jax.Array:
            return term(parametric, omega, y, theta, inner_batch)

        def L_out(omega: OuterParams, y: InnerParams) -> jax.Array:
            return outer_value(parametric, omega, y, outer_batch)[0]

        def value_and_grad(y: InnerParams, model_state: ModelState, *_: Any) -> Any:
            value, grad = jax.value_and_grad(lambda y: p(outer_params, y) + L_out(outer_params, y) / penalty)(y)
            return (value, ({}, model_state)), mean_over_devices(problem, grad)

        start = state if warm_start else FitState(theta, optimizer.init(theta), ())
        fitted, _, objective, _ = fit(value_and_grad, optimizer, num_steps, start, None)
        y = fitted.params

        g_exp = jax.grad(L_out)(outer_params, y)
        g_imp = jax.grad(lambda omega: penalty * p(omega, y))(outer_params)
        value, aux, _, d = outer_derivatives(parametric, outer_params, theta, outer_batch)  # at theta, as all report it
        sound = all_finite(value, d)
        finite = all_finite(y, objective) & stays_finite(start, fitted)
        metrics = aux | {"penalty_objective": objective, "adjoint_finite": finite | ~sound, "outer_finite": sound}
        metrics |= at_theta(parametric, outer_params, theta, inner_batch, d)
        gradient = tree_add_scaled(g_exp, 1.0, g_imp)
        return inner, Hypergradient(gradient, g_exp, g_imp, value, fitted if warm_start else (), metrics)

    return Estimator(init, by_call(estimate))

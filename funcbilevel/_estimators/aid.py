"""AID: approximate implicit differentiation in parameter space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from funcbilevel._described import described
from funcbilevel._estimator import Estimator, Hypergradient, InnerSolution, InnerSolve
from funcbilevel._fit import FitState
from funcbilevel._linear_solvers import LinearSolver, as_linear_solver, linear_metrics
from funcbilevel._model import Model
from funcbilevel._problem import (
    Problem,
    as_parametric,
    inner_cross_derivative,
    inner_curvature,
    outer_derivatives,
)
from funcbilevel._tree import all_finite, tree_add_scaled
from funcbilevel._typing import Batch, Key, OuterParams, PyTree

if TYPE_CHECKING:
    import lineax


@described
def aid(linear_solver: LinearSolver | lineax.AbstractLinearSolver[Any], warm_start: bool = True) -> Estimator:
    r"""Approximate implicit differentiation (AID).

    With theta the inner solution and delta the solver's damping,

    .. math::
        (\partial^2_\theta L_{in} + \delta I)\, u &= \partial_\theta L_{out}, \\
        \nabla F(\omega) &= \partial_\omega L_{out} - \partial_\omega \langle \partial_\theta L_{in}, u\rangle .

    The inner gradient is linearised once; each step of the linear solver then costs one Hessian-vector product.

    Arguments:
        linear_solver: `cg`, `normal_cg`, `gmres`, `neumann`, `gradient_descent`, `identity`, or any lineax solver.
        warm_start: whether the solver starts from the previous outer step's u, or from zero.

    Returns:
        An `Estimator` for either kind of problem (a functional one is taken at the model's parameters, in
        evaluation mode). Metrics: `adjoint_finite`, `linear_residual`, `linear_converged`, `linear_curvature`.

    Raises:
        TypeError: `linear_solver` is not one.

    Example:
        >>> estimator = fb.aid(fb.cg(20, damping=1e-3))

    References:
        Pedregosa, ICML 2016, https://arxiv.org/abs/1602.02355;
        Lorraine, Vicol, Duvenaud, AISTATS 2020, https://arxiv.org/abs/1911.02590.
    """
    solver = as_linear_solver(linear_solver)

    def init(key: Key | None, problem: Problem, model: Model | None, inner: FitState, inner_batch: Batch, /) -> PyTree:
        del key, problem, model, inner_batch
        return jax.tree.map(jnp.zeros_like, inner.params) if warm_start else ()

    def estimate(
        problem: Problem,
        model: Model | None,
        solve: InnerSolve,
        outer_params: OuterParams,
        inner_batch: Batch,
        outer_batch: Batch,
        state: PyTree,
        key: Key | None,
        /,
    ) -> tuple[InnerSolution, Hypergradient]:
        del key
        inner = solve(outer_params)
        theta, problem = inner.fit.params, as_parametric(problem, model, inner.fit.model_state, inner_batch)

        value, aux, g_exp, rhs = outer_derivatives(problem, outer_params, theta, outer_batch)
        hessian = inner_curvature(problem, outer_params, theta, inner_batch)

        def damped(u: PyTree) -> PyTree:
            return tree_add_scaled(hessian(u), solver.damping, u)

        u = solver.solve(damped, rhs, state if warm_start else None)
        cross = inner_cross_derivative(problem, outer_params, theta, inner_batch, u)
        g_imp = jax.tree.map(jnp.negative, cross)

        metrics = linear_metrics(damped, rhs, u)
        metrics = metrics | aux | {"adjoint_finite": all_finite(u, metrics) | ~all_finite(rhs)}
        gradient = tree_add_scaled(g_exp, 1.0, g_imp)
        return inner, Hypergradient(gradient, g_exp, g_imp, value, u if warm_start else (), metrics)

    return Estimator(init, estimate)

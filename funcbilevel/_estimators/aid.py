"""AID: approximate implicit differentiation in parameter space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from funcbilevel._argmin import root_layer
from funcbilevel._arguments import check_correction
from funcbilevel._check import leaves_seen
from funcbilevel._described import described
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call, no_state
from funcbilevel._linear_solvers import LinearSolver, as_linear_solver, rescaled, solution_start, solve_linear
from funcbilevel._predictor import as_parametric
from funcbilevel._problem import (
    inner_cross_derivative,
    inner_derivatives,
    outer_derivatives,
    stationarity,
)
from funcbilevel._tree import all_finite, tree_add_scaled, tree_cast, tree_norm, working_dtype
from funcbilevel._typing import PyTree

if TYPE_CHECKING:
    import lineax


@described
def aid(
    linear_solver: LinearSolver | lineax.AbstractLinearSolver[Any], warm_start: bool = True, correction: float = 0.0
) -> Estimator:
    r"""Approximate implicit differentiation (AID).

    With theta the inner solution and delta the solver's damping,

    .. math::
        (\partial^2_\theta L_{in} + \delta I)\, u &= \partial_\theta L_{out}, \\
        \nabla F(\omega) &= \partial_\omega L_{out} - \partial_\omega \langle \partial_\theta L_{in}, u\rangle .

    The inner gradient is linearised once; each step of the linear solver then costs one Hessian-vector product. Both
    formulas hold where theta is a stationary point of a smooth inner objective, inside its domain. At a solution with
    active constraints or at a kink (non-negative least squares, lasso), and after too few inner steps, they give a
    wrong number, which `inner_gradient_relative` shows and the linear solver's residual does not; for constraints and
    kinks there is `prox_aid`.

    With `fb.Minibatches`, `fb.Sampler` or `fb.FiniteSum` as inner batch, all products and the cross derivative are
    taken on one batch: the draw after those of the inner steps. Of fewer samples than parameters it has a singular
    Hessian, and the system no solution; `cg` then leaves its flat directions out, and `linear_converged` is false.
    Damping, or a method that moves u by a step at a time (`soba`, `amigo`), averages over batches. A leaf of
    inner_params that the inner objective does not see has no part in the linear system; a warning names it.

    Order: second (products with the Hessian in theta, and one cross derivative). Memory: one vector like theta, with a
    warm start.

    Arguments:
        linear_solver: `cg`, `normal_cg`, `gmres`, `neumann`, `gradient_descent`, `identity`, or any lineax solver.
        warm_start: whether the solver starts from the previous outer step's u, or from zero.
        correction: beta >= 0. All derivatives are then taken at theta - beta N, N = (H + delta I)^-1 d_theta L_in the
            Newton step at theta, solved for by the same solver from zero: twice the Hessian products. With beta = 1
            and exact solves the error is of second order in that of theta (and zero for a quadratic objective), where
            theta is near enough a minimum for Newton's method: where the Hessian of a network is singular or
            indefinite, N is what the damping makes of it. `funcid` has the same correction in function space.

    Returns:
        An `Estimator` for either kind of problem (a functional one is taken at the model's parameters, in
        evaluation mode). Metrics: `adjoint_finite`, `linear_residual`, `linear_converged`, `linear_curvature`,
        `inner_gradient_norm` and `inner_gradient_relative`: with g = d_theta L_in and H its Hessian, |g| and
        |g| / (|g| + kappa |theta|), kappa = |H u| / |u| the curvature that u has met. With a correction the
        second and `outer_value` are those at theta - beta N, and `newton_residual` is the residual of N's system.

    Raises:
        TypeError: `linear_solver` is not one.
        ValueError: `correction` is negative or not finite.

    Example:
        >>> estimator = fb.aid(fb.cg(20, damping=1e-3))
        >>> corrected = fb.aid(fb.cg(20), correction=1.0)

    References:
        Pedregosa, ICML 2016, https://arxiv.org/abs/1602.02355;
        Lorraine, Vicol, Duvenaud, AISTATS 2020, https://arxiv.org/abs/1911.02590.
    """
    solver, corrected = as_linear_solver(linear_solver), check_correction("aid", correction)

    def at(call: Call, lengths: tuple[float, ...], found: PyTree | None = None) -> tuple[InnerSolution, Hypergradient]:
        """The estimate after Newton steps of these lengths; u is solved for, or `found` refined by its residual."""
        problem, model, solve, outer_params, inner_batch, outer_batch, state, _ = call
        inner = solve(outer_params)
        theta, problem = inner.fit.params, as_parametric(problem, model, inner.fit.model_state, inner_batch)

        seen = leaves_seen("aid", problem, outer_params, theta, inner_batch)

        def part(tree: PyTree) -> PyTree:  # the leaves that are in the system, None for the others
            return jax.tree.map(lambda x, s: x if s else None, tree, seen)

        def whole(part: PyTree) -> PyTree:
            leaves = iter(jax.tree.leaves(part))
            return jax.tree.map(lambda x, s: next(leaves) if s else jnp.zeros_like(x), theta, seen)

        slope, newton_metrics, broken = None, {}, False
        for beta in lengths:
            gradient, hessian = inner_derivatives(problem, outer_params, theta, inner_batch)
            slope = gradient if slope is None else slope
            N, residuals, _ = solve_linear(solver, lambda t, H=hessian: part(H(whole(t))), part(gradient), None)
            newton_metrics = {"newton_residual": residuals["linear_residual"]}
            before, theta = theta, tree_add_scaled(theta, -beta, tree_cast(whole(N), theta))
            broken = broken | all_finite(before) & ~all_finite(theta)

        value, aux, g_exp, d = outer_derivatives(problem, outer_params, theta, outer_batch)
        gradient, hessian = inner_derivatives(problem, outer_params, theta, inner_batch)
        initial, rhs = part(state) if warm_start else None, d
        if found is not None:
            initial, rhs = None, tree_add_scaled(d, -1.0, rescaled(hessian, theta)(found))
        solution, metrics, curvature = solve_linear(solver, lambda t: part(hessian(whole(t))), part(rhs), initial)
        u = tree_cast(whole(solution), working_dtype(theta))
        u = u if found is None else tree_add_scaled(found, 1.0, u)
        cross = rescaled(lambda u: inner_cross_derivative(problem, outer_params, theta, inner_batch, u), theta)(u)
        g_imp = tree_cast(jax.tree.map(jnp.negative, cross), outer_params)

        norm = tree_norm(gradient)
        at_theta = norm if slope is None else tree_norm(slope)
        metrics = metrics | stationarity(at_theta, norm, curvature * tree_norm(part(theta))) | aux | newton_metrics
        sound = all_finite(value, d) | broken  # what N has broken is not the outer level's fault
        metrics |= {"adjoint_finite": all_finite(u, metrics) | ~sound, "outer_finite": sound}
        total = tree_add_scaled(g_exp, 1.0, g_imp)
        return inner, Hypergradient(total, g_exp, g_imp, value, u, metrics)

    own = (correction,) if corrected else ()

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        inner, h = at(call, own)
        return inner, h if warm_start else h._replace(state=())

    def refine(call: Call) -> tuple[Hypergradient, Hypergradient, Hypergradient, Hypergradient]:
        _, first = at(call, own)
        _, again = at(call, own, at(call, own, first.state)[1].state)
        _, second = at(call, (*own, 1.0), first.state)
        _, third = at(call, (*own, 1.0, 1.0), second.state)
        return first, again, second, third

    layer = None if corrected else root_layer(solver)
    return Estimator(solution_start if warm_start else no_state, by_call(estimate), refine=refine, layer=layer)

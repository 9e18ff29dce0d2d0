"""AID where the inner problem has kinks or constraints: through the fixed point of a proximal-gradient step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from funcbilevel._argmin import parametric_layer
from funcbilevel._arguments import check_callable, check_positive
from funcbilevel._check import leaves_seen
from funcbilevel._described import described
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call, no_state
from funcbilevel._linear_solvers import LinearSolver, as_linear_solver, rescaled, solution_start, solve_linear
from funcbilevel._predictor import as_parametric
from funcbilevel._problem import (
    Problem,
    inner_cross_derivative,
    inner_derivatives,
    inner_value,
    outer_derivatives,
    stationarity,
)
from funcbilevel._prox import Prox, prox_root, reduced
from funcbilevel._tree import all_finite, tree_add_scaled, tree_cast, tree_norm, working_dtype
from funcbilevel._typing import Batch, InnerParams, LinearMap, Metrics, OuterParams, PyTree

if TYPE_CHECKING:
    import lineax


@described
def prox_aid(
    linear_solver: LinearSolver | lineax.AbstractLinearSolver[Any],
    prox: Prox,
    step_size: float = 1.0,
    warm_start: bool = True,
) -> Estimator:
    r"""Implicit differentiation of a minimiser of L_in + g, where g has kinks or is a constraint.

    It is a fixed point of the proximal-gradient step :math:`T(\theta) = \mathrm{prox}_{s g}(z)`,
    :math:`z = \theta - s\,\partial_\theta L_{in}(\omega, \theta)`, for any step size s. With D the derivative of the
    prox at z and H the Hessian of L_in,

    .. math::
        D\,(I - (I - sH) D)\, w &= D\, \partial_\theta L_{out}, \qquad t = D w, \\
        \nabla F(\omega) &= \partial_\omega L_{out}
            + (\partial_\omega T)^\top (\partial_\theta L_{out} + t - s H t) .

    D maps onto the directions in which the solution can move: the support of a lasso, the coordinates that are not at a
    bound, the face of a simplex. The system is solved on those alone, is symmetric, and costs one product with H per
    step. omega may be in the prox: a penalty, a bound, a radius. Where strict complementarity fails (a multiplier is
    zero, so that a constraint is about to become active or inactive) F has a kink, and this is the derivative of
    one of its sides.

    Order: second (products with the Hessian in theta, and one cross derivative). Memory: one vector like theta, with a
    warm start.

    Arguments:
        linear_solver: as in `aid`; `cg` where L_in is convex.
        prox: `(inner_params, outer_params, step_size) -> inner_params`, the proximal operator of a convex
            step_size * g(omega, .), whose derivative is symmetric: `lambda w, omega, s: fb.prox_l1(w, s * omega)`; or a
            projection: `lambda w, omega, s: optax.projections.projection_simplex(w)`.
        step_size: s > 0, the scale on which L_in and g are compared. The derivative does not depend on it at the exact
            solution; near it, the active set is told best by s near 1 / largest eigenvalue of H.
        warm_start: whether the solver starts from the previous outer step's w, or from zero.

    Returns:
        An `Estimator`, as `aid` gives; the inner solution may come from `fb.proximal(optax.sgd(s), prox, s)`. Metrics:
        those of `aid`, where in place of the inner gradient stands (theta - T(theta)) / s; `active_set_size`, the
        number of coordinates that can move; `strict_complementarity`, whether D is the same for all z nearby: as near
        as the inner solution is inexact.

    Raises:
        TypeError, ValueError: an argument is not what it should be.

    Example: the penalty of a lasso, on orthogonal features: w = soft(y, penalty).
        >>> import jax.numpy as jnp, funcbilevel as fb
        >>> y = jnp.array([3.0, -2.0, 0.5])
        >>> problem = fb.ParametricProblem(
        ...     lambda penalty, w, _: jnp.sum((w - y) ** 2) / 2, lambda penalty, w, _: jnp.sum(w**2) / 2
        ... )
        >>> estimator = fb.prox_aid(fb.cg(3), lambda w, penalty, s: fb.prox_l1(w, s * penalty))
        >>> h = fb.hypergradient(problem, None, estimator, 1.0, fb.prox_l1(y, 1.0), None, None)
        >>> float(h.gradient), int(h.metrics["active_set_size"])
        (-3.0, 2)

    References:
        Bertrand et al., *Implicit Differentiation for Fast Hyperparameter Selection in Non-Smooth Convex Learning*,
        JMLR 2022, https://arxiv.org/abs/2105.01637; Blondel et al., NeurIPS 2022, https://arxiv.org/abs/2105.15183.
    """
    solver = as_linear_solver(linear_solver, "prox_aid")
    check_callable("prox_aid", "prox", prox, "inner_params, outer_params, step_size")
    check_positive("prox_aid", "step_size", step_size)

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        problem, model, solve, outer_params, inner_batch, outer_batch, state, _ = call
        inner = solve(outer_params)
        theta, problem = inner.fit.params, as_parametric(problem, model, inner.fit.model_state, inner_batch)
        value, aux, g_exp, d = outer_derivatives(problem, outer_params, theta, outer_batch)
        gradient, H = inner_derivatives(problem, outer_params, theta, inner_batch)

        seen = leaves_seen("prox_aid", problem, outer_params, theta, inner_batch)

        def part(tree: PyTree) -> PyTree:  # leaves that the inner objective does not see do not move
            return jax.tree.map(lambda x, s: x if s else jnp.zeros_like(x), tree, seen)

        z = tree_add_scaled(theta, -step_size, gradient)
        image, pull = jax.vjp(lambda z, omega: prox(z, omega, step_size), z, outer_params)

        def D(t: PyTree) -> PyTree:
            return part(pull(part(t))[0])

        w, metrics, _ = solve_linear(solver, reduced(D, H, step_size), D(d), state if warm_start else None)
        t = D(tree_cast(w, theta))
        Ht = rescaled(H, theta)(tree_cast(t, working_dtype(theta)))
        z_bar, of_prox = pull(tree_add_scaled(tree_add_scaled(d, 1.0, t), -step_size, Ht))
        z_bar = tree_cast(part(z_bar), working_dtype(theta))
        cross = rescaled(lambda u: inner_cross_derivative(problem, outer_params, theta, inner_batch, u), theta)(z_bar)
        g_imp = tree_cast(tree_add_scaled(of_prox, -step_size, cross), outer_params)

        error = jax.tree.map(jnp.subtract, theta, image)
        norm, t_norm = tree_norm(error) / step_size, tree_norm(t)
        curvature = tree_norm(Ht) / jnp.where(t_norm > 0, t_norm, 1.0)
        metrics = metrics | stationarity(norm, norm, curvature * tree_norm(theta))
        metrics |= _active_set(lambda z: prox(z, outer_params, step_size), z, error, part) | aux
        sound = all_finite(value, d)
        metrics |= {"adjoint_finite": all_finite(w, t, metrics) | ~sound, "outer_finite": sound}
        total = tree_add_scaled(g_exp, 1.0, g_imp)
        return inner, Hypergradient(total, g_exp, g_imp, value, w if warm_start else (), metrics)

    def at_fixed_point(problem: Problem, outer_params: OuterParams, theta: InnerParams, batch: Batch) -> InnerParams:
        def gradient(theta: InnerParams) -> InnerParams:
            return jax.grad(lambda theta: inner_value(problem, outer_params, theta, batch)[0])(theta)

        return prox_root(gradient, lambda z: prox(z, outer_params, step_size), theta, step_size, solver)

    return Estimator(
        solution_start if warm_start else no_state,
        by_call(estimate),
        reaches=True,
        layer=parametric_layer(at_fixed_point),
    )


def _active_set(prox: LinearMap, z: PyTree, error: PyTree, part: LinearMap) -> Metrics:
    """How many coordinates the derivative of the prox at z lets move, and whether it is the same on both sides of z.

    A row of the derivative is zero if and only if it is so along a random direction. The sides are a random step away,
    as long as the fixed point is inexact, and the square root of rounding error at least.
    """
    leaves, structure = jax.tree.flatten(z)
    keys = jax.random.split(jax.random.key(0), 2 * len(leaves))
    directions = [jax.random.uniform(k, x.shape, x.dtype, 0.5, 1.5) for k, x in zip(keys, [*leaves, *leaves])]
    direction = part(jax.tree.unflatten(structure, directions[: len(leaves)]))
    signs = [jnp.where(r > 1.0, 1.0, -1.0).astype(r.dtype) * r for r in directions[len(leaves) :]]
    away = jax.tree.unflatten(structure, signs)

    def size(tree: PyTree) -> jax.Array:
        return jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]))

    def along(z: PyTree) -> PyTree:  # D at z along the direction
        return part(jax.jvp(prox, (z,), (direction,))[1])

    eps = max(float(jnp.finfo(x.dtype).eps) for x in leaves) ** 0.5
    radius = size(error) + eps * (1.0 + size(z))
    before, after = (along(tree_add_scaled(z, sign * radius, away)) for sign in (-1.0, 1.0))
    rows = [jnp.sum(x != 0) for x in jax.tree.leaves(along(z))]
    jump = tree_norm(jax.tree.map(jnp.subtract, before, after))
    return {"active_set_size": jnp.sum(jnp.stack(rows)), "strict_complementarity": jump <= 0.05}

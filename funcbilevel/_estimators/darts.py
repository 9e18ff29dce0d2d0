"""DARTS: a virtual inner step, and its derivative by finite differences."""

import jax
import jax.numpy as jnp

from funcbilevel._arguments import check_positive
from funcbilevel._described import described
from funcbilevel._estimator import Call, Estimator, Hypergradient, InnerSolution, by_call, no_state
from funcbilevel._predictor import as_parametric
from funcbilevel._problem import inner_value, mean_over_devices, outer_derivatives
from funcbilevel._tree import all_finite, tree_add_scaled, tree_norm
from funcbilevel._typing import InnerParams, OuterParams


@described
def darts(step_size: float, radius: float = 0.01) -> Estimator:
    r"""The second-order approximation of DARTS, by first derivatives alone.

    With theta the inner variable, one virtual inner step :math:`\theta' = \theta - \xi\, \partial_\theta L_{in}(\omega,
    \theta)`, :math:`d = \partial_\theta L_{out}(\omega, \theta')` and :math:`\epsilon = radius / \|d\|`,

    .. math::
        \nabla F(\omega) \approx \partial_\omega L_{out}(\omega, \theta') - \xi\,
            \frac1{2 \epsilon} \bigl(\partial_\omega L_{in}(\omega, \theta + \epsilon d)
            - \partial_\omega L_{in}(\omega, \theta - \epsilon d)\bigr) .

    That is the derivative of one inner step, `itd(1)`, up to the difference's error of the order of radius^2; it is not
    the derivative through the inner solution, as long as :math:`\xi` is not 1 over the curvature.

    Order: first; two more gradients than `alternating`, and one inner gradient. Memory: none. In float32 a radius far
    below 0.01 loses the difference's digits.

    Arguments:
        step_size: xi > 0, the inner learning rate.
        radius: > 0.

    Returns:
        An `Estimator` for either kind of problem (a functional one is taken at the model's parameters, in evaluation
        mode).

    Raises:
        ValueError: an argument is not positive.

    Example:
        >>> estimator = fb.darts(step_size=0.1)

    References:
        Liu, Simonyan, Yang, *DARTS: differentiable architecture search*, ICLR 2019, https://arxiv.org/abs/1806.09055,
        equations 6 to 8.
    """
    check_positive("darts", "step_size", step_size)
    check_positive("darts", "radius", radius)

    def estimate(call: Call) -> tuple[InnerSolution, Hypergradient]:
        problem, model, solve, outer_params, inner_batch, outer_batch, state, _ = call
        inner = solve(outer_params)
        theta, parametric = inner.fit.params, as_parametric(problem, model, inner.fit.model_state, inner_batch)

        def L_in(omega: OuterParams, theta: InnerParams) -> jax.Array:
            return inner_value(parametric, omega, theta, inner_batch)[0]

        gradient = mean_over_devices(problem, jax.grad(L_in, argnums=1)(outer_params, theta))
        virtual = tree_add_scaled(theta, -step_size, gradient)
        value, aux, g_exp, d = outer_derivatives(parametric, outer_params, virtual, outer_batch)
        size = tree_norm(d)
        epsilon = radius / jnp.where(size > 0, size, 1.0)
        # Both ends by one copy of the gradient in the compiled program.
        ends = jax.tree.map(lambda x, d: x[None] + _signs(x, epsilon) * d[None], theta, d)
        at_ends = jax.lax.map(lambda theta: jax.grad(L_in)(outer_params, theta), ends)
        g_imp = jax.tree.map(lambda x: (-step_size * (x[0] - x[1]) / (2.0 * epsilon)).astype(x.dtype), at_ends)
        sound = all_finite(value, d)
        metrics = aux | {"adjoint_finite": all_finite(g_imp) | ~sound, "outer_finite": sound}
        return inner, Hypergradient(tree_add_scaled(g_exp, 1.0, g_imp), g_exp, g_imp, value, state, metrics)

    return Estimator(no_state, by_call(estimate))


def _signs(x: jax.Array, epsilon: jax.Array) -> jax.Array:
    """(epsilon, -epsilon) along an axis before those of x."""
    return jnp.stack([epsilon, -epsilon]).astype(x.dtype).reshape(2, *(1,) * x.ndim)

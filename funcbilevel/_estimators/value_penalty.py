"""The value-function penalty: a first-order hypergradient from two solutions of the inner level."""

import jax
import optax

from funcbilevel._described import described
from funcbilevel._estimator import Estimator
from funcbilevel._estimators._penalty import penalised
from funcbilevel._problem import ParametricProblem, inner_value, mean_over_devices, stationarity
from funcbilevel._tree import tree_norm
from funcbilevel._typing import Batch, InnerParams, Metrics, OuterParams


@described
def value_penalty(
    optimizer: optax.GradientTransformation, num_steps: int, penalty: float, warm_start: bool = True
) -> Estimator:
    r"""The value-function penalty, with lambda = `penalty`.

    .. math::
        y &\approx \arg\min_y L_{in}(\omega, y) + \tfrac1\lambda L_{out}(\omega, y), \\
        \nabla F(\omega) &\approx \partial_\omega L_{out}(\omega, y)
            + \lambda\,\bigl(\partial_\omega L_{in}(\omega, y) - \partial_\omega L_{in}(\omega, \theta)\bigr) .

    First derivatives only. The bias is of order 1/lambda where the inner objective is strongly convex in theta; the
    error of y and theta, and rounding, are multiplied by lambda.

    Order: first. Memory: one vector like theta, and its optimizer's state.

    Arguments:
        optimizer: any optax optimizer, for y.
        num_steps: K >= 1, its steps per outer step.
        penalty: lambda > 0.
        warm_start: whether y and the optimizer state go on from the previous outer step; if not, y starts at theta.

    Returns:
        An `Estimator` for either kind of problem. Metrics: `adjoint_finite` (y is finite); `penalty_objective`, what y
        minimises, at the last step; `inner_gradient_norm`, |g| with g = d_theta L_in, which ought to be zero, and
        `inner_gradient_relative`, |g| / (|g| + |d_theta L_out| / lambda), over what moves y away from theta.

    Raises:
        TypeError: `optimizer` is not one.
        ValueError: `num_steps` < 1, `penalty` <= 0.

    Example:
        >>> estimator = fb.value_penalty(optax.adam(1e-3), num_steps=20, penalty=100.0)

    References:
        Kwon, Kwon, Wright, Nowak, ICML 2023, https://arxiv.org/abs/2301.10945;
        Shen and Chen, ICML 2023, https://arxiv.org/abs/2302.05185.
    """

    def suboptimality(
        problem: ParametricProblem, outer_params: OuterParams, y: InnerParams, theta: InnerParams, inner_batch: Batch
    ) -> jax.Array:
        at_y, _ = inner_value(problem, outer_params, y, inner_batch)
        at_theta, _ = inner_value(problem, outer_params, theta, inner_batch)
        return at_y - at_theta

    def at_theta(
        problem: ParametricProblem, outer_params: OuterParams, theta: InnerParams, inner_batch: Batch, d: InnerParams
    ) -> Metrics:
        gradient = jax.grad(lambda theta: inner_value(problem, outer_params, theta, inner_batch)[0])(theta)
        norm = tree_norm(mean_over_devices(problem, gradient))
        return stationarity(norm, norm, tree_norm(d) / penalty)

    return penalised("value_penalty", suboptimality, optimizer, num_steps, penalty, warm_start, at_theta)
